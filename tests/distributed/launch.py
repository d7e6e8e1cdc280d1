"""One process of a training run under test: `srde` as it is, and a witness of what the process saw.

    torchrun --standalone --nproc_per_node 2 launch.py FOLDER train --model_name_or_path ...

Writes `FOLDER/<rank>.pt`: the backend and number of processes as torch reports them from inside, what the model was wrapped in, the
tokens of every batch, and the adapter and the log at the end.
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import Trainer

from srde.cli import main


def watch(folder):
    """Makes every Transformers trainer of this process write down what it does."""
    folder = Path(folder)
    seen = []
    step, train = Trainer.training_step, Trainer.train

    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].flatten().tolist())
        return step(self, model, inputs, *args, **kwargs)

    def train_and_tell(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        group = distributed.is_initialized()
        facts = {
            "world_size": distributed.get_world_size() if group else 1,
            "backend": distributed.get_backend() if group else None,
            "wrapper": type(self.model_wrapped).__name__,
            "batches": seen,
            "adapter": {
                name: tensor.detach().clone() for name, tensor in self.model.state_dict().items() if "srde_" in name
            },
            "log": self.state.log_history,
        }
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(facts, folder / f"{os.environ.get('RANK', '0')}.pt")
        return result

    Trainer.training_step, Trainer.train = training_step, train_and_tell


if __name__ == "__main__":
    watch(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
