"""What a build is made of, fixed when it begins: settings, tokenizer, and every source as it is at that moment.

The plan lies in the work folder. A build that finds one there goes on with it, or refuses if it was asked for something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rich.console import Console

from srde.data.build.settings import BuildSettings
from srde.data.build.write import write_text
from srde.data.domains import DOMAINS
from srde.data.sources import files as chunked
from srde.data.sources.files import DataFile, Span, data_files, open_file
from srde.data.sources.gym import gym_spans, gym_version
from srde.data.sources.hub import resolve_revision
from srde.data.sources.registry import Source, as_evaluation, choose_sources, registered
from srde.data.tokenizers import tokenizer_fingerprints
from srde.errors import ConfigError, DataError, UsageError
from srde.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAN_FILE = "plan.json"
FORMAT = 1
"""Raised when the same plan would give other bytes than before."""
MARGIN = 1.15
"""Rows read beyond what is needed, for those that will be left out."""

_LIBRARIES = ("tokenizers", "jinja2", "rensa", "xxhash", "pyarrow", "numpy")


@dataclass(frozen=True)
class Planned:
    """A source as it is now.

    Attributes:
        source: The entry.
        commit: The hub's commit.
        files: Local files.
        spans: The chunks of files and tasks; of hub sources they are known once they are fetched.
    """

    source: Source
    commit: str | None = None
    files: tuple[DataFile, ...] = ()
    spans: tuple[Span, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What is compared when a build goes on."""
        entry = {
            one.name: getattr(self.source, one.name) for one in fields(Source) if one.name not in ("path",)
        }
        version = gym_version() if self.source.gym else None
        return entry | {
            "commit": self.commit,
            "files_read": [file.identity() for file in self.files],
            "gym_version": version,
        }

    @property
    def domains(self) -> set[str]:
        """The domains that it may have rows of, as far as can be told beforehand."""
        if self.source.domain:
            return {self.source.domain}
        return {domain for file in self.files for domain in file.domains}

    @property
    def rows(self) -> float:
        """At most how many training rows it has; infinite where nobody knows."""
        if self.spans:
            return len(self.spans) * chunked.CHUNK_ROWS
        return float(self.source.rows) if self.source.rows else float("inf")


@dataclass(frozen=True)
class Plan:
    """Everything that the result's bytes depend on.

    Attributes:
        settings: As asked for.
        train: Sources to train on, in order.
        evaluation: Sources with splits that training rows are compared with.
        identity: All of it as JSON values.
    """

    settings: BuildSettings
    train: list[Planned]
    evaluation: list[Planned]
    identity: Mapping[str, Any]

    def wanted(self) -> dict[str, int]:
        """Rows to read of each training source at first: its fair share of its domain, and a margin."""
        found: dict[str, int] = {}
        count = self.settings.examples_per_domain * (1 + self.settings.validation_fraction) * MARGIN + 64
        for domain in {planned.source.domain for planned in self.train}:
            own = [planned for planned in self.train if planned.source.domain == domain]
            # A source without a domain of its own may have all of them.
            total = count * (len(self.settings.domains or DOMAINS) if domain is None else 1)
            for planned, share in zip(own, _shares([one.rows for one in own], total), strict=True):
                found[planned.source.name] = share
        return found

    def chunk_order(self, planned: Planned, count: int) -> list[int]:
        """The chunks of a source in the order in which they are used: any order will do where all can be entered at once."""
        if not planned.spans:
            return list(range(count))
        return Random(f"{self.settings.seed}/{planned.source.name}").sample(range(count), count)


def make_plan(
    settings: BuildSettings,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    begun: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Plan:
    """Looks at every source: reads local files once, asks the hub for its commits.

    Args:
        settings: What to build.
        tokenizer: The model's.
        scratch: Folder for the unpacked form of files.
        begun: The identity of the plan that is gone on with: its commits and its date are kept.
        console: Where progress is shown; nowhere if not given.

    Raises:
        ConfigError: The sources are named wrongly, or none of them has rows to train on.
        DataError: A source is not there.
    """
    chosen = choose_sources(settings.sources) if settings.sources else list(registered().values())
    _refuse_unknown_domains(settings)
    allowed = None if settings.licenses is None else {name.lower() for name in settings.licenses}
    train = [
        one
        for one in chosen
        if one.train
        and (settings.domains is None or one.domain in (None, *settings.domains))
        and (allowed is None or one.license is None or one.license.lower() in allowed)
    ]
    if not train:
        raise ConfigError.of(
            "sources",
            settings.sources or "all registered",
            rule="none of them has rows to train on in these domains and under these licences",
            fix="name other --sources, --domains or --licenses",
        )
    if settings.decontamination_overlap > 1:
        evaluation = []
    elif settings.eval_sources is not None:
        evaluation = as_evaluation(choose_sources(settings.eval_sources))
        for one in evaluation:
            if not one.evaluation:
                raise ConfigError.of(
                    "eval_sources",
                    one.name,
                    rule="this source has no rows for evaluation",
                    fix="leave it out",
                )
    else:
        # A leaked question is one whatever domain it is counted in: all registered sets are compared with.
        known = registered().values() if any(one.hub for one in train) else ()
        evaluation = [one for one in {one.name: one for one in (*known, *chosen)}.values() if one.evaluation]
    seen: dict[str, Planned] = {}
    commits = {
        one["name"]: one["commit"] for part in ("train", "evaluation") for one in (begun or {}).get(part, ())
    }

    def planned(source: Source) -> Planned:
        if source.name not in seen or seen[source.name].source.path != source.path:
            seen[source.name] = _resolve(source, scratch, Path(settings.work_dir), commits.get(source.name))
        found = seen[source.name]
        return Planned(source, found.commit, found.files, found.spans)

    with bar(
        console or Console(quiet=True), "looking at the sources", len(train) + len(evaluation)
    ) as advance:

        def looked_at(sources: list[Source]) -> Iterator[Planned]:
            for one in sources:
                yield planned(one)
                advance(1)

        parts = list(looked_at(train)), list(looked_at(evaluation))
    _refuse_shared_files(*parts)
    identity = {
        "format": FORMAT,
        "date": _date(settings, tokenizer, begun),
        "settings": settings.identity(),
        "model": Path(settings.model_name).name
        if Path(settings.model_name).exists()
        else settings.model_name,
        "tokenizer": tokenizer_fingerprints(tokenizer),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "train": [one.identity() for one in parts[0]],
        "evaluation": [one.identity() for one in parts[1]],
    }
    return Plan(settings, *parts, json.loads(json.dumps(identity)))


def keep_plan(plan: Plan, folder: Path) -> None:
    """Writes the plan, or compares it with the one that is there.

    Raises:
        UsageError: The folder holds a build of something else.
    """
    file = folder / PLAN_FILE
    if file.exists():
        if difference := first_difference(read_plan(file), plan.identity):
            field, old, new = difference
            raise UsageError.of(
                "work_dir",
                str(folder.parent),
                rule=f"it holds an unfinished or finished build with another {field}: {old!r} there, {new!r} "
                "now",
                fix="name another --work_dir, delete this one, or go back to the old setting",
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, iter([json.dumps(plan.identity, indent=1, sort_keys=True) + "\n"]))


def read_plan(file: Path) -> dict[str, Any]:
    """The identity of a plan.

    Raises:
        UsageError: There is none, or it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError.of(
            "work_dir",
            str(file.parent.parent),
            rule=f"its plan cannot be read ({error})",
            fix="delete the folder and build again",
        ) from error


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first: the path, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if found := first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            name = one.get("name", place) if isinstance(one, dict) else place
            if found := first_difference(one, other, f"{path}.{name}"):
                return found
        return None
    return None if old == new else (path, old, new)


def _date(
    settings: BuildSettings, tokenizer: PreTrainedTokenizerBase, begun: Mapping[str, Any] | None
) -> str | None:
    """The day that a chat template is to take for today; None for templates that do not ask."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    return settings.template_date or (begun or {}).get("date") or date.today().isoformat()


def _resolve(source: Source, scratch: Path, work_dir: Path, commit: str | None) -> Planned:
    if source.hub:
        return Planned(source, commit=commit or resolve_revision(source))
    if source.gym:
        return Planned(source, spans=gym_spans(source.gym, source.rows or 0))
    root = Path(source.path or "")
    files = []
    for path in data_files(root, leave_out=work_dir):
        name = path.name if path == root else path.relative_to(root).as_posix()
        files.append(open_file(path, name, scratch))
    return Planned(source, files=tuple(files), spans=tuple(span for file in files for span in file.spans))


def _refuse_shared_files(train: Iterable[Planned], evaluation: Iterable[Planned]) -> None:
    held_out = {file.sha256: one.source.name for one in evaluation for file in one.files}
    for one in train:
        for file in one.files:
            if file.sha256 in held_out:
                raise DataError.at(
                    file.file,
                    None,
                    "file",
                    f"is given to train on and, as {held_out[file.sha256]}, to evaluate on; a test set is never "
                    "trained on. Leave it out of --sources",
                )


def _refuse_unknown_domains(settings: BuildSettings) -> None:
    for domain in settings.domains or []:
        if domain not in DOMAINS and not settings.sources:
            raise ConfigError.of(
                "domains",
                domain,
                rule=f"the registered sources have {', '.join(DOMAINS)}",
                fix="name one of them",
            )


def _shares(capacities: list[float], total: float) -> list[int]:
    """Even shares of a total; where one has less than its share, the others give more."""
    left = sorted(range(len(capacities)), key=lambda place: capacities[place])
    shares = [0] * len(capacities)
    for done, place in enumerate(left):
        share = min(capacities[place], total / (len(left) - done))
        shares[place] = int(share) + 1
        total -= share
    return shares
