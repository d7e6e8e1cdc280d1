"""srde's trainer: Transformers' `Trainer` with the auxiliary losses, data in a fixed order, and Muon.

Transformers' and not TRL's: data arrive tokenised, masked and packed by srde's own room, and TRL's data preparation and its
fused LM head would have nothing to add but surprises. TRL's trainers work with `SrdeLossMixin` all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from srde.data.loader import RowOrder
from srde.train.losses import SrdeLossMixin
from srde.train.optimizer import MuonWithAdamW, split_parameters


class SrdeTrainer(SrdeLossMixin, Trainer):
    """Transformers' `Trainer` for a `PeftModel` with an srde adapter.

    Data sets with an order of their own (a method `epoch(number)`, as srde's have) keep it.

    Attributes:
        first_trained: The first step that trains anything; the learning-rate schedule begins there.
    """

    first_trained: int = 0

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return RowOrder(dataset) if hasattr(dataset, "epoch") else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim` names; Muon with AdamW, if `use_muon` is set."""
        if self.optimizer is None and getattr(self.args, "use_muon", False):
            matrices, rest = split_parameters(self.model if model is None else model)
            self.optimizer = MuonWithAdamW(
                matrices,
                rest,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The learning-rate schedule over the steps that train; before them, its beginning."""
        first = self.first_trained
        scheduler = super().create_scheduler(num_training_steps - first, optimizer)
        if first and isinstance(scheduler, LambdaLR):
            plain = scheduler.lr_lambdas
            scheduler = LambdaLR(
                scheduler.optimizer, [lambda step, f=f: f(max(step - first, 0)) for f in plain]
            )
            self.lr_scheduler = scheduler
        return scheduler
