{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules

certbot_packages:
  xmpp.installed:
    - pkgs:
      - certbot
{%- if plan.tls.letsencrypt.package %}
      - {{ plan.tls.letsencrypt.package }}
{%- endif %}
