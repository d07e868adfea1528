"""The service of pillar.example as people on other machines use it."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import os
import xml.etree.ElementTree as ET

import aiohttp
import pytest
from slixmpp.exceptions import IqError, IqTimeout

from .clients import WAIT, WAYS, Stream, asynchronous
from .service import ADDRESSES, DOMAIN, SECRETS, USERS

JULIET, ROMEO = f"juliet@{DOMAIN}", f"romeo@{DOMAIN}"
MUC, UPLOAD = f"conference.{DOMAIN}", f"upload.{DOMAIN}"
TLS, SASL = "{urn:ietf:params:xml:ns:xmpp-tls}", "{urn:ietf:params:xml:ns:xmpp-sasl}"
FRAMING = "urn:ietf:params:xml:ns:xmpp-framing"
HTTPBIND = "http://jabber.org/protocol/httpbind"


def unique():
    """A text that nobody has sent before."""
    return os.urandom(8).hex()


# Logging in


@pytest.mark.parametrize("address", ADDRESSES, ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("way", WAYS)
@asynchronous
async def test_login(outside, way, address):
    async with outside.client("juliet", way=way, address=address) as client:
        assert client.boundjid.full == f"{JULIET}/phone"
        assert client.plugin["feature_mechanisms"].mech.name.startswith("SCRAM-SHA-256")


@asynchronous
async def test_the_administrator_logs_in_with_the_password_made_for_the_machine(outside, service):
    password = service.read(f"{SECRETS}/admin_password").strip()
    async with outside.client("admin", password=password) as client:
        assert client.boundjid.bare == f"admin@{DOMAIN}"


@asynchronous
async def test_a_wrong_password_is_refused(outside):
    with pytest.raises(PermissionError):
        async with outside.client("juliet", password="not hers"):
            pass


def test_nothing_before_tls(service):
    with Stream(5222) as stream:
        features = stream.open()
        assert [child.tag for child in features] == [f"{TLS}starttls"]
        assert features.find(f"{TLS}starttls/{TLS}required") is not None
        stream.send(f"<auth xmlns='{SASL[1:-1]}' mechanism='PLAIN'>{plain('juliet')}</auth>")
        answer = stream.receive()
        assert answer is None or answer.tag != f"{SASL}success"


def test_nobody_registers(outside):
    with Stream(5222) as stream:
        stream.starttls(outside.tls())
        features = stream.open()
        assert features.find(f"{SASL}mechanisms") is not None
        assert features.find("{http://jabber.org/features/iq-register}register") is None
        stream.send(
            "<iq type='set' id='1'><query xmlns='jabber:iq:register'>"
            "<username>tybalt</username><password>prince of cats</password></query></iq>"
        )
        answer = stream.receive()
        assert answer is None or not (answer.tag.endswith("}iq") and answer.get("type") == "result"), ET.tostring(
            answer
        )


# Messages


@asynchronous
async def test_a_message_arrives_and_is_in_both_archives(outside):
    body = unique()
    async with outside.client("juliet") as juliet, outside.client("romeo") as romeo:
        juliet.send_message(romeo.boundjid.bare, body, mtype="chat")
        message = await romeo.received()
        assert (message["from"], message["body"]) == (juliet.boundjid, body)
        for client, other in ((juliet, romeo), (romeo, juliet)):
            assert body in await archive(client, with_jid=other.boundjid.bare)


async def archive(client, jid=None, with_jid=None):
    """Return the bodies of the last messages in an archive (XEP-0313): the client's own, or ``jid``'s."""
    found = await client.plugin["xep_0313"].retrieve(
        jid=jid, with_jid=with_jid, rsm={"max": 10, "before": True}, timeout=WAIT
    )
    return [item["mam_result"]["forwarded"]["stanza"]["body"] for item in found["mam"]["results"]]


@asynchronous
async def test_a_message_waits_for_somebody_who_is_offline(outside):
    body = unique()
    async with outside.client("juliet") as juliet:
        juliet.send_message(ROMEO, body, mtype="chat")
        await juliet.plugin["xep_0030"].get_info(DOMAIN)
    async with outside.client("romeo", plugins=["xep_0203"]) as romeo:
        message = await romeo.received()
        assert message["body"] == body
        assert message["delay"]["stamp"]


@asynchronous
async def test_all_of_ones_clients_see_the_whole_conversation(outside):
    async with (
        outside.client("romeo", "phone") as phone,
        outside.client("romeo", "laptop") as laptop,
        outside.client("juliet") as juliet,
    ):
        await laptop.plugin["xep_0280"].enable()
        received, sent = asyncio.Queue(), asyncio.Queue()
        laptop.add_event_handler("carbon_received", received.put_nowait)
        laptop.add_event_handler("carbon_sent", sent.put_nowait)
        juliet.send_message(phone.boundjid.full, question := unique(), mtype="chat")
        carbon = await asyncio.wait_for(received.get(), WAIT)
        assert carbon["carbon_received"]["body"] == question
        phone.send_message(juliet.boundjid.full, answer := unique(), mtype="chat")
        carbon = await asyncio.wait_for(sent.get(), WAIT)
        assert carbon["carbon_sent"]["body"] == answer


@asynchronous
async def test_a_stream_that_was_cut_is_resumed_with_nothing_lost(outside):
    async with outside.client("juliet") as juliet, outside.client("romeo", plugins=["xep_0198"]) as romeo:
        assert romeo.plugin["xep_0198"].sm_id
        before = romeo.boundjid.full
        cut = asyncio.Event()
        romeo.add_event_handler("disconnected", lambda event: cut.set())
        romeo.transport.abort()
        await asyncio.wait_for(cut.wait(), WAIT)
        bodies = [unique() for _ in range(3)]
        for body in bodies:
            juliet.send_message(before, body, mtype="chat")
        resumed = asyncio.Event()
        romeo.add_event_handler("session_resumed", lambda event: resumed.set())
        await romeo.login(ADDRESSES[0], WAYS["STARTTLS"])
        assert resumed.is_set()
        assert romeo.boundjid.full == before
        assert [(await romeo.received())["body"] for _ in bodies] == bodies


@asynchronous
async def test_who_is_blocked_is_not_heard(outside):
    async with outside.client("juliet") as juliet, outside.client("romeo") as romeo:
        await juliet.plugin["xep_0191"].block(ROMEO)
        try:
            romeo.send_message(JULIET, unique(), mtype="chat")
            refused = await asyncio.wait_for(romeo.messages.get(), WAIT)
            assert refused["type"] == "error"
        finally:
            await juliet.plugin["xep_0191"].unblock(ROMEO)
        romeo.send_message(JULIET, body := unique(), mtype="chat")
        assert (await juliet.received())["body"] == body


# Rooms


@asynchronous
async def test_a_room_for_two_and_its_archive(outside):
    room, body = f"balcony-{unique()}@{MUC}", unique()
    async with outside.client("juliet") as juliet, outside.client("romeo") as romeo:
        await juliet.plugin["xep_0045"].join_muc_wait(room, "Juliet", timeout=WAIT)
        await juliet.ask(
            "set",
            "<query xmlns='http://jabber.org/protocol/muc#owner'><x xmlns='jabber:x:data' type='submit'/></query>",
            room,
        )
        await romeo.plugin["xep_0045"].join_muc_wait(room, "Romeo", timeout=WAIT)
        romeo.send_message(room, body, mtype="groupchat")
        for client in (juliet, romeo):
            message = await client.received()
            assert (message["from"], message["body"]) == (f"{room}/Romeo", body)
        assert body in await archive(juliet, jid=room)
        await juliet.ask("set", "<query xmlns='http://jabber.org/protocol/muc#owner'><destroy/></query>", room)


# What people keep on the server


@asynchronous
async def test_contacts_are_told_what_one_publishes(outside):
    async with outside.client("juliet") as juliet, outside.client("romeo", plugins=["xep_0118"]) as romeo:
        juliet.auto_authorize = romeo.auto_authorize = True
        juliet.auto_subscribe = romeo.auto_subscribe = True
        heard = asyncio.Queue()
        romeo.add_event_handler("user_tune_publish", heard.put_nowait)
        romeo.plugin["xep_0163"].add_interest("http://jabber.org/protocol/tune")
        await romeo.plugin["xep_0115"].update_caps()
        romeo.send_presence_subscription(JULIET)
        await juliet.wait_until("presence_subscribe", WAIT)
        # The server first has to ask Romeo's client what it wants to hear of (XEP-0115).
        for _ in range(5):
            await juliet.plugin["xep_0118"].publish_tune(title=(title := unique()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while (event := await heard.get())["pubsub_event"]["items"]["item"]["tune"]["title"] != title:
                        pass
                    break
        else:
            pytest.fail("Romeo heard nothing")
        assert event["from"].bare == JULIET
        juliet.del_roster_item(ROMEO)


@asynchronous
async def test_bookmarks_old_and_new_are_the_same(outside):
    room = f"garden-{unique()}@{MUC}"
    async with outside.client("juliet") as juliet, outside.client("romeo") as romeo:
        await juliet.ask(
            "set",
            "<pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='urn:xmpp:bookmarks:1'>"
            f"<item id='{room}'><conference xmlns='urn:xmpp:bookmarks:1' name='Garden' autojoin='true'/></item>"
            "</publish></pubsub>",
        )
        private = await juliet.ask(
            "get", "<query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query>"
        )
        assert room in str(private)
        # XEP-0223: they are nobody else's business.
        items = "<pubsub xmlns='http://jabber.org/protocol/pubsub'><items node='urn:xmpp:bookmarks:1'/></pubsub>"
        assert room in str(await juliet.ask("get", items, JULIET))
        with pytest.raises(IqError) as refused:
            await romeo.ask("get", items, JULIET)
        assert refused.value.condition in ("not-allowed", "forbidden", "item-not-found")
        retract = (
            "<pubsub xmlns='http://jabber.org/protocol/pubsub'>"
            f"<retract node='urn:xmpp:bookmarks:1' notify='true'><item id='{room}'/></retract></pubsub>"
        )
        await juliet.ask("set", retract)


@asynchronous
async def test_an_avatar_reaches_clients_that_only_know_vcards(outside):
    image = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
    )
    digest = hashlib.sha1(image).hexdigest()
    publish = (
        "<pubsub xmlns='http://jabber.org/protocol/pubsub'><publish node='urn:xmpp:avatar:{0}'>"
        "<item id='{1}'>{2}</item></publish></pubsub>"
    )
    async with outside.client("nurse") as nurse:
        data = f"<data xmlns='urn:xmpp:avatar:data'>{base64.b64encode(image).decode()}</data>"
        await nurse.ask("set", publish.format("data", digest, data))
        info = f"<info bytes='{len(image)}' id='{digest}' type='image/png' height='1' width='1'/>"
        metadata = f"<metadata xmlns='urn:xmpp:avatar:metadata'>{info}</metadata>"
        await nurse.ask("set", publish.format("metadata", digest, metadata))
        card = await nurse.ask("get", "<vCard xmlns='vcard-temp'/>", f"nurse@{DOMAIN}")
        binval = card.xml.find(".//{vcard-temp}BINVAL")
        assert binval is not None and base64.b64decode(binval.text) == image


@asynchronous
async def test_a_file_goes_up_and_comes_down_the_same(outside):
    content = os.urandom(300_000)
    async with outside.client("juliet") as juliet, web(outside) as session:
        slot = await juliet.plugin["xep_0363"].request_slot(
            UPLOAD, "letter.bin", len(content), "application/octet-stream"
        )
        put, get = slot["http_upload_slot"]["put"]["url"], slot["http_upload_slot"]["get"]["url"]
        assert put.startswith(f"https://{DOMAIN}/upload/")
        async with session.put(put, data=content) as answer:
            assert answer.status == 201, await answer.text()
        async with session.get(get) as answer:
            assert answer.status == 200
            assert await answer.read() == content
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
            assert "sandbox" in answer.headers["Content-Security-Policy"]
            assert "max-age" in answer.headers["Strict-Transport-Security"]
        # The slot is for this file, once.
        async with session.put(put, data=content) as answer:
            assert answer.status >= 400
        with pytest.raises(IqError) as refused:
            await juliet.plugin["xep_0363"].request_slot(
                UPLOAD, "wall.bin", 100 * 1024 * 1024 + 1, "application/octet-stream"
            )
        assert refused.value.condition == "not-acceptable"


def web(outside):
    """A web client that trusts the service's certificate authority."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=outside.tls()), timeout=aiohttp.ClientTimeout(WAIT))


# Browsers


def request(outside, path, method="GET", host=DOMAIN, plain=False, **headers):
    """Return the answer to one HTTP request, and its body."""
    if plain:
        connection = http.client.HTTPConnection(host, timeout=WAIT)
    else:
        connection = http.client.HTTPSConnection(host, context=outside.tls("http/1.1"), timeout=WAIT)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read().decode()


def test_host_meta_for_web_clients(outside):
    answer, body = request(outside, "/.well-known/host-meta.json", Origin="https://elsewhere.example.com")
    assert (answer.status, answer.getheader("Access-Control-Allow-Origin")) == (200, "*")
    in_json = {link["rel"]: link["href"] for link in json.loads(body)["links"]}
    answer, body = request(outside, "/.well-known/host-meta", Origin="https://elsewhere.example.com")
    assert (answer.status, answer.getheader("Access-Control-Allow-Origin")) == (200, "*")
    links = ET.fromstring(body).iter("{http://docs.oasis-open.org/ns/xri/xrd-1.0}Link")
    assert {link.get("rel"): link.get("href") for link in links} == in_json
    assert in_json == {
        "urn:xmpp:alt-connections:websocket": f"wss://{DOMAIN}/ws",
        "urn:xmpp:alt-connections:xbosh": f"https://{DOMAIN}/bosh",
    }


def plain(user):
    """The initial response of SASL PLAIN."""
    return base64.b64encode(f"\0{user}\0{USERS[f'{user}@{DOMAIN}']}".encode()).decode()


@asynchronous
async def test_websocket(outside):
    async with (
        web(outside) as session,
        outside.client("romeo") as romeo,
        session.ws_connect(f"wss://{DOMAIN}/ws", protocols=["xmpp"]) as socket,
    ):
        assert socket.protocol == "xmpp"

        async def say(text):
            await socket.send_str(text)
            return ET.fromstring((await socket.receive(timeout=WAIT)).data)

        async def start():
            opened = await say(f"<open xmlns='{FRAMING}' to='{DOMAIN}' version='1.0'/>")
            assert opened.tag == f"{{{FRAMING}}}open"
            return ET.fromstring((await socket.receive(timeout=WAIT)).data)

        features = await start()
        assert {mechanism.text for mechanism in features.iter(f"{SASL}mechanism")} >= {"SCRAM-SHA-256"}
        answer = await say(f"<auth xmlns='{SASL[1:-1]}' mechanism='PLAIN'>{plain('juliet')}</auth>")
        assert answer.tag == f"{SASL}success"
        await start()
        bound = await say(
            "<iq xmlns='jabber:client' type='set' id='1'>"
            "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>web</resource></bind></iq>"
        )
        assert bound.findtext(".//{*}jid") == f"{JULIET}/web"
        body = unique()
        await socket.send_str(f"<message xmlns='jabber:client' to='{ROMEO}' type='chat'><body>{body}</body></message>")
        message = await romeo.received()
        assert (message["from"], message["body"]) == (f"{JULIET}/web", body)


@asynchronous
async def test_bosh(outside):
    async with web(outside) as session, outside.client("romeo") as romeo:
        number = int.from_bytes(os.urandom(4))
        sid = ""

        async def say(inner="", **attributes):
            nonlocal number
            number += 1
            words = "".join(f" {name.replace('__', ':')}='{value}'" for name, value in attributes.items())
            text = f"<body xmlns='{HTTPBIND}' rid='{number}'{sid}{words} xmlns:xmpp='urn:xmpp:xbosh'>{inner}</body>"
            async with session.post(
                f"https://{DOMAIN}/bosh", data=text, headers={"Content-Type": "text/xml"}
            ) as answer:
                assert answer.status == 200, answer.status
                body = ET.fromstring(await answer.read())
                assert body.get("type") != "terminate", ET.tostring(body)
                return body

        body = await say(to=DOMAIN, wait=5, hold=1, ver="1.6", xmpp__version="1.0")
        sid = f" sid='{body.get('sid')}'"
        if body.find(f".//{SASL}mechanisms") is None:
            body = await say()
        assert body.find(f".//{SASL}mechanisms") is not None
        body = await say(f"<auth xmlns='{SASL[1:-1]}' mechanism='PLAIN'>{plain('juliet')}</auth>")
        assert body.find(f"{SASL}success") is not None
        await say(xmpp__restart="true", to=DOMAIN)
        body = await say(
            "<iq xmlns='jabber:client' type='set' id='1'>"
            "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>bosh</resource></bind></iq>"
        )
        assert body.findtext(".//{*}jid") == f"{JULIET}/bosh"
        text = unique()
        await say(
            f"<message xmlns='jabber:client' to='{ROMEO}' type='chat'><body>{text}</body></message>"
            "<presence xmlns='jabber:client'/>"
        )
        message = await romeo.received()
        assert (message["from"], message["body"]) == (f"{JULIET}/bosh", text)


def test_the_page_for_people(outside):
    answer, body = request(outside, "/")
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html")
    assert DOMAIN in body and "abuse@example.org" in body


@pytest.mark.parametrize("path", ["/", "/nothing-here", "/.well-known/host-meta"])
def test_what_browsers_are_told(outside, path):
    answer, _ = request(outside, path)
    expected = {
        "Strict-Transport-Security": "max-age=31536000",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    assert {name: answer.getheader(name) for name in expected} == expected
    assert "default-src 'none'" in answer.getheader("Content-Security-Policy")
    assert answer.getheader("Server") == "nginx", "the version of nginx is nobody's business"


@pytest.mark.parametrize("path", ["/", "/ws", "/upload/some/file"])
def test_plain_http_only_leads_to_https(outside, path):
    answer, _ = request(outside, path, plain=True)
    assert (answer.status, answer.getheader("Location")) == (301, f"https://{DOMAIN}{path}")


@pytest.mark.parametrize(
    "path",
    [
        "/admin",
        "/admin/",
        "//admin/",
        "/ADMIN/",
        "/%61dmin/",
        "/upload/../admin/",
        "/upload/..%2fadmin/",
        "/ws/admin/",
        "/bosh/../admin/",
    ],
)
def test_the_administration_is_closed(outside, service, path):
    inside = service.sh(
        "exec 3<>/dev/tcp/127.0.0.1/5280; printf 'GET /admin/ HTTP/1.0\\r\\nHost: example.org\\r\\n\\r\\n' >&3; "
        "head -1 <&3"
    ).stdout
    assert "401" in inside, "it is there, for those who are let in"
    answer, body = request(outside, path)
    assert answer.status in (400, 403, 404), (answer.status, body)
    assert "ejabberd" not in body.lower()


@pytest.mark.parametrize("path", ["/api/status", "/status", "/register/", "/oauth/token", "/xmlrpc", "/captcha"])
def test_no_other_way_into_ejabberd(outside, path):
    for method in ("GET", "POST"):
        answer, body = request(outside, path, method)
        assert answer.status in (403, 404, 405) and "ejabberd" not in body.lower(), (method, answer.status, body)


# What is promised (XEP-0479, 2023, servers, advanced: Core, Web, IM, Mobile, A/V). Web's own rows are above.

SERVER = {
    "XEP-0030 Service Discovery": "http://jabber.org/protocol/disco#info",
    "XEP-0191 Blocking Command": "urn:xmpp:blocking",
    "XEP-0054 vcard-temp": "vcard-temp",
    "XEP-0280 Message Carbons": "urn:xmpp:carbons:2",
    "XEP-0160 Offline Messages": "msgoffline",
    "XEP-0215 External Service Discovery": "urn:xmpp:extdisco:2",
}
ACCOUNT = {
    "XEP-0163 Personal Eventing Protocol": "http://jabber.org/protocol/pubsub#publish",
    "XEP-0223 Persistent Storage of Private Data": "http://jabber.org/protocol/pubsub#publish-options",
    "XEP-0313 Message Archive Management": "urn:xmpp:mam:2",
    "XEP-0357 Push Notifications": "urn:xmpp:push:0",
    "XEP-0398 User Avatar to vCard Conversion": "urn:xmpp:pep-vcard-conversion:0",
    "XEP-0402 PEP Native Bookmarks, conversion": "urn:xmpp:bookmarks-conversion:0",
    "XEP-0402 PEP Native Bookmarks, compatible": "urn:xmpp:bookmarks:1#compat",
    "XEP-0402 many items": "http://jabber.org/protocol/pubsub#multi-items",
}
ROOM = {
    "XEP-0045 Multi-User Chat": "http://jabber.org/protocol/muc",
    "XEP-0313 of rooms": "urn:xmpp:mam:2",
    "XEP-0359 Stable Stanza IDs": "urn:xmpp:sid:0",
}


async def disco(client, jid):
    """Return the features and identities of ``jid``."""
    info = await client.plugin["xep_0030"].get_info(jid, timeout=WAIT)
    return set(info["disco_info"]["features"]), {identity[:2] for identity in info["disco_info"]["identities"]}


@asynchronous
async def test_what_the_server_promises(outside):
    async with outside.client("juliet") as juliet:
        features, identities = await disco(juliet, DOMAIN)
        assert {name for name, feature in SERVER.items() if feature not in features} == set()
        assert ("server", "im") in identities
        assert await answers(juliet, "<ping xmlns='urn:xmpp:ping'/>", DOMAIN)
        features, identities = await disco(juliet, JULIET)
        assert {name for name, feature in ACCOUNT.items() if feature not in features} == set()
        assert ("pubsub", "pep") in identities
        items = await juliet.plugin["xep_0030"].get_items(DOMAIN, timeout=WAIT)
        assert {str(item[0]) for item in items["disco_items"]["items"]} >= {MUC, UPLOAD, f"pubsub.{DOMAIN}"}
        assert "urn:xmpp:http:upload:0" in (await disco(juliet, UPLOAD))[0]
        assert "http://jabber.org/protocol/muc" in (await disco(juliet, MUC))[0]


@asynchronous
async def test_what_a_room_promises(outside):
    room = f"room-{unique()}@{MUC}"
    async with outside.client("juliet") as juliet:
        await juliet.plugin["xep_0045"].join_muc_wait(room, "Juliet", timeout=WAIT)
        features, _ = await disco(juliet, room)
        assert {name for name, feature in ROOM.items() if feature not in features} == set()
        # XEP-0410: who is in the room is answered, who is not any more is told so.
        assert await answers(juliet, "<ping xmlns='urn:xmpp:ping'/>", f"{room}/Juliet")
        juliet.plugin["xep_0045"].leave_muc(room, "Juliet")
        with pytest.raises(IqError) as refused:
            await juliet.ask("get", "<ping xmlns='urn:xmpp:ping'/>", f"{room}/Juliet")
        assert refused.value.condition in ("not-acceptable", "item-not-found")


async def answers(client, payload, to):
    """Return whether ``to`` answers the question ``payload`` without an error."""
    try:
        return (await client.ask("get", payload, to))["type"] == "result"
    except (IqError, IqTimeout):
        return False


STREAM = {
    "RFC 6120 resource binding": "{urn:ietf:params:xml:ns:xmpp-bind}bind",
    "RFC 6121 roster versioning": "{urn:xmpp:features:rosterver}ver",
    "XEP-0115 Entity Capabilities": "{http://jabber.org/protocol/caps}c",
    "XEP-0198 Stream Management": "{urn:xmpp:sm:3}sm",
    "XEP-0352 Client State Indication": "{urn:xmpp:csi:0}csi",
}


def test_what_a_stream_promises(outside):
    with Stream(5223, tls=outside.tls("xmpp-client")) as stream:
        mechanisms = {mechanism.text for mechanism in stream.open().iter(f"{SASL}mechanism")}
        assert mechanisms >= {"SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"}
        assert not mechanisms & {"ANONYMOUS", "DIGEST-MD5", "X-OAUTH2"}
        stream.send(f"<auth xmlns='{SASL[1:-1]}' mechanism='PLAIN'>{plain('juliet')}</auth>")
        assert stream.receive().tag == f"{SASL}success"
        tags = {child.tag for child in stream.open()}
        assert {name for name, tag in STREAM.items() if tag not in tags} == set()


@asynchronous
async def test_whom_to_write_to(outside):
    async with outside.client("juliet") as juliet:
        info = await juliet.plugin["xep_0030"].get_info(DOMAIN, timeout=WAIT)
        form = info.xml.find(".//{jabber:x:data}x[@type='result']")
        fields = {field.get("var"): [value.text for value in field] for field in form}
        assert fields["FORM_TYPE"] == ["http://jabber.org/network/serverinfo"]
        assert fields["abuse-addresses"] == ["mailto:abuse@example.org"]
        assert fields["support-addresses"] == ["mailto:support@example.org"]


# Other servers


def test_other_servers_have_to_use_tls(outside):
    more = "xmlns:db='jabber:server:dialback' from='example.com'"
    with Stream(5269, "jabber:server", more=more) as stream:
        features = stream.open()
        assert features.find(f"{TLS}starttls/{TLS}required") is not None
        stream.send(f"<db:result from='example.com' to='{DOMAIN}'>0123456789abcdef</db:result>")
        answer = stream.receive()
        assert answer.tag == "{http://etherx.jabber.org/streams}error", ET.tostring(answer)
        assert answer.find("{urn:ietf:params:xml:ns:xmpp-streams}policy-violation") is not None
    with Stream(5269, "jabber:server", more=more) as stream:
        stream.starttls(outside.tls())
        names = {name for _, name in stream.socket.getpeercert()["subjectAltName"]}
        assert names == {DOMAIN, *(f"{label}.{DOMAIN}" for label in ("conference", "proxy", "pubsub", "upload"))}
        assert stream.open().tag == "{http://etherx.jabber.org/streams}features"
