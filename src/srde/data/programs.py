"""Small Python programs and what they print, for the quickstart's code domain.

reasoning-gym's own code tasks (Brainf*ck programs, functions of several hundred tokens) are beyond a model of 135 M
parameters, so these are ours: one operation on a short list or on a few words. Each answer is the value of the Python
expression that stands beside the program's text; the tests run the program itself and compare.
"""

from __future__ import annotations

from random import Random

from srde.data.items import Item

_WORDS = (
    "apple bird cloud dance eagle fire glass house ink jump kite lemon moon nest ocean paper queen river stone tree "
    "urn vine wind year zebra bread chair drum earth fox grape hat iron jar king lamp mouse north owl plant"
).split()


def list_program(rng: Random) -> Item:
    """One operation on a short list of numbers."""
    values, k = rng.sample(range(1, 30), rng.randint(3, 4)), rng.randint(1, 9)
    i = rng.randrange(len(values))
    return _printed(
        rng,
        (f"{values}[{i}]", values[i]),
        (f"{values}[{i}:]", values[i:]),
        (f"{values}[::-1]", values[::-1]),
        (f"{values} + [{k}]", [*values, k]),
        (f"len({values})", len(values)),
        (f"max({values})", max(values)),
        (f"min({values})", min(values)),
        (f"sorted({values})", sorted(values)),
    )


def string_program(rng: Random) -> Item:
    """One operation on a few words."""
    words, mark = rng.sample(_WORDS, rng.randint(2, 3)), rng.choice("-_+/*")
    i = rng.randrange(len(words))
    return _printed(
        rng,
        (f"{words}[{i}]", words[i]),
        (f'"{mark}".join({words})', mark.join(words)),
        (f'"{" ".join(words)}".split()', words),
        (f'"{words[0]}".upper()', words[0].upper()),
        (f'"{words[0]}" + "{words[1]}"', words[0] + words[1]),
        (f'"{words[0]}" * 2', words[0] * 2),
        (f"len({words})", len(words)),
    )


def _printed(rng: Random, *candidates: tuple[str, object]) -> Item:
    """Chooses one expression and makes the question out of its text and its value."""
    expression, value = rng.choice(candidates)
    program = f"print({expression})"
    return Item(
        prompt=f"What does this Python program print? Answer with its output only.\n{program}",
        answer=str(value),
        kind="number" if isinstance(value, int) else "exact",
        metadata={"program": program},
    )
