"""Element deltas: an expert rewrites single entries anywhere in the MLP's matrices, as the project's founding notes say.

Letters: T tokens, D model width, F hidden neurons, E experts, N entries rewritten per matrix and expert, M matrices.

The masked path writes each expert's entries into a dense matrix: static shapes, dense speed, E times the base's work.
The grouped path multiplies with the sparse matrix (CSR), and only the tokens of each expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde.core.delta import Delta, Path, count_rewritten, gates_to
from srde.core.masks import deal
from srde.core.router import Route


class ElementDelta(Delta):
    """Deltas on single weight entries.

    Shapes: `values` [M, E, N] float32; `index` [M, E, N] int32 - positions in the flattened matrix as `nn.Linear` holds
    it ([F, D], and [D, F] for the last), ascending. Every matrix gives the same count, N = sparsity * F * D.
    """

    _after = 1

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_matrices: int,
        num_experts: int,
        sparsity: float,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(hidden_size, intermediate_size, num_matrices, num_experts)
        entries = count_rewritten(sparsity, hidden_size * intermediate_size)
        shape = (num_matrices, num_experts, entries)
        self.values = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("index", torch.zeros(shape, dtype=torch.int32, device=device))

    @property
    def positions(self) -> int:
        return self.hidden_size * self.intermediate_size

    def set_masks(self, score: Sequence[Tensor]) -> None:
        for m, s in enumerate(score):
            self.index[m].copy_(deal(s.float().flatten(), self.num_experts, self.index.shape[2]))

    def expand(self, pre: list[Tensor], x_TD: Tensor, route: Route, path: Path) -> list[Tensor]:
        return [self._add(m, a_TF, x_TD, route, path) for m, a_TF in enumerate(pre)]

    def contract(self, y_TD: Tensor, h_TF: Tensor, route: Route, path: Path) -> Tensor:
        return self._add(self.num_matrices - 1, y_TD, h_TF, route, path)

    def _add(self, m: int, out_TO: Tensor, in_TI: Tensor, route: Route, path: Path) -> Tensor:
        if path == "masked":
            for e in range(self.num_experts):
                v_TO = F.linear(in_TI, self._matrix(m, e).to(in_TI.dtype))
                out_TO = out_TO + (v_TO * gates_to(route.gate_TE[:, e : e + 1], v_TO.dtype)).to(out_TO.dtype)
            return out_TO
        groups = route.groups
        for e, token_N in enumerate(groups.token_P.split(groups.counts)):
            if len(token_N):
                v_NO = _SparseLinear.apply(
                    in_TI[token_N], self.values[m, e], self.index[m, e], out_TO.shape[1]
                )
                v_NO = v_NO * gates_to(route.gate_TE[token_N, e].unsqueeze(1), v_NO.dtype)
                out_TO = out_TO.index_add(0, token_N, v_NO.to(out_TO.dtype))
        return out_TO

    def _matrix(self, m: int, e: int) -> Tensor:
        flat = self.values.new_zeros(self.hidden_size * self.intermediate_size)
        return flat.scatter(0, self.index[m, e].long(), self.values[m, e]).view(self._shape(m))

    def _shape(self, m: int) -> tuple[int, int]:
        last = m == self.num_matrices - 1
        return (
            (self.hidden_size, self.intermediate_size) if last else (self.intermediate_size, self.hidden_size)
        )

    def dense(self, gate_E: Tensor) -> list[Tensor]:
        values = self.values.detach() * gate_E.to(self.values).view(1, -1, 1)
        out = values.new_zeros(self.num_matrices, self.hidden_size * self.intermediate_size)
        out.scatter_add_(1, self.index.long().flatten(1), values.flatten(1))
        return [flat.view(self._shape(m)) for m, flat in enumerate(out)]

    def size(self) -> Tensor:
        return self.values.detach().abs()

    def keep(self, sparsity: float) -> int:
        return count_rewritten(sparsity, self.hidden_size * self.intermediate_size)

    def take(self, kept: Tensor, like_values: Tensor) -> Tensor:
        return like_values.gather(-1, kept)

    def places(self) -> Tensor:
        offset = torch.arange(self.num_matrices, device=self.index.device).view(-1, 1, 1) * self.positions
        return (self.index.long() + offset).transpose(0, 1).flatten(1)

    def usage(self) -> Tensor:
        return self.values.square().transpose(0, 1).flatten(1)


class _SparseLinear(torch.autograd.Function):
    """``x @ S.T`` for a sparse matrix S [O, I] given by ascending flat positions; float32 at least, for CSR products."""

    @staticmethod
    def forward(ctx, x_NI: Tensor, value_N: Tensor, index_N: Tensor, num_outputs: int) -> Tensor:  # type: ignore[no-untyped-def]
        dtype = torch.promote_types(x_NI.dtype, torch.float32)
        row, col = _place(index_N, x_NI.shape[1])
        ctx.save_for_backward(x_NI, value_N, index_N)  # int32, a quarter of row and col
        ctx.num_outputs = num_outputs
        return (_csr(row, col, value_N.to(dtype), (num_outputs, x_NI.shape[1])) @ x_NI.t().to(dtype)).t()

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        x_NI, value_N, index_N = ctx.saved_tensors
        row, col = _place(index_N, x_NI.shape[1])
        order = col.argsort(stable=True)
        transposed = _csr(
            col[order], row[order], value_N[order].to(grad_NO.dtype), (x_NI.shape[1], ctx.num_outputs)
        )
        grad_x = (transposed @ grad_NO.t()).t().to(x_NI.dtype)
        # one dense product and a look-up: faster on CPU than a sampled product at 1-4 % of the entries
        grad_value = (grad_NO.t() @ x_NI.to(grad_NO.dtype))[row, col].to(value_N.dtype)
        return grad_x, grad_value, None, None


def _place(index_N: Tensor, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat positions."""
    index_N = index_N.long()
    return index_N.div(num_inputs, rounding_mode="floor"), index_N % num_inputs


def _csr(row: Tensor, col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    start = torch.zeros(size[0] + 1, dtype=torch.long, device=row.device)
    start[1:] = torch.bincount(row, minlength=size[0]).cumsum(0)
    with warnings.catch_warnings():  # torch says once that CSR is in beta; its products are what we need
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(start, col, value, size, check_invariants=False)
