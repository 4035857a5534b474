"""The kernels of top-k blocks, interpreted or on a GPU, against the definition in float64."""
import math

import pytest
import torch

import model
import kernels as topk
from model import Group, Layout, Rule, TopkCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3}


def relative_error(x, ref):
    x, ref = x.double(), ref.double()
    return ((x - ref).norm() / ref.norm().clamp(min=1)).item()


#         B   T    n   dilation, window, sinks, block, topk, score
CASES = [(2, 70, 70, 0, 0, 0, 8, 3, "mean"),               # N divides no T
         (1, 64, 64, 0, 0, 0, 16, 1, "mean"),              # K 1: its own block alone
         (1, 70, 70, 0, 0, 0, 16, 99, "last"),             # more than all blocks: dense
         (1, 40, 110, 8, 0, 0, 8, 4, "minmax"),            # a chunk of a longer sequence
         (2, 70, 70, 4, 20, 9, 7, 3, "mean"),              # the grid crosses the blocks
         (1, 80, 80, 0, 30, 4, 16, 2, "minmax"),           # a window and sinks, no grid
         (1, 150, 150, 0, 0, 0, 70, 2, "last"),            # a block of more than one tile
         (1, 20, 20, 5, 0, 0, 1, 6, "mean"),               # blocks of one position
         (1, 20, 20, 0, 3, 0, 50, 2, "mean")]              # a block larger than the text


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """All memory that the kernels are given holds NaN, or an integer that is no index."""
    torch.manual_seed(0)

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else 10**8)
        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def whole_summaries(k, block, score):
    """Of all blocks before the last position's."""
    block = min(block, k.shape[2])
    return model.block_summaries(k[:, :, :(k.shape[2] - 1) // block * block], block, score)


def choice(words, T, n, block):
    """(B * H, T, blocks) bool: what the words say, of the query's own block and those before."""
    taken = ((words[..., None] >> torch.arange(64, device=DEVICE)) & 1).flatten(2)[..., :T].mT > 0
    own = torch.arange(n - T, n, device=DEVICE)[:, None] // block
    return taken & (torch.arange(words.shape[1], device=DEVICE) <= own)


def best_blocks(scores, own, K):
    """(T, blocks) bool by a loop: a query's own block, then the best; of equals the first."""
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        order = sorted(range(own[t]), key=lambda b: -row[b])
        taken[t, [own[t], *order[:K - 1]]] = True
    return taken


@pytest.mark.parametrize("T, n, block, K, score, levels", [
    (100, 100, 8, 3, "mean", 0), (70, 150, 7, 4, "minmax", 0), (65, 65, 8, 20, "last", 0),
    (100, 100, 4, 5, "mean", 2),                           # scores of few values: many are equal
    (8, 330, 1, 12, "last", 0),
    (8, 140, 1, 12, "last", 3)])                           # the same over several tiles
def test_choice_is_the_best_blocks_and_of_equals_the_first(T, n, block, K, score, levels):
    """Every query's blocks, and the lists: each pair once, in the order of queries."""
    heads = 1 if levels else 2                             # ties take long in the interpreter
    q, k = randn(1, heads, T, 16), randn(1, heads, n, 16)
    if levels:                                             # exact sums, so that ties are exact
        q, k = (x.mul(levels / 2).round() * (torch.arange(16, device=DEVICE) < 2) for x in (q, k))
    check_choice(q, k, block, K, score)


def test_choice_where_the_best_blocks_share_a_lane():
    """The first pass keeps four scores a lane; here one lane holds all that should be chosen."""
    k = randn(1, 1, 600, 16)
    k[:, :, 5::64] *= 10                                   # with N 1, lane 5 of each tile of 64
    k[:, :, 5::64, 0] = 50
    q = randn(1, 1, 3, 16)
    q[..., 0] = 1
    check_choice(q, k, 1, 8, "last")


def check_choice(q, k, block, K, score):
    T, n = q.shape[2], k.shape[2]
    summaries = whole_summaries(k, block, score)
    words, pairs, ends = topk.choose_blocks(q, summaries, n, block, K)
    words = words.flatten(0, 1)
    taken = choice(words, T, n, block)
    own = [t // block for t in range(n - T, n)]
    scores = model.block_scores(q, summaries, score).flatten(0, 1)
    scores = torch.nn.functional.pad(scores, (0, 1))       # room for the last query's own block
    for head in range(len(taken)):
        expected = best_blocks(scores[head], own, K)
        assert taken[head].equal(expected), f"head {head}: {(taken[head] != expected).sum()} differ"
    queries = taken.mT.nonzero()                           # by head, block, query
    total = ends[-1].item()
    assert total == len(queries) and (pairs[:total] // K).equal(queries[:, 2].int()), "the lists"
    slots = torch.stack((queries[:, 0] * T * K, pairs[:total])).sum(0)
    assert len(slots.unique()) == total, "two pairs share a row"


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("B, T, n, dilation, window, sinks, block, K, score", CASES)
def test_attention_and_every_gradient(B, T, n, dilation, window, sinks, block, K, score, dtype):
    if dtype == torch.float16 and block != 7:
        pytest.skip("one case in float16 is enough")
    rule = Rule(dilation, window, sinks, block, K, score)
    q = randn(B, T, 2, 16, dtype=dtype).transpose(1, 2)    # no tensor is contiguous
    k, v = (randn(B, n, 2, 16, dtype=dtype).transpose(1, 2) for _ in "kv")
    check_attention(q, k, v, rule, LIMITS[dtype])


def attend(q, k, v, rule):
    summaries = whole_summaries(k.detach(), rule.block, rule.score)
    return topk.attention_topk(q, k, v, rule, summaries)


def attend_plainly(q, k, v, rule):
    """The last queries of k's positions, by the definition."""
    T, n = q.shape[2], k.shape[2]
    rule = rule.within(n)
    padded = torch.nn.functional.pad(k.detach(), (0, 0, 0, -n % rule.block))
    summaries = model.block_summaries(padded, rule.block, rule.score)
    return model.attention_topk(q, k, v, summaries, torch.arange(n - T, n, device=DEVICE), rule)


def check_attention(q, k, v, rule, limit):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y = attend(*inputs, rule)
    y64 = attend_plainly(*exact, rule)
    dy = randn(*y.shape)
    grads = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    grads64 = torch.autograd.grad(y64, exact, dy.double())
    for name, x, x64 in zip(("y", "dq", "dk", "dv"), (y, *grads), (y64, *grads64)):
        error = relative_error(x, x64)
        assert error < limit, f"{name} has relative error {error:.1e}"


def test_attention_of_a_width_that_is_no_power_of_2():
    q, k, v = (randn(1, 1, 50, 24) for _ in "qkv")
    check_attention(q, k, v, Rule(8, 4, 0, 8, 3, "minmax"), 1e-5)


def test_attention_of_wide_heads():
    q, k, v = (randn(1, 1, 30, 128) for _ in "qkv")        # 512 bytes: other tiles
    check_attention(q, k, v, Rule(8, 4, 0, 20, 2), 1e-5)


def test_long_calls_are_cut_and_give_the_same(monkeypatch):
    monkeypatch.setattr(topk, "PARTS_BYTES", 0)
    monkeypatch.setattr(topk, "LEAST_QUERIES", 64)
    q, k, v = (randn(1, 1, 150, 16) for _ in "qkv")
    check_attention(q, k, v, Rule(16, 0, 0, 16, 3), 1e-5)


def test_the_same_input_gives_the_same_gradients_to_the_bit():
    T = 80 if DEVICE == "cuda" else 20                     # the interpreter runs one by one anyway
    q, k, v = (randn(1, 2, T, 16).requires_grad_() for _ in "qkv")

    def gradients():
        y = attend(q, k, v, Rule(8, 5, 0, 8, 3))
        return torch.autograd.grad(y.square().sum(), (q, k, v))

    for name, first, second in zip("qkv", gradients(), gradients()):
        assert first.equal(second), f"d{name} differs"


def test_keys_that_no_query_chose_are_not_read():
    q, k, v = randn(1, 1, 16, 16), randn(1, 1, 160, 16), randn(1, 1, 160, 16)
    rule = Rule(8, 0, 0, 8, 3)
    summaries = whole_summaries(k, 8, "mean")
    before = topk.attention_topk(q, k, v, rule, summaries)
    words = topk.choose_blocks(q, summaries, 160, 8, 3)[0].flatten(0, 1)
    free = ~choice(words, 16, 160, 8).any((0, 1))
    assert free[:18].any()
    for x in (k, v):
        x.view(20, 8, 16)[free, :7] = math.nan             # all but the granted last position
    after = topk.attention_topk(q, k, v, rule, summaries)
    assert before.equal(after), "y changed"


def test_the_operator_is_sound():
    """Schema, shapes of the fake, autograd registration: what torch.compile relies on."""
    q, k, v = (randn(1, 1, 20, 16).requires_grad_() for _ in "qkv")
    arguments = q, k, v, whole_summaries(k.detach(), 8, "mean"), [8, 0, 0, 8, 2]
    torch.library.opcheck(topk.topk_operator, arguments,
                          test_utils=("test_schema", "test_autograd_registration"))
    outputs = topk.topk_operator(*arguments)
    for real, fake in zip(outputs, topk.new_topk(*arguments), strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


#               dilation, window, sinks, block, topk, score, splits
STEPS = [(0, 0, 0, 3, 2, "mean", None), (5, 0, 0, 3, 2, "minmax", 3), (4, 4, 2, 3, 2, "last", 2)]


def new_cache(rule, max_len, dtype, B=1, h=2, Dh=16):
    state = torch.ones(2, B, h, Dh, device=DEVICE, dtype=dtype)
    like = torch.zeros(B, h, 0, Dh, device=DEVICE, dtype=dtype)
    return TopkCache(Group(rule), Layout(rule, max_len), like, state)


@pytest.mark.parametrize("dilation, window, sinks, block, K, score, splits", STEPS)
def test_decoding_is_the_plain_step(dilation, window, sinks, block, K, score, splits):
    """y, caches, state at every position, across full blocks. Nothing after the token is read."""
    rule = Rule(dilation, window, sinks, block, K, score)
    max_len = 4 * block
    ours = new_cache(rule, max_len, torch.float32)
    exact = new_cache(rule, max_len, torch.float64)
    for cache in ours.tensors:
        cache.fill_(math.nan)
    for t in range(max_len):
        token = model.Projected(*randn(5, 1, 2, 16))
        angle = torch.rand(1, 8, device=DEVICE)
        seen = torch.tensor([t], device=DEVICE)
        rope = angle.cos(), angle.sin()
        y = topk.decode_topk(token, ours, rope, seen, splits)
        y64 = exact.step(token.map(torch.Tensor.double), rope, seen)
        assert relative_error(y, y64) < 1e-5, f"y at position {t}"
    for name in ("k", "v", "state"):
        error = relative_error(getattr(ours, name), getattr(exact, name))
        assert error < 1e-5, f"{name} {error}"
    error = relative_error(ours.summaries[:, :, :3], exact.summaries[:, :, :3])
    assert error < 1e-5, f"summaries {error}"              # the last is written when it is first scored


@pytest.mark.parametrize("score", model.SCORES)
def test_decoding_gives_what_the_sequence_gives(score):
    """Without recurrence and with an open gate, a step's y is the sequence's attention."""
    T = 12
    rule = Rule(5, 0, 0, 3, 2, score)
    q, k, v = (randn(1, 2, T, 16) for _ in "qkv")
    y = attend(q, k, v, rule)
    cache = new_cache(rule, T, torch.float32)
    still = torch.ones(1, 8, device=DEVICE), torch.zeros(1, 8, device=DEVICE)
    for t in range(T):
        gate = torch.full_like(q[:, :, t], 100)
        token = model.Projected(gate, q[:, :, t], k[:, :, t], v[:, :, t], None)
        step = topk.decode_topk(token, cache, still, torch.tensor([t], device=DEVICE))
        assert relative_error(step, y[:, :, t]) < 1e-5, f"position {t}"


def test_a_batch_of_no_sequences_is_empty():
    q, k, v = (randn(0, 2, 20, 16) for _ in "qkv")
    assert attend(q, k, v, Rule(0, 0, 0, 5, 2, "mean")).shape == (0, 2, 20, 16)
