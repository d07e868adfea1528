{%- from 'xmpp/map.jinja' import plan with context %}
# What came along while this run was rendered is found by a fresh loader only.
xmpp_modules:
  xmpp.loaded:
    - order: first
    - reload_modules: True
{%- if not plan.init.systemd and not plan.init.scripts %}

# A bare container has no `runlevel`, which Salt asks before it looks at an init script.
xmpp_init_scripts:
  xmpp.installed:
    - pkgs:
      - sysvinit-core
    - order: 2
{%- endif %}
