"""
The two sides of a replication, here and over ssh
=================================================

A target is named in the minion's configuration or its pillar, or given where it is needed:

.. code-block:: yaml

    zfs_dr:
      targets:
        vault:
          dataset: backup/web1             # the replicas are children of this
          ssh: zfs_dr@vault.example.org    # without it, the target is on this machine
          direction: push                  # with pull, ssh names the source, and dataset is here
          port: 22
          key: /root/.ssh/zfs_dr           # the private key. Default: ssh's own choice
          known_hosts: /root/.ssh/known_hosts
          compression: none                # on the wire: none, zstd, lz4 or gzip
          bandwidth: 0                     # bytes a second, of all streams together; 0: no limit
          parallel: 4                      # datasets at once, 1 to 8
          raw: true                        # encrypted datasets leave as they are, and need no key at the target

What runs on the other machine is checked there, word by word, by :mod:`zfs_dr_gate`.
"""

import concurrent.futures
import os
import re
import secrets
import shutil
import subprocess
import urllib.parse

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

RUN = "/run/zfs_dr"
PLACES = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"  # a service's PATH may lack them
DEFAULTS = {
    "dataset": None,
    "ssh": None,
    "direction": "push",
    "port": 22,
    "key": None,
    "known_hosts": None,
    "compression": "none",
    "bandwidth": 0,
    "parallel": 4,
    "raw": True,
    "grid": None,
}
KINDS = {"dataset": str, "ssh": str, "port": int, "key": str, "known_hosts": str, "bandwidth": int, "parallel": int}
DATASET = r"[A-Za-z][A-Za-z0-9_.:-]*(/[A-Za-z0-9_.:-]+)*"
# What ssh and the other side say, and what there is to do.
ADVICE = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "Its host key is another one. If that is right, put the new one in place.",
    ),
    ("Host key verification failed", "Its host key is not known here, or another one: see known_hosts of the target."),
    (
        "Permission denied (",
        "It does not accept the key: apply zfs_dr.target there with the public key of this machine.",
    ),
    ("Connection refused", "Is sshd running there?"),
    ("timed out", "Is the machine up, and the network between?"),
    ("Could not resolve", "Its name is unknown here."),
    ("not permitted by the gate", "The forced command there allows less than this needs: apply zfs_dr.target there."),
    ("permission denied", "The user there lacks a permission: zfs_dr.grant on that machine gives exactly the needed."),
    ("out of space", "The target is full: zfs_dr.prune, or a larger pool. What has arrived is kept and gone on with."),
    ("quota exceeded", "The target's quota is used up: zfs_dr.prune, or a larger one. What has arrived is kept."),
    ("does not exist", "Is the pool imported there? See zpool list and zpool import."),
    ("no such pool", "Is the pool imported there? See zpool list and zpool import."),
    ("dataset is busy", "Another transfer into it is at work there, or it is mounted and in use."),
    ("has been modified", "Somebody wrote to the replica: replicate again, which sets that aside."),
    ("suspended", "See zpool status -v there, and zpool clear when the disk is back."),
)


def __virtual__():
    return __virtualname__


def target(target):
    """
    Look up a target and fill in the defaults.

    target
        (string or dict) The name of a target of the configuration (``zfs_dr:targets``), or a target itself, a dict
        with the keys above and ``name``. ``grid`` (string) is what :func:`zfs_dr_target.prune` keeps.

    Returns the dict, complete. ``id`` is the name, or without one the place; ``mark`` is what its holds and bookmarks
    at the source are called by: the same, and with ``pull`` also who pulls, since two machines may call theirs alike.

    Raises ``SaltInvocationError`` for a name that is not declared, and with every mistake in a target.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.target vault
    """
    if isinstance(target, dict) and "id" in target:
        return target
    name, declared = None, target
    if isinstance(target, str):
        name, known = target, __salt__["config.get"]("zfs_dr:targets", {}) or {}
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise SaltInvocationError(f"There is no target {name} in zfs_dr:targets; declared are: {there}")
        declared = known[name]
    if not isinstance(declared, dict):
        raise SaltInvocationError(f"A target is a name or a dict with at least a dataset, not {declared!r}")
    declared = dict(declared)
    name = declared.pop("name", name)
    wrong = [
        f"{key} is no key of a target (there are: {', '.join(DEFAULTS)})" for key in declared if key not in DEFAULTS
    ]
    made = {**DEFAULTS, **declared}
    for key, kind in KINDS.items():
        if made[key] is not None and (not isinstance(made[key], kind) or isinstance(made[key], bool)):
            wrong.append(f"{key} must be {'text' if kind is str else 'a whole number'}, not {made[key]!r}")
    if not re.fullmatch(DATASET, str(made["dataset"])):
        wrong.append(f"dataset must be the name of a ZFS dataset, not {made['dataset']!r}")
    if made["direction"] not in ("push", "pull"):
        wrong.append(f"direction is push or pull, not {made['direction']!r}")
    if made["direction"] == "pull" and not made["ssh"]:
        wrong.append("pull needs ssh, which names the source")
    if made["ssh"] is not None and not re.fullmatch(
        r"[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9:][A-Za-z0-9.:-]*", str(made["ssh"])
    ):
        wrong.append(f"ssh must be like user@host, not {made['ssh']!r}")
    if made["compression"] not in ("none", "zstd", "lz4", "gzip"):
        wrong.append(f"compression is none, zstd, lz4 or gzip, not {made['compression']!r}")
    if isinstance(made["parallel"], int) and not 1 <= made["parallel"] <= 8:
        wrong.append(f"parallel is 1 to 8 (sshd allows ten sessions a connection), not {made['parallel']}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", str(name)):
        wrong.append(f"its name must be of letters, digits, and _.:-, 64 at most, not {name!r}")
    if wrong:
        raise SaltInvocationError(f"The target {name or ''} is wrong: ".replace("  ", " ") + "; ".join(wrong))
    place = made["dataset"] if made["direction"] == "pull" or not made["ssh"] else f"{made['ssh']}:{made['dataset']}"
    made["id"] = name or re.sub(r"[^A-Za-z0-9_.:-]", ":", place)
    made["name"] = name
    puller = re.sub(r"[^A-Za-z0-9_.:-]", ":", str(__grains__["id"]))[:100]
    made["mark"] = f"{made['id']}:{puller}" if made["direction"] == "pull" else made["id"]
    return made


def connect(target):
    """
    Open the one connection over which everything of a replication goes. To be ended with :func:`disconnect`.

    target
        (dict) As :func:`target` returns it.

    Returns a dict of ``source`` and ``target``, the sides as :func:`run` and :func:`words` take them: ``None`` for this
    machine, or a dict of ``ssh`` (the words that precede the other machine's commands) and ``name``.

    Raises ``CommandExecutionError`` when the other machine cannot be reached or does not let us in, with what ssh said.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.connect '{dataset: backup/web1}'
    """
    target = __salt__["zfs_dr.target"](target)
    if not target["ssh"]:
        return {"source": None, "target": None}
    os.makedirs(RUN, mode=0o700, exist_ok=True)
    control = os.path.join(RUN, f"ssh-{secrets.token_hex(4)}")
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": "30",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
        "StrictHostKeyChecking": "yes",
        "ControlPath": control,
        "Compression": "no",
    }
    if target["known_hosts"]:
        options["UserKnownHostsFile"] = target["known_hosts"]
    if target["key"]:
        options.update(IdentityFile=target["key"], IdentitiesOnly="yes")
    ssh = [_program("ssh"), "-T", "-p", str(target["port"])]
    ssh += [f"-o{name}={value}" for name, value in options.items()]
    # It stays in the foreground, so that it ends with this process and never holds a pipe open behind its back.
    errors = os.memfd_create("ssh")
    process = subprocess.Popen(
        # Whatever becomes of this process, the connection goes with it.
        [_program("setpriv"), "--pdeathsig", "TERM", *ssh, "-oControlMaster=yes", "-N", target["ssh"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )
    check = [*ssh, "-O", "check", target["ssh"]]
    while process.poll() is None:
        if os.path.exists(control) and not subprocess.run(check, capture_output=True, check=False).returncode:
            break
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is not None:
        os.lseek(errors, 0, os.SEEK_SET)
        said = os.read(errors, 65536).decode(errors="replace").strip()
        os.close(errors)
        raise CommandExecutionError(_failure(f"ssh to {target['ssh']}", process.returncode, said))
    os.close(errors)
    other = {
        "ssh": [*ssh, target["ssh"]],
        "name": target["ssh"].rpartition("@")[2],
        "pid": process.pid,
        "path": control,
    }
    CONNECTIONS[control] = process
    return {"source": other, "target": None} if target["direction"] == "pull" else {"source": None, "target": other}


CONNECTIONS = {}


def disconnect(sides):
    """
    End the connection of :func:`connect`.

    sides
        (dict) What it returned.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.disconnect '{source: null, target: null}'
    """
    for side in sides.values():
        process = CONNECTIONS.pop(side["path"], None) if side else None
        if process:
            process.terminate()
            process.wait()


def words(side, argv, through=None, stack=None):
    """
    Tell which process does something on a side.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    argv
        (list) A command, or a list of commands that the other machine does one after the other, up to the first that
        fails. Several are only for another machine.
    through
        (string) A compression that the other machine adds to what it sends, or takes from what it receives: ``zstd``,
        ``lz4``, ``gzip``. Default: none.
    stack
        (string) For whom it is: when that one's lock is taken anew, it is ended there. Default: none.

    Returns the words of the process, a list.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.words null '[zfs, list]'
    """
    several = argv if isinstance(argv[0], list) else [argv]
    if side is None:
        if len(several) > 1:
            raise SaltInvocationError("several commands in one process are for another machine only")
        return [_program(several[0][0]), *(str(word) for word in several[0][1:])]
    lines = [" ".join(urllib.parse.quote(str(word), safe="@#:/_.,=+-") for word in each) for each in several]
    if through and through != "none":
        lines[0] = f"through={through} {lines[0]}"
    if stack:
        lines[0] = f"for={stack} {lines[0]}"
    return [*side["ssh"], "\n".join(lines)]


def run(side, argv, code=False):
    """
    Run a command of ZFS on a side.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    argv
        (list) The command, such as ``[zfs, list, -H]``; on another machine also a list of commands.
    code
        (bool) Return what it said also when it fails. Default: False.

    Returns what it printed; with ``code`` a list of exit code, output and errors. Raises ``CommandExecutionError``
    when it fails.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.run null '[zfs, list]'
    """
    if side is None and not code:
        return __salt__["ksnap.command"](argv)
    done = _process(words(side, argv))
    if code:
        return [done.returncode, done.stdout, done.stderr]
    return _output(side, argv, done)


def run_but(side, argv, harmless):
    """
    Run a command of ZFS on a side, of whose complaints some are none.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    argv
        (list) The command.
    harmless
        (string) A pattern: a line of errors with it is no failure.

    Raises ``CommandExecutionError`` when it fails with any other.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.run_but null '[zfs, hold, mine, tank/web@a]' 'tag already exists'
    """
    code, _, errors = run(side, argv, code=True)
    wrong = [line for line in errors.splitlines() if not re.search(harmless, line)]
    if code and wrong:
        raise CommandExecutionError(_failure(" ".join(argv)[:300], code, "\n".join(wrong)))


def run_all(side, commands, parallel=4):
    """
    Run many commands of ZFS on a side: here several at once, on another machine in one session, one after the other.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    commands
        (list of lists) The commands.
    parallel
        (int) How many at once. Default: 4.

    Raises ``CommandExecutionError`` when one fails; the others that had begun are done all the same.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.run_all null '[[zfs, list], [zfs, list, -t, snapshot]]'
    """
    if not commands:
        return
    if side is not None:
        # A word of a process is 128 KiB at most.
        for part in _parts(commands, 60000):
            _output(side, part, _process(words(side, part)))
        return
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        done = list(pool.map(lambda argv: (argv, _process(words(None, argv))), commands))
    for argv, process in done:
        _output(side, argv, process)


def _parts(commands, size):
    part, used = [], 0
    for argv in commands:
        length = sum(len(str(word)) + 1 for word in argv)
        if part and used + length > size:
            yield part
            part, used = [], 0
        part.append(argv)
        used += length
    yield part


def _process(argv):
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        check=False,
    )


def _output(side, argv, done):
    if done.returncode:
        first = argv if isinstance(argv[0], str) else argv[0]
        text = " ".join(str(word) for word in first)
        where = f" on {side['name']}" if side else ""
        raise CommandExecutionError(_failure(f"{text[:300]}{where}", done.returncode, done.stderr.strip()))
    return done.stdout


def _failure(what, code, said):
    return f"{what} failed: {said or f'exit code {code}'}{__salt__['zfs_dr.advice'](said)}"


def advice(said):
    """
    Tell what to do about what ssh or ZFS said.

    said
        (string) The errors of the command.

    Returns a line to be added to the message, or an empty string.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.advice 'cannot receive: out of space'
    """
    return next((f"\n{what}" for part, what in ADVICE if part in said), "")


def _program(name):
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{PLACES}")
    if not found:
        package = {"zfs": "zfsutils-linux", "zpool": "zfsutils-linux", "ssh": "openssh-client"}.get(name, name)
        raise CommandExecutionError(f"There is no {name} on this machine. Install {package}.")
    return found


def _number(text):
    return int(text) if text.isdigit() else 0


SOURCE = "name,type,guid,createtxg,creation,userrefs,written,referenced,mountpoint,canmount"


def source_listing(side, datasets):
    """
    List the source's datasets with their snapshots and bookmarks, in one call.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    datasets
        (list of strings) Their names.

    Returns a dict, dataset to ``guid``, ``type`` (``filesystem`` or ``volume``), ``written`` and ``referenced``
    (bytes), ``mountpoint``, ``canmount`` and two lists ordered by transaction group: ``snapshots``, dicts of ``name``,
    ``guid``, ``createtxg``, ``creation`` (seconds since the epoch), ``held`` (number of holds), ``written``,
    ``referenced`` (bytes); and ``bookmarks``, dicts of ``name``, ``guid``, ``createtxg``, ``creation``.

    Raises ``CommandExecutionError`` when one does not exist.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.source_listing null '[tank/web]'
    """
    argv = _source_argv(datasets)
    return _source_read(_output(side, argv, _process(words(side, argv))), datasets)


def _source_argv(datasets):
    return ["zfs", "list", "-Hp", "-d", "1", "-t", "filesystem,volume,snapshot,bookmark", "-o", SOURCE, *datasets]


def _source_read(text, datasets):
    found = {}
    wanted = set(datasets)
    for line in text.splitlines():
        name, kind, guid, txg, creation, refs, written, referenced, mountpoint, canmount = line.split("\t")
        dataset, mark = re.fullmatch(r"([^@#]*)([@#].*)?", name).groups()
        if dataset not in wanted:
            continue
        entry = found.setdefault(dataset, {"snapshots": [], "bookmarks": []})
        if mark is None:
            entry.update(
                guid=int(guid),
                type=kind,
                written=_number(written),
                referenced=_number(referenced),
                mountpoint=mountpoint,
                canmount=canmount,
            )
            continue
        made = {"name": mark[1:], "guid": int(guid), "createtxg": int(txg), "creation": int(creation)}
        if mark[0] == "#":
            entry["bookmarks"].append(made)
        else:
            made.update(held=_number(refs), written=_number(written), referenced=_number(referenced))
            entry["snapshots"].append(made)
    for entry in found.values():
        for kind in ("snapshots", "bookmarks"):
            entry[kind].sort(key=lambda each: each["createtxg"])
    return {name: found[name] for name in datasets}


TARGET = [
    "name", "type", "guid", "createtxg", "creation", "userrefs", "written", "referenced", "origin",
    "receive_resume_token", "readonly", "canmount", "zfs_dr:source", "zfs_dr:stack", "zfs_dr:dataset_guid",
    "zfs_dr:promoted", "zfs_dr:properties", "zfs_dr:members", "zfs_dr:digest", "zfs_dr:rehearsal",
]  # fmt: skip


REPLICA = ("type", "origin", "source", "stack", "properties", "readonly", "canmount", "rehearsal")


def target_listing(side, base, since=None):
    """
    List what a target has, in one call.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    base
        (string) The dataset that the replicas are children of.
    since
        (string) As :func:`listings` takes it. Default: none.

    Returns a dict: ``base`` (the properties of the base itself), ``sets`` (the snapshots of the base: the sets that are
    whole, oldest first, each with ``stack``, ``source``, ``members``, ``digest``) and ``replicas``, name (without the
    base) to ``snapshots``, ``written``, ``referenced`` (bytes), ``token`` (text or ``None``), ``origin``, ``source``,
    ``stack``, ``origin_guid``, ``promoted``, ``promoted_set``, ``properties`` (text), ``readonly``, ``canmount``,
    ``type``, ``rehearsal``.

    Raises ``CommandExecutionError`` when the base does not exist there.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.target_listing null backup/web1
    """
    argv = _target_argv(base, since)
    return _target_read(_output(side, argv, _process(words(side, argv))), base, since)


def listings(sides, datasets, base, since=None):
    """
    List both sides at the same time.

    sides
        (dict) As :func:`connect` returns it.
    datasets
        (list of strings) The source's datasets.
    base
        (string) The dataset at the target that the replicas are children of.
    since
        (string) The name of a set: then of the replicas there is, in place of their snapshots, ``since`` (bytes
        written since that set, or ``None`` where they lack it). Default: none.

    Returns a list of two: what :func:`source_listing` and :func:`target_listing` return, and raises as they do.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.listings '{source: null, target: null}' '[tank/web]' backup/web1
    """
    asked = [(sides["source"], _source_argv(datasets)), (sides["target"], _target_argv(base, since))]
    source, there = (_output(*each) for each in _at_once(asked))
    return [_source_read(source, datasets), _target_read(there, base, since)]


def _at_once(asked):
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        done = pool.map(_process, [words(side, argv) for side, argv in asked])
        return [(side, argv, process) for (side, argv), process in zip(asked, done, strict=True)]


# Whatever is written or destroyed below the base changes one of its sums; a promotion says so itself.
STATE = "name,guid,userrefs,used,logicalused,zfs_dr:promotion"


def _state_argv(base, snapshot):
    return ["zfs", "list", "-Hp", "-t", "filesystem,snapshot", "-o", STATE, base, f"{base}@{snapshot}"]


def _state_read(done):
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    if done.returncode or len(rows) != 2 or not _number(rows[1][2]):
        return None
    return [value for row in rows for value in row]


def state(side, base, snapshot):
    """
    Tell what a target is like as a whole, without a look at each replica.

    side
        (dict or None) One of what :func:`connect` returns; ``None`` is this machine.
    base
        (string) The dataset that the replicas are children of.
    snapshot
        (string) The name of a set.

    Returns a list of texts, another one once something below the base was written or promoted, or a replica destroyed;
    ``None`` where the set is not marked as whole there, or its mark is not held.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.state null backup/web1 ksnap-20261125T222408.123456Z-0a1b2c3d
    """
    return _state_read(_process(words(side, _state_argv(base, snapshot))))


def glance(sides, datasets, guids, base, snapshot):
    """
    Look at both sides at the same time, as briefly as can be.

    sides
        (dict) As :func:`connect` returns it.
    datasets
        (list of strings) The source's datasets.
    guids
        (dict) Each of them to its guid; empty where they are not known, and are to be asked for.
    base
        (string) The dataset at the target that the replicas are children of.
    snapshot
        (string) The name of a set.

    Returns a list of three: the newest set that the first dataset has, or ``None``; the guids; and what :func:`state`
    returns.

    Raises ``CommandExecutionError`` when one of the source's datasets does not exist.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.glance '{source: null, target: null}' '[tank/web]' '{}' backup/web1 ksnap-20261125T222408...
    """
    # Of all snapshots these columns come cheapest; a set that the first dataset lacks is no set of the stack.
    first = ["zfs", "list", "-Hp", "-d", "1", "-t", "snapshot", "-o", "name,createtxg", datasets[0]]
    asked = [(sides["target"], _state_argv(base, snapshot)), (sides["source"], first)]
    if not guids:
        asked.append((sides["source"], ["zfs", "list", "-Hp", "-o", "name,guid", *datasets]))
    (*_, there), *source = _at_once(asked)
    snapshots, *known = ([line.split("\t") for line in _output(*each).splitlines()] for each in source)
    listed = [{"name": name.partition("@")[2], "createtxg": int(group)} for name, group in snapshots]
    newest = __salt__["zfs_dr.newest_set"]({datasets[0]: {"snapshots": listed}})
    return [newest, guids or {name: int(guid) for name, guid in known[0]}, _state_read(there)]


def _target_columns(since):
    return [*TARGET, f"written@{since}"] if since else TARGET


def _target_argv(base, since=None):
    depth, columns = "1" if since else "2", ",".join(_target_columns(since))
    return ["zfs", "list", "-Hp", "-d", depth, "-t", "filesystem,volume,snapshot", "-o", columns, base]


def _target_read(text, base, since=None):
    listing, columns = {"base": {}, "sets": [], "replicas": {}}, _target_columns(since)
    for line in text.splitlines():
        values = [None if value == "-" else value for value in line.split("\t")]
        row = {key.rpartition(":")[2]: value for key, value in zip(columns, values, strict=True)}
        dataset, _, snapshot = row["name"].partition("@")
        made = {
            "name": snapshot,
            "guid": int(row["guid"]),
            "createtxg": int(row["createtxg"]),
            "creation": int(row["creation"]),
            "held": _number(row["userrefs"] or ""),
        }
        if dataset == base:
            if snapshot:
                made.update(
                    {key: row[key] for key in ("stack", "source", "digest")}, members=_number(row["members"] or "")
                )
                listing["sets"].append(made)
            else:
                listing["base"] = row
            continue
        short = dataset.removeprefix(f"{base}/")
        if "/" in short:
            continue
        entry = listing["replicas"].setdefault(short, {"snapshots": []})
        if snapshot:
            made.update(written=_number(row["written"] or ""), referenced=_number(row["referenced"] or ""))
            entry["snapshots"].append(made)
        else:
            entry.update(
                {key: row[key] for key in REPLICA},
                token=row["receive_resume_token"],
                origin_guid=_number(row["dataset_guid"] or "") or None,
                promoted=row["promoted"] is not None,
                promoted_set=row["promoted"],
                written=_number(row["written"] or ""),
                referenced=_number(row["referenced"] or ""),
            )
            if since:
                entry["since"] = row[columns[-1]] and _number(row[columns[-1]])
    for entry in [*listing["replicas"].values(), {"snapshots": listing["sets"]}]:
        entry["snapshots"].sort(key=lambda each: each["createtxg"])
    return listing


def token(side, text):
    """
    Read a resume token.

    side
        (dict or None) The source's side, as :func:`connect` returns it.
    text
        (string) The token.

    Returns a dict of ``to`` and ``from``, the guids of the snapshots; ``from`` is 0 for a full send.

    Raises ``CommandExecutionError`` when it is no token.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.token null 1-c740b4779-...
    """
    # It tells what is in the token also when it then fails, since the snapshot is gone.
    code, output, errors = run(side, ["zfs", "send", "-nvt", text], code=True)
    found = dict(re.findall(r"^\s*(toguid|fromguid) = (0x[0-9a-f]+)", output + errors, re.MULTILINE))
    if "toguid" not in found:
        raise CommandExecutionError(_failure("Reading a resume token", code, errors.strip()))
    return {"to": int(found["toguid"], 16), "from": int(found.get("fromguid", "0"), 16)}
