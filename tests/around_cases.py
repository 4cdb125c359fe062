"""One measure for whatever is wrapped around a model: stock bits when idle, both executors alike, cached generation, equal counts."""

import copy

import torch

import sparing
from models import llama, llava, llava_batch, text_batch, text_family
from random_plans import RandomPlans

EXECUTORS = ("dense", "gathered")
BUILDS = {
    "llama": (llama, text_batch),
    "llava": (llava, llava_batch),
    "phi3": (lambda: text_family("phi3"), text_batch),
    "qwen3-moe": (lambda: text_family("qwen3-moe"), text_batch),
    "gemma3": (lambda: text_family("gemma3"), text_batch),
}


def fresh(name="llama"):
    """A copy that a test may wrap, and a left-padded batch for it."""
    build, batch = BUILDS[name]
    return copy.deepcopy(build()), batch("left")


def difference(a, b, inputs):
    """Largest difference on valid positions, relative to the largest value."""
    mask = inputs["attention_mask"].bool()
    a, b = a[:, -mask.shape[1] :][mask].float(), b[:, -mask.shape[1] :][mask].float()
    return ((a - b).abs().max() / b.abs().max()).item()


def planned(model, inputs, execute, policy=None, through=None):
    """Logits of a prompt and what greedy decoding adds, under a policy; and what it cost."""
    through = model if through is None else through
    with torch.no_grad(), sparing.apply(model, policy or RandomPlans(3), execute=execute) as run:
        logits = through(**inputs).logits
        cost = run.ledger.cost()
        return logits, through.generate(**inputs, max_new_tokens=4, do_sample=False), cost


@torch.no_grad()
def check_wrapped(model, inputs, tolerance=1e-5, policy=None):
    """Identity, both executors forced over everything, parity under a plan, generation, and counts."""
    stock = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with sparing.apply(model):
        assert torch.equal(model(**inputs).logits, stock)
    for execute in EXECUTORS:
        with sparing.apply(model, execute=execute, force=True):
            assert difference(model(**inputs).logits, stock, inputs) <= tolerance
            made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            assert tolerance > 1e-5 or torch.equal(made, tokens)
    (dense, dense_ids, dense_cost), (fast, fast_ids, fast_cost) = (
        planned(model, inputs, execute, policy) for execute in EXECUTORS
    )
    assert difference(fast, dense, inputs) <= tolerance
    assert difference(dense, stock, inputs) > 2 * tolerance, "the plan did nothing"
    assert tolerance > 1e-5 or torch.equal(dense_ids, fast_ids)
    assert dense_cost == fast_cost
    assert torch.equal(model(**inputs).logits, stock)
