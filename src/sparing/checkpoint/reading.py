"""`sparing.load`: any Hugging Face checkpoint, and what `sparing.save` wrote, with its policies on the model."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sparing import anatomy
from sparing.checkpoint.files import MANIFEST, POLICIES, PROCESSOR, SCHEMA, WEIGHTS, WEIGHTS_INDEX
from sparing.checkpoint.registry import rebuild
from sparing.checkpoint.replacing import whole
from sparing.execute import apply, run_of
from sparing.plan import Composed


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    attention: str | None = None,
    execute: str = "gathered",
    trust_remote_code: bool | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer (text) or processor (vision) from a directory or a hub id.

    A model that was saved with policies follows them at once, as if inside `sparing.apply`, until `sparing.release(model)`;
    `sparing.run_of(model)` has its ledger. Weights come from safetensors only; code that comes with the checkpoint runs only where
    `trust_remote_code=True`.

    Args:
        path: a directory that `sparing.save` or `save_pretrained` wrote, or a hub id.
        dtype: `auto` (as saved), `float32`, `bfloat16`, `float16`, or a torch dtype. Policies keep the one they were saved in.
        device: where to put the model and its policies; `cpu` if neither this nor a `device_map` says.
        attention: the attention implementation (`sdpa` or `eager`); the fastest that the model has by default.
        execute: the executor of a model with policies, `gathered` or `dense`.
        trust_remote_code: what to do where a config asks to run code of the checkpoint: `None` refuses, `False` goes without
            (transformers' own classes, where it has them), `True` runs it.
        kwargs: passed on to `from_pretrained` (`device_map`, `offload_folder`, `quantization_config`, ...).

    Returns:
        The model in eval mode, and its tokenizer or processor (`None` if the checkpoint has none).

    Raises:
        ValueError: no such path, no config, an unknown or encoder-only model, an unknown policy, a newer version of the format,
            pickled, corrupt or unfitting weights, code of the checkpoint's own that nobody allowed.
    """
    folder = _local(path, kwargs)
    manifest = None if folder is None else _manifest(folder)
    settings = {"dtype": dtype, "device": device, "attention": attention, "trust_remote_code": trust_remote_code}
    if folder is None or manifest is None:
        return anatomy.load(path if folder is None else folder, **settings, **kwargs)
    _check_weights(folder, manifest)
    try:
        policies = rebuild(manifest.get("policies"), load_file(folder / POLICIES), str(folder / MANIFEST))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / POLICIES} is missing or corrupt ({error}); save the checkpoint again") from error
    model, processor = anatomy.load_as(
        folder, manifest["base_config"], manifest["weights"], folder / PROCESSOR, **settings, **kwargs
    )
    if processor is None and manifest.get("processor") is not None:
        raise ValueError(
            f"{folder}: its {manifest['processor']} cannot be read; save the checkpoint again with processor="
        )
    for policy in policies:
        # Under a device_map they go where the first prompt is.
        if isinstance(policy, nn.Module) and device is not None:
            policy.to(device)
    # What stock loading notes too: where a model came from.
    model.config._name_or_path = str(path)  # type: ignore[union-attr]
    model.name_or_path = str(path)  # type: ignore[assignment]
    try:
        apply(model, *policies, execute=execute).__enter__()
    except TypeError as error:
        raise ValueError(f"{folder / MANIFEST}: {error}; save the checkpoint again") from error
    # Its weights alone, in an ordinary checkpoint, would come up as another model.
    model.save_pretrained = functools.partial(_refuse_to_save_alone, model)  # type: ignore[assignment]
    return model, processor


def release(model: nn.Module) -> Composed:
    """Take off what `sparing.load` put on a model: it is the stock one again.

    Returns:
        The policies, for `sparing.apply(model, policies, ...)`; an empty composition if the model was under none.
    """
    run = run_of(model)
    if run is None:
        return Composed()
    run.__exit__()
    vars(run.model).pop("save_pretrained", None)
    return run.policy


def about(path: str | Path) -> dict[str, Any]:
    """How the policies of a saved model were found: what `sparing.save(..., about=)` was given; empty where that was nothing.

    Args:
        path: a folder that `sparing.save` wrote.

    Raises:
        ValueError: it is no checkpoint with policies.
    """
    folder = whole(Path(path).expanduser().absolute())
    if not folder.is_dir() or (manifest := _manifest(folder)) is None:
        raise ValueError(f"{path} is no checkpoint that sparing.save wrote with policies")
    if not isinstance(found := manifest.get("about", {}), dict):
        raise ValueError(f"{path}: `about` in the manifest is no object: the checkpoint was edited, save it again")
    return dict(found)


def _refuse_to_save_alone(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    if run_of(model) is None:
        return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[operator]
    raise ValueError(
        "save_pretrained would write the weights without the policies that the model follows: use sparing.save(model, directory); "
        "for the weights alone sparing.release(model) first"
    )


def _local(path: str | Path, kwargs: Mapping[str, Any]) -> Path | None:
    """The folder of a checkpoint; fetched, if it is a sparing one on the hub; `None` if the rest is the stock loader's."""
    folder = whole(Path(path).expanduser().absolute())
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        return folder if folder.is_dir() else None
    from huggingface_hub import snapshot_download
    from transformers.utils.hub import cached_file

    where = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
    try:
        if cached_file(str(path), MANIFEST, _raise_exceptions_for_missing_entries=False, **where) is None:
            return None
        return Path(snapshot_download(str(path), **where))
    except (OSError, ValueError):
        return None  # the stock loader says it better


def _manifest(folder: Path) -> dict[str, Any] | None:
    """`sparing.json`, checked; `None` for an ordinary checkpoint."""
    path = folder / MANIFEST
    if not path.exists():
        if any((folder / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
            raise ValueError(
                f"{folder} has the weights of a sparing checkpoint but no {MANIFEST}: copy the whole folder"
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise ValueError(
                f"it has schema {schema} of sparing {manifest.get('sparing')}, this version reads up to {SCHEMA}: update sparing"
            )
        if schema != SCHEMA:
            raise ValueError(
                f"it has schema {schema!r} of sparing {manifest.get('sparing')}, this version reads {SCHEMA}: load it with that "
                "version, or save the checkpoint again"
            )
        config, weights = manifest["base_config"], manifest["weights"]
        if config.get("model_type") != manifest["base_model_type"]:
            raise ValueError(
                f"base_model_type is {manifest['base_model_type']!r}, but base_config is of {config.get('model_type')!r}: "
                "save the checkpoint again"
            )
        stock = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in stock or "auto_map" in config:
            raise ValueError(
                "it asks to run its own code, which no checkpoint with policies does: get it again from where it came from"
            )
        if weights not in (WEIGHTS, WEIGHTS_INDEX):
            raise ValueError(
                f"weights is {weights!r}, expected {WEIGHTS} or {WEIGHTS_INDEX}: save the checkpoint again"
            )
    except (KeyError, TypeError, AttributeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no manifest of sparing's ({error!r}); save the checkpoint again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return manifest


def _check_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse missing files, pickles, and shards from elsewhere, before anything large is read."""
    path = folder / manifest["weights"]
    if not path.is_file():
        pickled = " (pickled weights are never loaded)" if [*folder.glob("*.bin"), *folder.glob("*.pt")] else ""
        raise ValueError(f"{folder} has no {path.name}{pickled}: save the checkpoint again with sparing.save")
    if path.name == WEIGHTS_INDEX:
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of weights: save the checkpoint again") from error
        for shard in shards:
            if (
                Path(str(shard)).name != shard
                or not str(shard).endswith(".safetensors")
                or not (folder / shard).is_file()
            ):
                raise ValueError(f"{path} names {shard!r}, which is no safetensors file of this folder: save it again")
