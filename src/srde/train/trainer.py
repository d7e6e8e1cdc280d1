"""srde's trainer: Transformers' `Trainer` with the auxiliary losses.

Transformers' and not TRL's: data arrive tokenised, masked and packed by srde's own room, and TRL's data preparation and its
fused LM head would have nothing to add but surprises. TRL's trainers work with `SrdeLossMixin` all the same.
"""

from __future__ import annotations

from transformers import Trainer

from srde.train.losses import SrdeLossMixin


class SrdeTrainer(SrdeLossMixin, Trainer):
    """Transformers' `Trainer` for a `PeftModel` with an srde adapter."""
