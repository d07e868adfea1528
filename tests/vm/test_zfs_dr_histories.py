"""Random histories of a source and its target on real pools, beside the model of tests/unit/zfs_dr.

After each replication both must be the same, and so the next one does what the model says: it succeeds without a full
send, or says exactly why not.
"""

import os
import random
import re

import pytest
from salt.exceptions import CommandExecutionError

from tests.unit.zfs_dr.model import Sides

from .ksnap import ONE
from .zfs_dr import FORGOTTEN, VAULT

pytestmark = ONE
# How many, and from which on: each number is one history, always the same.
COUNT = int(os.environ.get("HISTORIES") or 3)
FIRST = int(os.environ.get("HISTORIES_FROM") or 0)
BASE = "backup/dr"
# Stands before zfs, and ends its changes after so many: what is received then is torn.
CUT = """#!/bin/bash
case "$1" in list|get|holds|send) exec /usr/sbin/zfs "$@" ;; esac
[ -e /run/cut ] || exec /usr/sbin/zfs "$@"
exec 9>/run/cut.lock
flock 9
left=$(cat /run/cut)
echo $((left - 1)) > /run/cut
exec 9>&-
[ "$left" -gt 0 ] && exec /usr/sbin/zfs "$@"
[[ "$*" == "receive -s"* ]] && head -c 70000 | /usr/sbin/zfs "$@"
echo "cut off" >&2
exit 1
"""
BY_HAND = r"""
snapshot=$1; shift
for dataset; do
    newer=$(zfs list -H -d 1 -t snapshot -o name -s createtxg "$dataset" | sed "0,/@$snapshot\$/d")
    aside=$(zfs list -H -r -t snapshot -o name tank | grep -F .aside- || true)
    for each in $newer $aside; do echo "$each"; done | xargs -r zfs holds -H | while read -r name tag _; do
        zfs release "$tag" "$name"
    done
    zfs rollback -R "$dataset@$snapshot"
done
"""
GENTLE = {
    "snapshot": 4, "replicate": 8, "prune_source": 2, "prune_target": 2, "write_target": 1, "snapshot_target": 1,
    "rename_source": 1, "swap_source": 1,
}  # fmt: skip
ROUGH = {**GENTLE, "rollback_source": 4, "make_anew": 1, "lose_target": 1}


class Real(Sides):
    """The model, and with it the two sides on a machine: each does what the other one does."""

    def __init__(self, machine):
        super().__init__()
        self.machine = machine
        self.names = {}  # of snapshots: the model's to the real ones
        self.known = {}  # real guid to what the model has for it
        self.seen = set()  # real guids that must be at the target
        self.done = None
        machine.sh("for each; do zfs create $each; done", *self.source)
        self.learn_datasets()

    def sh(self, script, *words):
        return self.machine.sh(script, *words).stdout

    def guids_of(self, *names):
        return [int(word) for word in self.sh('zfs get -Hp -o value guid "$@"', *names).split()]

    def learn_datasets(self):
        for real, dataset in zip(self.guids_of(*self.source), self.source.values(), strict=True):
            self.known[real] = dataset

    @property
    def stack(self):
        return {"name": "web", "datasets": list(self.source)}

    # What may happen

    def snapshot(self):
        super().snapshot()
        self.sh("for each; do head -c 100K /dev/urandom > /$each/file; done", *self.source)
        taken = self.machine.call("ksnap.snapshot", self.stack)["snapshot"]
        self.names[f"ksnap-{self.clock:04}"] = taken
        real = self.guids_of(*(f"{name}@{taken}" for name in self.source))
        self.known.update(zip(real, (dataset["snapshots"][-1] for dataset in self.source.values()), strict=True))

    def cloned(self, *places):
        """Snapshots that cannot be destroyed, since what was set aside stands on them."""
        lines = self.sh('zfs list -H -d 1 -t snapshot -o name,clones "$@"', *places).splitlines()
        return {line.split("\t")[0] for line in lines if line.split("\t")[1] not in ("", "-")}

    def destroy_source(self, name, force):
        real, kept, doomed = self.names[name], self.cloned(*self.source), []
        for place, dataset in self.source.items():
            has = [s["name"] for s in dataset["snapshots"]]
            if name in has and name not in dataset["held"] and f"{place}@{real}" not in kept:
                dataset["snapshots"] = [s for s in dataset["snapshots"] if s["name"] != name]
                doomed.append(f"{place}@{real}")
        self.sh('for each; do zfs destroy "$each"; done', *doomed)

    def rollback_source(self, index, by_hand):
        names = sorted({s["name"] for dataset in self.source.values() for s in dataset["snapshots"]})
        super().rollback_source(index, by_hand)
        if not names:
            return
        name = names[index % len(names)]
        having = [place for place, each in self.source.items() if name in [s["name"] for s in each["snapshots"]]]
        if by_hand:
            self.sh(BY_HAND, self.names[name], *having)
        else:
            self.machine.call("ksnap.rollback", {"name": "web", "datasets": having}, self.names[name], partial=True)
        self.learn_datasets()

    def make_anew(self, index):
        super().make_anew(index)
        place = list(self.source)[index % len(self.source)]
        self.sh('zfs rename "$1" "tank/gone-$2"; zfs create "$1"', place, str(self.guid()))
        self.learn_datasets()

    def rename_source(self, index):
        before = list(self.source)
        super().rename_source(index)
        for old, new in zip(before, self.source, strict=True):
            if old != new:
                self.sh('zfs rename "$1" "$2"', old, new)

    def swap_source(self):
        super().swap_source()
        self.sh("zfs rename $1 tank/swap; zfs rename $2 $1; zfs rename tank/swap $2", *list(self.source)[:2])

    def prune_target(self, index):
        if not self.target:
            return
        before = {name: replica["snapshots"][:] for name, replica in self.target.items()}
        held = {name: replica["held"] for name, replica in self.target.items()}
        real = {each: name for name, each in self.names.items()}
        for place in self.cloned(*(f"{BASE}/{name}" for name in self.target)):
            name, _, snapshot = place.removeprefix(f"{BASE}/").partition("@")
            self.target[name]["held"] = self.target[name]["held"] | {real.get(snapshot)}
        super().prune_target(index)
        doomed = []
        for name, replica in self.target.items():
            replica["held"] = held[name]
            gone = [s["name"] for s in before[name] if s not in replica["snapshots"]]
            doomed += [f"{BASE}/{name}@{self.names[each]}" for each in gone]
        if doomed:
            self.seen -= set(self.guids_of(*doomed))
            self.sh('for each; do zfs destroy "$each"; done', *doomed)

    def write_target(self, index):
        whole = [name for name in sorted(self.target) if self.target[name]["snapshots"]]
        super().write_target(index)
        if whole:
            self.sh(
                'mount -t zfs -o zfsutil,rw "$1" /mnt; head -c 4K /dev/urandom > /mnt/other; umount /mnt',
                f"{BASE}/{whole[index % len(whole)]}",
            )

    def snapshot_target(self, index):
        super().snapshot_target(index)
        for name, replica in self.target.items():
            last = replica["snapshots"][-1:]
            if last and last[0]["name"] == f"hand-{self.clock:04}":
                self.sh('zfs snapshot "$1"', f"{BASE}/{name}@{last[0]['name']}")
                self.known[self.guids_of(f"{BASE}/{name}@{last[0]['name']}")[0]] = last[0]

    def lose_target(self, index):
        before = set(self.target)
        super().lose_target(index)
        for name in before - self.target.keys():
            self.sh('zfs rename -u "$1" "backup/lost-$2"', f"{BASE}/{name}", str(self.guid()))

    def replicate(self, cut=None, full=False):
        if cut is not None:
            self.machine.put("/run/cut", str(cut))
        said, self.done = None, None
        try:
            self.done = self.machine.call("zfs_dr.replicate", self.stack, VAULT, full=full)
        except CommandExecutionError as error:
            said = str(error)
        self.sh("rm -f /run/cut")
        if cut is not None:
            assert said is None or re.search("cut off|Nothing was sent|no snapshot set in common", said), said
            self.take_over()
            return {}
        wanted, plan = self.plan(full)
        refused = super().replicate(full=full)
        if wanted is None:
            assert "no snapshot set in common" in said
            return {}
        whys = {name: self.really(step["why"]) for name, step in plan.items()}
        if refused:
            assert all(whys[name] in said for name in refused), (whys, said)
        else:
            assert said is None, (whys, said)
            assert {name: each["why"] for name, each in self.done["datasets"].items()} == whys
        self.compare()
        return refused

    def really(self, text):
        for name, real in self.names.items():
            text = text.replace(name, real)
        return text

    # What is there

    def listing(self):
        source, there = self.machine.call("zfs_dr.listings", {"source": None, "target": None}, list(self.source), BASE)
        replicas = {name: entry for name, entry in there["replicas"].items() if ".aside-" not in name}
        self.seen |= {s["guid"] for entry in replicas.values() for s in entry["snapshots"]}
        return source, replicas, there["sets"]

    def known_of(self, snapshots):
        return [self.known[each["guid"]] for each in snapshots]

    def compare(self):
        """The model and the machine are the same."""
        source, replicas, _ = self.listing()
        for name, dataset in self.source.items():
            for kind in ("snapshots", "bookmarks"):
                assert self.known_of(source[name][kind]) == dataset[kind], (name, kind)
        assert replicas.keys() == self.target.keys()
        for name, replica in self.target.items():
            assert self.known_of(replicas[name]["snapshots"]) == replica["snapshots"], name
            assert bool(replicas[name]["token"]) == bool(replica["token"]), name
            assert bool(replicas[name]["written"]) == bool(replica["written"]), name

    def take_over(self):
        """After a cut, where the model cannot know how far it came: it goes on from what is there."""
        # The next replication would begin with it; of what it is to end, the model knows nothing.
        self.machine.call("zfs_dr.mend", None, BASE, self.machine.call("zfs_dr.target_listing", None, BASE))
        source, replicas, sets = self.listing()
        for name, dataset in self.source.items():
            dataset["held"] = {self.known[s["guid"]]["name"] for s in source[name]["snapshots"] if s["held"]}
            dataset["bookmarks"] = self.known_of(source[name]["bookmarks"])
        self.target = {}
        for name, entry in replicas.items():
            snapshots, token = self.known_of(entry["snapshots"]), entry["token"]
            if token:
                token = self.machine.call("zfs_dr.token", None, token)
                ends = {key: self.known[guid]["guid"] if guid else 0 for key, guid in token.items()}
                token = {"to": ends["to"], "from": ends["from"]}
            origin = self.known.get(entry["origin_guid"])
            self.target[name] = {
                "snapshots": snapshots,
                "written": entry["written"] if snapshots else 0,
                "token": token,
                "origin_guid": origin and origin["guid"],
                "promoted": False,
                "held": {self.known[s["guid"]]["name"] for s in entry["snapshots"] if s["held"]},
            }
        marked = [each["name"] for each in sets]
        self.whole.update({name: set() for name, real in self.names.items() if real in marked})


def history(number):
    """One that never makes a full send necessary, or a rough one; it begins with a whole set."""
    draw = random.Random(number)
    kinds = ROUGH if number % 3 else GENTLE
    steps = [("snapshot",), ("replicate", None)]
    for name in draw.choices(list(kinds), kinds.values(), k=draw.randrange(6, 11)):
        if name == "replicate":
            # A replication of what has not changed is no step.
            steps += [("snapshot",), (name, draw.choice([None, *range(14)]))]
        elif name in ("snapshot", "swap_source"):
            steps.append((name,))
        else:
            steps.append((name, draw.randrange(8), *([draw.random() < 0.5] if name == "rollback_source" else [])))
    return kinds is GENTLE, steps


@pytest.fixture
def pools(fresh):
    """A machine with two empty pools, and a zfs that can be cut off."""
    fresh.sh(FORGOTTEN)
    fresh.sh("zpool create tank $1; zpool create -O mountpoint=none backup $2; zfs create -o readonly=on backup/dr",
             *fresh.devices[:2])  # fmt: skip
    fresh.put("/usr/local/sbin/zfs", CUT, 0o755)
    yield fresh
    fresh.sh("rm -f /usr/local/sbin/zfs /run/cut")


@pytest.mark.parametrize("number", range(FIRST, FIRST + COUNT))
def test_after_any_history_it_does_what_the_model_says(pools, number):
    gentle, steps = history(number)
    sides = Real(pools)
    for name, *arguments in steps:
        print(number, name, *arguments)
        getattr(sides, name)(*arguments)
    sides.snapshot()
    had = {name for name in sides.source if sides.in_common(name)}
    refused = sides.replicate()
    print(number, refused or {name: each["why"] for name, each in sides.done["datasets"].items()})
    assert not (gentle and refused) and not had & refused.keys()
    for why in refused.values():
        assert "only a full send would help" in why
    if refused:
        assert sides.replicate(full=True) == {}
    for name, each in sides.done["datasets"].items():
        assert name not in had or "full" not in each["why"], each
    assert sides.seen <= {int(line) for line in sides.sh("zfs list -Hp -r -t snapshot -o guid backup").split()}
    assert sides.machine.call("zfs_dr.replicate", sides.stack, VAULT)["changed"] is False
    # Sets of before may have been pruned in part, or set aside; nothing else is wrong.
    problems = sides.machine.call("zfs_dr.verify", sides.stack, VAULT)["problems"]
    assert all("was whole and is not any more" in each for each in problems)
