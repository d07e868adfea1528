"""What the states say when something is wrong; what they do when all is well is seen with a real ejabberd."""

import pytest
from salt.exceptions import CommandExecutionError


def fail(*arguments, **more):
    raise CommandExecutionError("the reason")


@pytest.fixture
def states(load):
    functions = dict.fromkeys(
        "user_exists check_password register room_options room_exists config_render missing_users started".split(), fail
    )
    functions = {f"ejabberd.{name}": function for name, function in functions.items()}
    functions["ejabberd.status"] = lambda: {"running": True, "node": "ejabberd@a", "version": "24.12"}
    functions["ejabberd.room_options_checked"] = lambda options: options
    return load("_states/ejabberd.py", __salt__=functions)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("user_present", {"name": "juliet@example.org", "password": "hush"}),
        ("user_absent", {"name": "juliet@example.org"}),
        ("users_present", {"name": "all", "users": [{"jid": "juliet@example.org", "password": "hush"}]}),
        ("room_present", {"name": "balcony@conference.example.org"}),
        ("room_absent", {"name": "balcony@conference.example.org"}),
        ("config", {"name": "/etc/ejabberd/ejabberd.yml", "source": "salt://x"}),
    ],
)
def test_a_failure_is_the_comment_and_no_exception(states, function, arguments):
    ret = getattr(states, function)(**arguments)
    assert ret["result"] is False
    assert ret["comment"] == "the reason"
    assert ret["changes"] == {}
    assert "hush" not in str(ret)


@pytest.mark.parametrize("name", ["juliet", "@example.org", "juliet@", "a@b@c"])
@pytest.mark.parametrize("function", ["user_absent", "room_present", "room_absent"])
def test_a_name_that_is_no_address(states, function, name):
    ret = getattr(states, function)(name)
    assert ret["result"] is False
    assert "must be an address" in ret["comment"]


@pytest.mark.parametrize(
    ("function", "arguments", "says"),
    [
        ("user_present", {"name": "juliet@example.org"}, "Exactly one of"),
        ("user_present", {"name": "a@b", "password": "x", "password_file": "/y"}, "Exactly one of"),
        ("users_present", {"name": "x"}, "One of users and users_pillar"),
        ("users_present", {"name": "x", "users": [], "scram": "sha"}, "Unknown: scram"),
        ("config", {"name": "x", "source": "salt://x", "watch": 1}, "Unknown: watch"),
    ],
)
def test_wrong_arguments(states, function, arguments, says):
    ret = getattr(states, function)(**arguments)
    assert ret["result"] is False
    assert says in ret["comment"]


def test_a_password_that_does_not_work_after_it_was_set_is_a_failure(states):
    states.__salt__.update(
        {
            "ejabberd.user_exists": lambda *arguments: False,
            "ejabberd.register": lambda *arguments, **given: True,
            "ejabberd.check_password": lambda *arguments, **given: False,
        }
    )
    assert states.user_present("juliet@example.org", password="hush")["result"] is False


def test_accounts_that_are_missing_after_the_import_are_a_failure(states):
    states.__salt__.update(
        {
            "ejabberd.missing_users": lambda *arguments: (["juliet@example.org"], 1),
            "ejabberd.import_users": lambda *arguments, **options: [],
        }
    )
    ret = states.users_present("all", users=[{"jid": "juliet@example.org", "password": "hush"}])
    assert ret["result"] is False
    assert "juliet@example.org" in ret["comment"]
    assert "hush" not in str(ret)


def test_in_test_mode_before_ejabberd_is_there(states):
    states.__opts__["test"] = True
    states.__salt__["ejabberd.status"] = lambda: {"running": False, "reason": "refused"}
    for ret in (
        states.user_present("juliet@example.org", password="x"),
        states.user_absent("juliet@example.org"),
        states.users_present("all", users=[]),
        states.room_present("balcony@conference.example.org"),
        states.room_absent("balcony@conference.example.org"),
    ):
        assert ret["result"] is None
        assert "refused" in ret["comment"]


def test_another_node_than_wanted(states):
    ret = states.running(node="ejabberd@b")
    assert ret["result"] is False
    assert "ejabberd@a, not ejabberd@b" in ret["comment"]


def test_watch_is_for_running_only(states):
    assert states.mod_watch("x", sfun="config")["result"] is False
