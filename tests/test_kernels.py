"""The operations, plain and by kernels, against loops in float64: outputs, gradients by name."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kernels
import model
from model import (Cache, Mixing, Pattern, RATConfig, RATPlus, Rule, allowed, attend,
                   attention, recurrence, rope_angles, rotate)
from test_model import GPU, HALF, assert_same, gpu, tiny

DEVICE = "cuda" if GPU else "cpu"
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
PATTERNS = ["D1W9S3", "D4", "D7W5S3", "D16W10S4", "W12S4", "W0", "S5",
            "D500", "D3W40", "D5W2S400"]                        # D > T, W >= T and S > T among them
MORE_PATTERNS = ["D1", "D8W5", "D4W3S9", "D64", "D5W96S96"]


@pytest.fixture(autouse=True)
def new_memory_holds_nan():
    """So that a result which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def any_strides(table):
    """cos and sin as columns of one table."""
    return torch.stack(table, dim=-1).unbind(-1)


def outputs_and_gradients(f, inputs):
    """{name: tensor} of f's outputs and of the inputs' gradients, for fixed output gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = f(**leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    total = 0
    for y in outputs.values():
        weight = torch.randn(y.shape, generator=generator, device=DEVICE)
        weight = weight.bfloat16().to(y)                        # exact in every dtype
        total = total + (y * weight).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    gradients = {f"d{name}": x for name, x in zip(leaves, found)}
    return outputs | gradients


def compare(run, definition, limit=1e-5, floor=1e-30, **inputs):
    """Outputs and gradients are those of the definition in float64. Both give {name: tensor}."""
    found = outputs_and_gradients(run, inputs)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = outputs_and_gradients(definition, exact)
    for name, x in found.items():
        assert_same(name, x, expected[name], limit, floor)


# ---- Recurrence and RoPE -------------------------------------------------------------------------

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
    return k_rec, v_rec, rows[-1]


def named(run):
    def f(k, v, g, state):
        k_rec, v_rec, end = run(k, v, g, state)
        return dict(k_rec=k_rec, v_rec=v_rec, end=end)
    return f


def check_recurrence(k, v, g, limit):
    B, _, C = k.shape
    inputs = dict(k=k, v=v, g=g, state=randn(2, B, C))
    compare(named(recurrence), named(recurrence_loop), limit, **inputs)
    k_rec, v_rec, end = recurrence(**inputs)
    assert k_rec.dtype == k.dtype
    assert v_rec.dtype == v.dtype
    assert end.dtype == torch.float32


@pytest.mark.parametrize("B, T, C, dtype", [
    (1, 1, 3, torch.float32),
    (2, 15, 20, HALF),
    (1, 16, 16, torch.float32),
    (2, 37, 9, torch.float32),
    (1, 50, 5, HALF)])
def test_recurrence_is_equation_2(device, B, T, C, dtype):
    """Lengths and widths that no tile divides, and a chain of several tiles."""
    x = randn(B, T, 5 * C, dtype=dtype)
    _, _, k, v, g = x.chunk(5, -1)                              # as Mixing splits them
    check_recurrence(k, v, g, LIMITS[dtype])


def test_recurrence_takes_any_strides_and_mixed_dtypes(device):
    k = randn(2, 9, 20)
    v = randn(9, 2, 20).transpose(0, 1).half()
    g = randn(2, 20, 9).mT
    check_recurrence(k, v, g, LIMITS[torch.float16])


def test_recurrence_differentiates_twice_in_plain_pytorch():
    x = torch.randn(5, 2, 4, 2, dtype=torch.float64)
    inputs = *x[:3].requires_grad_(), x[3:, :, 0].requires_grad_()
    assert torch.autograd.gradgradcheck(recurrence, inputs)
    pair = recurrence(*inputs[:3], tuple(inputs[3]))
    assert pair[2].equal(recurrence(*inputs)[2]), "a pair is a state too"


def test_decay_is_precise_from_minus_100_to_100(device):
    """Channel by channel, in outputs and gradients: a memory that is long must still learn."""
    k, v, g = randn(3, 1, 12, 32)
    g = g + torch.linspace(-100, 100, 32, device=DEVICE)
    inputs = dict(k=k, v=v, g=g, state=randn(2, 1, 32))
    exact = {name: x.double() for name, x in inputs.items()}
    expected = outputs_and_gradients(named(recurrence_loop), exact)
    for name, x in outputs_and_gradients(named(recurrence), inputs).items():
        columns = zip(x.unbind(-1), expected[name].unbind(-1))
        for c, (found, want) in enumerate(columns):
            small = want.abs() < 1e-30  # too close to float32's smallest number
            at = f"{name} where g is {g[0, 0, c]:.0f}"
            assert (found[small].abs() < 1e-29).all(), at
            assert_same(at, found[~small], want[~small])


@pytest.mark.parametrize("T, Dh, dtype", [
    (1, 2, torch.float32),
    (5, 8, HALF),
    (37, 24, torch.float32),
    (70, 128, HALF)])
def test_rotate_turns_pairs_of_channels_by_their_angles(device, T, Dh, dtype):
    """As complex numbers: x1 + i x2 times exp(i angle). The angle is t / 10000^(2 j / Dh)."""
    t = torch.arange(100, 100 + T, device=DEVICE)
    j = torch.arange(Dh // 2, device=DEVICE).double()
    frequency = 10000.0 ** (-2 * j / Dh)
    angle = t[:, None] * frequency
    table = any_strides(rope_angles(t, Dh))
    assert_same("cos", table[0], angle.cos())
    assert_same("sin", table[1], angle.sin())

    def run(x):
        return dict(y=rotate(x, *table))

    def turned(x):
        pairs = torch.complex(*x.chunk(2, -1))
        pairs = pairs * torch.exp(1j * angle)
        y = torch.cat((pairs.real, pairs.imag), -1)
        return dict(y=y)

    x = randn(2, T, 3, 4, Dh, dtype=dtype)
    compare(run, turned, LIMITS[dtype], x=heads_of(x)[1])


# ---- Attention -----------------------------------------------------------------------------------

def heads_of(x):
    """q, k, v (B, h, T, Dh): the middle heads of x (B, T, 3, H, Dh), not contiguous."""
    return x.transpose(1, 3)[:, 1:3].unbind(2)


def attention_loop(q, k, v, pattern):
    """Equation (3), query by query, in float64."""
    rule = Rule.parse(pattern)
    q, k, v = (z.double() for z in (q, k, v))
    T = q.shape[2]
    n = k.shape[2]
    p = torch.arange(n, device=q.device)
    rows = []
    for i in range(T):
        seen = p[rule.allowed(n - T + i, p)]
        query = q[:, :, i:i + 1]
        scores = query @ k[:, :, seen].mT / math.sqrt(q.shape[-1])
        rows.append(scores.softmax(-1) @ v[:, :, seen])
    return torch.cat(rows, dim=2)


def under(pattern):
    """Attention under a pattern of one rule, as `compare` takes it."""
    def run(q, k, v):
        return dict(y=attend(q, k, v, Rule.parse(pattern)))
    return run


def check_attention(pattern, B, T, Dh=8, dtype=torch.float32, first=0):
    """Of head slices, for the queries from `first` on. dq is 0 where a query sees itself alone."""
    def definition(q, k, v):
        return dict(y=attention_loop(q, k, v, pattern))

    x = randn(B, T, 3, 4, Dh, dtype=dtype)
    q, k, v = heads_of(x)
    q = q[:, :, first:]
    compare(under(pattern), definition, LIMITS[dtype], 1, q=q, k=k, v=v)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_is_equation_3(device, pattern):
    """The keys that none of the last queries of a sequence sees have no gradient."""
    cases = (2, 5, 0), (1, 70, 0), (2, 1, 0), (1, 40, 27)
    for B, T, first in cases:
        check_attention(pattern, B, T, first=first)


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("pattern", ["D16W150S4", "D2W200S40", "D3S2", "W100S40"])
def test_attention_over_several_tiles(kernels_on, monkeypatch, pattern, tma):
    """That all of a program's queries see. Before Hopper, without TMA, they come by elements."""
    if not tma:
        monkeypatch.setattr(kernels, "has_tma", lambda x: False)
    check_attention(pattern, 1, 258)


@pytest.mark.parametrize("Dh, dtype", [
    (2, torch.float32),
    (24, HALF),
    (64, torch.float32),
    (128, HALF),
    (256, torch.float32),
    (512, HALF)])
def test_attention_head_widths(kernels_on, Dh, dtype):
    check_attention("D4W6S2", 1, 21, Dh, dtype)


@pytest.mark.parametrize("Dh, dtype", [(258, torch.float32), (514, HALF)])
def test_attention_refuses_heads_that_are_too_wide(kernels_on, Dh, dtype):
    q = randn(1, 1, 4, Dh, dtype=dtype)
    with pytest.raises(ValueError, match=f"{Dh} channels"):
        attention(q, q, q, 4, 0, 0)


def test_attention_of_rows_that_descriptors_can_not_describe(kernels_on):
    """Rows that are shared, or begin anywhere: they are copied."""
    q = randn(2, 2, 40, 8)
    shared = randn(1, 1, 40, 8).expand(2, 2, 40, 8)
    odd = randn(2, 2, 40, 9)[..., 1:]
    for k in shared, odd, odd.mT.contiguous().mT:
        expected = attention_loop(q, k, k, "D4W3S2")
        assert_same("y", attention(q, k, k, 4, 3, 2), expected)


@pytest.mark.parametrize("pattern", ["D64", "D300W3S7"])
def test_few_lasting_keys_split_their_queries(kernels_on, monkeypatch, pattern):
    """Then gradients go through partial sums. The same input gives the same gradient to the bit."""
    x = randn(1, 1030, 3, 4, 8)
    qkv = dict(zip("qkv", heads_of(x)))
    double = {name: x.double() for name, x in qkv.items()}
    split = []
    launch = kernels.launch

    def look(*arguments, **constants):
        split.append(constants.get("SPLIT"))
        return launch(*arguments, **constants)

    monkeypatch.setattr(kernels, "launch", look)
    found = outputs_and_gradients(under(pattern), qkv)
    assert True in split, "the queries were not split"
    again = outputs_and_gradients(under(pattern), qkv)
    exact = outputs_and_gradients(under(pattern), double)
    for name, y in found.items():
        assert_same(name, y, exact[name])
        assert y.equal(again[name]), name


def test_attention_never_reads_a_key_that_is_not_allowed(kernels_on):
    """It can hold anything, even NaN: off the grid, and behind the window."""
    qkv = randn(3, 1, 2, 70, 8)
    expected = attention_loop(*qkv, "D8S2")[:, :, 64:]
    p = torch.arange(70, device=DEVICE)
    sees = allowed(p[64:, None], p, 8, 0, 2)
    unseen = ~sees.any(0)
    qkv[1:, :, :, unseen] = math.nan
    y = attention(*qkv, 8, 0, 2)[:, :, 64:]
    assert_same("y", y, expected)


def test_attention_under_autocast(device):
    x = randn(1, 20, 3, 4, 16)
    with torch.autocast(DEVICE, HALF):
        y = attention(*heads_of(x), 4, 3, 2)
    assert y.dtype == HALF
    assert_same("y", y, attention_loop(*heads_of(x), "D4W3S2"), 2e-2)


# ---- Where a cache keeps what a step reads -------------------------------------------------------

@triton.jit
def keys_kernel(out, RULE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """out (3, BT, BN) int32: row t of each, over the numbers of keys."""
    t = tl.arange(0, BT)[:, None]
    n = tl.arange(0, BN)[None, :]
    row = out + t * BN + n
    tl.store(row, kernels.count_keys(t, RULE))
    row += BT * BN
    tl.store(row, kernels.key_at(n, t, RULE, False))
    row += BT * BN
    tl.store(row, kernels.key_at(n, t, RULE, True))


@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE_PATTERNS])
def test_a_step_reads_the_rows_that_the_cache_says(pattern):
    """For all queries of 63 tokens: rows of the three buffers, and positions."""
    T = 63
    group = layer_cache(pattern, T, B=1).groups[0]
    out = torch.zeros(3, 64, 256, dtype=torch.int32, device=DEVICE)
    keys_kernel[(1,)](out, group.kept, BT=64, BN=256)
    count, *found = out.tolist()
    p = torch.arange(T)
    for t in range(T + 1):
        seen = p[group.kept.allowed(t, p) & (p < t)]
        want = group.rows(seen, t), seen
        for i, name in enumerate(("row", "position")):
            at = found[i][t][:count[t][0]]
            at = [j for j in at if j >= 0]
            assert sorted(at) == sorted(want[i].tolist()), f"{name} at {t}"


# ---- Decoding ------------------------------------------------------------------------------------

def layer_cache(pattern, max_len, B=2, H=2, Dh=8, dtype=torch.float32, recurrent=True):
    """An empty layer of a Cache on the kernels' device, whose state is drawn."""
    config = RATConfig(1, 1, H, H * Dh, recurrent)
    pattern = Pattern.parse(pattern)
    weight = randn(1, dtype=dtype)
    layer = Cache(config, B, max_len, pattern, dtype, weight).layers[0]
    layer.state.normal_()
    return layer


def fill(layer, t):
    """As if t tokens had been seen; rows that hold none of them have NaN."""
    layer.seen.fill_(t)
    for group in layer.groups:
        group.cache.length = t
        B, H, _, Dh = group.k.shape
        for z in group.tensors:
            z.fill_(math.nan)
        k, v = randn(2, B, H, t, Dh, dtype=group.k.dtype)
        group.store(k, v, 0)
        if group.rule.topk:
            size = group.rule.block
            before = max(t - 1, 0) // size                      # the step makes the next one
            keys = group.k[:, :, :before * size]
            group.summaries[:, :, :before] = model.block_summaries(keys, size, group.rule.score)


def in_float64(layer):
    """The same cache for the definition."""
    twin = copy.deepcopy(layer)
    for group in twin.groups:
        group.k = group.k.nan_to_num().double()
        group.v = group.v.nan_to_num().double()
        if group.rule.topk:
            group.summaries = group.summaries.nan_to_num().double()
    twin.state = twin.state.double()
    return twin


def check_decode(pattern, t, dtype=torch.float32, H=2, Dh=8, recurrent=True, splits=None, loud=1,
                 limit=None):
    """A step at t is that of Mixing without projections: what it returns, its state, its cache."""
    layer = layer_cache(pattern, 96, 2, H, Dh, dtype, recurrent)
    fill(layer, t)
    exact = in_float64(layer)
    mix = Mixing(RATConfig(1, 1, H, H * Dh, recurrent))
    mix.norm = mix.in_proj = mix.out_proj = torch.nn.Identity()
    x = randn(2, 1, sum(mix.widths), dtype=dtype)
    o, q, k, v, *g = x.split(mix.widths, -1)
    q *= loud
    rope = any_strides(rope_angles(layer.seen, Dh))
    rules = Pattern.parse(pattern).rules(0)
    expected = mix(x.double(), rope, rules, exact)
    y = kernels.decode(o, q.clone(), k, v, g, rope, layer, splits)      # of two strides
    limit = limit or LIMITS[dtype]
    at = f"{pattern} at {t}, {dtype}, Dh {Dh}"
    assert_same(f"{at}: y", y, expected, limit)
    assert_same(f"{at}: state", layer.state, exact.state, min(limit, 1e-5))
    for mine, theirs in zip(layer.groups, exact.groups):
        assert_same(f"{at}: k", mine.k.nan_to_num(), theirs.k, limit)
        assert_same(f"{at}: v", mine.v.nan_to_num(), theirs.v, limit)


@pytest.mark.parametrize("pattern", [*PATTERNS, *MORE_PATTERNS])
def test_decode(pattern):
    """The first position, the last and in between; no row that holds nothing is read."""
    for t in (0, 41, 95):
        check_decode(pattern, t)


@pytest.mark.parametrize("pattern, t, options", [
    ("D1", 95, dict(H=1, Dh=256, splits=2)),                    # several programs, 16 keys a tile
    ("D1", 95, dict(H=1, Dh=256, splits=3)),
    ("D2W30S3", 90, dict(H=1, Dh=256, splits=5)),
    ("D1", 2, dict(H=1, Dh=256, splits=5)),
    ("D64", 20, dict(loud=300, limit=1e-3, splits=2)),          # scores of hundreds, either sign:
    ("W5S2", 3, dict(loud=300, limit=1e-3, splits=2)),          # 2^score is beyond float32
    ("D4W9S2", 77, dict(Dh=2, H=3)),
    ("D4W9S2", 77, dict(Dh=24, H=3, dtype=HALF)),
    ("D4W9S2", 77, dict(Dh=96, H=3, dtype=torch.bfloat16)),
    ("D4W9S2", 77, dict(Dh=128, H=3, dtype=HALF, recurrent=False)),
    ("D4/W9S2", 50, dict(H=4)),                                 # head groups
    ("D1/D3W2/W0", 33, dict(H=3, recurrent=False))], ids=str)
def test_decode_of_any_shape(pattern, t, options):
    check_decode(pattern, t, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_chunk_reads_lasting_keys_from_the_cache(kernels_on, pattern):
    """Its window lies beside it; no row that holds nothing is read."""
    for start, end in ((1, 2), (5, 40), (37, 70)):
        qkv = randn(3, 1, 2, end, 8)
        layer = layer_cache(pattern, 96, B=1)
        fill(layer, 0)
        group = layer.groups[0]
        group.store(*qkv[1:, :, :, :start], 0)
        group.cache.length = start
        y = group.attend(*qkv[:, :, :, start:])
        expected = attention_loop(*qkv, pattern)
        assert_same(f"y of {start} to {end}", y, expected[:, :, start:])


# ---- As PyTorch sees them ------------------------------------------------------------------------

def test_operators_are_registered_as_pytorch_wants_them():
    """Schema, autograd, fakes (strides too), AOT dispatch with static and dynamic shapes."""
    k, v, g = (z.requires_grad_() for z in randn(3, 1, 9, 4))
    q = randn(1, 9, 2, 4).transpose(1, 2).requires_grad_()
    plain = q.detach()
    summaries = model.block_summaries(plain, 4, "mean")
    calls = {
        "recurrence": (k, v, g, randn(2, 1, 4)),
        "rotate": (q, *rope_angles(torch.arange(9, device=DEVICE), 4)),
        "attention": (q, plain, plain, [4, 3, 1]),
        "topk": (q, plain, plain, summaries, [4, 0, 0, 4, 2]),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.rat, name).default
        torch.library.opcheck(operator, arguments)


def test_shapes_without_data(kernels_on):
    """Fake tensors and make_fx see operators, with and without gradients."""
    net = tiny(n_layer=1, n_head=2, n_embd=16).to(kernels_on)
    idx = torch.randint(50, (2, 12), device=kernels_on)
    for pattern in "D1", "D4W2", "N4K2":
        for grad in True, False:
            with FakeTensorMode(), torch.device(kernels_on), torch.set_grad_enabled(grad):
                tokens = torch.zeros(2, 12, dtype=torch.long)
                assert RATPlus(net.config)(tokens, pattern).shape == (2, 12, 50)
        with torch.no_grad():
            trace = make_fx(lambda x: net(x, pattern), tracing_mode="fake",
                            _allow_non_fake_inputs=True)
            assert_same(pattern, trace(idx)(idx), net(idx, pattern))


@pytest.mark.parametrize("pattern", ["D4W3S2/N4K2"])
def test_compiled_as_one_graph(kernels_on, pattern):
    """A block, with fullgraph=True and dynamic lengths: by Inductor on a GPU."""
    torch.compiler.reset()
    net = tiny(n_layer=1, n_head=2, n_embd=16).to(kernels_on)
    twin = copy.deepcopy(net)
    backend = "inductor" if GPU else "aot_eager"
    twin.compile(fullgraph=True, dynamic=True, backend=backend)
    idx = torch.randint(50, (1, 16), device=kernels_on)
    for T in 12, 9:
        for m in net, twin:
            m.zero_grad()
            m.loss(idx[:, :T], idx[:, :T], pattern).backward()
        for (name, p), q in zip(net.named_parameters(), twin.parameters()):
            assert_same(f"gradient of {name} at {T}", q.grad, p.grad)


@gpu
@pytest.mark.parametrize("B, T, C", [
    (4, 8192, 256),
    (32, 2048, 512),
    (1, 65536, 2048),
    (2, 5000, 100)])
def test_the_chain_repeats_to_the_bit(B, T, C):
    """Thousands of programs hand their ends on; one that read too early would change the result."""
    k, v, g = randn(3, B, T, C)
    inputs = dict(k=k, v=v, g=g + 2, state=randn(2, B, C))
    first = outputs_and_gradients(named(recurrence), inputs)
    for _ in range(4):
        again = outputs_and_gradients(named(recurrence), inputs)
        for name, x in again.items():
            assert x.equal(first[name]), name
    exact = {name: x[:, :300].double() for name, x in inputs.items()}
    expected = named(recurrence)(**exact)
    assert_same("k_rec", first["k_rec"][:, :300], expected["k_rec"], 1e-6)


@gpu
def test_offsets_of_more_than_31_bits():
    """A quarter of a million positions of 80 heads: 2.7 billion elements a tensor."""
    x = randn(1, 262144, 80, 128, dtype=torch.bfloat16).transpose(1, 2)
    y = attention(x, x, x, 64, 16, 4)[:, 60:, -8:]
    p = torch.arange(262144, device=DEVICE)
    near = p[allowed(p[-1], p, 64, 40, 4)]
    keys = x[:, 60:, near]
    mask = allowed(p[-8:, None], near, 64, 16, 4)
    expected = F.scaled_dot_product_attention(x[:, 60:, -8:], keys, keys, mask)
    assert_same("y", y, expected, 2e-2)
