"""Which parameters of a model are trained: whole parts of it, or low-rank adapters on the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn

from sparing.anatomy import anatomy_of

Part = Literal["projector", "language", "encoder"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (PEFT) on every matrix of the language model's layers, in place of its weights.

    Attributes:
        rank: of the adapters.
        alpha: they count `alpha / rank` times.
        dropout: on their input.

    Paper: LoRA (2106.09685).
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one of them is out of range.
        """
        if self.rank < 1 or self.alpha < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"{self}: expected a rank and an alpha of at least 1, and a dropout from 0 to below 1")


def trained_parts(model: nn.Module, parts: Sequence[Part], lora: Lora | None = None) -> nn.Module:
    """Let some parts of a model ask for gradients, and no others.

    Args:
        model: a Hugging Face model of a known family.
        parts: `projector` (mergers too), `language` (the decoder and the output matrix), `encoder` (the vision encoder).
        lora: train adapters on the language model instead of its weights; the other parts are trained as they are.

    Returns:
        The model, wrapped by PEFT where adapters are trained: `merged` gives it back.

    Raises:
        ValueError: no part, an unknown one, one that this model lacks, or adapters without the language model.
        ModuleNotFoundError: adapters were asked for, and PEFT is not installed.
    """
    anatomy = anatomy_of(model)
    if not parts or (strange := [part for part in parts if part not in PARTS]):
        raise ValueError(f"trained are {', '.join(PARTS)}, at least one of them; got {strange[0] if parts else 'none'}")
    if anatomy.vision_encoder is None and (lacking := [part for part in parts if part != "language"]):
        raise ValueError(f"{anatomy.config.model_type} reads text alone and has no {lacking[0]}: train language")
    if lora is not None and "language" not in parts:
        raise ValueError(f"adapters are for the language model, and only {', '.join(parts)} is trained: leave them out")
    modules: dict[str, Sequence[Any]] = {
        # First: a merger may lie inside the encoder.
        "encoder": (anatomy.vision_encoder,),
        "projector": anatomy.projector,
        "language": (anatomy.decoder, anatomy.lm_head),
    }
    wrapped = model
    if lora is not None:
        import peft

        inside = {id(module) for layer in anatomy.layers for module in layer.modules() if isinstance(module, nn.Linear)}
        names = [name for name, module in model.named_modules() if id(module) in inside]
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
        wrapped = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    else:
        model.requires_grad_(False)
    for name, found in modules.items():
        if name == "language" and lora is not None:
            continue
        for module in found:
            if module is not None and (name in parts or name == "projector"):
                module.requires_grad_(name in parts)
    return wrapped


def merged(model: Any) -> nn.Module:
    """The model without its adapters, which are added to its weights; as it is where there are none."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
