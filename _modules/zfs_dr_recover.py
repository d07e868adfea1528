"""
A replica made usable
=====================

:func:`recover` runs on the target's machine. A rehearsal mounts clones and changes nothing else; a promotion makes the
replicas themselves serve, for good, until :func:`demote` and :func:`failback` bring what changed back to the repaired
source.
"""

import contextlib
import datetime
import fcntl
import glob
import itertools
import json
import os
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

RUN = "/run/zfs_dr"
HOMES = "/var/lib/zfs_dr"
# What a dataset may be given again. Sizes and reservations are the other machine's matter, and what is fixed when a
# dataset is made came with the stream.
RESTORED = set(
    "acltype aclinherit aclmode atime checksum compression copies devices dnodesize exec logbias primarycache "
    "recordsize redundant_metadata relatime secondarycache setuid snapdir special_small_blocks sync volmode "
    "xattr".split()
)
LEAST = 900.0  # seconds of silence before a source counts as gone


def __virtual__():
    return __virtualname__


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _lock_files(base, stack):
    key = f"{base.replace('/', ':')}-{stack}"
    gates = glob.glob(os.path.join(HOMES, "*", ".zfs_dr", f"{glob.escape(key)}.lock"))
    return [os.path.join(RUN, f"{key}.target"), *gates]


@contextlib.contextmanager
def _locked(base, stack):
    # The same locks that a replication takes: it cannot begin, and if one is at work we do not.
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    own = _lock_files(base, stack)[0]
    with contextlib.ExitStack() as open_files:
        open_files.enter_context(open(own, "a", encoding="ascii")).close()
        for path in _lock_files(base, stack):
            file = open_files.enter_context(open(path, "r+", encoding="ascii"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandExecutionError(
                    f"A replication of {stack} into {base} is at work, so its source lives. Stop that first."
                ) from None
        yield


def source_alive(base, stack, silence=None, there=None):
    """
    Tell whether the source of a stack is known to live: it replicates now, or did so lately.

    base
        (string) The dataset that the replicas are children of, on this machine.
    stack
        (string) The stack's name.
    silence
        (number) Seconds without a sign of life after which it counts as gone. Default: twice the longest time between
        the last ten sets, and 15 minutes at least.
    there
        (dict) What :func:`zfs_dr_side.target_listing` returned. Default: it is asked.

    Returns a dict: ``alive`` (bool), ``seen`` (seconds since the epoch, the last sign of life) and ``silence``.

    Raises ``CommandExecutionError`` when there is no such base.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.source_alive backup/web1 web
    """
    arrived = [each["arrived"] for each in __salt__["zfs_dr.sets"](base, stack, there)][-10:]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrived)]
    limit = float(silence) if silence is not None else max([LEAST, *(2.0 * gap for gap in gaps)])
    seen = max([0, *arrived])
    running = False
    for path in _lock_files(base, stack):
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            seen = max(seen, os.fstat(file.fileno()).st_mtime)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                running = True
    return {"alive": running or time.time() - seen < limit, "seen": seen, "silence": limit}


def recover(base, stack, where=None, how="rehearse", snapshot=None, force=False, silence=None, failed=None, keys=None):
    """
    Make the newest whole set of a stack usable on the target's machine.

    base
        (string) The dataset that the replicas are children of, on this machine.
    stack
        (string) The stack's name.
    where
        (string) The directory under which everything is mounted, nested as it was. Needed for a rehearsal; without it
        a promotion mounts each dataset where it was at the source, but for a root file system, which is there for the
        next boot.
    how
        (string) ``rehearse``: clones, writable, which :func:`end_rehearsal` removes; replication goes on meanwhile.
        ``promote``: the replicas themselves, for good; no replication touches them any more. Default: ``rehearse``.
    snapshot
        (string) Another set than the newest whole one.
    force
        (bool) Promote although the source is known to live: both would then serve. Default: False.
    silence
        (number) As :func:`source_alive` takes it.
    failed
        (number) When the source failed, in seconds since the epoch, for the RPO. Default: the source's last sign of
        life for a promotion, now for a rehearsal.
    keys
        (dict) Replica or source dataset to the file with its key, for encrypted ones whose key is not loaded.

    Returns a dict: ``snapshot``, ``how``, ``id`` (of a rehearsal, else ``None``), ``mounts`` (a dict, dataset to
    path), ``unmounted`` (a dict, dataset to why), ``rpo`` (seconds of changes that are lost) and ``rto`` (seconds that
    this took), both as measured.

    Raises ``SaltInvocationError`` for a wrong call, ``CommandExecutionError`` when the source lives, no set is whole,
    a key is missing, or ZFS refuses: calling again goes on from there.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.recover backup/web1 web /srv/rehearsal
        salt '*' zfs_dr.recover backup/web1 web how=promote
    """
    begun = time.time()
    if how not in ("rehearse", "promote"):
        raise SaltInvocationError(f"how is rehearse or promote, not {how!r}")
    if where is not None and not str(where).startswith("/"):
        raise SaltInvocationError(f"where is an absolute path, not {where!r}")
    if how == "rehearse" and not where:
        raise SaltInvocationError("A rehearsal needs where, a directory of its own, so that it mounts over nothing")
    there = __salt__["zfs_dr.target_listing"](None, base)
    alive = source_alive(base, stack, silence, there)
    identifier = None
    if how == "rehearse":
        chosen = _chosen(base, stack, snapshot, there)
        replicas = _replicas(there, stack, chosen)
        _load_keys(base, replicas, keys or {})
        identifier, mounts, unmounted = _rehearse(base, replicas, chosen["snapshot"], where)
        lost = (failed or begun) - chosen["taken"]
    else:
        under_way = bool(_promoted(there, stack))
        if alive["alive"] and not (force or under_way):
            raise CommandExecutionError(
                f"The source of {stack} lives: its last sign was {time.time() - alive['seen']:.0f} s ago, and only "
                f"after {alive['silence']:.0f} s of silence it counts as gone. Stop it first; or call with force=True, "
                "and both serve."
            )
        with _locked(base, stack):
            there = __salt__["zfs_dr.mend"](None, base, there)
            chosen = _chosen(base, stack, snapshot, there)
            replicas = _replicas(there, stack, chosen)
            _load_keys(base, replicas, keys or {})
            mounts, unmounted = _promote(base, replicas, chosen["snapshot"], where, keys or {})
        lost = (failed or max(alive["seen"], chosen["taken"])) - chosen["taken"]
    return {
        "snapshot": chosen["snapshot"],
        "how": how,
        "id": identifier,
        "mounts": mounts,
        "unmounted": unmounted,
        "rpo": max(0.0, lost),
        "rto": time.time() - begun,
    }


def _chosen(base, stack, snapshot, there):
    # A promotion that a power cut ended goes on with the set that it had begun with.
    begun = {entry["promoted_set"] for entry in _promoted(there, stack).values()}
    found = __salt__["zfs_dr.sets"](base, stack, there)
    whole = [each for each in found if each["whole"] and (not begun or each["snapshot"] in begun)]
    if snapshot:
        whole = [each for each in whole if each["snapshot"] == snapshot]
    if not whole:
        there_are = ", ".join(each["snapshot"] for each in found if each["whole"]) or "none"
        asides = [
            f"{base}/{name}"
            for name, entry in there["replicas"].items()
            if entry["stack"] == stack and __salt__["zfs_dr.beside"](name)[1] == "aside"
        ]
        kept = f". What was set aside has data, too: {', '.join(sorted(asides))}" if asides else ""
        raise CommandExecutionError(f"There is no such whole set of {stack} in {base}; whole are: {there_are}{kept}")
    return whole[-1]


def _of(there, stack):
    # What was set aside has the marks of its replica, also that of a promotion.
    return {
        name: entry
        for name, entry in there["replicas"].items()
        if entry["stack"] == stack and __salt__["zfs_dr.beside"](name)[1] not in ("aside", "new")
    }


def _promoted(there, stack):
    return {name: entry for name, entry in _of(there, stack).items() if entry["promoted"]}


def _replicas(there, stack, chosen):
    return {
        name: entry
        for name, entry in _of(there, stack).items()
        if any(s["name"] == chosen["snapshot"] for s in entry["snapshots"])
    }


def _load_keys(base, replicas, keys):
    names = [f"{base}/{name}" for name in replicas]
    missing = []
    for line in _zfs("get", "-Hp", "-o", "name,value", "keystatus", *names).splitlines():
        name, value = line.split("\t")
        if value != "unavailable":
            continue
        told = _told(replicas[name.removeprefix(f"{base}/")])
        path = keys.get(name) or keys.get(told.get("dataset"))
        if path:
            _zfs("load-key", "-L", f"file://{path}", name)
        else:
            missing.append(name)
    if missing:
        raise CommandExecutionError(
            f"The keys of {', '.join(missing)} are not loaded: zfs load-key, or give keys, a dict of dataset to file"
        )


def _told(entry):
    return json.loads(entry["properties"] or "{}")


def _places(base, replicas, where):
    # Where each is to be mounted, the outer before the inner.
    root = (where or "").rstrip("/")
    places, unmounted = {}, {}
    for name, entry in replicas.items():
        told = _told(entry)
        point = told.get("mountpoint") or "none"
        if entry["type"] == "volume":
            unmounted[name] = "a volume"
        elif not point.startswith("/"):
            unmounted[name] = f"its mountpoint is {point}"
        elif os.path.normpath(point) != point:
            # ZFS allows no such mountpoint: who wrote this may have meant to get out of ``where``.
            unmounted[name] = f"its mountpoint is told as {point}, which is no plain path"
        elif told.get("canmount") == "off":
            unmounted[name] = "its canmount is off"
        elif not where and (told.get("canmount") == "noauto" or point == "/"):
            # A root file system, or a part of one: it does not mount over the one that runs.
            boot = f"it is for booting: zpool set bootfs={base}/{name} {base.partition('/')[0]}"
            unmounted[name] = boot if point == "/" else "its canmount is noauto"
        else:
            places[name] = os.path.normpath(root + point)
    return dict(sorted(places.items(), key=lambda item: item[1].count("/") if item[1] != "/" else 0)), unmounted


def _restored(entry):
    return [f"{key}={value}" for key, value in _told(entry).items() if key in RESTORED]


def _rehearse(base, replicas, snapshot, where):
    places, unmounted = _places(base, replicas, where)
    for path in places.values():
        if os.path.ismount(path):
            raise CommandExecutionError(f"Something is mounted on {path} already; rehearse in another directory")
    identifier = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    parent = f"{base}/rehearsal-{identifier}"
    marks = ["-o", f"zfs_dr:rehearsal={snapshot}"]
    _zfs("create", "-o", "canmount=off", "-o", "mountpoint=none", "-o", "readonly=off", *marks, parent)
    try:
        for name, entry in replicas.items():
            options = (
                {"canmount": "noauto", "mountpoint": places.get(name, "none")} if entry["type"] == "filesystem" else {}
            )
            pairs = ["readonly=off", *(f"{key}={value}" for key, value in options.items()), *_restored(entry)]
            words = [word for pair in pairs for word in ("-o", pair)]
            _zfs("clone", *words, f"{base}/{name}@{snapshot}", f"{parent}/{name}")
        for name in places:
            _zfs("mount", f"{parent}/{name}")
    except CommandExecutionError:
        with contextlib.suppress(CommandExecutionError):
            end_rehearsal(base, identifier)
        raise
    return identifier, {f"{parent}/{name}": path for name, path in places.items()}, unmounted


def rehearsals(base):
    """
    List the rehearsals on a target.

    base
        (string) The dataset that the replicas are children of, on this machine.

    Returns a list of dicts: ``id``, ``snapshot``, ``space`` (bytes that its changes take).

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.rehearsals backup/web1
    """
    told = []
    for line in _zfs("list", "-Hp", "-d", "1", "-o", "name,used,zfs_dr:rehearsal", base).splitlines():
        name, used, snapshot = line.split("\t")
        if name.startswith(f"{base}/rehearsal-"):
            told.append({"id": name.rpartition("/rehearsal-")[2], "snapshot": snapshot, "space": int(used)})
    return told


def end_rehearsal(base, id):
    """
    Unmount and destroy the clones of a rehearsal.

    base
        (string) The dataset that the replicas are children of, on this machine.
    id
        (string) As :func:`recover` returned and :func:`rehearsals` lists it.

    Raises ``SaltInvocationError`` when there is none of that name, ``CommandExecutionError`` when it is in use.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.end_rehearsal backup/web1 20261125T222408Z
    """
    if id not in [each["id"] for each in rehearsals(base)]:
        raise SaltInvocationError(f"There is no rehearsal {id} in {base}; zfs_dr.rehearsals lists them")
    parent = f"{base}/rehearsal-{id}"
    mounted = [
        line.split("\t")
        for line in _zfs("list", "-Hp", "-r", "-t", "filesystem", "-o", "name,mounted,mountpoint", parent).splitlines()
    ]
    for name, state, _ in sorted(mounted, key=lambda each: -each[2].count("/")):
        if state == "yes":
            _zfs("unmount", name)
    _zfs("destroy", "-r", parent)


def _promote(base, replicas, snapshot, where, keys):
    names = {name: f"{base}/{name}" for name in replicas}
    # This comes first: from here on no replication touches them, whatever happens to us.
    _zfs("set", f"zfs_dr:promotion={time.time():.6f}", base)
    _zfs("set", f"zfs_dr:promoted={snapshot}", *names.values())
    for name, entry in replicas.items():
        if entry["token"]:
            _zfs("receive", "-A", names[name])
        beyond = entry["snapshots"][-1]["name"] != snapshot or entry["written"]
        # One that serves already was written to since, and rightly.
        if beyond and entry["readonly"] == "on":
            __salt__["zfs_dr.set_aside"](None, names[name], snapshot, kind=entry["type"])
    # What took a replica's place has the same key, and it is not loaded there.
    _load_keys(base, replicas, keys)
    places, unmounted = _places(base, replicas, where)
    for name, entry in replicas.items():
        pairs = _restored(entry)
        if entry["type"] == "filesystem":
            told = _told(entry)
            point = places.get(name) or (told.get("mountpoint") if not where else None) or "none"
            mounts = "on" if name in places else "off" if told.get("canmount") == "off" else "noauto"
            pairs += [f"mountpoint={point if point.startswith('/') else 'none'}", f"canmount={mounts}"]
        if pairs:
            _zfs("set", *pairs, names[name])
    # From here on, what is written to them is no reason to set it aside.
    _zfs("set", "readonly=off", *names.values())
    shown = _zfs("list", "-H", "-o", "name,mounted", *names.values()).splitlines()
    mounted = [line.split("\t")[0] for line in shown if line.endswith("\tyes")]
    for name in places:
        if names[name] not in mounted:
            _zfs("mount", names[name])
    return {names[name]: path for name, path in places.items()}, unmounted


def demote(base, stack):
    """
    End the service of promoted replicas: what was written since is snapshotted as a set, and they are unmounted and
    read-only again. They stay marked as promoted, until :func:`failback` has brought that set to the source.

    base
        (string) The dataset that the replicas are children of, on this machine.
    stack
        (string) The stack's name.

    Returns a dict: ``snapshot`` (the set to be brought back) and ``since`` (the one that was promoted).

    Raises ``CommandExecutionError`` when the stack is not promoted, or something still uses it: stop that.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.demote backup/web1 web
    """
    there = __salt__["zfs_dr.target_listing"](None, base)
    replicas = _promoted(there, stack)
    if not replicas:
        raise CommandExecutionError(f"{stack} is not promoted in {base}; there is nothing to end")
    names = [f"{base}/{name}" for name in replicas]
    listed = _zfs("list", "-Hp", "-o", "name,type,mounted,mountpoint", *names).splitlines()
    rows = [line.split("\t") for line in listed]
    for name, _, mounted, _ in sorted(rows, key=lambda row: -row[3].count("/")):
        if mounted == "yes":
            _zfs("unmount", name)
    _zfs("set", "readonly=on", *names)
    filesystems = [name for name, kind, _, _ in rows if kind == "filesystem"]
    if filesystems:
        _zfs("set", "canmount=noauto", "mountpoint=none", *filesystems)
    since = next(iter(replicas.values()))["promoted_set"]
    snapshot = __salt__["ksnap.new_name"]("failback")
    _zfs("snapshot", "-o", "zfs_dr:failback=1", *(f"{name}@{snapshot}" for name in names))
    return {"snapshot": snapshot, "since": since}


def failback(stack, target, services=None):
    """
    Bring what was written to promoted replicas back to the repaired source, incrementally. Run it on the source; on
    the target, :func:`demote` comes before it.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it; its datasets must have the set that was promoted.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it. Over ssh, the key must be granted ``source:<base>``
        there.
    services
        (list of strings) As :func:`ksnap.rollback` takes it: stopped while the datasets change; those that ran are
        started when all is there, and stay stopped where it fails. Default: the stack's.

    Returns a dict: ``snapshot`` (the set at which both sides are the same now), ``since``, ``bytes``, ``seconds`` and
    ``aside`` (under which name :func:`ksnap.aside` lists what the source had, or ``None`` where it had nothing of its
    own).

    Raises ``CommandExecutionError`` when the replicas are not demoted, the source lacks the set, or ZFS refuses.
    Nothing of the source is destroyed; calling again goes on from there.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.failback web vault
    """
    begun = time.time()
    target = __salt__["zfs_dr.target"](target)
    if target["direction"] == "pull":
        raise SaltInvocationError("A failback runs on the source's machine, with a target that is pushed to")
    name, datasets, _ = __salt__["zfs_dr.members"](stack, target)
    sides = __salt__["zfs_dr.connect"](target)
    try:
        return {**_failback(sides, target, stack, name, datasets, services), "seconds": time.time() - begun}
    finally:
        __salt__["zfs_dr.disconnect"](sides)


def _failback(sides, target, stack, name, datasets, services):
    base = target["dataset"]
    source, there = __salt__["zfs_dr.listings"](sides, datasets, base)
    replicas = {dataset: there["replicas"].get(dataset.replace("/", ":")) for dataset in datasets}
    missing = [dataset for dataset, entry in replicas.items() if not entry or not entry["promoted"]]
    if missing:
        raise CommandExecutionError(f"{', '.join(missing)} was not promoted in {base}: there is nothing to bring back")
    since = next(iter(replicas.values()))["promoted_set"]
    newest = {entry["snapshots"][-1]["name"] for entry in replicas.values()}
    wanted = newest.pop()
    if newest or wanted == since or any(e["written"] or e["readonly"] != "on" for e in replicas.values()):
        raise CommandExecutionError(f"The replicas in {base} serve yet. Stop what uses them, then zfs_dr.demote there")
    lacking = [dataset for dataset, entry in source.items() if since not in [s["name"] for s in entry["snapshots"]]]
    done = all(entry["snapshots"] and entry["snapshots"][-1]["name"] == wanted for entry in source.values())
    if lacking and not done:
        raise CommandExecutionError(
            f"{', '.join(lacking)} has no {since}, from which the replicas went on: receive them in full"
        )
    aside, moved = None, 0
    if not done:
        with _stopped(__salt__["ksnap.stack"](stack)["services"] if services is None else services):
            # They wrote until now; what is not in a transaction group yet does not count as written.
            __salt__["ksnap.command"](["zpool", "sync", *{dataset.split("/")[0] for dataset in datasets}])
            source = __salt__["zfs_dr.source_listing"](None, datasets)
            behind = [d for d, e in source.items() if e["snapshots"][-1]["name"] not in (since, wanted) or e["written"]]
            if behind:
                # That all of the stack have it was seen; one that has left it since stays as it is.
                aside = __salt__["ksnap.rollback"](stack, since, services=services, partial=True)
            moved = _bring(sides, target, name, replicas, source, since, wanted, bool(behind))
    guids = {dataset: entry["snapshots"][-1]["guid"] for dataset, entry in replicas.items()}
    now = __salt__["zfs_dr.source_listing"](None, datasets)
    if any(entry["snapshots"][-1]["guid"] != guids[dataset] for dataset, entry in now.items()):
        raise CommandExecutionError(
            "The source is not what the replicas are, after all was received. Call failback again"
        )
    # From here on it is a source again, and they are its replicas.
    marks = [["zfs", "inherit", "zfs_dr:promoted", f"{base}/{dataset.replace('/', ':')}"] for dataset in datasets]
    __salt__["zfs_dr.run_all"](sides["target"], marks)
    return {"snapshot": wanted, "since": since, "bytes": moved, "aside": aside}


@contextlib.contextmanager
def _stopped(services):
    ran = __salt__["ksnap.running"](services)
    try:
        for each in ran:
            if not __salt__["service.stop"](each):
                raise CommandExecutionError(f"The service {each} did not stop; see its log.")
        yield
    except CommandExecutionError as error:
        if not ran:
            raise
        after = f"Stopped for this, and to be started once failback came to its end: {', '.join(reversed(ran))}"
        raise CommandExecutionError(f"{error}\n{after}") from error
    failed = [each for each in reversed(ran) if not __salt__["service.start"](each)]
    if failed:
        raise CommandExecutionError(f"All was brought back, but these services did not start: {', '.join(failed)}")


def _bring(sides, target, name, replicas, source, since, wanted, rolled_back):
    base, jobs = target["dataset"], []
    rows = [
        line.split("\t") for line in _zfs("list", "-Hp", "-o", "name,mounted,mountpoint,canmount", *source).splitlines()
    ]
    mounted = sorted((row for row in rows if row[1] == "yes"), key=lambda row: -row[2].count("/"))
    unmounted = []
    try:
        # What is mounted may be written to, if only by its access times, and would not take the stream.
        for dataset, *_ in mounted:
            _zfs("unmount", dataset)
            unmounted.append(dataset)
        for dataset, entry in replicas.items():
            if not rolled_back and source[dataset]["snapshots"][-1]["name"] == wanted:
                continue
            place = f"{base}/{dataset.replace('/', ':')}"
            send = ["zfs", "send", "-w" if target["raw"] else "-Lec", "-i", f"{place}@{since}", f"{place}@{wanted}"]
            how = target["compression"] if target["ssh"] else "none"
            jobs.append(
                {
                    "name": dataset,
                    "send": __salt__["zfs_dr.compressed"](sides["target"], send, how, True),
                    "receive": __salt__["zfs_dr.compressed"](None, ["zfs", "receive", "-u", dataset], how, False),
                    "bytes": entry["snapshots"][-1]["written"],
                }
            )
        results = __salt__["zfs_dr.streams"](jobs, parallel=target["parallel"], bandwidth=target["bandwidth"])
        __salt__["zfs_dr.check_streams"](results)
    finally:
        for dataset in reversed(unmounted):
            _zfs("mount", dataset)
    return sum(each["bytes"] for each in results.values())
