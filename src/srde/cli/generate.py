"""`srde generate`: answers prompts with an adapter, and shows which experts did."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from srde.infer.generate import Answer
    from srde.infer.prompts import Prompt
    from srde.infer.settings import Settings
    from srde.infer.stream import Piece

BATCH_SIZE = 8


def main(argv: list[str]) -> int:
    """Prints one answer per prompt, and which expert spoke if asked."""
    parser = argparse.ArgumentParser(
        prog="srde generate", allow_abbrev=False, description="Answers prompts with an adapter on its base."
    )
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", nargs="+", help="one or more prompts")
    prompts.add_argument(
        "--prompts_file", help="JSONL with prompt or messages, or a text with a prompt a line"
    )
    prompts.add_argument("--system", help="what the system says first")
    prompts.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    prompts.add_argument("--interactive", action="store_true", help="a conversation, as srde chat")
    add_sampling_flags(parser)
    parser.add_argument(
        "--num_beams", type=int, default=1, help="beams of beam search (default: 1, none); not streamed"
    )
    parser.add_argument("--batch_size", type=int, help="prompts answered at once (default: 8)")
    add_route_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="print answers as they come, one after another")
    output.add_argument(
        "--analysis", action="store_true", help="print which experts, which layers and how sure, per prompt"
    )
    output.add_argument(
        "--output_dir", help="folder for each prompt's analysis as analysis-001.png and analysis-001.json"
    )
    output.add_argument("--output_file", help="JSONL with prompts, answers and experts")
    args, unknown = parser.parse_known_args(argv)

    from srde.errors import refuse_unknown

    refuse_unknown("generate", unknown, [f for action in parser._actions for f in action.option_strings])
    _check(args)
    if args.interactive:
        from srde.cli.chat import converse

        return converse(args)
    return _answer(args)


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that contradict each other.

    Raises:
        ConfigError: Two of them do, or there is no prompt.
    """
    from srde.errors import ConfigError

    pairs = [
        ("interactive", name, "a conversation asks and shows on its own")
        for name in (
            "prompt", "prompts_file", "raw", "stream", "analysis", "output_dir", "output_file", "batch_size",
        )
    ]  # fmt: skip
    pairs += [
        ("prompt", "prompts_file", "prompts come from one place"),
        ("raw", "system", "without the template there is no place for a system's text"),
        ("stream", "batch_size", "answers are streamed one after another"),
    ]
    for one, other, why in pairs:
        if getattr(args, one) and getattr(args, other):
            raise ConfigError.of(
                other,
                getattr(args, other),
                rule=f"it cannot be used with --{one}: {why}",
                fix="leave one out",
            )
    if args.num_beams > 1 and (args.interactive or args.stream or args.show_routing):
        raise ConfigError.of(
            "num_beams", args.num_beams, rule="beam search knows its text only at the end, so nothing can be streamed",
            fix="leave it out, or do without --interactive, --stream and --show_routing",
        )  # fmt: skip
    if (args.analysis or args.output_dir) and route_of(args) == "off":
        raise ConfigError.of(
            "analysis",
            "off",
            rule="the base has no experts to look at",
            fix="leave out --base and --route off",
        )
    if not (args.interactive or args.prompt or args.prompts_file):
        raise ConfigError.of(
            "prompt",
            None,
            rule="there is nothing to answer",
            fix="use --prompt, --prompts_file or --interactive",
        )


def _answer(args: argparse.Namespace) -> int:
    from rich.console import Console

    from srde.infer.prompt_files import read_prompts
    from srde.infer.route import expert_labels, routed
    from srde.infer.view import Painter, summary

    settings = settings_of(args, args.num_beams)
    prompts = read_prompts(args.prompts_file) if args.prompts_file else list(args.prompt)
    console = Console(highlight=False, markup=False, emoji=False)
    model, tokenizer = load(args)
    labels = expert_labels(model)
    tell_stops(model, tokenizer, raw=args.raw)
    painter = Painter(console, routing=args.show_routing)
    answers: list[Answer] = []
    seen: set[int | None] = set()
    with routed(model, route_of(args), args.expert):
        settings.start()
        for index, (pieces, answer_of) in enumerate(_ask(args, model, tokenizer, prompts, settings)):
            if len(prompts) > 1:
                console.print(
                    f"# {index + 1}/{len(prompts)} {_line(prompts[index])}", style="bold", soft_wrap=True
                )
            for piece in pieces:
                painter.write(piece)
                seen |= {piece.expert} if piece.gate_E is not None else set()
            painter.end()
            answers.append(answer_of())
            if args.show_routing and (load_E := answers[-1].load_E) is not None:
                console.print(f"  [{summary(load_E, answers[-1].num_routed, labels)}]", soft_wrap=True)
            if args.analysis or args.output_dir:
                _analyse(args, console, model, tokenizer, index, prompts[index], answers[-1])
    if args.show_routing:
        painter.legend(labels, seen)
    if args.output_file:
        _write(args.output_file, prompts, answers, labels)
        console.print(f"answers: {args.output_file}", soft_wrap=True)
    return 0


def _ask(
    args: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[Prompt], settings: Settings
) -> Iterator[tuple[Iterable[Piece], Callable[[], Answer]]]:
    """The pieces of each answer, in the prompts' order, and what gives the answer once they have been read."""
    from srde.infer.generate import generate
    from srde.infer.stream import Piece, stream

    options: dict[str, Any] = {**settings.options(), "system": args.system, "raw": args.raw}
    batch_size = args.batch_size or BATCH_SIZE
    if args.stream:
        for prompt in prompts:
            one = stream(model, tokenizer, [prompt], **options)
            yield one, partial(one.answers.__getitem__, 0)
    elif args.show_routing:
        several = stream(model, tokenizer, prompts, batch_size=batch_size, **options)
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for piece in several:
            pieces[piece.index].append(piece)
        for index, own in enumerate(pieces):
            yield own, partial(several.answers.__getitem__, index)
    else:
        for answer in generate(model, tokenizer, prompts, batch_size=batch_size, **options):
            yield [Piece(0, answer.text, None)], lambda answer=answer: answer


def _analyse(
    args: argparse.Namespace,
    console: Console,
    model: Any,
    tokenizer: Any,
    index: int,
    prompt: Prompt,
    answer: Answer,
) -> None:
    """Prints the tables, and writes picture and figures where asked to."""
    from pathlib import Path

    from srde.data.view.reading import write_file
    from srde.infer.analysis import analyse
    from srde.infer.plot import save_plot
    from srde.infer.view import expert_table, layer_table

    analysis = analyse(model, tokenizer, prompt, answer.ids, system=args.system, raw=args.raw)
    if args.analysis:
        console.print(layer_table(analysis))
        console.print(expert_table(analysis))
    if args.output_dir:
        stem = Path(args.output_dir) / f"analysis-{index + 1:03d}"
        figures = {"prompt": prompt, "answer_text": answer.text, **analysis.to_dict()}
        picture = save_plot(analysis, stem.with_suffix(".png"), title=_line(prompt))
        write_file(stem.with_suffix(".json"), json.dumps(figures, ensure_ascii=False) + "\n")
        console.print(f"analysis: {picture}, {stem.name}.json", soft_wrap=True)


def _write(path: str, prompts: list[Prompt], answers: list[Answer], labels: list[str]) -> None:
    """One row of JSONL per prompt."""
    from srde.data.view.reading import write_file

    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        load_E = None if answer.load_E is None else answer.load_E[: answer.num_routed].tolist()
        rows.append(
            {
                "prompt" if isinstance(prompt, str) else "messages": prompt,
                "answer": answer.text,
                "new_tokens": answer.new_tokens,
                "expert": answer.expert,
                "load": load_E and {label: round(g, 4) for label, g in zip(labels, load_E, strict=True)},
            }
        )
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _line(prompt: Prompt) -> str:
    """A prompt on one line."""
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    return text if len(text) <= 72 else f"{text[:69]}..."


# ---- what `srde chat` shares -------------------------------------------------------------------------------------------


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter", "--srde_weights", required=True,
        help="folder that srde train or srde export wrote, a file in it, or hub id",
    )  # fmt: skip
    group.add_argument("--model_name_or_path", help="another place to load the same base from")
    group.add_argument(
        "--dtype", default="auto", help="type of the base's weights (default: the checkpoint's)"
    )
    group.add_argument(
        "--quantization",
        default="none",
        help="nf4 or int8 quantises the base's weights while loading (default: none)",
    )
    group.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `srde.infer.settings.Settings`."""
    group = parser.add_argument_group("generating (what is left out is the checkpoint's own)")
    group.add_argument("--max_new_tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top_p", type=float, help="draw from the smallest set with this much probability")
    group.add_argument("--top_k", type=int, help="draw from this many of the likeliest tokens")
    group.add_argument("--min_p", type=float, help="leave out what is below this share of the likeliest")
    group.add_argument("--seed", type=int, help="of what is drawn (default: another each time)")
    group.add_argument(
        "--repetition_penalty", type=float, help="above 1: fewer tokens that were there already"
    )
    group.add_argument("--no_repeat_ngram_size", type=int, help="no run of so many tokens twice")
    group.add_argument("--stop_strings", nargs="+", default=[], help="texts that end an answer")
    group.add_argument("--no_cache", action="store_true", help="compute all positions anew for every token")


def add_route_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say who speaks."""
    group = parser.add_argument_group("routing")
    group.add_argument(
        "--route",
        help="auto, off (the base), an expert's name or number, several (math,code), or a mixture (math=0.7,code=0.3)",
    )
    group.add_argument("--expert", help="force one expert, by number or name, for every token")
    group.add_argument("--base", action="store_true", help="switch the adapter off, as --route off")
    group.add_argument("--show_routing", action="store_true", help="show each token's expert")


def settings_of(args: argparse.Namespace, num_beams: int = 1) -> Settings:
    """The settings that the flags mean.

    Raises:
        ConfigError: One of them breaks its rule.
    """
    from srde.infer.settings import Settings

    return Settings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        num_beams=num_beams,
        stop_strings=tuple(args.stop_strings),
        seed=args.seed,
        use_cache=not args.no_cache,
    )


def route_of(args: argparse.Namespace) -> str | None:
    """The route that the flags mean.

    Raises:
        ConfigError: Two of them contradict each other.
    """
    from srde.errors import ConfigError

    if args.base and (args.route is not None or args.expert is not None):
        raise ConfigError.of(
            "base", True, rule="it cannot be used with --route or --expert", fix="leave one out"
        )
    return "off" if args.base else args.route


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Loads model and tokenizer, and puts the model where it is to run.

    Raises:
        ArtifactError: There is nothing of the kind.
        ConfigError: The base cannot be loaded, or there is no such device.
    """
    import torch

    from srde.errors import ConfigError
    from srde.hub.open import open_model

    if args.device and args.quantization != "none":
        raise ConfigError.of(
            "device", args.device, rule="where quantised weights go is decided while they are quantised",
            fix="leave it out",
        )  # fmt: skip
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or (found.type if found else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError.of(
            "device", device, rule=f"this torch cannot use it ({str(error).splitlines()[0]})", fix="use cpu"
        ) from error
    model, tokenizer = open_model(
        args.adapter, args.dtype, args.model_name_or_path, quantization=args.quantization
    )
    return model if args.quantization != "none" else model.to(device), tokenizer


def tell_stops(model: Any, tokenizer: Any, *, raw: bool = False) -> None:
    """Looks for the template's end of turn, and says so where the checkpoint does not know it."""
    from srde.infer.stops import find_stops

    if note := find_stops(model, tokenizer, raw=raw).note:
        print(note, file=sys.stderr)
