"""The method against its equations and the authors' outputs; patterns; training; checkpoints."""
import importlib.util
import itertools
import math
import os
import pickle
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_py
from model import (AUTHORS_NAMES, PRESETS, SCORES, Pattern, RATConfig, RATPlus, Rule, allowed,
                   attention, block_scores, block_summaries, choose_blocks, load_checkpoint,
                   recurrence, rope_angles, rotate, save_checkpoint)

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
REFERENCE = np.load(GOLDEN / "reference_tiny.npz")  # made with the authors' code, see README


def relative_error(x, ref, floor=1e-30):
    """The norm of the difference over that of the reference, which counts as `floor` at least."""
    x = x.detach().double()
    ref = ref.detach().double()
    return ((x - ref).norm() / ref.norm().clamp(min=floor)).item()


def assert_same(name, x, ref, limit=1e-5, floor=1e-30):
    assert x.shape == ref.shape, f"{name}: shape {tuple(x.shape)}, not {tuple(ref.shape)}"
    error = relative_error(x, ref, floor)
    assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.0e}"


def assert_differ(name, x, y):
    error = relative_error(x, y)
    assert error > 1e-3, f"{name}: they should differ, but by {error:.1e} only"


def one_line(error):
    """The message of a refusal, which must be one line."""
    message = str(error.value)
    assert message and "\n" not in message, message
    return message


def tiny(n_layer=2, n_head=4, n_embd=32, vocab_size=50, recurrence=True, seed=0):
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    model = RATPlus(RATConfig(vocab_size, n_layer, n_head, n_embd, recurrence))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.dim() > 1 else p.copy_(torch.rand_like(p) + 0.5)
    return model


def gradients(model, idx, pattern):
    """{name: gradient} of the loss of predicting idx[:, 1:]."""
    loss = model.loss(idx[:, :-1], idx[:, 1:], pattern)
    names, weights = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, weights)))


# ---------------------------------------------------------------------------------------------
# The authors' outputs

def authors(prefix):
    """The golden weights as the authors' bare state dict."""
    names = [name for name in REFERENCE.files if name.startswith(prefix)]
    return {name[len(prefix):]: torch.from_numpy(REFERENCE[name]) for name in names}


AUTHORS_CONFIG = {"model": {"backbone": {"seq_cell": {"d_head": 16}}}}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """{'rat': model, 'attn': model} with the authors' weights."""
    path = tmp_path_factory.mktemp("golden") / "attn.pth"
    torch.save({"task": authors("attn_state/"), "config": AUTHORS_CONFIG}, path)
    rat, _ = load_checkpoint(GOLDEN / "official_tiny.pth")
    attn, _ = load_checkpoint(path)
    return {"rat": rat, "attn": attn}


def our_pattern(spelled):
    """The pattern of the authors' D16_W4_I2; their D-1 is no grid."""
    if spelled.startswith("hybrid"):
        return "D16S2,D4W6S2"
    dilation, window, sinks = (int(field[1:]) for field in spelled.split("_"))
    return f"D{dilation}W{window}S{sinks}" if dilation > 0 else f"W{window}S{sinks}"


@pytest.mark.parametrize("name", sorted(n for n in REFERENCE.files if n.startswith("logits/")))
def test_logits_equal_the_authors(golden, name):
    spelled = name[len("logits/"):]
    kind = "attn" if spelled.startswith("attn_") else "rat"
    pattern = our_pattern(spelled.removeprefix("attn_"))
    with torch.no_grad():
        logits = golden[kind](torch.from_numpy(REFERENCE["tokens"]), pattern)
    assert_same(f"{name} as {pattern}", logits, torch.from_numpy(REFERENCE[name]))


def test_dense_loss_and_every_gradient_equal_the_authors(golden):
    model = golden["rat"]
    tokens = torch.from_numpy(REFERENCE["tokens"])
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert_same("loss", loss, torch.tensor(REFERENCE["dense_loss"]))
    found = gradients(model, tokens, "D1")
    expected = authors("grad/")
    for theirs, gradient in expected.items():
        name = theirs
        for old, new in AUTHORS_NAMES.items():
            name = name.replace(old, new)
        assert_same(f"gradient of {name}", found.pop(name), gradient)
    assert not found, f"the authors have no gradient of {list(found)}"


# ---------------------------------------------------------------------------------------------
# The definitions: equations (2) to (4) and RoPE, on both paths where both exist

SPANS = [(1, 0, 0), (1, 9, 3), (4, 0, 0), (16, 0, 0), (7, 5, 3), (0, 12, 4), (0, 0, 0), (0, 0, 5),
         (500, 0, 0), (3, 400, 0), (5, 2, 400)]                 # D > T, W >= T and S > T among them


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_allowed_is_equation_4(span):
    dilation, window, sinks = span
    t = torch.arange(40)
    found = allowed(t[:, None], t, *span)
    for i, p in itertools.product(range(40), range(40)):
        on_grid = dilation >= 1 and (p + 1) % dilation == 0
        expected = p <= i and (on_grid or i - p <= window or p < sinks)
        assert found[i, p] == expected, f"query {i}, key {p} of {span}"
        assert bool(allowed(i, torch.tensor(p), *span)) == expected
    assert found.equal(Rule(*span).allowed(t[:, None], t))


@pytest.mark.parametrize("span", [(-1, 0, 0), (4, -1, 0), (4, 0, -1)], ids=str)
def test_negative_sizes_are_refused(span):
    with pytest.raises(ValueError, match="dilation, window, sinks"):
        allowed(3, torch.arange(3), *span)


def recurrence_loop(k, v, g, state):
    """Equation (2) as it is written. These forms of a and 1 - a keep their gradients precise."""
    k_t, v_t = state
    rows = []
    for t in range(k.shape[1]):
        a = 1 / (1 + torch.exp(-g[:, t]))
        rest = 1 / (1 + torch.exp(g[:, t]))
        k_t = a * k_t + rest * k[:, t]
        v_t = a * v_t + rest * v[:, t]
        rows.append(torch.stack((k_t, v_t)))
    k_rec, v_rec = torch.stack(rows, dim=2)
    return k_rec, v_rec, (k_t, v_t)


def test_recurrence_is_equation_2_and_differentiates_twice():
    x = torch.randn(5, 2, 4, 2, dtype=torch.float64)
    k, v, g = x[:3].requires_grad_().unbind()
    state = x[3:, :, 0].requires_grad_().unbind()
    k_rec, v_rec, end = recurrence(k, v, g, state)
    expected_k, expected_v, expected_end = recurrence_loop(k, v, g, state)
    assert_same("k_rec", k_rec, expected_k, 1e-14)
    assert_same("v_rec", v_rec, expected_v, 1e-14)
    assert_same("state", torch.stack(end), torch.stack(expected_end), 1e-14)

    def flat(k, v, g, k0, v0):
        k_rec, v_rec, end = recurrence(k, v, g, (k0, v0))
        return k_rec, v_rec, *end

    assert torch.autograd.gradcheck(flat, (k, v, g, *state))
    assert torch.autograd.gradgradcheck(flat, (k, v, g, *state))


@pytest.mark.parametrize("cuts", [(1, 2, 17), (19, 1)], ids=str)
def test_state_carries_the_recurrence_across_chunks(device, cuts):
    x = torch.randn(3, 1, 20, 6, device=device, requires_grad=True)
    pieces = []
    state = None
    for piece in x.split(cuts, dim=2):
        k_rec, v_rec, state = recurrence(*piece, state)
        pieces.append(torch.stack((k_rec, v_rec)))
    chunked = torch.cat(pieces, dim=2)
    k_rec, v_rec, end = recurrence(*x)
    whole = torch.stack((k_rec, v_rec))
    weight = torch.randn_like(whole)
    assert_same("k_rec, v_rec", chunked, whole, 1e-6)
    assert_same("state", torch.stack(state), torch.stack(end), 1e-6)
    found, expected = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (chunked, whole))
    assert_same("gradient through the state", found, expected, 1e-6)


def test_state_is_float32_and_outputs_keep_their_dtype(device):
    k, v, g = torch.randn(3, 1, 9, 4, device=device).half()
    k_rec, v_rec, state = recurrence(k, v, g)
    assert k_rec.dtype == v_rec.dtype == torch.float16
    before = torch.zeros(2, 1, 4, device=device).double()
    _, _, exact = recurrence_loop(k.double(), v.double(), g.double(), before)
    for name, z, ref in zip(("k", "v"), state, exact):
        assert z.dtype == torch.float32
        assert_same(f"state of {name}, in float32 all the way", z, ref, 1e-6)


def test_decay_is_precise_from_minus_100_to_100(device):
    """Channel by channel, in outputs and gradients: a memory that is long must still learn."""
    g = torch.linspace(-100, 100, 32, device=device) + torch.rand(1, 12, 1, device=device)
    k, v = torch.randn(2, 1, 12, 32, device=device)
    state = torch.randn(2, 1, 32, device=device)
    weight = torch.randn(2, 1, 12, 32, device=device)

    def results(op, dtype):
        leaves = [z.detach().to(dtype).requires_grad_() for z in (k, v, g, *state)]
        k_rec, v_rec, end = op(*leaves[:3], leaves[3:])
        total = (torch.stack((k_rec, v_rec)) * weight).sum() + sum(z.sum() for z in end)
        return k_rec, v_rec, *end, *torch.autograd.grad(total, leaves)

    names = "k_rec", "v_rec", "k_end", "v_end", "dk", "dv", "dg", "dk0", "dv0"
    found = results(recurrence, torch.float32)
    for name, x, ref in zip(names, found, results(recurrence_loop, torch.float64)):
        for c in range(32):
            small = ref[..., c].abs() < 1e-30  # too close to float32's smallest number
            assert (x[..., c][small].abs() < 1e-29).all(), name
            at = f"{name} where g is {g[0, 0, c]:.0f}"
            assert_same(at, x[..., c][~small], ref[..., c][~small])


def test_decay_0_and_1_pass_through_and_freeze(device):
    for gate in (-math.inf, math.inf):
        k, v = torch.randn(2, 1, 9, 4, device=device).requires_grad_().unbind()
        state = torch.randn(2, 1, 4, device=device)
        g = torch.full((1, 9, 4), gate, device=device, requires_grad=True)
        k_rec, v_rec, end = recurrence(k, v, g, state)
        for name, x, new, old in (("k_rec", k_rec, k, state[0]), ("v_rec", v_rec, v, state[1])):
            expected = new if gate < 0 else old[:, None].expand_as(new)
            assert x.equal(expected), f"{name} where g is {gate}"
        total = k_rec.sum() + v_rec.square().sum()
        for name, d in zip("kvg", torch.autograd.grad(total, (k, v, g))):
            assert d.isfinite().all(), f"gradient of {name} where g is {gate}"


def test_rotate_turns_pairs_of_channels_by_their_angles(device):
    """As complex numbers: x1 + i x2 times exp(i angle). The angle is t / 10000^(2 j / Dh)."""
    x = torch.randn(2, 3, 20, 8, device=device)
    t = torch.arange(100, 120, device=device)
    cos, sin = rope_angles(t, 8)
    angle = t[:, None].double() * 10000.0 ** (-torch.arange(4, device=device).double() / 4)
    assert_same("cos", cos, angle.cos())
    assert_same("sin", sin, angle.sin())
    pairs = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * angle)
    assert_same("rotated x", rotate(x, cos, sin), torch.cat((pairs.real, pairs.imag), -1))


def test_rotate_takes_a_table_of_any_strides(device):
    x = torch.randn(1, 2, 9, 8, device=device)
    cos, sin = rope_angles(torch.arange(9, device=device), 8)
    expected = rotate(x, cos, sin)
    interleaved = torch.stack((cos, sin), dim=-1).unbind(-1)
    assert rotate(x, *interleaved).equal(expected)
    assert rotate(x, cos.T.contiguous().T, sin.T.contiguous().T).equal(expected)
    one = cos[3:4].expand(9, 4), sin[3:4].expand(9, 4)
    assert rotate(x, *one).equal(rotate(x, *(z.contiguous() for z in one)))


def attention_loop(q, k, v, span):
    """Equation (3), query by query."""
    T = q.shape[2]
    p = torch.arange(T, device=q.device)
    rows = []
    for t in range(T):
        seen = p[allowed(t, p, *span)]
        scores = q[:, :, t:t + 1] @ k[:, :, seen].mT / math.sqrt(q.shape[-1])
        rows.append(scores.softmax(-1) @ v[:, :, seen])
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_attention_is_equation_3(span):
    q, k, v = torch.randn(3, 2, 2, 33, 8, dtype=torch.float64).requires_grad_().unbind()
    weight = torch.randn(2, 2, 33, 8)
    ys = attention(q, k, v, *span), attention_loop(q, k, v, span)
    assert_same("y", *ys, 1e-12)
    found, expected = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in ys)
    for name, d, ref in zip(("dq", "dk_rec", "dv_rec"), found, expected):
        assert_same(name, d, ref, 1e-12, floor=1)  # dq is 0 where a query sees itself alone


# ---------------------------------------------------------------------------------------------
# Top-k blocks

def block_score(q, keys, score):
    """The score of one block, keys (N, Dh), for one query (Dh,)."""
    if score == "mean":
        return (keys @ q).mean()
    if score == "last":
        return keys[-1] @ q
    return torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()


@pytest.mark.parametrize("score", SCORES)
def test_each_score_is_its_definition(score):
    q, k = torch.randn(2, 1, 2, 21, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):  # scores stay float32 whatever that says
        summaries = block_summaries(k, 7, score)
        found = block_scores(q, summaries, score)
    assert summaries.dtype == torch.bfloat16 and found.dtype == torch.float32
    if score == "last":
        assert summaries.data_ptr() == k[:, :, 6].data_ptr(), "a view of the keys"
    limit = 1e-2 if score == "mean" else 1e-6  # a mean is rounded to the keys' dtype
    for h, b in itertools.product(range(2), range(3)):
        keys = k[0, h, 7 * b:7 * b + 7].double()
        expected = torch.stack([block_score(row, keys, score) for row in q[0, h].double()])
        assert_same(f"scores of block {b}", found[0, h, :, b], expected, limit)


def topk_mask(q, k, rule):
    """(T, T) bool of one head, q and k (T, Dh): what each query attends to, block by block."""
    T = len(q)
    p = torch.arange(T)
    mask = rule.allowed(p[:, None], p)
    for t in range(T):
        own = t // rule.block
        blocks = k[:own * rule.block].split(rule.block) if own else []
        scores = [block_score(q[t], keys, rule.score) for keys in blocks]
        best = sorted(range(own), key=lambda b: -scores[b])[:rule.topk - 1]
        mask[t] |= torch.isin(p // rule.block, torch.tensor([own, *best])) & (p <= t)
    return mask


TOPK_RULES = ["N8K3", "D8N8K3", "D4N8K2", "W5S2N8K2", "D5W3S9N7K4", "N1K4", "N64K1"]


def rule_of(text):
    return Pattern.parse(text).layers[0][0]


@pytest.mark.parametrize("text", TOPK_RULES)
@pytest.mark.parametrize("score", SCORES)
def test_topk_attends_to_the_blocks_that_a_loop_chooses(text, score):
    """Gradients too are those of attention under the loop's mask: none flows through the choice."""
    rule = rule_of(f"{text}:{score}")
    q, k, v = torch.randn(3, 1, 2, 30, 4, dtype=torch.float64).requires_grad_().unbind()
    heads = zip(q[0].detach().float(), k[0].detach().float())
    mask = torch.stack([topk_mask(*head, rule) for head in heads])
    weight = torch.randn(1, 2, 30, 4)
    ys = rule.attend(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_same("y", *ys)
    found, expected = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in ys)
    for name, d, ref in zip(("dq", "dk_rec", "dv_rec"), found, expected):
        assert_same(name, d, ref)


@pytest.mark.parametrize("score", SCORES)
def test_the_limits_of_topk_are_the_other_patterns(score):
    q, k, v = torch.randn(3, 1, 2, 50, 8)

    def attend(text):
        return rule_of(f"{text}:{score}").attend(q, k, v)

    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for text in ("N8K7", "N8K999999999", "N1K50", "N50K1", "N999999999K1", "D1N8K2", "W49N8K2",
                 "S50N8K2"):
        assert_same(f"{text} is dense", attend(text), dense)
    assert_same("N1K1: only itself", attend("N1K1"), v)
    for text in ("D16", "W5S3", "D7W2S1"):
        assert_same(f"{text}N1K1 is {text}", attend(f"{text}N1K1"), rule_of(text).attend(q, k, v))
    blocks = [z.unflatten(2, (5, 10)) for z in (q, k, v)]
    blocks = F.scaled_dot_product_attention(*blocks, is_causal=True)
    assert_same("N10K1: each block by itself", attend("N10K1").unflatten(2, (5, 10)), blocks)


def test_unfinished_blocks_are_never_chosen_for_their_score():
    """Later blocks have the best scores here, and are never chosen. The own block always is."""
    q = torch.ones(1, 1, 64, 4)
    k = torch.arange(64.0)[:, None].expand(64, 4)[None, None]
    summaries = block_summaries(k, 8, "mean")
    chosen = choose_blocks(q, summaries, torch.arange(64), rule_of("N8K3"))[0, 0]
    for t in range(64):
        own = t // 8
        expected = list(range(max(own - 2, 0), own + 1))
        assert chosen[t].nonzero()[:, 0].tolist() == expected, f"query {t}"


def test_the_scores_choose_differently():
    model = tiny()
    idx = torch.randint(50, (1, 60))
    logits = {score: model(idx, f"N4K3:{score}") for score in SCORES}
    for a, b in itertools.combinations(SCORES, 2):
        assert_differ(f"{a} and {b}", logits[a], logits[b])
    assert model(idx, "N4K3").equal(logits["mean"]), "the mean unless asked"


@pytest.mark.parametrize("text", ["N8K3", "D4N8K2", "D5W3S9N7K4", "N64K1", "W5S2", "D7W5S3", "D1"])
def test_keys_are_counted_as_the_mean_over_all_choices(text):
    rule = rule_of(text)
    found = rule.count_keys(torch.arange(30))
    block = rule.block or 1
    for t in range(30):
        own = t // block
        p = torch.arange(t + 1)
        granted = rule.allowed(t, p)
        choices = itertools.combinations(range(own), min(rule.topk - 1, own)) if rule.topk else [()]
        taken = [torch.tensor([own, *choice]) for choice in choices]
        counts = [(granted | torch.isin(p // block, blocks)).sum().item() for blocks in taken]
        assert found[t].item() == pytest.approx(sum(counts) / len(counts)), f"{text} at {t}"
    config = RATConfig(50, 2, 2, 8)
    mean = found.mean().item()
    assert Pattern.parse(text).keys_per_token(config, 30) == pytest.approx(mean)
    half_dense = Pattern.parse(f"D1/{text}").keys_per_token(config, 30)
    assert half_dense == pytest.approx((15.5 + mean) / 2), "heads count evenly"


# ---------------------------------------------------------------------------------------------
# The layer and the model

def random_rule(rng, longest=40):
    fields = []
    for letter, sizes in (("D", (1, 2, 3, 5, 8, 16)), ("W", (0, 1, 4, 7)), ("S", (0, 1, 4, 7))):
        if rng.random() < 0.6:
            fields.append(f"{letter}{rng.choice((*sizes, longest + 9))}")
    return "".join(fields) or "W0"


def random_pattern(rng, n_layer=2, n_head=4, longest=40):
    groups = [n for n in (1, 2, 4) if n_head % n == 0]
    layers = []
    for _ in range(rng.randint(1, n_layer)):
        rules = [random_rule(rng, longest) for _ in range(rng.choice(groups))]
        layers.append("/".join(rules))
    return ",".join(layers)


def test_dilation_1_equals_dense():
    """Whatever allows every earlier position is plain causal attention."""
    model = tiny()
    idx = torch.randint(50, (2, 70))
    dense = model(idx)
    for pattern in ("D1W3S2", "W69", "S70", "D1,D1", "D1/D1", "D1W5/D1S3,W69", "N8K9",
                    "N60K2,D1/N70K1"):
        assert_same(pattern, model(idx, pattern), dense)


def test_decay_0_gives_plain_attention():
    """A gate that always says 0 switches the recurrence off; the layer's own gate matters."""
    model = tiny()
    plain = tiny(recurrence=False)
    weights = model.state_dict()
    for i in range(2):
        name = f"blocks.{i}.mix.in_proj.weight"
        weights[name] = weights[name][:4 * 32]                  # o, q, k, v
    plain.load_state_dict(weights)
    idx = torch.randint(50, (2, 40))
    assert_differ("with and without recurrence", model(idx), plain(idx))

    def forget(module, inputs, parts):
        return parts._replace(g=torch.full_like(parts.g, -1e4))

    for block in model.blocks:
        block.mix.in_proj.register_forward_hook(forget)
    for pattern in ("D1", "D8W3"):
        assert_same(pattern, model(idx, pattern), plain(idx, pattern))
    parts = plain.blocks[0].mix.in_proj(torch.randn(1, 3, 32))
    assert parts.g is None and plain.config.name == "attention-only" and model.config.name == "RAT+"


@pytest.mark.parametrize("seed", range(8))
def test_no_future_leak(seed):
    """Changing token j moves no logit before j, and does move one from j on."""
    rng = random.Random(seed)
    pattern = random_pattern(rng)
    assert_no_leak(tiny(recurrence=seed % 3 > 0), pattern, rng.randrange(1, 40))


TOPK = ["N8K3", "D8N8K3:minmax", "D4W3S2N8K2:last", "W5N16K2", "D1,N16K4:minmax", "D1/N16K4:last",
        "D8/D16N8K2,N7K5:minmax/W3"]


@pytest.mark.parametrize("pattern", TOPK)
def test_topk_patterns_leak_no_future_and_train_every_weight(pattern):
    model = tiny()
    assert_no_leak(model, pattern, 33)
    for name, gradient in gradients(model, torch.randint(50, (2, 40)), pattern).items():
        assert gradient.isfinite().all() and gradient.norm() > 0, name


def assert_no_leak(model, pattern, j):
    idx = torch.randint(50, (1, 40))
    other = idx.clone()
    other[0, j] = (other[0, j] + 1) % 50
    with torch.no_grad():
        before = model(idx, pattern)
        after = model(other, pattern)
    assert before[:, :j].equal(after[:, :j]), f"{pattern}: token {j} changed an earlier logit"
    assert not before[:, j:].equal(after[:, j:]), f"{pattern}: token {j} changed nothing"


def test_patterns_differ_from_one_another():
    model = tiny(recurrence=False)
    idx = torch.randint(50, (1, 60))
    patterns = "D1", "D8", "W8S2", "D8W8S2", "W8", "D8S2", "D1,D8", "D1/D8", "N8K3", "D8N8K3"
    logits = {pattern: model(idx, pattern) for pattern in patterns}
    for a, b in itertools.combinations(patterns, 2):
        assert_differ(f"{a} and {b}", logits[a], logits[b])


def test_hybrid_heads_are_each_head_by_itself():
    """One layer's mixing under D1/D4/N4K3/D8S2 is, head by head, that under each rule alone."""
    mix = tiny().blocks[1].mix
    x = torch.randn(2, 30, 32)
    rope = rope_angles(torch.arange(30), 8)
    seen = []

    def look(module, inputs, output):
        seen.append(inputs[0].view(2, 30, 4, 8))

    mix.out_proj.register_forward_hook(look)
    for pattern in ("D1/D4/N4K3/D8S2", "D1", "D4", "N4K3", "D8S2"):
        mix(x, rope, Pattern.parse(pattern).groups(1))
    for head in range(4):
        assert_same(f"head {head}", seen[0][:, :, head], seen[head + 1][:, :, head], 1e-6)


def test_hybrid_layers_are_each_layer_by_itself():
    """The list of layers is cycled: three layers under two rules."""
    model = tiny(n_layer=3)
    idx = torch.randint(50, (1, 30))
    rope = rope_angles(torch.arange(30), 8)
    x = model.embed(idx)
    for block, rule in zip(model.blocks, ("D4W2", "D1/D8", "D4W2")):
        x = block(x, rope, Pattern.parse(rule).groups(0))
    assert_same("logits", model(idx, "D4W2,D1/D8"), model.head(x), 1e-6)


def test_loss_is_the_mean_over_targets_that_count(device):
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx, targets = torch.randint(50, (2, 2, 9), device=device)
    targets[0, :4] = -100
    logp = model(idx, "D4").log_softmax(-1)
    counted = targets >= 0
    picked = logp[counted].gather(1, targets[counted][:, None])
    loss = model.loss(idx, targets, "D4")
    assert_same("loss", loss, -picked.mean())
    assert_same("loss of int32 targets", model.loss(idx, targets.int(), "D4"), loss, 0)
    assert loss.dtype == torch.float32
    marked = targets.masked_fill(targets == -100, -1)
    assert_same("loss of targets that -1 marks", model.loss(idx, marked, "D4"), loss, 0)
    nothing = model.loss(idx, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing == 0 and model.embed.weight.grad.norm() == 0


@pytest.mark.parametrize("wrong", [-2, 50, 10**9])
def test_targets_outside_the_vocabulary_are_never_counted_in_silence(device, wrong):
    """An error on a CPU; NaN where an error would have to wait for the device."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (2, 8), device=device)
    targets = idx.clone()
    targets[1, 3] = wrong
    if device == "cuda":
        assert model.loss(idx, targets).isnan()
        return
    with pytest.raises(ValueError, match=rf"\[0, 50\), not \[{wrong}\]"):
        model.loss(idx, targets)


def test_loss_under_autocast_is_close_and_float32(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float16       # see test_kernels.HALF
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (1, 17), device=device)
    with torch.autocast(device, dtype):
        loss = model.loss(idx[:, :-1], idx[:, 1:], "D8W4")
    loss.backward()
    assert loss.dtype == torch.float32 and model.embed.weight.grad.dtype == torch.float32
    assert_same("loss", loss, model.loss(idx[:, :-1], idx[:, 1:], "D8W4"), 0.03)


@pytest.mark.parametrize("pattern", ["D4W3S1/W2,D1", "N4K2,D4N4K2:minmax"])
def test_checkpointing_gives_the_same_gradients(device, pattern):
    by_kernels = model_py.on_kernels(torch.empty(1, device=device))
    if "K" in pattern and by_kernels and not hasattr(model_py.kernels, "attention_topk"):
        pytest.skip("top-k blocks have no kernel yet")
    model = tiny(n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (1, 10), device=device)
    expected = gradients(model, idx, pattern)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.checkpointing = True
    for name, gradient in gradients(model, idx, pattern).items():
        assert_same(f"gradient of {name}", gradient, expected[name])
    assert len(calls) == 2, "a block runs twice, in forward and in backward"


def test_double_backward_is_right_in_float64():
    """A Hessian-vector product of the loss against differences of the gradient."""
    model = tiny(n_layer=1, n_head=2, n_embd=8).double()
    idx = torch.randint(50, (2, 9))
    weights = list(model.parameters())
    direction = [torch.randn_like(p) for p in weights]

    def gradient(step):
        moved = [p + step * d for p, d in zip(weights, direction)]
        names = [f"model.{name}" for name, _ in model.named_parameters()]
        loss = torch.func.functional_call(Loss(model), dict(zip(names, moved)), (idx,))
        return torch.autograd.grad(loss, moved, create_graph=True)

    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels differentiate once
        product = sum((d * g).sum() for d, g in zip(direction, gradient(0.0)))
        found = torch.autograd.grad(product, weights)
        ahead, behind = gradient(1e-6), gradient(-1e-6)
    for (name, _), x, a, b in zip(model.named_parameters(), found, ahead, behind):
        assert_same(f"Hessian of {name}", x, (a - b) / 2e-6)


class Loss(torch.nn.Module):
    """Predicting the next token, as a module that can be called with other weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx):
        return self.model.loss(idx[:, :-1], idx[:, 1:], "D4W2S1")


@pytest.mark.parametrize("op", ["loss", "recurrence", "attention"])
def test_double_backward_by_kernels_is_an_error(kernels_on, op):
    """Never a wrong number in silence, whichever other way leads back to the leaf."""
    model = tiny(n_layer=1, n_head=2, n_embd=16, recurrence=False).to(kernels_on)
    idx = torch.randint(50, (1, 9), device=kernels_on)
    x = torch.randn(3, 1, 2, 9, 8, device=kernels_on, requires_grad=True)
    leaf = model.embed.weight if op == "loss" else x
    with sdpa_kernel(SDPBackend.MATH):  # dense attention differentiates twice so
        y = {"loss": lambda: model.loss(idx, idx),
             "recurrence": lambda: recurrence(*x[:, 0])[0],
             "attention": lambda: attention(*x, 4, 2, 1)}[op]()
        with pytest.raises(RuntimeError, match="second derivative|no autograd formula"):
            first, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            torch.autograd.grad(first.square().sum(), leaf)


def test_overfits_one_batch():
    """ARL's two passes in turn: a batch of random tokens is learnt by heart."""
    model = RATPlus(RATConfig(50, 1, 2, 32))
    idx = torch.randint(50, (2, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for pattern in ("D8", "D1") * 70:
        loss = model.loss(idx[:, :-1], idx[:, 1:], pattern)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"loss {loss:.3f}"


@pytest.mark.parametrize("sizes", [(50, 0, 1, 8), (50, 1, 3, 8), (50, 1, 8, 8), (0, 1, 1, 8),
                                   (50, 1, -2, 8)], ids=str)
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="n_embd .* n_head heads") as error:
        RATConfig(*sizes)
    one_line(error)


def test_presets_are_the_papers_shapes():
    widths = {"paper-1.5b": (24, 2048), "paper-2.6b": (28, 2560), "paper-7.6b": (32, 4096)}
    for name, (layers, width) in widths.items():
        config = RATConfig(32000, **PRESETS[name])
        assert (config.n_layer, config.n_embd, config.head_width) == (layers, width, 128)
        with torch.device("meta"):
            count = sum(p.numel() for p in RATPlus(config).parameters())
        assert count == pytest.approx(1e9 * float(name[6:-1]), rel=0.05)


def test_empty_batches_give_empty_results(device):
    model = tiny(n_head=2, n_embd=16).to(device)
    idx = torch.zeros(0, 6, dtype=torch.long, device=device)
    assert model(idx, "D4W2").shape == (0, 6, 50)
    loss = model.loss(idx, idx, "D4W2")
    loss.backward()
    assert loss == 0 and all(p.grad.norm() == 0 for p in model.parameters())
    assert model.generate(idx, 3, "D4W2").shape == (0, 9)
    assert model.new_cache(0, 9, "D4W2").nbytes == 0


def test_both_paths_have_the_gradients_of_float64(device):
    """Of every weight; and what computes is said in words."""
    idx = torch.randint(50, (2, 17))
    pattern = "D4W3S1,D1/W2"
    expected = gradients(tiny(n_head=2, n_embd=16).double(), idx, pattern)
    model = tiny(n_head=2, n_embd=16).to(device)
    for name, gradient in gradients(model, idx.to(device), pattern).items():
        assert_same(f"gradient of {name}", gradient.cpu(), expected[name])
    told = "Triton" if model_py.on_kernels(model.embed.weight) else f"plain PyTorch on {device}"
    assert model_py.path(device).startswith(told)


def test_without_kernels_py_the_model_trains_generates_and_saves(tmp_path, monkeypatch):
    """Nor any other file of the project."""
    for name in ("kernels", "train", "adapt", "eval", "sample"):
        monkeypatch.setitem(sys.modules, name, None)            # importing it is an ImportError
    spec = importlib.util.spec_from_file_location("alone", ROOT / "model.py")
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", alone)            # dataclasses look there
    spec.loader.exec_module(alone)
    assert alone.kernels is None and alone.path("cpu") == "plain PyTorch on cpu"
    model = alone.RATPlus(alone.RATConfig(50, 2, 2, 16))
    idx = torch.randint(50, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for pattern in ("D4", "D1"):
        loss = model.loss(idx[:, :-1], idx[:, 1:], pattern)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = model.generate(idx, 8, "D4W2S1", temperature=0)
    alone.save_checkpoint(tmp_path / "a.pt", model)
    loaded, _ = load_checkpoint(tmp_path / "a.pt")
    assert tokens.equal(loaded.generate(idx, 8, "D4W2S1", temperature=0))


# ---------------------------------------------------------------------------------------------
# Refusals: one line that names the argument, the same on both paths

def refusals(device):
    k = torch.randn(3, 9, 8, device=device)
    x = torch.randn(2, 2, 9, 8, device=device)
    cos, sin = rope_angles(torch.arange(9, device=device), 8)
    idx = torch.randint(50, (2, 9), device=device)
    model = tiny(n_layer=1).to(device)
    one = torch.zeros(1, 8, device=device)
    three = torch.zeros(3, 8, device=device)
    return {
        "state of batch 1": ("state", lambda: recurrence(k, k, k, (one, one))),
        "state v of batch 1": ("state", lambda: recurrence(k, k, k, (three, one))),
        "state of 4 channels": ("state", lambda: recurrence(k, k, k, (three[:, :4], three[:, :4]))),
        "g of another length": ("recurrence", lambda: recurrence(k, k, k[:, :8])),
        "k of another width": ("recurrence", lambda: recurrence(k[..., :1], k, k)),
        "no steps": ("recurrence", lambda: recurrence(k[:, :0], k[:, :0], k[:, :0])),
        "cos of other positions": ("cos", lambda: rotate(x, cos[:8], sin[:8])),
        "cos of other channels": ("cos", lambda: rotate(x, cos[:, :1], sin[:, :1])),
        "sin of another shape": ("sin", lambda: rotate(x, cos, sin[:1])),
        "cos of another dtype": ("cos", lambda: rotate(x, cos.half(), sin.half())),
        "k_rec of another length": ("k_rec", lambda: attention(x, x[:, :, :8], x, 4, 0, 0)),
        "v_rec of other heads": ("v_rec", lambda: attention(x, x, x[:, :1], 4, 0, 0)),
        "v_rec of another dtype": ("v_rec", lambda: attention(x, x, x.half(), 4, 0, 0)),
        "negative window": ("window", lambda: attention(x, x, x, 4, -1, 0)),
        "targets of T - 1": ("targets", lambda: model.loss(idx, idx[:, 1:])),
        "targets of one row": ("targets", lambda: model.loss(idx, idx[:1])),
        "flat targets": ("targets", lambda: model.loss(idx, idx.flatten())),
        "no tokens": ("tokens", lambda: model(idx[:, :0])),
        "flat tokens": ("tokens", lambda: model(idx[0])),
    }


@pytest.mark.parametrize("name", refusals("cpu"))
def test_wrong_arguments_are_refused_in_one_line(device, name):
    argument, call = refusals(device)[name]
    with pytest.raises(ValueError, match=argument) as error:
        call()
    one_line(error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a second device")
def test_tensors_of_two_devices_are_refused():
    k = torch.randn(3, 9, 8, device="cuda")
    x = torch.randn(2, 2, 9, 8, device="cuda")
    cos, sin = rope_angles(torch.arange(9), 8)
    idx = torch.randint(50, (2, 9), device="cuda")
    state = torch.zeros(2, 3, 8)
    for call in (lambda: recurrence(k, k, k.cpu()), lambda: recurrence(k, k, k, state),
                 lambda: rotate(x, cos, sin), lambda: attention(x, x, x.cpu(), 4, 0, 0),
                 lambda: tiny().cuda().loss(idx, idx.cpu())):
        with pytest.raises(ValueError, match="cuda") as error:
            call()
        one_line(error)


# ---------------------------------------------------------------------------------------------
# Patterns

CANONICAL = ["D16", "D1", "D16W256S4", "W1024S4", "D1,D64", "D1/D64", "N64K16", "N64K16:minmax",
             "D64N64K8:last", "W0", "S4", "D4W2/D8S1,W3/N4K2:minmax", "D999999999"]


@pytest.mark.parametrize("text", CANONICAL)
def test_patterns_print_as_they_were_written(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text and Pattern.parse(pattern) is pattern
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text, canonical", [
    ("D16W0S0", "D16"), ("D016", "D16"), ("W0S0", "W0"), ("S0", "W0"), ("D1W0,W5S0", "D1,W5"),
    ("N64K16:mean", "N64K16")])
def test_patterns_have_one_canonical_text(text, canonical):
    assert str(Pattern.parse(text)) == canonical
    assert Pattern.parse(text) == Pattern.parse(canonical)


def test_the_score_is_part_of_the_pattern():
    pattern = Pattern.parse("D16,N64K16,N64K16:last,N8K2:minmax")
    scores = [rules[0].score for rules in pattern.layers]
    assert scores == ["mean", "mean", "last", "minmax"]
    assert Pattern.parse("N64K16") != Pattern.parse("N64K16:last")


def test_random_patterns_round_trip():
    rng = random.Random(0)
    for _ in range(100):
        pattern = Pattern.parse(random_pattern(rng))
        assert Pattern.parse(str(pattern)) == pattern


MALFORMED = ["", " ", "D", "W", "S", "D-1", "D0", "D16D16", "S4W2", "W2D4", "16", "d16", "D16 ",
             " D16", "D1, D4", "D1,", ",D1", "D1//D4", "/", "D1/", "K16", "N64", "N0K4", "N4K0",
             "K4N4", "D1.5", "D1e9", "1e9", "D+4", "D16x", "D16;D4", "D16\n", "D٣", "D9999999999",
             "W" + "9" * 5000, "X4", "D16W", "none", "D1|D4", "N4K2:", ":mean", "N4K2:max",
             "N4K2:Mean", "N4K2: mean", "D16:mean", "W0:last", "N4K2:mean:last",
             "N4K2:last,D4:last", None, 16, 1e9, ["D1"]]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text)[:20])
def test_malformed_patterns_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        Pattern.parse(text)
    message = one_line(error)
    assert repr(text)[:99] in message and "A right one is" in message, message


@pytest.mark.parametrize("pattern, reason", [
    ("D1,D2,D4", "3 layers are named, the model has 2"),
    ("D1/D2/D4", "3 head groups do not divide 4 heads"),
    ("D1,D1/D2/D4", "3 head groups do not divide 4 heads")])
def test_patterns_that_do_not_fit_the_model_are_refused(pattern, reason):
    model = tiny()
    idx = torch.zeros(1, 4, dtype=torch.long)
    for call in (lambda: Pattern.parse(pattern).fit(model.config), lambda: model(idx, pattern),
                 lambda: model.loss(idx, idx, pattern), lambda: model.new_cache(1, 8, pattern),
                 lambda: model.generate(idx, 2, pattern)):
        with pytest.raises(ValueError, match=reason) as error:
            call()
        one_line(error)


def test_a_mask_is_the_rule_of_its_layer_and_group():
    t = torch.arange(9)
    hybrid = Pattern.parse("D1/D4S1,W3")
    spans = {(0, 0): (1, 0, 0), (0, 1): (4, 0, 1), (1, 0): (0, 3, 0), (2, 1): (4, 0, 1)}
    for place, span in spans.items():
        assert hybrid.mask(9, *place).equal(allowed(t[:, None], t, *span)), place
    with pytest.raises(ValueError, match="top-k blocks follow the data"):
        Pattern.parse("D64N64K16").mask(9)


def test_model_py_draws_a_pattern(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *arguments])
        runpy.run_path(str(ROOT / "model.py"), run_name="__main__")

    run("D4W1S2", "9")
    assert "   8 S S . D . . . D W" in capsys.readouterr().out.splitlines()
    for arguments, why in ((["D-1"], "D-1"), (["N4K2"], "N4K2"), (["D4", "-5"], "-5"),
                           (["D4", "x"], "x"), (["D4", "9" * 20], "1 to 1000"), ([], "usage")):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert why in stop.value.code and "\n" not in stop.value.code, "a text: exit status 1"


# ---------------------------------------------------------------------------------------------
# Checkpoints

def assert_same_model(a, b):
    assert a.config == b.config
    expected = b.state_dict()
    for name, x in a.state_dict().items():
        assert x.equal(expected[name]), name


@pytest.mark.parametrize("recurrence", [True, False])
def test_checkpoint_round_trip(tmp_path, recurrence):
    model = tiny(recurrence=recurrence)
    path = tmp_path / "a.pt"
    meta = dict(step=7, pattern="D16", nested={"lr": [0.1, None, "x"]}, state=torch.arange(3))
    save_checkpoint(path, model, **meta, config="is the model's own")
    loaded, found = load_checkpoint(path)
    assert_same_model(loaded, model)
    assert found.pop("state").equal(meta.pop("state"))
    assert found == {**meta, "tokenizer": "ids"}
    assert os.listdir(tmp_path) == ["a.pt"], "no temporary file stays"
    for name, gradient in gradients(loaded, torch.zeros(1, 4, dtype=torch.long), "D1").items():
        assert gradient.isfinite().all(), f"it can be trained: {name}"


def test_the_optimizer_is_read_only_for_training(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, tiny(), optimizer={"moment": torch.ones(3)}, step=2)
    _, meta = load_checkpoint(path)
    assert "optimizer" not in meta and meta["step"] == 2
    _, meta = load_checkpoint(path, training=True)
    assert meta["optimizer"]["moment"].equal(torch.ones(3))


def test_loaded_weights_are_float32_whatever_the_file_holds(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path / "a.pt", model.bfloat16())
    loaded, _ = load_checkpoint(tmp_path / "a.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_same_model(loaded.bfloat16(), model)


def test_a_compiled_model_is_saved_as_itself(tmp_path):
    model = tiny()
    save_checkpoint(tmp_path / "whole.pt", torch.compile(model, backend="eager"))
    model.compile(backend="eager")                              # each block by itself
    save_checkpoint(tmp_path / "blocks.pt", model)
    for name in ("whole.pt", "blocks.pt"):
        assert_same_model(load_checkpoint(tmp_path / name)[0], model)


def test_loading_spends_no_random_numbers(tmp_path):
    save_checkpoint(tmp_path / "a.pt", tiny())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_checkpoint(tmp_path / "a.pt")
    assert torch.rand(3).equal(expected)


def test_the_authors_checkpoint_loads_in_every_form(tmp_path, golden):
    """Rows of the gate apart, torch.compile's prefix, half precision; easydict is not needed."""
    assert "easydict" not in sys.modules
    state = authors("state/")
    split = {}
    for name, tensor in state.items():
        split[name] = tensor
        if "in_proj" in name:
            split[name] = tensor[:128]
            split[name.replace("in_proj", "fgate_proj")] = tensor[128:]
    forms = {
        "task": state,
        "split": split,
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in split.items()},
        "half": {name: tensor.bfloat16() for name, tensor in state.items()},
    }
    for form, weights in forms.items():
        path = tmp_path / f"{form}.pth"
        torch.save({"task": weights, "config": AUTHORS_CONFIG, "step": 3}, path)
        model, meta = load_checkpoint(path)
        assert meta == {"tokenizer": "ids", "pattern": "D1", "step": 3}
        assert model.embed.weight.dtype == torch.float32
        if form == "half":
            assert_same("embed", model.embed.weight, golden["rat"].embed.weight, 1e-2)
        else:
            assert_same_model(model, golden["rat"])


@pytest.mark.parametrize("form", ["bare", "task"])
def test_weights_only_files_have_heads_of_128(tmp_path, form):
    C = 256
    shapes = {
        "seq_layer.input_norm": (C,),
        "seq_layer.in_proj": (5 * C, C),
        "seq_layer.out_proj": (C, C),
        "hidden_layer.ln": (C,),
        "hidden_layer.fc1": (4 * C, C),
        "hidden_layer.fc2": (C, 4 * C),
    }
    state = {}
    for name, shape in shapes.items():
        state[f"backbone.layers.0.{name}.weight"] = torch.randn(shape)
    state["embedding.wte.weight"] = torch.randn(64, C)
    state["backbone.ln.weight"] = torch.ones(C)
    torch.save(state if form == "bare" else {"task": state}, tmp_path / "w.pth")
    model, _ = load_checkpoint(tmp_path / "w.pth")
    assert model.config == RATConfig(64, 1, 2, C, True)
    assert model.embed.weight.equal(state["embedding.wte.weight"])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + Bomb.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    Bomb.path = str(tmp_path / "exploded")
    torch.save({"task": authors("state/"), "config": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "bomb.pth")
    assert not os.path.exists(Bomb.path)


def broken_files(tmp_path):
    """{name: bytes or an object for torch.save} of files that are no checkpoint."""
    save_checkpoint(tmp_path / "good.pt", tiny())
    good = (tmp_path / "good.pt").read_bytes()
    whole = torch.load(tmp_path / "good.pt", weights_only=True)
    state = authors("state/")
    embed = state["embedding.wte.weight"]

    def with_config(**changes):
        return {**whole, "config": {**whole["config"], **changes}}

    return {
        "empty": b"",
        "half": good[:len(good) // 2],
        "tail": good[:-1],
        "authors_half": (GOLDEN / "official_tiny.pth").read_bytes()[:1000],
        "text": b"not a checkpoint\n",
        "pickle": pickle.dumps({"a": 1}),
        "list": [1, 2],
        "number": 3,
        "dict": {"a": torch.ones(2)},
        "missing": {**whole, "model": {}},
        "shape": with_config(n_embd=64),
        "unknown_field": with_config(dropout=0.1),
        "bad_config": with_config(n_head=5),
        "no_config": {**whole, "config": None},
        "untied": {"task": {**state, "head.lm_head.weight": embed + 1}, "config": AUTHORS_CONFIG},
        "no_layers": {"task": {"embedding.wte.weight": torch.ones(4, 256)}},
    }


def test_broken_and_foreign_checkpoints_are_refused_in_one_line(tmp_path):
    for name, data in broken_files(tmp_path).items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(path) in one_line(error), name
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, tiny(), step=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, tiny(), step=2, bad=lambda: None)         # can't be pickled
    resource = pytest.importorskip("resource", reason="no file size limits on this platform")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))   # as a full disk
        with pytest.raises(OSError, match="is not saved") as error:
            save_checkpoint(path, tiny(), step=3)
        one_line(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(path)[1]["step"] == 1 and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_kill_9_during_a_save_leaves_a_good_checkpoint(tmp_path):
    """A child that only saves is killed at random moments. The file is whole and not older."""
    path = tmp_path / "a.pt"
    model = RATPlus(RATConfig(5000, 1, 1, 64))
    rng = random.Random(0)
    step = 0
    for _ in range(8):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for i in itertools.count(step + 1):
                    save_checkpoint(path, model, step=i)
                    os.write(writer, b".")
            finally:
                os._exit(1)
        os.read(reader, 1)                                      # the first one is saved
        time.sleep(0.05 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        saved = 1 + len(os.read(reader, 2**16))
        os.close(reader)
        loaded, meta = load_checkpoint(path)
        assert meta["step"] >= step + saved
        assert_same_model(loaded, model)
        step = meta["step"]
