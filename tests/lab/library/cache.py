"""Things that are costly to make, kept outside the checkout under the hash of what went into them."""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import time

ROOT = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "salt-xmpp-tests"
KEEP_SECONDS = 2 * 24 * 3600


def digest(*inputs):
    """Return the key of ``inputs`` (text, bytes, numbers, lists): equal inputs, equal key."""
    return hashlib.sha256("\0".join(repr(x) for x in inputs).encode()).hexdigest()[:16]


@contextlib.contextmanager
def lock(path):
    """Hold the lock file ``path``; whoever held it and died holds it no more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def get(kind, key, build):
    """Return the folder that ``build(folder)`` filled for ``key``, filling it if it is not there.

    One builder of a kind at a time, also across runs. A folder gets its name only when it is whole.
    """
    home = ROOT / kind
    place = home / key
    with lock(home / ".lock"):
        if not place.exists():
            started = time.monotonic()
            print(f"== building {kind} ({key})", flush=True)
            for failed in home.glob(".*.unfinished"):
                shutil.rmtree(failed)
            unfinished = home / f".{key}.unfinished"
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(place)
            print(f"== built {kind} in {time.monotonic() - started:.0f} s", flush=True)
        os.utime(place)
        prune(home)
    return place


def prune(home):
    """Remove the folders in ``home`` that nobody asked for in a long time."""
    for old in home.glob("*/"):
        if old.stat().st_mtime < time.time() - KEEP_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
