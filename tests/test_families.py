"""Text families: identity, parity and mutations as for Llama, and what is special about each (windows, caps, experts, ...)."""

import copy
import sys

import pytest
import torch
import transformers

import sparing
from models import IMAGE, SIZES, TEXT_FAMILIES, llava_batch, text_batch, text_family
from policy_cases import CASES
from random_plans import RandomPlans
from sparing.anatomy import Anatomy, anatomy_of
from sparing.execute import check_policy
from sparing.policies import SkipModules
from test_parity import TOLERANCE, decode, marks, relative

EXECUTORS = ("dense", "gathered")
WINDOWED = [name for name, (_, extra) in TEXT_FAMILIES.items() if extra.get("sliding_window")]
POLICIES = {case.name: case for case in CASES if case.name in ("skip-modules", "skipgpt-linear")}
every_family = pytest.mark.parametrize("name", TEXT_FAMILIES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_identity(name, attention):
    """No policy: the same bits as stock; forced through the executors: the same numbers; nothing stays."""
    model = text_family(name, attention)
    for side in ("left", "right"):
        inputs = text_batch(side)
        with torch.no_grad():
            stock = model(**inputs).logits
            before = marks(model)
            for execute in EXECUTORS:
                with sparing.apply(model, execute=execute) as run:
                    assert torch.equal(model(**inputs).logits, stock)
                assert run.ledger.cost() == run.ledger.dense_cost()
                with sparing.apply(model, execute=execute, force=True) as run:
                    forced = model(**inputs).logits
                assert run.ledger.cost() == run.ledger.dense_cost()
                assert relative(forced, stock, inputs["attention_mask"]) <= TOLERANCE
        assert marks(model) == before


@every_family
def test_cached_decoding_is_the_stock_models(name):
    """Beyond the window, prompt, a chunk and single steps equal the stock model on its own cache."""
    model, inputs = text_family(name), text_batch("left")
    extra = torch.randint(3, 90, (3, 14), generator=torch.Generator().manual_seed(0))
    found = []
    for execute in (None, *EXECUTORS):
        context = sparing.apply(model, execute=execute, force=True) if execute else torch.no_grad()
        with torch.no_grad(), context:
            out = model(**inputs, use_cache=True)
            logits, mask = [out.logits[:, -1:]], inputs["attention_mask"]
            for chunk in (extra[:, :4], *extra[:, 4:].split(1, dim=1)):
                position = mask.sum(1, keepdim=True) + torch.arange(chunk.shape[1])
                mask = torch.cat([mask, torch.ones_like(chunk)], dim=1)
                out = model(chunk, attention_mask=mask, position_ids=position, past_key_values=out.past_key_values)
                logits.append(out.logits)
        found.append(torch.cat(logits, dim=1))
    for ours in found[1:]:
        assert relative(ours, found[0], torch.ones(ours.shape[:2])) <= TOLERANCE


@pytest.mark.parametrize("seed", range(5))
@every_family
def test_random_plans(name, seed):
    """Any plan: both executors agree in prefill, in a cached chunk and in single steps, and count the same."""
    model = text_family(name, "eager" if seed == 3 else "sdpa")
    inputs = text_batch(("left", "right", "none")[seed % 3])
    policy = RandomPlans(seed, 0.7, weights=seed % 2 == 0, sees=seed != 1, promise=seed == 4)
    extra = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(seed))
    dense, dense_ledger = decode(model, inputs, "dense", policy, extra)
    fast, fast_ledger = decode(model, inputs, "gathered", policy, extra)
    for i, (a, b) in enumerate(zip(fast, dense, strict=True)):
        mask = inputs["attention_mask"] if i == 0 else torch.ones(a.shape[:2])
        assert relative(a, b, mask) <= TOLERANCE
    assert fast_ledger.cost() == dense_ledger.cost()
    assert torch.equal(fast_ledger.states(), dense_ledger.states())


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@every_family
def test_generate(name, mode):
    """The same tokens from both executors; the stock tokens where nothing is planned, forced or not."""
    model, inputs = text_family(name), text_batch("left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **mode}
    stock = model.generate(**inputs, **settings)
    found = []
    for execute in EXECUTORS:
        for force in (False, True):
            with sparing.apply(model, execute=execute, force=force):
                assert torch.equal(model.generate(**inputs, **settings), stock)
        with sparing.apply(model, RandomPlans(4, 0.8, frees=False), execute=execute):
            found.append(model.generate(**inputs, **settings))
    assert torch.equal(*found)


@pytest.mark.parametrize("policy", POLICIES)
@every_family
def test_policies(name, policy):
    model = text_family(name)
    check_policy(lambda: POLICIES[policy].make(model), model, text_batch("left"))


@every_family
def test_scores(name):
    """What a policy is told of attention is what eager attention does: windows, caps, norms, rotation."""
    seen = {}

    class Look(sparing.Policy):
        def plan_attend(self, view):
            b, t = view.new.group.shape
            seen[view.layer] = view.scores(torch.arange(t).expand(b, t))
            return sparing.LayerPlan()

    model, inputs = text_family(name, "eager"), text_batch("none")
    with torch.no_grad():
        stock = model(**inputs, output_attentions=True).attentions
        for execute in EXECUTORS:
            with sparing.apply(model, Look(), execute=execute):
                model(**inputs)
            for layer, expected in enumerate(stock):
                torch.testing.assert_close(seen[layer], expected, rtol=1e-4, atol=1e-6)


@every_family
def test_zeroing_nothing(name):
    """Attention written out for ablations is the stock one."""

    class Nothing(sparing.Policy):
        ablation = True

        def plan_attend(self, view):
            return sparing.LayerPlan(zeroes=lambda query, key: query < key)

    model, inputs = text_family(name), text_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, Nothing(), execute="dense"):
            assert relative(model(**inputs).logits, stock, inputs["attention_mask"]) <= TOLERANCE


def wrong(family, name, change):
    """A family with one method changed."""
    return type(f"Wrong{family.__name__}", (family,), {name: change})


MUTATIONS = {
    "window-wider": (WINDOWED, "window", lambda stock: lambda a, i: w + 1 if (w := stock(a, i)) else w),
    "window-narrower": (WINDOWED, "window", lambda stock: lambda a, i: w - 1 if (w := stock(a, i)) else w),
    "no-cap": (["gemma2"], "softcap", lambda stock: lambda a, i: None),
    "rotated-nope": (["smollm3"], "rotary_kind", lambda stock: lambda a, i: "all"),
    "one-base": (["gemma3"], "rotary_kind", lambda stock: lambda a, i: "full_attention"),
    "no-attention-norm": (["gemma2", "gemma3"], "finish_attention", lambda stock: lambda a, i, x: x),
    "no-mlp-norm": (["gemma2", "gemma3"], "finish_mlp", lambda stock: lambda a, i, x: x),
    "no-key-norm": (["qwen3", "gemma3", "qwen3-moe"], "key", lambda stock: Anatomy.key),
    "no-query-norm": (["qwen3", "gemma3", "qwen3-moe"], "query", lambda stock: Anatomy.query),
    "wrong-scale": (list(TEXT_FAMILIES), "scaling", lambda stock: lambda a, i: stock(a, i) * 1.01),
}


@pytest.mark.parametrize(("mutation", "name"), [(m, name) for m, (names, *_) in MUTATIONS.items() for name in names])
def test_mutation_of_the_adapter(monkeypatch, mutation, name):
    """An adapter that is wrong in one thing must show in the forced forward."""
    model, inputs = text_family(name), text_batch("left")
    family = type(anatomy_of(model))
    _, method, change = MUTATIONS[mutation]
    mutant = wrong(family, method, change(getattr(family, method)))
    monkeypatch.setattr(sys.modules["sparing.execute.apply"], "anatomy_of", mutant)
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, force=True):
            forced = model(**inputs).logits
    assert relative(forced, stock, inputs["attention_mask"]) > 10 * TOLERANCE


@pytest.mark.parametrize("field", ["attend", "feed", "read"])
@every_family
def test_mutation_of_one_token(name, field):
    """One flipped token in one layer must show."""
    model, inputs = text_family(name), text_batch("left")
    plans = [RandomPlans(3, 0.7, weights=False, sees=False, whole=0, flip=f) for f in (None, (1, field, 0, 14))]
    found = []
    with torch.no_grad():
        for policy, execute in zip(plans, EXECUTORS, strict=True):
            with sparing.apply(model, policy, execute=execute):
                found.append(model(**inputs).logits)
    assert relative(found[1], found[0], inputs["attention_mask"]) > 10 * TOLERANCE


def test_experts_are_counted():
    """A token pays for the experts that it runs and for the router, in the layers that have them."""
    model = text_family("qwen3-moe")
    layers = anatomy_of(model).shape().layers
    assert layers[0].mlp_flops == 2 * (3 * 44 * 20 * 2 + 44 * 7)
    assert layers[1].mlp_flops == 2 * 3 * 44 * 61


def test_router_logits():
    """They are stock where nothing is planned, and asked of `dense` otherwise."""
    model, inputs = text_family("qwen3-moe"), text_batch("none")
    with torch.no_grad():
        stock = model(**inputs, output_router_logits=True)
        with sparing.apply(model):
            ours = model(**inputs, output_router_logits=True)
        assert all(torch.equal(a, b) for a, b in zip(ours.router_logits, stock.router_logits, strict=True))
        with sparing.apply(model, SkipModules([0]), execute="dense"):
            assert len(model(**inputs, output_router_logits=True).router_logits) == 2
        with sparing.apply(model, SkipModules([0])), pytest.raises(ValueError, match='execute="dense"'):
            model(**inputs, output_router_logits=True)


@every_family
def test_checkpoints(name, tmp_path):
    """Saved with a policy and loaded again: the same tokens through the cache, as many as without."""
    model, inputs = text_family(name), text_batch("left")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    policy = SkipModules([0], [1])
    with sparing.apply(model, policy):
        before = model.generate(**inputs, **settings)
    sparing.save(model, tmp_path / "saved", policies=[policy])
    loaded, _ = sparing.load(tmp_path / "saved")
    assert torch.equal(loaded.generate(**inputs, **settings), before)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen3-moe", "smollm3"])
def test_loading(name, tmp_path):
    """What was saved loads, with the attention that the model has."""
    model, inputs = text_family(name), text_batch("left")
    model.save_pretrained(tmp_path)
    loaded, _ = sparing.load(tmp_path)
    assert loaded.config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_long_rope():
    """Phi-3 changes its rotary base where a row gets long, and `generate` then reads the prompt again."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 2.2, 2.4, 2.6, 2.8]}
    sizes = {**SIZES, "hidden_size": 60, "original_max_position_embeddings": 20, "rope_parameters": rope}
    torch.manual_seed(0)
    model, inputs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes)).eval(), text_batch("left")
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(**inputs, **settings)
    if not torch.equal(stock, model.generate(**inputs, **settings, use_cache=False)):
        pytest.skip("this transformers forgets the prompt where the base changes (seen in 5.17)")
    for execute in EXECUTORS:
        with sparing.apply(model, execute=execute, force=True):
            assert torch.equal(model.generate(**inputs, **settings), stock)


@every_family
def test_as_the_decoder_of_a_vision_model(name):
    """The vision model's adapter knows pictures, the family's the layers."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2, image_size=30, patch_size=10
    )
    text = text_family(name).config
    how = {"text_config": text._attn_implementation, "vision_config": "sdpa"}
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=copy.deepcopy(text), image_token_id=IMAGE, attn_implementation=how
    )
    torch.manual_seed(0)
    model, inputs = transformers.LlavaForConditionalGeneration(config).eval(), llava_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, force=True):
            assert relative(model(**inputs).logits, stock, inputs["attention_mask"]) <= TOLERANCE
    extra = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    dense, fast = (decode(model, inputs, execute, RandomPlans(1, 0.7), extra)[0] for execute in EXECUTORS)
    for i, (a, b) in enumerate(zip(fast, dense, strict=True)):
        assert relative(a, b, inputs["attention_mask"] if i == 0 else torch.ones(a.shape[:2])) <= TOLERANCE


def test_fused_matrices_that_are_wrapped():
    """A Phi-3 whose fused matrix is no plain linear layer (LoRA, quantised) goes through the module itself."""
    model, inputs = copy.deepcopy(text_family("phi3")), text_batch("left")

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.1 * x.mean(-1, keepdim=True)

    for layer in model.model.layers:
        layer.self_attn.qkv_proj = Wrapped(layer.self_attn.qkv_proj)
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, force=True):
            assert relative(model(**inputs).logits, stock, inputs["attention_mask"]) <= TOLERANCE
