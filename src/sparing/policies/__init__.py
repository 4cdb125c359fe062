"""Who decides: one paper, one file."""

from sparing.policies.drop_tokens import DropTokens
from sparing.policies.enter_late import EnterLate
from sparing.policies.skip_modules import SkipModules
from sparing.policies.vica import ViCA

__all__ = ["DropTokens", "EnterLate", "SkipModules", "ViCA"]
