"""Pictures with what became of each of their patches in every layer: the ledger to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparing.evaluate.loss import TextLoss
from sparing.evaluate.painting import pieces
from sparing.evaluate.pictures.questions import PictureQuestion
from sparing.evaluate.removal import Removal
from sparing.tokens import Group, ImageSpan, TokenMap

PAGE_QUESTIONS = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A question as the model is asked it.

    Attributes:
        question: the question.
        prompt: the processor's inputs, a batch of one.
        tokens: the map of the prompt.
        answer: the tokens of the expected answer; empty until it is known.
    """

    question: PictureQuestion
    prompt: dict[str, Tensor]
    tokens: TokenMap
    answer: list[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.tokens.length + len(self.answer)


@dataclasses.dataclass(frozen=True)
class PicturePage:
    """Questions of a page.

    Attributes:
        questions: each with its `question`, its `files`, its mean `loss` (dense and planned), its `tokens` (all but those of
            pictures: `text`, `role`, `pattern`, and nats `dense` and `planned` where it was predicted) and its `spans`: the
            token that each stands `before`, its `grid`, the pattern of each of its `patches` row by row, and those of its
            `extra` tokens, which lie on no patch.
        patterns: module -> a digit a layer (`TokenState`: 0 gone, 1 skipped, 2 read, 3 ran).
    """

    questions: list[dict[str, Any]]
    patterns: list[dict[str, str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return dataclasses.asdict(self)


def paint(
    measure: Callable[[Removal, Asked], TextLoss], removal: Removal, asked: Sequence[Asked], tokenizer: Any
) -> PicturePage:
    """Run questions dense and planned, each by itself, and note every token.

    Args:
        measure: the loss of a removal on a question, with the ledger's table.
        removal: the plan.
        asked: the questions.
        tokenizer: what turns ids into text.
    """
    page, known = PicturePage([], []), dict[tuple[str, str], int]()

    def pattern(states: Tensor, at: int) -> int:
        found = ("".join(map(str, states[:, 0, 0, at].tolist())), "".join(map(str, states[:, 1, 0, at].tolist())))
        if found not in known:
            known[found] = len(known)
            page.patterns.append({"attention": found[0], "mlp": found[1]})
        return known[found]

    for each in asked:
        dense, planned = measure(Removal(), each), measure(removal, each)
        assert planned.states is not None
        patterns = [pattern(planned.states, at) for at in range(each.length)]
        tokens, before = _tokens(each, tokenizer, patterns)
        for token, a, b in zip(
            tokens[-len(each.answer) :], dense.tokens[0].tolist(), planned.tokens[0].tolist(), strict=True
        ):
            token |= {"dense": round(a, 4), "planned": round(b, 4)}
        page.questions.append(
            {
                "question": each.question.question,
                "files": [path.name for path in each.question.pictures],
                "loss": {"dense": dense.mean, "planned": planned.mean},
                "tokens": tokens,
                "spans": [
                    {"before": at, **_span(span, patterns)}
                    for at, span in zip(before, each.tokens.images[0], strict=True)
                ],
            }
        )
    return page


def _tokens(asked: Asked, tokenizer: Any, patterns: Sequence[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """The tokens that are no picture's, and before which of them each picture stands."""
    assert asked.tokens.ids is not None
    ids = [*asked.tokens.ids[0].tolist(), *asked.answer]
    groups = asked.tokens.group[0].tolist()
    tokens: list[dict[str, Any]] = []
    before: list[int] = []

    def add(start: int, stop: int, role: str) -> None:
        for at, text in zip(range(start, stop), pieces(tokenizer, ids[start:stop]), strict=True):
            tokens.append({"text": text, "role": role, "pattern": patterns[at]})

    done = 0
    for span in asked.tokens.images[0]:
        add(done, span.start, "system" if done == 0 and groups[0] == Group.SYSTEM else "question")
        before.append(len(tokens))
        done = span.stop
    add(done, len(groups), "question")
    add(len(groups), len(ids), "answer")
    return tokens, before


def _span(span: ImageSpan, patterns: Sequence[int]) -> dict[str, Any]:
    patches = span.patches().flatten().tolist()
    rest = sorted(set(range(span.start, span.stop)) - set(patches))
    return {
        "grid": list(span.grid),
        "patches": [patterns[at] for at in patches],
        "extra": [patterns[at] for at in rest],
    }
