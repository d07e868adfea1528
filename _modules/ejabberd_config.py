"""
ejabberd's configuration file
=============================

A configuration is tried by ejabberd itself before the running server sees it: its loader runs in an Erlang machine of
its own that joins no cluster, listens nowhere and writes nothing but to a directory that goes with it. When the new
file does not work in the running server all the same, the former one comes back.
"""

import base64
import contextlib
import glob
import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time

from salt.exceptions import CommandExecutionError, SaltRenderError

__virtualname__ = "ejabberd"

USER = "ejabberd"
PATH = "/etc/ejabberd/ejabberd.yml"
SERVICE = "ejabberd"
LIBRARIES = "/usr/lib/*/ejabberd-*"
DEFAULTS = "/etc/default/ejabberd"

# What a running ejabberd reads at its start, or when it connects, only: reload_config takes the rest.
RESTART_OPTIONS = (
    "cluster_backend",
    "cluster_nodes",
    "default_ram_db",
    "new_sql_schema",
    "oauth_db_type",
    "oom_watermark",
    "queue_dir",
    "router_db_type",
    "sm_db_type",
    "sql_database",
    "sql_keepalive_interval",
    "sql_odbc_driver",
    "sql_password",
    "sql_port",
    "sql_queue_type",
    "sql_schema_multihost",
    "sql_server",
    "sql_ssl",
    "sql_ssl_cafile",
    "sql_ssl_certfile",
    "sql_ssl_verify",
    "sql_type",
    "sql_username",
)

# Loads one file after the other as ejabberd does when it starts, up to the certificates, and prints a line for each
# finding: its kind, then text in base64.
PROGRAM = r"""
Say = fun(Kind, Text) ->
          io:format("~s ~s~n", [Kind, base64:encode(unicode:characters_to_binary(Text))])
      end,
logger:remove_handler(default),
application:load(ejabberd),
{ok, Apps} = application:get_key(ejabberd, included_applications),
[application:ensure_all_started(App) || App <- Apps, not lists:member(App, [mnesia, lager, os_mon])],
Certificates = fun() ->
    Patterns = case ejabberd_option:certfiles() of undefined -> []; List -> List end,
    Files = lists:flatmap(
        fun(Pattern) ->
            case filelib:wildcard(unicode:characters_to_list(Pattern)) of
                [] -> Say("warning", ["certfiles: there is no ", Pattern, ", or ejabberd may not read it"]), [];
                Found -> [unicode:characters_to_binary(File) || File <- Found]
            end
        end, Patterns),
    Bad = [{File, Reason} || File <- lists:usort(Files), {error, Reason} <- [pkix:add_file(File)]],
    {Unfit, CA} = case pkix:commit(os:getenv("CHECK_DIR") ++ "/certs", [{cafile, ejabberd_option:ca_file()}]) of
        {ok, Errors, _Warnings, CAError} -> {Errors, CAError};
        {error, Where, Why} -> {[{Where, Why}], undefined}
    end,
    Explain = fun(Reason) ->
        try pkix:format_error(Reason) catch _:_ -> io_lib:format("~p", [Reason]) end
    end,
    [Say("error", ["certfiles: ", File, ": ", Explain(Reason)])
     || {File, Reason} <- Bad ++ Unfit],
    case CA of
        {CAFile, CAReason} -> Say("warning", ["ca_file: ", CAFile, ": ", Explain(CAReason)]);
        _ -> ok
    end,
    [pkix:del_file(File) || File <- Files]
end,
Restart = [list_to_atom(Name) || Name <- string:tokens(os:getenv("CHECK_OPTIONS"), " ")],
lists:foreach(
    fun(File) ->
        catch ets:delete(ejabberd_options),
        application:set_env(ejabberd, config, File),
        Say("file", File),
        case ejabberd_config:load() of
            ok ->
                Certificates(),
                [Say("listen", io_lib:format("~s ~B", [Transport, Port]))
                 || {{Port, _, Transport}, _, _} <- ejabberd_option:listen(), is_integer(Port)],
                [Say("option", io_lib:format("~s ~w ~w", [Name, Host, erlang:phash2(Value, 4294967296)]))
                 || {{Name, Host}, Value} <- ets:tab2list(ejabberd_options), lists:member(Name, Restart)];
            Error ->
                Say("error", ejabberd_config:format_error(Error))
        end
    end, string:tokens(os:getenv("CHECK_FILES"), "\n")),
Say("done", ""),
halt(0, [{flush, true}]).
"""


def __virtual__():
    return __virtualname__


def _environment(directory, files):
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": pwd.getpwnam(USER).pw_dir,
        "LC_ALL": "C.UTF-8",
        "ERL_CRASH_DUMP": "/dev/null",
        "CHECK_DIR": directory,
        "CHECK_FILES": "\n".join(files),
        "CHECK_OPTIONS": " ".join(RESTART_OPTIONS),
    }
    # Modules from ejabberd-contrib bring options of their own; these say where they are.
    with contextlib.suppress(FileNotFoundError), open(DEFAULTS, encoding="utf-8") as file:
        for name, value in re.findall(r"^\s*(?:export\s+)?((?:CONTRIB|EJABBERD_MACRO)_\w+)=(.*)$", file.read(), re.M):
            environment[name] = value.strip().strip("\"'")
    return environment


def _load(paths):
    # What ejabberd finds in each of the files: errors, warnings, options, and where it would listen.
    libraries = glob.glob(LIBRARIES)
    if not libraries:
        raise CommandExecutionError(f"ejabberd is not installed: there is no {LIBRARIES}.")
    with tempfile.TemporaryDirectory(prefix="ejabberd-check-") as directory:
        os.chmod(directory, 0o700)
        copies = {}
        for number, path in enumerate(paths):
            # The name's end tells ejabberd that it is YAML.
            copy = os.path.join(directory, f"{number}.yml")
            try:
                shutil.copyfile(path, copy)
            except OSError as error:
                raise CommandExecutionError(f"{path} cannot be read: {error.strerror}") from error
            copies[copy] = path
            shutil.chown(copy, USER, USER)
        shutil.chown(directory, USER, USER)
        environment = _environment(directory, copies)
        environment["ERL_LIBS"] = os.path.dirname(libraries[0])
        try:
            done = subprocess.run(
                ["erl", "-noinput", "-boot", "start_clean", "-hidden", "-eval", PROGRAM],
                capture_output=True,
                text=True,
                encoding="utf-8",
                user=USER,
                group=USER,
                extra_groups=os.getgrouplist(USER, pwd.getpwnam(USER).pw_gid),
                cwd=directory,
                env=environment,
                timeout=120,
                check=False,
            )
        except (OSError, LookupError, subprocess.TimeoutExpired) as error:
            raise CommandExecutionError(
                f"The configuration cannot be tried: erl as {USER} says {error}. Salt must run as root."
            ) from error
    found, current = {}, None
    finished = False
    for line in done.stdout.splitlines():
        kind, _, encoded = line.partition(" ")
        if kind not in ("file", "error", "warning", "option", "listen", "done"):
            continue
        text = base64.b64decode(encoded).decode()
        finished = finished or kind == "done"
        if kind == "file":
            current = found[copies[text]] = {"errors": [], "warnings": [], "options": {}, "listen": set()}
        elif kind == "option":
            name, where, value = text.split(" ", 2)
            current["options"].setdefault(name, {})[where] = value
        elif kind == "listen":
            current["listen"].add(text)
        elif kind != "done":
            for copy, path in copies.items():
                text = text.replace(copy, path)
            current[f"{kind}s"].append(text)
    if not finished:
        raise CommandExecutionError(
            f"ejabberd's loader broke off at {', '.join(paths)}: {(done.stderr or done.stdout).strip()[:2000]}"
        )
    return found


def config_check(path=PATH):
    """
    Try a configuration file with the installed ejabberd, without touching the running one: its YAML, every option and
    value, its includes, and that the certificates it names can be used. Takes about a second.

    path
        (string) The file. Default: /etc/ejabberd/ejabberd.yml

    Returns a dict: ``valid`` (bool), ``errors`` and ``warnings`` (lists of text, in ejabberd's own words).

    Raises ``CommandExecutionError`` when it cannot be tried: there is no such file, or ejabberd is not installed.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.config_check /root/new.yml
    """
    found = _load([path])[path]
    return {"valid": not found["errors"], "errors": found["errors"], "warnings": found["warnings"]}


def config_restart_options(former, new):
    """
    Return the options in which two configuration files differ and that a running ejabberd reads at its start only.

    former, new
        (string) The files.

    Returns a sorted list of names, empty where a reload is enough.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.config_restart_options /etc/ejabberd/ejabberd.yml /root/new.yml
    """
    return _restart_options(_load([former, new]), former, new)


def _restart_options(found, former, new):
    if found[former]["errors"]:
        # ejabberd cannot be running with it.
        return ["everything"]
    first, second = found[former]["options"], found[new]["options"]
    # A host that comes or goes is what a reload is for: only what both files have can differ.
    hosts = {host for values in first.values() for host in values}
    hosts &= {host for values in second.values() for host in values}
    return sorted(
        name
        for name in first.keys() | second.keys()
        if any(first.get(name, {}).get(host) != second.get(name, {}).get(host) for host in hosts)
    )


def config_render(source, template=None, context=None, defaults=None, secrets=None, saltenv="base"):
    """
    Render a configuration file into a temporary one.

    source
        (string) Where it comes from: ``salt://...``, or a path.
    template
        (string) The renderer: ``jinja``. Default: none, the file is taken as it is
    context, defaults
        (dict) The template's variables; the first go before the second.
    secrets
        (dict) Further variables, to the files that hold their values: ``{api_token: /etc/...}``. So no secret stands
        in an SLS file. In test mode, a file that does not exist yet counts as 64 zeros.
    saltenv
        (string) The environment that ``salt://`` means. Default: base

    Returns the path of the rendered file, which only root can read, and which the caller has to remove.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.config_render salt://xmpp/ejabberd/files/ejabberd.yml template=jinja
    """
    values = dict(context or {})
    for name, path in (secrets or {}).items():
        try:
            with open(path, encoding="utf-8") as file:
                values[name] = file.read().rstrip("\n")
        except OSError as error:
            if not (__opts__.get("test") and isinstance(error, FileNotFoundError)):
                raise CommandExecutionError(f"The secret {name} is not in {path}: {error.strerror}") from error
            values[name] = "0" * 64
    try:
        rendered, _, comment = __salt__["file.get_managed"](
            name=PATH,
            template=template,
            source=source,
            source_hash="",
            source_hash_name=None,
            user=None,
            group=None,
            mode=None,
            attrs=None,
            saltenv=saltenv,
            context=values,
            defaults=defaults,
            skip_verify=False,
        )
    except SaltRenderError as error:
        raise CommandExecutionError(f"{source} cannot be rendered: {error}") from error
    if comment or not rendered:
        raise CommandExecutionError(f"{source} cannot be rendered: {comment or 'there is no such file'}")
    handle, path = tempfile.mkstemp(prefix="ejabberd-", suffix=".yml")
    os.close(handle)
    shutil.copyfile(rendered, path)
    if template:
        os.unlink(rendered)
    return path


def config_unfinished(name=PATH):
    """
    Return whether a change of the configuration was broken off before the running ejabberd had taken it.

    name
        (string) The configuration file. Default: /etc/ejabberd/ejabberd.yml

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.config_unfinished
    """
    return os.path.exists(_former(name))


def _former(name):
    return f"{name}.former"


def config_replace(name, new, user="root", group="ejabberd", mode="0640", timeout=120):
    """
    Put a configuration file in place, and make the running ejabberd take it: by a reload, or by a restart where only
    that will do. If ejabberd does not take it, the former file comes back, and ejabberd with it. If ejabberd does not
    run, the file is put in place.

    name
        (string) The file to replace.
    new
        (string) The file to put there, already checked.
    user, group, mode
        (string) Who owns it, and its mode. Default: root, ejabberd, 0640
    timeout
        (integer, seconds) How long ejabberd may take to be ready after a restart. Default: 120

    Returns a dict: ``applied`` (``reload``, ``restart``, or ``None`` where ejabberd does not run) and
    ``restart_options`` (the options that needed a restart).

    Raises ``CommandExecutionError`` when ejabberd did not take the file.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.config_replace /etc/ejabberd/ejabberd.yml /root/new.yml
    """
    former = _former(name)
    # A file that is left from a change that broke off is what the running server has.
    if os.path.exists(name) and not os.path.exists(former):
        _write(name, former)
    running = __salt__["ejabberd.status"]()["running"]
    # One whose API does not answer was started with another file than ours.
    active = running or __salt__["service.status"](SERVICE)
    found = _load([path for path in (former, new) if os.path.exists(path)])
    options = _restart_options(found, former, new) if running and former in found else []
    applied = None if not active else "reload" if running and not options else "restart"
    _write(new, name, user, group, mode)
    try:
        _take(applied, timeout)
        if applied:
            _require_listeners(found[new]["listen"], applied, timeout)
    except CommandExecutionError as error:
        outcome = "There was no former file to go back to."
        if os.path.exists(former):
            _write(former, name)
            try:
                back = "reload" if __salt__["ejabberd.status"]()["running"] else "restart"
                _take(back, timeout)
                _require_listeners(found[former]["listen"], back, timeout)
                outcome = "The former file is back, and ejabberd runs with it."
            except CommandExecutionError as again:
                outcome = f"The former file is back, but ejabberd does not run with it either: {again}"
        raise CommandExecutionError(f"ejabberd does not run with the new {name}: {error} {outcome}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(former)
    return {"applied": applied, "restart_options": options}


def _require_listeners(wanted, applied, timeout):
    # ejabberd only logs it when it cannot listen somewhere, and goes on. Where a listener's options change, it opens
    # the new socket while the former one may still be closing, and tries again at the next reload only (24.12 to 26.07:
    # config_reloaded in ejabberd_listener.erl).
    end = time.monotonic() + 5
    while missing := wanted - _listening(pwd.getpwnam(USER).pw_uid):
        if time.monotonic() > end:
            raise CommandExecutionError(
                f"It does not listen at {', '.join(sorted(missing))}. Has another program the port (ss -lntup)?"
            )
        time.sleep(0.1)
        if applied == "reload":
            _take(applied, timeout)


def _listening(uid):
    found = set()
    # The states of a TCP socket that listens and of a UDP socket without a peer, see proc_net_tcp in Linux's manual.
    for transport, state in (("tcp", "0A"), ("udp", "07")):
        for suffix in ("", "6"):
            with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{transport}{suffix}") as table:
                for line in list(table)[1:]:
                    fields = line.split()
                    if fields[3] == state and int(fields[7]) == uid:
                        found.add(f"{transport} {int(fields[1].rpartition(':')[2], 16)}")
    return found


def _take(applied, timeout):
    if applied == "reload":
        __salt__["ejabberd.reload"]()
    elif applied == "restart":
        __salt__["ejabberd.start"](SERVICE, restart=True, timeout=timeout)


def _write(source, target, user=None, group=None, mode=None):
    # Beside the target, so that it is replaced in one step. Without an owner and a mode: the source's.
    handle, path = tempfile.mkstemp(prefix=".ejabberd-", dir=os.path.dirname(target))
    with os.fdopen(handle, "wb") as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())
    seen = os.stat(source)
    shutil.chown(path, seen.st_uid if user is None else user, seen.st_gid if group is None else group)
    os.chmod(path, seen.st_mode & 0o777 if mode is None else int(str(mode), 8))
    os.replace(path, target)
