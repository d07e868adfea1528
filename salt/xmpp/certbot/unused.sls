# A certificate that certbot was asked for earlier goes on being renewed, for the day when the pillar wants it again; but
# it is given to nobody.
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules

certbot_deploy:
  file.managed:
    - name: {{ plan.paths.certbot_deploy }}
    - contents: |
        #!/bin/sh
        # Managed by Salt (xmpp.certbot.unused): xmpp:tls:source is not letsencrypt.
    - mode: '0755'
    - create: False
