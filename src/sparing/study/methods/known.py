"""Methods by the names that a study's YAML calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparing.checkpoint.registry import known_policies
from sparing.study.methods.method import Method
from sparing.study.methods.policy import Dense, UsePolicy
from sparing.study.methods.sequence import InSequence
from sparing.study.methods.skipping import RandomSkip, SearchSkip
from sparing.study.methods.tokens import Ablation, TokenClass
from sparing.study.methods.vica import SelectedViCA
from sparing.study.methods.visual_cost import AtVisualCost
from sparing.study.names import made, unknown, with_plugins

OURS: dict[str, type[Method]] = {
    "dense": Dense,
    "skip_search": SearchSkip,
    "skip_random": RandomSkip,
    "token_class": TokenClass,
    "ablation": Ablation,
    "vica_selected": SelectedViCA,
    "at_visual_cost": AtVisualCost,
    "sequence": InSequence,
}


def known_methods() -> dict[str, type[Method]]:
    """Methods by name: ours, and those of installed packages (entry point group `sparing.methods`); policies apart."""
    return with_plugins(OURS, "sparing.methods")


def method_maker(use: str) -> Callable[[Mapping[str, Any]], Method]:
    """What makes a method of its settings, for the name of a method or of a policy.

    Raises:
        ValueError: no method and no policy is called so.
    """
    methods = known_methods()
    if use in methods:
        return lambda settings: made(methods[use], settings)
    if use in known_policies():

        def as_policy(settings: Mapping[str, Any]) -> Method:
            arguments = dict(settings)
            execute = arguments.pop("execute", "gathered")
            return made(UsePolicy, {"policy": use, "arguments": arguments, "execute": execute})

        return as_policy
    raise ValueError(unknown("method", use, [*methods, *known_policies()]))
