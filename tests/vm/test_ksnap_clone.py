"""Writable copies of a stack on real OpenZFS."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import ONE, again, dry

STACK = {"name": "mail", "datasets": ["tank/mail", "tank/mail/queue", "tank/db", "tank/mail/vol"]}


@pytest.fixture
def tank(fresh):
    fresh.sh(
        """
        zpool create tank $1; zfs create -o mountpoint=/srv/mail -o recordsize=16K -o quota=1G tank/mail
        zfs create tank/mail/queue; zfs create -o mountpoint=/srv/mail/db -o com.example:x=y tank/db
        zfs create -V 8M tank/mail/vol
        for f in /srv/mail /srv/mail/queue /srv/mail/db; do echo then > $f/state; done
        """,
        fresh.devices[0],
    )
    fresh.call("ksnap.snapshot", STACK, label="then")
    fresh.sh("for f in /srv/mail /srv/mail/queue /srv/mail/db; do echo now > $f/state; done")
    return fresh


@ONE
def test_a_copy_is_nested_as_the_original_and_never_over_it(tank):
    told = dry(tank, "ksnap.clone", STACK, "then", "/mnt/copy")
    assert tank.call("ksnap.clones") == []
    made = tank.call("ksnap.clone", STACK, "then", "/mnt/copy")
    assert made["mounts"] == told["mounts"] == {
        "tank/mail": "/mnt/copy/srv/mail",
        "tank/mail/queue": "/mnt/copy/srv/mail/queue",
        "tank/db": "/mnt/copy/srv/mail/db",
        "tank/mail/vol": None,
    }  # fmt: skip
    read = "cat $1/srv/mail/state $1/srv/mail/queue/state $1/srv/mail/db/state"
    assert tank.sh(read, "/mnt/copy").stdout.split() == ["then"] * 3
    assert tank.sh(read, "").stdout.split() == ["now"] * 3
    tank.sh("echo changed > /mnt/copy/srv/mail/state")
    clone = made["datasets"]["tank/mail"]
    has = tank.run("zfs", "get", "-H", "-p", "-o", "value", "recordsize,quota,canmount", clone).stdout.split()
    assert has == ["16384", "0", "noauto"]
    assert tank.run("zfs", "get", "-H", "-o", "value", "com.example:x", made["datasets"]["tank/db"]).stdout == "y\n"
    (listed,) = tank.call("ksnap.clones", "mail")
    assert listed == made
    # After a restart the originals are mounted, and the copy is not.
    again(tank, "tank")
    assert tank.sh(read, "").stdout.split() == ["now"] * 3
    (listed,) = tank.call("ksnap.clones")
    assert set(listed["mounts"].values()) == {None} and listed["whole"]
    with pytest.raises(CommandExecutionError, match="the origin of tank/"):
        tank.call("ksnap.destroy", STACK, "then")
    dry(tank, "ksnap.discard", made["id"])
    assert len(tank.call("ksnap.clones")) == 1
    assert tank.call("ksnap.discard", made["id"])["datasets"] == sorted(made["datasets"].values())
    assert tank.call("ksnap.clones") == []
    tank.call("ksnap.destroy", STACK, "then")


def test_a_copy_is_promoted_and_stands_alone(tank):
    made = tank.call("ksnap.clone", STACK, "then", "/mnt/copy")
    # OpenZFS itself would panic in the kernel, and the pool stand still for ever.
    copy = made["datasets"]["tank/db"]
    mark = "zfs bookmark tank/db@$1 tank/db#same; zfs snapshot $2@mine; zfs bookmark $2@mine $2#same"
    tank.sh(mark, made["snapshot"], copy)
    with pytest.raises(CommandExecutionError, match=r"was not promoted: it has bookmarks .* as tank/db#same"):
        tank.call("ksnap.promote", made["id"])
    tank.sh("zfs destroy $1#same; zfs destroy $1@mine", copy)
    assert tank.call("ksnap.promote", made["id"]) == made["datasets"]
    assert tank.call("ksnap.clones") == []
    origins = tank.run("zfs", "list", "-H", "-o", "origin", *made["datasets"].values()).stdout.split()
    assert origins == ["-"] * 4
    tank.sh("zfs destroy -r tank/db; zfs destroy -r tank/mail")
    assert tank.read("/mnt/copy/srv/mail/queue/state") == "then\n"


@ONE
def test_refusals(tank):
    tank.sh("mkdir -p /mnt/full; touch /mnt/full/x; ln -s /srv /mnt/link")
    for root, match in {
        "/mnt/full": "has something in it",
        "/mnt/link/x": "must not lead over symbolic links",
        "relative": "absolute path",
        "/": "other than /",
    }.items():
        with pytest.raises(SaltInvocationError, match=match):
            tank.call("ksnap.clone", STACK, "then", root)
    tank.sh("zfs create tank/new")
    with pytest.raises(CommandExecutionError, match=r"no snapshot .* of tank/new"):
        tank.call("ksnap.clone", {"datasets": ["tank/mail", "tank/new"]}, "then", "/mnt/copy")
    assert tank.call("ksnap.clones") == []
    made = tank.call("ksnap.clone", STACK, "then", "/mnt/copy")
    tank.sh("zfs snapshot $1@mine", made["datasets"]["tank/db"])
    with pytest.raises(CommandExecutionError, match=r"was not destroyed: .*@mine was made of it"):
        tank.call("ksnap.discard", made["id"])
    tank.sh("zfs destroy $1@mine", made["datasets"]["tank/db"])
    # Somebody stands in the dataset that would be unmounted last.
    tank.sh("cd $1; sleep 1000 </dev/null >/dev/null 2>&1 & echo $! > /run/sleep", "/mnt/copy/srv/mail")
    before = tank.call("ksnap.clones")
    with pytest.raises(CommandExecutionError, match=r"not destroyed: /mnt/copy/srv/mail is in use by sleep \(process"):
        tank.call("ksnap.discard", made["id"])
    assert tank.call("ksnap.clones") == before
    tank.sh("kill $(cat /run/sleep)")
    tank.call("ksnap.discard", made["id"])


@ONE
def test_what_cannot_be_mounted_leaves_nothing(tank):
    """A file stands where the copy of another dataset would be mounted."""
    tank.sh("umount /srv/mail/db; rmdir /srv/mail/db; touch /srv/mail/db; zfs snapshot tank/mail@odd tank/db@odd")
    tank.sh("rm /srv/mail/db; zfs mount tank/db")
    before = tank.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout
    with pytest.raises(CommandExecutionError, match=r"tank/db.clone-"):
        tank.call("ksnap.clone", {"datasets": ["tank/mail", "tank/db"]}, "odd", "/mnt/copy")
    assert tank.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout == before


def test_what_a_power_cut_left_of_a_copy_is_listed_and_can_be_discarded(tank):
    """OpenZFS sets the properties of a clone after it made it: what is cut between has but its name."""
    snapshot = tank.call("ksnap.list", STACK)[0]["snapshot"]
    identifier = "20261125T224208Z-5f0e"
    left = f"tank/mail.clone-{identifier}"
    tank.run("zfs", "clone", f"tank/mail@{snapshot}", left)
    (listed,) = tank.call("ksnap.clones")
    assert (listed["id"], listed["snapshot"], listed["whole"]) == (identifier, snapshot, False)
    assert (listed["datasets"], listed["mounts"]) == ({"tank/mail": left}, {"tank/mail": f"/{left}"})
    # Cut at its second dataset; and a clone that somebody made below is not a part of it.
    made = tank.call("ksnap.clone", STACK, "then", "/mnt/copy")
    copy = made["datasets"]["tank/mail/queue"]
    tank.run("zfs", "inherit", "ksnap:clone", copy)
    tank.run("zfs", "clone", f"tank/db@{snapshot}", f"{copy}/mine")
    (cut,) = (each for each in tank.call("ksnap.clones") if each["id"] == made["id"])
    assert cut == {**made, "whole": False}
    with pytest.raises(CommandExecutionError, match=r"not destroyed: .*/mine was made of it, or below it"):
        tank.call("ksnap.discard", made["id"])
    tank.run("zfs", "destroy", f"{copy}/mine")
    for each in (made["id"], identifier):
        tank.call("ksnap.discard", each)
    assert tank.call("ksnap.clones") == []
    assert "clone-" not in tank.run("zfs", "list", "-H", "-o", "name").stdout


@ONE
def test_encrypted_and_rolled_back_beside_a_copy(tank):
    """A copy of an encrypted stack opens with the same key, and lives through a rollback of its original."""
    tank.sh("""
        head -c 32 /dev/urandom > /root/key
        zfs create -o encryption=on -o keyformat=raw -o keylocation=file:///root/key tank/safe
        zfs create tank/safe/child; echo then > /tank/safe/child/state
    """)
    stack = {"datasets": ["tank/safe", "tank/safe/child"]}
    tank.call("ksnap.snapshot", stack, label="s")
    tank.sh("echo now > /tank/safe/child/state")
    made = tank.call("ksnap.clone", stack, "s", "/mnt/copy")
    tank.sh("echo copy > /mnt/copy/tank/safe/child/state")
    done = tank.call("ksnap.rollback", stack, "s")
    assert tank.read("/tank/safe/child/state") == "then\n"
    assert tank.read("/mnt/copy/tank/safe/child/state") == "copy\n"
    tank.call("ksnap.restore_aside", done["aside"])
    assert tank.read("/tank/safe/child/state") == "now\n"
    tank.call("ksnap.discard", made["id"])
