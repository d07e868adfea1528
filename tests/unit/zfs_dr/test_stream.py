"""Streams between plain programs: what is counted, held back, and told when a part of the chain fails."""

import os
import time

import pytest
from salt.exceptions import CommandExecutionError

MIB = 1 << 20


@pytest.fixture
def stream(load):
    made = load("_modules/zfs_dr_stream.py")
    made.__salt__.update({"zfs_dr.advice": lambda said: "", "zfs_dr.words": lambda side, argv, **_: list(argv)})
    return made


def job(name, send, path, receive=None, size=0):
    receive = receive or ["dd", f"of={path}", "status=none"]
    return {"name": name, "send": [send], "receive": [receive], "bytes": size}


def test_every_byte_arrives_and_is_counted(stream, tmp_path):
    for number in range(5):
        (tmp_path / f"in{number}").write_bytes(os.urandom(number * MIB + number))
    jobs = [job(str(n), ["cat", str(tmp_path / f"in{n}")], tmp_path / f"out{n}", size=n * MIB) for n in range(5)]
    told = []
    results = stream.streams(jobs, parallel=2, progress=told.append)
    for number in range(5):
        assert results[str(number)] == {
            "bytes": number * MIB + number,
            "seconds": results[str(number)]["seconds"],
            "error": None,
        }
        assert (tmp_path / f"out{number}").read_bytes() == (tmp_path / f"in{number}").read_bytes()
    assert (told[-1]["done"], told[-1]["streams"], told[-1]["bytes"]) == (5, 5, 10 * MIB + 10)
    stream.check_streams(results)


def test_the_limit_is_for_all_together(stream, tmp_path):
    jobs = [job(str(n), ["head", "-c", str(MIB), "/dev/zero"], tmp_path / str(n)) for n in range(4)]
    begun = time.monotonic()
    results = stream.streams(jobs, bandwidth=4 * MIB)
    # It is never faster; how much slower is the machine's matter.
    assert time.monotonic() - begun > 0.8
    assert sum(each["bytes"] for each in results.values()) == 4 * MIB


@pytest.mark.parametrize(
    "send, receive, words",
    [
        (["sh", "-c", "head -c 100000 /dev/zero; echo torn >&2; exit 3"], None, "torn"),
        (
            ["head", "-c", "9000000", "/dev/zero"],
            ["sh", "-c", "head -c 1000 >/dev/null; echo full >&2; exit 1"],
            "full",
        ),
        (["head", "-c", "9000000", "/dev/zero"], ["sh", "-c", "exit 7"], "7"),
        (["/nonexistent"], None, "No such file"),
    ],
)
def test_a_failure_is_told_by_what_failed_and_the_rest_does_not_begin(stream, tmp_path, send, receive, words):
    jobs = [job("first", send, tmp_path / "first", receive), job("second", ["true"], tmp_path / "second")]
    results = stream.streams(jobs, parallel=1)
    assert words in results["first"]["error"]
    with pytest.raises(CommandExecutionError, match=r"first: (?s:.*)1 further transfers had not begun"):
        stream.check_streams(results)


def test_no_process_is_left(stream, tmp_path):
    stream.streams([job("a", ["yes"], tmp_path / "a", ["head", "-c", "10"])])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("how", ["zstd", "lz4", "gzip", "none"])
def test_compression_has_its_program_on_this_side_only(stream, how):
    send = stream.compressed(None, ["zfs", "send", "a@b"], how, True)
    receive = stream.compressed(None, ["zfs", "receive", "a"], how, False)
    assert send[0] == ["zfs", "send", "a@b"] and receive[-1] == ["zfs", "receive", "a"]
    assert len(send) == len(receive) == (1 if how == "none" else 2)
    assert how == "none" or "-d" in receive[0]
    assert len(stream.compressed({"ssh": []}, ["zfs", "receive", "a"], how, False)) == 1
