"""A source and a target in memory: what may happen to them, and what a replication makes of it.

The tests of the machine room let the same happen to real ones; see tests/vm/test_zfs_dr_histories.py.
"""

import copy

from tests.unit.zfs_dr.conftest import load_file

CHOICE = load_file("_modules/zfs_dr_choice.py")
DATASETS = ("tank/a", "tank/b", "tank/c")
MARKS = 2  # bookmarks that a dataset keeps for a target


class Sides:
    """Two sides as ZFS has them, with ZFS's own rules: what it would refuse is an AssertionError."""

    def __init__(self):
        self.clock = 0
        self.guids = 0
        self.source = {name: self.dataset() for name in DATASETS}
        self.target = {}
        self.asides = []
        # Every guid that the target has received and not pruned itself.
        self.received = set()
        # Each set that became whole, and the guids that are in it.
        self.whole = {}
        self.fulls = []

    def guid(self):
        self.guids += 1
        return self.guids

    def dataset(self):
        return {"guid": self.guid(), "snapshots": [], "bookmarks": [], "held": set()}

    def snapshot(self):
        self.clock += 1
        name = f"ksnap-{self.clock:04}"
        for dataset in self.source.values():
            dataset["snapshots"].append({"name": name, "guid": self.guid(), "createtxg": self.clock})

    def prune_source(self, index):
        names = sorted({s["name"] for dataset in self.source.values() for s in dataset["snapshots"]})
        if names:
            self.destroy_source(names[index % len(names)], force=False)

    def destroy_source(self, name, force):
        for dataset in self.source.values():
            if force or name not in dataset["held"]:
                dataset["snapshots"] = [s for s in dataset["snapshots"] if s["name"] != name]

    def rollback_source(self, index, by_hand):
        """ksnap leaves the newer ones with the dataset that it set aside; by hand they are destroyed, holds or not."""
        names = sorted({s["name"] for dataset in self.source.values() for s in dataset["snapshots"]})
        if not names:
            return
        self.clock += 1
        name = names[index % len(names)]
        for dataset in self.source.values():
            at = [s["createtxg"] for s in dataset["snapshots"] if s["name"] == name]
            if not at:
                continue
            dataset["snapshots"] = [s for s in dataset["snapshots"] if s["createtxg"] <= at[0]]
            dataset["bookmarks"] = [b for b in dataset["bookmarks"] if b["createtxg"] <= at[0]]
            if not by_hand:
                dataset["guid"] = self.guid()

    def make_anew(self, index):
        self.source[list(self.source)[index % len(self.source)]] = self.dataset()

    def rename_source(self, index):
        old = list(self.source)[index % len(self.source)]
        new = old[:-1] if old.endswith("x") else f"{old}x"
        self.source = {new if name == old else name: dataset for name, dataset in self.source.items()}

    def swap_source(self):
        first, second, *_ = self.source
        self.source[first], self.source[second] = self.source[second], self.source[first]

    def prune_target(self, index):
        """As zfs_dr.prune does: of the sets that are whole, never the held one."""
        for replica in self.target.values():
            for snapshot in replica["snapshots"][:-1][index % 3 :: 2]:
                if snapshot["name"] in self.whole and snapshot["name"] not in replica["held"]:
                    replica["snapshots"].remove(snapshot)
                    self.received.discard(snapshot["guid"])

    def write_target(self, index):
        # What is not whole yet cannot be written to.
        whole = [name for name in sorted(self.target) if self.target[name]["snapshots"]]
        if whole:
            self.target[whole[index % len(whole)]]["written"] = 4096

    def snapshot_target(self, index):
        """Somebody takes a snapshot there."""
        if self.target:
            replica = self.target[sorted(self.target)[index % len(self.target)]]
            if replica["snapshots"]:
                self.clock += 1
                name = f"hand-{self.clock:04}"
                replica["snapshots"].append({"name": name, "guid": self.guid(), "createtxg": self.clock})
                replica["written"] = 0

    def lose_target(self, index):
        if self.target:
            lost = self.target.pop(sorted(self.target)[index % len(self.target)])
            self.received -= {s["guid"] for s in lost["snapshots"]}

    def plan(self, full=False):
        wanted = CHOICE.newest_set(self.source)
        if wanted is None:
            return None, {}
        names = {name: name.replace("/", ":") for name in self.source}
        source, there = copy.deepcopy(self.source), copy.deepcopy(self.target)
        for name in [name for name in there if CHOICE.beside(name)[1]]:
            of = CHOICE.beside(name)[0]
            if of in there:
                there[of]["coming"] = {**there[name], "name": name}
            del there[name]
        return wanted, CHOICE.choose(source, there, wanted, names, full=full, stamp=f"20261125T{self.clock:06}Z")

    def mend(self):
        """What somebody destroyed needs no replacing: what comes is the replica."""
        for name in [name for name in self.target if CHOICE.beside(name)[1]]:
            if CHOICE.beside(name)[0] not in self.target:
                self.target[CHOICE.beside(name)[0]] = self.target.pop(name)

    def replicate(self, cut=None, full=False):
        """Do what was chosen, up to a cut after so many acts; returns the refusals."""
        self.mend()
        wanted, plan = self.plan(full)
        if wanted is None:
            return {}
        refused = {name: step["why"] for name, step in plan.items() if step["refused"]}
        if refused:
            return refused
        for name in plan:
            self.source[name]["held"].add(wanted)
        moves = {
            act[1]: step["replica"] for step in plan.values() for act in step["acts"] if act[0] == "rename"
        }  # fmt: skip
        # Before them, what is of no use, and what stands in their way; what is set aside for its own sake comes later.
        for step in plan.values():
            for act in [act for act in step["acts"] if act[0] == "drop"]:
                self.asides.append(self.target.pop(act[1]))
            if step["acts"][:1] == [["aside", None]] and "rename" in [act[0] for act in step["acts"]]:
                step["acts"].pop(0)
                if step["replica"] in self.target:
                    self.aside(step["replica"], None)
        # By way of names that nobody has; what is to replace one goes with it.
        taken = {new: self.target.pop(old) for old, new in moves.items()}
        for name in [name for name in self.target if CHOICE.beside(name)[1]]:
            of, _, stamp = CHOICE.beside(name)
            if of in moves:
                taken[f"{moves[of]}.coming-{stamp}"] = self.target.pop(name)
        assert not taken.keys() & self.target.keys()
        self.target.update(taken)
        todo = []
        for name, step in plan.items():
            place = step["replica"]
            for act in step["acts"]:
                if act == ["replace"]:
                    place = step["place"]
                elif act[0] not in ("rename", "drop"):
                    todo.append((name, place, act))
        for count, (name, place, act) in enumerate(todo):
            if cut is not None and count >= cut:
                self.broken(name, place, act)
                return {}
            self.do(name, place, act)
        self.whole[wanted] = {self.target[step["place"]]["snapshots"][-1]["guid"] for step in plan.values()}
        for step in plan.values():
            if step["place"] != step["replica"]:
                self.aside(step["replica"], None)
                self.target[step["replica"]] = self.target.pop(step["place"])
        for name, step in plan.items():
            replica = self.target[step["replica"]]
            assert replica["snapshots"][-1]["name"] == wanted
            assert replica["token"] is None and not replica["written"]
            replica["held"] = {wanted}
            self.source[name]["held"] = {wanted}
            mark = next(s for s in self.source[name]["snapshots"] if s["name"] == wanted)
            if all(b["guid"] != mark["guid"] for b in self.source[name]["bookmarks"]):
                self.source[name]["bookmarks"] = [*self.source[name]["bookmarks"][1 - MARKS :], mark]
        return {}

    def base(self, name, base):
        if base is None:
            return None
        dataset, kind, mark = base.partition("#") if "#" in base else base.partition("@")
        assert dataset == name
        listed = self.source[name]["bookmarks" if kind == "#" else "snapshots"]
        return next(s for s in listed if s["name"] == mark)

    def stream(self, name, replica, act):
        """What ZFS asks of a stream before it is received: the base is the newest there, and nothing was written."""
        dataset = self.source[name]
        if act[0] == "resume":
            token = self.target[replica]["token"]
            to = next(s for s in dataset["snapshots"] if s["guid"] == token["to"])
            assert to["name"] == act[1]
            origin = token["from"]
        else:
            to = next(s for s in dataset["snapshots"] if s["name"] == act[2])
            base = self.base(name, act[1])
            origin = base["guid"] if base else 0
            assert not base or base["createtxg"] < to["createtxg"]
            assert replica not in self.target or self.target[replica]["token"] is None
        if origin:
            assert self.target[replica]["snapshots"][-1]["guid"] == origin
            assert not self.target[replica]["written"]
        elif act[0] == "send":
            assert replica not in self.target
            self.fulls.append(name)
        return to, origin

    def broken(self, name, replica, act):
        if act[0] not in ("send", "resume"):
            return
        to, origin = self.stream(name, replica, act)
        if not origin and replica not in self.target:
            self.target[replica] = self.replica(name)
        self.target[replica]["token"] = {"to": to["guid"], "from": origin}

    def replica(self, name):
        origin = self.source[name]["guid"]
        return {
            "snapshots": [], "written": 0, "token": None, "origin_guid": origin, "promoted": False, "held": set()
        }  # fmt: skip

    def aside(self, replica, common):
        whole = self.target[replica]
        if common is None:
            self.asides.append(self.target.pop(replica))
            return
        at = next(i for i, s in enumerate(whole["snapshots"]) if s["name"] == common)
        self.asides.append({**whole, "snapshots": whole["snapshots"][at + 1 :]})
        whole.update(snapshots=whole["snapshots"][: at + 1], written=0, token=None)

    def do(self, name, replica, act):
        if act[0] == "abort":
            if self.target[replica]["snapshots"]:
                self.target[replica]["token"] = None
            else:
                del self.target[replica]
        elif act[0] == "aside":
            self.aside(replica, act[1])
        else:
            to, origin = self.stream(name, replica, act)
            if not origin and replica not in self.target:
                self.target[replica] = self.replica(name)
            self.target[replica]["snapshots"].append(to)
            self.target[replica]["token"] = None
            self.received.add(to["guid"])

    def in_common(self, name):
        """What a dataset shares with any replica: asked in another way than the code under test does."""
        known = {s["guid"] for s in self.source[name]["snapshots"] + self.source[name]["bookmarks"]}
        return any(known & {s["guid"] for s in replica["snapshots"]} for replica in self.target.values())

    def a_whole_set_is_there(self):
        there = {s["guid"] for replica in self.target.values() for s in replica["snapshots"]}
        return any(guids <= there for guids in self.whole.values())
