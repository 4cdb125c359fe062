"""Lenses: observe what tokens hold, and never change the result."""

from sparing.lens.alignment import Alignment, LayerAlignment, layer_alignment
from sparing.lens.classes import Criteria, token_classes
from sparing.lens.embedding_lens import embedding_lens, find_words
from sparing.lens.logit_lens import logit_lens
from sparing.lens.module_change import ModuleChanges, module_changes
from sparing.lens.nulls import norm_matched, shuffled, untrained_projector
from sparing.lens.patch_benchmark import PatchBenchmark, patch_benchmark
from sparing.lens.patches.wording import ENGLISH, SCENES, Wording
from sparing.lens.probe import Probed, linear_probe, precision_at_k
from sparing.lens.record import Recording, record
from sparing.lens.words import WordReading

__all__ = [
    "ENGLISH",
    "SCENES",
    "Alignment",
    "Criteria",
    "LayerAlignment",
    "ModuleChanges",
    "PatchBenchmark",
    "Probed",
    "Recording",
    "WordReading",
    "Wording",
    "embedding_lens",
    "find_words",
    "layer_alignment",
    "linear_probe",
    "logit_lens",
    "module_changes",
    "norm_matched",
    "patch_benchmark",
    "precision_at_k",
    "record",
    "shuffled",
    "token_classes",
    "untrained_projector",
]
