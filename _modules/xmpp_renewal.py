"""
Who renews the certificate, and whether that works
===================================================
"""

import os
import re
import time

from salt.exceptions import CommandExecutionError

__virtualname__ = "xmpp"

NIGHTLY = "/etc/cron.d/xmpp-certificates"
CERTBOTS_CRON = "/etc/cron.d/certbot"
CERTBOTS_LOG = "/var/log/letsencrypt/letsencrypt.log"
FAILURE = re.compile(
    r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+:ERROR:\S+:Failed to renew certificate xmpp with error: (.*)", re.M
)
MOST = 2**20


def __virtual__():
    return __virtualname__


def certificate_renewal():
    """
    Tell who renews the certificate of this machine's service, and whether that works.

    Returns a dict:

    by
        ``certbot``, ``Salt`` or ``the operator``
    works
        ``True``; ``False`` when the next renewal will not come about, or the last one failed or was not given to the
        programs; ``None`` when that cannot be seen from here
    seen, do
        the same in words, and what to do, empty where there is nothing to do

    Raises ``SaltInvocationError`` for a wrong pillar.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.certificate_renewal
    """
    plan = __salt__["xmpp.plan"]()
    by, judge = {
        "letsencrypt": ("certbot", _certbot),
        "internal": ("Salt", _nightly),
        "files": ("the operator", lambda plan: (None, "renewed by whoever puts the files there", "")),
    }[plan["tls"]["source"]]
    works, seen, do = judge(plan)
    return {"by": by, "works": works, "seen": seen, "do": do}


def status():
    """
    Tell in short how this machine's part of the service stands. Nothing is tried: that is :func:`xmpp.check`.

    Returns a dict: ``node``, ``domain``, ``services`` (which of the machine's programs run: name to boolean), and
    ``certificate``: ``source``, ``issuer``, ``names``, ``days_left`` (float; these three ``None`` when there is no
    certificate that can be used, and ``seen`` tells why), ``renewed_by``, ``renewal_works``, ``seen``, ``do``.

    Raises ``SaltInvocationError`` for a wrong pillar.

    CLI Example:

    .. code-block:: bash

        salt '*' xmpp.status
    """
    plan = __salt__["xmpp.plan"]()
    tls = plan["tls"]
    renewal = certificate_renewal()
    served = next((copy["name"] for copy in tls["copies"] if os.path.exists(copy["name"])), tls["certificate"])
    try:
        info = __salt__["xmpp.certificate_info"](served)
    except CommandExecutionError as error:
        info, renewal["seen"] = {}, f"{error}; {renewal['seen']}"
    services = {"ejabberd": "ejabberd", "nginx": "nginx", "postgres": plan["postgres"]["service"]}
    return {
        "node": plan["node"],
        "domain": plan["domain"],
        "services": {role: __salt__["service.status"](services[role]) for role in plan["roles"]},
        "certificate": {
            "source": tls["source"],
            **{key: info.get(key) for key in ("issuer", "names", "days_left")},
            "renewed_by": renewal["by"],
            "renewal_works": renewal["works"],
            "seen": renewal["seen"],
            "do": renewal["do"],
        },
    }


def _nightly(plan):
    who = "renewed every night by Salt"
    if not os.path.exists(NIGHTLY):
        return False, f"{who}, but there is no {NIGHTLY}", "apply xmpp.certificates"
    if not __salt__["service.status"]("cron"):
        return False, f"{who}, but cron does not run", "start cron; apply xmpp.retention"
    return True, who, ""


def _certbot(plan):
    timer = "certbot.timer" if plan["init"]["systemd"] else "cron"
    who = f"renewed by certbot ({timer})"
    tls = plan["tls"]
    recorded = __salt__["xmpp.certbot_lineage"]()
    if not recorded:
        return (
            False,
            "certbot has no certificate yet, so that of the internal authority serves",
            "apply xmpp.certificates, and see what certbot_certificate says",
        )
    if recorded.get("autorenew") == "False":
        return False, f"{who}, but its record of it has autorenew = False", "remove that from it in /etc/letsencrypt"
    if not __salt__["service.status"](timer) or not (timer != "cron" or os.path.exists(CERTBOTS_CRON)):
        return False, f"{who}, but that does not run", "apply xmpp.certificates, which starts it"
    failure = _last_failure(tls["certificate"])
    if failure:
        return False, f"{who}; the last attempt failed: {failure}", f"see {CERTBOTS_LOG}, then apply xmpp.certificates"
    behind = __salt__["xmpp.certificate_behind"](tls["certificate"], tls["key"], tls["copies"])
    if behind:
        programs = ", ".join(f"xmpp.{copy['service']}.certificate" for copy in tls["copies"] if copy["name"] in behind)
        return False, f"{who}, but {', '.join(behind)} has another one than certbot", f"apply {programs}"
    return True, who, ""


def _last_failure(certificate):
    """Why certbot failed last to renew, when it has not done so since."""
    try:
        since = os.stat(certificate).st_mtime
        with open(CERTBOTS_LOG, "rb") as log:
            log.seek(max(0, os.stat(CERTBOTS_LOG).st_size - MOST))
            found = FAILURE.findall(log.read().decode(errors="replace"))
    except FileNotFoundError:
        return None
    if not found or time.mktime(time.strptime(found[-1][0], "%Y-%m-%d %H:%M:%S")) < since:
        return None
    return f"{found[-1][1][:300]} ({found[-1][0]})"
