"""The mean next-token loss of a model on a text, under a plan or without."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.evaluate.windows import Windows
from sparing.execute import Run, apply
from sparing.plan import Policy
from sparing.plan.cost import PARTS

# Logits of one forward pass may take this much memory.
LOGIT_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True, eq=False)
class TextLoss:
    """A model's loss on windows, and what computing it cost.

    Attributes:
        tokens: nats of every predicted token; 0 for padding. Column `i` predicts token `i + 1` of its window.
        windows: mean nats a predicted token, a window.
        predicted: predicted tokens, a window.
        flops: operations of the prefill by part, from the ledger.
        dense_flops: the same with nothing left out.
        kv_bytes: bytes of keys and values that can be read afterwards.
        dense_kv_bytes: the same with nothing left out.
        states: the ledger's table of what became of every token, if it was asked for.
    """

    tokens: Float[Tensor, "n w_minus_1"]
    windows: Float[Tensor, " n"]
    predicted: Int[Tensor, " n"]
    flops: dict[str, int]
    dense_flops: dict[str, int]
    kv_bytes: int
    dense_kv_bytes: int
    states: Int[Tensor, "layers 2 n w"] | None = None

    @property
    def mean(self) -> float:
        """Nats a predicted token."""
        return mean_loss(self.windows.tolist(), self.predicted.tolist())

    @property
    def ratio(self) -> float:
        """Operations as a share of the dense model's."""
        return sum(self.flops.values()) / sum(self.dense_flops.values())


def mean_loss(windows: list[float], predicted: list[int]) -> float:
    """The loss a token from the losses of windows, which may be of different lengths."""
    return math.fsum(loss * n for loss, n in zip(windows, predicted, strict=True)) / sum(predicted)


def text_loss(
    model: nn.Module, windows: Windows, *policies: Policy, states: bool = False, batch: int | None = None
) -> TextLoss:
    """Measure the loss of a model under policies.

    Args:
        model: a Hugging Face model of a known family.
        windows: the text.
        policies: what decides; the stock model without any.
        states: also return the ledger's table.
        batch: windows of one forward pass; by default as many as keep the logits small.

    Raises:
        ValueError: a logit is NaN or infinite; the message says where that comes from.
    """
    return measure_under(lambda: apply(model, *policies), model, windows, states=states, batch=batch)


def measure_under(
    applied: Callable[[], AbstractContextManager[Run]],
    model: nn.Module,
    windows: Windows,
    *,
    states: bool = False,
    batch: int | None = None,
) -> TextLoss:
    """Measure the loss of a model inside a context that `sparing.apply` makes (see `text_loss`)."""
    shape = anatomy_of(model).shape()
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    batch = batch or max(1, LOGIT_BYTES // (4 * windows.length * shape.vocabulary))
    parts = (windows.rows(slice(start, start + batch)) for start in range(0, len(windows), batch))
    return measure_batches(applied, model, (batch_of(part, device) for part in parts), states=states)


class Batch(NamedTuple):
    """One forward pass whose last positions are predicted.

    Attributes:
        inputs: what the model is called with, on its device.
        targets: the tokens at the last positions; the logits of the position before each predict it.
        scored: which of them count.
    """

    inputs: Mapping[str, Any]
    targets: Int[Tensor, "b p"]
    scored: Bool[Tensor, "b p"]


def batch_of(windows: Windows, device: torch.device) -> Batch:
    """Windows as a batch in which every token but the first is predicted."""
    ids, valid = windows.ids.to(device), windows.valid.to(device)
    mask = None if bool(windows.valid.all()) else valid.long()
    return Batch({"input_ids": ids, "attention_mask": mask}, ids[:, 1:], valid[:, 1:])


@torch.inference_mode()
def measure_batches(
    applied: Callable[[], AbstractContextManager[Run]],
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    states: bool = False,
) -> TextLoss:
    """Measure the loss of a model on batches, inside a context that `sparing.apply` makes.

    Args:
        applied: makes the context.
        model: a Hugging Face model of a known family.
        batches: what it is called with. Rows of batches of other widths are padded on the left in the result.
        states: also return the ledger's table; the batches must then be of one length.

    Raises:
        ValueError: a logit is NaN or infinite; the message says where that comes from.
    """
    tokens, predicted, tables = [], [], []
    spent: dict[str, int] = dict.fromkeys(PARTS, 0)
    dense: dict[str, int] = dict.fromkeys(PARTS, 0)
    kv = dense_kv = 0
    broken: Batch | None = None
    with applied() as run:
        for part in batches:
            logits = model(**part.inputs, use_cache=False).logits[:, :-1]
            if not bool(torch.isfinite(logits[part.scored]).all()):
                broken = part
                break
            nats = F.cross_entropy(logits.float().transpose(1, 2), part.targets, reduction="none")
            tokens.append((nats * part.scored).cpu())
            predicted.append(part.scored.sum(1).cpu())
            cost, full = run.ledger.cost(), run.ledger.dense_cost()
            for name in PARTS:
                spent[name] += cost.prefill.flops[name]
                dense[name] += full.prefill.flops[name]
            kv, dense_kv = kv + cost.kv_bytes, dense_kv + full.kv_bytes
            if states:
                tables.append(run.ledger.states())
    if broken is not None:
        # Outside the context, where the model's own layers run.
        raise ValueError(explain_not_finite(model, broken))
    longest = max(part.shape[1] for part in tokens)
    nats = torch.cat([F.pad(part, (longest - part.shape[1], 0)) for part in tokens])
    counts = torch.cat(predicted)
    return TextLoss(
        tokens=nats,
        windows=(nats.double().sum(1) / counts.clamp(min=1)).float(),
        predicted=counts,
        flops=spent,
        dense_flops=dense,
        kv_bytes=kv,
        dense_kv_bytes=dense_kv,
        states=torch.cat(tables, dim=2) if states else None,
    )


def check_finite(model: nn.Module, windows: Windows) -> None:
    """Run one window through the stock model.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    text_loss(model, windows.rows(slice(0, 1)))


@torch.inference_mode()
def explain_not_finite(model: nn.Module, batch: Batch) -> str:
    """Say why logits are not finite: broken weights, or the first layer whose result is not."""
    broken = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        names = ", ".join(broken[:3]) + more
        return f"the weights contain NaN or infinite values: {names}; the checkpoint is damaged, save it again"
    anatomy = anatomy_of(model)
    first: list[int] = []
    mask = batch.inputs.get("attention_mask")
    valid = torch.ones_like(batch.inputs["input_ids"]).bool() if mask is None else mask.bool()

    def watch(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if not bool(torch.isfinite(hidden[valid]).all()):
                first.append(layer)

        return hook

    with contextlib.ExitStack() as stack:
        for i, module in enumerate(anatomy.layers):
            stack.callback(module.register_forward_hook(watch(i)).remove)
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    if bool(torch.isfinite(logits[batch.scored]).all()):
        return "logits are NaN or infinite under this plan, though not in the stock model: try --dtype float32"
    where = f"first in layer {first[0]}" if first else "after the last layer"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"the model's logits are NaN or infinite, {where}: {dtype} may be too narrow for it, try --dtype float32"
