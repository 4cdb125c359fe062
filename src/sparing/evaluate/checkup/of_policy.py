"""Checks of one policy on a model, each over all its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from sparing.checkpoint.registry import describe, rebuild, tensors_of
from sparing.evaluate.checkup.findings import Finding
from sparing.evaluate.checkup.of_model import REPORT, allowed, but_for, cure, off
from sparing.evaluate.checkup.probe import SEARCHES, Difference, Pass, Probe, relative
from sparing.evaluate.checkup.subjects import Subject
from sparing.plan import Policy


def check_noop(probe: Probe, subject: Subject) -> Finding:
    """On text alone a vision policy leaves every bit as it is."""
    name = "text alone"
    row = next(row for row in probe.inputs.rows[::-1] if "pixel_values" not in row)
    stock = probe.stock(row).logits
    for make in subject.make:
        for execute in ("dense", "gathered"):
            if not torch.equal(probe.planned(row, [make()], execute).logits, stock):
                return Finding(name, "fails", f"It changes a prompt without pictures ({execute}).", {}, REPORT)
    if probe.inputs.pictures:
        return Finding(name, "ok", "A prompt without pictures gives the stock model's logits to the last bit.")
    sentence = "Nothing to do without pictures: an exact no-op, the logits are the stock model's to the last bit."
    return Finding(name, "not applicable", sentence)


def check_executors(probe: Probe, subject: Subject) -> Finding:
    """`gathered` computes what `dense` defines."""
    found, replays = Difference(), 0.0
    for make in subject.make:
        for batch in probe.batches.values():
            mask = batch["attention_mask"]
            dense, fast = (probe.planned(batch, [make()], execute) for execute in ("dense", "gathered"))
            here = probe.difference(fast, dense, mask)
            if here.count and fast.states is not None:
                same = probe.replayed(batch, fast)
                replays = max(replays, *relative_rows(fast.logits, same.logits, kept(mask, fast)))
            found = found.worse(here)
    limit = probe.allowed(subject.make)
    numbers = {**_numbers(found, limit), "replayed": replays}
    worst = max(found.error, replays)
    if worst > limit:
        return Finding(
            "dense = gathered", "fails", f"The executors differ: {off(worst, probe, limit)}.", numbers, cure(probe)
        )
    if found.excess:
        sentence = f"The executors decide differently more often than rounding explains: {found.flips:.1%} of a row's decisions."
        return Finding("dense = gathered", "fails", sentence, numbers, cure(probe))
    return Finding(
        "dense = gathered",
        "ok",
        f"Both executors agree: {off(worst, probe, limit)}.{_flipped(found, 'compared with the same decisions')}",
        numbers,
    )


def kept(mask: torch.Tensor, done: Pass) -> torch.Tensor:
    """The tokens of `mask` that a replay can be compared by."""
    return mask if done.alive is None else mask.bool() & done.alive.to(mask.device)


def relative_rows(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The difference in each row."""
    return [relative(a[r, keep], b[r, keep]) for r, keep in enumerate(mask.bool())]


def check_padding(probe: Probe, subject: Subject) -> Finding:
    """Padding and the other rows of a batch do not matter."""
    found = Difference()
    for make in subject.fixed or subject.make:
        policy = make()
        found = found.worse(probe.padding(lambda batch, made=policy: probe.planned(batch, [made], "gathered")))
    limit = probe.allowed(subject.fixed or subject.make)
    numbers = _numbers(found, limit)
    if found.error > limit:
        sentence = f"A row answers otherwise in a padded batch than alone: {off(found.error, probe, limit)}."
        return Finding("padding", "fails", sentence, numbers, f"use batches of one; {cure(probe)}")
    if found.excess:
        sentence = f"A row's decisions change with its batch: {found.flips:.1%} of them, more than rounding explains."
        return Finding("padding", "fails", sentence, numbers, f"use batches of one; {cure(probe)}")
    sentence = f"A row answers alike alone and padded left or right: {off(found.error, probe, limit)}.{_flipped(found, 'left out')}"
    if subject.fixed:
        sentence += " (Checked with a fixed choice; the random one is drawn anew for each batch.)"
    return Finding("padding", "ok", sentence, numbers)


def check_generation(probe: Probe, subject: Subject) -> Finding:
    """Both executors find the same tokens: greedy, drawn, with beams."""
    near: list[str] = []
    for make in subject.make:
        for search in SEARCHES:
            dense, fast = (probe.generate(search, [make()], execute) for execute in ("dense", "gathered"))
            rows, margin = probe.token_difference(fast, dense)
            # In low precision a route that flips changes what follows by more than a margin of logits shows.
            if rows and not (allowed(probe, search, margin) or (not probe.exact and _routes(make()))):
                sentence = f"The executors find other tokens with {search} in {rows} of {len(dense[0])} rows."
                numbers = {"rows": rows, "margin": margin, "search": search, "policy": repr(make())}
                return Finding("generate()", "fails", sentence, numbers, cure(probe))
            near += [search] * (rows > 0 and search not in near)
    sentence = f"Greedy, sampling and beams find the same tokens under both executors{but_for(near, probe)}."
    return Finding("generate()", "ok", sentence, {"tokens": probe.steps, "near_ties": near})


def check_decoding(probe: Probe, subject: Subject) -> Finding:
    """Token by token through the cache equals one pass over everything with the same decisions."""
    worst = 0.0
    for make in subject.make:
        for batch in probe.batches.values():
            stepwise, whole = probe.decoded(batch, [make()], "gathered")
            full = probe.replayed(whole, stepwise)
            worst = max(worst, *relative_rows(stepwise.logits, full.logits, kept(whole["attention_mask"], stepwise)))
    limit = probe.allowed(subject.make)
    numbers = {"error": worst, "allowed": limit}
    if worst > limit:
        sentence = f"Decoding through the cache differs from one full pass: {off(worst, probe, limit)}."
        return Finding("cached decoding", "fails", sentence, numbers, cure(probe))
    return Finding(
        "cached decoding", "ok", f"The cache decodes what one full pass computes: {off(worst, probe, limit)}.", numbers
    )


def check_saved(probe: Probe, subject: Subject) -> Finding:
    """Written as a checkpoint writes it, and read again, the policy makes the same tokens."""
    for make in subject.make:
        policy = make()
        again = rebuild(describe(policy.parts()), tensors_of(policy.parts()), "the check-up")
        for part in again:
            if isinstance(part, torch.nn.Module):
                part.to(probe.batches["left"]["input_ids"].device)
        one, two = (probe.generate("greedy", made)[0] for made in ([policy], again))
        if not torch.equal(one, two):
            return Finding(
                "saved", "fails", "After save and load it makes other tokens.", {"policy": repr(policy)}, REPORT
            )
    return Finding("saved", "ok", "What a checkpoint stores of it makes the same tokens again.")


def check_ablation(probe: Probe, subject: Subject) -> Finding:
    """Refused by the fast executor, marked in the ledger, changes the result, counts as no speed-up."""
    name, batch = "under dense", probe.batches["left"]
    mask = batch["attention_mask"].bool()
    stock = probe.stock(batch).logits[mask]
    changes = []
    for make in subject.make:
        try:
            probe.ablated(batch, make(), "gathered")
        except ValueError:
            pass
        else:
            return Finding(name, "fails", "The fast executor runs it, which is not what it defines.", {}, REPORT)
        done = probe.ablated(batch, make(), "dense")
        assert done.run is not None
        if not done.run.ledger.cost().ablation:
            return Finding(name, "fails", "The ledger does not say that it is an ablation.", {}, REPORT)
        changes.append(float((done.logits[mask].float() - stock.float()).abs().max() / stock.float().abs().max()))
    if not all(map(math.isfinite, changes)) or min(changes) <= 0:
        return Finding(
            name, "fails", "The edges that it cuts do not reach the logits, or break them.", {"change": changes}, REPORT
        )
    sentence = f"Runs under dense, changes logits by up to {max(changes):.0%}, and is marked as no speed-up; gathered refuses it."
    return Finding(name, "ok", sentence, {"change": changes})


def _routes(policy: Policy) -> bool:
    """Whether decisions hang on hidden states, which rounding changes."""
    return isinstance(policy, torch.nn.Module) or policy.looks_back or not policy.causal


def _flipped(found: Difference, then: str) -> str:
    if not found.count:
        return ""
    return (
        f" {found.count} decisions lay so near a tie that rounding turned them (at most {found.flips:.1%} of a layer's); "
        f"these rows were {then}."
    )


def _numbers(found: Difference, limit: float) -> dict[str, float]:
    return {"error": found.error, "allowed": limit, "flipped": found.flips, "flips": found.count}


POLICY_CHECKS: Mapping[str, Callable[[Probe, Subject], Finding]] = {
    "dense = gathered": check_executors,
    "padding": check_padding,
    "generate()": check_generation,
    "cached decoding": check_decoding,
    "saved": check_saved,
}
