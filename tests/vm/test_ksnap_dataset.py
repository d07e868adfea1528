"""Datasets where files were before: none is hidden, and none lost, whatever fails."""

import contextlib

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import ONE, again
from .test_ksnap_states import apply

WWW = {"datasets": [{"tank/www": {"mountpoint": "/srv/www"}}]}
# Its files are those that it found when it was started.
SERVICE = "[Service]\nExecStart=sh -c 'cat /srv/www/file > /run/seen; exec sleep infinity'\n"


@pytest.fixture
def tank(fresh):
    fresh.sh("rm -f /usr/local/sbin/zfs /run/seen; zpool create tank $1; zpool sync", fresh.devices[0])
    return fresh


@contextlib.contextmanager
def instead(machine, script):
    """Run ``script`` before each zfs of ksnap's."""
    machine.put("/usr/local/sbin/zfs", f'#!/bin/sh\n{script}\nexec /usr/sbin/zfs "$@"\n', mode=0o755)
    try:
        yield
    finally:
        machine.run("rm", "/usr/local/sbin/zfs")


def refused(machine, match, **wanted):
    """It is refused in test mode, too, and nothing is touched."""
    look = "zfs list -H -p -o name,guid,mounted; zfs get -H -s local all; ls -R /srv; grep -c . /proc/mounts"
    before = machine.sh(look).stdout
    for test in (True, False):
        done = machine.state("ksnap.stack", "web", test=test, **wanted)
        assert (done["result"], done["changes"]) == (False, {}) and match in done["comment"], done
    assert machine.sh(look).stdout == before


def source(machine, path):
    return machine.run("findmnt", "-n", "-o", "SOURCE", "--mountpoint", path, check=False).stdout.strip()


@ONE
def test_nothing_is_mounted_over_files(tank):
    tank.sh("""
        zfs create -o mountpoint=none tank/db; mkdir /srv/db; echo live > /srv/db/file
        zfs create -o mountpoint=/srv/off -o canmount=off tank/off; mkdir -p /srv/off; echo live > /srv/off/file
        zfs create -o mountpoint=none -o canmount=off tank/var; zfs create tank/var/lib
        mkdir -p /srv/var/lib; echo live > /srv/var/lib/file
        mkdir /srv/disk; mount -t tmpfs tmpfs /srv/disk; echo live > /srv/disk/file
    """)
    # Before the first change: what is to be made before it is not.
    for dataset, wanted, match in (
        ("tank/db", {"mountpoint": "/srv/db"}, "tank/db would be mounted over the files in /srv/db"),
        ("tank/off", {"canmount": True}, "tank/off would be mounted over the files in /srv/off"),
        ("tank/var", {"mountpoint": "/srv/var"}, "tank/var/lib would be mounted over the files in /srv/var/lib"),
    ):
        refused(tank, match, datasets=["tank/new", {dataset: wanted}])
    with pytest.raises(CommandExecutionError, match="would be mounted over the files in /srv/db"):
        tank.call("ksnap.dataset_set", "tank/db", {"mountpoint": "/srv/db"})
    refused(tank, "Another file system is mounted at /srv/disk", datasets=[{"tank/disk": {"mountpoint": "/srv/disk"}}])
    # What the message says helps.
    tank.sh("""
        mount -t zfs tank/db /mnt || mount -t zfs -o zfsutil tank/db /mnt; mv /srv/db/file /mnt; umount /mnt
        rm /srv/off/file; zfs destroy -r tank/var
    """)
    wanted = [
        {"tank/db": {"mountpoint": "/srv/db"}},
        {"tank/off": {"canmount": True}},
        {"tank/var/lib": {"mountpoint": "/srv/var/lib"}},
    ]
    apply(tank, "ksnap.stack", "web", datasets=wanted)
    assert [source(tank, path) for path in ("/srv/db", "/srv/var/lib")] == ["tank/db", "tank/var/lib"]
    assert tank.sh("cat /srv/db/file /srv/var/lib/file").stdout == "live\nlive\n"
    # Its own files are where it is mounted.
    tank.sh("zfs create -o mountpoint=legacy tank/own; mkdir /srv/own; mount -t zfs tank/own /srv/own")
    tank.sh("echo own > /srv/own/file")
    apply(tank, "ksnap.stack", "web", datasets=[{"tank/own": {"mountpoint": "/srv/own"}}])
    assert tank.read("/srv/own/file") == "own\n" and source(tank, "/srv/own") == "tank/own"


@ONE
def test_what_is_missing_above_hides_nothing(tank):
    tank.sh("""
        zfs set canmount=off tank; zfs set mountpoint=/srv tank
        mkdir -p /srv/var/lib/app /srv/opt/two/app
        for path in /srv/var /srv/var/lib /srv/var/lib/app /srv/opt/two/app; do echo live > $path/file; done
    """)
    look = "cat /srv/var/file /srv/var/lib/file /srv/var/lib/app/file /srv/opt/two/app/file"
    apply(tank, "ksnap.stack", "web", datasets=["tank/var/lib/app"])
    assert tank.sh(look).stdout == "live\n" * 4
    shown = tank.run("zfs", "list", "-H", "-r", "-o", "name,canmount,mounted", "tank/var").stdout.splitlines()
    assert shown == ["tank/var\toff\tno", "tank/var/lib\toff\tno", "tank/var/lib/app\ton\tyes"]
    # Of what fails, nothing stays: with files there, and without.
    for dataset in ("tank/opt/two/app", "tank/opt/two/other"):
        failed = tank.state("ksnap.stack", "web", datasets=[{dataset: {"recordsize": "3K"}}])
        assert failed["result"] is False and "all is as it was" in failed["comment"], failed
        assert "tank/opt" not in tank.run("zfs", "list", "-H", "-o", "name").stdout
    assert tank.sh(look).stdout == "live\n" * 4
    assert tank.sh("ls -A /srv/opt /srv/opt/two").stdout.split() == ["/srv/opt:", "two", "/srv/opt/two:", "app"]


@ONE
def test_a_mount_that_fails_leaves_the_files_where_they_were(tank):
    tank.put("/etc/systemd/system/user.service", SERVICE)
    tank.sh("mkdir /srv/www; echo text > /srv/www/file; systemctl daemon-reload; systemctl start user")
    properties = {"mountpoint": "/srv/www"}
    wanted = {"datasets": [{"tank/one/www": properties}], "services": ["user"]}
    fails = '[ "$1" != mount ] || { echo "cannot mount: no" >&2; exit 1; }'

    def is_as_it_was():
        seen = "until [ -s /run/seen ]; do sleep .1; done; systemctl is-active user; cat /run/seen /srv/www/file"
        assert tank.sh(f"{seen}; rm /run/seen", timeout=60).stdout.split() == ["active", "text", "text"]
        assert "before" not in tank.sh("ls /srv").stdout
        assert tank.run("zfs", "list", "-H", "-o", "name").stdout.split() == ["tank"]

    is_as_it_was()
    with instead(tank, fails):
        failed = tank.state("ksnap.stack", "web", **wanted)
    assert failed["result"] is False and "all is as it was: zfs mount tank/one/www failed" in failed["comment"], failed
    is_as_it_was()
    # Somebody breaks it off.
    with (
        instead(tank, '[ "$1" != mount ] || { kill -INT $PPID; sleep 5; exit 1; }'),
        pytest.raises(RuntimeError, match="KeyboardInterrupt"),
    ):
        tank.call("ksnap.dataset_create", "tank/one/www", properties, services=["user"])
    is_as_it_was()
    # The directory cannot be renamed.
    tank.sh("mount --bind /srv /srv; mount -o remount,bind,ro /srv")
    failed = tank.state("ksnap.stack", "web", **wanted)
    tank.sh("umount /srv")
    assert failed["result"] is False and "all is as it was: [Errno 30]" in failed["comment"], failed
    is_as_it_was()
    # When it cannot be undone, the service is not started in an empty directory.
    with instead(tank, f'{fails}; [ "$1" != destroy ] || {{ echo "cannot destroy: no" >&2; exit 1; }}'):
        failed = tank.state("ksnap.stack", "web", **wanted)
    assert failed["result"] is False and "user is left stopped" in failed["comment"], failed
    assert tank.run("systemctl", "is-active", "user", check=False).stdout == "inactive\n"
    assert tank.sh("ls -A /srv/www; cat /srv/www.before-*/file").stdout == "text\n"
    # The next call ends it; so does a start of the machine.
    apply(tank, "ksnap.stack", "web", **wanted)
    assert source(tank, "/srv/www") == "tank/one/www" and tank.read("/srv/www/file") == "text\n"
    tank.sh("systemctl stop user; rm /etc/systemd/system/user.service; systemctl daemon-reload")


@ONE
@pytest.mark.parametrize("moment", ["before set", "after set", "before mount", "before inherit"])
def test_after_a_power_cut_the_start_finds_the_files(tank, moment):
    """Before the next call: a service would begin anew in an empty directory."""
    tank.sh("mkdir /srv/www; echo text > /srv/www/file")
    when, command = moment.split()
    run = '/usr/sbin/zfs "$@";' if when == "after" else ""
    script = f'[ "$1" != {command} ] || {{ {run} kill -9 $PPID; exit 1; }}'
    with instead(tank, script), pytest.raises(ChildProcessError):
        tank.state("ksnap.stack", "web", **WWW)
    tank.sh("zfs unmount -a; ! grep ^tank/www /proc/mounts")
    again(tank, "tank")
    assert tank.read("/srv/www/file") == "text\n"
    # It runs, and writes.
    tank.sh("echo newer > /srv/www/file")
    if command == "inherit":
        tank.sh("rm -r /srv/www.before-*")
    apply(tank, "ksnap.stack", "web", **WWW)
    assert source(tank, "/srv/www") == "tank/www" and tank.read("/srv/www/file") == "newer\n"
    kept = tank.sh("cat /srv/www.before-*/file || true").stdout
    assert kept == {"before set": "newer\n", "before inherit": ""}.get(moment, "text\n")


@ONE
def test_a_copy_that_may_be_the_only_one_is_not_destroyed(tank):
    copy = "mount -t zfs -o zfsutil tank/www /mnt; cat /mnt/file; umount /mnt"
    tank.sh("mkdir /srv/www; echo text > /srv/www/file")
    with instead(tank, '[ "$1" != mount ] || { kill -9 $PPID; exit 1; }'), pytest.raises(ChildProcessError):
        tank.state("ksnap.stack", "web", **WWW)
    # It was not mounted at the start (no key, say): a service has begun anew.
    tank.sh("echo fresh > /srv/www/file")
    refused(tank, "others have come to /srv/www", **WWW)
    assert "/srv/www.before-tank-www-" in tank.state("ksnap.stack", "web", **WWW)["comment"]
    assert tank.sh(f"cat /srv/www/file; {copy}").stdout == "fresh\ntext\n"
    tank.sh("mv /srv/www/file /srv/fresh")
    apply(tank, "ksnap.stack", "web", **WWW)
    assert tank.read("/srv/www/file") == "text\n"
    # Of one that was not ended: in use, or its origin is gone.
    tank.sh("zfs set ksnap:moving=/srv/www tank/www; zfs create tank/www/below; rm -r /srv/www.before-*")
    refused(tank, "it is not destroyed", **WWW)
    with pytest.raises(CommandExecutionError, match="Files are being moved into tank/www"):
        tank.call("ksnap.dataset_set", "tank/www", {"quota": "1G"})
    # What is below it is in no move.
    below = tank.state("ksnap.stack", "web", datasets=["tank/www/below"])
    assert (below["result"], below["changes"]) == (True, {})
    tank.sh("zfs destroy tank/www/below; zfs unmount tank/www; zfs set canmount=noauto tank/www")
    refused(tank, "it is not destroyed", **WWW)
    assert tank.sh(copy).stdout == "text\n"


@ONE
def test_a_value_that_openzfs_chooses_is_as_wanted(tank):
    tank.sh("head -c 32 /dev/urandom > /srv/key")
    wanted = [
        {"tank/safe": {"encryption": True, "keyformat": "raw", "keylocation": "file:///srv/key"}},
        {"tank/vol": {"volsize": "8M", "refreservation": "auto"}},
        {"tank/mail": {"acltype": "posixacl", "quota": "none", "filesystem_limit": "none", "reservation": "1.5M"}},
    ]
    for each in wanted:
        apply(tank, "ksnap.stack", "web", datasets=[each])
    assert tank.run("zfs", "get", "-H", "-o", "value", "encryption", "tank/safe").stdout == "aes-256-gcm\n"
    tank.sh("zfs set refreservation=none tank/vol; zfs create tank/plain")
    apply(tank, "ksnap.stack", "web", datasets=wanted)
    reserved = int(tank.run("zfs", "get", "-H", "-p", "-o", "value", "refreservation", "tank/vol").stdout)
    assert reserved >= 8 * 2**20
    refused(tank, "can only be set when it is made", datasets=[{"tank/plain": {"encryption": True}}])
