"""Where a training from scratch begins: another text model's weights in the decoder, a projector that knows nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparing.anatomy import anatomy_of


@torch.no_grad()
def take_language(model: nn.Module, text_model: nn.Module) -> None:
    """Put a text model's weights into a vision model's decoder and output matrix, as LLaVA begins with Vicuna's.

    Words that the vision model has in addition (its picture token, rows added for size) keep their own vectors.

    Args:
        model: a Hugging Face vision-language model of a known family.
        text_model: a text model with the same decoder.

    Raises:
        ValueError: the decoders are not alike.
    """
    ours, theirs = anatomy_of(model), anatomy_of(text_model)
    for mine, other in ((ours.decoder, theirs.decoder), (ours.lm_head, theirs.lm_head)):
        own, given = dict(mine.named_parameters()), dict(other.named_parameters())
        if strange := sorted(own.keys() ^ given.keys()):
            raise ValueError(f"the text model's decoder is another one: {strange[0]} is in one of them only")
        for name, weight in own.items():
            words = len(weight) >= len(given[name]) and weight.shape[1:] == given[name].shape[1:]
            vocabulary = name.startswith("embed_tokens") or mine is ours.lm_head
            if weight.shape != given[name].shape and not (vocabulary and words):
                raise ValueError(
                    f"the text model's {name} has shape {tuple(given[name].shape)}, this decoder's {tuple(weight.shape)}: take one "
                    "of the same size"
                )
            weight[: len(given[name])] = given[name].to(weight)


@torch.no_grad()
def forget_projector(model: nn.Module, seed: int) -> None:
    """Draw the projector's weights anew, as PyTorch does for new layers.

    Raises:
        ValueError: the model has no projector.
    """
    anatomy = anatomy_of(model)
    if not anatomy.projector:
        raise ValueError(f"{anatomy.config.model_type} has no projector: it reads text alone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in anatomy.projector:
            for part in module.modules():
                reset: Any = getattr(part, "reset_parameters", None)
                if reset is not None:
                    reset()
