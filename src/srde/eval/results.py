"""What an evaluation found: row by row, by source, by domain, and over all; and how two models differ on the same rows.

Letters: L layers, E experts (routed, then shared).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from srde.data.rows import Row
from srde.errors import UsageError
from srde.eval.routing import Gates, RoutingStatistics
from srde.eval.statistics import Estimate, mean, mean_of, paired_mean, paired_ratio, ratio

ANY = "(no domain)"
NO_SOURCE = "(no source)"
How = Literal["letters", "text", "not run", "not scored"]
Key = TypeVar("Key", bound=Hashable)
SourceKey = tuple[str, str]  # domain and source


@dataclass(frozen=True)
class Item:
    """One model on one row.

    Attributes:
        loss: Summed cross-entropy of the trained tokens, in nats.
        tokens: How many there are.
        how: `letters`: by the log-likelihood of each; `text`: by what was generated; `not run`: a program, without leave to run
            it; `not scored`: no known answer, or no rule for its kind.
        score: 0 to 1; None where nothing was scored.
        text: What was scored: the generated text, or the likeliest letter.
        loglik: The log-likelihood of each letter, in nats; empty for other rows.
        reason: Why a program failed.
        gates: What the routers did with the row's tokens; None without experts.
    """

    loss: float
    tokens: int
    how: How = "not scored"
    score: float | None = None
    text: str | None = None
    loglik: tuple[float, ...] = ()
    reason: str = ""
    gates: Gates | None = None


@dataclass(frozen=True)
class Result:
    """One model on a group of rows.

    Attributes:
        rows: How many rows.
        tokens: Their trained tokens.
        loss_estimate: Mean cross-entropy per trained token, in nats.
        scored: How many rows have a score.
        accuracy_estimate: Their mean score, 0 to 1; None if there is none.
        not_run: How many rows were not asked, because that would have run a program.
        by_text: How many rows of kind `choice` were scored by their text, because their letters were not found.
        load_LE: Mean gate of each expert in each layer over the rows' tokens; None for a model without experts, and over all.
    """

    rows: int
    tokens: int
    loss_estimate: Estimate
    scored: int
    accuracy_estimate: Estimate | None
    not_run: int = 0
    by_text: int = 0
    load_LE: Tensor | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy per trained token, in nats."""
        return self.loss_estimate.value

    @property
    def loss_se(self) -> float | None:
        """Its standard error."""
        return self.loss_estimate.se

    @property
    def accuracy(self) -> float | None:
        """Mean score, 0 to 1; None if nothing was scored."""
        return None if self.accuracy_estimate is None else self.accuracy_estimate.value

    @property
    def accuracy_se(self) -> float | None:
        """Its standard error."""
        return None if self.accuracy_estimate is None else self.accuracy_estimate.se


@dataclass(frozen=True)
class Evaluation:
    """One model on all rows.

    Attributes:
        rows: The rows.
        items: What was found for each.
        domains: Domain -> result, in order of first appearance.
        sources: (domain, source) -> result, by domain, in order of first appearance.
        total: The mean over domains, each counting once.
        general: What was found for each paragraph of general text.
        routing: What the routers did with the rows; None for a model without experts.
        tokens_per_second: New tokens per second over one batch of prompts; None if nothing was generated.
    """

    rows: tuple[Row, ...]
    items: tuple[Item, ...]
    domains: dict[str, Result]
    sources: dict[SourceKey, Result]
    total: Result
    general: tuple[Item, ...] = ()
    routing: RoutingStatistics | None = None
    tokens_per_second: float | None = None

    @property
    def answers(self) -> dict[int, str]:
        """Row number -> the text that was scored."""
        return {place: item.text for place, item in enumerate(self.items) if item.text is not None}

    @property
    def general_loss(self) -> Estimate | None:
        """Mean cross-entropy per token of the general text, in nats; None without one."""
        return ratio([one.loss for one in self.general], [one.tokens for one in self.general])


@dataclass(frozen=True)
class Difference:
    """Experts minus base on the same rows: below zero in the loss and above zero in the accuracy, the experts are better."""

    loss: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Experts minus base, row by row, by the groups of `Evaluation`."""

    domains: dict[str, Difference]
    sources: dict[SourceKey, Difference]
    total: Difference
    general: Estimate | None


def summed_up(
    rows: Sequence[Row],
    items: Sequence[Item],
    *,
    general: Sequence[Item] = (),
    routing: RoutingStatistics | None = None,
    tokens_per_second: float | None = None,
) -> Evaluation:
    """Groups the items of all rows."""
    domains = {name: _result([items[i] for i in mine], rows, mine) for name, mine in by_domain(rows).items()}
    sources = {key: _result([items[i] for i in mine], rows, mine) for key, mine in by_source(rows).items()}
    losses = mean_of([one.loss_estimate for one in domains.values()])
    assert losses is not None
    total = Result(
        rows=len(rows),
        tokens=sum(one.tokens for one in domains.values()),
        loss_estimate=losses,
        scored=sum(one.scored for one in domains.values()),
        accuracy_estimate=mean_of([one.accuracy_estimate for one in domains.values() if one.accuracy_estimate]),
        not_run=sum(one.not_run for one in domains.values()),
        by_text=sum(one.by_text for one in domains.values()),
    )  # fmt: skip
    return Evaluation(
        tuple(rows), tuple(items), domains, sources, total, tuple(general), routing, tokens_per_second
    )


def compare(experts: Evaluation, base: Evaluation) -> Comparison:
    """The paired differences of two evaluations.

    Args:
        experts: The model with its experts.
        base: The same model without, on the same rows and the same general text.

    Raises:
        UsageError: The rows are not the same, or not scored in the same way.
    """
    if experts.rows != base.rows or [one.tokens for one in experts.general] != [
        one.tokens for one in base.general
    ]:
        raise UsageError.of(
            "rows", f"{len(experts.rows)} and {len(base.rows)}", rule="two models are compared on the same rows",
            fix="evaluate both on one list of rows, with the same general text",
        )  # fmt: skip
    if [one.how for one in experts.items] != [one.how for one in base.items]:
        raise UsageError.of(
            "scored", f"{experts.total.scored} and {base.total.scored}",
            rule="two models are compared by scores of the same kind",
            fix="pass the same confirm_run_unsafe_code to both",
        )  # fmt: skip

    def difference(mine: Sequence[int]) -> Difference:
        pairs = [(experts.items[i], base.items[i]) for i in mine]
        loss = paired_ratio(
            [a.loss for a, _ in pairs], [b.loss for _, b in pairs], [a.tokens for a, _ in pairs]
        )
        assert loss is not None
        scores = [(a.score, b.score) for a, b in pairs if a.score is not None and b.score is not None]
        return Difference(loss, paired_mean([a for a, _ in scores], [b for _, b in scores]))

    domains = {name: difference(mine) for name, mine in by_domain(experts.rows).items()}
    losses = mean_of([one.loss for one in domains.values()])
    assert losses is not None
    return Comparison(
        domains=domains,
        sources={key: difference(mine) for key, mine in by_source(experts.rows).items()},
        total=Difference(losses, mean_of([one.accuracy for one in domains.values() if one.accuracy])),
        general=paired_ratio(
            [one.loss for one in experts.general],
            [one.loss for one in base.general],
            [one.tokens for one in base.general],
        ),
    )


def by_domain(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Domain -> the places of its rows."""
    return _places([row.domain or ANY for row in rows])


def by_source(rows: Sequence[Row]) -> dict[SourceKey, list[int]]:
    """Domain and source -> the places of their rows; domains in order, and in each its sources."""
    places = _places([(row.domain or ANY, row.source or NO_SOURCE) for row in rows])
    order = list(by_domain(rows))
    return dict(sorted(places.items(), key=lambda entry: order.index(entry[0][0])))


def _places(keys: Sequence[Key]) -> dict[Key, list[int]]:
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def _result(items: Sequence[Item], rows: Sequence[Row], mine: Sequence[int]) -> Result:
    scores = [one.score for one in items if one.score is not None]
    gates = [one.gates for one in items if one.gates is not None]
    loss = ratio([one.loss for one in items], [one.tokens for one in items])
    assert loss is not None
    return Result(
        rows=len(items),
        tokens=sum(one.tokens for one in items),
        loss_estimate=loss,
        scored=len(scores),
        accuracy_estimate=mean(scores),
        not_run=sum(one.how == "not run" for one in items),
        by_text=sum(
            one.how == "text" and rows[i].kind == "choice" for i, one in zip(mine, items, strict=True)
        ),
        load_LE=torch.stack([one.sum_LE for one in gates]).sum(0).float() / sum(one.tokens for one in gates)
        if gates
        else None,
    )
