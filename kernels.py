"""
RAT+'s operations: a plain-PyTorch reference of each, and beside it, but for top-k blocks, the Triton kernel that a GPU runs.

  recurrence   h_t = a_t * h_{t-1} + (1 - a_t) * x_t        a_t = sigmoid(g_t), x in {k, v}       (2)
  attention    y_t = sum over allowed p of softmax_p(q_t . k_p / sqrt(Dh)) v_p                    (3)
  allowed      p <= t, and p is on the dilated grid, in the window, or a sink                     (4)
               or, with top-k blocks, in one of the blocks whose summaries score best for q_t

Equation numbers are README's. The references run on any device and define what the operations mean. The kernels take
over on CUDA, unasked, by the same names and with gradients; `path` says in every script's header which of the two ran.

  code             shape             paper
  k, v             (B, T, C)         k_t, v_t: keys and values before the recurrence
  g, a             (B, T, C)         the gate's logit, and the decay a_t = sigmoid(g_t) in (0, 1)
  k_rec, v_rec     (B, T, C)         k~_t, v~_t: keys and values after it; (B, H, T, Dh) in attention
  state            2 x (B, C)        k~ and v~ of the last position, float32
  dilation         int               D: every D-th position is kept; 0 for none
  window, sinks    int               W, S: the authors' local_size and initial_size
  block, topk      int               N, K: the size of a block, and how many a query attends to
  t, p             int64 tensors     position of a query, position of a key
  B T C H Dh                         batch, time, channels (C = H * Dh), heads, head width

In kernels: BT, BC, BM, BN, BD are the sides of a program's tile (time, channels, queries, keys, Dh up to a power of 2); a
trailing comment gives a tile's shape. A program is one block of GPU threads; programs run in the order of their number, many
at once.

`python kernels.py` checks the operations against float64 on fresh random inputs, then times them on a GPU. (Attention of a
chunk and top-k blocks are left to tests/.)
"""
import argparse
import math
import os
import sys
import types

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                       # no GPU: the checks run the kernels in Triton's interpreter
try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                                            # not on this platform: the references run
    triton, jit, tl = None, lambda f: f, types.SimpleNamespace(constexpr=lambda value: value)


INTERPRETED = False


def interpret():
    """Send CPU tensors to the kernels too, for Triton's interpreter (TRITON_INTERPRET=1), in tiles that suit its slowness."""
    global INTERPRETED
    INTERPRETED = True
    for kernel in RECURRENCE:
        RECURRENCE[kernel] = (dict(RUN=4, BT=16, BC=16, num_warps=1),) * 2


def runs_kernels(x):
    """Do the kernels take this tensor? On CUDA with Triton, in float32, float16 or bfloat16."""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def path(device):
    """Which implementation runs on `device`, for the header line of the scripts."""
    if runs_kernels(torch.empty(0, device=device)):
        return f"Triton {triton.__version__} kernels on {torch.cuda.get_device_name(device)}"
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


# Kernel: the recurrence. A program takes a tile of BT steps x BC channels of one sequence and writes, in one pass,
#
#   h_t = P_t * h_in + H_t        P_t: product of the tile's decays up to t, H_t: the tile's own scan from zero
#
# where h_in, the h just before the tile, comes from the program before it. So the tiles of a sequence form a chain, but one
# that carries BC numbers at a time: the rest is done before they arrive. A number travels as one 64-bit word, its float32
# bits above a flag: the reader spins until all flags are set, and no fence is needed, since a word is never torn. The
# chain can't lock up: a program waits only for one of a smaller number, which has started before it.
#
# A tile is held as (N, RUN, BC), t = n * RUN + r: the RUN steps of a run sit in one thread's registers and are scanned there
# without any exchange; only the runs' ends, a RUN-th of the data, go through shuffles and shared memory.
#
# Grid: chunks x B x C / BC, chunks slowest. Bytes per element in bf16: reads k, v, g, writes k_rec, v_rec: 10, and for the
# chain 2 words of 8 / BT, each zeroed, written and read. The alternative without a chain, one pass for the tiles' ends and one
# for the outputs, is 16; a program that walks a whole sequence is also 10, but leaves most of the chip idle when B * C is
# small. Limits: registers (a tile holds P, H and the inputs in float32), and for one long sequence the chain's latency.

@jit
def sigmoid(g):
    return 1 / (1 + tl.exp(-g))


@jit
def then(a1, k1, v1, a2, k2, v2):
    """Step 1, then step 2, of the chains of k and v: h -> a1 h + x1 -> a2 (a1 h + x1) + x2."""
    return a1 * a2, a2 * k1 + k2, a2 * v1 + v2


@jit
def then_run(a1, k1, v1, A1, K1, V1, a2, k2, v2, A2, K2, V2):
    """The same for runs of steps. The capitals leave out the last run: a scan of them gives what enters each run."""
    return a1 * a2, a2 * k1 + k2, a2 * v1 + v2, a1 * A2, A2 * k1 + K2, A2 * v1 + V2


@jit
def last(x, axis: tl.constexpr):
    """x at the last index of axis 0 of (N, BC) or of axis 1 of (N, RUN, BC)."""
    i = tl.arange(0, x.shape[axis]) == x.shape[axis] - 1
    return tl.sum(tl.where(i[:, None] if axis == 0 else i[None, :, None], x, 0), axis)


@jit
def either(a, b):
    return a | b


@jit
def read_words(word, mask, COPIES: tl.constexpr):
    """The words (BC,), 0 if not yet sent. Every thread reads for itself and the COPIES are joined: threads that read the
    same word at different times would otherwise not agree on whether it has come."""
    word = word[None, :] + tl.zeros((COPIES, 1), tl.int32)
    return tl.reduce(tl.load(word, mask=mask[None, :], other=1, volatile=True), 0, either)


@jit
def chain(a, x_k, x_v, first_k, first_v, words, chunk, chunks, b, c, C, COPIES: tl.constexpr):
    """h_t = a_t * h_{t-1} + x_t over the tile (N, RUN, BC) of a chunk, x in {k, v}, in float32.

    first (B, C): what enters chunk 0; words (B, chunks, 2, C) int64: what leaves each chunk. Returns h_k, h_v (N, RUN, BC)
    and h at the end of the chunk, 2 x (BC,).
    """
    p, h_k, h_v = tl.associative_scan((a, x_k, x_v), 1, then)
    zero = last(p, 1) * 0
    runs = last(p, 1), last(h_k, 1), last(h_v, 1), zero + 1, zero, zero
    p_run, k_run, v_run, p_in, k_in, v_in = tl.associative_scan(runs, 0, then_run)                  # (N, BC)
    p_end, end_k, end_v = last(p_run, 0), last(k_run, 0), last(v_run, 0)                            # (BC,)

    mask, word = c < C, words + (b * chunks + chunk) * 2 * C + c
    if chunk == 0:
        in_k, in_v = tl.load(first_k + b * C + c, mask=mask, other=0), tl.load(first_v + b * C + c, mask=mask, other=0)
    else:
        k, v = read_words(word - 2 * C, mask, COPIES), read_words(word - C, mask, COPIES)
        while tl.min(k & v & 1) == 0:
            k, v = read_words(word - 2 * C, mask, COPIES), read_words(word - C, mask, COPIES)
        in_k, in_v = (k >> 32).to(tl.int32).to(tl.float32, bitcast=True), (v >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    end_k += p_end * in_k
    end_v += p_end * in_v
    tl.store(word, (end_k.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1, mask=mask)
    tl.store(word + C, (end_v.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1, mask=mask)
    k_in += p_in * in_k[None, :]                                                                    # enters each run
    v_in += p_in * in_v[None, :]
    return h_k + p * k_in[:, None, :], h_v + p * v_in[:, None, :], end_k, end_v


@jit
def place(B, C, chunks, RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """(chunk, sequence, channels (BC,), steps within the chunk (N, RUN, 1)) of this program."""
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(C, BC)
    c = (program % tiles * BC).to(tl.int32) + tl.arange(0, BC)
    i = tl.arange(0, BT // RUN)[:, None, None] * RUN + tl.arange(0, RUN)[None, :, None]
    return program // (tiles * B), program // tiles % B, c, i


@jit
def recurrence_forward_kernel(k, v, g, stride_b, stride_t, k0, v0, k_rec, v_rec, k_end, v_end, words, B, T, C,
                              RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, COPIES: tl.constexpr):
    """k, v, g (B, T, C) with these strides; k_rec, v_rec (B, T, C); k0, v0, k_end, v_end (B, C) float32; words: zeros."""
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, chunks, RUN, BT, BC)
    live = (i < T - chunk * BT) & (c < C)[None, None, :]                                            # (N, RUN, BC)
    at = b * stride_b + chunk * BT * stride_t + i * stride_t + c[None, None, :]
    a = sigmoid(tl.load(g + at, mask=live, other=float("inf")).to(tl.float32))                      # past the end: a = 1, x = 0
    x_k = (1 - a) * tl.load(k + at, mask=live, other=0).to(tl.float32)
    x_v = (1 - a) * tl.load(v + at, mask=live, other=0).to(tl.float32)
    h_k, h_v, end_k, end_v = chain(a, x_k, x_v, k0, v0, words, chunk, chunks, b, c, C, COPIES)
    if chunk == chunks - 1:
        tl.store(k_end + b * C + c, end_k, mask=c < C)
        tl.store(v_end + b * C + c, end_v, mask=c < C)
    out = (b * T + chunk * BT) * C + i * C + c[None, None, :]
    tl.store(k_rec + out, h_k.to(k_rec.dtype.element_ty), mask=live)
    tl.store(v_rec + out, h_v.to(v_rec.dtype.element_ty), mask=live)


# Kernel: its backward. With d_t = dL/dh_t (see Recurrence), the same chain, run from the end:
#
#   d_t = dy_t + a_{t+1} * d_{t+1}         dx_t = (1 - a_t) * d_t         dg_t = sum over k, v of dx_t * (h_t - x_t)
#
# since a_t (h_{t-1} - x_t) = h_t - x_t. So dg needs no step before t, and h is read where the forward pass has written it.
# a_{t+1} is loaded beside a_t; its line is in the L1 cache already. Step i of a chunk is the i-th from the end.
#
# Bytes per element in bf16: reads k, v, g, k_rec, v_rec, dk_rec, dv_rec, writes dk, dv, dg: 20. The alternative, computing h
# again in each tile, is 16, but a second scan, in the other direction, doubles the registers: three times slower when tried.

@jit
def recurrence_backward_kernel(k, v, g, stride_b, stride_t, k_rec, v_rec, dk_rec, dv_rec, dk_end, dv_end,
                               dk, dv, dg, dk0, dv0, words, B, T, C, RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
                               COPIES: tl.constexpr):
    """Shapes as in the forward kernel; dk, dv, dg, dk_rec, dv_rec (B, T, C)."""
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, chunks, RUN, BT, BC)
    live = (i < T - chunk * BT) & (c < C)[None, None, :]
    end = T - 1 - chunk * BT                                                                        # the step where i = 0
    at = b * stride_b + end * stride_t - i * stride_t + c[None, None, :]
    out = (b * T + end) * C - i * C + c[None, None, :]
    a_next = sigmoid(tl.load(g + at + stride_t, mask=live & (i > end + 1 - T), other=float("inf")).to(tl.float32))
    d_k = tl.load(dk_rec + out, mask=live, other=0).to(tl.float32)
    d_v = tl.load(dv_rec + out, mask=live, other=0).to(tl.float32)
    d_k, d_v, first_k, first_v = chain(a_next, d_k, d_v, dk_end, dv_end, words, chunk, chunks, b, c, C, COPIES)
    if chunk == chunks - 1:
        a = sigmoid(tl.load(g + b * stride_b + c, mask=c < C, other=0).to(tl.float32))
        tl.store(dk0 + b * C + c, a * first_k, mask=c < C)
        tl.store(dv0 + b * C + c, a * first_v, mask=c < C)
    keep = 1 - sigmoid(tl.load(g + at, mask=live, other=0).to(tl.float32))
    d_k *= keep
    d_v *= keep
    far_k = tl.load(k_rec + out, mask=live, other=0).to(tl.float32) - tl.load(k + at, mask=live, other=0).to(tl.float32)
    far_v = tl.load(v_rec + out, mask=live, other=0).to(tl.float32) - tl.load(v + at, mask=live, other=0).to(tl.float32)
    tl.store(dk + out, d_k.to(dk.dtype.element_ty), mask=live)
    tl.store(dv + out, d_v.to(dv.dtype.element_ty), mask=live)
    tl.store(dg + out, (d_k * far_k + d_v * far_v).to(dg.dtype.element_ty), mask=live)


RECURRENCE = {                                                 # tiles: fastest on an H100, for many chains and for few long ones
    "forward": (dict(RUN=4, BT=64, BC=64, num_warps=4), dict(RUN=8, BT=128, BC=32, num_warps=2)),
    "backward": (dict(RUN=4, BT=64, BC=64, num_warps=4, maxnreg=168), dict(RUN=4, BT=128, BC=32, num_warps=4, maxnreg=168))}


def launch_recurrence(kernel, configs, B, T, C, *arguments):
    """Run a kernel of the recurrence with the words of its chain."""
    config = configs[B * C < 4096]
    chunks, copies = triton.cdiv(T, config["BT"]), max(1, 32 * config["num_warps"] // config["BC"])
    words = torch.zeros(B, chunks, 2, C, dtype=torch.int64, device=arguments[0].device)
    kernel[chunks * B * triton.cdiv(C, config["BC"]),](*arguments, words, B, T, C, COPIES=copies, **config)


def alike(*tensors):
    """The tensors, with channels next to each other in memory and all of the same strides: copied only if they are not."""
    first, *rest = (x.stride() for x in tensors)
    return tensors if first[-1] == 1 and all(stride == first for stride in rest) else tuple(x.contiguous() for x in tensors)


@torch.library.custom_op("rat::recurrence", mutates_args=())
def recurrence_forward(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, k0: torch.Tensor, v0: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k_rec, v_rec (B, T, C); k_end, v_end (B, C) float32."""
    k, v, g = alike(k, v, g)
    outputs = recurrence_fake(k, v, g, k0, v0)
    launch_recurrence(recurrence_forward_kernel, RECURRENCE["forward"], *k.shape,
                      k, v, g, *k.stride()[:2], k0.contiguous(), v0.contiguous(), *outputs)
    return outputs


@recurrence_forward.register_fake
def recurrence_fake(k, v, g, k0, v0):
    return k.new_empty(k.shape), v.new_empty(v.shape), k0.new_empty(k0.shape), v0.new_empty(v0.shape)


@torch.library.custom_op("rat::recurrence_backward", mutates_args=())
def recurrence_backward(k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, k_rec: torch.Tensor, v_rec: torch.Tensor,
                        dk_rec: torch.Tensor, dv_rec: torch.Tensor, dk_end: torch.Tensor, dv_end: torch.Tensor
                        ) -> list[torch.Tensor]:
    """The gradients of k, v, g (B, T, C), k0, v0 (B, C)."""
    k, v, g = alike(k, v, g)
    grads = recurrence_backward_fake(k, v, g, k_rec, v_rec, dk_rec, dv_rec, dk_end, dv_end)
    rest = [x.contiguous() for x in (k_rec, v_rec, dk_rec, dv_rec, dk_end, dv_end)]
    launch_recurrence(recurrence_backward_kernel, RECURRENCE["backward"], *k.shape, k, v, g, *k.stride()[:2], *rest, *grads)
    return grads


@recurrence_backward.register_fake
def recurrence_backward_fake(k, v, g, k_rec, v_rec, dk_rec, dv_rec, dk_end, dv_end):
    return [x.new_empty(x.shape) for x in (k, v, g, dk_end, dv_end)]


recurrence_forward.register_autograd(lambda ctx, *grads: tuple(recurrence_backward(*ctx.saved_tensors, *grads)),
                                     setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output[:2]))


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
    if runs_kernels(k):
        k_rec, v_rec, k_end, v_end = recurrence_forward(k, v, g, *(z.float() for z in state))
    else:
        k_rec, v_rec, k_end, v_end = Recurrence.apply(k, v, g, *state)
    return k_rec, v_rec, (k_end, v_end)


# ---------------------------------------------------------------------------------------------
# RoPE, on queries and on recurrent keys

def rotate_ref(x, cos, sin):
    """`rotate` in plain PyTorch."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# Kernel: RoPE, y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. A program takes BT positions of one head, both halves at once.
# Grid: B x H x T / BT, heads fastest: they are neighbours in memory. Bytes per element in bf16: reads 2, writes 2, where plain
# PyTorch moves about 30 through float32 intermediates. The backward pass turns the other way, by -sin.

@jit
def rotate_kernel(x, x_b, x_h, x_t, y, cos, sin, H, T, HALF: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """x (B, H, T, Dh) with its strides -> y (B, T, H, Dh) contiguous; cos, sin (T, HALF) float32."""
    head, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    d, b, h = tl.arange(0, BD)[None, :], head // H, head % H
    live = (t < T) & (d < HALF)                                                                     # (BT, BD)
    c, s = tl.load(cos + t * HALF + d, mask=live, other=0), tl.load(sin + t * HALF + d, mask=live, other=0)
    x += b * x_b + h * x_h + t.to(tl.int64) * x_t + d
    x1, x2 = tl.load(x, mask=live, other=0).to(tl.float32), tl.load(x + HALF, mask=live, other=0).to(tl.float32)
    y += ((b * T + t) * H + h) * 2 * HALF + d
    tl.store(y, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=live)
    tl.store(y + HALF, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=live)


def new_heads(x):
    """An empty tensor of x's shape (B, H, T, Dh), laid out so that .transpose(1, 2) is contiguous."""
    B, H, T, Dh = x.shape
    return x.new_empty(B, T, H, Dh).transpose(1, 2)


@torch.library.custom_op("rat::rotate", mutates_args=())
def rotate_triton(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` by the kernel."""
    x, y, (B, H, T, Dh) = x if x.stride(-1) == 1 else x.contiguous(), new_heads(x), x.shape
    BD = triton.next_power_of_2(Dh // 2)
    BT = max(1, 4096 // BD)
    rotate_kernel[B * H, triton.cdiv(T, BT)](x, *x.stride()[:3], y, cos, sin, H, T, Dh // 2, BD, BT)
    return y


rotate_triton.register_fake(lambda x, cos, sin: new_heads(x))
rotate_triton.register_autograd(lambda ctx, dy: (rotate_triton(dy, ctx.saved_tensors[0], -ctx.saved_tensors[1]), None, None),
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]))


def rotate(x, cos, sin):
    """RoPE on x (B, H, T, Dh): channel i of the first half turns with channel i of the second. cos, sin (T, Dh/2) float32."""
    return (rotate_triton if runs_kernels(x) else rotate_ref)(x, cos, sin)


# ---------------------------------------------------------------------------------------------
# Attention (3) over a sparse set of keys (4)

FUTURE = 2**62        # a position behind all others: that of an empty slot of a cache, for one


def on_grid(p, dilation):
    """Is p the last position of a block of `dilation`? Bool, the shape of p. Dilation 0: never."""
    return (p + 1) % dilation == 0 if dilation else p != p


def allowed(t, p, dilation, window, sinks):
    """May a query at position t attend to the key at position p? Equation (4) of README, THE definition.

    t, p: integer tensors that broadcast. Returns bool. The grid is absolute, shared by all queries: a key
    off the grid is never needed again once it leaves the window, which is why the cache shrinks.
    """
    return (p <= t) & (on_grid(p, dilation) | (t - p <= window) | (p < sinks))


def count_keys(t, dilation, window, sinks, block=1, topk=1):
    """How many keys queries at t (n,) attend to, in float64; t: int64. Without top-k blocks, a block is the query by itself.

    A query takes its own block up to itself, and as many past blocks as there are, up to topk - 1. In the others it has what
    `allowed` grants. Which they are follows from the data, so that this is a mean over all choices: exact where blocks hold
    equally many such positions, as in N64K16 (none) and D64N64K8 (one), or where all blocks are taken.
    """
    past = t // block
    taken, end = past.clamp(max=topk - 1), past * block
    lasting = F.pad(allowed(FUTURE, torch.arange(t.max() + 1), dilation, window, sinks).cumsum(0), (1, 0))    # before each p
    first = torch.minimum((t - window).clamp(min=0), end)          # from here to `end`, all are in the window
    granted = end - first + lasting[first]                         # in all past blocks together
    return t - end + 1 + taken * block + granted * (1 - taken.double() / past.clamp(min=1))


def keys_per_query(T, dilation, window, sinks, block=1, topk=1):
    """Mean number of keys of the queries of T positions, as `count_keys` counts them."""
    return count_keys(torch.arange(T), dilation, window, sinks, block, topk).mean().item()


def attention_at(q, k_rec, v_rec, t, p, dilation, window, sinks):
    """Attention between explicit positions: queries at t (Tq,), keys at p (Tk,), in any order.

    q (B, H, Tq, Dh); k_rec, v_rec (B, H, Tk, Dh). Returns (B, H, Tq, Dh). Every pair is scored, then masked.
    """
    mask = allowed(t[:, None], p[None, :], dilation, window, sinks)
    return F.scaled_dot_product_attention(q, k_rec, v_rec, attn_mask=mask)


def attention_by_blocks(q, k_rec, v_rec, dilation, window, sinks, block=128):
    """The reference of the attention kernels: `attention` in plain PyTorch.

    Queries go in blocks; a block gathers only keys that one of its queries may use, so a query costs
    T/dilation + window + sinks + block keys, not T.
    """
    y = []
    for q_block, t in zip(q.split(block, dim=2), torch.arange(q.shape[2], device=q.device).split(block)):
        p = torch.arange(t[-1] + 1, device=q.device)
        p = p[allowed(t[-1], p, dilation, window + len(t) - 1, sinks)]     # as far back as the block's first query sees
        k, v = k_rec.index_select(2, p), v_rec.index_select(2, p)
        y.append(attention_at(q_block, k, v, t, p, dilation, window, sinks))
    return torch.cat(y, dim=2)


# Kernel: sparse attention. The keys that a query at t may attend to are of three kinds, and every key is of one kind only:
#
#   itself     p = t
#   lasting    p < t, a sink or on the grid: once in reach, in reach of every later query
#   passing    0 < t - p <= window, neither sink nor on the grid
#
# The lasting positions form a list, j -> p: first the sinks p = j, then the grid from the first position behind them. A
# program takes BM queries of one head; itself starts the online softmax (m: largest score, l: sum, acc: weighted values),
# so that no query is ever without a key; then tiles of BN lasting keys are gathered from the list, row by row, and
# tiles of BN passing keys from the window. Keys of no kind are never loaded: cost grows with T / D + S + W.
#
# Scores are in units of log2: scale = log2(e) / sqrt(Dh), so that exp2, which the hardware has, replaces exp. lse = m + log2(l)
# is kept for the backward pass. Grid: query blocks x B x H, the blocks of a head together (they share its keys in the L2
# cache), those with most keys first. Bytes: q, y, and the own k and v, 4 x Dh per query and head, 8 Dh in bf16; the other
# keys are found in the L2 cache. FLOPs: 4 Dh x (t / D + S + W) per query. One softmax, where flex_attention
# needs either all T keys under a mask or two calls, merged through memory by their lse.
#
# 64-bit offsets are taken by row and head, so that any T works.

FAR = tl.constexpr(2**30)      # a position that no query reaches


@jit
def lasting(j, n, DILATION: tl.constexpr, SINKS: tl.constexpr):
    """The position of the j-th of n lasting keys; from the n-th on, one that no query reaches."""
    p = j
    if DILATION > 0:
        p = tl.where(j < SINKS, j, (j - SINKS + SINKS // DILATION + 1) * DILATION - 1)
    return tl.where(j < n, p, FAR)


@jit
def count_lasting(t, DILATION: tl.constexpr, SINKS: tl.constexpr):
    """How many lasting keys lie before position t."""
    n = tl.minimum(t, SINKS)
    if DILATION > 0:
        n += tl.maximum(t // DILATION - SINKS // DILATION, 0)
    return n


@jit
def passing(p, DILATION: tl.constexpr, SINKS: tl.constexpr):
    """p, if it is neither a sink nor on the grid; else a position that no query reaches."""
    yes = p >= SINKS
    if DILATION > 0:
        yes = yes & ((p + 1) % DILATION != 0)
    return tl.where(yes, p, FAR)


@jit
def within(x, n: tl.constexpr):
    """0 <= x < n, in one comparison."""
    return x.to(tl.uint32, bitcast=True) < n


@jit
def load_rows(x, row, stride, live, DH: tl.constexpr, BD: tl.constexpr):
    """Rows of x (., Dh) -> (len(row), BD); 0 where not live, and beyond Dh."""
    d = tl.arange(0, BD)
    mask = live[:, None] if DH == BD else live[:, None] & (d < DH)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0)


@jit
def store_rows(x, row, stride, values, live, DH: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = live[:, None] if DH == BD else live[:, None] & (d < DH)[None, :]
    tl.store(x + row.to(tl.int64)[:, None] * stride + d[None, :], values.to(x.dtype.element_ty), mask=mask)


@jit
def attend(q, k, v, sees, scale, acc, l, m):
    """One step of the online softmax: BN keys more. q (BM, BD); k, v (BN, BD); sees (BM, BN); acc (BM, BD); l, m (BM,)."""
    s = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee"), -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l * shrink + tl.sum(p, 1), m_new


@jit
def attention_forward_kernel(q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, y, y_b, y_h, y_t, lse, k_cache, v_cache,
                             H, T, start, origin, slots, scale, CACHED: tl.constexpr,
                             DILATION: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, DH: tl.constexpr,
                             BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """q, y (B, H, T, Dh), each with its strides; the first query is at position `start`; lse (B, H, T) float32.

    Row i of k and v is the key at position origin + i. CACHED: lasting keys are read from k_cache, v_cache (B, H, slots, Dh)
    instead, contiguous, at the slots that `slot_of` gives them.
    """
    blocks = tl.cdiv(T, BM)
    head, block = tl.program_id(0).to(tl.int64) // blocks, blocks - 1 - tl.program_id(0) % blocks
    b, h = head // H, head % H
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    i = block * BM + tl.arange(0, BM)
    live, t, first, end = i < T, start + i, start + block * BM, start + tl.minimum(block * BM + BM, T)
    q_tile = load_rows(q + b * q_b + h * q_h, i, q_t, live, DH, BD)                                 # (BM, BD)
    own_k = load_rows(k, t - origin, k_t, live, DH, BD)
    m = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1) * scale
    l = tl.full((BM,), 1, tl.float32)
    acc = load_rows(v, t - origin, v_t, live, DH, BD).to(tl.float32)
    n = count_lasting(end, DILATION, SINKS)
    for j0 in tl.range(0, n, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        p = lasting(j, n, DILATION, SINKS)                                                             # (BN,)
        if CACHED:
            row = p
            if DILATION > 0:
                row = tl.where((p + 1) % DILATION == 0, SINKS + WINDOW + p // DILATION, p)
            cache = head * slots * DH
            k_tile = load_rows(k_cache + cache, row, DH, j < n, DH, BD)
            v_tile = load_rows(v_cache + cache, row, DH, j < n, DH, BD)
        else:
            k_tile, v_tile = load_rows(k, p, k_t, j < n, DH, BD), load_rows(v, p, v_t, j < n, DH, BD)
        acc, l, m = attend(q_tile, k_tile, v_tile, p[None, :] < t[:, None], scale, acc, l, m)
    if WINDOW > 0:
        for p0 in tl.range(tl.maximum(first - WINDOW, 0), end, BN, num_stages=STAGES):
            p = p0 + tl.arange(0, BN)
            k_tile, v_tile = load_rows(k, p - origin, k_t, p < end, DH, BD), load_rows(v, p - origin, v_t, p < end, DH, BD)
            sees = within(t[:, None] - 1 - passing(p, DILATION, SINKS)[None, :], WINDOW)
            acc, l, m = attend(q_tile, k_tile, v_tile, sees, scale, acc, l, m)
    store_rows(y + b * y_b + h * y_h, i, y_t, acc / l[:, None], live, DH, BD)
    tl.store(lse + head * T + i, m + tl.log2(l), mask=live)


# Kernels: its backward. With P the softmax (from lse), dO the gradient of y, and delta_t = dO_t . y_t:
#
#   dS = P * (dO V^T - delta)        dQ = dS K / sqrt(Dh)        dK = dS^T Q / sqrt(Dh)        dV = P^T dO
#
# dQ goes by queries, like the forward pass, and computes delta on the way. With no window, nobody but its own query sees a
# passing key: its dK and dV are written there too. The rest of dK and dV goes by keys, in a kernel that runs once over the
# lasting keys and once, if there is a window, over the passing ones; each row of dK and dV is written by exactly one.
#
# Lasting keys are few, and each is seen by all later queries: with D 64 and T 4096 one tile of keys a head, far too few
# programs. So the queries of a tile are split over several programs; their float32 sums go through memory, and are added
# in a fixed order: the same input gives the same gradient, to the bit, which atomic additions would not.
#
# Bytes, bf16, per query and head: dQ reads q, k, v, y, dO and writes dq, dk, dv: 16 Dh. dK, dV read q, dO once per key tile,
# mostly from the L2 cache: the tiles of a head run side by side. FLOPs: 6 and 8 Dh per pair, where the forward pass has 4.

@jit
def attend_backward(q, k, v, dy, sees, lse, delta, scale, dq):
    """dq (BM, BD) of BN keys more, without the factor 1 / sqrt(Dh)."""
    s = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee"), -float("inf"))
    p = tl.exp2(s * scale - lse[:, None])                                                           # (BM, BN)
    ds = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit
def attention_backward_q_kernel(q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, y, y_b, y_h, y_t,
                                dy, dy_b, dy_h, dy_t, dq, dk, dv, d_b, d_h, d_t, lse, delta, H, T, scale, factor,
                                DILATION: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, DH: tl.constexpr,
                                BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """As the forward kernel; dq, dk, dv share strides; delta (B, H, T) float32; factor 1 / sqrt(Dh)."""
    blocks = tl.cdiv(T, BM)
    head, block = tl.program_id(0).to(tl.int64) // blocks, blocks - 1 - tl.program_id(0) % blocks
    b, h, first = head // H, head % H, block * BM
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    at = b * d_b + h * d_h
    t = first + tl.arange(0, BM)
    live = t < T
    lse_t = tl.load(lse + head * T + t, mask=live, other=float("inf"))
    dy_tile = load_rows(dy + b * dy_b + h * dy_h, t, dy_t, live, DH, BD)                            # (BM, BD)
    y_tile = load_rows(y + b * y_b + h * y_h, t, y_t, live, DH, BD)
    delta_t = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + head * T + t, delta_t, mask=live)
    q_tile = load_rows(q + b * q_b + h * q_h, t, q_t, live, DH, BD)
    own_k, own_v = load_rows(k, t, k_t, live, DH, BD).to(tl.float32), load_rows(v, t, v_t, live, DH, BD).to(tl.float32)
    own_p = tl.exp2(tl.sum(q_tile.to(tl.float32) * own_k, 1) * scale - lse_t)
    own_ds = own_p * (tl.sum(dy_tile.to(tl.float32) * own_v, 1) - delta_t)
    if WINDOW == 0:
        alone = live & (passing(t, DILATION, SINKS) == t)
        store_rows(dk + at, t, d_t, (own_ds * factor)[:, None] * q_tile.to(tl.float32), alone, DH, BD)
        store_rows(dv + at, t, d_t, own_p[:, None] * dy_tile.to(tl.float32), alone, DH, BD)
    acc = own_ds[:, None] * own_k
    n = count_lasting(tl.minimum(first + BM, T), DILATION, SINKS)
    for j0 in tl.range(0, n, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        p = lasting(j, n, DILATION, SINKS)
        k_tile, v_tile = load_rows(k, p, k_t, j < n, DH, BD), load_rows(v, p, v_t, j < n, DH, BD)
        acc = attend_backward(q_tile, k_tile, v_tile, dy_tile, p[None, :] < t[:, None], lse_t, delta_t, scale, acc)
    if WINDOW > 0:
        for p0 in tl.range(tl.maximum(first - WINDOW, 0), tl.minimum(first + BM, T), BN, num_stages=STAGES):
            p = p0 + tl.arange(0, BN)
            k_tile, v_tile = load_rows(k, p, k_t, p < T, DH, BD), load_rows(v, p, v_t, p < T, DH, BD)
            sees = within(t[:, None] - 1 - passing(p, DILATION, SINKS)[None, :], WINDOW)
            acc = attend_backward(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    store_rows(dq + at, t, d_t, acc * factor, live, DH, BD)


@jit
def attention_backward_kv_kernel(q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, dy, dy_b, dy_h, dy_t,
                                 dk, dv, d_b, d_h, d_t, part, lse, delta, H, T, scale, factor, n, tiles, splits,
                                 LASTING: tl.constexpr, SPLIT: tl.constexpr, DILATION: tl.constexpr, WINDOW: tl.constexpr,
                                 SINKS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                                 STAGES: tl.constexpr):
    """dk and dv of one tile of the n lasting keys (LASTING) or of the passing keys among n = T, from one of `splits` shares
    of the queries that see it. SPLIT: to part (splits, 2, B * H, n, Dh) float32 instead of dk, dv."""
    program = tl.program_id(0).to(tl.int64)
    tile, split, head = (program % tiles).to(tl.int32), program // tiles % splits, program // tiles // splits
    b, h = head // H, head % H
    j = tile * BN + tl.arange(0, BN)
    if LASTING:
        p, live, end = lasting(j, n, DILATION, SINKS), j < n, T
    else:
        p, live, end = j, (j < n) & (passing(j, DILATION, SINKS) == j), tl.minimum(tile * BN + BN + WINDOW, T)
    first = tl.min(p)
    k_tile = load_rows(k + b * k_b + h * k_h, p, k_t, live, DH, BD)                                 # (BN, BD)
    v_tile = load_rows(v + b * v_b + h * v_h, p, v_t, live, DH, BD)
    q += b * q_b + h * q_h
    dy += b * dy_b + h * dy_h
    acc_k, acc_v = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    blocks = tl.cdiv(end - first, BM)
    for block in tl.range((blocks * split // splits).to(tl.int32), (blocks * (split + 1) // splits).to(tl.int32),
                          num_stages=STAGES):
        t = first + block * BM + tl.arange(0, BM)                                                   # (BM,)
        q_tile, dy_tile = load_rows(q, t, q_t, t < end, DH, BD), load_rows(dy, t, dy_t, t < end, DH, BD)
        lse_t = tl.load(lse + head * T + t, mask=t < end, other=float("inf"))
        delta_t = tl.load(delta + head * T + t, mask=t < end, other=0)
        sees = p[:, None] <= t[None, :] if LASTING else within(t[None, :] - p[:, None], WINDOW + 1)
        s = tl.where(sees, tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"), -float("inf"))
        prob = tl.exp2(s * scale - lse_t[None, :])                                                  # (BN, BM)
        acc_v = tl.dot(prob.to(dy_tile.dtype), dy_tile, acc_v, input_precision="ieee")
        ds = prob * (tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee") - delta_t[None, :])
        acc_k = tl.dot(ds.to(q_tile.dtype), q_tile, acc_k, input_precision="ieee")
    if SPLIT:
        heads = tl.num_programs(0) // tiles // splits
        store_rows(part + ((split * 2 + 0) * heads + head) * n * DH, j, DH, acc_k * factor, live, DH, BD)
        store_rows(part + ((split * 2 + 1) * heads + head) * n * DH, j, DH, acc_v, live, DH, BD)
    else:
        at = b * d_b + h * d_h
        store_rows(dk + at, p, d_t, acc_k * factor, live, DH, BD)
        store_rows(dv + at, p, d_t, acc_v, live, DH, BD)


ATTENTION = {                          # tiles by the bytes of a key's row: fastest on an H100, and within 99 KiB of shared memory
    "forward": {128: dict(BM=64, BN=32, STAGES=3, num_warps=4, maxnreg=96),
                256: dict(BM=64, BN=32, STAGES=2, num_warps=4, maxnreg=128)},
    "q": {128: dict(BM=64, BN=32, STAGES=2, num_warps=4, maxnreg=128), 256: dict(BM=64, BN=32, STAGES=3, num_warps=4)},
    "kv": {128: dict(BM=32, BN=64, STAGES=3, num_warps=4, maxnreg=168), 256: dict(BM=32, BN=64, STAGES=3, num_warps=4)}}
PROCESSORS = 132        # of an H100; another number only changes how finely the queries of lasting keys are split
WIDE = {512: dict(BM=32, BN=32, STAGES=1, num_warps=4), 1024: dict(BM=16, BN=16, STAGES=1, num_warps=4)}


def attention_plan(kind, q, dilation, window, sinks):
    """(scale, the constants that the attention kernels share) for q (B, H, T, Dh)."""
    Dh = q.shape[-1]
    BD = max(16, triton.next_power_of_2(Dh))
    constants = dict(DILATION=dilation, WINDOW=window, SINKS=sinks, DH=Dh, BD=BD)
    tiles = {**ATTENTION[kind], **WIDE}
    return math.log2(math.e) / math.sqrt(Dh), {**constants, **tiles[max(128, BD * q.element_size())]}


def with_strides(*tensors):
    """Each tensor (B, H, T, Dh) followed by its strides along B, H and T, as the kernels take them."""
    return [z for x in tensors for z in (x, *x.stride()[:3])]


def launch_attention(q, k, v, span, start=0, k_cache=None, v_cache=None):
    """The forward kernel on queries from position `start` on; k and v end where q does. Lasting keys: from the cache, if any."""
    y, lse = attention_fake(q, k, v, *span)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, T, _), origin, slots = q.shape, start + q.shape[2] - k.shape[2], 0 if k_cache is None else k_cache.shape[2]
    scale, constants = attention_plan("forward", q, *span)
    grid = triton.cdiv(T, constants["BM"]) * B * H,
    attention_forward_kernel[grid](*with_strides(q, k, v, y), lse, k_cache, v_cache, H, T, start, origin, slots, scale,
                                   CACHED=k_cache is not None, **constants)
    return y, lse


@torch.library.custom_op("rat::attention", mutates_args=())
def attention_forward(q: torch.Tensor, k_rec: torch.Tensor, v_rec: torch.Tensor, dilation: int, window: int, sinks: int
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, H, T, Dh) and, for the backward pass, lse (B, H, T) float32."""
    return launch_attention(q, k_rec, v_rec, (dilation, min(window, q.shape[2]), sinks))


@attention_forward.register_fake
def attention_fake(q, k_rec, v_rec, dilation, window, sinks):
    return new_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("rat::attention_backward", mutates_args=())
def attention_backward(dy: torch.Tensor, q: torch.Tensor, k_rec: torch.Tensor, v_rec: torch.Tensor, y: torch.Tensor,
                       lse: torch.Tensor, dilation: int, window: int, sinks: int) -> list[torch.Tensor]:
    """dq, dk_rec, dv_rec (B, H, T, Dh)."""
    dy, q, k_rec, v_rec = (x if x.stride(-1) == 1 else x.contiguous() for x in (dy, q, k_rec, v_rec))
    window = min(window, q.shape[2])
    dq, dk, dv = new_heads(q), new_heads(q), new_heads(q)
    delta, (B, H, T, Dh) = torch.empty_like(lse), q.shape
    strides, factor = dq.stride()[:3], 1 / math.sqrt(Dh)
    scale, constants = attention_plan("q", q, dilation, window, sinks)
    grid = triton.cdiv(T, constants["BM"]) * B * H,
    attention_backward_q_kernel[grid](*with_strides(q, k_rec, v_rec, y, dy), dq, dk, dv, *strides, lse, delta,
                                      H, T, scale, factor, **constants)

    def backward_kv(n, LASTING, splits=1, part=None):
        tiles = triton.cdiv(n, constants["BN"])
        attention_backward_kv_kernel[tiles * splits * B * H,](
            *with_strides(q, k_rec, v_rec, dy), dk, dv, *strides, part, lse, delta, H, T, scale, factor, n, tiles, splits,
            LASTING=LASTING, SPLIT=part is not None, **constants)

    scale, constants = attention_plan("kv", q, dilation, window, sinks)
    if window > 0:
        backward_kv(T, False)
    first = min(sinks, T)                                      # sinks, then the grid behind them
    n = first + (max(0, T // dilation - sinks // dilation) if dilation else 0)
    if n > 0:
        constants["BN"] = min(constants["BN"], max(16, triton.next_power_of_2(n)))
        programs = triton.cdiv(n, constants["BN"]) * B * H
        splits = max(1, min(8 * PROCESSORS // programs, T // 512))
        part = q.new_empty(splits, 2, B, H, n, Dh, dtype=torch.float32) if splits > 1 else None
        backward_kv(n, True, splits, part)
        if splits > 1:
            for d, total in zip((dk, dv), part.sum(0)):
                d[:, :, :first] = total[:, :, :first]
                if n > first:
                    d[:, :, (sinks // dilation + 1) * dilation - 1::dilation] = total[:, :, first:]
    return [dq, dk, dv]


attention_backward.register_fake(lambda dy, q, *rest: [new_heads(q) for _ in range(3)])


def attention_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.span = inputs[3:]


attention_forward.register_autograd(lambda ctx, dy, _: (*attention_backward(dy, *ctx.saved_tensors, *ctx.span), *3 * [None]),
                                    setup_context=attention_setup)


def attention(q, k_rec, v_rec, dilation, window, sinks):
    """Causal attention of a whole sequence over a dilated grid, a window and sinks: equation (3) of README.

    q, k_rec, v_rec: (B, H, T, Dh), one dtype, after RoPE, any strides. Returns (B, H, T, Dh), differentiable. One softmax
    over the union. Dilation 1, or a window over everything, is PyTorch's dense causal attention.
    """
    shapes = [tuple(z.shape) for z in (q, k_rec, v_rec)]
    assert len(set(shapes)) == 1, f"attention: q, k_rec, v_rec must share one shape (B, H, T, Dh), got {shapes}"
    if dilation == 1 or window >= q.shape[2] - 1:
        return F.scaled_dot_product_attention(q, k_rec, v_rec, is_causal=True)
    if runs_kernels(q):
        if torch.is_autocast_enabled(q.device.type):               # as PyTorch's own attention does
            q, k_rec, v_rec = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k_rec, v_rec))
        return attention_forward(q, k_rec, v_rec, dilation, window, sinks)[0]
    return attention_by_blocks(q, k_rec, v_rec, dilation, window, sinks)


# ---------------------------------------------------------------------------------------------
# Decoding: one new token of each sequence, all that lies between in_proj and out_proj
#
# A cache keeps the positions that the next query may use (4), in slots laid out as [ sinks | ring | grid ]. A position has
# one slot: on the grid, that of its block; else, if it is a sink, its own; else ring slot p mod W, until position p + W
# takes that over. Which position a slot holds follows from how many tokens were seen, so only keys and values are stored.
# That number, `length`, is a tensor on the device and is read there: a CUDA graph recorded once then serves every position.

def slot_of(p, dilation, window, sinks):
    """The slot of each position p of an int64 tensor, if it is kept."""
    slot = torch.where(p < sinks, p, sinks + p % max(window, 1))
    return torch.where(on_grid(p, dilation), sinks + window + p // max(dilation, 1), slot)


def positions(length, slots, dilation, window, sinks):
    """The position in each of `slots` slots after `length` tokens, int64; FUTURE in an empty one. length: int64 tensor (1,)."""
    slot, last = torch.arange(slots, device=length.device), length - 1
    ring = last - (last - slot + sinks) % max(window, 1)           # the latest p with sinks + p mod W = slot
    p = torch.where(slot < sinks, slot, ring.masked_fill(ring < sinks, FUTURE))
    p = torch.where(on_grid(p, dilation), FUTURE, p)
    p = torch.where(slot < sinks + window, p, (slot - sinks - window + 1) * dilation - 1)
    return p.masked_fill(p > last, FUTURE)


def new_token(x, state, rope):
    """One step of (2), in `state`: o (B, h, Dh) and, after RoPE, q, k_rec, v_rec (B, h, 1, Dh) of the token x, as in `decode`."""
    o, q, k, v, *g = x.unbind(1)                                                    # (B, h, Dh)
    if g:
        a = torch.sigmoid(g[0].to(state.dtype))
        state.copy_(a * state + (1 - a) * torch.stack((k, v)))
        k, v = state.to(x.dtype)
    return o, rotate_ref(q, *rope)[:, :, None], rotate_ref(k, *rope)[:, :, None], v[:, :, None]


def decode_ref(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks):
    """`decode` in plain PyTorch: what it means, and what runs without a GPU. float64 inputs stay float64."""
    span, (o, q, k, v) = (dilation, window, sinks), new_token(x, state, rope)       # (2)
    p = positions(length, k_cache.shape[2], *span)
    held = p < FUTURE
    keys, values = torch.cat((k_cache[:, :, held], k), dim=2), torch.cat((v_cache[:, :, held], v), dim=2)
    attended = attention_at(q, keys, values, length, torch.cat((p[held], length)), *span)      # (3), (4)
    y.copy_(torch.sigmoid(o) * attended[:, :, 0])                                   # (5)
    if allowed(length + 1, length, *span):                                          # the next query may use this token
        k_cache[:, :, slot_of(length, *span)], v_cache[:, :, slot_of(length, *span)] = k, v


# Two launches per layer and head group. attend reads the cache, which is nearly all the bytes; all that is one head wide goes
# to combine, the recurrence too, as attend wants nothing of the new token but q. B sequences of h heads, n slots in use, bf16:
#
#   attend    grid (B h, splits)    reads 4 B h n Dh bytes, writes 4 B h splits (Dh + 2)
#   combine   grid (B h,)           reads that again, 10 B h Dh of in_proj's output and 8 of the state; writes 8 and 4 + 2
#
# H100, 3.0 TB/s, width 2048 in bf16, one layer: 128 sequences at T 4096 hold n = 4096 (D1), 256 (D16), 64 (D64) or
# 516 (D16W256S4) slots = 4.29, 0.27, 0.07, 0.54 GB, hence 1.43, 0.09, 0.02, 0.18 ms; in_proj and out_proj add 50 MB, 0.02 ms.
# Limits: B h < 2^31, slots * Dh < 2^31, positions < 2^31; any even Dh, padded to a power of 2 in registers only.
#
# With one query per head a key is used once: two multiply-adds per channel read, far too little for tensor cores to matter,
# so the arithmetic is float32 on the ordinary cores. What does matter is that loads never wait. So each of the BN rows of a
# tile has its OWN running softmax (m, l, acc), each row lies in one warp, and the loop has no barrier: rows, then splits,
# meet once at the end. (The usual order, one maximum per tile, would meet in every iteration.)
#
#   row r, keys p = r, r + BN, ...:  s = q . k~_p log2(e) / sqrt(Dh)      m' = max(m, s)
#                                    l' = l 2^(m - m') + 2^(s - m')       acc' = acc 2^(m - m') + 2^(s - m') v~_p
#   meeting:                         M = max m,  y = sum 2^(m - M) acc / sum 2^(m - M) l

EMPTY = tl.constexpr(-1e30)        # m of a row without keys: below all scores, but 2^(EMPTY - EMPTY) is a number


@jit
def turning(cos, sin, d, Dh: tl.constexpr):
    """RoPE of channel d: x'[d] = x[d] cos + x[other] sin. Returns other, cos and the signed sin."""
    half: tl.constexpr = Dh // 2
    first = d < half
    other = tl.where(first, d + half, d - half)
    i = tl.where(first, d, other)
    sin = tl.load(sin + i, mask=d < Dh, other=0.0)
    return other, tl.load(cos + i, mask=d < Dh, other=0.0), tl.where(first, -sin, sin)


@jit
def channels(pointer, d, Dh: tl.constexpr):
    return tl.load(pointer + d, mask=d < Dh, other=0.0).to(tl.float32)


@jit
def recur(x, g, state, d, Dh: tl.constexpr):
    """Equation (2) for one step of one head."""
    a = tl.sigmoid(channels(g, d, Dh))
    return a * channels(state, d, Dh) + (1 - a) * channels(x, d, Dh)


@jit
def attend_kernel(x, cos, sin, k_cache, v_cache, length, partial, x_row, x_part, h, slots, scale,
                  D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, Dh: tl.constexpr, BD: tl.constexpr,
                  BN: tl.constexpr, STAGES: tl.constexpr):
    """Program (head of a sequence, split): attention of the token over its share of the slots in use.

    partial (B * h, splits, Dh + 2) float32: acc, m, l. The shares follow from `length`, equal at any length to one tile.
    Empty slots are never loaded: neither what lies beyond the slots in use, nor a ring slot whose position the grid holds.
    """
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t = tl.load(length).to(tl.int32)
    d = tl.arange(0, BD)
    other, cos, sin = turning(cos, sin, d, Dh)
    q = x + head // h * x_row + x_part + head % h * Dh
    q = (channels(q, d, Dh) * cos + channels(q, other, Dh) * sin) * scale       # (BD,)
    ring = tl.minimum(t, W)
    held = S + ring + (t // D if D else 0)
    tiles = tl.cdiv(held, BN)
    k_cache += head * slots * Dh
    v_cache += head * slots * Dh
    m, l, acc = tl.full((BN,), EMPTY, tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN, BD), tl.float32)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN)
        in_use, slot = n < held, tl.where(n < S + ring, n, n + W - ring)
        if S + W:                                                               # as in `positions`
            p = tl.where(n < S, n, t - 1 - (t - 1 - n + S + W) % (W if W else 1))
            here = (p < t) & ((n < S) | (p >= S))
            if D:
                here = here & ((p + 1) % D != 0)
            in_use = in_use & (here | (n >= S + ring))
        at, mask = slot[:, None] * Dh + d[None, :], in_use[:, None] & (d < Dh)[None, :]
        k = tl.load(k_cache + at, mask=mask, other=0.0)                         # (BN, BD)
        v = tl.load(v_cache + at, mask=mask, other=0.0)
        s = tl.where(in_use, tl.sum(q[None, :] * k.to(tl.float32), axis=1), float("-inf"))
        top = tl.maximum(m, s)
        fade, weight = tl.exp2(m - top), tl.exp2(s - top)
        l = l * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * v.to(tl.float32)
        m = top
    top = tl.max(m, axis=0)
    weight = tl.exp2(m - top)
    partial += (head * splits + split) * (Dh + 2)
    tl.store(partial + d, tl.sum(weight[:, None] * acc, axis=0), mask=d < Dh)
    tl.store(partial + Dh, top)
    tl.store(partial + Dh + 1, tl.sum(weight * l, axis=0))


@jit
def combine_kernel(y, x, state, cos, sin, k_cache, v_cache, length, partial, y_row, x_row, x_part, state_row, state_part,
                   h, slots, scale, splits, D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, Dh: tl.constexpr,
                   BD: tl.constexpr, BS: tl.constexpr, RECURRENCE: tl.constexpr):
    """Program (head of a sequence): the recurrence, the splits and the token itself in one softmax, the gate, the store.

    Only now may the token be stored: its ring slot held position t - W, which it had to see.
    """
    head, t = tl.program_id(0).to(tl.int64), tl.load(length).to(tl.int32)
    d, split = tl.arange(0, BD), tl.arange(0, BS)
    mine = d < Dh
    other, cos, sin = turning(cos, sin, d, Dh)
    o = x + head // h * x_row + head % h * Dh
    q, k, v, g = o + x_part, o + 2 * x_part, o + 3 * x_part, o + 4 * x_part
    q = (channels(q, d, Dh) * cos + channels(q, other, Dh) * sin) * scale
    if RECURRENCE:                                                              # (2)
        state += head // h * state_row + head % h * Dh
        k_rec, v_rec = recur(k, g, state, d, Dh), recur(v, g, state + state_part, d, Dh)
        k_other = recur(k, g, state, other, Dh)
        tl.debug_barrier()                                # the old state of channel `other` is another thread's to overwrite
        tl.store(state + d, k_rec, mask=mine)
        tl.store(state + state_part + d, v_rec, mask=mine)
    else:
        k_rec, v_rec, k_other = channels(k, d, Dh), channels(v, d, Dh), channels(k, other, Dh)
    k_rec = k_rec * cos + k_other * sin
    own = tl.sum(q * k_rec, axis=0)
    partial += (head * splits + split) * (Dh + 2)                               # (BS,)
    m = tl.load(partial + Dh, mask=split < splits, other=EMPTY)
    l = tl.load(partial + Dh + 1, mask=split < splits, other=0.0)
    acc = tl.load(partial[:, None] + d[None, :], mask=(split < splits)[:, None] & mine[None, :], other=0.0)    # (BS, BD)
    top = tl.maximum(tl.max(m, axis=0), own)
    weight, own = tl.exp2(m - top), tl.exp2(own - top)
    attended = (tl.sum(weight[:, None] * acc, axis=0) + own * v_rec) / (tl.sum(weight * l, axis=0) + own)      # (3)
    gated = tl.sigmoid(channels(o, d, Dh)) * attended                           # (5)
    tl.store(y + head // h * y_row + head % h * Dh + d, gated.to(y.dtype.element_ty), mask=mine)
    slot = tl.where(t < S, t, S + t % W if W else -1)                           # as in `slot_of`; -1: not kept
    if D:
        slot = tl.where((t + 1) % D == 0, S + W + t // D, slot)
    if slot >= 0:
        at = (head * slots + slot) * Dh + d
        tl.store(k_cache + at, k_rec.to(k_cache.dtype.element_ty), mask=mine)
        tl.store(v_cache + at, v_rec.to(v_cache.dtype.element_ty), mask=mine)


def decode_triton(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks, splits=None):
    """`decode` by the kernels above. splits: how many programs share a head's slots; None: enough to fill the GPU."""
    (B, h, slots, Dh), parts = k_cache.shape, x.shape[1]
    BD = triton.next_power_of_2(Dh)
    BN = max(4096 // BD, 16)                                       # 32 keys of 128 channels, and two more tiles under way
    if splits is None:
        units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = max(1, min(64, slots // (2 * BN), 16 * units // (B * h)))
    partial = torch.empty(B * h, splits, Dh + 2, dtype=torch.float32, device=x.device)
    span, sizes, scale = dict(D=dilation, W=window, S=sinks), dict(Dh=Dh, BD=BD), math.log2(math.e) / math.sqrt(Dh)
    attend_kernel[B * h, splits](x, *rope, k_cache, v_cache, length, partial, x.stride(0), x.stride(1), h, slots, scale,
                                 **span, **sizes, BN=BN, STAGES=3, num_warps=4)
    combine_kernel[B * h,](y, x, state, *rope, k_cache, v_cache, length, partial, y.stride(0), x.stride(0), x.stride(1),
                           state.stride(1), state.stride(0), h, slots, scale, splits, **span, **sizes,
                           BS=triton.next_power_of_2(splits), RECURRENCE=parts == 5, num_warps=4)


def decode(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks):
    """One new token of each sequence for one group of h heads: equations (2) to (5) of README. Writes all but x, rope, length.

    y:       (B, h, Dh), out_proj's input; x: (B, 5, h, Dh), in_proj's output o, q, k, v, g, or (B, 4, h, Dh) without g.
             Heads are packed; any other strides, so that a group is a slice.
    state:   (2, B, h, Dh) float32, k~ (before RoPE) and v~ of the token before, replaced by this token's; not read without g.
    rope:    cos and sin (1, Dh/2), float32, of the token's position.
    k_cache, v_cache: (B, h, sinks + window + grid slots, Dh), contiguous, as `positions` lays them out; the token is stored
             there if the next query may use it. Slots not in use are not read.
    length:  (1,) int64: the token's position, the number of tokens seen. There must be a slot for it: the host's to check.
    """
    B, h, slots, Dh = k_cache.shape
    shapes = [tuple(z.shape) for z in (y, x, k_cache, v_cache)]
    assert y.shape == (B, h, Dh) and x.shape in ((B, 4, h, Dh), (B, 5, h, Dh)) and v_cache.shape == k_cache.shape, \
        f"decode: y, x, k_cache, v_cache must be (B, h, Dh), (B, 4 or 5, h, Dh), 2 x (B, h, slots, Dh), got {shapes}"
    assert x.shape[1] == 4 or (state.shape == (2, B, h, Dh) and state.dtype == torch.promote_types(x.dtype, torch.float32)), \
        f"decode: the state must be (2, {B}, {h}, {Dh}) float32, got {tuple(state.shape)} {state.dtype}"
    assert x.dtype == y.dtype == k_cache.dtype == v_cache.dtype, \
        f"decode: y, x, k_cache, v_cache must share one dtype, got {y.dtype}, {x.dtype}, {k_cache.dtype}, {v_cache.dtype}"
    assert x.stride()[2:] == y.stride()[1:] == (Dh, 1) and k_cache.is_contiguous() and v_cache.is_contiguous(), \
        "decode: the heads of x and y must be packed, the caches contiguous"
    op = decode_triton if runs_kernels(x) else decode_ref
    op(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks)


def attention_chunk(q, k_cache, v_cache, k_local, v_local, start, dilation, window, sinks):
    """Attention (3) of a chunk of T tokens that continues a sequence: positions start .. start + T - 1.

    q: (B, h, T, Dh). k_cache, v_cache: (B, h, slots, Dh), the cache, in whose sinks and grid the chunk is stored already.
    k_local, v_local: (B, h, L, Dh), the last L = min(window, start) + T positions. A lasting position, on the grid or a sink,
    is read from the cache, every other from there. Returns (B, h, T, Dh).
    """
    end, span = start + q.shape[2], (dilation, window, sinks)
    if runs_kernels(q):
        return launch_attention(q, k_local, v_local, span, start, k_cache, v_cache)[0]
    p = positions(torch.full((1,), end, device=q.device), k_cache.shape[2], *span)
    p[sinks:sinks + window] = FUTURE                                # the ring may be overwritten already
    local = torch.arange(end - k_local.shape[2], end, device=q.device)
    held, passing = p < FUTURE, ~on_grid(local, dilation) & (local >= sinks)
    k = torch.cat((k_cache[:, :, held], k_local[:, :, passing]), dim=2)
    v = torch.cat((v_cache[:, :, held], v_local[:, :, passing]), dim=2)
    return attention_at(q, k, v, torch.arange(start, end, device=q.device), torch.cat((p[held], local[passing])), *span)


# ---------------------------------------------------------------------------------------------
# Top-k blocks: which keys a query attends to follows from the data
#
# The past is cut into blocks of N = `block` positions. A query scores the past ones by a summary of their keys, and attends to
# K = `topk` blocks in full, its own up to itself among them; and, in the same softmax, to what (4) grants elsewhere: with
# D = N, the last position of every other block, which by the recurrence stands for the block. Scores of block b, q_t and keys
# after RoPE:
#
#   mean     q_t . mean of its keys                                            as in MoBA
#   minmax   sum over channels c of max(q_tc max k_pc, q_tc min k_pc)          as in Quest: no key's own score is above that
#   last     q_t . k~ at its last position                                     the dilated key of D = N: nothing more to hold
#
# A choice of indices has no gradient; q, k~, v~ get theirs from the attention. Plain PyTorch on every device, no kernels.

SCORES = "mean", "minmax", "last"


def block_summaries(k_rec, block, score):
    """What block scores read of keys (B, h, n block, Dh): (B, h, n, Dh), twice as wide for minmax, in the keys' dtype.

    Maxima and minima lose nothing by that, and a mean is rounded alike in training and in decoding. A view for `last`.
    """
    assert score in SCORES, f"block_summaries: a score is one of {SCORES}, got {score!r}"
    k = k_rec.unflatten(2, (k_rec.shape[2] // block, block))
    if score == "last":
        return k[:, :, :, -1]
    return k.mean(3) if score == "mean" else torch.cat((k.amax(3), k.amin(3)), dim=-1)


def block_scores(q, summaries, score):
    """(B, h, T, n) float32: the scores of n blocks for queries (B, h, T, Dh)."""
    q = q.float()
    if score == "minmax":                                          # positive q is largest at max k, negative q at min k
        q = torch.cat((q.clamp(min=0), q.clamp(max=0)), dim=-1)
    with torch.autocast(q.device.type, enabled=False):
        return q @ summaries.float().mT


@torch.no_grad()
def choose_blocks(q, summaries, t, block, topk, score):
    """(B, h, T, topk) indices of the blocks of queries at t, that broadcasts to (T, 1); all n blocks if they are fewer.

    A query's own block comes first. While there are fewer than topk - 1 before it, blocks after it fill the rest: causality
    hides them. Of those blocks and its own, whose summaries may be unfinished, no score counts.
    """
    own, b = t // block, torch.arange(summaries.shape[2], device=q.device)
    scores = block_scores(q, summaries, score).masked_fill(b == own, math.inf).masked_fill(b > own, -math.inf)
    return scores.topk(min(topk, len(b))).indices


def attention_topk(q, k_rec, v_rec, dilation, window, sinks, block, topk, score="mean", rows=128):
    """Attention over the topk best blocks and what `allowed` grants, of the last T of n positions: all of them, or a chunk.

    q: (B, h, T, Dh); k_rec, v_rec: (B, h, n, Dh), n >= T, after RoPE. Returns (B, h, T, Dh), differentiable. Dense in arithmetic
    and, by its masks, in memory: `rows` queries at a time score all keys before them. What it saves, decoding saves.
    """
    n, y, span = k_rec.shape[2], [], (dilation, window, sinks)
    block = min(block, n)                                          # a larger one holds no more, but would be padded
    summaries = block_summaries(F.pad(k_rec.detach(), (0, 0, 0, -n % block)), block, score)
    for q_rows, t in zip(q.split(rows, dim=2), range(n - q.shape[2], n, rows)):
        end = t + q_rows.shape[2]
        t, p = torch.arange(t, end, device=q.device)[:, None], torch.arange(end, device=q.device)
        chosen = choose_blocks(q_rows, summaries, t, block, topk, score)
        taken = chosen.new_zeros(*chosen.shape[:-1], summaries.shape[2], dtype=torch.bool).scatter_(-1, chosen, True)
        mask = (p <= t) & taken[..., p // block] | allowed(t, p, *span)                             # (B, h, rows, end)
        y.append(F.scaled_dot_product_attention(q_rows, k_rec[:, :, :end], v_rec[:, :, :end], attn_mask=mask))
    return torch.cat(y, dim=2)


def decode_topk(y, x, state, rope, k_cache, v_cache, summaries, length, dilation, window, sinks, block, topk, score):
    """`decode` with top-k blocks. k_cache, v_cache: (B, h, n block, Dh), every position in its place, as any block may be
    chosen later; summaries: theirs, (B, h, n, ..). Reads those, the chosen blocks and what `allowed` grants. Shapes are the
    same at every length, for CUDA graphs: for what is not there yet the new key is read once more, and masked.
    """
    span, (o, q, k, v) = (dilation, window, sinks), new_token(x, state, rope)
    k_cache.index_copy_(2, length, k), v_cache.index_copy_(2, length, v)
    chosen = choose_blocks(q, summaries, length, block, topk, score).transpose(2, 3)                # (B, h, K, 1)
    p = (chosen * block + torch.arange(block, device=q.device)).flatten(2)
    granted = positions(length, window + sinks + (k_cache.shape[2] // dilation if dilation else 0), *span)
    granted = torch.where((granted // block == chosen).any(2), FUTURE, granted)                     # once is enough
    p = torch.cat((p, granted), dim=2)                                                              # (B, h, keys)
    at = p.minimum(length)[..., None]
    k, v = (torch.take_along_dim(held, at, 2) for held in (k_cache, v_cache))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(p <= length)[:, :, None])
    y.copy_(torch.sigmoid(o) * attended[:, :, 0])
    summaries.index_copy_(2, length // block, block_summaries(k[:, :, :block], block, score))       # right once the block is full


# ---------------------------------------------------------------------------------------------
# The loss of a chunk of logits

def cross_entropy_ref(z, y, grad):
    """`cross_entropy_` in plain PyTorch."""
    counted, label = y[:, None] != -100, y[:, None].clamp(min=0)
    logp = z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    if grad:
        z.copy_((logp.exp() - (torch.arange(z.shape[1], device=z.device) == label).to(logp.dtype)) * counted)
    return -(logp.gather(1, label) * counted)[:, 0]


# Kernel: for a row z (V,) of logits and its target y,
#
#   loss = log sum_j exp z_j - z_y          dz_j = exp z_j / sum exp z - [j = y]
#
# A program takes a row: once for the sum, each of its BV lanes with a running maximum of its own, and once for dz, which takes
# the place of z. Scores are in units of log2, as in attention. Grid: rows. Bytes per logit in bf16: reads 2, writes 2; the
# second reading finds the row, 100 KB at a vocabulary of 50304, in the L2 cache, if few rows are under way at once. So a
# program takes 32 warps, which leaves room for two a processor, and the hints of eviction keep in the cache what is read again.
# H100, 8192 rows: 0.82 ms with 8 warps and without hints, 0.66 so (2.5 TB/s). Held in registers a row would be read once, but
# it does not fit (46 spilled, 1.2 ms).

LOG2E = tl.constexpr(math.log2(math.e))


@jit
def cross_entropy_kernel(z, y, loss, V, BV: tl.constexpr, GRAD: tl.constexpr):
    """z (rows, V) contiguous; y (rows,) int64, negative where nothing counts; loss (rows,) float32."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    z += row * V
    label = tl.load(y + row)
    counted = label >= 0
    z_y = tl.load(z + label, mask=counted, other=0).to(tl.float32) * LOG2E
    m, l = tl.full((BV,), EMPTY, tl.float32), tl.zeros((BV,), tl.float32)
    for v0 in range(0, V, BV):
        x = tl.load(z + v0 + v, mask=v0 + v < V, other=-float("inf"), eviction_policy="evict_last").to(tl.float32) * LOG2E
        e = tl.exp2(-tl.abs(x - m))                                # of e^(m - top) and e^(x - top), the one that is not 1
        l, m = tl.where(x > m, l * e + 1, l + e), tl.maximum(m, x)
    top = tl.max(m, 0)                                             # a barrier: all have read z_y before one overwrites it
    lse = top + tl.log2(tl.sum(l * tl.exp2(m - top), 0))
    tl.store(loss + row, tl.where(counted, (lse - z_y) / LOG2E, 0))
    if GRAD:
        for v0 in range(0, V, BV):
            x = tl.load(z + v0 + v, mask=v0 + v < V, other=0, eviction_policy="evict_first").to(tl.float32) * LOG2E
            dz = tl.where(counted, tl.exp2(x - lse) - tl.where(v0 + v == label, 1.0, 0.0), 0)
            tl.store(z + v0 + v, dz.to(z.dtype.element_ty), mask=v0 + v < V, eviction_policy="evict_first")


def cross_entropy_(z, y, grad):
    """Cross-entropy of each row of logits z (rows, V), contiguous, under its target y (rows,) int64: (rows,), float32 (float64
    for float64 logits); 0 where the target is -100. With `grad`, z is overwritten by its gradient."""
    if not runs_kernels(z):
        return cross_entropy_ref(z, y, grad)
    loss, BV = z.new_empty(len(z), dtype=torch.float32), min(4096, max(128, triton.next_power_of_2(z.shape[1])))
    cross_entropy_kernel[len(z),](z, y.contiguous(), loss, z.shape[1], BV=BV, GRAD=grad, num_warps=BV // 128)
    return loss


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


def decode_errors(op, span, t, max_len, dtype, device, H=4, Dh=16, recurrent=True, loud=1):
    """Run `op` in `dtype` on the middle heads of random inputs, `decode_ref` in float64; yield (name, relative error) of all
    tensors. Empty slots and y start as NaN: infinite where one was read, and where y or a slot was wrongly written or left.
    loud: factor of the queries, hence of the scores."""
    (dilation, window, sinks), B, heads, length = span, 2, slice(1, H - 1), torch.tensor([t], device=device)
    slots, angle = sinks + window + (max_len // dilation if dilation else 0), torch.rand(1, Dh // 2, device=device)
    y, x = torch.full((B, H, Dh), math.nan, device=device), torch.randn(B, 5 if recurrent else 4, H, Dh, device=device)
    x[:, 1] *= loud
    state, k_cache, v_cache = torch.randn(2, B, H, Dh, device=device), *torch.randn(2, B, H - 2, slots, Dh, device=device)
    k_cache[:, :, positions(length, slots, *span) == FUTURE] = math.nan
    v_cache[k_cache.isnan()] = math.nan
    inputs = [*(z.to(dtype) for z in (y, x, k_cache, v_cache)), state]
    inputs64 = [z.double() for z in inputs]
    for op, (y, x, k_cache, v_cache, state) in ((op, inputs), (decode_ref, inputs64)):
        rope = angle.cos().to(state.dtype), angle.sin().to(state.dtype)
        op(y[:, heads], x[:, :, heads], state[:, :, heads], rope, k_cache, v_cache, length, *span)
    for name, z, z64 in zip(("y", "x", "k_cache", "v_cache", "state"), inputs, inputs64):
        alike = z.isnan().equal(z64.isnan())
        yield name, relative_error(z.nan_to_num(), z64.nan_to_num()) if alike else math.inf


def check(device, quick=False):
    """Yield (operation, dtype, case, tensor, relative error, limit) over dtypes, ragged lengths and patterns.

    All inputs are views of in_proj's output (B, T, 5, H, Dh), so none is contiguous; its gradient holds all others.
    """
    B, H, Dh = 2, 3, 16
    lowest = torch.float16 if INTERPRETED else torch.bfloat16      # the interpreter computes bfloat16 products wrongly
    for dtype, limit in ((torch.float32, 1e-5), (lowest, 2e-2))[quick:]:
        for V in (320,) if quick else (320, 50304):
            z, y = torch.randn(5, V, device=device).to(dtype), torch.tensor([0, V - 1, -100, 7, 8], device=device)
            z64 = z.double()
            loss, loss64 = cross_entropy_(z, y, True), cross_entropy_ref(z64, y, True)
            for name, x, x64 in (("loss", loss, loss64), ("dz", z, z64)):
                yield "cross-entropy", dtype, f"V {V}", name, relative_error(x, x64), limit
        for T in (37, 300) if quick else (1, 2, 37, 300, 1500)[:4 if device == "cpu" else 5]:
            x, state = torch.randn(B, T, 5, H, Dh, device=device).to(dtype), torch.randn(2, B, H * Dh, device=device)
            ops = [lambda x, *state, f=f: f(*x.flatten(3).unbind(2)[2:], *state) for f in (recurrence_flat, recurrence_ref)]
            names = ("k_rec", "v_rec", "k_end", "v_end"), ("x", "k0", "v0")
            for name, error in compare(*ops, names, (x, *state)):
                yield "recurrence", dtype, f"T {T}", name, error, limit
            angles = torch.rand(2, T, Dh // 2, device=device)
            ops = [lambda x, f=f: (f(x.transpose(1, 3)[:, :, 1], *angles),) for f in (rotate, rotate_ref)]
            for name, error in compare(*ops, (("y",), ("x",)), (x,)):
                yield "rotate", dtype, f"T {T}", name, error, limit
            for span in ((16, 0, 0), (5, 7, 3)) if quick else ((1, 0, 0), (16, 0, 0), (5, 7, 3), (0, 40, 4), (64, 500, 400)):
                ops = [lambda x, f=f: (f(*x.transpose(1, 3).unbind(2)[1:4], *span),) for f in (attention, attention_ref)]
                for name, error in compare(*ops, (("y",), ("x",)), (x,)):
                    yield "attention", dtype, f"T {T}, dilation, window, sinks {span}", name, error, limit
        for t in (37,) if quick else (0, 1, 37, 299):
            for span in ((16, 0, 0), (5, 7, 3)) if quick else ((1, 0, 0), (16, 0, 0), (5, 7, 3), (0, 40, 4), (64, 300, 300)):
                for name, error in decode_errors(decode, span, t, 300, dtype, device):
                    yield "decode", dtype, f"position {t}, dilation, window, sinks {span}", name, error, limit


def print_checks(rows):
    """A table row per operation and dtype, with its worst tensor. Returns how many tensors failed."""
    print("| operation | dtype | tensors checked | worst error | limit | at |\n|---|---|---|---|---|---|")
    cases, failed = {}, 0
    for op, dtype, *row in rows:
        cases.setdefault((op, dtype), []).append(row)
    for (op, dtype), rows in cases.items():
        case, name, error, limit = max(rows, key=lambda row: (math.isnan(row[2]), row[2]))
        bad = sum(not row[2] <= limit for row in rows)
        failed += bad
        verdict = f"{limit:.0e}, {bad} FAILED" if bad else f"{limit:.0e}"
        print(f"| {op} | {dtype} | {len(rows)} | {error:.1e} | {verdict} | {name} at {case} |", flush=True)
    return failed


# ---------------------------------------------------------------------------------------------
# The timings, on a GPU: `python kernels.py`

def milliseconds(fn, repeats=20):
    """Median time of fn on the GPU: replays of a CUDA graph, so that launching from Python is left out."""
    stream, n = torch.cuda.Stream(), 5                             # calls in the graph
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(n):
            fn()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) / n for start, end in times)[repeats // 2]


def attempt(make):
    """milliseconds of what make() returns, or why there are none: a peer may not support this, or run out of memory."""
    try:
        return milliseconds(make())
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except Exception as error:                                     # peers under torch.compile raise all kinds
        return f"unsupported ({type(error).__name__})"
    finally:
        torch.cuda.empty_cache()


def with_gradients(fn, inputs):
    """fn and its backward pass, for a random gradient of each output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = [torch.randn_like(y) for y in fn(*inputs)]
    return lambda: torch.autograd.grad(fn(*inputs), inputs, grads)


def scan_torch(k, v, g):
    """Equation (2) by torch's associative_scan, in float32, as a peer."""
    from torch._higher_order_ops.associative_scan import associative_scan
    a = torch.sigmoid(g.float())

    def step(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1], y[0] * x[2] + y[2]

    _, k_rec, v_rec = associative_scan(step, (a, (1 - a) * k, (1 - a) * v), 1, combine_mode="pointwise")
    return k_rec.to(k.dtype), v_rec.to(v.dtype)


def flex(span, T):
    """PyTorch's flex_attention under the mask of `allowed`, compiled, as a peer."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    mask = create_block_mask(lambda b, h, t, p: allowed(t, p, *span), None, None, T, T, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: (compiled(q, k, v, block_mask=mask),)


def benchmark(quick):
    """Yield (work, ours in ms, fewest bytes, fewest FLOPs, {peer: its ms, or why there are none}) in bfloat16."""
    def randn(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True),

    every = 2 if quick else 1
    for B, T, C in ((4, 8192, 2048), (1, 65536, 2048), (32, 2048, 512))[::every]:
        kvg = randn(B, T, 5 * C).split(C, dim=-1)[2:]
        compiled, n, shape = torch.compile(scan_torch), B * T * C, f"B{B} T{T} C{C}"
        peers = {} if quick else {"associative_scan": attempt(lambda: lambda: compiled(*kvg))}
        yield f"recurrence, {shape}", milliseconds(lambda: recurrence(*kvg)), 10 * n, 0, peers
        yield (f"recurrence forward + backward, {shape}", milliseconds(with_gradients(lambda *x: recurrence(*x)[:2], kvg)),
               30 * n, 0, {"associative_scan": "has no gradient"})
    for B, H, T, Dh in ((4, 16, 8192, 128), (8, 12, 4096, 64))[::every]:
        qkv, n = [randn(B, T, H, Dh).transpose(1, 2) for _ in range(3)], B * H * T * Dh
        ways = ("", lambda f: lambda: f(*qkv), 8, 4), (" forward + backward", lambda f: with_gradients(f, qkv), 24, 14)
        dense_ms = [milliseconds(wrap(dense)) for _, wrap, _, _ in ways]
        spans = ("D16", (16, 0, 0)), ("D64", (64, 0, 0)), ("D16W256S4", (16, 256, 4)), ("W1024S4", (0, 1024, 4))
        for name, span in spans[::every]:
            flops, peer = n * keys_per_query(T, *span), None if quick else flex(span, T)
            for (way, wrap, n_bytes, n_flops), sdpa_ms in zip(ways, dense_ms):
                ours = milliseconds(wrap(lambda *x: (attention(*x, *span),)))
                peers = {"dense SDPA": sdpa_ms, **({} if quick else {"flex_attention": attempt(lambda: wrap(peer))})}
                yield f"attention {name}{way}, B{B} H{H} T{T} Dh{Dh}", ours, n_bytes * n, n_flops * flops, peers
    H, Dh = 16, 128
    for B, T, names in ((128, 4096, {"D1": (1, 0, 0), "D16": (16, 0, 0), "D64": (64, 0, 0), "D16W256S4": (16, 256, 4)}),
                        (64, 16384, {"D1": (1, 0, 0), "D16": (16, 0, 0), "D64": (64, 0, 0)}))[::every]:
        for name, (dilation, window, sinks) in names.items():
            y, x, state = randn(B, H, Dh), randn(B, 5, H, Dh), torch.randn(2, B, H, Dh, device="cuda")
            caches, rope = randn(2, B, H, sinks + window + T // dilation, Dh), torch.randn(2, 1, Dh // 2, device="cuda")
            arguments = y, x, state, rope, *caches, torch.tensor([T - 1]).cuda(), dilation, window, sinks
            ours = milliseconds(lambda: decode(*arguments))
            peers = {"SDPA of one query": attempt(lambda: lambda: F.scaled_dot_product_attention(x[:, 1, :, None], *caches))}
            yield f"decode {name}, B{B} H{H} T{T} Dh{Dh}", ours, 2 * caches[0].nbytes, 0, peers
            del caches, arguments                                  # before the next are made


def print_timings(quick):
    """Measure what the card can do, then print a row per work: share of that limit, and the peers with their ratio."""
    a = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / milliseconds(lambda: torch.mul(a, 2, out=b))                        # bytes per ms
    m, out = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16), b[:8192**2].view(8192, 8192)
    rate = 2 * 8192**3 / milliseconds(lambda: torch.mm(*m, out=out))                               # FLOP per ms
    del a, b, m, out
    print(f"\nmeasured here, bfloat16: {bandwidth / 1e9:.2f} TB/s in an elementwise pass (read + written), {rate / 1e9:.0f} "
          "TFLOP/s in a matrix product of 8192^3.\nlimit: the fewest bytes or FLOPs of the work at these rates, the slower of "
          "the two. Peers: PyTorch's, in the same run.\n\n| work | ms | limit ms | of limit | TB/s | TFLOP/s | peers, ms "
          "(times ours) |\n|---|---|---|---|---|---|---|")
    for work, ms, n_bytes, flops, peers in benchmark(quick):
        limit = max(n_bytes / bandwidth, flops / rate)
        told = ", ".join(f"{peer} {t}" if isinstance(t, str) else f"{peer} {t:.3f} ({t / ms:.2f})" for peer, t in peers.items())
        rates = f"{n_bytes / ms / 1e9:.2f} | {flops / ms / 1e9:.0f}"
        print(f"| {work} | {ms:.3f} | {limit:.3f} | {limit / ms:.0%} | {rates} | {told} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Check the operations against float64, then time them on a GPU.")
    parser.add_argument("--quick", action="store_true", help="fewer checks, half of the timings, no peer that must be compiled")
    parser.add_argument("--no-timing", action="store_true", help="only the checks")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and triton:
        interpret()
        print(f"torch {torch.__version__}, Triton {triton.__version__} in its interpreter, no GPU: nothing is timed\n")
    else:
        print(f"torch {torch.__version__} | {path(device)}\n")
    failed = print_checks(check(device, args.quick))
    if device == "cuda" and triton and not args.no_timing and not failed:
        print_timings(args.quick)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
