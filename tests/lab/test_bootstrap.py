"""One command on a bare machine: what it says, what it leaves, and that a second run changes nothing."""

import re
import shutil
from types import SimpleNamespace

import pytest

from . import service
from .bootstrap import PROVEN, STATE, Untouched, last, run, states, tls_answers

EXAMPLE = ["--pillar", f"{service.CHECKOUT_THERE}/pillar.example"]
# Which machine, how it is started, the command's arguments, the domain that comes of it.
MACHINES = {
    "bookworm-plain": ("bookworm", None, [], service.NODE),
    "bookworm-container": ("bookworm", None, [], service.NODE),
    "bookworm-systemd": ("bookworm", "systemd", EXAMPLE, service.DOMAIN),
    "trixie-systemd": ("trixie", "systemd", EXAMPLE, service.DOMAIN),
}


@pytest.fixture(scope="module", params=MACHINES)
def made(lab, request):
    """A bare machine on which the command has run once, and that run."""
    debian, init, words, domain = MACHINES[request.param]
    host = service.host(lab, debian, init=init)
    assert not shutil.which("python3", path=str(host.path("/usr/bin")))
    if "container" in request.param:
        host.sh("apt-get -qy purge systemd systemd-sysv libpam-systemd libnss-systemd dbus")
        assert host.run("which", "systemctl", "runlevel", check=False).stdout == ""
    yield SimpleNamespace(host=host, domain=domain, words=words, init=init, first=run(host, *words))
    host.destroy()


def test_one_command_makes_a_service_and_proves_it(made):
    assert made.first.code == 0, last(made.first, 60)
    assert f"{made.domain} {PROVEN}" in made.first.text
    assert f"no systemd, {made.host.short_name}" in made.first.text or made.init
    proven = set(re.findall(r"^ +ok +(.*)$", made.first.text, re.MULTILINE))
    for probe in ("login", "message", "archive", "upload"):
        assert any(probe in name for name in proven), f"{probe}: {proven}"
    tls_answers(made.host, made.domain, made.host.read("/etc/ssl/xmpp/ca.crt"))


def test_each_state_is_shown_as_it_ends(made):
    shown = [STATE.match(line) for line in made.first.lines if STATE.match(line)]
    assert [int(found.group(1)) for found in shown] == list(range(1, len(shown) + 1))
    assert len(shown) > 30
    assert len({found.group(2) for found in shown}) == 1
    assert set(states(made.first)) <= {"ok", "changed"}


def test_it_is_never_silent_for_long(made):
    assert made.first.silent < 40


def test_the_last_words_are_short_and_complete(made):
    words = made.first.text.partition("[6/6] Done\n")[2]
    assert 5 < len(words.splitlines()) < 25
    password = "/etc/salt/xmpp/secrets/admin_password"
    for fact in (f"admin@{made.domain}", password, f"https://{made.domain}/", "5222", "443"):
        assert fact in words
    assert re.search(rf"^  {made.domain}\. +\d+ IN A +192\.0\.2\.10$", words, re.MULTILINE), words
    assert re.search(rf"^  _xmpps-client\._tcp\.{made.domain}\. +\d+ IN SRV ", words, re.MULTILINE), words
    assert "Not proven from here:" in words


def test_no_secret_is_shown_or_logged(made):
    lines = made.host.sh("cat /etc/salt/xmpp/secrets/*").stdout.splitlines()
    secrets = [line for line in lines if len(line) >= 12 and "-----" not in line]
    assert len(secrets) >= 3
    logs = made.host.sh("cat /var/log/salt/xmpp/*").stdout
    for secret in secrets:
        assert secret not in made.first.text
        assert secret not in logs


def test_what_was_borrowed_is_given_back(made):
    packages = made.host.sh("dpkg-query -W -f '${Package} ${db:Status-Abbrev}\\n'").stdout
    assert not re.search(r"^(gcc|gcc-\d+|python3-dev|libc6-dev) ", packages, re.MULTILINE)
    assert re.search(r"^python3-venv ii", packages, re.MULTILINE)
    assert not made.host.path("/var/cache/salt/xmpp/install").exists()


def test_its_files_are_for_root_alone(made):
    found = made.host.sh("stat -c '%a %U' /etc/salt/xmpp /var/log/salt/xmpp /var/cache/salt/xmpp")
    assert set(found.stdout.splitlines()) == {"700 root"}
    readable = made.host.sh("find /etc/salt/xmpp -type f -perm /077").stdout
    assert readable == ""
    # States that run a command as another user need Salt's Python for that.
    made.host.run("/opt/salt-xmpp/bin/python3", "-c", "import salt", user="nobody")


def test_a_second_run_changes_nothing_and_says_so(made):
    secrets = made.host.sh("sha256sum /etc/salt/xmpp/secrets/*").stdout
    with Untouched(made.host):
        second = run(made.host)
    assert second.code == 0, last(second, 60)
    assert set(states(second)) == {"ok"}
    assert re.search(r"\d+ states, 0 changed", last(second, 25))
    assert PROVEN in second.text
    assert made.host.sh("sha256sum /etc/salt/xmpp/secrets/*").stdout == secrets


def test_test_mode_tells_what_would_change_and_touches_nothing(made):
    page = "/var/www/xmpp/index.html"
    made.host.run("mv", page, "/tmp/page")
    with Untouched(made.host):
        shown = run(made.host, "--test")
    assert shown.code == 0, last(shown)
    assert set(states(shown)) == {"ok", "would"}
    would = [line for line in shown.lines if STATE.match(line) and " would " in line]
    assert len(would) <= 2  # the file, and the service that would take notice
    assert any(line.endswith(page) for line in would)
    assert f"{len(would)} of" in last(shown, 2)
    assert made.host.sh("ls -d /tmp/xmpp-bootstrap-* 2>&1 || true").stdout.endswith("No such file or directory\n")
    assert run(made.host).code == 0
    assert made.host.read(page) == made.host.read("/tmp/page")


def test_another_domain_is_refused(made):
    with Untouched(made.host):
        done = run(made.host, "--domain", "example.com")
    assert done.code == 2
    assert made.domain in last(done, 2)
    assert "/etc/salt/xmpp/pillar/xmpp.sls" in last(done, 2)
