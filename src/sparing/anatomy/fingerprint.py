"""`fingerprint`: which checkpoint a model is, told by its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64
"""Values read of each parameter, evenly spaced."""


def fingerprint_of(model: nn.Module) -> str:
    """A short hash of some values of every parameter: the same wherever a checkpoint lies, another after any training.

    Values are rounded to bfloat16 first, so that a checkpoint has one fingerprint in each precision that holds it: as saved, in
    float32, in bfloat16. (One that was saved in float32 can differ when loaded in float16, which rounds on the way.) Names do not
    count, for versions of transformers change them. Quantised weights and adapters are another model.

    Raises:
        ValueError: weights that are nowhere to be found.
    """
    shapes: list[str] = []
    samples: dict[torch.device, list[Tensor]] = {}
    places: list[tuple[torch.device, int]] = []
    for parameter in _values(model):
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, len(flat) - 1, SAMPLES, device=flat.device, dtype=torch.float64).round().long()
        kept = samples.setdefault(flat.device, [])
        places.append((flat.device, len(kept)))
        shapes.append(str(tuple(parameter.shape)))
        kept.append(flat[at].to(torch.bfloat16).float())
    # One wait a device.
    known = {device: torch.stack(kept).cpu().numpy() for device, kept in samples.items()}
    lines = sorted(
        f"{shape} {known[device][i].tobytes().hex()}" for shape, (device, i) in zip(shapes, places, strict=True)
    )
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=12).hexdigest()


def _values(model: nn.Module) -> Iterator[Tensor]:
    """The floating-point parameters, from where they wait if accelerate has taken them off the device."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if not parameter.is_meta:
            yield parameter
            continue
        where, _, last = name.rpartition(".")
        hook: Any = getattr(model.get_submodule(where), "_hf_hook", None)
        maps = [getattr(h, "weights_map", None) for h in getattr(hook, "hooks", [hook])]
        value = next((m[last] for m in maps if m is not None), None)
        if value is None:
            raise ValueError(f"the weights of {name} are elsewhere, and nothing says where: load the model whole")
        yield value
