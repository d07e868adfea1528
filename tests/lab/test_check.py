"""``xmpp.check`` and ``xmpp.dns_records`` on a host that the formula made.

All is proven, and whatever is broken is found.

Each way of breaking the service is one test: the check must fail at that place, and say what to do about it.
"""

import contextlib
import datetime
import json
import re
import time

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from . import service as library

EJABBERD = "/etc/ejabberd/ejabberd.yml"
PROBES = {
    "clients, STARTTLS, port 5222",
    "clients, TLS, port 5223",
    "clients, TLS by ALPN, port 443",
    "servers, STARTTLS, port 5269",
    "web, port 443",
    "certificate, time left",
    "web, port 80",
    "discovery by host-meta",
    "WebSocket",
    "BOSH",
    "two users for the probes",
    "login, port 5222",
    "login, port 5223",
    "login, port 443",
    "message",
    "archive",
    "upload and download",
    "what the check made is removed",
}
# The ways of failing are the same on both.
ONLY_TRIXIE = pytest.mark.parametrize("debian", ["trixie"], indirect=True)


@pytest.fixture(scope="module")
def server(lab, converged):
    """The service of pillar.example, with a second domain and an IPv6 address."""
    host = library.host(lab, converged["layers"])
    library.give(host, virtual_hosts=["example.net"], nodes={library.NODE: {"public_addresses": library.ADDRESSES}})
    applied = library.apply(host)
    assert applied.code == 0, applied.failed()
    yield host
    host.destroy()


def call(server, function, *arguments, check=True):
    done = server.run(library.SALT_CALL, "--local", "--out=json", function, *arguments, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done.returncode, json.loads(done.stdout)["local"]


def proof(server, *arguments):
    """The answer of a check that must agree with salt-call's exit code; and nothing of it must be left."""
    code, answer = call(server, "xmpp.check", *arguments, check=False)
    assert (code == 0) is answer["ok"]
    assert answer["ok"] is not any(probe["result"] == "failed" for probe in answer["probes"])
    assert all(probe["seen"] for probe in answer["probes"])
    assert all(probe["do"] for probe in answer["probes"] if probe["result"] == "failed")
    return answer


def results(answer):
    return {probe["what"]: probe for probe in answer["probes"]}


def accounts(server):
    """The accounts that only a check makes."""
    domains = ("example.org", "example.net")
    names = [
        name for domain in domains for name in server.run("ejabberdctl", "registered_users", domain).stdout.split()
    ]
    return [name for name in names if name.startswith("xmpp-check")]


def uploads(server):
    return server.sh("find /var/lib/xmpp/uploads -type f").stdout.split()


def archived(server):
    rows = server.run("psql", "-Atd", "ejabberd", "-c", "SELECT count(*) FROM archive", user="postgres").stdout
    return int(rows)


def test_all_is_proven_and_nothing_stays(server):
    answer = proof(server)
    assert answer["ok"], [probe for probe in answer["probes"] if probe["result"] == "failed"]
    probes = results(answer)
    for domain in ("example.org", "example.net"):
        for what in PROBES:
            assert probes[f"{domain}: {what}"]["result"] == "ok"
        assert probes[f"{domain}: certificate, trusted by strangers"]["result"] == "not proven"
        assert probes[f"{domain}: DNS"]["result"] == "not proven"
        assert "SCRAM-SHA-256-PLUS" in probes[f"{domain}: login, port 5223"]["seen"]
    assert "192.0.2.10" in probes["STUN, UDP port 3478"]["seen"]
    assert "2001:db8::10" in probes["STUN, UDP port 3478"]["seen"]
    assert probes["the way from outside"]["result"] == "not proven"
    assert accounts(server) == []
    assert uploads(server) == []
    assert archived(server) == 0


def test_a_killed_check_is_cleaned_up_by_the_next(server):
    # It waits 10 s for a message that does not come, with its users there: that is when it is killed.
    with ejabberd(module("mod_block_strangers", allow_local_users=False))(server):
        server.sh(
            f"{library.SALT_CALL} --local xmpp.check & check=$!; "
            "while kill -0 $check && ! ejabberdctl registered_users example.org | grep -q ^xmpp-check-; do :; done; "
            "kill -9 $check; wait $check || true",
            timeout=120,
        )
    assert accounts(server)
    server.run("ejabberdctl", "register", "xmpp-check", "example.org", "a person of that name")
    try:
        answer = proof(server)
        assert answer["ok"]
        seen = results(answer)["example.org: two users for the probes"]["seen"]
        assert "of a check that did not end" in seen
        assert accounts(server) == ["xmpp-check"]
        assert uploads(server) == []
    finally:
        server.run("ejabberdctl", "unregister", "xmpp-check", "example.org")


def test_no_password_is_logged_or_told(server):
    server.sh(": > /var/log/ejabberd/ejabberd.log")
    output = server.run(library.SALT_CALL, "--local", "--log-level=all", "xmpp.check")
    told = output.stdout + output.stderr + server.read("/var/log/ejabberd/ejabberd.log")
    assert "xmpp-check-" in told
    # The passwords are the only thing of this length and alphabet that there is.
    found = re.findall(r"(?<![\w+/=-])[A-Za-z0-9_-]{32}(?![\w+/=-])", told)
    assert [
        each for each in found if re.search(r"[A-Z]", each) and re.search(r"[a-z]", each) and re.search(r"\d", each)
    ] == []


# Breaking it


@contextlib.contextmanager
def changed(server, path, change, apply):
    """A file with another content, taken up by what reads it, and then as before."""
    before = server.read(path)
    after = change(before)
    assert after != before
    server.run("tee", path, input=after)
    try:
        server.sh(apply)
        yield
    finally:
        server.run("tee", path, input=before)
        server.sh(apply)


RESTART = "systemctl reset-failed ejabberd; systemctl restart ejabberd; ejabberdctl started"
RELOAD_NGINX = "nginx -t; systemctl reset-failed nginx; systemctl restart nginx"


def ejabberd(*changes):
    """Each change is a function that is given ejabberd's settings."""

    def changed_text(text):
        settings = yaml.safe_load(text)
        for change in changes:
            change(settings)
        return yaml.safe_dump(settings)

    return lambda server: changed(server, EJABBERD, changed_text, RESTART)


def closed(port):
    def change(settings):
        settings["listen"] = [each for each in settings["listen"] if each["port"] != port]

    return change


def listener(port, **options):
    def change(settings):
        for each in settings["listen"]:
            if each["port"] == port:
                each.pop("starttls_required", None)
                each.update(options)

    return change


def module(name, **options):
    return lambda settings: settings["modules"].setdefault(name, {}).update(options)


def without_module(name):
    return lambda settings: settings["modules"].pop(name)


def option(**options):
    return lambda settings: settings.update(options)


def nginx(replacements):
    """Replace patterns in whatever file of nginx has them."""

    @contextlib.contextmanager
    def broken(server):
        files = server.sh("find -L /etc/nginx -type f -name '*.conf' -o -path '*/sites-enabled/*'").stdout.split()
        left = set(replacements)

        def change(text):
            for pattern, replacement in replacements.items():
                text, count = re.subn(pattern, replacement, text)
                if count:
                    left.discard(pattern)
            return text

        found = [each for each in dict.fromkeys(files) if change(server.read(each)) != server.read(each)]
        assert not left, f"nothing in {files} is like {left}"
        with contextlib.ExitStack() as stack:
            for path in found:
                stack.enter_context(changed(server, path, change, RELOAD_NGINX))
            yield

    return broken


def shell(do, undo):
    @contextlib.contextmanager
    def broken(server):
        server.sh(do)
        try:
            yield
        finally:
            server.sh(undo)

    return broken


BOTH = ("example.org", "*.example.org", "example.net", "*.example.net")
COPIES = ("/etc/ejabberd/certificate.pem", "/etc/nginx/xmpp/certificate.pem")


def signed(names, days, subject, authority=None):
    """A certificate and its key: by ``authority`` (certificate and key), or by itself."""
    now = datetime.datetime.now(datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    issuer, signer = (authority[0].subject, authority[1]) if authority else (name, key)
    begin, end = (now + datetime.timedelta(days=each) for each in days)
    builder = x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number(), begin, end)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), False)
    return builder.add_extension(x509.BasicConstraints(not names, None), True).sign(signer, hashes.SHA256()), key


def certificate(*names, days=(-1, 89), ca="ours"):
    """Another certificate in both programs: for those names, valid from and to so many days from now."""

    @contextlib.contextmanager
    def broken(server):
        authority = signed((), (-1, 99), "Some other authority")
        if ca == "ours":
            authority = (
                x509.load_pem_x509_certificate(server.read("/etc/ssl/xmpp/ca.crt").encode()),
                serialization.load_pem_private_key(server.read("/etc/salt/xmpp/secrets/ca_key").encode(), None),
            )
        made, key = signed(names, days, "example.org", authority)
        text = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # ejabberd takes a file whose time is the same in seconds for the same file.
        use = f"sleep 1.1; touch {COPIES[0]}; ejabberdctl reload_config; {RELOAD_NGINX}"
        with (
            changed(server, COPIES[0], lambda _: text.decode(), "true"),
            changed(server, COPIES[1], lambda _: text.decode(), use),
        ):
            yield
        server.sh(use)

    return broken


STARTTLS, DIRECT, ALPN = "clients, STARTTLS, port 5222", "clients, TLS, port 5223", "clients, TLS by ALPN, port 443"
SERVERS, UPLOAD, REMOVED = "servers, STARTTLS, port 5269", "upload and download", "what the check made is removed"
HOST_META, STUN = "discovery by host-meta", "STUN, UDP port 3478"

# What breaks it, and for each probe that must then fail a part of what it must advise. No other may fail. What does
# not disturb one another is broken together.
CASES = {
    "ports closed, no archive": (
        ejabberd(closed(5222), closed(3478), without_module("mod_mam")),
        {STARTTLS: "nothing listens there", STUN: "nothing listens there", "archive": "mod_mam"},
    ),
    "no STARTTLS, no servers, archive on request, upload to a closed port": (
        ejabberd(
            listener(5222, starttls=False),
            closed(5269),
            module("mod_mam", default="never"),
            module("mod_http_upload", put_url="https://@HOST@:5443/upload"),
        ),
        {
            STARTTLS: "apply xmpp.ejabberd",
            SERVERS: "nothing listens there",
            "archive": "default: always",
            UPLOAD: "nothing listens there",
        },
    ),
    "TLS optional or missing, also for uploads": (
        ejabberd(
            listener(5222, starttls=True),
            listener(5223, tls=False),
            option(s2s_use_starttls="optional"),
            module("mod_http_upload", put_url="http://@HOST@/upload"),
        ),
        {
            STARTTLS: "TLS must be required",
            DIRECT: "apply xmpp.ejabberd",
            SERVERS: "TLS must be required",
            UPLOAD: "apply xmpp.ejabberd",
        },
    ),
    "what is behind nginx closed": (
        ejabberd(closed(5225), closed(5280)),
        {
            ALPN: "apply xmpp.nginx",
            HOST_META: "apply xmpp.nginx",
            "WebSocket": "apply xmpp.nginx",
            "BOSH": "apply xmpp.nginx",
            UPLOAD: "does not reach ejabberd",
        },
    ),
    "nginx hands on nothing": (
        nginx(
            {
                "xmpp-client": "xmpp-nobody",
                "host-meta": "nowhere",
                r"location = /ws\b": "location = /nowhere-ws",
                r"location = /bosh\b": "location = /nowhere-bosh",
                r"client_max_body_size [^;]+;": "client_max_body_size 1k;",
            }
        ),
        {
            ALPN: "must hand on what has the ALPN",
            HOST_META: "apply xmpp.nginx",
            "WebSocket": "apply xmpp.nginx",
            "BOSH": "apply xmpp.nginx",
            UPLOAD: "client_max_body_size",
        },
    ),
    "nginx stopped": (
        shell("systemctl stop nginx", "systemctl start nginx"),
        dict.fromkeys(
            (ALPN, "web, port 80", "web, port 443", HOST_META, "WebSocket", "BOSH", UPLOAD), "nothing listens there"
        ),
    ),
    "nobody may log in": (
        ejabberd(lambda settings: settings["access_rules"].update(c2s={"deny": "all"})),
        dict.fromkeys(("login, port 5222", "login, port 5223", "login, port 443"), "apply xmpp.ejabberd"),
    ),
    "no SCRAM": (
        ejabberd(option(disable_sasl_mechanisms=["SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])),
        dict.fromkeys((STARTTLS, DIRECT, ALPN), "apply xmpp.ejabberd"),
    ),
    "no secret of the API": (
        shell("mv /etc/salt/xmpp/secrets/api_token /root/", "mv /root/api_token /etc/salt/xmpp/secrets/"),
        {"two users for the probes": "apply xmpp.ejabberd"},
    ),
    "database stopped": (
        shell("systemctl stop 'postgresql@*'", "systemctl start postgresql"),
        {"two users for the probes": "apply xmpp.ejabberd"},
    ),
    "messages held back, files stay": (
        ejabberd(
            module("mod_block_strangers", allow_local_users=False), module("mod_http_upload", rm_on_unregister=False)
        ),
        {"message": "does a module hold it back", REMOVED: "rm_on_unregister"},
    ),
    "no upload": (
        ejabberd(without_module("mod_http_upload"), without_module("mod_http_upload_quota")),
        {SERVERS: "apply xmpp.ejabberd", UPLOAD: "apply xmpp.ejabberd"},
    ),
    "uploads cannot be written": (
        shell(
            "cd /var/lib/xmpp; mv uploads uploads.before; touch uploads",
            "cd /var/lib/xmpp; rm uploads; mv uploads.before uploads",
        ),
        {UPLOAD: "may ejabberd write"},
    ),
    "silence": (
        shell(
            "nft 'add table inet t; add chain inet t c { type filter hook input priority 0; };"
            " add rule inet t c tcp dport 5222 drop'",
            "nft delete table inet t",
        ),
        {STARTTLS: "firewall"},
    ),
}


def failed(answer):
    """What failed, whatever the domain, each with what to do."""
    return {
        probe["what"].removeprefix("example.org: ").removeprefix("example.net: "): probe["do"]
        for probe in answer["probes"]
        if probe["result"] == "failed"
    }


@ONLY_TRIXIE
@pytest.mark.parametrize("case", CASES)
def test_what_is_broken_is_found_and_nothing_else(server, case):
    broken, expected = CASES[case]
    try:
        with broken(server):
            found = failed(proof(server))
    finally:
        server.sh("find /var/lib/xmpp/uploads -type f -delete")
    assert found.keys() == expected.keys()
    for what, advice in expected.items():
        assert advice in found[what], what


CERTIFICATES = {
    "of another name": (
        certificate("other.example"),
        {DIRECT: "lacks this name", SERVERS: "lacks this name", "web, port 443": "lacks this name"},
    ),
    "without the services' names": (certificate("example.org", "example.net"), {SERVERS: "lacks this name"}),
    "that has ended": (certificate(*BOTH, days=(-90, -1)), {STARTTLS: "renew it", "web, port 443": "renew it"}),
    "that has not begun": (certificate(*BOTH, days=(1, 90)), {ALPN: "set the clock", "BOSH": "set the clock"}),
    "that ends soon": (
        certificate(*BOTH, days=(-85, 5)),
        {"certificate, time left": "less than a third of its 90 days"},
    ),
    "of an unknown authority": (
        certificate(*BOTH, ca="another"),
        {STARTTLS: "trusts its authority", "WebSocket": "trusts its authority"},
    ),
}


@ONLY_TRIXIE
@pytest.mark.parametrize("case", CERTIFICATES)
def test_a_bad_certificate_is_found(server, case):
    broken, expected = CERTIFICATES[case]
    with broken(server):
        found = failed(proof(server))
    for what, advice in expected.items():
        assert advice in found[what], what


@ONLY_TRIXIE
def test_after_all_that_it_is_well_again(server):
    assert proof(server)["ok"]
    assert accounts(server) == []


@ONLY_TRIXIE
def test_a_frozen_server_costs_no_more_time_than_given(server):
    server.sh("pkill -STOP beam")
    try:
        started = time.monotonic()
        answer = proof(server, "timeout=15")
        assert time.monotonic() - started < 25
        assert answer["seconds"] < 16
        assert not answer["ok"]
    finally:
        server.sh("pkill -CONT beam")


# DNS, with a real server


@pytest.fixture
def nameserver(lab, server, debian):
    host = lab.host("ns.example.org", ("192.0.2.53", "2001:db8::53"), layers=debian)
    host.sh("apt-get -q update && apt-get -qy install bind9", env={"DEBIAN_FRONTEND": "noninteractive"})
    server.put("/etc/resolv.conf", "nameserver 192.0.2.53\n")
    yield host
    server.put("/etc/resolv.conf", "")
    host.destroy()


def serve(nameserver, records):
    """A zone for each domain, with what ``xmpp.dns_records`` said for it."""
    options = 'options { directory "/var/cache/bind"; listen-on { any; }; recursion no; dnssec-validation no; };\n'
    for domain in ("example.org", "example.net"):
        options += f'zone "{domain}" {{ type primary; file "/etc/bind/{domain}"; }};\n'
        mine = [line for line in records.splitlines() if line.split()[0].endswith(f"{domain}.")]
        head = f"$TTL 60\n@ IN SOA ns.invalid. root.invalid. {int(time.time())} 60 60 60 60\n@ IN NS ns.invalid.\n"
        nameserver.put(f"/etc/bind/{domain}", head + "\n".join(mine) + "\n")
    nameserver.put("/etc/bind/named.conf", options)
    nameserver.sh("named-checkconf -z; systemctl restart named")


@ONLY_TRIXIE
def test_dns_is_believed_when_it_leads_here(server, nameserver):
    zone = call(server, "xmpp.dns_records", "format=zone")[1]
    everything = call(server, "xmpp.dns_records")[1]
    serve(nameserver, "")
    assert call(server, "xmpp.dns_records", "missing=True")[1] == everything
    probes = results(proof(server))
    assert probes["example.org: DNS, addresses"]["result"] == "not proven"
    assert "lacks 192.0.2.10" in probes["example.org: DNS, addresses"]["seen"]

    serve(nameserver, zone)
    assert call(server, "xmpp.dns_records", "missing=True")[1] == []
    answer = proof(server)
    assert answer["ok"]
    told = {what: probe for what, probe in results(answer).items() if ": DNS" in what}
    assert len(told) >= 10
    assert {probe["result"] for probe in told.values()} == {"ok"}
    assert "192.0.2.53" in told["example.net: DNS, _xmpp-client._tcp"]["seen"]

    # One address leads elsewhere, one SRV record is gone.
    serve(
        nameserver,
        re.sub(r"(?m)^_xmpp-server._tcp.example.org.*\n", "", zone.replace("A    192.0.2.10", "A    192.0.2.99", 1)),
    )
    probes = results(proof(server))
    assert "has 192.0.2.99" in probes["example.org: DNS, addresses"]["seen"]
    assert probes["example.org: DNS, _xmpp-server._tcp"]["result"] == "not proven"
    assert probes["example.org: DNS, _xmpp-client._tcp"]["result"] == "ok"
    missing = call(server, "xmpp.dns_records", "missing=True")[1]
    assert sorted((each["name"], each["type"]) for each in missing) == [
        ("_xmpp-server._tcp.example.org.", "SRV"),
        ("example.org.", "A"),
    ]
