"""Learns which weights an expert rewrites: top-k of noisy scores, with a gradient.

Letters: F things to choose from (hidden neurons), E experts, R things that one expert rewrites.

The choice is hard in the forward (exactly R ones) and soft in the backward (straight-through). Gumbel noise explores: the
top R of ``logits + Gumbel`` is a sample without replacement (Gumbel top-k: Vieira, 2014; Kool et al., 2019). The soft mask
is ``sigmoid((z - t) / temperature)`` with t such that it adds up to R; t moves with the logits, so a thing gains only at
the cost of the others, and what lies far from the border has no gradient any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srde.errors import ConfigError

_BISECTIONS = 60


class LearnedSparseSelector(nn.Module):
    """Chooses `num_sparse` of `num_params` things, and can be trained to choose well.

        selector = LearnedSparseSelector(num_params=10000, num_sparse=100)
        mask, indices = selector()

    Args:
        num_params: Things to choose from, F.
        num_sparse: How many are chosen, R, at most F.
        num_experts: Makes that many choices side by side; None for one.
        temperature: Softness of the mask's gradient, and size of the noise; lower it to 0 as the choice settles.
        device: Where the logits live.

    Shapes: `logits` is [F] or [E, F], float32, zero at the start.

    Raises:
        ConfigError: More things are to be chosen than there are, or none, or the temperature is negative.
    """

    def __init__(
        self,
        num_params: int,
        num_sparse: int,
        *,
        num_experts: int | None = None,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= num_sparse <= num_params:
            raise ConfigError.of(
                "num_sparse", num_sparse, rule=f"it must be at least 1 and at most num_params={num_params}",
                fix="choose fewer things",
            )  # fmt: skip
        if temperature < 0:
            raise ConfigError.of(
                "temperature", temperature, rule="it must be at least 0", fix="use 1 to begin with"
            )
        shape = (num_params,) if num_experts is None else (num_experts, num_params)
        self.num_params, self.num_sparse = num_params, num_sparse
        self.temperature = temperature
        self.logits = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def forward(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Chooses: in training with noise, in evaluation, or at temperature 0, the best.

        Args:
            generator: Where the noise comes from, on the CPU so that a seed means the same on every device; torch's own if
                left out.

        Returns:
            The mask [..., F] float32 with exactly R ones, whose gradient flows to `logits`; and the chosen positions
            [..., R], long, ascending.
        """
        z: Tensor = self.logits
        if self.training and self.temperature > 0:
            uniform = torch.rand(z.shape, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
            z = z + self.temperature * -(-uniform.log()).log().to(z.device)
        indices = z.detach().topk(self.num_sparse, dim=-1).indices.sort(dim=-1).values
        hard = torch.zeros_like(z).scatter(-1, indices, 1.0)
        if self.temperature == 0:
            return hard, indices
        soft = relaxed_top_k(z, self.num_sparse, self.temperature)
        return hard + (soft - soft.detach()), indices  # in this order: exactly 0 is added

    def extra_repr(self) -> str:
        return f"num_params={self.num_params}, num_sparse={self.num_sparse}, temperature={self.temperature:g}"


def relaxed_top_k(z: Tensor, k: int, temperature: float) -> Tensor:
    """``sigmoid((z - t) / temperature)`` with t such that each row of [..., F] adds up to k; t has its share of the gradient."""
    result: Tensor = _RelaxedTopK.apply(z, k, temperature)
    return result


class _RelaxedTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int, temperature: float) -> Tensor:
        margin = temperature * 60
        low = z.amin(-1, keepdim=True) - margin  # the sum is F there, and 0 at the other end
        high = z.amax(-1, keepdim=True) + margin
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            over = ((z - middle) / temperature).sigmoid().sum(-1, keepdim=True) > k
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        soft = ((z - (low + high) / 2) / temperature).sigmoid()
        ctx.save_for_backward(soft)
        ctx.temperature = temperature
        return soft

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (soft,) = ctx.saved_tensors
        slope = soft * (1 - soft) / ctx.temperature
        total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        # from sum_j sigmoid((z_j - t) / temperature) = k: dt/dz_j = slope_j / sum slope
        mean = (slope * grads[0]).sum(-1, keepdim=True) / total
        return slope * (grads[0] - mean), None, None
