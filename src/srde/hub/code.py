"""The files of code that go with an exported model: the core's own, with imports that find each other in one flat folder."""

from __future__ import annotations

import re
from pathlib import Path

MODULES = {
    "errors": "sardine_errors",
    "core.delta": "sardine_delta",
    "core.element": "sardine_element",
    "core.layout": "sardine_layout",
    "core.masks": "sardine_masks",
    "core.neuron": "sardine_neuron",
    "core.routed": "sardine_routed",
    "core.router": "sardine_router",
    "tuner.auto": "sardine_base",
    "tuner.control": "sardine_control",
    "tuner.fingerprint": "sardine_fingerprint",
    "tuner.names": "sardine_names",
    "tuner.routed_layer": "sardine_layer",
    "tuner.sites": "sardine_sites",
    "hub.code": "sardine_code",
    "hub.configuration_sardine": "configuration_sardine",
    "hub.modeling_sardine": "modeling_sardine",
    "hub.reading": "sardine_reading",
}
"""Module of the library -> its file's name in an exported model."""

_PACKAGE = "srde"
_HERE = Path(__file__)
_IMPORT = re.compile(rf"^(\s*)from {_PACKAGE}\.([\w.]+) import ", re.MULTILINE)
_PROLOGUE = """
if not __package__:  # the file was put on the path by itself: make its folder a package, so that its neighbours are found
    import importlib.machinery
    import importlib.util
    import os
    import sys

    __package__ = "sardine_code_files"
    if __package__ not in sys.modules:
        _spec = importlib.machinery.ModuleSpec(__package__, None, is_package=True)
        _spec.submodule_search_locations = [os.path.dirname(os.path.abspath(__file__))]
        sys.modules[__package__] = importlib.util.module_from_spec(_spec)
    __spec__ = importlib.machinery.ModuleSpec(f"{__package__}.{__name__}", __loader__, origin=__file__)
"""


def code_files() -> dict[str, str]:
    """File name -> text, of all files; from the library, or from an exported model's own folder.

    Raises:
        ValueError: A module imports one that is not among `MODULES` (a mistake in the library).
    """
    if _HERE.stem == MODULES["hub.code"]:
        return {
            f"{name}.py": _HERE.with_name(f"{name}.py").read_text(encoding="utf-8")
            for name in MODULES.values()
        }
    root = _HERE.parents[1]
    texts = {
        f"{name}.py": _flat((root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"), module)
        for module, name in MODULES.items()
    }
    modeling = texts["modeling_sardine.py"]
    after = modeling.index("from __future__ import annotations\n") + len(
        "from __future__ import annotations\n"
    )
    texts["modeling_sardine.py"] = modeling[:after] + _PROLOGUE + modeling[after:]
    return texts


def write_code(folder: Path) -> None:
    """Writes the files into a folder."""
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def _flat(text: str, module: str) -> str:
    def relative(found: re.Match[str]) -> str:
        if found[2] not in MODULES:
            raise ValueError(f"{module} imports {found[2]}, which is not exported")
        return f"{found[1]}from .{MODULES[found[2]]} import "

    return _IMPORT.sub(relative, text)
