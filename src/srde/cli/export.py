"""`srde export`: an adapter as a model for others."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Writes the model, says where it is and how near it is, and uploads it if asked."""
    parser = argparse.ArgumentParser(prog="srde export", allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="folder that srde train wrote, or hub id")
    parser.add_argument("--output_dir", required=True, help="folder of the exported model")
    parser.add_argument(
        "--format",
        choices=("sardine", "merged"),
        default="sardine",
        help="sardine: base and routed experts as one Transformers model with its code (default); merged: a plain model with "
        "one expert or mixture folded in",
    )
    parser.add_argument("--expert", help="merged: an expert's name or number")
    parser.add_argument("--weights", help="merged: a mixture instead, as in math=0.7,code=0.3")
    parser.add_argument(
        "--max_logit_difference",
        type=float,
        help="merged: refuse a model whose logits differ from the adapter's by more (default: by the weights' type)",
    )
    parser.add_argument(
        "--gguf",
        metavar="TYPE",
        help="merged: also as GGUF, with numbers of type f32, f16, bf16, q8_0 or auto",
    )
    parser.add_argument(
        "--llama_cpp",
        help="merged: folder of llama.cpp, or of the unpacked source of llama-cpp-python, for --gguf",
    )
    parser.add_argument(
        "--without_base",
        action="store_true",
        help="sardine: leave the base's weights out; they are loaded from where they are",
    )
    parser.add_argument("--model_name_or_path", help="another place to load the same base from")
    parser.add_argument("--base_name", help="the base's name to write down, such as its hub id")
    parser.add_argument(
        "--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="largest file of tensors (default: %(default)s)"
    )
    parser.add_argument(
        "--eval_results", help="sardine: eval_results.json for the card (default: the one beside the adapter)"
    )
    parser.add_argument("--license", help="the licence's name on the hub, for the card")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the model")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    args = parser.parse_args(argv)

    from srde.data.build.upload import require_name
    from srde.errors import ConfigError
    from srde.hub.export import Source, export_merged, export_sardine, push

    of_merged = {
        "expert": args.expert,
        "weights": args.weights,
        "max_logit_difference": args.max_logit_difference,
        "gguf": args.gguf,
        "llama_cpp": args.llama_cpp,
    }
    of_sardine = {"without_base": args.without_base or None, "eval_results": args.eval_results}
    for name, value in (of_merged if args.format == "sardine" else of_sardine).items():
        if value is not None:
            raise ConfigError.of(
                name, value, rule=f"it does not go with --format {args.format}",
                fix=f"leave it out, or pass --format {'merged' if args.format == 'sardine' else 'sardine'}",
            )  # fmt: skip
    if args.push_to_hub:
        require_name(args.push_to_hub)
    source = Source(
        args.adapter, args.model_name_or_path, args.dtype, args.base_name, args.license, args.push_to_hub
    )
    if args.format == "sardine":
        folder = export_sardine(
            source,
            args.output_dir,
            base_inside=not args.without_base,
            max_shard_size=args.max_shard_size,
            eval_results=args.eval_results,
        )
        print(f"SaRDinE model: {folder}")
    else:
        folder, parity = export_merged(
            source,
            args.output_dir,
            expert=args.expert,
            weights=args.weights,
            bound=args.max_logit_difference,
            max_shard_size=args.max_shard_size,
            gguf=args.gguf,
            llama_cpp=args.llama_cpp,
        )
        print(f"{parity}\nmerged model: {folder}")
    if args.push_to_hub:
        print(push(folder, args.push_to_hub, private=args.private))
    return 0
