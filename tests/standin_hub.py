"""A stand-in for the Hugging Face hub on the loopback address, for the real `huggingface_hub` and `datasets`.

Point the clients at it through their environment before they are imported (`StandInHub.environment` has it all):

    with StandInHub() as hub:
        hub.add("owner/rows", {"train.jsonl": b'{"text": "a"}\n'})
        subprocess.run([...], env=hub.environment(tmp_path))

Covered: data-set and model repositories named `owner/name`, with their file trees, revisions (branches, commits,
`refs/convert/...`) and files with ranges; one token for all of them; creating a repository; uploads inside a
commit and through git-LFS; and four faults that can be switched on and off. Everything lives in memory.

Not covered, answered 404: spaces, buckets, search, the data-set viewer (the clients look for it under
`datasets-server.<host>`, which no loopback address has), pull requests, deletion of
repositories and branches, commit histories, pages of a file tree (it always comes whole), and Xet. The clients
*download* through Xet only files that the hub names a Xet hash for; this one names none. They *upload* through Xet
whatever the hub answers "lfs" for, and `hf_xet` never falls back to git-LFS. So every upload is answered "regular"
(inside the commit), with which `upload_folder`, `upload_file` and `create_commit` work whatever is installed.
`lfs=True` asks for the real hub's rule instead, git-LFS for Parquet and large files, and its clients need
`HF_HUB_DISABLE_XET=1`; `push_to_hub` of `datasets` works no other way.

By hand, until Ctrl-C: `python tests/standin_hub.py [--port 8000] [--folder DIR]`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, Self

from standin_hub_store import Answer, Refusal, Store

How = Literal["refuse", "drop", "503", "hang"]


class StandInHub:
    """Serves from `__enter__` to `__exit__`; repositories and faults may change at any time between."""

    def __init__(self, token: str | None = None, *, lfs: bool = False, port: int = 0):
        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str] = []
        self._fault: How | None = None
        self._before_fault = 0
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._server = _Server(("127.0.0.1", port), self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.store = Store(self.endpoint, token, lfs)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._woken.set()
        self._server.shutdown()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()

    def add(
        self, repo_id: str, files: Mapping[str, bytes], repo_type: str = "dataset", revision: str = "main"
    ) -> str:
        """Make `files` all that the revision holds, in a new commit, and return its sha.

        The sha follows from the repository's name and files alone: the same files again give the same sha. File
        names are not checked, so that a test can play a hub that names `../` or absolute paths.
        """
        return self.store.add(repo_id, files, repo_type, revision)

    def files(self, repo_id: str, repo_type: str = "dataset", revision: str = "main") -> dict[str, bytes]:
        """What the revision holds now, uploads included."""
        return self.store.files(repo_id, repo_type, revision)

    def fail(self, after: int, how: How) -> None:
        """After so many more requests, let all fail until `heal`.

        "refuse" closes the connection without an answer; "drop" closes it inside the answer, and no byte beyond
        the middle of a file is ever sent, however often a client resumes; "503" answers just that; "hang" answers
        nothing and keeps the connection open until `heal` or the end, which is how long the clients wait where they
        set no time-out: for a file tree, to create a repository, to upload.
        """
        with self._lock:
            self._woken.clear()
            self._fault, self._before_fault = how, after

    def heal(self) -> None:
        with self._lock:
            self._fault = None
            self._woken.set()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment for a process whose clients know this hub only, and keep everything below `home`."""
        kept = {
            k: v for k, v in os.environ.items() if not re.match("HF_|HUGGING|TRANSFORMERS_|(?i:no_proxy)", k)
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",  # even where the tests as a whole run offline
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` would ask an address outside for each data set
            "NO_PROXY": "127.0.0.1",
            **({"HF_HUB_DISABLE_XET": "1"} if self.store.lfs else {}),
            **more,
        }

    def _next_fault(self, method: str, path: str, authorization: str | None) -> How | None:
        with self._lock:
            self.requests.append((method, path))
            if authorization is not None:
                self.authorizations.append(authorization)
            if self._fault is None or self._before_fault > 0:
                self._before_fault -= 1
                return None
            return self._fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a thread that a client keeps waiting must not hold up the end

    def __init__(self, address: tuple[str, int], hub: StandInHub):
        super().__init__(address, _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def close_connections(self) -> None:
        """Wake the threads that wait for a client's next request; they close their connections and end."""
        for connection in tuple(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away; an error of the stand-in itself is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub keeps them
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait for the first
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """`StandInHub.requests` is the log."""

    def do_GET(self) -> None:
        hub = self.server.hub
        body = self._body()
        fault = hub._next_fault(self.command, self.path, self.headers.get("Authorization"))
        if fault == "hang":
            hub._woken.wait()
        if fault in ("hang", "refuse"):
            self.close_connection = True
            return
        try:
            if fault == "503":
                raise Refusal(503, "Service unavailable")
            answer = hub.store.answer(self.command, self.path, self.headers, body)
        except Refusal as refusal:
            answer = refusal.answer
        self._send(answer, dropped=fault == "drop")

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer, dropped: bool) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":  # which has no middle to be dropped in
            return
        whole = len(answer.body) if answer.whole is None else answer.whole
        self.wfile.write(answer.body[: max(0, whole // 2 - answer.start)] if dropped else answer.body)
        if dropped:
            self.close_connection = True


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their names inside it, without links and what lies in `.git` and the like."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path.read_bytes() for name, path in named.items() if not re.search(r"(^|/)\.[^/]*/", name)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve data sets as the Hugging Face hub does, on this machine only"
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--folder", type=Path, help="holds data sets as OWNER/NAME/...; made-up ones without it"
    )
    parser.add_argument("--rows_per_split", type=int, default=200, help="of the made-up data sets")
    args = parser.parse_args()
    if args.folder is not None:
        places = sorted(path for path in args.folder.glob("*/*") if path.is_dir())
        repositories = {f"{path.parent.name}/{path.name}": (folder_files(path), "main") for path in places}
    else:
        import hub_rows  # only by hand: a test says itself what its hub holds

        repositories = {
            repo_id: (
                hub_rows.build_files(repo_id, rows_per_split=args.rows_per_split, seed=0),
                repository.revision,
            )
            for repo_id, repository in hub_rows.REPOSITORIES.items()
        }
    with StandInHub(port=args.port) as hub:
        for repo_id, (files, revision) in repositories.items():
            hub.add(repo_id, files, revision=revision)
            print(f"{repo_id}: {len(files)} files")
        print(
            f"Serving at {hub.endpoint} until Ctrl-C. In another shell:\n\nexport HF_ENDPOINT={hub.endpoint}"
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
