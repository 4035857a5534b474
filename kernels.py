"""
RAT+'s two operations, in plain PyTorch.

  recurrence   h_t = a_t * h_{t-1} + (1 - a_t) * x_t        a_t = sigmoid(g_t), x in {k, v}       (2)
  attention    y_t = sum over allowed p of softmax_p(q_t . k_p / sqrt(Dh)) v_p                    (3)
  allowed      p <= t, and p is on the dilated grid, in the window, or a sink                     (4)

Equation numbers are README's. These run on any device and define what the operations mean; they are written to be read
first, then to be quick enough for small models. GPU kernels are not here yet: `path` says so in every script's header.

  code             shape             paper
  k, v             (B, T, C)         k_t, v_t: keys and values before the recurrence
  g, a             (B, T, C)         the gate's logit, and the decay a_t = sigmoid(g_t) in (0, 1)
  k_rec, v_rec     (B, T, C)         k~_t, v~_t: keys and values after it; (B, H, T, Dh) in attention
  state            2 x (B, C)        k~ and v~ of the last position, float32
  dilation         int               D: every D-th position is kept; 0 for none
  window, sinks    int               W, S: the authors' local_size and initial_size
  t, p             int64 tensors     position of a query, position of a key
  B T C H Dh                         batch, time, channels (C = H * Dh), heads, head width

`python kernels.py` checks both operations against float64 loops on fresh random inputs.
"""
import math
import sys

import torch
import torch.nn.functional as F


def path(device):
    """Which implementation runs on `device`, for the header line of the scripts."""
    return f"reference (plain PyTorch) on {device}"


# ---------------------------------------------------------------------------------------------
# Recurrence (2). A first-order linear recurrence is a scan: composing two steps h -> a h + b gives a step of
# the same form, so a long chain may be cut into pieces that are scanned side by side and joined afterwards.

def linear_scan(a, b, h0):
    """h_t = a_t * h_{t-1} + b_t along T, in about 2 sqrt(T) vectorised steps instead of T.

    a (B, T, C); b (N, B, T, C): N sequences under one decay; h0 (N, B, C). Returns h (N, B, T, C).
    T is cut into n chunks of c. Inside all chunks at once we scan b from zero, and the product of the
    decays; then the chunks' last values are chained; then each chunk receives what entered it.
    """
    N, B, T, C = b.shape
    c = math.isqrt(T - 1) + 1                                  # ceil(sqrt(T)): the two loops are equally long
    n = -(-T // c)
    pad = (0, 0, 0, n * c - T)                                 # padding comes last, so nothing reads it
    a = F.pad(a, pad).view(B, n, c, C)
    b = F.pad(b, pad).view(N, B, n, c, C)
    h, prod = torch.empty_like(b), torch.empty_like(a)
    h[..., 0, :], prod[..., 0, :] = b[..., 0, :], a[..., 0, :]
    for i in range(1, c):
        torch.addcmul(b[..., i, :], a[..., i, :], h[..., i - 1, :], out=h[..., i, :])
        torch.mul(a[..., i, :], prod[..., i - 1, :], out=prod[..., i, :])
    entering = torch.empty_like(h[..., 0, :])                  # (N, B, n, C): h just before each chunk
    entering[:, :, 0] = h0
    for j in range(1, n):
        torch.addcmul(h[:, :, j - 1, -1], prod[:, j - 1, -1], entering[:, :, j - 1], out=entering[:, :, j])
    return h.addcmul_(prod, entering.unsqueeze(3)).view(N, B, n * c, C)[:, :, :T]


class Recurrence(torch.autograd.Function):
    """Equation (2) with its own backward: one scan in reverse, where autograd would retrace every step.

    With d_t = dL/dh_t, counting every later step's use of h_t (k and v each have such a chain):
        d_t  = dy_t + a_{t+1} * d_{t+1}                        the same scan, run from the end
        dx_t = (1 - a_t) * d_t
        dg_t = a_t * (1 - a_t) * sum over k, v of d_t * (h_{t-1} - x_t)
        dh_{-1} = a_0 * d_0
    """

    @staticmethod
    def forward(ctx, k, v, g, k0, v0):
        acc = torch.promote_types(k.dtype, torch.float32)      # float32; float64 inputs stay float64
        a, x, h0 = torch.sigmoid(g.to(acc)), torch.stack((k, v)).to(acc), torch.stack((k0, v0)).to(acc)
        h = linear_scan(a, (1 - a) * x, h0)
        ctx.save_for_backward(a, x, h, h0)
        ctx.dtypes = k.dtype, v.dtype, g.dtype, k0.dtype, v0.dtype
        k_end, v_end = h[:, :, -1].clone()
        return h[0].to(k.dtype), h[1].to(v.dtype), k_end, v_end

    @staticmethod
    def backward(ctx, dk_rec, dv_rec, dk_end, dv_end):
        a, x, h, h0 = ctx.saved_tensors
        dy = torch.stack((dk_rec, dv_rec)).to(a.dtype)
        dy[:, :, -1] += torch.stack((dk_end, dv_end))
        a_next = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), dim=1)
        d = linear_scan(a_next.flip(1), dy.flip(2), torch.zeros_like(h0)).flip(2)
        h_prev = torch.cat((h0.unsqueeze(2), h[:, :, :-1]), dim=2)
        dg = a * (1 - a) * (d * (h_prev - x)).sum(0)
        grads = (*((1 - a) * d), dg, *(a[:, 0] * d[:, :, 0]))
        return tuple(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes))


def recurrence(k, v, g, state=None):
    """The gated recurrence over keys and values, equation (2) of README. Differentiable in every input.

    k, v, g: (B, T, C), T >= 1, any floating dtype, any strides; g is the gate's logit.
    state:   (k_rec, v_rec) of the position before, each (B, C); None: zeros.
    Returns k_rec, v_rec (B, T, C) in the dtype of k and v, and the state after the last position, float32.
    The arithmetic is float32 whatever the inputs' dtype (float64 for float64 inputs).
    """
    B, T, C = k.shape
    shapes = [tuple(z.shape) for z in (k, v, g)]
    assert len(set(shapes)) == 1 and T >= 1, f"recurrence: k, v, g must share one shape (B, T >= 1, C), got {shapes}"
    if state is None:
        state = (k.new_zeros(B, C, dtype=torch.promote_types(k.dtype, torch.float32)),) * 2
    k_rec, v_rec, k_end, v_end = Recurrence.apply(k, v, g, *state)
    return k_rec, v_rec, (k_end, v_end)


# ---------------------------------------------------------------------------------------------
# Attention (3) over a sparse set of keys (4)

def on_grid(p, dilation):
    """Is p the last position of a block of `dilation`? Bool, the shape of p. Dilation 0: never."""
    return (p + 1) % dilation == 0 if dilation else p != p


def allowed(t, p, dilation, window, sinks):
    """May a query at position t attend to the key at position p? Equation (4) of README, THE definition.

    t, p: integer tensors that broadcast. Returns bool. The grid is absolute, shared by all queries: a key
    off the grid is never needed again once it leaves the window, which is why the cache shrinks.
    """
    return (p <= t) & (on_grid(p, dilation) | (t - p <= window) | (p < sinks))


def attention_at(q, k_rec, v_rec, t, p, dilation, window, sinks):
    """Attention between explicit positions: queries at t (Tq,), keys at p (Tk,), in any order.

    q (B, H, Tq, Dh); k_rec, v_rec (B, H, Tk, Dh). Returns (B, H, Tq, Dh). Every pair is scored, then masked.
    """
    mask = allowed(t[:, None], p[None, :], dilation, window, sinks)
    return F.scaled_dot_product_attention(q, k_rec, v_rec, attn_mask=mask)


def attention(q, k_rec, v_rec, dilation, window, sinks, block=128):
    """Causal attention of a whole sequence over a dilated grid, a window and sinks: equation (3) of README.

    q, k_rec, v_rec: (B, H, T, Dh), one dtype, after RoPE. Returns (B, H, T, Dh). One softmax over the union.
    Queries go in blocks; a block gathers only keys that one of its queries may use, so a query costs
    T/dilation + window + sinks + block keys, not T. Dilation 1 is PyTorch's dense causal attention.
    """
    shapes = [tuple(z.shape) for z in (q, k_rec, v_rec)]
    assert len(set(shapes)) == 1, f"attention: q, k_rec, v_rec must share one shape (B, H, T, Dh), got {shapes}"
    if dilation == 1:
        return F.scaled_dot_product_attention(q, k_rec, v_rec, is_causal=True)
    y = []
    for q_block, t in zip(q.split(block, dim=2), torch.arange(q.shape[2], device=q.device).split(block)):
        p = torch.arange(t[-1] + 1, device=q.device)
        p = p[allowed(t[-1], p, dilation, window + len(t) - 1, sinks)]     # as far back as the block's first query sees
        k, v = k_rec.index_select(2, p), v_rec.index_select(2, p)
        y.append(attention_at(q_block, k, v, t, p, dilation, window, sinks))
    return torch.cat(y, dim=2)


# ---------------------------------------------------------------------------------------------
# The checks: `python kernels.py`

def recurrence_ref(k, v, g, k0, v0):
    """Equation (2), read aloud: one step at a time. The yardstick of `recurrence`."""
    a, h, out = torch.sigmoid(g), torch.stack((k0, v0)), []
    for t in range(k.shape[1]):
        h = a[:, t] * h + (1 - a[:, t]) * torch.stack((k[:, t], v[:, t]))
        out.append(h)
    k_rec, v_rec = torch.stack(out, dim=2)
    return k_rec, v_rec, h[0], h[1]


def recurrence_flat(k, v, g, k0, v0):
    """`recurrence` with the signature of its yardstick."""
    k_rec, v_rec, end = recurrence(k, v, g, (k0, v0))
    return k_rec, v_rec, *end


def attention_ref(q, k_rec, v_rec, dilation, window, sinks):
    """Equation (3), read aloud: all T x T scores, then the mask. The yardstick of `attention`."""
    t = torch.arange(q.shape[2], device=q.device)
    scores = q @ k_rec.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~allowed(t[:, None], t, dilation, window, sinks), -math.inf)
    return scores.softmax(-1) @ v_rec


def relative_error(x, ref):
    """||x - ref|| / ||ref||, in float64; ||x - ref|| itself where ||ref|| < 1, as some gradients are all but zero."""
    x, ref = x.double(), ref.double()
    return ((x - ref).norm() / ref.norm().clamp(min=1)).item()


def compare(op, ref, names, inputs):
    """Run `op` in the dtype of `inputs`, `ref` in float64; yield (name, relative error) of every output and gradient.

    names: (names of the outputs, names of the inputs). The loss is a random weighting of all outputs.
    """
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs, outputs64 = op(*inputs), ref(*inputs64)
    weights = [torch.randn_like(y) for y in outputs64]
    grads = torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip(outputs, weights)), inputs)
    grads64 = torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs64, weights)), inputs64)
    names = [*names[0], *("d" + name for name in names[1])]
    for name, x, x64 in zip(names, (*outputs, *grads), (*outputs64, *grads64)):
        yield name, relative_error(x, x64)


def check(device):
    """Yield (operation, dtype, case, tensor, relative error, limit) over dtypes, ragged lengths and patterns."""
    B, H, Dh = 2, 3, 16
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for T in (1, 2, 37, 300):
            x, state = torch.randn(3, B, T, H * Dh, device=device).to(dtype), torch.randn(2, B, H * Dh, device=device)
            names = ("k_rec", "v_rec", "k_end", "v_end"), ("k", "v", "g", "k0", "v0")
            for name, error in compare(recurrence_flat, recurrence_ref, names, (*x, *state)):
                yield "recurrence", dtype, f"T{T}", name, error, limit
            for span in ((1, 0, 0), (16, 0, 0), (5, 7, 3), (0, 40, 4), (64, 500, 400)):
                x = torch.randn(3, B, H, T, Dh, device=device).to(dtype)
                ops = [lambda *qkv, f=f: (f(*qkv, *span),) for f in (attention, attention_ref)]
                for name, error in compare(*ops, (("y",), ("q", "k_rec", "v_rec")), x):
                    yield "attention", dtype, f"T{T}, dilation, window, sinks {span}", name, error, limit


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__} | {path(device)} | relative errors against float64 loops; nothing is timed yet")
    print("| operation | dtype | tensors checked | worst error | limit | at |\n|---|---|---|---|---|---|")
    cases, failed = {}, 0
    for op, dtype, *row in check(device):
        cases.setdefault((op, dtype), []).append(row)
    for (op, dtype), rows in cases.items():
        case, name, error, limit = max(rows, key=lambda row: (math.isnan(row[2]), row[2]))
        bad = sum(not row[2] <= limit for row in rows)
        failed += bad
        verdict = f"{limit:.0e}, {bad} FAILED" if bad else f"{limit:.0e}"
        print(f"| {op} | {dtype} | {len(rows)} | {error:.1e} | {verdict} | {name} at {case} |")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
