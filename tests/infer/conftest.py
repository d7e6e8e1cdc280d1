"""A tiny model with four named experts whose routes matter, and its tokenizer."""

import pytest
from adapters import config, fill
from peft import get_peft_model

from tiny import VOCABULARY, tiny, tiny_tokenizer

NAMES = ["math", "code", "math", "logic"]


@pytest.fixture(scope="session")
def named():
    """Model and tokenizer; nothing may be left changed on them."""
    tokenizer = tiny_tokenizer()
    base = tiny(vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3)
    return fill(get_peft_model(base, config(expert_names=NAMES))).eval(), tokenizer
