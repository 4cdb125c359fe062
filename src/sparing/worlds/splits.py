"""Which problems are trained on: decided by what a problem is, never by when it was drawn."""

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(key: str) -> Split:
    """Returns the split a problem belongs to: 90% train, 5% validation, 5% test, by a hash of its key."""
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    return "train" if share < 90 else "validation" if share < 95 else "test"
