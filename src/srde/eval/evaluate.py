"""Accuracy, loss and routing on held-out rows, per domain.

Letters: B rows, S positions, L layers, E experts (routed, then shared).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from srde.data.pack import PaddedCollator
from srde.data.rows import Row
from srde.data.tokenize import IGNORE, tokenize_row
from srde.eval.scoring import is_scorable, score
from srde.infer.generate import generate
from srde.tuner import Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANY = "(no domain)"
SPEED_TOKENS = 32
Progress = Callable[[int], None]


@dataclass(frozen=True)
class DomainResult:
    """One model on the rows of one domain.

    Attributes:
        rows: How many rows.
        loss: Mean cross-entropy per trained token, in nats.
        scored: How many rows have an answer that can be scored.
        accuracy: Their mean score, 0 to 1; None if none can be scored.
        load_LE: Mean gate of each expert in each layer over the rows' tokens; None for a model without experts.
    """

    rows: int
    loss: float
    scored: int
    accuracy: float | None
    load_LE: Tensor | None


@dataclass(frozen=True)
class Evaluation:
    """One model on all rows.

    Attributes:
        domains: Domain -> result, in order of first appearance.
        tokens_per_second: New tokens per second over one batch of prompts, `SPEED_TOKENS` each; None if nothing was asked.
        answers: Row number -> the text that was scored.
    """

    domains: dict[str, DomainResult]
    tokens_per_second: float | None
    answers: dict[int, str]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 48,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Measures a model on held-out rows; the base of a model with experts is measured inside `model.disable_adapter()`.

    Args:
        model: A causal language model, with or without an srde adapter.
        tokenizer: Its tokenizer.
        rows: Rows with responses; those with a `kind` and an `answer` are also asked and scored.
        batch_size: Rows per forward.
        max_new_tokens: Most tokens per answer.
        progress: Called with a number of rows as they are done; every scored row counts twice.
    """
    model.eval()
    losses, gates = _losses(model, tokenizer, rows, batch_size, progress)
    asked = [
        i
        for i, row in enumerate(rows)
        if row.prompt and row.answer is not None and is_scorable(row.kind or "")
    ]
    texts: dict[int, str] = {}
    for first in range(0, len(asked), 4 * batch_size):
        chunk = asked[first : first + 4 * batch_size]
        prompts = [rows[i].prompt for i in chunk]
        got = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        texts |= {i: answer.text for i, answer in zip(chunk, got, strict=True)}
        progress(len(chunk))
    scores = {
        i: score(str(rows[i].kind), text, rows[i].answer, rows[i].metadata) for i, text in texts.items()
    }
    domains: dict[str, DomainResult] = {}
    for domain in dict.fromkeys(row.domain or ANY for row in rows):
        mine = [i for i, row in enumerate(rows) if (row.domain or ANY) == domain]
        scored = [scores[i] for i in mine if i in scores]
        loads = [gates[i] for i in mine if i in gates]
        domains[domain] = DomainResult(
            rows=len(mine),
            loss=sum(losses[i][0] for i in mine) / sum(losses[i][1] for i in mine),
            scored=len(scored),
            accuracy=sum(scored) / len(scored) if scored else None,
            load_LE=torch.stack([g for g, _ in loads]).sum(0) / sum(n for _, n in loads) if loads else None,
        )
    speed = None
    if asked:  # as many tokens for every model, whatever it has to say: short answers would look slow
        prompts = [rows[i].prompt for i in asked[:batch_size]]
        options = {"max_new_tokens": SPEED_TOKENS, "min_new_tokens": SPEED_TOKENS, "batch_size": batch_size}
        speed = generate(model, tokenizer, prompts, **options).tokens_per_second
    return Evaluation(domains, speed, texts)


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    progress: Progress,
) -> tuple[dict[int, tuple[float, int]], dict[int, tuple[Tensor, int]]]:
    """Per row: summed loss with the number of trained tokens, and summed gates [L, E] with the number of tokens."""
    examples = [tokenize_row(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(examples[i].input_ids))
    collate = PaddedCollator(tokenizer.pad_token_id)
    routing = getattr(model, "srde", None)
    losses: dict[int, tuple[float, int]] = {}
    gates: dict[int, tuple[Tensor, int]] = {}
    for first in range(0, len(order), batch_size):
        chunk = order[first : first + batch_size]
        batch = {k: v.to(model.device) for k, v in collate([examples[i] for i in chunk]).items()}
        labels, _ = batch.pop("labels"), batch.pop("domain_ids")
        with torch.inference_mode():
            if isinstance(routing, Routing):
                with routing.record() as record:
                    logits = model(**batch, use_cache=False).logits
            else:
                record, logits = None, model(**batch, use_cache=False).logits
            targets = labels[:, 1:]
            nll_BS = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
            ).view(targets.shape)
        for b, i in enumerate(chunk):
            losses[i] = nll_BS[b].sum().item(), int((targets[b] != IGNORE).sum())
        if record is not None and record.calls:
            mask_BS = batch["attention_mask"]
            gate_LTE = torch.stack([r.gate_TE for r in record.calls[0].routes.values()]).float()
            gate_LBSE = gate_LTE.view(len(gate_LTE), *mask_BS.shape, -1) * mask_BS[None, :, :, None]
            gates |= {i: (gate_LBSE[:, b].sum(1), int(mask_BS[b].sum())) for b, i in enumerate(chunk)}
        progress(len(chunk))
    return losses, gates
