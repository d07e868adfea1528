"""The DNS: which records the plan asks for, how answers are read, and what is told when nobody answers."""

import socket
import struct
import threading

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def dns(load, plan):
    return load("_modules/xmpp_dns.py", __salt__={"xmpp.plan": lambda: plan})


def lines(records):
    return {f"{each['name']} {each['type']} {each['value']}" for each in records}


def test_one_node(dns):
    addresses = {
        f"{name}example.org. {record}"
        for name in ("", "conference.", "proxy.", "pubsub.", "upload.")
        for record in ("A 192.0.2.10", "AAAA 2001:db8::10")
    }
    assert lines(dns.dns_records()) == addresses | {
        "_xmpps-client._tcp.example.org. SRV 5 0 5223 example.org.",
        "_xmpp-client._tcp.example.org. SRV 10 0 5222 example.org.",
        "_xmpps-client._tcp.example.org. SRV 20 0 443 example.org.",
        "_xmpp-server._tcp.example.org. SRV 10 0 5269 example.org.",
    }


def test_direct_tls_between_servers_where_there_is_a_port_for_it(dns, plan):
    plan["ports"]["s2s_tls"] = 5270
    assert "_xmpps-server._tcp.example.org. SRV 5 0 5270 example.org." in lines(dns.dns_records())


def test_a_cluster_is_reached_by_its_nodes(dns, plan):
    plan["nodes"]["xmpp2.example.org"] = {"public_addresses": ["192.0.2.11"], "roles": ["ejabberd"]}
    plan["nodes"]["db1.example.org"] = {"public_addresses": ["192.0.2.12"], "roles": ["postgres"]}
    records = lines(dns.dns_records())
    assert "_xmpp-client._tcp.example.org. SRV 10 10 5222 xmpp1.example.org." in records
    assert "_xmpp-client._tcp.example.org. SRV 10 10 5222 xmpp2.example.org." in records
    assert {"xmpp2.example.org. A 192.0.2.11", "example.org. A 192.0.2.11", "example.org. A 192.0.2.10"} <= records
    assert not any("192.0.2.12" in each or "db1" in each for each in records)


def test_every_domain_has_its_own(dns, plan):
    plan["domains"].append("example.net")
    records = lines(dns.dns_records())
    assert {
        "example.net. A 192.0.2.10",
        "upload.example.net. AAAA 2001:db8::10",
        "_xmpp-server._tcp.example.net. SRV 10 0 5269 example.org.",
    } <= records


def test_a_zone_snippet_has_a_line_for_each(dns):
    zone = dns.dns_records(format="zone", ttl=300).splitlines()
    assert len(zone) == len(dns.dns_records())
    assert "_xmpp-client._tcp.example.org. 300 IN SRV 10 0 5222 example.org.".split() in [line.split() for line in zone]


def test_another_format_is_a_wrong_call(dns):
    with pytest.raises(SaltInvocationError, match="list or zone"):
        dns.dns_records(format="json")


def answers(found):
    def lookup(name, type, timeout):
        return {"status": "NOERROR", "answers": found.get((name, type), []), "server": "192.0.2.53"}

    return lookup


def test_missing_leaves_out_what_is_there(dns):
    dns.dns_lookup = answers(
        {
            ("example.org.", "A"): ["192.0.2.10"],
            ("upload.example.org.", "A"): ["198.51.100.1"],
            ("_xmpp-client._tcp.example.org.", "SRV"): ["0 5 5222 example.org."],
            ("_xmpps-client._tcp.example.org.", "SRV"): ["5 0 5223 elsewhere.example."],
        }
    )
    missing = lines(dns.dns_records(missing=True))
    assert "example.org. A 192.0.2.10" not in missing
    assert "_xmpp-client._tcp.example.org. SRV 10 0 5222 example.org." not in missing
    assert "upload.example.org. A 192.0.2.10" in missing
    assert "_xmpps-client._tcp.example.org. SRV 5 0 5223 example.org." in missing
    assert "example.org. AAAA 2001:db8::10" in missing


def test_missing_without_a_dns_server_lists_all_and_asks_once(dns):
    asked = []

    def lookup(name, type, timeout):
        asked.append(name)
        raise CommandExecutionError("no DNS server tells of it")

    dns.dns_lookup = lookup
    zone = dns.dns_records(format="zone", missing=True).splitlines()
    assert zone[0].startswith("; no DNS server tells of it")
    assert len(zone) == 1 + len(dns.dns_records())
    assert len(asked) == 1


# A DNS server of our own, on this machine


def packed(name):
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".") if label) + b"\0"


class Server:
    """Answers over UDP and TCP as it is told to."""

    def __init__(self):
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp = socket.socket()
        while True:
            self.udp.bind(("127.0.0.1", 0))
            self.port = self.udp.getsockname()[1]
            try:
                self.tcp.bind(("127.0.0.1", self.port))
                break
            except OSError:
                self.udp.close()
                self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp.listen()
        self.reply, self.long = None, None
        self.asked = 0
        threading.Thread(target=self._datagrams, daemon=True).start()
        threading.Thread(target=self._connections, daemon=True).start()

    def _datagrams(self):
        while True:
            try:
                question, sender = self.udp.recvfrom(4096)
            except OSError:
                return
            self.asked += 1
            answer = self.reply(question)
            if answer:
                self.udp.sendto(answer, sender)

    def _connections(self):
        while True:
            try:
                wire, _ = self.tcp.accept()
            except OSError:
                return
            with wire:
                question = wire.recv(4096)[2:]
                answer = self.long(question)
                wire.sendall(struct.pack("!H", len(answer)) + answer)

    def close(self):
        self.udp.close()
        self.tcp.close()


@pytest.fixture
def server(dns):
    server = Server()
    dns.PORT = server.port
    yield server
    server.close()


def reply(*records, status=0, truncated=False):
    """An answer to whatever is asked; each record's name points to the question's."""

    def answer(question):
        head = question[:2] + struct.pack("!5H", 0x8180 | status | (0x0200 if truncated else 0), 1, len(records), 0, 0)
        body = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 60, len(data)) + data for kind, data in records)
        return head + question[12:] + body

    return answer


def test_answers_are_read(dns, server):
    server.reply = reply((5, packed("other.example.org")), (1, bytes([192, 0, 2, 10])), (1, bytes([192, 0, 2, 9])))
    assert dns.dns_lookup("example.org", servers=["127.0.0.1"]) == {
        "status": "NOERROR",
        "answers": ["192.0.2.10", "192.0.2.9"],
        "server": "127.0.0.1",
    }
    server.reply = reply((28, socket.inet_pton(socket.AF_INET6, "2001:db8::10")))
    assert dns.dns_lookup("example.org.", "AAAA", servers=["127.0.0.1"])["answers"] == ["2001:db8::10"]
    # The target ends in a pointer to the question's name.
    server.reply = reply((33, struct.pack("!3H", 10, 5, 5222) + b"\x05xmpp1\xc0\x0c"))
    assert dns.dns_lookup("example.org", "SRV", servers=["127.0.0.1"])["answers"] == ["10 5 5222 xmpp1.example.org."]


@pytest.mark.parametrize(("status", "name"), [(0, "NOERROR"), (3, "NXDOMAIN")])
def test_no_record_is_an_answer(dns, server, status, name):
    server.reply = reply(status=status)
    assert dns.dns_lookup("example.org", servers=["127.0.0.1"]) == {
        "status": name,
        "answers": [],
        "server": "127.0.0.1",
    }


@pytest.mark.parametrize(("status", "name"), [(2, "SERVFAIL"), (5, "REFUSED")])
def test_a_server_that_cannot_tell_is_no_answer(dns, server, status, name):
    server.reply = reply(status=status)
    with pytest.raises(CommandExecutionError, match=f"127.0.0.1: {name}"):
        dns.dns_lookup("example.org", servers=["127.0.0.1"])


def test_a_long_answer_is_fetched_over_tcp(dns, server):
    server.reply = reply(truncated=True)
    server.long = reply(*[(1, bytes([192, 0, 2, number])) for number in range(200)])
    assert len(dns.dns_lookup("example.org", servers=["127.0.0.1"])["answers"]) == 200


def test_silence_is_told_in_time_and_asked_twice(dns, server):
    server.reply = lambda question: None
    with pytest.raises(CommandExecutionError, match="no answer"):
        dns.dns_lookup("example.org", timeout=0.6, servers=["127.0.0.1"])
    assert server.asked == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda question: b"",
        lambda question: question[:12],
        lambda question: b"\0\0" + reply((1, bytes(4)))(question)[2:],
        lambda question: reply((33, b"\x01"))(question),
        lambda question: reply((1, bytes(4)))(question)[:-6],
        # Names that point to themselves, and to one another.
        lambda question: reply((33, struct.pack("!3H", 1, 1, 1) + b"\xc0\x2f"))(question),
        lambda question: question[:2] + struct.pack("!5H", 0x8180, 0, 1, 0, 0) + b"\x01a\xc0\x0c" + bytes(10),
    ],
)
def test_damaged_answers_are_no_answers(dns, server, damage):
    server.reply = damage
    with pytest.raises(CommandExecutionError, match="no DNS server tells"):
        dns.dns_lookup("example.org", "SRV", timeout=0.6, servers=["127.0.0.1"])


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64 + ".org", "ü.example"])
def test_names_that_the_dns_cannot_have(dns, name):
    with pytest.raises(SaltInvocationError, match="no name"):
        dns.dns_lookup(name, servers=["127.0.0.1"])


def test_the_servers_of_the_machine(dns, tmp_path):
    path = tmp_path / "resolv.conf"
    path.write_text("# nameserver 203.0.113.1\nsearch example.org\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n")
    assert dns._servers(path) == ["192.0.2.53", "2001:db8::53"]
    assert dns._servers(tmp_path / "none") == ["127.0.0.1"]
