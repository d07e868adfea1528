"""Snapshots of a stack on real OpenZFS: of one moment, told apart, kept, compared and destroyed."""

import re

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import CONFIG, DATASETS, MAIL, ONE, again, dry, snapshots


@ONE
def test_stacks_are_found_by_path_and_by_name(mail):
    mail.sh("mkdir /tank/mail/tmp; mount -t tmpfs tmpfs /tank/mail/tmp; mkdir /tank/mail/disc")
    mail.sh("mkdir -p /srv/plain; mount --bind /srv/plain /tank/mail/disc")
    found = mail.call("ksnap.stack", {"paths": ["/tank/mail", "/srv/plain"], "children": True})
    assert found["datasets"] == ["tank/mail", "tank/mail/queue", "tank/mail/vol"]
    assert found["paths"] == {"/tank/mail": "tank/mail"}
    assert found["outside"] == ["/srv/plain", "/tank/mail/disc"]
    assert mail.call("ksnap.stack", "mail", config=CONFIG)["datasets"] == DATASETS
    with pytest.raises(CommandExecutionError, match=r"tank/gone.*does not exist"):
        mail.call("ksnap.stack", {"datasets": ["tank/gone"]})
    with pytest.raises(SaltInvocationError, match="declared are: none"):
        mail.call("ksnap.stack", "mail")


def test_one_snapshot_is_of_one_moment_and_says_who_and_why(mail):
    mail.sh("for n in $(seq 30); do zfs create tank/db/$n; done")
    # Somebody writes and takes snapshots all the while, so that transaction groups come and go.
    mail.sh("(for n in $(seq 60); do echo $n > /tank/db/$n; zfs snapshot tank/other@$n; done) >/dev/null 2>&1 &")
    first = mail.call("ksnap.snapshot", "mail", label="first", reason="to\ttry\nit", config=CONFIG)
    assert len(first["datasets"]) == 34
    shown = mail.sh(f"zfs list -H -p -t snapshot -o name,guid,createtxg | grep {first['snapshot']}").stdout
    rows = [line.split("\t") for line in shown.splitlines()]
    assert {row[2] for row in rows} == {str(first["createtxg"]["tank"])}
    assert {row[0].split("@")[0]: int(row[1]) for row in rows} == first["datasets"]
    has = mail.run(
        "zfs", "get", "-H", "-s", "local", "-o", "property,value", "all", f"tank/db@{first['snapshot']}"
    ).stdout  # fmt: skip
    assert dict(line.split("\t") for line in has.splitlines()) == {
        "ksnap:stack": "mail",
        "ksnap:count": "34",
        "ksnap:label": "first",
        "ksnap:reason": "to try it",
        "ksnap:who": "root",
    }


@ONE
def test_test_mode_takes_none(mail):
    told = dry(mail, "ksnap.snapshot", MAIL, label="x")
    assert told["datasets"] == DATASETS
    assert snapshots(mail) == []


@ONE
def test_the_list_tells_what_keeps_each(mail):
    first = mail.call("ksnap.snapshot", "mail", label="first", reason="because", hold="audit", config=CONFIG)
    mail.sh("zfs snapshot tank/db@by-hand; rm /tank/mail/file; head -c 1M /dev/urandom > /tank/mail/big; zpool sync")
    second = mail.call("ksnap.snapshot", "mail", label="second", config=CONFIG)
    mail.sh(f"rm /tank/mail/big; zpool sync; zfs clone tank/db@{second['snapshot']} tank/copy")
    listed = mail.call("ksnap.list", "mail", config=CONFIG)
    assert [each["snapshot"] for each in listed] == [first["snapshot"], second["snapshot"]]
    one, two = listed
    assert (one["label"], one["reason"], one["stack"], one["whole"], one["own"]) == (
        "first",
        "because",
        "mail",
        True,
        True,
    )
    assert {dataset: has["guid"] for dataset, has in one["datasets"].items()} == first["datasets"]
    assert all(has["holds"] == ["audit"] for has in one["datasets"].values())
    assert two["used"] > 2**20 > one["used"]
    assert two["datasets"]["tank/db"]["clones"] == ["tank/copy"]
    assert "by-hand" in [each["snapshot"] for each in mail.call("ksnap.list", MAIL, all=True)]
    table = mail.call("ksnap.table", "mail", config=CONFIG).splitlines()
    assert re.match(r"WHEN \(UTC\) +LABEL +USED +WHY +KEPT BY", table[0])
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +first +\d.* +because +audit$", table[1])
    assert re.match(r".* second +1\.\d MiB +- +tank/copy$", table[2])
    # What is kept is not destroyed, and it is said by what.
    with pytest.raises(CommandExecutionError, match=r"held by audit \(tank/db@.*ksnap.release"):
        mail.call("ksnap.destroy", "mail", "first", config=CONFIG)
    with pytest.raises(CommandExecutionError, match=r"the origin of tank/copy \(tank/db@"):
        mail.call("ksnap.destroy", "mail", "second", config=CONFIG)
    assert len(snapshots(mail)) == 9
    assert mail.call("ksnap.release", MAIL, "first", "audit") == DATASETS
    assert mail.call("ksnap.release", MAIL, "first", "audit") == []
    assert mail.call("ksnap.hold", MAIL, "first") == DATASETS
    assert mail.call("ksnap.hold", MAIL, "first") == []
    mail.call("ksnap.release", MAIL, "first")
    mail.sh(f"zfs hold zfs_dr:north tank/db@{first['snapshot']}")
    with pytest.raises(CommandExecutionError, match="needed by replication to north"):
        mail.call("ksnap.destroy", MAIL, "first")
    with pytest.raises(SaltInvocationError, match="hold of replication"):
        mail.call("ksnap.release", MAIL, "first", "zfs_dr:north")
    mail.sh(f"zfs release zfs_dr:north tank/db@{first['snapshot']}")
    dry(mail, "ksnap.destroy", MAIL, "first")
    assert len(snapshots(mail)) == 9
    assert mail.call("ksnap.destroy", MAIL, "first") == {"snapshot": first["snapshot"], "datasets": DATASETS}
    assert len(snapshots(mail)) == 5


@ONE
def test_labels_that_are_not_unique(mail):
    names = [mail.call("ksnap.snapshot", MAIL, label="same")["snapshot"] for _ in range(2)]
    with pytest.raises(SaltInvocationError, match=f"2 snapshots have the label same.*{names[0]}, {names[1]}"):
        mail.call("ksnap.destroy", MAIL, "same")
    with pytest.raises(SaltInvocationError, match="has no snapshot nothing"):
        mail.call("ksnap.destroy", MAIL, "nothing")


@ONE
def test_hooks_run_around_it_and_their_failure_leaves_nothing(mail):
    script = '#!/bin/sh\necho "$1 $(zfs list -H -t snapshot -o name | wc -l)" >> /srv/log\n[ "$2" != fail ] || exit 3\n'
    mail.put("/srv/hook", script, mode=0o755)
    mail.call("ksnap.snapshot", MAIL, before=["/srv/hook", "before"], after=["/srv/hook", "after"])
    assert mail.read("/srv/log") == "before 0\nafter 4\n"
    mail.run("rm", "/srv/log")
    with pytest.raises(CommandExecutionError, match=r"before the snapshot, /srv/hook before fail, failed \(3\)"):
        mail.call("ksnap.snapshot", MAIL, before=["/srv/hook", "before", "fail"], after=["/srv/hook", "after"])
    # What a failed command may have half done must be ended all the same.
    assert mail.read("/srv/log") == "before 4\nafter 4\n"
    with pytest.raises(CommandExecutionError, match=r"after the snapshot, /srv/hook after fail, failed \(3\)"):
        mail.call("ksnap.snapshot", MAIL, after=["/srv/hook", "after", "fail"])
    with pytest.raises(CommandExecutionError, match=r"has not ended within 0\.3 s and was killed"):
        mail.call("ksnap.snapshot", {**MAIL, "timeout": 0.3}, before=["sleep", "1000"])
    assert mail.run("pgrep", "-x", "sleep", check=False).stdout == ""
    assert len(snapshots(mail)) == 4


@ONE
def test_several_pools_one_after_the_other_and_all_or_none(mail):
    mail.sh("zpool create fast $1; zfs create fast/wal", mail.devices[1])
    both = {"datasets": ["tank/db", "fast/wal"]}
    taken = mail.call("ksnap.snapshot", both)
    assert set(taken["createtxg"]) == {"tank", "fast"}
    assert len(snapshots(mail)) == 2
    # The second pool takes no more snapshots: the first one's must go too.
    again(mail, "fast", "-o", "readonly=on", disk=1)
    both = {"datasets": ["fast/wal", "tank/db"]}
    with pytest.raises(CommandExecutionError, match=r"read-only|read only"):
        mail.call("ksnap.snapshot", {"datasets": ["fast/wal"]})
    with pytest.raises(CommandExecutionError, match=r"read-only|read only"):
        mail.call("ksnap.snapshot", both)
    assert len(snapshots(mail)) == 2


@ONE
def test_what_has_changed_summed_by_path(mail):
    mail.sh(
        "mkdir -p /tank/mail/a/b; touch '/tank/mail/a/b/with space' /tank/mail/a/b/é /tank/mail/gone /tank/mail/old"
    )
    mail.call("ksnap.snapshot", MAIL, label="then")
    mail.sh(
        "touch /tank/mail/a/b/{1,2,3} '/tank/mail/new one'; rm /tank/mail/gone; echo x > '/tank/mail/a/b/with space'"
    )
    mail.sh("mv /tank/mail/old /tank/mail/named; echo x > /tank/mail/queue/1")
    changed = mail.call("ksnap.diff", MAIL, "then")
    assert sorted(changed) == ["tank/db", "tank/mail", "tank/mail/queue"]
    assert changed["tank/db"] == {}
    assert changed["tank/mail"]["/tank/mail/a/b"] == {"added": 3, "removed": 0, "modified": 2, "renamed": 0}
    assert changed["tank/mail"]["/tank/mail/new one"]["added"] == 1
    assert changed["tank/mail"]["/tank/mail/gone"]["removed"] == 1
    assert changed["tank/mail"]["/tank/mail/old"]["renamed"] == 1
    assert changed["tank/mail/queue"]["/tank/mail/queue/1"]["added"] == 1
    assert mail.call("ksnap.diff", MAIL, "then", depth=0)["tank/mail"]["/tank/mail"]["added"] == 4
    mail.call("ksnap.snapshot", MAIL, label="now")
    mail.sh("touch /tank/mail/later")
    assert "/tank/mail/later" not in mail.call("ksnap.diff", MAIL, "then", to="now")["tank/mail"]
    mail.run("zfs", "unmount", "tank/db")
    with pytest.raises(CommandExecutionError, match="tank/db is not mounted"):
        mail.call("ksnap.diff", MAIL, "then")
