"""What the stand-in hub holds, and its answer to each request; `standin_hub` says what is covered and serves it.

Nothing here knows of sockets: `Store.answer` takes a request apart into its route and returns or raises the answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2020-01-01T00:00:00.000Z"
LFS_FROM = 10 * 1024 * 1024
_EXPANDED = {"lastCommit": {"id": "0" * 40, "title": "Files", "date": DATE}}


def git_sha(content: bytes) -> str:
    """The name git gives to a file's content, which the clients compare their own files by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_unsafe(path: str) -> bool:
    """Whether a name could lead out of the folder that a client downloads to, on any system."""
    if re.search(r"[\\\x00-\x1f]|^[A-Za-z]:", path):
        return True
    return not {"", ".", ".."}.isdisjoint(path.split("/"))


def as_json(content: object, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"})


def _folder(path: str, expand: bool) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid} | (_EXPANDED if expand else {})


@dataclass
class Repository:
    """The files of every commit, by its sha, and the shas that branches and other refs stand at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    """What goes back; `start` and `whole` say where the body lies in its file, for the fault "drop"."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    whole: int | None = None


class Refusal(Exception):
    """A request that is answered with an error; `code` is what the clients choose their exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.answer = as_json({"error": message}, status)
        self.answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.answer.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Request:
    """A request on its route: what the route's pattern found in the path, and the rest of what came."""

    body: bytes
    headers: Mapping[str, str]
    query: dict[str, list[str]]
    kind: str = ""
    repo: str = ""
    rev: str = ""
    path: str = ""
    oid: str = ""


class Store:
    """Repositories by type and name, and the LFS objects by their SHA-256."""

    def __init__(self, endpoint: str, token: str | None, lfs: bool):
        self.endpoint = endpoint
        self.token = token
        self.lfs = lfs
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._objects: dict[str, bytes] = {}
        self._announced: set[str] = set()
        self._lock = threading.RLock()

    def add(self, repo_id: str, files: Mapping[str, bytes], repo_type: str, revision: str) -> str:
        """See `StandInHub.add`."""
        parts = [f"{repo_type} {repo_id}", *(f"{name} {git_sha(files[name])}" for name in sorted(files))]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        with self._lock:
            repository = self._repositories.setdefault((repo_type, repo_id), Repository())
            repository.commits[sha] = dict(files)
            repository.refs[revision] = sha
        return sha

    def files(self, repo_id: str, repo_type: str, revision: str) -> dict[str, bytes]:
        with self._lock:
            repository = self._repositories[repo_type, repo_id]
            return dict(repository.commits[repository.refs[revision]])

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        url = urlsplit(target)
        for methods, pattern, route in _ROUTES:
            if method in methods and (found := re.fullmatch(pattern, url.path)):
                groups = {k: unquote(v or "") for k, v in found.groupdict().items()}
                # What an upload is allowed to PUT was announced by a request that was itself authorized.
                if self.token is not None and method != "PUT":
                    self._authorize(headers.get("Authorization"), "repo" in groups)
                with self._lock:
                    return route(self, Request(body, headers, parse_qs(url.query), **groups))
        raise Refusal(404, "The stand-in hub does not have this")

    def _authorize(self, given: str | None, about_repository: bool) -> None:
        if given is None:  # the hub does not tell strangers which private repositories there are
            code = "RepoNotFound" if about_repository else None
            raise Refusal(401, "Invalid username or password.", code)
        if given != f"Bearer {self.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _repository(self, asked: Request) -> Repository:
        if (found := self._repositories.get((asked.kind or "model", asked.repo))) is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return found

    def _commit(self, asked: Request) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(asked)
        revision = asked.rev or "main"
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return sha, repository.commits[sha]

    def _is_lfs(self, path: str, size: int) -> bool:
        return self.lfs and (path.endswith(".parquet") or size > LFS_FROM)

    def _entry(self, path: str, content: bytes, expand: bool = False) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha(content)}
        if self._is_lfs(path, len(content)):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(content), "pointerSize": 134}
        return entry | (_EXPANDED if expand else {})

    def _info(self, asked: Request) -> Answer:
        sha, files = self._commit(asked)
        siblings = [
            {"rfilename": entry.pop("path"), "blobId": entry.pop("oid"), **entry}
            for entry in (self._entry(path, files[path]) for path in sorted(files))
        ]
        about = {"id": asked.repo, "author": asked.repo.split("/")[0], "sha": sha, "siblings": siblings}
        about |= {"private": self.token is not None, "gated": False, "disabled": False, "tags": []}
        return as_json(about | {"createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0})

    def _refs(self, asked: Request) -> Answer:
        known: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        for name, sha in self._repository(asked).refs.items():
            place = "converts" if name.startswith("refs/convert/") else "branches"
            ref = name if name.startswith("refs/") else f"refs/heads/{name}"
            known[place].append({"name": name.removeprefix("refs/convert/"), "ref": ref, "targetCommit": sha})
        return as_json(known)

    def _tree(self, asked: Request) -> Answer:
        files = self._commit(asked)[1]
        recursive, expand = (
            asked.query.get(name, [""])[0].lower() == "true" for name in ("recursive", "expand")
        )
        below = f"{asked.path}/" if asked.path else ""
        folders = {}
        entries = []
        for path in sorted(files):
            if path == asked.path:
                entries.append(self._entry(path, files[path], expand))
            elif path.startswith(below):
                parts = path[len(below) :].split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    folder = below + "/".join(parts[:depth])
                    folders[folder] = _folder(folder, expand)
                if recursive or len(parts) == 1:
                    entries.append(self._entry(path, files[path], expand))
        if asked.path and not entries and not folders:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return as_json([*folders.values(), *entries])

    def _paths_info(self, asked: Request) -> Answer:
        files = self._commit(asked)[1]
        form = parse_qs(asked.body.decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        entries = []
        for path in form.get("paths", []):
            if path in files:
                entries.append(self._entry(path, files[path], expand))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder(path, expand))
        return as_json(entries)

    def _resolve(self, asked: Request) -> Answer:
        sha, files = self._commit(asked)
        if (content := files.get(asked.path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        lfs = self._is_lfs(asked.path, len(content))
        etag = hashlib.sha256(content).hexdigest() if lfs else git_sha(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        size = len(content)
        if not (found := re.fullmatch(r"bytes=(\d*)-(\d*)", asked.headers.get("Range", "bytes=-").strip())):
            raise Refusal(400, "One range of bytes at a time")
        first, last = found.groups()
        if not first and not last:
            return Answer(content, 200, headers, whole=size)
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= end:
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return Answer(content[start:end], 206, headers, start, size)

    def _whoami(self, asked: Request) -> Answer:
        if "Authorization" not in asked.headers:
            raise Refusal(401, "Invalid username or password.")
        access = {"accessToken": {"displayName": "stand-in", "role": "write"}}
        return as_json(
            {"type": "user", "id": "0", "name": "standin", "fullname": "", "orgs": [], "auth": access}
        )

    def _create(self, asked: Request) -> Answer:
        wanted = json.loads(asked.body)
        kind, repo_id = (
            wanted.get("type") or "model",
            f"{wanted.get('organization') or 'standin'}/{wanted['name']}",
        )
        if kind not in ("dataset", "model") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id, re.ASCII):
            raise Refusal(400, "Invalid repository")
        place = f"{self.endpoint}/datasets/{repo_id}" if kind == "dataset" else f"{self.endpoint}/{repo_id}"
        about = {"url": place, "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self._repositories:
            return as_json(about | {"error": "You already created this repository"}, 409)
        self.add(repo_id, {}, kind, "main")
        return as_json(about)

    def _preupload(self, asked: Request) -> Answer:
        files = self._commit(asked)[1]
        answers = []
        for file in json.loads(asked.body)["files"]:
            path, lfs = file["path"], self._is_lfs(file["path"], file["size"])
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in files:  # by this the clients leave out what has not changed
                answer["oid"] = hashlib.sha256(files[path]).hexdigest() if lfs else git_sha(files[path])
            answers.append(answer)
        return as_json({"files": answers})

    def _lfs_batch(self, asked: Request) -> Answer:
        self._repository(asked)
        objects = []
        for wanted in json.loads(asked.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._objects:
                self._announced.add(wanted["oid"])
                place = f"{self.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(answer)
        return as_json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, asked: Request) -> Answer:
        if asked.oid not in self._announced or hashlib.sha256(asked.body).hexdigest() != asked.oid:
            raise Refusal(400, "Not an object that was announced")
        self._objects[asked.oid] = asked.body
        return Answer()

    def _lfs_verify(self, asked: Request) -> Answer:
        if len(self._objects.get(asked.oid, b"")) != json.loads(asked.body)["size"]:
            raise Refusal(404, "Object not found")
        return Answer()

    def _make_commit(self, asked: Request) -> Answer:
        if asked.query.get("create_pr"):
            raise Refusal(404, "The stand-in hub has no pull requests")
        sha, before = self._commit(asked)
        if asked.rev not in self._repository(asked).refs:
            raise Refusal(404, "Not a branch", "RevisionNotFound")
        files = dict(before)
        for line in filter(None, asked.body.splitlines()):
            operation = json.loads(line)
            self._apply(operation["key"], operation["value"], files, sha)
        oid = self.add(asked.repo, files, asked.kind, asked.rev)
        prefix = "datasets/" if asked.kind == "dataset" else ""
        place = f"{self.endpoint}/{prefix}{asked.repo}/commit/{oid}"
        return as_json({"success": True, "commitOid": oid, "commitUrl": place, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, bytes], parent: str) -> None:
        """Do one operation of a commit to `files`, which are kept only if all operations succeed."""
        if key == "header":
            if value.get("parentCommit") not in (None, parent):
                raise Refusal(412, "A commit has happened since")
            return
        path = value["path"].removesuffix("/") if key == "deletedFolder" else value["path"]
        if is_unsafe(path):
            raise Refusal(400, "Invalid path in a commit")
        if key == "file":
            content = value["content"]
            files[path] = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
        elif key == "lfsFile":
            if value["oid"] not in self._objects:
                raise Refusal(400, "An LFS object was never uploaded")
            files[path] = self._objects[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                name
                for name in files
                if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))
            ]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, "Unknown operation in a commit")


_REPO = r"/api/(?P<kind>dataset|model)s/(?P<repo>[^/]+/[^/]+)"
_REV = r"(?P<rev>refs/(?:convert|pr)/[^/]+|[^/]+)"  # clients quote the slashes of these, people often do not
_GIT = r"/(?:(?P<kind>dataset)s/)?(?P<repo>[^/]+/[^/]+)"
_Route = Callable[[Store, Request], Answer]
_ROUTES: tuple[tuple[tuple[str, ...], str, _Route], ...] = (
    (("GET",), "/api/whoami-v2", Store._whoami),
    (("POST",), "/api/repos/create", Store._create),
    # The hub reads the README's metadata here; without a YAML parser all of them pass.
    (("POST",), "/api/validate-yaml", lambda store, asked: as_json({"errors": [], "warnings": []})),
    (("GET",), _REPO, Store._info),
    (("GET",), f"{_REPO}/revision/{_REV}", Store._info),
    (("GET",), f"{_REPO}/refs", Store._refs),
    (("GET",), f"{_REPO}/tree/{_REV}(?:/(?P<path>.+))?", Store._tree),
    (("POST",), f"{_REPO}/paths-info/{_REV}", Store._paths_info),
    (("POST",), f"{_REPO}/preupload/{_REV}", Store._preupload),
    (("POST",), f"{_REPO}/commit/{_REV}", Store._make_commit),
    (("GET", "HEAD"), f"{_GIT}/resolve/{_REV}/(?P<path>.+)", Store._resolve),
    (("POST",), rf"{_GIT}\.git/info/lfs/objects/batch", Store._lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", Store._lfs_put),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/verify", Store._lfs_verify),
)
