"""`Programs`: a prompt's pass recorded once for a layout of tokens, and run again without planning (on a GPU as a CUDA graph)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sparing.anatomy import Anatomy
from sparing.execute.cache import RaggedLayer
from sparing.execute.gathered import Gathered
from sparing.execute.latest import Latest
from sparing.execute.planning import Pass
from sparing.execute.supported import Watched

KEPT = 8
"""Programs of so many layouts are kept, the latest ones."""
VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""What marks an operation whose result tells the host, or the shapes behind it, what values were."""
LOOKS = (
    "capture=True: a layer or a policy looks at values ({}), so that another prompt of the same layout may be computed otherwise: "
    "leave capture out"
)


class Programs:
    """Programs by layout: which tokens are what, how many rows, which last ones are wanted.

    A layout's first prompt runs as ever, recorded; the next ones run its program. Recording keeps every intermediate result until
    it is over. Policies must decide by layout alone (`Policy.by_layout`), so that everything that planning does on the host comes
    out the same, and no layer may look at values (experts do). Programs of another state of the model (weights written to, moved or
    exchanged, adapters switched, another mode) are dropped.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._kept: Latest[_Recorded] = Latest(KEPT)
        self._state: Any = None
        self._watched: Watched | None = None

    def enter(self) -> None:
        """Look at the model's modules anew: inside a `with` they stay what they are."""
        self._watched = Watched(self._anatomy.decoder)

    def take(self, run: Pass, keep_hidden: bool) -> bool:
        """Whether a pass is one that can be recorded: a prompt, for its last hidden states, without gradients or given keys."""
        plain = run.given is None and not run.additions and not keep_hidden
        plain = plain and run.prefill and not torch.is_grad_enabled() and not self._anatomy.decoder.training
        return plain and self._watched is not None and not self._watched.offloaded

    def run(self, executor: Gathered, run: Pass, held: list[Tensor], keep_last: int | None) -> Tensor:
        """The last hidden states of a prompt; the cache, the ledger and the policies' memories are filled as by the executor."""
        self._anatomy.masks(exact=True)
        assert self._watched is not None
        if (state := self._watched.state()) != self._state:
            self._kept.clear()
            self._state = state
        found = self._kept.take(_key(run, held[0], keep_last), lambda: _Recorded(executor, run, held, keep_last))
        # Recording has used what was held.
        return found.again(run, held.pop()) if held else found.first()


def _key(run: Pass, x: Tensor, keep_last: int | None) -> tuple[Any, ...]:
    tokens, kind = run.new, x.device.type
    return (
        *(None if mark is None else mark.cpu().numpy().tobytes() for mark in (tokens.group, tokens.segment)),
        *(x.shape, x.dtype, x.device, keep_last, run.cache is None, repr(tokens.images)),
        *((name, *(part.shape for part in pair)) for name, pair in run.rotary.items()),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        *map(repr, run.policies),
    )


class _Recorded:
    """One layout's program, with what its first pass left beside the numbers: decisions, slots, memories."""

    def __init__(self, executor: Gathered, run: Pass, held: list[Tensor], keep_last: int | None) -> None:
        inputs = _inputs(run, held[0])
        tape = _Tape()
        with tape, _Told(tape):
            last, _ = executor.run(run, held, False, keep_last)
        layers: Sequence[Any] = [] if run.cache is None else run.cache.layers
        self._slots: list[Any] = [None if layer.keys is None else (layer.index, layer.holes) for layer in layers]
        pairs = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        self._program: Any = program(tape, inputs, [last, *pairs])
        self._last: Tensor | None = last
        self._decided = run.record.layers
        self._memories = _copied(run.state.memories)
        self._dropped_at = run.state.dropped_at

    def first(self) -> Tensor:
        """What the pass gave that was recorded."""
        last, self._last = self._last, None
        assert last is not None
        return last

    def again(self, run: Pass, x: Tensor) -> Tensor:
        """Another prompt of the layout."""
        inputs = _inputs(run, x)
        # Casts were recorded, and would be made twice.
        with torch.autocast(x.device.type, enabled=False):
            if x.is_cuda and not isinstance(self._program, _CudaGraph):
                self._program = _CudaGraph(self._program, inputs)
            last, *pairs = self._program(*inputs)
        run.record.layers = self._decided
        run.state.memories = _copied(self._memories)
        run.state.dropped_at = self._dropped_at
        if run.cache is not None:
            found = iter(pairs)
            for layer, slot in zip(run.cache.layers, self._slots, strict=True):
                assert isinstance(layer, RaggedLayer)
                if slot is not None:
                    layer.append(next(found), next(found), *slot)
        return last


def _inputs(run: Pass, x: Tensor) -> list[Tensor]:
    return [x, *(part for pair in run.rotary.values() for part in pair)]


def _copied(memories: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, [dict(memory) for memory in memories])


class _Tape(TorchDispatchMode):
    """Notes every operation; their tensors stay alive with it, so that no identity is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Tensor] = []
        """Tensors whose values the host asked for past all operations."""
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class _Told(TorchFunctionMode):
    """Notes who is turned into Python's or NumPy's values: no operation says so."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self._tape.told.append(args[0])
        return func(*args, **(kwargs or {}))


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

    if any(_storage(x) in moving for x in tape.told):
        raise ValueError(LOOKS.format("tolist, numpy"))
    for func, args, kwargs, out in tape.operations:
        if not any(_storage(x) in moving for x in _tensors((args, kwargs, out))):
            continue
        if any(tag in func.tags for tag in VALUES) or isinstance(out, (bool, int, float)):
            raise ValueError(LOOKS.format(func))
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
        # The graph knows addresses: the program keeps alive what lies there.
        self._program = program
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(inputs[0].device):
            self._inputs = [x.clone() for x in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # Libraries choose kernels and make room on first use, which cannot be captured.
                for _ in range(2):
                    program(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = program(*self._inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for held, x in zip(self._inputs, inputs, strict=True):
            held.copy_(x)
        self._graph.replay()
        return [x.clone() for x in self._outputs]
