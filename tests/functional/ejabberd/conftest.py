"""
A real ejabberd with a real PostgreSQL on this host, set up by hand, so that what fails here is the modules' fault.

These tests change the machine: they run in a host of the lab that is thrown away (tests/run functional).
"""

import codecs
import os
import pathlib
import pwd
import secrets
import shutil
import subprocess
import time

import pytest
import salt.config
from saltfactories.utils.functional import Loaders

ROOT = pathlib.Path(__file__).resolve().parents[3]
HERE = pathlib.Path(__file__).resolve().parent
TOKEN = pathlib.Path("/etc/salt/xmpp/secrets/api_token")
CERTIFICATE = pathlib.Path("/etc/ejabberd/certificate.pem")
CONFIGURATION = pathlib.Path("/etc/ejabberd/ejabberd.yml")
LOG = pathlib.Path("/var/log/ejabberd/ejabberd.log")
# Without a terminal, Erlang before 26 writes Latin-1 whatever the locale says.
codecs.register_error("latin-1", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end))


def run(*command, check=True, **more):
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False, **more)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def postgresql():
    """A cluster on the usual port, with ejabberd's role and an empty database."""
    release = max(os.listdir("/usr/lib/postgresql"), key=int)
    if not run("pg_lsclusters", "-h").stdout:
        run("pg_createcluster", release, "main")
    if "online" not in run("pg_lsclusters", "-h").stdout:
        run("pg_ctlcluster", release, "main", "start")
    for statement in (
        "DROP DATABASE IF EXISTS ejabberd",
        "DROP ROLE IF EXISTS ejabberd",
        "CREATE ROLE ejabberd LOGIN",
        "CREATE DATABASE ejabberd OWNER ejabberd",
    ):
        run("psql", "-qc", statement, user="postgres", cwd="/")


def certificate(path, names=("example.org", "conference.example.org")):
    """A new certificate of its own for ``names``, with its key, where ejabberd may read it."""
    key, pem = pathlib.Path(f"{path}.key"), pathlib.Path(f"{path}.crt")
    run(
        *"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=example.org".split(),
        *("-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names), "-keyout", key, "-out", pem),
    )
    path.write_text(pem.read_text() + key.read_text())
    shutil.chown(path, "root", "ejabberd")
    path.chmod(0o640)
    key.unlink()
    pem.unlink()


def minion(root):
    """Salt's loaders for a minion without a master, with the modules and states of this checkout."""
    if os.geteuid() or not os.path.exists("/usr/sbin/ejabberdctl"):
        pytest.fail("these tests need root and ejabberd, and change the machine: tests/run functional")
    files = root / "files"
    files.mkdir()
    (files / "ejabberd.yml").write_text((HERE / "ejabberd.yml").read_text())
    opts = salt.config.DEFAULT_MINION_OPTS.copy()
    opts.update(
        id="host",
        root_dir=str(root),
        cachedir=str(root / "cache"),
        file_client="local",
        file_roots={"base": [str(files)]},
        module_dirs=[str(ROOT / "_modules")],
        states_dirs=[str(ROOT / "_states")],
        pillar={"accounts": {"nurse@example.org": {"password": "from the pillar"}}},
    )
    return Loaders(opts)


def start_server(loaders):
    """Let ejabberd run, with nothing in it."""
    ctl("stop", check=False)
    ctl("stopped", check=False)
    postgresql()
    shutil.rmtree("/var/lib/ejabberd")
    account = pwd.getpwnam("ejabberd")
    os.mkdir("/var/lib/ejabberd", 0o700)
    os.chown("/var/lib/ejabberd", account.pw_uid, account.pw_gid)
    for log in LOG.parent.glob("*"):
        log.unlink()
    TOKEN.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    TOKEN.write_text(secrets.token_hex(32))
    TOKEN.chmod(0o600)
    certificate(CERTIFICATE)
    CONFIGURATION.unlink(missing_ok=True)
    for ret in (
        loaders.states.ejabberd.config(**configuration(loaders)),
        loaders.states.ejabberd.running("ejabberd"),
    ):
        assert ret.result is True, ret.comment


@pytest.fixture(scope="session")
def session_loaders(tmp_path_factory):
    return minion(tmp_path_factory.mktemp("minion"))


@pytest.fixture
def files(session_loaders):
    """The file server's root."""
    return pathlib.Path(session_loaders.opts["file_roots"]["base"][0])


@pytest.fixture
def loaders(session_loaders):
    try:
        yield session_loaders
    finally:
        session_loaders.reset_state()


@pytest.fixture
def modules(loaders):
    return loaders.modules


@pytest.fixture
def states(loaders):
    return loaders.states


@pytest.fixture(scope="session")
def server(session_loaders):
    start_server(session_loaders)
    yield
    ctl("stop", check=False)


def configuration(loaders, **context):
    """The arguments of ``ejabberd.config`` for this server's configuration."""
    release = loaders.modules.ejabberd.version()
    return {
        "name": str(CONFIGURATION),
        "source": "salt://ejabberd.yml",
        "context": {"release": release, "certificate": str(CERTIFICATE), **context},
        "secrets": {"api_token": str(TOKEN)},
    }


@pytest.fixture
def configured(loaders, server):
    """Return a function that gives the arguments of ``ejabberd.config``; afterwards the server is as it was."""
    before = CONFIGURATION.read_bytes()
    yield lambda **context: configuration(loaders, **context)
    if CONFIGURATION.read_bytes() != before or not loaders.modules.ejabberd.status()["running"]:
        certificate(CERTIFICATE)
        CONFIGURATION.write_bytes(before)
        shutil.chown(CONFIGURATION, "root", "ejabberd")
        CONFIGURATION.chmod(0o640)
        loaders.modules.service.restart("ejabberd")
        loaders.modules.ejabberd.started(60)


def ctl(*arguments, check=True):
    """What ejabberd itself says, by the way that is not ours."""
    return run("ejabberdctl", *arguments, check=check, errors="latin-1")


def sql(query):
    """What is in the database, rows of text."""
    out = run("psql", "-XAtF", "\t", "-d", "ejabberd", "-c", query, user="postgres", cwd="/").stdout
    return [tuple(line.split("\t")) for line in out.splitlines()]


def node_started():
    """When the Erlang machine was started, in its own words."""
    seconds = int(ctl("stats", "uptimeseconds").stdout)
    return time.time() - seconds


@pytest.fixture
def logged():
    """Return a function that gives what ejabberd has logged since the test began."""
    start = LOG.stat().st_size if LOG.exists() else 0

    def read():
        time.sleep(0.3)
        with open(LOG, "rb") as file:
            file.seek(start)
            return file.read().decode()

    return read


@pytest.fixture
def no_account(server):
    """Return a function that names an account that there is not; afterwards, there are none at all."""
    yield lambda user, host="example.org": f"{user}@{host}"
    sql("DELETE FROM users")
    ctl("clear_cache")
