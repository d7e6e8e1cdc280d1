"""`--config run.yaml`: the flags of `srde train` from a file. Flags of the command line win.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    train_file: data/train.jsonl
    output_dir: runs/first
    max_steps: 500
    use_muon: true
    domain_experts: [math=0, code=2]

A key is a flag without its dashes; its value is taken as written, as on the command line: `3e-3` is a number where the flag is
one, and `no` is the word where the flag is a word (YAML itself would make it false). A list is several values, `true` and
`false` are switches, `null` leaves the default, and a mapping is passed on as JSON, for the few flags that take one. Of several
files the later wins, key by key; its `null` undoes what an earlier one says. `train_file` and `pretokenized_dir` exclude each
other, so whichever is said last takes back all that was said about rows before.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from srde.errors import ConfigError

FLAG = "--config"

ROWS = ("train_file", "pretokenized_dir", "jsonl_data")

Value = str | list[str] | dict[str, Any] | None
_NULL = "tag:yaml.org,2002:null"
_KINDS = {int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Setting:
    """What one line of a file sets.

    Attributes:
        file: The file.
        key: The flag's name there, without dashes.
        value: The value as written; several for a list, a mapping, or None for `null`.
    """

    file: str
    key: str
    value: Value


def expand_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The arguments with those of the files named by `--config` before them, and bare switches spelled out.

    Raises:
        ConfigError: A file cannot be read, or has a key that is no flag, or a value that its flag cannot have.
    """
    found, rest = settings(argv, parser)
    flags = _flags(parser)
    return [*(word for one in found.values() for word in as_words(one, flags[one.key])), *rest]


def settings(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[dict[str, Setting], list[str]]:
    """What the files named by `--config` set, and the other arguments.

    Returns:
        The settings by the names of the parser's results, those left out that the other arguments set; and these.

    Raises:
        ConfigError: As `expand_config`.
    """
    files, rest = _split(argv)
    found: dict[str, Setting] = {}
    flags = _flags(parser)
    for file in files:
        said = {flags[key].dest: (key, value) for key, value in read(file, parser).items()}
        _take_back(found, said)
        found |= {dest: Setting(file, key, value) for dest, (key, value) in said.items() if value is not None}
    keys = [word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")]
    _take_back(found, [flags[key].dest for key in keys if key in flags])
    return found, rest


def _take_back(found: dict[str, Setting], said: Iterable[str]) -> None:
    """Drops what is said again."""
    names = set(said)
    if names & {"train_file", "pretokenized_dir"}:
        names |= set(ROWS)
    for name in names:
        found.pop(name, None)


def read(file: str, parser: argparse.ArgumentParser) -> dict[str, Value]:
    """What a file sets.

    Raises:
        ConfigError: It cannot be read, is no mapping, or has a key that is no flag (the message suggests the nearest) or that
            it has twice, or a value that the flag cannot have.
    """
    try:
        loader = yaml.SafeLoader(Path(file).read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except OSError as error:
        raise ConfigError.of(
            "config", file, rule=f"it cannot be read ({error.strerror})", fix="name a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"line {place.line + 1}: " if place else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError.of(
            "config", file, rule=f"it is not YAML ({where}{why})", fix="correct it"
        ) from error
    if node is None or node.tag == _NULL:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError.of(
            "config", file, rule="it must hold settings, `key: value` on each line", fix="correct it"
        )
    flags, result = _flags(parser), dict[str, Value]()
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = f"key in {file}, line {key_node.start_mark.line + 1}"
        if key not in flags:
            close = difflib.get_close_matches(key, sorted(flags), n=1)
            raise ConfigError.of(
                line, key, rule="srde train has no such flag",
                fix=f"the nearest is {close[0]}" if close else "see srde train --help",
            )  # fmt: skip
        if flags[key].dest in {flags[other].dest for other in result}:
            raise ConfigError.of(line, key, rule="the file has set this before", fix="leave one of them out")
        result[key] = _checked(_value(loader, value_node), file, key, flags[key])
    return result


def as_words(setting: Setting, action: argparse.Action) -> list[str]:
    """A setting as words of a command line."""
    flag, value = f"--{setting.key}", setting.value
    if isinstance(value, list):
        return [flag, *value]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if action.nargs == 0:  # `--no_packing`, which takes no value
        return [flag] if _is_true(str(value)) else []
    return [f"{flag}={value}"]


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of `--config`, and the other words, bare switches spelled out."""
    files: list[str] = []
    rest: list[str] = []
    words = iter(_spelled_out(argv))
    for word in words:
        if word == FLAG:
            name = next(words, None)
            if name is None:
                raise ConfigError.of("config", None, rule="a file is missing", fix="pass --config run.yaml")
            files.append(name)
        elif word.startswith(f"{FLAG}="):
            files.append(word.removeprefix(f"{FLAG}="))
        else:
            rest.append(word)
    return files, rest


def _spelled_out(argv: Sequence[str]) -> Iterable[str]:
    """`--warm_start` alone means k-means, as in the project's founding notes."""
    for place, word in enumerate(argv):
        yield word
        alone = place + 1 == len(argv) or argv[place + 1].startswith("--")
        if word in ("--warm_start", "--warm-start") and alone:
            yield "kmeans"


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest != "help"
    }


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """A value as written: scalars keep their text, whatever YAML would make of it."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item) for item in node.value]
    return loader.construct_object(node, deep=True)


def _checked(value: Any, file: str, key: str, action: argparse.Action) -> Value:
    several = action.nargs in ("+", "*")
    items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
    if isinstance(value, list) and not several:
        raise _refused(value, file, key, "it is one value and not a list", "write one value")
    if isinstance(value, list) and (not value or not all(isinstance(item, str) for item in value)):
        rule = "a list has values, and each is a number or a word"
        raise _refused(value, file, key, rule, "write [first, second], or leave it out")
    for item in items:
        if item is None:
            continue
        try:
            known = action.type(item) if callable(action.type) else item
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = _KINDS.get(action.type) if isinstance(action.type, type) else "true or false"
            rule = f"it must be {kind}" if kind else f"it cannot be read ({error})"
            raise _refused(item, file, key, rule, "correct it") from error
        if action.choices is not None and known not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise _refused(item, file, key, f"it must be one of {choices}", "pick one of them")
        if action.nargs == 0 and item.lower() not in ("true", "false"):
            raise _refused(item, file, key, "it must be true or false", "correct it")
    return [value] if several and isinstance(value, str) else value


def _refused(value: object, file: str, key: str, rule: str, fix: str) -> Exception:
    return ConfigError.of(f"{key} in {file}", value, rule=rule, fix=fix)


def _is_true(text: str) -> bool:
    return text.lower() == "true"


def files_of(found: Mapping[str, Setting], message: str) -> str | None:
    """The file that set what a message is about, from its beginning `name=value`; None if none did."""
    name = message.partition("=")[0]
    return next((one.file for dest, one in found.items() if name in (dest, one.key)), None)
