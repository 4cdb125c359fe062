"""`sparing.save`: a model, and the policies it follows, into a folder that is replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import sparing
from sparing.anatomy import anatomy_of
from sparing.checkpoint.card import base_of, write_card
from sparing.checkpoint.counted import count
from sparing.checkpoint.files import (
    BESIDE,
    MANIFEST,
    POLICIES,
    PROCESSOR,
    SCHEMA,
    STOCK_WEIGHTS,
    STOCK_WEIGHTS_INDEX,
    WEIGHT_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    is_checkpoint,
    is_part_of_checkpoint,
    repelling_config,
)
from sparing.checkpoint.registry import describe, tensors_of
from sparing.checkpoint.replacing import replaced, whole
from sparing.execute import apply, run_of
from sparing.plan import Policy


def save(
    model: nn.Module,
    directory: str | Path,
    policies: Sequence[Policy] | None = None,
    *,
    processor: Any = None,
    figures: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    license: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Save a model with its policies, so that it cannot be loaded without them.

    Without policies this is an ordinary Hugging Face checkpoint. With them stock `from_pretrained` refuses the folder, and
    `sparing.load` brings model and policies back. A checkpoint that is there already is replaced as a whole: a save that is
    interrupted at any moment leaves it, or the new one. Files that are no part of a checkpoint stay.

    Args:
        model: a Hugging Face model of a known family.
        directory: a new or empty folder, or an earlier checkpoint.
        policies: what it follows; if `None`, those that it is under now (`sparing.run_of(model)`). Noise generators are
            not saved.
        processor: its tokenizer or processor.
        figures: what was measured (seconds, scores), for the model card. Sizes and what the plan costs by counting are in
            it unasked: on one short pass of the decoder, where that is quick; policies that learned on the latest prompt.
        about: how the policies were found, as JSON knows it (a search's scores); kept with them, `sparing.checkpoint.about` reads it.
        license: for the model card; if `None`, that of the folder which the model was loaded from.
        max_shard_size: of a weights file, as for `save_pretrained` (`"5GB"`, or bytes).
        push_to_hub: a hub id to upload the folder to afterwards.

    Returns:
        The folder.

    Raises:
        ValueError: the target is a file or holds other things, `about` without policies, the model is one that PEFT wraps,
            policies that do not fit the model or cannot be saved, or others than the model follows now.
        OSError: the disk is full or read-only. What was there is as it was.
    """
    target = check_target(directory)
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model holds PEFT adapters: save model.merge_and_unload(), which computes the same")
    if not hasattr(model, "hf_device_map") and any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "some weights are elsewhere and only hooks know where: accelerate.hooks.remove_hook_from_submodules(model) brings them "
            "back; a model with a device_map can be saved as it is"
        )
    quantised = any(type(p).__module__.startswith("torchao.") for p in model.parameters())
    if quantised and getattr(model, "hf_quantizer", None) is None:
        raise ValueError(
            "the weights were quantised by torchao.quantize_, which no checkpoint says: load the model with "
            "quantization_config=TorchAoConfig(...), which is saved with it"
        )
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise ValueError(
            "bitsandbytes packed these 4-bit weights for the CPU at their first forward, and does not get them back whole when "
            "they are saved: load the model again, and save it before it runs"
        )
    anatomy_of(model)
    parts = _policies(model, policies)
    if about is not None and not parts:
        raise ValueError("about= says how policies were found, and there are none: leave it out, or give figures=")
    if parts and type(model).__module__.startswith("transformers_modules."):
        raise ValueError(
            f"{type(model).__name__} is code that came with its checkpoint, and a checkpoint with policies brings none: "
            "save it without policies and keep them beside it, or make a package of its class"
        )
    entries, tensors = describe(parts), tensors_of(parts)
    base = base_of(model, license, vision=anatomy_of(model).vision_encoder is not None)
    counted = count(model, parts)
    try:
        with replaced(target, lambda name: not is_part_of_checkpoint(name)) as new:
            # Of the class: the instance of a loaded model refuses.
            size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            type(model).save_pretrained(model, new, **size)  # type: ignore[operator]
            if processor is not None:
                processor.save_pretrained(new / PROCESSOR if parts else new)
                if parts:
                    shutil.copy(new / "config.json", new / PROCESSOR)
            if parts:
                _hide_from_stock(new, entries, None if processor is None else type(processor).__name__, about)
                save_file(tensors, new / POLICIES)
            write_card(
                new,
                whole(target),
                name=push_to_hub or target.name,
                base=base,
                policies=[repr(part) for part in parts],
                counted=counted,
                figures=figures or {},
            )
    except (OSError, SafetensorError) as error:
        message = " ".join(str(error).split())
        raise OSError(f"could not save to {directory} ({message}); what was there is as it was") from error
    if push_to_hub is not None:
        _upload(target, push_to_hub)
    return target


def check_target(directory: str | Path) -> Path:
    """The folder that `save` would write to, for what takes long before it saves.

    Raises:
        ValueError: it is a file, or holds other things.
    """
    # The link stays a link.
    target = Path(directory).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{directory} is a file: name a folder")
    if target.is_dir() and not is_checkpoint(target) and (others := _others(target)):
        raise ValueError(
            f"{directory} holds other things ({others[0].name}) and no checkpoint: name a new folder, or an empty one"
        )
    return target


def _others(folder: Path) -> list[Path]:
    """What is in a folder, but for what this package's own commands put there."""
    return sorted(path for path in folder.iterdir() if path.name not in BESIDE)


def _policies(model: nn.Module, policies: Sequence[Policy] | None) -> tuple[Policy, ...]:
    """Single policies that fit the model."""
    run = run_of(model)
    if policies is None:
        return () if run is None else run.policy.parts()
    if isinstance(policies, Policy):
        policies = [policies]
    parts = tuple(part for policy in policies for part in policy.parts())
    if run is not None and {id(part) for part in parts} != {id(part) for part in run.policy.parts()}:
        raise ValueError(
            f"the model follows {run!r}, not what policies= says: leave policies= out, or sparing.release(model) first"
        )
    if any(part.ablation for part in parts):
        raise ValueError("an ablation changes a result to learn from it and is not saved: leave it out of policies=")
    # Not entered: this checks that they fit the model and each other.
    return apply(model, *parts).policy.parts()


def _hide_from_stock(
    folder: Path, entries: list[dict[str, Any]], processor: str | None, about: Mapping[str, Any] | None
) -> None:
    """Turn an ordinary checkpoint into one that only `sparing.load` reads."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    sharded = (folder / STOCK_WEIGHTS_INDEX).exists()
    if sharded:
        (folder / STOCK_WEIGHTS_INDEX).rename(folder / WEIGHTS_INDEX)
    else:
        (folder / STOCK_WEIGHTS).rename(folder / WEIGHTS)
    manifest = {
        "schema": SCHEMA,
        "sparing": sparing.__version__,
        "base_model_type": config["model_type"],
        "weights": WEIGHTS_INDEX if sharded else WEIGHTS,
        "processor": processor,
        "policies": entries,
        **({} if about is None else {"about": dict(about)}),
        "base_config": config,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    repelling = json.dumps(repelling_config(config["model_type"]), indent=2) + "\n"
    (folder / "config.json").write_text(repelling, encoding="utf-8")


def _upload(folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    # Weights of an earlier, ordinary upload would be found by stock classes, beside the new ones.
    api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(WEIGHT_FILES))
