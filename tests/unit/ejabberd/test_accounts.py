"""Addresses, passwords and what is stored of them."""

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def calls():
    return []


@pytest.fixture
def accounts(load, calls):
    def api(command, **arguments):
        calls.append((command, arguments))
        return ["example.org"] if command == "registered_vhosts" else 0

    pillar = {"xmpp": {"users": {"juliet@example.org": {"password": "from the pillar"}, "tybalt@example.org": None}}}
    return load("_modules/ejabberd_accounts.py", __salt__={"ejabberd.api": api}, __pillar__=pillar)


@pytest.mark.parametrize(
    ("user", "host", "expected"),
    [
        ("juliet", "example.org", "juliet@example.org"),
        ("Juliet", "Example.ORG.", "juliet@example.org"),
        ("\uff2auliet", "example.org", "juliet@example.org"),
        ("straße", "example.org", "strasse@example.org"),
        ("so\u00adft", "example.org", "soft@example.org"),
        ("ليلى", "example.org", "ليلى@example.org"),
    ],
)
def test_addresses_are_written_as_ejabberd_writes_them(accounts, user, host, expected):
    assert accounts.jid(user, host) == expected


@pytest.mark.parametrize(
    ("user", "host"),
    [
        ("", "example.org"),
        ("a b", "example.org"),
        ("a@b", "example.org"),
        ("a/b", "example.org"),
        ("a'b", "example.org"),
        ("a\x00", "example.org"),
        ("aليلى", "example.org"),
        ("x" * 1024, "example.org"),
        ("juliet", ""),
        ("juliet", "example.org/x"),
        ("juliet", "exa mple.org"),
        ("juliet", "x'; DROP TABLE users; --"),
    ],
)
def test_what_cannot_be_an_address(accounts, user, host):
    with pytest.raises(SaltInvocationError):
        accounts.jid(user, host)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # RFC 4013, section 3.
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("with\u00a0space", "with space"),
    ],
)
def test_passwords_are_prepared(accounts, text, expected):
    assert accounts._password("x", text) == expected


@pytest.mark.parametrize("text", ["\u0007", "\u0627\u0031"])
def test_passwords_with_what_is_not_permitted(accounts, text):
    with pytest.raises(SaltInvocationError) as caught:
        accounts._password("juliet", text)
    assert text not in str(caught.value)


@pytest.mark.parametrize(
    ("scram_hash", "salt_text", "stored", "server"),
    [
        # RFC 5802, section 5, and RFC 7677, section 3: what their example exchanges come from.
        ("sha", "QSXCR+Q6sek8bf92", "6dlGYMOdZcOPutkcNY8U2g7vK9Y=", "D+CSWLOshSulAsxiupA+qs2/fTE="),
        (
            "sha256",
            "W22ZaJ0SNY7soEsUEjb6gQ==",
            "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=",
            "wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=",
        ),
    ],
)
def test_scram_is_that_of_the_rfcs(accounts, scram_hash, salt_text, stored, server):
    salt_bytes = accounts.base64.b64decode(salt_text)
    assert accounts._scram("pencil", scram_hash, salt_bytes, 4096) == (stored, server, salt_text)


def test_passwords_come_from_a_file_without_its_newline(accounts, calls, tmp_path):
    (tmp_path / "password").write_text("from a file \n")
    assert accounts.register("juliet", "example.org", password_file=str(tmp_path / "password"))
    assert calls == [("register", {"user": "juliet", "host": "example.org", "password": "from a file "})]


def test_passwords_come_from_the_pillar(accounts, calls):
    assert accounts.change_password("juliet", "example.org", password_pillar="xmpp:users:juliet@example.org:password")
    assert calls == [("change_password", {"user": "juliet", "host": "example.org", "newpass": "from the pillar"})]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({}, SaltInvocationError, "exactly one"),
        ({"password": "a", "password_file": "/b"}, SaltInvocationError, "exactly one"),
        ({"password": ""}, SaltInvocationError, "not empty"),
        ({"password": 12345}, SaltInvocationError, "quoted"),
        ({"password_file": "/does/not/exist"}, CommandExecutionError, "/does/not/exist"),
        ({"password_pillar": "xmpp:nothing"}, SaltInvocationError, "xmpp:nothing"),
    ],
)
def test_wrong_ways_to_give_a_password(accounts, calls, given, error, says):
    with pytest.raises(error, match=says):
        accounts.register("juliet", "example.org", **given)
    assert not calls


def test_a_host_that_ejabberd_does_not_serve(accounts):
    with pytest.raises(SaltInvocationError, match=r"example\.net is no virtual host.*example\.org"):
        accounts.unregister("juliet", "example.net")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"jid": "no address", "password": "x"}], "not an address"),
        ([{"password": "x"}], "not an address"),
        ([{"jid": "a@example.org", "password": "x"}, {"jid": "A@example.org", "password": "y"}], "there twice"),
        ([{"jid": "a@example.net", "password": "x"}], "no virtual host"),
    ],
)
def test_wrong_accounts_are_told_before_anything_is_written(accounts, monkeypatch, given, says):
    monkeypatch.setattr(accounts, "_Database", lambda *arguments: pytest.fail("PostgreSQL was asked"))
    with pytest.raises(SaltInvocationError, match=says):
        accounts.import_users(given)


def test_accounts_in_the_pillar(accounts):
    assert list(accounts._listed(None, "xmpp:users")) == ["juliet@example.org", "tybalt@example.org"]
    accounts.__pillar__["xmpp"]["users"]["tybalt@example.org"] = {"present": False}
    assert list(accounts._listed(None, "xmpp:users")) == ["juliet@example.org"]
    with pytest.raises(SaltInvocationError, match="nothing at xmpp:people"):
        accounts._listed(None, "xmpp:people")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hash": "md5"}, "md5"),
        ({"salt": "not base64!"}, "salt is not base64"),
        ({"iterations": 0}, "iterations"),
        ({"more": 1}, "needs hash"),
    ],
)
def test_wrong_hashes_from_elsewhere(accounts, change, says):
    scram = {"hash": "sha", "stored_key": "AAAA", "server_key": "AAAA", "salt": "AAAA", "iterations": 4096}
    with pytest.raises(SaltInvocationError, match=says):
        accounts._ready_scram("juliet@example.org", {**scram, **change})
    assert accounts._ready_scram("juliet@example.org", scram) == ("sha", "AAAA", "AAAA", "AAAA", 4096)


def test_what_postgresql_says_does_not_quote_a_row(accounts):
    said = 'psql:<stdin>:4: ERROR:  value too long\nCONTEXT:  COPY new_users, line 1: "juliet\tc2VjcmV0"\n'
    assert accounts._first_error(said) == "psql:<stdin>:4: ERROR:  value too long"
