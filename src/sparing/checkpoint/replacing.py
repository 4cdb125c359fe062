"""Replace a folder as a whole: at any moment, after any kill, either the old one or the new one is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ABANDONED_AFTER = 24 * 3600.0
"""Seconds, where the file system has no locks that would tell a killed save from a running one."""


def whole(target: Path) -> Path:
    """Where the checkpoint of that name is: beside it, if a save was killed between its two renames."""
    aside = _beside(target, "old")
    return aside if not target.exists() and aside.exists() else target


@contextlib.contextmanager
def replaced(target: Path, keep: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` when the block ends without an error.

    Args:
        target: a folder, or a path at which there is nothing yet.
        keep: `name -> bool`: which entries of the old folder, where the new one has none of that name, go on in the new one.

    Raises:
        OSError: the folder cannot be made, filled or renamed. `target` is then as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(target.parent):
        if (aside := whole(target)) != target:
            os.rename(aside, target)
    _clean(target)
    new, lock = _begin(target)
    try:
        yield new
        if target.exists():
            for entry in sorted(target.iterdir()):
                if keep(entry.name) and not (new / entry.name).exists():
                    _link(entry, new / entry.name)
        _to_disk(new)
        _swap(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    finally:
        _unlock(lock)
    _clean(target)


def _swap(new: Path, target: Path) -> None:
    aside = _beside(target, "old")
    with _alone_in(target.parent):
        # An old one beside a whole one: the save that put it there was killed when all but tidying was done.
        _discard(aside)
        try:
            if target.exists():
                os.rename(target, aside)
            os.rename(new, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            raise
        _sync(target.parent)
        _discard(aside)


def _discard(folder: Path) -> None:
    """Rename first: what is half removed must not look like an old checkpoint put aside."""
    if folder.exists():
        trash = folder.with_name(f"{folder.name.removesuffix('old')}trash-{uuid.uuid4().hex[:8]}")
        os.rename(folder, trash)
        try:
            shutil.rmtree(trash, ignore_errors=True)
        except BaseException:
            # Ctrl-C in the middle of it: there is nothing in it to keep.
            shutil.rmtree(trash, ignore_errors=True)
            raise


def _begin(target: Path) -> tuple[Path, int | None]:
    """A fresh folder and a lock on it, which the system drops when this process ends in any way."""
    while True:
        new = _beside(target, f"new-{uuid.uuid4().hex[:8]}")
        new.mkdir()
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(new)
            if new.exists():
                return new, lock
            _unlock(lock)
        # Gone: another save took it for a leftover in the moment before the lock.


def _clean(target: Path) -> None:
    """Remove what killed saves left."""
    ours = _beside(target, "").name
    for leftover in [path for path in target.parent.iterdir() if path.name.startswith(ours)]:
        kind = leftover.name.removeprefix(ours)
        if kind.startswith("trash-") or (kind.startswith("new-") and _abandoned(leftover)):
            shutil.rmtree(leftover, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Whether the process that was filling it is gone."""
    with contextlib.suppress(OSError):
        if fcntl is not None:
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False
            finally:
                os.close(lock)
        return time.time() - folder.stat().st_mtime > ABANDONED_AFTER
    return False


def _lock(folder: Path) -> int | None:
    """Wait for the lock of a folder; `None` where there is no such thing."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Let nobody else rename there meanwhile, where the file system has locks."""
    lock = _lock(parent)
    try:
        yield
    finally:
        _unlock(lock)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.sparing-{what}")


def _link(source: Path, to: Path) -> None:
    """The same file under a second name: a copy of large files would cost as much as the save."""
    if source.is_dir() and not source.is_symlink():
        to.mkdir()
        for entry in source.iterdir():
            _link(entry, to / entry.name)
        return
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _to_disk(folder: Path) -> None:
    """Without it a power cut may keep the rename and lose what was renamed."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
