"""Text -> windows of tokens that fit a model, and their split for choosing and for reporting."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# Bytes of a text file that are looked at: some hundred times what a profile uses.
READ_LIMIT = 1 << 24
# Below this many tokens a loss is mostly noise, and half of them only choose.
FEWEST_TOKENS = 128
# A split needs several windows, so that an interval can be told from how they differ.
FEWEST_WINDOWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a text, padded on the right. The first token of a window is only read; the others are predicted.

    Attributes:
        ids: token ids; padding repeats an id of the text, so that any model can embed it.
        valid: which of them are no padding.
    """

    ids: Int[Tensor, "n w"]
    valid: Bool[Tensor, "n w"]

    def __len__(self) -> int:
        """Number of windows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in the longest window."""
        return self.ids.shape[1]

    @property
    def predicted(self) -> int:
        """Tokens that are predicted."""
        return int(self.valid[:, 1:].sum())

    def rows(self, which: slice) -> Windows:
        """Some of the windows."""
        return Windows(self.ids[which], self.valid[which])

    def split(self) -> tuple[Windows, Windows]:
        """Every other window to choose a plan on, and the others to report it on: no token is predicted in both."""
        return self.rows(slice(0, None, 2)), self.rows(slice(1, None, 2))


def cut(ids: Sequence[int], window: int, *, bos: int | None = None) -> Windows:
    """Cut a text into windows so that each of its tokens is predicted exactly once.

    With `bos` every window begins with it. Without, a window begins with the last token of the one before, and only the
    text's very first token is never predicted.

    Args:
        ids: the text's tokens.
        window: most tokens in a window, the first one included; at least 2.
        bos: the token that texts of this model begin with.

    Raises:
        ValueError: `window` is too small, or nothing can be predicted.
    """
    if window < 2:
        raise ValueError(f"window={window}: a window has at least 2 tokens, one read and one predicted")
    ids = [bos, *ids] if bos is not None else list(ids)
    rows = [ids[start : start + window] for start in range(0, len(ids) - 1, window - 1)]
    if not rows:
        raise ValueError(f"the text has {len(ids)} tokens: give one with at least 2")
    if bos is not None:
        # Every window begins like a text: the token it would repeat gives way.
        rows = [[bos, *row[1:]] for row in rows]
    longest = max(map(len, rows))
    padded = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])
    valid = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return Windows(padded, valid)


def read_text(path: Path) -> str:
    """Read a text file, plain or gzipped, or the first 16 MiB of a longer one.

    Raises:
        ValueError: no such file, not UTF-8, a broken archive, or empty.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"the text {path} {what}: name a UTF-8 text file (.txt or .gz)")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read(READ_LIMIT)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): compress the text again") from error
    try:
        # The last character may have been cut in two, which is no error.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=len(raw) < READ_LIMIT)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): "
            "convert it, for example with iconv -t UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: give a text with at least {FEWEST_TOKENS} tokens")
    return text


@dataclasses.dataclass(frozen=True)
class Text:
    """A tokenized text, and how much of the file it is.

    Attributes:
        ids: the tokens that are used.
        bos: the token that the tokenizer begins texts with, if it does.
        characters: characters that were tokenized.
        of_characters: characters of the whole text.
    """

    ids: tuple[int, ...]
    bos: int | None
    characters: int
    of_characters: int

    def windows(self, window: int) -> Windows:
        """Cut into windows of at most `window` tokens, shorter ones where there would be fewer than sixteen."""
        return cut(self.ids, max(8, min(window, len(self.ids) // FEWEST_WINDOWS + 1)), bos=self.bos)


def tokenize(tokenizer: Any, text: str, max_tokens: int) -> Text:
    """Turn the beginning of a text into tokens.

    Args:
        tokenizer: a Hugging Face tokenizer, or a processor that has one.
        text: what to tokenize; only as much of it as is needed is looked at.
        max_tokens: most tokens to use.

    Raises:
        ValueError: there is no tokenizer, or the text is too short.
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: save it there with tokenizer.save_pretrained(directory)")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    characters = min(len(text), 8 * max_tokens)
    while True:
        # Without warnings about the length: windows are cut afterwards.
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        if len(ids) > max_tokens or characters == len(text):
            break
        characters = min(len(text), 4 * characters)
    if len(ids) < FEWEST_TOKENS:
        raise ValueError(f"the text is too short: it has {len(ids)} tokens, and at least {FEWEST_TOKENS} are needed")
    if len(ids) > max_tokens:
        ids = ids[:max_tokens]
        characters = min(characters, len(tokenizer.decode(ids)))
    bos, begins = tokenizer.bos_token_id, tokenizer("a").input_ids
    return Text(tuple(ids), bos if bos is not None and begins[:1] == [bos] else None, characters, len(text))
