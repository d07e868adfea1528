"""
ejabberd on this machine
========================

Speaks to ejabberd's HTTP API over one kept connection: a call costs a third of a millisecond, where ``ejabberdctl``
starts a process each time. Accounts are in :mod:`ejabberd_accounts`, rooms in :mod:`ejabberd_rooms`, the
configuration file in :mod:`ejabberd_config`; all of them are functions of the one module ``ejabberd``.

The API listens on loopback. Its path is a secret that only root can read, so no other local user gets further than
"404 Not Found"; before that, nothing of the API runs for them. Minion options, with their defaults:

.. code-block:: yaml

    ejabberd:
      api_port: 5281
      api_token_file: /etc/salt/xmpp/secrets/api_token
"""

import contextlib
import datetime
import glob
import http.client
import json
import os
import re
import secrets
import select
import time

import salt.utils.args
import salt.utils.yaml
from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ejabberd"

__func_alias__ = {"reload_": "reload"}

HOST = "127.0.0.1"
PORT = 5281
TOKEN_FILE = "/etc/salt/xmpp/secrets/api_token"
# The newest version of the API that ejabberd 24.12 and all later ones serve.
API_VERSION = "v2"
APPLICATION = "/usr/lib/*/ejabberd-*/ebin/ejabberd.app"
DEFAULTS = "/etc/default/ejabberd"
LOG = "/var/log/ejabberd/ejabberd.log"
STATISTICS = ("registeredusers", "onlineusers", "onlineusersnode", "uptimeseconds", "processes")
HOST_STATISTICS = ("registeredusers", "onlineusers")


def __virtual__():
    return __virtualname__


def _option(name, default):
    return __salt__["config.get"](f"ejabberd:{name}", default)


def _token():
    path = _option("api_token_file", TOKEN_FILE)
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise CommandExecutionError(
            f"The secret of ejabberd's API cannot be read from {path}: {error.strerror}. "
            "Run as root, and apply xmpp.ejabberd, which makes it."
        ) from error


def _stale(connection):
    # A server that has closed an idle connection makes its socket readable. Asking before sending, instead of
    # sending again after a failure, never executes a command twice.
    return connection.sock is None or bool(select.select([connection.sock], [], [], 0)[0])


def _connection(port, timeout):
    kept = __context__.get("ejabberd.connection")
    # States that run in parallel are forks: two of them must not share a socket.
    if kept and kept[:2] == (os.getpid(), port) and not _stale(kept[2]):
        connection = kept[2]
    else:
        connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
        connection.connect()
        __context__["ejabberd.connection"] = (os.getpid(), port, connection)
    connection.sock.settimeout(timeout)
    return connection


def _post(path, arguments, timeout):
    port = int(_option("api_port", PORT))
    where = f"ejabberd's API at {HOST}:{port}"
    try:
        connection = _connection(port, timeout)
        connection.request("POST", path, json.dumps(arguments), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read()
    except ConnectionRefusedError as error:
        raise CommandExecutionError(
            f"{where} refuses the connection. Is ejabberd running (service.status ejabberd, {LOG}), "
            "and does its configuration have the API's listener?"
        ) from error
    except TimeoutError as error:
        _forget_connection()
        raise CommandExecutionError(
            f"{where} has not answered within {timeout} s. See {LOG}; the command may still be at work."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        _forget_connection()
        raise CommandExecutionError(f"{where} broke off: {error!r}. ejabberd may have stopped; see {LOG}.") from error


def _forget_connection():
    kept = __context__.pop("ejabberd.connection", None)
    if kept:
        kept[2].close()


def api(command, timeout=60, **kwargs):
    """
    Execute any command of ejabberd's API, see https://docs.ejabberd.im/developer/ejabberd-api/admin-api/.

    command
        (string) The command's name.
    timeout
        (integer, seconds) How long to wait for the answer. Default: 60
    kwargs
        The command's arguments, by the names that ejabberd's documentation gives them.

    Returns what the command does: a string, number, list or dict; for commands that only succeed or fail, 0 or 1.

    Raises ``SaltInvocationError`` for an unknown command and wrong arguments, ``CommandExecutionError`` when the
    command failed or the API cannot be reached, and when a password would be written into ejabberd's log, which
    it is at the log level ``debug``.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.api get_roster user=juliet host=example.org
    """
    arguments = salt.utils.args.clean_kwargs(**kwargs)
    if {"password", "newpass"} & arguments.keys() and api("get_loglevel") == "debug":
        raise CommandExecutionError(
            f"{command} carries a password, and ejabberd's log level is debug, at which it would write it into {LOG}. "
            "Set the log level to info or less: ejabberdctl set_loglevel notice"
        )
    status_code, content_type, body = _post(f"/{_token()}/{command}/{API_VERSION}", arguments, timeout)
    if "json" not in content_type:
        raise CommandExecutionError(
            f"ejabberd's API at {HOST} does not know the secret in {_option('api_token_file', TOKEN_FILE)} "
            f"(HTTP {status_code}). Apply xmpp.ejabberd, which puts it into ejabberd's configuration."
        )
    answer = json.loads(body) if body else None
    if status_code == 200:
        return answer
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    if status_code == 404 and answer in ("Endpoint not found.", "Command not found."):
        raise SaltInvocationError(
            f"ejabberd has no command {command}. Either the name is wrong, or the module that brings it is not in "
            "ejabberd's configuration (mod_admin_extra, mod_muc_admin)."
        )
    if status_code == 400 and str(answer).startswith(("Request have", "Arg ", "Invalid JSON")):
        raise SaltInvocationError(f"ejabberd's command {command}, called with {sorted(arguments)}: {answer}")
    if status_code == 400 and answer == "400 Bad Request":
        raise CommandExecutionError(
            f"ejabberd could not make sense of the call of {command} with {sorted(arguments)}, or could not write its "
            "answer as JSON (24.12 with Erlang 27 cannot for lists of names and values; ejabberdctl can)."
        )
    if status_code in (401, 403):
        raise CommandExecutionError(
            f"ejabberd does not permit {command}: {answer} Its api_permissions must allow mod_http_api from {HOST}."
        )
    raise CommandExecutionError(
        f"ejabberd's command {command} failed: {answer} (HTTP {status_code}). See {LOG}."
    )


def version():
    """
    Return the version of the ejabberd that is installed, such as ``24.12``, whether it runs or not.

    Raises ``CommandExecutionError`` when ejabberd is not installed.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.version
    """
    for path in glob.glob(APPLICATION):
        with open(path, encoding="utf-8") as file:
            found = re.search(r'\{vsn,\s*"(\d+\.\d+)', file.read())
        if found:
            return found.group(1)
    raise CommandExecutionError(f"ejabberd is not installed: there is no {APPLICATION}.")


def status():
    """
    Return whether ejabberd runs, and as what.

    Returns a dict: ``running`` (bool), and if it runs ``node``, ``version`` and ``status`` (``started`` once it is
    ready), else ``reason``. That it does not run is no error.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.status
    """
    try:
        text = api("status", timeout=10)
    except CommandExecutionError as error:
        return {"running": False, "reason": str(error)}
    found = re.search(r"The node '?([^\s']+)'? is \S+ Status: (\S+)\s+ejabberd (\S+) is running", text)
    if not found:
        return {"running": False, "reason": f"ejabberd says: {text}"}
    node, state, release = found.groups()
    return {"running": state == "started", "node": node, "status": state, "version": release, "reason": text}


def started(timeout=120, since=None):
    """
    Wait until ejabberd has started and its API answers.

    timeout
        (number, seconds) How long to wait at most. Default: 120
    since
        (number, seconds since 1970) When its start began: errors that it has logged since then are told. Default: now

    Returns what :func:`status` returns. Raises ``CommandExecutionError`` after the timeout, with the errors that
    ejabberd has logged meanwhile.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.started timeout=30
    """
    begin = time.time()
    since = since or begin
    while True:
        seen = status()
        if seen["running"]:
            return seen
        if time.time() - begin >= timeout:
            errors = logged_errors(since - 1)
            raise CommandExecutionError(
                f"ejabberd is not ready after {timeout} s: {seen['reason']}"
                + (f" It has logged:\n{errors}" if errors else "")
            )
        time.sleep(0.1)


def start(name="ejabberd", restart=False, timeout=120):
    """
    Start or restart ejabberd's service, and wait until it is ready.

    name
        (string) The service. Default: ejabberd
    restart
        (bool) Restart it. Default: False
    timeout
        (number, seconds) How long to wait at most, once the service manager is done. Default: 120

    Returns what :func:`status` returns. Raises ``CommandExecutionError``, with the errors that ejabberd has logged.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.start restart=True
    """
    begin = time.time()
    try:
        __salt__["service.restart" if restart else "service.start"](name)
    except CommandExecutionError as error:
        # systemd only says that it failed.
        errors = logged_errors(begin - 1)
        raise CommandExecutionError(
            f"The service {name} did not start: {error}" + (f"\nIt has logged:\n{errors}" if errors else "")
        ) from error
    return started(timeout, since=begin)


def logged_errors(since=0, lines=10):
    """
    Return the newest errors in ejabberd's log, as text.

    since
        (number, seconds since 1970) Only what was logged since then. Default: 0
    lines
        (integer) How many of them at most. Default: 10

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.logged_errors
    """
    found = []
    with contextlib.suppress(FileNotFoundError), open(LOG, "rb") as log:
        log.seek(max(0, os.path.getsize(LOG) - 262144))
        for line in log.read().decode("utf-8", "replace").splitlines():
            match = re.match(r"(\S+ \S+) \[(error|critical|alert|emergency)\]", line)
            if match:
                with contextlib.suppress(ValueError):
                    if datetime.datetime.fromisoformat(match.group(1)).timestamp() >= since:
                        found.append(line)
    return "\n".join(found[-lines:])


def reload_():
    """
    Make the running ejabberd read its configuration file and its certificates again. No connection is dropped.

    Returns True. Raises ``CommandExecutionError`` with ejabberd's reason when it does not accept the file; it then
    goes on with what it had. Some options need a restart, see :func:`ejabberd_config.config_restart_options`.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.reload
    """
    # First: a name without a file of its own is served all the same, one with a file that is gone is not.
    __salt__["ejabberd.forget_names"]()
    begin = time.time()
    if api("reload_config", timeout=300) == 0:
        return True
    reason = logged_errors(begin - 1) or f"see {LOG}"
    raise CommandExecutionError(f"ejabberd did not accept its configuration and goes on with the former one: {reason}")


def connected_users(host=None):
    """
    Return the sessions of all nodes, a list of full JIDs (``user@host/resource``).

    host
        (string) Only this virtual host's. Default: all

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.connected_users example.org
    """
    if host is None:
        return sorted(api("connected_users"))
    return sorted(api("connected_users_vhost", host=host))


def stats(host=None):
    """
    Return ejabberd's counters, a dict of integers.

    host
        (string) Count for this virtual host only: ``registeredusers`` and ``onlineusers``. Default: for the whole
        service, with ``onlineusersnode``, ``uptimeseconds`` and ``processes`` of this node.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.stats
    """
    if host is None:
        return {name: api("stats", name=name) for name in STATISTICS}
    return {name: api("stats_host", name=name, host=host) for name in HOST_STATISTICS}


def _spool():
    with contextlib.suppress(FileNotFoundError), open(DEFAULTS, encoding="utf-8") as file:
        found = re.findall(r"^\s*SPOOL_DIR=(\S+)", file.read(), re.MULTILINE)
        if found:
            return found[-1].strip("\"'")
    return "/var/lib/ejabberd"


def _running_configuration():
    # ejabberd writes the file itself, so it must be where no one else can read: its spool.
    path = os.path.join(_spool(), f"configuration-{secrets.token_hex(8)}.yml")
    try:
        api("dump_config", out=path)
        with open(path, encoding="utf-8") as file:
            return salt.utils.yaml.safe_load(file)
    except FileNotFoundError as error:
        raise CommandExecutionError(f"ejabberd has not written its running configuration to {path}.") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def modules(host=None):
    """
    Return the names of the modules that the running ejabberd has, sorted.

    host
        (string) The virtual host. Default: the first

    Raises ``SaltInvocationError`` for an unknown virtual host.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.modules example.org
    """
    configuration = _running_configuration()
    hosts = configuration["hosts"]
    host = host or hosts[0]
    if host not in hosts:
        raise SaltInvocationError(f"{host} is no virtual host of ejabberd. It has: {', '.join(hosts)}")
    own = configuration.get("host_config", {}).get(host, {})
    appended = configuration.get("append_host_config", {}).get(host, {})
    return sorted({**own.get("modules", configuration.get("modules", {})), **appended.get("modules", {})})


def certificates():
    """
    Return the certificates that the running ejabberd serves, as it took them from its configuration.

    Returns a list of dicts: ``names`` (what it is valid for, sorted), ``issuer``, ``not_before`` and ``not_after``
    (ISO 8601), ``days_left`` (integer), ``sha256`` (the certificate's fingerprint, hex).

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.certificates
    """
    # Not at the top: this file is loaded for every function of the module.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    found = []
    for path in sorted(glob.glob(os.path.join(_spool(), "certs", "*"))):
        with open(path, "rb") as file:
            # ejabberd writes the server's certificate first, then those that lead to the root, then the key.
            certificate = x509.load_pem_x509_certificate(file.read())
        try:
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            names = extension.value.get_values_for_type(x509.DNSName)
        except x509.ExtensionNotFound:
            names = [name.value for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        found.append(
            {
                "names": sorted(names),
                "issuer": certificate.issuer.rfc4514_string(),
                "not_before": certificate.not_valid_before_utc.isoformat(),
                "not_after": certificate.not_valid_after_utc.isoformat(),
                "days_left": (certificate.not_valid_after_utc - now).days,
                "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
            }
        )
    return found
