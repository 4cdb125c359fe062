"""What ViCA saves: over dense and text alone, for a second question about the same picture, and in training.

    python benchmarks/vica.py --quick --json out.json     # the figures with a reach: a minute on two free cores
    python benchmarks/vica.py --json out.json             # and a grid: encoder, prefill, decode, end to end; batches and pictures

The shapes of `engine.py` (16 layers, width 1024, 16 heads, MLP 2816, vocabulary 32,000, 576 visual and 64 text tokens, 4 reading
layers), as a LLaVA with random weights. Every figure is a median of ratios of arms that ran one after the other in the same round.
`..._by_flops` is what counted operations predict. bf16 where the processor multiplies it, else float32.

A second question goes on from a `VisionPrefix` behind what it shares with the first, system prompt and picture; `reread` has another
system prompt, and reads it. The first one is measured without the encoder, from the picture's embeddings. A training step is forward
and backward of every weight of the decoder, logits and labels of the tokens behind the picture alone, the same in both arms. The
grid's other arms: FastV (layer 2, half), PyramidDrop (three stages, half each), stock Hugging Face on the whole prompt, and on its
text alone, which is the limit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import engine
import torch
from arms import ViCAOracle, around, build, interleave, picture_ids, ratio
from engine import finish, keep, under

import sparing
from sparing.lens.screened import pays
from sparing.policies import FastV, PyramidDrop, ViCA
from sparing.tokens import TokenMap

SHAPE, READING, VISUAL, TEXT = engine.SHAPE, engine.READING, 576, 64
CLIP_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL = {"layers": 8, "hidden": 256, "heads": 8, "mlp": 704, "vocabulary": 2000}
SMALL_ENCODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
REACH = {
    "oracle_share_b1": (">=", 0.92),
    "oracle_share_b8": (">=", 0.92),
    "second_question_vs_text": ("<=", 1.10),
    "second_question_vs_first": ("<=", 0.78),
    "train_step_vs_dense": ("<=", 0.25),
}
ACCURACY = Path(__file__).parent / "results" / "vica-accuracy.json"
"""Written by whoever selects layers and converts: `retained_accuracy`, the converted model's accuracy over the dense one's."""


class Setting:
    """A model of a shape, a prompt of a size, and what may run on them.

    Args:
        decoder: from `build`.
        reading: the reading layers.
        batch: questions at once, about one picture (or several that stand together).
        visual: visual tokens.
        text: text tokens.
        encoder: the encoder's sizes; tiny by default.
    """

    def __init__(
        self,
        decoder,
        reading: list[int],
        batch: int,
        visual: int = VISUAL,
        text: int = TEXT,
        encoder: dict | None = None,
    ) -> None:
        pictures = max(visual // 576, 1)
        self.decoder, self.reading, self.text = decoder, reading, text
        self.model = around(decoder, visual, pictures, encoder)
        self.ids, self.words = picture_ids(self.model, batch, visual, text)
        side = self.model.config.vision_config.image_size
        generator = torch.Generator().manual_seed(5)
        pixels = torch.randn(pictures, 3, side, side, generator=generator).to(decoder.device, decoder.dtype)
        self.one = {"input_ids": self.ids[:1], "pixel_values": pixels}
        self.prefix = sparing.VisionPrefix.from_inputs(self.model, self.one, ViCA(reading))
        self.tokens = TokenMap.from_inputs(self.model, {"input_ids": self.ids})
        embeds = decoder.get_input_embeddings()(self.ids).detach()
        state = self.prefix.held.state(0)
        embeds[self.ids == self.model.config.image_token_id] = state.repeat(batch, 1)
        self.embedded = {"inputs_embeds": embeds, "logits_to_keep": 1}

    def dense(self) -> torch.Tensor:
        """Stock, from embeddings."""
        return self.decoder(**self.embedded).logits

    def alone(self) -> torch.Tensor:
        """Stock, the text without pictures."""
        return self.decoder(input_ids=self.words, logits_to_keep=1).logits

    def following(self, policy) -> Callable[[], torch.Tensor]:
        """Under a policy, from embeddings: a first question without its encoder."""
        return under(self.decoder, policy, tokens=self.tokens, **self.embedded)

    def captured(self, policy=None) -> Callable[[], torch.Tensor]:
        """Under a policy (or none, computing everything), from what a first prompt of the layout recorded; a CUDA graph on a GPU."""
        policies = [] if policy is None else [policy]
        run = sparing.apply(self.decoder, *policies, tokens=self.tokens, force=True, capture=True)

        def arm() -> torch.Tensor:
            with run:
                return self.decoder(**self.embedded, use_cache=True).logits

        return arm

    def second(self) -> torch.Tensor:
        """A question from the prefix, behind system prompt and picture."""
        with self.prefix.apply():
            return self.model(**self.behind(), logits_to_keep=1).logits

    def reread(self) -> torch.Tensor:
        """A question from the prefix with all of its text."""
        with self.prefix.apply():
            return self.model(input_ids=self.ids, logits_to_keep=1).logits

    def behind(self) -> dict:
        """What a second question goes on from."""
        return self.prefix.continued({"input_ids": self.ids}, later=True)

    def costs(self, *, prefix: bool = True) -> dict[str, int]:
        """Counted operations of the prefills: `first`, `dense`, `text`; with a `prefix` also `second`, `reread`."""
        with torch.no_grad():
            with sparing.apply(self.decoder, ViCA(self.reading), tokens=self.tokens) as first:
                self.decoder(**self.embedded)
            with sparing.apply(self.decoder) as text:
                self.alone()
            ledgers = {"first": first.ledger, "text": text.ledger}
            for name in ("second", "reread") if prefix else ():
                with self.prefix.apply() as run:
                    getattr(self, name)()
                    ledgers[name] = run.ledger
        found = {name: ledger.cost().total for name, ledger in ledgers.items()}
        return found | {"dense": first.ledger.dense_cost().total}

    def train(self, policy) -> Callable[[], None]:
        """A training step's forward and backward."""
        keep = self.text - self.text // 3
        labels = self.ids[:, -keep:]
        inputs = {**self.embedded, "logits_to_keep": keep, "labels": labels, "use_cache": False}

        def step() -> None:
            self.decoder.train()
            self.decoder.zero_grad(set_to_none=True)
            with torch.enable_grad():
                if policy is None:
                    self.decoder(**inputs).loss.backward()
                else:
                    with sparing.apply(self.decoder, policy, tokens=self.tokens):
                        self.decoder(**inputs).loss.backward()
            self.decoder.eval()

        return step


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def predicted(setting: Setting, *, prefix: bool = True) -> dict[str, float]:
    """The ratios of `prefill` by counted operations; they are the same for any number of questions."""
    costs = setting.costs(prefix=prefix)
    return {f"{name}_by_flops": costs[a] / costs[b] for name, (a, b) in RATIOS.items() if {a, b} <= costs.keys()}


# Oracle and first question both come behind a short arm: what runs behind a long one finds its memory made.
ARMS = ("oracle", "second", "first", "reread", "text")
RATIOS = {
    "oracle_share": ("oracle", "first"),
    "second_vs_text": ("second", "text"),
    "second_vs_first": ("second", "first"),
    "reread_vs_text": ("reread", "text"),
    "reread_vs_first": ("reread", "first"),
    "text_vs_first": ("text", "first"),
    "vs_text": ("first", "text"),
    "vs_dense": ("dense", "first"),
    "captured_vs_dense": ("dense", "captured"),
    "captured_vs_dense_captured": ("dense_captured", "captured"),
}
_OVER_DENSE = ("vs_dense", "captured_vs_dense", "captured_vs_dense_captured")
HEADLINE = {"b1": (*_OVER_DENSE, "vs_text"), "b8": _OVER_DENSE, "b8_half_the_text": _OVER_DENSE, "gqa": ("vs_text",)}
"""Run -> those of its ratios that are figures."""


def prefill(
    setting: Setting, rounds: int, references: int, arms: Sequence[str] = ARMS, *, captured: bool = False
) -> dict[str, float]:
    """ViCA beside the oracle; a second question beside the first and the text; and (fewer rounds) dense.

    Args:
        setting: what runs.
        rounds: of the arms.
        references: rounds of the dense model; none leaves it out.
        arms: those that are timed; the first question is one of them.
        captured: whether dense and first question are also run from a record (`sparing.apply(capture=True)`).
    """
    vica = setting.following(ViCA(setting.reading))
    oracle = ViCAOracle(setting.decoder, setting.tokens, setting.reading)
    slow = {"dense": setting.dense} if references else {}
    if captured:
        slow |= {"captured": setting.captured(ViCA(setting.reading)), "dense_captured": setting.captured()}
    every = {
        "first": vica,
        "oracle": lambda: oracle(**setting.embedded),
        "second": setting.second,
        "reread": setting.reread,
        "text": setting.alone,
    }
    gave: dict = {}
    # A single dense pass warms the rest up. A record is made in the first round and captured in the second.
    warm_up = 2 if captured else int(references != 1)
    run = slow | {name: every[name] for name in arms}
    seconds = interleave(run, rounds, warm_up, gave, at_most=dict.fromkeys(slow, references))
    return {
        **{name: ratio(seconds, *two) for name, two in RATIOS.items() if set(two) <= seconds.keys()},
        **{f"{name}_ms": 1000 * statistics.median(took) for name, took in seconds.items()},
        **{
            f"max_rel_of_{name}": difference(gave[name], gave["first"])
            for name in ("second", "captured", "oracle")
            if name in gave
        },
    }


def training(setting: Setting, rounds: int) -> dict[str, float]:
    """A step on the gathered path over the stock model's; one of the former before them makes room for the gradients."""
    ours = setting.train(ViCA(setting.reading))
    ours()
    seconds = interleave({"dense": setting.train(None), "ours": ours}, rounds, warm_up=0)
    setting.decoder.zero_grad(set_to_none=True)
    return {"vs_dense": ratio(seconds, "ours", "dense"), "ms": 1000 * statistics.median(seconds["ours"])}


def grid(
    decoder, reading: list[int], batches: list[int], pictures: list[int], rounds: int, steps: int, encoder: dict
) -> Iterator[tuple[str, dict]]:
    """Milliseconds of encoder, prefill, a decoded token, and a whole answer, for each method, number of questions and tokens.

    Rounds are those at one question: many questions take fewer. What the device has no memory for says so, and the rest goes on.
    """
    depth = len(decoder.model.layers)
    stages = [depth // 4, depth // 2, 3 * depth // 4]
    methods = {"vica": ViCA(reading), "fastv": FastV(2, 0.5), "pyramid_drop": PyramidDrop(stages, 0.5)}
    for visual, batch in itertools.product(pictures, batches):
        try:
            setting = Setting(decoder, reading, batch, visual, encoder=encoder)
            found = cell(setting, methods, max(3, rounds // batch), steps)
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        setting = None
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        print(
            f"{visual} visual tokens, {batch} questions: {'no room' if 'out_of_memory' in found else 'done'}",
            flush=True,
        )
        yield f"v{visual}_b{batch}", found


def cell(setting: Setting, methods: dict, rounds: int, steps: int) -> dict[str, float | dict[str, float]]:
    """One cell of the grid."""
    arms: dict[str, Callable[[], object]] = {
        "encoder": lambda: setting.model.get_image_features(setting.one["pixel_values"]),
        "dense": setting.dense,
        "text": setting.alone,
        **{name: setting.following(policy) for name, policy in methods.items()},
        "second": setting.second,
    }
    once = {name: 1000 * statistics.median(took) for name, took in interleave(arms, rounds).items()}
    answers = {name: answer(setting, name, methods, steps) for name in arms if name != "encoder"}
    decode: dict[str, list[float]] = {name: [] for name in answers}
    whole: dict[str, list[float]] = {name: [] for name in answers}
    with torch.no_grad():
        # A few: each has many steps.
        for round_ in range(max(2, rounds // 4) + 1):
            for name, run in answers.items():
                first, each = run()
                if round_:
                    decode[name].append(1000 * each)
                    # The text has no picture, and for a second question it was encoded before.
                    seen = 0 if name in ("text", "second") else once["encoder"]
                    whole[name].append(seen + 1000 * (first + steps * each))
    return {
        "encoder_ms": once.pop("encoder"),
        "prefill_ms": once,
        "decode_ms_a_token": {name: statistics.median(took) for name, took in decode.items()},
        "end_to_end_ms": {name: statistics.median(took) for name, took in whole.items()},
    }


def answer(setting: Setting, name: str, methods: dict, steps: int) -> Callable[[], tuple[float, float]]:
    """Prefill and cached steps; returns the seconds of the first and of one of the others."""
    model = setting.model if name == "second" else setting.decoder

    def context():
        if name == "second":
            return setting.prefix.apply()
        policies = [methods[name]] if name in methods else []
        return sparing.apply(model, *policies, tokens=setting.tokens if policies else None)

    def inputs() -> dict:
        if name == "second":
            return setting.behind()
        return {"input_ids": setting.words} if name == "text" else setting.embedded

    def run() -> tuple[float, float]:
        with context():
            begin = clock(setting.decoder.device)
            out = model(**{**inputs(), "logits_to_keep": 1}, use_cache=True)
            middle = clock(setting.decoder.device)
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True).clamp(max=setting.decoder.config.vocab_size - 2)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            return middle - begin, (clock(setting.decoder.device) - middle) / steps

    return run


def clock(device: torch.device) -> float:
    """Now, once the device is through."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def keys(runs: dict[str, dict]) -> dict[str, float]:
    """The figures by name."""
    one, eight = runs["b1"], runs["b8"]
    found = {"oracle_share_b1": one["oracle_share"], "oracle_share_b8": eight["oracle_share"]}
    # The text's own share of a first question: what one costs that reads no picture, system prompt included.
    for name in ("second_vs_text", "second_vs_first", "reread_vs_text", "reread_vs_first", "text_vs_first"):
        of = name.replace("second_", "second_question_").replace("reread_", "reread_question_")
        found |= {of: one[name], f"{of}_by_flops": one[f"{name}_by_flops"]}
    if "train" in runs:
        found["train_step_vs_dense"] = runs["train"]["vs_dense"]
    # By operations all batches are alike, where nobody counted them.
    counted = {name: value for name, value in one.items() if name.endswith("_by_flops")}
    for of, names in HEADLINE.items():
        if of in runs:
            known, ends = {**counted, **runs[of]}, itertools.product(names, ("", "_by_flops"))
            found |= {f"vica_{name}_{of}{end}": known[name + end] for name, end in ends if name + end in known}
    if "second_vs_text" in eight:
        found["second_question_b8_vs_text"] = eight["second_vs_text"]
    return found


def retained(path: Path) -> dict[str, float]:
    """`retained_accuracy` of the converted model, where it was measured."""
    if not path.exists():
        return {}
    return {"retained_accuracy": json.loads(path.read_text())["figures"]["retained_accuracy"]}


def quick(
    shape: dict, reading: list[int], dtype, device: str, rounds: int, *, visual: int = VISUAL, grouped: int = 4
) -> dict:
    """The runs behind the figures with a reach, and nothing else of what takes long."""
    decoder = build(**shape, kv_heads=shape["heads"], dtype=dtype, device=device)
    one = Setting(decoder, reading, 1, visual)
    runs = {
        "b1": prefill(one, rounds, 1) | predicted(one),
        "b8": prefill(Setting(decoder, reading, 8, visual), max(2, rounds // 8), 1, ("first", "oracle")),
    }
    runs["train"] = training(one, max(rounds // 5, 1))
    del decoder, one
    few = Setting(build(**shape, kv_heads=grouped, dtype=dtype, device=device), reading, 1, visual)
    return {**runs, "gqa": prefill(few, max(rounds - 2, 2), 0, ("first", "text")) | predicted(few, prefix=False)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the figures with a reach alone")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds of each timing at batch 1 (default 5 quick, 15 full)"
    )
    parser.add_argument("--accuracy", type=Path, default=ACCURACY, help="where retained_accuracy was written")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="of the grid")
    parser.add_argument("--visual", nargs="+", type=int, default=[144, 576, 2880], help="visual tokens of the grid")
    parser.add_argument("--steps", type=int, default=16, help="decoded tokens of the grid's answers")
    parser.add_argument("--small", action="store_true", help="the grid with 8 layers of width 256 and a tiny encoder")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="by default what the processor is fast at")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    fast = "bfloat16" if pays(torch.device("cpu")) else "float32"
    dtype = getattr(torch, options.dtype or fast)
    rounds = options.rounds or (5 if options.quick else 15)
    runs = quick(SHAPE, READING, dtype, "cpu", rounds)
    runs["dtype"] = str(dtype).removeprefix("torch.")
    if not options.quick:
        shape, reading, encoder = (SMALL, READING[:2], SMALL_ENCODER) if options.small else (SHAPE, READING, CLIP_LARGE)
        decoder = build(**shape, kv_heads=shape["heads"], dtype=dtype)
        runs["grid"] = {}
        for name, found in grid(decoder, reading, options.batches, options.visual, 3, options.steps, encoder):
            runs["grid"][name] = found
            keep(runs, begin, options)
    finish(keys(runs) | retained(options.accuracy), REACH, runs, begin, options)


if __name__ == "__main__":
    main()
