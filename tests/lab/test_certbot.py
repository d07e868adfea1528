"""A certificate from an ACME authority, proven by RFC 2136: from the first boot on, renewed, changed."""

import pytest

from . import acme, clients
from . import service as library
from .acme import LIVE
from .service import DOMAIN
from .test_certificates import LABELS, PLACES, Session, nobody_drops, processes, serial, served

RECORD = "/etc/letsencrypt/renewal/xmpp.conf"
CREDENTIALS, PILLAR_FILE = f"{library.SECRETS}/certbot_credentials.ini", f"{library.PILLAR}/more.sls"
HOOK = "/usr/local/lib/xmpp/certbot-deploy"
COPIES = ("/etc/ejabberd/certificate.pem", "/etc/nginx/xmpp/certificate.pem")
NAMES = [f"{label}{DOMAIN}" for label in LABELS]


@pytest.fixture(scope="module")
def authority(lab):
    return acme.Acme(lab)


@pytest.fixture(scope="module")
def node(lab, debian, authority):
    """A machine on which the formula was applied before the authority was there; ``first``: what that returned."""
    authority.stop()
    machine = library.host(lab, debian + library.LAYERS)
    library.prepare(machine)
    library.give(machine, tls=authority.pillar())
    machine.first = library.apply(machine, log_level="debug")
    yield machine
    machine.destroy()


def all_serve(machine, authority, names=NAMES):
    """Every program serves what certbot has, for each of ``names``, and the authority's root verifies it."""
    for place in PLACES:
        for name in names:
            assert served(place, name, authority.root) == serial(machine, f"{LIVE}/fullchain.pem"), (place, name)


def found_in(machine, secret, who="certbot"):
    """Return the files of ``machine``, and its journal, which has lines of ``who``, in which ``secret`` stands."""
    grep = "grep --recursive --text --files-with-matches --no-messages --fixed-strings --devices=skip --file=/dev/stdin"
    roots = "/dev/shm /etc /home /opt /root /run /srv /tmp /usr/local /var"
    listed = machine.sh(f"{grep} --exclude-dir=xmpp-formula {roots} || true", input=f"{secret}\n").stdout.splitlines()
    journal = machine.run("journalctl", "--no-pager", "--all", "--output=export").stdout
    assert who in journal
    return {*listed, *(["the journal"] if secret in journal else [])}


def applied_unseen(machine, secrets, *arguments):
    """Apply, with certbot asking, and return what that returned: no secret of certbot's was seen then or afterwards.

    Not in a command line, in what Salt returns or logs at its level debug, in any log, the journal or a cache.
    ``secrets``: a dict of each to the files that have it.
    """
    argv = machine.lab.folder / f"argv-{machine.name}.txt"
    with library.Watch(argv):
        applied = library.apply(machine, *arguments, log_level="debug")
    assert applied.code == 0, applied.failed()
    lines = argv.read_bytes()
    # They are seen who could tell.
    assert b"certbot certonly" in lines and b"certbot-deploy" in lines
    assert "[DEBUG   ]" in applied.text
    for secret, own in secrets.items():
        assert secret.encode() not in lines
        assert secret not in applied.text
        assert found_in(machine, secret) == set(own)
    return applied


def renew(machine, *options, env=()):
    """Have certbot renew, as its timer does it, and return what it said."""
    env = {"REQUESTS_CA_BUNDLE": "/etc/ssl/xmpp/certbot-trust.crt", **dict(env)}
    return machine.run("certbot", "renew", "--no-random-sleep-on-renew", *options, env=env, check=False)


def test_the_first_boot_does_not_wait_for_the_authority(node, authority):
    assert set(node.first.failed()) == {"certbot_certificate"}
    said = node.first["certbot_certificate"]["comment"]
    assert "Connection refused" in said
    assert "What to do: the ACME server (or the DNS API) does not answer" in said
    internal = node.read("/etc/ssl/xmpp/ca.crt")
    for place in PLACES:
        assert served(place, DOMAIN, internal) == serial(node)
    assert clients.can_login(clients.Outside(internal))


def test_when_it_comes_both_reload_and_nobody_is_dropped(node, authority):
    authority.start()
    with nobody_drops(node, clients.Outside(node.read("/etc/ssl/xmpp/ca.crt"))):
        applied = applied_unseen(node, {acme.KEY: [CREDENTIALS, PILLAR_FILE]}, "xmpp")
        assert set(applied.changed()) == {"certbot_certificate"}
    all_serve(node, authority)
    assert clients.can_login(clients.Outside(authority.root))
    assert authority.txt(f"_acme-challenge.{DOMAIN}") == [], "certbot cleans up"


@pytest.mark.parametrize("test", [True, False], ids=["in test mode", "for real"])
def test_applied_again_nothing_changes_and_nothing_is_asked(node, authority, test):
    before = authority.log()
    applied = library.apply(node, "xmpp", f"test={test}")
    assert (applied.changed(), applied.code) == ({}, 0), applied.failed()
    assert authority.log() == before


def test_what_is_asked_for(node):
    shown = node.run("openssl", "x509", "-in", f"{LIVE}/fullchain.pem", "-noout", "-text").stdout
    assert "prime256v1" in shown
    for name in NAMES:
        assert f"DNS:{name}" in shown
    assert shown.count("DNS:") == len(NAMES)


def test_who_can_read_what(node):
    for path, expected in {
        "/etc/salt/xmpp/secrets/certbot.ini": "root:root 600",
        "/etc/salt/xmpp/secrets/certbot_credentials.ini": "root:root 600",
        "/etc/letsencrypt/live": "root:root 700",
        "/etc/letsencrypt/archive": "root:root 700",
        "/etc/letsencrypt/archive/xmpp/privkey1.pem": "root:root 600",
        COPIES[0]: "root:ejabberd 640",
        COPIES[1]: "root:root 600",
    }.items():
        assert node.run("stat", "--format=%U:%G %a", path).stdout.strip() == expected, path


def test_a_renewal_drops_nobody_and_new_ones_see_it(node, authority):
    before = serial(node, f"{LIVE}/fullchain.pem")
    key = node.read(f"{LIVE}/privkey.pem")
    with nobody_drops(node, clients.Outside(authority.root)):
        assert renew(node).returncode == 0
        assert serial(node, f"{LIVE}/fullchain.pem") == before, "it is not due"
        done = renew(node, "--force-renewal")
        assert done.returncode == 0, done.stderr
        assert serial(node, f"{LIVE}/fullchain.pem") != before
        all_serve(node, authority)
        Session(clients.Outside(authority.root), "nurse", clients.WAYS["direct TLS"]).socket.close()
    assert node.read(f"{LIVE}/privkey.pem") != key
    assert library.apply(node).changed() == {}


def test_certbots_own_timer_does_it(node, authority):
    assert node.run("systemctl", "is-active", "certbot.timer").stdout.strip() == "active"
    assert node.run("systemctl", "is-enabled", "certbot.timer").stdout.strip() == "enabled"
    # What the timer starts, when the certificate is due.
    before = serial(node, f"{LIVE}/fullchain.pem")
    node.sh(f"sed -i '1i renew_before_expiry = 91 days' {RECORD}")
    node.run("systemctl", "start", "certbot.service")
    node.sh(f"sed -i '/^renew_before_expiry/d' {RECORD}")
    assert serial(node, f"{LIVE}/fullchain.pem") != before
    all_serve(node, authority)


@pytest.fixture
def kept(node):
    """Return the texts of what certbot keeps, which are put back."""
    texts = {name: node.read(f"{LIVE}/{name}.pem") for name in ("cert", "chain", "fullchain", "privkey")}
    yield texts
    for name, text in texts.items():
        acme.put(node, name, text)


def rubbish(node, authority, kept, fault):
    """Let certbot have got a certificate with a ``fault``, and return what must be said of it."""
    match fault:
        case "no key":
            acme.put(node, "privkey", "rubbish\n")
            return "privkey.pem is no unencrypted PEM private key"
        case "another key":
            acme.put(node, "privkey", node.read("/etc/salt/xmpp/secrets/internal_key"))
            return "privkey.pem is not the key of"
        case "no certificate":
            acme.put(node, "fullchain", "rubbish\n")
            return "fullchain.pem is no PEM certificate"
        case "a chain of others":
            acme.put(node, "fullchain", kept["cert"] + node.read("/etc/ssl/xmpp/ca.crt"))
            return "is not issued by"
        case "a name is missing":
            authority.age(node, 1, [f"upload.{DOMAIN}"])
            return f"but not {DOMAIN}"
        case "it has ended":
            authority.age(node, 91)
            return "not now"
        case "it has not begun":
            authority.age(node, -1)
            return "not now"


FAULTS = "no key", "another key", "no certificate", "a chain of others", "a name is missing", "it has ended"


@pytest.mark.parametrize("fault", [*FAULTS, "it has not begun"])
def test_a_renewal_that_brings_rubbish_changes_nothing(node, authority, kept, fault):
    before, ran = [node.read(copy) for copy in COPIES], processes(node)
    said = rubbish(node, authority, kept, fault)
    hook = node.run(HOOK, check=False)
    assert hook.returncode != 0
    assert said in hook.stdout + hook.stderr
    assert [node.read(copy) for copy in COPIES] == before
    assert processes(node) == ran
    assert clients.can_login(clients.Outside(authority.root))


@pytest.mark.parametrize("fault", ["no key", "another key"])
def test_what_certbot_keeps_is_damaged_and_the_state_says_what_helps(node, authority, kept, fault):
    before, ran = [node.read(copy) for copy in COPIES], processes(node)
    said = rubbish(node, authority, kept, fault)
    applied = library.apply(node)
    assert set(applied.failed()) == {"ejabberd_certificate", "nginx_certificate", "certbot_certificate"}
    assert said in applied["certbot_certificate"]["comment"]
    assert "certbot renew --force-renewal --cert-name xmpp" in applied["certbot_certificate"]["comment"]
    assert [node.read(copy) for copy in COPIES] == before
    assert processes(node) == ran
    assert clients.can_login(clients.Outside(authority.root))


def test_what_helps_where_it_is_damaged(node, authority):
    good = node.read(f"{LIVE}/privkey.pem")
    acme.put(node, "privkey", "rubbish\n")
    done = renew(node, "--force-renewal", "--cert-name", "xmpp")
    assert done.returncode == 0, done.stderr
    assert library.apply(node).failed() == {}
    all_serve(node, authority)
    assert good not in node.read(COPIES[0])


def test_a_name_more_then_one_less(node, authority):
    library.give(node, tls=authority.pillar(), virtual_hosts=[acme.FURTHER])
    orders = authority.orders()
    with nobody_drops(node, clients.Outside(authority.root)):
        told = library.apply(node, "xmpp", "test=True")
        assert told["certbot_certificate"]["result"] is None
        assert acme.FURTHER in str(told["certbot_certificate"]["changes"])
        assert authority.orders() == orders
        applied = library.apply(node)
        assert applied.code == 0, applied.failed()
        all_serve(node, authority, [*NAMES, *(f"{label}{acme.FURTHER}" for label in LABELS)])
    assert library.apply(node).changed() == {}
    library.give(node, tls=authority.pillar())
    applied = library.apply(node)
    assert applied.code == 0, applied.failed()
    assert "further" not in node.run("openssl", "x509", "-in", f"{LIVE}/fullchain.pem", "-noout", "-text").stdout
    all_serve(node, authority)
    assert library.apply(node).changed() == {}
    assert authority.orders() == orders + 2
