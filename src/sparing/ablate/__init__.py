"""Change a result to learn from it. Dense only, marked in the ledger, never called a speed-up."""

from sparing.ablate.knock_out import knock_out

__all__ = ["knock_out"]
