"""
ejabberd's accounts
===================

One by one over the API, or thousands at once, hashed here and copied into PostgreSQL (:func:`import_users`).

Wherever a password is asked for, it is given in one of three ways; what is read from a file or the pillar appears in
no SLS file, argument list, log or return:

password
    (string) The password itself. On a command line it is seen in the process list.
password_file
    (string) Path of a file on this machine that holds it. A newline at its end does not belong to it.
password_pillar
    (string) Where it is in this minion's pillar, a path with colons: ``xmpp:users:juliet@example.org:password``.
"""

import base64
import concurrent.futures
import hashlib
import hmac
import json
import os
import re
import stringprep
import subprocess
import unicodedata

import salt.utils.data
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ejabberd"

# RFC 7677 asks for at least 4096 rounds; ejabberd uses as many.
ROUNDS = 4096
HASHES = {"sha": "sha1", "sha256": "sha256", "sha512": "sha512"}
# How ejabberd numbers the kinds of passwords in the column "type", where the table has one (25.03 and later).
TYPES = {"sha": 2, "sha256": 3, "sha512": 4}
PROHIBITED = (
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def __virtual__():
    return __virtualname__


def _stringprep(text, mapping, prohibited):
    # RFC 3454: map, normalise, prohibit, check the direction of writing.
    text = "".join(mapping(char) for char in text if not stringprep.in_table_b1(char))
    text = unicodedata.ucd_3_2_0.normalize("NFKC", text)
    if any(check(char) for char in text for check in prohibited):
        raise ValueError("a character that is not permitted")
    if any(stringprep.in_table_d1(char) for char in text) and (
        any(stringprep.in_table_d2(char) for char in text)
        or not (stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1]))
    ):
        raise ValueError("text from right to left that is mixed with text from left to right")
    return text


def _nodeprep(user):
    # RFC 3920, appendix A.
    if re.fullmatch(r"[a-z0-9._-]{1,1023}", user):
        return user
    text = _stringprep(
        user, stringprep.map_table_b2, (*PROHIBITED, stringprep.in_table_c11_c12, "\"&'/:<>@".__contains__)
    )
    if not text or len(text.encode()) > 1023:
        raise ValueError("a name that is empty or longer than 1023 bytes")
    return text


def _saslprep(password):
    # RFC 4013: what a client hashes is prepared so.
    if password.isascii() and password.isprintable():
        return password
    return _stringprep(
        password, lambda char: " " if stringprep.in_table_c12(char) else char, (*PROHIBITED, stringprep.in_table_c12)
    )


def jid(user, host):
    """
    Return an account's address as ejabberd writes it: ``Juliet``, ``Example.ORG`` is ``juliet@example.org``.

    user
        (string) The part before the @.
    host
        (string) The virtual host.

    Raises ``SaltInvocationError`` for what cannot be an address (RFC 3920, appendix A).

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.jid Juliet example.org
    """
    try:
        prepared = _nodeprep(str(user))
    except ValueError as error:
        raise SaltInvocationError(f"{user!r} cannot be the name of an account: it has {error}.") from error
    host = str(host).lower().rstrip(".")
    if not re.fullmatch(r"[^\s@/\"'&<>:]+", host):
        raise SaltInvocationError(f"{host!r} cannot be a virtual host.")
    return f"{prepared}@{host}"


def _split(user, host):
    return jid(user, host).rsplit("@", 1)


def _password(who, password=None, password_file=None, password_pillar=None):
    if sum(value is not None for value in (password, password_file, password_pillar)) != 1:
        raise SaltInvocationError(f"{who} needs exactly one of password, password_file and password_pillar.")
    if password_file is not None:
        try:
            with open(password_file, encoding="utf-8") as file:
                password = file.read().rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandExecutionError(f"The password of {who} is not in {password_file}: {error}") from error
        where = password_file
    elif password_pillar is not None:
        # Not pillar.get: it hands out stars.
        password = salt.utils.data.traverse_dict_and_list(__pillar__, password_pillar, None)
        where = f"the pillar at {password_pillar}"
    else:
        where = "password"
    if not isinstance(password, str) or not password:
        raise SaltInvocationError(f"The password of {who} ({where}) must be text, and not empty. Is it quoted?")
    try:
        return _saslprep(password)
    except ValueError as error:
        raise SaltInvocationError(f"The password of {who} ({where}) has {error}.") from error


def _require_host(host):
    known = __salt__["ejabberd.api"]("registered_vhosts")
    if host not in known:
        raise SaltInvocationError(f"{host} is no virtual host of ejabberd. It has: {', '.join(sorted(known))}")


def users(host=None):
    """
    Return the addresses of all accounts, sorted.

    host
        (string) Only this virtual host's. Default: all

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.users example.org
    """
    hosts = [host] if host else __salt__["ejabberd.api"]("registered_vhosts")
    return sorted(
        f"{user}@{each}" for each in hosts for user in __salt__["ejabberd.api"]("registered_users", host=each)
    )


def user_exists(user, host):
    """
    Return whether there is this account.

    user
        (string) The part before the @.
    host
        (string) The virtual host.

    Raises ``SaltInvocationError`` when ejabberd does not serve the host.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.user_exists juliet example.org
    """
    user, host = _split(user, host)
    if __salt__["ejabberd.api"]("check_account", user=user, host=host) == 0:
        return True
    _require_host(host)
    return False


def register(user, host, password=None, password_file=None, password_pillar=None):
    """
    Make an account.

    user
        (string) The part before the @.
    host
        (string) The virtual host.
    password, password_file, password_pillar
        One of them, see above.

    Returns True. Raises ``CommandExecutionError`` when the account exists already, or ejabberd does not make it.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.register juliet example.org password_file=/root/juliet
    """
    user, host = _split(user, host)
    password = _password(f"{user}@{host}", password, password_file, password_pillar)
    __salt__["ejabberd.api"]("register", user=user, host=host, password=password)
    return True


def unregister(user, host):
    """
    Remove an account, with all that ejabberd keeps for it.

    user
        (string) The part before the @.
    host
        (string) The virtual host.

    Returns True, also when there was no such account. Raises ``SaltInvocationError`` when ejabberd does not serve
    the host.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.unregister juliet example.org
    """
    user, host = _split(user, host)
    _require_host(host)
    __salt__["ejabberd.api"]("unregister", user=user, host=host)
    return True


def change_password(user, host, password=None, password_file=None, password_pillar=None):
    """
    Give an account another password.

    user
        (string) The part before the @.
    host
        (string) The virtual host.
    password, password_file, password_pillar
        The new one: one of them, see above.

    Returns True. Raises ``CommandExecutionError`` when there is no such account.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.change_password juliet example.org password_file=/root/juliet
    """
    user, host = _split(user, host)
    password = _password(f"{user}@{host}", password, password_file, password_pillar)
    if __salt__["ejabberd.api"]("change_password", user=user, host=host, newpass=password) != 0:
        raise CommandExecutionError(f"ejabberd has not changed the password of {user}@{host}.")
    return True


def check_password(user, host, password=None, password_file=None, password_pillar=None):
    """
    Return whether a password is this account's. False also when there is no such account.

    user
        (string) The part before the @.
    host
        (string) The virtual host.
    password, password_file, password_pillar
        One of them, see above.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.check_password juliet example.org password_file=/root/juliet
    """
    user, host = _split(user, host)
    password = _password(f"{user}@{host}", password, password_file, password_pillar)
    return __salt__["ejabberd.api"]("check_password", user=user, host=host, password=password) == 0


def _scram(password, scram_hash, salt_bytes, rounds):
    # RFC 5802: what a server keeps is not enough to log in with.
    digest = HASHES[scram_hash]
    salted = hashlib.pbkdf2_hmac(digest, password.encode(), salt_bytes, rounds)
    client_key = hmac.digest(salted, b"Client Key", digest)
    stored = hashlib.new(digest, client_key).digest()
    server = hmac.digest(salted, b"Server Key", digest)
    return tuple(base64.b64encode(value).decode() for value in (stored, server, salt_bytes))


def _ready_scram(who, scram):
    # What another server has exported.
    if not isinstance(scram, dict) or set(scram) != {"hash", "stored_key", "server_key", "salt", "iterations"}:
        raise SaltInvocationError(
            f"scram of {who} needs hash (sha, sha256 or sha512), stored_key, server_key, salt (base64) and iterations."
        )
    if scram["hash"] not in HASHES:
        raise SaltInvocationError(f"scram of {who}: hash is {scram['hash']!r}, not one of {', '.join(HASHES)}.")
    for key in ("stored_key", "server_key", "salt"):
        try:
            base64.b64decode(scram[key], validate=True)
        except (ValueError, TypeError) as error:
            raise SaltInvocationError(f"scram of {who}: {key} is not base64.") from error
    if not isinstance(scram["iterations"], int) or scram["iterations"] < 1:
        raise SaltInvocationError(f"scram of {who}: iterations must be a number above 0.")
    return scram["hash"], scram["stored_key"], scram["server_key"], scram["salt"], scram["iterations"]


def _row(who, account, scram_hash):
    if "scram" in account:
        return _ready_scram(who, account["scram"])
    password = _password(who, *(account.get(key) for key in ("password", "password_file", "password_pillar")))
    return (scram_hash, *_scram(password, scram_hash, os.urandom(16), ROUNDS), ROUNDS)


def _copy_text(value):
    # Names may hold a backslash; the other columns hold base64 and numbers.
    return value.replace("\\", "\\\\")


class _Database:
    """psql as ejabberd's own OS user; SQL and rows go through its standard input."""

    def __init__(self, database, runas, host, port, user, password_file):
        self.command = ["psql", "-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-f", "-"]
        for option, value in (("-d", database), ("-h", host), ("-p", port), ("-U", user)):
            if value is not None:
                self.command += [option, str(value)]
        self.database, self.runas = database, runas
        self.environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C.UTF-8"}
        if password_file:
            with open(password_file, encoding="utf-8") as file:
                self.environment["PGPASSWORD"] = file.read().rstrip("\n")

    def query(self, script):
        try:
            done = subprocess.run(
                self.command,
                input=script,
                capture_output=True,
                text=True,
                encoding="utf-8",
                user=self.runas,
                group=self.runas,
                extra_groups=[],
                cwd="/",
                env=self.environment,
                check=False,
            )
        except (OSError, LookupError) as error:
            raise CommandExecutionError(
                f"psql cannot be run as {self.runas}: {error}. It needs postgresql-client, and Salt to be root."
            ) from error
        if done.returncode:
            raise CommandExecutionError(
                f"PostgreSQL refused, in the database {self.database} as {self.runas}: {_first_error(done.stderr)}"
            )
        return done.stdout.splitlines()


def _first_error(text):
    # Not the lines after it: their context quotes the row, and with it a hash.
    lines = [line for line in text.splitlines() if "ERROR" in line or "error" in line or "FATAL" in line]
    return (lines or text.splitlines() or ["no reason given"])[0]


def _listed(accounts, pillar):
    """Accounts by their addresses, from a list or from the pillar."""
    if (accounts is None) == (pillar is None):
        raise SaltInvocationError("Exactly one of accounts and users_pillar is needed.")
    if pillar is not None:
        accounts = salt.utils.data.traverse_dict_and_list(__pillar__, pillar, None)
        if accounts is None:
            raise SaltInvocationError(f"The pillar has nothing at {pillar}.")
        if isinstance(accounts, dict):
            accounts = [{**(account or {}), "jid": address} for address, account in accounts.items()]
    by_jid = {}
    for account in accounts:
        user, at, host = str(account.get("jid", "")).rpartition("@")
        if not at:
            raise SaltInvocationError(f"An account's jid is {account.get('jid')!r}, not an address.")
        address = jid(user, host)
        if address in by_jid:
            raise SaltInvocationError(f"The account {address} is there twice.")
        if account.get("present", True):
            by_jid[address] = account
    return by_jid


def missing_users(accounts=None, users_pillar=None):
    """
    Return which of these accounts there are not: a sorted list of their addresses, and how many were looked for. One
    listing for each virtual host, however many there are.

    accounts
        (list of dicts) Each with a ``jid``, see :func:`import_users`.
    users_pillar
        (string) Instead: where they are in the pillar, see :func:`import_users`.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.missing_users users_pillar=xmpp:users
    """
    by_jid = _listed(accounts, users_pillar)
    there = set()
    for host in {address.rsplit("@", 1)[1] for address in by_jid}:
        _require_host(host)
        there.update(users(host))
    return sorted(by_jid.keys() - there), len(by_jid)


def import_users(
    accounts=None,
    users_pillar=None,
    only=None,
    scram_hash="sha256",
    database="ejabberd",
    runas="ejabberd",
    db_host=None,
    db_port=None,
    db_user=None,
    db_password_file=None,
):
    """
    Make many accounts at once: the passwords are hashed here, on all cores, and copied into PostgreSQL in one
    transaction. Some thousand a second. An account that exists stays as it is, whatever its password.

    accounts
        (list of dicts) Each has ``jid``, and one of ``password``, ``password_file``, ``password_pillar`` or
        ``scram``: what another server exported, a dict of ``hash`` (``sha``, ``sha256`` or ``sha512``),
        ``stored_key``, ``server_key``, ``salt`` (base64) and ``iterations``.
    users_pillar
        (string) Instead: where they are in the minion's pillar, a list of such dicts, or a dict of addresses to them.
        Those with ``present: false`` are left out.
    only
        (list of strings) Of these accounts, only those with these addresses. Default: all
    scram_hash
        (string) ``sha``, ``sha256`` or ``sha512``. It must be what ejabberd's ``auth_scram_hash`` is. Default: sha256
    database
        (string) ejabberd's database. Default: ejabberd
    runas
        (string) The OS user who runs psql. Default: ejabberd
    db_host, db_port, db_user, db_password_file
        (string, integer, string, path) Where the database is not reached by this machine's socket as ``runas``.

    Returns the addresses of the accounts that were made, sorted. Every node of the cluster knows them at once.

    Raises ``SaltInvocationError`` for wrong accounts, before anything is written, and ``CommandExecutionError`` when
    PostgreSQL refuses; then no account is made.

    Sources: RFC 5802, RFC 7677, RFC 4013, ejabberd's sql/pg.new.sql and sql/pg.sql.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.import_users users_pillar=xmpp:users
    """
    if scram_hash not in HASHES:
        raise SaltInvocationError(f"scram_hash is {scram_hash!r}, not one of {', '.join(HASHES)}.")
    by_jid = _listed(accounts, users_pillar)
    if only is not None:
        chosen = set(only)
        by_jid = {address: account for address, account in by_jid.items() if address in chosen}
    if not by_jid:
        return []
    hosts = {address.rsplit("@", 1)[1] for address in by_jid}
    for host in hosts:
        _require_host(host)

    psql = _Database(database, runas, db_host, db_port, db_user, db_password_file)
    columns = set(psql.query("SELECT attname FROM pg_attribute WHERE attrelid = 'users'::regclass AND attnum > 0;"))
    with_host, with_type = "server_host" in columns, "type" in columns
    if not with_host and len(hosts) > 1:
        raise SaltInvocationError(
            f"The database {database} has ejabberd's single-host schema: it cannot keep accounts of {len(hosts)} hosts."
        )

    # hashlib lets go of Python's lock while it hashes, so threads use all cores.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        hashed = list(pool.map(lambda item: _row(*item, scram_hash), by_jid.items()))

    names = ["username", "password", "serverkey", "salt", "iterationcount"]
    names += ["server_host"] * with_host + ["type"] * with_type
    lines = []
    for address, (kind, stored, server, salt_text, rounds) in zip(by_jid, hashed, strict=True):
        user, host = address.rsplit("@", 1)
        if not with_type and kind != "sha":
            stored = f"{kind}:{stored}"
        values = [_copy_text(user), stored, server, salt_text, str(rounds)]
        values += [host] * with_host + [str(TYPES[kind])] * with_type
        lines.append("\t".join(values))

    listed = ", ".join(names)
    address = f"username || '@' || {'server_host' if with_host else repr(*hosts)}"
    same = "old.username = new.username" + (" AND old.server_host = new.server_host" if with_host else "")
    made = psql.query(
        "BEGIN;\n"
        "CREATE TEMPORARY TABLE new_users (LIKE users INCLUDING DEFAULTS) ON COMMIT DROP;\n"
        f"COPY new_users ({listed}) FROM STDIN;\n" + "\n".join(lines) + "\n\\.\n"
        f"INSERT INTO users ({listed}) SELECT {listed} FROM new_users AS new\n"
        f"  WHERE NOT EXISTS (SELECT FROM users AS old WHERE {same})\n"
        f"  ON CONFLICT DO NOTHING RETURNING to_json({address});\n"
        "COMMIT;\n"
    )
    # A node that has looked a name up before goes on believing that it is missing.
    __salt__["ejabberd.api"]("clear_cache")
    return sorted(json.loads(line) for line in made)
