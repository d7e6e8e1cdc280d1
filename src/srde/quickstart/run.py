"""The quickstart, step by step; everything it does is a call that a user could make."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from srde.data.domains import DOMAINS
from srde.data.quickstart import build_quickstart
from srde.data.rows import Row, read_rows
from srde.data.tokenizers import load_tokenizer
from srde.eval.evaluate import Evaluation, evaluate, steps
from srde.eval.report import environment, save_report, used_experts
from srde.eval.table import summary
from srde.infer.generate import generate
from srde.progress import bar
from srde.quickstart.default_model import default_model, fast_dtype
from srde.quickstart.progress import BarCallback
from srde.train.arguments import DataArguments, ExpertArguments, ModelArguments, RunArguments
from srde.train.run import run as train
from srde.train.run import trained_parameters
from srde.tuner.loading import load_adapter, load_base


@dataclass(frozen=True)
class Settings:
    """What can be set from the command line.

    Attributes:
        output_dir: Where data, adapter, report and plots go.
        model_name_or_path: The base; None is the embedded default.
        max_steps: Training steps.
        train_per_domain: Training items of each domain.
        test_per_domain: Held-out items of each domain.
        max_length: Tokens per packed row, which is a step's batch.
        learning_rate: Its peak.
        dtype: Of the base; "auto" takes the faster of bfloat16 and float32 on this machine.
        seed: Of data and training.
    """

    output_dir: Path
    model_name_or_path: str | None = None
    max_steps: int = 120
    train_per_domain: int = 300
    test_per_domain: int = 32
    max_length: int = 1024
    learning_rate: float = 3e-3
    dtype: str = "auto"
    seed: int = 0


ANSWER_TOKENS = 32


def quickstart(settings: Settings, console: Console) -> tuple[Evaluation, Evaluation]:
    """Runs the whole job and prints as it goes.

    Returns:
        The evaluation of the reloaded experts, and that of the base on the same items.
    """
    start = time.monotonic()
    out = settings.output_dir
    dtype = fast_dtype() if settings.dtype == "auto" else settings.dtype

    console.print("[bold]1/5[/] Model and data")
    name = settings.model_name_or_path or str(default_model())
    counts = {"train_per_domain": settings.train_per_domain, "test_per_domain": settings.test_per_domain}
    files = build_quickstart(out / "data", **counts, seed=settings.seed)
    test = read_rows(files.test)
    console.print(
        f"  base {name} in {dtype}; {len(read_rows(files.train))} training and {len(test)} held-out items, six domains"
    )

    console.print("[bold]2/5[/] The base on the held-out items")
    base = _measure(load_base(name, dtype), load_tokenizer(name), test, console)

    console.print("[bold]3/5[/] Training experts; the base stays frozen")
    with bar(console, "training", settings.max_steps) as advance:
        outcome = train(
            ModelArguments(name, dtype=dtype),
            DataArguments(train_file=str(files.train), max_length=settings.max_length),
            ExpertArguments(
                num_experts=len(DOMAINS), initial_sparsity=0.02, target_sparsity=0.01, mask_init="magnitude"
            ),
            RunArguments(
                output_dir=str(out),
                max_steps=settings.max_steps,
                learning_rate=settings.learning_rate,
                logging_steps=5,
                seed=settings.seed,
                phase_warmup_steps=0,  # the base has been measured already
                supervised_experts=True,
                expert_pretrain_steps=settings.max_steps // 2,
                disable_tqdm=True,
            ),
            callbacks=[BarCallback(advance)],
        )
    trained = trained_parameters(outcome.model)
    whole = sum(p.numel() for p in outcome.model.parameters())
    console.print(
        f"  {trained:,} trained parameters ({100 * trained / (whole - trained):.1f} % of the base), "
        f"{outcome.metrics['tokens']:,} tokens of data, {outcome.metrics['seconds']:.0f} s"
    )

    console.print("[bold]4/5[/] The saved adapter, loaded again, on the same items")
    model, tokenizer = load_adapter(str(out), dtype)
    num_routed = model.peft_config["default"].num_experts
    experts = _measure(model, tokenizer, test, console)
    console.print(summary(experts, base))
    how = {"adapter": str(out), "base": name, "dtype": dtype, "max_new_tokens": ANSWER_TOKENS}
    for file in (
        out / "adapter_model.safetensors",
        *save_report(out, experts, base, how | {"versions": environment()}),
        files.train,
        files.test,
    ):
        console.print(f"  {file}")

    console.print("[bold]5/5[/] One question per domain")
    console.print(_answers(model, tokenizer, test, experts, num_routed))
    console.print(f"done in {(time.monotonic() - start) / 60:.1f} minutes. Ask it yourself:")
    console.print(
        f'  srde generate --adapter {out} --show_routing --prompt "{test[0].prompt[-1]["content"]}"',
        soft_wrap=True,
    )
    return experts, base


def _measure(model: object, tokenizer: object, rows: list[Row], console: Console) -> Evaluation:
    with bar(console, "measuring", steps(rows)) as advance:
        return evaluate(model, tokenizer, rows, max_new_tokens=ANSWER_TOKENS, progress=advance)  # type: ignore[arg-type]


def _answers(
    model: object, tokenizer: object, test: list[Row], experts: Evaluation, num_routed: int
) -> Table:
    """Asks the first held-out item of each domain."""
    first = [next(row for row in test if row.domain == domain) for domain in DOMAINS]
    got = generate(model, tokenizer, [row.prompt for row in first], max_new_tokens=ANSWER_TOKENS)  # type: ignore[arg-type]
    table = Table(show_lines=True)
    for column in ("domain", "question", "answer", "right answer", "the expert that spoke"):
        table.add_column(column, overflow="fold")
    for row, answer in zip(first, got, strict=True):
        assert answer.load_E is not None
        share_E = answer.load_E[:num_routed] / answer.load_E[:num_routed].sum()
        best = int(share_E.argmax())
        load = experts.domains[str(row.domain)].load_LE
        assert load is not None
        usual = used_experts(load, num_routed)[0][0]
        note = "this domain's most used" if usual == best else f"this domain mostly uses {usual}"
        spoke = f"expert {best} ({100 * float(share_E[best]):.0f} %), {note}"
        table.add_row(row.domain, row.prompt[-1]["content"], answer.text, str(row.answer), spoke)
    return table
