"""A text to profile a model on: windows of it, every other one to choose plans on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from sparing.evaluate.kinds import FIRST, KINDS, MEANING, TokenKinds
from sparing.evaluate.loss import TextLoss, check_finite, measure_under
from sparing.evaluate.material import Material, Split, TimedPrompt
from sparing.evaluate.painting import Painting, paint
from sparing.evaluate.removal import MODULES, PrefillFlops, Removal
from sparing.evaluate.windows import Windows, tokenize
from sparing.plan import Policy

# Fewer tokens of a kind than this say nothing about the kind.
FEWEST_OF_A_KIND = 8
TIMED_TOKENS = 512


class TextMaterial(Material):
    """Windows of a text.

    Args:
        model: a Hugging Face model of a known family.
        tokenizer: its tokenizer, or a processor that has one.
        text: the text.
        max_tokens: tokens of it that are used.
        window: most tokens of a window.
        modules_only: leave out modules only; otherwise kinds of tokens may enter late too.

    Raises:
        ValueError: no tokenizer, one of another checkpoint, or a text that is too short.
    """

    name = "text"
    modules = MODULES
    fixed = "the output matrix (lm_head) alone takes"
    page = Painting

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        text: str,
        *,
        max_tokens: int = 8192,
        window: int = 256,
        modules_only: bool = False,
    ) -> None:
        super().__init__(model)
        self.source = tokenize(tokenizer, text, max_tokens)
        windows = self.source.windows(min(window, self.longest))
        if int(windows.ids.max()) >= self.shape.vocabulary:
            raise ValueError(
                "the tokenizer has tokens that the model does not know: they belong to different checkpoints"
            )
        self.search, self.held_out = windows.split()
        self.token_kinds = TokenKinds(model, tokenizer)
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._first = windows.rows(slice(0, 1))
        found = self.token_kinds.of_windows(windows.ids).where(windows.valid, torch.tensor(-1))
        counts = {name: int((found == i).sum()) for i, name in enumerate(KINDS)}
        chosen_on = self.token_kinds.of_windows(self.search.ids)
        self.kinds = {
            name: {"share": counts[name] / sum(counts.values()), "meaning": MEANING[name]}
            for i, name in enumerate(KINDS)
            if not modules_only
            and (i == FIRST or int(((chosen_on == i) & self.search.valid).sum()) >= FEWEST_OF_A_KIND)
        }
        self.flops = PrefillFlops(self.shape, found, windows.valid)

    @property
    def content(self) -> Any:
        """The ids of both halves."""
        return [self.search.ids.tolist(), self.held_out.ids.tolist()]

    def policies(self, removal: Removal) -> list[Policy]:
        """Kinds of tokens are told by their ids."""
        return removal.policies(self.token_kinds)

    def loss(self, split: Split, removal: Removal) -> TextLoss:
        """Every token of a window but the first is predicted."""
        return self._under(removal, self.search if split == "choose" else self.held_out)

    def check(self) -> None:
        """Run one window."""
        check_finite(self.model, self._first)

    def timed(self, batch: int, steps: int) -> TimedPrompt:
        """The text from its beginning, cut into rows."""
        length = min(self.longest, TIMED_TOKENS)
        steps = min(steps, length // 4)
        ids = torch.tensor(self.source.ids, device=self.device)
        rows = ids.repeat(-(-batch * length // len(ids)))[: batch * length].view(batch, length)
        return TimedPrompt({"input_ids": rows[:, : length - steps]}, rows[:, length - steps :])

    def paint(self, removal: Removal) -> dict[str, Any]:
        """The beginning of the reporting half."""
        measure = functools.partial(self._under, states=True)
        return paint(measure, removal, self.held_out, self._tokenizer, self.token_kinds).as_dict()

    def describe(self) -> dict[str, Any]:
        """Tokens, characters and windows."""
        return {
            "tokens": len(self.source.ids),
            "characters": self.source.characters,
            "of_characters": self.source.of_characters,
            "window": self.search.length,
            "chosen_on": {"windows": len(self.search), "predicted": self.search.predicted},
            "held_out": {"windows": len(self.held_out), "predicted": self.held_out.predicted},
        }

    def _under(self, removal: Removal, windows: Windows, *, states: bool = False) -> TextLoss:
        return measure_under(lambda: self.applied(removal), self.model, windows, states=states)
