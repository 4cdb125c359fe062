"""`module_changes`: how far attention and MLP of every layer turn the residual stream of each group of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.execute import run_of
from sparing.tokens import Group, TokenMap

Module = Literal["attention", "mlp"]
MODULES: tuple[Module, ...] = ("attention", "mlp")


class ModuleChanges:
    """Mean cosines of the residual stream before and after each module, gathered over forward passes. See `module_changes`."""

    def __init__(self, depth: int, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._sums = torch.zeros(len(self.groups), len(MODULES), depth, dtype=torch.float64)
        self._counts = torch.zeros(len(self.groups), dtype=torch.long)
        self._where: list[Tensor] = []
        self._before: Tensor | None = None

    @contextlib.contextmanager
    def of(self, tokens: TokenMap) -> Iterator[None]:
        """The forward pass inside is of this batch."""
        self._where = [tokens.of(group) for group in self.groups]
        self._counts += torch.stack([where.sum().cpu() for where in self._where])
        try:
            yield
        finally:
            self._where, self._before = [], None

    def cosine(self, group: Group, module: Module) -> Float[Tensor, " layers"]:
        """The mean cosine in each layer; NaN where no token of the group was seen."""
        place = self.groups.index(group)
        return self._sums[place, MODULES.index(module)] / self._counts[place]

    def _enters(self, x: Tensor) -> None:
        self._before = x

    def _leaves(self, module: Module, layer: int, x: Tensor) -> None:
        if self._before is None or not self._where:
            return
        cosine = F.cosine_similarity(self._before.float(), x.float(), dim=-1)
        for place, where in enumerate(self._where):
            kept = cosine[where.to(cosine.device)]
            self._sums[place, MODULES.index(module), layer] += kept.sum(dtype=torch.float64).cpu()
        self._before = x


@contextlib.contextmanager
def module_changes(model: nn.Module, groups: Sequence[Group] = (Group.TEXT, Group.IMAGE)) -> Iterator[ModuleChanges]:
    """Watch, inside a `with` block, how far each module turns the residual stream: the cosine before and after it.

    Cosines are taken while the layers run, so no states are kept; what a model adds between layers (DeepStack) is in neither
    module's change.

        with module_changes(model) as changes, changes.of(TokenMap.from_inputs(model, inputs)):
            model(**inputs)
        changes.cosine(Group.TEXT, "attention")

    Args:
        model: a Hugging Face model of a known family.
        groups: the groups of tokens to tell apart.

    Raises:
        ValueError: an unknown family, or a model under `gathered`, which calls no layer as a whole.

    Paper: ViCA (2602.07574) reports the cosine before and after each module for visual and for text tokens. Differs: no code for it
        was released; means over tokens are ours.
    """
    anatomy = anatomy_of(model)
    run = run_of(model)
    if run is not None and run.executor != "dense":
        raise ValueError(
            'a lens looks at whole layers, which execute="gathered" does not call: '
            'use sparing.apply(..., execute="dense"), or sparing.release(model) first'
        )
    changes = ModuleChanges(len(anatomy.layers), groups)
    with contextlib.ExitStack() as hooks:
        for layer, module in enumerate(anatomy.layers):

            def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
                changes._enters(args[0] if args else kwargs["hidden_states"])

            def attended(_: nn.Module, args: Any, layer: int = layer) -> None:
                changes._leaves("attention", layer, args[0])

            def left(_: nn.Module, __: Any, out: Any, layer: int = layer) -> None:
                changes._leaves("mlp", layer, out[0] if isinstance(out, tuple) else out)

            hooks.callback(module.register_forward_pre_hook(enters, with_kwargs=True).remove)
            hooks.callback(anatomy.mlp_norm(layer).register_forward_pre_hook(attended).remove)
            hooks.callback(module.register_forward_hook(left).remove)
        yield changes
