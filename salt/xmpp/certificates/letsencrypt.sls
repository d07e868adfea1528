# The certificate of an ACME authority. Until it is there, the internal one serves: it is never in the way of a first boot.
include:
  - xmpp.certificates.internal
  - xmpp.certbot
