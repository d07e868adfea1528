"""Replication between two machines, by a user without privileges whose key starts nothing but the gate."""

import json
import re
import shlex

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import ONE
from .zfs_dr import KEY, PUSH, STACK, holds, public_key, replicate, same, snapshots, take, why, write

pytestmark = ONE
PULL = {"name": "vault", "dataset": "backup/dr", "ssh": "zfs_dr@source", "direction": "pull", "key": KEY}
LISTEN = """\
import json
import salt.config
import salt.utils.event

options = salt.config.minion_config("/etc/salt/minion")
while True:
    try:
        bus = salt.utils.event.get_event("minion", opts=options, listen=True)
        if bus.cpub:
            break
    except Exception as error:
        print(error)
with open("/root/heard", "a") as file:
    while True:
        event = bus.get_event(wait=5, tag="zfs_dr/", full=True)
        if event:
            file.write(json.dumps({"tag": event["tag"], "data": event["data"]}) + "\\n")
            file.flush()
"""


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
    # With nothing to do, a glance is enough; the hold of the set's mark alone comes back, once it is gone.
    mark = f"backup/dr@{done['snapshot']}"
    for _ in range(2):
        assert replicate(source, PUSH)["changed"] is False
        assert mark in json.loads(source.read("/var/lib/zfs_dr/vault-web.last"))["state"]
        assert holds(target, mark) == {(mark, "zfs_dr:web")}
        target.run("zfs", "release", "zfs_dr:web", mark)
    # Nothing else goes through: no shell, no other command, no other dataset; nor has ZFS allowed it.
    for words in ("sh", "zfs destroy -r backup", "zfs receive -F backup/dr/a"):
        refused = source.run("ssh", "zfs_dr@target", words, check=False)
        assert refused.returncode == 126 and "not permitted by the gate" in refused.stderr
    for argv in (["destroy", "-r", "backup/dr"], ["set", "compression=off", "backup/dr"]):
        assert target.run("zfs", *argv, user="zfs_dr", check=False).returncode
    # A stream with properties, or datasets, of its own has nothing mounted there, now or at the next start.
    source.sh("zfs create -o mountpoint=/srv/x tank/x; zfs create -o mountpoint=/srv/y tank/x/y")
    source.sh("zfs snapshot -r tank/x@x")
    for kind, code in (("-p", 0), ("-R", 126)):
        name = f"backup/dr/x{kind}"
        sent = source.sh(f"zfs send {kind} tank/x@x | ssh zfs_dr@target zfs receive -s -u {name}", check=False)
        assert sent.returncode == code, sent.stderr
        shown = target.run("zfs", "list", "-H", "-r", "-o", "canmount,mountpoint", name).stdout.splitlines()
        assert shown == ["noauto\tnone"] * (1 if code == 0 else 2)
    behind = "zfs get -H -o value receive_resume_token backup/dr/x-p\nzfs receive -s -u backup/dr/z"
    sent = source.sh('zfs send -p tank/x@x | ssh zfs_dr@target "$1"', behind, check=False)
    assert sent.returncode == 126 and target.run("zfs", "list", "backup/dr/z", check=False).returncode
    # The key is given up: that is told, and nothing was changed.
    target.call("zfs_dr.authorize", "zfs_dr", public_key(source), [])
    with pytest.raises(CommandExecutionError, match=r"(?s)Permission denied.*apply zfs_dr.target there"):
        replicate(source, PUSH, take=True)


def offered(source, target):
    """Let the target's machine pull the stack."""
    source.call("zfs_dr.user_present", "zfs_dr")
    source.call("zfs_dr.gate_install")
    source.call("zfs_dr.authorize", "zfs_dr", public_key(target), ["source:tank/web", "source:tank/mail"])
    for dataset in ("tank/web", "tank/mail"):
        source.call("zfs_dr.grant", "zfs_dr", dataset, "source")
    target.sh("zfs create -o mountpoint=none -o readonly=on -o canmount=noauto backup/dr")


def refused(machine, target, permission, on, dataset, role):
    """Without this one permission a replication fails, and says what gives it back; with it again there it goes on."""
    gone = on.call("zfs_dr.revoke", "zfs_dr", dataset, [permission])
    assert gone == [permission]
    try:
        replicate(machine, target)
        pytest.fail(f"without {permission} it went through")
    except CommandExecutionError as error:
        assert "zfs_dr.grant on that machine" in str(error), permission
    assert on.call("zfs_dr.grant", "zfs_dr", dataset, role)["new"] == [permission]


def test_pull_as_a_user_who_may_do_nothing_else(pair):
    source, target = pair
    offered(source, target)
    first = take(source)
    done = replicate(target, PULL)
    assert done["snapshot"] == first and same(source, first, target)
    assert replicate(target, PULL)["changed"] is False
    write(source, "more")
    second = take(source)
    for permission in ("send", "hold", "bookmark", "release", "destroy"):
        # A third bookmark makes the first go.
        refused(target, PULL, permission, source, "tank/web", "source")
        done = replicate(target, PULL)
        assert done["snapshot"] == second and same(source, second, target), permission
        write(source, permission)
        second = take(source)
    done = replicate(target, PULL)
    assert set(why(done).values()) == {"incremental"}
    # Another machine may call its target alike; its holds and bookmarks are others.
    mark = f"vault:{target.call('grains.get', 'id')}"
    assert {tag for name, tag in holds(source, f"tank/web@{second}")} == {f"zfs_dr:{mark}"}
    assert {name.partition("-ksnap-")[0] for name in snapshots(source, "tank/web", "bookmark")} == {f"zfs_dr-{mark}"}
    with pytest.raises(SaltInvocationError, match="take is for a stack of this machine"):
        replicate(target, PULL, take=True)
    # A token of what another key of the same user may send is none of this one's.
    tokens = {}
    for dataset in ("tank/web", "tank/other"):
        source.sh("zfs list $1 || zfs create $1; head -c 300K /dev/urandom > /$1/t; zfs snapshot $1@t", dataset)
        source.sh("zfs send $1@t | head -c 100000 | zfs receive -s -u tank/part || true", dataset)
        tokens[dataset] = source.sh("zfs get -H -o value receive_resume_token tank/part").stdout.strip()
        source.run("zfs", "receive", "-A", "tank/part")
    source.call("zfs_dr.grant", "zfs_dr", "tank/other", "source")
    send = 'ssh zfs_dr@source "zfs send -t $1" | wc -c'
    assert int(target.sh(send, tokens["tank/web"]).stdout) > 100_000
    said = target.sh(send, tokens["tank/other"], check=False)
    assert said.stdout == "0\n" and "not permitted by the gate" in said.stderr
    # It is known by what it is, not by the name that it had.
    source.sh("zfs rename tank/web/db tank/db; zfs rename tank/web tank/then; zfs rename tank/other tank/web")
    assert target.sh(send, tokens["tank/web"], check=False).stdout == "0\n"
    assert int(target.sh(send, tokens["tank/other"]).stdout) > 100_000
    for words in ("zfs destroy tank/web", "zfs receive tank/web", "zfs send -R tank/web@x", "zfs list"):
        said = target.run("ssh", "zfs_dr@source", words, check=False)
        assert said.returncode == 126 and "not permitted by the gate" in said.stderr


def test_each_permission_of_the_target_is_needed(pair):
    source, target = pair
    prepared(source, target)
    take(source)
    needed = set(target.call("zfs_dr.permissions", "target"))
    for permission in ("receive", "create", "mount"):
        refused(source, PUSH, permission, target, "backup/dr", "target")
        needed.remove(permission)
    first = replicate(source, PUSH)
    assert same(source, first["snapshot"], target)
    for permission in ("userprop", "snapshot", "hold", "release"):
        write(source, permission)
        take(source)
        refused(source, PUSH, permission, target, "backup/dr", "target")
        needed.remove(permission)
        replicate(source, PUSH)
    # What somebody wrote to a replica is set aside.
    for permission in ("rename", "clone", "promote", "canmount", "mountpoint", "readonly"):
        target.sh("zfs set readonly=off mountpoint=/mnt backup/dr/tank:mail; zfs mount backup/dr/tank:mail")
        target.sh("echo x > /mnt/x; zfs unmount backup/dr/tank:mail; zfs set mountpoint=none backup/dr/tank:mail")
        take(source)
        refused(source, PUSH, permission, target, "backup/dr", "target")
        needed.remove(permission)
        done = replicate(source, PUSH)
        assert all(each.startswith("incremental") for each in why(done).values()), permission
        assert same(source, done["snapshot"], target)
    assert not needed


def test_another_host_key_is_refused_until_it_is_known(pair):
    source, target = pair
    prepared(source, target)
    first = replicate(source, PUSH, take=True)
    old = target.read("/etc/ssh/ssh_host_ed25519_key")
    known = source.read("/etc/ssh/ssh_known_hosts")
    try:
        target.sh("rm /etc/ssh/ssh_host_ed25519_key*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key")
        target.run("systemctl", "restart", "ssh")
        with pytest.raises(CommandExecutionError, match="If that is right, put the new one in place"):
            replicate(source, PUSH, take=True)
        assert snapshots(target, "backup/dr") == [first["snapshot"]]
        assert "host key" in source.call("zfs_dr.status", STACK, PUSH)["error"]
        new = target.read("/etc/ssh/ssh_host_ed25519_key.pub").split()
        source.put("/etc/ssh/ssh_known_hosts", f"* {new[0]} {new[1]}\n")
        done = replicate(source, PUSH, take=True)
        assert set(why(done).values()) == {"incremental"} and same(source, done["snapshot"], target)
    finally:
        source.put("/etc/ssh/ssh_known_hosts", known)
        target.put("/etc/ssh/ssh_host_ed25519_key", old, mode=0o600)
        target.run("systemctl", "restart", "ssh")


def test_a_link_that_is_cut_is_gone_on_with(pair):
    source, target = pair
    prepared(source, target)
    replicate(source, PUSH, take=True)
    write(source, "more", "2M")
    taken = take(source)
    switch = source.room.switch
    switch.cut_after("target", 2_500_000)
    # ssh itself finds out, by its own silence.
    with pytest.raises(CommandExecutionError):
        replicate(source, PUSH)
    assert switch.is_cut("target")
    switch.uncut("target")
    # sshd there has not found out yet, and what it left waits for more: that is ended first.
    done = replicate(source, PUSH)
    assert done["snapshot"] == taken and same(source, taken, target)
    assert any(each.startswith("resumed") for each in why(done).values())
    assert done["bytes"] < 6_000_000
    assert "full" not in str(why(done))


def test_a_limit_is_kept_and_all_see_how_far_it_is(pair):
    source, target = pair
    prepared(source, target)
    take(source)
    # What a terminal shows, and what is on the bus of the minion, which needs no master.
    source.put("/etc/salt/minion.d/alone.conf", "master_type: disable\n")
    source.put("/root/listen.py", LISTEN)
    source.sh("systemd-run --quiet --unit=bus /opt/salt-xmpp/bin/salt-minion; rm -f /root/heard")
    source.sh("systemd-run --quiet --unit=listen /opt/salt-xmpp/bin/python3 /root/listen.py")
    try:
        source.sh("until [ -e /root/heard ]; do sleep .2; done", timeout=300)
        source.put("/etc/salt/minion.d/dr.conf", json.dumps({"ksnap": {"stacks": {"web": STACK}}}))
        target_words = json.dumps({**PUSH, "bandwidth": 200_000, "compression": "zstd"})
        call = ["/opt/salt-xmpp/bin/salt-call", "--local", "--out=json", "zfs_dr.replicate", "web", target_words]
        shown = source.run("script", "-qec", shlex.join(call), "/dev/null", timeout=300).stdout
        heard = [json.loads(line) for line in source.read("/root/heard").splitlines()]
    finally:
        source.sh("systemctl stop bus listen; rm /etc/salt/minion.d/alone.conf /etc/salt/minion.d/dr.conf")
    done = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])["local"]
    assert same(source, done["snapshot"], target)
    sent = [each for each in heard if each["tag"].endswith("/progress")]
    spent = sent[-1]["data"]["seconds"]
    assert done["bytes"] > 900_000 and 0.8 < spent / (done["bytes"] / 200_000) < 3
    assert len(sent) >= 3 and {each["tag"] for each in heard} == {
        "zfs_dr/vault/web/progress", "zfs_dr/vault/web/whole",
    }  # fmt: skip
    moved = [each["data"]["bytes"] for each in sent]
    assert moved == sorted(moved) and moved[-1] == done["bytes"]
    lines = re.findall(r"web to vault: (\d) of 3 datasets, 0 MiB, (\d+) %, [\d.]+ MiB/s", shown)
    assert len(lines) >= 3 and lines[-1] == ("3", "100")
