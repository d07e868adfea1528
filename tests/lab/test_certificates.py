"""Certificates: made, and replaced under connected clients; a wrong one leaves the old in service."""

import base64
import contextlib
import socket
import ssl
import subprocess

import pytest

from . import clients
from . import service as library
from .service import ADDRESSES, DOMAIN, wait_for

pytestmark = pytest.mark.parametrize("debian", ["trixie"], indirect=True)
FURTHER = "further.example"
LABELS = ("", "conference.", "proxy.", "pubsub.", "upload.")
CA, SERVER, KEY = "/etc/ssl/xmpp/ca.crt", "/etc/ssl/xmpp/internal.crt", f"{library.SECRETS}/internal_key"
# What speaks TLS: ejabberd by itself, ejabberd behind nginx, nginx.
PLACES = {"ejabberd": (5223, "xmpp-client"), "XMPP on 443": (443, "xmpp-client"), "HTTPS": (443, "http/1.1")}


def served(place, name=DOMAIN, ca=None):
    """Return the serial number of the certificate that is served for ``name``, verified by ``ca`` (PEM) alone."""
    port, protocol = PLACES[place]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=ca)
    context.set_alpn_protocols([protocol])
    plain = socket.create_connection((ADDRESSES[0], port), 5)
    with plain, context.wrap_socket(plain, server_hostname=name) as connection:
        return connection.getpeercert()["serialNumber"].lstrip("0")


def serial(host, path=SERVER):
    shown = host.run("openssl", "x509", "-in", path, "-noout", "-serial").stdout
    return shown.strip().partition("=")[2].lstrip("0")


def processes(host):
    """Who serves: no restart may have happened. nginx's workers come and go with a reload."""
    return host.sh("pgrep -u ejabberd -x beam.smp; cat /run/nginx.pid").stdout


@contextlib.contextmanager
def nobody_drops(host, outside):
    """Two users are connected, one by ejabberd's port and one by nginx's, and still write to each other at the end."""
    before = processes(host)
    streams = []
    for user, way in (("juliet", "direct TLS"), ("romeo", "HTTPS's port")):
        streams.append(Session(outside, user, clients.WAYS[way]))
    juliet, romeo = streams
    try:
        juliet.says(romeo, "before")
        yield
        juliet.says(romeo, "after")
        romeo.says(juliet, "after")
    finally:
        for each in streams:
            each.socket.close()
    assert processes(host) == before


class Session:
    """A client with as little as it takes, over one TLS connection that is never opened again."""

    def __init__(self, outside, user, port):
        self.jid = f"{user}@{DOMAIN}"
        plain = socket.create_connection((ADDRESSES[0], port), 10)
        self.socket = outside.tls("xmpp-client").wrap_socket(plain, server_hostname=DOMAIN)
        self.open()
        secret = base64.b64encode(f"\0{user}\0{library.USERS[self.jid]}".encode()).decode()
        self.ask(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{secret}</auth>", "<success")
        self.open()
        bind = "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>certificates</resource></bind>"
        self.ask(f"<iq type='set' id='b'>{bind}</iq>", "certificates</jid>")
        self.ask("<presence/>", "<presence")

    def open(self):
        header = f"<?xml version='1.0'?><stream:stream to='{DOMAIN}' version='1.0' xmlns='jabber:client' "
        self.ask(header + "xmlns:stream='http://etherx.jabber.org/streams'>", "</stream:features>")

    def ask(self, text, until):
        self.socket.sendall(text.encode())
        return self.wait(until)

    def wait(self, until):
        seen = ""
        while until not in seen:
            data = self.socket.recv(65536)
            assert data, f"{self.jid} was dropped; it had {seen!r}"
            seen += data.decode()
        return seen

    def says(self, other, text):
        self.socket.sendall(
            f"<message type='chat' to='{other.jid}/certificates'><body>{text}</body></message>".encode()
        )
        other.wait(f"<body>{text}</body>")


def all_serve(host, ca, names=(DOMAIN,)):
    """Every program serves the certificate that is on disk now, for each of ``names``."""
    for place in PLACES:
        for name in names:
            wait_for(lambda place=place, name=name: served(place, name, ca) == serial(host), 10, f"{place} for {name}")


# The internal certificate authority


def test_the_chain_is_verified_by_the_ca_alone_and_has_all_names(service, outside):
    all_serve(service, outside.ca, [f"{label}{DOMAIN}" for label in LABELS])
    with pytest.raises(ssl.SSLCertVerificationError):
        served("ejabberd", FURTHER, outside.ca)
    ca = service.run("openssl", "x509", "-in", CA, "-noout", "-text").stdout
    assert "CA:TRUE, pathlen:0" in ca
    purpose = service.run(
        "openssl", "x509", "-in", SERVER, "-noout", "-ext", "basicConstraints,extendedKeyUsage"
    ).stdout
    assert "CA:FALSE" in purpose
    assert "TLS Web Server Authentication" in purpose


def test_who_can_read_the_keys(service):
    for path, expected in {
        f"{library.SECRETS}/ca_key": "root:root 600",
        KEY: "root:root 600",
        "/etc/ejabberd/certificate.pem": "root:ejabberd 640",
        "/etc/nginx/xmpp/certificate.pem": "root:root 600",
        CA: "root:root 644",
    }.items():
        assert service.run("stat", "--format=%U:%G %a", path).stdout.strip() == expected, path


# Files of the operator's


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return a function that makes a chain of an authority of the operator's own: (chain, key, ca) as PEM."""
    folder = tmp_path_factory.mktemp("own")

    def make(names=tuple(f"{label}{DOMAIN}" for label in LABELS)):
        def openssl(*argv):
            subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)

        new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")
        if not (folder / "ca.pem").exists():
            openssl(*new, "-subj", "/CN=Own", "-keyout", "ca.key", "-out", "ca.pem")
        alternative = "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)
        openssl(*new, "-subj", "/CN=server", "-addext", alternative, "-addext", "basicConstraints=critical,CA:FALSE",
                "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "key.pem", "-out", "server.pem")  # fmt: skip
        chain, key, ca = ((folder / name).read_text() for name in ("server.pem", "key.pem", "ca.pem"))
        return chain + ca, key, ca

    return make


def give_files(service, certificate, key):
    library.give(service, tls={"source": "files", "files": {"certificate": certificate, "key": key}})


def test_files_by_path_then_a_new_key_and_nobody_is_dropped(service, outside, own):
    chain, key, ca = own()
    service.put("/root/own/chain.pem", chain)
    service.put("/root/own/key.pem", key, mode="0600")
    give_files(service, "/root/own/chain.pem", "/root/own/key.pem")
    with nobody_drops(service, outside):
        applied = library.apply(service)
        assert applied.code == 0, applied.failed()
        for place in PLACES:
            assert served(place, f"upload.{DOMAIN}", ca) == serial(service, "/root/own/chain.pem")
    assert library.apply(service).changed() == {}
    # The operator's renewal brings a new key.
    chain, key, ca = own()
    service.put("/root/own/chain.pem", chain)
    service.put("/root/own/key.pem", key, mode="0600")
    with nobody_drops(service, clients.Outside(ca)):
        assert set(library.apply(service).changed()) >= {"ejabberd_certificate", "nginx_certificate"}
        for place in PLACES:
            wait_for(lambda place=place: served(place, DOMAIN, ca) == serial(service, "/root/own/chain.pem"), 10, place)


@pytest.mark.parametrize("fault", ["rubbish", "the key of another", "a name is missing", "no such file"])
def test_what_is_wrong_leaves_the_old_one_in_service(service, own, fault):
    old = service.read("/root/own/chain.pem")
    ca = old[old.rindex("-----BEGIN") :]
    before, running = serial(service, "/root/own/chain.pem"), processes(service)
    chain, key, _ = own((DOMAIN,) if fault == "a name is missing" else [f"{label}{DOMAIN}" for label in LABELS])
    if fault == "the key of another":
        key = own()[1]
    service.put("/root/bad/chain.pem", "rubbish" if fault == "rubbish" else chain)
    service.put("/root/bad/key.pem", key, mode="0600")
    give_files(service, "/root/bad/none.pem" if fault == "no such file" else "/root/bad/chain.pem", "/root/bad/key.pem")
    applied = library.apply(service)
    assert applied.code != 0
    assert set(applied.failed()) >= {"ejabberd_certificate", "nginx_certificate"}
    says = {
        "rubbish": "/root/bad/chain.pem is no PEM certificate",
        "the key of another": "/root/bad/key.pem is not the key of /root/bad/chain.pem",
        "a name is missing": "but not conference.example.org",
        "no such file": "/root/bad/none.pem cannot be read",
    }
    for state in ("ejabberd_certificate", "nginx_certificate"):
        assert says[fault] in applied[state]["comment"]
    assert "PRIVATE KEY" not in applied.text
    for place in PLACES:
        assert served(place, DOMAIN, ca) == before
    assert processes(service) == running


def test_back_to_the_internal_authority(service, outside):
    library.give(service)
    applied = library.apply(service)
    assert applied.code == 0, applied.failed()
    all_serve(service, outside.ca)
