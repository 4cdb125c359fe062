"""Every family at once: do the executors agree, and what becomes of checkpoints.

    python benchmarks/families.py --quick --json out.json     # 2 random plans a family, 72 kills
    python benchmarks/families.py --json out.json             # 20 random plans a family, 412 kills

`families_passing`: families (of `families`) whose stock logits are unchanged bit for bit when nothing is planned, and whose executors
agree to 1e-5 in fp32 on random plans: a left-padded prompt, a cached chunk, single steps. `worst_parity_rel`: the worst of those
differences. `silent_dense_loads` and `lost_on_kill` are those of `benchmarks/checkpoints.py`. Tiny random models (`tests/models.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import stock_loads
from transformers.utils import logging

import sparing
from sparing.cli.record import write_json
from sparing.evaluate.environment import environment

# The models, plans and kills of the tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

TOLERANCE = 1e-5


def builders() -> dict[str, tuple]:
    """A model and a batch of every family."""
    import models
    import vision_models

    found = {"llama": (models.llama(), models.text_batch), "llava": (models.llava(), models.llava_batch)}
    found |= {name: (models.text_family(name), models.text_batch) for name in models.TEXT_FAMILIES}
    return found | {name: (build(), batch) for name, (build, batch) in vision_models.FAMILIES.items()}


def worst_difference(model, batch, plans: int) -> float:
    """The largest relative difference between the executors; infinite if the idle model is not the stock one."""
    from random_plans import RandomPlans
    from test_parity import decode, relative

    worst = 0.0
    inputs = batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        for execute in ("dense", "gathered"):
            with sparing.apply(model, execute=execute):
                if not torch.equal(model(**inputs).logits, stock):
                    return float("inf")
    for seed in range(plans):
        extra = torch.randint(3, 90, (len(inputs["input_ids"]), 6), generator=torch.Generator().manual_seed(seed))
        found = [decode(model, inputs, e, RandomPlans(seed, 0.7), extra)[0] for e in ("dense", "gathered")]
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            mask = inputs["attention_mask"] if i == 0 else torch.ones(a.shape[:2])
            worst = max(worst, relative(a, b, mask))
    return worst


def main() -> int:
    """Run, print, and fail if a family does not pass or anything is lost."""
    from checkpoint_kills import kill_at_each_step, kill_while_saving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer plans and kills")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    begin = time.monotonic()
    worst = {}
    for name, (model, batch) in builders().items():
        worst[name] = worst_difference(model, batch, 2 if options.quick else 20)
        print(f"{name:20} {worst[name]:.1e}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_while_saving(Path(folder), 60 if options.quick else 400, 0)
    with tempfile.TemporaryDirectory() as folder:
        placed = kill_at_each_step(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        loads = stock_loads(Path(folder))
    figures = {
        "families": len(worst),
        "families_passing": sum(value <= TOLERANCE for value in worst.values()),
        "worst_parity_rel": max(worst.values()),
        "silent_dense_loads": loads["silent_dense_loads"],
        "lost_on_kill": kills["lost_on_kill"] + placed["lost_on_kill"],
        "kills": kills["kills"] + placed["kills"],
    }
    for key, value in figures.items():
        print(f"{key:20} {value}")
    if options.json:
        seconds = round(time.monotonic() - begin, 1)
        write_json(options.json, {"figures": figures, "worst": worst, "seconds": seconds, **environment()})
    lost = figures["lost_on_kill"] or figures["silent_dense_loads"]
    return int(bool(lost) or figures["families_passing"] < figures["families"])


if __name__ == "__main__":
    sys.exit(main())
