"""From token ids to text: at once, or token by token as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mark = TypeVar("Mark")
_BROKEN = "\ufffd"  # what an incomplete character decodes to


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_strings: Sequence[str] = ()
) -> str:
    """An answer's text: without special tokens, up to the first stop string, without white space around it."""
    text = _decode(tokenizer, ids)
    found = [at for at in (text.find(string) for string in stop_strings) if at >= 0]
    return text[: min(found, default=len(text))].strip()


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens as they are written; "" for the first tokens of a character of several.

    Put together, they are the whole text.
    """
    splitter = _Splitter(tokenizer, skip_special_tokens=False)
    texts = [splitter.push(token) for token in ids]
    if texts:
        texts[-1] += splitter.rest()
    return texts


class LiveText(Generic[Mark]):
    """The text of an answer while its tokens come; its pieces, put together, are `answer_text` of all of them.

    Held back are the first tokens of a character of several, white space until something follows, and what may become a stop
    string.

    Args:
        tokenizer: Decodes.
        stop_strings: Texts that end the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self._splitter = _Splitter(tokenizer, skip_special_tokens=True)
        self._strings = tuple(stop_strings)
        self._waiting: list[tuple[str, Mark]] = []
        self._begun = self._over = False
        self._last: list[Mark] = []

    def push(self, token: int, mark: Mark) -> list[tuple[str, Mark]]:
        """The pieces that a further token completes, each with the mark of the token that it came from."""
        self._last = [mark]
        return self._take(self._splitter.push(token), mark, last=False)

    def finish(self) -> list[tuple[str, Mark]]:
        """The pieces that were held back and belong to the answer."""
        return [piece for mark in self._last for piece in self._take(self._splitter.rest(), mark, last=True)]

    def _take(self, text: str, mark: Mark, *, last: bool) -> list[tuple[str, Mark]]:
        if self._over:
            return []
        if text:
            self._waiting.append((text, mark))
        whole = "".join(part for part, _ in self._waiting)
        found = [at for at in (whole.find(string) for string in self._strings) if at >= 0]
        if found:
            keep, self._over = min(found), True
        else:
            keep = len(whole) - (0 if last else self._possible(whole))
        keep = len(whole[:keep].rstrip())
        skip = 0 if self._begun else len(whole[:keep]) - len(whole[:keep].lstrip())
        self._begun = self._begun or keep > 0
        return self._cut(skip, keep)

    def _possible(self, text: str) -> int:
        """How long an end of the text is that could be the beginning of a stop string."""
        return max(
            (
                n
                for string in self._strings
                for n in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:n])
            ),
            default=0,
        )

    def _cut(self, skip: int, keep: int) -> list[tuple[str, Mark]]:
        """Takes the first `keep` characters out of what waits, and drops the first `skip` of these."""
        pieces, place, rest = [], 0, []
        for text, mark in self._waiting:
            start, end = max(skip - place, 0), min(max(keep - place, 0), len(text))
            if text[start:end]:
                pieces.append((text[start:end], mark))
            if text[end:]:
                rest.append((text[end:], mark))
            place += len(text)
        self._waiting = rest
        return pieces


class _Splitter:
    """Decodes token by token: what a token adds to the text of those before it. The last whole piece is decoded along, as some
    tokenizers treat the first token of a text in another way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._told = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._new(hold=True)

    def rest(self) -> str:
        return self._new(hold=False)

    def _new(self, *, hold: bool) -> str:
        before = _decode(self._tokenizer, self._ids[: self._told], skip=self._skip)
        whole = _decode(self._tokenizer, self._ids, skip=self._skip)
        if len(whole) <= len(before) or (hold and whole.endswith(_BROKEN)):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return whole[len(before) :]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip: bool = True) -> str:
    # tidying up spaces would change code, and text that was told already
    return tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
