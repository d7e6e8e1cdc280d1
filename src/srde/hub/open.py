"""Opens whatever holds experts: an adapter on its base, or a SaRDinE model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srde.artifacts import MANIFEST_NAME, verify
from srde.data.tokenizers import explained, load_tokenizer
from srde.errors import ArtifactError, ConfigError, UsageError
from srde.tuner.auto import keep_weights_unpacked
from srde.tuner.loading import DTYPES, load_adapter, quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from srde.tuner.names import NamedExperts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = (".pt", ".pth", ".bin")


def adapter_folder(name: str) -> str:
    """The folder or hub id that a user means; a file in a folder means the folder.

    So ``checkpoint-100/srde_weights.pt``, as older scripts name it, is ``checkpoint-100`` where that holds an adapter.

    Raises:
        ArtifactError: It is an old file of weights, which is a pickle, or another file.
    """
    path = Path(name)
    if path.is_dir():
        return name
    inside = (path.parent / "adapter_config.json").is_file() or (path.parent / "config.json").is_file()
    if path.is_file() and path.suffix in _PICKLES:
        raise ArtifactError.of(
            "srde_weights", name, rule="an old file of weights is a pickle, and is not read",
            fix="make an adapter of it once with `srde import --srde_weights ... --output_dir ...`, and name that folder",
        )  # fmt: skip
    if inside and (path.is_file() or path.suffix in (*_PICKLES, ".safetensors")):
        return str(path.parent)
    if path.is_file():
        raise ArtifactError.of(
            "adapter", name, rule="this file is not in a folder with an adapter_config.json",
            fix="name the --output_dir of srde train",
        )  # fmt: skip
    return name


def open_model(
    name: str, dtype: str = "auto", base: str | None = None, *, quantization: str = "none"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model with experts, in evaluation mode, and its tokenizer.

    Args:
        name: An adapter, or a model that `srde export --format sardine` wrote: a folder, a file in it, or a hub id.
        dtype: Type of the base's weights; "auto" keeps the checkpoint's.
        base: Another place to load the same base from.
        quantization: "nf4" or "int8" quantises the base's weights while loading.

    Raises:
        ArtifactError: There is nothing of the kind, it is damaged, or made for another base.
        ConfigError: The base cannot be loaded, or a setting is unknown.
    """
    name = adapter_folder(name)
    if not _is_sardine(name):
        return load_adapter(name, dtype, base, quantization=quantization)
    from srde.hub.sardine import SaRDinEForCausalLM

    if dtype not in DTYPES:
        raise ConfigError.of(
            "dtype", dtype, rule=f"it must be one of {', '.join(DTYPES)}", fix="pick one of them"
        )
    if (Path(name) / MANIFEST_NAME).is_file():
        verify(name)
    options: dict[str, Any] = {} if base is None else {"base_model_name_or_path": base}
    if quantization != "none":
        options["quantization_config"] = quantization_config(quantization, dtype)
    with explained("adapter", name):
        wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
        model = SaRDinEForCausalLM.from_pretrained(name, dtype=wanted, **options)
    keep_weights_unpacked(model)
    return model.eval(), load_tokenizer(name)


def experts_config(model: Any) -> NamedExperts:
    """The configuration that knows a model's experts by name and number: of the active adapter, or of a SaRDinE model.

    Raises:
        UsageError: The model has no experts, or several adapters are active.
    """
    if hasattr(model, "peft_config"):
        names = list(model.active_adapters)
        if len(names) != 1:
            raise UsageError.of(
                "active adapters", names, rule="experts are named for one adapter at a time",
                fix="call model.set_adapter with one name",
            )  # fmt: skip
        return model.peft_config[names[0]]
    if hasattr(getattr(model, "config", None), "experts_named"):
        return model.config
    raise UsageError.of(
        "model", type(model).__name__, rule="it has no experts", fix="load an adapter, or a SaRDinE model"
    )


def _is_sardine(name: str) -> bool:
    """Whether a folder or repository holds a SaRDinE model; an adapter has no config.json of its own."""
    from transformers.utils.hub import cached_file

    if Path(name).is_dir():
        file: str | None = str(Path(name) / "config.json")
    elif not _HUB_ID.fullmatch(name):
        return False
    else:
        file = cached_file(
            name, "config.json", _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
    if file is None or not Path(file).is_file():
        return False
    try:
        kind = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        return False
    return bool(kind == "sardine")
