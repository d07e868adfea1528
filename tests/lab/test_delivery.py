"""The tree by a master: from its file server, by gitfs, to a minion that never synced, and at boot."""

import json
import socket

import pytest

from . import service
from .delivery import changed, wrong
from .library.salt import BIN, salt, salt_master, salt_minion

TREE = service.CHECKOUT_THERE


@pytest.fixture(scope="module")
def master(lab, debian):
    host = lab.host("master.example.org", ("192.0.2.100", "2001:db8::100"), layers=f"{debian}+salt")
    salt_master(host, file_roots={"base": [TREE, f"{TREE}/salt", "/srv/salt"]})
    host.put("/srv/pillar/top.sls", "base: {'xmpp1*': [xmpp]}\n")
    host.put("/srv/pillar/xmpp.sls", (service.CHECKOUT / "pillar.example").read_text())
    host.put("/srv/salt/top.sls", "base: {'xmpp1*': [xmpp]}\n")
    yield host
    host.destroy()


@pytest.fixture(scope="module")
def node(lab, debian, master):
    """A minion of that master that has never synced anything."""
    host = service.host(lab, f"{debian}+salt+apps", name="xmpp1.example.org")
    salt_minion(host, master)
    yield host
    if host in lab.hosts.values():
        host.destroy()


def test_a_master_makes_the_service_on_a_minion_that_never_synced(master, node):
    assert not node.path("/var/cache/salt/minion/extmods/modules/xmpp.py").exists()
    states = salt(master, "xmpp1*", "state.apply", "xmpp", check=False)[service.NODE]
    assert wrong(states) == {}
    assert salt(master, "xmpp1*", "xmpp.check", check=False)[service.NODE]["ok"]


def test_a_second_apply_by_the_master_changes_nothing(master, node):
    states = salt(master, "xmpp1*", "state.apply", "xmpp")[service.NODE]
    assert (wrong(states), changed(states)) == ({}, {})


def test_gitfs_with_the_repository_twice(master, node):
    """The same tree by gitfs: nothing changes but that the modules, which come from there, are loaded."""
    master.sh("apt-get -q update && apt-get -qy --no-install-recommends install git", timeout=300)
    master.sh(
        f"cp -r {TREE} /srv/repository; cd /srv/repository; rm -rf .git; git init -q -b main; git add -A; "
        "git -c user.name=lab -c user.email=lab@example.org commit -qm tree"
    )
    remote = "file:///srv/repository"
    settings = {
        "fileserver_backend": ["gitfs"],
        "gitfs_provider": "gitpython",
        "gitfs_base": "main",
        "gitfs_remotes": [remote, {remote: [{"name": "formula"}, {"root": "salt"}]}],
    }
    master.put("/etc/salt/master.d/gitfs.conf", json.dumps(settings))
    master.run("systemctl", "restart", "salt-master")
    node.sh("systemctl stop salt-minion; rm -rf /var/cache/salt/minion; systemctl start salt-minion")
    salt_minion(node, master)
    states = salt(master, "xmpp1*", "state.apply", "xmpp", check=False)[service.NODE]
    assert wrong(states) == {}
    assert [changes for changes in changed(states).values() if "modules" not in changes] == []
    assert node.path("/var/cache/salt/minion/extmods/modules/xmpp.py").exists()
    master.sh("rm /etc/salt/master.d/gitfs.conf; systemctl restart salt-master")


def test_a_highstate_at_boot(lab, debian, master):
    """``startup_states: highstate`` on a minion that never synced: the service is there, and nobody asked for it."""
    if old := lab.hosts.get(service.NODE):
        old.destroy()
    master.run(f"{BIN}/salt-key", "--yes", f"--delete={service.NODE}")
    host = service.host(lab, f"{debian}+salt+apps")
    try:
        salt_minion(host, master, startup_states="highstate")
        service.wait_for(lambda: answers(host.address), 300, "port 5222 of a minion with startup_states")
        states = service.wait_for(lambda: idle_highstate(master), 300, "the end of the highstate")
        assert (wrong(states), changed(states)) == ({}, {})
        assert salt(master, "xmpp1*", "xmpp.check", check=False)[service.NODE]["ok"]
    finally:
        host.destroy()


def answers(address):
    with socket.create_connection((address, 5222), 2):
        return True


def idle_highstate(master):
    states = salt(master, "xmpp1*", "state.highstate", check=False)[service.NODE]
    return isinstance(states, dict) and states
