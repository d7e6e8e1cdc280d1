"""Loss, accuracy and routing per domain against row-by-row computations."""

import json

import pytest
import torch
from peft import get_peft_model

from srde import SrdeConfig
from srde.data.rows import Row
from srde.data.tokenize import tokenize_row
from srde.eval.evaluate import ANY, evaluate
from srde.eval.report import as_json, comparison_table, save_report, total, used_experts
from srde.infer.generate import generate
from tiny import VOCABULARY, tiny, tiny_tokenizer


def row(domain, prompt, response, line=1, **more):
    turns = [{"role": "user", "content": prompt}] if prompt else []
    return Row(prompt=turns, response=response, file="f", line=line, domain=domain, **more)


@pytest.fixture(scope="module")
def setting():
    tokenizer = tiny_tokenizer()
    base = tiny(vocab_size=VOCABULARY, eos_token_id=tokenizer.eos_token_id)
    model = get_peft_model(base, SrdeConfig(num_experts=4, target_sparsity=0.05, num_shared_experts=1)).eval()
    for layer in model.srde.layers.values():
        torch.nn.init.normal_(layer.srde_experts["default"].values, std=0.3)
    said = generate(model, tokenizer, ["what is 3"], max_new_tokens=5).answers[0].text
    rows = [
        row("math", "what is 1", "the answer is 2", kind="number", answer="2"),
        row("math", "what is 3", said, kind="exact", answer=said),
        row("logic", "how many", "yes", kind="plan", answer="yes"),
        row(None, "", "the answer is 4 5 6 7"),
    ]
    return model, tokenizer, rows


def test_losses_are_means_over_a_domains_trained_tokens(setting):
    model, tokenizer, rows = setting
    result = evaluate(model, tokenizer, rows, batch_size=3, max_new_tokens=5)
    assert list(result.domains) == ["math", "logic", ANY]
    for domain, mine in (("math", rows[:2]), ("logic", rows[2:3]), (ANY, rows[3:])):
        total_loss, count = 0.0, 0
        for r in mine:
            example = tokenize_row(tokenizer, r)
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
            for t, label in enumerate(example.labels[1:]):
                if label != -100:
                    total_loss, count = total_loss - float(logits[t, label].detach()), count + 1
        assert result.domains[domain].loss == pytest.approx(total_loss / count, rel=1e-4)


def test_only_what_can_be_scored_counts_in_the_accuracy(setting):
    model, tokenizer, rows = setting
    result = evaluate(model, tokenizer, rows, max_new_tokens=5)
    assert result.domains["math"].scored == 2 and result.domains["math"].accuracy == 0.5
    assert result.domains["logic"].scored == 0 and result.domains["logic"].accuracy is None
    assert set(result.answers) == {0, 1} and total(result).accuracy == 0.5


def test_the_load_is_the_mean_gate_over_the_rows_own_tokens(setting):
    model, tokenizer, rows = setting
    load = evaluate(model, tokenizer, rows, batch_size=4, max_new_tokens=2).domains["math"].load_LE
    gates = []
    for r in rows[:2]:
        with model.srde.record() as record:
            model(torch.tensor([tokenize_row(tokenizer, r).input_ids]))
        gates.append(torch.stack([route.gate_TE for route in record.calls[0].routes.values()]))
    torch.testing.assert_close(load, torch.cat(gates, 1).mean(1), atol=1e-5, rtol=0)
    used = used_experts(load, 4)
    assert [e for e, _ in used] == load[:, :4].mean(0).argsort(descending=True).tolist()
    assert sum(share for _, share in used) == pytest.approx(1)


def test_a_base_model_has_no_load_and_other_numbers(setting):
    model, tokenizer, rows = setting
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, max_new_tokens=2)
    assert base.domains["math"].load_LE is None
    assert (
        base.domains["math"].loss != evaluate(model, tokenizer, rows, max_new_tokens=2).domains["math"].loss
    )


def test_progress_adds_up(setting):
    model, tokenizer, rows = setting
    seen = []
    evaluate(model, tokenizer, rows, batch_size=2, max_new_tokens=2, progress=seen.append)
    assert sum(seen) == len(rows) + 2  # every row once, the two scored ones once more


def test_the_report_shows_both_models_and_writes_its_files(setting, tmp_path):
    from rich.console import Console

    model, tokenizer, rows = setting
    experts = evaluate(model, tokenizer, rows, max_new_tokens=2)
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, max_new_tokens=2)
    console = Console(record=True, width=100)
    console.print(comparison_table(experts, base, 4))
    text = console.export_text()
    math = next(line for line in text.splitlines() if "math" in line)
    assert f"{base.domains['math'].loss:.3f}" in math and f"{experts.domains['math'].loss:.3f}" in math
    assert f"{used_experts(experts.domains['math'].load_LE, 4)[0][0]} (" in math
    results, plot = save_report(tmp_path, experts, base, 4)
    assert json.loads(results.read_text()) == json.loads(json.dumps(as_json(experts, base)))
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and plot.stat().st_size > 10_000


def test_speed_is_measured_on_as_many_tokens_for_every_model(setting, monkeypatch):
    import importlib

    module = importlib.import_module("srde.eval.evaluate")
    model, tokenizer, rows = setting
    lengths = []

    def counting(*args, **options):
        got = generate(*args, **options)
        lengths.append([a.new_tokens for a in got] if "min_new_tokens" in options else [])
        return got

    monkeypatch.setattr(module, "generate", counting)
    result = evaluate(model, tokenizer, rows, max_new_tokens=2)
    assert result.tokens_per_second > 0 and lengths[-1] == [module.SPEED_TOKENS] * 2
