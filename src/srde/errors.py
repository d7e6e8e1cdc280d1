"""Every error that srde raises on purpose.

    SrdeError
    ├── ConfigError            (also ValueError)    a setting breaks its rule
    ├── UnsupportedModelError  (also ValueError)    no MLP of this model can carry experts
    ├── DataError              (also ValueError)    a data file or a row breaks its rule
    ├── ArtifactError          (also RuntimeError)  a saved folder is incomplete, altered or for another base
    ├── UsageError             (also RuntimeError)  a call that cannot mean anything in this state
    ├── TrainingError          (also RuntimeError)  a run that cannot go on: numbers that are not finite, no memory left
    └── StoppedError           (also RuntimeError)  a run that was asked to stop, and did, with its state saved

A message names the thing, its value, the rule it breaks and what to do about it. The headings of
`docs/troubleshooting.md` are these messages; a test holds the two together.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class SrdeError(Exception):
    """Base of all errors that srde raises on purpose."""

    @classmethod
    def of(cls, thing: str, value: object, *, rule: str, fix: str) -> SrdeError:
        """Builds the error with the house's message: ``thing=value: rule. fix.``

        Args:
            thing: What is wrong: a field, a file, a tensor.
            value: The offending value; shown with `repr`.
            rule: The rule it breaks, as a clause without a full stop.
            fix: What the reader can do, as a sentence without a full stop.
        """
        return cls(f"{thing}={value!r}: {rule}. {fix}.")


class ConfigError(SrdeError, ValueError):
    """A setting breaks its rule."""


class UnsupportedModelError(SrdeError, ValueError):
    """No MLP of the model can carry experts."""


class DataError(SrdeError, ValueError):
    """A data file or a row breaks its rule: ``file:line: field: rule``."""

    @classmethod
    def at(cls, file: object, line: int | None, field: str, rule: str) -> DataError:
        """Builds the error for a place in a file: ``file:line: field: rule``.

        Args:
            file: The file's path.
            line: The line, counted from 1; `None` when the whole file is meant.
            field: The field of the row, or ``row`` / ``file``.
            rule: The rule it breaks and the fix, as one clause.
        """
        place = f"{file}:{line}" if line is not None else f"{file}"
        return cls(f"{place}: {field}: {rule}")


class ArtifactError(SrdeError, RuntimeError):
    """A saved folder is incomplete, altered, or made for another base model."""


class UsageError(SrdeError, RuntimeError):
    """A call that cannot mean anything in the present state."""


class TrainingError(SrdeError, RuntimeError):
    """A run cannot go on: its numbers are not finite any more, or the memory does not suffice."""


class StoppedError(SrdeError, RuntimeError):
    """A run was stopped from outside; what it had is saved, and the same command goes on from there."""


def refuse_unknown(verb: str, unknown: Sequence[str], flags: Sequence[str]) -> None:
    """Raises for the first argument that no flag of a verb took, with the nearest flag there is.

    Raises:
        ConfigError: There is such an argument.
    """
    if unknown:
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise ConfigError.of(
            "argument", unknown[0], rule=f"srde {verb} has no such flag",
            fix=f"the nearest is {close[0]}" if close else f"see srde {verb} --help",
        )  # fmt: skip
