"""Which datasets belong to a stack: by name, by path, with what lies below, and what is not on ZFS."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

MOUNTINFO = """\
22 1 0:20 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / {tmp}/srv rw,relatime - zfs tank/srv rw,xattr
31 30 0:31 / {tmp}/srv/pg rw,relatime - zfs fast/pg rw,xattr
32 30 0:32 / {tmp}/srv/a\\040b rw,relatime - ext4 /dev/vdb rw
33 30 0:33 / {tmp}/srv/proc rw,relatime - proc proc rw
34 30 0:34 / {tmp}/srv/.zfs/snapshot/x ro - zfs tank/srv@x ro
35 22 0:30 /sub {tmp}/bind rw - zfs tank/srv rw
"""
DATASETS = ["tank/srv", "tank/srv/log", "fast/pg", "fast/pg/wal", "fast/pg/old"]
ASIDE = {"fast/pg/old": ("fast/pg@x", "{}")}


@pytest.fixture
def module(load, zfs, tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(MOUNTINFO.format(tmp=tmp_path))
    for folder in ("srv/pg/base", "srv/a b", "bind", "other"):
        (tmp_path / folder).mkdir(parents=True)
    stacks = {"mail": {"datasets": ["tank/srv"]}, "empty": {}}
    salt = {"ksnap.command": zfs, "config.get": lambda key, default: {"ksnap:stacks": stacks}.get(key, default)}
    module = load("_modules/ksnap_stack.py", __salt__=salt)
    monkeypatch.setattr(module, "MOUNTS", str(tmp_path / "mountinfo"))
    salt["ksnap.mounts"] = module.mounts

    def listed(argv):
        named = [word for word in argv[argv.index("filesystem,volume") + 1 :] if word != "-r"]
        for name in named:
            if name not in DATASETS:
                raise CommandExecutionError(f"cannot open '{name}': dataset does not exist")
        below = "-r" in argv
        parents = tuple(f"{name}/" for name in named) if below else ()
        found = [each for each in DATASETS if each in named or each.startswith(parents)]
        marks, rows = "ksnap:aside" in argv[argv.index("-o") + 1], []
        for name in found:
            origin, mark = ASIDE.get(name, ("-", "-"))
            rows.append((name, mark, "-") if marks else (name, 100 + len(name), origin))
        return "".join("\t".join(map(str, row)) + "\n" for row in rows)

    zfs.answers["zfs list"] = listed
    return module


def test_by_name(module):
    found = module.stack("mail")
    assert found["name"] == "mail"
    assert found["datasets"] == ["tank/srv"]
    assert found["guids"] == {"tank/srv": 108}
    assert found["pools"] == {"tank": ["tank/srv"]}
    assert (found["paths"], found["outside"], found["timeout"]) == ({}, [], 60)


def test_by_dataset_with_children_on_two_pools(module):
    found = module.stack({"datasets": ["tank/srv", "fast/pg"], "children": True})
    assert found["name"] is None
    assert found["datasets"] == ["fast/pg", "fast/pg/wal", "tank/srv", "tank/srv/log"]
    assert found["pools"] == {"fast": ["fast/pg", "fast/pg/wal"], "tank": ["tank/srv", "tank/srv/log"]}


def test_by_path(module, tmp_path):
    found = module.stack({"paths": [f"{tmp_path}/srv/pg/base", f"{tmp_path}/bind"]})
    assert found["paths"] == {f"{tmp_path}/srv/pg/base": "fast/pg", f"{tmp_path}/bind": "tank/srv"}
    assert found["datasets"] == ["fast/pg", "tank/srv"]
    assert found["outside"] == []


def test_what_lies_below_a_path(module, tmp_path):
    found = module.stack({"paths": [f"{tmp_path}/srv"]})
    assert (found["datasets"], found["outside"]) == (["tank/srv"], [f"{tmp_path}/srv/a b"])
    found = module.stack({"paths": [f"{tmp_path}/srv"], "children": True})
    assert found["datasets"] == ["fast/pg", "fast/pg/wal", "tank/srv", "tank/srv/log"]


def test_a_path_outside_zfs(module, tmp_path):
    found = module.stack({"paths": [f"{tmp_path}/other"]})
    assert (found["datasets"], found["pools"], found["outside"]) == ([], {}, [f"{tmp_path}/other"])


def test_a_path_by_a_symbolic_link(module, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "srv/pg")
    assert module.stack({"paths": [f"{tmp_path}/link"]})["paths"] == {f"{tmp_path}/link": "fast/pg"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("nobody", "There is no stack nobody in ksnap:stacks; declared are: empty, mail"),
        ("empty", "The stack empty is wrong: it needs datasets or paths"),
        ({"datasets": "tank"}, "datasets must be a list, not 'tank'"),
        ({"datasets": ["tank"], "children": "yes"}, "children must be true or false, not 'yes'"),
        ({"datasets": ["tank"], "timeout": True}, "timeout must be a number of seconds, not True"),
        ({"datasets": ["tank"], "before": ["x", 1]}, "before must be a list of text; 1 is none"),
        ({"paths": ["srv"]}, "paths must be absolute; srv is not"),
        ({"path": ["/srv"]}, "path is no key of a stack"),
        ({"name": "a b", "datasets": ["tank"]}, "its name must be of letters"),
        (["tank"], "A stack is a name or a dict"),
        ({"datasets": ["tank@x"]}, "tank@x: a stack is of datasets"),
        ({"datasets": ["-r"]}, "-r: a stack is of datasets"),
    ],
)
def test_wrong_stacks(module, wrong, told):
    with pytest.raises(SaltInvocationError) as refused:
        module.stack(wrong)
    assert told in str(refused.value)


def test_every_mistake_at_once(module):
    with pytest.raises(SaltInvocationError) as refused:
        module.stack({"datasets": 1, "paths": ["x"], "colour": "red"})
    for part in ("datasets must be", "x is not", "colour is no key"):
        assert part in str(refused.value)


def test_what_is_not_there(module, tmp_path):
    with pytest.raises(CommandExecutionError, match="dataset does not exist"):
        module.stack({"datasets": ["tank/gone"]})
    with pytest.raises(CommandExecutionError, match="There is no /nonexistent/x"):
        module.stack({"paths": ["/nonexistent/x"]})
