"""Loads what a user names: a base model, an adapter folder or hub id."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srde.data.tokenizers import explained, first_line, load_tokenizer
from srde.errors import ArtifactError, ConfigError
from srde.tuner.auto import auto_class, keep_weights_unpacked

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(
    name_or_path: str, dtype: str = "auto", *, quantization: str = "none", **kwargs: Any
) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        name_or_path: A hub id or a local folder.
        dtype: "auto" keeps the checkpoint's; or the name of a floating-point type.
        quantization: "nf4" (bitsandbytes) or "int8" (torchao, weights only) quantises the weights while loading.
        kwargs: For Transformers' `from_pretrained`, such as `quantization_config` or `device_map`.

    Raises:
        ConfigError: The dtype is unknown, or there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError.of(
            "dtype", dtype, rule=f"it must be one of {', '.join(DTYPES)}", fix="pick one of them"
        )
    if quantization != "none":
        kwargs["quantization_config"] = quantization_config(quantization, dtype)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    with explained("model_name_or_path", name_or_path):
        # a model that neither has gets the words of the first
        auto = auto_class(AutoConfig.from_pretrained(name_or_path)) or AutoModelForCausalLM
        model = auto.from_pretrained(name_or_path, dtype=wanted, **kwargs)
    keep_weights_unpacked(model)  # before anything runs it
    return model


def quantization_config(kind: str, dtype: str) -> Any:
    """Transformers' configuration for a kind of quantisation.

    Raises:
        ConfigError: The kind is unknown, or its package is not installed.
    """
    packages = {"nf4": "bitsandbytes", "int8": "torchao"}
    if kind not in packages:
        raise ConfigError.of(
            "quantization", kind, rule="it must be none, nf4 or int8", fix="pick one of them"
        )
    if find_spec(packages[kind]) is None:
        raise ConfigError.of(
            "quantization", kind, rule=f"it needs the package {packages[kind]}, which is not installed",
            fix="run `pip install srde[quant]`",
        )  # fmt: skip
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if dtype == "float32" else torch.bfloat16
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def load_adapter(
    adapter: str, dtype: str = "auto", base: str | None = None, *, quantization: str = "none"
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Loads an adapter on its base, in evaluation mode, and the tokenizer (the adapter's own, or else the base's).

    Args:
        adapter: A folder that `srde train` or `save_pretrained` wrote, or a hub id.
        dtype: As in `load_base`.
        base: Another place to load the same base from.
        quantization: As in `load_base`.

    Raises:
        ArtifactError: There is no adapter, it is damaged, or made for another base.
        ConfigError: The base cannot be loaded.
    """
    from peft import PeftConfig, PeftModel

    from srde.tuner.register import register_srde
    from srde.tuner.store import check_adapter

    peft_type = register_srde()
    check_adapter(adapter)
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ArtifactError.of(
            "adapter", adapter, rule=f"it must be a folder or hub id with an adapter_config.json ({first_line(error)})",
            fix="name the --output_dir of srde train",
        ) from error  # fmt: skip
    if config.peft_type != peft_type:
        raise ArtifactError.of(
            "adapter",
            adapter,
            rule=f"it is a {config.peft_type} adapter, not one of srde",
            fix="load it with PEFT",
        )
    name = base or config.base_model_name_or_path
    if not name:
        raise ArtifactError.of(
            "adapter",
            adapter,
            rule="its adapter_config.json names no base model",
            fix="name the base with --model_name_or_path",
        )
    model = PeftModel.from_pretrained(load_base(name, dtype, quantization=quantization), adapter)
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    return model.eval(), load_tokenizer(adapter if own else name)
