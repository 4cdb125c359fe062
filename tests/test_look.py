"""`sparing look`: what it gathers on every vision family, what the page stores of it, and what it refuses."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import look_cases as cases
import processors
from sparing import zoo
from sparing.anatomy import anatomy_of, ask
from sparing.anatomy.fingerprint import fingerprint_of
from sparing.cli import main
from sparing.evaluate import looking
from sparing.evaluate.looking import look
from sparing.evaluate.pictures.files import (
    OpenedPicture,
    demo_picture,
    drawn_pictures,
    neutral_question,
    open_picture,
    pictures_in,
)
from sparing.lens import record
from sparing.study.pages.look_page import quantise, render_look
from sparing.tokens import Group, TokenMap, TokenProfile
from sparing.tokens.profile import CLASSES, Anchor

FAMILIES = ["llava", "onevision", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl"]
QUESTION = "Which one is larger?"


def profile_of(model, processor, pictures, share=0.3):
    """A profile that calls the share of tokens dead which lie nearest to the mean of all."""
    states = record(model, ask(model, processor, [QUESTION], [pictures]), where=Group.IMAGE, levels=[0]).at(0)
    unit = torch.nn.functional.normalize(states.float(), dim=1)
    mean = torch.nn.functional.normalize(unit.mean(0), dim=0)
    least = float((unit @ mean).quantile(1 - share))
    return TokenProfile(fingerprint_of(model), (Anchor(("dead",), tuple(mean.tolist()), least),), notes=("by hand",))


def data_of(page):
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def unpacked(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


# Numbers in a byte ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_quantised_numbers_are_at_most_the_said_error_off(scale):
    values = np.random.default_rng(0).normal(0, scale, (7, 41))
    found = quantise(values)
    back = found.low + found.codes * (found.high - found.low) / 255
    assert np.abs(back - values).max() <= found.error * (1 + 1e-9)
    assert found.error == pytest.approx((values.max() - values.min()) / 510)
    # Order is kept, so that the best word stays the best.
    order = np.argsort(values.ravel())
    assert (np.diff(found.codes.ravel()[order].astype(int)) >= 0).all()


def test_numbers_that_are_none_and_numbers_that_are_alike():
    found = quantise(np.array([1.0, -np.inf, 3.0, np.inf, np.nan]))
    assert (found.low, found.high) == (1.0, 3.0)
    assert found.codes.tolist() == [0, 0, 255, 255, 0]
    assert quantise(np.full((2, 2), 5.0)).error == 0
    assert quantise(np.zeros((0, 3))).codes.shape == (0, 3)


def test_the_page_holds_what_was_read():
    made = cases.look(side=3, depth=2, k=4, vocabulary=90, words=6)
    data = data_of(render_look(made, cases.RUN))
    n, k = len(made.index), 4
    for lens, packed in zip(made.lenses, data["lenses"], strict=True):
        for level, ids in enumerate(lens.ids):
            words = [data["words"][i] for i in unpacked(packed["ids"][level], "<u2")]
            assert words == [made.words[i] for i in ids.ravel()]
            low, high = packed["ranges"][level]
            scores = low + unpacked(packed["scores"][level], np.uint8) * (high - low) / 255
            assert np.abs(scores - lens.scores[level].ravel()).max() <= packed["error"] + 1e-5
    for level, norms in enumerate(made.norms):
        assert (unpacked(data["norms"][level], "<f4") == norms).all()
    words = [data["words"][i] for i in data["maps"]["words"]]
    # A word of two pieces stands under both of them joined.
    assert words[-1] == made.words[3] + made.words[4]
    codes = unpacked(data["maps"]["scores"][1], np.uint8).reshape(6, n)
    for word, (low, high) in enumerate(data["maps"]["ranges"][1]):
        assert np.abs(low + codes[word] * (high - low) / 255 - made.maps.scores[1, :, word]).max() <= (high - low) / 500
    assert (data["n"], len(data["lenses"][0]["ids"]), k * n * 2) == (
        n,
        3,
        len(base64.b64decode(data["lenses"][0]["ids"][0])),
    )


def test_more_words_than_two_bytes_can_tell():
    made = cases.look(side=2, depth=1, k=3, vocabulary=200, words=3)
    many = {**{i: f"w{i}" for i in range(70_000)}, **made.words}
    data = data_of(render_look(dataclasses.replace(made, words=many), cases.RUN))
    assert data["wide"] == 4
    words = [data["words"][i] for i in unpacked(data["lenses"][0]["ids"][0], "<u4")]
    assert words == [made.words[i] for i in made.lenses[0].ids[0].ravel()]


def test_nothing_that_a_model_says_is_markup():
    page = render_look(cases.look(side=3, depth=2, hostile=True), cases.RUN)
    assert "<img src=x" not in page
    assert page.count("</script>") == 2


# Every family -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_encoder_sees_lies_under_its_grid(name):
    model, processor = processors.family(name)
    # A black lower left corner on white, large enough to be in one cell at least.
    pixels = np.full((60, 60, 3), 255, np.uint8)
    pixels[30:, :30] = 0
    inputs = ask(model, processor, [QUESTION], [[Image.fromarray(pixels)]])
    spans, seen = TokenMap.from_inputs(model, inputs).images[0], anatomy_of(model).pixels(inputs)
    assert len(spans) == len(seen)
    for span, picture in zip(spans[-1:], seen[-1:], strict=True):
        # The last one is the whole picture in every family: a grid, an overview, a thumbnail.
        cells = torch.nn.functional.adaptive_avg_pool2d(picture.mean(0)[None], span.grid)[0]
        assert cells[-1, 0] <= cells.min() + 1e-3
        assert cells[0, -1] > cells[-1, 0] + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_look_at_every_family(name):
    model, processor = processors.family(name)
    pictures = [
        OpenedPicture("first.png", processors.picture(64, 40, 1)),
        OpenedPicture("second.png", processors.picture(33, 90, 2)),
    ]
    profile = profile_of(model, processor, [picture.image for picture in pictures])
    found = look(model, processor, pictures, QUESTION, profile, k=3, seeds=1, repeats=1, max_new_tokens=3)
    tokens = TokenMap.from_inputs(model, ask(model, processor, [QUESTION], [[p.image for p in pictures]]))
    assert found.index.tolist() == tokens.of(Group.IMAGE)[0].nonzero().flatten().tolist()
    # Every visual token has one place: a cell of a grid, or beside one.
    placed = [i for p in found.pictures for i in [*p.places.ravel().tolist(), *(i for i, _ in p.extra)]]
    assert sorted(placed) == list(range(len(found.index)))
    assert {p.name.split(" · ")[0] for p in found.pictures} == {"first.png", "second.png"}
    assert all(p.image.width and p.image.height for p in found.pictures)
    assert found.norms.shape == (found.depth + 1, len(found.index))
    assert {int(i) for lens in found.lenses for i in np.unique(lens.ids)} <= set(found.words)
    assert found.classes.counts["dead"] > 0
    arms = {arm.name: arm for arm in found.arms}
    dead = arms["dead"]
    assert (dead.dropped, len(dead.controls)) == (found.classes.counts["dead"], 1)
    assert 0 < arms["every visual token"].flops < dead.flops < 1
    assert all(arm.seconds for arm in found.arms if not arm.why)
    if name == "onevision":
        assert [p.extra[0][1] for p in found.pictures] == ["newline", "newline"]
        assert found.classes.names[-1] == "newline"
    page = render_look(found, cases.RUN)
    assert len(data_of(page)["grids"]) == len(found.pictures)


def test_an_overview_is_a_grid_and_newlines_lie_beside_it():
    model, processor = processors.family("onevision")
    one = OpenedPicture("wide.png", processors.picture(120, 31))
    found = look(model, processor, [one], QUESTION, profile_of(model, processor, [one.image]), k=2, seeds=0, repeats=0)
    overview, tiles = found.pictures
    assert (overview.name, overview.places.shape) == ("wide.png · overview", (3, 3))
    assert [label for _, label in tiles.extra] == [f"newline {i + 1}" for i in range(tiles.places.shape[0])]
    assert all(found.classes.names[found.classes.of[i]] == "newline" for i, _ in tiles.extra)
    assert found.arms[0].seconds is None


def test_tiles_are_told_apart_by_picture():
    model, processor = processors.family("internvl")
    pictures = [OpenedPicture("a", processors.picture(64, 40)), OpenedPicture("b", processors.picture(20, 20))]
    profile = profile_of(model, processor, [picture.image for picture in pictures])
    found = look(model, processor, pictures, QUESTION, profile, k=2, seeds=0, repeats=0, max_new_tokens=1)
    names = [p.name for p in found.pictures]
    assert names == ["a · part 1 of 3", "a · part 2 of 3", "a · part 3 of 3", "b"]


def test_a_page_stays_small_whatever_the_picture():
    assert looking._affordable(576, 32, 10) == (10, tuple(range(33)))
    k, levels = looking._affordable(16_384, 32, 10)
    assert k == 3
    assert (levels[0], levels[-1]) == (0, 32)
    assert 16_384 * k * len(levels) <= looking.READINGS
    k, levels = looking._affordable(2_000, 32, 10)
    assert (k, len(levels)) == (9, 33)


def test_classes_are_those_of_the_profile():
    model, processor = processors.family("llava")
    one = OpenedPicture("a", processors.picture(64, 40))
    profile = profile_of(model, processor, [one.image])
    found = look(model, processor, [one], QUESTION, profile, k=2, seeds=0, repeats=0, max_new_tokens=1)
    states = record(model, ask(model, processor, [QUESTION], [[one.image]]), where=Group.IMAGE, levels=[0]).at(0)
    told = [CLASSES[i] for i in profile.classify(states).tolist()]
    assert [found.classes.names[i] for i in found.classes.of] == told
    with pytest.raises(ValueError, match="another|is of the checkpoint"):
        look(model, processor, [one], QUESTION, dataclasses.replace(profile, checkpoint="other"))


# Pictures ---------------------------------------------------------------------------------------------------------


def saved(folder, name, image, **more):
    path = folder / name
    image.save(path, **more)
    return path


def test_pictures_of_any_kind_become_rgb(tmp_path):
    alpha = open_picture(saved(tmp_path, "alpha.png", Image.new("RGBA", (50, 40), (255, 0, 0, 0))))
    assert alpha.image.getpixel((3, 3)) == (255, 255, 255)
    assert alpha.notes == ("transparency laid on white",)
    assert open_picture(saved(tmp_path, "opaque.png", Image.new("RGBA", (50, 40), (9, 8, 7, 255)))).notes == ()
    one = open_picture(saved(tmp_path, "one.png", Image.new("RGB", (1, 1), (9, 8, 7))))
    assert (one.image.size, one.image.getpixel((5, 5))) == ((32, 32), (9, 8, 7))
    assert "enlarged from 1×1" in one.notes[0]
    wide = open_picture(saved(tmp_path, "wide.png", Image.new("L", (20_000, 600))))
    assert wide.image.size == (4096, 123)
    assert "scaled down from 20000×600" in wide.notes[0]
    large = open_picture(saved(tmp_path, "large.jpg", Image.new("L", (20_000, 5_200))))
    assert large.image.size[0] == 4096
    deep = open_picture(
        saved(tmp_path, "deep.png", Image.fromarray((np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)))
    )
    assert deep.image.convert("L").getextrema() == (0, 254)
    turned = Image.new("RGB", (40, 64))
    turned.getexif()[0x0112] = 6
    assert open_picture(saved(tmp_path, "turned.jpg", turned, exif=turned.getexif())).image.size == (64, 40)
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    moving = open_picture(saved(tmp_path, "moving.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert moving.notes == ("the first of 2 frames",)
    assert len(pictures_in(tmp_path, 3)) == 3


def test_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    whole = saved(tmp_path, "whole.png", processors.picture(90, 90)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    saved(tmp_path, "bomb.png", Image.new("1", (13_500, 13_500)))
    saved(tmp_path, "long.png", Image.new("1", (20_000, 100)))
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, words in {
        "none.png": "no such picture",
        "text.png": "is not a picture",
        "cut.png": "is broken",
        "bomb.png": "scale it down",
        "long.png": "cut it into pieces",
        "empty": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            open_picture(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no picture in"):
        pictures_in(empty)
    with pytest.raises(ValueError, match="no such folder"):
        pictures_in(tmp_path / "nowhere")


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_profile(tmp_path_factory):
    """A profile of the zoo's model that has dead tokens, by hand: finding one takes longer than a test should."""
    import sparing

    model, processor = sparing.load(str(zoo.path("scenes-llava")))
    text = neutral_question(processor)
    states = record(model, ask(model, processor, [text], [[demo_picture(3)[0].image]]), where=Group.IMAGE, levels=[0])
    unit = torch.nn.functional.normalize(states.at(0).float(), dim=1)
    direction = torch.nn.functional.normalize(unit[0], dim=0)
    profile = TokenProfile(fingerprint_of(model), (Anchor(("dead",), tuple(direction.tolist()), 0.9),))
    return profile.save(tmp_path_factory.mktemp("profile") / "token_profile.json")


def test_the_demo_is_one_command(scenes_profile, tmp_path, capsys):
    command = [
        "look",
        "--profile",
        str(scenes_profile),
        "--out",
        str(tmp_path),
        "--repeats",
        "1",
        "--controls",
        "1",
        "--seed",
        "3",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"page: {tmp_path / 'look.html'}" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["look.html", "run.json"]
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["seed"], run["config"]["model"]) == ("finished", 3, "scenes-llava")
    _, question = demo_picture(3)
    assert run["figures"]["question"] == question
    assert run["figures"]["classes"]["counts"]["dead"] > 0
    page = (tmp_path / "look.html").read_text()
    assert data_of(page)["classes"][1]["count"] == run["figures"]["classes"]["counts"]["dead"]
    assert "<h1>a drawn scene</h1>" in page
    assert main(command) == 0
    assert len(json.loads((tmp_path / "run.json").read_text())["earlier"]) == 1


def test_own_pictures_a_question_with_unknown_words_and_what_was_done_to_them(scenes_profile, tmp_path, capsys):
    alpha = saved(tmp_path, "alpha<b>.png", Image.new("RGBA", (80, 80), (200, 30, 30, 90)))
    other = saved(tmp_path, "other.png", processors.picture(90, 70))
    command = [
        "look",
        alpha,
        other,
        "--profile",
        scenes_profile,
        "--out",
        tmp_path / "out",
        "--repeats",
        0,
        "--controls",
        0,
    ]
    assert main([*map(str, command), "--question", "what colour is the zebra ?"]) == 0
    assert "does not know 2 of the question's 6 words" in capsys.readouterr().out
    page = (tmp_path / "out" / "look.html").read_text()
    assert "alpha&lt;b&gt;.png: transparency laid on white" in page
    assert [grid["name"] for grid in data_of(page)["grids"]] == ["alpha<b>.png", "other.png"]


def test_classes_are_found_on_pictures_of_ones_own_and_kept(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, one in enumerate(drawn_pictures(9)):
        saved(folder, f"{i}.png", one.image)
    command = ["look", "--pictures", str(folder), "--out", str(tmp_path / "out"), "--repeats", "0", "--controls", "0"]
    assert main(command) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["figures"]["classes"]["source"] == "Found on 9 pictures"
    profile = TokenProfile.load(tmp_path / "out" / "token_profile.json")
    assert run["figures"]["classes"]["notes"] == list(profile.notes)


def bad(folder):
    """Command lines that cannot work, and what must be said."""
    picture = saved(folder, "picture.png", processors.picture(80, 80))
    (folder / "text.png").write_text("no picture")
    few = folder / "few"
    few.mkdir()
    saved(few, "one.png", processors.picture(80, 80))
    other = TokenProfile("0" * 24).save(folder / "other.json")
    (folder / "file").write_text("")
    return {
        "no such picture": (["/nowhere.png"], "no such picture: /nowhere.png"),
        "not a picture": ([folder / "text.png"], "is not a picture that can be read"),
        "text only": ([picture, "--model", "arithmetic-llama"], "reads text alone: choose a vision-language model"),
        "image token": ([picture, "--question", "what is <image> ?"], "leave it out, pictures are put in front"),
        "other profile": ([picture, "--profile", other], "the profile is of the checkpoint"),
        "no profile": ([picture, "--profile", folder / "none.json"], "there is no such token profile"),
        "no model": ([picture, "--model", "/nowhere"], "no such path: /nowhere"),
        "no pictures": ([picture, "--pictures", folder / "nowhere"], "no such folder"),
        "too few pictures": ([picture, "--pictures", few], "at least 8"),
        "out is a file": ([picture, "--out", folder / "file"], "is a file"),
        "too long": ([picture, "--question", "what " * 500], "does not fit into the model's 512"),
    }


@pytest.mark.parametrize("name", [
    "no such picture", "not a picture", "text only", "image token", "other profile", "no profile", "no model", "no pictures",
    "too few pictures", "out is a file", "too long",
])  # fmt: skip
def test_bad_input_is_one_line_with_the_cure(name, tmp_path, capsys):
    words, said = bad(tmp_path)[name]
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    assert main(["look", *map(str, [*words, *out])]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert said in error
