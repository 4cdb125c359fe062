"""`generate()` under both executors: greedy, sampling, beams, several turns, caches that callers hold, and what is refused."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparing
from models import llama, llava, llava_batch, text_batch
from random_plans import RandomPlans
from sparing.execute import PlannedCache
from sparing.policies import DropTokens, EnterLate, SkipModules, ViCA
from sparing.tokens import Group

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam_sequences": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 5},
}


def generate(model, inputs, execute, policy, **kwargs):
    torch.manual_seed(0)
    with sparing.apply(model, policy, execute=execute) as run:
        return model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, pad_token_id=0, **kwargs), run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [RandomPlans(4, 0.7, frees=False), SkipModules([0], [1])], ids=["random", "skip"])
def test_executors_generate_alike(mode, policy):
    """The same tokens from both executors, left-padded."""
    model, inputs = llama(), text_batch("left")
    dense, _ = generate(model, inputs, "dense", policy, **MODES[mode])
    fast, run = generate(model, inputs, "gathered", policy, **MODES[mode])
    assert torch.equal(dense, fast)
    assert run.ledger.length == fast.shape[1] - 1  # the last token is never fed


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam"])
@pytest.mark.parametrize(
    "policy",
    [
        ViCA([1, 3]),
        ViCA([2], prefix="freeze"),
        EnterLate(2),
        DropTokens(groups=[Group.IMAGE], keep=0.4),
        DropTokens(groups=[Group.IMAGE], keep=0.4, positions="reindex"),
        SkipModules([1], [2], groups=[Group.IMAGE]),
        ViCA([1, 3]) & SkipModules([2]),
    ],
    ids=repr,
)
def test_vision_policies_generate_alike(policy, mode):
    """Pictures, several pictures, text alone, in one left-padded batch; generating equals the full forward on what came out."""
    model, inputs = llava(), llava_batch("left")
    dense, _ = generate(model, inputs, "dense", policy, **MODES[mode])
    fast, _ = generate(model, inputs, "gathered", policy, **MODES[mode])
    assert torch.equal(dense, fast)


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_identity_generates_the_stock_tokens(execute):
    """No policy, or one with nothing to say: the stock tokens and scores, also through the forced executor."""
    model, inputs = llama(), text_batch("left")
    stock = model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0)
    for policy, force in ((SkipModules(), False), (SkipModules(), True), (ViCA([1]), False)):
        with sparing.apply(model, policy, execute=execute, force=force):
            assert torch.equal(model.generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0), stock)


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_text_only_batch_is_an_exact_no_op_for_vision_policies(execute):
    """A vision model asked without pictures: bit for bit the stock model."""
    model, inputs = llava(), text_batch("right")
    policies = (ViCA([1]), EnterLate(2), DropTokens(groups=[Group.IMAGE]))
    with torch.no_grad():
        stock = model(**inputs).logits
        for policy in policies:
            with sparing.apply(model, policy, execute=execute) as run:
                assert torch.equal(model(**inputs).logits, stock)
            assert run.ledger.cost().total == run.ledger.dense_cost().total


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_callers_keep_their_cache(execute):
    """An empty cache that the caller made fills in place, and a second turn goes on from it."""
    model, inputs = llama(), text_batch("none")
    ids = inputs["input_ids"]
    policy = SkipModules([0, 1], [2])
    with torch.no_grad(), sparing.apply(model, policy, execute=execute):
        whole = model(ids).logits
        cache = DynamicCache()
        first = model(ids[:, :9], past_key_values=cache).logits
        assert isinstance(cache, PlannedCache)
        assert cache.get_seq_length() == 9  # layer 0 holds nothing, and still
        second = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_cache_operations_reach_indices(execute):
    """Select, repeat and crop act on keys, indices and state alike: going on equals never having done so."""
    model, ids = llama(), text_batch("none")["input_ids"]
    policy = RandomPlans(8, 0.7, sees=False, frees=False)
    with torch.no_grad(), sparing.apply(model, policy, execute=execute):
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == ids.shape[1]
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, expected)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        order = [2, 0, 1]
        # The plan of a pass is random by row, so only what was cached may decide: let everything new run.
        policy.share, policy.whole, policy.weights = 2.0, 0.0, False
        again = model(ids[order, :1], past_key_values=cache).logits
        fresh = model(ids, use_cache=True).past_key_values
        assert fresh.get_seq_length() == ids.shape[1]
        assert again.shape == expected.shape
        if execute == "gathered":
            for layer in cache.layers:
                if layer.keys is not None:
                    assert layer.keys.shape[0] == layer.index.shape[0] == 3
                    assert layer.position_ids.max() == ids.shape[1]


def test_reordering_equals_running_the_rows_in_that_order():
    """After `reorder_cache` the next step is what the reordered prompts would have given."""
    model, inputs = llava(), llava_batch("left")
    rows = torch.tensor([3, 1, 1, 0])
    policy = ViCA([1, 2], prefix="freeze")
    mask = inputs["attention_mask"]
    step = torch.tensor([[7], [8], [9], [10]])
    position = mask.sum(1, keepdim=True)
    grown = torch.cat([mask, torch.ones_like(position)], 1)
    for execute in ("dense", "gathered"):
        with torch.no_grad(), sparing.apply(model, policy, execute=execute):
            kept = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
            plain = model(step, attention_mask=grown, position_ids=position, past_key_values=kept).logits
            kept = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
            kept.reorder_cache(rows)
            moved = model(
                step[rows], attention_mask=grown[rows], position_ids=position[rows], past_key_values=kept
            ).logits
        torch.testing.assert_close(moved, plain[rows])


def test_refusals():
    """Each refusal is one line that says what to do."""
    model, inputs = llama(), text_batch("none")
    ids = inputs["input_ids"]
    with pytest.raises(ValueError, match="layer 3 does not exist.*0..2"):
        sparing.apply(model, SkipModules([3]))
    with pytest.raises(ValueError, match='"gathered" or "dense"'):
        sparing.apply(model, execute="fast")
    with torch.no_grad():
        used = model(ids, use_cache=True).past_key_values
        with sparing.apply(model, SkipModules([0])) as run:
            with pytest.raises(ValueError, match="already inside"), sparing.apply(model):
                pass
            with pytest.raises(ValueError, match="filled outside"):
                model(ids[:, :1], past_key_values=used)
            with pytest.raises(ValueError, match="StaticCache"):
                model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=40))
            with pytest.raises(ValueError, match="attention maps"):
                model(ids, output_attentions=True)
            ours = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="nothing has run"):
            sparing.apply(model).ledger.cost()
        with pytest.raises(RuntimeError, match="stock forward"):
            model(ids[:, :1], past_key_values=ours)
        with sparing.apply(model, SkipModules([0]), execute="dense"), pytest.raises(ValueError, match="filled under"):
            model(ids[:, :1], past_key_values=ours)
        with sparing.apply(llava(), ViCA([])), pytest.raises(ValueError, match="blind"):
            llava()(**llava_batch("left"))
    assert run.ledger.cost().total > 0
    with pytest.raises(ValueError, match="contradict"):
        ViCA([0]) & ViCA([1])
    with pytest.raises(ValueError, match="away in every reading layer"):
        ViCA([0, 1]) & EnterLate(2)


def test_a_freed_key_cannot_come_back():
    """`read` true for a cached key that was freed is an error in both executors."""

    class Revives(RandomPlans):
        def plan_attend(self, view):
            plan = sparing.LayerPlan
            if view.prefill:
                read = torch.ones(view.new.group.shape, dtype=torch.bool)
                read[:, 2] = False
                return plan(read=read)
            return plan(read=torch.ones(view.tokens.group.shape, dtype=torch.bool))

    model, ids = llama(), text_batch("none")["input_ids"]
    for execute in ("dense", "gathered"):
        with torch.no_grad(), sparing.apply(model, Revives(0), execute=execute):
            cache = model(ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="freed"):
                model(ids[:, :1], past_key_values=cache)


def test_nothing_is_left_after_an_error():
    """An exception inside the block leaves the model as it was."""
    model, inputs = llama(), text_batch("none")
    with torch.no_grad():
        stock = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), sparing.apply(model, SkipModules([0])):
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, stock)
        with sparing.apply(model, SkipModules([0])):
            assert not torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_hidden_states_follow_the_stock_convention(execute):
    """`output_hidden_states`: each layer's input, then the final norm's output."""
    model, inputs = llama(), text_batch("none")
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True).hidden_states
        with sparing.apply(model, execute=execute, force=True):
            ours = model(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == len(stock)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gates_need_dense():
    """A gate that wants gradients is refused by the fast executor, and trains under dense."""

    class Gate(RandomPlans):
        weight = torch.nn.Parameter(torch.ones(()))

        def plan_attend(self, view):
            return sparing.LayerPlan(attend_weight=self.weight * torch.ones(view.new.group.shape))

    model, inputs = llama(), text_batch("none")
    policy = Gate(0)
    with sparing.apply(model, policy), pytest.raises(ValueError, match='execute="dense"'):
        model(**inputs)
    with sparing.apply(model, policy, execute="dense"):
        model(**inputs).logits.square().mean().backward()
    assert policy.weight.grad.abs() > 0
    model.zero_grad()
