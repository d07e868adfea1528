"""The power is cut at random moments of a snapshot and of a rollback, on real OpenZFS; the next call puts it right.

Each operation runs once, while its disks are copied: each copy is what a power cut at that moment leaves. The
environment variable ``POWER_CUTS`` says how many moments (20 by hand; else a few), ``POWER_SEED`` draws them again.
"""

from .ksnap import MOMENTS, ONE, bring

STACK = {"name": "mail", "datasets": ["tank/mail", "tank/mail/queue", "tank/db"]}
MEMBERS = STACK["datasets"]
TANK = """
zpool create -O compression=lz4 tank $1; zfs create tank/mail; zfs create tank/db
zfs set mountpoint=/srv/mail quota=1G tank/mail
zfs create -o reservation=64M tank/mail/queue
zfs create tank/mail/other                             # below the stack, not of it
echo other > /srv/mail/other/state
for f in /srv/mail /srv/mail/queue /tank/db; do echo then > $f/state; done
"""
NEWER = """
for f in /srv/mail /srv/mail/queue /tank/db; do echo now > $f/state; done
zfs snapshot -r tank/mail@newer; zfs clone tank/mail@newer tank/newclone
echo later > /srv/mail/later
zpool sync
"""


def plugged(machine, copy, *pools):
    """Plug in the copies of disks and import what is on them: as a machine that starts again."""
    for pool, disk in zip(pools, copy, strict=False):
        bring(machine, machine.add_disk(backing=disk), pool)


def unplugged(machine):
    machine.sh("cd /; zpool export -a")


def facts(machine):
    """What a rollback changes nothing of: every snapshot, what is mounted where, and what would be at the start."""
    columns = "type,guid,name,mounted,mountpoint,canmount"
    shown = machine.run("zfs", "list", "-H", "-p", "-t", "all", "-o", columns).stdout
    rows = [line.split("\t") for line in shown.splitlines()]
    guids = [row[1] for row in rows if row[0] == "snapshot"]
    assert len(guids) == len(set(guids))
    return set(guids), sorted(row[2:] for row in rows if row[0] == "filesystem" and ".aside-" not in row[2])


def sides(machine):
    return machine.sh("cat /srv/mail/state /srv/mail/queue/state /tank/db/state").stdout.split()


def aside_is_whole(machine, content):
    """One state is aside, whole, with what was there before."""
    (aside,) = machine.call("ksnap.aside")
    assert aside["whole"] and sorted(aside["datasets"]) == sorted(MEMBERS)
    script = "for d; do mount -t zfs -o ro,zfsutil $d /mnt; cat /mnt/state; umount /mnt; done"
    assert machine.sh(script, *aside["datasets"].values()).stdout.split() == [content] * 3


@ONE
def test_a_rollback_and_the_way_back_at_any_moment(room, draw):
    machine = room.machine()
    machine.sh(TANK, machine.devices[0])
    machine.call("ksnap.snapshot", STACK, label="then")
    machine.sh(NEWER)
    guids, mounts = facts(machine)
    done, rollbacks = machine.copies_at(MOMENTS, draw, machine.call, "ksnap.rollback", STACK, "then")
    assert sides(machine) == ["then"] * 3
    _, restorations = machine.copies_at((MOMENTS + 1) // 2, draw, machine.call, "ksnap.restore_aside", done["aside"])
    assert sides(machine) == ["now"] * 3
    unplugged(machine)
    for kind, before, after, copies in (
        ("rollback", "now", "then", rollbacks),
        ("restore_aside", "then", "now", restorations),
    ):
        for writes, copy in copies:
            plugged(machine, copy, "tank")
            left = machine.call("ksnap.unfinished")
            # Any change is the next call.
            machine.call("ksnap.snapshot", {"datasets": ["tank/newclone"]})
            found = sides(machine)
            print(f"{kind} after {writes} writes: {[each['stage'] for each in left]}, {found}")
            assert found in ([before] * 3, [after] * 3)
            # What had moved nothing yet is undone, all else is finished.
            assert not left or found == [after if left[0]["stage"] else before] * 3
            assert machine.call("ksnap.unfinished") == []
            assert machine.run("zfs", "get", "-H", "-r", "-s", "local", "ksnap:journal,ksnap:journal.0").stdout == ""
            has = facts(machine)
            assert (has[0] > guids, has[1]) == (True, mounts)
            assert machine.read("/srv/mail/other/state") == "other\n"
            if found == [before] * 3 and kind == "rollback":
                assert machine.call("ksnap.aside") == []
                assert machine.read("/srv/mail/later") == "later\n"
            else:
                aside_is_whole(machine, ({before, after} - {*found}).pop())
            (then,) = machine.call("ksnap.list", STACK)
            assert then["whole"]
            unplugged(machine)


@ONE
def test_a_rollback_between_a_clone_and_its_properties(room):
    """OpenZFS makes them in two transactions: the start mounts a clone that should not be."""
    machine = room.machine()
    machine.sh(TANK, machine.devices[0])
    machine.call("ksnap.snapshot", STACK, label="then")
    machine.sh(NEWER)
    _, mounts = facts(machine)
    machine.put(
        "/opt/cut/zfs",
        """#!/bin/sh
        [ "$1 $4 $5" = "clone $4 tank/mail/queue" ] || exec /usr/sbin/zfs "$@"
        /usr/sbin/zfs clone "$4" "$5" && kill -9 $PPID
        """,
        mode=0o755,
    )
    call = ["/opt/salt-xmpp/bin/salt-call", "--local", "ksnap.rollback", str(STACK), "then"]
    assert machine.run("env", "PATH=/opt/cut:/usr/sbin:/usr/bin", *call, check=False).returncode == -9
    unplugged(machine)
    machine.sh("zpool import tank; zfs mount -a; findmnt /srv/mail/queue && ! findmnt /srv/mail")
    (done,) = machine.call("ksnap.recover", services=False)
    assert done["outcome"] == "finished"
    assert sides(machine) == ["then"] * 3 and facts(machine)[1] == mounts
    aside_is_whole(machine, "now")


@ONE
def test_a_snapshot_at_any_moment(room, draw):
    """On two pools: of one pool's datasets all have it or none; of both, it is listed as whole only if it is."""
    machine = room.machine(disks=2)
    stack = {"name": "both", "datasets": [*MEMBERS, "fast/wal"]}
    machine.sh(f"{TANK}\nzpool create fast $2; zfs create fast/wal; echo then > /fast/wal/state", *machine.devices)
    machine.call("ksnap.snapshot", stack, label="before")
    machine.sh("for f in /srv/mail /srv/mail/queue /tank/db /fast/wal; do echo now > $f/state; done; zpool sync")
    before, _ = facts(machine)
    _, copies = machine.copies_at(MOMENTS, draw, machine.call, "ksnap.snapshot", stack, "cut", hold="audit")
    unplugged(machine)
    for writes, copy in copies:
        plugged(machine, copy, "tank", "fast")
        machine.call("ksnap.snapshot", stack, label="next")
        found = {each["label"]: each for each in machine.call("ksnap.list", stack)}
        assert found["before"]["whole"] and found["next"]["whole"]
        on = sorted(found["cut"]["datasets"]) if "cut" in found else []
        print(f"snapshot after {writes} writes: {on}")
        assert on in ([], sorted(["fast/wal"]), sorted(stack["datasets"]))
        assert not on or found["cut"]["whole"] == (len(on) == 4)
        has, _ = facts(machine)
        assert before < has and len(has - before) == 4 + len(on)
        assert sides(machine) == ["now"] * 3 and machine.read("/fast/wal/state") == "now\n"
        unplugged(machine)


@ONE
def test_files_move_into_a_dataset_at_any_moment(room, draw):
    """A start after the power cut never hides them, and the next call moves them in, whole."""
    machine = room.machine()
    page = "mkdir -p /tank/www/sub; echo page > /tank/www/sub/page; zpool sync"
    machine.sh(f"zpool create tank $1; {page}", *machine.devices)
    create = machine.call, "ksnap.dataset_create", "tank/www", {"quota": "1G"}
    _, copies = machine.copies_at(MOMENTS, draw, *create)
    unplugged(machine)
    wanted = {"datasets": [{"tank/www": {"quota": "1G"}}]}
    for writes, copy in copies:
        plugged(machine, copy, "tank")
        found = machine.sh("zfs list -H -o name,mounted; ls /tank").stdout.split()
        print(f"dataset_create after {writes} writes: {found}")
        # Before the move, there as they were; in the middle of the renaming, beside it.
        assert "page\n" in machine.sh("cat /tank/www/sub/page || cat /tank/www.before-*/sub/page").stdout
        assert machine.state("ksnap.stack", "www", **wanted)["result"] is True
        again = machine.state("ksnap.stack", "www", **wanted)
        assert (again["result"], again["changes"]) == (True, {})
        assert machine.run("findmnt", "-n", "-o", "SOURCE", "--mountpoint", "/tank/www").stdout == "tank/www\n"
        assert machine.sh("cat /tank/www/sub/page /tank/www.before-*/sub/page").stdout == "page\npage\n"
        found = machine.sh("ls -d /tank/www.before-* | wc -l; zfs list -H -o name").stdout.split()
        assert found == ["1", "tank", "tank/www"]
        unplugged(machine)


@ONE
def test_a_boot_environment_is_made_or_not_at_any_moment(room, draw):
    """Nothing of one that is half made is mounted at the start, over what runs."""
    machine = room.machine()
    machine.sh(
        """
        zpool create -O mountpoint=none -O canmount=off tank $1; zfs create tank/ROOT
        zfs create -o canmount=noauto -o mountpoint=/ tank/ROOT/old; zpool set bootfs=tank/ROOT/old tank
        mount -t zfs -o zfsutil tank/ROOT/old /mnt; cd /mnt
        mkdir -p boot lib/modules/6 var/lib/dpkg; touch boot/vmlinuz-6 var/lib/dpkg/status; cd /; umount /mnt
        zfs create tank/ROOT/old/data; zfs create tank/ROOT/old/data/deep; zpool sync
        """,
        *machine.devices,
    )
    made, copies = machine.copies_at(MOMENTS, draw, machine.call, "ksnap.be_create", "new")
    unplugged(machine)
    for writes, copy in copies:
        plugged(machine, copy, "tank")
        # As the start does.
        machine.sh("zfs mount -a")
        mounted = [mount["source"] for mount in machine.call("ksnap.mounts") if mount["type"] == "zfs"]
        there = machine.sh("zfs list -H -o name | grep ROOT/new || true").stdout.split()
        print(f"be_create after {writes} writes: {there}")
        assert mounted == ["tank/ROOT/old/data", "tank/ROOT/old/data/deep"]
        if "new" in [each["name"] for each in machine.call("ksnap.be_list")]:
            assert there == made["datasets"]
        unplugged(machine)


@ONE
def test_the_start_finishes_what_a_power_cut_broke_off(room, draw):
    """Nobody calls anything: ``ksnap-recover.service``, which the rollback installed, does it before any service."""
    machine = room.machine()
    machine.sh(TANK, machine.devices[0])
    machine.put(
        "/etc/systemd/system/witness.service",
        "[Service]\nType=oneshot\n"
        "ExecStart=sh -c 'cat /srv/mail/state /srv/mail/queue/state /tank/db/state > /srv/seen'\n"
        "[Install]\nWantedBy=multi-user.target\n",
    )
    machine.call("ksnap.snapshot", STACK, label="then")
    machine.put(
        "/etc/systemd/system/mailer.service",
        "[Service]\nExecStart=sleep infinity\n[Install]\nWantedBy=multi-user.target\n",
    )
    # The image has it masked, for speed; Debian's import of pools at the start requires it.
    machine.sh(f"{NEWER}\nsystemctl unmask systemd-udev-settle; systemctl enable witness mailer")
    machine.run("systemctl", "start", "mailer")
    _, mounts = facts(machine)
    begin = machine.writes()
    done = machine.call("ksnap.rollback", STACK, "then", services=["mailer"])
    writes = machine.writes() - begin
    machine.call("ksnap.discard_aside", machine.call("ksnap.restore_aside", done["aside"])["aside"])
    # The first start cannot finish it: the service that writes there does not start, on whatever there is.
    fails = "/etc/systemd/system/ksnap-recover.service.d/fails.conf"
    machine.put(fails, "[Service]\nExecStart=\nExecStart=false\n")
    machine.sh("sync")
    rollback = machine.call, "ksnap.rollback", STACK, "then"
    assert not machine.kill_at(int(writes * draw.uniform(0.5, 0.8)), *rollback, services=["mailer"])
    machine.boot()
    assert machine.run("systemctl", "is-active", "mailer", check=False).stdout == "inactive\n"
    assert machine.sh("systemctl is-failed ksnap-recover; ls /srv/mail /srv/seen || true").stdout.split()[0] == "failed"
    machine.sh('rm "$1"; sync', fails)
    machine.kill()
    machine.boot()
    assert machine.run("systemctl", "is-active", "mailer").stdout == "active\n"
    assert machine.sh("ls /etc/systemd/system/*.service.d/ksnap-recover.conf || true").stdout == ""
    said = machine.run("journalctl", "-b", "-u", "ksnap-recover", "-o", "cat").stdout
    assert "outcome" in said, said
    assert machine.read("/srv/seen").split() == sides(machine) == ["then"] * 3
    assert machine.run("zfs", "get", "-H", "-r", "-s", "local", "ksnap:journal,ksnap:journal.0").stdout == ""
    assert facts(machine)[1] == mounts
    aside_is_whole(machine, "now")
