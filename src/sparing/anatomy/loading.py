"""`sparing.load`: a Hugging Face directory or id -> model and tokenizer or processor, with clear refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sparing.anatomy.registry import anatomy_of, known_families

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer (text) or processor (vision) from a directory or a hub id.

    Weights come from safetensors only, and no code from the checkpoint runs.

    Args:
        path: a directory with `config.json` and `*.safetensors`, or a hub id.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`, or a torch dtype.
        device: where to put the model.
        attention: the attention implementation (`sdpa` or `eager`); the fastest that the model has by default.
        kwargs: passed on to `from_pretrained`.

    Returns:
        The model in eval mode, and its tokenizer or processor (`None` if the checkpoint has none).

    Raises:
        ValueError: no such path, no config, an unknown or encoder-only model, pickled or corrupt or unfitting weights.
    """
    path = str(path)
    text_only = _is_text_model(path)
    return _read(path, text_only, dtype, device, attention, kwargs), _load_processor(path, text=text_only)


def load_as(
    path: Path,
    config: Mapping[str, Any],
    weights: str,
    processor: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """`load`, where the config is given and the weights have a name under which nobody else looks for them.

    Args:
        path: the directory.
        config: what `config.json` would hold.
        weights: the file name: `*.safetensors` or `*.safetensors.index.json`.
        processor: where the tokenizer or processor is.
        dtype: see `load`.
        device: see `load`.
        attention: see `load`.
        kwargs: passed on to `from_pretrained`.
    """
    known, name = ", ".join(sorted(known_families())), str(config.get("model_type"))
    if "auto_map" in config:
        raise ValueError(f"{path} asks to run its own code, which sparing does not do; known families: {known}")
    if name not in known_families():
        raise ValueError(f"unknown model family {name!r}; known families: {known}")
    made: Any = type(AutoConfig.for_model(name)).from_dict(dict(config))
    made.transformers_weights = weights
    text_only = made.get_text_config() is made
    model = _read(str(path), text_only, dtype, device, attention, {**kwargs, "config": made})
    # Not the model's any more: another save has other names.
    vars(model.config).pop("transformers_weights", None)
    # A folder that is not there would be taken for a hub id.
    return model, _load_processor(str(processor), text=text_only) if processor.is_dir() else None


def _read(
    path: str, text_only: bool, dtype: str | torch.dtype, device: Any, attention: str | None, kwargs: dict[str, Any]
) -> nn.Module:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    auto: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    try:
        model, report = auto.from_pretrained(
            path,
            dtype=torch_dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **kwargs,
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: the weights are corrupt ({error}); download or save the checkpoint again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot load the weights: {_first_line(error)}") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the config: {_first_line(error)}") from error
    wrong = [
        f"{what.split('_')[0]} {name}" for what in ("missing_keys", "unexpected_keys") for name in sorted(report[what])
    ]
    wrong += [f"{name} of another shape" for name in map(str, report.get("mismatched_keys", ()))]
    if wrong:
        raise ValueError(
            f"{path}: the weights do not fit the config: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
        )
    anatomy_of(model)
    return model.to(device).eval()


def _first_line(error: BaseException) -> str:
    """The part of a long library message that fits on a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_text_model(path: str) -> bool:
    """Refuse what cannot be loaded before anything large is read; say whether the model is text only."""
    directory = Path(path)
    known = ", ".join(sorted(known_families()))
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"{path} is a file: pass the checkpoint's directory")
        if not (directory / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: pass a Hugging Face checkpoint directory")
        if not list(directory.glob("*.safetensors")):
            if list(directory.glob("*.bin")) or list(directory.glob("*.pt")):
                raise ValueError(
                    f"{path} has pickled weights only, which are never loaded: convert them with model.save_pretrained(directory)"
                )
            raise ValueError(f"{path} has no *.safetensors weights: save the model there first")
        try:
            raw = json.loads((directory / "config.json").read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}/config.json is not valid JSON: {error}") from error
        if "auto_map" in raw and raw.get("model_type") not in known_families():
            raise ValueError(f"{path} asks to run its own code, which sparing does not do; known families: {known}")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"no such path: {path}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if not directory.exists():
            raise ValueError(f"no such path, and no model of that id could be fetched: {path}") from error
        raise ValueError(f"{path}: unknown model type ({_first_line(error)}); known families: {known}") from error
    if config.model_type not in known_families():
        raise ValueError(f"unknown model family {config.model_type!r}; known families: {known}")
    return config.get_text_config() is config


def _load_processor(path: str, *, text: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path) if text else AutoProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError):
        # A checkpoint without tokenizer files is fine for work on tensors; text commands say what is missing.
        return None
