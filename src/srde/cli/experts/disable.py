"""`srde experts disable`: experts that are never chosen and never trained."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Writes the adapter with experts switched off, or on again."""
    from srde.cli.experts import flags

    parser = flags("disable", "Switches experts off: they are never chosen and never trained.", writes=True)
    parser.add_argument("experts", nargs="+", metavar="E", help="names or numbers")
    parser.add_argument("--undo", action="store_true", help="switches them on again")
    args = parser.parse_args(argv)

    from srde.cli.experts import save, titles
    from srde.tuner.experts import read_adapter, switch_experts

    adapter = read_adapter(args.adapter)
    experts = {e for name in args.experts for e in adapter.config.experts_named(name)}
    new = switch_experts(adapter, experts, on=args.undo)
    disabled = titles(new, new.config.disabled_experts or [])
    return save(new, args.output_dir, [f"disabled: {disabled or 'none'}"])
