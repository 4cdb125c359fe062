"""`sparing.apply`: inside the context a Hugging Face model follows the policies' plans; after it nothing is left on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparing.anatomy import anatomy_of
from sparing.execute.arrivals import new_tokens
from sparing.execute.cache import PlannedCache, RunState
from sparing.execute.dense import Dense
from sparing.execute.encoder import EncoderNotes
from sparing.execute.gathered import Gathered
from sparing.execute.planning import Pass
from sparing.execute.programs import Programs
from sparing.execute.supported import (
    OneThread,
    check_arguments,
    check_capture,
    check_model,
    check_packed,
    check_pass,
    check_rows,
    selected_states,
)
from sparing.plan import Composed, Ledger, Policy
from sparing.tokens import TokenMap

# Decoder -> its run, weakly: what stands in for the decoder's forward keeps the run alive.
_applied: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Run]] = weakref.WeakKeyDictionary()


def apply(
    model: nn.Module,
    *policies: Policy,
    execute: str = "gathered",
    tokens: TokenMap | None = None,
    force: bool = False,
    capture: bool = False,
) -> Run:
    """Let `model` follow `policies` inside a `with` block.

    Args:
        model: a Hugging Face model of a known family, with its language-model head.
        policies: what decides; several are combined with `&`.
        execute: `gathered` computes only what is planned; `dense` computes everything and masks (it defines the meaning, and
            it is what routers are trained on).
        tokens: the prompts' `TokenMap`, where it cannot be told from the inputs (streaming groups, embeddings passed in).
        force: run the chosen executor even where no policy has anything to say (the stock forward runs otherwise).
        capture: record the pass of a prompt, and run later prompts of the same layout (which tokens are what, by row) from the
            record, without planning; on a GPU as a CUDA graph. For `gathered`, without gradients, and policies that decide by
            layout alone (`Policy.by_layout`). Hooks that only look are not called then.

    Returns:
        A context manager that yields a `Run`.

    Raises:
        ValueError: unknown family, contradictory policies, a layer that does not exist, or a model that is already applied.
    """
    return Run(model, Composed(*policies), execute=execute, tokens=tokens, force=force, capture=capture)


def run_of(model: nn.Module) -> Run | None:
    """The run that `model` is in: inside `with sparing.apply(model, ...)`, or loaded with policies; `None` outside."""
    run = _applied.get(anatomy_of(model).decoder)
    return None if run is None else run()


class Run:
    """A model under policies. Enter it with `with`; see `apply`.

    Attributes:
        policy: the policies, composed.
        ledger: the record of the latest prompt.
        pictures: what a `VisionPrefix` brings for new prompts, inside its `apply`.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Composed,
        *,
        execute: str,
        tokens: TokenMap | None,
        force: bool,
        capture: bool = False,
    ) -> None:
        self.anatomy = anatomy_of(model)
        self.model, self.policy, self._tokens, self._force = self.anatomy.model, policy, tokens, force
        if execute not in ("gathered", "dense"):
            raise ValueError(f'execute must be "gathered" or "dense", got {execute!r}')
        check_model(model, self.anatomy, execute)
        self.shape = self.anatomy.shape()
        for part in policy.parts():
            part.validate(self.shape)
        self._check_made_for(policy)
        ablations = [repr(part) for part in policy.parts() if part.ablation]
        if ablations and execute != "dense":
            raise ValueError(f'{ablations[0]} is an ablation, which is no speed-up: run it with execute="dense"')
        if capture:
            check_capture(execute, policy)
        self._programs = Programs(self.anatomy) if capture else None
        self._executor: Gathered | Dense = Gathered(self.anatomy) if execute == "gathered" else Dense(self.anatomy)
        self.ledger = Ledger(self.shape)
        self._called_with: dict[str, Any] = {}
        self._features: Any = None
        self._notes = EncoderNotes(self.anatomy, policy.looks_at_encoder)
        self._pictures: dict[str, Any] = {}
        self._encoded = 0
        self.pictures: Any = None
        self._exit = contextlib.ExitStack()
        self._one_thread = OneThread()

    def __enter__(self) -> Run:
        """Patch the decoder's forward."""
        decoder = self.anatomy.decoder
        if decoder in _applied:
            raise ValueError(
                f"this model is already inside sparing.apply, under {run_of(self.model)!r}: give all policies to one apply "
                "(they combine with &); sparing.release(model) takes off what sparing.load put there, and returns it"
            )
        if self._programs is not None:
            self._programs.enter()
        self._exit = contextlib.ExitStack()
        with self._exit as stack:
            _applied[decoder] = weakref.ref(self)
            stack.callback(_applied.pop, decoder, None)
            if (encoder := self.anatomy.vision_encoder) is not None:
                stack.callback(encoder.register_forward_hook(self._after_encoder).remove)
                self._notes.install(stack)
            if (around := self.anatomy.pictures_from) is not None:
                stack.callback(replace_method(around, "get_image_features", self._of_pictures))
            if isinstance(self._executor, Dense):
                stack.callback(self._executor.remove)
                self._executor.install()
            # Not a hook: adapters call the forward of the model inside them past its hooks.
            stack.callback(replace_method(self.model, "forward", self._one_thread.around(self._of_model)))
            # What `to`, `cuda`, `half` and the like call.
            stack.callback(replace_method(self.model, "_apply", self._of_move))
            stack.callback(replace_method(decoder, "forward", self._one_thread.around(self._forward)))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Leave the model as it was."""
        self._exit.close()
        self._forget()

    def _check_made_for(self, policy: Composed) -> None:
        """Refuse selections that speak of another checkpoint's tokens."""
        named = [s for part in policy.parts() for s in part.selections() if s.made_for is not None]
        if not named:
            return
        own = self.anatomy.fingerprint()
        if other := next((s for s in named if s.made_for != own), None):
            raise ValueError(
                f"{other!r} is for the checkpoint {other.made_for}, this model is {own}: find its own profile with "
                "sparing.lens.token_classes(model, processor, pictures)"
            )

    @property
    def described(self) -> bool:
        """Whether the caller said what the prompts' tokens are."""
        return self._tokens is not None

    @property
    def executor(self) -> str:
        """Which executor carries the plans out, `gathered` or `dense`."""
        return self._executor.name

    @contextlib.contextmanager
    def with_pictures(self, prefix: Any) -> Iterator[Run]:
        """For a moment, the pictures of new prompts are those that a `VisionPrefix` holds (`VisionPrefix.apply` enters this)."""
        before, self.pictures = self.pictures, prefix
        try:
            yield self
        finally:
            self.pictures = before

    @contextlib.contextmanager
    def trial(self, tokens: TokenMap) -> Iterator[Callable[[], Ledger]]:
        """Run prompts of this map for a moment, counted in full; yields what returns their ledger. Then all is as before."""
        before = self._tokens, self._force, self.ledger
        self._tokens, self._force = tokens, True
        try:
            yield lambda: self.ledger
        finally:
            self._tokens, self._force, self.ledger = before

    def __repr__(self) -> str:
        """What the model follows."""
        return repr(self.policy)

    def __deepcopy__(self, _: Any) -> Run:
        """A copied model would carry half of the run with it."""
        raise ValueError(
            "a model inside sparing.apply cannot be copied: copy it outside, or between sparing.release(model) and sparing.apply"
        )

    def _of_move(
        self, stock: Callable[..., Any], function: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """What moves or converts the model does the same to its policies."""
        moved = stock(function, *args, **kwargs)
        for part in self.policy.parts():
            if isinstance(part, nn.Module):
                part._apply(function, *args, **kwargs)
        return moved

    def _of_model(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with a note of what it was called with: the decoder inside a vision model sees no ids."""
        encoded = kwargs.get("mm_encoder_outputs")
        if encoded is None or (isinstance(encoded, dict) and not encoded):
            # `generate` encodes pictures before the model's forward, and says then alone how large they are.
            self._forget()
        self._called_with = {**self._pictures, **kwargs}
        if args:
            self._called_with["input_ids"] = args[0]
        try:
            return stock(*args, **kwargs)
        finally:
            # Whoever calls the decoder alone next speaks of other tokens.
            self._forget()

    def _forget(self) -> None:
        """What was noted of a call and its pictures."""
        self._called_with, self._features, self._pictures, self._encoded = {}, None, {}, 0
        self._notes.clear()

    def _of_pictures(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What encodes pictures, with a note of their sizes."""
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        self._pictures = {name: given[name] for name in self.anatomy.picture_sizes if given.get(name) is not None}
        out = stock(*args, **kwargs)
        features = getattr(out, "pooler_output", None)
        parts = [features] if isinstance(features, Tensor) else features or ()
        self._encoded = sum(part.numel() // part.shape[-1] for part in parts)
        return out

    def _after_encoder(self, _: nn.Module, __: Any, out: Any) -> None:
        self._features = out

    def _forward(
        self,
        stock: Callable[..., Any],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """What stands in for the decoder's forward."""
        decoder = self.anatomy.decoder
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("cache") is not None:
            raise ValueError(
                "continuous batching (generate_batch) packs sequences over a paged cache, which holds no plan: call generate"
            )
        embeds = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        b, t = embeds.shape[:2]
        use_cache = self.anatomy.text_config.use_cache if use_cache is None else use_cache
        check_pass(self.anatomy, embeds)
        state = past_key_values.state if isinstance(past_key_values, PlannedCache) else None
        self._check_cache(past_key_values, state)
        if state is not None and b != state.tokens.batch:
            raise ValueError(f"the cache is of {state.tokens.batch} rows, the inputs have {b}: give one row for each")
        past = 0 if state is None else state.tokens.length
        may_be_packed = (
            position_ids is not None and attention_mask is None and past_key_values is None and not use_cache
        )
        if position_ids is None:
            position_ids = torch.arange(past, past + t, device=embeds.device).unsqueeze(0)
        # Qwen-VL models work positions out from the whole mask, cached tokens included.
        position_ids = position_ids[..., -t:]
        if state is not None and state.shift is not None:
            position_ids = position_ids - state.shift[:, -1:]
        positions = self.anatomy.positions(_of_batch(position_ids, b))
        seen = {**self._called_with, "attention_mask": attention_mask, "position_ids": positions}
        if input_ids is not None:
            seen["input_ids"] = input_ids
        if state is None and self.pictures is not None:
            seen.update(self.pictures.sizes(seen, b))
        if state is None:
            state = self._begin(seen, embeds)
            new = state.tokens
        else:
            new = new_tokens(self.anatomy, seen, embeds, state)
            if state.idle and t > 1 and any(p.decodes and not p.idle(new) for p in self.policy.parts()):
                # A later turn of a chat can bring the first picture.
                state.idle = False
                assert isinstance(past_key_values, PlannedCache)
                if self._executor.ragged:
                    past_key_values.make_ragged()
                else:
                    past_key_values.make_whole()
            state.extend(new)
        if may_be_packed and not state.idle:
            check_packed(position_ids)
        state.unfinished = True
        self._notes.inputs = seen
        run = Pass(
            self.anatomy,
            self.policy.parts(),
            state,
            new,
            prefill=past == 0,
            device=embeds.device,
            logit_rows=_logit_rows(self._called_with, b, t),
            encoder_features=self._features,
            encoder=self._notes,
            encoded=None if self.anatomy.pictures_from is None else self._encoded,
        )
        ragged = self._executor.ragged and not state.idle
        if not isinstance(past_key_values, PlannedCache) and (use_cache or past_key_values is not None):
            past_key_values = PlannedCache.adopt(
                past_key_values, state, state.depth, ragged=ragged, config=decoder.config
            )
        cache = run.cache = past_key_values
        if past == 0 and not state.idle:
            before = position_ids
            if self.pictures is not None:
                run.given = self.pictures.given(state.tokens, self._encoded)
            embeds, position_ids = run.begin_prompt(embeds, position_ids)
            if position_ids is not before and attention_mask is None:
                # Without a mask transformers takes gapped positions for packed sequences.
                attention_mask = torch.ones(b, t, dtype=torch.long, device=embeds.device)
        if not ragged:
            if isinstance(self._executor, Dense):
                self._executor.current = None if state.idle else run
                if not state.idle and (additions := self.anatomy.additions(kwargs)):
                    # The executor adds them itself: not to dropped tokens.
                    run.additions = additions
                    kwargs = {k: v for k, v in kwargs.items() if k not in self.anatomy.adds}
            if not state.idle and (attention_mask is not None or state.tokens.padded):
                # The map says what is padding, also where the caller no longer does.
                attention_mask = state.tokens.valid.long()
            # Where nothing is planned the stock model embeds its ids itself; ours would only lie beside them to the end.
            prompt = {"input_ids": input_ids} if input_ids is not None and state.idle else {"inputs_embeds": embeds}
            del embeds, inputs_embeds
            try:
                out = stock(
                    **prompt,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=use_cache,
                    **kwargs,
                )
            finally:
                if isinstance(self._executor, Dense):
                    self._executor.current = None
            state.unfinished = False
            return out
        held = [embeds]
        del embeds, inputs_embeds
        out = self._gather(run, held, position_ids, cache, kwargs)
        state.unfinished = False
        return out.to_tuple() if kwargs.get("return_dict") is False else out

    def _gather(
        self, run: Pass, held: list[Tensor], position_ids: Tensor, cache: PlannedCache | None, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPast:
        config = self.anatomy.text_config
        if kwargs.get("output_attentions", config.output_attentions):
            raise ValueError('execute="gathered" keeps no attention maps: use execute="dense" with eager attention')
        if kwargs.get("output_router_logits"):
            raise ValueError(
                'execute="gathered" routes only the rows that are fed: use execute="dense" for router logits'
            )
        check_rows(self.anatomy)
        keep = kwargs.get("output_hidden_states")
        keep = config.output_hidden_states if keep is None else keep
        run.additions = self.anatomy.additions(kwargs)
        check_arguments(kwargs, self.anatomy.adds)
        assert isinstance(self._executor, Gathered)
        for kind in {self.anatomy.rotary_kind(layer) for layer in range(run.state.depth)}:
            if kind is not None:
                run.rotary[kind] = self.anatomy.rotary(held[0], position_ids, kind)
        wanted = None if keep else self._wanted()
        if self._programs is not None and self._programs.take(run, bool(keep)):
            last, hidden = self._programs.run(self._executor, run, held, wanted), ()
        else:
            last, hidden = self._executor.run(run, held, bool(keep), wanted)
        return self.anatomy.output(
            last_hidden_state=last, past_key_values=cache, hidden_states=selected_states(hidden, keep)
        )

    def _wanted(self) -> int | None:
        """How many last tokens the model around the decoder reads of its output, where nobody else looks at it; `None`: all."""
        keep = self._called_with.get("logits_to_keep", 0)
        alone = isinstance(keep, int) and keep > 0 and not self.anatomy.decoder._forward_hooks
        return keep if alone else None

    def _begin(self, seen: dict[str, Any], embeds: Tensor) -> RunState:
        """A new prompt: its map, its memory, its ledger."""
        tokens = self._tokens
        if tokens is None:
            tokens = new_tokens(self.anatomy, seen, embeds, None)
        elif tokens.group.shape != embeds.shape[:2]:
            raise ValueError(
                f"apply(tokens=...) describes {tuple(tokens.group.shape)} tokens, the prompt has {tuple(embeds.shape[:2])}"
            )
        else:
            tokens = dataclasses.replace(tokens, position_ids=self.anatomy.positions(tokens.position_ids))
        parts = self.policy.parts()
        for part in parts:
            _bring(part, embeds.device)
        self.ledger = Ledger(self.shape)
        self.ledger.ablation = any(part.ablation for part in parts)
        return RunState(
            executor=self._executor.name,
            policies=self._names(),
            tokens=tokens,
            prompt_length=tokens.length,
            idle=not self._force and all(p.idle(tokens) for p in parts),
            memories=[{} for _ in parts],
            ledger=self.ledger,
            depth=self.shape.depth,
            readable=[None] * self.shape.depth,
        )

    def _names(self) -> tuple[str, ...]:
        """The kinds of policy that run: a cache is not continued under others."""
        return tuple(type(part).__name__ for part in self.policy.parts())

    def _check_cache(self, cache: Any, state: RunState | None) -> None:
        if state is not None:
            if state.executor != self._executor.name:
                raise ValueError(
                    f"this cache was filled under execute={state.executor!r}; go on under the same one, or start a new prompt"
                )
            if state.policies != self._names():
                raise ValueError(
                    f"this cache was filled under the policies [{', '.join(state.policies)}], not [{', '.join(self._names())}]; "
                    "go on under the same ones, or start a new prompt"
                )
            if state.unfinished:
                raise ValueError(
                    "the last pass over this cache failed half-way, so its layers hold different tokens: start a new prompt"
                )
            if state.ledger is not self.ledger:
                self.ledger = state.ledger
            return
        if cache is None:
            return
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            kind = f"an offloading {type(cache).__name__}" if type(cache) is DynamicCache else type(cache).__name__
            raise ValueError(
                f"{kind} cannot hold a plan: pass no cache, or an empty DynamicCache (to generate: no cache_implementation)"
            )
        if cache.get_seq_length() > 0:
            raise ValueError("this cache was filled outside sparing.apply: pass no cache, or an empty DynamicCache")


def _bring(policy: Policy, device: torch.device) -> None:
    """Put a policy where the model is: it may have been moved between two `apply`, or before the first."""
    if isinstance(policy, nn.Module) and any(p.device != device for p in (*policy.parameters(), *policy.buffers())):
        policy.to(device)


def replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Let `function(stock, ...)` stand in for a module's method; returns what undoes it."""
    own, stock = module.__dict__.get(name), getattr(module, name)

    def restore() -> None:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)

    # Wrapped, because `generate` looks at the signature.
    setattr(module, name, functools.wraps(stock)(functools.partial(function, stock)))
    return restore


def _of_batch(position_ids: Tensor, batch: int) -> Tensor:
    """Position ids for each row of the batch (transformers passes one row where all are alike)."""
    return position_ids.expand(*position_ids.shape[:-2], batch, -1)


def _logit_rows(called_with: dict[str, Any], batch: int, length: int) -> int:
    keep = called_with.get("logits_to_keep", 0)
    if isinstance(keep, Tensor):
        return batch * keep.numel()
    return batch * (min(keep, length) if keep else length)
