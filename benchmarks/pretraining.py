"""Expert pre-training: all experts side by side against one after the other.

    python benchmarks/pretraining.py

Claim under test: the founding notes give 1.5 hours side by side against 10 hours one after the other, for eight experts. Side by
side, one packed row holds an example of every domain, each token forced to its domain's expert. One after the other, each expert
is an adapter of its own with the same masks, and sees only its examples. Both see the same tokens per expert in the same steps,
and their losses are shares of the same whole, so that the trained weights must be equal but for rounding; the largest difference
is shown.

What is gained is what a step costs beside its tokens: reading the base's weights, calling its kernels, the optimizer. So the
ratio depends on the tokens per expert and step, and several numbers are measured, in turns, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from srde.quickstart.default_model import default_model, fast_dtype
from srde.tuner import SrdeConfig
from srde.tuner.loading import load_base

RESULTS = Path(__file__).parent / "results" / "pretraining.json"
LEARNING_RATE = 3e-3


def main() -> None:
    """Measures, prints, writes the log."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--num_experts", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64, 256], help="per expert and step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(RESULTS))
    args = parser.parse_args()
    name, dtype = args.model_name_or_path or str(default_model()), args.dtype or fast_dtype()
    results = []
    for tokens in args.tokens:
        ratios, side, turn = [], [], []
        for repeat in range(args.repeats):
            seconds, seconds_alone, _ = both_ways(name, dtype, tokens, 1000 * repeat, args)
            side.append(seconds)
            turn.append(seconds_alone)
            ratios.append(seconds / seconds_alone)
        results.append(
            {
                "tokens_per_expert_and_step": tokens, "side_by_side_seconds": statistics.median(side),
                "one_after_the_other_seconds": statistics.median(turn), "ratio": statistics.median(ratios),
            }
        )  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    # in bf16 the base rounds differently for rows of different lengths; in float32 only the order of sums differs
    difference = both_ways(name, "float32", 16, 1, args)[2]
    print(json.dumps({"relative_difference_of_weights_in_float32": difference}), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "model_name_or_path")} | {
        "dtype": dtype
    }
    Path(args.output).write_text(
        json.dumps(
            {
                "settings": settings,
                "results": results,
                "relative_difference_of_weights_in_float32": difference,
            },
            indent=1,
        )
        + "\n"
    )


def adapted(name: str, dtype: str, num_experts: int, sparsity: float) -> PeftModel:
    """The base with zero experts; loaded anew, as each run would."""
    torch.manual_seed(0)
    config = SrdeConfig(num_experts=num_experts, top_k=1, target_sparsity=sparsity, task_type="CAUSAL_LM")
    return get_peft_model(load_base(name, dtype), config).train()


def take_masks(alone: PeftModel, together: PeftModel, expert: int) -> None:
    """Gives an adapter of one expert the masks of one of many."""
    for layer, other in zip(alone.srde.layers.values(), together.srde.layers.values(), strict=True):
        layer.srde_experts["default"].index.copy_(other.srde_experts["default"].index[expert : expert + 1])


def examples(num_experts: int, tokens: int, seed: int) -> Tensor:
    """Random examples, one per expert: [E, tokens]."""
    return torch.randint(0, 40_000, (num_experts, tokens), generator=torch.Generator().manual_seed(seed))


def packed(ids_ES: Tensor) -> dict[str, Tensor]:
    """All examples in one row."""
    experts, tokens = ids_ES.shape
    labels = ids_ES.clone()
    labels[:, 0] = -100
    return {
        "input_ids": ids_ES.view(1, -1), "labels": labels.view(1, -1), "position_ids": torch.arange(tokens).repeat(experts)[None],
        "expert": torch.arange(experts).repeat_interleave(tokens)[None], "whole": torch.tensor(labels.ne(-100).sum()),
    }  # fmt: skip


def single(ids_ES: Tensor, expert: int) -> dict[str, Tensor]:
    """One expert's example; its loss is still a share of all experts'."""
    whole = packed(ids_ES)["whole"]
    return packed(ids_ES[expert : expert + 1]) | {"whole": whole}


def train(model: PeftModel, batches: list[dict[str, Tensor]]) -> float:
    """Trains the values, and returns the seconds; the first step, which also tries the layers, is done twice and timed once."""
    values = [layer.srde_experts["default"].values for layer in model.srde.layers.values()]
    step(model, batches[0], None)
    optimizer = torch.optim.AdamW(values, lr=LEARNING_RATE, weight_decay=0.0)
    start = time.perf_counter()
    for batch in batches:
        step(model, batch, optimizer)
    return time.perf_counter() - start


def step(model: PeftModel, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """One step; without an optimizer, only there and back."""
    batch = dict(batch)
    forced, whole = batch.pop("expert"), batch.pop("whole")
    with model.srde.force_experts(forced):
        loss = model(**batch, use_cache=False, num_items_in_batch=whole).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


def both_ways(
    name: str, dtype: str, tokens: int, seed: int, args: argparse.Namespace
) -> tuple[float, float, float]:
    """Trains the experts in both ways on the same examples.

    Returns:
        Seconds side by side, seconds one after the other, and how far the trained weights are apart: the largest, over
        experts, of the difference's norm as a share of the weights' norm.
    """
    batches = [examples(args.num_experts, tokens, seed + step) for step in range(args.steps)]
    together = adapted(name, dtype, args.num_experts, args.sparsity)
    seconds = train(together, [packed(batch) for batch in batches])
    alone_seconds = difference = 0.0
    for expert in range(args.num_experts):
        alone = adapted(name, dtype, 1, args.sparsity)
        take_masks(alone, together, expert)
        alone_seconds += train(alone, [single(batch, expert) for batch in batches])
        difference = max(difference, apart(alone, together, expert))
    return seconds, alone_seconds, difference


def apart(alone: PeftModel, together: PeftModel, expert: int) -> float:
    """The difference between the weights of an expert that was trained in the two ways, as a share of the weights."""
    off = size = 0.0
    for one, other in zip(alone.srde.layers.values(), together.srde.layers.values(), strict=True):
        mine, theirs = (
            one.srde_experts["default"].values[:, 0],
            other.srde_experts["default"].values[:, expert],
        )
        off += (mine - theirs).double().square().sum().item()
        size += theirs.double().square().sum().item()
    return (off / size) ** 0.5


if __name__ == "__main__":
    main()
