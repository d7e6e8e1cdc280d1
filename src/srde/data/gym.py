"""Tasks of reasoning-gym, small and with short prompts, for the quickstart.

reasoning-gym (Apache-2.0) makes and checks the items. Its prompts explain at length how to format an answer; a training run of
minutes cannot pay for that, so the ones here say the same in a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from srde.data.items import Item, Task

_PREMISE = re.compile(r"^\d\. (All|No|Some) (\w+) are (not )?(\w+)$", re.MULTILINE)
_ENDLESS = 2**31  # reasoning-gym makes an item when it is asked for, so the size costs nothing


def _task(name: str, to_item: Callable[[dict[str, Any]], Item | None], **config: Any) -> Task:
    def items(seed: int) -> Iterator[Item]:
        from reasoning_gym import create_dataset  # takes seconds to import

        # Item i of a data set is drawn from seed + i: far apart, two seeds share no item.
        dataset = create_dataset(name, seed=seed * 1_000_003, size=_ENDLESS, **config)
        return (item for index in range(_ENDLESS) if (item := to_item(dataset[index])) is not None)

    return items


def _number(entry: dict[str, Any], question: str) -> Item:
    return Item(f"{question} Answer with the number only.", entry["answer"], "number")


def _addition(entry: dict[str, Any]) -> Item | None:
    expression = entry["question"].split(": ")[1].removesuffix(" =")
    return _number(entry, f"What is {expression}?") if "+" in expression else None


def _as_asked(entry: dict[str, Any]) -> Item:
    return _number(entry, entry["question"])


def _siblings(entry: dict[str, Any]) -> Item | None:
    # One of the task's two templates asks about the brother of somebody whom it has not introduced; leave that out.
    name = entry["question"].split()[0]
    return _as_asked(entry) if f"{name}'s brother" in entry["question"] else None


def _middle_is_distributed(question: str) -> bool:
    """True if a premise speaks of all that the middle term names; without that, nothing follows about the other two."""
    premises = _PREMISE.findall(question)
    first, second = ({subject, predicate} for _, subject, _, predicate in premises)
    distributed = {subject for quantifier, subject, _, _ in premises if quantifier != "Some"}
    distributed |= {
        predicate for quantifier, _, negation, predicate in premises if quantifier == "No" or negation
    }
    return bool(first & second & distributed)


def _syllogism(entry: dict[str, Any]) -> Item | None:
    # reasoning-gym 0.1.25 takes "All A are B, some B are C, so some A are C" for valid; one in five of its Yes is wrong so.
    if entry["answer"] == "Yes" and not _middle_is_distributed(entry["question"]):
        return None
    return Item(entry["question"], entry["answer"], "exact", {"options": ["Yes", "No"]})


def _weekday(entry: dict[str, Any]) -> Item:
    question = entry["question"].split("? ")[0]
    return Item(f"{question}? Answer with the weekday only.", entry["answer"], "exact")


def _reversal(entry: dict[str, Any]) -> Item:
    words = entry["question"].rsplit(": ", 1)[1].strip()
    return Item(f"Reverse this list of words: {words}\nAnswer with the list only.", entry["answer"], "exact")


addition = _task("chain_sum", _addition, min_terms=2, max_terms=2, min_digits=2, max_digits=2)
siblings = _task("aiw", _siblings, task_type_weights=[1, 0, 0], max_entities=9)
syllogism = _task("syllogism", _syllogism, invalid_ratio=0.5)
weekday = _task("calendar_arithmetic", _weekday, tasks=["weekday_offset"], offset_upper_bound=6)
reversal = _task("word_sequence_reversal", _reversal, min_words=3, max_words=3)
sequence = _task("number_sequence", _as_asked, max_complexity=1)
