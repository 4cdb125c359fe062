"""`Selection`: tokens of a prompt chosen by what they hold, once, before the first layer."""

from __future__ import annotations

import abc
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sparing.plan.arguments import kept_arguments
from sparing.plan.views import PromptView, View
from sparing.tokens import TokenMap


class Selection(abc.ABC):
    """Tokens chosen by what they hold: their embeddings, what the vision encoder returned for them.

    Policies and ablations take one where they take groups (`DropTokens(where=...)`, `SkipModules(where=...)`,
    `EnterLate(where=...)`, `knock_out(keys=...)`). It decides once per prompt, before the first layer; tokens that are decoded
    later are never chosen, nor is padding. What is chosen lives in the run's state, and follows beams. A choice must depend on
    a row's own tokens alone: not on padding, and not on the other rows.

    Other packages offer theirs by the entry point `sparing.selections`; checkpoints and studies then know them by name.
    """

    paths: tuple[str, ...] = ()
    """Constructor arguments that may name a file."""

    @property
    def made_for(self) -> str | None:
        """The fingerprint of the only model that it speaks of (`sparing.anatomy.fingerprint`); `None` if it is for any."""
        return None

    @property
    def seeded(self) -> bool:
        """Whether it chooses at random, by a seed."""
        return False

    def idle(self, tokens: TokenMap) -> bool:
        """Whether nothing can be chosen in a prompt with these tokens."""
        return False

    @abc.abstractmethod
    def choose(self, view: PromptView) -> Bool[Tensor, "b t"]:
        """Choose among the tokens of a prompt. Book what it costs with `view.spend`."""

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that make this selection again, as JSON knows them.

        They are read from the attributes of the same names; override it where there are none.
        """
        return kept_arguments(self)


def check_where(where: object, what: str, *, mask: bool = False) -> None:
    """Refuse what chooses no tokens.

    Raises:
        ValueError: it is no selection and no function (and no mask, where one is taken).
    """
    if where is None or isinstance(where, Selection) or callable(where) or (mask and isinstance(where, Tensor)):
        return
    raise ValueError(f"{what} is {str(where)[:60]!r}: give a selection (OfClass) or a function of the TokenMap")


@torch.no_grad()
def chosen_in(view: PromptView, where: Selection) -> Bool[Tensor, "b t"]:
    """What a selection chooses in a prompt, padding taken out.

    Raises:
        ValueError: it did not return a boolean mask over the prompt.
    """
    mask = where.choose(view)
    if mask.dtype != torch.bool or mask.shape != view.tokens.group.shape:
        raise ValueError(
            f"{where!r} chose with {mask.dtype} of shape {tuple(mask.shape)}: a selection returns a boolean mask "
            f"{list(view.tokens.group.shape)}"
        )
    return mask.to(view.tokens.group.device) & view.tokens.valid


def remembered(view: View, name: str) -> Bool[Tensor, "b T"] | None:
    """A choice that `start` kept in `view.state[name]`, over all tokens so far; `None` where the prompt had none to make.

    What came after the prompt is not chosen.
    """
    mask = view.state.get(name)
    if mask is None:
        return None
    later = view.tokens.length - mask.shape[1]
    return mask if not later else torch.nn.functional.pad(mask, (0, later), value=False)
