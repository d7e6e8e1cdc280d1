"""The slow, obvious reference: for every token, build the dense weights ``W + sum_e g_te * Delta_e`` and multiply."""

import torch
from torch import nn

from srde.core import DELTAS, Router, magnitude_scores, random_scores, try_layout
from srde.core.layout import _fit


class Gated(nn.Module):
    def __init__(self, d, f, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(d, f, bias=bias)
        self.up_proj = nn.Linear(d, f, bias=bias)
        self.down_proj = nn.Linear(f, d, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.fc_in = nn.Linear(d, f)
        self.fc_out = nn.Linear(f, d)
        self.act = nn.GELU()

    def forward(self, x):
        return self.fc_out(self.act(self.fc_in(x)))


def slow_mlp(block, layout, x_TD, deltas, gates):
    """One token at a time, dense weights; differentiable by values, gates and inputs."""
    weights = [getattr(block, n) for n in (*layout.ups, layout.down)]
    out = []
    for t, x in enumerate(x_TD):
        dense = [w.weight for w in weights]
        for delta, gate_TE in zip(deltas, gates, strict=True):
            for e in range(delta.num_experts):
                for m, change in enumerate(slow_dense(delta, e)):
                    dense[m] = dense[m] + gate_TE[t, e] * change
        pre = [
            d @ x + (0 if w.bias is None else w.bias) for d, w in zip(dense[:-1], weights[:-1], strict=True)
        ]
        h = getattr(block, layout.act)(pre[0])
        if len(pre) == 2:
            h = h * pre[1]
        out.append(dense[-1] @ h + (0 if weights[-1].bias is None else weights[-1].bias))
    return torch.stack(out)


def slow_dense(delta, e):
    """Expert e's change of each matrix, entry by entry."""
    d, f, m_all = delta.hidden_size, delta.intermediate_size, delta.num_matrices
    out = []
    for m in range(m_all):
        last = m == m_all - 1
        change = torch.zeros((d, f) if last else (f, d), dtype=delta.values.dtype)
        if delta.values.ndim == 4:  # neurons
            for r, neuron in enumerate(delta.index[e].tolist()):
                hot = torch.zeros(f, dtype=change.dtype)
                hot[neuron] = 1
                row = delta.values[m, e, r]
                change = change + (torch.outer(row, hot) if last else torch.outer(hot, row))
        else:
            hot = torch.zeros(len(delta.index[m, e]), change.numel(), dtype=change.dtype)
            hot[torch.arange(len(hot)), delta.index[m, e].long()] = 1
            change = (delta.values[m, e] @ hot).view(change.shape)
        out.append(change)
    return out


def build(
    kind,
    granularity,
    *,
    d=6,
    f=20,
    experts=4,
    top_k=2,
    sparsity=0.2,
    shared=0,
    null=False,
    overlap=False,
    seed=0,
):
    """A float64 MLP with a random delta and router: block, layout, delta, router."""
    torch.manual_seed(seed)
    block = (Gated(d, f) if kind == "gated" else Plain(d, f)).double()
    layout = try_layout(block, _fit(block))
    router = Router(d, experts, top_k, null_expert=null, num_shared=shared).double()
    nn.init.normal_(router.weight)
    delta = DELTAS[granularity](d, f, layout.num_matrices, experts + shared, sparsity).double()
    weights = [getattr(block, n).weight.detach() for n in (*layout.ups, layout.down)]
    if overlap:  # every expert takes the same things
        delta.set_masks(magnitude_scores(weights))
        delta.index.copy_(delta.index[..., :1, :].expand_as(delta.index))
    else:
        delta.set_masks(random_scores(weights, torch.Generator().manual_seed(seed)))
    nn.init.normal_(delta.values)
    return block, layout, delta, router
