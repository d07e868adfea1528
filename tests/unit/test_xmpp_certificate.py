"""Certificates: which can be used, and what is said of those that cannot."""

import datetime
import functools
import os
import pathlib
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from salt.exceptions import CommandExecutionError

from tests.unit.ejabberd.conftest import load  # noqa: F401

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


@functools.cache
def key(name):
    """The private key of that name."""
    if name == "rsa":
        return rsa.generate_private_key(65537, 2048)
    return ed25519.Ed25519PrivateKey.generate() if name == "ed25519" else ec.generate_private_key(ec.SECP256R1())


def issue(names, subject="server", issuer="root", start=-DAY, end=30 * DAY, ca=False, of=None):
    """A certificate of ``subject``'s key, signed by ``issuer``'s."""
    name = lambda text: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])  # noqa: E731
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(of or subject))
        .issuer_name(name(issuer))
        .public_key(key(subject).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + start)
        .not_valid_after(NOW + end)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    return builder.sign(key(issuer), hashes.SHA256() if issuer != "ed25519" else None)


def private(name, password=None, form=serialization.PrivateFormat.PKCS8):
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key(name).private_bytes(PEM, form, encryption).decode()


ROOT = issue([], "root", ca=True)
MIDDLE = issue([], "middle", ca=True)
NAMES = ("example.org", "conference.example.org")


@pytest.fixture
def module(load):  # noqa: F811
    module = load("_modules/xmpp_certificate.py")
    stats = lambda path: {  # noqa: E731
        "user": pathlib.Path(path).owner(),
        "group": pathlib.Path(path).group(),
        "mode": f"0{pathlib.Path(path).stat().st_mode & 0o777:o}",
    }
    module.__salt__ = {"file.stats": stats}
    return module


@pytest.fixture
def files(tmp_path):
    """Return a function that writes a chain and a key, and returns their paths."""

    def write(chain, key_text=None):
        text = chain if isinstance(chain, str) else "".join(each.public_bytes(PEM).decode() for each in chain)
        (tmp_path / "chain.pem").write_text(text)
        (tmp_path / "key.pem").write_text(private("server") if key_text is None else key_text)
        return str(tmp_path / "chain.pem"), str(tmp_path / "key.pem")

    return write


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (NAMES, NAMES),
        (("example.org", "*.example.org"), NAMES),
        (("Example.ORG", "*.Example.org"), NAMES),
        (("example.org",), ()),
        ((), ()),
    ],
)
def test_names_that_are_carried(module, files, names, wanted):
    info = module.certificate_info(*files([issue(names)]), names=list(wanted))
    assert info["names"] == [name.lower() for name in names]
    assert info["subject"] == "CN=server"
    assert info["chain"] == 1
    assert 29.9 < info["days_left"] < 30.1


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ((), "example.org, conference.example.org"),
        (("example.org",), "conference.example.org"),
        (("*.example.org",), "example.org"),
        (("example.org", "*.conference.example.org"), "conference.example.org"),
        (("*.org", "conference.example.org"), None),
        (("example.org", "*.org"), "conference.example.org"),
        (("example.org", "*.*.org"), "conference.example.org"),
        (("example.org", "c*.example.org"), "conference.example.org"),
    ],
)
def test_a_wildcard_stands_for_one_label_and_no_name_is_passed_over(module, files, names, missing):
    paths = files([issue(names)])
    if missing is None:
        assert module.certificate_info(*paths, names=list(NAMES))
        return
    with pytest.raises(CommandExecutionError, match=f"but not {missing}; get one that carries them all"):
        module.certificate_info(*paths, names=list(NAMES))


@pytest.mark.parametrize("kind", ["server", "rsa", "ed25519"])
def test_kinds_of_keys(module, files, kind):
    paths = files([issue(NAMES, kind)], private(kind))
    assert module.certificate_info(*paths)["chain"] == 1


def test_a_key_in_its_older_form(module, files):
    assert module.certificate_info(
        *files([issue(NAMES)], private("server", form=serialization.PrivateFormat.TraditionalOpenSSL))
    )


def test_a_chain_in_order(module, files):
    info = module.certificate_info(*files([issue(NAMES, issuer="middle"), MIDDLE, ROOT]))
    assert (info["chain"], info["issuer"]) == (3, "CN=middle")


LEAF = issue(NAMES, issuer="middle")
WRONG = {
    "the chain in wrong order": ([LEAF, ROOT, MIDDLE], None, "CN=server is not issued by CN=root, which follows it"),
    "the issuer first": ([MIDDLE, LEAF], private("middle"), "CN=middle is not issued by CN=server"),
    "an issuer that is left out": ([LEAF, ROOT], None, "put the server's certificate first, then each issuer"),
    "an issuer of the same name": (
        [LEAF, issue([], "other", ca=True, of="middle")],
        None,
        "is not issued by CN=middle",
    ),
    "another's key": ([issue(NAMES)], private("other"), "is not the key of"),
    "another's key of another kind": ([issue(NAMES)], private("rsa"), "is not the key of"),
    "the issuer's key": ([LEAF, MIDDLE], private("middle"), "is not the key of"),
    "a key with a password": ([LEAF], private("server", b"secret"), "key.pem is no unencrypted PEM private key"),
    "an old key with a password": (
        [LEAF],
        private("server", b"secret", serialization.PrivateFormat.TraditionalOpenSSL),
        "key.pem is no unencrypted PEM private key",
    ),
    "a public key": (
        [LEAF],
        key("server").public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode(),
        "key.pem is no unencrypted PEM private key",
    ),
    "no key": ([LEAF], "", "key.pem is no unencrypted PEM private key"),
    "half a key": ([LEAF], private("server")[:100], "key.pem is no unencrypted PEM private key"),
    "a certificate for a key": ([LEAF], LEAF.public_bytes(PEM).decode(), "key.pem is no unencrypted PEM private key"),
    "expired": ([issue(NAMES, start=-9 * DAY, end=-DAY)], None, "not now; get a new certificate, or set the clock"),
    "not yet valid": ([issue(NAMES, start=DAY)], None, "not now; get a new certificate, or set the clock"),
    "rubbish": ("rubbish", None, "chain.pem is no PEM certificate"),
    "nothing": ("", None, "chain.pem is no PEM certificate"),
    "half a certificate": (LEAF.public_bytes(PEM).decode()[:200], None, "chain.pem is no PEM certificate"),
    "DER in PEM's clothes": (
        "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n",
        None,
        "chain.pem is no PEM",
    ),
    "a key for a certificate": (private("server"), None, "chain.pem is no PEM certificate"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used(module, files, tmp_path, case):
    chain, key_text, says = WRONG[case]
    paths = files(chain, key_text)
    with pytest.raises(CommandExecutionError) as error:
        module.certificate_info(*paths)
    assert says in str(error.value)
    assert "PRIVATE KEY-----" not in str(error.value)
    # Nor is it given to anyone.
    copy = tmp_path / "copy.pem"
    copy.write_text("the old one")
    with pytest.raises(CommandExecutionError):
        module.certificate_install(str(copy), *paths)
    assert copy.read_text() == "the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain.pem", "copy.pem", "key.pem"]


def test_files_that_are_not_there(module, files, tmp_path):
    chain, key_path = files([issue(NAMES)])
    with pytest.raises(CommandExecutionError, match=r"/no/such\.pem cannot be read: No such file.*xmpp:tls"):
        module.certificate_info("/no/such.pem", key_path)
    with pytest.raises(CommandExecutionError, match=r"/no/such\.key cannot be read"):
        module.certificate_info(chain, "/no/such.key")


def test_a_copy(module, files, tmp_path):
    paths = files([LEAF, MIDDLE])
    copy = str(tmp_path / "copy.pem")
    assert module.certificate_installed(copy, *paths) is False
    assert module.certificate_install(copy, *paths)["chain"] == 2
    assert module.certificate_installed(copy, *paths) is True
    text = pathlib.Path(copy).read_text()
    assert text == pathlib.Path(paths[0]).read_text() + pathlib.Path(paths[1]).read_text()
    assert pathlib.Path(copy).stat().st_mode & 0o777 == 0o600
    # What others may do with it, or what is in it, makes it another.
    pathlib.Path(copy).chmod(0o644)
    assert module.certificate_installed(copy, *paths) is False
    module.certificate_install(copy, *paths)
    assert pathlib.Path(copy).stat().st_mode & 0o777 == 0o600
    files([issue(NAMES)])
    assert module.certificate_installed(copy, *paths) is False


@pytest.mark.parametrize("ahead", [0, DAY.total_seconds()], ids=["in the same second", "where the clock was set back"])
def test_a_new_copy_is_later_than_the_one_before(module, files, tmp_path, ahead):
    copy, paths = tmp_path / "copy.pem", files([LEAF, MIDDLE])
    module.certificate_install(str(copy), *paths)
    before = time.time() + ahead
    os.utime(copy, (before, before))
    module.certificate_install(str(copy), *paths)
    assert int(copy.stat().st_mtime) > int(before)


def test_a_copy_that_cannot_be_written_leaves_nothing_behind(module, files, tmp_path):
    paths = files([LEAF])
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(CommandExecutionError, match="could not be written"):
        module.certificate_install(str(place / "copy.pem"), *paths, group="no-such-group")
    assert list(place.iterdir()) == []
