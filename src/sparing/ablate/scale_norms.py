"""Make chosen tokens larger or smaller."""

from __future__ import annotations

import math

from torch import Tensor

from sparing.ablate.places import Where, named, settled, tokens_at
from sparing.ablate.rewriting import Rewrite, at_layer, where_true
from sparing.plan import Policy, PromptView


class _ScaleNorms(Rewrite):
    """See `scale_norms`."""

    name = "scale_norms"  # type: ignore[assignment]

    def __init__(self, where: Where, factor: float, layer: int) -> None:
        super().__init__(layer)
        self.where, self.factor = settled(where, "scale_norms(where=...)"), factor

    def settle(self, view: PromptView) -> dict[str, Tensor]:
        return {"chosen": tokens_at(view, self.where, "scale_norms(where=...)")}

    def rewritten(self, states: Tensor, settled: dict[str, Tensor]) -> Tensor:
        return where_true(settled["chosen"], states * self.factor, states)

    def __repr__(self) -> str:
        """As called."""
        return f"scale_norms({named(self.where)}, {self.factor:g}{at_layer(self.layer)})"


def scale_norms(where: Where, factor: float, *, layer: int = 0) -> Policy:
    """Multiply what chosen tokens of the prompt hold by a factor; their direction stays.

    The result goes into `sparing.apply` like a policy, under `execute="dense"`.

    Args:
        where: groups, a `Selection` (tokens of a class: `OfClass`), a function `TokenMap -> [b t]` or a mask.
        factor: 0 and more; 1 changes nothing.
        layer: at whose input; 0 is the prompt's embeddings.

    Raises:
        ValueError: a factor that is negative or not finite, or (when applied) no such layer.

    Paper: EmbedLens (2603.00510): visual tokens scaled by 0.01, to see whether their norm lets them bypass shallow layers.
    """
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"scale_norms(factor={factor}): give a finite number, 0 or more")
    return _ScaleNorms(where, float(factor), layer)
