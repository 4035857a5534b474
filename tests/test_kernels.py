"""Each kernel against its definition in model.py: outputs and every gradient, by name.

The kernels run on a GPU, or in Triton's interpreter, where tiles of the recurrence are 16 x 16.
"""
import math

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl

import kernels
import model
from model import FUTURE, Group, GroupCache, Layout, Projected, Rule, rope_angles
from test_model import assert_same, one_line, tiny

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: too large for Triton's interpreter")
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter's bfloat16 products are wrong
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SPANS = [(1, 9, 3), (4, 0, 0), (7, 5, 3), (16, 10, 4), (0, 12, 4), (0, 0, 0), (0, 0, 5),
         (500, 0, 0), (3, 40, 0), (5, 2, 400)]                  # D > T, W >= T and S > T among them


@pytest.fixture(autouse=True)
def new_memory_holds_nan():
    """So that a result which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def outputs_and_gradients(f, inputs):
    """{name: tensor} of f's outputs and of the inputs' gradients, for fixed output gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = f(**leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    total = 0
    for y in outputs.values():
        weight = torch.randn(y.shape, generator=generator, device=DEVICE)
        total = total + (y * weight.bfloat16().to(y)).sum()     # exact in every dtype
    found = torch.autograd.grad(total, list(leaves.values()))
    return outputs | {f"d{name}": gradient for name, gradient in zip(leaves, found)}


def compare(kernel, definition, limit=1e-5, floor=1e-30, **inputs):
    """Outputs and gradients are those of the definition in float64. Both give {name: tensor}."""
    found = outputs_and_gradients(kernel, inputs)
    expected = outputs_and_gradients(definition, {name: x.double() for name, x in inputs.items()})
    for name, x in found.items():
        assert_same(name, x, expected[name], limit, floor)
        assert name[1:] not in inputs or x.dtype == inputs[name[1:]].dtype, f"{name} is {x.dtype}"


# ---------------------------------------------------------------------------------------------
# Recurrence

def of_in_proj(recurrence):
    """The recurrence of k, v, g as they come out of in_proj: views of x (B, T, 5 C)."""
    def f(x, k0, v0):
        k_rec, v_rec, (k_end, v_end) = recurrence(*x.chunk(5, dim=-1)[2:], (k0, v0))
        return dict(k_rec=k_rec, v_rec=v_rec, k_end=k_end, v_end=v_end)
    return f


SHAPES = [(1, 1, 3, torch.float32), (2, 15, 20, HALF), (1, 16, 16, torch.float32),
          (2, 37, 9, torch.float32), (1, 50, 5, HALF)]


@pytest.mark.parametrize("B, T, C, dtype", SHAPES)
def test_recurrence(B, T, C, dtype):
    """Lengths and widths that no tile divides, and a chain of several tiles."""
    inputs = dict(x=randn(B, T, 5 * C, dtype=dtype), k0=randn(B, C), v0=randn(B, C))
    compare(of_in_proj(kernels.recurrence), of_in_proj(model.recurrence), LIMITS[dtype], **inputs)


def test_recurrence_takes_any_strides_and_mixed_dtypes():
    k = randn(2, 9, 20)
    v = randn(9, 2, 20).transpose(0, 1).half()
    g = randn(2, 20, 9).mT

    def op(recurrence):
        return lambda k, v, g: dict(zip(("k_rec", "v_rec"), recurrence(k, v, g)))

    compare(op(kernels.recurrence), op(model.recurrence), LIMITS[torch.float16], k=k, v=v, g=g)
    k_rec, v_rec, _ = kernels.recurrence(k, v, g)
    assert (k_rec.dtype, v_rec.dtype) == (torch.float32, torch.float16)
    exact = model.recurrence(k.double(), v.double(), g.double())[0]
    assert_same("k_rec in float32", k_rec, exact, 1e-6)


# ---------------------------------------------------------------------------------------------
# RoPE, and the loss

def heads_of(x):
    """q, k, v (B, h, T, Dh): the middle heads of x (B, T, 3, H, Dh), not contiguous."""
    return x.transpose(1, 3)[:, 1:3].unbind(2)


@pytest.mark.parametrize("T, Dh, dtype", [(1, 2, torch.float32), (5, 8, HALF),
                                          (37, 24, torch.float32), (70, 128, HALF)])
def test_rotate(T, Dh, dtype):
    x = randn(2, T, 3, 4, Dh, dtype=dtype)
    angles = rope_angles(torch.arange(T, device=DEVICE), Dh)

    def op(rotate):
        return lambda x: dict(y=rotate(heads_of(x)[1], *angles))

    compare(op(kernels.rotate), op(model.rotate), LIMITS[dtype], x=x)


@pytest.mark.parametrize("V", [1, 7, 320, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_cross_entropy(V, dtype):
    """Each row's loss, and its gradient in the logits' place; no target; scores of any size."""
    loud = torch.tensor([[1.0], [30], [1], [100]], device=DEVICE)
    z = (randn(4, V) * loud).to(dtype)
    y = torch.tensor([0, V - 1, -100, V // 2], device=DEVICE)
    exact = z.double().requires_grad_()
    expected = F.cross_entropy(exact, y, reduction="none")
    before = z.clone()
    assert_same("loss", kernels.cross_entropy_(z, y, grad=False), expected, floor=1e-1)
    assert z.equal(before)
    assert_same("loss", kernels.cross_entropy_(z, y, grad=True), expected, floor=1e-1)
    expected.sum().backward()
    floor = 1e-3 if V > 1 else 10                      # of one class the gradient is 0, but for rounding
    assert_same("dz", z, exact.grad, LIMITS[dtype], floor)


def test_cross_entropy_of_a_wrong_target_is_nan():
    """In its own row alone."""
    z = randn(5, 50)
    y = torch.tensor([3, -1, 50, -100, 10**12], device=DEVICE)
    wrong = torch.tensor([False, True, True, False, True], device=DEVICE)
    loss = kernels.cross_entropy_(z, y, grad=True)
    assert loss.isnan().equal(wrong) and z.isnan().equal(wrong[:, None].expand_as(z))


@pytest.mark.parametrize("rows", [4, 8192])
def test_head_loss(rows):
    """Summed over chunks of rows that do not divide the tokens."""
    targets = torch.randint(30, (10,), device=DEVICE)
    targets[3] = -100

    def kernel(x, weight):
        return dict(loss=kernels.HeadLoss.apply(x, weight, targets, torch.float32, True, rows))

    def definition(x, weight):
        return dict(loss=model.head_loss(x, weight, targets, torch.float64))

    compare(kernel, definition, x=randn(10, 8), weight=randn(30, 8))


# ---------------------------------------------------------------------------------------------
# Who sees whom, and where a cache keeps it: the twins of model.allowed and model.Layout

@triton.jit
def twins_kernel(out, SPAN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """out (8, BT, BN) int32: row t of each, over n as position, slot or number in a list."""
    t = tl.arange(0, BT)[:, None]
    n = tl.arange(0, BN)[None, :]
    zero = t * 0 + n * 0                                                                # (BT, BN)
    row = out + t * BN + n
    count = kernels.count_lasting(t, SPAN)
    near = kernels.sees_near(t, n, 0, SPAN).to(tl.int32)
    near_or_itself = kernels.sees_near(t, n, 1, SPAN).to(tl.int32)
    tl.store(row, kernels.allowed(t, n, SPAN).to(tl.int32))
    tl.store(row + BT * BN, zero + kernels.is_lasting(n, SPAN).to(tl.int32))
    tl.store(row + 2 * BT * BN, zero + kernels.slot_of(n, SPAN))
    tl.store(row + 3 * BT * BN, zero + kernels.position_in(n, t, SPAN))
    tl.store(row + 4 * BT * BN, zero + kernels.slot_in_use(n, t, SPAN))
    tl.store(row + 5 * BT * BN, zero + kernels.slots_in_use(t, SPAN))
    tl.store(row + 6 * BT * BN, zero + kernels.lasting(n, count, SPAN))
    tl.store(row + 7 * BT * BN, near + 2 * near_or_itself)


@pytest.mark.parametrize("span", [*SPANS, (1, 0, 0), (8, 5, 0), (4, 3, 9), (64, 0, 0)], ids=str)
def test_twins_are_their_originals(span):
    """Over all queries, positions and slots of 63 tokens."""
    T = 63
    FAR = kernels.FAR.value
    layout = Layout(Rule(*span), T)
    rule = layout.rule
    out = torch.zeros(8, 64, 256, dtype=torch.int32, device=DEVICE)
    twins_kernel[(1,)](out, SPAN=kernels.span_of(*layout.span), BT=64, BN=256)
    allowed, is_lasting, slot_of, positions, slot_in_use, slots_in_use, listed, near = out.cpu()
    p = torch.arange(T)
    lasting = model.on_grid(p, rule.dilation) | (p < rule.sinks)
    assert is_lasting[0, :T].bool().equal(lasting), "is_lasting"
    keeps = layout.keeps(p, T)
    assert slot_of[0, :T][keeps].equal(layout.slot_of(p[keeps]).int()), "slot_of"
    for t in range(T + 1):
        sees = rule.allowed(t, p)
        assert allowed[t, :T].bool().equal(sees), f"allowed at {t}"
        close = (sees & (t - p <= rule.reach)).int()
        assert near[t, :T].equal(2 * close + close * (p < t)), f"sees_near at {t}"
        past = p[lasting & (p < t)].int()
        assert listed[t, :len(past)].equal(past), f"lasting before {t}"
        assert (listed[t, len(past):] == FAR).all(), f"lasting before {t} goes on"
        assert sum(kernels.count_lasting_host(t, kernels.span_of(*layout.span))) == len(past)
        held = layout.positions(torch.tensor([t]))
        found = positions[t, :layout.slots]
        assert found.equal(held.clamp(max=FAR).int()), f"position_in after {t}"
        used = slot_in_use[t, :slots_in_use[t, 0]]
        assert used.unique().equal(used) and (used < layout.slots).all(), f"slots in use after {t}"
        full = (held != FUTURE).nonzero()[:, 0]
        assert torch.isin(full, used).all(), f"slots in use after {t} lack one"


# ---------------------------------------------------------------------------------------------
# Attention

def of_heads(attention, span):
    return lambda x: dict(y=attention(*heads_of(x), *span))


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_attention(span):
    """On head slices, at lengths that no tile divides."""
    for B, T in ((2, 5), (1, 70)) + ((2, 1), (2, 261)) * GPU:
        x = randn(B, T, 3, 4, 8)
        compare(of_heads(kernels.attention, span), of_heads(model.attention, span), floor=1, x=x)


def of_one_head(attention, span):
    """attention of q, k, v as views of x (B, T, 3, 1, Dh)."""
    return lambda x: dict(y=attention(*x.transpose(1, 3).unbind(2), *span))


@pytest.mark.parametrize("span", [(16, 150, 4), (2, 200, 40)], ids=str)
def test_attention_over_several_tiles(span):
    """Tiles of keys that all of a program's queries see, far ones and in the middle of a window."""
    x = randn(1, 270, 3, 1, 8)
    compare(of_one_head(kernels.attention, span), of_one_head(model.attention, span), x=x)


@pytest.mark.parametrize("span", [(16, 150, 4), (3, 0, 2), (0, 12, 4)], ids=str)
def test_attention_without_tma(monkeypatch, span):
    """On GPUs before Hopper, tiles are loaded element by element."""
    monkeypatch.setattr(kernels, "has_tma", lambda x: False)
    x = randn(1, 200, 3, 1, 8)
    compare(of_one_head(kernels.attention, span), of_one_head(model.attention, span), x=x)


def test_attention_of_rows_that_descriptors_can_not_describe():
    """Rows that are shared, or begin anywhere: they are copied."""
    q = randn(2, 2, 40, 8)
    shared = randn(1, 1, 40, 8).expand(2, 2, 40, 8)
    odd = randn(2, 2, 40, 9)[..., 1:]
    for k in shared, odd, odd.mT.contiguous().mT:
        y = kernels.attention(q, k, k, 4, 3, 2)
        assert_same("y", y, model.attention(q.double(), k.double(), k.double(), 4, 3, 2))


@pytest.mark.parametrize("Dh, dtype", [(2, torch.float32), (24, HALF), (64, torch.float32),
                                       (128, HALF), (256, torch.float32), (512, HALF)])
def test_attention_head_widths(Dh, dtype):
    x = randn(1, 21, 3, 4, Dh, dtype=dtype)
    span = 4, 6, 2
    compare(of_heads(kernels.attention, span), of_heads(model.attention, span), LIMITS[dtype], x=x)


def test_attention_refuses_heads_that_are_too_wide():
    for Dh, dtype in ((258, torch.float32), (514, HALF)):
        q = randn(1, 1, 4, Dh, dtype=dtype)
        with pytest.raises(ValueError, match=f"{Dh} channels") as error:
            kernels.attention(q, q, q, 4, 0, 0)
        one_line(error)


@pytest.mark.parametrize("span", [(64, 0, 0), (300, 3, 7)], ids=str)
def test_few_lasting_keys_split_their_queries(monkeypatch, span):
    """Then gradients go through partial sums. The same input gives the same gradient to the bit."""
    x = randn(1, 1030, 3, 1, 8)
    split = []
    launch = kernels.launch

    def look(*arguments, **constants):
        split.append(constants.get("SPLIT"))
        return launch(*arguments, **constants)

    monkeypatch.setattr(kernels, "launch", look)
    attention = of_one_head(kernels.attention, span)
    compare(attention, of_one_head(model.attention, span), x=x)
    assert True in split, "the queries were not split"
    if GPU:
        again = outputs_and_gradients(attention, dict(x=x))
        for name, found in outputs_and_gradients(attention, dict(x=x)).items():
            assert found.equal(again[name]), name


def test_attention_never_reads_a_key_that_is_not_allowed():
    """It can hold anything, even NaN: off the grid, and behind the window."""
    q, k, v = randn(3, 1, 2, 70, 8)
    unseen = ~model.allowed(torch.arange(64, 70)[:, None], torch.arange(70), 8, 0, 2).any(0)
    k[:, :, unseen] = math.nan
    v[:, :, unseen] = math.nan
    found = kernels.attention(q, k, v, 8, 0, 2)
    expected = model.attention(*(z.nan_to_num().double() for z in (q, k, v)), 8, 0, 2)
    assert_same("y", found[:, :, 64:], expected[:, :, 64:])


def test_attention_under_autocast():
    x = randn(1, 20, 3, 4, 16)
    with torch.autocast(DEVICE, HALF):
        y = kernels.attention(*heads_of(x), 4, 3, 2)
    assert y.dtype == HALF
    assert_same("y", y, model.attention(*(z.double() for z in heads_of(x)), 4, 3, 2), 2e-2)


# ---------------------------------------------------------------------------------------------
# Decoding

def group_cache(span, max_len, B=2, H=3, Dh=8, dtype=torch.float32):
    """An empty cache of one head group, on the kernels' device, whose state is drawn."""
    rule = Rule(*span).within(max_len)
    like = randn(B, H, 0, Dh, dtype=dtype)
    return GroupCache(Group(rule), Layout(rule, max_len), like, randn(2, B, H, Dh))


def fill(cache, k, v):
    """Store k and v (B, H, t, Dh); every other slot holds NaN."""
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    if k.shape[2]:
        cache.store(k, v, 0)


def in_float64(cache):
    """The same cache for the definition, which wants numbers in empty slots too."""
    like = cache.k[:, :, :0].double()
    twin = GroupCache(cache.group, cache.layout, like, cache.state.double())
    twin.k.copy_(cache.k.nan_to_num())
    twin.v.copy_(cache.v.nan_to_num())
    return twin


def check_decode(span, t, dtype=torch.float32, H=2, Dh=8, recurrent=True, splits=None, loud=1,
                 limit=None):
    """One step at position t: what it returns, the new state, and what the cache then holds."""
    B = 2
    cache = group_cache(span, 96, B, H, Dh, dtype)
    k, v = randn(2, B, H, t, Dh, dtype=dtype)
    fill(cache, k, v)
    parts = randn(B, 5, H, Dh, dtype=dtype)                     # views of in_proj's output
    o, q, k, v, gate = parts.unbind(1)
    q = q * loud
    token = Projected(o, q, k, v, gate if recurrent else None)
    rope = rope_angles(torch.tensor([t], device=DEVICE), Dh)
    seen = torch.tensor([t], device=DEVICE)
    exact = in_float64(cache)
    expected = exact.step(token.map(lambda z: z.double()), rope, seen)
    y = kernels.decode(token, cache, rope, seen, splits)
    limit = limit or LIMITS[dtype]
    at = f"{span} at {t}, {dtype}, Dh {Dh}"
    assert_same(f"{at}: y", y, expected, limit)
    assert_same(f"{at}: state", cache.state, exact.state, min(limit, 1e-5))
    assert_same(f"{at}: k in the cache", cache.k.nan_to_num(), exact.k, limit)
    assert_same(f"{at}: v in the cache", cache.v.nan_to_num(), exact.v, limit)


@pytest.mark.parametrize("span", [*SPANS, (1, 0, 0), (4, 3, 9), (5, 96, 96)], ids=str)
def test_decode(span):
    """The first position, the last and in between; no empty slot is read."""
    for t in (0, 41, 95):
        check_decode(span, t)


@pytest.mark.parametrize("splits", [2, 5])
def test_decode_by_any_number_of_splits(splits):
    for span, t in (((1, 0, 0), 95), ((2, 30, 3), 90), ((1, 0, 0), 2)):
        check_decode(span, t, splits=splits, Dh=256, H=1)       # 16 keys a tile


@pytest.mark.parametrize("span", [(64, 0, 0), (4, 0, 0), (0, 5, 2)], ids=str)
def test_decode_of_scores_far_from_zero(span):
    """Hundreds, of either sign: 2^score is beyond float32, and rounding shows 1000 times larger."""
    for t in (0, 3, 20):
        check_decode(span, t, limit=1e-3, loud=300, splits=2)


@pytest.mark.parametrize("Dh, dtype, recurrent", [
    (2, torch.float32, True), (24, HALF, True), (96, torch.bfloat16, True), (128, HALF, False),
    (256, torch.float32, False)])
def test_decode_head_widths_and_dtypes(Dh, dtype, recurrent):
    check_decode((4, 9, 2), 77, dtype, H=3, Dh=Dh, recurrent=recurrent)


@pytest.mark.parametrize("g", [-100, -30, 12, 15, 17, 60, 100])
def test_decay_of_a_step_is_precise(g):
    """A step moves the state by 1 - a = sigmoid(-g) of the new key, however little that is."""
    cache = group_cache((4, 3, 1), 96)
    token = Projected(*randn(5, 2, 3, 8))
    token = token._replace(g=torch.full_like(token.g, g))
    cache.state.zero_()
    fill(cache, *randn(2, 2, 3, 5, 8))
    plain = in_float64(cache)
    single = GroupCache(cache.group, cache.layout, cache.k[:, :, :0], cache.state.clone())
    seen = torch.tensor([5], device=DEVICE)
    single.recur(token)
    plain.recur(token.map(lambda z: z.double()))
    kernels.decode(token, cache, rope_angles(seen, 8), seen)
    expected = torch.sigmoid(torch.tensor(-g).double()) * torch.stack((token.k, token.v)).double()
    assert_same("state in float64", plain.state, expected, 1e-10)
    assert_same("state in plain float32", single.state, expected)
    assert_same("state by the kernel", cache.state, expected)


@pytest.mark.parametrize("span", [span for span in SPANS if span[0] != 1], ids=str)
def test_a_chunk_reads_lasting_keys_from_the_cache(span):
    """Its window lies beside it; neither the ring of the cache nor the grid ahead is read."""
    for start, end in ((1, 2), (5, 40), (37, 70)):
        q, k, v = randn(3, 1, 2, end, 8)
        cache = group_cache(span, 96, 1, 2)
        p = torch.arange(end)
        rule = cache.layout.rule
        lasting = p[model.on_grid(p, rule.dilation) | (p < rule.sinks)]
        slots = cache.layout.slot_of(lasting)
        cache.k[:, :, rule.sinks:] = math.nan          # the slot of a sink on the grid stays 0
        cache.v[:, :, rule.sinks:] = math.nan
        cache.k[:, :, slots] = k[:, :, lasting]
        cache.v[:, :, slots] = v[:, :, lasting]
        first = start - min(rule.window, start)
        y = kernels.attention_chunk(q[:, :, start:], k[:, :, first:], v[:, :, first:], cache, start)
        expected = model.attention(q.double(), k.double(), v.double(), *span)
        assert_same(f"y of {start} to {end}", y, expected[:, :, start:])


def test_decode_refuses_what_does_not_match():
    """In one line, with the cache as it was."""
    cache = group_cache((4, 3, 1), 20)
    fill(cache, *randn(2, 2, 3, 5, 8))
    token = Projected(*randn(5, 2, 3, 8))
    seen = torch.tensor([5], device=DEVICE)
    rope = rope_angles(seen, 8)
    before = cache.state.clone(), cache.k.clone()
    wrong = {
        "fewer sequences": token.map(lambda z: z[:1]),
        "fewer heads": token.map(lambda z: z[:, :1]),
        "narrower heads": token.map(lambda z: z[..., :4]),
        "one narrower part": token._replace(v=token.v[..., :4]),
        "another dtype": token.map(lambda z: z.to(HALF)),
        "a dtype for no kernel": token.map(lambda z: z.double()),
        "channels that are not neighbours": token.map(lambda z: z.mT.contiguous().mT),
    }
    for name, parts in wrong.items():
        with pytest.raises(ValueError, match="decode") as error:
            kernels.decode(parts, cache, rope, seen)
        one_line(error)
        assert cache.state.equal(before[0]), name
        assert cache.k.nan_to_num().equal(before[1].nan_to_num()), name
    one = token._replace(k=token.k.mT.contiguous().mT)
    with pytest.raises(ValueError, match="decode"):
        kernels.decode(one, cache, rope, seen)


# ---------------------------------------------------------------------------------------------
# As PyTorch sees them

def layer(x, k0, v0):
    """Recurrence, RoPE and sparse attention as the model strings them together."""
    q, k, v, g = x.chunk(4, dim=-1)
    k_rec, v_rec, _ = kernels.recurrence(k, v, g, (k0, v0))
    q, k_rec, v_rec = (z.unflatten(-1, (2, 8)).transpose(1, 2) for z in (q, k_rec, v_rec))
    angles = rope_angles(torch.arange(x.shape[1], device=x.device), 8)
    q = kernels.rotate(q, *angles)
    k_rec = kernels.rotate(k_rec, *angles)
    return dict(y=kernels.attention(q, k_rec, v_rec, 4, 3, 2))


def test_operators_are_registered_as_pytorch_wants_them():
    k, v, g = (z.requires_grad_() for z in randn(3, 1, 9, 4))
    q = randn(1, 2, 9, 4).requires_grad_()
    angles = rope_angles(torch.arange(9, device=DEVICE), 4)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    calls = {
        kernels.recurrence_operator: (k, v, g, *randn(2, 1, 4)),
        kernels.rotate_operator: (q, *angles),
        kernels.attention_operator: (q, q.detach(), q.detach(), [4, 3, 1]),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_compiled_as_one_graph():
    """torch.compile(fullgraph=True): on a GPU by inductor, else without its compiler."""
    inputs = dict(x=randn(1, 16, 64), k0=randn(1, 16), v0=randn(1, 16))
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    expected = outputs_and_gradients(layer, inputs)
    for name, found in outputs_and_gradients(compiled, inputs).items():
        assert_same(name, found, expected[name])


@pytest.mark.parametrize("pattern", ["D4W3S2", "D1"])
def test_deterministic_mode_trains_and_generates(kernels_on, pattern):
    """With torch.use_deterministic_algorithms as an error, twice the same to the bit."""
    torch.use_deterministic_algorithms(True)
    results = []
    for _ in range(2):
        net = tiny(n_layer=1, n_head=2, n_embd=16).to(kernels_on)
        idx = torch.randint(50, (1, 9 + 60 * GPU), device=kernels_on)
        net.loss(idx, idx, pattern).backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        torch.manual_seed(1)
        text = net.generate(idx, 3, pattern, top_k=9, top_p=0.8)
        results.append({**gradients, "text": text})
    for name, x in results[0].items():
        assert x.equal(results[1][name]) and x.isfinite().all(), name


@gpu
@pytest.mark.parametrize("B, T, C", [(4, 8192, 256), (32, 2048, 512), (1, 65536, 2048),
                                     (2, 5000, 100)])
def test_the_chain_repeats_to_the_bit(B, T, C):
    """Thousands of programs hand their ends on; one that read too early would change the result."""
    inputs = dict(k=randn(B, T, C), v=randn(B, T, C), g=randn(B, T, C) + 2)

    def run(k, v, g):
        k_rec, v_rec, end = kernels.recurrence(k, v, g)
        return dict(k_rec=k_rec, v_rec=v_rec, k_end=end[0], v_end=end[1])

    first = outputs_and_gradients(run, inputs)
    for _ in range(4):
        for name, x in outputs_and_gradients(run, inputs).items():
            assert x.equal(first[name]), name
    short = [z[:, :300].double() for z in inputs.values()]
    assert_same("k_rec", first["k_rec"][:, :300], model.recurrence(*short)[0], 1e-6)


@gpu
def test_offsets_of_more_than_31_bits():
    """A quarter of a million positions of 80 heads: 2.7 billion elements a tensor."""
    x = torch.empty(1, 262144, 80, 128, device=DEVICE, dtype=torch.bfloat16)
    x = x.normal_().transpose(1, 2)
    y = kernels.attention(x, x, x, 64, 16, 4)[:, 60:, -8:]
    p = torch.arange(262144, device=DEVICE)
    near = p[model.allowed(p[-1], p, 64, 40, 4)]
    keys = x[:, 60:, near]
    mask = model.allowed(p[-8:, None], near, 64, 16, 4)
    expected = F.scaled_dot_product_attention(x[:, 60:, -8:], keys, keys, attn_mask=mask)
    assert_same("y", y, expected, 2e-2)
