"""Our minion, asked as `salt-call` would: plain functions, and `state.apply` with each state shown as it ends."""

import json
import time
from pathlib import Path

import settings
from screen import Stop, run

DPKG_LOG = Path("/var/log/dpkg.log")
LIVE_SALT_CALL = Path(__file__).with_name("live_salt_call.py")


class Minion:
    def __init__(self, salt, place, screen):
        self.salt, self.place, self.screen = salt, place, screen
        self.log = str(place.logs / "bootstrap.log")
        self.pillar = place.pillar

    @property
    def command(self):
        """How a person calls this minion."""
        return f"{self.salt.program} -c {self.place.config}"

    def call(self, function, *arguments, doing, do=None, on_fact=None):
        """Return what the function returns; Stop with its words, and what to do, if it raises."""
        argv = [self.salt.python, str(LIVE_SALT_CALL), "-c", str(self.place.config), "--local"]
        argv += ["--pillar-root", str(self.pillar), "--out=json", "--log-level=quiet", function, *arguments]
        code, output, errors = run(
            self.screen, argv, self.log, doing, env={"PYTHONWARNINGS": "ignore"}, on_fact=on_fact or (lambda line: None)
        )
        try:
            return json.loads(output[output.index("{") :])["local"]
        except (ValueError, KeyError):
            said = errors or output or f"exit code {code}, and not a word"
            reason = said.partition("\n\nUsage:")[0].rstrip(".")
            for before in (f"Error running '{function}': ", "Passed invalid arguments: "):
                reason = reason.removeprefix(before)
            raise Stop(reason, do or f"look into the logs in {settings.LOGS}", 2 if do else 1) from None

    def apply(self, formula, test=False):
        """Apply a formula and return its states as a list of dicts in the order in which they ran."""
        show = _Show(self.screen)
        arguments = [formula, "test=True"] if test else [formula]
        doing = f"working out the states of `{formula}`"
        states = self.call("state.apply", *arguments, doing=doing, on_fact=show.fact)
        if not isinstance(states, dict):
            raise Stop("\n".join(states if isinstance(states, list) else [str(states)]), "mend what it names", 1)
        tags = sorted(states, key=lambda tag: states[tag].get("__run_num__", 0))
        return [_named(tag, states[tag], show) for tag in tags]


def _named(tag, state, show):
    module, identity, _, function = tag.split("_|-")
    identity = state.get("__id__", identity)
    more = {"said": show.said.get(identity, ""), "unknown": identity in show.unknown}
    return {**state, "id": identity, "function": f"{module}.{function}", **more}


class _Show:
    """Makes lines for the screen of what live_salt_call.py tells."""

    def __init__(self, screen):
        self.screen, self.count = screen, 0
        self.present, self.function = None, ""  # of the state that runs
        self.said = {}  # state: what a program said that failed in it
        self.lacking = False  # in test mode: packages that would be installed are not there
        self.unknown = set()  # the states that failed in test mode after that, and prove nothing by it

    def fact(self, line):
        fact = json.loads(line)
        if "said" in fact:
            self.said[self.present] = fact["said"]
            return
        if "begins" in fact:
            self.present, self.function = fact["begins"], fact["what"]
            self.screen.now(f"{fact['begins']} ({fact['what']})", more=_dpkg_since(time.time()))
            return
        self.count += 1
        identity = fact["ended"] or self.present  # a state that Salt could not even call has no id in its return
        word = self._word(fact, identity)
        place = f"{self.count}/{max(fact['total'], self.count)}"
        seconds = float(str(fact["milliseconds"]).split()[0]) / 1000
        name = "" if fact["name"] == identity else fact["name"].partition("\n")[0][:60]
        self.screen.say(f"    {place:>8} {seconds:6.1f} s  {word:9} {identity:28}  {name}".rstrip())
        self.screen.now("the next state")

    def _word(self, fact, identity):
        if fact["result"] is None and self.function.endswith(".installed"):
            self.lacking = True
        if fact["result"] is False and self.lacking:
            self.unknown.add(identity)
            return "unknown"
        return outcome(fact)


def _dpkg_since(start):
    """A function that says what dpkg did last, if it did anything since then: packages take most of the time."""

    def last():
        try:
            if DPKG_LOG.stat().st_mtime < start:
                return None
            with DPKG_LOG.open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - 400))
                return " ".join(log.read().decode(errors="replace").splitlines()[-1].split()[2:5])
        except (OSError, IndexError):
            return None

    return last


def outcome(fact):
    """One word for a state's end: ok, changed, would (change), skipped or FAILED."""
    if fact["result"] is False:
        return "skipped" if fact.get("skipped") else "FAILED"
    if fact["result"] is None:
        return "would"
    return "changed" if fact["changed"] else "ok"
