"""The client: SCRAM by the vectors of its RFCs, the stream cut into stanzas, the channel binding."""

import base64
import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from salt.exceptions import CommandExecutionError, SaltInvocationError

OPEN = b"<?xml version='1.0'?><stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
# RFC 5802, 5, and RFC 7677, 3: user "user", password "pencil".
VECTORS = {
    "SCRAM-SHA-1": (
        "fyko+d2lbbFgONRv9qkxdawL",
        "r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096",
        "c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=",
        "v=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
    ),
    "SCRAM-SHA-256": (
        "rOprNGfwEbeRWgbNEkqO",
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
    ),
}


@pytest.fixture
def client(load):
    return load("_modules/xmpp_client.py")


@pytest.mark.parametrize("mechanism", VECTORS)
def test_scram_as_its_rfcs_show_it(client, mechanism):
    nonce, challenge, final, success = VECTORS[mechanism]
    scram = client._Scram(mechanism, "user", "pencil", nonce=nonce)
    assert scram.first() == f"n,,n=user,r={nonce}"
    assert scram.final(challenge) == final
    scram.verify(success)


def test_scram_with_channel_binding_signs_what_it_binds_to(client):
    nonce, challenge, final, _ = VECTORS["SCRAM-SHA-256"]
    scram = client._Scram("SCRAM-SHA-256-PLUS", "user", "pencil", nonce, binding=("tls-server-end-point", b"\x00hash"))
    assert scram.first() == f"p=tls-server-end-point,,n=user,r={nonce}"
    fields = dict(field.split("=", 1) for field in scram.final(challenge).split(","))
    assert base64.b64decode(fields["c"]) == b"p=tls-server-end-point,,\x00hash"
    assert fields["p"] not in final


@pytest.mark.parametrize(
    "success", ["v=AAAATRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", "v=", "", "e=invalid-proof", "x=6rriTRBi23Wp"]
)
def test_a_server_that_does_not_know_the_password_is_found_out(client, success):
    nonce, challenge, _, _ = VECTORS["SCRAM-SHA-256"]
    scram = client._Scram("SCRAM-SHA-256", "user", "pencil", nonce=nonce)
    scram.final(challenge)
    with pytest.raises(CommandExecutionError, match="does not know the password"):
        scram.verify(success)


@pytest.mark.parametrize(
    ("challenge", "reason"),
    [
        ("r=rOprNGfwEbeRWgbNEkqO,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "nonce"),
        ("r=somethingelse,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "nonce"),
        ("m=extension,r=rOprNGfwEbeRWgbNEkqOx,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", "RFC 5802"),
        ("r=rOprNGfwEbeRWgbNEkqOx,i=4096", "RFC 5802"),
        ("", "RFC 5802"),
    ],
)
def test_challenges_that_are_not_answered(client, challenge, reason):
    scram = client._Scram("SCRAM-SHA-256", "user", "pencil", nonce="rOprNGfwEbeRWgbNEkqO")
    with pytest.raises(CommandExecutionError, match=reason):
        scram.final(challenge)


def test_names_are_escaped(client):
    assert client._Scram("SCRAM-SHA-1", "a=b,c", "x", nonce="n").first() == "n,,n=a=3Db=2Cc,r=n"


def test_the_stream_is_cut_the_same_however_it_arrives(client):
    text = (
        OPEN + b"<a xmlns='x'><b>1</b></a> <message><body>\xc3\xa4 &amp; \xe2\x82\xac</body></message></stream:stream>"
    )
    for size in (1, 2, 3, 7, 50, len(text)):
        reader, seen = client._Reader(), []
        for at in range(0, len(text), size):
            reader.feed(text[at : at + size])
            seen += [
                (event, each.tag, "".join(each.itertext())) for event, each in reader.elements() if event != "open"
            ]
        assert seen[:2] == [("stanza", "{x}a", "1"), ("stanza", "{jabber:client}message", "ä & €")]
        assert [event for event, _, _ in seen[2:]] == ["close"]


def test_stanzas_do_not_pile_up(client):
    reader = client._Reader()
    reader.feed(OPEN)
    for _ in range(100):
        reader.feed(b"<message/>")
        list(reader.elements())
    assert len(reader._root) == 0


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_document_types_are_refused(client, size):
    bomb = b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;'>]><x>&b;</x>"
    reader = client._Reader()
    with pytest.raises(CommandExecutionError, match="document type"):
        for at in range(0, len(bomb), size):
            reader.feed(bomb[at : at + size])


def test_what_is_no_xml_is_shown(client):
    reader = client._Reader()
    with pytest.raises(CommandExecutionError, match=r"HTTP/1\.1 400 Bad Request"):
        reader.feed(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        list(reader.elements())


@pytest.mark.parametrize("hash", [hashes.SHA256, hashes.SHA384, hashes.SHA512])
@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_the_channel_binding_is_the_certificate_hashed_as_it_is_signed(client, hash, kind):
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "example.org")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(days=1)
    ).sign(key, hash())
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert client._end_point(der) == certificate.fingerprint(hash())


def test_conditions_are_told_with_their_text(client):
    error = client.ET.fromstring(
        "<error xmlns='jabber:client'><not-acceptable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>"
        "<text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'>too large</text></error>"
    )
    assert client._condition(error, "stanzas") == "not-acceptable (too large)"
    assert client._condition(None, "stanzas") == "an error without a condition"


def test_another_kind_of_tls_is_a_wrong_call(client):
    with pytest.raises(SaltInvocationError, match="expected starttls or direct"):
        client.session("192.0.2.10", 5222, "example.org", tls="plain")
