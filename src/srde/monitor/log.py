"""The files of a run's folder: lines of JSON that are only appended, and small JSON files that are replaced whole.

    run.json         what the run is: steps, phases, experts, layers; replaced whole
    metrics.jsonl    one JSON object a line for every logged step and every evaluation
    events.jsonl     one JSON object a line for what happened to the run's processes
    heartbeat.json   the last sign of life; replaced whole

A process can be killed in the middle of a line, and a reader can come while one is being written. Therefore a line counts
once its line break is there, and the last line is left out when it is not JSON. Whoever appends next cuts such a torn tail off
first, so that it never ends up in the middle of the file.

Covered: a process killed at any moment, a full disk, bad UTF-8 in the tail, a reader beside the writer. Not covered: power loss
between two lines (a line is handed to the system, not forced onto the disk), two processes that append to one file while one of
them truncates it.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from srde.artifacts.disk import flush, means_disk_full
from srde.artifacts.folder import disk_full
from srde.errors import ArtifactError

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
HEARTBEAT_FILE = "heartbeat.json"

_BLOCK = 1 << 16
_SEAM = 64  # bytes before the place where a reader stopped that must be the same when it goes on
_replacing = threading.Lock()


class MetricsLog:
    """Appends JSON objects to a file, one a line. One process writes a file at a time; its threads may share the log.

    Args:
        path: The file. It is made with the first line; its folder must be there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._mended = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line and hands it to the operating system.

        Args:
            record: Plain JSON values. Floats that are not finite become null: JSON has no word for them.

        Raises:
            ArtifactError: The disk is full; the file is as it was before.
            TypeError: A value is not JSON.
        """
        line = _dumps(record).encode() + b"\n"
        with self._lock:
            if not self._mended:
                self._cut_torn_tail()
                self._mended = True
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _write_whole(descriptor, line)
            except OSError as error:
                if means_disk_full(error):
                    raise disk_full(self.path, len(line)) from error
                raise
            finally:
                os.close(descriptor)

    def truncate_after(self, step: int, drop: Callable[[dict[str, Any]], bool] = lambda _: False) -> int:
        """Drops a torn tail and every line of a later step; for going on from that step's checkpoint.

        The file is written anew beside the old one and takes its place in one move: killed at any moment, one of the two
        stands. Lines without a `step` stay.

        Args:
            step: The last step whose lines stay.
            drop: Tells of an earlier line that it goes too.

        Returns:
            How many lines went, a torn tail counting as one.

        Raises:
            ArtifactError: A line before the last is not JSON, or the disk is full.
        """
        with self._lock:
            if not self.path.exists():
                return 0
            gone = 0

            def kept() -> Iterator[bytes]:
                nonlocal gone
                with open(self.path, "rb") as stream:
                    for raw, record in _records(stream, self.path):
                        if record is None or _step_of(record, step) > step or drop(record):
                            gone += 1
                        else:
                            yield raw

            _replace(self.path, kept(), unless=lambda: not gone)
            self._mended = True
            return gone

    def _cut_torn_tail(self) -> None:
        """Shortens the file to its last whole line, so that the next one starts on a line of its own."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as stream:
            start, tail = _last_line(stream)
            if tail and _parse(tail) is None:
                stream.truncate(start)


class Sink(Protocol):
    """What takes the lines of a file: a list, or something that keeps less of them."""

    def append(self, record: dict[str, Any], /) -> None:
        """Takes the next line."""

    def clear(self) -> None:
        """Forgets all lines: the file is another one than before."""


class LineReader:
    """Reads a file of JSON lines that grows, each time only what is new.

    Args:
        path: The file; as long as there is none, there are no lines.
        sink: Takes the lines. It is cleared when the file is not the one it was (a resumed run has truncated it, say), and
            gets all lines of the new one.
    """

    def __init__(self, path: str | os.PathLike[str], sink: Sink) -> None:
        self.path = Path(path)
        self.sink = sink
        self._offset = 0
        self._line = 0
        self._seam = b""

    def poll(self) -> None:
        """Reads the lines since the last call; a last line that is not whole is left for the next.

        Raises:
            ArtifactError: A line before the last is not a JSON object.
        """
        try:
            stream = open(self.path, "rb")  # noqa: SIM115 - only a missing file is forgiven, not a failing read
        except FileNotFoundError:
            self._start_anew()
            return
        with stream:
            stream.seek(self._offset - len(self._seam))
            if stream.read(len(self._seam)) != self._seam:
                self._start_anew()
            stream.seek(self._offset)
            for raw, record in _records(stream, self.path, self._line):
                if record is None:
                    return
                self._offset += len(raw)
                self._line += 1
                self._seam = raw[-_SEAM:]
                self.sink.append(record)

    def _start_anew(self) -> None:
        if self._offset:
            self._offset, self._line, self._seam = 0, 0, b""
            self.sink.clear()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of a file of JSON objects; none if nobody has written one yet.

    A torn last line (no line break, no JSON, bad UTF-8) is left out.

    Raises:
        ArtifactError: A line before the last is not a JSON object; the message has file and line.
    """
    lines: list[dict[str, Any]] = []
    LineReader(path, lines).poll()
    return lines


def replace_json(path: str | os.PathLike[str], value: object) -> None:
    """Writes a JSON file that appears whole or not at all; a reader sees the old or the new one.

    One process writes a file at a time. Floats that are not finite become null.

    Raises:
        ArtifactError: The disk is full; the old file stands.
        TypeError: The value is not JSON.
    """
    _replace(Path(path), [_dumps(value, indent=1).encode() + b"\n"])


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object that `replace_json` wrote.

    Raises:
        ArtifactError: There is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ArtifactError.of(
            "file", str(path), rule="there is no such file", fix="Check the path"
        ) from None
    except ValueError as error:
        raise ArtifactError.of(
            "file", str(path), rule=f"must be JSON in UTF-8: {error}", fix="Remove it or restore it from a copy"
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise ArtifactError.of(
            "file", str(path), rule="must hold a JSON object", fix="Remove it or restore it from a copy"
        )
    return value


def _dumps(value: object, indent: int | None = None) -> str:
    separators = (",", ":") if indent is None else None
    try:
        return json.dumps(value, allow_nan=False, indent=indent, separators=separators)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, indent=indent, separators=separators)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _step_of(record: Mapping[str, Any], otherwise: int) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else otherwise


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The object of a line; None when the line is not whole or not an object."""
    if not raw.endswith(b"\n"):
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _records(
    stream: BinaryIO, path: Path, lines_before: int = 0
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its object; the last line with None if it is torn.

    Raises:
        ArtifactError: A line that others follow is broken.
    """
    for number, raw in enumerate(stream, start=lines_before + 1):
        record = _parse(raw)
        if record is None and raw.endswith(b"\n") and stream.readline():
            raise ArtifactError.of(
                "line", f"{path}:{number}", rule="it is not a JSON object, and others follow it",
                fix="Restore the file from a copy, or remove this line",
            )  # fmt: skip
        yield raw, record


def _last_line(stream: BinaryIO) -> tuple[int, bytes]:
    """Where the last line starts, and its bytes; read from the end, as the file may be long."""
    start = stream.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail[:-1]:
        step = min(_BLOCK, start)
        start = stream.seek(start - step)
        tail = stream.read(step) + tail
    cut = tail.rfind(b"\n", 0, max(len(tail) - 1, 0)) + 1
    return start + cut, tail[cut:]


def _write_whole(descriptor: int, line: bytes) -> None:
    """Writes a line or nothing: what a full disk took of it is taken back."""
    before = os.fstat(descriptor).st_size
    done = 0
    try:
        while done < len(line):
            done += os.write(descriptor, line[done:])
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _replace(path: Path, parts: Iterable[bytes], unless: Callable[[], bool] = lambda: False) -> None:
    """Writes a new file beside `path`, forces it onto the disk and gives it the name, unless there is no need after all.

    The temporary name is always the same, so that the next write clears away what a killed one left.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with _replacing:
        try:
            with open(temporary, "wb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
            if unless():
                return
            os.replace(temporary, path)
        except OSError as error:
            if means_disk_full(error):
                raise disk_full(path) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        flush(path.parent)
