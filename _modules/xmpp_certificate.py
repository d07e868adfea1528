"""
Certificates: looked at before anything is given them
=====================================================

ejabberd does not start with a PEM file that is broken, so what it gets is proven first.
"""

import contextlib
import datetime
import hashlib
import itertools
import os
import shutil
import tempfile

from salt.exceptions import CommandExecutionError

try:
    from cryptography import exceptions as cryptography_exceptions
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
except ImportError:  # Salt depends on it; without it these functions cannot be.
    x509 = None

__virtualname__ = "xmpp"


def __virtual__():
    if x509 is None:
        return False, "The Python package cryptography is missing; install it for Salt's Python"
    return __virtualname__


def certificate_info(certificate, key=None, names=None, dates=True):
    """
    Read a certificate with its chain, prove that it can be used, and tell about it.

    certificate
        A PEM file: the server's certificate first, then its chain.

    key
        A PEM file with the private key, unencrypted. Default: the key is not looked at.

    names
        A list of host names that the certificate must carry, a wildcard counting for one label (RFC 6125, 6.4.3).
        Default: none.

    dates
        Whether it must be valid today. Default: True

    Returns a dict: ``names``, ``issuer`` and ``subject`` (RFC 4514), ``not_before`` and ``not_after`` (seconds since
    the epoch), ``days_left`` (float), ``sha256`` (of the certificate, hexadecimal), ``chain`` (how many certificates).

    Raises ``CommandExecutionError`` saying which file is wrong and what to do: no PEM, key of another certificate,
    chain out of order, a name missing, not valid today.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_info /etc/ejabberd/certificate.pem
    """
    chain = _chain(certificate)
    leaf = chain[0]
    if key:
        _match(leaf, certificate, key)
    for lower, upper in itertools.pairwise(chain):
        _issued(lower, upper, certificate)
    now = datetime.datetime.now(datetime.UTC)
    if dates and not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise CommandExecutionError(
            f"{certificate} is valid from {leaf.not_valid_before_utc:%F %T} to {leaf.not_valid_after_utc:%F %T} UTC, "
            "not now; get a new certificate, or set the clock"
        )
    carried = _names(leaf)
    missing = [name for name in names or [] if not any(_covers(pattern, name) for pattern in carried)]
    if missing:
        raise CommandExecutionError(
            f"{certificate} carries {', '.join(carried) or 'no name'}, but not {', '.join(missing)}; get one that "
            "carries them all"
        )
    return {
        "names": carried,
        "subject": leaf.subject.rfc4514_string(),
        "issuer": leaf.issuer.rfc4514_string(),
        "not_before": leaf.not_valid_before_utc.timestamp(),
        "not_after": leaf.not_valid_after_utc.timestamp(),
        "days_left": (leaf.not_valid_after_utc - now).total_seconds() / 86400,
        "sha256": leaf.fingerprint(hashes.SHA256()).hex(),
        "chain": len(chain),
    }


def certificate_tlsa(certificate):
    """
    Tell how the DNS pins the key of a certificate (DANE): the end entity's key itself, by its SHA-256.

    certificate
        A PEM file: the server's certificate first.

    Returns a text, ``3 1 1`` and 64 hexadecimal digits: the value of a TLSA record.

    Raises ``CommandExecutionError`` when there is no certificate in the file.

    Source: RFC 6698, RFC 7671 (5.1), RFC 7673.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_tlsa /etc/letsencrypt/live/xmpp/fullchain.pem
    """
    return f"3 1 1 {hashlib.sha256(_public_key(_chain(certificate)[0])).hexdigest()}"


def certificate_installed(name, certificate, key, group="root"):
    """
    Tell whether a program's own copy of certificate and key is what :func:`certificate_install` would write.

    name, certificate, key, group
        As for :func:`certificate_install`.

    Returns ``True`` or ``False``.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_installed /etc/ejabberd/certificate.pem /root/chain.pem /root/key.pem group=ejabberd
    """
    wanted = _bundle(certificate, key)
    try:
        with open(name, "rb") as file:
            present = file.read()
    except FileNotFoundError:
        return False
    stats = __salt__["file.stats"](name)
    return present == wanted and stats["user"] == "root" and stats["group"] == group and stats["mode"] == _mode(group)


def certificate_install(name, certificate, key, names=None, group="root"):
    """
    Give a program its own copy of certificate and key, in one PEM file, after proving that they can be used.

    name
        The file to write: root's own, mode 0600, or 0640 where another group may read it. It is replaced in one step.

    certificate, key, names
        As for :func:`certificate_info`.

    group
        The group that may read it. Default: root, hence nobody else.

    Returns what :func:`certificate_info` does.

    Raises ``CommandExecutionError`` when it cannot be used or written; then the old file is as it was.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_install /etc/ejabberd/certificate.pem /root/chain.pem /root/key.pem group=ejabberd
    """
    info = certificate_info(certificate, key, names)
    directory, temporary = os.path.dirname(name), None
    try:
        os.makedirs(directory, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", dir=directory)
        with os.fdopen(handle, "wb") as file:
            file.write(_bundle(certificate, key))
            file.flush()
            os.fsync(file.fileno())
        shutil.chown(temporary, "root", group)
        os.chmod(temporary, int(_mode(group), 8))
        _date(temporary, name)
        os.replace(temporary, name)
    except (OSError, LookupError) as error:
        if temporary:
            os.unlink(temporary)
        raise CommandExecutionError(f"{name} could not be written: {error}; the old file is as it was") from error
    return info


def certificate_behind(certificate, key, copies):
    """
    Tell which programs' copies are there, but are not of this certificate and key.

    certificate, key
        PEM files, as for :func:`certificate_info`.

    copies
        A list of dicts: ``name`` and ``group`` as for :func:`certificate_install`.

    Returns a list of files.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_behind /root/chain.pem /root/key.pem '[{name: /etc/nginx/c.pem, group: root}]'
    """
    return [
        copy["name"]
        for copy in copies
        if os.path.exists(copy["name"]) and not certificate_installed(copy["name"], certificate, key, copy["group"])
    ]


def certificate_deploy(certificate, key, copies, names=None):
    """
    Give a new certificate to the programs that have a copy of the former one, after proving that it can be used, and
    make those that run read it. No connection is dropped. It needs no pillar and no master: certbot calls it when it
    has renewed.

    certificate, key, names
        As for :func:`certificate_info`.

    copies
        A list of dicts: ``name`` and ``group`` as for :func:`certificate_install`, and ``service``: ``ejabberd`` or
        another that reloads. What is not there yet is left to the states of its program.

    Returns a dict of each file that was replaced: what became of its service, ``reloaded`` or ``not running``.

    Raises ``CommandExecutionError`` when the certificate cannot be used (then nothing was touched), or saying which
    programs could not be given it; the others have it.

    CLI Example:

    .. code-block:: bash

        salt-call --local xmpp.certificate_deploy /root/chain.pem /root/key.pem \\
            '[{name: /etc/nginx/c.pem, group: root, service: nginx}]'
    """
    certificate_info(certificate, key, names)
    done, wrong = {}, []
    for name in certificate_behind(certificate, key, copies):
        copy = next(each for each in copies if each["name"] == name)
        try:
            certificate_install(name, certificate, key, names, copy["group"])
            done[name] = _reload(copy["service"])
        except CommandExecutionError as error:
            wrong.append(str(error))
    if wrong:
        raise CommandExecutionError("; ".join(wrong) + (f". Done: {done}" if done else ""))
    return done


def _reload(service):
    if not __salt__["service.status"](service):
        return "not running"
    if service == "ejabberd":
        __salt__["ejabberd.reload"]()
    elif not __salt__["service.reload"](service):
        raise CommandExecutionError(f"{service} has its new certificate, but does not reload; see its log")
    return "reloaded"


def _date(new, old):
    """ejabberd reads a file again only if its time is later, in whole seconds: also where the clock was set back."""
    with contextlib.suppress(FileNotFoundError):
        later = os.stat(old).st_mtime + 1
        if os.stat(new).st_mtime < later:
            os.utime(new, (later, later))


def _mode(group):
    return "0600" if group == "root" else "0640"


def _bundle(certificate, key):
    return _read(certificate).rstrip() + b"\n" + _read(key).rstrip() + b"\n"


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CommandExecutionError(f"{path} cannot be read: {error.strerror}; check the path in xmpp:tls") from error


def _chain(path):
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise CommandExecutionError(f"{path} is no PEM certificate: {error}; give the full chain in PEM") from error


def _match(leaf, certificate, key):
    try:
        private = serialization.load_pem_private_key(_read(key), password=None)
    except (ValueError, TypeError, cryptography_exceptions.UnsupportedAlgorithm) as error:
        # The reason of the library never holds the key.
        raise CommandExecutionError(f"{key} is no unencrypted PEM private key: {error}; give one") from error
    if _public_key(private) != _public_key(leaf):
        raise CommandExecutionError(f"{key} is not the key of {certificate}; give the two that belong together")


def _public_key(of):
    """The public key of a certificate or a private key, as it stands in a certificate (SubjectPublicKeyInfo)."""
    return of.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _issued(lower, upper, path):
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, cryptography_exceptions.InvalidSignature) as error:
        raise CommandExecutionError(
            f"{path}: {lower.subject.rfc4514_string()} is not issued by {upper.subject.rfc4514_string()}, which "
            "follows it; put the server's certificate first, then each issuer"
        ) from error


def _names(leaf):
    try:
        alternative = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [name.lower() for name in alternative.get_values_for_type(x509.DNSName)]


def _covers(pattern, name):
    if pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:]
    return name == pattern
