"""Writes the quickstart's data set: short questions of the six domains, made on the spot, with verified answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from srde.data import gym, programs, schedules, science
from srde.data.items import Item, Task, drawn
from srde.errors import ConfigError

# Chosen so that a model of 135 M parameters gets most of the items wrong before training and clearly more of them right after
# 300 examples a domain. The items of a domain come from its tasks in turn.
_TASKS: dict[str, dict[str, Task]] = {
    "math": {"reasoning_gym.chain_sum": gym.addition},
    "logic": {"reasoning_gym.syllogism": gym.syllogism, "reasoning_gym.aiw": gym.siblings},
    "code": {
        "srde.list_program": drawn(programs.list_program),
        "srde.string_program": drawn(programs.string_program),
    },
    "science": {
        "srde.salt_formula": drawn(science.salt_formula),
        "srde.atom_count": drawn(science.atom_count),
    },
    "planning": {"srde.order": drawn(schedules.order), "reasoning_gym.calendar_arithmetic": gym.weekday},
    "abstract": {
        "reasoning_gym.word_sequence_reversal": gym.reversal,
        "reasoning_gym.number_sequence": gym.sequence,
    },
}
_LICENSE = "Apache-2.0"  # reasoning-gym's and ours
_PATIENCE = 1000  # draws in a row that bring nothing new, after which a task counts as exhausted


class QuickstartPaths(NamedTuple):
    """The two files of the data set."""

    train: Path
    test: Path


def build_quickstart(
    directory: str | Path, *, train_per_domain: int, test_per_domain: int, seed: int
) -> QuickstartPaths:
    """Writes `train.jsonl` and `test.jsonl`, both with the domains in turn.

    The files depend on the arguments alone. All prompts differ, so no test question is trained on; the test questions stay the
    same when `train_per_domain` changes.

    Args:
        directory: Where to write; made if it is not there.
        train_per_domain: Rows of each domain in `train.jsonl`.
        test_per_domain: Rows of each domain in `test.jsonl`.
        seed: Another seed gives other items.

    Raises:
        ConfigError: A domain has no so many different items.
    """
    domains = {domain: _rows(domain, test_per_domain + train_per_domain, seed) for domain in _TASKS}
    paths = QuickstartPaths(Path(directory) / "train.jsonl", Path(directory) / "test.jsonl")
    Path(directory).mkdir(parents=True, exist_ok=True)
    for path, part in (
        (paths.test, slice(None, test_per_domain)),
        (paths.train, slice(test_per_domain, None)),
    ):
        in_turn = zip(*(rows[part] for rows in domains.values()), strict=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in in_turn for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _rows(domain: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` rows of a domain, from its tasks in turn."""
    tasks = _TASKS[domain]
    each = -(-count // len(tasks))
    columns = [_different(source, task, each, seed) for source, task in tasks.items()]
    return [
        {
            "domain": domain,
            "source": source,
            "id": f"{source}/{seed}/{number}",
            "kind": item.kind,
            "prompt": item.prompt,
            "response": item.answer,
            "answer": item.answer,
            "license": _LICENSE,
            "metadata": item.metadata,
        }
        for number, items in enumerate(zip(*columns, strict=True))
        for source, item in zip(tasks, items, strict=True)
    ][:count]


def _different(source: str, task: Task, count: int, seed: int) -> list[Item]:
    """The first `count` items whose prompts differ."""
    items: dict[str, Item] = {}
    in_vain = 0
    for item in task(seed):
        if len(items) == count:
            break
        in_vain = in_vain + 1 if item.prompt in items else 0
        if in_vain == _PATIENCE:
            raise ConfigError.of(
                "train_per_domain", count, rule=f"{source} has only {len(items)} different items for training and test",
                fix="Ask for fewer, or train on your own data with `srde train --train_file`",
            )  # fmt: skip
        items.setdefault(item.prompt, item)
    return list(items.values())
