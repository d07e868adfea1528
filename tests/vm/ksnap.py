"""One machine for all tests of a file, with fresh pools for each: a machine for each would cost more than the tests."""

import os
import random

import pytest

# On an emulated processor a test takes ten seconds: most run on one release, and those that show most on the other too.
ONE = pytest.mark.parametrize("debian", ["trixie"], indirect=True)
# At how many moments a test cuts the power, and what draws them; see tests/README.md.
MOMENTS = int(os.environ.get("POWER_CUTS") or 2)
SEED = int(os.environ.get("POWER_SEED") or random.randrange(2**32))
MAIL = {"name": "mail", "datasets": ["tank/mail", "tank/db"], "children": True}
CONFIG = {"ksnap": {"stacks": {"mail": {"datasets": ["tank/mail", "tank/db"], "children": True}}}}
DATASETS = ["tank/db", "tank/mail", "tank/mail/queue", "tank/mail/vol"]
CLEAN = """
cd /
rm -f /etc/systemd/system/ksnap-*
for path in $(grep -E ' (/srv|/mnt|/tank|/fast)[/ ]' /proc/mounts | cut -d' ' -f2 | tac); do umount -l "$path"; done
for pool in $(zpool list -H -o name); do zpool destroy -f "$pool"; done
find /srv -mindepth 1 -maxdepth 1 ! -name xmpp-formula ! -name salt ! -name pillar -exec rm -rf {} +
rm -rf /mnt/* /tank /fast
for device; do zpool labelclear -f "$device-part1" || zpool labelclear -f "$device" || true; wipefs -aq "$device"; done
"""


@pytest.fixture(scope="module")
def lasting(debian):
    """A machine with two disks, for all tests of a file."""
    # Not at the top: this file is loaded for all tests, also where there are no machines.
    from .library import Room

    with Room(debian) as room:
        yield room.machine(disks=2)


@pytest.fixture
def fresh(lasting):
    """The machine without a pool, and with nothing in it of the test before."""
    if not lasting.on:
        lasting.start()
    lasting.sh(CLEAN, *lasting.devices)
    return lasting


@pytest.fixture
def draw():
    """What draws a test's moments."""
    print(f"POWER_SEED={SEED}")
    return random.Random(SEED)


@pytest.fixture
def mail(fresh):
    """The machine with a pool, and the datasets of the stack ``MAIL`` on it."""
    fresh.sh(
        """
        zpool create -O compression=lz4 tank $1; zfs create tank/mail; zfs create tank/mail/queue; zfs create tank/db
        zfs create -V 8M tank/mail/vol; zfs create tank/other; echo one > /tank/mail/file
        """,
        fresh.devices[0],
    )
    return fresh


def again(machine, pool, *options, disk=0):
    """Export and import a pool, as a restart does."""
    machine.sh("zpool export $1", pool)
    bring(machine, machine.devices[disk], pool, *options)


def bring(machine, device, pool, *options):
    """Import a pool. After an export, or when a disk was plugged in, its partitions come and go for a moment."""
    script = 'disk=$1; shift; until zpool import -d $disk-part1 "$@"; do sleep .1; done'
    machine.sh(script, device, *options, pool, timeout=60)


def snapshots(machine):
    """Return the full names of all snapshots."""
    return machine.run("zfs", "list", "-H", "-t", "snapshot", "-o", "name").stdout.split()


def dry(machine, function, *arguments, config=None, **options):
    """Call a function with its own parameter ``test=True``; that of ``Machine.call`` is Salt's test mode."""
    return machine._ask(
        "call",
        600,
        function=function,
        arguments=arguments,
        options={**options, "test": True},
        test=False,
        pillar={},
        config=config or {},
    )
