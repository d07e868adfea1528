"""Rooms, as ejabberdctl and the database see them."""

import time

import pytest
from salt.exceptions import CommandExecutionError

from .conftest import ctl, sql

pytestmark = pytest.mark.usefixtures("server")

SERVICE = "conference.example.org"


@pytest.fixture
def room(server):
    ctl("destroy_room", "balcony", SERVICE, check=False)
    yield f"balcony@{SERVICE}"
    ctl("destroy_room", "balcony", SERVICE, check=False)


def options():
    lines = ctl("get_room_options", "balcony", SERVICE).stdout.splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def there():
    return bool(sql("SELECT name FROM muc_room WHERE name = 'balcony'"))


def test_room_present(states, room, monkeypatch):
    # As where Salt runs as a service.
    monkeypatch.setenv("LC_ALL", "C")
    wanted = {"title": "The bälcony", "public": False, "max_users": 50}
    people = {"juliet@example.org": "owner"}

    ret = states.ejabberd.room_present(room, options=wanted, affiliations=people, test=True)
    assert ret.result is None
    assert ret.changes["room"] == {"old": None, "new": "made"}
    assert ret.changes["options"]["title"] == {"old": None, "new": "The bälcony"}
    assert not there()

    ret = states.ejabberd.room_present(room, options=wanted, affiliations=people)
    assert ret.result is True, ret.comment
    assert ret.changes["affiliations"] == {"juliet@example.org": {"old": "none", "new": "owner"}}
    assert there()
    seen = options()
    assert (seen["title"], seen["public"], seen["max_users"], seen["persistent"]) == (
        "The bälcony",
        "false",
        "50",
        "true",
    )
    assert "juliet" in ctl("get_room_affiliations", "balcony", SERVICE).stdout

    for test in (False, True):
        ret = states.ejabberd.room_present(room, options=wanted, affiliations=people, test=test)
        assert (ret.result, ret.changes) == (True, {})


def test_what_differs_is_changed_and_the_rest_left(states, room):
    states.ejabberd.room_present(room, options={"title": "one", "description": "stays"})
    expected = {"options": {"title": {"old": "one", "new": "two"}}}

    ret = states.ejabberd.room_present(room, options={"title": "two"}, test=True)
    assert (ret.result, ret.changes) == (None, expected)
    assert options()["title"] == "one"

    ret = states.ejabberd.room_present(room, options={"title": "two"})
    assert (ret.result, ret.changes) == (True, expected)
    assert (options()["title"], options()["description"]) == ("two", "stays")


def test_affiliations_change(states, room):
    states.ejabberd.room_present(room, affiliations={"juliet@example.org": "owner", "nurse@example.org": "member"})
    ret = states.ejabberd.room_present(room, affiliations={"nurse@example.org": "none", "juliet@example.org": "owner"})
    assert ret.changes == {"affiliations": {"nurse@example.org": {"old": "member", "new": "none"}}}
    assert "nurse" not in ctl("get_room_affiliations", "balcony", SERVICE).stdout


def test_a_rooms_password_is_in_no_return(states, room):
    wanted = {"password": "hush hush", "password_protected": True}
    ret = states.ejabberd.room_present(room, options=wanted)
    assert ret.result is True
    assert "hush" not in str(ret)
    assert options()["password"] == "hush hush"
    assert not states.ejabberd.room_present(room, options=wanted).changes


def test_a_wrong_option_touches_nothing(states, room):
    ret = states.ejabberd.room_present(room, options={"public": "yes", "pubic": True})
    assert ret.result is False
    assert "pubic is no option" in ret.comment
    assert not there()


def test_a_service_that_is_not_there(states):
    ret = states.ejabberd.room_present("balcony@conference.example.com")
    assert ret.result is False
    assert "Unknown host" in ret.comment


def test_room_absent(states, room):
    assert not states.ejabberd.room_absent(room).changes
    states.ejabberd.room_present(room)

    ret = states.ejabberd.room_absent(room, test=True)
    assert (ret.result, ret.changes) == (None, {room: {"old": "there", "new": None}})
    assert there()

    ret = states.ejabberd.room_absent(room)
    assert (ret.result, ret.changes) == (True, {room: {"old": "there", "new": None}})
    assert not there()
    assert not states.ejabberd.room_absent(room).changes


def test_modules_for_rooms(modules, room):
    assert modules.ejabberd.room_options("balcony", SERVICE) == {}
    assert modules.ejabberd.create_room("balcony", SERVICE, options={"title": "x"}) is True
    with pytest.raises(CommandExecutionError, match="already exists"):
        modules.ejabberd.create_room("balcony", SERVICE)
    assert room in modules.ejabberd.rooms()
    assert room in modules.ejabberd.rooms(SERVICE)
    assert room not in modules.ejabberd.rooms("conference.example.net")
    assert modules.ejabberd.room_options("balcony", SERVICE)["title"] == "x"
    assert modules.ejabberd.destroy_room("balcony", SERVICE) is True
    assert room not in modules.ejabberd.rooms()
    with pytest.raises(CommandExecutionError, match="exist"):
        modules.ejabberd.destroy_room("balcony", SERVICE)


def test_a_room_that_sleeps_is_listed(modules, states, configured, room):
    ret = states.ejabberd.config(**configured(hibernation=1))
    assert ret.result is True, ret.comment
    states.ejabberd.room_present(room, options={"title": "asleep"})
    end = time.monotonic() + 60
    # Listed at any moment, and so within the second in which it goes to sleep.
    while room in modules.ejabberd.api("muc_online_rooms", service="global"):
        assert time.monotonic() < end, "the room does not go to sleep"
        assert room in modules.ejabberd.rooms()
    assert room in modules.ejabberd.rooms()
    assert modules.ejabberd.room_options("balcony", SERVICE)["title"] == "asleep"


def test_a_room_outlives_a_restart(modules, states, room):
    states.ejabberd.room_present(room, options={"title": "still there"})
    modules.service.restart("ejabberd")
    modules.ejabberd.started(60)
    assert room in modules.ejabberd.rooms()
    assert not states.ejabberd.room_present(room, options={"title": "still there"}).changes
