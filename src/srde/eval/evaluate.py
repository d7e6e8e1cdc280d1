"""Accuracy, loss and routing of one model on held-out rows.

    experts = evaluate(model, tokenizer, rows, general=load_general(None))
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, general=load_general(None))
    compare(experts, base).total.accuracy.ci95

All losses come from one pass over the rows, the letters of multiple choice from the same pass wherever a row's response begins as
its candidates do. Only rows of other kinds are then asked: greedily, in batches of similar length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from srde.data.rows import Row
from srde.data.tokenize import Encoded, encode_rows
from srde.errors import DataError, UsageError
from srde.eval.choices import choices, extra_passages, letters_of, loglik, pick, right_letter, row_passage
from srde.eval.losses import check_lengths, read
from srde.eval.results import ANY, Evaluation, Item, compare, summed_up
from srde.eval.routing import RoutingStatistics, routing_statistics
from srde.eval.scoring import CODE, is_asked, score_row
from srde.hub.open import experts_config
from srde.infer.generate import generate
from srde.infer.prompts import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ANY", "Evaluation", "compare", "evaluate", "steps"]

SPEED_TOKENS = 32
CHUNK = 4
"""Batches of answers between two signs of progress."""

Progress = Callable[[int], None]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    general: Sequence[Row] = (),
    batch_size: int = 16,
    max_new_tokens: int = 48,
    confirm_run_unsafe_code: bool = False,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Measures a model on held-out rows; the base of a model with experts is measured inside `model.disable_adapter()`.

    Args:
        model: A causal language model, with or without an srde adapter; put into evaluation mode.
        tokenizer: Its tokenizer, padded on whichever side.
        rows: Rows with responses, whose loss is measured; those with a `kind` and an `answer` are also scored.
        general: Plain-text rows that belong to no domain; only their loss is measured.
        batch_size: Most rows per forward; fewer where memory for logits would not suffice.
        max_new_tokens: Most tokens per answer.
        confirm_run_unsafe_code: Leave to run the programs that the model writes for rows of kind `code`; without it these rows
            are not asked, and counted as not run.
        progress: Called with a number of steps as they are done, `steps(rows, general)` in all.

    Returns:
        Losses in nats per trained token, accuracies from 0 to 1, each with its standard error.

    Raises:
        UsageError: There are no rows.
        DataError: A row cannot be tokenised, is longer than the model reads, or has an answer that its kind cannot have.
    """
    if not rows:
        raise UsageError.of(
            "rows", [], rule="there is nothing to evaluate", fix="name a file with held-out rows"
        )
    model.eval()
    encoded, texts = _encoded(tokenizer, rows), _encoded(tokenizer, general)
    asked = [
        i
        for i, row in enumerate(rows)
        if is_asked(row, confirm_run_unsafe_code=confirm_run_unsafe_code) and not letters_of(row)
    ]
    _check_answers([rows[i] for i in asked])
    waiting = set(asked)
    lengths = [
        max(len(one.input_ids), one.prompt_length + max_new_tokens if i in waiting else 0)
        for i, one in enumerate(encoded)
    ]
    check_lengths(model, [*lengths, *(len(one.input_ids) for one in texts)], [*rows, *general])

    options: dict[str, Any] = {"pad_token_id": padding_id(tokenizer), "batch_size": batch_size}
    items = _read_rows(model, tokenizer, rows, encoded, options, progress)
    paragraphs = read(model, [row_passage(one, None) for one in texts], **options, progress=progress)

    asked.sort(key=lambda i: -encoded[i].prompt_length)
    for first in range(0, len(asked), CHUNK * batch_size):
        chunk = asked[first : first + CHUNK * batch_size]
        prompts = [rows[i].prompt for i in chunk]
        got = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        for i, answer in zip(chunk, got, strict=True):
            score, reason = score_row(rows[i], answer.text, confirm_run_unsafe_code=confirm_run_unsafe_code)
            items[i] = replace(items[i], how="text", score=score, text=answer.text, reason=reason)
        progress(len(chunk))
    speed = None
    if asked:  # as many tokens for every model, whatever it has to say: short answers would look slow
        middle = max(len(asked) - batch_size, 0) // 2  # they lie by length: those of a usual one
        prompts = [rows[i].prompt for i in asked[middle : middle + batch_size]]
        options = {"max_new_tokens": SPEED_TOKENS, "min_new_tokens": SPEED_TOKENS, "batch_size": batch_size}
        speed = generate(model, tokenizer, prompts, **options).tokens_per_second
    return summed_up(
        rows,
        items,
        general=[Item(one.loss, one.tokens) for one in paragraphs],
        routing=_routing(model, rows, items),
        tokens_per_second=speed,
    )


def steps(rows: Sequence[Row], general: Sequence[Row] = (), *, confirm_run_unsafe_code: bool = False) -> int:
    """How far `evaluate` counts: every row and paragraph once for its loss, and every row that is asked once more."""
    asked = sum(
        is_asked(row, confirm_run_unsafe_code=confirm_run_unsafe_code) and not letters_of(row) for row in rows
    )
    return len(rows) + len(general) + asked


def _encoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Encoded]:
    found = []
    for one in encode_rows(tokenizer, rows):
        if isinstance(one, DataError):
            raise one
        found.append(one)
    return found


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"


def _check_answers(rows: Sequence[Row]) -> None:
    """Scores the known responses, so that an answer that cannot be scored is found before the model has spoken for an hour; and
    sees to it that programs could be run."""
    if any(row.kind == CODE for row in rows):
        from srde.eval.contained import require_containment
        from srde.eval.contained.answers import tests_of

        require_containment()
    for row in rows:
        if row.kind == CODE:
            tests_of(row)
            continue
        try:
            score_row(row, row.response)
        # a row may hold any JSON: what a scorer makes of an answer of another type is a defect of the row
        except (UsageError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError.at(
                row.file, row.line, "answer", f"cannot be scored as {row.kind}: {_reason(error)}"
            ) from error


def _read_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    encoded: Sequence[Encoded],
    options: dict[str, Any],
    progress: Progress,
) -> list[Item]:
    """Losses, gates and letters of all rows."""
    plans = choices(tokenizer, rows, encoded)
    passages = [row_passage(one, plan) for one, plan in zip(encoded, plans, strict=True)]
    readings = read(model, passages, **options, routing=True, progress=progress)
    extra = [passage for plan in plans if plan is not None for passage in extra_passages(plan)]
    others = iter(read(model, extra, **options))
    items = []
    for row, reading, plan in zip(rows, readings, plans, strict=True):
        item = Item(reading.loss, reading.tokens, gates=reading.gates)
        if plan is not None:
            found = loglik(plan, reading, [next(others) for _ in extra_passages(plan)])
            text, score = pick(plan, found, right_letter(row))
            item = replace(item, how="letters", score=score, text=text, loglik=found)
        elif row.kind == CODE and row.prompt:
            item = replace(item, how="not run")  # until it is
        items.append(item)
    return items


def _routing(model: PreTrainedModel, rows: Sequence[Row], items: Sequence[Item]) -> RoutingStatistics | None:
    gates = [one.gates for one in items if one.gates is not None]
    if not gates:
        return None
    config = experts_config(model)
    names = [f"{e} {config.name_of(e)}" if config.expert_names else str(e) for e in range(config.num_experts)]
    routers = [router for layer in model.srde.layers.values() for router in layer.active_routers()]
    closed = set.intersection(*(set(router.locked) for router in routers))
    return routing_statistics(gates, [row.domain for row in rows], names=names, closed=sorted(closed))
