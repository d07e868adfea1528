{%- from 'xmpp/map.jinja' import plan with context %}
{%- set asked = plan.tls.letsencrypt %}
include:
  - xmpp.modules
  - xmpp.certbot.package
{%- if asked.challenge == 'http' %}
  - xmpp.nginx
{%- endif %}

# What certbot is told stands in files: a command line is seen by everybody.
certbot_config:
  file.managed:
    - name: {{ plan.paths.certbot_config }}
    - source: salt://xmpp/certbot/files/certbot.ini
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - user: root
    - mode: '0600'
    - makedirs: True
    - dir_mode: '0700'
    - show_changes: False
{%- if asked.credentials %}

certbot_credentials:
  file.managed:
    - name: {{ plan.paths.certbot_credentials }}
    - source: salt://xmpp/certbot/files/credentials.ini
    - template: jinja
    - context:
        asked: {{ asked | json }}
    - user: root
    - mode: '0600'
    - makedirs: True
    - dir_mode: '0700'
    - show_changes: False
    - require_in:
      - xmpp: certbot_certificate
{%- endif %}

certbot_deploy:
  file.managed:
    - name: {{ plan.paths.certbot_deploy }}
    - source: salt://xmpp/certbot/files/deploy
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - mode: '0755'
    - makedirs: True
{%- if asked.trust %}

# An authority of one's own: certbot's library takes one file, so that has the system's authorities, too.
certbot_trust:
  file.managed:
    - name: {{ asked.trust }}
    - source: salt://xmpp/certbot/files/trust.crt
    - template: jinja
    - mode: '0644'
    - makedirs: True
    - show_changes: False
    - require:
      - xmpp: certbot_packages
    - require_in:
      - xmpp: certbot_certificate
{%- endif %}

certbot_timer_environment:
{%- if plan.init.systemd %}
  file.{{ 'managed' if asked.trust else 'absent' }}:
    - name: /etc/systemd/system/certbot.service.d/xmpp.conf
{%- if asked.trust %}
    - contents: |
        # Managed by Salt (xmpp.certbot)
        [Service]
        Environment=REQUESTS_CA_BUNDLE={{ asked.trust }}
    - makedirs: True
{%- endif %}

certbot_timer_reload:
  cmd.run:
    - name: systemctl daemon-reload
    - onchanges:
      - file: certbot_timer_environment
{%- else %}
  file.replace:
    - name: /etc/cron.d/certbot
    - ignore_if_missing: {{ opts['test'] }}
    - pattern: '^PATH=.*\n(REQUESTS_CA_BUNDLE=.*\n)?'
    - repl: |
        PATH=/usr/local/sbin:/usr/local/bin:/sbin:/bin:/usr/sbin:/usr/bin
{%- if asked.trust %}
        REQUESTS_CA_BUNDLE={{ asked.trust }}
{%- endif %}
    - require:
      - xmpp: certbot_packages
{%- endif %}

# certbot's own: twice a day it renews what is in the last third of its life.
certbot_timer:
  service.running:
    - name: {{ 'certbot.timer' if plan.init.systemd else 'cron' }}
    - enable: True
    - require:
      - xmpp: certbot_packages

# After everything else: ejabberd and nginx serve already, and what the authority says is in nobody's way.
certbot_certificate:
  xmpp.certbot:
    - name: xmpp
    - config: {{ plan.paths.certbot_config }}
    - host_names: {{ plan.tls.names | json }}
    - options: {{ asked.options | json }}
    - trust: {{ asked.trust | json }}
    - copies: {{ plan.tls.copies | json }}
    - order: last
    - require:
      - xmpp: certbot_packages
      - file: certbot_config
      - file: certbot_deploy
