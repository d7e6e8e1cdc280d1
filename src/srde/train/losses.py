"""srde's auxiliary losses, brought into any trainer's loss in the one place that works for all of them.

TRL's trainers call the backbone and not the model's own forward, so a loss added there would be dropped in silence.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srde.core import (
    Delta,
    Route,
    Router,
    load_balancing_loss,
    orthogonality_loss,
    router_supervision_loss,
    router_z_loss,
    sparsity_loss,
)
from srde.errors import UsageError
from srde.train.means import Means
from srde.train.supervision import Supervision
from srde.tuner import RoutedCall, Routing, SrdeConfig

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

NAMES = ("router_aux_loss", "router_z_loss", "orthogonality_loss", "sparsity_loss")
"""The losses; each has a weight in `SrdeConfig` named `<loss>_coef`."""


def delta_losses(delta: Delta, router: Router) -> dict[str, Tensor]:
    """The two losses on the experts' values, of one layer: `Routing.measure` of a training run."""
    return {
        "orthogonality_loss": orthogonality_loss(delta, router.locked),
        "sparsity_loss": sparsity_loss(delta, router.locked),
    }


def auxiliary_losses(call: RoutedCall, config: SrdeConfig, adapter: str) -> dict[str, Tensor]:
    """The losses whose weight is not 0, each a mean over the layers, unweighted.

    Args:
        call: What the routers decided in the forward that the loss belongs to, with `Routing.measure` set to `delta_losses`.
        config: The adapter's settings.
        adapter: Its name.
    """
    routes: dict[str, Route] = {
        layer: route for (layer, name), route in call.routes.items() if name == adapter
    }
    measured = [call.measured[layer, adapter] for layer in routes]
    compute = {
        "router_aux_loss": lambda: [
            load_balancing_loss(r, config.num_experts, call.mask_T) for r in routes.values()
        ],
        "router_z_loss": lambda: [router_z_loss(r, call.mask_T) for r in routes.values()],
        "orthogonality_loss": lambda: [one["orthogonality_loss"] for one in measured],
        "sparsity_loss": lambda: [one["sparsity_loss"] for one in measured],
    }
    return {
        name: torch.stack(compute[name]()).mean() for name in NAMES if getattr(config, f"{name}_coef") > 0
    }


class SrdeLossMixin(_Base):
    """Adds srde's losses to a trainer's own; put it before the trainer's class.

        class SrdeSFTTrainer(SrdeLossMixin, SFTTrainer): ...

    Works with Transformers' `Trainer` and what derives from it; with a model that has no srde adapter it does nothing.
    Each loss appears in the logs under its name, unweighted.

    Attributes:
        supervision: Expert pre-training, on batches with `domain_ids` (shaped like `input_ids`, -1 for none); None for
            routing from the start.
        share: The part of a micro-batch that the next call has, where one was split for want of memory.
        means: The auxiliary losses since the last log.
        language_loss: The language-modelling loss of the last call, without the auxiliary ones.
    """

    supervision: Supervision | None = None
    share: float = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.means = Means()
        self.language_loss: Tensor = torch.zeros(())
        keep_float32(self.model)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's loss plus the weighted auxiliary ones, scaled for gradient accumulation as the trainer's is.

        Raises:
            UsageError: Reentrant gradient checkpointing keeps the routers' graph from us.
        """
        domain_ids = inputs.pop("domain_ids", None)
        routing = getattr(self.accelerator.unwrap_model(model), "srde", None)
        inputs.pop("row_ids", None)
        if not isinstance(routing, Routing) or not model.training:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self.language_loss = (result[0] if return_outputs else result).detach()
            return result
        forced = self._forced(domain_ids, inputs.get("position_ids"))
        routing.measure = delta_losses
        for layer in routing.layers.values():
            for delta in layer.srde_experts.values():
                delta.disjoint()  # compiled forwards need the answer
        with routing.record() as record, nullcontext() if forced is None else routing.force_experts(forced):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        if num_items_in_batch is None:
            loss = loss * self.share  # a mean over the part's own tokens
        self.language_loss = loss.detach()
        # as in TRL: with num_items_in_batch the trainer leaves accumulation to the loss, which is a share of the whole
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        if not record.calls:  # the adapter is switched off
            return (loss, outputs) if return_outputs else loss
        self.observe(record.calls[0])
        configs = self.accelerator.unwrap_model(model).peft_config
        for adapter in {name for _, name in record.calls[0].routes}:
            _require_graph(routing, record.calls[0], adapter)
            config = configs[adapter]
            weighted = {
                name: (getattr(config, f"{name}_coef"), value)
                for name, value in auxiliary_losses(record.calls[0], config, adapter).items()
            }
            if forced is not None and self.supervision is not None:
                routes = [r for (_, name), r in record.calls[0].routes.items() if name == adapter]
                losses = [router_supervision_loss(r, config.num_experts, forced.flatten()) for r in routes]
                weighted["router_supervision_loss"] = self.supervision.coef, torch.stack(losses).mean()
            for name, (coef, value) in weighted.items():
                loss = loss + coef * value.to(loss) / steps * self.share
                self.means.add(name, value, self.share)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's, with tokens forced until backward is done: a checkpointed layer runs a second time in it."""
        routing = getattr(self.accelerator.unwrap_model(model), "srde", None)
        forced = self._forced(inputs.get("domain_ids"), inputs.get("position_ids"))
        with nullcontext() if forced is None or routing is None else routing.force_experts(forced):
            return super().training_step(model, inputs, *args, **kwargs)

    def observe(self, call: RoutedCall) -> None:
        """Called with what the routers decided in each training forward; keep no graph of it."""

    def _forced(self, domain_ids: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        supervision, step = self.supervision, self.state.global_step
        if domain_ids is None or supervision is None or not supervision.start <= step < supervision.steps:
            return None
        return supervision.experts(domain_ids, position_ids, turn=step)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each auxiliary loss since the last call, over all processes."""
        if "loss" in logs:
            logs |= self.means.drain(self.mean_over_processes)
        super().log(logs, *args, **kwargs)

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of a number over the processes that train together."""
        if self.args.world_size == 1:
            return value
        mean: Tensor = self.accelerator.reduce(value.to(self.args.device), reduction="mean")
        return mean


def keep_float32(model: nn.Module) -> None:
    """Puts srde's own numbers back to float32: TRL casts trainable weights to bf16 on quantised bases."""
    routing = getattr(model, "srde", None)
    if isinstance(routing, Routing):
        for layer in routing.layers.values():
            for parameter in (*layer.srde_experts.parameters(), *layer.srde_router.parameters()):
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()


def _require_graph(routing: Routing, call: RoutedCall, adapter: str) -> None:
    layer, route = next((layer, r) for (layer, name), r in call.routes.items() if name == adapter)
    if routing.layers[layer].srde_router[adapter].weight.requires_grad and not route.logits_TE.requires_grad:
        raise UsageError.of(
            "activation_checkpointing_kwargs", {"use_reentrant": True},
            rule="reentrant checkpointing hides the routers' gradients from the auxiliary losses",
            fix="pass activation_checkpointing_kwargs={'use_reentrant': False}",
        )  # fmt: skip
