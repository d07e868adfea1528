"""Other ways to a certificate: HTTP-01, any DNS plugin, an external account, a key that stays."""

import json

import pytest

from . import acme
from . import service as library
from .service import DOMAIN, SALT_CALL
from .test_certbot import CREDENTIALS, LIVE, NAMES, PILLAR_FILE, all_serve, applied_unseen, renew
from .test_certificates import serial

CONFIG = f"{library.SECRETS}/certbot.ini"


@pytest.fixture(scope="module")
def authority(lab):
    """An authority that gives accounts only to those whom it knows otherwise."""
    return acme.Acme(lab, binding=True)


ACCOUNT = {"external_account": {"kid": acme.ACCOUNT, "hmac_key": acme.ACCOUNT_KEY}}


def apply(machine, tls, *slses):
    library.give(machine, tls=tls)
    return library.apply(machine, *(slses or ["xmpp.certificates"]))


@pytest.fixture
def bare(service):
    """The service, and certbot has neither account nor certificate."""
    service.sh("cd /etc/letsencrypt && rm -rf accounts archive csr keys live renewal")
    return service


@pytest.fixture
def issued(service, authority):
    """The service with a certificate that was asked for by RFC 2136."""
    done = apply(service, authority.pillar(**ACCOUNT))
    assert done.code == 0, done.failed()
    return service


def test_an_account_that_is_not_known_otherwise(bare, authority):
    told = apply(bare, authority.pillar())["certbot_certificate"]["comment"]
    assert "What to do: set xmpp:tls:letsencrypt:external_account" in told, told


def test_by_http(bare, authority):
    """The authority fetches from port 80, under every name."""
    tls = authority.pillar(challenge="http", **ACCOUNT)
    library.give(bare, tls=tls)
    applied_unseen(bare, {acme.ACCOUNT_KEY: [CONFIG, PILLAR_FILE]}, "xmpp")
    all_serve(bare, authority)
    asked = bare.read("/var/log/nginx/access.log")
    assert asked.count("/.well-known/acme-challenge/") >= len(NAMES)
    assert apply(bare, tls, "xmpp").changed() == {}
    assert renew(bare, "--force-renewal").returncode == 0
    all_serve(bare, authority)


def test_by_any_plugin_with_its_own_settings(issued, authority):
    plugin = {
        "name": "dns-rfc2136",
        "settings": {f"dns_rfc2136_{key}": value for key, value in acme.SETTINGS.items()},
        # What differs from how it was asked for before.
        "propagation_seconds": 1,
    }
    tls = authority.pillar(challenge="plugin", plugin=plugin, **ACCOUNT)
    tls["letsencrypt"].pop("rfc2136")
    before = serial(issued, f"{LIVE}/cert.pem")
    library.give(issued, tls=tls)
    own = {acme.KEY: [CREDENTIALS, PILLAR_FILE], acme.ACCOUNT_KEY: [CONFIG, PILLAR_FILE]}
    done = applied_unseen(issued, own, "xmpp.certificates")
    assert "dns-rfc2136-propagation-seconds was 0, shall be 1" in str(done["certbot_certificate"]["changes"])
    assert serial(issued, f"{LIVE}/cert.pem") != before
    all_serve(issued, authority)
    assert apply(issued, tls).changed() == {}


def test_a_key_that_stays_is_pinned_in_the_dns(issued, authority):
    service = issued
    tls = authority.pillar(reuse_key=True, **ACCOUNT)
    done = apply(service, tls)
    assert done.code == 0, done.failed()
    assert apply(service, tls).changed() == {}
    key = service.read(f"{LIVE}/privkey.pem")
    records = call(service, "xmpp.dns_records")
    pins = [record for record in records if record["type"] == "TLSA"]
    assert {record["name"] for record in pins} == {f"_{port}._tcp.{DOMAIN}." for port in (443, 5222, 5223, 5269)}
    for record in pins:
        authority.update(f"update add {record['name']} {record['ttl']} TLSA {record['value']}")
    resolver = service.read("/etc/resolv.conf")
    service.put("/etc/resolv.conf", f"nameserver {acme.ADDRESS}\n")
    left = call(service, "xmpp.dns_records", "missing=True")
    service.put("/etc/resolv.conf", resolver)
    assert left and not [record for record in left if record["type"] == "TLSA"]
    before = serial(service, f"{LIVE}/cert.pem")
    assert renew(service, "--force-renewal").returncode == 0
    assert serial(service, f"{LIVE}/cert.pem") != before
    assert service.read(f"{LIVE}/privkey.pem") == key
    # As DANE's client sees it.
    shown = service.sh(
        f"openssl s_client -connect {DOMAIN}:5223 -alpn xmpp-client -dane_tlsa_domain {DOMAIN} "
        f"-dane_tlsa_rrdata '{pins[0]['value']}' -verify_return_error </dev/null"
    ).stdout
    assert "Verify return code: 0 (ok)" in shown
    # And back: then the next renewal has another key.
    assert apply(service, authority.pillar(**ACCOUNT)).code == 0
    assert service.read(f"{LIVE}/privkey.pem") != key
    assert not [record for record in call(service, "xmpp.dns_records") if record["type"] == "TLSA"]


def test_rsa_for_those_who_need_it(issued, authority):
    service = issued
    done = apply(service, authority.pillar(key_type="rsa", **ACCOUNT))
    assert done.code == 0, done.failed()
    assert "rsaEncryption" in service.run("openssl", "x509", "-in", f"{LIVE}/cert.pem", "-noout", "-text").stdout
    all_serve(service, authority)
    done = apply(service, authority.pillar(**ACCOUNT))
    assert done.code == 0, done.failed()
    assert "prime256v1" in service.run("openssl", "x509", "-in", f"{LIVE}/cert.pem", "-noout", "-text").stdout


def test_without_systemd_certbots_cron_job_renews(lab, authority, debian):
    machine = lab.host(f"plain.{DOMAIN}", layers=f"{debian}+salt+apps", init=None)
    library.prepare(machine)
    machine.put("/etc/salt/minion", f"{library.MINION}disable_modules: [systemd_service]\n")
    tls = authority.pillar(**ACCOUNT)
    done = apply(machine, tls)
    assert done.code == 0, done.failed()
    assert machine.run("pgrep", "--exact", "cron").stdout
    assert apply(machine, tls).changed() == {}
    # What cron does at some time in twelve hours, with the variables that it gives: now, and when it is due.
    job = machine.read("/etc/cron.d/certbot").splitlines()
    variables = dict(line.split("=", 1) for line in job if line and line.split("=")[0].isupper())
    command = next(line for line in job if "certbot -q renew" in line)
    command = "certbot -q renew " + command.partition("certbot -q renew")[2]
    before = serial(machine, f"{LIVE}/cert.pem")
    machine.sh("sed -i '1i renew_before_expiry = 91 days' /etc/letsencrypt/renewal/xmpp.conf")
    machine.run("env", "-i", *(f"{name}={value}" for name, value in variables.items()), "sh", "-c", command)
    assert serial(machine, f"{LIVE}/cert.pem") != before
    # The job is Debian's again when there is no authority of one's own.
    tls["letsencrypt"].pop("ca_bundle")
    apply(machine, tls)
    assert "cron.d" not in machine.run("dpkg", "--verify", "certbot", check=False).stdout
    assert "REQUESTS" not in machine.read("/etc/cron.d/certbot")
    machine.destroy()


# What is told of it


def call(machine, function, *arguments):
    done = machine.run(SALT_CALL, "--local", "--out=json", function, *arguments, check=False)
    return json.loads(done.stdout)["local"]


def test_status_says_how_long_and_who_renews(issued):
    seen = call(issued, "xmpp.status")
    assert seen["services"] == {"ejabberd": True, "nginx": True, "postgres": True}
    certificate = seen["certificate"]
    assert 89 < certificate["days_left"] < 90
    assert (certificate["source"], certificate["renewed_by"], certificate["renewal_works"]) == (
        "letsencrypt",
        "certbot",
        True,
    )
    assert certificate["seen"] == "renewed by certbot (certbot.timer)"
