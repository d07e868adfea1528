{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.secrets
  - xmpp.postgres
  - xmpp.ejabberd.package
  - xmpp.ejabberd.certificate

# The database of a node (Mnesia) belongs to the node's name for ever: name and cookie are there before the first start.
ejabberd_node:
  file.managed:
    - name: /etc/default/ejabberd
    - source: salt://xmpp/ejabberd/files/ejabberdctl.cfg
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - require:
      - xmpp: ejabberd_packages

ejabberd_nodes:
  file.managed:
    - name: /etc/ejabberd/inetrc
    - source: salt://xmpp/ejabberd/files/inetrc
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - require:
      - xmpp: ejabberd_packages

ejabberd_cookie:
  file.managed:
    - name: /var/lib/ejabberd/.erlang.cookie
{%- if opts['test'] and not salt['file.file_exists'](plan.paths.secrets ~ '/erlang_cookie') %}
    - contents: the one that would be made
{%- else %}
    - source: {{ plan.paths.secrets }}/erlang_cookie
{%- endif %}
    - user: ejabberd
    - group: ejabberd
    - mode: '0400'
    - show_changes: False
    - require:
      - xmpp: {{ plan.paths.secrets }}/erlang_cookie
      - xmpp: ejabberd_packages

{%- if plan.init.systemd %}

# A port mapper that listens already has to let go of the world's address.
ejabberd_epmd_rebound:
  cmd.run:
    - name: systemctl daemon-reload && systemctl stop ejabberd.service epmd.service epmd.socket
    - require:
      - xmpp: ejabberd_packages
    - onchanges:
      - file: ejabberd_epmd_loopback
    - require_in:
      - ejabberd: ejabberd_spool
{%- endif %}

ejabberd_spool:
  ejabberd.spool:
    - name: /var/lib/ejabberd
    - node: {{ plan.ejabberd.node }}
    - require:
      - file: ejabberd_node

ejabberd_uploads:
  file.directory:
    - name: {{ plan.paths.uploads }}
    - user: ejabberd
    - group: ejabberd
    - mode: '0750'
    - makedirs: True
    - require:
      - xmpp: ejabberd_packages

# ejabberd itself has read it before the running server sees it.
ejabberd_config:
  ejabberd.config:
    - name: /etc/ejabberd/ejabberd.yml
    - source: salt://xmpp/ejabberd/files/ejabberd.yml
    - secrets:
        api_token: {{ plan.paths.secrets }}/api_token
    - require:
      - xmpp: {{ plan.paths.secrets }}/api_token
      - xmpp: ejabberd_certificate
      - file: ejabberd_uploads
      - file: ejabberd_cookie
      - ejabberd: ejabberd_spool

ejabberd_service:
  service.running:
    - name: ejabberd
    - enable: True
    - require:
      - ejabberd: ejabberd_config
      - postgres_database
    - watch:
      - file: ejabberd_node
      - file: ejabberd_nodes
      - file: ejabberd_cookie
    - require_in:
      - ejabberd: ejabberd_running
