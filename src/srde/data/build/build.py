"""Builds a data set from start to end; a killed build goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from srde.artifacts import verify
from srde.artifacts.disk import means_disk_full
from srde.artifacts.folder import disk_full
from srde.data.build.finish import digest
from srde.data.build.plan import PLAN_FILE, first_difference, keep_plan, make_plan, read_plan
from srde.data.build.settings import BuildSettings
from srde.data.build.stage import Stage
from srde.data.build.state import load_state, save_state
from srde.data.build.steps import SHARD_FILE, Built, Steps
from srde.data.packed import CARD_FILE, OUTPUT, REPORT_FILE, TRAIN_FILE, VALIDATION_FILE
from srde.data.tokenizers import load_tokenizer
from srde.errors import ArtifactError, UsageError


def build(settings: BuildSettings, console: Console | None = None) -> Built:
    """Builds a data set, or one machine's part of it.

    The bytes of the result depend on the settings, the tokenizer and the sources, not on processes, parts, kills or the place.

    Args:
        settings: What to build.
        console: Where progress is shown; nowhere if not given.

    Raises:
        SrdeError: A setting, a source or a row breaks a rule. Finished chunks are kept.
    """
    console = console or Console(quiet=True)
    work_dir = Path(settings.work_dir)
    _make_folder(work_dir)
    stage = Stage(work_dir)
    with stage.lock():
        _sweep(stage, console)
        tokenizer = load_tokenizer(settings.model_name)
        # What the plan of a build that goes on has fixed (commits, a template's date) stays as it was.
        begun = read_plan(stage.own / PLAN_FILE) if (stage.own / PLAN_FILE).exists() else None
        plan = make_plan(settings, tokenizer, stage.place("unpacked"), begun, console)
        keep_plan(plan, stage.own)
        save_state(plan, stage.own)
        return _go_on(Steps(plan, stage, tokenizer, console))


def merge(
    parts: Sequence[str | Path],
    work_dir: str | Path,
    console: Console | None = None,
    num_proc: int | None = None,
    model_name: str | None = None,
) -> Built:
    """Joins the parts of several machines to the bytes that one machine would have made.

    Args:
        parts: Their work folders, one for each shard index.
        work_dir: Where the result goes; it may be one of the parts.
        console: As for `build`.
        num_proc: Processes for chunks that no part has, when domains came out short.
        model_name: Where the model is on this machine, for the same; where it was for the first part, if not given.

    Raises:
        UsageError: A part is missing or unfinished, or two are parts of different builds.
    """
    console = console or Console(quiet=True)
    folders = [Path(part) for part in parts]
    work_dir = Path(work_dir)
    if any(folder.resolve() == work_dir.resolve() for folder in folders) and (done := _standing(work_dir)):
        return done  # merged already: the part's own chunks are gone
    _require_whole(folders)
    _make_folder(work_dir)
    changes = {"work_dir": str(work_dir), "num_proc": num_proc}
    plan = load_state(Stage(folders[0]).own, **changes | ({"model_name": model_name} if model_name else {}))
    stage = Stage(work_dir, [folder for folder in folders if folder.resolve() != work_dir.resolve()])
    with stage.lock():
        _sweep(stage, console)
        keep_plan(plan, stage.own)
        return _go_on(Steps(plan, stage, None, console))


def _go_on(steps: Steps) -> Built:
    """What is there, if it is complete; else all that is left to do."""
    if done := _standing(steps.stage.work_dir):
        steps.stage.clear()  # killed between the last rename and this, a build leaves its chunks
        steps.console.print(f"{done.folder} is complete already", soft_wrap=True)
        return done
    return steps.run()


def _make_folder(work_dir: Path) -> None:
    if not (Stage(work_dir).own / PLAN_FILE).exists():
        for name in (TRAIN_FILE, VALIDATION_FILE, CARD_FILE, OUTPUT):
            if (work_dir / name).exists():
                raise UsageError.of(
                    "work_dir",
                    str(work_dir),
                    rule=f"it holds {name}, which no build of ours has put there and a build would replace",
                    fix="name a new folder",
                )
    try:
        Stage(work_dir).own.mkdir(parents=True, exist_ok=True)
        (Stage(work_dir).own / "lock").touch()
    except OSError as error:
        if means_disk_full(error):
            raise disk_full(work_dir) from error
        raise UsageError.of(
            "work_dir",
            str(work_dir),
            rule=f"it cannot be written to ({error.strerror})",
            fix="name a folder that you may write to",
        ) from error


def _sweep(stage: Stage, console: Console) -> None:
    for path in stage.sweep():
        console.print(f"{path.relative_to(stage.own)} was damaged and is made again", soft_wrap=True)


def _standing(work_dir: Path) -> Built | None:
    """The result, if it is there and every file of it is as it was written."""
    if not (work_dir / OUTPUT).exists():
        return None
    try:
        manifest = verify(work_dir / OUTPUT)
        report = json.loads((manifest.folder / REPORT_FILE).read_text(encoding="utf-8"))
        for name in (TRAIN_FILE, VALIDATION_FILE):  # the card is there to be edited
            if digest(work_dir / name) != manifest.metadata["files"][name]:
                return None
    except (ArtifactError, OSError, KeyError):
        return None
    return Built(work_dir / OUTPUT, report, fresh=False)


def _require_whole(folders: Sequence[Path]) -> None:
    """Refuses parts that are not all the parts of one build."""
    found: dict[int, Path] = {}
    count = 0
    for folder in folders:
        file = Stage(folder).own / SHARD_FILE
        if not file.is_file() or not (Stage(folder).own / PLAN_FILE).is_file():
            raise UsageError.of(
                "parts",
                str(folder),
                rule="it holds no finished part of a build",
                fix="run `srde data build` with its --shard_index first",
            )
        own = read_plan(file)
        found[own["shard_index"]], count = folder, own["num_shards"]
    missing = [index for index in range(count) if index not in found]
    if missing or len(found) != len(folders) or max(found, default=0) >= count:
        raise UsageError.of(
            "parts", [str(folder) for folder in folders], rule=f"the build has {count} parts; there are those with shard_index "
            f"{sorted(found)}", fix="name each part once" if not missing else f"add the part with --shard_index {missing[0]}",
        )  # fmt: skip
    first = load_state(Stage(folders[0]).own).identity
    for folder in folders[1:]:
        if difference := first_difference(first, load_state(Stage(folder).own).identity):
            field, old, new = difference
            raise UsageError.of(
                "parts", str(folder), rule=f"it is a part of another build: {field} is {new!r}, and {old!r} in {folders[0]}",
                fix="build all parts with the same settings and sources",
            )  # fmt: skip
