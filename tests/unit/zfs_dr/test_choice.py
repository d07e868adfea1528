"""What is sent: a model of two sides with random histories, and the cases that have a name."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salt.exceptions import SaltInvocationError

from tests.unit.zfs_dr.conftest import load_file

CHOICE = load_file("_modules/zfs_dr_choice.py")
DATASETS = ("tank/a", "tank/b", "tank/c")


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
        self.whole = set()
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
            dataset["bookmarks"] = [b for b in dataset["bookmarks"] if by_hand and b["createtxg"] <= at[0]]
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
                replica["snapshots"].append({"name": "hand", "guid": self.guid(), "createtxg": self.clock})

    def lose_target(self, index):
        if self.target:
            lost = self.target.pop(sorted(self.target)[index % len(self.target)])
            self.received -= {s["guid"] for s in lost["snapshots"]}

    def plan(self, full=False):
        wanted = CHOICE.newest_set(self.source)
        if wanted is None:
            return None, {}
        names = {name: name.replace("/", ":") for name in self.source}
        return wanted, CHOICE.choose(copy.deepcopy(self.source), copy.deepcopy(self.target), wanted, names, full=full)

    def replicate(self, cut=None, full=False):
        """Do what was chosen, up to a cut after so many acts; returns the refusals."""
        wanted, plan = self.plan(full)
        if wanted is None:
            return {}
        refused = {name: step["why"] for name, step in plan.items() if step["refused"]}
        if refused:
            return refused
        for name in plan:
            self.source[name]["held"].add(wanted)
        todo = [(name, step["replica"], act) for name, step in plan.items() for act in step["acts"]]
        # Renames come first, by way of names that nobody has.
        moves = [(replica, act[1]) for _, replica, act in todo if act[0] == "rename"]
        first = [item for item in todo if item[2] == ["aside", None] and item[1] not in [m[1] for m in moves]]
        for _, replica, _ in first:
            if replica in self.target:
                self.aside(replica, None)
        taken = {new: self.target.pop(old) for new, old in moves}
        assert not taken.keys() & self.target.keys()
        self.target.update(taken)
        for count, (name, replica, act) in enumerate(todo):
            if act[0] == "rename" or (name, replica, act) in first:
                continue
            if cut is not None and count >= cut:
                self.broken(name, replica, act)
                return {}
            self.do(name, replica, act)
        self.whole.add(wanted)
        for name, step in plan.items():
            replica = self.target[step["replica"]]
            assert replica["snapshots"][-1]["name"] == wanted
            assert replica["token"] is None and not replica["written"]
            replica["held"] = {wanted}
            self.source[name]["held"] = {wanted}
            mark = next(s for s in self.source[name]["snapshots"] if s["name"] == wanted)
            if all(b["guid"] != mark["guid"] for b in self.source[name]["bookmarks"]):
                self.source[name]["bookmarks"].append(mark)
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


small = st.integers(0, 7)
gentle = st.one_of(
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("prune_source"), small),
    st.tuples(st.just("prune_target"), small),
    st.tuples(st.just("write_target"), small),
    st.tuples(st.just("snapshot_target"), small),
    st.tuples(st.just("rename_source"), small),
    st.tuples(st.just("swap_source")),
    st.tuples(st.just("replicate"), st.one_of(st.none(), st.integers(0, 6))),
)
rough = st.one_of(
    gentle,
    st.tuples(st.just("rollback_source"), small, st.booleans()),
    st.tuples(st.just("make_anew"), small),
    st.tuples(st.just("lose_target"), small),
)


def played(history):
    sides = Sides()
    for name, *arguments in history:
        getattr(sides, name)(*arguments)
    return sides


def kept(sides):
    there = [*sides.target.values(), *sides.asides]
    return {s["guid"] for replica in there for s in replica["snapshots"]}


@given(st.lists(gentle, max_size=30))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_pruning_no_writing_no_renaming_no_cut_makes_a_second_full_send_necessary(history):
    sides = played(history)
    sides.snapshot()
    sides.fulls.clear()
    had = {name for name in sides.source if sides.in_common(name)}
    whole = {s["guid"] for replica in sides.target.values() for s in replica["snapshots"]}
    sides.snapshot()
    assert sides.replicate() == {}
    assert not had & set(sides.fulls)
    assert whole <= kept(sides)
    # Once it was whole there, it needs no full send ever after.
    for turn in range(3):
        sides.prune_source(turn)
        sides.prune_target(turn)
        sides.snapshot()
        sides.replicate(cut=turn)
        sides.fulls.clear()
        sides.snapshot()
        assert sides.replicate() == {}
        assert sides.fulls == []


@given(st.lists(rough, max_size=30))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_after_any_history_it_succeeds_or_says_why_and_loses_nothing(history):
    sides = played(history)
    sides.snapshot()
    had = {name for name in sides.source if sides.in_common(name)}
    before = copy.deepcopy(sides.target)
    sides.fulls.clear()
    refused = sides.replicate()
    for name, why in refused.items():
        assert name not in had
        assert "only a full send would help" in why
    if refused:
        assert sides.target == before
        assert sides.replicate(full=True) == {}
    assert not had & set(sides.fulls)
    assert sides.received <= kept(sides)
    assert all(not step["acts"] for step in sides.plan()[1].values())


@given(st.lists(rough, max_size=20), small)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_promoted_replica_is_never_touched(history, index):
    sides = played(history)
    sides.snapshot()
    if not sides.target:
        return
    sides.target[sorted(sides.target)[index % len(sides.target)]]["promoted"] = True
    before = copy.deepcopy(sides.target)
    _, plan = sides.plan(full=True)
    promoted = next(name for name, replica in sides.target.items() if replica["promoted"])
    # One refusal is enough: nothing is done for any dataset then.
    if not any(step["refused"] for step in plan.values()):
        for step in plan.values():
            assert step["replica"] != promoted or not step["acts"]
            assert ["rename", promoted] not in step["acts"]
    assert sides.target == before


def snapshots(*numbers):
    return [{"name": f"ksnap-{n}", "guid": 100 + n, "createtxg": n} for n in numbers]


def one(source, target, bookmarks=(), wanted=3, full=False, **more):
    dataset = {"guid": 1, "snapshots": snapshots(*source), "bookmarks": snapshots(*bookmarks)}
    replica = {
        "snapshots": snapshots(*target), "written": 0, "token": None, "origin_guid": 1, "promoted": False, **more
    }  # fmt: skip
    return CHOICE.choose({"tank/a": dataset}, {"a": replica}, f"ksnap-{wanted}", {"tank/a": "a"}, full=full)["tank/a"]


@pytest.mark.parametrize(
    "case, acts",
    [
        ({"source": [1, 3], "target": [1]}, [["send", "tank/a@ksnap-1", "ksnap-3"]]),
        ({"source": [3], "target": [1], "bookmarks": [1]}, [["send", "tank/a#ksnap-1", "ksnap-3"]]),
        ({"source": [1, 3], "target": [1, 2]}, [["aside", "ksnap-1"], ["send", "tank/a@ksnap-1", "ksnap-3"]]),
        (
            {"source": [1, 3], "target": [1], "written": 9},
            [["aside", "ksnap-1"], ["send", "tank/a@ksnap-1", "ksnap-3"]],
        ),
        ({"source": [1, 3], "target": [1], "token": {"to": 103, "from": 101}}, [["resume", "ksnap-3"]]),
        (
            {"source": [1, 2, 3], "target": [1], "token": {"to": 102, "from": 101}},
            [["resume", "ksnap-2"], ["send", "tank/a@ksnap-2", "ksnap-3"]],
        ),
        (
            {"source": [1, 3], "target": [1], "token": {"to": 102, "from": 101}},
            [["abort"], ["send", "tank/a@ksnap-1", "ksnap-3"]],
        ),
        ({"source": [3], "target": [], "token": {"to": 102, "from": 0}}, [["abort"], ["send", None, "ksnap-3"]]),
        ({"source": [1, 3], "target": [1, 3]}, []),
        ({"source": [3], "target": [1], "origin_guid": 2}, [["aside", None], ["send", None, "ksnap-3"]]),
        ({"source": [3], "target": [1], "full": True}, [["aside", None], ["send", None, "ksnap-3"]]),
    ],
)
def test_the_cases_that_have_a_name(case, acts):
    step = one(**case)
    assert (step["acts"], step["refused"]) == (acts, False)


@pytest.mark.parametrize(
    "case, words",
    [
        ({"source": [3], "target": [1]}, "full=True"),
        ({"source": [1, 3], "target": [1], "promoted": True}, "zfs_dr.failback"),
        ({"source": [3], "target": [4], "bookmarks": [4]}, "Take a new snapshot"),
    ],
)
def test_a_refusal_says_what_to_do(case, words):
    step = one(**case)
    assert step["refused"] and step["acts"] == []
    assert words in step["why"]


def test_a_set_that_a_dataset_does_not_have_is_a_wrong_call():
    with pytest.raises(SaltInvocationError, match="tank/a has no snapshot ksnap-9"):
        one([1], [1], wanted=9)


def test_the_newest_set_is_the_one_that_all_have_whatever_the_clock_said():
    def named(*names):
        return {"snapshots": [{"name": name, "guid": 1, "createtxg": txg} for txg, name in enumerate(names)]}

    backwards = named("ksnap-2030", "ksnap-2020")
    assert CHOICE.newest_set({"a": backwards, "b": backwards}) == "ksnap-2020"
    assert CHOICE.newest_set({"a": named("ksnap-1", "ksnap-2"), "b": named("ksnap-1", "other")}) == "ksnap-1"
    assert CHOICE.newest_set({"a": named("ksnap-2", "hand"), "b": named("ksnap-1", "hand")}) is None
    assert CHOICE.newest_set({}) is None
