"""The lenses on the shipped model, whose patches have a known truth. About five seconds of one core."""

import numpy as np
import pytest
import torch

import sparing
from sparing.anatomy import ask
from sparing.lens import (
    embedding_lens,
    find_words,
    layer_alignment,
    linear_probe,
    norm_matched,
    precision_at_k,
    record,
    shuffled,
    untrained_projector,
)
from sparing.tokens import Group
from sparing.worlds import scenes

COUNT = 40


@pytest.fixture(scope="module")
def world():
    """The model, its pictures, what was recorded of them, and the true colour and kind of each patch."""
    model, processor = sparing.load(sparing.zoo.path("scenes-llava"), dtype="float32")
    stream = scenes.stream("test", seed=3)
    drawn = [next(stream) for _ in range(COUNT)]
    inputs = ask(model, processor, ["what word ?"] * COUNT, [[scenes.picture(scene)] for scene in drawn])
    ids = processor.tokenizer.get_vocab()
    truth = torch.tensor([[ids[colour], ids[kind]] for scene in drawn for *_, colour, kind in scene.patch_words()])
    shown = torch.from_numpy(np.concatenate([scene.truth().thing.ravel() for scene in drawn])) >= 0
    return model, processor, drawn, inputs, record(model, inputs, where=Group.IMAGE, levels=[0]), truth, shown


def precision(model, recording, truth, shown):
    hits = precision_at_k(embedding_lens(model, recording, k=5), truth, 5)
    return hits[0, shown].float().mean().item()


def test_the_lens_is_above_every_null(world):
    model, _, _, inputs, seen, truth, shown = world
    found = precision(model, seen, truth, shown)
    with untrained_projector(model, seed=0):
        blank = record(model, inputs, where=Group.IMAGE, levels=[0])
    nulls = [norm_matched(seen, 0), shuffled(seen, 0), shuffled(seen, 0, between=True), blank]
    assert all(found > 2 * precision(model, null, truth, shown) for null in nulls)
    assert precision(model, nulls[0], truth, shown) == pytest.approx(5 / 121, abs=0.05)


def test_patches_are_where_the_reading_says(world):
    model, processor, drawn, _, seen, _, _ = world
    words = list(scenes.COLOUR_WORDS)
    scores = find_words(model, seen, processor.tokenizer.convert_tokens_to_ids(words))[0]
    reading = embedding_lens(model, seen, k=1)
    right, asked = 0, 0
    for row, scene in enumerate(drawn):
        patches = reading.of(reading.tokens.images[row][0], row)
        for colour, thing in scene.unique_colours().items():
            best = scores[patches.flatten(), words.index(colour)].argmax().item()
            right += divmod(best, scene.spec.columns) == (thing.row, thing.column)
            asked += 1
    assert right / asked > 0.3, "of 100 patches"


def test_a_probe_is_a_ceiling(world):
    model, _, _, _, seen, truth, shown = world
    first = torch.arange(len(shown)) < 100 * (COUNT - 10)
    states, colours = seen.at(0), truth[:, 0]
    probed = linear_probe(
        states[first & shown], colours[first & shown], states[~first & shown], colours[~first & shown]
    )
    top = precision_at_k(embedding_lens(model, seen, k=1), colours, 1)[0, ~first & shown]
    assert probed.accuracy > 0.5
    assert probed.accuracy > top.float().mean() - 0.3


def test_patches_are_like_the_words_that_tell_of_them(world):
    model, processor, drawn, _, seen, _, shown = world
    told = processor.tokenizer(
        [scene.tell() for scene in drawn], padding=True, padding_side="right", return_tensors="pt"
    )
    text = record(model, told)
    at = {tuple(token): number for number, token in enumerate(text.index.tolist())}
    # Both go through the objects in reading order; the kind is the fourth word about each.
    pairs = [at[row, 7 + 5 * number] for row, scene in enumerate(drawn) for number in range(len(scene.things))]
    kinds = [thing.kind for scene in drawn for thing in scene.things]
    ids = text.tokens.ids[tuple(text.index[pairs].T)].tolist()
    assert processor.tokenizer.convert_ids_to_tokens(ids) == kinds
    patches = shown.nonzero().flatten()
    found = layer_alignment(seen, text, torch.stack([patches, torch.tensor(pairs)], 1), pairings=50)
    for measure in (found.knn, found.cka):
        assert measure.peak is not None
        assert (measure.scores > measure.null_quantile(0.975)).all()
