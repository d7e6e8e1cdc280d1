"""The trainer's steps as a bar."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from srde.progress import Advance


class BarCallback(TrainerCallback):
    """Moves a bar with the trainer's steps, the loss beside it."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.note = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.advance(1, self.note)
