"""Fixtures for all tests. Its folder is on the path, so that every test can import `tiny`."""

import os
import signal
from pathlib import Path

import pytest

from srde.errors import UsageError
from srde.quickstart.default_model import default_model

# In the background a shell has SIGINT ignored, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as the quickstart converts it, or the folder that SRDE_SMOLLM2 names."""
    if named := os.environ.get("SRDE_SMOLLM2"):
        return Path(named)
    try:
        return default_model()
    except UsageError as error:
        pytest.skip(str(error))
