# Certificate and key that the operator has: paths on this machine, or texts in the pillar.
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
{%- if plan.tls.key == plan.paths.given_key %}

{{ plan.tls.key }}:
  xmpp.secret:
    - contents_pillar: xmpp:tls:files:key
{%- endif %}
{%- if plan.tls.certificate == plan.paths.given_certificate %}

{{ plan.tls.certificate }}:
  file.managed:
    - contents_pillar: xmpp:tls:files:certificate
    - mode: '0644'
    - makedirs: True
{%- endif %}
