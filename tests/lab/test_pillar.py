"""A wrong pillar leaves the machine untouched: ``state.apply xmpp`` with each kind of mistake on a fresh one."""

import json

import pytest
import yaml

from . import service as library
from .library import CHECKOUT

WRONG = yaml.safe_load((CHECKOUT / "tests/wrong_pillars.yaml").read_text())
MINIMAL = {"domain": "example.org", "nodes": {library.NODE: None}}
SECRET = "TellNobody-7Jq"
# One process for all, for its start takes a second; what differs is the pillar that state.apply is given.
APPLY_EACH = """
import json, os, sys
import salt.client, salt.config

def files():
    found = {}
    own = ("/proc", "/sys", "/dev", "/run", "/tmp", "/srv", "/var/log", "/var/cache/salt", "/etc/salt/pki")
    for folder, folders, names in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(folder, name) not in own]
        for name in names + folders:
            path = os.path.join(folder, name)
            s = os.lstat(path)
            found[path] = (s.st_mode, s.st_uid, s.st_gid, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
    return found

def apply(pillar):
    return caller.cmd("state.apply", "xmpp", pillar={} if pillar is None else {"xmpp": pillar})

caller = salt.client.Caller(mopts=salt.config.minion_config("/etc/salt/minion"))
cases = json.load(sys.stdin)
apply(None)
before = files()
returns = {case: apply(pillar) for case, pillar in cases.items()}
after = files()
changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
print("\\n" + json.dumps({"returns": returns, "files": len(before), "changed": changed}))
"""


def merged(tree, fragment):
    """``fragment`` over ``tree``, as tests/wrong_pillars.yaml means it."""
    if not isinstance(fragment, dict) or not isinstance(tree, dict):
        return fragment
    deeper = {key: merged(tree.get(key), value) for key, value in fragment.items() if key != "nodes"}
    return {**tree, **deeper, **{key: value for key, value in fragment.items() if key == "nodes"}}


def running(host):
    """What listens, and the services that run."""
    return host.sh(
        "ss --no-header -tuln | sort; "
        "systemctl list-units --no-legend --plain --state=active | cut -d' ' -f1 | grep -v scope"
    ).stdout


@pytest.fixture(scope="module")
def applied(lab):
    """What each of the wrong pillars led to on one machine: ``{case: what state.apply returned}``."""
    host = library.host(lab, "trixie" + library.LAYERS)
    library.prepare(host)
    host.put(f"{library.PILLAR}/top.sls", "{}")
    host.put("/srv/apply_each.py", APPLY_EACH)
    # While ejabberd runs, Mnesia writes its files whenever it likes; that a state started it is seen all the same.
    host.sh("systemctl stop ejabberd")
    before = running(host)
    done = host.run(
        "/opt/salt-xmpp/bin/python3", "/srv/apply_each.py", timeout=600,
        input=json.dumps({case: merged(MINIMAL, wrong["pillar"]) for case, wrong in WRONG.items()}),
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    seen["services"] = before, running(host)
    # What a person sees of it.
    wrong = {"users": {"j@example.org": {"password": f"{SECRET}\n2"}}, "secrets": SECRET, "domian": "x"}
    library.prepare(host)
    library.give(host, **wrong)
    seen["call"] = library.apply(host), host.read("/var/log/salt/minion")
    yield seen
    host.destroy()


def test_at_least_thirty_kinds():
    assert len(WRONG) >= 30


@pytest.mark.parametrize("case", WRONG)
def test_the_mistake_is_told_and_no_state_ran(applied, case):
    wrong, returned = WRONG[case], applied["returns"][case]
    assert isinstance(returned, list), f"states ran: {returned}"
    told = "\n".join(returned)
    assert f"{wrong['path']}: " in told
    assert wrong["says"] in told
    assert "nothing was touched" in told
    assert SECRET not in told


def test_nothing_was_touched(applied):
    assert applied["files"] > 10000
    assert applied["changed"] == []
    before, after = applied["services"]
    assert before
    assert after == before


def test_what_salt_call_says_and_logs(applied):
    said, log = applied["call"]
    assert said.code != 0
    assert "The pillar has 3 mistakes; nothing was touched:" in said.text
    for path in ("xmpp:users:j@example.org:password: ", "xmpp:secrets: ", "xmpp:domian: "):
        assert path in said.text
        assert path in log
    assert SECRET not in said.text
    assert SECRET not in log
