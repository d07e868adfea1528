"""certbot: what of its record differs from what is wanted, what it says and what to do about it, who renews."""

import time

import pytest
from salt.exceptions import CommandExecutionError

from tests.unit.ejabberd.conftest import load  # noqa: F401

OPTIONS = {
    "server": "https://acme.example.org/dir",
    "key-type": "ecdsa",
    "authenticator": "dns-rfc2136",
    "dns-rfc2136-credentials": "/root/c.ini",
    "deploy-hook": "/usr/local/lib/xmpp/certbot-deploy",
}
RECORD = """\
version = 4.0.0
[renewalparams]
account = b28599d917cae053e80a85d6705c693d
key_type = ecdsa
renew_hook = /usr/local/lib/xmpp/certbot-deploy
server = https://acme.example.org/dir
authenticator = dns-rfc2136
dns_rfc2136_credentials = /root/c.ini
"""
WEBROOT = """\
[renewalparams]
authenticator = webroot
webroot_path = /var/www/xmpp-acme,
[[webroot_map]]
example.org = /var/www/xmpp-acme
"""
NAMES = ["example.org", "upload.example.org"]


@pytest.fixture
def certbot(load, tmp_path):  # noqa: F811
    module = load("_modules/xmpp_certbot.py")
    module.HOME, module.days_left = str(tmp_path), 60
    module.__salt__["xmpp.certificate_info"] = lambda *_, dates: {"names": NAMES, "days_left": module.days_left}
    (tmp_path / "renewal").mkdir()
    (tmp_path / "renewal/xmpp.conf").write_text(RECORD)
    return module


def differs(certbot, names=NAMES, options=OPTIONS):
    return certbot.certbot_differs(options, names)


def test_nothing_differs(certbot):
    assert differs(certbot) == []


def test_there_is_none_yet(certbot, tmp_path):
    (tmp_path / "renewal/xmpp.conf").unlink()
    assert differs(certbot) == ["there is none yet"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*NAMES, "Further.example"], ["it lacks further.example"]),
        (NAMES[:1], ["it has upload.example.org too"]),
        (["a.example"], ["it lacks a.example", "it has example.org, upload.example.org too"]),
    ],
)
def test_other_names(certbot, names, expected):
    assert differs(certbot, names) == expected


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("key-type", "rsa", "ecdsa"),
        ("dns-rfc2136-credentials", "/root/d.ini", "/root/c.ini"),
        ("reuse-key", "true", "not set"),
        ("server", "https://b.example/", "https://acme.example.org/dir"),
        ("deploy-hook", "/root/x", "/usr/local/lib/xmpp/certbot-deploy"),
    ],
)
def test_other_settings(certbot, option, value, was):
    assert differs(certbot, options={**OPTIONS, option: value}) == [f"{option} was {was}, shall be {value}"]


def test_one_that_has_ended(certbot):
    certbot.days_left = -1
    assert differs(certbot) == ["it has ended"]


def test_a_key_that_was_kept(certbot, tmp_path):
    (tmp_path / "renewal/xmpp.conf").write_text(RECORD + "reuse_key = True\n")
    assert differs(certbot) == ["its key was kept at renewals, and shall not be"]


def test_a_list_in_the_record(certbot, tmp_path):
    (tmp_path / "renewal/xmpp.conf").write_text(WEBROOT)
    assert differs(certbot, options={"authenticator": "webroot", "webroot-path": "/var/www/xmpp-acme"}) == []


def test_a_record_that_cannot_be_read(certbot, tmp_path):
    (tmp_path / "renewal/xmpp.conf").write_text("rubbish")
    with pytest.raises(CommandExecutionError, match="certbot delete --cert-name xmpp"):
        differs(certbot)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Error determining zone_id: 9109 Invalid access token. Please confirm", "Cloudflare refuses the credentials"),
        ("Unable to determine zone_id for example.org using zone names: ['example.org']", "does not have the zone"),
        ("Detail: DNS problem: NXDOMAIN looking up TXT for _acme-challenge.example.org", "did not find the TXT record"),
        ('Detail: Incorrect TXT record "x" found at _acme-challenge.example.org', "did not find the TXT record"),
        ("Encountered error adding TXT record: The peer didn't know the key we used", "refuses the update"),
        ("Received response from server: NOTAUTH", "refuses the update"),
        ("Encountered error when making query: The DNS operation timed out.", "the DNS server does not answer"),
        ("urn:ietf:params:acme:error:rateLimited :: too many certificates (5)", "gives no more for now"),
        ("Error creating new order :: too many failed authorizations recently", "gives no more for now"),
        ("Max retries exceeded with url: /dir (Caused by SSLError(... CERTIFICATE_VERIFY_FAILED", "does not trust"),
        ("Max retries exceeded with url: /dir (Caused by NewConnectionError: Connection refused", "does not answer"),
        ("Type: connection Detail: 192.0.2.10: Fetching http://example.org/.well-known/acme-challenge/x", "port 80"),
        ("Another instance of Certbot is already running.", "apply again when it has ended"),
        ("something else", "see /var/log/letsencrypt/letsencrypt.log"),
    ],
)
def test_advice(certbot, said, advice):
    assert advice in certbot._advice(said)


def test_the_reason_is_what_certbot_does_not_say_always(certbot):
    text = "Saving debug log to /x\nRequesting a certificate for a and b\n\nDetail: so\n\nDetail: so\n"
    assert certbot._reason(text + "Ask for help or search for solutions at https://x") == "Detail: so"
    assert certbot._reason("") == "it says nothing"


# Who renews


@pytest.fixture
def renewal(load, tmp_path):  # noqa: F811
    running = {"certbot.timer": True, "cron": True}
    copies = [{"name": "/etc/ejabberd/certificate.pem", "group": "ejabberd", "service": "ejabberd"}]
    tls = {"source": "letsencrypt", "certificate": str(tmp_path / "fullchain.pem"), "key": "k", "copies": copies}
    plan = {"tls": tls, "init": {"systemd": True}}
    salt = {
        "xmpp.plan": lambda: plan,
        "xmpp.certbot_lineage": lambda: {"server": "x"},
        "xmpp.certificate_behind": lambda *_: [],
        "service.status": lambda name: running[name],
    }
    module = load("_modules/xmpp_renewal.py", __salt__=salt)
    (tmp_path / "fullchain.pem").write_text("x")
    module.CERTBOTS_LOG = str(tmp_path / "letsencrypt.log")
    module.NIGHTLY = module.CERTBOTS_CRON = str(tmp_path / "cron")
    module.plan, module.running, module.log = plan, running, tmp_path / "letsencrypt.log"
    return module


def test_certbot_renews(renewal):
    seen = renewal.certificate_renewal()
    assert seen == {"by": "certbot", "works": True, "seen": "renewed by certbot (certbot.timer)", "do": ""}


@pytest.mark.parametrize(
    ("function", "value", "seen"),
    [
        ("xmpp.certbot_lineage", {}, "certbot has no certificate yet"),
        ("xmpp.certbot_lineage", {"autorenew": "False"}, "autorenew = False"),
        ("xmpp.certificate_behind", ["/etc/ejabberd/certificate.pem"], "has another one than certbot"),
        ("service.status", False, "but that does not run"),
    ],
)
def test_certbot_does_not(renewal, function, value, seen):
    renewal.__salt__[function] = lambda *_: value
    found = renewal.certificate_renewal()
    assert found["works"] is False
    assert seen in found["seen"]
    assert found["do"]


@pytest.mark.parametrize(("ago", "works"), [(-60, False), (3600, True)])
def test_a_failure_counts_until_it_came_through(renewal, ago, works):
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - ago))
    said = "ERROR:certbot._internal.renewal:Failed to renew certificate xmpp with error: no route"
    renewal.log.write_text(f"{when},123:{said}\n")
    found = renewal.certificate_renewal()
    assert found["works"] is works
    assert ("no route" in found["seen"]) is not works


def test_without_systemd_it_is_cron(renewal):
    renewal.plan["init"]["systemd"] = False
    assert renewal.certificate_renewal()["works"] is False, "there is no job"
    with open(renewal.CERTBOTS_CRON, "w") as file:
        file.write("job")
    assert renewal.certificate_renewal()["seen"] == "renewed by certbot (cron)"
    renewal.running["cron"] = False
    assert renewal.certificate_renewal()["works"] is False


@pytest.mark.parametrize(("source", "by", "works"), [("internal", "Salt", False), ("files", "the operator", None)])
def test_others_renew(renewal, source, by, works):
    renewal.plan["tls"]["source"] = source
    found = renewal.certificate_renewal()
    assert (found["by"], found["works"]) == (by, works)
