"""
Who is in the way
=================
"""

import contextlib
import os
import stat
import subprocess

__virtualname__ = "ksnap"


def __virtual__():
    return __virtualname__


def users(path):
    """
    Tell which processes keep a file system or a volume busy: they stand there, run from there or have something open.

    path
        (string) Where the file system is mounted, or the volume's device.

    Returns a list of texts, each ``<name> (process <number>)``, the lowest number first.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.users /srv/mail
    """
    try:
        seen = os.stat(path)
    except OSError:
        return []
    kind = "st_rdev" if stat.S_ISBLK(seen.st_mode) else "st_dev"
    found = []
    for process in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        links = [f"/proc/{process}/{name}" for name in ("cwd", "root", "exe")]
        with contextlib.suppress(OSError):
            links += [f"/proc/{process}/fd/{name}" for name in os.listdir(f"/proc/{process}/fd")]
        # A process may end meanwhile.
        with contextlib.suppress(OSError):
            if any(_is_on(link, kind, getattr(seen, kind)) for link in links):
                with open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as file:
                    found.append(f"{file.read().strip()} (process {process})")
    return found


def _is_on(link, kind, number):
    try:
        return getattr(os.stat(link), kind) == number
    except OSError:
        return False


def running(services):
    """
    Tell which of some services run. Of one that others are a part of, as Debian's ``postgresql`` of its clusters, those
    too: it would be stopped before they are, and started though they are not.

    services
        (list) Their names, in the order in which they are stopped.

    Returns a list of names in that order.

    CLI Example:

    .. code-block:: bash

        salt '*' ksnap.running '[postgresql]'
    """
    found = []
    for service in services:
        found += [each for each in (service, *_parts_of(service)) if __salt__["service.status"](each)]
    return list(dict.fromkeys(found))


def _parts_of(service):
    if not os.path.isdir("/run/systemd/system"):
        return []
    unit = f"{service.removesuffix('.service')}.service"
    argv = ["systemctl", "show", "--property=ConsistsOf", "--value", unit]
    shown = subprocess.run(argv, capture_output=True, encoding="utf-8", check=False).stdout
    return sorted(name.removesuffix(".service") for name in shown.split() if name.endswith(".service"))
