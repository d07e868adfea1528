"""The configuration file: tried before the running server sees it, taken without a restart where that does."""

import os
import pathlib
import socket
import subprocess
import threading
import time

import pytest
from salt.exceptions import CommandExecutionError

from .conftest import CERTIFICATE, CONFIGURATION, TOKEN, certificate, configuration, ctl, node_started

pytestmark = pytest.mark.usefixtures("server")

FORMER = pathlib.Path(f"{CONFIGURATION}.former")


def snapshot():
    """What a check must not change: the spool, the log's directory, what listens, what runs."""
    listens = subprocess.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True, check=True)
    ports = sorted(line.split()[1] for line in listens.stdout.splitlines() if " 0A " in line)
    files = {str(path) for path in [*pathlib.Path("/etc/ejabberd").rglob("*"), *pathlib.Path("/tmp").glob("ejabberd*")]}
    spool = {str(path) for path in pathlib.Path("/var/lib/ejabberd").rglob("*") if "LOG" not in path.name}
    return CONFIGURATION.read_bytes(), ports, files, spool, pid()


def pid():
    done = subprocess.run(["pgrep", "-u", "ejabberd", "-x", "beam.smp"], capture_output=True, text=True, check=True)
    return done.stdout.split()


WRONG = {
    "a misspelt option": ("language:", "langauge:", "Did you mean language?"),
    "broken YAML": ("language: en", "language: [en", "Syntax error on line"),
    "a tab": ("language: en", "\tlanguage: en", "Syntax error on line"),
    "a wrong value": ("loglevel: notice", "loglevel: loud", "loglevel"),
    "a wrong type": ("sql_pool_size: 2", "sql_pool_size: two", "sql_pool_size"),
    "an option twice": ("language: en", "language: en\nlanguage: de", "Duplicated option: language"),
    "an unknown module": ("mod_last: {}", "mod_lost: {}", "mod_lost"),
    "an unknown option of a module": ("mod_last: {}", "mod_last: {usecache: true}", "mod_last"),
    "an unknown listener": ("module: ejabberd_c2s", "module: ejabberd_c3s", "ejabberd_c3s"),
    "a wrong port": ("port: 5222", "port: 522222", "port"),
    "no hosts": ("hosts: [example.org, example.net]", "", "hosts"),
    "an include that is not there": ("language: en", "include_config_file: /no/such.yml", "/no/such.yml"),
    "a certificate that is none": (str(CERTIFICATE), "/etc/passwd", "/etc/passwd"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found_and_nothing_touched(modules, tmp_path, wrong):
    old, new, reason = WRONG[wrong]
    path = tmp_path / "new.yml"
    text = CONFIGURATION.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    before = snapshot()
    found = modules.ejabberd.config_check(str(path))
    assert found["valid"] is False
    assert reason in "\n".join(found["errors"]), found
    assert "ejabberd-check-" not in str(found), "the name of the copy is of no use to anyone"
    assert snapshot() == before


def test_what_is_right_is_right(modules):
    before = snapshot()
    assert modules.ejabberd.config_check() == {"valid": True, "errors": [], "warnings": []}
    assert snapshot() == before


@pytest.mark.parametrize("fault", ["key of another", "no key", "cut off", "not readable"])
def test_certificates_that_ejabberd_could_not_use(modules, tmp_path, fault):
    good, other = tmp_path / "good.pem", tmp_path / "other.pem"
    certificate(good)
    certificate(other)
    blocks = good.read_text().split("-----BEGIN PRIVATE KEY-----")
    other_blocks = other.read_text().split("-----BEGIN PRIVATE KEY-----")
    bad = pathlib.Path("/etc/ejabberd/bad.pem")
    content = {
        "key of another": blocks[0] + "-----BEGIN PRIVATE KEY-----" + other_blocks[1],
        "no key": blocks[0],
        "cut off": good.read_text()[:300],
        "not readable": good.read_text(),
    }[fault]
    bad.write_text(content)
    bad.chmod(0o600 if fault == "not readable" else 0o644)
    path = tmp_path / "new.yml"
    path.write_text(CONFIGURATION.read_text().replace(str(CERTIFICATE), str(bad)))
    try:
        found = modules.ejabberd.config_check(str(path))
    finally:
        bad.unlink()
    assert found["valid"] is False
    assert "bad.pem" in found["errors"][0]


def test_a_certificate_that_is_not_there_is_a_warning(modules, tmp_path):
    # ejabberd starts without it, so it is no error.
    path = tmp_path / "new.yml"
    path.write_text(CONFIGURATION.read_text().replace(str(CERTIFICATE), "/no/such.pem"))
    found = modules.ejabberd.config_check(str(path))
    assert found["valid"] is True
    assert "/no/such.pem" in found["warnings"][0]


def test_a_file_that_is_not_there(modules):
    with pytest.raises(CommandExecutionError, match=r"/no/such\.yml cannot be read"):
        modules.ejabberd.config_check("/no/such.yml")


def test_the_check_runs_as_ejabberd_and_not_as_root(modules, monkeypatch):
    seen, run = {}, subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: seen.update(more) or run(command, **more))
    modules.ejabberd.config_check()
    assert seen["user"] == "ejabberd"
    assert "TOKEN" not in str(seen["env"])


def test_config_reloads(states, configured):
    before, started, process = CONFIGURATION.read_text(), node_started(), pid()
    ret = states.ejabberd.config(**configured(language="de"), test=True)
    assert (ret.result, ret.changes) == (None, {"configuration": "replaced"})
    assert CONFIGURATION.read_text() == before

    ret = states.ejabberd.config(**configured(language="de"))
    assert ret.result is True, ret.comment
    assert ret.changes == {"configuration": "replaced", "ejabberd": "reloaded"}
    assert pid() == process
    assert abs(node_started() - started) < 3
    assert "language: de" in running()

    for test in (False, True):
        ret = states.ejabberd.config(**configured(language="de"), test=test)
        assert (ret.result, ret.changes) == (True, {})


def running():
    """The configuration that the server runs with, by its own words."""
    path = "/var/lib/ejabberd/seen.yml"
    ctl("dump_config", path)
    try:
        return pathlib.Path(path).read_text()
    finally:
        os.unlink(path)


def test_config_restarts_only_where_it_must(states, configured):
    process = pid()
    ret = states.ejabberd.config(**configured(sql_keepalive_interval=120))
    assert ret.result is True, ret.comment
    assert ret.changes == {"configuration": "replaced", "ejabberd": "restarted"}
    assert "sql_keepalive_interval" in ret.comment
    assert pid() != process
    assert "sql_keepalive_interval: 120" in running()


def test_a_new_listener_needs_no_restart(states, configured):
    process = pid()
    ret = states.ejabberd.config(**configured(other_port=5299))
    assert ret.changes.get("ejabberd") == "reloaded", ret.comment
    assert pid() == process
    with socket.create_connection(("127.0.0.1", 5299), timeout=5):
        pass


@pytest.mark.parametrize("test", [True, False])
def test_a_wrong_configuration_leaves_the_old_one_running(states, configured, test):
    before, process, seen = CONFIGURATION.read_bytes(), pid(), running()
    ret = states.ejabberd.config(**configured(more="  mod_lost: {}"), test=test)
    assert ret.result is False
    assert "mod_lost" in ret.comment
    assert ret.changes == {}
    assert CONFIGURATION.read_bytes() == before
    assert pid() == process
    assert running() == seen
    assert not FORMER.exists()


def test_a_template_that_does_not_render(states, configured, files):
    (files / "broken.yml").write_text("{{ nothing.at.all }}")
    for test in (True, False):
        ret = states.ejabberd.config(**{**configured(), "source": "salt://broken.yml"}, test=test)
        assert ret.result is False
        assert "cannot be rendered" in ret.comment
    ret = states.ejabberd.config(**{**configured(), "source": "salt://none.yml"})
    assert ret.result is False
    assert "none.yml" in ret.comment


def test_a_configuration_that_the_server_does_not_run_with_goes_back(states, configured):
    # Nothing is wrong with the file, but another program has the port.
    before, seen = CONFIGURATION.read_bytes(), running()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 5298))
        taken.listen()
        ret = states.ejabberd.config(**configured(other_port=5298))
    assert ret.result is False
    assert "5298" in ret.comment
    assert "The former file is back, and ejabberd runs with it." in ret.comment
    assert CONFIGURATION.read_bytes() == before
    assert running() == seen
    assert not FORMER.exists()


def test_a_listener_whose_former_socket_is_late_to_close_is_opened_all_the_same(states, configured, logged):
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        late.bind(("127.0.0.1", 5297))
        late.listen()

        def close():
            end = time.monotonic() + 60
            while "Failed to open socket" not in logged() and time.monotonic() < end:
                pass
            late.close()

        closing = threading.Thread(target=close)
        closing.start()
        process = pid()
        ret = states.ejabberd.config(**configured(other_port=5297))
        closing.join()
    assert ret.result is True, ret.comment
    assert ret.changes.get("ejabberd") == "reloaded"
    assert "Failed to open socket" in logged()
    assert pid() == process
    with socket.create_connection(("127.0.0.1", 5297), timeout=5):
        pass


def test_a_change_that_was_broken_off_is_finished(states, configured):
    # As if the run had been killed after the file was replaced.
    FORMER.write_bytes(CONFIGURATION.read_bytes())
    text = CONFIGURATION.read_text()
    CONFIGURATION.write_text(text.replace("language: en", "language: fr"))
    assert "language: en" in running()

    ret = states.ejabberd.config(**configured(language="fr"), test=True)
    assert ret.result is None
    assert "broke off" in ret.comment

    ret = states.ejabberd.config(**configured(language="fr"))
    assert (ret.result, ret.changes) == (True, {"ejabberd": "reloaded"})
    assert "language: fr" in running()
    assert not FORMER.exists()


def test_owner_and_mode(states, configured):
    status = CONFIGURATION.stat()
    assert status.st_mode & 0o777 == 0o640
    os.chmod(CONFIGURATION, 0o644)
    ret = states.ejabberd.config(**configured(), test=True)
    assert ret.result is None
    assert CONFIGURATION.stat().st_mode & 0o777 == 0o644
    ret = states.ejabberd.config(**configured())
    assert ret.result is True
    assert ret.changes
    assert CONFIGURATION.stat().st_mode & 0o777 == 0o640


def test_the_diff_is_shown_only_when_asked_for_and_never_the_secret(states, configured):
    ret = states.ejabberd.config(**configured(language="de"), test=True)
    assert TOKEN.read_text() not in str(ret)
    ret = states.ejabberd.config(**configured(language="de"), show_changes=True, test=True)
    assert "+language: de" in ret.changes["configuration"]


def test_without_a_running_server(states, modules, loaders, configured):
    ctl("stop")
    ctl("stopped")
    ret = states.ejabberd.config(**configuration(loaders, language="de"))
    assert (ret.result, ret.changes) == (True, {"configuration": "replaced"})
    ret = states.ejabberd.config(**configuration(loaders, more="  mod_lost: {}"))
    assert ret.result is False

    ret = states.ejabberd.running("ejabberd", test=True)
    assert (ret.result, ret.changes) == (None, {"ejabberd": {"old": "not running", "new": "running"}})
    assert modules.ejabberd.status()["running"] is False

    ret = states.ejabberd.running("ejabberd")
    assert (ret.result, ret.changes) == (True, {"ejabberd": {"old": "not running", "new": "running"}})
    assert "is started" in ctl("status").stdout
    for test in (False, True):
        ret = states.ejabberd.running("ejabberd", test=test)
        assert (ret.result, ret.changes) == (True, {})
    assert "language: de" in running()


def test_a_server_that_does_not_start(states, configured):
    ctl("stop")
    ctl("stopped")
    CERTIFICATE.write_text("not a certificate")
    ret = states.ejabberd.running("ejabberd", timeout=5)
    assert ret.result is False
    assert "ejabberd is not ready after 5 s" in ret.comment or "did not start" in ret.comment
    assert "Failed to read PEM file" in ret.comment


def test_a_node_of_another_name(states):
    ret = states.ejabberd.running("ejabberd", node="ejabberd@elsewhere.example.org")
    assert ret.result is False
    assert "elsewhere" in ret.comment
