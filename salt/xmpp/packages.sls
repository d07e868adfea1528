# What is the same on every machine, and can be baked into an image. The rest is made where it will live: identity,
# secrets, keys, the database's cluster.
include:
  - xmpp.postgres.package
  - xmpp.certificates.package
  - xmpp.ejabberd.package
  - xmpp.nginx.package
  - xmpp.retention.package
  - xmpp.firewall.package
