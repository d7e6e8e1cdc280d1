"""Notifications: what each service gets, where nothing is sent, what servers may do, and that no secret leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from srde.errors import ConfigError
from srde.monitor import webhook
from srde.monitor.notify import EVENTS, LONGEST_TEXT, QUEUE, Notifier, main, webhook_url_from
from srde.monitor.webhook import Webhook, is_public
from srde.monitor.webhook_formats import COLORS, Notification, clip, payload
from webhook_server import WebhookServer

TOKEN = "abcdefghijklmnopqrstuvwxyz-0123456789_ABCDEFGH"
PATHS = {
    "discord": ("discord.com", f"/api/webhooks/123456789012345678/{TOKEN}"),
    "slack": ("hooks.slack.com", f"/services/T00000000/B00000000/{TOKEN}"),
    "json": ("runs.example.org", f"/notify?token={TOKEN}"),
}
REAL_GETADDRINFO = socket.getaddrinfo


@pytest.fixture
def server():
    with WebhookServer() as one:
        yield one


@pytest.fixture
def names(monkeypatch):
    """Host name -> what it resolves to, one list of addresses per call; the last one stays. Counts the calls."""
    table: dict[str, list[list[str]]] = {}
    calls: list[str] = []

    def getaddrinfo(host, port, *args, **kwargs):
        calls.append(host)
        if host not in table:
            return REAL_GETADDRINFO(host, port, *args, **kwargs)
        addresses = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (
                family,
                socket.SOCK_STREAM,
                6,
                "",
                (address, port, 0, 0)[: 4 if family == socket.AF_INET6 else 2],
            )
            for family, address in zip(families, addresses, strict=True)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    table_and_calls = type("Names", (), {"table": table, "calls": calls})
    for host, _ in PATHS.values():
        table[host] = [["127.0.0.1"]]
    return table_and_calls


@pytest.fixture
def raw():
    """Starts servers of one function that gets each connection; `connected` is set at the first."""
    sockets = []

    def start(behave):
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)
        connected = threading.Event()

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                sockets.append(connection)
                connected.set()
                threading.Thread(target=guarded, args=(connection,), daemon=True).start()

        def guarded(connection):
            with contextlib.suppress(OSError):  # the client has gone
                behave(connection)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}", connected

    yield start
    for one in sockets:
        with contextlib.suppress(OSError):  # it has been closed by the other side
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def hang(_connection):
    threading.Event().wait(30)


def send(url, *, event="started", text="hello", timeout=2.0, wait=5.0, allow_private=True, **facts):
    notifier = Notifier(url, "runs/mine", allow_private=allow_private, timeout=timeout)
    notifier.send(event, text, **facts)
    notifier.close(wait)
    return notifier


def said(caplog):
    return [record.getMessage() for record in caplog.records]


# What is sent


@pytest.mark.parametrize("kind", sorted(PATHS))
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_format(server, names, kind, event):
    host, path = PATHS[kind]
    before = time.time()
    send(
        f"http://{host}:{server.port}{path}",
        event=event,
        text="Schritt <7> & so",
        loss=1.25,
        model="tiny",
        why=None,
    )
    ((target, headers, body),) = server.received
    assert target == path and headers["Host"] == f"{host}:{server.port}"
    assert headers["Content-Type"] == "application/json"
    if kind == "discord":
        assert set(body) == {"content", "embeds", "allowed_mentions"} and body["allowed_mentions"] == {
            "parse": []
        }
        assert body["content"] == f"**{event}** runs/mine: Schritt <7> & so"
        (embed,) = body["embeds"]
        assert embed["title"] == f"runs/mine: {event}" and embed["color"] == COLORS[event]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", embed["timestamp"])
        assert embed["fields"] == [
            {"name": "loss", "value": "1.25", "inline": True},
            {"name": "model", "value": "tiny", "inline": True},
            {"name": "why", "value": "-", "inline": True},
        ]
    elif kind == "slack":
        assert set(body) == {"text", "blocks"}
        assert body["text"] == f"{event} runs/mine: Schritt &lt;7&gt; &amp; so"
        first, second = body["blocks"]
        assert first["type"] == second["type"] == "section"
        assert first["text"]["text"] == f"*{event}* runs/mine: Schritt &lt;7&gt; &amp; so"
        assert [one["text"] for one in second["fields"]] == ["*loss*\n1.25", "*model*\ntiny", "*why*\n-"]
        assert all(one["type"] == "mrkdwn" and one["verbatim"] for one in [first["text"], *second["fields"]])
    else:
        assert abs(body.pop("time") - before) < 10
        assert body == {
            "event": event,
            "run": "runs/mine",
            "text": "Schritt <7> & so",
            "facts": {"loss": 1.25, "model": "tiny", "why": None},
        }


def test_the_limits_of_discord():
    facts = {f"{'n' * 300}{i}": "\N{OWL}" * 2000 for i in range(40)}
    body = payload("discord", Notification("failed", "r" * 300, "x" * 5000, facts, 0.0))
    assert len(body["content"]) == 2000 and body["content"].endswith("\N{HORIZONTAL ELLIPSIS}")
    (embed,) = body["embeds"]
    assert len(embed["title"]) == 256 and 0 < len(embed["fields"]) <= 25
    lengths = [(utf16(one["name"]), utf16(one["value"])) for one in embed["fields"]]
    assert max(name for name, _ in lengths) == 256 and 1022 <= max(value for _, value in lengths) <= 1024
    assert sum(map(sum, lengths)) + 256 <= 6000
    small = {str(i): "" for i in range(40)}
    (embed,) = payload("discord", Notification("failed", "r", "x", small, 0.0))["embeds"]
    assert len(embed["fields"]) == 25 and all(one["name"] and one["value"] for one in embed["fields"])
    assert embed["fields"][-1] == {"name": "...", "value": "16 more", "inline": True}


def test_the_limits_of_slack():
    facts = {f"{'n' * 300}{i}": "<&>" * 2000 for i in range(600)}
    body = payload("slack", Notification("failed", "<" * 300, "<!channel>" * 1000, facts, 0.0))
    assert len(body["text"]) <= 4000 and len(body["blocks"]) == 50
    texts = [body["text"], body["blocks"][0]["text"]["text"]]
    assert 2990 <= len(texts[1]) <= 3000
    for block in body["blocks"][1:]:
        assert 1 <= len(block["fields"]) <= 10
        texts += [one["text"] for one in block["fields"]]
        assert all(len(one["text"]) <= 2000 for one in block["fields"])
    assert not any(re.search(r"[<>]|&(?!(amp|lt|gt);)", text) for text in texts)
    assert body["blocks"][-1]["fields"][-1]["text"] == "*...*\n111 more"


def utf16(text):
    return len(text.encode("utf-16-le")) // 2


@pytest.mark.parametrize(
    ("text", "limit", "cut"), [("abc", 3, "abc"), ("abcd", 3, "ab\N{HORIZONTAL ELLIPSIS}")]
)
def test_clipping(text, limit, cut):
    assert clip(text, limit) == cut


def test_facts_of_any_kind_become_json(server):
    send(
        server.url,
        text="\udcff caf\xe9",
        nan=math.nan,
        path=b"x",
        flag=True,
        count=3,
        step=type("N", (int,), {})(4),
    )
    (body,) = server.bodies
    assert body["text"] == "? caf\xe9"
    assert body["facts"] == {"nan": "nan", "path": "b'x'", "flag": True, "count": 3, "step": "4"}


def test_long_texts_are_cut(server):
    send(server.url, text="x" * 100_000)
    assert len(server.bodies[0]["text"]) == LONGEST_TEXT


def test_no_url_no_thread(caplog):
    before = threading.active_count()
    notifier = Notifier(None, "run")
    notifier.send("started", "hello")
    assert threading.active_count() == before and repr(notifier) == "Notifier(None, run='run')"
    notifier.close()
    assert said(caplog) == []


def test_notifications_come_in_order(server):
    notifier = Notifier(server.url, "run", allow_private=True)
    for event in EVENTS:
        notifier.send(event, "text")
    notifier.close()
    assert [body["event"] for body in server.bodies] == list(EVENTS)


def test_where_the_url_comes_from():
    assert webhook_url_from(None, {}) is None and webhook_url_from(None, {"WEBHOOK_URL": " "}) is None
    assert webhook_url_from(None, {"WEBHOOK_URL": "https://a/b\n"}) == "https://a/b"
    assert webhook_url_from("https://c/d", {"WEBHOOK_URL": "https://a/b"}) == "https://c/d"
    assert webhook_url_from("", {"WEBHOOK_URL": "https://a/b"}) is None


# Where nothing is sent


@pytest.mark.security
@pytest.mark.parametrize(
    ("url", "shown", "rule"),
    [
        (f"discord.com/api/webhooks/1/{TOKEN}", "(hidden)", "webhooks are http or https"),
        (f"ftp://example.org/{TOKEN}", "ftp://example.org", "webhooks are http or https"),
        (f"file:///{TOKEN}", "(hidden)", "webhooks are http or https"),
        (f"https:///{TOKEN}", "https://", "there is no host in it"),
        (f"https://user:{TOKEN}@example.org/x", "https://example.org", "a user or password before the host is not sent"),
        (f"https://{TOKEN}@example.org/x", "https://example.org", "a user or password before the host is not sent"),
        (f"https://example.org:{TOKEN}/x", "https://example.org", "its port is not one from 1 to 65535"),
        (f"https://example.org:0/{TOKEN}", "https://example.org", "its port is not one from 1 to 65535"),
        (f"https://example.org/{TOKEN} x", "(hidden)", "it must be a URL in printable ASCII characters"),
        (f"https://example.org/{TOKEN}\nHost: x", "(hidden)", "it must be a URL in printable ASCII characters"),
        (f"https://[::1/{TOKEN}", "(hidden)", "it must be a URL in printable ASCII characters"),
        (f"http://127.0.0.1/{TOKEN}", "http://127.0.0.1", "the address is not public"),
        (f"http://[::ffff:10.0.0.1]/{TOKEN}", "http://::ffff:10.0.0.1", "the address is not public"),
    ],
    ids=[
        "no scheme", "ftp", "file", "no host", "password", "user", "port", "port 0", "space", "line", "bracket",
        "loopback", "mapped",
    ],
)  # fmt: skip
def test_bad_urls_are_refused_without_their_secret(url, shown, rule):
    with pytest.raises(ConfigError) as caught:
        Notifier(url, "run")
    assert str(caught.value).startswith(f"webhook_url={shown!r}: {rule}. ")
    assert TOKEN not in str(caught.value) + repr(caught.value.__context__) + repr(caught.value.__cause__)


@pytest.mark.security
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1",
        "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::",
        "2001:db8::1", "::127.0.0.1", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.fixture
def connections(monkeypatch):
    """Every address that a connection is tried to; none is made."""
    tried = []

    def refuse(_addresses, _deadline):
        tried.extend(place[0] for _, place in _addresses)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(webhook, "_connect", refuse)
    return tried


@pytest.mark.security
@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["169.254.169.254"], ["::1"], ["8.8.8.8", "10.0.0.1"]], ids="-".join
)
def test_names_that_stand_for_private_addresses_are_refused(names, connections, caplog, addresses):
    names.table["evil.example"] = [addresses]
    send(f"https://evil.example/{TOKEN}", allow_private=False)
    assert connections == []
    (line,) = said(caplog)
    assert "https://evil.example" in line and "not public" in line and TOKEN not in line


@pytest.mark.security
def test_a_name_that_changes_its_address_after_the_check(names, monkeypatch):
    """The second answer, loopback, is never asked for: the connection goes to the numbers that were checked."""
    names.table["evil.example"] = [["93.184.216.34"], ["127.0.0.1"]]
    tried = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, place: tried.append(place) or _refuse())
    send(f"https://evil.example/{TOKEN}", allow_private=False)
    assert tried == [("93.184.216.34", 443)] and names.calls == ["evil.example"]


def _refuse():
    raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.security
@pytest.mark.parametrize("number", ["2130706433", "127.1", "0x7f000001"])
def test_loopback_in_odd_spellings(server, caplog, number):
    send(f"http://{number}:{server.port}/{TOKEN}", allow_private=False)
    assert server.received == [] and len(said(caplog)) == 1


@pytest.mark.security
def test_redirects_are_not_followed(server, caplog):
    with WebhookServer() as elsewhere:
        server.answers = [(307, {"Location": elsewhere.url})]
        send(server.url)
        assert len(server.received) == 1 and elsewhere.received == []
    (line,) = said(caplog)
    assert line.endswith("the server answered 307, and redirects are not followed")


@pytest.mark.security
def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    with WebhookServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        send(server.url)
        assert len(server.received) == 1 and proxy.received == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for runs.example.org, signed by itself."""
    folder = tmp_path_factory.mktemp("certificate")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=runs.example.org", "-addext", "subjectAltName=DNS:runs.example.org",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl cannot make a certificate: TLS is NOT tested")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return folder / "cert.pem", context


@pytest.mark.security
@pytest.mark.parametrize("case", ["good", "other name", "unknown authority"])
def test_certificates_are_checked_against_the_host_name(names, certificate, monkeypatch, caplog, case):
    cert, context = certificate
    asked = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    if case != "unknown authority":
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    host = "other.example.org" if case == "other name" else "runs.example.org"
    names.table[host] = [["127.0.0.1"]]
    with WebhookServer(tls=context) as server:
        send(f"https://{host}:{server.port}/{TOKEN}")
        assert asked == [host]
        if case == "good":
            assert len(server.received) == 1 and said(caplog) == []
        else:
            assert server.received == []
            (line,) = said(caplog)
            assert "its certificate is not accepted" in line and TOKEN not in line


# What servers may do


@pytest.mark.faults
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_tried_once_more(server, caplog, status):
    server.answers = [(status, {"Retry-After": "0.05"})]
    send(server.url)
    assert len(server.received) == 2 and said(caplog) == []
    assert server.bodies[0] == server.bodies[1]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("answers", "tries"),
    [
        ([(500, {"Retry-After": "0"})] * 3, 2),
        ([(404, {})], 1),
        ([(400, {})], 1),
        ([(429, {"Retry-After": "60"})], 1),
    ],
    ids=["500 twice", "404", "400", "429 with a long pause"],
)
def test_errors_that_stay(server, caplog, answers, tries):
    server.answers = list(answers)
    send(server.url)
    assert len(server.received) == tries
    assert said(caplog) == [
        f"A notification to http://127.0.0.1:{server.port} was not delivered: the server answered {answers[0][0]}"
    ]


@pytest.mark.faults
def test_a_reason_is_said_once_and_the_next_notification_is_sent(server, caplog):
    server.answers = [(404, {}), (404, {}), (403, {})]
    notifier = Notifier(server.url, "run", allow_private=True)
    for _ in range(4):
        notifier.send("started", "text")
    notifier.close()
    assert len(server.received) == 4
    assert [line[-3:] for line in said(caplog)] == ["404", "403"]


def trickle(connection):
    connection.sendall(b"HTTP/1.1 200 ")
    while True:
        connection.sendall(b"O")
        time.sleep(0.02)


def interim(connection):
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.02)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (hang, "no answer within 0.3 s"),
        (trickle, "no answer within 0.3 s"),
        (interim, "no answer within 0.3 s"),
        (lambda connection: connection.close(), "not HTTP|Connection reset by peer|Broken pipe"),
        (lambda connection: connection.sendall(b"SSH-2.0-nothing\r\n\r\n"), "not HTTP"),
        (lambda connection: connection.sendall(bytes(range(256)) * 300), "not HTTP"),
    ],
    ids=["hangs", "trickles", "100 for ever", "closes", "other protocol", "bytes"],
)
def test_servers_that_misbehave(raw, caplog, behave, reason):
    url, connected = raw(behave)
    start = time.monotonic()
    send(url, timeout=0.3)
    assert time.monotonic() - start < 2.0 and connected.is_set()
    (line,) = said(caplog)
    assert re.search(reason, line) and TOKEN not in line


@pytest.mark.faults
def test_nobody_listens(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    send(f"http://127.0.0.1:{port}/{TOKEN}")
    (line,) = said(caplog)
    assert line.endswith(f"http://127.0.0.1:{port} was not delivered: Connection refused")


@pytest.mark.faults
def test_a_name_that_nobody_knows(monkeypatch, caplog):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    send(f"https://nowhere.example/{TOKEN}", allow_private=False)
    (line,) = said(caplog)
    assert line.endswith("https://nowhere.example was not delivered: the host's name cannot be resolved")


@pytest.mark.faults
def test_a_hanging_server_delays_nothing(raw, caplog):
    url, connected = raw(hang)
    notifier = Notifier(url, "run", allow_private=True, timeout=30)
    slowest = 0.0
    for _ in range(5):
        start = time.monotonic()
        notifier.send("started", "text " * 1000, loss=1.0)
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 0.05 and connected.wait(5)
    start = time.monotonic()
    notifier.close(0.3)
    assert 0.25 < time.monotonic() - start < 0.8
    start = time.monotonic()
    notifier.close(0.3)
    notifier.send("failed", "too late")
    assert time.monotonic() - start < 0.1
    lines = said(caplog)
    assert len(lines) == 2 and "took more than 0.3 s" in lines[0] and "after the end" in lines[1]


@pytest.mark.faults
def test_the_queue_is_bounded_and_keeps_the_newest(raw, caplog):
    let_go = threading.Event()
    seen = []

    def behave(connection):
        let_go.wait(10)
        request = b""
        while not request.endswith(b"}"):
            request += connection.recv(65536)
        seen.append(json.loads(request.partition(b"\r\n\r\n")[2])["facts"]["n"])
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    url, connected = raw(behave)
    notifier = Notifier(url, "run", allow_private=True)
    notifier.send("started", "text", n=-1)
    assert connected.wait(5)
    for n in range(QUEUE + 10):
        notifier.send("started", "text", n=n)
    let_go.set()
    notifier.close(10)
    assert seen == [-1, *range(10, QUEUE + 10)]
    assert said(caplog) == [
        f"A notification to {url[: -len(TOKEN) - 1]} was not delivered: more than {QUEUE} were waiting"
    ]


@pytest.mark.faults
def test_facts_that_cannot_be_written_raise_nothing(server, caplog):
    class Broken:
        def __str__(self):
            raise RuntimeError(TOKEN)

    send(server.url, thing=Broken())
    assert server.received == [] and len(said(caplog)) == 1 and TOKEN not in caplog.text


@pytest.mark.faults
def test_an_error_that_nobody_foresaw_raises_nothing(server, caplog, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(server.url)

    monkeypatch.setattr("srde.monitor.notify.deliver", fail)
    send(server.url)
    (line,) = said(caplog)
    assert line.endswith("an error that was not foreseen (RuntimeError)")


@pytest.mark.faults
def test_a_signal_handler_may_send_while_the_run_is_sending(server):
    """SIGTERM comes when it likes: a handler that waits for the lock of what it has interrupted would wait for ever."""
    notifier = Notifier(server.url, "run", allow_private=True)
    before = signal.signal(signal.SIGUSR1, lambda *_: notifier.send("stopped", "by a signal"))
    try:
        with notifier._changed:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    notifier.close()
    assert [body["event"] for body in server.bodies] == ["stopped"]


# What is not to leave


@pytest.mark.security
@pytest.mark.parametrize("kind", sorted(PATHS))
def test_secrets_are_taken_out_of_what_is_sent(server, names, monkeypatch, kind):
    host, path = PATHS[kind]
    url = f"http://{host}:{server.port}{path}"
    secrets = {
        "HF_TOKEN": "hf_QwErTyUiOpAsDfGh",
        "WANDB_API_KEY": "0123456789abcdef0123",
        "MY_SERVICE_TOKEN": "hf_QwErTyUiOpAsDfGh-and-more",
        "AWS_SECRET_ACCESS_KEY": "aws/secret+value",
        "CLIENT_SECRET": "s3cr3t-value",
        "WEBHOOK_URL": "https://discord.com/api/webhooks/99/another-secret-of-a-webhook",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "1")
    everything = " ".join([*secrets.values(), url, path, TOKEN, "another-secret-of-a-webhook"])
    send(url, event="failed", text=f"at step 1: {everything}", reason=everything, **{everything: 1})
    (_, _, body) = server.received[0]
    text = json.dumps(body)
    for secret in [*secrets.values(), TOKEN, "another-secret", "-and-more"]:
        assert secret not in text
    assert "at step 1: [hidden] [hidden]" in text


@pytest.mark.security
def test_a_secret_at_the_cut_is_not_cut_but_taken_out(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_QwErTyUiOpAsDfGh")
    send(server.url, text="x" * (LONGEST_TEXT - 8) + " hf_QwErTyUiOpAsDfGh")
    assert "hf_" not in server.bodies[0]["text"]


@pytest.mark.security
def test_the_url_is_in_no_repr_and_no_state_that_is_shown(server):
    notifier = send(server.url)
    shown = repr(notifier) + repr(vars(notifier)) + repr(Webhook.parse(server.url, allow_private=True))
    assert "0123456789abcdef" not in shown and "fedcba9876543210" not in shown and str(server.port) in shown


# The module as a program


def test_the_module_sends_one_notification(server, monkeypatch, capsys):
    monkeypatch.setenv("WEBHOOK_URL", server.url)
    monkeypatch.setenv("WEBHOOK_ALLOW_PRIVATE", "1")
    assert main(["failed", "the download failed", "--run", "mine"]) == 0
    (body,) = server.bodies
    assert (body["event"], body["run"], body["text"]) == ("failed", "mine", "the download failed")
    monkeypatch.delenv("WEBHOOK_ALLOW_PRIVATE")
    assert main(["failed", "x"]) == 1 and len(server.received) == 1
    error = capsys.readouterr().err
    assert "the address is not public" in error and "0123456789abcdef" not in error
    monkeypatch.delenv("WEBHOOK_URL")
    assert main(["failed", "x"]) == 0


def test_the_module_is_light():
    program = "import sys, srde.monitor.notify; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "numpy", "rich"} & set(loaded)


@pytest.fixture(autouse=True)
def _warnings_are_caught(caplog):
    caplog.set_level(logging.WARNING, logger="srde.monitor.notify")
