"""Fixtures for all tests. Its folder is on the path, so that every test can import `tiny`."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a converted SmolLM2-135M-Instruct, named by the environment variable SRDE_SMOLLM2."""
    named = os.environ.get("SRDE_SMOLLM2")
    if not named:
        pytest.skip("SRDE_SMOLLM2 is not set: nothing is tested on SmolLM2-135M-Instruct")
    folder = Path(named)
    assert (folder / "config.json").is_file(), f"SRDE_SMOLLM2={named!r} holds no model"
    return folder
