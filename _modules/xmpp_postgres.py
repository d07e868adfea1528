"""
The PostgreSQL cluster that keeps what must last
================================================
"""

import os
import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "xmpp"


def __virtual__():
    return __virtualname__


def postgres_cluster_exists(version, cluster):
    """
    Tell whether Debian knows a cluster, running or not.

    version
        PostgreSQL's major version, as a text.

    cluster
        The cluster's name.

    Returns ``True`` or ``False``.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.postgres_cluster_exists 17 main
    """
    return os.path.exists(f"/etc/postgresql/{version}/{cluster}/postgresql.conf")


def postgres_cluster_create(version, cluster, port=None):
    """
    Create a cluster with data checksums, UTF-8 and the C collation, without starting it (pg_createcluster(1)).

    A mark in its configuration, ``xmpp.cluster``, tells it from those that are others'.

    version, cluster
        As for :func:`postgres_cluster_exists`.

    port
        Its port, which is also in the name of its socket. Default: the first that no cluster has, from 5432 on.

    Returns ``True``.

    Raises ``CommandExecutionError`` with pg_createcluster's own words.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.postgres_cluster_create 17 main
    """
    # C.UTF-8 sorts by code point and does not change with a C library, so no index is ever wrong after an upgrade.
    options = [
        "--locale",
        "C.UTF-8",
        "--encoding",
        "UTF8",
        "--start-conf",
        "auto",
        "--pgoption",
        "xmpp.cluster=created",
    ]
    if port:
        options += ["--port", str(port)]
    result = __salt__["cmd.run_all"](
        # With a word about authentication, Debian's choice (peer, SCRAM) would give way to PostgreSQL's own: trust.
        ["pg_createcluster", version, cluster, *options, "--", "--data-checksums"],
        python_shell=False,
    )
    if result["retcode"]:
        raise CommandExecutionError(
            f"pg_createcluster {version} {cluster} failed: {result['stderr'] or result['stdout']}; mend that and apply "
            "again"
        )
    return True


def postgres_cluster_lacks(version, cluster):
    """
    List what a cluster lacks that one made by :func:`postgres_cluster_create` would have.

    version, cluster
        As for :func:`postgres_cluster_exists`.

    Returns a list of texts, each with what to do; empty when nothing is lacking.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.postgres_cluster_lacks 17 main
    """
    data = os.path.realpath(f"/var/lib/postgresql/{version}/{cluster}")
    result = __salt__["cmd.run_all"](
        [f"/usr/lib/postgresql/{version}/bin/pg_controldata", data],
        env={"LC_ALL": "C"},
        python_shell=False,
        ignore_retcode=True,
    )
    if result["retcode"]:
        return [f"its control data cannot be read ({result['stderr']}): see pg_lsclusters"]
    control = dict(line.split(":", 1) for line in result["stdout"].splitlines() if ":" in line)
    lacks = []
    if control.get("Data page checksum version", "0").strip() == "0":
        lacks.append("data checksums: stop it and run pg_checksums --enable")
    if _trusts(f"/etc/postgresql/{version}/{cluster}/pg_hba.conf"):
        lacks.append("authentication: its pg_hba.conf trusts whoever connects; write peer or scram-sha-256 there")
    return lacks


def _trusts(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any(re.match(r"(local|host)\w*\s.*\strust\b", line) for line in file)
    except OSError:
        return False
