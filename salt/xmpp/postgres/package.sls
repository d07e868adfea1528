{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules

# The cluster is made by xmpp.postgres, on the machine that will keep it.
postgres_no_cluster_by_package:
  file.managed:
    - name: /etc/postgresql-common/createcluster.d/xmpp.conf
    - contents: create_main_cluster = false
    - makedirs: True

postgres_restart_on_failure:
  file.managed:
    - name: /etc/systemd/system/postgresql@.service.d/xmpp.conf
    - source: salt://xmpp/postgres/files/restart.conf
    - makedirs: True

postgres_packages:
  xmpp.installed:
    - pkgs:
      - postgresql-{{ plan.postgres.version }}
    - reload_modules: True
    - require:
      - file: postgres_no_cluster_by_package
