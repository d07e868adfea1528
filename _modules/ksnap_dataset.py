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

# The place whose files are being copied; then DONE, and where they are kept.
MOVING = "ksnap:moving"
DONE = "done "
COPIES = "/run/ksnap-"
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
    ``new``. Raises ``SaltInvocationError`` for one that can only be set when a dataset is made, and
    ``CommandExecutionError`` where the dataset would be mounted over files that are not its own.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.dataset_differs tank/mail '{recordsize: 16K}'
    """
    wanted = {key: _text(value) for key, value in (properties or {}).items()}
    try:
        shown = _zfs("get", "-H", "-p", "-o", "property,source,value", ",".join(["type", MOVING, *wanted]), dataset)
    except CommandExecutionError as error:
        if "does not exist" in str(error):
            return None
        raise
    rows = [line.split("\t", 2) for line in shown.splitlines()]
    exact = {key: value for key, _, value in rows}
    # What is below a dataset that is being moved inherits the note, and is none.
    if [MOVING, "local"] in [row[:2] for row in rows]:
        return {MOVING: {"old": exact[MOVING], "new": None}}
    differs = {
        key: {"old": exact[key], "new": value} for key, value in wanted.items() if not _same(key, exact.get(key), value)
    }
    late = sorted(AT_CREATION & differs.keys())
    if late:
        raise SaltInvocationError(
            f"{', '.join(late)} of {dataset} can only be set when it is made; it is "
            f"{', '.join(differs[key]['old'] for key in late)}. Make another dataset, and move the data there."
        )
    _refuse_hiding(dataset, {key: change["new"] for key, change in differs.items()})
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
    if MOVING in (differs or {}):
        raise CommandExecutionError(f"Files are being moved into {dataset}; ksnap.dataset_create finishes that first.")
    if differs:
        _zfs("set", *(f"{key}={change['new']}" for key, change in differs.items()), dataset)
    return differs


def dataset_create(dataset, properties=None, services=None, test=False):
    """
    Make a dataset, its parents if need be, and move in what stands at its mount point.

    The files are copied into the new dataset and compared, byte by byte, before it is mounted in their place. The
    directory with the old ones is kept beside it, ``<path>.before-<dataset>-<time>``. What a power cut broke off, the
    next start of the machine or the next call finishes.

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

    Raises ``CommandExecutionError`` when the files are in use, a file system is mounted there or below, the copy is not
    the same, or a step fails. All is then as it was; where it is not, the error says so, and the services are left
    stopped if the files are not in their place.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.dataset_create tank/mail '{mountpoint: /srv/mail}' services='[postfix]'
    """
    wanted = {key: _text(value) for key, value in (properties or {}).items()}
    with __salt__["ksnap.locked"](test=test):
        begun = dataset_differs(dataset, {})
        if begun == {}:
            raise CommandExecutionError(f"There is a dataset {dataset} already; ksnap.dataset_set changes it.")
        place, kept = _begun(dataset, begun[MOVING]["old"]) if begun else (None, None)
        done = kept is not None
        place = place or _place(dataset, wanted)
        files = [] if done or not place else _files(place)
        if place and not done:
            _refuse_mounts(place)
        if files:
            kept = f"{place}.before-{dataset.replace('/', '-')}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        moved = sum(1 for _ in _entries(place)) if files else 0
        said = {"dataset": dataset, "mountpoint": place, "moved": moved, "kept": kept}
        if test:
            return said
        if begun and not done:
            # A power cut came before the copy was whole, or compared; the files are where they were.
            _unmount_all(dataset)
            _zfs("destroy", dataset)
        running = __salt__["ksnap.running"](services or []) if files or done else []
        for service in running:
            __salt__["service.stop"](service)
        made = []
        try:
            if done:
                _finish(dataset, place, kept)
            else:
                _make(dataset, wanted, place, kept, made)
        except BaseException as error:  # also what a signal raises
            if any(not mount.startswith(COPIES) for mount in _mounts(dataset)):
                # All that counts is done; the next call ends it.
                raise
            text = f"{dataset} was not made: {error}"
            if not done:
                try:
                    _undo(dataset, made, place, kept)
                except (CommandExecutionError, OSError) as worse:
                    text += f" It could not be undone either: {worse}"
                else:
                    if not isinstance(error, Exception):
                        raise
                    raise CommandExecutionError(f"{dataset} was not made, and all is as it was: {error}") from error
            # In an empty directory they would begin anew; what they wrote elsewhere, the dataset would hide.
            left, running = ", ".join(running), []
            raise CommandExecutionError(
                f"{text} Put that right, and try again.{f' Till then, {left} is left stopped.' if left else ''}"
            ) from error
        finally:
            failed = [service for service in reversed(running) if not __salt__["service.start"](service)]
        if failed:
            raise CommandExecutionError(f"{dataset} is made, but {', '.join(failed)} did not start; see the log.")
        return {**said, "kept": kept if kept and os.path.lexists(kept) else None}


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _text(value):
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _bytes(text):
    found = SIZE.fullmatch(text)
    return round(float(found[1]) * 1024 ** " KMGTPE".index(found[2].upper() or " ")) if found else None


def _same(key, has, wanted):
    if has is None:
        return False
    # Of these, what OpenZFS chose for it is shown.
    if (key, wanted) in (("encryption", "on"), ("refreservation", "auto")):
        return has not in ("off", "0", "none")
    # No limit is the greatest number for OpenZFS 2.1.
    if has in {"posixacl": ["posix"], "none": ["0", str(2**64 - 1)]}.get(wanted, []):
        return True
    return has == wanted or (has.isdigit() and _bytes(wanted) == int(has))


def _make(dataset, wanted, place, kept, made):
    """Make a dataset and what is missing above it, and move in what shall be ``kept``; ``made`` gets what was made."""
    if kept:
        _refuse_users(place)
    for above in _missing(dataset):
        # They hold nothing themselves, so they are not in the way of what stands at their mount points.
        _create_unmounted(above, {"canmount": "off"})
        made.append(above)
    if not kept:
        try:
            _create(dataset, wanted)
        except CommandExecutionError as error:
            if "successfully created" in str(error):  # but not mounted
                made.append(dataset)
            raise
        return
    _create_unmounted(dataset, {**wanted, "canmount": "noauto", MOVING: place})
    made.append(dataset)
    _copy(dataset, place)
    # Both in one transaction: from here on, a start of the machine mounts the copy, and no service finds nothing.
    _zfs("set", "canmount=on", f"{MOVING}={DONE}{kept}", dataset)
    _finish(dataset, place, kept)


def _undo(dataset, made, place, kept):
    back = kept and os.path.lexists(kept)
    if back:
        if os.path.isdir(place):
            os.rmdir(place)
        os.rename(kept, place)
        os.sync()
    try:
        while made:
            _zfs("destroy", made[-1])
            made.pop()
    except CommandExecutionError:
        if back and dataset in made:
            # The next start mounts it; the next call, too, if it is not in the way of files.
            _set_aside(place, kept)
        raise


def _missing(dataset):
    parts = dataset.split("/")
    above = ["/".join(parts[:count]) for count in range(1, len(parts))]
    return [each for each in above if not _exists(each)]


def _exists(dataset):
    try:
        _zfs("list", "-H", "-o", "name", dataset)
    except CommandExecutionError as error:
        if "does not exist" not in str(error) or "/" not in dataset:
            raise
        return False
    return True


def _create(dataset, properties):
    given, volume = dict(properties), []
    if "volsize" in given:
        volume = ["-V", str(_bytes(given.pop("volsize")))]
        if given.get("refreservation") == "auto":
            # A new volume has it by itself; zfs create fails where it is told (out of space).
            del given["refreservation"]
    _zfs("create", *(word for key, value in given.items() for word in ("-o", f"{key}={value}")), *volume, dataset)


def _create_unmounted(dataset, properties):
    # OpenZFS makes a dataset in one transaction group and sets its properties in later ones: what a power cut leaves in
    # between, the next start would mount upon the files.
    begun = f"{dataset}.ksnap-begun"
    if _exists(begun):
        _zfs("destroy", begun)
    _create(begun, properties)
    try:
        _zfs("rename", "-u", begun, dataset)
    except CommandExecutionError:
        _zfs("destroy", begun)
        raise


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


def _begun(dataset, noted):
    """Of a move that was broken off, the mount point and where the files are kept; ``None`` of what begins anew."""
    place, canmount = _zfs("get", "-H", "-o", "value", "mountpoint,canmount", dataset).splitlines()
    mounts = _mounts(dataset)
    if noted.startswith(DONE):
        kept = noted.removeprefix(DONE)
        if not mounts and _files(place):
            raise CommandExecutionError(
                f"The files of {place} were moved into {dataset}, and before it was mounted there, others have come "
                f"to {place}{f'; the former ones are in {kept} too' if os.path.lexists(kept) else ''}. Nothing was "
                f"done. Stop what writes to {place}, move what is in it elsewhere, and try again."
            )
        return place, kept
    if canmount == "on" or any(not mount.startswith(COPIES) for mount in mounts) or not _files(noted):
        raise CommandExecutionError(
            f"{dataset} is a copy of {noted} that was not ended, but it is in use, or nothing is in {noted}; so it is "
            f"not destroyed. If it shall stay: zfs inherit {MOVING} {dataset}; zfs set canmount=on {dataset}. If not, "
            "destroy it, and try again."
        )
    return None, None


def _files(place):
    return os.listdir(place) if os.path.isdir(place) else []


def _mounts(dataset):
    return [mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["source"] == dataset]


def _refuse_hiding(dataset, changes):
    """Refuse a mount point where files are that a dataset, or what inherits it, would be mounted over."""
    if not {"mountpoint", "canmount"} & changes.keys():
        return
    shown = _zfs(
        "get", "-H", "-r", "-t", "filesystem", "-o", "name,property,source,value", "mountpoint,canmount", dataset
    )
    has = {}
    for line in shown.splitlines():
        name, key, source, value = line.split("\t", 3)
        has.setdefault(name, {})[key] = source, value
    on_top = {mount["path"]: mount["source"] for mount in __salt__["ksnap.mounts"]()}
    for name, each in has.items():
        (source, place), (_, canmount) = each["mountpoint"], each["canmount"]
        if name == dataset:
            place, canmount = changes.get("mountpoint", place), changes.get("canmount", canmount)
        elif "mountpoint" not in changes or source in ("local", "received") or f" {dataset}/" in source:
            continue
        else:
            place = f"{changes['mountpoint'].rstrip('/')}{name.removeprefix(dataset)}"
        mounted = canmount == "on" or (canmount == "noauto" and _mounts(name))
        if mounted and place.startswith("/") and on_top.get(place) != name and _files(place):
            raise CommandExecutionError(
                f"{name} would be mounted over the files in {place}. Stop what uses them, and move them into {name} by "
                f"hand; or, if nothing in {name} is needed, destroy it: ksnap.dataset_create and the state ksnap.stack "
                "make it anew, and move them in."
            )


def _refuse_mounts(place):
    paths = {mount["path"] for mount in __salt__["ksnap.mounts"]()}
    if place in paths:
        raise CommandExecutionError(f"Another file system is mounted at {place}. Unmount it, or take another place.")
    below = sorted(path for path in paths if path.startswith(f"{place}/"))
    if below and _files(place):
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


def _copy(dataset, place):
    folder, prefix = os.path.split(COPIES)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as copy:
        try:
            _run("mount", "-t", "zfs", "-o", "zfsutil", dataset, copy)
            _run("cp", "--archive", "--one-file-system", f"{place}/.", copy)
            differs = _differences(place, copy)
            if differs:
                raise CommandExecutionError(
                    f"{', '.join(differs[:5])} in {place} is not as it was copied: something is writing to it. Name "
                    "its service (services)."
                )
        finally:
            _unmount_all(dataset)


def _set_aside(place, kept):
    before = os.stat(place)
    os.rename(place, kept)
    os.mkdir(place, stat.S_IMODE(before.st_mode))
    os.chown(place, before.st_uid, before.st_gid)
    os.sync()


def _finish(dataset, place, kept):
    """Mount the copy where the files were, which are renamed, if they are not yet."""
    if not os.path.lexists(kept):
        # After a power cut before the renaming, the start has mounted it over them.
        _refuse_users(place)
        _unmount_all(dataset)
        if _files(place):
            _set_aside(place, kept)
    if not _mounts(dataset):
        os.makedirs(place, exist_ok=True)
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
    for path in _mounts(dataset):
        _run("umount", path)


def _run(*words):
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise CommandExecutionError(f"{' '.join(words)} failed: {done.stderr.strip() or done.returncode}")
