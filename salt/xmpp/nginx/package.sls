{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules

nginx_restart_on_failure:
  file.managed:
    - name: /etc/systemd/system/nginx.service.d/xmpp.conf
    - source: salt://xmpp/nginx/files/restart.conf
    - makedirs: True

nginx_packages:
  xmpp.installed:
    - pkgs:
      - nginx
      - libnginx-mod-stream
    - disable:
      - nginx

# The page of the package just installed would answer for every name that is not ours.
nginx_default_site:
  file.absent:
    - name: /etc/nginx/sites-enabled/default
    - onchanges:
      - xmpp: nginx_packages
