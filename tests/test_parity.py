"""Design tests 1-3: identity, parity of the two executors on random plans, and mutations that parity must notice."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparing
from models import CASES, llama, llava, llava_batch, text_batch
from random_plans import RandomPlans

TOLERANCE = 1e-5


def relative(a, b, mask):
    """Largest difference on valid positions, relative to the largest value."""
    mask = mask.bool()
    return ((a - b)[mask].abs().max() / b[mask].abs().max()).item()


def marks(model):
    """Everything that could be left on a model: attributes and hooks of every module."""
    return {
        name: (set(module.__dict__), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def decode(model, run_inputs, execute, policy, extra):
    """Logits of a prompt, then of a chunk of three and of single tokens, all through the cache."""
    with torch.no_grad(), sparing.apply(model, policy, execute=execute) as run:
        out = model(**run_inputs, use_cache=True)
        logits = [out.logits]
        mask = run_inputs["attention_mask"]
        position = mask.sum(1, keepdim=True)
        for chunk in (extra[:, :3], *extra[:, 3:].split(1, dim=1)):
            n = chunk.shape[1]
            mask = torch.cat([mask, torch.ones(len(mask), n, dtype=mask.dtype)], dim=1)
            ids = position + torch.arange(n)
            position = position + n
            out = model(chunk, attention_mask=mask, position_ids=ids, past_key_values=out.past_key_values)
            logits.append(out.logits)
        return logits, run.ledger


@pytest.mark.parametrize("execute", ["dense", "gathered"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("build", "batch"), CASES)
def test_identity(build, batch, execute, attention):
    """No policy: the same bits as stock; forced through the executor: the same numbers; and nothing is left behind."""
    model, inputs = build(attention), batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        before = marks(model)
        with sparing.apply(model, execute=execute) as run:
            assert torch.equal(model(**inputs).logits, stock)
        assert run.ledger.cost() == run.ledger.dense_cost()
        with sparing.apply(model, execute=execute, force=True):
            forced = model(**inputs).logits
        assert relative(forced, stock, inputs["attention_mask"]) <= TOLERANCE
        assert torch.equal(model(**inputs).logits, stock)
    assert marks(model) == before


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    case=st.sampled_from(range(len(CASES))),
    side=st.sampled_from(["left", "right", "none"]),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    weights=st.booleans(),
    sees=st.booleans(),
    promise=st.booleans(),
    attention=st.sampled_from(["sdpa", "sdpa", "eager"]),
)
def test_random_plans(seed, case, side, share, weights, sees, promise, attention):
    """Any plan: dense and gathered agree in prefill, in a cached chunk and in single steps, and count the same."""
    build, batch = CASES[case]
    model, inputs = build(attention), batch(side)
    policy = RandomPlans(seed, share, weights, sees=sees, promise=promise)
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 6), generator=torch.Generator().manual_seed(seed))
    dense, dense_ledger = decode(model, inputs, "dense", policy, extra)
    fast, fast_ledger = decode(model, inputs, "gathered", policy, extra)
    mask = inputs["attention_mask"]
    assert relative(fast[0], dense[0], mask) <= TOLERANCE
    for a, b in zip(fast[1:], dense[1:], strict=True):
        assert relative(a, b, torch.ones(a.shape[:2])) <= TOLERANCE
    assert fast_ledger.cost() == dense_ledger.cost()
    assert torch.equal(fast_ledger.states(), dense_ledger.states())


@pytest.mark.parametrize("field", ["attend", "feed", "read"])
@pytest.mark.parametrize("layer", [0, 1])
def test_mutation_of_one_token(field, layer):
    """One flipped token in one layer must show."""
    model, inputs = llama("sdpa"), text_batch("left")
    row, token = 1, 9
    right, wrong = (
        RandomPlans(3, 0.7, weights=False, sees=False, whole=0, flip=flip)
        for flip in (None, (layer, field, row, token))
    )
    with torch.no_grad():
        with sparing.apply(model, right, execute="dense"):
            dense = model(**inputs).logits
        with sparing.apply(model, wrong, execute="gathered"):
            fast = model(**inputs).logits
    assert relative(fast, dense, inputs["attention_mask"]) > 10 * TOLERANCE


def test_mutation_of_one_position():
    """One wrong position must show."""
    model, inputs = llama("sdpa"), text_batch("none")
    ids = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]).clone()
    policy = RandomPlans(5, 0.7, weights=False, sees=False)
    with torch.no_grad():
        with sparing.apply(model, policy, execute="dense"):
            dense = model(**inputs, position_ids=ids).logits
        ids[0, 7] += 1
        with sparing.apply(model, policy, execute="gathered"):
            fast = model(**inputs, position_ids=ids).logits
    assert relative(fast, dense, inputs["attention_mask"]) > 10 * TOLERANCE


def test_bfloat16():
    """In bf16 the executors agree to bf16's own precision, in prefill and decode."""
    # A copy: rounding the shared model would not be undone by going back to fp32.
    model, inputs = copy.deepcopy(llava("sdpa")).to(torch.bfloat16), llava_batch("left")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    policy = RandomPlans(11, 0.7)
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 6), generator=torch.Generator().manual_seed(0))
    dense, _ = decode(model, inputs, "dense", policy, extra)
    fast, _ = decode(model, inputs, "gathered", policy, extra)
    for i, (a, b) in enumerate(zip(fast, dense, strict=True)):
        assert a.dtype == torch.bfloat16
        mask = inputs["attention_mask"] if i == 0 else torch.ones(a.shape[:2])
        assert relative(a.float(), b.float(), mask) <= 4e-2


def test_gradients_reach_inputs_alike():
    """With decisions fixed, the fast executor's gradients are those of dense."""
    model, inputs = llava("sdpa"), llava_batch("right")
    grads = []
    for execute in ("dense", "gathered"):
        model.zero_grad()
        with sparing.apply(model, RandomPlans(7, 0.6), execute=execute):
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert any(g.abs().max() > 0 for g in grads[0].values())
    for name in grads[0].keys() | grads[1].keys():
        a, b = (g.get(name, torch.zeros(())) for g in grads)
        assert (a - b).abs().max() <= 1e-4 * max(b.abs().max().item(), 1e-4), name


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_queries(seed, monkeypatch):
    """Long prompts ask attention in blocks; small ones do here."""
    monkeypatch.setattr("sparing.execute.rows.BLOCK", 4)

    class Dense(RandomPlans):
        def plan_attend(self, view):
            return dataclasses.replace(super().plan_attend(view), read=True)

    for build, batch in CASES:
        model, inputs = build("sdpa"), batch("left")
        policy = Dense(seed, 0.5, sees=seed % 2 == 1)
        extra = torch.randint(3, 90, (len(inputs["input_ids"]), 6), generator=torch.Generator().manual_seed(seed))
        dense, _ = decode(model, inputs, "dense", policy, extra)
        fast, _ = decode(model, inputs, "gathered", policy, extra)
        unpadded = {**batch("none"), "use_cache": False}
        for a, b in zip(fast, dense, strict=True):
            mask = inputs["attention_mask"] if a is fast[0] else torch.ones(a.shape[:2])
            assert relative(a, b, mask) <= TOLERANCE
        with torch.no_grad():
            found = []
            for execute in ("dense", "gathered"):
                with sparing.apply(model, policy, execute=execute):
                    found.append(model(**unpadded).logits)
        assert relative(found[1], found[0], unpadded["attention_mask"]) <= TOLERANCE


class FixedMasks(sparing.Policy):
    """Two masks a layer, drawn beforehand: deciding itself waits for nothing."""

    def __init__(self, promise):
        generator = torch.Generator().manual_seed(5)
        self.masks = [torch.rand(2, 3, 17, generator=generator) < 0.6 for _ in range(3)]
        self.bounds = [int(m.sum(-1).max()) for m in self.masks] if promise else [None] * 3

    def plan_attend(self, view):
        attend, feed = self.masks[view.layer]
        return sparing.LayerPlan(attend=attend, feed=feed, capacity=self.bounds[view.layer])


@pytest.mark.parametrize(("promise", "waits"), [(False, 6), (True, 0)])
def test_waits_for_the_device(monkeypatch, promise, waits):
    """At most one transfer to the host a decision; none with a promised capacity."""
    seen = []
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero", "cpu"):
        stock = getattr(torch.Tensor, name)

        def counted(self, *args, _stock=stock, _name=name, **kwargs):
            seen.append(_name)
            return _stock(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model, ids = llama(), text_batch("none")["input_ids"]
    policy = FixedMasks(promise)
    with torch.no_grad(), sparing.apply(model, policy):
        tokens = sparing.TokenMap.from_inputs(model, {"input_ids": ids})
    with torch.no_grad(), sparing.apply(model, policy, tokens=tokens):
        seen.clear()
        model.model(input_ids=ids)
        assert len(seen) == waits, seen
