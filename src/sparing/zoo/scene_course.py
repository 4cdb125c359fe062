"""What is particular about training on scenes: the model, its processor, and the loss of each stage."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, set_seed

from sparing.worlds.grids import GridWorld
from sparing.worlds.scenes import WORLD as SCENES
from sparing.zoo.course import Course
from sparing.zoo.scene_batches import IGNORED, SceneBatch, SceneBatches, positions_and_mask, validation_batch
from sparing.zoo.scene_eyes import Eyes, eyes_of
from sparing.zoo.scene_recipe import ANSWERING, SceneRecipe
from sparing.zoo.scene_worlds import world_of


def build_model(recipe: SceneRecipe, eyes: Eyes, processor: Any, seed: int) -> Any:
    """Builds the model with random fp32 weights that depend on the seed alone."""
    tokenizer = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    fields = dict(recipe.config)
    fields["text_config"] = {**fields["text_config"], **special, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(
        recipe.model_type, pad_token_id=special["pad_token_id"], **{**fields, **eyes.config(tokenizer)}
    )
    set_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **special)
    return model


class SceneStudent(nn.Module):
    """The model and the probe that its encoder is trained through; the loss depends on the batch's goal."""

    def __init__(self, model: Any, eyes: Eyes, processor: Any, end_weight: float, world: GridWorld = SCENES):
        super().__init__()
        self.model, self.eyes = model, eyes
        tokenizer = processor.tokenizer
        words = [tokenizer.bos_token, *eyes.around[0]], list(eyes.around[1])
        self.around = tuple(torch.tensor(tokenizer.convert_tokens_to_ids(part), dtype=torch.long) for part in words)
        self.classes = [len(world.parts[part]) for part in ("colour", "kind", "row", "column")]
        self.probe = nn.Linear(eyes.width, sum(self.classes))
        self.end_weight, self.eos = end_weight, tokenizer.eos_token_id

    def forward(self, **fields: Any) -> dict[str, Tensor]:
        """Returns the loss of a batch, the fields of a `SceneBatch`."""
        batch = SceneBatch(**fields)
        losses = {
            "patches": self._patch_loss,
            "words": self._answer_loss,
            "bridge": self._answer_loss,
            "tuning": self._answer_loss,
            "reading": self._answer_loss,
        }
        with _frozen(self.model.model.language_model, self.model.lm_head, when=batch.goal == "bridge"):
            return {"loss": losses[batch.goal](batch)}

    def patch_logits(self, pixel_values: Tensor) -> list[Float[Tensor, "b p classes"]]:
        """What the probe says of each patch: colour, kind, row and column."""
        return list(self.probe(self.eyes.seen(self.model.model, pixel_values)).split(self.classes, -1))

    def answer_logits(self, batch: SceneBatch) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"]]:
        """The logits where an answer or its end is predicted, with the right tokens."""
        inner = self.model.model
        embed = inner.get_input_embeddings()
        rows, number = len(batch.cells), self.eyes.number
        if batch.goal == "words":
            picture = self.summed(batch.cell_words)
            places = self.eyes.places().to(batch.cells.device)
            tokens = torch.where(batch.cells < 0, -1, places[batch.cells.clamp(min=0)])
        else:
            picture = self.projected(batch.pixel_values, batch.goal)
            tokens = torch.arange(number, device=batch.cells.device).expand(rows, -1)
        before, behind = (embed(ids.to(batch.input_ids.device)).expand(rows, -1, -1) for ids in self.around)
        given = torch.cat([before, picture.to(before.dtype), behind, embed(batch.input_ids)], 1)
        around = before.shape[1], behind.shape[1]
        positions, sees = positions_and_mask(tokens, batch.segments, number, around)
        out = inner.language_model(
            inputs_embeds=given, attention_mask=sees, position_ids=positions, use_cache=False
        ).last_hidden_state[:, sum(around) + tokens.shape[1] :]
        asked = batch.targets != IGNORED
        return self.model.lm_head(out[asked]), batch.targets[asked]

    def summed(self, words: Int[Tensor, "b c 4"]) -> Float[Tensor, "b c d"]:
        """A patch told in words: the sum of the input embeddings of its row, column, colour and kind."""
        return self.model.model.get_input_embeddings()(words).sum(-2)

    def projected(self, pixel_values: Tensor, goal: str) -> Float[Tensor, "b n d"]:
        """A picture seen: its tokens, with gradients for what the goal trains."""
        wanted, inner = torch.is_grad_enabled(), self.model.model
        with torch.no_grad():
            seen = self.eyes.seen(inner, pixel_values)
        with torch.set_grad_enabled(wanted and goal in ("bridge", "tuning")):
            return self.eyes.laid_out(inner, inner.multi_modal_projector(seen))

    def _patch_loss(self, batch: SceneBatch) -> Tensor:
        kind = batch.truth[..., 1]
        # Most patches are bare; the few others weigh as much as all of them.
        weight = torch.where(kind > 0, (kind == 0).sum() / (kind > 0).sum().clamp(min=1), 1.0).flatten()
        losses = [
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), right.flatten(), reduction="none")
            for logits, right in zip(self.patch_logits(batch.pixel_values), batch.truth.unbind(-1), strict=True)
        ]
        return (torch.stack(losses).sum(0) * weight).sum() / weight.sum()

    def _answer_loss(self, batch: SceneBatch) -> Tensor:
        logits, right = self.answer_logits(batch)
        losses = nn.functional.cross_entropy(logits.float(), right, reduction="none")
        weight = torch.where(right == self.eos, self.end_weight, 1.0)
        return (losses * weight).sum() / weight.sum()


@contextmanager
def _frozen(*modules: nn.Module, when: bool) -> Iterator[None]:
    """Gradients pass through these modules, and are not computed for their weights."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad] if when else []
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@torch.inference_mode()
def task_shares(student: SceneStudent, batch: SceneBatch, tasks: list[str]) -> dict[str, float]:
    """The share of rows, by task, whose every answer word is the likeliest one (one question a row)."""
    logits, right = student.answer_logits(batch)
    hit = ((logits.argmax(-1) == right) | (right == student.eos)).cpu()
    row = (batch.targets != IGNORED).nonzero()[:, 0].cpu()
    whole = torch.ones(len(tasks), dtype=torch.bool)
    whole[row[~hit]] = False
    total, good = Counter(tasks), Counter(task for task, ok in zip(tasks, whole.tolist(), strict=True) if ok)
    return {task: good[task] / total[task] for task in total}


class SceneCourse(Course):
    """A vision-language model on scenes with packed questions, in stages."""

    recipe: SceneRecipe
    trained: SceneStudent

    def __init__(self, recipe: SceneRecipe, seed: int, data: Path | None = None):
        self.recipe, self.seed = recipe, seed
        self.world = world_of(recipe, data)
        eyes = eyes_of(recipe, self.world)
        self.processor = eyes.processor()
        self.model = build_model(recipe, eyes, self.processor, seed)
        self.trained = SceneStudent(self.model, eyes, self.processor, recipe.end_weight, self.world)
        self.batches = SceneBatches(recipe, self.processor.tokenizer, seed, self.world)

    def loss(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """As in `Course`: that of the batch's stage."""
        return trained(**batch)["loss"]

    def watch(self, step: int) -> dict[str, float]:
        """As in `Course`: accuracy by task, in the form that the stage trains on, every so many steps."""
        stage, _ = self.recipe.stage_of(step - 1)
        if step % self.recipe.watch_every or stage.goal not in ANSWERING:
            return {}
        batch, tasks = validation_batch(
            "validation", self.recipe.watched, self.processor.tokenizer, stage, world=self.world
        )
        batch = batch.to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.mixed):
            shares = task_shares(self.trained, batch, tasks)
        return {task: round(share, 3) for task, share in shares.items()}
