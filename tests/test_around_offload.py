"""Weights that accelerate keeps elsewhere (`cpu_offload`, `disk_offload`, `device_map`), and where policies then are."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import sparing
from around_cases import BUILDS, check_wrapped, fresh
from sparing.anatomy import anatomy_of
from sparing.execute import run_of
from sparing.policies import DLLM, MoD, SkipGPT, SkipModules

# Up to transformers 5.22 the device of a model that lies elsewhere was taken for the device to compute on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device:UserWarning"
)


def mixed(model):
    """Every second layer (and the vision tower) on disk, the rest in memory."""
    decoder = anatomy_of(model).decoder
    at = next(name for name, module in model.named_modules() if module is decoder)
    where = {"lm_head": "cpu", **{f"{at}.{name}": "cpu" for name, _ in decoder.named_children() if name != "layers"}}
    where |= {f"{at}.layers.{i}": ("cpu", "disk")[i % 2] for i in range(len(decoder.layers))}
    if at != "model":
        where |= {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
    return where


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("family", BUILDS)
def test_offloaded(family, how, tmp_path):
    """Every weight that a pass needs is brought by the hook of its module, whichever executor calls it."""
    model, inputs = fresh(family)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.dispatch_model(model, mixed(model), main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    check_wrapped(model, inputs)


@pytest.mark.parametrize("policy", [SkipGPT, MoD, DLLM])
def test_routers_of_an_offloaded_model(policy):
    """They are real, live where the layers compute, and decide as beside the model in memory."""
    model, inputs = fresh()
    torch.manual_seed(1)
    routers = policy.for_model(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    torch.manual_seed(1)
    again = policy.for_model(model)
    assert not any(p.is_meta for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(routers.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        logits = []
        for execute in ("dense", "gathered"):
            with sparing.apply(model, again, execute=execute):
                logits.append(model(**inputs).logits)
    mask = inputs["attention_mask"].bool()
    assert (logits[0] - logits[1])[mask].abs().max() <= 1e-5 * logits[0].abs().max()


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_load_with_a_device_map(family, tmp_path):
    """`sparing.load` hands `device_map` on and leaves the model where that put it, with policies too."""
    model, inputs = fresh(family)
    sparing.save(model, tmp_path / "plain")
    sparing.save(model, tmp_path / "planned", [SkipModules([1])])
    with torch.no_grad(), sparing.apply(model, SkipModules([1])):
        expected = model(**inputs).logits
    offload = {"device_map": mixed(model), "offload_folder": str(tmp_path / "offload")}
    loaded, _ = sparing.load(tmp_path / "plain", **offload)
    assert any(p.is_meta for p in loaded.parameters())
    check_wrapped(loaded, inputs)
    loaded, _ = sparing.load(tmp_path / "planned", **offload)
    assert run_of(loaded) is not None
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-4)
    with pytest.raises(ValueError, match="both say where the model goes"):
        sparing.load(tmp_path / "plain", device="cpu", device_map="auto")


# transformers says how much memory that may take.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded:UserWarning")
def test_save_brings_offloaded_weights(tmp_path):
    """A model with a device map is saved with its values; one of which only hooks know where they are is refused first."""
    model, inputs = fresh()
    with torch.no_grad():
        expected = model(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        sparing.save(model, tmp_path / "saved")
    accelerate.hooks.remove_hook_from_submodules(model)
    sparing.save(model, tmp_path / "saved")
    where = {"device_map": mixed(model), "offload_folder": str(tmp_path / "offload")}
    sparing.save(sparing.load(tmp_path / "saved", **where)[0], tmp_path / "again", [SkipModules([])])
    with torch.no_grad():
        for name in ("saved", "again"):
            assert torch.equal(sparing.load(tmp_path / name)[0](**inputs).logits, expected)


def test_layers_on_several_devices_are_refused():
    """One layer's hook says another device: `meta` stands in for a second GPU."""
    model, _ = fresh()
    add_hook_to_module(model.model.layers[1], AlignDevicesHook(execution_device=torch.device("meta")))
    for execute in ("dense", "gathered"):
        with pytest.raises(ValueError, match="several devices \\(cpu, meta\\)"):
            sparing.apply(model, SkipModules([1]), execute=execute)


def test_a_model_without_values_is_refused():
    model, inputs = fresh()
    model.to("meta")
    with (
        sparing.apply(model, SkipModules([1])),
        pytest.raises(ValueError, match="meta device and has no values"),
    ):
        model(inputs["input_ids"].to("meta"))
