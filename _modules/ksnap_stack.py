"""
A stack: datasets that belong together
======================================

Named in the minion's configuration or its pillar, or given where it is needed:

.. code-block:: yaml

    ksnap:
      stacks:
        mail:
          paths: [/srv/mail, /var/lib/postgresql]   # or datasets: [tank/mail, tank/postgresql]
          children: true                            # and all that lies below them. Default: false
          services: [postfix, postgresql]           # stopped in this order for a rollback, started in the reverse
          before: [/usr/local/sbin/quiesce]         # a command around each snapshot, a list of words
          after: [/usr/local/sbin/resume]
          timeout: 60                               # seconds that each of the two may take
"""

import os
import re

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

MOUNTS = "/proc/self/mountinfo"
KEYS = {
    "datasets": list,
    "paths": list,
    "children": bool,
    "services": list,
    "before": list,
    "after": list,
    "timeout": (int, float),
}
# Nothing in them lasts, so nothing of them is missing in a snapshot.
PASSING = set(
    "autofs binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs fusectl hugetlbfs mqueue nsfs "
    "proc pstore ramfs rpc_pipefs securityfs selinuxfs sysfs tmpfs tracefs".split()
)


def __virtual__():
    return __virtualname__


def stack(stack):
    """
    Find the datasets of a stack.

    stack
        (string or dict) The name of a stack of the configuration (``ksnap:stacks``), or a stack itself: a dict of
        ``datasets`` and ``paths`` (lists; at least one of them), ``children`` (bool: everything below them too,
        and what is mounted below the paths; default False), ``services``, ``before``, ``after``, ``timeout``. What
        this function has returned is a stack, too, and is not looked up again.

    Returns a dict: ``name`` (``None`` for one without), ``datasets`` (sorted, so parents come first), ``guids`` (a dict
    of each dataset to its guid), ``pools`` (a dict of each pool to its datasets), ``paths`` (a dict of each path to its
    dataset), ``outside`` (a sorted list of what of the paths is not on ZFS), ``services``, ``before``, ``after``
    (lists) and ``timeout`` (seconds).

    Raises ``SaltInvocationError`` for a name that is not declared and for every mistake in a stack,
    ``CommandExecutionError`` when a dataset or path does not exist.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.stack mail
        salt '*' ksnap.stack '{paths: [/srv/mail], children: true}'
    """
    if isinstance(stack, dict) and "pools" in stack:
        return stack
    name, declared = _declared(stack)
    children = declared.get("children", False)
    datasets, outside, paths = list(declared.get("datasets", [])), set(), {}
    mounts = __salt__["ksnap.mounts"]() if declared.get("paths") else []
    for path in declared.get("paths", []):
        real = os.path.realpath(path)
        if not os.path.exists(real):
            raise CommandExecutionError(f"There is no {path}, which the stack {name or ''} names. Is it mounted?")
        # The one mounted last hides those below it.
        holder = max(
            (each for each in reversed(mounts) if _within(real, each["path"])),
            key=lambda each: len(each["path"]),
            default=None,
        )
        if holder is None or holder["type"] != "zfs" or "@" in holder["source"]:
            outside.add(path)
        else:
            paths[path] = holder["source"]
            datasets.append(holder["source"])
        for mount in mounts:
            if mount["path"] != real and _within(mount["path"], real):
                if mount["type"] == "zfs" and "@" not in mount["source"]:
                    if children:
                        datasets.append(mount["source"])
                elif mount["type"] not in PASSING and "@" not in mount["source"]:
                    outside.add(mount["path"])
    found = _existing(sorted(set(datasets)), children)
    pools = {}
    for dataset in found:
        pools.setdefault(dataset.split("/")[0], []).append(dataset)
    return {
        "name": name,
        "datasets": list(found),
        "guids": found,
        "pools": pools,
        "paths": paths,
        "outside": sorted(outside),
        "services": declared.get("services", []),
        "before": declared.get("before", []),
        "after": declared.get("after", []),
        "timeout": declared.get("timeout", 60),
    }


def _declared(stack):
    name = None
    if isinstance(stack, str):
        name, stacks = stack, __salt__["config.get"]("ksnap:stacks", {}) or {}
        if name not in stacks:
            known = ", ".join(sorted(stacks)) or "none"
            raise SaltInvocationError(f"There is no stack {name} in ksnap:stacks; declared are: {known}")
        stack = stacks[name]
    if not isinstance(stack, dict):
        raise SaltInvocationError(f"A stack is a name or a dict of datasets and paths, not {stack!r}")
    stack = dict(stack)
    name = stack.pop("name", name)
    wrong = [f"{key} is no key of a stack (there are: {', '.join(KEYS)})" for key in stack if key not in KEYS]
    for key, kind in KEYS.items():
        value = stack.get(key)
        if key in stack and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
            wanted = {list: "a list", bool: "true or false"}.get(kind, "a number of seconds")
            wrong.append(f"{key} must be {wanted}, not {value!r}")
        elif isinstance(value, list):
            wrong.extend(f"{key} must be a list of text; {each!r} is none" for each in value if not _text(each))
    for path in stack.get("paths", []) if isinstance(stack.get("paths"), list) else []:
        if _text(path) and not path.startswith("/"):
            wrong.append(f"paths must be absolute; {path} is not")
    if not stack.get("datasets") and not stack.get("paths"):
        wrong.append("it needs datasets or paths")
    if name is not None and not (_text(name) and re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", name)):
        wrong.append(f"its name must be of letters, digits, and _.:-, 64 at most, not {name!r}")
    if wrong:
        raise SaltInvocationError(f"The stack {name or ''} is wrong: ".replace("  ", " ") + "; ".join(wrong))
    return name, stack


def _text(value):
    return isinstance(value, str) and bool(value)


def _within(path, folder):
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _existing(datasets, children):
    if not datasets:
        return {}
    wrong = [dataset for dataset in datasets if "@" in dataset or "#" in dataset or dataset.startswith(("-", "/"))]
    if wrong:
        raise SaltInvocationError(f"{', '.join(wrong)}: a stack is of datasets, file systems and volumes")
    # Without -r only what was named is listed; what does not exist fails the whole with its name.
    found = {name: (int(guid), origin) for name, guid, origin in _listed("guid,origin", datasets, children)}
    # What a rollback set aside, and clones, lie beside the original: they are no part of what is above both. They share
    # its blocks, so without an origin there is none; with their marks OpenZFS takes twice as long to list.
    if children and any(origin != "-" for _, origin in found.values()):
        for name, *made in _listed("ksnap:aside,ksnap:clone", datasets, children):
            if name not in datasets and made != ["-", "-"]:
                found.pop(name, None)
    return {name: guid for name, (guid, _) in sorted(found.items())}


def _listed(columns, datasets, children):
    listing = ["zfs", "list", "-H", "-o", f"name,{columns}", "-t", "filesystem,volume"]
    shown = __salt__["ksnap.command"]([*listing, *(["-r"] if children else []), *datasets])
    return [line.split("\t") for line in shown.splitlines()]


def mounts():
    """
    List what is mounted in this machine, in the order in which it was mounted (proc(5), mountinfo).

    Returns a list of dicts: ``path``, ``source`` (for ZFS the dataset), ``type``, and ``root`` (what of the file
    system is mounted there: ``/``, or a directory for a bind mount).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.mounts
    """
    found = []
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, (kind, source) = before.split(" "), after.split(" ")[:2]
            found.append({"path": _plain(fields[4]), "source": _plain(source), "type": kind, "root": _plain(fields[3])})
    return found


def _plain(text):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
