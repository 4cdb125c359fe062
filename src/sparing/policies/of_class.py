"""`OfClass`: the tokens of a picture that are sinks, dead or alive, and the controls to compare them with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sparing.plan import PromptView, Selection
from sparing.tokens import TokenMap, TokenProfile
from sparing.tokens.names import nearest
from sparing.tokens.profile import CLASSES, members_of

CONTROLS = ("random", "uniform", "background")
NEIGHBOURS = 0.25
"""Share of a picture's tokens within which what is most frequent has its neighbours."""


class OfClass(Selection):
    """Choose the picture tokens of some classes, or as many others.

    Whoever removes a class removes tokens: whether *these* mattered shows only against the same number of others. A control
    takes as many tokens in every picture (in every tile, where each is a span of its own) as the classes have there:

    - `random`: drawn from the picture's other tokens. The draw follows from the seed, the picture's place in its row and
      the class's own tokens, so it is the same in any batch and under any padding.
    - `uniform`: drawn in the same way from all tokens of the picture, those of the classes among them.
    - `background`: the other tokens that are most like what the picture has most of. That is the token whose
      neighbours are nearest (the cosine of embeddings to the one in rank a quarter of the other tokens), and the order is by cosine
      to it. If dead tokens were blank background and no more, this would do what removing them does.

    Where `random` and `background` find fewer others than that, tokens of the classes make up the number: of classes that are most
    of a picture they take all the rest, which is no fair match (`uniform` is). Newline tokens are never chosen.

    Args:
        profile: a `TokenProfile`, the file of one, or what its `as_dict` gave.
        classes: `sink`, `vit_sink`, `llm_sink`, `dead`, `alive`.
        control: choose a control instead of the classes.
        seed: of the controls that draw.
        inverse: choose all picture tokens but these (keep only the classes, or only the control).
        overlapping: let a token be in several classes; otherwise it is in the nearest one's alone.

    Raises:
        ValueError: an unknown class or control, no class, a model that has none of the classes, or (when applied) a profile of
            another checkpoint.

    Paper: EmbedLens (2603.00510), `mode=token_pruning` with `target_ids`; its `-1` is `control="random"`, its `-2` is
        `inverse=True`.
    Differs: the release draws without a seed, for batches of one picture of 576 tokens; it knows no background control.
    """

    paths = ("profile",)

    def __init__(
        self,
        profile: TokenProfile | str | Path | Mapping[str, Any],
        classes: Iterable[str],
        control: str | None = None,
        seed: int = 0,
        *,
        inverse: bool = False,
        overlapping: bool = False,
    ) -> None:
        if isinstance(profile, str | Path):
            profile = TokenProfile.load(profile)
        self.profile = profile if isinstance(profile, TokenProfile) else TokenProfile.from_dict(profile)
        self.classes = (classes,) if isinstance(classes, str) else tuple(classes)
        self._members = members_of(self.classes)
        if not self._members:
            raise ValueError("OfClass(classes=[]) chooses nothing: name sink, vit_sink, llm_sink, dead or alive")
        if control is not None and control not in CONTROLS:
            raise ValueError(f"no control is called {control!r}{nearest(str(control), CONTROLS)}; None is the classes")
        if not any(map(self.profile.has, self._members)):
            why = " ".join(self.profile.notes)
            raise ValueError(
                f"this checkpoint has no {' or '.join(self.classes)} tokens{f' ({why})' if why else ''}: choose among "
                f"{', '.join(name for name in ('sink', 'dead', 'alive') if self.profile.has(name))}"
            )
        self.control, self.seed, self.inverse, self.overlapping = control, seed, inverse, overlapping

    @property
    def made_for(self) -> str:
        """The profile's checkpoint."""
        return self.profile.checkpoint

    @property
    def seeded(self) -> bool:
        """Controls that draw are."""
        return self.control in ("random", "uniform")

    def idle(self, tokens: TokenMap) -> bool:
        """There are no pictures."""
        return not any(tokens.images)

    def arguments(self) -> dict[str, Any]:
        """With the profile itself, so that a checkpoint needs no other file."""
        return {**super().arguments(), "profile": self.profile.as_dict(), "classes": list(self.classes)}

    def choose(self, view: PromptView) -> Bool[Tensor, "b t"]:
        """Tell the classes apart, and match them where a control is asked for."""
        tokens, device = view.tokens, view.tokens.group.device
        spans = [(r, i, span.encoded()) for r, row in enumerate(tokens.images) for i, span in enumerate(row)]
        where = torch.zeros(tokens.group.shape, dtype=torch.bool, device=device)
        chosen = torch.zeros_like(where)
        if not spans:
            return chosen
        # Where pictures lie is known on the host, so that nothing waits for the device here.
        row = torch.cat([torch.full_like(index, r) for r, _, index in spans]).to(device)
        place = torch.cat([index for _, _, index in spans]).to(device)
        states = view.embeds[row, place]
        view.spend(len(states) * self.profile.flops(*view.vocabulary.shape[::-1]))
        where[row, place] = True
        chosen[row, place] = self._are_members(states, view.vocabulary)
        if self.control is not None:
            chosen = self._matched(view, chosen, spans)
        return where & ~chosen if self.inverse else chosen

    def _are_members(self, states: Tensor, vocabulary: Tensor) -> Tensor:
        if self.overlapping:
            told = self.profile.classify(states, overlapping=True, vocabulary=vocabulary)
            assert isinstance(told, dict)
            return torch.stack([told[name] for name in self._members]).any(0)
        index = self.profile.classify(states, vocabulary=vocabulary)
        assert isinstance(index, Tensor)
        return torch.isin(index, index.new_tensor([CLASSES.index(name) for name in self._members]))

    def _matched(self, view: PromptView, chosen: Tensor, spans: list[tuple[int, int, Tensor]]) -> Tensor:
        """As many tokens of each picture, chosen by the control."""
        known, device = chosen.cpu(), chosen.device
        found = torch.zeros_like(known)
        for row, place, index in spans:
            member = known[row, index]
            count = int(member.sum())
            if not count:
                continue
            order = (
                self._drawn(member, place)
                if self.seeded
                else _like_background(view.embeds[row, index.to(device)], member)
            )
            if self.control != "uniform":
                # Others first: where they are too few, the classes' own tokens follow.
                order = order[torch.argsort(member[order].int(), stable=True)]
            found[row, index[order[:count]]] = True
        return found.to(device)

    def _drawn(self, member: Tensor, place: int) -> Tensor:
        said = f"{self.seed} {place} ".encode() + np.packbits(member.numpy()).tobytes()
        seed = int.from_bytes(hashlib.blake2b(said, digest_size=7).digest(), "big")
        return torch.randperm(len(member), generator=torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        """As constructed, the profile by its checkpoint."""
        said = [repr(list(self.classes))]
        if self.control is not None:
            said.append(f"control={self.control!r}" + (f", seed={self.seed}" if self.seeded else ""))
        said += [f"{name}=True" for name in ("inverse", "overlapping") if getattr(self, name)]
        return f"OfClass({', '.join(said)})"


def _like_background(states: Tensor, member: Tensor) -> Tensor:
    """A picture's tokens in order of their likeness to what is most frequent among those that are no members."""
    unit = torch.nn.functional.normalize(states.float(), dim=1)
    others = unit[~member.to(unit.device)] if not bool(member.all()) else unit
    near = (others @ others.T).sort(dim=1, descending=True).values
    # Rounded, so that rounding elsewhere turns few ties; the first of equals wins.
    rank = min(len(others) - 1, max(1, round(NEIGHBOURS * len(others))))
    centre = others[near[:, rank].mul(1e4).round().argmax()]
    return (unit @ centre).mul(1e4).round().argsort(descending=True, stable=True).cpu()
