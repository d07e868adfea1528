"""What other machines, and other users of the same machine, can reach."""

import errno
import json
import resource
import selectors
import socket

import pytest

from .service import ADDRESSES, SALT_CALL, SECRETS

OPEN = {80, 443, 5222, 5223, 5269, 3478}
# What runs on the machine, for the machine alone.
CLOSED = {
    "epmd": 4369,
    "Erlang": 4370,
    "PostgreSQL": 5432,
    "XMPP behind nginx": 5225,
    "HTTP": 5280,
    "API": 5281,
    "HTTPS behind nginx": 8443,
}
AT_ONCE = 800


def scan(address, ports):
    """Return the TCP ports of ``ports`` at ``address`` that take a connection within 3 s."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found, waiting, selector = set(), iter(ports), selectors.DefaultSelector()

    def more():
        for port in waiting:
            connection = socket.socket(family, socket.SOCK_STREAM)
            connection.setblocking(False)
            code = connection.connect_ex((address, port))
            if code == errno.EINPROGRESS:
                selector.register(connection, selectors.EVENT_WRITE, port)
                return
            connection.close()
            if code == 0:
                found.add(port)

    for _ in range(AT_ONCE):
        more()
    while selector.get_map():
        events = selector.select(3)
        if not events:
            break
        for key, _ in events:
            if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.add(key.data)
            selector.unregister(key.fileobj)
            key.fileobj.close()
            more()
    return found


@pytest.fixture(autouse=True, scope="module")
def _many_sockets():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(2 * AT_ONCE, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("address", ADDRESSES, ids=["IPv4", "IPv6"])
def test_exactly_these_tcp_ports_are_open(service, address):
    assert scan(address, range(1, 65536)) == OPEN


def test_what_is_closed_is_there(service):
    """Otherwise nothing would be proven by its being closed."""
    listening = {port for _, _, port in sockets(service, "tcp")}
    assert {name for name, port in CLOSED.items() if port not in listening} == {"PostgreSQL"}, (
        "PostgreSQL has no TCP port at all"
    )


def sockets(service, protocol):
    """Return the listening sockets on the host: (protocol, address, port)."""
    rows = service.run("ss", "--no-header", "--numeric", "--listening", f"--{protocol}").stdout.splitlines()
    local = [row.split()[3].rpartition(":") for row in rows]
    return {(protocol, address.strip("[]").partition("%")[0], int(port)) for address, _, port in local}


def test_nothing_but_these_listens_for_others(service):
    for_others = {
        each for each in sockets(service, "tcp") | sockets(service, "udp") if not each[1].startswith(("127.", "::1"))
    }
    assert {(protocol, port) for protocol, _, port in for_others} == {("udp", 3478), *(("tcp", port) for port in OPEN)}


@pytest.fixture(scope="module")
def tybalt(service):
    """A user of the machine without any right."""
    service.run("useradd", "--user-group", "--no-create-home", "tybalt")
    assert service.run("id", "--user", "--name", user="tybalt").stdout == "tybalt\n"
    return "tybalt"


def call(port, path, method="POST", host="127.0.0.1"):
    """A shell command that prints the first line of the answer to an HTTP request."""
    request = (
        f"{method} {path} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: 2\\r\\nConnection: close\\r\\n\\r\\n{{}}"
    )
    return f"exec 3<>/dev/tcp/{host}/{port} && printf '{request}' >&3 && head -1 <&3"


@pytest.mark.parametrize("path", ["/", "/api", "/api/status", "/status", f"/{'0' * 64}/status", "/../status"])
def test_other_local_users_cannot_use_the_api(service, tybalt, path):
    for method in ("GET", "POST"):
        said = service.run("bash", "-c", call(5281, path, method), user=tybalt, check=False).stdout
        assert " 404 " in said, said


def test_other_local_users_cannot_learn_its_secret_path(service, tybalt):
    token = service.read(f"{SECRETS}/api_token").strip()
    for path in (f"{SECRETS}/api_token", "/etc/ejabberd/ejabberd.yml", "/var/lib/ejabberd/.erlang.cookie"):
        assert service.run("cat", path, user=tybalt, check=False).stderr.endswith("Permission denied\n"), path
    found = service.sh(f"grep -rlsF -e {token[:32]} /etc /var /run /tmp /srv || true", user=tybalt).stdout
    assert found == ""


def test_root_can_use_the_api(service):
    token = service.read(f"{SECRETS}/api_token").strip()
    assert " 200 " in service.sh(call(5281, f"/{token}/status")).stdout
    done = service.run(SALT_CALL, "--local", "--out=json", "ejabberd.status")
    assert json.loads(done.stdout)["local"]["running"] is True


def test_other_local_users_cannot_use_postgres_or_ejabberdctl(service, tybalt):
    psql = "psql --no-password --host=/var/run/postgresql --command=select"
    words = {
        f"{psql} --username=ejabberd --dbname=ejabberd": "authentication failed",
        f"{psql} --username=postgres --dbname=postgres": "authentication failed",
        "ejabberdctl status": "can only be run by",
    }
    for command, refusal in words.items():
        done = service.run(*command.split(), user=tybalt, check=False, timeout=30)
        assert done.returncode and refusal in done.stdout + done.stderr, (command, done)
