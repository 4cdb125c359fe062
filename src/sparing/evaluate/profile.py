"""`profile`: what each module and each kind of token is worth on a text, and the best plan within a budget."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparing.anatomy import anatomy_of
from sparing.evaluate.findings import Point, Profile, Settings
from sparing.evaluate.kinds import FIRST, KINDS, MEANING, TokenKinds
from sparing.evaluate.loss import TextLoss, check_finite, measure_under
from sparing.evaluate.measurements import Measurements, content_key
from sparing.evaluate.painting import Painting, paint
from sparing.evaluate.removal import MODULES, PrefillFlops, Removal
from sparing.evaluate.search import Search, single
from sparing.evaluate.speed import Timing, time_arms
from sparing.evaluate.statistics import weighted_mean
from sparing.evaluate.windows import Windows, tokenize

OnStep = Callable[[str, float, str], None]
# Fewer tokens of a kind than this say nothing about the kind.
FEWEST_OF_A_KIND = 8


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
        ValueError: see `Profiler`.
    """
    job = Profiler(model, tokenizer, text, settings or Settings(budget=budget))
    return job.run(measurements, on_step)


class Profiler:
    """A profile that is ready to run: everything that can be wrong with its input has been looked at.

    Args:
        model: a Hugging Face model of a known family.
        tokenizer: its tokenizer, or a processor that has one.
        text: the text.
        settings: how to go about it.
        modules_only: leave out modules only; otherwise kinds of tokens may enter late too.

    Raises:
        ValueError: no tokenizer, a text that is too short, a budget out of reach, or logits that are not finite.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, text: str, settings: Settings, *, modules_only: bool = False
    ) -> None:
        anatomy = anatomy_of(model)
        self.model, self.settings = model, settings
        self.shape = anatomy.shape()
        self.source = tokenize(tokenizer, text, settings.max_tokens)
        self.longest = anatomy.text_config.max_position_embeddings
        windows = self.source.windows(min(settings.window, self.longest))
        if int(windows.ids.max()) >= self.shape.vocabulary:
            raise ValueError(
                "the tokenizer has tokens that the model does not know: they belong to different checkpoints"
            )
        self.search, self.held_out = windows.split()
        self.kinds = TokenKinds(model, tokenizer)
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        found = self.kinds.of_windows(windows.ids).where(windows.valid, torch.tensor(-1))
        self.counts = {name: int((found == i).sum()) for i, name in enumerate(KINDS)}
        chosen_on = self.kinds.of_windows(self.search.ids)
        self.present = [
            name
            for i, name in enumerate(KINDS)
            if not modules_only
            and (i == FIRST or int(((chosen_on == i) & self.search.valid).sum()) >= FEWEST_OF_A_KIND)
        ]
        self.flops = PrefillFlops(self.shape, found, windows.valid)
        if settings.budget < self.flops.lowest_ratio:
            least = self.flops.lowest_ratio
            raise ValueError(
                f"a budget of {settings.budget:g} cannot be reached: the output matrix (lm_head) alone takes "
                f"{least:.4f} of this model's operations; give at least {math.ceil(1e4 * least) / 1e4:.4f}"
            )
        check_finite(model, windows)

    def run(self, measurements: Path | None = None, on_step: OnStep | None = None) -> Profile:
        """Measure, search, control and time. What `measurements` holds already is not measured again."""
        self._clock = time.perf_counter()
        self._begin(measurements, on_step)
        dense = self._loss("choose", Removal())
        modules, entries = self._sensitivities(dense)
        path = self._search({**_named(modules), **_named(entries)})
        planned = path[-1]
        controls = []
        for i in range(self.settings.controls):
            drawn = self._searcher({}).at_random(self.settings.budget, self.flops(planned), self.settings.seed + i)
            controls.append(drawn)
            self._tell("control", (i + 1) / self.settings.controls, f"random plan {i + 1}: {self._say(drawn)}")
        return Profile(
            model=self._describe_model(),
            text=self._describe_text(),
            settings=self.settings,
            kinds={
                name: {"share": count / sum(self.counts.values()), "meaning": MEANING[name]}
                for name, count in self.counts.items()
                if name in self.present
            },
            modules=modules,
            entries=entries,
            dense=self._point(Removal()),
            planned=self._point(planned),
            plan_call=str(planned),
            path=[self._point(removal) for removal in path],
            controls=[self._point(removal) for removal in controls],
            flops={"dense": self._both(planned, "dense_flops"), "planned": self._both(planned, "flops")},
            kv_bytes={arm: self._both(planned, f"{kv}kv_bytes") for arm, kv in (("dense", "dense_"), ("planned", ""))},
            lowest_ratio=self.flops.lowest_ratio,
            timings=[self._time(planned, batch) for batch in self.settings.batches] if self.settings.repeats else [],
            painting=self._paint(planned),
            seconds=time.perf_counter() - self._clock,
            measured=self._store.taken,
        )

    def search_only(self, on_step: Callable[[float, str], None] | None = None) -> Removal:
        """The chosen plan alone: no controls, no timing, no page."""
        tell = on_step or (lambda done, line: None)
        shares = {"sensitivity": (0.0, 0.5), "search": (0.5, 0.5)}

        def forward(phase: str, done: float, line: str) -> None:
            start, share = shares[phase]
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
        subject = content_key(
            self.model, self.search.ids.tolist(), self.held_out.ids.tolist(), str(self._device), torch.__version__
        )
        self._store = Measurements(measurements, subject)

    # The parts of a profile ----------------------------------------------------------------------------------------

    def _sensitivities(self, dense: dict[str, Any]) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
        """The loss that each module, and each late entry, adds alone."""
        names: list[tuple[str, int]] = [(module, layer) for module in MODULES for layer in range(self.shape.depth)]
        names += [(kind, layer) for kind in self.present for layer in self._entry_layers]
        found: dict[str, dict[int, float]] = {what: {} for what in (*MODULES, *self.present)}
        for i, (what, layer) in enumerate(names):
            removal = single((what, layer))
            found[what][layer] = self._loss("choose", removal)["loss"] - dense["loss"]
            self._tell("sensitivity", (i + 1) / len(names), f"{removal.key}: {found[what][layer]:+.4f} nats")
        return {m: found[m] for m in MODULES}, {k: found[k] for k in self.present}

    def _searcher(self, sensitivity: dict[tuple[str, int], float]) -> Search:
        return Search(
            self.flops,
            self.shape.depth,
            self.present,
            lambda removal: self._loss("choose", removal)["loss"],
            sensitivity,
            self._entry_layers,
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
        steps, repeats = self.settings.steps, self.settings.repeats
        length = min(self.longest, 512)
        steps = min(steps, length // 4)
        ids = torch.tensor(self.source.ids)
        rows = ids.repeat(-(-batch * length // len(ids)))[: batch * length].view(batch, length)
        planned = functools.partial(removal.applied, self.model, self.kinds)
        hardware = f"{self._device} {torch.get_num_threads()} threads"
        name = f"time {removal.key} | batch {batch} length {length} steps {steps} repeats {repeats} on {hardware}"
        found = self._store.get(
            name, lambda: dataclasses.asdict(time_arms(self.model, planned, rows, steps=steps, repeats=repeats))
        )
        done = (self.settings.batches.index(batch) + 1) / len(self.settings.batches)
        pair = [f"{1e3 * found['prefill'][arm][0]:.1f} ms" for arm in ("dense", "planned")]
        self._tell("speed", done, f"batch {batch}: prefill {pair[0]} dense, {pair[1]} planned")
        spreads = {name: {arm: tuple(v) for arm, v in found[name].items()} for name in ("prefill", "decode")}
        samples = {arm: [tuple(pair) for pair in pairs] for arm, pairs in found["samples"].items()}
        return Timing(**{**found, **spreads, "samples": samples})

    def _paint(self, removal: Removal) -> Painting:
        found = self._store.get(
            f"page {removal.key}",
            lambda: paint(
                functools.partial(self._under, states=True), removal, self.held_out, self._tokenizer, self.kinds
            ).as_dict(),
        )
        return Painting(**found)

    # Measuring -----------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator]

    @property
    def _entry_layers(self) -> list[int]:
        """The layers at which a kind may enter: all of a shallow model's, evenly spread ones of a deep one's."""
        depth, most = self.shape.depth, self.settings.entries
        if depth <= most:
            return list(range(1, depth + 1))
        return sorted({round(i * depth / most) for i in range(1, most + 1)})

    def _under(self, removal: Removal, windows: Windows, *, states: bool = False) -> TextLoss:
        applied = functools.partial(removal.applied, self.model, self.kinds)
        return measure_under(applied, self.model, windows, states=states)

    def _loss(self, split: str, removal: Removal) -> dict[str, Any]:
        """The loss of a removal on a split (`choose` or `report`), and its ledger."""
        windows = self.search if split == "choose" else self.held_out

        def measure() -> dict[str, Any]:
            found = self._under(removal, windows)
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
        a, b = (self._loss(split, removal)[what] for split in ("choose", "report"))
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

    def _describe_text(self) -> dict[str, Any]:
        return {
            "tokens": len(self.source.ids),
            "characters": self.source.characters,
            "of_characters": self.source.of_characters,
            "window": self.search.length,
            "chosen_on": {"windows": len(self.search), "predicted": self.search.predicted},
            "held_out": {"windows": len(self.held_out), "predicted": self.held_out.predicted},
        }


def _named(found: dict[str, dict[int, float]]) -> dict[tuple[str, int], float]:
    return {(what, layer): added for what, layers in found.items() for layer, added in layers.items()}


def _added(then: dict[str, Any], dense: dict[str, Any]) -> tuple[float, float, float]:
    """Added loss with its 95% interval: windows are the sampling unit, each compared with itself."""
    added = [a - b for a, b in zip(then["windows"], dense["windows"], strict=True)]
    found = weighted_mean(added, dense["predicted"])
    return found.value, found.low, found.high
