"""apt's sources: which is Debian's mirror, and what another suite of it looks like. Services that do not start."""

import re

import hypothesis
import pytest
from hypothesis import strategies
from salt.exceptions import CommandExecutionError

from tests.unit.ejabberd.conftest import load  # noqa: F401

KEY = """\
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEZ0000xYJKwYBBAHaRw8BAQdA0000000000000000000000000000000000
 =abcd
 -----END PGP PUBLIC KEY BLOCK-----"""
DEBIAN = """\
Types: deb deb-src
URIs: http://deb.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian.gpg
"""


@pytest.fixture
def packages(load, tmp_path, monkeypatch):  # noqa: F811
    module = load("_modules/xmpp_packages.py")
    monkeypatch.setattr(module, "SOURCES", str(tmp_path / "sources.list.d/xmpp.sources"))
    monkeypatch.setattr(module, "POLICY", str(tmp_path / "policy-rc.d"))
    monkeypatch.setattr(module, "ASIDE", str(tmp_path / "policy-rc.d.before-xmpp"))
    return module


@pytest.fixture
def apt(packages, tmp_path, monkeypatch):
    """Return a function that gives the source for bookworm-backports on a machine with the given sources."""
    folder = tmp_path / "sources.list.d"
    real_glob, real_isfile, real_open = packages.glob.glob, packages.os.path.isfile, open

    def place(path):
        return path.replace("/etc/apt", str(tmp_path))

    def source(files, suite="bookworm-backports", codename="bookworm"):
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (tmp_path / name if name == "sources.list" else folder / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(packages.glob, "glob", lambda pattern: real_glob(place(pattern)))
            patch.setattr(packages.os.path, "isfile", lambda path: real_isfile(place(path)))
            patch.setattr(packages, "open", lambda path, **how: real_open(place(path), **how), raising=False)
            return packages.suite_source(suite, codename)

    return source


WANTED = "Types: deb\nURIs: http://deb.example/debian\nSuites: bookworm-backports\nComponents: main\n"
SIGNED = WANTED + "Signed-By: /usr/share/keyrings/debian.gpg\n"
SOURCES = {
    "deb822": ({"debian.sources": DEBIAN}, SIGNED),
    "deb822 with comments": (
        {"debian.sources": "# Debian's own\n" + DEBIAN.replace("Suites", "# old: http://old.example\nSuites") + "#end"},
        SIGNED,
    ),
    "names of fields in any case": (
        {"debian.sources": DEBIAN.replace("URIs", "uris").replace("Suites", "SUITES")},
        SIGNED,
    ),
    "a field without a value": ({"debian.sources": DEBIAN.replace("Suites", "Architectures:\nSuites")}, SIGNED),
    "several stanzas": ({"debian.sources": f"{DEBIAN.replace('bookworm', 'sid')}\n \n\n{DEBIAN}"}, SIGNED),
    "several addresses": (
        {"debian.sources": DEBIAN.replace("/debian\n", "/debian http://other.example/debian\n", 1)},
        SIGNED.replace("/debian\n", "/debian http://other.example/debian\n", 1),
    ),
    "values on several lines": (
        {"debian.sources": DEBIAN.replace("Suites: bookworm ", "Suites:\n bookworm\n ").replace("URIs: ", "URIs:\n  ")},
        SIGNED,
    ),
    "a key within": (
        {"debian.sources": DEBIAN.replace(" /usr/share/keyrings/debian.gpg", "\n" + KEY)},
        f"{WANTED}Signed-By:\n{KEY}\n",
    ),
    "architectures": (
        {"debian.sources": DEBIAN + "Architectures: amd64 arm64\n"},
        SIGNED + "Architectures: amd64 arm64\n",
    ),
    "trusted": (
        {"debian.sources": DEBIAN.replace("Signed-By: /usr/share/keyrings/debian.gpg", "Trusted: yes")},
        WANTED + "Trusted: yes\n",
    ),
    "one line": ({"sources.list": "deb http://deb.example/debian bookworm main contrib # the mirror\n"}, WANTED),
    "one line with options": (
        {
            "sources.list": "deb [ signed-by=/usr/share/keyrings/debian.gpg arch+=i386 lang=none ] "
            "http://deb.example/debian bookworm main"
        },
        SIGNED,
    ),
    "one line with architectures": (
        {"a.list": "  deb [arch=amd64,arm64]   http://deb.example/debian\tbookworm main"},
        WANTED + "Architectures: amd64 arm64\n",
    ),
    "a disc beside it": (
        {"sources.list": "deb cdrom:[Debian]/ bookworm main\ndeb http://deb.example/debian bookworm main\n"},
        WANTED,
    ),
    "a disabled one beside it": (
        {"a.sources": DEBIAN.replace("deb.example", "off.example") + "Enabled: FALSE\n", "b.sources": DEBIAN},
        SIGNED,
    ),
    "one for sources only beside it": (
        {
            "a.sources": DEBIAN.replace("deb.example", "src.example").replace("deb deb-src", "deb-src"),
            "b.sources": DEBIAN,
        },
        SIGNED,
    ),
    "a stranger with the same suite": (
        {"a.list": "deb https://stranger.example/deb bookworm main\n", "debian.sources": DEBIAN},
        SIGNED,
    ),
    "a stranger, and the updates in a line of their own": (
        {
            "a.list": "deb https://stranger.example/deb bookworm main\n",
            "sources.list": "deb http://deb.example/debian bookworm main\n"
            "deb http://deb.example/debian bookworm-updates main\n",
        },
        WANTED,
    ),
    "backports there already": (
        {"debian.sources": DEBIAN, "b.list": "deb http://x.example bookworm-backports main\n"},
        "",
    ),
    "backports there, but disabled": (
        {"debian.sources": DEBIAN, "b.list": "# deb http://x.example bookworm-backports main\n"},
        SIGNED,
    ),
    "backports there, but of contrib only": (
        {"debian.sources": DEBIAN, "b.list": "deb http://x.example bookworm-backports contrib\n"},
        SIGNED,
    ),
    "our own file, which does not count": (
        {"debian.sources": DEBIAN, "xmpp.sources": DEBIAN.replace("bookworm ", "bookworm-backports ")},
        SIGNED,
    ),
    "a file that apt does not read": (
        {"debian.sources": DEBIAN, "a.sources.bak": DEBIAN.replace("deb.example", "x")},
        SIGNED,
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_source_of_the_same_mirror(apt, case):
    files, wanted = SOURCES[case]
    assert apt(files) == wanted


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"debian.sources": DEBIAN.replace("bookworm", "trixie")},
        {"debian.sources": DEBIAN + "Enabled: no\n"},
        {"debian.sources": DEBIAN.replace("main contrib", "contrib")},
        {"sources.list": "#deb http://deb.example/debian bookworm main\ndeb\ndeb [x] http://deb.example\n"},
    ],
)
def test_no_mirror(apt, files):
    with pytest.raises(CommandExecutionError, match=r"None of the apt sources of this machine has bookworm main"):
        apt(files)


@hypothesis.given(text=strategies.text(strategies.sampled_from("Types: deb\nURIsSu-#[]= \t"), max_size=200))
@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_no_file_of_apt_breaks_it(packages, text):
    for read in (packages._deb822, packages._one_line):
        for uris, suites, components, kept in read(text):
            assert uris and isinstance(suites, list) and isinstance(components, list) and isinstance(kept, dict)


# Services that do not start


@pytest.fixture
def installing(packages, tmp_path):
    """Return a function that installs with what stands at policy-rc.d seen meanwhile, and returns that."""
    policy = tmp_path / "policy-rc.d"

    def install(names=("nginx",), fails=None):
        seen = []

        def pkg_install(pkgs, **options):
            seen.append(policy.read_text())
            assert policy.stat().st_mode & 0o111
            assert options == {"refresh": True, "install_recommends": False}
            if fails:
                raise fails
            return {name: {"old": "", "new": "1"} for name in pkgs}

        packages.__salt__ = {
            "pkg.install": pkg_install,
            "pkg.version": lambda name: "" if name == "none" else "1",
            "cmd.run_all": lambda *_, **__: seen.append("configured"),
        }
        changes = packages.packages_install(list(names))
        return seen, changes

    return install


def test_no_service_starts_while_packages_are_installed(packages, installing, tmp_path):
    seen, changes = installing()
    assert seen[0] == "configured"
    assert "exit 101" in seen[1]
    assert changes == {"nginx": {"old": "", "new": "1"}}
    assert not (tmp_path / "policy-rc.d").exists()


@pytest.mark.parametrize("fails", [None, CommandExecutionError("no space")])
def test_the_machines_own_policy_is_kept(installing, tmp_path, fails):
    policy = tmp_path / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 0\n")
    policy.chmod(0o700)
    if fails:
        with pytest.raises(CommandExecutionError, match="no space"):
            installing(fails=fails)
    else:
        seen, _ = installing()
        assert "exit 101" in seen[1]
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"
    assert policy.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["policy-rc.d"]


def test_a_policy_that_is_a_link_is_kept(installing, tmp_path):
    (tmp_path / "policy-rc.d").symlink_to("/no/such/file")
    installing()
    assert str((tmp_path / "policy-rc.d").readlink()) == "/no/such/file"


@pytest.mark.parametrize("own", [None, "#!/bin/sh\nexit 0\n"])
def test_what_an_interrupted_installation_left_is_put_right(packages, installing, tmp_path, own):
    policy = tmp_path / "policy-rc.d"
    if own:
        policy.write_text(own)
    with pytest.raises(KeyboardInterrupt):
        installing(fails=KeyboardInterrupt())
    assert policy.exists() == bool(own), "even then"
    # Killed, it leaves ours, and the machine's own aside.
    packages._services_deny()
    assert packages.packages_interrupted()
    seen, changes = installing(names=())
    assert (seen, changes) == (["configured"], {})
    assert not packages.packages_interrupted()
    assert (policy.read_text() if policy.exists() else None) == own


def test_a_package_that_apt_did_not_install(installing):
    with pytest.raises(
        CommandExecutionError, match=re.escape("apt did not install none; see what `apt-get install none`")
    ):
        installing(names=("nginx", "none"))
