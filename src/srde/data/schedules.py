"""Small schedules, for the quickstart's planning domain.

reasoning-gym's planning tasks (mazes, jugs, Sokoban, course schedules) have prompts of hundreds of tokens or need more reckoning
than a model of 135 M parameters learns in minutes, so this one is ours.
"""

from __future__ import annotations

from random import Random

from srde.data.items import Item

_STEPS = (
    "baking building buying cleaning cooking cutting digging drawing driving eating fishing hiking ironing mixing moving "
    "packing painting planting printing reading running sewing singing sleeping swimming testing typing walking washing writing"
).split()


def order(rng: Random) -> Item:
    """The one order of three steps that two conditions allow."""
    first, second, third = rng.sample(_STEPS, 3)
    conditions = [(first, second), (second, third)]
    rng.shuffle(conditions)
    told = [
        f"{before.capitalize()} comes before {after}."
        if rng.random() < 0.5
        else f"{after.capitalize()} comes after {before}."
        for before, after in conditions
    ]
    return Item(
        prompt=f"{' '.join(told)} In which order do the three come? Answer with the list only.",
        answer=f"{first}, {second}, {third}",
        kind="exact",
        metadata={"conditions": conditions},
    )
