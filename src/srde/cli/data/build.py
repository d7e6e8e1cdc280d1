"""`srde data build`: a packed data set from many sources."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Builds, uploads where asked to, and says what there is."""
    from rich.console import Console
    from transformers import HfArgumentParser

    from srde.data.build.build import build
    from srde.data.build.settings import BuildSettings
    from srde.data.build.summary import summary
    from srde.data.build.upload import require_name, upload
    from srde.errors import refuse_unknown

    parser = HfArgumentParser(BuildSettings, prog="srde data build", allow_abbrev=False)
    settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    refuse_unknown(
        "data build", unknown, [flag for action in parser._actions for flag in action.option_strings]
    )
    if settings.upload_repo:
        require_name(settings.upload_repo)
    console = Console(highlight=False, markup=False)
    try:
        built = build(settings, console)
    except KeyboardInterrupt:
        console.print("What is finished is kept: run the same command to go on.")
        raise
    if built.folder is None:
        console.print(
            f"part {settings.shard_index} of {settings.num_shards} is complete; when all are, join them with\n"
            f"  srde data merge --parts ... --work_dir ...",
            soft_wrap=True,
        )
        return 0
    console.print(summary(built.report))
    console.print(f"train on it: srde train --pretokenized_dir {built.folder} ...", soft_wrap=True)
    if settings.upload_repo:
        console.print(upload(settings.work_dir, settings.upload_repo, private=settings.private))
    return 0
