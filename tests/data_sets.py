"""Rows for tests of the build: many, varied, the same for a seed."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from hub_text import TOPICS, prose
from srde.data.domains import DOMAINS


def rows(count: int, seed: int = 0, low: int = 12, high: int = 40) -> list[dict]:
    """Questions and answers of the six domains in turn, no two alike."""
    rng = Random(seed)
    topics = sorted(TOPICS)
    return [
        {
            "domain": DOMAINS[place % 6],
            "source": f"made_{place % 6}_{place % 2}",
            "id": f"{seed}-{place}",
            "license": ("MIT", "Apache-2.0", "CC-BY-4.0")[place % 3],
            "prompt": f"{prose(rng, rng.choice(topics), low, high)} What follows for {place}?",
            "response": prose(rng, rng.choice(topics), low // 2, high // 2),
        }
        for place in range(count)
    ]


def write_rows(path: Path, content: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def result(work_dir: Path) -> dict[str, bytes]:
    """All files that a build leaves for others, by their names."""
    return {
        path.relative_to(work_dir).as_posix(): path.read_bytes()
        for path in sorted(work_dir.rglob("*"))
        if path.is_file() and ".build" not in path.parts
    }
