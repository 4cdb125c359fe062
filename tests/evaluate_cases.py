"""What tests of evaluation share: a tokenizer of words, a model that can do some arithmetic, requests as lm-eval makes them."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import sparing
from policy_cases import CASES
from sparing import zoo
from sparing.evaluate.tasks.metering import Meter

with warnings.catch_warnings():
    # lm-eval's own imports warn about their dependencies.
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance

    from sparing.evaluate.tasks.language_model import PlannedLM

# What lm-eval and the packages below it warn about is theirs to mend.
LM_EVAL_MARKS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.usefixtures("own_datasets_cache"),
]
WORDS = [f"w{i}" for i in range(93)]
TEXT_CASES = [case for case in CASES if not case.pictures and case.regroup is None]


@functools.cache
def word_tokenizer():
    """One token a word, as many as the tiny models have."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


@functools.cache
def arithmetic_solver():
    """The shipped model, which can really do some arithmetic, in float32; and its tokenizer."""
    return sparing.load(zoo.path("arithmetic-llama"), dtype=torch.float32)


def asked(kind, arguments):
    """Requests as lm-eval makes them."""
    return [Instance(kind, {}, a, 0, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


def planned(subject, batch, **settings):
    """A run that was entered, and lm-eval's model in it."""
    run = subject.applied()
    run.__enter__()
    return run, PlannedLM(subject, Meter(run, subject.model), batch=batch, **settings)


def requests():
    """Contexts and continuations of many lengths, as token ids."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for n, m in ((3, 2), (17, 1), (9, 4), (17, 1), (12, 2), (5, 5), (8, 1), (14, 3)):
        ids = torch.randint(3, 90, (n + m,), generator=generator).tolist()
        rows.append(((f"{n}", f"{m}"), ids[:n], ids[n:]))
    # Two continuations of one context that differ in their only token share a pass.
    rows.append((("", ""), rows[1][1], [5]))
    return rows
