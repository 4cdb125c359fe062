"""Figures as people read them: percent for shares, a cross for speed-ups, as many digits as tell things apart."""

from __future__ import annotations

import math
from datetime import timedelta

from sparing.study.contrast import Difference, Value

MINUS = "−"
# The interval after a value is written with this.
TO = " – "


def number(value: float, unit: str = "", name: str = "") -> str:
    """A figure with its unit where that is short: `63.4%`, `1.32×`, `2.041`, `12,345`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if is_share(unit):
        return f"{digits(100 * value, 3)}%"
    return digits(value, 4) + ("×" if "speed-up" in name else "")


def signed(value: float, unit: str = "", name: str = "") -> str:
    """A difference: `+1.2 pp` between shares."""
    if math.isnan(value):
        return "not a number"
    text = digits(100 * value, 2) + " pp" if is_share(unit) else digits(value, 3) + ("×" if "speed-up" in name else "")
    return text if value < 0 else f"+{text}"


def interval(low: float | None, high: float | None, unit: str = "", name: str = "") -> str:
    """`61.0 – 65.1%`; empty without ends, and where nothing varied."""
    if low is None or high is None or low == high:
        return ""
    return number(low, unit, name).rstrip("%×") + TO + number(high, unit, name)


def is_share(unit: str) -> bool:
    """Is it written in percent?"""
    return unit == "share" or unit.startswith("share ")


def digits(value: float, figures: int) -> str:
    """A number to so many significant digits, without an exponent where it is readable so."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e9 or size < 1e-4:
        mantissa, _, exponent = f"{value:.{figures - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    if size >= 10 ** (figures - 1):
        return f"{value:,.0f}".replace("-", MINUS)
    return f"{value:.{max(0, figures - 1 - math.floor(math.log10(size)))}f}".replace("-", MINUS)


def whole(value: Value, name: str) -> str:
    """A value with its interval and what that is over, in a line."""
    unit = value.figure.unit
    text = number(value.value, unit, name)
    if said := interval(value.low, value.high, unit, name):
        over = f", {len(value.seeds)} seeds" if value.over == "seeds" else ""
        text += f" (95%: {said}{over})"
    shown = "" if is_share(unit) or not unit else f" {unit}"
    return text + shown


def difference(found: Difference, unit: str, name: str) -> str:
    """A difference with everything that is known of it, in a line."""
    if math.isnan(found.value):
        return "no difference can be told: one side is not a number"
    parts = [signed(found.value, unit, name)]
    if found.low is not None and found.high is not None:
        parts.append(f"95%: {signed(found.low, unit, name)} to {signed(found.high, unit, name)}")
    if found.p is not None:
        parts.append("p < 0.0001" if found.p < 1e-4 else f"p = {found.p:.2g}")
    if found.higher is not None and found.lower is not None:
        parts.append(f"higher on {found.higher}, lower on {found.lower}")
    return ", ".join([*parts, f"by {found.basis}" if found.low is not None else found.basis])


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3:05 min`, `2:03:10 h`, `2 days, 3:04:00 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    text = str(timedelta(seconds=round(seconds)))
    return f"{text[2:].removeprefix('0')} min" if seconds < 3600 else f"{text} h"
