"""Tasks of lm-eval, by name or from a local YAML, and multiple choice on a local file without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from sparing.evaluate.task import NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.harness_loading import (
    YAML,
    config_of,
    data_files_of,
    find,
    first_line,
    load_config,
    load_task,
    quiet,
    refuse_code,
)
from sparing.evaluate.tasks.harness_results import outcome_of
from sparing.evaluate.tasks.metering import Meter, check_batch
from sparing.evaluate.tasks.rows import read_rows, value_of

# lm-eval's own seed for drawing examples; a seed of 0 gives the examples that everyone else has.
FEWSHOT_SEED = 1234


@dataclasses.dataclass(frozen=True)
class HarnessTask(Task):
    """Any task of lm-eval.

    Attributes:
        task: a name that lm-eval knows (a task, group or tag), or a YAML file in its form.
        include: a folder of further YAML files, found by the names in them.
        limit: documents to ask, the first ones; all by default.
        fewshot: examples before each document; as the task has it by default.
        batch: rows of a batch; `auto` halves them when memory runs out.
        metric: the figure that counts; the task's first one by default.
        chat: put prompts into the tokenizer's chat template.
        system: a system prompt.
        max_new_tokens: most tokens to write; as the task has it by default.
        max_length: most tokens of an input; as the model's config has it by default.
        bos: begin texts with the begin token; as the tokenizer does it by default.
        think_end: the text that ends the thinking, such as `</think>`: only what follows is judged.
        scoring: how continuations are scored: `one_pass` together with their context, `two_pass` after it, from the cache, so
            that no policy decides with a look at them; `auto` takes two passes where a policy is not causal.
    """

    task: str
    include: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int | Literal["auto"] = "auto"
    metric: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    bos: bool | None = None
    think_end: str | None = None
    scoring: Literal["auto", "one_pass", "two_pass"] = "auto"

    def check(self) -> None:
        """Look at the settings, and whether there is such a task."""
        _check_settings(self)
        if self.include is not None and not self.include.is_dir():
            raise ValueError(f"include={self.include}: expected a folder of YAML files")
        find(self.task, self.include)

    def files(self) -> tuple[Path, ...]:
        """The YAML, and the local data that it names; nothing of what lm-eval brings itself."""
        if not self.task.endswith(YAML) and self.include is None:
            return ()
        path = find(self.task, self.include).path
        return () if path is None else (path, *data_files_of(config_of(path)))

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Ask the task."""
        self.check()
        with quiet():
            loaded = load_task(self.task, self.include)
            return _ask(loaded, self, self.task, subject, seed, on_step)


@dataclasses.dataclass(frozen=True)
class ChoiceTask(Task):
    """Multiple choice on a local file: which continuation of the context is the likeliest?

    Figures: `acc` (by the sum of log-probabilities) and `acc_norm` (divided by the choice's characters), as lm-eval has them.

    Attributes:
        data: JSON lines, a JSON list (both also gzipped) or Parquet.
        context: field of the text before the choices; dots go into lists and objects.
        choices: field of the list of choices.
        gold: field of the right choice: its index, its text, or its letter (A, B, ...).
        delimiter: put between context and choice.
        limit: rows to ask, the first ones; all by default.
        fewshot: examples before each row, drawn from the same file, the row itself left out.
        batch: rows of a batch; `auto` halves them when memory runs out.
        metric: the figure that counts.
        max_length: most tokens of an input; as the model's config has it by default.
        bos: begin texts with the begin token; as the tokenizer does it by default.
        scoring: `one_pass`, `two_pass` or `auto`, as in `HarnessTask`.
    """

    data: Path
    context: str = "context"
    choices: str = "choices"
    gold: str = "gold"
    delimiter: str = " "
    limit: int | None = None
    fewshot: int | None = None
    batch: int | Literal["auto"] = "auto"
    metric: Literal["acc", "acc_norm"] = "acc"
    max_length: int | None = None
    bos: bool | None = None
    scoring: Literal["auto", "one_pass", "two_pass"] = "auto"

    def check(self) -> None:
        """Look at the settings and at every row."""
        _check_settings(self)
        self._rows()

    def files(self) -> tuple[Path, ...]:
        """The data."""
        return (self.data,)

    def _rows(self) -> list[dict[str, Any]]:
        """Rows as lm-eval is given them."""
        found = []
        for i, row in enumerate(read_rows(self.data, self.limit)):
            where = f"{self.data}, row {i + 1}"
            context, choices, gold = (value_of(row, f, where) for f in (self.context, self.choices, self.gold))
            if not isinstance(choices, list) or len(choices) < 2:
                raise ValueError(f"{where}: expected a list of at least two choices in {self.choices!r}")
            choices = [str(choice) for choice in choices]
            found.append({"context": str(context), "choices": choices, "gold": _index(gold, choices, where)})
        return found

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Ask."""
        self.check()
        rows = self._rows()
        import datasets

        def dataset(**_: Any) -> Any:
            return {"test": datasets.Dataset.from_list(rows)}

        config = {
            "task": self.data.name.partition(".")[0] or "choices",
            "custom_dataset": dataset,
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": self.delimiter,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }
        with quiet():
            loaded = load_config(config)
            return _ask(loaded, self, str(self.data), subject, seed, on_step)


def _index(gold: Any, choices: list[str], where: str) -> int:
    """Which choice a row's gold answer is."""
    if isinstance(gold, bool):
        gold = int(gold)
    if isinstance(gold, str):
        if gold in choices:
            return choices.index(gold)
        if gold.strip().isdigit():
            gold = int(gold)
        elif len(gold.strip()) == 1 and gold.strip().isalpha():
            gold = ord(gold.strip().upper()) - ord("A")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(
            f"{where}: no gold answer: expected the index (0 to {len(choices) - 1}), the text or the letter of a choice, got {gold!r}"
        )
    return gold


def _check_settings(task: HarnessTask | ChoiceTask) -> None:
    limit, fewshot = task.limit, task.fewshot
    check_batch(task.batch)
    if task.scoring not in ("auto", "one_pass", "two_pass"):
        raise ValueError(f"scoring={task.scoring!r}: choose one of auto, one_pass, two_pass")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 document, or none given for all")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot={fewshot}: expected 0 or more examples")


# Asking ----------------------------------------------------------------------------------------------------------------


def _ask(
    loaded: Any, settings: HarnessTask | ChoiceTask, name: str, subject: Subject, seed: int, on_step: Progress | None
) -> Outcome:
    """Run lm-eval's tasks on a subject."""
    import torch
    from lm_eval.evaluator import evaluate

    from sparing.evaluate.tasks.language_model import PlannedLM

    tell = on_step or (lambda done, word: None)
    tasks: dict[str, Any] = loaded["tasks"]
    if not tasks:
        raise ValueError(f"the task {name} is a group without tasks here")
    chat = isinstance(settings, HarnessTask) and settings.chat
    if chat and subject.tokenizer.chat_template is None:
        raise NotApplicable("chat=true, but the tokenizer has no chat template: leave it out for a base model")
    for each in tasks.values():
        _prepare(each, settings, seed)
    total = sum(_requests(each, settings.limit) for each in tasks.values())
    done = 0

    def on_requests(more: int) -> None:
        nonlocal done
        done += more
        tell(min(1.0, done / max(total, 1)), f"{done} of about {total} requests")

    with subject.applied() as run, torch.random.fork_rng():
        # Tasks that sample are the only randomness left.
        torch.manual_seed(seed)
        meter = Meter(run, subject.model)
        lm = PlannedLM(
            subject,
            meter,
            batch=settings.batch,
            max_length=settings.max_length,
            bos=settings.bos,
            think_end=settings.think_end if isinstance(settings, HarnessTask) else None,
            scoring=settings.scoring,
            on_requests=on_requests,
        )
        found: Any = evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            system_instruction=settings.system if isinstance(settings, HarnessTask) else None,
        )
    outcome = outcome_of(found, loaded, settings.metric, name, lm.written, lm.shortened, meter, seed)
    scored = {"scoring": " and ".join(sorted(lm.scored))} if lm.scored else {}
    return dataclasses.replace(outcome, details={**outcome.details, **scored})


def _prepare(task: Any, settings: HarnessTask | ChoiceTask, seed: int) -> None:
    """Put settings into a task, and look at its documents."""
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(refuse_code(name))
    if getattr(task, "MULTIMODAL", False):
        raise NotApplicable(f"the task {name} has pictures, which this adapter does not pass on: use a text task")
    if settings.fewshot is not None:
        task.set_config(key="num_fewshot", value=settings.fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED + seed)
    if (
        isinstance(settings, HarnessTask)
        and settings.max_new_tokens is not None
        and task.OUTPUT_TYPE == "generate_until"
    ):
        task.set_config(key="generation_kwargs", value={"max_gen_toks": settings.max_new_tokens}, update=True)
    docs = task.eval_docs
    if len(docs) == 0:
        raise ValueError(f"the task {name} has no documents to ask")
    for i, doc in enumerate(docs):
        if settings.limit is not None and i >= settings.limit:
            break
        _check_gold(task, doc, f"the task {name}, document {i}")


def _check_gold(task: Any, doc: Any, where: str) -> None:
    """lm-eval counts a document without a gold answer as wrong, with a warning; here it is an error."""
    if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until") or getattr(task, "multiple_input", 0):
        return
    try:
        gold: Any = task.doc_to_target(doc)
    except Exception as error:
        raise ValueError(f"{where} has no gold answer: {first_line(error)}; see doc_to_target in its YAML") from error
    if task.OUTPUT_TYPE == "generate_until":
        missing = gold is None or gold in ("", [])
    else:
        choices = task.doc_to_choice(doc)
        golds = gold if isinstance(gold, list) else [gold]
        missing = not golds or any(
            g not in choices if isinstance(g, str) else not isinstance(g, int) or not 0 <= g < len(choices)
            for g in golds
        )
    if missing:
        raise ValueError(f"{where} has no gold answer: doc_to_target gives {gold!r}; mend the data, or its YAML")


def _requests(task: Any, limit: int | None) -> int:
    """About how many requests a task will make."""
    n = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    each = len(task.doc_to_choice(next(iter(task.eval_docs)))) if task.OUTPUT_TYPE == "multiple_choice" else 1
    return n * each * (task.config.repeats or 1)
