"""
ejabberd's spool: the Mnesia database of a node, bound to the node's name for ever
==================================================================================

What must last is in PostgreSQL, so a spool that belongs to another name may give way. It is set aside, not deleted.
"""

import os
import re
import shutil
import time

from salt.exceptions import CommandExecutionError

__virtualname__ = "ejabberd"

SPOOL = "/var/lib/ejabberd"
COOKIE = ".erlang.cookie"


def __virtual__():
    return __virtualname__


def spool_node(spool=SPOOL):
    """
    Tell to which node a spool belongs.

    spool
        The directory. Default: ``/var/lib/ejabberd``.

    Returns the Erlang node's name, such as ``ejabberd@xmpp1.example.org``, or ``None`` where there is no database yet.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.spool_node
    """
    try:
        with open(os.path.join(spool, "schema.DAT"), "rb") as schema:
            terms = schema.read()
    except FileNotFoundError:
        return None
    # An atom stands behind its length (Erlang's external term format, SMALL_ATOM_UTF8_EXT and ATOM_EXT).
    atom = re.search(rb"(?:w|d\0)(.)(?=ejabberd@)", terms, re.DOTALL)
    return terms[atom.end() : atom.end() + atom[1][0]].decode() if atom else None


def spool_set_aside(spool=SPOOL):
    """
    Stop ejabberd and move its database out of the way, so that the next start makes a new one.

    spool
        The directory. Default: ``/var/lib/ejabberd``.

    Returns the directory in which the old database is kept now.

    Raises ``CommandExecutionError`` when ejabberd does not stop, or when nothing could be moved.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.spool_set_aside
    """
    if __salt__["service.status"]("ejabberd") and not __salt__["service.stop"]("ejabberd"):
        raise CommandExecutionError("ejabberd did not stop; stop it by hand (see its log), then apply again")
    kept = f"{spool}.{spool_node(spool) or 'unknown'}.{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
    try:
        os.mkdir(kept, mode=0o700)
        for entry in os.listdir(spool):
            if entry != COOKIE:
                shutil.move(os.path.join(spool, entry), kept)
    except OSError as error:
        raise CommandExecutionError(f"The spool {spool} was not moved to {kept} whole: {error}") from error
    return kept
