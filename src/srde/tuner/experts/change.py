"""What changes an adapter: one more expert, one taken from elsewhere, names, what is trained and what is chosen.

All functions are pure: they take adapters and give a new one, and whatever they do not name keeps its bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from srde.errors import ConfigError, UsageError
from srde.tuner.config import SrdeConfig
from srde.tuner.experts.folder import Adapter, LayerTensors, with_layers
from srde.tuner.fingerprint import same_base


def one_expert(config: SrdeConfig, name: str | int) -> int:
    """The routed expert of a name or number.

    Raises:
        ConfigError: There is none, or several have the name.
    """
    found = config.experts_named(name)
    if len(found) > 1:
        raise ConfigError.of(
            "expert", name, rule=f"experts {', '.join(map(str, found))} have this name", fix="pass one of these numbers"
        )  # fmt: skip
    return found[0]


def add_expert(
    adapter: Adapter,
    name: str,
    *,
    masks: Mapping[str, Tensor] | None = None,
    copy_of: int | None = None,
    names: Sequence[str] | None = None,
) -> Adapter:
    """The adapter with one more routed expert, the last, switched off: no token can choose it, so the model says what it said
    before. Training that names it (`srde train --train_experts`) switches it on.

    Its row of the router is the mean of the others' rows that are switched on: its logit is then never the largest, and
    never far from it. A copy has the row of its original.

    Args:
        adapter: The adapter.
        name: The new expert's name.
        masks: What it rewrites in each layer, as `choose_masks` gives it; its values are zero.
        copy_of: Or the routed expert whose values, masks and row it gets.
        names: Names of the experts that there are, where the adapter has none.

    Raises:
        ConfigError: Names are missing, or no names.
    """
    config, grown = adapter.config, grown_config(adapter.config, name, names)
    place = config.num_experts
    enabled = [e for e in range(place) if e not in (config.disabled_experts or ())]
    layers = {}
    for layer, old in adapter.layers.items():
        if copy_of is not None:
            values, index, row = _values(old, copy_of), _index(old, copy_of), old.weight[copy_of]
        else:
            assert masks is not None
            values, index = torch.zeros_like(_values(old, 0)), masks[layer].to(old.index.dtype)
            row = old.weight[enabled].mean(0) if enabled else torch.zeros_like(old.weight[0])
        layers[layer] = LayerTensors(
            _insert(old.values, values, 1, place),
            _insert(old.index, index, 0 if old.by_neuron else 1, place),
            _insert(old.weight, row, 0, place),
        )
    return replace(adapter, layers=layers, config=grown)


def grown_config(config: SrdeConfig, name: str, names: Sequence[str] | None = None) -> SrdeConfig:
    """The settings with one more routed expert, switched off.

    Args:
        config: The settings.
        name: The new expert's name.
        names: Names of the experts that there are, where they have none.

    Raises:
        ConfigError: Names are missing, or no names.
    """
    return replace(
        config,
        num_experts=config.num_experts + 1,
        expert_names=[*_names(config, names), name],
        disabled_experts=[*(config.disabled_experts or ()), config.num_experts],
    )


def replace_expert(
    adapter: Adapter, expert: int, other: Adapter, of: int, *, keep_router: bool = False
) -> Adapter:
    """The adapter with the values and masks of one routed expert of another adapter of the same base, and with its row of the
    router.

    Where the other expert rewrites less, it is filled up with zero changes of places that it leaves alone, which changes nothing
    of what it does.

    Args:
        adapter: The adapter.
        expert: The expert that goes; its name stays.
        other: The adapter that gives.
        of: Its expert.
        keep_router: Leaves the row of the router as it is.

    Raises:
        UsageError: The two adapters have no common base, granularity or layers, or the other expert rewrites more.
    """
    _require_alike(adapter, other)
    layers = {}
    for layer, old in adapter.layers.items():
        given = other.layers[layer]
        values, index = _fitted(_values(given, of), _index(given, of), old, given, f"{of} of {other.folder}")
        new = LayerTensors(old.values.clone(), old.index.clone(), old.weight.clone())
        new.values[:, expert] = values.to(new.values.dtype)
        (new.index if old.by_neuron else new.index.transpose(0, 1))[expert] = index.to(new.index.dtype)
        if not keep_router:
            new.weight[expert] = given.weight[of].to(new.weight.dtype)
        layers[layer] = new
    return with_layers(adapter, layers)


def freeze_experts(adapter: Adapter, experts: Iterable[int], *, undo: bool = False) -> Adapter:
    """The adapter with these experts used and never trained; or, undone, trained again."""
    return with_layers(
        adapter, adapter.layers, frozen_experts=_changed(adapter.config.frozen_experts, experts, undo)
    )


def switch_experts(adapter: Adapter, experts: Iterable[int], *, on: bool) -> Adapter:
    """The adapter with these experts switched on, or off: never chosen and never trained.

    Raises:
        ConfigError: None would be left.
    """
    disabled = _changed(adapter.config.disabled_experts, experts, undo=on)
    return with_layers(adapter, adapter.layers, disabled_experts=disabled)


def name_experts(adapter: Adapter, names: Mapping[int, str]) -> Adapter:
    """The adapter with these names; experts that had none and get none are called "expert" and their number.

    Raises:
        ConfigError: A name is empty or a number.
    """
    config = adapter.config
    old = config.expert_names or [f"expert {e}" for e in range(config.num_experts)]
    return with_layers(
        adapter, adapter.layers, expert_names=[names.get(e, name) for e, name in enumerate(old)]
    )


def _changed(old: Sequence[int] | None, experts: Iterable[int], undo: bool) -> list[int] | None:
    experts = set(experts)
    return sorted(set(old or ()) - experts if undo else set(old or ()) | experts) or None


def _names(config: SrdeConfig, names: Sequence[str] | None) -> list[str]:
    if config.expert_names is not None:
        if names is not None and list(names) != config.expert_names:
            raise ConfigError.of(
                "names", ",".join(names), rule=f"the experts have names: {', '.join(config.expert_names)}",
                fix="leave it out; `srde experts name` changes them",
            )  # fmt: skip
        return list(config.expert_names)
    if names is None or len(names) != config.num_experts:
        given = None if names is None else ",".join(names)
        raise ConfigError.of(
            "names", given, rule=f"the adapter's {config.num_experts} experts have no names yet, and one cannot have one alone",
            fix=f"pass --names with {config.num_experts} names and commas between, or --names domains where expert 0 is math, "
            "1 logic, 2 code, 3 science, 4 planning, 5 abstract",
        )  # fmt: skip
    return list(names)


def _require_alike(adapter: Adapter, other: Adapter) -> None:
    mine, theirs = adapter.config, other.config
    for what, one, two in (
        ("granularity", mine.granularity, theirs.granularity),
        ("layers", list(adapter.layers), list(other.layers)),
        (
            "shape of an MLP's matrices",
            *(
                {(o.values.shape[0], o.weight.shape[1]) for o in side.layers.values()}
                for side in (adapter, other)
            ),
        ),
    ):
        if one != two:
            raise UsageError.of(
                f"{what} of {other.folder}", two, rule=f"{adapter.folder} has {one}, and experts are exchanged between equals",
                fix="name an adapter that was trained with the same settings on the same base",
            )  # fmt: skip
    one, two = mine.base_fingerprint, theirs.base_fingerprint
    if one is None or two is None or not same_base(one, two):
        rule = f"{adapter.folder} was trained on {mine.base_model_name_or_path}"
        rule += (
            ", whose weights differ"
            if one and two
            else ", and one of the two does not know its base's weights"
        )
        raise UsageError.of(
            f"base of {other.folder}", theirs.base_model_name_or_path, rule=rule, fix="name an adapter of the same base"
        )  # fmt: skip


def _fitted(
    values: Tensor, index: Tensor, old: LayerTensors, given: LayerTensors, name: str
) -> tuple[Tensor, Tensor]:
    """Values [M, R, D] or [M, N] and index [R] or [M, N] of an expert with as many places as the others here have."""
    wanted, have = old.index.shape[-1], index.shape[-1]
    if have > wanted:
        raise UsageError.of(
            f"expert {name}", f"{have} places in a layer", rule=f"the experts here rewrite {wanted} each",
            fix="take it the other way round, or from an adapter of this sparsity",
        )  # fmt: skip
    if have == wanted:
        return values, index
    # every place below the largest that is named exists; of these there are enough, since one expert here has `wanted`
    known = int(max(old.index.max(), given.index.max())) + 1
    rows = index.unsqueeze(0) if old.by_neuron else index
    free = torch.stack([_free(row, known, wanted - have) for row in rows])
    more = values.new_zeros(values.shape[0], wanted - have, *values.shape[2:])
    filled, places = torch.cat([values, more], 1), torch.cat([rows, free.to(rows.dtype)], 1)
    order = places.argsort(1)
    places = places.gather(1, order)
    order = order.expand(len(values), -1)
    where = order.view(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return filled.gather(1, where), places[0] if old.by_neuron else places


def _free(taken_N: Tensor, known: int, count: int) -> Tensor:
    free_S = torch.ones(known, dtype=torch.bool)
    free_S[taken_N.long()] = False
    return free_S.nonzero().squeeze(1)[:count]


def _values(layer: LayerTensors, expert: int) -> Tensor:
    return layer.values[:, expert]


def _index(layer: LayerTensors, expert: int) -> Tensor:
    return layer.index[expert] if layer.by_neuron else layer.index[:, expert]


def _insert(tensor: Tensor, one: Tensor, axis: int, place: int) -> Tensor:
    """One more slice along an axis, before the place."""
    size = tensor.shape[axis]
    return torch.cat(
        [tensor.narrow(axis, 0, place), one.unsqueeze(axis), tensor.narrow(axis, place, size - place)], axis
    )
