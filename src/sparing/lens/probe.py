"""How good a lens is: the share of true words among its best, and what a trained linear probe gets out of the same states."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparing.lens.words import WordReading

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared norm that a probe may choose between."""


def precision_at_k(reading: WordReading, truth: Int[Tensor, "n ..."], k: int) -> Bool[Tensor, "levels n ..."]:
    """Which true words are among a reading's `k` best. The mean is the precision at `k`; its interval is the caller's (Wilson).

    Args:
        reading: of an embedding or logit lens, with `k` words or more.
        truth: the id of the true word of each token, or of several true words each; -1 where there is none, which is never found.
        k: how many of the best count.

    Raises:
        ValueError: the truth is about other tokens, or the reading has fewer words.
    """
    n, kept = reading.ids.shape[1:]
    if len(truth) != n:
        raise ValueError(
            f"the truth is about {len(truth)} tokens, the reading about {n}: give one row a token of its index"
        )
    if not 1 <= k <= kept:
        raise ValueError(f"expected 1 <= k <= {kept}, the words that were read, got k={k}: read with a larger k")
    truth = truth.to(reading.ids.device)
    best = reading.ids[:, :, :k]
    if truth.ndim == 1:
        return (best == truth[:, None]).any(-1)
    return (best[:, :, None] == truth[..., None]).any(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """What a linear probe got right.

    Attributes:
        right: which test states it named rightly.
        penalty: the penalty that was chosen.
        validation: accuracy on the validation part, by penalty.
        classes: the labels that it could name.
    """

    right: Bool[Tensor, " n"]
    penalty: float
    validation: dict[float, float]
    classes: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """The share of test states that it named rightly."""
        return self.right.float().mean().item()

    def __float__(self) -> float:
        return self.accuracy


def linear_probe(
    train_states: Float[Tensor, "m d"],
    train_labels: Int[Tensor, " m"],
    test_states: Float[Tensor, "n d"],
    test_labels: Int[Tensor, " n"],
    *,
    seed: int = 0,
) -> Probed:
    """The ceiling of any lens: multinomial logistic regression from states to labels.

    What a probe finds is in the states; whether the model uses it is another question. Features are scaled by the mean and
    deviation of the training states. A fifth of these, drawn by seed, chooses the penalty on the weights; the probe is then trained
    on all of them. The loss is convex, so nothing else is random.

    Args:
        train_states: states to learn from; of other pictures than the test states, or the probe knows the answers.
        train_labels: what each shows.
        test_states: states to name.
        test_labels: what each shows. A label that is not among the training labels is never named.
        seed: of the validation part.

    Raises:
        ValueError: fewer than ten training states or two labels, no test states, or states that are not finite.
    """
    if len(train_states) != len(train_labels) or len(test_states) != len(test_labels):
        raise ValueError(
            f"expected a label a state, got {len(train_labels)} for {len(train_states)} training states and "
            f"{len(test_labels)} for {len(test_states)} test states"
        )
    classes, target = train_labels.unique(return_inverse=True)
    if len(train_states) < 10 or len(classes) < 2 or not len(test_states):
        raise ValueError(
            f"a probe needs ten training states or more, of two labels or more, and a test state; got {len(train_states)} of "
            f"{len(classes)} and {len(test_states)}"
        )
    if not bool(torch.isfinite(train_states).all()) or not bool(torch.isfinite(test_states).all()):
        raise ValueError("states that are not finite cannot be probed: load the model in float32 or bfloat16")
    train, test = train_states.float(), test_states.float()
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, used = order[: len(train) // 5], order[len(train) // 5 :]
    validation = {}
    for penalty in PENALTIES:
        weight, bias = _fit(train[used], target[used], len(classes), penalty)
        named = (train[held] @ weight.T + bias).argmax(1)
        validation[penalty] = (named == target[held]).float().mean().item()
    # The strongest of the best: the simpler probe where both name alike.
    penalty = max(PENALTIES, key=lambda each: (validation[each], each))
    weight, bias = _fit(train, target, len(classes), penalty)
    named = classes[(test @ weight.T + bias).argmax(1)]
    return Probed(named == test_labels.to(named.device), penalty, validation, tuple(classes.tolist()))


def _fit(states: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights `[classes d]` and biases of the minimum of mean cross entropy plus `penalty` times half the squared weights."""
    weight = torch.zeros(classes, states.shape[1], device=states.device, requires_grad=True)
    bias = torch.zeros(classes, device=states.device, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(states @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
