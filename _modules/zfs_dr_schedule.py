"""
Replication by the clock
========================

A systemd timer for each stack and target, as ``ksnap.schedule`` has them for snapshots and for the same reasons: it
needs no running minion, makes up for what it missed while the machine was off, and its log is where an operator looks.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "zfs_dr"

FOLDER = "/etc/systemd/system"
SERVICE = """\
# Made by Salt (zfs_dr.replicated); changes here are lost.
[Unit]
Description=Replication of the stack {stack} to {target} (zfs_dr)
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
ExecStart={command}
"""
TIMER = """\
# Made by Salt (zfs_dr.replicated); changes here are lost.
[Unit]
Description=Replications of the stack {stack} to {target} (zfs_dr)

[Timer]
OnCalendar={calendar}
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def __virtual__():
    return __virtualname__


def periodic(stack, target, take=True, grid=None, count=None):
    """
    Replicate, then prune: what the timer of :func:`schedule` runs.

    stack
        (string or dict) As :func:`zfs_dr.replicate` takes it.
    target
        (string or dict) As :func:`zfs_dr_side.target` takes it. Where it is on this machine and has a ``grid``, it is
        pruned by that; another machine prunes itself.
    take
        (bool) As :func:`zfs_dr.replicate` takes it. Default: True.
    grid, count
        What to keep of the stack's own snapshots, see ``ksnap.prune``. Default: everything

    Returns a dict: ``snapshot`` (the set that is whole at the target now), ``bytes`` (moved), ``destroyed`` (a list of
    the stack's sets that went here) and ``destroyed_there`` (of those that went at the target).

    Raises as :func:`zfs_dr.replicate` does.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.periodic web vault grid='24x1h | 14x1d'
    """
    target = __salt__["zfs_dr.target"](target)
    done = __salt__["zfs_dr.replicate"](stack, target, take=take)
    told = {"snapshot": done["snapshot"], "bytes": done["bytes"], "destroyed": [], "destroyed_there": []}
    if grid is not None or count is not None:
        chosen = __salt__["ksnap.prune"](stack, grid, count)
        told["destroyed"] = [each["snapshot"] for each in chosen if each["action"] == "destroy"]
    if target["grid"]:
        name, _ = __salt__["zfs_dr.members"](stack, target)
        gone = __salt__["zfs_dr.prune"](target["dataset"], name, target["grid"])
        told["destroyed_there"] = list(gone["destroyed"])
    return told


def _refuse(target, take, grid, count):
    if target["grid"]:
        __salt__["ksnap.grid_parsed"](target["grid"])
        if target["ssh"] and target["direction"] == "push":
            raise SaltInvocationError(
                "A target on another machine is pruned there (zfs_dr.pruned): a source that may destroy its replicas "
                "is no safety. Leave its grid out here."
            )
    if grid is not None:
        __salt__["ksnap.grid_parsed"](grid)
    if target["direction"] == "pull" and (take or grid is not None or count is not None):
        raise SaltInvocationError(
            "The snapshots of a stack that is pulled are taken and pruned on its own machine: say take=False, and no "
            "grid and count"
        )


def schedule(calendar, stack, target, take=True, grid=None, count=None, test=False):
    """
    Let a systemd timer replicate a stack, and prune.

    calendar
        (string) When, as systemd.time(7) has it: ``hourly``, ``*:0/15``, ``03:30``.
    stack, target, take, grid, count
        As :func:`periodic` takes them. Names are looked up now, and what they stand for is written into the unit: the
        timer asks no master.
    test
        (bool) Only say what would change. Default: False

    Returns a dict of each unit that changed to a dict of ``old`` and ``new`` text. The units are
    ``zfs_dr-<target>-<stack>.service`` and ``.timer``; the timer is enabled and started.

    Raises ``SaltInvocationError`` for wrong arguments, ``CommandExecutionError`` when systemd does not take the timer.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.schedule hourly web vault grid='24x1h | 14x1d'
    """
    target = __salt__["zfs_dr.target"](target)
    stack_name, datasets = __salt__["zfs_dr.members"](stack, target)
    _refuse(target, take, grid, count)
    _run("systemd-analyze", "calendar", str(calendar), wrong=f"{calendar!r} is no time for systemd.time(7)")
    declared = __salt__["config.get"]("ksnap:stacks")[stack] if isinstance(stack, str) else stack
    if target["direction"] == "pull":
        declared = {"datasets": datasets}
    arguments = {"take": take, "grid": grid, "count": count}
    words = [_salt_call(), "--local", f"--config-dir={_config()}", "--retcode-passthrough", "zfs_dr.periodic"]
    words += [json.dumps(each, sort_keys=True) for each in ({"name": stack_name, **declared}, target)]
    words += [f"{key}={value}" for key, value in arguments.items() if value is not None]
    names = {"stack": stack_name, "target": target["id"]}
    service, timer = _units(stack_name, target)
    texts = {
        service: SERVICE.format(**names, command=" ".join(map(_quoted, words))),
        timer: TIMER.format(**names, calendar=calendar),
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


def unschedule(stack, target, test=False):
    """
    Take back what :func:`schedule` did. Snapshots and replicas stay.

    stack, target
        As :func:`schedule` took them.
    test
        (bool) Only say what would change. Default: False

    Returns a list of the units that were removed.

    CLI Example:

    .. code-block:: bash

        salt '*' zfs_dr.unschedule web vault
    """
    target = __salt__["zfs_dr.target"](target)
    units = _units(__salt__["zfs_dr.members"](stack, target)[0], target)
    there = [unit for unit in units if _read(unit) is not None]
    if there and not test:
        _run("systemctl", "disable", "--now", units[1])
        for unit in there:
            os.unlink(os.path.join(FOLDER, unit))
        _run("systemctl", "daemon-reload")
    return there


def _units(stack, target):
    name = f"zfs_dr-{target['id']}-{stack}"
    return f"{name}.service", f"{name}.timer"


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
