"""What a lens reads where there is nothing to read: random vectors, patches in the wrong place, a projector that learnt nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.lens.record import Recording

Kind = TypeVar("Kind", Tensor, Recording)


def norm_matched(states: Kind, seed: int) -> Kind:
    """Random vectors with the norms of the given ones: directions uniform on the sphere.

    Args:
        states: `[... d]`, or a recording whose states are replaced (what lies between attention and MLP is left out).
        seed: of the directions.

    Returns:
        As given, in the precision given.
    """
    if isinstance(states, Recording):
        return dataclasses.replace(states, states=norm_matched(states.states, seed), middle=None)
    drawn = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)).to(states.device)
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    return (drawn * (norms / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True))).to(states.dtype)


def shuffled(recording: Recording, seed: int, *, between: bool = False) -> Recording:
    """Patches exchanged, the same at every level; other tokens stay.

    Args:
        recording: of image tokens, and perhaps others.
        seed: of the exchange.
        between: `False` exchanges the patches of each picture among themselves: what a picture shows stays, where it shows it does
            not. `True` gives each picture all patches of another one, in place: where patches stand stays, what they show does not.

    Raises:
        ValueError: `between` and fewer than two pictures, or pictures of which not equally many tokens were recorded.
    """
    row, place = recording.index.cpu().T
    pictures = [
        ((row == number) & (place >= span.start) & (place < span.stop)).nonzero().flatten()
        for number, spans in enumerate(recording.tokens.images)
        for span in spans
    ]
    pictures = [picture for picture in pictures if len(picture)]
    generator = torch.Generator().manual_seed(seed)
    source = torch.arange(len(row))
    if not between:
        for picture in pictures:
            source[picture] = picture[torch.randperm(len(picture), generator=generator)]
    elif pictures:
        sizes = sorted({len(picture) for picture in pictures})
        if len(pictures) < 2 or len(sizes) > 1:
            raise ValueError(
                f"patches go between two pictures or more of one size; recorded are {len(pictures)} of {sizes} tokens: "
                "record more pictures scaled to one size, or use between=False"
            )
        # A random cycle: no picture keeps its own.
        order = torch.randperm(len(pictures), generator=generator).tolist()
        for one, other in zip(order, order[1:] + order[:1], strict=True):
            source[pictures[one]] = pictures[other]
    source = source.to(recording.states.device)
    middle = None if recording.middle is None else recording.middle[:, source]
    return dataclasses.replace(recording, states=recording.states[:, source], middle=middle)


@contextlib.contextmanager
def untrained_projector(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """The model with a projector that has learnt nothing; its own weights are back afterwards, bit for bit, errors or not.

    Each parameter of the projector (mergers, and those of features that are added between layers, included) has its entries drawn anew
    without replacement from its own: the sizes of weights stay, and with them about the norms of visual tokens, but no structure.

    Args:
        model: a Hugging Face vision-language model of a known family.
        seed: of the exchange.

    Raises:
        ValueError: a model without a projector, or one whose weights are not in memory.

    Differs: from a fresh initialisation, which would give visual tokens another norm; that alone changes what later layers make
        of them.
    """
    anatomy = anatomy_of(model)
    if not anatomy.projector:
        raise ValueError(f"{anatomy.config.model_type} has no projector: it reads text alone")
    weights: list[Tensor] = [weight for module in anatomy.projector for weight in module.parameters()]
    if any(weight.is_meta for weight in weights):
        raise ValueError("the projector's weights are offloaded: load the model without offloading its projector")
    own = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for weight in weights:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
        yield model
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, own, strict=True):
                weight.copy_(before)
