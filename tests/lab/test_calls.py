"""STUN and TURN (RFC 8489, RFC 8656) with the credentials that the server gives to its users (XEP-0215)."""

import hashlib
import hmac
import os
import socket
import struct

import pytest

from .clients import WAIT, asynchronous
from .service import ADDRESSES, DOMAIN

COOKIE = 0x2112A442
BINDING, ALLOCATE, CREATE_PERMISSION = 0x0001, 0x0003, 0x0008
USERNAME, MESSAGE_INTEGRITY, ERROR_CODE, XOR_PEER_ADDRESS = 0x0006, 0x0008, 0x0009, 0x0012
REALM, NONCE, XOR_RELAYED_ADDRESS, REQUESTED_TRANSPORT, XOR_MAPPED_ADDRESS = 0x0014, 0x0015, 0x0016, 0x0019, 0x0020
UDP = struct.pack("!BBH", 17, 0, 0)


class Turn:
    """A client of STUN and TURN on one UDP socket; ``credentials``: name and password."""

    def __init__(self, credentials=None, address=ADDRESSES[0]):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.settimeout(WAIT)
        self.socket.connect((address, 3478))
        self.credentials = credentials
        self.realm = self.nonce = None

    def ask(self, method, *attributes):
        """Return the answer's class ("success" or an error's number) and its attributes."""
        kind, answer = self._ask(method, attributes)
        if kind == 401 and self.credentials and self.nonce is None:
            self.realm, self.nonce = answer[REALM], answer[NONCE]
            kind, answer = self._ask(method, attributes)
        return kind, answer

    def _ask(self, method, attributes):
        attributes = list(attributes)
        if self.nonce:
            attributes += [(USERNAME, self.credentials[0].encode()), (REALM, self.realm), (NONCE, self.nonce)]
        body = b"".join(attribute(*each) for each in attributes)
        number = os.urandom(12)

        def header(length):
            return struct.pack("!HHI", method, length, COOKIE) + number

        if self.nonce:
            key = hashlib.md5(
                ":".join([self.credentials[0], self.realm.decode(), self.credentials[1]]).encode()
            ).digest()
            integrity = hmac.new(key, header(len(body) + 24) + body, hashlib.sha1).digest()
            body += attribute(MESSAGE_INTEGRITY, integrity)
        self.socket.send(header(len(body)) + body)
        answer = self.socket.recv(2048)
        kind, length = struct.unpack("!HH", answer[:4])
        assert answer[8:20] == number and kind & 0x3EEF == method
        found, rest = {}, answer[20 : 20 + length]
        while rest:
            name, size = struct.unpack("!HH", rest[:4])
            found[name] = rest[4 : 4 + size]
            rest = rest[4 + (size + 3) // 4 * 4 :]
        if kind & 0x0110 == 0x0110:
            return found[ERROR_CODE][2] * 100 + found[ERROR_CODE][3], found
        return "success", found


def attribute(name, value):
    """One attribute, padded."""
    return struct.pack("!HH", name, len(value)) + value + bytes(-len(value) % 4)


def xored(address, port):
    """The value of an attribute that tells an IPv4 address, and the other way round."""
    plain = struct.unpack("!I", socket.inet_aton(address))[0]
    return struct.pack("!BBHI", 0, 1, port ^ (COOKIE >> 16), plain ^ COOKIE)


def unxored(value):
    _, _, port, address = struct.unpack("!BBHI", value)
    return socket.inet_ntoa(struct.pack("!I", address ^ COOKIE)), port ^ (COOKIE >> 16)


@pytest.mark.parametrize("address", ADDRESSES, ids=["IPv4", "IPv6"])
def test_everybody_is_told_his_address(service, address):
    client = Turn(address=address)
    kind, answer = client.ask(BINDING)
    assert kind == "success"
    if ":" not in address:
        assert unxored(answer[XOR_MAPPED_ADDRESS]) == client.socket.getsockname()


def test_strangers_get_no_relay(service):
    assert Turn().ask(ALLOCATE, (REQUESTED_TRANSPORT, UDP))[0] == 401
    assert Turn(("1999999999:stranger", "guess")).ask(ALLOCATE, (REQUESTED_TRANSPORT, UDP))[0] in (401, 441)


@asynchronous
async def test_users_get_a_relay_that_reaches_the_world_but_not_the_machine_itself(outside):
    async with outside.client("juliet") as juliet:
        answer = await juliet.ask("get", "<services xmlns='urn:xmpp:extdisco:2'/>", DOMAIN)
    offered = [dict(each.attrib) for each in answer.xml.iter("{urn:xmpp:extdisco:2}service")]
    assert {(each["type"], each["transport"], each["port"]) for each in offered} >= {
        ("stun", "udp", "3478"),
        ("turn", "udp", "3478"),
    }
    turn = next(each for each in offered if (each["type"], each["transport"]) == ("turn", "udp"))
    assert turn["host"] in (ADDRESSES[0], DOMAIN)
    client = Turn((turn["username"], turn["password"]))
    kind, answer = client.ask(ALLOCATE, (REQUESTED_TRANSPORT, UDP))
    assert kind == "success", (kind, answer)
    relay = unxored(answer[XOR_RELAYED_ADDRESS])
    assert relay[0] == ADDRESSES[0] and 49152 <= relay[1] <= 49407
    # Somebody else in the world, who sends to the relay, is heard when the user allowed it.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("192.0.2.1", 0))
        assert client.ask(CREATE_PERMISSION, (XOR_PEER_ADDRESS, xored(*peer.getsockname())))[0] == "success"
        peer.sendto(b"hello", relay)
        assert b"hello" in client.socket.recv(2048)
    for inner in ("127.0.0.1", "10.0.0.1", "169.254.169.254"):
        assert client.ask(CREATE_PERMISSION, (XOR_PEER_ADDRESS, xored(inner, 5281)))[0] == 403, inner
