"""lm-eval's `HFLM` around a model in a run. Import this inside functions only: lm-eval is an extra."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from sparing.evaluate.task import Subject
from sparing.evaluate.tasks.metering import Batches, BatchSize, Meter
from sparing.evaluate.tasks.two_pass import score_in_two_passes
from sparing.evaluate.tasks.writing import Written, write

# A request of lm-eval's: its strings (`None` for a window of a long text), the context's tokens, the continuation's.
Request = tuple[Any, list[int], list[int]]
OnRequests = Callable[[int], None]
Scoring = Literal["auto", "one_pass", "two_pass"]


# lm-eval's registry decorator hides the class from type checkers.
_Base: Any = HFLM


class PlannedLM(_Base):
    """A model under policies, as lm-eval asks it.

    Where it differs from `HFLM`:
        Padding is masked whenever there are policies. `HFLM` pads on the right without a mask, which a causal model does not
        notice, but a policy does that ranks a row's tokens or looks at its last one.
        Continuations may be scored in two passes, so that a policy never sees them with their context (`scoring`).
        Log-probabilities are taken in float32 whatever the model's dtype, and logits are computed for continuations only.
        `auto` halves batches when memory runs out, instead of trying the longest possible input first.
        Rows stop one by one, by any of the model's and the tokenizer's end tokens, so that what a row writes does not depend on
        its batch; with `think_end_token`, stop strings count only after it.

    Args:
        subject: the model, its tokenizer, and policies; `meter.run` is the run that it is in.
        meter: is told what the passes took.
        batch: rows of a batch, or `auto`.
        max_length: most tokens of an input; by the config if `None`.
        bos: whether texts begin with the begin token; as the tokenizer does it if `None`.
        think_end: the text after which the answer comes; all is answer if `None`.
        scoring: how continuations are scored: with their context in one pass, or after it, from the cache; `auto` takes two
            passes where a policy is not causal. Windows of long texts have no context, and are always scored in one.
        on_requests: is told how many more requests are done.

    Attributes:
        scored: the ways that were taken.
    """

    def __init__(
        self,
        subject: Subject,
        meter: Meter,
        *,
        batch: BatchSize = "auto",
        max_length: int | None = None,
        bos: bool | None = None,
        think_end: str | None = None,
        scoring: Scoring = "auto",
        on_requests: OnRequests | None = None,
    ) -> None:
        # A copy: HFLM may give it a padding token.
        tokenizer = copy.deepcopy(subject.tokenizer)
        if tokenizer.pad_token_id is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
            # HFLM would add a token that the model has no row for; padding is masked, so any token will do.
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        model: Any = subject.model
        self.meter = meter
        self.batches = Batches(batch, meter.device)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self.batches.size,
            max_length=max_length,
            add_bos_token=bos,
            think_end_token=think_end,
        )
        self.planned = bool(meter.run.policy.parts())
        self.two_pass = scoring == "two_pass" or (scoring == "auto" and not meter.run.policy.causal)
        self.scored: set[Literal["one_pass", "two_pass"]] = set()
        self.on_requests: OnRequests = on_requests or (lambda done: None)
        self.shortened = 0
        """Passes whose input was too long, and lost its beginning."""
        self.written: dict[tuple[str, int], list[Written]] = {}
        """What was written for each document: (task, document) -> answers."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM`, without its bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As `HFLM`, without its bars."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would have written it."""
        if self.two_pass and all(strings is not None for strings, _, _ in requests):
            self.scored.add("two_pass")
            return self._after_contexts(requests)
        self.scored.add("one_pass")
        # Requests that differ in their last token only share a pass; the longest come first, so memory fails early.
        order = Collator(
            requests,
            sort_fn=lambda r: (-len(r[1] + r[2]), tuple(r[1] + r[2])),
            group_by="contexts" if self.logits_cache else None,
            group_fn=lambda r: r[-2] + r[-1][:-1],
        )
        rows: list[Any] = list(itertools.chain.from_iterable(order.get_batched(n=0)))  # type: ignore[arg-type]
        found = []
        for part, logits_of_rows in self.batches.run(rows, self._continuation_logits):
            before = len(found)
            for (strings, context, continuation), logits in zip(part, logits_of_rows, strict=True):
                greedy, scores = logits.argmax(-1), F.log_softmax(logits.float(), dim=-1)
                for asked, tokens, _ in order.get_cache(
                    req_str=strings, cxt_toks=context, cont_toks=continuation, logits=scores[None]
                ):
                    wanted = torch.tensor(tokens, device=scores.device)
                    n = len(tokens)
                    each = scores[-n:].gather(1, wanted[:, None]).squeeze(1)
                    answer = float(each.sum()), bool((greedy[-n:] == wanted).all())
                    found.append(answer)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, answer)
            self.on_requests(len(found) - before)
        return order.get_original(found)

    def _after_contexts(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """The same in two passes; requests of one context share the first."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(tuple(self._input(request)[: -len(request[2])]), []).append(i)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def work(part: Sequence[tuple[tuple[int, ...], list[int]]]) -> list[list[tuple[float, bool]]]:
            choices = [(context, [requests[i][2] for i in members]) for context, members in part]
            return score_in_two_passes(self.model, self.meter, choices, self.batches.size)

        for part, answers in self.batches.run(sorted(groups.items(), key=lambda group: -len(group[0])), work):
            for (_, members), scores in zip(part, answers, strict=True):
                for i, answer in zip(members, scores, strict=True):
                    found[i] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                self.on_requests(len(members))
        return found

    def _input(self, request: Request) -> list[int]:
        """A request's context and continuation; what is too long loses its beginning."""
        _, context, continuation = request
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens after {len(context)}: expected both, and at most "
                f"{self.max_length} tokens to score; shorten it, or raise max_length"
            )
        # The last token is only predicted.
        self.shortened += len(context) + len(continuation) > self.max_length + 1
        return (context + continuation)[-(self.max_length + 1) :]

    def _continuation_logits(self, part: Sequence[Request]) -> list[Tensor]:
        """The logits that predict each row's continuation, `[tokens, vocabulary]`."""
        inputs = [self._input(request)[:-1] for request in part]
        longest = max(map(len, inputs))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in inputs], device=self.device)
        starts = [len(row) - len(request[2]) for row, request in zip(inputs, part, strict=True)]
        first = min(starts)
        hidden = self.planned and any(len(row) < longest for row in inputs)
        begin = self.meter.now()
        logits = self.model(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask if hidden else None,
            logits_to_keep=longest - first,
            use_cache=False,
        ).logits
        self.meter.book(len(inputs), self.meter.now() - begin)
        return [
            logits[i, start - first : len(row) - first]
            for i, (row, start) in enumerate(zip(inputs, starts, strict=True))
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes until a stop string."""
        texts: list[str] = [""] * len(requests)
        answers: list[Written | None] = [None] * len(requests)
        arguments: list[Any] = [request.args for request in requests]
        eos: Any = self.tok_decode(self.eot_token_id, skip_special_tokens=False)  # type: ignore[arg-type]
        groups: dict[str, list[int]] = {}
        for i in range(len(requests)):
            groups.setdefault(repr(arguments[i][1]), []).append(i)
        for members in groups.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(arguments[members[0]][1], self.max_gen_toks))
            stop = handle_stop_sequences(settings.pop("until", None), eos=eos)
            room = self._room_for(settings.pop("max_gen_toks"))
            longest_first = sorted(members, key=lambda i: -len(self.tok_encode(arguments[i][0])))

            def work(
                part: Sequence[int],
                settings: dict[str, Any] = settings,
                stop: list[str] = stop,
                room: tuple[int, int] = room,
            ) -> list[Written]:
                ids, mask = self.tok_batch_encode(
                    [arguments[i][0] for i in part], left_truncate_len=room[0], truncation=bool(self.truncation)
                )
                sampling = dict(settings)
                if not sampling.get("do_sample"):
                    sampling.pop("temperature", None)
                think_end = self.think_end_token if isinstance(self.think_end_token, str) else None
                return write(
                    self.model,
                    self.tokenizer,
                    self.meter,
                    ids,
                    mask,
                    max_new_tokens=room[1],
                    stop=stop,
                    after=think_end,
                    **sampling,
                )

            for part, found in self.batches.run(longest_first, work):
                for i, answer in zip(part, found, strict=True):
                    answers[i] = answer
                    texts[i] = self._answer_text(answer, stop)
                    self.cache_hook.add_partial("generate_until", arguments[i], texts[i])
                self.on_requests(len(part))
        for request, answer in zip(requests, answers, strict=True):
            assert answer is not None
            self.written.setdefault((request.task_name or "", request.doc_id or 0), []).append(answer)
        return texts

    def _room_for(self, new: int) -> tuple[int, int]:
        """Most tokens of a prompt, and of an answer."""
        if new >= self.max_length:
            raise ValueError(
                f"{new} tokens to write do not fit into {self.max_length} of the model with a prompt before them: ask for fewer "
                "(max_new_tokens)"
            )
        return self.max_length - new, new

    def _answer_text(self, answer: Written, stop: list[str]) -> str:
        text = self.tok_decode(list(answer.ids))  # type: ignore[arg-type]
        think_end: Any = self.think_end_token
        return postprocess_generated_text(text, stop, think_end)
