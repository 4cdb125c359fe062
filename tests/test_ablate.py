"""Post-softmax knock-outs against their equation, and what sets them apart from plans."""

import pytest
import torch

import sparing
from models import llava, llava_batch
from oracles import TOLERANCE, Llama, embeddings, kinds
from sparing.ablate import knock_out
from sparing.policies import ViCA
from sparing.tokens import Group

GROUPS = {"image": Group.IMAGE, "text": Group.TEXT, "system": Group.SYSTEM}


def oracle(asks, asked, layers, renormalise):
    """One row at a time: softmax over every causal key, then weights of the cut edges become zero (or: keys are taken out)."""

    def run(llama: Llama, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(llama.depth):
            cut = torch.tensor([[q in asks and k in asked for k in kind] for q in kind]) & (layer in layers)
            if renormalise:
                weights = llama.probabilities(layer, x, everyone, everyone, may=lambda r, c, cut=cut: not cut[r, c])
            else:
                weights = llama.probabilities(layer, x, everyone, everyone) * ~cut
            v = llama.project(layer, llama.norm(x, f"layers.{layer}.input_layernorm"), "v", llama.groups)
            mixed = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(llama.heads // llama.groups, 1))
            x = x + mixed.flatten(1) @ llama.weights[f"layers.{layer}.self_attn.o_proj.weight"].T
            x = x + llama.mlp(layer, x)
        return llama.logits(x)

    return run


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("asks", "asked"), [(("image",), ("image",)), (("text",), ("image",)), (("text",), ("system", "text"))]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_knock_out(asks, asked, renormalise, attention):
    """Several pictures, text alone, both paddings, without a cache."""
    model, layers = llava(attention), [0, 2]
    ablation = knock_out([GROUPS[g] for g in asks], [GROUPS[g] for g in asked], layers=layers, renormalise=renormalise)
    run_oracle = oracle(asks, asked, layers, renormalise)
    plain = Llama(model)
    for side in ("left", "right"):
        batch = llava_batch(side)
        embeds, _ = embeddings(model, batch)
        with sparing.apply(model, ablation, execute="dense") as run:
            position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = model(**batch, position_ids=position_ids, use_cache=False).logits
        assert run.ledger.cost().ablation
        for r, keep in enumerate(batch["attention_mask"].bool()):
            n = int(keep.sum())
            want = run_oracle(plain, embeds[r][keep], kinds(batch["input_ids"][r][keep].tolist())[:n], n)
            assert ((logits[r][keep] - want).abs().max() / want.abs().max()).item() <= TOLERANCE


@torch.no_grad()
def test_cached_knock_out_goes_on():
    """In cached decoding the cut edges stay cut: step by step equals the whole at once."""
    model, batch = llava(), llava_batch("none")
    ablation = knock_out(Group.TEXT, Group.IMAGE)
    extra = torch.tensor([[5, 6], [7, 8]])
    mask = torch.ones(2, batch["input_ids"].shape[1] + 2, dtype=torch.long)
    with sparing.apply(model, ablation, execute="dense"):
        whole = model(torch.cat([batch["input_ids"], extra], 1), pixel_values=batch["pixel_values"]).logits
        out = model(**batch, use_cache=True)
        steps = []
        for i in range(2):
            m = mask[:, : batch["input_ids"].shape[1] + i + 1]
            out = model(extra[:, i : i + 1], attention_mask=m, past_key_values=out.past_key_values)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, -2:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_zeroing_after_the_softmax_is_not_hiding_before_it():
    """The two differ, and a plan is the latter."""
    model, batch = llava(), llava_batch("left")
    found = []
    for renormalise in (False, True):
        with sparing.apply(model, knock_out(Group.TEXT, Group.IMAGE, renormalise=renormalise), execute="dense"):
            found.append(model(**batch).logits[batch["attention_mask"].bool()])
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_ablations_are_dense_only():
    """Never a speed-up."""
    with pytest.raises(ValueError, match='run it with execute="dense"'):
        sparing.apply(llava(), ViCA([0]) & knock_out(Group.IMAGE, Group.IMAGE))
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        sparing.apply(llava(), knock_out(Group.IMAGE, Group.IMAGE, layers=[9]), execute="dense")
