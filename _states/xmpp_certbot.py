"""
The state of a certificate that an ACME authority gives
=======================================================
"""

from salt.exceptions import CommandExecutionError

__virtualname__ = "xmpp"


def __virtual__():
    return __virtualname__


def certbot(name, config, options, host_names, trust=None, copies=None):
    """
    certbot has a certificate for these names, asked for in this way, and so can renew it; what serves has it, too.

    The authority is asked when there is none, or when names or settings differ from those that certbot has recorded.
    That it ends some day is no change: certbot's own timer renews it.

    name
        certbot's name of the certificate.

    config
        The file with what certbot is told. See :func:`xmpp.certbot_ask <xmpp_certbot.certbot_ask>`.

    options
        Those of certbot's options, by their long names, that make out how it is asked for, now and at each renewal.

    host_names
        The names that it shall have.

    trust
        A PEM file of the authorities that certbot trusts when it talks to the ACME server. Default: the system's

    copies
        A list of maps ``name`` and ``group``: what the deploy hook replaces. Default: none

    .. code-block:: yaml

        xmpp:
          xmpp.certbot:
            - config: /etc/salt/xmpp/secrets/certbot.ini
            - options: {key-type: ecdsa, authenticator: webroot, webroot-path: /var/www/acme}
            - host_names: [example.org, conference.example.org]
    """
    ret = {"name": name, "changes": {}, "result": True, "comment": "certbot has the certificate"}
    try:
        differs = __salt__["xmpp.certbot_differs"](options, host_names, name, trust)
        if not differs:
            return ret
        ret["changes"] = {name: "; ".join(differs)}
        if __opts__["test"]:
            ret.update(result=None, comment="The authority would be asked")
            return ret
        info = __salt__["xmpp.certbot_ask"](config, options, host_names, name, trust)
        left = __salt__["xmpp.certbot_differs"](options, host_names, name, trust)
        live = f"/etc/letsencrypt/live/{name}"
        behind = __salt__["xmpp.certificate_behind"](f"{live}/fullchain.pem", f"{live}/privkey.pem", copies or [])
    except CommandExecutionError as error:
        ret.update(result=False, changes={}, comment=f"{error}\nWhat is in service stays in service")
        return ret
    ret["changes"] = {name: {"asked because": "; ".join(differs), "sha256": info["sha256"]}}
    ret["comment"] = f"{info['issuer']} gave it, for {info['days_left']:.0f} days"
    if left:
        ret.update(result=False, comment=f"{ret['comment']}; but still {'; '.join(left)}: see certbot's log")
    if behind:
        advice = "see /var/log/letsencrypt/letsencrypt.log; apply xmpp.ejabberd.certificate and xmpp.nginx.certificate"
        ret.update(result=False, comment=f"{ret['comment']}; but {', '.join(behind)} has another one: {advice}")
    return ret
