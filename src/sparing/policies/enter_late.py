"""Let a group of tokens enter the decoder at a middle layer, or leave it at one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from sparing.plan import LayerPlan, ModelShape, Policy, PromptView, Selection, View
from sparing.plan.selection import check_where, chosen_in, remembered
from sparing.tokens import Group, TokenMap


class EnterLate(Policy):
    """Tokens of a group enter at layer `entry` with their input embedding, and are gone from layer `exit` on.

    Before its entry a token is neither computed nor read; its embedding waits unchanged. Positions are kept.

    Args:
        entry: first layer that computes and reads the group (0: from the start).
        exit: first layer that no longer does; `None`: to the end.
        groups: which tokens; image tokens by default.
        where: instead of `groups`: a `Selection` (tokens of a class: `OfClass`), or a function `TokenMap -> [b t]` mask over the
            tokens of a pass.

    Raises:
        ValueError: `entry` after `exit`, or (when applied) beyond the model's depth.

    Paper: EmbedLens (2603.00510), mid-layer injection (`vision_entry_layer`, `vision_exit_layer`), training-free.
    Differs: the release splices a fixed 35:611 slice and loses the question when classes are given; here groups come from the map.
    """

    def __init__(
        self,
        entry: int = 0,
        exit: int | None = None,
        *,
        groups: Iterable[Group] = (Group.IMAGE,),
        where: Selection | Callable[[TokenMap], Tensor] | None = None,
    ) -> None:
        if entry < 0 or (exit is not None and exit < entry):
            raise ValueError(f"EnterLate(entry={entry}, exit={exit}): give 0 <= entry <= exit")
        check_where(where, "EnterLate(where=...)")
        self.entry, self.exit, self.groups, self.where = entry, exit, tuple(groups), where
        # A selection looks at the whole prompt.
        self.causal = not isinstance(where, Selection)
        # A function may look at ids and positions too, and sees one pass at a time.
        self.by_layout = where is None

    def validate(self, shape: ModelShape) -> None:
        """Entry and exit must lie within the model (at its depth: never, or to the end)."""
        for name, layer in (("entry", self.entry), ("exit", self.exit or 0)):
            if layer > shape.depth:
                raise ValueError(
                    f"EnterLate({name}={layer}): layer {layer} does not exist; this model has layers 0..{shape.depth - 1}"
                )

    def idle(self, tokens: TokenMap) -> bool:
        """The group does not occur, or it is never away."""
        if self.entry == 0 and self.exit is None:
            return True
        if isinstance(self.where, Selection):
            return self.where.idle(tokens)
        return self.where is None and Group.TEXT not in self.groups and not tokens.has(*self.groups)

    def start(self, view: PromptView) -> None:
        """A selection decides once."""
        if isinstance(self.where, Selection):
            view.state["chosen"] = chosen_in(view, self.where)

    def plan_attend(self, view: View) -> LayerPlan:
        """Away before the entry and after the exit."""
        if self.entry <= view.layer and (self.exit is None or view.layer < self.exit):
            return LayerPlan()
        if self.where is None and not view.new.has(*self.groups):
            return LayerPlan()
        others = view.shared("enter_late", lambda: ~self._chosen(view), self)
        return LayerPlan(attend=others, feed=others, read=others)

    def _chosen(self, view: View) -> Tensor:
        if self.where is None:
            return view.new.of(*self.groups)
        if not isinstance(self.where, Selection):
            return self.where(view.new)
        chosen = remembered(view, "chosen")
        return view.new.valid & False if chosen is None else chosen[:, -view.new.length :]

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """All inside, none before and behind; `None` where something else than pictures is away."""
        if self.where is not None or self.groups != (Group.IMAGE,):
            return None
        return tuple(float(not self.never(layer)) for layer in range(depth))

    def never(self, layer: int) -> bool:
        """Whether the group is away in a layer."""
        return layer < self.entry or (self.exit is not None and layer >= self.exit)

    def __repr__(self) -> str:
        """As constructed."""
        where = repr(self.where) if isinstance(self.where, Selection) else "..."
        what = f"where={where}" if self.where else f"groups={[g.name for g in self.groups]}"
        return f"EnterLate({self.entry}, {self.exit}, {what})"
