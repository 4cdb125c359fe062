"""Answers that a model writes to questions in a local file, judged by a verifier."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sparing.anatomy import anatomy_of
from sparing.evaluate import statistics
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.metering import Batches, Meter, check_batch
from sparing.evaluate.tasks.rows import read_rows, value_of
from sparing.evaluate.tasks.verifiers import Verdict, Verify, check_code_allowed, verifier
from sparing.evaluate.tasks.writing import Written, as_figure, write, writing_figures

# Answers that the drill-down shows whole.
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class GenerationTask(Task):
    """Questions from a local file, answered in free text.

    Figures: `accuracy`, `pass_at_k` (with several samples: the share of questions that one of them solves), `output_tokens` (mean,
    each row up to its own stop), `output_tokens_median`, `truncated` (share that hit the limit), `tokens_per_second` and
    `seconds_per_solved` (all seconds in the model over answers that are right).

    Attributes:
        data: JSON lines, a JSON list (both also gzipped) or Parquet.
        question: field of the question; dots go into lists and objects (`prompt.0.content`).
        answer: field of the gold answer; for `code` the tests, run after the program.
        verifier: `exact` text, last `number`, `math` (LaTeX, by math-verify) or `code`.
        template: the prompt, with `{question}` and the row's other fields in braces.
        chat: put the prompt into the tokenizer's chat template.
        system: a system prompt; with `chat` only.
        max_new_tokens: most tokens to write.
        stop: strings that end an answer; they are no part of it.
        think_end: the text that ends the thinking, such as `</think>`: only what follows is judged, and an answer that never gets
            there is wrong.
        samples: answers to each question.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        limit: rows to ask, the first ones; all by default.
        batch: rows of a batch; `auto` halves them when memory runs out.
        allow_code: let `code` run what the model wrote.
        timeout: seconds of one program.
    """

    data: Path
    question: str = "question"
    answer: str = "answer"
    verifier: Literal["exact", "number", "math", "code"] = "exact"
    template: str = "{question}"
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    think_end: str | None = None
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    limit: int | None = None
    batch: int | Literal["auto"] = "auto"
    allow_code: bool = False
    timeout: float = 10.0

    def check(self) -> None:
        """Look at the settings and at every row."""
        check_batch(self.batch)
        for name in ("max_new_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.timeout <= 0:
            found = f"{self.temperature:g}, {self.top_p:g} and {self.timeout:g}"
            raise ValueError(f"expected temperature >= 0, 0 < top_p <= 1 and timeout > 0, got {found}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} at temperature 0 are all the same: give a temperature, or one sample"
            )
        if self.system is not None and not self.chat:
            raise ValueError("a system prompt needs a chat template: say chat=true, or put it into the template")
        if self.verifier == "code":
            check_code_allowed(self.allow_code)
        self._asked()

    def files(self) -> tuple[Path, ...]:
        """The data."""
        return (self.data,)

    def work(self, subject: Subject) -> float | None:
        """Tokens to write at most."""
        return float(len(read_rows(self.data, self.limit)) * self.samples * self.max_new_tokens)

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Ask, and judge."""
        self.check()
        tell = on_step or (lambda done, word: None)
        asked = self._asked()
        prompts = [self._encode(subject, prompt) for prompt, _ in asked]
        room = anatomy_of(subject.model).text_config.max_position_embeddings - self.max_new_tokens
        longest = max(map(len, prompts))
        if longest > room:
            raise NotApplicable(
                f"a prompt of {longest} tokens and {self.max_new_tokens} new ones do not fit into the model's "
                f"{room + self.max_new_tokens}: shorten the prompts, or lower max_new_tokens"
            )
        # Longest first, so that memory fails early and little of a batch is padding.
        order = [i for i in sorted(range(len(asked)), key=lambda i: -len(prompts[i])) for _ in range(self.samples)]
        written: list[tuple[int, Written]] = []
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}

        with subject.applied() as run, torch.random.fork_rng():
            torch.manual_seed(seed)
            meter = Meter(run, subject.model)

            def work(part: Sequence[int]) -> list[Written]:
                ids, mask = _padded([prompts[i] for i in part], subject.tokenizer.pad_token_id)
                return write(
                    subject.model,
                    subject.tokenizer,
                    meter,
                    ids,
                    mask,
                    max_new_tokens=self.max_new_tokens,
                    stop=self.stop,
                    after=self.think_end,
                    **(sampling if self.temperature > 0 else {}),
                )

            for part, found in Batches(self.batch, meter.device).run(order, work):
                written += zip(part, found, strict=True)
                tell(0.95 * len(written) / len(order), f"{len(written)} of {len(order)} answers")
        with verifier(self.verifier, allow_code=self.allow_code, timeout=self.timeout) as verify:
            texts = [self._text(subject, w) for _, w in written]
            verdicts = [self._judge(verify, text, asked[i][1]) for (i, _), text in zip(written, texts, strict=True)]
        tell(1.0, f"{sum(v.right for v in verdicts)} of {len(order)} right")
        return self._outcome(asked, written, texts, verdicts, meter, seed)

    def _asked(self) -> list[tuple[str, Any]]:
        """Prompts and gold answers."""
        found = []
        names = {name for _, name, _, _ in string.Formatter().parse(self.template) if name}
        if not names:
            raise ValueError(f"the template {self.template!r} never says {{question}}: every prompt would be the same")
        for i, row in enumerate(read_rows(self.data, self.limit)):
            where = f"{self.data}, row {i + 1}"
            gold = value_of(row, self.answer, where)
            if gold is None or gold == "":
                raise ValueError(f"{where}: no gold answer in {self.answer!r}; mend the data, or name another field")
            fields = {
                name: value_of(row, self.question, where) if name == "question" else value_of(row, name, where)
                for name in names
            }
            found.append((_filled(self.template, fields), gold))
        return found

    def _encode(self, subject: Subject, prompt: str) -> list[int]:
        """A prompt's tokens, begin token and chat template included."""
        tokenizer = subject.tokenizer
        if not self.chat:
            return tokenizer(prompt, verbose=False).input_ids
        if tokenizer.chat_template is None:
            raise NotApplicable("chat=true, but the tokenizer has no chat template: leave it out for a base model")
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        # The template has written the begin token already.
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _text(self, subject: Subject, written: Written) -> str | None:
        """The answer without its thinking and its stop string; `None` if the thinking never ended."""
        tokenizer = subject.tokenizer
        text = tokenizer.decode(list(written.ids), skip_special_tokens=True)
        if self.think_end is not None:
            if self.think_end not in text:
                # It may be a special token.
                text = tokenizer.decode(list(written.ids), skip_special_tokens=False)
            if self.think_end not in text:
                return None
            text = text.rpartition(self.think_end)[2]
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text

    def _judge(self, verify: Verify, text: str | None, gold: Any) -> Verdict:
        return Verdict(False, f"no {self.think_end} in the answer") if text is None else verify(text, gold)

    def _outcome(
        self,
        asked: Sequence[tuple[str, Any]],
        written: Sequence[tuple[int, Written]],
        texts: Sequence[str | None],
        verdicts: Sequence[Verdict],
        meter: Meter,
        seed: int,
    ) -> Outcome:
        right: dict[int, list[bool]] = {i: [] for i in range(len(asked))}
        lengths: dict[int, list[int]] = {i: [] for i in range(len(asked))}
        cut: dict[int, list[bool]] = {i: [] for i in range(len(asked))}
        for (i, answer), verdict in zip(written, verdicts, strict=True):
            right[i].append(verdict.right)
            lengths[i].append(len(answer.ids))
            cut[i].append(not answer.finished)
        scores = {str(i): sum(found) / len(found) for i, found in right.items()}
        figures: dict[str, Figure] = {}
        if self.samples == 1:
            accuracy = statistics.share(sum(v.right for v in verdicts), len(verdicts))
        else:
            # Questions are the sampling unit: answers to one question are alike.
            accuracy = statistics.mean(list(scores.values()), seed=seed)
        figures["accuracy"] = as_figure(accuracy, "higher", "share")
        if self.samples > 1:
            solved = statistics.share(sum(any(found) for found in right.values()), len(right))
            figures["pass_at_k"] = as_figure(solved, "higher", "share")
        figures |= writing_figures([v.right for v in verdicts], [w for _, w in written], meter, seed=seed)
        items = {
            "accuracy": scores,
            "output_tokens": {str(i): sum(found) / len(found) for i, found in lengths.items()},
            "truncated": {str(i): sum(found) / len(found) for i, found in cut.items()},
        }
        errors: dict[str, int] = {}
        for verdict in verdicts:
            if verdict.error:
                errors[verdict.error] = errors.get(verdict.error, 0) + 1
        shown = [
            {
                "item": str(i),
                "prompt": asked[i][0],
                "gold": str(asked[i][1]),
                "answer": text,
                "right": v.right,
                "why": v.error,
            }
            for (i, _), text, v in sorted(zip(written, texts, verdicts, strict=True), key=lambda x: x[0][0])[:SHOWN]
        ]
        details: dict[str, Any] = {
            "answers": shown,
            "errors": dict(sorted(errors.items(), key=lambda e: -e[1])[:SHOWN]),
            "cost": meter.details(),
            "documents": len(asked),
        }
        if not any(v.right for v in verdicts):
            details["seconds_per_solved"] = "none solved"
        return Outcome({**figures, **meter.figures()}, items, details)


def _filled(template: str, fields: Mapping[str, Any]) -> str:
    """A template with its fields; they may have dots, which `str.format` would take for attributes."""
    return "".join(
        text + ("" if name is None else str(fields[name])) for text, name, _, _ in string.Formatter().parse(template)
    )


def _padded(rows: Sequence[list[int]], pad: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the left, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
