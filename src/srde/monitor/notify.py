"""Notifications of a training run to a webhook: Discord, Slack, or any server that takes JSON.

    notifier = Notifier(webhook_url_from(flag, os.environ), run="runs/mine")
    notifier.send("started", "training 5000 steps", model="SmolLM2", max_steps=5000)
    notifier.close()

Training comes first: a notification that cannot be delivered is said in the log, once per reason, and nothing else happens.
No step waits for a server, and no server learns a secret: what is sent is scrubbed (`srde.monitor.scrub`), and the URL, which
is a secret too, appears in no message. `python -m srde.monitor.notify EVENT TEXT` sends one from a shell script.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping

from srde.errors import ConfigError
from srde.monitor.scrub import Scrubber
from srde.monitor.webhook import NotDeliveredError, Webhook, deliver
from srde.monitor.webhook_formats import Notification, clip, payload

logger = logging.getLogger(__name__)

EVENTS = ("started", "resumed", "completed", "failed", "stopped")
QUEUE = 64
"""Notifications that wait at most; a run sends a handful in its life, so more are a server that has stopped answering."""
RETRY_SECONDS = 0.5
"""The pause before the second try when the server does not name one."""
LONGEST_TEXT = 10_000


def webhook_url_from(flag: str | None, environ: Mapping[str, str]) -> str | None:
    """The webhook's URL.

    Args:
        flag: What the command line says; it wins, and an empty one means none.
        environ: The environment, whose ``WEBHOOK_URL`` counts otherwise.
    """
    url = environ.get("WEBHOOK_URL", "") if flag is None else flag
    return url.strip() or None


class Notifier:
    """Sends notifications from a thread of its own.

    Args:
        url: The webhook's URL; with `None` nothing is ever sent.
        run: The run's name.
        allow_private: Also sends to addresses that are not public.
        timeout: Seconds that one try may take. A server's error 5xx or 429 is tried once more, after the pause that it asks for
            unless that is longer than this.

    Raises:
        ConfigError: The URL is none that may be sent to.
    """

    def __init__(
        self, url: str | None, run: str, *, allow_private: bool = False, timeout: float = 5.0
    ) -> None:
        self._webhook = None if url is None else Webhook.parse(url, allow_private=allow_private)
        self._run = run
        self._allow_private = allow_private
        self._timeout = timeout
        self._scrub = Scrubber(url, os.environ)
        self._waiting: deque[Notification] = deque()
        # Its lock is reentrant: `send` may be called by a signal handler that has interrupted `send`.
        self._changed = threading.Condition()
        self._closed = False
        self._given_up = threading.Event()
        self._said: set[str] = set()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Notifier({self._webhook.place if self._webhook else None!r}, run={self._scrub(self._run)!r})"

    def send(self, event: str, text: str, **facts: object) -> None:
        """Puts a notification into the queue and returns; raises nothing, whatever is given.

        Args:
            event: ``started``, ``resumed``, ``completed``, ``failed`` or ``stopped``.
            text: A sentence for people.
            **facts: Further facts, in the order in which they are to be shown.
        """
        if self._webhook is None:
            return
        try:
            note = Notification(
                event,
                self._clean(self._run),
                self._clean(text),
                {self._clean(name): self._plain(value) for name, value in facts.items()},
                round(time.time(), 3),
            )
            with self._changed:
                if self._closed:
                    self._say("it came after the end of the run")
                    return
                if len(self._waiting) == QUEUE:  # the newest say more about a run than the oldest
                    self._waiting.popleft()
                    self._say(f"more than {QUEUE} were waiting")
                self._waiting.append(note)
                if self._thread is None:
                    thread = threading.Thread(
                        target=self._work, args=(self._webhook,), name="srde-notifier", daemon=True
                    )
                    thread.start()
                    self._thread = thread
                self._changed.notify()
        except Exception as error:  # noqa: BLE001 - a fact that cannot be written, or no thread left: training goes on
            self._say(f"it cannot be put into words or into the queue ({type(error).__name__})")

    def close(self, timeout: float = 5.0) -> None:
        """Waits for what is in the queue, and gives up what is not delivered by then.

        Args:
            timeout: Seconds to wait at most.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is None or self._given_up.is_set():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._given_up.set()
            self._say(f"the run ended, and the server took more than {timeout:g} s")

    def _work(self, webhook: Webhook) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting or self._given_up.is_set():
                    return
                note = self._waiting.popleft()
            try:
                self._deliver(webhook, note)
            except NotDeliveredError as error:
                reason = str(error)
            except Exception as error:  # noqa: BLE001 - nobody could catch it, and its text might hold the URL
                reason = f"an error that was not foreseen ({type(error).__name__})"
            else:
                continue
            if not self._given_up.is_set():  # or `close` has said so
                self._say(reason)

    def _deliver(self, webhook: Webhook, note: Notification) -> None:
        body = json.dumps(payload(webhook.kind, note), allow_nan=False).encode()
        limits = {"allow_private": self._allow_private, "timeout": self._timeout}
        answer = deliver(webhook, body, **limits)
        if answer.status == 429 or answer.status >= 500:
            pause = RETRY_SECONDS if answer.retry_after is None else answer.retry_after
            if pause <= self._timeout and not self._given_up.wait(pause):
                answer = deliver(webhook, body, **limits)
        if 300 <= answer.status < 400:
            raise NotDeliveredError(f"the server answered {answer.status}, and redirects are not followed")
        if not 200 <= answer.status < 300:
            raise NotDeliveredError(f"the server answered {answer.status}")

    def _say(self, reason: str) -> None:
        """Logs what went wrong, once per reason."""
        if self._webhook is not None and reason not in self._said:
            self._said.add(reason)
            logger.warning("A notification to %s was not delivered: %s", self._webhook.place, reason)

    def _plain(self, value: object) -> str | int | float | bool | None:
        """The value as JSON has it: numbers as they are, all else as scrubbed text."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int | float) and type(value) in (int, float) and math.isfinite(value):
            return value
        return self._clean(str(value))

    def _clean(self, text: str) -> str:
        """Scrubbed first and cut then, or a secret's beginning could stay; lone surrogates of file names are no UTF-8."""
        return clip(self._scrub(str(text)).encode("utf-8", "replace").decode(), LONGEST_TEXT)


def main(argv: list[str] | None = None) -> int:
    """Sends one notification to the webhook that the environment names.

    Args:
        argv: ``EVENT TEXT [--run NAME]``; the process's own if `None`.

    Returns:
        0, also when it was not delivered: the log says so; 1 when the URL breaks a rule.
    """
    parser = argparse.ArgumentParser(
        prog="python -m srde.monitor.notify",
        allow_abbrev=False,
        description="Sends one notification to WEBHOOK_URL; does nothing without that variable.",
    )
    parser.add_argument("event", choices=EVENTS)
    parser.add_argument("text", help="a sentence for people")
    parser.add_argument("--run", default="srde", help="the run's name")
    args = parser.parse_args(argv)
    try:
        notifier = Notifier(
            webhook_url_from(None, os.environ),
            args.run,
            allow_private=os.environ.get("WEBHOOK_ALLOW_PRIVATE") == "1",
        )
    except ConfigError as error:
        print(f"srde.monitor.notify: {error}", file=sys.stderr)
        return 1
    notifier.send(args.event, args.text)
    notifier.close(timeout=15.0)  # two tries and the pause between them
    return 0


if __name__ == "__main__":
    sys.exit(main())
