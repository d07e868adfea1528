"""Cloudflare's API, version 4, as far as certbot's own plugin asks it; its DNS records are written into bind9."""

import itertools
import json
import urllib.parse

from .acme import ZONES, Web

NAME = "api.cloudflare.com"
TOKEN = "TellNobodyThisToken_8sJw2Kq0Zr5Vb7Xn1Lc4Pd6"
EMAIL, KEY = "me@example.org", "7e11n0b0dyth15g10ba1key0c0ffee00c0ffee"


class Cloudflare:
    """The API; ``revoked``: no credentials are good; ``lost``: what it takes does not get into the DNS."""

    def __init__(self, lab, authority):
        self.revoked = self.lost = False
        self.asked = []
        self._authority, self._records, self._numbers = authority, {}, itertools.count(1)
        self._web = Web(lab, authority.ca, NAME, 443, self._answer)

    def close(self):
        """End it."""
        self._web.close()

    def pillar(self, token=TOKEN, **more):
        """Return ``xmpp:tls`` for a node whose zone is here."""
        cloudflare = {"propagation_seconds": 0, **({"api_token": token} if token else {})}
        tls = self._authority.pillar(challenge="cloudflare", cloudflare={**cloudflare, **more})
        tls["letsencrypt"].pop("rfc2136")
        return tls

    def _answer(self, handler, body):
        path, _, query = handler.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        self.asked.append(f"{handler.command} {path}")
        token = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        key = (handler.headers.get("X-Auth-Email"), handler.headers.get("X-Auth-Key")) == (EMAIL, KEY)
        if self.revoked or not (token or key):
            return self._error(403, 9109, "Invalid access token")
        match [handler.command, *path.removeprefix("/client/v4/").split("/")]:
            case ["GET", "zones"]:
                found = [zone for zone in ZONES if query.get("name") in (None, zone)]
                return self._result([{"id": self._id(zone), "name": zone} for zone in found])
            case ["POST", "zones", zone, "dns_records"]:
                return self._result(self._add(zone, json.loads(body)))
            case ["GET", "zones", zone, "dns_records"]:
                wanted = {key: value for key, value in query.items() if key in ("type", "name", "content")}
                fits = [r for r in self._records.values() if wanted.items() <= r.items()]
                return self._result(fits)
            case ["DELETE", "zones", zone, "dns_records", record]:
                gone = self._records.pop(record)
                self._update("delete", gone)
                return self._result({"id": record})
        return self._error(404, 7003, f"Could not route to {path}")

    def _add(self, zone, given):
        record = {**given, "id": f"record{next(self._numbers)}", "zone_id": zone}
        self._records[record["id"]] = record
        self._update("add", record)
        return record

    def _update(self, verb, record):
        if not self.lost:
            text = f'"{record["content"]}"'
            ttl = f" {record['ttl']}" if verb == "add" else ""
            self._authority.update(f"update {verb} {record['name']}{ttl} TXT {text}")

    @staticmethod
    def _id(zone):
        return f"zone-{zone}"

    @staticmethod
    def _result(result):
        return 200, {}, {"success": True, "errors": [], "messages": [], "result": result}

    @staticmethod
    def _error(status, code, message):
        errors = [{"code": code, "message": message}]
        return status, {}, {"success": False, "errors": errors, "messages": [], "result": None}
