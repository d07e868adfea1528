"""Rollback in a model of OpenZFS: the power is cut after every single step, and while what was left is finished."""

import contextlib
import copy
import itertools
import pathlib
import types

import hypothesis
import pytest
from hypothesis import strategies
from salt.exceptions import CommandExecutionError

from tests.unit.ksnap.model import PowerCut, Zfs

ROOT = pathlib.Path(__file__).resolve().parents[3] / "_modules"
FILES = [f"ksnap_{name}" for name in ("command", "lock", "journal", "rollback", "list", "stack", "snapshot")]
CODE = {file: compile((ROOT / f"{file}.py").read_text(), file, "exec") for file in FILES}

# Here, rollbacks take milliseconds: so many are made in one second that their random parts would be the same at times.
TOKENS = (f"{number % 65536:04x}" for number in itertools.count())


class Machine:
    """The files of the module, loaded afresh as after each start, over one pool that stays."""

    def __init__(self, zfs, folder):
        self.zfs, self.folder, self.halted, self.tokens = zfs, folder, [], TOKENS
        self.start()

    def start(self):
        salt = {
            "ksnap.command": self.zfs,
            "config.get": lambda key, default: default,
            "ksnap.running": list,
            "service.stop": lambda name: self.halted.append(name) or True,
            "service.start": lambda name: self.halted.remove(name) is None if name in self.halted else True,
        }
        for file, code in CODE.items():
            module = types.ModuleType(file)
            exec(code, vars(module))
            vars(module).update({"__salt__": salt, "__context__": {}, "__opts__": {"test": False}})
            for name, function in list(vars(module).items()):
                if callable(function) and not name.startswith("_"):
                    salt.setdefault(f"ksnap.{name.rstrip('_')}", function)
            if file == "ksnap_rollback":
                module.secrets = types.SimpleNamespace(token_hex=lambda size: next(self.tokens))
            if file == "ksnap_lock":
                module.LOCK = str(self.folder / "lock")
            if file == "ksnap_journal":
                module.PATIENCE = 0
                module.GUARD = str(self.folder / "{}.service.d/ksnap-recover.conf")
                module._run = self.run
        salt["ksnap.mounts"] = self.zfs.mounts
        salt["ksnap.boot_unit"] = lambda: None
        salt["ksnap.users"] = lambda path: []
        self.salt = salt

    def run(self, *words):
        assert words[0] == "umount"
        self.zfs.umount(words[1])

    def call(self, name, *arguments, **options):
        return self.salt[f"ksnap.{name}"](*arguments, **options)

    def power_cut(self):
        self.halted = []
        self.zfs.cut_after = None
        self.zfs.boot()
        self.start()


def rich():
    """A stack with children, one of which is not of it and has one that is, a volume, and a clone of the past."""
    zfs = Zfs()
    zfs.create("tank/mail", "then", mountpoint="/srv/mail", quota="100")
    zfs.create("tank/mail/queue", "then", reservation="64")
    zfs.create("tank/mail/other", "other", canmount="noauto")
    zfs.create("tank/mail/other/deep", "then")
    zfs.create("tank/mail/other/deep/er", "other")
    zfs.create("tank/mail/vol", "then", "volume", refreservation="8")
    zfs.create("tank/db", "then")
    members = ["tank/mail", "tank/mail/queue", "tank/mail/other/deep", "tank/mail/vol", "tank/db"]
    zfs.snapshot("old", *members)
    zfs.snapshot("then", *members)
    zfs.datasets["tank/clone"] = copy.copy(zfs.datasets["tank/db"])
    zfs.datasets["tank/clone"].__dict__.update(
        guid=77, origin=zfs.datasets["tank/db"].snapshots[0].guid, snapshots=[], local={"canmount": "noauto"}
    )
    for name in members:
        zfs.datasets[name].content = "now"
    zfs.snapshot("new", *members)
    zfs.boot()
    return zfs, members


def settings(dataset):
    # canmount cannot be inherited: once set, "on" is no longer the default, but the same.
    return {key: value for key, value in dataset.local.items()
            if not key.startswith("ksnap:") and (key, value) != ("canmount", "on")}  # fmt: skip


def view(zfs):
    """What an operator would call the state of the machine, by name."""
    return {
        name: (has.content, has.kind, settings(has),
               [(each.guid, each.name) for each in has.snapshots], zfs.value(name, "origin"))
        for name, has in zfs.datasets.items()
    }  # fmt: skip


def shown(zfs, members):
    return {zfs.datasets[name].content for name in members}


def check(zfs, members, snapshots, mounted):
    """What holds whenever nothing is under way, on whichever side."""
    assert len(shown(zfs, members)) == 1
    assert sorted(each.guid for has in zfs.datasets.values() for each in has.snapshots) == snapshots
    assert not [key for has in zfs.datasets.values() for key in has.local if key.startswith("ksnap:journal")]
    assert sorted((mount["source"], mount["path"]) for mount in zfs.mounts()) == mounted
    assert {zfs.datasets[name].content for name in ("tank/mail/other", "tank/mail/other/deep/er")} == {"other"}
    assert zfs.value("tank/mail", "quota") == "100" and zfs.value("tank/mail/queue", "reservation") == "64"
    contents = sorted(has.content for name, has in zfs.datasets.items() if name.split(".aside")[0] in members)
    assert contents.count("now") == len(members), "the present state is somewhere, whole"


def facts(zfs):
    snapshots = sorted(each.guid for has in zfs.datasets.values() for each in has.snapshots)
    return snapshots, sorted((mount["source"], mount["path"]) for mount in zfs.mounts())


def test_there_and_back_is_as_before(tmp_path):
    zfs, members = rich()
    machine, before, known = Machine(zfs, tmp_path), view(zfs), facts(zfs)
    stack = {"datasets": members, "services": ["a", "b"]}
    first = machine.call("rollback", stack, "then")
    assert shown(zfs, members) == {"then"} and machine.halted == []
    check(zfs, members, *known)
    (aside,) = machine.call("aside")
    assert aside["datasets"]["tank/mail/other/deep"] == f"tank/mail/other/deep.aside-{first['aside']}"
    second = machine.call("restore_aside", first["aside"])
    assert shown(zfs, members) == {"now"}
    check(zfs, members, *known)
    machine.call("discard_aside", second["aside"])
    assert view(zfs) == before
    assert not [key for has in zfs.datasets.values() for key in has.local if key.startswith("ksnap:")]


def test_what_is_restored_and_what_it_takes_the_place_of_have_two_names(tmp_path):
    zfs, members = rich()
    machine = Machine(zfs, tmp_path)
    machine.tokens = iter(["aaaa", "aaaa", "bbbb"])
    first = machine.call("rollback", {"datasets": members}, "then")
    assert machine.call("restore_aside", first["aside"])["aside"] != first["aside"]
    assert shown(zfs, members) == {"now"}


def count(kind):
    """The number of steps of a whole run."""

    def commands(folder):
        zfs, members = rich()
        machine = Machine(zfs, folder)
        aside = machine.call("rollback", {"datasets": members}, "then")["aside"]
        if kind == "rollback":
            return zfs.steps
        start = zfs.steps
        machine.call("restore_aside", aside)
        return zfs.steps - start

    return commands


def about_to(kind, folder):
    """What a test of each moment begins with: the rich stack, and what ``kind`` is to be called with."""
    zfs, members = rich()
    machine, known = Machine(zfs, folder), facts(zfs)
    arguments = ({"datasets": members}, "then")
    if kind == "restore_aside":
        arguments = (machine.call("rollback", *arguments)["aside"],)
    return zfs, members, machine, known, arguments


@pytest.mark.parametrize("kind", ["rollback", "restore_aside"])
def test_a_power_cut_after_any_command(kind, tmp_path):
    outcomes = set()
    for number in range(count(kind)(tmp_path)):
        zfs, members, machine, known, arguments = about_to(kind, tmp_path)
        zfs.cut_after = number
        with pytest.raises(PowerCut):
            machine.call(kind, *arguments)
        machine.power_cut()
        left = machine.call("unfinished")
        # Half a stack is never mounted, on any side.
        mounted = [mount["source"] for mount in zfs.mounts()]
        assert len({zfs.datasets[name].content for name in mounted if name in members}) <= 1
        assert not [name for name in mounted if ".aside" in name]
        recovered = machine.call("recover")
        # What had moved nothing is undone.
        outcome = "finished" if left and left[0]["stage"] else "undone"
        assert [each["outcome"] for each in recovered] == [outcome] * len(left)
        check(zfs, members, *known)
        outcomes |= {(outcome if left else "", *shown(zfs, members))}
    there, back = ("then", "now") if kind == "rollback" else ("now", "then")
    assert outcomes == {("", back), ("undone", back), ("finished", there), ("", there)}


@pytest.mark.parametrize("kind", ["rollback", "restore_aside"])
def test_an_interruption_at_any_command_leaves_nothing_to_be_finished(kind, tmp_path):
    for number in range(count(kind)(tmp_path)):
        zfs, members, machine, known, arguments = about_to(kind, tmp_path)
        turns = itertools.count()

        def interrupted(argv, turns=turns, number=number):
            if next(turns) == number:
                raise KeyboardInterrupt
            return False

        zfs.fail_on = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            machine.call(kind, *arguments)
        zfs.fail_on = None
        left = machine.call("unfinished")
        assert not left, (number, left)
        machine.call("recover")
        check(zfs, members, *known)


@pytest.mark.parametrize("second", [0, 1, 2, 3, 5, 8, 13, 21, 34])
def test_a_power_cut_while_the_first_is_being_recovered(second, tmp_path):
    for number in range(0, count("rollback")(tmp_path), 2):
        zfs, members = rich()
        machine, known = Machine(zfs, tmp_path), facts(zfs)
        zfs.cut_after = number
        with pytest.raises(PowerCut):
            machine.call("rollback", {"datasets": members}, "then")
        machine.power_cut()
        zfs.cut_after = second
        with contextlib.suppress(PowerCut):
            machine.call("recover")
        machine.power_cut()
        machine.call("recover")
        check(zfs, members, *known)


MOVING = ("rename", "clone", "promote", "set", "mount", "inherit")


@pytest.mark.parametrize("kind", ["rollback", "restore_aside"])
@pytest.mark.parametrize("cut", [None, 0, 4, 9, 20])
def test_any_command_that_fails_undoes_all(kind, cut, tmp_path):
    """Each in turn; and the power cut while it is being undone."""
    undone = 0
    for number in range(count(kind)(tmp_path)):
        zfs, members, machine, known, arguments = about_to(kind, tmp_path)
        before, start, failed = view(zfs), len(zfs.commands), []

        def fail(argv, start=start, number=number, failed=failed, zfs=zfs):
            if failed or len(zfs.commands) - start <= number or argv[1] not in MOVING:
                return False
            if "ksnap:journal" in " ".join(argv):
                return False
            failed.append(argv)
            zfs.cut_after = cut
            return True

        zfs.fail_on = fail
        try:
            machine.call(kind, *arguments)
            assert not failed
            continue
        except CommandExecutionError as error:
            assert "all is as it was" in str(error)
        except PowerCut:
            machine.power_cut()
            machine.call("recover")
        zfs.cut_after = None
        check(zfs, members, *known)
        # What fails after the first journal is written is undone, unless the power cut let it be tried anew.
        if cut is None:
            assert view(zfs) == before, failed
        undone += 1
    assert undone > 20


names = strategies.lists(strategies.sampled_from("abc"), min_size=1, max_size=3).map(
    lambda parts: "tank/" + "/".join(parts)
)


@hypothesis.given(data=strategies.data())
@hypothesis.settings(
    deadline=None, max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_tree_any_moment(tmp_path, data):
    """Trees of any shape, any part of them the stack, several rollbacks and restorations, each cut anywhere or not."""
    chosen = data.draw(strategies.sets(names, min_size=1, max_size=6))
    zfs = Zfs()
    everything = sorted({"/".join(name.split("/")[:end]) for name in chosen for end in range(2, name.count("/") + 2)})
    for name in everything:
        zfs.create(name, "0", data.draw(strategies.sampled_from(["filesystem"])),
                   canmount=data.draw(strategies.sampled_from(["on", "noauto", "off"])))  # fmt: skip
    members = sorted(data.draw(strategies.sets(strategies.sampled_from(everything), min_size=1)))
    stack = {"datasets": members}
    for number in range(1, 4):
        zfs.snapshot(f"s{number - 1}", *members)
        for name in members:
            zfs.datasets[name].content = str(number)
    zfs.boot()
    machine, (snapshots, mounted) = Machine(zfs, tmp_path), facts(zfs)
    others = {name: has for name, has in zfs.datasets.items() if name not in members}
    for _ in range(data.draw(strategies.integers(1, 4))):
        asides = [each["id"] for each in machine.call("aside")]
        own = {each.name for each in zfs.datasets[members[0]].snapshots}
        action = data.draw(strategies.sampled_from([*(("rollback", name) for name in sorted(own)),
                                                    *(("restore_aside", name) for name in asides)]))  # fmt: skip
        zfs.cut_after = data.draw(strategies.none() | strategies.integers(0, 120))
        try:
            machine.call(action[0], *((stack, action[1]) if action[0] == "rollback" else (action[1],)))
        except PowerCut:
            machine.power_cut()
            machine.call("recover")
        zfs.cut_after = None
        assert len(shown(zfs, members)) == 1
        assert facts(zfs) == (snapshots, mounted)
        assert all(zfs.datasets[name] is has for name, has in others.items())
        assert all(each["whole"] for each in machine.call("aside"))
        # The live datasets own their whole history.
        assert {zfs.value(name, "origin") for name in members} == {"-"}
        held = {has.content for name, has in zfs.datasets.items() if name.split(".aside")[0] in members}
        assert "3" in held
