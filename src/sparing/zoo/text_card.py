"""Measures `arithmetic-llama` on held-out problems and writes its model card."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparing.worlds import arithmetic
from sparing.worlds.arithmetic import Example
from sparing.zoo.figures import TEST_SEED, Figures, Score, by_difficulty, machine_words
from sparing.zoo.precision import in_words
from sparing.zoo.text_recipe import TextRecipe


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Example], batch: int = 64
) -> list[str]:
    """Returns the final answers a model writes to the problems, decoded greedily from the prompts."""
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].text))
    found = [""] * len(asked)
    generate: Any = model.generate
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        inputs = tokenizer([asked[place].prompt for place in places], return_tensors="pt", padding=True)
        out = generate(**inputs.to(model.device), do_sample=False)
        written = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, written, strict=True):
            found[place] = arithmetic.final_answer(text)
    return found


def scores(asked: Sequence[Example], found: Sequence[str]) -> dict[str, Score]:
    """Returns the score of some answers per kind of problem, in the order in which the kinds were asked."""
    right = Counter(made.task for made, answer in zip(asked, found, strict=True) if answer == made.solution)
    total = Counter(made.task for made in asked)
    return {task: Score(right[task], total[task], level) for task, level in arithmetic.chance(asked).items()}


@torch.inference_mode()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Iterable[Example]) -> float:
    """Returns the cross-entropy of what follows `A:`, in nats per token."""
    total, count = 0.0, 0
    for example in asked:
        whole = tokenizer(example.text, return_tensors="pt").input_ids.to(model.device)
        known = len(tokenizer(example.prompt).input_ids)
        logits = model(input_ids=whole).logits[0, known - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, whole[0, known:], reduction="sum").item()
        count += whole.shape[1] - known
    return total / count


def measure(folder: Path, *, per_task: int, seconds: float) -> Figures:
    """Asks a saved model `per_task` test problems of every kind, with its weights as they are saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = arithmetic.examples("test", per_task, seed=TEST_SEED)
    found = answers(model, tokenizer, asked)
    marks = [(made.task, made.difficulty, answer == made.solution) for made, answer in zip(asked, found, strict=True)]
    return Figures(
        scores=scores(asked, found),
        harder=by_difficulty(marks),
        more={"loss": answer_loss(model, tokenizer, asked)},
        seconds=seconds,
        parameters=model.num_parameters(),
        size=(folder / "model.safetensors").stat().st_size,
    )


def card(recipe: TextRecipe, figures: Figures, *, environment: Mapping[str, Any], seed: int) -> str:
    """Writes the model card."""
    rows = []
    for task, score in figures.scores.items():
        low, high = score.interval
        levels = ", ".join(f"{level}: {right}/{total}" for level, (right, total) in figures.harder[task].items())
        rows.append(f"| {task} | {score.accuracy:.1%} | {low:.1%} to {high:.1%} | {score.chance:.1%} | {levels} |")
    config = recipe.config
    per_task = next(iter(figures.scores.values())).total
    example = arithmetic.examples("test", 1, seed=TEST_SEED, tasks=["columns"])[0]
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [sparing, synthetic, arithmetic]
---

# {recipe.name}

{recipe.summary}
It is small enough to be tried on any machine, and made to be taken apart: its twelve kinds of problem
need different computations, so that removing one module hurts them differently.

```
{example.text.rstrip()}
```

## Model

- {recipe.model_type}, {config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]},
  MLP {config["intermediate_size"]}, {config["num_attention_heads"]} attention heads,
  {config["num_key_value_heads"]} key-value heads, {config["max_position_embeddings"]} positions.
- {figures.parameters:,} parameters in bf16, {figures.size:,} bytes.
- The tokenizer knows the world's words; digits and other letters are one token each.
  Padding is on the left.
- Generation ends with `<eos>` or with the end of the line.

## Data and training

- Generated text (`sparing.worlds.arithmetic`), nothing else. Problems are split by a hash of what they
  are: 90% train, 5% validation, 5% test. A sum that is held out is held out in both orders and of `add`,
  `columns` and one-step `story` alike. Steps are not split: single-digit sums, and sums and differences of the
  size of two-step stories (below 100), may have been seen as a step of another problem.
- {recipe.steps:,} steps of {recipe.batch * recipe.length:,} tokens,
  {recipe.steps * recipe.batch * recipe.length:,} tokens in all; seed {seed}.
- AdamW, peak learning rate {recipe.lr:g}, {recipe.warmup} steps of warm-up, then cosine to zero; weight
  decay {recipe.weight_decay:g}; {in_words(environment)}; tokens of questions weigh
  {recipe.prompt_weight:g} in the loss.
- {figures.seconds / 60:.1f} minutes of wall-clock time on {machine_words(environment)}.

## Figures

Exact match of the final answer, greedy decoding, {per_task} test problems of each kind (seed {TEST_SEED}), with Wilson
95% intervals. Chance is the better of a random answer of the right form and the most frequent answer of
these problems. The last column has right answers and problems by difficulty (digits, items or steps); no
problem is asked twice, so that levels with few different problems weigh less here than in training.

| task | accuracy | 95% interval | chance | by difficulty |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

Loss on what follows `A:`, test problems: {figures.more["loss"]:.4f} nats per token.

## Limits

It has seen the forms of its world and nothing else; other wording, longer lists and larger numbers were neither
trained nor measured. One seed; no claim about larger
models follows from it.

Licence: Apache-2.0, for weights and data alike.
"""
