"""Vision families: identity, parity in prefill and cached decode, `generate()`, one setting of each kind of policy."""

import inspect

import pytest
import torch

import sparing
import sparing.anatomy
from models import text_batch
from random_plans import RandomPlans
from sparing.execute import check_policy
from sparing.plan import Policy
from sparing.policies import DropTokens, EnterLate, FastV, ViCA
from sparing.tokens import Group
from vision_models import FAMILIES, IMAGE, QWEN, decoded, onevision, qwen2_5_vl, qwen3_vl

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", FAMILIES)


def relative(a, b, mask):
    return ((a - b)[mask].abs().max() / b[mask].abs().max()).item()


def marks(model):
    return {
        name: (set(module.__dict__), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def decode(model, inputs, execute, policy, extra):
    """Logits of a prompt, then of a chunk of three and of single tokens, all through the cache, at the model's positions."""
    with torch.no_grad(), sparing.apply(model, policy, execute=execute) as run:
        return decoded(model, inputs, extra)[0], run.ledger


@families
@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_identity(family, execute):
    """The same bits as stock where nothing is planned; the same numbers when forced; nothing is left behind."""
    build, batch = FAMILIES[family]
    for attention in ("sdpa", "eager"):
        model, inputs = build(attention), batch("left")
        with torch.no_grad():
            stock = model(**inputs).logits
            plain = model(**inputs, output_hidden_states=True)
            before = marks(model)
            with sparing.apply(model, execute=execute) as run:
                assert torch.equal(model(**inputs).logits, stock)
            assert run.ledger.cost() == run.ledger.dense_cost()
            with sparing.apply(model, execute=execute, force=True):
                forced = model(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"].bool()
        assert relative(forced.logits, stock, mask) <= TOLERANCE
        for a, b in zip(forced.hidden_states, plain.hidden_states, strict=True):
            assert relative(a, b, mask) <= TOLERANCE
        assert marks(model) == before


@families
@pytest.mark.parametrize("seed", range(3))
def test_random_plans(family, seed):
    """Dense and gathered agree in prefill, a cached chunk and single steps, and count the same."""
    build, batch = FAMILIES[family]
    model, inputs = build("eager" if seed == 2 else "sdpa"), batch("right" if seed == 1 else "left")
    policy = RandomPlans(seed, (0.6, 0.3, 0.8)[seed], promise=seed == 1)
    extra = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(seed))
    dense, dense_ledger = decode(model, inputs, "dense", policy, extra)
    fast, fast_ledger = decode(model, inputs, "gathered", policy, extra)
    assert relative(fast[0], dense[0], inputs["attention_mask"].bool()) <= TOLERANCE
    for a, b in zip(fast[1:], dense[1:], strict=True):
        assert relative(a, b, torch.ones(a.shape[:2], dtype=torch.bool)) <= TOLERANCE
    assert fast_ledger.cost() == dense_ledger.cost()
    assert fast_ledger.cost().flops["encoder"] > 0


def generate(model, inputs, execute, policy, force=False, **kwargs):
    torch.manual_seed(0)
    if execute is None:
        return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **kwargs)
    with sparing.apply(model, *policy, execute=execute, force=force) as run:
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, **kwargs)
    assert run.ledger.cost().flops["encoder"] > 0
    return out


POLICIES = [
    ViCA([0, 2]),
    DropTokens(groups=[Group.IMAGE], keep=0.5),
    EnterLate(1),
    FastV(1, 0.5),
    RandomPlans(4, 0.7, frees=False),
]


@families
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_generate_alike(family, beams, policy):
    """Greedy and beams give the same tokens in both executors; without a policy, those of stock."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("left")
    dense = generate(model, inputs, "dense", [policy], num_beams=beams)
    assert torch.equal(dense, generate(model, inputs, "gathered", [policy], num_beams=beams))
    if policy is POLICIES[0]:
        stock = generate(model, inputs, None, [], num_beams=beams)
        for execute in ("dense", "gathered"):
            for force in (False, True):
                assert torch.equal(generate(model, inputs, execute, [], force, num_beams=beams), stock)


@families
@pytest.mark.parametrize("policy", POLICIES[:4], ids=repr)
def test_policies_match(family, policy):
    """Logits and hidden states of both executors, dropped rows included."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("right")
    out = []
    for execute in ("dense", "gathered"):
        with torch.no_grad(), sparing.apply(model, policy, execute=execute):
            out.append(model(**inputs, output_hidden_states=True))
    mask = inputs["attention_mask"].bool()
    assert relative(out[1].logits, out[0].logits, mask) <= TOLERANCE
    for a, b in zip(out[1].hidden_states, out[0].hidden_states, strict=True):
        assert relative(a, b, mask) <= TOLERANCE
    with torch.no_grad():
        assert relative(out[0].logits, model(**inputs).logits, mask) > 10 * TOLERANCE


@families
@pytest.mark.parametrize("make", [lambda: ViCA([0, 2]), lambda: FastV(1, 0.5)], ids=["vica", "fastv"])
def test_check_policy(family, make):
    """The whole contract: padding, batches, cached decoding, reordering, beams, gradients, counted costs."""
    build, batch = FAMILIES[family]
    check_policy(make, build(), batch("left"))


@families
@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_pictures_in_beams(family, execute):
    """`generate` repeats rows and encoded pictures, but not their sizes: spans follow, and the encoder is counted as it ran."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("left")
    spans = sparing.TokenMap.from_inputs(model, inputs).images
    policy = Looks()
    with sparing.apply(model, policy, execute=execute) as run:
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False, pad_token_id=0)
    assert policy.spans == tuple(row for row in spans for _ in range(2))
    family_of = sparing.anatomy.anatomy_of(model)
    # Before 5.18 `generate` repeats the pictures themselves, and the encoder runs on every copy.
    runs = 1 if "mm_encoder_outputs" in inspect.signature(model.forward).parameters else 2
    assert run.ledger.cost().flops["encoder"] == runs * sum(family_of.picture_flops(s) for row in spans for s in row)


class Looks(Policy):
    """Sees which pictures there are and what the encoder gave, and does nothing."""

    def start(self, view):
        self.spans = view.tokens.images
        assert view.encoder_features is not None


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_a_later_turn_brings_pictures(family):
    """Text first (idle), then a chunk with pictures: both executors agree, features between layers included."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("right")
    inputs = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    first, mask = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0)), inputs["attention_mask"]
    if "image_grid_thw" in inputs:
        positions = sparing.TokenMap.from_inputs(model, batch("right")).position_ids
    else:
        positions = torch.arange(mask.shape[1]).expand_as(mask)
    out = []
    for execute in ("dense", "gathered"):
        with torch.no_grad(), sparing.apply(model, ViCA([1]), execute=execute):
            cache = model(first, attention_mask=torch.ones_like(first), use_cache=True).past_key_values
            turn = {
                **inputs,
                "attention_mask": torch.cat([torch.ones_like(first), mask], 1),
                "position_ids": positions + 5,
            }
            out.append(model(**turn, past_key_values=cache).logits)
            spans = cache.state.tokens.images
    assert relative(out[1], out[0], mask.bool()) <= TOLERANCE
    opening = int(family in QWEN)
    assert [s.start for s in spans[2]] == [5 + opening]


@families
def test_loads_what_was_saved(family, tmp_path):
    """An ordinary checkpoint, through `sparing.load`."""
    build, batch = FAMILIES[family]
    build().save_pretrained(tmp_path)
    model, _ = sparing.load(tmp_path)
    inputs = batch("left")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, build()(**inputs).logits)


@families
def test_text_alone_is_an_exact_no_op(family):
    """Bit for bit the stock model, also right after pictures."""
    build, _ = FAMILIES[family]
    model, inputs = build(), text_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        for policy in POLICIES[:4]:
            for execute in ("dense", "gathered"):
                with sparing.apply(model, policy, execute=execute):
                    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_mrope_decodes_at_the_models_positions(family, execute):
    """With the mask alone the model counts on from `rope_deltas`; the same as giving the positions, as saying it all again."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("left")
    step = torch.tensor([[5], [6], [7], [8]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1)
    types = torch.cat([inputs["mm_token_type_ids"], torch.zeros(4, 1, dtype=torch.long)], 1)
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], step], 1),
        "attention_mask": mask,
        "mm_token_type_ids": types,
    }
    with torch.no_grad():
        expected = model(**{**inputs, **longer}).logits[:, -1:]
        for known in (False, True):
            with sparing.apply(model, execute=execute, force=True):
                cache = model(**inputs, use_cache=True).past_key_values
                largest = cache.state.tokens.position_ids.amax((0, 2))
                position = {"position_ids": (largest[:, None] + 1).expand(3, -1, -1)} if known else {}
                logits = model(step, attention_mask=mask, past_key_values=cache, **position).logits
                assert torch.equal(cache.state.tokens.position_ids[:, :, -1], (largest + 1).expand(3, -1))
            assert relative(logits, expected, torch.ones(4, 1, dtype=torch.bool)) <= TOLERANCE


@pytest.mark.parametrize("family", QWEN)
def test_mrope_is_not_reindexed(family):
    build, batch = FAMILIES[family]
    policy = DropTokens(groups=[Group.IMAGE], keep=0.5, positions="reindex")
    for execute in ("dense", "gathered"):
        with sparing.apply(build(), policy, execute=execute), pytest.raises(ValueError, match="several axes"):
            build()(**batch("left"))


def test_mrope_positions_matter():
    """A mutation: one picture token one row lower must show."""
    model, inputs = qwen2_5_vl(), FAMILIES["qwen2_5_vl"][1]("left")
    positions = sparing.TokenMap.from_inputs(model, inputs).position_ids.clone()
    out = []
    for execute in ("dense", "gathered"):
        with torch.no_grad(), sparing.apply(model, RandomPlans(1, 0.9, weights=False, sees=False), execute=execute):
            out.append(model(**inputs, position_ids=positions).logits)
        positions[1, 0, 4] += 1
    assert relative(out[1], out[0], inputs["attention_mask"].bool()) > 10 * TOLERANCE


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_deepstack_reaches_frozen_tokens_and_not_dropped_ones(execute):
    """Features are added to a token that skips every branch, and not to one that is dropped."""
    model, inputs = qwen3_vl(), FAMILIES["qwen3_vl"][1]("left")
    is_image = inputs["input_ids"] == IMAGE
    for policy, moves in ((ViCA([0, 1, 2]), True), (DropTokens(groups=[Group.IMAGE]), False)):
        with torch.no_grad(), sparing.apply(model, policy, execute=execute):
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        added = (hidden[2] - hidden[0])[is_image].abs().amax(1)
        assert bool((added > 0).all() if moves else (added == 0).all())


@families
def test_prefill_in_chunks_is_refused(family):
    """It would cut pictures apart; the message says what to leave out."""
    build, batch = FAMILIES[family]
    with sparing.apply(build(), ViCA([0])), pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        build().generate(**batch("left"), max_new_tokens=2, pad_token_id=0, prefill_chunk_size=5)


def test_unknown_tensors_are_refused():
    """The fast executor says what it would leave out."""
    model, inputs = onevision(), FAMILIES["llava_onevision"][1]("left")
    with sparing.apply(model, ViCA([0])), pytest.raises(ValueError, match="does not know what cu_seq_lens_q"):
        model(**inputs, cu_seq_lens_q=torch.zeros(2))
