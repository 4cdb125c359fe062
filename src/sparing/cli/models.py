"""How commands load the model that they were given: any checkpoint, what `sparing.save` wrote too, or a model of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.cli.options import DtypeName

if TYPE_CHECKING:
    from torch import nn

    from sparing.plan import Policy


def load_model(
    name: str, *, dtype: DtypeName = "auto", device: str = "auto", trust_remote_code: bool | None = None
) -> tuple[nn.Module, Any, tuple[Policy, ...]]:
    """The model, under no policy; its tokenizer or processor; and the policies that it was saved with.

    Args:
        name: a checkpoint's folder, a hub id, or the name of a model of the zoo.
        dtype: as `--dtype`.
        device: as `--device`.
        trust_remote_code: as `--trust-remote-code`.

    Raises:
        ValueError: whatever keeps it from being loaded.
    """
    from transformers.utils import logging

    from sparing import zoo
    from sparing.checkpoint import load, release
    from sparing.cli.options import device_of, dtype_of

    logging.disable_progress_bar()
    path = str(zoo.path(name)) if name in zoo.names() and not Path(name).exists() else name
    model, processor = load(path, dtype=dtype_of(dtype), device=device_of(device), trust_remote_code=trust_remote_code)
    return model, processor, release(model).parts()
