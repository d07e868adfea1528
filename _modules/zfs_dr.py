"""
A machine's datasets elsewhere
==============================

:func:`replicate` brings the newest snapshot set of a stack to a target, whole or not at all: a set is whole there once
the target's own dataset carries a snapshot of its name. What goes is chosen by :mod:`zfs_dr_choice`, moved by
:mod:`zfs_dr_stream`, over the sides of :mod:`zfs_dr_side`. All of them are functions of the one module ``zfs_dr``.

The last whole set is held at the target (tag ``zfs_dr:<stack>``), and held and bookmarked at the source
(:mod:`zfs_dr_keep`). So no pruning, on either side, makes a full send necessary.
"""

import contextlib
import datetime
import fcntl
import json
import os
import re
import select
import subprocess
import threading
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

RUN = "/run/zfs_dr"
BEAT = 5.0  # seconds; the target takes four times that without one for our death
REPLACE = ["replace"]  # as zfs_dr_choice has it
DATASET = r"[A-Za-z][A-Za-z0-9_.:-]*(/[A-Za-z0-9_.:-]+)*"
KNOWN = {"zfs_dr:dataset_guid": "origin_guid"}  # properties that target_listing has under another name
GUARDS = {"readonly": "on", "canmount": "noauto", "mountpoint": "none"}  # of a replica; a volume is not mounted
PRIVATE = ("zfs_dr:", "ksnap:", "keylocation", "mountpoint", "canmount", "readonly")


def __virtual__():
    return __virtualname__


def members(stack, target):
    """
    Tell what a stack is called and which datasets it has, also when it is on the machine that it is pulled from.

    stack
        (string or dict) As :func:`ksnap_stack.stack` takes it. Pulled: a dict of ``name`` and ``datasets``, or the
        name of one.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it.

    Returns a list of the name (without one, that of the first dataset), the datasets, and a dict of each to its guid;
    that one is empty where the datasets are named, and were not looked up.

    Raises ``SaltInvocationError`` for a wrong stack or target, ``CommandExecutionError`` when part of it is not on ZFS.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.members web vault
    """
    target = __salt__["zfs_dr.target"](target)
    declared = (__salt__["config.get"]("ksnap:stacks", {}) or {}).get(stack) if isinstance(stack, str) else stack
    plain = isinstance(declared, dict) and declared.get("datasets")
    if target["direction"] == "push" and not (plain and not declared.get("paths") and not declared.get("children")):
        found = __salt__["ksnap.stack"](stack)
        if found["outside"]:
            raise CommandExecutionError(
                f"Of the stack {found['name']}, {', '.join(found['outside'])} is not on ZFS and cannot be replicated. "
                "Move it to a dataset, or take it out of the stack's paths."
            )
        name, datasets, guids = found["name"], found["datasets"], found["guids"]
    elif plain:
        # Nothing is to be looked up; whether they exist, the listing will tell that is made in any case.
        name = stack if isinstance(stack, str) else declared.get("name")
        datasets, guids = sorted(set(map(str, declared["datasets"]))), {}
    else:
        raise SaltInvocationError(f"A stack that is pulled is a dict with datasets, or the name of one, not {stack!r}")
    name = name or datasets[0].replace("/", ":")
    wrong = [each for each in datasets if not re.fullmatch(DATASET, each)]
    if wrong or not re.fullmatch(r"[A-Za-z0-9_.:-]+", str(name)):
        raise SaltInvocationError(
            f"The stack {name!r} is wrong: {', '.join(wrong) or 'its name'} is not of letters, digits and _.:-"
        )
    return [name, datasets, guids]


def _machine(target):
    return target["ssh"].rpartition("@")[2] if target["direction"] == "pull" else __grains__["id"]


def _names(target, datasets):
    names = {dataset: dataset.replace("/", ":") for dataset in datasets}
    if len(set(names.values())) < len(names):
        raise SaltInvocationError("Two datasets of the stack differ only in / and :, so one replica would be both's")
    return names


# One at a time


def _key(base, stack):
    return f"{base.replace('/', ':')}-{stack}"


@contextlib.contextmanager
def _locked(target, stack, sides=None):
    # The kernel gives a lock back when its holder dies, however it dies.
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    key = _key(f"{target['id']}", stack)
    with open(os.path.join(RUN, f"{key}.lock"), "a", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandExecutionError(
                f"Another replication of {stack} to {target['id']} is at work on this machine: see zfs_dr.status. "
                "Let it end."
            ) from None
        yield


@contextlib.contextmanager
def _locked_there(side, target, stack):
    # Another machine may send the same stack: the target itself says who may. A beat a while keeps the lock there.
    base = target["dataset"]
    if side is None:
        os.makedirs(RUN, mode=0o700, exist_ok=True)
        with open(os.path.join(RUN, f"{_key(base, stack)}.target"), "a", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandExecutionError(f"Another machine is replicating {stack} to {base}; let it end.") from None
            os.utime(file.fileno())
            yield
        return
    process = subprocess.Popen(
        __salt__["zfs_dr.words"](side, ["lock", base, stack]),
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        if not ready or process.stdout.readline() != b"locked\n":
            process.kill()
            said = process.communicate()[1].decode(errors="replace").strip()
            raise CommandExecutionError(
                f"The target did not give the lock for {stack}: {said or 'no answer'}{__salt__['zfs_dr.advice'](said)}"
            )
        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(process.stdin, over), daemon=True)
        beat.start()
        try:
            yield
        finally:
            over.set()
            beat.join()
    finally:
        process.stdin.close()
        process.kill()
        process.wait()


def _beat(stdin, over):
    while not over.wait(BEAT):
        try:
            stdin.write(b".")
        except OSError:
            return


# Replication


def replicate(stack, target, snapshot=None, full=False, take=False):
    """
    Bring a snapshot set of a stack to a target: all of its datasets, or none that would show as whole there.

    stack
        (string or dict) As :func:`ksnap_stack.stack` takes it. Pulled from another machine: a dict of ``name`` and
        ``datasets``, or the name of such a one.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it.
    snapshot
        (string) The name of the set, what is after the @. Default: the newest that all datasets have.
    full
        (bool) Allow a full send where nothing is left in common; the old replica is set aside. Default: False. What
        has never been at the target, or was made anew, is sent in full in any case.
    take
        (bool) Take a snapshot of the stack first, by :func:`ksnap.snapshot`; not for a stack that is pulled. Default:
        False.

    Returns a dict: ``snapshot`` (the set that is whole at the target now), ``changed`` (bool), ``bytes`` (moved),
    ``seconds``, ``age`` (seconds since the set was taken: the RPO of this moment), ``datasets`` (a dict of each to
    ``replica``, ``why``, ``bytes``, ``seconds``) and ``aside`` (a list: what was set aside at the target).

    Raises ``SaltInvocationError`` for a wrong stack or target, ``CommandExecutionError`` when it could not be done:
    what has arrived stays there, and the next call goes on from it.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.replicate web vault
        salt '*' zfs_dr.replicate '{datasets: [tank/web]}' '{dataset: backup/web1}' take=True
    """
    target = __salt__["zfs_dr.target"](target)
    name, datasets, guids = members(stack, target)
    if take and target["direction"] == "pull":
        raise SaltInvocationError(
            "take is for a stack of this machine; have its own machine take the snapshots of one that is pulled"
        )
    begun = time.time()
    with _locked(target, name):
        try:
            if take:
                snapshot = __salt__["ksnap.snapshot"](stack, reason=f"replicate to {target['id']}")["snapshot"]
            sides = __salt__["zfs_dr.connect"](target)
            try:
                with _locked_there(sides["target"], target, name):
                    done, noted = _brought(sides, target, name, datasets, guids, snapshot, full, take)
            finally:
                __salt__["zfs_dr.disconnect"](sides)
        except (CommandExecutionError, SaltInvocationError) as error:
            before = __salt__["zfs_dr.noted"](target, name)
            __salt__["zfs_dr.note"](target, name, {**before, "error": str(error), "failed": time.time()})
            __salt__["zfs_dr.fire"](target, name, "failed", {"error": str(error)})
            raise
        finally:
            __salt__["zfs_dr.note"](target, name, None, "running")
    done["seconds"] = time.time() - begun
    last = {key: done[key] for key in ("snapshot", "bytes", "seconds")}
    now = time.time()
    noted = {**noted, "taken": now - done["age"], "done": now, "error": None}
    __salt__["zfs_dr.note"](target, name, {**last, **noted})
    if done["changed"]:
        __salt__["zfs_dr.fire"](target, name, "whole", last)
    return done


def _brought(sides, target, stack, datasets, guids, snapshot, full, take):
    # What was noted at the end of the last one says that it came to its end, with all that is held and let go then.
    last, base, names = __salt__["zfs_dr.noted"](target, stack), target["dataset"], _names(target, datasets)
    source = there = None
    if not (full or (snapshot and not take) or last.get("error") or not last.get("snapshot")):
        if not take and __salt__["zfs_dr.nothing_new"](sides, base, datasets, guids, last):
            return _already_there(base, names, last), {key: last[key] for key in ("guids", "state")}
        source, there = __salt__["zfs_dr.since"](sides, base, stack, names, last["snapshot"])
    try:
        done, guids = _replicate(sides, target, stack, datasets, snapshot, full, source, there, last)
    except CommandExecutionError as error:
        # OpenZFS adds nothing to a raw replica of which somebody took a snapshot, and only a closer look sees that.
        if there is None or "has been modified" not in str(error):
            raise
        done, guids = _replicate(sides, target, stack, datasets, snapshot, full, None, None, last)
    state = __salt__["zfs_dr.state"](sides["target"], base, done["snapshot"])
    # Somebody may have written to a replica that was there while another one was still under way.
    still = __salt__["zfs_dr.as_received"](sides["target"], base, names.values(), done["snapshot"])
    return done, {"guids": guids, "state": state if still else None}


def _already_there(base, names, last):
    still = {"why": "already there", "bytes": 0, "seconds": 0.0}
    return {
        "snapshot": last["snapshot"],
        "changed": False,
        "bytes": 0,
        "age": time.time() - last["taken"],
        "datasets": {name: {"replica": f"{base}/{replica}", **still} for name, replica in names.items()},
        "aside": [],
    }


def _replicate(sides, target, stack, datasets, snapshot, full, source, there, last):
    base, stamp = target["dataset"], _now()
    names = _names(target, datasets)
    if not source:
        source, there = __salt__["zfs_dr.listings"](sides, datasets, base)
    there = mend(sides["target"], base, there or __salt__["zfs_dr.target_listing"](sides["target"], base))
    wanted = snapshot or __salt__["zfs_dr.newest_set"](source)
    if not wanted:
        raise CommandExecutionError(
            f"The datasets of {stack} have no snapshot set in common. Take one: ksnap.snapshot, or take=True."
        )
    _own(there, names, _machine(target), stack, base)
    # A replica of another stack may hold the same snapshots, where one was made of a copy of the other.
    replicas = {
        name: entry
        for name, entry in there["replicas"].items()
        if not (__salt__["zfs_dr.beside"](name)[1] or entry["rehearsal"])
        and (name in names.values() or (entry["source"], entry["stack"]) == (_machine(target), stack))
    }
    for name, entry in there["replicas"].items():
        of, kind, _ = __salt__["zfs_dr.beside"](name)
        if kind == "coming" and of in replicas:
            replicas[of]["coming"] = {**entry, "name": name}
    for entry in [*replicas.values(), *(each["coming"] for each in replicas.values() if "coming" in each)]:
        entry["token"] = __salt__["zfs_dr.token"](sides["source"], entry["token"]) if entry["token"] else None
    plan = __salt__["zfs_dr.choose"](source, replicas, wanted, names, full=full, stamp=stamp)
    refused = [step["why"] for step in plan.values() if step["refused"]]
    if refused:
        raise CommandExecutionError("Nothing was sent: " + "\n".join(refused))
    work = any(step["acts"] for step in plan.values())
    moved, aside = {}, []
    if work:
        __salt__["zfs_dr.hold"](sides["source"], target, datasets, wanted)
        aside = _prepare(sides["target"], base, plan, there, source, stamp)
        described = _described(sides, source)
        moved = _send(sides, target, stack, plan, source, wanted, described)
        _mark(sides, target, stack, plan, source, there, described)
    _complete(sides, target, stack, plan, source, there, wanted, work)
    # The set is whole, so what was replaced is needed no more.
    aside += _replaced(sides["target"], base, plan, there, source, stamp)
    __salt__["zfs_dr.keep"](sides["source"], target, source, wanted, last)
    taken = next(s["creation"] for s in source[datasets[0]]["snapshots"] if s["name"] == wanted)
    done = {
        "snapshot": wanted,
        "changed": work,
        "bytes": sum(each["bytes"] for each in moved.values()),
        "age": time.time() - taken,
        "datasets": {
            name: {
                "replica": f"{base}/{step['replica']}",
                "why": step["why"],
                **moved.get(name, {"bytes": 0, "seconds": 0.0}),
            }
            for name, step in plan.items()
        },
        "aside": aside,
    }
    return done, {name: entry["guid"] for name, entry in source.items()}


def _own(there, names, machine, stack, base):
    for name in names.values():
        entry = there["replicas"].get(name)
        if entry is None:
            continue
        if entry["source"] is None and not entry["token"]:
            raise CommandExecutionError(
                f"{base}/{name} was not made by zfs_dr, and stands where a replica is to be. Rename it, or choose "
                "another base."
            )
        if entry["source"] and (entry["source"], entry["stack"]) != (machine, stack):
            raise CommandExecutionError(
                f"{base}/{name} is the replica of {entry['stack']} of {entry['source']}, not of {stack} of {machine}. "
                "Give each source and stack a base of its own. If this is that machine under a new name: "
                f"zfs set zfs_dr:source={machine} {base}/{name}"
            )


def _hold_there(side, base, replicas, snapshot, tag):
    # With -r it is all or nothing: one that is held already keeps the others from it.
    code, *_ = __salt__["zfs_dr.run"](side, ["zfs", "hold", "-r", tag, f"{base}@{snapshot}"], code=True)
    if code:
        names = [f"{base}@{snapshot}", *(f"{base}/{replica}@{snapshot}" for replica in replicas)]
        __salt__["zfs_dr.run_but"](side, ["zfs", "hold", tag, *names], "tag already exists")


def _now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


def _prepare(side, base, plan, there, source, stamp):
    # Everything that comes before the streams, and never destroys: renaming, setting aside, giving up stale parts.
    made, kinds = [], _kinds(plan, there)

    def zfs(*argv):
        __salt__["zfs_dr.run"](side, ["zfs", *argv])

    def aside(kind, name, snapshot=None):
        made.append(__salt__["zfs_dr.set_aside"](side, f"{base}/{name}", snapshot, stamp, kind))

    for step in plan.values():
        for act in [act for act in step["acts"] if act[0] == "drop"]:
            entry = there["replicas"][act[1]]
            if entry["token"] and not entry["snapshots"]:
                zfs("receive", "-A", f"{base}/{act[1]}")
            else:
                aside(entry["type"], act[1])
        if step["acts"][:1] == [["aside", None]] and _old(step) != step["replica"]:
            aside(there["replicas"][step["replica"]]["type"], step["replica"])
            step["acts"].pop(0)
    moved = [(dataset, _old(step), step["replica"]) for dataset, step in plan.items() if _old(step) != step["replica"]]
    for dataset, old, _ in moved:
        zfs(*_renamed(kinds[dataset], f"{base}/{old}", f"{base}/{old}.moving"))
    for dataset, old, new in moved:
        zfs(*_renamed(kinds[dataset], f"{base}/{old}.moving", f"{base}/{new}"))
        coming = there["replicas"][old].get("coming")
        if coming and REPLACE in plan[dataset]["acts"]:
            zfs(*_renamed(coming["type"], f"{base}/{coming['name']}", f"{base}/{plan[dataset]['place']}"))
    for dataset, step in plan.items():
        name, kind = step["replica"], kinds[dataset]
        for act in step["acts"]:
            if act == REPLACE:
                name, kind = step["place"], source[dataset]["type"]
            elif act[0] == "abort":
                zfs("receive", "-A", f"{base}/{name}")
            elif act[0] == "aside":
                aside(kind, name, act[1])
    return made


def _old(step):
    return next((act[1] for act in step["acts"] if act[0] == "rename"), step["replica"])


def _kinds(plan, there):
    # What each replica is that there is: one that is replaced may be another thing than what comes.
    return {dataset: there["replicas"].get(_old(step), {}).get("type") for dataset, step in plan.items()}


def _replaced(side, base, plan, there, source, stamp):
    made, kinds = [], _kinds(plan, there)
    for dataset, step in plan.items():
        if step["place"] != step["replica"]:
            replica = f"{base}/{step['replica']}"
            made.append(__salt__["zfs_dr.set_aside"](side, replica, None, stamp, kinds[dataset]))
            argv = _renamed(source[dataset]["type"], f"{base}/{step['place']}", replica)
            __salt__["zfs_dr.run"](side, ["zfs", *argv])
    return made


def _renamed(kind, name, new):
    # -u, which keeps it from being mounted, is for file systems alone.
    return ["rename", *(["-u"] if kind == "filesystem" else []), name, new]


def set_aside(side, replica, snapshot, stamp=None, kind="filesystem"):
    """
    Take a replica back to one of its snapshots, and keep all that it had beyond it under another name.

    side
        (dict or None) One of what :func:`zfs_dr_side.connect` returns; ``None`` is this machine.
    replica
        (string) The dataset.
    snapshot
        (string) The name of the snapshot, what is after the @; with ``None`` the replica as a whole is renamed.
    stamp
        (string) The end of the other name. Default: the time, in UTC.
    kind
        (string) ``filesystem`` or ``volume``, which the replica is. Default: ``filesystem``.

    Returns the name under which it is kept: ``<replica>.aside-<stamp>``. It shares its blocks with the replica.

    Raises ``CommandExecutionError`` when a step fails; the next replication mends what was left half done.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.set_aside null backup/web1/tank:web ksnap-20261125T222408.123456Z-0a1b2c3d
    """
    stamp = stamp or _now()
    kept, new = f"{replica}.aside-{stamp}", f"{replica}.new-{stamp}"

    def zfs(*argv):
        return __salt__["zfs_dr.run"](side, ["zfs", *argv])

    if snapshot is None:
        zfs(*_renamed(kind, replica, kept))
        return kept
    options = [word for pair in _own_properties(zfs, replica) for word in ("-o", pair)]
    zfs("clone", *options, f"{replica}@{snapshot}", new)
    _switch(zfs, kind, replica, new, kept)
    return kept


def _own_properties(zfs, replica):
    # What a clone that takes a replica's place must have: its marks, and what keeps it from being written to or
    # mounted, whatever somebody has set there.
    lines = zfs("get", "-Hp", "-s", "local,received", "-o", "property,value", "all", replica).splitlines()
    has = dict(line.split("\t", 1) for line in lines)
    guards = {name: value for name, value in GUARDS.items() if name in has or name == "readonly"}
    marks = {name: value for name, value in has.items() if name.startswith("zfs_dr:")}
    return [f"{name}={value}" for name, value in {**guards, **marks}.items()]


def _switch(zfs, kind, replica, new, kept):
    zfs("promote", new)
    zfs(*_renamed(kind, replica, kept))
    zfs(*_renamed(kind, new, replica))


def mend(side, base, there):
    """
    End what a power cut left of :func:`set_aside`, or between a set and the names of what came to replace a replica.
    Replicas on their way to another name need no mending: they are found by what they hold, as all are.

    side
        (dict or None) One of what :func:`zfs_dr_side.connect` returns; ``None`` is this machine.
    base
        (string) The dataset that the replicas are children of.
    there
        (dict) What :func:`zfs_dr_side.target_listing` returned.

    Returns ``there``, or the new listing where something was mended.

    CLI Example: none; :func:`replicate` and :func:`zfs_dr_recover.recover` begin with it.
    """

    def zfs(*argv):
        return __salt__["zfs_dr.run"](side, ["zfs", *argv])

    # Its name tells what it was about to become.
    mended = False
    for name, entry in list(there["replicas"].items()):
        of, kind, stamp = __salt__["zfs_dr.beside"](name)
        replica, kept = f"{base}/{of}", f"{base}/{of}.aside-{stamp}"
        if kind == "coming" and of in there["replicas"] and not _whole(there, entry):
            continue
        if kind not in ("new", "coming"):
            continue
        mended = True
        if of not in there["replicas"]:
            zfs(*_renamed(entry["type"], f"{base}/{name}", replica))
        elif kind == "new" and entry["origin"] and entry["origin"].startswith(f"{replica}@"):
            # A cut may come between a clone and its properties: OpenZFS sets them after it was made.
            zfs("set", *_own_properties(zfs, replica), f"{base}/{name}")
            _switch(zfs, entry["type"], replica, f"{base}/{name}", kept)
        else:
            zfs(*_renamed(there["replicas"][of]["type"], replica, kept))
            zfs(*_renamed(entry["type"], f"{base}/{name}", replica))
    return __salt__["zfs_dr.target_listing"](side, base) if mended else there


def _whole(there, entry):
    # What came is a part of a set that was marked as whole.
    marks = {each["name"] for each in there["sets"] if each["stack"] == entry["stack"]}
    return bool(entry["snapshots"]) and not entry["token"] and entry["snapshots"][-1]["name"] in marks


def _size(dataset, start, end):
    # What was written between two snapshots is what a stream carries, nearly.
    snapshots = {each["name"]: each for each in dataset["snapshots"]}
    last = snapshots[end]
    if start is None:
        return last["referenced"]
    name = re.split("[@#]", start)[1]
    marks = {**{each["name"]: each for each in dataset["bookmarks"]}, **snapshots}
    first = marks[name]["createtxg"]
    return sum(each["written"] for each in dataset["snapshots"] if first < each["createtxg"] <= last["createtxg"])


def _send(sides, target, stack, plan, source, wanted, described):
    # Rounds: one finishes what had broken off, the next goes on to the wanted set.
    moved = {}
    for kind in ("resume", "send"):
        jobs = []
        for dataset, step in plan.items():
            for act in step["acts"]:
                if act[0] == kind:
                    marks = _marks(target, stack, source[dataset], described[dataset])
                    jobs.append(_job(sides, target, stack, dataset, source[dataset], step["place"], act, marks))
        if not jobs:
            continue
        tell = __salt__["zfs_dr.progress"](target, stack, wanted)
        results = __salt__["zfs_dr.streams"](
            jobs, parallel=target["parallel"], bandwidth=target["bandwidth"], progress=tell
        )
        for dataset, result in results.items():
            before = moved.get(dataset, {"bytes": 0, "seconds": 0.0})
            moved[dataset] = {key: before[key] + result[key] for key in ("bytes", "seconds")}
        __salt__["zfs_dr.check_streams"](results)
    return moved


def _job(sides, target, stack, dataset, entry, replica, act, marks):
    place = f"{target['dataset']}/{replica}"
    if act[0] == "resume":
        token = __salt__["zfs_dr.run"](
            sides["target"], ["zfs", "get", "-H", "-o", "value", "receive_resume_token", place]
        ).strip()
        send, size, start = ["zfs", "send", "-t", token], 0, True
    else:
        start = act[1]
        send = ["zfs", "send", "-w" if target["raw"] else "-Lec"]
        send += ["-i", start] if start else []
        send += [f"{dataset}@{act[2]}"]
        size = _size(entry, start, act[2])
    receive = ["zfs", "receive", "-s", "-u"]
    if start is None:
        receive += [word for name, value in marks.items() for word in ("-o", f"{name}={value}")]
    how = target["compression"] if target["ssh"] else "none"
    return {
        "name": dataset,
        "send": __salt__["zfs_dr.compressed"](sides["source"], send, how, True),
        "receive": __salt__["zfs_dr.compressed"](sides["target"], [*receive, place], how, False, stack),
        "bytes": size,
    }


def _marks(target, stack, entry, described):
    # What a replica has of its own.
    marks = {
        "readonly": GUARDS["readonly"],
        "zfs_dr:source": _machine(target),
        "zfs_dr:stack": stack,
        "zfs_dr:dataset_guid": str(entry["guid"]),
        "zfs_dr:properties": described,
    }
    if entry["type"] == "filesystem":
        marks.update(GUARDS)
    return marks


def _complete(sides, target, stack, plan, source, there, wanted, work):
    # The set is whole: say so there, then let go of the one before. Each step is done where it is missing, so that
    # whatever a cut left undone is done by the next call.
    base, tag = target["dataset"], f"zfs_dr:{stack}"
    guids = {name: next(s for s in entry["snapshots"] if s["name"] == wanted)["guid"] for name, entry in source.items()}
    mark = next((each for each in there["sets"] if each["name"] == wanted), None)
    if mark is None:
        digest = __salt__["zfs_dr.digest"](stack, {plan[name]["replica"]: guid for name, guid in guids.items()})
        properties = {"stack": stack, "source": _machine(target), "members": len(plan), "digest": digest}
        options = [word for key, value in properties.items() for word in ("-o", f"zfs_dr:{key}={value}")]
        __salt__["zfs_dr.run"](sides["target"], ["zfs", "snapshot", *options, f"{base}@{wanted}"])
    if mark is None or not mark["held"]:
        _hold_there(sides["target"], base, [step["place"] for step in plan.values()], wanted, tag)
    held = {name: next(s for s in entry["snapshots"] if s["name"] == wanted)["held"] for name, entry in source.items()}
    if not work and not all(held.values()):
        __salt__["zfs_dr.hold"](sides["source"], target, source, wanted)
    others = [each for each in there["sets"] if each["held"] and each["name"] != wanted and each["stack"] == stack]
    partial = {
        s["name"]
        for name in (step["replica"] for step in plan.values())
        for s in there["replicas"].get(name, {"snapshots": []})["snapshots"]
        if s["held"] and s["name"] != wanted
    }
    for name in sorted({each["name"] for each in others} | partial):
        # Replicas that came later do not have it, nor what was set aside.
        argv = ["zfs", "release", "-r", tag, f"{base}@{name}"]
        __salt__["zfs_dr.run_but"](sides["target"], argv, "no such tag|does not exist")


def _described(sides, source):
    # The properties of each dataset, for the day when its replica has to stand in for it, as text.
    argv = [
        "zfs",
        "get",
        "-Hp",
        "-s",
        "local,received",
        "-o",
        "name,property,value",
        "-t",
        "filesystem,volume",
        "all",
        *source,
    ]
    properties = {
        name: {"mountpoint": entry["mountpoint"], "canmount": entry["canmount"]} for name, entry in source.items()
    }
    for line in __salt__["zfs_dr.run"](sides["source"], argv).splitlines():
        # A value of somebody's own may have lines; what is ours to keep has none.
        name, key, value = (*line.split("\t", 2), "", "")[:3]
        if name in properties and not key.startswith(PRIVATE):
            properties[name][key] = value
    return {name: json.dumps({"dataset": name, **found}, sort_keys=True) for name, found in properties.items()}


def _mark(sides, target, stack, plan, source, there, described):
    # What was received anew has its marks; of the others, those that differ, or that a cut kept from arriving.
    commands = []
    for name, entry in source.items():
        step = plan[name]
        if ["send", None] in [act[:2] for act in step["acts"]]:
            continue
        marks = _marks(target, stack, entry, described[name])
        known = there["replicas"].get(step["replica"], {})
        known = known.get("coming", {}) if step["place"] != step["replica"] else known
        has = {key: str(known.get(KNOWN.get(key) or key.removeprefix("zfs_dr:"))) for key in marks}
        pairs = [f"{key}={value}" for key, value in marks.items() if has[key] != value and key != "mountpoint"]
        if pairs:
            commands.append(["zfs", "set", *pairs, f"{target['dataset']}/{step['place']}"])
    __salt__["zfs_dr.run_all"](sides["target"], commands, target["parallel"])
