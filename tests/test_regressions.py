"""What the executors once got wrong, or passed over in silence."""

import copy

import pytest
import torch
from transformers import DynamicCache

import sparing
from models import IMAGE, PATCHES, llama, llava, text_batch
from sparing.execute.supported import SELECTS
from sparing.plan import LayerPlan, Policy
from sparing.policies import DropTokens, EnterLate, SkipModules, ViCA
from sparing.tokens import Group, TokenMap

EXECUTORS = ("dense", "gathered")
TOLERANCE = 1e-5
each_executor = pytest.mark.parametrize("execute", EXECUTORS)


class ByContent(Policy):
    """Masks that are a function of each token's own residual."""

    def plan_attend(self, view):
        attend, feed, read = (view.residual[..., i] > -0.3 for i in range(3))
        return LayerPlan(attend=attend, feed=feed, read=read)


class Planned(Policy):
    """One plan for every layer and pass."""

    def __init__(self, **plan):
        self.plan = plan

    def plan_attend(self, view):
        return LayerPlan(**self.plan)


def random_ids(rows, length, seed=0):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(a, b):
    assert ((a - b).abs().max() / b.abs().max()).item() <= TOLERANCE


def stored_bytes(cache):
    """What a ragged cache of the tiny Llama really holds."""
    return sum(int((layer.index >= 0).sum()) for layer in cache.layers if layer.index is not None) * 2 * 3 * 10 * 4


@torch.no_grad()
def two_turns(policy, execute, first, second, pixels):
    """Logits of a chat's second turn, on the kept cache and in one pass over both turns."""
    model = llava()
    whole = torch.cat([first, second], dim=1)
    pictures = (first == IMAGE).sum() // PATCHES
    ones, given = torch.ones_like(whole), {"pixel_values": pixels[:pictures]} if pictures else {}
    with sparing.apply(model, policy, execute=execute) as run:
        cache = model(first, use_cache=True, **given).past_key_values
        split = model(second, attention_mask=ones, past_key_values=cache, pixel_values=pixels[pictures:]).logits
        cost = run.ledger.cost()
        return split, model(whole, attention_mask=ones, pixel_values=pixels).logits[:, first.shape[1] :], cost


PICTURE = [IMAGE] * PATCHES
LATER = torch.tensor([[13, 14, *PICTURE, 15, 16]])


@pytest.mark.parametrize(
    "policy", [ViCA([1, 3]), EnterLate(2), SkipModules([1], [2], groups=[Group.IMAGE])], ids=lambda p: type(p).__name__
)
def test_the_first_picture_in_the_second_turn(policy):
    """A prompt of text alone runs stock; the plan sets in with the picture, on the cache that is there."""
    pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    costs = []
    for execute in EXECUTORS:
        split, whole, cost = two_turns(policy, execute, random_ids(1, 6), LATER, pixels)
        assert_close(split, whole)
        costs.append(cost)
    assert costs[0] == costs[1]


@each_executor
def test_text_before_a_later_picture_is_not_the_system_prompt(execute):
    """`SYSTEM` is what precedes a row's first picture, in whatever turn that came."""
    pixels = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    split, whole, _ = two_turns(ViCA([1], "freeze"), execute, torch.tensor([[3, *PICTURE, 5]]), LATER, pixels)
    assert_close(split, whole)


@each_executor
@torch.no_grad()
def test_a_cache_is_read_without_use_cache(execute):
    """`use_cache=False` with a filled cache: transformers reads it, and so do both executors."""
    model, ids, more = llama(), random_ids(2, 9), random_ids(2, 3, 1)
    stock = model(more, past_key_values=model(ids, use_cache=True).past_key_values, use_cache=False).logits
    with sparing.apply(model, execute=execute, force=True):
        cache = model(ids, use_cache=True).past_key_values
        assert_close(model(more, past_key_values=cache, use_cache=False).logits, stock)


@torch.no_grad()
def test_padding_stays_hidden_without_a_mask():
    """A step without `attention_mask` after a padded prompt reads no padding, under either executor."""
    model, batch, more = llama(), text_batch("left"), random_ids(3, 1)
    grown = torch.cat([batch["attention_mask"], torch.ones_like(more)], dim=1)
    for execute in EXECUTORS:
        with sparing.apply(model, ByContent(), execute=execute):
            with_mask, without = (
                model(more, past_key_values=model(**batch, use_cache=True).past_key_values, attention_mask=mask).logits
                for mask in (grown, None)
            )
        assert_close(without, with_mask)


@each_executor
@torch.no_grad()
def test_masks_that_the_plan_cannot_follow_are_refused(execute):
    """A mask that hides other cached tokens than before, of another length, or of four dimensions."""
    model, ids = llama(), random_ids(2, 9)
    hides = torch.ones(2, 10, dtype=torch.long)
    hides[:, 3] = 0
    with sparing.apply(model, ByContent(), execute=execute):
        cache = model(ids, use_cache=True).past_key_values
        for mask, message in (
            (hides, "than before"),
            (hides[:, :1], "covers 1 tokens"),
            (torch.zeros(2, 1, 1, 10), "4 dimensions"),
        ):
            with pytest.raises(ValueError, match=message):
                model(ids[:, :1], past_key_values=cache, attention_mask=mask)


@each_executor
@torch.no_grad()
def test_packed_rows_are_refused(execute):
    """Positions that start again mean several sequences in a row to transformers, and only without a mask."""
    model, ids = llama(), random_ids(1, 6)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    with sparing.apply(model, ByContent(), execute=execute):
        model(ids, attention_mask=torch.ones_like(ids), **packed)
        with pytest.raises(ValueError, match="several sequences"):
            model(ids, **packed)


@pytest.mark.parametrize("attend", [False, torch.arange(9).expand(2, -1) % 2 == 0], ids=["none", "some"])
@torch.no_grad()
def test_a_weight_ends_with_its_mask(attend):
    """A weight where the mask says no counts for nothing, under either executor."""
    model, ids, weight = llama(), random_ids(2, 9), torch.full((2, 9), 0.7)
    policy = Planned(attend=attend, feed=attend, attend_weight=weight, feed_weight=weight)
    logits = []
    for execute in EXECUTORS:
        with sparing.apply(model, policy, execute=execute):
            logits.append(model(ids).logits)
    assert_close(*logits)


@each_executor
@torch.no_grad()
def test_masks_must_be_boolean(execute):
    """Zeros and ones of another type are refused."""
    model, ids = llama(), random_ids(2, 9)
    for name in ("attend", "feed", "read"):
        with (
            sparing.apply(model, Planned(**{name: torch.ones(2, 9)}), execute=execute),
            pytest.raises(ValueError, match=f"LayerPlan.{name} is torch.float32"),
        ):
            model(ids)


@torch.no_grad()
def test_a_false_capacity_is_found_on_the_cpu():
    """More rows than promised would be left out in silence."""
    model, mask = llama(), torch.ones(2, 9, dtype=torch.bool)
    with sparing.apply(model, Planned(feed=mask, capacity=2)), pytest.raises(ValueError, match="promises at most 2"):
        model(random_ids(2, 9))


class FreesTheThird(Policy):
    """A long `read` of one row for the whole batch."""

    def plan_attend(self, view):
        every = torch.arange(view.tokens.length)[None] != 2
        return LayerPlan() if view.prefill else LayerPlan(read=every)


@torch.no_grad()
def test_one_row_of_read_speaks_for_the_batch():
    """`[1 past+t]` frees in every row."""
    model, ids, more = llama(), random_ids(3, 9), random_ids(3, 2, 1)
    logits = []
    for execute in EXECUTORS:
        with sparing.apply(model, FreesTheThird(), execute=execute):
            logits.append(model(more, past_key_values=model(ids, use_cache=True).past_key_values).logits)
    assert_close(*logits)


class Fails(Policy):
    """Raises in the second layer when told to."""

    failing = False

    def plan_attend(self, view):
        if self.failing and view.layer == 1:
            raise ZeroDivisionError
        return LayerPlan()


@each_executor
@torch.no_grad()
def test_a_pass_that_failed_half_way(execute):
    """Its cache is refused; copies made before it, and new prompts, are well."""
    model, ids, policy = llama(), random_ids(2, 9), Fails()
    with sparing.apply(model, policy, execute=execute):
        cache, fresh = model(ids, use_cache=True).past_key_values, DynamicCache()
        spare = copy.deepcopy(cache)
        expected = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
        policy.failing = True
        for used, given in ((cache, ids[:, :1]), (fresh, ids)):
            with pytest.raises(ZeroDivisionError):
                model(given, past_key_values=used)
        policy.failing = False
        for used in (cache, fresh):
            with pytest.raises(ValueError, match="failed half-way"):
                model(ids[:, :1], past_key_values=used)
        assert_close(model(ids[:, :1], past_key_values=spare).logits, expected)


@torch.no_grad()
def test_a_cache_stays_with_its_policies():
    """A cache goes on under the policies that filled it, also in another `with` block."""
    model, ids = llama(), random_ids(2, 9)
    with sparing.apply(model, SkipModules([0])):
        cache = model(ids, use_cache=True).past_key_values
    with sparing.apply(model, SkipModules([0])):
        model(ids[:, :1], past_key_values=cache)
    with sparing.apply(model, ByContent()), pytest.raises(ValueError, match=r"\[SkipModules\], not \[ByContent\]"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_the_decoder_called_alone_remembers_no_earlier_call():
    """Embeddings of the length of an earlier prompt with a picture are not that picture."""
    model, ids = llava(), torch.tensor([[3, *PICTURE, 5]])
    decoder, embeds = model.model.language_model, torch.randn(1, ids.shape[1], 42)
    stock = decoder(inputs_embeds=embeds).last_hidden_state
    with sparing.apply(model, ViCA([1])):
        model(ids, pixel_values=torch.zeros(1, 3, 30, 30))
        assert torch.equal(decoder(inputs_embeds=embeds).last_hidden_state, stock)


class Wrapped(torch.nn.Module):
    """As PEFT wraps a model: it calls the forward of the model inside, past its hooks."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def get_base_model(self):
        return self.inside

    def forward(self, **kwargs):
        return self.inside.forward(**kwargs)


@each_executor
@torch.no_grad()
def test_a_wrapped_model(execute):
    """The plan reaches the model inside, and knows its pictures."""
    model, ids = llava(), torch.tensor([[3, *PICTURE, 5]])
    batch = {"input_ids": ids, "pixel_values": torch.ones(1, 3, 30, 30)}
    with sparing.apply(model, ViCA([1]), execute=execute):
        expected = model(**batch).logits
    for given in (Wrapped(model), model):
        with sparing.apply(given, ViCA([1]), execute=execute):
            assert torch.equal(Wrapped(model)(**batch).logits, expected)


def test_a_compiled_wrapper_is_refused():
    """`torch.compile` returns a wrapper that cannot be patched; the model inside it can."""
    with pytest.raises(ValueError, match="_orig_mod"):
        sparing.apply(torch.compile(llama(), backend="eager"), SkipModules([0]))


@torch.no_grad()
def test_the_ledger_speaks_of_what_the_cache_holds():
    """Cropped tokens and rows that were selected away are not counted as kept."""
    model, ids = llama(), random_ids(4, 9)
    with sparing.apply(model, ByContent()) as run:
        cache = model(ids, use_cache=True).past_key_values
        before = run.ledger.cost()
        assert before.kv_bytes == stored_bytes(cache)
        cache.crop(-4)
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert run.ledger.states().shape[2:] == (2, 5)
        assert run.ledger.cost().kv_bytes == stored_bytes(cache) < before.kv_bytes
        assert run.ledger.cost().total == before.total
        with pytest.raises(ValueError, match="start a new prompt"):
            cache.crop(-5)


def every_third(tokens: TokenMap):
    return tokens.valid.long().cumsum(1) % 3 == 2


@each_executor
@torch.no_grad()
def test_positions_after_reindexing(execute):
    """The map and the cache know the closed positions, and a cropped prompt goes on where it now ends."""
    model, ids, more = llama(), random_ids(2, 12), random_ids(2, 2, 1)
    with sparing.apply(model, DropTokens(every_third, positions="reindex"), execute=execute):
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-2)
        cropped = model(more, past_key_values=cache).logits
        kept = ~every_third(cache.state.tokens)[:, :10]
        assert torch.equal(cache.state.tokens.position_ids[:, :10][kept].view(2, -1), torch.arange(7).expand(2, -1))
        if execute == "gathered":
            assert torch.equal(cache.layers[0].position_ids, torch.arange(9).expand(2, -1))
        other = model(ids[:, :10], use_cache=True).past_key_values
        assert_close(cropped, model(more, past_key_values=other).logits)


@torch.no_grad()
def test_assisted_decoding_finds_the_same_tokens():
    """Candidates that are rejected leave nothing behind."""
    model, prompt = llama(), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    costs = []
    for execute in EXECUTORS:
        with sparing.apply(model, ByContent(), execute=execute) as run:
            plain = model.generate(prompt, **settings)
            assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=2, **settings), plain)
            costs.append(run.ledger.cost())
    assert costs[0] == costs[1]


@torch.no_grad()
def test_chosen_hidden_states_are_those_that_went_on():
    """`output_hidden_states` as a flag or as indices, with layers weighted as a whole, alike in both executors."""
    model, ids = llama(), random_ids(2, 9)
    model(ids, output_hidden_states=True)  # from now on transformers' own hooks are on the layers
    policy = Planned(block_weight=torch.rand(2, 9, generator=torch.Generator().manual_seed(2)))
    if not SELECTS:
        with sparing.apply(model, policy), pytest.raises(ValueError, match="pass True and choose"):
            model(ids, output_hidden_states=[1, -1])
    for wanted in (True, 2, [1, -1], [7]) if SELECTS else (True,):
        found = []
        for execute in EXECUTORS:
            with sparing.apply(model, policy, execute=execute):
                found.append(model(ids, output_hidden_states=wanted).hidden_states)
        assert [x is None for x in found[0]] == [x is None for x in found[1]]
        for a, b in zip(*found, strict=True):
            if a is not None:
                assert_close(a, b)


@torch.no_grad()
def test_a_capacity_of_none():
    """A promise that no row has any token, beside keys that all are read."""
    model, ids, nobody = llama(), random_ids(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    logits = []
    for execute in EXECUTORS:
        with sparing.apply(model, Planned(attend=nobody, feed=nobody, capacity=0), execute=execute):
            logits.append(model(ids).logits)
    assert_close(*logits)
