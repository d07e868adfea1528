"""Room options: what ejabberd would store unseen is refused."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def rooms(load):
    return load("_modules/ejabberd_rooms.py")


def test_options_are_written_as_ejabberd_writes_them(rooms):
    given = {"public": True, "moderated": False, "max_users": 50, "title": "The balcony", "allowpm": "none"}
    assert rooms.room_options_checked(given) == {
        "public": "true",
        "moderated": "false",
        "max_users": "50",
        "title": "The balcony",
        "allowpm": "none",
    }


def test_every_wrong_option_is_named_at_once(rooms):
    with pytest.raises(SaltInvocationError) as caught:
        rooms.room_options_checked({"pubic": True, "moderated": "yes", "max_users": "many", "password": ["secret"]})
    said = str(caught.value)
    assert "pubic is no option" in said
    assert "moderated is 'yes', must be true or false" in said
    assert "max_users is 'many', must be a number" in said
    assert "password must be text" in said
    assert "secret" not in said


def test_a_wrong_affiliation_is_told_before_anything_is_changed(rooms):
    with pytest.raises(SaltInvocationError, match="king"):
        rooms.change_room("balcony", "conference.example.org", {"title": "x"}, {"juliet@example.org": "king"})


@pytest.mark.parametrize("answer", [{"title": "x"}, [{"name": "title", "value": "x"}]])
def test_options_as_the_releases_answer(rooms, answer):
    rooms.__salt__["ejabberd.api"] = lambda command, **more: answer if command == "get_room_options" else []
    assert rooms.room_options("balcony", "conference.example.org") == {"title": "x"}


def test_only_the_known_fault_of_the_api_is_worked_around(rooms, monkeypatch):
    def fail(*arguments, **more):
        raise CommandExecutionError("ejabberd is gone")

    rooms.__salt__["ejabberd.api"] = fail
    monkeypatch.setattr(rooms.subprocess, "run", lambda *arguments, **more: pytest.fail("ejabberdctl was run"))
    with pytest.raises(CommandExecutionError, match="is gone"):
        rooms.room_options("balcony", "conference.example.org")
