"""In which precision training runs."""

import torch


def mixed(device: str) -> bool:
    """Whether training runs under bf16 autocast there; on a CPU without bf16 instructions fp32 is several times faster."""
    return device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
