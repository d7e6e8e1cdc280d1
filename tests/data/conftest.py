"""Tiny tokenizers, and the shared data where it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

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
