"""Scoring in two passes: the context under the policy, then what follows it, token-parallel, from the cache.

A policy that is not causal ranks the tokens of a prompt among each other. Scored in one pass it would see the continuation too,
which it never does when the model writes. Here its decisions fall on the context alone, and the continuation comes as later
tokens do. A context is read once, however many continuations it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.evaluate.tasks.metering import Meter
from sparing.execute.cache import PlannedCache
from sparing.plan import Ledger

# A context's tokens, and the tokens of each of its continuations.
Choices = tuple[tuple[int, ...], Sequence[Sequence[int]]]
# Sum of log-probabilities (nats), and whether greedy decoding would have written it.
Score = tuple[float, bool]


@torch.inference_mode()
def score_in_two_passes(model: Any, meter: Meter, part: Sequence[Choices], rows: int) -> list[list[Score]]:
    """How likely continuations of contexts are.

    Args:
        model: a Hugging Face model, inside the run of `meter`.
        meter: is told what it took: contexts as prefill, continuations as decoding.
        part: the contexts, read together, with their continuations; none of them empty.
        rows: most continuations of one pass.

    Returns:
        For each context, a score a continuation.
    """
    begin = meter.now()
    ids, mask = padded_rows([context for context, _ in part], "left", meter.device)
    lengths = mask.sum(1)
    padded = bool((lengths < mask.shape[1]).any())
    out = model(
        input_ids=ids,
        attention_mask=mask if padded else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0) if padded else None,
        logits_to_keep=1,
        use_cache=True,
    )
    cache, first = out.past_key_values, out.logits[:, -1]
    assert isinstance(cache, PlannedCache)
    # Booked at the end: a pass that runs out of memory is tried again with fewer rows, and must not count twice.
    booked: list[tuple[int, float, float, Ledger]] = [(len(part), meter.now() - begin, 0.0, meter.run.ledger)]
    places = [(i, j) for i, (_, ends) in enumerate(part) for j in range(len(ends))]
    longer = [(i, j) for i, j in places if len(part[i][1][j]) > 1]
    later: dict[tuple[int, int], Tensor] = {}
    for start in range(0, len(longer), rows):
        chunk = longer[start : start + rows]
        begin = meter.now()
        # The last token is only predicted.
        ids, new = padded_rows([part[i][1][j][:-1] for i, j in chunk], "right", meter.device)
        at = torch.tensor([i for i, _ in chunk], device=meter.device)
        masked = padded or not bool(new.all())
        logits = model(
            input_ids=ids,
            attention_mask=torch.cat([mask[at], new], dim=1) if masked else None,
            position_ids=lengths[at, None] + torch.arange(ids.shape[1], device=meter.device),
            past_key_values=cache.fork(at),
            use_cache=True,
        ).logits
        later |= dict(zip(chunk, logits, strict=True))
        booked.append((len(chunk), 0.0, meter.now() - begin, meter.run.ledger))
    found: list[list[Score]] = [[] for _ in part]
    for i, j in places:
        wanted = torch.tensor(part[i][1][j], device=meter.device)
        logits = first[i, None]
        if (i, j) in later:
            logits = torch.cat([logits, later[i, j][: len(wanted) - 1]])
        each = F.log_softmax(logits.float(), dim=-1).gather(1, wanted[:, None])
        found[i].append((float(each.sum()), bool((logits.argmax(-1) == wanted).all())))
    for entry in booked:
        meter.book(*entry)
    return found


def padded_rows(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask `[b t]`, padded on the `left` or the `right`."""
    longest = max(map(len, rows))
    filled, mask = [], []
    for row in rows:
        some, ones = [0] * (longest - len(row)), [1] * len(row)
        filled.append([*some, *row] if side == "left" else [*row, *some])
        mask.append([*some, *ones] if side == "left" else [*ones, *some])
    return torch.tensor(filled, device=device), torch.tensor(mask, device=device)
