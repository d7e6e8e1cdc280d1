"""What somebody should look at in a run: pure functions from a run to alerts.

died, failed         the process is gone; says where it was and how to go on
stalled              no sign of life for longer than max(60 s, 5 x the time between two signs)
loss_spike           the last loss is above the median of the 50 before it (same phase) by more than each of: 6 robust
                     standard deviations (1.4826 x median absolute deviation), 20 % of the median, 0.1 nats
loss_not_finite      the last logged loss is no number
skipped_steps        steps were left out for numbers that are not finite, in the last tenth of the run
collapsed_router     in more than a quarter of the layers, one expert has over 90 % of the load or the normalised
                     entropy of the shares is below 0.3
dead_experts         open experts with under 1 % of an even share
damaged_checkpoint   the checkpoint that a resumed run would start from is not what was written
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from srde.monitor.history import Floats, number, whole
from srde.monitor.routing import COLLAPSED_ENTROPY, COLLAPSED_SHARE, DEAD_SHARE
from srde.monitor.run import Run
from srde.monitor.texts import duration, plural

ERROR, WARNING = "error", "warning"

_BEFORE = 50  # losses that the last one is compared with
_FEWEST_BEFORE = 10
_DEVIATIONS = 6.0
_RISE_SHARE = 0.2
_RISE_NATS = 0.1
_SKIPS_LOOKED_AT = 100  # steps at least
_MANY_SKIPS = 5
_COLLAPSED_LAYERS = 0.25
_NAMED = 4


@dataclass(frozen=True)
class Alert:
    """One thing to look at.

    Attributes:
        kind: One of those at the top of this module.
        severity: `error` when the run is lost or useless as it is, else `warning`.
        text: What is the matter, and what to look at.
    """

    kind: str
    severity: str
    text: str


def alerts(run: Run) -> list[Alert]:
    """All alerts of a run, errors first."""
    found = [alert for rule in RULES for alert in rule(run)]
    return sorted(found, key=lambda alert: alert.severity != ERROR)


def ended_badly(run: Run) -> Iterator[Alert]:
    """Died or failed."""
    if run.status == "died":
        usable = [one.name for one in run.checkpoints if one.step is not None and one.verified is not False]
        go_on = f"resume from {usable[-1]}" if usable else "start anew: there is no checkpoint to resume from"
        yield Alert(
            "died", ERROR,
            f"The process is gone and never said why; it was at step {run.step:,}. Look at its output and at the system's log "
            f"(was it killed for want of memory?), then {go_on}.",
        )  # fmt: skip
    if run.status == "failed":
        yield Alert(
            "failed", ERROR,
            f"The run failed at step {run.step:,}: {run.reason or 'no reason was given'}. Look at the last events and the "
            "process's output.",
        )  # fmt: skip


def stalled(run: Run) -> Iterator[Alert]:
    """No sign of life."""
    if run.status == "stalled":
        host = run.heartbeat.get("host") if run.heartbeat else None
        where = f" on {host}" if host else ""
        yield Alert(
            "stalled", ERROR,
            f"No sign of life for {duration(run.silent_seconds)} (expected within {duration(run.stall_seconds)}). Look whether "
            f"the process still runs{where}, at its output, the disk and the accelerator.",
        )  # fmt: skip


def loss_spike(run: Run) -> Iterator[Alert]:
    """The last loss is far above those before it, or no number at all."""
    if not len(run.train):
        return
    loss, step = run.train["loss"], int(run.train["step"][-1])
    if not np.isfinite(loss[-1]):
        yield Alert(
            "loss_not_finite", ERROR,
            f"The loss of step {step:,} is no finite number. Look at the skipped steps; a lower --learning_rate or another "
            "--dtype may help.",
        )  # fmt: skip
        return
    before = _before_the_last(run, loss)
    if len(before) < _FEWEST_BEFORE:
        return
    median = float(np.median(before))
    deviation = 1.4826 * float(np.median(np.abs(before - median)))
    rise = float(loss[-1]) - median
    if rise > max(_DEVIATIONS * deviation, _RISE_SHARE * abs(median), _RISE_NATS):
        yield Alert(
            "loss_spike", WARNING,
            f"The loss of step {step:,} is {loss[-1]:.3f}; the median of the {len(before)} before is {median:.3f}. Look at the "
            "gradient norm and at the rows of that step; if it stays there, lower --learning_rate.",
        )  # fmt: skip


def _before_the_last(run: Run, loss: Floats) -> Floats:
    """Up to 50 finite losses of the same phase before the last."""
    phase = run.train.phases[-1]
    count = 0
    for other in reversed(run.train.phases[-_BEFORE - 1 : -1]):
        if other != phase:
            break
        count += 1
    before = loss[len(loss) - 1 - count : -1]
    return before[np.isfinite(before)]


def skipped_steps(run: Run) -> Iterator[Alert]:
    """Steps left out lately."""
    since = run.step - max(_SKIPS_LOOKED_AT, run.max_steps // 10)
    steps = {
        whole(event, "step")
        for event in run.events
        if event.get("event") == "skipped_step" and number(event, "step") is not None
    }
    late = sorted(step for step in steps if step > since)
    if late:
        many = len(late) >= _MANY_SKIPS
        yield Alert(
            "skipped_steps", ERROR if many else WARNING,
            f"{plural(len(late), 'step')} skipped since step {max(since, 0):,} for a loss or gradient that is not finite, the "
            f"last at {late[-1]:,}. " + ("Lower --learning_rate or use another --dtype; look" if many else "Look")
            + " at the events and the gradient norm.",
        )  # fmt: skip


def collapsed_router(run: Run) -> Iterator[Alert]:
    """Routers that send nearly everything to one expert."""
    if run.routing is None:
        return
    layers, total = run.routing.collapsed, len(run.routing.share_LE)
    if len(layers) > _COLLAPSED_LAYERS * total:
        yield Alert(
            "collapsed_router", ERROR,
            f"Routers have collapsed in {len(layers)} of {total} layers ({_some(map(str, layers))}): one expert has over "
            f"{COLLAPSED_SHARE:.0%} of the load, or the entropy is below {COLLAPSED_ENTROPY}. Look at the load-balancing loss; "
            "raise --router_aux_loss_coef or the temperature.",
        )  # fmt: skip


def dead_experts(run: Run) -> Iterator[Alert]:
    """Experts that get next to nothing."""
    dead = run.dead_experts
    if dead:
        names = _some(f"layer {layer} expert {expert}" for layer, expert in dead)
        yield Alert(
            "dead_experts", WARNING,
            f"{plural(len(dead), 'dead expert')} (under {DEAD_SHARE:.0%} of an even share): {names}. Look at the expert load; "
            "raise --router_aux_loss_coef if it does not mend itself.",
        )  # fmt: skip


def damaged_checkpoint(run: Run) -> Iterator[Alert]:
    """The newest checkpoint cannot be used."""
    newest = run.newest_checkpoint
    if newest is None or newest.verified is not False:
        return
    others = [one for one in run.checkpoints if one.step is not None and one.verified]
    fall_back = f"The newest that is whole is {others[-1].name}." if others else "No other is whole."
    yield Alert(
        "damaged_checkpoint", ERROR,
        f"{newest.name} is damaged. {fall_back} Look at the disk. Found: {newest.problem}",
    )  # fmt: skip


RULES: tuple[Callable[[Run], Iterator[Alert]], ...] = (
    ended_badly,
    stalled,
    damaged_checkpoint,
    loss_spike,
    skipped_steps,
    collapsed_router,
    dead_experts,
)


def _some(names: Iterator[str]) -> str:
    names_ = list(names)
    more = f" and {len(names_) - _NAMED} more" if len(names_) > _NAMED else ""
    return ", ".join(names_[:_NAMED]) + more
