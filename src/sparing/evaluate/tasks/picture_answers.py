"""Answers to conversations with pictures, through a processor's own chat template: written, or scored as continuations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.anatomy import anatomy_of, processed
from sparing.evaluate.task import NotApplicable, Subject
from sparing.evaluate.tasks.metering import Batches, BatchSize, Meter
from sparing.evaluate.tasks.two_pass import padded_rows
from sparing.evaluate.tasks.writing import Written, write

# One conversation: turns of a role and a list of contents, each a text or a picture, as chat templates take it.
Turns = list[dict[str, Any]]
Tell = Callable[[int], None]


class PictureAnswers:
    """A vision-language model under policies, asked conversations with pictures.

    Rows of a batch are padded on the left. Those with pictures and those without go apart, since processors do not mix them.

    Args:
        subject: the model, its processor, and policies; `meter.run` is the run that it is in.
        meter: is told what the passes took.
        batch: rows of a batch, or `auto`.
        two_pass: score continuations after their conversation, from the cache, so that no policy decides with a look at them;
            by default where a policy is not causal.
        tell: is told how many more conversations are done.

    Raises:
        NotApplicable: the checkpoint has no chat template, or is asked about pictures that it cannot see.
    """

    def __init__(
        self,
        subject: Subject,
        meter: Meter,
        *,
        batch: BatchSize = "auto",
        two_pass: bool | None = None,
        tell: Tell | None = None,
    ) -> None:
        self.model: Any = subject.model
        self.meter = meter
        self.two_pass = not meter.run.policy.causal if two_pass is None else two_pass
        tokenizer: Any = subject.tokenizer
        # Copies: padding is set to our own liking.
        self.processor: Any = copy.copy(subject.processor)
        if getattr(self.processor, "chat_template", None) is None and tokenizer.chat_template is None:
            raise NotApplicable(
                "the checkpoint has no chat template, so nobody knows how to put pictures before a question"
            )
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            # Padding is masked, so any token will do.
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
        self.sees = hasattr(self.processor, "image_processor")
        if hasattr(self.processor, "tokenizer"):
            self.processor.tokenizer = self.tokenizer
        else:
            self.processor = self.tokenizer
        self.batches = Batches(batch, meter.device)
        self.tell: Tell = tell or (lambda done: None)
        self.room: int = anatomy_of(subject.model).text_config.max_position_embeddings

    def write(
        self,
        asked: Sequence[Callable[[], Turns]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> list[tuple[str, Written]]:
        """What the model writes after each conversation, without its stop string.

        Args:
            asked: conversations, each made when its batch is: pictures of all would not fit into memory.
            max_new_tokens: most tokens to write; fewer where the model has no room for them.
            stop: strings that end an answer.
            sampling: as `generate` takes it; greedy by default.

        Returns:
            Text and tokens, in the order asked.

        Raises:
            NotApplicable: a prompt leaves no room for an answer.
        """

        def work(part: Sequence[Callable[[], Turns]]) -> list[tuple[str, Written]]:
            found: list[Any] = [None] * len(part)
            for members, inputs in self._encoded([turns() for turns in part]):
                ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
                written = write(
                    self.model,
                    self.tokenizer,
                    self.meter,
                    ids,
                    mask,
                    max_new_tokens=self._most(ids.shape[1], max_new_tokens),
                    stop=stop,
                    **inputs,
                    **(sampling or {}),
                )
                for i, answer in zip(members, written, strict=True):
                    found[i] = (self._text(answer, stop), answer)
            return found

        return self._in_batches(asked, work)

    @torch.inference_mode()
    def score(self, asked: Sequence[tuple[Callable[[], Turns], str]]) -> list[tuple[float, bool, int]]:
        """How likely continuations of conversations are.

        Args:
            asked: a conversation, made when its batch is, and what is to follow.

        Returns:
            Sum of log-probabilities (nats), whether greedy decoding would write it, and its tokens.

        Raises:
            ValueError: an empty continuation.
        """

        def work(part: Sequence[tuple[Callable[[], Turns], str]]) -> list[tuple[float, bool, int]]:
            found: list[Any] = [None] * len(part)
            ends = [self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids for _, text in part]
            if not all(ends):
                raise ValueError("expected a continuation of at least one token, got an empty one")
            for members, inputs in self._encoded([turns() for turns, _ in part]):
                mine = [ends[i] for i in members]
                scored = self._in_two_passes(inputs, mine) if self.two_pass else self._in_one_pass(inputs, mine)
                for i, logits in zip(members, scored, strict=True):
                    wanted = torch.tensor(ends[i], device=logits.device)
                    each = F.log_softmax(logits.float(), dim=-1).gather(1, wanted[:, None])
                    found[i] = (float(each.sum()), bool((logits.argmax(-1) == wanted).all()), len(wanted))
            return found

        return self._in_batches(asked, work)

    def _in_one_pass(self, inputs: Mapping[str, Tensor], ends: Sequence[list[int]]) -> list[Tensor]:
        """The logits that predict each row's continuation, `[tokens, vocabulary]`: conversation and continuation together."""
        extended = _extended(inputs, ends, self.tokenizer.pad_token_id)
        self._most(extended["input_ids"].shape[1] - 1, 1)
        begin = self.meter.now()
        logits: Tensor = self.model(**extended, logits_to_keep=max(map(len, ends)) + 1, use_cache=False).logits
        self.meter.book(len(ends), self.meter.now() - begin)
        return [row[-len(end) - 1 : -1] for row, end in zip(logits, ends, strict=True)]

    def _in_two_passes(self, inputs: Mapping[str, Tensor], ends: Sequence[list[int]]) -> list[Tensor]:
        """The same with the conversation alone first, and the continuation from the cache."""
        self._most(inputs["input_ids"].shape[1] + max(map(len, ends)) - 1, 1)
        begin = self.meter.now()
        out = self.model(**inputs, logits_to_keep=1, use_cache=True)
        middle = self.meter.now()
        logits = list(out.logits)
        if any(len(end) > 1 for end in ends):
            # The last token is only predicted.
            ids, new = padded_rows([end[:-1] for end in ends], "right", self.meter.device)
            cache = out.past_key_values
            # After pictures positions do not go on from the number of tokens, and models remember those of another batch.
            known = cache.state.tokens.position_ids
            last = known.amax(-1, keepdim=True).amax(tuple(range(known.ndim - 2)), keepdim=True)
            later = self.model(
                input_ids=ids,
                attention_mask=torch.cat([inputs["attention_mask"], new], dim=1),
                position_ids=(last + 1 + torch.arange(ids.shape[1], device=ids.device)).expand(*known.shape[:-1], -1),
                past_key_values=cache,
                use_cache=True,
            ).logits
            logits = [torch.cat([a, b[: len(end) - 1]]) for a, b, end in zip(logits, later, ends, strict=True)]
        self.meter.book(len(ends), middle - begin, self.meter.now() - middle)
        return logits

    def _in_batches(self, asked: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        found = []
        for part, answers in self.batches.run(asked, work):
            found += answers
            self.tell(len(part))
        return found

    def _encoded(self, rows: Sequence[Turns]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Which rows go together, and their inputs on the model's device."""
        seeing = [i for i, turns in enumerate(rows) if _pictures(turns)]
        blind = [i for i, turns in enumerate(rows) if not _pictures(turns)]
        if seeing and not self.sees:
            raise NotApplicable("the task has pictures, and the checkpoint no processor that takes any")
        for members in (seeing, blind):
            if members:
                yield members, self._inputs([rows[i] for i in members])

    def _inputs(self, rows: Sequence[Turns]) -> dict[str, Tensor]:
        nested = [_pictures(turns) for turns in rows]
        # A tokenizer's own template may know nothing but texts.
        if self.processor is self.tokenizer:
            rows = [[{**t, "content": "".join(c["text"] for c in t["content"])} for t in turns] for turns in rows]
        texts = [self.processor.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in rows]
        found = processed(self.processor, texts, nested, padding=True)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return {
            name: tensor.to(self.meter.device, dtype) if tensor.is_floating_point() else tensor.to(self.meter.device)
            for name, tensor in found.items()
            if isinstance(tensor, Tensor)
        }

    def _most(self, prompt: int, new: int) -> int:
        """Tokens that may be written after a prompt."""
        if prompt >= self.room:
            raise NotApplicable(
                f"a prompt of {prompt} tokens, its pictures included, does not fit into the model's {self.room}"
            )
        return min(new, self.room - prompt)

    def _text(self, answer: Written, stop: Sequence[str]) -> str:
        text: str = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        for end in stop:
            text = text.partition(end)[0]
        return text


def _pictures(turns: Turns) -> list[Any]:
    return [content["image"] for turn in turns for content in turn["content"] if content["type"] == "image"]


def _extended(inputs: Mapping[str, Tensor], ends: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Inputs with continuations, still padded on the left; what marks tokens (masks, kinds) goes along."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompts = mask.sum(1).tolist()
    longest = max(n + len(end) for n, end in zip(prompts, ends, strict=True))
    found = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.shape != ids.shape or tensor.is_floating_point():
            continue
        rows = torch.full(
            (len(ends), longest), pad if name == "input_ids" else 0, dtype=tensor.dtype, device=tensor.device
        )
        for i, (n, end) in enumerate(zip(prompts, ends, strict=True)):
            rows[i, longest - n - len(end) : longest - len(end)] = tensor[i, tensor.shape[1] - n :]
            if name == "input_ids":
                rows[i, longest - len(end) :] = torch.tensor(end, device=tensor.device)
            elif name == "attention_mask":
                rows[i, longest - len(end) :] = 1
        found[name] = rows
    return found
