"""One process of a training run under test: `srde` as it is, and a witness of what the process saw.

    torchrun --standalone --nproc_per_node 2 launch.py FOLDER train --model_name_or_path ...

Writes `FOLDER/<rank>.pt`: the backend and the number of processes as torch reports them from inside, what the model was wrapped
in, how its parameters were held, the tokens of every micro-batch, and the adapter and the log at the end.

Accelerate engages FSDP2 and DeepSpeed only where it finds accelerators; without any it would train something else in silence.
That one question is answered here in its place. All that follows is its own code.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import Trainer

from srde.cli import main


def watch(folder):
    """Makes every Transformers trainer of this process write down what it does."""
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
            "held": {name: held(parameter) for name, parameter in self.model.named_parameters()},
            "batches": seen,
            "adapter": {name: whole(tensor) for name, tensor in own(self.model)},
            "log": self.state.log_history,
        }
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(facts, folder / f"{os.environ.get('RANK', '0')}.pt")
        return result

    Trainer.training_step, Trainer.train = training_step, train_and_tell


def own(model):
    """srde's tensors."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".srde_" in name:
            yield name, tensor


def held(parameter):
    """How a process holds a parameter: "shard", or "whole"."""
    return "shard" if isinstance(parameter, DTensor) or parameter.numel() == 0 else "whole"


def whole(tensor):
    """All of a tensor of which processes may hold parts; all processes ask together."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    elif hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        tensor = safe_get_full_fp32_param(tensor)
    return tensor.detach().clone()


def engage_fsdp():
    """Answers Accelerate's question whether there are accelerators to shard over: yes, these processes."""
    init = AcceleratorState.__init__

    def init_and_engage(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_and_engage


def engage_deepspeed():
    """The same for DeepSpeed, where the question is which backend there is."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


if __name__ == "__main__":
    if "--deepspeed" in sys.argv:
        engage_deepspeed()
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        engage_fsdp()
    watch(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
