"""What to compute: `LayerPlan` and its algebra, the `Policy` contract, the `Ledger` and its costs."""

from sparing.plan.cost import Cost, LayerShape, ModelShape
from sparing.plan.layer_plan import FULL, NOTHING, LayerPlan
from sparing.plan.ledger import Ledger, TokenState
from sparing.plan.policy import Composed, Policy
from sparing.plan.selection import Selection
from sparing.plan.views import PromptView, View

__all__ = [
    "FULL",
    "NOTHING",
    "Composed",
    "Cost",
    "LayerPlan",
    "LayerShape",
    "Ledger",
    "ModelShape",
    "Policy",
    "PromptView",
    "Selection",
    "TokenState",
    "View",
]
