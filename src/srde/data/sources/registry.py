"""The registry: one small declarative entry per data set, ours in `sources.yaml`, the user's in files of the same form.

    sources:
      my_questions:                # the name, as --sources takes it and as rows carry it
        path: questions.jsonl      # or hub: owner/name, or gym: chain_sum
        domain: math
        license: MIT
        converter: choice
        fields: {question: q, options: choices, answer: gold}

`path` is a JSONL, JSON or parquet file, or a folder of them, relative to the YAML file. Without a converter, records are read in
the layouts that `srde.data.rows` knows.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from srde.data.sources.converters import CONVERTERS, FIELDS
from srde.errors import ConfigError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
"""Kinds of data files."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")  # it names a folder: no slash, no leading dot
_OURS = "srde's own sources.yaml"
_PLACES = ("hub", "path", "gym")


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: Its name in the registry and in the rows.
        hub: Id of a data set on the hub; one of `hub`, `path` and `gym` is given.
        path: A data file, or a folder of them.
        gym: A task of reasoning-gym, which makes the rows.
        config: Configuration of the hub's data set.
        files: Split -> file on the hub, where the repository has files that `datasets` does not find by itself; JSON lines,
            with `zip://member::hf://...` for a member of an archive.
        revision: Branch, tag or commit on the hub; for data sets that today's `datasets` cannot load otherwise, the hub's own
            parquet copy.
        train: Splits to train on. Of files and tasks, ("all",) or nothing.
        evaluation: Splits that are never trained on, and that training rows are compared with.
        domain: Domain of the rows that do not name their own.
        license: Licence of the rows that do not name their own.
        converter: What makes a row of a record; a name in `CONVERTERS`. None for the layouts of `srde.data.rows`.
        fields: Settings of the converter, as a rule the names of the columns.
        kind: How answers are scored; see `srde.eval.scoring`.
        rows: About how many rows there are to train on; of a gym task, how many to make.
        near_duplicates: Whether near duplicates go. False for generated sets whose rows are alike by design.
        settings: Settings of a gym task.
    """

    name: str
    hub: str | None = None
    path: str | None = None
    gym: str | None = None
    config: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    train: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    domain: str | None = None
    license: str | None = None
    converter: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    kind: str | None = None
    rows: int | None = None
    near_duplicates: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is, in words for messages."""
        if self.hub:
            return self.hub + (f" ({self.config})" if self.config else "")
        return str(self.path) if self.path else f"reasoning-gym's {self.gym}"


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML overlooks: a key given twice, of which only the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


@cache
def registered() -> dict[str, Source]:
    """The data sets that srde knows, by name."""
    file = resources.files("srde.data.sources").joinpath("sources.yaml")
    return _parse(yaml.safe_load(file.read_text(encoding="utf-8")), _OURS, Path())


def read_sources(path: str | Path) -> dict[str, Source]:
    """Reads a user's YAML file.

    Raises:
        ConfigError: It cannot be read, or an entry breaks a rule.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError.of(
            "sources", str(path), rule=f"it must be a YAML file ({reason})", fix="correct the file"
        ) from error
    return _parse(content, str(path), path.parent)


def choose_sources(names: Sequence[str]) -> list[Source]:
    """The sources that the user named, in that order: names of the registry, YAML files, data files, folders.

    A data file or folder named directly is a source of its own, called after the file.

    Raises:
        ConfigError: A name means nothing, or two sources have one name.
    """
    chosen: dict[str, Source] = {}
    # A comma may also be part of a file's name.
    split = ([given] if Path(given).exists() else given.split(",") for given in names)
    for name in (part for parts in split for part in parts if part):
        path = Path(name).expanduser()
        if name in registered():
            found = {name: registered()[name]}
        elif path.suffix in (".yaml", ".yml"):
            found = read_sources(path)
        elif path.is_dir() or (path.is_file() and path.name.endswith(SUFFIXES)):
            stem = path.resolve().name if path.is_dir() else path.name[: -len(_suffix(path))]
            found = {stem: Source(stem, path=os.path.abspath(path), train=("all",))}
            require_name(stem, str(path))
        else:
            raise _unknown(name)
        for own, source in found.items():
            if chosen.setdefault(own, source) != source:
                raise ConfigError.of(
                    "sources", own, rule="two different sources have this name", fix="rename one"
                )
    return list(chosen.values())


def as_evaluation(sources: Iterable[Source]) -> list[Source]:
    """The sources with all of their rows for evaluation, where they are files that name no split themselves."""
    return [
        replace(source, train=(), evaluation=source.evaluation or source.train) if not source.hub else source
        for source in sources
    ]


def _suffix(path: Path) -> str:
    return next(suffix for suffix in SUFFIXES if path.name.endswith(suffix))


def _unknown(name: str) -> ConfigError:
    close = difflib.get_close_matches(name, registered(), n=1)
    kinds = ", ".join(SUFFIXES)
    return ConfigError.of(  # type: ignore[return-value]
        "sources",
        name,
        rule=f"it must be a registered source, a YAML file, a data file ({kinds}) that exists, or a folder of them",
        fix=f"did you mean {close[0]!r}? `srde data sources` lists all"
        if close
        else "`srde data sources` lists the registered ones",
    )


def _parse(content: Any, file: str, folder: Path) -> dict[str, Source]:
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError.of(
            "sources", file, rule='it must have the key "sources" with one entry per data set',
            fix="see `srde.data.sources.registry` for an example",
        )  # fmt: skip
    return {str(name): _entry(str(name), entry, file, folder) for name, entry in entries.items()}


def _entry(name: str, entry: Any, file: str, folder: Path) -> Source:
    require_name(name, file)
    if not isinstance(entry, dict):
        raise ConfigError.of(f"{file}: {name}", entry, rule="an entry must be a mapping", fix="give its keys")

    def refuse(key: str, value: object, rule: str, fix: str) -> ConfigError:
        return ConfigError.of(f"{file}: {name}.{key}", value, rule=rule, fix=fix)  # type: ignore[return-value]

    known = {one.name for one in fields(Source)} - {"name"}
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise refuse(
                str(key), entry[key], "there is no such key", f"the nearest is {close[0]}" if close else "leave it out"
            )  # fmt: skip
    if len([key for key in _PLACES if entry.get(key)]) != 1:
        raise refuse(
            "path", entry.get("path"), "exactly one of hub, path and gym says where the rows are", "give one"
        )
    for key, kinds in _TYPES.items():
        given = entry.get(key)
        if key in entry and (not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds)):
            wanted = "a mapping" if dict in kinds else kinds[0].__name__
            raise refuse(key, entry[key], f"it must be {wanted}", "correct the entry")
    converter = entry.get("converter")
    if converter is not None and converter not in CONVERTERS:
        raise refuse(
            "converter", converter, f"it must be one of {', '.join(sorted(CONVERTERS))}", "pick one of them"
        )
    known_fields = FIELDS.get(converter or "columns", {})
    for key, value in (entry.get("fields") or {}).items():
        kinds = known_fields.get(key)
        if kinds is None:
            close = difflib.get_close_matches(str(key), known_fields, n=1)
            fix = f"the nearest is {close[0]}" if close else "leave it out"
            raise refuse(
                f"fields.{key}", value, f"the converter {converter or 'columns'} has no such setting", fix
            )
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise refuse(
                f"fields.{key}",
                value,
                f"it must be {' or '.join(kind.__name__ for kind in kinds)}",
                "correct it",
            )
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise refuse(f"fields.{key}", value, "its list must hold names of columns", "correct it")
    if entry.get("gym") and not entry.get("rows"):
        raise refuse(
            "rows", entry.get("rows"), "a gym task makes as many rows as it is told to", "say how many"
        )
    if entry.get("rows", 1) < 1:
        raise refuse("rows", entry["rows"], "it must be at least 1", "give about how many rows there are")
    if prefix := (entry.get("fields") or {}).get("prefix"):
        try:
            re.compile(prefix)
        except (re.error, TypeError) as error:
            raise refuse(
                "fields.prefix", prefix, f"it must be a regular expression ({error})", "correct it"
            ) from error
    values = dict(entry)
    if entry.get("path"):
        values["path"] = os.path.abspath(folder / Path(entry["path"]).expanduser())
    default = {"train": ["train" if entry.get("hub") else "all"]} if "evaluation" not in entry else {}
    for key in ("train", "evaluation"):
        value = values.get(key, default.get(key, []))
        if isinstance(value, bool):
            value = ["all"] if value else []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise refuse(key, value, "it must be true, false, or a list of splits", "correct the entry")
        for split in value:
            if not _NAME.fullmatch(split):  # it names a folder too
                raise refuse(
                    key, split, "a split is named by letters, digits, '_', '.' and '-'", "name a split"
                )
        values[key] = tuple(value)
    source = Source(name=name, **values)
    if file != _OURS:
        _refuse_test_sets(source, refuse)
    return source


def _refuse_test_sets(source: Source, refuse: Callable[[str, object, str, str], ConfigError]) -> None:
    """A split that the registry keeps for evaluation is not trained on under another name either."""
    for known in registered().values():
        if source.hub == known.hub and known.hub and source.config in (None, known.config):
            for split in sorted(set(source.train) & set(known.evaluation)):
                raise refuse("train", split, f"this is a test set ({known.name})", "give it as evaluation")


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_PLACES, "config", "revision", "domain", "license", "converter", "kind"), (str,)),
    "fields": (dict,),
    "files": (dict,),
    "settings": (dict,),
    "rows": (int,),
    "near_duplicates": (bool,),
}


def require_name(name: str, file: str) -> None:
    """Refuses names of sources and splits that are no plain file names.

    Raises:
        ConfigError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError.of(
            f"{file}: source",
            name,
            rule="a name has letters, digits, '_', '.' and '-', begins with a letter or digit and is at most 80 long",
            fix="rename it",
        )
