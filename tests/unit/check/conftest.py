"""A plan as ``xmpp.plan`` gives it, as far as the check and the DNS records read it."""

import pytest

from tests.unit.ejabberd.conftest import load  # noqa: F401


@pytest.fixture
def plan():
    node = {
        "minion": "xmpp1.example.org",
        "address": "192.0.2.10",
        "public_addresses": ["192.0.2.10", "2001:db8::10"],
        "roles": ["ejabberd", "nginx", "postgres"],
    }
    return {
        "node": "xmpp1.example.org",
        **node,
        "nodes": {"xmpp1.example.org": node},
        "domain": "example.org",
        "domains": ["example.org"],
        "services": {"muc": "conference", "proxy": "proxy", "pubsub": "pubsub", "upload": "upload"},
        "ports": {"http": 80, "https": 443, "c2s": 5222, "c2s_tls": 5223, "s2s": 5269, "stun": 3478},
        "paths": {"ca": "/nonexistent/ca.crt", "uploads": "/var/lib/xmpp/uploads"},
        "urls": {"websocket": "wss://example.org/ws", "bosh": "https://example.org/bosh"},
    }
