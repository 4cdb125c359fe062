"""The scenes world: pictures against truth, answers by brute force, splits, chance and blind baselines."""

import itertools
import re
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from sparing.worlds import scenes
from sparing.worlds.scenes import SceneSpec
from sparing.worlds.splits import split_of
from sparing.worlds.vocabulary import closed_tokenizer

SPLITS = ("train", "validation", "test")
QUIET = SceneSpec(patch=24, colour_noise=0, pixel_noise=0.0)


@pytest.fixture(scope="module")
def drawn():
    return list(itertools.islice(scenes.stream("train", 3), 150))


@pytest.fixture(scope="module")
def asked():
    return scenes.examples("test", 40, seed=4)


def patches_of(pixels, patch):
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    return pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).astype(float)


def nearest_colour(rgb):
    """By the palette as a reader knows it, not by the generator's tables."""
    palette = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 220, 50),
               "purple": (150, 60, 190), "orange": (245, 140, 30), "black": (20, 20, 20), "white": (245, 245, 245)}  # fmt: skip
    return min(palette, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, palette[name], strict=True)))


def coverage(patch, ground):
    """How much of each pixel is ink: distance from the background, relative to the pixel that is furthest from it."""
    off = patch - ground
    ink = off[tuple(np.unravel_index(np.square(off).sum(-1).argmax(), off.shape[:2]))]
    return (off @ ink) / (ink @ ink), ground + ink


def templates(side):
    """The shapes by their inequalities, the letters by the font; in a box that the ink's own extent is scaled to."""
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    made = {
        "circle": x**2 + y**2 <= 1,
        "square": np.ones((side, side), dtype=bool),
        "triangle": np.abs(x) <= (y + 1) / 2,
        "diamond": np.abs(x) + np.abs(y) <= 1,
        "cross": (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34),
        "ring": (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.55**2),
    }
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono-Bold.ttf", 200)
    for letter in "abcdeghilnoprstu":
        image = Image.new("L", (300, 300))
        ImageDraw.Draw(image).text((60, 30), letter.upper(), fill=255, font=font)
        made[letter] = np.asarray(image.crop(image.getbbox()).resize((side, side))) > 127
    return made


def read_kind(mask, side=24):
    """The template that agrees best with the ink, scaled to the template's box, and with its proportions."""
    inside = np.argwhere(mask > 0.5)
    (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
    box = Image.fromarray((mask[top:bottom, left:right].clip(0, 1) * 255).astype(np.uint8)).resize((side, side))
    ink = np.asarray(box) / 255
    # A letter is narrower than it is high; shapes are as wide as high.
    is_letter = (right - left) < 0.88 * (bottom - top)
    known = {name: shape for name, shape in templates(side).items() if (len(name) == 1) == is_letter}
    return min(known, key=lambda name: np.abs(ink - known[name]).mean())


def test_an_independent_reader_of_the_pixels_finds_the_truth():
    spec = QUIET
    for scene in itertools.islice(scenes.stream("train", 11, spec), 40):
        cells = patches_of(scenes.paint([scene])[0], spec.patch)
        corners = cells[:, :, 0, 0].reshape(-1, 3)
        ground = np.median(corners, axis=0)
        assert nearest_colour(ground) == scene.background
        found = []
        for row, column in np.ndindex(spec.rows, spec.columns):
            if np.abs(cells[row, column] - ground).max() > 8:
                mask, ink = coverage(cells[row, column], ground)
                found.append((row, column, nearest_colour(ink), read_kind(mask)))
        assert found == [tuple(thing) for thing in scene.things]


def test_noisy_pictures_of_the_usual_size_show_occupied_patches_and_colours(drawn):
    for scene, pixels in zip(drawn, scenes.paint(drawn), strict=True):
        assert pixels.shape == (80, 80, 3)
        cells = patches_of(pixels, 8)
        truth = scene.truth()
        spread = cells.std((2, 3)).max(-1)
        assert ((spread > 12) == (truth.kind > 0)).all()
        ground = np.median(cells[truth.kind == 0].reshape(-1, 3), axis=0)
        assert nearest_colour(ground) == scene.background
        for row, column in np.argwhere(truth.kind > 0):
            mask, ink = coverage(cells[row, column], ground)
            # The mean of the most covered pixels; one alone is noisy, and a thin letter covers none in full.
            full = cells[row, column][mask > 0.9].mean(0) if (mask > 0.9).sum() > 2 else ink
            assert nearest_colour(full) != scene.background


def test_truth_told_words_and_things_agree(drawn):
    for scene in drawn:
        truth, words = scene.truth(), scene.patch_words()
        for row, column in np.ndindex(10, 10):
            told = words[row * 10 + column]
            assert told[:2] == (f"r{row + 1}", f"c{column + 1}")
            assert told[2:] == (
                scenes.COLOUR_WORDS[truth.colour[row, column]],
                scenes.KINDS[truth.kind[row, column]],
            )
            number = truth.thing[row, column]
            assert (number < 0) == (told[3] == "nothing")
            if number >= 0:
                assert scene.things[number] == (row, column, *told[2:])
        assert all(thing.colour != scene.background for thing in scene.things)
        told = [f"{' '.join(word)} ." for word in words if word[3] != "nothing"]
        assert scene.tell() == " ".join([f"{scene.background} background .", *told])


def test_a_word_stands_in_three_neighbouring_patches_with_bare_ends(drawn):
    spelled = [scene for scene in drawn if scene.word]
    assert 0.2 < len(spelled) / len(drawn) < 0.5
    for scene in spelled:
        rows = ["".join(word[3] if word[3] in scenes.LETTERS else "." for word in scene.patch_words()[10 * r : 10 * r + 10])
                for r in range(10)]  # fmt: skip
        assert sum(len(re.findall(rf"(?<![a-z]){scene.word}(?![a-z])", row)) for row in rows) >= 1
        assert scene.word in scenes.LEXICON


def solve(scene, text):
    """Answers a question from the told scene alone, by other means than the generator's; `None` if it has no one answer."""
    background, *told = [sentence.split() for sentence in scene.tell().rstrip(" .").split(" . ")]
    background = background[0]
    things = [(int(row[1:]), int(column[1:]), colour, kind) for row, column, colour, kind in told]

    def only(name):
        (one,) = [thing for thing in things if name in thing[2:]]
        return one

    words = text.split()
    match words:
        case ["what", "shape" | "letter", "is", name, "?"]:
            return only(name)[3]
        case ["what", "colour", "is", "background", "?"] | ["what", "colour", "is", "behind", _, "?"]:
            return background
        case ["what", "is", "at", row, column, "?"]:
            return next((t[3] for t in things if (f"r{t[0]}", f"c{t[1]}") == (row, column)), "nothing")
        case ["how", "many", name, "?"]:
            return ["zero", "one", "two", "three", "four"][sum(name in thing[2:] for thing in things)]
        case ["where", "is", name, "from", other, "?"]:
            one, two = only(name), only(other)
            return f"{'left' if one[1] < two[1] else 'right'} {'above' if one[0] < two[0] else 'below'}"
        case ["where", "is", name, "?"]:
            row, column, *_ = only(name)
            return f"r{row} c{column}"
        case ["what", "word", "?"]:
            letters = {thing[:2]: thing[3] for thing in things if len(thing[3]) == 1}
            runs = ["".join(letters.get((r, c), " ") for c in range(1, 11)) for r in range(1, 11)]
            (found,) = {run for row in runs for run in row.split() if run in scenes.LEXICON}
            return found
        case ["what", "colour", "is", name, "?"] if name in scenes.KINDS:
            return only(name)[2]
    return {"what colour is grass ?": "green", "what colour is snow ?": "white", "what colour is coal ?": "black",
            "what colour is sky ?": "blue", "what colour is blood ?": "red", "what colour is lemon ?": "yellow",
            "how many corners has triangle ?": "three", "how many corners has square ?": "four",
            "how many corners has diamond ?": "four", "how many corners has circle ?": "zero",
            "how many corners has ring ?": "zero"}.get(text) or added(words)  # fmt: skip


def added(words):
    numbers = ["zero", "one", "two", "three", "four"]
    return numbers[numbers.index(words[2]) + numbers.index(words[4])]


def test_answers_agree_with_an_independent_solver(asked):
    for example in asked:
        assert example.question.answer == solve(example.scene, example.question.text), example.question
        if example.question.task != "blind":
            assert example.question.text not in scenes.FACTS


def test_shape_and_letter_questions_ask_for_what_they_say(asked):
    kinds = {"shape": scenes.SHAPES, "letter": scenes.LETTERS, "word": scenes.LEXICON, "cell": scenes.KINDS}
    for example in asked:
        if example.question.task in kinds:
            assert example.question.answer in kinds[example.question.task]


def test_every_word_is_in_the_vocabulary_once(asked):
    words = scenes.vocabulary()
    assert len(set(words)) == len(words) < 150
    used = {word for e in asked for word in (e.question.text + " " + e.question.answer + " " + e.scene.tell()).split()}
    assert used <= set(words)


def test_packed_questions_differ_and_belong_to_their_scene(drawn):
    rng = np.random.default_rng(0)
    for scene in drawn[:40]:
        packed = scenes.questions(scene, rng, 12)
        assert len(packed) == 12
        assert all(made.answer == solve(scene, made.text) for made in packed)
        if len(scene.things) > 2:
            assert len({made.text for made in packed}) == 12


def test_questions_that_may_repeat_have_the_answers_of_questions_asked_alone(drawn):
    """Distinct ones do not: after the theme is counted, what is left is none and one."""
    weights = [float(task == "count") for task in scenes.TASKS]

    def counts(number, **how):
        rng = np.random.default_rng(0)
        asked = [question for scene in drawn for question in scenes.questions(scene, rng, number, weights, **how)]
        assert {question.task for question in asked} <= {"count", "background"}
        counted = Counter(question.answer for question in asked if question.task == "count")
        return {answer: number / counted.total() for answer, number in counted.items()}

    alone = counts(1)
    repeated, distinct = counts(8, distinct=False), counts(8)
    for answer, share in alone.items():
        assert repeated[answer] == pytest.approx(share, abs=0.1), answer
    assert distinct["three"] + distinct["four"] < 0.6 * (alone["three"] + alone["four"])
    assert repeated["three"] + repeated["four"] > 0.8 * (alone["three"] + alone["four"])


def test_same_seed_same_pictures_and_questions_in_another_process():
    code = (
        "from sparing.worlds import scenes; import sys, zlib; e = scenes.examples('test', 2, seed=5)[-3];"
        "sys.stdout.write(f'{e.scene} {e.question} {zlib.crc32(scenes.paint([e.scene]).tobytes())}')"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    example = scenes.examples("test", 2, seed=5)[-3]
    assert elsewhere == f"{example.scene} {example.question} {zlib.crc32(scenes.paint([example.scene]).tobytes())}"
    assert scenes.examples("test", 2, seed=6)[-3] != example


def test_longer_list_begins_with_the_shorter():
    short = scenes.examples("test", 2, seed=2)
    assert scenes.examples("test", 4, seed=2)[: len(short)] == short


def test_splits_share_no_scene_whatever_the_seeds():
    keys = {
        split: {s.key for seed in (0, 1) for s in itertools.islice(scenes.stream(split, seed), 100)} for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    for split in SPLITS:
        assert all(split_of(key) == split for key in keys[split])


def test_two_pictures_of_one_scene_differ_in_accidents_only_and_share_a_split(drawn):
    scene = drawn[0]
    other = scenes.Scene(scene.spec, scene.background, scene.things, scene.word, scene.look + 1)
    assert other.key == scene.key
    assert not np.array_equal(scenes.paint([scene]), scenes.paint([other]))
    assert all(np.array_equal(a, b) for a, b in zip(scene.truth(), other.truth(), strict=True))


def test_pictures_do_not_depend_on_the_batch(drawn):
    together = scenes.paint(drawn[:5])
    assert np.array_equal(together[3], scenes.paint([drawn[3]])[0])
    assert np.array_equal(np.asarray(scenes.picture(drawn[3])), together[3])


def test_counts_from_zero_to_four_are_all_frequent():
    counts = Counter(e.question.answer for e in scenes.examples("train", 300, seed=9, tasks=["count"]))
    assert set(counts) == {"zero", "one", "two", "three", "four"}
    assert max(counts.values()) < 0.35 * 300
    assert min(counts.values()) > 0.05 * 300


def test_chance_is_what_a_random_answer_of_the_right_form_gets(asked):
    levels = scenes.chance(asked)
    assert list(levels) == list(scenes.TASKS)
    answers = {task: {e.question.answer for e in scenes.examples("train", 400, seed=1, tasks=[task])}
               for task in ("shape", "colour", "count", "relation", "word", "blind")}  # fmt: skip
    for task, possible in answers.items():
        assert levels[task] == pytest.approx(1 / len(possible))
    assert levels["point"] == pytest.approx(1 / 100)


def test_blind_guesser_knows_what_needs_no_picture_and_little_else():
    shown = scenes.examples("train", 300, seed=2)
    blind = scenes.BlindGuesser(shown)
    asked = scenes.examples("test", 100, seed=3)
    right = Counter(e.question.task for e in asked if blind.answer(e.question) == e.question.answer)
    assert right["blind"] == 100
    for task in set(scenes.TASKS) - {"blind"}:
        assert right[task] < 45, task
    # No constant answer to a question does better on what it was shown.
    for example in shown[:50]:
        group = [e.question.answer for e in shown if e.question.text == example.question.text]
        assert group.count(blind.answer(example.question)) == max(Counter(group).values())


def test_single_patch_share_by_brute_force():
    best = 0.0
    for place in range(3):
        groups = Counter(word[place] for word in scenes.LEXICON)
        # Whoever sees the letter names one of the words that have it there: right once in their number.
        best = max(best, sum(size / len(scenes.LEXICON) * (1 / size) for size in groups.values()))
    assert scenes.single_patch_share() == pytest.approx(best)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"objects": (5, 2)}, "fewest"),
        ({"rows": 2, "columns": 3, "objects": (1, 6)}, "fewer objects"),
        ({"columns": 2}, "three columns"),
        ({"patch": 4}, "8 pixels"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        SceneSpec(**fields)


def test_other_sizes_are_drawn_too():
    spec = SceneSpec(rows=4, columns=6, patch=14, objects=(2, 3))
    scene = next(scenes.stream("train", 0, spec))
    assert scenes.paint([scene]).shape == (1, 56, 84, 3)
    assert scene.truth().kind.shape == (4, 6)


def test_unknown_task_names_the_known_ones(drawn):
    with pytest.raises(ValueError, match="shape, colour.*got 'smell'"):
        scenes.ask(drawn[0], np.random.default_rng(0), "smell")
    with pytest.raises(ValueError, match="hold nothing that word"):
        scenes.examples("train", 1, tasks=["word"], spec=SceneSpec(word=0.0))


def test_closed_tokenizer_knows_words_and_nothing_else():
    tokenizer = closed_tokenizer(scenes.vocabulary(), ["<image>"])
    ids = tokenizer("<image><image> What colour is circle?").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<bos>",
        "<image>",
        "<image>",
        "what",
        "colour",
        "is",
        "circle",
        "?",
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "what colour is circle ?"
    assert tokenizer.unk_token_id in tokenizer("what taste is circle ?").input_ids
    assert tokenizer.padding_side == "left"
