# A certificate authority of this machine's own, and the certificate that it gives to the service.
{%- from 'xmpp/map.jinja' import plan with context %}
include:
  - xmpp.modules
  - xmpp.certificates.renewal

certificates_ca_key:
  x509.private_key_managed:
    - name: {{ plan.paths.ca_key }}
    - algo: ec
    - keysize: 384
    - mode: '0600'
    - makedirs: True
    - dir_mode: '0700'

certificates_ca:
  x509.certificate_managed:
    - name: {{ plan.paths.ca }}
    - signing_private_key: {{ plan.paths.ca_key }}
    - CN: {{ plan.domain }} internal CA
    - basicConstraints: critical, CA:true, pathlen:0
    - keyUsage: critical, keyCertSign, cRLSign
    - subjectKeyIdentifier: hash
    - days_valid: 7300
    - days_remaining: 0
    - mode: '0644'
    - makedirs: True
    - require:
      - x509: certificates_ca_key

certificates_key:
  x509.private_key_managed:
    - name: {{ plan.paths.internal_key }}
    - algo: ec
    - mode: '0600'
    - makedirs: True
    - dir_mode: '0700'

certificates_server:
  x509.certificate_managed:
    - name: {{ plan.paths.internal_certificate }}
    - private_key: {{ plan.paths.internal_key }}
    - signing_private_key: {{ plan.paths.ca_key }}
    - signing_cert: {{ plan.paths.ca }}
    - CN: {{ plan.domain }}
    - subjectAltName: {{ plan.tls.names | map('regex_replace', '^', 'dns:') | list | json }}
    - basicConstraints: critical, CA:false
    - keyUsage: critical, digitalSignature
    - extendedKeyUsage: serverAuth, clientAuth
    - subjectKeyIdentifier: hash
    - authorityKeyIdentifier: keyid
    - append_certs:
      - {{ plan.paths.ca }}
    - days_valid: {{ plan.tls.days }}
    - days_remaining: {{ plan.tls.days // 3 }}
    - mode: '0644'
    - makedirs: True
    - require:
      - x509: certificates_ca
      - x509: certificates_key
