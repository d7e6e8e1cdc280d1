"""Runs of `srde train` in this process, on a tiny model, each made once: what the tests of the flags look at."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from srde.data.build.build import build
from srde.data.build.settings import BuildSettings
from srde.train.arguments import parse
from srde.train.run import run
from tiny import save_tiny

PLAIN = """
--max_steps 6 --max_length 96 --logging_steps 1 --disable_tqdm true --use_cpu --num_experts 3 --initial_sparsity 0.25
--target_sparsity 0.1
""".split()
"""Six steps: one of mask learning, one of delta training, four of joint training. What tests pass comes after, and counts."""
WORDS = "yes no one two red blue day night up down left right".split()


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Rows of three domains and of many lengths."""
    rows = []
    for n in range(count):
        words = [WORDS[(n * 5 + seed + place) % len(WORDS)] for place in range(1 + n % 12)]
        domain = ("math", "code", "logic")[n % 3]
        rows.append({"prompt": f"what is {n}", "response": " ".join(words), "domain": domain, "id": str(n)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Finished:
    """A finished run: what it has left in its folder, and its model.

    Attributes:
        out: The folder.
        model: The trained model.
    """

    def __init__(self, out: Path, model: Any) -> None:
        self.out, self.model = out, model

    def read(self, name: str) -> Any:
        """A JSON file, or the lines of a JSONL file."""
        text = (self.out / name).read_text()
        return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)

    def log(self, name: str, kind: str = "train") -> list[Any]:
        """A number of each line of the log that has it."""
        return [line[name] for line in self.lines if line["kind"] == kind and name in line]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        return self.read("metrics.jsonl")

    @cached_property
    def results(self) -> dict[str, Any]:
        return self.read("train_results.json")

    @cached_property
    def phases(self) -> dict[str, tuple[int, int]]:
        return {phase["name"]: (phase["start"], phase["end"]) for phase in self.read("run.json")["phases"]}

    @cached_property
    def tensors(self) -> dict[str, Any]:
        return load_file(self.out / "adapter_model.safetensors")

    def tensor(self, name: str) -> Any:
        """The first layer's `values`, `index` or `weight`."""
        return next(value for key, value in sorted(self.tensors.items()) if key.endswith(name))


class Runs:
    """Makes runs; the same flags are the same run.

    Attributes:
        base: A tiny model.
        rows: What is trained on.
        held_out: What is held out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, save_tiny(folder / "base")
        self.rows, self.held_out = (
            write_rows(folder / "train.jsonl", 24),
            write_rows(folder / "eval.jsonl", 6, seed=7),
        )
        self._made: dict[tuple[str, ...], Finished] = {}

    def argv(self, out: Path | str, *flags: str) -> list[str]:
        """A command line without `--train_file`."""
        return ["--model_name", str(self.base), "--output_dir", str(out), *PLAIN, *flags]

    def start(self, out: Path, *flags: str, rows: bool = True, callbacks: Any = ()) -> Finished:
        """Makes a run into a folder."""
        flags = (*(["--train_file", str(self.rows)] if rows else []), *flags)
        return Finished(out, run(*parse(self.argv(out, *flags)), callbacks).model)

    def __call__(self, flags: str = "", rows: bool = True) -> Finished:
        """The run with these flags, separated by blanks."""
        words = (*flags.split(), str(rows))
        if words not in self._made:
            self._made[words] = self.start(self.folder / f"run-{len(self._made)}", *words[:-1], rows=rows)
        return self._made[words]

    @cached_property
    def packed(self) -> Path:
        """The rows as a packed set, some of them held out."""
        many = write_rows(self.folder / "many.jsonl", 90)
        wanted = {"sources": [str(many)], "max_length": 96, "num_proc": 1, "validation_fraction": 0.1}
        build(BuildSettings(str(self.base), str(self.folder / "set"), **wanted))
        return self.folder / "set"
