"""Delete tokens before the first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparing.plan import ModelShape, Policy, PromptView, Selection
from sparing.plan.selection import check_where, chosen_in
from sparing.policies.ranking import share_of
from sparing.tokens import Group, TokenMap

Where = Callable[[TokenMap], Tensor]


class DropTokens(Policy):
    """Drop tokens of a prompt: they are never computed and never read.

    Args:
        where: a `Selection` (tokens of a class: `OfClass`), a function `TokenMap -> [b t]` mask of what to drop, or a `[b t]`
            mask itself.
        groups: instead of `where`: drop tokens of these groups.
        keep: with `groups`: keep this share of them (0 drops all), of each row's own number (to the nearest, halves up, at least
            one if the share is not 0). This is the matched-count control.
        choose: with `keep`: `random`, by `seed`; or `uniform`, evenly spaced in the order of the row.
        positions: `keep` leaves the survivors their original positions, `reindex` closes the gaps.
        seed: of the random choice. A row's draw depends on its place in the batch, too, and on padding.

    Raises:
        ValueError: both or neither of `where` and `groups`, or a share outside 0..1.

    Paper: EmbedLens (2603.00510), `mode=token_pruning`: deleted once, survivors keep their positions; its `-1` control is
        `DropTokens(groups=[Group.IMAGE], keep=...)`, here with a seed of its own. `uniform` is ours.
    """

    causal = False

    def __init__(
        self,
        where: Selection | Where | Tensor | None = None,
        *,
        groups: Iterable[Group] | None = None,
        keep: float = 0.0,
        choose: str = "random",
        positions: str = "keep",
        seed: int = 0,
    ) -> None:
        if (where is None) == (groups is None):
            raise ValueError("DropTokens: give exactly one of where= (a selection, a mask or a function) and groups=")
        check_where(where, "DropTokens(where=...)", mask=True)
        if not 0 <= keep <= 1:
            raise ValueError(f"DropTokens(keep={keep}): the share to keep lies between 0 and 1")
        if positions not in ("keep", "reindex"):
            raise ValueError(f'DropTokens(positions={positions!r}): choose "keep" or "reindex"')
        if choose not in ("random", "uniform"):
            raise ValueError(f'DropTokens(choose={choose!r}): choose "random" or "uniform"')
        self.where, self.groups, self.keep = where, None if groups is None else tuple(groups), keep
        self.choose, self.positions, self.seed = choose, positions, seed

    def validate(self, shape: ModelShape) -> None:
        """Applies to every model."""
        return

    def idle(self, tokens: TokenMap) -> bool:
        """The groups do not occur, or nothing can be chosen."""
        if isinstance(self.where, Selection):
            return self.where.idle(tokens)
        return self.groups is not None and (self.keep == 1 or not tokens.has(*self.groups))

    def start(self, view: PromptView) -> None:
        """Choose and drop."""
        tokens = view.tokens
        if self.groups is not None:
            gone = self._beyond_share(tokens.of(*self.groups))
        elif isinstance(self.where, Selection):
            gone = chosen_in(view, self.where)
        else:
            gone = self.where(tokens) if callable(self.where) else self.where
            assert gone is not None
            if gone.shape != tokens.group.shape:
                raise ValueError(
                    f"DropTokens: the mask has shape {tuple(gone.shape)}, the prompt {tuple(tokens.group.shape)}"
                )
            gone = gone.to(tokens.group.device)
        gone = gone & tokens.valid
        if bool((gone.sum(1) == tokens.valid.sum(1)).any()):
            raise ValueError("DropTokens would drop every token of a row: keep at least one")
        view.drop(gone)
        if self.positions == "reindex":
            view.position_ids = view.position_ids - gone.long().cumsum(1)

    def _beyond_share(self, candidates: Tensor) -> Tensor:
        """All candidates but a share of each row."""
        if self.keep == 0:
            return candidates
        number = candidates.sum(1, keepdim=True)
        count = share_of(candidates, self.keep, nearest=True).unsqueeze(1).clamp(min=1)
        if self.choose == "uniform":
            # Of n in a row c stay, one in the middle of each n-th part: at the ranks where the rounded rank * c / n steps up.
            last = 2 * candidates.long().cumsum(1) * count
            halves = (2 * number).clamp(min=1)
            before, behind = (last - 2 * count + number) // halves, (last + number) // halves
            return candidates & (before == behind)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(candidates.shape, generator=generator).to(candidates.device)
        rank = noise.masked_fill(~candidates, 2.0).argsort(1).argsort(1)
        return candidates & (rank >= count)

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """The same in all layers; `None` where something else than pictures is dropped."""
        return (self.keep,) * depth if self.groups == (Group.IMAGE,) else None

    def __repr__(self) -> str:
        """As constructed."""
        where = repr(self.where) if isinstance(self.where, Selection) else "..."
        how = "" if self.choose == "random" else f", choose={self.choose!r}"
        what = (
            f"where={where}"
            if self.groups is None
            else f"groups={[g.name for g in self.groups]}, keep={self.keep:g}{how}"
        )
        return f"DropTokens({what}, positions={self.positions!r})"
