"""What may come between: each has a defined outcome, and none loses the only copy."""

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE
from .zfs_dr import REPLICAS, STACK, VAULT, guids, holds, replicate, same, snapshots, take, why, write

pytestmark = ONE

# Each stands before zfs: what is received for one replica is torn, ...
CUT = """#!/bin/bash
if [[ "$*" == *"receive -s"*/STREAM* ]]; then head -c 1000000 | /usr/sbin/zfs "$@"; exit 1; fi
exec /usr/sbin/zfs "$@"
"""
# ... nothing is renamed, ...
CUT_NAMES = """#!/bin/bash
if [ "$1" = rename ]; then echo "cut off" >&2; exit 1; fi
exec /usr/sbin/zfs "$@"
"""
# ... no bookmark is made, ...
CUT_BOOKMARKS = """#!/bin/bash
if [ "$1" = program ]; then echo "cut off" >&2; exit 1; fi
exec /usr/sbin/zfs "$@"
"""
# ... or somebody writes to a replica when the set is just being marked.
WRITES = """#!/bin/bash
if [ "$1" = snapshot ] && [[ "$*" == *backup/dr@* ]]; then
    mount -t zfs -o zfsutil,rw backup/dr/tank:mail /mnt; head -c 4K /dev/urandom > /mnt/other; umount /mnt
    zpool sync backup
fi
exec /usr/sbin/zfs "$@"
"""
NEW = "-o readonly=on -o canmount=noauto -o mountpoint=none"


def cut_off(machine, count, name, base=""):
    """Leave at the target what a transfer of tank/web leaves that ended after so many bytes."""
    machine.sh(
        f"zfs send -Lec {base} tank/web@$1 | head -c $2 | zfs receive -s -u {'' if base else NEW} backup/dr/tank:web "
        "|| true", name, str(count),
    )  # fmt: skip


def test_a_transfer_goes_on_at_any_byte(here):
    size = int(here.sh("zfs snapshot tank/web@size; zfs send -Lec tank/web@size | wc -c; zfs destroy $1",
                       "tank/web@size").stdout)  # fmt: skip
    taken = take(here)
    resumed = 0
    for count in (100, 2000, size - 1):
        cut_off(here, count, taken)
        done = replicate(here)
        resumed += why(done)["web"] == "resumed"
        assert why(done)["web"] in ("resumed", "full: it is not at the target yet"), count
        assert done["datasets"]["tank/web"]["bytes"] < size - count + 50_000
        assert same(here, taken)
        # Though it began without them, it has what marks a replica of this stack.
        assert not replicate(here)["changed"]
        here.sh("zfs release -r zfs_dr:web backup/dr@$1; zfs destroy -r backup/dr/tank:web; zfs destroy backup/dr@$1",
                taken)  # fmt: skip
    assert resumed >= 2
    replicate(here)
    write(here, "more")
    before, taken = taken, take(here)
    cut_off(here, 70_000, taken, base=f"-i tank/web@{before}")
    # Behind the partial one there is another set by now: the rest of that, then what is new.
    write(here, "most")
    done = replicate(here, take=True)
    assert why(done)["web"] == "resumed, then incremental" and same(here, done["snapshot"])


def test_a_stale_token_is_given_up(here):
    first = replicate(here, take=True)
    write(here, "more")
    taken = take(here)
    cut_off(here, 70_000, taken, base=f"-i tank/web@{first['snapshot']}")
    assert here.run("zfs", "get", "-H", "-o", "value", "receive_resume_token", "backup/dr/tank:web").stdout != "-\n"
    here.sh("for each in web web/db mail; do zfs destroy tank/$each@$1; done", taken)
    done = replicate(here, take=True)
    assert set(why(done).values()) == {"incremental"} and same(here, done["snapshot"])


def test_a_full_target_says_so_and_goes_on_when_there_is_room(here):
    here.sh("zpool destroy backup; truncate -s 80M /srv/small; zpool create -O compression=off backup /srv/small")
    here.sh("zfs create -o mountpoint=none -o readonly=on backup/dr; zfs create -o mountpoint=/mnt backup/fill")
    first = replicate(here, take=True)
    here.sh("dd if=/dev/zero of=/mnt/fill bs=1M 2>/dev/null || true; zpool sync backup")
    write(here, "more", "4M")
    with pytest.raises(CommandExecutionError, match=r"(?s)out of space.*zfs_dr.prune, or a larger pool"):
        replicate(here, take=True)
    assert "out of space" in here.call("zfs_dr.status", STACK, VAULT)["error"]
    assert snapshots(here, "backup/dr") == [first["snapshot"]]
    here.sh("rm /mnt/fill; zpool sync backup")
    done = replicate(here)
    assert all("full" not in each for each in why(done).values()) and same(here, done["snapshot"])
    # A quota is a target's end, too.
    here.sh("zfs set quota=$(($(zfs get -Hp -o value used backup/dr) + 1000000)) backup/dr")
    write(here, "last", "4M")
    with pytest.raises(CommandExecutionError, match=r"(?s)quota.*zfs_dr.prune, or a larger"):
        replicate(here, take=True)
    here.run("zpool", "destroy", "backup")


def test_datasets_come_and_go(here):
    first = replicate(here, take=True)
    here.sh("zfs create tank/new; echo x > /tank/new/file; zfs create -V 4M -b 8K tank/volume")
    here.sh("udevadm settle; head -c 1M /dev/urandom > /dev/zvol/tank/volume")
    stack = {"name": "web", "datasets": [*STACK["datasets"], "tank/new", "tank/volume"]}
    second = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert {name for name, text in why(second).items() if text.startswith("full")} == {"new", "volume"}
    assert here.call("zfs_dr.verify", stack, VAULT, contents=True)["problems"] == []
    here.sh("udevadm settle; head -c 1M /dev/urandom > /dev/zvol/tank/volume")
    third = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert set(why(third).values()) == {"incremental"}
    # Destroyed, and still named: nothing is done, and nothing at the target goes.
    here.sh("zfs release zfs_dr:vault tank/new@$1; zfs destroy -r tank/new", third["snapshot"])
    with pytest.raises(CommandExecutionError, match=r"tank/new.*does not exist"):
        here.call("zfs_dr.replicate", stack, VAULT, take=True)
    with pytest.raises(CommandExecutionError, match=r"tank/new.*does not exist"):
        here.call("zfs_dr.replicate", stack, VAULT)
    stack["datasets"].remove("tank/new")
    done = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert set(why(done).values()) == {"incremental"}
    assert here.call("zfs_dr.status", stack, VAULT)["extra"] == ["tank:new"]
    assert snapshots(here, "backup/dr/tank:new") == [second["snapshot"], third["snapshot"]]
    assert [each["whole"] for each in here.call("zfs_dr.sets", "backup/dr")] == [True] * 4
    assert here.call("zfs_dr.sets", "backup/dr")[0]["snapshot"] == first["snapshot"]


def test_what_a_power_cut_left_of_setting_aside_is_ended(here):
    first = replicate(here, take=True)
    stamp = "20261126T000000Z"
    here.sh("for each in web web:db mail; do zfs snapshot backup/dr/tank:$each@hand; done")
    for name in REPLICAS[1:]:
        here.call("zfs_dr.set_aside", None, f"backup/dr/{name}", first["snapshot"], stamp)
    # As far as the clone, for OpenZFS sets its properties later; the promotion; the first of the two renames.
    here.sh("""
        base=backup/dr
        zfs clone $base/tank:web@$1 $base/tank:web.new-$2
        zfs rename -u $base/tank:web:db $base/tank:web:db.new-$2
        zfs rename -u $base/tank:web:db.aside-$2 $base/tank:web:db
        zfs rename -u $base/tank:mail $base/tank:mail.new-$2
        """, first["snapshot"], stamp)  # fmt: skip
    done = replicate(here, take=True)
    assert set(why(done).values()) == {"incremental"} and same(here, done["snapshot"])
    for name in REPLICAS:
        assert snapshots(here, f"backup/dr/{name}.aside-{stamp}") == ["hand"]
        argv = ["zfs", "get", "-H", "-o", "value", "readonly,canmount,zfs_dr:stack", f"backup/dr/{name}"]
        assert here.run(*argv).stdout.split() == ["on", "noauto", "web"]


def test_a_rollback_of_ksnaps_goes_on_incrementally_and_what_is_aside_can_be_discarded(here):
    replicate(here, take=True)
    older, newest = take(here), replicate(here, take=True)["snapshot"]
    aside = here.call("ksnap.rollback", STACK, older)["aside"]
    # Until a newer set is whole at the target, the one that both sides had is kept.
    with pytest.raises(CommandExecutionError, match=rf"@{newest} is held"):
        here.call("ksnap.discard_aside", aside)
    write(here, "after")
    done = replicate(here, take=True)
    assert all("incremental" in text and "set aside" in text for text in why(done).values())
    assert same(here, done["snapshot"])
    here.call("ksnap.discard_aside", aside)
    # Back to a set that is whole there, with nothing newer: that is the newest one, on both sides.
    write(here, "again")
    replicate(here, take=True)
    here.call("ksnap.rollback", STACK, done["snapshot"])
    assert replicate(here)["snapshot"] == done["snapshot"]
    assert here.call("zfs_dr.status", STACK, VAULT)["snapshot"] == done["snapshot"]
    assert here.call("zfs_dr.verify", STACK, VAULT, contents=True)["snapshot"] == done["snapshot"]
    here.call("ksnap.discard_aside", here.call("ksnap.aside")[0]["id"])
    # A target that is given up has nothing in states aside, either.
    aside = here.call("ksnap.rollback", STACK, older)["aside"]
    gone = here.call("zfs_dr.forget", STACK, VAULT)["released"]
    (state,) = here.call("ksnap.aside")
    assert sorted(gone) == sorted(f"{name}@{done['snapshot']}" for name in state["datasets"].values())
    here.call("ksnap.discard_aside", aside)


def test_a_wrong_clock_decides_nothing(here):
    first = replicate(here, take=True)
    try:
        here.sh("date -s '+400 days' >/dev/null")
        second = replicate(here, take=True)
        here.sh("date -s '-900 days' >/dev/null")
        third = replicate(here, take=True)
        assert third["snapshot"] < first["snapshot"] < second["snapshot"]
        assert set(why(third).values()) == {"incremental"} and same(here, third["snapshot"])
        assert here.call("zfs_dr.status", STACK, VAULT)["snapshot"] == third["snapshot"]
        here.sh("date -s '-1 day' >/dev/null")
        # A set from the future says nothing of its age, and does not count as new.
        state = {"stack": STACK, "target": VAULT, "age": 3600}
        assert here.state("zfs_dr.replicated", "x", **state)["changes"]["snapshot"]["old"] == third["snapshot"]
    finally:
        here.sh("date -s @$1 >/dev/null", str(__import__("time").time()))


def test_a_replica_is_there_until_the_one_that_replaces_it_is_whole(here):
    first = replicate(here, take=True)
    newest = f"backup/dr@{first['snapshot']}"
    for dataset in ("tank/mail", "tank/web/db"):
        here.sh("zfs rename $1 tank/gone-${1##*/}; zfs create $1; head -c 3M /dev/urandom > /$1/anew", dataset)
    taken = take(here)
    # db's stream is cut off, mail's comes to its end or does not begin.
    here.put("/usr/local/sbin/zfs", CUT.replace("STREAM", "tank:web:db"), 0o755)
    with pytest.raises(CommandExecutionError):
        replicate(here)
    here.sh("rm /usr/local/sbin/zfs")
    listed = here.sh("zfs list -H -o name,receive_resume_token -r backup/dr").stdout.splitlines()
    coming = [line.split("\t")[0] for line in listed if ".coming-" in line]
    assert any(name.startswith("backup/dr/tank:web:db.coming-") for name in coming), listed
    # All that was there is there, whole, and serves if it must.
    assert [each["whole"] for each in here.call("zfs_dr.sets", "backup/dr", "web")] == [True]
    assert here.call("zfs_dr.status", STACK, VAULT)["snapshot"] == first["snapshot"]
    assert here.call("zfs_dr.status", STACK, VAULT)["extra"] == [] == here.call("zfs_dr.asides", "backup/dr")
    shown = here.call("zfs_dr.recover", "backup/dr", "web", "/mnt/rehearsal")
    assert shown["snapshot"] == first["snapshot"] and len(shown["mounts"]) == 3
    here.call("zfs_dr.end_rehearsal", "backup/dr", shown["id"])
    # A cut between the mark of the set and the names: the set is whole, and serves, too.
    here.put("/usr/local/sbin/zfs", CUT_NAMES, 0o755)
    with pytest.raises(CommandExecutionError, match="cut off"):
        replicate(here)
    here.sh("rm /usr/local/sbin/zfs")
    assert here.call("zfs_dr.sets", "backup/dr", "web")[-1] | {"arrived": 0} == {
        **here.call("zfs_dr.sets", "backup/dr", "web")[-1], "snapshot": taken, "whole": True, "arrived": 0,
    }  # fmt: skip
    shown = here.call("zfs_dr.recover", "backup/dr", "web", "/mnt/rehearsal")
    assert shown["snapshot"] == taken and here.sh("cmp /mnt/rehearsal/tank/mail/anew /tank/mail/anew").stdout == ""
    here.call("zfs_dr.end_rehearsal", "backup/dr", shown["id"])
    done = replicate(here)
    assert done["snapshot"] == taken and same(here, taken) and not replicate(here)["changed"]
    listed = here.sh("zfs list -H -o name -r backup/dr").stdout
    assert ".coming-" not in listed and listed.count(".aside-") == 2
    assert here.call("zfs_dr.verify", STACK, VAULT, contents=True)["snapshot"] == taken
    for each in here.call("zfs_dr.asides", "backup/dr"):
        assert snapshots(here, each["name"]) == [first["snapshot"]]
        here.call("zfs_dr.discard_aside", each["name"])
    assert newest in here.run("zfs", "list", "-H", "-t", "snapshot", "-o", "name", "backup/dr").stdout


def test_what_was_to_replace_a_replica_is_given_up_where_the_replica_can_be_gone_on_with(here):
    first = replicate(here, take=True)
    here.sh("zfs rename tank/mail tank/kept; zfs create tank/mail; head -c 3M /dev/urandom > /tank/mail/anew")
    take(here)
    here.put("/usr/local/sbin/zfs", CUT.replace("STREAM", "tank:mail"), 0o755)
    with pytest.raises(CommandExecutionError):
        replicate(here)
    here.sh("rm /usr/local/sbin/zfs; zfs rename tank/mail tank/anew; zfs rename tank/kept tank/mail")
    assert ".coming-" in here.sh("zfs list -H -o name -r backup/dr").stdout
    done = replicate(here, take=True)
    assert why(done)["mail"] == "incremental" and done["aside"] == [] and same(here, done["snapshot"])
    assert ".coming-" not in here.sh("zfs list -H -o name -r backup/dr").stdout
    # Somebody needs the room, and destroys what is to be replaced: what comes is the replica, and goes on.
    here.sh("zfs rename tank/mail tank/old; zfs rename tank/anew tank/mail")
    taken = take(here)
    here.put("/usr/local/sbin/zfs", CUT.replace("STREAM", "tank:mail"), 0o755)
    with pytest.raises(CommandExecutionError):
        replicate(here)
    here.sh("rm /usr/local/sbin/zfs; zfs release -r zfs_dr:web backup/dr@$1; zfs destroy -r backup/dr/tank:mail",
            done["snapshot"])  # fmt: skip
    done = replicate(here)
    assert why(done)["mail"] == "resumed" and same(here, taken) and first["snapshot"] != taken


def test_a_dataset_that_left_the_stack_is_held_no_more(here):
    stack = {"name": "web", "datasets": STACK["datasets"][:2]}
    first = replicate(here, take=True)
    assert holds(here, f"tank/mail@{first['snapshot']}") and snapshots(here, "tank/mail", "bookmark")
    done = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert done["datasets"].keys() == set(stack["datasets"])
    assert holds(here, f"tank/mail@{first['snapshot']}") == set() == set(snapshots(here, "tank/mail", "bookmark"))
    assert holds(here, f"tank/web@{done['snapshot']}") == {(f"tank/web@{done['snapshot']}", "zfs_dr:vault")}
    # Back again, then gone, and the target is given up.
    second = replicate(here, take=True)
    assert why(second)["mail"] == "incremental"
    gone = here.call("zfs_dr.forget", stack, VAULT)
    assert f"tank/mail@{second['snapshot']}" in gone["released"] and "tank/mail#" in " ".join(gone["bookmarks"])
    for name in STACK["datasets"]:
        assert holds(here, f"{name}@{second['snapshot']}") == set() == set(snapshots(here, name, "bookmark"))


def test_what_a_rollback_set_aside_is_released_also_after_a_cut(here):
    older, newest = (replicate(here, take=True)["snapshot"] for _ in range(2))
    here.call("ksnap.rollback", STACK, older)
    (state,) = here.call("ksnap.aside")
    write(here, "after")
    # The set comes to the target and is marked; before the end of it there is a cut.
    here.put("/usr/local/sbin/zfs", CUT_BOOKMARKS, 0o755)
    with pytest.raises(CommandExecutionError, match="cut off"):
        replicate(here, take=True)
    here.sh("rm /usr/local/sbin/zfs")
    for each in here.call("zfs_dr.asides", "backup/dr"):
        here.call("zfs_dr.discard_aside", each["name"])
    held = [f"{name}@{newest}" for name in state["datasets"].values()]
    assert len(holds(here, *held)) == 3
    replicate(here)
    assert holds(here, *held) == set()
    here.call("ksnap.discard_aside", state["id"])


def test_a_replica_that_is_written_to_while_another_one_still_comes_is_set_aside_by_the_next_call(here):
    replicate(here, take=True)
    write(here, "more")
    here.put("/usr/local/sbin/zfs", WRITES, 0o755)
    done = replicate(here, take=True)
    here.sh("rm /usr/local/sbin/zfs")
    assert done["changed"]
    assert here.run("zfs", "get", "-Hp", "-o", "value", "written", "backup/dr/tank:mail").stdout != "0\n"
    again = replicate(here)
    assert why(again)["mail"] == "the target had gone on by itself: that is set aside", why(again)
    assert not replicate(here)["changed"]


def test_a_snapshot_that_somebody_took_of_a_replica_is_left_or_set_aside(here):
    here.sh("echo secret-words > /root/key; zfs create -o encryption=on -o keyformat=passphrase -o "
            "keylocation=file:///root/key tank/safe; head -c 300K /dev/urandom > /tank/safe/a")  # fmt: skip
    stack = {"name": "web", "datasets": [*STACK["datasets"], "tank/safe"]}
    here.call("zfs_dr.replicate", stack, VAULT, take=True)
    here.sh("for each in mail safe; do zfs snapshot backup/dr/tank:$each@hand; done; echo b > /tank/safe/b")
    write(here, "more")
    done = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    # To a raw one OpenZFS adds nothing then.
    assert why(done)["safe"] == "incremental; what the target had beyond that is set aside"
    assert [name.partition(".aside-")[0] for name in done["aside"]] == ["backup/dr/tank:safe"]
    assert snapshots(here, done["aside"][0]) == ["hand"] and "hand" in snapshots(here, "backup/dr/tank:mail")
    assert same(here, done["snapshot"])
    assert guids(here, f"tank/safe@{done['snapshot']}") == guids(here, f"backup/dr/tank:safe@{done['snapshot']}")


def test_two_sources_do_not_share_a_replica(here):
    first = replicate(here, take=True)
    here.run("zfs", "set", "zfs_dr:source=other", *(f"backup/dr/{name}" for name in REPLICAS))
    with pytest.raises(CommandExecutionError, match=r"is the replica of web of other, not of web of machine"):
        replicate(here, take=True)
    assert snapshots(here, "backup/dr/tank:web") == [first["snapshot"]]
    # It is this machine under a new name: done as it was told.
    here.run("zfs", "set", "zfs_dr:source=machine", *(f"backup/dr/{name}" for name in REPLICAS))
    assert set(why(replicate(here, take=True)).values()) == {"incremental"}


def test_several_pools(here):
    here.sh("truncate -s 128M /srv/fast; zpool create fast /srv/fast; zfs create fast/log; echo x > /fast/log/file")
    stack = {"name": "web", "datasets": ["tank/web", "fast/log"]}
    for _ in range(3):
        done = here.call("zfs_dr.replicate", stack, VAULT, take=True)
        names = [f"{name}@{done['snapshot']}" for name in stack["datasets"]]
        assert guids(here, *names) == guids(here, *(f"backup/dr/{name.replace('/', ':')}" for name in names))
    assert not here.call("zfs_dr.replicate", stack, VAULT)["changed"]
    assert here.call("zfs_dr.verify", stack, VAULT, contents=True)["problems"] == []
    for name in stack["datasets"]:
        assert len(snapshots(here, name, "bookmark")) == 2
    here.run("zpool", "destroy", "fast")


def test_a_volume_is_set_aside_and_renamed_as_a_file_system_is(here):
    def send(name):
        return here.call("zfs_dr.replicate", {"name": "disk", "datasets": [name]}, VAULT, take=True)

    here.sh("zfs create -s -V 8M tank/disk")
    first, second = send("tank/disk"), send("tank/disk")
    back = "zfs release zfs_dr:vault tank/disk@$1; zfs rollback -r tank/disk@$2"
    here.sh(back, second["snapshot"], first["snapshot"])
    third = send("tank/disk")
    assert "set aside" in third["datasets"]["tank/disk"]["why"] and third["aside"]
    here.sh("zfs rename tank/disk tank/drive")
    moved = send("tank/drive")
    assert moved["datasets"]["tank/drive"]["replica"] == "backup/dr/tank:drive" and moved["aside"] == []
    # The source is lost while the next set is on its way.
    here.sh(
        "zfs snapshot tank/drive@next; zfs send -w -i @$1 tank/drive@next | zfs receive -u backup/dr/tank:drive; "
        "zpool export tank", moved["snapshot"],
    )  # fmt: skip
    done = here.call("zfs_dr.recover", "backup/dr", "disk", how="promote", silence=0)
    assert done["snapshot"] == moved["snapshot"] == snapshots(here, "backup/dr/tank:drive")[-1]


def test_a_stack_made_of_a_copy_has_a_replica_of_its_own(here):
    first = replicate(here, take=True)
    here.sh("zfs send backup/dr/tank:mail@$1 | zfs receive -o readonly=off tank/copy", first["snapshot"])
    done = here.call("zfs_dr.replicate", {"name": "copy", "datasets": ["tank/copy"]}, VAULT, take=True)
    assert done["datasets"]["tank/copy"]["why"] == "full: it is not at the target yet" and done["aside"] == []
    assert same(here, first["snapshot"])
    assert set(why(replicate(here, take=True)).values()) == {"incremental"}


def test_what_was_set_aside_is_kept_until_the_other_is_whole(here):
    first = replicate(here, take=True)
    aside = here.call("zfs_dr.set_aside", None, "backup/dr/tank:mail", None, "20261125T222408Z")
    here.sh(f"zfs send -Lec tank/mail@$1 | head -c 100000 | zfs receive -s -u {NEW} backup/dr/tank:mail || true",
            first["snapshot"])  # fmt: skip
    with pytest.raises(CommandExecutionError, match="tank:mail, which is to replace it, has not arrived whole"):
        here.call("zfs_dr.discard_aside", aside)
    with pytest.raises(CommandExecutionError, match=f"What was set aside has data, too: {aside}"):
        here.call("zfs_dr.recover", "backup/dr", "web", "/mnt/rehearsal")
    assert why(replicate(here))["mail"] == "resumed" and same(here, first["snapshot"])
    here.call("zfs_dr.discard_aside", aside)
    assert here.call("zfs_dr.asides", "backup/dr") == []
