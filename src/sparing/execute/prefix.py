"""`VisionPrefix`: pictures that are encoded once and asked about many times."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.anatomy.asking import processed, question_prompt
from sparing.execute.apply import Run, replace_method, run_of
from sparing.execute.batches import COUNTS, PICTURES
from sparing.execute.beginnings import KEPT, Beginning, behind, split, tensors
from sparing.execute.given import Given
from sparing.execute.held import HeldPicture, HeldPictures, held_once
from sparing.execute.latest import Latest
from sparing.execute.supported import Watched
from sparing.plan import Composed, Policy
from sparing.tokens import Group, TokenMap

PIXELS = ("pixel_values", "pixel_attention_mask")


class VisionPrefix:
    """Pictures, encoded once: a question about them costs neither the encoder nor the pictures' keys and values.

    It needs a policy that freezes pictures (`ViCA`): then their keys and values depend on nothing but the pictures. Held are the
    projector's output and, for the layers that read pictures, keys before rotary embedding and values. Positions are applied when a
    question comes, so pictures may stand anywhere in it, behind any system prompt; rotated keys are kept for the latest places.
    Questions in a batch share the held tensors: nothing of a picture is copied for a row.

    Args:
        model: a Hugging Face vision-language model of a known family, in eval mode.
        processor: its own processor.
        pictures: one, or several; each question shows all of them, or those named for it.
        policy: what the model follows, `ViCA` among it; by default what it already follows (`sparing.load`).

    Attributes:
        flops: operations that were spent beforehand: on the `encoder`, on `attention_kv` of the reading layers, and on `beginnings`
            (`continued`).

    Raises:
        ValueError: a text model, no pictures, a processor without pictures, or policies that do not freeze pictures.
    """

    def __init__(
        self, model: nn.Module, processor: Any, pictures: Image | Sequence[Image], policy: Policy | None = None
    ) -> None:
        pictures = [pictures] if isinstance(pictures, Image) else list(pictures)
        if not pictures or getattr(processor, "image_processor", None) is None:
            raise ValueError("VisionPrefix needs at least one picture and a processor that takes pictures")
        tokenizer, sign = processor.tokenizer, _sign(processor)
        # Between two pictures stands a token that no processor puts inside one.
        between = tokenizer.eos_token
        made = processed(
            processor, [between.join([sign] * len(pictures))], [pictures], add_special_tokens=False, padding=False
        )
        ids = made["input_ids"][0]
        cuts = [-1, *(ids == tokenizer.eos_token_id).nonzero().flatten().tolist(), len(ids)]
        self._words: list[str] = []
        bounds = [(a + 1, b) for a, b in itertools.pairwise(cuts)]
        for start, stop in bounds:
            words = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if tokenizer(words, add_special_tokens=False)["input_ids"] != ids[start:stop].tolist():
                raise ValueError(
                    f"the tokenizer does not read back what the processor writes for a picture ({words[:40]!r}...): build the inputs "
                    "yourself, and the prefix with VisionPrefix.from_inputs"
                )
            self._words.append(words)
        self.processor = processor
        self._takes = frozenset(made) - set(PIXELS)
        self._hold(model, made, policy, bounds)

    @classmethod
    def from_inputs(cls, model: nn.Module, inputs: Mapping[str, Any], policy: Policy | None = None) -> VisionPrefix:
        """Hold the pictures of a batch that a processor (or a hand) made; every `ImageSpan` of it is one picture, in order.

        Questions are then batches made in the same way and called without pixels; by default their rows show the same pictures.
        """
        self = cls.__new__(cls)
        self.processor, self._words, self._takes = None, [], frozenset(inputs) - set(PIXELS)
        self._hold(model, inputs, policy, None)
        return self

    def _hold(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        policy: Policy | None,
        bounds: Sequence[tuple[int, int]] | None,
    ) -> None:
        """Run the encoder and the projections. `bounds`: where each picture lies in the one row; by default a span is a picture."""
        self.anatomy = anatomy = anatomy_of(model)
        self.model: Any = model
        if anatomy.vision_encoder is None:
            raise ValueError(f"{anatomy.config.model_type} reads text alone: choose a vision-language model")
        run = run_of(model)
        if policy is None and run is None:
            raise ValueError("VisionPrefix(policy=...): say what the model follows, such as ViCA(layers=[...])")
        self.policy = Composed(policy) if policy is not None else run.policy  # type: ignore[union-attr]
        if not any(Group.IMAGE in part.freezes for part in self.policy.parts()):
            raise ValueError(
                f"under {self.policy!r} layers change picture tokens, whose keys then depend on each conversation: a prefix "
                "needs a policy that freezes them, such as ViCA"
            )
        shape = anatomy.shape()
        layers = [i for i in range(shape.depth) if not any(part.unread(i) for part in self.policy.parts())]
        _refuse_autocast(self._device)
        device, dtype = self._device, next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        tokens = TokenMap.from_inputs(model, inputs)
        with torch.no_grad():
            embeds, more = _entering(anatomy, inputs)
            where = tokens.of(Group.IMAGE)
            additions = {layer: features for layer, (_, features) in anatomy.additions(more).items()}
            spans = [(r, span) for r, row in enumerate(tokens.images) for span in row]
            pictures: list[HeldPicture] = []
            groups = (
                [[span for _, span in spans if start <= span.start < stop] for start, stop in bounds]
                if bounds is not None
                else [[span] for _, span in spans]
            )
            at = 0
            for group in groups:
                size = sum(span.stop - span.start for span in group)
                pictures.append(HeldPicture(at, at + size, tuple(group)))
                at += size
            self.held = HeldPictures(anatomy, pictures, embeds[where], additions, layers)
        self.flops = {
            "encoder": sum(anatomy.picture_flops(span) for _, span in spans),
            "attention_kv": at * sum(shape.layers[i].kv_flops for i in layers),
        }
        every = tuple(range(len(pictures)))
        counts = [len(row) for row in tokens.images]
        self._rows: tuple[tuple[int, ...], ...] | None = None
        if bounds is None and len(counts) > 1:
            self._rows = tuple(tuple(every[sum(counts[:r]) : sum(counts[: r + 1])]) for r in range(len(counts)))
        self._sizes = {name: inputs[name] for name in PICTURES if name in inputs and name not in PIXELS}
        self._company = [len(pictures)] * len(pictures) if bounds is not None else [n for n in counts for _ in range(n)]
        self._counted = [name for name in COUNTS if name in inputs]
        self._weights = Watched(anatomy.decoder).state()
        self._beginnings: Latest[Beginning] = Latest(KEPT)

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def nbytes(self) -> int:
        """Bytes that the prefix holds, beginnings that were read included."""
        return sum(held_once([*self.held.tensors(), *tensors(self._beginnings)]))

    def inputs(
        self, questions: str | Sequence[str], *, pictures: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """A batch of prompts about the held pictures, padded on the left, as `sparing.anatomy.ask` makes it, without pixels.

        Args:
            questions: one a row. A question that contains the processor's image token is taken as a whole prompt, pictures
                where its image tokens are; others are put into the chat template behind their pictures.
            pictures: for each row the held pictures that it shows; all by default. Hand the same to `apply`.

        Raises:
            ValueError: a prefix made by `from_inputs`, or a prompt with another number of image tokens than pictures.
        """
        if self.processor is None:
            raise ValueError(
                "a prefix made by from_inputs has no processor: build the batch as that one was built, without pixels"
            )
        questions = [questions] if isinstance(questions, str) else list(questions)
        shown = self._shown(len(questions), pictures)
        sign = _sign(self.processor)
        texts = []
        for question, row in zip(questions, shown, strict=True):
            text = question if sign in question else question_prompt(self.processor, question, len(row))
            first, *rest = text.split(sign)
            if len(rest) != len(row):
                raise ValueError(
                    f"the prompt {text[:60]!r} has {len(rest)} image tokens ({sign!r}) for {len(row)} pictures: write one a picture"
                )
            texts.append(first + "".join(self._words[p] + piece for p, piece in zip(row, rest, strict=True)))
        made = processed(self.processor.tokenizer, texts, (), padding=True, padding_side="left")
        found = {name: value for name, value in made.items() if name in self._takes}
        found |= self._kinds(found["input_ids"])
        device = self._device
        return {name: value.to(device) for name, value in {**found, **self.sizes(len(questions), shown)}.items()}

    @contextlib.contextmanager
    def apply(self, *, pictures: Sequence[Sequence[int]] | None = None) -> Iterator[Run]:
        """Let the model follow the policies, on the fast executor, and take the pictures of new prompts from here.

        Inside, call `model(...)` or `model.generate(...)` on `inputs(...)`, or on any batch of the model's processor without its
        pixels. A cache that came from here goes on as ever, new pictures in later turns included.

        Args:
            pictures: for each row which of the held pictures its image tokens are, in order; by default all of them, in each
                row that has image tokens. `generate` may repeat rows (beams).

        Yields:
            The `Run`. Its ledger counts what a question costs; keys and values that the prefix holds are not in `kv_bytes`.

        Raises:
            ValueError: the model is in training mode, has changed since, or follows other policies.
        """
        if self.model.training:
            raise ValueError(
                "a prefix has no gradients: call model.eval(); to train, use sparing.apply on the pictures themselves"
            )
        if Watched(self.anatomy.decoder).state() != self._weights:
            raise ValueError(
                "the model's weights or adapters have changed since the pictures were encoded: make a new VisionPrefix"
            )
        bound = _Bound(self, None if pictures is None else tuple(map(tuple, pictures)))
        run = run_of(self.model)
        with contextlib.ExitStack() as stack:
            if run is None:
                run = stack.enter_context(Run(self.model, self.policy, execute="gathered", tokens=None, force=False))
            elif repr(run.policy) != repr(self.policy) or run.executor != "gathered":
                raise ValueError(
                    f"the model follows {run!r} (execute={run.executor!r}), the prefix is for {self.policy!r}: leave that apply first"
                )
            yield stack.enter_context(run.with_pictures(bound))

    def continued(
        self,
        inputs: Mapping[str, Tensor],
        *,
        pictures: Sequence[Sequence[int]] | None = None,
        later: bool = False,
        repeats: int = 1,
    ) -> dict[str, Any]:
        """The same batch, going on from what all its rows begin with: system prompt and pictures, up to the last image token.

        That beginning is read the first time; the latest two are kept. A question then costs the text behind the pictures, and its
        attention. What is returned goes into `model.generate(...)` inside `apply`, once. The beginning's tokens are in no output:
        no logits, hidden states or gradients. Positions are those that `generate` gives, padding left out.

        Args:
            inputs: from `inputs`, or a batch of the model's processor without pixels; padded on either side.
            pictures: for each row the pictures that it shows; by default those named to the `apply` around it, if there is one.
            later: give ids and positions of what is behind alone, as `model(...)` takes them.
            repeats: as often as `generate` will repeat each row: the larger of `num_beams` and `num_return_sequences`.

        Returns:
            `input_ids` (with the padding between beginning and question), `attention_mask`, `position_ids`, and `past_key_values`:
            a cache of this batch's own.

        Raises:
            ValueError: rows that do not begin alike or bring more than ids and mask, or a policy that is not causal or looks at more
                than which tokens are what (`Policy.by_layout`).
        """
        if isinstance(made := self._continued(inputs, pictures, later, repeats), str):
            raise ValueError(f"this batch has no common beginning to go on from: {made}; call the model on it as it is")
        return made

    def _continued(
        self,
        inputs: Mapping[str, Tensor],
        pictures: Sequence[Sequence[int]] | None,
        later: bool = False,
        repeats: int = 1,
    ) -> dict[str, Any] | str:
        """See `continued`; or why not."""
        run = run_of(self.model)
        if run is not None and pictures is None and isinstance(run.pictures, _Bound):
            pictures = run.pictures.pictures
        shown = self._shown(len(inputs["input_ids"]), pictures)
        _refuse_autocast(self._device)
        if strange := next((p for p in self.policy.parts() if not (p.causal and p.by_layout)), None):
            return f"{strange!r} decides by more than which tokens are what"
        if run is not None and run.described:
            return "sparing.apply(tokens=...) describes whole prompts"
        if isinstance(cut := split(self.anatomy, inputs, shown), str):
            return cut
        with self.apply(pictures=[shown[0]]) as run:
            under = run.policy.parts()
            key = (cut.name, shown[0], *map(repr, under))
            found = self._beginnings.take(key, lambda: self._read(cut.head, shown[0]))
        if (memory := self.anatomy.remembers_positions) is not None:
            # Later turns of a chat are placed by what the latest prompt left there.
            memory.rope_deltas = found.deltas
        return behind(cut, found.cache, repeats, later=later)

    def _read(self, head: Tensor, shown: tuple[int, ...]) -> Beginning:
        """Read the beginning `[1 h]` of prompts, as something that later questions in any mode may go on from."""
        with torch.inference_mode(False), torch.no_grad():
            head = head.clone()
        sizes = {name: value.to(head.device) for name, value in self.sizes(1, [shown]).items()}
        inputs = {"input_ids": head, "attention_mask": torch.ones_like(head), **sizes, **self._kinds(head)}
        with torch.inference_mode(False), torch.no_grad():
            cache = self.model(**inputs, use_cache=True, logits_to_keep=1, return_dict=True).past_key_values
        self.flops["beginnings"] = self.flops.get("beginnings", 0) + cache.state.ledger.cost().total
        memory = self.anatomy.remembers_positions
        return Beginning(cache, None if memory is None else memory.rope_deltas)

    def ask(
        self, questions: str | Sequence[str], *, pictures: Sequence[Sequence[int]] | None = None, **generate: Any
    ) -> list[str]:
        """Answers to questions, one batch; `generate` goes to `model.generate` (`max_new_tokens`, ...).

        What all of them begin with is read once, and is there for later questions (see `continued`), where that is possible.
        """
        inputs: dict[str, Any] = {**self.inputs(questions, pictures=pictures)}
        made = self._continued(inputs, pictures, repeats=_repeats(self.model, generate))
        inputs = inputs if isinstance(made, str) else made
        with torch.no_grad(), self.apply(pictures=pictures):
            out = self.model.generate(**inputs, **generate)
        out = out if isinstance(out, Tensor) else out.sequences
        return self.processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def sizes(self, rows: int, shown: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        """What the model is told of the sizes of the pictures of a batch, row by row."""
        shown = self._shown(rows, None) if shown is None else shown
        order = [p for row in shown for p in row]
        found = {name: value[order] for name, value in self._sizes.items()} if order else {}
        return found | {name: torch.tensor([len(row) for row in shown]) for name in self._counted}

    def _kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """Which tokens are of pictures, for a model that is told."""
        is_image: Any = self.anatomy.is_image_token(ids)
        return {"mm_token_type_ids": is_image.long()} if "mm_token_type_ids" in self._takes else {}

    def _shown(self, rows: int, pictures: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
        """Which pictures each of so many rows shows."""
        every = tuple(range(len(self.held.pictures)))
        given = pictures if pictures is not None else self._rows
        if given is None:
            return [every] * rows
        if not given or rows % len(given):
            raise ValueError(
                f"pictures= speaks of {len(given)} rows, the batch has {rows}: name the pictures of each row"
            )
        if strange := sorted({p for row in given for p in row} - set(every)):
            raise ValueError(f"pictures= names picture {strange[0]}; the prefix holds 0..{len(every) - 1}")
        if self._counted and any((self._company[p] == 1) != (len(row) == 1) for row in given for p in row):
            raise ValueError(
                "this family encodes a picture alone in its row otherwise than in company: make a prefix of the pictures that "
                "stand together"
            )
        return [tuple(row) for row in given for _ in range(rows // len(given))]


class _Bound:
    """A prefix with the pictures of each row named: what a `Run` asks."""

    def __init__(self, prefix: VisionPrefix, pictures: tuple[tuple[int, ...], ...] | None) -> None:
        self._prefix, self.pictures = prefix, pictures

    def sizes(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        """What a prompt's pictures are like, which `generate` does not always hand on; `inputs` is what the model was called with."""
        ids = inputs.get("input_ids")
        is_image = None if ids is None else self._prefix.anatomy.is_image_token(ids)
        return self._prefix.sizes(rows, self._shown(rows, None if is_image is None else is_image.any(1)))

    def given(self, tokens: TokenMap, encoded: int) -> Given:
        """The pictures of a prompt."""
        if encoded:
            raise ValueError(
                "the inputs bring pictures of their own into a prompt whose pictures come from a VisionPrefix: leave pixel_values out"
            )
        _refuse_autocast(tokens.group.device)
        has_pictures = torch.tensor([bool(row) for row in tokens.images])
        return Given(self._prefix.held, tokens, self._shown(tokens.batch, has_pictures))

    def _shown(self, rows: int, has_pictures: Tensor | None) -> list[tuple[int, ...]]:
        shown = self._prefix._shown(rows, self.pictures)
        if self.pictures is None and has_pictures is not None:
            shown = [row if has else () for row, has in zip(shown, has_pictures.tolist(), strict=True)]
        return shown


def _repeats(model: nn.Module, generate: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one."""
    config = generate.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(generate.get(name) or getattr(config, name, None) or 1 for name in names)


def _refuse_autocast(device: torch.device) -> None:
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "autocast casts what layers compute, but not the keys that a VisionPrefix holds: leave it, and convert the model instead "
            "(model.to(torch.bfloat16)) before the pictures are encoded"
        )


def _sign(processor: Any) -> str:
    return getattr(processor, "image_token", "<image>")


def _entering(anatomy: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What enters the decoder: embeddings `[b t d]`, and its other arguments; no layer runs."""
    caught: dict[str, Any] = {}

    def instead(stock: Any, *args: Any, **kwargs: Any) -> Any:
        caught.update(kwargs)
        return anatomy.output(last_hidden_state=kwargs["inputs_embeds"][:, -1:])

    restore = replace_method(anatomy.decoder, "forward", instead)
    try:
        anatomy.model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        restore()
    return caught.pop("inputs_embeds"), caught
