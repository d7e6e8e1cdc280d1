"""A conversation with a model: its turns, its route, and what it drops when the context is full."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from srde.data.view.reading import write_file
from srde.errors import UsageError
from srde.infer.analysis import Analysis, analyse
from srde.infer.generate import Answer
from srde.infer.prompts import as_turns, check_lengths, context_length, encode_prompt
from srde.infer.route import routed
from srde.infer.settings import Settings
from srde.infer.stream import Piece, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Chat:
    """A conversation. The whole of it that fits is read again for each answer, so an answer depends on nothing but its turns.

        chat = Chat(model, tokenizer, Settings(temperature=0.7), system="Be brief.")
        for piece in chat.say("What is 17 + 25?"):
            print(piece.text, end="", flush=True)

    Args:
        model: A causal language model, with or without an srde adapter.
        tokenizer: Its tokenizer.
        settings: How answers are generated.
        system: What the system says first.

    Attributes:
        turns: All turns so far as ``{"role", "content"}``, the system's left out.
        forgotten: How many of the oldest the model is not shown any more, because they do not fit its context.
        answer: The last answer; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings | None = None,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.settings = settings or Settings()
        self.turns: list[dict[str, str]] = []
        self.forgotten = 0
        self.answer: Answer | None = None
        self.route: tuple[str | None, int | str | None] = (None, None)
        self._asked: list[int] = []
        self._asked_by = self.route

    def set_route(self, route: str | None = None, expert: int | str | None = None) -> None:
        """Changes who speaks from now on; as in `srde.infer.route.routed`.

        Raises:
            ConfigError: There is no such expert; the route stays what it was.
            UsageError: The model has no adapter.
        """
        with routed(self.model, route, expert):
            self.route = (route, expert)

    def reset(self) -> None:
        """Forgets all turns; the system's text, the settings and the route stay."""
        self.turns, self.forgotten, self.answer = [], 0, None

    def say(self, text: str) -> Iterator[Piece]:
        """Asks, and yields the answer's pieces. An answer that is broken off (the iterator is closed, Ctrl-C) stays in the
        conversation as far as it got; where generating fails, the question does not stay either.

        Raises:
            ConfigError: The question alone leaves no room for an answer, or the template refuses it.
        """
        forgotten, answers = self.forgotten, None
        asked, asked_by = self._asked, self._asked_by
        self.turns.append({"role": "user", "content": text})
        try:
            self._fit()
            answers = stream(self.model, self.tokenizer, [self._shown()], **self.settings.options())
            self._asked_by = self.route
            with routed(self.model, *self.route):
                yield from answers
        except Exception:
            self.turns.pop()
            self.forgotten, self._asked, self._asked_by = forgotten, asked, asked_by
            raise
        finally:
            if self.turns and self.turns[-1]["role"] == "user":  # also when the reader leaves early
                self._keep(answers and answers.answers.get(0))

    def again(self) -> Iterator[Piece]:
        """Asks the last question once more, and forgets the answer that it had.

        Raises:
            UsageError: Nothing was asked yet.
        """
        if not self.turns:
            raise UsageError.of("regenerate", None, rule="nothing was asked yet", fix="ask something first")
        self.turns.pop()
        return self.say(self.turns.pop()["content"])

    def analyse(self) -> Analysis:
        """Which experts read the last prompt and wrote the last answer, with the route that it had.

        Raises:
            UsageError: There is no answer yet, or no adapter is active.
        """
        if self.answer is None:
            raise UsageError.of(
                "analysis", None, rule="there is no answer to look at yet", fix="ask something first"
            )
        with routed(self.model, *self._asked_by):
            return analyse(self.model, self.tokenizer, self._asked, self.answer.ids)

    def save(self, path: str | Path) -> None:
        """Writes the conversation as one row of JSONL with ``messages``, as `srde train` and ``--prompts_file`` read it.

        Raises:
            UsageError: Nothing was said yet, or the file cannot be written.
        """
        if not self.turns:
            raise UsageError.of("save", str(path), rule="nothing was said yet", fix="ask something first")
        messages = as_turns(self.turns, self.system)
        write_file(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")

    def _shown(self) -> list[dict[str, str]]:
        return as_turns(self.turns[self.forgotten :], self.system)

    def _fit(self) -> None:
        """Leaves out the oldest questions with their answers until prompt and answer fit the model's context."""
        limit = context_length(self.model)
        room = self.settings.max_new_tokens
        self._asked = encode_prompt(self.tokenizer, self._shown())
        while limit is not None and len(self._asked) + room > limit and len(self.turns) - self.forgotten > 1:
            self.forgotten += 2
            self._asked = encode_prompt(self.tokenizer, self._shown())
        check_lengths(self.model, [self._asked], room)

    def _keep(self, answer: Answer | None) -> None:
        self.answer = answer
        self.turns.append({"role": "assistant", "content": answer.text if answer else ""})
