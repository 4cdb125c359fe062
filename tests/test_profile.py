"""The profile's figures against plain PyTorch, its search, its splits, its resume, and what its report shows."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import profile_cases as cases
from sparing.anatomy import anatomy_of
from sparing.evaluate import (
    KINDS,
    Removal,
    Settings,
    TokenKinds,
    cut,
    profile,
    text_loss,
    time_arms,
    tokenize,
)
from sparing.evaluate.measurements import Measurements
from sparing.evaluate.painting import pieces
from sparing.evaluate.removal import PrefillFlops
from sparing.evaluate.search import Search
from sparing.policies import SkipModules
from sparing.study import render
from sparing.study.pages.profile_charts import intensity, nats, pareto
from sparing.study.pages.profile_page import plan_in_words, write_report


@pytest.fixture(scope="module")
def model():
    return cases.model()


@pytest.fixture(scope="module")
def tokenizer():
    return cases.tokenizer()


@pytest.fixture(scope="module")
def windows(tokenizer):
    return tokenize(tokenizer, cases.text(), 400).windows(24)


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return profile(model, tokenizer, cases.text(), settings=cases.SETTINGS)


def plain_loss(model, windows):
    """Mean loss, window by window without padding: nothing of ours but the ids."""
    total, count = 0.0, 0
    for row, valid in zip(windows.ids, windows.valid, strict=True):
        ids = row[valid][None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def test_every_token_is_predicted_once():
    ids = list(range(100, 150))
    for bos in (None, 1):
        made = cut(ids, 7, bos=bos)
        predicted = [i for row, valid in zip(made.ids, made.valid, strict=True) for i in row[valid].tolist()[1:]]
        assert predicted == (ids if bos else ids[1:])
        assert made.predicted == len(predicted)
        firsts = made.ids[:, 0].tolist()
        assert firsts == (
            [1] * len(firsts)
            if bos
            else [100, *(row[valid][-1].item() for row, valid in zip(made.ids, made.valid, strict=True))][: len(firsts)]
        )
    with pytest.raises(ValueError, match="at least 2"):
        cut(ids, 1)
    with pytest.raises(ValueError, match="1 tokens"):
        cut([3], 8)


def test_the_loss_is_that_of_plain_pytorch_whatever_the_batch(model, windows):
    found = text_loss(model, windows, batch=3)
    assert not windows.valid.all(), "the last window must be padded for this test to mean anything"
    assert found.mean == pytest.approx(plain_loss(model, windows), rel=1e-5)
    assert text_loss(model, windows).mean == pytest.approx(found.mean, rel=1e-6)
    assert found.ratio == 1
    row, at = 1, 4
    with torch.no_grad():
        logits = model(input_ids=windows.ids[row : row + 1]).logits[0, at - 1]
    assert found.tokens[row, at - 1].item() == pytest.approx(
        -logits.log_softmax(-1)[windows.ids[row, at]].item(), rel=1e-4
    )


@pytest.mark.parametrize("module", ["attention", "mlp"])
def test_a_module_is_worth_what_the_model_loses_when_it_returns_zeros(found, model, tokenizer, module, monkeypatch):
    search, _ = tokenize(tokenizer, cases.text(), 400).windows(24).split()
    dense = plain_loss(model, search)
    for layer, added in found.modules[module].items():
        with monkeypatch.context() as patch:
            block = model.model.layers[layer]
            if module == "mlp":
                patch.setattr(block.mlp, "forward", lambda x: torch.zeros_like(x))
            else:
                patch.setattr(
                    block.self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
                )
            assert added == pytest.approx(plain_loss(model, search) - dense, abs=2e-5)


def test_a_kind_that_enters_late_is_neither_computed_nor_read_before(found, model, tokenizer):
    """Against a loop of our own over the model's modules: the kind keeps its embeddings, and is masked as keys."""
    search, _ = tokenize(tokenizer, cases.text(), 400).windows(24).split()
    kinds = TokenKinds(model, tokenizer).of_windows(search.ids)

    def loss(kind, entry):
        total, count = 0.0, 0
        for row, valid, kind_of in zip(search.ids, search.valid, kinds, strict=True):
            ids, late = row[valid], (kind_of == KINDS.index(kind))[valid]
            x = model.model.embed_tokens(ids[None])
            t = len(ids)
            angles = model.model.rotary_emb(x, torch.arange(t)[None])
            for layer, block in enumerate(model.model.layers):
                here = ~late if layer < entry else torch.ones_like(late)
                may = torch.ones(t, t).tril().bool() & here
                bias = torch.zeros(t, t).masked_fill(~may, torch.finfo().min)[None, None]
                branch = block.self_attn(block.input_layernorm(x), position_embeddings=angles, attention_mask=bias)[0]
                some = may.any(1) & here
                x = x + branch * some[None, :, None]
                x = x + block.mlp(block.post_attention_layernorm(x)) * here[None, :, None]
            logits = model.lm_head(model.model.norm(x))[0, :-1]
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += t - 1
        return total / count

    with torch.no_grad():
        for kind, entry in (("digits", 2), ("letters", 1), ("signs", 3), ("first", 1)):
            assert found.entries[kind][entry] == pytest.approx(loss(kind, entry) - loss(kind, 0), abs=2e-5)


def test_kinds_are_told_from_the_token(model, tokenizer):
    ids = tokenizer(" cat7.\n 4", return_tensors="pt").input_ids
    names = [KINDS[i] for i in TokenKinds(model, tokenizer).of_windows(ids)[0]]
    assert names == ["first", "letters", "digits", "signs", "signs", "digits"]


def test_kinds_hold_in_decoding_too_and_leave_no_hook(model, tokenizer):
    kinds, ids = TokenKinds(model, tokenizer), tokenizer(" cat 4.", return_tensors="pt").input_ids
    with Removal().entering("digits", 2).applied(model, kinds) as run, torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        for token in tokenizer("7\n", add_special_tokens=False).input_ids:
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
        ran = run.ledger.feed(0)[0].tolist()
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=model.model.embed_tokens.weight[None, :4])
    assert ran == [True, True, False, True, False, True]


def test_counted_operations_are_those_of_the_ledger(model, tokenizer, windows):
    kinds = TokenKinds(model, tokenizer)
    flops = PrefillFlops(anatomy_of(model).shape(), kinds.of_windows(windows.ids), windows.valid)
    plans = [
        Removal(),
        Removal(attention=frozenset({1}), mlp=frozenset({0, 2})),
        Removal(mlp=frozenset({1})).entering("digits", 2).entering("letters", 1),
        Removal(frozenset(range(3)), frozenset(range(3))).entering("first", 3),
    ]
    for plan in plans:
        with plan.applied(model, kinds) as run, torch.no_grad():
            model(input_ids=windows.ids, attention_mask=windows.valid.long(), use_cache=False)
            assert flops(plan) == run.ledger.cost().prefill.total
            assert flops.dense == run.ledger.dense_cost().prefill.total
    assert flops.lowest_ratio == flops(plans[-1]) / flops.dense


def test_the_plan_keeps_the_budget_and_its_path_was_run(found):
    assert found.planned.flops_ratio <= 0.6
    assert sum(found.flops["planned"].values()) / sum(found.flops["dense"].values()) == found.planned.flops_ratio
    assert found.path[0] == found.dense
    assert found.path[-1] == found.planned
    assert found.dense.added == (0, 0, 0)
    assert all(c.flops_ratio <= 0.6 for c in found.controls)
    assert len(found.controls) == 3
    low, high = found.planned.added[1:]
    assert low < found.planned.added[0] < high
    assert found.planned.added[0] == pytest.approx(found.planned.held_out - found.dense.held_out)


@pytest.mark.parametrize("method", ["greedy", "additive"])
@pytest.mark.parametrize("budget", [1.0, 0.75, "lowest"])
def test_every_budget_is_kept_down_to_the_lowest(model, tokenizer, method, budget):
    lowest = cases.profiler(model, tokenizer).flops.lowest_ratio
    budget = math.ceil(1e4 * lowest) / 1e4 if budget == "lowest" else budget
    settings = dataclasses.replace(cases.SETTINGS, budget=budget, method=method, controls=1, repeats=0)
    found = profile(model, tokenizer, cases.text(), settings=settings)
    assert found.planned.flops_ratio <= budget
    assert found.timings == []
    assert (found.planned.name == "nothing") == (budget == 1)
    assert render(found.as_dict(), {})
    with pytest.raises(ValueError, match=r"cannot be reached.*lm_head.*give at least 0\.\d{4}"):
        cases.profiler(model, tokenizer, dataclasses.replace(settings, budget=lowest * 0.99))


def test_greedy_takes_the_cheaper_loss_and_gives_back_what_it_can(model, tokenizer, windows):
    """A made-up loss in which two modules are free alone and dear together: additive walks into it, greedy does not."""
    kinds = TokenKinds(model, tokenizer)
    flops = PrefillFlops(anatomy_of(model).shape(), kinds.of_windows(windows.ids), windows.valid)

    def loss(removal):
        both = {0, 1} <= removal.mlp
        return len(removal.attention) * 0.5 + (0.01 in removal.mlp) + (2 in removal.mlp) * 0.4 + 9.0 * both

    alone = {(m, i): loss(Removal().without(m, i)) for m in ("attention", "mlp") for i in range(3)}
    search = Search(flops, 3, [], loss, alone, [])
    ends = {method: list(search.path(0.6, method, 6))[-1] for method in ("greedy", "additive")}
    assert not {0, 1} <= ends["greedy"].mlp
    assert {0, 1} <= ends["additive"].mlp or loss(ends["additive"]) >= loss(ends["greedy"])
    for end in ends.values():
        back = [r for r in end.put_back() if flops(r) <= 0.6 * flops.dense]
        assert all(loss(r) >= loss(end) for r in back)


def test_a_random_control_costs_what_the_plan_costs(model, tokenizer, windows):
    kinds = TokenKinds(model, tokenizer)
    flops = PrefillFlops(anatomy_of(model).shape(), kinds.of_windows(windows.ids), windows.valid)
    search = Search(flops, 3, KINDS, lambda removal: 0.0, {}, [1, 2, 3])
    matched = round(0.58 * flops.dense)
    drawn = [search.at_random(0.6, matched, seed) for seed in range(3)]
    assert all(abs(flops(r) - matched) <= 0.02 * flops.dense and flops(r) <= 0.6 * flops.dense for r in drawn)
    assert len(set(drawn)) > 1
    assert drawn[0] == search.at_random(0.6, matched, 0)


def test_what_is_reported_was_not_chosen_on(model, tokenizer):
    material = cases.profiler(model, tokenizer).material
    text, window = list(material.source.ids), material.search.length
    spans = {
        name: {
            (2 * i + odd) * (window - 1) + j for i in range(len(split)) for j in range(int(split.valid[i, 1:].sum()))
        }
        for name, split, odd in (("chosen", material.search, 0), ("held", material.held_out, 1))
    }
    assert spans["chosen"].isdisjoint(spans["held"])
    assert spans["chosen"] | spans["held"] == set(range(len(text)))
    for split, odd in ((material.search, 0), (material.held_out, 1)):
        for i in range(len(split)):
            start = (2 * i + odd) * (window - 1)
            predicted = split.ids[i, 1:][split.valid[i, 1:]].tolist()
            assert predicted == text[start : start + len(predicted)]


def test_a_second_run_measures_nothing(model, tokenizer, tmp_path):
    path = tmp_path / "m.jsonl"
    told = []
    first = profile(
        model, tokenizer, cases.text(), settings=cases.SETTINGS, measurements=path, on_step=lambda *a: told.append(a)
    )
    assert first.measured == len(path.read_text().splitlines()) > 20
    assert {phase for phase, _, _ in told} == {"sensitivity", "search", "control", "speed"}
    assert all(0 <= done <= 1 for _, done, _ in told)
    again = profile(model, tokenizer, cases.text(), settings=cases.SETTINGS, measurements=path)
    assert again.measured == 0
    assert dataclasses.replace(again, seconds=0, measured=0) == dataclasses.replace(first, seconds=0, measured=0)
    # Another budget finds the sensitivities; another model or text finds nothing.
    other = dataclasses.replace(cases.SETTINGS, budget=0.8, repeats=0)
    assert profile(model, tokenizer, cases.text(), settings=other, measurements=path).measured < 20
    assert profile(cases.model(1), tokenizer, cases.text(), settings=other, measurements=path).measured > 20
    assert profile(model, tokenizer, cases.text(seed=1), settings=other, measurements=path).measured > 20


def test_an_interrupted_run_goes_on_where_it_stopped(model, tokenizer, tmp_path):
    path = tmp_path / "m.jsonl"

    def stop(phase, done, line):
        if phase == "search":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, tokenizer, cases.text(), settings=cases.SETTINGS, measurements=path, on_step=stop)
    kept = path.read_text()
    path.write_text(kept + '{"subject": "cut sho')
    second = profile(model, tokenizer, cases.text(), settings=cases.SETTINGS, measurements=path)
    assert path.read_text().startswith(kept)
    assert second.measured == len(path.read_text().splitlines()) - len(kept.splitlines()) - 1
    known = Measurements(path, json.loads(kept.splitlines()[0])["subject"])
    assert known.get("choose | nothing", lambda: pytest.fail("measured again"))["loss"] == second.dense.loss


def test_speed_is_measured_for_both_arms_with_their_operations(model, windows):
    kinds = TokenKinds(model, cases.tokenizer())
    plan = Removal(attention=frozenset({0, 1, 2}))
    timing = time_arms(model, lambda: plan.applied(model, kinds), windows.ids[:2], steps=4, repeats=2)
    assert (timing.batch, timing.prompt, timing.steps) == (2, windows.length - 4, 4)
    for spread in (*timing.prefill.values(), *timing.decode.values()):
        assert 0 < spread[1] <= spread[0] <= spread[2]
    assert timing.prefill_flops < 1
    assert timing.decode_flops < 1
    assert timing.kv_bytes["planned"] == 0 < timing.kv_bytes["dense"]
    assert 0 < timing.peak_bytes["planned"] <= timing.peak_bytes["dense"]


def test_logits_that_are_not_finite_are_explained(windows):
    broken = cases.model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"weights contain NaN.*model\.layers\.1\.mlp\.up_proj\.weight"):
        text_loss(broken, windows)
    wide = cases.model()
    with torch.no_grad():
        wide.model.layers[1].mlp.down_proj.weight.mul_(1e38)
        wide.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"NaN or infinite, first in layer 1: float32"):
        text_loss(wide, windows, SkipModules(attention=[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget 0 is not"),
        ({"budget": 1.2}, "budget 1.2 is not"),
        ({"budget": math.nan}, "budget nan is not"),
        ({"method": "magic"}, "greedy"),
        ({"width": 0}, "at least 1"),
        ({"window": 4}, "at least 8"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_a_short_text_and_a_missing_tokenizer_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="too short: it has 2 tokens"):
        profile(model, tokenizer, " cat 7")
    with pytest.raises(ValueError, match="no tokenizer"):
        profile(model, None, cases.text())


def test_a_long_text_is_used_in_part(tokenizer):
    text = cases.text(30_000)
    made = tokenize(tokenizer, text, 200)
    assert len(made.ids) == 200
    assert made.of_characters == len(text) > made.characters == len(tokenizer.decode(made.ids))
    assert len(tokenize(tokenizer, text, 10**6).ids) == len(tokenizer(text, add_special_tokens=False).input_ids)


def test_pieces_join_to_the_text(tokenizer):
    ids = tokenizer(" cat7.\n", add_special_tokens=False).input_ids
    assert pieces(tokenizer, ids) == [" cat", "7", ".", "\n"]


def test_the_painted_page_says_what_the_ledger_says(found):
    page, plan = found.painting, found.planned.plan
    assert len(page.text) == len(page.kind) == len(page.pattern) == len(page.dense) == len(page.planned)
    assert all(page.dense[start] is None for start in page.starts)
    for token, pattern in enumerate(page.pattern):
        for module, states in page.patterns[pattern].items():
            for layer, state in enumerate(states):
                entered = layer >= plan["entry"].get(page.kind[token], 0)
                assert (state == "3") == (entered and layer not in plan[module])


def test_the_report_escapes_the_text_and_asks_for_nothing(found, tmp_path):
    figures = json.loads(json.dumps(found.as_dict()))
    figures["model"]["name"] = "a/<img src=x onerror=alert(1)>"
    figures["painting"]["text"][1] = "</script><script>alert(1)</script>"
    path = tmp_path / "report.html"
    write_report(figures, {"command": "<b>"}, path)
    page = path.read_text()
    assert "<script>alert" not in page
    assert "<img src" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script") == 2
    for outside in ("http://", "https://", "url(", "@import", ' src="', '<link rel="stylesheet'):
        assert outside not in page
    assert len(page) < 1_500_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_report_leaves_the_old_one(found, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(found.as_dict(), {}, path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_plans_in_words_and_colours():
    plan = {"attention": [0, 2, 3, 4], "mlp": [1], "entry": {"first": 2}}
    assert plan_in_words(plan) == (
        "leaves out attention in layers 0, 2–4 and the MLP in layer 1, lets the first token enter at layer 2"
    )
    assert plan_in_words({"attention": [], "mlp": [], "entry": {}}) == "leaves out nothing"
    assert intensity(0, 2) == 0
    assert intensity(2, 2) == 100
    assert -100 < intensity(-0.5, 2) < 0 < intensity(0.5, 2) < intensity(1, 2)
    assert (nats(0.0001), nats(-0.05), nats(0.3), nats(20.2)) == ("0", "−0.050", "+0.30", "+20.2")
    point = {"flops_ratio": 1.0, "loss": 2.0, "held_out": 2.0}
    chart = pareto([point, {"flops_ratio": 0.99, "loss": 2.001, "held_out": 2.001}], [], 0.99, 2.0)
    assert len(chart["y_ticks"]) >= 2
    assert chart["left"] <= chart["budget"] <= chart["right"]
