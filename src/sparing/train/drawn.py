"""Conversations about drawn scenes (`sparing.worlds.scenes`): data without end for the zoo's models, and files of it for trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparing.train.conversations import PICTURE, Conversation, Turn
from sparing.worlds import scenes
from sparing.worlds.grids import GridScene, GridWorld, Question

KEY = 23
"""Tells these draws from others of the same seed."""


class DrawnConversations(Sequence[Conversation]):
    """Scenes of the training split, each with several questions; item `i` follows from the seed and `i` alone.

    Args:
        number: conversations.
        seed: of the draws.
        turns: questions of each.
    """

    def __init__(self, number: int, seed: int = 0, turns: int = 8) -> None:
        self.number, self.seed, self.turns = number, seed, turns

    def __len__(self) -> int:
        """Conversations."""
        return self.number

    def __getitem__(self, index: Any) -> Any:
        """One of them; a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return about_scene(scenes.WORLD, *self.draw(index), f"scene {index}")

    def draw(self, index: int) -> tuple[scenes.Scene, list[scenes.Question]]:
        """The scene of an item, and what is asked about it."""
        rng = np.random.default_rng([self.seed, index, KEY])
        scene = scenes.draw_scene(rng, scenes.SceneSpec(), "train")
        return scene, scenes.questions(scene, rng, self.turns)


def about_scene(world: GridWorld, scene: GridScene, asked: Sequence[Question], place: str) -> Conversation:
    """A scene's picture, and several questions about it with their answers; `place` names it in errors."""
    turns = []
    for i, question in enumerate(asked):
        turns.append(Turn("user", (None, question.text) if i == 0 else (question.text,)))
        turns.append(Turn("assistant", (question.answer,)))
    return Conversation(tuple(turns), (world.picture(scene),), place)


def write_conversations(folder: Path, number: int, seed: int = 0, turns: int = 8) -> Path:
    """Write drawn conversations as a file in LLaVA's format, its pictures beside it.

    Returns:
        The file, `rows.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, rows = DrawnConversations(number, seed, turns), []
    for i in range(number):
        scene, asked = drawn.draw(i)
        name = f"{i:05d}.png"
        scenes.picture(scene).save(folder / name)
        said = []
        for j, question in enumerate(asked):
            said.append({"from": "human", "value": f"{PICTURE}\n{question.text}" if j == 0 else question.text})
            said.append({"from": "gpt", "value": question.answer})
        rows.append({"id": f"{i:05d}", "image": name, "conversations": said})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def speaks_scenes(processor: Any) -> bool:
    """Whether a model's tokenizer knows the words of the scenes."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer is not None and not scenes.WORLD.strange_words(tokenizer.get_vocab())
