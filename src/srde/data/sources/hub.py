"""Reads data sets from the hub as a stream of Arrow tables, by way of `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from srde.data.sources import files as chunked
from srde.data.sources.registry import Source
from srde.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

TIMEOUT = 30.0
"""Seconds that the hub may take to answer one request."""


def resolve_revision(source: Source) -> str:
    """The commit that a source's revision stands for today.

    Raises:
        DataError: The hub does not know the data set or the revision, or does not answer.
    """
    from huggingface_hub import HfApi

    with _told(source):
        limit_waiting()
        return HfApi().dataset_info(source.hub, revision=source.revision, timeout=TIMEOUT).sha


def stream(source: Source, split: str, commit: str, skip: int) -> Iterator[pa.Table]:
    """The records of a split in tables of `CHUNK_ROWS`, the last one shorter.

    Args:
        source: A data set of the hub.
        split: One of its splits.
        commit: The commit to read.
        skip: Tables to leave out at the start.

    Raises:
        DataError: The hub does not answer, or has no such configuration or split.
    """
    with _told(source, split):
        limit_waiting()
        rows = _open(source, split, commit).with_format("arrow")
        if skip:
            rows = rows.skip(skip * chunked.CHUNK_ROWS)
        yield from rows.iter(batch_size=chunked.CHUNK_ROWS)


def limit_waiting() -> None:
    """Gives the client's requests a time-out in this process: by default many of them wait for a silent hub for ever."""
    from huggingface_hub.utils import get_session

    get_session().timeout = TIMEOUT


def _open(source: Source, split: str, commit: str) -> Any:
    import datasets

    # By default a lost connection is tried again for more than nine minutes before anybody hears of it.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
    if source.files:
        if split not in source.files:
            raise ValueError(f"the entry names no file for the split {split!r}")
        at = source.files[split].replace(
            f"hf://datasets/{source.hub}/", f"hf://datasets/{source.hub}@{commit}/"
        )
        return datasets.load_dataset("json", data_files={split: at}, split=split, streaming=True)
    # The hub's own parquet copies have no configurations, only folders named after them.
    convert = (source.revision or "").startswith("refs/convert/")
    where = {"data_dir": source.config} if convert and source.config else {"name": source.config}
    return datasets.load_dataset(source.hub, split=split, revision=commit, streaming=True, **where)


@contextmanager
def _told(source: Source, split: str | None = None) -> Iterator[None]:
    """Turns what the clients raise into an error that names the source; they have no common base for it."""
    try:
        yield
    except (DataError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
                :300
            ]
        )
        place = source.place + (f", split {split}" if split else "")
        raise DataError.at(
            f"source {source.name}",
            None,
            place,
            f"could not be read from the hub ({reason}). What is already there is kept: check the network and the name (a "
            "private data set needs HF_TOKEN), and run the same command again; or leave the source out with --sources",
        ) from error
