"""What bootstrap has to know about this machine before there is Salt."""

import os
import platform
import re
import socket

LABEL = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
DOMAIN = re.compile(rf"{LABEL}(\.{LABEL})*")
NOT_REAL = ("localhost", "localdomain")


def description():
    """One line: the system, how it is started, its name."""
    started = "systemd" if has_systemd() else "no systemd"
    return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {started}, {socket.gethostname()}"


def has_systemd():
    """Whether systemd is PID 1."""
    return os.path.isdir("/run/systemd/system")


def is_domain(name):
    return len(name) <= 253 and bool(DOMAIN.fullmatch(name)) and not name.rpartition(".")[2].isdigit()


def full_host_name():
    """The machine's full host name (`hostname --fqdn`), or None where that is none which means this machine alone."""
    name = socket.gethostname()
    if "." not in name:
        try:
            name = socket.getaddrinfo(name, None, flags=socket.AI_CANONNAME)[0][3] or name
        except OSError:
            return None
    name = name.lower().rstrip(".")
    real = "." in name and is_domain(name) and name.rpartition(".")[2] not in NOT_REAL
    return name if real else None


def node_name(domain):
    """A full name for this machine as a node: its own, or else one made from its host name and the domain."""
    short = socket.gethostname().partition(".")[0].lower()
    if not re.fullmatch(LABEL, short) or short in NOT_REAL:
        short = "xmpp"
    return full_host_name() or f"{short}.{domain}"
