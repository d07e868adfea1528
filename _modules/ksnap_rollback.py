"""
Rollback that destroys nothing
==============================

``zfs rollback -r`` destroys every newer snapshot, and clones of them. Here each dataset is renamed, and a clone of the
snapshot takes its name; promoted, it owns the history up to the snapshot. What was there before, newer snapshots and
all, is *aside*: ``<dataset>.aside-<id>``, never mounted at the start, listed by ``ksnap.aside``, put back by
``ksnap.restore_aside``, and only destroyed by ``ksnap.discard_aside``.
"""

import contextlib
import datetime
import getpass
import itertools
import json
import os
import re
import secrets

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

RECORD = "ksnap:aside"
FSTAB = "/etc/fstab"
LONGEST = 255  # of a dataset's name
# What a clone has from its origin, or what is set in its own time.
NOT_COPIED = set(
    "canmount casesensitivity encryption keyformat keylocation normalization pbkdf2iters pbkdf2salt refreservation "
    "reservation utf8only version volblocksize volsize".split()
)
RESERVATIONS = ("reservation", "refreservation")


def __virtual__():
    return __virtualname__


def rollback(stack, snapshot, services=None, partial=False, test=False):
    """
    Take all datasets of a stack back to a snapshot, and set their present state aside.

    Datasets below the stack's that do not belong to it stay as they are. Properties, permissions (``zfs allow``)
    and bookmarks up to the snapshot are kept. Everything is unmounted meanwhile.

    stack
        (string or dict) The stack, see ``ksnap.stack``.
    snapshot
        (string) The snapshot's name, the part after the @, or its label if it is the only one of it.
    services
        (list) The services to stop, in this order; those that ran are started again in the reverse one. Default: the
        stack's
    partial
        (bool) Leave datasets of the stack that lack the snapshot as they are, and those that the snapshot has and the
        stack has not, instead of refusing. Default: False
    test
        (bool) Only say what would be done. Default: False

    Returns a dict: ``aside`` (its id), ``snapshot``, ``stack``, ``datasets`` (each to the name under which its
    former state is aside), ``kept`` (datasets that stayed) and ``services`` (those that were stopped).

    Raises ``CommandExecutionError`` when it cannot be done, before anything is touched, or when it failed; all datasets
    are then as they were.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.rollback mail before-upgrade
        salt '*' ksnap.rollback mail before-upgrade services='[postfix, postgresql]'
    """
    with __salt__["ksnap.locked"](test=test):
        found = __salt__["ksnap.stack"](stack)
        if not found["datasets"]:
            raise CommandExecutionError(
                "The stack has no datasets: " + (", ".join(found["outside"]) or "nothing") + "."
            )
        name = snapshot
        if not (isinstance(snapshot, str) and __salt__["ksnap.parse_name"](snapshot)):
            name = __salt__["ksnap.snapshot_name"](found, snapshot)
        snapshots = _snapshots(found, name, partial)
        chosen = sorted(snapshots)
        family = _family(chosen)
        _refuse(chosen, family)
        identifier = _identifier()
        _refuse_length(family, identifier)
        plan = _plan("rollback", identifier, found["name"], name, services or found["services"], chosen, family)
        for wave in _waves(chosen):
            renames, steps = [], []
            for group in wave:
                top = group[0]
                away = _away(top, identifier)
                clones, promotions = [], []
                for dataset in group:
                    old = away + dataset[len(top) :]
                    guid, _ = snapshots[dataset]
                    clones.append(["clone", f"{old}@{name}", dataset, _options(family[dataset]), guid])
                    # It takes the bookmarks up to the snapshot along.
                    promotions.append(["promote", dataset, old, name, guid])
                renames.append(_renamed(top, away, family[top]))
                steps += [*clones, *promotions, *_keep(family, group, chosen, top, away)]
            # Apart: until it is renamed, a dataset looks like its own clone, promoted.
            plan["stages"] += [renames, steps]
        dress, permissions = [], _permissions(chosen)
        for dataset in chosen:
            dress += _dress_aside(plan, dataset, _aside_name(dataset, chosen, identifier), family[dataset])
            reserved = {key: _size(family[dataset], key) for key in RESERVATIONS if _size(family[dataset], key) != "0"}
            if reserved:
                dress.append(["set", [dataset], reserved, dict.fromkeys(reserved, "none")])
            dress += [["allow", [*words, dataset]] for words in permissions.get(dataset, [])]
        plan["forward"] = plan["back"]
        plan["stages"].append([*dress, *_mountable(plan["back"]["canmount"])])
        said = {
            "aside": identifier,
            "snapshot": name,
            "stack": found["name"],
            "datasets": {dataset: _aside_name(dataset, chosen, identifier) for dataset in chosen},
            "kept": sorted(set(family) - set(chosen)),
            "services": plan["services"],
        }
        if not test:
            __salt__["ksnap.boot_unit"]()
            __salt__["ksnap.carry_out"](plan)
        return said


def aside(stack=None):
    """
    List the states that rollbacks have set aside, the oldest first.

    stack
        (string) Only those of the stack of this name. Default: all

    Returns a list of dicts: ``id``, ``stack``, ``snapshot`` (to which was rolled back then), ``when`` (seconds since
    1970), ``who``, ``datasets`` (each to the name under which it is aside), ``used`` (bytes that they alone hold) and
    ``whole`` (False if some of its datasets are gone).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.aside
    """
    shown = _zfs("get", "-H", "-p", "-s", "local", "-t", "filesystem,volume", "-o", "name,value", RECORD)
    sets = {}
    for line in shown.splitlines():
        name, value = line.split("\t", 1)
        record = json.loads(value)
        each = sets.setdefault(
            record["id"], {**{key: record[key] for key in ("id", "stack", "snapshot", "when", "who")}}
        )
        each.setdefault("datasets", {})[record["of"]] = name
        each["whole"] = len(each["datasets"]) == record["count"]
    names = [name for each in sets.values() for name in each["datasets"].values()]
    sizes = {}
    if names:
        listing = _zfs(
            "list", "-H", "-p", "-t", "filesystem,volume", "-o", "name,usedbydataset,usedbysnapshots", *names
        )
        for line in listing.splitlines():
            name, *numbers = line.split("\t")
            sizes[name] = sum(map(int, numbers))
    found = [
        {**each, "used": sum(sizes[name] for name in each["datasets"].values())}
        for each in sets.values()
        if stack is None or each["stack"] == stack
    ]
    return sorted(found, key=lambda each: (each["when"], each["id"]))


def restore_aside(identifier, services=None, test=False):
    """
    Put a state that was set aside back, and set the present one aside in its place.

    identifier
        (string) Its id, as ``ksnap.aside`` lists it.
    services
        (list) The services to stop, as for ``ksnap.rollback``. Default: those of the stack, if it is declared
    test
        (bool) Only say what would be done. Default: False

    Returns what ``ksnap.rollback`` returns: ``aside`` is the id of the state that was present until now.

    Raises ``SaltInvocationError`` for an unknown id, ``CommandExecutionError`` as ``ksnap.rollback`` does.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.restore_aside 20261125T224208Z-5f0e
    """
    with __salt__["ksnap.locked"](test=test):
        wanted = _one_aside(identifier)
        if not wanted["whole"]:
            raise CommandExecutionError(
                f"Of the state {identifier} some datasets are gone; what is left is in "
                f"{', '.join(wanted['datasets'].values())}."
            )
        if services is None:
            services = _services(wanted["stack"])
        chosen = sorted(wanted["datasets"])
        origins = _origins()
        present = {dataset for dataset in chosen if dataset in origins}
        family = _family([dataset for dataset in chosen if dataset in present])
        _refuse(sorted(present), family)
        former = _family(sorted(wanted["datasets"].values()))
        _refuse_keys(former)
        fresh = _identifier(but=identifier)
        _refuse_length(family, fresh)
        plan = _plan("restore_aside", fresh, wanted["stack"], wanted["snapshot"], services, sorted(present), family)
        # Also where nothing stands in the place of what is put back.
        plan["pools"] = sorted({dataset.split("/")[0] for dataset in chosen})
        canmount = {name: value for name, value in plan["back"]["canmount"].items() if name not in present}
        mounts = [mount for mount in plan["back"]["mounts"] if mount["dataset"] not in present]
        records = {dataset: json.loads(former[wanted["datasets"][dataset]][RECORD]["value"]) for dataset in chosen}
        for record in records.values():
            mounts += record["mounts"]
            if record["canmount"]:
                canmount[record["of"]] = record["canmount"]
        plan["forward"] = {"mounts": sorted(mounts, key=lambda mount: mount["path"])}
        promoted = []
        for wave in _waves(chosen):
            before, promotions, after, kept = [], [], [], []
            for group in wave:
                top, source = group[0], wanted["datasets"][group[0]]
                away = _away(top, fresh)
                if top in present:
                    before.append(_renamed(top, away, family[top]))
                    _rename_in(origins, top, away)
                promotions += [_promotions(origins, top, dataset, source, away) for dataset in group]
                after.append(_renamed(source, top, former[source]))
                _rename_in(origins, source, top)
                kept += _keep(family, group, chosen, top, away)
            # Of one dataset one after the other: each promotion moves what the next one asks for.
            turns = [[step for step in turn if step] for turn in itertools.zip_longest(*promotions)]
            promoted += itertools.chain.from_iterable(turns)
            plan["stages"] += [before, *turns, after, kept]
        _name_by_guid(promoted)
        dress = []
        for dataset in chosen:
            if dataset in present:
                dress += _dress_aside(plan, dataset, _aside_name(dataset, chosen, fresh), family[dataset])
            before = former[wanted["datasets"][dataset]]
            reserved = {key: value for key, value in records[dataset]["reserved"].items() if value != "0"}
            dress.append(
                [
                    "set",
                    [dataset],
                    {RECORD: None, **reserved},
                    {RECORD: before[RECORD]["value"], **dict.fromkeys(reserved, "none")},
                ]
            )
        plan["stages"].append([*dress, *_mountable(canmount)])
        plan["stages"] = [stage for stage in plan["stages"] if stage]
        said = {
            "aside": fresh,
            "snapshot": wanted["snapshot"],
            "stack": wanted["stack"],
            "datasets": {dataset: _aside_name(dataset, chosen, fresh) for dataset in chosen if dataset in present},
            "kept": sorted(set(family) - set(present)),
            "services": plan["services"],
        }
        if not test:
            __salt__["ksnap.boot_unit"]()
            __salt__["ksnap.carry_out"](plan)
        return said


def discard_aside(identifier, test=False):
    """
    Destroy a state that was set aside, with its snapshots. This is for good.

    identifier
        (string) Its id, as ``ksnap.aside`` lists it.
    test
        (bool) Only say what would be destroyed. Default: False

    Returns a dict: ``id``, ``datasets`` (a sorted list of those destroyed) and ``freed`` (bytes).

    Raises ``SaltInvocationError`` for an unknown id, ``CommandExecutionError`` when a snapshot of it is held, or a
    clone outside of it was made from it; nothing is then destroyed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.discard_aside 20261125T224208Z-5f0e
    """
    with __salt__["ksnap.locked"](test=test):
        wanted = _one_aside(identifier)
        names = sorted(wanted["datasets"].values())
        shown = _zfs(
            "list", "-H", "-p", "-r", "-t", "all", "-o", "name,type,userrefs,clones,zfs_dr:needed,mounted", *names
        ).splitlines()
        rows = {line.split("\t")[0]: line.split("\t")[1:] for line in shown}
        wrong = []
        for name, (kind, holds, clones, needed, mounted) in rows.items():
            if kind == "snapshot" and holds != "0":
                wrong.append(f"{name} is held (zfs holds {name})")
            if kind == "snapshot" and needed != "-":
                wrong.append(f"{name} is needed by replication")
            outside = [clone for clone in clones.split(",") if clone not in ("", "-") and clone not in rows]
            if outside:
                wrong.append(f"{', '.join(outside)} was made from {name}: promote or discard that first")
            if mounted == "yes":
                wrong.append(f"{name} is mounted: unmount it first (zfs unmount {name})")
            if kind in ("filesystem", "volume") and name not in names:
                wrong.append(f"{name} was made below it since: move it away first (zfs rename)")
        if wrong:
            raise CommandExecutionError(f"The state {identifier} was not destroyed: " + "; ".join(wrong))
        if not test:
            for name in reversed(names):
                # Children were destroyed before it; -r takes its own snapshots.
                _zfs("destroy", "-r", name)
        return {"id": identifier, "datasets": names, "freed": wanted["used"]}


# What there is


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _identifier(but=None):
    # The name that it makes is taken by another state aside once in 65,536 times, within the same second: then the
    # renaming fails, and all is as it was. What is being restored is renamed itself, and must have another one.
    made = but
    while made == but:
        made = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    return made


def _one_aside(identifier):
    found = [each for each in aside() if each["id"] == identifier]
    if not found:
        raise SaltInvocationError(f"There is no state {identifier} aside; see ksnap.aside.")
    return found[0]


def _services(stack):
    try:
        return __salt__["ksnap.stack"](stack)["services"] if stack else []
    except (SaltInvocationError, CommandExecutionError):
        return []


def _snapshots(stack, name, partial):
    wanted = {f"{dataset}@{name}" for dataset in stack["datasets"]}
    missing = set()
    while wanted:
        try:
            shown = _zfs("list", "-H", "-p", "-t", "snapshot", "-o", "name,guid,createtxg,ksnap:count", *sorted(wanted))
            break
        except CommandExecutionError as error:
            gone = wanted.intersection(re.findall(r"cannot open '([^']+)': dataset does not exist", str(error)))
            if not gone:
                raise
            wanted -= gone
            missing |= gone
    if not wanted:
        raise SaltInvocationError(f"The stack has no snapshot {name}; see ksnap.list.")
    if missing and not partial:
        raise CommandExecutionError(
            f"There is no {', no '.join(sorted(missing))}. Take these datasets out of the stack, or leave them as they "
            "are with partial=True."
        )
    found, count = {}, "-"
    for line in shown.splitlines():
        snapshot, guid, txg, count = line.split("\t")
        found[snapshot.split("@")[0]] = (guid, int(txg))
    if count not in ("-", str(len(found))) and not partial:
        # A path is looked up by what is mounted there: what is not mounted is not in the stack.
        outside = f"; {', '.join(stack['outside'])} of it is not on ZFS now" if stack["outside"] else ""
        raise CommandExecutionError(
            f"The snapshot {name} was taken of {count} datasets, and the stack has {len(found)} of them now{outside}. "
            "See that all is mounted, or leave what is missing as it is with partial=True."
        )
    for pool in {dataset.split("/")[0] for dataset in found}:
        groups = {txg for dataset, (_, txg) in found.items() if dataset.split("/")[0] == pool}
        if len(groups) > 1:
            raise CommandExecutionError(
                f"The snapshots {name} of {pool} were not taken together (createtxg {sorted(groups)}): they do not "
                "belong together. Roll back one dataset at a time if that is what you want."
            )
    return found


def _family(tops):
    """The datasets and all that lies below them: each with its properties, a dict of value and source."""
    if not tops:
        return {}
    shown = _zfs("get", "-H", "-p", "-r", "-t", "filesystem,volume", "-o", "name,property,value,source", "all", *tops)
    found = {}
    for line in shown.splitlines():
        name, key, value, source = line.split("\t")
        found.setdefault(name, {})[key] = {"value": value, "source": source}
    return dict(sorted(found.items()))


def _permissions(datasets):
    """The words of ``zfs allow`` that give each dataset's permissions to another one."""
    found = {}
    options = {
        "Local permissions:": ["-l"],
        "Descendent permissions:": ["-d"],
        "Local+Descendent permissions:": [],
        "Create time permissions:": ["-c"],
        "Permission sets:": ["-s"],
    }
    for dataset in datasets:
        # It tells of all those above as well.
        if any(each.startswith(f"{dataset}/") for each in datasets):
            continue
        here = section = None
        told = {}
        for line in _zfs("allow", dataset).splitlines():
            if line.startswith("----"):
                here = told.setdefault(line.split(" ")[3], [])
            elif not line.startswith("\t"):
                section = line.strip()
            else:
                # Somebody who is no more has a number only.
                words = re.sub(r"\(unknown: (\d+)\)", r"\1", line).split()
                if section in ("Create time permissions:", "Permission sets:"):
                    here.append([*options[section], *words])
                elif words[0] == "everyone":
                    here.append([*options[section], "-e", words[1]])
                else:
                    here.append([*options[section], {"user": "-u", "group": "-g"}[words[0]], words[1], words[2]])
        found.update(told)
    return found


def _origins():
    """Each dataset's origin, and each snapshot's guid and transaction group: what promotions will change."""
    shown = _zfs("list", "-H", "-p", "-t", "filesystem,volume", "-o", "name,origin")
    return dict(line.split("\t") for line in shown.splitlines())


def _rename_in(origins, old, new):
    def renamed(name):
        return new + name[len(old) :] if name == old or name.startswith((f"{old}/", f"{old}@")) else name

    moved = {renamed(name): renamed(origin) for name, origin in origins.items()}
    origins.clear()
    origins.update(moved)


# What to refuse


def _refuse(chosen, family):
    wrong = []
    for dataset in chosen:
        if "/" not in dataset:
            wrong.append(
                f"{dataset} is the root dataset of its pool, which cannot be renamed, so its state cannot be set "
                "aside; "
                "keep data in a dataset below it, or take files from its .zfs/snapshot"
            )
        if RECORD in family[dataset] or "ksnap:clone" in family[dataset]:
            wrong.append(f"{dataset} is itself aside, or a clone; name the original")
    root = next((mount["source"] for mount in reversed(__salt__["ksnap.mounts"]()) if mount["path"] == "/"), None)
    if root in family:
        wrong.append(
            f"{root} is the running root file system; make a boot environment of the snapshot (ksnap.be_create), "
            "activate it (ksnap.be_activate) and boot it"
        )
    if wrong:
        raise CommandExecutionError("Nothing was touched: " + "; ".join(wrong))
    _refuse_keys(family)
    for name in _encryption_roots(chosen, family):
        try:
            _zfs("load-key", "-n", name)
        except CommandExecutionError as error:
            raise CommandExecutionError(
                f"Nothing was touched: {name} is an encryption root, whose key must be loaded anew afterwards, and "
                f"that cannot be done from its keylocation: {error}\nPut the key where root alone can read it, and "
                f"tell OpenZFS: zfs set keylocation=file:///run/key {name}"
            ) from error
    _refuse_mounts(family)


def _refuse_keys(family):
    locked = [name for name, has in family.items() if has.get("keystatus", {}).get("value") == "unavailable"]
    if locked:
        raise CommandExecutionError(
            f"Nothing was touched: the encryption keys of {', '.join(locked)} are not loaded (zfs load-key)."
        )


def _refuse_length(family, identifier):
    long = [name for name in family if len(name) + len(f".aside-{identifier}") > LONGEST]
    if long:
        raise CommandExecutionError(
            f"Nothing was touched: {', '.join(long)}: a name of more than {LONGEST - len(identifier) - 7} bytes leaves "
            "no room for .aside-<id>. Rename it."
        )


def _refuse_mounts(family):
    wrong = []
    for mount in _mounts_below(family):
        if mount["type"] != "zfs":
            wrong.append(
                f"{mount['source']} ({mount['type']}) is mounted at {mount['path']}, on a dataset of the stack"
            )
        elif mount["root"] != "/":
            wrong.append(f"a part of {mount['source']} is mounted once more at {mount['path']}")
    if wrong:
        raise CommandExecutionError(f"Nothing was touched: {'; '.join(wrong)}. Unmount it first.")
    needed = _needed_at_the_start(family)
    if needed:
        raise CommandExecutionError(
            f"Nothing was touched: the line of {', '.join(needed)} in {FSTAB} lacks nofail, so that a machine which "
            "loses its power in the middle of this would not start. Add it."
        )


def _needed_at_the_start(family):
    found = []
    with contextlib.suppress(FileNotFoundError), open(FSTAB, encoding="utf-8", errors="replace") as file:
        for words in map(str.split, file):
            if len(words) > 3 and words[2] == "zfs" and words[0] in family:
                found += [words[0]] if not {"nofail", "noauto"} & {*words[3].split(",")} else []
    return found


def _mounts_below(family):
    """What must be unmounted: the datasets themselves wherever they are mounted, and everything mounted on them."""
    mounts = __salt__["ksnap.mounts"]()
    places = [mount["path"] for mount in mounts if mount["type"] == "zfs" and mount["source"] in family]
    # Snapshots that somebody looked at, below .zfs, go with the file system.
    return [
        mount
        for mount in mounts
        if "@" not in mount["source"]
        and (mount["source"] in family or any(mount["path"].startswith(place.rstrip("/") + "/") for place in places))
    ]


# The plan


def _plan(kind, identifier, stack, snapshot, services, chosen, family):
    mounts = _mounts_below(family)
    named = family.keys() | {mount["source"] for mount in mounts}
    legacy = {name for name in named if _is_legacy(name, family)}
    held = {
        "mounts": [
            {"dataset": mount["source"], "path": mount["path"], "legacy": mount["source"] in legacy} for mount in mounts
        ],
        "canmount": {name: "on" for name, has in family.items() if has.get("canmount", {}).get("value") == "on"},
    }
    plan = {
        "id": identifier,
        "kind": kind,
        "stack": stack,
        "snapshot": snapshot,
        "when": int(datetime.datetime.now(datetime.UTC).timestamp()),
        "who": os.environ.get("SUDO_USER") or getpass.getuser(),
        "count": len(chosen),
        "pools": sorted({dataset.split("/")[0] for dataset in chosen}),
        "services": __salt__["ksnap.running"](services),
        "keys": _encryption_roots(chosen, family),
        "volumes": [name for name, has in family.items() if has["type"]["value"] == "volume"],
        "back": held,
    }
    # Not mounted at the start of a machine that loses power now: half a stack must not be used.
    names = sorted(held["canmount"])
    noauto = [["set", names, {"canmount": "noauto"}, {"canmount": "on"}]] if names else []
    plan["stages"] = [[["halt"], *noauto]]
    return plan


def _mountable(canmount):
    # All of them were "on": others were never touched.
    return [["set", sorted(canmount), {"canmount": "on"}, {"canmount": "noauto"}]] if canmount else []


def _encryption_roots(chosen, family):
    return [name for name in chosen if family[name].get("encryptionroot", {}).get("value") == name]


def _is_legacy(name, family):
    has = family.get(name, {}).get("mountpoint")
    value = has["value"] if has else _zfs("get", "-H", "-o", "value", "mountpoint", name).strip()
    return value == "legacy"


def _groups(chosen):
    """Datasets of the stack that hang together, each group with its top first."""
    groups = {}
    for dataset in sorted(chosen):
        top = dataset
        while top.rpartition("/")[0] in chosen:
            top = top.rpartition("/")[0]
        groups.setdefault(top, []).append(dataset)
    return [groups[top] for top in sorted(groups)]


def _waves(chosen):
    """The groups, those first that have no other one below them, then those that have only such, and so on."""
    heights = {}
    groups = _groups(chosen)
    for group in reversed(groups):
        below = [height for top, height in heights.items() if top.startswith(f"{group[0]}/")]
        heights[group[0]] = max(below, default=-1) + 1
    waves = [[group for group in groups if heights[group[0]] == height] for height in range(len(groups))]
    return [wave for wave in waves if wave]


def _away(top, identifier):
    return f"{top}.aside-{identifier}"


def _aside_name(dataset, chosen, identifier):
    top = next(group[0] for group in _groups(chosen) if dataset in group)
    return _away(top, identifier) + dataset[len(top) :]


def _keep(family, group, chosen, top, away):
    """The steps that take back what was renamed along with the group's top and does not belong to the stack."""
    return [
        _renamed(away + name[len(top) :], name, family[name])
        for name in family
        if name not in chosen and name.rpartition("/")[0] in group
    ]


def _renamed(old, new, has):
    return ["rename", old, new, has["guid"]["value"], has["type"]["value"]]


def _promotions(origins, top, dataset, source, away):
    """The steps that give back a state aside the snapshots which went to the present one, or to one set aside since."""
    below = dataset[len(top) :]
    name, away = source + below, away + below
    # Of what was set aside, the top of the group has the other name, not what is below it.
    own = re.compile(re.escape(top) + r"(\.aside-\d{8}T\d{6}Z-[0-9a-f]{4})?" + re.escape(below) + "(?=@)")
    steps = []
    while True:
        origin = origins.get(name, "-")
        owner, _, snapshot = origin.partition("@")
        if origin == "-" or not (owner == away or own.match(origin)):
            return steps
        # Asked for its guid before anything is renamed.
        steps.append(["promote", name, owner, snapshot, f"{dataset if owner == away else owner}@{snapshot}"])
        origins[name], origins[owner] = origins.get(owner, "-"), f"{name}@{snapshot}"


def _name_by_guid(steps):
    if steps:
        shown = _zfs("list", "-H", "-p", "-t", "snapshot", "-o", "name,guid", *sorted({step[4] for step in steps}))
        guids = dict(line.split("\t") for line in shown.splitlines())
        for step in steps:
            step[4] = guids[step[4]]


def _dress_aside(plan, dataset, name, has):
    record = {
        "id": plan["id"],
        "of": dataset,
        "stack": plan["stack"],
        "snapshot": plan["snapshot"],
        "when": plan["when"],
        "who": plan["who"],
        "count": plan["count"],
        "canmount": plan["back"]["canmount"].get(dataset, ""),
        "mounts": [mount for mount in plan["back"]["mounts"] if mount["dataset"] == dataset],
        "reserved": {key: _size(has, key) for key in RESERVATIONS if key in has},
    }
    reserved = {key: value for key, value in record["reserved"].items() if value != "0"}
    return [
        ["set", [name], {RECORD: json.dumps(record), **dict.fromkeys(reserved, "none")}, {RECORD: None, **reserved}]
    ]


def _size(has, key):
    value = has.get(key, {}).get("value", "0")
    return value if value.isdigit() else "0"


def _options(has):
    """What a clone must be told, so that it is as the dataset is."""
    found = [
        f"{key}={entry['value']}"
        for key, entry in has.items()
        if entry["source"] in ("local", "received") and key not in NOT_COPIED and not key.startswith("ksnap:")
    ]
    canmount = has.get("canmount")
    if canmount:
        found.append(f"canmount={'noauto' if canmount['value'] == 'on' else canmount['value']}")
    return found
