"""Token ids as readable pieces: each a run of tokens that stands for whole characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
_LONGEST = 16  # tokens after which a text that stays broken is shown as it is


@dataclass(frozen=True)
class Piece:
    """Some tokens as text.

    Attributes:
        text: What they decode to.
        start: The place of the first of them.
        end: Past the last.
        trained: Their labels count in the loss.
        special: A special token, such as the end of a turn.
    """

    text: str
    start: int
    end: int
    trained: bool
    special: bool


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]
) -> Iterator[Piece]:
    """Decodes token by token, so that every character is told to be trained or not.

    A character of several bytes can be spread over tokens: these are one piece. Where it lies on a border between trained and
    other tokens, each side is shown as what it is, a broken character.

    Args:
        tokenizer: The one that made the ids.
        ids: Token ids; one outside the vocabulary is shown as ``<id 99999>``.
        trained: Whether each is trained.
    """
    special = {place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    size = len(tokenizer)

    def decode(low: int, high: int) -> str:
        return tokenizer.decode(ids[low:high], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # The tokens before a piece are decoded with it, since some tokenizers drop a space at the start of a text.
    context = start = 0
    for place, token in enumerate(ids):
        if not 0 <= token < size:
            if start < place:
                yield Piece(
                    _after(decode(context, start), decode(context, place)),
                    start,
                    place,
                    trained[start],
                    False,
                )
            yield Piece(f"<id {token}>", place, place + 1, trained[place], True)
            context = start = place + 1
            continue
        end = place + 1
        text = _after(decode(context, start), decode(context, end))
        closes = end == len(ids) or trained[end] != trained[start] or ids[end] in special or token in special
        whole = bool(text) and not text.endswith(BROKEN)
        if whole or closes or end - start >= _LONGEST:
            yield Piece(text, start, end, trained[start], token in special)
            context, start = (start, end) if whole else (end, end)


def _after(before: str, both: str) -> str:
    """What a text has more than its beginning; all of it where decoding more tokens has changed the beginning."""
    return both[len(before) :] if both.startswith(before) else both
