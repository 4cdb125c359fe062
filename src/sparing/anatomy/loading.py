"""`sparing.load`: a Hugging Face directory or id -> model and tokenizer or processor, with clear refusals."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from sparing.anatomy.pictures_only import load_pictures_only
from sparing.anatomy.registry import anatomy_of, known_families

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)
"""Where a checkpoint can ask to run code that comes with it (`auto_map`)."""
WITHOUT_SDPA = ("gemma2",)
"""Families that transformers before 5.21 gives SDPA by default, though it leaves their score cap out."""
OURS = {
    "attn_implementation": "attention=",
    "torch_dtype": "dtype=",
    "use_safetensors": "nothing, pickles are never read",
    "output_loading_info": "nothing, weights that do not fit are refused",
}
"""Arguments of `from_pretrained` that `load` sets itself, and what to give instead."""
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trust_remote_code: bool | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer (text) or processor (vision) from a directory or a hub id.

    Weights come from safetensors only. Code that comes with the checkpoint runs only where `trust_remote_code=True`.

    Args:
        path: a directory with `config.json` and `*.safetensors`, or a hub id.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`, or a torch dtype.
        device: where to put the model; `cpu` if neither this nor a `device_map` says.
        attention: the attention implementation (`sdpa` or `eager`); the fastest that the model has by default.
        trust_remote_code: what to do where the checkpoint asks to run its own code: `None` refuses, `False` goes without it
            (transformers' own classes, where it has them), `True` runs it.
        kwargs: passed on to `from_pretrained` (`device_map`, `offload_folder`, `quantization_config`, ...).

    Returns:
        The model in eval mode, and its tokenizer or processor (`None` if the checkpoint has none).

    Raises:
        ValueError: no such path, no config, an unknown or encoder-only model, pickled or corrupt or unfitting weights, code of
            its own that nobody allowed, an argument of `from_pretrained` that is set here.
    """
    if taken := next((name for name in OURS if name in kwargs), None):
        raise ValueError(f"{taken} is set by sparing.load: give {OURS[taken]}")
    path, trust = str(path), bool(trust_remote_code)
    refuse_remote_code(path, trust_remote_code, kwargs)
    text_only = _is_text_model(path, trust, kwargs)
    model = _read(path, text_only, dtype, device, attention, trust, kwargs)
    if not trust:
        # It did without that code; saved again, it asks for it no more.
        vars(model.config).pop("auto_map", None)
    return model, _load_processor(path, text=text_only, trust=trust, kwargs=kwargs)


def refuse_remote_code(
    path: str, trust: bool | None, kwargs: Mapping[str, Any] | None = None, *, model: bool = True
) -> None:
    """Raise `ValueError` if a folder or hub id asks to run its own code, and the user has said neither yes nor no.

    `model`: whether a model is loaded from there, which cannot be without a `config.json`.
    """
    if trust is not None:
        return
    for file in _configs(path, kwargs or {}, model):
        try:
            asks = _asks_for_code(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue  # said where it is read
        if asks:
            raise ValueError(
                f"{path}: {file.name} asks to run its own code, which nobody has allowed: trust_remote_code=True "
                "(--trust-remote-code) runs it, False (--no-trust-remote-code) loads with transformers' own classes; "
                f"known families: {', '.join(sorted(known_families()))}"
            )


def _configs(path: str, kwargs: Mapping[str, Any], model: bool) -> Iterator[Path]:
    """The files that could ask: of the folder, or fetched from the hub."""
    if Path(path).exists():
        yield from (file for name in CONFIGS if (file := Path(path) / name).is_file())
        return
    where = _of_hub(kwargs)
    for name in CONFIGS:
        try:
            found = cached_file(
                path,
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **where,
            )
        except (OSError, ValueError):
            return  # no such id: said better by the stock loader
        if found is not None:
            yield Path(found)
        elif model and name == CONFIGS[0]:
            return  # a model needs it, and without a network each further file would be waited for


def _of_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What says where on the hub, of the arguments that go to `from_pretrained`."""
    return {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs}


def _asks_for_code(value: Any) -> bool:
    """Whether there is an `auto_map` at any depth."""
    if isinstance(value, dict):
        return bool(value.get("auto_map")) or any(map(_asks_for_code, value.values()))
    return isinstance(value, list) and any(map(_asks_for_code, value))


def load_as(
    path: Path,
    config: Mapping[str, Any],
    weights: str,
    processor: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    trust_remote_code: bool | None = None,
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
        trust_remote_code: of the tokenizer or processor; see `load`. Models of a class of their own are never saved like this.
        kwargs: passed on to `from_pretrained`.
    """
    known, name = ", ".join(sorted(known_families())), str(config.get("model_type"))
    if _asks_for_code(config):
        raise ValueError(
            f"{path} asks to run its own code, which no checkpoint with policies does: save it again from a model of a known "
            f"family ({known})"
        )
    refuse_remote_code(str(processor), trust_remote_code, model=False)
    if name not in known_families():
        raise ValueError(f"unknown model family {name!r}; known families: {known}")
    try:
        made: Any = type(AutoConfig.for_model(name)).from_dict(dict(config))
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {_bad_config(error)}") from error
    made.transformers_weights = weights
    text_only = made.get_text_config() is made
    model = _read(str(path), text_only, dtype, device, attention, False, {**kwargs, "config": made})
    # Not the model's any more: another save has other names.
    vars(model.config).pop("transformers_weights", None)
    # A folder that is not there would be taken for a hub id.
    if not processor.is_dir():
        return model, None
    return model, _load_processor(str(processor), text=text_only, trust=bool(trust_remote_code), kwargs={})


def _read(
    path: str,
    text_only: bool,
    dtype: str | torch.dtype,
    device: Any,
    attention: str | None,
    trust: bool,
    kwargs: dict[str, Any],
) -> nn.Module:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if device is not None and kwargs.get("device_map") is not None:
        raise ValueError(
            f"device={device!r} and device_map={kwargs['device_map']!r} both say where the model goes: give one"
        )
    torch_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    auto: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    try:
        model, report = auto.from_pretrained(
            path,
            dtype=torch_dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust,
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
    if attention is None and model.config.model_type in WITHOUT_SDPA:
        model.set_attn_implementation("eager")
    family = anatomy_of(model)
    own = [type(m) for m in family.decoder.modules() if type(m).__module__.startswith("transformers_modules.")]
    if own and type(family).__module__.startswith("sparing."):
        # Our adapter computes what transformers' layers compute; what these compute nobody has told it.
        raise ValueError(
            f"{path}: {own[0].__name__} in its decoder is code of its own, which the adapter of {family.config.model_type!r} does "
            'not know: give it a model_type of its own and an adapter under the entry point "sparing.families"'
        )
    # Who gave a device_map has said where it goes; a model with offloaded parts cannot be moved.
    return (model if kwargs.get("device_map") is not None else model.to(device or "cpu")).eval()


def _bad_config(error: BaseException) -> str:
    what = " ".join(str(error).split())
    return f"the config is not one of transformers' ({what}); download or save the checkpoint again"


def _first_line(error: BaseException) -> str:
    """The part of a long library message that fits on a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _is_text_model(path: str, trust: bool, kwargs: Mapping[str, Any]) -> bool:
    """Refuse what cannot be loaded before anything large is read; say whether the model is text only."""
    directory = Path(path)
    known = ", ".join(sorted(known_families()))
    if directory.exists():
        if not directory.is_dir():
            raise ValueError(f"{path} is a file: pass the checkpoint's directory")
        if not (directory / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: pass a Hugging Face checkpoint directory")
        try:
            raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}/config.json is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{path}/config.json holds no config: download or save the checkpoint again")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"no such path: {path}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust, **_of_hub(kwargs))
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {_bad_config(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if not directory.exists():
            raise ValueError(f"no such path, and no model of that id could be fetched: {path}") from error
        raise ValueError(f"{path}: unknown model type ({_first_line(error)}); known families: {known}") from error
    if config.model_type not in known_families():
        raise ValueError(f"unknown model family {config.model_type!r}; known families: {known}")
    text_only = config.get_text_config() is config
    if directory.exists():
        _check_files(directory, text_only)
    return text_only


def _check_files(directory: Path, text_only: bool) -> None:
    """Raise `ValueError` where there are no weights, pickled ones only, or an index of files that are not there."""
    if not list(directory.glob("*.safetensors")):
        pickles = sorted({file.name for pattern in PICKLES for file in directory.glob(pattern)})
        if pickles:
            raise ValueError(
                f"{directory} has pickled weights only ({pickles[0]}), which are never loaded; if you trust them, convert them "
                f"with: {_conversion(directory, pickles, text_only)}"
            )
        if not (directory / "model.safetensors.index.json").exists():
            raise ValueError(f"{directory} has no *.safetensors weights: save the model there first")
    if (directory / "model.safetensors").exists():
        return  # read before an index
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [shard for shard in shards if not (directory / shard).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights: download or save the checkpoint again") from error
        if missing:
            raise ValueError(
                f"{index} names {missing[0]}, which is not there ({len(missing)} of {len(shards)} files are missing): "
                "download or save the checkpoint again"
            )


def _conversion(directory: Path, pickles: list[str], text_only: bool) -> str:
    """A command that puts safetensors beside pickles. It unpickles plain tensors only (`weights_only`)."""
    if any(name.startswith("pytorch_model") for name in pickles):
        auto, at = AutoModelForCausalLM if text_only else AutoModelForImageTextToText, str(directory)
        code = (
            f"from transformers import {auto.__name__} as M; "
            f"M.from_pretrained({at!r}, use_safetensors=False).save_pretrained({at!r})"
        )
    else:
        files = [str(directory / name) for name in pickles if not name.endswith(".json")]
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file({{k: v.clone() for f in {files!r} for k, v in torch.load(f, map_location='cpu', weights_only=True)"
            f".items()}}, {str(directory / 'model.safetensors')!r}, {{'format': 'pt'}})"
        )
    return shlex.join(["python", "-c", code])


def _load_processor(path: str, *, text: bool, trust: bool, kwargs: Mapping[str, Any]) -> Any:
    auto: Any = AutoTokenizer if text else AutoProcessor
    where = {"trust_remote_code": trust, **_of_hub(kwargs)}
    try:
        try:
            return auto.from_pretrained(path, **where)
        except (ImportError, AttributeError, ValueError):
            # Where the library for videos is missing, transformers makes no processor that could take any.
            if text or is_torchvision_available():
                raise
            return load_pictures_only(path, **where)
    except ImportError as error:
        raise ValueError(f"{path}: its {'tokenizer' if text else 'processor'} needs {_missing(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A checkpoint without tokenizer files is fine for work on tensors; text commands say what is missing.
        return None


def _missing(error: ImportError) -> str:
    """Which package is not there, and how to get it."""
    named = re.search(r"pip install ([\w.\[\]-]+)", str(error)) or re.search(r"requires the (\S+) library", str(error))
    package = named[1].lower() if named else (error.name or "").partition(".")[0]
    return f"{package}, which is not installed: pip install {package}" if package else _first_line(error)
