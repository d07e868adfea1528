"""The power goes while a stack is replicated, on either side or on both, and while its replica is made to serve.

The work is done once, and what a cut leaves at random moments of it is copied; see ``Machine.copies_at``. The
environment variable ``POWER_CUTS`` says how many moments (20 by hand; else 2), ``POWER_SEED`` draws them again.
"""

import contextlib

import pytest
from salt.exceptions import CommandExecutionError

from .ksnap import CLEAN, MOMENTS, ONE, SEED, bring
from .zfs_dr import VAULT, guids, holds, replicate, snapshots, write

pytestmark = ONE
LAST = "/var/lib/zfs_dr/vault-web.last"


@contextlib.contextmanager
def plugged(machine, **disks):
    """Plug copies of disks in, by their pools, and import these; pull them out again at the end."""
    first = len(machine.disks)
    try:
        for pool, disk in disks.items():
            bring(machine, machine.add_disk(backing=disk), pool, "-N")
        yield
        machine.sh('for pool; do zpool export -f "$pool"; done', *disks)
    finally:
        for number in range(first, len(machine.disks)):
            machine.pull_disk(number)
        del machine.disks[first:]


def moments(copies, draw):
    """Which copy of the source goes with which of the target: cut at once, or one of them earlier than the other.

    The one that was cut has the older disk: the other one had some time left to note that.
    """
    both = [("both", copy, copy) for copy in copies]
    drawn = sorted({tuple(sorted(draw.sample(range(len(copies)), 2))) for _ in copies[1:]})
    pairs = [(copies[old], copies[new]) for old, new in drawn]
    return [*both, *(("source", *pair) for pair in pairs), *(("target", *reversed(pair)) for pair in pairs)]


def test_replicate_is_cut_at_any_write(here, draw):
    first, second = replicate(here, take=True), replicate(here, take=True)
    # One that goes on, one to be set aside, one renamed, one new: all that a replication can do.
    write(here, "more")
    here.sh("""
        zfs snapshot backup/dr/tank:mail@hand; zfs rename tank/web/db tank/db; zfs create tank/new
        head -c 300K /dev/urandom > /tank/new/first
        """)  # fmt: skip
    stack = {"name": "web", "datasets": ["tank/web", "tank/db", "tank/mail", "tank/new"]}
    last = here.read(LAST)
    third, copies = here.copies_at(MOMENTS, draw, here.call, "zfs_dr.replicate", stack, VAULT, take=True)
    assert third["aside"] and "renamed" in third["datasets"]["tank/db"]["why"]
    here.sh(CLEAN, *here.devices[:2])
    for cut, (at, (source, _)), (then, (_, target)) in moments(copies, draw):
        case = f"seed {SEED}: {cut} cut, source as of write {at}, target as of {then}"
        print(case)
        with plugged(here, tank=source, backup=target):
            # What it notes at the end, on another disk, is not there yet.
            here.put(LAST, last)
            sets = here.call("zfs_dr.sets", "backup/dr")
            assert all(each["whole"] for each in sets), case
            assert [each["snapshot"] for each in sets][:2] == [first["snapshot"], second["snapshot"]], case
            taken = third["snapshot"] in snapshots(here, "tank/new")
            assert taken or len(sets) == 2 or cut == "source", case
            if taken and len(sets) == 3:
                assert equal(here, third["snapshot"], stack), case
            done = here.call("zfs_dr.replicate", stack, VAULT, take=not taken or draw.random() < 0.5)
            for name, each in done["datasets"].items():
                assert name == "tank/new" or "full" not in each["why"], (case, done)
            assert equal(here, done["snapshot"], stack), case
            assert here.call("zfs_dr.replicate", stack, VAULT)["changed"] is False, case
            assert here.call("zfs_dr.verify", stack, VAULT)["problems"] == [], case
            for place, tag in [*((name, "vault") for name in stack["datasets"]), ("backup/dr", "web")]:
                every = [f"{place}@{name}" for name in snapshots(here, place)]
                assert holds(here, *every) == {(f"{place}@{done['snapshot']}", f"zfs_dr:{tag}")}, case


def equal(machine, snapshot, stack):
    names = stack["datasets"]
    there = [f"backup/dr/{name.replace('/', ':')}@{snapshot}" for name in names]
    return guids(machine, *(f"{name}@{snapshot}" for name in names)) == guids(machine, *there)


def test_a_promotion_is_cut_at_any_write(here, draw):
    first = replicate(here, take=True)
    write(here, "lost", "30K")
    # The next set had come half way: one dataset is beyond the whole set, one is on its way, one was not begun.
    here.sh(
        """
        zfs snapshot tank/web@ksnap-next tank/web/db@ksnap-next tank/mail@ksnap-next
        zfs send -w -i @$1 tank/web@ksnap-next | zfs receive -u backup/dr/tank:web
        zfs send -w -i @$1 tank/mail@ksnap-next | head -c 20000 | zfs receive -s -u backup/dr/tank:mail || true
        zpool export tank
        """,
        first["snapshot"],
    )
    arguments = ["zfs_dr.recover", "backup/dr", "web", "/mnt/serves", "promote"]
    done, copies = here.copies_at(MOMENTS, draw, here.call, *arguments, silence=0)
    assert done["snapshot"] == first["snapshot"]
    here.sh(CLEAN, *here.devices[:2])
    for writes, (source, target) in copies:
        case = f"seed {SEED}: cut at write {writes} of {copies[-1][0]}"
        print(case)
        with plugged(here, tank=source, backup=target):
            here.sh("rm -rf /run/zfs_dr /var/lib/zfs_dr")
            promoted = "zfs get -H -s local,received -o name zfs_dr:promoted -r -t filesystem backup/dr"
            if here.sh(promoted).stdout:
                # Half of it or all: no replication comes in between.
                with pytest.raises(CommandExecutionError, match=r"was promoted"):
                    replicate(here, take=True)
            elif draw.random() < 0.5:
                # Not recovered at all: the source goes on, or it can be.
                assert all("full" not in each["why"] for each in replicate(here)["datasets"].values()), case
            again = here.call(*arguments, silence=0)
            assert sorted(again["mounts"].values()) == [
                f"/mnt/serves/tank/{name}" for name in ("mail", "web", "web/db")
            ]
            if again["snapshot"] == first["snapshot"]:
                here.sh("! ls /mnt/serves/tank/*/lost /mnt/serves/tank/web/db/lost")
            here.sh("for each in web web/db mail; do echo x > /mnt/serves/tank/$each/new; done")
            assert len(here.call("zfs_dr.asides", "backup/dr")) <= 1, case
