{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.certificates
  - xmpp.ejabberd.package

ejabberd_certificate:
  xmpp.certificate:
    - name: {{ plan.paths.ejabberd_certificate }}
    - certificate: {{ plan.tls.certificate }}
    - key: {{ plan.tls.key }}
    - host_names: {{ plan.tls.required | json }}
{%- if plan.tls.source == 'letsencrypt' %}
    - fallback_certificate: {{ plan.paths.internal_certificate }}
    - fallback_key: {{ plan.paths.internal_key }}
{%- endif %}
    - group: ejabberd
    - require:
      - sls: xmpp.certificates{{ '.internal' if plan.tls.source == 'letsencrypt' }}
      - xmpp: ejabberd_packages

# A new certificate is a reload: connected clients stay, new ones see it.
ejabberd_running:
  ejabberd.running:
    - name: ejabberd
    - node: {{ plan.ejabberd.node }}
    - watch:
      - xmpp: ejabberd_certificate
