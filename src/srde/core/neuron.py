"""Neuron deltas, the default: an expert rewrites R hidden neurons.

Letters: T tokens, D model width, F hidden neurons, E experts, R neurons rewritten per expert, P (expert, token) pairs,
M matrices of the MLP (3 gated, 2 plain).

Rewriting neuron f means: new row f in each D -> F matrix and new column f in the F -> D matrix. The products are small
and dense, the mask is R whole numbers per expert. The idea of structured sparse fine-tuning by neuron: S2FT (Yang et
al., NeurIPS 2024); here the structure is routed per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde.core.delta import Delta, Path, count_rewritten, gates_to, may_write
from srde.core.masks import deal, draft
from srde.core.router import Route, autocasts

# Below this many tokens, rounding the float32 values to the activations' dtype costs more than the product saves.
CAST_TOKENS = 32


class NeuronDelta(Delta):
    """Deltas on whole hidden neurons.

    Shapes: `values` [M, E, R, D] float32 - for matrix m, expert e and its r-th neuron the change of that neuron's D
    weights (of its *column* where m is the F -> D matrix); `index` [E, R] long - the neurons.
    """

    _after = 2

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
        rewritten = count_rewritten(sparsity, intermediate_size)
        self.values = nn.Parameter(
            torch.zeros(num_matrices, num_experts, rewritten, hidden_size, dtype=torch.float32, device=device)
        )
        self.register_buffer("index", torch.zeros(num_experts, rewritten, dtype=torch.long, device=device))

    @property
    def positions(self) -> int:
        return self.intermediate_size

    def set_masks(self, score: Sequence[Tensor]) -> None:
        neuron_F = sum(s.float().sum(dim=1) for s in score[:-1]) + score[-1].float().sum(dim=0)
        assert isinstance(neuron_F, Tensor)
        self.index.copy_(deal(neuron_F, self.num_experts, self.index.shape[1]))

    def set_own_masks(self, score_EF: Tensor) -> None:
        """Chooses what each expert rewrites from scores of its own, see `srde.core.masks.draft`."""
        self.index.copy_(draft(score_EF, self.index.shape[1]))

    def expand(self, pre: list[Tensor], x_TD: Tensor, route: Route, path: Path) -> list[Tensor]:
        if path == "grouped":
            return self._expand_grouped(pre, x_TD, route)
        if (lone := route.lone_experts) is not None:
            return self._expand_lone(pre, x_TD, route, *lone)
        weight, index_N, gate_TN = self._rows(x_TD, route, slice(0, -1))
        v_TMN = F.linear(x_TD.to(weight.dtype), weight.reshape(-1, self.hidden_size))
        v_TMN = v_TMN.view(len(x_TD), self.num_matrices - 1, len(index_N))
        v_TMN = v_TMN.mul_(gate_TN.unsqueeze(1)) if may_write(v_TMN) else v_TMN * gate_TN.unsqueeze(1)
        v_TMN = v_TMN.to(pre[0].dtype)
        return [self._add_at(a_TF, index_N, v_TMN[:, m]) for m, a_TF in enumerate(pre)]

    def _add_at(self, a_TF: Tensor, index_N: Tensor, v_TN: Tensor) -> Tensor:
        """Adds columns; where no gradient is recorded, in place."""
        index_TN = index_N.expand(len(a_TF), -1)
        if not may_write(a_TF):
            return a_TF.scatter_add(1, index_TN, v_TN)
        if not torch.compiler.is_compiling() and self.disjoint():
            # a scatter_add in bf16 works on a float32 copy of all of `a_TF`; this does not
            return a_TF.index_copy_(1, index_N, a_TF.gather(1, index_TN).add_(v_TN))
        return a_TF.scatter_add_(1, index_TN, v_TN)

    def contract(self, y_TD: Tensor, h_TF: Tensor, route: Route, path: Path) -> Tensor:
        if path == "grouped":
            return self._contract_grouped(y_TD, h_TF, route)
        if route.lone:
            return self._contract_lone(y_TD, h_TF, route)
        weight, index_N, gate_TN = self._rows(h_TF, route, slice(-1, None))
        # gather, not h[:, index]: its backward is a parallel scatter, that of indexing walks column by column
        h_TN = h_TF.gather(1, index_N.expand(len(h_TF), -1)).to(weight.dtype) * gate_TN
        return torch.addmm(y_TD.to(weight.dtype), h_TN, weight.reshape(-1, self.hidden_size)).to(y_TD.dtype)

    def _rows(self, activations: Tensor, route: Route, matrices: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What the masked path multiplies, of the open experts: values [matrices, E, R, D], neurons [E*R], gates [T, E*R]."""
        values, dtype = self.values[matrices], activations.dtype
        if route.open_E is not None:
            values = values.index_select(1, route.open_E)
        if len(activations) < CAST_TOKENS and not autocasts(activations):
            dtype = torch.promote_types(values.dtype, dtype)
        if route.rows is None:
            gate_TE, index = route.gate_TE, self.index
            if route.open_E is not None:
                gate_TE, index = gate_TE.index_select(1, route.open_E), index.index_select(0, route.open_E)
            route.rows = index.view(-1), gates_to(gate_TE, dtype).repeat_interleave(index.shape[1], dim=1)
        index_N, gate_TN = route.rows
        return values.to(dtype), index_N, gates_to(gate_TN, dtype)

    # A token that stands alone is the step of decoding, bound by the bytes it reads and by the number of calls: it reads
    # its own experts only, and the gates multiply what is small.

    def _expand_lone(
        self, pre: list[Tensor], x_1D: Tensor, route: Route, expert_K: Tensor, gate_K: Tensor
    ) -> list[Tensor]:
        values_MKRD = self.values.index_select(1, expert_K)
        values_MKRD = values_MKRD.to(torch.promote_types(values_MKRD.dtype, x_1D.dtype))
        index_N = self.index.index_select(0, expert_K).view(-1)
        gate_K1 = gates_to(gate_K, values_MKRD.dtype).unsqueeze(1)
        route.lone, route.rows = True, (values_MKRD[-1], index_N, gate_K1)
        weight_ND = values_MKRD[:-1].view(-1, self.hidden_size)
        v_N = weight_ND.mv(x_1D.view(-1).to(weight_ND.dtype))
        v_MKR = v_N.view(len(pre), len(expert_K), -1) * gate_K1
        v_MN = v_MKR.to(pre[0].dtype).view(len(pre), -1)
        if may_write(pre[0]):
            for a_1F, v in zip(pre, v_MN, strict=True):
                a_1F.view(-1).index_add_(0, index_N, v)
            return pre
        return [a.view(-1).index_add(0, index_N, v).view(1, -1) for a, v in zip(pre, v_MN, strict=True)]

    def _contract_lone(self, y_1D: Tensor, h_1F: Tensor, route: Route) -> Tensor:
        values_KRD, index_N, gate_K1 = route.rows
        h_KR = (
            h_1F.view(-1).index_select(0, index_N).to(values_KRD.dtype).view(values_KRD.shape[:2]) * gate_K1
        )
        y = h_KR.view(1, -1) @ values_KRD.view(-1, self.hidden_size)
        return y_1D.add_(y) if may_write(y_1D) else (y_1D + y).to(y_1D.dtype)

    def _expand_grouped(self, pre: list[Tensor], x_TD: Tensor, route: Route) -> list[Tensor]:
        groups = route.groups
        gate_P1 = route.gate_TE[groups.token_P, groups.expert_P].unsqueeze(1)
        x_PD = x_TD.index_select(0, groups.token_P)
        # a loop and not F.grouped_mm: at these sizes it takes the same time on CPU, and has no alignment rules
        v_PMR = torch.cat(
            [
                F.linear(x_ND, self.values[:-1, e].reshape(-1, self.hidden_size).to(x_ND.dtype))
                for e, x_ND in enumerate(x_PD.split(groups.counts))
            ]
        ).view(len(x_PD), self.num_matrices - 1, self.index.shape[1])
        v_PMR = v_PMR * gates_to(gate_P1, v_PMR.dtype).unsqueeze(1)
        where = (groups.token_P.unsqueeze(1), self.index[groups.expert_P])
        return [
            a_TF.index_put(where, v_PMR[:, m].to(a_TF.dtype), accumulate=True) for m, a_TF in enumerate(pre)
        ]

    def _contract_grouped(self, y_TD: Tensor, h_TF: Tensor, route: Route) -> Tensor:
        groups = route.groups
        gate_P1 = route.gate_TE[groups.token_P, groups.expert_P].unsqueeze(1)
        h_PR = h_TF[groups.token_P.unsqueeze(1), self.index[groups.expert_P]]
        h_PR = h_PR * gates_to(gate_P1, h_PR.dtype)
        y_PD = torch.cat(
            [h_NR @ self.values[-1, e].to(h_NR.dtype) for e, h_NR in enumerate(h_PR.split(groups.counts))]
        )
        return y_TD.index_add(0, groups.token_P, y_PD.to(y_TD.dtype))

    def dense(self, gate_E: Tensor) -> list[Tensor]:
        values = self.values.detach() * gate_E.to(self.values).view(1, -1, 1, 1)
        out = values.new_zeros(self.num_matrices, self.intermediate_size, self.hidden_size)
        out.index_add_(1, self.index.view(-1), values.flatten(1, 2))
        return [*out[:-1], out[-1].t()]

    def size(self) -> Tensor:
        return self.values.detach().square().sum(dim=(0, 3)).sqrt()

    def keep(self, sparsity: float) -> int:
        return count_rewritten(sparsity, self.intermediate_size)

    def take(self, kept: Tensor, like_values: Tensor) -> Tensor:
        index = kept.view(1, *kept.shape, 1).expand(self.num_matrices, -1, -1, self.hidden_size)
        return like_values.gather(2, index)

    def places(self) -> Tensor:
        return self.index

    def usage(self) -> Tensor:
        return self.values.square().sum(dim=(0, 3))
