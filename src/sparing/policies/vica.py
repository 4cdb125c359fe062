"""ViCA: visual tokens skip every layer and are only read, by text, in a few layers."""

from __future__ import annotations

from collections.abc import Iterable

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, PromptView, View
from sparing.plan.policy import check_layers
from sparing.tokens import Group, TokenMap


class ViCA(Policy):
    """Visual tokens keep the projector's output; text reads them in a few layers through ordinary self-attention.

    In a reading layer keys and values come from `[system; visual; text]` through that layer's own norm and projections, and one
    softmax runs over all of them. Elsewhere attention is ordinary causal attention over system and text. Positions are kept.

    Args:
        layers: the reading layers.
        prefix: what attention does to the system tokens (the text before the first picture): `update` as ever; `freeze`: never
            computed for them (their MLP is), in any layer; an integer `n`: computed up to and including layer `n`.
        blind: allow `layers=[]` on a picture, which hides it completely (for sweeps).

    Raises:
        ValueError: duplicate layers; (when applied) a layer that does not exist, of `prefix` too; (on a prompt with a picture) no
            reading layer.

    Paper: ViCA (2602.07574). Differs: the paper's 7B release is `prefix="freeze"`; its 3B and 13B are `"update"` in training and
        eager mode, and `prefix=5` / `prefix=8` in FlashAttention mode. The release's FlashAttention path also lets system tokens see
        visual ones in two layers of the 13B (bottom-right alignment); that bug is not offered.
    """

    freezes = (Group.IMAGE,)
    by_layout = True

    def __init__(self, layers: Iterable[int], prefix: str | int = "update", *, blind: bool = False) -> None:
        self.layers = tuple(layers)
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"ViCA(layers={list(self.layers)}): a layer is named twice")
        if not (isinstance(prefix, int) or prefix in ("update", "freeze")):
            raise ValueError(
                f'ViCA(prefix={prefix!r}): choose "update", "freeze" or the last layer that updates the prefix'
            )
        self.prefix, self.blind = prefix, blind

    def validate(self, shape: ModelShape) -> None:
        """Every reading layer must exist, and the last one that updates the prefix."""
        check_layers(self.layers, shape, "ViCA(layers=...)")
        if isinstance(self.prefix, int):
            check_layers((self.prefix,), shape, "ViCA(prefix=...)")

    def idle(self, tokens: TokenMap) -> bool:
        """A prompt without pictures is left exactly as it is."""
        return not tokens.has(Group.IMAGE)

    def start(self, view: PromptView) -> None:
        """Refuse to run blind unasked."""
        if not self.layers and not self.blind and view.tokens.has(Group.IMAGE):
            raise ValueError(
                "ViCA(layers=[]) reads the picture in no layer, so the model would be blind: name one (or pass blind=True)"
            )

    def plan_attend(self, view: View) -> LayerPlan:
        """Decided by layer and group alone."""
        new = view.new
        if not new.has(Group.IMAGE, Group.SYSTEM):
            return FULL
        others = view.shared("vica", lambda: ~new.of(Group.IMAGE), self) if new.has(Group.IMAGE) else True
        attend = others
        if self._frozen(view.layer) and new.has(Group.SYSTEM):
            attend = view.shared("vica_text", lambda: ~new.of(Group.IMAGE, Group.SYSTEM), self)
        return LayerPlan(attend=attend, feed=others, read=True if view.layer in self.layers else others)

    def _frozen(self, layer: int) -> bool:
        """Whether the system tokens' attention is left out in a layer."""
        return self.prefix == "freeze" or (isinstance(self.prefix, int) and layer > self.prefix)

    def unread(self, layer: int) -> bool:
        """Whether no token reads the picture in a layer."""
        return layer not in self.layers

    def picture_shares(self, depth: int) -> tuple[float, ...]:
        """None is ever computed."""
        return (0.0,) * depth

    def picture_reads(self, depth: int) -> tuple[float, ...]:
        """All, in the reading layers."""
        return tuple(float(layer in self.layers) for layer in range(depth))

    def conflict(self, other: Policy) -> str | None:
        """Two ViCAs of different layers, or nothing left to read."""
        if isinstance(other, ViCA) and set(other.layers) != set(self.layers):
            return "they read in different layers; keep one of them"
        never = getattr(other, "never", None)
        if never is not None and self.layers and all(never(layer) for layer in self.layers):
            return f"the picture is away in every reading layer {list(self.layers)}; enter earlier or read later"
        return None

    def __repr__(self) -> str:
        """As constructed."""
        return f"ViCA({list(self.layers)}, prefix={self.prefix!r})"
