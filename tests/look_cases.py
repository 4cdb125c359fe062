"""Looks that are made up: as large as a page must bear, and with words that must not run."""

import numpy as np
from PIL import Image

from sparing.evaluate.answering import Answer, Arm
from sparing.evaluate.looking import LensWords, Look, TokenClasses, WordMaps
from sparing.evaluate.pictures.grids import SeenPicture

HOSTILE = "</script><img src=x onerror=\"document.body.dataset.ran='yes'\">"
RUN = {"command": "sparing look", "started": "2026-01-01", "hardware": {"cpu": "none", "threads": 1, "gpus": []}}


def photograph(width, height, seed=0):
    """Something smooth with something on it."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rng = np.random.default_rng(seed)
    waves = [np.sin(6 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y)]
    pixels = np.stack(waves, -1) * 80 + 140 + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 2 : width * 2 // 3] = (220, 60, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def look(side=24, depth=32, k=10, vocabulary=32000, words=100, hostile=False, seed=0):
    """A look at a picture of `side` x `side` tokens and one of 2 x 3 with tokens off its grid."""
    rng = np.random.default_rng(seed)
    n, levels = side * side + 6 + 3, depth + 1
    pieces = ["stone", "sky", " red", "grass", "ing", "Ġ", " light", "▁water", "ness", " cat"]
    names = {i: f"{pieces[i % len(pieces)]}{i // len(pieces) or ''}" for i in range(vocabulary)}
    if hostile:
        names[0] = HOSTILE
    lenses = []
    for name, unit in (("embedding lens", "cosine"), ("logit lens", "log-probability")):
        ids = rng.integers(0, vocabulary, (levels, n, k))
        if hostile:
            ids[:, :, 0] = 0
        scores = -np.sort(-rng.random((levels, n, k)), -1).astype(np.float32)
        lenses.append(LensWords(name, unit, ids, scores if unit == "cosine" else np.log(scores + 1e-3)))
    searched = (*((i,) for i in range(words - 1)), (3, 4))
    used = {int(i) for lens in lenses for i in np.unique(lens.ids)} | set(range(words))
    large, wide = photograph(14 * side, 14 * side), photograph(90, 60, 1)
    label = HOSTILE if hostile else "wide.png"
    pictures = (
        SeenPicture(
            "mountain.jpg",
            large,
            photograph(900, 600),
            np.arange(side * side).reshape(side, side),
            (),
            ("scaled down",),
        ),
        SeenPicture(
            label,
            wide,
            wide,
            np.arange(side * side, side * side + 6).reshape(2, 3),
            tuple((side * side + 6 + i, f"newline {i + 1}") for i in range(3)),
        ),
    )
    answer = HOSTILE if hostile else "A mountain."
    arms = (
        Arm("nothing", (), 0, Answer(answer, 0.83), (), 1.0, 1.0, (0.125, 0.12, 0.13)),
        Arm(
            "dead",
            ("dead",),
            170,
            Answer(answer, 0.84),
            (Answer(answer, 0.7), Answer("A lake.", 0.3)),
            0.7,
            0.71,
            (0.1, 0.09, 0.11),
        ),
        Arm("sinks", ("sink",), 0, None, why="no token of this class is here"),
    )
    return Look(
        model={
            "name": "made-up",
            "family": "llava",
            "layers": depth,
            "parameters": 7_000_000_000,
            "dtype": "float32",
            "device": "cpu",
        },
        question="What is in this picture?",
        answer=answer,
        prompt_tokens=n + 30,
        pictures=pictures,
        index=np.arange(n) + 5,
        levels=tuple(range(levels)),
        depth=depth,
        norms=np.exp(rng.normal(0, 0.3, (levels, n)) + np.arange(levels)[:, None] / 6).astype(np.float32),
        lenses=tuple(lenses),
        words={i: names[i] for i in used},
        maps=WordMaps(searched, rng.normal(0, 0.2, (levels, n, words)).astype(np.float32), False),
        classes=TokenClasses(
            ("alive", "dead", "vit_sink", "llm_sink", "newline"),
            np.r_[rng.choice(4, n - 3, p=[0.6, 0.28, 0.08, 0.04]), [4, 4, 4]],
            "Made up",
            ("a note",),
        ),
        arms=arms,
        seconds=1.5,
    )
