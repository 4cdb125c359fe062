"""What is lost when saves are killed, and what stock loading makes of a checkpoint with policies.

    python benchmarks/checkpoints.py --quick --json out.json     # 60 kills
    python benchmarks/checkpoints.py --json out.json             # 400 kills

`lost_on_kill`: kills (SIGKILL at random moments of a loop of saves, and around each rename) after which `sparing.load` finds neither
the old checkpoint nor the new one whole. `silent_dense_loads`: stock `from_pretrained` calls, over Auto and concrete classes and their
arguments, that return a model from a checkpoint with policies. Both must be 0.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

import sparing
from sparing.cli.record import write_json
from sparing.evaluate.environment import environment

# The models, policies and kills of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def stock_loads(folder: Path) -> dict[str, int]:
    """Try every stock way on every policy and family; count what comes up."""
    import models
    from policy_cases import CASES

    tried = came_up = 0
    # These three hold functions, which are refused at save.
    cases = [case for case in CASES if case.name not in ("drop-keep", "drop-reindex", "mod-and-drop")]
    for make in (models.llama, models.llava):
        model = make()
        for number, case in enumerate(cases):
            saved = sparing.save(model, folder / f"{model.config.model_type}-{number % 2}", [case.make(model)])
            config = {"config": copy.deepcopy(model.config)}
            for cls, arguments in (
                *((auto, {}) for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText)),
                *((auto, config) for auto in (AutoModel, type(model))),
                (type(model), {}),
                (type(model), {"ignore_mismatched_sizes": True}),
                (type(model), {**config, "ignore_mismatched_sizes": True}),
                (type(model), {**config, "use_safetensors": False}),
            ):
                tried += 1
                try:
                    cls.from_pretrained(saved, **arguments)
                    came_up += 1
                except (ValueError, AttributeError, OSError):
                    pass
    return {"stock_loads": tried, "silent_dense_loads": came_up}


def main() -> int:
    """Run, print, and fail if anything is lost or comes up dense."""
    from checkpoint_kills import kill_at_each_step, kill_while_saving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 random kills instead of 400")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        random_kills = kill_while_saving(Path(folder), 60 if options.quick else 400, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        placed_kills = kill_at_each_step(Path(folder))
    kills = {key: random_kills.get(key, 0) + placed_kills.get(key, 0) for key in {**random_kills, **placed_kills}}
    with tempfile.TemporaryDirectory() as folder:
        figures = {**kills, **stock_loads(Path(folder))}
    for key, value in figures.items():
        print(f"{key:22} {value}")
    if options.json is not None:
        seconds = round(time.monotonic() - begin, 1)
        write_json(options.json, {**figures, "seed": options.seed, "seconds": seconds, **environment()})
    return int(figures["lost_on_kill"] > 0 or figures["silent_dense_loads"] > 0)


if __name__ == "__main__":
    sys.exit(main())
