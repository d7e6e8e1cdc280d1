"""Multiple choice by log-likelihood: which of "The answer is A", "The answer is B", ... a model finds likeliest.

The candidates stand where the row's response stands, tokenised as a response would be; what would end the turn is left off. A
candidate's log-likelihood is the sum over its tokens. Candidates differ in the letter alone, so their lengths need no
normalising.

The options of a row are the first `metadata["n_options"]` letters; without that, those of the last list in the prompt whose lines
begin with `A)`, `(A)`, `A.` or `A:`, and so on without a gap. They are *not found* where there are fewer than two, or the
right answer is not among them: such a row is asked like any other, and its text is scored.

The answer is the likeliest letter. Where k letters are exactly as likely, which the few digits of bfloat16 make common, they
share the point: 1 / k if the right one is among them. To take the first would favour models where answers lean to A.

Where each candidate is one token behind the same beginning, as with most tokenizers, one position of one forward scores all
letters; and where the row's own response begins that way too, it is the forward that measures the row's loss.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from srde.data.rows import Row
from srde.data.tokenize import Encoded, encode_rows
from srde.errors import DataError
from srde.eval.losses import Passage, Reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUE = "The answer is "
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[).:])(?=\s|$)", re.MULTILINE)


@dataclass(frozen=True)
class Choice:
    """How a row's letters are scored.

    Attributes:
        letters: The options, in order.
        in_row: Whether the row's own passage scores them.
        passages: What else must be read: nothing; one passage for all letters; or one for each.
    """

    letters: str
    in_row: bool
    passages: tuple[Passage, ...]


def letters_of(row: Row) -> str:
    """The letters that a row of kind `choice` offers; empty for other rows, and where they are not found."""
    if row.kind != "choice" or not row.prompt or row.answer is None:
        return ""
    count = row.metadata.get("n_options")
    if isinstance(count, int):
        letters = LETTERS[: max(count, 0)]
    else:
        letters = ""
        for bracketed, plain in _OPTION.findall(row.prompt[-1]["content"]):
            letter = bracketed or plain
            if letter == "A":
                letters = "A"  # another list begins, as in a prompt with worked examples
            elif letters and letter == LETTERS[len(letters) % len(LETTERS)]:
                letters += letter
    return letters if len(letters) >= 2 and right_letter(row) in tuple(letters) else ""


def right_letter(row: Row) -> str:
    """The answer of a row of kind `choice` without brackets, as a capital."""
    return str(row.answer).strip("() ").upper()


def choices(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], own: Sequence[Encoded]
) -> list[Choice | None]:
    """How to score each row; None for rows without letters.

    Args:
        tokenizer: The model's.
        rows: Any rows.
        own: The rows as they are tokenised for the loss.

    Raises:
        DataError: The chat template refuses the conversation.
    """
    found = [letters_of(row) for row in rows]
    asked = [
        replace(row, response=CUE + letter)
        for row, letters in zip(rows, found, strict=True)
        for letter in letters
    ]
    encoded = iter(encode_rows(tokenizer, asked))
    return [
        _choice(letters, [_open_ended(tokenizer, next(encoded)) for _ in letters], one) if letters else None
        for letters, one in zip(found, own, strict=True)
    ]


def row_passage(encoded: Encoded, choice: Choice | None) -> Passage:
    """The passage that measures a row's loss, and its letters where it can."""
    first = max(encoded.prompt_length, 1)
    if choice is None or not choice.in_row:
        return Passage(encoded.input_ids, first)
    shared = choice.passages[0]
    return Passage(encoded.input_ids, first, shared.at, shared.candidates)


def loglik(choice: Choice, own: Reading, others: Sequence[Reading]) -> tuple[float, ...]:
    """The log-likelihood of each letter, in nats.

    Args:
        choice: How the letters are scored.
        own: The reading of the row's own passage.
        others: Those of `extra_passages(choice)`.
    """
    if choice.in_row:
        return own.loglik
    return others[0].loglik if others[0].loglik else tuple(-one.loss for one in others)


def extra_passages(choice: Choice) -> tuple[Passage, ...]:
    """What must be read beside the row itself."""
    return () if choice.in_row else choice.passages


def pick(choice: Choice, loglik: Sequence[float], right: str) -> tuple[str, float]:
    """The likeliest letters as a text, such as `The answer is B` or, in a tie, `The answer is B or C`; and the score, 0 to 1."""
    top = max(loglik)
    best = [letter for letter, value in zip(choice.letters, loglik, strict=True) if value == top]
    return CUE + " or ".join(best), 1 / len(best) if right in best else 0.0


def _open_ended(tokenizer: PreTrainedTokenizerBase, encoded: Encoded | DataError) -> Encoded:
    """A tokenised row without what ends its turn."""
    if isinstance(encoded, DataError):
        raise encoded
    ends = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    ids = list(encoded.input_ids)
    while ids[-1] in ends:
        ids.pop()
    return Encoded(ids, encoded.prompt_length)


def _choice(letters: str, options: Sequence[Encoded], own: Encoded) -> Choice:
    ids = [one.input_ids for one in options]
    first = max(options[0].prompt_length, 1)
    at = len(ids[0]) - 1
    together = at >= first and all(len(one) == len(ids[0]) and one[:at] == ids[0][:at] for one in ids)
    if not together:
        return Choice(
            letters,
            False,
            tuple(Passage(one, max(o.prompt_length, 1)) for o, one in zip(options, ids, strict=True)),
        )
    passage = Passage(ids[0][:at], first, at, tuple(one[at] for one in ids))
    same_start = own.prompt_length == options[0].prompt_length and own.input_ids[:at] == ids[0][:at]
    return Choice(letters, same_start, (passage,))
