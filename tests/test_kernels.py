"""The operations against loops: outputs and every gradient, by name."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import (SCORES, allowed, attention, attention_at, attention_ref, attention_topk, block_scores, block_summaries,
                     check, choose_blocks, compare, count_keys, keys_per_query, recurrence, recurrence_flat, recurrence_ref,
                     relative_error)

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


# ---------------------------------------------------------------------------------------------
# Top-k blocks

TOPK = [(0, 0, 0, 8, 3), (8, 0, 0, 8, 3), (4, 0, 0, 8, 2), (16, 0, 0, 8, 2), (0, 5, 2, 8, 2), (5, 3, 9, 7, 4), (0, 0, 0, 1, 4),
        (0, 0, 0, 64, 1), (3, 20, 0, 4, 2)]                       # dilation, window, sinks, block, topk


def score_loop(q, keys, score):
    """The score of one block, keys (N, Dh), for q (Dh,): a loop over channels."""
    if score == "last":
        return sum(q[c] * keys[-1, c] for c in range(len(q)))
    if score == "mean":
        return sum(q[c] * sum(keys[:, c]) / len(keys) for c in range(len(q)))
    return sum(max(q[c] * max(keys[:, c]), q[c] * min(keys[:, c])) for c in range(len(q)))


def topk_mask_loop(q, k, dilation, window, sinks, block, topk, score):
    """(T, T) bool of one head: what each query attends to, block by block as the definition says it."""
    T = len(q)
    mask = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        own = t // block
        best = sorted(range(own), key=lambda b: -score_loop(q[t], k[b * block:(b + 1) * block], score))[:topk - 1]
        for p in range(t + 1):
            mask[t, p] = p // block in (own, *best) or allowed(torch.tensor(t), torch.tensor(p), dilation, window, sinks)
    return mask


@pytest.mark.parametrize("score", SCORES)
def test_each_score_is_its_definition(score):
    q, k = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 28, 6)
    found = block_scores(q, block_summaries(k, 7, score), score)
    assert found.shape == (2, 3, 5, 4) and found.dtype == torch.float32
    for b, h, t, n in itertools.product(range(2), range(3), range(5), range(4)):
        assert abs(found[b, h, t, n] - score_loop(q[b, h, t], k[b, h, 7 * n:7 * n + 7], score)) < 1e-5


def test_scores_are_float32_whatever_the_keys_and_autocast_say():
    q, k = torch.randn(2, 1, 2, 32, 64).bfloat16()
    for score in SCORES:
        summaries = block_summaries(k, 8, score)
        with torch.autocast("cpu", torch.bfloat16):
            found = block_scores(q, summaries, score)
        assert summaries.dtype == torch.bfloat16 and found.dtype == torch.float32
        assert relative_error(found, block_scores(q.double(), summaries.double(), score)) < 1e-6
    assert block_summaries(k, 8, "last").data_ptr() == k[:, :, 7].data_ptr(), "of the last key nothing more is held"


@pytest.mark.parametrize("span", TOPK)
@pytest.mark.parametrize("score", SCORES)
def test_topk_attends_to_the_blocks_that_a_loop_chooses(span, score):
    """The outputs and gradients are those of attention under the loop's mask: none flows through the choice."""
    def mask(q, k):
        heads = [[topk_mask_loop(q[b, h], k[b, h], *span, score) for h in range(2)] for b in range(2)]
        return torch.stack([torch.stack(head) for head in heads])

    def ref(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.detach().float(), k.detach().float())),

    inputs = tuple(torch.randn(3, 2, 2, 45, 4))
    def op(q, k, v):
        return attention_topk(q, k, v, *span, score, rows=20),

    for name, error in compare(op, ref, (("y",), "qkv"), inputs):
        assert error < 1e-5, f"{span} {score}: {name} has relative error {error:.1e}"
    q, k, v = inputs
    chunk = attention_topk(q[:, :, 29:], k, v, *span, score)
    assert relative_error(chunk, attention_topk(q, k, v, *span, score)[:, :, 29:]) < 1e-6, "a chunk that continues a sequence"


def test_topk_gradients_by_finite_differences():
    q, k, v = torch.randn(3, 1, 1, 14, 4, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda *qkv: attention_topk(*qkv, 4, 1, 1, 4, 2), (q, k, v))


@pytest.mark.parametrize("score", SCORES)
def test_the_limits_of_topk_are_the_other_patterns(score):
    q, k, v = torch.randn(3, 2, 3, 50, 8)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for span in ((0, 0, 0, 8, 7), (0, 0, 0, 8, 10**9), (0, 0, 0, 1, 50), (0, 0, 0, 50, 1), (0, 0, 0, 10**9, 1), (1, 0, 0, 8, 2),
                 (0, 49, 0, 8, 2), (0, 0, 50, 8, 2)):
        error = relative_error(attention_topk(q, k, v, *span, score), dense)
        assert error < 1e-6, f"{span} should be dense: relative error {error:.1e}"
    assert relative_error(attention_topk(q, k, v, 0, 0, 0, 1, 1, score), v) < 1e-6, "N1K1: only itself"
    for span in ((16, 0, 0), (0, 5, 3), (7, 2, 1)):
        assert relative_error(attention_topk(q, k, v, *span, 1, 1, score), attention(q, k, v, *span)) < 1e-6
    local = attention_topk(q, k, v, 0, 0, 0, 10, 1, score).unflatten(2, (5, 10))
    blocks = F.scaled_dot_product_attention(*(z.unflatten(2, (5, 10)) for z in (q, k, v)), is_causal=True)
    assert relative_error(local, blocks) < 1e-6, "K1: each block by itself"


@pytest.mark.parametrize("score", SCORES)
def test_the_choice_sees_no_future(score):
    """Blocks that are not complete before a query's own are no candidates, nor is what comes after it."""
    q, k, v = torch.randn(3, 1, 2, 64, 8)
    before = attention_topk(q, k, v, 8, 0, 0, 8, 3, score)
    for j in (1, 23, 24, 40, 63):
        changed = [z.clone() for z in (q, k, v)]
        for z in changed:
            z[:, :, j:] += 10
        after = attention_topk(*changed, 8, 0, 0, 8, 3, score)
        assert after[:, :, :j].equal(before[:, :, :j]) and not after[:, :, j].equal(before[:, :, j])
    chosen = choose_blocks(q, block_summaries(k, 8, score), torch.arange(64)[:, None], 8, 3, score)
    assert (chosen[..., 0] == torch.arange(64) // 8).all(), "the own block comes first"
    assert (chosen[:, :, 16:] <= torch.arange(16, 64)[:, None] // 8).all(), "with two blocks before it, none from after it"


@pytest.mark.parametrize("span", TOPK + [(*span, 1, 1) for span in PATTERNS])
def test_keys_are_counted_as_the_mean_over_all_choices(span):
    dilation, window, sinks, block, topk = span
    t, found = torch.arange(30), count_keys(torch.arange(30), *span)
    for i in range(30):
        past, p = i // block, torch.arange(i + 1)
        granted = allowed(torch.tensor(i), p, dilation, window, sinks)
        choices = itertools.combinations(range(past), min(topk - 1, past))
        counts = [(granted | torch.isin(p // block, torch.tensor([past, *choice]))).sum().item() for choice in choices]
        assert abs(found[i] - sum(counts) / len(counts)) < 1e-9, f"{span} at {i}"
    assert keys_per_query(30, *span) == pytest.approx(found.mean().item())
    assert count_keys(t[7:8], *span) == found[7]
