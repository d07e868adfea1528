"""What is sent: random histories of two sides, and the cases that have a name."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from salt.exceptions import SaltInvocationError

from tests.unit.zfs_dr.model import CHOICE, Sides

small = st.integers(0, 7)
quiet = st.one_of(
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("prune_source"), small),
    st.tuples(st.just("prune_target"), small),
    st.tuples(st.just("write_target"), small),
    st.tuples(st.just("snapshot_target"), small),
    st.tuples(st.just("rename_source"), small),
    st.tuples(st.just("replicate"), st.one_of(st.none(), st.integers(0, 6))),
)
gentle = st.one_of(quiet, st.tuples(st.just("swap_source")))
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


@given(st.lists(st.one_of(quiet, st.tuples(st.just("make_anew"), small)), max_size=30))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_until_another_set_is_whole_the_one_before_is_also_where_a_dataset_is_sent_in_full_again(history):
    sides = played([("snapshot",), ("replicate",)])
    for name, *arguments in history:
        getattr(sides, name)(*arguments)
        assert sides.a_whole_set_is_there()


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


COMING = "a.coming-20261125T222408Z"


def part(*there, token=None):
    """What is being received to replace a replica."""
    entry = {"snapshots": snapshots(*there), "written": 0, "token": token, "origin_guid": 1, "promoted": False}
    return {"name": COMING, **entry}


def one(source, target, bookmarks=(), wanted=3, full=False, **more):
    dataset = {"guid": 1, "snapshots": snapshots(*source), "bookmarks": snapshots(*bookmarks)}
    replica = {
        "snapshots": snapshots(*target), "written": 0, "token": None, "origin_guid": 1, "promoted": False, **more
    }  # fmt: skip
    sides = {"tank/a": dataset}, {"a": replica}
    return CHOICE.choose(*sides, f"ksnap-{wanted}", {"tank/a": "a"}, full, "20261126T000000Z")["tank/a"]


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
        ({"source": [3], "target": [1], "origin_guid": 2}, [["replace"], ["send", None, "ksnap-3"]]),
        ({"source": [3], "target": [1], "full": True}, [["replace"], ["send", None, "ksnap-3"]]),
        # It had begun: it goes on, and needs nobody's word for it any more.
        (
            {"source": [3], "target": [1], "coming": part(token={"to": 103, "from": 0})},
            [["replace"], ["resume", "ksnap-3"]],
        ),
        ({"source": [3], "target": [1], "coming": part(3)}, [["replace"]]),
        ({"source": [2, 3], "target": [1], "coming": part(2)}, [["replace"], ["send", "tank/a@ksnap-2", "ksnap-3"]]),
        (
            {"source": [3], "target": [1], "coming": part(token={"to": 102, "from": 0})},
            [["replace"], ["abort"], ["send", None, "ksnap-3"]],
        ),
        (
            {"source": [3], "target": [1], "coming": part(2)},
            [["replace"], ["aside", None], ["send", None, "ksnap-3"]],
        ),
        # What had gone comes back, as by ksnap.restore_aside.
        (
            {"source": [1, 3], "target": [1], "coming": part(token={"to": 102, "from": 0})},
            [["drop", COMING], ["send", "tank/a@ksnap-1", "ksnap-3"]],
        ),
    ],
)
def test_the_cases_that_have_a_name(case, acts):
    step = one(**case)
    assert (step["acts"], step["refused"]) == (acts, False)
    coming = case["coming"]["name"] if "coming" in case else "a.coming-20261126T000000Z"
    assert step["place"] == (coming if ["replace"] in acts else "a")


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
