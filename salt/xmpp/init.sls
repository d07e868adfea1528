# All of this machine's part. Each of these can be applied alone.
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.certificates
{%- if plan.roles %}
  - xmpp.postgres
  - xmpp.ejabberd
  - xmpp.nginx
  - xmpp.accounts
  - xmpp.retention
  - xmpp.firewall
{%- endif %}
