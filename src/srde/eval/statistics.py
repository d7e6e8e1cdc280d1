"""What a mean over held-out items says about the model: standard errors and 95 % intervals.

Items are taken for independent draws from what the domain could ask. The model is taken as it is: how another training run would
come out is not in any of these numbers.

- An accuracy is a mean of n scores; its standard error is sqrt(variance / n), with n - 1 in the variance.
- A loss per token is a ratio of sums, `sum(loss_i) / sum(tokens_i)`. Rows are the items, not tokens, which depend on each other.
  Its standard error is that of the linearised ratio (the delta method): the residuals `loss_i - ratio * tokens_i` have mean zero,
  and their spread, over the mean number of tokens, is that of the ratio.
- Two models on the same rows are compared row by row: the difference of a row is one item, so what makes a row hard for both
  drops out.
- Over all domains, each domain counts once: the mean of D means, with standard error `sqrt(sum(se_d ** 2)) / D`, and the degrees
  of freedom of Welch and Satterthwaite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over items, and how well they determine it.

    Attributes:
        value: The mean.
        se: Its standard error; None where one item, or none, leaves it unknown.
        df: Degrees of freedom of the standard error; infinite where it is zero.
        items: How many items it is the mean of.
    """

    value: float
    se: float | None
    df: float
    items: int

    @cached_property
    def half_width(self) -> float | None:
        """Half of the 95 % interval: the quantile of Student's t times the standard error; None where that is unknown."""
        if self.se is None:
            return None
        from scipy.stats import t

        return float(t.ppf((1 + LEVEL) / 2, self.df)) * self.se if self.se else 0.0

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95 % interval; None where the standard error is unknown."""
        return (
            None if self.half_width is None else (self.value - self.half_width, self.value + self.half_width)
        )


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean of independent values; None of none."""
    return ratio(values, [1.0] * len(values))


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate | None:
    """`sum(sums) / sum(counts)` over independent items; None of none.

    Args:
        sums: What each item adds, such as its summed loss.
        counts: Of how many parts, such as its tokens; above 0. All 1, this is the mean.
    """
    if not sums:
        return None
    sum_N, count_N = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total = float(count_N.sum())
    value = float(sum_N.sum()) / total
    items = len(sum_N)
    if items < 2:
        return Estimate(value, None, math.nan, items)
    residual_N = sum_N - value * count_N
    se = math.sqrt(items / (items - 1) * float(residual_N @ residual_N)) / total
    return Estimate(value, se, items - 1, items)


def paired_mean(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """The mean of `ours - theirs`, item by item; None of none."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], counts: Sequence[float]) -> Estimate | None:
    """The difference of two ratios over the same items with the same counts; None of none."""
    return ratio([a - b for a, b in zip(ours, theirs, strict=True)], counts)


def mean_of(parts: Sequence[Estimate]) -> Estimate | None:
    """The mean of independent estimates, each counting once; None of none.

    Where the standard error of one is unknown, so is that of the mean.
    """
    if not parts:
        return None
    value = sum(part.value for part in parts) / len(parts)
    items = sum(part.items for part in parts)
    known = [part for part in parts if part.se is not None]
    if len(known) < len(parts):
        return Estimate(value, None, math.nan, items)
    variances = [float(part.se or 0) ** 2 for part in known]
    total = sum(variances)
    below = sum(v * v / part.df for v, part in zip(variances, known, strict=True))
    return Estimate(value, math.sqrt(total) / len(parts), total * total / below if below else math.inf, items)
