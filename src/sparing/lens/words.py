"""`WordReading`: the words that a lens reads in tokens, and what it reads them from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparing.anatomy import Anatomy
from sparing.lens.record import Recording, record
from sparing.tokens import Group, ImageSpan, TokenMap


@dataclasses.dataclass(frozen=True, eq=False)
class WordReading:
    """The words that a lens reads in some tokens of a batch, best first.

    Attributes:
        tokens: the prompts' map.
        levels: which levels were read (see `Recording`), in ascending order.
        index: row and original index of each token that was read, row by row.
        ids: the `k` best words of each token at each level. Where scores tie, the lower id comes first.
        scores: their scores, float32: what they are is the lens's matter.
        norms: Euclidean norms of the states that were read, float32.
    """

    tokens: TokenMap
    levels: tuple[int, ...]
    index: Int[Tensor, "n 2"]
    ids: Int[Tensor, "levels n k"]
    scores: Float[Tensor, "levels n k"]
    norms: Float[Tensor, "levels n"]

    def words(self, tokenizer: Any) -> list[list[list[str]]]:
        """The words as text: `[level][token][k]`. A space in front of a word is kept, bytes that are no text stand as `<0xE2>`.

        Args:
            tokenizer: the model's tokenizer, or a processor that has it.
        """
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        unique, at = self.ids.unique(return_inverse=True)
        written = [readable(tokenizer, number) for number in unique.tolist()]
        return [[[written[i] for i in best] for best in level] for level in at.tolist()]

    def of(self, span: ImageSpan, row: int) -> Int[Tensor, "h w"]:
        """Where the patches of a picture's grid are among the `n` tokens; -1 for one that was not read.

        Args:
            span: one of `tokens.images[row]`.
            row: the row of the batch that it lies in.
        """
        where = torch.full((self.tokens.length,), -1, dtype=torch.long)
        index = self.index.cpu()
        mine = index[:, 0] == row
        where[index[mine, 1]] = mine.nonzero().flatten()
        return where[span.patches()]


def read_states(
    model: nn.Module,
    given: Mapping[str, Any] | Recording,
    anatomy: Anatomy,
    where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None,
    levels: Iterable[int] | None,
) -> tuple[Recording, Float[Tensor, "levels n"]]:
    """The recording that a lens reads, made here from inputs or given, and the norms of its states.

    Raises:
        ValueError: a recording of another model, or states that are not finite.
    """
    if isinstance(given, Recording):
        width, depth = anatomy.text_config.hidden_size, len(anatomy.layers)
        if given.states.shape[-1] != width or given.depth != depth:
            raise ValueError(
                f"the recording is of {given.depth} layers of width {given.states.shape[-1]}, this model has {depth} of {width}: "
                "give the model that was recorded"
            )
        recording = given.only(where, levels)
    else:
        recording = record(model, given, where=Group.IMAGE if where is None else where, levels=levels)
    norms = torch.linalg.vector_norm(recording.states, dim=-1, dtype=torch.float32)
    wrong = ~norms.isfinite()
    if bool(wrong.any()):
        level, token = wrong.nonzero()[0].tolist()
        row, place = recording.index[token].tolist()
        raise ValueError(
            f"states at level {recording.levels[level]} are not finite ({int(wrong[level].sum())} of {wrong.shape[1]} tokens, "
            f"first row {row}, token {place}): nothing can be read from them; load the model in float32 or bfloat16"
        )
    return recording, norms


def chosen_words(vocabulary: Iterable[int] | Tensor | None, size: int, k: int, device: torch.device) -> Tensor | None:
    """The ids that a lens may name, each once in ascending order; `None` for all.

    Raises:
        ValueError: ids that the model does not have, none at all, or fewer than `k`.
    """
    ids = None
    if vocabulary is not None:
        ids = torch.as_tensor(vocabulary if isinstance(vocabulary, Tensor) else list(vocabulary), dtype=torch.long)
        ids = ids.flatten().unique().to(device)
        if not len(ids) or int(ids[0]) < 0 or int(ids[-1]) >= size:
            got = f"{int(ids[0])}..{int(ids[-1])}" if len(ids) else "none"
            raise ValueError(f"vocabulary: expected ids between 0 and {size - 1}, got {got}")
    among = size if ids is None else len(ids)
    if not 1 <= k <= among:
        raise ValueError(f"expected 1 <= k <= {among}, the words that may be named, got k={k}")
    return ids


def readable(tokenizer: Any, number: int) -> str:
    """A piece of a vocabulary as a person would write it."""
    piece = tokenizer.convert_ids_to_tokens(number) if number < len(tokenizer) else None
    if piece is None:
        # Rows of the matrix beyond the tokenizer's vocabulary.
        return f"<{number}>"
    if "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")):
        table = _bytes_of_characters()
        if all(character in table for character in piece):
            return _text(bytes(table[character] for character in piece))
    return piece.replace("▁", " ")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" if byte > 127 else chr(byte) for byte in data)


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones for themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
