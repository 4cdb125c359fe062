"""Leave whole modules out: attention or MLP of chosen layers, for every token or for some."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from sparing.plan import LayerPlan, ModelShape, Policy, PromptView, Selection, View
from sparing.plan.policy import check_layers
from sparing.plan.selection import check_where, chosen_in, remembered
from sparing.tokens import Group, TokenMap


class SkipModules(Policy):
    """Skip the attention or the MLP branch of chosen layers.

    Args:
        attention: layers whose attention branch is left out.
        mlp: layers whose MLP branch is left out.
        groups: skip for these token groups only; for every token if `None`. A skipped token of a group is still read by the
            others (EmbedLens' sublayer skipping); where every token skips attention, nothing is read and no key is stored.
        where: instead of `groups`: a `Selection` (tokens of a class: `OfClass`), or a function `TokenMap -> [b t]` mask over the
            tokens of a pass. What a selection chose in the prompt skips; decoded tokens run in full.
        hide: layers in which these tokens skip attention and are not read either, as ViCA's pictures outside its reading layers.

    Raises:
        ValueError: both `groups` and `where`, `hide` without either, or (when applied) a layer that does not exist.

    Paper: module-wise static skipping as in SkipGPT's analysis (2506.04179); for groups EmbedLens (2603.00510), `mode=skip`.
    Differs: EmbedLens' release also moves the text's attention mass to one visual token when it skips sublayer 0; not done here.
    """

    def __init__(
        self,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        groups: Iterable[Group] | None = None,
        *,
        where: Selection | Callable[[TokenMap], Tensor] | None = None,
        hide: Iterable[int] = (),
    ) -> None:
        if groups is not None and where is not None:
            raise ValueError("SkipModules: give groups= or where= (a selection or a function), not both")
        check_where(where, "SkipModules(where=...)")
        self.attention, self.mlp, self.hide = frozenset(attention), frozenset(mlp), frozenset(hide)
        self.groups = None if groups is None else tuple(groups)
        self.where = where
        if self.hide and groups is None and where is None:
            raise ValueError(f"SkipModules(hide={sorted(self.hide)}): say whom to hide with groups= or where=")
        # A selection looks at the whole prompt.
        self.causal = not isinstance(where, Selection)
        # A function may look at ids and positions too, and sees one pass at a time.
        self.by_layout = where is None

    def validate(self, shape: ModelShape) -> None:
        """Every named layer must exist."""
        check_layers(sorted(self.attention), shape, "SkipModules(attention=...)")
        check_layers(sorted(self.mlp), shape, "SkipModules(mlp=...)")
        check_layers(sorted(self.hide), shape, "SkipModules(hide=...)")

    def idle(self, tokens: TokenMap) -> bool:
        """Nothing to skip (decoded tokens are text, so text alone keeps a group policy busy)."""
        if not (self.attention or self.mlp or self.hide):
            return True
        if isinstance(self.where, Selection):
            return self.where.idle(tokens)
        return self.groups is not None and Group.TEXT not in self.groups and not tokens.has(*self.groups)

    def start(self, view: PromptView) -> None:
        """A selection decides once."""
        if isinstance(self.where, Selection):
            view.state["chosen"] = chosen_in(view, self.where)

    def plan_attend(self, view: View) -> LayerPlan:
        """Decided by the layer alone, or by layer and token."""
        hidden = view.layer in self.hide
        no_attention, no_mlp = hidden or view.layer in self.attention, view.layer in self.mlp
        if not (no_attention or no_mlp):
            return LayerPlan()
        if self.where is None and self.groups is None:
            return LayerPlan(attend=not no_attention, feed=not no_mlp, read=not no_attention)
        if self.groups is not None and not view.new.has(*self.groups):
            return LayerPlan()
        # One tensor for all layers of a pass: executors share what they derive from it.
        others = view.shared("skip_modules", lambda: ~self._chosen(view), self)
        return LayerPlan(
            attend=others if no_attention else True, feed=others if no_mlp else True, read=others if hidden else True
        )

    def _chosen(self, view: View) -> Tensor:
        if self.groups is not None:
            return view.new.of(*self.groups)
        if not isinstance(self.where, Selection):
            assert self.where is not None
            return self.where(view.new)
        chosen = remembered(view, "chosen")
        return view.new.valid & False if chosen is None else chosen[:, -view.new.length :]

    def unread(self, layer: int) -> bool:
        """Whether no token, or no picture, is read in a layer."""
        if self.groups is None:
            return self.where is None and layer in self.attention
        return layer in self.hide and Group.IMAGE in self.groups

    def __repr__(self) -> str:
        """As constructed."""
        groups = "" if self.groups is None else f", groups={[g.name for g in self.groups]}"
        if self.where is not None:
            groups = f", where={self.where!r}" if isinstance(self.where, Selection) else ", where=..."
        hide = f", hide={sorted(self.hide)}" if self.hide else ""
        return f"SkipModules(attention={sorted(self.attention)}, mlp={sorted(self.mlp)}{groups}{hide})"
