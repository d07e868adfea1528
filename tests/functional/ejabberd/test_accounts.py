"""Accounts, by state and module, twice and in test mode, as the database and ejabberd's own check see them."""

import base64
import hashlib
import hmac

import pytest
from salt.exceptions import CommandExecutionError

from .conftest import ctl, sql

pytestmark = pytest.mark.usefixtures("server")


def accepts(jid, password):
    """Whether ejabberd takes this password, asked by ejabberdctl."""
    user, host = jid.split("@")
    return ctl("check_password", user, host, password, check=False).returncode == 0


def stored(jid):
    user, host = jid.split("@")
    return sql(f"SELECT * FROM users WHERE username = '{user}' AND server_host = '{host}'")


def test_user_present(states, no_account):
    jid = no_account("juliet")
    ret = states.ejabberd.user_present(jid, password="o romeo", test=True)
    assert ret.result is None
    assert ret.changes == {jid: {"old": None, "new": "made"}}
    assert not stored(jid)

    ret = states.ejabberd.user_present(jid, password="o romeo")
    assert ret.result is True, ret.comment
    assert ret.changes == {jid: {"old": None, "new": "made"}}
    assert "romeo" not in str(ret)
    assert accepts(jid, "o romeo")
    before = stored(jid)

    for test in (False, True):
        ret = states.ejabberd.user_present(jid, password="o romeo", test=test)
        assert ret.result is True
        assert not ret.changes
    assert stored(jid) == before


def test_a_password_that_a_user_has_changed_stays(states, no_account):
    jid = no_account("juliet")
    states.ejabberd.user_present(jid, password="the first")
    ctl("change_password", "juliet", "example.org", "the user's own")
    ret = states.ejabberd.user_present(jid, password="the first")
    assert ret.result is True
    assert not ret.changes
    assert accepts(jid, "the user's own")


def test_a_password_that_is_enforced(states, no_account):
    jid = no_account("admin")
    states.ejabberd.user_present(jid, password="the first")
    ctl("change_password", "admin", "example.org", "another")
    expected = {jid: {"old": "another password", "new": "this password"}}

    ret = states.ejabberd.user_present(jid, password="the first", enforce_password=True, test=True)
    assert (ret.result, ret.changes) == (None, expected)
    assert accepts(jid, "another")

    ret = states.ejabberd.user_present(jid, password="the first", enforce_password=True)
    assert (ret.result, ret.changes) == (True, expected)
    assert accepts(jid, "the first")
    assert not accepts(jid, "another")

    ret = states.ejabberd.user_present(jid, password="the first", enforce_password=True)
    assert (ret.result, ret.changes) == (True, {})


def test_passwords_from_a_file_and_from_the_pillar(states, no_account, tmp_path):
    path = tmp_path / "password"
    path.write_text("in a file: ä€\n")
    path.chmod(0o600)
    first, second = no_account("romeo"), no_account("nurse")
    assert states.ejabberd.user_present(first, password_file=str(path)).result is True
    assert accepts(first, "in a file: ä€")
    ret = states.ejabberd.user_present(second, password_pillar="accounts:nurse@example.org:password")
    assert ret.result is True, ret.comment
    assert accepts(second, "from the pillar")
    assert "from the pillar" not in str(ret)


def test_the_same_name_on_two_hosts_is_two_accounts(states, no_account):
    first, second = no_account("juliet"), no_account("juliet", "example.net")
    states.ejabberd.user_present(first, password="the first")
    states.ejabberd.user_present(second, password="the second")
    assert accepts(first, "the first")
    assert accepts(second, "the second")
    assert not accepts(second, "the first")


def test_user_absent(states, no_account):
    jid = no_account("tybalt")
    ret = states.ejabberd.user_absent(jid)
    assert (ret.result, ret.changes) == (True, {})
    ctl("register", "tybalt", "example.org", "x")

    ret = states.ejabberd.user_absent(jid, test=True)
    assert (ret.result, ret.changes) == (None, {jid: {"old": "there", "new": None}})
    assert stored(jid)

    ret = states.ejabberd.user_absent(jid)
    assert (ret.result, ret.changes) == (True, {jid: {"old": "there", "new": None}})
    assert not stored(jid)
    assert not states.ejabberd.user_absent(jid).changes


def test_states_for_a_host_that_is_not_served(states):
    for ret in (
        states.ejabberd.user_present("juliet@example.com", password="x"),
        states.ejabberd.user_absent("juliet@example.com"),
        states.ejabberd.users_present("all", users=[{"jid": "juliet@example.com", "password": "x"}]),
    ):
        assert ret.result is False
        assert "example.com is no virtual host" in ret.comment


def test_modules_for_accounts(modules, no_account):
    no_account("juliet")
    assert modules.ejabberd.user_exists("juliet", "example.org") is False
    assert modules.ejabberd.register("Juliet", "example.org", password="o romeo") is True
    assert modules.ejabberd.user_exists("juliet", "example.org") is True
    assert "juliet@example.org" in modules.ejabberd.users("example.org")
    assert "juliet@example.org" not in modules.ejabberd.users("example.net")
    with pytest.raises(CommandExecutionError, match="already registered"):
        modules.ejabberd.register("juliet", "example.org", password="o romeo")
    assert modules.ejabberd.check_password("juliet", "example.org", password="o romeo") is True
    assert modules.ejabberd.check_password("juliet", "example.org", password="o paris") is False
    assert modules.ejabberd.change_password("juliet", "example.org", password="o paris") is True
    assert accepts("juliet@example.org", "o paris")
    assert modules.ejabberd.unregister("juliet", "example.org") is True
    assert modules.ejabberd.unregister("juliet", "example.org") is True
    with pytest.raises(CommandExecutionError, match="unknown_user"):
        modules.ejabberd.change_password("juliet", "example.org", password="x")


@pytest.fixture
def many(no_account):
    """60 accounts on two hosts."""
    return [
        {"jid": no_account(f"many{number}", ("example.org", "example.net")[number % 2]), "password": f"pw {number}"}
        for number in range(60)
    ]


def test_users_present(states, many):
    many[0]["jid"] = "Many0@Example.org"
    names = sorted(each["jid"].lower() for each in many)

    ret = states.ejabberd.users_present("all", users=many, test=True)
    assert (ret.result, ret.changes) == (None, {"made": names})
    assert sql("SELECT count(*) FROM users WHERE username LIKE 'many%'") == [("0",)]

    ret = states.ejabberd.users_present("all", users=many)
    assert ret.result is True, ret.comment
    assert ret.changes == {"made": names}
    assert "pw 1" not in str(ret)
    assert sql("SELECT count(*) FROM users WHERE username LIKE 'many%'") == [("60",)]
    for each in many[:4]:
        assert accepts(each["jid"].lower(), each["password"])
        assert not accepts(each["jid"].lower(), "another")

    for test in (False, True):
        ret = states.ejabberd.users_present("all", users=many, test=test)
        assert (ret.result, ret.changes) == (True, {})


def test_users_present_leaves_accounts_that_are_there(states, many):
    there = many[5]["jid"]
    user, host = there.split("@")
    ctl("register", user, host, "the user's own")
    before = stored(there)
    ret = states.ejabberd.users_present("all", users=many)
    assert ret.result is True, ret.comment
    assert there not in ret.changes["made"]
    assert len(ret.changes["made"]) == 59
    assert stored(there) == before
    assert accepts(there, "the user's own")


def test_an_account_that_comes_between_the_listing_and_the_copy_stays(modules, many):
    there = many[5]["jid"]
    user, host = there.split("@")
    ctl("register", user, host, "the user's own")
    made = modules.ejabberd.import_users(many)
    assert there not in made
    assert accepts(there, "the user's own")


def test_a_name_that_was_looked_up_before_is_known_at_once(modules, many):
    user, host = many[0]["jid"].split("@")
    # ejabberd now keeps in mind that there is no such account.
    assert not modules.ejabberd.check_password(user, host, password="pw 0")
    modules.ejabberd.import_users(many)
    assert modules.ejabberd.check_password(user, host, password="pw 0")


def test_users_present_from_the_pillar(states, no_account):
    jid = no_account("nurse")
    ret = states.ejabberd.users_present("all", users_pillar="accounts")
    assert (ret.result, ret.changes) == (True, {"made": [jid]})
    assert accepts(jid, "from the pillar")
    assert "from the pillar" not in str(ret)


@pytest.mark.parametrize("scram_hash", ["sha", "sha256", "sha512"])
def test_hashes_from_another_server(modules, no_account, scram_hash):
    jid = no_account("moved")
    digest = {"sha": "sha1"}.get(scram_hash, scram_hash)
    salt_bytes = b"a salt from there"
    salted = hashlib.pbkdf2_hmac(digest, b"from elsewhere", salt_bytes, 10000)
    client = hmac.digest(salted, b"Client Key", digest)
    values = (hashlib.new(digest, client).digest(), hmac.digest(salted, b"Server Key", digest), salt_bytes)
    encoded = dict(
        zip(("stored_key", "server_key", "salt"), (base64.b64encode(x).decode() for x in values), strict=True)
    )
    account = {"jid": jid, "scram": {"hash": scram_hash, "iterations": 10000, **encoded}}
    assert modules.ejabberd.import_users([account]) == [jid]
    assert accepts(jid, "from elsewhere")


def test_names_and_passwords_beyond_ascii(modules, no_account):
    jid = no_account("jülïet\\x")
    assert modules.ejabberd.import_users([{"jid": jid, "password": "Ⅸ\u00ad pass\u00a0word"}]) == [jid]
    # SASLprep: a client turns what is typed into this before it hashes it.
    assert accepts(jid, "IX pass word")
    assert modules.ejabberd.check_password("jülïet\\x", "example.org", password="Ⅸ pass word")


def test_nothing_is_made_when_postgresql_refuses(modules, many):
    accounts = [*many, {"jid": "later@example.org", "password": "x"}]
    sql("ALTER TABLE users ADD CONSTRAINT broken CHECK (username <> 'later')")
    try:
        with pytest.raises(CommandExecutionError, match=r"PostgreSQL refused.*broken") as caught:
            modules.ejabberd.import_users(accounts)
    finally:
        sql("ALTER TABLE users DROP CONSTRAINT broken")
    assert "\t" not in str(caught.value)
    assert sql("SELECT count(*) FROM users WHERE username LIKE 'many%'") == [("0",)]


def test_the_database_is_not_there(modules, many):
    with pytest.raises(CommandExecutionError, match=r"nowhere as ejabberd:.*nowhere"):
        modules.ejabberd.import_users(many, database="nowhere")


def test_no_password_and_no_hash_in_the_arguments_of_a_process(modules, many, monkeypatch):
    import subprocess

    seen, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: seen.append((command, more)) or run(command, **more))
    modules.ejabberd.import_users(many)
    assert len(seen) == 2
    for command, more in seen:
        assert "pw " not in str(command)
        assert "pw " not in str(more["env"])
        assert len(" ".join(command)) < 200
    # What is written is not the passwords either.
    assert "pw " not in seen[1][1]["input"]
