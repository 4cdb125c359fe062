"""Who decides: one paper, one file. And `OfClass`, which chooses tokens for those that decide by `where=`.

`sparing.policies.budget` finds settings that cost the same.
"""

from sparing.policies.cd_pruner import CDPruner
from sparing.policies.d_llm import DLLM
from sparing.policies.dart import DART
from sparing.policies.div_prune import DivPrune
from sparing.policies.drop_tokens import DropTokens
from sparing.policies.enter_late import EnterLate
from sparing.policies.fast_v import FastV
from sparing.policies.mod import MoD
from sparing.policies.of_class import OfClass
from sparing.policies.pyramid_drop import PyramidDrop
from sparing.policies.skip_gpt import SkipGPT
from sparing.policies.skip_modules import SkipModules
from sparing.policies.sparse_vlm import SparseVLM
from sparing.policies.v_scan import VScan
from sparing.policies.vica import ViCA
from sparing.policies.vis_pruner import VisPruner
from sparing.policies.vision_zip import VisionZip
from sparing.policies.wait_k import WaitKMask

__all__ = [
    "DART",
    "DLLM",
    "CDPruner",
    "DivPrune",
    "DropTokens",
    "EnterLate",
    "FastV",
    "MoD",
    "OfClass",
    "PyramidDrop",
    "SkipGPT",
    "SkipModules",
    "SparseVLM",
    "VScan",
    "ViCA",
    "VisPruner",
    "VisionZip",
    "WaitKMask",
]
