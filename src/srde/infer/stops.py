"""Where an answer ends: the token or the text that the chat template puts after the assistant's turn, and what the user adds.

A checkpoint whose `generation_config` does not list the token that its template ends a turn with talks on after its answer, in
both roles. So the template is asked, before the first prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from srde.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTENT = "2718281828"  # what a template would neither hold itself nor change


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    Attributes:
        ids: Tokens; an answer counts the one that ended it.
        strings: Texts; an answer's text ends before them.
        note: What was found that the checkpoint does not say itself; None if nothing was.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    note: str | None = None


def find_stops(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: Sequence[str] = (),
    *,
    raw: bool = False,
) -> Stops:
    """What ends an answer of this model.

    Args:
        model: Its `generation_config` names the ends that the checkpoint knows.
        tokenizer: Its chat template is rendered once, and its end-of-sequence token counts too.
        stop_strings: Texts that the user adds.
        raw: The template is not used, so its end of turn is not looked for.

    Raises:
        ConfigError: The template refuses the shortest conversation there is, or a stop string is empty.
    """
    if not all(stop_strings):
        raise ConfigError.of(
            "stop_strings", list(stop_strings), rule="none of them may be empty", fix="leave it out"
        )
    config = getattr(model, "generation_config", None)
    known = getattr(config, "eos_token_id", None)
    known = [] if known is None else known if isinstance(known, list) else [known]
    ids = [*known, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    token, text = end_of_turn(tokenizer) if tokenizer.chat_template and not raw else (None, "")
    note = None
    if token is not None and token not in known:
        ids.append(token)
        note = (
            f"the chat template ends a turn with {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which the model's "
            "generation_config does not list among its ends: answers stop there too"
        )
    elif text:
        note = f"the chat template ends a turn with the text {text!r}: answers stop there"
    strings = (*stop_strings, *([text] if text else []))
    return Stops(tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(strings)), note)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """What the chat template puts after an assistant's content: a special token's id, or a text, or neither.

    Raises:
        ConfigError: The template refuses a conversation of one question and one answer.
    """
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": _CONTENT}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ConfigError.of(
            "chat_template", str(error), rule="it refuses a conversation of one question and one answer",
            fix="mend the tokenizer's chat_template, or use --raw to continue texts without it",
        ) from error  # fmt: skip
    if _CONTENT not in rendered:
        return None, ""  # a template that rewrites what it is given: the checkpoint's own ends hold
    after = rendered.rpartition(_CONTENT)[2].strip()
    if not after:
        return None, ""
    begins = [
        (len(t.content), id_)
        for id_, t in tokenizer.added_tokens_decoder.items()
        if t.content and after.startswith(t.content)
    ]
    return (max(begins)[1], "") if begins else (None, after)


def ended_by_string(
    tokenizer: PreTrainedTokenizerBase, answer: Sequence[int], strings: Sequence[str]
) -> bool:
    """Whether the last token of an answer completes one of the texts.

    Only the end is decoded: a token is at least a byte, and a few more are needed to begin at a whole character.
    """
    if not strings:
        return False
    longest = max(len(string.encode()) for string in strings)
    tail = tokenizer.decode(list(answer[-(longest + 8) :]), clean_up_tokenization_spaces=False)
    return any(string in tail for string in strings)
