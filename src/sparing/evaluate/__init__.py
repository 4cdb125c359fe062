"""What a model is worth on a text, and how fast it is: losses, seconds, and the profile made of them."""

from sparing.evaluate.findings import Point, Profile, Settings
from sparing.evaluate.kinds import KINDS, TokenKinds
from sparing.evaluate.loss import TextLoss, text_loss
from sparing.evaluate.material import Material
from sparing.evaluate.pictures.material import PictureMaterial
from sparing.evaluate.pictures.questions import PictureQuestion, read_questions
from sparing.evaluate.profile import Profiler, profile, profile_pictures
from sparing.evaluate.reading_layers import LayerChoice, choose_layers
from sparing.evaluate.removal import Removal
from sparing.evaluate.speed import Timing, time_arms
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Subject, Task
from sparing.evaluate.tasks import (
    SUITES,
    ChoiceTask,
    GenerationTask,
    HarnessTask,
    LmmsTask,
    PerplexityTask,
    known_tasks,
    task_class,
)
from sparing.evaluate.text_material import TextMaterial
from sparing.evaluate.windows import Windows, cut, read_text, tokenize

__all__ = [
    "KINDS",
    "SUITES",
    "ChoiceTask",
    "Figure",
    "GenerationTask",
    "HarnessTask",
    "LayerChoice",
    "LmmsTask",
    "Material",
    "NotApplicable",
    "Outcome",
    "PerplexityTask",
    "PictureMaterial",
    "PictureQuestion",
    "Point",
    "Profile",
    "Profiler",
    "Removal",
    "Settings",
    "Subject",
    "Task",
    "TextLoss",
    "TextMaterial",
    "Timing",
    "TokenKinds",
    "Windows",
    "choose_layers",
    "cut",
    "known_tasks",
    "profile",
    "profile_pictures",
    "read_questions",
    "read_text",
    "task_class",
    "text_loss",
    "time_arms",
    "tokenize",
]
