"""Makes a plan: the base, srde at its first and at its last sparsity, and LoRAs of their sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from srde.core import Path
from srde.errors import ConfigError
from srde.plan.adapters import (
    attach_lora,
    attach_srde,
    file_bytes,
    mlp_projections,
    nearest_rank,
    optimizer_bytes,
    own_path,
    srde_layers,
    trainable,
)
from srde.plan.base import build_base, check_length, read_config, tensor_bytes
from srde.plan.figures import Adapter, Base, Plan, Run
from srde.plan.measure import decode_flops, prefill, train_step
from srde.plan.shadow import shadow_of
from srde.plan.weights import weigh
from srde.tuner import SrdeConfig, SrdeLayer

SETTINGS = (
    "num_experts",
    "top_k",
    "num_shared_experts",
    "null_expert",
    "granularity",
    "initial_sparsity",
    "target_sparsity",
    "layers_to_transform",
)


@dataclass(frozen=True)
class Request:
    """What to plan for.

    Attributes:
        model_name_or_path: A hub model, a local folder or a `config.json`.
        adapter: srde's settings.
        dtype: Of the base's weights where they are not quantised, and of the activations.
        batch_sizes: Sequences at once: served, or per device in training.
        lengths: Tokens per sequence: the context served, or the row trained on.
        optimizer: A name in `srde.plan.adapters.OPTIMIZERS`.
        double_quant: Whether NF4's scales are quantised too.
        packing: Whether training rows are packed, as `srde train` does by default.

    Raises:
        ConfigError: A batch size or length is below 1.
    """

    model_name_or_path: str
    adapter: SrdeConfig
    dtype: torch.dtype = torch.bfloat16
    batch_sizes: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (1024,)
    optimizer: str = "adamw"
    double_quant: bool = False
    packing: bool = True

    def __post_init__(self) -> None:
        for field, values in (("batch_size", self.batch_sizes), ("max_length", self.lengths)):
            if min(values) < 1:
                raise ConfigError.of(
                    field, min(values), rule="it must be a whole number of at least 1", fix="use 1 or more"
                )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All pairs of batch size and length."""
        return [(batch, length) for length in self.lengths for batch in self.batch_sizes]


def make_plan(request: Request, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Builds the model without weights, runs it in every variant, and collects the figures.

    Args:
        request: What to plan for.
        say: Told what is being measured: on a large model a run takes seconds.

    Raises:
        ConfigError: The model's name or configuration, or a setting, breaks its rule.
        UnsupportedModelError: The model is no causal language model, or none of its MLPs can carry experts.
    """
    say("configuration")
    config = read_config(request.model_name_or_path)
    check_length(config, request.lengths)

    def fresh() -> PreTrainedModel:
        return build_base(config, request.dtype)

    base = plan_base(fresh, request, say)
    adapters: list[Adapter] = []
    for sparsity in dict.fromkeys((request.adapter.initial_sparsity, request.adapter.target_sparsity)):
        adapters.append(plan_srde(fresh, request, sparsity, base, say))
        adapters.append(plan_lora(fresh, request, adapters[-1], base, say))
    settings = {name: getattr(request.adapter, name) for name in SETTINGS} | {
        "dtype": str(request.dtype).removeprefix("torch."),
        "optimizer": request.optimizer,
        "bnb_4bit_use_double_quant": request.double_quant,
        "packing": request.packing,
    }
    return Plan(request.model_name_or_path, settings, base, adapters)


def plan_base(fresh: Callable[[], PreTrainedModel], request: Request, say: Callable[[str], None]) -> Base:
    """Measures the frozen model."""
    layers = srde_layers(attach_srde(fresh(), request.adapter, request.adapter.target_sparsity))
    layout = layers[0].layout
    model = fresh()
    parameters = sum(p.numel() for p in model.parameters())
    weights = weigh(model, request.dtype, request.double_quant)
    decode_bytes = read_per_token(model)
    runs, prefill_flops = [], []
    with shadow_of(model, request.packing):
        for batch, length in request.sizes:
            say(f"base, {batch} x {length}")
            filled = prefill(model, batch, length)
            prefill_flops.append(filled.flops // (batch * length))
            decode = decode_flops(model, filled.cache, batch) // batch
            runs.append(Run(batch, length, None, filled.kv_bytes, filled.peak_bytes, decode))
    return Base(
        architecture=type(model).__name__,
        parameters=parameters,
        weights=weights,
        prefill_flops=prefill_flops,
        decode_bytes=decode_bytes,
        mlps=len(layers),
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        num_matrices=layout.num_matrices,
        runs=runs,
    )


def plan_srde(
    fresh: Callable[[], PreTrainedModel],
    request: Request,
    sparsity: float,
    base: Base,
    say: Callable[[str], None],
) -> Adapter:
    """Measures srde at a sparsity.

    The grouped path multiplies by the experts of each token only, (top_k + shared) of (experts + shared): two FLOPs per
    value used. With a null expert that is an upper bound. A token decoded alone reads the share of the experts that it
    multiplies by.
    """
    model = attach_srde(fresh(), request.adapter, sparsity)
    layers, config = srde_layers(model), request.adapter
    routers = [layer.srde_router["default"] for layer in layers]
    experts = [layer.srde_experts["default"] for layer in layers]
    gates, values = sum(r.weight.numel() for r in routers), sum(e.values.numel() for e in experts)
    gate_bytes, expert_bytes = sum(map(tensor_bytes, routers)), sum(map(tensor_bytes, experts))
    figures, rewritten = _fixed(model, request, base), experts[0].index.shape[-1]
    flops, alone, runs = _measured(
        model, request, base, layers, lambda size: say(f"srde {sparsity:.3%}, {size}")
    )
    grouped = round(2 * (gates + values * (config.top_k + config.num_shared_experts) / config.experts_in_all))
    if config.granularity == "element":  # the stand-in for its sparse product is dense
        alone, runs = grouped, [replace(run, decode_flops=grouped) for run in runs]
    return Adapter(
        kind="srde",
        sparsity=sparsity,
        rank=rewritten,
        **figures,
        flops=flops,
        flops_grouped=grouped,
        decode_bytes=round(gate_bytes + expert_bytes * (alone / 2 - gates) / values),
        runs=runs,
    )


def plan_lora(
    fresh: Callable[[], PreTrainedModel],
    request: Request,
    like: Adapter,
    base: Base,
    say: Callable[[str], None],
) -> Adapter:
    """Measures the LoRA on the same projections whose size comes nearest to an srde adapter's."""
    bare = fresh()
    layers = srde_layers(attach_srde(fresh(), request.adapter, request.adapter.target_sparsity))
    projections = mlp_projections(bare, layers)
    rank = nearest_rank(like.trainable_parameters, projections)
    model = attach_lora(bare, rank, projections)
    figures = _fixed(model, request, base)
    flops, _, runs = _measured(model, request, base, [], lambda size: say(f"LoRA of rank {rank}, {size}"))
    return Adapter(
        kind="lora",
        sparsity=like.sparsity,
        rank=rank,
        **figures,
        flops=flops,
        flops_grouped=None,
        decode_bytes=figures["adapter_bytes"],
        runs=runs,
    )


def read_per_token(model: PreTrainedModel) -> int:
    """Bytes of the base's weights that one decoded token reads: the text decoder and the head. Of an embedding table one
    row is read, unless the head shares it."""
    read = {id(p): p.nbytes for p in model.get_decoder().parameters()}
    read.pop(id(model.get_input_embeddings().weight), None)
    head = model.get_output_embeddings()
    return sum((read | {id(p): p.nbytes for p in head.parameters()}).values())


def _fixed(model: PeftModel, request: Request, base: Base) -> dict[str, int]:
    parameters = trainable(model)
    return {
        "trainable_parameters": sum(p.numel() for p in parameters),
        "adapter_bytes": tensor_bytes(model) - base.weights.plain,
        "file_bytes": file_bytes(model),
        "gradient_bytes": sum(p.nbytes for p in parameters),
        "optimizer_bytes": optimizer_bytes(parameters, request.optimizer),
    }


def _measured(
    model: PeftModel, request: Request, base: Base, layers: list[SrdeLayer], say: Callable[[str], None]
) -> tuple[int, int, list[Run]]:
    """Extra FLOPs per token with the masked path, and for a token decoded alone; and a run per batch size and length with
    srde's own path."""
    inner = model.get_base_model()
    paths = [own_path(layers, batch * length) if layers else None for batch, length in request.sizes]
    decode_paths = [own_path(layers, batch) if layers else None for batch, _ in request.sizes]
    runs = []
    with shadow_of(model, request.packing):
        _set_path(inner, "masked" if layers else None)
        batch, length = request.sizes[0]
        flops = prefill(inner, batch, length).flops // (batch * length) - base.prefill_flops[0]
        alone = decode_flops(inner, prefill(inner, 1, length).cache, 1) - base.runs[0].decode_flops
        for i, (batch, length) in enumerate(request.sizes):
            say(f"{batch} x {length}")
            _set_path(inner, paths[i])
            filled = prefill(inner, batch, length)
            inner.activation_checkpointing_disable()
            step = train_step(inner, batch, length, request.packing)
            inner.activation_checkpointing_enable({"use_reentrant": False})
            checkpointed = train_step(inner, batch, length, request.packing)
            _set_path(inner, decode_paths[i])
            decode = decode_flops(inner.eval(), filled.cache, batch) // batch - base.runs[i].decode_flops
            runs.append(
                Run(batch, length, paths[i], filled.kv_bytes, filled.peak_bytes, decode, step, checkpointed)
            )
    return flops, alone, runs


def _set_path(model: PreTrainedModel, path: Path | None) -> None:
    if path is not None:
        model.srde.path = path
