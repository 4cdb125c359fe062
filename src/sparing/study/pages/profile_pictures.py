"""What the profile's page shows of questions about pictures: grids over pictures, words, answers, and the ledger by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

STATES = ("gone", "skipped", "read", "ran")
GROUPS = {"image": "pictures", "text": "words"}
MODULES = {"attention": "attention", "mlp": "MLP"}


def picture_view(f: Mapping[str, Any], pictures: Mapping[str, str]) -> dict[str, Any]:
    """The questions, the ledger by group of tokens, and what the page's script reads.

    Args:
        f: the profile's figures.
        pictures: `question.span` -> `data:` URI.
    """
    page, answers = f["painting"], f["answers"]
    questions = []
    for i, question in enumerate(page["questions"]):
        spans = [
            {**span, "uri": uri if (uri := pictures.get(f"{i}.{j}", "")).startswith("data:image/") else ""}
            for j, span in enumerate(question["spans"])
        ]
        reference, dense, planned = (answers[name][i] for name in ("references", "dense", "planned"))
        questions.append(
            {
                **question,
                "spans": spans,
                "caption": ", ".join(question["files"]),
                "reference": reference,
                "own": answers["own"][i],
                "dense": dense,
                "planned": planned,
                "marks": {arm: _same(text, reference) for arm, text in (("dense", dense), ("planned", planned))},
                "pieces": _pieces(question),
            }
        )
    keep = ("text", "role", "pattern", "dense", "planned")
    data = {
        "layers": f["model"]["layers"],
        "patterns": page["patterns"],
        "questions": [
            {
                "tokens": [{k: token[k] for k in keep if k in token} for token in question["tokens"]],
                "spans": [{k: span[k] for k in ("grid", "patches", "extra")} for span in question["spans"]],
            }
            for question in page["questions"]
        ],
    }
    return {"questions": questions, "overview": _overview(page, f["model"]["layers"]), "data": data}


def _same(text: str, reference: str) -> bool:
    """As answers are compared when they are counted."""
    a, b = (" ".join(t.casefold().strip().removesuffix(".").split()) for t in (text, reference))
    return a == b


def _pieces(question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tokens in order, and where a picture stands among them."""
    before = Counter(span["before"] for span in question["spans"])
    for i, token in enumerate(question["tokens"]):
        if before[i]:
            yield {"pictures": before[i]}
        # Spaces between words are the page's own; a token of nothing else still has to be seen.
        text = token["text"].replace("\n", "⏎").strip(" ") or "␣"
        yield {"i": i, "text": text, "role": token["role"]}


def _overview(page: Mapping[str, Any], layers: int) -> list[dict[str, Any]]:
    """What became of most tokens of a group, in each module of each layer, with the numbers behind it."""
    patterns = page["patterns"]
    used: dict[str, Counter[int]] = {group: Counter() for group in GROUPS}
    for question in page["questions"]:
        used["text"].update(token["pattern"] for token in question["tokens"])
        for span in question["spans"]:
            used["image"].update([*span["patches"], *span["extra"]])
    rows = []
    for group, words in GROUPS.items():
        for module, name in MODULES.items():
            cells = []
            for layer in range(layers):
                found = Counter[int]()
                for pattern, count in used[group].items():
                    found[int(patterns[pattern][module][layer])] += count
                said = ", ".join(f"{count} {STATES[state]}" for state, count in found.most_common())
                cells.append({"layer": layer, "state": found.most_common(1)[0][0], "said": said})
            rows.append({"label": f"{words}, {name}", "module": module, "cells": cells})
    return rows
