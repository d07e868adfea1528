"""What the tests of zfs_dr share: a stack in one pool and a place for its replicas in another, here or elsewhere."""

import pytest

from .ksnap import CLEAN

STACK = {"name": "web", "datasets": ["tank/web", "tank/web/db", "tank/mail"]}
VAULT = {"name": "vault", "dataset": "backup/dr"}
REPLICAS = ["tank:web", "tank:web:db", "tank:mail"]
KEY = "/root/.ssh/id_ed25519"
PUSH = {"name": "vault", "dataset": "backup/dr", "ssh": "zfs_dr@target", "key": KEY}

FORGOTTEN = """
rm -rf /run/zfs_dr /var/lib/zfs_dr /usr/local/lib/zfs_dr /etc/systemd/system/*zfs_dr-* /etc/systemd/system/*/*zfs_dr-*
if id -u zfs_dr >/dev/null 2>&1; then until userdel zfs_dr; do pkill -KILL -u zfs_dr || true; sleep .1; done; fi
"""
SOURCE = """
zpool create -O compression=off tank $1
zfs create -o recordsize=16K tank/web; zfs create tank/web/db; zfs create -o atime=off tank/mail
for each in web web/db mail; do head -c 300K /dev/urandom > /tank/$each/first; done
"""
TARGET = "zpool create backup $1; zfs create -o mountpoint=none -o readonly=on -o canmount=noauto backup/dr"


@pytest.fixture
def here(fresh):
    """A machine with two pools, and a stack with something in it."""
    fresh.sh(FORGOTTEN)
    fresh.sh(SOURCE, fresh.devices[0])
    fresh.sh(TARGET, fresh.devices[1])
    return fresh


@pytest.fixture(scope="module")
def lasting_pair(debian):
    """Two machines with a disk each, for all tests of a file."""
    # Not at the top: this file is loaded for all tests, also where there are no machines.
    from .library import Room

    with Room(debian) as room:
        yield room.pair("source", "target")


@pytest.fixture
def pair(lasting_pair):
    """The two: a source with something in it, and a target with an empty pool."""
    for machine in lasting_pair:
        machine.room.switch.uncut(machine.name)
        if not machine.on:
            machine.start()
        machine.sh(CLEAN + FORGOTTEN, *machine.devices)
    source, target = lasting_pair
    source.sh(SOURCE, *source.devices)
    target.run("zpool", "create", "backup", *target.devices)
    return source, target


def public_key(machine):
    return machine.read(f"{KEY}.pub").strip()


def replicate(machine, target=VAULT, **options):
    return machine.call("zfs_dr.replicate", STACK, target, **options)


def take(machine):
    return machine.call("ksnap.snapshot", STACK)["snapshot"]


def write(machine, name, size="300K"):
    machine.sh("for each in web web/db mail; do head -c $2 /dev/urandom > /tank/$each/$1; done", name, size)


def snapshots(machine, dataset, what="snapshot"):
    """Names, as ZFS lists them, of what a dataset has."""
    lines = machine.run("zfs", "list", "-H", "-d", "1", "-t", what, "-o", "name", "-s", "createtxg", dataset)
    return [line.replace("#", "@").partition("@")[2] for line in lines.stdout.split()]


def guids(machine, *names):
    return machine.run("zfs", "get", "-Hp", "-o", "value", "guid", *names).stdout.split()


def holds(machine, *names):
    return {tuple(line.split("\t")[:2]) for line in machine.run("zfs", "holds", "-H", *names).stdout.splitlines()}


def same(source, snapshot, target=None):
    """The target's snapshots are the source's."""
    there = guids(target or source, *(f"backup/dr/{name}@{snapshot}" for name in REPLICAS))
    return guids(source, *(f"{name}@{snapshot}" for name in STACK["datasets"])) == there


def why(done):
    """Return why each dataset was sent as it was."""
    return {name.removeprefix("tank/"): each["why"] for name, each in done["datasets"].items()}
