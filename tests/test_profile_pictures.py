"""Profiles of questions about pictures: their losses and counts against plain ones, their halves, their page, their errors."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import picture_cases as cases
import processors
from sparing.anatomy import anatomy_of, question_prompt
from sparing.evaluate import PictureMaterial, PictureQuestion, Profiler, Removal, read_questions
from sparing.evaluate.loss import measure_batches
from sparing.evaluate.measurements import Measurements
from sparing.evaluate.pictures.files import open_picture
from sparing.evaluate.pictures.prompts import PicturePrompts
from sparing.evaluate.pictures.questions import split_questions
from sparing.evaluate.pictures.seeing import data_uri, shown
from sparing.execute import apply
from sparing.policies import ViCA
from sparing.study import render
from sparing.study.pages.profile_page import plan_in_words

PLANS = (
    Removal(),
    Removal(attention=frozenset({1}), mlp=frozenset({0})),
    Removal(image_attention=frozenset({0}), image_mlp=frozenset({0, 2}), image_read=frozenset({1})),
    Removal(mlp=frozenset({2}), image_read=frozenset({0, 2})).entering("image", 1),
    Removal.reading([1], 3),
    Removal().entering("image", 3),
)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return read_questions(cases.folder(tmp_path_factory.mktemp("pictures") / "a"))


@pytest.fixture(scope="module")
def material(asked):
    return PictureMaterial(*processors.family("llava"), asked)


@pytest.fixture(scope="module")
def found(material):
    return Profiler(material, cases.SETTINGS).run()


def plain_losses(model, processor, asked):
    """Mean loss of each answer, alone: a row of the processor's with the answer's tokens behind it, and no padding."""
    prompts, losses = PicturePrompts(model, processor), []
    for question in asked:
        text = question_prompt(processor, question.question, len(question.pictures))
        pictures = [open_picture(path).image for path in question.pictures]
        row = dict(processor(text=[text], images=[pictures], return_tensors="pt"))
        answer = torch.tensor([prompts.answer_ids(question.question, len(pictures), question.answer)])
        row["input_ids"] = torch.cat([row["input_ids"], answer], dim=1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        if "mm_token_type_ids" in row:
            row["mm_token_type_ids"] = torch.cat([row["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
        with torch.no_grad():
            logits = model(**row).logits[0, -answer.shape[1] - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), answer[0]).item())
    return losses


def skip_old_numpy(name):
    if name == "internvl" and tuple(map(int, np.__version__.split(".")[:2])) < (2, 1):
        pytest.skip("transformers' InternVLProcessor sums tensors with numpy, which this numpy refuses")


@pytest.mark.parametrize("name", processors.CASES)
def test_every_family_is_asked_by_its_own_processor(name, asked):
    """Losses are those of rows alone, counted operations those of the ledger, and grids those of the token map."""
    skip_old_numpy(name)
    model, processor = processors.family(name)
    material = PictureMaterial(model, processor, asked)
    halves = split_questions(asked)[:2]
    for split, half in zip(("choose", "report"), halves, strict=True):
        losses = material.loss(split, Removal()).windows.tolist()
        assert losses == pytest.approx(plain_losses(model, processor, [asked[i] for i in half]), rel=2e-5)
    for plan in PLANS:
        ledgers = [material.loss(split, plan) for split in ("choose", "report")]
        assert sum(sum(each.flops.values()) for each in ledgers) == material.flops(plan), plan.key
        assert sum(sum(each.dense_flops.values()) for each in ledgers) == material.flops.dense
    page = material.paint(PLANS[2])
    uris = material.shown()
    for i, question in enumerate(page["questions"]):
        assert question["spans"]
        for j, span in enumerate(question["spans"]):
            assert len(span["patches"]) == span["grid"][0] * span["grid"][1]
            assert {page["patterns"][p]["attention"][:2] for p in (*span["patches"], *span["extra"])} == {"21"}
            assert uris[f"{i}.{j}"].startswith("data:image/")
        words = {page["patterns"][token["pattern"]]["attention"] for token in question["tokens"]}
        assert words == {"3" * len(page["patterns"][0]["attention"])}
    answers = material.answers(PLANS[4])
    assert len(answers) == len(halves[1])
    prompt, fed = material.timed(2, 3)
    assert prompt["input_ids"].shape[0] == 2
    assert fed.shape == (2, 3)


def test_a_plan_of_reading_layers_is_vica(material):
    model = material.model
    ours = material.loss("report", Removal.reading([1], 3))
    theirs = measure_batches(lambda: apply(model, ViCA([1])), model, material._batches(material._halves["report"]))
    assert ours.windows.sort().values.tolist() == pytest.approx(theirs.windows.sort().values.tolist(), rel=1e-5)
    assert ours.flops == theirs.flops


def test_an_answer_follows_its_prompt_as_the_tokenizer_writes_it():
    model, processor = processors.family("llava")
    prompts = PicturePrompts(model, processor)
    # The template ends with a colon: a space comes before the answer, and belongs to it.
    assert processor.tokenizer.decode(prompts.answer_ids("What?", 1, "red square")) == " red square"
    model, processor = processors.family("onevision")
    prompts = PicturePrompts(model, processor)
    assert processor.tokenizer.decode(prompts.answer_ids("What?", 1, "red square")) == "red square"


def test_no_picture_both_chooses_and_reports(asked):
    choose, report, apart = split_questions(asked)
    assert apart
    assert sorted([*choose, *report]) == list(range(len(asked)))
    assert abs(len(choose) - len(report)) <= 4
    pictures = [{path for i in half for path in asked[i].pictures} for half in (choose, report)]
    assert pictures[0].isdisjoint(pictures[1])
    one = [dataclasses.replace(question, pictures=asked[1].pictures) for question in asked]
    assert split_questions(one) == (list(range(0, 16, 2)), list(range(1, 16, 2)), False)


def test_the_profile_keeps_its_budget_and_says_what_image_tokens_need(found):
    assert found.planned.flops_ratio <= 0.6
    assert set(found.modules) == {"attention", "mlp", "image_attention", "image_mlp", "image_read"}
    assert set(found.entries) == {"image"}
    assert [len(point.plan["image_attention"]) for point in found.reading] == [3, 2, 1, 0]
    assert found.reading[-1].added[0] == pytest.approx(
        _added(found, Removal.reading([], 3).as_dict(), found.reading), abs=1e-6
    )
    best = min([found.planned, *(p for p in found.reading if p.flops_ratio <= 0.6)], key=lambda p: p.loss)
    assert found.planned.loss <= best.loss
    assert found.answers["right"]["dense"][3] == found.answers["same"][3] == found.pictures["held_out"]["questions"]
    assert found.text == {}
    assert found.timings[0].steps == 2


def _added(found, plan, points):
    return next(point.added[0] for point in points if point.plan == plan)


def test_removals_for_images_go_back_one_by_one():
    plan = Removal(image_mlp=frozenset({1}), image_read=frozenset({0})).entering("image", 1)
    assert len(plan.put_back()) == 3
    assert str(plan) == "SkipModules(groups=[Group.IMAGE], mlp=[1], hide=[0]) & EnterLate(1)"
    assert plan.key == "image mlp 1; image read 0; image from 1"
    assert plan_in_words(plan.as_dict()) == (
        "lets image tokens skip the MLP in layer 1, hides them from attention in layer 0, lets pictures enter at layer 1"
    )


def test_a_second_run_measures_nothing_and_other_words_do(asked, tmp_path):
    model, processor = processors.family("llava")
    path = tmp_path / "m.jsonl"
    settings = dataclasses.replace(cases.SETTINGS, controls=0)
    first = Profiler(PictureMaterial(model, processor, asked), settings).run(path)
    assert first.measured == len(path.read_text().splitlines())
    again = Profiler(PictureMaterial(model, processor, asked), settings).run(path)
    assert again.measured == 0
    assert dataclasses.replace(again, seconds=0, measured=0) == dataclasses.replace(first, seconds=0, measured=0)
    other = [dataclasses.replace(asked[0], answer="no"), *asked[1:]]
    assert Profiler(PictureMaterial(model, processor, other), settings).run(path).measured > 20


def test_without_answers_the_stock_model_writes_them(tmp_path):
    model, processor = processors.family("llava")
    asked = read_questions(cases.folder(tmp_path / "a", answers=False))
    material = PictureMaterial(model, processor, asked)
    assert not material.ready
    store = Measurements(None, "x")
    material.prepare(store, lambda done, line: None)
    assert material.ready
    assert material.describe()["own_answers"] == material.describe()["questions"]
    compared = material.compare(*2 * [material.answers(Removal())])
    assert compared["right"] == {"dense": None, "planned": None}
    assert compared["same"][0] == 1
    # Greedy decoding is what teacher forcing finds likeliest.
    half = material._halves["report"]
    batch = next(material._batches(half[:1]))
    with torch.no_grad():
        likeliest = model(**batch.inputs).logits[0, :-1].argmax(-1)
    assert likeliest.tolist() == half[0].answer
    again = PictureMaterial(model, processor, asked)
    again.prepare(store, lambda done, line: None)
    assert store.taken == len(store._known)


def test_the_page_shows_what_the_encoder_was_shown(asked):
    model, processor = processors.family("llava")
    material = PictureMaterial(model, processor, asked)
    wide = next(each for each in material._asked if each.question.pictures[0].name == "p3.png")
    (seen,) = shown(processor, wide.prompt, 1, [open_picture(wide.question.pictures[0]).image])
    # The shortest edge becomes 30, and the middle is cut out.
    picture = open_picture(wide.question.pictures[0]).image
    width, height = picture.size
    scaled = picture.resize((int(width * 30 / height), 30), 3)
    left = (scaled.size[0] - 30) // 2
    wanted = np.asarray(scaled.crop((left, 0, left + 30, 30)), dtype=float)
    assert seen.size == (30, 30)
    assert np.abs(np.asarray(seen, dtype=float) - wanted).mean() < 4
    assert data_uri(seen).startswith("data:image/png;base64,")
    assert data_uri(picture.resize((900, 300))).startswith("data:image/jpeg;base64,")


def test_the_report_escapes_words_and_file_names(found, material):
    figures = json.loads(json.dumps(found.as_dict()))
    question = figures["painting"]["questions"][0]
    question["question"] = "</script><script>alert(1)</script>"
    question["files"] = ['"><img src=x onerror=alert(2)>.png']
    question["tokens"][0]["text"] = "</script><script>alert(3)</script>"
    figures["answers"]["planned"][0] = "<script>alert(4)</script>"
    pictures = {**material.shown(), "1.0": "javascript:alert(5)"}
    page = render(figures, {}, pictures=pictures, links={"<b>other</b>": "other.html"})
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "javascript:" not in page
    assert "<b>other" not in page
    assert page.count("<script") == 2
    assert page.count("<img") == page.count('<img src="data:image/') > 0
    for outside in ("http://", "https://", "url(", "@import", '<link rel="stylesheet'):
        assert outside not in page
    # Without the pictures their grids are still there.
    assert render(figures, {}).count("<canvas") == page.count("<canvas")


def change_row(number, **values):
    def change(row, i):
        if i == number:
            row.update(values)
            for key in [key for key, value in values.items() if value is None]:
                del row[key]

    return change


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (3, {"image": "none.png"}, r"row 4: there is no picture .*none\.png: mend the name"),
        (3, {"image": "questions.jsonl"}, r"row 4: .*questions\.jsonl is not a picture that Pillow can read"),
        (3, {"image": None}, "row 4: expected either image"),
        (3, {"images": ["p0.png"]}, "row 4: expected either image"),
        (0, {"images": []}, "row 1: expected names of picture files"),
        (0, {"images": "p0.png"}, "row 1: expected names of picture files"),
        (2, {"question": " "}, "row 3: expected a question"),
        (2, {"question": None}, "row 3: expected a question"),
        (2, {"answer": 3}, "row 3: expected an answer in words, got '3'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, number, values, message):
    with pytest.raises(ValueError, match=message):
        read_questions(cases.folder(tmp_path / "a", change=change_row(number, **values)))


def test_a_picture_cut_short_is_named(tmp_path):
    folder = cases.folder(tmp_path / "a")
    whole = (folder / "p2.png").read_bytes()
    (folder / "p2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"row 5: .*p2\.png is not a picture that Pillow can read \(.*truncated"):
        read_questions(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"question": "What is <image> here?"},
            r"row 1: the question has the placeholder of a picture in it \(<image>\)",
        ),
        ({"answer": "an <image>"}, "row 1: the answer has the placeholder of a picture"),
        ({"question": "word " * 900}, r"row 1: .* the prompt has \d{4} tokens, and the model has 1024 positions"),
    ],
)
def test_what_cannot_be_asked_is_named(asked, change, message):
    wrong = [dataclasses.replace(asked[0], **change), *asked[1:]]
    with pytest.raises(ValueError, match=message):
        PictureMaterial(*processors.family("llava"), wrong)


def test_too_few_questions_and_a_checkpoint_without_processor_are_refused(asked):
    model, processor = processors.family("llava")
    with pytest.raises(ValueError, match="has 15 questions, and at least 16 are needed"):
        PictureMaterial(model, processor, asked[:15])
    with pytest.raises(ValueError, match="no processor that takes pictures: save it there"):
        PictureMaterial(model, processor.tokenizer, asked)
    assert anatomy_of(model).vision_encoder is not None
    assert PictureQuestion(asked[0].pictures, "Why?").place == "the question 'Why?'"
