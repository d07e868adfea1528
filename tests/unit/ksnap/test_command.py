"""Running zfs and zpool: only these, without a shell, and with what to do when they fail."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def command(load, tmp_path, monkeypatch):
    """The function, and a program ``zfs`` that prints its words and what it reads, or fails as it is told."""
    program = tmp_path / "zfs"
    program.write_text('#!/bin/sh\nif [ "$1" = fail ]; then shift; echo "$@" >&2; exit 1; fi\nprintf "%s|" "$@"; cat\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return load("_modules/ksnap_command.py").command


def test_words_are_words_and_stdin_is_stdin(command):
    assert command(["zfs", "get", "a b; $(c)"], stdin="key\n") == "get|a b; $(c)|key\n"
    assert command(["zfs", "list"]) == "list|"


@pytest.mark.parametrize("argv", [[], ["rm", "-r"], "zfs list", ["/sbin/zfs"], None])
def test_nothing_else_is_run(command, argv):
    with pytest.raises(SaltInvocationError, match="begins with zfs or zpool"):
        command(argv)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("cannot unmount '/srv': pool or dataset is busy", "fuser -vm"),
        ("cannot open 'tank/x': dataset does not exist", "zfs list -t all"),
        ("cannot create 'tank/x': out of space", "ksnap.prune"),
        ("The ZFS modules are not loaded.", "modprobe zfs"),
    ],
)
def test_a_failure_tells_what_it_said_and_what_to_do(command, said, advice):
    with pytest.raises(CommandExecutionError) as failed:
        command(["zfs", "fail", said])
    assert said in str(failed.value) and advice in str(failed.value)


def test_a_failure_without_a_word(command):
    with pytest.raises(CommandExecutionError, match=r"zfs fail failed: exit code 1$"):
        command(["zfs", "fail"])


def test_a_long_command_is_not_told_whole(command):
    with pytest.raises(CommandExecutionError) as failed:
        command(["zfs", "fail", "dataset is busy", "x" * 10000])
    assert len(str(failed.value).split(" failed: ")[0]) < 500


def test_openzfs_is_not_installed(load, monkeypatch):
    module = load("_modules/ksnap_command.py")
    monkeypatch.setattr(module, "PLACES", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CommandExecutionError, match=r"there is no zpool\. Install zfsutils-linux"):
        module.command(["zpool", "list"])
