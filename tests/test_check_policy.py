"""Design test 4: every policy keeps the contract on both families, and `check_policy` notices those that do not."""

import pytest
import torch

import models
from policy_cases import wide
from sparing.execute import check_policy
from sparing.plan import LayerPlan, Policy
from sparing.policies import DropTokens


@pytest.mark.parametrize("family", ["text", "pictures"])
def test_every_policy(policy_case, family, tiny_llama, tiny_llava, text_batch, llava_batch):
    """Both families; `check_policy` itself pads left and right."""
    if policy_case.pictures and family == "text":
        pytest.skip("without pictures it is idle")
    model, batch = (tiny_llama, text_batch) if family == "text" else (tiny_llava, llava_batch)
    check_policy(lambda: policy_case.make(model), model, batch("left"), regroup=policy_case.regroup)


class Broken(Policy):
    """Runs some tokens' MLP alone; subclasses say which, wrongly."""

    def which(self, view):
        return view.new.valid

    def plan_attend(self, view):
        return LayerPlan(feed=self.which(view))


class Random(Broken):
    """Another choice each time."""

    def which(self, view):
        return torch.rand(view.new.group.shape) < 0.5


class CountsPadding(Broken):
    """Every other column, wherever a row begins."""

    def which(self, view):
        return (torch.arange(view.tokens.length) % 2 == 0)[-view.new.length :].expand_as(view.new.group)


class ReadsPadding(Broken):
    """Above the mean of the row, padding included."""

    def which(self, view):
        size = view.residual.norm(dim=-1)
        return size > size.mean(1, keepdim=True) if view.prefill else torch.ones_like(size, dtype=torch.bool)


class LooksAtOtherRows(Broken):
    """Above the mean of the batch."""

    def which(self, view):
        size = view.residual.norm(dim=-1) * view.new.valid
        return size > size.sum() / view.new.valid.sum()


class RemembersPrompts(Broken):
    """Its state is its own, not the run's."""

    calls = 0

    def which(self, view):
        self.calls += 1
        return (view.tokens.valid.long().cumsum(1) % (2 + self.calls % 7) != 0)[:, -view.new.length :]


class NotCausal(Broken):
    """The newest tokens skip, however many come."""

    def which(self, view):
        left = view.tokens.valid.flip(1).long().cumsum(1).flip(1)
        return (left > 3)[:, -view.new.length :]


class NotReordered(Broken):
    """Keeps what it knows of rows as text, which no one reorders."""

    causal = False
    decodes = True

    def which(self, view):
        if view.prefill:
            view.state["odd"] = {"rows": str((view.tokens.valid.sum(1) % 2).tolist())}
        odd = torch.tensor([int(c) for c in view.state["odd"]["rows"] if c.isdigit()]).bool()
        return view.new.valid & (odd[:, None] if len(odd) == len(view.new.group) and not view.prefill else True)


class BreaksPromise(Broken):
    """More tokens than its capacity."""

    causal = False

    def plan_attend(self, view):
        return LayerPlan(feed=view.new.valid.clone(), capacity=3)


class CountsWrong(Broken):
    """Writes another layer's record."""

    def plan_attend(self, view):
        if view.layer:
            view._run.record.layers[view.layer - 1].feed = False
        return LayerPlan()


class LeavesHook(Broken):
    """Hooks the model and stays."""

    def __init__(self, model):
        self.model = model

    def plan_attend(self, view):
        self.model.lm_head.register_forward_hook(lambda *_: None)
        return LayerPlan()


class DeadRouter(torch.nn.Module, Broken):
    """A router whose score is used without its gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router = torch.nn.Linear(42, 1)

    def which(self, view):
        return self.router(view.residual).squeeze(-1) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Random, "two calls"),
        (CountsPadding, "left-padded batch"),
        (ReadsPadding, "left-padded batch"),
        (LooksAtOtherRows, "batch"),
        (RemembersPrompts, "two calls"),
        (NotCausal, "says causal=True"),
        (NotReordered, "reordered"),
        (CountsWrong, "feed rows"),
        (DeadRouter, "no gradient reaches"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_policies(make, message, tiny_llama, text_batch):
    with pytest.raises(AssertionError, match=message):
        check_policy(make, tiny_llama, text_batch("left"))


def test_broken_promise(tiny_llama, text_batch):
    """Found by the executor itself where looking costs nothing."""
    with pytest.raises(ValueError, match="promises at most 3 tokens a row, but a row has 17"):
        check_policy(BreaksPromise, tiny_llama, text_batch("left"))


def test_a_hook_left_behind():
    model = models.llama.__wrapped__()
    with pytest.raises(AssertionError, match="left on the model"):
        check_policy(lambda: LeavesHook(model), model, models.text_batch("left"))


def test_sound_policy_of_the_same_kind(tiny_llama, text_batch):
    """What the broken ones inherit is sound."""
    check_policy(Broken, tiny_llama, text_batch("right"))


class OneRow(Policy):
    """Masks of one row stand for the whole batch."""

    def plan_attend(self, view):
        mask = ((torch.arange(view.tokens.length) + view.layer) % 3 != 0)[None, -view.new.length :]
        return LayerPlan(attend=mask, feed=~mask, read=mask, feed_weight=0.5 * ~mask)


class Halved(Policy):
    """Weights of dropped tokens too, which must not count."""

    def plan_attend(self, view):
        half = torch.full(view.new.group.shape, 0.5)
        return LayerPlan(attend_weight=half, feed_weight=half)


def test_weights_of_dropped_tokens(tiny_llama, text_batch):
    check_policy(lambda: Halved() & DropTokens(wide), tiny_llama, text_batch("right"))


def test_masks_of_one_row(tiny_llama, text_batch):
    check_policy(OneRow, tiny_llama, text_batch("none"))


def test_refusals(tiny_llama, text_batch):
    model = models.llama.__wrapped__().train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        check_policy(Broken, model, text_batch("left"))
    with pytest.raises(ValueError, match="cannot split"):
        check_policy(Broken, tiny_llama, {**text_batch("left"), "token_type_ids": torch.zeros(3, 17)})
