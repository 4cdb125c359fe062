"""A profile made by hand for the tiny LLaVA, and the same classes told in plain PyTorch; a model into which classes are planted."""

import copy
import functools

import torch
from torch.nn.functional import normalize

import models
import processors
from oracles import embeddings
from sparing.anatomy import fingerprint
from sparing.tokens import Group, TokenMap, TokenProfile
from sparing.tokens.profile import Anchor

LEAST = {"dead": 0.75, "vit_sink": 0.7}
"""Chosen so that no token of the batch lies near them."""


@functools.cache
def directions():
    """Of two picture tokens of the batch."""
    model, batch = models.llava(), models.llava_batch("left")
    with torch.no_grad():
        embeds = embeddings(model, batch)[0]
    tokens = embeds[TokenMap.from_inputs(model, batch).of(Group.IMAGE)]
    return {"dead": normalize(tokens[0], dim=0), "vit_sink": normalize(tokens[5], dim=0)}


@functools.cache
def profile(rule="anchors"):
    """By anchors, or by words: the two nearest words of each direction."""
    anchors = tuple(Anchor((name,), tuple(x.tolist()), LEAST[name]) for name, x in directions().items())
    made = TokenProfile(fingerprint(models.llava()), anchors)
    if rule == "anchors":
        return made
    words = normalize(models.llava().get_input_embeddings().weight.detach(), dim=1)
    return made.by_words({name: (words @ x).topk(2).indices.tolist() for name, x in directions().items()}, top=3)


def members(x, kind, *names):
    """Indices of one row's picture tokens that lie near a direction of these classes; each is in the nearer one alone."""
    found = []
    for i, token in enumerate(x):
        if kind[i] != "image":
            continue
        cosines = {name: float(normalize(token, dim=0) @ v) for name, v in directions().items()}
        near = {name: c for name, c in cosines.items() if c >= LEAST[name]}
        if near and max(near, key=near.get) in names:
            found.append(i)
    return found


PLANTED = {"vit_sink": [0], "llm_sink": [4], "dead": [2, 6, 7], "alive": [1, 3, 5, 8]}
"""Class -> patches of a 3x3 picture."""


@functools.cache
def planted():
    """A LLaVA in which the classes exist, and its processor.

    What the projector gives at some patches is always the same but for a little noise. At one of them the encoder's feature is
    twenty times as large; towards one and the first token the second MLP adds the same large vector.
    """
    model, processor = processors.family("llava")
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(7)
    vector = {name: torch.randn(60, generator=draw) for name in ("vit_sink", "llm_sink", "dead")}
    massive = 100 * torch.randn(60, generator=draw)
    turned = {}

    def larger(_, __, out):
        grown = out.hidden_states[model.config.vision_feature_layer].clone()
        grown[:, 1 + PLANTED["vit_sink"][0]] *= 20
        states = list(out.hidden_states)
        states[model.config.vision_feature_layer] = grown
        out.hidden_states = tuple(states)
        return out

    def plant(_, __, out):
        out = out.clone()
        noise = torch.Generator().manual_seed(int(out.abs().sum() * 1e3) % 2**31)
        for name, constant in vector.items():
            for patch in PLANTED[name]:
                out[:, patch] = constant + 0.01 * torch.randn(out.shape[0], 60, generator=noise)
        return out

    def note(_, __, kwargs):
        embeds = kwargs["inputs_embeds"]
        near = normalize(embeds, dim=-1) @ normalize(vector["llm_sink"], dim=0) > 0.99
        first = kwargs["attention_mask"].cumsum(1) == 1 if kwargs.get("attention_mask") is not None else near & False
        first = first & (kwargs["attention_mask"] == 1)
        turned["mask"] = near | first

    def turn(_, __, out):
        return out + turned["mask"].unsqueeze(-1) * massive

    model.model.vision_tower.register_forward_hook(larger)
    model.model.multi_modal_projector.register_forward_hook(plant)
    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.language_model.layers[1].mlp.register_forward_hook(turn)
    return model, processor
