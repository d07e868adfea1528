{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.certificates
  - xmpp.nginx.package

nginx_certificate:
  xmpp.certificate:
    - name: {{ plan.paths.nginx_certificate }}
    - certificate: {{ plan.tls.certificate }}
    - key: {{ plan.tls.key }}
    - host_names: {{ plan.tls.required | json }}
{%- if plan.tls.source == 'letsencrypt' %}
    - fallback_certificate: {{ plan.paths.internal_certificate }}
    - fallback_key: {{ plan.paths.internal_key }}
{%- endif %}
    - require:
      - sls: xmpp.certificates{{ '.internal' if plan.tls.source == 'letsencrypt' }}
      - xmpp: nginx_packages
    - watch_in:
      - service: nginx_service

nginx_service:
  service.running:
    - name: nginx
    - enable: True
    - reload: True
