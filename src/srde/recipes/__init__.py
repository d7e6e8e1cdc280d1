"""The files of settings beside this one: they come with the package, and are read and copied from wherever it is installed.

YAML files in this folder are for `srde train --config`; those in folders are for the program that the folder is named after.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from srde.errors import UsageError

_KINDS = (".yaml", ".yml", ".json")


def recipes() -> dict[str, str]:
    """The recipes' texts by name: those of this folder without their ending, those of folders as folder/file."""
    found = _below(files(__name__), "")
    return {name: found[name] for name in sorted(found, key=lambda name: ("/" in name, name))}


def first_comment(text: str) -> str:
    """The first comment line of a recipe; empty where it has none."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def copy_recipe(name: str, dest: str | Path = ".") -> Path:
    """Copies a recipe.

    Args:
        name: As `recipes` names it; its ending may be there or not.
        dest: A new file, or a folder that exists.

    Returns:
        The new file.

    Raises:
        UsageError: There is no such recipe (the message has the nearest), the file exists, or its folder does not.
    """
    known = recipes()
    short = name if name in known else str(Path(name).with_suffix(""))
    if short not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise UsageError.of(
            "recipe", name, rule="there is none of this name",
            fix=f"the nearest is {close[0]}" if close else "see srde recipes ls",
        )  # fmt: skip
    path = Path(dest)
    if path.is_dir():
        path /= Path(short).name if Path(short).suffix else f"{Path(short).name}.yaml"
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(known[short])
    except FileExistsError as error:
        raise UsageError.of(
            "file", str(path), rule="it exists, and is not overwritten", fix="name another file after the recipe"
        ) from error  # fmt: skip
    except OSError as error:
        raise UsageError.of(
            "file", str(path), rule=f"it cannot be written ({error.strerror})", fix="name a file in a folder that exists"
        ) from error  # fmt: skip
    return path


def _below(folder: Traversable, prefix: str) -> dict[str, str]:
    found = {}
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.name.startswith("_"):
            found |= _below(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(_KINDS):
            name = entry.name if prefix else entry.name.rpartition(".")[0]
            found[prefix + name] = entry.read_text(encoding="utf-8")
    return found
