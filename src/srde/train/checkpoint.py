"""Checkpoints of a run: complete folders that verify, found again, compared with the run that wants to go on.

checkpoint-<step>/
    adapter_config.json, adapter_model.safetensors     the adapter, loadable like any other
    tokenizer files
    optimizer.pt, scheduler.pt, rng_state*.pth          read with weights_only=True
    trainer_state.json                                  Transformers'
    run_state.json                                      what the run was made with, what it had measured since its last log
    run_state.safetensors                               learned masks, importances
    MANIFEST.json                                       written last
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srde.artifacts import verify
from srde.errors import ArtifactError, ConfigError
from srde.tuner.store import resize_adapter

STATE_FILE = "run_state.json"
TENSORS_FILE = "run_state.safetensors"
BEST = "checkpoint-best"
_NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoint folders, newest (highest step) first; not verified."""
    if not output_dir.is_dir():
        return []
    found = [
        (int(m[1]), path)
        for path in output_dir.iterdir()
        if (m := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def choose_checkpoint(
    output_dir: Path, wanted: str | bool | None, tell: Callable[[str], None] = logger.warning
) -> Path | None:
    """The checkpoint to go on from.

    Args:
        output_dir: The run's folder.
        wanted: "auto": the newest that verifies, or none if none does. "none": none. A path: that one.
        tell: Takes a sentence about each checkpoint that was passed over.

    Raises:
        ArtifactError: A path was given and the checkpoint there is damaged.
        ConfigError: "none" was asked for in a folder with checkpoints, or the path is no checkpoint.
    """
    have = checkpoints(output_dir)
    if wanted in (None, False, "none", "false", "False"):
        if have:
            raise ConfigError.of(
                "resume_from_checkpoint", "none", rule=f"{output_dir} holds {have[0].name} of an earlier run, which a later "
                "start could take for this run's", fix="name another --output_dir, or remove the earlier run yourself",
            )  # fmt: skip
        return None
    if wanted in ("auto", True, "true", "True"):
        for path in have:
            try:
                return verify(path).folder
            except ArtifactError as error:
                tell(f"{path.name} is passed over: {error}")
        if have:
            tell(f"none of the {len(have)} checkpoints in {output_dir} is whole: the run begins anew")
        return None
    path = Path(str(wanted))
    if not (path / "trainer_state.json").is_file():
        raise ConfigError.of(
            "resume_from_checkpoint", str(wanted), rule="it must be auto, none, or a checkpoint's folder",
            fix="name a folder checkpoint-<step> of a run",
        )  # fmt: skip
    return verify(path).folder


def set_aside(output_dir: Path, step: int, tell: Callable[[str], None] = logger.warning) -> None:
    """Renames the checkpoints of later steps than the one that a run goes on from: they are damaged, or of a course that was
    left, and must neither be gone on from nor push out the run's own. Nothing is removed.

    Args:
        output_dir: The run's folder.
        step: The step that the run goes on from; 0 if it begins anew.
        tell: Takes a sentence about each.
    """
    for path in checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            places = (
                output_dir / f"set-aside-{path.name}{end}" for end in ("", *(f".{n}" for n in range(1, 1000)))
            )
            new = next(place for place in places if not place.exists())
            path.rename(new)
            tell(f"{path.name} is later than where the run goes on, and is {new.name} now")


def compare(
    saved: Mapping[str, Any], present: Mapping[str, Any], allowed: Sequence[str], where: Path
) -> None:
    """Refuses to go on with a run that was made with something else.

    Args:
        saved: What the checkpoint's run was made with, by field.
        present: What this one is made with.
        allowed: Fields that may differ.
        where: The checkpoint, for the message.

    Raises:
        ConfigError: A field differs; the message has both values and the flag that allows it.
    """
    differ = [
        field
        for field in {**saved, **present}
        if saved.get(field) != present.get(field) and field not in allowed
    ]
    if not differ:
        return
    first, *others = differ
    more = "".join(f"; {field}={present.get(field)!r} with {saved.get(field)!r}" for field in others)
    raise ConfigError.of(
        first, present.get(first), rule=f"{where.name} was made with {saved.get(first)!r}{more}",
        fix=f"set it back, or name another --output_dir, or pass --allow_changed {' '.join(differ)} to go on all the same",
    )  # fmt: skip


def write_state(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the two files of a checkpoint that are srde's own."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / TENSORS_FILE)


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads them.

    Raises:
        ArtifactError: The folder has none: it is the checkpoint of another program.
    """
    if not (folder / STATE_FILE).is_file():
        raise ArtifactError.of(
            "checkpoint", str(folder), rule=f"it has no {STATE_FILE}: srde train did not write it",
            fix="name a checkpoint of srde train; an adapter alone is loaded with srde eval or PEFT",
        )  # fmt: skip
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state, load_file(folder / TENSORS_FILE)


def load_into(model: nn.Module, folder: Path, adapter: str = "default") -> None:
    """Puts a checkpoint's adapter into a model that has one of the same configuration, at whatever sparsity it had then.

    Raises:
        ArtifactError: Its tensors are not those of the model's configuration.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    resize_adapter(model, config["sparsity"], adapter)
    tensors = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)


def rotate(output_dir: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond the limit; `checkpoint-best` does not count and stays."""
    if limit is not None and limit > 0:
        for path in checkpoints(output_dir)[limit:]:
            shutil.rmtree(path, ignore_errors=True)


def bytes_needed(model: nn.Module, optimizer: Any) -> int:
    """About how much a checkpoint takes: trained parameters, the optimizer's state, and a little."""
    tensors = [p for p in model.parameters() if p.requires_grad]
    for state in getattr(optimizer, "state", {}).values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) + 2**20
