"""Rollback on real OpenZFS: everything back, nothing lost, all or nothing."""

import re

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import ONE, again, bring, dry

STACK = {"name": "mail", "datasets": ["tank/mail", "tank/mail/queue", "tank/db", "tank/vol"]}
MEMBERS = STACK["datasets"]


def lines(machine, *command):
    return machine.run(*command).stdout.splitlines()


def guids(machine):
    """Every snapshot by its guid: how often there is it."""
    found = lines(machine, "zfs", "list", "-H", "-p", "-t", "snapshot", "-o", "guid")
    assert len(found) == len(set(found))
    return set(found)


def properties(machine, dataset):
    shown = lines(machine, "zfs", "get", "-H", "-p", "-s", "local", "-o", "property,value", "all", dataset)
    # canmount cannot be inherited: once set, "on" is no longer the default, but the same.
    return dict(line.split("\t") for line in shown if line != "canmount\ton")


def bookmarks(machine, dataset):
    return sorted(lines(machine, "zfs", "list", "-H", "-t", "bookmark", "-o", "name", "-d", "1", dataset))


def journal(machine):
    return lines(machine, "zfs", "get", "-H", "-s", "local", "-r", "-o", "property", "ksnap:journal,ksnap:journal.0")


@pytest.fixture
def tank(fresh):
    fresh.sh("zpool create -O compression=lz4 tank $1; zfs create tank/mail; zfs create tank/db", fresh.devices[0])
    return fresh


@pytest.fixture
def rich(tank):
    """A stack with everything that a rollback can get wrong, and what must not notice it."""
    tank.sh("""
        zfs set mountpoint=/srv/mail quota=1G recordsize=16K com.example:note='a b' tank/mail
        zfs create -o reservation=64M tank/mail/queue
        zfs create tank/mail/other                     # below the stack, not of it
        zfs create -o canmount=noauto -o mountpoint=/srv/x tank/mail/other/deep
        zfs create -V 32M tank/vol
        zfs set canmount=noauto mountpoint=legacy tank/db
        mkdir -p /srv/db; mount -t zfs tank/db /srv/db
        zfs allow -u nobody send,snapshot tank/mail
        zfs allow -d -g daemon mount,create tank/mail
        useradd gone; zfs allow -u gone hold tank/mail; userdel gone
        echo 0 > /srv/mail/state; zfs snapshot -r tank/mail@older; zfs bookmark tank/mail@older tank/mail#mark
        zfs clone tank/mail@older tank/oldclone
        for f in /srv/mail /srv/mail/queue /srv/db; do echo then > $f/state; done
        echo other > /srv/mail/other/state
        until [ -b /dev/zvol/tank/vol ]; do sleep .1; done
        printf then | dd of=/dev/zvol/tank/vol conv=fsync status=none
    """)
    tank.call("ksnap.snapshot", STACK, label="then")
    tank.call("ksnap.hold", STACK, "then", "audit")
    tank.sh("""
        for f in /srv/mail /srv/mail/queue /srv/db; do echo now > $f/state; done
        printf now. | dd of=/dev/zvol/tank/vol conv=fsync status=none
        zfs snapshot -r tank/mail@newer; zfs clone tank/mail@newer tank/newclone
        zfs bookmark tank/mail@newer tank/mail#later
        echo later > /srv/mail/later
    """)
    return tank


def state(machine):
    return machine.sh("""
        cat /srv/mail/state /srv/mail/queue/state /srv/db/state
        until [ -b /dev/zvol/tank/vol ]; do sleep .1; done; head -c 4 /dev/zvol/tank/vol | tr -d .; echo
    """).stdout.split()


def test_all_goes_back_nothing_is_lost_and_all_comes_again(rich):
    before, kept = guids(rich), {dataset: properties(rich, dataset) for dataset in MEMBERS}
    told = dry(rich, "ksnap.rollback", STACK, "then")
    assert state(rich) == ["now"] * 4 and rich.call("ksnap.aside") == []
    assert told["kept"] == ["tank/mail/other", "tank/mail/other/deep"]

    done = rich.call("ksnap.rollback", STACK, "then")
    assert state(rich) == ["then"] * 4
    assert journal(rich) == []
    # No snapshot is lost, whoever made it, and the history is the live datasets'.
    assert guids(rich) == before
    names = set(lines(rich, "zfs", "list", "-H", "-t", "snapshot", "-o", "name"))
    assert {"tank/mail@older", f"tank/mail@{done['snapshot']}", f"{done['datasets']['tank/mail']}@newer"} <= names
    # Clones live on, of the old and of the newer one.
    origins = dict(line.split("\t") for line in lines(rich, "zfs", "list", "-H", "-o", "name,origin"))
    assert origins["tank/oldclone"] == "tank/mail@older"
    assert origins["tank/newclone"] == f"{done['datasets']['tank/mail']}@newer"
    assert origins["tank/mail"] == "-"
    # Properties, permissions, holds and bookmarks are what they were.
    assert {dataset: properties(rich, dataset) for dataset in MEMBERS} == kept
    allowed = rich.run("zfs", "allow", "tank/mail").stdout
    assert "user nobody send,snapshot" in allowed and "group daemon create,mount" in allowed
    assert re.search(r"user \(unknown: \d+\) hold", allowed)
    assert allowed.index("Descendent permissions") < allowed.index("group daemon") < allowed.index("user nobody")
    assert "audit" in rich.run("zfs", "holds", "-H", f"tank/mail@{done['snapshot']}").stdout
    assert bookmarks(rich, "tank/mail") == ["tank/mail#mark"]
    # What is below and not of the stack has not moved.
    assert rich.read("/srv/mail/other/state") == "other\n"
    assert properties(rich, "tank/mail/other/deep") == {"canmount": "noauto", "mountpoint": "/srv/x"}
    # What is aside is there whole, holds no space by reservation, and is not mounted at the start.
    (aside,) = rich.call("ksnap.aside")
    assert (aside["id"], aside["datasets"], aside["whole"]) == (done["aside"], done["datasets"], True)
    wanted = "canmount,mounted,reservation,refreservation"
    has = rich.run("zfs", "get", "-H", "-p", "-o", "value", wanted, *aside["datasets"].values())
    assert set(has.stdout.split()) <= {"noauto", "no", "0", "-"}
    assert rich.sh(
        "mkdir /mnt/x; mount -t zfs -o ro,zfsutil $1 /mnt/x; cat /mnt/x/state /mnt/x/later; umount /mnt/x",
        aside["datasets"]["tank/mail"],
    ).stdout.split() == ["now", "later"]
    # The next snapshot, and a stack above it all, do not take it along.
    above = rich.call("ksnap.stack", {"datasets": ["tank"], "children": True})["datasets"]
    assert not [name for name in above if "aside" in name]
    # As after a restart: the pool is exported and imported, and everything is mounted where it was.
    rich.sh("umount /srv/db")
    again(rich, "tank")
    rich.sh("mount -t zfs tank/db /srv/db")
    assert state(rich) == ["then"] * 4
    assert rich.read("/srv/mail/other/state") == "other\n"

    rich.sh("echo after > /srv/mail/after; zfs snapshot tank/mail@after")
    told = dry(rich, "ksnap.restore_aside", done["aside"])
    assert told["kept"] == ["tank/mail/other", "tank/mail/other/deep"]
    second = rich.call("ksnap.restore_aside", done["aside"])
    assert state(rich) == ["now"] * 4
    assert rich.read("/srv/mail/later") == "later\n"
    assert rich.read("/srv/mail/other/state") == "other\n"
    assert {dataset: properties(rich, dataset) for dataset in MEMBERS} == kept
    assert guids(rich) > before
    names = set(lines(rich, "zfs", "list", "-H", "-t", "snapshot", "-o", "name"))
    assert {"tank/mail@older", "tank/mail@newer", f"{second['datasets']['tank/mail']}@after"} <= names
    assert "user nobody send,snapshot" in rich.run("zfs", "allow", "tank/mail").stdout
    assert bookmarks(rich, "tank/mail") == ["tank/mail#later", "tank/mail#mark"]
    # Only the other one is aside now, and can be discarded; the snapshots of the live ones stay.
    (aside,) = rich.call("ksnap.aside", "mail")
    assert aside["id"] == second["aside"]
    dry(rich, "ksnap.discard_aside", second["aside"])
    assert len(rich.call("ksnap.aside")) == 1
    rich.call("ksnap.discard_aside", second["aside"])
    assert rich.call("ksnap.aside") == []
    assert guids(rich) == before
    assert state(rich) == ["now"] * 4
    with pytest.raises(SaltInvocationError, match="no state nothing aside"):
        rich.call("ksnap.restore_aside", "nothing")


@ONE
def test_there_and_back_over_several_rollbacks(tank):
    """To the middle, further back, and to each state that is aside, in any order; each has its own history."""
    stack = {"datasets": ["tank/db"]}
    for number in range(3):
        tank.sh("echo $1 > /tank/db/state", str(number))
        tank.call("ksnap.snapshot", stack, label=f"s{number}")
    before = guids(tank)
    tank.sh("echo present > /tank/db/state")
    asides = {}
    asides["present"] = tank.call("ksnap.rollback", stack, "s1")["aside"]
    assert tank.read("/tank/db/state") == "1\n"
    asides["1"] = tank.call("ksnap.rollback", stack, "s0")["aside"]
    assert tank.read("/tank/db/state") == "0\n"
    for wanted in ("present", "1", "0"):
        here = tank.read("/tank/db/state").strip()
        asides[here] = tank.call("ksnap.restore_aside", asides.pop(wanted))["aside"]
        assert tank.read("/tank/db/state").strip() == wanted
        assert guids(tank) == before
        own = lines(tank, "zfs", "list", "-H", "-d", "1", "-t", "snapshot", "-o", "name", "tank/db")
        assert len(own) == {"present": 3, "1": 2, "0": 1}[wanted], own
        assert tank.run("zfs", "get", "-H", "-o", "value", "origin", "tank/db").stdout == "-\n"
    # What others were made from is not discarded under them.
    one = next(each for each in tank.call("ksnap.aside") if each["id"] == asides["1"])
    tank.sh("zfs hold x $(zfs list -H -o name -d 1 -t snapshot $1 | head -1)", one["datasets"]["tank/db"])
    with pytest.raises(CommandExecutionError, match=r"was not destroyed: .* is held"):
        tank.call("ksnap.discard_aside", asides["1"])
    assert len(tank.call("ksnap.aside")) == 2


@ONE
def test_encrypted_datasets(tank):
    """An encryption root with a child, and a dataset that has its key from above and is rolled back alone."""
    tank.sh("""
        head -c 32 /dev/urandom > /root/key
        zfs create -o encryption=on -o keyformat=raw -o keylocation=file:///root/key tank/safe
        zfs create tank/safe/child; zfs create tank/safe/alone; zfs create tank/safe/child/inner
        for f in /tank/safe /tank/safe/child /tank/safe/child/inner /tank/safe/alone; do echo then > $f/state; done
    """)
    everything = {"datasets": ["tank/safe", "tank/safe/child", "tank/safe/child/inner"]}
    alone = {"datasets": ["tank/safe/alone"]}
    for stack in (everything, alone):
        tank.call("ksnap.snapshot", stack, label="then")
    paths = ["/tank/safe", "/tank/safe/child", "/tank/safe/child/inner", "/tank/safe/alone"]
    tank.sh("for f; do echo now > $f/state; done", *paths)

    def states():
        return [tank.read(f"{path}/state").strip() for path in paths]

    first = tank.call("ksnap.rollback", alone, "then")
    assert states() == ["now", "now", "now", "then"]
    second = tank.call("ksnap.rollback", everything, "then")
    assert states() == ["then", "then", "then", "then"]
    third = tank.call("ksnap.restore_aside", second["aside"])
    assert states() == ["now", "now", "now", "then"]
    tank.call("ksnap.restore_aside", third["aside"])
    tank.call("ksnap.restore_aside", first["aside"])
    assert states() == ["then", "then", "then", "now"]
    # As at the next start: the key of one root opens all.
    again(tank, "tank")
    tank.sh("zfs load-key tank/safe; zfs mount -a")
    assert states() == ["then", "then", "then", "now"]
    assert tank.run("zfs", "get", "-H", "-o", "value", "encryptionroot", "tank/safe/alone").stdout == "tank/safe\n"
    # A key that nobody could load afterwards.
    tank.sh("zfs set keylocation=prompt tank/safe")
    with pytest.raises(CommandExecutionError, match=r"is an encryption root.*cannot be done from its keylocation"):
        tank.call("ksnap.rollback", everything, "then")
    tank.sh("zfs unmount tank/safe; zfs unload-key tank/safe")
    with pytest.raises(CommandExecutionError, match=r"encryption keys of .*tank/safe.* are not loaded"):
        tank.call("ksnap.rollback", everything, "then")


@ONE
def test_refusals_touch_nothing(tank):
    tank.sh("zfs create -p tank/$1/$1; zfs snapshot -r tank@s; mkdir /tank/db/disc", "x" * 115)
    before = tank.sh("zfs list -H -p -t all -o name,guid; cat /proc/mounts").stdout

    def refused(stack, snapshot, match, **options):
        with pytest.raises((CommandExecutionError, SaltInvocationError), match=match):
            tank.call("ksnap.rollback", stack, snapshot, **options)

    db = {"datasets": ["tank/db"]}
    refused({"datasets": ["tank"]}, "s", "root dataset of its pool, which cannot be renamed")
    refused({"datasets": [f"tank/{'x' * 115}/{'x' * 115}"]}, "s", r"leaves no room for \.aside-<id>")
    refused(db, "gone", "has no snapshot gone")
    tank.sh("zfs create tank/new")
    refused({"datasets": ["tank/db", "tank/new"]}, "s", "There is no tank/new@s.*partial=True")
    tank.sh("zfs snapshot tank/new@s")
    refused({"datasets": ["tank/db", "tank/new"]}, "s", "were not taken together")
    tank.sh("zfs destroy -r tank/new; mount -t tmpfs tmpfs /tank/db/disc")
    refused(db, "s", r"tmpfs \(tmpfs\) is mounted at /tank/db/disc")
    tank.sh("umount /tank/db/disc; mount --bind /tank/db/disc /mnt")
    refused(db, "s", "a part of tank/db is mounted once more at /mnt")
    tank.sh("umount /mnt; zfs create -o mountpoint=legacy tank/old; zfs snapshot tank/old@s; cp /etc/fstab /root/fstab")
    tank.sh("echo tank/old /srv/old zfs defaults 0 0 >> /etc/fstab")
    refused({"datasets": ["tank/old"]}, "s", "the line of tank/old in /etc/fstab lacks nofail.*Add it")
    tank.sh("mv /root/fstab /etc/fstab; zfs destroy -r tank/old")
    sleeper = tank.begin(tank.sh, "cd /tank/db; exec -a dreamer sleep 1000", timeout=2000, check=False)
    tank.sh("until pgrep -f dreamer; do sleep .1; done")
    refused(db, "s", r"failed, and all is as it was: /tank/db \(tank/db\) is busy: in use by .*sleep \(process \d+\)")
    tank.sh("pkill -f dreamer")
    sleeper.result(60)
    assert tank.sh("zfs list -H -p -t all -o name,guid; cat /proc/mounts").stdout == before
    assert journal(tank) == []


@ONE
def test_services_are_stopped_and_started_in_order(tank):
    tank.call("ksnap.snapshot", {"datasets": ["tank/db"]}, label="s")
    for name in ("one", "two", "three"):
        tank.put(
            f"/etc/systemd/system/{name}.service",
            f"[Service]\nWorkingDirectory=/tank/db\nExecStart=sleep infinity\n"
            f"ExecStartPost=sh -c 'echo +{name} >> /srv/log'\nExecStopPost=sh -c 'echo -{name} >> /srv/log'\n",
        )
    tank.sh("systemctl daemon-reload; systemctl start one two; rm /srv/log")
    done = tank.call("ksnap.rollback", {"datasets": ["tank/db"], "services": ["one", "two", "three"]}, "s")
    assert done["services"] == ["one", "two"]
    assert tank.read("/srv/log").split() == ["-one", "-two", "+two", "+one"]
    # One that does not start again is told, and the datasets stay where they are.
    tank.sh(
        "rm /srv/log; sed -i 's/^ExecStart=/ExecStartPre=false\\n&/' /etc/systemd/system/one.service; "
        "systemctl daemon-reload"
    )
    with pytest.raises(CommandExecutionError, match=r"(?s)in place and mounted.*did not start, see their logs: one"):
        tank.call("ksnap.restore_aside", done["aside"], services=["one", "two"])
    assert [each["id"] != done["aside"] for each in tank.call("ksnap.aside")] == [True]
    assert journal(tank) == []
    # Where it is undone, and one does not start again, both are told, and nothing is left to be finished.
    tank.sh("systemctl start two; touch /tank/db/two; systemctl disable ksnap-recover; echo false > /srv/fails")
    tank.sh("sed -i 's/^ExecStart=/ExecStartPre=false\\n&/' /etc/systemd/system/two.service; systemctl daemon-reload")
    sleeper = tank.begin(tank.sh, "cd /tank/db; exec -a dreamer sleep 1000", timeout=2000, check=False)
    tank.sh("until pgrep -f dreamer; do sleep .1; done")
    with pytest.raises(CommandExecutionError, match=r"(?s)all is as it was: .*busy.*did not start, .*logs: two"):
        tank.call("ksnap.rollback", {"datasets": ["tank/db"], "services": ["two"]}, "s")
    tank.sh("pkill -f dreamer")
    sleeper.result(60)
    assert tank.call("ksnap.unfinished") == journal(tank) == [] and tank.read("/tank/db/two") == ""
    # The unit for the next start is there, and enabled again; nothing keeps the services from starting.
    assert tank.run("systemctl", "is-enabled", "ksnap-recover").stdout == "enabled\n"
    assert tank.sh("ls /etc/systemd/system/*.service.d/ksnap* || true").stdout == ""
    tank.sh("systemctl stop one two three")


@ONE
def test_a_service_that_others_are_a_part_of_goes_with_them(tank):
    """As Debian's postgresql: its unit does nothing, and its clusters stop after it."""
    tank.call("ksnap.snapshot", {"datasets": ["tank/db"]}, label="s")
    tank.put("/etc/systemd/system/all.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=true\n")
    tank.put(
        "/etc/systemd/system/all@.service",
        "[Unit]\nPartOf=all.service\nBefore=all.service\n[Service]\nWorkingDirectory=/tank/db\n"
        "ExecStart=sleep infinity\nExecStop=sleep 11\n",
    )
    tank.sh("systemctl daemon-reload; systemctl start all@17-main all")
    done = tank.call("ksnap.rollback", {"datasets": ["tank/db"], "services": ["all"]}, "s")
    assert done["services"] == ["all", "all@17-main"]
    assert tank.run("systemctl", "is-active", "all", "all@17-main").stdout.split() == ["active"] * 2
    tank.sh("systemctl kill -s KILL all@17-main; systemctl stop all@17-main all")


# Before anything is moved; the state is then as it was.
STOPS = """#!/bin/sh
case "$*" in *canmount=noauto*) kill -9 $PPID;; esac
exec /usr/sbin/zfs "$@"
"""


@ONE
def test_what_is_interrupted_is_undone_and_never_gone_on_with(tank):
    stack = {"name": "db", "datasets": ["tank/db"], "services": ["slow"]}
    tank.put(
        "/etc/systemd/system/slow.service",
        "[Service]\nWorkingDirectory=/tank/db\nExecStart=sleep infinity\nExecStop=sh -c 'sleep $$(cat /srv/wait)'\n",
    )
    tank.sh("echo 6 > /srv/wait; systemctl daemon-reload; systemctl start slow; echo then > /tank/db/state")
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("echo now > /tank/db/state")
    before = tank.sh("zfs list -H -p -t all -o name,guid,canmount,mounted").stdout
    call = ["/opt/salt-xmpp/bin/salt-call", "--local", "ksnap.rollback", str(stack), "s"]
    # Somebody presses Ctrl-C while the service stops.
    watch = "until [ $(systemctl is-active slow) = deactivating ]; do sleep .1; done; pkill -INT -f ksnap.rollback"
    watcher = tank.begin(tank.sh, watch, timeout=60)
    assert "Ctrl-c" in tank.run(*call, check=False, timeout=120).stderr
    watcher.result(60)
    assert tank.call("ksnap.unfinished") == journal(tank) == []
    assert tank.sh("zfs list -H -p -t all -o name,guid,canmount,mounted").stdout == before
    assert tank.run("systemctl", "is-active", "slow").stdout == "active\n"
    # It is killed before anything was moved.
    tank.sh("echo 0 > /srv/wait")
    tank.put("/opt/cut/zfs", STOPS, mode=0o755)
    assert tank.run("env", "PATH=/opt/cut:/usr/sbin:/usr/bin", *call, check=False).returncode == -9
    assert [each["stage"] for each in tank.call("ksnap.unfinished")] == [0]
    # Who only asks changes nothing, and is told; so is Salt's test mode.
    with pytest.raises(CommandExecutionError, match=r"A rollback of db was broken off.*ksnap.recover"):
        dry(tank, "ksnap.prune", stack, count=1)
    told = tank.state("ksnap.pruned", "db", test=True, config={"ksnap": {"stacks": {"db": stack}}}, count=1)
    assert told["result"] is False and "A rollback of db was broken off" in told["comment"]
    assert [each["stage"] for each in tank.call("ksnap.unfinished")] == [0]
    # Days later a snapshot is taken: what was decided then is not what is wanted now.
    tank.sh("zfs mount tank/db || true; echo later > /tank/db/later")
    tank.call("ksnap.snapshot", stack, label="next")
    assert tank.call("ksnap.unfinished") == journal(tank) == [] == tank.call("ksnap.aside")
    assert tank.sh("cat /tank/db/state /tank/db/later").stdout.split() == ["now", "later"]
    assert tank.sh("zfs get -H -o value canmount,mounted tank/db; systemctl is-active slow").stdout.split() == [
        "on", "yes", "active",
    ]  # fmt: skip
    assert tank.sh("ls /etc/systemd/system/*.service.d/ksnap* || true").stdout == ""
    tank.sh("systemctl stop slow")


@ONE
def test_what_is_not_mounted_is_missed(tank):
    tank.sh("zfs set mountpoint=/srv/db tank/db; zfs set mountpoint=/srv/mail tank/mail; echo then > /srv/mail/state")
    stack = {"name": "all", "paths": ["/srv/mail", "/srv/db"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("echo now > /srv/mail/state; zfs unmount tank/db")
    with pytest.raises(
        CommandExecutionError, match="taken of 2 datasets, and the stack has 1 of them now; /srv/db of it is not on ZFS"
    ):
        tank.call("ksnap.rollback", stack, "s")
    assert tank.read("/srv/mail/state") == "now\n" and tank.call("ksnap.aside") == []
    assert list(tank.call("ksnap.rollback", stack, "s", partial=True)["datasets"]) == ["tank/mail"]
    assert tank.read("/srv/mail/state") == "then\n"


@ONE
def test_a_volume_that_the_kernel_uses_is_busy(tank):
    tank.sh("zfs create -V 8M tank/vol; udevadm settle; mkswap -q /dev/zvol/tank/vol; sync")
    stack = {"datasets": ["tank/db", "tank/vol"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("swapon /dev/zvol/tank/vol; echo now > /tank/db/state")
    with pytest.raises(CommandExecutionError, match="all is as it was: The volume tank/vol is in use by the kernel"):
        tank.call("ksnap.rollback", stack, "s")
    assert tank.read("/tank/db/state") == "now\n" and tank.call("ksnap.aside") == []
    tank.sh("swapoff /dev/zvol/tank/vol")
    assert tank.call("ksnap.rollback", stack, "s")["datasets"].keys() == {"tank/db", "tank/vol"}


@ONE
def test_what_was_moved_out_of_the_way_by_hand_is_put_back(tank):
    stack = {"datasets": ["tank/db"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("echo now > /tank/db/state")
    done = tank.call("ksnap.rollback", stack, "s")
    # The present one has the history, so it is needed; but it is not in its place.
    tank.sh("zfs rename tank/db tank/odd")
    assert tank.call("ksnap.restore_aside", done["aside"])["datasets"] == {}
    assert tank.read("/tank/db/state") == "now\n" and journal(tank) == []


@ONE
def test_what_fails_at_the_last_step_is_undone(tank):
    """The snapshot has a file where a dataset is mounted now: only the mounting, at the very end, can find that out."""
    tank.sh("touch /tank/db/inner; echo then > /tank/mail/state")
    stack = {"datasets": ["tank/mail", "tank/db"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("rm /tank/db/inner; zfs create tank/db/inner; echo x > /tank/db/inner/x; echo now > /tank/mail/state")
    before = tank.sh("zfs list -H -p -t all -o name,guid,origin,canmount,mounted; cat /proc/mounts | sort").stdout
    with pytest.raises(CommandExecutionError, match=r"failed, and all is as it was: .*(inner|directory)"):
        tank.call("ksnap.rollback", stack, "s")
    assert (
        tank.sh("zfs list -H -p -t all -o name,guid,origin,canmount,mounted; cat /proc/mounts | sort").stdout == before
    )
    assert (tank.read("/tank/mail/state"), tank.read("/tank/db/inner/x")) == ("now\n", "x\n")
    assert journal(tank) == [] and tank.call("ksnap.aside") == []


@ONE
def test_partial(tank):
    tank.sh(
        "echo then > /tank/db/state; zfs snapshot tank/db@s; echo now > /tank/db/state; echo now > /tank/mail/state"
    )
    done = tank.call("ksnap.rollback", {"datasets": ["tank/db", "tank/mail"]}, "s", partial=True)
    assert list(done["datasets"]) == ["tank/db"]
    assert (tank.read("/tank/db/state"), tank.read("/tank/mail/state")) == ("then\n", "now\n")


@ONE
def test_two_pools(tank):
    tank.sh(
        "zpool create fast $1; zfs create fast/wal; echo then > /fast/wal/state; echo then > /tank/db/state",
        tank.devices[1],
    )
    stack = {"datasets": ["tank/db", "fast/wal"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("echo now > /fast/wal/state; echo now > /tank/db/state")
    done = tank.call("ksnap.rollback", stack, "s")
    assert [tank.read(path) for path in ("/tank/db/state", "/fast/wal/state")] == ["then\n"] * 2
    # A plan that is kept on a pool that is away stops every change, and says so.
    tank.sh("zfs set ksnap:journal='20260101T000000Z-0000 at fast' tank; zpool export fast")
    with pytest.raises(CommandExecutionError, match="kept on the pool fast, which is not imported"):
        tank.call("ksnap.snapshot", {"datasets": ["tank/db"]})
    bring(tank, tank.devices[1], "fast")
    tank.call("ksnap.restore_aside", done["aside"])
    assert [tank.read(path) for path in ("/tank/db/state", "/fast/wal/state")] == ["now\n"] * 2
    assert journal(tank) == []


@ONE
def test_only_one_change_at_a_time(tank):
    work = [tank.begin(tank.call, "ksnap.snapshot", {"datasets": ["tank/db"]}, before=["sleep", "2"]) for _ in range(2)]
    tank.call("ksnap.snapshot", {"datasets": ["tank/db"]}, label="s")
    done = tank.call("ksnap.rollback", {"datasets": ["tank/db"]}, "s")
    assert {each.result(120)["stack"] for each in work} == {None}
    assert done["datasets"]
