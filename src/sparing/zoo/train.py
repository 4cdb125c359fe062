"""Trains a zoo model from its recipe, on the CPU in half an hour, resumable at any step."""

import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sparing.worlds import arithmetic
from sparing.worlds.vocabulary import word_tokenizer
from sparing.zoo.recipe import Recipe

LOG = "log.jsonl"
FINAL = "final"


class Batches(Dataset):
    """The batches of a run; batch i depends on the seed and on i alone, so that a resumed run sees the same.

    A row is a run of documents, `<bos>` problems `<eos>`, cut at its length. Attention crosses documents.
    Each batch has `input_ids` [b t] and `weights` [b t], the weight of each token in the loss.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int):
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


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Builds the tokenizer of the recipe's world."""
    return word_tokenizer(arithmetic.WORDS, arithmetic.MARKERS, recipe.config["max_position_embeddings"])


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
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


def train(
    recipe: Recipe,
    out: Path,
    *,
    seed: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    fresh: bool = False,
    checkpoint_every: int = 250,
    bar: bool = True,
) -> Path:
    """Trains the recipe, or goes on from the last whole checkpoint in `out`.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint. A run that was interrupted and
    resumed gives the same weights, bit for bit, as one that was not (same machine, device and threads).

    Args:
        recipe: what to train.
        out: folder of checkpoints, the log `log.jsonl` and the result `final/`.
        seed: of weights and data; the recipe's by default.
        device: `cpu` or `cuda`.
        threads: CPU threads; PyTorch's choice by default.
        fresh: start again although `out` holds checkpoints.
        checkpoint_every: steps between checkpoints.
        bar: show a progress bar.

    Returns:
        The folder of the trained model: weights in bf16, config and tokenizer.

    Raises:
        KeyboardInterrupt: the run was ended before its last step.
        ValueError: `out` holds a run of another recipe or seed.
    """
    seed = recipe.seed if seed is None else seed
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
    checkpoint = _last_checkpoint(out)
    _claim(out, recipe, seed, resuming=checkpoint is not None)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer, seed)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a batch already
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=device == "cpu",
        seed=seed,
        # Rows are random already; in order, the position in the data is the step and nothing else.
        train_sampling_strategy="sequential",
        save_steps=checkpoint_every,
        save_total_limit=2,
        logging_steps=min(20, max(1, recipe.steps // 8)),
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=not bar,
    )
    log = _JsonLog(out / LOG, kept=_step(checkpoint) if checkpoint else 0)
    trainer = _WeightedTrainer(
        model=model,
        args=arguments,
        train_dataset=Batches(recipe, tokenizer, seed),
        data_collator=itemgetter(0),
        callbacks=[log],
    )
    with _stop_on_signal(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < recipe.steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {recipe.steps}; run again to go on")
    # The Trainer turns the cache off in the config; saved so, every caller would have to turn it on again.
    model.config.use_cache = True
    model.bfloat16().save_pretrained(out / FINAL)
    tokenizer.save_pretrained(out / FINAL)
    return out / FINAL


def weighted_loss(
    logits: Float[Tensor, "b t v"], input_ids: Int[Tensor, "b t"], weights: Float[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Returns the weighted mean of the next-token cross-entropy, in nats; `weights` belong to the targets."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    )
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


class _WeightedTrainer(Trainer):
    """A Trainer whose rows say what each token weighs."""

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        loss = weighted_loss(outputs.logits, inputs["input_ids"], inputs["weights"])
        return (loss, outputs) if return_outputs else loss


class _JsonLog(TrainerCallback):
    """Appends what the Trainer logs to a file, one JSON object a line."""

    def __init__(self, path: Path, kept: int):
        self.path = path
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        # Steps after the checkpoint are run again; kept, they would stand in the log twice.
        entries = [entry for entry in entries if entry["step"] <= kept]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        self.began = time.monotonic() - (entries[-1]["seconds"] if entries else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            seconds = round(time.monotonic() - self.began, 1)
            file.write(json.dumps({"step": state.global_step, "seconds": seconds, **(logs or {})}) + "\n")


@contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Turns the first Ctrl-C or SIGTERM into a checkpoint and an orderly end after the current step."""

    class Stop(TrainerCallback):
        asked = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.asked:
                control.should_save = control.should_training_stop = True

    stop = Stop()
    trainer.add_callback(stop)

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        # The second one ends the process as usual.
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _last_checkpoint(out: Path) -> Path | None:
    # The Trainer writes its state last; a folder without it was cut off while being written.
    whole = [state.parent for state in out.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step, default=None)


def _claim(out: Path, recipe: Recipe, seed: int, *, resuming: bool) -> None:
    """Writes down what runs in the folder, or checks that it is the same run."""
    mine = json.loads(json.dumps({**vars(recipe), "config": dict(recipe.config), "seed": seed}))
    path = out / "recipe.json"
    if resuming and json.loads(path.read_text()) != mine:
        raise ValueError(f"{out} holds another run (see {path}); choose another folder, or start again with --fresh")
    path.write_text(json.dumps(mine, indent=2) + "\n")
