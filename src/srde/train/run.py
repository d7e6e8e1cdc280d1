"""One training run, from flags to a saved adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from srde.artifacts import sweep
from srde.errors import StoppedError
from srde.monitor.notify import Notifier, webhook_url_from
from srde.monitor.scrub import Scrubber
from srde.train.arguments import DataArguments, ModelArguments, RunArguments
from srde.train.job import ATTEMPT, Job, Outcome, trained_parameters
from srde.train.lock import lock
from srde.train.record import Record
from srde.train.start import start_of
from srde.train.stop import StopSignal, stopped

__all__ = ["Outcome", "run", "trained_parameters"]


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    experts: Any,
    args: RunArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Trains experts on a frozen model and saves the adapter. A run that was killed or stopped goes on where it was.

    Args:
        model_args: The base.
        data_args: The rows.
        experts: An `ExpertArguments`.
        args: Everything that Transformers' trainer takes, and what srde adds.
        callbacks: Further callbacks of that trainer; they show the progress then, and no log lines are printed.

    Raises:
        SrdeError: A setting, a row or the model breaks a rule; no adapter has been written then.
        StoppedError: SIGTERM or Ctrl-C came; the state is saved, and the same call goes on.
        TrainingError: Numbers are not finite any more, or the memory does not suffice.
    """
    folder = Path(args.output_dir or "")
    start = start_of(experts, args)
    stop = StopSignal()
    is_main = args.process_index == 0
    url = webhook_url_from(args.webhook_url, os.environ) if is_main else None
    private = args.webhook_allow_private or os.environ.get("WEBHOOK_ALLOW_PRIVATE") == "1"
    notifier = Notifier(url, folder.name, allow_private=private)
    with ExitStack() as stack:
        stack.callback(notifier.close)
        if is_main:
            stack.enter_context(lock(folder))
            sweep(folder)
        stack.enter_context(stop.listening())
        scrub = Scrubber(url, os.environ)
        record = Record(folder, args.max_steps, args.heartbeat_steps, writes=is_main, scrub=scrub)
        try:
            record.beat("loading", 0)
            return Job(model_args, data_args, start, args, callbacks, folder, record, stop, notifier).go()
        except BaseException as error:
            if isinstance(error, StoppedError) or (stop.asked and stop.abrupt):
                # a library may swallow the stop while it loads, and break at what is missing then
                ended = error if isinstance(error, StoppedError) else stopped(stop.asked or "", None)
                record.beat("stopped", reason=str(ended))
                record.event("stopped", record.step, str(ended))
                notifier.send("stopped", str(ended), step=record.step)
                if ended is error:
                    raise
                raise ended from error
            reason = f"{type(error).__name__}: {error}"
            record.fail(reason)
            attempt = os.environ.get(ATTEMPT)
            facts = {"step": record.step} | ({"attempt": attempt} if attempt else {})
            notifier.send("failed", reason, **facts)
            raise
