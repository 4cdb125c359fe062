"""A study's cells on a Ray cluster: each subject's cells on one worker, results written by the driver as they come."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparing.evaluate.environment import hardware, versions
from sparing.study.bench import Bench
from sparing.study.cells import Cell
from sparing.study.store import Result

if TYPE_CHECKING:
    from sparing.study.study import Study, Watcher


def run_on_ray(
    study: Study, pending: Sequence[Cell], watcher: Watcher, address: str | None
) -> Generator[tuple[Cell, Result]]:
    """Run cells on a cluster, and give each result as soon as it is there.

    Cells that time something run at the end, one after the other, with nothing of this study beside them.

    Args:
        study: the study; its YAML says how many cores and GPUs a cell takes.
        pending: the cells.
        watcher: is told when a cell begins.
        address: of the cluster; one on this machine, started and stopped here, by default.

    Raises:
        ValueError: the cluster cannot hold a single cell.
        ModuleNotFoundError: Ray is not installed.
    """
    import ray

    file = study.spec.file
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address=address,
            # Workers import the package from where the driver has it.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(file.cores)}},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        have = ray.cluster_resources()
        for what, wanted in (("CPU", file.cores), ("GPU", file.gpus)):
            if wanted > have.get(what, 0):
                raise ValueError(
                    f"a cell takes {wanted:g} {what} and the cluster has {have.get(what, 0):g}: "
                    "lower `cores`/`gpus` in the study, or add nodes"
                )
        timed = [cell for cell in pending if cell.task.does.timed]
        others = [cell for cell in pending if not cell.task.does.timed]
        slots = int(min(have["CPU"] // file.cores, have["GPU"] // file.gpus if file.gpus else have["CPU"]))
        yield from _run(study, others, watcher, slots)
        yield from _run(study, timed, watcher, 1)
    finally:
        if ours:
            ray.shutdown()


class _Worker:
    """A bench of its own on one node; the versions and the hardware that it tells are the node's."""

    def __init__(self, folder: Path, device: str, environment: dict[str, Any], cores: int) -> None:
        import ray

        torch.set_num_threads(cores)
        here = ray.get_runtime_context().get_node_id()
        name = next((node["NodeName"] for node in ray.nodes() if node["NodeID"] == here), here)
        environment = {**environment, "versions": versions(), "hardware": hardware(), "node": name}
        self._bench = Bench(folder, device=device, environment=environment, cores=cores)

    def run(self, cell: Cell) -> Result:
        return self._bench.run(cell)


def _run(study: Study, cells: Sequence[Cell], watcher: Watcher, slots: int) -> Generator[tuple[Cell, Result]]:
    import ray
    from ray.exceptions import RayActorError

    if not cells:
        return
    file = study.spec.file
    groups = deque(list(group) for _, group in itertools.groupby(cells, key=lambda cell: cell.subject))
    worker = ray.remote(num_cpus=file.cores, num_gpus=file.gpus)(_Worker)
    device = "cuda" if file.gpus and torch.device(study.device).type == "cpu" else str(study.device)

    def start() -> Any:
        return worker.remote(study.out.absolute(), device, study.environment, file.cores)

    queues: dict[Any, deque[Cell]] = {start(): deque() for _ in range(min(slots, len(groups)))}
    running: dict[Any, tuple[Any, Cell]] = {}

    def feed(actor: Any) -> None:
        if not queues[actor] and groups:
            queues[actor].extend(groups.popleft())
        if queues[actor]:
            cell = queues[actor].popleft()
            watcher.started(cell)
            running[actor.run.remote(cell)] = actor, cell

    try:
        for actor in queues:
            feed(actor)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, cell = running.pop(ready)
            try:
                result = ray.get(ready)
            except RayActorError as error:
                # The process is gone (out of memory, killed): its other cells go to a new one.
                result = Result("failed", error=f"the worker died: {' '.join(str(error).split())[:300]}")
                left, actor = queues.pop(actor), start()
                queues[actor] = left
            yield cell, result
            feed(actor)
    finally:
        for actor in queues:
            ray.kill(actor)
