"""lmms-eval around a checkpoint of ours; `LmmsTask` starts it in lmms-eval's own environment.

`python -m sparing.evaluate.tasks.lmms_worker request.json`: progress goes to standard output, a JSON list `[share done, words]` a
line; whatever lmms-eval prints goes to standard error. What was found, or why nothing was, is written to the file that the request
names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Not where the rest of sparing is used: only lmms-eval's own environment has it.
from lmms_eval import evaluator  # pyright: ignore[reportMissingImports]
from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.tasks import TaskManager, get_task_dict  # pyright: ignore[reportMissingImports]

from sparing.checkpoint import load, release
from sparing.evaluate.task import NotApplicable, Outcome, Progress, Subject
from sparing.evaluate.tasks.lmms_answers import generation_settings, turns_of_messages, turns_of_visuals
from sparing.evaluate.tasks.lmms_results import outcome_of
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.picture_answers import PictureAnswers
from sparing.evaluate.tasks.writing import Written

# lmms-eval's registry types its classes loosely.
_Base: Any = lmms


class SparingLmms(_Base):
    """A model under policies, as lmms-eval asks it.

    Args:
        answers: asks the model.
        chat: take a task's messages, pictures in their places; else its pictures first and then its text.
        max_new_tokens: most tokens to write, in place of the task's own.
    """

    def __init__(self, answers: PictureAnswers, *, chat: bool, max_new_tokens: int | None = None) -> None:
        super().__init__()
        self.answers, self.is_simple, self.max_new_tokens = answers, not chat, max_new_tokens
        self.written: dict[tuple[str, int], list[Written]] = {}

    def _turns(self, arguments: Sequence[Any]) -> Callable[[], list[dict[str, Any]]]:
        """A request's conversation, made when it is asked for."""
        context, doc, task, split = arguments[0], *arguments[-3:]

        def make() -> list[dict[str, Any]]:
            document = self.task_dict[task][split][doc]
            if self.is_simple:
                return turns_of_visuals(arguments[2](document), context)
            return turns_of_messages(arguments[1](document))

        return make

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the model writes."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        given = [request.args[1 if self.is_simple else 2] for request in requests]
        for i, settings in enumerate(given):
            groups.setdefault(repr(settings), []).append(i)
        for members in groups.values():
            settings = generation_settings(given[members[0]], self.max_new_tokens)
            found = self.answers.write([self._turns(requests[i].args) for i in members], **settings)
            for i, (text, written) in zip(members, found, strict=True):
                texts[i] = text
                task, doc = requests[i].args[-2], requests[i].args[-3]
                self.written.setdefault((task, doc), []).append(written)
        return texts

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Mean loss of each continuation's tokens: lmms-eval takes the choice with the least, as its own models give it."""
        asked = []
        for request in requests:
            target = request.args[1]
            if callable(target):
                target = target(self.task_dict[request.args[-2]][request.args[-1]][request.args[-3]])
            asked.append((self._turns(request.args), str(target)))
        # Wrapped: of what is neither text nor this, lmms-eval 0.7.3 makes a text, and then finds no numbers in it.
        return [GenerationResult((-total / tokens, greedy)) for total, greedy, tokens in self.answers.score(asked)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse.

        Raises:
            NotApplicable: always.
        """
        raise NotApplicable("the task goes on for several rounds, which this adapter does not ask")


def measured(request: dict[str, Any], on_step: Progress) -> Outcome:
    """Ask a task of a checkpoint.

    Args:
        request: as `LmmsTask` writes it.
        on_step: is told the share that is done.

    Raises:
        NotApplicable: the task cannot be asked of this model.
        ValueError: there is no such task, or bad data.
    """
    seed: int = request["seed"]
    manager = TaskManager("ERROR", include_path=request["include"])
    name: str = request["task"]
    if name not in manager.all_tasks:
        raise ValueError(
            f"lmms-eval knows no task {name!r}: see `lmms-eval tasks`, or name the folder of your YAML as include"
        )
    tasks = _tasks(name, manager, chat=True)
    chat = all(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())
    if not chat:
        tasks = _tasks(name, manager, chat=False)
    if any(task.OUTPUT_TYPE not in ("generate_until", "loglikelihood", "multiple_choice") for task in tasks.values()):
        raise NotApplicable(
            f"the task {name} is neither plain generation nor multiple choice, which is all that is asked here"
        )
    if request["limit"] is None:
        total = sum(len(task.eval_docs_no_media) for task in tasks.values())
    else:
        total = sum(min(request["limit"], len(task.eval_docs_no_media)) for task in tasks.values())
    if not total:
        raise ValueError(f"the task {name} has no documents to ask")
    model, processor = load(request["model"], device=request["device"])
    subject = Subject(model, processor, release(model).parts(), request["execute"])
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        on_step(min(0.99, done / total), f"{done} requests, {total} documents")

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - lmms-eval's tasks draw from it
    torch.manual_seed(seed)
    with subject.applied() as run:
        meter = Meter(run, model)
        answers = PictureAnswers(subject, meter, batch=request["batch"], tell=tell)
        lm = SparingLmms(answers, chat=chat, max_new_tokens=request["max_new_tokens"])
        found = evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=manager,
            limit=request["limit"],
            bootstrap_iters=0,
            torch_random_seed=seed,
            numpy_random_seed=seed,
            random_seed=seed,
            # Some tasks write a submission there.
            cli_args=argparse.Namespace(output_path=request["scratch"], process_with_media=False),
            process_docs_parallel=1,
        )
    return outcome_of(found, tasks, request["metric"], name, lm.written, meter, seed)


def _tasks(name: str, manager: Any, *, chat: bool) -> dict[str, Any]:
    """A task, or the tasks of a group, by name."""

    def flat(found: dict[Any, Any]) -> dict[str, Any]:
        tasks: dict[str, Any] = {}
        for key, value in found.items():
            tasks |= flat(value) if isinstance(value, dict) else {str(key): value}
        return tasks

    return flat(get_task_dict([name], manager, "chat" if chat else "simple"))


def _told(error: Exception) -> str:
    """One line on what went wrong; lmms-eval tries a document several times, and then only says that it did."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and isinstance(attempt.exception(), Exception):
        error = attempt.exception()
    line = (str(error).splitlines() or [""])[0]
    return line if type(error) is ValueError else f"lmms-eval broke off: {type(error).__name__}: {line}"


def main(path: str) -> None:
    """Do what a request says."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    # Tasks print; standard output is for progress alone.
    progress = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def on_step(done: float, words: str) -> None:
        progress.write(json.dumps([done, words]) + "\n")
        progress.flush()

    try:
        found: dict[str, Any] = dataclasses.asdict(measured(request, on_step))
    except NotApplicable as reason:
        found = {"not_applicable": str(reason)}
    except Exception as error:
        # Here and not there: what ends the process may print bars after its traceback.
        traceback.print_exc()
        found = {"error": _told(error)}
    Path(request["found"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
