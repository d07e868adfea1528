"""
The proof: the service used as a stranger would
================================================

Everything is asked over the network, at the addresses that the plan gives to clients, and believed only when it was
seen to work. The one thing that a stranger could not do is to make the accounts that the probes log in with.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import ssl
import time
import urllib.parse
import xml.etree.ElementTree as ET
from xml.sax import saxutils

from salt.exceptions import CommandExecutionError, SaltInvocationError

__virtualname__ = "xmpp"

log = logging.getLogger(__name__)

STEP = 10
# What is kept back of the time, so that what the check made can be removed.
CLEANUP = 5
# Not in Salt's cache: bootstrap and a minion have one each.
LOCK = "/run/xmpp-check.lock"
LEFTOVER = re.compile(r"xmpp-check-([0-9a-f]{8})-([0-9a-f]{8})-[0-9a-f]{16}")
BODY = "{jabber:client}body"
DISCO_INFO = "http://jabber.org/protocol/disco#info"
DISCO_ITEMS = "http://jabber.org/protocol/disco#items"
MAM = "urn:xmpp:mam:2"
UPLOAD = "urn:xmpp:http:upload:0"
WEBSOCKET = "urn:xmpp:alt-connections:websocket"
BOSH = "urn:xmpp:alt-connections:xbosh"
MORE_TIME = "give the check more time (timeout=...), and find out what is slow"
# What OpenSSL calls the ways in which a handshake fails here.
TLS_REASONS = {
    "TLSV1_UNRECOGNIZED_NAME": "the server has no certificate for this name",
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": "what answers there does not know the ALPN of XMPP",
    "UNEXPECTED_EOF_WHILE_READING": "the server hung up during the TLS handshake",
    "WRONG_VERSION_NUMBER": "what answers there does not speak TLS",
}
EJABBERD = "look into /var/log/ejabberd/ejabberd.log, then apply xmpp.ejabberd"
NGINX = "look into /var/log/nginx/error.log, then apply xmpp.nginx"
CERTIFICATES = "apply xmpp.certificates"


def __virtual__():
    return __virtualname__


def check(timeout=60):
    """
    Prove that the service works, for every domain of the plan: DNS, TLS and its certificate on every port, logging in
    as two users, a message between them and its copy in the archive, an upload and its download, WebSocket, BOSH,
    discovery and STUN. The two users are made for this, and removed with all that is theirs, whatever happens; those of
    a check that was killed are removed by the next one.

    timeout
        How long it may take in all, once no other check is at work on this machine. What was not tried by then has
        failed. (number, 10 to 600 seconds, default 60)

    Returns a dict: ``ok`` (no probe failed), ``seconds``, ``probes``: a list of dicts

    what
        what was to be proven
    result
        ``ok``, ``failed``, or ``not proven``: it could not be tried from this machine
    seen
        what was seen
    do
        what to do about it, empty where there is nothing to do

    ``salt-call`` then exits with 1 unless ``ok``.

    Raises ``SaltInvocationError`` for a wrong timeout or a wrong pillar, ``CommandExecutionError`` when another check
    is at work on this machine for all of the timeout.

    Source: RFC 6120, RFC 7395, RFC 8489, XEP-0124, XEP-0156, XEP-0313, XEP-0363, XEP-0368.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.check
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 10 <= timeout <= 600:
        raise SaltInvocationError(f"xmpp.check: timeout is {timeout!r}; expected 10 to 600 seconds")
    plan = __salt__["xmpp.plan"]()
    with _only_one(time.monotonic() + timeout):
        start = time.monotonic()
        report = _Report(start + timeout - CLEANUP)
        place = _Place(plan, report)
        resolver = _Resolver(report)
        for domain in plan["domains"]:
            _dns(report, resolver, plan, domain)
            serving = _streams(report, place, domain)
            _web(report, place, domain)
            _users(report, place, domain, serving, timeout)
        _stun(report, place)
    ok = all(probe["result"] != "failed" for probe in report.probes)
    if not ok:
        __context__["retcode"] = 1
    return {"ok": ok, "seconds": round(time.monotonic() - start, 1), "probes": report.probes}


class _NotProven(Exception):
    """What cannot be seen from this machine."""

    def __init__(self, seen, do=""):
        super().__init__(seen)
        self.do = do


class _Wrong(Exception):
    """What was seen is not as it should be, with what to do about it."""

    def __init__(self, seen, do):
        super().__init__(seen)
        self.do = do


class _Report:
    """The probes, one line each, and the time that they have."""

    def __init__(self, end):
        self.probes = []
        self._end = end

    def left(self, most=STEP):
        left = min(self._end - time.monotonic(), most)
        if left <= 0:
            raise TimeoutError("the time of the whole check is over")
        return left

    def add(self, what, result, seen, do=""):
        self.probes.append({"what": what, "result": result, "seen": seen, "do": do})

    def probe(self, what, act, do):
        """Add the line for an act that returns what it saw, or ``(seen, do)``. Returns whether it was ok."""
        if self._end <= time.monotonic():
            self.add(what, "failed", "not tried: the time of the check was over", MORE_TIME)
            return False
        try:
            seen = act()
            self.add(what, "ok", *((seen,) if isinstance(seen, str) else seen))
            return True
        except _NotProven as why:
            self.add(what, "not proven", str(why), why.do)
        except _Wrong as wrong:
            self.add(what, "failed", str(wrong), wrong.do)
        # Whatever a server answers, a probe must not raise: it is a failed probe.
        except Exception as wrong:
            log.debug("xmpp.check: %s", what, exc_info=True)
            where = "".join(f"{note}: " for note in getattr(wrong, "__notes__", ()))
            self.add(what, "failed", where + _said(wrong), self._advice(wrong, do))
        return False

    def _advice(self, wrong, do):
        if self._end <= time.monotonic():
            return MORE_TIME
        if isinstance(wrong, ssl.SSLCertVerificationError):
            return {
                10: f"the certificate has ended: renew it ({CERTIFICATES})",
                9: f"the certificate is not valid yet: set the clock, or renew it ({CERTIFICATES})",
                62: f"the certificate lacks this name: {CERTIFICATES}",
            }.get(
                wrong.verify_code,
                "neither the system nor xmpp's own CA file trusts its authority: give the whole chain, or "
                f"{CERTIFICATES}",
            )
        if getattr(wrong, "reason", None) == "TLSV1_UNRECOGNIZED_NAME":
            return f"the certificate lacks this name: {CERTIFICATES}"
        if isinstance(wrong, ConnectionRefusedError):
            return f"nothing listens there: {do}"
        if isinstance(wrong, TimeoutError):
            return f"is it dropped by a firewall (xmpp:firewall), or does the program hang? {do}"
        return do


class _Place:
    """Where the service is reached from here: the addresses that clients use, as far as they can be tried."""

    def __init__(self, plan, report):
        self.plan, self.ports = plan, plan["ports"]
        ca = plan["paths"]["ca"]
        self.trust = ca if os.path.exists(ca) else None
        self.addresses = []
        for address in plan["public_addresses"]:
            if _is_own(address) or self._answers(address, report):
                self.addresses.append(address)
            else:
                report.add(
                    f"address {address}",
                    "not proven",
                    "no interface of this machine has it, and it does not answer from here, as often behind NAT",
                    "try it from outside; if clients cannot reach it either, correct public_addresses in xmpp:nodes",
                )
        if not self.addresses:
            self.addresses = [next(filter(_is_own, filter(None, [plan["address"]])), "127.0.0.1")]
            report.add(
                "the address of clients",
                "not proven",
                f"all was tried at {self.addresses[0]} instead, where other rules may hold",
                "give this node public_addresses in xmpp:nodes",
            )
        report.add(
            "the way from outside",
            "not proven",
            f"this machine asked itself, at {', '.join(self.addresses)}: a firewall would not have stopped that",
            f"from elsewhere: openssl s_client -connect {_host_port(self.addresses[0], self.ports['c2s_tls'])} "
            f"-servername {plan['domain']}",
        )

    def _answers(self, address, report):
        try:
            socket.create_connection((address, self.ports["c2s"]), report.left(3)).close()
        except OSError:
            return False
        return True


def _is_own(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as wire:
            wire.bind((address, 0))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _at(*where):
    """What fails in here is reported with the place where it did."""
    try:
        yield
    except Exception as wrong:
        wrong.add_note(", ".join(where))
        raise


def _host_port(address, port):
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _said(wrong):
    if isinstance(wrong, ssl.SSLCertVerificationError):
        return f"the certificate is refused: {wrong.verify_message}"
    if isinstance(wrong, ssl.SSLError):
        return TLS_REASONS.get(wrong.reason, f"TLS fails: {wrong.reason or wrong}")
    if isinstance(wrong, TimeoutError):
        return "no answer in time"
    if isinstance(wrong, OSError):
        return wrong.strerror or str(wrong)
    if isinstance(wrong, CommandExecutionError):
        return str(wrong)
    return f"an answer that cannot be understood ({type(wrong).__name__}: {wrong})"


@contextlib.contextmanager
def _only_one(end):
    """One check at a time on a machine: so accounts of this machine's name that are there belong to a killed one."""
    with open(LOCK, "w", encoding="ascii") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CommandExecutionError(
                        f"xmpp.check: another check on this machine does not end; `fuser {LOCK}` tells its process"
                    ) from None
                time.sleep(0.2)
        yield


# DNS


class _Resolver:
    """Asks the DNS each thing once, and no more once nobody answers."""

    def __init__(self, report):
        self._report, self._asked, self._dead = report, {}, None

    def __call__(self, name, type):
        if self._dead:
            raise self._dead
        if (name, type) not in self._asked:
            try:
                self._asked[name, type] = __salt__["xmpp.dns_lookup"](name, type, timeout=self._report.left(3))
            except CommandExecutionError as wrong:
                self._dead = _NotProven(str(wrong), "ask again when this machine has a DNS server that answers")
                raise self._dead from wrong
        return self._asked[name, type]


def _dns(report, ask, plan, domain):
    wanted = {}
    for record in __salt__["xmpp.dns_records"]():
        if _belongs(record["name"], domain, plan["domains"]):
            wanted.setdefault((record["name"], record["type"]), []).append(record["value"])
    everyone = {address for node in plan["nodes"].values() for address in node["public_addresses"]}
    try:
        ask(f"{domain}.", "A")
    except _NotProven as why:
        report.add(f"{domain}: DNS", "not proven", str(why), why.do)
        return
    names = {name for name, type in wanted if type in ("A", "AAAA")}
    for what, those in (
        (f"{domain}: DNS, addresses", [f"{domain}."]),
        (f"{domain}: DNS, addresses of its services", sorted(names - {f"{domain}."})),
    ):
        report.probe(what, lambda those=those: _dns_addresses(ask, those, everyone), "")
    for name in dict.fromkeys(name for name, type in wanted if type == "SRV"):
        report.probe(
            f"{domain}: DNS, {name.partition('.')[0]}._tcp",
            lambda name=name: _dns_srv(ask, name, wanted[name, "SRV"], everyone),
            "",
        )


def _belongs(name, domain, domains):
    """Whether a record is this domain's, and of no further domain that lies below it."""
    return max((each for each in domains if f".{name}".endswith(f".{each}.")), key=len, default=None) == domain


def _dns_addresses(ask, names, everyone):
    elsewhere, without, server = [], [], None
    for name in names:
        answers = [ask(name, type) for type in ("A", "AAAA")]
        server = answers[0]["server"]
        found = {address for answer in answers for address in answer["answers"]}
        elsewhere += [f"{name} has {address}" for address in sorted(found - everyone)]
        without += [f"{name} lacks {address}" for address in sorted(everyone - found)]
    if elsewhere or without:
        raise _NotProven(
            f"DNS server {server}: {'; '.join(elsewhere + without)}: a stranger does not come here, or not always",
            "make the records that `salt-call xmpp.dns_records missing=True format=zone` shows"
            + (", remove those that lead elsewhere" if elsewhere else ""),
        )
    return f"DNS server {server}: {', '.join(names)} at {', '.join(sorted(everyone))}"


def _dns_srv(ask, name, wanted, everyone):
    answer = ask(name, "SRV")
    expected = {tuple(value.split()[2:]) for value in wanted}
    good, bad = [], []
    for value in answer["answers"]:
        port, target = value.lower().split()[2:]
        if (port, target) in expected:
            good.append(value)
            continue
        # The target may have another name of ours: the operator's choice.
        addresses = {each for type in ("A", "AAAA") for each in ask(target, type)["answers"]}
        there = port in {each for each, _ in expected} and addresses and addresses <= everyone
        (good if there else bad).append(value)
    if bad or not good:
        raise _NotProven(
            f"DNS server {answer['server']}: "
            + (f"{name} leads to {', '.join(bad)}" if bad else f"{name} has no record"),
            "make the records that `salt-call xmpp.dns_records missing=True format=zone` shows"
            + (", remove those that lead elsewhere" if bad else ""),
        )
    return f"DNS server {answer['server']}: {', '.join(good)}"


# TLS on every port, certificates


def _streams(report, place, domain):
    """Returns the ports at which clients can log in."""
    ports = place.ports
    certificates, serving = {}, set()

    def clients(port, tls):
        def act():
            seen = []
            for address in place.addresses:
                with _at(address), _session(report, place, address, port, domain, tls) as session:
                    _required(session, address)
                    if not any(each.startswith("SCRAM-") for each in session.mechanisms):
                        raise _Wrong(f"{address} offers no SCRAM, only {', '.join(session.mechanisms)}", EJABBERD)
                    certificates[f"port {port}"] = session.certificate
                    seen.append(f"{address}: {session.tls_version}")
            serving.add(port)
            return f"{', '.join(seen)}; {', '.join(each for each in session.mechanisms if each.startswith('SCRAM'))}"

        return act

    def servers(port, tls):
        def act():
            names = [domain, *(f"{label}.{domain}" for label in sorted(place.plan["services"].values()))]
            for address in place.addresses:
                for name in names:
                    with _at(address, name), _session(report, place, address, port, name, tls, True) as session:
                        _required(session, address)
                        certificates[f"port {port}, {name}"] = session.certificate
            return f"{', '.join(place.addresses)}: {session.tls_version}, certificate good for {', '.join(names)}"

        return act

    report.probe(f"{domain}: clients, STARTTLS, port {ports['c2s']}", clients(ports["c2s"], "starttls"), EJABBERD)
    report.probe(f"{domain}: clients, TLS, port {ports['c2s_tls']}", clients(ports["c2s_tls"], "direct"), EJABBERD)
    report.probe(
        f"{domain}: clients, TLS by ALPN, port {ports['https']}",
        clients(ports["https"], "direct"),
        f"nginx must hand on what has the ALPN xmpp-client: {NGINX}; or {EJABBERD}",
    )
    report.probe(f"{domain}: servers, STARTTLS, port {ports['s2s']}", servers(ports["s2s"], "starttls"), EJABBERD)
    if "s2s_tls" in ports:
        report.probe(f"{domain}: servers, TLS, port {ports['s2s_tls']}", servers(ports["s2s_tls"], "direct"), EJABBERD)

    def https():
        for address in place.addresses:
            with _at(address):
                answer = _http(report, place, f"https://{domain}/", address)
            certificates[f"port {ports['https']}"] = answer["certificate"]
            if answer["status"] != 200:
                raise _Wrong(f"{address} answers {answer['status']}", NGINX)
        return f"{', '.join(place.addresses)}: the page is there"

    report.probe(f"{domain}: web, port {ports['https']}", https, NGINX)
    report.probe(
        f"{domain}: certificate, time left",
        lambda: _time_left(certificates, certificates and __salt__["xmpp.certificate_renewal"]()),
        CERTIFICATES,
    )
    if place.trust and ports["c2s_tls"] in serving:
        report.probe(
            f"{domain}: certificate, trusted by strangers",
            lambda: _publicly_trusted(report, place, domain),
            CERTIFICATES,
        )
    return serving


def _session(report, place, address, port, domain, tls, server=False, public=False, most=STEP):
    trust = None if public else place.trust
    return __salt__["xmpp.session"](address, port, domain, tls, trust=trust, server=server, timeout=report.left(most))


def _required(session, address):
    if not session.tls_required:
        raise _Wrong(f"{address} offers TLS, but goes on without it", "TLS must be required: apply xmpp.ejabberd")


def _time_left(certificates, renewal=None):
    if not certificates:
        raise _NotProven("no certificate was seen")
    ends, tight = [], []
    for where, certificate in certificates.items():
        begin, end = (ssl.cert_time_to_seconds(certificate[key]) for key in ("notBefore", "notAfter"))
        days = (end - time.time()) / 86400
        ends.append((days, where))
        if (end - time.time()) < (end - begin) / 3:
            tight.append((days, (end - begin) / 86400, where))
    days, where = min(ends)
    issuer = dict(pair for part in certificates[where]["issuer"] for pair in part)
    seen = (
        f"{days:.1f} days ({where}), issued by "
        f"{issuer.get('commonName') or issuer.get('organizationName') or 'a nameless authority'}"
    )
    broken = renewal and renewal["works"] is False
    if renewal:
        seen += f", {renewal['seen']}"
    if not tight:
        return (seen, renewal["do"]) if broken else seen
    if broken:
        raise _Wrong(f"{seen}: less than a third of its life is left", renewal["do"])
    days, life, where = min(tight)
    do = f"less than a third of its {life:.0f} days: renew it ({CERTIFICATES}), then see why that did not happen before"
    # It still serves: the first two thirds of the last third are for renewal.
    if days > life / 10:
        return seen, do
    raise _Wrong(seen, do)


def _publicly_trusted(report, place, domain):
    try:
        with _session(
            report, place, place.addresses[0], place.ports["c2s_tls"], domain, "direct", public=True
        ) as session:
            issuer = dict(pair for part in session.certificate["issuer"] for pair in part)
            return (
                f"by this machine's system, as any other: {issuer.get('organizationName') or issuer.get('commonName')}"
            )
    except ssl.SSLCertVerificationError:
        raise _NotProven(
            f"only {place.trust} makes it trusted: clients refuse or warn until they have that authority",
            f"give {place.trust} to the users' devices, or have xmpp:tls:source bring a public authority's certificate",
        ) from None


# What nginx hands on


def _http(report, place, url, address, **kwargs):
    return __salt__["xmpp.http_request"](url, address=address, trust=place.trust, timeout=report.left(), **kwargs)


def _web(report, place, domain):
    first = place.addresses[0]
    urls = {
        WEBSOCKET: _on(place.plan["urls"]["websocket"], domain),
        BOSH: _on(place.plan["urls"]["bosh"], domain),
    }

    def redirect():
        for address in place.addresses:
            with _at(address):
                answer = _http(report, place, f"http://{domain}:{place.ports['http']}/", address)
            location = answer["headers"].get("location", "")
            if answer["status"] not in (301, 308) or not location.startswith(f"https://{domain}"):
                raise _Wrong(f"{address} answers {answer['status']} {location}; expected a redirect to https", NGINX)
        return f"{', '.join(place.addresses)}: {answer['status']} to {location}"

    def host_meta():
        answer = _http(report, place, f"https://{domain}/.well-known/host-meta.json", first)
        if answer["status"] != 200 or not answer["body"].lstrip().startswith(b"{"):
            raise _Wrong(f"host-meta.json answers {answer['status']}, and no JSON", NGINX)
        if answer["headers"].get("access-control-allow-origin") != "*":
            raise _Wrong(
                "host-meta.json comes without Access-Control-Allow-Origin: *, so no web client may read it", NGINX
            )
        found = {link.get("rel"): link.get("href") for link in json.loads(answer["body"])["links"]}
        answer = _http(report, place, f"https://{domain}/.well-known/host-meta", first)
        if answer["status"] != 200:
            raise _Wrong(f"host-meta answers {answer['status']}", NGINX)
        in_xml = {link.get("rel"): link.get("href") for link in ET.fromstring(answer["body"]).iter() if link.get("rel")}
        for kind in urls:
            if not found.get(kind) or found[kind] != in_xml.get(kind):
                raise _Wrong(
                    f"{kind} is {found.get(kind)} in host-meta.json, {in_xml.get(kind)} in host-meta; expected one URL",
                    EJABBERD,
                )
            urls[kind] = found[kind]
        return f"{urls[WEBSOCKET]}, {urls[BOSH]}"

    def stream(opened):
        def act():
            kind = WEBSOCKET if opened == "xmpp.websocket_open" else BOSH
            answer = __salt__[opened](urls[kind], domain, address=first, trust=place.trust, timeout=report.left())
            if not answer["mechanisms"]:
                raise _Wrong(f"{urls[kind]} opens a stream, but offers no login", EJABBERD)
            return f"{urls[kind]} opens a stream: {', '.join(answer['mechanisms'])}"

        return act

    report.probe(f"{domain}: web, port {place.ports['http']}", redirect, NGINX)
    report.probe(f"{domain}: discovery by host-meta", host_meta, NGINX)
    report.probe(f"{domain}: WebSocket", stream("xmpp.websocket_open"), f"{NGINX}; or {EJABBERD}")
    report.probe(f"{domain}: BOSH", stream("xmpp.bosh_open"), f"{NGINX}; or {EJABBERD}")


def _on(url, domain):
    """The same URL at another of the domains."""
    return urllib.parse.urlsplit(url)._replace(netloc=domain).geturl()


def _stun(report, place):
    def act():
        seen = []
        for address in place.addresses:
            with _at(address):
                answer = __salt__["xmpp.stun_binding"](address, place.ports["stun"], timeout=report.left(4))
            if _is_own(address) and answer["mapped"] != answer["own"]:
                raise _Wrong(f"{address} sees {answer['mapped']} instead of {answer['own']}", EJABBERD)
            seen.append(f"{address} saw {_host_port(*answer['mapped'])}")
        return ", ".join(seen)

    report.probe(f"STUN, UDP port {place.ports['stun']}", act, EJABBERD)


# Two users


def _api(command, report=None, **kwargs):
    return __salt__["ejabberd.api"](command, timeout=report.left() if report else STEP, **kwargs)


def _machine():
    return hashlib.sha256(__opts__["id"].encode()).hexdigest()[:8]


def _users(report, place, domain, serving, timeout):
    users, sessions, files = [], [], []

    def make():
        removed = _remove_leftovers(report, domain)
        for _ in range(2):
            # Accounts say whose they are and until when, so that one of a killed check can be told from one in use.
            name = f"xmpp-check-{_machine()}-{int(time.time() + timeout) + 1:08x}-{secrets.token_hex(8)}"
            password = secrets.token_urlsafe(24)
            users.append((name, password))
            _api("register", report, user=name, host=domain, password=password)
        leftovers = f"; removed {removed} of a check that did not end" if removed else ""
        return f"{' and '.join(name for name, _ in users)}{leftovers}"

    what = f"{domain}: two users for the probes"
    try:
        if report.probe(what, make, "is ejabberd's API there for root? apply xmpp.ejabberd"):
            _as_users(report, place, domain, serving, users, sessions, files)
        else:
            report.add(
                f"{domain}: login, message, archive, upload",
                "not proven",
                "there are no users to try them with",
                f'see "{what}"',
            )
    finally:
        for session in sessions:
            session.close()
        if users:
            _remove(report, place, domain, [name for name, _ in users], files)


def _remove_leftovers(report, domain):
    removed = 0
    for name in _api("registered_users", report, host=domain):
        match = LEFTOVER.fullmatch(name)
        if match and (match[1] == _machine() or int(match[2], 16) < time.time()):
            _api("unregister", report, user=name, host=domain)
            removed += 1
    return removed


def _remove(report, place, domain, names, files):
    """Remove the users, past the end of the probes' time if need be, and see that all is gone."""
    cleanup = _Report(time.monotonic() + CLEANUP)
    what = f"{domain}: what the check made is removed"
    wrong = []
    for name in names:
        try:
            _api("unregister", cleanup, user=name, host=domain)
            if _api("check_account", cleanup, user=name, host=domain) == 0:
                wrong.append(f"{name}@{domain} is still there")
        except Exception as error:
            wrong.append(f"{name}@{domain}: {_said(error)}")

    def act():
        if wrong:
            raise _Wrong("; ".join(wrong), f"ejabberdctl unregister {names[0]} {domain}; or run the check again")
        for url in files:
            if not _gone(cleanup, place, url):
                raise _Wrong(
                    f"{url} is still served after its owner was removed",
                    "mod_http_upload needs rm_on_unregister: apply xmpp.ejabberd; delete the file in "
                    f"{place.plan['paths'].get('uploads', 'the directory of uploads')}",
                )
        return "users" + (", messages, archive and file" if files else "")

    cleanup.probe(what, act, EJABBERD)
    report.probes += cleanup.probes


def _gone(report, place, url):
    for _ in range(5):
        if _http(report, place, url, place.addresses[0])["status"] in (403, 404, 410):
            return True
        time.sleep(0.2)
    return False


def _as_users(report, place, domain, serving, users, sessions, files):
    ports, address = place.ports, place.addresses[0]
    ways = [(ports["c2s"], "starttls"), (ports["c2s_tls"], "direct"), (ports["https"], "direct")]
    for port in (port for port, _ in ways if port not in serving):
        report.add(f"{domain}: login, port {port}", "not proven", "no login was tried", f"see port {port} above")
    ways = [way for way in ways if way[0] in serving]
    logged_in = {}

    def login(port, tls, name, password, binding):
        def act():
            # The session is used by all that follows, so its time is that of the whole check.
            session = _session(report, place, address, port, domain, tls, most=float("inf"))
            sessions.append(session)
            bound = binding and session.offers_binding()
            mechanism = session.login(name, password, binding=bound, resource=f"port-{port}")
            logged_in.setdefault(name, session)
            return f"{mechanism} as {session.jid}" + ("" if bound or not binding else "; no channel binding is offered")

        return act

    # The first user takes the first way, the second one the others, or the only one.
    for number, (port, tls) in enumerate(ways if len(ways) > 1 else ways * 2):
        who = users[min(number, 1)]
        report.probe(f"{domain}: login, port {port}", login(port, tls, *who, number == 1), EJABBERD)
    if len(logged_in) < 2:
        report.add(
            f"{domain}: message, archive, upload",
            "not proven",
            "two users are needed, and could not log in",
            "see the logins above",
        )
        return
    one, two = (logged_in[name] for name, _ in users)
    text = f"xmpp.check {secrets.token_hex(16)}"
    if report.probe(f"{domain}: message", lambda: _message(one, two, text), EJABBERD):
        report.probe(
            f"{domain}: archive",
            lambda: _archived(report, {"receiver": two, "sender": one}, text),
            f"mod_mam must archive by default, and its database answer: {EJABBERD}",
        )
    else:
        report.add(f"{domain}: archive", "not proven", "there is no message to look for", "see the message above")
    report.probe(
        f"{domain}: upload and download",
        lambda: _upload(report, place, domain, one, files),
        f"{NGINX}; or {EJABBERD}",
    )


def _message(one, two, text):
    start = time.monotonic()
    one.send(f"<message to={saxutils.quoteattr(two.jid)} type='chat' id='check'><body>{text}</body></message>")
    try:
        two.receive(lambda stanza: stanza.findtext(BODY) == text)
    except TimeoutError:
        raise _Wrong(
            f"from {one.jid} to {two.jid}: not there within {time.monotonic() - start:.0f} s",
            f"does a module hold it back, such as mod_block_strangers or a filter in xmpp:ejabberd:modules? {EJABBERD}",
        ) from None
    return f"from {one.jid} to {two.jid} in {(time.monotonic() - start) * 1000:.0f} ms"


def _archived(report, sessions, text):
    for whose, session in sessions.items():
        for attempt in range(1, 6):
            found = _archive(session, f"q{attempt}")
            if text in found:
                break
            time.sleep(min(0.3, report.left()))
        else:
            raise _Wrong(
                f"the {whose}'s archive answers with {len(found)} messages, and not the one just sent",
                f"mod_mam must have default: always, and its database take what it is given: {EJABBERD}",
            )
    return f"found by its text in the archives of {' and '.join(sessions)}"


def _archive(session, query):
    """The texts of the messages in the beginning of a user's archive."""
    session.iq("set", f"<query xmlns='{MAM}' queryid='{query}'/>")
    results = session.take(lambda stanza: stanza.find(f"{{{MAM}}}result[@queryid='{query}']") is not None)
    return [body.text for result in results for body in result.iter(BODY)]


def _upload(report, place, domain, session, files):
    service = f"{place.plan['services']['upload']}.{domain}"
    items = session.iq("get", f"<query xmlns='{DISCO_ITEMS}'/>", to=domain)
    if service not in [each.get("jid") for each in items.iter(f"{{{DISCO_ITEMS}}}item")]:
        raise _Wrong(f"{domain} does not tell clients of {service}", EJABBERD)
    info = session.iq("get", f"<query xmlns='{DISCO_INFO}'/>", to=service)
    if UPLOAD not in [each.get("var") for each in info.iter(f"{{{DISCO_INFO}}}feature")]:
        raise _Wrong(f"{service} does not offer {UPLOAD}", EJABBERD)
    content = secrets.token_bytes(65536)
    try:
        slot = session.iq(
            "get",
            f"<request xmlns='{UPLOAD}' filename='xmpp-check.bin' size='{len(content)}' "
            "content-type='application/octet-stream'/>",
            to=service,
        )
    except CommandExecutionError as wrong:
        raise _Wrong(f"{service} gives no slot: {wrong}", EJABBERD) from wrong
    put, get = (slot.find(f".//{{{UPLOAD}}}{each}") for each in ("put", "get"))
    for url in (put.get("url"), get.get("url")):
        if not url.startswith("https://"):
            raise _Wrong(f"{service} gives the URL {url}; expected https://...", EJABBERD)
    headers = {each.get("name"): each.text for each in put.iter(f"{{{UPLOAD}}}header")}
    headers["Content-Type"] = "application/octet-stream"
    address = place.addresses[0]
    with _at(f"PUT to {urllib.parse.urlsplit(put.get('url')).netloc}"):
        answer = _http(report, place, put.get("url"), address, method="PUT", body=content, headers=headers)
    if answer["status"] not in (200, 201, 204):
        raise _Wrong(f"PUT of {len(content)} bytes answers {answer['status']}", _refused(answer["status"]))
    files.append(get.get("url"))
    with _at(f"GET from {urllib.parse.urlsplit(get.get('url')).netloc}"):
        answer = _http(report, place, get.get("url"), address)
    if answer["status"] != 200:
        raise _Wrong(f"GET of what was just uploaded answers {answer['status']}", _refused(answer["status"]))
    if answer["body"] != content:
        raise _Wrong(f"GET answers with {len(answer['body'])} bytes that are not those uploaded", _refused(200))
    return f"{len(content)} bytes to and from {urllib.parse.urlsplit(get.get('url')).netloc}, the same"


def _refused(status):
    cannot = "is there disk space, may ejabberd write the uploads?"
    return {
        404: f"nginx must hand /upload on to ejabberd with the Host header: {NGINX}",
        413: f"nginx's client_max_body_size must not be below xmpp:ejabberd:upload:max_size: {NGINX}",
        # ejabberd closes the connection on a file that it cannot store, at times before nginx has sent all of it.
        502: f"nginx does not reach ejabberd's HTTP listener, or ejabberd broke it off: {cannot} {EJABBERD}",
    }.get(status, f"{cannot} {EJABBERD}; {NGINX}")
