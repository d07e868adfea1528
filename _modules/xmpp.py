"""
The XMPP service as a whole: which part of it is this machine's
================================================================

:func:`plan` works out, from the pillar and this machine, everything that the SLS files need. It is the one place
where the topology is read.
"""

import glob
import importlib.util
import ipaddress
import os
import re
import shutil
import sys

from salt.exceptions import SaltInvocationError

__virtualname__ = "xmpp"

SERVICES = {"muc": "conference", "pubsub": "pubsub", "upload": "upload"}
# The file transfer proxy (XEP-0065) is off, but a certificate without its name would have to be replaced to turn it on.
CERTIFIED = ("conference", "proxy", "pubsub", "upload")

PORTS = {
    "http": 80,
    "https": 443,
    "c2s": 5222,
    "c2s_tls": 5223,
    "s2s": 5269,
    "stun": 3478,
    # On loopback.
    "c2s_proxied": 5225,
    "ejabberd_http": 5280,
    "api": 5281,
    "https_local": 8443,
    # Between nodes; on loopback while there is one.
    "distribution": 4370,
}

PATHS = {
    "secrets": "/etc/salt/xmpp/secrets",
    "ca": "/etc/ssl/xmpp/ca.crt",
    "ca_key": "/etc/salt/xmpp/secrets/ca_key",
    "internal_certificate": "/etc/ssl/xmpp/internal.crt",
    "internal_key": "/etc/salt/xmpp/secrets/internal_key",
    "given_certificate": "/etc/ssl/xmpp/given.crt",
    "given_key": "/etc/salt/xmpp/secrets/given_key",
    "ejabberd_certificate": "/etc/ejabberd/certificate.pem",
    "nginx_certificate": "/etc/nginx/xmpp/certificate.pem",
    "certbot_certificate": "/etc/letsencrypt/live/xmpp/fullchain.pem",
    "certbot_key": "/etc/letsencrypt/live/xmpp/privkey.pem",
    "certbot_config": "/etc/salt/xmpp/secrets/certbot.ini",
    "certbot_credentials": "/etc/salt/xmpp/secrets/certbot_credentials.ini",
    "certbot_deploy": "/usr/local/lib/xmpp/certbot-deploy",
    "certbot_trust": "/etc/ssl/xmpp/certbot-trust.crt",
    "acme_webroot": "/var/www/xmpp-acme",
    "uploads": "/var/lib/xmpp/uploads",
}

# What the programs have of certificate and key, each in one file, and the group that reads it.
COPIES = {
    "ejabberd": {"name": PATHS["ejabberd_certificate"], "group": "ejabberd"},
    "nginx": {"name": PATHS["nginx_certificate"], "group": "root"},
}

LETSENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
LETSENCRYPT_STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"

# A setting of no effect (PostgreSQL takes any with a dot in its name) in the clusters that the formula made.
CLUSTER_MARK = "xmpp.cluster"

INNER_NETWORKS = (
    "10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.168.0.0/16 ::1/128 fc00::/7 fe80::/10"
).split()

RELEASES = {
    "12": {"codename": "bookworm", "postgres": "15", "stable": "bookworm-backports"},
    "13": {"codename": "trixie", "postgres": "17", "stable": None, "backports": "trixie-backports"},
}


def __virtual__():
    return __virtualname__


def plan():
    """
    Work out this machine's part of the XMPP service, from the pillar ``xmpp`` and the machine's grains.

    A minion is the node whose name, or whose ``minion``, is the minion's id. Where there is one node only, a minion
    without a master is that node.

    Returns a dict, without any secret:

    node, minion, address, public_addresses, roles
        this machine's name in ``xmpp:nodes``, its minion id, where nodes and where clients reach it, what it does
    nodes
        all of them: name to the same facts
    domain, domains, services, admin, users, rooms, contact
        what is served; ``services`` maps a service to the first label of its name
    ports, paths, urls
        where everything listens, lies, and is reached
    tls, packages, postgres, ejabberd, nginx, firewall
        what those SLS need
    init
        ``systemd``: whether it runs here; ``scripts``: whether there is what Debian's init scripts need
    salt_call, salt_call_local
        the command that runs this minion's salt-call, for what is to run every night; without asking a master

    Raises ``SaltInvocationError`` with every mistake in the pillar, a line each, and when this machine is none of the
    nodes, no Debian that is supported, or has neither systemd nor a minion that does without.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.plan
    """
    settings = _settings()
    release = _debian(settings)
    _service_provider()
    name = _node_name(settings["nodes"])
    nodes = {each: _node(each, node) for each, node in settings["nodes"].items()}
    if not nodes[name]["public_addresses"]:
        nodes[name]["address"] = nodes[name]["address"] or _own_address()
        nodes[name]["public_addresses"] = [nodes[name]["address"]]
    domain = settings["domain"]
    domains = [domain, *settings["virtual_hosts"]]
    admin = f"{settings['admin']}@{domain}"
    users = {jid: {"admin": user["admin"], "present": user["present"]} for jid, user in settings["users"].items()}
    return {
        "node": name,
        **nodes[name],
        "nodes": nodes,
        "domain": domain,
        "domains": domains,
        "services": dict(SERVICES),
        "admin": admin,
        "admins": sorted([admin, *(jid for jid, user in users.items() if user["admin"] and user["present"])]),
        "users": users,
        "rooms": settings["rooms"],
        "contact": {kind: uris for kind, uris in settings["contact"].items() if uris},
        "ports": _ports(settings),
        "paths": dict(PATHS),
        "urls": {
            "web": f"https://{domain}/",
            "websocket": f"wss://{domain}/ws",
            "bosh": f"https://{domain}/bosh",
            "upload": f"https://{domain}/upload",
            "admin": f"https://{domain}/admin/",
        },
        "tls": _tls(settings, domains, name, nodes[name]["roles"]),
        "packages": {"suite": release.get(settings["ejabberd"]["release"]), "codename": release["codename"]},
        "init": {"systemd": _systemd(), "scripts": bool(shutil.which("runlevel"))},
        "postgres": _postgres(settings, release),
        "ejabberd": _ejabberd(settings, name, nodes[name]["public_addresses"]),
        "nginx": settings["nginx"],
        "salt_call": _salt_call(),
        "salt_call_local": _salt_call(local=True),
        "firewall": settings["firewall"],
    }


def _settings():
    """
    What ``xmpp.settings`` returns. It is taken from the file beside this one: on a minion's first run the modules come
    along while Jinja asks for the plan, and then Salt's loader finds this one only.
    """
    path = os.path.join(os.path.dirname(__file__), "xmpp_pillar.py")
    spec = importlib.util.spec_from_file_location("xmpp_pillar", path)
    pillar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pillar)
    pillar.__pillar__ = __pillar__
    return pillar.settings()


def _debian(settings):
    major = str(__grains__.get("osmajorrelease"))
    if __grains__.get("os") != "Debian" or major not in RELEASES:
        raise SaltInvocationError(
            f"This machine is {__grains__.get('osfinger') or __grains__.get('os')}; expected Debian 12 or 13"
        )
    release = RELEASES[major]
    wanted = settings["ejabberd"]["release"]
    if wanted not in release:
        raise SaltInvocationError(
            f"xmpp:ejabberd:release: {wanted!r} does not exist for Debian {major}; expected stable, or Debian 13"
        )
    return release


def _node_name(nodes):
    minion = __opts__["id"]
    mine = [name for name, node in nodes.items() if minion == (node["minion"] or name)]
    if not mine and len(nodes) == 1 and __opts__.get("file_client") == "local":
        mine = list(nodes)
    if not mine:
        raise SaltInvocationError(
            f"xmpp:nodes: none is this minion ({minion}); expected a node of that name, or `minion: {minion}` in the "
            f"node that it is, out of {', '.join(nodes)}"
        )
    return mine[0]


def _node(name, node):
    return {
        "minion": node["minion"] or name,
        "address": node["address"],
        "public_addresses": node["public_addresses"] or ([node["address"]] if node["address"] else []),
        "roles": sorted(node["roles"]),
    }


def _own_address():
    addresses = [*__grains__.get("ipv4", []), *__grains__.get("ipv6", [])]
    usable = [
        a for a in addresses if not (ipaddress.ip_address(a).is_loopback or ipaddress.ip_address(a).is_link_local)
    ]
    return (usable or ["127.0.0.1"])[0]


def _ports(settings):
    low, high = settings["ejabberd"]["turn"]["ports"]
    return {**PORTS, "turn_min": low, "turn_max": high}


def _tls(settings, domains, node, roles):
    tls = settings["tls"]
    names = [name for domain in domains for name in (domain, *(f"{label}.{domain}" for label in CERTIFIED))]
    plan = {
        "source": tls["source"],
        "days": tls["internal"]["days"],
        "names": names,
        # What it must carry to be served.
        "required": names,
        "certificate": PATHS["internal_certificate"],
        "key": PATHS["internal_key"],
        "copies": [{"service": role, **copy} for role, copy in COPIES.items() if role in roles],
    }
    if tls["source"] == "files":
        pillar = __pillar__["xmpp"]["tls"]["files"]
        given = {key: pillar[key] if pillar[key].startswith("/") else PATHS[f"given_{key}"] for key in pillar}
        plan.update(given)
    if tls["source"] == "letsencrypt":
        plan.update(
            names=_asked_names(settings, domains, names, node),
            # A name that is new in the pillar is no reason to serve all others by the internal authority.
            required=[settings["domain"]],
            certificate=PATHS["certbot_certificate"],
            key=PATHS["certbot_key"],
            letsencrypt=_letsencrypt(tls["letsencrypt"]),
        )
    return plan


def _asked_names(settings, domains, names, node):
    """
    What the authority is asked for. Each of several nodes adds its own name, where that is below a domain whose names
    it proves anyway: an authority that gives few certificates a week for the very same names then tells them apart.
    """
    if settings["tls"]["letsencrypt"]["wildcard"]:
        names = [name for domain in domains for name in (domain, f"*.{domain}")]
        # Authorities refuse what a wildcard beside it covers.
        names = [name for name in names if f"*.{name.partition('.')[2]}" not in names or name.startswith("*")]
    below = any(node.endswith(f".{domain}") for domain in domains)
    covered = node in names or f"*.{node.partition('.')[2]}" in names
    return [*names, node] if len(settings["nodes"]) > 1 and below and not covered else names


def _letsencrypt(asked):
    challenge = asked["challenge"]
    block = asked.get(challenge, {})
    plugin = {"http": "webroot", "plugin": block.get("name")}.get(challenge, f"dns-{challenge}")
    credentials = challenge in ("cloudflare", "rfc2136") or bool(block.get("settings"))
    options = {
        "server": asked["directory"] or (LETSENCRYPT_STAGING if asked["staging"] else LETSENCRYPT),
        "key-type": asked["key_type"],
        "reuse-key": "true" if asked["reuse_key"] else None,
        "authenticator": plugin,
        "webroot-path": PATHS["acme_webroot"] if challenge == "http" else None,
        f"{plugin}-credentials": PATHS["certbot_credentials"] if credentials else None,
        f"{plugin}-propagation-seconds": block.get("propagation_seconds"),
        "deploy-hook": PATHS["certbot_deploy"],
    }
    return {
        "challenge": challenge,
        "package": None if challenge == "http" else block.get("package") or f"python3-certbot-{plugin}",
        "credentials": credentials,
        # What of the credentials file is no secret, and has defaults.
        "rfc2136": {key: asked["rfc2136"][key] for key in ("port", "algorithm", "sign_query")},
        # How it is asked for, now and at each renewal, by the names of certbot's options.
        "options": {option: str(value) for option, value in options.items() if value is not None},
        "reuse_key": asked["reuse_key"],
        "email": asked["email"],
        "external_account": asked["external_account"]["kid"],
        # What certbot trusts: the system's authorities and that one; None for the system's alone.
        "trust": PATHS["certbot_trust"] if asked["ca_bundle"] else None,
    }


def _postgres(settings, release):
    wanted = settings["postgres"]
    cluster = wanted["cluster"]
    clusters = _clusters()
    version = max((version for version, name in clusters if name == cluster), key=float, default=release["postgres"])
    there = clusters.get((version, cluster))
    taken = {each["port"] for each in clusters.values()}
    # Rounded, so that a kernel that reports a little more or less memory is no reason for a restart.
    memory = max(512, __grains__["mem_total"] // 512 * 512)
    ours = {
        "shared_buffers": f"{min(memory // 8, 4096)}MB",
        "effective_cache_size": f"{memory // 2}MB",
        "maintenance_work_mem": f"{min(max(memory // 32, 64), 1024)}MB",
        "work_mem": "8MB",
        "max_connections": 100,
        "listen_addresses": "",
        "password_encryption": "scram-sha-256",
        "wal_level": "replica",
        "wal_log_hints": "on",
        "full_page_writes": "on",
        "max_wal_senders": 10,
        "max_replication_slots": 10,
        "hot_standby": "on",
    }
    return {
        "version": version,
        "cluster": cluster,
        "port": there["port"] if there else next(port for port in range(5432, 65536) if port not in taken),
        "service": f"postgresql@{version}-{cluster}" if _systemd() else "postgresql",
        "socket": "/var/run/postgresql",
        "database": "ejabberd",
        "user": "ejabberd",
        # A cluster that was there has other users: it keeps what it has, but for what the pillar says.
        "settings": {**(ours if not there or there["ours"] else {}), **wanted["settings"]},
    }


def _clusters():
    """PostgreSQL's clusters as Debian keeps them: (version, name) to their port, and whether the formula made them."""
    found = {}
    for path in glob.glob("/etc/postgresql/*/*/postgresql.conf"):
        texts = []
        for each in [path, *sorted(glob.glob(f"{os.path.dirname(path)}/conf.d/*.conf"))]:
            with open(each, encoding="utf-8", errors="replace") as conf:
                texts.append(conf.read())
        text = "\n".join(texts)
        ports = re.findall(r"^\s*port\s*=?\s*'?(\d+)", text, re.MULTILINE)
        ours = re.search(rf"^\s*{re.escape(CLUSTER_MARK)}\s*=", text, re.MULTILINE)
        version, name = path.split("/")[3:5]
        found[version, name] = {"port": int(ports[-1]) if ports else 5432, "ours": bool(ours)}
    return found


def _ejabberd(settings, name, addresses):
    return {
        # What the operator adds to ejabberd.yml may hold secrets; the template takes it from the pillar.
        **{key: value for key, value in settings["ejabberd"].items() if key not in ("modules", "options")},
        "node": f"ejabberd@{name}",
        "distribution_address": "127.0.0.1",
        "turn": {
            "enabled": settings["ejabberd"]["turn"]["enabled"],
            "ipv4": next((a for a in addresses if ":" not in a), None),
            "ipv6": next((a for a in addresses if ":" in a), None),
            "blocked": _blocked(addresses),
        },
    }


def _blocked(addresses):
    """The networks that TURN shall not reach into: those that are not the Internet, but for the one of this machine."""
    own = [ipaddress.ip_address(address) for address in addresses]
    return [each for each in INNER_NETWORKS if not any(address in ipaddress.ip_network(each) for address in own)]


def _service_provider():
    """Without systemd as PID 1, but with its package, Salt would take every service for one that is started later."""
    if not _systemd() and "systemd_service" not in __opts__.get("disable_modules", []):
        raise SaltInvocationError(
            "systemd does not run here, and Salt must use Debian's init scripts: put "
            "`disable_modules: [systemd_service]` into the minion's configuration"
        )


def _systemd():
    """Whether systemd is what runs services here (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def _salt_call(local=False):
    beside = os.path.join(os.path.dirname(sys.executable), "salt-call")
    program = beside if os.path.exists(beside) else shutil.which("salt-call") or "salt-call"
    alone = " --local" if local or __opts__.get("file_client") == "local" else ""
    return f"{program}{alone} --config-dir={os.path.dirname(__opts__['conf_file'])}"
