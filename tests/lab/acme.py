"""A certificate authority that speaks ACME (pebble), and the DNS that it asks (bind9), on a host of their own.

Both are Debian's, and know nothing of the tests: names are proven by what stands in the DNS, or is served on port 80.
"""

import datetime
import http.server
import json
import ssl
import subprocess
import tempfile
import threading
import urllib.request

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from .library import frozen
from .service import ADDRESSES, DOMAIN, wait_for

HERE = "192.0.2.1"  # this process
NAME, ADDRESS = "acme.lab", "192.0.2.53"
DIRECTORY = f"https://{NAME}:14000/dir"
FURTHER = "further.example"
ZONES = (DOMAIN, FURTHER)
KEY_NAME = "certbot."
KEY = "bm8gb25lIHNoYWxsIHNlZSB0aGlzIGtleSBmb3IgVFNJRyBhbnl3aGVyZSBpbiB0aGUgbGFiLCBuZXZlciE="
LIVE = "/etc/letsencrypt/live/xmpp"
LIFE = 90 * 86400
ACCOUNT, ACCOUNT_KEY = "kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
# As they are called in the credentials of certbot's plugin, after dns_rfc2136_.
SETTINGS = {"server": ADDRESS, "name": KEY_NAME, "secret": KEY, "algorithm": "HMAC-SHA512"}
# What the key may do is what the documentation tells: the TXT records of the names, and nothing else.
NAMED = f"""\
key "{KEY_NAME}" {{ algorithm hmac-sha512; secret "{KEY}"; }};
"""
LABELS = ("", "conference.", "proxy.", "pubsub.", "upload.", *(f"xmpp{number}." for number in range(1, 6)))
GRANT = f"        grant {KEY_NAME} name _acme-challenge.{{name}}. TXT;\n"
ZONE = """\
zone "{zone}" {{
    type primary;
    file "/var/lib/bind/{zone}";
    update-policy {{
{grants}        grant local-ddns zonesub any;
    }};
}};
"""
RECORDS = """\
$TTL 1
@ SOA ns hostmaster 1 3600 600 86400 1
@ NS ns
ns A {server}
@ A {address}
@ CAA 0 issue "pebble.example"
* A {address}
"""
PEBBLE = """\
{{"pebble": {{
    "listenAddress": "0.0.0.0:14000", "managementListenAddress": "0.0.0.0:15000", "httpPort": 80, "tlsPort": 443,
    "certificate": "/etc/pebble/server.pem", "privateKey": "/etc/pebble/server.key", "ocspResponderURL": "",
    "retryAfter": {{"authz": 1, "order": 1}}, "certificateValidityPeriod": {life},
    "externalAccountBindingRequired": {binding}, "externalAccountMACKeys": {{"{account}": "{key}"}}
}}}}
"""
UNIT = f"""\
[Service]
# As fast as it can; no nonce refused for exercise; no name taken for proven because it was once.
Environment=PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0 PEBBLE_AUTHZREUSE=0
ExecStart=/usr/bin/pebble -config /etc/pebble/%i.json -dnsserver {ADDRESS}:53
"""


class Authority:
    """The lab's own authority, for the TLS of servers that the tests run: not the one of the ACME server."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._openssl("req", "-x509", *self._new("ca"), "-subj", "/CN=Lab authority", "-days", "3650")
        self.certificate = self._read("ca.pem")

    def issue(self, name):
        """Return (chain, key) as PEM for a server called ``name``."""
        self._openssl(
            "req", "-x509", *self._new(name), "-subj", f"/CN={name}", "-days", "3650", "-CA", "ca.pem", "-CAkey",
            "ca.key", "-addext", f"subjectAltName=DNS:{name}", "-addext", "basicConstraints=critical,CA:FALSE",
        )  # fmt: skip
        return self._read(f"{name}.pem"), self._read(f"{name}.key")

    def path(self, name):
        """Return where a file of it is: NAME.pem, NAME.key."""
        return f"{self._folder.name}/{name}"

    def _new(self, name):
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", f"{name}.key", "-out", f"{name}.pem"]  # fmt: skip

    def _openssl(self, *argv):
        subprocess.run(["openssl", *argv], cwd=self._folder.name, check=True, capture_output=True)

    def _read(self, name):
        with open(self.path(name), encoding="ascii") as file:
            return file.read()


class Web:
    """A server of this process with TLS at ADDRESS and ``port``, called ``name``; ``answer(handler, body)`` does it."""

    def __init__(self, lab, ca, name, port, answer):
        ca.issue(name)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, content = answer(self, body)
                content = json.dumps(content).encode()
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        for method in ("GET", "POST", "DELETE", "HEAD"):
            setattr(Handler, f"do_{method}", Handler.handle_request)

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca.path(f"{name}.pem"), ca.path(f"{name}.key"))
        self._server = http.server.ThreadingHTTPServer((HERE, port), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        lab.names.setdefault(HERE, []).append(name)
        lab.write_hosts()

    def close(self):
        """End it."""
        self._server.shutdown()
        self._server.server_close()


class Acme:
    """The host with both on it; ``ca``: the lab's authority; ``host``."""

    def __init__(self, lab, life=LIFE, binding=False):
        self.ca = Authority()
        layers = frozen("acme", lambda: build(lab))
        self.host = lab.host(NAME, addresses=(ADDRESS, "2001:db8::53"), layers=layers)
        for path, text in zip(("/etc/pebble/server.pem", "/etc/pebble/server.key"), self.ca.issue(NAME), strict=True):
            self.host.put(path, text)
        settings = PEBBLE.format(life=life, binding=str(binding).lower(), account=ACCOUNT, key=ACCOUNT_KEY)
        self.host.put("/etc/pebble/lab.json", settings)
        for zone in ZONES:
            self.host.put(f"/var/lib/bind/{zone}", RECORDS.format(server=ADDRESS, address=ADDRESSES[0]))
        self.host.sh("chown bind: /var/lib/bind/*; systemctl start named")
        self.start()

    def start(self):
        """Start pebble. It knows nothing of earlier accounts, and has a new root."""
        self.host.run("systemctl", "start", "pebble@lab")
        self.root = wait_for(lambda: self._get("roots/0"), 30, "pebble")

    def stop(self):
        """Stop pebble."""
        self.host.run("systemctl", "stop", "pebble@lab")

    def age(self, machine, days, names=None):
        """Have certbot on ``machine`` keep a certificate that is so many ``days`` old; its deploy hook is not called.

        Key and life are the same, and the names, unless ``names`` says others; pebble's key has signed it. No clock is
        turned, of certbot or of the check.
        """
        issuer = x509.load_pem_x509_certificate(self._get("intermediates/0").encode())
        signer = serialization.load_pem_private_key(self._get("intermediate-keys/0").encode(), password=None)
        young = x509.load_pem_x509_certificate(machine.read(f"{LIVE}/cert.pem").encode())
        begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
        made = (
            x509.CertificateBuilder()
            .subject_name(young.subject)
            .issuer_name(issuer.subject)
            .public_key(young.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(seconds=LIFE))
        )
        for extension in young.extensions:
            value = extension.value
            if names and isinstance(value, x509.SubjectAlternativeName):
                value = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
            if not isinstance(value, x509.AuthorityKeyIdentifier):
                made = made.add_extension(value, extension.critical)
        pem = made.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
        chain = issuer.public_bytes(serialization.Encoding.PEM).decode()
        for name, text in {"cert": pem, "chain": chain, "fullchain": pem + chain}.items():
            put(machine, name, text)

    def orders(self):
        """Return how many orders pebble was asked for."""
        return self.log().count("Added order ")

    def log(self):
        """Return what pebble has logged."""
        return self.host.run("journalctl", "--no-pager", "--output=cat", "--unit=pebble@lab").stdout

    def pillar(self, **more):
        """Return ``xmpp:tls`` for a node that asks this authority by RFC 2136; ``more``: for ``letsencrypt``."""
        asked = {
            "challenge": "rfc2136",
            "directory": DIRECTORY,
            "ca_bundle": self.ca.certificate,
            "rfc2136": {"server": ADDRESS, "name": KEY_NAME, "secret": KEY, "propagation_seconds": 0},
        }
        return {"source": "letsencrypt", "letsencrypt": {**asked, **more}}

    def limited(self, lab):
        """Return a second way to it, ``directory`` and a server to close: it gives accounts, but no more orders."""
        name, port = "limited.lab", 14001
        directory = json.loads(self._get("dir", 14000))
        directory["newOrder"] = f"https://{name}:{port}/order"

        def answer(handler, body):
            if handler.path == "/dir":
                return 200, {}, directory
            said = "too many certificates (5) already issued for this exact set of identifiers in the last 168h0m0s"
            said += ", retry after 2026-12-01 00:00:00 UTC"
            problem = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": said, "status": 429}
            headers = {"Content-Type": "application/problem+json", "Retry-After": "3600", "Replay-Nonce": "bm9uY2U"}
            return 429, headers, problem

        return f"https://{name}:{port}/dir", Web(lab, self.ca, name, port, answer)

    def txt(self, name):
        """Return the TXT records at ``name``."""
        return self.host.run("dig", "+short", f"@{ADDRESS}", name, "TXT").stdout.split()

    def update(self, command):
        """Have the DNS do a command of nsupdate's."""
        self.host.run("nsupdate", "-l", input=f"{command}\nsend\n")

    def _get(self, path, port=15000):
        context = ssl.create_default_context(cadata=self.ca.certificate)
        with urllib.request.urlopen(f"https://{NAME}:{port}/{path}", timeout=5, context=context) as answer:
            return answer.read().decode()


def put(machine, name, text):
    """Write a file of what certbot on ``machine`` keeps: cert, chain, fullchain or privkey."""
    file = machine.run("readlink", "--canonicalize", f"{LIVE}/{name}.pem").stdout.strip()
    machine.put(file, text, mode="0600" if name == "privkey" else "0644")


def build(lab):
    """Make the disk of the host: both programs installed, nothing of one run's in it."""
    host = lab.host(NAME, addresses=(ADDRESS, "2001:db8::53"))
    install = "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy --no-install-recommends install"
    host.sh(f"{install} bind9 bind9-dnsutils pebble", timeout=300)
    zones = ""
    for zone in ZONES:
        grants = "".join(GRANT.format(name=label + zone) for label in LABELS)
        zones += ZONE.format(zone=zone, grants=grants)
    host.put("/etc/bind/named.conf.local", NAMED + zones)
    host.put("/etc/bind/named.conf.options", 'options { directory "/var/cache/bind"; recursion no; };\n')
    host.put("/etc/systemd/system/pebble@.service", UNIT)
    host.sh("systemctl disable named")
    return host.freeze()
