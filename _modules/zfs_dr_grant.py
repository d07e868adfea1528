"""
What another machine may do here
================================

A replication over ssh needs a user without privileges, whose key starts nothing but the gate (:mod:`zfs_dr_gate`), and
whom OpenZFS itself allows exactly what the gate lets through (zfs-allow(8)). For one key, both walls stand alone;
between keys that share a user there is the gate only, since OpenZFS knows the user.
"""

import os
import re
import shlex

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

GATE = "/usr/local/lib/zfs_dr/gate"
HOMES = "/var/lib/zfs_dr"
# What the commands of the gate need.
PERMISSIONS = {
    "target": (
        "canmount",
        "clone",
        "create",
        "hold",
        "mount",
        "mountpoint",
        "promote",
        "readonly",
        "receive",
        "release",
        "rename",
        "snapshot",
        "userprop",
    ),
    "source": ("bookmark", "destroy", "hold", "release", "send"),
}
KEY = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)|sk-[a-z0-9@.-]+) [A-Za-z0-9+/=]+( \S.*)?")


def __virtual__():
    return __virtualname__


def _role(role):
    if role not in PERMISSIONS:
        raise SaltInvocationError(f"role is {', '.join(PERMISSIONS)}, not {role!r}")
    return PERMISSIONS[role]


def grant(user, dataset, role):
    """
    Allow a user of this machine what a replication needs of a dataset and of what is below it, and nothing else.

    user
        (string) The user.
    dataset
        (string) The target's base, or a dataset of the source.
    role
        (string) ``target`` or ``source``.

    Returns a dict: ``permissions`` (what the role needs) and ``new`` (what was not allowed before).

    Raises ``SaltInvocationError`` for another role, ``CommandExecutionError`` when there is no such user or dataset.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.grant zfs_dr backup/web1 target
    """
    wanted = _role(role)
    has = granted(dataset).get(user, [])
    new = [each for each in wanted if each not in has]
    if new:
        __salt__["ksnap.command"](["zfs", "allow", "-u", user, ",".join(new), dataset])
    return {"permissions": list(wanted), "new": new}


def granted(dataset):
    """
    List what users are allowed on a dataset itself, here and below; what comes from above it is not shown.

    dataset
        (string) The dataset.

    Returns a dict, user to a sorted list of permissions.

    Raises ``CommandExecutionError`` when there is no such dataset.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.granted backup/web1
    """
    told, own, inside = {}, False, False
    for line in __salt__["ksnap.command"](["zfs", "allow", dataset]).splitlines():
        if line.startswith("----"):
            own = line.split()[3] == dataset
        elif not line.startswith("\t"):
            inside = own and line.startswith("Local+Descendent permissions")
        elif inside and line.split()[0] == "user":
            _, user, permissions = line.split()
            told[user] = sorted(permissions.split(","))
    return told


def permissions(role):
    """
    Tell what a role needs.

    role
        (string) ``target`` or ``source``.

    Returns a list. Raises ``SaltInvocationError`` for another role.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.permissions target
    """
    return list(_role(role))


def revoke(user, dataset, permissions=None):
    """
    Take back what :func:`grant` gave.

    user
        (string) The user.
    dataset
        (string) The dataset.
    permissions
        (list) Which; without it, all that the user is allowed there. Default: None.

    Returns a list of what is not allowed any more.

    Raises ``CommandExecutionError`` when there is no such dataset.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.revoke zfs_dr backup/web1
    """
    has = granted(dataset).get(user, [])
    gone = [each for each in has if permissions is None or each in permissions]
    if gone:
        __salt__["ksnap.command"](["zfs", "unallow", "-u", user, ",".join(gone), dataset])
    return gone


# The key and its forced command


def gate_installed():
    """
    Tell whether the gate is in place, and is this one.

    Returns True or False.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.gate_installed
    """
    try:
        seen = os.stat(GATE)
        with open(GATE, encoding="utf-8") as file:
            return file.read() == _gate() and seen.st_uid == 0 and seen.st_mode & 0o777 == 0o755
    except FileNotFoundError:
        return False


def gate_install():
    """
    Put the gate in place, as root's file.

    Raises ``CommandExecutionError`` when it cannot be written.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.gate_install
    """
    try:
        os.makedirs(os.path.dirname(GATE), mode=0o755, exist_ok=True)
        with open(f"{GATE}.new", "w", encoding="utf-8") as file:
            file.write(_gate())
            os.fchmod(file.fileno(), 0o755)
        os.replace(f"{GATE}.new", GATE)
    except OSError as error:
        raise CommandExecutionError(f"The gate was not put in place: {error}") from error


def _gate():
    with open(os.path.join(os.path.dirname(__file__), "zfs_dr_gate.py"), encoding="utf-8") as file:
        return file.read()


def home(user):
    """
    Tell where a user of the gate is at home: root's folder, in which the user may write nothing but its locks.

    user
        (string) The user.

    Returns the path.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.home zfs_dr
    """
    return os.path.join(HOMES, user)


def user_present(user):
    """
    Make the user of the gate: no password, a home that is root's, a place for its locks. sshd starts the forced
    command by the user's shell, so it has one; no key of it ever starts another command.

    user
        (string) The user.

    Raises ``CommandExecutionError`` when it cannot be made, or is there with another home.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.user_present zfs_dr
    """
    place = home(user)
    seen = __salt__["user.info"](user)
    if seen and seen["home"] != place:
        raise CommandExecutionError(f"The user {user} is there with the home {seen['home']}; choose another user")
    if not seen:
        options = {"home": place, "createhome": False, "system": True, "shell": "/bin/sh", "usergroup": True}
        if not __salt__["user.add"](user, **options):
            raise CommandExecutionError(f"The user {user} was not made; see the log of this machine")
        # No password, and yet not a locked account, which sshd would refuse.
        __salt__["shadow.set_password"](user, "*")
    locks = os.path.join(place, ".zfs_dr")
    os.makedirs(HOMES, mode=0o755, exist_ok=True)
    os.chmod(HOMES, 0o755)
    os.makedirs(place, mode=0o755, exist_ok=True)
    os.makedirs(locks, mode=0o700, exist_ok=True)
    seen = __salt__["user.info"](user)
    os.chown(locks, seen["uid"], seen["gid"])


def _line(key, grants):
    if not KEY.fullmatch(key.strip()):
        raise SaltInvocationError("key must be one public key, such as 'ssh-ed25519 AAAA... root@web1'")
    for each in grants:
        role, _, dataset = each.partition(":")
        _role(role)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.:-]*(/[A-Za-z0-9_.:-]+)*", dataset):
            raise SaltInvocationError(f"{each} names no dataset; write it as target:backup/web1")
    return f'restrict,command="{shlex.join([GATE, *grants])}" {key.strip()}'


def _lines(user):
    try:
        with open(os.path.join(home(user), ".ssh/authorized_keys"), encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _blob(line):
    # The key itself, which stands behind its type, whatever options precede it and whatever comment follows.
    found = re.search(r"(?:^|\s)(?:ssh|ecdsa|sk)-\S+ ([A-Za-z0-9+/=]+)", line)
    return found[1] if found else None


def authorized(user, key):
    """
    Tell what a key may do.

    user
        (string) The user.
    key
        (string) The public key.

    Returns a list such as ``[target:backup/web1]``, or ``None`` where the key is not accepted.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.authorized zfs_dr 'ssh-ed25519 AAAA...'
    """
    for line in _lines(user):
        if _blob(line) == _blob(key):
            command = re.match(r'restrict,command="([^"]*)" ', line)
            return shlex.split(command[1])[1:] if command else []
    return None


def authorize(user, key, grants):
    """
    Accept a key, for the gate and nothing else. Its other line, if there is one, goes.

    user
        (string) The user, whose home is that of :func:`home`.
    key
        (string) The public key.
    grants
        (list of strings) What it may do: ``target:backup/web1``, ``source:tank/web``. An empty
        list: the key is not accepted any more.

    Raises ``SaltInvocationError`` for a wrong key or grant, ``CommandExecutionError`` when nothing could be written.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.authorize zfs_dr 'ssh-ed25519 AAAA... root@web1' '[target:backup/web1]'
    """
    new = _line(key, grants)
    lines = [line for line in _lines(user) if _blob(line) != _blob(key)] + ([new] if grants else [])
    folder = os.path.join(home(user), ".ssh")
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        path = os.path.join(folder, "authorized_keys")
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            os.fchmod(file.fileno(), 0o644)
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise CommandExecutionError(f"The key of {user} was not put in place: {error}") from error
