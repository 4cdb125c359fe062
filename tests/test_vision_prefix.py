"""`VisionPrefix`: questions about held pictures equal plain `apply` on the same inputs, and share what is held."""

import copy
import dataclasses

import pytest
import torch

import processors
import sparing
from models import llama, llava, llava_batch, text_batch
from sparing.execute import given
from sparing.policies import (
    DART,
    DivPrune,
    DropTokens,
    EnterLate,
    FastV,
    PyramidDrop,
    SkipModules,
    SparseVLM,
    ViCA,
    VisionZip,
)
from sparing.tokens import Group
from vision_models import FAMILIES, IMAGE, decoded

TOLERANCE = 1e-5
PIXELS = ("pixel_values", "pixel_attention_mask")
BATCHES = {"llava": (llava, llava_batch), **FAMILIES}
POLICIES = {
    "vica": lambda: ViCA([0, 2]),
    "freeze": lambda: ViCA([1, 2], prefix="freeze"),
    "late": lambda: ViCA([2]),
    "dropped": lambda: ViCA([0, 2]) & DropTokens(groups=[Group.IMAGE], keep=0.5),
    "skipped": lambda: ViCA([0, 2]) & SkipModules([1], [2], groups=[Group.TEXT]),
    "entering": lambda: ViCA([0, 2]) & EnterLate(1),
    "fastv": lambda: ViCA([0, 1, 2]) & FastV(1, 0.5),
    "pyramid": lambda: ViCA([0, 1, 2]) & PyramidDrop([1, 2], 0.6),
    "dart": lambda: ViCA([0, 1, 2]) & DART(1, 0.5),
    "divprune": lambda: ViCA([0, 2]) & DivPrune(0.5),
}


def relative(a, b, mask):
    return ((a - b)[mask].abs().max() / b[mask].abs().max()).item()


def asked(inputs):
    """A batch without its pixels."""
    return {name: value for name, value in inputs.items() if name not in PIXELS}


def compare(model, inputs, policy, prefix, pictures=None):
    """Prefill (with every hidden state) and cached decoding of both."""
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with sparing.apply(model, policy) as run:
            plain, _ = decoded(model, inputs, extra)
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            states = run.ledger.states()
        with prefix.apply(pictures=pictures) as run:
            ours, cache = decoded(model, asked(inputs), extra)
            ledger = run.ledger
            found = model(**asked(inputs), output_hidden_states=True).hidden_states
            assert torch.equal(run.ledger.states(), states)
    mask = inputs["attention_mask"].bool()
    assert relative(ours[0], plain[0], mask) <= TOLERANCE
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert relative(a, b, torch.ones(a.shape[:2], dtype=torch.bool)) <= TOLERANCE
    for a, b in zip(found, hidden, strict=True):
        assert relative(a, b, mask) <= TOLERANCE
    return ledger, cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", BATCHES)
def test_equals_apply(family, side):
    """Rows of two pictures, none, one and one, under each family: prefill and cached decoding."""
    build, batch = BATCHES[family]
    model, inputs = build(), batch(side)
    compare(model, inputs, ViCA([0, 2]), sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2])))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_composes(family, policy):
    """With policies that drop pictures before or inside the decoder, that skip text, that let pictures in late."""
    build, batch = BATCHES[family]
    model, inputs = build(), batch("left")
    made = POLICIES[policy]()
    compare(model, inputs, made, sparing.VisionPrefix.from_inputs(model, inputs, made))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_eager_attention(family):
    """The model's own attention function plays no part."""
    build, batch = BATCHES[family]
    model, inputs = build("eager"), batch("left")
    compare(model, inputs, ViCA([0, 2]), sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2])))


def test_attention_in_blocks(monkeypatch):
    """Long prompts ask attention a few queries at a time."""
    monkeypatch.setattr("sparing.execute.given.MOST_SCORES", 1000)
    model, inputs = llava(), llava_batch("left")
    compare(model, inputs, ViCA([0, 2]), sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2])))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_attention_off_the_cpu(monkeypatch, family):
    """The way of other devices, and of gradients: one softmax over both parts of the scores."""
    monkeypatch.setattr(given, "_merged", given._joint)
    build, batch = BATCHES[family]
    model, inputs = build(), batch("left")
    for policy in (POLICIES["vica"](), POLICIES["dropped"](), POLICIES["fastv"](), POLICIES["entering"]()):
        compare(model, inputs, policy, sparing.VisionPrefix.from_inputs(model, inputs, policy))


def test_gradients_reach_the_text():
    """In eval mode with gradients on, those of the text are as under plain `apply`; held keys are constants."""
    model, inputs = llava(), llava_batch("left")
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2]))
    found = []
    for batch, context in ((inputs, lambda: sparing.apply(model, ViCA([0, 2]))), (asked(inputs), prefix.apply)):
        model.zero_grad()
        with context():
            model(**batch).logits[inputs["attention_mask"].bool()].square().mean().backward()
        found.append(model.model.language_model.layers[2].mlp.up_proj.weight.grad.clone())
    model.zero_grad()
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()


def pictures_of(name):
    return [processors.picture(64, 40, 1), processors.picture(33, 90, 2)]


@pytest.mark.parametrize("name", processors.CASES)
def test_asks_as_the_processor_does(name):
    """The batch is what `ask` makes, less pixels; answers are those of `generate` on it; neither encoder nor projections run again."""
    model, processor = processors.family(name)
    pictures, questions = pictures_of(name), ["Which one is larger?", "What is in these pictures? Describe both."]
    policy = ViCA([0, 2])
    prefix = sparing.VisionPrefix(model, processor, pictures, policy)
    plain = sparing.anatomy.ask(model, processor, questions, [pictures] * 2)
    mine = prefix.inputs(questions)
    assert set(mine) == set(asked(plain))
    for key, value in mine.items():
        assert torch.equal(value, plain[key]), key
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), sparing.apply(model, policy) as run:
        expected = model.generate(**plain, **settings)
        full = run.ledger.cost()
        logits = model(**plain).logits
    rows = []
    anatomy = sparing.anatomy.anatomy_of(model)
    hooks = [
        anatomy.attention(0).k_proj.register_forward_hook(
            lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1])
        ),
        anatomy.vision_encoder.register_forward_hook(lambda *_: rows.append("encoder")),
    ]
    with torch.no_grad(), prefix.apply() as run:
        found = model.generate(**mine, **settings)
        cost = run.ledger.cost()
        ours = model(**mine).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)
    mask = plain["attention_mask"].bool()
    assert relative(ours, logits, mask) <= TOLERANCE
    assert prefix.ask(questions, **settings) == processor.tokenizer.batch_decode(
        expected[:, plain["input_ids"].shape[1] :], skip_special_tokens=True
    )
    # What ran is what was counted: text alone in the projections, no encoder, and the same attention as without a prefix.
    is_image = anatomy.is_image_token(plain["input_ids"])
    text = int((mask & ~is_image).sum())
    assert rows == [text, 2, 2, 2, 2, text]
    assert cost.flops["encoder"] == 0
    assert full.flops["encoder"] == 2 * prefix.flops["encoder"] > 0
    assert full.flops["attention_kv"] - cost.flops["attention_kv"] == 2 * prefix.flops["attention_kv"]
    for part in ("attention_projections", "attention_scores", "mlp", "lm_head"):
        assert cost.flops[part] == full.flops[part]
    kv = anatomy.layer_shape(0).kv_width * int(is_image.sum()) * 2 * 4
    assert full.kv_bytes - cost.kv_bytes == kv


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_one_copy_for_all_rows():
    """Eight questions: each layer's cache reads the very tensors that are held, and holds text alone beside them."""
    model, processor = processors.family("llava")
    prefix = sparing.VisionPrefix(model, processor, pictures_of("llava"), ViCA([0, 2]))
    inputs = prefix.inputs(["What is in this picture?"] * 7 + ["Which?"])
    # As `generate` counts: padding has no position, so that pictures stand at the same ones in every row.
    places = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), prefix.apply():
        cache = model(**inputs, **places, use_cache=True, logits_to_keep=1).past_key_values
        again = model(**prefix.inputs("Describe it."), use_cache=True).past_key_values
        moved = model(**inputs, use_cache=True).past_key_values
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    for layer in (0, 2):
        (part,), (other,) = cache.layers[layer].given, again.layers[layer].given
        assert part.where.rows == tuple(range(8))
        assert {storage(value) for value in part.values} == {storage(prefix.held._values[layer])}
        assert [key.data_ptr() for key in part.keys] == [key.data_ptr() for key in other.keys]
        assert cache.layers[layer].keys.shape[2] == text.sum(1).max()
        # Where padding counts the short row's pictures stand elsewhere: rotated keys of its own, the same values.
        long, short = moved.layers[layer].given
        assert (long.where.rows, short.where.rows) == (tuple(range(7)), (7,))
        assert storage(short.keys[0]) != storage(long.keys[0])
        assert storage(short.values[0]) == storage(long.values[0])
    assert cache.layers[1].given == ()
    before = prefix.nbytes
    with torch.no_grad(), prefix.apply():
        model(**prefix.inputs(["What?"] * 30), logits_to_keep=1)
    assert prefix.nbytes == before


@pytest.mark.parametrize("name", ["llava", "smolvlm", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_any_picture_anywhere(name):
    """Other system prompts and places, some of the pictures, in another order, one twice, none at all: as if made afresh."""
    model, processor = processors.family(name)
    pictures, policy = pictures_of(name), ViCA([0, 2])
    prefix = sparing.VisionPrefix(model, processor, pictures, policy)
    sign, shown = processor.image_token, [[0, 1], [1, 0], [1], [0, 0], []]
    prompts = [
        f"You know everything. {sign} What is in this picture? And here: {sign} Which?",
        f"{sign} {sign} Which one is larger?",
        f"Describe: {sign}",
        f"A red square {sign} or a circle {sign}?",
        "What is the capital of France?",
    ]
    mine = prefix.inputs([*prompts[:4], prompts[4]], pictures=shown)
    text = processors.prompt(processor, prompts[4])
    rows = [[pictures[p] for p in row] for row in shown]
    given = rows if name == "smolvlm" else [one for row in rows for one in row]
    plain = dict(
        processor(text=[*prompts[:4], text], images=given, padding=True, padding_side="left", return_tensors="pt")
    )
    assert torch.equal(mine["input_ids"], plain["input_ids"])
    compare(model, plain, policy, prefix, pictures=shown)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams_and_a_chat(name):
    """Beams repeat rows; a later turn goes on from the cache, a fresh question from the prefix, and both as under plain `apply`."""
    model, processor = processors.family(name)
    pictures, policy = pictures_of(name), ViCA([0, 2], prefix="freeze")
    prefix = sparing.VisionPrefix(model, processor, pictures, policy)
    questions = ["Which one is larger?", "What is in these pictures? Describe both."]
    plain, mine = sparing.anatomy.ask(model, processor, questions, [pictures] * 2), prefix.inputs(questions)
    words = torch.tensor([[80, 91, 86]] * 2)
    settings = {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = []
    for inputs, context in ((plain, lambda: sparing.apply(model, policy)), (mine, prefix.apply)):
        with torch.no_grad(), context() as run:
            beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, **settings)
            first = model.generate(**inputs, return_dict_in_generate=True, **settings)
            ids = torch.cat([first.sequences, words], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 7, dtype=torch.long)], 1)
            second = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **settings)
            cost = run.ledger.cost()
            fresh = model.generate(**inputs, **settings)
        out.append((beams, first.sequences, second, fresh))
    for a, b in zip(*out, strict=True):
        assert torch.equal(a, b)
    assert cost.flops["encoder"] == 0


def test_a_loaded_model_follows_its_own_policy(tmp_path):
    """`sparing.load` puts policies under a model: the prefix takes them, and leaves them there."""
    model, processor = processors.family("llava")
    sparing.save(model, tmp_path / "saved", [ViCA([0, 2])], processor=processor)
    loaded, words = sparing.load(tmp_path / "saved")
    pictures = pictures_of("llava")
    prefix = sparing.VisionPrefix(loaded, words, pictures)
    plain = sparing.anatomy.ask(loaded, words, ["What is in this picture?"], [pictures])
    with torch.no_grad():
        expected = loaded(**plain).logits
        with prefix.apply() as run:
            assert run is sparing.run_of(loaded)
            assert relative(loaded(**asked(plain)).logits, expected, plain["attention_mask"].bool()) <= TOLERANCE
        assert torch.equal(loaded(**plain).logits, expected)
    assert prefix.ask("What is in this picture?", max_new_tokens=2, pad_token_id=0)


def test_a_later_picture():
    """A picture that a later turn brings is encoded then, beside the held ones."""
    model, inputs = llava(), llava_batch("none")
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2]))
    turn = {"input_ids": torch.tensor([[5, *[IMAGE] * 9, 7]] * 2), "pixel_values": -inputs["pixel_values"]}
    out = []
    for first, context in ((inputs, lambda: sparing.apply(model, ViCA([0, 2]))), (asked(inputs), prefix.apply)):
        with torch.no_grad(), context():
            cache = model(**first, use_cache=True).past_key_values
            out.append(model(**turn, past_key_values=cache).logits)
    assert relative(out[1], out[0], torch.ones(out[0].shape[:2], dtype=torch.bool)) <= TOLERANCE


def test_cache_operations():
    """Cropped, reordered, repeated and forked caches read the held keys as plain ones do."""
    model, inputs = llava(), llava_batch("left")
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2]))
    rows, out = torch.tensor([2, 0, 0, 3, 1]), []
    for first, context in ((inputs, lambda: sparing.apply(model, ViCA([0, 2]))), (asked(inputs), prefix.apply)):
        with torch.no_grad(), context():
            cache = model(**first, use_cache=True).past_key_values
            fork = cache.fork(rows)
            token = torch.full((5, 1), 7)
            found = [model(token, past_key_values=fork).logits]
            # Into the middle of a picture.
            fork.crop(-6)
            found.append(model(token, past_key_values=fork).logits)
            cache.batch_repeat_interleave(2)
            found.append(model(torch.full((8, 2), 9), past_key_values=cache).logits)
        out.append(found)
    for a, b in zip(*out, strict=True):
        assert relative(b, a, torch.ones(a.shape[:2], dtype=torch.bool)) <= TOLERANCE


def test_mutations_show():
    """A moved picture, an exchanged one and one token too many to see must all exceed the tolerance."""
    model, inputs = llava(), llava_batch("left")
    policy, mask = ViCA([0, 2]), inputs["attention_mask"].bool()
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, policy)
    with torch.no_grad():
        with sparing.apply(model, policy):
            plain = model(**inputs).logits
        with prefix.apply(pictures=[[1, 0], [2], [3], []]):
            assert relative(model(**asked(inputs)).logits, plain, mask) > 100 * TOLERANCE
        positions = torch.arange(mask.shape[1]).expand(mask.shape).clone()
        positions[1, -8] += 1
        with prefix.apply():
            assert relative(model(**asked(inputs), position_ids=positions).logits, plain, mask) > 10 * TOLERANCE
        with prefix.apply():
            cache = model(**asked(inputs), use_cache=True).past_key_values
            token = torch.full((4, 1), 7)
            right = model(token, past_key_values=cache.fork(torch.arange(4))).logits
            cache.layers[0].given[0].where.index[0, 0] = -1
            cache.layers[0].given = tuple(
                dataclasses.replace(part, where=dataclasses.replace(part.where, holes=True))
                for part in cache.layers[0].given
            )
            wrong = model(token, past_key_values=cache).logits
        assert relative(wrong, right, torch.ones(4, 1, dtype=torch.bool)) > 10 * TOLERANCE


def test_bfloat16():
    """In bf16 to bf16's own precision."""
    model, inputs = copy.deepcopy(llava()).to(torch.bfloat16), llava_batch("left")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2]))
    with torch.no_grad():
        with sparing.apply(model, ViCA([0, 2])):
            plain = model(**inputs).logits
        with prefix.apply():
            ours = model(**asked(inputs)).logits
    assert ours.dtype == torch.bfloat16
    assert relative(ours.float(), plain.float(), inputs["attention_mask"].bool()) <= 4e-2


def refuse(match, act):
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        act()


def test_refusals():
    """Each says what was expected, and the cure."""
    model, processor = processors.family("llava")
    pictures, policy = pictures_of("llava"), ViCA([0, 2])
    prefix = sparing.VisionPrefix(model, processor, pictures, policy)
    refuse(
        "needs a policy that freezes them", lambda: sparing.VisionPrefix(model, processor, pictures, SkipModules([1]))
    )
    refuse("say what the model follows", lambda: sparing.VisionPrefix(model, processor, pictures))
    refuse("at least one picture", lambda: sparing.VisionPrefix(model, processor, [], policy))
    refuse("reads text alone", lambda: sparing.VisionPrefix.from_inputs(llama(), text_batch("left"), policy))
    refuse("1 image tokens", lambda: prefix.inputs("<image> Which?"))
    refuse("holds 0..1", lambda: prefix.inputs("Which?", pictures=[[2]]))
    refuse("speaks of 2 rows", lambda: prefix.inputs(["Which?"] * 3, pictures=[[0], [1]]))
    refuse(
        "no processor", lambda: sparing.VisionPrefix.from_inputs(llava(), llava_batch("left"), policy).inputs("Which?")
    )

    def call(inputs, **how):
        with prefix.apply(**how):
            model(**inputs)

    plain = sparing.anatomy.ask(model, processor, ["Which?"], [pictures])
    refuse("leave pixel_values out", lambda: call(plain))
    refuse("say which pictures", lambda: call(asked(plain), pictures=[[0]]))

    def under(other):
        with sparing.apply(model, other), prefix.apply():
            pass

    refuse("leave that apply first", lambda: under(ViCA([1])))
    model.train()
    refuse("call model.eval", lambda: call(asked(plain)))
    model.eval()
    changed = copy.deepcopy(model)
    stale = sparing.VisionPrefix(changed, processor, pictures, policy)
    with torch.no_grad():
        changed.model.language_model.layers[0].self_attn.k_proj.weight.mul_(2)
    refuse("have changed since", lambda: stale.apply().__enter__())


@pytest.mark.parametrize(
    ("other", "why"),
    [(SparseVLM([0], [0.5]), "merges tokens between layers"), (VisionZip(0.5), "layers were not seen at work")],
)
def test_what_needs_the_pictures_themselves_is_refused(other, why):
    """Merging between layers would outdate the held keys; scores of the encoder are gone once it has run."""
    model, inputs = llava(), llava_batch("left")
    policy = ViCA([0, 1, 2]) & other
    prefix = sparing.VisionPrefix.from_inputs(model, inputs, policy)

    def call():
        with prefix.apply():
            model(**asked(inputs))

    refuse(why, call)


def test_company_matters_to_onevision():
    """OneVision cuts a picture alone into tiles, and in company not: held in company it cannot be shown alone."""
    model, processor = processors.family("onevision")
    prefix = sparing.VisionPrefix(model, processor, pictures_of("onevision"), ViCA([0]))
    refuse("stand together", lambda: prefix.inputs("Which?", pictures=[[0]]))
    alone = sparing.VisionPrefix(model, processor, pictures_of("onevision")[0], ViCA([0]))
    refuse("stand together", lambda: alone.inputs("Which?", pictures=[[0, 0]]))
