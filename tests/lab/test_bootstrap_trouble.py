"""What is in the command's way: it says what and what to do, what runs goes on running, and a rerun completes.

One machine goes through all of it, in this order.
"""

import re
import subprocess

import pytest

from . import service
from .bootstrap import COMMAND, PROVEN, Untouched, last, run, states, tls_answers


@pytest.fixture(scope="module")
def troubled(lab):
    host = lab.host(service.NODE, service.ADDRESSES, service.NAMES, layers="trixie+salt")
    yield host
    host.destroy()


def test_bare_machine_without_a_network(lab):
    host = lab.host("bare.example.org", layers="trixie")
    try:
        host.put("/etc/hosts", "127.0.0.1 localhost\n")
        host.cut()
        asked = run(host, "--test")
        assert asked.code == 0
        assert "Nothing was changed" in asked.text
        done = run(host)
        assert done.code == 2
        assert "apt could not install python3" in last(done, 2)
        assert "network" in last(done, 2)
    finally:
        host.destroy()


def test_not_root(troubled):
    done = troubled.run(COMMAND, user="nobody", check=False)
    assert done.returncode == 2
    assert "sudo" in done.stderr.splitlines()[-1]


def test_a_wrong_pillar_leaves_the_machine_as_it_was(troubled):
    nodes = "{xmpp1.example.org: {adress: 192.0.2.10}}"
    wrong = f"xmpp:\n  domain: exa_mple.org\n  nodes: {nodes}\n  tls: {{source: magic}}\n"
    troubled.put("/root/wrong.sls", wrong)
    with Untouched(troubled, "/etc/salt"):
        done = run(troubled, "--pillar", "/root/wrong.sls")
    assert done.code == 2, last(done)
    for mistake in ("xmpp:domain", "xmpp:nodes:xmpp1.example.org:adress", "xmpp:tls:source"):
        assert mistake in last(done, 8)
    assert "mend the pillar" in last(done, 1)
    assert not troubled.path("/etc/salt/xmpp/pillar").exists()
    assert not troubled.path("/etc/salt/xmpp/pillar.new").exists()


def test_a_pillar_that_is_no_yaml(troubled):
    troubled.put("/root/wrong.sls", "xmpp:\n  domain: [example.org\n")
    done = run(troubled, "--pillar", "/root/wrong.sls")
    assert done.code == 2, last(done)
    assert "mend the pillar" in last(done, 1)


def test_test_mode_where_there_is_only_salt(troubled):
    with Untouched(troubled):
        done = run(troubled, "--test", "--domain", service.DOMAIN)
    assert done.code == 0, last(done)
    assert states(done).count("would") > 20
    assert "FAILED" not in done.text
    assert "Nothing was changed." in last(done, 2)
    assert not troubled.path("/etc/salt/xmpp/pillar").exists()


def test_no_disk_space(troubled):
    troubled.run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", "/var/cache/apt/archives")
    try:
        done = run(troubled, "--domain", service.DOMAIN)
    finally:
        troubled.run("umount", "/var/cache/apt/archives")
    assert done.code == 1, last(done)
    assert "FAILED:" in last(done)
    assert re.search(r"(enough free|No) space", last(done))
    assert "df -h" in last(done)


def test_a_package_that_is_not_there(troubled):
    troubled.put("/etc/apt/preferences.d/missing", "Package: ejabberd\nPin: release *\nPin-Priority: -1\n")
    try:
        done = run(troubled)
    finally:
        troubled.run("rm", "/etc/apt/preferences.d/missing")
    assert done.code == 1, last(done)
    assert re.search(r"^FAILED: .*ejabberd", last(done, 30), re.MULTILINE)
    assert "mirror" in last(done, 30)


def test_a_port_in_use_and_then_not(troubled):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    squatter = troubled.popen("python3", "-m", "http.server", "5222", **quiet)
    try:
        done = run(troubled)
    finally:
        squatter.kill()
        troubled.sh("kill $(ss -lntpH 'sport = 5222' | grep -o 'pid=[0-9]*' | cut -d= -f2) || true")
    assert done.code == 1, last(done)
    assert "FAILED:" in last(done)
    assert re.search(r"IN THE WAY: python3 \(process \d+\) holds port 5222", last(done)), last(done, 60)
    again = run(troubled)
    assert again.code == 0, last(again, 60)
    assert PROVEN in again.text


def test_a_bad_certificate_leaves_the_old_one_serving(troubled):
    ca = troubled.read("/etc/ssl/xmpp/ca.crt")
    good = troubled.read("/etc/salt/xmpp/pillar/xmpp.sls")
    troubled.put("/root/bad.pem", "-----BEGIN CERTIFICATE-----\nrubbish\n-----END CERTIFICATE-----\n")
    bad = good.replace("source: internal", "source: files\n    files: {certificate: /root/bad.pem, key: /root/bad.pem}")
    troubled.put("/root/bad.sls", bad)
    troubled.put("/root/good.sls", good)
    done = run(troubled, "--pillar", "/root/bad.sls")
    assert done.code == 1, last(done)
    assert "FAILED:" in last(done, 30)
    assert "/root/bad.pem" in last(done, 30)
    tls_answers(troubled, service.DOMAIN, ca)
    again = run(troubled, "--pillar", "/root/good.sls")
    assert again.code == 0, last(again, 60)
    assert PROVEN in again.text


def test_a_salt_that_is_there_is_used(troubled):
    """Another salt-call in the path, new enough, comes before our own; one too old does not."""
    troubled.run("ln", "-s", "/opt/salt-xmpp/bin/salt-call", "/usr/local/bin/salt-call")
    assert re.search(r"Salt 3008\S*: /usr/local/bin/salt-call", run(troubled, "--salt-only").text)
    troubled.sh("rm /usr/local/bin/salt-call; printf '#!/bin/sh\\necho salt-call 3006.9\\n' > /usr/local/bin/salt-call")
    troubled.run("chmod", "+x", "/usr/local/bin/salt-call")
    done = run(troubled, "--salt-only")
    assert "/usr/local/bin/salt-call is Salt 3006.9" in done.text
    assert re.search(r"Salt 3008\S*: /opt/salt-xmpp/bin/salt-call", done.text)
    troubled.run("rm", "/usr/local/bin/salt-call")
