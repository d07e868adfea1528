"""Cloudflare's DNS; and when there is no certificate to be had: the service goes on, reason and remedy are told."""

import contextlib
import threading

import pytest

from . import acme, clients, cloudflare
from . import service as library
from .service import DOMAIN
from .test_certbot import CREDENTIALS, LIVE, NAMES, PILLAR_FILE, all_serve, applied_unseen
from .test_certificates import PLACES, nobody_drops, serial, served


@pytest.fixture(scope="module")
def authority(lab):
    return acme.Acme(lab)


@pytest.fixture(scope="module")
def api(lab, authority):
    made = cloudflare.Cloudflare(lab, authority)
    yield made
    made.close()


def applied(machine, tls, log_level="warning"):
    library.give(machine, tls=tls)
    return library.apply(machine, "xmpp.certificates", log_level=log_level)


def refused(machine, tls):
    """Apply and return what is told; what serves is what served before."""
    before = [served_by_anyone(machine, place) for place in PLACES]
    done = applied(machine, tls)
    assert set(done.failed()) == {"certbot_certificate"}, done.failed()
    assert [served_by_anyone(machine, place) for place in PLACES] == before
    told = done["certbot_certificate"]["comment"]
    assert "What is in service stays in service" in told
    return told


def served_by_anyone(machine, place):
    """Return the serial number that is served, whoever issued it."""
    port, protocol = PLACES[place]
    shown = machine.sh(
        f"openssl s_client -connect {machine.address}:{port} -servername {DOMAIN} -alpn {protocol} "
        "</dev/null 2>/dev/null | openssl x509 -noout -serial"
    )
    return shown.stdout.strip()


def test_a_token_that_was_revoked(service, api):
    api.revoked = True
    try:
        told = refused(service, api.pillar())
    finally:
        api.revoked = False
    assert "Invalid access token" in told
    assert "What to do: Cloudflare refuses the credentials" in told
    assert cloudflare.TOKEN not in told


def test_a_record_that_is_not_in_the_dns_yet(service, api):
    api.lost = True
    try:
        told = refused(service, api.pillar())
    finally:
        api.lost = False
    assert f"Domain: {DOMAIN}" in told and "Type:   unauthorized" in told
    assert "What to do: the authority did not find the TXT record" in told


def test_a_key_that_the_dns_server_does_not_know(service, authority):
    tls = authority.pillar()
    tls["letsencrypt"]["rfc2136"]["name"] = "another."
    assert "What to do: the DNS server refuses the update" in refused(service, tls)


# Takes a minute and a half: certbot's plugin waits for 45 s, twice, and nothing can tell it otherwise.
def test_a_dead_dns_server(service, authority):
    authority.host.run("systemctl", "stop", "named")
    try:
        told = refused(service, authority.pillar())
    finally:
        authority.host.run("systemctl", "start", "named")
    assert "timed out" in told
    assert "What to do: the DNS server does not answer" in told


def test_an_authority_that_is_not_trusted(service, authority):
    tls = authority.pillar()
    tls["letsencrypt"].pop("ca_bundle")
    told = refused(service, tls)
    assert "CERTIFICATE_VERIFY_FAILED" in told
    assert "xmpp:tls:letsencrypt:ca_bundle" in told


def test_a_rate_limit(lab, service, authority):
    directory, server = authority.limited(lab)
    with contextlib.closing(server):
        told = refused(service, authority.pillar(directory=directory))
    assert "too many certificates (5) already issued" in told
    assert "retry after 2026-12-01" in told
    assert "What to do: the authority gives no more for now" in told


def test_cloudflare_with_a_token(service, authority, api, outside):
    library.give(service, tls=api.pillar())
    with nobody_drops(service, outside):
        applied_unseen(service, {cloudflare.TOKEN: [CREDENTIALS, PILLAR_FILE]}, "xmpp.certificates")
    all_serve(service, authority)
    assert {each.split()[0] for each in api.asked} == {"GET", "POST", "DELETE"}
    assert authority.txt(f"_acme-challenge.{DOMAIN}") == []
    assert applied(service, api.pillar()).changed() == {}


def test_cloudflare_with_the_global_key_and_a_wildcard_and_back(service, authority, api):
    token, key = api.pillar(), api.pillar(token=None, email=cloudflare.EMAIL, api_key=cloudflare.KEY)
    key["letsencrypt"]["wildcard"] = True
    assert applied(service, token).code == 0
    all_serve(service, authority)
    library.give(service, tls=key)
    with nobody_drops(service, clients.Outside(authority.root)), everyone_gets_in(authority):
        own = [CREDENTIALS, PILLAR_FILE]
        applied_unseen(service, {cloudflare.KEY: own, cloudflare.TOKEN: []}, "xmpp.certificates")
        all_serve(service, authority)
    assert names_of(service) == [f"DNS:*.{DOMAIN}", f"DNS:{DOMAIN}"]
    with nobody_drops(service, clients.Outside(authority.root)), everyone_gets_in(authority):
        assert applied(service, token).code == 0
        all_serve(service, authority)
    assert names_of(service) == sorted(f"DNS:{name}" for name in NAMES)


def names_of(machine):
    shown = machine.run("openssl", "x509", "-in", f"{LIVE}/cert.pem", "-noout", "-ext", "subjectAltName").stdout
    return sorted(each.strip() for each in shown.splitlines()[1].split(","))


@contextlib.contextmanager
def everyone_gets_in(authority):
    """All the while, new connections to every place under every name are served a certificate that is verified."""
    ended, served_well, wrong = threading.Event(), [], []

    def connect():
        while not ended.wait(0.01):
            for place in PLACES:
                for name in NAMES:
                    try:
                        served_well.append(served(place, name, authority.root))
                    except OSError as error:
                        wrong.append((place, name, error))

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert wrong == []
    # Those that were served before, and those after it.
    assert len(set(served_well)) == 2 and len(served_well) > 100


def test_the_internal_authority_again_and_certbot_gives_its_own_to_nobody(service, authority, outside):
    library.give(service)
    done = library.apply(service)
    assert done.code == 0, done.failed()
    for place in PLACES:
        assert served(place, DOMAIN, outside.ca) == serial(service)
    env = {"REQUESTS_CA_BUNDLE": "/etc/ssl/xmpp/certbot-trust.crt"}
    renewed = service.run("certbot", "renew", "--force-renewal", "--no-random-sleep-on-renew", env=env, check=False)
    assert renewed.returncode == 0, renewed.stderr
    for place in PLACES:
        assert served(place, DOMAIN, outside.ca) == serial(service)
    assert library.apply(service).changed() == {}
    assert clients.can_login(outside)
