"""XMPP from outside: real clients (slixmpp), and bare streams for what no client does."""

import asyncio
import contextlib
import functools
import socket
import ssl
import xml.etree.ElementTree as ET

import slixmpp

from .service import ADDRESSES, DOMAIN, USERS

WAYS = {"STARTTLS": 5222, "direct TLS": 5223, "HTTPS's port": 443}
WAIT = 10
PLUGINS = (
    "xep_0030", "xep_0045", "xep_0060", "xep_0115", "xep_0163", "xep_0118", "xep_0191",
    "xep_0280", "xep_0313", "xep_0363",
)  # fmt: skip


def asynchronous(test):
    """Let pytest run the coroutine ``test``."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


class Client(slixmpp.ClientXMPP):
    """One client of one account; ``messages`` is a queue of what it is sent."""

    def __init__(self, jid, password, trust, way="STARTTLS", plugins=()):
        super().__init__(jid, password, ssl_context=trust)
        self.use_aiodns = False
        self.enable_starttls, self.enable_direct_tls = way == "STARTTLS", way != "STARTTLS"
        for plugin in (*PLUGINS, *plugins):
            self.register_plugin(plugin)
        self.messages = asyncio.Queue()
        self.add_event_handler("message", self.messages.put_nowait)

    async def login(self, address, port):
        """Connect and log in, or raise ``PermissionError`` or ``ConnectionError`` with the reason."""
        done = asyncio.get_running_loop().create_future()

        def end(error):
            if not done.done():
                done.set_result(error)

        self.add_event_handler("session_start", lambda event: end(None))
        self.add_event_handler("session_resumed", lambda event: end(None))
        self.add_event_handler("failed_all_auth", lambda event: end(PermissionError(event)))
        self.add_event_handler("connection_failed", lambda event: end(ConnectionError(event)))
        self.connect(address, port)
        if error := await asyncio.wait_for(done, WAIT):
            raise error

    async def ask(self, kind, payload, to=None):
        """Send an IQ of ``kind`` with the XML ``payload`` and return the answer; an error raises ``IqError``."""
        iq = self.make_iq(itype=kind, ito=to)
        iq.append(ET.fromstring(payload))
        return await iq.send(timeout=WAIT)

    async def received(self, seconds=WAIT):
        """Return the next message that has a body."""
        while True:
            message = await asyncio.wait_for(self.messages.get(), seconds)
            if message["body"]:
                return message


class Outside:
    """Somebody on another machine who trusts the certificate authority ``ca`` (PEM)."""

    def __init__(self, ca):
        self.ca = ca

    def tls(self, *alpn):
        """Return how this somebody speaks TLS: certificates verified, ``alpn`` offered."""
        context = ssl.create_default_context(cadata=self.ca)
        if alpn:
            context.set_alpn_protocols(alpn)
        return context

    @contextlib.asynccontextmanager
    async def client(
        self, user, resource="phone", way="STARTTLS", address=ADDRESSES[0], password=None, plugins=(), online=True
    ):
        """Log ``user`` (local part) in and give the client; ``online``: send presence, as a person's client does."""
        jid = f"{user}@{DOMAIN}"
        trust = self.tls() if way == "STARTTLS" else self.tls("xmpp-client")
        client = Client(f"{jid}/{resource}", password or USERS[jid], trust, way, plugins)
        try:
            await client.login(address, WAYS[way])
            if online:
                client.send_presence()
                await client.get_roster()
            yield client
        finally:
            client.end_session_on_disconnect = True
            await client.disconnect(wait=1)
            client.cancel_connection_attempt()


def can_login(outside, user="juliet", password=None):
    """Return whether ``user`` can log in now; for waiting and for tests that look at something else."""

    async def login():
        async with outside.client(user, resource="probe", password=password, online=False) as client:
            return bool(client.boundjid.resource)

    return asyncio.run(login())


class Stream:
    """A bare XMPP stream over TCP: it does what it is told, allowed or not."""

    def __init__(self, port, namespace="jabber:client", address=ADDRESSES[0], more="", tls=None, to=DOMAIN):
        self.namespace, self.more, self.to = namespace, more, to
        self.socket = socket.create_connection((address, port), WAIT)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname=to)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, text):
        """Send ``text``."""
        self.socket.sendall(text.encode())

    def open(self):
        """Open the stream, anew after TLS, and return the features as an element."""
        self.parser, self.depth = ET.XMLPullParser(["start", "end"]), 0
        self.send(
            f"<?xml version='1.0'?><stream:stream to='{self.to}' version='1.0' xmlns='{self.namespace}' {self.more} "
            "xmlns:stream='http://etherx.jabber.org/streams'>"
        )
        return self.receive()

    def receive(self):
        """Return the next element below the stream, or None when the stream has ended."""
        while True:
            for event, element in self.parser.read_events():
                self.depth += 1 if event == "start" else -1
                if event == "end" and self.depth == 1:
                    return element
                if event == "end" and self.depth == 0:
                    return None
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self.parser.feed(data)
            self.parser.flush() if hasattr(self.parser, "flush") else None

    def starttls(self, context):
        """Negotiate TLS by ``context``."""
        features = self.open()
        assert features is not None and features.find("{urn:ietf:params:xml:ns:xmpp-tls}starttls") is not None, features
        self.send("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
        answer = self.receive()
        assert answer.tag == "{urn:ietf:params:xml:ns:xmpp-tls}proceed", ET.tostring(answer)
        self.socket = context.wrap_socket(self.socket, server_hostname=self.to)
