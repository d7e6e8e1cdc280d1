"""Which modules of a model can carry experts."""

from __future__ import annotations

from torch import nn

from srde.core.layout import MlpLayout, find_mlps
from srde.errors import UnsupportedModelError


def find_sites(model: nn.Module) -> dict[str, MlpLayout]:
    """The MLPs that can carry experts. In a model of several modalities, those of the text decoder.

    Raises:
        UnsupportedModelError: There are none; the message lists what was looked at.
    """
    root, prefix = model, ""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config") and config.get_text_config() is not config:
        root = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is root) + "."
    found = find_mlps(root)
    if not found.layouts:
        raise UnsupportedModelError(no_mlp_message(model, found.rejected))
    return {prefix + name if name else prefix.rstrip("."): layout for name, layout in found.layouts.items()}


def no_mlp_message(model: nn.Module, rejected: dict[str, str]) -> str:
    """What was looked at in a model without a usable MLP."""
    looked = [f"  {name or '(the model itself)'}: {why}" for name, why in list(rejected.items())[:5]]
    if len(rejected) > 5:
        looked.append(f"  and {len(rejected) - 5} more")
    if not looked:
        kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.children())})
        looked = [f"  no module whose linear children fit together, among: {', '.join(kinds[:12])}"]
    return (
        f"model={type(model).__name__!r}: no MLP of this model can carry experts: one or two D -> F matrices, an "
        "activation and one F -> D matrix are needed. Looked at:\n" + "\n".join(looked)
    )
