"""`record`: the residual stream of chosen tokens, at chosen levels of a forward pass. What every lens reads."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.execute import run_of
from sparing.tokens import Group, TokenMap


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """The residual stream of some tokens of a batch.

    A *level* is a place between layers: level 0 is what enters the first layer (for an image token what the projector made of
    it), level `i` what layer `i - 1` left, what the model adds there included (DeepStack), and the last level what the final
    norm reads: no final norm is in any of them.

    Attributes:
        tokens: the prompts' map.
        levels: which levels are kept, in ascending order.
        index: row and original index of each kept token, row by row.
        states: the residual stream there.
        middle: the residual after attention and before the MLP, of layers `levels` (the last level has none); `None` unless
            asked for.
        depth: layers of the model.
    """

    tokens: TokenMap
    levels: tuple[int, ...]
    index: Int[Tensor, "n 2"]
    states: Float[Tensor, "levels n d"]
    middle: Float[Tensor, "layers n d"] | None
    depth: int

    def at(self, level: int) -> Float[Tensor, "n d"]:
        """The states at a level.

        Raises:
            ValueError: it was not kept.
        """
        if level not in self.levels:
            raise ValueError(f"level {level} was not recorded; recorded are {', '.join(map(str, self.levels))}")
        return self.states[self.levels.index(level)]

    def only(
        self,
        where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None = None,
        levels: Iterable[int] | None = None,
    ) -> Recording:
        """The part of it that a call of `record` with these arguments would have kept, as far as it was kept at all.

        Args:
            where: groups, or a mask; every kept token by default.
            levels: some of the kept levels; all of them by default.

        Raises:
            ValueError: a level that was not kept, none at all, or a mask of another shape.
        """
        wanted = self.levels if levels is None else tuple(sorted(set(levels)))
        if not wanted or (missing := [level for level in wanted if level not in self.levels]):
            asked = f"level {missing[0]}" if wanted else "no level at all"
            raise ValueError(f"{asked} was asked for; recorded are {', '.join(map(str, self.levels))}")
        if wanted == self.levels and where is None:
            return self
        row, place = self.index.T
        kept = _kept(self.tokens, where)[row, place]
        at = [self.levels.index(level) for level in wanted]
        middle = self.middle
        if middle is not None:
            between = [i for i, level in enumerate(self.levels) if level in wanted and level < self.depth]
            middle = middle[between][:, kept.to(middle.device)] if between else None
        states = self.states[at][:, kept.to(self.states.device)]
        return dataclasses.replace(self, levels=wanted, index=self.index[kept], states=states, middle=middle)


@torch.no_grad()
def record(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None = None,
    levels: Iterable[int] | None = None,
    middle: bool = False,
) -> Recording:
    """Run a batch of prompts once and keep the residual stream.

    Inside `sparing.apply(model, ..., execute="dense")` it keeps what the policies make of it.

    Args:
        model: a Hugging Face model of a known family.
        inputs: what its processor returned, on its device.
        where: the tokens to keep: groups, or a mask; all but padding by default.
        levels: which levels to keep, `0..depth`; all by default. Only these are held in memory.
        middle: keep the residual between attention and MLP too, of the layers among `levels`.

    Raises:
        ValueError: no such level, a mask of another shape, or a model under `gathered`, which calls no layer as a whole.
    """
    anatomy = anatomy_of(model)
    depth = len(anatomy.layers)
    wanted = tuple(range(depth + 1)) if levels is None else tuple(sorted(set(levels)))
    if not wanted or wanted[0] < 0 or wanted[-1] > depth:
        raise ValueError(f"record(levels={list(wanted)}): this model has levels 0..{depth}, give at least one of them")
    run = run_of(model)
    if run is not None and run.executor != "dense":
        raise ValueError(
            'a lens looks at whole layers, which execute="gathered" does not call: '
            'use sparing.apply(..., execute="dense"), or sparing.release(model) first'
        )
    tokens = TokenMap.from_inputs(model, inputs)
    kept = _kept(tokens, where)
    row, place = index = kept.nonzero(as_tuple=True)
    found: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], level: int, x: Tensor) -> None:
        into[level] = x[row.to(x.device), place.to(x.device)].clone()

    with contextlib.ExitStack() as hooks:
        for level in wanted:

            def enters(_: nn.Module, args: Any, kwargs: Any, level: int = level) -> None:
                keep(found, level, args[0] if args else kwargs["hidden_states"])

            def attended(_: nn.Module, args: Any, level: int = level) -> None:
                keep(between, level, args[0])

            module = anatomy.decoder.norm if level == depth else anatomy.layers[level]
            hooks.callback(module.register_forward_pre_hook(enters, with_kwargs=True).remove)
            if middle and level < depth:
                hooks.callback(anatomy.mlp_norm(level).register_forward_pre_hook(attended).remove)
        anatomy.model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    return Recording(
        tokens=tokens,
        levels=wanted,
        index=torch.stack(index, 1),
        states=torch.stack([found[level] for level in wanted]),
        middle=torch.stack([between[level] for level in wanted if level < depth]) if middle and between else None,
        depth=depth,
    )


def _kept(tokens: TokenMap, where: Group | Iterable[Group] | Tensor | None) -> Tensor:
    if where is None:
        return tokens.valid
    if isinstance(where, Tensor):
        if where.shape != tokens.group.shape:
            raise ValueError(f"the mask has shape {tuple(where.shape)}, the prompts {tuple(tokens.group.shape)}")
        return where.to(tokens.group.device, torch.bool) & tokens.valid
    return tokens.of(where) if isinstance(where, Group) else tokens.of(*where)
