"""Drawn scenes as a folder of pictures with questions: what a model of the zoo is asked where nothing else is given."""

from __future__ import annotations

import json
from pathlib import Path

from sparing.worlds.grids import GridWorld
from sparing.worlds.scenes import WORLD
from sparing.worlds.splits import Split


def draw_scenes(folder: Path, per_task: int, seed: int, split: Split = "test", world: GridWorld = WORLD) -> None:
    """Draw scenes, and write their questions beside them as `read_questions` reads them.

    Args:
        folder: of the pictures; made if needed.
        per_task: questions of each of the world's tasks, every one about a picture of its own.
        seed: of the scenes.
        split: whose scenes.
        world: what they are made of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, example in enumerate(world.examples(split, per_task, seed=seed)):
        name = f"{i:02d}-{example.question.task}.png"
        world.picture(example.scene).save(folder / name)
        rows.append({"image": name, "question": example.question.text, "answer": example.question.answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
