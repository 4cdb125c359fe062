"""Conversations: read from LLaVA's files, written by chat templates, labels on answers alone, padded."""

import json

import numpy as np
import pytest
import torch

import processors
import sparing
from sparing import zoo
from sparing.train import (
    ChatBatches,
    Conversation,
    ConversationFile,
    DrawnConversations,
    Turn,
    encode,
    write_conversations,
)
from sparing.train.turns import IGNORED
from sparing.worlds import scenes

FAMILIES = ("llava", "onevision", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl")
LLAVA = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A boat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


def said(pictures, later=0):
    """Two answers, pictures in the first turn and perhaps in a later one."""
    turns = (
        Turn("user", (*[None] * pictures, "What is in this picture?")),
        Turn("assistant", ("A red square.",)),
        Turn("user", (*[None] * later, "Which one is larger?")),
        Turn("assistant", ("It is the circle.",)),
    )
    return Conversation(turns, tuple(processors.picture(64, 40, i) for i in range(pictures + later)))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("pictures", "later"), [(1, 0), (2, 0), (1, 1), (0, 0)])
def test_labels_are_answers_and_their_ends_in_every_family(name, pictures, later):
    if name == "internvl" and tuple(map(int, np.__version__.split(".")[:2])) < (2, 1):
        pytest.skip("transformers' InternVLProcessor needs numpy 2.1")
    model, processor = processors.family(name)
    row = encode(model, processor, said(pictures, later), 1024)
    learnt = row["labels"][0] != IGNORED
    assert torch.equal(row["labels"][0][learnt], row["input_ids"][0][learnt])
    text = processor.tokenizer.decode(row["input_ids"][0][learnt])
    for end in ("</s>", "<|im_end|>", "<end_of_utterance>"):
        text = text.replace(end, "/")
    assert [part.strip() for part in text.split("/")] == ["A red square.", "It is the circle.", ""]
    # In place: before each answer's first token stands what a prompt ends with.
    prompt = processors.prompt(processor, "What is in this picture?", pictures)
    first = int(learnt.nonzero()[0])
    before = processor.tokenizer.decode(row["input_ids"][0][:first])
    assert before.endswith(prompt[-6:])


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_rows_with_pictures_and_without_make_one_batch(name):
    model, processor = processors.family(name)
    rows = [said(1), said(0), said(2)]
    data = ChatBatches(model, processor, rows)
    batch = data.collate([data[i] for i in range(3)])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == IGNORED).all())
    with torch.no_grad():
        together = model(**batch).loss
        # The mean over answers' tokens, whoever is beside them.
        alone = [encode(model, processor, row, 1024) for row in rows]
        weights = torch.tensor([float((row["labels"][:, 1:] != IGNORED).sum()) for row in alone])
        losses = torch.stack([model(**row).loss for row in alone])
    torch.testing.assert_close(together, (losses * weights).sum() / weights.sum(), rtol=1e-5, atol=1e-6)


def test_long_rows_are_cut_but_never_through_a_picture():
    model, processor = processors.family("llava")
    whole = encode(model, processor, said(1), 1024)
    length = whole["input_ids"].shape[1]
    cut = encode(model, processor, said(1), length - 5)
    assert {cut[name].shape[1] for name in ("input_ids", "attention_mask", "labels", "position_ids")} == {length - 5}
    with pytest.raises(ValueError, match="4 cut into them: give fewer or smaller pictures, or a larger --max-length"):
        encode(model, processor, said(1), 4)
    assert ChatBatches(model, processor, [said(1)], 10**6).max_length == 1024, "the model's own positions"


def test_drawn_scenes_are_the_template_s_chat():
    model, processor = sparing.load(zoo.path("scenes-llava"), dtype="float32")
    drawn = DrawnConversations(3, seed=1, turns=2)
    row = encode(model, processor, drawn[1], 512)
    scene, asked = drawn.draw(1)
    words = " ".join(f"{q.text} {q.answer} <eos>" for q in asked)
    assert processor.tokenizer.decode(row["input_ids"][0][101:]).split() == words.split()
    answers = processor.tokenizer.decode(row["input_ids"][0][row["labels"][0] != IGNORED])
    assert answers.split() == " ".join(f"{q.answer} <eos>" for q in asked).split()
    assert np.array_equal(np.asarray(drawn[1].pictures[0]), np.asarray(scenes.picture(scene)))
    with pytest.raises(IndexError):
        drawn[3]


def test_written_scenes_are_read_back(tmp_path):
    path = write_conversations(tmp_path / "d", 3, seed=1, turns=2)
    drawn, read = DrawnConversations(3, seed=1, turns=2), ConversationFile(path)
    assert len(read) == 3
    for one, two in zip(drawn, read, strict=True):
        assert one.turns == two.turns
        assert np.array_equal(np.asarray(one.pictures[0]), np.asarray(two.pictures[0]))


def folder(tmp_path, rows, name="rows.jsonl"):
    processors.picture(64, 40, 0).save(tmp_path / "a.png")
    path = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_files_are_read_row_by_row(tmp_path, name):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Was ist größer?"}]},
        {"role": "assistant", "content": "Das."},
    ]
    rows = [
        {"id": 1, "image": "a.png", "conversations": LLAVA},
        {"id": "2", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"image": ["a.png"], "messages": messages},
        {"image": "a.png", "conversations": [{"from": "human", "value": "No sign"}, {"from": "gpt", "value": "Ho"}]},
    ]
    read = ConversationFile(folder(tmp_path, rows, name))
    assert len(read) == 4
    assert read[0].turns[0] == Turn("user", (None, "What is it?"))
    assert [turn.role for turn in read[0].turns] == ["user", "assistant"] * 2
    assert (len(read[0].pictures), len(read[1].pictures)) == (1, 0)
    assert read[2].turns[0] == Turn("user", (None, "Was ist größer?"))
    assert read[3].turns[0].parts == (None, "No sign")
    assert read[-1].turns == read[3].turns
    assert len(ConversationFile(tmp_path / name, limit=2)) == 2


BAD = {
    "not there": (None, "does not exist: name a file of JSON lines"),
    "empty": ([], "has no rows: write some"),
    "no turns": ([{"image": "a.png"}], "line 1: expected an object with conversations or messages"),
    "no picture": ([{"image": "b.png", "conversations": LLAVA}], "there is no picture"),
    "a sign too many": ([{"conversations": LLAVA}], "<image> stands 1 times in the words of 0 pictures"),
    "no answer": ([{"image": "a.png", "conversations": LLAVA[:1]}], "expected a question and an answer at least"),
    "who": ([{"conversations": [{"from": "cat", "value": "Meow"}]}], "expected turns with from and value"),
    "said a picture": (
        [{"image": "a.png", "conversations": [LLAVA[2], {"from": "gpt", "value": "<image>"}]}],
        "pictures are given, not said",
    ),
    "a picture behind the answers": (
        [{"image": ["a.png", "a.png"], "conversations": [*LLAVA[:2], {"from": "human", "value": "<image> And here?"}]}],
        "line 1: a picture stands behind the last answer",
    ),
    "a number": ([{"image": 3, "conversations": LLAVA}], "expected the name of a picture file"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_at_once(tmp_path, what):
    rows, message = BAD[what]
    path = tmp_path / "rows.jsonl" if rows is None else folder(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        ConversationFile(path)


def test_broken_lines_and_pictures_are_named_with_their_line(tmp_path):
    path = folder(tmp_path, [{"image": "a.png", "conversations": LLAVA}])
    read = ConversationFile(path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: .*is not a picture that can be read"):
        read[0]
    # Empty lines are no rows, and count as lines.
    for broken in ('\n\n{"image": ', "\n\n" + "[" * 200_000):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match="line 3: no JSON"):
            ConversationFile(path)
    (tmp_path / "deep.json").write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"deep.json: no JSON"):
        ConversationFile(tmp_path / "deep.json")
    with pytest.raises(ValueError, match=r"the folder of pictures .* does not exist"):
        ConversationFile(path, tmp_path / "nowhere")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    model, processor = processors.family("llava")
    stock = processor.chat_template
    processor.chat_template = "{{ messages | length }} {{ messages[-1].role }}"
    try:
        with pytest.raises(ValueError, match="does not write turns one after the other"):
            encode(model, processor, said(1), 1024)
    finally:
        processor.chat_template = stock
