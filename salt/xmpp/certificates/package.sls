{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
{%- if plan.tls.source == 'letsencrypt' %}
  - xmpp.certbot.package
{%- endif %}

certificates_packages:
  xmpp.installed:
    - pkgs:
      - cron
