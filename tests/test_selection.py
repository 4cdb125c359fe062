"""Policies with selections: the equation, the contract, controls that match, checkpoints and studies that hold them."""

import dataclasses
import json

import pytest
import torch
from torch.nn.functional import normalize

import sparing
from checkpoint_cases import edit, refuses
from class_cases import LEAST, directions, members, profile
from models import llama, llava, llava_batch, text_batch
from oracles import compare, embeddings, kinds, which
from sparing.checkpoint.registry import describe, known_policies, known_selections, rebuild
from sparing.execute import check_policy
from sparing.execute.batches import pad_rows, split_rows
from sparing.plan import Selection
from sparing.policies import DropTokens, EnterLate, FastV, OfClass, SkipModules, ViCA
from sparing.study.methods.policy import UsePolicy
from sparing.tokens import Group, ImageSpan, TokenMap, TokenProfile

CLASSES = ("dead", "vit_sink")


def dead(**more):
    return OfClass(profile(), ["dead"], **more)


# The equation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("classes", [["dead"], ["dead", "sink"]])
def test_drop_a_class(positions, classes):
    """Tokens whose embedding is near enough to an anchor were never there."""
    wanted = [name for name in CLASSES if name in classes or (name == "vit_sink" and "sink" in classes)]

    def oracle(m, x, kind, n):
        gone = members(x, kind, *wanted)
        kept = torch.tensor([i for i in range(len(x)) if i not in gone])
        rest, everyone = x[kept], torch.arange(len(kept))
        at = kept if positions == "keep" else everyone
        for layer in range(m.depth):
            rest = rest + m.attention(layer, rest, everyone, everyone, at)
            rest = rest + m.mlp(layer, rest)
        return m.logits(x.index_copy(0, kept, rest))

    compare(llava(), llava_batch, DropTokens(where=OfClass(profile(), classes), positions=positions), oracle)


def test_keep_only_a_class():
    def oracle(m, x, kind, n):
        mine = members(x, kind, "dead")
        rows = torch.tensor([i for i in range(len(x)) if kind[i] != "image" or i in mine])
        for layer in range(m.depth):
            x = x.index_add(0, rows, m.attention(layer, x, rows, rows))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(llava(), llava_batch, DropTokens(where=dead(inverse=True)), oracle)


def test_skip_for_a_class():
    """Their branches are left out; they are read all the same."""

    def oracle(m, x, kind, n):
        mine, everyone = members(x, kind, *CLASSES), torch.arange(len(x))
        others = torch.tensor([i for i in range(len(x)) if i not in mine])
        for layer in range(m.depth):
            rows = others if layer in (0, 2) else everyone
            x = x.index_add(0, rows, m.attention(layer, x, rows, everyone))
            rows = others if layer == 2 else everyone
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(llava(), llava_batch, SkipModules([0, 2], [2], where=OfClass(profile(), ["sink", "dead"])), oracle)


@pytest.mark.parametrize(("entry", "exit_"), [(2, None), (1, 3), (0, 2)])
def test_a_class_enters_late_and_leaves(entry, exit_):
    def oracle(m, x, kind, n):
        mine = members(x, kind, "dead")
        others = torch.tensor([i for i in range(len(x)) if i not in mine])
        for layer in range(m.depth):
            inside = layer >= entry and (exit_ is None or layer < exit_)
            rows = torch.arange(len(x)) if inside else others
            x = x.index_add(0, rows, m.attention(layer, x, rows, rows))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(llava(), llava_batch, EnterLate(entry, exit_, where=dead()), oracle)


def test_by_words():
    """The release's rule: any of the three nearest words is one of the class's."""
    words = normalize(llava().get_input_embeddings().weight.detach(), dim=1)
    ids = set(profile("words").words["dead"])

    def oracle(m, x, kind, n):
        gone = [i for i in which(kind, "image").tolist() if ids & set((words @ x[i]).topk(3).indices.tolist())]
        rows = torch.tensor([i for i in range(len(x)) if i not in gone])
        for layer in range(m.depth):
            x = x.index_add(0, rows, m.attention(layer, x, rows, rows))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    policy = DropTokens(where=OfClass(profile("words"), ["dead"], overlapping=True))
    compare(llava(), llava_batch, policy, oracle)


@torch.no_grad()
def test_a_class_more_or_less_is_seen():
    """Mutation: one anchor's cosine set a little higher leaves other tokens, and other logits."""
    batch = llava_batch("left")
    mask = batch["attention_mask"].bool()
    loose = dataclasses.replace(
        profile(), anchors=tuple(dataclasses.replace(a, cosine=a.cosine - 0.1) for a in profile().anchors)
    )
    found = []
    for made in (profile(), loose):
        with sparing.apply(llava(), DropTokens(where=OfClass(made, ["dead", "sink"]))):
            found.append(llava()(**batch).logits[mask])
    assert ((found[0] - found[1]).abs().max() / found[0].abs().max()).item() > 1e-3


# The contract ---------------------------------------------------------------------------------------------------------

CHOICES = {
    "class": {"classes": ["dead"]},
    "random": {"classes": ["dead", "vit_sink"], "control": "random", "seed": 3},
    "background": {"classes": ["dead", "sink"], "control": "background"},
    "random-inverse": {"classes": ["dead"], "control": "random", "inverse": True},
}
USES = {
    "drop": lambda s: DropTokens(where=s),
    "drop-reindex": lambda s: DropTokens(where=s, positions="reindex"),
    "skip": lambda s: SkipModules([1, 2], [0, 2], where=s),
    "late": lambda s: EnterLate(1, 3, where=s),
    "with-fastv": lambda s: DropTokens(where=s) & FastV(2, 0.5),
    "with-vica": lambda s: SkipModules([], [0], where=s) & ViCA([0, 2]),
}


@pytest.mark.parametrize(
    ("use", "choice"), [*((use, "class") for use in USES), *(("drop", choice) for choice in list(CHOICES)[1:])]
)
def test_they_keep_the_contract(use, choice):
    """Padding, other rows, both executors, cached decoding, beams, gradients, cost equal to rows."""
    check_policy(lambda: USES[use](OfClass(profile(), **CHOICES[choice])), llava(), llava_batch("left"))


@torch.no_grad()
def test_what_deciding_costs_is_booked():
    """Two operations for each token, anchor and element, and nothing else."""
    batch = llava_batch("left")
    shown = int(TokenMap.from_inputs(llava(), batch).of(Group.IMAGE).sum())
    with sparing.apply(llava(), DropTokens(where=dead())) as run:
        llava()(**batch)
    assert run.ledger.cost().flops["router"] == 2 * shown * 42 * 2
    with sparing.apply(llava(), DropTokens(where=OfClass(profile("words"), ["dead"]))) as run:
        llava()(**batch)
    assert run.ledger.cost().flops["router"] == 2 * shown * 42 * 97


@torch.no_grad()
def test_decoded_tokens_are_never_chosen():
    """Even an image token's own embedding, were it to come again."""
    batch = llava_batch("none")
    with sparing.apply(llava(), SkipModules([0], [0], where=dead(inverse=True))) as run:
        llava().generate(**batch, max_new_tokens=3, do_sample=False)
    assert run.ledger.attend(0)[:, batch["input_ids"].shape[1] :].all()


@torch.no_grad()
def test_text_alone_is_untouched():
    """To the last bit, and for a text-only row of a mixed batch."""
    batch = text_batch("left")
    text = {name: value % 90 for name, value in batch.items()}
    stock = llava()(**text).logits
    for policy in (DropTokens(where=dead()), SkipModules([0], [1], where=dead()), EnterLate(1, where=dead())):
        with sparing.apply(llava(), policy):
            assert torch.equal(llava()(**text).logits, stock)
    with sparing.apply(llava(), DropTokens(where=OfClass(profile(), ["alive", "dead", "sink"]))) as run:
        llava()(**llava_batch("left"))
    # The row of text loses nothing, the others all of their pictures.
    tokens = TokenMap.from_inputs(llava(), llava_batch("left"))
    assert torch.equal(run.ledger.read(0), tokens.valid & ~tokens.of(Group.IMAGE))


def test_a_selection_of_the_wrong_shape():
    class Wrong(Selection):
        def choose(self, view):
            return torch.ones(2, 2)

        def __repr__(self):
            return "Wrong()"

    refused = pytest.raises(ValueError, match=r"Wrong\(\) chose with torch.float32 of shape \(2, 2\)")
    with refused, torch.no_grad(), sparing.apply(llava(), DropTokens(where=Wrong())):
        llava()(**llava_batch("left"))


# Controls -------------------------------------------------------------------------------------------------------------


def chosen(where, batch):
    """The mask that a selection makes, through a policy that drops it."""
    with torch.no_grad(), sparing.apply(llava(), DropTokens(where=where), force=True) as run:
        llava()(**batch)
    return ~run.ledger.read(0) & batch["attention_mask"].bool()


def pictures(batch):
    """Row and indices of each picture."""
    found = TokenMap.from_inputs(llava(), batch).images
    return [(r, torch.arange(span.start, span.stop)) for r, row in enumerate(found) for span in row]


def test_the_uniform_control_draws_from_all():
    """As many, the class's own tokens among them."""
    batch = llava_batch("left")
    mine = chosen(dead(), batch)
    masks = [chosen(dead(control="uniform", seed=s), batch) for s in range(6)]
    for row, index in pictures(batch):
        assert all(mask[row, index].sum() == mine[row, index].sum() for mask in masks)
    assert any((mine & mask).any() for mask in masks)
    assert any((~mine & mask).any() for mask in masks)


@pytest.mark.parametrize("control", ["random", "background"])
def test_controls_match_picture_by_picture(control):
    """As many, none of the class itself, and the same whatever the padding and the other rows."""
    batch = llava_batch("left")
    mine, control_mask = chosen(dead(), batch), chosen(dead(control=control, seed=5), batch)
    assert mine.any()
    for row, index in pictures(batch):
        assert control_mask[row, index].sum() == mine[row, index].sum()
    assert not (mine & control_mask).any()
    rows = split_rows(llava(), batch)
    for side in ("left", "right"):
        turned = pad_rows(llava(), rows[::-1], side)
        there = chosen(dead(control=control, seed=5), turned)
        for i, row in enumerate(rows[::-1]):
            alone = chosen(dead(control=control, seed=5), row) if len(row) > 2 else row["input_ids"] < 0
            assert torch.equal(there[i][turned["attention_mask"][i].bool()], alone[0])


def test_seeds_draw_other_tokens():
    batch = llava_batch("left")
    masks = [chosen(dead(control="random", seed=s), batch) for s in (0, 0, 1, 2, 3)]
    assert torch.equal(masks[0], masks[1])
    assert len({tuple(m.flatten().tolist()) for m in masks}) > 2


def test_background_is_what_the_picture_has_most_of():
    """Five patches alike, three others and one of the class: the control takes of the five."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(9, 12, generator=draw)
    states[[1, 2, 5, 6, 8]] = states[1] + 0.05 * torch.randn(5, 12, generator=draw)
    member = torch.zeros(9, dtype=torch.bool)
    member[[0, 3]] = True
    view = FakeView(states, member)
    found = OfClass(view.profile, ["dead"], control="background").choose(view)
    assert found.sum() == 2
    assert set(found[0].nonzero().flatten().tolist()) <= {1, 2, 5, 6, 8}


def test_too_few_others_are_made_up_from_the_class():
    draw = torch.Generator().manual_seed(1)
    states, member = torch.randn(5, 12, generator=draw), torch.tensor([True, True, True, False, True])
    view = FakeView(states, member)
    for control in ("random", "background"):
        found = OfClass(view.profile, ["dead"], control=control).choose(view)
        assert found.sum() == 4
        assert found[0, 3]
    everything = FakeView(states, torch.ones(5, dtype=torch.bool))
    assert OfClass(everything.profile, ["dead"], control="background").choose(everything).all()


class FakeView:
    """A prompt of one picture, and a profile that tells its members: each has its own anchor."""

    def __init__(self, states, member):
        from sparing.tokens.profile import Anchor

        n = len(states)
        self.tokens = TokenMap.from_groups(torch.full((1, n), int(Group.IMAGE)), images=[[ImageSpan(0, n, (1, n))]])
        self.embeds, self.vocabulary, self.state = states[None], torch.randn(3, states.shape[1]), {}
        anchors = tuple(Anchor(("dead",), tuple(normalize(state, dim=0).tolist()), 0.9999) for state in states[member])
        self.profile = TokenProfile("x", anchors)

    def spend(self, flops):
        pass


# Checkpoints, studies, command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["drop", "drop-reindex", "skip", "late"])
def test_saved_and_loaded_they_generate_alike(use, tmp_path):
    """The profile is in the checkpoint itself."""
    policy = USES[use](dead(control="random", seed=2))
    batch = llava_batch("left")
    with torch.no_grad():
        with sparing.apply(llava(), policy):
            want = llava().generate(**batch, max_new_tokens=5, do_sample=False)
        sparing.save(llava(), tmp_path / "saved", [policy])
        model, _ = sparing.load(tmp_path / "saved")
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), want)
    assert repr(sparing.run_of(model).policy.parts()[0]) == repr(policy)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "decides by what it reads" in card


def test_broken_checkpoints(tmp_path):
    sparing.save(llava(), tmp_path / "saved", [DropTokens(where=dead())])
    manifest = tmp_path / "saved" / "sparing.json"

    def rename(change):
        def edited(value):
            where = value["policies"][0]["arguments"]
            where["where"] = change(where["where"]["OfClass"])

        return edited

    whole = manifest.read_text()
    edit(manifest, rename(lambda args: {"OfClas": args}))
    refuses(tmp_path / "saved", "no selection is called 'OfClas'", "did you mean OfClass?")
    manifest.write_text(whole)
    edit(manifest, rename(lambda args: {"OfClass": {**args, "klass": 1}}))
    refuses(tmp_path / "saved", "no argument of OfClass is called 'klass'")
    manifest.write_text(whole)
    edit(manifest, rename(lambda args: {"OfClass": {**args, "classes": ["dread"]}}))
    refuses(tmp_path / "saved", "did you mean dead")
    manifest.write_text(whole)
    edit(manifest, rename(lambda args: [1]))
    refuses(tmp_path / "saved", "DropTokens(where=...) is '[1]'", "give a selection")


def test_a_checkpoint_refuses_other_weights(tmp_path):
    """Its profile speaks of the weights that it was saved with."""
    from safetensors.torch import load_file, save_file

    sparing.save(llava(), tmp_path / "saved", [DropTokens(where=dead())])
    file = next((tmp_path / "saved").glob("sparing*.safetensors"), None) or next(
        path for path in (tmp_path / "saved").glob("*.safetensors") if path.name != "policies.safetensors"
    )
    weights = load_file(file)
    save_file({name: value * 1.02 for name, value in weights.items()}, file, {"format": "pt"})
    refuses(tmp_path / "saved", "is for the checkpoint", "token_classes")


def test_described_and_rebuilt():
    """What JSON holds makes the same selection again; one that nobody registered cannot be saved."""
    policy = EnterLate(1, where=dead(control="background", overlapping=True))
    entries = json.loads(json.dumps(describe([policy])))
    assert repr(rebuild(entries, {}, "here")[0]) == repr(policy)
    assert rebuild(entries, {}, "here")[0].where.profile == profile()

    class Own(Selection):
        def choose(self, view):
            return view.tokens.valid

    with pytest.raises(ValueError, match=r"Own cannot be saved.*sparing\.selections"):
        describe([DropTokens(where=Own())])
    assert "OfClass" in known_selections()
    assert "OfClass" not in known_policies()


def test_studies_name_them(tmp_path):
    """In a method's arguments; files beside the YAML, seeds of the study, and nearest names on a typo."""
    profile().save(tmp_path / "profile.json")
    given = {"profile": "profile.json", "classes": ["dead"]}
    plain = UsePolicy("DropTokens", {"where": {"OfClass": given}}).placed(tmp_path)
    assert plain.files() == (tmp_path / "profile.json",)
    plain.check()
    assert not plain.seeded
    random = UsePolicy("DropTokens", {"where": {"OfClass": {**given, "control": "random"}}}).placed(tmp_path)
    assert random.seeded
    assert (
        not UsePolicy("DropTokens", {"where": {"OfClass": {**given, "control": "random", "seed": 1}}})
        .placed(tmp_path)
        .seeded
    )

    subject = dataclasses.make_dataclass("Subject", ["model", "policies", "execute"], frozen=True)(
        llava(), (), "gathered"
    )
    seeds = [random.prepare(subject, seed=s).subject.policies[0].where.seed for s in (4, 5)]
    assert seeds == [4, 5]
    with pytest.raises(ValueError, match=r"no selection is called 'OfClasses'; did you mean OfClass\?"):
        UsePolicy("DropTokens", {"where": {"OfClasses": given}})
    with pytest.raises(ValueError, match=r"no argument of OfClass is called 'clases'; did you mean classes"):
        UsePolicy("DropTokens", {"where": {"OfClass": {"profile": "p", "clases": []}}})
    with pytest.raises(ValueError, match="expected a selection as"):
        UsePolicy("DropTokens", {"where": {"a": 1, "b": 2}})
    with pytest.raises(ValueError, match="no such token profile"):
        UsePolicy("DropTokens", {"where": {"OfClass": {**given, "profile": "no.json"}}}).placed(tmp_path).check()


def test_a_study_of_classes(tmp_path):
    """From the YAML on: pruned, matched and matched by background, with the study's seeds in the controls."""
    from sparing.study.spec import read_study

    profile().save(tmp_path / "profile.json")
    (tmp_path / "text.txt").write_text("a b c\n")
    (tmp_path / "study.yaml").write_text(
        """
study: classes
models: {tiny: {path: model}}
seeds: [0, 1, 2]
methods:
  dense: {use: dense}
  pruned:
    use: DropTokens
    with: {where: {OfClass: {profile: profile.json, classes: [dead]}}}
  matched:
    use: DropTokens
    with: {where: {OfClass: {profile: profile.json, classes: [dead], control: random}}}
tasks:
  ppl: {use: perplexity, with: {text: text.txt}}
"""
    )
    spec = read_study(tmp_path / "study.yaml")
    pruned, matched = (method.does for method in spec.methods[1:])
    assert not pruned.seeded
    assert matched.seeded
    assert pruned.files() == (tmp_path / "profile.json",)
    broken = (tmp_path / "study.yaml").read_text().replace("OfClass:", "OfClas:", 1)
    (tmp_path / "broken.yaml").write_text(broken)
    with pytest.raises(ValueError, match=r"line \d+: where: no selection is called 'OfClas'; did you mean OfClass"):
        read_study(tmp_path / "broken.yaml")


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_selections(tmp_path):
    with pytest.raises(ValueError, match=r"'deed'; did you mean dead"):
        OfClass(profile(), ["deed"])
    with pytest.raises(ValueError, match="chooses nothing"):
        OfClass(profile(), [])
    with pytest.raises(ValueError, match=r"no control is called 'rand'; did you mean random\?"):
        OfClass(profile(), ["dead"], control="rand")
    with pytest.raises(ValueError, match="has no llm_sink tokens"):
        OfClass(profile(), ["llm_sink"])
    with pytest.raises(ValueError, match="give groups= or where="):
        SkipModules([0], groups=[Group.IMAGE], where=dead())
    with pytest.raises(ValueError, match="exactly one of"):
        DropTokens(where=dead(), groups=[Group.IMAGE])
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        sparing.apply(llava(), SkipModules([9], where=dead()))
    with pytest.raises(ValueError, match="is for the checkpoint"):
        sparing.apply(llama(), DropTokens(where=dead()))
    with pytest.raises(ValueError, match="no such token profile"):
        OfClass(tmp_path / "none.json", ["dead"])
    assert OfClass(profile(), "dead").classes == ("dead",)


@torch.no_grad()
def test_embeddings_that_are_not_numbers():
    batch = llava_batch("left")
    batch["pixel_values"] = torch.full_like(batch["pixel_values"], float("nan"))
    with pytest.raises(ValueError, match="not finite"), sparing.apply(llava(), DropTokens(where=dead())):
        llava()(**batch)


def test_the_hand_made_profile_is_no_near_tie():
    """What the oracles rest on: no token lies within rounding of a threshold, and both classes occur."""
    batch = llava_batch("left")
    embeds, _ = embeddings(llava(), batch)
    tokens = normalize(embeds[TokenMap.from_inputs(llava(), batch).of(Group.IMAGE)], dim=1)
    for name, direction in directions().items():
        cosine = tokens @ direction
        assert (cosine - LEAST[name]).abs().min() > 1e-3
        assert 0 < int((cosine >= LEAST[name]).sum()) < 18
    assert kinds([96, 3])[0] == "image"
