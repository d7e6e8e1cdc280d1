"""The code that goes with an exported model: the library's own modules, laid end to end in one file.

One file, because a model's code is fetched by the name of one file (`modeling_sardine.py`), and must work where that alone has
come down. Only imports change: those of the library fall away, since what they name is in the same file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MODELING, CONFIGURATION = "modeling_sardine.py", "configuration_sardine.py"
MODULES = (
    "errors",
    "core.router",
    "core.delta",
    "core.masks",
    "core.element",
    "core.neuron",
    "core.layout",
    "core.routed",
    "core.lone",
    "tuner.names",
    "tuner.auto",
    "tuner.fingerprint",
    "tuner.control",
    "tuner.routed_layer",
    "tuner.sites",
    "hub.configuration_sardine",
    "hub.reading",
    "hub.modeling_sardine",
)
"""In an order in which each needs only those before it."""

_PACKAGE = "srde"
_DOCSTRING = '''"""SaRDinE: a base model with routed sparse experts, as a model of Transformers.

This file is all the code that the model needs beside torch, transformers and safetensors. It was put together from the modules of
srde (Sparse Routed Delta Experts), which are named at the beginning of each part.
"""
'''
_CONFIGURATION_TEXT = '''"""Where AutoConfig looks for the configuration of a SaRDinE model."""

try:
    from .modeling_sardine import SaRDinEConfig
except ImportError:  # imported by itself, from a folder on the path
    from modeling_sardine import SaRDinEConfig

__all__ = ["SaRDinEConfig"]
'''
_EPILOGUE = '''

def code_files() -> dict[str, str]:
    """File name -> text: this file, and the one in which AutoConfig looks."""
    own = pathlib.Path(__file__).read_text(encoding="utf-8")
    return {"modeling_sardine.py": own, "configuration_sardine.py": _CONFIGURATION_TEXT}


_CONFIGURATION_TEXT = %r
'''


def code_files() -> dict[str, str]:
    """File name -> text, of all files.

    Raises:
        ValueError: Two modules give one name to different things, or one needs a module that is not exported (mistakes in the
            library, which a test looks for).
    """
    root = Path(__file__).parents[1]
    imports: dict[str, str] = {}
    typing_only: dict[str, str] = {}
    owners: dict[str, str] = {}
    parts = []
    for module in MODULES:
        source = (root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        tree, lines = ast.parse(source), source.splitlines()
        for node in tree.body:
            if _is_import(node):
                _collect(node, module, imports)
            elif _is_typing_only(node):
                for inner in node.body:
                    _collect(inner, module, typing_only)
            for name in _defined(node):
                if owners.setdefault(name, module) != module:
                    raise ValueError(f"{module} and {owners[name]} both define {name}")
        parts.append(f"\n\n# ---- {module} " + "-" * (110 - len(module)) + "\n" + _body(tree, lines))
    if clash := sorted(owners.keys() & {*imports, *typing_only}):
        raise ValueError(f"{', '.join(clash)} is defined in {owners[clash[0]]} and imported elsewhere")
    imports.pop("TYPE_CHECKING", None)
    typing_only = {name: line for name, line in typing_only.items() if name not in imports}
    head = [_DOCSTRING, "from __future__ import annotations\n", *sorted({*imports.values()})]
    if typing_only:
        head += [
            "from typing import TYPE_CHECKING",
            "\nif TYPE_CHECKING:",
            *(f"    {line}" for line in sorted({*typing_only.values()})),
        ]
    text = "\n".join(head) + "\n" + "".join(parts) + _EPILOGUE % _CONFIGURATION_TEXT
    return {MODELING: text, CONFIGURATION: _CONFIGURATION_TEXT}


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _collect(node: ast.AST, module: str, imports: dict[str, str]) -> None:
    """Name -> the line that imports it, for what comes from outside."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            imports[alias.asname or alias.name] = f"import {ast.unparse(alias)}"
    elif isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
        if node.module.split(".")[0] != _PACKAGE:
            for alias in node.names:
                imports[alias.asname or alias.name] = f"from {node.module} import {ast.unparse(alias)}"
        elif node.module.removeprefix(f"{_PACKAGE}.") not in (*MODULES, "hub.code"):
            raise ValueError(f"{module} imports {node.module}, which is not exported")


def _defined(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _body(tree: ast.Module, lines: list[str]) -> str:
    """A module's text without its docstring and imports, comments kept."""
    dropped: set[int] = set()
    for place, node in enumerate(tree.body):
        is_docstring = place == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring or _is_import(node) or _is_typing_only(node):
            dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = [line for number, line in enumerate(lines, start=1) if number not in dropped]
    return "\n".join(kept).strip("\n") + "\n"
