"""Quantised weights: torchao and bitsandbytes on the CPU, as stock, under both executors, counted and saved."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import sparing
from around_cases import EXECUTORS, check_wrapped, difference, planned
from models import SIZES, text_batch
from sparing.policies import SkipModules

# What torchao and bitsandbytes say about themselves while loading and saving; nothing here can act on it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def _torchao(name):
    def config():
        pytest.importorskip("torchao")
        import torchao.quantization as kinds

        return TorchAoConfig(getattr(kinds, name)())

    return config


def _bitsandbytes(**how):
    def config():
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**how)

    return config


# The tolerance is 1e-5 where a row's product depends on that row alone. Dynamic quantisation of activations rounds to 8 bits:
# a last-bit difference before a rounding step is a whole step after it. bitsandbytes' 8-bit product also looks for outlier
# columns among all rows that it is given, so its result depends on which rows those are.
KINDS = {
    "torchao int8": (_torchao("Int8WeightOnlyConfig"), 1e-5),
    "torchao int8 dynamic": (_torchao("Int8DynamicActivationInt8WeightConfig"), 5e-2),
    "bitsandbytes nf4": (
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        1e-5,
    ),
    "bitsandbytes int8": (_bitsandbytes(load_in_8bit=True), 0.1),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of sizes that the kernels take."""
    path = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **WIDE})).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_quantised(kind, checkpoint, tmp_path):
    """`sparing.load` with a quantisation config; identity, parity, generation, costs; saved and back, with a policy too."""
    config, tolerance = KINDS[kind]
    inputs = text_batch("left")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config(), dtype=torch.float32)
    model, _ = sparing.load(checkpoint, quantization_config=config(), dtype=torch.float32)
    with torch.no_grad():
        expected = stock.eval()(**inputs).logits
        assert torch.equal(model(**inputs).logits, expected)
        assert difference(expected, sparing.load(checkpoint)[0](**inputs).logits, inputs) > 1e-4
    # A coarse tolerance needs a plan that changes more than that: all of one layer's MLP.
    check_wrapped(model, inputs, tolerance, SkipModules([1], [2]) if tolerance > 1e-3 and "int8" in kind else None)
    for execute in EXECUTORS:
        costs = [planned(m, inputs, execute, SkipModules([1]))[2] for m in (model, sparing.load(checkpoint)[0])]
        assert costs[0] == costs[1], "packed weights have other shapes, which must not be counted"
    # Only on processors with the instructions that bitsandbytes packs for.
    state = getattr(model.model.layers[0].mlp.up_proj.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        with pytest.raises(ValueError, match="save it before it runs"):
            sparing.save(model, tmp_path / "plain")
        model, _ = sparing.load(checkpoint, quantization_config=config(), dtype=torch.float32)
    sparing.save(model, tmp_path / "plain")
    sparing.save(model, tmp_path / "planned", [SkipModules([1])])
    with torch.no_grad():
        assert difference(sparing.load(tmp_path / "plain")[0](**inputs).logits, expected, inputs) <= tolerance
        with sparing.apply(model, SkipModules([1])):
            expected = model(**inputs).logits
        loaded, _ = sparing.load(tmp_path / "planned")
        assert type(loaded.model.layers[0].mlp.up_proj.weight) is type(model.model.layers[0].mlp.up_proj.weight)
        assert difference(loaded(**inputs).logits, expected, inputs) <= tolerance


def test_quantised_in_place(tmp_path):
    """`torchao.quantize_` works under `apply`; no checkpoint can say what it did, so saving is refused."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **WIDE})).eval()
    before = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    inputs = text_batch("left")
    with torch.no_grad():
        assert difference(model(**inputs).logits, before(**inputs).logits, inputs) > 1e-4
    check_wrapped(model, inputs)
    with pytest.raises(ValueError, match="TorchAoConfig"):
        sparing.save(model, tmp_path / "no")
