"""The recipe of `scenes-llava`: a small vision-language model, trained in five stages."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from sparing.zoo.recipe import Recipe

Goal = Literal["patches", "words", "bridge", "tuning", "reading"]
ANSWERING: tuple[Goal, ...] = ("words", "bridge", "tuning", "reading")
"""Goals whose loss is that of answers."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the run.

    Attributes:
        goal: `patches`: the encoder names colour, kind, row and column of each patch, through a linear probe that is
            thrown away. `words`: the language model answers questions about scenes in which each shown patch is one
            token, the sum of the input embeddings of its four words. `bridge`: from pixels to answers, the projector alone,
            as in LLaVA's first stage: nothing says what a visual token should be, but the answers. `tuning`: projector and
            language model, as in LLaVA's second. `reading`: the language model alone.
        steps: optimiser steps.
        rows: scenes in a step.
        questions: questions packed into a row.
        lr: peak learning rate of the stage.
        warmup: steps until the peak.
        cooldown: share of the steps, at the end, in which the rate falls linearly.
        floor: share of the peak that it falls to.
        most: most objects of a scene.
        growing: steps in which they grow from one to `most`.
        bare: fewest and most patches without an object that are told (`words` only); their number is log-uniform.
        turns: share of batches in which questions are turns of one chat, each seeing those before it.
        weights: how often each task is asked, in the order of the world's tasks; the recipe's by default.
        distinct: nothing is asked twice in a row, unless there is nothing else to ask. If not, answers are as frequent as when each
            question is asked alone, as it is in tests.
    """

    goal: Goal
    steps: int
    rows: int
    questions: int
    lr: float
    warmup: int = 20
    cooldown: float = 0.3
    floor: float = 0.05
    most: int = 6
    growing: int = 0
    bare: tuple[int, int] = (1, 12)
    turns: float = 0.0
    weights: tuple[float, ...] | None = None
    distinct: bool = True

    def most_objects(self, step: int) -> int:
        """The most objects of a scene at a step of the stage."""
        return self.most if step >= self.growing else 1 + step * (self.most - 1) // self.growing

    def lr_at(self, step: int) -> float:
        """The learning rate of a step of the stage: up, flat, down."""
        falling = max(1, round(self.steps * self.cooldown))
        left = (self.steps - step) / falling
        return self.lr * min(1.0, (step + 1) / self.warmup, self.floor + (1 - self.floor) * left)


@dataclass(frozen=True, kw_only=True)
class SceneRecipe(Recipe):
    """A LLaVA that is trained on scenes on a grid.

    Attributes:
        world: `scenes`: drawn ones, `sparing.worlds.scenes`. `real-scenes`: those of `sparing.worlds.real_scenes`.
        stages: the parts of the run, in order; each goes on with the weights that the one before left.
        weights: how often each task is asked in training, in the order of the world's tasks.
        end_weight: weight in the loss of the end of an answer, where its words weigh 1.
        watch_every: steps between looks at the validation split; a multiple of the 20 steps between log lines.
        watched: validation questions of each task.
    """

    world: Literal["scenes", "real-scenes"] = "scenes"
    stages: tuple[Stage, ...]
    weights: tuple[float, ...]
    end_weight: float = 0.1
    watch_every: int = 200
    watched: int = 20

    @property
    def total_steps(self) -> int:
        """As in `Recipe`."""
        return sum(stage.steps for stage in self.stages)

    @property
    def peak_lr(self) -> float:
        """As in `Recipe`."""
        return max(stage.lr for stage in self.stages)

    def stage_of(self, step: int) -> tuple[Stage, int]:
        """The stage that a step of the run belongs to, and which step of the stage it is."""
        ends = list(itertools.accumulate(stage.steps for stage in self.stages))
        for stage, end in zip(self.stages, ends, strict=True):
            if step < end:
                return stage, step - end + stage.steps
        return self.stages[-1], self.stages[-1].steps

    def lr_factor(self, step: int) -> float:
        """As in `Recipe`."""
        stage, within = self.stage_of(step)
        return stage.lr_at(within) / self.peak_lr

    def shrunk(self) -> "SceneRecipe":
        """As in `Recipe`: two layers in either half, two steps a stage."""
        config = {
            key: {**value, "num_hidden_layers": 2} if isinstance(value, dict) else value
            for key, value in self.config.items()
        }
        stages = tuple(replace(stage, steps=2, rows=2, questions=3, warmup=1, growing=0) for stage in self.stages)
        return replace(self, config=MappingProxyType(config), stages=stages)


_WORDS = Stage(goal="words", steps=1500, rows=8, questions=8, lr=1.5e-3, bare=(1, 30))
_TUNING = Stage(goal="tuning", steps=1000, rows=6, questions=12, lr=6e-4, turns=0.1)
# With the projector fixed too, the language model bears a higher rate.
_READING = replace(_TUNING, goal="reading", lr=1e-3)

# The first recipe of scenes-llava, for a core, which the recipes beside it still go by: a quarter of the questions in a step.
SMALL_STEPS = (
    Stage(goal="patches", steps=500, rows=32, questions=1, lr=2e-3),
    replace(_WORDS, steps=1500, cooldown=0.0, growing=300),
    # What is known by now makes room for places, relations and counts.
    replace(_WORDS, steps=2500, cooldown=0.4, weights=(0.5, 1.2, 0.8, 2.0, 0.1, 0.2, 3.0, 3.0, 2.5, 2.2, 0.2)),
    Stage(
        goal="bridge",
        steps=1000,
        rows=6,
        questions=12,
        lr=2e-3,
        growing=300,
        weights=(1.0, 1.0, 1.2, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.2, 0.1),
    ),
    replace(
        _TUNING,
        steps=1200,
        cooldown=0.2,
        floor=0.5,
        weights=(0.8, 0.8, 1.0, 3.0, 0.3, 0.4, 4.0, 1.6, 1.2, 2.5, 0.4),
    ),
    replace(_READING, steps=1200, cooldown=0.5, weights=(0.8, 0.8, 0.9, 4.0, 0.2, 0.3, 4.0, 1.5, 0.8, 2.5, 0.4)),
    # Counts and words are learnt last.
    replace(_READING, steps=900, cooldown=0.6, weights=(0.6, 0.6, 0.8, 2.5, 0.1, 0.2, 6.0, 1.5, 0.8, 3.5, 0.2)),
)

# Sizes of the decoder, whatever its family.
DECODER: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.072,
    }
)

SCENES_LLAVA = SceneRecipe(
    name="scenes-llava",
    summary="A LLaVA with a three-layer CLIP-style encoder and an eight-layer Qwen3 that answers questions about small pictures.",
    model_type="llava",
    config=MappingProxyType(
        {
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 80,
                "patch_size": 8,
                "projection_dim": 96,
            },
            # Queries and keys are normalised, as a Llama's are not.
            "text_config": {**DECODER, "model_type": "qwen3", "head_dim": 32},
            # The last layer: the encoder is trained to name patches there.
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
        }
    ),
    stages=(
        SMALL_STEPS[0],
        replace(SMALL_STEPS[1], rows=32),
        # What is known by now makes room for places, relations and, above all, counts: told in words they are learnt cheaply.
        replace(
            _WORDS,
            steps=4500,
            rows=32,
            cooldown=0.5,
            weights=(0.5, 1.0, 0.8, 2.0, 0.1, 0.2, 5.0, 3.0, 2.0, 2.2, 0.2),
        ),
        replace(SMALL_STEPS[3], steps=800, rows=24),
        # Distinct questions make three and four rarer than they are in tests: the model would answer one too few.
        replace(
            _TUNING,
            steps=4000,
            rows=24,
            lr=8e-4,
            warmup=50,
            cooldown=0.7,
            weights=(0.8, 0.8, 1.2, 2.5, 0.2, 0.3, 5.0, 1.8, 1.2, 2.8, 0.3),
            distinct=False,
        ),
    ),
    # shape colour letter cell background behind count relation point word blind
    weights=(1.0, 0.8, 2.5, 1.5, 0.2, 0.3, 1.5, 2.5, 2.0, 3.0, 0.3),
)
