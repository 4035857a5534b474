"""The Triton kernels of whole sequences, interpreted on a CPU or compiled on a GPU, against float64 references."""
import math

import pytest
import torch

import kernels
from kernels import (allowed, attention, attention_at, attention_by_blocks, attention_chunk, attention_ref, compare,
                     recurrence, recurrence_flat, recurrence_ref, relative_error, slot_of)
from model import rope_angles

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU: too large for the interpreter, or about what compiled code does")
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU   # the interpreter computes bfloat16 products wrongly
SPANS = [(4, 0, 0), (16, 0, 0), (7, 5, 3), (64, 16, 4), (0, 12, 4), (0, 0, 0), (0, 0, 5), (500, 0, 0), (3, 40, 0), (5, 2, 400)]


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """The kernels take every tensor, in small tiles if interpreted; all memory that they are given holds NaN."""
    monkeypatch.setattr(kernels, "RECURRENCE", dict(kernels.RECURRENCE))
    monkeypatch.setattr(kernels, "INTERPRETED", kernels.INTERPRETED)
    if not GPU:
        kernels.interpret()
    empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def check(rows, limit):
    for name, error in rows:
        assert error < limit, f"{name} has relative error {error:.1e}"


def of_in_proj(f):
    """f on k, v, g as views of in_proj's output x (B, T, 5 C)."""
    return lambda x, *state: f(*x.chunk(5, dim=-1)[2:], *state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, C", [(1, 1, 3), (2, 15, 20), (1, 16, 16), (2, 37, 9), (1, 100, 16)])
def test_recurrence_kernel(B, T, C, dtype):
    """Outputs, the state, every gradient; lengths and widths that no tile divides; a chain of several tiles."""
    x, state = torch.randn(B, T, 5 * C, device=DEVICE).to(dtype), torch.randn(2, B, C, device=DEVICE)
    names = ("k_rec", "v_rec", "k_end", "v_end"), ("x", "k0", "v0")
    check(compare(of_in_proj(recurrence_flat), of_in_proj(recurrence_ref), names, (x, *state)), LIMITS[dtype])


def test_recurrence_kernel_takes_any_strides():
    k, v, g = torch.randn(2, 9, 20, device=DEVICE), torch.randn(9, 2, 20, device=DEVICE).transpose(0, 1), torch.randn(
        2, 20, 9, device=DEVICE).mT
    rows = zip(recurrence(k, v, g)[:2], recurrence_ref(*(z.double() for z in (k, v, g)), 0 * k[:, 0], 0 * k[:, 0]))
    for x, ref in rows:
        assert relative_error(x, ref) < 1e-6


def test_recurrence_kernel_at_the_ends_of_the_decay():
    """a = 0 passes keys through, a = 1 freezes the state, without a NaN in any gradient."""
    state = torch.randn(2, 2, 4, device=DEVICE)
    for gate, expected in ((-math.inf, None), (math.inf, state[0])):
        k, v = torch.randn(2, 2, 30, 4, device=DEVICE).requires_grad_().unbind()
        g = torch.full_like(k, gate).detach().requires_grad_()
        k_rec, v_rec, end = recurrence(k, v, g, state.unbind())
        assert torch.equal(k_rec, k if expected is None else expected[:, None].expand_as(k))
        (k_rec.sum() + v_rec.square().sum() + end[0].sum()).backward()
        assert g.grad.isfinite().all()


def heads(x):
    """q, k, v (B, h, T, Dh): the middle heads of x (B, T, 3, H, Dh), not contiguous."""
    return x.transpose(1, 3)[:, 1:3].unbind(2)


@pytest.mark.parametrize("V", [1, 7, 320, 5000])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_kernel(V, grad, dtype):
    """Each row's loss, and its gradient in the logits' place; rows without a target; scores of any size."""
    loud = torch.tensor([[1.0], [30], [1], [100]], device=DEVICE)
    z, y = (torch.randn(4, V, device=DEVICE) * loud).to(dtype), torch.tensor([0, V - 1, -100, V // 2], device=DEVICE)
    z64 = z.double()
    before, loss = z.clone(), kernels.cross_entropy_(z, y, grad)
    loss64 = kernels.cross_entropy_ref(z64, y, True)
    assert relative_error(loss, loss64) < 1e-5 and loss[2] == 0
    assert relative_error(z, z64) < LIMITS[dtype] if grad else z.equal(before)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("T", [1, 5, 70] + [261] * GPU)
def test_attention_kernel(span, T):
    """Dilations beyond T, windows and sinks beyond T, on head slices: y, and the gradients of q, k_rec and v_rec."""
    x = torch.randn(2, T, 3, 4, 16, device=DEVICE)
    ops = [lambda x, f=f: (f(*heads(x), *span),) for f in (attention, attention_ref)]
    check(compare(*ops, (("y",), ("x",)), (x,)), 1e-5)


@pytest.mark.parametrize("span", [(16, 150, 4), (0, 200, 3), (3, 0, 0), (2, 260, 40)])
def test_attention_kernel_on_tiles_that_need_no_mask(span):
    """Long enough for tiles of keys that all of a program's queries see, far ones and in the middle of a window."""
    x = torch.randn(1, 430, 3, 3, 8, device=DEVICE)
    ops = [lambda x, f=f: (f(*heads(x), *span),) for f in (attention, attention_ref)]
    check(compare(*ops, (("y",), ("x",)), (x,)), 1e-5)


@pytest.mark.parametrize("T, Dh", [(1, 2), (5, 8), (37, 24), (70, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_kernel(T, Dh, dtype):
    x, angles = torch.randn(2, T, 3, 4, Dh, device=DEVICE).to(dtype), rope_angles(torch.arange(T, device=DEVICE), Dh)
    ops = [lambda x, f=f: (f(heads(x)[1], *angles),) for f in (kernels.rotate, kernels.rotate_ref)]
    check(compare(*ops, (("y",), ("x",)), (x,)), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Dh", [8, 16, 24, 64, 128, 256])
def test_attention_kernel_head_widths(Dh, dtype):
    x = torch.randn(1, 45, 3, 4, Dh, device=DEVICE).to(dtype)
    ops = [lambda x, f=f: (f(*heads(x), 4, 6, 2),) for f in (attention, attention_ref)]
    check(compare(*ops, (("y",), ("x",)), (x,)), LIMITS[dtype])


@pytest.mark.parametrize("span", [(64, 0, 0), (300, 3, 7), (0, 0, 5)])
def test_few_lasting_keys_split_their_queries(span, monkeypatch):
    """Then gradients go through partial sums, and the same input gives the same gradient to the bit."""
    splits = []
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **kw: splits.append(size) or empty(x, *size, **kw))
    x = torch.randn(1, 1100, 3, 4, 8, device=DEVICE)
    ops = [lambda x, f=f: (f(*heads(x), *span),) for f in (attention, attention_by_blocks)]
    check(compare(*ops, (("y",), ("x",)), (x,)), 1e-5)
    assert any(len(size) == 6 and size[0] > 1 for size in splits), "the queries were not split"
    if GPU:
        grads = []
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            attention(*heads(leaf), *span).square().sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("start, end", [(1, 2), (5, 40), (37, 96)])
def test_the_kernel_of_a_chunk_reads_lasting_keys_from_the_cache(span, start, end):
    q, k, v = torch.randn(3, 2, 3, end, 8, device=DEVICE)
    p, window = torch.arange(end, device=DEVICE), min(span[1], start)
    kept = p[allowed(kernels.FUTURE, p, *span)]
    slots = span[1] + span[2] + (96 // span[0] if span[0] else 0)
    cache = torch.full((2, 2, 3, slots, 8), torch.nan, device=DEVICE)
    cache[:, :, :, slot_of(kept, *span)] = torch.stack((k, v))[:, :, :, kept]
    y = attention_chunk(q[:, :, start:], *cache, k[:, :, start - window:], v[:, :, start - window:], start, *span)
    assert relative_error(y, attention_at(q[:, :, start:], k, v, p[start:], p, *span)) < 1e-6


def layer(x, state):
    """Recurrence and sparse attention as the model strings them together."""
    q, k, v, g = x.chunk(4, dim=-1)
    k, v, _ = recurrence(k, v, g, state.unbind())
    return attention(*(z.unflatten(-1, (2, 8)).transpose(1, 2) for z in (q, k, v)), 4, 3, 2)


def test_operators_are_registered_as_pytorch_wants_them():
    k, v, g = torch.randn(3, 1, 20, 8, device=DEVICE).requires_grad_().unbind()
    state = torch.randn(2, 1, 8, device=DEVICE)
    q = torch.randn(1, 2, 20, 8, device=DEVICE, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(kernels.recurrence_forward, (k, v, g, *state), test_utils=tests)
    torch.library.opcheck(kernels.rotate_triton, (q, *rope_angles(torch.arange(20, device=DEVICE), 8)), test_utils=tests)
    torch.library.opcheck(kernels.attention_forward, (q, q.detach(), q.detach(), 4, 3, 1), test_utils=tests)


def test_compiled_as_one_graph():
    """torch.compile(fullgraph=True): the same outputs and gradients; on a GPU by inductor, else without its compiler."""
    x, state = torch.randn(2, 37, 64, device=DEVICE), torch.randn(2, 2, 16, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    results = []
    for f in (layer, compiled):
        leaf = x.clone().requires_grad_()
        y = f(leaf, state)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for name, a, b in zip(("y", "dx"), *results):
        assert relative_error(a, b) < 1e-5, name


def test_attention_kernel_under_autocast():
    x = torch.randn(1, 40, 3, 4, 16, device=DEVICE)
    dtype = torch.bfloat16 if GPU else torch.float16
    with torch.autocast(DEVICE, dtype):
        y = attention(*heads(x), 4, 3, 2)
    assert y.dtype == dtype and relative_error(y, attention_ref(*(z.double() for z in heads(x)), 4, 3, 2)) < 2e-2


@gpu_only
@pytest.mark.parametrize("B, T, C", [(4, 8192, 256), (32, 2048, 512), (1, 65536, 2048), (2, 5000, 100)])
def test_the_chain_repeats_to_the_bit(B, T, C):
    """Thousands of programs hand their ends on; one that read too early would change the result from run to run."""
    k, v, g = torch.randn(3, B, T, C, device=DEVICE) + torch.tensor([0, 0, 2], device=DEVICE)[:, None, None, None]
    first = None
    for _ in range(5):
        leaves = [z.clone().requires_grad_() for z in (k, v, g)]
        k_rec, v_rec, end = recurrence(*leaves)
        (k_rec.square().sum() + v_rec.square().sum() + end[0].sum()).backward()
        found = [k_rec, v_rec, *end, *(z.grad for z in leaves)]
        first = first or found
        assert all(torch.equal(x, y) for x, y in zip(first, found))
    short = [z[:, :1000].double() for z in (k, v, g)]              # float64 goes to the reference
    assert relative_error(first[0][:, :1000], recurrence(*short)[0]) < 1e-6


@gpu_only
def test_offsets_of_more_than_31_bits():
    """A quarter of a million positions of 80 heads: 2.7 billion elements a tensor."""
    x = torch.empty(1, 262144, 1, 80, 128, device=DEVICE, dtype=torch.bfloat16).normal_()
    q = k = v = x.transpose(1, 3)[:, :, 0]
    y, p = attention(q, k, v, 64, 16, 4), torch.arange(262144, device=DEVICE)
    near = p[allowed(p[-1], p, 64, 40, 4)]
    ref = attention_at(q[:, 60:, -8:], k[:, 60:, near], v[:, 60:, near], p[-8:], near, 64, 16, 4)
    assert relative_error(y[:, 60:, -8:], ref) < 2e-2
