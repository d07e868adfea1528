"""
A small XMPP client
===================

What :py:func:`xmpp.check` needs to be a stranger to the service: TLS as clients and servers use it, SCRAM, stanzas. It
is made of the standard library alone, since it must work in whatever Python Salt runs in, with nothing to install.
"""

import base64
import collections
import hashlib
import hmac
import os
import re
import socket
import ssl
import time
import xml.etree.ElementTree as ET
from xml.sax import saxutils

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"

NS = {
    "bind": "urn:ietf:params:xml:ns:xmpp-bind",
    "cb": "urn:xmpp:sasl-cb:0",
    "client": "jabber:client",
    "errors": "urn:ietf:params:xml:ns:xmpp-streams",
    "sasl": "urn:ietf:params:xml:ns:xmpp-sasl",
    "server": "jabber:server",
    "stanzas": "urn:ietf:params:xml:ns:xmpp-stanzas",
    "stream": "http://etherx.jabber.org/streams",
    "tls": "urn:ietf:params:xml:ns:xmpp-tls",
}
SCRAM = tuple(f"SCRAM-SHA-{bits}{plus}" for plus in ("-PLUS", "") for bits in (512, 256, 1))
STEP = 10


def __virtual__():
    return __virtualname__


def session(address, port, domain, tls="starttls", trust=None, server=False, timeout=STEP):
    """
    Open an XMPP stream over TLS, with the certificate verified, and return it. For other modules: what it returns is an
    object, of no use on the command line. Close it, or use it in a ``with`` statement.

    address
        IP address to connect to. (string)

    port
        TCP port. (integer)

    domain
        The domain that is asked for: it stands in the stream's ``to``, in SNI, and must stand in the certificate.
        (string)

    tls
        ``starttls``, or ``direct`` for TLS from the first byte with the ALPN name ``xmpp-client`` or ``xmpp-server``.
        (string, default ``starttls``)

    trust
        Path of a PEM file with certificate authorities that are trusted besides the system's. (string, default none)

    server
        Speak as another server does. (boolean, default False)

    timeout
        Seconds after which all that is done with the session is over. One answer is waited for 10 s at most. (number,
        default 10)

    Returns a session: attributes ``mechanisms`` (of SASL, over TLS), ``tls_required`` (whether the server did nothing
    before TLS), ``certificate`` (as ``ssl.SSLSocket.getpeercert`` gives it), ``tls_version``, ``jid``; methods
    ``login``, ``offers_binding``, ``send``, ``iq``, ``receive``, ``take``, ``close``.

    Raises ``CommandExecutionError`` when the server does not speak XMPP as it should, ``OSError`` (``ssl.SSLError``,
    ``TimeoutError``, ``ConnectionRefusedError``) when the connection or TLS fails, ``SaltInvocationError`` for another
    ``tls``.

    Source: RFC 6120, RFC 7590, XEP-0368.

    CLI Example:

    .. code-block:: bash

        # for modules: with __salt__["xmpp.session"]("192.0.2.10", 5222, "example.org") as session: ...
        salt '*' sys.doc xmpp.session
    """
    if tls not in ("starttls", "direct"):
        raise SaltInvocationError(f"xmpp.session: tls is {tls!r}; expected starttls or direct")
    return _Session(address, port, domain, tls, trust, server, timeout)


class _Reader:
    """Cuts what a server sends into the stream's header, its stanzas, and its end."""

    def __init__(self):
        self._parser = ET.XMLPullParser(events=("start", "end"))
        self._depth = 0
        self._root = None
        self._held = b""

    def feed(self, data):
        # Newer versions of expat (CVE-2023-52425) put off a token whose end comes by itself until much more has come,
        # which here never may: so no token is given to it in pieces.
        data = self._held + data
        whole = data.rfind(b">") + 1 if self._root is not None or data.lstrip().startswith(b"<") else len(data)
        data, self._held = data[:whole], data[whole:]
        # RFC 6120, 11.1 forbids them; refusing them keeps a hostile server from making entities grow.
        if b"<!DOCTYPE" in data:
            raise CommandExecutionError("the server sent a document type declaration, which XMPP forbids")
        self._shown = re.sub(r"\s+", " ", data[:80].decode("ascii", "replace"))
        self._parser.feed(data)

    def elements(self):
        """What is complete by now: ``("open" | "stanza" | "close", element)``."""
        try:
            for event, element in self._parser.read_events():
                if event == "start":
                    self._depth += 1
                    if self._depth == 1:
                        self._root = element
                        yield "open", element
                else:
                    self._depth -= 1
                    if self._depth == 1:
                        yield "stanza", element
                        self._root.remove(element)
                    elif self._depth == 0:
                        yield "close", element
        except ET.ParseError as wrong:
            raise CommandExecutionError(f"what the server sent is no XML ({wrong}): {self._shown}") from wrong


class _Scram:
    """One SCRAM exchange, the client's side (RFC 5802, RFC 7677)."""

    def __init__(self, mechanism, username, password, nonce=None, binding=None):
        name = mechanism.removeprefix("SCRAM-").removesuffix("-PLUS")
        self._hash = {"SHA-1": "sha1", "SHA-256": "sha256", "SHA-512": "sha512"}[name]
        kind, data = binding if mechanism.endswith("-PLUS") else (None, b"")
        self._gs2 = f"p={kind},," if kind else "n,,"
        self._binding = base64.b64encode(self._gs2.encode() + data).decode()
        self._password = password.encode()
        self._nonce = nonce or base64.b64encode(os.urandom(24)).decode()
        self._bare = f"n={username.replace('=', '=3D').replace(',', '=2C')},r={self._nonce}"
        self._signature = None

    def _hmac(self, key, text):
        return hmac.new(key, text, self._hash).digest()

    def first(self):
        return self._gs2 + self._bare

    def final(self, challenge):
        fields = dict(field.split("=", 1) for field in challenge.split(",") if "=" in field)
        if "m" in fields or not {"r", "s", "i"} <= set(fields):
            raise CommandExecutionError("SCRAM: the server's challenge is not as RFC 5802 wants it")
        if not fields["r"].startswith(self._nonce) or fields["r"] == self._nonce:
            raise CommandExecutionError("SCRAM: the server did not extend the nonce")
        salted = hashlib.pbkdf2_hmac(self._hash, self._password, base64.b64decode(fields["s"]), int(fields["i"]))
        client_key = self._hmac(salted, b"Client Key")
        without_proof = f"c={self._binding},r={fields['r']}"
        signed = f"{self._bare},{challenge},{without_proof}".encode()
        signature = self._hmac(hashlib.new(self._hash, client_key).digest(), signed)
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        self._signature = self._hmac(self._hmac(salted, b"Server Key"), signed)
        return f"{without_proof},p={base64.b64encode(proof).decode()}"

    def verify(self, final):
        """The server, too, must prove that it knows the password."""
        fields = dict(field.split("=", 1) for field in final.split(",") if "=" in field)
        if not self._signature or not hmac.compare_digest(base64.b64decode(fields.get("v", "")), self._signature):
            raise CommandExecutionError("SCRAM: the server's signature is wrong: it does not know the password")


class _Session:
    def __init__(self, address, port, domain, tls, trust, server, timeout):
        self.domain = domain
        self.jid = None
        self.tls_required = True
        self._deadline = time.monotonic() + timeout
        self._kind = "server" if server else "client"
        self._waiting = collections.deque()
        self._count = 0
        self._reader = None
        self._socket = socket.create_connection((address, port), self._left())
        try:
            if tls == "direct":
                self._encrypt(trust, [f"xmpp-{self._kind}"])
            else:
                self._starttls(trust)
            self._open()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _left(self):
        left = min(self._deadline - time.monotonic(), STEP)
        if left <= 0:
            raise TimeoutError("the time for this is over")
        return left

    def _encrypt(self, trust, alpn=None):
        context = ssl.create_default_context()
        # Python 3.13 demands more of a certificate than what clients do: the answer would depend on Salt's Python.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if trust:
            context.load_verify_locations(trust)
        if alpn:
            context.set_alpn_protocols(alpn)
        self._socket.settimeout(self._left())
        self._socket = context.wrap_socket(self._socket, server_hostname=self.domain)
        self.certificate = self._socket.getpeercert()
        self.tls_version = self._socket.version()

    def _starttls(self, trust):
        self._open()
        starttls = self._features.find("tls:starttls", NS)
        if starttls is None:
            raise CommandExecutionError("STARTTLS is not offered")
        self.tls_required = starttls.find("tls:required", NS) is not None and not self.mechanisms
        self.send(f"<starttls xmlns='{NS['tls']}'/>")
        answer = self._next()
        if answer.tag != f"{{{NS['tls']}}}proceed":
            raise CommandExecutionError("STARTTLS is offered, but the server then refuses it")
        self._encrypt(trust)

    def _open(self):
        """A new stream: its header, and the features that the server answers with."""
        self._reader = _Reader()
        self._events = iter(())
        self.send(
            f"<?xml version='1.0'?><stream:stream to={saxutils.quoteattr(self.domain)} version='1.0' "
            f"xmlns='{NS[self._kind]}' xmlns:stream='{NS['stream']}'>"
        )
        event, header = self._event()
        if event != "open" or header.tag != f"{{{NS['stream']}}}stream":
            raise CommandExecutionError(f"the answer is no XMPP stream, but <{header.tag}>")
        self._features = self._next()
        if self._features.tag != f"{{{NS['stream']}}}features":
            raise CommandExecutionError(f"the stream has no features, but <{self._features.tag}>")
        self.mechanisms = [each.text for each in self._features.findall("sasl:mechanisms/sasl:mechanism", NS)]

    def send(self, text):
        """Send a stanza, given as text."""
        self._socket.settimeout(self._left())
        self._socket.sendall(text.encode())

    def _event(self):
        while True:
            for event in self._events:
                return event
            self._socket.settimeout(self._left())
            data = self._socket.recv(65536)
            if not data:
                raise CommandExecutionError("the server closed the connection")
            self._reader.feed(data)
            self._events = self._reader.elements()

    def _next(self):
        event, element = self._event()
        if event == "close":
            raise CommandExecutionError("the server closed the stream")
        if element.tag == f"{{{NS['stream']}}}error":
            raise CommandExecutionError(f"the server ended the stream: {_condition(element, 'errors')}")
        return element

    def receive(self, wanted):
        """The next stanza, out of those that came and those to come, for which ``wanted(stanza)`` is true."""
        for stanza in self._waiting:
            if wanted(stanza):
                self._waiting.remove(stanza)
                return stanza
        end = time.monotonic() + self._left()
        while time.monotonic() < end:
            stanza = self._next()
            if wanted(stanza):
                return stanza
            self._waiting.append(stanza)
        raise TimeoutError("the awaited stanza did not come")

    def take(self, wanted):
        """All the stanzas out of those that came already for which ``wanted(stanza)`` is true."""
        taken = [stanza for stanza in self._waiting if wanted(stanza)]
        self._waiting = collections.deque(stanza for stanza in self._waiting if stanza not in taken)
        return taken

    def iq(self, kind, payload, to=None):
        """Ask (``get`` or ``set``) and return the answer; an error becomes ``CommandExecutionError``."""
        self._count += 1
        name = f"check{self._count}"
        address = f" to={saxutils.quoteattr(to)}" if to else ""
        self.send(f"<iq id='{name}' type='{kind}'{address}>{payload}</iq>")
        answer = self.receive(lambda stanza: stanza.tag == f"{{{NS['client']}}}iq" and stanza.get("id") == name)
        if answer.get("type") != "result":
            raise CommandExecutionError(_condition(answer.find("client:error", NS), "stanzas"))
        return answer

    def login(self, localpart, password, binding=False, resource="check"):
        """
        Authenticate with the strongest SCRAM that is offered, with ``binding`` only among those with channel binding,
        without it only among the others; then bind a resource. Returns the mechanism.
        """
        offered = self.mechanisms
        mechanism = next((each for each in SCRAM if each in offered and each.endswith("-PLUS") == binding), None)
        if not mechanism:
            raise CommandExecutionError(f"no such SCRAM is offered, only {', '.join(offered) or 'nothing'}")
        scram = _Scram(mechanism, localpart, password, binding=self._binding() if binding else None)
        self.send(f"<auth xmlns='{NS['sasl']}' mechanism='{mechanism}'>{_encoded(scram.first())}</auth>")
        answer = self._sasl("challenge", mechanism)
        self.send(f"<response xmlns='{NS['sasl']}'>{_encoded(scram.final(_decoded(answer)))}</response>")
        scram.verify(_decoded(self._sasl("success", mechanism)))
        self._open()
        bound = self.iq("set", f"<bind xmlns='{NS['bind']}'><resource>{resource}</resource></bind>")
        self.jid = bound.findtext("bind:bind/bind:jid", namespaces=NS)
        return mechanism

    def _sasl(self, expected, mechanism):
        answer = self._next()
        if answer.tag == f"{{{NS['sasl']}}}failure":
            raise CommandExecutionError(f"{mechanism} is refused: {_condition(answer, 'sasl')}")
        if answer.tag != f"{{{NS['sasl']}}}{expected}":
            raise CommandExecutionError(f"{mechanism}: the server answers <{answer.tag}>; expected <{expected}>")
        return answer

    def offers_binding(self):
        """Whether a channel binding is offered that this client can do: ``tls-server-end-point``."""
        kinds = [each.get("type") for each in self._features.findall("cb:sasl-channel-binding/cb:channel-binding", NS)]
        return "tls-server-end-point" in kinds and any(each.endswith("-PLUS") for each in self.mechanisms)

    def _binding(self):
        return "tls-server-end-point", _end_point(self._socket.getpeercert(binary_form=True))

    def close(self):
        """End the stream, politely while that is possible."""
        try:
            self._socket.settimeout(0.5)
            self._socket.sendall(b"</stream:stream>")
        except (OSError, ValueError):
            pass
        finally:
            self._socket.close()


def _encoded(text):
    return base64.b64encode(text.encode()).decode()


def _decoded(element):
    return base64.b64decode(element.text or "").decode()


def _condition(error, namespace):
    """The defined condition of a stream's, stanza's or SASL error, with its text."""
    if error is None:
        return "an error without a condition"
    conditions = [each.tag.rpartition("}")[2] for each in error if each.tag.startswith(f"{{{NS[namespace]}}}")]
    text = next((each.text for each in error if each.tag.endswith("}text") and each.text), None)
    named = ", ".join(each for each in conditions if each != "text") or "an error without a condition"
    return f"{named} ({text})" if text else named


def _end_point(der):
    """The channel binding ``tls-server-end-point`` (RFC 5929, 4.1): the certificate hashed as its signature is."""
    _, start, _ = _der(der, 0)
    _, _, end = _der(der, start)
    _, algorithm, _ = _der(der, end)
    _, first, last = _der(der, algorithm)
    name = {
        "2a864886f70d01010c": "sha384",
        "2a864886f70d01010d": "sha512",
        "2a8648ce3d040303": "sha384",
        "2a8648ce3d040304": "sha512",
    }.get(der[first:last].hex(), "sha256")
    return hashlib.new(name, der).digest()


def _der(data, at):
    """The tag of the DER value at a place, where its content begins, and where it ends."""
    length, start = data[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(data[start : start + size], "big"), start + size
    return data[at], start, start + length
