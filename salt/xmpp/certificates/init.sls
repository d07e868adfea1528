# Where certificate and key come from. The programs have their own copies: xmpp.ejabberd and xmpp.nginx make them.
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.certificates.package
  - xmpp.certificates.{{ plan.tls.source }}
{%- if plan.tls.source != 'letsencrypt' %}
  - xmpp.certbot.unused
{%- endif %}
