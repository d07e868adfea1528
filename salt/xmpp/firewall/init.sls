# A table of our own, loaded by a unit of our own: the machine's other rules, and what loads them, are not ours to touch.
{%- from 'xmpp/map.jinja' import plan with context %}
{%- set rules = '/etc/nftables.d/xmpp.nft' %}
{%- set unit = '/etc/systemd/system/xmpp-firewall.service' %}
{%- set drop_in = '/etc/systemd/system/nftables.service.d/xmpp.conf' %}
include:
  - xmpp.modules
  - xmpp.firewall.package
{%- if plan.firewall.enabled %}

firewall_rules:
  file.managed:
    - name: {{ rules }}
    - source: salt://xmpp/firewall/files/xmpp.nft
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - makedirs: True
    - check_cmd: nft --check --file
    - require:
      - xmpp: firewall_packages

firewall_unit:
  file.managed:
    - name: {{ unit }}
    - source: salt://xmpp/firewall/files/xmpp-firewall.service
    - require:
      - file: firewall_rules

# Debian's own service begins by flushing every table, ours too.
firewall_after_flush:
  file.managed:
    - name: {{ drop_in }}
    - contents: |
        [Service]
        ExecStartPost=-/usr/sbin/nft --file {{ rules }}
        ExecReload=-/usr/sbin/nft --file {{ rules }}
    - makedirs: True
    - require:
      - file: firewall_rules

firewall_loaded:
  service.running:
    - name: xmpp-firewall
    - enable: True
    - reload: True
    - require:
      - file: firewall_unit
      - file: firewall_after_flush
    - watch:
      - file: firewall_rules
{%- else %}
{%- if salt['file.file_exists'](unit) %}

firewall_unloaded:
  service.dead:
    - name: xmpp-firewall
    - enable: False
    - require_in:
      - file: firewall_off
{%- endif %}

firewall_off:
  file.absent:
    - names:
      - {{ unit }}
      - {{ drop_in }}
      - {{ rules }}
{%- endif %}
