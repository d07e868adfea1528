"""
The DNS records of an XMPP service
==================================

Which records the plan asks for, and which of them the DNS has. It is asked by a resolver of this module's own: Salt's
``dnsutil`` and ``salt.utils.dns`` need a program, and tell "there is no such record" and "nobody answered" alike, while
:py:func:`xmpp.check` must tell them apart.
"""

import ipaddress
import os
import socket
import struct
import time

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"

PORT = 53
TYPES = {"A": 1, "CNAME": 5, "AAAA": 28, "SRV": 33, "TLSA": 52}
STATUS = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}


def __virtual__():
    return __virtualname__


def dns_records(format="list", missing=False, ttl=3600, timeout=10):
    """
    List the DNS records that the service needs: addresses of every domain and of its services, and SRV records by which
    clients and servers find it. Direct TLS is preferred over STARTTLS, and port 443 comes last, for those whom a
    firewall lets nowhere else. Where several nodes serve clients, the SRV records name the nodes, so that a client goes
    on to the next; one node is reached by the domain itself. Where renewals keep the key of the certificate
    (``xmpp:tls:letsencrypt:reuse_key``), TLSA records pin it; each node tells those of its own.

    format
        ``list``, or ``zone`` for lines that fit into a zone file. (string, default ``list``)

    missing
        Leave out what the DNS has already. What could not be looked up counts as missing. An SRV record counts as
        there if port and target agree: priority and weight are the operator's. (boolean, default False)

    ttl
        How long others may keep the records. (integer, seconds, default 3600)

    timeout
        How long the DNS may be asked, in all. (number, seconds, default 10)

    Returns a list of ``{"name": "example.org.", "ttl": 3600, "type": "A", "value": "192.0.2.10"}``, or a text.

    Raises ``SaltInvocationError`` for another format or a wrong pillar.

    Source: RFC 6120 (3.2), RFC 2782, RFC 7673, XEP-0368.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.dns_records
        salt '*' xmpp.dns_records format=zone missing=True
    """
    if format not in ("list", "zone"):
        raise SaltInvocationError(f"xmpp.dns_records: format is {format!r}; expected list or zone")
    plan = __salt__["xmpp.plan"]()
    records = _records(plan, int(ttl)) + _pins(plan, int(ttl))
    notes = []
    if missing:
        records, notes = _missing(records, timeout)
    return _zone(records, notes) if format == "zone" else records


def dns_lookup(name, type="A", timeout=3, servers=None):
    """
    Ask the DNS servers of this machine for a record. The file ``/etc/hosts`` is not read.

    name
        Fully qualified, with or without a dot at its end. (string)

    type
        ``A``, ``AAAA``, ``CNAME``, ``SRV`` or ``TLSA``. (string, default ``A``)

    timeout
        For all attempts together. (number, seconds, default 3)

    servers
        IP addresses of the servers to ask. (list, default: those of ``/etc/resolv.conf``)

    Returns ``{"status": "NOERROR", "answers": ["192.0.2.10"], "server": "192.0.2.53"}``; the status is ``NOERROR``
    (with no answers: the name has no such record) or ``NXDOMAIN``. An SRV answer reads ``10 0 5222 example.org.``, a
    TLSA answer ``3 1 1`` and hexadecimal digits.

    Raises ``CommandExecutionError`` when no server gives an answer, ``SaltInvocationError`` for another type or a name
    that the DNS cannot have.

    Source: RFC 1035, RFC 2782, RFC 3596.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.dns_lookup _xmpp-client._tcp.example.org SRV
    """
    if type not in TYPES:
        raise SaltInvocationError(f"xmpp.dns_lookup: type is {type!r}; expected one of {', '.join(sorted(TYPES))}")
    number = int.from_bytes(os.urandom(2), "big")
    question = struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + _packed(name) + struct.pack("!2H", TYPES[type], 1)
    servers = servers or _servers()
    end = time.monotonic() + timeout
    failures = {}
    # A datagram may be lost: every server is asked twice before the question is given up.
    for server in (*servers, *servers):
        left = end - time.monotonic()
        if left <= 0:
            break
        try:
            answer = _exchange(server, question, min(left, max(timeout / (2 * len(servers)), 0.2)))
            status, answers = _parsed(answer, number, TYPES[type])
        except (OSError, ValueError, IndexError, struct.error) as wrong:
            silent = isinstance(wrong, TimeoutError)
            failures[server] = "no answer" if silent else getattr(wrong, "strerror", None) or str(wrong)
            continue
        if status in ("NOERROR", "NXDOMAIN"):
            return {"status": status, "answers": sorted(answers), "server": server}
        failures[server] = status
    said = "; ".join(f"{server}: {why}" for server, why in failures.items()) or "no time left"
    raise CommandExecutionError(f"no DNS server tells of {name} {type} ({said})")


def _records(plan, ttl):
    """Every record that the plan asks for."""
    serving = {name: node for name, node in plan["nodes"].items() if {"ejabberd", "nginx"} & set(node["roles"])}
    clustered = len(serving) > 1
    targets = sorted(serving) if clustered else [plan["domain"]]
    ports = plan["ports"]
    services = [
        ("_xmpps-client", 5, ports["c2s_tls"]),
        ("_xmpp-client", 10, ports["c2s"]),
        ("_xmpps-client", 20, ports["https"]),
        ("_xmpps-server", 5, ports.get("s2s_tls")),
        ("_xmpp-server", 10, ports["s2s"]),
    ]
    everyone = [address for node in serving.values() for address in node["public_addresses"]]
    addresses = {f"{domain}.": everyone for domain in plan["domains"]}
    for domain in plan["domains"]:
        addresses.update({f"{label}.{domain}.": everyone for label in sorted(plan["services"].values())})
    if plan.get("tls", {}).get("letsencrypt", {}).get("challenge") == "http":
        # The authority comes to every name that it proves.
        addresses.update({f"{name}.": everyone for name in plan["tls"]["names"]})
    if clustered:
        addresses.update({f"{name}.": node["public_addresses"] for name, node in sorted(serving.items())})
    records = [
        {"name": name, "ttl": ttl, "type": "AAAA" if ":" in address else "A", "value": address}
        for name, those in addresses.items()
        for address in sorted(set(those), key=lambda each: (":" in each, each))
    ]
    records += [
        {
            "name": f"{service}._tcp.{domain}.",
            "ttl": ttl,
            "type": "SRV",
            "value": f"{priority} {10 if clustered else 0} {port} {target}.",
        }
        for domain in plan["domains"]
        for service, priority, port in services
        if port
        for target in targets
    ]
    return records


def _pins(plan, ttl):
    """TLSA records at the targets of the SRV records that are this node, while its key stays the same."""
    if not plan.get("tls", {}).get("letsencrypt", {}).get("reuse_key") or not plan["roles"]:
        return []
    try:
        value = __salt__["xmpp.certificate_tlsa"](plan["tls"]["certificate"])
    except CommandExecutionError:
        return []  # it is not there yet
    serving = [name for name, node in plan["nodes"].items() if node["roles"]]
    target = plan["node"] if len(serving) > 1 else plan["domain"]
    ports = sorted({plan["ports"][port] for port in ("c2s", "c2s_tls", "https", "s2s")})
    return [{"name": f"_{port}._tcp.{target}.", "ttl": ttl, "type": "TLSA", "value": value} for port in ports]


def _missing(records, timeout):
    """Those that the DNS has not, and what could not be asked."""
    end = time.monotonic() + timeout
    known, notes, left = {}, [], []
    for record in records:
        key = record["name"], record["type"]
        if key not in known:
            known[key] = []
            if not notes:
                try:
                    known[key] = dns_lookup(*key, timeout=min(3, max(end - time.monotonic(), 0)))["answers"]
                except CommandExecutionError as wrong:
                    notes.append(f"{wrong}: what follows may be there already")
        if not any(_agrees(record, answer) for answer in known[key]):
            left.append(record)
    return left, notes


def _agrees(record, answer):
    if record["type"] == "SRV":
        return record["value"].split()[2:] == answer.lower().split()[2:]
    return record["value"] == answer


def _zone(records, notes):
    name = max((len(record["name"]) for record in records), default=0)
    lines = [f"; {note}" for note in notes]
    lines += [f"{r['name']:<{name}} {r['ttl']} IN {r['type']:<4} {r['value']}" for r in records]
    return "\n".join(lines)


def _servers(path="/etc/resolv.conf"):
    try:
        with open(path, encoding="utf-8") as lines:
            servers = [words[1] for words in map(str.split, lines) if len(words) > 1 and words[0] == "nameserver"]
    except FileNotFoundError:
        servers = []
    # The C library, too, asks this machine where no server is named.
    return servers or ["127.0.0.1"]


def _packed(name):
    labels = name.rstrip(".").encode("ascii", "replace").split(b".")
    if not all(0 < len(label) < 64 for label in labels) or b"?" in name.encode("ascii", "replace"):
        raise SaltInvocationError(f"{name!r} is no name that the DNS can have")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _exchange(server, question, timeout):
    """One question over UDP, or over TCP if the answer is too long for that."""
    end = time.monotonic() + timeout
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as wire:
        wire.settimeout(timeout)
        wire.connect((server, PORT))
        wire.send(question)
        answer = wire.recv(4096)
    if not answer[2] & 0x02:
        return answer
    with socket.create_connection((server, PORT), max(end - time.monotonic(), 0.1)) as wire:
        wire.sendall(struct.pack("!H", len(question)) + question)
        with wire.makefile("rb") as source:
            return source.read(struct.unpack("!H", source.read(2))[0])


def _parsed(answer, number, type):
    """The status of an answer, and its records of a type, as text."""
    given, flags, questions, count = struct.unpack_from("!4H", answer)
    if given != number or not flags & 0x8000:
        raise ValueError("an answer to another question")
    at = 12
    for _ in range(questions):
        at = _name(answer, at)[1] + 4
    answers = []
    for _ in range(count):
        at = _name(answer, at)[1]
        kind, _, _, length = struct.unpack_from("!HHIH", answer, at)
        at += 10
        if kind == type:
            answers.append(_value(answer, at, length, kind))
        at += length
    return STATUS.get(flags & 0xF, f"status {flags & 0xF}"), answers


def _value(answer, at, length, kind):
    if kind == TYPES["SRV"]:
        priority, weight, port = struct.unpack_from("!3H", answer, at)
        return f"{priority} {weight} {port} {_name(answer, at + 6)[0]}"
    if kind == TYPES["TLSA"]:
        return " ".join([*(str(number) for number in answer[at : at + 3]), answer[at + 3 : at + length].hex()])
    if kind == TYPES["CNAME"]:
        return _name(answer, at)[0]
    return str(ipaddress.ip_address(answer[at : at + length]))


def _name(answer, at):
    """The name at a place of the answer, and where it ends (RFC 1035, 4.1.4)."""
    labels, end, limit = [], None, at
    while length := answer[at]:
        if length & 0xC0:
            end = end or at + 2
            pointed = struct.unpack_from("!H", answer, at)[0] & 0x3FFF
            if pointed >= limit:
                raise ValueError("a name that does not point back")
            limit = at = pointed
        else:
            labels.append(answer[at + 1 : at + 1 + length].decode("ascii", "replace"))
            at += 1 + length
    return ".".join([*labels, ""]) if labels else ".", end or at + 1
