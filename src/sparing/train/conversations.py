"""Pictures and conversations about them, as LLaVA's data files hold them: read from the disk row by row."""

from __future__ import annotations

import dataclasses
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from sparing.anatomy import open_picture

PICTURE = "<image>"
"""Stands for a picture in the words of a row."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ROW = '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A boat."}]}'
LOOKED_AT = 64
"""Rows that are read before training begins: wrong folders and wrong formats show there."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        parts: words, and `None` for each picture, in order.
    """

    role: Literal["system", "user", "assistant"]
    parts: tuple[str | None, ...]

    def as_message(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in self.parts]
        return {"role": self.role, "content": content}


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """Turns about pictures.

    Attributes:
        turns: in order; the assistant's are what is learnt.
        pictures: in the order of their places in the turns.
        place: where it comes from, for messages.
    """

    turns: tuple[Turn, ...]
    pictures: tuple[Image, ...] = ()
    place: str = "the conversation"


class ConversationFile(Sequence[Conversation]):
    """Rows of a file in LLaVA's format, each read and its pictures opened when it is asked for.

    A row is an object with `conversations` (turns with `from`: human or gpt, and `value`) or `messages` (`role` and `content`, words
    or a list of parts), and, where there are pictures, `image` (a file, or a list of them). `<image>` in the words says where a
    picture goes; where there is none, pictures go in front of the first question.

    Args:
        path: JSON lines, of which only the places are kept in memory; or one JSON list (LLaVA's own files), which is kept packed.
        pictures: the folder that `image` is relative to; the file's own by default.
        limit: rows to use; all by default.

    Raises:
        ValueError: no such file, no rows, or one of the first rows is wrong.
    """

    def __init__(self, path: Path, pictures: Path | None = None, limit: int | None = None) -> None:
        if not path.is_file():
            raise ValueError(f"the data {path} does not exist: name a file of JSON lines, a row as {ROW}")
        self.path, self.pictures = path, path.parent if pictures is None else pictures
        if not self.pictures.is_dir():
            raise ValueError(f"the folder of pictures {self.pictures} does not exist")
        self._packed: list[bytes] | None = None
        self._starts = self._lines = array("q")
        if path.suffix == ".json":
            self._packed = _packed(path)[:limit]
        else:
            self._starts, self._lines = (part[:limit] for part in _line_starts(path))
        if not len(self):
            raise ValueError(f"the data {path} has no rows: write some, each as {ROW}")
        for i in range(min(LOOKED_AT, len(self))):
            turns, files = self._read(i)
            for file in files:
                if not file.is_file():
                    raise ValueError(
                        f"{self._place(i)}: there is no picture {file}: mend the name, or say where pictures are (--pictures DIR)"
                    )
            del turns

    def __len__(self) -> int:
        """Rows."""
        return len(self._starts) if self._packed is None else len(self._packed)

    def __getitem__(self, index: Any) -> Any:
        """A row; a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        turns, files = self._read(index)
        try:
            pictures = tuple(open_picture(file).image for file in files)
        except ValueError as error:
            raise ValueError(f"{self._place(index)}: {error}") from error
        return Conversation(turns, pictures, self._place(index))

    def _place(self, index: int) -> str:
        return f"{self.path}, " + (f"row {index + 1}" if self._packed is not None else f"line {self._lines[index]}")

    def _read(self, index: int) -> tuple[tuple[Turn, ...], tuple[Path, ...]]:
        if self._packed is not None:
            text = self._packed[index]
        else:
            with self.path.open("rb") as file:
                file.seek(self._starts[index])
                text = file.readline()
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._place(index)}: no JSON ({error})") from error
        names, turns = read_row(row, self._place(index))
        return turns, tuple(self.pictures / name for name in names)


def read_row(row: Any, place: str) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """The pictures' names and the turns of a row.

    Raises:
        ValueError: it is none of LLaVA's format.
    """
    if not isinstance(row, dict) or not isinstance(said := row.get("conversations", row.get("messages")), list):
        raise ValueError(f"{place}: expected an object with conversations or messages, as {ROW}")
    image = row.get("image", row.get("images"))
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{place}: expected the name of a picture file under image, got {str(image)[:80]}")
    turns = [_turn(turn, place) for turn in said]
    marked = sum(part is None for turn in turns for part in turn.parts)
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if not any(turn.role == "assistant" for turn in turns) or first is None:
        raise ValueError(f"{place}: expected a question and an answer at least, as {ROW}")
    if marked == 0 and names:
        turns[first] = Turn("user", (*[None] * len(names), *turns[first].parts))
    elif marked != len(names):
        raise ValueError(
            f"{place}: {PICTURE} stands {marked} times in the words of {len(names)} pictures: mend the row"
        )
    last = max(i for i, turn in enumerate(turns) if turn.role == "assistant")
    if any(part is None for turn in turns[last + 1 :] for part in turn.parts):
        raise ValueError(f"{place}: a picture stands behind the last answer: give the answer to it, or take it out")
    if any(part is None for turn in turns if turn.role != "user" for part in turn.parts):
        raise ValueError(f"{place}: {PICTURE} stands in what is not the user's: pictures are given, not said")
    return tuple(names), tuple(turns)


def _turn(turn: Any, place: str) -> Turn:
    known = turn if isinstance(turn, Mapping) else {}
    role = ROLES.get(str(known.get("from", known.get("role"))))
    said = known.get("value", known.get("content"))
    if role is None or not isinstance(said, str | list):
        raise ValueError(f"{place}: expected turns with from and value (or role and content), got {str(turn)[:80]}")
    parts: list[str | None] = []
    for part in [said] if isinstance(said, str) else said:
        words = part.get("text") if isinstance(part, Mapping) and part.get("type") != "image" else part
        if isinstance(words, str):
            pieces = re.split(f"({PICTURE})", words)
            parts += [None if piece == PICTURE else piece.strip() for piece in pieces if piece.strip()]
        elif isinstance(part, Mapping) and part.get("type") == "image":
            parts.append(None)
        else:
            raise ValueError(f"{place}: expected words or a picture in a turn, got {str(part)[:80]}")
    return Turn(role, tuple(parts))  # type: ignore[arg-type]


def _line_starts(path: Path) -> tuple[array, array]:
    """Where each line that is not empty begins, in bytes, and which line of the file it is."""
    starts, lines, at = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                starts.append(at)
                lines.append(number)
            at += len(line)
    return starts, lines


def _packed(path: Path) -> list[bytes]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, each as {ROW}")
    # As objects they would take several times as much.
    return [json.dumps(row).encode() for row in rows]
