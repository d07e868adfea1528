"""
Secrets of this machine: one file each, made once, shown to nobody
==================================================================
"""

import os
import secrets
import stat
import string
import tempfile

import salt.utils.data
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"

MAKERS = {
    "password": lambda: "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24)),
    "token": lambda: secrets.token_hex(32),
    # An Erlang cookie is an atom: letters and digits (erl(1), -setcookie).
    "cookie": lambda: "".join(secrets.choice(string.ascii_uppercase) for _ in range(40)),
}


def __virtual__():
    return __virtualname__


def secret_state(name, contents_pillar=None):
    """
    Tell how a secret's file stands, without its contents.

    name
        The file, as an absolute path.

    contents_pillar
        The colon path in this minion's pillar of the value that the file must have. Default: any value will do.

    Returns ``absent``, ``differs`` (the pillar has another value), ``unprotected`` (the owner is not root, or others
    may read it) or ``ready``.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.secret_state /etc/salt/xmpp/secrets/admin_password
    """
    try:
        status = os.stat(name)
        with open(name, encoding="utf-8") as file:
            present = file.read()
    except FileNotFoundError:
        return "absent"
    given = _given(contents_pillar)
    if given is not None and given.strip() != present.strip():
        return "differs"
    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o077:
        return "unprotected"
    return "ready"


def secret_write(name, contents_pillar=None, make=None):
    """
    Write a secret's file, mode 0600 and root's own. A directory that is made for it has mode 0700.

    name
        The file, as an absolute path.

    contents_pillar
        The colon path in this minion's pillar of the value. It wins over ``make``. Default: none.

    make
        What to make when the pillar has no value: ``password`` (24 letters and digits), ``token`` (64 hexadecimal
        digits) or ``cookie`` (40 letters). A file that is there keeps its value and gets its mode. Default: nothing.

    Returns ``True``.

    Raises ``SaltInvocationError`` when there is nothing to write, ``CommandExecutionError`` when it cannot be written.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.secret_write /etc/salt/xmpp/secrets/erlang_cookie make=cookie
    """
    if make is not None and make not in MAKERS:
        raise SaltInvocationError(f"make={make!r}: expected one of {', '.join(sorted(MAKERS))}")
    value = _given(contents_pillar)
    if value is None and secret_state(name) != "absent":
        with open(name, encoding="utf-8") as file:
            value = file.read()
    if value is None and make:
        value = MAKERS[make]()
    if value is None:
        nothing = f"the pillar has nothing at {contents_pillar}" if contents_pillar else "no value is given"
        raise SaltInvocationError(f"{name}: {nothing}, and nothing may be made; give it a value")
    directory, temporary = os.path.dirname(name), None
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # mkstemp's file is 0600 from its first moment on.
        handle, temporary = tempfile.mkstemp(prefix=".", dir=directory)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(value.rstrip("\n") + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chown(temporary, 0, 0)
        os.replace(temporary, name)
    except OSError as error:
        if temporary:
            os.unlink(temporary)
        raise CommandExecutionError(f"{name} could not be written: {error}; make room or mend {directory}") from error
    return True


def _given(pillar):
    """The pillar's own value: pillar.get would mask it."""
    return salt.utils.data.traverse_dict_and_list(__pillar__, pillar, None) if pillar else None
