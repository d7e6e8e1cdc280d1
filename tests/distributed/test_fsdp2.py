"""Training with everything sharded over two processes: Accelerate's FSDP2 under the real command line, with our configuration.

The tolerance is that of test_ddp.py. Sharding over GPUs with NCCL is not tested: there are none.
"""

from pathlib import Path

import pytest

import srde

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = Path(srde.__file__).parent / "recipes/accelerate/fsdp2.yaml"
WRAPPER = "FSDPPeftModelForCausalLM"


def test_shards_are_trained_and_saved_as_one_process_does_it(runs, check):
    run = runs.accelerate(CONFIG, "--use_cpu", "true")
    check(run, runs.one(), WRAPPER, 1e-7)
    assert set(run.ranks[0]["held"].values()) == {"shard"}


def test_a_base_in_bf16_beside_experts_in_float32_and_layers_computed_again(runs, check):
    """One group of parameters holds both types, and a checkpointed layer does the same twice."""
    more = ["--dtype", "bfloat16", "--activation_checkpointing", "true"]
    check(runs.accelerate(CONFIG, "--use_cpu", "true", *more), runs.one(*more), WRAPPER, 1e-6)


def test_routers_that_start_from_the_domains(runs, check):
    """Their weights are set while they lie in parts."""
    more = ["--warm_start", "domains", "--supervised_experts", "--expert_pretrain_steps", "1"]
    check(runs.accelerate(CONFIG, "--use_cpu", "true", *more), runs.one(*more), WRAPPER, 1e-6)
