"""Geometry of the study's quality-against-cost charts: numbers in, coordinates out. The template draws them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sparing.study.contrast import Value
from sparing.study.fronts import Chart, Front, Point
from sparing.study.pages import numbers

WIDTH, HEIGHT = 880, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 18, 52
# Values of one sign that differ by more than this are drawn on a logarithmic scale.
WIDE = 20
# Of the values' own range: further than this beyond them no interval stretches a scale.
STRETCH = 0.6
LETTER = 6.4
SHAPES = {
    "circle": "M-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z",
    "square": "M-5 -5h10v10h-10z",
    "triangle": "M0 -6.4L6 4.6H-6z",
    "diamond": "M0 -7L7 0L0 7L-7 0z",
    "down": "M0 6.4L6 -4.6H-6z",
    "cross": "M-5 -5l10 10m0 -10l-10 10",
}
FILLED = [name for name in SHAPES if name != "cross"]
COLOURS = 6


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to pixels.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: pixel.
        end: pixel.
        log: is it logarithmic?
    """

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside land on the edge."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if value in (math.inf, -math.inf):
            share = float(value > 0)
        else:
            at = math.log(max(value, self.low)) if self.log else value
            share = min(1.0, max(0.0, (at - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values, four to eight of them."""
        if self.log and self.high / self.low > WIDE:
            found = [m * 10.0**e for e in range(-12, 16) for m in (1, 2, 5) if self.low <= m * 10.0**e <= self.high]
            if len(found) > 8:
                found = [v for v in found if math.isclose(v, 10.0 ** round(math.log10(v)))]
            return found[:: max(1, math.ceil(len(found) / 8))]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale(values: Sequence[Value], start: float, end: float) -> Scale:
    """A scale that holds all values, and their intervals where these are not much wider than the values' own range."""
    points = [value.value for value in values]
    low, high = min(points), max(points)
    ends = [x for v in values for x in (v.low, v.high) if x is not None and math.isfinite(x)]
    log = low > 0 and high / low > WIDE
    if log:
        reach = (high / low) ** STRETCH
        low, high = max(min([low, *(x for x in ends if x > 0)]), low / reach), min(max([high, *ends]), high * reach)
        return Scale(low / (high / low) ** 0.05, high * (high / low) ** 0.05, start, end, log=True)
    spread = (high - low) or abs(high) * 0.1 or 1.0
    low, high = max(min([low, *ends]), low - STRETCH * spread), min(max([high, *ends]), high + STRETCH * spread)
    margin = 0.05 * ((high - low) or spread)
    return Scale(low - margin, high + margin, start, end, log=False)


def styles_of(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """Method and training -> colour and shape; controls are crosses, the baseline a ring."""
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        name = group_of(point)
        if name in found:
            continue
        n = sum(not style["baseline"] and not style["control"] for style in found.values())
        arm = point.arm
        shape = "cross" if arm.control else "circle" if arm.baseline else FILLED[n % len(FILLED)]
        colour = "base" if arm.baseline else "random" if arm.control else f"c{n % COLOURS}"
        found[name] = {"colour": colour, "path": SHAPES[shape], "control": arm.control, "baseline": arm.baseline}
    return found


def group_of(point: Point) -> str:
    """What has one colour."""
    arm = point.arm
    name = arm.method if arm.training == "none" else f"{arm.method} · {arm.training}"
    return f"{arm.label} (baseline)" if arm.baseline else name


def geometry(front: Front, chart: Chart, styles: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where everything of a chart goes; cheaper is to the right."""
    cheap_high = chart.axis.better == "higher"
    begin, end = (LEFT, WIDTH - RIGHT) if cheap_high else (WIDTH - RIGHT, LEFT)
    x = scale([point.cost for point in chart.points], begin, end)
    y = scale([point.quality for point in chart.points], HEIGHT - BOTTOM, TOP)
    placed = [
        {
            "x": x(point.cost.value),
            "y": y(point.quality.value),
            "bar_x": None if point.cost.low is None else (x(point.cost.low), x(point.cost.high or 0.0)),
            "bar_y": None if point.quality.low is None else (y(point.quality.low), y(point.quality.high or 0.0)),
            "style": styles[group_of(point)],
            "point": point,
            "said": _said(front, chart, point),
        }
        for point in chart.points
    ]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "points": placed,
        "line": _steps([(p["x"], p["y"]) for p in placed if p["point"].front]),
        "labels": _labels(placed),
        "x_ticks": [{"at": x(v), "label": _tick(v, chart.axis.unit, chart.axis.name)} for v in x.ticks()],
        "y_ticks": [{"at": y(v), "label": _tick(v, front.unit, front.figure)} for v in y.ticks()],
        "x_label": axis_words(chart) + (" (logarithmic)" if x.log else ""),
        "y_label": f"{front.figure}" + (" (logarithmic)" if y.log else ""),
    }


def axis_words(chart: Chart) -> str:
    """The cost in words."""
    axis = chart.axis
    words = {"flops_share": "operations, share of the dense model's", "tokens_per_second": "tokens a second"}
    unit = f", {axis.unit}" if axis.unit and axis.kind == "measured" and axis.unit not in axis.name else ""
    return f"{axis.kind}: {words.get(axis.name, axis.name)}{unit}"


def _said(front: Front, chart: Chart, point: Point) -> list[str]:
    lines = [
        f"{front.figure}: {numbers.whole(point.quality, front.figure)}",
        f"{chart.axis.name}: {numbers.whole(point.cost, chart.axis.name)}",
    ]
    state = "baseline" if point.arm.baseline else "control" if point.arm.control else ""
    return [*lines, ", ".join(filter(None, [state, "on the front" if point.front else ""]))]


def _tick(value: float, unit: str, name: str) -> str:
    if numbers.is_share(unit):
        return f"{100 * value:.4g}%"
    return f"{value:,.6g}".replace("-", numbers.MINUS) + ("×" if "speed-up" in name else "")


def _steps(places: Sequence[tuple[float, float]]) -> str:
    """The edge of what is beaten. Between two points of the front the cheaper one is the best that is known."""
    ordered = sorted(set(places))
    if len(ordered) < 2:
        return ""
    return f"M{ordered[0][0]} {ordered[0][1]}" + "".join(f"V{y}H{x}" for x, y in ordered[1:])


def _labels(placed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names of the baseline and of the points on the front, where there is room."""
    boxes = [(p["x"] - 6, p["y"] - 6, p["x"] + 6, p["y"] + 6) for p in placed]
    found = []
    for p in sorted(placed, key=lambda p: not p["point"].arm.baseline):
        point = p["point"]
        if not (point.front or point.arm.baseline):
            continue
        text = point.arm.label if len(point.arm.label) <= 34 else point.arm.label[:33] + "…"
        size = LETTER * len(text)
        for dx, dy, anchor in ((9, -8, "start"), (9, 17, "start"), (-9, -8, "end"), (-9, 17, "end")):
            at, line = p["x"] + dx, p["y"] + dy
            box = (at if anchor == "start" else at - size, line - 10, at + size if anchor == "start" else at, line + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 4 and box[1] >= 2 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in boxes):
                boxes.append(box)
                found.append({"x": round(at, 1), "y": round(line, 1), "anchor": anchor, "text": text})
                break
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
