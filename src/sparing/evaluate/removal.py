"""`Removal`: what a static plan leaves out, which policies say so, and how many operations are left."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparing.evaluate.kinds import KINDS, TokenKinds
from sparing.execute import Run, apply
from sparing.plan import ModelShape, Policy
from sparing.policies import EnterLate, SkipModules

Module = Literal["attention", "mlp"]
MODULES: tuple[Module, ...] = ("attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a static plan leaves out of a model.

    Attributes:
        attention: layers without attention.
        mlp: layers without MLP.
        entry: kinds of tokens that enter late, each with the first layer that computes and reads it; sorted.
    """

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()
    entry: tuple[tuple[str, int], ...] = ()

    def without(self, module: Module, layer: int) -> Removal:
        """One more module left out."""
        return dataclasses.replace(self, **{module: getattr(self, module) | {layer}})

    def entering(self, kind: str, layer: int) -> Removal:
        """A kind of tokens enters at this layer."""
        return dataclasses.replace(self, entry=tuple(sorted({**dict(self.entry), kind: layer}.items())))

    def put_back(self) -> list[Removal]:
        """Every removal with one module, or one kind of tokens, less."""
        found: list[Removal] = [
            dataclasses.replace(self, **{m: getattr(self, m) - {i}}) for m in MODULES for i in sorted(getattr(self, m))
        ]
        return found + [
            dataclasses.replace(self, entry=tuple(e for e in self.entry if e != late)) for late in self.entry
        ]

    def entry_of(self, kind: str) -> int:
        """The layer at which a kind enters; 0 if it is there from the start."""
        return dict(self.entry).get(kind, 0)

    @property
    def key(self) -> str:
        """A name that is the same for equal removals, in any process."""
        modules = [f"{m} {','.join(map(str, sorted(getattr(self, m))))}" for m in MODULES if getattr(self, m)]
        return "; ".join([*modules, *(f"{kind} from {layer}" for kind, layer in self.entry)]) or "nothing"

    def policies(self, kinds: TokenKinds) -> list[Policy]:
        """The policies that carry this out."""
        found: list[Policy] = []
        if self.attention or self.mlp:
            found.append(SkipModules(attention=self.attention, mlp=self.mlp))
        found += [EnterLate(layer, where=kinds.where(kind)) for kind, layer in self.entry if layer]
        return found

    def applied(self, model: nn.Module, kinds: TokenKinds) -> Run:
        """`sparing.apply` of these policies; the stock forward runs where nothing is left out."""
        return apply(model, *self.policies(kinds))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"attention": sorted(self.attention), "mlp": sorted(self.mlp), "entry": dict(self.entry)}

    def __str__(self) -> str:
        """The call that makes the plan."""
        calls = []
        if self.attention or self.mlp:
            calls.append(f"SkipModules(attention={sorted(self.attention)}, mlp={sorted(self.mlp)})")
        calls += [f"EnterLate({layer}, where=kinds.where({kind!r}))" for kind, layer in self.entry]
        return " & ".join(calls) or "nothing removed"


class PrefillFlops:
    """Counts a prefill's operations under a removal without running it, as the ledger does (tests compare them).

    A search asks for hundreds of counts. Rows and query-key pairs depend only on which kinds are present in a layer.

    Args:
        shape: the model's sizes.
        kinds: the kind of each token of the windows.
        valid: which of them are no padding.
    """

    def __init__(self, shape: ModelShape, kinds: Int[Tensor, "n w"], valid: Bool[Tensor, "n w"]) -> None:
        self._shape, self._kinds, self._valid = shape, kinds, valid
        self._counts: dict[frozenset[str], tuple[int, int]] = {}
        # Logits are computed for padding too.
        self.lm_head = 2 * shape.hidden * shape.vocabulary * valid.numel()
        self.dense = self(Removal())

    def __call__(self, removal: Removal) -> int:
        """All operations of the prefill."""
        total = self.lm_head
        for i, layer in enumerate(self._shape.layers):
            rows, pairs = self._count(frozenset(kind for kind, entry in removal.entry if i < entry))
            if i not in removal.attention:
                total += rows * (layer.query_flops + layer.kv_flops) + pairs * layer.pair_flops
            if i not in removal.mlp:
                total += rows * layer.mlp_flops
        return total

    @property
    def lowest_ratio(self) -> float:
        """What is left when every module is gone: the output matrix, as a share of all operations."""
        return self.lm_head / self.dense

    def _count(self, away: frozenset[str]) -> tuple[int, int]:
        """Rows, and query-key pairs, of a layer in which some kinds are away."""
        if away not in self._counts:
            here = self._valid.clone()
            for kind in away:
                here &= self._kinds != KINDS.index(kind)
            self._counts[away] = int(here.sum()), int((here.long().cumsum(1) * here).sum())
        return self._counts[away]
