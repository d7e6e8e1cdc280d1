"""The card of an exported model: what it is, what its experts are, what was measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from srde.hub.configuration_sardine import SaRDinEConfig
from srde.hub.modeling_sardine import SaRDinEForCausalLM
from srde.hub.reading import ADAPTER

_CITATION = """```bibtex
@misc{srde2024,
  title={SRDE: Sparse Routed Delta Experts},
  author={MinimaML},
  year={2024},
  url={https://github.com/MinimaML/srde-mistral}
}
```"""


def is_hub_id(name: str | None) -> bool:
    """Whether a model's name is one on the hub rather than a place on this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not name or name.count("/") != 1 or os.path.exists(os.path.expanduser(name)):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def shown_name(name: str | None) -> str:
    """A base's name as others may read it: of a folder, its own name only."""
    if not name:
        return "its base model"
    return name if is_hub_id(name) else os.path.basename(os.path.normpath(name))


def sardine_card(
    model: SaRDinEForCausalLM,
    title: str,
    *,
    results: Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> str:
    """README.md of a SaRDinE model.

    Args:
        model: The model.
        title: Its name.
        results: What `srde eval` wrote to `eval_results.json`, if it has been measured.
        license_id: The licence's name on the hub; the base's own licence holds for its weights in any case.
    """
    config: SaRDinEConfig = model.config
    base = config.base_model_name_or_path
    sizes = _sizes(model)
    in_base = sum(p.numel() for n, p in model.named_parameters() if ".srde_" not in n)
    in_experts = sum(t.numel() for n, t in model.expert_tensors().items() if not n.endswith(".index"))
    where = "in this folder" if config.base_inside else f"loaded from `{base}`"
    extra = "" if config.base_inside or is_hub_id(base) else ', base_model_name_or_path="path/to/the/base"'
    code = f'"{title}"{extra}'
    lines = [
        _header(base, license_id),
        f"# {title}",
        "**S**parse **R**outed **D**elta **E**xperts on " + shown_name(base) + ".",
        f"> {in_base / 1e6:,.1f} M base parameters ({where}), {config.num_experts} experts per MLP, {config.num_experts_per_tok} "
        f"per token, each rewrites {100 * config.sparsity:g} % of an MLP's weights; {in_experts / 1e6:,.2f} M parameters in "
        f"experts and routers ({100 * in_experts / in_base:.2f} % of the base)",
        "The whole base stays frozen and active. In every MLP a router picks experts for each token, and the token's weights are "
        "the base's plus the weighted deltas of its experts, exactly.",
        "## Use it",
        "```python\nimport torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")\n'
        f"model = AutoModelForCausalLM.from_pretrained({code}, trust_remote_code=True, dtype=torch.bfloat16)\n\n"
        'inputs = tokenizer("Solve step by step: what is 15 % of 80?", return_tensors="pt")\n'
        "outputs = model.generate(**inputs, max_new_tokens=256)\n"
        "print(tokenizer.decode(outputs[0], skip_special_tokens=True))\n```",
        "It needs transformers (5.23 or later), torch and safetensors; `trust_remote_code` runs the Python files of this folder. "
        '`device_map="auto"` and `quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` work as '
        "for any model; the experts stay float32. With `model.srde.force_experts(0)` every token uses one expert, and "
        "`model.disable_adapter()` gives the base.",
        "## Experts",
        _expert_table(model, sizes, results),
    ]
    if results:
        lines += ["## Measured", _results_table(results)]
    lines += ["## Citation", _CITATION]
    return "\n\n".join(lines) + "\n"


def merged_card(title: str, base: str | None, what: str, parity: str, license_id: str | None = None) -> str:
    """README.md of a merged model: a plain one, so nothing here needs more than Transformers."""
    return (
        "\n\n".join(
            [
                _header(base, license_id, tags=["text-generation"]),
                f"# {title}",
                f"{shown_name(base)} with fixed changes of its MLP weights: {what}.",
                f"Compared with the model that it was made from: {parity}.",
            ]
        )
        + "\n"
    )


def _header(base: str | None, license_id: str | None, tags: Sequence[str] | None = None) -> str:
    header: dict[str, Any] = {} if license_id is None else {"license": license_id}
    header["tags"] = list(tags or ["srde", "sardine", "sparse-experts", "moe", "reasoning"])
    if is_hub_id(base):
        header["base_model"] = base
    header |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _sizes(model: SaRDinEForCausalLM) -> list[float]:
    """Norm of each expert's change over all layers, routed ones first."""
    squares = 0.0
    for layer in model.srde.layers.values():
        squares = squares + layer.srde_experts[ADAPTER].usage().detach().double().sum(1).cpu()
    return [float(size) for size in squares.sqrt()]


def _expert_table(
    model: SaRDinEForCausalLM, sizes: Sequence[float], results: Mapping[str, Any] | None
) -> str:
    config = model.config
    values = sum(layer.srde_experts[ADAPTER].values[:, 0].numel() for layer in model.srde.layers.values())
    shares = ((results or {}).get("routing") or {}).get("domain_expert") or {}
    lines = [
        "| expert | name | values | size of its change |" + (" used most by |" if shares else ""),
        "|---:|---|---:|---:|",
    ]
    lines[1] += "---|" if shares else ""
    for expert, size in enumerate(sizes):
        routed = expert < config.num_experts
        name = (config.expert_names[expert] if config.expert_names else "") if routed else "shared"
        if expert in (config.disabled_experts or ()):
            name = f"{name} (disabled)".strip()
        line = f"| {expert} | {name} | {values:,} | {size:.3g} |"
        if shares:
            share = {domain: row[expert] for domain, row in shares.items() if routed and expert < len(row)}
            best = sorted(share, key=lambda domain: -share[domain])[:2]
            line += " " + ", ".join(f"{domain} ({100 * share[domain]:.0f} %)" for domain in best) + " |"
        lines.append(line)
    if shares:
        lines.append("\nUsed by: the domains in which the expert has its largest shares of the gates.")
    return "\n".join(lines)


def _results_table(results: Mapping[str, Any]) -> str:
    mine, base = results["srde"], results.get("base")
    lines = ["| domain | rows | accuracy | loss |", "|---|---:|---:|---:|"]
    if base:
        lines = [
            "| domain | rows | accuracy base | accuracy | loss base | loss |",
            "|---|---:|---:|---:|---:|---:|",
        ]
    rows = {**mine["domains"], **({"all": mine["all"]} if "all" in mine else {})}
    for domain, one in rows.items():
        other = (
            None
            if not base
            else base["all"]
            if domain == "all" and "all" in base
            else base["domains"][domain]
        )
        cells = [domain, f"{one['rows']:,}"]
        for key, text in (("accuracy", _percent), ("loss", _loss)):
            cells += [text(other, key)] if other else []
            cells.append(text(one, key))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\nHeld-out rows; loss in nats per trained token; ± is one standard error.")
    return "\n".join(lines)


def _percent(result: Mapping[str, Any], key: str) -> str:
    value, error = result.get(key), result.get(f"{key}_se")
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def _loss(result: Mapping[str, Any], key: str) -> str:
    value, error = result.get(key), result.get(f"{key}_se")
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
