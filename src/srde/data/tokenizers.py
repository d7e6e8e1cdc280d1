"""Loads the tokenizer that a user names, and tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from srde.errors import ConfigError, SrdeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer for generation: padded on the left, with some padding token.

    Raises:
        ConfigError: There is none at that place.
    """
    from transformers import AutoTokenizer

    with explained("model_name_or_path", name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What tokenised data depend on: sha256 of the vocabulary, of the chat template ("" without one), and of all else that a fast
    tokenizer does to a text, its end-of-sequence token included."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    template = tokenizer.chat_template or ""
    rest: dict[str, object] = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id}
    if tokenizer.is_fast:
        steps = json.loads(tokenizer.backend_tokenizer.to_str())
        rest |= {name: steps.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "model")}
    return {
        "steps": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest(),
        "vocabulary": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
        "chat_template": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
    }


class explained:
    """Turns what Transformers raises for a wrong name into a message that names it."""

    def __init__(self, thing: str, value: str) -> None:
        self.thing, self.value = thing, value

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError | ValueError | json.JSONDecodeError) and not isinstance(
            error, SrdeError
        ):
            raise ConfigError.of(
                self.thing, self.value, rule=f"it must be a folder or a hub id of a causal language model ({first_line(error)})",
                fix="check the name; without a network, only folders and models already in the cache can be loaded",
            ) from error  # fmt: skip


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
