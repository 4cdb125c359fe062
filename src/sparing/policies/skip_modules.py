"""Leave whole modules out: attention or MLP of chosen layers, for every token or for some groups."""

from __future__ import annotations

from collections.abc import Iterable

from sparing.plan import LayerPlan, ModelShape, Policy, View
from sparing.plan.policy import check_layers
from sparing.tokens import Group, TokenMap


class SkipModules(Policy):
    """Skip the attention or the MLP branch of chosen layers.

    Args:
        attention: layers whose attention branch is left out.
        mlp: layers whose MLP branch is left out.
        groups: skip for these token groups only; for every token if `None`. A skipped token of a group is still read by the
            others (EmbedLens' sublayer skipping); where every token skips attention, nothing is read and no key is stored.
        hide: layers in which the groups skip attention and are not read either, as ViCA's pictures outside its reading layers.

    Raises:
        ValueError: `hide` without `groups`; (when applied) a layer that does not exist.

    Paper: module-wise static skipping as in SkipGPT's analysis (2506.04179); for groups EmbedLens (2603.00510), `mode=skip`.
    Differs: EmbedLens' release also moves the text's attention mass to one visual token when it skips sublayer 0; not done here.
    """

    def __init__(
        self,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        groups: Iterable[Group] | None = None,
        *,
        hide: Iterable[int] = (),
    ) -> None:
        self.attention, self.mlp, self.hide = frozenset(attention), frozenset(mlp), frozenset(hide)
        self.groups = None if groups is None else tuple(groups)
        if self.hide and self.groups is None:
            raise ValueError(
                f"SkipModules(hide={sorted(self.hide)}): say whom to hide with groups=; every token's attention is attention="
            )

    def validate(self, shape: ModelShape) -> None:
        """Every named layer must exist."""
        check_layers(sorted(self.attention), shape, "SkipModules(attention=...)")
        check_layers(sorted(self.mlp), shape, "SkipModules(mlp=...)")
        check_layers(sorted(self.hide), shape, "SkipModules(hide=...)")

    def idle(self, tokens: TokenMap) -> bool:
        """Nothing to skip (decoded tokens are text, so text alone keeps a group policy busy)."""
        if not (self.attention or self.mlp or self.hide):
            return True
        return self.groups is not None and Group.TEXT not in self.groups and not tokens.has(*self.groups)

    def plan_attend(self, view: View) -> LayerPlan:
        """Decided by the layer alone, or by layer and group."""
        hidden = view.layer in self.hide
        no_attention, no_mlp = hidden or view.layer in self.attention, view.layer in self.mlp
        if not (no_attention or no_mlp):
            return LayerPlan()
        if self.groups is None:
            return LayerPlan(attend=not no_attention, feed=not no_mlp, read=not no_attention)
        if not view.new.has(*self.groups):
            return LayerPlan()
        # One tensor for all layers of a pass: executors share what they derive from it.
        groups = self.groups
        others = view.shared("skip_modules", lambda: ~view.new.of(*groups), self)
        return LayerPlan(
            attend=others if no_attention else True, feed=others if no_mlp else True, read=others if hidden else True
        )

    def unread(self, layer: int) -> bool:
        """Whether no token, or no picture, is read in a layer."""
        if self.groups is None:
            return layer in self.attention
        return layer in self.hide and Group.IMAGE in self.groups

    def __repr__(self) -> str:
        """As constructed."""
        groups = "" if self.groups is None else f", groups={[g.name for g in self.groups]}"
        hide = f", hide={sorted(self.hide)}" if self.hide else ""
        return f"SkipModules(attention={sorted(self.attention)}, mlp={sorted(self.mlp)}{groups}{hide})"
