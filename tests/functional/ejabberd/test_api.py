"""The API: who reaches it, what it answers, and that no password gets into the log."""

import http.client
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

from .conftest import CERTIFICATE, CONFIGURATION, LOG, TOKEN, certificate, ctl

pytestmark = pytest.mark.usefixtures("server")

DEFAULTS = pathlib.Path("/etc/default/ejabberd")
ASK = """
import http.client, json, sys
path, headers, body = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", 5281, timeout=30)
try:
    connection.request("POST", path, eval(body), json.loads(headers))
    print(connection.getresponse().status)
except OSError as error:
    print(repr(error))
"""


def ask_as_nobody(path, headers=None, body="'{}'"):
    """The HTTP status that an unprivileged local user gets."""
    command = [sys.executable, "-c", ASK, path, json.dumps(headers or {}), body]
    return subprocess.run(
        command, capture_output=True, text=True, user="nobody", group="nogroup", extra_groups=[], check=True, cwd="/"
    ).stdout.strip()


def test_it_says_what_ejabberdctl_says(modules):
    assert modules.ejabberd.status()["node"] in ctl("status").stdout
    assert modules.ejabberd.version() in ctl("status").stdout
    assert set(modules.ejabberd.api("registered_vhosts")) == set(ctl("registered_vhosts").stdout.split())
    assert modules.ejabberd.stats()["processes"] > 0
    assert modules.ejabberd.stats("example.org") == {"registeredusers": 0, "onlineusers": 0}
    assert modules.ejabberd.connected_users() == []
    assert modules.ejabberd.connected_users("example.net") == []


def test_a_thousand_calls_take_one_connection_and_little_time(modules):
    begin = time.monotonic()
    for _ in range(1000):
        modules.ejabberd.api("registered_vhosts")
    # ejabberdctl needs several minutes for as many.
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("command", ["status", "register", "registered_users", "stop", "list_cluster", "no_such"])
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer x"}, {"Authorization": "Basic anVsaWV0QGV4YW1wbGUub3JnOng="}]
)
def test_another_local_user_finds_nothing(command, headers):
    for path in (f"/{command}", f"/api/{command}", f"/api/{command}/v2", f"/{'0' * 64}/{command}/v2"):
        assert ask_as_nobody(path, headers) == "404", path


def test_another_local_user_cannot_read_the_secret():
    for path in (TOKEN, CONFIGURATION):
        done = subprocess.run(
            ["cat", path], capture_output=True, user="nobody", group="nogroup", extra_groups=[], check=False, cwd="/"
        )
        assert done.returncode, path


def test_another_local_user_cannot_fill_the_atom_table(modules):
    # What ended ejabberd 24.12 within 21 requests when the API's path was known to all.
    for number in range(30):
        body = f"json.dumps({{'k{number}_%d' % key: 1 for key in range(50000)}})"
        assert ask_as_nobody("/api/status/v2", body=body) == "404"
    assert modules.ejabberd.status()["running"] is True


def test_the_secret_opens_it_from_this_listener_only():
    connection = http.client.HTTPConnection("127.0.0.1", 5281)
    connection.request("POST", f"/{TOKEN.read_text()}/registered_vhosts/v2", "{}")
    assert sorted(json.loads(connection.getresponse().read())) == ["example.net", "example.org"]


def test_errors_say_what_failed(modules):
    with pytest.raises(SaltInvocationError, match="no command no_such"):
        modules.ejabberd.api("no_such")
    with pytest.raises(SaltInvocationError, match="missing argument: host"):
        modules.ejabberd.api("registered_users")
    with pytest.raises(SaltInvocationError, match="unknown argument"):
        modules.ejabberd.api("registered_users", host="example.org", hots="x")
    with pytest.raises(CommandExecutionError, match="Unknown virtual host"):
        modules.ejabberd.users("example.com")


def test_a_secret_that_has_changed(modules):
    before = TOKEN.read_text()
    TOKEN.write_text("f" * 64)
    try:
        with pytest.raises(CommandExecutionError, match="does not know the secret"):
            modules.ejabberd.users()
        assert modules.ejabberd.status()["running"] is False
    finally:
        TOKEN.write_text(before)


@pytest.mark.parametrize("level", ["notice", "info", "debug"])
def test_no_password_gets_into_the_log(modules, no_account, logged, level):
    secret = f"hush-{level}-hush"
    no_account("juliet")
    ctl("set_loglevel", level)
    try:
        for command in ("register", "change_password", "check_password"):
            try:
                getattr(modules.ejabberd, command)("juliet", "example.org", password=secret)
                assert level != "debug", "a password was sent at a level at which ejabberd logs it"
            except CommandExecutionError as error:
                assert level == "debug", error
                assert "log level is debug" in str(error)
                assert secret not in str(error)
    finally:
        ctl("set_loglevel", "notice")
    text = logged()
    assert secret not in text
    if level == "info":
        assert "API call register" in text, "the level was not in force"
    else:
        assert text or level == "notice"


def test_modules_are_those_that_run(modules):
    found = modules.ejabberd.modules("example.org")
    assert {"mod_admin_extra", "mod_muc", "mod_roster"} <= set(found)
    assert "mod_proxy65" not in found
    assert not list(CONFIGURATION.parent.glob("*dump*"))
    assert "configuration-" not in ctl("status").stdout


def test_no_copy_of_the_running_configuration_is_left(modules):
    modules.ejabberd.modules()
    left = subprocess.run(["find", "/var/lib/ejabberd", "-name", "*.yml"], capture_output=True, text=True, check=True)
    assert left.stdout == ""


def test_a_reload_serves_the_new_certificate(modules):
    before = modules.ejabberd.certificates()
    assert [each["names"] for each in before] == [["conference.example.org", "example.org"]]
    assert 28 <= before[0]["days_left"] <= 30
    certificate(CERTIFICATE)
    assert modules.ejabberd.certificates() == before
    assert modules.ejabberd.reload() is True
    after = modules.ejabberd.certificates()
    assert [each["names"] for each in after] == [["conference.example.org", "example.org"]]
    assert after[0]["sha256"] != before[0]["sha256"]
    assert after[0]["sha256"] == served_certificate()


def test_names_give_way_to_a_wildcard_and_come_back(modules):
    for names in (("example.org", "*.example.org"), ("example.org", "conference.example.org")):
        before, earlier = served_certificate("conference.example.org"), CERTIFICATE.stat().st_mtime
        certificate(CERTIFICATE, names)
        # ejabberd looks at whole seconds.
        os.utime(CERTIFICATE, (earlier + 1, earlier + 1))
        gone = modules.ejabberd.forget_names()
        assert gone == [{"*.example.org": "conference.example.org"}.get(names[1], "*.example.org")]
        # Until the reload, what there was serves.
        assert served_certificate("conference.example.org") == served_certificate("example.org") == before
        assert modules.ejabberd.reload() is True
        (now,) = modules.ejabberd.certificates()
        assert now["names"] == sorted(names)
        assert served_certificate("conference.example.org") == served_certificate("example.org") == now["sha256"]
        assert modules.ejabberd.forget_names() == []


def test_who_cannot_be_told_which_names_are_gone(modules):
    before = DEFAULTS.read_text()
    DEFAULTS.write_text(f"{before}ERL_DIST_PORT=5999\n")
    try:
        with pytest.raises(CommandExecutionError, match=r"failed to connect to node .*5999.* says where"):
            modules.ejabberd.forget_names()
    finally:
        DEFAULTS.write_text(before)


def served_certificate(name="example.org"):
    """The fingerprint of what a client is shown that asks for ``name``."""
    client = f"openssl s_client -connect 127.0.0.1:5222 -starttls xmpp -xmpphost example.org -servername {name}".split()
    session = subprocess.run(client, stdin=subprocess.DEVNULL, capture_output=True, check=False).stdout
    reader = "openssl x509 -noout -fingerprint -sha256".split()
    shown = subprocess.run(reader, input=session, capture_output=True, check=True).stdout.decode()
    return shown.split("=")[1].strip().replace(":", "").lower()


def test_errors_in_the_log_are_found(modules):
    with open(LOG, "a", encoding="utf-8") as log:
        log.write(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()) + ".000000+00:00 [error] a test wrote this\n")
    assert "a test wrote this" in modules.ejabberd.logged_errors(time.time() - 60)
    assert "a test wrote this" not in modules.ejabberd.logged_errors(time.time() + 60)
