"""The files of a checkpoint: their names, and which of an older folder's a new save replaces."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

SCHEMA = 1
MANIFEST = "sparing.json"
POLICIES = "policies.safetensors"
PROCESSOR = "processor"
"""A folder of its own, because tokenizers and processors read the `config.json` beside them."""
# Names that stock loading does not look for: no class of transformers finds weights to come up dense with.
WEIGHTS = "sparing.safetensors"
WEIGHTS_INDEX = "sparing.safetensors.index.json"
STOCK_WEIGHTS = "model.safetensors"
STOCK_WEIGHTS_INDEX = "model.safetensors.index.json"

CURE = "this model follows sparing policies: load it with sparing.load(directory)"

WEIGHT_FILES = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "adapter_config.json",
    "adapter_model.*",
    "sparing*.safetensors",
    WEIGHTS_INDEX,
    POLICIES,
)
"""Whatever stock loading would find beside, or instead of, what was saved last."""

BESIDE = ("run.json", "measurements.jsonl", "training")
"""What this package's commands put into a folder before the checkpoint that they make is in it."""

_OTHERS = (
    "config.json",
    "generation_config.json",
    MANIFEST,
    PROCESSOR,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
    "*processor_config.json",
    "video_preprocessor_config.json",
)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model; many other things have a `config.json` too."""
    if (folder / MANIFEST).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def is_part_of_checkpoint(name: str) -> bool:
    """Whether an entry of an older folder is replaced by a save; everything else there is its owner's and stays."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*WEIGHT_FILES, *_OTHERS))


def repelling_config(model_type: str) -> dict[str, Any]:
    """A `config.json` that no class of transformers takes.

    The model's own config is not in it, not even nested: a config class looks one level down for a dictionary of its
    `model_type`, and would find it there. The unknown type stops the Auto classes; a concrete class only warns about the
    type, but looks its `dtype` up in torch, and so shows the cure.
    """
    return {
        "model_type": f"sparing-{model_type}: load it with sparing.load",
        "architectures": ["SparingCheckpoint"],
        "dtype": CURE,
    }
