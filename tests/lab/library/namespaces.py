"""Rooms of this run's own: what is made in them ends with them, and nothing else on the machine sees it."""

import ctypes
import os
import subprocess
import sys

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x40000000, 0x04000000, 0x08000000
_entered = []


def reap(main):
    """Run ``main()`` in a child and return its exit code; as PID 1 this process collects every orphan of the run."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = main()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            print(f"tests/run: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    while True:
        try:
            pid, status = os.wait()
        except KeyboardInterrupt:
            continue
        if pid == child:
            return os.waitstatus_to_exitcode(status) % 256


def enter_once():
    """Call ``enter`` unless this process is in such namespaces already."""
    if not _entered:
        enter()
        _entered.append(True)


def enter():
    """Put the calling thread, and all that it starts from now on, into a network and mount namespace of its own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    for command in (
        "mount --make-rprivate /",
        "mkdir -p /run/netns /run/systemd",
        "mount -t tmpfs -o mode=755 tmpfs /run/netns",
        # To systemd-nspawn every machine shall look the same, whether systemd runs it or not.
        "mount -t tmpfs -o mode=755 tmpfs /run/systemd",
        # Hide the machine's own layout of cgroups: hosts get pure v2.
        "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        "ip link set lo up",
    ):
        subprocess.run(command.split(), check=True)
