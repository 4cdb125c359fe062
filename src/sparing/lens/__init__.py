"""Lenses: observe what tokens hold, and never change the result."""

from sparing.lens.alignment import Alignment, LayerAlignment, layer_alignment
from sparing.lens.classes import Criteria, token_classes
from sparing.lens.embedding_lens import embedding_lens, find_words
from sparing.lens.logit_lens import logit_lens
from sparing.lens.nulls import norm_matched, shuffled, untrained_projector
from sparing.lens.probe import Probed, linear_probe, precision_at_k
from sparing.lens.record import Recording, record
from sparing.lens.words import WordReading

__all__ = [
    "Alignment",
    "Criteria",
    "LayerAlignment",
    "Probed",
    "Recording",
    "WordReading",
    "embedding_lens",
    "find_words",
    "layer_alignment",
    "linear_probe",
    "logit_lens",
    "norm_matched",
    "precision_at_k",
    "record",
    "shuffled",
    "token_classes",
    "untrained_projector",
]
