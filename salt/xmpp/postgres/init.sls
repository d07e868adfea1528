{%- from 'xmpp/map.jinja' import plan with context %}
{%- set pg = plan.postgres %}
include:
  - xmpp.modules
  - xmpp.postgres.package

postgres_cluster:
  xmpp.postgres_cluster:
    - name: {{ pg.cluster }}
    - version: '{{ pg.version }}'
    - port: {{ pg.port }}
    - require:
      - xmpp: postgres_packages

postgres_config:
{%- if pg.settings %}
  file.managed:
    - name: /etc/postgresql/{{ pg.version }}/{{ pg.cluster }}/conf.d/xmpp.conf
    - source: salt://xmpp/postgres/files/xmpp.conf
    - template: jinja
    - context:
        settings: {{ pg.settings | json }}
    - user: postgres
    - group: postgres
    - mode: '0644'
    - makedirs: True
    # PostgreSQL itself has read it before the running one is restarted with it.
    - check_cmd: >-
        sh -c 'exec runuser --user=postgres -- /usr/lib/postgresql/{{ pg.version }}/bin/postgres -C max_connections
        -D /var/lib/postgresql/{{ pg.version }}/{{ pg.cluster }} --config-file="$0"'
{%- else %}
  file.absent:
    - name: /etc/postgresql/{{ pg.version }}/{{ pg.cluster }}/conf.d/xmpp.conf
{%- endif %}
    - require:
      - xmpp: postgres_cluster

postgres_service:
  service.running:
    - name: {{ pg.service }}
    - enable: True
    - watch:
      - file: postgres_config

{%- if opts['test'] and not salt['cmd.which']('psql') %}

# Salt has its states of PostgreSQL where PostgreSQL is: on a bare machine, test mode can tell this much.
{%- for name in ('role', 'database') %}

postgres_{{ name }}:
  test.configurable_test_state:
    - name: {{ pg.user if name == 'role' else pg.database }}
    - changes: True
    - result: True
    - comment: The {{ name }} would be created
    - require:
      - service: postgres_service
{%- endfor %}
{%- else %}

postgres_role:
  postgres_user.present:
    - name: {{ pg.user }}
    - login: True
    - user: postgres
    - db_port: {{ pg.port }}
    - require:
      - service: postgres_service

postgres_database:
  postgres_database.present:
    - name: {{ pg.database }}
    - owner: {{ pg.user }}
    - encoding: UTF8
    - lc_collate: C.UTF-8
    - lc_ctype: C.UTF-8
    - template: template0
    - user: postgres
    - db_port: {{ pg.port }}
    - require:
      - postgres_user: postgres_role
{%- endif %}
