"""Layers in which text reads pictures: their scores against the equations in plain PyTorch, budgets, controls, and what they cost."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F

import picture_cases
import processors
import sparing
from sparing.anatomy import anatomy_of
from sparing.evaluate import PictureMaterial, read_questions
from sparing.evaluate.reading_layers import (
    Budget,
    VisualCost,
    added_features,
    choose_layers,
    measurements_of,
    placed_layers,
)
from sparing.lens import module_changes, record
from sparing.policies import EnterLate, ViCA
from sparing.tokens import Group, TokenMap

DEPTH = 3


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = picture_cases.folder(tmp_path_factory.mktemp("pictures"))
    return PictureMaterial(*processors.family("llava"), read_questions(folder))


@contextlib.contextmanager
def without_reading(model, layer, tokens):
    """By hand: text rows of one layer's mask get minus infinity at pictures. Eager attention adds the mask to the scores."""
    text, image = tokens.of(Group.TEXT), tokens.of(Group.IMAGE)

    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[(text[:, :, None] & image[:, None, :])[:, None]] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "attention_mask": mask}

    attention = model.model.language_model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def test_kl_is_that_of_the_output_when_text_stops_reading_in_one_layer(material):
    model = material.model
    found = choose_layers(material, "kl", Budget(layers=1)).scores["kl"]
    expected, tokens = torch.zeros(DEPTH, dtype=torch.float64), 0
    model.set_attn_implementation("eager")
    try:
        for batch in material.batches("choose"):
            groups = TokenMap.from_inputs(model, batch.inputs)
            clean = model(**batch.inputs).logits[:, :-1][batch.scored].log_softmax(-1)
            tokens += len(clean)
            for layer in range(DEPTH):
                with without_reading(model, layer, groups):
                    blind = model(**batch.inputs).logits[:, :-1][batch.scored].log_softmax(-1)
                # sum p (log p - log q)
                expected[layer] += F.kl_div(blind, clean, log_target=True, reduction="sum").double()
    finally:
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected / tokens, rtol=1e-4, atol=1e-6)
    assert len(set(found)) == DEPTH


@torch.no_grad()
@pytest.mark.parametrize("group", [Group.TEXT, Group.IMAGE])
def test_cosines_are_those_of_the_residual_around_each_module(material, group):
    model = material.model
    model(**next(material.batches("choose")).inputs, output_hidden_states=True)  # transformers puts its own hooks there
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    sums, count = torch.zeros(2, DEPTH, dtype=torch.float64), 0
    with module_changes(model, [group]) as changes:
        for batch in itertools.islice(material.batches("choose"), 2):
            with changes.of(TokenMap.from_inputs(model, batch.inputs)):
                model(**batch.inputs)
    for batch in itertools.islice(material.batches("choose"), 2):
        kept = record(model, batch.inputs, where=group, middle=True)
        for layer in range(DEPTH):
            entered, between, left = kept.states[layer], kept.middle[layer], kept.states[layer + 1]
            for module, (a, b) in enumerate(((entered, between), (between, left))):
                cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                sums[module, layer] += cosine.sum().double()
        count += kept.states.shape[1]
    for module, expected in zip(("attention", "mlp"), sums / count, strict=True):
        torch.testing.assert_close(changes.cosine(group, module), expected, rtol=1e-5, atol=1e-6)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_score_is_one_minus_the_cosine_of_text_around_attention(material):
    chosen = choose_layers(material, "cosine", Budget(layers=2))
    assert chosen.scores["cosine"] == [1 - c for c in chosen.cosine["text attention"]]
    best = sorted(range(DEPTH), key=lambda layer: -chosen.scores["cosine"][layer])[:2]
    assert chosen.order == tuple(best)
    assert chosen.layers == tuple(sorted(best))


def test_greedy_takes_the_layer_that_leaves_the_lowest_loss(material):
    found = choose_layers(material, "greedy", Budget(layers=2), prefix="freeze")
    taken, steps = [], []
    for _ in range(3):
        policy = ViCA(sorted(taken), "freeze", blind=not taken)
        total, n = 0.0, 0
        with sparing.apply(material.model, policy, execute="dense"), torch.no_grad():
            for batch in material.batches("choose"):
                logits = material.model(**batch.inputs, use_cache=False).logits[:, :-1]
                total += float(F.cross_entropy(logits[batch.scored], batch.targets[batch.scored], reduction="sum"))
                n += int(batch.scored.sum())
        steps.append(total / n)
        if len(taken) < 2:
            losses = {
                layer: material.loss_under("choose", ViCA([*taken, layer], "freeze")).mean
                for layer in range(DEPTH)
                if layer not in taken
            }
            taken.append(min(losses, key=losses.__getitem__))
    assert found.order == tuple(taken)
    assert found.steps == pytest.approx(steps, rel=1e-5)


def test_visual_operations_are_what_the_ledger_counts_beyond_text(material):
    def counted(*policies):
        total = 0
        for split in ("choose", "report"):
            for batch in material.batches(split):
                with sparing.apply(material.model, *policies, force=True) as run, torch.no_grad():
                    material.model(**batch.inputs, use_cache=False)
                    total += run.ledger.cost().prefill.total
        return total

    text, dense = counted(EnterLate(DEPTH)), counted()
    share = (counted(ViCA([0, 2])) - text) / (dense - text)
    assert VisualCost(material).share([0, 2]) == pytest.approx(share, rel=1e-9)
    assert choose_layers(material, "first", Budget(layers=2)).share < VisualCost(material).share(range(DEPTH)) < 1


def test_a_share_is_filled_and_a_number_is_exact(material):
    cost = VisualCost(material)
    two = cost.share([0, 1])
    found = choose_layers(material, "cosine", Budget(share=two + 1e-9))
    assert len(found.layers) == 2
    assert found.share <= two + 1e-9
    with pytest.raises(ValueError, match="the model would be blind: reading pictures in one layer takes"):
        choose_layers(material, "cosine", Budget(share=cost.share([0]) / 2))
    with pytest.raises(ValueError, match="a budget of 4 layers is more than the model's 3"):
        choose_layers(material, "kl", Budget(layers=4))
    none = choose_layers(material, "greedy", Budget(layers=0))
    assert none.policy().blind
    assert none.share == 0.0
    with pytest.raises(ValueError, match="chosen by greedy, kl"):
        choose_layers(material, "luck", Budget(layers=1))


def test_equal_runs_choose_alike_and_go_on_from_what_was_measured(material, tmp_path):
    path = tmp_path / "m.jsonl"
    store = measurements_of(material, path)
    first = choose_layers(material, "greedy", Budget(layers=2), store=store)
    assert store.taken
    again = measurements_of(material, path)
    assert choose_layers(material, "greedy", Budget(layers=2), store=again) == first
    assert again.taken == 0
    assert choose_layers(material, "random", Budget(layers=2), seed=1) == choose_layers(
        material, "random", Budget(layers=2), seed=1
    )


def test_layers_without_looking():
    assert placed_layers(8, 3, "first") == (0, 1, 2)
    assert placed_layers(8, 3, "last") == (5, 6, 7)
    assert placed_layers(8, 4, "uniform") == (1, 3, 5, 7)
    assert placed_layers(8, 1, "uniform") == (4,)
    assert placed_layers(8, 8, "uniform") == tuple(range(8))
    drawn = {placed_layers(32, 4, "random", seed) for seed in range(5)}
    assert len(drawn) == 5
    assert all(len(set(layers)) == 4 and layers == tuple(sorted(layers)) for layers in drawn)


@pytest.mark.parametrize(
    ("text", "budget"), [("4", Budget(layers=4)), (0, Budget(layers=0)), ("5%", Budget(share=0.05)), ("2.5 %", None)]
)
def test_budgets_are_read(text, budget):
    assert Budget.of(text) == (budget or Budget(share=0.025))


@pytest.mark.parametrize("text", ["", "half", "-1", "0%", "101%", "0.05"])
def test_strange_budgets_are_refused(text):
    with pytest.raises(ValueError, match="neither a number of layers"):
        Budget.of(text)


def test_features_that_a_model_adds_between_layers_are_named():
    assert added_features(anatomy_of(processors.family("llava")[0])) is None
    said = added_features(anatomy_of(processors.family("qwen3_vl")[0]))
    assert "qwen3_vl adds features of its encoder to the visual tokens after layers 0, 1" in said
