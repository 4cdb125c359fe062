"""Text that a model under policies writes: tokens up to each row's own stop, and what that took."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from sparing.evaluate import statistics
from sparing.evaluate.task import Figure
from sparing.evaluate.tasks.metering import Meter

# Tokens beyond those of a stop string that are looked at with it: the model may spell it otherwise than the tokenizer.
_SLACK = 2


@dataclasses.dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt.

    Attributes:
        ids: its tokens, up to and including the one that ended it.
        finished: whether it ended itself, with an end token or a stop string; else it was cut off at the limit.
        seconds: this row's part of the batch's seconds: of the prefill by prompt tokens, of the decoding by written tokens.
    """

    ids: tuple[int, ...]
    finished: bool
    seconds: float


@torch.inference_mode()
def write(
    model: nn.Module,
    tokenizer: Any,
    meter: Meter,
    ids: Int[Tensor, "b t"],
    mask: Int[Tensor, "b t"],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    after: str | None = None,
    **sampling: Any,
) -> list[Written]:
    """Let the model write after prompts, all at once.

    Args:
        model: a Hugging Face model, inside the run of `meter`.
        tokenizer: its tokenizer.
        meter: is told what it took.
        ids: the prompts, padded on the left.
        mask: 1 where there is no padding.
        max_new_tokens: most tokens to write.
        stop: a row ends where its text holds one of these.
        after: stop strings count only after this text (the end of the thinking).
        sampling: as `generate` takes it; greedy by default.

    Returns:
        One a row.
    """
    ids, mask = ids.to(meter.device), mask.to(meter.device)
    watch = _Watch(tokenizer, meter, ids.shape, _end_tokens(model, tokenizer), stop, after)
    pad = tokenizer.pad_token_id
    start = meter.now()
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList([watch]),
        eos_token_id=sorted(watch.ends) or None,
        pad_token_id=0 if pad is None else pad,
        use_cache=True,
        **{"do_sample": False, **sampling},
    )
    end = meter.now()
    middle = end if watch.first is None else watch.first
    meter.book(ids.shape[0], middle - start, end - middle)
    new = out[:, ids.shape[1] :].tolist()
    lengths = [n or watch.steps for n in watch.lengths]
    prompts = mask.sum(1).tolist()
    return [
        Written(
            ids=tuple(row[:n]),
            finished=stopped > 0,
            seconds=(middle - start) * p / sum(prompts) + (end - middle) * n / sum(lengths),
        )
        for row, n, stopped, p in zip(new, lengths, watch.lengths, prompts, strict=True)
    ]


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end a text, by the model's generation config and by the tokenizer."""
    config: Any = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ends = {named} if isinstance(named, int) else set(named or ())
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


class _Watch(StoppingCriteria):
    """Ends rows one by one, counts their tokens, and notes when the first token was there."""

    def __init__(
        self, tokenizer: Any, meter: Meter, shape: torch.Size, ends: set[int], stop: Sequence[str], after: str | None
    ) -> None:
        self.tokenizer, self.meter, self.start, self.ends = tokenizer, meter, shape[1], ends
        self.stop, self.after = [text for text in stop if text], after
        self.lengths = [0] * shape[0]
        """Tokens of the rows that ended themselves, the last one included; 0 for the others."""
        self.steps = 0
        self.first: float | None = None
        self.thinking = [after is not None] * shape[0]
        self.thought = [0] * shape[0]
        """Tokens of the thinking: a stop string in them must not count later either."""
        texts = [*self.stop, *([after] if after else [])]
        self.window = _SLACK + max((len(tokenizer.encode(text, add_special_tokens=False)) for text in texts), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done."""
        if self.first is None:
            self.first = self.meter.now()
        self.steps += 1
        tail = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        for i, row in enumerate(tail):
            if not self.lengths[i] and (row[-1] in self.ends or self._stops(i, row)):
                self.lengths[i] = self.steps
        return torch.tensor([n > 0 for n in self.lengths], device=input_ids.device)

    def _stops(self, i: int, tail: list[int]) -> bool:
        if not self.stop:
            return False
        if self.thinking[i]:
            assert self.after is not None
            _, found, text = self.tokenizer.decode(tail).partition(self.after)
            self.thinking[i] = not found
            self.thought[i] = self.steps
        else:
            text = self.tokenizer.decode(tail[-(self.steps - self.thought[i]) :])
        return not self.thinking[i] and any(stop in text for stop in self.stop)


def writing_figures(
    solved: Sequence[bool] | None, written: Sequence[Written], meter: Meter, *, seed: int
) -> dict[str, Figure]:
    """What is always told of generation beside its accuracy: length, truncation, speed, seconds a solved problem.

    Args:
        solved: which answers are right; `None` where the score is no yes or no.
        written: the answers.
        meter: of the task.
        seed: of the bootstrap.
    """
    lengths = [len(w.ids) for w in written]
    mean, median = statistics.mean(lengths, seed=seed), statistics.median(lengths, seed=seed)
    cut = statistics.share(sum(not w.finished for w in written), len(written))
    found = {
        "output_tokens": as_figure(mean, "lower", "tokens"),
        "output_tokens_median": as_figure(median, "lower", "tokens"),
        "truncated": as_figure(cut, "lower", "share"),
    }
    seconds = sum(meter.seconds.values())
    if seconds > 0:
        found["tokens_per_second"] = Figure(sum(lengths) / seconds, n=len(written), better="higher", unit="tokens/s")
    if solved is not None:
        each = statistics.ratio([w.seconds for w in written], [float(s) for s in solved], seed=seed)
        found["seconds_per_solved"] = as_figure(each, "lower", "seconds")
    return found


def as_figure(found: statistics.Interval, better: Any, unit: str) -> Figure:
    """An interval as a figure; without ends where nothing could be told."""
    known = found.low > -float("inf")
    return Figure(
        value=found.value,
        low=found.low if known else None,
        high=found.high if known else None,
        n=found.n,
        better=better,
        unit=unit,
    )
