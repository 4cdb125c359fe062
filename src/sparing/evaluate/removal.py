"""`Removal`: what a static plan leaves out, which policies say so, and how many operations are left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparing.evaluate.kinds import IMAGE, KINDS, TokenKinds
from sparing.execute import Run, apply
from sparing.plan import ModelShape, Policy
from sparing.policies import EnterLate, SkipModules
from sparing.tokens import Group

Module = Literal["attention", "mlp", "image_attention", "image_mlp", "image_read"]
MODULES: tuple[Module, ...] = ("attention", "mlp")
IMAGE_MODULES: tuple[Module, ...] = ("image_attention", "image_mlp", "image_read")
"""What can be left out of a layer for image tokens alone."""
LAYERWISE = (*MODULES, *IMAGE_MODULES)


@dataclasses.dataclass(frozen=True)
class Removal:
    """What a static plan leaves out of a model.

    Attributes:
        attention: layers without attention.
        mlp: layers without MLP.
        entry: kinds of tokens that enter late, each with the first layer that computes and reads it; sorted.
        image_attention: layers in which image tokens skip attention; the others read them all the same.
        image_mlp: layers in which image tokens skip the MLP.
        image_read: layers in which image tokens skip attention and nobody reads them.
    """

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()
    entry: tuple[tuple[str, int], ...] = ()
    image_attention: frozenset[int] = frozenset()
    image_mlp: frozenset[int] = frozenset()
    image_read: frozenset[int] = frozenset()

    @classmethod
    def reading(cls, layers: Sequence[int], depth: int) -> Removal:
        """Image tokens are never computed, and read in these layers alone, as ViCA has it."""
        every = frozenset(range(depth))
        return cls(image_attention=frozenset(layers), image_mlp=every, image_read=every - frozenset(layers))

    def without(self, module: Module, layer: int) -> Removal:
        """One more module left out."""
        return dataclasses.replace(self, **{module: getattr(self, module) | {layer}})

    def entering(self, kind: str, layer: int) -> Removal:
        """A kind of tokens enters at this layer."""
        return dataclasses.replace(self, entry=tuple(sorted({**dict(self.entry), kind: layer}.items())))

    def put_back(self) -> list[Removal]:
        """Every removal with one module, or one kind of tokens, less."""
        found: list[Removal] = [
            dataclasses.replace(self, **{m: getattr(self, m) - {i}})
            for m in LAYERWISE
            for i in sorted(getattr(self, m))
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
        modules = [
            f"{m.replace('_', ' ')} {','.join(map(str, sorted(getattr(self, m))))}"
            for m in LAYERWISE
            if getattr(self, m)
        ]
        return "; ".join([*modules, *(f"{kind} from {layer}" for kind, layer in self.entry)]) or "nothing"

    def policies(self, kinds: TokenKinds | None = None) -> list[Policy]:
        """The policies that carry this out.

        Args:
            kinds: what tells kinds of text tokens; not needed where only image tokens enter late.
        """
        found: list[Policy] = []
        if self.attention or self.mlp:
            found.append(SkipModules(attention=self.attention, mlp=self.mlp))
        if self.image_attention or self.image_mlp or self.image_read:
            found.append(
                SkipModules(
                    attention=self.image_attention, mlp=self.image_mlp, groups=[Group.IMAGE], hide=self.image_read
                )
            )
        for kind, layer in self.entry:
            if layer and kind == IMAGE:
                found.append(EnterLate(layer))
            elif layer:
                assert kinds is not None, "kinds of text tokens are told by TokenKinds"
                found.append(EnterLate(layer, where=kinds.where(kind)))
        return found

    def applied(self, model: nn.Module, kinds: TokenKinds | None = None) -> Run:
        """`sparing.apply` of these policies; the stock forward runs where nothing is left out."""
        return apply(model, *self.policies(kinds))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {**{m: sorted(getattr(self, m)) for m in LAYERWISE}, "entry": dict(self.entry)}

    def __str__(self) -> str:
        """The call that makes the plan."""
        calls = []
        if self.attention or self.mlp:
            calls.append(f"SkipModules(attention={sorted(self.attention)}, mlp={sorted(self.mlp)})")
        if self.image_attention or self.image_mlp or self.image_read:
            parts = {"attention": self.image_attention, "mlp": self.image_mlp, "hide": self.image_read}
            said = "".join(f", {name}={sorted(layers)}" for name, layers in parts.items() if layers)
            calls.append(f"SkipModules(groups=[Group.IMAGE]{said})")
        calls += [
            f"EnterLate({layer})" if kind == IMAGE else f"EnterLate({layer}, where=kinds.where({kind!r}))"
            for kind, layer in self.entry
        ]
        return " & ".join(calls) or "nothing removed"


class PrefillFlops:
    """Counts a prefill's operations under a removal without running it, as the ledger does (tests compare them).

    A search asks for hundreds of counts. Rows and query-key pairs depend only on which kinds are present in a layer.

    Args:
        shape: the model's sizes.
        kinds: the kind of each token of the windows.
        valid: which of them are no padding.
        names: the kinds' names, in the order of their numbers.
        fixed: operations that no removal touches (the output matrix, the vision encoder); by default those of the output
            matrix on every token.
    """

    def __init__(
        self,
        shape: ModelShape,
        kinds: Int[Tensor, "n w"],
        valid: Bool[Tensor, "n w"],
        *,
        names: Sequence[str] = KINDS,
        fixed: int | None = None,
    ) -> None:
        self._shape, self._kinds, self._valid, self._names = shape, kinds, valid, tuple(names)
        self._rows: dict[frozenset[str], int] = {}
        self._pairs: dict[tuple[frozenset[str], frozenset[str], int | None], int] = {}
        # Logits are computed for padding too.
        self.fixed = 2 * shape.hidden * shape.vocabulary * valid.numel() if fixed is None else fixed
        self.dense = self(Removal())

    def __call__(self, removal: Removal) -> int:
        """All operations of the prefill."""
        total = self.fixed
        for i, layer in enumerate(self._shape.layers):
            away = frozenset(kind for kind, entry in removal.entry if i < entry)
            if i not in removal.attention:
                unread = away | {IMAGE} if i in removal.image_read else away
                idle = unread | {IMAGE} if i in removal.image_attention else unread
                total += self._count(idle) * layer.query_flops + self._count(unread) * layer.kv_flops
                total += self._count_pairs(idle, unread, layer.window) * layer.pair_flops
            if i not in removal.mlp:
                total += self._count(away | {IMAGE} if i in removal.image_mlp else away) * layer.mlp_flops
        return total

    @property
    def lowest_ratio(self) -> float:
        """What is left when every module is gone, as a share of all operations."""
        return self.fixed / self.dense

    def _without(self, kinds: frozenset[str]) -> Bool[Tensor, "n w"]:
        here = self._valid.clone()
        for kind in kinds & set(self._names):
            here &= self._kinds != self._names.index(kind)
        return here

    def _count(self, without: frozenset[str]) -> int:
        """Rows of a layer in which some kinds are left out."""
        if without not in self._rows:
            self._rows[without] = int(self._without(without).sum())
        return self._rows[without]

    def _count_pairs(self, idle: frozenset[str], unread: frozenset[str], window: int | None) -> int:
        """Query-key pairs of a layer in which some kinds do not attend, and some are not read."""
        key = (idle, unread, window)
        if key not in self._pairs:
            seen = self._without(unread).long().cumsum(1)
            if window is not None and window < seen.shape[1]:
                seen[:, window:] = seen[:, window:] - seen[:, :-window].clone()
            self._pairs[key] = int((seen * self._without(idle)).sum())
        return self._pairs[key]
