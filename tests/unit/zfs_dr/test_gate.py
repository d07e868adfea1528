"""What the forced command lets through: exactly what a replication says, and nothing near it."""

import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.zfs_dr.conftest import load_file

GATE = load_file("_modules/zfs_dr_gate.py")
GRANTS = ["target:backup/web1", "source:tank/web"]
SET = "ksnap-20261125T222408.123456Z-0a1b2c3d"
ALLOWED = [
    "zfs receive -s -u -o readonly=on -o canmount=noauto -o zfs_dr:stack=web backup/web1/tank:web",
    "zfs receive -s -u backup/web1/tank:web",
    "zfs receive -A backup/web1/tank:web",
    "zfs set zfs_dr:properties={} zfs_dr:dataset_guid=1 backup/web1/tank:web",
    "zfs set readonly=on canmount=noauto zfs_dr:stack=web backup/web1/tank:web",
    f"zfs snapshot -o zfs_dr:members=3 backup/web1@{SET}",
    f"zfs hold -r zfs_dr:web backup/web1@{SET}",
    f"zfs hold zfs_dr:web backup/web1@{SET} backup/web1/tank:web@{SET} backup/web1/tank:mail@{SET}",
    "zfs rename -u backup/web1/tank:web backup/web1/tank:web.aside-20261125T222408Z",
    "zfs rename backup/web1/tank:volume backup/web1/tank:volume.aside-20261125T222408Z",
    f"zfs clone -o readonly=on backup/web1/tank:web@{SET} backup/web1/tank:web.new-20261125T222408Z",
    "zfs promote backup/web1/tank:web.new-20261125T222408Z",
    "lock backup/web1 web",
    f"zfs list -Hp -d 1 -t filesystem,volume,snapshot -o name,userrefs,zfs_dr:digest,written@{SET} backup/web1",
    f"zfs list -Hp -t filesystem,snapshot -o name,guid,used,zfs_dr:promotion backup/web1 backup/web1@{SET}",
    "zfs list -Hp -d 1 -t snapshot -o name,createtxg tank/web",
    "zfs list -Hp -o name,guid tank/web tank/web/db",
    "zfs list -Hp -d 1 -t filesystem,volume,snapshot,bookmark -o name,guid tank/web tank/web/db",
    f"zfs send -w tank/web@{SET}",
    f"zfs send -w -i tank/web/db#zfs_dr-vault-{SET} tank/web/db@{SET}",
    f"zfs hold zfs_dr:vault tank/web@{SET} tank/web/db@{SET}",
    f"zfs bookmark tank/web@{SET} tank/web#zfs_dr-vault-{SET}",
    f"zfs destroy tank/web#zfs_dr-vault-{SET}",
]
DENIED = [
    "",
    "sh",
    "zfs",
    "zfs destroy backup/web1/tank:web",
    f"zfs destroy -r backup/web1@{SET}",
    f"zfs destroy tank/web@{SET}",
    "zfs destroy tank/web#other",
    "zfs receive -F backup/web1/tank:web",
    "zfs receive -s -u -o mountpoint=/etc backup/web1/tank:web",
    "zfs receive -s -u -o readonly=off backup/web1/tank:web",
    "zfs receive -s -u backup/web1",
    "zfs receive -s -u backup/web2/tank:web",
    "zfs receive -s -u backup/web1/../web2",
    "zfs receive -s -u backup/web1x/a",
    "zfs set readonly=off backup/web1/tank:web",
    "zfs set mountpoint=/ backup/web1/tank:web",
    "zfs set zfs_dr:x=1 backup/web1",
    "zfs rename -u backup/web1/a backup/web2/a",
    "zfs rename -f backup/web1/a backup/web1/b",
    "zfs rename backup/web1/a backup/web2/a",
    f"zfs snapshot backup/web1/tank:web@{SET}",
    f"zfs send -w tank/mail@{SET}",
    f"zfs send -R -w tank/web@{SET}",
    f"zfs send -w backup/web1/tank:web@{SET}",
    "zfs hold keep tank/web@a",
    f"zfs hold zfs_dr:web backup/web1@{SET} backup/web2/tank:web@{SET}",
    f"zfs release zfs_dr:web backup/web1@{SET} backup/web1/tank:web@{SET}",
    "zfs release keep tank/web@a",
    "zfs list -Hp -d 1 -t filesystem,volume,snapshot,bookmark -o name tank",
    "zfs list -Hp -d 1 -t snapshot -o name,createtxg tank/mail",
    "zfs list -Hp -o name,guid tank/web tank/mail",
    f"zfs list -Hp -t filesystem,snapshot -o name backup/web1 backup/web2@{SET}",
    "lock backup/web2 web",
    "lock backup/web1 ../../etc",
]


@pytest.mark.parametrize("command", ALLOWED)
def test_what_a_replication_says_is_let_through(command):
    assert GATE.permitted(GRANTS, command.split(" "))
    # To a key that may do nothing of it, it is not.
    assert not GATE.permitted(["target:backup/other", "source:tank/other"], command.split(" "))
    assert not GATE.permitted([], command.split(" "))


def test_a_resume_token_is_let_through_to_who_may_send_at_all():
    argv = ["zfs", "send", "-t", "1-c740b4779-d0-789c636064000310a500"]
    assert GATE.permitted(GRANTS, argv)
    assert not GATE.permitted(["target:backup/web1"], argv)
    assert not GATE.permitted(GRANTS, [*argv[:3], "--help"])


def test_a_token_that_tells_of_two_snapshots_is_not_believed():
    said = "resume token contents:\nnvlist version: 0\n\tobject = 0x2\n\ttoguid = 0x1f\n\ttoname = tank/web@a\n"
    assert GATE._told(said) == ("31", "tank/web@a")
    # A name may be of lines: those would tell of a snapshot that the key may send.
    for line in ("toguid = 0x2a", "\ttoguid = 0x2a", "toname = tank/web@b"):
        assert GATE._told(f"{said}{line}\n") == (None, "")
    assert GATE._told("cannot resume send: resume token is corrupt") == (None, "")
    assert GATE._told(said.replace("0x1f", "x")) == (None, "")


def test_a_stack_of_several_granted_datasets_is_asked_for_at_once():
    grants = ["source:tank/web", "source:tank/mail", "target:backup/a", "target:backup/b"]
    listing = "zfs list -Hp -o name,guid"
    assert GATE.permitted(grants, f"{listing} tank/mail tank/web tank/web/db".split(" "))
    assert not GATE.permitted(grants, f"{listing} tank/mail tank/web tank/other".split(" "))
    assert not GATE.permitted(grants, f"{listing} tank/web backup/a".split(" "))
    # From one base to another there is no way.
    assert GATE.permitted(grants, "zfs rename -u backup/b/x backup/b/y".split(" "))
    assert not GATE.permitted(grants, "zfs rename -u backup/a/x backup/b/x".split(" "))


@pytest.mark.parametrize("command", DENIED)
def test_what_is_near_it_is_not(command):
    assert not GATE.permitted(GRANTS, command.split(" "))


words = st.text(string.printable, min_size=1, max_size=12)


@given(st.sampled_from(ALLOWED), st.data())
@settings(deadline=None)
def test_a_word_more_or_another_word_is_never_a_way_out(command, data):
    argv = command.split(" ")
    at = data.draw(st.integers(0, len(argv)))
    word = data.draw(st.one_of(words, st.sampled_from(["-r", "-F", "-R", "tank", "backup", "tank/mail", ";", "$(id)"])))
    changed = [*argv[:at], word, *argv[at + data.draw(st.integers(0, 1)) :]]
    if GATE.permitted(GRANTS, changed):
        # What may vary is names within what the key has, and values of zfs_dr's own properties.
        assert changed[0] in ("zfs", "lock")
        # A stack, for whose sake the lock is, may have any name, and so may a column that is listed.
        bound = changed[1:2] if changed[0] == "lock" else changed[1:]
        if "list" in bound:
            at = bound.index("-o") + 1
            bound = bound[:at] + bound[at + 1 :]
        for given_ in bound:
            if given_.startswith(("tank", "backup")):
                assert given_.startswith(("tank/web", "backup/web1"))
                assert given_.removeprefix("tank/web").removeprefix("backup/web1")[:1] in ("", "/", "@", "#")
        assert not {"-F", "-R", "tank", "backup", "tank/mail"} & set(bound)


@given(st.lists(st.lists(words, min_size=1), min_size=1))
@example([["zfs", "set", 'zfs_dr:properties={"a": "b c"}', "backup/web1/tank:web"]])
@settings(deadline=None)
def test_words_arrive_as_they_were_sent(commands):
    side = load_file("_modules/zfs_dr_side.py")
    sent = side.words({"ssh": ["ssh", "host"]}, commands, through="zstd", stack="web")
    assert sent[:2] == ["ssh", "host"]
    assert GATE._asked(sent[2]) == ({"through": "zstd", "for": "web"}, commands)
