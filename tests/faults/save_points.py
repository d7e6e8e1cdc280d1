"""Kills the save of one checkpoint at every point of it, each time in a forked child with a copy of the run's folder.

`code(...)` is run in a `srde train` before it starts. At the save of the given step the process forks again and again; the n-th
child copies the run's folder, works in the copy and kills itself at the n-th thing that it does to the file system. The process
itself ends without saving.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import peft.peft_model
import safetensors.torch
import torch

import srde.train.checkpoint
from srde.artifacts import disk
from srde.train.runner import RunTrainer

WATCHED = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "ftruncate")
PARTS = (0.0, 0.5, 0.99)  # of a file that a library writes, there when the process ends


def die_at(step: int) -> None:
    """Counts from now on what is done to the file system; before the given point the process is gone."""
    count = 0

    def dies() -> None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            dies()
            return function(*args, **kwargs)

        return call

    def torn(function: Any, place: int) -> Any:
        """Also dies when a part of the file is written: `args[place]` names it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            dies()
            result = function(*args, **kwargs)
            if isinstance(args[place], str | Path):
                whole = Path(args[place]).read_bytes()
                for part in PARTS:
                    count += 1
                    if count == step:
                        os.truncate(args[place], int(part * len(whole)))
                        os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def opened(function: Any) -> Any:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = function(file, mode, *args, **kwargs)
            if mode[0] in "wax":
                dies()  # a file to write is there, and empty
            return stream

        return call

    for name in WATCHED:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = opened(builtins.open)
    disk.exchange = counted(disk.exchange)
    torch.save = torn(torch.save, 1)
    for module, name in ((peft.peft_model, "safe_save_file"), (srde.train.checkpoint, "save_file")):
        assert getattr(module, name) is safetensors.torch.save_file
        setattr(module, name, torn(safetensors.torch.save_file, 1))


def install(at_step: int, copies: Path, stride: int) -> None:
    """Makes the save at a step the one that is killed at every `stride`-th point; the run's folder is `out` in the working
    directory."""
    save = RunTrainer._save_checkpoint

    def killed(trainer: RunTrainer, *args: Any) -> None:
        if trainer.state.global_step != at_step:
            save(trainer, *args)
            return
        drawn = random.getstate()
        for number in itertools.count(1, stride):
            place = copies / f"{number:03d}"
            child = os.fork()
            if child == 0:
                random.setstate(drawn)  # Python draws a new one in each child
                shutil.copytree("out", place / "out")
                os.chdir(place)
                die_at(number)
                save(trainer, *args)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status):
                (copies / "points.json").write_text(json.dumps({"points": number - stride, "status": status}))
                os._exit(0)

    RunTrainer._save_checkpoint = killed  # type: ignore[method-assign]


def code(at_step: int, place: Path, stride: int = 1) -> str:
    """What to run in the process before it trains into the folder `out` of `place`."""
    here = str(Path(__file__).parent)
    return (
        f"import os, sys; from pathlib import Path; sys.path.insert(0, {here!r}); os.chdir({str(place)!r})\n"
        f"import save_points; save_points.install({at_step}, Path({str(place / 'copies')!r}), {stride})\n"
    )
