"""The two operations against float64 loops: outputs and every gradient, by name."""
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import (allowed, attention, attention_at, attention_ref, check, compare, recurrence, recurrence_flat,
                     recurrence_ref, relative_error)

PATTERNS = [(1, 0, 0), (1, 9, 3), (4, 0, 0), (16, 0, 0), (7, 5, 3), (64, 16, 4), (0, 12, 4), (0, 0, 0), (0, 0, 5),
            (500, 0, 0), (3, 400, 0), (5, 2, 400)]              # D > T, W >= T and S > T among them


def test_allowed_is_the_definition():
    for dilation, window, sinks in PATTERNS:
        for t in range(40):
            for p in range(40):
                expected = p <= t and ((dilation >= 1 and (p + 1) % dilation == 0) or t - p <= window or p < sinks)
                found = bool(allowed(torch.tensor(t), torch.tensor(p), dilation, window, sinks))
                assert found == expected, (t, p, dilation, window, sinks)


def test_recurrence_and_attention_match_float64_loops():
    rows = list(check("cpu"))
    assert len(rows) > 200
    for op, dtype, case, name, error, limit in rows:
        assert error <= limit, f"{op} {dtype} {case}: {name} has relative error {error:.1e} > {limit:.0e}"


@pytest.mark.parametrize("T", [1, 2, 3, 16, 17, 63, 129])
def test_recurrence_on_strided_views(T):
    """Straight out of in_proj: k, v, g are slices of one tensor, so none is contiguous."""
    x, state = torch.randn(2, T, 5 * 8), torch.randn(2, 2, 8)

    def op(x, k0, v0):
        _, _, k, v, g = x.split(8, dim=-1)
        return recurrence_flat(k, v, g, k0, v0)

    def ref(x, k0, v0):
        _, _, k, v, g = x.split(8, dim=-1)
        return recurrence_ref(k, v, g, k0, v0)

    for name, error in compare(op, ref, (("k_rec", "v_rec", "k_end", "v_end"), ("x", "k0", "v0")), (x, *state)):
        assert error < 1e-5, f"{name} has relative error {error:.1e}"


def test_recurrence_gradients_by_finite_differences():
    k, v, g = torch.randn(3, 2, 7, 3, dtype=torch.float64).requires_grad_().unbind()
    state = torch.randn(2, 2, 3, dtype=torch.float64).requires_grad_().unbind()

    assert torch.autograd.gradcheck(recurrence_flat, (k, v, g, *state))


@pytest.mark.parametrize("cuts", [(1, 1, 1), (5, 20), (13,), (24, 1)])
def test_recurrence_state_carries_across_chunks(cuts):
    T = 40
    x = torch.randn(3, 2, T, 6, dtype=torch.float64, requires_grad=True)
    whole_k, whole_v, whole_end = recurrence(*x)
    pieces, state = [], None
    for piece in x.split((*cuts, T - sum(cuts)), dim=2):
        *out, state = recurrence(*piece, state)
        pieces.append(torch.stack(out))
    chunked = torch.cat(pieces, dim=2)
    names, whole = ("k_rec", "v_rec", "k_end", "v_end"), (whole_k, whole_v, *whole_end)
    for name, a, b in zip(names, (*chunked, *state), whole):
        assert relative_error(a, b) < 1e-12, f"{name} differs: {relative_error(a, b):.1e}"
    weight = torch.randn_like(chunked)
    grads = [torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (chunked, torch.stack((whole_k, whole_v)))]
    assert relative_error(*grads) < 1e-12, "the gradient through the carried state differs"


def test_recurrence_state_is_float32_and_outputs_keep_their_dtype():
    k, v, g = torch.randn(3, 1, 9, 4).bfloat16()
    k_rec, v_rec, state = recurrence(k, v, g)
    assert k_rec.dtype == v_rec.dtype == torch.bfloat16
    assert [s.dtype for s in state] == [torch.float32] * 2 and [s.shape for s in state] == [(1, 4)] * 2


def test_recurrence_at_the_ends_of_the_decay():
    """a = 0 passes keys through, a = 1 freezes the state; 0.5 averages."""
    k, v = torch.randn(2, 2, 30, 4)
    state = torch.randn(2, 4), torch.randn(2, 4)
    k_rec, v_rec, _ = recurrence(k, v, torch.full_like(k, -math.inf), state)
    assert torch.equal(k_rec, k) and torch.equal(v_rec, v)
    k_rec, _, end = recurrence(k, v, torch.full_like(k, math.inf), state)
    assert torch.equal(k_rec, state[0][:, None].expand_as(k)) and torch.equal(end[1], state[1])
    assert torch.allclose(recurrence(k, v, torch.zeros_like(k))[0][:, 1], k[:, 0] / 4 + k[:, 1] / 2)


def test_recurrence_refuses_mismatched_shapes():
    with pytest.raises(AssertionError, match="share one shape"):
        recurrence(torch.randn(1, 4, 2), torch.randn(1, 5, 2), torch.randn(1, 4, 2))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("T", [1, 5, 130, 261])
def test_attention_on_strided_heads(pattern, T):
    """Any pattern, ragged T, non-contiguous head slices; outputs and dq, dk_rec, dv_rec."""
    x = torch.randn(2, T, 3 * 4 * 8)

    def op(x):
        return attention(*(z.view(2, T, 4, 8).transpose(1, 2)[:, 1:3] for z in x.chunk(3, dim=-1)), *pattern),

    def ref(x):
        return attention_ref(*(z.view(2, T, 4, 8).transpose(1, 2)[:, 1:3] for z in x.chunk(3, dim=-1)), *pattern),

    for name, error in compare(op, ref, (("y",), ("x",)), (x,)):
        assert error < 1e-5, f"{name} has relative error {error:.1e}"


def test_dilation_1_equals_dense():
    q, k, v = torch.randn(3, 2, 4, 200, 16)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for window, sinks in ((0, 0), (7, 2)):
        assert torch.equal(attention(q, k, v, 1, window, sinks), dense)
    assert relative_error(attention(q, k, v, 0, 200, 0), dense) < 1e-6, "a window over everything is dense too"


def test_attention_gathers_only_keys_that_are_allowed():
    """A key that no query may attend to can hold anything, even NaN, and costs nothing."""
    q, k, v = torch.randn(3, 1, 2, 300, 8)
    reached = torch.stack([allowed(torch.arange(256, 300)[:, None], torch.arange(300), 16, 0, 0)]).flatten(0, 1).any(0)
    k[:, :, ~reached], v[:, :, ~reached] = math.nan, math.nan
    assert attention(q, k, v, 16, 0, 0)[:, :, 256:].isfinite().all()


def test_attention_at_takes_keys_in_any_order():
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    order = torch.randperm(50)
    y = attention_at(q[:, :, 30:], k[:, :, order], v[:, :, order], torch.arange(30, 50), order, 8, 5, 2)
    assert relative_error(y, attention(q, k, v, 8, 5, 2)[:, :, 30:]) < 1e-6
