"""Questions about pictures to profile a model on: half of them choose plans, the other half report them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.evaluate import statistics
from sparing.evaluate.kinds import IMAGE, MEANING
from sparing.evaluate.loss import Batch, TextLoss, measure_batches
from sparing.evaluate.material import Material, Split, TimedPrompt
from sparing.evaluate.measurements import Measurements
from sparing.evaluate.pictures.files import open_picture
from sparing.evaluate.pictures.painting import PAGE_QUESTIONS, Asked, PicturePage, paint
from sparing.evaluate.pictures.prompts import PicturePrompts, with_answer
from sparing.evaluate.pictures.questions import PictureQuestion, check_enough, split_questions
from sparing.evaluate.pictures.seeing import data_uri, shown
from sparing.evaluate.removal import IMAGE_MODULES, MODULES, PrefillFlops, Removal
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.verifiers import exact
from sparing.evaluate.tasks.writing import write
from sparing.execute import apply
from sparing.execute.batches import pad_rows
from sparing.plan import Policy
from sparing.tokens import Group, TokenMap

# Tokens of one forward pass, padding included: a CPU is quickest with few, whose activations stay in its caches.
CPU_TOKENS, GPU_TOKENS = 512, 8192
# Tokens of a model's own answer, where none is given.
OWN_TOKENS = 32
# Tokens that an answer may have when it is written anew: twice those of the longest expected one, within these.
LEAST_WRITTEN, MOST_WRITTEN = 8, 64


class PictureMaterial(Material):
    """Questions about pictures, asked through the model's own processor. Answers are teacher-forced, and they alone have a loss.

    Encoded pictures are kept in memory.

    Args:
        model: a Hugging Face model of a known vision family.
        processor: its own processor.
        questions: what is asked. Where an answer is missing, `prepare` lets the stock model write one.

    Raises:
        ValueError: no vision model, no processor for pictures, too few questions, or one that cannot be asked.
    """

    name = "pictures"
    modules = (*MODULES, *IMAGE_MODULES)
    fixed = "the vision encoder and the output matrix (lm_head) take"
    page = PicturePage
    asks = True

    def __init__(self, model: nn.Module, processor: Any, questions: Sequence[PictureQuestion]) -> None:
        super().__init__(model)
        self.prompts = PicturePrompts(model, processor)
        check_enough(len(questions), "this profile")
        self._tokenizer = self.prompts.tokenizer
        self._asked = [self._encode(question) for question in questions]
        self._content = [
            [asked.question.question, asked.question.answer, _digest(asked.prompt)] for asked in self._asked
        ]
        self._silent = 0
        self._halves: dict[Split, list[Asked]] = {}
        if self.ready:
            self._finish()

    @property
    def ready(self) -> bool:
        """Whether every question has its answer."""
        return all(asked.answer for asked in self._asked)

    def prepare(self, store: Measurements, tell: Callable[[float, str], None]) -> None:
        """Let the stock model answer what has no answer; questions to which it writes nothing are left out."""
        missing = [asked for asked in self._asked if not asked.answer]
        for i, part in enumerate(parts := list(self._parts(missing))):
            name = "own answers " + ",".join(str(self._asked.index(asked)) for asked in part)
            found = store.get(name, lambda part=part: {"ids": self._write((), part, OWN_TOKENS)})
            for asked, ids in zip(part, found["ids"], strict=True):
                self._asked[self._asked.index(asked)] = dataclasses.replace(asked, answer=ids)
            tell((i + 1) / len(parts), f"{len(part)} more questions answered by the stock model")
        self._silent = sum(not asked.answer for asked in self._asked)
        self._asked = [asked for asked in self._asked if asked.answer]
        check_enough(len(self._asked), f"without {self._silent} that the model writes nothing to, this profile")
        self._finish()

    @property
    def content(self) -> Any:
        """Words, given answers, and what the processor made of it."""
        return self._content

    def policies(self, removal: Removal) -> list[Policy]:
        """Image tokens are told by the token map."""
        return removal.policies()

    def check(self) -> None:
        """Run one prompt."""
        row = self._on_device([self._asked[0].prompt])
        last = row["input_ids"][:, -1:]
        batch = Batch({**row, "logits_to_keep": 2}, last, torch.ones_like(last).bool())
        measure_batches(lambda: self.applied(Removal()), self.model, [batch])

    def loss(self, split: Split, removal: Removal) -> TextLoss:
        """Every token of an answer is predicted; its end is not."""
        return self.loss_under(split, *self.policies(removal))

    def loss_under(self, split: Split, *policies: Policy) -> TextLoss:
        """The same under any policies; the stock model without."""
        asked = self._halves[split]
        order = _by_length(asked)
        found = measure_batches(
            lambda: apply(self.model, *policies), self.model, self._batches([asked[i] for i in order])
        )
        back = torch.tensor(order).argsort()
        return dataclasses.replace(
            found, tokens=found.tokens[back], windows=found.windows[back], predicted=found.predicted[back]
        )

    def timed(self, batch: int, steps: int) -> TimedPrompt:
        """The reporting half's question of median length, so many times; the steps are fed its words."""
        asked = self._halves["report"]
        middle = asked[_by_length(asked)[len(asked) // 2]]
        row = self._on_device([middle.prompt] * batch)
        row.pop("position_ids", None)
        steps = max(1, min(steps, self.longest - row["input_ids"].shape[1]))
        words = middle.prompt["input_ids"][0][~middle.tokens.of(Group.IMAGE)[0]]
        fed = words.repeat(-(-steps // len(words)))[:steps].expand(batch, -1)
        return TimedPrompt(row, fed.to(self.device))

    def paint(self, removal: Removal) -> dict[str, Any]:
        """The first questions of the reporting half, each run by itself."""

        def measure(removal: Removal, asked: Asked) -> TextLoss:
            return measure_batches(lambda: self.applied(removal), self.model, self._batches([asked]), states=True)

        return paint(measure, removal, self._halves["report"][:PAGE_QUESTIONS], self._tokenizer).as_dict()

    def shown(self) -> dict[str, str]:
        """The painted questions' pictures as the model saw them: `question.span` -> `data:` URI."""
        found = {}
        for i, asked in enumerate(self._halves["report"][:PAGE_QUESTIONS]):
            pictures = [open_picture(path).image for path in asked.question.pictures]
            seen = shown(self.prompts.processor, asked.prompt, len(asked.tokens.images[0]), pictures)
            found |= {f"{i}.{j}": data_uri(image) for j, image in enumerate(seen) if image is not None}
        return found

    def batches(self, split: Split) -> Iterator[Batch]:
        """One half, its answers teacher-forced, the shortest prompts first."""
        asked = self._halves[split]
        yield from self._batches([asked[i] for i in _by_length(asked)])

    def asked(self, split: Split) -> list[PictureQuestion]:
        """The questions of one half."""
        return [each.question for each in self._halves[split]]

    def answers(self, removal: Removal) -> list[str]:
        """Greedily decoded."""
        return self.answers_under(*self.policies(removal))

    def answers_under(self, *policies: Policy) -> list[str]:
        """The same under any policies; the stock model's without."""
        asked = self._halves["report"]
        most = min(MOST_WRITTEN, max(LEAST_WRITTEN, 2 * max(len(each.answer) for each in asked)))
        found: dict[int, str] = {}
        order = _by_length(asked)
        for part in self._parts([asked[i] for i in order]):
            for ids in self._write(policies, part, most):
                found[order[len(found)]] = self._text(ids)
        return [found[i] for i in range(len(asked))]

    def compare(self, dense: list[str], planned: list[str]) -> dict[str, Any]:
        """Exact match, capitals, outer spaces and a final full stop aside; with 95% intervals (Wilson)."""
        asked = self._halves["report"]
        references = [self._text(each.answer) for each in asked]
        own = [each.question.answer is None for each in asked]

        def share(arm: list[str], gold: list[str], which: list[bool]) -> list[float] | None:
            marks = [exact(_plain(a), _plain(b)).right for a, b, keep in zip(arm, gold, which, strict=True) if keep]
            if not marks:
                return None
            found = statistics.share(sum(marks), len(marks))
            return [found.value, found.low, found.high, found.n]

        given = [not each for each in own]
        return {
            "references": references,
            "own": own,
            "dense": dense,
            "planned": planned,
            "right": {"dense": share(dense, references, given), "planned": share(planned, references, given)},
            "same": share(planned, dense, [True] * len(asked)),
        }

    def describe(self) -> dict[str, Any]:
        """Questions, pictures, tokens, and whose the answers are."""
        halves = {name: self._halves[split] for name, split in (("chosen_on", "choose"), ("held_out", "report"))}  # type: ignore[index]
        return {
            "questions": len(self._asked),
            "pictures": len({path for asked in self._asked for path in asked.question.pictures}),
            "tokens": sum(asked.tokens.length for asked in self._asked) / len(self._asked),
            "image_tokens": sum(int(asked.tokens.of(Group.IMAGE).sum()) for asked in self._asked) / len(self._asked),
            "own_answers": sum(asked.question.answer is None for asked in self._asked),
            "unanswered": self._silent,
            "apart": self._apart,
            **{
                name: {"questions": len(half), "predicted": sum(len(asked.answer) for asked in half)}
                for name, half in halves.items()
            },
        }

    # Encoding ------------------------------------------------------------------------------------------------------

    def _encode(self, question: PictureQuestion) -> Asked:
        pictures = [open_picture(path).image for path in question.pictures]
        prompt = self.prompts.encode(question.question, pictures, question.place)
        answer: list[int] = []
        if question.answer is not None:
            self.prompts.check_words(question.answer, f"{question.place}: the answer")
            answer = self.prompts.answer_ids(question.question, len(pictures), question.answer)
            if not answer:
                raise ValueError(f"{question.place}: the tokenizer makes no tokens of the answer {question.answer!r}")
        self.prompts.check_length(prompt["input_ids"].shape[1] + max(1, len(answer)), question.place)
        tokens = TokenMap.from_inputs(self.model, prompt)
        if not tokens.has(Group.IMAGE):
            raise ValueError(
                f"{question.place}: the processor put no image tokens into the prompt: check its chat template"
            )
        return Asked(question, prompt, tokens, answer)

    def _finish(self) -> None:
        """Split, and count what a prefill of both halves takes."""
        choose, report, self._apart = split_questions([asked.question for asked in self._asked])
        self._halves = {"choose": [self._asked[i] for i in choose], "report": [self._asked[i] for i in report]}
        longest = max(asked.length for asked in self._asked)
        kinds = torch.zeros(len(self._asked), longest, dtype=torch.long)
        valid = torch.zeros_like(kinds).bool()
        for i, asked in enumerate(self._asked):
            valid[i, : asked.length] = True
            kinds[i, : asked.tokens.length] = asked.tokens.of(Group.IMAGE)[0]
        share = int(kinds.sum()) / int(valid.sum())
        self.kinds = {IMAGE: {"share": share, "meaning": MEANING[IMAGE]}}
        logits = sum(
            len(part) * (1 + max(len(asked.answer) for asked in part))
            for half in self._halves.values()
            for part in self._parts([half[i] for i in _by_length(half)])
        )
        encoder = sum(self._family.picture_flops(span) for asked in self._asked for span in asked.tokens.images[0])
        fixed = 2 * self.shape.hidden * self.shape.vocabulary * logits + encoder
        self.flops = PrefillFlops(self.shape, kinds, valid, names=("text", IMAGE), fixed=fixed)

    def _batches(self, asked: Sequence[Asked]) -> Iterator[Batch]:
        """Teacher-forced answers, padded on the left so that they end together."""
        for part in self._parts(asked):
            longest = max(len(each.answer) for each in part)
            row = self._on_device([with_answer(each.prompt, each.answer) for each in part])
            scored = torch.tensor([[i >= longest - len(each.answer) for i in range(longest)] for each in part])
            targets = row["input_ids"][:, -longest:]
            yield Batch({**row, "logits_to_keep": longest + 1}, targets, scored.to(self.device))

    def _parts(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Batches, as large as their padded tokens allow."""
        most = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS
        part: list[Asked] = []
        for each in asked:
            longest = max(each.length, *(other.length for other in part), 0)
            if part and longest * (len(part) + 1) > most:
                yield part
                part = []
            part.append(each)
        if part:
            yield part

    def _write(self, policies: Sequence[Policy], part: Sequence[Asked], most: int) -> list[list[int]]:
        """The tokens that a planned model writes, without what ended them."""
        row = self._on_device([asked.prompt for asked in part])
        row.pop("position_ids", None)
        ids, mask = row.pop("input_ids"), row.pop("attention_mask")
        most = max(1, min(most, self.longest - ids.shape[1]))
        with apply(self.model, *policies) as run:
            meter = Meter(run, self.model)
            written = write(self.model, self._tokenizer, meter, ids, mask, max_new_tokens=most, **row)
        found = [list(each.ids[: len(each.ids) - each.finished]) for each in written]
        # A picture's placeholder among written tokens has no picture behind it: the answer ends there.
        return [list(itertools.takewhile(lambda i: not self.prompts.is_image(i), ids)) for ids in found]

    def _on_device(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in pad_rows(self.model, rows, "left").items()}

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _by_length(asked: Sequence[Asked]) -> list[int]:
    return sorted(range(len(asked)), key=lambda i: asked[i].length)


def _digest(row: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(text: str) -> str:
    return text.casefold().strip().removesuffix(".")
