"""HTTP, WebSocket, BOSH and STUN: answers as they should be, and as they should not."""

import base64
import contextlib
import hashlib
import http.server
import socket
import struct
import threading
import time

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError

MECHANISMS = (
    "<stream:features xmlns:stream='http://etherx.jabber.org/streams'>"
    "<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>SCRAM-SHA-256</mechanism></mechanisms>"
    "</stream:features>"
)


@pytest.fixture
def reach(load):
    return load("_modules/xmpp_reach.py")


@pytest.mark.parametrize(
    ("attribute", "address"),
    [
        # RFC 5769, 2.2 and 2.3.
        ("002000080001a147e112a643", "192.0.2.1"),
        ("002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9", "2001:db8:1234:5678:11:2233:4455:6677"),
    ],
)
def test_stun_answers_as_its_rfc_shows_them(reach, attribute, address):
    transaction = bytes.fromhex("b7e7a701bc34d686fa87dfae")
    software = bytes.fromhex("8022000b7465737420766563746f7220")
    body = software + bytes.fromhex(attribute)
    answer = struct.pack("!HHI", 0x0101, len(body), 0x2112A442) + transaction + body
    assert reach._mapped(answer, transaction) == [address, 32853]


@pytest.mark.parametrize("answer", [b"", b"\x01\x01" + bytes(18), b"\x01\x11" + bytes(6) + b"t" * 12])
def test_what_is_no_stun_answer(reach, answer):
    with pytest.raises(CommandExecutionError, match="STUN"):
        reach._mapped(answer, b"t" * 12)


def test_a_lost_datagram_is_sent_again(reach):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve():
            server.recvfrom(2048)
            question, sender = server.recvfrom(2048)
            packed = bytes(a ^ b for a, b in zip(socket.inet_aton(sender[0]), question[4:8], strict=True))
            port = sender[1] ^ 0x2112
            value = struct.pack("!HHBBH", 0x20, 8, 0, 1, port) + packed
            server.sendto(struct.pack("!HH", 0x0101, len(value)) + question[4:20] + value, sender)

        threading.Thread(target=serve, daemon=True).start()
        answer = reach.stun_binding("127.0.0.1", server.getsockname()[1])
    assert answer["mapped"] == answer["own"]


def test_stun_gives_up_in_time(reach):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        with pytest.raises(TimeoutError):
            reach.stun_binding("127.0.0.1", server.getsockname()[1], timeout=0.5)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        self.server.act(self)

    do_GET = do_PUT = do_POST = do  # noqa: N815

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.place = f"example.org:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_http_goes_to_the_given_address_with_the_name_of_the_url(reach, server):
    def act(request):
        body = request.rfile.read(int(request.headers["Content-Length"]))
        request.answer(201, f"{request.command} {request.path} {request.headers['Host']}".encode() + body, X_Test="Yes")

    server.act = act
    answer = reach.http_request(f"http://{server.place}/a?b=c", "127.0.0.1", "PUT", b" body")
    assert answer == {
        "status": 201,
        "headers": answer["headers"],
        "body": f"PUT /a?b=c {server.place} body".encode(),
        "certificate": None,
    }
    assert answer["headers"]["x-test"] == "Yes"


def test_a_body_that_is_refused_before_it_was_read(reach, server):
    def act(request):
        request.close_connection = True
        request.answer(413, b"too large", Connection="close")

    server.act = act
    assert reach.http_request(f"http://{server.place}/", "127.0.0.1", "PUT", bytes(2**24))["status"] == 413


def test_an_endless_answer_is_cut(reach, server):
    reach.LARGEST = 100_000
    server.act = lambda request: request.answer(200, bytes(200_000))
    with pytest.raises(CommandExecutionError, match="more than 100000 bytes"):
        reach.http_request(f"http://{server.place}/", "127.0.0.1")


def test_a_slow_answer_ends_in_time(reach, server):
    def act(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(20):
                request.wfile.write(b"x")
                threading.Event().wait(0.1)

    server.act = act
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        reach.http_request(f"http://{server.place}/", "127.0.0.1", timeout=0.5)
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("url", ["ftp://example.org/", "example.org", "https:///x"])
def test_what_is_no_url(reach, url):
    with pytest.raises(SaltInvocationError, match="expected http or https"):
        reach.http_request(url)


def frame(text, final=True, kind=1):
    payload = text.encode()
    length = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + struct.pack("!H", len(payload))
    return bytes([kind | (0x80 if final else 0)]) + length + payload


def websocket(*frames, protocol="xmpp", right=True):
    def act(request):
        key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11" * right
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        request.send_response(101)
        for name, value in (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept)):
            request.send_header(name, value)
        if protocol:
            request.send_header("Sec-WebSocket-Protocol", protocol)
        request.end_headers()
        for each in frames:
            request.wfile.write(each)
        request.wfile.flush()
        request.rfile.read(1)
        request.close_connection = True

    return act


OPENED = "<open xmlns='urn:ietf:params:xml:ns:xmpp-framing' from='example.org' id='x' version='1.0'/>"


def test_websocket_frames_are_read_in_pieces_and_between_pings(reach, server):
    server.act = websocket(
        frame(OPENED), frame("", kind=9), frame(MECHANISMS[:20], final=False), frame(MECHANISMS[20:], kind=0)
    )
    answer = reach.websocket_open(f"ws://{server.place}/ws", "example.org", "127.0.0.1")
    assert answer == {"mechanisms": ["SCRAM-SHA-256"]}


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda request: request.answer(404), "answers 404"),
        (websocket(frame(OPENED), right=False), "does not switch"),
        (websocket(frame(OPENED), protocol=None), "sub-protocol"),
        (websocket(frame(OPENED), frame(OPENED)), "opens no XMPP stream"),
        (websocket(frame("<close xmlns='urn:ietf:params:xml:ns:xmpp-framing'/>"), frame(MECHANISMS)), "opens no XMPP"),
        (websocket(frame(""), frame(MECHANISMS)), "no XML"),
        (websocket(frame(OPENED), frame("", kind=8)), "closed the WebSocket"),
        (websocket(frame("<!DOCTYPE x><x/>")), "document type"),
    ],
)
def test_what_is_no_xmpp_over_websocket(reach, server, act, reason):
    server.act = act
    with pytest.raises(CommandExecutionError, match=reason):
        reach.websocket_open(f"ws://{server.place}/ws", "example.org", "127.0.0.1")


def bosh(*bodies):
    left = list(bodies)
    requests = []

    def act(request):
        requests.append(request.rfile.read(int(request.headers["Content-Length"])).decode())
        request.answer(200, left.pop(0).encode() if left else b"")

    act.requests = requests
    return act


BODY = "<body xmlns='http://jabber.org/protocol/httpbind' {}>{}</body>"


@pytest.mark.parametrize(
    "bodies",
    [
        [BODY.format("sid='s1'", MECHANISMS)],
        [BODY.format("sid='s1'", ""), BODY.format("", MECHANISMS)],
    ],
)
def test_bosh_gives_its_features_at_once_or_when_asked_again(reach, server, bodies):
    server.act = bosh(*bodies)
    answer = reach.bosh_open(f"http://{server.place}/bosh", "example.org", "127.0.0.1")
    assert answer == {"mechanisms": ["SCRAM-SHA-256"]}
    assert "type='terminate'" in server.act.requests[-1]
    numbers = [int(each.split("rid='")[1].split("'")[0]) for each in server.act.requests]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda request: request.answer(502), "answers 502"),
        (bosh("hello"), "no XML"),
        (bosh("<html/>"), "opens no session"),
        (bosh(BODY.format("type='terminate' condition='host-unknown'", "")), "host-unknown"),
        (bosh(BODY.format("", MECHANISMS)), "no session id"),
    ],
)
def test_what_is_no_bosh(reach, server, act, reason):
    server.act = act
    with pytest.raises(CommandExecutionError, match=reason):
        reach.bosh_open(f"http://{server.place}/bosh", "example.org", "127.0.0.1")
