"""Kills a save of an adapter over an older one at each of its steps, and reports what a reader then finds.

Run as a program: `save_killer.py FOLDER WAY:STRIDE...`, with the ways peft, transformers and save_adapter; prints one JSON
object. Every STRIDE-th step of the save is run in a forked child that SIGKILLs itself just before that look at the file
system, after opening a file to write, or after writing a part of the tensors; the parent then loads the folder and says
which adapter it holds.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils
from adapters import config, fill, load_base, tokens
from peft import PeftModel, get_peft_model, peft_model
from safetensors import SafetensorError

from srde.errors import ArtifactError
from srde.tuner import store
from tiny import tiny

WATCHED = ("makedirs", "mkdir", "open", "close", "fsync", "rename", "replace", "unlink", "rmdir", "listdir")
PARTS = (0.0, 0.3, 0.9)  # of the tensors' file, written when the process ends


def build(base, way, seed):
    """A model whose adapter is unlike those of other seeds, in its numbers and in its configuration."""
    model = load_base(base)
    fields = config(router_z_loss_coef=seed / 10)
    if way == "transformers":
        model.add_adapter(fields)
    else:
        model = get_peft_model(model, fields)
    return fill(model, seed).eval()


def save(model, folder, way):
    if way == "save_adapter":
        store.save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


def die_at(step):
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls == step

    def counted(function):
        def call(*args, **kwargs):
            if count():
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def torn(save_file):
        def call(tensors, filename, metadata=None):
            for part in PARTS:
                if count():
                    whole = safetensors.torch.save(tensors, metadata)
                    with open(filename, "wb") as stream:
                        stream.write(whole[: int(part * len(whole))])
                    os.kill(os.getpid(), signal.SIGKILL)
            return save_file(tensors, filename, metadata)

        return call

    def opened(function):
        def call(*args, **kwargs):
            stream = function(*args, **kwargs)
            if count():
                os.kill(os.getpid(), signal.SIGKILL)  # a file to write is empty now
            return stream

        return call

    for name in WATCHED:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = opened(counted(builtins.open))
    for module in (peft_model, transformers.modeling_utils):
        module.safe_save_file = torn(module.safe_save_file)


def found(base, folder, known):
    """Which of the known adapters a reader gets, or that it is told there is none."""
    try:
        model = PeftModel.from_pretrained(load_base(base), folder)
    except (ArtifactError, SafetensorError, json.JSONDecodeError) as error:
        return f"refused by {type(error).__name__}"
    logits = model.eval()(tokens()).logits
    names = [name for name, want in known.items() if torch.equal(logits, want)]
    return names[0] if names else "something else"


def kill_all(root, base, way, stride):
    """What a reader finds after each kill; and the next save must be read back, whatever the kill left."""
    models = {name: build(base, way, seed) for seed, name in enumerate(("old", "new"))}
    known = {name: model(tokens()).logits for name, model in models.items()}
    save(models["old"], root / way, way)
    outcomes, step, killed = [], 1, True
    while killed:
        folder = root / f"{way}{step}"
        shutil.copytree(root / way, folder)
        child = os.fork()
        if child == 0:
            die_at(step)
            save(models["new"], folder, way)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        outcomes.append(found(base, folder, known))
        save(models["new"], folder, way)
        if found(base, folder, known) != "new":
            outcomes.append(f"the save after step {step} is not read back")
        shutil.rmtree(folder)
        step += stride
    return outcomes


def main(root, ways):
    tiny().save_pretrained(root / "base")
    return {way: kill_all(root, root / "base", way, int(stride)) for way, stride in ways.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), dict(argument.split(":") for argument in sys.argv[2:]))))
