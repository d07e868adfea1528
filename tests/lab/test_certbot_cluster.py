"""Several nodes under one master: each asks for itself, no private key leaves its node, and no node needs another."""

import json

import pytest

from . import acme, cloudflare
from .delivery import changed, wrong
from .library.salt import salt, salt_master, salt_minion
from .service import DOMAIN, SECRETS
from .test_certbot import CREDENTIALS, LIVE, NAMES, found_in, renew
from .test_certificates import serial

NODES = {f"xmpp{number}.{DOMAIN}": f"192.0.2.{20 + number}" for number in range(1, 5)}
RELEASES = dict(zip(NODES, ("trixie", "bookworm", "trixie", "bookworm"), strict=True))
FIRST, LAST = min(NODES), max(NODES)
PEM = "-----BEGIN"


@pytest.fixture(scope="module")
def authority(lab):
    return acme.Acme(lab)


@pytest.fixture(scope="module")
def master(lab, authority):
    host = lab.host("master.example.org", ("192.0.2.100", "2001:db8::100"), layers="trixie+salt")
    # As docs/security.md says: else the master keeps every minion's pillar in its cache.
    salt_master(host, minion_data_cache=False)
    host.put("/srv/pillar/top.sls", "base: {'xmpp*': [xmpp]}\n")
    know(host, authority, [name for name in NODES if name != LAST])
    return host


@pytest.fixture(scope="module")
def nodes(lab, master):
    """Three of the nodes, as minions to which the certificates were applied at the same time."""
    hosts = {name: minion(lab, master, name) for name in NODES if name != LAST}
    returned = salt(master, "xmpp*", "state.apply", "xmpp.certificates", check=False)
    assert set(returned) == set(hosts)
    assert {name: wrong(states) for name, states in returned.items()} == {name: {} for name in hosts}
    return hosts


def know(master, authority, names, tls=None):
    """Let the pillar have these nodes: the first serves, the others have the certificate, all of them by ``tls``."""
    nodes = {name: {"address": NODES[name], **({} if name == FIRST else {"roles": []})} for name in names}
    pillar = {"xmpp": {"domain": DOMAIN, "nodes": nodes, "tls": tls or authority.pillar()}}
    master.put("/srv/pillar/xmpp.sls", json.dumps(pillar), mode="0600")


def minion(lab, master, name):
    address = NODES[name]
    host = lab.host(name, (address, address.replace("192.0.2.", "2001:db8::")), layers=f"{RELEASES[name]}+salt+apps")
    salt_minion(host, master)
    return host


def names_of(host):
    shown = host.run("openssl", "x509", "-in", f"{LIVE}/cert.pem", "-noout", "-ext", "subjectAltName").stdout
    return {each.strip().removeprefix("DNS:") for each in shown.splitlines()[1].split(",")}


def test_each_has_one_of_its_own(nodes):
    # Its own name tells the authority the requests apart: it gives few certificates a week for the very same names.
    assert {name: names_of(host) for name, host in nodes.items()} == {name: {*NAMES, name} for name in nodes}
    assert len({host.read(f"{LIVE}/privkey.pem") for host in nodes.values()}) == 3
    assert len({serial(host, f"{LIVE}/cert.pem") for host in nodes.values()}) == 3


def test_applied_again_nothing_changes_and_nothing_is_asked(master, nodes, authority):
    before = authority.orders()
    returned = salt(master, "xmpp*", "state.apply", "xmpp.certificates")
    assert {name: (wrong(states), changed(states)) for name, states in returned.items()} == dict.fromkeys(
        nodes, ({}, {})
    )
    assert authority.orders() == before


def test_the_deploy_hook_needs_no_master(nodes):
    for host in nodes.values():
        host.run("/usr/local/lib/xmpp/certbot-deploy")


def keys_at(host):
    """Return the lines of every private key of certbot's, of the internal authority's and certificate's on ``host``."""
    text = host.sh("cat /etc/letsencrypt/archive/xmpp/privkey*.pem /etc/salt/xmpp/secrets/*_key").stdout
    return [line for line in text.splitlines() if line and not line.startswith("-----") and len(line) >= 20]


def test_no_private_key_is_anywhere_but_on_its_node(master, nodes):
    grep = "grep --recursive --text --only-matching --no-filename --no-messages --fixed-strings --devices=skip"
    roots = "/dev/shm /etc /home /opt /root /run /srv /tmp /usr/local /var"
    everyone = {**nodes, "master": master}
    for name, host in nodes.items():
        lines = keys_at(host)
        assert len(lines) >= 6
        for other, where in everyone.items():
            found = where.sh(
                f"{grep} --file=/dev/stdin --exclude-dir=xmpp-formula {roots} || true", input="\n".join(lines) + "\n"
            ).stdout
            # The search finds what is there.
            assert bool(found) == (other == name), (name, other)


@pytest.fixture(scope="module")
def api(lab, authority):
    made = cloudflare.Cloudflare(lab, authority)
    yield made
    made.close()


@pytest.mark.parametrize("way", ["token", "global key", "TSIG key", "plugin's settings", "external account"])
def test_the_credentials_are_in_no_return_and_in_no_cache(master, nodes, authority, api, way):
    asking = {name: host for name, host in nodes.items() if name != FIRST}
    account = {"external_account": {"kid": acme.ACCOUNT, "hmac_key": acme.ACCOUNT_KEY}}
    settings = {f"dns_rfc2136_{key}": value for key, value in acme.SETTINGS.items()}
    plugin = {"name": "dns-rfc2136", "settings": settings, "propagation_seconds": 0}
    secret, tls = {
        "token": (cloudflare.TOKEN, api.pillar()),
        "global key": (cloudflare.KEY, api.pillar(token=None, email=cloudflare.EMAIL, api_key=cloudflare.KEY)),
        "TSIG key": (acme.KEY, authority.pillar()),
        "plugin's settings": (acme.KEY, authority.pillar(challenge="plugin", plugin=plugin)),
        "external account": (acme.ACCOUNT_KEY, authority.pillar(**account)),
    }[way]
    know(master, authority, nodes, tls)
    for name, host in asking.items():
        # certbot asks, whatever it has.
        host.sh("cd /etc/letsencrypt && rm -rf accounts archive csr keys live renewal")
        returned = salt(master, name, "state.apply", "xmpp.certificates", check=False)
        assert wrong(returned[name]) == {}
        assert "xmpp_|-certbot_certificate_|-xmpp_|-certbot" in changed(returned[name])
        assert secret not in json.dumps(returned)
        own = f"{SECRETS}/certbot.ini" if way == "external account" else CREDENTIALS
        assert found_in(host, secret) == {own}
    assert found_in(master, secret, who="salt-master") == {"/srv/pillar/xmpp.sls"}


def test_a_node_that_is_dead_keeps_no_other_from_renewing(master, nodes, authority):
    nodes[FIRST].kill()
    for name, host in nodes.items():
        if name != FIRST:
            before = serial(host, f"{LIVE}/cert.pem")
            done = renew(host, "--force-renewal")
            assert done.returncode == 0, done.stderr
            assert serial(host, f"{LIVE}/cert.pem") != before
    nodes[FIRST].start()


def test_a_node_that_is_added_has_it_at_once(lab, master, nodes, authority):
    know(master, authority, NODES)
    host = minion(lab, master, LAST)
    nodes[FIRST].kill()
    states = salt(master, LAST, "state.apply", "xmpp", check=False)[LAST]
    assert wrong(states) == {}
    assert names_of(host) == {*NAMES, LAST}
    # A node without roles has nothing else of the service.
    assert {state["__sls__"].split(".")[1] for state in states.values()} == {"modules", "certificates", "certbot"}
    states = salt(master, LAST, "state.apply", "xmpp", check=False)[LAST]
    assert (wrong(states), changed(states)) == ({}, {})
