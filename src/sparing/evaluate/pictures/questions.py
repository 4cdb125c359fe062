"""A folder of pictures with questions beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from sparing.evaluate.pictures.files import open_picture
from sparing.evaluate.tasks.rows import read_rows

QUESTIONS = "questions.jsonl"
ROW = '{"image": "a.png", "question": "...", "answer": "..."}'
FEWEST_QUESTIONS = 16
"""Half of them choose a plan, and fewer than eight say little."""


@dataclasses.dataclass(frozen=True)
class PictureQuestion:
    """A question about one picture or several.

    Attributes:
        pictures: the files, in the order in which the model sees them.
        question: what is asked.
        answer: the answer to expect; `None` where the stock model's own is to be kept.
        row: where it stands in its file, from 1; for messages.
    """

    pictures: tuple[Path, ...]
    question: str
    answer: str | None = None
    row: int = 0

    @property
    def place(self) -> str:
        """The row, in a message."""
        return f"row {self.row}" if self.row else f"the question {self.question[:40]!r}"


def read_questions(folder: Path, limit: int | None = None) -> list[PictureQuestion]:
    """Read a folder's `questions.jsonl`, and look whether its pictures are there.

    Each row is an object with `image` (a file, relative to the folder) or `images` (a list of them), `question`, and
    optionally `answer`.

    Args:
        folder: of the pictures.
        limit: rows to read; all by default.

    Raises:
        ValueError: no such folder or file, too few rows, or one that is wrong; the message names the row.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"--images {folder} {what}: name a folder of pictures with a {QUESTIONS} beside them")
    path = folder / QUESTIONS
    if not path.is_file():
        raise ValueError(f"{folder} has no {QUESTIONS}: write one, a row for each question, as {ROW}")
    found = [_question(row, number, folder, path) for number, row in enumerate(read_rows(path), 1)][:limit]
    check_enough(len(found), str(path))
    for file, question in {file: q for q in reversed(found) for file in q.pictures}.items():
        _look_at(file, f"{path}, {question.place}")
    return found


def check_enough(count: int, what: str) -> None:
    """Refuse so few questions that half of them say nothing.

    Raises:
        ValueError: see above.
    """
    if count < FEWEST_QUESTIONS:
        raise ValueError(
            f"{what} has {count} question{'s' * (count != 1)}, and at least {FEWEST_QUESTIONS} are needed: half of them "
            "choose a plan, the other half report it"
        )


def split_questions(questions: Sequence[PictureQuestion]) -> tuple[list[int], list[int], bool]:
    """Indices to choose plans on and to report them on: about half each, and no picture in both.

    Returns:
        The halves, and whether pictures are apart: with a single picture they cannot be, and rows take turns.
    """
    halves: tuple[list[int], list[int]] = ([], [])
    for group in _by_picture(questions):
        smaller = 0 if len(halves[0]) <= len(halves[1]) else 1
        halves[smaller].extend(group)
    if min(map(len, halves)) < FEWEST_QUESTIONS // 4:
        every = range(len(questions))
        return list(every[::2]), list(every[1::2]), False
    return sorted(halves[0]), sorted(halves[1]), True


def _by_picture(questions: Sequence[PictureQuestion]) -> Iterable[list[int]]:
    """Indices of questions that share pictures, directly or by others between them; in order of appearance."""
    leader: dict[Path, Path] = {}

    def first_of(path: Path) -> Path:
        while leader.setdefault(path, path) != path:
            path = leader[path]
        return path

    for question in questions:
        for other in question.pictures[1:]:
            leader[first_of(other)] = first_of(question.pictures[0])
    groups: dict[Path, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(first_of(question.pictures[0]), []).append(i)
    return groups.values()


def _question(row: Mapping[str, Any], number: int, folder: Path, path: Path) -> PictureQuestion:
    where = f"{path}, row {number}"
    if ("image" in row) == ("images" in row):
        raise ValueError(f"{where}: expected either image (a file) or images (a list of files), as {ROW}")
    files = [row["image"]] if "image" in row else row["images"]
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise ValueError(f"{where}: expected names of picture files, got {str(files)[:80]}")
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: expected a question, got {str(question)[:80]!r}; write {ROW}")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(
            f"{where}: expected an answer in words, got {str(answer)[:80]!r}; leave it out to keep the model's own"
        )
    found = tuple(folder / file for file in files)
    for file in found:
        if not file.is_file():
            raise ValueError(f"{where}: there is no picture {file}: mend the name, or take the row out")
    return PictureQuestion(found, question.strip(), None if answer is None else answer.strip(), number)


def _look_at(path: Path, where: str) -> None:
    try:
        open_picture(path)
    except ValueError as error:
        cause = error.__cause__ or error
        why = "" if isinstance(cause, UnidentifiedImageError) else f" ({' '.join(str(cause).split())[:100]})"
        raise ValueError(
            f"{where}: {path} is not a picture that Pillow can read{why}: convert it, to PNG say"
        ) from error
