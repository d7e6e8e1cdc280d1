"""`--config run.yaml`: the flags of `srde train` from a file. Flags of the command line win.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    train_file: data/train.jsonl
    output_dir: runs/first
    max_steps: 500
    use_muon: true
    domain_experts: [math=0, code=2]

A key is a flag without its dashes. A list is several values, `true` and `false` are switches, `null` leaves the default, and a
mapping is passed on as JSON, for the few flags that take it.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from srde.errors import ConfigError

FLAG = "--config"


def expand_config(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The arguments with those of the file named by `--config` before them, and bare switches spelled out.

    Raises:
        ConfigError: The file cannot be read, or has a key that is no flag.
    """
    argv = [*_spelled_out(argv)]
    files: list[str] = []
    rest: list[str] = []
    words = iter(argv)
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
    given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")}
    before = [
        word for file in files for key, value in read(file, parser).items() if key not in given
        for word in as_flag(key, value)
    ]  # fmt: skip
    return [*before, *rest]


def read(file: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The settings of a file.

    Raises:
        ConfigError: It cannot be read, is no mapping, or has a key that is no flag; the message suggests the nearest.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError.of(
            "config", file, rule=f"it cannot be read ({error.strerror})", fix="name a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError.of(
            "config", file, rule=f"it is not YAML ({str(error).splitlines()[0]})", fix="correct it"
        ) from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError.of(
            "config", file, rule="it must hold settings, `key: value` on each line", fix="correct it"
        )
    options = [option for action in parser._actions for option in action.option_strings]
    names = {option.lstrip("-") for option in options if option.startswith("--")}
    for key in content:
        if key not in names:
            close = difflib.get_close_matches(str(key), sorted(names), n=1)
            raise ConfigError.of(
                f"key in {file}", key, rule="srde train has no such flag",
                fix=f"the nearest is {close[0]}" if close else "see srde train --help",
            )  # fmt: skip
    return content


def as_flag(key: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}", str(value).lower()]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    return [f"--{key}", str(value)]


def _spelled_out(argv: Iterable[str]) -> Iterable[str]:
    """`--warm_start` alone means k-means, as in the project's founding notes."""
    words = list(argv)
    for place, word in enumerate(words):
        yield word
        alone = place + 1 == len(words) or words[place + 1].startswith("--")
        if word in ("--warm_start", "--warm-start") and alone:
            yield "kmeans"
