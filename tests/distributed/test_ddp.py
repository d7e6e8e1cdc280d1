"""Training in several processes, a whole model in each: the real command line under torchrun, two processes, gloo.

Two processes of one row a step see the rows, in order, that one process sees with two accumulated micro-batches, and learn the
same. On the machine where this was written the adapters are the same bits; 1e-7 allows for another order of sums.
"""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PRUNED = ["--target_sparsity", "0.1"]
LANGUAGE_ONLY = [
    word
    for name in ("router_aux_loss", "router_z_loss", "orthogonality_loss", "sparsity_loss")
    for word in (f"--{name}_coef", "0")
]


def test_two_processes_do_what_one_does_while_experts_are_pruned(runs, check):
    run = runs.torchrun(*PRUNED)
    check(run, runs.one(*PRUNED), "DistributedDataParallel", 1e-7)
    assert {name: tuple(t.shape) for name, t in run.saved.items() if name.endswith("values")} == {
        f"base_model.model.model.layers.{n}.mlp.srde_experts.values": (3, 3, 4, 32) for n in (0, 1)
    }  # 10 % of 48 neurons
    assert set(run.ranks[0]["held"].values()) == {"whole"}
    assert (
        len(json.loads((run.folder / "train_results.json").read_text())["log"]) >= 4
    )  # written once, not by both


def test_the_language_loss_is_a_mean_over_all_tokens_of_all_processes(runs, farthest):
    """Against one process with both rows in one batch. Their lengths differ, so a mean of means would show; auxiliary losses and
    learned masks are left out, because they are statistics of a micro-batch and not sums over tokens."""
    settings = [*LANGUAGE_ONLY, "--mask_init", "magnitude"]
    two, one = runs.torchrun(*settings), runs.batch_of_two(*settings)
    pairs = [a + b for a, b in zip(*(rank["batches"] for rank in two.ranks), strict=True)]
    assert pairs == one.ranks[0]["batches"] and len({len(b) for r in two.ranks for b in r["batches"]}) > 2
    assert farthest(two.ranks[0]["adapter"], one.ranks[0]["adapter"]) <= 1e-6
