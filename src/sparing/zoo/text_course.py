"""What is particular about training `arithmetic-llama`: its rows of problems and their weighted loss."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sparing.worlds import arithmetic
from sparing.worlds.vocabulary import word_tokenizer
from sparing.zoo.course import Course
from sparing.zoo.text_recipe import TextRecipe


class Batches(Dataset):
    """The batches of a run; batch i depends on the seed and on i alone, so that a resumed run sees the same.

    A row is a run of documents, `<bos>` problems `<eos>`, cut at its length. Attention crosses documents.
    Each batch has `input_ids` [b t] and `weights` [b t], the weight of each token in the loss.
    """

    def __init__(self, recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.recipe, self.tokenizer, self.seed = recipe, tokenizer, seed

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        recipe = self.recipe
        if not 0 <= index < len(self):
            raise IndexError(index)
        is_long = (index + 1) % recipe.long_every == 0
        length = recipe.long_length if is_long else recipe.length
        rng = random.Random(f"batch/{self.seed}/{index}")
        problems = arithmetic.stream("train", f"{self.seed}/{index}")
        rows = [self._row(problems, rng, length) for _ in range(recipe.batch * recipe.length // length)]
        return {
            "input_ids": torch.tensor([ids for ids, _ in rows]),
            "weights": torch.tensor([weights for _, weights in rows]),
        }

    def _row(self, problems: Iterator[arithmetic.Example], rng: random.Random, length: int) -> tuple[list, list]:
        tokenizer = self.tokenizer
        ids: list[Any] = []
        weights: list[float] = []
        while len(ids) < length:
            ids.append(tokenizer.bos_token_id)
            weights.append(0.0)
            for made in itertools.islice(problems, rng.randint(1, self.recipe.longest_document)):
                parts = [made.prompt, made.text[len(made.prompt) :]]
                prompt, rest = tokenizer(parts, add_special_tokens=False).input_ids
                ids += prompt + rest
                weights += [self.recipe.prompt_weight] * len(prompt) + [1.0] * len(rest)
            ids.append(tokenizer.eos_token_id)
            weights.append(1.0)
        return ids[:length], weights[:length]


def build_tokenizer(recipe: TextRecipe) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of the recipe's world."""
    return word_tokenizer(arithmetic.WORDS, arithmetic.MARKERS, recipe.config["max_position_embeddings"])


def build_model(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Builds the model with random fp32 weights that depend on the seed alone."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(recipe.model_type, vocab_size=len(tokenizer), **special, **recipe.config)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    # An answer ends with its line; without the newline here `generate` would go on to invent questions.
    newline = tokenizer.convert_tokens_to_ids("\n")
    special["eos_token_id"] = [tokenizer.eos_token_id, newline]
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=96, **special)
    return model


def weighted_loss(
    logits: Float[Tensor, "b t v"], input_ids: Int[Tensor, "b t"], weights: Float[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Returns the weighted mean of the next-token cross-entropy, in nats; `weights` belong to the targets."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


class TextCourse(Course):
    """A text model on rows of problems."""

    def __init__(self, recipe: TextRecipe, seed: int):
        self.recipe, self.seed = recipe, seed
        self.processor = build_tokenizer(recipe)
        self.model = self.trained = build_model(recipe, self.processor, seed)
        self.batches = Batches(recipe, self.processor, seed)

    def loss(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """As in `Course`: the weighted next-token loss."""
        logits = trained(input_ids=batch["input_ids"], use_cache=False).logits
        return weighted_loss(logits, batch["input_ids"], batch["weights"])
