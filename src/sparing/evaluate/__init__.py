"""What a model is worth on a text, and how fast it is: losses, seconds, and the profile made of them."""

from sparing.evaluate.findings import Point, Profile, Settings
from sparing.evaluate.kinds import KINDS, TokenKinds
from sparing.evaluate.loss import TextLoss, text_loss
from sparing.evaluate.profile import Profiler, profile
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
from sparing.evaluate.windows import Windows, cut, read_text, tokenize

__all__ = [
    "KINDS",
    "SUITES",
    "ChoiceTask",
    "Figure",
    "GenerationTask",
    "HarnessTask",
    "LmmsTask",
    "NotApplicable",
    "Outcome",
    "PerplexityTask",
    "Point",
    "Profile",
    "Profiler",
    "Removal",
    "Settings",
    "Subject",
    "Task",
    "TextLoss",
    "Timing",
    "TokenKinds",
    "Windows",
    "cut",
    "known_tasks",
    "profile",
    "read_text",
    "task_class",
    "text_loss",
    "time_arms",
    "tokenize",
]
