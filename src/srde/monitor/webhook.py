"""One message to one webhook: which addresses it may go to, and how it gets there.

The path and the query of a webhook's URL are its secret: whoever has them can write to the channel. So no error, `repr`
or log of this module holds more of a URL than scheme, host and port.

Covered: URLs that are not plain http(s) with a host; hosts that are, or resolve to, addresses that are not public
(loopback, private, link-local, multicast, reserved, and IPv6 forms of such IPv4 addresses); names that resolve to another
address once they have been checked, since the connection goes to the very address that was; redirects, which are not
followed; proxies of the environment, which are not used; servers that hang, trickle or talk nonsense. Not covered: a public
address that forwards to a private one; a resolver that never answers, which holds up the calling thread.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import SplitResult, urlsplit

from srde.errors import ConfigError

Kind = Literal["discord", "slack", "json"]

PORTS = {"http": 80, "https": 443}
DISCORD_HOSTS = {"discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com"}
DISCORD_PATH = re.compile(r"/api/(v\d+/)?webhooks/")
SLACK_HOST = "hooks.slack.com"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
NAT64_MASK = (1 << 32) - 1
CLOCK_SECONDS = 0.02  # an error this close to the deadline is the deadline's


class NotDeliveredError(Exception):
    """A message did not arrive; the text says why, without the URL."""


@dataclass(frozen=True)
class Answer:
    """What the server said.

    Attributes:
        status: The HTTP status.
        retry_after: Seconds that the server asks to wait before the next try; `None` when it does not say.
    """

    status: int
    retry_after: float | None


@dataclass(frozen=True)
class Webhook:
    """Where messages go. Its `repr` keeps the secret.

    Attributes:
        scheme: ``http`` or ``https``.
        host: The name or address, as certificates are checked against; an IPv6 address without brackets.
        port: The port.
        target: Path and query; the secret.
        kind: Which service's format it takes.
    """

    scheme: str
    host: str
    port: int
    target: str = field(repr=False)
    kind: Kind

    @classmethod
    def parse(cls, url: str, *, allow_private: bool = False) -> Webhook:
        """Reads a URL; nothing is resolved.

        Args:
            url: The webhook's URL.
            allow_private: Takes a host that is written as an address which is not public.

        Raises:
            ConfigError: It is not a URL that messages may go to. The message holds scheme and host at most.
        """
        parts, port = _split(url)
        if parts is None or not re.fullmatch(r"[!-~]+", url):
            raise _bad(
                "(hidden)",
                "it must be a URL in printable ASCII characters",
                "copy it as the service shows it",
            )
        if parts.scheme not in PORTS:
            known = re.match(r"[a-z][a-z0-9+.-]*://", url, re.IGNORECASE) and parts.hostname
            shown = f"{parts.scheme}://{parts.hostname}" if known else "(hidden)"
            raise _bad(shown, "webhooks are http or https", "start it with https://")
        if not parts.hostname:
            raise _bad(f"{parts.scheme}://", "there is no host in it", "write https://host/path")
        shown = f"{parts.scheme}://{parts.hostname}"
        if "@" in parts.netloc:
            raise _bad(shown, "a user or password before the host is not sent", "leave out all from // to @")
        if port == 0:
            raise _bad(shown, "its port is not one from 1 to 65535", "leave the port out")
        if not allow_private and _is_address(parts.hostname) and not is_public(parts.hostname):
            raise _bad(
                shown, "the address is not public", "allow it with --webhook_allow_private if it is meant"
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        kind: Kind = "json"
        if parts.hostname in DISCORD_HOSTS and DISCORD_PATH.match(parts.path):
            kind = "discord"
        elif parts.hostname == SLACK_HOST:
            kind = "slack"
        return cls(parts.scheme, parts.hostname, port or PORTS[parts.scheme], target, kind)

    @property
    def place(self) -> str:
        """Scheme, host and a port that is not the usual one: what may be shown."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == PORTS[self.scheme] else f":{self.port}")


def _bad(shown: str, rule: str, fix: str) -> ConfigError:
    return ConfigError.of("webhook_url", shown, rule=rule, fix=fix)


def _split(url: str) -> tuple[SplitResult | None, int | None]:
    """The parts of a URL and its port, 0 for one that is none. urllib's own errors quote the URL, so none leaves here."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None, None
    try:
        return parts, parts.port
    except ValueError:
        return parts, 0


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet; of an IPv6 form of an IPv4 address, whether that one does."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & NAT64_MASK)
        ip = inner or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def deliver(webhook: Webhook, body: bytes, *, allow_private: bool, timeout: float) -> Answer:
    """Sends one body of JSON by POST, to an address that was checked.

    Args:
        webhook: Where to.
        body: UTF-8 JSON.
        allow_private: Also sends to addresses that are not public.
        timeout: Seconds for all together, from the connection to the status line; resolving the name comes on top.

    Raises:
        NotDeliveredError: No HTTP answer came, or the address is not allowed.
    """
    addresses = _resolve(webhook, allow_private)
    deadline = time.monotonic() + timeout
    reason = ""
    try:
        with _connect(addresses, deadline) as wire:
            return _post(webhook, wire, body, deadline)
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate is not accepted: {error.verify_message}"
    except http.client.HTTPException:
        reason = "its answer is not HTTP, or none came"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if time.monotonic() >= deadline - CLOCK_SECONDS:
        reason = f"no answer within {timeout:g} s"
    raise NotDeliveredError(reason)


def _resolve(webhook: Webhook, allow_private: bool) -> list[tuple[int, tuple]]:
    """Family and socket address of everything that the host's name stands for."""
    try:
        found = socket.getaddrinfo(webhook.host, webhook.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # UnicodeError: a label of the name is too long
        found = []
    if not found:
        raise NotDeliveredError("the host's name cannot be resolved")
    # One address that is not public is enough to refuse: which one the connection would take is not the sender's choice.
    if not allow_private and not all(is_public(place[0]) for *_, place in found):
        raise NotDeliveredError(
            "the host's name stands for an address that is not public; --webhook_allow_private allows it"
        )
    return [(family, place) for family, _, _, _, place in found]


def _connect(addresses: list[tuple[int, tuple]], deadline: float) -> socket.socket:
    """A connection to the first address that takes one. Socket addresses are numbers: nothing is resolved again."""
    last: OSError = TimeoutError()
    for family, place in addresses:
        wire = socket.socket(family, socket.SOCK_STREAM)
        wire.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            wire.connect(place)
        except OSError as error:
            wire.close()
            last = error
        else:
            return wire
    raise last


def _post(webhook: Webhook, wire: socket.socket, body: bytes, deadline: float) -> Answer:
    # A socket's time-out counts from byte to byte, so a server that trickles would hold it for ever; the watch ends the
    # connection itself. It does so through a second handle, since TLS takes over the first.
    handle = wire.dup()
    watch = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [handle])
    watch.daemon = True
    watch.start()
    connection = http.client.HTTPConnection(webhook.host, webhook.port)
    connection.auto_open = 0  # never connects by itself
    try:
        if webhook.scheme == "https":
            wire = ssl.create_default_context().wrap_socket(wire, server_hostname=webhook.host)
        connection.sock = wire
        headers = {
            "Host": webhook.place.partition("://")[2],
            "User-Agent": "srde",
            "Content-Type": "application/json",
        }
        connection.request("POST", webhook.target, body, headers)
        response = connection.getresponse()
        answer = Answer(response.status, _seconds(response.getheader("Retry-After")))
        response.close()
        if time.monotonic() >= deadline:  # what the watch has cut off may look like an answer
            raise TimeoutError
        return answer
    finally:
        watch.cancel()
        connection.close()
        handle.close()


def _shut(handle: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the connection has just ended
        handle.shutdown(socket.SHUT_RDWR)


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; the form with a date, which neither Discord nor Slack sends, is not read."""
    return float(header) if header and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header) else None
