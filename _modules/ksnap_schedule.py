"""
Snapshots by the clock
======================

A systemd timer for each stack, which takes a snapshot and prunes. Not Salt's own schedule: that needs a running minion,
and a machine set up by ``salt-call --local`` has none; a timer also makes up for what it missed while the machine was
off, and its log is where an operator looks first.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

FOLDER = "/etc/systemd/system"
NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
SERVICE = """\
# Made by Salt (ksnap.scheduled); changes here are lost.
[Unit]
Description=Snapshot of the stack {name}, and pruning (ksnap)

[Service]
Type=oneshot
ExecStart={command}
"""
TIMER = """\
# Made by Salt (ksnap.scheduled); changes here are lost.
[Unit]
Description=Snapshots of the stack {name} (ksnap)

[Timer]
OnCalendar={calendar}
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def __virtual__():
    return __virtualname__


def periodic(stack, label="periodic", grid=None, count=None, free=None):
    """
    Take a snapshot, then prune: what the timer of :func:`schedule` runs.

    stack
        (string or dict) The stack.
    label
        (string) The snapshot's label. Default: periodic
    grid, count, free
        What to keep, see ``ksnap.prune``. Default: everything

    Returns a dict: ``snapshot`` (its name) and ``destroyed`` (a list of names).

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.periodic mail grid='24x1h | 14x1d'
    """
    taken = __salt__["ksnap.snapshot"](stack, label=label, reason="by the clock")["snapshot"]
    destroyed = []
    if grid is not None or count is not None or free is not None:
        chosen = __salt__["ksnap.prune"](stack, grid, count, free)
        destroyed = [each["snapshot"] for each in chosen if each["action"] == "destroy"]
    return {"snapshot": taken, "destroyed": destroyed}


def schedule(name, calendar, stack=None, label="periodic", grid=None, count=None, free=None, test=False):
    """
    Let a systemd timer take snapshots of a stack, and prune them.

    name
        (string) What to call it, and the stack if none is given. The units are ``ksnap-<name>.service`` and ``.timer``.
    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    stack
        (string or dict) The stack. A name must be in the minion's own configuration: the timer asks no master.
        Default: the stack of the name ``name``
    label, grid, count, free
        See :func:`periodic`.
    test
        (bool) Only say what would change. Default: False

    Returns a dict of each unit that changed to a dict of ``old`` and ``new`` text; the timer is enabled and started in
    any case.

    Raises ``SaltInvocationError`` for wrong arguments, ``CommandExecutionError`` when systemd does not take the timer.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.schedule mail hourly grid='24x1h | 14x1d'
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SaltInvocationError(f"name must be of letters, digits, and _.:-, not {name!r}")
    _run("systemd-analyze", "calendar", str(calendar), wrong=f"{calendar!r} is no time for systemd.time(7)")
    if grid is not None:
        __salt__["ksnap.grid_parsed"](grid)
    wanted = stack or name
    __salt__["ksnap.stack"](wanted)
    arguments = {"label": label, "grid": grid, "count": count, "free": free}
    words = [_salt_call(), "--local", f"--config-dir={_config()}", "--retcode-passthrough", "ksnap.periodic"]
    words.append(wanted if isinstance(wanted, str) else json.dumps(wanted))
    words += [f"{key}={value}" for key, value in arguments.items() if value is not None]
    texts = {
        f"ksnap-{name}.service": SERVICE.format(name=name, command=" ".join(map(_quoted, words))),
        f"ksnap-{name}.timer": TIMER.format(name=name, calendar=calendar),
    }
    changes = {}
    for unit, text in texts.items():
        old = _read(os.path.join(FOLDER, unit))
        if old != text:
            changes[unit] = {"old": old, "new": text}
    timer = f"ksnap-{name}.timer"
    if not changes and _on(timer):
        return {}
    changes = changes or {timer: {"old": "stopped", "new": "started"}}
    if not test:
        for unit, text in texts.items():
            with open(os.path.join(FOLDER, unit), "w", encoding="utf-8") as file:
                file.write(text)
        _run("systemctl", "daemon-reload")
        _run("systemctl", "enable", timer)
        _run("systemctl", "restart", timer)
    return changes


def unschedule(name, test=False):
    """
    Take back what :func:`schedule` did. Snapshots stay.

    name
        (string) Its name.
    test
        (bool) Only say what would change. Default: False

    Returns a list of the units that were removed.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.unschedule mail
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SaltInvocationError(f"name must be of letters, digits, and _.:-, not {name!r}")
    units = [f"ksnap-{name}.timer", f"ksnap-{name}.service"]
    there = [unit for unit in units if os.path.exists(os.path.join(FOLDER, unit))]
    if there and not test:
        _run("systemctl", "disable", "--now", units[0])
        for unit in there:
            os.unlink(os.path.join(FOLDER, unit))
        _run("systemctl", "daemon-reload")
    return there


def _quoted(word):
    # systemd.service(5): C escapes within double quotes; % and $ are doubled.
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[^A-Za-z0-9_./:=%-]", text) else text


def _salt_call():
    here = os.path.dirname(sys.executable)
    places = [os.path.join(here, "salt-call"), os.path.join(os.path.dirname(here), "salt-call")]
    found = next((path for path in places if os.access(path, os.X_OK)), shutil.which("salt-call"))
    if not found:
        raise CommandExecutionError(f"There is no salt-call beside {sys.executable}, nor in the PATH.")
    return found


def _config():
    return os.path.dirname(__opts__.get("conf_file") or "/etc/salt/minion")


def _read(path):
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        return file.read()
    return None


def _on(timer):
    return all(
        subprocess.run(["systemctl", "--quiet", word, timer], check=False).returncode == 0
        for word in ("is-enabled", "is-active")
    )


def _run(*words, wrong=None):
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode and wrong:
        raise SaltInvocationError(f"{wrong}: {done.stderr.strip()}")
    if done.returncode:
        raise CommandExecutionError(f"{' '.join(words)} failed: {done.stderr.strip() or done.returncode}")
