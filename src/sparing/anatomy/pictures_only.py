"""A vision model's processor where the libraries for its videos are missing: pictures and text work all the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import AutoConfig, AutoTokenizer, ProcessorMixin

# From where it is: before 5.18 the package gives it only together with torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.video_processing_utils import BaseVideoProcessor

NEEDED = ("torchvision",)
"""What the video processors of transformers import."""


class NoVideos(BaseVideoProcessor):
    """Stands in the place of a video processor that cannot be made here.

    It keeps the settings of the one that it stands for, so that a processor saved with it is the same elsewhere.

    Args:
        settings: what the checkpoint says of its video processor.
    """

    num_frames = fps = None
    """SmolVLM's chat template asks for them, pictures or not."""

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        # Not the parent's: that one wants the library which is missing.
        self.settings = dict(settings or {})

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"videos need {' and '.join(NEEDED)}, which is not installed here: pass pictures, or install it"
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings of the processor that it stands for."""
        return copy.deepcopy(self.settings)

    def __repr__(self) -> str:
        """What it is."""
        return f"NoVideos({self.settings.get('video_processor_type', '')})"


def pictures_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class of a processor, taking `NoVideos` in the place of its video processor.

    transformers' own check of that argument breaks off where the library for videos is missing.

    Args:
        kind: a class of transformers, whose name it keeps, so that it is saved under that.
    """

    def check_argument_for_proper_class(self: Any, argument_name: str, argument: Any) -> Any:
        return (
            NoVideos
            if isinstance(argument, NoVideos)
            else kind.check_argument_for_proper_class(self, argument_name, argument)
        )

    own = {"check_argument_for_proper_class": check_argument_for_proper_class, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), own)


def load_pictures_only(path: str, **where: Any) -> ProcessorMixin:
    """The processor of a checkpoint, without its videos.

    Args:
        path: a directory or hub id.
        where: `revision`, `token` and the like.

    Raises:
        ImportError: it needs something for pictures too.
        OSError: there is no processor.
        ValueError: nothing says which processor it is.
    """
    kind: Any = pictures_only(_kind(path, where))
    settings, rest = kind.get_processor_dict(path, **where)
    made = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    names = kind.get_attributes()
    if strange := set(names) - {*made, "video_processor"}:
        raise ValueError(f"{path}: a processor with {', '.join(sorted(strange))} cannot be loaded in parts")
    parts = [
        made[name].from_pretrained(path, **where) if name in made else NoVideos(_videos(path, where)) for name in names
    ]
    return kind.from_args_and_dict(parts, settings, **{k: v for k, v in rest.items() if k not in where})


def _kind(path: str, where: Mapping[str, Any]) -> Any:
    """The class of the processor: as the processor's files say, else the model's own."""
    try:
        found: Any = processor_class_from_name(
            ProcessorMixin.get_processor_dict(path, **where)[0].get("processor_class", "")
        )
    except OSError:
        found = None
    if found is None:
        config = AutoConfig.from_pretrained(path, **where)
        if type(config) not in PROCESSOR_MAPPING:
            raise ValueError(f"{path} does not say which processor it has")
        found = PROCESSOR_MAPPING[type(config)]
    return found


def _videos(path: str, where: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return BaseVideoProcessor.get_video_processor_dict(path, **where)[0]
    except OSError:
        return {}
