"""Measures a model of scenes on held-out ones and writes its model card."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparing.anatomy import ask
from sparing.checkpoint import load
from sparing.lens import record
from sparing.tokens import TokenMap
from sparing.worlds.grids import BlindGuesser, Example, GridWorld, chance
from sparing.worlds.grids.words import NOTHING
from sparing.worlds.scenes import WORLD as SCENES
from sparing.worlds.scenes import single_patch_share
from sparing.zoo.figures import TEST_SEED, Figures, Score, by_difficulty, machine_words
from sparing.zoo.precision import in_words
from sparing.zoo.scene_eyes import eyes_of
from sparing.zoo.scene_recipe import ANSWERING, SceneRecipe, Stage

BLIND_SHOWN = 1500
QUESTION = "what colour is background ?"


@torch.inference_mode()
def answers(
    model: Any, processor: Any, asked: Sequence[Example], batch: int = 50, world: GridWorld = SCENES
) -> list[str]:
    """Returns the answers a model writes, decoded greedily from picture and question, one question a picture."""
    found: list[str] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        pictures = [[world.picture(example.scene)] for example in part]
        inputs = ask(model, processor, [example.question.text for example in part], pictures)
        out = model.generate(**inputs, do_sample=False)
        written = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip() for text in written]
    return found


def blind_guesser(world: GridWorld = SCENES) -> BlindGuesser:
    """The best that answers without pictures can be, told the answers of questions from the training split."""
    return BlindGuesser(world.examples("train", BLIND_SHOWN, seed=TEST_SEED))


def scores(asked: Sequence[Example], found: Sequence[str]) -> dict[str, Score]:
    """Returns the score of some answers per task, in the order in which the tasks were asked."""
    right, total = Counter(), Counter()
    for example, answer in zip(asked, found, strict=True):
        total[example.question.task] += 1
        right[example.question.task] += answer == example.question.answer
    return {task: Score(right[task], total[task], level) for task, level in chance(asked).items()}


@torch.inference_mode()
def spoken_shares(
    model: Any, processor: Any, number: int, seed: int = TEST_SEED, world: GridWorld = SCENES
) -> dict[str, float]:
    """How often a patch's visual token is nearest to the right word's input embedding.

    Of the words of one part (all rows, all columns, all colours, all kinds) the one with the largest cosine is taken.
    Patches with an object and bare ones are counted apart, and the objects also by what they are, such as letters.

    Args:
        model: in eval mode.
        processor: the model's own.
        number: test scenes.
        seed: of the scenes.
        world: whose scenes they are.

    Returns:
        `object row`, `object column`, ..., `bare kind`, and `letter kind` and the like: shares.
    """
    drawn = list(itertools.islice(world.stream("test", seed), number))
    inputs = ask(model, processor, [QUESTION] * len(drawn), [[world.picture(scene)] for scene in drawn])
    patches = torch.stack([row[0].patches().flatten() for row in TokenMap.from_inputs(model, inputs).images])
    where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool).scatter(1, patches.to(model.device), True)
    seen = record(model, inputs, where=where, levels=[0]).at(0).float().unflatten(0, patches.shape)
    embeddings = model.get_input_embeddings().weight.float()
    ids = processor.tokenizer.get_vocab()
    told = [scene.patch_words() for scene in drawn]
    kinds = np.asarray([[patch[3] for patch in scene] for scene in told])
    which = {"object": kinds != NOTHING, "bare": kinds == NOTHING}
    which |= {name: np.isin(kinds, members) for name, members in world.groups.items()}
    shares: dict[str, float] = {}
    for place, (part, options) in enumerate(world.parts.items()):
        near = torch.nn.functional.normalize(embeddings[[ids[word] for word in options]], dim=-1)
        # The length of the visual token does not change which word is nearest.
        nearest = (seen @ near.T.to(seen.device)).argmax(-1).cpu()
        right = torch.tensor([[options.index(patch[place]) for patch in scene] for scene in told])
        for name, taken in which.items():
            shares[f"{name} {part}"] = (nearest == right)[torch.from_numpy(taken)].float().mean().item()
    return shares


def measure(folder: Path, *, per_task: int, seconds: float, world: GridWorld = SCENES) -> Figures:
    """Asks a saved model `per_task` test questions of every task, with its weights as they are saved, in fp32."""
    model: Any
    model, processor = load(folder, dtype=torch.float32)
    asked = world.examples("test", per_task, seed=TEST_SEED)
    found = answers(model, processor, asked, world=world)
    blind = blind_guesser(world)
    guessed = scores(asked, [blind.answer(example.question) for example in asked])
    marks = [
        (example.question.task, example.difficulty, answer == example.question.answer)
        for example, answer in zip(asked, found, strict=True)
    ]
    return Figures(
        scores=scores(asked, found),
        harder=by_difficulty(marks),
        more={
            **{f"blind {task}": score.accuracy for task, score in guessed.items()},
            **{
                f"spoken {part}": share
                for part, share in spoken_shares(model, processor, max(1, per_task // 2), world=world).items()
            },
        },
        seconds=seconds,
        parameters=model.num_parameters(),
        size=(folder / "model.safetensors").stat().st_size,
    )


def card(
    recipe: SceneRecipe, figures: Figures, *, environment: Mapping[str, Any], seed: int, world: GridWorld = SCENES
) -> str:
    """Writes the model card."""
    rows = []
    for task, score in figures.scores.items():
        low, high = score.interval
        levels = ", ".join(f"{level}: {right}/{total}" for level, (right, total) in _banded(figures.harder[task]))
        blind = figures.more[f"blind {task}"]
        rows.append(
            f"| {task} | {score.accuracy:.1%} | {low:.1%} to {high:.1%} | {score.chance:.1%} | {blind:.1%} | {levels} |"
        )
    spoken = [
        f"| {part} | {figures.more[f'spoken object {part}']:.1%} | {figures.more[f'spoken bare {part}']:.1%} |"
        for part in world.parts
    ]
    spoken += [f"| kind, {group} only | {figures.more[f'spoken {group} kind']:.1%} | – |" for group in world.groups]
    stages = [_stage_row(stage) for stage in recipe.stages]
    reads = any(stage.goal == "reading" for stage in recipe.stages)
    reading = "- *reading*: the language model alone.\n" if reads else ""
    precision = in_words(environment)
    eyes, vision, text = eyes_of(recipe, world), recipe.config["vision_config"], recipe.config["text_config"]
    side, decoder = vision["image_size"], text["model_type"].capitalize()
    per_task = next(iter(figures.scores.values())).total
    example = next(world.stream("test", TEST_SEED))
    asked = world.examples("test", 1, seed=TEST_SEED)
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: image-text-to-text
tags: [sparing, synthetic, vision]
---

# {recipe.name}

{recipe.summary}
Pictures are {side}x{side} pixels, a grid of {world.shows}; every object fills
exactly {eyes.filled}, so that what each visual token should know is known.

A scene in words: `{example.tell()}`

```
{chr(10).join(f"{made.question.task:10} {made.question.text} {made.question.answer}" for made in asked)}
```

## Model

- {recipe.model_type}: {eyes.encoder} ({_sizes(vision)}, patch {vision["patch_size"]}); MLP projector;
  {decoder} ({_sizes(text)}, {text["num_key_value_heads"]} key-value heads), input and output embeddings not tied.
- {eyes.told}
- {figures.parameters:,} parameters in bf16, {figures.size:,} bytes.
- The tokenizer knows the world's words and nothing else. The prompt is `<image>` and a question; the chat template
  writes `<eos>` after every answer.

## Data and training

- {world.source} A scene belongs to a split by a hash of what it shows: 90%
  train, 5% validation, 5% test. The `blind` questions are {len(world.facts)} facts, the same in every split.
- In stages; the model is the Hugging Face class throughout:

| stage | steps | scenes a step | questions a scene | peak learning rate |
| --- | --- | --- | --- | --- |
{chr(10).join(stages)}

- *patches*: the encoder names row, column, colour and kind of every patch through a linear probe, which is thrown away.
- *words*: the language model alone. A patch is told as one token, the sum of the input embeddings of its four words
  (`r3`, `c4`, `red`, `circle`); patches with objects and some bare ones are told, each at its own position.
- *bridge*: the projector alone, from pixels to answers through the frozen language model, as in LLaVA's first stage.
  Nothing says what a visual token should be, but the answers.
- *tuning*: projector and language model, the encoder frozen, as in LLaVA's second stage.
{reading}- Questions packed into a row do not see each other (in {recipe.stages[-1].turns:.0%} of the last stage's batches they do, as
  turns of one chat); only answers have a loss. Scenes grow from one object to six in the first {recipe.stages[1].growing} steps of
  *words*.
{_repeats(recipe)}- AdamW, weight decay {recipe.weight_decay:g}; each stage warms up, stays and falls linearly; {precision};
  seed {seed}.
- {figures.seconds / 60:.1f} minutes of wall-clock time on {machine_words(environment)}.

## Figures

Exact match of the whole answer, greedy decoding, {per_task} test questions of each task, each about a picture of its own
(seed {TEST_SEED}), with Wilson 95% intervals. Chance is a random answer of the right form. Blind is the best that can
be done without the picture: the question's most frequent answer in {BLIND_SHOWN} training questions a task. The last
column has right answers and questions by the number of objects in the scene.

| task | accuracy | 95% interval | chance | blind | by objects |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{_of_words(figures)}What visual tokens say: how often the input embedding with the largest cosine, among the words of one
part, is the right one ({max(1, per_task // 2)} test pictures). No loss asked for it: the answers alone did.

| part | patches with an object | bare patches |
| --- | --- | --- |
{chr(10).join(spoken)}

## Limits

It has seen the forms of its world and nothing else; other wording, larger pictures, more objects, and scenes told as text were
neither trained nor measured. The language model had read scenes told as sums of word embeddings before it saw pictures, which
is more of a bridge than a caption is. No claim about larger models follows from it.

{world.licence}
"""


def _of_words(figures: Figures) -> str:
    if "word" not in figures.scores:
        return ""
    low, high = figures.scores["word"].interval
    return (
        f"Someone who reads one letter of a spelled word and guesses the rest is right in {single_patch_share():.1%};\n"
        f"the model's interval is {low:.1%} to {high:.1%}.\n\n"
    )


def _repeats(recipe: SceneRecipe) -> str:
    """Whether answers were as frequent in training as in tests."""
    last = sum(not stage.distinct for stage in recipe.stages)
    if not last:
        return ""
    which = "the last stage, which draws" if last == 1 else f"the last {last} stages, which draw"
    return f"""- Questions of a row differ, but in {which} each as if it were asked alone: distinct ones make large
  counts rarer than they are in tests.
"""


def _sizes(config: Mapping[str, Any]) -> str:
    """Depth and widths of a transformer in words."""
    return (
        f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, MLP {config['intermediate_size']}, "
        f"{config['num_attention_heads']} attention heads"
    )


def _stage_row(stage: Stage) -> str:
    packed = stage.questions if stage.goal in ANSWERING else "–"
    return f"| {stage.goal} | {stage.steps:,} | {stage.rows} | {packed} | {stage.lr:g} |"


def _banded(levels: Mapping[int, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Levels in bands, so that a row of the table stays short."""
    bands = (("1-2", (1, 2)), ("3-4", (3, 4)), ("5-6", (5, 6)), ("7-9", (7, 9)))
    found = []
    for name, (low, high) in bands:
        marks = [marks for level, marks in levels.items() if low <= level <= high]
        if marks:
            found.append((name, (sum(right for right, _ in marks), sum(total for _, total in marks))))
    return found
