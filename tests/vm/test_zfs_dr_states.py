"""The states, each run twice and in test mode. What prepares a target for another machine is in test_zfs_dr_remote."""

from .ksnap import ONE
from .zfs_dr import STACK, VAULT, snapshots

pytestmark = ONE


def told(machine, function, name, **options):
    """Apply a state in test mode, for real, and twice more; return what it said at first."""
    before = machine.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout
    said = machine.state(function, name, test=True, **options)
    assert said["result"] is None and said["changes"], said
    assert machine.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout == before
    done = machine.state(function, name, **options)
    assert done["result"] is True and set(said["changes"]) <= set(done["changes"]), done
    for test in (False, True):
        again = machine.state(function, name, test=test, **options)
        assert again["result"] is True and not again["changes"], again
    return done


def test_replicated_pruned_and_absent(here):
    state = {"stack": STACK, "target": VAULT, "age": 3600}
    done = told(here, "zfs_dr.replicated", "in the vault", **state)
    first = done["changes"]["snapshot"]["new"]
    assert snapshots(here, "backup/dr") == [first] and done["changes"]["bytes"] > 900_000
    # Too old: the next one.
    again = here.state("zfs_dr.replicated", "in the vault", **{**state, "age": 0})
    assert again["changes"]["snapshot"]["old"] == first
    assert len(snapshots(here, "backup/dr")) == 2
    gone = told(here, "zfs_dr.pruned", "backup/dr", stack="web", count=1)
    assert list(gone["changes"]["destroyed"]) == [first]
    assert len(snapshots(here, "backup/dr/tank:mail")) == 1
    told(here, "zfs_dr.absent", "in the vault", stack=STACK, target=VAULT)
    assert here.run("zfs", "list", "-H", "-t", "bookmark", "-o", "name").stdout == ""
    assert here.sh("zfs list -Hp -t snapshot -o userrefs -r tank | sort -u").stdout == "0\n"
    assert len(snapshots(here, "backup/dr/tank:mail")) == 1
    # What is wrong is told, and nothing done.
    wrong = here.state("zfs_dr.replicated", "x", stack=STACK, target={"dataset": "backup/none"})
    assert wrong["result"] is False and "does not exist" in wrong["comment"]
    wrong = here.state("zfs_dr.replicated", "x", **{**state, "schedule": "sometimes"})
    assert wrong["result"] is False and "no time for systemd" in wrong["comment"]
    wrong = here.state("zfs_dr.pruned", "backup/dr", stack="web")
    assert wrong["result"] is False and "needs a grid" in wrong["comment"]
    assert here.sh("ls /etc/systemd/system/zfs_dr-* || true").stdout == ""


def test_a_timer_replicates(here):
    target = {**VAULT, "grid": "1x1h(keep=all) | 24x1h"}
    state = {"stack": STACK, "target": target, "schedule": "*:*:0/2", "count": 9}
    done = told(here, "zfs_dr.replicated", "in the vault", **state)
    first = done["changes"]["snapshot"]["new"]
    timer, service = "zfs_dr-vault-web.timer", "zfs_dr-vault-web.service"
    here.sh("until (($(zfs list -H -d 1 -t snapshot backup/dr | wc -l) > 1)); do sleep .2; done", timeout=300)
    here.sh("systemctl stop $1; until ! systemctl is-active $2; do sleep .2; done", timer, service)
    assert "Result=success" in here.run("systemctl", "show", service).stdout
    sets = snapshots(here, "backup/dr")
    assert sets[0] == first and snapshots(here, "backup/dr/tank:web") == sets
    assert here.call("zfs_dr.status", STACK, target)["behind"] == 0
    # Stopped by hand, it is started again.
    assert set(here.state("zfs_dr.replicated", "in the vault", **state)["changes"]) == {"timer"}
    here.run("systemctl", "is-active", timer)
    told(here, "zfs_dr.replicated", "in the vault", stack=STACK, target=target)
    assert here.sh("ls /etc/systemd/system/*/zfs_dr-* /etc/systemd/system/zfs_dr-* || true").stdout == ""
