"""The embedding lens, its reverse query and the logit lens against plain PyTorch, on every family."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import sparing
from models import CASES as BOTH
from models import TEXT_FAMILIES, llama, llava, llava_batch, text_batch, text_family
from processors import CASES, family, inputs, tokenizer
from sparing.lens import Recording, embedding_lens, find_words, logit_lens, record, screened
from sparing.lens.nearest import Best
from sparing.tokens import Group, TokenMap
from vision_models import FAMILIES

VARIANTS = ("cosine", "centred", "csls")


def naive(model, states, variant):
    """Every score of every state `[levels n d]` and word, as the papers write them."""
    matrix = model.get_input_embeddings().weight.float()
    scores = []
    for level in states.float():
        h, e = level, matrix
        if variant == "centred":
            h, e = h - h.mean(0), e - e.mean(0)
        cosine = F.cosine_similarity(h[:, None], e[None], dim=-1)
        if variant == "csls":
            of_state = cosine.topk(10, dim=1).values.mean(1, keepdim=True)
            of_word = cosine.topk(min(10, len(h)), dim=0).values.mean(0, keepdim=True)
            cosine = 2 * cosine - of_state - of_word
        scores.append(cosine)
    return torch.stack(scores)


def agrees(reading, scores, k):
    """The reading holds the k highest scores, and words that have them."""
    assert reading.ids.shape == (*scores.shape[:2], k)
    assert torch.allclose(reading.scores, scores.topk(k).values, atol=2e-5)
    assert torch.allclose(scores.gather(-1, reading.ids), reading.scores, atol=2e-5)
    assert all(len(set(ids)) == k for ids in reading.ids.flatten(0, 1).tolist())


def hooks(model):
    """How many there are: transformers has some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_each_vision_family_with_its_own_processor(name):
    model, batch = family(name)[0], inputs(name)
    before, own_hooks = model(**batch).logits, hooks(model)
    seen = record(model, batch, where=Group.IMAGE)
    for variant in VARIANTS:
        agrees(embedding_lens(model, batch, k=5, variant=variant, chunk=64), naive(model, seen.states, variant), 5)
    reading = logit_lens(model, batch, k=5, chunk=64)
    head, norm = model.get_output_embeddings(), sparing.anatomy.anatomy_of(model).decoder.norm
    agrees(reading, head(norm(seen.states)).log_softmax(-1), 5)
    row, place = reading.index.T
    assert torch.allclose(reading.scores[-1], before.log_softmax(-1)[row, place].topk(5).values, atol=1e-4)
    assert torch.allclose(reading.norms, seen.states.norm(dim=-1))
    assert torch.equal(model(**batch).logits, before)
    assert hooks(model) == own_hooks
    # Every patch of every picture's grid is one of those that were read.
    for number, spans in enumerate(reading.tokens.images):
        for span in spans:
            found = reading.of(span, number)
            assert found.shape == span.grid
            assert torch.equal(reading.index[found, 1], span.patches())
            assert (reading.index[found, 0] == number).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_raw_batches_on_either_side(name, side):
    build, batch_of = FAMILIES[name]
    model, batch = build(), batch_of(side)
    seen = record(model, batch, where=Group.IMAGE)
    agrees(embedding_lens(model, seen, k=3), naive(model, seen.states, "cosine"), 3)
    # Padding makes no difference: the tokens come row by row.
    other = record(model, batch_of("left" if side == "right" else "right"), where=Group.IMAGE)
    assert torch.allclose(embedding_lens(model, other, k=3).scores, embedding_lens(model, seen, k=3).scores, atol=1e-4)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_text_families_scaled_embeddings_and_capped_logits_included(name):
    model, batch = text_family(name), text_batch("left")
    seen = record(model, batch)
    row, place = seen.index.T
    first = embedding_lens(model, seen, k=1, levels=[0])
    assert torch.equal(first.ids[0, :, 0], batch["input_ids"][row, place]), "what enters is the word itself"
    assert torch.allclose(first.scores, torch.ones(()), atol=1e-5)
    own = model(**batch).logits[row, place].log_softmax(-1)
    last = logit_lens(model, seen, k=4, chunk=17)
    agrees(dataclasses.replace(last, ids=last.ids[-1:], scores=last.scores[-1:]), own[None], 4)


@pytest.mark.parametrize("variant", [*VARIANTS, "logits"])
def test_neither_the_chunk_nor_a_recording_changes_anything(variant):
    model, batch = llava(), llava_batch("left")

    def lens(given, **more):
        if variant == "logits":
            return logit_lens(model, given, k=6, **more)
        return embedding_lens(model, given, k=6, variant=variant, **more)

    whole = lens(batch)
    for chunk in (1, 5, 96, 97, 10_000):
        part = lens(batch, chunk=chunk)
        assert torch.equal(part.ids, whole.ids)
        assert torch.allclose(part.scores, whole.scores, atol=1e-5)
    of_all = lens(record(model, batch), where=Group.IMAGE)
    assert torch.equal(of_all.index, whole.index)
    assert torch.equal(of_all.ids, whole.ids)
    some = lens(record(model, batch), where=Group.IMAGE, levels=[1, 3])
    assert some.levels == (1, 3)
    assert torch.equal(some.ids, whole.ids[[1, 3]])
    # Naming fewer words filters and changes no score.
    allowed = torch.tensor([80, 3, 20, 21, 22, 23, 24, 3])
    filtered = lens(batch, vocabulary=allowed)
    full = (logit_lens if variant == "logits" else embedding_lens)(
        model, batch, k=97, **({} if variant == "logits" else {"variant": variant})
    )
    for at in [(0, 0), (2, 5), (4, 17)]:
        keep = torch.isin(full.ids[at], allowed)
        assert torch.equal(full.ids[at][keep][:6], filtered.ids[at])
        assert torch.allclose(full.scores[at][keep][:6], filtered.scores[at], atol=1e-5)


def test_ties_go_to_the_lower_id():
    model = copy.deepcopy(llama())
    table = model.get_input_embeddings().weight.data
    axes = torch.arange(97) % 3
    table.zero_()
    table[torch.arange(97), axes] = torch.tensor([1.0, 2, 4, 8])[torch.arange(97) % 4]
    table[90:] = 0
    tokens = TokenMap.from_groups(torch.ones(1, 4))
    states = torch.zeros(1, 4, 42)
    states[0, 0, 1], states[0, 1, 2], states[0, 2, 0] = 0.5, 4, -1  # and one of zeros
    index = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3]])
    seen = Recording(tokens, (2,), index, states, None, 3)
    for k in (1, 5, 40, 97):
        expected = naive(model, states, "cosine")[0].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        for chunk in (1, 2, 10, 31, 97):
            assert torch.equal(embedding_lens(model, seen, k=k, chunk=chunk).ids[0], expected)


def test_half_precision_is_compared_in_float32():
    model = copy.deepcopy(llava()).to(torch.bfloat16)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in llava_batch("left").items()}
    seen = record(model, batch, where=Group.IMAGE)
    assert seen.states.dtype == torch.bfloat16
    for variant in VARIANTS:
        reading = embedding_lens(model, seen, k=5, variant=variant)
        assert reading.scores.dtype == torch.float32
        agrees(reading, naive(model, seen.states, variant), 5)


def wide(words, d=64):
    """A model with many words and none of the rest, and states on which bf16 alone would go wrong."""
    torch.manual_seed(0)
    config = copy.deepcopy(llama().config)
    config.vocab_size, config.hidden_size = words, d
    model = type(llama())(config).eval()
    table = model.get_input_embeddings().weight.data
    table[: words // 2] = torch.randn(words // 2, d)
    # Words in tight bunches, equal ones among them: far closer to each other than bf16 can tell.
    table[words // 2 :] = torch.randn(words // 100, d).repeat_interleave(50, 0) + 1e-4 * torch.randn(words // 2, d)
    table[words // 2 : words // 2 + 40] = table[words // 2]
    tokens = TokenMap.from_groups(torch.ones(1, 60))
    states = torch.randn(2, 60, d) + 3 * table[torch.randint(words, (2, 60))]
    states[0, 0], states[0, 1] = table[words // 2], 0
    index = torch.stack([torch.zeros(60, dtype=torch.long), torch.arange(60)], 1)
    return model, Recording(tokens, (0, 1), index, states, None, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_screened_in_bf16_is_what_float32_finds(variant, monkeypatch):
    model, seen = wide(4000)
    plain = embedding_lens(model, seen, variant=variant, k=5)
    found, unproven = screened.find, []
    monkeypatch.setattr(screened, "pays", lambda device: True)
    monkeypatch.setattr(screened, "find", lambda *given: unproven.append(found(*given)) or unproven[-1])
    for chunk in (100, 1024, 4000):
        reading = embedding_lens(model, seen, variant=variant, k=5, chunk=chunk)
        assert torch.allclose(reading.scores, plain.scores, atol=2e-6)
        agrees(reading, naive(model, seen.states, variant), 5)
    share = torch.stack(unproven).float().mean()
    assert 0.1 < share < 0.9, "some were proven, and some could not be"
    if variant == "cosine":
        assert torch.equal(reading.ids[0, 0], torch.arange(2000, 2005)), "ties go to the lower id"
        assert torch.equal(reading.ids[0, 1], torch.arange(5)), "zeros tie with everything"


def test_the_bound_of_the_screen_holds():
    model, seen = wide(4000)
    unit = F.normalize(seen.states.flatten(0, 1), dim=-1)
    words = F.normalize(model.get_input_embeddings().weight.data, dim=-1)
    best = Best(len(unit), 5, unit.device)
    left = screened.find(best, unit, lambda: iter([(torch.arange(4000), words)]), lambda ids: words[ids])
    true = (unit @ words.T).topk(5).values
    assert torch.allclose(best.scores[~left], true[~left], atol=2e-6)
    # Without the bound it would have been wrong somewhere.
    assert not torch.allclose((unit.bfloat16() @ words.bfloat16().T).float().topk(5).values, true, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reverse_query(variant):
    model, batch = llava(), llava_batch("left")
    seen = record(model, batch, where=Group.IMAGE)
    scores = naive(model, seen.states, variant)
    found = find_words(model, batch, [7, 60, 7], variant=variant)
    assert torch.allclose(found, scores[..., [7, 60, 7]], atol=2e-5)
    # A word of several pieces is one more row of the matrix: their mean.
    table = model.get_input_embeddings().weight
    mean = table[[5, 9, 11]].mean(0)
    if variant == "cosine":
        expected = F.cosine_similarity(seen.states, mean, dim=-1)
        assert torch.allclose(find_words(model, seen, [[5, 9, 11]])[..., 0], expected, atol=2e-5)
    assert find_words(model, seen, [[5], [5, 9, 11]], variant=variant).shape == (5, len(seen.index), 2)
    assert torch.equal(find_words(model, seen, [[5]], variant=variant), find_words(model, seen, [5], variant=variant))
    assert find_words(model, seen, [], variant=variant).shape == (5, len(seen.index), 0)


@pytest.mark.parametrize(("build", "batch_of"), BOTH)
def test_text_alone_is_an_empty_reading(build, batch_of):
    model = build()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for lens in (embedding_lens, logit_lens):
        reading = lens(model, {"input_ids": ids}, k=4)
        assert reading.ids.shape == reading.scores.shape == (len(reading.levels), 0, 4)
        assert reading.words(tokenizer()) == [[]] * len(reading.levels)
    for variant in VARIANTS:
        assert embedding_lens(model, {"input_ids": ids}, variant=variant).ids.shape[1] == 0
    assert find_words(model, {"input_ids": ids}, [1, 2]).shape[1:] == (0, 2)


def test_words_are_readable():
    words = tokenizer(["<image>"])
    numbers = words(" red é")["input_ids"]
    broken = words.convert_tokens_to_ids("Ã")
    tokens = TokenMap.from_groups(torch.ones(1, 1))
    ids = torch.tensor([[[*numbers, broken, words.convert_tokens_to_ids("<image>"), 10_000]]])
    reading = sparing.lens.WordReading(
        tokens, (0,), torch.tensor([[0, 0]]), ids, torch.zeros(ids.shape), torch.ones(1, 1)
    )
    *text, byte, special, beyond = reading.words(words)[0][0]
    assert "".join(text[:-2]) == " red "
    assert (byte, special, beyond) == ("<0xC3>", "<image>", "<10000>")


def test_bad_input_is_refused():
    model, batch = llava(), llava_batch("left")
    seen = record(model, batch, where=Group.IMAGE)
    for lens in (embedding_lens, logit_lens):
        with pytest.raises(ValueError, match=r"1 <= k <= 97.*k=98"):
            lens(model, seen, k=98)
        with pytest.raises(ValueError, match=r"1 <= k <= 2.*k=3"):
            lens(model, seen, k=3, vocabulary=[4, 5, 5])
        with pytest.raises(ValueError, match="between 0 and 96, got 4..97"):
            lens(model, seen, vocabulary=[97, 4])
        with pytest.raises(ValueError, match="got none"):
            lens(model, seen, vocabulary=[])
        with pytest.raises(ValueError, match="chunk"):
            lens(model, seen, chunk=0)
        with pytest.raises(ValueError, match="level 7 was asked for; recorded are 0, 1"):
            lens(model, seen, levels=[7])
        with pytest.raises(ValueError, match="give the model that was recorded"):
            lens(llama(), seen)
        broken = seen.states.clone()
        broken[2, 5, 0] = float("nan")
        row, place = seen.index[5].tolist()
        with pytest.raises(
            ValueError, match=rf"level 2 are not finite \(1 of 36 tokens, first row {row}, token {place}"
        ):
            lens(model, dataclasses.replace(seen, states=broken))
    with pytest.raises(ValueError, match="'cosine', 'centred', 'csls'"):
        embedding_lens(model, seen, variant="euclid")
    with pytest.raises(ValueError, match="its own mean"):
        alone = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        alone[0, -1] = True
        embedding_lens(model, batch, where=alone, variant="centred")
    with pytest.raises(ValueError, match="without any piece"):
        find_words(model, seen, [3, []])
    with pytest.raises(ValueError, match="between 0 and 96"):
        find_words(model, seen, [3, 97])
    spoilt = copy.deepcopy(model)
    spoilt.get_input_embeddings().weight.data[11, 3] = float("inf")
    with pytest.raises(ValueError, match="word 11 is not finite"):
        embedding_lens(spoilt, seen)


def test_a_part_of_a_recording():
    model, batch = llava(), llava_batch("left")
    seen = record(model, batch, middle=True)
    part = seen.only(Group.IMAGE, [1, 4])
    again = record(model, batch, where=Group.IMAGE, levels=[1, 4], middle=True)
    for name in ("index", "states", "middle"):
        assert torch.equal(getattr(part, name), getattr(again, name))
    assert seen.only(levels=[4]).middle is None
    assert seen.only() is seen
    with pytest.raises(ValueError, match="no level at all"):
        seen.only(levels=[])
