"""`token_classes`: planted classes are found, a model without them says so, and every vision family can be asked."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import processors
import sparing
from class_cases import PLANTED, planted
from models import llama
from sparing.anatomy import anatomy_of, fingerprint
from sparing.lens import Criteria, token_classes
from sparing.lens.token_evidence import robust_z
from sparing.policies import DropTokens, OfClass
from sparing.tokens import Group, ImageSpan, TokenProfile
from sparing.tokens.profile import CLASSES, NAMES, Anchor


def noise(count, size=(40, 40)):
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)) for i in range(count)
    ]


@pytest.fixture(scope="module")
def found():
    model, processor = planted()
    return token_classes(model, processor, noise(12), seed=3)


def test_planted_classes_are_found(found):
    """Each patch is what it was made to be; evidence names the sign that told it."""
    model, processor = planted()
    assert found.shares == pytest.approx(
        {"vit_sink": 1 / 9, "llm_sink": 1 / 9, "dead": 1 / 3, "alive": 4 / 9}, abs=1e-5
    )
    assert found.overlapping["sink"] == pytest.approx(2 / 9, abs=1e-5)
    by_class = {anchor.classes[0]: anchor.evidence for anchor in found.anchors}
    assert by_class["vit_sink"]["encoder_norm_z"] > 3.5 > abs(by_class["dead"]["encoder_norm_z"])
    assert by_class["llm_sink"]["turns_to_begin_after"][0] == "mlp 1"
    assert not by_class["dead"]["turns_to_begin_after"]
    assert by_class["dead"]["consistency"] > 0.99
    # New pictures: the same patches.
    inputs = sparing.anatomy.ask(model, processor, ["What is it?"] * 2, [[p] for p in noise(14)[12:]])
    seen = sparing.lens.record(model, inputs, where=Group.IMAGE, levels=[0])
    told = found.classify(seen.at(0)).view(2, 9)
    for name, patches in PLANTED.items():
        assert (told[:, patches] == CLASSES.index(name)).all(), name
    assert not any(note.startswith("No ") for note in found.notes if "word" not in note)


def test_the_same_seed_gives_the_same_profile(found):
    model, processor = planted()
    assert token_classes(model, processor, noise(12), seed=3) == found
    again = token_classes(model, processor, noise(12), seed=3, batch=5)
    assert again.shares == found.shares
    assert [a.classes for a in again.anchors] == [a.classes for a in found.anchors]


def test_a_token_with_both_signs_is_both():
    """The encoder's outlier that also turns to the first token: two classes when they may overlap, one when not."""
    direction = tuple(normalize(torch.ones(60), dim=0).tolist())
    profile = TokenProfile("x", (Anchor(("vit_sink", "llm_sink"), direction, 0.9),))
    told = profile.classify(torch.ones(1, 60), overlapping=True)
    assert list(told) == list(NAMES)
    assert {name for name, mask in told.items() if mask.all()} == {"sink", "vit_sink", "llm_sink"}
    assert profile.classify(torch.ones(1, 60)).tolist() == [0]


def test_the_nearest_class_wins():
    one, other = normalize(torch.tensor([1.0, 0.2]), dim=0), normalize(torch.tensor([0.2, 1.0]), dim=0)
    profile = TokenProfile(
        "x", (Anchor(("dead",), tuple(one.tolist()), 0.5), Anchor(("llm_sink",), tuple(other.tolist()), 0.5))
    )
    states = torch.tensor([[1.0, 0.9], [0.9, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    assert profile.classify(states).tolist() == [2, 1, 3, 3]
    both = profile.classify(states, overlapping=True)
    assert both["dead"].tolist() == [True, True, False, False]
    assert both["alive"].tolist() == [False, False, True, True]


def test_by_words_is_the_releases_rule(found):
    """Any of the three nearest words by cosine, in plain PyTorch."""
    model, processor = planted()
    words = model.get_input_embeddings().weight.detach()
    inputs = sparing.anatomy.ask(model, processor, ["What is it?"], [[noise(1)[0]]])
    states = sparing.lens.record(model, inputs, where=Group.IMAGE, levels=[0]).at(0)
    top = (normalize(states, dim=1) @ normalize(words, dim=1).T).topk(3).indices
    ids = {"dead": [int(top[2, 1])], "vit_sink": [int(top[0, 2]), int(top[0, 0])]}
    profile = token_classes(model, processor, noise(8), rule="release", words=ids)
    told = profile.classify(states, vocabulary=words, overlapping=True)
    for name, those in ids.items():
        assert told[name].tolist() == [bool(set(row) & set(those)) for row in top.tolist()]
    assert told["dead"][PLANTED["dead"]].all()
    with pytest.raises(ValueError, match="vocabulary="):
        profile.classify(states)
    # The ids that it finds itself stand for the planted classes.
    own = token_classes(model, processor, noise(8), rule="release")
    told = own.classify(states, vocabulary=words)
    for name in own.words:
        assert (told[PLANTED[name]] == CLASSES.index(name)).all()
    assert own.words


def test_random_weights_have_no_classes():
    """Nothing comes again, and the profile says so in words; asking for what does not exist is refused."""
    model, processor = processors.family("llava")
    profile = token_classes(model, processor, noise(10))
    assert profile.shares == {"vit_sink": 0, "llm_sink": 0, "dead": 0, "alive": 1}
    assert not profile.anchors
    assert [note.split(":")[0] for note in profile.notes[:3]] == ["No ViT sinks", "No LLM sinks", "No dead tokens"]
    assert not profile.has("sink")
    assert profile.has("alive")
    with pytest.raises(ValueError, match="has no dead tokens .*No dead tokens: none comes again.*choose among alive"):
        OfClass(profile, ["dead"])


@pytest.mark.parametrize("name", processors.CASES)
def test_every_vision_family(name, tmp_path):
    """Pictures of several shapes: every token but newlines is counted, and the classes that are asked for are dropped."""
    model, processor = processors.family(name)
    pictures = [noise(i + 1, (30 + 9 * i, 70 - 6 * i))[-1] for i in range(8)]
    seen = []
    profile = token_classes(model, processor, pictures, batch=3, on_step=lambda done, line: seen.append((done, line)))
    assert seen[-1] == (1.0, "8 of 8 pictures")
    assert sum(profile.shares.values()) == pytest.approx(1, abs=1e-4)
    inputs = sparing.anatomy.ask(model, processor, ["What is it?"] * 8, [[p] for p in pictures])
    tokens = sparing.TokenMap.from_inputs(model, inputs)
    shown = sum(len(span.encoded()) for row in tokens.images for span in row)
    assert profile.found["tokens"] == shown
    newlines = int(tokens.of(Group.IMAGE).sum()) - shown
    assert (newlines > 0) == (name == "onevision")
    assert profile.found["encoder_norms"]["median"] > 0
    with torch.no_grad(), sparing.apply(model, DropTokens(where=OfClass(profile, ["alive"]))) as run:
        model(**inputs)
    gone = (~run.ledger.read(0) & tokens.valid).sum()
    assert int(gone) == round(profile.shares["alive"] * shown)
    path = profile.save(tmp_path / "profile.json")
    assert TokenProfile.load(path, model) == profile


@pytest.mark.parametrize("name", processors.CASES)
def test_feature_norms_are_what_the_projector_reads(name):
    """The largest patch of each token, from the input of the projector itself (OneVision: packed with newlines)."""
    model, processor = processors.family(name)
    pictures = [[processors.picture(64, 40, 1)], [processors.picture(33, 70, 2)]]
    inputs = sparing.anatomy.ask(model, processor, ["What is it?"] * 2, pictures)
    anatomy = anatomy_of(model)
    inner = model.model
    projector = getattr(inner, "multi_modal_projector", None) or (
        inner.connector.modality_projection if hasattr(inner, "connector") else inner.visual.merger
    )
    read, out = [], []
    hooks = [
        projector.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        anatomy.vision_encoder.register_forward_hook(lambda _, __, found: out.append(found)),
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    norms = anatomy.feature_norms(out[0], inputs)
    width = anatomy.config.vision_config.hidden_size
    tokens = sparing.TokenMap.from_inputs(model, inputs)
    assert len(norms) == int(tokens.of(Group.IMAGE).sum())
    want = read[0].reshape(*read[0].shape[:-1], -1, width).norm(dim=-1)
    if name.startswith("qwen"):
        want = want.reshape(-1, 4).amax(1)
        # Windows shuffle tokens, the same ones in the same picture.
        assert torch.equal(norms.sort().values, want.sort().values)
        if name == "qwen3_vl":
            assert torch.equal(norms, want)
        else:
            index = merged_order(inputs["image_grid_thw"].tolist())
            assert torch.equal(norms[index], want)
        return
    if name == "onevision":
        # The overviews in front are not touched by packing.
        starts = np.cumsum([0] + [span.stop - span.start for row in tokens.images for span in row])[:-1]
        tiles = [i for i, row in enumerate(tokens.images) for _ in range(row[0].tiles)]
        for i, start in enumerate(starts.tolist()):
            assert torch.equal(norms[start : start + 9], want[tiles.index(i)].flatten())
        assert norms.isnan().sum() == sum(row[0].grid[0] for row in tokens.images)
        return
    assert torch.equal(norms, want.amax(-1).flatten())


def merged_order(grids, side=2):
    """Tokens in the order of windows of 2x2 tokens, in plain Python."""
    order, start = [], 0
    for _, height, width in grids:
        height, width = height // 2, width // 2
        cells = [(r, c) for r in range(height) for c in range(width)]
        cells.sort(key=lambda cell: (cell[0] // side, cell[1] // side))
        order += [start + r * width + c for r, c in cells]
        start += height * width
    return torch.tensor(order)


def test_newlines_are_not_encoded():
    span = ImageSpan(5, 5 + 4 + 2 * 4, (2, 3), offset=4, stride=4)
    assert span.encoded().tolist() == [5, 6, 7, 8, 9, 10, 11, 13, 14, 15]


def test_robust_z_does_not_see_its_outliers():
    values = torch.cat([torch.linspace(9, 11, 81), torch.full((19,), 500.0)])
    z = robust_z(values)
    assert (z[81:] > 100).all()
    assert z[:81].abs().max() < 3
    assert robust_z(torch.full((5,), 2.0)).tolist() == [0] * 5
    assert robust_z(torch.full((5,), float("nan"))).isnan().all()


# Files and bad input --------------------------------------------------------------------------------------------------


def test_profiles_of_another_checkpoint_are_refused(found, tmp_path):
    """With the cure; by `load`, `apply` and `save` alike. A moved checkpoint keeps its fingerprint, a trained one loses it."""
    model, _ = planted()
    other, _ = processors.family("onevision")
    path = found.save(tmp_path / "profile.json")
    with pytest.raises(ValueError, match=r"this model is .* find its own with sparing\.lens\.token_classes"):
        TokenProfile.load(path, other)
    with pytest.raises(ValueError, match=r"OfClass\(\['dead'\]\) is for the checkpoint"):
        sparing.apply(other, DropTokens(where=OfClass(path, ["dead"])))
    assert TokenProfile.load(path, model) == found
    before = fingerprint(model)
    with torch.no_grad():
        weight = model.model.language_model.layers[2].mlp.down_proj.weight
        kept = weight.clone()
        weight *= 1.01
        assert fingerprint(model) != before
        weight.copy_(kept)
    assert fingerprint(model) == before
    assert fingerprint(model.to(torch.bfloat16)) == before
    model.to(torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=9), "schema 9"),
        (lambda d: d.pop("anchors"), "no token profile"),
        (lambda d: d.update(rule="norms"), "choose 'anchors' or 'words'"),
        (lambda d: d["anchors"][0].update(classes=["deaf"]), "'deaf'"),
        (lambda d: d["anchors"][0].update(direction=[2.0] * 60), "unit length"),
        (lambda d: d["anchors"][0].update(direction=[0.1]), "unit length"),
        (lambda d: d["anchors"][0].update(cosine=float("nan")), "unit length"),
    ],
)
def test_broken_files(found, tmp_path, change, message):
    given = found.as_dict()
    change(given)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        TokenProfile.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such token profile"):
        TokenProfile.load(tmp_path / "nothing.json")
    (tmp_path / "text.json").write_text("dead")
    with pytest.raises(ValueError, match="is no JSON"):
        TokenProfile.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="is no token profile"):
        TokenProfile.load(tmp_path / "list.json")


def test_states_that_cannot_be_told(found):
    with pytest.raises(ValueError, match="not finite"):
        found.classify(torch.full((2, 60), float("nan")))
    with pytest.raises(ValueError, match=r"tells tokens \[n, 60\]"):
        found.classify(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="did you mean dead"):
        found.has("deed")


def test_bad_input():
    model, processor = processors.family("llava")
    with pytest.raises(ValueError, match="reads text alone"):
        token_classes(llama(), processor, noise(8))
    for pictures in ([], noise(1), noise(7)):
        with pytest.raises(ValueError, match=f"at least 8 pictures .*got {len(pictures)}"):
            token_classes(model, processor, pictures)
    with pytest.raises(ValueError, match="list of PIL pictures"):
        token_classes(model, processor, noise(1)[0])
    with pytest.raises(ValueError, match="list of PIL pictures"):
        token_classes(model, processor, ["a.png"] * 8)
    with pytest.raises(ValueError, match="almost one and the same"):
        token_classes(model, processor, noise(1) * 8)
    with pytest.raises(ValueError, match="'anchors' or 'release'"):
        token_classes(model, processor, noise(8), rule="words")
    with pytest.raises(ValueError, match="rule='release'"):
        token_classes(model, processor, noise(8), words={"dead": [3]})
    with pytest.raises(ValueError, match=r"Criteria\(alike=1\.5\)"):
        token_classes(model, processor, noise(8), criteria=Criteria(alike=1.5))
    with pytest.raises(ValueError, match="'sunk'"):
        token_classes(model, processor, noise(8), rule="release", words={"sunk": [3]})


def test_models_that_are_not_sound():
    model, processor = processors.family("llava")
    model.train()
    try:
        with pytest.raises(ValueError, match=r"model\.eval\(\)"):
            token_classes(model, processor, noise(8))
    finally:
        model.eval()
    weight = model.model.multi_modal_projector.linear_2.bias
    with torch.no_grad():
        kept = weight.clone()
        weight[0] = float("nan")
        try:
            with pytest.raises(ValueError, match="not finite"):
                token_classes(model, processor, noise(8))
        finally:
            weight.copy_(kept)


def test_criteria_move_what_is_found():
    """A stricter cut on norms leaves the planted ViT sink with no sign, so it is dead; a laxer one on turning changes nothing."""
    model, processor = planted()
    strict = token_classes(model, processor, noise(10), criteria=Criteria(outlier=1e6))
    assert strict.shares["vit_sink"] == 0
    assert strict.shares["dead"] == pytest.approx(4 / 9, abs=1e-5)
    assert any(note.startswith("No ViT sinks: no token's encoder feature") for note in strict.notes)
    assert dataclasses.asdict(Criteria())["alike"] == 0.99
