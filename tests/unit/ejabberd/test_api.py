"""The API client against an HTTP server: what it sends, how it keeps its connection, what it makes of answers."""

import http.server
import json
import threading

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

TOKEN = "5e" * 32


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((self.client_address[1], self.path, body))
        status, kind, answer = server.answers.pop(0) if server.answers else (200, "application/json", "0")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer.encode())))
        if server.close:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.seen, made.answers, made.close = [], [], False
        threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def ejabberd(load, server, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    options = {"ejabberd:api_port": server.server_port, "ejabberd:api_token_file": str(tmp_path / "token")}
    return load("_modules/ejabberd.py", __salt__={"config.get": lambda name, default: options.get(name, default)})


def answer(text, status=200, kind="application/json"):
    return status, kind, json.dumps(text) if kind == "application/json" else text


def test_sends_the_command_behind_the_secret_path(ejabberd, server):
    server.answers = [answer(["juliet"])]
    assert ejabberd.api("registered_users", host="example.org", __pub_fun="x") == ["juliet"]
    assert server.seen[0][1:] == (f"/{TOKEN}/registered_users/v2", {"host": "example.org"})


def test_many_calls_go_over_one_connection(ejabberd, server):
    for _ in range(20):
        ejabberd.api("status")
    assert len({port for port, _, _ in server.seen}) == 1


def test_a_connection_that_the_server_closed_is_made_anew_and_nothing_is_sent_twice(ejabberd, server):
    server.close = True
    for _ in range(5):
        ejabberd.api("status")
    assert len(server.seen) == 5
    assert len({port for port, _, _ in server.seen}) == 5


def test_a_fork_does_not_share_the_connection(ejabberd, server, monkeypatch):
    ejabberd.api("status")
    monkeypatch.setattr(ejabberd.os, "getpid", lambda: -1)
    ejabberd.api("status")
    assert len({port for port, _, _ in server.seen}) == 2


@pytest.mark.parametrize(
    ("status", "text", "error", "says"),
    [
        (404, {"code": 40, "message": "Endpoint not found."}, SaltInvocationError, "no command register"),
        (404, {"code": 44, "message": "Command not found."}, SaltInvocationError, "no command register"),
        (404, "unknown_user", CommandExecutionError, "unknown_user"),
        (400, "Request have missing argument: user", SaltInvocationError, "missing argument: user"),
        (400, "Unknown virtual host", CommandExecutionError, "Unknown virtual host"),
        (400, "400 Bad Request", CommandExecutionError, "Erlang 27"),
        (403, {"code": 32, "message": "AccessRules: no"}, CommandExecutionError, "api_permissions"),
        (409, {"code": 10090, "message": "User already registered"}, CommandExecutionError, "already registered"),
        (500, "internal_error", CommandExecutionError, "ejabberd.log"),
    ],
)
def test_every_error_says_what_failed(ejabberd, server, status, text, error, says):
    server.answers = [answer(text, status)]
    with pytest.raises(error, match=says):
        ejabberd.api("register")


def test_a_secret_that_ejabberd_does_not_know(ejabberd, server):
    server.answers = [answer("<html>404 Not Found</html>", 404, "text/html")]
    with pytest.raises(CommandExecutionError, match=r"does not know the secret in .*token") as caught:
        ejabberd.api("status")
    assert TOKEN not in str(caught.value)


def test_no_server(ejabberd, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(CommandExecutionError, match=r"refuses the connection.*Is ejabberd running"):
        ejabberd.api("status")
    assert ejabberd.status()["running"] is False


def test_no_secret(load, tmp_path):
    ejabberd = load(
        "_modules/ejabberd.py",
        __salt__={"config.get": lambda name, default: str(tmp_path / "none") if "token" in name else default},
    )
    with pytest.raises(CommandExecutionError, match=r"cannot be read from .*none.*Run as root"):
        ejabberd.api("status")


def test_no_answer_in_time(ejabberd, server, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Handler, "do_POST", lambda self: gate.wait(5))
    with pytest.raises(CommandExecutionError, match=r"not answered within 0.2 s"):
        ejabberd.api("status", timeout=0.2)
    gate.set()


@pytest.mark.parametrize("argument", ["password", "newpass"])
def test_no_password_is_sent_to_a_server_that_would_log_it(ejabberd, server, argument):
    server.answers = [answer("debug")]
    with pytest.raises(CommandExecutionError, match="log level is debug"):
        ejabberd.api("register", user="juliet", host="example.org", **{argument: "a secret"})
    assert "a secret" not in str(server.seen)


def test_status_reads_what_ejabberd_says(ejabberd, server):
    server.answers = [
        answer("The node ejabberd@a.example is started. Status: started  ejabberd 24.12-3 is running in that node"),
        answer("The node ejabberd@a.example is starting. Status: starting  ejabberd 24.12-3 is running in that node"),
        answer("something else"),
    ]
    first, second, third = (ejabberd.status() for _ in range(3))
    assert (first["running"], first["node"], first["version"]) == (True, "ejabberd@a.example", "24.12-3")
    assert second["running"] is False
    assert third == {"running": False, "reason": "ejabberd says: something else"}


def test_started_gives_up_with_what_was_logged(ejabberd, server, tmp_path, monkeypatch):
    server.answers = [answer("not yet")] * 100
    log = tmp_path / "ejabberd.log"
    log.write_text(
        "2020-01-01 00:00:00.000000+00:00 [error] long ago\n2999-01-01 00:00:00.000000+00:00 [info] all is well\n"
        "2999-01-01 00:00:00.000000+00:00 [critical] the port is taken\nno time\n"
    )
    monkeypatch.setattr(ejabberd, "LOG", str(log))
    with pytest.raises(CommandExecutionError) as caught:
        ejabberd.started(timeout=0.2)
    assert "the port is taken" in str(caught.value)
    assert "long ago" not in str(caught.value)
    assert "all is well" not in str(caught.value)


def test_version_is_the_installed_one(ejabberd, tmp_path, monkeypatch):
    monkeypatch.setattr(ejabberd, "APPLICATION", str(tmp_path / "*.app"))
    with pytest.raises(CommandExecutionError, match="not installed"):
        ejabberd.version()
    (tmp_path / "ejabberd.app").write_text('{application,ejabberd,[{vsn, "26.07-1~bpo13+1"}]}.')
    assert ejabberd.version() == "26.07"


def test_modules_are_those_of_the_host(ejabberd, monkeypatch):
    configuration = {
        "hosts": ["a.example", "b.example", "c.example"],
        "modules": {"mod_mam": {}, "mod_roster": {}},
        "host_config": {"b.example": {"modules": {"mod_ping": {}}}},
        "append_host_config": {"c.example": {"modules": {"mod_ping": {}}}},
    }
    monkeypatch.setattr(ejabberd, "_running_configuration", lambda: configuration)
    assert ejabberd.modules() == ["mod_mam", "mod_roster"]
    assert ejabberd.modules("b.example") == ["mod_ping"]
    assert ejabberd.modules("c.example") == ["mod_mam", "mod_ping", "mod_roster"]
    with pytest.raises(SaltInvocationError, match=r"d\.example is no virtual host"):
        ejabberd.modules("d.example")
