"""Who holds a port that the service needs. ejabberd does not say it: it ends, with an Erlang term in its log."""

import contextlib
from pathlib import Path

OURS = {"beam.smp", "epmd", "nginx", "postgres", "systemd"}
LISTENS = "0A"


def taken(wanted):
    """Return ``[(port, program, process id)]`` for each of these TCP ports that another program listens on."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in _lines(Path("/proc/net", table))[1:]:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            if fields[3] == LISTENS and port in wanted:
                sockets[f"socket:[{fields[9]}]"] = port
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        program = "".join(_lines(process / "comm"))
        if program in OURS:
            continue
        targets = set(_links(process / "fd"))
        found |= {(sockets[target], program, int(process.name)) for target in targets & sockets.keys()}
    return sorted(found)


def _links(directory):
    """The targets of the links in a directory, without those that are gone meanwhile."""
    with contextlib.suppress(OSError):
        for link in list(directory.iterdir()):
            with contextlib.suppress(OSError):
                yield str(link.readlink())


def _lines(path):
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
