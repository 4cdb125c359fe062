"""The engine's figures at LLaVA-1.5-7B's shape with random weights, on a GPU (`make gpu`).

    python benchmarks/gpu_engine.py --json out.json          # 32 layers, width 4096, bf16: needs about 20 GiB
    python benchmarks/gpu_engine.py --shrink --json out.json # the same code at a toy shape, on any machine

576 visual and 64 text tokens; the reading layers of the paper's 7B model. The paper reports prefill 3.5x at batch 1 (A6000).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import engine
import torch

LLAVA_7B = {"layers": 32, "hidden": 4096, "heads": 32, "mlp": 11_008, "vocabulary": 32_000}
TOY = {"layers": 8, "hidden": 64, "heads": 4, "mlp": 96, "vocabulary": 200}
READING = {32: [0, 1, 7, 8, 9, 10, 11, 14], 8: [0, 3]}


def options_of(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, str]:
    """Read the options that benchmarks on a GPU share, beside the parser's own; and the device. Ends where there is no GPU."""
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shrink", action="store_true", help="a toy shape, also without a GPU")
    options = parser.parse_args()
    options.quick = options.shrink
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.shrink:
        parser.exit(2, "error: no CUDA device here; run it where there is one, or pass --shrink\n")
    return options, device


def main() -> None:
    """Measure, print and write."""
    options, device = options_of(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    shape = TOY if options.shrink else LLAVA_7B
    engine.READING = READING[shape["layers"]]
    begin = time.perf_counter()
    kv_heads = [shape["heads"]] if options.shrink else [shape["heads"], 8]
    rounds = 3 if options.shrink else options.rounds
    runs = {}
    for kv in kv_heads:
        runs[f"bf16_kv{kv}"] = engine.measure(torch.bfloat16, kv, rounds, 32, shape, device, quick=False)
        engine.keep(runs, begin, options)
    difference = engine.forced_difference(shape, shape["heads"], device)
    engine.finish(engine.keys(runs, difference), engine.REACH, runs, begin, options)


if __name__ == "__main__":
    main()
