"""An evaluation as plain values, for JSON: no infinity and no NaN, `null` in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from srde.eval.results import Comparison, Difference, Evaluation, Item, Result, compare
from srde.eval.routing import RoutingStatistics
from srde.eval.statistics import Estimate

FORMAT = 1


def as_json(
    experts: Evaluation, base: Evaluation | None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All figures as plain JSON values; `docs/guides/evaluation.md` lists the keys."""
    out: dict[str, Any] = {"format": FORMAT, "settings": dict(settings or {}), "srde": _evaluation(experts)}
    if base is not None:
        out["base"] = _evaluation(base)
        out["difference"] = _comparison(compare(experts, base))
    out["routing"] = None if experts.routing is None else _routing(experts.routing)
    return finite(out)


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, wherever it stands: JSON has no other word for it."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answers(experts: Evaluation, base: Evaluation | None) -> list[dict[str, Any]]:
    """One object for each row: what it is, what the right answer is, and what each model made of it."""
    lines = []
    for place, (row, mine) in enumerate(zip(experts.rows, experts.items, strict=True)):
        line: dict[str, Any] = {
            "id": row.id,
            "source": row.source,
            "domain": row.domain,
            "kind": row.kind,
            "file": row.file,
            "line": row.line,
            "right_answer": row.answer,
            "scored_by": mine.how,
            "tokens": mine.tokens,
            "srde": _item(mine),
        }
        if base is not None:
            line["base"] = _item(base.items[place])
        lines.append(finite(line))
    return lines


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    for (domain, source), result in evaluation.sources.items():
        sources.setdefault(domain, {})[source] = _result(result)
    general = evaluation.general_loss
    return {
        "domains": {
            domain: _result(result)
            | {"expert_load": None if result.load_LE is None else _rows(result.load_LE.tolist())}
            for domain, result in evaluation.domains.items()
        },
        "sources": sources,
        "all": _result(evaluation.total),
        "general": None
        if general is None
        else {
            "paragraphs": general.items,
            "tokens": sum(one.tokens for one in evaluation.general),
            "loss": _number(general.value),
            "loss_se": _number(general.se),
            "loss_ci95": _pair(general),
        },
        "tokens_per_second": _number(evaluation.tokens_per_second),
    }


def _result(result: Result) -> dict[str, Any]:
    accuracy = result.accuracy_estimate
    return {
        "rows": result.rows,
        "tokens": result.tokens,
        "loss": _number(result.loss),
        "loss_se": _number(result.loss_se),
        "loss_ci95": _pair(result.loss_estimate),
        "scored": result.scored,
        "not_run": result.not_run,
        "by_text": result.by_text,
        "accuracy": _number(result.accuracy),
        "accuracy_se": _number(result.accuracy_se),
        "accuracy_ci95": None if accuracy is None else _pair(accuracy),
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    def both(one: Difference) -> dict[str, Any]:
        return {"accuracy": _estimate(one.accuracy), "loss": _estimate(one.loss)}

    sources: dict[str, dict[str, Any]] = {}
    for (domain, source), one in found.sources.items():
        sources.setdefault(domain, {})[source] = both(one)
    return {
        "domains": {domain: both(one) for domain, one in found.domains.items()},
        "sources": sources,
        "all": both(found.total),
        "general": None if found.general is None else {"loss": _estimate(found.general)},
    }


def _routing(routing: RoutingStatistics) -> dict[str, Any]:
    found = routing.specialisation
    return {
        "experts": list(routing.names),
        "open_experts": list(routing.open_experts),
        "tokens": routing.tokens,
        "load": _rows(routing.load_LE.tolist()),
        "entropy_of_load": _numbers(routing.entropy_L.tolist()),
        "entropy_of_load_relative": _number(routing.relative(float(routing.entropy_L.mean()))),
        "token_entropy": _numbers(routing.token_entropy_L.tolist()),
        "token_entropy_relative": _number(routing.relative(float(routing.token_entropy_L.mean()))),
        "dead": [list(place) for place in routing.dead],
        "domain_expert": {
            domain: _numbers(share_E.tolist())
            for domain, share_E in zip(routing.domains, routing.share_DE, strict=True)
        },
        "specialisation": None
        if found is None
        else {
            "bits": _number(found.mean),
            "bits_by_layer": _numbers(found.information_L),
            "bits_by_chance": _number(found.chance),
            "p_value": found.p_value,
            "permutations": found.permutations,
        },
    }


def _item(item: Item) -> dict[str, Any]:
    out = {"answer": item.text, "score": item.score, "loss": _number(item.loss / item.tokens)}
    if item.loglik:
        out["loglik"] = _numbers(item.loglik)
    if item.reason:
        out["reason"] = item.reason
    return out


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {
        "value": _number(estimate.value),
        "se": _number(estimate.se),
        "ci95": _pair(estimate),
        "items": estimate.items,
    }


def _pair(estimate: Estimate) -> list[float | None] | None:
    return None if estimate.ci95 is None else [_number(end) for end in estimate.ci95]


def _number(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [None if not math.isfinite(value) else round(value, 6) for value in values]


def _rows(values: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [_numbers(row) for row in values]
