"""`srde experts add`: one more expert, switched off until it is trained."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Writes the adapter with the new expert."""
    from srde.cli.experts import flags

    parser = flags(
        "add", "Adds an expert that is switched off: the adapter says what it said before, until srde train --init_adapter "
        "ADAPTER --train_experts NAME trains it.", writes=True,
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="the new expert's name")
    parser.add_argument(
        "--from", dest="source", default="zero", metavar="E",
        help="expert whose values, masks and router row it gets; zero (default) changes nothing yet",
    )  # fmt: skip
    parser.add_argument(
        "--mask_init", choices=("magnitude", "random"), default="magnitude",
        help="which places, free ones first, a zero expert may rewrite: where the base's weights are largest, or any",
    )  # fmt: skip
    parser.add_argument("--mask_seed", type=int, default=0, help="seed of --mask_init random")
    parser.add_argument("--model_name_or_path", help="another place to load the same base from")
    parser.add_argument(
        "--names", help="names of the experts that there are, with commas between, where they have none; domains: the six domains"
    )  # fmt: skip
    args = parser.parse_args(argv)

    from srde.cli.experts import save
    from srde.data.domains import DOMAINS
    from srde.tuner.experts import add_expert, choose_masks, grown_config, one_expert, read_adapter

    adapter = read_adapter(args.adapter)
    count = adapter.config.num_experts
    names = args.names.split(",") if args.names else None
    if args.names == "domains":
        names = [*DOMAINS, *(f"expert {e}" for e in range(len(DOMAINS), count))][:count]
    if args.source == "zero":
        grown_config(adapter.config, args.name, names)  # what is refused, before the base is loaded
        masks = choose_masks(adapter, args.mask_init, base=args.model_name_or_path, seed=args.mask_seed)
        new = add_expert(adapter, args.name, masks=masks, names=names)
        said = f"expert {count} ({args.name}) is new and zero"
    else:
        source = one_expert(adapter.config, args.source)
        new = add_expert(adapter, args.name, copy_of=source, names=names)
        said = f"expert {count} ({args.name}) is a copy of expert {source}"
    place = args.output_dir or args.adapter
    trained = f"train it: srde train --init_adapter {place} --train_experts {count} ..."
    return save(new, args.output_dir, [f"{said}; it is disabled until it is trained", trained])
