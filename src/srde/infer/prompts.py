"""From prompts to batches of token ids: the chat template, padding on the left, and what goes together.

Letters: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srde.data.tokenize import prompt_ids
from srde.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turns = Sequence[dict[str, str]]
Prompt = str | Turns


def as_turns(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """A prompt as a conversation; the system's text goes in front of one that has none of its own."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is None or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """The ids [S] after which the model speaks.

    Args:
        tokenizer: With a chat template, its own; without, the turns' contents are put one a line.
        prompt: A text, or a conversation of ``{"role", "content"}``.
        system: What the system says first, where the conversation has no such turn.
        raw: The text as it is, without the template: to be continued instead of answered.

    Raises:
        ConfigError: The template refuses the conversation, nothing is left to read, or a raw prompt is no text.
    """
    from jinja2 import TemplateError

    if raw:
        if not isinstance(prompt, str) or system is not None:
            raise ConfigError.of(
                "raw", True, rule="what is continued as it is must be a text, without turns or a system's text",
                fix="leave raw out for conversations",
            )  # fmt: skip
        ids = tokenizer(prompt)["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    else:
        try:
            ids = prompt_ids(tokenizer, as_turns(prompt, system))
        except TemplateError as error:  # templates refuse by raising, e.g. "System role not supported"
            raise ConfigError.of(
                "prompt", _shown(prompt), rule=f"the model's chat template refuses it: {error}",
                fix="give turns that the template knows, or leave the system's text out",
            ) from error  # fmt: skip
    if not ids:
        raise ConfigError.of(
            "prompt", _shown(prompt), rule="it gives no token to start from", fix="write something"
        )
    return list(ids)


def context_length(model: PreTrainedModel) -> int | None:
    """How many positions a model was made for; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_lengths(model: PreTrainedModel, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuses prompts that leave no room for an answer.

    Raises:
        ConfigError: A prompt and its answer may not fit the model's positions.
    """
    limit = context_length(model)
    longest = max(map(len, ids), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigError.of(
            "prompt's tokens", longest,
            rule=f"with max_new_tokens={max_new_tokens} they exceed the model's {limit} positions",
            fix="shorten the prompt or lower max_new_tokens",
        )  # fmt: skip


def batches(lengths: Sequence[int], batch_size: int, *, even: bool = False) -> list[list[int]]:
    """Which prompts are answered together: those of similar length, so that little is padded.

    Args:
        lengths: Of each prompt.
        batch_size: Most prompts of a batch.
        even: Only prompts of one length go together, so that nothing is padded.

    Returns:
        Prompts' numbers; the batches in the order of their first prompts.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError.of(
            "batch_size", batch_size, rule="a batch has at least 1 prompt", fix="use 1 or more"
        )
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = groups and len(groups[-1]) < batch_size and not (even and lengths[i] != lengths[groups[-1][0]])
        if fits:
            groups[-1].append(i)
        else:
            groups.append([i])
    return sorted(groups, key=min)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with. Padding is masked, so any will do where the tokenizer has none of its own."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else int(found)


def padded(ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, S], padded on the left."""
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + list(row) for row in ids], device=device),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device
        ),
    }


def _shown(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else " / ".join(turn["role"] for turn in prompt)
    return text if len(text) <= 60 else f"{text[:57]}..."
