"""The house's own rules: imports go one way, a light start, small modules, errors as they are drawn and documented."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import srde
from srde import errors

SRC = Path(srde.__file__).parent
REPOSITORY = SRC.parents[1]
FILES = sorted(SRC.rglob("*.py"))

# From the bottom up. A room may import itself and the rooms of lower floors, never its neighbours on the same floor.
FLOORS = [
    {"errors"},
    {"progress"},
    {"core"},
    {"artifacts", "recipes"},
    {"data"},
    {"tuner"},
    {"monitor", "hub"},
    {"train", "infer", "trace"},
    {"eval", "rl", "speculate", "plan"},
    {"quickstart"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What a room may import from outside srde, beyond the standard library; rooms that are not listed are free.
OUTSIDE = {"errors": set(), "core": {"torch"}, "artifacts": {"safetensors"}, "progress": {"rich"}}

HEAVY = {"torch", "transformers", "peft", "accelerate", "matplotlib"}
LONGEST_MODULE = 400
START_SECONDS = 1.0
SHORTEST_MESSAGE = 12


def relative(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def room_of(path: Path) -> str:
    """The room of a file: its folder or its own name; the package's own files are the `front`."""
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    if first == "__main__":
        return "cli"
    return "front" if first.startswith("_") else first


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """All modules that a file imports, with their full names, and whether that happens when the file is loaded."""
    package = ["srde", *path.relative_to(SRC).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_load = set(ast.walk(tree)) - {
        node
        for part in ast.walk(tree)
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test))
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in at_load
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for name in [f"{module}.{alias.name}" for alias in node.names] if module == "srde" else [module]:
                yield name, node in at_load


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room == "front" or room in FLOOR_OF, (
        f"{relative(path)}: give the room {room!r} its floor in FLOORS"
    )
    for module, at_load in imports(path):
        if module.split(".")[0] != "srde":
            continue
        assert module != "srde", f"{relative(path)}: import what is needed from the room that defines it"
        target = module.split(".")[1]
        if room == "front":
            allowed = not at_load or target == "errors" or target.startswith("_")
        elif target.startswith("_"):
            allowed = target == "__version__"
        else:
            assert target in FLOOR_OF, f"{relative(path)}: import {module} from the room that defines it"
            allowed = target == room or FLOOR_OF[target] < FLOOR_OF[room]
        assert allowed, f"{relative(path)} (room {room}) may not import {module}"


@pytest.mark.parametrize("room", sorted(OUTSIDE))
def test_what_the_lower_rooms_import_from_outside(room):
    for path in (path for path in FILES if room_of(path) == room):
        found = {module.split(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names - {"srde"}
        assert found <= OUTSIDE[room], f"{relative(path)} imports {found - OUTSIDE[room]}"


def test_what_is_imported_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {plain_name(re.match(r"[\w.-]+", requirement)[0]) for requirement in declared}
    providers = importlib.metadata.packages_distributions()
    for path in FILES:
        found = {module.split(".")[0] for module, _ in imports(path)} - sys.stdlib_module_names - {"srde"}
        for module in sorted(found):
            names = {plain_name(name) for name in providers.get(module, [module])}
            assert names & declared, (
                f"{relative(path)} imports {module}, which pyproject.toml does not ask for"
            )


def plain_name(distribution: str) -> str:
    return distribution.lower().replace("_", "-").replace(".", "-")


def run(program: str) -> tuple[set[str], float]:
    """The modules that a program had loaded when it ended, and its seconds of processor time."""
    program += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    modules = process.stderr.read().split()
    process.stderr.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, " ".join(modules)
    return set(modules), usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "program",
    [
        "import srde",
        "import srde.artifacts",
        "import sys\nfrom srde.cli import main\nsys.argv = ['srde', '--help']\nassert main() == 0",
    ],
    ids=["import srde", "import srde.artifacts", "srde --help"],
)
def test_a_light_start(program):
    runs = [run(program) for _ in range(3)]
    assert not runs[0][0] & HEAVY
    assert statistics.median(seconds for _, seconds in runs) < START_SECONDS


def test_module_names_say_what_is_inside():
    assert [
        relative(path) for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}
    ] == []


def test_modules_are_small():
    sizes = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > LONGEST_MODULE} == {}


def test_the_exception_tree_is_as_drawn():
    drawn = {"SrdeError": set()}
    for name, also in re.findall(r"[├└]── (\w+) +\(also (\w+)\)", errors.__doc__):
        drawn[name] = {"SrdeError", also}
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert {
        one.__name__: {base.__name__ for base in one.__bases__} - {"Exception"} for one in classes
    } == drawn


def messages() -> Iterator[re.Pattern[str]]:
    """Every sentence in the sources that is long enough to be a message; what is filled in matches anything."""
    for path in FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        inner = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        inner |= {node.value for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if sum(len(part) for part in parts if part) >= SHORTEST_MESSAGE:
                    yield re.compile("".join(".+" if part is None else re.escape(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
                sentences = (
                    part for part in re.split(r"(?<=\.) ", node.value) if len(part) >= SHORTEST_MESSAGE
                )
                yield from (re.compile(re.escape(part)) for part in sentences)


def test_the_headings_of_troubleshooting_are_our_messages():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(headings) > 5
    known = list(messages())
    assert [heading for heading in headings if not any(pattern.search(heading) for pattern in known)] == []
