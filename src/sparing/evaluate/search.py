"""Find a static plan within a budget of operations: greedily, with every step run, and by chance as a control."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from sparing.evaluate.removal import LAYERWISE, MODULES, Module, PrefillFlops, Removal

Method = Literal["greedy", "additive"]
# A step of the path saves at least this share of the dense operations, where one can: the first token of a window alone
# is a candidate that costs a measurement and saves nothing.
SMALLEST_STEP = 0.005
# A random plan matches where its share of operations is this close; so many are drawn to find one.
MATCH = 0.01
DRAWS = 50


class Option(NamedTuple):
    """One thing that can be left out in addition.

    Attributes:
        name: what it is; the same wherever on the path it is offered.
        removal: the plan with it left out too.
        saved: operations it saves there.
    """

    name: tuple[str, int]
    removal: Removal
    saved: int


class Search:
    """Walks from the dense model towards a budget, one removal after the other.

    Args:
        flops: counts a removal's operations.
        depth: layers of the model.
        kinds: the kinds of tokens that may enter late.
        loss: measures a removal on the text to choose on.
        sensitivity: the loss that each removal adds alone, by the option's name.
        entries: the layers at which a kind may enter.
        modules: what may be left out layer by layer.
    """

    def __init__(
        self,
        flops: PrefillFlops,
        depth: int,
        kinds: Sequence[str],
        loss: Callable[[Removal], float],
        sensitivity: Mapping[tuple[str, int], float],
        entries: Sequence[int],
        modules: Sequence[Module] = MODULES,
    ) -> None:
        self._flops, self._depth, self._kinds, self._entries = flops, depth, tuple(kinds), tuple(entries)
        self._modules = tuple(modules)
        self._loss = loss
        self._alone = sensitivity

    def options(self, removal: Removal) -> list[Option]:
        """Everything that can be left out in addition."""
        now = self._flops(removal)
        found = []
        for module in self._modules:
            for layer in range(self._depth):
                if layer not in getattr(removal, module):
                    found.append(((module, layer), removal.without(module, layer)))
        for kind in self._kinds:
            for layer in self._entries:
                if layer > removal.entry_of(kind):
                    found.append(((kind, layer), removal.entering(kind, layer)))
        options = [Option(name, then, now - self._flops(then)) for name, then in found]
        # An image token that has not entered yet has nothing left to skip.
        return [option for option in options if option.saved > 0]

    def path(self, budget: float, method: Method, width: int) -> Iterator[Removal]:
        """The steps from the dense model to the first plan within the budget.

        Args:
            budget: share of the dense operations.
            method: `additive` trusts the sensitivities of single removals; `greedy` runs the `width` most promising
                candidates of a step and takes the best, and remembers what the others did.
            width: candidates of a greedy step.
        """
        removal, corrected = Removal(), dict[tuple[str, int], float]()
        yield removal
        while self._flops(removal) > budget * self._flops.dense:
            ranked = self._ranked(removal, corrected)
            chosen = ranked[0]
            if method == "greedy" and len(ranked) > 1:
                before = self._loss(removal)
                measured = [(self._loss(option.removal) - before, option) for option in ranked[:width]]
                for added, option in measured:
                    corrected[option.name] = added
                chosen = min(measured, key=lambda pair: _price(pair[0], pair[1].saved))[1]
            removal = chosen.removal
            # What was learned about entering later was said from the old entry.
            corrected = {
                name: added for name, added in corrected.items() if name[0] != chosen.name[0] or name[0] in LAYERWISE
            }
            yield removal
        yield from self._given_back(removal, budget)

    def _given_back(self, removal: Removal, budget: float) -> Iterator[Removal]:
        """The last step may have saved more than was asked for: put back what helps most, while that fits."""
        while True:
            now = self._loss(removal)
            fitting = [r for r in removal.put_back() if self._flops(r) <= budget * self._flops.dense]
            best = min(fitting, key=self._loss, default=removal)
            if best is removal or self._loss(best) >= now:
                return
            removal = best
            yield removal

    def _ranked(self, removal: Removal, corrected: Mapping[tuple[str, int], float]) -> list[Option]:
        """Options by expected loss an operation saved, with the best entry of each kind only."""
        options = self.options(removal)
        floor = SMALLEST_STEP * self._flops.dense
        options = [o for o in options if o.saved >= floor] or options
        assert options, "the budget is below what can be reached"

        def price(option: Option) -> tuple[bool, float]:
            name = option.name
            expected = self._alone[name]
            if name[0] not in LAYERWISE and (entry := removal.entry_of(name[0])):
                expected -= self._alone[name[0], entry]
            return _price(corrected.get(name, expected), option.saved)

        seen: set[str] = set()
        best = []
        for option in sorted(options, key=price):
            what = option.name[0]
            if what in LAYERWISE or what not in seen:
                best.append(option)
                seen.add(what)
        return best

    def at_random(self, budget: float, matched: int, seed: int) -> Removal:
        """A plan within the budget that takes the same options in random order: what choosing must beat.

        Args:
            budget: share of the dense operations.
            matched: operations of the plan it is compared with. Of many draws the first that comes close is taken,
                since a plan that happens to cost much less would be an easy match.
            seed: of the draws.
        """
        draw = random.Random(seed)

        def distance(removal: Removal) -> float:
            return abs(self._flops(removal) - matched) / self._flops.dense

        best = self._draw(budget, draw)
        for _ in range(DRAWS):
            if distance(best) <= MATCH:
                break
            best = min(best, self._draw(budget, draw), key=distance)
        return best

    def _draw(self, budget: float, draw: random.Random) -> Removal:
        removal = Removal()
        while self._flops(removal) > budget * self._flops.dense:
            options = self.options(removal)
            # A kind enters one step later at a time, as modules go one at a time.
            steps = [o for o in options if o.name[0] in LAYERWISE]
            steps += [
                next(o for o in options if o.name[0] == k) for k in self._kinds if any(o.name[0] == k for o in options)
            ]
            removal = draw.choice(steps).removal
        return removal


def _price(added: float, saved: int) -> tuple[bool, float]:
    """Sorts options: first those that do not hurt, the largest first, then by loss an operation saved."""
    return (False, -saved) if added <= 0 else (True, added / max(saved, 1))


def single(name: tuple[str, int]) -> Removal:
    """The removal of one module, or the late entry of one kind, alone."""
    what, layer = name
    for module in LAYERWISE:
        if module == what:
            return Removal().without(module, layer)
    return Removal().entering(what, layer)
