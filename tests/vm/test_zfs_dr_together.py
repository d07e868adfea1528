"""Two at once, and processes that die in the middle: the lock, and what has arrived."""

import time

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE
from .zfs_dr import STACK, VAULT, replicate, same, why, write

pytestmark = ONE
# So slow that there is a middle.
SLOW = {**VAULT, "bandwidth": 1_000_000}


@pytest.fixture
def sending(here):
    """The machine with 8 MB of changes on each dataset, and a replication of them that is in the middle."""
    replicate(here, take=True)
    write(here, "more", "8M")
    future = here.begin(replicate, here, SLOW, take=True)
    until(lambda: progress(here) > 3_000_000)
    return here, future


def progress(machine):
    return (machine.call("zfs_dr.status", STACK, VAULT)["running"] or {"bytes": 0})["bytes"]


def until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def kill(machine, what):
    """Kill the one process of a kind for tank/web: ``send`` or ``receive``."""
    words = {"send": "[z]fs send .*tank/web@", "receive": "[z]fs receive .*backup/dr/tank:web$"}[what]
    (process,) = machine.run("pgrep", "-f", words).stdout.split()
    machine.run("kill", "-KILL", process)


def test_the_second_one_is_refused_and_a_killed_one_keeps_no_lock(sending):
    machine, future = sending
    with pytest.raises(CommandExecutionError, match="Another replication of web to vault is at work on this machine"):
        replicate(machine)
    # Under another name of the target, the place is the same.
    with pytest.raises(CommandExecutionError, match="Another machine is replicating web to backup/dr"):
        replicate(machine, {**VAULT, "name": "other"})
    assert not future.done()
    holder = machine.sh("lslocks -n -o PID,PATH | awk '/vault-web.lock/ {print $1}'").stdout.strip()
    machine.run("kill", "-KILL", holder)
    with pytest.raises(ChildProcessError):
        future.result(60)
    assert machine.call("zfs_dr.status", STACK, VAULT)["running"] is None
    # Its receivers have yet to notice.
    until(lambda: machine.run("pgrep", "-f", "[z]fs receive", check=False).returncode)
    done = replicate(machine)
    assert all(text in ("resumed", "incremental", "already there") for text in why(done).values())
    assert "resumed" in why(done).values() and same(machine, done["snapshot"])


@pytest.mark.parametrize("what", ["send", "receive"])
def test_a_killed_end_of_a_stream_is_told_and_gone_on_with(sending, what):
    machine, future = sending
    kill(machine, what)
    with pytest.raises(CommandExecutionError, match=r"^tank/web: "):
        future.result(120)
    assert machine.call("zfs_dr.status", STACK, VAULT)["error"].startswith("tank/web: ")
    done = replicate(machine)
    assert why(done)["web"] == "resumed" and "full" not in str(why(done))
    # What had arrived does not come again.
    assert done["datasets"]["tank/web"]["bytes"] < 8_000_000
    assert same(machine, done["snapshot"])


def test_pruning_the_target_frees_its_space(here):
    replicate(here, take=True)
    write(here, "large", "6M")
    replicate(here, take=True)
    here.sh("rm /tank/web/large /tank/web/db/large /tank/mail/large")
    replicate(here, take=True)
    used = "zpool sync backup; zfs get -Hp -o value used backup/dr"
    before = int(here.sh(used).stdout)
    here.call("zfs_dr.prune", "backup/dr", "web", count=1)
    # OpenZFS frees it in the background.
    until(lambda: before - int(here.sh(used).stdout) > 17_000_000, 30)
    assert set(why(replicate(here, take=True)).values()) == {"incremental"}
