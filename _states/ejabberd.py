"""
ejabberd's accounts, rooms, configuration and being there
=========================================================

In test mode, every state says what it would do, having looked, and touches nothing. No password appears in a return.
"""

import difflib
import os

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ejabberd"


def __virtual__():
    return __virtualname__


def _result(name, result=True, comment="", changes=None):
    return {"name": name, "result": result, "comment": comment, "changes": changes or {}}


def _split(name):
    user, at, host = name.partition("@")
    if not (user and at and host) or "@" in host:
        raise SaltInvocationError(f"{name} must be an address like juliet@example.org.")
    return user, host


def _unreachable(name):
    # In test mode, before ejabberd is there for the first time: why it could not be asked, else None.
    if __opts__["test"]:
        seen = __salt__["ejabberd.status"]()
        if not seen["running"]:
            return _result(
                name, None, f"{name} would be looked at once ejabberd runs; now it cannot be asked: {seen['reason']}"
            )
    return None


def user_present(name, password=None, password_file=None, password_pillar=None, enforce_password=False):
    """
    There is an account.

    name
        (string) Its address: ``juliet@example.org``.
    password
        (string) Its password. Salt keeps rendered SLS files in its cache: prefer one of the next two.
    password_file
        (string) A file on the minion, which only root should read, with the password.
    password_pillar
        (string) Where the password is in the minion's pillar: ``xmpp:users:juliet@example.org:password``.
    enforce_password
        (bool) Whether an account that has another password gets this one. Default: False, for users change their
        passwords, and the next run must not undo that. With True, an administrator's password is the one given here.

    Exactly one of the three ways to give the password is needed.

    .. code-block:: yaml

        juliet@example.org:
          ejabberd.user_present:
            - password_file: /root/juliet
    """
    given = {"password": password, "password_file": password_file, "password_pillar": password_pillar}
    if sum(value is not None for value in given.values()) != 1:
        return _result(name, False, "Exactly one of password, password_file and password_pillar is needed.")
    try:
        user, host = _split(name)
        if unreachable := _unreachable(name):
            return unreachable
        exists = __salt__["ejabberd.user_exists"](user, host)
        if exists and not enforce_password:
            return _result(name, True, f"The account {name} exists.")
        if exists and __salt__["ejabberd.check_password"](user, host, **given):
            return _result(name, True, f"The account {name} exists and has this password.")
        old, new = ("another password", "this password") if exists else (None, "made")
        changes = {name: {"old": old, "new": new}}
        if __opts__["test"]:
            verb = "would get this password" if exists else "would be made"
            return _result(name, None, f"The account {name} {verb}.", changes)
        __salt__["ejabberd.change_password" if exists else "ejabberd.register"](user, host, **given)
        if not __salt__["ejabberd.check_password"](user, host, **given):
            return _result(name, False, f"The account {name} does not accept its password after it was set.", changes)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"The account {name} {'has got its password' if exists else 'was made'}.", changes)


def user_absent(name):
    """
    There is no such account. What ejabberd keeps for it goes with it.

    name
        (string) Its address: ``tybalt@example.org``.

    .. code-block:: yaml

        tybalt@example.org:
          ejabberd.user_absent: []
    """
    try:
        user, host = _split(name)
        if unreachable := _unreachable(name):
            return unreachable
        if not __salt__["ejabberd.user_exists"](user, host):
            return _result(name, True, f"There is no account {name}.")
        changes = {name: {"old": "there", "new": None}}
        if __opts__["test"]:
            return _result(name, None, f"The account {name} would be removed.", changes)
        __salt__["ejabberd.unregister"](user, host)
        if __salt__["ejabberd.user_exists"](user, host):
            return _result(name, False, f"The account {name} is still there after it was removed.")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"The account {name} was removed.", changes)


def users_present(name, users=None, users_pillar=None, **kwargs):
    """
    There are all these accounts. Made for thousands: one listing tells which are missing, and those are hashed on all
    cores and copied into the database at once. Accounts that exist stay as they are.

    name
        (string) A name for this state.
    users
        (list of dicts) Each has ``jid``, and one of ``password_file``, ``password_pillar``, ``password`` or ``scram``,
        as :func:`ejabberd_accounts.import_users` has them.
    users_pillar
        (string) Where the accounts are in the minion's pillar: ``xmpp:users``, a dict of addresses to such dicts,
        or a list of them. Those with ``present: false`` are left out. Nothing of it stands in the SLS file.
    kwargs
        ``scram_hash``, ``database``, ``runas``, ``db_host``, ``db_port``, ``db_user``, ``db_password_file``:
        see :func:`ejabberd_accounts.import_users`.

    .. code-block:: yaml

        accounts:
          ejabberd.users_present:
            - users_pillar: xmpp:users
    """
    options = {key: value for key, value in kwargs.items() if not key.startswith("__")}
    unknown = options.keys() - {"scram_hash", "database", "runas", "db_host", "db_port", "db_user", "db_password_file"}
    if unknown or (users is None) == (users_pillar is None):
        wrong = f"Unknown: {', '.join(sorted(unknown))}." if unknown else "One of users and users_pillar is needed."
        return _result(name, False, wrong)
    try:
        if unreachable := _unreachable(name):
            return unreachable
        missing, total = __salt__["ejabberd.missing_users"](users, users_pillar)
        if not missing:
            return _result(name, True, f"All {total} accounts exist.")
        changes = {"made": missing}
        if __opts__["test"]:
            return _result(name, None, f"Of {total} accounts, {len(missing)} would be made.", changes)
        made = __salt__["ejabberd.import_users"](users, users_pillar=users_pillar, only=missing, **options)
        left, _ = __salt__["ejabberd.missing_users"](users, users_pillar)
        if left:
            return _result(name, False, f"ejabberd does not know {len(left)} of them: {', '.join(left[:5])}")
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"Of {total} accounts, {len(made)} were made.", {"made": made})


def room_present(name, options=None, affiliations=None, host=None):
    """
    There is a persistent room with these options.

    name
        (string) Its address: ``balcony@conference.example.org``.
    options
        (dict) Its options by ejabberd's names: ``title``, ``public``, ``members_only``, ``max_users`` and so on. What
        is not named is left alone. Default: none, but ``persistent: true``
    affiliations
        (dict) Addresses, and what they are in it: ``owner``, ``admin``, ``member``, ``outcast`` or ``none``. Others
        are left alone. Default: none
    host
        (string) The virtual host of its service. Default: the service's name without its first label

    .. code-block:: yaml

        balcony@conference.example.org:
          ejabberd.room_present:
            - options: {title: The balcony, public: true}
            - affiliations: {juliet@example.org: owner}
    """
    try:
        room, service = _split(name)
        wanted = __salt__["ejabberd.room_options_checked"]({"persistent": True, **(options or {})})
        people = affiliations or {}
        if unreachable := _unreachable(name):
            return unreachable
        before = __salt__["ejabberd.room_options"](room, service)
        changes = _room_differences(room, service, before, wanted, people)
        if not changes:
            return _result(name, True, f"The room {name} is as it should be.")
        if __opts__["test"]:
            return _result(name, None, f"The room {name} would be {'changed' if before else 'made'}.", changes)
        if before:
            differing = {option: wanted[option] for option in changes.get("options", {})}
            chosen = {address: people[address] for address in changes.get("affiliations", {})}
            __salt__["ejabberd.change_room"](room, service, differing, chosen)
        else:
            __salt__["ejabberd.create_room"](room, service, host, wanted, people)
        after = __salt__["ejabberd.room_options"](room, service)
        left = _room_differences(room, service, after, wanted, people)
        if left:
            return _result(name, False, f"The room {name} is not as it should be after it was set: {left}", changes)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"The room {name} was {'changed' if before else 'made'}.", changes)


def _room_differences(room, service, seen, wanted, people):
    changes = {}
    if not seen:
        changes["room"] = {"old": None, "new": "made"}
    options = {
        option: "changed" if option == "password" else {"old": seen.get(option), "new": value}
        for option, value in wanted.items()
        if seen.get(option) != value
    }
    now = __salt__["ejabberd.room_affiliations"](room, service) if seen and people else {}
    affiliations = {
        address: {"old": now.get(address, "none"), "new": affiliation}
        for address, affiliation in people.items()
        if now.get(address, "none") != affiliation
    }
    if options:
        changes["options"] = options
    if affiliations:
        changes["affiliations"] = affiliations
    return changes


def room_absent(name):
    """
    There is no such room. Who is in it is sent out, and its archive is removed.

    name
        (string) Its address: ``balcony@conference.example.org``.

    .. code-block:: yaml

        balcony@conference.example.org:
          ejabberd.room_absent: []
    """
    try:
        room, service = _split(name)
        if unreachable := _unreachable(name):
            return unreachable
        if not __salt__["ejabberd.room_exists"](room, service):
            return _result(name, True, f"There is no room {name}.")
        changes = {name: {"old": "there", "new": None}}
        if __opts__["test"]:
            return _result(name, None, f"The room {name} would be removed.", changes)
        __salt__["ejabberd.destroy_room"](room, service)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"The room {name} was removed.", changes)


def config(
    name,
    source,
    template="jinja",
    context=None,
    defaults=None,
    secrets=None,
    user="root",
    group="ejabberd",
    mode="0640",
    show_changes=False,
    timeout=120,
    **kwargs,
):
    """
    ejabberd's configuration is this file, and the running ejabberd has taken it.

    The file is tried by ejabberd itself first. If it is wrong, the old one stays and the running server sees nothing
    of it. If it is right, it replaces the old one in one step; the running server reloads it, or restarts where an
    option needs that. If the server does not run with it all the same, the old one comes back. So no ``watch`` is
    needed. If ejabberd does not run, the file is put there for when it starts.

    name
        (string) The file: ``/etc/ejabberd/ejabberd.yml``.
    source
        (string) Where it comes from: ``salt://...``.
    template
        (string) Its renderer, or ``none``. Default: jinja
    context, defaults
        (dict) The template's variables.
    secrets
        (dict) Variables to the files on the minion that hold their values, so that none stands in an SLS file:
        ``{api_token: /etc/salt/xmpp/secrets/api_token}``.
    user, group, mode
        (string) Who owns the file, and its mode. Default: root, ejabberd, 0640
    show_changes
        (bool) Whether the return has a diff. Default: False, for the file may hold secrets
    timeout
        (integer, seconds) How long ejabberd may take to be ready after a restart. Default: 120

    .. code-block:: yaml

        /etc/ejabberd/ejabberd.yml:
          ejabberd.config:
            - source: salt://xmpp/ejabberd/files/ejabberd.yml
            - secrets: {api_token: /etc/salt/xmpp/secrets/api_token}
    """
    unknown = [key for key in kwargs if not key.startswith("__")]
    if unknown:
        return _result(name, False, f"Unknown: {', '.join(unknown)}.")
    rendered = None
    try:
        rendered = __salt__["ejabberd.config_render"](
            source,
            template=None if template in (None, "none") else template,
            context=context,
            defaults=defaults,
            secrets=secrets,
            saltenv=kwargs.get("__env__", "base"),
        )
        before, after = _content(name), _content(rendered)
        changes = {}
        if before != after:
            changes["configuration"] = _diff(name, before, after) if show_changes else "replaced" if before else "made"
        unfinished = __salt__["ejabberd.config_unfinished"](name)
        if before == after and not unfinished:
            return _owned(name, user, group, mode)
        installed = _installed()
        if installed:
            found = __salt__["ejabberd.config_check"](rendered)
            if not found["valid"]:
                reasons = "\n".join(error.replace(rendered, name) for error in found["errors"])
                return _result(
                    name, False, f"ejabberd does not accept this configuration; nothing was touched:\n{reasons}"
                )
        if __opts__["test"]:
            comment = f"{name} would be {'replaced' if before else 'made'}."
            if unfinished:
                comment = "ejabberd would be made to take the file, at which the last run broke off."
            if not installed:
                comment += " It was not tried, for ejabberd is not installed yet."
            return _result(name, None, comment, changes)
        done = __salt__["ejabberd.config_replace"](name, rendered, user, group, mode, timeout)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    finally:
        if rendered:
            os.unlink(rendered)
    comments = {
        "reload": "ejabberd has reloaded it.",
        "restart": "ejabberd was restarted for it.",
        None: "ejabberd does not run; it will start with it.",
    }
    comment = comments[done["applied"]]
    if done["applied"]:
        changes["ejabberd"] = {"reload": "reloaded", "restart": "restarted"}[done["applied"]]
    if done["restart_options"]:
        comment += f" A reload does not do for: {', '.join(done['restart_options'])}."
    return _result(name, True, f"{name} is in place. {comment}", changes)


def _installed():
    try:
        return bool(__salt__["ejabberd.version"]())
    except CommandExecutionError:
        return False


def _content(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _diff(name, before, after):
    lines = difflib.unified_diff(
        (before or "").splitlines(keepends=True), after.splitlines(keepends=True), f"{name} (old)", f"{name} (new)"
    )
    return "".join(lines)


def _owned(name, user, group, mode):
    ret = _result(name, True, f"{name} is in place.")
    ret, _ = __salt__["file.check_perms"](name, ret, user, group, mode)
    if ret["changes"]:
        verb = "would be" if __opts__["test"] else "were"
        ret["comment"] = f"{name} is in place; its owner and mode {verb} set."
    return ret


def spool(name, node):
    """
    ejabberd's spool is this node's own, or not made yet. Another node's is set aside: what must last is not in it.

    name
        (string) The directory: ``/var/lib/ejabberd``.
    node
        (string) The Erlang node: ``ejabberd@xmpp1.example.org``.

    .. code-block:: yaml

        /var/lib/ejabberd:
          ejabberd.spool:
            - node: ejabberd@xmpp1.example.org
    """
    found = __salt__["ejabberd.spool_node"](name)
    if found in (None, node):
        return _result(name, True, f"The spool is {node}'s." if found else "There is no spool yet.")
    changes = {"node": {"old": found, "new": None}}
    if __opts__["test"]:
        return _result(name, None, f"The spool of {found} would be set aside.", changes)
    try:
        kept = __salt__["ejabberd.spool_set_aside"](name)
    except CommandExecutionError as error:
        return _result(name, False, str(error))
    return _result(name, True, f"The spool of {found} was set aside, as {kept}.", changes)


def running(name="ejabberd", timeout=120, node=None, reload=True):
    """
    ejabberd has started and answers at its API. It is started if it does not run.

    name
        (string) The service. Default: ejabberd
    timeout
        (integer, seconds) How long it may take to be ready. Default: 120
    node
        (string) The Erlang node that it must be: ``ejabberd@xmpp1.example.org``. Default: any
    reload
        (bool) What it does when something under ``watch`` has changed: reload, which does for certificates, or
        restart. Default: True

    .. code-block:: yaml

        ejabberd:
          ejabberd.running:
            - node: ejabberd@xmpp1.example.org
            - watch:
              - file: /etc/ejabberd/certificate.pem
    """
    try:
        seen = __salt__["ejabberd.status"]()
        changes = {}
        if not seen["running"]:
            changes = {name: {"old": "not running", "new": "running"}}
            # It may be starting: then it needs time, not another start.
            active = __salt__["service.status"](name)
            if __opts__["test"]:
                verb = "is not ready yet, and would be waited for" if active else "would be started"
                return _result(name, None, f"{name} {verb}.", changes)
            if active:
                seen = __salt__["ejabberd.started"](timeout)
            else:
                seen = __salt__["ejabberd.start"](name, timeout=timeout)
        if node and seen["node"] != node:
            return _result(
                name,
                False,
                f"ejabberd runs as the node {seen['node']}, not {node}. A node's name is fixed at its first start: "
                "stop ejabberd and epmd, empty the spool /var/lib/ejabberd, and start it again.",
                changes,
            )
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    verb = "was started" if changes else "runs"
    return _result(name, True, f"ejabberd {seen['version']} {verb}, as {seen['node']}.", changes)


def mod_watch(name, sfun=None, reload=True, timeout=120, **kwargs):
    """
    Reload or restart ejabberd when something that is watched has changed. Salt calls it.
    """
    if sfun != "running":
        return _result(name, False, f"ejabberd.{sfun} does not do watch.")
    changes = {name: "reloaded" if reload else "restarted"}
    if __opts__["test"]:
        return _result(name, None, f"{name} would be {changes[name]}.", changes)
    try:
        if reload:
            __salt__["ejabberd.reload"]()
        else:
            __salt__["ejabberd.start"](name, restart=True, timeout=timeout)
    except (CommandExecutionError, SaltInvocationError) as error:
        return _result(name, False, str(error))
    return _result(name, True, f"{name} was {changes[name]}.", changes)
