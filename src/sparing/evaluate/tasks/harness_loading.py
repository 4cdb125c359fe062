"""Finding lm-eval's tasks, by name or in a YAML of one's own, and loading them without noise."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparing.evaluate.names import nearest

YAML = (".yaml", ".yml")


@functools.cache
def _manager(include: Path | None, *, defaults: bool = True) -> Any:
    """lm-eval's index of tasks; with its own fourteen thousand files it takes ten seconds or more."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a task is.

    Attributes:
        spec: its name or its settings, as lm-eval's `TaskManager.load` takes them.
        path: its YAML, if it is a single file.
        manager: who loads it.
    """

    spec: str | dict[str, Any]
    path: Path | None
    manager: Any


def find(name: str, include: Path | None) -> Found:
    """Find a task by its name or its YAML file.

    Raises:
        ValueError: there is none (the nearest names are offered), or its YAML cannot be read.
    """
    with quiet():
        path = Path(name) if name.endswith(YAML) else _file_of(name, include)
        if path is not None:
            config = config_of(path)
            if isinstance(config.get("task"), str):
                return Found(config, path, _manager(None, defaults=False))
            # A group names others: beside it, or lm-eval's.
            return Found(config, path, _manager(path.parent.resolve()))
        manager = _manager(None if include is None else include.resolve())
    if name not in manager.task_index:
        raise ValueError(f"lm-eval has no task {name!r}{nearest(name, manager.task_index)}; a file ends in .yaml")
    return Found(name, None, manager)


@functools.cache
def _file_of(name: str, include: Path | None) -> Path | None:
    """The one YAML of a single task, found without reading all of them as YAML; `None` leaves it to lm-eval's index."""
    import lm_eval.tasks

    line = re.compile(rf"""^task:[ \t]*['"]?{re.escape(name)}['"]?[ \t]*(?:#.*)?$""", re.MULTILINE)
    for root in filter(None, (include, Path(lm_eval.tasks.__file__).parent)):
        files = [path for ending in YAML for path in sorted(root.rglob(f"*{ending}"))]
        if found := [path for path in files if line.search(path.read_text(encoding="utf-8", errors="replace"))]:
            return found[0] if len(found) == 1 else None
    return None


def config_of(path: Path) -> dict[str, Any]:
    """A task's YAML, with data files found beside it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise ValueError(f"the task {path} does not exist: name a YAML file in lm-eval's form")
    try:
        config = load_yaml(path)
    except Exception as error:
        raise ValueError(_why_not(str(path), error)) from error
    if not isinstance(config.get("task") or config.get("group"), (str, list)):
        raise ValueError(f"{path} is no task of lm-eval's: it has no `task:` (its name)")
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and "data_files" in arguments:
        config["dataset_kwargs"] = {**arguments, "data_files": _beside(arguments["data_files"], path.parent)}
    return config


def _beside(files: Any, folder: Path) -> Any:
    """Data files of a YAML: a relative one that lies beside it is meant to."""
    if isinstance(files, dict):
        return {split: _beside(part, folder) for split, part in files.items()}
    if isinstance(files, list):
        return [_beside(part, folder) for part in files]
    beside = folder / str(files)
    return str(beside.resolve()) if beside.is_file() else files


def data_files_of(config: Mapping[str, Any]) -> list[Path]:
    """Local data files that a YAML names."""
    files = (config.get("dataset_kwargs") or {}).get("data_files", [])
    named = files.values() if isinstance(files, dict) else files if isinstance(files, list) else [files]
    flat = [f for part in named for f in (part if isinstance(part, list) else [part])]
    return [Path(f) for f in map(str, flat) if Path(f).is_file()]


def load_task(name: str, include: Path | None) -> Any:
    """lm-eval's task objects.

    Raises:
        ValueError: its data cannot be had, or are empty; one line says what to do.
    """
    found = find(name, include)
    try:
        return found.manager.load([found.spec])
    except Exception as error:
        raise ValueError(_why_not(name, error)) from error


def _why_not(name: str, error: Exception) -> str:
    """Why a task does not load, and what to do."""
    causes: list[BaseException] = [error]
    while (below := causes[-1].__cause__ or causes[-1].__context__) is not None and below not in causes:
        causes.append(below)
    kinds = {parent.__name__ for cause in causes for parent in type(cause).__mro__}
    words = " ".join(str(cause) for cause in causes)
    if "code_eval" in words or "HF_ALLOW_CODE_EVAL" in words:
        return refuse_code(name)
    if "scripts are no longer supported" in words:
        return f"the task {name} loads its data by a script, which `datasets` no longer runs: use a YAML with local data_files"
    network = {
        "ConnectionError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "DatasetNotFoundError",
        "HTTPError",
    }
    if kinds & network or "Couldn't reach" in words or "offline" in words.lower():
        return (
            f"the task {name} needs data that are neither here nor in reach ({first_line(error)}): run it once with a network, or "
            "write a YAML with `dataset_path: json` and local `data_files`"
        )
    return f"the task {name} cannot be loaded: {first_line(error)}"


def refuse_code(name: str) -> str:
    """The message for a task whose judge executes programs."""
    return (
        f"the task {name} runs code that the model wrote, unprotected: use a generation task with verifier: code and allow_code, "
        "which limits it"
    )


def first_line(error: BaseException) -> str:
    """An exception's kind and the beginning of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and `datasets` without their log lines and bars."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "transformers")]
    levels = [logger.level for logger in loggers]
    rooms: list[Any] = [lm_eval.api.task, lm_eval.api.model]
    bars = [room.tqdm for room in rooms]
    bars_on = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for room in rooms:
        room.tqdm = _no_bar
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for room, bar in zip(rooms, bars, strict=True):
            room.tqdm = bar
        if bars_on:
            datasets.enable_progress_bars()


def _no_bar(items: Any, **_: Any) -> Any:
    return items


def load_config(config: dict[str, Any]) -> Any:
    """lm-eval's task object of settings that are in no file."""
    return _manager(None, defaults=False).load([config])
