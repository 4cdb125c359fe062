"""Training under policies: what moves, that it goes on where it was killed, adapters, recipes, and what is refused."""

import builtins
import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import processors
import sparing
from sparing import zoo
from sparing.policies import ViCA
from sparing.train import (
    ConversationFile,
    DrawnConversations,
    Lora,
    Optimisation,
    Stage,
    read_recipe,
    train_stages,
    trained_parts,
)
from sparing.train.beginning import forget_projector, take_language
from sparing.train.checkpoints import last_checkpoint
from sparing.train.fitting import fit

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "vica-llava-1.5-7b.yaml"
INFINITE = float("inf")
SHORT = Optimisation(steps=4, batch=2, lr=1e-3)
BOTH = ("projector", "language")
POLICY = ViCA([0, 2], "freeze")


@pytest.fixture(scope="module")
def shipped():
    return sparing.load(zoo.path("scenes-llava"), dtype="float32")


@pytest.fixture
def subject(shipped):
    model, processor = shipped
    return copy.deepcopy(model), processor


def stage(parts=BOTH, how=SHORT, **more):
    return Stage("tune", parts, how, DrawnConversations(8, seed=2, turns=2), "drawn scenes", **more)


def moved(model, before):
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_two_stages_move_their_parts_alone_under_the_policy(subject, tmp_path):
    model, processor = subject
    start = weights(model)
    seen = []
    first = dataclasses.replace(stage(("projector",)), name="projector")
    found = train_stages(model, processor, [POLICY], [first], tmp_path / "a", on_step=lambda d, w: seen.append((d, w)))
    bridge = moved(model, start)
    assert bridge
    assert all("multi_modal_projector" in name for name in bridge)
    assert found[0].steps == 4
    assert found[0].tokens > 0
    assert seen[-1][0] == 1.0
    assert "projector: step 4 of 4" in seen[-1][1]
    middle = weights(model)
    train_stages(model, processor, [POLICY], [stage()], tmp_path / "b")
    both = moved(model, middle)
    assert any("multi_modal_projector" in name for name in both)
    assert any("language_model.layers.7" in name for name in both)
    assert not any("vision_tower" in name for name in both)
    assert sparing.run_of(model) is None, "the policies are taken off again"
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_fast_executor_trains_what_the_other_one_trains(shipped, tmp_path):
    model, processor = shipped
    trained = []
    for execute in ("gathered", "dense"):
        copied = copy.deepcopy(model)
        train_stages(copied, processor, [POLICY], [stage()], tmp_path / execute, execute=execute)
        trained.append(weights(copied))
    start = weights(model)
    for name, weight in trained[0].items():
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-3, atol=2e-5)
    assert max(float((weight - start[name]).abs().max()) for name, weight in trained[0].items()) > 1e-3


def test_a_killed_training_goes_on_with_the_same_batches(shipped, tmp_path):
    model, processor = shipped
    whole = copy.deepcopy(model)
    train_stages(whole, processor, [POLICY], [stage()], tmp_path / "whole", save_every=2)

    class Killed(DrawnConversations):
        left = 7  # the first row once more, and three batches: the one ahead is read before a step

        def __getitem__(self, index):
            Killed.left -= 1
            if Killed.left < 0:
                raise SystemError("killed")
            return super().__getitem__(index)

    cut = dataclasses.replace(stage(), conversations=Killed(8, seed=2, turns=2))
    with pytest.raises(SystemError, match="killed"):
        train_stages(copy.deepcopy(model), processor, [POLICY], [cut], tmp_path / "cut", save_every=2)
    log = [json.loads(line)["step"] for line in (tmp_path / "cut" / "tune" / "log.jsonl").read_text().splitlines()]
    assert max(log) < 4
    assert last_checkpoint(tmp_path / "cut" / "tune").name == "checkpoint-2"
    again = copy.deepcopy(model)
    train_stages(again, processor, [POLICY], [stage()], tmp_path / "cut", save_every=2)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    # Once more: nothing is left to do, and the weights are those of the end.
    third = copy.deepcopy(model)
    (done,) = train_stages(third, processor, [POLICY], [stage()], tmp_path / "cut", save_every=2)
    assert (done.steps, done.tokens) == (4, 0)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), third.parameters(), strict=True))
    kept = next((tmp_path / "cut" / "tune").glob("checkpoint-*/model.safetensors"))
    assert kept.stat().st_size < 4 * sum(p.numel() for p in model.parameters()), "frozen weights are not copied"


def test_another_model_or_other_settings_are_not_gone_on_with(subject, tmp_path):
    model, processor = subject
    train_stages(model, processor, [POLICY], [stage()], tmp_path)
    other, other_processor = processors.family("llava")
    with pytest.raises(ValueError, match=r"holds a training with another model .*choose another --out"):
        train_stages(copy.deepcopy(other), other_processor, [ViCA([0])], [stage()], tmp_path)
    fresh = sparing.load(zoo.path("scenes-llava"), dtype="float32")[0]
    with pytest.raises(ValueError, match="holds a training with other policies"):
        train_stages(fresh, processor, [ViCA([1])], [stage()], tmp_path)
    with pytest.raises(ValueError, match="holds a training with other stages"):
        train_stages(fresh, processor, [POLICY], [stage(("language",))], tmp_path)
    with pytest.raises(ValueError, match="holds a training with other stages"):
        more = dataclasses.replace(stage(), conversations=DrawnConversations(9, seed=2, turns=2))
        train_stages(fresh, processor, [POLICY], [more], tmp_path)
    with pytest.raises(ValueError, match="holds a training with another --dtype"):
        train_stages(fresh, processor, [POLICY], [stage()], tmp_path, autocast=True)


# PEFT asks by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_trained_and_merged(subject, tmp_path):
    model, processor = subject
    start = weights(model)
    names = set(start)
    train_stages(model, processor, [POLICY], [stage(lora=Lora(4, 8, 0.0))], tmp_path, autocast=True)
    assert set(weights(model)) == names, "no adapter is left"
    changed = moved(model, start)
    assert any(name.endswith("layers.3.mlp.down_proj.weight") for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("norm" in name or "embed_tokens" in name or "vision_tower" in name for name in changed)
    change = (
        model.model.language_model.layers[3].self_attn.q_proj.weight
        - start["model.language_model.layers.3.self_attn.q_proj.weight"]
    )
    assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 4
    sparing.save(model, tmp_path / "saved", [POLICY], processor=processor)


def test_without_peft_the_command_to_install_it_is_told(subject, monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    from sparing.cli.errors import explain

    with pytest.raises(ModuleNotFoundError) as raised:
        trained_parts(subject[0], BOTH, Lora(4))
    assert explain(raised.value) == ("error: peft is not installed: pip install 'sparing[train]'", 2)


@pytest.mark.parametrize(
    ("parts", "lora", "message"),
    [
        ((), None, "at least one of them; got none"),
        (("bridge",), None, "projector, language, encoder, at least one of them; got bridge"),
        (("projector",), Lora(4), "adapters are for the language model"),
    ],
)
def test_parts_are_checked(shipped, parts, lora, message):
    with pytest.raises(ValueError, match=message):
        trained_parts(shipped[0], parts, lora)


def test_a_merger_inside_the_encoder_goes_its_own_way():
    model = copy.deepcopy(processors.family("qwen3_vl")[0])
    trained_parts(model, ("projector",))
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("visual.merger" in name for name in wanted)
    assert any("deepstack_merger_list.1" in name for name in wanted)
    assert all("merger" in name for name in wanted)
    trained_parts(model, ("encoder",))
    assert not any(weight.requires_grad for weight in model.model.visual.merger.parameters())
    assert all(weight.requires_grad for weight in model.model.visual.blocks.parameters())


def test_a_loss_that_is_no_number_ends_the_training_with_a_line(subject, tmp_path):
    model, processor = subject
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d: lower --lr \(now 1e\+09\)"):
        train_stages(model, processor, [POLICY], [stage(how=Optimisation(steps=4, batch=2, lr=1e9))], tmp_path / "a")
    broken = sparing.load(zoo.path("scenes-llava"), dtype="float32")[0]
    with torch.no_grad():
        broken.model.language_model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"the weights contain NaN.*layers.2.mlp.up_proj.weight; the checkpoint is damaged"
    ):
        train_stages(broken, processor, [POLICY], [stage()], tmp_path / "b")


def test_batches_that_cannot_be_shared_and_strange_numbers_are_refused(subject, tmp_path):
    assert Optimisation(batch=256, at_once=32).shared(8) == (32, 1)
    assert Optimisation(batch=256, at_once=32).shared(2) == (32, 4)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 3 processes"):
        Optimisation(batch=8).shared(3)
    with pytest.raises(ValueError, match="4 items a process are no multiple of the 3 at once"):
        Optimisation(batch=8, at_once=3).shared(2)
    for wrong in (
        {"lr": 0.0},
        {"steps": 0},
        {"batch": 0},
        {"epochs": 0.0},
        {"warmup": -1},
        {"lr": INFINITE},
        {"epochs": INFINITE},
        {"warmup": float("nan")},
    ):
        with pytest.raises(ValueError, match="expected"):
            Optimisation(**wrong)
    model = subject[0]
    with pytest.raises(ValueError, match="there is no data"):
        fit(model, [], SHORT, tmp_path, collate=lambda rows: {})
    with pytest.raises(ValueError, match="no parameter asks for gradients"):
        fit(model.requires_grad_(False), [1], SHORT, tmp_path, collate=lambda rows: {})


def test_small_passes_add_up_to_the_step(shipped, tmp_path):
    model, processor = shipped
    trained = []
    for at_once in (4, 1):
        copied = copy.deepcopy(model)
        how = Optimisation(steps=2, batch=4, at_once=at_once, lr=1e-3, warmup=0)
        train_stages(copied, processor, [POLICY], [stage(how=how)], tmp_path / str(at_once))
        trained.append(weights(copied))
    for name, weight in trained[0].items():
        # Every answer's token counts the same, in whatever pass.
        torch.testing.assert_close(weight, trained[1][name], rtol=1e-3, atol=5e-5)


def test_the_paper_s_recipe_is_whole_and_shrinks(tmp_path):
    recipe = read_recipe(RECIPE)
    assert recipe.vica.layers == (0, 1, 7, 8, 9, 10, 11, 14)
    assert recipe.vica.prefix == "freeze"
    first, second = recipe.stages.values()
    assert (first.parts, second.parts) == (("projector",), BOTH)
    assert (first.batch, first.lr, second.batch, second.lr) == (256, 1e-3, 128, 2e-5)
    assert {(s.epochs, s.warmup, s.weight_decay, s.max_length) for s in (first, second)} == {(1, 0.03, 0.0, 2048)}
    small = recipe.shrunk(tmp_path / "data", 0)
    assert [s.how.steps for s in small] == [2, 2]
    assert isinstance(small[0].conversations, ConversationFile)
    assert small[0].how.lr == 1e-3
    with pytest.raises(ValueError, match=r"stage projector: the data .* is not here: fetch liuhaotian/LLaVA-Pretrain"):
        recipe.made(RECIPE.parent)
    with pytest.raises(ValueError, match="the recipe has no path 'dta'; it has data"):
        recipe.made(RECIPE.parent, {"dta": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("recipe: x", "`model`: Field required"),
        ("recipe: [", "is no YAML"),
        ("- 1", "is no recipe"),
        (
            "{recipe: x, model: m, vica: {layers: []}, stages: {a: {parts: [projector], data: {rows: r}, batch: 1, lr: 1}}}",
            "`vica.layers`",
        ),
        (
            "{recipe: x, model: m, vica: {layers: [1]}, stages: {a: {parts: [bridge], data: {rows: r}, batch: 1, lr: 1}}}",
            "`stages.a.parts.0`",
        ),
        ("{recipe: x, model: m, vica: {layers: [1]}, stages: {}, colour: red}", "`stages`|`colour`"),
    ],
)
def test_bad_recipes_name_what_is_wrong(tmp_path, change, message):
    path = tmp_path / "r.yaml"
    path.write_text(change)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_a_text_model_s_weights_go_into_the_decoder(subject):
    model, _ = subject
    config = model.config.text_config.to_dict() | {"vocab_size": 100}
    del config["layer_types"]  # one for each layer

    def other(**changed):
        return AutoModelForCausalLM.from_config(type(model.config.text_config)(**config | changed))

    text = other()
    words = model.model.language_model.embed_tokens.weight.clone()
    take_language(model, text)
    for name, weight in text.model.named_parameters():
        own = dict(model.model.language_model.named_parameters())[name]
        assert torch.equal(own[: len(weight)], weight)
    assert torch.equal(model.model.language_model.embed_tokens.weight[100:], words[100:]), "rows in addition stay"
    assert torch.equal(model.lm_head.weight[:100], text.lm_head.weight)
    with pytest.raises(ValueError, match="decoder is another one"):
        take_language(model, other(num_hidden_layers=2))
    with pytest.raises(ValueError, match="take one of the same size"):
        take_language(model, other(intermediate_size=64))


def test_a_projector_forgets_by_its_seed(subject):
    model, _ = subject
    before = weights(model)
    forget_projector(model, 3)
    assert all("multi_modal_projector" in name for name in moved(model, before))
    first = weights(model)
    forget_projector(model, 3)
    assert not moved(model, first)
