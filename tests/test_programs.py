"""`sparing.apply(capture=True)`: prompts of a layout that was recorded equal those that are planned, without planning."""

import contextlib
import copy
import gc
import types
import weakref

import pytest
import torch

import processors
import sparing
from models import TEXT_FAMILIES, llama, llava, llava_batch, text_batch, text_family
from sparing.execute import programs
from sparing.execute.gathered import Gathered
from sparing.policies import DivPrune, EnterLate, FastV, SkipGPT, SkipModules, ViCA
from sparing.tokens import Group
from vision_models import FAMILIES, decoded

TOLERANCE = 1e-5
BATCHES = {"llava": (llava, llava_batch), **FAMILIES}
POLICIES = {
    "vica": lambda: ViCA([0, 2]),
    "freeze": lambda: ViCA([1, 2], prefix="freeze"),
    "skipped": lambda: ViCA([0, 2]) & SkipModules([1], [2], groups=[Group.TEXT]),
    "entering": lambda: EnterLate(1),
}


@pytest.fixture
def planned(monkeypatch):
    """Counts the passes that the executor runs itself."""
    runs = []
    stock = Gathered.run
    monkeypatch.setattr(Gathered, "run", lambda self, *args: runs.append(1) or stock(self, *args))
    return runs


def other_pictures(inputs):
    """The same layout with other pictures and words."""
    changed = dict(inputs)
    changed["pixel_values"] = inputs["pixel_values"].flip(-1) * 1.5
    text = (inputs["input_ids"] < 12) & (inputs["input_ids"] > 2)
    changed["input_ids"] = torch.where(text, inputs["input_ids"] % 9 + 3, inputs["input_ids"])
    return changed


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", BATCHES)
def test_equals_what_is_planned(family, side, planned):
    """Several pictures, none, padding: prefill, then cached decoding on the program's keys; the second prompt is not planned."""
    build, batch = BATCHES[family]
    model, inputs = build(), batch(side)
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    prompts = [inputs, other_pictures(inputs), inputs]
    out = []
    with torch.no_grad():
        for capture in (False, True):
            with sparing.apply(model, ViCA([0, 2]), capture=capture) as run:
                out.append([(decoded(model, prompt, extra)[0], run.ledger) for prompt in prompts])
    adds = bool(sparing.anatomy.anatomy_of(model).adds)
    # Of each prompt also a chunk and two tokens are decoded, by the executor.
    assert len(planned) == 12 + (12 if adds else 10)
    for (expected, before), (found, after) in zip(*out, strict=True):
        mask = inputs["attention_mask"].bool()
        assert relative(found[0][mask], expected[0][mask]) <= TOLERANCE
        for a, b in zip(found[1:], expected[1:], strict=True):
            assert relative(a, b) <= TOLERANCE
        assert torch.equal(after.states(), before.states())
        assert after.cost() == before.cost()
    assert relative(out[0][1][0][0][mask], out[0][0][0][0][mask]) > 100 * TOLERANCE


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy, planned):
    """Each that decides by layout; `generate` too, whose prompts go through the program."""
    model, processor = processors.family("llava")
    made = POLICIES[policy]()
    pictures = [[processors.picture(64, 40, i)] for i in range(3)]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompts = [sparing.anatomy.ask(model, processor, ["What is in this picture?"], [one]) for one in pictures]
    out = []
    with torch.no_grad():
        for capture in (False, True):
            planned.clear()
            with sparing.apply(model, made, capture=capture):
                out.append([model.generate(**prompt, **settings) for prompt in prompts])
                out[-1] += [model(**prompt, logits_to_keep=1).logits for prompt in prompts]
    assert len(planned) == 1 + 3 * 3
    for expected, found in zip(*out, strict=True):
        assert torch.equal(found, expected) if found.ndim == 2 else relative(found, expected) <= TOLERANCE


@pytest.mark.parametrize("family", [name for name in TEXT_FAMILIES if "moe" not in name])
def test_text_families(family, planned):
    """Skipped modules in each text decoder: windows, capped scores, layers without positions."""
    model, inputs = text_family(family), text_batch("left")
    policy = SkipModules([1], [0])
    with torch.no_grad():
        with sparing.apply(model, policy):
            expected = model(**inputs).logits
        planned.clear()
        with sparing.apply(model, policy, capture=True):
            found = [model(**inputs).logits for _ in range(3)]
    assert len(planned) == 1
    for one in found:
        assert relative(one[inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()]) <= TOLERANCE


def test_without_policies_and_in_bfloat16(planned):
    """`force=True` records the whole model; autocast is another program."""
    model, inputs = copy.deepcopy(llama()), text_batch("left")
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
        with sparing.apply(model, force=True, capture=True):
            for _ in range(2):
                assert relative(model(**inputs).logits[mask], expected[mask]) <= TOLERANCE
            assert len(planned) == 1
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    assert relative(model(**inputs).logits.float()[mask], expected[mask]) <= 4e-2
            assert len(planned) == 2
            # Weights that are written to, or exchanged, are another model.
            model.model.layers[0].mlp.up_proj.weight.mul_(0.5)
            written = model(**inputs).logits
            assert len(planned) == 3
            model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.clone() * 3
            replaced = model(**inputs).logits
            assert len(planned) == 4
        model.model.layers[0].mlp.up_proj.weight.div_(3)
        assert relative(written[mask], model(**inputs).logits[mask]) <= TOLERANCE
        assert relative(written[mask], expected[mask]) > 100 * TOLERANCE
        assert relative(replaced[mask], written[mask]) > 100 * TOLERANCE


def test_what_is_not_recorded(planned):
    """Gradients, hidden states and the prompts of a `VisionPrefix` are planned as ever; so is another layout, and one long unused."""
    model, inputs = llava(), llava_batch("left")
    policy = ViCA([0, 2])
    with sparing.apply(model, policy, capture=True):
        model(**inputs).logits.sum().backward()
        assert model.model.language_model.layers[0].mlp.up_proj.weight.grad is not None
        with torch.no_grad():
            assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5
            model(**inputs, use_cache=False)
            assert len(planned) == 3
            model(**inputs, use_cache=False)
            assert len(planned) == 3
            for kept in range(1, programs.KEPT + 1):
                model(**inputs, use_cache=False, logits_to_keep=kept)
            assert len(planned) == 3 + programs.KEPT
            model(**inputs, use_cache=False)
            assert len(planned) == 4 + programs.KEPT
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_another_state(planned):
    """Adapters switched, a policy changed in place, and inference mode; a run that is entered twice goes on with its programs."""
    peft = pytest.importorskip("peft")
    inputs, policy = llava_batch("left"), ViCA([0, 2])
    config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(llava()), config).eval()
    run = sparing.apply(model, policy, capture=True)

    def both():
        with torch.no_grad():
            with run:
                found = [model(**inputs).logits for _ in range(2)]
            with torch.inference_mode(), run:
                found.append(model(**inputs).logits.clone())
            count = len(planned)
            with sparing.apply(model, policy):
                expected = model(**inputs).logits
        for one in found:
            assert relative(one, expected) <= TOLERANCE
        return expected, count

    tuned, first = both()
    with model.disable_adapter():
        plain, second = both()
    policy.layers = (1,)
    other, third = both()
    assert [first, second, third] == [1, 3, 5]
    assert relative(tuned, plain) > 100 * TOLERANCE < relative(other, tuned)


def test_looking_past_operations():
    """What is turned into lists or arrays, or asked for its truth, is a value too."""
    looks = {
        "list": lambda x: sum(x.flatten().tolist()) > 0,
        "array": lambda x: x.detach().numpy().sum() > 0,
        "truth": lambda x: bool(x.sum() > 0),
    }
    for mode in (torch.no_grad, torch.inference_mode):
        for look in looks.values():
            model = copy.deepcopy(llava())
            layer = model.model.language_model.layers[1].mlp
            hook = layer.register_forward_hook(lambda _, __, out, look=look: out * 2 if look(out) else out)
            with (
                mode(),
                sparing.apply(model, ViCA([0]), capture=True),
                pytest.raises(ValueError, match="looks at values"),
            ):
                model(**llava_batch("left"))
            hook.remove()


def test_refusals():
    """Policies that look at more than the layout, the masked executor, and experts, whose routing looks at values."""
    for policy in (FastV(1, 0.5), DivPrune(0.5), SkipGPT(42, 4)):
        with pytest.raises(ValueError, match="looks at more than the layout"):
            sparing.apply(llava(), policy, capture=True)
    with pytest.raises(ValueError, match='use execute="gathered"'):
        sparing.apply(llava(), ViCA([0]), capture=True, execute="dense")
    experts = text_family("qwen3-moe")
    with (
        sparing.apply(experts, SkipModules([1]), capture=True),
        torch.no_grad(),
        pytest.raises(ValueError, match="looks at values"),
    ):
        experts(**text_batch("left"))


def test_what_surrounds_a_cuda_graph(monkeypatch):
    """Without a GPU: inputs go into the graph's own, outputs come out as copies, and what the graph points at stays alive."""
    nothing = types.SimpleNamespace(wait_stream=lambda _: None)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: nothing)
    replayed = types.SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replayed)
    table = torch.arange(6.0).view(3, 2)

    def record(x):
        with programs._Tape() as tape:
            return programs.program(tape, [x], [x.mul_(2) @ table.T, x])

    program = record(torch.ones(1, 2))
    captured, alive = programs._CudaGraph(program, [torch.ones(1, 2)]), weakref.ref(program)
    del program
    gc.collect()
    program, out, inputs = alive(), captured._outputs, captured._inputs
    assert program is not None

    def replay():
        for kept, new in zip(out, program(*inputs), strict=True):
            kept.copy_(new)

    replayed.replay = replay
    first = captured(torch.tensor([[1.0, 0.0]]))
    second = captured(torch.tensor([[0.0, 1.0]]))
    assert first[0].tolist() == [[0.0, 4.0, 8.0]]
    assert second[0].tolist() == [[2.0, 6.0, 10.0]]
