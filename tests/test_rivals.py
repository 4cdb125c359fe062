"""The rivals of ViCA beyond their equations: what they refuse, edges, CLIP's relevance."""

import copy
from decimal import Decimal

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

import models
import sparing
from sparing.policies import (
    DART,
    CDPruner,
    DivPrune,
    DropTokens,
    EnterLate,
    SparseVLM,
    ViCA,
    VisionZip,
    VisPruner,
    VScan,
)
from sparing.policies.cd_pruner import most_probable
from sparing.policies.clusters import density_peaks
from sparing.policies.v_scan import windows_of
from sparing.tokens import Group, ImageSpan, TokenMap


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DivPrune(0), "DropTokens"),
        (lambda: VisionZip(1.2), "above 0 and at most at 1"),
        (lambda: VisionZip(0.5, contextual=2), "between 0 and 1"),
        (lambda: VisPruner(0.5, important=-1), "between 0 and 1"),
        (lambda: VScan(0.5, 0), "layer >= 1, or None"),
        (lambda: VScan(0.5, window=0), "at least one token a side"),
        (lambda: VScan(0.5, then=2), "between 0 and 1"),
        (lambda: CDPruner(0.5, relevance=3), "a function of the prompt"),
        (lambda: DART(0), "layer >= 1"),
        (lambda: DART(image_pivots=0, text_pivots=0), "at least one pivot"),
        (lambda: DART(keep=3), "between 0 and 1"),
        (lambda: SparseVLM([2, 1], [0.5, 0.5]), "ascending"),
        (lambda: SparseVLM([1, 2], [0.5]), "one a stage"),
        (lambda: SparseVLM([1, 2], [0.5, 0.7]), "do not rise"),
        (lambda: SparseVLM([1], [0.5], recycle=2), "between 0 and 1"),
        (lambda: SparseVLM([1], [0.5], merge="max"), '"mean" .* or "sum"'),
        (lambda: SparseVLM([1], [0.5], chunk=0), "at least one rater"),
        (lambda: DropTokens(groups=[Group.IMAGE], keep=0.5, choose="often"), '"random" or "uniform"'),
        (lambda: DART(2) & EnterLate(3), "they are away"),
        (lambda: VScan(0.5, 2) & EnterLate(3), "they are away"),
        (lambda: SparseVLM([1], [0.5]) & ViCA([0]), "they are not read"),
    ],
)
def test_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (DART(4), "would drop nothing"),
        (VScan(0.5, 4), "layer 4 does not exist"),
        (SparseVLM([3], [0.5]), "no layer would have fewer"),
        (SparseVLM([5], [0.5]), "layer 5 does not exist"),
    ],
    ids=repr,
)
def test_refused_on_a_model(policy, words):
    with pytest.raises(ValueError, match=words):
        sparing.apply(models.llava(), policy)


ALL = [
    DivPrune(0.5),
    CDPruner(0.5),
    VisionZip(0.5),
    VisPruner(0.5),
    VScan(0.5, 2, 0.9),
    DART(2, 0.5),
    SparseVLM([1], [0.5], recycle=0),
    DropTokens(groups=[Group.IMAGE], keep=0.5, choose="uniform"),
]


@torch.no_grad()
def kept(policy, ids, execute="gathered"):
    """How many picture tokens the last layer reads."""
    model = models.llava()
    ids = torch.tensor([ids])
    pictures = int((ids == models.IMAGE).sum()) // models.PATCHES
    pixels = torch.randn(pictures, 3, 30, 30, generator=torch.Generator().manual_seed(7))
    with sparing.apply(model, policy, execute=execute) as run:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    assert logits.isfinite().all()
    return int((run.ledger.read(3) & (ids == models.IMAGE)).sum())


@pytest.mark.parametrize("policy", ALL, ids=repr)
def test_a_picture_alone(policy):
    """No text behind the picture, none at all: the choice is made all the same."""
    for ids in ([3, 4, *[models.IMAGE] * 9], [models.IMAGE] * 9):
        assert kept(policy, ids) in (4, 5)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_shares_at_the_edges(share):
    """At least one token of each picture; of nine, 99% are all."""
    ids = [3, *[models.IMAGE] * 9, 5, *[models.IMAGE] * 9, 7, 8]
    for make in (
        DivPrune,
        CDPruner,
        lambda keep: VisionZip(keep, contextual=1.0),
        lambda keep: VisionZip(keep, contextual=0.0),
        VisPruner,
        lambda keep: VisPruner(keep, important=1.0),
        lambda keep: VisPruner(keep, important=0.0),
        lambda keep: VScan(keep, None),
        lambda keep: VScan(keep, None, local=1.0, window=1),
    ):
        assert kept(make(share), ids) == (2 if share < 0.5 else 18)


def test_all_kept_is_the_stock_model():
    model, inputs = models.llava(), models.llava_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        for policy in (DivPrune(1), VisionZip(1), VScan(1, 2, 1.0), DART(2, 1), SparseVLM([1], [1.0])):
            with sparing.apply(model, policy) as run:
                assert torch.equal(model(**inputs).logits, stock), policy
            assert run.ledger.cost() == run.ledger.dense_cost()


def test_a_map_without_pictures_is_refused():
    """Image tokens of no known picture could not be told apart."""
    model = models.llava()
    tokens = TokenMap.from_groups(torch.tensor([[3, 2, 2, 2, 1]]))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="which pictures"),
        sparing.apply(model, DivPrune(0.5), tokens=tokens),
    ):
        model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), attention_mask=torch.ones(1, 5, dtype=torch.long))


def clip_model():
    """A CLIP around a vision tower of the size of LLaVA's."""
    torch.manual_seed(0)
    vision = models.llava().config.vision_config.to_dict()
    text = {
        "hidden_size": 24,
        "intermediate_size": 31,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=19)).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relevance_of_clip(dtype):
    """Minus the mean cosine in the joint space, of what the tower gave for a patch; CLIP in a precision of its own."""
    clip, words = clip_model(), torch.randn(4, 3, 19)
    policy = CDPruner.with_clip(clip, words, keep=0.5)
    seen = {}
    inner = policy.relevance

    def noted(view):
        seen["states"], seen["found"] = view.encoder_states(), inner(view)
        return seen["found"]

    policy.relevance = noted
    model, inputs = copy.deepcopy(models.llava()).to(dtype), models.llava_batch("left")
    with sparing.apply(model, policy):
        model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    spans = TokenMap.from_inputs(model, inputs).images
    for row, spans_of_row in enumerate(spans):
        for at in (i for span in spans_of_row for i in span.encoded().tolist()):
            joint = clip.visual_projection(clip.vision_model.post_layernorm(seen["states"][row, at].float()))
            want = -torch.nn.functional.cosine_similarity(joint, words[row], dim=-1).mean()
            assert torch.allclose(seen["found"][row, at], want, atol=1e-6)


@torch.no_grad()
def test_text_of_clip():
    """As `get_text_features` returns it; one row of it for all; refused with the cure where `generate` repeats rows."""
    clip, model, inputs = clip_model(), models.llava(), models.llava_batch("left")
    features = clip.get_text_features(input_ids=torch.arange(3, 31).view(4, 7))

    def answered(text, **how):
        with sparing.apply(model, CDPruner.with_clip(clip, text, keep=0.5)):
            return model.generate(**inputs, max_new_tokens=2, pad_token_id=0, do_sample=False, **how)

    text = features.pooler_output
    assert torch.equal(answered(features), answered(text))
    assert torch.equal(answered(text[:1]), answered(text[:1].repeat(4, 1)))
    with pytest.raises(ValueError, match=r"4 rows, and the prompt has 8: .*repeat_interleave"):
        answered(text, num_beams=2)
    answered(text.repeat_interleave(2, 0), num_beams=2)


def test_windows():
    """Row by row, narrower at the edges; what lies in front of the grid has windows of its own."""
    assert windows_of(ImageSpan(0, 12, (3, 4)), 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    assert windows_of(ImageSpan(0, 12, (2, 4), offset=4, stride=4), 2).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 2, 2]
    assert windows_of(ImageSpan(0, 3, (1, 2), offset=1), 3).tolist() == [0, 1, 1]


def test_duplicates_join_one_cluster():
    """Two heaps of equal tokens: two centres, one of each."""
    heaps = torch.cat([torch.zeros(4, 5), torch.ones(3, 5)])
    centres, member = density_peaks(heaps, 2)
    assert {int(member[0]), int(member[6])} == {0, 1}
    assert (member[:4] == member[0]).all()
    assert (member[4:] == member[6]).all()
    assert member[centres].tolist() == [0, 1]


@pytest.mark.parametrize("scale", [1, 100])
def test_centres_of_tokens_far_apart(scale):
    """The density and distance of the definition, in numbers that can hold them."""
    states = scale * torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    far = torch.cdist(states.double(), states.double()) / 7**0.5
    spread = far.sort(1).values[:, :3].square().mean(1)
    density = [Decimal(-value).exp() for value in spread.tolist()]
    apart = [
        min([far[i, j] for j in range(20) if density[j] > density[i]], default=far.max()).item() for i in range(20)
    ]
    product = [Decimal(a) * d for a, d in zip(apart, density, strict=True)]
    best = sorted(range(20), key=lambda i: -product[i])[:3]
    assert density_peaks(states, 3)[0].tolist() == best


@pytest.mark.parametrize(("size", "count"), [(8, 8), (576, 402)])
def test_more_tokens_than_directions(size, count):
    """A kernel of low rank: what adds nothing is chosen by its relevance, once, and nothing becomes NaN."""
    generator = torch.Generator().manual_seed(0)
    rank = min(size // 2, 48)
    unit = torch.nn.functional.normalize(torch.randn(1, size, rank, generator=generator), dim=-1)
    relevance = torch.rand(1, size, generator=generator)
    (chosen,) = most_probable(unit @ unit.mT, relevance, count).tolist()
    assert len(set(chosen)) == count
    late = relevance[0, chosen[rank:]]
    assert torch.equal(late, late.sort(descending=True).values)
