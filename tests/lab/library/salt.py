"""A Salt master and its minions on hosts of the lab that have the layer "salt"."""

import json
import time

BIN = "/opt/salt-xmpp/bin"
UNIT = """\
[Unit]
Description=Salt {role}
After=network.target

[Service]
Type=notify
NotifyAccess=all
LimitNOFILE=65536
KillMode=process
ExecStart={bin}/salt-{role}

[Install]
WantedBy=multi-user.target
"""
MASTER = {
    "file_roots": {"base": ["/srv/xmpp-formula", "/srv/xmpp-formula/salt"]},
    "pillar_roots": {"base": ["/srv/pillar"]},
    "worker_threads": 3,
    "gather_job_timeout": 3,
    "timeout": 60,
}


def salt_master(host, **options):
    """Make ``host`` a Salt master with ``options`` that serves the checkout; its pillar is /srv/pillar."""
    host.run("mkdir", "--parents", "/srv/pillar")
    _daemon(host, "master", {**MASTER, **options})


def salt_minion(host, master, timeout=60, **options):
    """Make ``host`` a minion of ``master`` under its own name, its key accepted, and wait until it answers."""
    _daemon(host, "minion", {"master": master.address, "id": host.name, "acceptance_wait_time": 1, **options})
    end = time.monotonic() + timeout
    while True:
        master.run(f"{BIN}/salt-key", "--yes", f"--accept={host.name}", check=False)
        # A ping that the master sent before the minion listened is never answered: ask often, wait briefly.
        try:
            if salt(master, host.name, "test.ping", timeout=5, check=False) == {host.name: True}:
                return
        except ValueError:
            pass  # no answer at all
        if time.monotonic() > end:
            raise TimeoutError(f"{host.name}: its salt-minion did not answer {master.name} within {timeout} s")
        time.sleep(0.5)


def salt(master, target, function, *arguments, timeout=900, check=True):
    """Run ``function`` on the minions that ``target`` (a glob) means, and return ``{minion: what it returned}``."""
    command = (
        f"{BIN}/salt",
        "--out=json",
        "--static",
        "--no-color",
        f"--timeout={timeout}",
        target,
        function,
        *arguments,
    )
    done = master.run(*command, timeout=timeout + 30, check=check)
    return json.loads(done.stdout)


def _daemon(host, role, options):
    host.put(f"/etc/salt/{role}.d/lab.conf", json.dumps(options))
    host.put(f"/etc/systemd/system/salt-{role}.service", UNIT.format(role=role, bin=BIN))
    host.run("systemctl", "enable", "--now", f"salt-{role}")
