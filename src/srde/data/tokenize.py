"""Turns rows into token ids with labels: the prompt is masked, the response and its end are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from srde.data.domains import number_domains
from srde.data.rows import Row
from srde.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label that PyTorch's cross-entropy leaves out."""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised row: `input_ids` and `labels` of one length; a label is `IGNORE` or the id at its own place.

    The model shifts them: the label at place t is predicted from places before t, so that of place 0 never counts.
    `domain_id` is the number of the row's domain, -1 without one.
    """

    input_ids: list[int]
    labels: list[int]
    domain_id: int = -1


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The examples of a data set, in the rows' order, and how many rows were left out as too long."""

    examples: list[Example]
    dropped: int

    @property
    def trained_tokens(self) -> int:
        """How many labels count in the loss."""
        return sum(_trained(example) for example in self.examples)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[dict[str, str]]) -> list[int]:
    """The ids after which the model speaks: the prompt as `tokenize_row` puts it before a response.

    Args:
        tokenizer: With a chat template, its own; without, the turns' contents are put one a line.
        prompt: The turns as ``{"role", "content"}``; at least one.
    """
    if tokenizer.chat_template:
        return _encode(tokenizer, _render(tokenizer, prompt, add_generation_prompt=True))
    return _encode_plain(tokenizer, _join(prompt))


def tokenize_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """Tokenises one row.

    With a chat template, the conversation is rendered by it, and what follows the generation prompt is trained, up to and
    with the token that ends the turn. Without one: prompt, line break, response, end-of-sequence. Plain text is taken as it
    is, with end-of-sequence after it, and trained as a whole.

    Raises:
        DataError: The template refuses the conversation or renders it in a way that cannot be split, or no label is left.
    """
    if not row.prompt:
        ids = _with_end(tokenizer, _encode_plain(tokenizer, row.response))
        example = Example(ids, list(ids))
    else:
        prompt, ids = _chat(tokenizer, row) if tokenizer.chat_template else _plain(tokenizer, row)
        example = Example(ids, [IGNORE] * len(prompt) + ids[len(prompt) :])
    if not _trained(example):
        field = "response" if row.prompt else "text"
        raise DataError.at(row.file, row.line, field, "leaves no token to train: every label is masked")
    return example


def tokenize_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, max_length: int) -> Tokenized:
    """Tokenises a data set, and numbers its domains as `number_domains` does.

    Rows of more than `max_length` tokens are left out and counted, never cut: a cut response would teach the model to stop in
    mid-sentence.

    Raises:
        DataError: There are no rows, all of them are too long, or one breaks a rule.
    """
    if not rows:
        raise DataError.at("rows", None, "file", "there is no row to train on: every label would be masked")
    numbers = number_domains(row.domain for row in rows)
    examples = [
        replace(tokenize_row(tokenizer, row), domain_id=numbers.get(row.domain or "", -1)) for row in rows
    ]
    kept = [example for example in examples if len(example.input_ids) <= max_length]
    if not kept:
        shortest = min(range(len(rows)), key=lambda index: len(examples[index].input_ids))
        length, row = len(examples[shortest].input_ids), rows[shortest]
        raise DataError.at(
            row.file,
            row.line,
            "row",
            f"has {length} tokens and is the shortest of {len(rows)} rows, all longer than max_length={max_length}; "
            f"nothing is left to train on. Set --max_length to {length} or more",
        )
    return Tokenized(kept, dropped=len(examples) - len(kept))


def _trained(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels[1:])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with the tokenizer's own start of sequence, but without an end: what follows decides on that."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _with_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _join(prompt: Sequence[dict[str, str]]) -> str:
    return "".join(f"{turn['content']}\n" for turn in prompt)


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    return tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _continue(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], whole: list[int], response: str
) -> list[int]:
    """Ids of prompt and response that begin with the prompt's own ids.

    Where a token of the whole text straddles the border, both sides are tokenised apart: the model meets the prompt's ids as
    they are when it generates.
    """
    return whole if whole[: len(prompt)] == prompt else prompt + _encode(tokenizer, response)


def _plain(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    prompt = prompt_ids(tokenizer, row.prompt)
    whole = _encode_plain(tokenizer, _join(row.prompt) + row.response)
    return prompt, _with_end(tokenizer, _continue(tokenizer, prompt, whole, row.response))


def _chat(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    from jinja2 import TemplateError

    try:
        before = _render(tokenizer, row.prompt, add_generation_prompt=True)
        whole = _render(
            tokenizer,
            [*row.prompt, {"role": "assistant", "content": row.response}],
            add_generation_prompt=False,
        )
    except TemplateError as error:  # templates refuse by raising, e.g. "roles must alternate"
        raise DataError.at(
            row.file, row.line, "messages", f"the model's chat template refuses them: {error}"
        ) from error
    if not whole.startswith(before):
        raise DataError.at(
            row.file, row.line, "messages",
            "the model's chat template renders them so that the prompt is no prefix of the conversation, and the response cannot "
            'be told from it. Give the rows as plain "text", or the tokenizer another chat template',
        )  # fmt: skip
    # Templates put a line break after the token that ends the turn; generation stops before it.
    whole = whole.rstrip()
    prompt = _encode(tokenizer, before)
    ids = _continue(tokenizer, prompt, _encode(tokenizer, whole), whole[len(before) :])
    # Without an ending of the template's own, the model would never learn to stop.
    return prompt, ids if ids[-1] in tokenizer.added_tokens_decoder else _with_end(tokenizer, ids)
