"""Science questions over the table of elements, for the quickstart.

The facts (names, symbols, atomic numbers, charges of ions) come from the `periodictable` package (public domain), not from
us. What is learned is the rule, which held-out items can test, and not a list of facts, which they could not.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from random import Random

from srde.data.items import Item

# The usual charges of ions that form salts. `periodictable` lists every charge ever seen and not which is usual, so that
# choice is ours; that the element has the charge is checked against the table in the tests.
_CATIONS = {
    "Li": 1, "Na": 1, "K": 1, "Rb": 1, "Cs": 1, "Ag": 1, "Cu": 1, "Be": 2, "Mg": 2, "Ca": 2, "Sr": 2, "Ba": 2, "Zn": 2,
    "Cd": 2, "Fe": 2, "Co": 2, "Ni": 2, "Mn": 2, "Pb": 2, "Sn": 2, "Hg": 2, "Al": 3, "Ga": 3, "In": 3, "Sc": 3, "Y": 3,
    "La": 3, "Cr": 3, "Bi": 3, "V": 3, "Ti": 4, "Zr": 4, "Hf": 4, "Th": 4, "U": 4,
}  # fmt: skip
_ANIONS = {"F": 1, "Cl": 1, "Br": 1, "I": 1, "O": 2, "S": 2, "Se": 2, "Te": 2, "N": 3, "P": 3, "As": 3}


@cache
def _names() -> dict[str, str]:
    import periodictable  # reads its tables when imported

    return {element.symbol: element.name for element in periodictable.elements}


def _salt(rng: Random) -> tuple[dict[str, int], str]:
    """The charges of two ions, and the formula of their salt: the smallest counts whose charges cancel."""
    cation, anion = rng.choice(sorted(_CATIONS)), rng.choice(sorted(_ANIONS))
    positive, negative = _CATIONS[cation], _ANIONS[anion]
    shared = gcd(positive, negative)
    counts = ((cation, negative // shared), (anion, positive // shared))
    formula = "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in counts)
    return {cation: positive, anion: -negative}, formula


def _ion(symbol: str, charge: int) -> str:
    """An ion as chemists write it: Al3+, Cl-."""
    return f"{symbol}{abs(charge) if abs(charge) > 1 else ''}{'+' if charge > 0 else '-'}"


def salt_formula(rng: Random) -> Item:
    """The formula of the salt of two ions."""
    charges, formula = _salt(rng)
    first, second = (_ion(symbol, charge) for symbol, charge in charges.items())
    return Item(
        prompt=f"What is the formula of the compound of {first} and {second}? Answer with the formula only.",
        answer=formula,
        kind="exact",
        metadata={"charges": charges},
    )


def atom_count(rng: Random) -> Item:
    """How many atoms of an element, given by name, are in a salt's formula."""
    charges, formula = _salt(rng)
    (cation, positive), (anion, negative) = charges.items()
    shared = gcd(positive, negative)
    symbol, count = rng.choice([(cation, -negative // shared), (anion, positive // shared)])
    name = _names()[symbol]
    return Item(
        prompt=f"How many {name} atoms are in one unit of {formula}? Answer with the number only.",
        answer=str(count),
        kind="number",
        metadata={"formula": formula, "element": name},
    )
