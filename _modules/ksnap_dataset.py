"""
Datasets with their properties, and the data that was there before them
=======================================================================
"""

import filecmp
import os
import re
import stat
import subprocess
import tempfile
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

MOVING = "ksnap:moving"
SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGTPE]?)i?B?", re.IGNORECASE)
AT_CREATION = set("casesensitivity encryption keyformat normalization pbkdf2iters utf8only volblocksize".split())


def __virtual__():
    return __virtualname__


def dataset_differs(dataset, properties=None):
    """
    Compare a dataset with the properties that it shall have.

    dataset
        (string) The dataset.
    properties
        (dict) Properties (zfsprops(7)), native and user's, and their values, as ``zfs set`` takes them; true and false
        are on and off. ``volsize`` makes it a volume.

    Returns ``None`` if there is no such dataset, else a dict of each property that differs to a dict of ``old`` and
    ``new``. Raises ``SaltInvocationError`` for one that can only be set when a dataset is made.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.dataset_differs tank/mail '{recordsize: 16K}'
    """
    wanted = {key: _text(value) for key, value in (properties or {}).items()}
    try:
        shown = _zfs("get", "-H", "-p", "-o", "property,value", ",".join(["type", MOVING, *wanted]), dataset)
    except CommandExecutionError as error:
        if "does not exist" in str(error):
            return None
        raise
    exact = dict(line.split("\t", 1) for line in shown.splitlines())
    if exact[MOVING] != "-":
        return {MOVING: {"old": exact[MOVING], "new": None}}
    differs = {
        key: {"old": exact[key], "new": value} for key, value in wanted.items() if not _same(exact.get(key), value)
    }
    late = sorted(AT_CREATION & differs.keys())
    if late:
        raise SaltInvocationError(
            f"{', '.join(late)} of {dataset} can only be set when it is made; it is "
            f"{', '.join(differs[key]['old'] for key in late)}. Make another dataset, and move the data there."
        )
    return differs


def dataset_set(dataset, properties):
    """
    Set properties of a dataset.

    dataset
        (string) The dataset.
    properties
        (dict) As for :func:`dataset_differs`.

    Returns what has changed, as :func:`dataset_differs` does.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.dataset_set tank/mail '{recordsize: 16K}'
    """
    differs = dataset_differs(dataset, properties)
    if differs:
        _zfs("set", *(f"{key}={change['new']}" for key, change in differs.items()), dataset)
    return differs


def dataset_create(dataset, properties=None, services=None, test=False):
    """
    Make a dataset, its parents if need be, and move in what stands at its mount point.

    The files are copied into the new dataset and compared, byte by byte, before it is mounted in their place. The
    directory with the old ones is kept beside it, ``<path>.before-<dataset>-<time>``.

    dataset
        (string) The dataset.
    properties
        (dict) As for :func:`dataset_differs`.
    services
        (list) The services that use the files: stopped in this order for it, those that ran started in the reverse one.
    test
        (bool) Only say what would be done. Default: False

    Returns a dict: ``dataset``, ``mountpoint`` (``None`` for a volume), ``moved`` (number of files and directories
    moved in), and ``kept`` (where the old ones are, or ``None``).

    Raises ``CommandExecutionError`` when the files are in use, a file system is mounted below them, or the copy is not
    the same. All is then as it was.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.dataset_create tank/mail '{mountpoint: /srv/mail}' services='[postfix]'
    """
    wanted = {key: _text(value) for key, value in (properties or {}).items()}
    with __salt__["ksnap.locked"]():
        begun = dataset_differs(dataset, {})
        if begun == {}:
            raise CommandExecutionError(f"There is a dataset {dataset} already; ksnap.dataset_set changes it.")
        place = _place(dataset, wanted)
        kept = _kept(dataset, place) if place else []
        files = place and os.path.isdir(place) and not os.path.ismount(place) and os.listdir(place)
        said = {"dataset": dataset, "mountpoint": place, "moved": 0, "kept": None}
        if files:
            _refuse_mounts(place)
            said["kept"] = (
                f"{place}.before-{dataset.replace('/', '-')}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            )
            said["moved"] = sum(1 for _ in _entries(place))
        if test:
            return said
        if begun and (files or not kept):
            # A power cut came before the copy was whole, or compared; the files are where they were.
            _unmount_all(dataset)
            _zfs("destroy", dataset)
            begun = None
        running = (
            [service for service in services or [] if __salt__["service.status"](service)] if files or begun else []
        )
        for service in running:
            __salt__["service.stop"](service)
        try:
            if begun:
                # The old files were renamed after the copy was compared; only the mounting is left.
                said["kept"] = kept[-1]
                _finish(dataset, place, wanted)
            elif files:
                _refuse_users(place)
                _create_unmounted(dataset, {**wanted, "canmount": "noauto", MOVING: place})
                _move_in(dataset, place, said["kept"])
                _finish(dataset, place, wanted)
            else:
                _create(dataset, wanted)
        finally:
            failed = [service for service in reversed(running) if not __salt__["service.start"](service)]
        if failed:
            raise CommandExecutionError(f"{dataset} is made, but {', '.join(failed)} did not start; see the log.")
        return said


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _text(value):
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _bytes(text):
    found = SIZE.fullmatch(text)
    return round(float(found[1]) * 1024 ** " KMGTPE".index(found[2].upper() or " ")) if found else None


def _same(has, wanted):
    if has is None:
        return False
    return has == wanted or (wanted == "none" and has == "0") or (has.isdigit() and _bytes(wanted) == int(has))


def _create(dataset, properties):
    parent = dataset.rpartition("/")[0]
    if parent:
        try:
            _zfs("list", "-H", "-o", "name", parent)
        except CommandExecutionError as error:
            if "does not exist" not in str(error) or "/" not in parent:
                raise
            # They hold nothing themselves, so they are not in the way of what stands at their mount points.
            _zfs("create", "-p", "-o", "canmount=off", parent)
    options = [word for key, value in properties.items() if key != "volsize" for word in ("-o", f"{key}={value}")]
    volume = ["-V", str(_bytes(properties["volsize"]))] if "volsize" in properties else []
    _zfs("create", *options, *volume, dataset)


def _create_unmounted(dataset, properties):
    # OpenZFS makes a dataset in one transaction group and sets its properties in later ones: what a power cut leaves in
    # between, the next start would mount upon the files.
    begun = f"{dataset}.ksnap-begun"
    try:
        _zfs("destroy", begun)
    except CommandExecutionError as error:
        if "does not exist" not in str(error):
            raise
    _create(begun, properties)
    _zfs("rename", "-u", begun, dataset)


def _place(dataset, properties):
    """Where the dataset will be mounted, or ``None``."""
    if "volsize" in properties or properties.get("canmount") in ("off", "noauto"):
        return None
    if "mountpoint" in properties:
        return properties["mountpoint"] if properties["mountpoint"].startswith("/") else None
    rest, above = [], dataset
    while "/" in above:
        above, _, leaf = above.rpartition("/")
        rest.insert(0, leaf)
        try:
            value = _zfs("get", "-H", "-o", "value", "mountpoint", above).strip()
        except CommandExecutionError as error:
            if "does not exist" not in str(error):
                raise
            continue
        return os.path.join(value, *rest) if value.startswith("/") else None
    return None


def _kept(dataset, place):
    folder, name = os.path.split(place)
    start = f"{name}.before-{dataset.replace('/', '-')}-"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(os.path.join(folder, each) for each in names if each.startswith(start))


def _refuse_mounts(place):
    below = [mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["path"].startswith(f"{place}/")]
    if below:
        raise CommandExecutionError(
            f"{', '.join(below)} is mounted below {place}, whose files shall move into the dataset. Unmount it first."
        )


def _refuse_users(place):
    users = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [f"/proc/{process}/cwd", f"/proc/{process}/root"]
            links += [f"/proc/{process}/fd/{name}" for name in os.listdir(f"/proc/{process}/fd")]
            for link in links:
                if f"{os.readlink(link)}/".startswith(f"{place}/"):
                    with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
                        users.add(f"{file.read().strip()} (process {process})")
        except OSError:
            continue
    if users:
        raise CommandExecutionError(
            f"{place} is in use by {', '.join(sorted(users))}. Stop that, or name its service (services)."
        )


def _entries(folder):
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield os.path.relpath(os.path.join(place, name), folder)


def _move_in(dataset, place, kept):
    try:
        with tempfile.TemporaryDirectory(prefix="ksnap-", dir="/run") as folder:
            try:
                _run("mount", "-t", "zfs", "-o", "zfsutil", dataset, folder)
                _run("cp", "--archive", "--one-file-system", f"{place}/.", folder)
                differs = _differences(place, folder)
                if differs:
                    raise CommandExecutionError(
                        f"{', '.join(differs[:5])} in {place} is not as it was copied: something is writing to it. "
                        "Name "
                        "its service (services)."
                    )
            finally:
                _unmount_all(dataset)
    except (CommandExecutionError, OSError) as error:
        _zfs("destroy", dataset)
        raise CommandExecutionError(f"{place} was not moved into {dataset}, and all is as it was: {error}") from error
    before = os.stat(place)
    os.rename(place, kept)
    os.mkdir(place, stat.S_IMODE(before.st_mode))
    os.chown(place, before.st_uid, before.st_gid)
    os.sync()


def _finish(dataset, place, wanted):
    os.makedirs(place, exist_ok=True)
    _zfs("set", f"canmount={wanted.get('canmount', 'on')}", dataset)
    if not any(mount["source"] == dataset for mount in __salt__["ksnap.mounts"]()):
        _zfs("mount", dataset)
    _zfs("inherit", MOVING, dataset)


def _differences(one, two):
    names = set(_entries(one)) | set(_entries(two)) | {"."}
    found = []
    for name in sorted(names):
        pair = [os.path.join(folder, name) for folder in (one, two)]
        try:
            first, second = map(os.lstat, pair)
        except FileNotFoundError:
            found.append(name)
            continue
        same = all(getattr(first, key) == getattr(second, key) for key in ("st_mode", "st_uid", "st_gid"))
        if stat.S_ISREG(first.st_mode):
            same = same and first.st_mtime_ns == second.st_mtime_ns and filecmp.cmp(*pair, shallow=False)
        elif stat.S_ISLNK(first.st_mode):
            same = same and os.readlink(pair[0]) == os.readlink(pair[1])
        same = same and {
            key: os.getxattr(pair[0], key, follow_symlinks=False)
            for key in os.listxattr(pair[0], follow_symlinks=False)
        } == {
            key: os.getxattr(pair[1], key, follow_symlinks=False)
            for key in os.listxattr(pair[1], follow_symlinks=False)
        }
        if not same:
            found.append(name)
    return found


def _unmount_all(dataset):
    for mount in __salt__["ksnap.mounts"]():
        if mount["source"] == dataset:
            _run("umount", mount["path"])


def _run(*words):
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise CommandExecutionError(f"{' '.join(words)} failed: {done.stderr.strip() or done.returncode}")
