"""What policies look at: one layer of a pass, and the prompt before the first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparing.anatomy.encoder import EncoderLayer
from sparing.execute.encoder import EncoderNotes
from sparing.execute.visibility import capped, visible
from sparing.plan import LayerPlan, ModelShape, PromptView, View

# A pass makes its views, so its class cannot be imported here.
Pass = Any


class LayerView(View):
    """What a policy may look at in one layer (see `View`)."""

    def __init__(
        self,
        run: Pass,
        layer: int,
        residual: Callable[[], Tensor],
        layer_input: Tensor | None,
        *,
        attended: bool,
        plan: LayerPlan | None = None,
    ) -> None:
        self._run, self._input, self._attended, self._plan = run, layer_input, attended, plan
        self._residual = residual
        self.layer = layer
        self.tokens, self.new = run.state.tokens, run.new
        self.shape: ModelShape = run.state.ledger.shape
        self.state: dict[Any, Any] = {}
        self._normed: Tensor | None = None
        self._keys: tuple[Tensor, Tensor] | None = None

    @property
    def residual(self) -> Tensor:
        """The residual stream; the fast executor puts it together only when asked."""
        return self._residual()

    @property
    def prefill(self) -> bool:
        """Whether this pass reads the prompt."""
        return self._run.prefill

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, padding included."""
        return self._run.state.prompt_length

    @property
    def encoder_features(self) -> Any:
        """The vision encoder's output."""
        return self._run.encoder_features

    def normed(self) -> Tensor:
        """The residual after this branch's norm."""
        if self._normed is None:
            anatomy = self._run.anatomy
            norm = anatomy.mlp_norm(self.layer) if self._attended else anatomy.attention_norm(self.layer)
            self._normed = norm(self.residual)
            assert self._normed is not None
        return self._normed

    def alive(self) -> Tensor:
        """Which tokens are neither padding nor dropped."""
        return self._run.alive(self.layer)

    def shared(self, name: str, build: Callable[[], Tensor], owner: object) -> Tensor:
        """Built once a pass."""
        return self._run.memo((name, id(owner)), build, owner)

    def drop(self, mask: Tensor) -> None:
        """Drop tokens from this layer on, or from the next one on after attention."""
        self._run.drop(mask, self.layer + self._attended)

    def spend(self, flops: int) -> None:
        """Book the cost of deciding."""
        self._run.record.layers[self.layer].spent += int(flops)

    def scores(self, queries: Tensor, keys: Tensor | None = None) -> Tensor:
        """Attention probabilities of chosen queries (see `View.scores`)."""
        run, anatomy, layer = self._run, self._run.anatomy, self.layer
        b, t = run.new.batch, run.new.length
        shape = self.shape.layers[layer]
        normed, k = self._normed_and_keys()
        at = queries[..., None]
        q = anatomy.query(layer, normed.gather(1, at.expand(-1, -1, normed.shape[-1])))
        if (kind := anatomy.rotary_kind(layer)) is not None:
            cos, sin = (x.expand(b, -1, -1).gather(1, at.expand(-1, -1, x.shape[-1])) for x in run.rotary[kind])
            q = anatomy.rotate(q, cos, sin)
        index = torch.arange(run.start, run.start + t, device=k.device).expand(b, t)
        readable = run.alive(layer)
        cached = run.cached_keys(layer)
        if cached is not None:
            past, past_index, past_readable = cached
            k, index = torch.cat([past, k], dim=2), torch.cat([past_index, index], dim=1)
            if past_readable is not None:
                readable = torch.cat([readable[:, : run.start] & past_readable, readable[:, run.start :]], dim=1)
        if self._plan is not None and self._plan.read is not True:
            readable = torch.cat([readable[:, : run.start], readable[:, run.start :] & self._plan.read], dim=1)
        group = q.shape[2] // k.shape[1]
        q = q.transpose(1, 2).unflatten(1, (k.shape[1], group))
        logits = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * anatomy.scaling(layer)
        logits = capped(logits, anatomy.softcap(layer))
        # Not through the pass's memo, which would keep a mask for every chunk of queries.
        sees = run.sees(layer, self._plan.sees if self._plan else None)
        may, some = visible(queries + run.start, index, sees)
        assert some is not None
        open_slot = readable.gather(1, index.clamp(min=0)) & (index >= 0)
        may = may & some & open_slot[:, None]
        logits = logits.float().masked_fill(~may[:, None], float("-inf"))
        weights = torch.nan_to_num(logits.softmax(-1)).to(normed.dtype)
        n = b * queries.shape[1]
        self.spend(n * shape.query_flops // 2 + n * k.shape[2] * shape.pair_flops // 2)
        return _columns(weights, index, run.state.tokens.length, keys)

    def keys(self) -> Tensor:
        """This layer's keys (see `View.keys`)."""
        return self._normed_and_keys()[1]

    def final_norm(self, states: Tensor) -> Tensor:
        """The decoder's last norm."""
        return self._run.anatomy.decoder.norm(states)

    def _normed_and_keys(self) -> tuple[Tensor, Tensor]:
        """What attention reads, `[b t d]`, and its keys. Kept for further calls: those who rank by many queries ask in chunks."""
        if self._keys is None:
            run, anatomy, layer = self._run, self._run.anatomy, self.layer
            source = self._input if self._attended else self.residual
            if source is None:
                raise ValueError(
                    "scores() and keys() in plan_feed need the layer's input: set looks_back = True on the policy"
                )
            normed = anatomy.attention_norm(layer)(source)
            self._keys = normed, run.rotate(layer, anatomy.key(layer, normed)).transpose(1, 2)
            self.spend(run.new.batch * run.new.length * self.shape.layers[layer].kv_flops // 2)
        return self._keys


def _columns(weights: Tensor, index: Tensor, length: int, keys: Tensor | None) -> Tensor:
    """Put slots `[b h q s]` at their original indices and take the wanted columns."""
    b, h, q, _ = weights.shape
    at = torch.where(index < 0, length, index)[:, None, None].expand(b, h, q, -1)
    full = weights.new_zeros(b, h, q, length + 1).scatter_(3, at, weights)[..., :length]
    return full if keys is None else full.gather(3, keys[:, None, None].expand(b, h, q, -1))


class StartView(PromptView):
    """What a policy may look at and change before the first layer (see `PromptView`)."""

    def __init__(self, run: Pass, embeds: Tensor, position_ids: Tensor) -> None:
        self._run, self._embeds, self._filled = run, embeds, None
        self.position_ids = position_ids
        self.tokens, self.shape = run.state.tokens, run.state.ledger.shape
        self.state: dict[Any, Any] = {}

    @property
    def embeds(self) -> Tensor:  # type: ignore[override]
        """The prompt's embeddings."""
        if self._filled is None:
            self._filled = self._run.filled(self._embeds, 0)
        return self._filled

    @embeds.setter
    def embeds(self, embeds: Tensor) -> None:
        if self._run.given is not None:
            raise ValueError(
                "a policy rewrites what enters the first layer, and the keys of a VisionPrefix are of what it was: "
                "call the model on the pictures themselves, under sparing.apply"
            )
        self._embeds = self._filled = embeds

    def rewritten(self) -> Tensor:
        """The embeddings as the policies left them, given tokens not put in."""
        return self._embeds

    def drop(self, mask: Tensor) -> None:
        """Drop tokens before the first layer."""
        self._run.drop(mask, 0)

    def spend(self, flops: int) -> None:
        """Book the cost of deciding."""
        self._run.record.layers[0].spent += int(flops)

    @property
    def vocabulary(self) -> Tensor:
        """The input embeddings."""
        return self._run.anatomy.decoder.embed_tokens.weight

    @property
    def encoder_features(self) -> Any:
        """The vision encoder's output."""
        return self._run.encoder_features

    def encoder_attention(self, layer: EncoderLayer = None) -> Tensor:
        """Attention received in the vision encoder."""
        return self._asked(lambda notes: notes.attention(layer, self.tokens))

    def encoder_keys(self, layer: EncoderLayer = None) -> Tensor:
        """Keys in the vision encoder."""
        return self._asked(lambda notes: notes.keys(layer, self.tokens))

    def encoder_states(self) -> Tensor:
        """What the projector read."""
        return self._asked(lambda notes: notes.states(self.tokens))

    def project(self, states: Tensor) -> Tensor:
        """The projector."""
        return self._asked(lambda notes: notes.project(states))

    def _asked(self, what: Callable[[EncoderNotes], Tensor]) -> Tensor:
        """What the notes tell, its cost booked."""
        notes: EncoderNotes = self._run.encoder
        notes.flops = 0
        found = what(notes)
        self.spend(notes.flops)
        return found
