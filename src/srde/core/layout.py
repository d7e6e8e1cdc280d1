"""Finds the MLPs of a model by structure, and says how each one computes.

Letters: D model width, F hidden neurons.

No list of class names: a module is an MLP when its linear children fit together (one or two D -> F, one F -> D; or one
D -> 2F that holds gate and up), and when *our* formula, run on random tokens, gives the very bits that the module's own
forward gives. The trial also settles what shapes cannot: which of two D -> F matrices is the gate, which attribute is
the activation, where a dropout acts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, product
from typing import Literal

import torch
from torch import Tensor, nn

TRIAL_TOKENS = 4


@dataclass(frozen=True)
class MlpLayout:
    """How an MLP computes, by the names of its children.

    Attributes:
        ups: The D -> F matrices; of two, the first is the gate (it goes through the activation).
        down: The F -> D matrix.
        hidden_size: D.
        intermediate_size: F.
        act: The activation; None in a loose layout, whose owner applies it.
        fused: `ups` is one D -> 2F matrix that holds gate and up.
        gate_first: In a fused matrix, whether the first half is the gate.
        dropout: The dropout's name, if there is one.
        dropout_on: Whether it acts on the hidden activations or on the output.
        tried: Whether a trial run has confirmed the layout. A module without weights (meta device) cannot be tried.
    """

    ups: tuple[str, ...]
    down: str
    hidden_size: int
    intermediate_size: int
    act: str | None = None
    fused: bool = False
    gate_first: bool = True
    dropout: str | None = None
    dropout_on: Literal["hidden", "output"] = "output"
    tried: bool = False

    @property
    def num_matrices(self) -> int:
        """M: 3 for a gated MLP, 2 for a plain one."""
        return 3 if self.fused or len(self.ups) == 2 else 2

    @property
    def loose(self) -> bool:
        """Whether the two matrices lie bare in a bigger module (OPT), which runs the activation itself."""
        return self.act is None

    def expand(self, block: nn.Module, x: Tensor) -> list[Tensor]:
        """Pre-activations, M - 1 tensors [..., F]: gate first, then up; or the one of a plain MLP."""
        if not self.fused:
            return [getattr(block, name)(x) for name in self.ups]
        first, second = getattr(block, self.ups[0])(x).chunk(2, dim=-1)
        return [first, second] if self.gate_first else [second, first]

    def activate(self, block: nn.Module, pre: list[Tensor]) -> Tensor:
        """Hidden activations [..., F]."""
        h = getattr(block, self.act or "")(pre[0])
        if len(pre) == 2:
            h = h * pre[1]
        return getattr(block, self.dropout)(h) if self.dropout and self.dropout_on == "hidden" else h

    def finish(self, block: nn.Module, y: Tensor) -> Tensor:
        """What follows the F -> D matrix: the dropout, if it acts there."""
        return getattr(block, self.dropout)(y) if self.dropout and self.dropout_on == "output" else y

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """The plain MLP, step by step: what `block(x)` must give."""
        h = self.activate(block, self.expand(block, x))
        return self.finish(block, getattr(block, self.down)(h))


@dataclass(frozen=True)
class Found:
    """What `find_mlps` saw.

    Attributes:
        layouts: Module name -> layout, in the model's order.
        rejected: Module name -> why a module that looked like an MLP is none, for the error message.
    """

    layouts: dict[str, MlpLayout]
    rejected: dict[str, str]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of anything that acts as a linear layer, quantised or not; None for other modules."""
    for inputs, outputs in (
        ("in_features", "out_features"),
        ("nx", "nf"),
    ):  # nx, nf: GPT-2's Conv1D, transposed
        shape = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(shape[0], int) and isinstance(shape[1], int):
            return shape[0], shape[1]
    return None


def find_mlps(model: nn.Module) -> Found:
    """Finds all MLPs of a model.

    An MLP whose block cannot be re-run as a whole (its forward takes more than the hidden states, or its two matrices
    lie bare in the decoder layer) is still usable if it has two matrices: they are then wrapped one by one. Only modules
    inside a list of layers are taken as such, so that a pair of projections round the model is not mistaken for one.
    """
    layouts: dict[str, MlpLayout] = {}
    rejected: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        shape = _fit(module)
        if shape is None:
            continue
        in_list = ".layers." in f".{name}" or any(part.isdigit() for part in name.split("."))
        bare = any(linear_shape(c) is None and any(True for _ in c.parameters()) for c in module.children())
        layout = None if bare else try_layout(module, shape)
        if layout is None and len(shape.ups) == 1 and not shape.fused and in_list:
            layout = shape if shape.intermediate_size > shape.hidden_size else None
        if layout is None:
            rejected[name] = f"{type(module).__name__}: {_describe(module)}; its forward is not act(x W) W'"
            continue
        layouts[name] = layout
        inside = (*inside, f"{name}.") if not layout.loose else inside
    return Found(layouts, rejected)


def try_layout(block: nn.Module, shape: MlpLayout) -> MlpLayout | None:
    """Settles a layout by running it against the block's own forward; None if no reading gives the same bits.

    On the meta device there is nothing to run: the first reading is returned, marked as not tried.
    """
    device, dtype = _where(block)
    readings = list(_readings(block, shape))
    if device is None or device.type == "meta":
        return readings[0] if readings else None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIAL_TOKENS, shape.hidden_size, generator=generator).to(device, dtype)
    devices = [device] if device.type == "cuda" else []
    was_training = [(m, m.training) for m in block.modules()]
    try:
        block.train()  # dropouts act, so that a wrong place for one shows
        with torch.no_grad(), torch.random.fork_rng(devices):
            expected = _seeded(block, x)
            if expected is None:
                return None
            for reading in readings:
                got = _seeded(partial(reading.run, block), x)
                if got is not None and got.shape == expected.shape and torch.equal(got, expected):
                    return replace(reading, tried=True)
    finally:
        for module, training in was_training:
            module.training = training
    return None


def _seeded(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    torch.manual_seed(0)
    try:
        out = run(x)
    except (
        TypeError,
        RuntimeError,
        ValueError,
        AttributeError,
    ):  # not callable like an MLP: this reading is wrong
        return None
    return out if isinstance(out, Tensor) else None


def _fit(module: nn.Module) -> MlpLayout | None:
    """The layout that the shapes of a module's linear children allow, activation and order still open."""
    linears = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
    if len(linears) not in (2, 3):
        return None
    for down, (d_in, d_out) in reversed(linears.items()):
        ups = [name for name in linears if name != down]
        if all(linears[name] == (d_out, d_in) for name in ups):
            return MlpLayout(tuple(ups), down, hidden_size=d_out, intermediate_size=d_in)
        if len(ups) == 1 and linears[ups[0]] == (d_out, 2 * d_in):
            return MlpLayout(tuple(ups), down, hidden_size=d_out, intermediate_size=d_in, fused=True)
    return None


def _readings(block: nn.Module, shape: MlpLayout) -> Iterator[MlpLayout]:
    children = dict(block.named_children())
    bare = [
        n for n, c in children.items() if linear_shape(c) is None and not any(True for _ in c.parameters())
    ]
    dropouts = [n for n in bare if isinstance(children[n], nn.Dropout)]
    acts = [n for n in bare if n not in dropouts]
    acts += [n for n, v in vars(block).items() if callable(v) and not n.startswith("_")]
    places: list[tuple[str | None, Literal["hidden", "output"]]] = [
        (name, place) for name in dropouts for place in ("output", "hidden")
    ] or [(None, "output")]
    orders = list(permutations(shape.ups))
    halves = (True, False) if shape.fused else (True,)
    for act, ups, gate_first, (dropout, place) in product(acts, orders, halves, places):
        yield replace(shape, act=act, ups=ups, gate_first=gate_first, dropout=dropout, dropout_on=place)


def _where(block: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    device, dtype = None, None
    for tensor in (*block.parameters(), *block.buffers()):
        device = device or tensor.device
        if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            dtype = dtype or tensor.dtype
    for child in block.children():  # quantised layers keep the dtype they compute in
        dtype = dtype or getattr(child, "compute_dtype", None)
    return device, dtype or torch.float32


def _describe(module: nn.Module) -> str:
    linears = ((n, linear_shape(c)) for n, c in module.named_children())
    return ", ".join(f"{n} {s[0]}->{s[1]}" for n, s in linears if s)
