{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.nginx.package
  - xmpp.nginx.certificate

nginx_check:
  file.managed:
    - name: /usr/local/lib/xmpp/nginx-check
    - source: salt://xmpp/nginx/files/nginx-check
    - mode: '0755'
    - makedirs: True

nginx_page:
  file.managed:
    - name: /var/www/xmpp/index.html
    - source: salt://xmpp/nginx/files/index.html
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - makedirs: True

nginx_acme_webroot:
  file.directory:
    - name: {{ plan.paths.acme_webroot }}
    - makedirs: True

# One place tells XMPP from HTTPS on port 443; the other serves HTTP. nginx has read each, with all others, before it is in place.
nginx_stream:
  file.managed:
    - name: /etc/nginx/modules-enabled/90-xmpp-stream.conf
    - source: salt://xmpp/nginx/files/stream.conf
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - check_cmd: /usr/local/lib/xmpp/nginx-check modules-enabled/90-xmpp-stream.conf
    - require: &before
      - file: nginx_check
      - file: nginx_page
      - xmpp: nginx_certificate
    - watch_in: &reload
      - service: nginx_service

nginx_http:
  file.managed:
    - name: /etc/nginx/conf.d/xmpp.conf
    - source: salt://xmpp/nginx/files/http.conf
    - template: jinja
    - context:
        plan: {{ plan | json }}
    - check_cmd: /usr/local/lib/xmpp/nginx-check conf.d/xmpp.conf
    - require: *before
    - watch_in: *reload
