"""Writes models for others: `srde export`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde.artifacts import atomic_folder, require_replaceable
from srde.errors import ConfigError
from srde.hub.card import is_hub_id, merged_card, sardine_card, shown_name
from srde.hub.convert import from_adapter
from srde.hub.gguf import TYPES, find_converter, to_gguf
from srde.hub.merged import Parity, merge
from srde.hub.modeling_sardine import SHARD_SIZE
from srde.tuner.loading import load_adapter
from srde.tuner.store import EXPORTED

SARDINE, MERGED = EXPORTED
RESULTS_FILE = "eval_results.json"
SLACK = 64 * 2**20
"""Bytes beside the tensors: tokenizer, code, card."""


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        adapter: A folder that `srde train` or `save_pretrained` wrote, or a hub id.
        base: Another place to load the same base from.
        dtype: Type of the base's weights; "auto" keeps the checkpoint's.
        base_name: The base's name to write down; the adapter's own if left out.
        license_id: The licence's name on the hub, for the card.
        title: What the model will be called on the hub; left out for one that stays on this machine.
    """

    adapter: str
    base: str | None = None
    dtype: str = "auto"
    base_name: str | None = None
    license_id: str | None = None
    title: str | None = None


def export_sardine(
    source: Source,
    output_dir: str | Path,
    *,
    base_inside: bool = True,
    max_shard_size: str = SHARD_SIZE,
    eval_results: str | Path | None = None,
) -> Path:
    """Writes a SaRDinE model: configuration, code, tensors, tokenizer, card, manifest. It appears whole or not at all.

    Args:
        source: The adapter and its base.
        output_dir: The folder; one that srde exported before is replaced.
        base_inside: Whether the base's weights are in it.
        max_shard_size: Largest file of tensors.
        eval_results: `eval_results.json` of `srde eval`, for the card; the one beside the adapter if left out and there is one.

    Returns:
        The folder.

    Raises:
        ArtifactError: The adapter cannot be read, or the disk is full.
        UsageError: The folder holds something else.
        ConfigError: The results cannot be read; or the base is to stay out of a model for the hub, and is a folder here.
    """
    output_dir = Path(output_dir)
    require_replaceable(output_dir, SARDINE)  # before anything is loaded
    results = _read_results(source, eval_results)
    model, tokenizer = load_adapter(source.adapter, source.dtype, source.base)
    name = source.base_name or model.peft_config["default"].base_model_name_or_path or source.base
    if not base_inside and source.title is not None and not is_hub_id(name):
        raise ConfigError.of(
            "base_name", name, rule="others cannot load a base from a place on this machine, and need not know it",
            fix="pass --base_name OWNER/NAME, or export without --without_base",
        )  # fmt: skip
    if base_inside:
        name = name if is_hub_id(name) else shown_name(name)
    made = from_adapter(model, base_inside=base_inside, base_name=name)
    tensors = made.state_dict() if base_inside else made.expert_tensors()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_folder(output_dir, {"kind": SARDINE}, expected_bytes=needed + SLACK) as folder:
        made.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        card = sardine_card(
            made, source.title or output_dir.resolve().name, results=results, license_id=source.license_id
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output_dir


def export_merged(
    source: Source,
    output_dir: str | Path,
    *,
    expert: str | int | None = None,
    weights: str | None = None,
    bound: float | None = None,
    max_shard_size: str = SHARD_SIZE,
    gguf: str | None = None,
    llama_cpp: str | Path | None = None,
) -> tuple[Path, Parity]:
    """Writes a plain model with one expert, or a fixed mixture, folded in.

    Args:
        source: The adapter and its base.
        output_dir: The folder; one that srde exported before is replaced.
        expert: An expert's name or number; the experts of a name that several share are mixed in equal parts.
        weights: A mixture instead, as in ``math=0.7,code=0.3``.
        bound: Largest difference of a logit to let through; see `srde.hub.merged.BOUNDS`.
        max_shard_size: Largest file of tensors.
        gguf: Also writes `model-<type>.gguf` with numbers of this type; see `srde.hub.gguf`.
        llama_cpp: Where llama.cpp's converter is, for that.

    Returns:
        The folder, and how near the model is to the adapter with its routing fixed.

    Raises:
        ArtifactError: The difference is over the bound; nothing is written then.
        ConfigError: Neither or both of `expert` and `weights` are given, or they name no expert.
    """
    if (expert is None) == (weights is None):
        raise ConfigError.of(
            "expert and weights", f"{expert}, {weights}", rule="a merged model folds in one expert or one mixture",
            fix="pass --expert math, or --weights math=0.7,code=0.3",
        )  # fmt: skip
    if gguf is not None and gguf not in TYPES:
        raise ConfigError.of(
            "gguf", gguf, rule=f"it must be one of {', '.join(TYPES)}", fix="pick one of them"
        )
    converter = None if gguf is None else find_converter(llama_cpp or ".")
    output_dir = Path(output_dir)
    require_replaceable(output_dir, MERGED)
    model, tokenizer = load_adapter(source.adapter, source.dtype, source.base)
    config = model.peft_config["default"]
    if weights is not None:
        gates: list[float] | None = config.mixture(weights)
        number, what = None, f"the experts {weights}"
    else:
        experts = config.experts_named(expert)
        number = experts[0] if len(experts) == 1 else None
        gates = (
            None
            if number is not None
            else [float(e in experts) / len(experts) for e in range(config.num_experts)]
        )
        what = f"the expert {expert}"
    plain, parity = merge(model, tokenizer, expert=number, weights=gates, bound=bound)
    needed = sum(p.numel() * p.element_size() for p in plain.parameters())
    with atomic_folder(output_dir, {"kind": MERGED}, expected_bytes=needed + SLACK) as folder:
        plain.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        if converter is not None and gguf is not None:
            to_gguf(folder, folder / f"model-{gguf}.gguf", converter, gguf)
        name = source.base_name or config.base_model_name_or_path or source.base
        card = merged_card(
            source.title or output_dir.resolve().name, name, what, str(parity), source.license_id
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return output_dir, parity


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Uploads an exported model in one commit.

    Returns:
        Where it is.

    Raises:
        UsageError: The hub refuses it or does not answer; the export stays on disk.
    """
    from srde.data.build.upload import push_folder

    return push_folder(folder, repo, repo_type="model", private=private, message="Add the model")


def _read_results(source: Source, given: str | Path | None) -> dict[str, Any] | None:
    file = Path(given) if given is not None else Path(source.adapter) / RESULTS_FILE
    if given is None and not file.is_file():
        return None
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(results.get("srde", {}).get("domains"), dict):
            raise ValueError("it has no srde.domains")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError.of(
            "eval_results", str(file), rule=f"it must be an eval_results.json of srde eval ({error})",
            fix="run srde eval --output_dir, and name the file that it wrote",
        ) from error  # fmt: skip
    return results
