"""
What a stranger reaches of an XMPP service besides its streams
===============================================================

HTTP, XMPP over WebSocket and BOSH, STUN: each asked once, at a given address, without asking the DNS. Made of the
standard library alone, for the reason that :py:mod:`xmpp_client` gives.
"""

import base64
import contextlib
import hashlib
import http.client
import ipaddress
import os
import random
import socket
import ssl
import struct
import time
import urllib.parse
import xml.etree.ElementTree as ET
from xml.sax import saxutils

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"

FRAMING = "urn:ietf:params:xml:ns:xmpp-framing"
HTTPBIND = "http://jabber.org/protocol/httpbind"
MECHANISM = "{urn:ietf:params:xml:ns:xmpp-sasl}mechanism"
WEBSOCKET_KEY = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
STUN_COOKIE = 0x2112A442
LARGEST = 16 * 1024 * 1024


def __virtual__():
    return __virtualname__


def http_request(url, address=None, method="GET", body=None, headers=None, trust=None, timeout=10):
    """
    Make one HTTP request, following no redirect.

    url
        ``http://`` or ``https://``. (string)

    address
        IP address to connect to, whatever the DNS says of the URL's host. (string, default: as the host resolves)

    method
        (string, default ``GET``)

    body
        What is sent. (bytes, default nothing)

    headers
        Name to value. (dict, default none)

    trust
        Path of a PEM file with certificate authorities that are trusted besides the system's. (string, default none)

    timeout
        Seconds for the whole exchange. (number, default 10)

    Returns ``{"status": 200, "headers": {"content-type": ...}, "body": bytes, "certificate": {...}}``: names of headers
    in small letters, the certificate as ``ssl.SSLSocket.getpeercert`` gives it, None without TLS.

    Raises ``OSError`` when the connection or TLS fails, ``CommandExecutionError`` when the answer is no HTTP or more
    than 16 MiB, ``SaltInvocationError`` when the URL is neither http nor https.

    Source: RFC 9110, RFC 9112.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.http_request https://example.org/.well-known/host-meta.json address=192.0.2.10
    """
    connection = _Connection(url, address, trust, timeout, ("http", "https"))
    try:
        # A server that refuses a body answers before it has read it all, and hangs up: its answer is still there.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, connection.target, body=body, headers=headers or {})
        # The connection forgets its socket as soon as the answer says that it is the last one.
        wire = connection.sock
        certificate = wire.getpeercert() if isinstance(wire, ssl.SSLSocket) else None
        response = connection.getresponse()
        received = b""
        while not response.isclosed():
            wire.settimeout(connection.left())
            piece = response.read1(65536)
            # Up to Python 3.12 the end is told only by an empty piece.
            if not piece:
                break
            received += piece
            if len(received) > LARGEST:
                raise CommandExecutionError(f"{url} answers with more than {LARGEST} bytes")
        return {
            "status": response.status,
            "headers": {name.lower(): value for name, value in response.getheaders()},
            "body": received,
            "certificate": certificate,
        }
    except http.client.HTTPException as wrong:
        raise CommandExecutionError(f"the answer of {url} is no HTTP ({type(wrong).__name__})") from wrong
    finally:
        connection.close()


def websocket_open(url, domain, address=None, trust=None, timeout=10):
    """
    Open an XMPP stream over WebSocket, and close it.

    url
        ``wss://`` or ``ws://``. (string)

    domain
        The domain that the stream is for. (string)

    address, trust, timeout
        As in :py:func:`xmpp.http_request`.

    Returns ``{"mechanisms": [...]}``: the SASL mechanisms of the stream's features.

    Raises ``OSError`` when the connection or TLS fails, ``CommandExecutionError`` when the server does not switch to
    WebSocket, or opens no XMPP stream, ``SaltInvocationError`` when the URL is neither ws nor wss.

    Source: RFC 6455, RFC 7395.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.websocket_open wss://example.org/ws example.org
    """
    key = base64.b64encode(os.urandom(16)).decode()
    connection = _Connection(url, address, trust, timeout, ("ws", "wss"))
    try:
        connection.request(
            "GET",
            connection.target,
            headers={
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": key,
                "Sec-WebSocket-Protocol": "xmpp",
            },
        )
        wire = connection.sock
        response = http.client.HTTPResponse(wire, method="GET")
        response.begin()
        accepted = base64.b64encode(hashlib.sha1((key + WEBSOCKET_KEY).encode()).digest()).decode()
        if response.status != 101 or response.getheader("Sec-WebSocket-Accept") != accepted:
            raise CommandExecutionError(f"{url} answers {response.status}, and does not switch to WebSocket")
        if response.getheader("Sec-WebSocket-Protocol") != "xmpp":
            raise CommandExecutionError(f"{url} does not agree to the sub-protocol xmpp")
        # The buffer of the response may hold the first frames already: all is read through it.
        frames = _Frames(response.fp, connection)
        frames.send(f"<open xmlns='{FRAMING}' to={saxutils.quoteattr(domain)} version='1.0'/>")
        opened, features = frames.receive(), frames.receive()
        if opened.tag != f"{{{FRAMING}}}open" or not features.tag.endswith("}features"):
            raise CommandExecutionError(f"{url} opens no XMPP stream, but sends <{opened.tag}>, <{features.tag}>")
        frames.send(f"<close xmlns='{FRAMING}'/>")
        return {"mechanisms": [each.text for each in features.iter(MECHANISM)]}
    except http.client.HTTPException as wrong:
        raise CommandExecutionError(f"the answer of {url} is no HTTP ({type(wrong).__name__})") from wrong
    finally:
        connection.close()


def bosh_open(url, domain, address=None, trust=None, timeout=10):
    """
    Open an XMPP stream over BOSH, and end it.

    url
        ``https://`` or ``http://``. (string)

    domain
        The domain that the stream is for. (string)

    address, trust, timeout
        As in :py:func:`xmpp.http_request`.

    Returns ``{"mechanisms": [...]}``: the SASL mechanisms of the stream's features.

    Raises ``OSError`` when the connection or TLS fails, ``CommandExecutionError`` when the server opens no session,
    ``SaltInvocationError`` when the URL is neither http nor https.

    Source: XEP-0124, XEP-0206.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.bosh_open https://example.org/bosh example.org
    """
    end = time.monotonic() + timeout
    rid = random.randrange(1, 2**40)

    def post(attributes):
        nonlocal rid
        rid += 1
        body = f"<body rid='{rid}' xmlns='{HTTPBIND}' xmlns:xmpp='urn:xmpp:xbosh' {attributes}/>"
        headers = {"Content-Type": "text/xml; charset=utf-8"}
        left = max(end - time.monotonic(), 0.1)
        answer = http_request(url, address, "POST", body.encode(), headers, trust, left)
        if answer["status"] != 200:
            raise CommandExecutionError(f"{url} answers {answer['status']}")
        element = _xml(answer["body"], url)
        if element.tag != f"{{{HTTPBIND}}}body" or element.get("type") == "terminate":
            raise CommandExecutionError(f"{url} opens no session: {element.get('condition') or element.tag}")
        return element

    opened = post(
        f"to={saxutils.quoteattr(domain)} wait='5' hold='1' ver='1.11' xml:lang='en' xmpp:version='1.0' "
        "content='text/xml; charset=utf-8'"
    )
    sid = opened.get("sid")
    if not sid:
        raise CommandExecutionError(f"{url} gives no session id")
    mechanisms = [each.text for each in opened.iter(MECHANISM)]
    if not mechanisms:
        mechanisms = [each.text for each in post(f"sid='{sid}'").iter(MECHANISM)]
    rid += 1
    http_request(
        url,
        address,
        "POST",
        f"<body rid='{rid}' sid='{sid}' type='terminate' xmlns='{HTTPBIND}'/>".encode(),
        {"Content-Type": "text/xml; charset=utf-8"},
        trust,
        max(end - time.monotonic(), 0.1),
    )
    return {"mechanisms": mechanisms}


def stun_binding(address, port=3478, timeout=4):
    """
    Ask a STUN server, over UDP, from which address this machine's question came.

    address
        IP address of the server. (string)

    port
        UDP port. (integer, default 3478)

    timeout
        Seconds; the question is repeated within them. (number, default 4)

    Returns ``{"mapped": [address, port], "own": [address, port]}``: as the server saw this end, and as it is. They
    differ behind NAT.

    Raises ``OSError`` when no answer comes, ``CommandExecutionError`` when the answer is no binding response.

    Source: RFC 8489.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.stun_binding 192.0.2.10
    """
    transaction = os.urandom(12)
    request = struct.pack("!HHI", 0x0001, 0, STUN_COOKIE) + transaction
    end = time.monotonic() + timeout
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as wire:
        wire.connect((address, port))
        pause = 0.5
        while (left := end - time.monotonic()) > 0:
            wire.send(request)
            wire.settimeout(min(pause, left))
            pause *= 2
            try:
                answer = wire.recv(2048)
            except TimeoutError:
                continue
            own = wire.getsockname()[:2]
            return {"mapped": _mapped(answer, transaction), "own": list(own)}
    raise TimeoutError("no answer came")


def _mapped(answer, transaction):
    """The address in a STUN binding response."""
    if len(answer) < 20 or answer[8:20] != transaction or answer[:2] != b"\x01\x01":
        raise CommandExecutionError("the answer is no STUN binding response")
    mask = struct.pack("!I", STUN_COOKIE) + transaction
    at = 20
    while at + 4 <= len(answer):
        kind, length = struct.unpack_from("!HH", answer, at)
        value = answer[at + 4 : at + 4 + length]
        if kind == 0x0020 and len(value) in (8, 20):
            packed = bytes(a ^ b for a, b in zip(value[4:], mask, strict=False))
            return [str(ipaddress.ip_address(packed)), struct.unpack_from("!H", value, 2)[0] ^ (STUN_COOKIE >> 16)]
        at += 4 + (length + 3) // 4 * 4
    raise CommandExecutionError("the STUN binding response has no XOR-MAPPED-ADDRESS")


class _Connection(http.client.HTTPConnection):
    """HTTP, over TLS or not, to an address that is given rather than looked up."""

    def __init__(self, url, address, trust, timeout, schemes):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in schemes or not parts.hostname:
            raise SaltInvocationError(f"{url!r} is no URL of this kind; expected {' or '.join(schemes)}://...")
        self._secure = parts.scheme == schemes[1]
        self._address, self._trust = address, trust
        self._end = time.monotonic() + timeout
        self.target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        self.default_port = 443 if self._secure else 80
        super().__init__(parts.hostname, parts.port, timeout=timeout)

    def left(self):
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for this is over")
        return left

    def connect(self):
        self.sock = socket.create_connection((self._address or self.host, self.port), self.left())
        if not self._secure:
            return
        context = ssl.create_default_context()
        # As in xmpp_client: the answer must not depend on Salt's Python.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if self._trust:
            context.load_verify_locations(self._trust)
        context.set_alpn_protocols(["http/1.1"])
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)


class _Frames:
    """WebSocket frames, each one XML element (RFC 6455, 5.2; RFC 7395, 3.3)."""

    def __init__(self, source, connection):
        self._source, self._connection = source, connection

    def send(self, text):
        payload, mask = text.encode(), os.urandom(4)
        length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._connection.sock.sendall(b"\x81" + length + mask + masked)

    def receive(self):
        text = b""
        while True:
            final, kind, payload = self._frame()
            if kind in (0x0, 0x1):
                text += payload
                if final:
                    return _xml(text, "the WebSocket")
            elif kind == 0x8:
                raise CommandExecutionError("the server closed the WebSocket")

    def _frame(self):
        first, second = self._read(2)
        length = second & 0x7F
        if length > 125:
            length = int.from_bytes(self._read(2 if length == 126 else 8), "big")
        if length > LARGEST:
            raise CommandExecutionError(f"the server sends a WebSocket frame of {length} bytes")
        return first & 0x80, first & 0x0F, self._read(length)

    def _read(self, length):
        self._connection.sock.settimeout(self._connection.left())
        data = self._source.read(length)
        if len(data) < length:
            raise CommandExecutionError("the server closed the connection")
        return data


def _xml(data, whence):
    if b"<!DOCTYPE" in data:
        raise CommandExecutionError(f"{whence} sends a document type declaration, which XMPP forbids")
    try:
        return ET.fromstring(data)
    except ET.ParseError as wrong:
        raise CommandExecutionError(f"{whence} sends what is no XML ({wrong})") from wrong
