"""What views tell of the vision encoder, on every family: attention received, keys, states and the projector, beside eager maps."""

import copy
import sys

import pytest
import torch

import sparing
from models import llama, text_batch
from sparing.anatomy import anatomy_of
from sparing.execute import check_policy
from sparing.plan import Policy
from sparing.policies import CDPruner, DivPrune, SparseVLM, VisionZip, VisPruner, VScan
from vision_models import FAMILIES, llava_batch, llava_qwen2, llava_siglip

families = pytest.mark.parametrize("family", FAMILIES)


class Looks(Policy):
    """Notes what the encoder did in a layer, and changes nothing."""

    def __init__(self, layer=None):
        self.layer = layer
        self.looks_at_encoder = (layer,)

    def start(self, view):
        self.attention, self.keys = view.encoder_attention(self.layer), view.encoder_keys(self.layer)
        self.states, self.embeds, self.tokens = view.encoder_states(), view.embeds, view.tokens
        shows = ~self.attention.isnan()
        self.projected = torch.zeros_like(view.embeds)
        self.projected[shows] = view.project(self.states[shows])


@torch.no_grad()
def looked(family, layer=None, side="left", **how):
    build, batch = FAMILIES[family]
    model, policy = build(), Looks(layer)
    with sparing.apply(model, policy) as run:
        model(**batch(side)) if not how else model.generate(**batch(side), pad_token_id=0, do_sample=False, **how)
    return model, batch(side), policy, run


def encoded(tokens):
    """Which tokens show something, `[b t]`."""
    where = torch.zeros_like(tokens.valid)
    for row, spans in enumerate(tokens.images):
        for span in spans:
            where[row, span.encoded()] = True
    return where


@torch.no_grad()
def eager(model, inputs, layer):
    """Mean over heads of a layer's attention in the stock encoder, run on eager attention: one square a tile or window."""
    model = copy.deepcopy(model)
    tower = anatomy_of(model).vision_encoder
    tower.set_attn_implementation("eager")
    maps = []
    attention = anatomy_of(model).encoder_attentions[layer]
    module = sys.modules[type(attention).__module__]
    stock = module.eager_attention_forward

    def noted(asked, *args, **kwargs):
        mixed, weights = stock(asked, *args, **kwargs)
        if asked is attention:
            maps.extend(weights.mean(1))
        return mixed, weights

    module.eager_attention_forward = noted
    try:
        model(**inputs)
    finally:
        module.eager_attention_forward = stock
    return maps


@pytest.mark.parametrize("layer", [0, -1])
@families
def test_attention_is_that_of_eager_maps(family, layer):
    """From the class token or the mean of all patches; the mean of a token's patches; NaN in newlines and text."""
    model, inputs, found, _ = looked(family, layer)
    maps, anatomy = eager(model, inputs, layer), anatomy_of(model)
    received = [m[0, 1:] if anatomy.class_token else m.mean(0) for m in maps]
    shows = encoded(found.tokens)
    assert torch.equal(~found.attention.isnan(), shows)
    got = found.attention[shows]
    if family == "llava_onevision":
        # Overviews, which packing leaves alone: where they lie in front of tiles, and where they are all there is.
        tiles, spans = 0, [(r, span) for r, row in enumerate(found.tokens.images) for span in row]
        for r, span in spans:
            first = found.attention[r, span.start : span.start + 9]
            assert torch.allclose(first, received[tiles], atol=1e-6)
            tiles += span.tiles
        return
    if family.startswith("qwen"):
        want = torch.cat(received).unflatten(0, (-1, 4)).mean(1)
        want = anatomy.in_order(want[:, None], inputs)[:, 0]
    elif family in ("internvl", "smolvlm"):
        want = torch.stack(received).view(-1, 2, 2, 2, 2).mean((2, 4)).flatten()
    else:
        want = torch.cat(received)
    assert torch.allclose(got, want, atol=1e-6)


@families
def test_states_are_what_the_projector_makes_tokens_of(family):
    """Projected, they are the prompt's image tokens, each in its place; keys lie where attention does."""
    _, _, found, run = looked(family)
    shows = encoded(found.tokens)
    assert torch.allclose(found.projected[shows], found.embeds[shows], atol=1e-5)
    assert torch.equal(~found.keys.isnan().any(-1), shows)
    assert run.ledger.cost().flops["router"] > 0


def test_keys_are_those_of_the_layer():
    """Mean over heads, of the projection of what enters the layer's attention."""
    model, inputs, found, _ = looked("llava-qwen2", 1)
    layer = anatomy_of(model).encoder_attentions[1]
    seen = []
    with torch.no_grad():
        hook = layer.k_proj.register_forward_hook(lambda _, __, out: seen.append(out))
        model(**inputs)
        hook.remove()
    want = seen[0][:, 1:].unflatten(-1, (2, -1)).mean(-2).flatten(0, 1)
    assert torch.allclose(found.keys[encoded(found.tokens)], want, atol=1e-6)


@families
def test_beams_repeat_what_the_encoder_did(family):
    """`generate` repeats rows; every copy has its picture's scores."""
    _, _, once, _ = looked(family)
    _, _, beams, _ = looked(family, max_new_tokens=2, num_beams=2)
    for ours, theirs in ((once.attention, beams.attention), (once.states, beams.states)):
        assert torch.allclose(theirs.nan_to_num(), ours.nan_to_num().repeat_interleave(2, 0), atol=1e-6)


MAKES = {
    "div-prune": lambda: DivPrune(0.5),
    "cd-pruner": lambda: CDPruner(0.5),
    "vis-pruner": lambda: VisPruner(0.6, important=0.4),
    "vision-zip": lambda: VisionZip(0.6, contextual=0.5),
    "v-scan": lambda: VScan(0.7, 1, 0.6, window=2, local_layer=-1),
    "sparse-vlm": lambda: SparseVLM([0], [0.5], recycle=0.6, clusters=0.4),
}
PAIRS = [
    *(("vision-zip", family) for family in FAMILIES if family != "llava-mistral"),
    *(("v-scan", family) for family in ("internvl", "llava_onevision", "qwen2_5_vl")),
    *(("sparse-vlm", family) for family in ("qwen3_vl", "llava-mistral", "smolvlm")),
    ("vis-pruner", "qwen2_5_vl"),
    ("cd-pruner", "llava_onevision"),
    ("div-prune", "qwen3_vl"),
]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_check_policy(name, family):
    """The whole contract on other families than LLaVA with a Llama, which `test_check_policy.py` takes."""
    build, batch = FAMILIES[family]
    check_policy(MAKES[name], build(), batch("left"))


@torch.no_grad()
def test_a_llava_whose_encoder_has_no_class_token():
    """SigLIP with the `full` strategy: a picture is its patches, and all of them ask."""
    model, inputs = llava_siglip(), llava_batch("left")
    (span, *_), *_ = sparing.TokenMap.from_inputs(model, inputs).images
    assert (span.grid, span.offset, span.stop - span.start) == ((3, 3), 0, 9)
    found = Looks()
    with sparing.apply(model, found):
        model(**inputs)
    want = torch.cat([m.mean(0) for m in eager(model, inputs, -1)])
    assert torch.allclose(found.attention[encoded(found.tokens)], want, atol=1e-6)
    check_policy(lambda: VisionZip(0.6, contextual=0.5), model, inputs)


def test_newlines_stay():
    """They show nothing: no candidates, never dropped."""
    build, batch = FAMILIES["llava_onevision"]
    for name in ("div-prune", "vision-zip", "cd-pruner"):
        with torch.no_grad(), sparing.apply(build(), MAKES[name]()) as run:
            build()(**batch("left"))
        tokens = sparing.TokenMap.from_inputs(build(), batch("left"))
        newlines = tokens.of(sparing.tokens.Group.IMAGE) & ~encoded(tokens)
        read = run.ledger.read(0)
        assert newlines.any()
        assert read[newlines].all()
        kept = (read & encoded(tokens)).sum(1)
        share = MAKES[name]().keep
        assert kept.tolist() == [sum(int(len(s.encoded()) * share + 0.5) for s in row) for row in tokens.images]


def refuses(policy, model, inputs, words):
    with torch.no_grad(), pytest.raises(ValueError, match=words), sparing.apply(model, policy):
        model(**inputs)


def test_what_cannot_be_told_is_refused():
    """With the cure: layers that do not exist, that nobody noted, pictures encoded elsewhere, families that do not tell."""
    model, inputs = llava_qwen2(), FAMILIES["llava-qwen2"][1]("left")
    refuses(VisionZip(0.5, encoder_layer=7), model, inputs, r"layers 0..1 .* no layer 7")
    wrong = Looks()
    wrong.looks_at_encoder = ()
    refuses(wrong, model, inputs, "set looks_at_encoder")
    wrong.looks_at_encoder, wrong.layer = (0,), 1
    refuses(wrong, model, inputs, "nobody noted layer 1")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        tokens = sparing.TokenMap.from_inputs(model, inputs)
        with pytest.raises(ValueError, match="give pixel_values"), sparing.apply(model, VisionZip(0.5), tokens=tokens):
            model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_a_family_that_does_not_tell(monkeypatch):
    """It names what else there is."""
    model = llava_qwen2()
    monkeypatch.setattr(type(anatomy_of(model)), "encoder_attentions", ())
    with pytest.raises(ValueError, match="use a method that looks at tokens"):
        sparing.apply(model, VisPruner(0.5))


def test_text_models_are_left_alone():
    """There is nothing to look at, and nothing is asked."""
    model, inputs = llama(), text_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, VisionZip(0.5)):
            assert torch.equal(model(**inputs).logits, stock)


def test_nothing_is_left_on_the_encoder():
    """Hooks go with the context, and the notes with the call."""
    model, inputs = llava_qwen2(), FAMILIES["llava-qwen2"][1]("left")
    before = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
    with torch.no_grad(), sparing.apply(model, VisionZip(0.5)) as run:
        model(**inputs)
        assert not run._notes._entered
    assert before == {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
