{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
{%- if plan.packages.suite %}

# The mirror that the machine already uses has a newer ejabberd in another suite: that, and what it needs, from there.
ejabberd_source:
  xmpp.source:
    - name: /etc/apt/sources.list.d/xmpp.sources
    - suite: {{ plan.packages.suite }}
    - codename: {{ plan.packages.codename }}
    - require_in:
      - xmpp: ejabberd_packages

ejabberd_pin:
  file.managed:
    - name: /etc/apt/preferences.d/xmpp
    - contents: |
        Package: ejabberd ejabberd-contrib erlang-*
        Pin: release n={{ plan.packages.suite }}
        Pin-Priority: 500
    - require_in:
      - xmpp: ejabberd_packages
{%- endif %}

# Erlang's port mapper is not used (ERL_DIST_PORT), but Debian's unit brings it up: on loopback only.
ejabberd_epmd_loopback:
  file.managed:
    - name: /etc/systemd/system/epmd.socket.d/xmpp.conf
    - contents: |
        [Socket]
        ListenStream=
        ListenStream=127.0.0.1:4369
    - makedirs: True

ejabberd_unit:
  file.managed:
    - name: /etc/systemd/system/ejabberd.service.d/xmpp.conf
    - source: salt://xmpp/ejabberd/files/unit.conf
    - makedirs: True

ejabberd_packages:
  xmpp.installed:
    - pkgs:
      - ejabberd
      - erlang-p1-pgsql    # only suggested by ejabberd: without it there is no SQL
    - hold:
      - ejabberd
      - erlang-base        # a running Erlang loads code from disk, which must not change under it
      - erlang-p1-pgsql
    - minimum:
        ejabberd: '24.12'
    - disable:
      - ejabberd
    - require:
      - file: ejabberd_epmd_loopback
      - file: ejabberd_unit
