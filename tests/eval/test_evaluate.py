"""Loss, accuracy and routing per domain against row-by-row computations; two models on the same rows."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch

from eval_models import CHOICE, adapted, row
from srde.data.tokenize import encode_row, tokenize_row
from srde.errors import DataError, UsageError
from srde.eval import losses
from srde.eval.evaluate import ANY, compare, evaluate, steps
from srde.eval.losses import keeps_logits, read
from srde.eval.report import save_report, used_experts
from srde.eval.sample import spread
from srde.infer.generate import generate
from srde.train.measure import specialisation
from tiny import VOCABULARY


@pytest.fixture(scope="module")
def setting():
    model, tokenizer = adapted()
    said = generate(model, tokenizer, ["what is 3"], max_new_tokens=5).answers[0].text
    rows = [
        row("math", "what is 1", "the answer is 2", kind="number", answer="2", source="sums"),
        row("math", "what is 3", said, kind="exact", answer=said, source="echo"),
        row("logic", "how many", "yes", kind="code", metadata={"tests": "assert True"}),
        row(None, "", "the answer is 4 5 6 7"),
        row("math", CHOICE, "The answer is B", kind="choice", answer="B", source="sums"),
        row("logic", "how many are there 1 2 3", "B", kind="choice", answer="B"),
    ]
    general = [row(None, "", "yes no what how many"), row(None, "", "there are 5 6 the answer")]
    return model, tokenizer, rows, general


@pytest.fixture(scope="module")
def found(setting):
    model, tokenizer, rows, general = setting
    experts = evaluate(model, tokenizer, rows, general=general, batch_size=3, max_new_tokens=5)
    with model.disable_adapter():
        base = evaluate(model, tokenizer, rows, general=general, batch_size=2, max_new_tokens=5)
    return experts, base


def slow_loss(model, tokenizer, one):
    example = tokenize_row(tokenizer, one)
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1].log_softmax(-1)
    counted = [(t, label) for t, label in enumerate(example.labels[1:]) if label != -100]
    return -sum(float(logits[t, label]) for t, label in counted), len(counted)


def test_losses_are_means_over_a_groups_trained_tokens(setting, found):
    model, tokenizer, rows, general = setting
    experts, _ = found
    slow = [slow_loss(model, tokenizer, one) for one in rows]
    assert [item.loss for item in experts.items] == pytest.approx([loss for loss, _ in slow], rel=1e-4)
    assert [item.tokens for item in experts.items] == [count for _, count in slow]
    assert list(experts.domains) == ["math", "logic", ANY]
    assert list(experts.sources) == [
        ("math", "sums"), ("math", "echo"), ("logic", "(no source)"), (ANY, "(no source)"),
    ]  # fmt: skip
    for result, mine in (
        (experts.domains["math"], (0, 1, 4)), (experts.domains[ANY], (3,)), (experts.sources["math", "sums"], (0, 4)),
    ):  # fmt: skip
        tokens = sum(slow[i][1] for i in mine)
        assert result.loss == pytest.approx(sum(slow[i][0] for i in mine) / tokens, rel=1e-4)
        assert (result.rows, result.tokens) == (len(mine), tokens)
    assert experts.total.loss == pytest.approx(sum(r.loss for r in experts.domains.values()) / 3)
    slow_general = [slow_loss(model, tokenizer, one) for one in general]
    expected = sum(loss for loss, _ in slow_general) / sum(count for _, count in slow_general)
    assert experts.general_loss.value == pytest.approx(expected, rel=1e-4)


def test_every_row_is_scored_by_its_own_rule(found):
    experts, _ = found
    assert [item.how for item in experts.items] == [
        "text",
        "text",
        "not run",
        "not scored",
        "letters",
        "text",
    ]
    assert [item.score is None for item in experts.items] == [False, False, True, True, False, False]
    math_, logic = experts.domains["math"], experts.domains["logic"]
    assert experts.items[1].score == 1.0 and experts.items[0].score == 0.0
    assert math_.accuracy == pytest.approx((0 + 1 + experts.items[4].score) / 3) and math_.scored == 3
    assert (logic.scored, logic.not_run, logic.by_text) == (1, 1, 1)
    assert experts.domains[ANY].accuracy is None and experts.total.scored == 4
    assert experts.total.accuracy == pytest.approx((math_.accuracy + logic.accuracy) / 2)
    assert set(experts.answers) == {0, 1, 4, 5} and experts.answers[4].startswith("The answer is ")
    assert len(experts.items[4].loglik) == 3


def test_a_program_is_asked_for_and_run_with_leave(setting, monkeypatch):
    from srde.eval import contained

    model, tokenizer, rows, _ = setting
    seen = []
    monkeypatch.setattr(contained, "require_containment", lambda: seen.append("checked"))
    monkeypatch.setattr(
        contained, "score_code", lambda text, one, **how: seen.append((one, how)) or (False, "no f")
    )
    result = evaluate(model, tokenizer, rows[2:3], max_new_tokens=3, confirm_run_unsafe_code=True)
    assert seen == ["checked", (rows[2], {"confirm_run_unsafe_code": True})]
    item = result.items[0]
    assert (item.how, item.score, item.reason, result.total.not_run) == ("text", 0.0, "no f", 0)


def test_differences_are_paired_row_by_row(found):
    experts, base = found
    paired = compare(experts, base)
    changes = [(a.loss - b.loss) for a, b in zip(experts.items, base.items, strict=True)]
    tokens = [item.tokens for item in experts.items]
    mine = (0, 1, 4)
    expected = sum(changes[i] for i in mine) / sum(tokens[i] for i in mine)
    residuals = [changes[i] - expected * tokens[i] for i in mine]
    change = paired.domains["math"].loss
    assert change.value == pytest.approx(expected)
    assert change.se == pytest.approx(
        math.sqrt(3 / 2 * sum(r * r for r in residuals)) / sum(tokens[i] for i in mine)
    )
    assert change.value == pytest.approx(experts.domains["math"].loss - base.domains["math"].loss)
    scores = [experts.items[i].score - base.items[i].score for i in mine]
    assert paired.domains["math"].accuracy.value == pytest.approx(sum(scores) / 3)
    assert paired.sources["math", "sums"].accuracy.items == 2
    assert paired.domains[ANY].accuracy is None and paired.domains[ANY].loss.se is None
    assert paired.total.loss.value == pytest.approx(experts.total.loss - base.total.loss)
    assert paired.general.value == pytest.approx(experts.general_loss.value - base.general_loss.value)


def test_other_rows_cannot_be_compared(setting, found):
    model, tokenizer, rows, general = setting
    experts, _ = found
    fewer = evaluate(model, tokenizer, rows[:2], general=general, max_new_tokens=1)
    with pytest.raises(UsageError, match=r"rows='6 and 2': two models are compared on the same rows"):
        compare(experts, fewer)
    without = evaluate(model, tokenizer, rows, max_new_tokens=1)
    with pytest.raises(UsageError, match="with the same general text"):
        compare(experts, without)


def slow_gates(model, tokenizer, rows):
    """Row by row, layer by layer, token by token: the routed gates [L, T, E] of each row."""
    found = []
    for one in rows:
        with model.srde.record() as record, torch.no_grad():
            model(torch.tensor([tokenize_row(tokenizer, one).input_ids]))
        found.append(torch.stack([route.gate_TE for route in record.calls[0].routes.values()]).double())
    return found


def test_routing_statistics_equal_a_slow_loop(setting, found):
    model, tokenizer, rows, _ = setting
    routing = found[0].routing
    gates = [gate_LTE[..., :4] for gate_LTE in slow_gates(model, tokenizer, rows)]
    tokens = sum(gate.shape[1] for gate in gates)
    layers = gates[0].shape[0]
    assert routing.tokens == tokens and routing.share_LE.shape == (layers, 4)
    for layer in range(layers):
        load = [sum(float(gate[layer, :, e].sum()) for gate in gates) / tokens for e in range(4)]
        assert routing.load_LE[layer] == pytest.approx(load, abs=1e-5)
        assert sum(load) == pytest.approx(1, abs=1e-5)
        assert routing.entropy_L[layer] == pytest.approx(-sum(p * math.log(p) for p in load), abs=1e-5)
        single = [
            -sum(float(p) * math.log(float(p)) for p in gate_E if p > 0)
            for gate in gates
            for gate_E in gate[layer]
        ]
        assert routing.token_entropy_L[layer] == pytest.approx(sum(single) / tokens, abs=1e-5)
    assert routing.domains == ("math", "logic")
    for d, mine in enumerate(((0, 1, 4), (2, 5))):
        sum_LE = sum(gates[i].sum(1) for i in mine)
        share_LE = (sum_LE / sum_LE.sum(-1, keepdim=True)).numpy()
        assert routing.share_DLE[d] == pytest.approx(share_LE, abs=1e-5)
        assert routing.share_DE[d] == pytest.approx(share_LE.mean(0), abs=1e-5)
    mean_NLE = torch.stack([gate.mean(1) for gate in gates]).numpy()
    expected = specialisation(mean_NLE, [0, 0, 1, -1, 0, 1])
    assert routing.specialisation.information_L == pytest.approx(expected.information_L, abs=1e-5)
    assert routing.names == ("0", "1", "2", "3") and routing.open_experts == (0, 1, 2, 3)
    assert routing.largest_entropy == pytest.approx(math.log(4)) and routing.relative(
        math.log(2)
    ) == pytest.approx(0.5)


def test_the_load_of_a_domain_is_the_mean_gate_over_its_own_tokens(setting, found):
    model, tokenizer, rows, _ = setting
    load_LE = found[0].domains["math"].load_LE
    gates = slow_gates(model, tokenizer, [rows[i] for i in (0, 1, 4)])
    torch.testing.assert_close(load_LE, torch.cat(gates, 1).mean(1).float(), atol=1e-5, rtol=0)
    assert load_LE[:, 4].tolist() == pytest.approx([1.0] * len(load_LE))  # shared
    used = used_experts(load_LE, 4)
    assert [e for e, _ in used] == load_LE[:, :4].mean(0).argsort(descending=True).tolist()
    assert sum(share for _, share in used) == pytest.approx(1)


def test_dead_experts_and_those_that_are_closed():
    model, tokenizer = adapted(expert_names=["math", "logic", "code", "math"], top_k=1, disabled_experts=[3])
    rows = [row("math", "what is 1", "2"), row("logic", "how many", "3")]
    with model.srde.force_experts(2):
        routing = evaluate(model, tokenizer, rows).routing
    assert routing.dead == tuple((layer, expert) for layer in range(2) for expert in (0, 1))
    assert routing.open_experts == (0, 1, 2) and routing.names == ("0 math", "1 logic", "2 code", "3 math")
    assert routing.entropy_L.tolist() == pytest.approx([0, 0]) and routing.largest_entropy == pytest.approx(
        math.log(3)
    )


def test_a_base_model_has_no_routing_and_other_numbers(found):
    experts, base = found
    assert base.domains["math"].load_LE is None and base.routing is None
    assert base.domains["math"].loss != experts.domains["math"].loss


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_change_nothing(setting, model_type, side):
    rows = setting[2]
    model, tokenizer = adapted(model_type)
    tokenizer.padding_side = side
    alone = evaluate(model, tokenizer, rows, batch_size=1, max_new_tokens=4)
    together = evaluate(model, tokenizer, rows, batch_size=16, max_new_tokens=4)
    assert [a.loss for a in together.items] == pytest.approx([a.loss for a in alone.items], rel=1e-4)
    assert together.answers == alone.answers
    assert together.routing.load_LE == pytest.approx(alone.routing.load_LE, abs=1e-5)


def test_memory_follows_the_trained_tokens(setting, monkeypatch):
    model, tokenizer, rows, _ = setting
    encoded = [encode_row(tokenizer, one) for one in rows]
    passages = [losses.Passage(one.input_ids, max(one.prompt_length, 1)) for one in encoded]
    whole = read(model, passages, pad_token_id=0)
    assert keeps_logits(model) and not keeps_logits(torch.nn.Linear(1, 1))
    shapes = []
    hook = model.get_base_model().register_forward_hook(lambda *given: shapes.append(given[-1].logits.shape))
    monkeypatch.setattr(losses, "SLICE", 2 * VOCABULARY)  # two positions at a time
    monkeypatch.setattr(losses, "LOGITS", 30 * VOCABULARY)
    parts = read(model, passages, pad_token_id=0)
    hook.remove()
    assert [one.loss for one in parts] == pytest.approx([one.loss for one in whole], rel=1e-5)
    assert len(shapes) > 1 and all(rows_ == 1 or rows_ * kept <= 30 for rows_, kept, _ in shapes)
    longest = max(passages, key=lambda one: len(one.ids))
    assert shapes[0][1] == len(longest.ids) - longest.first + 1  # not the prompt
    monkeypatch.setattr(losses, "keeps_logits", lambda _: False)
    assert [one.loss for one in read(model, passages, pad_token_id=0)] == pytest.approx(
        [one.loss for one in whole], rel=1e-5
    )


def test_progress_adds_up(setting):
    model, tokenizer, rows, general = setting
    seen = []
    evaluate(model, tokenizer, rows, general=general, batch_size=2, max_new_tokens=2, progress=seen.append)
    # every row and paragraph once; two questions and a choice without letters once more
    assert sum(seen) == steps(rows, general) == len(rows) + 2 + 3
    assert steps(rows, confirm_run_unsafe_code=True) == len(rows) + 4


def test_speed_is_measured_on_as_many_tokens_for_every_model(setting, monkeypatch):
    module = importlib.import_module("srde.eval.evaluate")
    model, tokenizer, rows, _ = setting
    lengths = []

    def counting(*args, **options):
        got = generate(*args, **options)
        lengths.append([a.new_tokens for a in got] if "min_new_tokens" in options else [])
        return got

    monkeypatch.setattr(module, "generate", counting)
    result = evaluate(model, tokenizer, rows, max_new_tokens=2)
    assert result.tokens_per_second > 0 and lengths[-1] == [module.SPEED_TOKENS] * 3
    assert evaluate(model, tokenizer, rows[4:5]).tokens_per_second is None  # letters are not generated


def test_what_cannot_be_measured_is_refused_before_anything_runs(setting):
    model, tokenizer, rows, _ = setting
    with pytest.raises(UsageError, match=r"rows=\[\]: there is nothing to evaluate"):
        evaluate(model, tokenizer, [])
    bad = row("math", "what is 1", "two", line=7, kind="number", answer="two")
    calls = []
    hook = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        DataError, match=r"f:7: answer: cannot be scored as number: answer='two': must be one number"
    ):
        evaluate(model, tokenizer, [*rows, bad])
    long = row("math", "what is 1", "3 " * 3000, line=9)
    with pytest.raises(
        DataError, match=r"f:9: row: has [\d,]+ tokens with its answer, and the model has 2,048 positions"
    ):
        evaluate(model, tokenizer, [*rows, long])
    hook.remove()
    assert not calls


def test_fewer_rows_are_spread_over_the_domains():
    rows = [
        row(domain, "p", "r", line=n)
        for domain, count in (("a", 50), ("b", 3), ("c", 20))
        for n in range(count)
    ]
    kept = spread(rows, 18)
    assert [sum(one.domain == name for one in kept) for name in "abc"] == [8, 3, 7]
    assert kept == spread(rows, 18) == sorted(kept, key=rows.index) and kept != spread(rows, 18, seed=1)
    assert [one.line for one in kept if one.domain == "a"] != list(range(8))
    assert spread(rows, 100) == rows and len(spread(rows, 2)) == 2


@pytest.mark.parametrize(
    ("kind", "answer", "metadata"),
    [
        ("choice", "A", {"n_options": "4"}),
        ("choice", "A", {"n_options": 0}),
        ("choice", "seven", {"n_options": 4}),
        ("set", ",", {}),
        ("grid", "abc", {}),
        ("exact", "yes", {"options": 5}),
        ("exact", "yes", {"options": [5, 6]}),
        ("one_of", 5, {}),
        ("reasoning_gym", "5", {}),
        ("reasoning_gym", "5", {"source_dataset": "no_such_task"}),
    ],
)
def test_answers_of_another_type_are_told_by_file_and_line(setting, kind, answer, metadata):
    model, tokenizer, rows, _ = setting
    bad = row("math", "what is 1", "A", line=5, kind=kind, answer=answer, metadata=metadata)
    with pytest.raises(DataError, match=rf"f:5: answer: cannot be scored as {kind}: "):
        evaluate(model, tokenizer, [*rows, bad])


def test_an_adapter_whose_numbers_are_not_finite_still_has_a_report(setting, tmp_path):
    tokenizer, rows = setting[1:3]
    model, _ = adapted()
    for layer in model.srde.layers.values():
        layer.srde_experts["default"].values.data.fill_(1e30)
    found = evaluate(model, tokenizer, rows[:2], max_new_tokens=1)
    save_report(tmp_path, found, None, {})
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["srde"]["all"]["loss"] is None and (tmp_path / "report.html").is_file()


def test_all_experts_disabled_beside_a_null_expert(setting):
    tokenizer, rows = setting[1:3]
    model, _ = adapted(null_expert=True, disabled_experts=[0, 1, 2, 3])
    found = evaluate(model, tokenizer, rows[:2], max_new_tokens=1)
    assert found.routing.open_experts == () and found.routing.dead == ()


def test_a_program_without_tests_is_refused_before_the_model_speaks(setting):
    model, tokenizer, rows, _ = setting
    calls = []
    hook = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    bad = row("code", "write f", "def f(): 0", line=4, kind="code")
    with pytest.raises(DataError, match="f:4: tests: is missing"):
        evaluate(model, tokenizer, [*rows, bad], confirm_run_unsafe_code=True)
    hook.remove()
    assert not calls
