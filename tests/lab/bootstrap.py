"""The command of the README, run on a host of the lab as a user does."""

import re
import socket
import ssl
import subprocess
import time
from types import SimpleNamespace

from . import service

COMMAND = f"{service.CHECKOUT_THERE}/bootstrap"
STATE = re.compile(r"^ +(\d+)/(\d+) +\d+\.\d s  (ok|changed|would|unknown|skipped|FAILED) +\S")
PROVEN = "serves XMPP, and was proven to."
# Not what even a run that changes nothing writes to: caches, logs, and what the running service keeps.
WATCHED = "/etc /opt /usr /root /boot /var/www /var/lib/dpkg /var/lib/apt/lists"


def run(host, *words):
    """Run the command as a user does; return its exit code, its output, and the longest time without a word."""
    process = host.popen(COMMAND, *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines, silent, before = [], 0.0, time.monotonic()
    for line in process.stdout:
        now = time.monotonic()
        silent, before = max(silent, now - before), now
        lines.append(line.decode(errors="replace").rstrip("\n"))
    return SimpleNamespace(code=process.wait(), text="\n".join(lines), lines=lines, silent=silent)


def states(done):
    """Return the outcomes of the states that a run showed, as a list of words."""
    return [found.group(3) for line in done.lines if (found := STATE.match(line))]


def last(done, count=20):
    return "\n".join(done.lines[-count:])


class Untouched:
    """Fails if anything was written in what is watched, but for ``except_for``, a regular expression of paths."""

    def __init__(self, host, except_for="$^"):
        self.host, self.except_for = host, re.compile(except_for)

    def __enter__(self):
        self.host.sh("sleep 0.1; touch /run/before; sleep 0.1")
        self.names = self._names()

    def __exit__(self, *error):
        newer = self.host.sh(f"find {WATCHED} -newer /run/before -not -type d 2>/dev/null || true").stdout.split("\n")
        changed = {name for name in [*newer, *(self.names ^ self._names())] if name and not self.except_for.match(name)}
        assert error[0] or not changed, changed

    def _names(self):
        return set(self.host.sh(f"find {WATCHED} 2>/dev/null || true").stdout.splitlines())


def tls_answers(host, domain, ca):
    """Connect to port 5223 from here, and verify the certificate for ``domain``."""
    context = ssl.create_default_context(cadata=ca)
    with socket.create_connection((host.address, 5223), 10) as plain:
        context.wrap_socket(plain, server_hostname=domain).close()
