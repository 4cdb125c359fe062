"""Conversations as batches: written by the model's own chat template, labels on what the assistant says alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparing.anatomy import anatomy_of, processed
from sparing.execute.batches import pad_rows, split_rows
from sparing.train.conversations import LOOKED_AT, Conversation

IGNORED = -100


class ChatBatches(Dataset):
    """Conversations as rows for `fit`: item `i` is encoded when it is asked for, `collate` pads.

    Args:
        model: a Hugging Face vision-language model of a known family.
        processor: its own processor.
        conversations: what to train on.
        max_length: tokens of a row, pictures included; what is longer is cut at the end.

    Raises:
        ValueError: there is no processor that takes pictures, or its tokenizer does not say where its tokens come from.
    """

    def __init__(
        self, model: nn.Module, processor: Any, conversations: Sequence[Conversation], max_length: int | None = None
    ) -> None:
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(
                "the checkpoint has no processor that takes pictures: save it there with processor.save_pretrained(directory)"
            )
        if not processor.tokenizer.is_fast:
            raise ValueError("the tokenizer does not say where its tokens come from: load the fast one")
        positions = getattr(anatomy_of(model).text_config, "max_position_embeddings", None)
        self.model, self.processor, self.conversations = model, processor, conversations
        self.max_length = min(n for n in (max_length, positions, 1 << 20) if n is not None)

    def __len__(self) -> int:
        """Conversations."""
        return len(self.conversations)

    def check(self) -> None:
        """Look whether there is anything to learn.

        Raises:
            ValueError: in none of the first rows, for all answers lie behind the cut.
        """
        first = range(min(LOOKED_AT, len(self)))
        if not any(bool((self[i]["labels"] != IGNORED).any()) for i in first):
            raise ValueError(
                f"nothing is left to learn of the first {len(first)} conversations, whose answers all lie behind {self.max_length} "
                "tokens: give shorter ones, or a larger --max-length where the model takes it"
            )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One conversation as a batch of one."""
        return encode(self.model, self.processor, self.conversations[index], self.max_length)

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows as one batch, padded on the right."""
        labels = [row["labels"] for row in rows]
        longest = max(part.shape[1] for part in labels)
        pad = nn.functional.pad
        batch = pad_rows(self.model, [{k: v for k, v in row.items() if k != "labels"} for row in rows], "right")
        found = torch.cat([pad(part, (0, longest - part.shape[1]), value=IGNORED) for part in labels])
        return {**batch, "labels": found}


def encode(model: nn.Module, processor: Any, said: Conversation, max_length: int) -> dict[str, Tensor]:
    """A conversation as a batch of one: the processor's inputs and `labels`, which are answers with their ends, `IGNORED` elsewhere.

    Raises:
        ValueError: the processor makes nothing of it, or its pictures alone are longer than a row may be.
    """
    text, spans = written(processor, said)
    try:
        made = processed(processor, [text], [said.pictures])
        row = split_rows(model, {name: value for name, value in made.items() if isinstance(value, Tensor)})[0]
    except Exception as error:  # a processor is other people's code
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{said.place}: the processor makes nothing of it that the model reads: {line}") from error
    ids = row["input_ids"]
    learnt = learnt_tokens(processor, text, spans, ids[0], said.place)
    row["labels"] = torch.where(learnt, ids[0], IGNORED)[None]
    if ids.shape[1] > max_length:
        shown = anatomy_of(model).is_image_token(ids[:, max_length:])
        if shown is not None and bool(shown.any()):
            raise ValueError(
                f"{said.place}: with its pictures it has {ids.shape[1]} tokens, and {max_length} cut into them: "
                "give fewer or smaller pictures, or a larger --max-length"
            )
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids", "labels"):
            if name in row:
                row[name] = row[name][..., :max_length]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in row.items()}


def written(processor: Any, said: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it, in characters, are the answers with their ends.

    Turns are as the chat template writes them, or question and answer in turn where there is none. An answer without an end token
    gets the tokenizer's, as in LLaVA's data: a model that never sees one never stops.

    Raises:
        ValueError: the template does not write turns one after the other.
    """
    end, text, spans, told = processor.tokenizer.eos_token or "", "", [], ""
    special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    messages = [turn.as_message() for turn in said.turns]
    for i, turn in enumerate(said.turns):
        if turn.role != "assistant":
            continue
        before, whole = _render(processor, messages[:i], ask=True), _render(processor, messages[: i + 1], ask=False)
        if not (whole.startswith(before) and before.startswith(told)):
            raise ValueError(f"{said.place}: the chat template does not write turns one after the other")
        answer = whole[len(before) :]
        if not any(answer.rstrip().endswith(token) for token in special):
            answer = answer.rstrip() + end
        text += before[len(told) :]
        spans.append((len(text), len(text) + len(answer)))
        text, told = text + answer, whole
    return text, spans


def _render(processor: Any, messages: list[dict[str, Any]], *, ask: bool) -> str:
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, add_generation_prompt=ask)
    sign, text = getattr(processor, "image_token", "<image>"), ""
    for message in messages:
        words = [sign + "\n" if part["type"] == "image" else part["text"] for part in message["content"]]
        text += "".join(words) if message["role"] == "user" else " " + "".join(words) + "\n"
    return text


def learnt_tokens(
    processor: Any, text: str, spans: Sequence[tuple[int, int]], ids: Int[Tensor, " t"], place: str
) -> Bool[Tensor, " t"]:
    """Which tokens of a row come from certain stretches of its text.

    The processor puts more tokens where the text has a picture's placeholder, and leaves the text between pictures as it is: these
    pieces are looked for in the row one after the other.

    Raises:
        ValueError: a piece is not there.
    """
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    plain = tokenizer(
        text, add_special_tokens=not (bos and text.startswith(bos)), return_offsets_mapping=True, verbose=False
    )
    sign = tokenizer.convert_tokens_to_ids(getattr(processor, "image_token", "<image>"))
    row, learnt = ids.tolist(), torch.zeros(len(ids), dtype=torch.bool)
    pieces: list[list[tuple[int, bool]]] = [[]]
    for token, (start, stop) in zip(plain["input_ids"], plain["offset_mapping"], strict=True):
        if token == sign:
            pieces.append([])
            continue
        pieces[-1].append((token, any(start < last and stop > first for first, last in spans)))
    at = 0
    for number, piece in enumerate(pieces):
        wanted = [token for token, _ in piece]
        last = number == len(pieces) - 1
        # What follows the last picture ends the row; what comes before the first begins it.
        found = len(row) - len(wanted) if last else 0 if number == 0 else _find(row, wanted, at)
        if found < at or row[found : found + len(wanted)] != wanted:
            raise ValueError(
                f"{place}: the processor's tokens are not those of its text, so answers cannot be told in it"
            )
        learnt[found : found + len(wanted)] = torch.tensor([mark for _, mark in piece], dtype=torch.bool)
        at = found + len(wanted)
    return learnt


def _find(row: list[int], wanted: list[int], start: int) -> int:
    """Where a piece begins in a row, from a place on; -1 if nowhere."""
    for at in range(start, len(row) - len(wanted) + 1):
        if row[at : at + len(wanted)] == wanted:
            return at
    return -1
