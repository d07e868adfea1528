{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.ejabberd

accounts_admin:
  ejabberd.user_present:
    - name: {{ plan.admin }}
    - password_file: {{ plan.paths.secrets }}/admin_password
    - require: &running
      - ejabberd: ejabberd_running
{%- for jid, user in plan.users | dictsort %}

{{ jid }}:
{%- if user.present %}
  ejabberd.user_present:
    - password_pillar: xmpp:users:{{ jid }}:password
{%- else %}
  ejabberd.user_absent:
{%- endif %}
    - require: *running
{%- endfor %}
{%- for jid, options in plan.rooms | dictsort %}

{{ jid }}:
  ejabberd.room_present:
    - options: {{ options | json }}
    - require: *running
{%- endfor %}
