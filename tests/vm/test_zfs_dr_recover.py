"""The replica stands in for the source, and gives back what changed meanwhile."""

import time

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE
from .zfs_dr import FORGOTTEN, TARGET, VAULT

pytestmark = ONE
STACK = {"name": "web", "datasets": ["tank/web", "tank/web/db"]}


@pytest.fixture
def here(fresh):
    """A machine with two pools, and a stack that is mounted where it serves."""
    fresh.sh(FORGOTTEN)
    fresh.sh(
        """
        zpool create tank $1; zfs create -o mountpoint=/srv/web -o recordsize=16K tank/web; zfs create tank/web/db
        echo one > /srv/web/file; echo one > /srv/web/db/file
        """,
        fresh.devices[0],
    )
    fresh.sh(TARGET, fresh.devices[1])
    return fresh


def replicate(machine, **options):
    return machine.call("zfs_dr.replicate", STACK, VAULT, **options)


def recover(machine, where=None, **options):
    return machine.call("zfs_dr.recover", "backup/dr", "web", where, **options)


def test_a_rehearsal_is_writable_and_leaves_nothing(here):
    first = replicate(here, take=True)
    done = recover(here, "/mnt/rehearsal")
    assert done["snapshot"] == first["snapshot"] and done["rto"] > 0 and 0 <= done["rpo"] < 600
    assert sorted(done["mounts"].values()) == ["/mnt/rehearsal/srv/web", "/mnt/rehearsal/srv/web/db"]
    assert here.read("/mnt/rehearsal/srv/web/db/file") == "one\n"
    here.sh("echo two > /mnt/rehearsal/srv/web/db/file")
    clone = next(name for name, path in done["mounts"].items() if path.endswith("web"))
    assert here.run("zfs", "get", "-H", "-o", "value", "recordsize,canmount", clone).stdout.split() == ["16K", "noauto"]
    assert here.read("/srv/web/db/file") == "one\n"
    # Replication goes on meanwhile, and pruning leaves what the rehearsal stands on.
    second, third = replicate(here, take=True), replicate(here, take=True)
    told = here.call("zfs_dr.prune", "backup/dr", "web", count=1)
    assert list(told["destroyed"]) == [second["snapshot"]] and third["snapshot"] in told["kept"]
    assert [each["id"] for each in here.call("zfs_dr.rehearsals", "backup/dr")] == [done["id"]]
    here.call("zfs_dr.end_rehearsal", "backup/dr", done["id"])
    assert here.call("zfs_dr.rehearsals", "backup/dr") == []
    assert "rehearsal" not in here.run("zfs", "list", "-H", "-o", "name", "-r", "backup").stdout
    # A mountpoint that would lead out of the directory is not followed.
    here.run("zfs", "set", 'zfs_dr:properties={"mountpoint": "/../../etc"}', "backup/dr/tank:web:db")
    done = recover(here, "/mnt/rehearsal")
    assert list(done["mounts"].values()) == ["/mnt/rehearsal/srv/web"]
    assert done["unmounted"] == {"tank:web:db": "its mountpoint is told as /../../etc, which is no plain path"}


def test_promoted_demoted_and_brought_back(here):
    first = replicate(here, take=True)
    with pytest.raises(CommandExecutionError, match="The source of web lives"):
        recover(here, how="promote")
    assert here.run("zfs", "get", "-H", "-o", "value", "readonly", "backup/dr/tank:web").stdout == "on\n"
    # The source is lost while the next set is on its way, with something on it that had not been replicated.
    here.sh("""
        zfs snapshot tank/web@next; zfs send -w -i @$1 tank/web@next | zfs receive -u backup/dr/tank:web
        """, first["snapshot"])  # fmt: skip
    here.sh("echo lost > /srv/web/lost; zpool sync; zpool export tank")
    failed = time.time()
    done = recover(here, how="promote", silence=0, failed=failed)
    assert done["snapshot"] == first["snapshot"] and done["rpo"] > 0 and done["rto"] > 0
    assert len(here.call("zfs_dr.asides", "backup/dr")) == 1
    assert done["mounts"] == {"backup/dr/tank:web": "/srv/web", "backup/dr/tank:web:db": "/srv/web/db"}
    # The source comes back: it must not replicate over what serves now, nor say that all is well where nothing is new.
    here.run("zpool", "import", "-N", "-d", "/dev/disk/by-id", "tank")
    with pytest.raises(CommandExecutionError, match=r"was promoted.*zfs_dr.failback"):
        replicate(here)
    here.sh("echo two > /srv/web/db/file; ! [ -e /srv/web/lost ]")
    with pytest.raises(CommandExecutionError, match=r"was promoted.*zfs_dr.failback"):
        replicate(here, take=True)
    with pytest.raises(CommandExecutionError, match="serve yet"):
        here.call("zfs_dr.failback", STACK, VAULT)
    demoted = here.call("zfs_dr.demote", "backup/dr", "web")
    assert demoted["since"] == first["snapshot"]
    here.sh("zfs mount tank/web; zfs mount tank/web/db")
    back = here.call("zfs_dr.failback", STACK, VAULT)
    assert (back["snapshot"], back["since"]) == (demoted["snapshot"], first["snapshot"])
    assert here.read("/srv/web/db/file") == "two\n"
    # What the source alone had is set aside, not lost.
    assert back["aside"] and here.call("ksnap.aside")
    # And it is the source again.
    again = replicate(here, take=True)
    assert all(each["why"] == "incremental" for each in again["datasets"].values())
    assert here.call("zfs_dr.verify", STACK, VAULT, contents=True)["ok"]
    # What was set aside then is no promotion that had begun.
    with pytest.raises(CommandExecutionError, match="The source of web lives"):
        recover(here, how="promote")
    assert recover(here, "/mnt/r")["snapshot"] == again["snapshot"]


def test_an_encrypted_replica_leaves_and_comes_back_without_its_key_at_the_target(here):
    here.put("/root/key", "correct horse battery staple")
    here.sh("zfs create -o encryption=on -o keyformat=passphrase -o keylocation=file:///root/key tank/secret")
    here.sh("echo hidden > /tank/secret/file")
    stack = {"name": "secret", "datasets": ["tank/secret"]}
    first = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert here.run("zfs", "get", "-H", "-o", "value", "keystatus", "backup/dr/tank:secret").stdout == "unavailable\n"
    # The key is rotated: the next one carries it along.
    here.put("/root/key2", "another horse and staple")
    here.sh("zfs change-key -o keylocation=file:///root/key2 tank/secret; echo more > /tank/secret/more")
    second = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert second["datasets"]["tank/secret"]["why"] == "incremental"
    with pytest.raises(CommandExecutionError, match="keys"):
        here.call("zfs_dr.recover", "backup/dr", "secret", "/mnt/r")
    done = here.call("zfs_dr.recover", "backup/dr", "secret", "/mnt/r", keys={"tank/secret": "/root/key2"})
    assert here.read("/mnt/r/tank/secret/more") == "more\n"
    here.call("zfs_dr.end_rehearsal", "backup/dr", done["id"])
    here.run("zfs", "unload-key", "backup/dr/tank:secret")
    # Rolled back under it: set aside without the key.
    again = "zfs release zfs_dr:vault tank/secret@$1; zfs rollback -r tank/secret@$2"
    here.sh(again, second["snapshot"], first["snapshot"])
    third = here.call("zfs_dr.replicate", stack, VAULT, take=True)
    assert "set aside" in third["datasets"]["tank/secret"]["why"] and third["aside"]


def test_an_encrypted_replica_that_is_beyond_the_set_is_promoted(here):
    here.put("/root/key", "correct horse battery staple")
    here.sh("zfs create -o encryption=on -o keyformat=passphrase -o keylocation=file:///root/key tank/secret")
    here.sh("echo hidden > /tank/secret/file")
    first = here.call("zfs_dr.replicate", {"name": "secret", "datasets": ["tank/secret"]}, VAULT, take=True)
    here.sh("""
        echo more > /tank/secret/more; zfs snapshot tank/secret@next
        zfs send -w -i @$1 tank/secret@next | zfs receive -u backup/dr/tank:secret; zpool export tank
        """, first["snapshot"])  # fmt: skip
    keys = {"tank/secret": "/root/key"}
    done = here.call("zfs_dr.recover", "backup/dr", "secret", how="promote", silence=0, keys=keys)
    assert done["mounts"] == {"backup/dr/tank:secret": "/tank/secret"}
    assert here.sh("cd /tank/secret; echo *; cat file").stdout == "file\nhidden\n"


def test_a_source_that_was_received_anew_is_one_again(here):
    replicate(here, take=True)
    here.sh("zpool export tank")
    recover(here, how="promote", silence=0)
    here.sh("echo two > /srv/web/db/file")
    demoted = here.call("zfs_dr.demote", "backup/dr", "web")["snapshot"]
    here.sh("""
        zpool create -f tank $1
        zfs send backup/dr/tank:web@$2 | zfs receive -o mountpoint=/srv/web tank/web
        zfs send backup/dr/tank:web:db@$2 | zfs receive tank/web/db
        """, here.devices[0], demoted)  # fmt: skip
    back = here.call("zfs_dr.failback", STACK, VAULT)
    assert (back["snapshot"], back["bytes"], back["aside"]) == (demoted, 0, None)
    assert here.read("/srv/web/db/file") == "two\n"
    again = replicate(here, take=True)
    assert all(each["why"] == "incremental" for each in again["datasets"].values())


def test_services_stand_still_while_all_is_brought_back(here):
    here.put(
        "/etc/systemd/system/writer.service",
        "[Service]\nWorkingDirectory=/srv/web\n"
        "ExecStart=/bin/sh -c 'while :; do echo x >> /srv/web/db/log; sleep 0.1; done'\n",
    )
    replicate(here, take=True)
    here.sh("zpool export tank")
    recover(here, how="promote", silence=0)
    here.sh("echo two > /srv/web/db/file")
    demoted = here.call("zfs_dr.demote", "backup/dr", "web")
    # The source came back, and what it is for began to serve.
    here.sh("zpool import -d /dev/disk/by-id tank; systemctl daemon-reload; systemctl start writer; sleep 1")
    back = here.call("zfs_dr.failback", STACK, VAULT, services=["writer"])
    assert back["snapshot"] == demoted["snapshot"] and back["aside"]
    assert here.read("/srv/web/db/file") == "two\n"
    assert here.run("systemctl", "is-active", "writer").stdout == "active\n"
    # What it wrote before is aside; it goes on.
    here.sh("timeout 60 sh -c 'until [ -s /srv/web/db/log ]; do sleep 0.1; done'; systemctl stop writer")
    here.sh("rm /etc/systemd/system/writer.service; systemctl daemon-reload")
