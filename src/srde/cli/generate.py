"""`srde generate`: answers prompts with an adapter."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Prints one answer per prompt, and which expert spoke if asked."""
    parser = argparse.ArgumentParser(prog="srde generate", allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="folder that srde train wrote, or hub id")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    parser.add_argument("--model_name_or_path", help="another place to load the same base from")
    parser.add_argument(
        "--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--expert", type=int, help="force one expert for every token")
    parser.add_argument("--base", action="store_true", help="switch the adapter off")
    parser.add_argument("--show_routing", action="store_true", help="say which experts produced the answer")
    args = parser.parse_args(argv)

    from contextlib import ExitStack

    from srde.errors import ConfigError
    from srde.infer.generate import generate
    from srde.tuner.loading import load_adapter

    if args.max_new_tokens < 1:
        raise ConfigError.of(
            "max_new_tokens", args.max_new_tokens, rule="an answer needs at least 1 token", fix="use 256"
        )
    if args.temperature < 0:
        raise ConfigError.of(
            "temperature", args.temperature, rule="it must be at least 0", fix="use 0 for greedy"
        )
    model, tokenizer = load_adapter(args.adapter, args.dtype, args.model_name_or_path)
    options = {"do_sample": True, "temperature": args.temperature} if args.temperature else {}
    with ExitStack() as stack:
        if args.base:
            stack.enter_context(model.disable_adapter())
        elif args.expert is not None:
            stack.enter_context(model.srde.force_experts(args.expert))
        answers = generate(model, tokenizer, args.prompt, max_new_tokens=args.max_new_tokens, **options)
    for answer in answers:
        print(answer.text)
        if args.show_routing and answer.load_E is not None:
            best = answer.load_E.argsort(descending=True)[:3].tolist()
            print("  [" + ", ".join(f"expert {e}: {100 * float(answer.load_E[e]):.0f} %" for e in best) + "]")
    return 0
