"""
Boot environments
=================

A boot environment is a root file system beside the others, ``rpool/ROOT/<name>``, with ``mountpoint=/`` and
``canmount=noauto``, made as a clone. Which one is booted next is the pool's property ``bootfs``: ZFSBootMenu reads it,
and so does Debian's zfs-initramfs for ``root=zfs:AUTO`` on the kernel's command line, whoever loads the kernel, GRUB or
QEMU. Datasets below an environment belong to it and are cloned along, also with ``canmount=noauto``: zfs-initramfs
mounts them with their root, which no other initrd does, and ``zfs mount -a`` never those of another environment.
"""

import contextlib
import glob
import os
import re
import tempfile

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

COMMAND_LINE = "/proc/cmdline"
ONCE = "ksnap:boot_once"
INITRD = "usr/share/initramfs-tools/scripts/zfs"  # zfs-initramfs
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,63}")
KERNELS = ("boot/vmlinuz-*", "boot/vmlinux-*", "boot/*/*/linux", "usr/lib/modules/*/vmlinuz")
PACKAGES = (
    "var/lib/dpkg/status",
    "var/lib/rpm",
    "usr/lib/sysimage/rpm",
    "lib/apk/db/installed",
    "var/lib/pacman/local",
)
NOT_COPIED = set(
    "canmount casesensitivity encryption keyformat keylocation mountpoint normalization pbkdf2iters pbkdf2salt "
    "refreservation reservation utf8only version volblocksize volsize".split()
)


def __virtual__():
    return __virtualname__


def be_list():
    """
    List the boot environments of this machine, by name.

    Returns a list of dicts: ``name``, ``dataset``, ``running`` (bool), ``next`` (bool: it is booted next), ``once``
    (bool: only the next time), ``created`` (seconds since 1970), ``used`` (bytes that it alone holds), ``origin`` (the
    snapshot that it is a clone of, or ``None``) and ``mounted`` (where, or ``None``).

    Raises ``CommandExecutionError`` when this machine's root is not on ZFS.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_list
    """
    container = _container()
    pool = container.split("/")[0]
    running, chosen = _running(), _bootfs(pool)
    altroot = _altroot(pool)
    once = _value(pool, ONCE)
    mounted = {mount["source"]: mount["path"] for mount in __salt__["ksnap.mounts"]() if mount["type"] == "zfs"}
    columns = "name,mountpoint,creation,usedbydataset,usedbysnapshots,origin,ksnap:aside,ksnap:clone"
    shown = _zfs("list", "-H", "-p", "-d", "1", "-t", "filesystem", "-o", columns, container)
    found = []
    for line in shown.splitlines():
        name, mountpoint, creation, used, snapshots, origin, *made = line.split("\t")
        if name == container or mountpoint not in ("/", altroot) or made != ["-", "-"]:
            continue
        found.append(
            {
                "name": name.rpartition("/")[2],
                "dataset": name,
                "running": name == running,
                "next": name == chosen,
                "once": name == chosen and once != "-",
                "created": int(creation),
                "used": int(used) + int(snapshots),
                "origin": None if origin == "-" else origin,
                "mounted": mounted.get(name),
            }
        )
    return found


def be_create(name, source=None, snapshot=None, test=False):
    """
    Make a boot environment as a clone of another one.

    name
        (string) Its name: letters, digits, and ``_.:-``.
    source
        (string) The environment to clone. Default: the running one
    snapshot
        (string) The snapshot of it to clone, the part after the @. Default: a new one
    test
        (bool) Only say what would be made. Default: False

    Returns a dict: ``name``, ``dataset``, ``snapshot``, ``datasets`` (a list of the clones) and ``kernels`` (a list).

    Raises ``SaltInvocationError`` for a name that is taken or wrong, ``CommandExecutionError`` when the environment
    would have no kernel, or its package database lies outside of it; nothing is then left.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_create before-upgrade
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.startswith("-"):
        raise SaltInvocationError(f"The name of a boot environment is of letters, digits, and _.:-, not {name!r}")
    with __salt__["ksnap.locked"](test=test):
        there = {each["name"]: each for each in be_list()}
        target = _free(name, there)
        origin = _one(source, there)
        family = _family(origin["dataset"])
        if test:
            datasets = [target + each[len(origin["dataset"]) :] for each in family]
            return {"name": name, "dataset": target, "snapshot": snapshot, "datasets": datasets, "kernels": []}
        made, taken = [], None
        try:
            if snapshot is None:
                stack = {"datasets": sorted(family)}
                taken = snapshot = __salt__["ksnap.snapshot"](stack, reason=f"boot environment {name}")["snapshot"]
            for dataset, has in family.items():
                clone = target + dataset[len(origin["dataset"]) :]
                options = _options(dataset == origin["dataset"], has)
                words = [word for option in options for word in ("-o", option)]
                _zfs("clone", *words, f"{dataset}@{snapshot}", clone)
                made.append(clone)
            _zfs("set", "mountpoint=/", target)
            kernels = be_check(name)["kernels"]
        except CommandExecutionError as error:
            for clone in reversed(made):
                _zfs("destroy", clone)
            if taken:
                for dataset in family:
                    _zfs("destroy", f"{dataset}@{taken}")
            raise CommandExecutionError(f"The boot environment {name} was not made: {error}") from error
        return {"name": name, "dataset": target, "snapshot": snapshot, "datasets": made, "kernels": kernels}


def be_check(name):
    """
    Tell whether a boot environment can be booted: whether it has a kernel with its modules, and its package database.

    name
        (string) The environment.

    Returns a dict: ``kernels`` (a sorted list of versions) and ``packages`` (the path of the database in it).

    Raises ``CommandExecutionError`` for what is missing.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_check before-upgrade
    """
    each = _one(name)
    with _looked_at(each) as root:
        modules = {
            os.path.basename(path)
            for place in ("lib/modules/*", "usr/lib/modules/*")
            for path in glob.glob(os.path.join(root, place))
            if os.path.isdir(path)
        }
        files = [path for place in KERNELS for path in glob.glob(os.path.join(root, place))]
        kernels = sorted(version for version in modules if any(_is_of(path, version) for path in files))
        database = next((place for place in PACKAGES if os.path.exists(os.path.join(root, place))), None)
    wrong = []
    if not kernels:
        wrong.append(
            f"{each['dataset']} has no kernel with its modules (/boot/vmlinuz-* and /lib/modules/*): /boot lies on "
            "another "
            "file system, or its kernel was removed. Keep /boot in the environment"
            if modules or not files
            else f"{each['dataset']} has kernels, but not their modules (/lib/modules)"
        )
    if not database:
        wrong.append(
            f"the package database (/var/lib/dpkg) lies outside of {each['dataset']}: after going back, it would "
            "tell of "
            "packages that are not there. Keep /var/lib in the environment, as a part of its root or a dataset below it"
        )
    if wrong:
        raise CommandExecutionError("; ".join(wrong))
    return {"kernels": kernels, "packages": f"/{database}"}


def be_activate(name, once=False, test=False):
    """
    Let a boot environment be the one that is booted from now on.

    It is promoted, so that it depends on no other. The running one runs on until the machine is rebooted. What lies
    below any environment has ``canmount=noauto`` from then on, or it would be mounted over that of another one.

    name
        (string) The environment.
    once
        (bool) Only for the next start: once it is up, the one that was chosen before is chosen again. Default: False
    test
        (bool) Only say whether it can be. Default: False

    Returns a dict: ``name``, ``dataset``, ``previous`` (the name of the one chosen before, or ``None``), ``once``.

    Raises ``CommandExecutionError`` when it cannot be booted (see :func:`be_check`), when the kernel's command line
    names the root itself, so that ``bootfs`` means nothing (ZFSBootMenu names what bootfs said), or when nothing would
    mount what lies below an environment, because it has no zfs-initramfs.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_activate before-upgrade
        salt '*' ksnap.be_activate before-upgrade once=True
    """
    with __salt__["ksnap.locked"](test=test):
        there = {each["name"]: each for each in be_list()}
        each = _one(name, there)
        be_check(name)
        _refuse_fixed_root()
        _refuse_unmounted(name, there)
        pool = each["dataset"].split("/")[0]
        chosen = _bootfs(pool)
        said = {
            "name": name,
            "dataset": each["dataset"],
            "previous": chosen.rpartition("/")[2] if chosen else None,
            "once": once,
        }
        if test:
            return said
        _keep_apart(each["dataset"] for each in there.values())
        if once:
            # What chooses the former one again runs in the one that is booted.
            with _looked_at(each, ()) as root:
                __salt__["ksnap.boot_unit"](root)
            # First what brings the other one back, then the choice.
            _zfs("set", f"{ONCE}={each['dataset']} {chosen or _running()}", pool)
        else:
            for dataset in _family(each["dataset"]):
                origin = _value(dataset, "origin")
                if origin != "-":
                    __salt__["ksnap.promote_dataset"](dataset, origin)
        __salt__["ksnap.command"](["zpool", "set", f"bootfs={each['dataset']}", pool])
        if not once and _value(pool, ONCE) != "-":
            _zfs("inherit", ONCE, pool)
        return said


def be_booted():
    """
    Choose the former boot environment again, where this one was activated only once. ``ksnap-recover.service``
    calls this at each start.

    Returns the name of the environment chosen again, or ``None``.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_booted
    """
    chosen = None
    shown = _zfs("get", "-H", "-d", "0", "-s", "local", "-t", "filesystem", "-o", "name,value", ONCE)
    for line in shown.splitlines():
        pool, value = line.split("\t")
        once, _, former = value.partition(" ")
        if _running() == once and former:
            __salt__["ksnap.command"](["zpool", "set", f"bootfs={former}", pool])
            chosen = former.rpartition("/")[2]
        if _running() in (once, former):
            _zfs("inherit", ONCE, pool)
    return chosen


def be_rename(name, new):
    """
    Give a boot environment another name.

    name
        (string) The environment; not the running one.
    new
        (string) Its new name.

    Returns the new dataset. Raises ``SaltInvocationError`` for a name that is taken or wrong, ``CommandExecutionError``
    for the running one.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_rename before-upgrade keep
    """
    if not isinstance(new, str) or not NAME.fullmatch(new):
        raise SaltInvocationError(f"The name of a boot environment is of letters, digits, and _.:-, not {new!r}")
    with __salt__["ksnap.locked"]():
        there = {each["name"]: each for each in be_list()}
        each = _one(name, there)
        target = _free(new, there)
        if each["running"]:
            raise CommandExecutionError(f"{name} is running; boot another one, then rename it.")
        _zfs("rename", "-u", each["dataset"], target)
        pool = target.split("/")[0]
        noted = _value(pool, ONCE).split(" ")
        if each["dataset"] in noted:
            # OpenZFS takes bootfs along, but no note; with the old name in it, the one chosen once would stay chosen.
            named = [target if word == each["dataset"] else word for word in noted]
            _zfs("set", f"{ONCE}={' '.join(named)}", pool)
        return target


def be_destroy(name, test=False):
    """
    Destroy a boot environment, with its snapshots, and with the snapshot that ``ksnap.be_create`` took for it. This is
    for good.

    name
        (string) The environment; neither the running one nor one that is chosen for a start to come.
    test
        (bool) Only say what would be destroyed. Default: False

    Returns a sorted list of the datasets destroyed.

    Raises ``CommandExecutionError`` when it is in use, one of its snapshots is held, or something else was made from
    it.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_destroy before-upgrade
    """
    with __salt__["ksnap.locked"](test=test):
        each = _one(name)
        if each["running"] or each["next"]:
            raise CommandExecutionError(
                f"{name} is {'running' if each['running'] else 'booted next'}; activate another one"
                + (" and boot it." if each["running"] else ".")
            )
        once, *former = _value(each["dataset"].split("/")[0], ONCE).split(" ")
        if each["dataset"] in former:
            raise CommandExecutionError(
                f"{name} is chosen again once {once} was booted, which is for one start only; activate another one."
            )
        if each["mounted"]:
            raise CommandExecutionError(f"{name} is mounted at {each['mounted']}; ksnap.be_unmount first.")
        shown = _zfs("list", "-H", "-p", "-r", "-t", "all", "-o", "name,userrefs,clones,origin", each["dataset"])
        rows = [line.split("\t") for line in shown.splitlines()]
        own = {row[0] for row in rows}
        wrong = [f"{row[0]} is held" for row in rows if row[1] not in ("-", "0")]
        for row in rows:
            others = [clone for clone in row[2].split(",") if clone not in ("", "-") and clone not in own]
            if others:
                wrong.append(f"{', '.join(others)} was made from {row[0]}: activate that, or destroy it first")
        if wrong:
            raise CommandExecutionError(f"The boot environment {name} was not destroyed: {'; '.join(wrong)}")
        datasets = sorted(row[0] for row in rows if "@" not in row[0])
        if not test:
            _zfs("destroy", "-r", each["dataset"])
            for origin in {row[3] for row in rows} - {"-"}:
                # It fails, and shall, if something else needs it.
                if "boot environment " in _value(origin, "ksnap:reason"):
                    with contextlib.suppress(CommandExecutionError):
                        _zfs("destroy", origin)
        return datasets


def be_mount(name, path):
    """
    Mount a boot environment, with what is below it, to look into it or change it.

    name
        (string) The environment; not the running one.
    path
        (string) An empty directory, absolute; made if it is not there.

    Returns the path. Raises ``CommandExecutionError`` when it is mounted already.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_mount before-upgrade /mnt
    """
    with __salt__["ksnap.locked"]():
        each = _one(name)
        if each["mounted"]:
            raise CommandExecutionError(f"{name} is mounted already, at {each['mounted']}.")
        if not path.startswith("/") or (os.path.exists(path) and os.listdir(path)):
            raise SaltInvocationError(f"{path} must be an absolute path, and empty or not there")
        os.makedirs(path, exist_ok=True)
        _mount(each["dataset"], path, ())
        return path


def be_unmount(name):
    """
    Unmount a boot environment that ``ksnap.be_mount`` mounted.

    name
        (string) The environment; not the running one.

    Returns True if it was mounted. Raises ``CommandExecutionError`` when it is busy.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.be_unmount before-upgrade
    """
    with __salt__["ksnap.locked"]():
        each = _one(name)
        if each["running"]:
            raise CommandExecutionError(f"{name} is running.")
        return _unmount(each["dataset"])


# What there is


def _zfs(*words):
    return __salt__["ksnap.command"](["zfs", *words])


def _value(name, key):
    return _zfs("get", "-H", "-p", "-o", "value", key, name).rstrip("\n")


def _running():
    roots = [mount for mount in __salt__["ksnap.mounts"]() if mount["path"] == "/"]
    return roots[-1]["source"] if roots and roots[-1]["type"] == "zfs" else None


def _bootfs(pool):
    value = __salt__["ksnap.command"](["zpool", "get", "-H", "-o", "value", "bootfs", pool]).strip()
    return None if value == "-" else value


def _altroot(pool):
    return __salt__["ksnap.command"](["zpool", "get", "-H", "-o", "value", "altroot", pool]).strip()


def _container():
    root = _running()
    if not root:
        shown = __salt__["ksnap.command"](["zpool", "list", "-H", "-o", "bootfs"]).split()
        chosen = [value for value in shown if value != "-"]
        if len(chosen) != 1:
            raise CommandExecutionError(
                "This machine's root is not on ZFS, and there is not exactly one pool with bootfs set: it has no boot "
                "environments. ksnap.snapshot and ksnap.rollback are for data."
            )
        root = chosen[0]
    if "/" not in root:
        raise CommandExecutionError(
            f"The root file system is {root}, the root dataset of its pool: there is no place beside it for another "
            "one."
        )
    return root.rpartition("/")[0]


def _one(name, there=None):
    there = there or {each["name"]: each for each in be_list()}
    if name is None:
        found = [each for each in there.values() if each["running"]] or [
            each for each in there.values() if each["next"]
        ]
        if not found:
            raise CommandExecutionError("No boot environment runs here, nor is one chosen; say which one (source).")
        return found[0]
    if name not in there:
        raise SaltInvocationError(f"There is no boot environment {name}; there are: {', '.join(there) or 'none'}")
    return there[name]


def _free(name, there):
    if name in there:
        raise SaltInvocationError(
            f"There is a boot environment {name} already; ksnap.be_destroy, or take another name."
        )
    container = _container()
    target = f"{container}/{name}"
    if target in _zfs("list", "-H", "-o", "name", "-d", "1", container).split("\n"):
        raise SaltInvocationError(
            f"{target} is there, and is no boot environment: its mountpoint is not /, as a power cut leaves what was "
            f"being made. If nothing in it is needed, zfs destroy -r {target}; or take another name."
        )
    return target


def _family(dataset):
    shown = _zfs("get", "-H", "-p", "-r", "-t", "filesystem,volume", "-o", "name,property,value,source", "all", dataset)
    found = {}
    for line in shown.splitlines():
        name, key, value, source = line.split("\t")
        found.setdefault(name, {})[key] = {"value": value, "source": source}
    return dict(sorted(found.items()))


def _keep_apart(environments):
    """Let nothing but the start of its own environment mount what lies below one, also below one not made here."""
    shown = _zfs("list", "-H", "-r", "-t", "filesystem", "-o", "name,canmount", *environments)
    names = [name for name, canmount in (line.split("\t") for line in shown.splitlines()) if canmount == "on"]
    if names:
        _zfs("set", "canmount=noauto", *names)


def _refuse_unmounted(name, there):
    """
    Refuse where nothing would mount what lies below an environment, once it has ``canmount=noauto``: of the others only
    those count for which :func:`_keep_apart` would change something.
    """
    datasets = [each["dataset"] for each in there.values()]
    shown = _zfs("list", "-H", "-r", "-t", "filesystem", "-o", "name,canmount,mountpoint", *datasets)
    rows = [line.split("\t") for line in shown.splitlines()]
    for each in there.values():
        below = [
            dataset
            for dataset, canmount, mountpoint in rows
            if dataset.startswith(f"{each['dataset']}/")
            and mountpoint not in ("none", "legacy")
            and (canmount == "on" or (canmount == "noauto" and each["name"] == name))
        ]
        if not below:
            continue
        with _looked_at(each) as root:
            mounts_all = os.path.exists(os.path.join(root, INITRD))
        if not mounts_all:
            raise CommandExecutionError(
                f"Once {each['dataset']} is booted anew, {', '.join(below)} would not be mounted: what lies below an "
                "environment has canmount=noauto, which only the initrd of zfs-initramfs mounts, and there is no "
                f"/{INITRD} in it. Install zfs-initramfs there in place of zfs-dracut, or have nothing below "
                "environments: move the files into the environment, or the datasets to another place (zfs rename)."
            )


def _options(top, has):
    found = [
        f"{key}={entry['value']}"
        for key, entry in has.items()
        if entry["source"] in ("local", "received") and key not in NOT_COPIED and not re.match("ksnap:|zfs_dr:", key)
    ]
    if has["type"]["value"] == "volume":
        return found
    if top:
        # Its last step gives it "/". Until then the start mounts nothing of it: OpenZFS sets what a clone is told only
        # after it made it, and what a power cut leaves below would be mounted over that of the running environment.
        return [*found, "canmount=noauto", "mountpoint=none"]
    if has["mountpoint"]["source"] == "local":
        found.append(f"mountpoint={has['mountpoint']['value']}")
    return [*found, f"canmount={'off' if has['canmount']['value'] == 'off' else 'noauto'}"]


def _refuse_fixed_root():
    with open(COMMAND_LINE, encoding="utf-8") as file:
        words = file.read().split()
    fixed = [word for word in words if re.match(r"root=(ZFS=|zfs:)(?!AUTO)", word)]
    if fixed and not _by_zfsbootmenu(words, fixed[0]):
        raise CommandExecutionError(
            f"The kernel's command line says {fixed[0]}, so the pool's bootfs is not asked. Let the boot loader say "
            "root=zfs:AUTO (GRUB_CMDLINE_LINUX in /etc/default/grub, then update-grub), and reboot once."
        )


def _by_zfsbootmenu(words, fixed):
    """
    Tell whether ZFSBootMenu made this command line. It asks bootfs, and names what it then boots: as the first word,
    where GRUB has BOOT_IMAGE= and systemd-boot initrd=. It adds the host's id, unless told not to.
    """
    root = _running()
    if words[0] != fixed or not root:
        return False
    hostid = any(re.match(r"(spl\.)?spl_hostid=", word) for word in words)
    return hostid or "org.zfsbootmenu:" in _zfs("get", "-H", "-o", "property", "all", root)


def _is_of(path, version):
    return version in path.split("/") or os.path.basename(path) in (f"vmlinuz-{version}", f"vmlinux-{version}")


# Mounting


@contextlib.contextmanager
def _looked_at(each, options=("ro",)):
    if each["mounted"]:
        yield each["mounted"]
        return
    with tempfile.TemporaryDirectory(prefix="ksnap-", dir="/run") as folder:
        try:
            _mount(each["dataset"], folder, options)
            yield folder
        finally:
            _unmount(each["dataset"])


def _mount(dataset, path, options):
    family = _family(dataset)
    top = family[dataset]["mountpoint"]["value"].rstrip("/")
    for name, has in family.items():
        mountpoint = has.get("mountpoint", {}).get("value")
        if has["type"]["value"] == "volume" or has["canmount"]["value"] == "off" or mountpoint in ("none", "legacy"):
            continue
        place = path + mountpoint.rstrip("/").removeprefix(top)
        if not os.path.isdir(place):
            # In a snapshot, or mounted read-only, there may be no place for it.
            if "ro" in options:
                continue
            os.makedirs(place)
        words = ["mount", "-t", "zfs", "-o", ",".join(["zfsutil", *options]), name, place]
        _run(words)


def _unmount(dataset):
    mounts = [
        mount["path"]
        for mount in __salt__["ksnap.mounts"]()
        if mount["source"] == dataset or mount["source"].startswith(f"{dataset}/")
    ]
    for path in reversed(mounts):
        _run(["umount", path])
    return bool(mounts)


def _run(words):
    done = __salt__["cmd.run_all"](words, python_shell=False, output_loglevel="quiet")
    if done["retcode"]:
        raise CommandExecutionError(f"{' '.join(words)} failed: {done['stderr'] or done['stdout']}")
