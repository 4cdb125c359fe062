"""Layers with a window: stock caches where nothing is planned, bounded ragged ones, later turns, cropping, costs."""

import pytest
import torch
from transformers import DynamicCache

import sparing
from models import TEXT_FAMILIES, WINDOW, text_batch, text_family
from sparing.anatomy import anatomy_of
from sparing.policies import SkipModules
from test_parity import TOLERANCE, relative

EXECUTORS = ("dense", "gathered")
WINDOWED = [name for name, (_, extra) in TEXT_FAMILIES.items() if extra.get("sliding_window")]


@pytest.mark.parametrize("name", WINDOWED)
def test_idle_caches_are_stock(name):
    """Where nothing is planned, the cache has the stock kinds of layers, and holds what they hold."""
    model, inputs = text_family(name), text_batch("none")
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
        for execute in EXECUTORS:
            for given in ({}, {"past_key_values": DynamicCache(config=model.config)}):
                with sparing.apply(model, execute=execute):
                    ours = model(**inputs, use_cache=True, **given).past_key_values
                for a, b in zip(ours.layers, stock.layers, strict=True):
                    assert type(a) is type(b)
                    assert torch.equal(a.keys, b.keys)
                with pytest.raises(ValueError, match=f"window of {WINDOW} tokens"):
                    ours.crop(-3)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_in_the_ledger_and_the_cache(name):
    """Pairs within the window are counted; keys before it are neither counted at the end nor held for long."""
    model, ids = text_family(name), text_batch("none")["input_ids"]
    steps, b, t = 13, *ids.shape
    shape = anatomy_of(model).shape()
    with torch.no_grad(), sparing.apply(model, SkipModules(mlp=[0])) as run:
        cache = model(ids, use_cache=True).past_key_values
        for _ in range(steps):
            model(ids[:, :1], past_key_values=cache)
        cost = run.ledger.cost()
        pairs, kept = 0, 0
        for layer, sizes in zip(cache.layers, shape.layers, strict=True):
            window = sizes.window or t + steps
            pairs += sum(min(i + 1, window) for i in range(t + steps)) * b * sizes.pair_flops
            kept += min(t + steps, window - 1 if sizes.window else t + steps) * b * sizes.kv_width * 4
            assert layer.keys.shape[-2] <= (2 * WINDOW + 1 if sizes.window else t + steps)
            assert cache.get_seq_length() == t + steps
        assert cost.flops["attention_scores"] == pairs
        assert cost.kv_bytes == kept
        with pytest.raises(ValueError, match=f"crop.*window of {WINDOW} tokens"):
            cache.crop(-steps)


@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("name", ["mistral", "gemma3", "qwen2"])
def test_a_plan_that_begins_at_a_later_turn(name, execute):
    """The stock cache of the turns before has let go what lies before its windows."""

    class Late(sparing.Policy):
        def idle(self, tokens):
            return tokens.length > 4

        def plan_attend(self, view):
            return sparing.LayerPlan(feed=view.new.valid)

    model, ids = text_family(name), text_batch("none")["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        stock = model(ids[:, :3], past_key_values=cache).logits
        with sparing.apply(model, Late(), execute=execute):
            cache = model(ids, use_cache=True).past_key_values
            assert cache.layers[-1].is_sliding
            later = model(ids[:, :3], past_key_values=cache).logits
            assert not any(layer.is_sliding for layer in cache.layers)
            with pytest.raises(ValueError, match="window"):
                cache.crop(-4)
    assert relative(later, stock, torch.ones(later.shape[:2])) <= TOLERANCE


@pytest.mark.parametrize("name", WINDOWED)
def test_scores_after_the_cache_let_go(name):
    """Chunk after chunk, a policy that looks back is told the same of every key in the window by both executors."""

    class LookBack(sparing.Policy):
        looks_back = True

        def __init__(self):
            self.seen = []

        def plan_feed(self, view):
            b, t = view.new.group.shape
            self.seen.append(view.scores(torch.arange(t).expand(b, t)))
            return sparing.LayerPlan()

    model, ids = text_family(name), text_batch("none")["input_ids"]
    found = []
    for execute in EXECUTORS:
        policy, cache = LookBack(), DynamicCache()
        with torch.no_grad(), sparing.apply(model, policy, execute=execute):
            for chunk in (ids, ids[:, :1], ids[:, :7], ids[:, 3:4], ids[:, 2:9]):
                model(chunk, past_key_values=cache)
        found.append(policy.seen)
    assert len(found[0]) == len(found[1]) > 0
    for dense, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast.sum(-1), torch.ones_like(fast.sum(-1)))
        torch.testing.assert_close(fast, dense, rtol=1e-4, atol=1e-6)


def test_crop_within_what_is_held():
    """Cropping is exact while the keys of the shorter window are still there."""
    model, ids = text_family("mistral"), text_batch("none")["input_ids"]
    for execute in EXECUTORS:
        with torch.no_grad(), sparing.apply(model, SkipModules(mlp=[1]), execute=execute):
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :2], past_key_values=cache)
            expected = model(ids[:, 2:5], past_key_values=cache).logits
            cache.crop(-3)
            again = model(ids[:, 2:5], past_key_values=cache).logits
        torch.testing.assert_close(again, expected)
