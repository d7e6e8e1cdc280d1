"""Writes the quickstart's data set: short questions of the six domains, made on the spot, with verified answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from srde.data import gym, programs, science
from srde.data.items import Item, Task, drawn
from srde.errors import ConfigError

# Chosen so that a model of 135 M parameters gets most of them wrong before training and clearly more of them right after
# 300 examples a domain. The items of a domain come from its tasks in turn.
_TASKS: dict[str, dict[str, Task]] = {
    "math": {"addition": gym.addition},
    "logic": {"syllogism": gym.syllogism, "siblings": gym.siblings},
    "code": {"list_program": drawn(programs.list_program), "string_program": drawn(programs.string_program)},
    "science": {"salt_formula": drawn(science.salt_formula), "atom_count": drawn(science.atom_count)},
    "planning": {"path23": gym.path23, "path33": gym.path33, "weekday": gym.weekday},
    "abstract": {"reversal": gym.reversal, "sequence": gym.sequence},
}
_LICENSES = {"reasoning-gym": "Apache-2.0", "srde": "Apache-2.0"}
_PATIENCE = 1000  # draws in a row that bring nothing new before a task counts as exhausted


class QuickstartPaths(NamedTuple):
    """The two files of the data set."""

    train: Path
    test: Path


def build_quickstart(directory: str | Path, *, train_per_domain: int, test_per_domain: int, seed: int) -> QuickstartPaths:
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
    for path, part in ((paths.test, slice(None, test_per_domain)), (paths.train, slice(test_per_domain, None))):
        in_turn = zip(*(rows[part] for rows in domains.values()), strict=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for rows in in_turn for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def _rows(domain: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The first `count` rows of a domain, from its tasks in turn."""
    tasks = _TASKS[domain]
    quota = -(-count // len(tasks))
    columns = [
        [_row(domain, name, number, item) for number, item in enumerate(_different(name, task, quota, seed))]
        for name, task in tasks.items()
    ]
    return [row for rows in zip(*columns, strict=True) for row in rows][:count]


def _different(name: str, task: Task, count: int, seed: int) -> list[Item]:
    """The first `count` items with different prompts."""
    items: dict[str, Item] = {}
    drawn_in_vain = 0
    for item in task(seed):
        if len(items) == count:
            break
        drawn_in_vain = drawn_in_vain + 1 if item.prompt in items else 0
        if drawn_in_vain == _PATIENCE:
            raise ConfigError.of("x")
        items.setdefault(item.prompt, item)
    return list(items.values())
