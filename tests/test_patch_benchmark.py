"""`patch_benchmark`: one object in one token of every family, by the pixels; marks by hand; what the shipped model can do."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import sparing
from models import llama
from processors import CASES, family
from sparing import zoo
from sparing.anatomy import anatomy_of, ask
from sparing.evaluate import statistics
from sparing.evaluate.task import NotApplicable, Subject
from sparing.evaluate.tasks.patch_benchmark import PatchBenchmarkTask
from sparing.evaluate.tasks.registry import task_class
from sparing.lens import ENGLISH, SCENES, embedding_lens, patch_benchmark
from sparing.lens.patch_benchmark import NOT_FOUND, UNKNOWN, _answer, _forms
from sparing.lens.patches.geometry import QUESTION, Geometry, find_geometry
from sparing.lens.patches.items import GROUPS, RGB, draw, make_items
from sparing.policies import DropTokens
from sparing.tokens import Group, TokenMap
from sparing.worlds import scenes

# By the processors of tests/processors.py: size, cell and grid of the pictures that reach the encoder as they are.
EXPECTED = {
    "llava": ((30, 30), (10, 10), ()),
    # The overview of a picture of one tile is that tile again: both are read.
    "onevision": ((30, 30), (10, 10), ()),
    "internvl": ((40, 40), (20, 20), ()),
    # Scaled up to 120 pixels, cut into 3x3 tiles, and seen whole in the last one.
    "smolvlm": ((120, 120), (20, 20), (9,)),
    # At most 32x32 pixels; a token is 2x2 patches of 4 pixels.
    "qwen2_5_vl": ((32, 32), (8, 8), ()),
    "qwen3_vl": ((32, 32), (8, 8), ()),
}


@pytest.fixture(scope="module")
def shipped():
    return sparing.load(zoo.path("scenes-llava"), dtype=torch.float32)


@pytest.fixture(scope="module")
def measured(shipped):
    return patch_benchmark(*shipped, items=100, seed=3, k=5)


def tokens_by_pixels(name, model, inputs):
    """The pixels of each of a prompt's image tokens, by each family's own rules, not through the adapter: index -> pixels."""
    (row,) = TokenMap.from_inputs(model, inputs).images
    pixels = inputs["pixel_values"]
    made = {}
    if name.startswith("qwen"):
        (_, high, wide) = inputs["image_grid_thw"][0].tolist()
        assert pixels.shape[0] == high * wide
        for place, index in enumerate(row[0].patches().flatten().tolist()):
            made[index] = pixels[4 * place : 4 * place + 4]
        return made
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    height, width = EXPECTED[name][1]
    grids = [span.patches() for span in row]
    if name == "onevision":
        assert len(tiles) == 2
        overview = row[0].start + torch.arange(9).view(3, 3)
        grids = [overview, row[0].patches()]
    assert len(grids) == len(tiles)
    for tile, grid in zip(tiles, grids, strict=True):
        for r, c in np.ndindex(*grid.shape):
            made[int(grid[r, c])] = tile[:, r * height : (r + 1) * height, c * width : (c + 1) * width]
    return made


@pytest.mark.parametrize("name", CASES)
def test_each_family_gives_a_cell_one_token_and_a_token_one_cell(name):
    model, processor = family(name)
    geometry = find_geometry(model, processor)
    assert (geometry.size, geometry.cell, geometry.overviews) == EXPECTED[name]
    height, width = geometry.size
    noise = np.random.default_rng(1)
    plain = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = tokens_by_pixels(name, model, ask(model, processor, [QUESTION], [[Image.fromarray(plain)]]))
    overview = {}
    if name == "smolvlm":
        last = TokenMap.from_inputs(model, ask(model, processor, [QUESTION], [[Image.fromarray(plain)]])).images[0][-1]
        overview = set(last.patches().flatten().tolist())
    owner = {}
    for row, column in np.ndindex(*geometry.grid):
        left, top, right, bottom = geometry.box(row, column)
        other = plain.copy()
        other[top:bottom, left:right] = noise.integers(0, 256, (bottom - top, right - left, 3))
        after = tokens_by_pixels(name, model, ask(model, processor, [QUESTION], [[Image.fromarray(other)]]))
        changed = [index for index in after if not torch.equal(after[index], before[index])]
        own = [index for index in changed if index not in overview]
        assert len(own) == (2 if name == "onevision" else 1), (row, column)
        assert not set(own) & owner.keys()
        owner |= dict.fromkeys(own, (row, column))
    # Every token of the picture's own views belongs to a cell.
    assert owner.keys() == before.keys() - set(overview)


@pytest.mark.parametrize("name", CASES)
def test_each_family_is_asked_and_read(name):
    model, processor = family(name)
    made = patch_benchmark(model, processor, items=6, k=4, levels=[0, 1], batch=4, max_new_tokens=2)
    assert [item.group for item in made.items] == [*GROUPS, "object"]
    assert len(made.answers) == len(made.identified) == 6
    assert [shape is None for shape in made.identified] == [True, False, False, True, False, True]
    assert made.right()[1] == 6
    assert made.found.shape == (sum(len(item.objects) for item in made.items), 2, 2)
    anatomy = anatomy_of(model)
    for item, tokens in zip(made.items, made.tokens, strict=True):
        assert len(tokens) == len(item.objects)
        inputs = ask(model, processor, [QUESTION], [[draw(item, made.geometry)]])
        bare = ask(model, processor, [QUESTION], [[draw(dataclasses.replace(item, objects=()), made.geometry)]])
        pixels, ground = (tokens_by_pixels(name, model, each) for each in (inputs, bare))
        differ = {index for index in pixels if not torch.equal(pixels[index], ground[index])}
        mine = {index for places in tokens for index in places}
        assert mine <= differ
        small = differ - mine
        assert not small or name == "smolvlm"
        assert bool(anatomy.is_image_token(inputs["input_ids"])[0, sorted(mine)].all())


def test_the_lens_is_asked_about_the_right_token(shipped):
    """What is found is what the embedding lens says of that token in a prompt made by hand."""
    model, processor = shipped
    made = patch_benchmark(model, processor, items=5, seed=1, k=7, generate=False)
    assert made.answers == made.identified == ()
    number = 0
    for item in made.items:
        reading = embedding_lens(model, ask(model, processor, [QUESTION], [[draw(item, made.geometry)]]), k=7)
        words = reading.words(processor)
        (span,) = reading.tokens.images[0]
        patches = reading.of(span, 0)
        for thing in item.objects:
            at = int(patches[thing.row, thing.column])
            for part, word in enumerate((thing.kind, thing.colour)):
                for level in range(len(made.levels)):
                    said = words[level][at]
                    expected = said.index(word) if word in said else NOT_FOUND
                    assert int(made.found[number, level, part]) == expected
            number += 1


def test_items_are_even_seeded_and_prefix_stable():
    geometry = Geometry((80, 80), (8, 8))
    items = make_items(70, geometry, ENGLISH)
    assert collections.Counter(item.group for item in items) == dict.fromkeys(GROUPS, 14)
    assert make_items(200, geometry, ENGLISH)[:70] == items
    assert make_items(70, geometry, ENGLISH, seed=1) != items
    for item in items:
        assert item.answer in item.options
        (colour,) = {thing.colour for thing in item.objects}
        (kind,) = {thing.kind for thing in item.objects}
        assert colour != item.background
        assert (item.background in ENGLISH.colours) == (item.group == "conflict")
        assert len({(thing.row, thing.column) for thing in item.objects}) == len(item.objects)
        right = {"object": kind, "colour": colour, "character": kind, "conflict": colour}
        expected = right.get(item.group, ("none", "one", "two", "three", "four")[len(item.objects)])
        assert item.answer == expected
        assert (len(item.objects) > 1) <= (item.group == "count")
        assert item.chance == 1 / len(item.options)
    assert collections.Counter(
        len(i.objects) for i in make_items(500, geometry, ENGLISH) if i.group == "count"
    ).keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("cell", [8, 10, 14, 28, 64])
def test_objects_stay_in_their_cells_and_show_their_colours(cell):
    geometry = Geometry((5 * cell, 5 * cell), (cell, cell))
    for item in make_items(100, geometry, ENGLISH, seed=2):
        pixels = np.asarray(draw(item, geometry)).astype(int)
        ground = np.asarray(RGB[item.background])
        bare = (pixels == ground).all(-1)
        for row, column in np.ndindex(5, 5):
            left, top, right, bottom = geometry.box(row, column)
            part = pixels[top:bottom, left:right]
            thing = next((t for t in item.objects if (t.row, t.column) == (row, column)), None)
            assert bare[top:bottom, left:right].all() == (thing is None)
            if thing is not None:
                ink = np.abs(part - np.asarray(RGB[thing.colour])).sum(-1).min()
                assert ink < 120, thing
                # Something of the background is left too: a shape, not a filled cell.
                assert np.abs(part - ground).sum(-1).min() < 60, thing


def test_answers_are_marked_by_the_first_possible_word():
    def mark(text, right="circle", options=ENGLISH.objects):
        answer = _answer(text, right, options, ENGLISH)
        return answer.named, answer.right, answer.exact

    assert mark("Circle.") == ("circle", True, True)
    assert mark("It is a circle, not a square.") == ("circle", True, False)
    assert mark("a square or a circle") == ("square", False, False)
    assert mark("Two crosses", "cross") == ("cross", True, False)
    assert mark("no idea") == (None, False, False)
    assert mark("3", "three", ENGLISH.numbers) == ("three", True, True)
    assert mark("There are 3 circles", "three", ENGLISH.numbers) == ("three", True, False)
    # The background's colour is an answer too, and a wrong one.
    assert mark("white", "red", ENGLISH.colours) == ("white", False, False)
    assert mark("The letter B", "B", ENGLISH.characters) == ("B", True, False)
    assert mark("b", "B", ENGLISH.characters) == ("B", True, True)


def test_shares_by_hand(measured):
    """Every figure again, from items and answers."""
    rows = list(zip(measured.items, measured.answers, measured.identified, strict=True))
    for group in GROUPS:
        mine = [row for row in rows if row[0].group == group]
        assert measured.right(group) == (sum(a.text.strip() == i.answer for i, a, _ in mine), len(mine))
        named = [a for _, a, s in mine if s is not None and s.right]
        assert measured.given_identified(group) == (sum(a.right for a in named), len(named))
    taken = sum(a.text.strip() == i.background for i, a, _ in rows if i.group == "conflict")
    assert measured.named_background() == (taken, 20)
    assert measured.chance("count") == 1 / 4
    assert measured.chance() == pytest.approx((1 / 6 + 1 / 6 + 1 / 4 + 1 / 16 + 1 / 6) / 5)
    owners = [item.group for item in measured.items for _ in item.objects]
    places = measured.found[:, 0, 1]
    assert measured.read("colour", "conflict", k=2) == (
        sum(0 <= int(p) < 2 for p, group in zip(places, owners, strict=True) if group == "conflict"),
        20,
    )
    anywhere, n = measured.read("kind", level=None)
    assert n == len(owners)
    assert anywhere >= max(measured.read("kind", level=level)[0] for level in measured.levels)


def test_the_shipped_model_sees_one_patch(measured):
    """It was trained on such pictures, so it must do well here, and its wording is found by itself."""
    assert measured.wording is SCENES
    assert measured.geometry == Geometry((80, 80), (8, 8))
    for group in ("object", "colour", "character", "conflict"):
        right, asked = measured.right(group)
        assert right / asked >= 0.75, group
    assert measured.named_background()[0] <= 2


def test_the_shipped_model_counts_better_than_by_guessing(shipped):
    """Not by much: objects that are alike in shape and colour are rare in its world, and three are hardly ever counted."""
    counted = patch_benchmark(*shipped, items=80, groups=["count"], lens=False)
    found = statistics.share(*counted.right("count"))
    assert found.low > counted.chance("count")


def test_policies_act_on_the_answers(shipped):
    model, processor = shipped
    stock = patch_benchmark(model, processor, items=20, groups=["object", "colour"], lens=False)
    with sparing.apply(model, DropTokens(groups=[Group.IMAGE])):
        unseeing = patch_benchmark(model, processor, items=20, groups=["object", "colour"], lens=False)
    assert unseeing.items == stock.items
    assert unseeing.right()[0] < stock.right()[0]
    with sparing.apply(model, DropTokens(groups=[Group.IMAGE])), pytest.raises(ValueError, match="dense"):
        patch_benchmark(model, processor, items=1)


def test_pictures_are_saved_on_request(shipped, tmp_path):
    made = patch_benchmark(*shipped, items=5, generate=False, levels=[0])
    folder = made.save_pictures(tmp_path / "pictures")
    files = sorted(file.name for file in folder.iterdir())
    assert len(files) == 6
    assert files[-1] == "sheet.png"
    assert files[0] == f"0000-object-{made.items[0].answer}.png"
    assert np.array_equal(np.asarray(Image.open(folder / files[0])), np.asarray(made.pictures()[0]))


def test_wordings_have_words_that_their_readers_know(shipped):
    _, processor = shipped
    assert SCENES.known_to(processor.tokenizer)
    assert not ENGLISH.known_to(processor.tokenizer)
    assert {word for text in SCENES.texts() for word in text.split()} <= set(scenes.vocabulary())
    assert ENGLISH.known_to(family("llava")[1].tokenizer)
    assert len(_forms(processor.tokenizer, "circle")) == 1
    assert _forms(family("llava")[1].tokenizer, "triangle of a kind") == []


def test_words_without_a_token_are_not_counted():
    model, processor = family("qwen3_vl")
    made = patch_benchmark(model, processor, items=10, groups=["object", "colour"], generate=False, k=3)
    unknown = (made.found[:, 0] == UNKNOWN).sum(0).tolist()
    for part, word in enumerate(("kind", "colour")):
        assert made.read(word)[1] == 10 - unknown[part]
    assert sum(unknown) > 0, "byte-level pieces do not spell whole words"


def test_bad_requests():
    model, processor = family("llava")
    with pytest.raises(ValueError, match="text alone"):
        patch_benchmark(llama(), processor)
    with pytest.raises(ValueError, match="no processor"):
        patch_benchmark(model, processor.tokenizer)
    with pytest.raises(ValueError, match="at least 1"):
        patch_benchmark(model, processor, items=0)
    with pytest.raises(ValueError, match="expected some of object, colour"):
        patch_benchmark(model, processor, groups=["smell"])
    with pytest.raises(ValueError, match="nothing is left"):
        patch_benchmark(model, processor, generate=False, lens=False)
    with pytest.raises(ValueError, match=r"2x2 cells has no room for 5.*leave the group count out"):
        wide = dataclasses.replace(ENGLISH, numbers=("one", "two", "three", "four", "five"))
        patch_benchmark(*family("internvl"), wording=wide)
    with pytest.raises(ValueError, match="no shape is called 'star'"):
        patch_benchmark(model, processor, wording=dataclasses.replace(ENGLISH, objects=("star",)))
    with pytest.raises(ValueError, match="no colour is called 'pink'"):
        patch_benchmark(model, processor, wording=dataclasses.replace(ENGLISH, colours=("pink",)))
    made = patch_benchmark(model, processor, items=2, generate=False, levels=[0], k=2)
    with pytest.raises(ValueError, match="expected kind or colour"):
        made.read("size")
    with pytest.raises(ValueError, match="level 1 was not read"):
        made.read("kind", level=1)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        made.read("kind", k=3)


def test_a_closed_vocabulary_needs_words_of_its_own(shipped):
    with pytest.raises(ValueError, match="lacks words of this wording"):
        patch_benchmark(*shipped, wording=ENGLISH)


def test_a_processor_of_another_model_is_refused():
    """It scales pictures to another size than the encoder's: no size reaches the encoder as it is."""
    model, _ = family("llava")
    other = sparing.load(zoo.path("scenes-llava"))[1]
    with pytest.raises(ValueError, match="belong to this model|image tokens|encoder's size"):
        find_geometry(model, other)


def test_task_of_studies(shipped):
    assert task_class("patch_benchmark") is PatchBenchmarkTask
    task = PatchBenchmarkTask(items=20, draw=4)
    steps = []
    found = task.measure(Subject(*shipped), seed=0, on_step=lambda done, word: steps.append(done))
    again = patch_benchmark(*shipped, items=20, seed=4, k=5)
    assert found.main == "accuracy"
    assert list(found.items["accuracy"].values()) == [float(answer.right) for answer in again.answers]
    assert found.figures["count"].n == 4
    assert found.figures["colour_given_object"].n == again.given_identified("colour")[1]
    right, n = again.read("colour")
    assert found.figures["read_colour"].value == pytest.approx(right / n)
    assert found.figures["read_colour"].low < right / n or right == 0
    assert found.details["chance"]["count"] == 0.25
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1)
    blind = PatchBenchmarkTask(items=10, groups=("object", "colour"), lens=False).measure(
        Subject(*shipped, (DropTokens(groups=[Group.IMAGE]),)), seed=0
    )
    assert blind.figures["flops_share"].value < 0.5
    assert "read_kind" not in blind.figures
    with pytest.raises(NotApplicable, match="text alone"):
        task.measure(Subject(llama(), None), seed=0)
    with pytest.raises(ValueError, match="no group is called 'smell'"):
        PatchBenchmarkTask(groups=("smell",)).check()
    with pytest.raises(ValueError, match="items=0"):
        PatchBenchmarkTask(items=0).check()
