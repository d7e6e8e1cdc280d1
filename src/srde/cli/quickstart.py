"""`srde quickstart`: the main job on an embedded default."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Runs it and prints where everything is."""
    parser = argparse.ArgumentParser(prog="srde quickstart", allow_abbrev=False)
    parser.add_argument("--output_dir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument(
        "--model_name_or_path", help="any causal LM; default: SmolLM2-135M-Instruct, without a hub"
    )
    parser.add_argument("--max_steps", type=int, help="training steps")
    parser.add_argument("--train_per_domain", type=int, help="training items per domain")
    parser.add_argument("--test_per_domain", type=int, help="held-out items per domain")
    parser.add_argument("--max_length", type=int, help="tokens per packed row, one row per step")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument(
        "--dtype", help="type of the base's weights; default: the faster of bfloat16 and float32 here"
    )
    parser.add_argument("--seed", type=int)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}

    from pathlib import Path

    from rich.console import Console
    from transformers.utils import logging

    from srde.quickstart.run import Settings, quickstart

    logging.disable_progress_bar()
    quickstart(Settings(**{**given, "output_dir": Path(given["output_dir"])}), Console())
    return 0
