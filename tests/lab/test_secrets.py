"""No secret stands anywhere but in its own places: no command line, log, cache or return of Salt, or others' file."""

import base64
import json
import pathlib
import re

import pytest

from . import service as library
from .clients import can_login
from .service import CHECKOUT_THERE, DOMAIN, PILLAR, SALT_CALL, SECRETS, USERS

# Where a secret may stand: its file, the file of the program that needs it, and the pillar that gives it.
PLACES = {
    "admin_password": set(),
    "api_token": {"/etc/ejabberd/ejabberd.yml"},
    "ca_key": set(),
    "erlang_cookie": {"/var/lib/ejabberd/.erlang.cookie"},
    # ejabberd keeps copies of what it serves.
    "internal_key": {"/etc/ejabberd/certificate.pem", "/etc/nginx/xmpp/certificate.pem", "/var/lib/ejabberd/certs"},
}
# Mode, owner and group of what is secret, and of the folders on the way.
FILES = {
    "/etc/salt/xmpp/secrets": "700 root root",
    **{f"{SECRETS}/{name}": "600 root root" for name in PLACES},
    "/etc/ejabberd/ejabberd.yml": "640 root ejabberd",
    "/etc/ejabberd/certificate.pem": "640 root ejabberd",
    "/etc/nginx/xmpp/certificate.pem": "600 root root",
    "/var/lib/ejabberd/.erlang.cookie": "400 ejabberd ejabberd",
    "/var/lib/xmpp/uploads": "750 ejabberd ejabberd",
    # And of what is not.
    "/etc/ssl/xmpp/ca.crt": "644 root root",
    "/etc/ssl/xmpp/internal.crt": "644 root root",
}
PASSWORD_BY_API = "NewPasswordByApi-7Yw1NcZ4Gs"


def needles(name, content):
    """Return what would betray the secret ``name``: {bytes}."""
    if "PRIVATE KEY" in content:
        # Every line of base64, but for what all keys of a kind begin with.
        return {line.encode() for line in content.splitlines() if not line.startswith("-----") and len(line) >= 20}
    plain = content.strip().encode()
    user = name.partition("@")[0].removesuffix("_password")
    return {
        plain,
        base64.b64encode(plain).rstrip(b"="),
        base64.b64encode(b"\0" + user.encode() + b"\0" + plain).rstrip(b"="),
    }


@pytest.fixture(scope="module")
def secrets(service):
    """Every secret of the machine: {its own file: what would betray it}."""
    names = service.run("ls", SECRETS).stdout.split()
    assert set(names) == set(PLACES), "what is secret is listed above"
    found = {f"{SECRETS}/{name}": needles(name, service.read(f"{SECRETS}/{name}")) for name in names}
    found[f"{PILLAR}/more.sls"] = set().union(*(needles(jid, password) for jid, password in USERS.items()))
    assert all(found.values())
    return found


def betrayed(secrets, text):
    """Return the secrets that stand in ``text`` (bytes)."""
    return sorted(own for own, words in secrets.items() if any(word in text for word in words))


def test_no_command_line_held_a_secret(converged, secrets):
    lines = pathlib.Path(converged["evidence"], "argv.txt").read_bytes()
    # The watch saw what it had to see: short-lived programs, those of other users, ejabberd's own.
    for program in (b"pg_createcluster", b"psql", b"ejabberd", b"systemctl", b"nginx"):
        assert program in lines, f"the watch missed {program}"
    assert betrayed(secrets, lines) == []


def test_salt_returned_and_logged_no_secret(converged, secrets):
    """The first apply, with everything that Salt says at its most talkative level that is not for its developers."""
    output = pathlib.Path(converged["evidence"], "return.txt").read_bytes()
    assert b"ejabberd_|-" in output and b"[DEBUG   ]" in output
    assert betrayed(secrets, output) == []


def places(service, secrets):
    """Return the files of the whole machine in which a secret stands, where it may not: {file: its secrets}."""
    words = {word: own for own, each in secrets.items() for word in each}
    grep = "grep --recursive --text --only-matching --no-messages --fixed-strings --devices=skip --file=/dev/stdin"
    grep += f" --exclude-dir={CHECKOUT_THERE.rpartition('/')[2]}"
    roots = "/dev/shm /etc /home /opt /root /run /srv /tmp /usr/local /var"
    listed = b"\n".join(sorted(words)).decode() + "\n"
    found = service.sh(f"{grep} {roots} || true", input=listed).stdout
    wrong, seen = {}, set()
    for line in found.splitlines():
        path, _, word = line.partition(":")
        path = re.sub("^(/var/lib/ejabberd/certs)/[0-9a-f]{40}$", r"\1", path)
        own = words[word.encode()]
        seen.add(path)
        if path != own and path not in PLACES.get(own.rpartition("/")[2], set()):
            wrong.setdefault(path, set()).add(own)
    return wrong, seen


def journal(service):
    """Return everything that the journal holds, all fields of it."""
    return service.run("journalctl", "--no-pager", "--all", "--output=export").stdout.encode()


def test_no_file_holds_a_secret_that_is_not_its_own(service, secrets):
    wrong, found = places(service, secrets)
    assert found >= {*secrets, *set().union(*PLACES.values())}, "the search finds what is there"
    assert wrong == {}


def test_the_journal_holds_no_secret(service, secrets):
    text = journal(service)
    assert b"ejabberd" in text
    assert betrayed(secrets, text) == []


def test_who_may_read_what(service):
    seen = service.run("stat", "--format=%n %a %U %G", *FILES).stdout.splitlines()
    assert dict(line.split(" ", 1) for line in seen) == FILES


def test_nothing_of_it_can_be_read_by_others(service):
    """Also what is not in the table: here a user without rights reads nothing."""
    folders = f"{SECRETS} /var/lib/ejabberd /var/lib/xmpp/uploads /var/log/ejabberd "
    folders += "/var/lib/postgresql /etc/nginx/xmpp/certificate.pem"
    find = f"find {folders} -type f -readable 2>/dev/null"
    assert int(service.sh(f"{find} | wc -l").stdout) > 900, "there is much to read"
    assert service.sh(f"setpriv --reuid=65534 --regid=65534 --clear-groups {find} || true").stdout == ""


def test_ejabberds_log_holds_no_secret_at_info_either(service, outside, secrets):
    """At the most talkative level that the pillar allows, with passwords used in every way."""
    library.give(service, ejabberd={"loglevel": "info"}, users={f"paris@{DOMAIN}": {"password": PASSWORD_BY_API + "1"}})
    applied = library.apply(service)
    assert applied.code == 0, applied.failed()
    assert set(applied.changed()) == {"ejabberd_config", f"paris@{DOMAIN}"}, applied.changed()
    call = [SALT_CALL, "--local", "--out=json", "ejabberd.change_password", "paris", DOMAIN]
    service.put("/root/new_password", PASSWORD_BY_API + "2", mode="0600")
    assert json.loads(service.run(*call, "password_file=/root/new_password").stdout)["local"]
    assert can_login(outside, "paris", PASSWORD_BY_API + "2")
    with pytest.raises(PermissionError):
        can_login(outside, "paris", PASSWORD_BY_API + "1")
    log = service.read("/var/log/ejabberd/ejabberd.log")
    assert re.search(r"\[info\].*paris", log), "it is talkative"
    more = {
        **secrets,
        f"{PILLAR}/more.sls": secrets[f"{PILLAR}/more.sls"] | needles("paris", PASSWORD_BY_API + "1"),
        "/root/new_password": needles("paris", PASSWORD_BY_API + "2"),
    }
    assert betrayed(more, log.encode()) == []
    assert betrayed(more, applied.text.encode()) == []
    assert betrayed(more, journal(service)) == []
    assert places(service, more)[0] == {}
