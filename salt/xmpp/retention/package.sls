include:
  - xmpp.modules

retention_packages:
  xmpp.installed:
    - pkgs:
      - cron
