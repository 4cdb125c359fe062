"""From a router's logits to gates: deterministic, sampled, or sampled with a straight-through gradient."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def logits_of(router: nn.Module, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t n"]:
    """A router's logits in fp32, whatever the model computes in."""
    with torch.autocast(x.device.type, enabled=False):
        return router(x.to(next(router.parameters()).dtype)).float()


def gumbel(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Float[Tensor, ...]:
    """Standard Gumbel noise in fp32, drawn where the generator lives."""
    noise = torch.empty(shape, device=device if generator is None else generator.device)
    noise.exponential_(generator=generator)
    return -noise.clamp_min(torch.finfo(noise.dtype).tiny).log().to(device)


def choose(advantage: Float[Tensor, "b t"], threshold: float = 0.5) -> Bool[Tensor, "b t"]:
    """Execute where P(execute) >= threshold; 0.5 is the argmax, ties execute.

    `advantage` is the logit of executing minus that of skipping.
    """
    if threshold in (0, 1):
        return torch.full_like(advantage, threshold == 0, dtype=torch.bool)
    return advantage >= math.log(threshold / (1 - threshold))


def sample(
    advantage: Float[Tensor, "b t"], temperature: float, generator: torch.Generator | None
) -> tuple[Bool[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Gumbel-softmax over (execute, skip): the hard choice, and a gate of 0 and 1 with the soft one's gradient.

    Of two classes only the difference counts, so the softmax is a sigmoid of it.
    """
    noise = gumbel((2, *advantage.shape), advantage.device, generator)
    soft = ((advantage + noise[0] - noise[1]) / temperature).sigmoid()
    chosen = advantage + noise[0] - noise[1] >= 0
    # soft - soft is exactly 0, so the gate is exactly 0 or 1.
    return chosen, chosen.to(soft.dtype) + (soft - soft.detach())


def mean_gate(gate: Float[Tensor, "b t"], alive: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
    """The mean of a gate over tokens that are neither padding nor dropped."""
    return (gate * alive).sum() / alive.sum().clamp(min=1)


def linear(inputs: int, outputs: int, gain: str | None = None) -> nn.Linear:
    """A layer of a router; with `gain` initialised as He et al. do for that nonlinearity, with zero bias."""
    layer = nn.Linear(inputs, outputs)
    if gain is not None:
        nn.init.kaiming_uniform_(layer.weight, nonlinearity=gain)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)
    return layer


def matrix_flops(router: nn.Module) -> int:
    """Operations of one row through a router's matrices."""
    return sum(2 * m.in_features * m.out_features for m in router.modules() if isinstance(m, nn.Linear))


def sizes(model: nn.Module) -> tuple[int, int]:
    """Width of the residual stream and number of layers of a Hugging Face model."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return config.hidden_size, config.num_hidden_layers


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: accelerate leaves offloaded weights on `meta`, and its hooks know where they go."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def check_probability(value: float, what: str) -> None:
    """Raise `ValueError` unless 0 <= value <= 1."""
    if not 0 <= value <= 1 or math.isnan(value):
        raise ValueError(f"{what}={value}: expected a number between 0 and 1")


def check_sizes(owner: str, routers: tuple[int, int], model: tuple[int, int]) -> None:
    """Raise `ValueError` unless routers fit the model: (hidden, depth) of both."""
    if routers != model:
        raise ValueError(
            f"{owner}: the routers are for {routers[1]} layers of width {routers[0]}, "
            f"the model has {model[1]} of width {model[0]}: build them with {owner}.for_model(model)"
        )
