"""The plan: which part is this machine's, worked out from the pillar and the machine; and never a secret in it."""

import json
import pathlib

import pytest
import yaml
from salt.exceptions import SaltInvocationError

from tests.unit.ejabberd.conftest import ROOT, load  # noqa: F401

EXAMPLE = yaml.safe_load((ROOT / "pillar.example").read_text())["xmpp"]
GRAINS = {
    "os": "Debian",
    "osmajorrelease": 13,
    "osfinger": "Debian-13",
    "mem_total": 4096,
    "ipv4": ["127.0.0.1", "198.51.100.7"],
    "ipv6": ["::1", "fe80::1", "2001:db8::7"],
}
SECRET = "TellNobody-7Jq"


@pytest.fixture
def machine(load, tmp_path, monkeypatch):  # noqa: F811
    """Return a function that gives the plan of a machine: its pillar, its id, grains that differ, files under /."""

    def plan(pillar=EXAMPLE, minion="xmpp1.example.org", files=(), file_client="local", systemd=True, **grains):
        names = {"__pillar__": {"xmpp": pillar}}
        read = load("_modules/xmpp_pillar.py", **names)
        opts = {"id": minion, "file_client": file_client, "conf_file": "/etc/salt/minion"}
        xmpp = load(
            "_modules/xmpp.py",
            **names,
            __opts__=opts,
            __grains__={**GRAINS, **grains},
            __salt__={"xmpp.settings": read.settings, "config.get": lambda *_: None},
        )
        for name, text in dict(files).items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        find = xmpp.glob.glob

        def under(pattern):
            return [f"/{pathlib.Path(path).relative_to(tmp_path)}" for path in find(f"{tmp_path}{pattern}")]

        monkeypatch.setattr(xmpp, "glob", type("glob", (), {"glob": staticmethod(under)}))
        monkeypatch.setattr(xmpp, "open", lambda path, **how: (tmp_path / path[1:]).open(**how), raising=False)
        monkeypatch.setattr(xmpp, "_systemd", lambda: systemd)
        return xmpp.plan()

    return plan


def test_of_the_example(machine):
    plan = machine()
    assert plan["node"] == plan["minion"] == "xmpp1.example.org"
    assert (plan["address"], plan["public_addresses"]) == ("192.0.2.10", ["192.0.2.10"])
    assert plan["roles"] == ["ejabberd", "nginx", "postgres"]
    assert plan["domains"] == ["example.org"]
    assert plan["admin"] == "admin@example.org"
    assert plan["admins"] == ["admin@example.org"]
    assert plan["contact"] == {"abuse": ["mailto:abuse@example.org"], "support": ["mailto:support@example.org"]}
    assert plan["ejabberd"]["node"] == "ejabberd@xmpp1.example.org"
    assert (plan["ports"]["turn_min"], plan["ports"]["turn_max"]) == (49152, 49407)
    assert plan["packages"] == {"suite": None, "codename": "trixie"}
    assert plan["salt_call"].endswith("salt-call --local --config-dir=/etc/salt")


def test_it_never_has_a_secret(machine):
    pillar = {
        **EXAMPLE,
        "users": {"juliet@example.org": {"password": SECRET}},
        "secrets": {"admin_password": SECRET, "erlang_cookie": SECRET.replace("-", "_")},
        "tls": {
            "source": "files",
            "files": {
                "certificate": f"-----BEGIN CERTIFICATE-----\n{SECRET}",
                "key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
            },
        },
        "ejabberd": {
            "modules": {"mod_http_upload": {"external_secret": SECRET}},
            "options": {"redis_password": SECRET},
        },
    }
    plan = json.dumps(machine(pillar))
    assert "juliet@example.org" in plan
    assert SECRET not in plan
    assert SECRET.replace("-", "_") not in plan


def test_the_certificate_has_every_name(machine):
    names = machine({**EXAMPLE, "virtual_hosts": ["example.net"]})["tls"]["names"]
    labels = ("", "conference.", "proxy.", "pubsub.", "upload.")
    assert sorted(names) == sorted(f"{label}{domain}" for domain in ("example.org", "example.net") for label in labels)


def letsencrypt(**asked):
    """A pillar whose certificate comes from an ACME authority."""
    asked = {"challenge": "cloudflare", "cloudflare": {"api_token": SECRET}, **asked}
    return {**EXAMPLE, "tls": {"source": "letsencrypt", "letsencrypt": asked}}


def test_what_an_authority_is_asked(machine):
    tls = machine(letsencrypt())["tls"]
    assert tls["names"] == [f"{label}example.org" for label in ("", "conference.", "proxy.", "pubsub.", "upload.")]
    assert tls["required"] == ["example.org"]
    assert (tls["certificate"], tls["key"]) == tuple(
        f"/etc/letsencrypt/live/xmpp/{name}.pem" for name in ("fullchain", "privkey")
    )
    asked = tls["letsencrypt"]
    assert asked["options"] == {
        "server": "https://acme-v02.api.letsencrypt.org/directory",
        "key-type": "ecdsa",
        "authenticator": "dns-cloudflare",
        "dns-cloudflare-credentials": "/etc/salt/xmpp/secrets/certbot_credentials.ini",
        "dns-cloudflare-propagation-seconds": "10",
        "deploy-hook": "/usr/local/lib/xmpp/certbot-deploy",
    }
    assert (asked["package"], asked["trust"]) == ("python3-certbot-dns-cloudflare", None)
    staging = machine(letsencrypt(staging=True))["tls"]["letsencrypt"]["options"]
    assert staging["server"] == "https://acme-staging-v02.api.letsencrypt.org/directory"


def test_an_authority_of_ones_own_is_asked(machine):
    own = letsencrypt(directory="https://acme.example.org/", ca_bundle="/root/ca.pem", reuse_key=True)
    asked = machine(own)["tls"]["letsencrypt"]
    assert asked["options"]["server"] == "https://acme.example.org/"
    assert asked["options"]["reuse-key"] == "true"
    assert asked["trust"] == "/etc/ssl/xmpp/certbot-trust.crt"


def test_other_challenges(machine):
    http = machine(letsencrypt(challenge="http"))["tls"]["letsencrypt"]
    assert (http["options"]["authenticator"], http["options"]["webroot-path"]) == ("webroot", "/var/www/xmpp-acme")
    assert (http["package"], http["credentials"]) == (None, False)
    plugin = {"name": "dns-ovh", "settings": {"dns_ovh_application_secret": SECRET}}
    asked = machine(letsencrypt(challenge="plugin", plugin=plugin))["tls"]["letsencrypt"]
    assert (asked["options"]["authenticator"], asked["package"]) == ("dns-ovh", "python3-certbot-dns-ovh")
    assert asked["credentials"] and "dns-ovh-propagation-seconds" not in asked["options"]
    assert SECRET not in json.dumps(machine(letsencrypt(challenge="plugin", plugin=plugin)))
    bare = machine(letsencrypt(challenge="plugin", plugin={"name": "dns-route53"}))["tls"]["letsencrypt"]
    assert bare["credentials"] is False


def test_the_names_of_a_wildcard(machine):
    pillar = {**letsencrypt(wildcard=True), "virtual_hosts": ["chat.example.org", "example.net"]}
    names = machine(pillar)["tls"]["names"]
    # chat.example.org is covered, what is below it is not.
    assert names == ["example.org", "*.example.org", "*.chat.example.org", "example.net", "*.example.net"]


@pytest.mark.parametrize(
    ("node", "more", "own"),
    [
        ("web.example.org", {}, ["web.example.org"]),
        ("web.example.org", {"wildcard": True}, []),
        ("a.web.example.org", {"wildcard": True}, ["a.web.example.org"]),
        ("web.example.net", {}, []),
        ("upload.example.org", {}, []),
    ],
)
def test_a_node_among_several_adds_its_own_name_where_that_costs_nothing(machine, node, more, own):
    pillar = {**letsencrypt(**more), "nodes": {"xmpp1.example.org": None, node: {"roles": []}}}
    alone = machine(letsencrypt(**more))["tls"]["names"]
    plan = machine(pillar, minion=node)
    assert plan["tls"]["names"] == [*alone, *own]
    assert (plan["roles"], plan["tls"]["copies"]) == ([], [])


@pytest.mark.parametrize(
    ("files", "certificate", "key"),
    [
        ({"certificate": "/root/c.pem", "key": "/root/k.pem"}, "/root/c.pem", "/root/k.pem"),
        (
            {"certificate": "-----BEGIN CERTIFICATE-----", "key": "/root/k.pem"},
            "/etc/ssl/xmpp/given.crt",
            "/root/k.pem",
        ),
        (
            {"certificate": "/root/c.pem", "key": "\n-----BEGIN PRIVATE KEY-----"},
            "/root/c.pem",
            "/etc/salt/xmpp/secrets/given_key",
        ),
    ],
)
def test_where_certificate_and_key_are(machine, files, certificate, key):
    tls = machine({**EXAMPLE, "tls": {"source": "files", "files": files}})["tls"]
    assert (tls["source"], tls["certificate"], tls["key"]) == ("files", certificate, key)


def test_admins_are_those_who_are_there(machine):
    users = {
        "nurse@example.org": {"password": "x", "admin": True},
        "juliet@example.org": {"password": "x"},
        "tybalt@example.org": {"present": False, "admin": True},
    }
    assert machine({**EXAMPLE, "users": users})["admins"] == ["admin@example.org", "nurse@example.org"]


# Which node this is


def test_a_node_is_found_by_its_minion(machine):
    pillar = {**EXAMPLE, "nodes": {"xmpp1.example.org": {"minion": "m7"}}}
    assert machine(pillar, minion="m7", file_client="remote")["node"] == "xmpp1.example.org"


def test_the_only_node_is_whoever_has_no_master(machine):
    assert machine(minion="whatever")["node"] == "xmpp1.example.org"
    with pytest.raises(SaltInvocationError, match=r"none is this minion \(whatever\).*xmpp1\.example\.org"):
        machine(minion="whatever", file_client="remote")


def test_an_address_that_the_pillar_does_not_say_is_the_machines_own(machine):
    plan = machine({"domain": "example.org", "nodes": {"xmpp1.example.org": {}}})
    assert (plan["address"], plan["public_addresses"]) == ("198.51.100.7", ["198.51.100.7"])
    assert plan["nodes"]["xmpp1.example.org"]["address"] == "198.51.100.7"
    plan = machine({"domain": "example.org", "nodes": {"a.example.org": {}}}, ipv4=["127.0.0.1"])
    assert plan["address"] == "2001:db8::7"


@pytest.mark.parametrize(
    ("grains", "release", "says"),
    [
        ({"osmajorrelease": 11, "osfinger": "Debian-11"}, "stable", "is Debian-11; expected Debian 12 or 13"),
        ({"os": "Ubuntu", "osmajorrelease": 24, "osfinger": "Ubuntu-24.04"}, "stable", "is Ubuntu-24.04"),
        ({"osmajorrelease": 12}, "backports", "xmpp:ejabberd:release: 'backports' does not exist for Debian 12"),
    ],
)
def test_machines_that_will_not_do(machine, grains, release, says):
    with pytest.raises(SaltInvocationError, match=says):
        machine({**EXAMPLE, "ejabberd": {"release": release}}, **grains)


@pytest.mark.parametrize(
    ("major", "release", "packages", "postgres"),
    [
        (12, "stable", {"suite": "bookworm-backports", "codename": "bookworm"}, "15"),
        (13, "stable", {"suite": None, "codename": "trixie"}, "17"),
        (13, "backports", {"suite": "trixie-backports", "codename": "trixie"}, "17"),
    ],
)
def test_where_packages_come_from(machine, major, release, packages, postgres):
    plan = machine({**EXAMPLE, "ejabberd": {"release": release}}, osmajorrelease=major)
    assert plan["packages"] == packages
    assert plan["postgres"]["version"] == postgres


# PostgreSQL


@pytest.mark.parametrize(
    ("memory", "shared", "cache", "maintenance"),
    [
        (300, "64MB", "256MB", "64MB"),
        (2003, "192MB", "768MB", "64MB"),
        (16384, "2048MB", "8192MB", "512MB"),
        (262144, "4096MB", "131072MB", "1024MB"),
    ],
)
def test_postgres_gets_memory_by_the_machines_with_caps(machine, memory, shared, cache, maintenance):
    settings = machine(mem_total=memory)["postgres"]["settings"]
    assert settings["shared_buffers"] == shared
    assert settings["effective_cache_size"] == cache
    assert settings["maintenance_work_mem"] == maintenance


def test_a_few_megabytes_more_or_less_are_no_other_settings(machine):
    plans = [machine(mem_total=memory)["postgres"]["settings"] for memory in (4096, 4100, 4211)]
    assert plans[0] == plans[1] == plans[2]


def test_the_pillars_settings_go_over_ours(machine):
    settings = machine({**EXAMPLE, "postgres": {"settings": {"max_connections": 300, "log_connections": "on"}}})
    settings = settings["postgres"]["settings"]
    assert settings["max_connections"] == 300
    assert settings["log_connections"] == "on"
    assert settings["listen_addresses"] == ""


MINE = "port = 5433\nxmpp.cluster = 'created'\n"
OTHERS = "data_directory = '/x'\nport = 5432\t\t# (change requires restart)\nmax_connections = 900\n"


def conf(cluster, text):
    return {f"/etc/postgresql/{cluster}/postgresql.conf": text}


def test_a_cluster_of_ours_is_configured(machine):
    postgres = machine(files=conf("17/main", MINE))["postgres"]
    assert (postgres["version"], postgres["port"]) == ("17", 5433)
    assert postgres["settings"]["listen_addresses"] == ""


def test_a_cluster_of_others_is_left_as_it_is_but_for_what_the_pillar_says(machine):
    assert machine(files=conf("17/main", OTHERS))["postgres"]["settings"] == {}
    postgres = machine({**EXAMPLE, "postgres": {"settings": {"work_mem": "64MB"}}}, files=conf("17/main", OTHERS))[
        "postgres"
    ]
    assert (postgres["port"], postgres["settings"]) == (5432, {"work_mem": "64MB"})


def test_an_older_cluster_is_used_as_it_is(machine):
    postgres = machine(files=conf("15/main", OTHERS))["postgres"]
    assert (postgres["version"], postgres["service"]) == ("15", "postgresql@15-main")


def test_of_several_the_newest_of_the_name_counts(machine):
    files = {**conf("9.6/main", OTHERS), **conf("15/main", MINE), **conf("17/other", OTHERS)}
    assert machine(files=files)["postgres"]["version"] == "15"


def test_a_new_cluster_takes_no_ones_port(machine):
    files = {**conf("17/other", OTHERS), **conf("15/third", "port = 5433"), **conf("16/fourth", "#port = 5434")}
    assert machine(files=files)["postgres"]["port"] == 5434


def test_a_port_may_be_said_in_conf_d(machine):
    files = {**conf("17/main", OTHERS), "/etc/postgresql/17/main/conf.d/port.conf": "port = '6000'"}
    assert machine(files=files)["postgres"]["port"] == 6000
