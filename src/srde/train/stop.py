"""Stopping a run from outside: SIGTERM and Ctrl-C end it with a checkpoint to go on from.

Once, either of them: the step under way is finished, a checkpoint is written, and the run ends with `StoppedError` (exit
status 75). Before there is anything to save, the run ends at once. Ctrl-C a second time: the process is gone (exit status 130);
what was being written is a leftover that the next start removes. A second SIGTERM changes nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from srde.errors import StoppedError

INTERRUPTED = 130


class StopSignal:
    """What has been asked for from outside.

    Attributes:
        asked: The signal's name; None as long as there was none.
        abrupt: Whether a signal ends the run at once, by an exception: while there is nothing to save.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.abrupt = True

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handles SIGTERM and SIGINT while the context is open; outside the main thread, where Python has no signals, not."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def gently(self) -> None:
        """From now on a signal is noted, and the run stops where it can go on later.

        Raises:
            StoppedError: One has come already.
        """
        self.abrupt = False
        if self.asked:
            raise stopped(self.asked, None)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked == "SIGINT" and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        self.asked = signal.Signals(number).name if self.asked != "SIGINT" else self.asked
        if self.abrupt:
            raise stopped(self.asked, None)


def stopped(by: str, checkpoint: str | None) -> StoppedError:
    """The error that ends a run which was stopped from outside."""
    saved = f"its state is in {checkpoint}" if checkpoint else "there was nothing new to save"
    error = StoppedError.of(
        "signal", by, rule=f"the run was stopped; {saved}", fix="run the same command to go on"
    )
    assert isinstance(error, StoppedError)
    return error
