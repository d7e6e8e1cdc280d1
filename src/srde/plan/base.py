"""The base model of a plan: its configuration, and the model itself on the meta device, where weights take no memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from srde.errors import ConfigError, UnsupportedModelError
from srde.tuner.auto import auto_class

FIELD = "model_name_or_path"

# A fused attention kernel keeps no attention scores, and of their dropout only a seed. PyTorch's kernel for CPUs has no
# dropout and would fall back to unfused products, which keep them all: so a plan runs without attention dropout.
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")


def read_config(name: str) -> PreTrainedConfig:
    """Reads a model's configuration, and nothing else of it.

    Args:
        name: A local folder with a `config.json`, the path of such a file, or a model of the hub.

    Raises:
        ConfigError: There is no such file or model, it is not JSON, or Transformers cannot read it.
    """
    path = Path(name).expanduser()
    if path.exists():
        name = str(_check_file(path, name))
    elif name.endswith(".json") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError.of(
            FIELD,
            name,
            rule="there is no such file or folder",
            fix="check the path; it starts where the command is run",
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ConfigError.of(
            FIELD, name, rule=f"it is no local path, and the hub gave no configuration: {_first_line(error)}",
            fix="check the name and the connection, or download config.json and name its path",
        ) from error  # fmt: skip
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ConfigError.of(
            FIELD, name, rule=f"Transformers {transformers.__version__} cannot read its configuration: {_first_line(error)}",
            fix="name a model that this version of Transformers knows",
        ) from error  # fmt: skip


def build_base(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model on the meta device: every module, every shape, no weight.

    Raises:
        UnsupportedModelError: The architecture has no causal language model.
        ConfigError: The configuration's own values contradict each other.
    """
    if (auto := auto_class(config)) is None:
        raise UnsupportedModelError.of(
            "model_type", config.model_type, rule="Transformers has no causal language model of this architecture",
            fix="plan for a model that AutoModelForCausalLM or AutoModelForImageTextToText can load",
        )  # fmt: skip
    for part in (config, config.get_text_config()):
        for field in ATTENTION_DROPOUT:
            if hasattr(part, field):
                setattr(part, field, 0.0)
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype)
    except (ValueError, TypeError, ZeroDivisionError, ImportError) as error:
        raise ConfigError.of(
            "model_type", config.model_type, rule=f"its configuration does not build: {_first_line(error)}",
            fix="correct config.json",
        ) from error  # fmt: skip


def check_length(config: PreTrainedConfig, lengths: Sequence[int]) -> None:
    """Refuses a length for which the model has no positions.

    Raises:
        ConfigError: A length is above the configuration's `max_position_embeddings`.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        raise ConfigError.of(
            "max_length",
            max(lengths),
            rule=f"the model has positions for {most} tokens",
            fix=f"use {most} or less",
        )


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _check_file(path: Path, name: str) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError.of(
            FIELD,
            name,
            rule="the folder holds no config.json",
            fix="name a model's folder, or the file itself",
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        where = f"{file}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(file)
        raise ConfigError.of(
            FIELD,
            where,
            rule=f"it is not JSON: {_first_line(error)}",
            fix="name a model's config.json, whole and unedited",
        ) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError.of(
            FIELD, str(file), rule="a model's configuration is a JSON object with a model_type",
            fix="name the config.json of a Transformers model",
        )  # fmt: skip
    return file


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = (
        2 if isinstance(error, StrictDataclassError) else 1
    )  # its first line names the field, the second the rule
    return " ".join(lines[:count]).rstrip(".")
