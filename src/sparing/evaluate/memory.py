"""The most memory that a piece of work holds at once, on a GPU or a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch


@torch.inference_mode()
def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes allocated at once beyond what was there before, from the allocator's own events.

    Args:
        work: what to do; what it returns is still held at the end.
        device: where it happens.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        out = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del out
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(profile_memory=True, activities=activities)
    with _quiet():
        profiler.start()
    try:
        out = work()
    finally:
        with _quiet():
            profiler.stop()
    del out
    held = peak = 0
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the process's standard error, where the profiler's library announces itself."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
