"""The firewall: off by default; when on, the service and ssh are reached and nothing else, also after a reboot."""

import contextlib
import json
import socket

import pytest

from . import clients
from . import service as library
from .service import ADDRESSES, wait_for

pytestmark = pytest.mark.parametrize("debian", ["trixie"], indirect=True)
SERVICE = {80, 443, 5222, 5223, 5269, 3478}
SSH = 2222
ALLOWED, CLOSED = 8080, 8081
# Somebody else's rules, and a host that listens where the firewall has to decide.
OTHERS = """\
nft 'add table inet others; add chain inet others c; add rule inet others c counter'
systemd-run --unit=allowed --property=Type=exec python3 -m http.server --bind :: {allowed}
systemd-run --unit=closed --property=Type=exec python3 -m http.server --bind :: {closed}
"""


@pytest.fixture(scope="module")
def host(service):
    """The service's machine with an sshd on a port of its own."""
    service.sh(
        "apt-get -q update; DEBIAN_FRONTEND=noninteractive apt-get -qy --no-install-recommends install openssh-server"
    )
    service.put("/etc/ssh/sshd_config.d/port.conf", f"Port {SSH}\n")
    service.sh("systemctl enable --now ssh; systemctl restart ssh")
    service.sh(OTHERS.format(allowed=ALLOWED, closed=CLOSED))
    for port in (SSH, ALLOWED, CLOSED):
        wait_for(lambda port=port: answers(port), 10, f"port {port} answers")
    return service


def answers(port, address=ADDRESSES[0]):
    """Whether a connection from outside is accepted."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
        return True
    return False


def tables(host):
    rules = json.loads(host.run("nft", "--json", "list", "ruleset").stdout)["nftables"]
    return {entry["table"]["name"] for entry in rules if "table" in entry}


def firewall(host, **settings):
    library.give(host, firewall=settings)
    applied = library.apply(host, "xmpp.firewall")
    assert applied.code == 0, applied.failed()
    return applied


def test_off_by_default(host):
    assert tables(host) == {"others"}
    assert not host.path("/etc/nftables.d/xmpp.nft").exists()
    assert host.run("systemctl", "is-enabled", "nftables", check=False).stdout.strip() == "disabled"


def test_on(host):
    before = host.run("nft", "list", "table", "inet", "others").stdout, host.read("/etc/nftables.conf")
    library.give(host, firewall={"enabled": True, "allow_tcp": [ALLOWED]})
    would = library.apply(host, "xmpp.firewall", "test=True")
    assert {"firewall_rules", "firewall_unit", "firewall_loaded"} <= set(would.changed())
    assert tables(host) == {"others"}
    assert firewall(host, enabled=True, allow_tcp=[ALLOWED]).changed()
    assert tables(host) == {"others", "xmpp"}
    for address in ADDRESSES:
        assert {port for port in (*SERVICE, SSH, ALLOWED, CLOSED) if answers(port, address)} == {*SERVICE, SSH, ALLOWED}
    assert (host.run("nft", "list", "table", "inet", "others").stdout, host.read("/etc/nftables.conf")) == before
    assert host.run("ping", "-c1", "-W2", "192.0.2.1").returncode == 0
    assert clients.can_login(clients.Outside(host.read("/etc/ssl/xmpp/ca.crt")))
    assert firewall(host, enabled=True, allow_tcp=[ALLOWED]).changed() == {}


def test_ssh_by_its_socket_and_by_an_address(host):
    host.put("/etc/systemd/system/ssh.socket.d/port.conf", "[Socket]\nListenStream=\nListenStream=2223\n")
    host.put("/etc/ssh/sshd_config.d/address.conf", "ListenAddress 192.0.2.10:2224\n")
    host.sh("systemctl daemon-reload; systemctl start ssh.socket || true")
    try:
        found = host.run(library.SALT_CALL, "--local", "--out=json", "xmpp.ssh_ports").stdout
        assert {22, SSH, 2223, 2224} <= set(json.loads(found)["local"])
    finally:
        host.sh("systemctl stop ssh.socket; rm -r /etc/systemd/system/ssh.socket.d /etc/ssh/sshd_config.d/address.conf")
        host.sh("systemctl daemon-reload; systemctl restart ssh")


def test_what_flushes_all_tables_does_not_end_it(host):
    # Debian's own service does that when it starts, reloads or restarts.
    for verb in ("start", "reload", "restart"):
        host.run("systemctl", verb, "nftables")
        wait_for(lambda: "xmpp" in tables(host), 5, f"our table after {verb} of nftables")
    host.run("systemctl", "stop", "nftables")
    host.sh("nft flush ruleset; systemctl restart xmpp-firewall; nft add table inet others")


def test_a_load_that_failed_is_done_by_the_next_run(host):
    host.run("systemctl", "stop", "xmpp-firewall")
    assert "xmpp" not in tables(host)
    assert set(firewall(host, enabled=True, allow_tcp=[ALLOWED]).changed()) == {"firewall_loaded"}
    assert "xmpp" in tables(host)


def test_it_is_there_after_a_reboot(host):
    host.restart()
    assert "xmpp" in tables(host)
    host.sh(OTHERS.format(allowed=ALLOWED, closed=CLOSED))
    wait_for(lambda: answers(ALLOWED) and answers(5222), 30, "the service is up")
    assert not answers(CLOSED)
    assert answers(SSH)


def test_off_again(host):
    applied = firewall(host, enabled=False)
    assert {"firewall_unloaded"} <= set(applied.changed())
    assert tables(host) == {"others"}
    wait_for(lambda: answers(CLOSED), 5, "what was closed is open")
    assert not host.path("/etc/nftables.d/xmpp.nft").exists()
    assert not list(host.path("/etc/systemd/system").rglob("xmpp-firewall*"))
    assert not list(host.path("/etc/systemd/system/nftables.service.d").glob("*"))
    assert firewall(host, enabled=False).changed() == {}
