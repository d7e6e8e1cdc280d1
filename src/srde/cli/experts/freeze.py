"""`srde experts freeze`: experts that are used and never trained."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Writes the adapter with experts frozen, or no longer."""
    from srde.cli.experts import flags

    parser = flags("freeze", "Freezes experts: they are used and never trained.", writes=True)
    parser.add_argument("experts", nargs="+", metavar="E", help="names or numbers")
    parser.add_argument("--undo", action="store_true", help="lets them be trained again")
    args = parser.parse_args(argv)

    from srde.cli.experts import save, titles
    from srde.tuner.experts import freeze_experts, read_adapter

    adapter = read_adapter(args.adapter)
    experts = {e for name in args.experts for e in adapter.config.experts_named(name)}
    new = freeze_experts(adapter, experts, undo=args.undo)
    frozen = titles(new, new.config.frozen_experts or [])
    return save(new, args.output_dir, [f"frozen: {frozen or 'none'}"])
