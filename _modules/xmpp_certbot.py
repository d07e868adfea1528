"""
The certificate of an ACME authority, by certbot
=================================================

certbot keeps the certificate, its key and how it was asked for as a lineage in ``/etc/letsencrypt``, and renews it by
its own timer. Here is what a lineage has, what of it differs from what is wanted, and how it is asked for; everything
that certbot is told stands in a file, for some of it is secret.
"""

import configparser
import os
import re

from salt.exceptions import CommandExecutionError

__virtualname__ = "xmpp"

HOME = "/etc/letsencrypt"
LOG = "/var/log/letsencrypt/letsencrypt.log"
# How an option is called in certbot's record of a lineage, where that is not its own name.
RECORDED = {"deploy-hook": "renew_hook"}
# Lines that say nothing about the reason.
IDLE = (
    "Saving debug log to",
    "Ask for help or search for solutions",
    "Plugins selected:",
    "Requesting a certificate for",
    "Renewing an existing certificate for",
    "Account registered.",
    "Waiting ",
    "Unsafe permissions",
    "Encountered exception during recovery",
    "- - -",
)
# What certbot says, and what to do then: the first that fits counts.
ADVICE = (
    (
        r"Another instance of Certbot",
        "certbot is at work already, perhaps renewing: apply again when it has ended",
    ),
    (
        r"rateLimited|too many (certificates|failed|new|currently|registrations)|[Rr]ate limit",
        "the authority gives no more for now: wait for the time that it names. Until then what is in place serves; to "
        "try things out, set xmpp:tls:letsencrypt:staging",
    ),
    (
        r"externalAccountRequired|external account|externalAccountBinding|\bEAB\b",
        "set xmpp:tls:letsencrypt:external_account to what the authority gave for your account",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|certificate verify failed",
        "this machine does not trust the ACME server's (or the DNS API's) certificate: set "
        "xmpp:tls:letsencrypt:ca_bundle to its authority, or the clock",
    ),
    (
        r"\b(6003|9103|9109|10000|10001)\b|[Aa]uthentication error|Invalid (access token|request headers)",
        "Cloudflare refuses the credentials: give a token with Zone:DNS:Edit and Zone:Zone:Read of the zone in "
        "xmpp:tls:letsencrypt:cloudflare",
    ),
    (
        r"Unable to determine zone_id|Unable to determine base domain",
        "the DNS that the credentials are for does not have the zone: see that the domain is in it, and that the "
        "credentials may change it",
    ),
    (
        r"BADKEY|BADSIG|BADTIME|NOTAUTH|REFUSED|TSIG|[Pp]eer",
        "the DNS server refuses the update: name, secret and algorithm in xmpp:tls:letsencrypt:rfc2136 must be those "
        "of its key, its update-policy must allow TXT records at _acme-challenge, and both clocks must agree",
    ),
    (
        r"NXDOMAIN|TXT record|DNS problem|Incorrect TXT|unauthorized.*dns|no TXT",
        "the authority did not find the TXT record: is the zone delegated to the DNS server that was updated? If its "
        "secondaries are slow, raise propagation_seconds",
    ),
    (
        r"Encountered error (when making query|adding TXT record)",
        "the DNS server does not answer: see that it runs, and that xmpp:tls:letsencrypt:rfc2136:server and port are "
        "its own",
    ),
    (
        r"acme-challenge/|Type: +(http|connection|unauthorized)",
        "the authority must reach port 80 of this machine under each of the names: see `salt-call xmpp.dns_records` "
        "and what stands between",
    ),
    (
        r"Max retries exceeded|[Cc]onnection (refused|error|aborted|reset)|timed out|Name or service not known"
        r"|resolution|No route|unreachable",
        "the ACME server (or the DNS API) does not answer: see that it runs, and that this machine reaches it",
    ),
    (
        r"accountDoesNotExist|unable to find .*account|Account .* does not exist",
        f"the authority does not know the account that {HOME}/accounts has for it: `certbot unregister` or move that "
        "folder away, then apply again",
    ),
)
ELSE = f"see {LOG}"


def __virtual__():
    return __virtualname__


def certbot_lineage(name="xmpp"):
    """
    Tell what certbot has recorded about a certificate that it keeps.

    name
        certbot's name of it. Default: xmpp

    Returns a dict of the renewal parameters, all as texts (``server``, ``authenticator``, ``key_type``, ...), empty
    when there is no such certificate.

    Raises ``CommandExecutionError`` when the record cannot be read.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certbot_lineage
    """
    path = f"{HOME}/renewal/{name}.conf"
    if not os.path.exists(path):
        return {}
    record = configparser.RawConfigParser(strict=False)
    try:
        with open(path, encoding="utf-8") as file:
            record.read_string("[top]\n" + file.read())
        return dict(record["renewalparams"])
    except (OSError, configparser.Error, KeyError) as error:
        raise CommandExecutionError(
            f"{path} cannot be read: {error}; `certbot delete --cert-name {name}`, then apply xmpp.certificates"
        ) from error


def certbot_differs(options, host_names, name="xmpp", trust=None):
    """
    Tell why an authority has to be asked: there is no certificate yet, or it is not the one that is wanted.

    options
        How it shall be asked for, now and at each renewal: a dict of certbot's options, by their long names.

    host_names
        The list of names that it shall have, no more and no less.

    name
        certbot's name of it. Default: xmpp

    trust
        As for :func:`certbot_ask`.

    Returns a list of texts, empty when there is nothing to ask for. That it ends soon is none of them: certbot's own
    timer sees to that. That it has ended is.

    Raises ``CommandExecutionError`` when the lineage is there, but cannot be used, with what to do.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certbot_differs '{authenticator: webroot, webroot-path: /var/www/acme}' '[example.org]'
    """
    recorded = certbot_lineage(name)
    if not recorded:
        return ["there is none yet"]
    differs = []
    live = f"{HOME}/live/{name}"
    try:
        info = __salt__["xmpp.certificate_info"](f"{live}/fullchain.pem", f"{live}/privkey.pem", dates=False)
    except CommandExecutionError as error:
        by_hand = f"REQUESTS_CA_BUNDLE={trust} " if trust else ""
        raise CommandExecutionError(
            f"what certbot keeps cannot be used: {error}. "
            f"`{by_hand}certbot renew --force-renewal --cert-name {name}` gets a new one; if that cannot read it "
            f"either, `certbot delete --cert-name {name}`, then apply xmpp.certificates"
        ) from error
    carried, wanted = set(info["names"]), {each.lower() for each in host_names}
    if info["days_left"] <= 0:
        differs.append("it has ended")
    if wanted - carried:
        differs.append(f"it lacks {', '.join(sorted(wanted - carried))}")
    if carried - wanted:
        differs.append(f"it has {', '.join(sorted(carried - wanted))} too")
    for option, value in options.items():
        record = RECORDED.get(option, option.replace("-", "_"))
        found = recorded.get(record, "").rstrip(",")
        if found.lower() != value.lower():
            differs.append(f"{option} was {found or 'not set'}, shall be {value}")
    if recorded.get("reuse_key") == "True" and "reuse-key" not in options:
        differs.append("its key was kept at renewals, and shall not be")
    return differs


def certbot_ask(config, options, host_names, name="xmpp", trust=None, timeout=1200):
    """
    Have certbot ask the authority for a certificate, and run the deploy hook that is in ``config``.

    config
        The file with what certbot is told: names, challenge, credentials, authority. Nothing of it
        is on the command line.

    options
        Those of :func:`certbot_differs`; they are in it, too.

    host_names
        The list of names that are in it; what certbot has then must carry them.

    name
        certbot's name of it. Default: xmpp

    trust
        A PEM file of the authorities that certbot trusts when it talks to the ACME server. Default: the system's

    timeout
        How long it may take. (seconds, default 1200)

    Returns what :func:`xmpp.certificate_info <xmpp_certificate.certificate_info>` does.

    Raises ``CommandExecutionError`` with certbot's own reason and what to do; what was there is as it was.

    Source: certbot(1), RFC 8555.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certbot_ask /root/certbot.ini '{key-type: ecdsa, authenticator: standalone}' '[example.org]'
    """
    recorded = certbot_lineage(name)
    command = ["certbot", "certonly", "--non-interactive", "--config", config, "--renew-with-new-domains"]
    if recorded:
        # What is changed must be tried now: a setting that is first used at the next renewal fails at night.
        command.append("--force-renewal")
        if "reuse-key" in options and recorded.get("key_type") != options.get("key-type"):
            command.append("--new-key")
        if "reuse-key" not in options:
            command.append("--no-reuse-key")
    environment = {"LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    if trust:
        environment["REQUESTS_CA_BUNDLE"] = trust
    logged = os.path.getsize(LOG) if os.path.exists(LOG) else 0
    done = __salt__["cmd.run_all"](
        command, python_shell=False, env=environment, timeout=timeout, output_loglevel="quiet", ignore_retcode=True
    )
    if done["retcode"]:
        reason = _reason(f"{done['stdout']}\n{done['stderr']}")
        if "can't set attribute" in reason:
            # certbot 2.1 under Python 3.11 stumbles over the error itself; the authority's words are in its log alone.
            reason = _logged(logged) or reason
        raise CommandExecutionError(f"certbot: {reason}\nWhat to do: {_advice(reason)}")
    return __salt__["xmpp.certificate_info"](
        f"{HOME}/live/{name}/fullchain.pem", f"{HOME}/live/{name}/privkey.pem", host_names
    )


def _reason(text):
    """What certbot said, without what it says always."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(IDLE)]
    return "\n".join(dict.fromkeys(lines))[-2000:] or "it says nothing"


def _logged(start):
    """What the authority answered last, by what certbot has logged from ``start`` on."""
    with open(LOG, encoding="utf-8", errors="replace") as log:
        log.seek(start if os.path.getsize(LOG) >= start else 0)
        found = re.findall(r"^acme\.messages\.Error: (.+)$", log.read(), re.MULTILINE)
    return found[-1] if found else None


def _advice(reason):
    return next((advice for pattern, advice in ADVICE if re.search(pattern, reason)), ELSE)
