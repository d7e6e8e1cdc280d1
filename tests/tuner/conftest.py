"""A saved tiny base, an adapter saved for it, and copies of the adapter to damage."""

import shutil
from pathlib import Path

import pytest
from adapters import config, fill, load_base, tokens
from peft import get_peft_model

from srde.artifacts import MANIFEST_NAME
from tiny import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def saved(base, tmp_path_factory):
    """A saved adapter and the logits of the model that saved it."""
    folder = tmp_path_factory.mktemp("saved")
    model = fill(get_peft_model(load_base(base), config(num_shared_experts=1))).eval()
    model.save_pretrained(folder)
    return str(folder), model(tokens()).logits


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the saved adapter."""
    return Path(shutil.copytree(saved[0], tmp_path / "copied"))


@pytest.fixture
def unsealed(copied):
    """A copy without its manifest."""
    (copied / MANIFEST_NAME).unlink()
    return copied
