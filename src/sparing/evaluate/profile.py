"""`profile`: what each module and each kind of token is worth on a material, and the best plan within a budget."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparing.evaluate.findings import Point, Profile, Settings
from sparing.evaluate.material import Material, Split
from sparing.evaluate.measurements import Measurements, content_key
from sparing.evaluate.pictures.material import PictureMaterial
from sparing.evaluate.pictures.questions import PictureQuestion
from sparing.evaluate.removal import PrefillFlops, Removal
from sparing.evaluate.search import Search, single
from sparing.evaluate.speed import Timing, time_prompts
from sparing.evaluate.statistics import weighted_mean
from sparing.evaluate.text_material import TextMaterial

OnStep = Callable[[str, float, str], None]


def profile(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    budget: float = 0.6,
    *,
    settings: Settings | None = None,
    measurements: Path | None = None,
    on_step: OnStep | None = None,
) -> Profile:
    """Find out which computation a model needs on a text, and the best plan within a budget.

    Args:
        model: a Hugging Face model of a known family.
        tokenizer: its tokenizer, or a processor that has one.
        text: the text; its beginning is used if it is long.
        budget: share of the dense prefill's operations that the plan may cost. `settings` has its own.
        settings: everything else.
        measurements: a `.jsonl` file that keeps every measurement, so that an interrupted profile goes on there.
        on_step: told of progress: phase (one of `PHASES`), share of it that is done, and a line.

    Raises:
        ValueError: see `TextMaterial` and `Profiler`.
    """
    settings = settings or Settings(budget=budget)
    material = TextMaterial(model, tokenizer, text, max_tokens=settings.max_tokens, window=settings.window)
    return Profiler(material, settings).run(measurements, on_step)


def profile_pictures(
    model: nn.Module,
    processor: Any,
    questions: Sequence[PictureQuestion],
    budget: float = 0.6,
    *,
    settings: Settings | None = None,
    measurements: Path | None = None,
    on_step: OnStep | None = None,
) -> Profile:
    """Find out which computation a vision-language model needs for questions about pictures.

    Args:
        model: a Hugging Face model of a known vision family.
        processor: its own processor.
        questions: see `read_questions`; the first `max_questions` of the settings are used.
        budget: as in `profile`.
        settings: as in `profile`.
        measurements: as in `profile`.
        on_step: as in `profile`.

    Raises:
        ValueError: see `PictureMaterial` and `Profiler`.
    """
    settings = settings or Settings(budget=budget)
    material = PictureMaterial(model, processor, questions[: settings.max_questions])
    return Profiler(material, settings).run(measurements, on_step)


class Profiler:
    """A profile that is ready to run: what can be wrong with its input has been looked at.

    Args:
        material: the model, and what it is profiled on.
        settings: how to go about it.

    Raises:
        ValueError: a budget out of reach, or logits that are not finite.
    """

    def __init__(self, material: Material, settings: Settings) -> None:
        self.material, self.settings = material, settings
        self.model, self.shape = material.model, material.shape
        if material.ready:
            self._check_budget()
        material.check()

    @property
    def flops(self) -> PrefillFlops:
        """Counts a removal's operations on both halves."""
        return self.material.flops

    def run(self, measurements: Path | None = None, on_step: OnStep | None = None) -> Profile:
        """Measure, search, control and time. What `measurements` holds already is not measured again."""
        self._clock = time.perf_counter()
        self._begin(measurements, on_step)
        dense = self._loss("choose", Removal())
        modules, entries = self._sensitivities(dense)
        reading = self._reading(modules)
        path = self._search({**_named(modules), **_named(entries)})
        path += self._better(path[-1], reading)
        planned = path[-1]
        controls = []
        for i in range(self.settings.controls):
            drawn = self._searcher({}).at_random(self.settings.budget, self.flops(planned), self.settings.seed + i)
            controls.append(drawn)
            self._tell("control", (i + 1) / self.settings.controls, f"random plan {i + 1}: {self._say(drawn)}")
        about = self.material.describe()
        return Profile(
            model=self._describe_model(),
            text=about if self.material.name == "text" else {},
            pictures=about if self.material.name == "pictures" else {},
            settings=self.settings,
            kinds=self.material.kinds,
            modules=modules,
            entries=entries,
            reading=[self._point(removal) for removal in reading],
            dense=self._point(Removal()),
            planned=self._point(planned),
            plan_call=str(planned),
            path=[self._point(removal) for removal in path],
            controls=[self._point(removal) for removal in controls],
            flops={"dense": self._both(planned, "dense_flops"), "planned": self._both(planned, "flops")},
            kv_bytes={arm: self._both(planned, f"{kv}kv_bytes") for arm, kv in (("dense", "dense_"), ("planned", ""))},
            lowest_ratio=self.flops.lowest_ratio,
            timings=[self._time(planned, batch) for batch in self.settings.batches] if self.settings.repeats else [],
            answers=self._answers(planned),
            painting=self.material.page(**self._store.get(f"page {planned.key}", lambda: self.material.paint(planned))),
            seconds=time.perf_counter() - self._clock,
            measured=self._store.taken,
        )

    def search_only(self, on_step: Callable[[float, str], None] | None = None) -> Removal:
        """The chosen plan alone: no controls, no timing, no page."""
        tell = on_step or (lambda done, line: None)
        shares = {"sensitivity": (0.0, 0.5), "search": (0.5, 0.5)}

        def forward(phase: str, done: float, line: str) -> None:
            start, share = shares.get(phase, (0.0, 0.0))
            tell(start + share * done, line)

        self._begin(None, forward)
        modules, entries = self._sensitivities(self._loss("choose", Removal()))
        return self._search({**_named(modules), **_named(entries)}, report=False)[-1]

    def random_plan(self, matched: int, seed: int) -> Removal:
        """A plan within the budget with random options that costs about `matched` operations."""
        self._begin(None, None)
        return self._searcher({}).at_random(self.settings.budget, matched, seed)

    def _begin(self, measurements: Path | None, on_step: OnStep | None) -> None:
        self._tell = on_step or (lambda phase, done, line: None)
        # Cached results of another device, or of other software, would not be this run's.
        subject = content_key(self.model, *self.material.content, str(self.material.device), torch.__version__)
        self._store = Measurements(measurements, subject)
        if not self.material.ready:
            self.material.prepare(self._store, lambda done, line: self._tell("answers", done, line))
            self._check_budget()

    def _check_budget(self) -> None:
        if self.settings.budget < (least := self.flops.lowest_ratio):
            raise ValueError(
                f"a budget of {self.settings.budget:g} cannot be reached: {self.material.fixed} "
                f"{least:.4f} of this model's operations; give at least {math.ceil(1e4 * least) / 1e4:.4f}"
            )

    # The parts of a profile ----------------------------------------------------------------------------------------

    def _sensitivities(self, dense: dict[str, Any]) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
        """The loss that each module, and each late entry, adds alone."""
        modules, kinds = self.material.modules, list(self.material.kinds)
        names: list[tuple[str, int]] = [(module, layer) for module in modules for layer in range(self.shape.depth)]
        names += [(kind, layer) for kind in kinds for layer in self._entry_layers]
        found: dict[str, dict[int, float]] = {what: {} for what in (*modules, *kinds)}
        for i, (what, layer) in enumerate(names):
            removal = single((what, layer))
            found[what][layer] = self._loss("choose", removal)["loss"] - dense["loss"]
            self._tell("sensitivity", (i + 1) / len(names), f"{removal.key}: {found[what][layer]:+.4f} nats")
        return {m: found[m] for m in modules}, {k: found[k] for k in kinds}

    def _reading(self, modules: dict[str, dict[int, float]]) -> list[Removal]:
        """Pictures computed in no layer, and read in fewer and fewer: always in those where not reading them costs most."""
        if "image_read" not in modules:
            return []
        ranked = sorted(modules["image_read"], key=lambda layer: -modules["image_read"][layer])
        counts = [0, *self._entry_layers][::-1]
        found = []
        for i, count in enumerate(counts):
            found.append(Removal.reading(sorted(ranked[:count]), self.shape.depth))
            self._tell("reading", (i + 1) / len(counts), f"read in {count} layers: {self._say(found[-1])}")
        return found

    def _better(self, planned: Removal, reading: Sequence[Removal]) -> list[Removal]:
        """The plan of few reading layers that beats what was searched step by step, if one does."""
        fitting = [r for r in reading if self.flops(r) <= self.settings.budget * self.flops.dense]
        best = min([planned, *fitting], key=lambda removal: self._loss("choose", removal)["loss"])
        return [] if best is planned else [best]

    def _searcher(self, sensitivity: dict[tuple[str, int], float]) -> Search:
        return Search(
            self.flops,
            self.shape.depth,
            list(self.material.kinds),
            lambda removal: self._loss("choose", removal)["loss"],
            sensitivity,
            self._entry_layers,
            self.material.modules,
        )

    def _search(self, sensitivity: dict[tuple[str, int], float], *, report: bool = True) -> list[Removal]:
        """The path to the budget, every step run on both splits, or on the choosing one only."""
        path = []
        for removal in self._searcher(sensitivity).path(
            self.settings.budget, self.settings.method, self.settings.width
        ):
            path.append(removal)
            left = 1 - self.flops(removal) / self.flops.dense
            done = 1.0 if self.settings.budget == 1 else min(1.0, left / (1 - self.settings.budget))
            said = self._say(removal) if report else f"{1 - left:.1%} of the operations"
            self._tell("search", done, f"step {len(path) - 1}: {said}")
        return path

    def _time(self, removal: Removal, batch: int) -> Timing:
        """Dense and planned seconds at a batch size."""
        repeats = self.settings.repeats
        prompt, fed = self.material.timed(batch, self.settings.steps)
        length, steps = prompt["input_ids"].shape[1], fed.shape[1]
        hardware = f"{self.material.device} {torch.get_num_threads()} threads"
        name = f"time {removal.key} | batch {batch} prompt {length} steps {steps} repeats {repeats} on {hardware}"
        found = self._store.get(
            name,
            lambda: dataclasses.asdict(
                time_prompts(self.model, lambda: self.material.applied(removal), prompt, fed, repeats=repeats)
            ),
        )
        done = (self.settings.batches.index(batch) + 1) / len(self.settings.batches)
        pair = [f"{1e3 * found['prefill'][arm][0]:.1f} ms" for arm in ("dense", "planned")]
        self._tell("speed", done, f"batch {batch}: prefill {pair[0]} dense, {pair[1]} planned")
        spreads = {name: {arm: tuple(v) for arm, v in found[name].items()} for name in ("prefill", "decode")}
        samples = {arm: [tuple(pair) for pair in pairs] for arm, pairs in found["samples"].items()}
        return Timing(**{**found, **spreads, "samples": samples})

    def _answers(self, removal: Removal) -> dict[str, Any]:
        """What stock and planned model write to the reporting half, compared."""
        written = [
            self._store.get(f"answers {r.key}", lambda r=r: {"texts": self.material.answers(r)})["texts"]
            for r in ((Removal(), removal) if self.material.asks else ())
        ]
        return self.material.compare(*written) if written else {}

    # Measuring -----------------------------------------------------------------------------------------------------

    @property
    def _entry_layers(self) -> list[int]:
        """The layers at which a kind may enter: all of a shallow model's, evenly spread ones of a deep one's."""
        depth, most = self.shape.depth, self.settings.entries
        if depth <= most:
            return list(range(1, depth + 1))
        return sorted({round(i * depth / most) for i in range(1, most + 1)})

    def _loss(self, split: Split, removal: Removal) -> dict[str, Any]:
        """The loss of a removal on a half, and its ledger."""

        def measure() -> dict[str, Any]:
            found = self.material.loss(split, removal)
            return {
                "loss": found.mean,
                "windows": found.windows.tolist(),
                "predicted": found.predicted.tolist(),
                "flops": found.flops,
                "dense_flops": found.dense_flops,
                "kv_bytes": found.kv_bytes,
                "dense_kv_bytes": found.dense_kv_bytes,
            }

        return self._store.get(f"{split} | {removal.key}", measure)

    def _both(self, removal: Removal, what: str) -> Any:
        """A count of the ledgers of both splits together."""
        a, b = self._loss("choose", removal)[what], self._loss("report", removal)[what]
        return {part: a[part] + b[part] for part in a} if isinstance(a, dict) else a + b

    def _point(self, removal: Removal) -> Point:
        """Run a plan on both splits."""
        chosen, held_out, dense = (
            self._loss("choose", removal),
            self._loss("report", removal),
            self._loss("report", Removal()),
        )
        flops, all_flops = (sum(self._both(removal, what).values()) for what in ("flops", "dense_flops"))
        return Point(
            plan=removal.as_dict(),
            name=removal.key,
            flops_ratio=flops / all_flops,
            kv_ratio=self._both(removal, "kv_bytes") / self._both(removal, "dense_kv_bytes"),
            loss=chosen["loss"],
            held_out=held_out["loss"],
            added=_added(held_out, dense),
        )

    def _say(self, removal: Removal) -> str:
        point = self._point(removal)
        return f"{point.flops_ratio:.1%} of the operations, held-out loss {point.added[0]:+.3f}"

    # Describing ----------------------------------------------------------------------------------------------------

    def _describe_model(self) -> dict[str, Any]:
        layer = self.shape.layers[0]
        config: Any = self.model.config
        return {
            "name": str(getattr(config, "_name_or_path", "") or type(self.model).__name__),
            "family": config.model_type,
            "layers": self.shape.depth,
            "hidden": layer.hidden,
            "heads": layer.heads,
            "kv_heads": layer.kv_heads,
            "intermediate": layer.intermediate,
            "vocabulary": self.shape.vocabulary,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }


def _named(found: dict[str, dict[int, float]]) -> dict[tuple[str, int], float]:
    return {(what, layer): added for what, layers in found.items() for layer, added in layers.items()}


def _added(then: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float, float]:
    """Added loss with its 95% interval: windows are the sampling unit, each compared with itself."""
    added = [a - b for a, b in zip(then["windows"], dense["windows"], strict=True)]
    found = weighted_mean(added, dense["predicted"])
    return found.value, found.low, found.high
