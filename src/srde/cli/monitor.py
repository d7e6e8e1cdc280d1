"""`srde monitor`: a run in the terminal, or as one HTML page."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Shows a run until it ends, or prints one frame, or writes a page."""
    parser = argparse.ArgumentParser(
        prog="srde monitor", allow_abbrev=False,
        description="Shows a run of srde train as it goes on, on this machine or wherever its folder can be read. Ctrl-C leaves "
        "the run alone. Exit status 1 if the run failed or died while it was watched.",
    )  # fmt: skip
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default: 2)"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write one page with all plots and tables and leave; with --once, print a frame too"
    )  # fmt: skip
    args, unknown = parser.parse_known_args(argv)

    from rich.console import Console

    from srde.errors import ConfigError, refuse_unknown
    from srde.monitor.run import RunReader
    from srde.monitor.view import show, watch

    refuse_unknown("monitor", unknown, [flag for action in parser._actions for flag in action.option_strings])
    if not 0.1 <= args.interval <= 3600:
        raise ConfigError.of(
            "interval", args.interval, rule="it must be from 0.1 to 3600 seconds", fix="leave it out for 2"
        )
    console = Console(highlight=False, markup=False, emoji=False)
    reader = RunReader(args.output_dir)
    if not (args.once or args.html):
        return watch(console, reader, args.interval)
    run = reader.read()
    if args.once:
        show(console, run)
    if args.html:
        from srde.monitor.report import write_report

        console.print(f"Page: {write_report(run, args.html)}", soft_wrap=True)
    return 0
