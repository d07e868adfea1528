"""Applied again, nothing changes; in test mode, the truth is told and nothing touched."""

import pytest

from . import service as library

# What Salt keeps for itself, what the system writes at any time, and what is no file.
ELSEWHERE = (
    "/dev /proc /run /srv/xmpp-formula /sys /tmp /var/cache/salt "
    "/var/log/journal /var/log/salt /var/log/wtmp /var/log/wtmp.db "
    "/etc/salt/pki /etc/salt/minion.d /opt/salt-xmpp"
).split()
# What goes on while the service runs.
LIVE = "/var/log /var/lib/postgresql /var/lib/ejabberd".split()
CHANGED_AT_FIRST = {
    "postgres_packages", "postgres_cluster", "postgres_config", "postgres_service", "postgres_role",
    "postgres_database",
    "certificates_ca_key", "certificates_ca", "certificates_key", "certificates_server",
    "ejabberd_packages", "ejabberd_node", "ejabberd_cookie", "ejabberd_certificate", "ejabberd_config",
    "ejabberd_running",
    "nginx_packages", "nginx_certificate", "nginx_stream", "nginx_http", "nginx_page", "nginx_service",
    "accounts_admin", *library.USERS,
    *(f"{library.SECRETS}/{name}" for name in ("admin_password", "erlang_cookie", "api_token")),
}  # fmt: skip


def tree(machine, *without):
    """Return every file of ``machine``, with type, mode, owner, size and time of its content."""
    prune = " -o ".join(f"-path {path}" for path in (*ELSEWHERE, *without))
    listed = machine.sh(
        f"find / \\( {prune} \\) -prune -o -not -type d -printf '%p %y %m %U %G %s %T@ %l\\n' "
        f"-o -printf '%p %y %m %U %G\\n'"
    )
    return set(listed.stdout.splitlines())


def running(machine):
    """Return the processes of ``machine`` that are services' own."""
    return machine.run("systemctl", "show", "--property=MainPID,Id", "ejabberd", "nginx", "postgresql@*", "cron").stdout


@pytest.mark.parametrize("test", [True, False], ids=["in test mode", "for real"])
def test_a_converged_machine_is_left_as_it_is(service, test):
    before, ran = tree(service, *LIVE), running(service)
    applied = library.apply(service, "xmpp", f"test={test}")
    assert applied.code == 0, applied.failed()
    assert applied.changed() == {}
    assert len(applied) > 40
    assert tree(service, *LIVE) ^ before == set()
    assert running(service) == ran


def test_test_mode_on_a_bare_machine_tells_all_and_touches_nothing(lab, debian):
    machine = lab.host("bare.example.org", layers=f"{debian}+salt")
    try:
        library.prepare(machine)
        before, installed = tree(machine), machine.run("dpkg-query", "--list").stdout
        applied = library.apply(machine, "xmpp", "test=True")
        assert applied.failed() == {} and applied.code == 0, applied.text[-4000:]
        assert {state["result"] for state in applied.values()} <= {None, True}
        told = {name for name, state in applied.items() if state["result"] is None}
        assert CHANGED_AT_FIRST - told == set()
        assert tree(machine) ^ before == set()
        assert machine.run("dpkg-query", "--list").stdout == installed
    finally:
        machine.destroy()
