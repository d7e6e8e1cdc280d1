"""Runs of `srde train` on a tiny model, and what they leave behind, to compare bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rig import Job, Rig

from srde.artifacts import verify

STEPS = 20
PHASES = {
    "warm_up": (0, 2),
    "mask_learning": (2, 6),
    "expert_pretraining": (6, 9),
    "delta_training": (9, 12),
    "joint": (12, 20),
}
SETTINGS = """
--max_steps 20 --max_length 96 --logging_steps 3 --save_steps 3 --save_total_limit 3 --disable_tqdm true --use_cpu
--num_experts 5 --initial_sparsity 0.25 --target_sparsity 0.1 --phase_warmup_steps 2 --mask_learning_steps 4
--supervised_experts --expert_pretrain_steps 3 --delta_training_steps 6 --warm_start domains --progressive_unlock linear
""".split()
"""All phases in 20 steps; prunes after steps 11, 12, 13, 15 and 16; a checkpoint and an evaluation every 3 steps."""
SIMPLE = """
--max_steps 6 --max_length 96 --logging_steps 1 --save_steps 2 --disable_tqdm true --use_cpu --num_experts 3
--initial_sparsity 0.25 --target_sparsity 0.1 --mask_init magnitude --phase_warmup_steps 0 --delta_training_steps 0
""".split()
"""Six steps that train everything; nothing is held out."""
WORDS = "yes no one two red blue day night up down left right".split()


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Rows of three domains and of different lengths."""
    rows = []
    for number in range(count):
        words = [
            WORDS[(number * 5 + seed + place * (1 + number % 3)) % len(WORDS)]
            for place in range(1 + number % 4)
        ]
        domain = ("math", "code", "logic")[number % 3]
        rows.append({"prompt": f"what is {number}", "response": " ".join(words), "domain": domain})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def events(out: Path, *names: str) -> list[dict[str, Any]]:
    """The run's events of these names; all, if none is given."""
    file = out / "events.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [event for event in found if not names or event["event"] in names]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The run's metrics, less the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "clock"} for line in lines]


def digests(folder: Path) -> dict[str, str]:
    """The hash of every file of a folder that verifies, but the manifest."""
    verify(folder)
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "MANIFEST.json"
    }


def state(out: Path, steps: int = STEPS) -> dict[str, Any]:
    """All that a finished run says and keeps, less what the clock says."""
    results = json.loads((out / "train_results.json").read_text())
    results.pop("seconds")
    results["log"] = [entry for entry in results["log"] if "train_runtime" not in entry]
    found: dict[str, Any] = {"metrics": metrics(out), "results": results}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        found[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    for folder in (f"checkpoint-{steps}", "checkpoint-best"):
        if (out / folder).is_dir():
            found |= {f"{folder}/{name}": digest for name, digest in digests(out / folder).items()}
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What is not the same in two runs; of lists, from where on."""
    names = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a == b:
            continue
        if name == "metrics":
            place = next(
                (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
            )
            names.append(
                f"metrics, {len(a)} and {len(b)} lines, from {a[place : place + 1]} and {b[place : place + 1]} on"
            )
        elif name == "results":
            names += [f"results: {key}" for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        else:
            names.append(name)
    return names


class Lab:
    """Starts runs that share a base, rows and a rig.

    Attributes:
        rig: The process that forks.
        base: A tiny model.
        rows: What is trained on.
        held_out: What is held out.
    """

    def __init__(self, rig: Rig, base: Path, folder: Path) -> None:
        self.rig, self.base, self.folder = rig, base, folder
        self.rows = write_rows(folder / "train.jsonl", 40)
        self.held_out = write_rows(folder / "eval.jsonl", 9, seed=7)
        self._finished: dict[tuple[str, ...], dict[str, Any]] = {}

    def argv(self, out: Path | str, *more: str, settings: list[str] = SETTINGS) -> list[str]:
        """The command line of a run; what is given later counts."""
        fixed = ["--model_name", str(self.base), "--train_file", str(self.rows), "--output_dir", str(out)]
        held_out = ["--eval_file", str(self.held_out)] if settings is SETTINGS else []
        return ["train", *fixed, *held_out, *settings, *more]

    def run(self, out: Path | str, *more: str, settings: list[str] = SETTINGS, **how: Any) -> Job:
        """Runs to the end, whatever that is."""
        return self.rig.run(self.argv(out, *more, settings=settings), **how)

    def start(self, out: Path | str, *more: str, settings: list[str] = SETTINGS, **how: Any) -> Job:
        """Starts a run."""
        return self.rig.start(self.argv(out, *more, settings=settings), **how)

    def finish(
        self, out: Path, *more: str, settings: list[str] = SETTINGS, steps: int = STEPS
    ) -> dict[str, Any]:
        """Runs to the end, which must be a good one; the run's state then."""
        job = self.run(out, *more, settings=settings)
        assert job.code == 0, job.text()[-3000:]
        assert not [path.name for path in out.iterdir() if path.name.startswith((".tmp-", ".old-"))]
        return state(out, steps)

    def uninterrupted(self, *more: str, settings: list[str] = SETTINGS, steps: int = STEPS) -> dict[str, Any]:
        """The state of a run that nothing happens to; each kind is run once."""
        key = (*settings, *more)
        if key not in self._finished:
            out = self.folder / f"uninterrupted-{len(self._finished)}"
            self._finished[key] = self.finish(out, *more, settings=settings, steps=steps)
        return self._finished[key]

    def same(
        self,
        out: Path,
        *more: str,
        settings: list[str] = SETTINGS,
        steps: int = STEPS,
        less: Collection[str] = (),
    ) -> None:
        """Runs to the end, and requires what an uninterrupted run leaves; `less` names files of which it does not."""
        found = self.finish(out, *more, settings=settings, steps=steps)
        changed = differences(self.uninterrupted(*more, settings=settings, steps=steps), found)
        changed = [name for name in changed if name not in less]
        assert not changed, changed
