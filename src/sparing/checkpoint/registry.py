"""Policies as JSON and tensors, and back. Only registered classes are ever made; other packages register theirs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from sparing import policies as ours
from sparing.plan import Policy, Selection
from sparing.tokens import Group
from sparing.tokens.names import nearest


@functools.cache
def known_policies() -> Mapping[str, type[Policy]]:
    """Names and classes: ours, and those of installed packages (entry point group `sparing.policies`)."""
    found: dict[str, type[Policy]] = {
        name: kind for name in ours.__all__ if issubclass(kind := getattr(ours, name), Policy)
    }
    for point in entry_points(group="sparing.policies"):
        found.setdefault(point.name, point.load())
    return found


@functools.cache
def known_selections() -> Mapping[str, type[Selection]]:
    """What chooses tokens for policies: names and classes, those of installed packages (`sparing.selections`) too."""
    found: dict[str, type[Selection]] = {
        name: kind for name in ours.__all__ if issubclass(kind := getattr(ours, name), Selection)
    }
    for point in entry_points(group="sparing.selections"):
        found.setdefault(point.name, point.load())
    return found


def selections_in(arguments: Mapping[str, Any]) -> dict[str, tuple[type[Selection], dict[str, Any]]]:
    """The selections among a policy's arguments as JSON knows them: argument -> class and its own arguments.

    `{"where": {"OfClass": {"profile": ..., "classes": ["dead"]}}}`.

    Raises:
        ValueError: an unknown selection, or an argument that it does not have.
    """
    found = {}
    for key, value in arguments.items():
        if isinstance(value, dict) and value.keys() != {"group"}:
            name, given = _named(value, key)
            known = known_selections()
            if name not in known:
                raise ValueError(f"{key}: no selection is called {name!r}{nearest(name, known)}")
            parameters = inspect.signature(known[name]).parameters
            if strays := [stray for stray in given if stray not in parameters]:
                raise ValueError(
                    f"{key}: no argument of {name} is called {strays[0]!r}{nearest(strays[0], parameters)}"
                )
            found[key] = known[name], given
    return found


def _named(value: dict[str, Any], key: str) -> tuple[str, dict[str, Any]]:
    if len(value) != 1 or not isinstance(given := next(iter(value.values())), dict):
        raise ValueError(
            f'{key}: expected a selection as {{"OfClass": {{"profile": ..., "classes": ["dead"]}}}}, got {str(value)[:80]}'
        )
    return str(next(iter(value))), given


def describe(policies: Iterable[Policy]) -> list[dict[str, Any]]:
    """Each policy's registered name and constructor arguments, as JSON knows them.

    Raises:
        ValueError: a policy that is not registered, or that was made with something JSON cannot hold.
    """
    names = {cls: name for name, cls in known_policies().items()}
    entries = []
    for policy in policies:
        if type(policy) not in names:
            raise ValueError(
                f"{type(policy).__name__} cannot be saved, for nothing would find it again: register the class under the "
                'entry point group "sparing.policies" of an installed package'
            )
        name = names[type(policy)]
        arguments = {
            key: _to_json(value, f"{name}({key}=...)")
            for key, value in policy.arguments().items()
            if not isinstance(value, torch.Generator)  # noise is no part of what a policy decides
        }
        entries.append({"class": name, "arguments": arguments})
    return entries


def tensors_of(policies: Iterable[Policy]) -> dict[str, Tensor]:
    """Parameters and buffers of the policies that learn: `{index}.{name}`."""
    return {
        # Cloned, because safetensors refuses tensors that share memory.
        f"{i}.{name}": tensor.detach().cpu().clone().contiguous()
        for i, policy in enumerate(policies)
        if isinstance(policy, nn.Module)
        for name, tensor in policy.state_dict().items()
    }


def rebuild(entries: Any, tensors: Mapping[str, Tensor], where: str) -> list[Policy]:
    """The policies that `describe` and `tensors_of` spoke of, in eval mode.

    Raises:
        ValueError: an unknown policy or argument; tensors that are missing, extra or of another shape.
    """
    if not isinstance(entries, list):
        raise ValueError(
            f"{where}: expected a list of policies, got {type(entries).__name__}; save the checkpoint again"
        )
    made = [_make(entry, where) for entry in entries]
    left = dict(tensors)
    for i, policy in enumerate(made):
        own = policy.state_dict() if isinstance(policy, nn.Module) else {}
        # Cloned, because a file's tensors are not aligned as others are, and matrix products then round otherwise.
        given = {name: left.pop(f"{i}.{name}").clone() for name in own if f"{i}.{name}" in left}
        what = f"{where}: {type(policy).__name__}"
        missing = sorted(own.keys() - given.keys())
        if missing:
            raise ValueError(
                f"{what}: missing tensor {missing[0]!r} in policies.safetensors; save the checkpoint again"
            )
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{what}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}; "
                    "save the checkpoint again"
                )
        if isinstance(policy, nn.Module):
            # Assigned, so that each tensor keeps the precision it was saved in.
            policy.load_state_dict(given, strict=True, assign=True)
            policy.eval()
    if left:
        raise ValueError(f"{where}: unexpected tensor {min(left)!r} in policies.safetensors; save the checkpoint again")
    return made


def rebuild_untrained(name: str, arguments: Mapping[str, Any]) -> Policy:
    """A registered policy from its name and its arguments as JSON knows them; what it learns is drawn at random.

    Raises:
        ValueError: an unknown policy or argument.
    """
    policy = _make({"class": name, "arguments": dict(arguments)}, "policy")
    return policy.eval() if isinstance(policy, nn.Module) else policy


def _make(entry: Any, where: str) -> Policy:
    name = entry.get("class") if isinstance(entry, dict) else None
    known = known_policies()
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where}: unknown policy {name!r}; known are {', '.join(sorted(known))}. "
            "If another package has it, install that package"
        )
    try:
        arguments = dict(entry.get("arguments", {}))
        try:
            chosen = {key: kind(**given) for key, (kind, given) in selections_in(arguments).items()}
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
        arguments |= chosen
        return known[name](**{key: _from_json(value) for key, value in arguments.items()})
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{where}: {name} cannot be made from its arguments: {error}") from error


def _to_json(value: Any, what: str) -> Any:
    if isinstance(value, Group):
        return {"group": value.name}
    if isinstance(value, Selection):
        names = {cls: name for name, cls in known_selections().items()}
        if type(value) not in names:
            raise ValueError(
                f"{what}: {type(value).__name__} cannot be saved, for nothing would find it again: register the class under "
                'the entry point group "sparing.selections" of an installed package'
            )
        return {names[type(value)]: {key: _to_json(part, f"{what}.{key}") for key, part in value.arguments().items()}}
    if isinstance(value, Mapping):
        return {str(key): _to_json(part, what) for key, part in value.items()}
    if value is None or isinstance(value, (bool, str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple, range)):
        return [_to_json(part, what) for part in value]
    kind = "a function" if callable(value) else f"a {type(value).__name__}"
    raise ValueError(
        f"{what} is {kind}, which a checkpoint cannot hold: use arguments that JSON knows (groups= or a selection for where=), "
        "or a policy class of your own"
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return Group[value["group"]]
    return [_from_json(part) for part in value] if isinstance(value, list) else value
