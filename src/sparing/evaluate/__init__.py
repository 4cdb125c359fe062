"""What a model is worth on a text, and how fast it is: losses, seconds, and the profile made of them."""

from sparing.evaluate.findings import Point, Profile, Settings
from sparing.evaluate.kinds import KINDS, TokenKinds
from sparing.evaluate.loss import TextLoss, text_loss
from sparing.evaluate.profile import Profiler, profile
from sparing.evaluate.removal import Removal
from sparing.evaluate.speed import Timing, time_arms
from sparing.evaluate.windows import Windows, cut, read_text, tokenize

__all__ = [
    "KINDS",
    "Point",
    "Profile",
    "Profiler",
    "Removal",
    "Settings",
    "TextLoss",
    "Timing",
    "TokenKinds",
    "Windows",
    "cut",
    "profile",
    "read_text",
    "text_loss",
    "time_arms",
    "tokenize",
]
