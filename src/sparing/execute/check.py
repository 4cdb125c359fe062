"""`check_policy`: whether a policy keeps the contract, on a real model and real inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.execute.apply import Run, apply
from sparing.execute.batches import pad_rows, split_rows
from sparing.execute.replay import Recorder, Replay, readable_pairs
from sparing.plan import Composed, Ledger, Policy
from sparing.tokens import TokenMap

EXECUTORS = ("dense", "gathered")
SIDES = ("left", "right")


def check_policy(
    make: Callable[[], Policy],
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    regroup: Callable[[TokenMap], TokenMap] | None = None,
    steps: int = 3,
    tolerance: float = 1e-5,
) -> None:
    """Check that a policy keeps the contract of `sparing.plan.Policy`.

    Padding and batch invariance; the same result twice in eval mode; `dense` equals `gathered`; cached decoding
    equals one full forward pass with the same decisions; a policy that says it is causal decides alike when later
    tokens are known; reordered rows and beams; gradients reach what trains, and nothing else; the ledger's cost
    equals the rows that really went through the model's matrices and the keys really stored; nothing is left on the
    model.

    Args:
        make: makes the policy, with the same weights each time if it has any. Policies may be composed.
        model: a Hugging Face model of a known family, in eval mode and fp32.
        inputs: what its processor returned, two rows or more (of different lengths, to see padding at work).
        regroup: changes the map that is found (streaming groups and segments); called for each batch made of these
            rows.
        steps: how many tokens to decode.
        tolerance: largest difference of logits, relative to the largest logit.

    Raises:
        AssertionError: the policy breaks the contract; the message says where.
        ValueError: a model in training mode, or inputs that cannot be split into rows.
    """
    if model.training:
        raise ValueError("check_policy needs the model in eval mode: call model.eval() first")
    case = _Case(model, make(), split_rows(model, inputs), regroup, steps, tolerance)
    with torch.no_grad():
        # transformers puts hooks of its own on a model at its first forward pass.
        model(**pad_rows(model, case.rows, "left"))
    before = _marks(model)
    _check_same_twice(case)
    _check_executors(case)
    _check_invariance(case)
    _check_cost(case)
    _check_decoding(case)
    _check_reordering(case)
    _check_beams(case)
    _require(_marks(model) == before, case, "something was left on the model after apply(): an attribute or a hook")
    _check_gradients(dataclasses.replace(case, policy=make()))
    _require(_marks(model) == before, case, "a gradient pass left something on the model: an attribute or a hook")


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is checked, and the ways to run it."""

    model: nn.Module
    policy: Policy
    rows: list[dict[str, Any]]
    regroup: Callable[[TokenMap], TokenMap] | None
    steps: int
    tolerance: float

    def tokens(self, batch: Mapping[str, Any]) -> TokenMap | None:
        """The map to apply with; `None` to let `apply` find it."""
        return None if self.regroup is None else self.regroup(TokenMap.from_inputs(self.model, batch))

    def extra(self, rows: int) -> Tensor:
        """The tokens to decode `[rows steps]`: text that occurs in the prompts."""
        ids = torch.cat([row["input_ids"].flatten() for row in self.rows])
        family = anatomy_of(self.model)
        is_image = family.is_image_token(ids)
        ids = ids if is_image is None else ids[~is_image]
        picks = torch.randint(len(ids), (rows, self.steps), generator=torch.Generator().manual_seed(0))
        return ids[picks]

    def logits(self, batch: Mapping[str, Any], execute: str) -> Tensor:
        """Of one forward pass."""
        with torch.no_grad(), apply(self.model, self.policy, execute=execute, tokens=self.tokens(batch)):  # type: ignore[arg-type]
            return self.model(**batch).logits


def _require(holds: bool, case: _Case, message: str) -> None:
    if not holds:
        raise AssertionError(f"{case.policy!r}: {message}")


def _require_close(a: Tensor, b: Tensor, case: _Case, what: str) -> None:
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
    _require(error <= case.tolerance, case, f"{what} (relative error {error:.1e}, allowed {case.tolerance:.1e})")


def _marks(model: nn.Module) -> dict[str, Any]:
    """Everything that could be left on a model."""
    return {
        name: (set(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()
    }


def _check_same_twice(case: _Case) -> None:
    batch, other = pad_rows(case.model, case.rows, "left"), case.rows[0]
    for execute in EXECUTORS:
        first = case.logits(batch, execute)
        case.logits(other, execute)
        message = (
            "two calls on the same inputs differ: evaluation must be deterministic, and remember no earlier prompt"
        )
        _require(torch.equal(first, case.logits(batch, execute)), case, f"{message} ({execute})")


def _check_invariance(case: _Case) -> None:
    turned = list(range(len(case.rows)))[::-1]
    for execute in EXECUTORS:
        alone = [case.logits(row, execute)[0] for row in case.rows]
        for side in SIDES:
            for order in (sorted(turned), turned):
                batch = pad_rows(case.model, [case.rows[i] for i in order], side)
                logits = case.logits(batch, execute)
                for i, row, mask in zip(order, logits, batch["attention_mask"].bool(), strict=True):
                    what = f"row {i} alone differs from the same row in a {side}-padded batch: padding or other rows matter"
                    _require_close(row[mask], alone[i], case, f"{what} ({execute})")


def _check_executors(case: _Case) -> None:
    for side in SIDES:
        batch = pad_rows(case.model, case.rows, side)
        mask = batch["attention_mask"].bool()
        dense, fast = (case.logits(batch, execute)[mask] for execute in EXECUTORS)
        _require_close(fast, dense, case, f"gathered differs from dense ({side} padding)")


@dataclasses.dataclass
class _Decoded:
    """A prompt and the tokens after it, through the cache."""

    logits: Tensor
    run: Run
    recorders: list[Recorder]
    cache: Any
    embeds: Tensor | None = None
    position_ids: Tensor | None = None


def _decode(
    case: _Case,
    batch: Mapping[str, Any],
    execute: str,
    *,
    turn: Tensor | None = None,
    after_pass: Callable[[], None] | None = None,
) -> _Decoded:
    """Feed a prompt, then one token at a time, never idle; `turn` reorders the rows after the prompt."""
    recorders = [Recorder(p) for p in case.policy.parts()]
    seen: dict[str, Tensor] = {}
    embeds, positions, logits = [], [], []
    family = anatomy_of(case.model)

    def note_embeds(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["embeds"] = args[0] if args else kwargs["hidden_states"]

    def note_positions(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen["positions"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    hooks = [
        family.layers[0].register_forward_pre_hook(note_embeds, with_kwargs=True),
        family.decoder.rotary_emb.register_forward_pre_hook(note_positions, with_kwargs=True),
    ]
    mask = batch["attention_mask"]
    position = mask.sum(1, keepdim=True)
    try:
        run = apply(case.model, *recorders, execute=execute, tokens=case.tokens(batch), force=True)  # type: ignore[arg-type]
        with torch.no_grad(), run:
            out = case.model(**batch, use_cache=True)
            for step in range(case.steps + 1):
                logits.append(out.logits)
                embeds.append(seen.get("embeds"))
                positions.append(seen["positions"].expand(*seen["positions"].shape[:-2], len(mask), -1))
                if after_pass is not None:
                    after_pass()
                if step == case.steps:
                    break
                axes = out.past_key_values.state.tokens.position_ids
                if step == 0 and axes.ndim == 3:
                    # Behind the largest position on any axis, where pictures take less than a position a token.
                    position = axes.amax(0).masked_fill(mask == 0, 0).amax(1, keepdim=True) + 1
                ids = case.extra(len(mask))[:, step : step + 1]
                if turn is not None:
                    ids = ids[turn]
                    if step == 0:
                        out.past_key_values.reorder_cache(turn)
                        mask, position = mask[turn], position[turn]
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                known = {}
                if "position_ids" in batch or axes.ndim == 3:
                    known["position_ids"] = (position + step).expand(*axes.shape[:-2], -1, -1)
                out = case.model(ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **known)
    finally:
        for hook in hooks:
            hook.remove()
    dense = execute == "dense"
    return _Decoded(
        torch.cat(logits, dim=1),
        run,
        recorders,
        out.past_key_values,
        torch.cat(embeds, dim=1) if dense else None,  # type: ignore[arg-type]
        torch.cat(positions, dim=-1) if dense else None,
    )


def _check_decoding(case: _Case) -> None:
    for side in SIDES:
        batch = pad_rows(case.model, case.rows, side)
        dense, fast = (_decode(case, batch, execute) for execute in EXECUTORS)
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(case.rows), case.steps)], dim=1)
        valid = mask.bool()
        _require_close(
            fast.logits[valid], dense.logits[valid], case, f"gathered decoding differs from dense ({side} padding)"
        )
        tokens = dense.cache.state.tokens
        replay = Replay(dense.run.ledger, dense.recorders)
        with torch.no_grad(), apply(case.model, replay, execute="dense", tokens=tokens):
            source: dict[str, Any] = {"inputs_embeds": dense.embeds}
            if anatomy_of(case.model).adds:
                # Embeddings alone do not bring what is added between layers.
                source = {**batch, "input_ids": tokens.ids}
                if (dropped_at := dense.cache.state.dropped_at) is not None:
                    # A replay knows what ran, not what was dropped; what is added to dropped tokens reaches no other.
                    valid = valid & (dropped_at == dense.run.shape.depth)
            full = case.model(**{**source, "attention_mask": mask, "position_ids": dense.position_ids}).logits
        what = f"cached decoding differs from one forward pass with the same decisions ({side} padding)"
        _require_close(dense.logits[valid], full[valid], case, what)
        if case.policy.causal:
            _check_causal(case, batch, mask, tokens, dense.run.ledger)


def _check_causal(case: _Case, batch: Mapping[str, Any], mask: Tensor, tokens: TokenMap, stepwise: Ledger) -> None:
    """The same decisions when the decoded tokens are there from the start."""
    known = {"position_ids": tokens.position_ids} if "position_ids" in batch or tokens.position_ids.ndim == 3 else {}
    longer = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], case.extra(len(mask))], dim=1),
        "attention_mask": mask,
        **known,
    }
    with (
        torch.no_grad(),
        apply(case.model, case.policy, execute="dense", tokens=tokens, force=True) as run,
    ):
        case.model(**longer)
    for layer in range(run.shape.depth):
        for name in ("attend", "feed", "read"):
            alike = torch.equal(getattr(run.ledger, name)(layer), getattr(stepwise, name)(layer))
            what = f"says causal=True, but decides otherwise in layer {layer} ({name}) when later tokens are known"
            _require(alike, case, f"{what}: set causal=False")


def _check_reordering(case: _Case) -> None:
    turn = torch.arange(len(case.rows)).roll(1)
    batch = pad_rows(case.model, case.rows, "left")
    length = batch["input_ids"].shape[1]
    for execute in EXECUTORS:
        straight = _decode(case, batch, execute).logits[:, length:]
        turned = _decode(case, batch, execute, turn=turn).logits[:, length:]
        what = "after the cache's rows were reordered, decoding differs: keep tensors in view.state batch first"
        _require_close(turned, straight[turn], case, f"{what} ({execute})")


def _check_beams(case: _Case) -> None:
    batch = pad_rows(case.model, case.rows, "left")
    batch.pop("position_ids", None)
    tokens = case.tokens(batch)
    if tokens is not None:
        tokens = tokens.select(torch.arange(len(case.rows)).repeat_interleave(2))
    pad = anatomy_of(case.model).text_config.pad_token_id
    found = []
    for execute in EXECUTORS:
        with torch.no_grad(), apply(case.model, case.policy, execute=execute, tokens=tokens):  # type: ignore[arg-type]
            found.append(
                case.model.generate(  # type: ignore[operator]
                    **batch, max_new_tokens=case.steps, num_beams=2, do_sample=False, pad_token_id=pad or 0
                )
            )
    _require(torch.equal(*found), case, "beam search finds other tokens under gathered than under dense")


def _check_cost(case: _Case) -> None:
    """Each row alone, where even a promised capacity leaves no slot empty, and all of them padded."""
    family = anatomy_of(case.model)
    counted: dict[str, list[list[int]]] = {}
    hooks = []

    def count(name: str, layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            counted[name][-1][layer] += args[0].numel() // args[0].shape[-1]

        return hook

    depth = len(family.layers)
    watched = {
        "attend": family.output_projection,
        "feed": family.mlp,
        "read": lambda layer: getattr(family.attention(layer), "v_proj", None),
    }
    for name, find in watched.items():
        for layer in range(depth):
            module = find(layer)
            if module is not None:
                hooks.append(module.register_forward_pre_hook(count(name, layer)))
    try:
        batches = {f"row {i}": row for i, row in enumerate(case.rows)}
        for what, batch in {**batches, "the batch": pad_rows(case.model, case.rows, "left")}.items():
            counted.update({name: [[0] * depth] for name in watched})

            def next_pass() -> None:
                for passes in counted.values():
                    passes.append([0] * depth)

            decoded = _decode(case, batch, "gathered", after_pass=next_pass)
            _compare_cost(case, decoded, {name: passes[:-1] for name, passes in counted.items()}, what)
    finally:
        for hook in hooks:
            hook.remove()


def _compare_cost(case: _Case, decoded: _Decoded, counted: dict[str, list[list[int]]], where: str) -> None:
    ledger, cost = decoded.run.ledger, decoded.run.ledger.cost()
    shapes = ledger.shape.layers
    bound = max((n for recorder in decoded.recorders for n in recorder.capacities), default=0) * ledger.passes[0].batch
    unit = {
        "attend": ("attention_projections", [s.query_flops for s in shapes]),
        "feed": ("mlp", [s.mlp_flops for s in shapes]),
        "read": ("attention_kv", [s.kv_flops for s in shapes]),
    }
    for phase, passes in ((cost.prefill, slice(0, 1)), (cost.decode, slice(1, None))):
        for name, (part, flops) in unit.items():
            if name == "read" and not hasattr(anatomy_of(case.model).attention(0), "v_proj"):
                continue
            layers = [sum(column) for column in zip(*counted[name][passes], strict=True)]
            table = getattr(ledger, name)
            width = ledger.passes[0].length
            columns = slice(0, width) if phase is cost.prefill else slice(width, None)
            planned = [int(table(layer)[:, columns].sum()) for layer in range(len(shapes))]
            for layer, (want, got) in enumerate(zip(planned, layers, strict=True)):
                # Within a promised capacity empty slots are computed too, where another policy took tokens away.
                fits = want == got or want < got <= bound
                what = f"{where}, layer {layer}: the ledger counts {want} {name} rows, {got} went through the model"
                _require(fits, case, what)
            spent = sum(n * f for n, f in zip(planned, flops, strict=True))
            _require(phase.flops[part] == spent, case, f"{where}: {part} is {phase.flops[part]}, counted {spent}")
            _require(
                phase.rows[name] == sum(planned),
                case,
                f"{where}: {phase.rows[name]} {name} rows, counted {sum(planned)}",
            )
    pairs = sum(
        int((readable_pairs(ledger, layer) & ledger.attend(layer)[:, :, None]).sum()) * s.pair_flops
        for layer, s in enumerate(shapes)
    )
    scores = cost.flops["attention_scores"]
    _require(scores == pairs, case, f"{where}: attention_scores is {scores}, counted {pairs}")
    stored = sum(
        0 if layer.index is None else int(_readable(layer.index, ledger.length, shape.window).sum()) * shape.kv_width
        for layer, shape in zip(decoded.cache.layers, shapes, strict=True)
    )
    stored *= ledger.shape.element_bytes
    _require(cost.kv_bytes == stored, case, f"{where}: kv_bytes is {cost.kv_bytes}, the cache holds {stored}")


def _readable(index: Tensor, length: int, window: int | None) -> Tensor:
    """Which slots the next query can read: a window's layer may hold some that it cannot."""
    return (index >= 0) & (index > length - window) if window is not None else index >= 0


def _check_gradients(case: _Case) -> None:
    """A policy's parameters learn on dense, a frozen model does not; without any, both executors' gradients agree."""
    model = case.model
    batch = pad_rows(model, case.rows, "right")
    learned = [p for p in case.policy.parts() if isinstance(p, nn.Module) and list(p.parameters())]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found: list[dict[str, Tensor]] = []
    try:
        model.requires_grad_(not learned)
        for part in learned:
            part.train()
        for execute in EXECUTORS[:1] if learned else EXECUTORS:
            model.zero_grad()
            policy = Composed(*case.policy.parts())
            with torch.enable_grad(), apply(model, policy, execute=execute, tokens=case.tokens(batch)):  # type: ignore[arg-type]
                logits = model(**batch).logits[batch["attention_mask"].bool()]
                _require(logits.requires_grad, case, "no gradient reaches any of its parameters in training mode")
                logits.float().square().mean().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        model.zero_grad()
    if not learned:
        for name in found[0].keys() | found[1].keys():
            dense, fast = (grads.get(name, torch.zeros(1)) for grads in found)
            near = (dense - fast).abs().max() <= 100 * case.tolerance * dense.abs().max().clamp(min=1e-4)
            _require(bool(near), case, f"the gradient of {name} differs between dense and gathered")
        return
    _require(not found[0], case, f"a gradient reached the frozen model ({next(iter(found[0]), '')})")
    for part in learned:
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                live = grad is not None and bool(grad.isfinite().all()) and bool(grad.any())
                _require(live, case, f"no gradient reaches its parameter {name}")
