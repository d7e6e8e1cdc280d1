"""Trackers (TensorBoard, Weights & Biases, Trackio, ...): services outside, which must not end a run.

Covered: a tracker that is not known or not installed is named before anything is loaded; one that fails while the run goes on is
left out from then on, and that is said once. Not covered: a tracker that hangs inside a call of its own.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from srde.errors import ConfigError

logger = logging.getLogger(__name__)


class Tracker(TrainerCallback):
    """A tracker's callback whose failures stay its own.

    Args:
        inner: The callback.
    """

    def __init__(self, inner: TrainerCallback) -> None:
        self.inner = inner
        self.failed = False

    def __getattribute__(self, name: str) -> Any:
        plain = object.__getattribute__(self, name)
        return self._guarded(name) if name.startswith("on_") else plain

    def _guarded(self, event: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            if self.failed:
                return
            try:
                getattr(self.inner, event)(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever a service outside raises, training goes on
                self.failed = True
                name = type(self.inner).__name__
                logger.warning("the tracker %s failed (%s) and is left out from now on", name, error)

        return call


def require_known(names: list[str]) -> None:
    """Refuses trackers that Transformers does not know.

    Raises:
        ConfigError: There is one.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError.of(
                "report_to", name, rule=f"it must be none, all or one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}",
                fix="pick one of them",
            )  # fmt: skip


def not_installed(names: list[str], error: Exception) -> ConfigError:
    """The error for a tracker whose package is not there."""
    failure = ConfigError.of(
        "report_to", ", ".join(names), rule=str(error).rstrip("."), fix="install it, or leave it out"
    )
    assert isinstance(failure, ConfigError)
    return failure


def guard(trainer: Trainer) -> None:
    """Puts every tracker of a trainer behind a `Tracker`."""
    known = tuple(INTEGRATION_TO_CALLBACK.values())
    handler = trainer.callback_handler
    handler.callbacks = [Tracker(one) if isinstance(one, known) else one for one in handler.callbacks]
