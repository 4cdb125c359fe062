"""The logit lens: what the model would say if a token's state went straight to the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.lens.nearest import ROWS, WORDS, Best, rows
from sparing.lens.record import Recording
from sparing.lens.words import WordReading, chosen_words, read_states
from sparing.tokens import Group


@torch.no_grad()
def logit_lens(
    model: nn.Module,
    inputs: Mapping[str, Any] | Recording,
    *,
    k: int = 10,
    levels: Iterable[int] | None = None,
    where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None = None,
    vocabulary: Iterable[int] | Tensor | None = None,
    chunk: int = WORDS,
) -> WordReading:
    """The most probable next words of each token, were its state at a level the last one.

    The final norm exactly once, at every level (no level of a `Recording` has it), then the output matrix, the cap on logits where
    the family has one (Gemma 2), and the softmax over the whole vocabulary. At the last level this is the model's own prediction.

    Args:
        model: a Hugging Face model of a known family.
        inputs: what its processor returned, or a recording.
        k: words a token and level.
        levels: which levels to read (see `Recording`): all by default.
        where: which tokens to read, as in `record`. By default the image tokens of inputs (none are an empty reading), and all that a
            recording holds.
        vocabulary: ids that may be named; all by default. Probabilities are shares of the whole vocabulary all the same.
        chunk: words at a time; the result does not depend on it. An output matrix that is quantised, offloaded or wrapped gives
            all logits at once, of fewer states at a time.

    Returns:
        The reading; its scores are log-probabilities.

    Raises:
        ValueError: no such level, more words asked for than there are, states that are not finite, or a recording of another model.

    Paper: nostalgebraist (2020), "interpreting GPT: the logit lens"; EmbedLens (2603.00510) compares itself to it.
    """
    anatomy = anatomy_of(model)
    size = anatomy.text_config.vocab_size
    if chunk < 1:
        raise ValueError(f"expected a chunk of one word or more, got {chunk}")
    recording, norms = read_states(model, inputs, anatomy, where, levels)
    states = recording.states.flatten(0, 1)
    ids = chosen_words(vocabulary, size, k, states.device)
    chunk = chunk if anatomy.sliceable_head else size
    best = Best(len(states), k, states.device)
    total = torch.full((len(states), 1), float("-inf"), device=states.device)
    every = torch.arange(size, device=states.device)
    for at in rows(len(states), min(ROWS, max(1, ROWS * WORDS // chunk))):
        normed = anatomy.decoder.norm(states[at])
        for start in range(0, size, chunk):
            words = slice(start, min(start + chunk, size))
            logits = anatomy.logits(normed, words)
            total[at] = torch.logaddexp(total[at], logits.logsumexp(1, keepdim=True))
            if ids is None:
                best.add(at, logits, every[words])
        for part in () if ids is None else ids.split(chunk):
            best.add(at, anatomy.logits(normed, part), part)
    shape = (*norms.shape, k)
    return WordReading(
        recording.tokens,
        recording.levels,
        recording.index,
        best.ids.view(shape),
        (best.scores - total).view(shape),
        norms,
    )
