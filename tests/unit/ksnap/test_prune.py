"""Retention: grids as zrepl's, the newest in any case, and never what something keeps."""

import hypothesis
import pytest
from hypothesis import strategies
from salt.exceptions import SaltInvocationError

HOUR, DAY = 3600, 86400
GRIDS = ["1x1h(keep=all) | 24x1h | 14x1d", "4x15m | 24x1h | 3x1d | 4x1w", "10x1h", "1x1d(keep=3)", "1x1w(keep=all)"]


@pytest.fixture(scope="module")
def prune():
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).resolve().parents[3] / "_modules/ksnap_prune.py"
    spec = importlib.util.spec_from_file_location("loaded_ksnap_prune", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__salt__ = {"ksnap.kept_by": lambda snapshot: snapshot.get("kept", [])}
    return module


def listed(times, kept=()):
    return [
        {"snapshot": f"s{index}", "created": when, "kept": ["held by me"] if index in kept else []}
        for index, when in enumerate(times)
    ]


def stays(prune, times, **how):
    return [time for time, each in zip(times, prune.prune_choice(listed(times), **how), strict=True)
            if each["action"] == "keep"]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "intervals"),
    [
        ("2x1h", [[HOUR, 1], [HOUR, 1]]),
        ("1x30m(keep=all)|1x1d(keep=3)", [[1800, None], [DAY, 3]]),
        (" 1 x 2w ", [[14 * DAY, 1]]),
    ],
)
def test_grids(prune, grid, intervals):
    assert prune.grid_parsed(grid) == intervals


@pytest.mark.parametrize("grid", ["", "hourly", "0x1h", "1x0h", "1x1h(keep=0)", "1x1h |", "1x1y", "20000x1s", None])
def test_wrong_grids(prune, grid):
    with pytest.raises(SaltInvocationError, match="interval"):
        prune.grid_parsed(grid)


def test_a_grid_thins_the_past(prune):
    times = [minute * 600 for minute in range(6 * 24 * 20)]  # every ten minutes, twenty days
    kept = stays(prune, times, grid=GRIDS[0])
    newest = times[-1]
    ages = [newest - time for time in kept]
    assert len([age for age in ages if age < HOUR]) == 6
    assert len([age for age in ages if HOUR <= age < 25 * HOUR]) == 24
    assert len([age for age in ages if age >= 25 * HOUR]) == 14
    assert max(ages) < 25 * HOUR + 14 * DAY


@pytest.mark.parametrize("how", [{}, {"count": 0}, {"count": -1}, {"count": "3"}, {"count": True}])
def test_wrong_choices(prune, how):
    with pytest.raises(SaltInvocationError):
        prune.prune_choice(listed([1, 2, 3]), **how)


def test_every_snapshot_has_its_reason(prune):
    chosen = prune.prune_choice(listed([0, 10, 20, DAY * 9], kept=[1]), grid="2x1h", count=2)
    assert [(each["action"], each["reasons"]) for each in chosen] == [
        ("destroy", ["no interval of the grid keeps it", "it is older than the 2 newest"]),
        ("keep", ["it is held by me"]),
        ("keep", ["it is one of the 2 newest"]),
        ("keep", ["it is the newest", "it is the one for the age of 0s to 1h"]),
    ]


times = strategies.lists(strategies.integers(0, 40 * DAY), max_size=80).map(sorted)
grids = strategies.sampled_from(GRIDS)


@hypothesis.given(times=times, grid=grids, count=strategies.integers(1, 10))
@hypothesis.settings(deadline=None, max_examples=200)
def test_the_newest_always_stay(prune, times, grid, count):
    chosen = prune.prune_choice(listed(times), grid=grid, count=count)
    assert all(each["action"] == "keep" for each in chosen[-count:])
    assert all(each["reasons"] for each in chosen)


@hypothesis.given(times=times, kept=strategies.sets(strategies.integers(0, 80)), grid=grids)
@hypothesis.settings(deadline=None, max_examples=100)
def test_what_is_kept_by_something_stays_and_changes_nothing_else(prune, times, kept, grid):
    free = prune.prune_choice(listed(times), grid=grid)
    held = prune.prune_choice(listed(times, kept), grid=grid)
    for index, (before, after) in enumerate(zip(free, held, strict=True)):
        assert after["action"] == ("keep" if index in kept else before["action"])


@hypothesis.given(times=times, grid=grids)
@hypothesis.settings(deadline=None, max_examples=200)
def test_pruning_again_prunes_nothing(prune, times, grid):
    once = stays(prune, times, grid=grid)
    assert stays(prune, once, grid=grid) == once


@hypothesis.given(times=times.filter(bool), grid=grids)
@hypothesis.settings(deadline=None, max_examples=200)
def test_never_more_than_the_grid_has_room_for_and_nothing_beyond_it(prune, times, grid):
    intervals = prune.grid_parsed(grid)
    kept = stays(prune, times, grid=grid)
    reach = sum(length for length, _ in intervals)
    assert all(times[-1] - time < reach for time in kept)
    if all(keep for _, keep in intervals):
        assert len(kept) <= 1 + sum(keep for _, keep in intervals)


@hypothesis.given(
    gaps=strategies.lists(strategies.integers(1, 2 * DAY), min_size=1, max_size=60),
    grid=strategies.sampled_from(GRIDS[:2]),
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_pruning_after_each_snapshot_leaves_no_hole(prune, gaps, grid):
    """However seldom or often it is called, no stretch of the past is emptier than what was there to keep."""
    kept, now, every = [], 0, []
    for gap in gaps:
        now += gap
        every.append(now)
        kept = stays(prune, [*kept, now], grid=grid)
        assert kept[-1] == now
        assert set(kept) <= set(every)
    # Each dense interval of the present that had a snapshot in it and in the one before still has one near it.
    longest = max(length for length, _ in prune.grid_parsed(grid))
    reach = sum(length for length, _ in prune.grid_parsed(grid))
    for time in every:
        if now - time < reach - 2 * longest:
            assert any(abs(time - each) <= 2 * longest for each in kept)


def test_the_last_whole_one_is_not_pushed_out_by_a_half_one(prune):
    """A power cut between two pools leaves a newest one that is on one of them only."""
    snapshots = listed([0, 10, 20, 30])
    snapshots[3]["whole"] = snapshots[1]["whole"] = False
    chosen = prune.prune_choice(snapshots, count=1)
    assert [each["action"] for each in chosen] == ["destroy", "destroy", "keep", "keep"]
    assert chosen[2]["reasons"] == ["it is the newest, of those that are whole"]
    chosen = prune.prune_choice(snapshots, grid="1x1h")
    assert [each["action"] for each in chosen] == ["keep", "destroy", "keep", "keep"]


@hypothesis.given(times=times, halves=strategies.sets(strategies.integers(0, 80)), grid=grids)
@hypothesis.settings(deadline=None, max_examples=100)
def test_half_ones_change_nothing_for_the_whole_ones(prune, times, halves, grid):
    snapshots = [{**each, "whole": index not in halves} for index, each in enumerate(listed(times))]
    kept = {each["snapshot"] for each in prune.prune_choice(snapshots, grid=grid) if each["action"] == "keep"}
    whole = [each for each in snapshots if each["whole"]]
    assert kept >= {each["snapshot"] for each in prune.prune_choice(whole, grid=grid) if each["action"] == "keep"}


@pytest.mark.parametrize(
    ("free", "size", "wanted"), [("10%", 1000, 100), ("20G", 1, 20 * 2**30), ("1.5K", 1, 1536), (4096, 1, 4096)]
)
def test_free_space(prune, free, size, wanted):
    assert prune._wanted_free(free, size) == wanted


@pytest.mark.parametrize("free", ["100%", "much", "-1", "10 apples"])
def test_wrong_free_space(prune, free):
    with pytest.raises(SaltInvocationError, match="free is per cent"):
        prune._wanted_free(free, 100)


def test_space_is_freed_from_the_oldest(load):
    """A pool of 1000 bytes with 50 free, of which every snapshot holds 30: for 140 three must go, not the held one."""
    destroyed = []

    def command(argv):
        if argv[0] == "zpool":
            return "1000\t50\n"
        names = argv[-1].split("@")[1].split(",")
        if "-n" in argv:
            return f"destroy\tx\nreclaim\t{30 * len(names)}\n"
        destroyed.extend(names)
        return ""

    snapshots = [
        {**each, "own": True, "stack": "mail", "datasets": {"tank/a": {}}}
        for each in listed([1, 2, 3, 4, 5, 6], kept=[1])
    ]
    import contextlib

    salt = {
        "ksnap.command": command,
        "ksnap.kept_by": lambda each: each["kept"],
        "ksnap.list": lambda stack: [*snapshots, {**snapshots[0], "stack": "other"}, {**snapshots[0], "own": False}],
        "ksnap.stack": lambda stack: {"name": "mail", "datasets": ["tank/a"], "pools": {"tank": ["tank/a"]}},
        "ksnap.locked": lambda test=False: contextlib.nullcontext(),
    }
    module = load("_modules/ksnap_prune.py", __salt__=salt)
    chosen = module.prune("mail", free="14%", test=True)
    assert destroyed == []
    assert [each["action"] for each in chosen] == ["destroy", "keep", "destroy", "destroy", "keep", "keep"]
    assert "less than 14% is free" in chosen[0]["reasons"][0]
    module.prune("mail", free="14%")
    assert destroyed == ["s0", "s2", "s3"]
    chosen = module.prune("mail", free="90%", count=2)
    assert [each["action"] for each in chosen] == ["destroy", "keep", "destroy", "destroy", "keep", "keep"]
    assert "bytes too few" in chosen[-1]["reasons"][-1]
