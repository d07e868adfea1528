"""
What the pillar may say about the XMPP service, and every mistake in it
========================================================================

The tree ``xmpp:`` is described here once: each key with its type, its default and what is expected of it.
``pillar.example`` shows the same tree with comments.
"""

import base64
import ipaddress
import re

from salt.exceptions import SaltInvocationError

__virtualname__ = "xmpp"

ROLES = ("ejabberd", "nginx", "postgres")
SERVICES = {"muc": "conference", "proxy": "proxy", "pubsub": "pubsub", "upload": "upload"}
LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
STUN_PORT = 3478
CHALLENGES = ("cloudflare", "http", "plugin", "rfc2136")
TSIG_ALGORITHMS = tuple(f"HMAC-{hash}" for hash in ("MD5", "SHA1", "SHA224", "SHA256", "SHA384", "SHA512"))
REQUIRED = object()
OWN_EJABBERD_OPTIONS = (
    "api_permissions auth_password_format auth_scram_hash certfiles default_db hide_sensitive_log_data host_config "
    "hosts include_config_file listen log_modules_fully loglevel modules new_sql_schema sql_database "
    "sql_schema_multihost sql_server sql_type sql_username"
).split()
OWN_POSTGRES_SETTINGS = (
    "cluster_name config_file data_directory external_pid_file hba_file ident_file listen_addresses "
    "password_encryption port unix_socket_directories"
).split()


def __virtual__():
    return __virtualname__


class _Wrong(Exception):
    """A value that is not what its key expects."""


class _Key:
    """One key of the pillar: how its value is read, what it must be, and what stands for it when it is absent."""

    def __init__(self, read, expected, default=REQUIRED, secret=False):
        self.read, self.expected, self.default, self.secret = read, expected, default, secret

    def value(self, given, path, mistakes):
        if given is None:
            if self.default is REQUIRED:
                mistakes.append(f"{path}: is missing; expected {self.expected}")
                return None
            return self.default() if callable(self.default) else self.default
        try:
            value = self.read(given)
        except _Wrong as wrong:
            shown = "" if self.secret else _shown(given)
            mistakes.append(f"{path}: {shown}{wrong}; expected {self.expected}")
            return None
        return "given" if self.secret else value


class _Tree:
    """A map whose keys are all known."""

    def __init__(self, **keys):
        self.keys = keys

    def value(self, given, path, mistakes):
        if not _is_map(given, path, mistakes):
            given, mistakes = {}, []  # what is missing in it was told by that
        given = given or {}
        for key in given:
            if key not in self.keys:
                mistakes.append(f"{path}:{key}: is not known; expected one of {', '.join(sorted(self.keys))}")
        return {key: spec.value(given.get(key), f"{path}:{key}", mistakes) for key, spec in self.keys.items()}


class _Map:
    """A map whose keys are names that the operator chose, all read alike."""

    def __init__(self, name, expected, entry):
        self.name, self.expected, self.entry = name, expected, entry

    def value(self, given, path, mistakes):
        if not _is_map(given, path, mistakes):
            return {}
        values = {}
        for key, entry in (given or {}).items():
            try:
                name = self.name(key)
            except _Wrong as wrong:
                mistakes.append(f"{path}:{key}: {wrong}; expected {self.expected}")
                name = str(key)
            values[name] = self.entry.value(entry, f"{path}:{key}", mistakes)
        return values


def _is_map(given, path, mistakes):
    if given is None or isinstance(given, dict):
        return True
    mistakes.append(f"{path}: is a {type(given).__name__}; expected a map")
    return False


def _shown(given):
    """A value as a mistake shows it: a map may hold anything, also a secret in the wrong place; so may a long text."""
    if isinstance(given, dict | list) or len(str(given)) > 80:
        return ""
    return f"{given!r} "


def _text(given):
    if not isinstance(given, str) or not given.strip():
        raise _Wrong("is no text" if not isinstance(given, str) else "is empty")
    return given


def _secret(given):
    if "\n" in _text(given).strip("\n"):
        raise _Wrong("has more than one line")
    if given.strip("\n") != given.strip():
        raise _Wrong("begins or ends with a blank")
    return given


def _cookie(given):
    if not re.fullmatch(r"[A-Za-z0-9_]{1,255}", _text(given)):
        raise _Wrong("has characters that an Erlang atom has not")
    return given


def _boolean(given):
    if not isinstance(given, bool):
        raise _Wrong(f"is a {type(given).__name__}")
    return given


def _number(low, high):
    def read(given):
        if isinstance(given, bool) or not isinstance(given, int):
            raise _Wrong(f"is a {type(given).__name__}")
        if not low <= given <= high:
            raise _Wrong("is out of range")
        return given

    return read


def _one_of(*choices):
    def read(given):
        if given not in choices:
            raise _Wrong("is not one of them")
        return given

    return read


def _list(item):
    def read(given):
        if not isinstance(given, list):
            raise _Wrong(f"is a {type(given).__name__}, not a list")
        values, wrongs = [], []
        for each in given:
            try:
                values.append(item(each))
            except _Wrong as wrong:
                wrongs.append(f"has an item that {wrong}: {_shown(each) or type(each).__name__}".rstrip())
        wrongs += [f"has {each!r} twice" for each in _twice(values)]
        if wrongs:
            raise _Wrong(", ".join(wrongs))
        return values

    return read


def _map_but(forbidden, why):
    def read(given):
        if not isinstance(given, dict):
            raise _Wrong(f"is a {type(given).__name__}, not a map")
        taken = sorted(set(given) & set(forbidden))
        if taken:
            raise _Wrong(f"has {', '.join(taken)}, {why}")
        return given

    return read


def _room_options(given):
    _map_but(("password", "password_protected"), "which what Salt returns and keeps would show")(given)
    for name, value in given.items():
        if not isinstance(value, str | int):
            raise _Wrong(f"has a value of {name} that is neither text, number, true nor false")
    return given


def _cluster(given):
    # Debian's systemd units cannot tell a dash in the name from the one before it (pg_createcluster(1)).
    if not re.fullmatch(r"[A-Za-z0-9_.]+", _text(given)):
        raise _Wrong("has other characters than letters, digits, dots and underscores")
    return given


def _postgres_settings(given):
    for name, value in _map_but(OWN_POSTGRES_SETTINGS, "which the formula itself sets")(given).items():
        if not re.fullmatch(r"[a-z_][a-z0-9_.]*", str(name)):
            raise _Wrong(f"has {name!r}, which is no setting's name")
        if not isinstance(value, str | int | float) or "\n" in str(value):
            raise _Wrong(f"has a value of {name} that is neither one line of text nor a number")
    return given


def _ejabberd_modules(given):
    if not isinstance(given, dict):
        raise _Wrong(f"is a {type(given).__name__}, not a map")
    for name, options in given.items():
        if not re.fullmatch(r"mod_[a-z0-9_]+", str(name)):
            raise _Wrong(f"has {name!r}, which is no module's name")
        if options is not None and not isinstance(options, dict):
            raise _Wrong(f"has options of {name} that are no map")
    return given


def _host(given):
    _text(given)
    if not given.isascii():
        raise _Wrong("is not in its ASCII form (xn--...)")
    if given != given.lower():
        raise _Wrong("has capital letters")
    try:
        ipaddress.ip_address(given)
    except ValueError:
        pass
    else:
        raise _Wrong("is an address")
    labels = given.split(".")
    if len(labels) < 2:
        raise _Wrong("has no dot")
    if len(given) > 253 or labels[-1].isdigit() or not all(LABEL.fullmatch(label) for label in labels):
        raise _Wrong("is no host name")
    return given


def _localpart(given):
    # RFC 7622, 3.3.1: what a localpart excludes; capitals would be folded by the server and never match again.
    if not isinstance(given, str) or not given or len(given.encode()) > 1023:
        raise _Wrong("is no localpart")
    if re.search(r"[\s\"&'/:<>@]", given):
        raise _Wrong("has a character that a localpart may not have")
    if given != given.lower():
        raise _Wrong("has capital letters")
    return given


def _jid(given):
    localpart, at, host = str(given).partition("@")
    if not at:
        raise _Wrong("has no @")
    return f"{_localpart(localpart)}@{_host(host)}"


def _address(given):
    try:
        address = ipaddress.ip_address(_text(given))
    except ValueError:
        raise _Wrong("is no IP address") from None
    if address.is_unspecified or address.is_multicast:
        raise _Wrong("is no machine's address")
    return str(address)


def _network(given):
    try:
        return str(ipaddress.ip_network(_text(given)))
    except ValueError as wrong:
        raise _Wrong(f"is no network ({wrong})") from None


def _uri(given):
    if not re.fullmatch(r"(mailto|xmpp|https?|tel|sip|sips):\S+", _text(given)):
        raise _Wrong("is no URI of that kind")
    return given


def _port_range(given):
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", str(given))
    if not match:
        raise _Wrong("is no range")
    low, high = int(match[1]), int(match[2])
    if not 1024 <= low <= high <= 65535:
        raise _Wrong("is not between 1024 and 65535 in rising order")
    if low <= STUN_PORT <= high:
        raise _Wrong(f"has STUN's own port {STUN_PORT} in it")
    return [low, high]


def _path_or_pem(given):
    if not (_text(given).startswith("/") or "-----BEGIN " in given):
        raise _Wrong("is neither")
    return given


def _word(given):
    if not re.fullmatch(r"[\x21-\x7e]+", _text(given)):
        raise _Wrong("has blanks, or other characters than ASCII's")
    return given


def _email(given):
    if not re.fullmatch(r"[^\s@,]+@[^\s@,]+\.[^\s@,]+", _text(given)):
        raise _Wrong("is no mail address")
    return given


def _https(given):
    if not re.fullmatch(r"https://[^\s/]+(/\S*)?", _text(given)):
        raise _Wrong("is no https:// address")
    return given


def _base64(given):
    try:
        base64.b64decode(_word(given), altchars=b"-_" if set("-_") & set(given) else None, validate=True)
    except ValueError:
        raise _Wrong("is no base64") from None
    return given


def _base64url(given):
    # RFC 8555, 7.3.4: without the padding.
    if not re.fullmatch(r"[A-Za-z0-9_-]+=*", _text(given)):
        raise _Wrong("is no base64url")
    return given


def _key_name(given):
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,255}", _text(given)):
        raise _Wrong("is no name of a key")
    return given


def _dns_plugin(given):
    if not re.fullmatch(r"dns-[a-z0-9-]+", _text(given)):
        raise _Wrong("is no name of a certbot DNS plugin")
    return given


def _package(given):
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", _text(given)):
        raise _Wrong("is no name of a Debian package")
    return given


def _plugin_settings(given):
    if not isinstance(given, dict):
        raise _Wrong(f"is a {type(given).__name__}, not a map")
    for name, value in given.items():
        if not re.fullmatch(r"dns_[a-z0-9_]+", str(name)):
            raise _Wrong("has a key that does not begin with the plugin's name, as in dns_ovh_endpoint")
        if not isinstance(value, str | int) or "\n" in str(value):
            raise _Wrong(f"has a value of {name} that is neither one line of text nor a number")
    return given


def _contacts():
    return _Key(_list(_uri), "a list of URIs (mailto:, xmpp:, https:, tel:, sip:)", list)


_DAYS = "days as a whole number, 0 for ever"
_PEM = "an absolute path or a PEM text"
_PORTS = "a list of port numbers"
_SECONDS = "seconds as a whole number, up to 3600"

TREE = _Tree(
    domain=_Key(_host, "a domain such as example.org"),
    virtual_hosts=_Key(_list(_host), "a list of domains", list),
    nodes=_Map(
        _host,
        "the machine's full host name, such as xmpp1.example.org",
        _Tree(
            address=_Key(_address, "an IPv4 or IPv6 address", None),
            minion=_Key(_text, "a minion's id", None),
            public_addresses=_Key(_list(_address), "a list of IPv4 and IPv6 addresses", None),
            roles=_Key(_list(_one_of(*ROLES)), f"a list out of {', '.join(ROLES)}", lambda: list(ROLES)),
        ),
    ),
    admin=_Key(_localpart, "a localpart in small letters, such as admin", "admin"),
    users=_Map(
        _jid,
        "a bare JID in small letters, such as juliet@example.org",
        _Tree(
            password=_Key(_secret, "one line of text", None, secret=True),
            admin=_Key(_boolean, "true or false", False),
            present=_Key(_boolean, "true or false", True),
        ),
    ),
    rooms=_Map(
        _jid,
        "a room's JID, such as balcony@conference.example.org",
        _Key(
            _room_options,
            "a map of ejabberd's room options, {} for its defaults; members_only for a closed room",
            dict,
        ),
    ),
    contact=_Tree(
        abuse=_contacts(),
        admin=_contacts(),
        feedback=_contacts(),
        sales=_contacts(),
        security=_contacts(),
        support=_contacts(),
    ),
    tls=_Tree(
        source=_Key(_one_of("internal", "files", "letsencrypt"), "internal, files or letsencrypt", "internal"),
        internal=_Tree(days=_Key(_number(2, 825), "2 to 825 days", 90)),
        files=_Tree(
            certificate=_Key(_path_or_pem, _PEM, None, secret=True),
            key=_Key(_path_or_pem, _PEM, None, secret=True),
        ),
        letsencrypt=_Tree(
            challenge=_Key(_one_of(*CHALLENGES), f"one of {', '.join(CHALLENGES)}", None),
            email=_Key(_email, "a mail address", None),
            wildcard=_Key(_boolean, "true or false", False),
            key_type=_Key(_one_of("ecdsa", "rsa"), "ecdsa or rsa", "ecdsa"),
            reuse_key=_Key(_boolean, "true or false", False),
            staging=_Key(_boolean, "true or false", False),
            directory=_Key(_https, "the https:// address of an ACME server's directory", None),
            ca_bundle=_Key(_path_or_pem, _PEM, None),
            external_account=_Tree(
                kid=_Key(_word, "the key's identifier", None),
                hmac_key=_Key(_base64url, "the key in base64url", None, secret=True),
            ),
            cloudflare=_Tree(
                api_token=_Key(_word, "one word", None, secret=True),
                email=_Key(_email, "the mail address of the Cloudflare account", None),
                api_key=_Key(_word, "one word", None, secret=True),
                propagation_seconds=_Key(_number(0, 3600), _SECONDS, 10),
            ),
            rfc2136=_Tree(
                server=_Key(_address, "the address of the DNS server that takes updates", None),
                port=_Key(_number(1, 65535), "a port number", 53),
                name=_Key(_key_name, "the name of the TSIG key", None),
                secret=_Key(_base64, "the TSIG key in base64", None, secret=True),
                algorithm=_Key(_one_of(*TSIG_ALGORITHMS), f"one of {', '.join(TSIG_ALGORITHMS)}", "HMAC-SHA512"),
                sign_query=_Key(_boolean, "true or false", False),
                propagation_seconds=_Key(_number(0, 3600), _SECONDS, 60),
            ),
            plugin=_Tree(
                name=_Key(_dns_plugin, "a certbot DNS plugin, such as dns-ovh", None),
                package=_Key(_package, "a Debian package", None),
                settings=_Key(_plugin_settings, "a map of what is in the plugin's credentials file", None, secret=True),
                propagation_seconds=_Key(_number(0, 3600), _SECONDS, None),
            ),
        ),
    ),
    ejabberd=_Tree(
        release=_Key(_one_of("stable", "backports"), "stable or backports", "stable"),
        loglevel=_Key(
            _one_of("error", "warning", "notice", "info"),
            "error, warning, notice or info (debug shows passwords)",
            "notice",
        ),
        archive=_Tree(days=_Key(_number(0, 36500), _DAYS, 365)),
        upload=_Tree(
            max_size=_Key(_number(1024, 2**40), "bytes, at least 1024", 104857600),
            quota=_Key(_number(1024, 2**50), "bytes, at least 1024", 1073741824),
            days=_Key(_number(0, 36500), _DAYS, 30),
        ),
        turn=_Tree(
            enabled=_Key(_boolean, "true or false", True),
            ports=_Key(_port_range, "two ports with a dash, such as 49152-49407", lambda: [49152, 49407]),
        ),
        scram_hash=_Key(_one_of("sha", "sha256", "sha512"), "sha, sha256 or sha512", "sha256"),
        modules=_Key(_ejabberd_modules, "a map of mod_... to a map of options, or to null for none of it", dict),
        options=_Key(
            _map_but(OWN_EJABBERD_OPTIONS, "which the formula itself sets"),
            "a map of ejabberd's top-level options",
            dict,
        ),
    ),
    postgres=_Tree(
        cluster=_Key(_cluster, "the name of a PostgreSQL cluster", "main"),
        settings=_Key(_postgres_settings, "a map of postgresql.conf settings", dict),
    ),
    nginx=_Tree(
        admin_from=_Key(_list(_network), "a list of networks, such as 192.0.2.0/28", list),
        hsts_days=_Key(_number(0, 3650), "days as a whole number, 0 for none", 365),
    ),
    firewall=_Tree(
        enabled=_Key(_boolean, "true or false", False),
        allow_tcp=_Key(_list(_number(1, 65535)), _PORTS, list),
        allow_udp=_Key(_list(_number(1, 65535)), _PORTS, list),
    ),
    secrets=_Tree(
        admin_password=_Key(_secret, "one line of text", None, secret=True),
        erlang_cookie=_Key(_cookie, "letters, digits and underscores", None, secret=True),
    ),
)


def _twice(values):
    return sorted({value for value in values if value is not None and values.count(value) > 1})


def _domain_conflicts(settings, domains):
    services = {f"{label}.{domain}" for domain in domains for label in SERVICES.values()}
    for domain in _twice(domains):
        yield f"xmpp:virtual_hosts: {domain!r} is served already; expected other domains than xmpp:domain, each once"
    for domain in sorted(set(domains) & services):
        yield f"xmpp:virtual_hosts: {domain!r} is the name of a service of another domain; expected a name of its own"


def _node_conflicts(settings, domains):
    nodes = settings["nodes"]
    if not nodes:
        yield "xmpp:nodes: is empty; expected one node, such as {xmpp1.example.org: {address: 192.0.2.10}}"
    serving = [name for name, node in nodes.items() if node["roles"] is None or node["roles"]]
    if len(serving) > 1:
        yield (
            f"xmpp:nodes: has {len(serving)} nodes that serve; expected one: clusters come with a later release; "
            "further nodes may have roles: [], for the certificate alone"
        )
    for address in _twice([node["address"] for node in nodes.values()]):
        yield f"xmpp:nodes: two nodes have the address {address}; expected one node an address"
    for minion in _twice([node["minion"] or name for name, node in nodes.items()]):
        yield f"xmpp:nodes: two nodes are the minion {minion!r}; expected one node a minion"
    for role in ROLES:
        if nodes and not any(role in (ROLES if node["roles"] is None else node["roles"]) for node in nodes.values()):
            yield f"xmpp:nodes: no node has the role {role}; expected at least one"


def _account_conflicts(settings, domains):
    admin = f"{settings['admin']}@{settings['domain']}"
    for jid, user in settings["users"].items():
        if jid == admin:
            yield f"xmpp:users:{jid}: is xmpp:admin already; expected it in one place, as xmpp:admin"
        elif user["present"] and not user["password"]:
            yield f"xmpp:users:{jid}:password: is missing; expected a password, or present: false"
        if domains and jid.partition("@")[2] not in domains:
            yield f"xmpp:users:{jid}: is on no domain of this service; expected one of {', '.join(domains)}"
    room_services = [f"{SERVICES['muc']}.{domain}" for domain in domains]
    for room in settings["rooms"]:
        if domains and room.partition("@")[2] not in room_services:
            yield f"xmpp:rooms:{room}: is on no room service; expected one of {', '.join(room_services)}"


def _component_conflicts(settings, domains):
    files = settings["tls"]["files"]
    if settings["tls"]["source"] == "files":
        for key in ("certificate", "key"):
            if not files[key]:
                yield f"xmpp:tls:files:{key}: is missing; expected {_PEM}, because xmpp:tls:source is files"
    if settings["tls"]["source"] == "letsencrypt":
        yield from _letsencrypt_conflicts(settings)
    upload = settings["ejabberd"]["upload"]
    if upload["quota"] and upload["max_size"] and upload["quota"] < upload["max_size"]:
        yield "xmpp:ejabberd:upload:quota: is smaller than max_size; expected room for one file at least"


def _letsencrypt_conflicts(settings):
    path, asked = "xmpp:tls:letsencrypt", settings["tls"]["letsencrypt"]
    challenge = asked["challenge"]
    if not challenge:
        yield f"{path}:challenge: is missing; expected one of {', '.join(CHALLENGES)}"
    if challenge == "http" and asked["wildcard"]:
        yield f"{path}:wildcard: is true; expected false, for only a challenge by DNS proves a wildcard"
    if challenge == "http" and len(settings["nodes"]) > 1:
        yield f"{path}:challenge: is http; expected one by DNS, for with several nodes the CA may ask another one"
    if asked["staging"] and asked["directory"]:
        yield f"{path}:staging: is true beside directory; expected one of the two"
    account = asked["external_account"]
    for key, other in (("kid", "hmac_key"), ("hmac_key", "kid")):
        if account[other] and not account[key]:
            yield f"{path}:external_account:{key}: is missing; expected it beside {other}"
    cloudflare = asked["cloudflare"]
    if challenge == "cloudflare" and cloudflare["api_token"]:
        for key in ("api_key", "email"):
            if cloudflare[key]:
                yield f"{path}:cloudflare:{key}: is given beside api_token; expected the token alone"
    elif challenge == "cloudflare":
        if not (cloudflare["api_key"] or cloudflare["email"]):
            yield f"{path}:cloudflare:api_token: is missing; expected it, or api_key and email"
        elif not (cloudflare["api_key"] and cloudflare["email"]):
            key = "email" if cloudflare["api_key"] else "api_key"
            yield f"{path}:cloudflare:{key}: is missing; expected api_key and email, or api_token alone"
    needed = {"rfc2136": ("server", "name", "secret"), "plugin": ("name",)}.get(challenge, ())
    for key in needed:
        if not asked[challenge][key]:
            yield f"{path}:{challenge}:{key}: is missing; expected it, because the challenge is {challenge}"


def _read(pillar):
    mistakes = []
    if pillar is None:
        mistakes.append("xmpp: is missing; expected the tree of pillar.example in this minion's pillar")
        return None, mistakes
    settings = TREE.value(pillar, "xmpp", mistakes)
    # A value that is wrong in itself is None here. What cannot be judged without it is not, and nothing is told twice.
    told = [mistake.partition(": ")[0] + ":" for mistake in mistakes]
    known = settings["domain"] and settings["virtual_hosts"] is not None
    domains = [settings["domain"], *settings["virtual_hosts"]] if known else []
    for conflicts in (_domain_conflicts, _node_conflicts, _account_conflicts, _component_conflicts):
        found = [(conflict.partition(": ")[0] + ":", conflict) for conflict in conflicts(settings, domains)]
        mistakes += [conflict for path, conflict in found if not any(path.startswith(each) for each in told)]
    return settings, mistakes


def mistakes(pillar=None):
    """
    List every mistake in the pillar, and touch nothing.

    pillar
        The tree under ``xmpp:``, as a dict. Default: this minion's own pillar.

    Returns a list of strings, each ``<pillar path>: <what is wrong>; expected <what>``; an empty list when there is
    no mistake. Values that are secret are not shown.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.mistakes
    """
    return _read(__pillar__.get("xmpp") if pillar is None else pillar)[1]


def settings(pillar=None):
    """
    Return the pillar with every default filled in.

    pillar
        The tree under ``xmpp:``, as a dict. Default: this minion's own pillar.

    Returns a dict of the shape of ``pillar.example``. Where a secret is given, the text ``given`` stands for it.

    Raises ``SaltInvocationError`` with every mistake, a line each.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.settings
    """
    values, wrong = _read(__pillar__.get("xmpp") if pillar is None else pillar)
    if wrong:
        raise SaltInvocationError(
            f"The pillar has {len(wrong)} mistake{'s' * (len(wrong) > 1)}; nothing was touched:\n"
            + "\n".join(f"  {each}" for each in wrong)
        )
    return values
