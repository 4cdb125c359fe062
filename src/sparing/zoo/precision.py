"""In which precision training runs."""

from collections.abc import Mapping
from typing import Any

import torch


def mixed(device: str) -> bool:
    """Whether training runs under bf16 autocast there: on a CPU with bf16 instructions.

    Without them fp32 is several times faster. On a GPU models this small wait for launches of kernels, not for arithmetic, and
    every cast is one more: fp32 there, with matrix products in TF32.
    """
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_words(environment: Mapping[str, Any]) -> str:
    """What a card says of it, of a run on the GPU of its machine if there is one."""
    if environment["hardware"]["gpus"]:
        return "fp32 with TF32 products"
    return "bf16 autocast over fp32 weights" if mixed("cpu") else "fp32"
