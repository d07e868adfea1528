"""A lab: hosts on one network that ends where the process's network namespace ends."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from . import cache, index, mirror, namespaces
from .host import Host
from .packages import CHECKOUT, RELEASES

CGROUPS = pathlib.Path("/sys/fs/cgroup")
BRIDGE = "lab"
HERE = ("192.0.2.1", "2001:db8::1")
SERVER = ("192.0.2.2", "2001:db8::2")
active = []


def ip(command):
    """Run ``ip`` with the words of ``command``."""
    subprocess.run(["ip", *command.split()], check=True)


class Lab:
    """Hosts, and the process that made it, on 192.0.2.0/24 and 2001:db8::/64.

    releases
        Debian releases whose packages mirror.lab and pypi.lab shall offer (default: all).
    mounts
        What every host sees read-only: ``{path in the host: path here}`` (default: this checkout at /srv/xmpp-formula).
    """

    def __init__(self, releases=RELEASES, mounts=None):
        namespaces.enter_once()
        self.mounts = {"/srv/xmpp-formula": CHECKOUT} if mounts is None else mounts
        self.hosts = {}
        self.names = {}
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="lab-", dir=run_folder()))
        for old in CGROUPS.glob("salt-xmpp-*"):
            if not (cache.ROOT / "runs" / old.name).exists():
                remove_cgroup(old)
        self.cgroup = CGROUPS / run_folder().name / self.folder.name
        self.cgroup.mkdir(parents=True)
        self._hosts_file = self.folder / "hosts"
        self._hosts_file.touch()
        subprocess.run(["mount", "--bind", str(self._hosts_file), "/etc/hosts"], check=True)
        ip(f"link add {BRIDGE} type bridge forward_delay 0")
        for address in (*HERE, *SERVER):
            ip(f"addr add {with_prefix(address)} dev {BRIDGE}" + " nodad" * (":" in address))
        ip(f"link set {BRIDGE} up")
        self._serve(releases)
        self.write_hosts()
        active.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def host(self, name, addresses=(), names=(), layers="trixie", init="systemd", start=True):
        """Return a new host, started and up unless told otherwise.

        name
            Its fully qualified name; the first label is its hostname.
        addresses
            Its IPv4 and IPv6 addresses (default: the next free ones from 192.0.2.10 and 2001:db8::10 on).
        names
            Further names under which the whole lab finds it.
        layers
            Its root: a stack's name ("trixie", "bookworm+apps+salt") or what ``Host.freeze`` returned.
        init
            "systemd", or None for a host without it, as a container is: PID 1 only reaps.
        """
        if name in self.hosts:
            raise ValueError(f"there is a host {name} already")
        host = Host(self, name, tuple(addresses) or self._free_addresses(), tuple(names), layers, init)
        self.hosts[name] = host
        self.write_hosts()
        if start:
            host.start()
        return host

    def write_hosts(self):
        """Tell every host, and this process, all names of the lab."""
        rows = [(address, ["tests.lab"]) for address in HERE]
        rows += [(address, ["mirror.lab", "pypi.lab"]) for address in SERVER]
        rows += [(address, list(names)) for address, names in self.names.items()]
        for host in self.hosts.values():
            rows += [(address, [host.name, host.short_name, *host.names]) for address in host.addresses]
        text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
        text += "".join(f"{address} {' '.join(dict.fromkeys(names))}\n" for address, names in rows)
        self._hosts_file.write_text(text)
        for host in self.hosts.values():
            host.path("/etc/hosts").write_text(text)

    def save_logs(self, name):
        """Keep the logs of all hosts under ``name`` and return the folder: in $LAB_LOGS, or else in the cache."""
        folder = pathlib.Path(os.environ.get("LAB_LOGS") or cache.ROOT / "logs" / run_folder().name) / name
        shutil.rmtree(folder, ignore_errors=True)
        for host in self.hosts.values():
            host.save_logs(folder / host.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "server.log", folder)
        return folder

    def close(self):
        """End every host and take the network down."""
        active.remove(self)
        for host in list(self.hosts.values()):
            host.destroy()
        self._server.kill()
        self._server.wait()
        ip(f"link del {BRIDGE}")
        subprocess.run(["umount", "/etc/hosts"], check=True)
        remove_cgroup(self.cgroup)
        shutil.rmtree(self.folder)

    def _free_addresses(self):
        taken = {address for host in self.hosts.values() for address in host.addresses}
        number = next(n for n in range(10, 250) if not {f"192.0.2.{n}", f"2001:db8::{n}"} & taken)
        return f"192.0.2.{number}", f"2001:db8::{number}"

    def _serve(self, releases):
        settings = {
            "mirrors": [str(mirror.get(release)) for release in releases],
            "indexes": [str(index.get(release)) for release in releases],
            "addresses": SERVER,
        }
        command = [sys.executable, "-m", f"{__package__}.server", json.dumps(settings)]
        with open(self.folder / "server.log", "wb") as log:
            self._server = subprocess.Popen(
                command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        if self._server.stdout.readline() != b"ready\n":
            raise RuntimeError("the lab's web server did not start:\n" + (self.folder / "server.log").read_text())


def with_prefix(address):
    """Return ``address`` with the length of its network's prefix."""
    return f"{address}/{64 if ':' in address else 24}"


def frozen(name, build):
    """Return the layers that ``build()`` returned for ``name`` the first time that any process of this run asked."""
    home = run_folder() / "frozen"
    record = home / f"{name}.json"
    with cache.lock(home / f"{name}.lock"):
        if not record.exists():
            record.write_text(json.dumps(build()))
        return json.loads(record.read_text())


def run_folder():
    """Return the folder of this run, which all its processes share. The first call clears what killed runs left."""
    if "LAB_RUN" in os.environ:
        return pathlib.Path(os.environ["LAB_RUN"])
    runs = cache.ROOT / "runs"
    with cache.lock(runs / ".lock"):
        for old in runs.glob("salt-xmpp-*"):
            with contextlib.suppress(BlockingIOError), open(old / "lock", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
        cache.prune(cache.ROOT / "logs")
        folder = pathlib.Path(tempfile.mkdtemp(prefix="salt-xmpp-", dir=runs))
        folder.chmod(0o755)
        # Held by this process and its children for as long as any of them lives.
        held = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)
        os.set_inheritable(held, True)
    os.environ["LAB_RUN"] = str(folder)
    return folder


def remove_cgroup(path, timeout=10):
    """Remove a cgroup and those in it; processes that were killed may take a moment to leave it."""
    end = time.monotonic() + timeout
    for folder, _, _ in os.walk(path, topdown=False):
        while True:
            try:
                os.rmdir(folder)
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
