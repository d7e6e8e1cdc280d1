"""`srde experts replace`: puts an expert of another adapter of the same base in an expert's place."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Writes the adapter with the other expert in it."""
    from srde.cli.experts import flags

    parser = flags(
        "replace", "Puts an expert of another adapter of the same base in an expert's place.", writes=True, in_place=False
    )  # fmt: skip
    parser.add_argument("expert", metavar="E", help="the expert that goes, by name or number; its name stays")
    parser.add_argument(
        "--with", dest="other", required=True, metavar="ADAPTER:E", help="the other adapter's folder, and its expert"
    )  # fmt: skip
    parser.add_argument("--keep_router", action="store_true", help="leave the routers' rows as they are")
    args = parser.parse_args(argv)

    from srde.cli.experts import save, titles
    from srde.errors import ConfigError
    from srde.tuner.experts import one_expert, read_adapter, replace_expert

    folder, colon, name = args.other.rpartition(":")
    if not colon:
        raise ConfigError.of(
            "with",
            args.other,
            rule="it is a folder, ':' and an expert",
            fix="write for example runs/other:medicine",
        )
    adapter, other = read_adapter(args.adapter), read_adapter(folder)
    expert, of = one_expert(adapter.config, args.expert), one_expert(other.config, name)
    new = replace_expert(adapter, expert, other, of, keep_router=args.keep_router)
    said = [f"expert {titles(adapter, [expert])} is now expert {titles(other, [of])} of {folder}"]
    if args.keep_router:
        said.append("its row of the routers is the old one, which chose it for what the old expert could do")
    else:
        said.append(
            "its row of the routers came with it, and the logits of two adapters' routers are not on one scale"
        )
    said.append(f"refit the routers: srde train --init_adapter {args.output_dir} --train_router_only ...")
    if expert in (new.config.disabled_experts or ()):
        said.append(f"it is disabled: srde experts disable {expert} --undo --adapter {args.output_dir}")
    return save(new, args.output_dir, said)
