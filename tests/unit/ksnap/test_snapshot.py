"""Names of snapshots."""

import datetime

import hypothesis
import pytest
from hypothesis import strategies
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def snapshot(load):
    return load("_modules/ksnap_snapshot.py")


labels = strategies.from_regex(r"[A-Za-z0-9_.:-]{1,64}", fullmatch=True)


@hypothesis.given(label=strategies.none() | labels)
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_name_is_taken_apart_again(snapshot, label):
    before = datetime.datetime.now(datetime.UTC).timestamp()
    name = snapshot.new_name(label)
    found = snapshot.parse_name(name)
    assert found["label"] == label
    assert before - 0.001 <= found["time"] <= datetime.datetime.now(datetime.UTC).timestamp()
    assert len(name) <= 44 + 65


@hypothesis.given(name=strategies.text(max_size=60) | strategies.from_regex(snapshot_like := r"ksnap-\d{8}T.{1,40}"))
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_other_names_are_not_ours(snapshot, name):
    found = snapshot.parse_name(name)
    if found:
        when = datetime.datetime.fromtimestamp(found["time"], datetime.UTC)
        rebuilt = f"ksnap-{when:%Y%m%dT%H%M%S.%fZ}-{found['random']}"
        assert name in (rebuilt, f"{rebuilt}-{found['label']}")


def test_names_sort_by_time_and_do_not_collide(snapshot):
    names = [snapshot.new_name() for _ in range(3000)]
    assert len(set(names)) == 3000
    times = [snapshot.parse_name(name)["time"] for name in names]
    assert times == sorted(times)
    assert [name[:28] for name in names] == sorted(name[:28] for name in names)


@pytest.mark.parametrize("label", ["", "a b", "a@b", "a/b", "a#b", "x" * 65, "é", 7])
def test_wrong_labels(snapshot, label):
    with pytest.raises(SaltInvocationError, match="A label is of letters"):
        snapshot.new_name(label)


@pytest.mark.parametrize("tag", ["", "-r", "a\nb", "x" * 129, None, "a/b"])
def test_wrong_tags(snapshot, tag):
    with pytest.raises(SaltInvocationError, match="A tag to hold with"):
        snapshot._refuse_tag(tag)


def test_a_hook_that_hangs_is_killed_with_what_it_started(snapshot, tmp_path):
    mark = tmp_path / "alive"
    script = f"(sleep 3; touch {mark}) & sleep 60"
    with pytest.raises(CommandExecutionError, match=r"has not ended within 0\.2 s and was killed"):
        snapshot._hook("before", ["sh", "-c", script], 0.2)
    import time

    time.sleep(3.5)
    assert not mark.exists()


def test_a_hook_that_fails_tells_what_it_said(snapshot):
    with pytest.raises(CommandExecutionError, match=r"failed \(3\): no\n"):
        snapshot._hook("before", ["sh", "-c", "echo no >&2; exit 3"], 10)
    with pytest.raises(CommandExecutionError, match="cannot be run: No such file"):
        snapshot._hook("after", ["/nonexistent/hook"], 10)
    snapshot._hook("after", ["true"], 10)
