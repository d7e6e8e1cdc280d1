"""Old `srde_weights.pt` files: their formula, taken over exactly; nothing in them is run."""

import os
import pickle

import pytest
import torch

from srde.cli import main
from srde.errors import ArtifactError
from srde.hub.legacy import import_weights
from srde.tuner.loading import load_adapter
from tiny import save_tiny, tiny

EXPERTS, ATOMS = 3, 5


def old_file(path, base, seed=0, count=60, **changes):
    """A file as the prototype wrote it for a Llama-like model: one set of positions per layer over gate, up and down."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number, layer in enumerate(base.model.layers):
        size = sum(p.numel() for p in layer.mlp.parameters())
        state = {f"base_ffn.{name}": p.detach().clone() for name, p in layer.mlp.named_parameters()}
        state["mask_selector.indices"] = torch.randperm(size, generator=generator)[: count + 7 * number]
        positions = count + 7 * number
        state["mask_selector.importance"] = torch.randn(positions, generator=generator)
        state["vocabulary.atoms"] = torch.randn(ATOMS, positions, generator=generator)
        state["vocabulary.expert_atom_weights"] = torch.randn(EXPERTS, ATOMS, generator=generator)
        for e in range(EXPERTS):
            state[f"experts.{e}.importance"] = torch.randn(positions, generator=generator)
        state["router.gate.weight"] = torch.randn(EXPERTS, base.config.hidden_size, generator=generator)
        layers[str(number)] = state
    content = {"srde_layers": layers, "config": {"top_k": 2, "num_experts": EXPERTS}} | changes
    torch.save(content, path)
    return layers


def dense_reference(state, mlp, expert):
    """The changes of the three matrices, position by position."""
    weights = torch.zeros(ATOMS)
    total = sum(torch.exp(v) for v in state["vocabulary.expert_atom_weights"][expert])
    for a in range(ATOMS):
        weights[a] = torch.exp(state["vocabulary.expert_atom_weights"][expert][a]) / total
    flat = torch.zeros(sum(p.numel() for p in mlp.parameters()))
    for n, place in enumerate(state["mask_selector.indices"].tolist()):
        value = sum(weights[a] * state["vocabulary.atoms"][a, n] for a in range(ATOMS))
        flat[place] = value * (1 / (1 + torch.exp(-state[f"experts.{expert}.importance"][n])))
    parts, start = [], 0
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = getattr(mlp, name).weight
        parts.append(flat[start : start + weight.numel()].view_as(weight))
        start += weight.numel()
    return parts


@pytest.fixture
def place(tmp_path):
    save_tiny(tmp_path / "base")
    from srde.tuner.loading import load_base

    return tmp_path, load_base(str(tmp_path / "base"))


def test_the_adapter_holds_the_file_s_own_numbers(place, capsys):
    folder, base = place
    layers = old_file(folder / "srde_weights.pt", base)
    argv = [
        "--srde_weights",
        folder / "srde_weights.pt",
        "--model_name_or_path",
        folder / "base",
        "--output_dir",
        folder / "new",
    ]
    assert main(["import", *map(str, argv)]) == 0
    assert "3 experts in 2 layers" in capsys.readouterr().out
    model, _ = load_adapter(str(folder / "new"))
    config = model.peft_config["default"]
    assert (config.num_experts, config.top_k, config.granularity) == (EXPERTS, 2, "element")
    for number, layer in enumerate(model.srde.layers.values()):
        state, mlp = layers[str(number)], base.model.layers[number].mlp
        assert torch.equal(layer.srde_router["default"].weight, state["router.gate.weight"])
        for e in range(EXPERTS):
            got = layer.srde_experts["default"].dense(torch.eye(EXPERTS)[e])
            for mine, wanted in zip(got, dense_reference(state, mlp, e), strict=True):
                torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-5)
        index = layer.srde_experts["default"].index
        assert all(len(set(row)) == len(row) for row in index.flatten(0, 1).tolist())


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_file_is_run(place):
    folder, base = place
    old_file(folder / "bad.pt", base, canary=Canary(folder / "ran"))
    (folder / "plain.pt").write_bytes(pickle.dumps(Canary(folder / "ran"), protocol=2))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ArtifactError, match="a file of tensors alone"):
            import_weights(folder / name, str(folder / "base"))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("vocabulary.atoms"), r"vocabulary.atoms': it is missing"),
        (lambda state: state["vocabulary.atoms"].fill_(float("nan")), "not finite"),
        (lambda state: state["mask_selector.indices"].fill_(3), "named twice"),
        (lambda state: state["mask_selector.indices"].add_(10**6), "must lie below"),
        (lambda state: state.update({"experts.1.importance": torch.zeros(2)}), "it must have 60 numbers"),
        (
            lambda state: state["base_ffn.up_proj.weight"].add_(1),
            "others than those the file was trained with",
        ),
        (
            lambda state: state.update({"router.gate.weight": torch.zeros(4, 32)}),
            "as many in router and vocabulary",
        ),
        (
            lambda state: state.update({"router.gate.weight": torch.zeros(3, 31)}),
            "it is 31 wide, and the base 32",
        ),
        (lambda state: state.update({"router.gate.weight": torch.zeros(3)}), "it has 2 dimensions"),
        (lambda state: state.update({"vocabulary.atoms": torch.zeros(2, 60)}), "one weight for each atom"),
        (
            lambda state: state.update({"mask_selector.indices": torch.arange(60.0)}),
            "it has 1 dimensions, not torch.float32",
        ),
    ],
    ids=[
        "missing",
        "nan",
        "twice",
        "outside",
        "short",
        "another base",
        "experts",
        "narrow",
        "flat",
        "atoms",
        "points",
    ],
)
def test_files_that_do_not_fit_are_refused(place, change, message):
    folder, base = place
    layers = old_file(folder / "old.pt", base)
    change(layers["0"])
    torch.save({"srde_layers": layers, "config": {"top_k": 2}}, folder / "old.pt")
    with pytest.raises(ArtifactError, match=message):
        import_weights(folder / "old.pt", str(folder / "base"), folder / "new")
    assert not (folder / "new").exists()


def test_other_settings_and_names_of_layers_are_refused(place):
    folder, base = place
    for change, message in (
        ({"config": {"top_k": "2"}}, "whole number of at least 1"),
        ({}, "named by their numbers"),
    ):
        layers = old_file(folder / "old.pt", base, **change)
        if not change:
            torch.save({"srde_layers": {"abc": layers["0"]}}, folder / "old.pt")
        with pytest.raises(ArtifactError, match=message):
            import_weights(folder / "old.pt", str(folder / "base"))


def test_other_files_and_bases_are_refused(place):
    folder, _ = place
    with pytest.raises(ArtifactError, match="no such file"):
        import_weights(folder / "none.pt", str(folder / "base"))
    (folder / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ArtifactError, match="a file of tensors alone"):
        import_weights(folder / "torn.pt", str(folder / "base"))
    torch.save({"weights": torch.zeros(2)}, folder / "other.pt")
    with pytest.raises(ArtifactError, match="srde_layers"):
        import_weights(folder / "other.pt", str(folder / "base"))
    old_file(folder / "deep.pt", tiny(num_hidden_layers=3, vocab_size=320))
    with pytest.raises(Exception, match="layer"):
        import_weights(folder / "deep.pt", str(folder / "base"))
