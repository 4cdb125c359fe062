"""A page of text with what became of every token, and what that cost in loss: the ledger to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sparing.evaluate.kinds import KINDS, TokenKinds
from sparing.evaluate.loss import TextLoss
from sparing.evaluate.removal import Removal
from sparing.evaluate.windows import Windows

PAGE_TOKENS = 640


@dataclasses.dataclass(frozen=True)
class Painting:
    """Tokens of a page. Lists run over its tokens, window after window.

    Attributes:
        text: what each token adds to the text.
        kind: its kind.
        pattern: which of `patterns` it followed.
        dense: nats of the stock model; `None` for the first token of a window, which is not predicted.
        planned: nats under the plan.
        starts: where windows start.
        patterns: module -> a digit a layer (`TokenState`: 0 gone, 1 skipped, 2 read, 3 ran).
    """

    text: list[str]
    kind: list[str]
    pattern: list[int]
    dense: list[float | None]
    planned: list[float | None]
    starts: list[int]
    patterns: list[dict[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return dataclasses.asdict(self)


def paint(
    measure: Callable[[Removal, Windows], TextLoss],
    removal: Removal,
    windows: Windows,
    tokenizer: Any,
    kinds: TokenKinds,
) -> Painting:
    """Run the beginning of `windows` dense and planned, and note every token.

    Args:
        measure: the loss of a removal on windows, with the ledger's table.
        removal: the plan.
        windows: as many of them are painted as make a page.
        tokenizer: what turns ids into text.
        kinds: what tells kinds.
    """
    windows = windows.rows(slice(0, max(1, PAGE_TOKENS // windows.length)))
    dense, planned = measure(Removal(), windows), measure(removal, windows)
    states = planned.states
    assert states is not None
    names = kinds.of_windows(windows.ids)
    page = Painting([], [], [], [], [], [], [])
    known: dict[tuple[str, str], int] = {}
    for row in range(len(windows)):
        length = int(windows.valid[row].sum())
        page.starts.append(len(page.text))
        page.text.extend(pieces(tokenizer, windows.ids[row, :length].tolist()))
        for at in range(length):
            attention, mlp = ("".join(map(str, states[:, module, row, at].tolist())) for module in (0, 1))
            if (attention, mlp) not in known:
                known[attention, mlp] = len(known)
                page.patterns.append({"attention": attention, "mlp": mlp})
            page.pattern.append(known[attention, mlp])
            page.kind.append(KINDS[int(names[row, at])])
            for column, loss in ((page.dense, dense), (page.planned, planned)):
                column.append(round(float(loss.tokens[row, at - 1]), 4) if at else None)
    return page


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text before it. Bytes that make no character yet wait for those that complete it."""
    found, before = [], ""
    for stop in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:stop])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(ids):
            found.append("")
            continue
        # Some tokenizers rewrite what came before (spaces before signs): then the token stands for itself.
        found.append(now[len(before) :] if now.startswith(before) else tokenizer.decode(ids[stop - 1 : stop]))
        before = now
    return found
