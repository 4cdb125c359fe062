"""All checks of a model, one after the other; none stops the others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from sparing.anatomy import anatomy_of
from sparing.evaluate.checkup.findings import MODEL, Checkup, Finding
from sparing.evaluate.checkup.inputs import inputs_for
from sparing.evaluate.checkup.of_model import LOADS, MODEL_CHECKS
from sparing.evaluate.checkup.of_policy import POLICY_CHECKS, check_ablation, check_noop
from sparing.evaluate.checkup.probe import Probe, seeded
from sparing.evaluate.checkup.subjects import NAMES, Subject, subjects_for
from sparing.evaluate.checkup.timing import check_costs
from sparing.execute import run_of
from sparing.tokens import TokenMap

OnStep = Callable[[int, int, str], None]


@torch.inference_mode()
def checkup(
    model: nn.Module,
    processor: Any = None,
    *,
    policies: Sequence[str] = (),
    subjects: Sequence[Subject] | None = None,
    quick: bool = False,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Checkup:
    """Check what of sparing is safe to use on a model. Quality is not judged: fresh routers decide at random.

    Args:
        model: a Hugging Face model of a known family, in eval mode.
        processor: its tokenizer or processor; ids and pixels are random without one.
        policies: names of the policies to check; all if empty.
        subjects: policies to check instead of the library's own.
        quick: one setting a policy, fewer tokens, short timing.
        seed: of routers, pixels and sampling.
        on_step: called with checks done, checks in all, and the name of the next.

    Raises:
        ValueError: an unknown policy, a model in training mode, or one that is inside `sparing.apply`.
    """
    begun = time.monotonic()
    if unknown := [name for name in policies if name not in NAMES]:
        raise ValueError(f"unknown policy {unknown[0]!r}; choose of {', '.join(NAMES)}")
    if model.training:
        raise ValueError("a check-up needs the model in eval mode: call model.eval() first")
    if run_of(model) is not None:
        raise ValueError("this model follows policies already: sparing.release(model) takes them off")
    steps = 6 if quick else 10
    with _quiet(), seeded(seed):
        inputs = inputs_for(model, processor, steps=steps, seed=seed, timed=256 if quick else 512)
        probe = Probe(model, inputs, steps=steps, seed=seed)
        if subjects is None:
            axes = TokenMap.from_inputs(model, inputs.rows[0]).position_ids.ndim
            subjects = subjects_for(model, pictures=inputs.pictures, reindex=axes == 2, seed=seed, quick=quick)
            subjects = [subject for subject in subjects if not policies or subject.name in policies]
        costs = functools.partial(check_costs, seconds=0.2 if quick else 0.6, steps=8 if quick else 16)
        jobs: list[tuple[str, str, Callable[[], Finding]]] = [
            (MODEL, name, functools.partial(check, probe)) for name, check in MODEL_CHECKS.items()
        ]
        for subject in subjects:
            checks: dict[str, Callable[..., Finding]] = {**POLICY_CHECKS, "speed and memory": costs}
            if subject.ablation:
                checks = {"under dense": check_ablation}
            elif subject.pictures:
                checks = {"text alone": check_noop, **(checks if inputs.pictures else {})}
            if (refusal := _refusal(probe, subject)) is not None:
                checks = {"fits": lambda _, __, refusal=refusal: Finding("fits", "not applicable", refusal)}
            jobs += [(subject.name, name, functools.partial(check, probe, subject)) for name, check in checks.items()]
        findings: list[Finding] = []
        if inputs.trouble:
            findings.append(
                Finding("pictures", "fails", inputs.trouble, {}, "mend its processor; see the log of --debug")
            )
        for done, (name, check, job) in enumerate(jobs):
            if on_step is not None:
                on_step(done, len(jobs), f"{name}: {check}")
            findings.append(_guarded(name, check, job))
            if check == LOADS and findings[-1].verdict == "fails":
                # Where the model's own numbers are broken, every other check would find that again.
                subjects = []
                break
        if on_step is not None:
            on_step(len(jobs), len(jobs), "")
    family = anatomy_of(model)
    return Checkup(
        model={
            "name": str(getattr(model, "name_or_path", "") or type(model).__name__),
            "family": family.config.model_type,
            "layers": len(family.layers),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(probe.dtype).removeprefix("torch."),
            "device": str(inputs.timed["input_ids"].device),
            "attention": family.attention_backend,
            "vision": family.vision_encoder is not None,
        },
        inputs={
            "told": inputs.told,
            "lengths": [int(row["input_ids"].shape[1]) for row in inputs.rows],
            "timed": int(inputs.timed["input_ids"].shape[1]),
            "decoded": steps,
            "seed": seed,
            "quick": quick,
        },
        tolerance=probe.tolerance,
        settings={subject.name: [_shown(make) for make in subject.make] for subject in subjects},
        findings=findings,
        seconds=time.monotonic() - begun,
        code={subject.name: subject.code for subject in subjects if subject.code},
        untrained=tuple(subject.name for subject in subjects if subject.routed),
    )


def _guarded(subject: str, check: str, job: Callable[[], Finding]) -> Finding:
    """Run a check; an error is its finding."""
    begun = time.monotonic()
    try:
        found = job()
    except Exception as error:  # whatever it is, the other checks go on
        line = " ".join(str(error).split())[:400]
        cure = "report it with run.json, or leave it out"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            cure = "use a smaller --dtype, --quick, or a device with more memory"
        found = Finding(check, "fails", f"The check broke off: {type(error).__name__}: {line}", {}, cure)
    return dataclasses.replace(found, name=check, subject=subject, seconds=round(time.monotonic() - begun, 3))


def _refusal(probe: Probe, subject: Subject) -> str | None:
    """Why a policy says itself that it has no place on this model: it has too few layers, say."""
    try:
        for make in subject.make:
            make().validate(anatomy_of(probe.model).shape())
    except ValueError as error:
        return f"It refuses this model: {error}."
    except Exception:  # a bug, which its checks will show
        return None
    return None


def _shown(make: Callable[[], Any]) -> str:
    try:
        return repr(make())
    except Exception as error:  # said by its checks
        return f"cannot be made: {error}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of transformers on generation settings that both arms share."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
