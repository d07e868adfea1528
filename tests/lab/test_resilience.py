"""What dies comes back by itself; what cannot be applied leaves the service as it was."""

import asyncio
import http.client
import time

import pytest

from . import service as library
from .clients import can_login
from .service import DOMAIN

# How long the service may be away, in seconds, on a machine that is busy with other tests.
AWAY = 30
MAIN_PROCESS = {
    "PostgreSQL": "head --lines=1 /var/lib/postgresql/*/main/postmaster.pid",
    "ejabberd": "pidof beam.smp",
    "nginx": "cat /run/nginx.pid",
}


def back(outside):
    """Return whether people can log in, through nginx as well."""

    async def everywhere():
        for way in ("STARTTLS", "HTTPS's port"):
            async with outside.client("juliet", resource="probe", way=way, online=False):
                pass
        return True

    return asyncio.run(everywhere())


@pytest.mark.parametrize("program", MAIN_PROCESS)
def test_what_is_killed_comes_back(service, outside, program):
    before = service.sh(MAIN_PROCESS[program]).stdout.strip()
    assert before.isdecimal() and back(outside)
    service.run("kill", "-KILL", before)
    killed = time.monotonic()

    def another():
        done = service.sh(MAIN_PROCESS[program], check=False)
        now = done.stdout.strip()
        return now.isdecimal() and now != before and service.run("kill", "-0", now, check=False).returncode == 0

    library.wait_for(another, AWAY, f"{program} runs again")
    library.wait_for(lambda: back(outside), AWAY, "people can log in again")
    print(f"{program}: back after {time.monotonic() - killed:.1f} s")


@pytest.mark.parametrize("how", ["in good order", "by a power cut"])
def test_it_is_there_after_a_boot(service, outside, how):
    if how == "in good order":
        service.restart()
    else:
        service.kill()
        service.start()
    library.wait_for(lambda: back(outside), AWAY, "people can log in")
    failed = service.run("systemctl", "list-units", "--failed", "--plain", "--no-legend").stdout
    assert failed == ""


# What the pillar says wrongly, the state that has to say so, and a word that it has to say.
WRONG = {
    "an option that ejabberd does not have": (
        {"ejabberd": {"options": {"no_such_option": 1}}}, "ejabberd_config", "no_such_option",
    ),
    "a module that there is not": (
        {"ejabberd": {"modules": {"mod_no_such": {}}}}, "ejabberd_config", "mod_no_such",
    ),
    "a setting that PostgreSQL does not have": (
        {"postgres": {"settings": {"no_such_setting": 1}}}, "postgres_config", "no_such_setting",
    ),
    "a value that PostgreSQL does not take": (
        {"postgres": {"settings": {"max_connections": "many"}}}, "postgres_config", "max_connections",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_in_the_pillar_is_told_and_harms_nobody(service, outside, what):
    settings, state, word = WRONG[what]
    pids = [service.sh(command).stdout for command in MAIN_PROCESS.values()]
    library.give(service, **settings)
    applied = library.apply(service)
    library.give(service)
    assert applied.code != 0
    assert set(applied.failed()) == {state}, applied.failed() or applied.text
    assert word in applied.failed()[state]
    assert [service.sh(command).stdout for command in MAIN_PROCESS.values()] == pids, "nothing was restarted"
    assert can_login(outside)


def test_anothers_mistake_in_nginx_is_told_and_harms_nobody(service, outside):
    service.put("/etc/nginx/conf.d/others.conf", "server { listen 8080; no_such_directive; }\n")
    library.give(service, nginx={"hsts_days": 30})
    applied = library.apply(service)
    service.run("rm", "/etc/nginx/conf.d/others.conf")
    assert applied.code != 0
    assert set(applied.failed()) == {"nginx_http"}, applied.failed() or applied.text
    assert "no_such_directive" in applied.failed()["nginx_http"]
    assert back(outside)
    assert hsts(outside) == "max-age=31536000"


def test_after_all_these_failures_the_right_pillar_is_applied_to_the_end(service, outside):
    library.give(service, nginx={"hsts_days": 30}, users={f"paris@{DOMAIN}": {"password": "of Paris"}})
    applied = library.apply(service)
    assert applied.code == 0, applied.failed()
    assert set(applied.changed()) == {"nginx_http", "nginx_service", f"paris@{DOMAIN}"}
    assert can_login(outside, "paris", "of Paris")
    library.wait_for(lambda: hsts(outside) == "max-age=2592000", 5, "nginx serves with what it was given")


def hsts(outside):
    """Return what nginx says now, whatever its files say."""
    connection = http.client.HTTPSConnection(DOMAIN, context=outside.tls("http/1.1"), timeout=10)
    connection.request("GET", "/")
    return connection.getresponse().getheader("Strict-Transport-Security")
