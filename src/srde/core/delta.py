"""What every kind of sparse delta can do.

Letters: T tokens, D model width, F hidden neurons, E experts, M matrices of the MLP (3 gated, 2 plain).

A delta holds, for E experts, sparse changes to the M matrices of one MLP. A token's effective weights are
``W + sum_e gate_te * Delta_e`` in *all* M matrices: the mixture is of weights, not of outputs. So it acts in two
places: `expand` on what comes out of the D -> F matrices, before the activation, and `contract` on what comes out
of the F -> D matrix. In between the MLP's own activation runs on the mixed pre-activations, once per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from srde.core.router import Route

Path = Literal["masked", "grouped"]


def count_rewritten(sparsity: float, size: int) -> int:
    """How many of `size` things an expert may rewrite at `sparsity`: rounded down, at least one.

    The allowance of 1e-9 undoes the rounding of products such as ``0.07 * 100``.
    """
    return max(1, int(sparsity * size + 1e-9))


class Delta(nn.Module):
    """Sparse deltas of E experts on one MLP.

    Attributes:
        values: The trained numbers, float32; zero at the start.
        index: Where they lie, whole numbers; saved with the values, always.
    """

    values: nn.Parameter
    index: Tensor
    _after: int
    """How many axes of `values`, from the last, there are from the one that counts rewritten things."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_matrices: int, num_experts: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_matrices = num_matrices
        self.num_experts = num_experts
        self._disjoint: tuple[tuple[int, int], bool] | None = None

    @property
    @abstractmethod
    def positions(self) -> int:
        """How many places there are that `index` can name."""

    @abstractmethod
    def set_masks(self, score: Sequence[Tensor]) -> None:
        """Chooses what each expert rewrites from scores of the base weights, see `srde.core.masks`.

        Args:
            score: M tensors shaped like the weights as `nn.Linear` holds them: [F, D] for the matrices that
                expand, [D, F] for the last. Higher means more worth rewriting. No entry goes to two experts
                while there are enough to go round.
        """

    @abstractmethod
    def expand(self, pre: list[Tensor], x_TD: Tensor, route: Route, path: Path) -> list[Tensor]:
        """Adds the deltas of the D -> F matrices to their outputs `pre`, M - 1 tensors [T, F].

        Where no gradient is recorded the tensors of `pre` are changed in place: they are fresh outputs of the base.
        """

    @abstractmethod
    def contract(self, y_TD: Tensor, h_TF: Tensor, route: Route, path: Path) -> Tensor:
        """Adds the delta of the F -> D matrix, applied to the activations `h_TF`, to the base's output `y_TD`."""

    @abstractmethod
    def dense(self, gate_E: Tensor) -> list[Tensor]:
        """The M dense matrices ``sum_e gate_e * Delta_e``, oriented as `nn.Linear` weights; for merging and tests."""

    @abstractmethod
    def size(self) -> Tensor:
        """How much each rewritten thing is changed: root of the sum of squares, shaped like `index`."""

    @abstractmethod
    def keep(self, sparsity: float) -> int:
        """How many things per expert there are at a sparsity."""

    def prune(self, sparsity: float, score: Tensor | None = None) -> Tensor:
        """Which values survive at a lower sparsity: positions into the pruned axis.

        Args:
            sparsity: The new, lower one.
            score: The worth of each rewritten thing, shaped like `index`; those of the largest change, if left out.

        Returns:
            Long tensor with the leading axes of `index` and the new, smaller last axis, ascending. Apply with `take`.
        """
        score = self.size() if score is None else score
        return score.topk(self.keep(sparsity), dim=-1).indices.sort(dim=-1).values

    @abstractmethod
    def take(self, kept: Tensor, like_values: Tensor) -> Tensor:
        """Selects the surviving entries of a tensor shaped like `values` (the values, or optimizer state)."""

    @abstractmethod
    def places(self) -> Tensor:
        """Where each expert rewrites: [E, N] (long), below `positions` times the number of matrices.

        A place is a neuron or a weight entry; two experts overlap where they share one.
        """

    @abstractmethod
    def usage(self) -> Tensor:
        """How much each expert rewrites: [E, N], the squared sizes of the change at its `places`."""

    def disjoint(self) -> bool:
        """Whether no two experts rewrite the same thing. Looked up again only after the masks have changed; compiled code
        takes the answer of the last look, which has to come before it."""
        if torch.compiler.is_compiling():
            return self._disjoint is not None and self._disjoint[1]
        key = (self.index.data_ptr(), self.index._version)
        if self._disjoint is None or self._disjoint[0] != key:
            place_EN = self.places()
            self._disjoint = key, len(place_EN.unique()) == place_EN.numel()
        return self._disjoint[1]

    def shrink(self, kept: Tensor) -> None:
        """Keeps only the survivors that `prune` named; the parameter object stays the same."""
        self.values.data = self.take(kept, self.values.data)
        self.values.grad = None
        self.index = self.index.gather(-1, kept)
        self._disjoint = None

    def resize(self, sparsity: float) -> None:
        """Gives values and masks the shapes of a sparsity, all zero, for values that come from a file; the parameter object
        stays the same."""
        count, device = self.keep(sparsity), self.index.device
        axis = self.values.ndim - self._after
        shape = (*self.values.shape[:axis], count, *self.values.shape[axis + 1 :])
        self.values.data = torch.zeros(shape, dtype=self.values.dtype, device=device)
        self.values.grad = None
        self.index = self.index.new_zeros(*self.index.shape[:-1], count)
        self._disjoint = None

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, values={tuple(self.values.shape)}"


def gates_to(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Gates in the dtype of the activations they multiply."""
    return gate if gate.dtype == dtype else gate.to(dtype)


def may_write(tensor: Tensor) -> bool:
    """Whether an intermediate result may be changed in place: nobody will ask for its gradient."""
    return not torch.is_grad_enabled() and not tensor.requires_grad
