"""What decoding costs with a trained adapter, as a SaRDinE model, and with one expert merged, against the base.

    python benchmarks/decoding.py --adapter runs/full --dtype bfloat16 --threads 2

All are timed by turns in one run; the ratios are medians of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from jobs import decode
from measuring import time_by_turns
from srde.hub.convert import from_adapter
from srde.hub.merged import merge
from srde.tuner.loading import load_adapter, load_base
from tables import machine
from variants import Variant


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--adapter", required=True, help="a trained adapter")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads; without it, PyTorch's own choice")
    parser.add_argument("--expert", type=int, default=0, help="the expert that is merged")
    parser.add_argument("--context", type=int, default=128, help="tokens before those that are decoded")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=8, help="tokens per sample")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=25, help="rounds that are")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    routed = load_adapter(args.adapter, args.dtype)[0]
    name = routed.peft_config["default"].base_model_name_or_path
    merged, parity = merge(*load_adapter(args.adapter, args.dtype), expert=args.expert)
    models = {
        "base": load_base(name, args.dtype),
        "merged": merged,
        "routed": routed,
        "SaRDinE": from_adapter(load_adapter(args.adapter, args.dtype)[0]),
        "base again": load_base(name, args.dtype),  # how far two of a kind are apart
    }
    for model in models.values():
        model.requires_grad_(False)
    variants = [Variant(name, "plain", None, model) for name, model in models.items()]
    results = {}
    for batch in args.batch_size:
        job = decode(batch, args.context, args.tokens)
        seconds = time_by_turns(
            job, variants, args.repeats, args.warmup, lambda text: print(text, file=sys.stderr, flush=True)
        )
        results[job.name] = {
            name: {
                "ms": 1e3 * statistics.median(seconds[name]),
                "speed": statistics.median(
                    b / s for b, s in zip(seconds["base"], seconds[name], strict=True)
                ),
                "seconds": seconds[name],
            }
            for name in models
        }
    facts = machine("cpu")
    where = f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    lines = [
        f"`{shlex.join(['python', *sys.argv])}`",
        "",
        f"{Path(str(name)).name}, {args.dtype}, {args.repeats} rounds, {time.strftime('%Y-%m-%d')}; {where}",
        "",
        "|  | " + " | ".join(f"{job}, ms/step | x base speed" for job in results) + " |",
        "|---|" + "---:|---:|" * len(results),
    ]
    for name in models:
        cells = [f"{found[name]['ms']:.2f} | {found[name]['speed']:.3f}" for found in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"The merged model against the adapter with expert {args.expert} forced: {parity}."]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f"decoding-{args.dtype}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output_dir / f"decoding-{args.dtype}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
