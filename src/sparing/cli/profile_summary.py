"""A profile on the terminal: the headline, the heat maps in blocks of colour, the path, the speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from sparing.study.pages.profile_charts import bars, intensity, nats, speeds
from sparing.study.pages.profile_page import IMAGE_NAMES, MODULE_NAMES, PARTS, plan_in_words

COLD, HOT, COOL = (62, 64, 70), (214, 84, 30), (24, 132, 152)
LEVELS = "▁▂▃▄▅▆▇█"


def print_summary(figures: Mapping[str, Any], console: Console) -> None:
    """Print what `Profile.as_dict()` holds."""
    dense, planned = figures["dense"], figures["planned"]
    added, low, high = planned["added"]
    console.print()
    console.print(Text(f"The plan {plan_in_words(planned['plan'])}.", style="bold"))
    console.print(
        f"held-out loss {dense['held_out']:.3f} → {planned['held_out']:.3f} "
        f"({nats(added)}, 95% {nats(low)} to {nats(high)})"
        f"   operations {planned['flops_ratio']:.1%}   KV {planned['kv_ratio']:.1%}",
        highlight=False,
    )
    if figures["answers"]:
        console.print(_answers(figures["answers"]), highlight=False)
    if figures["controls"]:
        chance = ", ".join(nats(point["added"][0]) for point in figures["controls"])
        console.print(f"random plans of the same budget add {chance}", highlight=False)
    console.print(Text(f"loss over steps {_sparkline([point['held_out'] for point in figures['path']])}"))
    console.print()
    names = {**MODULE_NAMES, **{name: f"image {words}" for name, words in IMAGE_NAMES.items()}}
    rows = {names[name]: values for name, values in figures["modules"].items()}
    taken = {names[name]: set(planned["plan"][name]) for name in figures["modules"]}
    reading = {"added loss": {len(p["plan"]["image_attention"]): p["added"][0] for p in figures["reading"]}}
    most = max(v for row in (*rows.values(), *figures["entries"].values(), *reading.values()) for v in row.values())
    console.print(_blocks("left out alone, layer", rows, taken, most, console))
    entered = {kind: {layer} for kind, layer in planned["plan"]["entry"].items()}
    console.print(_blocks("enters only at layer", figures["entries"], entered, most, console))
    if figures["reading"]:
        console.print(_blocks("images only read, in", reading, {}, most, console))
    console.print(_parts(figures["flops"]))
    if figures["timings"]:
        console.print(_speed(figures["timings"]))


def _answers(answers: Mapping[str, Any]) -> str:
    """How many answers are right, or stay what they were, on held-out questions."""
    kept, low, high, n = answers["same"]
    said = f"{kept:.0%} of {n} held-out answers stay word for word (95% {low:.0%} to {high:.0%})"
    if (right := answers["right"])["dense"] is None:
        return said
    share, low, high, n = right["planned"]
    return f"right answers {right['dense'][0]:.0%} → {share:.0%} of {n} (95% {low:.0%} to {high:.0%})   {said}"


def _blocks(
    title: str, rows: Mapping[str, Mapping[int, float]], taken: Mapping[str, set[int]], most: float, console: Console
) -> Group:
    """Heat-map rows; brackets mark what the plan takes. Short numbers, or blocks alone where there is no room for them."""
    layers = sorted({layer for values in rows.values() for layer in values})
    # Without colours (a pipe, a file) the numbers are all there is, so they stay and lines grow long.
    numbers = console.color_system is None or 22 + 7 * len(layers) <= console.width
    cell = 7 if numbers else 3
    lines = [Text(f"{title:<22}" + "".join(f"{layer:^{cell}}" for layer in layers), style="dim")]
    for name, values in rows.items():
        line = Text(f"{name:>20}  ")
        for layer in layers:
            mark = "[]" if layer in taken.get(name, set()) else "  "
            label = f"{mark[0]}{_short(values[layer]) if numbers else '':^{cell - 2}}{mark[1]}"
            line.append(
                label,
                Style(bgcolor=_colour(intensity(values[layer], most)), color="rgb(255,255,255)", bold=mark == "[]"),
            )
        lines.append(line)
    return Group(*lines, Text())


def _short(value: float) -> str:
    """A signed number in five characters."""
    return f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}" if abs(value) < 99.95 else f"{value:+.0f}"


def _colour(heat: float) -> str:
    """Grey to orange for losses, to teal for gains."""
    end = HOT if heat >= 0 else COOL
    mixed = (round(a + (b - a) * abs(heat) / 100) for a, b in zip(COLD, end, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def _sparkline(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return "".join(LEVELS[round((len(LEVELS) - 1) * (v - low) / ((high - low) or 1))] for v in values)


def _parts(flops: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table("operations by part", "", "dense", "left", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for row in bars(flops):
        full, left = round(28 * row["dense_share"]), round(28 * row["planned_share"])
        table.add_row(
            PARTS[row["part"]][0],
            Text("█" * left, style="green") + Text("░" * (full - left), style="dim"),
            f"{row['dense_share']:.1%}",
            f"{row['planned'] / row['dense']:.1%}" if row["dense"] else "–",
        )
    return table


def _speed(timings: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "measured",
        "batch",
        "dense",
        "planned",
        "speed-up",
        "by count",
        box=None,
        header_style="dim",
        padding=(0, 2, 0, 0),
    )
    for row in speeds(timings):
        table.add_row(
            f"{row['phase']}, {row['what']}",
            str(row["batch"]),
            *(f"{row[arm][0]:.4g} {row['unit']}" for arm in ("dense", "planned")),
            Text(f"{row['factor']:.2f}×", style="bold"),
            f"{row['predicted']:.2f}×",
        )
    return table
