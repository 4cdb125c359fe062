"""ViCA trained through the fast executor: its gradients are those of the dense one, projector included."""

import copy

import pytest
import torch

import sparing
from models import llava, llava_batch, text_family
from sparing.policies import ViCA
from vision_models import FAMILIES, IMAGE

TOLERANCE = 1e-4
BATCHES = {"llava": (llava, llava_batch), **FAMILIES}


def gradients(model, inputs, policy, execute):
    """Loss of a training step, and the gradient of every weight that has one."""
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    model.zero_grad()
    with sparing.apply(model, policy, execute=execute):
        loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", [ViCA([0, 2]), ViCA([1], prefix="freeze")], ids=repr)
@pytest.mark.parametrize("family", BATCHES)
def test_gradients_equal_dense(family, policy):
    """Labels, padding, rows of two pictures, none, one and one; decoder, projector and encoder."""
    build, batch = BATCHES[family]
    model, inputs = copy.deepcopy(build()), batch("right")
    # Dropout would draw differently; what trains does not depend on the mode.
    (loss, dense), (other, fast) = (gradients(model, inputs, policy, execute) for execute in ("dense", "gathered"))
    assert abs(loss - other) <= 1e-5 * loss
    projector = [name for module in sparing.anatomy.anatomy_of(model).projector for name in names_in(model, module)]
    assert projector
    assert all(fast[name].abs().max() > 0 for name in projector if name in dense and dense[name].abs().max() > 0)
    assert any(dense[name].abs().max() > 0 for name in projector if name in dense)
    largest = max(grad.abs().max().item() for grad in dense.values())
    for name in dense.keys() | fast.keys():
        a, b = (found.get(name, torch.zeros(())) for found in (fast, dense))
        assert (a - b).abs().max() <= TOLERANCE * max(b.abs().max().item(), 1e-2 * largest), name


def names_in(model, module):
    inside = {id(p) for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in inside]


def test_unpadded_prompts_share_a_norm_and_its_gradient():
    """The picture is normalised once for all reading layers; its gradient comes through each of them."""
    model, inputs = copy.deepcopy(llava()), llava_batch("none")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.input_layernorm.weight.add_(torch.randn(42, generator=torch.Generator().manual_seed(0)) * 0.3)
    (loss, dense), (other, fast) = (
        gradients(model, inputs, ViCA([0, 1, 3]), execute) for execute in ("dense", "gathered")
    )
    assert abs(loss - other) <= 1e-5 * loss
    for name, grad in dense.items():
        assert (fast[name] - grad).abs().max() <= TOLERANCE * max(grad.abs().max().item(), 1e-4), name


def test_a_norm_that_something_hangs_on_is_called():
    """Hooks on a norm, and norms of their own kinds, are left to the modules."""
    model, inputs = llava(), llava_batch("none")
    anatomy = sparing.anatomy.anatomy_of(model)
    assert anatomy.shares_norms
    with torch.no_grad(), sparing.apply(model, ViCA([0, 2])):
        plain = model(**inputs).logits
    norm, seen = anatomy.attention_norm(2), []
    hook = norm.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]) or 2 * out)
    with torch.no_grad(), sparing.apply(model, ViCA([0, 2])):
        changed = model(**inputs).logits
    hook.remove()
    assert max(seen) == inputs["input_ids"].shape[1]
    assert (changed - plain).abs().max() > 1e-3
    assert not sparing.anatomy.anatomy_of(text_family("gemma2")).shares_norms
    odd = copy.deepcopy(model)
    odd.model.language_model.layers[1].input_layernorm.variance_epsilon = 1e-2
    assert not sparing.anatomy.anatomy_of(odd).shares_norms
