"""Batches of scenes with packed questions, as pictures or as words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from sparing.train.turns import IGNORED
from sparing.worlds.grids import GridScene, GridWorld, Question
from sparing.worlds.scenes import WORLD as SCENES
from sparing.worlds.splits import Split
from sparing.zoo.scene_recipe import SceneRecipe, Stage


class SceneBatch(NamedTuple):
    """Scenes and questions about them, in the layout `<bos> cells questions`.

    A cell is one visual token. Where `pixel_values` are given, all cells are there in reading order; where not, a part
    of them, told in words.

    Attributes:
        goal: what is trained on it; see `Stage`.
        pixel_values: the pictures, in -1 to 1; empty in text stages.
        cells: which patch each cell is; -1 is padding.
        cell_words: token ids of row, column, colour and kind of each cell.
        truth: colour, kind, row and column class of every patch.
        input_ids: tokens of the questions and answers.
        segments: which question a token belongs to, from 1; 0 is padding. One number in a row of several turns.
        targets: the next token, where it is an answer's or ends one; `IGNORED` elsewhere.
    """

    goal: str
    pixel_values: Float[Tensor, "b 3 h w"]
    cells: Int[Tensor, "b c"]
    cell_words: Int[Tensor, "b c 4"]
    truth: Int[Tensor, "b p 4"]
    input_ids: Int[Tensor, "b t"]
    segments: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]

    def to(self, device: torch.device) -> "SceneBatch":
        """The same on a device."""
        return SceneBatch(self.goal, *(part.to(device) for part in self[1:]))


class SceneBatches(Dataset):
    """The batches of a run; batch i depends on the seed and on i alone, so that a resumed run sees the same."""

    def __init__(self, recipe: SceneRecipe, tokenizer: PreTrainedTokenizerBase, seed: int, world: GridWorld = SCENES):
        self.recipe, self.tokenizer, self.seed, self.world = recipe, tokenizer, seed, world

    def __len__(self) -> int:
        return self.recipe.total_steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        stage, within = self.recipe.stage_of(index)
        rng = np.random.default_rng([self.seed, index])
        # Few objects first: what a question asks for is found sooner where there is little to confuse it with.
        most = stage.most_objects(within)
        drawn = [self.world.draw(rng, "train", most) for _ in range(stage.rows)]
        weights = stage.weights or self.recipe.weights
        asked = [self.world.questions(scene, rng, stage.questions, weights, distinct=stage.distinct) for scene in drawn]
        turns = rng.random() < stage.turns
        if turns and not stage.distinct:
            # A later turn would copy the answer.
            asked = [list({question.text: question for question in row}.values()) for row in asked]
        batch = make_batch(drawn, asked, self.tokenizer, stage, rng, turns=turns, world=self.world)
        return batch._asdict()


def make_batch(
    drawn: Sequence[GridScene],
    asked: Sequence[Sequence[Question]],
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    rng: np.random.Generator,
    *,
    turns: bool = False,
    world: GridWorld = SCENES,
) -> SceneBatch:
    """Makes a batch of scenes and their questions.

    Args:
        drawn: the scenes.
        asked: the questions about each.
        tokenizer: of the model.
        stage: says which form the scenes take.
        rng: chooses which bare cells are told, in text stages.
        turns: the questions of a row are turns of one chat, each seeing those before; otherwise none sees another.
        world: whose scenes they are.
    """
    ids = tokenizer.get_vocab()
    truth = np.stack([_truth(scene) for scene in drawn])
    pixels = torch.zeros(0, 3, 1, 1)
    if stage.goal != "words":
        pixels = normalise(world.paint(drawn))
    shown = [_shown(scene, stage, rng) for scene in drawn]
    width = max(map(len, shown))
    cells = np.full((len(drawn), width), -1)
    words = np.zeros((len(drawn), width, 4), dtype=np.int64)
    for row, (scene, places) in enumerate(zip(drawn, shown, strict=True)):
        told = scene.patch_words()
        cells[row, : len(places)] = places
        words[row, : len(places)] = [[ids[word] for word in told[place]] for place in places]
    rows = [_packed(questions, ids, ids["<eos>"], turns) for questions in asked]
    length = max(len(tokens) for tokens, _, _ in rows)
    text = np.full((3, len(drawn), length), IGNORED)
    text[0], text[1] = tokenizer.pad_token_id, 0
    for row, parts in enumerate(rows):
        for part, values in enumerate(parts):
            text[part, row, : len(values)] = values
    input_ids, segments, targets = torch.from_numpy(text)
    return SceneBatch(
        stage.goal,
        pixels,
        torch.from_numpy(cells),
        torch.from_numpy(words),
        torch.from_numpy(truth),
        input_ids,
        segments,
        targets,
    )


def normalise(pictures: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """Turns uint8 pictures `[b h w 3]` into what the model's image processor makes of them: -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def positions_and_mask(
    tokens: Int[Tensor, "b c"], segments: Int[Tensor, "b t"], number: int, around: tuple[int, int] = (1, 0)
) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b 1 s s"]]:
    """Where each token of `<bos> picture questions` stands, and what it sees.

    A token of the picture stands at its own place whether or not the others are there. Each question starts right after the
    picture and sees the picture and itself: as if it had been asked alone.

    Args:
        tokens: which of the picture's tokens are there; -1 is padding.
        segments: which question a token belongs to.
        number: tokens of a whole picture.
        around: how many tokens stand before the picture, `<bos>` among them, and how many right behind it.
    """
    rows, length = segments.shape
    before, behind, place = (torch.arange(many, device=tokens.device).expand(rows, -1) for many in (*around, length))
    starts = torch.where(segments != torch.nn.functional.pad(segments, (1, -1)), place, 0).cummax(1).values
    first, stop = around[0], around[0] + number
    positions = torch.cat([before, tokens.clamp(min=0) + first, behind + stop, place - starts + stop + around[1]], 1)
    # 0 is the scene, -1 padding, others are questions.
    owner = torch.cat(
        [before * 0, torch.where(tokens < 0, -1, 0), behind * 0, torch.where(segments > 0, segments, -1)], 1
    )
    causal = torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool, device=tokens.device).tril()
    sees = causal & ((owner[:, None] == 0) | ((owner[:, None] == owner[:, :, None]) & (owner[:, None] > 0)))
    # A padded row that sees nothing would give NaN; the first token is harmless.
    sees[:, :, 0] = True
    return positions, sees[:, None]


def _truth(scene: GridScene) -> np.ndarray:
    truth = scene.truth()
    row, column = np.indices(truth.kind.shape)
    return np.stack([truth.colour, truth.kind, row, column], -1).reshape(-1, 4)


def _shown(scene: GridScene, stage: Stage, rng: np.random.Generator) -> list[int]:
    columns, patches = scene.spec.columns, scene.spec.rows * scene.spec.columns
    if stage.goal != "words":
        return list(range(patches))
    taken = {thing.row * columns + thing.column for thing in scene.things}
    bare = [patch for patch in range(patches) if patch not in taken]
    # The background must be somewhere: at least one bare cell.
    few, many = stage.bare
    number = min(len(bare), round(float(np.exp(rng.uniform(np.log(few), np.log(many))))))
    return sorted(taken | {bare[place] for place in rng.choice(len(bare), size=number, replace=False)})


def _packed(asked: Sequence[Question], ids: dict[str, int], eos: int, turns: bool) -> tuple[list, list, list]:
    tokens: list[int] = []
    segments: list[int] = []
    targets: list[int] = []
    for number, question in enumerate(asked, start=1):
        prompt = [ids[word] for word in question.text.split()]
        answer = [*(ids[word] for word in question.answer.split()), eos]
        tokens += prompt + answer
        segments += [1 if turns else number] * (len(prompt) + len(answer))
        targets += [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]
    return tokens, segments, targets


def validation_batch(
    split: Split,
    per_task: int,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    seed: int = 0,
    world: GridWorld = SCENES,
) -> tuple[SceneBatch, list[str]]:
    """One question a row, `per_task` of every task, with the task of each row: for figures while training."""
    made = world.examples(split, per_task, seed)
    rng = np.random.default_rng(seed)
    batch = make_batch([m.scene for m in made], [[m.question] for m in made], tokenizer, stage, rng, world=world)
    return batch, [m.question.task for m in made]
