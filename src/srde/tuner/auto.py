"""Base models as Transformers loads them: their class, and what must be set before they run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads or builds a model: of causal language models; or, where the checkpoint is one of several modalities
    (Ministral-3), of those, whose text decoder gets the experts. None if Transformers has neither."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def keep_weights_unpacked(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights for AVX512-BF16 CPUs.

    With it, a forward in eval mode before training destroys the gradients, and saving can corrupt the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
