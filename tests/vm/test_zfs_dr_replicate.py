"""Replication on one machine, from pool to pool, also when something is not as it was."""

import json

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE
from .zfs_dr import REPLICAS, STACK, VAULT, holds, replicate, same, snapshots, write


def test_a_full_then_incremental_ones_then_nothing(here):
    first = replicate(here, take=True)
    assert first["changed"] and first["bytes"] > 900_000
    assert all(each["why"].startswith("full") for each in first["datasets"].values())
    assert same(here, first["snapshot"])
    # Whole, and marked so; nothing is mounted, nothing is writable.
    assert snapshots(here, "backup/dr") == [first["snapshot"]]
    for name in REPLICAS:
        argv = ["zfs", "get", "-H", "-o", "value", "mounted,readonly,canmount", f"backup/dr/{name}"]
        assert here.run(*argv).stdout.split() == ["no", "on", "noauto"]
    told = json.loads(here.run("zfs", "get", "-H", "-o", "value", "zfs_dr:properties", "backup/dr/tank:web").stdout)
    assert (told["recordsize"], told["mountpoint"], told["dataset"]) == ("16384", "/tank/web", "tank/web")
    write(here, "second")
    second = replicate(here, take=True)
    assert all(each["why"] == "incremental" for each in second["datasets"].values())
    assert 900_000 < second["bytes"] < 1_500_000
    assert same(here, second["snapshot"])
    assert snapshots(here, "backup/dr") == [first["snapshot"], second["snapshot"]]
    # The last whole set is held on both sides, the one before no longer.
    for name in STACK["datasets"]:
        assert holds(here, *(f"{name}@{s}" for s in (first["snapshot"], second["snapshot"]))) == {
            (f"{name}@{second['snapshot']}", "zfs_dr:vault")
        }
        assert snapshots(here, name, "bookmark") == [f"zfs_dr-vault-{r['snapshot']}" for r in (first, second)]
    for name in ["", *(f"/{name}" for name in REPLICAS)]:
        both = [f"backup/dr{name}@{each['snapshot']}" for each in (first, second)]
        assert holds(here, *both) == {(both[1], "zfs_dr:web")}
    third = replicate(here)
    assert (third["changed"], third["bytes"], third["snapshot"]) == (False, 0, second["snapshot"])
    # A third bookmark makes the first one go.
    fourth = replicate(here, take=True)
    assert snapshots(here, "tank/mail", "bookmark") == [f"zfs_dr-vault-{r['snapshot']}" for r in (second, fourth)]
    # That nobody touched the replicas is seen without a list of their snapshots.
    sides, names = {"source": None, "target": None}, dict(zip(STACK["datasets"], REPLICAS, strict=True))
    _, there = here.call("zfs_dr.since", sides, "backup/dr", "web", names, fourth["snapshot"])
    assert [len(there["replicas"][name]["snapshots"]) for name in REPLICAS] == [1, 1, 1]
    # Nor is a snapshot that somebody took of one in the way, with nothing in it.
    here.run("zfs", "snapshot", "backup/dr/tank:mail@mine")
    write(here, "fifth")
    fifth = replicate(here, take=True)
    assert fifth["aside"] == [] and same(here, fifth["snapshot"])
    assert snapshots(here, "backup/dr/tank:mail")[-2:] == ["mine", fifth["snapshot"]]


def test_nothing_new_is_seen_at_a_glance_and_what_is_new_too(here):
    done = replicate(here, take=True)
    sides, datasets = {"source": None, "target": None}, STACK["datasets"]

    def nothing_new(datasets=datasets):
        last = json.loads(here.read("/var/lib/zfs_dr/vault-web.last"))
        return here.call("zfs_dr.nothing_new", sides, "backup/dr", datasets, {}, last)

    assert nothing_new()
    # Each of these is seen; the next replication looks closer, mends it, and then a glance is enough again.
    for change in (
        "zfs release zfs_dr:web backup/dr@$1",
        """
        zfs set readonly=off mountpoint=/mnt/replica backup/dr/tank:mail; zfs mount backup/dr/tank:mail
        echo changed > /mnt/replica/first; zfs unmount backup/dr/tank:mail
        zfs set readonly=on mountpoint=none backup/dr/tank:mail
        """,
        "zfs snapshot tank/web@ksnap-9 tank/web/db@ksnap-9 tank/mail@ksnap-9",
    ):
        here.sh(change, done["snapshot"])
        assert not nothing_new(), change
        done = replicate(here)
        assert nothing_new(), change
    assert done["snapshot"] == "ksnap-9" and same(here, "ksnap-9")
    assert not nothing_new(datasets[:2])
    # A snapshot of one dataset alone, or of another name, is no set.
    here.sh("zfs snapshot tank/mail@ksnap-99; zfs snapshot tank/web@mine")
    assert nothing_new()
    here.sh("zfs release zfs_dr:vault tank/web/db@ksnap-9; zfs rename tank/web/db tank/old; zfs create tank/web/db")
    assert not nothing_new()
    here.sh("zfs destroy tank/web/db; zfs rename tank/old tank/web/db")
    assert nothing_new()
    # A promotion changes no byte, and says so itself.
    here.call("zfs_dr.recover", "backup/dr", "web", "/mnt/promoted", how="promote", force=True)
    assert not nothing_new()


@ONE
def test_what_diverged_is_set_aside_and_goes_on_incrementally(here):
    """Rolled back by hand, written to, renamed, made anew: nothing is lost, and nothing goes in full needlessly."""
    first, second = replicate(here, take=True), replicate(here, take=True)
    # The source is rolled back by hand, under the replica; ZFS itself wants the newer ones and their holds away first.
    release = "for each in web web/db mail; do zfs release zfs_dr:vault tank/$each@$1; $2 tank/$each@$3; done"
    here.sh(release, second["snapshot"], "zfs rollback -r", first["snapshot"])
    write(here, "after")
    third = replicate(here, take=True)
    assert all("set aside" in each["why"] and "full" not in each["why"] for each in third["datasets"].values())
    assert same(here, third["snapshot"])
    assert sorted(each["replica"] for each in here.call("zfs_dr.asides", "backup/dr")) == sorted(
        f"backup/dr/{name}" for name in REPLICAS
    )
    for each in third["aside"]:
        assert snapshots(here, each) == [second["snapshot"]]
    # Somebody writes to a replica, and the source has nothing new.
    here.sh(
        "zfs set readonly=off mountpoint=/mnt backup/dr/tank:mail; zfs mount backup/dr/tank:mail; echo x > /mnt/new"
    )
    here.sh("zfs unmount backup/dr/tank:mail; zfs set readonly=on mountpoint=none backup/dr/tank:mail; zpool sync")
    fourth = replicate(here)
    assert len(fourth["aside"]) == 1 and fourth["snapshot"] == third["snapshot"]
    here.sh("zfs set mountpoint=/mnt $1; zfs mount $1", fourth["aside"][0])
    assert here.read("/mnt/new") == "x\n"
    here.run("zfs", "unmount", fourth["aside"][0])
    assert same(here, fourth["snapshot"])
    here.call("zfs_dr.discard_aside", fourth["aside"][0])
    # A dataset is renamed: its replica is, too, and one is made anew in its old place.
    here.sh("zfs rename tank/mail tank/post; zfs create tank/mail; head -c 100K /dev/urandom > /tank/mail/file")
    stack = {"name": "web", "datasets": [*STACK["datasets"], "tank/post"]}
    fifth = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert fifth["datasets"]["tank/post"]["why"].startswith("incremental")
    assert fifth["datasets"]["tank/mail"]["why"].startswith("full")
    assert same(here, fifth["snapshot"])
    # Destroyed and made anew under its name: the old replica is set aside, the new one sent in full.
    here.run("zfs", "release", "zfs_dr:vault", f"tank/post@{fifth['snapshot']}")
    here.sh("zfs destroy -r tank/post; zfs create tank/post; echo anew > /tank/post/file")
    sixth = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert "made anew" in sixth["datasets"]["tank/post"]["why"]
    assert sixth["aside"] == [
        each["name"] for each in here.call("zfs_dr.asides", "backup/dr") if "post" in each["name"]
    ]
    # A dataset leaves the stack: its replica stays, and is named.
    seventh = replicate(here, take=True)
    assert here.call("zfs_dr.status", STACK, VAULT)["extra"] == ["tank:post"]
    assert same(here, seventh["snapshot"])


@ONE
def test_pruning_on_both_sides_leaves_what_is_needed(here):
    first = replicate(here, take=True)
    # The source's snapshots go, even the held one, by force: the bookmark is left.
    away = "for each in web web/db mail; do zfs release zfs_dr:vault tank/$each@$1; zfs destroy tank/$each@$1; done"
    here.sh(away, first["snapshot"])
    second = replicate(here, take=True)
    assert all(each["why"] == "incremental, from a bookmark" for each in second["datasets"].values())
    third, fourth = replicate(here, take=True), replicate(here, take=True)
    told = here.call("zfs_dr.prune", "backup/dr", "web", None, 1, True)
    assert sorted(told["destroyed"]) == [each["snapshot"] for each in (first, second, third)]
    assert len(snapshots(here, "backup/dr")) == 4
    assert here.call("zfs_dr.prune", "backup/dr", "web", count=1) == told
    for name in ["", *(f"/{name}" for name in REPLICAS)]:
        assert snapshots(here, f"backup/dr{name}") == [fourth["snapshot"]]
    fifth = replicate(here, take=True)
    assert all(each["why"] == "incremental" for each in fifth["datasets"].values())
    # Both the snapshots and the bookmarks are gone: it says why, and does nothing until told.
    here.sh("""
        for each in web web/db mail; do
            zfs release zfs_dr:vault tank/$each@$1
            zfs list -H -d1 -t snapshot,bookmark -o name tank/$each | xargs -n1 zfs destroy
        done
        """, fifth["snapshot"])  # fmt: skip
    with pytest.raises(CommandExecutionError, match="no snapshot and no bookmark in common"):
        replicate(here, take=True)
    assert here.call("zfs_dr.status", STACK, VAULT)["error"].startswith("Nothing was sent")
    assert snapshots(here, "backup/dr/tank:mail")[-1] == fifth["snapshot"]
    sixth = replicate(here, full=True)
    assert len(sixth["aside"]) == 3
    assert same(here, sixth["snapshot"])
    assert here.call("zfs_dr.status", STACK, VAULT)["error"] is None
    # Giving the target up leaves nothing behind at the source.
    gone = here.call("zfs_dr.forget", STACK, VAULT)
    assert len(gone["released"]) == len(gone["bookmarks"]) == 3
    for name in STACK["datasets"]:
        assert snapshots(here, name, "bookmark") == []
        assert holds(here, *(f"{name}@{s}" for s in snapshots(here, name))) == set()


@ONE
def test_what_stands_in_the_way_is_told(here):
    replicate(here, take=True)
    # Another source has the same names; a dataset of somebody's stands there.
    with pytest.raises(CommandExecutionError, match=r"is the replica of web of .*, not of other"):
        here.call("zfs_dr.replicate", {**STACK, "name": "other"}, VAULT)
    here.run("zfs", "create", "backup/dr/tank:extra")
    here.run("zfs", "create", "tank/extra")
    with pytest.raises(CommandExecutionError, match="was not made by zfs_dr"):
        here.call("zfs_dr.replicate", {"name": "extra", "datasets": ["tank/extra"]}, VAULT, take=True)
    here.run("zfs", "destroy", "backup/dr/tank:extra")
