"""The machine room itself: what a test may rely on."""

import time

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import ONE
from .library import CommandError, PowerCut

OPENZFS = {"bookworm": "2.1.", "trixie": "2.3."}


def guid(machine, pool="tank"):
    return machine.run("zpool", "get", "-H", "-o", "value", "guid", pool).stdout.strip()


def test_it_has_the_releases_openzfs_and_salt(machine, debian):
    assert f"VERSION_CODENAME={debian}" in machine.read("/etc/os-release")
    tool, module = machine.run("zfs", "version").stdout.split()
    assert tool.startswith(f"zfs-{OPENZFS[debian]}")
    assert module.removeprefix("zfs-kmod-") == tool.removeprefix("zfs-")
    assert machine.call("test.version").startswith("3008")


@ONE
def test_commands_and_files(machine):
    done = machine.sh("cat; echo error >&2; exit 3", input="text", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "text", "error\n")
    with pytest.raises(CommandError, match="ended with 3"):
        machine.sh("exit 3")
    with pytest.raises(TimeoutError):
        machine.run("sleep", "60", timeout=0.5)
    assert machine.run("id", "-un", user="nobody").stdout == "nobody\n"
    machine.put("/srv/new/file", b"\0\xff", mode=0o600, owner="nobody:nogroup")
    assert machine.get("/srv/new/file") == b"\0\xff"
    assert machine.run("stat", "-c", "%U:%G %a", "/srv/new/file").stdout == "nobody:nogroup 600\n"


@ONE
def test_disks_are_empty_and_can_come_and_go(machine):
    count = "for disk; do head -c1000000 $disk | tr -d '\\0' | wc -c; done"
    assert machine.sh(count, *machine.devices).stdout == "0\n0\n"
    machine.run("zpool", "create", "tank", "mirror", *machine.devices)
    machine.pull_disk(1)
    machine.sh("echo x > /tank/file; zpool sync")
    machine.sh("until zpool status tank | grep -E 'disk1 +(FAULTED|REMOVED|UNAVAIL)'; do :; done")
    third = machine.add_disk("1G")
    assert machine.run("blockdev", "--getsize64", third).stdout == f"{1 << 30}\n"


@ONE
def test_snapshot_and_rollback(machine):
    machine.run("zpool", "create", "tank", machine.devices[0])
    machine.sh("zfs create tank/data; echo before > /tank/data/file; zfs snapshot tank/data@one")
    machine.sh("echo after > /tank/data/file")
    machine.run("zfs", "rollback", "tank/data@one")
    assert machine.read("/tank/data/file") == "before\n"


@ONE
def test_salt_calls_and_raises(machine):
    assert machine.call("test.arg", 1, "a", key=[None, True]) == {"args": [1, "a"], "kwargs": {"key": [None, True]}}
    assert machine.call("config.get", "a:b", config={"a": {"b": 5}}) == 5
    assert machine.call("pillar.raw", pillar={"c": {"d": 6}}, key="c") == {"d": 6}
    # One call leaves nothing to the next.
    assert machine.call("config.get", "a:b") == ""
    with pytest.raises(CommandExecutionError, match="no such"):
        machine.call("test.raise_exception", "salt.exceptions.CommandExecutionError", "no such thing")
    with pytest.raises(SaltInvocationError):
        machine.call("file.grep", "/nonexistent", "x", "-A1 -B2")


@ONE
def test_the_checkouts_modules_are_salts(machine):
    (mistake, *_) = machine.call("xmpp.mistakes", pillar={"xmpp": {"domain": "a"}})
    assert mistake.startswith("xmpp:domain: 'a' has no dot")
    assert machine.state("xmpp.secret", "/srv/secret", test=True)["result"] is None


def test_states_run_twice_and_in_test_mode(machine):
    told = {"name": "/srv/file", "contents": "text"}
    assert machine.state("file.managed", test=True, **told)["result"] is None
    assert not machine.call("file.file_exists", "/srv/file")
    first, second = machine.state("file.managed", **told), machine.state("file.managed", **told)
    assert first["changes"] and first["result"] is True
    assert not second["changes"] and second["result"] is True


@ONE
def test_requisites_work(machine):
    data = {
        "before": {"cmd.run": [{"name": "touch /srv/before"}, {"prereq": [{"file": "/srv/file"}]}]},
        "/srv/file": {"file.managed": [{"contents": "text"}]},
    }
    assert [result["changes"] != {} for result in machine.apply(data).values()] == [True, True]
    machine.run("rm", "/srv/before")
    assert [result["changes"] != {} for result in machine.apply(data).values()] == [False, False]
    assert not machine.call("file.file_exists", "/srv/before")


@ONE
def test_what_takes_time_runs_beside_the_rest(machine):
    sleeper = machine.begin(machine.run, "sleep", "1000", timeout=2000)
    machine.sh("until pgrep --exact sleep; do :; done")
    machine.kill()
    with pytest.raises(PowerCut):
        sleeper.result(60)


@ONE
def test_what_was_flushed_outlives_a_power_cut(machine):
    device = machine.devices[0]
    write = "head -c 4M /dev/zero | tr '\\0' a | dd of=$1 bs=1M iflag=fullblock oflag=direct conv=fsync status=none"
    machine.sh(write, device)
    machine.kill()
    machine.start()
    assert machine.sh("head -c 4M $1 | tr -d a | wc -c", device).stdout == "0\n"


@ONE
def test_the_power_is_cut_at_a_chosen_write(machine):
    machine.run("zpool", "create", "tank", machine.devices[0])
    snapshot = "zpool sync; for i in $(seq 20); do zfs snapshot tank@$1$i; done"
    before = machine.writes()
    machine.sh(snapshot, "a")
    count = machine.writes() - before
    assert count > 20
    assert not machine.kill_at(count // 2, machine.sh, snapshot, "b")
    machine.start()
    machine.run("zpool", "import", "-a")
    names = machine.sh("zfs list -H -o name -t snapshot").stdout
    assert names.count("@a") == 20
    assert 0 < names.count("@b") < 20


def test_a_pool_outlives_a_power_cut(machine):
    machine.run("zpool", "create", "tank", machine.devices[0])
    before = guid(machine)
    machine.sh("echo kept > /tank/kept; zpool sync; echo lost > /tank/lost")
    machine.kill()
    machine.start()
    machine.run("zpool", "import", "tank")
    assert guid(machine) == before
    assert machine.read("/tank/kept") == "kept\n"
    assert machine.run("zpool", "status", "-x").stdout == "all pools are healthy\n"


def test_two_machines_differ_and_reach_each_other(room):
    source, target = room.pair("source", "target")
    for machine in (source, target):
        machine.run("zpool", "create", "tank", machine.devices[0])
    assert guid(source) != guid(target)
    for what in ("hostname", "hostid", "cat /etc/machine-id"):
        assert source.sh(what).stdout != target.sh(what).stdout
    source.sh("zfs create tank/a; head -c 8M /dev/urandom > /tank/a/file; zfs snapshot tank/a@one")
    source.sh("zfs send tank/a@one | ssh target zfs receive tank/b")
    assert source.sh("sha256sum < /tank/a/file").stdout == target.sh("sha256sum < /tank/b/file").stdout


@ONE
def test_a_wire_is_cut_after_so_many_bytes(room):
    source, target = room.pair("source", "target")
    room.switch.cut_after("target", 3_000_000)
    sending = source.begin(source.sh, "head -c 20M /dev/zero | ssh target 'cat > /srv/file'")
    while not room.switch.is_cut("target"):
        time.sleep(0.1)
    target.sh("until [ $(stat -c %s /srv/file) -gt 2000000 ]; do :; done")
    assert int(target.run("stat", "-c", "%s", "/srv/file").stdout) < 3_000_000
    room.switch.uncut("target")
    sending.result(300)
    assert target.run("stat", "-c", "%s", "/srv/file").stdout == f"{20 << 20}\n"


@ONE
def test_disks_are_frozen_once_and_used_often(room):
    first = room.machine("first")
    first.sh("zpool create tank $1; echo text > /tank/file", first.devices[0])
    disks = room.freeze(first)
    for name in ("second", "third"):
        machine = room.machine(name, disks=disks)
        machine.run("zpool", "import", "-a")
        assert machine.read("/tank/file") == "text\n"
        machine.run("rm", "/tank/file")
