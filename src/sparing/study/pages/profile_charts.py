"""Geometry of the report's charts: numbers in, coordinates out. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Added losses below this (nats a token) look like none: the colour scale is linear up to here and logarithmic above.
QUIET = 0.02


def intensity(value: float, most: float) -> float:
    """How strong a colour shows an added loss, in percent; negative where the loss went down."""
    if not math.isfinite(value):
        return 100.0
    strength = math.log1p(abs(value) / QUIET) / math.log1p(max(most, QUIET) / QUIET)
    return round(math.copysign(100 * min(1.0, strength), value), 1)


def nats(value: float) -> str:
    """A signed loss in as few digits as tell it apart."""
    if abs(value) < 0.0005:
        return "0"
    digits = 3 if abs(value) < 0.095 else 2 if abs(value) < 9.95 else 1
    return f"{value:+.{digits}f}".replace("-", "−")


def heat_map(
    rows: Mapping[str, Mapping[int, float]], outlined: Mapping[str, set[int]], *, most: float
) -> dict[str, Any]:
    """Rows of added losses over layers.

    Args:
        rows: name -> layer -> nats.
        outlined: name -> layers to outline.
        most: the loss of the strongest colour.
    """
    layers = sorted({layer for values in rows.values() for layer in values})
    width = max(30, min(72, round(880 / len(layers))))
    height, left, top = 40, 92, 24
    cells = [
        {
            "row": name,
            "layer": layer,
            "x": left + i * width,
            "y": top + j * height,
            "label": nats(values[layer]) if width >= 44 else "",
            "value": nats(values[layer]),
            "heat": intensity(values[layer], most),
            "outlined": layer in outlined.get(name, set()),
        }
        for j, (name, values) in enumerate(rows.items())
        for i, layer in enumerate(layers)
        if layer in values
    ]
    return {
        "width": left + len(layers) * width + 4,
        "height": top + len(rows) * height + 4,
        "cell": (width - 3, height - 3),
        "cells": cells,
        "columns": [{"x": left + i * width + (width - 3) / 2, "label": layer} for i, layer in enumerate(layers)],
        "rows": [{"y": top + j * height + (height - 3) / 2, "label": name} for j, name in enumerate(rows)],
    }


def legend(most: float) -> list[dict[str, Any]]:
    """Swatches of the colour scale."""
    marks = [-QUIET, 0.0] + [v for v in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0) if v < most]
    return [{"label": nats(v), "heat": intensity(v, most)} for v in marks]


def pareto(
    path: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]], budget: float, dense: float
) -> dict[str, Any]:
    """Loss over the share of operations: the path on both splits, and the random plans."""
    width, height, left, right, top, bottom = 880, 360, 56, 20, 16, 44
    points = [*path, *controls]
    losses = [p[split] for p in points for split in ("loss", "held_out")]
    low, high = min([dense, *losses]) * 0.97, max([dense, *losses]) * 1.05
    first = min([budget, *(p["flops_ratio"] for p in points)]) - 0.03

    def x(ratio: float) -> float:
        return round(left + (1 - ratio) / (1 - first) * (width - left - right), 1)

    def y(loss: float) -> float:
        return round(top + math.log(high / loss) / math.log(high / low) * (height - top - bottom), 1)

    def place(p: Mapping[str, Any], split: str) -> dict[str, Any]:
        return {"x": x(p["flops_ratio"]), "y": y(p[split]), "point": p}

    step = 0.1 if first < 0.85 else 0.05 if first < 0.95 else 0.01
    ratios = [1 - i * step for i in range(int((1 - first) / step + 1e-9) + 1)]
    return {
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "top": top,
        "bottom": height - bottom,
        "held_out": [place(p, "held_out") for p in path],
        "chosen_on": [place(p, "loss") for p in path],
        "controls": [place(p, "held_out") for p in controls],
        "budget": x(budget),
        "dense": y(dense),
        "x_ticks": [{"x": x(r), "label": f"{100 * r:.0f}%"} for r in ratios],
        "y_ticks": [{"y": y(v), "label": f"{v:g}"} for v in _ticks(low, high)],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two losses, about equally far apart on a logarithmic scale."""
    for steps in (
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        tuple(1 + i / 10 for i in range(90)),
        tuple(1 + i / 50 for i in range(450)),
    ):
        found = [m * 10.0**e for e in range(-3, 4) for m in steps if low <= m * 10.0**e <= high]
        if len(found) >= 4:
            break
    # Thinned out, so that labels do not touch.
    kept: list[float] = []
    for value in sorted(set(found)):
        if not kept or math.log(value / kept[-1]) > math.log(high / low) / 14:
            kept.append(round(value, 6))
    return kept


def bars(flops: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """Operations by part, dense and planned, as shares of all dense operations; empty parts are left out."""
    total = sum(flops["dense"].values())
    return [
        {
            "part": part,
            "dense": flops["dense"][part],
            "planned": flops["planned"][part],
            "dense_share": flops["dense"][part] / total,
            "planned_share": flops["planned"][part] / total,
        }
        for part in flops["dense"]
        if flops["dense"][part] or flops["planned"][part]
    ]


def speeds(timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measured speed-ups with what operations alone predict, prefill and decode of every batch size."""
    found = []
    for timing in timings:
        dense, planned = timing["prefill"]["dense"], timing["prefill"]["planned"]
        found.append(
            {
                "phase": "prefill",
                "batch": timing["batch"],
                "what": f"{timing['prompt']} tokens",
                "unit": "ms",
                "dense": [1e3 * s for s in dense],
                "planned": [1e3 * s for s in planned],
                "factor": dense[0] / planned[0],
                "predicted": 1 / max(timing["prefill_flops"], 1e-9),
            }
        )
        dense, planned = timing["decode"]["dense"], timing["decode"]["planned"]
        found.append(
            {
                "phase": "decode",
                "batch": timing["batch"],
                "what": f"{timing['steps']} steps",
                "unit": "tokens/s",
                "dense": list(dense),
                "planned": list(planned),
                "factor": planned[0] / dense[0],
                "predicted": 1 / max(timing["decode_flops"], 1e-9),
            }
        )
    return found
