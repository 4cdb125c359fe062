"""What users wrap around a model (docs/around_the_model.md): refused here, with reason and cure, where no plan could hold."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from sparing.anatomy import Anatomy
from sparing.plan import Policy

ROW_BOUND = ("_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook")
"""What PEFT hooks on its layers while each row of a batch has an adapter of its own."""
HARMLESS = ("cache_position", "logits_to_keep", "labels", "num_items_in_batch")
"""Tensors that a decoder takes and makes nothing of."""
TEXT_AND_AXES = 4
"""Rows of M-RoPE positions with those of the text in front."""
SELECTS = hasattr(output_capturing, "selected_hidden_states")
"""Whether transformers takes indices in `output_hidden_states` as this library does: from 5.23 on."""
SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def check_model(given: nn.Module, anatomy: Anatomy, execute: str) -> None:
    """Raise `ValueError` if a plan cannot hold on this model, whatever it says.

    Args:
        given: what the user handed to `apply`.
        anatomy: that of the model inside.
        execute: the executor.
    """
    _refuse_adapters_of_prompts(given, anatomy)
    _refuse_several_devices(anatomy)
    if execute != "gathered":
        return
    for i, layer in enumerate(anatomy.layers):
        for part in (layer, anatomy.attention(i)):
            part = getattr(part, "_orig_mod", part)
            if any(base.__name__ in SHARDED for base in type(part).__mro__):
                raise ValueError(
                    f'layer {i} is sharded by FSDP, which brings its weights when the layer is called; execute="gathered" calls '
                    'only the parts of a layer: use execute="dense", or shard the whole model as one unit'
                )
            where = type(part).forward.__module__
            # Adapters of other packages know their own layers.
            if type(anatomy).__module__.startswith("sparing.") and not where.startswith("transformers."):
                raise ValueError(
                    f'{type(part).__name__} in layer {i} computes by a forward of its own ({where}), which execute="gathered" '
                    'would pass over: use execute="dense"'
                )


def check_pass(anatomy: Anatomy, embeds: Tensor) -> None:
    """Raise `ValueError` if a forward pass could not be planned."""
    decoder = anatomy.decoder
    if embeds.is_meta:
        raise ValueError(
            "the model is on the meta device and has no values: load its weights (sparing.load), or offload it with accelerate, "
            "whose hooks bring them"
        )
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing inside the layers would run the plan twice and drop the cache: call "
            'model.gradient_checkpointing_disable() (execute="gathered" keeps activations of the rows that run only), '
            "or model.eval() where nothing trains"
        )


def check_rows(anatomy: Anatomy) -> None:
    """Raise `ValueError` if something takes the rows of a module's input for the rows of the batch; `gathered` packs them."""
    if not hasattr(anatomy.model, "peft_config"):
        return
    found = [
        (module, key)
        for module in anatomy.model.modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(hook, functools.partial) and hook.func.__name__ in ROW_BOUND
    ]
    for module, key in found:
        # PEFT takes them off only after a forward that did not fail.
        module._forward_pre_hooks.pop(key)
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    if found:
        raise ValueError(
            'adapter_names gives each row of the batch its own adapter, but execute="gathered" packs rows: use '
            'execute="dense", or one batch an adapter with model.set_adapter(name)'
        )


def check_capture(execute: str, policy: Policy) -> None:
    """Raise `ValueError` if passes under a policy cannot be recorded for a layout."""
    if execute != "gathered":
        raise ValueError(f'capture=True records what is computed fast: use execute="gathered", not {execute!r}')
    if other := next((part for part in policy.parts() if not part.by_layout), None):
        raise ValueError(
            f"capture=True runs what was recorded for a layout, and {other!r} looks at more than the layout: leave capture out"
        )


def check_arguments(kwargs: dict[str, Any], adds: Sequence[str]) -> None:
    """Raise `ValueError` if the decoder was handed a tensor that the fast executor would leave out."""
    for name, value in kwargs.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        if name not in (*HARMLESS, *adds) and any(isinstance(part, Tensor) for part in parts):
            raise ValueError(f'execute="gathered" does not know what {name} does to the decoder: use execute="dense"')


def check_packed(position_ids: Tensor) -> None:
    """Raise `ValueError` where the stock model would take a row for several sequences; waits for the device once."""
    if position_ids.ndim == 3:
        if position_ids.shape[0] != TEXT_AND_AXES:
            return  # Positions of several axes alone are no sign of packing.
        position_ids = position_ids[0]
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            "position_ids with gaps and no attention_mask mean several sequences in a row to transformers: pass "
            "attention_mask (ones) if each row is one sequence, else one row a sequence, or hide them with LayerPlan.sees"
        )


def selected_states(hidden: tuple[Tensor, ...], keep: bool | int | Sequence[int]) -> tuple[Tensor | None, ...] | None:
    """The hidden states asked for; where indices were given the others are `None`, as in transformers."""
    if isinstance(keep, bool) or not keep:
        return hidden if keep else None
    if not SELECTS:
        raise ValueError(
            f"output_hidden_states={keep!r}: before 5.23 transformers takes indices for something else; pass True and choose"
        )
    wanted = {i % len(hidden) for i in ([keep] if isinstance(keep, int) else keep) if -len(hidden) <= i < len(hidden)}
    return tuple(x if i in wanted else None for i, x in enumerate(hidden))


def _refuse_adapters_of_prompts(given: nn.Module, anatomy: Anatomy) -> None:
    active: Any = getattr(given, "active_peft_config", None)
    kind = str(getattr(getattr(active, "peft_type", None), "value", ""))
    if kind == "PREFIX_TUNING":
        raise ValueError(
            "prefix tuning fills the cache with keys of no token, of which no plan can speak: use prompt tuning, whose virtual "
            "tokens are planned like others, or LoRA"
        )
    if kind == "ADAPTION_PROMPT" or not hasattr(anatomy.attention(0), "head_dim"):
        raise ValueError(
            f"{type(anatomy.attention(0)).__name__} in place of the family's attention does not say what its parts are: sparing "
            "works with the family's own attention; of PEFT's methods use LoRA or IA3"
        )


def _refuse_several_devices(anatomy: Anatomy) -> None:
    if (getattr(anatomy.model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "this model is split by tensor parallelism, and each process holds some heads only: load it without tp_plan"
        )
    found = sorted({str(device) for layer in anatomy.layers if (device := _runs_on(layer)) is not None})
    if len(found) > 1:
        raise ValueError(
            f"the layers run on several devices ({', '.join(found)}), and a plan lives on one: load the model with "
            'device_map={"": 0}; what does not fit can be offloaded (device_map="auto" with max_memory for one GPU and "cpu")'
        )


def _runs_on(layer: nn.Module) -> torch.device | None:
    """Where a layer computes; `None` if nothing says so."""
    hook: Any = getattr(layer, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    for device in (getattr(hook, "execution_device", None) for hook in hooks):
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next((p.device for p in layer.parameters() if not p.is_meta), None)


class OneThread:
    """Lets one thread at a time through; a run notes between calls what a prompt is, and threads would mix their notes."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which raises `ValueError` while another thread is in it, and which `torch.compile` leaves alone.

        Dynamo would take the identities by which layers share masks for constants, and compute something else.
        """

        @functools.wraps(function)
        def alone(*args: Any, **kwargs: Any) -> Any:
            if not self._lock.acquire(blocking=False):
                raise ValueError(
                    "another thread is running this model under the same sparing.apply: put a lock around model(...) and "
                    "generate(...), or give each thread a model of its own (DataParallel: use DistributedDataParallel)"
                )
            try:
                return function(*args, **kwargs)
            finally:
                self._lock.release()

        return torch.compiler.disable(alone)


class Watched:
    """A decoder whose state is looked at again and again: weights, adapters, mode.

    Args:
        decoder: its modules are listed now.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._modules = list(decoder.modules())
        self._parameters = [p for m in self._modules for p in m._parameters.values() if p is not None]
        adapted = [m for m in self._modules if not callable(getattr(m, "active_adapters", len))]
        self._adapted: list[Any] = adapted
        self.offloaded = any(p.is_meta for p in self._parameters)

    def state(self) -> tuple[Any, ...]:
        """Changes when a weight is written to, moved or converted, an adapter is switched, or a module changes its mode."""
        return (
            *((p.device, p.dtype, p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._parameters),
            *(
                (*m.active_adapters, getattr(m, "disable_adapters", None), getattr(m, "merged", None))
                for m in self._adapted
            ),
            sum(m.training for m in self._modules),
            len(self._modules),
        )
