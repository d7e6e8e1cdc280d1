"""`srde experts name`: gives experts names."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Writes the adapter with the names."""
    from srde.cli.experts import flags

    parser = flags(
        "name", "Gives experts names; those of an adapter without names are called expert N.", writes=True
    )
    parser.add_argument(
        "names", nargs="+", metavar="E=NAME", help="an expert, by number or present name, and its name"
    )
    args = parser.parse_args(argv)

    from srde.cli.experts import save, titles
    from srde.errors import ConfigError
    from srde.tuner.experts import name_experts, one_expert, read_adapter

    adapter = read_adapter(args.adapter)
    names = {}
    for entry in args.names:
        expert, equals, name = entry.partition("=")
        if not equals:
            raise ConfigError.of(
                "name",
                entry,
                rule="an entry is an expert, '=' and its name",
                fix="write for example 6=medicine",
            )
        names[one_expert(adapter.config, expert)] = name
    new = name_experts(adapter, names)
    return save(new, args.output_dir, [titles(new, range(new.config.num_experts))])
