"""Every family: save, load, generate as before; no stock class takes what was saved with policies."""

import pytest
import torch

import sparing
import vision_models
from checkpoint_cases import save_skipping
from models import TEXT_FAMILIES, text_batch, text_family
from sparing.policies import ViCA

SETTINGS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
CASES = [
    *(pytest.param(lambda name=name: text_family(name), text_batch, id=name) for name in TEXT_FAMILIES),
    *(pytest.param(make, batch, id=name) for name, (make, batch) in vision_models.FAMILIES.items()),
]


@pytest.mark.parametrize(("make", "batch"), CASES)
@torch.no_grad()
def test_save_and_load(make, batch, tmp_path):
    """An ordinary checkpoint has the stock logits; one with policies generates what its policies generate."""
    memory, inputs = make(), batch("left")
    sparing.save(memory, tmp_path / "plain")
    model, _ = sparing.load(tmp_path / "plain")
    assert type(model) is type(memory)
    for name, tensor in memory.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    torch.testing.assert_close(model(**inputs).logits, memory(**inputs).logits, rtol=1e-4, atol=1e-4)
    if "pixel_values" in inputs:
        policies = [ViCA([0, 2])]
        sparing.save(model, tmp_path / "vision", policies)
        with sparing.apply(model, *policies):
            expected = model.generate(**inputs, **SETTINGS).logits
        found = sparing.load(tmp_path / "vision")[0].generate(**inputs, **SETTINGS).logits
        assert torch.equal(torch.stack(expected), torch.stack(found))
    # A router and a fixed policy.
    with sparing.apply(model, *save_skipping(tmp_path / "saved", model)):
        before = model.generate(**inputs, **SETTINGS)
    loaded, _ = sparing.load(tmp_path / "saved")
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    after = loaded.generate(**inputs, **SETTINGS)
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))
    for cls in (type(model.config), type(model)):
        with pytest.raises(AttributeError, match="load it with sparing.load"):
            cls.from_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="no file named"):
        type(model).from_pretrained(tmp_path / "saved", config=memory.config)
