"""DeepSpeed's ZeRO-2 and ZeRO-3 under the real command line, with our configurations, two processes, gloo.

ZeRO-3 sums in another order: its tolerance is wider than that of test_ddp.py. GPUs with NCCL are not tested: there are none.
"""

import importlib.util
from pathlib import Path

import pytest

import srde

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="deepspeed is not installed: training with ZeRO is NOT tested",
    ),
]

# DeepSpeed takes gradients away, and its optimizer steps, before `srde train` could look at them: no masks are learned, and no
# phase holds the routers
ALL_AT_ONCE = ["--mask_init", "magnitude", "--delta_training_steps", "0"]
FOLDER = Path(srde.__file__).parent / "recipes/accelerate"


@pytest.mark.parametrize(("stage", "tolerance"), [(2, 1e-7), (3, 1e-6)], ids=["zero2", "zero3"])
def test_partitions_are_trained_and_saved_as_one_process_does_it(runs, check, stage, tolerance):
    engine = ["--deepspeed", str(FOLDER / f"zero{stage}.json")]
    run = runs.accelerate(FOLDER / f"zero{stage}.yaml", *engine, *ALL_AT_ONCE)
    check(run, runs.one(*ALL_AT_ONCE), "DeepSpeedEngine", tolerance)
    held = run.ranks[0]["held"]
    values = {how for name, how in held.items() if name.endswith(".values")}
    base = {how for name, how in held.items() if name.endswith("gate_proj.weight")}
    assert values == base == {"whole" if stage == 2 else "shard"}
