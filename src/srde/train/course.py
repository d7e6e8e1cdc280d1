"""The course of a run: what changes when, and which expert a token is for, from flags, start and data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from srde.data.packed import REPORT_FILE, packed_folder
from srde.errors import ConfigError
from srde.train.arguments import DataArguments, RunArguments
from srde.train.control import Settings
from srde.train.data import Rows, TrainingData
from srde.train.phases import Phases
from srde.train.schedules import LinearSchedule, SparsitySchedule, UnlockSchedule, unlock_span
from srde.train.start import Start
from srde.train.supervision import Supervision, domain_table


@dataclass(frozen=True)
class Course:
    """The course of a run.

    Attributes:
        settings: What changes when.
        supervision: Which expert tokens are forced to, and when; None for routing from the start.
        expert_of: Maps `domain_ids` to experts, where domains are known.
    """

    settings: Settings
    supervision: Supervision | None
    expert_of: Callable[..., Tensor] | None


def course_of(
    args: RunArguments, data_args: DataArguments, start: Start, data: TrainingData, phases: Phases
) -> Course:
    """The course of a run.

    Raises:
        ConfigError: `--domain_experts` names what does not exist, or no row is for the experts that are to be trained.
    """
    config = start.config
    table = table_of(args, start, data.domains)
    there = domains_of(data_args, data) if start.only else set()
    rest = rest_for(start.only, table, there, data.domains) if start.only else ()
    forced = phases.named("expert_pretraining")
    supervision = None
    if args.supervised_experts or forced is not None:
        first, end = (forced.start, forced.end) if forced else (0, 0)
        supervision = Supervision(end, config.num_experts, start=first, table=table, rest=rest)
    first, end = unlock_span(phases, args.unlock_steps)
    # experts that are locked and not pre-trained have changed nothing yet: there is nothing to choose by
    waits = args.progressive_unlock != "none" and forced is None
    cuts_from = min(end, args.max_steps) if waits else phases.first_trained
    last = config.router_temperature
    settings = Settings(
        phases=phases,
        sparsity=SparsitySchedule(config.initial_sparsity, config.target_sparsity, start=cuts_from),
        temperature=LinearSchedule(
            args.router_temperature_start or last,
            last,
            phases.first_trained,
            max(args.max_steps // 2, phases.first_trained + 1),
        ),
        unlock=UnlockSchedule(args.progressive_unlock, config.num_experts, first, end),
        prune_by=args.prune_by,
        warm_start=args.warm_start,
        mask_init="magnitude" if start.folder else config.mask_init,  # an adapter's masks are chosen
        seed=args.seed,
        only=start.only,
        routers_only=args.train_router_only,
    )
    labels = Supervision(0, config.num_experts, table=table, rest=rest)
    return Course(settings, supervision, labels.experts if data.domains or rest else None)


def table_of(args: RunArguments, start: Start, domains: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The experts of each domain: those of its name in an adapter that has names, or else those of its number.

    Raises:
        ConfigError: `--domain_experts` names what does not exist, or an expert that is switched off.
    """
    config = start.config
    return domain_table(
        domains, config.num_experts, args.domain_experts, named=config.expert_names if start.folder else None,
        disabled=config.disabled_experts or (),
    )  # fmt: skip


def rest_for(
    only: Sequence[int], table: Sequence[Sequence[int]], there: set[int], names: Sequence[str]
) -> tuple[int, ...]:
    """The experts of rows without a domain, in a run that trains only some: these, where no domain is theirs.

    Args:
        only: The experts that are trained.
        table: The experts of each domain.
        there: The domains that the rows have, by number; -1 for rows without.
        names: The domains by their numbers.

    Raises:
        ConfigError: No row is for them.
    """
    if any(set(table[domain]) & set(only) for domain in there if domain >= 0):
        return ()
    if -1 in there:
        return tuple(only)
    found = ", ".join(names[domain] for domain in sorted(there))
    raise ConfigError.of(
        "train_experts", list(only), rule=f"the rows are of the domains {found}, and none of these is theirs",
        fix=f"pass for example --domain_experts {names[min(there)]}={only[0]}, or leave the domain out of their rows",
    )  # fmt: skip


def domains_of(data_args: DataArguments, data: TrainingData) -> set[int]:
    """The numbers of the domains that the training rows have; -1 for rows without."""
    if data_args.pretokenized_dir:
        report = packed_folder(data_args.pretokenized_dir) / REPORT_FILE
        counts = json.loads(report.read_text(encoding="utf-8"))["domains"]
        return {data.domains.index(name) for name, one in counts.items() if one["train"]}
    found: set[int] = set()
    rows = data.train.dataset
    assert isinstance(rows, Rows)
    for row in rows.rows:
        found |= (
            {int(row.domain_id)} if hasattr(row, "domain_id") else set(np.unique(row.domain_ids).tolist())
        )
    return found


def names_of(
    args: RunArguments, data_args: DataArguments, start: Start, data: TrainingData
) -> list[str] | None:
    """The experts' names: those of the adapter that the run starts from; or their domains, where the run ties experts to domains
    and rows have some."""
    if start.folder is not None or not (args.supervised_experts or args.warm_start != "none"):
        return start.config.expert_names
    own: list[list[str]] = [[] for _ in range(start.config.num_experts)]
    table, there = table_of(args, start, data.domains), domains_of(data_args, data) - {-1}
    for domain in sorted(there):
        for e in table[domain]:
            own[e].append(data.domains[domain])
    if not there:
        return None
    names = ["+".join(domains) or f"expert {e}" for e, domains in enumerate(own)]
    return [f"domain {name}" if name.isdecimal() else name for name in names]
