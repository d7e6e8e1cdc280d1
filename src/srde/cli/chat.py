"""`srde chat`: a conversation with an adapter, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import sys

from srde.cli.generate import (
    add_model_flags,
    add_route_flags,
    add_sampling_flags,
    load,
    route_of,
    settings_of,
    tell_stops,
)


def main(argv: list[str]) -> int:
    """Talks until /exit, the end of the input, or Ctrl-C twice."""
    parser = argparse.ArgumentParser(
        prog="srde chat",
        allow_abbrev=False,
        description="A conversation with an adapter on its base. Lines that begin with / are commands; /help lists them.",
    )
    add_model_flags(parser)
    parser.add_argument("--system", help="what the system says first")
    add_sampling_flags(parser)
    add_route_flags(parser)
    args, unknown = parser.parse_known_args(argv)

    from srde.errors import refuse_unknown

    refuse_unknown("chat", unknown, [f for action in parser._actions for f in action.option_strings])
    return converse(args)


def converse(args: argparse.Namespace) -> int:
    """Loads what the flags name, and talks; returns the exit status."""
    from importlib.util import find_spec

    from rich.console import Console

    from srde.infer.chat import Chat
    from srde.infer.terminal import Terminal, keyboard, pipe_reader

    settings, route = settings_of(args), route_of(args)
    interactive = sys.stdin.isatty()
    if interactive and find_spec("readline"):
        import readline  # noqa: F401  # gives `input` its history and editing
    model, tokenizer = load(args)
    tell_stops(model, tokenizer)
    chat = Chat(model, tokenizer, settings, args.system)
    chat.set_route(route, args.expert)
    settings.start()
    console = Console(highlight=False, markup=False, emoji=False)
    terminal = Terminal(
        chat,
        console,
        keyboard if interactive else pipe_reader(),
        interactive=interactive,
        routing=args.show_routing,
    )
    if interactive:
        experts = len(terminal.labels)
        terminal.notice(f"{args.adapter}: {experts} experts. /help lists the commands, Ctrl-D leaves.")
    return terminal.run()
