"""What each token of a batch is: groups, image spans and grids, indices, position ids."""

from sparing.tokens.token_map import Group, ImageSpan, TokenMap

__all__ = ["Group", "ImageSpan", "TokenMap"]
