"""ViCA's figures at LLaVA-1.5's own shapes with random weights, on a GPU (`make gpu`).

    python benchmarks/gpu_vica.py --json out.json            # 7B: 32 layers, width 4096, bf16: about 30 GiB
    python benchmarks/gpu_vica.py --shrink --json out.json   # the same code at a toy shape, on any machine

576 visual and 64 text tokens, the reading layers of the paper's model. The paper (2602.07574) reports a prefill of 36 ms after 124.5
(3.5x) at batch 1 and about 10x at batch 8, on an A6000 with FlashAttention; stock Hugging Face on SDPA is the dense arm here. Faster
devices wait for Python at batch 1, so that both are also run as CUDA graphs (`sparing.apply(capture=True)`): `captured_vs_dense` is
over stock, `captured_vs_dense_captured` graph over graph, `vica_vs_dense_..._by_flops` what counted operations allow: at batch 8 less
than the paper's 10 with 64 text tokens, and more with 32, so that both are run (`..._half_the_text`). The grid times encoder (CLIP-L
at 336 pixels), prefill, a decoded token and whole answers.
"""

from __future__ import annotations

import argparse
import time

import torch
import vica
from arms import build
from engine import finish, keep
from gpu_engine import LLAVA_7B, READING, TOY, options_of

# What the paper reports, to be beaten.
REACH = {"vica_captured_vs_dense_b1": (">=", 3.5), "vica_captured_vs_dense_b8": (">=", 10.0)}
TOY_ENCODER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="of the grid")
    parser.add_argument("--visual", nargs="+", type=int, default=[144, 576, 2880], help="visual tokens of the grid")
    parser.add_argument("--train", action="store_true", help="a training step too: 7B then needs about 45 GiB")
    options, device = options_of(parser)
    shape = TOY if options.shrink else LLAVA_7B
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    reading, rounds = READING[shape["layers"]], 2 if options.shrink else options.rounds
    visual = 16 if options.shrink else vica.VISUAL
    begin = time.perf_counter()
    decoder = build(**shape, kv_heads=shape["heads"], dtype=dtype, device=device)
    runs: dict[str, dict] = {}
    for batch in (1, 8):
        setting = vica.Setting(decoder, reading, batch, visual)
        runs[f"b{batch}"] = vica.prefill(setting, rounds, rounds, captured=True) | vica.predicted(setting)
        keep(runs, begin, options)
    # Text's length decides what can be saved, and the paper does not give its own.
    setting = vica.Setting(decoder, reading, 8, visual, vica.TEXT // 2)
    runs["b8_half_the_text"] = vica.prefill(setting, rounds, rounds, ("first",), captured=True) | vica.predicted(
        setting
    )
    del setting
    keep(runs, begin, options)
    if options.train or options.shrink:
        runs["train"] = vica.training(vica.Setting(decoder, reading, 1, visual), max(rounds // 4, 1))
    grouped = build(**shape, kv_heads=shape["heads"] // 4, dtype=dtype, device=device)
    setting = vica.Setting(grouped, reading, 1, visual)
    runs["gqa"] = vica.prefill(setting, rounds, rounds) | vica.predicted(setting)
    del grouped, setting
    # Last: it takes longest, and what comes before it is kept if the machine goes.
    sizes = ([1, 2], [16], TOY_ENCODER) if options.shrink else (options.batches, options.visual, vica.CLIP_LARGE)
    runs["grid"] = {}
    for name, found in vica.grid(decoder, reading, *sizes[:2], rounds, 8, sizes[2]):
        runs["grid"][name] = found
        keep(runs, begin, options)
    finish(vica.keys(runs), REACH, runs, begin, options)


if __name__ == "__main__":
    main()
