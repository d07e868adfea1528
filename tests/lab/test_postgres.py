"""PostgreSQL: the cluster that the formula makes."""

import pytest

from . import service as library

pytestmark = pytest.mark.parametrize("debian", ["trixie"], indirect=True)


def sql(host, query, port=5432, database="postgres", user="postgres"):
    argv = ("psql", "-XAt", f"--port={port}", f"--dbname={database}", f"--command={query}")
    return host.run(*argv, user=user).stdout.strip()


def test_checksums_and_authentication(service):
    assert sql(service, "SHOW data_checksums") == "on"
    assert sql(service, "SHOW password_encryption") == "scram-sha-256"
    assert sql(service, "SELECT DISTINCT auth_method FROM pg_hba_file_rules WHERE type = 'local'") == "peer"
    assert sql(service, "SELECT DISTINCT auth_method FROM pg_hba_file_rules WHERE type <> 'local'") == "scram-sha-256"


def test_it_does_not_listen(service):
    assert sql(service, "SHOW listen_addresses") == ""
    assert "postgres" not in service.run("ss", "--listening", "--tcp", "--processes", "--no-header").stdout


def test_ejabberd_is_in_by_its_own_name_and_has_no_password(service):
    role = "SELECT rolpassword IS NULL, rolsuper, rolcanlogin FROM pg_authid WHERE rolname = 'ejabberd'"
    assert sql(service, role) == "t|f|t"
    assert sql(service, "SELECT current_user", database="ejabberd", user="ejabberd") == "ejabberd"
    database = "SELECT pg_get_userbyid(datdba), datcollate FROM pg_database WHERE datname = 'ejabberd'"
    assert sql(service, database) == "ejabberd|C.UTF-8"


@pytest.mark.parametrize("role", ["postgres", "ejabberd"])
def test_nobody_else_is_let_in(service, role):
    done = service.run("psql", "--username", role, "-c", "SELECT 1", "postgres", user="nobody", check=False)
    assert done.returncode != 0
    assert f'Peer authentication failed for user "{role}"' in done.stderr


def test_settings_by_memory_and_by_pillar(service):
    memory = int(service.run("awk", "/^MemTotal/ {print $2}", "/proc/meminfo").stdout) // 1024 // 512 * 512
    shared = "SELECT setting::bigint * 8192 / 1048576 FROM pg_settings WHERE name = 'shared_buffers'"
    assert int(sql(service, shared)) == min(memory // 8, 4096)
    try:
        library.give(service, postgres={"settings": {"max_connections": 123, "application_name": "it's"}})
        applied = library.apply(service, "xmpp.postgres")
        assert applied.code == 0, applied.failed()
        assert sql(service, "SHOW max_connections") == "123"
        assert "application_name = 'it''s'" in service.read("/etc/postgresql/17/main/conf.d/xmpp.conf")
        assert int(sql(service, shared)) == min(memory // 8, 4096)
    finally:
        library.give(service)
        library.apply(service, "xmpp.postgres")


@pytest.mark.parametrize("wrong", [{"max_conections": 5}, {"work_mem": "lots"}])
def test_a_wrong_setting_never_reaches_the_running_one(service, wrong):
    before = service.read("/etc/postgresql/17/main/conf.d/xmpp.conf"), service.read("/run/postgresql/17-main.pid")
    try:
        library.give(service, postgres={"settings": wrong})
        applied = library.apply(service, "xmpp.postgres")
        assert list(applied.failed()) == ["postgres_config"]
        assert next(iter(wrong)) in applied.text
        assert service.read("/etc/postgresql/17/main/conf.d/xmpp.conf") == before[0]
        assert service.read("/run/postgresql/17-main.pid") == before[1]
    finally:
        library.give(service)
    assert library.apply(service, "xmpp.postgres").changed() == {}
