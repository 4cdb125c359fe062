"""A folder of pictures with questions, for the profiles of tiny vision models."""

import json

from processors import picture
from sparing.evaluate import Settings

SETTINGS = Settings(method="additive", repeats=1, steps=2, batches=(1,), controls=1)
SIZES = ((64, 40), (33, 90), (48, 48), (120, 31))


def folder(path, *, pictures=8, answers=True, change=None):
    """`pictures` of several sizes, two questions about each; the first question is about two of them.

    `change` is given each row and its number, and may change it.
    """
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(pictures):
        picture(*SIZES[i % len(SIZES)], seed=i).save(path / f"p{i}.png")
        rows += [
            {"image": f"p{i}.png", "question": "Which one is larger?", "answer": "It is the circle."},
            {"image": f"p{i}.png", "question": "Describe the picture.", "answer": "A red square" if i % 2 else "blue"},
        ]
    rows[0] = {**rows[0], "images": ["p0.png", "p1.png"]}
    del rows[0]["image"]
    for number, row in enumerate(rows):
        if not answers:
            del row["answer"]
        if change is not None:
            change(row, number)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "questions.jsonl").write_text(text, encoding="utf-8")
    return path
