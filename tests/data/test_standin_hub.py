"""The stand-in hub, asked by the real clients: what they load, what they upload, and how they fail.

The clients read their settings when they are imported and the tests run offline, so they live in a process of their
own (`Client`), which evaluates one expression after another.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from standin_hub import StandInHub

# Waits between retries are left out, and `datasets` reads twenty times less often: mid-stream, a lost hub would
# otherwise be given up after 20 readings of 6 requests and 28 seconds of waiting each. Neither can be set from outside.
# A hub that does hang an expression ends the process, and with it the test.
CLIENT = """
import faulthandler, json, sys, time
import datasets, huggingface_hub as hub
from huggingface_hub import HfApi

time.sleep = lambda seconds: None
datasets.config.STREAMING_READ_MAX_RETRIES = 1
answers, sys.stdout = sys.stdout, sys.stderr
kept = {}
for line in sys.stdin:
    faulthandler.dump_traceback_later(30, exit=True)
    try:
        answer = {"value": eval(json.loads(line))}
    except Exception as error:
        answer = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(answer), file=answers, flush=True)
"""
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SHORT = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


class Client:
    """`huggingface_hub` as `hub` and `datasets` in a process that knows one stand-in hub."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def _ask(self, expression: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(expression) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the clients' process ended over {expression}"
        return json.loads(line)

    def value(self, expression: str) -> Any:
        answer = self._ask(expression)
        assert "value" in answer, answer
        return answer["value"]

    def error(self, expression: str) -> list[str]:
        """The names of the exception's class and of all that it derives from."""
        answer = self._ask(expression)
        assert "error" in answer, answer
        return answer["error"]


@contextmanager
def clients_of(hub: StandInHub, home: Path) -> Iterator[Client]:
    command = [sys.executable, "-c", CLIENT]
    environment = hub.environment(home, **QUIET, **SHORT)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield Client(process)


@pytest.fixture(scope="module")
def hub() -> Iterator[StandInHub]:
    """One for all tests here, each of which names its repositories differently: starting clients takes a second."""
    with StandInHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with clients_of(hub, tmp_path_factory.mktemp("home")) as client:
        yield client


def texts(count: int, start: int = 0) -> list[str]:
    return [f"row {index}" for index in range(start, start + count)]


def rows_file(ending: str, rows: list[str]) -> bytes:
    if ending == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), buffer)
        return buffer.getvalue()
    objects = [{"text": row} for row in rows]
    return (json.dumps(objects) if ending == "json" else "\n".join(map(json.dumps, objects))).encode()


def fetch(
    url: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """What a plain request gets, errors included; no proxy stands between."""
    request = urllib.request.Request(url, body, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
def test_rows_streamed_and_whole(hub: StandInHub, client: Client, ending: str):
    name = f"owner/{ending}"
    hub.add(
        name, {f"train.{ending}": rows_file(ending, texts(5)), f"test.{ending}": rows_file(ending, ["x"])}
    )
    streamed = client.value(f"list(datasets.load_dataset({name!r}, split='train', streaming=True))")
    assert [row["text"] for row in streamed] == texts(5)
    assert client.value(f"{{k: v['text'][:] for k, v in datasets.load_dataset({name!r}).items()}}") == {
        "train": texts(5),
        "test": ["x"],
    }


def test_configs_of_the_readme(hub: StandInHub, client: Client):
    readme = """---
configs:
- config_name: first
  data_files:
  - split: train
    path: first/train-*.parquet
  - split: test
    path: first/test.parquet
- config_name: second
  data_files: second/*.parquet
---
"""
    names = ["first/train-0", "first/train-1", "first/test", "second/all"]
    files = {f"{name}.parquet": rows_file("parquet", texts(2 + i)) for i, name in enumerate(names)}
    hub.add("owner/configs", {"README.md": readme.encode(), **files})
    load = "datasets.load_dataset('owner/configs'"
    assert client.value("datasets.get_dataset_config_names('owner/configs')") == ["first", "second"]
    assert client.value(f"{load}, 'first').num_rows") == {"train": 5, "test": 4}
    assert client.value(f"len(list({load}, 'second', split='train', streaming=True)))") == 5


def test_revisions(hub: StandInHub, client: Client):
    old = hub.add("owner/revised", {"train.jsonl": rows_file("jsonl", ["old"])})
    new = hub.add("owner/revised", {"train.jsonl": rows_file("jsonl", ["new"])})
    hub.add(
        "owner/revised",
        {"p/train/0.parquet": rows_file("parquet", ["converted"])},
        revision="refs/convert/parquet",
    )
    assert old != new == hub.add("owner/revised", {"train.jsonl": rows_file("jsonl", ["new"])})
    for revision, text in {"main": "new", old: "old", "refs/convert/parquet": "converted"}.items():
        load = f"datasets.load_dataset('owner/revised', split='train', revision={revision!r}"
        assert client.value(f"{load})['text'][:]") == [text]
        assert client.value(f"list({load}, streaming=True))") == [{"text": text}]


def test_files_and_their_names(hub: StandInHub, client: Client, tmp_path: Path):
    files = {"config.json": b"{}", "a/b/ü 1.txt": b"deep", "a/empty": b""}
    sha = hub.add("owner/model", files, repo_type="model")
    assert client.value("HfApi().list_repo_files('owner/model')") == sorted(files)
    assert client.value("HfApi().model_info('owner/model').sha") == sha
    assert client.value("[i.path for i in HfApi().list_repo_tree('owner/model', 'a')]") == ["a/b", "a/empty"]
    infos = "HfApi().get_paths_info('owner/model', ['a/b/ü 1.txt', 'a', 'none'])"
    assert client.value(f"[i.path for i in {infos}]") == ["a/b/ü 1.txt", "a"]
    client.value(f"hub.snapshot_download('owner/model', local_dir={str(tmp_path)!r})")
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


def test_ranges(hub: StandInHub, client: Client):
    hub.add("owner/ranges", {"letters": b"abcdefghij"})
    url = f"{hub.endpoint}/datasets/owner/ranges/resolve/main/letters"
    for asked, body in {"2-4": b"cde", "7-": b"hij", "-2": b"ij", "8-99": b"ij"}.items():
        status, found, headers = fetch(url, Range=f"bytes={asked}")
        assert (status, found, headers["Content-Length"]) == (206, body, str(len(body)))
    assert fetch(url, Range="bytes=2-4")[2]["Content-Range"] == "bytes 2-4/10"
    assert fetch(url, Range="bytes=10-")[0] == 416
    assert fetch(url, "HEAD")[2]["Content-Length"] == "10"
    resumed = f"hub.file_download.http_get({url!r}, kept.setdefault('file', __import__('io').BytesIO(b'abc')), resume_size=3)"
    assert client.value(f"kept.clear() or {resumed} or kept['file'].getvalue().decode()") == "defghij"


def test_unknown_names(hub: StandInHub, client: Client):
    hub.add("owner/known", {"train.jsonl": rows_file("jsonl", ["a"])})
    download = "hub.hf_hub_download(repo_type='dataset', repo_id="
    assert "RepositoryNotFoundError" in client.error(f"{download}'owner/unknown', filename='x')")
    assert "RevisionNotFoundError" in client.error(f"{download}'owner/known', filename='x', revision='v9')")
    assert "EntryNotFoundError" in client.error(f"{download}'owner/known', filename='x')")
    for arguments in ("'owner/unknown'", "'owner/known', revision='v9'"):
        assert "DatasetNotFoundError" in client.error(f"datasets.load_dataset({arguments}, streaming=True)")
    assert fetch(f"{hub.endpoint}/api/datasets/owner/known/croissant")[0] == 404


def test_token(tmp_path: Path):
    with StandInHub(token="right") as hub, clients_of(hub, tmp_path / "home") as client:
        hub.add("owner/private", {"train.jsonl": rows_file("jsonl", texts(3))})
        load = "datasets.load_dataset('owner/private', split='train', streaming=True"
        info = "HfApi().dataset_info('owner/private', token="
        assert "DatasetNotFoundError" in client.error(f"{load})")
        assert "RepositoryNotFoundError" in client.error(f"{info}False)")
        assert client.error(f"{info}'wrong')")[0] == "HfHubHTTPError"
        assert fetch(f"{hub.endpoint}/datasets/owner/private/resolve/main/train.jsonl")[0] == 401
        assert set(hub.authorizations) == {"Bearer wrong"}
        assert len(client.value(f"list({load}, token='right'))")) == 3
        assert client.value(f"{info}'right').private") is True
        assert client.value("HfApi().whoami(token='right')['name']") == "standin"
        assert set(hub.authorizations) == {"Bearer wrong", "Bearer right"}


@pytest.mark.parametrize("lfs", [False, True])
def test_upload(tmp_path: Path, lfs: bool):
    """Inside the commit with Xet left as it is, and through git-LFS where the hub asks for that."""
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "data" / "train.parquet").write_bytes(rows_file("parquet", texts(4)))
    (folder / "large.bin").write_bytes(bytes(10_600_000))
    with StandInHub(token="t", lfs=lfs) as hub, clients_of(hub, tmp_path / "home") as client:
        api = "HfApi(token='t')"
        create = f"{api}.create_repo('owner/up', repo_type='dataset', exist_ok="
        upload = (
            f"str({api}.upload_folder(repo_id='owner/up', repo_type='dataset', folder_path={str(folder)!r}))"
        )
        assert client.value(f"{create}True)") == client.value(f"{create}True)")
        assert client.error(f"{create}False)")[0] == "HfHubHTTPError"
        commit = client.value(upload)
        names = ("README.md", "data/train.parquet", "large.bin")
        assert hub.files("owner/up") == {name: (folder / name).read_bytes() for name in names}
        assert [method for method, _ in hub.requests].count("PUT") == (2 if lfs else 0)
        assert client.value(upload) == commit  # nothing has changed
        load = "datasets.load_dataset('owner/up', data_files='data/*.parquet', split='train', token='t')"
        assert client.value(f"{load}['text'][:]") == texts(4)
        client.value(f"str({api}.delete_file('large.bin', 'owner/up', repo_type='dataset'))")
        assert sorted(hub.files("owner/up")) == ["README.md", "data/train.parquet"]


@pytest.mark.security
@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/etc/out", "a\\..\\out", "C:/out", "a//b", ".", "", "a\nb"]
)
def test_unsafe_names(hub: StandInHub, name: str):
    hub.add("owner/safe", {"kept": b"kept"})
    operations = [
        {"key": "header", "value": {"summary": "Upload"}},
        {"key": "file", "value": {"path": "good", "content": "eA==", "encoding": "base64"}},
        {"key": "file", "value": {"path": name, "content": "eA==", "encoding": "base64"}},
    ]
    url = f"{hub.endpoint}/api/datasets/owner/safe/commit/main"
    assert fetch(url, "POST", "\n".join(map(json.dumps, operations)).encode())[0] == 400
    assert hub.files("owner/safe") == {"kept": b"kept"}
    assert fetch(url, "POST", "\n".join(map(json.dumps, operations[:2])).encode())[0] == 200
    assert hub.files("owner/safe") == {"kept": b"kept", "good": b"x"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("refuse", "RemoteProtocolError"),
        ("drop", "RemoteProtocolError"),
        ("503", "HfHubHTTPError"),
        pytest.param("hang", "ReadTimeout", marks=pytest.mark.slow),  # waits for six time-outs
    ],
)
def test_faults_in_a_download(hub: StandInHub, client: Client, how: Any, expected: str):
    """The first request asks for the file's size and is answered; the client gives up over the file itself."""
    name = f"owner/fault-{how}"
    hub.add(name, {"file": bytes(1000)})
    download = f"hub.hf_hub_download({name!r}, 'file', repo_type='dataset')"
    hub.fail(1, how)
    try:
        assert expected in client.error(download)
    finally:
        hub.heal()
    assert Path(client.value(download)).read_bytes() == bytes(1000)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["refuse", "drop"])
def test_faults_in_a_stream(hub: StandInHub, client: Client, how: Any):
    name = f"owner/stream-{how}"
    hub.add(name, {f"train-{i}.jsonl": rows_file("jsonl", texts(3, 3 * i)) for i in range(2)})
    client.value(
        f"kept.update(rows=iter(datasets.load_dataset({name!r}, split='train', streaming=True))) or next(kept['rows'])"
    )
    hub.fail(0, how)
    try:
        assert "ConnectionError" in client.error("list(kept['rows'])")
    finally:
        hub.heal()
    assert len(client.value(f"list(datasets.load_dataset({name!r}, split='train', streaming=True))")) == 6


@pytest.mark.faults
def test_no_answers_after_the_end():
    with StandInHub() as hub:
        hub.add("owner/rows", {"file": b"x"})
        url = f"{hub.endpoint}/datasets/owner/rows/resolve/main/file"
        assert fetch(url)[1] == b"x"
    with pytest.raises(urllib.error.URLError):
        fetch(url)


def test_by_hand(tmp_path: Path):
    (tmp_path / "owner" / "rows" / ".git").mkdir(parents=True)
    (tmp_path / "owner" / "rows" / ".git" / "config").write_text("hidden")
    (tmp_path / "owner" / "rows" / "train.jsonl").write_bytes(b"{}")
    script = Path(__file__).resolve().parents[1] / "standin_hub.py"
    command = [sys.executable, "-u", str(script), "--port", "0", "--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(4)]
            assert lines[0] == "owner/rows: 1 files"
            endpoint = lines[3].removeprefix("export HF_ENDPOINT=")
            assert fetch(f"{endpoint}/datasets/owner/rows/resolve/main/train.jsonl")[1] == b"{}"
        finally:
            process.terminate()
