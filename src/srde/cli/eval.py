"""`srde eval`: base and experts on held-out rows, on general text, and on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from srde.data.rows import Row

WIDTH = 100  # where the output is no terminal and nothing says how wide it is
TASKS = "tasks"  # where the results of --tasks go, in --output_dir
FOR_TASKS = ("include_path", "num_fewshot", "limit", "apply_chat_template")
FOR_ROWS = ("max_rows", "general_file", "by")


def main(argv: list[str]) -> int:
    """Prints the tables, and writes JSON, answers, a page and plots if asked."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)

    import os

    import torch
    from rich.console import Console

    from srde.errors import refuse_unknown
    from srde.hub.open import adapter_folder, open_model

    refuse_unknown("eval", unknown, [flag for action in parser._actions for flag in action.option_strings])
    _check(args)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    rows, general = _rows(args, console)
    adapter = adapter_folder(args.adapter)
    if args.tasks and args.output_dir:  # what is refused now is not lost later
        from srde.artifacts import require_replaceable
        from srde.eval.harness import KIND

        require_replaceable(Path(args.output_dir) / TASKS, KIND)
    model, tokenizer = open_model(adapter, args.dtype, args.model_name_or_path)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if rows:
        _evaluate(args, adapter, model, tokenizer, rows, general, console)
    if args.tasks:
        _tasks(args, model, tokenizer, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srde eval", allow_abbrev=False,
        description="Measures accuracy and loss on held-out rows by domain and source, what was lost on general text, and how "
        "tokens were routed; or runs tasks of lm-evaluation-harness.",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--adapter", "--checkpoint", "--srde_weights", required=True,
        help="folder that srde train or srde export wrote, a file in it, or hub id",
    )  # fmt: skip
    add("--eval_file", nargs="+", default=[], help="JSONL with held-out rows; one file or more")
    add("--compare_baseline", action="store_true", help="measure the base on the same rows too")
    add("--output_dir", help="folder for eval_results.json, answers.jsonl, report.html and plots")
    add("--model_name_or_path", help="another place to load the same base from")
    add("--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)")
    add("--batch_size", type=int, default=16, help="most rows per forward (default: 16)")
    add("--max_new_tokens", type=int, default=64, help="most tokens per answer (default: 64)")
    add("--max_rows", type=int, help="so many rows, drawn evenly from the domains, always the same ones")
    add(
        "--general_file",
        help="general text: .jsonl with text, or .txt; none for no text (default: a built-in one)",
    )
    add("--by", help="domain or source: a line in the table for each (default: domain)")
    add(
        "--confirm_run_unsafe_code", action="store_true",
        help="run the programs that the model writes for rows of kind code; without it they are not asked",
    )  # fmt: skip
    add("--tasks", nargs="+", default=[], help="tasks of lm-evaluation-harness")
    add("--include_path", help="folder with more tasks")
    add("--num_fewshot", type=int, help="worked examples in each prompt of a task")
    add("--limit", type=float, help="only so many items of each task, or below 1 this share of them")
    add("--apply_chat_template", action="store_true", help="put the tasks' prompts into the chat template")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses values that cannot be meant.

    Raises:
        ConfigError: There is one.
    """
    from srde.errors import ConfigError
    from srde.eval.table import BY

    if not args.eval_file and not args.tasks:
        raise ConfigError.of(
            "eval_file", args.eval_file, rule="there is nothing to evaluate on",
            fix="name a file with held-out rows, or --tasks of lm-evaluation-harness",
        )  # fmt: skip
    for name, given, needed in (
        *((name, args.tasks, "tasks") for name in FOR_TASKS),
        *((name, args.eval_file, "eval_file") for name in FOR_ROWS),
    ):
        value = getattr(args, name)
        if not given and value is not None and value is not False:
            raise ConfigError.of(
                name, value, rule=f"it is for --{needed}, which is not given", fix="leave it out"
            )
    args.by = args.by or BY[0]
    if args.by not in BY:
        raise ConfigError.of("by", args.by, rule=f"it must be {' or '.join(BY)}", fix="pick one of them")
    for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("max_rows", 1), ("num_fewshot", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError.of(name, value, rule=f"it must be at least {least}", fix=f"use {least} or more")
    if args.limit is not None and args.limit <= 0:
        raise ConfigError.of("limit", args.limit, rule="it must be above 0", fix="leave it out for all items")


def _rows(args: argparse.Namespace, console: Console) -> tuple[list[Row], list[Row]]:
    """The held-out rows and the general text; says which rows it takes."""
    from srde.data.rows import read_rows
    from srde.eval.general import load_general
    from srde.eval.results import by_domain
    from srde.eval.sample import SEED, spread
    from srde.monitor.texts import plural

    if not args.eval_file:
        return [], []
    found = [row for file in args.eval_file for row in read_rows(file)]
    general = load_general(args.general_file)
    rows = found if args.max_rows is None else spread(found, args.max_rows)
    few = (
        f" of {len(found):,}, drawn evenly from the domains with seed {SEED}"
        if len(rows) < len(found)
        else ""
    )
    counts = ", ".join(f"{domain} {len(mine):,}" for domain, mine in by_domain(rows).items())
    console.print(
        f"{plural(len(rows), 'row')}{few}: {counts}; {plural(len(general), 'paragraph')} of general text",
        soft_wrap=True,
    )
    return rows, general


def _evaluate(
    args: argparse.Namespace, adapter: str, model: Any, tokenizer: Any, rows: list[Row], general: list[Row], console: Console
) -> None:  # fmt: skip
    from contextlib import nullcontext

    from srde.eval.evaluate import evaluate, steps
    from srde.eval.general import BUILT_IN, NONE
    from srde.eval.report import environment, file_hash, save_report
    from srde.eval.sample import SEED
    from srde.eval.table import summary
    from srde.hub.open import experts_config
    from srde.progress import bar

    options = {
        "general": general,
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "confirm_run_unsafe_code": args.confirm_run_unsafe_code,
    }
    total = steps(rows, general, confirm_run_unsafe_code=args.confirm_run_unsafe_code)
    found = {}
    for name in ("base", "srde") if args.compare_baseline else ("srde",):
        with (
            model.disable_adapter() if name == "base" else nullcontext(),
            bar(console, name, total) as advance,
        ):
            found[name] = evaluate(model, tokenizer, rows, **options, progress=advance)
    console.print(summary(found["srde"], found.get("base"), by=args.by))
    if not args.output_dir:
        return
    general_file = args.general_file or str(BUILT_IN)
    settings = {
        "adapter": adapter,
        "base": args.model_name_or_path or experts_config(model).base_model_name_or_path,
        "eval_files": [{"path": file, "sha256": file_hash(file)} for file in args.eval_file],
        "rows": len(rows),
        "max_rows": args.max_rows,
        "sample_seed": None if args.max_rows is None else SEED,
        "general_file": {
            "path": args.general_file or "built in",
            "sha256": None if general_file == NONE else file_hash(general_file),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "decoding": "greedy",
        "seed": None,
        "confirm_run_unsafe_code": args.confirm_run_unsafe_code,
        "versions": environment(),
    }
    for file in save_report(args.output_dir, found["srde"], found.get("base"), settings):
        console.print(str(file), soft_wrap=True)


def _tasks(args: argparse.Namespace, model: Any, tokenizer: Any, console: Console) -> None:
    from srde.eval.harness import run_tasks, save_tasks, tasks_table

    result = run_tasks(
        model,
        tokenizer,
        [name for part in args.tasks for name in part.split(",") if name],
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        apply_chat_template=args.apply_chat_template,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        compare_baseline=args.compare_baseline,
    )
    console.print(tasks_table(result))
    if args.output_dir:
        for file in save_tasks(result, Path(args.output_dir) / TASKS):
            console.print(str(file), soft_wrap=True)
