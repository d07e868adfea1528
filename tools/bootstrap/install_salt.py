"""A Salt that is new enough: the one that is there, or one of our own from PyPI in /opt/salt-xmpp."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import hints
from screen import Stop, run

WANTED = "salt>=3008,<3009"
OLDEST = 3008
HOME = "/opt/salt-xmpp"
CACHE = "/var/cache/salt/xmpp/install"
BORROWED = Path(CACHE, "borrowed")
# Salt needs timelib, which PyPI has as source only.
SOURCE_ONLY = "timelib"
COMPILER = ["gcc", "libc6-dev", "python3-dev"]
APT = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]
APT_ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive"}
PIP = [f"{HOME}/bin/python3", "-m", "pip", "--disable-pip-version-check", "--no-input"]
# timelib's generated C takes a minute to optimise, and Salt parses a date with it now and then.
PIP_ENVIRONMENT = {"PIP_CACHE_DIR": f"{CACHE}/pip", "PIP_PROGRESS_BAR": "off", "CFLAGS": "-O0 -g0"}


@dataclass
class Salt:
    program: str
    version: str
    python: str
    ours: bool


def packages_needed():
    """The Debian packages that :func:`install` begins with, for --test."""
    return [] if _has_venv() else ["python3-venv"]


def find(screen):
    """Return the Salt to use, or None. An existing salt-call comes before our own."""
    there = shutil.which("salt-call")
    if there:
        version = _version(there)
        if version and int(version.split(".")[0]) >= OLDEST:
            return Salt(there, version, _python_of(there), ours=False)
        screen.say(
            f"      {there} is Salt {version or 'of an unknown version'}; {OLDEST} or newer is needed. It stays as it "
            f"is, and is not used."
        )
    own = f"{HOME}/bin/salt-call"
    version = _version(own) if os.path.exists(own) else None
    return Salt(own, version, f"{HOME}/bin/python3", ours=True) if version else None


def install(screen, log):
    """Install Salt from PyPI, with what it needs from Debian, and return it."""
    screen.say(f"      None is here that is new enough: installing {WANTED} from PyPI into {HOME},")
    screen.say("      which takes one to four minutes")
    os.makedirs(CACHE, exist_ok=True)
    if not _has_venv():
        _apt_install(screen, log, ["python3-venv"])
    if not _runs(f"{HOME}/bin/python3", "-m", "pip", "--version"):
        _must(screen, log, ["python3", "-m", "venv", "--clear", HOME], f"making {HOME}", "see whether / has space left")
    _borrow_compiler(screen, log)
    _must(
        screen,
        log,
        [*PIP, "install", "--prefer-binary", WANTED],
        "pip",
        "make PyPI, or the mirror that pip is configured for, reachable from here",
    )
    salt = find(screen)
    if not salt:
        raise Stop(f"Salt was installed, but {HOME}/bin/salt-call does not run", f"see {log}", 1)
    return salt


def tidy(screen, log):
    """Remove what only the installation needed, also if it was an earlier run that installed."""
    if BORROWED.exists():
        _give_back(screen, log, BORROWED.read_text().split())
    shutil.rmtree(CACHE, ignore_errors=True)


def _borrow_compiler(screen, log):
    """Install a compiler if one is needed, and write down which packages are to be removed after use."""
    with tempfile.TemporaryDirectory() as directory:
        probe = [*PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", directory, SOURCE_ONLY]
        if run(screen, probe, log, "asking PyPI for what Salt needs", env=PIP_ENVIRONMENT)[0] == 0:
            return
    borrowed = set(BORROWED.read_text().split()) if BORROWED.exists() else set()
    _apt_update(screen, log)
    borrowed |= set(re.findall(r"^Inst (\S+) \(", _apt_simulate("install", *COMPILER), re.MULTILINE))
    BORROWED.write_text("\n".join(sorted(borrowed)))
    _apt_install(screen, log, COMPILER, updated=True)


def _give_back(screen, log, borrowed):
    """Remove these packages, unless something else came to need one of them."""
    # By a run that was interrupted just before, it may be that they were never installed.
    known = subprocess.run(["dpkg-query", "-W", "-f", "${Package}\n", *borrowed], capture_output=True, text=True)
    borrowed = sorted(set(known.stdout.split()))
    if not borrowed:
        return
    removed = set(re.findall(r"^(?:Remv|Purg) (\S+)", _apt_simulate("purge", *borrowed), re.MULTILINE))
    if removed <= set(borrowed):
        argv = [*APT, "purge", "-y", *borrowed]
        _must(screen, log, argv, "removing the compiler again", "run `apt-get -f install`")
        screen.say("      The compiler, which only the installation needed, is removed again")
    else:
        screen.say(f"      The compiler stays: {', '.join(sorted(removed - set(borrowed)))} needs part of it")


def _apt_update(screen, log):
    # Not fatal by itself: one dead source among several must not be in the way.
    run(screen, [*APT, "update"], log, "apt-get update", env=APT_ENVIRONMENT, on_line=str.strip)


def _apt_install(screen, log, packages, updated=False):
    if not updated:
        _apt_update(screen, log)
    _must(
        screen,
        log,
        [*APT, "install", "-y", "--no-install-recommends", *packages],
        f"installing {' '.join(packages)}",
        f"make `apt-get update && apt-get install {' '.join(packages)}` work",
    )


def _apt_simulate(*arguments):
    argv = [*APT, "-s", "--no-install-recommends", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **APT_ENVIRONMENT}).stdout


def _must(screen, log, argv, doing, do):
    environment = {**APT_ENVIRONMENT, **PIP_ENVIRONMENT}
    code, output, _ = run(screen, argv, log, doing, env=environment, on_line=lambda line: f"{doing}: {line.strip()}")
    if code:
        lines = [line for line in output.splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"\s*(E:|ERROR|error:|OSError|dpkg: error)", line)]
        raise Stop("\n".join([f"{doing}: failed", *(telling or lines)[-6:]]), hints.do_about(output) or do, 1)


def _runs(*argv):
    try:
        return subprocess.run(argv, capture_output=True).returncode == 0
    except OSError:
        return False


def _version(program):
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True)
    except OSError:  # a Python that an upgrade of Debian took away
        return None
    found = re.search(r"\b(\d{4,}(\.\d+)*)", done.stdout)
    return found.group(1) if done.returncode == 0 and found else None


def _python_of(program):
    """The Python that this salt-call runs in: it says so itself, and nothing of it is touched."""
    with tempfile.TemporaryDirectory() as directory:
        places = ["--config-dir", directory, "--cachedir", directory, "--log-file=/dev/null", "--log-level=quiet"]
        argv = [program, "--local", *places, "--out=json", "grains.get", "pythonexecutable"]
        done = subprocess.run(argv, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["local"]
    except (ValueError, KeyError) as error:
        raise Stop(
            f"{program} --local does not run: {(done.stderr or done.stdout).strip()[-300:]}",
            "mend that Salt, or remove it: then one is installed from PyPI",
        ) from error


def _has_venv():
    return _runs("python3", "-c", "import ensurepip, venv")
