"""Turns rows into token ids with labels: the prompt is masked, the response and its end are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
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
class Encoded:
    """A row's ids. The first `prompt_length` of them are given, what follows is trained."""

    input_ids: list[int]
    prompt_length: int

    @property
    def trained_tokens(self) -> int:
        """Labels that count in the loss: the first token of all is never predicted."""
        return len(self.input_ids) - max(self.prompt_length, 1)

    def example(self, domain_id: int = -1) -> Example:
        """The same with labels."""
        labels = [IGNORE] * self.prompt_length + self.input_ids[self.prompt_length :]
        return Example(self.input_ids, labels, domain_id)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A data set, tokenised.

    Attributes:
        examples: In the rows' order.
        dropped: How many rows were left out as too long.
        rows: The row of each example.
        domains: The domains by their numbers.
    """

    examples: list[Example]
    dropped: int
    rows: list[Row]
    domains: list[str]

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
    """Tokenises one row; see `encode_row`."""
    return encode_row(tokenizer, row).example()


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
    """Tokenises one row.

    With a chat template, the conversation is rendered by it, and what follows the generation prompt is trained, up to and
    with the token that ends the turn. Without one: prompt, line break, response, end-of-sequence. Plain text is taken as it
    is, with end-of-sequence after it, and trained as a whole.

    Raises:
        DataError: The template refuses the conversation or renders it in a way that cannot be split, nothing would end the
            response, or no label is left.
    """
    if not row.prompt:
        return _checked(row, _with_end(tokenizer, row, _encode_plain(tokenizer, row.response)), 0)
    prompt, ids = _chat(tokenizer, row) if tokenizer.chat_template else _plain(tokenizer, row)
    return _checked(row, ids, len(prompt))


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Encoded | DataError]:
    """The same for many rows at once, about twice as fast; the error in the place of a row that `encode_row` would refuse.

    A conversation is tokenised once, as a whole, and split where the response begins. That is what `encode_row` does if the
    prompt ends in a special token and a text that is tokenised on its own account in both; else the row goes that way.
    """
    fast: dict[int, Encoded] = {}
    if tokenizer.is_fast and tokenizer.chat_template:
        fast = _encode_at_once(tokenizer, rows)
    elif tokenizer.is_fast and tokenizer.eos_token_id is not None:
        fast = _encode_plain_at_once(tokenizer, rows)
    encoded: list[Encoded | DataError] = []
    for place, row in enumerate(rows):
        try:
            encoded.append(fast.get(place) or encode_row(tokenizer, row))
        except DataError as error:
            encoded.append(error)
    return encoded


def _encode_at_once(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> dict[int, Encoded]:
    """The rows whose border between prompt and response is certain, by place."""
    from jinja2 import TemplateError

    places = [place for place, row in enumerate(rows) if row.prompt]
    if not places:
        return {}
    try:
        before = _render_all(tokenizer, [rows[place].prompt for place in places], add_generation_prompt=True)
        turns = [
            [*rows[place].prompt, {"role": "assistant", "content": rows[place].response}] for place in places
        ]
        whole = [text.rstrip() for text in _render_all(tokenizer, turns, add_generation_prompt=False)]
    except TemplateError:
        return {}  # one at a time, so that the row is named
    added = tokenizer.added_tokens_decoder
    tail = _generation_tail(before[0], [token.content for token in added.values()])
    if not tail:
        return {}
    marker, text = tail
    ending = _encode(tokenizer, marker + text)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    certain = {}
    for place, prompt, rendered, encoding in zip(
        places, before, whole, backend.encode_batch_fast(whole, add_special_tokens=False), strict=True
    ):
        if not (prompt.endswith(marker + text) and rendered.startswith(prompt)):
            continue
        if marker in rendered[len(prompt) :]:
            continue
        ids = encoding.ids
        # The last marker among the ids is the one that begins the tail: none follows in the text.
        border = len(ids) - ids[::-1].index(ending[0]) - 1 + len(ending)
        if ids[border - len(ending) : border] == ending and border < len(ids) and ids[-1] in added:
            certain[place] = Encoded(ids, border)
    return certain


def _encode_plain_at_once(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> dict[int, Encoded]:
    """The rows with a prompt, by place, as `_plain` puts them; for tokenizers without a chat template."""
    places = [place for place, row in enumerate(rows) if row.prompt]
    if not places:
        return {}
    before = tokenizer([_join(rows[place].prompt) for place in places])["input_ids"]
    whole = tokenizer([_join(rows[place].prompt) + rows[place].response for place in places])["input_ids"]
    end = [tokenizer.eos_token_id]
    encoded = {}
    for place, prompt, ids in zip(places, before, whole, strict=True):
        prompt, ids = _without_end(tokenizer, prompt), _without_end(tokenizer, ids)
        encoded[place] = Encoded(_continue(tokenizer, prompt, ids, rows[place].response) + end, len(prompt))
    return encoded


def _generation_tail(prompt: str, special: Sequence[str]) -> tuple[str, str] | None:
    """What the template ends every prompt with: the last special token of a rendered prompt, and what follows it."""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True) if token)
    matches = list(re.finditer(pattern, prompt)) if pattern else []
    return (matches[-1].group(), prompt[matches[-1].end() :]) if matches else None


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_length: int,
    domains: Sequence[str | None] = (),
) -> Tokenized:
    """Tokenises a data set, and numbers its domains as `number_domains` does, those in `domains` first.

    Rows of more than `max_length` tokens are left out and counted, never cut: a cut response would teach the model to stop in
    mid-sentence.

    Raises:
        DataError: There are no rows, all of them are too long, or one breaks a rule.
    """
    if not rows:
        raise DataError.at("rows", None, "file", "there is no row to train on: every label would be masked")
    numbers = number_domains([*domains, *(row.domain for row in rows)])
    encoded = []
    for one in encode_rows(tokenizer, rows):
        if isinstance(one, DataError):
            raise one
        encoded.append(one)
    short = [(row, one) for row, one in zip(rows, encoded, strict=True) if len(one.input_ids) <= max_length]
    kept = [one.example(numbers.get(row.domain or "", -1)) for row, one in short]
    if not kept:
        shortest = min(range(len(rows)), key=lambda index: len(encoded[index].input_ids))
        length, row = len(encoded[shortest].input_ids), rows[shortest]
        raise DataError.at(
            row.file,
            row.line,
            "row",
            f"has {length} tokens and is the shortest of {len(rows)} rows, all longer than max_length={max_length}; "
            f"nothing is left to train on. Set --max_length to {length} or more",
        )
    return Tokenized(
        kept, dropped=len(rows) - len(kept), rows=[row for row, _ in short], domains=list(numbers)
    )


def _trained(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels[1:])


def _checked(row: Row, ids: list[int], prompt_length: int) -> Encoded:
    encoded = Encoded(ids, prompt_length)
    if encoded.trained_tokens < 1:
        field = "response" if row.prompt else "text"
        raise DataError.at(row.file, row.line, field, "leaves no token to train: every label is masked")
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids with the tokenizer's own start of sequence, but without an end: what follows decides on that."""
    return _without_end(tokenizer, tokenizer(text)["input_ids"])


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _with_end(tokenizer: PreTrainedTokenizerBase, row: Row, ids: list[int]) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError.at(
            row.file, row.line, "response" if row.prompt else "text",
            "nothing would end it: the tokenizer has no end-of-sequence token and its chat template, if any, puts no special "
            "token after the response, so the model would never learn to stop. Set the tokenizer's eos_token",
        )  # fmt: skip
    return [*ids, tokenizer.eos_token_id]


def _join(prompt: Sequence[dict[str, str]]) -> str:
    return "".join(f"{turn['content']}\n" for turn in prompt)


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> str:
    return tokenizer.apply_chat_template(
        list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    add_generation_prompt: bool,
) -> list[str]:
    return tokenizer.apply_chat_template(
        [list(turns) for turns in conversations], tokenize=False, add_generation_prompt=add_generation_prompt
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
    return prompt, _with_end(tokenizer, row, _continue(tokenizer, prompt, whole, row.response))


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
    return prompt, ids if ids[-1] in tokenizer.added_tokens_decoder else _with_end(tokenizer, row, ids)
