"""What the check makes of what it sees: what is ok, what has failed, what is not proven, and that it cleans up."""

import ssl
import time

import pytest
from salt.exceptions import CommandExecutionError, SaltInvocationError


@pytest.fixture
def accounts():
    """ejabberd's accounts of example.org, as its API shows them."""
    return {}


@pytest.fixture
def salt(plan, accounts):
    def api(command, timeout, host, user=None, password=None):
        if command == "registered_users":
            return list(accounts)
        if command == "check_account":
            return 0 if user in accounts else 1
        if command == "register":
            accounts[user] = password
        else:
            accounts.pop(user, None)
        return 0

    def refused(*args, **kwargs):
        raise ConnectionRefusedError(111, "Connection refused")

    def silent(name, type, timeout):
        raise CommandExecutionError(f"no DNS server tells of {name}")

    return {
        "xmpp.plan": lambda: plan,
        "xmpp.dns_records": list,
        "xmpp.dns_lookup": silent,
        "ejabberd.api": api,
        **dict.fromkeys(
            ("xmpp.session", "xmpp.http_request", "xmpp.websocket_open", "xmpp.bosh_open", "xmpp.stun_binding"), refused
        ),
    }


@pytest.fixture
def check(load, salt, tmp_path):
    module = load("_modules/xmpp_check.py", __salt__=salt, __opts__={"id": "xmpp1.example.org"})
    module.LOCK = str(tmp_path / "lock")
    module._is_own = lambda address: True
    return module


def results(answer):
    return {probe["what"]: probe["result"] for probe in answer["probes"]}


def failing(wrong):
    def act():
        raise wrong

    return act


def test_a_dead_machine_fails_and_does_not_raise(check, accounts):
    answer = check.check(timeout=10)
    assert answer["ok"] is False
    assert check.__context__["retcode"] == 1
    seen = results(answer)
    assert seen["example.org: DNS"] == "not proven"
    assert seen["the way from outside"] == "not proven"
    for what in (
        "clients, STARTTLS, port 5222",
        "clients, TLS, port 5223",
        "clients, TLS by ALPN, port 443",
        "servers, STARTTLS, port 5269",
        "web, port 80",
        "web, port 443",
        "discovery by host-meta",
        "WebSocket",
        "BOSH",
    ):
        assert seen[f"example.org: {what}"] == "failed", what
    assert seen["STUN, UDP port 3478"] == "failed"
    assert seen["example.org: message, archive, upload"] == "not proven"
    assert all(probe["do"] for probe in answer["probes"] if probe["result"] == "failed")
    assert accounts == {}


def test_what_is_not_proven_is_told_so(check):
    report = check._Report(time.monotonic() + 10)
    report.probe("x", failing(check._NotProven("why", "what to do")), "")
    assert report.probes == [{"what": "x", "result": "not proven", "seen": "why", "do": "what to do"}]


@pytest.mark.parametrize("timeout", [9, 601, "60", None, True])
def test_wrong_timeouts(check, timeout):
    with pytest.raises(SaltInvocationError, match="10 to 600"):
        check.check(timeout=timeout)


@pytest.mark.parametrize(
    "wrong", [KeyError("x"), ValueError("x"), RecursionError(), UnicodeDecodeError("utf-8", b"x", 0, 1, "x")]
)
def test_no_answer_however_strange_makes_a_probe_raise(check, wrong):
    report = check._Report(time.monotonic() + 10)
    assert report.probe("x", failing(wrong), "what to do") is False
    assert report.probes[0]["result"] == "failed"
    assert type(wrong).__name__ in report.probes[0]["seen"]


def test_what_there_was_no_time_for_has_failed(check):
    report = check._Report(time.monotonic() - 1)
    assert report.probe("x", lambda: "fine", "") is False
    assert report.probes == [
        {
            "what": "x",
            "result": "failed",
            "seen": "not tried: the time of the check was over",
            "do": "give the check more time (timeout=...), and find out what is slow",
        }
    ]


def test_users_are_removed_when_the_check_is_interrupted(check, accounts):
    made = []

    def interrupted(*args):
        made.extend(accounts)
        raise KeyboardInterrupt

    check._as_users = interrupted
    with pytest.raises(KeyboardInterrupt):
        check.check(timeout=10)
    assert len(made) == 2
    assert accounts == {}


def test_the_first_user_is_removed_when_the_second_cannot_be_made(check, salt, accounts):
    api = salt["ejabberd.api"]

    def full(command, **kwargs):
        if command == "register" and accounts:
            raise CommandExecutionError("the database is full")
        return api(command, **kwargs)

    salt["ejabberd.api"] = full
    answer = check.check(timeout=10)
    assert "the database is full" in str(answer["probes"])
    assert accounts == {}


def test_a_user_that_stays_is_a_failure(check, salt):
    api = salt["ejabberd.api"]
    salt["ejabberd.api"] = lambda command, **kwargs: 0 if command == "unregister" else api(command, **kwargs)
    answer = check.check(timeout=10)
    assert results(answer)["example.org: what the check made is removed"] == "failed"


def test_leftovers_are_told_from_what_is_in_use_and_from_people(check, accounts):
    mine, other = check._machine(), "ffffffff"
    end = "0123456789abcdef"
    later, earlier = f"{int(time.time()) + 300:08x}", f"{int(time.time()) - 5:08x}"
    gone = [
        f"xmpp-check-{mine}-{later}-{end}",
        f"xmpp-check-{mine}-{earlier}-{end}",
        f"xmpp-check-{other}-{earlier}-{end}",
    ]
    stay = [
        f"xmpp-check-{other}-{later}-{end}",
        "juliet",
        "xmpp-check",
        f"xmpp-check-{mine}",
        f"xmpp-check-{mine}-{earlier}-{end}x",
        f"x-xmpp-check-{mine}-{earlier}-{end}",
    ]
    accounts.update(dict.fromkeys([*gone, *stay], ""))
    answer = check.check(timeout=10)
    assert sorted(accounts) == sorted(stay)
    assert "removed 3 of a check that did not end" in str(answer["probes"])


def test_names_and_passwords_are_never_the_same_and_no_password_is_told(check, salt):
    api, passwords, names = salt["ejabberd.api"], set(), set()

    def note(command, **kwargs):
        if command == "register":
            passwords.add(kwargs["password"])
            names.add(kwargs["user"])
        return api(command, **kwargs)

    salt["ejabberd.api"] = note
    answers = str([check.check(timeout=10) for _ in range(3)])
    assert len(passwords) == len(names) == 6
    assert not [each for each in passwords if each in answers or len(each) < 20]
    assert all(check.LEFTOVER.fullmatch(each) for each in names)


def test_two_checks_are_not_at_work_at_once(check):
    now = time.monotonic()
    with check._only_one(now), pytest.raises(CommandExecutionError, match="another check"), check._only_one(now):
        pass


# Certificates


def certificate(begin, end):
    def written(days):
        return time.strftime("%b %d %H:%M:%S %Y GMT", time.gmtime(time.time() + days * 86400))

    return {"notBefore": written(begin), "notAfter": written(end), "issuer": ((("commonName", "test CA"),),)}


def test_much_time_left(check):
    assert check._time_left({"port 5223": certificate(-10, 80)}).startswith("80.0 days (port 5223), issued by test CA")


def test_the_shortest_time_counts(check):
    seen, do = check._time_left({"port 5223": certificate(-10, 80), "port 443": certificate(-65, 25)})
    assert seen.startswith("25.0 days (port 443)")
    assert "less than a third of its 90 days" in do


def test_the_last_tenth_is_a_failure(check):
    with pytest.raises(check._Wrong, match=r"8.0 days \(port 443\)"):
        check._time_left({"port 5223": certificate(-10, 80), "port 443": certificate(-82, 8)})


def test_who_renews_is_told_and_counts_in_the_last_third(check):
    works = {"works": True, "seen": "renewed by certbot (certbot.timer)", "do": ""}
    broken = {"works": False, "seen": "renewed by certbot (certbot.timer), but that does not run", "do": "start it"}
    much, little = {"port 5223": certificate(-10, 80)}, {"port 5223": certificate(-65, 25)}
    assert check._time_left(much, works).endswith(", renewed by certbot (certbot.timer)")
    assert check._time_left(much, broken)[1] == "start it"
    assert "less than a third" in check._time_left(little, works)[1]
    with pytest.raises(check._Wrong, match="less than a third of its life is left") as wrong:
        check._time_left(little, broken)
    assert wrong.value.do == "start it"


def test_no_certificate_proves_nothing(check):
    with pytest.raises(check._NotProven):
        check._time_left({})


@pytest.mark.parametrize(
    ("code", "advice"), [(10, "has ended"), (9, "not valid yet"), (62, "lacks this name"), (20, "whole chain")]
)
def test_advice_for_certificates(check, code, advice):
    wrong = ssl.SSLCertVerificationError(1, "certificate verify failed")
    wrong.verify_code, wrong.verify_message = code, "as OpenSSL says"
    report = check._Report(time.monotonic() + 10)
    report.probe("x", failing(wrong), "other advice")
    assert "as OpenSSL says" in report.probes[0]["seen"]
    assert advice in report.probes[0]["do"]


# DNS


@pytest.fixture
def ask():
    found = {}

    def ask(name, type):
        return {"status": "NOERROR", "answers": found.get((name, type), []), "server": "192.0.2.53"}

    ask.found = found
    return ask


EVERYONE = {"192.0.2.10", "2001:db8::10"}


def test_addresses_that_lead_here(check, ask):
    ask.found.update({("example.org.", "A"): ["192.0.2.10"], ("example.org.", "AAAA"): ["2001:db8::10"]})
    assert "192.0.2.53" in check._dns_addresses(ask, ["example.org."], EVERYONE)


@pytest.mark.parametrize(
    ("a", "aaaa", "seen"),
    [
        ([], [], "lacks 192.0.2.10"),
        (["192.0.2.10"], [], "lacks 2001:db8::10"),
        (["192.0.2.10", "198.51.100.1"], ["2001:db8::10"], "has 198.51.100.1"),
    ],
)
def test_addresses_that_do_not_all_lead_here(check, ask, a, aaaa, seen):
    ask.found.update({("example.org.", "A"): a, ("example.org.", "AAAA"): aaaa})
    with pytest.raises(check._NotProven, match=seen):
        check._dns_addresses(ask, ["example.org."], EVERYONE)


SRV = "_xmpp-client._tcp.example.org."


@pytest.mark.parametrize(
    "answers", [["10 0 5222 example.org."], ["0 5 5222 Example.ORG."], ["10 0 5222 chat.example.org."]]
)
def test_srv_records_that_lead_here(check, ask, answers):
    ask.found.update({(SRV, "SRV"): answers, ("chat.example.org.", "A"): ["192.0.2.10"]})
    assert answers[0] in check._dns_srv(ask, SRV, ["10 0 5222 example.org."], EVERYONE)


@pytest.mark.parametrize(
    ("answers", "seen"),
    [
        ([], "no record"),
        (["10 0 5222 elsewhere.example."], "leads to 10 0 5222 elsewhere.example"),
        (["10 0 5222 example.org.", "20 0 5222 unknown.example."], "leads to 20 0 5222 unknown.example"),
        (["10 0 5223 example.org."], "leads to 10 0 5223 example.org"),
    ],
)
def test_srv_records_that_lead_elsewhere(check, ask, answers, seen):
    ask.found.update({(SRV, "SRV"): answers, ("elsewhere.example.", "A"): ["198.51.100.1"]})
    with pytest.raises(check._NotProven, match=seen):
        check._dns_srv(ask, SRV, ["10 0 5222 example.org."], EVERYONE)


def test_records_belong_to_the_longest_domain(check):
    domains = ["example.org", "chat.example.org"]
    assert check._belongs("conference.example.org.", "example.org", domains)
    assert check._belongs("_xmpp-client._tcp.chat.example.org.", "chat.example.org", domains)
    assert not check._belongs("_xmpp-client._tcp.chat.example.org.", "example.org", domains)
    assert not check._belongs("example.organic.", "example.org", domains)
