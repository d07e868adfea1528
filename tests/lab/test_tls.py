"""TLS of every port as Mozilla's intermediate profile (5.7) has it: https://wiki.mozilla.org/Security/Server_Side_TLS."""

import contextlib
import datetime
import socket
import ssl
import warnings

import pytest

from .clients import WAIT, Stream
from .service import ADDRESSES, DOMAIN

INTERMEDIATE = {
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "DHE-RSA-AES128-GCM-SHA256",
    "DHE-RSA-AES256-GCM-SHA384",
    "DHE-RSA-CHACHA20-POLY1305",
}
# Port, what stands before TLS, ALPN.
PORTS = {
    "5222": (5222, "jabber:client", None),
    "5223": (5223, None, "xmpp-client"),
    "5269": (5269, "jabber:server", None),
    "443 for browsers": (443, None, "http/1.1"),
    "443 for XMPP": (443, None, "xmpp-client"),
}
V = ssl.TLSVersion


def context(lowest, highest, ciphers="ALL:eNULL"):
    """A client that takes everything that OpenSSL knows, from version ``lowest`` to ``highest``."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    with warnings.catch_warnings():
        # Old versions are what is asked for.
        warnings.simplefilter("ignore", DeprecationWarning)
        made.minimum_version, made.maximum_version = lowest, highest
    return made


def handshake(port, before, alpn, client):
    """Return version and cipher of a handshake of ``client``, or None when the server refuses it."""
    if alpn:
        client.set_alpn_protocols([alpn])
    with contextlib.ExitStack() as stack:
        try:
            if before:
                stream = stack.enter_context(
                    Stream(port, before, more=f"from='{DOMAIN}'" * (before == "jabber:server"))
                )
                stream.starttls(client)
                wrapped = stream.socket
            else:
                wrapped = stack.enter_context(socket.create_connection((ADDRESSES[0], port), WAIT))
                wrapped = stack.enter_context(client.wrap_socket(wrapped, server_hostname=DOMAIN))
        except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
            return None
        return wrapped.version(), wrapped.cipher()[0]


@pytest.mark.parametrize("where", PORTS)
def test_versions(service, where):
    accepted = {}
    for version in (V.TLSv1, V.TLSv1_1, V.TLSv1_2, V.TLSv1_3):
        accepted[version.name] = bool(handshake(*PORTS[where], context(version, version)))
    assert accepted == {"TLSv1": False, "TLSv1_1": False, "TLSv1_2": True, "TLSv1_3": True}


def test_the_client_of_these_tests_knows_old_versions_and_ciphers():
    """Otherwise the others here would prove nothing."""
    for version in (V.TLSv1, V.TLSv1_1):
        client = context(version, version)
        assert client.minimum_version == version
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            client.wrap_bio(incoming, outgoing, server_hostname=DOMAIN).do_handshake()
        assert outgoing.read(), "a ClientHello"
    names = {cipher["name"] for cipher in context(V.TLSv1_2, V.TLSv1_2).get_ciphers()}
    assert names >= {"AES128-SHA", "ECDHE-ECDSA-AES128-SHA", "AES256-GCM-SHA384", "NULL-SHA"}


@pytest.mark.parametrize("where", PORTS)
def test_ciphers(service, where):
    accepted, offered = (
        set(),
        [c["name"] for c in context(V.TLSv1_2, V.TLSv1_2).get_ciphers() if not c["name"].startswith("TLS_")],
    )
    # The server takes one of those offered, until there is none left that it would take.
    while chosen := handshake(*PORTS[where], context(V.TLSv1_2, V.TLSv1_2, ":".join(offered))):
        assert chosen[1] in offered, chosen
        accepted.add(chosen[1])
        offered.remove(chosen[1])
    assert accepted and accepted <= INTERMEDIATE, accepted - INTERMEDIATE
    assert handshake(*PORTS[where], context(V.TLSv1_3, V.TLSv1_3))[1] in INTERMEDIATE


@pytest.mark.parametrize("where", PORTS)
def test_who_knows_the_authority_can_verify_the_certificate(outside, where):
    assert handshake(*PORTS[where], outside.tls())
    assert handshake(*PORTS[where], ssl.create_default_context()) is None, "verified by whom?"


@pytest.mark.parametrize(
    "name", [DOMAIN, *(f"{label}.{DOMAIN}" for label in ("conference", "proxy", "pubsub", "upload"))]
)
def test_every_name_is_in_the_certificate(outside, name):
    connection = socket.create_connection((ADDRESSES[0], 5223), WAIT)
    with outside.tls("xmpp-client").wrap_socket(connection, server_hostname=DOMAIN) as client:
        certificate = client.getpeercert()
        assert ("DNS", name) in certificate["subjectAltName"]
        left = ssl.cert_time_to_seconds(certificate["notAfter"]) - datetime.datetime.now().timestamp()
        assert 60 < left / 86400 <= 90
