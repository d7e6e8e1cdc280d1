"""srde's trainer: Transformers' `Trainer` with the auxiliary losses.

Transformers' and not TRL's: data arrive tokenised, masked and packed by srde's own room, and TRL's data preparation and its
fused LM head would have nothing to add but surprises. TRL's trainers work with `SrdeLossMixin` all the same.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from srde.data.loader import Examples, PackedDataset, RowOrder
from srde.train.losses import SrdeLossMixin


class SrdeTrainer(SrdeLossMixin, Trainer):
    """Transformers' `Trainer` for a `PeftModel` with an srde adapter. Packed sets keep their own order of rows."""

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return (
            RowOrder(dataset)
            if isinstance(dataset, PackedDataset | Examples)
            else super()._get_train_sampler(train_dataset)
        )
