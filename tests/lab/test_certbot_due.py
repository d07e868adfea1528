"""A certificate that gets old: it is renewed when it is due, and where that fails the machine says so in time.

Not the clock is changed, but the certificate: it is one that the authority's key has signed so many days ago.
"""

import json

import pytest

from . import acme, clients
from . import service as library
from .service import DOMAIN, SALT_CALL
from .test_certbot import HOOK, LIVE, all_serve
from .test_certificates import nobody_drops, serial

LEFT = f"{DOMAIN}: certificate, time left"


@pytest.fixture(scope="module")
def authority(lab):
    return acme.Acme(lab)


@pytest.fixture(scope="module")
def node(service, authority):
    """The service with a certificate of the authority's, which the machine trusts as it does Let's Encrypt."""
    service.put("/usr/local/share/ca-certificates/acme.crt", authority.root)
    service.run("update-ca-certificates")
    library.give(service, tls=authority.pillar())
    applied = library.apply(service, "xmpp.certificates")
    assert applied.code == 0, applied.failed()
    return service


def aged(node, authority, days):
    """Let the node have a certificate that is so many days old, and serve it."""
    authority.age(node, days)
    node.run(HOOK)
    all_serve(node, authority)


def timer(node):
    """Do what certbot's timer does at its time: start its service. Return whether that went well."""
    node.run("systemctl", "reset-failed", "certbot.service", check=False)
    return node.run("systemctl", "start", "certbot.service", check=False).returncode == 0


def call(node, function):
    done = node.run(SALT_CALL, "--local", "--retcode-passthrough", "--out=json", function, check=False)
    return done.returncode, json.loads(done.stdout)["local"]


def told(node):
    """Return what ``xmpp.check`` says about the time that is left, and what ``xmpp.status`` does."""
    code, answer = call(node, "xmpp.check")
    probes = {probe["what"]: probe for probe in answer["probes"]}
    # Nothing but the certificate is wrong, if anything is.
    failed = [what for what, probe in probes.items() if probe["result"] == "failed"]
    assert failed in ([], [LEFT])
    assert (code != 0, answer["ok"]) == (failed == [LEFT], failed == [])
    return probes[LEFT], call(node, "xmpp.status")[1]["certificate"]


def test_after_59_days_nothing_is_asked_for(node, authority):
    aged(node, authority, 59)
    before, orders = serial(node, f"{LIVE}/cert.pem"), authority.orders()
    assert timer(node)
    assert (serial(node, f"{LIVE}/cert.pem"), authority.orders()) == (before, orders)
    probe, certificate = told(node)
    assert (probe["result"], probe["do"]) == ("ok", ""), probe
    assert "renewed by certbot (certbot.timer)" in probe["seen"]
    assert 30.9 < certificate["days_left"] < 31
    assert (certificate["renewal_works"], certificate["do"]) == (True, "")


def test_after_61_days_it_is_renewed_and_nobody_is_dropped(node, authority):
    aged(node, authority, 61)
    before = serial(node, f"{LIVE}/cert.pem")
    # The timer has half a day for it.
    probe, certificate = told(node)
    assert probe["result"] == "ok" and "less than a third of its 90 days" in probe["do"], probe
    assert 28.9 < certificate["days_left"] < 29
    with nobody_drops(node, clients.Outside(authority.root)):
        assert timer(node)
        assert serial(node, f"{LIVE}/cert.pem") != before
        all_serve(node, authority)
    probe, certificate = told(node)
    assert (probe["result"], probe["do"]) == ("ok", ""), probe
    assert 89 < certificate["days_left"] < 90


def test_where_the_timer_is_stopped_the_check_fails_in_the_last_third(node, authority):
    node.run("systemctl", "disable", "--now", "certbot.timer")
    try:
        aged(node, authority, 59)
        probe, certificate = told(node)
        assert probe["result"] == "ok" and "but that does not run" in probe["seen"] and probe["do"], probe
        assert certificate["renewal_works"] is False
        aged(node, authority, 61)
        probe, certificate = told(node)
        assert probe["result"] == "failed", probe
        assert "but that does not run: less than a third of its life is left" in probe["seen"]
        assert probe["do"] == certificate["do"] == "apply xmpp.certificates, which starts it"
        assert certificate["renewal_works"] is False
        # What it says is what helps.
        assert library.apply(node, "xmpp.certificates").failed() == {}
        for question, answer in {"is-active": "active", "is-enabled": "enabled"}.items():
            assert node.run("systemctl", question, "certbot.timer", check=False).stdout.strip() == answer
    finally:
        node.run("systemctl", "enable", "--now", "certbot.timer")
    probe, certificate = told(node)
    assert probe["result"] == "ok" and certificate["renewal_works"] is True, probe


def test_where_the_last_attempt_failed_the_check_fails_in_the_last_third(node, authority):
    aged(node, authority, 61)
    assert told(node)[0]["result"] == "ok"
    # The DNS server takes no updates.
    authority.host.run("rndc", "freeze", DOMAIN)
    try:
        assert not timer(node)
    finally:
        authority.host.run("rndc", "thaw", DOMAIN)
    all_serve(node, authority)
    probe, certificate = told(node)
    assert probe["result"] == "failed", probe
    assert "the last attempt failed: " in probe["seen"] and "less than a third of its life is left" in probe["seen"]
    assert certificate["renewal_works"] is False
    assert "see /var/log/letsencrypt/letsencrypt.log" in certificate["do"]
    # The next attempt is a good one.
    assert timer(node)
    probe, certificate = told(node)
    assert (probe["result"], probe["do"], certificate["renewal_works"]) == ("ok", "", True), probe
