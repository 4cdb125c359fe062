"""Answers to a question about pictures with all visual tokens, and without those of some classes."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparing.execute import apply
from sparing.plan import Policy
from sparing.policies import DropTokens, OfClass
from sparing.tokens import Group, TokenMap, TokenProfile
from sparing.tokens.profile import CLASSES

ALL_BUT_ALIVE = "all but alive"


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
        name: what is left out.
        classes: the classes that are left out.
        dropped: how many visual tokens that are.
        answer: the answer; `None` if it was not run, or if what is left out is drawn at random.
        controls: answers with as many random visual tokens left out in their place, one a seed.
        flops: operations of the prefill, encoder included, of those with all tokens.
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


def answers(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    profile: TokenProfile,
    counts: Mapping[str, int],
    *,
    seeds: int = 3,
    max_new_tokens: int = 24,
    repeats: int = 3,
    on_step: Callable[[str], None] = lambda line: None,
) -> tuple[Arm, ...]:
    """Ask with all visual tokens, then without those of each class, with the alive ones alone, and with none.

    Tokens are left out before the first layer (`DropTokens`), under `gathered`: what is gone costs nothing.

    Args:
        model: a Hugging Face model of a known family.
        processor: its processor.
        inputs: one prompt.
        profile: of the model's token classes.
        counts: how many visual tokens of each class the prompt has.
        seeds: random controls of each arm.
        max_new_tokens: most tokens of an answer.
        repeats: timed prefills of each arm, the arms in turns; 0 for none.
        on_step: called before each arm with what it is.
    """
    asking = _Asking(model, processor, inputs, max_new_tokens)
    on_step("the answer with all tokens")
    arms = [Arm("nothing", (), 0, asking.answer(None))]
    plans: dict[int, Policy | None] = {0: None}
    present = {name: n for name, n in counts.items() if n}
    visual = int(TokenMap.from_inputs(model, inputs).of(Group.IMAGE).sum())
    for name, classes in _prunings(present):
        dropped = sum(present.get(one, 0) for one in classes)
        if dropped in (0, visual):
            none = "every token is alive here" if name == ALL_BUT_ALIVE else "no token of this class is here"
            arms.append(
                Arm(name, classes, dropped, None, why="that is every visual token: see below" if dropped else none)
            )
            continue
        on_step(f"the answer without {name}")
        plan = DropTokens(where=OfClass(profile, classes))
        controls = [
            asking.answer(DropTokens(where=OfClass(profile, classes, control="random", seed=seed)))
            # Where all go, no others are left to draw.
            for seed in range(seeds if dropped < sum(present.values()) else 0)
        ]
        plans[len(arms)] = plan
        arms.append(Arm(name, classes, dropped, asking.answer(plan), tuple(controls)))
    if seeds and visual > 1:
        on_step("the answer without half of the visual tokens")
        halves = [DropTokens(groups=[Group.IMAGE], keep=0.5, seed=seed) for seed in range(seeds)]
        plans[len(arms)] = halves[0]
        arms.append(Arm("a random half", (), visual - visual // 2, None, tuple(map(asking.answer, halves))))
    on_step("the answer without any visual token")
    plans[len(arms)] = DropTokens(groups=[Group.IMAGE])
    arms.append(Arm("every visual token", CLASSES, visual, asking.answer(plans[len(arms)])))
    on_step("what each prefill costs")
    for i, (flops, kv, seconds) in asking.costs(plans, repeats).items():
        arms[i] = dataclasses.replace(arms[i], flops=flops, kv=kv, seconds=seconds)
    return tuple(arms)


def _prunings(present: Mapping[str, int]) -> list[tuple[str, tuple[str, ...]]]:
    """What is left out, by name: each class, both sinks where there are both, and all that is not alive."""
    sinks = [name for name in CLASSES if name.endswith("sink")]
    found: list[tuple[str, tuple[str, ...]]] = [(_said(name), (name,)) for name in CLASSES]
    if all(name in present for name in sinks):
        found.insert(len(sinks), ("all sinks", tuple(sinks)))
    return [*found, (ALL_BUT_ALIVE, tuple(name for name in CLASSES if name != "alive"))]


def _said(name: str) -> str:
    return {"vit_sink": "ViT sinks", "llm_sink": "LLM sinks"}.get(name, name)


class _Asking:
    """One prompt, asked under one plan after another."""

    def __init__(self, model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.inputs = model, processor.tokenizer, inputs
        self.most, self.first = max_new_tokens, -1

    def applied(self, policy: Policy | None) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if policy is None else apply(self.model, policy)

    @torch.inference_mode()
    def answer(self, policy: Policy | None) -> Answer:
        """The answer. The first one asked for says which first token the others are judged by."""
        end = self.tokenizer.pad_token_id
        with self.applied(policy):
            out = self.model.generate(
                **self.inputs,
                max_new_tokens=self.most,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.eos_token_id if end is None else end,
                return_dict_in_generate=True,
                output_logits=True,
            )
        new = out.sequences[0, self.inputs["input_ids"].shape[1] :]
        if self.first < 0:
            self.first = int(new[0])
        chance = float(out.logits[0][0].float().softmax(-1)[self.first])
        return Answer(self.tokenizer.decode(new, skip_special_tokens=True).strip(), chance)

    @torch.inference_mode()
    def costs(
        self, plans: Mapping[int, Policy | None], repeats: int
    ) -> dict[int, tuple[float, float, tuple[float, float, float] | None]]:
        """Shares of a prefill's operations and bytes by the ledger, and its seconds: median, fastest, slowest, in turns."""
        seconds: dict[int, list[float]] = {i: [] for i in plans}
        shares = dict.fromkeys(plans, (1.0, 1.0))
        for repeat in range(repeats + 1):
            # The order turns around, so that no arm always runs on the caches that the same other one left.
            for i in list(plans)[:: 1 if repeat % 2 else -1]:
                with self.applied(plans[i]) as run:
                    start = self._now()
                    self.model(**self.inputs, use_cache=True, logits_to_keep=1)
                    if repeat:
                        seconds[i].append(self._now() - start)
                    elif run is not None:
                        cost, dense = run.ledger.cost(), run.ledger.dense_cost()
                        shares[i] = cost.total / dense.total, cost.kv_bytes / dense.kv_bytes
        return {
            i: (*shares[i], (statistics.median(taken), min(taken), max(taken)) if taken else None)
            for i, taken in seconds.items()
        }

    def _now(self) -> float:
        device = self.inputs["input_ids"].device
        if isinstance(device, torch.device) and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
