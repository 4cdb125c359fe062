"""What a model can be asked: lm-eval's tasks, multiple choice, perplexity, and generation with a verifier."""

from sparing.evaluate.tasks.generation import GenerationTask
from sparing.evaluate.tasks.harness import ChoiceTask, HarnessTask
from sparing.evaluate.tasks.perplexity import PerplexityTask
from sparing.evaluate.tasks.registry import known_tasks, task_class

__all__ = ["ChoiceTask", "GenerationTask", "HarnessTask", "PerplexityTask", "known_tasks", "task_class"]
