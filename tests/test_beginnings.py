"""`VisionPrefix.continued`: going on from system prompt and pictures that were read once equals reading the whole prompt."""

import copy

import pytest
import torch

import processors
import sparing
from models import llava, llava_batch
from sparing.anatomy import anatomy_of
from sparing.execute.batches import pad_rows, split_rows
from sparing.execute.beginnings import KEPT
from sparing.policies import DropTokens, EnterLate, FastV, SkipModules, ViCA
from sparing.tokens import Group
from vision_models import FAMILIES

BATCHES = {"llava": (llava, llava_batch), **FAMILIES}
TOLERANCE = 1e-5
QUESTIONS = ["Which one is larger?", "What is in these pictures? Describe both.", "Which?"]
SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
POLICIES = {
    "vica": lambda: ViCA([0, 2]),
    "freeze": lambda: ViCA([1, 2], prefix="freeze"),
    "skipped": lambda: ViCA([0, 2]) & SkipModules([1], [2], groups=[Group.TEXT]),
    "entering": lambda: ViCA([0, 2]) & EnterLate(1),
}


def held(name, policy=None):
    model, processor = processors.family(name)
    pictures = [processors.picture(64, 40, 1), processors.picture(33, 90, 2)]
    return model, processor, pictures, sparing.VisionPrefix(model, processor, pictures, policy or ViCA([0, 2]))


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def answers(model, inputs, **more):
    """Later ids and their logits."""
    out = model.generate(**inputs, **SETTINGS, output_logits=True, return_dict_in_generate=True, **more)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", processors.CASES)
def test_equals_the_whole_prompt(name, policy):
    """Rows of three lengths, in prefill and decoding, against plain `apply`; the second time nothing is read."""
    made = POLICIES[policy]()
    model, processor, pictures, prefix = held(name, made)
    plain = sparing.anatomy.ask(model, processor, QUESTIONS, [pictures] * 3)
    with torch.no_grad(), sparing.apply(model, made):
        expected, logits = answers(model, plain)
    for _ in range(2):
        with torch.no_grad(), prefix.apply():
            found, ours = answers(model, prefix.continued(prefix.inputs(QUESTIONS)))
        assert torch.equal(found, expected)
        assert relative(ours, logits) <= TOLERANCE
    assert prefix.ask(QUESTIONS, **SETTINGS) == processor.tokenizer.batch_decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", BATCHES)
def test_any_batch_of_the_model(family, side):
    """Batches made by hand, two pictures among text, called directly: logits behind are those of the whole prompt on its own."""
    build, batch = BATCHES[family]
    model, policy = build(), ViCA([0, 2])
    alone = split_rows(model, batch(side))[0]
    last = int(anatomy_of(model).is_image_token(alone["input_ids"])[0].nonzero()[-1]) + 1
    rows = []
    for rest in ([7, 8, 9, 10], [11]):
        ids = torch.cat([alone["input_ids"][:, :last], torch.tensor([rest])], 1)
        row = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        row.pop("position_ids", None)
        if "mm_token_type_ids" in row:
            row["mm_token_type_ids"] = torch.nn.functional.pad(row["mm_token_type_ids"][:, :last], (0, len(rest)))
        rows.append(row)
    padded = pad_rows(model, rows, side)
    prefix = sparing.VisionPrefix.from_inputs(model, rows[0], policy)
    if anatomy_of(model).shape().layers[0].window is not None:
        with pytest.raises(ValueError, match="would count in the model's windows"):
            prefix.continued({name: padded[name] for name in ("input_ids", "attention_mask")}, pictures=[(0, 1)] * 2)
        rows, padded = rows[:1], rows[0]
    shown = [tuple(range(len(prefix.held.pictures)))] * len(rows)
    with torch.no_grad():
        with prefix.apply(pictures=shown):
            given = prefix.continued({name: padded[name] for name in ("input_ids", "attention_mask")}, later=True)
            ours = model(**given).logits
            model(torch.full((len(rows), 1), 7), past_key_values=given["past_key_values"])
        for row, width, logits in zip(rows, (4, 1), ours, strict=False):
            with sparing.apply(model, policy):
                expected = model(**row).logits[0]
            assert relative(logits[-width:], expected[-width:]) <= TOLERANCE


def test_only_what_is_behind_runs():
    """The projections see the text behind the pictures alone, and the ledger of a question counts that."""
    model, _, _, prefix = held("llava")
    inputs = prefix.inputs(QUESTIONS)
    rows: list[int] = []
    hook = model.model.language_model.layers[1].mlp.up_proj.register_forward_hook(
        lambda _, args, __: rows.append(args[0].numel() // args[0].shape[-1])
    )
    with torch.no_grad(), prefix.apply() as run:
        model(**inputs, logits_to_keep=1)
        whole = run.ledger.cost()
        for _ in range(2):
            given = prefix.continued(inputs, later=True)
            model(**given, logits_to_keep=1)
        cost = run.ledger.cost()
    hook.remove()
    mask, image = inputs["attention_mask"].bool(), inputs["input_ids"] == model.config.image_token_id
    last = int(image[0].nonzero()[-1]) - int(mask[0].int().argmax())
    text = int((mask & ~image).sum())
    head = last + 1 - int(image[0].sum())
    assert rows == [text, head, text - 3 * head, text - 3 * head]
    assert whole.flops["mlp"] * (text - 3 * head) == cost.flops["mlp"] * text
    assert cost.flops["encoder"] == cost.prefill.total == 0
    # Keys and values of the beginning's text are there once a row; those of the pictures once for all rows.
    (part,) = given["past_key_values"].layers[0].given
    assert part.where.rows == (0, 1, 2)
    assert {v.untyped_storage().data_ptr() for v in part.values} == {
        prefix.held._values[0].untyped_storage().data_ptr()
    }
    assert cost.kv_bytes == whole.kv_bytes


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_questions_do_not_reach_each_other(name):
    """A kept beginning stays as it was, whatever was asked, cropped, searched with beams or answered twice."""
    model, processor, _, prefix = held(name)
    inputs, other = prefix.inputs(QUESTIONS), prefix.inputs("Describe it.")
    searches: list[dict[str, int]] = [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
    with torch.no_grad(), prefix.apply():
        for search in searches:
            expected = answers(model, inputs, **search)[0]
            assert torch.equal(answers(model, prefix.continued(inputs, repeats=3), **search)[0], expected)
        prefix.continued(inputs)["past_key_values"].crop(-1)
        answers(model, prefix.continued(other))
        assert torch.equal(answers(model, prefix.continued(inputs, repeats=3), **search)[0], expected)
        with pytest.raises(ValueError, match="of 3 rows, the inputs have 1"):
            model(**{**prefix.continued(other, later=True), **cache_of(prefix.continued(inputs))})
    texts = processor.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert prefix.ask(QUESTIONS, **search, **SETTINGS) == texts


def cache_of(inputs):
    return {"past_key_values": inputs["past_key_values"]}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_what_generation_makes_of_ids(name):
    """Penalties on ids that were there and limits of the whole length are as for the whole prompt."""
    model, processor, pictures, prefix = held(name)
    single = sparing.VisionPrefix(model, processor, pictures, ViCA([0, 2]))
    question = [QUESTIONS[1]] * 2
    length = single.inputs(question)["input_ids"].shape[1]
    settings = {"repetition_penalty": 1.5, "max_length": length + 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), prefix.apply():
        whole = model.generate(**single.inputs(question), **settings)
        ours = model.generate(**prefix.continued(prefix.inputs(question)), **settings)
    assert torch.equal(ours, whole)
    assert single.ask(question, **settings) == processor.tokenizer.batch_decode(
        whole[:, length:], skip_special_tokens=True
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_chat(name):
    """A later turn goes on from an answer as from one whose prompt was read whole, whatever was read in between."""
    model, processor, _, prefix = held(name)
    sign = processor.image_token
    inputs, words, out = prefix.inputs(QUESTIONS), torch.tensor([[80, 91, 86]] * 3), []
    far = prefix.inputs(f"Far away stand {sign} and {sign} and what else?")
    with torch.no_grad(), prefix.apply():
        prefix.continued(inputs)
        for given in (lambda: inputs, lambda: prefix.continued(inputs)):
            model(**far)
            prefix.continued(far)
            before = given()
            first = model.generate(**before, **SETTINGS, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, words], 1)
            mask = torch.cat([before["attention_mask"], torch.ones(3, SETTINGS["max_new_tokens"] + 3).long()], 1)
            out.append(answers(model, {"input_ids": ids, "attention_mask": mask, **cache_of(first)}))
    assert torch.equal(out[0][0], out[1][0])
    assert relative(out[1][1], out[0][1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_pictures_in_another_order(name):
    """Those named to the `apply` around it are meant, and kept apart from others."""
    model, processor = processors.family(name)
    pictures = [processors.picture(40, 40, 1), processors.picture(40, 40, 2)]
    prefix = sparing.VisionPrefix(model, processor, pictures, ViCA([0, 2]))
    found = []
    for order in ([0, 1], [1, 0]):
        shown = [order] * 3
        inputs = prefix.inputs(QUESTIONS, pictures=shown)
        with torch.no_grad(), prefix.apply(pictures=shown):
            whole = answers(model, inputs)[1]
            found.append(answers(model, prefix.continued(inputs))[1])
        assert relative(found[-1], whole) <= TOLERANCE
    assert relative(*found) > 100 * TOLERANCE


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_it_was_read_under():
    """A policy that was changed, and adapters that are switched off: neither goes on from what the other read."""
    peft = pytest.importorskip("peft")
    model, processor, pictures, _ = held("llava")
    policy = ViCA([0, 2])
    prefix = sparing.VisionPrefix(model, processor, pictures, policy)
    inputs = prefix.inputs(QUESTIONS)
    with torch.no_grad():
        with prefix.apply():
            updated = answers(model, prefix.continued(inputs))[1]
        policy.prefix = "freeze"
        with prefix.apply():
            assert relative(answers(model, prefix.continued(inputs))[1], answers(model, inputs)[1]) <= TOLERANCE
            assert relative(answers(model, inputs)[1], updated) > 100 * TOLERANCE
    tuned = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    )
    prefix = sparing.VisionPrefix(tuned.eval(), processor, pictures, ViCA([0, 2]))
    prefix.continued(inputs)
    with tuned.disable_adapter():
        refused = sparing.VisionPrefix(tuned, processor, pictures, ViCA([0, 2]))
        with pytest.raises(ValueError, match="weights or adapters have changed"):
            prefix.continued(inputs)
        assert refused.continued(inputs)
    with pytest.raises(ValueError, match="weights or adapters have changed"):
        refused.continued(inputs)


def test_modes():
    """What was read without gradients does not get in the way of them; autocast is refused."""
    model, processor, pictures, prefix = held("llava")
    inputs = prefix.inputs(QUESTIONS)
    with torch.inference_mode(), prefix.apply():
        first = model(**prefix.continued(inputs, later=True), logits_to_keep=1).logits.clone()
    with prefix.apply():
        model(**prefix.continued(inputs, later=True), logits_to_keep=1).logits.sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            for call in (
                lambda: model(**inputs),
                lambda: prefix.continued(inputs),
                lambda: sparing.VisionPrefix(model, processor, pictures, ViCA([0, 2])),
            ):
                with pytest.raises(ValueError, match="convert the model instead"):
                    call()
        again = model(**prefix.continued(inputs, later=True), logits_to_keep=1).logits
    model.zero_grad()
    assert relative(again, first) <= TOLERANCE


def test_the_latest_are_kept(monkeypatch):
    """As many as `KEPT`; the least lately used goes, and is read again; what is held is in `nbytes`."""
    model, processor, _, prefix = held("llava")
    sign, read = processor.image_token, []
    stock = type(model).forward

    def counted(self, *args, **kwargs):
        read.append(kwargs["input_ids"].shape[1])
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    before = prefix.nbytes

    def ask(system):
        read.clear()
        prefix.continued(prefix.inputs(f"{system} {sign} {sign} Which?"))
        return len(read)

    systems = ["Be short.", "Be long and kind.", "You know everything."]
    assert len(systems) == KEPT + 1
    assert [ask(systems[0]), ask(systems[0])] == [1, 0]
    one = prefix.nbytes
    assert one > before
    assert [ask(systems[1]), ask(systems[0]), ask(systems[2]), ask(systems[0]), ask(systems[1])] == [1, 0, 1, 0, 1]
    assert prefix.flops["beginnings"] > 0
    own = [x for kept in prefix._beginnings.values() for layer in kept.cache.layers for x in (layer.keys, layer.values)]
    assert prefix.nbytes - before >= sum(x.nbytes for x in own)


def test_refusals():
    """Each says why there is no beginning; `ask` answers all the same."""
    model, processor, pictures, prefix = held("llava")
    sign = processor.image_token
    different = {"pictures": [[0], [1]]}
    plain = prefix.inputs(["Which?"] * 2)
    hole = plain["attention_mask"].clone()
    hole[0, -2] = 0
    cases = [
        (prefix, prefix.inputs(["Which?"] * 2, **different), different, "different pictures"),
        (prefix, prefix.inputs([f"{sign} {sign} a?", f"b {sign} {sign} a?"]), {}, "in front of their last picture"),
        (prefix, prefix.inputs([f"Which? {sign} {sign}"]), {}, "ends with its picture"),
        (prefix, prefix.inputs(["Which?"], pictures=[[]]), {"pictures": [[]]}, "shows no picture"),
        (prefix, {**plain, "pixel_values": torch.zeros(4, 3, 8, 8)}, {}, "brings pixel_values"),
        (prefix, {**plain, "position_ids": plain["input_ids"]}, {}, "brings position_ids"),
        (prefix, {**plain, "attention_mask": hole}, {}, "has holes"),
    ]
    for policy in (ViCA([0, 1, 2]) & FastV(1, 0.5), ViCA([0, 2]) & DropTokens(groups=[Group.IMAGE], keep=0.5)):
        dropping = sparing.VisionPrefix(model, processor, pictures, policy)
        cases.append((dropping, dropping.inputs("Which?"), {}, "by more than which tokens are what"))
    chosen = ViCA([0, 2]) & SkipModules([], [1], where=lambda tokens: tokens.ids == 3)
    chosen = sparing.VisionPrefix(model, processor, pictures, chosen)
    cases.append((chosen, chosen.inputs("Which?"), {}, "by more than which tokens are what"))
    for which, inputs, how, why in cases:
        with pytest.raises(ValueError, match=why):
            which.continued(inputs, **how)
    for which, how in ((prefix, different), (dropping, {})):
        plain = which.inputs(["Which?", "What?"], **how)
        with torch.no_grad(), which.apply(**how):
            expected = answers(model, plain)[0]
        assert which.ask(["Which?", "What?"], **how, **SETTINGS) == processor.tokenizer.batch_decode(
            expected, skip_special_tokens=True
        )
    changed = copy.deepcopy(model)
    stale = sparing.VisionPrefix(changed, processor, pictures, ViCA([0, 2]))
    inputs = stale.inputs("Which?")
    stale.continued(inputs)
    with torch.no_grad():
        changed.model.language_model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="have changed since"):
        stale.continued(inputs)


def test_mutations_show():
    """Another beginning, a moved question, and one key too few each exceed the tolerance."""
    model, processor, _, prefix = held("llava")
    sign = processor.image_token
    inputs = prefix.inputs(QUESTIONS)
    with torch.no_grad(), prefix.apply():
        right = model(**prefix.continued(inputs, later=True), logits_to_keep=1).logits
        other = prefix.continued(prefix.inputs([f"You know everything. {sign} {sign} a?"] * 3), later=True)
        given = prefix.continued(inputs, later=True)
        moved = {**given, "position_ids": given["position_ids"] + 40}
        assert relative(model(**moved, logits_to_keep=1).logits, right) > 10 * TOLERANCE
        given = prefix.continued(inputs, later=True)
        assert given["attention_mask"].shape[1] != other["attention_mask"].shape[1]
        other["past_key_values"].crop(
            -(other["past_key_values"].get_seq_length() - given["past_key_values"].get_seq_length())
        )
        wrong = {**given, "past_key_values": other["past_key_values"]}
        assert relative(model(**wrong, logits_to_keep=1).logits, right) > 10 * TOLERANCE
