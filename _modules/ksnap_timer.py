"""
Work by the clock
=================

A systemd timer, and the service that it starts: a function of Salt's. Not Salt's own schedule: that needs a running
minion, and a machine set up by ``salt-call --local`` has none; a timer also makes up for what it missed while the
machine was off, and its log is where an operator looks first.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "ksnap"

FOLDER = "/etc/systemd/system"
SERVICE = """\
# Made by Salt; changes here are lost.
[Unit]
Description={about}
{after}
[Service]
Type=oneshot
ExecStart={command}
"""
TIMER = """\
# Made by Salt; changes here are lost.
[Unit]
Description={about}

[Timer]
OnCalendar={calendar}
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def __virtual__():
    return __virtualname__


def salt_call(function, *arguments, root="/"):
    """
    The command line by which a unit of systemd's calls a function of this minion, without asking a master.

    function
        (string) The function.
    arguments
        (strings) What it is given.
    root
        (string) Where the system is mounted in which the unit will be. Default: /, the running one

    Returns a string, quoted as systemd.service(5) has it. Raises ``CommandExecutionError`` when that system has no
    ``salt-call`` where this one has it, nor beside its Python.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.salt_call ksnap.recover
    """
    here = os.path.dirname(sys.executable)
    places = [os.path.join(here, "salt-call"), os.path.join(os.path.dirname(here), "salt-call")]
    places += filter(None, [shutil.which("salt-call")])
    there = [os.path.join(root, path.lstrip("/")) for path in places]
    program = next((path for path, at in zip(places, there, strict=True) if os.access(at, os.X_OK)), None)
    if not program:
        raise CommandExecutionError(
            f"There is no {' and no '.join(there)}: systemd could not run {function}. Install it, or link it there."
        )
    config = os.path.dirname(__opts__.get("conf_file") or "/etc/salt/minion")
    words = [program, "--local", f"--config-dir={config}", "--retcode-passthrough", function, *arguments]
    return " ".join(map(_quoted, words))


def timer_present(name, calendar, about, command, after=None, test=False):
    """
    Let a systemd timer run a command.

    name
        (string) What to call the units, ``<name>.service`` and ``<name>.timer``.
    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    about
        (string) What ``systemctl list-timers`` shows.
    command
        (string) The command line, as :func:`salt_call` returns it.
    after
        (string) The unit that it needs started before, such as ``network-online.target``. Default: none
    test
        (bool) Only say what would change. Default: False

    Returns a dict of each unit that changed to a dict of ``old`` and ``new`` text. The timer is enabled and started.

    Raises ``SaltInvocationError`` for a wrong ``calendar``, ``CommandExecutionError`` when systemd does not take the
    timer.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.timer_present scrub monthly 'Read all of tank' '/sbin/zpool scrub tank'
    """
    _run("systemd-analyze", "calendar", str(calendar), wrong=f"{calendar!r} is no time for systemd.time(7)")
    timer = f"{name}.timer"
    texts = {
        f"{name}.service": SERVICE.format(
            about=about, command=command, after=f"After={after}\nWants={after}\n" if after else ""
        ),
        timer: TIMER.format(about=about, calendar=calendar),
    }
    has = {unit: _read(unit) for unit in texts}
    changes = {unit: {"old": has[unit], "new": text} for unit, text in texts.items() if has[unit] != text}
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


def timer_absent(name, test=False):
    """
    Take back what :func:`timer_present` did.

    name
        (string) What the units are called.
    test
        (bool) Only say what would change. Default: False

    Returns a list of the units that were removed. Raises ``CommandExecutionError`` when systemd cannot stop the timer.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.timer_absent scrub
    """
    there = [unit for unit in (f"{name}.timer", f"{name}.service") if _read(unit) is not None]
    if there and not test:
        if f"{name}.timer" in there:
            _run("systemctl", "disable", "--now", f"{name}.timer")
        for unit in there:
            os.unlink(os.path.join(FOLDER, unit))
        _run("systemctl", "daemon-reload")
    return there


def _quoted(word):
    # systemd.service(5): C escapes within double quotes; % and $ are doubled.
    text = str(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[^A-Za-z0-9_./:=%-]", text) else text


def _read(unit):
    with contextlib.suppress(FileNotFoundError), open(os.path.join(FOLDER, unit), encoding="utf-8") as file:
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
