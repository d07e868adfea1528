"""The configuration of our own masterless minion, and the pillar that it has."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import machine

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = Path("/etc/salt/xmpp")
LOGS = Path("/var/log/salt/xmpp")
CACHE = Path("/var/cache/salt/xmpp")


@dataclass
class Place:
    """Where the minion's files are: the machine's own, or, for --test, a directory that goes away again."""

    config: Path
    cache: Path
    logs: Path

    @property
    def pillar(self):
        return self.config / "pillar"

    @property
    def candidate(self):
        """A pillar that is not yet known to be good."""
        return self.config / "pillar.new"


REAL = Place(CONFIG, CACHE, LOGS)


def passing_place():
    root = Path(tempfile.mkdtemp(prefix="xmpp-bootstrap-"))
    return Place(root / "config", root / "cache", root / "log")


def minion_id():
    """The id that an earlier run gave to this minion, or None."""
    found = re.search(r'^id: "(.*)"$', _read(CONFIG / "minion") or "", re.MULTILINE)
    return found and found.group(1)


def write_minion(place, identity):
    """Write the minion's configuration, and return whether the machine's own is, or would be, changed by it."""
    for directory in (place.config, place.cache, place.logs):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    changed = _read(REAL.config / "minion") != _minion(REAL, identity)
    _write(place.config / "minion", _minion(place, identity))
    return changed


def _minion(place, identity):
    settings = {
        "id": identity,
        "file_client": "local",
        "file_roots": {"base": [str(CHECKOUT), f"{CHECKOUT}/salt"]},
        "pillar_roots": {"base": [str(place.pillar)]},
        "root_dir": "/",
        "pki_dir": str(place.config / "pki"),
        "cachedir": str(place.cache),
        "extension_modules": str(place.cache / "extmods"),
        "sock_dir": "/run/salt/xmpp",
        "log_file": str(place.logs / "minion"),
        "log_level_logfile": "warning",
        # Neither is of use here, and both cost time: the first asks the name server.
        "enable_fqdns_grains": False,
        "enable_gpu_grains": False,
    }
    if not machine.has_systemd():
        # Where systemctl is there and systemd is not, two of Salt's modules want to be `service`. The one for systemd
        # does nothing then, and says that all is well; what the other one lacks would still be taken from it.
        settings["disable_modules"] = ["systemd_service"]
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in settings.items()]
    return "# Written by bootstrap, and again at each run. A minion of its own: it has no master.\n" + "".join(lines)


def known_pillar():
    return (CONFIG / "pillar" / "xmpp.sls").exists()


def offer_pillar(place, text):
    """Write a pillar as the candidate, to be taken by :func:`take_pillar` when it is known to be good."""
    drop_candidate(place)
    _pillar_directory(place.candidate, text)


def take_pillar(place):
    """Put the candidate in the pillar's place; return whether that changed it. What was there stays as xmpp.sls.old."""
    text = _read(place.candidate / "xmpp.sls")
    before = _read(place.pillar / "xmpp.sls")
    if before not in (None, text):
        _write(place.pillar / "xmpp.sls.old", before)
    changed = _pillar_directory(place.pillar, text)
    drop_candidate(place)
    return changed


def drop_candidate(place):
    shutil.rmtree(place.candidate, ignore_errors=True)


def copy_pillar(place):
    """Give a passing place the machine's own pillar."""
    shutil.copytree(CONFIG / "pillar", place.pillar)


def made_pillar(domain, node):
    """The pillar of a machine that nobody wrote one for."""
    return f"""\
# Made by bootstrap for this machine. Change it, and run bootstrap again: it keeps what is here.
# All that can be set is in pillar.example, in {CHECKOUT}
xmpp:
  domain: {domain}
  nodes:
    {node}: {{}}
  tls:
    source: internal
"""


def own_domain():
    return machine.full_host_name() or "xmpp.localhost"


def _pillar_directory(directory, text):
    directory.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)
    top = _write(directory / "top.sls", "base:\n  '*':\n    - xmpp\n")
    return _write(directory / "xmpp.sls", text) or top


def _read(path):
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write(path, text):
    """Write a file that only root can read, in one step; return whether it was another before."""
    if _read(path) == text:
        path.chmod(0o600)
        return False
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    new.rename(path)
    return True
