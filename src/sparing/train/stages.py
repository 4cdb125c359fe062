"""`train_stages`: a model through one stage of training after the other, under its policies, as LLaVA is trained in two."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from sparing.anatomy import anatomy_of, fingerprint
from sparing.execute import apply
from sparing.plan import Policy
from sparing.train.conversations import Conversation
from sparing.train.fitting import Fit, Optimisation, Progress, fit
from sparing.train.parts import Lora, Part, merged, trained_parts
from sparing.train.turns import ChatBatches

CLAIM = "settings.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        name: of its folder.
        parts: what is trained.
        how: the optimiser's settings.
        conversations: the data.
        source: what the data is, in words; a training that goes on must be on the same.
        max_length: tokens of a row; the model's positions by default.
        lora: adapters in place of the language model's weights.
    """

    name: str
    parts: tuple[Part, ...]
    how: Optimisation
    conversations: Sequence[Conversation]
    source: str
    max_length: int | None = None
    lora: Lora | None = None

    def as_dict(self) -> dict[str, Any]:
        """The settings, for a record."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["conversations"] = len(self.conversations)
        lora = None if self.lora is None else dataclasses.asdict(self.lora)
        return {**fields, "parts": list(self.parts), "how": dataclasses.asdict(self.how), "lora": lora}


def train_stages(
    model: nn.Module,
    processor: Any,
    policies: Sequence[Policy],
    stages: Sequence[Stage],
    folder: Path,
    *,
    seed: int = 0,
    autocast: bool = False,
    execute: str = "gathered",
    save_every: int = 500,
    workers: int = 0,
    on_step: Progress | None = None,
) -> list[Fit]:
    """Train a model under policies, or go on where an earlier run in `folder` was stopped.

    The weights are changed in place, and kept in the precision that they have. Under `gathered` only what the policies plan is
    computed, forward and backward.

    Args:
        model: a Hugging Face vision-language model of a known family, under no policy.
        processor: its own processor.
        policies: what it follows while it is trained; none for the dense model.
        stages: one after the other.
        folder: for checkpoints of unfinished stages and their logs.
        seed: of the data's order and everything else that is random.
        autocast: compute in bfloat16 on weights that are kept as they are.
        execute: the executor.
        save_every: steps between checkpoints.
        workers: processes that prepare batches.
        on_step: is told the share that is done, and a word on it.

    Returns:
        One result a stage.

    Raises:
        KeyboardInterrupt: the training was ended before its last step; the checkpoint is in `folder`.
        ValueError: `folder` holds a training of another model or with other settings; answers that are all cut off; and what `fit`
            refuses.
    """
    _claim(folder, model, policies, stages, {"seed": seed, "autocast": autocast})
    tell = on_step or (lambda done, word: None)
    config = anatomy_of(model).text_config
    caches, found = config.use_cache, []
    try:
        for i, stage in enumerate(stages):
            set_seed(seed)
            trained = trained_parts(model, stage.parts, stage.lora)
            trained.train()
            data = ChatBatches(model, processor, stage.conversations, stage.max_length)
            data.check()

            def forward(done: float, word: str, i: int = i, name: str = stage.name) -> None:
                tell((i + done) / len(stages), f"{name}: {word}")

            with apply(trained, *policies, execute=execute):
                result = fit(
                    trained,
                    data,
                    stage.how,
                    folder / stage.name,
                    collate=data.collate,
                    seed=seed,
                    autocast=autocast,
                    save_every=save_every,
                    workers=workers,
                    on_step=forward,
                )
            merged(trained)
            found.append(result)
    finally:
        config.use_cache = caches
        model.eval().requires_grad_(True)
    return found


def _claim(
    folder: Path, model: nn.Module, policies: Sequence[Policy], stages: Sequence[Stage], settings: dict[str, Any]
) -> None:
    """Writes down what is trained in the folder, or checks that it is the same."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    mine = {
        "model": fingerprint(model),
        "policies": [repr(policy) for policy in policies],
        **settings,
        "stages": [stage.as_dict() for stage in stages],
    }
    mine = json.loads(json.dumps(mine))
    path = folder / CLAIM
    # Without a checkpoint there is nothing to go on with, and other settings harm nothing.
    if path.exists() and any(folder.glob("*/checkpoint-*")):
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}): choose another --out, or remove it if {folder} holds this very training"
            ) from error
        if differ := [key for key, value in mine.items() if before.get(key) != value]:
            what = {"model": "another model", "autocast": "another --dtype"}.get(differ[0], f"other {differ[0]}")
            raise ValueError(f"{folder} holds a training with {what} (see {path}): choose another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{CLAIM}.tmp")
    unfinished.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
