"""Checks of a model without any policy: what has to hold before a policy can be judged."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from sparing.anatomy import anatomy_of
from sparing.checkpoint import load, release, save
from sparing.evaluate.checkup.findings import Finding
from sparing.evaluate.checkup.probe import SEARCHES, Difference, Pass, Probe, seeded
from sparing.policies import SkipGPT, SkipModules

LOADS = "loads"
REPORT = "please report it with run.json; until then keep to the stock model"
STRICTER = "run it again with --dtype float32: if that passes, it was rounding; if not, " + REPORT


def cure(probe: Probe) -> str:
    """What to do where two ways to compute the same differ."""
    return REPORT if probe.exact else STRICTER


def check_loads(probe: Probe) -> Finding:
    """Known family, finite weights, finite logits."""
    family, name = anatomy_of(probe.model), LOADS
    bad = [n for n, p in probe.model.named_parameters() if p.is_floating_point() and not bool(p.isfinite().all())]
    if bad:
        return Finding(
            name,
            "fails",
            f"The weights contain NaN or infinite values: {bad[0]}.",
            {"tensors": bad},
            "download or save them again; the other checks were left out",
        )
    for batch in probe.batches.values():
        if not bool(probe.stock(batch).logits[batch["attention_mask"].bool()].isfinite().all()):
            sentence = (
                f"The stock model's logits contain NaN or infinite values; they begin {_first_broken(probe, batch)}."
            )
            what = (
                "run it again with --dtype bfloat16, whose range is wider"
                if probe.dtype == torch.float16
                else ("no policy can help: look at the weights there")
            )
            return Finding(name, "fails", sentence, {}, f"{what}; the other checks were left out")
    count = sum(p.numel() for p in probe.model.parameters())
    shown = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    sentence = f"A known family ({family.config.model_type}), {len(family.layers)} layers, {shown} parameters, all numbers finite."
    return Finding(name, "ok", sentence)


def check_idle(probe: Probe) -> Finding:
    """With no policy nothing changes: bit-equal logits, and nothing left on the model."""
    name, marks = "apply without a policy", None
    for side, batch in probe.batches.items():
        stock = probe.stock(batch).logits
        # transformers puts hooks of its own on a model at its first pass.
        marks = _marks(probe.model) if marks is None else marks
        for execute in ("dense", "gathered"):
            if not torch.equal(probe.planned(batch, [], execute).logits, stock):
                return Finding(
                    name, "fails", f"The logits change under execute={execute!r} ({side} padding).", {}, REPORT
                )
    if _marks(probe.model) != marks:
        return Finding(name, "fails", "Something stays on the model afterwards: an attribute or a hook.", {}, REPORT)
    return Finding(name, "ok", "The logits are the stock model's to the last bit, and nothing stays on the model.")


def check_forced(probe: Probe) -> Finding:
    """The executors' own arithmetic with everything computed."""
    errors = {}
    for execute in ("dense", "gathered"):
        found = Difference()
        for batch in probe.batches.values():
            stock, planned = probe.stock(batch), probe.planned(batch, [], execute, force=True)
            found = found.worse(probe.difference(Pass(planned.logits), stock, batch["attention_mask"]))
        errors[execute] = found.error
    numbers = {**errors, "allowed": probe.tolerance}
    name, worst = "both executors, everything computed", max(errors, key=lambda key: errors[key])
    if errors[worst] > probe.tolerance:
        sentence = f"{worst} computes something else than the stock model: {off(errors[worst], probe)}."
        return Finding(name, "fails", sentence, numbers, cure(probe))
    return Finding(name, "ok", f"They compute what the stock model computes: {off(errors[worst], probe)}.", numbers)


def check_padding(probe: Probe) -> Finding:
    """Rows alone, and padded on either side: the stock model, and the fast executor."""
    name, errors = "padding", {"stock": 0.0, "gathered": 0.0}
    runs: Mapping[str, Callable[[Any], Pass]] = {
        "stock": probe.stock,
        "gathered": lambda batch: Pass(probe.planned(batch, [], "gathered", force=True).logits),
    }
    for arm, run in runs.items():
        errors[arm] = probe.padding(run).error
    numbers = {**errors, "allowed": probe.tolerance}
    if errors["stock"] > probe.tolerance:
        sentence = f"The stock model itself answers otherwise when a row is padded: {off(errors['stock'], probe)}."
        return Finding(
            name, "fails", sentence, numbers, "its attention does not keep to the mask: use batches of one, or mend it"
        )
    if errors["gathered"] > probe.tolerance:
        return Finding(
            name, "fails", f"Padding changes the answer: {off(errors['gathered'], probe)}.", numbers, cure(probe)
        )
    worst = max(errors.values())
    return Finding(name, "ok", f"A row answers alike alone and padded left or right: {off(worst, probe)}.", numbers)


def check_generation(probe: Probe) -> Finding:
    """Idle: the stock model's tokens. Forced through the fast executor: the same, but for near ties."""
    name, near = "generate()", []
    for search in SEARCHES:
        stock = probe.generate(search, None)
        for execute in ("dense", "gathered"):
            idle = probe.generate(search, [], execute)
            if not torch.equal(idle[0], stock[0]):
                return Finding(
                    name, "fails", f"{search} under apply({execute!r}) without a policy finds other tokens.", {}, REPORT
                )
        rows, margin = probe.token_difference(probe.generate(search, [], "gathered", force=True), stock)
        if rows and not allowed(probe, search, margin):
            sentence = f"The fast executor finds other tokens with {search} in {rows} of {len(stock[0])} rows."
            return Finding(name, "fails", sentence, {"rows": rows, "margin": margin, "search": search}, cure(probe))
        near += [search] * bool(rows)
    sentence = f"Greedy, sampling and beams find the stock model's tokens{but_for(near, probe)}."
    return Finding(name, "ok", sentence, {"tokens": probe.steps, "near_ties": near})


def allowed(probe: Probe, search: str, margin: float) -> bool:
    """Whether other tokens are a matter of rounding: a near tie; draws and beams cannot be told in low precision."""
    return margin <= probe.tolerance if search == "greedy" else not probe.exact


def but_for(near: list[str], probe: Probe) -> str:
    """Where tokens differ by rounding, in words."""
    if not near:
        return ""
    if near == ["greedy"]:
        return ", but for a near tie"
    dtype = str(probe.dtype).removeprefix("torch.")
    return f", but with {' and '.join(near)}, as rounding in {dtype} can make it (--dtype float32 tells)"


def check_reload(probe: Probe) -> Finding:
    """`sparing.save` -> `sparing.load` -> the same tokens; a stock load refuses the folder."""
    name = "save and load"
    size = sum(p.numel() * p.element_size() for p in probe.model.parameters())
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < 1.2 * size:
        short = (
            f"Not tried: it needs {size / 2**30:.1f} GiB in {tempfile.gettempdir()}, {free / 2**30:.1f} GiB are free."
        )
        return Finding(name, "not applicable", short)
    device = next(probe.model.parameters()).device
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * size:
        return Finding(name, "not applicable", "Not tried: a second copy of the model has no room on the device.")
    depth = len(anatomy_of(probe.model).layers)
    with seeded(probe.seed):
        policies = [SkipModules([depth - 1], []), SkipGPT.for_model(probe.model)]
    before = probe.generate("greedy", policies)[0]
    batch = {key: value for key, value in probe.batches["left"].items() if key != "position_ids"}
    with tempfile.TemporaryDirectory(prefix="sparing-check-") as folder:
        path = save(probe.model, Path(folder) / "model", policies)
        model, _ = load(path, device=batch["input_ids"].device, attention=anatomy_of(probe.model).attention_backend)
        after = probe.tokens_of(model, batch, "greedy")[0]
        release(model)
        try:
            AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError):
            silent = False
        else:
            silent = True
    if silent:
        return Finding(
            name, "fails", "Stock from_pretrained reads the folder, and would lose the policies.", {}, REPORT
        )
    if not torch.equal(before, after):
        return Finding(name, "fails", "The model generates other tokens after save and load.", {}, REPORT)
    return Finding(
        name, "ok", "Saved with policies and loaded again, it generates the same tokens; a stock load refuses it."
    )


def off(error: float, probe: Probe, allowed: float | None = None) -> str:
    """A difference of logits in words."""
    allowed = probe.tolerance if allowed is None else allowed
    return f"largest difference {short(error)} of the largest logit, allowed {short(allowed, 0)}"


def short(value: float, digits: int = 1) -> str:
    """A small number: `1.2e-6`."""
    return f"{value:.{digits}e}".replace("e-0", "e-")


def _first_broken(probe: Probe, batch: Mapping[str, Any]) -> str:
    """Where on the way through the model the first number is that is none."""
    layers, mask = anatomy_of(probe.model).layers, batch["attention_mask"].bool()
    broken: list[str] = []

    def look(at: str, states: torch.Tensor) -> None:
        if not broken and not bool(states[mask].isfinite().all()):
            broken.append(at)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        look(
            "before the first layer, in the embeddings or the pictures' features",
            args[0] if args else kwargs["hidden_states"],
        )

    with contextlib.ExitStack() as stack:
        stack.callback(layers[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for i, layer in enumerate(layers):

            def after(_: nn.Module, __: Any, out: Any, at: str = f"in layer {i}") -> None:
                look(at, out[0] if isinstance(out, tuple) else out)

            stack.callback(layer.register_forward_hook(after).remove)
        probe.stock(batch)
    return broken[0] if broken else "after the last layer, in the final norm or the head"


def _marks(model: nn.Module) -> dict[str, Any]:
    """Everything that could be left on a model."""
    return {
        name: (set(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()
    }


MODEL_CHECKS: Mapping[str, Callable[[Probe], Finding]] = {
    "loads": check_loads,
    "apply without a policy": check_idle,
    "both executors, everything computed": check_forced,
    "padding": check_padding,
    "generate()": check_generation,
    "save and load": check_reload,
}
