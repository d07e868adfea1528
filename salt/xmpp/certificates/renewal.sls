# A certificate of the internal CA is renewed in the last third of its life, by the same states, every night. What an ACME
# authority refused is asked for again; what it gave is certbot's to renew, and seen to be in service.
{%- from 'xmpp/map.jinja' import plan with context %}
{%- set copies = plan.tls.copies | map(attribute='service') | map('regex_replace', '^(.*)$', 'xmpp.\\1.certificate') | join(',') %}
include:
  - xmpp.modules
  - xmpp.certificates.package

certificates_renewal:
  file.managed:
    - name: /etc/cron.d/xmpp-certificates
    - contents: |
        # Managed by Salt (xmpp.certificates.renewal)
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
        23 4 * * * root {{ plan.salt_call }} state.apply {{ copies or 'xmpp.certificates' }} --log-level=error >/dev/null
    - require:
      - xmpp: certificates_packages
