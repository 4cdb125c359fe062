"""Seconds and bytes of a policy, with the stock model in turns on the same machine."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from sparing.evaluate.checkup.findings import Finding
from sparing.evaluate.checkup.probe import Probe
from sparing.evaluate.checkup.subjects import Subject
from sparing.evaluate.memory import peak_bytes
from sparing.execute import Run, apply
from sparing.execute.batches import pad_rows
from sparing.plan import Policy
from sparing.tokens import TokenMap

SLOW = 0.95
"""Below this share of the stock model's speed a policy counts as slower: less is noise."""
BATCHES = (1, 4)
"""Rows of the timed batches: the timed prompt, so many times."""
PHASES = ("prefill", "decode")


def check_costs(probe: Probe, subject: Subject, *, seconds: float, steps: int) -> Finding:
    """Speed, bytes of keys and values, and peak memory against the stock model: every setting, at batch 1 and 4.

    Args:
        probe: the model.
        subject: the policy.
        seconds: stop repeating a setting at a batch size after so many.
        steps: decoded tokens.
    """
    timed: list[dict[str, Any]] = []
    full = ""
    for rows in BATCHES:
        for make in subject.make:
            try:
                timed.append(_timed(probe, make(), rows, seconds, steps))
            except torch.OutOfMemoryError:
                full = f"; batch {rows} has no room on this device"
    if not timed:
        raise torch.OutOfMemoryError("the timed prompt has no room on this device")
    first = timed[0]
    numbers = {"prompt": int(probe.inputs.timed["input_ids"].shape[1]), "steps": steps, **first, "runs": timed}
    ours = [run for run in timed if run["policy"] == first["policy"]]
    # What is short-lived weighs most at the larger batch.
    numbers["peak"] = ours[-1]["peak"]
    said = "; ".join(
        f"batch {run['batch']}: prefill {run['prefill']:.2f}× the stock speed (operations alone: {run['prefill_by_count']:.2f}×), "
        f"decode {run['decode']:.2f}× ({run['decode_by_count']:.2f}×), {run['tokens_per_second']:.0f} tokens/s"
        for run in ours
    )
    sentence = (
        f"{said[:1].upper()}{said[1:]}{full}. Keys and values take {first['kv']:.0%} of the bytes, "
        f"the peak beyond the weights is {numbers['peak']:.0%} of stock's at batch {ours[-1]['batch']}."
    )
    slow = {phase: [str(run["batch"]) for run in ours if run[phase] < SLOW] for phase in PHASES}
    if any(slow.values()):
        where = " and ".join(f"{phase} at batch {' and '.join(rows)}" for phase, rows in slow.items() if rows)
        cure = (
            f"{where} slower than stock on this machine: use it where memory or longer prompts pay, "
            "or time it on a larger model and batch"
        )
        return Finding("speed and memory", "slow", sentence, numbers, cure)
    return Finding("speed and memory", "ok", sentence, numbers)


def _timed(probe: Probe, policy: Policy, rows: int, seconds: float, steps: int) -> dict[str, Any]:
    """One setting at one batch size, in turns with the stock model."""
    prompt = _prompt(probe, rows)
    axes = TokenMap.from_inputs(probe.model, prompt).position_ids
    once = functools.partial(_once, probe, prompt, axes)
    taken: dict[str, list[tuple[float, float]]] = {"stock": [], "policy": []}
    counted: dict[str, float] = {}
    begun, repeat = time.perf_counter(), 0
    # The first repeat warms up; the arms take turns, each going first every other time.
    while repeat < 4 or (repeat < 24 and time.perf_counter() - begun < seconds):
        for arm in ("stock", "policy")[:: 1 if repeat % 2 else -1]:
            context: Any = apply(probe.model, policy) if arm == "policy" else contextlib.nullcontext()
            with context as run:
                took = once(steps)
            if repeat:
                taken[arm].append(took)
            elif run is not None:
                counted = _counts(run)
        repeat += 1
    device = prompt["input_ids"].device
    if (key := (rows, steps)) not in probe.peaks:
        probe.peaks[key] = peak_bytes(lambda: once(2), device)
    with apply(probe.model, policy):
        peak = peak_bytes(lambda: once(2), device)
    middle = {arm: [statistics.median(row[i] for row in taken[arm]) for i in (0, 1)] for arm in taken}
    return {
        "policy": repr(policy),
        "batch": rows,
        "repeats": repeat - 1,
        **{phase: middle["stock"][i] / middle["policy"][i] for i, phase in enumerate(PHASES)},
        "tokens_per_second": rows * steps / middle["policy"][1],
        **counted,
        "peak": peak / max(probe.peaks[key], 1),
    }


def _prompt(probe: Probe, rows: int) -> Mapping[str, Any]:
    """The timed prompt, so many times in a batch."""
    batch = pad_rows(probe.model, [probe.inputs.timed] * rows, "left")
    return {name: value for name, value in batch.items() if name != "position_ids"}


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


def _once(probe: Probe, prompt: Mapping[str, Any], axes: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of one prefill and of the steps after it."""
    fed, mask = prompt["input_ids"][:, -1:], prompt["attention_mask"]
    start = _now(fed.device)
    out: Any = probe.model(**prompt, use_cache=True, logits_to_keep=1)
    middle = _now(fed.device)
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
        known: dict[str, Any] = {}
        if axes.ndim == 3:
            # Stock models with positions of several axes lose them on a step with a mask alone.
            known["position_ids"] = (axes.amax(dim=(0, 2))[:, None] + 1 + step).expand(len(axes), -1, -1)
        out = probe.model(
            input_ids=fed, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **known
        )
    return middle - start, _now(fed.device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
