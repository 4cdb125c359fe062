"""A policy whose plans are random but reproducible: the same for both executors, for every layer and pass."""

import torch

from sparing.plan import LayerPlan, Policy, View


class RandomPlans(Policy):
    """Random masks, weights and `sees`, a function of (seed, layer, first index) alone.

    Args:
        seed: of everything.
        share: how likely a token runs or is read.
        weights: also put real weights on the branches.
        frees: while decoding, also free cached tokens.
        sees: also hide single query-key pairs.
        whole: how likely a layer's mask is all or nothing instead.
        flip: `(layer, field, row, token)`, one entry to flip at prefill (for mutation tests).
        promise: also promise a bound on the rows (`LayerPlan.capacity`).
    """

    def __init__(self, seed, share=0.6, weights=True, frees=True, sees=True, whole=0.2, flip=None, promise=False):
        self.seed, self.share, self.weights, self.frees, self.sees = seed, share, weights, frees, sees
        self.whole, self.flip, self.promise = whole, flip, promise

    def plan_attend(self, view: View) -> LayerPlan:
        """All that is decided before attention."""
        b, t = view.new.group.shape
        past = view.tokens.length - t
        generator = torch.Generator().manual_seed(hash((self.seed, view.layer, past)) % 2**31)

        def chance(*shape):
            return torch.rand(*shape, generator=generator)

        def mask(name):
            kind = chance(1).item()
            out = chance(b, t) < self.share
            if kind < self.whole / 2:
                out = torch.zeros_like(out)
            elif kind < self.whole:
                out = torch.ones_like(out)
            if self.flip and self.flip[:2] == (view.layer, name) and past == 0:
                out[self.flip[2], self.flip[3]] ^= True
            return out

        attend, read = mask("attend"), mask("read")
        if past and self.frees:
            gone = view.state.setdefault(view.layer, torch.ones(b, 0, dtype=torch.bool))
            before = torch.cat([gone, torch.ones(b, past - gone.shape[1], dtype=torch.bool)], dim=1)
            before &= view.state.setdefault(("read", view.layer), torch.ones(b, past, dtype=torch.bool))[:, :past]
            before &= chance(b, past) < 0.8
            view.state[view.layer] = torch.cat([before, read], dim=1)
            view.state["read", view.layer] = view.state[view.layer]
            read = view.state[view.layer]
        else:
            old = view.state.get(("read", view.layer), torch.ones(b, 0, dtype=torch.bool))
            view.state["read", view.layer] = torch.cat([old, read], dim=1)
        weight = chance(b, t) * attend if self.weights else None
        salt = self.seed + 31 * view.layer
        sees = (lambda q, k: (q * 7 + k * 13 + salt) % 5 != 0) if self.sees and chance(1).item() < 0.5 else None
        block = chance(b, t) * 2 if self.weights and chance(1).item() < 0.3 else None
        return LayerPlan(
            attend=attend, read=read, attend_weight=weight, block_weight=block, sees=sees, capacity=self.bound(attend)
        )

    def plan_feed(self, view: View) -> LayerPlan:
        """The MLP, after attention."""
        b, t = view.new.group.shape
        past = view.tokens.length - t
        generator = torch.Generator().manual_seed(hash((self.seed, view.layer, past, 1)) % 2**31)
        feed = torch.rand(b, t, generator=generator) < self.share
        if self.flip and self.flip[:2] == (view.layer, "feed") and past == 0:
            feed[self.flip[2], self.flip[3]] ^= True
        weight = torch.rand(b, t, generator=generator) * feed if self.weights else None
        return LayerPlan(feed=feed, feed_weight=weight, capacity=self.bound(feed))

    def bound(self, mask):
        """The smallest true promise."""
        return int(mask.sum(1).max()) if self.promise else None

    def __repr__(self):
        """Without an address, so that test names are the same in every process."""
        return f"RandomPlans({self.seed})"
