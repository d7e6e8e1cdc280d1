"""Tiny tokenizers, and the shared data where it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from data_sets import rows, write_rows
from srde.data.build.settings import BuildSettings
from tiny import CHAT_TEMPLATE, tiny_tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Makes a fresh tokenizer with the given chat template, SmolLM2's by default."""
    return lambda chat_template=CHAT_TEMPLATE: tiny_tokenizer(chat_template)


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(None)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (text or bytes) to a file and returns its path."""

    def write(*lines: str | bytes) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; it is not part of the project."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SRDE_SHARED_DATA", beside))
    if not any(folder.glob("*.jsonl")):
        pytest.skip(f"the shared data is not at {folder}; set SRDE_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that may be given as --model_name: it holds a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., BuildSettings]:
    """Settings for a build of 120 rows in a folder of the test's."""
    source = write_rows(tmp_path / "in" / "rows.jsonl", rows(120, seed=1))

    def make(name: str | Path, **changes: Any) -> BuildSettings:
        wanted = {"sources": [str(source)], "max_length": 768, "num_proc": 1, "examples_per_domain": 10}
        return BuildSettings(str(tokenizer_folder), str(tmp_path / name), **wanted | changes)

    return make
