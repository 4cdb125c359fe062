"""Change a result to learn from it. Dense only, marked in the ledger, never called a speed-up."""

from sparing.ablate.knock_out import knock_out
from sparing.ablate.replace import replace
from sparing.ablate.scale_norms import scale_norms
from sparing.ablate.swap_tokens import swap_tokens

__all__ = ["knock_out", "replace", "scale_norms", "swap_tokens"]
