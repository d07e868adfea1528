"""What bootstrap says, writes and reads, without Salt and without a machine to spoil."""

import importlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
BOOTSTRAP = CHECKOUT / "bootstrap"
NAMES = ("__main__", "hints", "install_salt", "machine", "minion", "ports", "report", "screen", "settings")


class _Parts:
    """The modules of tools/bootstrap, which are a program and no package."""


@pytest.fixture(scope="module")
def parts():
    found = _Parts()
    sys.path.insert(0, str(CHECKOUT / "tools/bootstrap"))
    for name in NAMES[1:]:
        setattr(found, name, importlib.import_module(name))
    specification = importlib.util.spec_from_file_location("bootstrap_main", CHECKOUT / "tools/bootstrap/__main__.py")
    found.main = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(found.main)
    yield found
    sys.path.remove(str(CHECKOUT / "tools/bootstrap"))
    for name in NAMES[1:]:
        del sys.modules[name]


@pytest.fixture
def place(parts, tmp_path, monkeypatch):
    """The machine's own place, moved out of /etc."""
    place = parts.settings.Place(tmp_path / "etc", tmp_path / "cache", tmp_path / "log")
    monkeypatch.setattr(parts.settings, "REAL", place)
    monkeypatch.setattr(parts.settings, "CONFIG", place.config)
    return place


PLAN = {
    "domain": "example.org",
    "node": "xmpp1.example.org",
    "admin": "admin@example.org",
    "tls": {"source": "internal"},
    "ports": {"c2s": 5222, "c2s_tls": 5223, "https": 443},
    "paths": {"secrets": "/etc/salt/xmpp/secrets", "ca": "/etc/ssl/xmpp/ca.crt"},
    "urls": {"web": "https://example.org/", "websocket": "wss://example.org/ws"},
}


class _Minion:
    command = "/opt/salt-xmpp/bin/salt-call -c /etc/salt/xmpp"


def probes(count, result):
    return [{"what": f"probe {n}", "result": result, "seen": "it said no", "do": "ask again"} for n in range(count)]


# What is said


@pytest.mark.parametrize("records", [0, 1, 5, 13, 40])
@pytest.mark.parametrize("unproven", [0, 1, 9])
def test_last_words_are_fewer_than_25_lines_and_say_everything(parts, records, unproven):
    zone = [f"record{n}.example.org. 3600 IN A 192.0.2.10" for n in range(records)]
    report = {"ok": True, "probes": probes(unproven, "not proven") + probes(20, "ok")}
    lines = parts.report.success(PLAN, report, zone, _Minion, "60 states, 0 changed.")
    text = "\n".join(lines)
    assert len(text.splitlines()) < 25
    for fact in ("example.org", "admin@example.org", "/etc/salt/xmpp/secrets/admin_password", "5222", "https://example.org/"):
        assert fact in text
    assert "60 states, 0 changed." in text
    assert ("record0" in text) == (records > 0)
    assert records < 10 or "xmpp.dns_records" in text
    assert ("probe 0: it said no" in text) == (unproven > 0)


def state(number, result, comment="", ran=True, **more):
    return {
        "id": f"state {number}", "function": "file.managed", "__sls__": "xmpp.nginx", "name": "x", "result": result,
        "comment": comment, "__state_ran__": ran, "said": "", "unknown": False, **more,
    }  # fmt: skip


def test_a_failure_names_the_state_its_reason_and_what_to_do(parts):
    states = [
        state(1, True),
        state(2, False, "bind() to 0.0.0.0:443 failed (98: Address already in use)"),
        state(3, False, "One or more requisite failed: xmpp.nginx.state 2", ran=False),
    ]
    text = "\n".join(parts.report.failure(states, PLAN, "sudo ./bootstrap --domain example.org"))
    assert "FAILED:  state 2  (file.managed in xmpp.nginx)" in text
    assert "Address already in use" in text
    assert "ss -lntup" in text
    assert "state 3" not in text
    assert "1 of 3 states failed; 1 that need them were not tried." in text
    assert "sudo ./bootstrap --domain example.org" in text


def test_what_a_failed_program_said_is_part_of_the_reason(parts):
    failed = [state(1, False, "Failed to start the service", said="nginx: [emerg] no live upstreams")]
    assert "no live upstreams" in "\n".join(parts.report.failure(failed, PLAN, ""))


def test_who_holds_a_port_is_told(parts):
    """By the real tables of this machine: this very process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        plan = {**PLAN, "ports": {"c2s": port}}
        text = "\n".join(parts.report.failure([state(1, False, "no")], plan, ""))
        program = Path("/proc/self/comm").read_text().strip()
        assert f"IN THE WAY: {program} (process {os.getpid()}) holds port {port}" in text
    assert "IN THE WAY" not in "\n".join(parts.report.failure([state(1, False, "no")], plan, ""))


def test_many_failures_stay_on_one_screen(parts):
    failed = [state(n, False, "line\n" * 100) for n in range(40)]
    lines = "\n".join(parts.report.failure(failed, PLAN, "")).splitlines()
    assert len(lines) < 60
    assert all(f"state {n}" in "\n".join(lines) for n in range(40))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("E: You don't have enough free space in /var/cache/apt/archives/.", "df -h"),
        ("OSError: [Errno 28] No space left on device", "df -h"),
        ("E: Unable to locate package ejabberd", "mirror"),
        ("Temporary failure resolving 'mirror.example.org'", "network"),
        ("Could not get lock /var/lib/dpkg/lock-frontend", "apt"),
        ("listen eaddrinuse", "ss -lntup"),
    ],
)
def test_well_known_failures_have_advice(parts, text, word):
    assert word in parts.hints.do_about(f"something\n{text}\nmore")


def test_help_tells_every_option_and_needs_no_root():
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", str(BOOTSTRAP), "--help"]
        if os.access("/", os.W_OK) else ["sh", str(BOOTSTRAP), "--help"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code = (CHECKOUT / "tools/bootstrap/__main__.py").read_text(encoding="utf-8")
    options = re.findall(r'add_argument\("(--[a-z-]+)"', code)
    assert len(options) >= 5
    for option in options:
        assert re.search(rf"^  {option}\b", done.stdout, re.MULTILINE), option


@pytest.mark.parametrize("words", [["--nonsense"], ["--domain"], ["--pillar"], ["surplus"]])
def test_a_wrong_call_is_refused_before_python_is_installed(words, tmp_path):
    for tool in ("cat", "dirname", "id", "readlink"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(["/bin/sh", str(BOOTSTRAP), *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--help" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--domain", "exa_mple.org"], "no host name"),
        (["--domain", "192.0.2.1"], "no host name"),
        (["--node", "short"], "full name"),
        (["--pillar", "/nonexistent/pillar"], "/nonexistent/pillar"),
        (["--pillar", "/"], "directory"),
        (["--pillar", "/etc/hostname", "--domain", "example.org"], "not allowed with"),
    ],
)
def test_wrong_values_are_refused_with_what_to_do(parts, monkeypatch, words, part):
    monkeypatch.setattr(sys, "argv", ["bootstrap", *words])
    with pytest.raises(parts.screen.Stop) as stop:
        parts.main.read_options()
    assert part in stop.value.reason
    assert stop.value.do
    assert stop.value.code == 2


# How it is shown


def test_a_silent_program_does_not_silence_the_screen(parts, monkeypatch, tmp_path):
    monkeypatch.setattr(parts.screen, "QUIET", 0.3)
    shown = io.StringIO()
    parts.screen.run(parts.screen.Screen(shown), ["sleep", "1.2"], tmp_path / "log", "sleeping")
    assert len(re.findall(r"\.\.\. +\d+ s  sleeping", shown.getvalue())) >= 2


def test_output_facts_and_errors_are_told_apart(parts, tmp_path):
    facts = []
    script = "echo output; echo err >&2; echo fact >&$PROGRESS_FD; exit 3"
    code, output, errors = parts.screen.run(
        parts.screen.Screen(io.StringIO()), ["bash", "-c", script], tmp_path / "log", "", on_fact=facts.append
    )
    assert (code, output, errors, facts) == (3, "output", "err", ["fact"])
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["err"]


def test_a_daemon_that_keeps_the_output_open_is_not_waited_for(parts, tmp_path):
    before = time.monotonic()
    screen = parts.screen.Screen(io.StringIO())
    code, output, _ = parts.screen.run(screen, ["bash", "-c", "sleep 20 & echo done"], tmp_path / "log", "")
    assert (code, output) == (0, "done")
    assert time.monotonic() - before < 5


# What is written


def test_pillar_and_configuration_are_for_root_alone_and_written_once(parts, place):
    os.umask(0o022)
    assert parts.settings.write_minion(place, "xmpp1.example.org")
    assert not parts.settings.write_minion(place, "xmpp1.example.org")
    assert parts.settings.minion_id() == "xmpp1.example.org"
    parts.settings.offer_pillar(place, "xmpp: {domain: example.org}\n")
    assert parts.settings.take_pillar(place)
    parts.settings.offer_pillar(place, "xmpp: {domain: example.org}\n")
    assert not parts.settings.take_pillar(place)
    modes = {str(path.relative_to(place.config)): path.stat().st_mode & 0o777 for path in place.config.rglob("*")}
    assert modes == {"minion": 0o600, "pillar": 0o700, "pillar/top.sls": 0o600, "pillar/xmpp.sls": 0o600}


def test_a_replaced_pillar_is_kept(parts, place):
    parts.settings.write_minion(place, "a.example.org")
    for text in ("first\n", "second\n"):
        parts.settings.offer_pillar(place, text)
        parts.settings.take_pillar(place)
    assert (place.pillar / "xmpp.sls").read_text() == "second\n"
    assert (place.pillar / "xmpp.sls.old").read_text() == "first\n"
    assert (place.pillar / "xmpp.sls.old").stat().st_mode & 0o777 == 0o600


def test_a_test_run_would_write_but_does_not(parts, place, tmp_path):
    passing = parts.settings.Place(tmp_path / "t/config", tmp_path / "t/cache", tmp_path / "t/log")
    assert parts.settings.write_minion(passing, "a.example.org")
    assert not place.config.exists()
    assert str(passing.cache) in (passing.config / "minion").read_text()


# What is found out


@pytest.mark.parametrize(
    ("host_name", "canonical", "expected"),
    [
        ("xmpp1.example.org", None, "xmpp1.example.org"),
        ("XMPP1.Example.org", None, "xmpp1.example.org"),
        ("xmpp1", "xmpp1.example.org", "xmpp1.example.org"),
        ("xmpp1", "xmpp1", None),
        ("xmpp1", "localhost", None),
        ("xmpp1", "xmpp1.localdomain", None),
        ("xmpp1", OSError(), None),
        ("under_score.example.org", None, None),
    ],
)
def test_full_host_name(parts, monkeypatch, host_name, canonical, expected):
    def getaddrinfo(*_, **__):
        if isinstance(canonical, OSError):
            raise canonical
        return [(2, 1, 6, canonical, ("192.0.2.10", 0))]

    monkeypatch.setattr(parts.machine.socket, "gethostname", lambda: host_name)
    monkeypatch.setattr(parts.machine.socket, "getaddrinfo", getaddrinfo)
    assert parts.machine.full_host_name() == expected


@pytest.mark.parametrize(
    ("host_name", "expected"),
    [("debian", "debian.example.org"), ("localhost", "xmpp.example.org"), ("a_b", "xmpp.example.org")],
)
def test_a_node_has_a_full_name_in_any_case(parts, monkeypatch, host_name, expected):
    monkeypatch.setattr(parts.machine, "full_host_name", lambda: None)
    monkeypatch.setattr(parts.machine.socket, "gethostname", lambda: host_name)
    assert parts.machine.node_name("example.org") == expected


@pytest.mark.parametrize(
    ("said", "code", "found"),
    [("salt-call 3008.3 (Argon)", 0, "3008.3"), ("salt-call 3007.1", 0, None), ("", 1, None), ("broken", 0, None)],
)
def test_only_a_salt_that_is_new_enough_is_used(parts, monkeypatch, tmp_path, said, code, found):
    program = tmp_path / "salt-call"
    answer = '{"local": "/usr/bin/python3"}'
    program.write_text(f"#!/bin/sh\n[ $1 = --version ] && {{ echo '{said}'; exit {code}; }}\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setattr(parts.install_salt, "HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    shown = io.StringIO()
    salt = parts.install_salt.find(parts.screen.Screen(shown))
    assert (salt and salt.version) == found
    assert salt is None or (salt.program, salt.python, salt.ours) == (str(program), "/usr/bin/python3", False)
    assert salt or "It stays as it is" in shown.getvalue()
