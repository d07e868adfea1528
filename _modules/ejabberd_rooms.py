"""
ejabberd's rooms
================

Persistent chat rooms (XEP-0045), by the API's commands of mod_muc_admin.
"""

import contextlib
import os
import re
import subprocess
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ejabberd"

# What each option takes. ejabberd itself does not check: it would store the word "yes" as it stands.
SWITCHES = set(
    "allow_change_subj allow_query_users allow_subscription allow_user_invites allow_visitor_nickchange "
    "allow_visitor_status allow_voice_requests anonymous captcha_protected enable_hats logging mam members_by_default "
    "members_only moderated password_protected persistent public public_list".split()
)
NUMBERS = {"max_users", "voice_request_min_interval"}
TEXTS = {"title", "description", "password", "lang", "pubsub", "vcard"}
CHOICES = {
    "allowpm": ("anyone", "participants", "moderators", "none"),
    "allow_private_messages_from_visitors": ("anyone", "moderators", "nobody"),
}
AFFILIATIONS = ("owner", "admin", "member", "outcast", "none")


def __virtual__():
    return __virtualname__


def room_options_checked(options):
    """
    Return room options as ejabberd writes them: a dict of text, ``true`` and ``false`` for switches.

    options
        (dict) Options as given in YAML.

    Raises ``SaltInvocationError`` that names every option that ejabberd does not have, and every wrong value.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.room_options_checked '{"title": "The balcony", "public": true}'
    """
    wrong, checked = [], {}
    for name, value in (options or {}).items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if name in SWITCHES:
            valid, expected = text in ("true", "false"), "true or false"
        elif name in NUMBERS:
            valid, expected = re.fullmatch(r"\d+", text), "a number"
        elif name in CHOICES:
            valid, expected = text in CHOICES[name], "one of " + ", ".join(CHOICES[name])
        elif name in TEXTS:
            valid, expected = isinstance(value, str | int), "text"
        else:
            known = sorted(SWITCHES | NUMBERS | TEXTS | CHOICES.keys())
            wrong.append(f"{name} is no option of a room (there are: {', '.join(known)})")
            continue
        if not valid:
            shown = "" if name == "password" else f" is {value!r},"
            wrong.append(f"{name}{shown} must be {expected}")
        checked[name] = text
    if wrong:
        raise SaltInvocationError("Wrong room options: " + "; ".join(wrong))
    return checked


def rooms(service="global"):
    """
    Return the addresses of all rooms, also of those that sleep in the database, sorted. Where mod_muc has
    ``preload_rooms: false``, ejabberd does not tell of rooms that nobody has entered since its start.

    service
        (string) Only the rooms of this service, such as ``conference.example.org``. Default: of all

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.rooms conference.example.org
    """
    # ejabberd asks for those that went to sleep before "now less so many days", in whole seconds: with 0, it misses one
    # that did in this very second. Those that are awake are asked for second: so one that wakes up in between is there.
    asleep = __salt__["ejabberd.api"]("rooms_unused_list", service=service, days=-1)
    awake = __salt__["ejabberd.api"]("muc_online_rooms", service=service)
    return sorted({*awake, *asleep})


def room_exists(name, service):
    """
    Return whether there is this room, awake or asleep.

    name
        (string) The part of the room's address before the @.
    service
        (string) The part after it, such as ``conference.example.org``.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.room_exists balcony conference.example.org
    """
    try:
        room_affiliations(name, service)
    except CommandExecutionError as error:
        if "does not exist" in str(error):
            return False
        raise
    return True


def room_options(name, service):
    """
    Return a room's options, a dict of text as ejabberd writes it; an empty one if there is no such room.

    name
        (string) The part of the room's address before the @.
    service
        (string) The part after it, such as ``conference.example.org``.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.room_options balcony conference.example.org
    """
    if not room_exists(name, service):
        return {}
    try:
        answer = __salt__["ejabberd.api"]("get_room_options", name=name, service=service)
    except CommandExecutionError as error:
        if "Erlang 27" not in str(error):
            raise
        return _room_options_by_ctl(name, service)
    # 24.12 with an older Erlang gives a dict, later releases a list.
    return answer if isinstance(answer, dict) else {option["name"]: option["value"] for option in answer}


def _room_options_by_ctl(name, service):
    done = subprocess.run(
        ["ejabberdctl", "get_room_options", name, service],
        capture_output=True,
        encoding="utf-8",
        # Erlang writes what the locale says; a service has none.
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        check=False,
    )
    if done.returncode:
        raise CommandExecutionError(
            f"The options of {name}@{service} cannot be asked for: {done.stderr.strip() or done.stdout.strip()}"
        )
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


def room_affiliations(name, service):
    """
    Return who is what in a room: a dict of addresses to ``owner``, ``admin``, ``member`` or ``outcast``.

    name
        (string) The part of the room's address before the @.
    service
        (string) The part after it.

    Raises ``CommandExecutionError`` when there is no such room.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.room_affiliations balcony conference.example.org
    """
    answer = __salt__["ejabberd.api"]("get_room_affiliations", name=name, service=service)
    return {f"{each['username']}@{each['domain']}".lstrip("@"): each["affiliation"] for each in answer}


def create_room(name, service, host=None, options=None, affiliations=None):
    """
    Make a room.

    name
        (string) The part of its address before the @.
    service
        (string) The part after it, such as ``conference.example.org``.
    host
        (string) The virtual host that the service belongs to. Default: the service's name without its first label
    options
        (dict) Its options, see :func:`room_options`. Default: ``persistent: true``, and what mod_muc has as
        ``default_room_options``. An option ``persistent: false`` lets the room go with its last occupant.
    affiliations
        (dict) Addresses, and what they are: ``owner``, ``admin``, ``member`` or ``outcast``. Default: none

    Returns True. Raises ``CommandExecutionError`` when the room exists, or ejabberd does not make it.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.create_room balcony conference.example.org options='{"title": "The balcony"}'
    """
    checked = room_options_checked({"persistent": True, **(options or {})})
    host = host or service.split(".", 1)[-1]
    result = __salt__["ejabberd.api"](
        "create_room_with_opts",
        room=name,
        service=service,
        host=host,
        options=[{"name": option, "value": value} for option, value in checked.items()],
    )
    if result != 0:
        raise CommandExecutionError(f"ejabberd has not made the room {name}@{service}.")
    if affiliations:
        change_room(name, service, affiliations=affiliations)
    return True


def change_room(name, service, options=None, affiliations=None):
    """
    Change a room's options, and who is what in it.

    name
        (string) The part of its address before the @.
    service
        (string) The part after it.
    options
        (dict) The options that shall differ, see :func:`room_options`.
    affiliations
        (dict) Addresses, and what they shall be: ``owner``, ``admin``, ``member``, ``outcast`` or ``none``.

    Returns True. Raises ``CommandExecutionError`` when there is no such room, or ejabberd does not make the change.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.change_room balcony conference.example.org options='{"public": false}'
    """
    for address, affiliation in (affiliations or {}).items():
        if affiliation not in AFFILIATIONS:
            raise SaltInvocationError(f"{address} cannot be {affiliation!r} in a room, but {', '.join(AFFILIATIONS)}.")
    for option, value in room_options_checked(options).items():
        result = __salt__["ejabberd.api"]("change_room_option", name=name, service=service, option=option, value=value)
        if result != 0:
            raise CommandExecutionError(f"ejabberd has not changed {option} of the room {name}@{service}.")
    for address, affiliation in (affiliations or {}).items():
        result = __salt__["ejabberd.api"](
            "set_room_affiliation", name=name, service=service, jid=address, affiliation=affiliation
        )
        if result != 0:
            raise CommandExecutionError(f"ejabberd has not made {address} {affiliation} of the room {name}@{service}.")
    return True


def destroy_room(name, service):
    """
    Remove a room, with its archive, and everyone from it.

    name
        (string) The part of its address before the @.
    service
        (string) The part after it.

    Returns True. Raises ``CommandExecutionError`` when there is no such room.

    CLI Example:

    .. code-block:: bash

        salt '*' ejabberd.destroy_room balcony conference.example.org
    """
    if __salt__["ejabberd.api"]("destroy_room", name=name, service=service) == 0:
        # ejabberd answers before the room has gone, and calls to one that is going fail.
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(CommandExecutionError):
                if not room_exists(name, service):
                    return True
            time.sleep(0.05)
    raise CommandExecutionError(f"ejabberd has not removed the room {name}@{service}.")
