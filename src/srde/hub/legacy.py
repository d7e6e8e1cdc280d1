"""Reads `srde_weights.pt`, the file of the project's first prototype, and makes an adapter of it.

The file holds, per layer, one set of positions in the MLP's weights (laid end to end in the order in which the module has them),
shared by all experts; A "atoms" of values at these positions; for each expert a softmax over the atoms and a sigmoid
"importance" per position; and a router. So expert e changes the weight at position n by

    softmax(atom_weights_e) . atoms[:, n] * sigmoid(importance_e[n])

That is an entry-wise delta (``granularity="element"``), and it is taken over exactly. The prototype itself did not compute with
it: it multiplied the MLP's output by the *mean* of these numbers. An imported adapter therefore says something else than the
prototype did, namely what its weights state; it is a start for training rather than a finished model.

Letters: E experts, A atoms, N positions, M matrices, D model width, F hidden neurons.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor

from srde.errors import ArtifactError
from srde.tuner import SrdeConfig
from srde.tuner.layer import SrdeLayer
from srde.tuner.loading import load_base
from srde.tuner.store import save_adapter
from srde.tuner.weights import dense_weights

if TYPE_CHECKING:
    from peft import PeftModel

_BASE = "base_ffn."


@dataclass(frozen=True)
class Imported:
    """What was read.

    Attributes:
        model: The base with the adapter.
        layers: How many MLPs have experts.
        experts: Routed experts per MLP.
        values: Changed weights per expert over all layers.
    """

    model: PeftModel
    layers: int
    experts: int
    values: int


def import_weights(
    file: str | Path, base: str, output_dir: str | Path | None = None, *, dtype: str = "auto"
) -> Imported:
    """Makes an adapter of an old file, and saves it.

    Args:
        file: `srde_weights.pt`. Nothing in it is run: it is read with ``weights_only=True``.
        base: The base that it was trained on.
        output_dir: The adapter's folder; not saved if left out.
        dtype: Type of the base's weights.

    Raises:
        ArtifactError: The file is none of the prototype's, is damaged, holds numbers that are not finite, or does not fit
            the base.
        ConfigError: The base cannot be loaded.
    """
    layers, settings = _read(Path(file))
    experts = _count_experts(layers, file)
    model = load_base(base, dtype)
    top_k = settings.get("top_k", 2)
    probe = get_peft_model(model, _config(experts, top_k, 1e-9, sorted(layers)))
    parts = dict(probe.srde.layers)
    if len(parts) != len(layers):
        raise _unfit(
            file, f"layers {sorted(layers)[:3]}...", f"the base has one MLP in each of them, not {len(parts)}"
        )
    taken = {
        name: _entries(layers[number], layer, f"{file}, layer {number}")
        for (name, layer), number in zip(parts.items(), sorted(layers), strict=True)
    }
    most = max(len(index) for entries in taken.values() for index, _ in entries)
    entries_in_all = (
        next(iter(parts.values())).layout.hidden_size * next(iter(parts.values())).layout.intermediate_size
    )
    sparsity = most / entries_in_all
    base_model = probe.unload()
    adapted = get_peft_model(base_model, _config(experts, top_k, sparsity, sorted(layers)))
    values = 0
    for (name, layer), number in zip(adapted.srde.layers.items(), sorted(layers), strict=True):
        delta, state = layer.srde_experts["default"], layers[number]
        for m, (index_N, value_EN) in enumerate(taken[name]):
            padded_N = _fill_up(index_N, delta.index.shape[2], delta.positions)
            order = padded_N.argsort()
            whole_EN = torch.zeros(experts, len(padded_N))
            whole_EN[:, : len(index_N)] = value_EN
            delta.index[m].copy_(padded_N[order].expand(experts, -1))
            delta.values.data[m].copy_(whole_EN[:, order])
            values += len(index_N)
        layer.srde_router["default"].weight.data.copy_(state["router.gate.weight"].float())
    if output_dir is not None:
        save_adapter(adapted, output_dir)
    return Imported(adapted, len(layers), experts, values)


def _config(experts: int, top_k: int, sparsity: float, layers: list[int]) -> SrdeConfig:
    return SrdeConfig(
        task_type="CAUSAL_LM", num_experts=experts, top_k=min(top_k, experts), granularity="element", mask_init="random",
        initial_sparsity=sparsity, target_sparsity=sparsity, layers_to_transform=layers,
    )  # fmt: skip


def _read(file: Path) -> tuple[dict[int, Mapping[str, Tensor]], Mapping[str, Any]]:
    if not file.is_file():
        raise ArtifactError.of(
            "srde_weights",
            str(file),
            rule="there is no such file",
            fix="name the prototype's srde_weights.pt",
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ArtifactError.of(
            "srde_weights", str(file),
            rule=f"it must be a file of tensors alone; nothing else is read ({str(error).splitlines()[0][:120]})",
            fix="take a whole copy of the file; one that needs code to be read is refused on purpose",
        ) from error  # fmt: skip
    layers = content.get("srde_layers") if isinstance(content, Mapping) else None
    needed = {  # and how many dimensions each has; the one with one dimension holds whole numbers
        "mask_selector.indices": 1,
        "vocabulary.atoms": 2,
        "vocabulary.expert_atom_weights": 2,
        "router.gate.weight": 2,
    }
    if not isinstance(layers, Mapping) or not layers:
        raise _unfit(file, "srde_layers", "the file must have this entry, with a state for each layer")
    for number, state in layers.items():
        if not str(number).isdecimal():
            raise _unfit(file, f"srde_layers[{number!r}]", "layers are named by their numbers")
        for name, dimensions in needed.items():
            tensor = state.get(name) if isinstance(state, Mapping) else None
            where = f"srde_layers[{number}].{name}"
            if not isinstance(tensor, Tensor):
                raise _unfit(file, where, "it is missing")
            if tensor.ndim != dimensions or tensor.is_floating_point() == (dimensions == 1):
                raise _unfit(
                    file, where, f"it has {dimensions} dimensions, not {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise _unfit(file, where, "it holds numbers that are not finite")
        if state["vocabulary.atoms"].shape[0] != state["vocabulary.expert_atom_weights"].shape[1]:
            raise _unfit(file, f"srde_layers[{number}].vocabulary", "there must be one weight for each atom")
    settings = content.get("config")
    settings = settings if isinstance(settings, Mapping) else {}
    if type(settings.get("top_k", 2)) is not int or settings.get("top_k", 2) < 1:
        raise _unfit(file, f"config.top_k={settings['top_k']!r}", "it is a whole number of at least 1")
    return {int(number): state for number, state in layers.items()}, settings


def _count_experts(layers: Mapping[int, Mapping[str, Tensor]], file: str | Path) -> int:
    counts = {len(state["router.gate.weight"]) for state in layers.values()}
    counts |= {len(state["vocabulary.expert_atom_weights"]) for state in layers.values()}
    if len(counts) != 1:
        raise _unfit(
            file, "experts", f"all layers must have as many in router and vocabulary, not {sorted(counts)}"
        )
    return counts.pop()


def _entries(state: Mapping[str, Tensor], layer: SrdeLayer, where: str) -> list[tuple[Tensor, Tensor]]:
    """For each of the M matrices in the core's order: positions [N] in it as `nn.Linear` holds it, and values [E, N]."""
    atom_EA = state["vocabulary.expert_atom_weights"].float().softmax(-1)
    value_EN = atom_EA @ state["vocabulary.atoms"].float()
    experts = len(atom_EA)
    for e in range(experts):
        importance = state.get(f"experts.{e}.importance")
        if not isinstance(importance, Tensor) or importance.shape != value_EN[e].shape:
            raise _unfit(where, f"experts.{e}.importance", f"it must have {value_EN.shape[1]} numbers")
        value_EN[e] *= importance.float().sigmoid()
    place_N = state["mask_selector.indices"].long()
    block, layout = layer.owner(), layer.layout
    if state["router.gate.weight"].shape[1] != layout.hidden_size:
        width = state["router.gate.weight"].shape[1]
        raise _unfit(where, "router.gate.weight", f"it is {width} wide, and the base {layout.hidden_size}")
    own = dict(block.named_parameters())
    sizes = [p.numel() for p in own.values()]
    if place_N.shape != value_EN[0].shape or int(place_N.min()) < 0 or int(place_N.max()) >= sum(sizes):
        raise _unfit(
            where,
            "mask_selector.indices",
            f"they must lie below {sum(sizes):,}, the MLP's weights, one per atom value",
        )
    if len(place_N.unique()) != len(place_N):
        raise _unfit(where, "mask_selector.indices", "no place may be named twice")
    _compare_base(state, own, where)
    linears = [f"{name}.weight" for name in (*layout.ups, layout.down)]
    if layout.fused or set(own) != set(linears):
        raise _unfit(
            where,
            type(block).__name__,
            f"old files are read for MLPs whose parameters are {', '.join(linears)}",
        )
    starts = dict(zip(own, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    out = []
    for name, weight in zip(linears, dense_weights(block, layout), strict=True):
        start = starts[name]
        inside = (place_N >= start) & (place_N < start + own[name].numel())
        place = place_N[inside] - start
        if own[name].shape != weight.shape:  # held transposed (GPT-2)
            row, column = place.div(own[name].shape[1], rounding_mode="floor"), place % own[name].shape[1]
            place = column * own[name].shape[0] + row
        out.append((place, value_EN[:, inside]))
    return out


def _compare_base(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """The file may hold the MLP's weights themselves; then they tell whether the base is the right one."""
    for name, weight in own.items():
        saved = state.get(_BASE + name)
        if isinstance(saved, Tensor) and (
            saved.shape != weight.shape
            or not torch.allclose(saved.float(), weight.float(), rtol=0.02, atol=1e-3)
        ):
            raise _unfit(
                where, _BASE + name, "the base's weights are others than those the file was trained with"
            )


def _fill_up(index_N: Tensor, count: int, positions: int) -> Tensor:
    """The positions, and as many unused ones after them as are needed to make `count`: their values stay zero."""
    missing = count - len(index_N)
    if not missing:
        return index_N
    used = torch.zeros(positions, dtype=torch.bool)
    used[index_N] = True
    return torch.cat([index_N, (~used).nonzero().view(-1)[:missing]])


def _unfit(file: str | Path, thing: str, rule: str) -> ArtifactError:
    return ArtifactError.of(
        "srde_weights",
        f"{file}: {thing}",
        rule=rule,
        fix="name a file that the prototype's save_srde_weights wrote, and its base",
    )
