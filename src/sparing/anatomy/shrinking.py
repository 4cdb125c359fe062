"""A model's architecture with two layers and random weights: how paper-scale recipes are tried on a small machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sparing.anatomy.loading import _load_processor
from sparing.anatomy.registry import anatomy_of, known_families

LAYERS = 2


def load_shrunk(path: str | Path, *, seed: int = 0, attention: str | None = None) -> tuple[nn.Module, Any]:
    """The architecture of a checkpoint with two decoder layers and random weights in float32, and its own processor.

    Args:
        path: a checkpoint's folder, or a hub id.
        seed: of the weights.
        attention: the attention implementation.

    Raises:
        ValueError: no config, or an unknown family.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no config of a known model was found ({line})") from error
    if config.model_type not in known_families():
        known = ", ".join(sorted(known_families()))
        raise ValueError(f"unknown model family {config.model_type!r}; known families: {known}")
    text = config.get_text_config()
    for part in {id(c): c for c in (config, text, getattr(config, "vision_config", None)) if c is not None}.values():
        _cut(part)
    auto: Any = AutoModelForCausalLM if text is config else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    anatomy_of(model)
    return model, _load_processor(str(path), text=text is config, trust=False, kwargs={})


def _cut(config: Any) -> None:
    """Two layers, and lists that have an entry a layer cut with them."""
    for name in ("num_hidden_layers", "depth"):
        before = getattr(config, name, None)
        if isinstance(before, int) and before > LAYERS:
            setattr(config, name, LAYERS)
            for key, value in vars(config).items():
                if isinstance(value, list) and len(value) == before:
                    setattr(config, key, value[:LAYERS])
    # Layers named by number, such as Qwen's full-attention vision blocks and DeepStack's sources.
    for key, value in vars(config).items():
        if key.endswith("_indexes") and isinstance(value, list):
            setattr(config, key, [i for i in value if i < LAYERS] or [LAYERS - 1])
