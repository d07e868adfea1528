"""The service of pillar.example on a host of the lab, applied as a user of Salt would: masterless, by state.apply."""

import json
import os
import pathlib
import tempfile
import threading
import time

from .library import CHECKOUT, frozen

DOMAIN = "example.org"
NODE = "xmpp1.example.org"
ADDRESSES = ("192.0.2.10", "2001:db8::10")
NAMES = (DOMAIN, *(f"{label}.{DOMAIN}" for label in ("conference", "proxy", "pubsub", "upload")))
LAYERS = "+salt+apps"
SALT_CALL = "/opt/salt-xmpp/bin/salt-call"
CHECKOUT_THERE = "/srv/xmpp-formula"
PILLAR = "/srv/pillar"
SECRETS = "/etc/salt/xmpp/secrets"
MINION = f"""\
id: {NODE}
file_client: local
file_roots: {{base: [{CHECKOUT_THERE}, {CHECKOUT_THERE}/salt]}}
pillar_roots: {{base: [{PILLAR}]}}
"""
# Accounts besides the administrator's, with passwords that are found when they stand where they should not.
USERS = {
    f"juliet@{DOMAIN}": "JulietsPassword-2cbBJf9mXv",
    f"romeo@{DOMAIN}": "RomeosPassword-Qd0Uu7LkYz",
    f"nurse@{DOMAIN}": "NursesPassword-w5HoT3rPea",
}


def host(lab, layers, name=NODE, **options):
    """Return a host that is to be the service's machine, with the addresses and the names of pillar.example."""
    return lab.host(name, addresses=ADDRESSES, names=NAMES, layers=layers, **options)


def prepare(machine):
    """Make ``machine`` a masterless minion whose pillar is pillar.example, and a second file with accounts."""
    machine.put("/etc/salt/minion", MINION)
    machine.put(f"{PILLAR}/top.sls", "base: {'*': [xmpp, more]}\n")
    machine.put(f"{PILLAR}/xmpp.sls", (CHECKOUT / "pillar.example").read_text())
    give(machine)


def give(machine, **settings):
    """Set what the pillar says besides pillar.example: the accounts and ``settings``, keys of ``xmpp``."""
    users = {jid: {"password": password} for jid, password in USERS.items()}
    settings = {**settings, "users": {**users, **settings.get("users", {})}}
    machine.put(f"{PILLAR}/more.sls", json.dumps({"xmpp": settings}), mode="0600")


class Applied(dict):
    """What ``apply`` returns: ``{id of a state: what it returned}``, with ``code`` and ``text``, the whole output."""

    def changed(self):
        """Return what was changed, or would be: ``{id: (result, changes, comment)}``."""
        return {
            name: (state["result"], state["changes"], state["comment"])
            for name, state in self.items()
            if state["changes"] or state["result"] is None
        }

    def failed(self):
        """Return ``{id: comment}`` of the states that failed, without those that only required another."""
        return {
            name: state["comment"]
            for name, state in self.items()
            if state["result"] is False and "__sls__" in state and "requisite failed" not in state["comment"]
        }


def apply(machine, *arguments, log_level="warning"):
    """Apply the formula, or what ``arguments`` say, on ``machine``."""
    done = machine.run(
        SALT_CALL, "--local", "--retcode-passthrough", "--out=json", f"--log-level={log_level}", "state.apply",
        *(arguments or ["xmpp"]), check=False, timeout=600,
    )  # fmt: skip
    try:
        states = json.loads(done.stdout[done.stdout.index("{") :])["local"]
    except ValueError:
        states = [done.stdout]
    applied = Applied()
    if isinstance(states, dict):
        applied.update((state.get("__id__") or tag.split("_|-")[1], state) for tag, state in states.items())
    applied.code, applied.text = done.returncode, f"{done.stdout}\n{done.stderr}"
    return applied


def converged(lab, debian):
    """Return the disk of a machine of the release ``debian`` on which the formula was applied once.

    ``layers``: for ``host``; ``evidence``: the folder with what was seen meanwhile: return.json, argv.txt; ``seconds``.
    Made by whoever asks first in this run, on a lab that has no such machine yet.
    """

    def build():
        machine = host(lab, debian + LAYERS)
        prepare(machine)
        evidence = pathlib.Path(tempfile.mkdtemp(prefix="evidence-", dir=lab.folder.parent))
        started = time.monotonic()
        with Watch(evidence / "argv.txt"):
            applied = apply(machine, log_level="debug")
        seconds = round(time.monotonic() - started, 1)
        (evidence / "return.txt").write_text(applied.text)
        assert applied.code == 0 and applied, f"the first apply failed: {applied.failed()}\n{applied.text[-6000:]}"
        return {"layers": machine.freeze(), "evidence": str(evidence), "seconds": seconds}

    return frozen(f"converged-{debian}", build)


class Watch:
    """Writes down every command line of a process on this machine, hosts of the lab included, while it watches."""

    def __init__(self, file):
        self.file = file
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._end.set()
        self._thread.join()

    def _watch(self):
        seen, young = set(), {}
        with open(self.file, "wb") as file:
            while not self._end.wait(0.003):
                now = time.monotonic()
                pids = {name for name in os.listdir("/proc") if name.isdecimal()}
                for gone in young.keys() - pids:
                    del young[gone]
                for pid in pids:
                    # A process gets its command line when it executes, soon after it began.
                    if now - young.setdefault(pid, now) > 2:
                        continue
                    try:
                        with open(f"/proc/{pid}/cmdline", "rb") as command:
                            line = command.read()
                    except OSError:
                        continue
                    if line not in seen:
                        seen.add(line)
                        file.write(line.replace(b"\0", b" ") + b"\n")


def wait_for(true, timeout, what):
    """Call ``true()`` until it returns something true, which is returned; what it raises counts as not yet."""
    end = time.monotonic() + timeout
    while True:
        try:
            if seen := true():
                return seen
            last = seen
        except (OSError, AssertionError) as error:
            last = error
        assert time.monotonic() < end, f"not after {timeout} s: {what} ({last!r})"
        time.sleep(0.05)
