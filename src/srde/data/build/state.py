"""A plan as a file: for `srde data merge`, which has the parts and neither the command that made them nor their sources."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from srde.data.build.plan import PLAN_FILE, Plan, Planned, read_plan
from srde.data.build.settings import BuildSettings
from srde.data.build.write import write_text
from srde.data.sources.files import DataFile, Span
from srde.data.sources.registry import Source, require_name

STATE_FILE = "state.json"


def save_state(plan: Plan, folder: Path) -> None:
    """Writes settings and sources, places included."""
    content = {
        "settings": asdict(plan.settings),
        "train": [asdict(planned) for planned in plan.train],
        "evaluation": [asdict(planned) for planned in plan.evaluation],
    }
    write_text(folder / STATE_FILE, iter([json.dumps(content, indent=1, sort_keys=True) + "\n"]))


def load_state(folder: Path, **changes: Any) -> Plan:
    """The plan of a part, as one of a single part; `changes` replace settings.

    Raises:
        UsageError: The part's files are damaged.
        ConfigError: They hold a name that could lead out of the folder.
    """
    content = read_plan(folder / STATE_FILE)
    settings = BuildSettings(**content["settings"])
    settings = replace(settings, shard_index=0, num_shards=1, upload_repo=None, **changes)
    train, evaluation = ([_planned(one) for one in content[name]] for name in ("train", "evaluation"))
    return Plan(settings, train, evaluation, read_plan(folder / PLAN_FILE))


def _planned(content: dict[str, Any]) -> Planned:
    entry = content["source"]
    for name in (entry["name"], *entry["train"], *entry["evaluation"]):
        require_name(name, STATE_FILE)  # they name folders
    source = Source(**entry | {name: tuple(entry[name]) for name in ("train", "evaluation")})
    files = tuple(
        DataFile(
            **one | {"spans": tuple(Span(**span) for span in one["spans"]), "domains": tuple(one["domains"])}
        )
        for one in content["files"]
    )
    return Planned(source, content["commit"], files, tuple(Span(**span) for span in content["spans"]))
