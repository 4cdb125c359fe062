"""Design test 5 for the policies that learn: routers and gates in plain PyTorch, prompt, decode and gradients."""

import pytest
import torch
from torch.nn.functional import relu, silu

import sparing
from oracles import Llama, compare, embeddings, through_cache
from policy_cases import calibrated, seeded
from sparing.policies import DLLM, MoD, SkipGPT


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("feed_reads", ["input", "residual"])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_skip_gpt(router, feed_reads, threshold, tiny_llama, text_batch):
    """Logit 0 executes; keys and values of every token are there, prompt and decode alike."""
    make = seeded(lambda m: SkipGPT.for_model(m, router=router, feed_reads=feed_reads, threshold=threshold))
    policy = make(tiny_llama)

    def runs(part, x):
        z = linear(part, x) if router == "linear" else linear(part[2], relu(linear(part[0], x)))
        return (z.softmax(-1)[:, 0] >= threshold).nonzero().flatten()

    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(m.depth):
            before = x
            rows = runs(policy.attend[layer], x)
            x = x.index_add(0, rows, m.attention(layer, x, rows, everyone))
            rows = runs(policy.feed[layer], before if feed_reads == "input" else x)
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(tiny_llama, text_batch, policy, oracle)


def chosen_of(score, n, capacity, select):
    """Indices of the prompt's tokens that run, and what the k-th scored."""
    k = max(1, int(capacity * n))
    order = sorted(range(n), key=lambda i: -score[i])
    kth = score[order[k - 1]]
    best = order[:k] if select == "topk" or k == 1 else [i for i in range(n) if score[i] > kth]
    return sorted(best), kth


@pytest.mark.parametrize("select", ["topk", "above"])
@pytest.mark.parametrize("capacity", [0.6, 0.1])
@pytest.mark.parametrize("family", ["text", "pictures"])
def test_mod_of_modules(select, capacity, family, tiny_llama, tiny_llava, text_batch, llava_batch):
    """LRM-Pruning's mod_twice: outputs times the raw score, keys of all, every decoded token runs (times its score)."""
    model, batch = (tiny_llama, text_batch) if family == "text" else (tiny_llava, llava_batch)
    policy = seeded(lambda m: MoD.for_model(m, capacity=capacity, select=select))(model)

    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(m.depth):
            before = x
            for module in ("attend", "feed"):
                rows, weight = everyone, torch.ones(len(x))
                if 0 < layer < m.depth - 1:
                    score = linear(policy.routers[f"{layer}_{module}"], before)[:, 0]
                    best, _ = chosen_of(score.tolist(), n, capacity, select)
                    rows, weight = torch.tensor(best + list(range(n, len(x)))), score
                branch = m.attention(layer, x, rows, everyone) if module == "attend" else m.mlp(layer, x[rows])
                x = x.index_add(0, rows, branch * weight[rows, None])
        return m.logits(x)

    compare(model, batch, policy, oracle)


def test_mod_of_blocks(tiny_llama, text_batch):
    """x + r * block(x). Who is not chosen has no key either; a decoded token runs where it scores as much as its prompt's k-th did."""
    policy = seeded(lambda m: MoD.for_model(m, "paper", capacity=0.5, layers=[0, 2]))(tiny_llama)

    def oracle(m, x, kind, n):
        for layer in range(m.depth):
            rows, weight = torch.arange(len(x)), torch.ones(len(x))
            if layer in (0, 2):
                weight = linear(policy.routers[f"{layer}_attend"], x)[:, 0]
                best, kth = chosen_of(weight.tolist(), n, 0.5, "topk")
                rows = torch.tensor(best + [i for i in range(n, len(x)) if weight[i] >= kth])
            attention = m.attention(layer, x, rows, rows)
            block = attention + m.mlp(layer, x[rows] + attention)
            x = x.index_add(0, rows, block * weight[rows, None])
        return m.logits(x)

    compare(tiny_llama, text_batch, policy, oracle)


def test_mod_with_thresholds(tiny_llama, text_batch):
    """Decoded tokens run where they score at least the threshold, 0.1 for every router here."""
    policy = seeded(calibrated)(tiny_llama)

    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(m.depth):
            before = x
            for module in ("attend", "feed"):
                rows, weight = everyone, torch.ones(len(x))
                if layer == 1:
                    weight = linear(policy.routers[f"1_{module}"], before)[:, 0]
                    best, _ = chosen_of(weight.tolist(), n, 0.6, "topk")
                    rows = torch.tensor(best + [i for i in range(n, len(x)) if weight[i] >= 0.1])
                branch = m.attention(layer, x, rows, everyone) if module == "attend" else m.mlp(layer, x[rows])
                x = x.index_add(0, rows, branch * weight[rows, None])
        return m.logits(x)

    compare(tiny_llama, text_batch, policy, oracle)


@torch.no_grad()
def test_mod_calibration(tiny_llama, text_batch):
    """Thresholds are the mean score of the prompts' k-th tokens, and without them decoding is refused."""
    policy = seeded(lambda m: MoD.for_model(m, capacity=0.6, decode="threshold"))(tiny_llama)
    with pytest.raises(ValueError, match="calibrating"):
        sparing.apply(tiny_llama, policy)
    batch = text_batch("left")
    with policy.calibrating(), sparing.apply(tiny_llama, policy):
        tiny_llama(**batch)
    m, (embeds, _), wanted = Llama(tiny_llama), embeddings(tiny_llama, batch), []
    for x, keep in zip(embeds, batch["attention_mask"].bool(), strict=True):
        x, everyone = x[keep], torch.arange(int(keep.sum()))
        x = x + m.attention(0, x, everyone, everyone)
        score = linear(policy.routers["1_attend"], x + m.mlp(0, x))[:, 0].tolist()
        wanted.append(chosen_of(score, len(x), 0.6, "topk")[1])
    assert abs(policy.thresholds[1, 0].item() - sum(wanted) / 3) < 1e-5
    assert policy.thresholds[[0, 2]].isnan().all()
    with sparing.apply(tiny_llama, policy) as run:
        tiny_llama.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert run.ledger.cost().decode.rows["attend"] < run.ledger.dense_cost().decode.rows["attend"]


@pytest.mark.parametrize("preset", ["release", "lrm-pruning"])
def test_d_llm(preset, tiny_llama, text_batch):
    """The release evicts, spares the first layer and the first two tokens; LRM-Pruning's baseline does neither."""
    special = {"width": 13, "start_layer": 1, "threshold": 0.45} if preset == "release" else {"sample": False}
    policy = seeded(lambda m: DLLM.for_model(m, preset, **special))(tiny_llama)

    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(m.depth):
            rows = keys = everyone
            if preset == "release" and layer >= 1:
                first, norm, _, last = policy.routers[str(layer)]
                y = linear(first, x)
                y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
                runs = linear(last, silu(y)).softmax(-1)[:, 1] >= 0.45
                runs[:2] = True
                rows = keys = runs.nonzero().flatten()
            elif preset == "lrm-pruning":
                z = linear(policy.routers[str(layer)], x)
                rows = (z[:, 0] >= z[:, 1]).nonzero().flatten()
            x = x.index_add(0, rows, m.attention(layer, x, rows, keys))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(tiny_llama, text_batch, policy, oracle)


def straight_through(advantage, noise, temperature):
    """As torch's own gumbel_softmax(hard=True), on given noise: the gate of executing."""
    soft = torch.stack([advantage + noise[0], noise[1]], dim=-1).div(temperature).softmax(-1)[..., 0]
    return (soft >= 0.5).float() - soft.detach() + soft


@pytest.mark.parametrize("method", ["skipgpt", "dllm"])
def test_straight_through_gradients(method, tiny_llama, text_batch):
    """Training mode on dense: outputs and gradients are those of hard Gumbel-softmax gates on both branches."""
    build = (
        SkipGPT.for_model if method == "skipgpt" else lambda m: DLLM.for_model(m, width=13, start_layer=0, evict=False)
    )
    policy = seeded(build)(tiny_llama).train()
    policy.temperature, policy.generator = 1.7, torch.Generator().manual_seed(6)
    ids = text_batch("left")["input_ids"][:1]
    with sparing.apply(tiny_llama, policy, execute="dense"):
        logits = tiny_llama(ids).logits[0]
    ours = torch.autograd.grad(logits.square().mean(), list(policy.parameters()))

    generator = torch.Generator().manual_seed(6)
    m, everyone = Llama(tiny_llama), torch.arange(ids.shape[1])
    x = m.weights["embed_tokens.weight"][ids[0]]

    def gate(router, x, execute):
        noise = -torch.empty(2, 1, len(x)).exponential_(generator=generator).log()
        z = router(x)
        return straight_through(z[:, execute] - z[:, 1 - execute], noise[:, 0], 1.7)

    gates = []
    for layer in range(m.depth):
        if method == "skipgpt":
            a, f = gate(policy.attend[layer], x, 0), gate(policy.feed[layer], x, 0)
            gates += [a.mean(), f.mean()]
        else:
            a = gate(policy.routers[str(layer)], x, 1)
            f = a = torch.cat([torch.ones(2), a[2:]])
            gates.append(a[2:].mean())
        x = x + a[:, None] * m.attention(layer, x, everyone, everyone)
        x = x + f[:, None] * m.mlp(layer, x)
    want = m.logits(x)
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert (policy.mean_gate() - torch.stack(gates).mean()).abs() <= 1e-6
    theirs = torch.autograd.grad(want.square().mean(), list(policy.parameters()), retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_mean_gate_leaves_padding_out(tiny_llama, text_batch):
    """It is what the ledger counts among the tokens that are not padding."""
    policy = seeded(SkipGPT.for_model)(tiny_llama).train()
    policy.generator = torch.Generator().manual_seed(3)
    batch = text_batch("left")
    with sparing.apply(tiny_llama, policy, execute="dense") as run:
        tiny_llama(**batch)
    valid = batch["attention_mask"].sum()
    for layer in range(3):
        for module, column in (("attend", run.ledger.attend(layer)), ("feed", run.ledger.feed(layer))):
            assert (policy.last_gates[layer, module] - column.sum() / valid).abs() < 1e-6
    assert 0 < policy.mean_gate() < 1
    with pytest.raises(ValueError, match="training mode"):
        SkipGPT.for_model(tiny_llama).mean_gate()


@torch.no_grad()
def test_sampling_is_random_and_reproducible(tiny_llama, text_batch):
    """The release's inference: two passes differ, the same seed repeats them, and both executors draw alike."""
    policy = SkipGPT.for_model(tiny_llama, "release", generator=torch.Generator())
    batch = text_batch("left")

    def run(seed, execute):
        policy.generator.manual_seed(seed)
        return through_cache(tiny_llama, batch, policy, execute)[:, -1]

    assert torch.equal(run(1, "dense"), run(1, "dense"))
    assert (run(1, "dense") - run(2, "dense")).abs().max() > 1e-3
    assert (run(1, "dense") - run(1, "gathered")).abs().max() < 1e-4
