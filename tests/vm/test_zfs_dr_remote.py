"""Replication between two machines, by a user without privileges whose key starts nothing but the gate."""

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE
from .zfs_dr import PUSH, public_key, replicate, same, why, write

pytestmark = ONE


def prepared(source, target):
    state = {"name": "backup/dr", "key": public_key(source)}
    done = target.state("zfs_dr.target", **state)
    assert done["result"] is True and done["changes"], done


def test_the_target_is_prepared_by_a_state(pair):
    source, target = pair
    state = {"name": "backup/dr", "key": public_key(source)}
    told = target.state("zfs_dr.target", test=True, **state)
    assert told["result"] is None and set(told["changes"]) == {"dataset", "user", "gate", "key", "permissions"}
    assert target.run("zfs", "list", "backup/dr", check=False).returncode
    assert target.run("id", "zfs_dr", check=False).returncode
    first, second = target.state("zfs_dr.target", **state), target.state("zfs_dr.target", **state)
    assert first["result"] is True and first["changes"] == told["changes"], first
    assert second["result"] is True and not second["changes"], second
    assert target.state("zfs_dr.target", test=True, **state)["result"] is True
    shown = target.run("zfs", "get", "-H", "-o", "value", "readonly,canmount,mountpoint", "backup/dr").stdout
    assert shown.split() == ["on", "noauto", "none"]
    # What was changed by hand is put right.
    target.sh("zfs unallow -u zfs_dr receive backup/dr; zfs allow -u zfs_dr destroy backup/dr; zfs set readonly=off $1",
              "backup/dr")  # fmt: skip
    third = target.state("zfs_dr.target", **state)
    assert third["changes"]["permissions"] == {"old": ["destroy"], "new": ["receive"]}
    assert target.state("zfs_dr.target", test=True, **state)["result"] is True


def test_push_as_a_user_who_may_do_nothing_else(pair):
    source, target = pair
    prepared(source, target)
    first = replicate(source, PUSH, take=True)
    assert same(source, first["snapshot"], target)
    write(source, "more")
    done = replicate(source, PUSH, take=True)
    assert set(why(done).values()) == {"incremental"}
    assert same(source, done["snapshot"], target)
    # Nothing else goes through: no shell, no other command, no other dataset; nor has ZFS allowed it.
    for words in ("sh", "zfs destroy -r backup", "zfs receive -F backup/dr/a"):
        refused = source.run("ssh", "zfs_dr@target", words, check=False)
        assert refused.returncode == 126 and "not permitted by the gate" in refused.stderr
    for argv in (["destroy", "-r", "backup/dr"], ["set", "compression=off", "backup/dr"]):
        assert target.run("zfs", *argv, user="zfs_dr", check=False).returncode
    # The key is given up: that is told, and nothing was changed.
    target.call("zfs_dr.authorize", "zfs_dr", public_key(source), [])
    with pytest.raises(CommandExecutionError, match=r"(?s)Permission denied.*apply zfs_dr.target there"):
        replicate(source, PUSH, take=True)
