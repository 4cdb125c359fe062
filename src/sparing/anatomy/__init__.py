"""Where things are in each model family. The only room that names Hugging Face model classes."""

from sparing.anatomy.asking import ask, processed, question_prompt, user_turn
from sparing.anatomy.base import Anatomy
from sparing.anatomy.llama import LlamaAnatomy
from sparing.anatomy.llava import LlavaAnatomy
from sparing.anatomy.loading import load, load_as
from sparing.anatomy.opening import OpenedPicture, open_picture
from sparing.anatomy.registry import anatomy_of, fingerprint, known_families, read_inputs
from sparing.tokens.profile import fingerprint_with
from sparing.tokens.token_map import read_inputs_with

read_inputs_with(read_inputs)
fingerprint_with(fingerprint)

__all__ = [
    "Anatomy",
    "LlamaAnatomy",
    "LlavaAnatomy",
    "OpenedPicture",
    "anatomy_of",
    "ask",
    "fingerprint",
    "known_families",
    "load",
    "load_as",
    "open_picture",
    "processed",
    "question_prompt",
    "user_turn",
]
