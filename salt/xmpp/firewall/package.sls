{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
{%- if plan.firewall.enabled %}

firewall_packages:
  xmpp.installed:
    - pkgs:
      - nftables
{%- endif %}
