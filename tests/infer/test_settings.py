"""Sampling options as Transformers names them; what would have no effect is refused."""

import pytest
import torch

from srde.errors import ConfigError
from srde.infer.generate import generate
from srde.infer.settings import Settings


def test_only_what_was_given_is_passed_on():
    assert Settings().options() == {"max_new_tokens": 256}
    assert Settings(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=1).options() == {
        "max_new_tokens": 256, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    }  # fmt: skip
    rest = Settings(
        repetition_penalty=1.2, no_repeat_ngram_size=3, num_beams=2, stop_strings=("a",), use_cache=False
    )
    assert rest.options() == {
        "max_new_tokens": 256, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "num_beams": 2,
        "stop_strings": ("a",), "use_cache": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: an answer needs at least 1 token"),
        ({"temperature": -1.0}, "temperature=-1.0: it must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan: it must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: it is a probability, above 0 and at most 1"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p=1.5: it is a probability"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: it is a number of tokens, at least 1"),
        ({"top_p": 0.9}, "top_p=0.9: it is for drawn tokens, and with temperature=0 none is drawn"),
        ({"seed": 3}, "seed=3: it is for drawn tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: it divides scores"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size=0: it is a number of tokens"),
        ({"num_beams": 0}, "num_beams=0: there is at least 1 beam"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams=2: beam search looks for the likeliest text"),
    ],
)
def test_a_contradiction_is_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        Settings(**fields)
    assert message in str(error.value)


def test_a_seed_draws_the_same_again_and_none_draws_anew(named):
    model, tokenizer = named

    def drawn(settings):
        with torch.random.fork_rng():
            settings.start()
            return generate(model, tokenizer, ["yes"], **settings.options()).answers[0].ids

    seeded = Settings(max_new_tokens=12, temperature=5.0, seed=3)
    assert drawn(seeded) == drawn(seeded)
    free = Settings(max_new_tokens=12, temperature=5.0)
    assert drawn(free) != drawn(free)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}], ids=str
)
def test_a_batch_answers_each_prompt_as_if_it_were_alone_with_every_option(named, options):
    """A penalty for what was there must not count the padding."""
    model, tokenizer = named
    prompts = ["what is 1", "how many are there 2 3 4 5 6 7 8 9", "yes", "no is 1", "0 1 2"]
    alone = [generate(model, tokenizer, [p], max_new_tokens=8, **options).answers[0] for p in prompts]
    together = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=5, **options).answers
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [a.ids for a in alone] != [
        a.ids for a in generate(model, tokenizer, prompts, max_new_tokens=8).answers
    ]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.load_E, other.load_E)
