"""Boot environments, on a machine whose root is on ZFS: made, looked into, booted, given up."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .ksnap import ONE, dry, snapshots


@pytest.fixture(scope="module")
def rooted(debian):
    """A machine with its root on ZFS, a dataset below it, and what ZFSBootMenu reads."""
    from .library import Room

    with Room(debian) as room:
        machine = room.machine(disks=0, on_zfs=True)
        machine.sh("""
            zfs set org.zfsbootmenu:commandline='rw quiet' rpool/ROOT/debian
            zfs create -o org.zfsbootmenu:keysource=none -o compression=zstd rpool/ROOT/debian/data
            echo first > /data/state
        """)
        yield machine


def environments(machine):
    return {each["name"]: each for each in machine.call("ksnap.be_list")}


def values(machine, dataset, *names):
    return machine.run("zfs", "get", "-H", "-p", "-o", "value", ",".join(names), dataset).stdout.splitlines()


def root(machine):
    return [
        machine.run("findmnt", "-n", "-o", "SOURCE", "--mountpoint", path, check=False).stdout.strip()
        for path in ("/", "/data")
    ]


@ONE
def test_what_could_not_boot_is_refused(rooted):
    def refused(match, function, *arguments, **options):
        with pytest.raises((CommandExecutionError, SaltInvocationError), match=match):
            rooted.call(function, *arguments, **options)

    (only,) = rooted.call("ksnap.be_list")
    assert (only["name"], only["running"], only["next"], only["once"]) == ("debian", True, True, False)
    rooted.sh("zfs snapshot rpool/ROOT/debian@x")
    refused("is the running root file system", "ksnap.rollback", {"datasets": ["rpool/ROOT/debian"]}, "x")
    rooted.sh("zfs destroy rpool/ROOT/debian@x")
    refused("The name of a boot environment", "ksnap.be_create", "a/b")
    refused("There is no boot environment gone; there are: debian", "ksnap.be_activate", "gone")
    refused("debian is running", "ksnap.be_destroy", "debian")
    refused("debian is running; boot another one", "ksnap.be_rename", "debian", "new")
    refused("is mounted already, at /", "ksnap.be_mount", "debian", "/mnt")
    rooted.call("ksnap.be_create", "broken")
    refused("There is a boot environment broken already", "ksnap.be_create", "broken")
    refused("There is a boot environment debian already", "ksnap.be_rename", "broken", "debian")
    # As a power cut leaves one: OpenZFS had made it, and not yet told it what it is.
    rooted.sh("zfs snapshot rpool/ROOT/debian@cut; zfs clone rpool/ROOT/debian@cut rpool/ROOT/cut")
    assert "cut" not in environments(rooted)
    told = "rpool/ROOT/cut is there, and is no boot environment: .*, zfs destroy -r rpool/ROOT/cut;"
    refused(told, "ksnap.be_create", "cut")
    refused(told, "ksnap.be_rename", "broken", "cut")
    rooted.sh("zfs destroy -R rpool/ROOT/debian@cut")
    refused("must be an absolute path, and empty", "ksnap.be_mount", "broken", "/etc")
    rooted.call("ksnap.be_mount", "broken", "/mnt")
    refused("is mounted at /mnt; ksnap.be_unmount first", "ksnap.be_destroy", "broken")
    # What lies below one is mounted by zfs-initramfs only: below the new one, and below the others.
    script = "usr/share/initramfs-tools/scripts/zfs"
    for place, dataset in (("/mnt", "rpool/ROOT/broken"), ("", "rpool/ROOT/debian")):
        rooted.sh("mv $1 $1.away", f"{place}/{script}")
        told = f"Once {dataset} is booted anew, {dataset}/data would not be mounted: .* there is no /{script} in it"
        refused(told, "ksnap.be_activate", "broken")
        rooted.sh("mv $1.away $1", f"{place}/{script}")
    assert values(rooted, "rpool/ROOT/debian/data", "canmount") == ["on"]
    # Of a root that the command line names, bootfs says nothing, but ZFSBootMenu names there what bootfs said.
    for line, fixed in (("BOOT_IMAGE=/x root=ZFS=a/b", True), ("root=zfs:rpool/ROOT/debian quiet", False)):
        rooted.sh("echo $1 > /run/line; mount --bind /run/line /proc/cmdline", line)
        if fixed:
            refused("command line says root=ZFS=a/b, so the pool's bootfs is not asked", "ksnap.be_activate", "broken")
        else:
            assert dry(rooted, "ksnap.be_activate", "broken")["previous"] == "debian"
        rooted.sh("umount /proc/cmdline")
    # Its kernel, but not its modules; then nothing; then without what dpkg knows.
    rooted.sh("mv /mnt/lib/modules /mnt/srv/")
    refused("has kernels, but not their modules", "ksnap.be_activate", "broken")
    rooted.sh("mv /mnt/srv/modules /mnt/lib/; rm /mnt/boot/vmlinuz-*; mv /mnt/var/lib/dpkg /mnt/srv/")
    refused("has no kernel with its modules.*; the package database", "ksnap.be_activate", "broken", once=True)
    assert rooted.call("ksnap.be_unmount", "broken") is True
    before = rooted.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout
    refused("copy was not made: .* has no kernel", "ksnap.be_create", "copy", source="broken")
    assert rooted.run("zfs", "list", "-H", "-t", "all", "-o", "name").stdout == before
    assert environments(rooted)["debian"]["next"]
    # A snapshot that somebody holds, or that something else was made of.
    rooted.sh("zfs snapshot rpool/ROOT/broken/data@kept; zfs hold me rpool/ROOT/broken/data@kept")
    refused("broken/data@kept is held", "ksnap.be_destroy", "broken")
    rooted.sh("zfs release me rpool/ROOT/broken/data@kept; zfs clone rpool/ROOT/broken/data@kept rpool/copy")
    refused("rpool/copy was made from rpool/ROOT/broken/data@kept", "ksnap.be_destroy", "broken")
    rooted.sh("zfs destroy rpool/copy")
    assert dry(rooted, "ksnap.be_destroy", "broken") == ["rpool/ROOT/broken", "rpool/ROOT/broken/data"]
    assert "broken" in environments(rooted)
    rooted.call("ksnap.be_destroy", "broken")
    assert list(environments(rooted)) == ["debian"] and snapshots(rooted) == []


@ONE
def test_the_life_of_a_boot_environment(rooted):
    made = rooted.call("ksnap.be_create", "first")
    assert made["datasets"] == ["rpool/ROOT/first", "rpool/ROOT/first/data"]
    assert made["kernels"] == rooted.run("uname", "-r").stdout.split()
    names = "canmount", "mountpoint", "org.zfsbootmenu:commandline"
    assert values(rooted, "rpool/ROOT/first", *names) == ["noauto", "/", "rw quiet"]
    names = "canmount", "mountpoint", "org.zfsbootmenu:keysource", "compression"
    assert values(rooted, "rpool/ROOT/first/data", *names) == ["noauto", "/data", "none", "zstd"]
    assert rooted.call("ksnap.be_rename", "first", "new") == "rpool/ROOT/new"
    assert rooted.call("ksnap.be_mount", "new", "/mnt/new") == "/mnt/new"
    rooted.sh("cd /mnt/new; echo here > etc/mark; cat data/state; echo second > data/state")
    assert environments(rooted)["new"]["mounted"] == "/mnt/new"
    assert rooted.call("ksnap.be_unmount", "new") is True
    assert rooted.read("/data/state") == "first\n"

    # For one start only.
    told = rooted.state("ksnap.be_active", "new", test=True, once=True)
    assert (told["result"], told["changes"]) == (None, {"next": {"old": "debian", "new": "new"}})
    assert environments(rooted)["debian"]["next"]
    assert rooted.state("ksnap.be_active", "new", once=True)["changes"] == told["changes"]
    again = rooted.state("ksnap.be_active", "new", once=True)
    assert (again["result"], again["changes"]) == (True, {})
    assert [environments(rooted)["new"][key] for key in ("next", "once", "running")] == [True, True, False]
    # The note of it goes with both names, or "once" would be for good.
    rooted.call("ksnap.be_rename", "new", "other")
    assert values(rooted, "rpool", "ksnap:boot_once") == ["rpool/ROOT/other rpool/ROOT/debian"]
    rooted.call("ksnap.be_rename", "other", "new")
    with pytest.raises(CommandExecutionError, match="new is booted next; activate another one"):
        rooted.call("ksnap.be_destroy", "new")
    rooted.reboot()
    assert root(rooted) == ["rpool/ROOT/new", "rpool/ROOT/new/data"]
    assert (rooted.read("/etc/mark"), rooted.read("/data/state")) == ("here\n", "second\n")
    found = environments(rooted)
    assert (found["new"]["running"], found["new"]["next"], found["debian"]["next"]) == (True, False, True)
    assert values(rooted, "rpool", "ksnap:boot_once") == ["-"]
    with pytest.raises(CommandExecutionError, match="debian is booted next"):
        rooted.call("ksnap.be_destroy", "debian")
    # Its one start has been: chosen at each run, it would stay.
    for test in (True, False):
        again = rooted.state("ksnap.be_active", "new", test=test, once=True)
        assert (again["result"], again["changes"]) == (True, {})
    rooted.reboot()
    assert root(rooted) == ["rpool/ROOT/debian", "rpool/ROOT/debian/data"]
    assert rooted.read("/data/state") == "first\n"

    # For good.
    assert rooted.state("ksnap.be_active", "new", test=True)["result"] is None
    assert rooted.state("ksnap.be_active", "new")["changes"] == {"next": {"old": "debian", "new": "new"}}
    again = rooted.state("ksnap.be_active", "new", test=True)
    assert (again["result"], again["changes"]) == (True, {})
    found = environments(rooted)
    assert (found["new"]["origin"], found["new"]["once"]) == (None, False)
    assert found["debian"]["origin"] == f"rpool/ROOT/new@{made['snapshot']}"
    rooted.reboot()
    assert root(rooted) == ["rpool/ROOT/new", "rpool/ROOT/new/data"]
    assert rooted.call("ksnap.be_destroy", "debian") == ["rpool/ROOT/debian", "rpool/ROOT/debian/data"]
    # Nothing is left of it, nor the snapshot that was taken for it.
    assert list(environments(rooted)) == ["new"] and snapshots(rooted) == []
    assert values(rooted, "rpool/ROOT/new", "org.zfsbootmenu:commandline") == ["rw quiet"]
