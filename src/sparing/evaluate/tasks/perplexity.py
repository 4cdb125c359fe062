"""The loss, perplexity and bits per byte of a model on a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from sparing.anatomy import anatomy_of
from sparing.evaluate import statistics
from sparing.evaluate.loss import measure_under
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.writing import as_figure
from sparing.evaluate.windows import Windows, cut, read_text, tokenize


@dataclasses.dataclass(frozen=True)
class PerplexityTask(Task):
    """Next-token loss on a text, each token predicted once, in windows that know nothing of each other.

    A last window that is shorter than the others is left out, so that every window weighs the same.

    Attributes:
        text: UTF-8 text, plain or gzipped.
        window: most tokens of a window; short windows make every model look worse, so compare at one length only.
        max_tokens: most tokens of the text to use.
        batch: windows of a batch; by default as many as keep the logits small.
    """

    text: Path
    window: int = 512
    max_tokens: int = 65536
    batch: int | None = None

    def check(self) -> None:
        """Look at the settings and the text."""
        for name, least in (("window", 8), ("max_tokens", 128)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch={self.batch}: expected at least 1 window, or none given")
        read_text(self.text)

    def files(self) -> tuple[Path, ...]:
        """The text."""
        return (self.text,)

    def work(self, subject: Subject) -> float | None:
        """Tokens of the text, as far as can be told before it is cut: a byte is at most a token."""
        return float(min(self.max_tokens, self.text.stat().st_size))

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Measure."""
        self.check()
        tell = on_step or (lambda done, word: None)
        anatomy = anatomy_of(subject.model)
        longest = anatomy.text_config.max_position_embeddings
        source = tokenize(subject.tokenizer, read_text(self.text), self.max_tokens)
        windows = cut(source.ids, min(self.window, longest), bos=source.bos)
        if int(windows.ids.max()) >= anatomy.shape().vocabulary:
            raise NotApplicable(
                "the tokenizer has tokens that the model does not know: they belong to different checkpoints"
            )
        whole = windows.valid.all(1)
        if len(windows) > 1 and not bool(whole.all()):
            windows = Windows(windows.ids[whole], windows.valid[whole])
        tell(0.0, f"{len(windows)} windows of {windows.length} tokens")
        found = measure_under(subject.applied, subject.model, windows, batch=self.batch)
        tell(1.0, f"loss {found.mean:.4f}")
        losses = found.windows.tolist()
        # Windows are few and alike: t, which holds for three of them as well, where a bootstrap would be too sure.
        loss = statistics.weighted_mean(losses)
        sizes = _bytes_of(windows, subject.tokenizer)
        bits = [
            nats * n / math.log(2) / size for nats, n, size in zip(losses, found.predicted.tolist(), sizes, strict=True)
        ]
        figures = {
            "loss": as_figure(loss, "lower", "nats/token"),
            "perplexity": as_figure(
                dataclasses.replace(loss, value=math.exp(loss.value), low=_exp(loss.low), high=_exp(loss.high)),
                "lower",
                "",
            ),
            "bits_per_byte": as_figure(statistics.weighted_mean(bits, sizes), "lower", "bits/byte"),
            "flops_share": Figure(found.ratio, n=len(windows), better="lower", unit="share"),
            "kv_share": Figure(found.kv_bytes / found.dense_kv_bytes, n=len(windows), better="lower", unit="share"),
        }
        details = {
            "tokens": int(found.predicted.sum()),
            "windows": len(windows),
            "window": windows.length,
            "cost": {
                "flops": {"prefill": found.flops},
                "dense_flops": {"prefill": found.dense_flops},
                "kv_bytes": found.kv_bytes,
                "dense_kv_bytes": found.dense_kv_bytes,
            },
        }
        return Outcome(figures, {"loss": {str(i): value for i, value in enumerate(losses)}}, details)


def _exp(x: float) -> float:
    """An end of an interval; what cannot be told stays so."""
    return -math.inf if x == -math.inf else math.exp(x) if x < 700 else math.inf


def _bytes_of(windows: Windows, tokenizer: Any) -> list[int]:
    """Bytes of text that the predicted tokens of each window stand for."""
    sizes = []
    for ids, valid in zip(windows.ids, windows.valid, strict=True):
        row = ids[valid.to(torch.bool)].tolist()
        # With the token before, because a decoder may eat the first token's space.
        sizes.append(max(1, _size(tokenizer, row) - _size(tokenizer, row[:1])))
    return sizes


def _size(tokenizer: Any, ids: list[int]) -> int:
    return len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
