"""What the executors cost and save on this machine: identity, forced path, ViCA against a hand-written oracle, skipping, memory.

    python benchmarks/engine.py --quick --json out.json     # bf16, multi-head, under a minute
    python benchmarks/engine.py --json out.json             # bf16 and fp32, multi-head and 4 KV heads

Every figure is a median of ratios of arms that ran one after the other in the same round. 16 layers, width 1024, 16 heads, MLP
2816, vocabulary 32,000, SDPA, `logits_to_keep=1` in all arms; 576 visual and 64 text tokens, 4 reading layers; 512 tokens for
skipping.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arms import SkipAtRandom, ViCAOracle, build, interleave, picture_prompt, ratio, text_prompt

import sparing
from sparing.cli.record import write_json
from sparing.evaluate.environment import environment
from sparing.evaluate.memory import peak_bytes
from sparing.policies import ViCA

SHAPE = {"layers": 16, "hidden": 1024, "heads": 16, "mlp": 2816, "vocabulary": 32_000}
READING = [0, 4, 8, 12]
SKIPPED = 0.4
COMBINATIONS = {
    "bf16": (torch.bfloat16, 16),
    "bf16_gqa": (torch.bfloat16, 4),
    "fp32": (torch.float32, 16),
    "fp32_gqa": (torch.float32, 4),
}
REACH = {
    "identity_prefill": ("<=", 1.03),
    "identity_decode": ("<=", 1.05),
    "forced_gathered_max_rel": ("<=", 1e-5),
    "forced_gathered_overhead": ("<=", 1.15),
    "vica_oracle_share_b1": (">=", 0.90),
    "vica_oracle_share_b4": (">=", 0.90),
    "vica_oracle_share_b8": (">=", 0.90),
    "skip_efficiency": (">=", 0.85),
    "peak_memory_ratio": ("<=", 1.0),
}


def under(model, *policies, tokens=None, force=False, **inputs) -> Callable[[], object]:
    """An arm: one prefill inside `sparing.apply`, entering and leaving it included."""

    def arm() -> object:
        with sparing.apply(model, *policies, tokens=tokens, force=force):
            return model(**inputs).logits

    return arm


def decode_arm(model, ids: torch.Tensor, steps: int, force: bool | None) -> Callable[[], float]:
    """An arm that times cached steps alone; `force=None` is the stock model."""

    def steps_of() -> float:
        out = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        begin = time.perf_counter()
        for _ in range(steps):
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        if token.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def arm() -> float:
        if force is None:
            return steps_of()
        with sparing.apply(model, force=force):
            return steps_of()

    return arm


def decode_ratio(model, batch: int, prompt: int, steps: int, rounds: int) -> dict[str, float]:
    """Identity and forced decoding over stock decoding."""
    ids = text_prompt(model, batch, prompt)["input_ids"]
    arms = {"stock": None, "identity": False, "forced": True}
    runs = {name: decode_arm(model, ids, steps, force) for name, force in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        for round_ in range(rounds + 1):
            for name, run in runs.items():
                took = run()
                if round_:
                    seconds[name].append(took)
    return {name: ratio(seconds, name, "stock") for name in ("identity", "forced")}


def forced_difference(shape: dict, kv_heads: int, device: str) -> float:
    """Largest relative difference of the forced path from stock in fp32: padded prompt, then cached steps."""
    model = build(**{**shape, "layers": 4}, kv_heads=kv_heads, dtype=torch.float32, device=device)
    ids = text_prompt(model, 2, 96)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    worst = 0.0
    with torch.no_grad():
        stock = model(ids, attention_mask=mask, use_cache=True)
        with sparing.apply(model, force=True):
            ours = model(ids, attention_mask=mask, use_cache=True)
            a, b = ours.logits[mask.bool()], stock.logits[mask.bool()]
            worst = ((a - b).abs().max() / b.abs().max()).item()
            grown = mask
            for _ in range(3):
                grown = torch.cat([grown, grown.new_ones(2, 1)], 1)
                token = stock.logits[:, -1:].argmax(-1)
                at = grown.sum(1, keepdim=True) - 1
                ours = model(token, attention_mask=grown, position_ids=at, past_key_values=ours.past_key_values)
                with torch.no_grad():
                    stock = stock_step(model, token, grown, at, stock)
                difference = (ours.logits - stock.logits).abs().max() / stock.logits.abs().max()
                worst = max(worst, difference.item())
    return worst


def stock_step(model, token, mask, position, before):
    """A step of the stock model while `apply` is active elsewhere: call the class's own forward."""
    decoder = model.model
    patched = decoder.__dict__.pop("forward")
    hooks, model._forward_pre_hooks = model._forward_pre_hooks, type(model._forward_pre_hooks)()
    try:
        return model(token, attention_mask=mask, position_ids=position, past_key_values=before.past_key_values)
    finally:
        decoder.forward, model._forward_pre_hooks = patched, hooks


def vica(model, batch: int, rounds: int, references: int) -> dict[str, float]:
    """ViCA against the oracle, and (fewer rounds) against dense and the same text without a picture, which is the limit."""
    inputs, tokens = picture_prompt(model, batch)
    oracle = ViCAOracle(model, tokens, READING)
    text = {**inputs, "inputs_embeds": inputs["inputs_embeds"][:, oracle.text]}
    ours = under(model, ViCA(READING), tokens=tokens, **inputs)
    # Twice the rounds: this ratio is near 1, so it is the one that a few disturbed rounds would change.
    seconds = interleave({"oracle": lambda: oracle(**inputs), "ours": ours}, 2 * rounds)
    slow = {"ours": ours, "dense": lambda: model(**inputs).logits, "text": lambda: model(**text).logits}
    against = interleave(slow, references, warm_up=int(references > 1))
    with torch.no_grad():
        a, b = ours(), oracle(**inputs)
        with sparing.apply(model, ViCA(READING), tokens=tokens) as run:
            model(**inputs)
    cost, dense = run.ledger.cost().total, run.ledger.dense_cost().total
    return {
        "oracle_share": 1 / ratio(seconds, "ours", "oracle"),
        "vs_dense": ratio(against, "dense", "ours"),
        "vs_dense_by_flops": dense / cost,
        "vs_text": ratio(against, "ours", "text"),
        "max_rel_to_oracle": ((a - b).abs().max() / b.abs().max()).item(),
        "ms": 1000 * sorted(seconds["ours"])[len(seconds["ours"]) // 2],
    }


def skip(model, batch: int, rounds: int, length: int = 512) -> dict[str, float]:
    """Random token skipping: the share of the counted FLOP ratio that the clock sees."""
    inputs = text_prompt(model, batch, length)
    policy = SkipAtRandom(len(model.model.layers), batch, length, SKIPPED, model.device)
    seconds = interleave({"dense": lambda: model(**inputs).logits, "ours": under(model, policy, **inputs)}, rounds)
    with torch.no_grad(), sparing.apply(model, policy) as run:
        model(**inputs)
    faster = ratio(seconds, "dense", "ours")
    counted = run.ledger.dense_cost().total / run.ledger.cost().total
    return {"vs_dense": faster, "vs_dense_by_flops": counted, "efficiency": faster / counted}


def memory(model) -> dict[str, float]:
    """Peak memory of each arm's prefill (with cache) over dense."""
    inputs, tokens = picture_prompt(model, 1)
    words = text_prompt(model, 1, 512)
    policy = SkipAtRandom(len(model.model.layers), 1, 512, SKIPPED, model.device)
    picture_dense, words_dense = peak_bytes(lambda: model(**inputs)), peak_bytes(lambda: model(**words))
    return {
        "identity": peak_bytes(under(model, **inputs)) / picture_dense,
        "vica": peak_bytes(under(model, ViCA(READING), tokens=tokens, **inputs)) / picture_dense,
        "skip": peak_bytes(under(model, policy, **words)) / words_dense,
        "forced": peak_bytes(under(model, force=True, **words)) / words_dense,
    }


def measure(
    dtype, kv_heads: int, rounds: int, steps: int, shape: dict, device: str, *, quick: bool, batches: tuple = (1, 4, 8)
) -> dict:
    """Every figure at one precision and number of KV heads. Quick: all batches for ViCA, batch 1 for the rest."""
    model = build(**shape, kv_heads=kv_heads, dtype=dtype, device=device)
    out: dict[str, dict] = {"identity_prefill": {}, "forced_prefill": {}, "vica": {}, "skip": {}, "decode": {}}
    for batch in batches:
        n = max(3, rounds // batch)
        out["vica"][f"b{batch}"] = vica(model, batch, n, 1 if quick else n)
        if quick and batch > 1:
            continue
        words = text_prompt(model, batch, 512)
        arms = {
            "stock": lambda words=words: model(**words).logits,
            "identity": under(model, **words),
            "forced": under(model, force=True, **words),
        }
        seconds = interleave(arms, n)
        out["identity_prefill"][f"b{batch}"] = ratio(seconds, "identity", "stock")
        out["forced_prefill"][f"b{batch}"] = ratio(seconds, "forced", "stock")
        out["skip"][f"b{batch}"] = skip(model, batch, n)
        if batch != 4:
            out["decode"][f"b{batch}"] = decode_ratio(model, batch, 128, steps, max(3, rounds // 3))
    out["memory"] = memory(model)
    return out


def keys(runs: dict[str, dict], difference: float) -> dict[str, float]:
    """The figures with a reach: the worst over precisions, head counts and batches."""
    every = list(runs.values())
    found = {
        "identity_prefill": max(v for r in every for v in r["identity_prefill"].values()),
        "identity_decode": max(v["identity"] for r in every for v in r["decode"].values()),
        "forced_gathered_max_rel": difference,
        "forced_gathered_overhead": max(
            [v for r in every for v in r["forced_prefill"].values()]
            + [v["forced"] for r in every for v in r["decode"].values()]
        ),
        "skip_efficiency": min(v["efficiency"] for r in every for v in r["skip"].values()),
        # To a hundredth of a percent: the map of the prompt itself is a byte a token.
        "peak_memory_ratio": round(max(v for r in every for v in r["memory"].values()), 4),
    }
    for batch in every[0]["vica"]:
        found[f"vica_oracle_share_{batch}"] = min(r["vica"][batch]["oracle_share"] for r in every)
        for name in ("vs_dense", "vs_dense_by_flops", "vs_text"):
            found[f"vica_{name}_{batch}"] = every[0]["vica"][batch][name]
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bf16 and multi-head only, fewer rounds: under a minute")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds of each timing at batch 1 (default 5 quick, 15 full)"
    )
    parser.add_argument("--only", nargs="+", choices=COMBINATIONS, default=list(COMBINATIONS), help="of the full run")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    rounds = options.rounds or (5 if options.quick else 15)
    runs = {}
    for name in ["bf16"] if options.quick else options.only:
        dtype, kv_heads = COMBINATIONS[name]
        steps = 8 if options.quick else 32
        runs[name] = measure(
            dtype, kv_heads, rounds, steps, SHAPE, "cpu", quick=options.quick, batches=tuple(options.batches)
        )
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        keep(runs, begin, options)
    figures = keys(runs, max(forced_difference(SHAPE, kv, "cpu") for kv in (16, 4)))
    finish(figures, REACH, runs, begin, options)


def keep(runs: dict, begin: float, options) -> None:
    """Write what is measured so far beside the JSON to come, `NAME.part.json`: a lent machine can go before the last figure."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json.with_suffix(".part.json"), _record(runs, begin, options))


def finish(figures: dict[str, float], reach: dict, runs: dict, begin: float, options) -> None:
    """Print each figure with its reach, and each reach without a figure, and write the JSON."""
    for name, value in figures.items():
        sign, bound = reach.get(name, ("", None))
        reached = (
            "" if bound is None else ("ok" if (value <= bound if sign == "<=" else value >= bound) else "NOT REACHED")
        )
        print(f"{name:36} {value:10.4g}  {sign} {'' if bound is None else bound:<6} {reached}")
    for name in reach.keys() - figures.keys():
        print(f"{name:36} NOT MEASURED")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"figures": figures, **_record(runs, begin, options)})
        options.json.with_suffix(".part.json").unlink(missing_ok=True)


def _record(runs: dict, begin: float, options) -> dict:
    seconds = round(time.perf_counter() - begin, 1)
    record = {"benchmark": Path(sys.argv[0]).stem, "quick": options.quick, "seconds": seconds}
    return {**record, "runs": runs, "date": time.strftime("%Y-%m-%d"), **environment()}


if __name__ == "__main__":
    main()
