"""A Llama in plain PyTorch, from a state dict, one row at a time, and the comparison of executors with it.

It shares no code with sparing: rows that are skipped are not computed, keys that are hidden are taken out.
"""

import torch

import models
import sparing

TOLERANCE = 1e-5
STEPS = 3


class Llama:
    """The parts of a decoder for one sequence. x: `[n d]`; rows, keys: indices, attention is causal over them."""

    def __init__(self, model):
        text = model.config.get_text_config()
        self.weights = {k.split("language_model.")[-1].removeprefix("model."): v for k, v in model.state_dict().items()}
        self.head = (
            self.weights["lm_head.weight"] if "lm_head.weight" in self.weights else self.weights["embed_tokens.weight"]
        )
        self.depth, self.heads, self.groups = text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads
        self.size, self.eps, self.theta = text.head_dim, text.rms_norm_eps, text.rope_parameters["rope_theta"]

    def norm(self, x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[f"{name}.weight"]

    def project(self, layer, x, name, heads):
        return (x @ self.weights[f"layers.{layer}.self_attn.{name}_proj.weight"].T).view(len(x), heads, self.size)

    def turn(self, x, positions):
        """Rotary embedding: pairs (i, i + size/2) turn by position * theta^(-2i/size)."""
        half = self.size // 2
        angle = positions[:, None].float() / self.theta ** (torch.arange(half) * 2 / self.size)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def probabilities(self, layer, x, rows, keys, positions=None, may=None):
        """`[heads rows keys]`; may: function of (row, key) -> bool on top of causality."""
        positions = torch.arange(len(x)) if positions is None else positions
        normed = self.norm(x, f"layers.{layer}.input_layernorm")
        q = self.turn(self.project(layer, normed[rows], "q", self.heads), positions[rows])
        k = self.turn(self.project(layer, normed[keys], "k", self.groups), positions[keys])
        k = k.repeat_interleave(self.heads // self.groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.size**0.5
        open_ = keys[None] <= rows[:, None]
        if may is not None:
            open_ = open_ & torch.tensor([[may(int(r), int(c)) for c in keys] for r in rows])
        return scores.masked_fill(~open_, float("-inf")).softmax(-1).nan_to_num()

    def attention(self, layer, x, rows, keys, positions=None, may=None):
        """The attention branch of `rows`, `[rows d]`."""
        weights = self.probabilities(layer, x, rows, keys, positions, may)
        v = self.project(layer, self.norm(x, f"layers.{layer}.input_layernorm")[keys], "v", self.groups)
        mixed = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(self.heads // self.groups, 1))
        return mixed.flatten(1) @ self.weights[f"layers.{layer}.self_attn.o_proj.weight"].T

    def mlp(self, layer, x):
        """The MLP branch of each row of x."""
        w = {name: self.weights[f"layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
        x = self.norm(x, f"layers.{layer}.post_attention_layernorm")
        return (torch.nn.functional.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"].T

    def logits(self, x):
        return self.norm(x, "norm") @ self.head.T


def embeddings(model, batch):
    """What the decoder of the stock model receives, pictures merged in."""
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    seen = []

    def note(_, args, kwargs):
        seen.append(kwargs["inputs_embeds"] if "pixel_values" in batch else decoder.embed_tokens(kwargs["input_ids"]))

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model(**batch)
    finally:
        handle.remove()
    return seen[0], decoder.embed_tokens


def extra_tokens(rows):
    """The tokens to decode, `[rows STEPS]`."""
    return torch.randint(3, 90, (rows, STEPS), generator=torch.Generator().manual_seed(4))


def through_cache(model, batch, policy, execute, tokens=None):
    """Logits of a prompt and of the extra tokens after it, `[b n+STEPS vocabulary]`."""
    mask = batch["attention_mask"]
    position = mask.sum(1, keepdim=True)
    with sparing.apply(model, policy, execute=execute, tokens=tokens):
        out = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        logits = [out.logits]
        for step, ids in enumerate(extra_tokens(len(mask)).split(1, dim=1)):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(ids, attention_mask=mask, position_ids=position + step, past_key_values=out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def compare(model, batch_of, policy, oracle, *, regroup=None, tolerance=TOLERANCE):
    """Both executors, both paddings, prompt and decoded tokens, against `oracle(llama, x, kind, n)` of each row.

    x: `[n+STEPS d]`, the row's embeddings without padding; kind: one of "text", "image", "system" a token; n: its
    prompt's length.
    """
    llama = Llama(model)
    changed = 0.0
    for side in ("left", "right"):
        batch = batch_of(side)
        embeds, embed = embeddings(model, batch)
        tokens = None if regroup is None else regroup(sparing.TokenMap.from_inputs(model, batch))
        found = {e: through_cache(model, batch, policy, e, tokens) for e in ("dense", "gathered")}
        extra = embed(extra_tokens(len(embeds)))
        for r, keep in enumerate(batch["attention_mask"].bool()):
            x = torch.cat([embeds[r][keep], extra[r]])
            want = oracle(llama, x.clone(), kinds(batch["input_ids"][r][keep].tolist()), int(keep.sum()))
            valid = torch.cat([keep, torch.ones(STEPS, dtype=torch.bool)])
            for execute, logits in found.items():
                error = ((logits[r][valid] - want).abs().max() / want.abs().max()).item()
                assert error <= tolerance, f"{policy!r}, {execute}, {side}, row {r}: {error:.1e}"
            plain = oracle_of_stock(llama, x)
            changed = max(changed, ((want - plain).abs().max() / plain.abs().max()).item())
    assert changed > 1e-3, f"{policy!r} changed nothing: the comparison says nothing"


def kinds(ids):
    """What each token is: "image", "system" (text before the row's first picture) or "text" (decoded ones too)."""
    first = ids.index(models.IMAGE) if models.IMAGE in ids else 0
    found = ["image" if token == models.IMAGE else "system" if i < first else "text" for i, token in enumerate(ids)]
    return found + ["text"] * STEPS


def which(kind, *names):
    """Indices of the tokens of these kinds."""
    return torch.tensor([i for i, k in enumerate(kind) if k in names], dtype=torch.long)


def oracle_of_stock(llama, x):
    """Nothing left out."""
    everyone = torch.arange(len(x))
    for layer in range(llama.depth):
        x = x + llama.attention(layer, x, everyone, everyone)
        x = x + llama.mlp(layer, x)
    return llama.logits(x)
