"""Tokenizers for worlds whose words are known beforehand."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n " + string.digits + string.ascii_letters + string.punctuation
SPACED = string.digits + string.ascii_lowercase


def word_tokenizer(words: Sequence[str], markers: Sequence[str] = (), max_length: int = 512) -> PreTrainedTokenizerFast:
    """Builds a fast tokenizer that knows some whole words and spells everything else.

    A word, a digit or a small letter is one token together with the space before it; without a space, digits,
    letters and signs are one token each, so that any ASCII text comes back unchanged. An item of a list is so
    one token, the next item follows it, and copying needs no look across spaces. Nothing is learned: the same
    words give the same tokenizer.

    Args:
        words: words of two letters or more.
        markers: strings such as `Q:` that are one token wherever they stand.
        max_length: `model_max_length` of the tokenizer.
    """
    plain = [*SPECIAL, *CHARACTERS, *markers, *(f" {word}" for word in [*SPACED, *dict.fromkeys(words)])]
    # Unigram takes the split with the best sum of scores: one token for a word beats its letters.
    scored = [(token, -10.0 if token in CHARACTERS else -1.0) for token in plain]
    backend = Tokenizer(models.Unigram(scored, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    marker = "".join(f"{token}|" for token in markers)
    pattern = Regex(rf"{marker} ?[A-Za-z]{{2,}}| [a-z0-9]|[\s\S]")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _wrapped(backend, max_length)


def closed_tokenizer(
    words: Sequence[str], specials: Sequence[str] | Mapping[str, str] = (), max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Builds a fast tokenizer of whole words, for a world whose every word is known; others are `<unk>`.

    Text is split at spaces and before signs, and capitals are made small. Decoding puts one space between words.

    Args:
        words: the words and signs.
        specials: further special tokens, such as `<image>`, or names of them and the tokens; they need no spaces around them.
        max_length: `model_max_length` of the tokenizer.
    """
    named = isinstance(specials, Mapping)
    tokens = [*SPECIAL, *(specials.values() if named else specials), *dict.fromkeys(words)]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(backend, max_length, extra_special_tokens=dict(specials) if named else list(specials))


def _wrapped(backend: Tokenizer, max_length: int, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers' that puts `<bos>` first and pads on the left."""
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **more,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
