"""The data set's card: what it holds, where it is from, under which licences."""

from __future__ import annotations

from typing import Any

import yaml

from srde.data.build.plan import Plan
from srde.data.packed import TRAIN_FILE, VALIDATION_FILE


def card(plan: Plan, report: dict[str, Any]) -> str:
    """A README.md with the hub's metadata, which make `data.jsonl` load as the split train."""
    header = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": path}
                    for split, path in (("train", TRAIN_FILE), ("validation", VALIDATION_FILE))
                    if report["splits"][split]["examples"]  # `datasets` refuses empty splits
                ],
            }
        ],
        "task_categories": ["text-generation"],
        "tags": ["reasoning", "srde"],
    }
    splits, settings = report["splits"], plan.settings
    train = splits["train"]
    domains = [
        f"| {name} | {counts['train']:,} | {counts['validation']:,} | {counts['train_tokens']:,} |"
        for name, counts in report["domains"].items()
    ]
    sources = []
    for planned in plan.train:
        source = planned.source
        place = source.hub or (f"reasoning-gym {source.gym}" if source.gym else "local files")
        sources.append(
            f"| {source.name} | {place} | {source.domain or 'by row'} | {source.license or 'by row'} |"
        )
    compared = ", ".join(report["evaluation"]) or "none"
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# Reasoning data of {len(report["domains"])} domains

{train["examples"]:,} training and {splits["validation"]["examples"]:,} held-out rows of `messages` with `domain`, `source`,
`license` and `id`. `tokenized/` holds them packed into rows of {settings.max_length:,} tokens for `{plan.identity["model"]}`
({train["tokens"]:,} training tokens, rows {100 * train["filled"]:.1f} % full).

| domain | training rows | held-out rows | training tokens |
|---|---:|---:|---:|
{chr(10).join(domains)}

| source | from | domain | licence |
|---|---|---|---|
{chr(10).join(sources)}

Exact duplicates, near duplicates (Jaccard similarity of 3-word n-grams of {settings.near_duplicate_threshold} or more, and the
same answer) and rows that hold a question of an evaluation set are left out; `tokenized/dropped.jsonl` names each.
Compared with: {compared}.
Each row is under its own licence.
"""
