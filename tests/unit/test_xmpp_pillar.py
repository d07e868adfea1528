"""The pillar: what is right is filled in as pillar.example says, and every mistake is told by its path."""

import copy
import re

import hypothesis
import pytest
import yaml
from hypothesis import strategies
from salt.exceptions import SaltInvocationError

from tests.unit.ejabberd.conftest import ROOT, load  # noqa: F401

EXAMPLE = (ROOT / "pillar.example").read_text()
MINIMAL = {"domain": "example.org", "nodes": {"xmpp1.example.org": None}}
SECRET = "TellNobody-7Jq"


@pytest.fixture
def pillar(load):  # noqa: F811
    return load("_modules/xmpp_pillar.py")


def changed(tree, fragment):
    """``tree`` with ``fragment`` merged over it."""
    tree = copy.deepcopy(tree)
    for key, value in fragment.items():
        deeper = isinstance(value, dict) and isinstance(tree.get(key), dict) and key != "nodes"
        tree[key] = changed(tree[key], value) if deeper else value
    return tree


def uncommented(keep):
    """The lines of pillar.example with the '#' taken from the settings of which ``keep(line)`` is true."""
    lines = []
    for line in EXAMPLE.splitlines():
        # A setting's value is a word or two, a list or a map; what explains one is a sentence.
        setting = re.match(r"( +)# ( *)([\w@.]+:(?: [\[{].*| \S+(?: \S+)?)?)(?: +#.*)?$", line)
        lines.append(setting[1] + setting[2] + setting[3] if setting and keep(setting[3]) else line)
    return yaml.safe_load("\n".join(lines))["xmpp"]


def leaves(tree, path=()):
    """Every value that is no map with something in it, by its path."""
    if isinstance(tree, dict) and tree:
        return {found: value for key, below in tree.items() for found, value in leaves(below, (*path, key)).items()}
    return {path: tree}


# pillar.example


def test_the_example_is_right(pillar):
    assert pillar.mistakes(yaml.safe_load(EXAMPLE)["xmpp"]) == []


def examples():
    """The pillars of docs/certificates.md; what is no whole tree is a part of the one before it."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/certificates.md").read_text(), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block)["xmpp"] for block in blocks if block.startswith("xmpp:")]


@pytest.mark.parametrize("example", examples(), ids=str)
def test_the_examples_of_certificates_are_right(pillar, example):
    assert pillar.mistakes(changed(MINIMAL, example)) == []


def test_there_is_an_example_of_each_way_to_a_certificate(pillar):
    found = [example["tls"] for example in examples() if "tls" in example]
    assert {tls["source"] for tls in found} == {"internal", "files", "letsencrypt"}
    assert {tls["letsencrypt"]["challenge"] for tls in found if "letsencrypt" in tls} == set(pillar.CHALLENGES)


def test_the_example_without_any_comment_sign_is_right(pillar):
    whole = uncommented(lambda line: True)
    assert {"users", "rooms", "secrets", "firewall", "postgres", "nginx", "ejabberd"} <= set(whole)
    assert pillar.mistakes(whole) == []


def test_what_is_commented_out_shows_the_defaults(pillar):
    # These show a value because the default is none: names, secrets, and what only the machine can know.
    shown = ("users", "rooms", "secrets", "nodes", "contact")
    example = {key: value for key, value in uncommented(lambda line: True).items() if key not in shown}
    example["tls"].pop("files")
    asked = example["tls"]["letsencrypt"]
    for key in ("challenge", "email", "directory", "ca_bundle", "external_account", "plugin"):
        asked.pop(key)
    for key in ("api_token", "email", "api_key"):
        asked["cloudflare"].pop(key)
    for key in ("server", "name", "secret"):
        asked["rfc2136"].pop(key)
    defaults = pillar.settings(MINIMAL)
    low, high = defaults["ejabberd"]["turn"]["ports"]
    defaults["ejabberd"]["turn"]["ports"] = f"{low}-{high}"
    given, meant = leaves(example), leaves(defaults)
    assert len(given) > 20
    assert given == {path: meant.get(path, "there is no such key") for path in given}


def test_every_key_is_in_the_example(pillar):
    example, tree = uncommented(lambda line: True), pillar.TREE

    def keys(spec, shown, path):
        if isinstance(spec, pillar._Map):
            keys(spec.entry, {key: value for each in shown.values() for key, value in each.items()}, f"{path}:*")
        elif isinstance(spec, pillar._Tree):
            assert set(spec.keys) == set(shown), path
            for key, below in spec.keys.items():
                if isinstance(below, pillar._Tree | pillar._Map):
                    keys(below, shown[key], f"{path}:{key}")

    keys(tree, example, "xmpp")


# What is wrong

WRONG = yaml.safe_load((ROOT / "tests/wrong_pillars.yaml").read_text())


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_by_its_path_and_nothing_else_is(pillar, case):
    fragment, path, words = (WRONG[case][key] for key in ("pillar", "path", "says"))
    tree = changed(MINIMAL, fragment) if isinstance(fragment, dict) else fragment
    pillar.__pillar__ = {} if tree is None else {"xmpp": tree}
    found = pillar.mistakes()
    assert [each.partition(": ")[0] for each in found] == [path], found
    said = found[0].partition(": ")[2]
    assert words in said
    assert "; expected " in said
    assert SECRET not in str(found)
    with pytest.raises(SaltInvocationError, match=re.escape(found[0])):
        pillar.settings()


def test_at_least_forty_kinds_of_mistakes():
    assert len(WRONG) >= 40


def test_many_mistakes_at_once_are_all_told(pillar):
    told = pillar.mistakes(
        {
            "domain": "example.org",
            "domian": "x",
            "virtual_hosts": ["example.org", "conference.example.org", "pubsub.example.org"],
            "nodes": {
                "xmpp1.example.org": {"address": "192.0.2.10", "roles": ["nginx"]},
                "xmpp2.example.org": {"address": "192.0.2.10", "minion": "xmpp1.example.org", "roles": ["nginx"]},
            },
            "users": {"a@example.com": {"admin": 1}, "b@example.com": {"password": SECRET}, "c@example.org": {}},
            "tls": {"source": "files"},
            "firewall": {"allow_tcp": [0, "x", 70000]},
        }
    )
    expected = [
        "xmpp:domian: is not known",
        "xmpp:users:a@example.com:admin: 1 is a int",
        "xmpp:firewall:allow_tcp: has an item that is out of range: 0, has an item that is a str: 'x', has an item",
        "xmpp:virtual_hosts: 'example.org' is served already",
        "xmpp:virtual_hosts: 'conference.example.org' is the name of a service",
        "xmpp:virtual_hosts: 'pubsub.example.org' is the name of a service",
        "xmpp:nodes: has 2 nodes",
        "xmpp:nodes: two nodes have the address 192.0.2.10",
        "xmpp:nodes: two nodes are the minion 'xmpp1.example.org'",
        "xmpp:nodes: no node has the role ejabberd",
        "xmpp:nodes: no node has the role postgres",
        "xmpp:users:a@example.com:password: is missing",
        "xmpp:users:a@example.com: is on no domain",
        "xmpp:users:b@example.com: is on no domain",
        "xmpp:users:c@example.org:password: is missing",
        "xmpp:tls:files:certificate: is missing",
        "xmpp:tls:files:key: is missing",
    ]
    assert len(told) == len(expected), told
    for says in expected:
        assert any(each.startswith(says) for each in told), (says, told)


def test_what_follows_from_a_mistake_is_not_told_as_another(pillar):
    # With the domain misspelt nobody can say whether the users and rooms are on it.
    told = pillar.mistakes(
        {
            **MINIMAL,
            "domain": "Example.org",
            "users": {"juliet@example.org": {"password": SECRET}},
            "rooms": {"balcony@conference.example.org": {}},
        }
    )
    assert len(told) == 1, told
    told = pillar.mistakes(
        {**MINIMAL, "virtual_hosts": "example.net", "users": {"j@example.net": {"password": SECRET}}}
    )
    assert len(told) == 1, told


@pytest.mark.parametrize(
    "wrong",
    [
        {"admin": {"password": SECRET}},
        {"domain": [SECRET]},
        {"ejabberd": {"modules": {"mod_http_upload": {"external_secret": SECRET}, "nonsense": {}}}},
        {"ejabberd": {"options": {"redis_password": SECRET, "listen": []}}},
        {"ejabberd": {"loglevel": {"x": SECRET}}},
        {"postgres": {"settings": {"primary_conninfo": f"password={SECRET}", "port": 1}}},
        {"tls": {"source": f"-----BEGIN PRIVATE KEY-----\n{SECRET}{'x' * 100}"}},
        {"tls": {"files": {"certificate": SECRET, "key": SECRET}}},
        {"secrets": {"admin_password": f"{SECRET}\n2", "erlang_cookie": f"{SECRET}!"}},
        {"secrets": {"admin_password": {SECRET: SECRET}}},
        {"secrets": SECRET},
        {"users": {"j@example.org": {"password": [SECRET]}}},
        {"users": SECRET},
        {"contact": {"abuse": [{"password": SECRET}]}},
        {"firewall": {"allow_tcp": [[SECRET]]}},
    ],
)
def test_no_mistake_shows_a_secret(pillar, wrong):
    told = pillar.mistakes(changed(MINIMAL, wrong))
    assert told
    assert SECRET not in str(told)


def test_what_is_right_shows_no_secret_either(pillar):
    given = {
        **MINIMAL,
        "users": {"j@example.org": {"password": SECRET}},
        "secrets": {"admin_password": SECRET},
        "tls": {"files": {"key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}"}},
    }
    assert SECRET not in str(pillar.settings(given))


TEXT = strategies.text(max_size=20)
NUMBERS = strategies.integers() | strategies.floats()
JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | NUMBERS | TEXT,
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(TEXT | strategies.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.given(data=strategies.data())
@hypothesis.settings(
    max_examples=300, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_nothing_that_yaml_can_say_breaks_it(pillar, data):
    example = uncommented(lambda line: True)
    path = data.draw(strategies.sampled_from(sorted(leaves(example), key=str)))
    path = path[: data.draw(strategies.integers(0, len(path)))]
    rubbish = data.draw(JSON)
    tree = {"xmpp": example}
    place = tree
    for key in ("xmpp", *path)[:-1]:
        place = place[key]
    place[("xmpp", *path)[-1]] = rubbish
    told = pillar.mistakes(tree["xmpp"])
    assert all(re.match(r"xmpp(:|$)", each) and "; expected " in each for each in told)
