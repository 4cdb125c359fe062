"""What each token of a batch is: groups, image spans and grids, indices, position ids."""

from sparing.tokens.profile import TokenProfile
from sparing.tokens.token_map import Group, ImageSpan, TokenMap

__all__ = ["Group", "ImageSpan", "TokenMap", "TokenProfile"]
