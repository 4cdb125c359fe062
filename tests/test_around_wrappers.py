"""Compilers, training wrappers, autocast, threads and whatever else is put around a model."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parametrizations
from transformers import DynamicCache

import sparing
from around_cases import check_wrapped, difference, fresh, planned
from random_plans import RandomPlans
from sparing.policies import SkipModules

# torch.jit functions inside torch say this of themselves when a compiler first looks at them; and transformers prepares other
# names for checkpointing, which its oldest supported version does not have yet.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
each_executor = pytest.mark.parametrize("execute", ["dense", "gathered"])


def eager(x):
    return torch.compile(x, backend="eager")


COMPILED = {
    "torch.compile(model)": eager,
    "model.compile": lambda model: (model.compile(backend="eager"), model)[1],
    "mlp": lambda model: (setattr(model.model.layers[1], "mlp", eager(model.model.layers[1].mlp)), model)[1],
    "attention": lambda model: (
        setattr(model.model.layers[1], "self_attn", eager(model.model.layers[1].self_attn)),
        model,
    )[1],
}


@each_executor
@pytest.mark.parametrize("what", COMPILED)
@torch.no_grad()
def test_compiled(what, execute):
    """Compiled and warm before `apply`: the plan is followed inside, with two plans in turn, and the stock model is back after."""
    model, inputs = fresh()
    stock = model(**inputs).logits
    expected = [planned(fresh()[0], inputs, "gathered", RandomPlans(seed, whole=1))[0] for seed in (3, 4)]
    torch._dynamo.reset()
    outer = COMPILED[what](model)
    assert difference(outer(**inputs).logits, stock, inputs) <= 1e-5
    for seed, logits in zip((3, 4), expected, strict=True):
        with sparing.apply(model, RandomPlans(seed, whole=1), execute=execute):
            assert difference(outer(**inputs).logits, logits, inputs) <= 1e-5
            assert difference(logits, stock, inputs) > 1e-3
    assert difference(outer(**inputs).logits, stock, inputs) <= 1e-5


@each_executor
@torch.no_grad()
def test_compiled_inside(execute):
    """Compiled while it is under a plan: the plan is left to Python, since a traced one would be wrong."""
    model, inputs = fresh()
    expected = planned(fresh()[0], inputs, execute)[0]
    torch._dynamo.reset()
    with sparing.apply(model, RandomPlans(3), execute=execute):
        assert difference(eager(model)(**inputs).logits, expected, inputs) <= 1e-5


@each_executor
def test_caches_that_hold_no_plan_are_refused(execute):
    model, inputs = fresh()
    with sparing.apply(model, SkipModules([1]), execute=execute), pytest.raises(ValueError, match="offloading Dynamic"):
        model(**inputs, past_key_values=DynamicCache(offloading=True))
    with sparing.apply(model, SkipModules([1]), execute=execute), pytest.raises(ValueError, match="StaticCache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


@each_executor
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, execute):
    """Refused while training, with a cache and without; off in eval mode, where transformers does not checkpoint either."""
    model, inputs = fresh()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with sparing.apply(model, RandomPlans(3), execute=execute):
        expected = model(**inputs).logits
        model.train()
        for use_cache in (True, False):
            with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
                model(**inputs, use_cache=use_cache)
        model.gradient_checkpointing_disable()
        assert difference(model(**inputs, use_cache=False).logits, expected, inputs) <= 1e-5


@each_executor
def test_distributed(execute, tmp_path):
    """DDP follows the model inside it; FSDP by layers is for `dense`; DataParallel and the wrappers themselves are refused."""
    inputs = fresh()[1]
    with torch.no_grad():
        expected = planned(fresh()[0], inputs, execute)[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fresh()[0]
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="model.module"):
            sparing.apply(wrapped, RandomPlans(3), execute=execute)
        with sparing.apply(model, RandomPlans(3), execute=execute):
            logits = wrapped(**inputs).logits
        logits.square().mean().backward()
        assert difference(logits.detach(), expected, inputs) <= 1e-5
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = fresh()[0]
        dist.fsdp.fully_shard(model, mesh=mesh)
        with torch.no_grad(), sparing.apply(model, RandomPlans(3), execute=execute):
            assert difference(model(**inputs).logits, expected, inputs) <= 1e-5
        model = fresh()[0]
        for layer in model.model.layers:
            dist.fsdp.fully_shard(layer, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
        if execute == "gathered":
            with pytest.raises(ValueError, match="sharded by FSDP"):
                sparing.apply(model, RandomPlans(3), execute=execute)
        else:
            with torch.no_grad(), sparing.apply(model, RandomPlans(3), execute=execute):
                assert difference(model(**inputs).logits, expected, inputs) <= 1e-5
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match="model.module"):
        sparing.apply(torch.nn.DataParallel(fresh()[0]), RandomPlans(3), execute=execute)


class Waiting(RandomPlans):
    """Stops in the first layer until told to go on."""

    def __init__(self):
        super().__init__(3)
        self.inside, self.go = threading.Event(), threading.Event()

    def plan_attend(self, view):
        self.inside.set()
        assert self.go.wait(30)
        return super().plan_attend(view)


@each_executor
def test_a_second_thread_is_refused(execute):
    """While one pass is under way another thread's would mix with it; the first one is not disturbed."""
    model, inputs = fresh()
    expected, policy, found = planned(fresh()[0], inputs, execute)[0], Waiting(), []
    with sparing.apply(model, policy, execute=execute):

        def run():
            with torch.no_grad():
                found.append(model(**inputs).logits)

        thread = threading.Thread(target=run)
        thread.start()
        assert policy.inside.wait(30)
        try:
            with pytest.raises(ValueError, match="another thread"):
                model(**inputs)
        finally:
            policy.go.set()
            thread.join()
        assert difference(found[0], expected, inputs) <= 1e-5
        with torch.no_grad():
            assert difference(model(**inputs).logits, expected, inputs) <= 1e-5


def test_parametrised_weights():
    model, inputs = fresh()
    for layer in model.model.layers:
        for linear in (layer.mlp.up_proj, layer.self_attn.q_proj):
            parametrizations.weight_norm(linear)
    check_wrapped(model, inputs)


@torch.no_grad()
def test_autocast_and_inference_mode():
    """bf16 autocast agrees to bf16's precision; a cache made in inference mode goes on outside it."""
    model, inputs = fresh()
    with torch.autocast("cpu", torch.bfloat16):
        dense, fast = (planned(model, inputs, execute)[0] for execute in ("dense", "gathered"))
    assert fast.dtype == torch.bfloat16
    assert difference(fast, dense, inputs) <= 4e-2
    with sparing.apply(model, RandomPlans(3)):
        expected = model(**inputs, use_cache=True)
        with torch.inference_mode():
            out = model(**inputs, use_cache=True)
        assert torch.equal(out.logits, expected.logits)
        more = inputs["input_ids"][:, -1:]
        a, b = (model(more, past_key_values=x.past_key_values).logits for x in (out, expected))
        assert torch.equal(a, b)


@torch.no_grad()
def test_which_forward_hooks_fire():
    """`dense` calls every module; `gathered` calls norms, projections and MLPs, but no attention module and no layer."""
    for execute, silent in (("dense", set()), ("gathered", {"layer", "attention"})):
        model, inputs = fresh()
        layer, fired = model.model.layers[1], set()
        parts = {"layer": layer, "attention": layer.self_attn, "projection": layer.self_attn.q_proj, "mlp": layer.mlp}
        parts |= {"norm": layer.input_layernorm, "decoder": model.model, "model": model}
        for name, part in parts.items():
            part.register_forward_hook(lambda *_, name=name, fired=fired: fired.add(name))
        with sparing.apply(model, execute=execute, force=True):
            model(**inputs)
        assert fired == set(parts) - silent


class OwnAttention(type(fresh()[0].model.layers[0].self_attn)):
    """Halves what the family's attention gives."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out / 2, weights


@torch.no_grad()
def test_attention_of_another_class():
    """`gathered` would compute the family's attention instead, and refuses; `dense` calls it."""
    model, inputs = fresh()
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(ValueError, match="a forward of its own"):
        sparing.apply(model, SkipModules([0]))
    with sparing.apply(model, execute="dense", force=True):
        own = model(**inputs).logits
    assert torch.equal(own, model(**inputs).logits)
    assert difference(own, fresh()[0](**inputs).logits, inputs) > 1e-3
