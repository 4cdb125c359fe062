"""Measured seconds of prefill and decode, dense and planned in turns, with what the operations promise."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparing.evaluate.memory import peak_bytes
from sparing.execute import Run
from sparing.tokens import TokenMap

Arm = Callable[[], AbstractContextManager[Run | None]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of both arms at one batch size. Medians; the slowest and fastest repeat beside them.

    Attributes:
        batch: rows.
        prompt: tokens of a row's prompt.
        steps: cached single-token steps after it.
        repeats: measured repeats of each arm, the arms in turns.
        prefill: seconds of the prompt with `logits_to_keep=1`: arm -> (median, fastest, slowest).
        decode: tokens a second over the cached steps, all rows together: arm -> (median, slowest, fastest).
        prefill_flops: operations planned over dense, in the timed pass: the share of time to expect at best.
        decode_flops: the same in the timed steps.
        kv_bytes: keys and values at the end: arm -> bytes.
        peak_bytes: the most memory that a prefill holds beyond the weights: arm -> bytes.
        samples: seconds of every repeat: arm -> (prefill, decode) each, in the order in which they were taken.
    """

    batch: int
    prompt: int
    steps: int
    repeats: int
    prefill: dict[str, tuple[float, float, float]]
    decode: dict[str, tuple[float, float, float]]
    prefill_flops: float
    decode_flops: float
    kv_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    samples: dict[str, list[tuple[float, float]]]


@torch.inference_mode()
def time_arms(
    model: nn.Module,
    planned: Callable[[], AbstractContextManager[Run]],
    ids: Int[Tensor, "b t"],
    *,
    steps: int,
    repeats: int,
) -> Timing:
    """Time the stock model and the planned one in turns.

    Args:
        model: a Hugging Face model.
        planned: makes the context in which the plan holds.
        ids: prompts of one length, followed by the tokens that the steps are fed: both arms do the same work.
        steps: cached single-token steps.
        repeats: measured repeats; one more warms up.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids = ids.to(device)
    prompt, fed = ids[:, : ids.shape[1] - steps], ids[:, ids.shape[1] - steps :]
    return time_prompts(model, planned, {"input_ids": prompt}, fed, repeats=repeats)


@torch.inference_mode()
def time_prompts(
    model: nn.Module,
    planned: Callable[[], AbstractContextManager[Run]],
    prompt: Mapping[str, Any],
    fed: Int[Tensor, "b steps"],
    *,
    repeats: int,
) -> Timing:
    """Time the stock model and the planned one in turns on any inputs, pictures too.

    Args:
        model: a Hugging Face model.
        planned: makes the context in which the plan holds.
        prompt: inputs of rows of one length, without padding, on the model's device.
        fed: the tokens that the steps are fed.
        repeats: measured repeats; one more warms up.
    """
    device, (batch, length), steps = fed.device, prompt["input_ids"].shape, fed.shape[1]
    axes = TokenMap.from_inputs(model, prompt).position_ids
    after = (axes.amax(dim=(0, 2))[:, None] + 1).expand(len(axes), -1, -1) if axes.ndim == 3 else None
    arms: Mapping[str, Arm] = {"dense": contextlib.nullcontext, "planned": planned}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    ratios, kv = (1.0, 1.0), dict.fromkeys(arms, 0)
    for repeat in range(repeats + 1):
        # The order turns around, so that neither arm always runs on the caches that the other one left.
        for name in list(arms)[:: 1 if repeat % 2 else -1]:
            with arms[name]() as run:
                took = _once(model, prompt, fed, after)
                if repeat:
                    seconds[name].append(took)
                if run is not None and not repeat:
                    cost, full = run.ledger.cost(), run.ledger.dense_cost()
                    ratios = cost.prefill.total / full.prefill.total, cost.decode.total / max(full.decode.total, 1)
                    kv = {"dense": full.kv_bytes, "planned": cost.kv_bytes}
    rate = batch * steps
    return Timing(
        batch=batch,
        prompt=length,
        steps=steps,
        repeats=repeats,
        prefill={name: _spread([s for s, _ in taken]) for name, taken in seconds.items()},
        decode={name: _spread([rate / s for _, s in taken]) for name, taken in seconds.items()},
        prefill_flops=ratios[0],
        decode_flops=ratios[1],
        kv_bytes=kv,
        peak_bytes={name: _peak(model, arm, prompt, device) for name, arm in arms.items()},
        samples=seconds,
    )


def _once(
    model: nn.Module, prompt: Mapping[str, Any], fed: Tensor, after: Int[Tensor, "axes b one"] | None
) -> tuple[float, float]:
    """Seconds of one prefill and of the steps after it."""
    start = _now(fed.device)
    out: Any = model(**prompt, use_cache=True, logits_to_keep=1)
    middle = _now(fed.device)
    cache = out.past_key_values
    for step in range(fed.shape[1]):
        # Stock models with positions of several axes lose them on a step by itself.
        known = {} if after is None else {"position_ids": after + step}
        cache = model(input_ids=fed[:, step : step + 1], past_key_values=cache, use_cache=True, **known).past_key_values
    return middle - start, _now(fed.device) - middle


def _peak(model: nn.Module, arm: Arm, prompt: Mapping[str, Any], device: torch.device) -> int:
    with arm():
        return peak_bytes(lambda: model(**prompt, use_cache=True, logits_to_keep=1), device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)
