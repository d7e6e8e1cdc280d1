"""A plan as a table for the terminal, at least 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from srde.plan.figures import Adapter, Plan, Run

FORMATS = {"plain": "{dtype}", "int8": "int8", "nf4": "NF4"}
DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
EMPTY = "-"

NOTES = (
    "k, M, G, B are powers of 1000. Bytes are those of tensors: the device's context, gaps in the allocator and "
    "buffers inside kernels come on top. Attention runs in a fused kernel, which keeps no scores. FLOPs are those of "
    "matrix products and attention; a prefill computes the last position's logits only. Step peak: forward and "
    "backward of one batch, gradients included. Totals of training: weights, adapter, optimizer, step peak."
)


class Unit:
    """One power of 1000 for a whole table, so that its figures can be compared at a glance."""

    def __init__(self, largest: float) -> None:
        self.prefix, self.size = next(
            ((prefix, size) for prefix, size in (("G", 1e9), ("M", 1e6)) if largest >= size), ("k", 1e3)
        )

    def __call__(self, value: float | None) -> str:
        return EMPTY if value is None else _digits(value / self.size)

    def extra(self, value: float | None) -> str:
        """As an addition to what the base has."""
        return EMPTY if value is None else f"+{self(value)}"


def headline(plan: Plan) -> str:
    """What was planned, in three lines."""
    base, s = plan.base, plan.settings
    shared = f" + {s['num_shared_experts']} shared" if s["num_shared_experts"] else ""
    null = ", null expert" if s["null_expert"] else ""
    packed = ", packed rows" if s["packing"] else ""
    sparsity = " -> ".join(dict.fromkeys(map(_percent, (s["initial_sparsity"], s["target_sparsity"]))))
    return (
        f"{plan.model}\n{base.architecture}: {_short(base.parameters)} parameters, "
        f"{base.mlps} MLPs of {base.num_matrices} matrices {base.hidden_size} x {base.intermediate_size}\n"
        f"srde: {s['num_experts']}{shared} experts, top {s['top_k']}{null}, by {s['granularity']}, "
        f"{sparsity}; {s['dtype']}, {s['optimizer']}{packed}"
    )


def as_table(plan: Plan, checkpointing: bool) -> Table:
    """The figures in columns: base, then srde and LoRA of its size by turns.

    Args:
        plan: The figures.
        checkpointing: Whether the totals for training are with gradient checkpointing.
    """
    size, flops = Unit(plan.base.weights.plain), Unit(plan.base.prefill_flops[0])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("", no_wrap=True)
    for title in ("base", *map(_title, plan.adapters)):
        table.add_column(title, justify="right", no_wrap=True)
    for title, rows in (
        ("Size", _size_rows(plan, size)),
        (f"Per token, {flops.prefix}FLOP", _flop_rows(plan, flops)),
        (f"Decoding alone reads, {size.prefix}B", _read_rows(plan, size)),
        (f"To serve, {size.prefix}B", _serve_rows(plan, size)),
        (f"To train, {size.prefix}B", _train_rows(plan, size, checkpointing)),
    ):
        table.add_row(Text(title, style="bold"))
        for label, *cells in rows:
            table.add_row(f" {label}", *cells)
        table.add_section()
    return table


Rows = Iterable[list[str]]


def _size_rows(plan: Plan, size: Unit) -> Rows:
    adapters = plan.adapters
    yield [
        "parameters",
        _short(plan.base.parameters),
        *(f"+{_short(a.trainable_parameters)}" for a in adapters),
    ]
    yield [
        "% of the base",
        EMPTY,
        *(_digits(100 * a.trainable_parameters / plan.base.parameters) for a in adapters),
    ]
    yield [f"adapter on disk, {size.prefix}B", EMPTY, *(size(a.file_bytes) for a in adapters)]


def _flop_rows(plan: Plan, unit: Unit) -> Rows:
    base, adapters = plan.base, plan.adapters
    for run, prefill in zip(base.runs, base.prefill_flops, strict=True):
        if run.batch_size == base.runs[0].batch_size:
            yield [f"prefill of {run.length}", unit(prefill), *[""] * len(adapters)]
    yield [" extra (srde: masked path)", "", *(unit.extra(a.flops) for a in adapters)]
    yield [" extra, grouped path", "", *(unit.extra(a.flops_grouped) for a in adapters)]
    for i, run in enumerate(base.runs):
        yield [f" path taken, {_shape(run)}", "", *(a.runs[i].path or EMPTY for a in adapters)]
    for i, run in enumerate(base.runs):
        extra = (unit.extra(a.runs[i].decode_flops) for a in adapters)
        yield [f"decode after {_shape(run)}", unit(run.decode_flops), *extra]


def _read_rows(plan: Plan, size: Unit) -> Rows:
    base, adapters = plan.base, plan.adapters
    yield ["weights", size(base.decode_bytes), *(size.extra(a.decode_bytes) for a in adapters)]


def _serve_rows(plan: Plan, size: Unit) -> Rows:
    columns: list[Adapter | None] = [None, *plan.adapters]
    yield ["adapter", EMPTY, *(size(a.adapter_bytes) for a in plan.adapters)]
    for i, run in enumerate(plan.base.runs):
        runs = [run, *(a.runs[i] for a in plan.adapters)]
        yield [f"KV cache {_shape(run)}", *(size(r.kv_bytes) for r in runs)]
        yield [f"prefill peak {_shape(run)}", *(size(r.prefill_peak_bytes) for r in runs)]
        for weights, name in FORMATS.items():
            totals = (plan.serve_bytes(r, a, weights) for r, a in zip(runs, columns, strict=True))
            yield [f"total {_shape(run)}, {_format(name, plan)}", *map(size, totals)]


def _train_rows(plan: Plan, size: Unit, checkpointing: bool) -> Rows:
    adapters = plan.adapters
    yield ["gradients", EMPTY, *(size(a.gradient_bytes) for a in adapters)]
    yield [f"optimizer ({plan.settings['optimizer']})", EMPTY, *(size(a.optimizer_bytes) for a in adapters)]
    for i, run in enumerate(plan.base.runs):
        steps = [(a.runs[i].step, a.runs[i].checkpointed_step) for a in adapters]
        yield [f"activations {_shape(run)}", EMPTY, *(size(s.activation_bytes) for s, _ in steps if s)]
        yield [" checkpointed", EMPTY, *(size(s.activation_bytes) for _, s in steps if s)]
        yield [f"step peak {_shape(run)}", EMPTY, *(size(s.peak_bytes) for s, _ in steps if s)]
        yield [" checkpointed", EMPTY, *(size(s.peak_bytes) for _, s in steps if s)]
        for weights, name in FORMATS.items():
            totals = (plan.train_bytes(a.runs[i], a, weights, checkpointing) for a in adapters)
            how = ", ckpt" if checkpointing else ""
            yield [f"total {_shape(run)}, {_format(name, plan)}{how}", EMPTY, *map(size, totals)]


def _title(adapter: Adapter) -> str:
    if adapter.kind == "lora":
        return f"LoRA\nr={adapter.rank}"
    return f"srde {_percent(adapter.sparsity)}\nR={adapter.rank}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _shape(run: Run) -> str:
    return f"{run.batch_size}x{run.length}"


def _format(name: str, plan: Plan) -> str:
    return name.format(dtype=DTYPE_NAMES[plan.settings["dtype"]])


def _short(count: int) -> str:
    prefix, size = next(((p, s) for p, s in ((" B", 1e9), (" M", 1e6)) if count >= s), (" k", 1e3))
    return f"{_digits(count / size)}{prefix}"


def _digits(value: float) -> str:
    """Three digits or more."""
    places = next((places for least, places in ((1000, 0), (100, 1), (1, 2), (0.1, 3)) if value >= least), 4)
    return f"{value:.{places}f}"
