"""
The names for which the running ejabberd has certificates
==========================================================

ejabberd tells its TLS library which file it has for which name, and never that a name is gone (24.12 to 26.07:
``fast_tls_add_certfiles`` in ejabberd_pkix.erl). So where a certificate for ``conference.example.org`` gives way to one
for ``*.example.org``, the library goes on with the former file, which is deleted, and refuses each new connection.
"""

import pwd
import re
import subprocess

from salt.exceptions import CommandExecutionError

__virtualname__ = "ejabberd"

USER = "ejabberd"
DEFAULTS = "/etc/default/ejabberd"
UNTOLD = "ejabberd cannot be told which names are gone"
# Runs in the server: what it has is compared with what its files have now.
PROGRAM = r"""
Files = [File || Pattern <- ejabberd_option:certfiles(),
                 File <- filelib:wildcard(unicode:characters_to_list(Pattern))],
New = [Name || File <- Files, {ok, Certificates, _} <- [pkix:read_file(File)],
               Certificate <- maps:keys(Certificates), Name <- pkix:extract_domains(Certificate)],
Gone = [Name || {Name, _} <- pkix:get_certfiles(), not lists:member(Name, New)],
lists:foreach(fun fast_tls:delete_certfile/1, Gone),
lists:flatten(lists:join(" ", [binary_to_list(Name) || Name <- Gone])).
"""


def __virtual__():
    return __virtualname__


def forget_names():
    """
    Make the running ejabberd's TLS forget the names that its certificate files do not have any longer. Until the reload
    that must follow, it serves them with the certificate of the domain. :func:`ejabberd.reload <ejabberd.reload_>` does
    both.

    Returns a list of the names, empty where none is gone.

    Raises ``CommandExecutionError`` when ejabberd cannot be told; then all is as it was.

    Source: erl_call(1).

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.forget_names
    """
    account = pwd.getpwnam(USER)
    try:
        done = subprocess.run(
            ["erl_call", "-r", *_where(), "-timeout", "30", "-e"],
            input=PROGRAM,
            capture_output=True,
            encoding="utf-8",
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            # The cookie is in the home of ejabberd's user.
            env={"PATH": "/usr/bin:/bin", "HOME": account.pw_dir, "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except OSError as error:
        raise CommandExecutionError(f"{UNTOLD}: erl_call as {USER}: {error}") from error
    found = re.fullmatch(r'\{ok, (?:"(.*)"|\[\])\}', done.stdout.strip())
    if done.returncode or not found:
        raise CommandExecutionError(
            f"{UNTOLD}: {(done.stderr.strip() or done.stdout.strip())[:1000]}. "
            f"See that it runs, and that {DEFAULTS} says where (ERL_DIST_PORT); a restart of ejabberd does it, too."
        )
    return (found.group(1) or "").split()


def _where():
    """The options by which erl_call finds the node."""
    with open(DEFAULTS, encoding="utf-8") as file:
        settings = dict(re.findall(r"^\s*(?:export\s+)?(\w+)=[\"']?([^\"'\n]*)", file.read(), re.MULTILINE))
    if settings.get("ERL_DIST_PORT"):
        return ["-address", f"{settings.get('INET_DIST_INTERFACE') or 'localhost'}:{settings['ERL_DIST_PORT']}"]
    node = __salt__["ejabberd.status"]()["node"]
    return ["-name" if "." in node.partition("@")[2] else "-sname", node]
