"""Attention functions beside sdpa and eager: each means the same under a plan, or is refused with the reason."""

import copy
import importlib.util

import pytest
import torch
import transformers.integrations.flash_attention
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention as flex
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparing
from models import llama, llava, llava_batch, text_batch, text_family
from random_plans import RandomPlans
from sparing.anatomy import attention
from sparing.policies import ViCA
from test_parity import TOLERANCE, decode, relative

FLASH = "flash_attention_2"
EXECUTORS = ("dense", "gathered")


def under(model, name):
    """A copy of a tiny model whose decoder runs another attention function; what is not installed here passes no check."""
    model = copy.deepcopy(model)
    model.config.get_text_config()._attn_implementation_internal = name
    return model


def agree(model, inputs, reference, execute, policy, tolerance=TOLERANCE):
    """Logits of a prompt, of a cached chunk and of single steps are those of the same plan on sdpa (or eager)."""
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 6), generator=torch.Generator().manual_seed(3))
    extra = extra.to(inputs["input_ids"].device)
    ours, ledger = decode(model, inputs, execute, policy, extra)
    expected, counted = decode(reference, inputs, "dense", policy, extra)
    assert relative(ours[0], expected[0], inputs["attention_mask"]) <= tolerance
    for a, b in zip(ours[1:], expected[1:], strict=True):
        assert relative(a, b, torch.ones(a.shape[:2], device=a.device)) <= tolerance
    assert ledger.cost() == counted.cost()


class FakeFlash:
    """In the place of the flash kernels: what they compute and no more, so that asking for more shows.

    A mask can only be padding, `[b k]`. The causal corner lies at the bottom right: with fewer queries than keys the last query
    sees every key. Windows and caps are theirs too.
    """

    calls = 0

    def __call__(self, query, key, value, attention_mask, query_length, is_causal, **kwargs):
        type(self).calls += 1
        assert attention_mask is None or attention_mask.ndim == 2, "flash takes no mask of queries and keys"
        assert is_causal
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        q, k = query.shape[2], key.shape[2]
        at = torch.arange(k - q, k).unsqueeze(1)
        may = torch.arange(k) <= at
        if kwargs.get("sliding_window") is not None:
            may = may & (torch.arange(k) > at - kwargs["sliding_window"])
        may = may.expand(len(query), 1, q, k)
        if attention_mask is not None:
            may = may & attention_mask.bool()[:, None, None, :]
        scores = query @ key.transpose(-1, -2) * kwargs["softmax_scale"]
        if (cap := kwargs.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        weights = scores.masked_fill(~may, float("-inf")).softmax(-1).nan_to_num()
        return (weights @ value).transpose(1, 2)


@pytest.fixture
def fake_flash(monkeypatch):
    """Flash attention as transformers calls it, down to the kernel."""
    monkeypatch.setattr(FakeFlash, "calls", 0)
    monkeypatch.setattr(transformers.integrations.flash_attention, "_flash_attention_forward", FakeFlash())
    return FakeFlash


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_is_never_asked_for_a_plan(side, seed, fake_flash):
    """The fast executor computes attention itself: the same numbers as on sdpa, and not one call of the flash kernel."""
    policy = RandomPlans(seed, 0.6)
    for model, inputs in ((llama(), text_batch(side)), (llava(), llava_batch(side))):
        agree(under(model, FLASH), inputs, model, "gathered", policy)
    mistral = text_family("mistral")
    agree(under(mistral, FLASH), text_batch(side), mistral, "gathered", policy)
    assert fake_flash.calls == 0


def test_flash_with_capped_scores(fake_flash):
    """Gemma 2's cap, which flash has and sdpa has not: the family's own eager function computes it."""
    model = text_family("gemma2")
    agree(under(model, FLASH), text_batch("left"), model, "gathered", RandomPlans(1, 0.6))
    assert fake_flash.calls == 0


def test_flash_stays_where_nothing_is_planned(fake_flash):
    """An idle policy leaves the stock forward, kernels included; and the stand-in is worth something: it equals sdpa."""
    model, inputs = under(llava(), FLASH), text_batch("left")
    with torch.no_grad():
        stock = model(**inputs).logits
        assert fake_flash.calls == 4
        with sparing.apply(model, ViCA([1])):
            assert torch.equal(model(**inputs).logits, stock)
        assert fake_flash.calls == 8
        assert relative(stock, llava()(**inputs).logits, inputs["attention_mask"]) <= TOLERANCE


def test_the_stand_in_notices_masks(fake_flash):
    """Were a mask of queries and keys sent to flash, the tests above would fail."""
    layer = under(llama(), FLASH).model.layers[0]
    x, mask = torch.randn(1, 5, 42), torch.ones(1, 1, 5, 5, dtype=torch.bool)
    angles = torch.ones(1, 5, 10), torch.zeros(1, 5, 10)
    layer(x, position_embeddings=angles)
    with pytest.raises(AssertionError, match="no mask of queries and keys"):
        layer(x, attention_mask=mask, position_embeddings=angles)


@pytest.mark.parametrize("name", [FLASH, "flash_attention_3", "kernels-community/some-flash"])
def test_flash_under_dense_is_refused(name, monkeypatch):
    """By the function behind the name, which is flash's for kernels of the hub too."""
    function = ALL_ATTENTION_FUNCTIONS[FLASH]
    monkeypatch.setitem(AttentionInterface._global_mapping, name, function)
    with pytest.raises(ValueError, match=r"takes no mask of queries and keys.*set_attn_implementation\('sdpa'\)"):
        sparing.apply(under(llama(), name), execute="dense")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
        sparing.apply(under(text_family("gemma2"), name), execute="dense")


def test_the_cure_cures():
    """What the message says can be called, on a text and on a vision model, and is enough."""
    for model, inputs in ((llama(), text_batch("left")), (llava(), llava_batch("left"))):
        changed = under(model, FLASH)
        changed.set_attn_implementation("sdpa")
        agree(changed, inputs, model, "dense", RandomPlans(0))


@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("name", ["paged|eager", "paged|sdpa", "paged|flash_attention_2"])
def test_paged_attention_is_refused(name, execute):
    """It belongs to continuous batching."""
    with pytest.raises(ValueError, match=r"paged cache.*attn_implementation='sdpa'"):
        sparing.apply(under(llama(), name), execute=execute)


@pytest.mark.parametrize("execute", EXECUTORS)
def test_continuous_batching_is_refused(execute):
    """It packs sequences into one row, and hands its cache over by another name; also where nothing is planned."""
    model = copy.deepcopy(llama())
    with sparing.apply(model, execute=execute), pytest.raises(ValueError, match=r"continuous batching.*call generate"):
        model(torch.tensor([[3, 4, 5]]), cache=object(), cu_seq_lens_q=torch.tensor([0, 3]))


@pytest.fixture
def plain_flex(monkeypatch):
    """Flex attention without its compiler: the same masks and scores in plain PyTorch, in milliseconds."""
    stock = transformers.masking_utils.create_block_mask

    def plain(*args, _compile=False, **kwargs):
        return stock(*args, **kwargs)

    def run(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(attention, "ABORTS_ON", ())
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", plain)
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", run)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize(("build", "batch"), [(llama, text_batch), (llava, llava_batch)])
def test_flex(build, batch, execute, plain_flex):
    """Stock where nothing is planned; the numbers of sdpa where something is."""
    reference, inputs = build(), batch("left")
    model = under(reference, "flex_attention")
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, execute=execute):
            assert torch.equal(model(**inputs).logits, stock)
    assert relative(stock, reference(**inputs).logits, inputs["attention_mask"]) <= TOLERANCE
    for seed in range(2):
        agree(model, inputs, reference, execute, RandomPlans(seed, 0.6))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("execute", EXECUTORS)
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_flex_with_windows_and_caps(family, execute, plain_flex):
    """A window, and a cap, which flex applies before the mask."""
    reference = text_family(family)
    agree(under(reference, "flex_attention"), text_batch("right"), reference, execute, RandomPlans(5, 0.6))


def test_flex_that_would_abort_is_refused_under_dense():
    model = under(llama(), "flex_attention")
    refused = pytest.raises(ValueError, match=r'makes torch abort on a CPU: use execute="gathered"')
    with refused, torch.no_grad(), sparing.apply(model, RandomPlans(0, 0.6), execute="dense"):
        model(**text_batch("left"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled kernels: a minute on a CPU, and dense aborts there")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("execute", EXECUTORS)
def test_flex_compiled(execute):
    """As transformers runs it, through the compiler."""
    model = under(llama(), "flex_attention").cuda()
    inputs = {name: tensor.cuda() for name, tensor in text_batch("left").items()}
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, execute=execute):
            assert torch.equal(model(**inputs).logits, stock)
    agree(model, inputs, llama().cuda(), execute, RandomPlans(4, 0.6))


def custom(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Softmax attention that trusts its mask, and is causal without one."""
    assert attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.max() <= 0
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)


@pytest.fixture
def register(monkeypatch):
    """`register(function, mask function)` under a name that is gone after the test."""

    def put(function, masks=None):
        monkeypatch.setitem(AttentionInterface._global_mapping, "mine", function)
        if masks is not None:
            monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", masks)
        return "mine"

    return put


@pytest.mark.parametrize("masks", [sdpa_mask, eager_mask])
def test_registered_attention_under_dense(masks, register):
    """With a mask function whose form is known it gets masks of that form."""
    for model, inputs in ((llama(), text_batch("left")), (llava(), llava_batch("right"))):
        agree(under(model, register(custom, masks)), inputs, model, "dense", RandomPlans(2, 0.6))


def test_registered_attention_without_masks_is_refused(register):
    """Transformers gives it no mask at all, so padding and the future would be read."""
    model = under(llama(), register(custom))
    with pytest.raises(ValueError, match=r"no mask function.*AttentionMaskInterface.register\('mine', sdpa_mask\)"):
        sparing.apply(model, execute="dense")


def test_registered_masks_of_unknown_form_are_refused(register):
    """A mask function of the user's own can make anything."""
    model = under(llama(), register(custom, lambda **_: None))
    with pytest.raises(ValueError, match="mask function of its own"):
        sparing.apply(model, execute="dense")


def test_registered_attention_is_refused_by_gathered(register):
    """It would silently be replaced by sdpa; under another name sdpa itself is welcome."""
    with pytest.raises(ValueError, match="cannot know what the registered 'mine' computes: use execute=\"dense\""):
        sparing.apply(under(llama(), register(custom, sdpa_mask)))
    model = under(llama(), register(sdpa_attention_forward, sdpa_mask))
    for execute in EXECUTORS:
        agree(model, text_batch("left"), llama(), execute, RandomPlans(2, 0.6))


def test_another_function_under_a_known_name(monkeypatch):
    """What runs decides, not what it is called."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", custom)
    with pytest.raises(ValueError, match="cannot know what the registered 'sdpa' computes"):
        sparing.apply(copy.deepcopy(llama()))


@pytest.mark.parametrize("execute", EXECUTORS)
def test_a_change_inside_apply(execute, register):
    """The attention function is looked up for every pass, not once."""
    model, inputs = copy.deepcopy(llama()), text_batch("left")
    policy = RandomPlans(2, 0.6)
    with torch.no_grad(), sparing.apply(model, policy, execute=execute):
        first = model(**inputs).logits
        model.set_attn_implementation("eager")
        assert relative(model(**inputs).logits, first, inputs["attention_mask"]) <= TOLERANCE
        model.config._attn_implementation_internal = register(custom)
        with pytest.raises(ValueError, match="'mine'"):
            model(**inputs)


def test_a_name_that_nobody_registered():
    """One line, with the cure."""
    with pytest.raises(ValueError, match="'nowhere' attention is not registered"):
        sparing.apply(under(llama(), "nowhere"))


needs_flash = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None, reason="needs CUDA and flash-attn"
)


@pytest.mark.gpu
@needs_flash
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_on_a_gpu(side):
    """The real kernels: a loaded flash model follows plans as on sdpa, and is stock flash where idle."""
    reference = copy.deepcopy(llama()).to("cuda", torch.bfloat16)
    model = copy.deepcopy(reference)
    model.set_attn_implementation(FLASH)
    inputs = {name: value.to("cuda") for name, value in text_batch(side).items()}
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model):
            assert torch.equal(model(**inputs).logits, stock)
        fast = []
        for each in (model, reference):
            with sparing.apply(each, ViCA([0]), force=True):
                fast.append(each(**inputs).logits)
        assert relative(stock.float(), reference(**inputs).logits.float(), inputs["attention_mask"]) <= 4e-2
    assert torch.equal(*fast)
