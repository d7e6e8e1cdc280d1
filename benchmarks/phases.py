"""What phases, schedules, logging and statistics cost: their own time as a share of a training step.

    python benchmarks/phases.py --train_file rows.jsonl

Runs `srde train` in this process with everything on (mask learning, supervised pre-training, progressive unlocking, pruning by
Taylor scores), and times every method that a plain trainer would not call, by wrapping it. What happens once (warm start, a cut
of the sparsity) is told apart. Wrapped methods inside wrapped methods count once.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from srde.quickstart.default_model import default_model, fast_dtype
from srde.train.arguments import DataArguments, ExpertArguments, ModelArguments, RunArguments
from srde.train.control import Controller
from srde.train.record import Record
from srde.train.run import run
from srde.train.runner import RunTrainer
from srde.train.steps import StepTrainer
from srde.tuner.control import Routing

RESULTS = Path(__file__).parent / "results" / "phases.json"
EVERY_STEP = {
    Controller: ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "drop_inactive_gradients"),
    Record: ("line", "beat", "event", "step_done"),
    RunTrainer: ("log", "observe"),
    StepTrainer: ("_forcing", "anywhere"),
    Routing: ("_note_locked", "_restore_locked"),
}
ONCE = {Controller: ("_begin", "_prune")}


class Clock:
    """Seconds by name, outermost calls only; the step under way is the last key."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.depth: dict[str, int] = defaultdict(int)

    def wrap(self, owner: type, name: str, kind: str) -> None:
        """Times a method."""
        plain: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth["once"] or (kind == "every" and self.depth["every"]):
                return plain(*args, **kwargs)
            self.depth[kind] += 1
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.depth[kind] -= 1
                spent = time.perf_counter() - start
                self.seconds[kind] += spent
                if kind == "once" and self.depth["every"]:
                    self.seconds["every"] -= spent

        setattr(owner, name, timed)


def main() -> None:
    """Measures, prints, writes the log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--max_steps", type=int, default=24)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--logging_steps", type=int, default=10)
    parser.add_argument("--output", default=str(RESULTS))
    args = parser.parse_args()
    clock = Clock()
    for kind, owners in (("every", EVERY_STEP), ("once", ONCE)):
        for owner, names in owners.items():
            for name in names:
                clock.wrap(owner, name, kind)
    steps: list[dict[str, Any]] = []
    plain = RunTrainer.get_batch_samples

    def step_begins(self: RunTrainer, *more: Any) -> Any:
        steps.append(
            {
                "phase": self.controller.settings.phases.at(self.state.global_step).name,
                "at": time.perf_counter(),
                **clock.seconds,
            }
        )
        return plain(self, *more)

    RunTrainer.get_batch_samples = step_begins  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run(
            ModelArguments(args.model_name_or_path or str(default_model()), dtype=fast_dtype()),
            DataArguments(train_file=args.train_file, max_length=args.max_length),
            ExpertArguments(),
            RunArguments(
                output_dir=folder, max_steps=args.max_steps, logging_steps=args.logging_steps, supervised_experts=True,
                warm_start="domains", progressive_unlock="linear", prune_by="taylor", save_strategy="no", disable_tqdm=True,
                phase_warmup_steps=2, mask_learning_steps=5, delta_training_steps=8, expert_pretrain_steps=4,
            ),
        )  # fmt: skip
    rows = []
    for one, after in pairwise(steps):
        once = after.get("once", 0.0) - one.get("once", 0.0)
        own = after.get("every", 0.0) - one.get("every", 0.0)
        rows.append({"phase": one["phase"], "step": after["at"] - one["at"] - once, "own": own, "once": once})
    results = {
        phase: {
            "steps": len(mine), "step_seconds": statistics.median(r["step"] for r in mine),
            "own_seconds": statistics.median(r["own"] for r in mine),
            "own_share": sum(r["own"] for r in mine) / sum(r["step"] for r in mine),
        }
        for phase in dict.fromkeys(r["phase"] for r in rows) if (mine := [r for r in rows if r["phase"] == phase])
    }  # fmt: skip
    whole = {
        "own_share": sum(r["own"] for r in rows) / sum(r["step"] for r in rows),
        "once_seconds": sum(r["once"] for r in rows),
    }
    print(json.dumps({"phases": results, "all": whole}, indent=1))
    settings = {
        k: v for k, v in vars(args).items() if k not in ("output", "train_file", "model_name_or_path")
    }
    Path(args.output).write_text(
        json.dumps({"settings": settings, "phases": results, "all": whole}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
