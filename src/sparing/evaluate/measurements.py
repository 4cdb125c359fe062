"""Measurements that outlast an interruption: one JSON line each, found again by what was measured on what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Measurements:
    """Results by name, kept in a file as they come.

    Lines of other models and texts in the same file are left alone, and a line that a kill cut short is ignored.

    Args:
        path: a `.jsonl` file, made when the first result comes; `None` keeps results in memory only.
        subject: what is measured: a content hash, see `content_key`.
    """

    def __init__(self, path: Path | None, subject: str) -> None:
        self.path, self.subject = path, subject
        self.taken = 0
        """Results that had to be measured, since this object was made."""
        self._known: dict[str, dict[str, Any]] = {}
        self._broken_end = False
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        self._broken_end = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if entry["subject"] == subject:
                    self._known[entry["name"]] = entry["result"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def get(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of this name, measured if it is not known yet."""
        if name not in self._known:
            result = dict(measure())
            self.taken += 1
            self._keep(name, result)
            self._known[name] = result
        return self._known[name]

    def _keep(self, name: str, result: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps({"subject": self.subject, "name": name, "result": result}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._broken_end + line)
        self._broken_end = False


def content_key(model: nn.Module, *parts: Any) -> str:
    """A hash of a model's weights and config and of anything else that JSON can hold.

    Weights are hashed as they are in memory: another `--dtype` is another subject, a moved checkpoint the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}  # type: ignore[operator]
    digest.update(json.dumps([config, *parts], sort_keys=True, default=str).encode())
    return digest.hexdigest()
