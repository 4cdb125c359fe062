"""What the embedding lens costs beside a forward pass, how often it is right, and whether answers follow the patches it reads.

    python benchmarks/embedlens.py --quick --json out.json     # about a minute on two free cores
    python benchmarks/embedlens.py --json out.json             # more rounds, scenes and items; memory

Speed: a LLaVA with random weights in fp32: 16 layers, width 1024, MLP 2816, vocabulary 32,000, and the encoder that gives
LLaVA-1.5 its 576 visual tokens (CLIP-L/14 at 336 pixels); 64 text tokens. The lens reads all 17 levels of all visual tokens, top 10.
Beside the whole forward pass (`lens_vs_forward`) stands the language model alone (`lens_vs_decoder`), and for both what the
operations alone predict (`..._by_flops`): the lens takes 642 billion, the language model 332, so in float32 throughout no exact
lens costs much less than 1.9 times the language model. With bf16 instructions the lens finds its candidates in bf16.

Truth: the zoo's `scenes-llava` on test scenes. Two words say what a patch with an object shows (colour, kind); `precision_at_5` is
the share of them among the 5 nearest at level 0, `precision_null` the highest share under any null (random vectors of the same norm,
patches exchanged within or between pictures, another projector). `answer_follows_patch`: one visual token is replaced by
that of a picture which differs in this object alone; the share of answers that say what the new token shows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from arms import interleave, ratio
from engine import finish
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import sparing
from sparing.anatomy import anatomy_of, ask
from sparing.evaluate.memory import peak_bytes
from sparing.evaluate.task import Subject
from sparing.evaluate.tasks.scene_transplant import SceneTransplantTask
from sparing.lens import embedding_lens, norm_matched, precision_at_k, record, shuffled, untrained_projector
from sparing.tokens import Group
from sparing.worlds import scenes

LAYERS, WIDTH, MLP, WORDS, VISUAL, TEXT = 16, 1024, 2816, 32_000, 576, 64
REACH = {"lens_vs_forward": ("<=", 1.5)}


def llava() -> LlavaForConditionalGeneration:
    """A LLaVA of the measured shape, weights drawn once instead of by each module's own initialisation."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
            num_key_value_heads=16,
        ),
        image_token_id=WORDS - 1,
    )
    with init_empty_weights():
        model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(model.named_parameters()):
        drawn = (
            torch.ones(weight.shape)
            if "norm" in name
            else torch.empty(weight.shape).normal_(0, 0.02, generator=generator)
        )
        set_module_tensor_to_device(model, name, "cpu", value=drawn)
    return model.eval()


def speed(rounds: int, *, memory: bool) -> dict[str, float]:
    """The lens over a forward pass with and without the encoder: median of ratios, by the clock and by operations."""
    model = llava()
    ids = torch.randint(3, WORDS - 1, (1, TEXT), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids[:, :21], torch.full((1, VISUAL), WORDS - 1), ids[:, 21:]], 1)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        recording = record(model, inputs, where=Group.IMAGE)
        # Warm up on a part: every kernel once, without the minutes.
        embedding_lens(model, recording, levels=[0])
    arms = {
        "forward": lambda: model(**inputs),
        "decoder": lambda: model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]),
        "lens": lambda: embedding_lens(model, recording),
    }
    seconds = interleave(arms, rounds, warm_up=0)
    n, levels = VISUAL + TEXT, LAYERS + 1
    decoder = LAYERS * 2 * n * (4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * n * WIDTH) + 2 * n * WIDTH * WORDS
    lens = 2 * levels * VISUAL * WIDTH * WORDS
    found = {
        "lens_vs_forward": ratio(seconds, "lens", "forward"),
        "lens_vs_forward_by_flops": lens / (decoder + anatomy_of(model).encoder_flops()),
        "lens_vs_decoder": ratio(seconds, "lens", "decoder"),
        "lens_vs_decoder_by_flops": lens / decoder,
        "lens_seconds": float(np.median(seconds["lens"])),
    }
    if memory:
        # Beside a table of all levels x tokens x words.
        found["lens_memory_share"] = peak_bytes(arms["lens"]) / (4 * levels * VISUAL * WORDS)
    return found


def precision(model, processor, count: int) -> dict[str, float]:
    """Precision at 5 of the patches with an object, and under each null. The words for where they stand are told apart."""
    stream = scenes.stream("test", seed=11)
    drawn = [next(stream) for _ in range(count)]
    inputs = ask(model, processor, ["what word ?"] * count, [[scenes.picture(scene)] for scene in drawn])
    ids = processor.tokenizer.get_vocab()
    truth = torch.tensor([[ids[word] for word in patch] for scene in drawn for patch in scene.patch_words()])
    shown = torch.from_numpy(np.concatenate([scene.truth().thing.ravel() for scene in drawn])) >= 0
    seen = record(model, inputs, where=Group.IMAGE)

    def of(recording) -> torch.Tensor:
        return precision_at_k(embedding_lens(model, recording, k=5), truth, 5)[:, shown].float()

    hits = of(seen)
    with untrained_projector(model, seed=0):
        untrained = record(model, inputs, where=Group.IMAGE)
    nulls = {
        "random": norm_matched(seen, seed=0),
        "shuffled_within": shuffled(seen, seed=0),
        "shuffled_between": shuffled(seen, seed=0, between=True),
        "untrained": untrained,
    }
    by_null = {name: of(recording)[0, :, 2:].mean().item() for name, recording in nulls.items()}
    words = dict(zip(("row", "column", "colour", "kind"), hits[0].mean(0).tolist(), strict=True))
    return {
        "precision_at_5": hits[0, :, 2:].mean().item(),
        "precision_null": max(by_null.values()),
        "patches": int(shown.sum()),
        "by_word": words,
        "by_level": hits[..., 2:].mean((1, 2)).tolist(),
        "by_null": by_null,
    }


def follows(model, processor, per_kind: int) -> dict[str, dict[str, float | None]]:
    """One token replaced by that of another picture: what do answers say, and what without it?"""
    found = SceneTransplantTask(per_kind=per_kind).measure(Subject(model, processor), seed=0)
    return {name: {"value": f.value, "low": f.low, "high": f.high} for name, f in found.figures.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, scenes and items: about a minute")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of the timing (default 2 quick, 7 full)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    model, processor = sparing.load(sparing.zoo.path("scenes-llava"), dtype="float32")
    runs = {
        "precision": precision(model, processor, 40 if options.quick else 200),
        "follows": follows(model, processor, 15 if options.quick else 100),
    }
    print(f"zoo: {time.perf_counter() - begin:.0f} s", flush=True)
    runs["speed"] = speed(options.rounds or (2 if options.quick else 7), memory=not options.quick)
    figures = {
        **{name: value for name, value in runs["speed"].items() if name.startswith("lens_")},
        "precision_at_5": runs["precision"]["precision_at_5"],
        "precision_null": runs["precision"]["precision_null"],
        "answer_follows_patch": runs["follows"]["answer follows the patch"]["value"],
    }
    finish(figures, REACH, runs, begin, options)


if __name__ == "__main__":
    main()
