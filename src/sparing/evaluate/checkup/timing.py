"""Seconds and bytes of a policy, with the stock model in turns on the same machine."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch

from sparing.evaluate.checkup.findings import Finding
from sparing.evaluate.checkup.probe import Probe
from sparing.evaluate.checkup.subjects import Subject
from sparing.execute import Run, apply
from sparing.tokens import TokenMap

SLOW = 0.95
"""Below this share of the stock model's speed a policy counts as slower: less is noise."""


def check_costs(probe: Probe, subject: Subject, *, seconds: float, steps: int) -> Finding:
    """Speed, bytes of keys and values, and peak memory against the stock model, at batch 1.

    Args:
        probe: the model.
        subject: the policy; its first setting is timed.
        seconds: stop repeating after so many.
        steps: decoded tokens.
    """
    policy, taken, peaks = subject.make[0](), {"stock": [], "policy": []}, {"stock": 0, "policy": 0}
    device = probe.inputs.timed["input_ids"].device
    counted: dict[str, float] = {}
    begun, repeat = time.perf_counter(), 0
    # The first repeat warms up; the arms take turns, each going first every other time.
    while repeat < 4 or (repeat < 24 and time.perf_counter() - begun < seconds):
        for arm in ("stock", "policy")[:: 1 if repeat % 2 else -1]:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            context: Any = apply(probe.model, policy) if arm == "policy" else contextlib.nullcontext()
            with context as run:
                took = _once(probe, steps, device)
            if device.type == "cuda":
                peaks[arm] = torch.cuda.max_memory_allocated(device)
            if repeat:
                taken[arm].append(took)
            elif run is not None:
                counted = _counts(run)
        repeat += 1
    prefill, decode = (
        statistics.median(row[i] for row in taken["stock"]) / statistics.median(row[i] for row in taken["policy"])
        for i in (0, 1)
    )
    rate = steps / statistics.median(row[1] for row in taken["policy"])
    numbers: dict[str, Any] = {
        "prompt": int(probe.inputs.timed["input_ids"].shape[1]),
        "steps": steps,
        "repeats": repeat - 1,
        "prefill": prefill,
        "decode": decode,
        "tokens_per_second": rate,
        **counted,
        "peak": peaks["policy"] / peaks["stock"] if peaks["stock"] else None,
    }
    peak = f", peak memory {numbers['peak']:.0%}" if numbers["peak"] else ""
    slow = [name for name, ratio in (("prefill", prefill), ("decode", decode)) if ratio < SLOW]
    sentence = (
        f"Prefill {prefill:.2f}× the stock speed (operations alone: {counted['prefill_by_count']:.2f}×), "
        f"decode {decode:.2f}× ({counted['decode_by_count']:.2f}×), {rate:.0f} tokens/s; "
        f"keys and values {counted['kv']:.0%} of the bytes{peak}."
    )
    if slow:
        cure = (
            f"{' and '.join(slow)} slower than stock on this machine: use it where memory or longer prompts pay, "
            "or time it on a larger model and batch"
        )
        return Finding("speed and memory", "slow", sentence, numbers, cure)
    return Finding("speed and memory", "ok", sentence, numbers)


def _counts(run: Run) -> dict[str, float]:
    """What the operations and keys alone promise."""
    cost, full = run.ledger.cost(), run.ledger.dense_cost()
    return {
        "prefill_by_count": full.prefill.total / max(cost.prefill.total, 1),
        "decode_by_count": full.decode.total / max(cost.decode.total, 1),
        "kv": cost.kv_bytes / max(full.kv_bytes, 1),
        "kv_bytes": cost.kv_bytes,
        "stock_kv_bytes": full.kv_bytes,
    }


def _once(probe: Probe, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds of one prefill and of the steps after it."""
    prompt = {name: value for name, value in probe.inputs.timed.items() if name != "position_ids"}
    fed, mask = prompt["input_ids"][:, -1:], prompt["attention_mask"]
    axes = TokenMap.from_inputs(probe.model, prompt).position_ids
    start = _now(device)
    out: Any = probe.model(**prompt, use_cache=True, logits_to_keep=1)
    middle = _now(device)
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        # Stock models with positions of several axes lose them on a step with a mask alone.
        known = (
            {}
            if axes.ndim == 2
            else {"position_ids": (axes.amax(dim=(0, 2))[:, None] + 1 + step).expand(len(axes), -1, -1)}
        )
        out = probe.model(
            input_ids=fed, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **known
        )
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
