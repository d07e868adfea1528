"""
One change at a time, and none left half made
=============================================

A rollback is many steps, each of which OpenZFS makes whole or not at all, in one transaction group. Before the first,
the whole plan is written into user properties of the pool's root dataset, ``ksnap:journal``, and before each stage
of it, how far it is. What a power cut or a killed process leaves is finished, or undone if nothing was moved yet or it
cannot be finished, by the next call of this module or by ``ksnap-recover.service`` at the next start, before any
service. The services of the plan do not start until then: a file of each says so (``ksnap-recover.conf``).

``ksnap:journal`` is ``<id> <parts> <forward|back|done> <stage>``, ``ksnap:journal.<n>`` a part of the plan (JSON, zlib,
base64). Where a plan is for several pools, the first keeps it, and the others say which one: ``<id> at <pool>``.
"""

import base64
import contextlib
import errno
import glob
import json
import os
import subprocess
import time
import zlib

from salt.exceptions import CommandExecutionError

__virtualname__ = "ksnap"

JOURNAL = "ksnap:journal"
PART = 7000  # bytes; a user property takes 8191
PATIENCE = 10  # seconds for those who use a file system to leave it, once their service was stopped
UNIT = "/etc/systemd/system/ksnap-recover.service"
UNIT_TEXT = """\
# Finishes or undoes what a power cut left of a rollback (ksnap.rollback), before any service starts.
[Unit]
Description=Finish or undo an interrupted ksnap rollback
Documentation=man:zfsprops(7)
DefaultDependencies=no
After=local-fs.target zfs-mount.service systemd-remount-fs.service
Before=sysinit.target shutdown.target
Conflicts=shutdown.target

[Service]
Type=oneshot
ExecCondition=/bin/sh -c 'test -n "$(zfs get -H -d 0 -s local -o value {journal},ksnap:boot_once)"'
ExecStart={recover}

[Install]
WantedBy=sysinit.target
"""
WANTED = "/etc/systemd/system/sysinit.target.wants/ksnap-recover.service"
GUARD = "/etc/systemd/system/{}.service.d/ksnap-recover.conf"
GUARD_TEXT = """\
# A rollback (ksnap.rollback) is under way: at the next start this waits until what a power cut left of it is finished.
[Unit]
Requires=ksnap-recover.service
After=ksnap-recover.service
"""


def __virtual__():
    return __virtualname__


def unfinished():
    """
    List the changes that were broken off, by a power cut or a killed process.

    Returns a list of dicts: ``id``, ``pool`` (where the plan is kept), ``kind`` (``rollback`` or ``restore_aside``),
    ``stack``, ``snapshot``, ``direction`` (``forward`` or ``back``), ``stage`` and ``stages`` (integers).

    Raises ``CommandExecutionError`` when a plan cannot be read, or is kept on a pool that is not imported.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.unfinished
    """
    found = []
    for pool, identifier, words in _journals():
        if words[0] != "at" and words[1] != "done":
            plan = _read(pool, identifier, int(words[0]))
            found.append(
                {
                    "id": identifier,
                    "pool": pool,
                    **{key: plan[key] for key in ("kind", "stack", "snapshot")},
                    "direction": words[1],
                    "stage": int(words[2]),
                    "stages": len(plan["stages"]),
                }
            )
    return found


def recover(services=True):
    """
    Finish what was broken off; where nothing was moved yet, or it cannot be finished, undo it.

    services
        (bool) Start the services that were stopped for it. Default: True. False at the machine's start, when they
        will be started anyway

    Returns a list of dicts, empty if there was nothing: ``id``, ``kind``, ``stack``, ``snapshot``, ``outcome``
    (``finished`` or ``undone``) and, if undone, ``reason``.

    Raises ``CommandExecutionError`` when it can be neither finished nor undone: it then stays, for the next call.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.recover
    """
    done = []
    with __salt__["ksnap.locked"](recovering=True):
        journals = list(_journals())
        if not journals:
            _unguard()
        kept = {identifier: pool for pool, identifier, words in journals if words[0] != "at"}
        for pool, identifier, words in journals:
            if words[0] == "at":
                if identifier not in kept:
                    _forget_pointer(pool, identifier, words[1])
                continue
            if words[1] == "done":
                others = [each for each, own, rest in journals if own == identifier and rest[0] == "at"]
                _forget([pool, *others], int(words[0]))
                continue
            plan = _read(pool, identifier, int(words[0]))
            said = {key: plan[key] for key in ("id", "kind", "stack", "snapshot")}
            if not services:
                plan["services"] = []
            plan["recovering"] = True
            if words[1] == "back" or words[2] == "0":
                # Somebody may have gone on meanwhile with what was not moved.
                reason = "it had failed, and was being undone" if words[1] == "back" else "nothing had been moved yet"
                _position(plan, "back", int(words[2]))
                _back(plan, int(words[2]))
                _start(plan, "all is as it was")
                done.append({**said, "outcome": "undone", "reason": reason})
                continue
            try:
                _forward(plan, int(words[2]), doubtful=True)
                done.append({**said, "outcome": "finished"})
            except Undone as undone:
                done.append({**said, "outcome": "undone", "reason": str(undone)})
    if not services:
        __salt__["ksnap.be_booted"]()
    return done


class Undone(CommandExecutionError):
    """It failed, and everything is as it was."""


def carry_out(plan):
    """
    Carry out a plan of ``ksnap.rollback`` or ``ksnap.restore_aside``: all of it, or nothing.

    plan
        (dict) ``id``, ``kind``, ``stack``, ``snapshot``, ``pools`` (the first keeps the journal), ``services`` (to
        stop), ``keys`` (encryption roots), ``stages`` (a list of lists of steps), and for either outcome, ``forward``
        and ``back``, ``mounts``.

    Returns True. Raises ``CommandExecutionError`` when it failed; everything is then as it was, or the message says
    what is not.

    CLI Example: none; it is called by the functions that make a plan.
    """
    with __salt__["ksnap.locked"]():
        _guard(plan["services"])
        _write(plan)
        try:
            _forward(plan, 0, doubtful=False)
        except Undone as undone:
            raise CommandExecutionError(str(undone)) from undone
    return True


def boot_unit(root="/"):
    """
    Install ``ksnap-recover.service``, which finishes or undoes at the machine's start what a power cut left, and
    ends the choice of a boot environment for one start only.

    Every rollback, and ``ksnap.be_activate``, see to it themselves.

    root
        (string) Where the system is mounted into which it is installed. Default: /, the running one

    Returns the unit's path, or ``None`` on a machine without systemd. Raises ``CommandExecutionError`` when there is no
    ``salt-call`` for it.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.boot_unit
    """
    if not os.path.isdir("/run/systemd/system"):
        return None
    recover = __salt__["ksnap.salt_call"]("ksnap.recover", "services=False", root=root)
    text = UNIT_TEXT.format(journal=JOURNAL, recover=recover)
    place = os.path.join(root, UNIT.lstrip("/"))
    with contextlib.suppress(FileNotFoundError), open(place, encoding="utf-8") as file:
        if file.read() == text and os.path.lexists(os.path.join(root, WANTED.lstrip("/"))):
            return UNIT
    with open(place, "w", encoding="utf-8") as file:
        file.write(text)
    # With --root, systemd does not load all its units anew: this one is for the next start.
    _run("systemctl", f"--root={root}", "enable", os.path.basename(UNIT))
    os.sync()
    return UNIT


# The journal


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _journals():
    shown = _zfs("get", "-H", "-p", "-d", "0", "-s", "local", "-t", "filesystem", "-o", "name,value", JOURNAL)
    for line in shown.splitlines():
        pool, value = line.split("\t")
        identifier, *words = value.split(" ")
        yield pool, identifier, words


def _read(pool, identifier, parts):
    names = [f"{JOURNAL}.{number}" for number in range(parts)]
    shown = _zfs("get", "-H", "-p", "-s", "local", "-o", "property,value", ",".join(names), pool)
    found = dict(line.split("\t") for line in shown.splitlines())
    try:
        plan = json.loads(zlib.decompress(base64.b64decode("".join(found[name] for name in names))))
    except (KeyError, ValueError, zlib.error) as error:
        raise CommandExecutionError(
            f"The plan of the change {identifier} in the properties {JOURNAL}.* of {pool} cannot be read. Look at "
            f"what there is (zfs list -r -o name,origin {pool}), and when all is in place: zfs inherit {JOURNAL} {pool}"
        ) from error
    return {**plan, "parts": parts}


def _guard(services):
    if not os.path.isdir("/run/systemd/system"):
        return
    for service in services:
        path = GUARD.format(service.removesuffix(".service"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(GUARD_TEXT)
    os.sync()


def _unguard():
    for path in glob.glob(GUARD.format("*")):
        os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path))


def _write(plan):
    text = base64.b64encode(zlib.compress(json.dumps(plan).encode(), 9)).decode()
    parts = [text[start : start + PART] for start in range(0, len(text), PART)]
    plan["parts"] = len(parts)
    pool, *others = plan["pools"]
    for other in others:
        _zfs("set", f"{JOURNAL}={plan['id']} at {pool}", other)
    words = [f"{JOURNAL}.{number}={part}" for number, part in enumerate(parts)]
    _zfs("set", *words, f"{JOURNAL}={plan['id']} {len(parts)} forward 0", pool)


def _position(plan, direction, stage):
    _zfs("set", f"{JOURNAL}={plan['id']} {plan['parts']} {direction} {stage}", plan["pools"][0])


def _clear(plan):
    _position(plan, "done", 0)
    _forget(plan["pools"], plan["parts"])


def _forget(pools, parts):
    pool, *others = pools
    for number in range(parts):
        _zfs("inherit", f"{JOURNAL}.{number}", pool)
    for other in others:
        _zfs("inherit", JOURNAL, other)
    _zfs("inherit", JOURNAL, pool)
    _unguard()


def _forget_pointer(pool, identifier, keeper):
    if keeper not in _zfs("list", "-H", "-d", "0", "-o", "name").splitlines():
        raise CommandExecutionError(
            f"A change of snapshots on {pool} was broken off, and its plan ({identifier}) is kept on the pool "
            f"{keeper}, which is not imported. Import it: zpool import {keeper}. If it is lost: zfs inherit "
            f"{JOURNAL} {pool}"
        )
    _zfs("inherit", JOURNAL, pool)


# Forward and back


def _forward(plan, start, doubtful):
    stage, fresh = start, set()
    try:
        if doubtful:
            # The machine's start, or somebody, may have mounted meanwhile what is about to be moved.
            _halt(plan)
            _unmount_strays(plan)
            # Children first: to set a mountpoint mounts what is below it, unless canmount says no.
            for step in reversed(plan["stages"][start]):
                if step[0] == "clone" and _is_done(step):
                    _complete(*step[2:4])
        for stage in range(start, len(plan["stages"])):
            if stage != start:
                _position(plan, "forward", stage)
            for step in plan["stages"][stage]:
                if not (doubtful and stage == start and _is_done(step)):
                    _do(plan, step, fresh)
        _mount_all(plan, "forward")
    except BaseException as error:
        # Also what somebody interrupts is undone: else the next call, who knows when, would go on with it.
        try:
            _position(plan, "back", stage)
            _back(plan, stage)
        except CommandExecutionError as second:
            raise CommandExecutionError(
                f"{plan['kind']} {plan['id']} failed: {error}\nIt could not be undone either: {second}\n"
                "Its plan is kept. Put right what is said above, then: ksnap.recover"
            ) from error
        said = f"{plan['kind']} of {plan['stack'] or 'the stack'} failed, and all is as it was: {error}"
        _start(plan, said)
        if not isinstance(error, CommandExecutionError):
            raise
        raise Undone(said) from error
    try:
        _clear(plan)
    except (KeyboardInterrupt, SystemExit):
        # It is done, and no later call shall stop the services once more to see that.
        _clear(plan)
        raise
    finally:
        _start(
            plan,
            f"{plan['kind']} {plan['id']}: the datasets are in place and mounted; ksnap.aside lists the state before, "
            "ksnap.restore_aside puts it back",
        )


def _back(plan, start):
    if start:
        _unmount_strays(plan)
    for stage in range(min(start, len(plan["stages"]) - 1), -1, -1):
        if stage != start:
            _position(plan, "back", stage)
        for step in reversed(plan["stages"][stage]):
            # What a property was can be set whether it was changed or not.
            if step[0] == "set" or _is_done(step):
                _undo(step)
    _mount_all(plan, "back")
    _clear(plan)


def _mount_all(plan, direction):
    for root in plan["keys"]:
        # A promoted encryption root is another one to OpenZFS, whose key it has not loaded.
        if _value(root, "keystatus") == "unavailable":
            _zfs("load-key", root)
    _mount(plan[direction]["mounts"])


def _start(plan, how):
    failed = []
    if plan["services"] and plan.get("recovering") and os.path.isdir("/run/systemd/system"):
        # What kept them from starting is gone, and systemd is to know.
        _run("systemctl", "daemon-reload")
    for service in reversed(plan["services"]):
        try:
            if not __salt__["service.start"](service):
                failed.append(service)
        except CommandExecutionError as error:
            failed.append(f"{service} ({error})")
    if failed:
        raise CommandExecutionError(f"{how}.\nThese services did not start, see their logs: {', '.join(failed)}")


def _value(dataset, name):
    return _zfs("get", "-H", "-p", "-o", "value", name, dataset).rstrip("\n")


def _there(name, guid):
    try:
        return _value(name, "guid") == guid
    except CommandExecutionError as error:
        if "does not exist" in str(error):
            return False
        raise


def _is_done(step):
    kind, *words = step
    if kind == "rename":
        return _there(words[1], words[2])
    if kind == "clone":
        # By its origin, or by the snapshot itself once it is promoted: a stranger's dataset of the name is not ours.
        snapshot, dataset, _, guid = words
        try:
            return _value(dataset, "origin") == snapshot or _there(f"{dataset}@{snapshot.split('@')[1]}", guid)
        except CommandExecutionError as error:
            if "does not exist" in str(error):
                return False
            raise
    if kind == "promote":
        return _there(f"{words[0]}@{words[2]}", words[3])
    return False


def _do(plan, step, fresh):
    kind, *words = step
    if kind == "halt":
        _halt(plan)
    elif kind == "rename":
        _rename(words[0], words[1], words[3])
    elif kind == "clone":
        snapshot, dataset, options, _ = words
        _zfs("clone", *(word for option in options for word in ("-o", option)), snapshot, dataset)
        fresh.add(dataset)
    elif kind == "promote" and words[0] in fresh:
        # Made just now, it has no bookmarks that could be in the way.
        _zfs("promote", words[0])
    elif kind == "promote":
        __salt__["ksnap.promote_dataset"](words[0], f"{words[1]}@{words[2]}")
    elif kind == "allow":
        _zfs("allow", *words[0])
    elif kind == "set":
        _set(words[0], words[1])


def _complete(clone, options):
    # OpenZFS makes the clone in one transaction group, and sets its properties in the next ones.
    if options:
        _zfs("set", *options, clone)


def _undo(step):
    kind, *words = step
    if kind == "rename":
        _rename(words[1], words[0], words[3])
    elif kind == "clone":
        # Without -r: what others put below it stops this, and is not lost.
        _zfs("destroy", words[1])
    elif kind == "promote":
        __salt__["ksnap.promote_dataset"](words[1], f"{words[0]}@{words[2]}")
    elif kind == "set":
        _set(words[0], words[2])


def _rename(old, new, kind):
    # What is mounted stays mounted: it must be unmounted before; -u is for file systems only.
    _zfs("rename", *([] if kind == "volume" else ["-u"]), old, new)


def _set(datasets, values):
    given = [f"{name}={value}" for name, value in values.items() if value is not None]
    if given:
        _zfs("set", *given, *datasets)
    for name, value in values.items():
        if value is None:
            _zfs("inherit", name, *datasets)


# Services and mounts


def _halt(plan):
    for service in plan["services"]:
        if not __salt__["service.stop"](service):
            raise CommandExecutionError(f"The service {service} did not stop; see its log.")
    _unmount(plan["back"]["mounts"])
    end = time.monotonic() + PATIENCE
    for volume in plan["volumes"]:
        device = f"/dev/zvol/{volume}"
        while _users_of(device) or _claimed(device):
            if time.monotonic() > end:
                users = _users_of(device) or "the kernel: it is mounted, or a part of LVM, swap or an export"
                raise CommandExecutionError(f"The volume {volume} is in use by {users}. End that, or name its service.")
            time.sleep(0.1)


def _claimed(device):
    # What the kernel itself uses has no process, but takes the device for itself.
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _users_of(path):
    return ", ".join(__salt__["ksnap.users"](path))


def _unmount(mounts):
    end = time.monotonic() + PATIENCE
    for mount in reversed(mounts):
        while _mounted(mount):
            try:
                _run("umount", mount["path"])
            except CommandExecutionError as error:
                if time.monotonic() > end:
                    users = _users_of(mount["path"])
                    raise CommandExecutionError(
                        f"{mount['path']} ({mount['dataset']}) is busy"
                        + (
                            f": in use by {users}. Stop that, or name its service (services=[...])."
                            if users
                            else f": {error}"
                        )
                    ) from error
                time.sleep(0.1)


def _unmount_strays(plan):
    """Unmount what the plan moves, wherever it is mounted: a clone that has no properties yet is so at the start."""
    names = {mount["dataset"] for side in ("forward", "back") for mount in plan[side]["mounts"]}
    names |= {step[2] for stage in plan["stages"] for step in stage if step[0] == "clone"}
    mounts = __salt__["ksnap.mounts"]()
    _unmount(
        [
            {"dataset": mount["source"], "path": mount["path"]}
            for mount in mounts
            if mount["type"] == "zfs" and mount["source"] in names
        ]
    )


def _mount(mounts):
    for mount in mounts:
        if _mounted(mount):
            continue
        if mount["legacy"]:
            os.makedirs(mount["path"], exist_ok=True)
            _run("mount", "-t", "zfs", mount["dataset"], mount["path"])
        else:
            _zfs("mount", mount["dataset"])


def _mounted(mount):
    return any(
        each["type"] == "zfs" and (each["source"], each["path"]) == (mount["dataset"], mount["path"])
        for each in __salt__["ksnap.mounts"]()
    )


def _run(*words):
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise CommandExecutionError(f"{' '.join(words)} failed: {done.stderr.strip() or done.returncode}")
