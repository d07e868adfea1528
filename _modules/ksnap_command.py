"""
The command line of OpenZFS
===========================

The one place where ``zfs`` and ``zpool`` are run (zfs(8), zpool(8), OpenZFS 2.1 and later).
"""

import os
import shutil
import subprocess

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

PROGRAMS = ("zfs", "zpool")
PLACES = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"  # a service's PATH may lack them
# What OpenZFS says, and what there is to do.
ADVICE = (
    ("dataset is busy", "See who uses it: fuser -vm <mount point>. Stop that, or name its service, and try again."),
    ("pool or dataset is busy", "See who uses it: fuser -vm <mount point>. Stop that, or name its service."),
    ("does not exist", "See what there is: zfs list -t all."),
    ("no such pool", "See what there is: zpool list; zpool import."),
    ("out of space", "See what holds space: zfs list -o space. ksnap.prune frees some."),
    ("ZFS modules", "Load the module: modprobe zfs; or install it: zfs-dkms and the kernel's headers."),
    ("/dev/zfs", "Load the module: modprobe zfs; or install it: zfs-dkms and the kernel's headers."),
    ("permission denied", "Run as root, or see zfs allow."),
    ("I/O", "See zpool status -v."),
    ("suspended", "See zpool status -v, and zpool clear when the disk is back."),
)


def __virtual__():
    return __virtualname__


def command(argv, stdin=None):
    """
    Run ``zfs`` or ``zpool``.

    argv
        (list of strings) The command, such as ``[zfs, list, -H]``. Nothing else than ``zfs`` and ``zpool`` is run.
    stdin
        (string) What it reads: the place for a key, which must never be in ``argv``. Default: nothing

    Returns what it printed, a string. Raises ``SaltInvocationError`` for another program, and
    ``CommandExecutionError`` when it cannot be run or fails, with what it said and what there is to do.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.command '[zfs, list, -H]'
    """
    if not isinstance(argv, list) or not argv or argv[0] not in PROGRAMS:
        raise SaltInvocationError(f"ksnap.command runs a list that begins with zfs or zpool, not {argv!r}")
    words = [str(word) for word in argv]
    program = shutil.which(words[0], path=f"{os.environ.get('PATH', '')}:{PLACES}")
    if not program:
        raise CommandExecutionError(f"OpenZFS is not installed: there is no {words[0]}. Install zfsutils-linux.")
    try:
        done = subprocess.run(
            [program, *words[1:]],
            input=stdin if stdin is not None else "",
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except OSError as error:
        raise CommandExecutionError(
            f"{' '.join(words[:2])} could not be run: {error.strerror}. Too many datasets at once, or no memory?"
        ) from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        advice = next((what for words_of_it, what in ADVICE if words_of_it in said), "")
        raise CommandExecutionError(f"{_short(words)} failed: {said}" + (f"\n{advice}" if advice else ""))
    return done.stdout


def promote_dataset(dataset, origin):
    """
    Promote a clone (zfs-promote(8)), unless that would stop the machine.

    A promotion moves the bookmarks up to the origin too. Where the clone has one of the same name, OpenZFS 2.1 to 2.3
    do not refuse it but panic in the kernel, and the pool stands still until the machine is reset.

    dataset
        (string) The clone.
    origin
        (string) The snapshot that it is a clone of.

    Raises ``CommandExecutionError`` when it cannot be promoted.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.promote_dataset tank/copy tank/mail@then
    """
    owner = origin.partition("@")[0]
    zfs = __salt__["ksnap.command"]
    listing = ["zfs", "list", "-H", "-p", "-d", "1", "-t", "bookmark", "-o", "name,createtxg", dataset, owner]
    found = {dataset: {}, owner: {}}
    for line in zfs(listing).splitlines():
        name, txg = line.split("\t")
        found[name.partition("#")[0]][name.partition("#")[2]] = int(txg)
    both = found[dataset].keys() & found[owner].keys()
    if both:
        last = int(zfs(["zfs", "get", "-H", "-p", "-o", "value", "createtxg", origin]))
        wrong = sorted(f"{owner}#{name}" for name in both if found[owner][name] <= last)
        if wrong:
            raise CommandExecutionError(
                f"{dataset} was not promoted: it has bookmarks of the same names as {', '.join(wrong)}, which would "
                "move to it. Give them other names: zfs bookmark DATASET#NAME DATASET#OTHER, zfs destroy DATASET#NAME."
            )
    zfs(["zfs", "promote", dataset])


def _short(words):
    text = " ".join(words)
    return text if len(text) <= 400 else f"{text[:400]} … ({len(words)} words)"
