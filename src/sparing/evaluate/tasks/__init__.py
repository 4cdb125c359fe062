"""What a model can be asked: lm-eval's tasks, multiple choice, perplexity, generation with a verifier, and lmms-eval's."""

from sparing.evaluate.tasks.generation import GenerationTask
from sparing.evaluate.tasks.harness import ChoiceTask, HarnessTask
from sparing.evaluate.tasks.lmms import SUITES, LmmsTask
from sparing.evaluate.tasks.perplexity import PerplexityTask
from sparing.evaluate.tasks.registry import known_tasks, task_class

__all__ = [
    "SUITES",
    "ChoiceTask",
    "GenerationTask",
    "HarnessTask",
    "LmmsTask",
    "PerplexityTask",
    "known_tasks",
    "task_class",
]
