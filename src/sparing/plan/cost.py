"""What a plan costs: floating-point operations by part, rows, and bytes of KV cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The sizes of one decoder layer.

    Attributes:
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        intermediate: width of the MLP.
        mlp_matrices: matrices of the MLP (3 with a gate, 2 without).
        window: a query sees keys less than this many tokens back; `None` if it sees all.
        experts: MLPs that a router inside the MLP chooses from; 0 if there is one MLP and no router.
        active_experts: how many of them a token runs; `intermediate` is the width of each.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    mlp_matrices: int = 3
    window: int | None = None
    experts: int = 0
    active_experts: int = 1

    @property
    def query_flops(self) -> int:
        """One row through `q_proj` and `o_proj` (a multiply-add is two operations)."""
        return 2 * 2 * self.hidden * self.heads * self.head_dim

    @property
    def kv_flops(self) -> int:
        """One row through `k_proj` and `v_proj`."""
        return 2 * 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def pair_flops(self) -> int:
        """One query on one key: the score and the weighted sum, all heads."""
        return 2 * 2 * self.heads * self.head_dim

    @property
    def mlp_flops(self) -> int:
        """One row through the MLP: with experts, those that it runs and the router that chooses them."""
        one = self.mlp_matrices * self.hidden * self.intermediate
        return 2 * (one * self.active_experts + self.hidden * self.experts)

    @property
    def kv_width(self) -> int:
        """Elements of one token's key and value."""
        return 2 * self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: what costs are counted from.

    Attributes:
        layers: one `LayerShape` a layer.
        vocabulary: rows of the output matrix.
        element_bytes: bytes of one cached element.
        encoder_flops: operations of the vision encoder and projector on one picture (one tile of it, where there are tiles); 0 for
            text models.
    """

    layers: tuple[LayerShape, ...]
    vocabulary: int
    element_bytes: int
    encoder_flops: int = 0

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.layers[0].hidden


PARTS = ("attention_projections", "attention_kv", "attention_scores", "mlp", "router", "lm_head", "encoder")


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase (prefill or decode).

    Attributes:
        flops: operations by part (`PARTS`). `attention_projections` is Q and O, `attention_kv` is K and V,
            `attention_scores` counts query-key pairs that may see each other.
        rows: token rows by part: `attend`, `feed`, `read` (new keys written), summed over layers.
    """

    flops: Mapping[str, int]
    rows: Mapping[str, int]

    @property
    def total(self) -> int:
        """All operations of this phase."""
        return sum(self.flops.values())


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run cost, prefill and decode apart.

    Attributes:
        prefill: the prompt's pass.
        decode: every pass after it.
        kv_bytes: bytes of keys and values that can still be read at the end of the run; padding, and what lies before a
            layer's window, not counted.
        ablation: whether results were changed on purpose; such a run is not a speed-up.
    """

    prefill: PhaseCost
    decode: PhaseCost
    kv_bytes: int
    ablation: bool = False

    @property
    def total(self) -> int:
        """All operations of both phases."""
        return self.prefill.total + self.decode.total

    @property
    def flops(self) -> dict[str, int]:
        """Operations by part, both phases together."""
        return {part: self.prefill.flops[part] + self.decode.flops[part] for part in PARTS}

    def as_dict(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        phases = {
            name: {"flops": dict(p.flops), "rows": dict(p.rows), "total_flops": p.total}
            for name, p in (("prefill", self.prefill), ("decode", self.decode))
        }
        return {**phases, "total_flops": self.total, "kv_bytes": self.kv_bytes, "ablation": self.ablation}
