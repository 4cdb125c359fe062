"""`Course`: what the training frame has to know of a model and its data."""

import abc
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from sparing.zoo.recipe import Recipe


class Course(abc.ABC):
    """One recipe made ready to run: the model with fresh weights, its data and its loss.

    Attributes:
        recipe: what is run.
        seed: of weights and data.
        processor: the model's tokenizer, or its processor if it sees pictures.
        model: the Hugging Face model, fp32.
        trained: what the Trainer trains and its checkpoints hold: the model, and whatever only training needs.
        mixed: whether it trains under bf16 autocast.
        batches: item i is the batch of step i, and follows from the seed and i alone.
    """

    recipe: Recipe
    seed: int
    processor: Any
    model: Any
    trained: nn.Module
    batches: Dataset
    mixed: bool = True

    @abc.abstractmethod
    def loss(self, trained: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The loss of a batch; `trained` may be wrapped by the Trainer."""

    def watch(self, step: int) -> dict[str, float]:
        """Figures on validation data after a step, for the log; none by default."""
        return {}

    def save(self, folder: Path) -> None:
        """Saves the model as it is shipped: weights in bf16, config, tokenizer or processor."""
        # The Trainer turns the cache off in the config; saved so, every caller would have to turn it on again.
        self.model.config.get_text_config().use_cache = True
        self.model.bfloat16().save_pretrained(folder)
        self.processor.save_pretrained(folder)
