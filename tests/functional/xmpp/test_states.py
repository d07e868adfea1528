"""States of secrets, certificates, packages, PostgreSQL's cluster: in test mode, twice, then a look at the machine."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

POLICY = pathlib.Path("/usr/sbin/policy-rc.d")
FROM_PILLAR = "from the pillar"


def run(*command, check=True, **more):
    return subprocess.run(command, capture_output=True, text=True, check=check, **more)


def mode(path):
    status = os.stat(path)
    return pathlib.Path(path).owner(), pathlib.Path(path).group(), f"{status.st_mode & 0o7777:o}"


def listing(folder):
    return sorted((str(path), path.lstat().st_mtime_ns) for path in pathlib.Path(folder).rglob("*"))


def truthful(state, *args, folder=None, **kwargs):
    """Call ``state`` in test mode, for real, and again in both; return what the real one returned."""
    before = folder and listing(folder)
    would = state(*args, **kwargs, test=True)
    assert would.result is None, would.comment
    assert would.changes
    assert folder is None or listing(folder) == before
    did = state(*args, **kwargs)
    assert did.result is True, did.comment
    assert set(did.changes) >= set(would.changes)
    for test in (True, False):
        again = state(*args, **kwargs, test=test)
        assert (again.result, again.changes) == (True, {}), again.comment
    return did


# Secrets


@pytest.mark.parametrize(
    ("make", "looks"), [("password", r"[A-Za-z0-9]{24}"), ("token", r"[0-9a-f]{64}"), ("cookie", r"[A-Z]{40}")]
)
def test_a_secret_is_made_once(states, tmp_path, make, looks):
    path = tmp_path / "secrets" / make
    did = truthful(states.xmpp.secret, str(path), make=make, folder=tmp_path)
    value = path.read_text()
    assert re.fullmatch(looks + "\n", value)
    assert value.strip() not in str(did.full_return)
    assert mode(path) == ("root", "root", "600")
    assert mode(path.parent)[2] == "700"
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    states.xmpp.secret(str(path), make=make)
    assert path.read_text() != value, "each machine has its own"


def test_a_secret_of_the_pillar(states, tmp_path):
    path = tmp_path / "secret"
    did = truthful(states.xmpp.secret, str(path), contents_pillar="given:password", make="password", folder=tmp_path)
    assert path.read_text() == f"{FROM_PILLAR}\n"
    did = [
        did,
        truthful(states.xmpp.secret, str(path), contents_pillar="given:other", make="password", folder=tmp_path),
    ]
    assert path.read_text() == "another from the pillar\n"
    assert FROM_PILLAR not in str([each.full_return for each in did]).replace("by the pillar's", "")


def test_a_secret_that_the_pillar_no_longer_has_stays(states, tmp_path):
    path = tmp_path / "secret"
    states.xmpp.secret(str(path), contents_pillar="given:password", make="password")
    ret = states.xmpp.secret(str(path), contents_pillar="given:none", make="password")
    assert (ret.result, ret.changes) == (True, {})
    assert path.read_text() == f"{FROM_PILLAR}\n"


def test_a_secret_that_others_can_read_is_closed(states, tmp_path):
    path = tmp_path / "secret"
    path.write_text("mine\n")
    path.chmod(0o644)
    os.chown(path, 65534, 65534)
    truthful(states.xmpp.secret, str(path), make="password", folder=tmp_path)
    assert path.read_text() == "mine\n"
    assert mode(path) == ("root", "root", "600")


def test_a_directory_that_is_there_keeps_its_mode(states, tmp_path):
    tmp_path.chmod(0o755)
    assert states.xmpp.secret(str(tmp_path / "secret"), make="token").result is True
    assert mode(tmp_path)[2] == "755"


def test_secrets_that_cannot_be(states, tmp_path):
    ret = states.xmpp.secret(str(tmp_path / "secret"), contents_pillar="given:none")
    assert ret.result is False
    assert "the pillar has nothing at given:none" in ret.comment
    ret = states.xmpp.secret(str(tmp_path / "secret"), make="poem")
    assert ret.result is False
    assert "expected one of cookie, password, token" in ret.comment
    (tmp_path / "file").write_text("")
    ret = states.xmpp.secret(str(tmp_path / "file/secret"), make="token")
    assert (ret.result, ret.changes) == (False, {})
    assert not (tmp_path / "secret").exists()


# Certificates


def issue(folder, *names):
    """A certificate of its own for ``names``: the paths of it and of its key."""
    key, pem = folder / "key.pem", folder / "chain.pem"
    run(
        *"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=example.org".split(),
        *("-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names), "-keyout", key, "-out", pem),
    )
    return str(pem), str(key)


def test_a_certificate_is_given_to_one_group(states, tmp_path):
    pem, key = issue(tmp_path, "example.org")
    copy = tmp_path / "place" / "copy.pem"
    arguments = {"certificate": pem, "key": key, "host_names": ["example.org"], "group": "ejabberd"}
    did = truthful(states.xmpp.certificate, str(copy), **arguments)
    assert copy.read_text() == pathlib.Path(pem).read_text() + pathlib.Path(key).read_text()
    assert mode(copy) == ("root", "ejabberd", "640")
    assert "PRIVATE" not in str(did.full_return)
    issue(tmp_path, "example.org")
    truthful(states.xmpp.certificate, str(copy), **arguments)
    copy.chmod(0o666)
    truthful(states.xmpp.certificate, str(copy), **arguments)
    assert mode(copy) == ("root", "ejabberd", "640")


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("fault", ["rubbish", "a name is missing", "the key of another", "not there"])
def test_a_wrong_certificate_leaves_the_old_one(states, tmp_path, fault, test):
    pem, key = issue(tmp_path, "example.org")
    copy = tmp_path / "copy.pem"
    assert states.xmpp.certificate(str(copy), certificate=pem, key=key).result is True
    before, host_names = copy.read_bytes(), ["example.org"]
    if fault == "rubbish":
        pathlib.Path(pem).write_text("rubbish")
    elif fault == "a name is missing":
        host_names = ["example.org", "upload.example.org"]
    elif fault == "the key of another":
        (tmp_path / "other").mkdir()
        _, key = issue(tmp_path / "other", "example.org")
    else:
        pem = str(tmp_path / "none.pem")
    ret = states.xmpp.certificate(str(copy), certificate=pem, key=key, host_names=host_names, test=test)
    assert (ret.result, ret.changes) == (False, {})
    says = {
        "rubbish": "is no PEM certificate",
        "a name is missing": "but not upload.example.org",
        "the key of another": "is not the key of",
        "not there": "none.pem cannot be read",
    }
    assert says[fault] in ret.comment
    assert "as it was" in ret.comment
    assert copy.read_bytes() == before


# Packages: nginx and cron are taken off the host and come again.


def running(service):
    return run("systemctl", "is-active", service, check=False).stdout.strip() == "active"


@pytest.fixture
def without_nginx():
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-mark", "unhold", "nginx", env=env)
    run("apt-get", "purge", "-qy", "nginx", "nginx-common", "libnginx-mod-stream", env=env)
    run("apt-get", "update", "-q", env=env)
    yield
    POLICY.unlink(missing_ok=True)


def test_packages_come_without_their_services(states, without_nginx):
    arguments = {"pkgs": ["nginx", "libnginx-mod-stream"], "hold": ["nginx"], "disable": ["nginx"]}
    did = truthful(states.xmpp.installed, "nginx", **arguments)
    assert did.changes["nginx"]["new"]
    assert shutil.which("nginx")
    assert not running("nginx")
    assert run("systemctl", "is-enabled", "nginx", check=False).stdout.strip() == "disabled"
    assert run("apt-mark", "showhold").stdout.split() == ["nginx"]
    assert not POLICY.exists()
    # It can be started now, by whoever wants to.
    run("systemctl", "start", "nginx")
    assert running("nginx")
    run("systemctl", "stop", "nginx")


def test_a_hold_that_was_taken_off_is_set_again(states):
    run("apt-mark", "unhold", "cron")
    did = truthful(states.xmpp.installed, "cron", pkgs=["cron"], hold=["cron"])
    assert did.changes == {"cron": "held"}
    assert "cron" in run("apt-mark", "showhold").stdout.split()
    run("apt-mark", "unhold", "cron")


def test_the_machines_own_policy_is_kept(states, without_nginx):
    POLICY.write_text("#!/bin/sh\n# mine\nexit 0\n")
    POLICY.chmod(0o750)
    assert states.xmpp.installed("nginx", pkgs=["nginx"]).result is True
    assert POLICY.read_text() == "#!/bin/sh\n# mine\nexit 0\n"
    assert mode(POLICY)[2] == "750"
    assert not running("nginx"), "ours held meanwhile"
    assert not POLICY.with_name("policy-rc.d.before-xmpp").exists()


def test_an_installation_that_was_cut_off_is_finished(loaders, states, without_nginx):
    # Unpacked and not configured, the policy of ours still there: as a power cut leaves it.
    loaders.modules.xmpp.packages_install(["cron"])
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    folder = "/var/cache/apt/archives"
    run("apt-get", "install", "-qy", "--download-only", "--no-install-recommends", "nginx", env=env)
    run("bash", "-c", f"dpkg --unpack {folder}/nginx*.deb", env=env)
    POLICY.write_text(f"#!/bin/sh\n{mark()}\nexit 101\n")
    POLICY.chmod(0o755)
    did = truthful(states.xmpp.installed, "nginx", pkgs=["nginx"])
    assert did.changes["policy-rc.d"] == "removed"
    assert not POLICY.exists()
    assert run("dpkg", "--audit").stdout == ""
    assert not running("nginx")


def test_a_policy_that_was_left_is_taken_away_when_all_is_installed(states):
    POLICY.write_text(f"#!/bin/sh\n{mark()}\nexit 101\n")
    did = truthful(states.xmpp.installed, "cron", pkgs=["cron"])
    assert did.changes == {"policy-rc.d": "removed"}
    assert not POLICY.exists()


def mark():
    """The line by which the module knows its own policy-rc.d."""
    text = (pathlib.Path(__file__).parents[3] / "_modules/xmpp_packages.py").read_text()
    return re.search(r'^MARK = "(.*)"$', text, re.MULTILINE)[1]


@pytest.mark.parametrize("test", [False, True])
def test_too_old_is_said_and_not_touched(states, test):
    ret = states.xmpp.installed("ejabberd", pkgs=["ejabberd"], minimum={"ejabberd": "99.01"}, test=test)
    assert (ret.result, ret.changes) == (False, {})
    assert re.search(r"Too old: ejabberd \S+, expected 99\.01 or newer; upgrade it by hand", ret.comment)


def test_a_package_that_is_nowhere(states):
    ret = states.xmpp.installed("none", pkgs=["no-such-package"])
    assert ret.result is False
    assert "no-such-package" in ret.comment
    assert not POLICY.exists()


# PostgreSQL's cluster


@pytest.fixture
def version():
    version = max(os.listdir("/usr/lib/postgresql"), key=int)
    yield version
    for line in run("pg_lsclusters", "-h").stdout.splitlines():
        run("pg_dropcluster", "--stop", *line.split()[:2])


def sql(port, query, user="postgres", **more):
    return run("psql", "-XAtp", str(port), "-c", query, "postgres", user=user, cwd="/", **more)


def test_a_cluster_is_made(states, version):
    did = truthful(states.xmpp.postgres_cluster, "main", version=version, port=5439)
    assert did.changes == {f"{version}/main": "created"}
    assert did.warnings == []
    run("pg_ctlcluster", version, "main", "start")
    for query, answer in {
        "SHOW data_checksums": "on",
        "SHOW server_encoding": "UTF8",
        "SHOW xmpp.cluster": "created",
        "SELECT datcollate FROM pg_database WHERE datname = 'template1'": "C.UTF-8",
        "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules WHERE type = 'local'": "peer",
        "SELECT string_agg(DISTINCT auth_method, ',') FROM pg_hba_file_rules WHERE type = 'host'": "scram-sha-256",
    }.items():
        assert sql(5439, query).stdout.strip() == answer, query
    # Nobody is let in under another's name.
    denied = run("psql", "-p5439", "-Upostgres", "-c", "SELECT 1", user="nobody", cwd="/", check=False)
    assert denied.returncode != 0
    assert "Peer authentication failed" in denied.stderr


def test_a_cluster_that_is_there_is_left_as_it_is_and_what_it_lacks_is_told(states, version):
    run("pg_createcluster", version, "main", "--port", "5440", "--", "--auth-local=trust", "--auth-host=scram-sha-256")
    before = listing(f"/var/lib/postgresql/{version}/main"), listing("/etc/postgresql")
    for test in (True, False):
        ret = states.xmpp.postgres_cluster("main", version=version, test=test)
        assert (ret.result, ret.changes) == (True, {})
        told = "\n".join(ret.warnings)
        assert f"PostgreSQL {version}/main was there before and lacks data checksums: stop it and run pg_chec" in told
        assert "its pg_hba.conf trusts whoever connects" in told
    assert (listing(f"/var/lib/postgresql/{version}/main"), listing("/etc/postgresql")) == before


def test_a_cluster_that_cannot_be_made(states, version):
    pathlib.Path(f"/var/lib/postgresql/{version}/broken").mkdir(parents=True)
    pathlib.Path(f"/var/lib/postgresql/{version}/broken/file").touch()
    ret = states.xmpp.postgres_cluster("broken", version=version)
    shutil.rmtree(f"/var/lib/postgresql/{version}/broken")
    assert (ret.result, ret.changes) == (False, {})
    assert f"pg_createcluster {version} broken failed" in ret.comment
