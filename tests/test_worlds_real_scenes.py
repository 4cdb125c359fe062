"""The real-scenes world: which picture is drawn, answers by brute force, splits of scenes and of pictures, bad folders."""

import functools
import itertools
import math
import shutil
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from real_pictures import DATA, needs_pictures, stand_in
from sparing.worlds.grids import BlindGuesser, chance
from sparing.worlds.real_scenes import (
    CLASSES,
    COLOURS,
    DIGITS,
    FACTS,
    KINDS,
    TASKS,
    Gallery,
    RealSceneSpec,
    RealScenesWorld,
    vocabulary,
)
from sparing.worlds.splits import split_of
from sparing.worlds.vocabulary import closed_tokenizer

SPLITS = ("train", "validation", "test")
RGB = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 220, 50),
       "purple": (150, 60, 190), "orange": (245, 140, 30), "black": (20, 20, 20), "white": (245, 245, 245)}  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def world(pictures):
    return RealScenesWorld(gallery_of(pictures))


@functools.cache
def gallery_of(folder):
    return Gallery.open(folder)


@pytest.fixture(scope="session")
def drawn(world):
    return list(itertools.islice(world.stream("train", 3), 120))


@pytest.fixture(scope="session")
def asked(world):
    return world.examples("test", 40, seed=4)


@pytest.fixture(scope="session", params=["stand-in", pytest.param("real", marks=needs_pictures)])
def quiet(request, world):
    """A world without noise: what a patch shows can be compared with the files."""
    spec = RealSceneSpec(colour_noise=0, pixel_noise=0.0)
    return (
        RealScenesWorld(world.gallery, spec) if request.param == "stand-in" else RealScenesWorld(gallery_of(DATA), spec)
    )


def patches_of(pixels, patch):
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    return pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).astype(float)


def nearest_colour(rgb):
    return min(RGB, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, RGB[name], strict=True)))


def resized(images, side):
    """Areas averaged: each pixel repeated until `side` divides the width, then means of blocks."""
    times = math.lcm(images.shape[1], side) // images.shape[1]
    fine = images.repeat(times, 1).repeat(times, 2).astype(float)
    block = fine.shape[1] // side
    return fine.reshape(len(images), side, block, side, block, *images.shape[3:]).mean((2, 4))


def test_the_nearest_picture_of_the_files_is_the_one_drawn(quiet):
    """Read from pixels and files alone: colours, the digit or photograph, and which of all it is."""
    gallery = quiet.gallery
    ink = resized(gallery.digits[:, 2:-2, 2:-2], 16) / 255
    photos = resized(gallery.photos, 16)
    places = Counter()
    for scene in itertools.islice(quiet.stream("test", 5), 25):
        cells = patches_of(quiet.paint([scene])[0], 16)
        truth = scene.truth()
        ground = np.median(cells.reshape(-1, 3), axis=0)
        assert nearest_colour(ground) == scene.background
        occupied = np.abs(cells - ground).max((2, 3, 4)) > 1
        assert (occupied == (truth.kind > 0)).all()
        for row, column in np.argwhere(truth.kind > 0):
            number = truth.thing[row, column]
            thing, image, cell = scene.things[number], scene.images[number], cells[row, column]
            assert thing[:2] == (row, column)
            if thing.kind in DIGITS:
                line = np.asarray(RGB[thing.colour]) - ground
                mask = (cell - ground) @ line / (line @ line)
                nearest = np.square(ink - mask).sum((1, 2)).argmin()
                assert DIGITS[gallery.digit_labels[nearest]] == thing.kind
            else:
                assert thing.colour == "photo"
                off = [np.square(photos - side).sum((1, 2, 3)) for side in (cell, cell[:, ::-1])]
                nearest = np.minimum(*off).argmin()
                places["mirrored"] += off[1][nearest] < off[0][nearest]
                places["photo"] += 1
                assert CLASSES[gallery.photo_labels[nearest]] == thing.kind
            assert nearest == image
    assert 0 < places["mirrored"] < places["photo"]


def test_truth_told_words_and_things_agree(drawn):
    for scene in drawn:
        truth, words = scene.truth(), scene.patch_words()
        for row, column in np.ndindex(10, 10):
            told = words[row * 10 + column]
            assert told == (
                f"r{row + 1}",
                f"c{column + 1}",
                COLOURS[truth.colour[row, column]],
                KINDS[truth.kind[row, column]],
            )
            number = truth.thing[row, column]
            assert (number < 0) == (told[3] == "nothing")
            if number >= 0:
                assert scene.things[number] == (row, column, *told[2:])
            assert (told[2] == "photo") == (told[3] in CLASSES)
        assert 1 <= len(scene.things) == len(scene.images) <= 6
        assert all(thing.colour != scene.background for thing in scene.things)
        assert scene.things == tuple(sorted(scene.things))
        told = [f"{' '.join(word)} ." for word in words if word[3] != "nothing"]
        assert scene.tell() == " ".join([f"{scene.background} background .", *told])


def solve(scene, text):
    """Answers a question from the told scene alone, by other means than the generator's; fails if it has no one answer."""
    (background, _), *told = [sentence.split() for sentence in scene.tell().rstrip(" .").split(" . ")]
    things = [(int(row[1:]), int(column[1:]), colour, kind) for row, column, colour, kind in told]
    numbers = ["zero", "one", "two", "three", "four"]

    def only(name):
        (one,) = [thing for thing in things if name in thing[2:]]
        return one

    match text.split():
        case ["what", "colour", "is", ("grass" | "snow" | "coal" | "sky" | "blood" | "lemon") as thing, "?"]:
            return {
                "grass": "green",
                "snow": "white",
                "coal": "black",
                "sky": "blue",
                "blood": "red",
                "lemon": "yellow",
            }[thing]
        case ["what", "is", one, "plus", two, "?"]:
            return numbers[numbers.index(one) + numbers.index(two)]
        case ["what", "digit", "is", name, "?"]:
            assert only(name)[3] in DIGITS
            return only(name)[3]
        case ["what", "is", "in", "photo", "?"]:
            assert only("photo")[3] in CLASSES
            return only("photo")[3]
        case ["what", "colour", "is", "background", "?"]:
            return background
        case ["what", "colour", "is", "behind", name, "?"]:
            assert only(name)[3] in DIGITS
            return background
        case ["what", "colour", "is", name, "?"]:
            assert only(name)[2] in RGB
            return only(name)[2]
        case ["what", "is", "at", row, column, "?"]:
            return next((t[3] for t in things if (f"r{t[0]}", f"c{t[1]}") == (row, column)), "nothing")
        case ["how", "many", name, "?"]:
            return numbers[sum(name in thing[2:] for thing in things)]
        case ["where", "is", name, "from", other, "?"]:
            one, two = only(name), only(other)
            return f"{'left' if one[1] < two[1] else 'right'} {'above' if one[0] < two[0] else 'below'}"
        case ["where", "is", name, "?"]:
            return "r{} c{}".format(*only(name))
    raise AssertionError(text)


def test_answers_agree_with_an_independent_solver(asked, drawn, world):
    for example in asked:
        assert example.question.answer == solve(example.scene, example.question.text), example.question
        assert (example.question.text in FACTS) == (example.question.task == "blind")
    rng = np.random.default_rng(0)
    for scene in drawn[:40]:
        packed = world.questions(scene, rng, 12)
        assert len(packed) == 12
        assert all(made.answer == solve(scene, made.text) for made in packed)


def test_every_word_is_in_the_vocabulary_once(asked):
    words = vocabulary()
    assert len(set(words)) == len(words) < 100
    used = {word for e in asked for word in (e.question.text + " " + e.question.answer + " " + e.scene.tell()).split()}
    assert used <= set(words)
    tokenizer = closed_tokenizer(words, ["<image>"])
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words)).input_ids


@pytest.mark.parametrize("where", ["stand-in", pytest.param("real", marks=needs_pictures)])
def test_splits_share_neither_scene_nor_picture(where, pictures):
    gallery = gallery_of(pictures if where == "stand-in" else DATA)
    world = RealScenesWorld(gallery)
    keys, used = {}, {}
    for split in SPLITS:
        scenes = [scene for seed in (0, 1) for scene in itertools.islice(world.stream(split, seed), 300)]
        keys[split] = {scene.key for scene in scenes}
        assert all(split_of(scene.key) == split for scene in scenes)
        used[split] = {
            (thing.colour == "photo", image)
            for scene in scenes
            for thing, image in zip(scene.things, scene.images, strict=True)
        }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
        assert not used[one] & used[other]
    for kinds, labels in ((DIGITS, gallery.digit_labels), (CLASSES, gallery.photo_labels)):
        parts = {split: np.concatenate([gallery.of(kind, split) for kind in kinds]) for split in SPLITS}
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
        assert 0.86 < len(parts["train"]) / len(labels) < 0.94
        for kind in kinds:
            assert {kinds[label] for label in labels[gallery.of(kind)]} == {kind}


def test_same_seed_same_pictures_and_questions_in_another_process(world, pictures):
    code = (
        "from sparing.worlds.real_scenes import RealScenesWorld; import sys, zlib;"
        f"w = RealScenesWorld.open({str(pictures)!r}); e = w.examples('test', 2, seed=5)[-3];"
        "sys.stdout.write(f'{e.scene} {e.question} {zlib.crc32(w.paint([e.scene]).tobytes())}')"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    example = world.examples("test", 2, seed=5)[-3]
    assert elsewhere == f"{example.scene} {example.question} {zlib.crc32(world.paint([example.scene]).tobytes())}"
    assert world.examples("test", 2, seed=6)[-3] != example
    assert world.examples("test", 3, seed=5)[: 2 * len(TASKS)] == world.examples("test", 2, seed=5)


def test_pictures_do_not_depend_on_the_batch(world, drawn):
    together = world.paint(drawn[:5])
    assert together.shape == (5, 160, 160, 3)
    assert np.array_equal(together[3], world.paint([drawn[3]])[0])
    assert np.array_equal(np.asarray(world.picture(drawn[3])), together[3])


def test_counts_are_all_frequent_and_guessers_do_badly(world, asked):
    counts = Counter(e.question.answer for e in world.examples("train", 300, seed=9, tasks=["count"]))
    assert set(counts) == {"zero", "one", "two", "three", "four"}
    assert 15 < min(counts.values()) <= max(counts.values()) < 110
    levels = chance(asked)
    assert list(levels) == list(TASKS)
    assert levels["digit"] == levels["photo"] == pytest.approx(1 / 10)
    assert levels["cell"] == pytest.approx(1 / 21)
    blind = BlindGuesser(world.examples("train", 300, seed=2))
    right = Counter(e.question.task for e in asked if blind.answer(e.question) == e.question.answer)
    assert right["blind"] == 40
    assert all(right[task] < 20 for task in set(TASKS) - {"blind"})


def test_other_sizes_are_drawn_too(world):
    spec = RealSceneSpec(rows=4, columns=6, patch=28, objects=(2, 3))
    small = RealScenesWorld(world.gallery, spec)
    scene = next(small.stream("train", 0))
    assert small.paint([scene]).shape == (1, 112, 168, 3)
    assert scene.truth().kind.shape == (4, 6)
    with pytest.raises(ValueError, match="one spec"):
        small.paint([scene, next(world.stream("train", 0))])


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"objects": (5, 2)}, "fewest"), ({"rows": 1, "columns": 3}, "fewer objects"), ({"patch": 8}, "12 pixels")],
)
def test_scenes_that_cannot_be_drawn_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        RealSceneSpec(**fields)


def test_a_folder_without_the_files_says_what_is_expected(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected MNIST in .*train\.npz.*CIFAR-10.*train\.parquet"):
        Gallery.open(tmp_path)
    shutil.copytree(pictures / "mnist", tmp_path / "mnist")
    with pytest.raises(FileNotFoundError, match=r"but [^ ]*train\.parquet cannot be found"):
        Gallery.open(tmp_path)


def test_files_that_hold_something_else_are_refused(pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "wrong")
    whole = Gallery.open(folder)
    np.savez(folder / "mnist" / "train.npz", x=whole.digits)
    with pytest.raises(ValueError, match="arrays images and labels.*got x"):
        Gallery.open(folder)
    np.savez(folder / "mnist" / "train.npz", images=whole.digits[:, :20], labels=whole.digit_labels)
    with pytest.raises(ValueError, match=r"28x28.*\(20, 28\)"):
        Gallery.open(folder)
    np.savez(folder / "mnist" / "train.npz", images=whole.digits[:40], labels=whole.digit_labels[:40])
    with pytest.raises(ValueError, match="every kind in the .* split, got no"):
        Gallery.open(folder)
    parquet.write_table(pa.table({"pixels": [1]}), folder / "cifar10" / "train.parquet")
    with pytest.raises(ValueError, match="columns image and label.*got pixels"):
        Gallery.open(folder)
