"""Matched controls: which variant of a method has to beat which variant of the method that says it is its control."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparing.checkpoint.registry import known_policies
from sparing.study.methods.policy import UsePolicy
from sparing.study.yaml_lines import Place

if TYPE_CHECKING:
    from sparing.study.spec import Entry, Variant

Pairs = tuple[tuple[int, int], ...]
_ABSENT = object()


def matched_controls(
    entries: Mapping[str, Entry], variants: Sequence[Variant], at: Callable[[Place, str], ValueError]
) -> Pairs:
    """Pair the variants of methods with those of their controls (`control_of` in the YAML).

    A variant's control is the one that agrees with it in every setting that either of them varies and both have, be it
    written under `over`, under `with`, or left at its default. So `budget: 0.7` of a search meets `budget: 0.7` of its random
    control, and a control with a single variant and other settings is that of all.

    Args:
        entries: the study's methods.
        variants: all of their variants.
        at: words an error with the file and the line of a place.

    Returns:
        (place of the variant, place of its control) in `variants`.

    Raises:
        ValueError: a variant has no control or several of them, or a control's variant is that of none.
    """
    places: dict[str, list[int]] = {name: [] for name in entries}
    for i, variant in enumerate(variants):
        places[variant.name].append(i)
    found: list[tuple[int, int]] = []
    for name, entry in entries.items():
        here: Place = ("methods", name, "control_of")
        used: set[int] = set()
        for other in entry.control_of:
            if other == name:
                raise at(here, f"{name!r} cannot be its own control: name the method that has to beat it")
            axes = list(dict.fromkeys([*entries[other].over, *entry.over]))
            for i in places[other]:
                fits = [j for j in places[name] if all(_agree(variants[i], variants[j], axis) for axis in axes)]
                if len(fits) != 1:
                    raise at(here, _why(variants[i], [variants[j] for j in fits or places[name]], axes, bool(fits)))
                found.append((i, fits[0]))
                used.add(fits[0])
        if entry.control_of and (idle := [j for j in places[name] if j not in used]):
            raise at(
                here,
                f"{variants[idle[0]].label!r} is the control of no variant of {' or '.join(map(repr, entry.control_of))}: take its "
                "value out of `over`, or add it to theirs",
            )
    return tuple(sorted(found))


def _why(arm: Variant, controls: Sequence[Variant], axes: Sequence[str], several: bool) -> str:
    """Why a variant has not exactly one control."""
    name, cure = controls[0].name, "or write one entry a variant"
    if several:
        labels = " and ".join(repr(control.label) for control in controls[:2])
        return f"{arm.label!r} has several controls, {labels}: keep one value of what it does not vary itself, {cure}"
    shared = [axis for axis in axes if all(_setting(v, axis) is not _ABSENT for v in (arm, controls[0]))]
    wanted = ", ".join(f"{axis}: {_setting(arm, axis)}" for axis in shared)
    return f"{arm.label!r} has no control: no variant of {name!r} has {wanted}; add it there, {cure}"


def _agree(arm: Variant, control: Variant, axis: str) -> bool:
    one, two = _setting(arm, axis), _setting(control, axis)
    return one is _ABSENT or two is _ABSENT or one == two


def _setting(variant: Variant, name: str) -> Any:
    """A setting as it is written, or its default; `_ABSENT` where there is none of that name."""
    value: Any = variant.settings.get(name, _ABSENT)
    if value is _ABSENT:
        made_by = known_policies()[variant.does.policy] if isinstance(variant.does, UsePolicy) else type(variant.does)
        parameter = inspect.signature(made_by).parameters.get(name)
        value = _ABSENT if parameter is None or parameter.default is parameter.empty else parameter.default
    return list(value) if isinstance(value, tuple) else value
