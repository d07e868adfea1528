"""The six steps from a bare Debian machine to a working XMPP server. `bootstrap --help` tells them."""

import argparse
import fcntl
import os
import shlex
import shutil
import sys
from pathlib import Path

import install_salt
import machine
import report
import settings
from minion import Minion, outcome
from screen import Screen, Stop

LOCK = "/run/xmpp-bootstrap.lock"
AGAIN = "sudo ./bootstrap"


def main():
    os.umask(0o022)  # users that states run commands as must be able to run Salt's Python
    screen = Screen()
    passing = None
    try:
        options = read_options()
        _lock()
        screen.say(f"XMPP on this machine ({machine.description()})")
        passing = settings.passing_place() if options.test else None
        return work(screen, options, passing or settings.REAL)
    except Stop as stop:
        screen.done()
        first, *more = stop.reason.splitlines() or [""]
        _end([f"Stopped: {first}", *(f"         {line}" for line in more[-15:]), f"Do:      {stop.do}"])
        return stop.code
    except KeyboardInterrupt:
        screen.done()
        _end([f"Interrupted. Run again: {AGAIN}    It goes on from there."])
        return 130
    finally:
        if passing:
            shutil.rmtree(passing.config.parent)


def work(screen, options, place):
    screen.step(1, "Salt")
    salt = install_salt.find(screen)
    if not salt and options.test:
        return tell_what_installation_would_do(screen)
    if not options.test:
        settings.LOGS.mkdir(parents=True, exist_ok=True)
        log = str(settings.LOGS / "bootstrap.log")
        salt = salt or install_salt.install(screen, log)
        install_salt.tidy(screen, log)
    screen.say(f"      Salt {salt.version}: {salt.program}")
    if options.salt_only:
        screen.say("\nSalt is there, and nothing else was done, as --salt-only asks.")
        return 0

    screen.step(2, "Configuration of a minion without a master")
    identity = options.node or settings.minion_id() or machine.node_name(options.domain or settings.own_domain())
    changed = settings.write_minion(place, identity)
    screen.say(f"      {settings.CONFIG}/minion: minion {identity}, {_written(changed, options.test)}")
    minion = Minion(salt, place, screen)

    screen.step(3, "Pillar")
    plan, changed = agree_on_pillar(screen, options, place, minion)
    screen.say(f"      {settings.CONFIG}/pillar/xmpp.sls: {changed}")
    screen.say(f"      domain {plan['domain']}, node {plan['node']}, roles {', '.join(plan['roles'])}")

    screen.step(4, "What would change" if options.test else "Making it so")
    states = minion.apply("xmpp", test=options.test)
    count = sum(1 for state in states if outcome_of(state) in ("changed", "would"))
    if report.failed_states(states):
        _end(report.failure(states, plan, AGAIN))
        return 1
    if options.test:
        unknown = sum(1 for state in states if state["unknown"])
        screen.say(f"\n{count} of {len(states)} states would change something. Nothing was changed.")
        if unknown:
            screen.say(f"What {unknown} more would do cannot be told before the packages are there that they need.")
        return 0
    changed = f"{len(states)} states, {count} changed{'' if count else ': nothing had to be done'}."

    screen.step(5, "Proof")
    proof = minion.call("xmpp.check", doing="logging in, sending a message, reading the archive, uploading a file")
    for probe in proof["probes"]:
        screen.say(f"      {probe['result']:11} {probe['what']}")
    if not proof["ok"]:
        _end(report.not_proven(proof, plan, AGAIN))
        return 1

    screen.step(6, "Done")
    records = minion.call("xmpp.dns_records", "format=zone", "missing=True", doing="asking the DNS").splitlines()
    screen.say("\n".join(report.success(plan, proof, records, minion, changed)))
    return 0


def read_options():
    parser = _Parser(add_help=False, allow_abbrev=False)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--domain", type=str.lower)
    given.add_argument("--pillar", type=Path)
    parser.add_argument("--node", type=str.lower)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--salt-only", action="store_true")
    options = parser.parse_args()
    for name in ("domain", "node"):
        value = getattr(options, name)
        if value and not machine.is_domain(value):
            raise Stop(f"--{name} {value}: this is no host name", "give one like example.org: letters, digits, - and .")
    if options.node and "." not in options.node:
        raise Stop(f"--node {options.node}: a node has a full name", f"give one like {options.node}.example.org")
    if options.pillar:
        try:
            options.pillar = options.pillar.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Stop(f"--pillar {options.pillar}: {error}", "give a text file like pillar.example") from error
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Stop(message, "see ./bootstrap --help")


def agree_on_pillar(screen, options, place, minion):
    """Find the pillar, have it checked, and only then put it in its place. Return the plan, and a word about it."""
    known = settings.known_pillar()
    if options.pillar or not known:
        domain = options.domain or settings.own_domain()
        text = options.pillar or settings.made_pillar(domain, options.node or machine.node_name(domain))
        settings.offer_pillar(place, text)
        minion.pillar = place.candidate
    elif options.test:
        settings.copy_pillar(place)
    minion.call("saltutil.sync_all", doing="giving Salt the modules of this checkout")
    try:
        plan = minion.call("xmpp.plan", doing="checking the pillar", do="mend the pillar; the service was not touched")
        _same("--domain", options.domain, plan["domain"])
        if options.node not in (None, plan["node"], plan["minion"]):
            _same("--node", options.node, plan["node"])
    except Stop:
        settings.drop_candidate(place)
        raise
    if minion.pillar == place.pillar:
        return plan, "as it was"
    changed = settings.take_pillar(place)
    minion.pillar = place.pillar
    return plan, _written(changed, options.test) + ("" if options.pillar else ", made for this machine")


def _same(option, given, found):
    if given not in (None, found):
        raise Stop(
            f"{option} {given}: the pillar of this machine says {found}",
            f"leave {option} away, or change {settings.CONFIG}/pillar/xmpp.sls: the pillar decides",
        )


def tell_what_installation_would_do(screen):
    debian = install_salt.packages_needed()
    packages = f", with Debian's {' '.join(debian)}" if debian else ""
    screen.say(f"      Would install {install_salt.WANTED} from PyPI into {install_salt.HOME}{packages}")
    screen.say("\nNothing was changed. What the formula would change only Salt can work out, and it is not here:")
    screen.say("run ./bootstrap --salt-only, and then ./bootstrap --test")
    return 0


def outcome_of(state):
    return outcome({"result": state["result"], "changed": bool(state.get("changes"))})


def _written(changed, test):
    if not changed:
        return "as it was"
    return "would be written" if test else "written"


def _lock():
    descriptor = os.open(LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Stop("another bootstrap runs on this machine", "wait until it has ended") from None


def _end(lines):
    """What must be the last lines, wherever output and errors go."""
    sys.stdout.flush()
    print("\n".join(["", *lines]) if lines[0] else "\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sudo = ["sudo"] if "SUDO_USER" in os.environ else []
    AGAIN = shlex.join([*sudo, f"{settings.CHECKOUT}/bootstrap", *sys.argv[1:]])
    sys.exit(main())
