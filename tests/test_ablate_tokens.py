"""Ablations that rewrite tokens, and knock-outs by class, each against its equation in plain PyTorch."""

import pytest
import torch
from torch.nn.functional import normalize

import sparing
import vision_models
from class_cases import members, profile
from models import IMAGE, llava, llava_batch
from oracles import TOLERANCE, Llama, embeddings, kinds, which
from sparing.ablate import knock_out, replace, scale_norms, swap_tokens
from sparing.policies import DropTokens, OfClass, SkipModules
from sparing.tokens import Group, TokenMap


def dead(**more):
    return OfClass(profile(), ["dead"], **more)


@torch.no_grad()
def logits_of(policy, batch, **apply):
    """Of one pass, with positions counted from each row's own beginning."""
    at = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with sparing.apply(llava(), policy, execute="dense", **apply) as run:
        found = llava()(**batch, position_ids=at, use_cache=False).logits
    assert run.ledger.cost().ablation
    return found


@torch.no_grad()
def follows(policy, change, *, layer=0, sides=("left", "right")):
    """`change(x, kind)` on one row's states at a layer's input, then the stock layers, is what the ablation computes."""
    plain, most = Llama(llava()), 0.0
    for side in sides:
        batch = llava_batch(side)
        embeds, _ = embeddings(llava(), batch)
        logits = logits_of(policy, batch)
        for r, keep in enumerate(batch["attention_mask"].bool()):
            x, n = embeds[r][keep].clone(), int(keep.sum())
            kind, everyone = kinds(batch["input_ids"][r][keep].tolist())[:n], torch.arange(n)
            start = x.clone()
            for i in range(plain.depth):
                if i == layer:
                    x = change(x.clone(), kind, r, start)
                x = x + plain.attention(i, x, everyone, everyone)
                x = x + plain.mlp(i, x)
            want = plain.logits(x)
            assert ((logits[r][keep] - want).abs().max() / want.abs().max()).item() <= TOLERANCE, (policy, side, r)
        stock = llava()(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
        mask = batch["attention_mask"].bool()
        most = max(most, ((stock - logits)[mask].abs().max() / stock[mask].abs().max()).item())
    assert most > 1e-3, f"{policy!r} changed nothing"


def spans(kind):
    """The pictures of a row, nine tokens each, as lists of indices."""
    image = which(kind, "image").tolist()
    return [image[i : i + 9] for i in range(0, len(image), 9)]


# Scaling and replacing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("factor", [0.01, 3.0, 0.0])
def test_scale_norms(factor, layer):
    def change(x, kind, row, start):
        x[which(kind, "image")] *= factor
        return x

    follows(scale_norms(Group.IMAGE, factor, layer=layer), change, layer=layer)


@pytest.mark.parametrize("layer", [0, 2])
def test_scale_a_class(layer):
    """Told by the prompt's embeddings, wherever it is scaled."""

    def change(x, kind, row, start):
        x[members(start, kind, "dead")] *= 4
        return x

    follows(scale_norms(dead(), 4.0, layer=layer), change, layer=layer)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("by", ["mean", "zero"])
def test_replace(by, layer):
    """The mean is that of the token's own picture; in the text, of the row's text."""

    def change(x, kind, row, start):
        before = x.clone()
        parts = [*spans(kind), which(kind, "text", "system").tolist()]
        for i in [*members(start, kind, "dead", "vit_sink"), len(kind) - 1]:
            part = next(p for p in parts if i in p)
            x[i] = before[part].mean(0) if by == "mean" else 0
        return x

    def where(tokens):
        last = torch.zeros_like(tokens.valid)
        place = tokens.valid.long().cumsum(1)
        return last | (tokens.valid & (place == place.amax(1, keepdim=True)))

    both = replace(OfClass(profile(), ["dead", "sink"]), by, layer=layer) & replace(where, by, layer=layer)
    if by == "zero":
        follows(both, change, layer=layer)
        return

    def in_turn(x, kind, row, start):
        mine, last = members(start, kind, "dead", "vit_sink"), len(kind) - 1
        for those in (mine, [last]):
            before = x.clone()
            for i in those:
                part = next(p for p in [*spans(kind), which(kind, "text", "system").tolist()] if i in p)
                x[i] = before[part].mean(0)
        return x

    follows(both, in_turn, layer=layer)


@pytest.mark.parametrize("layer", [0, 2])
def test_noise_keeps_the_norm(layer):
    """One direction for each place of a row, counted without padding, of the length that was there."""
    drawn = torch.randn(40, 42, generator=torch.Generator().manual_seed(11))

    def change(x, kind, row, start):
        for i in which(kind, "image").tolist():
            x[i] = normalize(drawn[i], dim=0) * x[i].norm()
        return x

    follows(replace(Group.IMAGE, "noise", seed=11, layer=layer), change, layer=layer)
    batch = llava_batch("left")
    one, other = (logits_of(replace(Group.IMAGE, "noise", seed=s), batch) for s in (0, 1))
    assert (one - other).abs().max() > 1e-2


# Exchanging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_swap_cells(layer):
    """Cells of the first picture of every row that has one."""

    def change(x, kind, row, start):
        for span in spans(kind)[:1]:
            x[[span[1], span[8]]] = x[[span[8], span[1]]]
            x[[span[3], span[4]]] = x[[span[4], span[3]]]
        return x

    follows(swap_tokens([((0, 1), (2, 2)), ((1, 0), (1, 1))], layer=layer), change, layer=layer)


def test_swap_in_one_row_and_picture():
    """The second picture of the first row; other rows their own pairs, or none."""

    def change(x, kind, row, start):
        if row == 0:
            span = spans(kind)[1]
            x[[span[0], span[5]]] = x[[span[5], span[0]]]
        return x

    follows(swap_tokens({0: [((0, 0), (1, 2))]}, picture=1), change)

    def other(x, kind, row, start):
        if row in (1, 2):
            span, (i, j) = spans(kind)[0], {1: (2, 6), 2: (0, 4)}[row]
            x[[span[i], span[j]]] = x[[span[j], span[i]]]
        return x

    follows(swap_tokens({1: [((0, 2), (2, 0))], 2: [((0, 0), (1, 1))]}), other)


def test_swap_original_indices():
    """Of the padded prompt, as spans have them; text too."""

    def change(x, kind, row, start):
        x[[1, 3]] = x[[3, 1]]
        return x

    batch = llava_batch("right")
    assert batch["input_ids"][0, 3] == IMAGE != batch["input_ids"][0, 1]
    follows(swap_tokens([(1, 3)]), change, sides=("right",))


@torch.no_grad()
def test_swapping_pixels_is_swapping_tokens():
    """Where a patch's feature hangs on its pixels alone, exchanging two patches of the picture is exchanging their tokens."""
    import copy

    model, batch = copy.deepcopy(llava()), llava_batch("none")
    vision = model.model.vision_tower
    for layer in vision.encoder.layers:
        layer.self_attn.out_proj.weight.zero_()
    vision.embeddings.position_embedding.weight.zero_()
    moved = batch["pixel_values"].clone()
    moved[:, :, 0:10, 10:20] = batch["pixel_values"][:, :, 20:30, 0:10]
    moved[:, :, 20:30, 0:10] = batch["pixel_values"][:, :, 0:10, 10:20]
    want = model(**{**batch, "pixel_values": moved}).logits
    with sparing.apply(model, swap_tokens([((0, 1), (2, 0))]), execute="dense"):
        found = model(**batch).logits
    assert ((found - want).abs().max() / want.abs().max()).item() <= TOLERANCE


@torch.no_grad()
def test_a_group_changes_places_at_random():
    """Within each picture, nobody stays, and the seed decides."""
    batch = llava_batch("left")
    seen = []

    def note(_, args, kwargs):
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    hook = llava().model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        for seed in (0, 0, 1):
            with sparing.apply(llava(), swap_tokens(Group.IMAGE, seed=seed), execute="dense"):
                llava()(**batch)
        llava()(**batch)
    finally:
        hook.remove()
    one, again, other, stock = seen
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    tokens = TokenMap.from_inputs(llava(), batch)
    assert torch.equal(one[~tokens.of(Group.IMAGE)], stock[~tokens.of(Group.IMAGE)])
    for row, spans_ in enumerate(tokens.images):
        for span in spans_:
            a, b = one[row, span.start : span.stop], stock[row, span.start : span.stop]
            assert torch.equal(a.sort(0).values, b.sort(0).values)
            assert not (a == b).all(1).any()


@pytest.mark.parametrize("family", vision_models.FAMILIES)
@torch.no_grad()
def test_in_every_vision_family(family):
    """Before the first layer and before the second, with and without a cache; and nothing is left behind."""
    build, batch_of = vision_models.FAMILIES[family]
    model, batch = build(), batch_of("left")
    mask = batch["attention_mask"].bool()
    stock = model(**batch).logits[mask]
    for layer in (0, 1):
        for policy in (
            scale_norms(Group.IMAGE, 0.1, layer=layer),
            replace(Group.IMAGE, layer=layer),
            swap_tokens(Group.IMAGE, layer=layer),
        ):
            with sparing.apply(model, policy, execute="dense"):
                found, uncached = (model(**batch, use_cache=use).logits[mask] for use in (True, False))
            assert ((found - uncached).abs().max() / found.abs().max()).item() <= 1e-5
            assert ((found - stock).abs().max() / stock.abs().max()).item() > 1e-4, repr(policy)
    assert torch.equal(model(**batch).logits[mask], stock)


@torch.no_grad()
def test_cached_decoding_goes_on():
    """Step by step equals the whole at once: what was rewritten stays, and decoded tokens are not."""
    model, batch = llava(), llava_batch("none")
    extra, length = torch.tensor([[5, 6], [7, 8]]), batch["input_ids"].shape[1]
    mask = torch.ones(2, length + 2, dtype=torch.long)
    for policy in (
        scale_norms(dead(), 3.0),
        scale_norms(Group.IMAGE, 0.5, layer=2),
        swap_tokens([((0, 0), (2, 1))], layer=1),
        knock_out(Group.TEXT, dead()),
        knock_out(dead(), Group.IMAGE, renormalise=True),
    ):
        with sparing.apply(model, policy, execute="dense"):
            whole = model(torch.cat([batch["input_ids"], extra], 1), pixel_values=batch["pixel_values"]).logits
            out = model(**batch, use_cache=True)
            for i in range(2):
                m = mask[:, : length + i + 1]
                out = model(extra[:, i : i + 1], attention_mask=m, past_key_values=out.past_key_values)
                torch.testing.assert_close(out.logits[:, 0], whole[:, length + i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_beams_follow():
    """Reordered rows keep what was chosen for them: beam search equals that on a model rewritten by hand."""
    batch = llava_batch("left")
    policy = knock_out(Group.TEXT, dead(), layers=[1, 2]) & scale_norms(dead(), 5.0, layer=2)
    with sparing.apply(llava(), policy, execute="dense"):
        together = llava().generate(**batch, num_beams=2, max_new_tokens=4, do_sample=False)
        rows = sparing.execute.batches.split_rows(llava(), batch)
        for i, row in enumerate(rows):
            row.pop("position_ids")
            alone = llava().generate(**row, num_beams=2, max_new_tokens=4, do_sample=False)
            assert torch.equal(together[i, -4:], alone[0, -4:])


# Knock-outs by class --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("way", ["vis->vis", "text->vis", "class->class"])
@torch.no_grad()
def test_knock_out_a_class(way, renormalise):
    """Edges to (and from) a class: weights zeroed after the softmax, or keys taken out before it."""
    asks = {"vis->vis": Group.IMAGE, "text->vis": [Group.TEXT, Group.SYSTEM], "class->class": dead()}[way]
    layers = [0, 3]
    policy = knock_out(asks, OfClass(profile(), ["dead", "sink"]), layers=layers, renormalise=renormalise)
    plain = Llama(llava())
    for side in ("left", "right"):
        batch = llava_batch(side)
        embeds, _ = embeddings(llava(), batch)
        logits = logits_of(policy, batch)
        for r, keep in enumerate(batch["attention_mask"].bool()):
            x, n = embeds[r][keep], int(keep.sum())
            kind, everyone = kinds(batch["input_ids"][r][keep].tolist())[:n], torch.arange(n)
            asked = members(x, kind, "dead", "vit_sink")
            asking = {"vis->vis": which(kind, "image").tolist(), "text->vis": which(kind, "text", "system").tolist()}
            asking = asking.get(way, members(x, kind, "dead"))
            for i in range(plain.depth):
                cut = torch.tensor([[q in asking and k in asked for k in range(n)] for q in range(n)]) & (i in layers)
                if renormalise:
                    weights = plain.probabilities(i, x, everyone, everyone, may=lambda q, k, cut=cut: not cut[q, k])
                else:
                    weights = plain.probabilities(i, x, everyone, everyone) * ~cut
                v = plain.project(i, plain.norm(x, f"layers.{i}.input_layernorm"), "v", plain.groups)
                mixed = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(plain.heads // plain.groups, 1))
                x = x + mixed.flatten(1) @ plain.weights[f"layers.{i}.self_attn.o_proj.weight"].T
                x = x + plain.mlp(i, x)
            want = plain.logits(x)
            assert ((logits[r][keep] - want).abs().max() / want.abs().max()).item() <= TOLERANCE


# Composition, refusals ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_they_compose_in_order():
    """A selection in front sees the prompt as it was; behind a rewriting it sees what that left."""
    batch = llava_batch("left")
    drop = DropTokens(where=dead())
    plain = (~drops(drop, batch)).sum()
    assert drops(drop & scale_norms(Group.IMAGE, 0.0), batch).sum() == drops(drop, batch).sum() > 0
    assert drops(replace(dead(), "noise", seed=1) & drop, batch).sum() < drops(drop, batch).sum()
    assert plain > 0
    logits_of(scale_norms(Group.IMAGE, 0.5) & SkipModules([1], where=dead()) & knock_out(Group.TEXT, dead()), batch)


def drops(policy, batch):
    """What is dropped, by the ledger."""
    with torch.no_grad(), sparing.apply(llava(), policy, execute="dense") as run:
        llava()(**batch)
    return ~run.ledger.read(0) & batch["attention_mask"].bool()


@pytest.mark.parametrize(
    "policy",
    [
        scale_norms(Group.IMAGE, 2.0),
        replace(Group.IMAGE),
        swap_tokens([((0, 0), (0, 1))]),
        knock_out(Group.TEXT, dead()),
    ],
    ids=repr,
)
def test_no_speed_up_and_never_saved(policy, tmp_path):
    with pytest.raises(ValueError, match='run it with execute="dense"'):
        sparing.apply(llava(), policy)
    with pytest.raises(ValueError, match="an ablation changes a result"):
        sparing.save(llava(), tmp_path / "saved", [policy])


def test_bad_calls():
    with pytest.raises(ValueError, match="a finite number"):
        scale_norms(Group.IMAGE, float("nan"))
    with pytest.raises(ValueError, match="0 or more"):
        scale_norms(Group.IMAGE, -1)
    with pytest.raises(ValueError, match="'mean', 'zero' or 'noise'"):
        replace(Group.IMAGE, "median")
    with pytest.raises(ValueError, match="expected groups"):
        replace("image")
    with pytest.raises(ValueError, match="expected pairs such as"):
        swap_tokens([(1, 2, 3)])
    with pytest.raises(ValueError, match="stands in two pairs"):
        swap_tokens([(1, 2), (2, 3)])
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        sparing.apply(llava(), scale_norms(Group.IMAGE, 2.0, layer=9), execute="dense")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: swap_tokens([((0, 0), (3, 0))]), "3 x 3 tokens, so there is no cell"),
        (lambda: swap_tokens([((0, 0), (0, 1))], picture=1), "row 1 has 1 pictures, so none numbered 1"),
        (lambda: swap_tokens({7: [(1, 2)]}), "no row 7 in a batch of 4"),
        (lambda: swap_tokens({3: [((0, 0), (0, 1))]}), "row 3 has 0 pictures"),
        (lambda: swap_tokens([(0, 99)]), "has no token 99"),
        (lambda: swap_tokens({3: [(0, 25)]}), "that is no padding"),
        (lambda: replace(torch.ones(2, 2, dtype=torch.bool)), "the mask has shape"),
    ],
)
@torch.no_grad()
def test_what_does_not_exist_in_the_prompt(make, message):
    with pytest.raises(ValueError, match=message), sparing.apply(llava(), make(), execute="dense"):
        llava()(**llava_batch("left"))
