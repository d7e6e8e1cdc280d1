"""What the tests of deploy/vastai_startup.sh share: a server for data, and a way to run the script without the network."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "deploy" / "vastai_startup.sh"


class DataServer:
    """Serves one file with ranges; keeps the `Range` and `If-Range` of each request.

    Args:
        content: The file.
        ranges: Whether parts of it can be had; else the whole is sent always.
        cut: Bytes after which the connection ends, for each of the first requests; `None` cuts nothing.
        status: What is answered instead of the file, if not 200.
    """

    def __init__(self, content: bytes, *, ranges: bool = True, cut=(), status: int = 200):
        self.content, self.ranges, self.cut, self.status = content, ranges, list(cut), status
        self.requests: list[tuple[str | None, str | None]] = []
        self.sent = threading.Event()
        """Set when a connection has been cut, or the file sent."""
        self.hold = threading.Event()
        """While it is clear, a connection that is cut stays open: the client waits."""
        self.hold.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/rows.jsonl?signature=5ca1ab1e0ddba11"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted, condition = request.headers.get("Range"), request.headers.get("If-Range")
        self.requests.append((wanted, condition))
        start = 0
        if self.status != 200:
            request.send_response(self.status)
            body = b""
        elif wanted and self.ranges and condition in (None, self.tag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            body = self.content[start:]
            request.send_response(206 if body else 416)
            part = f"{start}-{len(self.content) - 1}" if body else "*"
            request.send_header("Content-Range", f"bytes {part}/{len(self.content)}")
        else:
            request.send_response(200)
            body = self.content
        request.send_header("ETag", self.tag)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        cut = self.cut.pop(0) if self.cut else None
        request.wfile.write(body if cut is None else body[: max(cut - start, 0)])
        request.wfile.flush()
        self.sent.set()
        if cut is not None:
            self.hold.wait(30)
            request.close_connection = True

    @property
    def tag(self) -> str:
        """The file's ETag."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def start(env: dict[str, str], *, piped: bool = False, flags=()) -> subprocess.Popen:
    """Starts the script as the leader of a process group of its own.

    Args:
        env: Its settings, on top of this process's environment less what could be settings.
        piped: Feeds it to bash, as `curl ... | bash` does.
        flags: Flags of bash.
    """
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.endswith(("_TOKEN", "_KEY", "_SECRET")) and name not in ("WEBHOOK_URL", "DATA_URL")
    }
    stdin = SCRIPT.open("rb") if piped else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            ["bash", *flags, *(["-s"] if piped else [str(SCRIPT)])],
            env=ours | env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        if piped:
            stdin.close()


def kill_all(process: subprocess.Popen, work: Path) -> None:
    """SIGKILL to the script and to everything that it has started; returns when all of them are gone.

    Args:
        process: The script.
        work: Its work folder, whose lock all of them hold.
    """
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with (work / "startup.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def environment(folder: Path, srde: str) -> Path:
    """A virtual environment as the script sees one: `bin/python` is this one, `bin/srde` the given program."""
    (folder / "bin").mkdir(parents=True)
    for name, program in {
        "python": f'#!/bin/sh\nPYTHONPATH="{ROOT}/src" exec "{sys.executable}" "$@"\n',
        "srde": srde,
    }.items():
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)
    return folder
