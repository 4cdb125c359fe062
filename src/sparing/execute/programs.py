"""`Programs`: a prompt's pass recorded once for a layout of tokens, and run again without planning (on a GPU as a CUDA graph)."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparing.execute.cache import RaggedLayer
from sparing.execute.gathered import Gathered
from sparing.execute.planning import Pass

KEPT = 8
"""Programs of so many layouts are kept, the latest ones."""
VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""What marks an operation whose result tells the host, or the shapes behind it, what values were."""


class Programs:
    """Programs by layout: which tokens are what, how many rows, which last ones are wanted, on which weights.

    A layout's first prompt runs as ever, recorded; the next ones run its program. Recording keeps every intermediate result until
    it is over. Policies must decide by layout alone (`Policy.by_layout`), so that everything that planning does on the host comes
    out the same, and no layer may look at values (experts do).
    """

    def __init__(self, anatomy: Any) -> None:
        self._anatomy = anatomy
        self._kept: OrderedDict[tuple[Any, ...], _Recorded] = OrderedDict()

    def take(self, run: Pass, keep_hidden: bool) -> bool:
        """Whether a pass is one that can be recorded: a prompt, for its last hidden states, without gradients or given keys."""
        plain = run.given is None and not run.additions and not keep_hidden
        return plain and run.prefill and not torch.is_grad_enabled() and not self._anatomy.decoder.training

    def run(self, executor: Gathered, run: Pass, held: list[Tensor], keep_last: int | None) -> Tensor:
        """The last hidden states of a prompt; the cache, the ledger and the policies' memories are filled as by the executor."""
        key = self._key(run, held[0], keep_last)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = _Recorded(executor, run, held, keep_last)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return found.first()
        self._kept.move_to_end(key)
        return found.again(run, held.pop())

    def _key(self, run: Pass, x: Tensor, keep_last: int | None) -> tuple[Any, ...]:
        tokens, kind = run.new, x.device.type
        marks = (tokens.group, tokens.segment)
        return (
            *(None if mark is None else mark.cpu().numpy().tobytes() for mark in marks),
            *(x.shape, x.dtype, x.device, keep_last, run.cache is None, tokens.images),
            *((name, *(part.shape for part in pair)) for name, pair in run.rotary.items()),
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            # A program speaks of the very tensors that it was recorded on.
            *(p.data_ptr() for p in self._anatomy.decoder.parameters()),
        )


class _Recorded:
    """One layout's program, with what its first pass left beside the numbers: decisions, slots, memories."""

    def __init__(self, executor: Gathered, run: Pass, held: list[Tensor], keep_last: int | None) -> None:
        inputs = self._inputs(run, held[0])
        with _Tape() as tape:
            last, _ = executor.run(run, held, False, keep_last)
        layers: Sequence[Any] = [] if run.cache is None else run.cache.layers
        self._slots: list[Any] = [None if layer.keys is None else (layer.index, layer.holes) for layer in layers]
        pairs = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        self._program: Any = program(tape, inputs, [last, *pairs])
        self._last: Tensor | None = last
        self._decided = run.record.layers
        self._memories = [dict(memory) for memory in run.state.memories]
        self._dropped_at = run.state.dropped_at

    def first(self) -> Tensor:
        """What the pass gave that was recorded."""
        last, self._last = self._last, None
        assert last is not None
        return last

    def again(self, run: Pass, x: Tensor) -> Tensor:
        """Another prompt of the layout."""
        inputs = self._inputs(run, x)
        if x.is_cuda and not isinstance(self._program, _CudaGraph):
            self._program = _CudaGraph(self._program, inputs)
        last, *pairs = self._program(*inputs)
        run.record.layers = self._decided
        run.state.memories = [dict(memory) for memory in self._memories]
        run.state.dropped_at = self._dropped_at
        if run.cache is not None:
            found = iter(pairs)
            for layer, slot in zip(run.cache.layers, self._slots, strict=True):
                assert isinstance(layer, RaggedLayer)
                if slot is not None:
                    layer.append(next(found), next(found), *slot)
        return last

    @staticmethod
    def _inputs(run: Pass, x: Tensor) -> list[Tensor]:
        return [x, *(part for pair in run.rotary.values() for part in pair)]


class _Tape(TorchDispatchMode):
    """Notes every operation; their tensors stay alive with it, so that no identity is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


def program(tape: _Tape, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> GraphModule:
    """The operations through which `inputs` reach `outputs`; what depends on no input (masks, weights) is a constant of it.

    Raises:
        ValueError: an operation tells the host a value that depends on an input.
    """
    moving = _moving(tape, inputs)
    graph, constants, known = Graph(), nn.Module(), {}
    for i, x in enumerate(inputs):
        known[id(x)] = graph.placeholder(f"input_{i}")

    def node_of(x: Tensor) -> Node:
        if id(x) not in known:
            name = f"constant_{len(known)}"
            constants.register_buffer(name, x.detach(), persistent=False)
            known[id(x)] = graph.create_node("get_attr", name)
        return known[id(x)]

    for func, args, kwargs, out in tape.operations:
        if not any(_storage(x) in moving for x in _tensors((args, kwargs, out))):
            continue
        if any(tag in func.tags for tag in VALUES):
            raise ValueError(
                f"capture=True: a layer or a policy looks at values ({func}), so that another prompt of the same layout may be "
                "computed otherwise: leave capture out"
            )
        node = graph.call_function(func, *tree_map_only(Tensor, node_of, (args, kwargs)))
        if isinstance(out, Tensor):
            known[id(out)] = node
            continue
        for i, x in enumerate(out or ()):
            if isinstance(x, Tensor):
                known[id(x)] = graph.call_function(operator.getitem, (node, i))
    graph.output([node_of(x) for x in outputs])
    graph.eliminate_dead_code()
    return GraphModule(constants, graph)


def _moving(tape: _Tape, inputs: Sequence[Tensor]) -> set[int]:
    """The storages whose contents depend on an input, at any time: written to is as good as made."""
    moving = {_storage(x) for x in inputs}
    while True:
        before = len(moving)
        for func, args, kwargs, out in tape.operations:
            if any(_storage(x) in moving for x in _tensors((args, kwargs))):
                written = [x for x, slot in zip(args, func._schema.arguments, strict=False) if _is_written(slot)]
                moving |= {_storage(x) for x in _tensors((out, written))}
        if len(moving) == before:
            return moving


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class _CudaGraph:
    """A program as a CUDA graph: its kernels are launched at once. What comes out is copied, since the next run writes there."""

    def __init__(self, program: GraphModule, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Libraries choose kernels and make room on first use, which cannot be captured.
            for _ in range(2):
                program(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = program(*self._inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for held, x in zip(self._inputs, inputs, strict=True):
            held.copy_(x)
        self._graph.replay()
        return [x.clone() for x in self._outputs]
