# Messages do not stay longer than the pillar says. Files are ejabberd's own business (mod_http_upload_quota).
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.retention.package

retention_archive:
{%- if plan.ejabberd.archive.days %}
  file.managed:
    - name: /etc/cron.d/xmpp-retention
    - contents: |
        # Managed by Salt (xmpp.retention)
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
        41 3 * * * root ejabberdctl --no-timeout delete_old_mam_messages all {{ plan.ejabberd.archive.days }} >/dev/null
    - require:
      - xmpp: retention_packages
{%- else %}
  file.absent:
    - name: /etc/cron.d/xmpp-retention
{%- endif %}

retention_cron:
  service.running:
    - name: cron
    - enable: True
    - require:
      - xmpp: retention_packages
