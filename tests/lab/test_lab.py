"""The lab itself: what a test may rely on."""

import socket
import subprocess
import time
import urllib.request

import pytest

from tests.lab.library import CommandError, frozen
from tests.lab.library.salt import salt, salt_master, salt_minion


def pings(host, other):
    return host.run("ping", "-c1", "-W1", other, check=False).returncode == 0


@pytest.fixture(scope="module")
def bare(lab, debian):
    host = lab.host("bare.example.org", layers=debian)
    yield host
    host.destroy()


@pytest.fixture(scope="module")
def other(lab, debian):
    host = lab.host(
        "other.example.org",
        addresses=["192.0.2.77", "192.0.2.78", "2001:db8::77"],
        names=["example.org"],
        layers=debian,
    )
    yield host
    host.destroy()


@pytest.fixture(scope="module")
def container(lab, debian):
    host = lab.host("container.example.org", layers=debian, init=None)
    yield host
    host.destroy()


def test_a_bare_host_is_debian_and_nothing_more(bare, debian):
    assert f"VERSION_CODENAME={debian}" in bare.read("/etc/os-release")
    assert bare.run("systemctl", "is-system-running").stdout == "running\n"
    assert bare.run("hostname", "-f").stdout == "bare.example.org\n"
    for program in ("python3", "salt-call", "sudo", "curl", "gcc", "sshd"):
        assert bare.run("which", program, check=False).returncode == 1, program
    assert bare.run("ss", "-Hltun").stdout == ""


def test_apt_installs_from_a_mirror_that_looks_like_debians(bare, debian):
    sources = bare.read("/etc/apt/sources.list.d/debian.sources")
    assert "Signed-By: " in sources
    assert "trusted" not in sources
    bare.run("apt-get", "--error-on=any", "update")
    bare.run("apt-get", "install", "-y", "--no-install-recommends", "python3-venv")
    backports = sources.split("\n\n")[0].replace(f"Suites: {debian} {debian}-updates", f"Suites: {debian}-backports")
    bare.put("/etc/apt/sources.list.d/backports.sources", backports)
    bare.run("apt-get", "--error-on=any", "update")
    policy = bare.run("apt-cache", "policy", "ejabberd").stdout
    assert f"100 http://mirror.lab/debian {debian}-backports/main amd64 Packages" in policy
    assert "Candidate: " + {"bookworm": "23.01", "trixie": "24.12"}[debian] in policy


def test_apt_refuses_a_mirror_with_another_signature(lab, bare):
    bare.run("cp", "/usr/share/keyrings/lab-archive-keyring.gpg", "/root/key")
    bare.sh("cp /usr/share/keyrings/debian-archive-keyring.gpg /usr/share/keyrings/lab-archive-keyring.gpg")
    try:
        with pytest.raises(CommandError, match=r"mirror\.lab"):
            bare.run("apt-get", "--error-on=any", "update")
    finally:
        bare.run("mv", "/root/key", "/usr/share/keyrings/lab-archive-keyring.gpg")


def test_pip_installs_from_the_index(bare):
    bare.sh("[ -x /usr/bin/python3 ] || { apt-get update; apt-get install -y --no-install-recommends python3-venv; }")
    bare.sh("python3 -m venv /tmp/venv && /tmp/venv/bin/pip install pyyaml && /tmp/venv/bin/python -c 'import yaml'")


def test_every_address_and_name_reaches(lab, bare, other, container):
    for name in (*other.addresses, "other.example.org", "example.org", "192.0.2.1", "2001:db8::1"):
        assert pings(bare, name), name
    assert pings(other, "bare.example.org")
    assert pings(container, "bare.example.org")
    assert {row[4][0] for row in socket.getaddrinfo("example.org", 80)} == set(other.addresses)
    subprocess.run(["ping", "-c1", "-W1", "example.org"], check=True, capture_output=True)


def test_a_host_made_anew_is_reached_at_once(lab, debian, bare):
    for _ in range(2):
        host = lab.host("again.example.org", addresses=["192.0.2.79", "2001:db8::79"], layers=debian)
        assert pings(bare, host.address)
        host.destroy()


def test_nothing_outside_is_reached(bare):
    routes = subprocess.run(["ip", "-o", "route"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[2] for line in routes.splitlines()} == {"lab"}
    assert not pings(bare, "198.51.100.1")
    with pytest.raises(OSError):
        socket.create_connection(("198.51.100.1", 80), timeout=1)


def test_hosts_are_apart(bare, other):
    bare.run("touch", "/root/mine")
    assert other.run("test", "-e", "/root/mine", check=False).returncode == 1
    assert bare.read("/etc/machine-id") != other.read("/etc/machine-id")
    with pytest.raises(CommandError):
        bare.run("touch", "/srv/xmpp-formula/mine")


def test_commands(bare):
    assert bare.run("cat", input="täst").stdout == "täst"
    assert bare.run("printenv", "X", env={"X": "a b"}).stdout == "a b\n"
    assert bare.run("id", "-un", user="nobody").stdout == "nobody\n"
    bare.put("/opt/a/b", "secret", mode="0600", owner="nobody:root")
    assert bare.run("stat", "-c", "%a %U %s", "/opt/a/b").stdout == "600 nobody 6\n"
    assert bare.run("cat", "/opt/a/b", user="daemon", check=False).returncode == 1
    with pytest.raises(CommandError, match="ended with 3"):
        bare.sh("exit 3")
    with pytest.raises(subprocess.TimeoutExpired):
        bare.run("sleep", "60", timeout=0.2)


def test_cut_and_block(bare, other, container):
    other.cut()
    assert not pings(bare, other.address)
    other.uncut()
    assert pings(bare, other.address)
    bare.block(other)
    assert not any(pings(bare, address) for address in other.addresses)
    assert not pings(other, bare.address)
    assert pings(bare, container.address)
    assert pings(other, container.address)
    bare.unblock(other)
    assert pings(bare, other.address)


def test_kill_stop_and_reboot(bare, other):
    bare.run("touch", "/root/kept")
    for end in (other.kill, other.stop):
        started = other.run("systemctl", "show", "--property=UserspaceTimestampMonotonic").stdout
        before = other.read("/proc/sys/kernel/random/boot_id"), other._leader
        end()
        assert not pings(bare, other.address)
        other.start()
        assert pings(bare, other.address)
        assert other._leader != before[1]
        assert started != other.run("systemctl", "show", "--property=UserspaceTimestampMonotonic").stdout
    other.run("systemctl", "reboot", check=False)
    other.wait_down()
    other.wait_up()
    assert bare.run("cat", "/root/kept").stdout == ""


def test_a_host_without_systemd(container):
    assert container.run("cat", "/proc/1/comm").stdout != "systemd\n"
    assert container.run("test", "-e", "/run/systemd/system", check=False).returncode == 1
    assert container.run("systemctl", "is-system-running", check=False).returncode
    # Its PID 1 reaps what loses its parent.
    container.sh("(sleep 0.1 &) ; exit 0")
    time.sleep(0.5)
    assert "Z" not in container.run("ps", "-eo", "stat=").stdout
    container.run("touch", "/root/kept")
    container.restart()
    container.run("test", "-e", "/root/kept")


def test_freeze(lab, debian):
    def build():
        host = lab.host("first.example.org", layers=debian)
        host.run("touch", "/root/made")
        host.sh("rm /etc/issue")
        return host.freeze()

    layers = frozen(f"selftest-{debian}", build)
    assert frozen(f"selftest-{debian}", lambda: pytest.fail("it is built once")) == layers
    clones = [lab.host(f"clone{number}.example.org", layers=layers) for number in (1, 2)]
    for clone in clones:
        assert clone.run("hostname", "-f").stdout.startswith("clone")
        assert clone.run("ls", "/root/made", "/etc/issue", check=False).stdout == "/root/made\n"
        clone.destroy()


def test_master_and_minion(lab, debian):
    host = lab.host("master.example.org", layers=f"{debian}+salt")
    salt_master(host)
    salt_minion(host, host)
    assert salt(host, "*", "grains.get", "oscodename") == {"master.example.org": debian}
    host.destroy()


def test_applications_are_there_and_none_ran(lab, debian):
    host = lab.host("apps.example.org", layers=f"{debian}+salt+apps")
    version = host.run("dpkg-query", "-Wf", "${Version}", "ejabberd").stdout
    assert version.startswith("24.12")
    for program in ("nginx", "certbot", "nft", "/usr/lib/postgresql/*/bin/postgres"):
        host.sh(f"command -v {program}")
    assert host.run("pg_lsclusters", "-h").stdout == ""
    assert (
        host.run("find", "/var/lib/ejabberd", "-mindepth", "1", "-newer", "/etc/hostname", check=False).returncode == 0
    )
    assert host.run("ls", "/etc/apt/sources.list.d", "/etc/apt/preferences.d").stdout.split() == [
        "/etc/apt/preferences.d:", "/etc/apt/sources.list.d:", "debian.sources",
    ]  # fmt: skip
    host.destroy()


def test_logs_are_kept(lab, bare):
    bare.run("logger", "said by the test")
    bare.run("apt-get", "update")
    folder = lab.save_logs("selftest")
    assert "said by the test" in (folder / "bare.example.org/journal.txt").read_text()
    assert (
        "bare.example.org" in (folder / "bare.example.org/console.log").read_text()
        or (folder / "server.log").stat().st_size
    )


def test_the_index_offers_sources_as_sources(lab):
    page = urllib.request.urlopen("http://pypi.lab/simple/salt/").read().decode()
    assert ".tar.gz" in page
    assert ".whl" not in page
