"""The ways a check-up runs a model, and how two runs are compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.evaluate.checkup.inputs import Inputs
from sparing.execute import Run, apply
from sparing.execute.batches import pad_rows
from sparing.execute.replay import Recorder, Replay
from sparing.plan import Policy

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of two ways to compute the same, relative to the largest logit: rounding, through many layers."""
FLIPS = {torch.float32: 0.002, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Largest share of a prompt's decisions that rounding may turn over. Two (both modules of a token) are always allowed."""
SIDES = ("left", "right")
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "sampling": {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 20, "top_p": 1.0},
    "beams": {"do_sample": False, "num_beams": 2},
}


@dataclasses.dataclass
class Pass:
    """One forward pass: logits `[b t v]`, what was decided `[layers 2 b t]`, and which tokens stay to the end `[b t]`.

    A replay knows what ran, not what was dropped. What a model adds to dropped tokens all the same reaches no other.
    """

    logits: Tensor
    run: Run | None = None
    recorders: Sequence[Recorder] = ()
    alive: Tensor | None = None
    _states: Tensor | None = None

    @property
    def states(self) -> Tensor | None:
        """The ledger's table."""
        if self._states is None and self.run is not None:
            self._states = self.run.ledger.states()
        return self._states


@dataclasses.dataclass
class Difference:
    """How far two runs are apart.

    Attributes:
        error: of the logits, relative to the largest, where both decided alike.
        flips: the largest share of a row's decisions that differ.
        count: how many differ in all.
        excess: whether in some row more differ than rounding explains.
    """

    error: float = 0.0
    flips: float = 0.0
    count: int = 0
    excess: bool = False

    def worse(self, other: Difference) -> Difference:
        """The worse of both, part by part."""
        return Difference(
            max(self.error, other.error),
            max(self.flips, other.flips),
            self.count + other.count,
            self.excess or other.excess,
        )


class Probe:
    """A model with inputs, and the ways to run it.

    Args:
        model: a Hugging Face model.
        inputs: what to run it on.
        steps: tokens to decode.
        seed: of sampling.

    Attributes:
        peaks: bytes that the stock model needs at once, by rows and steps, once they are known.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, steps: int, seed: int) -> None:
        self.model, self.inputs, self.steps, self.seed = model, inputs, steps, seed
        self.dtype = next(model.parameters()).dtype
        self.tolerance = TOLERANCES.get(self.dtype, 5e-2)
        self.exact = self.dtype == torch.float32
        self._allowed: dict[Any, float] = {}
        self.peaks: dict[tuple[int, int], int] = {}
        # Turned on the right, so that the first row is the longest here and the shortest there.
        self.batches = {
            side: pad_rows(model, inputs.rows if side == "left" else inputs.rows[::-1], side) for side in SIDES
        }

    def stock(self, batch: Mapping[str, Any]) -> Pass:
        """Under nothing."""
        return Pass(self.model(**batch).logits)

    def planned(self, batch: Mapping[str, Any], policies: Sequence[Policy], execute: str, force: bool = False) -> Pass:
        """Under policies."""
        recorders = [Recorder(part) for policy in policies for part in policy.parts()]
        with apply(self.model, *recorders, execute=execute, force=force) as run:
            out = self.model(**batch)
            return Pass(out.logits, run, recorders, _alive(out))

    def ablated(self, batch: Mapping[str, Any], ablation: Policy, execute: str) -> Pass:
        """Under an ablation, which a recorder around it would hide."""
        with apply(self.model, ablation, execute=execute) as run:
            return Pass(self.model(**batch).logits, run)

    def difference(self, a: Pass, b: Pass, mask: Tensor, other: Tensor | None = None) -> Difference:
        """Compare row by row the tokens that `mask` (and in `b` `other`) says are there."""
        found = Difference()
        other = mask if other is None else other
        for r in range(len(mask)):
            here, there = mask[r].bool(), other[r].bool()
            if a.states is not None and b.states is not None:
                differ = a.states[:, :, r, here.cpu()] != b.states[:, :, r, there.cpu()]
                if count := int(differ.sum()):
                    # Later layers follow from the first that differs, so only that one is a matter of rounding.
                    first = differ.flatten(1).sum(1)
                    first = int(first[first > 0][0])
                    share = first / differ[0].numel()
                    excess = first > max(2, FLIPS.get(self.dtype, 0.1) * differ[0].numel())
                    found = found.worse(Difference(0.0, share, count, excess))
                    continue
            found = found.worse(Difference(relative(a.logits[r, here], b.logits[r, there])))
        return found

    def allowed(self, make: Sequence[Callable[[], Policy]]) -> float:
        """The largest difference that counts as rounding under these settings.

        Routers' weights on branches blow rounding up. So in low precision the policy's own noise counts, up to a limit: how far
        `dense`, which defines the meaning, moves when a row is computed alone.
        """
        if self.exact:
            return self.tolerance
        if (known := tuple(make)) not in self._allowed:
            found = Difference()
            for build in known:
                policy = build()
                found = found.worse(self.padding(lambda batch, made=policy: self.planned(batch, [made], "dense")))
            self._allowed[known] = min(max(self.tolerance, 3 * found.error), 4 * self.tolerance)
        return self._allowed[known]

    def padding(self, run: Callable[[Any], Pass]) -> Difference:
        """Each row alone against the same row in a batch."""
        found = Difference()
        alone = [run(row) for row in self.inputs.rows]
        for side, batch in self.batches.items():
            together = run(batch)
            for r, single in enumerate(alone if side == "left" else alone[::-1]):
                states = None if together.states is None else together.states[:, :, r : r + 1]
                row = Pass(together.logits[r : r + 1], _states=states)
                mask = torch.ones_like(single.logits[..., 0])
                found = found.worse(self.difference(single, row, mask, batch["attention_mask"][r : r + 1]))
        return found

    def replayed(self, batch: Mapping[str, Any], done: Pass) -> Pass:
        """The same decisions, under `dense`."""
        assert done.run is not None
        replay = Replay(done.run.ledger, list(done.recorders))
        with apply(self.model, replay, execute="dense", force=True):
            return Pass(self.model(**batch).logits)

    def generate(
        self, search: str, policies: Sequence[Policy] | None, execute: str = "gathered", force: bool = False
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """New tokens `[b steps]` of all rows, padded left, and for greedy the logits of each step."""
        batch = {name: value for name, value in self.batches["left"].items() if name != "position_ids"}
        context: Any = contextlib.nullcontext()
        if policies is not None:
            context = apply(self.model, *policies, execute=execute, force=force)
        with context:
            return self.tokens_of(self.model, batch, search)

    def tokens_of(self, model: nn.Module, batch: Mapping[str, Any], search: str) -> tuple[Tensor, Sequence[Tensor]]:
        """What a model, as it is now, adds to a batch."""
        pad = anatomy_of(self.model).text_config.pad_token_id
        with seeded(self.seed):
            out = model.generate(  # type: ignore[operator]
                **batch,
                **SEARCHES[search],
                max_new_tokens=self.steps,
                min_new_tokens=self.steps,
                pad_token_id=pad or 0,
                return_dict_in_generate=True,
                output_logits=search == "greedy",
            )
        return out.sequences[:, batch["input_ids"].shape[1] :], out.logits if search == "greedy" else ()

    def decoded(
        self, batch: Mapping[str, Any], policies: Sequence[Policy], execute: str
    ) -> tuple[Pass, dict[str, Any]]:
        """A prompt, then given tokens one by one through the cache; and the same tokens as one batch."""
        recorders = [Recorder(part) for policy in policies for part in policy.parts()]
        whole = dict(batch)
        fed = self._fed(batch)
        turned: list[Tensor] = []

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            turned.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

        with contextlib.ExitStack() as stack:
            rotary = anatomy_of(self.model).decoder.rotary_emb
            stack.callback(rotary.register_forward_pre_hook(note, with_kwargs=True).remove)
            run = stack.enter_context(apply(self.model, *recorders, execute=execute, force=True))
            out = self.model(**batch, use_cache=True)
            places = [turned[-1]]
            logits = [out.logits]
            position = batch["attention_mask"].sum(1, keepdim=True)
            for step in range(self.steps):
                ids = fed[:, step : step + 1]
                new: dict[str, Tensor] = {"attention_mask": torch.ones_like(ids)}
                if "position_ids" in batch:
                    new["position_ids"] = position + step
                if "mm_token_type_ids" in batch:
                    new["mm_token_type_ids"] = torch.zeros_like(ids)
                whole["input_ids"] = torch.cat([whole["input_ids"], ids], dim=1)
                for name, value in new.items():
                    whole[name] = torch.cat([whole[name], value.to(whole[name].dtype)], dim=1)
                known = {name: value for name, value in new.items() if name == "position_ids"}
                out = self.model(
                    input_ids=ids,
                    attention_mask=whole["attention_mask"],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                    **known,
                )
                logits.append(out.logits)
                places.append(turned[-1])
        if "position_ids" in batch:
            # Where the tokens really stood: a policy may have closed the gaps.
            whole["position_ids"] = torch.cat([place.expand(len(fed), -1) for place in places], dim=1)
        return Pass(torch.cat(logits, dim=1), run, recorders, _alive(out)), whole

    def _fed(self, batch: Mapping[str, Any]) -> Tensor:
        """Tokens to decode `[b steps]`: text that occurs in the prompts."""
        ids = self.inputs.rows[-1]["input_ids"].flatten()
        picks = torch.randint(
            len(ids), (len(batch["input_ids"]), self.steps), generator=torch.Generator().manual_seed(0)
        )
        return ids[picks.to(ids.device)]

    def token_difference(
        self, a: tuple[Tensor, Sequence[Tensor]], b: tuple[Tensor, Sequence[Tensor]]
    ) -> tuple[int, float]:
        """Rows whose tokens differ, and how far the two first candidates that differ were apart, relative to the largest logit."""
        rows, margin = 0, 0.0
        for r in range(len(a[0])):
            differ = (a[0][r] != b[0][r]).nonzero().flatten()
            if not len(differ):
                continue
            rows += 1
            at = int(differ[0])
            if a[1]:
                scores = a[1][at][r].float()
                gap = (scores[a[0][r, at]] - scores[b[0][r, at]]).abs() / scores[scores.isfinite()].abs().max()
                margin = max(margin, float(gap))
            else:
                margin = float("inf")
        return rows, margin


def _alive(out: Any) -> Tensor | None:
    """The tokens `[b t]` that no policy dropped in any layer; `None` if none was."""
    state = getattr(out.past_key_values, "state", None)
    dropped_at = getattr(state, "dropped_at", None)
    return None if state is None or dropped_at is None else dropped_at == state.depth


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where something is no number."""
    a, b = a.float(), b.float()
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave everyone else's randomness as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
