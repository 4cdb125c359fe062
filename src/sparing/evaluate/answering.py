"""Answers to a question about pictures with all visual tokens, and without those of some classes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: decoded greedily.
        first: probability of the first token of the answer that all tokens give.
    """

    text: str
    first: float


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to prune, what the model answers then, and what that costs.

    Attributes:
        name: what is left out, or kept.
        classes: the classes that are left out.
        dropped: how many visual tokens that are.
        answer: the answer; `None` if it was not run.
        controls: answers with as many random visual tokens left out in their place, one a seed.
        flops: operations of the prefill, of those with all tokens.
        kv: bytes of keys and values after the prefill, of those with all tokens.
        seconds: of the prefill: median, fastest, slowest; `None` if not timed.
        why: why it was not run.
    """

    name: str
    classes: tuple[str, ...]
    dropped: int
    answer: Answer | None
    controls: tuple[Answer, ...] = ()
    flops: float = 1.0
    kv: float = 1.0
    seconds: tuple[float, float, float] | None = None
    why: str = ""
