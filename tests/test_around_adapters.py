"""PEFT: adapters on any module are part of the model; those that change prompt, cache or row order are planned or refused."""

import copy

import pytest
import torch

import sparing
from around_cases import EXECUTORS, check_wrapped, difference, fresh
from random_plans import RandomPlans
from sparing.policies import SkipGPT, SkipModules

peft = pytest.importorskip("peft")
# PEFT asks transformers by a name that transformers will drop, and does not know experts by their names; neither is ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # PEFT 0.18; later ones tie what was tied.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]
MLP = ["gate_proj", "up_proj", "down_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
ADAPTERS = {
    "q and v": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
    "all linear": peft.LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.1),
    "mlp": peft.LoraConfig(target_modules=MLP, r=4),
    "dora": peft.LoraConfig(target_modules=EVERY, r=4, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "modules_to_save": peft.LoraConfig(
        target_modules=["q_proj"], r=4, modules_to_save=["lm_head", "input_layernorm", "embed_tokens"]
    ),
    "embeddings": peft.LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"], r=4),
}


def stirred(model):
    """Adapters begin as nothing; these do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in ("lora_B", "lora_embedding_B", "ia3_l", "modules_to_save", "prompt_encoder")
            ):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapted(config, name="llama"):
    model, inputs = fresh(name)
    return stirred(peft.get_peft_model(model, copy.deepcopy(config))), inputs


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind):
    """The wrapped model, and the same by its base model."""
    model, inputs = adapted(ADAPTERS[kind])
    with torch.no_grad():
        assert difference(model(**inputs).logits, fresh()[0](**inputs).logits, inputs) > 1e-3
    check_wrapped(model, inputs)
    check_wrapped(model.get_base_model(), inputs)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", "all-linear"),
        ("qwen3-moe", "all-linear"),
        ("llava", r".*language_model.*\.(q|v|up)_proj"),
    ],
)
def test_lora_on_other_families(name, targets):
    """Fused matrices, experts, and the language model inside LLaVA."""
    check_wrapped(*adapted(peft.LoraConfig(target_modules=targets, r=4), name))


def test_switched_disabled_and_merged():
    """The plan follows whatever adapter is active, also inside one `apply`."""
    model, inputs = adapted(peft.LoraConfig(target_modules=["q_proj"], r=4))
    model.add_adapter("other", peft.LoraConfig(target_modules=["up_proj"], r=4))
    stirred(model)
    policy, found = RandomPlans(3), {}
    for execute in EXECUTORS:
        with torch.no_grad(), sparing.apply(model, policy, execute=execute):
            for name in ("default", "other"):
                model.set_adapter(name)
                found[execute, name] = model(**inputs).logits
            with model.disable_adapter():
                found[execute, "off"] = model(**inputs).logits
    for name in ("default", "other", "off"):
        assert difference(found["gathered", name], found["dense", name], inputs) <= 1e-5
    assert difference(found["dense", "default"], found["dense", "other"], inputs) > 1e-3
    with torch.no_grad(), sparing.apply(fresh()[0], policy) as run:
        assert difference(found["gathered", "off"], run.model(**inputs).logits, inputs) <= 1e-5
    merged = model.merge_and_unload()
    with torch.no_grad(), sparing.apply(merged, policy):
        assert difference(merged(**inputs).logits, found["dense", "other"], inputs) <= 1e-5


def test_an_adapter_a_row():
    """`adapter_names` works under `dense`; `gathered` packs rows and refuses, rather than give rows to other adapters."""
    model, inputs = adapted(peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    stirred(model)
    names = ["default", "other", "__base__"]
    with torch.no_grad(), sparing.apply(model, RandomPlans(3), execute="dense"):
        together = model(**inputs, adapter_names=names).logits
        model.set_adapter("default")
        alone = model(**inputs).logits
    assert (together[0] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()
    assert (together[1] - alone[1]).abs().max() > 1e-3
    with sparing.apply(model, RandomPlans(3)):
        with pytest.raises(ValueError, match="adapter_names gives each row"):
            model(**inputs, adapter_names=names)
        model(**inputs)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_planned_like_others(kind):
    model, inputs = adapted(getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    logits, made = [], []
    for execute in EXECUTORS:
        with torch.no_grad(), sparing.apply(model, SkipModules([1]), execute=execute) as run:
            logits.append(model(**inputs).logits)
            assert run.ledger.cost().as_dict()["prefill"]["rows"]["feed"] == 3 * (17 + 12 + 7 + 3 * 3)
            made.append(model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert logits[0].shape[1] == inputs["input_ids"].shape[1] + 3
    assert difference(*logits, inputs) <= 1e-5
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prefix tuning fills the cache"),
        (
            peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=3, task_type="CAUSAL_LM"),
            "in place of the family's attention",
        ),
    ],
    ids=["prefix tuning", "adaption prompt"],
)
def test_adapters_inside_attention_are_refused(config, message):
    model, _ = adapted(config)
    for execute in EXECUTORS:
        with pytest.raises(ValueError, match=message):
            sparing.apply(model, SkipModules([1]), execute=execute)


def test_gradients_reach_the_adapters_alone():
    """With decisions fixed, and alike under both executors."""
    model, inputs = adapted(peft.LoraConfig(target_modules="all-linear", r=4))
    found = []
    for execute in EXECUTORS:
        model.zero_grad()
        with sparing.apply(model, RandomPlans(7), execute=execute):
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        logits.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert all("lora_" in name for name in found[0])
    for name, gradient in found[0].items():
        other = found[1].get(name, torch.zeros(()))
        assert (gradient - other).abs().max() <= 1e-4 * max(gradient.abs().max().item(), 1e-4), name


def test_routers_and_lora_train_together():
    """SkipGPT's second stage and its first: straight-through gates beside adapters, on `dense`."""
    model, inputs = adapted(peft.LoraConfig(target_modules="all-linear", r=4))
    policy = SkipGPT.for_model(model).train()
    with sparing.apply(model, policy, execute="dense"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for owner, part in ((model, "lora_"), (policy, "")):
        with_gradient = {n for n, p in owner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert with_gradient
        assert all(part in name for name in with_gradient)
    with torch.no_grad(), sparing.apply(model, policy.eval()):
        fast = model(**inputs).logits
    with torch.no_grad(), sparing.apply(model, policy, execute="dense"):
        assert difference(fast, model(**inputs).logits, inputs) <= 1e-5


def test_save_wants_adapters_merged(tmp_path):
    model, inputs = adapted(ADAPTERS["q and v"])
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="merge_and_unload"):
            sparing.save(given, tmp_path / "no")
    with torch.no_grad():
        expected = model(**inputs).logits
    sparing.save(model.merge_and_unload(), tmp_path / "yes", [SkipModules([])])
    with torch.no_grad():
        assert difference(sparing.load(tmp_path / "yes")[0](**inputs).logits, expected, inputs) <= 1e-5
