"""A server on loopback that takes webhooks: it keeps what it got and answers as it is told."""

from __future__ import annotations

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebhookServer:
    """Keeps each request as (path, headers, body); answers from `answers` in turn, then with 204.

    Args:
        answers: (status, headers) of the first answers.
        tls: A certificate to serve with.
    """

    def __init__(self, answers=(), tls: ssl.SSLContext | None = None):
        self.answers = list(answers)
        self.received: list[tuple[str, dict[str, str], dict]] = []
        self._changed = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._changed:
                    outer.received.append((self.path, dict(self.headers), body))
                    status, headers = outer.answers.pop(0) if outer.answers else (204, {})
                    outer._changed.notify_all()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # clients that go away are what is tested
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook/0123456789abcdef?token=fedcba9876543210"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def bodies(self) -> list[dict]:
        with self._changed:
            return [body for _, _, body in self.received]

    def wait(self, count: int, seconds: float = 10.0) -> list[dict]:
        """The bodies, as soon as there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.received) >= count, seconds), self.received
        return self.bodies
