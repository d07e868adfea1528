{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules

{{ plan.paths.secrets }}/admin_password:
  xmpp.secret:
    - contents_pillar: xmpp:secrets:admin_password
    - make: password

{{ plan.paths.secrets }}/erlang_cookie:
  xmpp.secret:
    - contents_pillar: xmpp:secrets:erlang_cookie
    - make: cookie

{{ plan.paths.secrets }}/api_token:
  xmpp.secret:
    - make: token
