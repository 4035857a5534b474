"""
RAT+'s operations at the speed of a GPU, as Triton kernels. model.py defines what each of them
computes, checks the arguments, and calls them.

  recurrence   h_t = a_t * h_{t-1} + (1 - a_t) * x_t     a_t = sigmoid(g_t), x in {k, v}     (2)
  rotate       RoPE
  attention    y_t = sum over allowed p of softmax_p(q_t . k_p / sqrt(Dh)) v_p              (3)
               allowed: p <= t, and p is on the dilated grid, in the window, or a sink       (4)
  decode       (2) to (4), and sigmoid(o) * y of (5), for one token of each sequence and a cache
  top-k        attention over the K best blocks of each query, and its decoding
  head_loss    logits and their cross-entropy

A kernel runs as many programs at once. A program is a group of GPU threads that owns one part of
the output. Programs start in the order of their number: GPUs do so, CUDA does not promise it.

  in kernels       meaning
  B H T C          batch, heads, time, channels
  DH, BD           head width, and that rounded up to a power of 2
  b, h, bh         a sequence, a head, and both as one number bh = b * H + h
  t, p             position of a query, position of a key
  t0, p0, i0 ...   the first t, p, i of a tile
  BT BC BM BN      sides of a program's tile: time, channels, queries, keys (or rows, or blocks)
  BS BK BR BV      the same of scores or shares, choices, rows of a block, vocabulary
  RULE, KEPT       a pattern's sizes: Sizes, or model.Rule, which has those of top-k blocks too

Other capitals, but for K and V here and there, are constants too: a kernel is compiled for them.
With TRITON_INTERPRET=1 Triton's interpreter runs the kernels on a CPU, for tests. `python
tests/bench_kernels.py` times them.
"""
import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.language import constexpr, float32, int32, int64
from triton.tools.tensor_descriptor import TensorDescriptor

jit = triton.jit
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = False                                         # whether model.py sends CPU tensors here too


def interpret():
    """From now on model.py sends CPU tensors to the kernels too, for Triton's interpreter."""
    global ON_CPU
    ON_CPU = True


def take(x):
    """Do the kernels take this tensor from model.py?"""
    return (x.is_cuda or ON_CPU) and x.dtype in (torch.float32, torch.float16, torch.bfloat16)


def launch(kernel, programs, x, *arguments, **constants):
    """Start a kernel on the device of the tensor x."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants)


def operator(f):
    """f, which makes tensors and launches kernels to fill them, as PyTorch's operator rat::<its
    name without _forward>. Of fake tensors PyTorch wants the shapes only: see `idle`.
    """
    name = f"rat::{f.__name__.removesuffix('_forward')}"
    registered = torch.library.custom_op(name, f, mutates_args=())
    registered.register_fake(f)
    return registered


def differentiable(forward, backward, keep, grads=1):
    """forward, of tensors and perhaps a rule, as a function with gradients. keep(inputs, outputs):
    the tensors that backward needs. backward takes the gradients of the first `grads` outputs,
    these tensors, and the rule. It gives the gradients of the first inputs.
    """
    recorded = operator(forward)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*keep(inputs, output))
        ctx.rule = [x for x in inputs if isinstance(x, list)]
        ctx.count = len(inputs)

    def gradient(ctx, *dy):
        # saved_tensors may be read once only: checkpointing allows no more
        found = backward(*dy[:grads], *ctx.saved_tensors, *ctx.rule)
        return *found, *[None] * (ctx.count - len(found))

    def run(*inputs):
        # Where nobody records the call, forward alone is faster.
        wants_gradients = torch.is_grad_enabled() and any(
            x.requires_grad for x in inputs if isinstance(x, Tensor))
        traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return (recorded if wants_gradients or traced else forward)(*inputs)

    recorded.register_autograd(gradient, setup_context=setup)
    return run


def idle(x):
    """Is there nothing to launch: no data, or no elements?"""
    return isinstance(x, FakeTensor) or x.numel() == 0


class Rows(NamedTuple):
    """A tensor (B, H, T, Dh), channels side by side: pointer, strides, T, Dh and `padded` Dh."""
    ptr: Tensor
    b: int
    h: int
    t: int
    n: int
    DH: constexpr
    BD: constexpr


def padded(Dh):
    """A number as a side of tiles: a power of 2. Triton's own function takes 10 us a call."""
    return max(16, 1 << (Dh - 1).bit_length())


def rows_of(*tensors):
    found = []
    for x in tensors:
        Dh = x.shape[3]
        found.append(Rows(x, *x.stride()[:3], x.shape[2], constexpr(Dh), constexpr(padded(Dh))))
    return found


def packed(*tensors):
    """The tensors, each with channels side by side: copied if need be."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def aligned(x):
    """x with channels side by side, rows at distinct multiples of 16 bytes: copied if need be."""
    unit = 16 // x.element_size()
    strides = [stride for stride, n in zip(x.stride()[:3], x.shape) if n > 1]
    ready = all(stride and stride % unit == 0 for stride in strides)
    if ready and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    Dh = x.shape[-1]
    copy = x.new_empty(*x.shape[:3], triton.cdiv(Dh, unit) * unit)[..., :Dh]
    return copy.copy_(x)


def has_tma(x):
    """Can tiles of x come by TMA, Hopper's Tensor Memory Accelerator? In the interpreter too."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)


def tiles_of(x, BN):
    """Aligned x for load_tile: a descriptor, by which TMA fetches BN rows at once; or Rows."""
    if not has_tma(x):
        return rows_of(x)[0]
    unit = 16 // x.element_size()
    strides = [stride if size > 1 else unit for stride, size in zip(x.stride(), x.shape)]
    tile = [1, 1, BN, padded(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], tile)


def new_heads(x):
    """An empty tensor of x's shape (B, H, T, Dh); its .transpose(1, 2) is contiguous."""
    B, H, T, Dh = x.shape
    return x.new_empty(B, T, H, Dh).transpose(1, 2)


@jit
def load_float(x, mask, other=0):
    return tl.load(x, mask=mask, other=other).to(float32)


@jit
def rows_at(x, b, h, row, live):
    """Pointers (len(row), BD) to rows of head h of sequence b, and which of them there are."""
    d = tl.arange(0, x.BD)
    mask = live[:, None] if x.DH == x.BD else live[:, None] & (d < x.DH)[None, :]
    head = x.ptr + b * x.b + h * x.h
    return head + row.to(int64)[:, None] * x.t + d[None, :], mask


@jit
def load_rows(x, b, h, row, live):
    """Rows of x in head h of sequence b: (len(row), BD); 0 where not live, and beyond DH."""
    at, mask = rows_at(x, b, h, row, live)
    return tl.load(at, mask=mask, other=0)


@jit
def store_rows(x, b, h, row, values, live):
    at, mask = rows_at(x, b, h, row, live)
    tl.store(at, values, mask=mask)


@jit
def load_tile(x, b, h, row, TMA, BN):
    """Rows row .. row + BN - 1 of head h of sequence b: (BN, BD); 0 beyond T and DH."""
    if TMA:
        tile = x.load([b.to(int32), h.to(int32), row, 0])
        tile = tile.reshape(BN, tile.shape[3])
    else:
        i = row + tl.arange(0, BN)
        tile = load_rows(x, b, h, i, i < x.n)
    return tile


# ---- Recurrence, equation (2) --------------------------------------------------------------------
#
# What is slow: the definition takes T steps one after another, and each waits for the step before.
# The idea: two steps h -> a h + u give one step of the same form. So a sequence is cut into tiles
# that are scanned side by side from zero, and only then does each tile learn what enters it:
#
#   h_t = P_t * h_in + H_t     P_t: product of the tile's decays up to t, H_t: its scan from zero
#
# h_in, the h just before the tile, comes from the program before. So the tiles of a sequence form a
# chain that carries 2 BC numbers at a time; the rest is done before they arrive. A number travels
# as one 64-bit word, its float32 bits above a flag. The reader spins until all flags are set. The
# chain can't lock up: a program waits only for one of a smaller number, which has started before.
#
# A program owns BT steps x BC channels of one sequence, as a tile (N, RUN, BC) with t = n * RUN +
# r. The RUN steps of a run lie in the registers of one thread or of a few neighbours, and are
# scanned there. Only the runs' ends, a RUN-th of the data, go through shared memory. Grid: chunks x
# B x C / BC, chunks slowest. Bytes per element in bf16: reads k, v, g, writes k_rec, v_rec: 10.
# Limits: registers, and the chain's latency for one long sequence.

LOG2E = constexpr(math.log2(math.e))
INF = constexpr(math.inf)


@jit
def decay(g):
    """a = sigmoid(g) and 1 - a, precise for g > -87. The difference would be 0 for g > 17."""
    e = tl.exp2(tl.minimum(g * -LOG2E, 126.0))         # e^-g; 2^128 would overflow
    a = 1 / (1 + e)
    return a, e * a


@jit
def then(a1, k1, v1, a2, k2, v2):
    """Step 1, then step 2, of the chains of k and v: h -> a1 h + u1 -> a2 (a1 h + u1) + u2."""
    return a1 * a2, a2 * k1 + k2, a2 * v1 + v2


@jit
def then_run(a1, k1, v1, A1, K1, V1, a2, k2, v2, A2, K2, V2):
    """The same for runs of steps. Small letters: inclusive scan of the runs. Capitals start at the
    step that changes nothing (1, 0, 0) and compose all earlier runs: what enters each run.
    """
    return (a1 * a2, a2 * k1 + k2, a2 * v1 + v2,
            a1 * A2, A2 * k1 + K2, A2 * v1 + V2)


@jit
def last(x, axis: constexpr):
    """x at the last index of axis 0 of (N, BC) or of axis 1 of (N, RUN, BC)."""
    i = tl.arange(0, x.shape[axis]) == x.shape[axis] - 1
    return tl.sum(tl.where(i[:, None] if axis == 0 else i[None, :, None], x, 0), axis)


@jit
def either(a, b):
    return a | b


@jit
def read_words(word, mask, COPIES):
    """The words (BC,), 0 if not yet sent. Threads that hold the same element of a (BC,) tile may
    load different values. A (COPIES, BC) tile has one element a thread, and OR makes them agree.
    """
    word = word[None, :] + tl.zeros((COPIES, 1), int32)
    return tl.reduce(tl.load(word, mask=mask[None, :], other=1, volatile=True), 0, either)


@jit
def chain(a, u_k, u_v, first, words, chunk, chunks, b, c, B, C, COPIES):
    """h_t = a_t * h_{t-1} + u_t over the tile (N, RUN, BC) of a chunk, for k and for v, in float32.

    first (2, B, C): what enters chunk 0; words (B, chunks, 2, C) int64: what leaves each chunk.
    Returns h_k, h_v (N, RUN, BC) and h at the end of the chunk, 2 x (BC,).
    """
    p, h_k, h_v = tl.associative_scan((a, u_k, u_v), 1, then)
    zero = last(p, 1) * 0
    runs = last(p, 1), last(h_k, 1), last(h_v, 1), zero + 1, zero, zero
    p_run, k_run, v_run, p_in, k_in, v_in = tl.associative_scan(runs, 0, then_run)      # (N, BC)
    p_end = last(p_run, 0)                                                              # (BC,)
    end_k = last(k_run, 0)
    end_v = last(v_run, 0)
    mask = c < C
    word = words + (b * chunks + chunk) * 2 * C + c
    if chunk == 0:
        in_k = load_float(first + b * C + c, mask)
        in_v = load_float(first + (B + b) * C + c, mask)
    else:
        k = read_words(word - 2 * C, mask, COPIES)
        v = read_words(word - C, mask, COPIES)
        while tl.min(k & v & 1) == 0:
            k = read_words(word - 2 * C, mask, COPIES)
            v = read_words(word - C, mask, COPIES)
        in_k = (k >> 32).to(int32).to(float32, bitcast=True)
        in_v = (v >> 32).to(int32).to(float32, bitcast=True)
    end_k += p_end * in_k
    end_v += p_end * in_v
    tl.store(word, (end_k.to(int32, bitcast=True).to(int64) << 32) | 1, mask=mask)
    tl.store(word + C, (end_v.to(int32, bitcast=True).to(int64) << 32) | 1, mask=mask)
    k_in += p_in * in_k[None, :]                       # enters each run
    v_in += p_in * in_v[None, :]
    return h_k + p * k_in[:, None, :], h_v + p * v_in[:, None, :], end_k, end_v


@jit
def place(B, C, RUN, BT, BC):
    """(chunk, sequence, channels (BC,), steps within the chunk (N, RUN, 1)) of this program."""
    program = tl.program_id(0).to(int64)
    tiles = tl.cdiv(C, BC)
    c = (program % tiles * BC).to(int32) + tl.arange(0, BC)
    i = tl.arange(0, BT // RUN)[:, None, None] * RUN + tl.arange(0, RUN)[None, :, None]
    return program // (tiles * B), program // tiles % B, c, i


@jit
def recurrence_forward_kernel(
        k, v, g, stride_b, stride_t, state, k_rec, v_rec, end, words, B, T, C,
        RUN: constexpr, BT: constexpr, BC: constexpr, COPIES: constexpr):
    """k, v, g (B, T, C) with these strides; k_rec, v_rec (B, T, C) contiguous; state, end (2, B, C)
    float32: of the position before and of the last one; words: zeros.
    """
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, RUN, BT, BC)
    live = (i < T - chunk * BT) & (c < C)[None, None, :]  # (N, RUN, BC)
    at = b * stride_b + chunk * BT * stride_t + i * stride_t + c[None, None, :]
    a, rest = decay(load_float(g + at, live, INF))     # past the end a = 1: h stays as it is
    u_k = rest * load_float(k + at, live)
    u_v = rest * load_float(v + at, live)
    h_k, h_v, end_k, end_v = chain(a, u_k, u_v, state, words, chunk, chunks, b, c, B, C, COPIES)
    if chunk == chunks - 1:
        tl.store(end + b * C + c, end_k, mask=c < C)
        tl.store(end + (B + b) * C + c, end_v, mask=c < C)
    out = (b * T + chunk * BT) * C + i * C + c[None, None, :]
    tl.store(k_rec + out, h_k, mask=live)
    tl.store(v_rec + out, h_v, mask=live)


# The backward pass. d_t = dL/dh_t counts every later step's use of h_t. It is the same chain, run
# from the end, so step i of a chunk is the i-th from the end:
#
#   d_t  = dy_t + a_{t+1} * d_{t+1}
#   dx_t = (1 - a_t) * d_t
#   dg_t = a_t * (1 - a_t) * sum over k, v of d_t * (h_{t-1} - x_t)
#   dh_{-1} = a_0 * d_0
#
# Bytes per element in bf16: reads k, v, g, k_rec, v_rec, dk_rec, dv_rec, writes dk, dv, dg: 20.
# a_{t+1} is loaded beside a_t, from the L1 cache.

@jit
def recurrence_backward_kernel(
        k, v, g, stride_b, stride_t, dk_rec, dv_rec, dend, state, k_rec, v_rec,
        dk, dv, dg, dstate, words, B, T, C,
        RUN: constexpr, BT: constexpr, BC: constexpr, COPIES: constexpr):
    """Shapes as in the forward kernel; dk, dv, dg, dk_rec, dv_rec (B, T, C) contiguous."""
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, RUN, BT, BC)
    channel = c[None, None, :]
    live = (i < T - chunk * BT) & (channel < C)        # (N, RUN, BC)
    t_last = T - 1 - chunk * BT                        # the step where i = 0
    at = b * stride_b + t_last * stride_t - i * stride_t + channel
    out = (b * T + t_last) * C - i * C + channel
    later = live & (i > t_last + 1 - T)                # the last step has none after it
    a_next = decay(load_float(g + at + stride_t, later, INF))[0]
    d_k = load_float(dk_rec + out, live)
    d_v = load_float(dv_rec + out, live)
    d_k, d_v, first_k, first_v = chain(
        a_next, d_k, d_v, dend, words, chunk, chunks, b, c, B, C, COPIES)
    if chunk == chunks - 1:                            # step 0: before it lies the state
        row = b * stride_b + c
        row_k = b * C + c
        row_v = (B + b) * C + c
        mask = c < C
        a_0, rest_0 = decay(load_float(g + row, mask))
        far_k = load_float(state + row_k, mask) - load_float(k + row, mask)
        far_v = load_float(state + row_v, mask) - load_float(v + row, mask)
        d_g0 = a_0 * rest_0 * (first_k * far_k + first_v * far_v)
        tl.store(dstate + row_k, a_0 * first_k, mask=mask)
        tl.store(dstate + row_v, a_0 * first_v, mask=mask)
        tl.store(dg + b * T * C + c, d_g0, mask=mask)
    a, rest = decay(load_float(g + at, live))
    d_k *= rest
    d_v *= rest
    tl.store(dk + out, d_k, mask=live)
    tl.store(dv + out, d_v, mask=live)
    before = live & (i < t_last)                       # all other steps
    d_g = d_k * (load_float(k_rec + out - C, before) - load_float(k + at, before))
    d_g += d_v * (load_float(v_rec + out - C, before) - load_float(v + at, before))
    tl.store(dg + out, a * d_g, mask=before)


# Tiles for many chains and for few: the fastest on an H100; small ones for the interpreter.
CHAINS = (dict(RUN=4, BT=64, BC=64, num_warps=4),
          dict(RUN=8, BT=128, BC=32, num_warps=2))
CHAINS_BACK = (dict(RUN=4, BT=64, BC=64, num_warps=4, maxnreg=168),
               dict(RUN=4, BT=128, BC=32, num_warps=4, maxnreg=168))
SMALL_TILES = dict(RUN=4, BT=16, BC=16, num_warps=1)


def launch_recurrence(kernel, tiles, k, v, g, *arguments):
    """Run a kernel of the recurrence, with the words of its chain."""
    B, T, C = k.shape
    tiles = SMALL_TILES if INTERPRETER else tiles[B * C < 4096]
    k, v, g = same_strides(k, v, g)
    chunks = triton.cdiv(T, tiles["BT"])
    copies = max(1, 32 * tiles["num_warps"] // tiles["BC"])
    words = k.new_zeros(B, chunks, 2, C, dtype=torch.int64)
    arguments = [x.contiguous() for x in arguments]
    launch(kernel, chunks * B * triton.cdiv(C, tiles["BC"]), k, k, v, g, *k.stride()[:2],
           *arguments, words, B, T, C, COPIES=copies, **tiles)


def same_strides(*tensors):
    """The tensors, with channels side by side and all of the same strides: copied if need be."""
    first = tensors[0].stride()
    same = first[-1] == 1 and all(x.stride() == first for x in tensors)
    return tensors if same else [x.contiguous() for x in tensors]


def recurrence_forward(
        k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """model.recurrence: k_rec, v_rec (B, T, C) and the state at the end (2, B, C) float32."""
    outputs = tuple(x.new_empty(x.shape) for x in (k, v, state))
    if not idle(k):
        launch_recurrence(recurrence_forward_kernel, CHAINS, k, v, g, state, *outputs)
    return outputs


@operator
def recurrence_backward(
        dk_rec: Tensor, dv_rec: Tensor, dend: Tensor, k: Tensor, v: Tensor, g: Tensor,
        state: Tensor, k_rec: Tensor, v_rec: Tensor) -> list[Tensor]:
    """The gradients of k, v, g (B, T, C) and of the state (2, B, C). dend: of the state's end."""
    outputs = [x.new_empty(x.shape) for x in (k, v, g, state)]
    if not idle(k):
        launch_recurrence(recurrence_backward_kernel, CHAINS_BACK, k, v, g, dk_rec, dv_rec, dend,
                          state, k_rec, v_rec, *outputs)
    return outputs


recurrence = differentiable(
    recurrence_forward, recurrence_backward, lambda x, y: (*x, *y[:2]), grads=3)


# ---- RoPE, on queries and on recurrent keys ------------------------------------------------------
#
#   y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2: the halves of a head's channels
#
# What is slow: PyTorch moves about 30 bytes an element through float32 intermediates. Here it is 4
# in bf16. A program owns BT positions of one head, both halves. Grid: B x H x T / BT, heads
# fastest, as they are neighbours in memory. The backward pass turns by -sin.

@jit
def rotate_kernel(x, y, cos, sin, H, T, HALF: constexpr, BD: constexpr, BT: constexpr):
    """x, y: Rows of (B, H, T, Dh); cos, sin (T, HALF) float32. BD: HALF up to a power of 2."""
    b = tl.program_id(0).to(int64) // H
    h = tl.program_id(0) % H
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = (t < T)[:, None] & (d < HALF)[None, :]                                       # (BT, BD)
    turn = t[:, None] * HALF + d[None, :]
    c = load_float(cos + turn, live)
    s = load_float(sin + turn, live)
    t = t.to(int64)[:, None]
    source = x.ptr + b * x.b + h * x.h + t * x.t + d[None, :]
    target = y.ptr + b * y.b + h * y.h + t * y.t + d[None, :]
    x1 = load_float(source, live)
    x2 = load_float(source + HALF, live)
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    tl.store(target, y1, mask=live)
    tl.store(target + HALF, y2, mask=live)


def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (B, H, T, Dh): model.rotate."""
    y = new_heads(x)
    if not idle(x):
        B, H, T, Dh = x.shape
        BD = triton.next_power_of_2(Dh // 2)
        BT = max(1, 4096 // BD)
        launch(rotate_kernel, (B * H, triton.cdiv(T, BT)), x, *rows_of(*packed(x), y),
               cos.contiguous(), sin.contiguous(), H, T, Dh // 2, BD, BT)
    return y


rotate = differentiable(
    rotate_forward, lambda dy, cos, sin: [rotate(dy, cos, -sin)], lambda x, y: x[1:])


# ---- Who sees whom, equation (4): positions are int32 ------------------------------------------

FAR = constexpr(2**30)                                 # beyond every query; so T < 2^30
LOWEST = constexpr(-3e38)                              # below all scores, but finite


class Sizes(NamedTuple):
    """Rule.sizes as the constant RULE of a kernel; operators of PyTorch take lists of ints only."""
    dilation: int
    window: int
    sinks: int


@triton.constexpr_function
def ring(RULE):
    """model.Rule.ring of a rule, which comes as a plain tuple."""
    _, window, *_ = RULE
    return window


@jit
def near_from(t, RULE):
    """The first position that is near to a query at t. The last one is t."""
    return t - RULE.window


@jit
def sees_near(t, p, ITSELF, RULE):
    """Is near_from(t) <= p < t, or <= t with ITSELF 1? Compared unsigned: t - p < 0 is huge."""
    count = (t - near_from(t, RULE) + ITSELF).to(tl.uint32, bitcast=True)
    return (t - p - 1 + ITSELF).to(tl.uint32, bitcast=True) < count


@jit
def is_lasting(p, RULE):
    """Is p a sink or on the grid? Once such a key is in the past, every later query sees it."""
    yes = p < RULE.sinks
    if RULE.dilation > 0:
        yes = yes | ((p + 1) % RULE.dilation == 0)
    return yes


@jit
def lasting(j, n, RULE):
    """Position of the j-th of n lasting keys: sinks, then the grid behind them. FAR from n on."""
    p = j
    if RULE.dilation > 0:
        behind = j - RULE.sinks + RULE.sinks // RULE.dilation
        p = tl.where(j < RULE.sinks, j, (behind + 1) * RULE.dilation - 1)
    return tl.where(j < n, p, FAR)


# ---- Sparse attention, equations (3) and (4) -----------------------------------------------------
#
# What is slow: the definition scores all T x T pairs and then masks nearly all of them.
# The idea: the keys that a query at t sees are of three kinds, and for it each is of one only:
#
#   near       at most `window` positions back, t itself too
#   grid       farther back, on the grid
#   sinks      farther back, a sink that is not on the grid
#
# In memory the keys of a kind lie at equal distances, so TMA can fetch tiles of BN of them. A
# program owns BM queries of one head. It goes through the tiles of each kind with an online softmax
# (m: largest score, l: sum, acc: weighted values). Most tiles are seen by all BM queries, so they
# need no mask. Without a window only the query itself is near: it opens the softmax, by a product
# of rows. Scores are in units of log2: scale = log2(e) / sqrt(Dh), so that exp2, which the hardware
# has, replaces exp. lse = m + log2(l) is kept for the backward pass.
#
# Grid: query tiles x B x H, the tiles of a head together (they share its keys in the L2 cache),
# those with most keys first. Bytes: q, y, and the own k and v, 8 Dh per query and head in bf16; the
# other keys are found in the L2 cache. FLOPs: 4 Dh x (t / D + S + W) per query. Limits: T < 2^30,
# and 1024 bytes a head.

@jit
def dot_rows(x, y):
    """The products (M, N) of rows x (M, BD) and rows y (N, BD)."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@jit
def dot_pairs(x, y):
    """The products (M,) of each row of x (M, BD) and the same one of y."""
    return tl.sum(x.to(float32) * y.to(float32), 1)


@jit
def add_scores(s, v, scale, acc, l, m):
    """BN more keys in the online softmax. s (BM, BN): q . k, -inf where not seen; v (BN, BD)."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    prob = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l * shrink + tl.sum(prob, 1), m_new


@jit
def query_tile(H, T, BM):
    """(bh, b, h, i0): this program's queries begin at row i0 of a head, whose last come first."""
    tiles = tl.cdiv(T, BM)
    bh = tl.program_id(0).to(int64) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    return bh, bh // H, bh % H, tile * BM


@jit
def sees_rows(t, row, origin, KIND, RULE):
    """Which of these rows of a kind the queries at t see: (len(t), len(row))."""
    if KIND == "near":
        sees = sees_near(t[:, None], (origin + row)[None, :], 1, RULE)
    elif KIND == "grid":
        sees = ((row + 1) * RULE.dilation - 1)[None, :] < near_from(t, RULE)[:, None]
    else:
        sees = (row < RULE.sinks)[None, :] & (row[None, :] < near_from(t, RULE)[:, None])
        if RULE.dilation > 0:
            sees = sees & ((row + 1) % RULE.dilation != 0)[None, :]    # those are on the grid
    return sees


@jit
def attend(q, k, v, b, h, t, begin, end, origin, scale, acc, l, m, KIND, RULE, TMA, BN, STAGES):
    """acc (BM, BD), l, m (BM,) of queries begin .. end - 1 after a kind's keys k, v: tiles_of."""
    # They see rows from `first` on and before `stop`. `whole` of these, a multiple of BN, from
    # `inner` on, are seen by all queries: they need no mask.
    far_from_all = tl.maximum(near_from(begin, RULE), 0)  # keys before this position
    far_from_last = tl.maximum(near_from(end - 1, RULE), 0)
    first = 0
    inner = 0
    whole = 0
    if KIND == "near":
        first = far_from_all - origin
        unseen = far_from_last - far_from_all          # by the last query
        inner = tl.minimum(far_from_all + tl.cdiv(unseen, BN) * BN, begin) - origin
        whole = (begin - origin - inner) // BN * BN
        stop = end - origin
    elif KIND == "grid":
        whole = far_from_all // RULE.dilation // BN * BN
        stop = far_from_last // RULE.dilation
    else:
        stop = tl.minimum(far_from_last, RULE.sinks)
    for row in tl.range(inner, inner + whole, BN, num_stages=STAGES):
        k_tile = load_tile(k, b, h, row, TMA, BN)
        v_tile = load_tile(v, b, h, row, TMA, BN)
        acc, l, m = add_scores(dot_rows(q, k_tile), v_tile, scale, acc, l, m)
    for i in tl.range(first, stop - whole, BN, num_stages=STAGES):     # the others, with a mask
        row = tl.where(i < inner, i, i + whole)
        k_tile = load_tile(k, b, h, row, TMA, BN)
        v_tile = load_tile(v, b, h, row, TMA, BN)
        sees = sees_rows(t, row + tl.arange(0, BN), origin, KIND, RULE)
        s = tl.where(sees, dot_rows(q, k_tile), -INF)
        acc, l, m = add_scores(s, v_tile, scale, acc, l, m)
    return acc, l, m


@jit
def attention_forward_kernel(
        q, k, v, y, near_k, near_v, grid_k, grid_v, sinks_k, sinks_v, lse, lse_stride,
        H, T, start, origin, scale,
        TMA: constexpr, RULE: constexpr, BM: constexpr, BN: constexpr, STAGES: constexpr):
    """q, y: Rows of (B, H, T, Dh); k, v: Rows of (B, H, >= T, Dh); lse (B, H, T) float32, with this
    stride from query to query. The first query is at position `start`, row r of k, v, near_k and
    near_v at origin + r, row j of the grid's at the j-th position of the grid, row p of the sinks'
    at p.
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    t = start + i
    begin = start + i0
    end = start + tl.minimum(i0 + BM, T)
    q_tile = load_rows(q, b, h, i, live)                                                # (BM, BD)
    if ring(RULE) > 0:
        m = tl.full((BM,), LOWEST, float32)            # with -inf, a masked tile would give NaN
        l = tl.zeros((BM,), float32)
        acc = tl.zeros((BM, q.BD), float32)
    else:
        own_k = load_rows(k, b, h, t - origin, live)
        m = dot_pairs(q_tile, own_k) * scale
        l = tl.full((BM,), 1, float32)
        acc = load_rows(v, b, h, t - origin, live).to(float32)
    if RULE.sinks > 0:
        acc, l, m = attend(q_tile, sinks_k, sinks_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           "sinks", RULE, TMA, BN, STAGES)
    if RULE.dilation > 0:
        acc, l, m = attend(q_tile, grid_k, grid_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           "grid", RULE, TMA, BN, STAGES)
    if ring(RULE) > 0:
        acc, l, m = attend(q_tile, near_k, near_v, b, h, t, begin, end, origin, scale, acc, l, m,
                           "near", RULE, TMA, BN, STAGES)
    store_rows(y, b, h, i, acc / l[:, None], live)
    tl.store(lse + (bh * T + i) * lse_stride, m + tl.log2(l), mask=live)


# The backward pass. With P the softmax (from lse), dO the gradient of y, and delta_t = dO_t . y_t:
#
#   dS = P * (dO V^T - delta)     dQ = dS K / sqrt(Dh)     dK = dS^T Q / sqrt(Dh)     dV = P^T dO
#
# dQ goes by queries, like the forward pass, and computes delta on the way. dK and dV go by keys:
# the *lasting* ones, sinks and grid as one list j -> p, and, if there is a window, all others.
# Without a window only its own query sees such a key; then the dQ kernel writes its dK and dV. So
# each row is written exactly once.
#
# With D 64 and T 4096 the lasting keys are one tile a head, far too few programs. So the queries of
# a tile are split over several programs. Their float32 sums go through memory and are added in a
# fixed order: gradients repeat to the bit.
#
# Bytes, bf16, per query and head: dQ takes 12 Dh, without a window 16. dK, dV read q, dO once per
# key tile, mostly from the L2 cache. FLOPs: 6 and 8 Dh per pair, where the forward pass has 4.

@jit
def add_dq(q, k, v, dy, sees, lse, delta, scale, dq):
    """dq (BM, BD) of BN more keys, without the factor 1 / sqrt(Dh)."""
    s = tl.where(sees, dot_rows(q, k), -INF)
    prob = tl.exp2(s * scale - lse[:, None])                                            # (BM, BN)
    ds = prob * (dot_rows(dy, v) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit
def attention_backward_q_kernel(
        q, k, v, y, dy, dq, dk, dv, lse, delta, H, T, start, scale, factor,
        RULE: constexpr, BM: constexpr, BN: constexpr, STAGES: constexpr):
    """As the forward kernel with origin 0, but the own key is apart, window or not. dk, dv: Rows of
    (B, H, start + T, Dh); delta (B, H, T) float32; factor: 1 / sqrt(Dh).
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    t = start + i
    live = i < T
    end = start + tl.minimum(i0 + BM, T)
    lse_t = load_float(lse + bh * T + i, live, INF)
    dy_tile = load_rows(dy, b, h, i, live)                                              # (BM, BD)
    y_tile = load_rows(y, b, h, i, live)
    delta_t = dot_pairs(dy_tile, y_tile)
    tl.store(delta + bh * T + i, delta_t, mask=live)
    q_tile = load_rows(q, b, h, i, live)
    own_k = load_rows(k, b, h, t, live)
    own_v = load_rows(v, b, h, t, live)
    own_prob = tl.exp2(dot_pairs(q_tile, own_k) * scale - lse_t)
    own_ds = own_prob * (dot_pairs(dy_tile, own_v) - delta_t)
    if ring(RULE) == 0:
        mine = live & (is_lasting(t, RULE) == 0)
        store_rows(dk, b, h, t, (own_ds * factor)[:, None] * q_tile, mine)
        store_rows(dv, b, h, t, own_prob[:, None] * dy_tile, mine)
    acc = own_ds[:, None] * own_k
    far = tl.maximum(near_from(end - 1, RULE), 0)
    n = tl.minimum(far, RULE.sinks)                    # of lasting keys before that position
    if RULE.dilation > 0:
        n += tl.maximum(far // RULE.dilation - RULE.sinks // RULE.dilation, 0)
    for j0 in tl.range(0, n, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        p = lasting(j, n, RULE)
        k_tile = load_rows(k, b, h, p, j < n)
        v_tile = load_rows(v, b, h, p, j < n)
        sees = p[None, :] < near_from(t, RULE)[:, None]
        acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    if ring(RULE) > 0:
        near = tl.maximum(near_from(start + i0, RULE), 0)
        for p0 in tl.range(near, end, BN, num_stages=STAGES):
            p = p0 + tl.arange(0, BN)
            k_tile = load_rows(k, b, h, p, p < end)
            v_tile = load_rows(v, b, h, p, p < end)
            sees = sees_near(t[:, None], p[None, :], 0, RULE)
            acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    store_rows(dq, b, h, i, acc * factor, live)


@jit
def add_dkv(k, v, q, dy, sees, lse, delta, scale, dk, dv):
    """ds (BN, BM), and dk, dv (BN, BD) of BM more queries, without the factor 1 / sqrt(Dh)."""
    s = tl.where(sees, dot_rows(k, q), -INF)
    prob = tl.exp2(s * scale - lse[None, :])                                            # (BN, BM)
    dv = tl.dot(prob.to(dy.dtype), dy, dv, input_precision="ieee")
    ds = prob * (dot_rows(v, dy) - delta[None, :])
    ds = ds.to(q.dtype)
    return ds, tl.dot(ds, q, dk, input_precision="ieee"), dv


@jit
def attention_backward_kv_kernel(
        q, k, v, dy, dk, dv, lse, delta, H, T, start, scale, factor, n, tiles, splits,
        LASTING: constexpr, SPLIT: constexpr, RULE: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """dk, dv of a tile of the n lasting keys (LASTING) or of the others among n positions, from one
    of `splits` shares of its queries. SPLIT: dk, dv are Rows of (1, splits * B * H, n, Dh) float32.
    """
    program = tl.program_id(0).to(int64)
    tile = (program % tiles).to(int32)
    split = program // tiles % splits
    bh = program // tiles // splits
    b = bh // H
    h = bh % H
    j = tile * BN + tl.arange(0, BN)
    end = start + T
    if LASTING:
        p = lasting(j, n, RULE)
        live = j < n
    else:
        p = j
        live = (j < n) & (is_lasting(j, RULE) == 0)    # lasting rows are computed in vain
        end = tl.minimum(tile * BN + BN + ring(RULE), end)            # the last key's last query
    first = tl.maximum(tl.min(p), start)
    k_tile = load_rows(k, b, h, p, live)                                                # (BN, BD)
    v_tile = load_rows(v, b, h, p, live)
    acc_k = tl.zeros((BN, q.BD), float32)
    acc_v = tl.zeros((BN, q.BD), float32)
    query_tiles = tl.maximum(tl.cdiv(end - first, BM), 0)
    lse += bh * T
    delta += bh * T
    from_tile = (query_tiles * split // splits).to(int32)
    to_tile = (query_tiles * (split + 1) // splits).to(int32)
    for number in tl.range(from_tile, to_tile, num_stages=STAGES):
        t = first + number * BM + tl.arange(0, BM)                                      # (BM,)
        i = t - start
        q_tile = load_rows(q, b, h, i, t < end)
        dy_tile = load_rows(dy, b, h, i, t < end)
        lse_t = load_float(lse + i, t < end, INF)      # inf: of weight 0
        delta_t = load_float(delta + i, t < end)
        if LASTING:
            sees = p[:, None] <= t[None, :]
        else:
            sees = sees_near(t[None, :], p[:, None], 1, RULE)
        _, acc_k, acc_v = add_dkv(k_tile, v_tile, q_tile, dy_tile, sees, lse_t, delta_t, scale,
                                  acc_k, acc_v)
    if SPLIT:
        b = 0
        h = split * (tl.num_programs(0) // tiles // splits) + bh
        p = j
    store_rows(dk, b, h, p, acc_k * factor, live)
    store_rows(dv, b, h, p, acc_v, live)


# Tiles for heads of up to 128 and 256 bytes: the fastest on an H100, in 99 KiB of shared memory.
TILES = {
    "forward": [dict(BM=64, BN=BN, STAGES=2, maxnreg=128) for BN in (64, 32)],
    "backward q": (dict(BM=64, BN=32, STAGES=2, maxnreg=128), dict(BM=64, BN=32, STAGES=3)),
    "backward kv": (dict(BM=32, BN=64, STAGES=3, maxnreg=168), dict(BM=32, BN=64, STAGES=3)),
    "choose": (dict(BN=64, STAGES=3),) * 2,
    "blocks": (dict(BM=64, BN=64, STAGES=1),) * 2,
    "join": (dict(BM=16, STAGES=3),) * 2,
}
PROCESSORS = 132                                       # of an H100; for how finely to split queries


def tiles_for(kernel, q, keys=64):
    """Its tiles: smaller for wide heads and few keys. ValueError for heads that are too wide."""
    Dh = q.shape[-1]
    row_bytes = padded(Dh) * q.element_size()
    if row_bytes > 1024:
        raise ValueError(f"attention: a head of {Dh} channels in {q.dtype} is too wide, "
                         "the limit is 1024 bytes")
    tiles = dict(TILES[kernel][row_bytes > 128])
    if "BN" in tiles:
        tiles["BN"] = min(tiles["BN"], padded(keys))
    if row_bytes > 256:
        most = 16 if row_bytes > 512 or kernel in ("choose", "blocks") else 32
        tiles.update((side, min(tiles[side], most)) for side in ("BM", "BN") if side in tiles)
        tiles.update(STAGES=1, maxnreg=None)
    return tiles


def log2_scale(Dh):
    return math.log2(math.e) / math.sqrt(Dh)


def keys_of(k, v, end, rule, BN, cache):
    """near_k, near_v, grid_k ... for the forward kernel; None for a kind that the rule has not. k
    and v end before position `end`. cache: model.GroupCache with the grid up to there and the
    sinks, or None; then they are rows of k and v.
    """
    dilation = max(1, rule.dilation)
    near = k, v
    held = near
    grid = slice(dilation - 1, None, dilation)
    if cache:
        held = aligned(cache.k), aligned(cache.v)
        first = rule.sinks + ring(rule)
        grid = slice(first, first + end // dilation)
    kinds = [(near, slice(None), ring(rule)), (held, grid, rule.dilation),
             (held, slice(min(rule.sinks, end)), rule.sinks)]
    found = []
    for tensors, rows, size in kinds:
        for x in tensors:
            part = x[:, :, rows] if size else None
            if size and not part.numel():              # it is not read, but a descriptor wants rows
                part = k
            found.append(tiles_of(part, BN) if size else None)
    return found


def attend_forward(q, k, v, y, lse, rule, start, cache=None):
    """Fill y and lse of the queries from position `start` on; k and v end where q does."""
    (q,) = packed(q)
    k, v = aligned(k), aligned(v)
    B, H, T, Dh = q.shape
    tiles = tiles_for("forward", q)
    end = start + T
    keys = keys_of(k, v, end, rule, tiles["BN"], cache)
    launch(attention_forward_kernel, triton.cdiv(T, tiles["BM"]) * B * H, q, *rows_of(q, k, v, y),
           *keys, lse, lse.stride(2), H, T, start, end - k.shape[2], log2_scale(Dh),
           TMA=has_tma(q), RULE=rule, **tiles)


def attend_backward(q, k, v, y, dy, lse, delta, dq, dk, dv, rule):
    """Fill dq, dk, dv, delta for the pairs that (4) allows. q, y, dy: the last of k's positions."""
    q, k, v, y, dy = packed(q, k, v, y, dy)
    B, H, T, Dh = q.shape
    end = k.shape[2]
    if T < end:                                        # there may be keys that no query sees
        dk.zero_()
        dv.zero_()
    sizes = H, T, end - T, log2_scale(Dh), 1 / math.sqrt(Dh)
    tiles = tiles_for("backward q", q)
    launch(attention_backward_q_kernel, triton.cdiv(T, tiles["BM"]) * B * H, q,
           *rows_of(q, k, v, y, dy, dq, dk, dv), lse, delta, *sizes, RULE=rule, **tiles)
    tiles = tiles_for("backward kv", q)

    def by_keys(n, dk, dv, LASTING, splits=1):
        """dk and dv of n keys: the lasting ones, or all others."""
        key_tiles = triton.cdiv(n, tiles["BN"])
        launch(attention_backward_kv_kernel, key_tiles * splits * B * H, q,
               *rows_of(q, k, v, dy, dk, dv), lse, delta, *sizes, n, key_tiles, splits,
               LASTING=LASTING, SPLIT=splits > 1, RULE=rule, **tiles)

    if ring(rule):
        by_keys(end, dk, dv, False)
    sinks = min(rule.sinks, end)
    skipped = rule.sinks // rule.dilation if rule.dilation else 0      # of the grid, among sinks
    n = sinks + (max(0, end // rule.dilation - skipped) if rule.dilation else 0)
    if n == 0:
        return
    tiles = tiles_for("backward kv", q, n)
    programs = max(1, triton.cdiv(n, tiles["BN"]) * B * H)
    splits = max(1, min(8 * PROCESSORS // programs, T // 512))         # enough to fill the GPU
    if splits == 1:
        by_keys(n, dk, dv, True)
        return
    part = q.new_empty(2, splits * B * H, n, Dh, dtype=torch.float32)
    by_keys(n, part[:1], part[1:], True, splits)
    total = part.view(2, splits, B, H, n, Dh).sum(1)
    for gradient, found in zip((dk, dv), total):
        gradient[:, :, :sinks] = found[:, :, :sinks]
        if n > sinks:
            first = (skipped + 1) * rule.dilation - 1
            gradient[:, :, first::rule.dilation] = found[:, :, sinks:]


def attention_forward(
        q: Tensor, k_rec: Tensor, v_rec: Tensor, rule: list[int]) -> tuple[Tensor, Tensor]:
    """y (B, H, T, Dh), and lse (B, H, T) float32. rule: dilation, window, sinks."""
    y = new_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not idle(q):
        attend_forward(q, k_rec, v_rec, y, lse, Sizes(*rule), k_rec.shape[2] - q.shape[2])
    return y, lse


@operator
def attention_backward(
        dy: Tensor, q: Tensor, k_rec: Tensor, v_rec: Tensor, y: Tensor, lse: Tensor, rule: list[int]
        ) -> list[Tensor]:
    """dq, dk_rec, dv_rec (B, H, T, Dh)."""
    grads = [new_heads(x) for x in (q, k_rec, v_rec)]
    if not idle(q):
        delta = torch.empty_like(lse)
        attend_backward(q, k_rec, v_rec, y, dy, lse, delta, *grads, Sizes(*rule))
    return grads


run_attention = differentiable(attention_forward, attention_backward, lambda x, y: (*x[:3], *y))


def attention(q, k_rec, v_rec, *sizes):
    """Equation (3), model.attend, for tensors of any strides. ValueError for too wide heads."""
    return run_attention(q, k_rec, v_rec, list(sizes))[0]


def attention_chunk(q, k_near, v_near, cache, start):
    """Equation (3) for q (B, h, T, Dh), which continue a sequence at position `start`. k_near,
    v_near: (B, h, L, Dh), the positions near to the first query, then the chunk's. cache: a
    model.GroupCache that holds the chunk already; lasting keys before the window are read there.
    """
    y = new_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not idle(q):
        attend_forward(q, k_near, v_near, y, lse, Sizes(*cache.kept.sizes), start, cache)
    return y


# ---- Decoding: one token of each sequence, all that lies between in_proj and out_proj ------------
#
# What is slow: a dozen small operations, each a launch, and a mask over rows. Here it is one launch
# per head group. A head has `splits` programs. Each loads the token, one head wide, and attends
# over its share of the keys. The last to get there does the rest: it joins the shares, adds the
# token as one more key, and stores. For B sequences of h heads and n keys, in bf16:
#
#   all         read 4 B h n Dh bytes of keys and values, and 18 B h splits Dh of the token
#   the last    read the shares; write 8 B h Dh of state, 2 of y, 4 of keys and values a buffer
#
# The number of tokens seen, `seen`, is read on the device: one CUDA graph serves every position.
# A key is used once, by one query, so the arithmetic is float32 on the ordinary cores. What matters
# is that loads are always under way. So each of the BN rows of a tile has its own running softmax
# (m, l, acc), and the loop's sums need no barrier, as a row of up to 256 channels lies in one warp.
# Rows, then shares, meet once at the end.
#
#   row r, keys r, r + BN, ...:       s = q . k~_p log2(e) / sqrt(Dh)     m' = max(m, s)
#                                     l' = l 2^(m - m') + 2^(s - m')
#                                     acc' = acc 2^(m - m') + 2^(s - m') v~_p
#   meeting:                          M = max m,  y = sum 2^(m - M) acc / sum 2^(m - M) l
#
# Top-k blocks take two launches a head group. The first, grid (B h,), reads the summaries and
# chooses blocks. The second, grid (B h, splits), is as above, over the keys of the chosen blocks,
# then over those that equation (4) allows. The cache then holds every position in its place. A
# summary is written at the first step after its block is full, which is the first that scores it.
# Limits: B h < 2^31, positions < 2^30, 2^16 blocks or so; any even Dh.

@jit
def load_head(x, d, DH):
    """Channels d of the head at x, as float32; 0 beyond DH."""
    return load_float(x + d, d < DH)


@jit
def store_head(x, d, values, DH):
    tl.store(x + d, values, mask=d < DH)


@jit
def recur(x, g, state, d, DH):
    """Equation (2) for channels d of one token."""
    a, rest = decay(load_head(g, d, DH))
    return a * load_head(state, d, DH) + rest * load_head(x, d, DH)


@jit
def this_token(q, cos, sin, seen, H, first, stride_b, scale, EARLY, DH, BD):
    """What every program begins with: bh, b; `channel`, the first one of the head within C, and
    `at`, where it lies in memory; the token's position t; channels d (BD,) and the `other` ones,
    which RoPE turns together with them; what it multiplies both by; the query after RoPE, times
    scale. EARLY: the kernel before this one may still run, so it is waited for.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()          # the next kernel may start, and wait
    bh = tl.program_id(0).to(int64)
    b = bh // H
    channel = (first + bh % H) * DH
    at = b * stride_b + channel
    t = tl.load(seen).to(int32)
    d = tl.arange(0, BD)
    first_half = d < DH // 2
    other = tl.where(first_half, d + DH // 2, d - DH // 2)
    i = tl.minimum(d, other)
    cos_d = load_float(cos + i, d < DH)
    sin_d = load_float(sin + i, d < DH)
    sin_d = tl.where(first_half, -sin_d, sin_d)
    x = load_head(q + at, d, DH)
    x_other = load_head(q + at, other, DH)
    return bh, b, channel, at, t, d, other, cos_d, sin_d, (x * cos_d + x_other * sin_d) * scale


@jit
def count_keys(t, RULE):
    """How many keys `key_at` numbers for a query at t."""
    far = tl.maximum(near_from(t, RULE), 0)
    n = tl.minimum(RULE.sinks, far) + t - far
    if RULE.dilation > 0:
        n += far // RULE.dilation
    return n


@jit
def key_at(j, t, RULE, IN_PLACE):
    """The row in the cache of the j-th key that equation (4) allows a query at t besides its own:
    sinks, then the window, then the grid, a prefix of each buffer. IN_PLACE: in a cache of every
    position. -1: a sink on the grid, which comes later.
    """
    far = tl.maximum(near_from(t, RULE), 0)
    sinks = tl.minimum(RULE.sinks, far)
    near = sinks + t - far                             # the end of the window's
    at = j
    if ring(RULE) > 0 or IN_PLACE:
        at = tl.where(j < sinks, j, j - sinks + (far if IN_PLACE else RULE.sinks))
    if RULE.dilation > 0:
        if IN_PLACE:
            on_grid = (j - near + 1) * RULE.dilation - 1
        else:
            on_grid = RULE.sinks + ring(RULE) + j - near
        at = tl.where(j < near, at, on_grid)
        if RULE.sinks > 0:
            at = tl.where((j < sinks) & ((j + 1) % RULE.dilation == 0), -1, at)
    return at


@jit
def join(acc, l, m):
    """Running softmaxes of different keys as one. acc (n, BD), l and m (n,) -> acc (BD,), l, m."""
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    return tl.sum(weight[:, None] * acc, 0), tl.sum(weight * l, 0), top


@jit
def store_token(k_cache, v_cache, k, v, row, d, DH):
    at = row.to(int64) * DH
    store_head(k_cache + at, d, k, DH)
    store_head(v_cache + at, d, v, DH)


@jit
def decode_kernel(
        y, o, q, k, v, g, state, cos, sin, k_cache, v_cache, seen, partial, arrived, chosen,
        B, C, H, first, stride_b, rows, scale,
        RECURRENCE: constexpr, RULE: constexpr, KEPT: constexpr, EARLY: constexpr,
        DH: constexpr, BD: constexpr, BS: constexpr, BN: constexpr, STAGES: constexpr):
    """Program (bh, split). o, q, k, v, g: (B, C), stride_b from sequence to sequence; y (B, C);
    state (2, B, C); the heads of this group are H from `first` on. k_cache, v_cache (B, H, rows,
    Dh). partial (B * H, splits, Dh + 2) float32: acc, m, l. arrived (B * H,) int32: zeros, before
    and after. chosen (B * H, K) int32: top-k blocks. RULE: of the keys to read; KEPT: of those to
    store. A row that is not to be read is not loaded.
    """
    bh, b, channel, at, t, d, other, cos_d, sin_d, q_row = this_token(
        q, cos, sin, seen, H, first, stride_b, scale, EARLY, DH, BD)
    row_y = b * C + channel
    row_k = row_y                                      # in the state
    row_v = B * C + row_k
    # All programs load the token first, so that it is there when the last one needs it.
    gate = tl.sigmoid(load_head(o + at, d, DH))
    k += at
    v += at
    if RECURRENCE:                                                                      # (2)
        g += at
        k_rec = recur(k, g, state + row_k, d, DH)
        v_rec = recur(v, g, state + row_v, d, DH)
        k_other = recur(k, g, state + row_k, other, DH)
    else:
        k_rec = load_head(k, d, DH)
        v_rec = load_head(v, d, DH)
        k_other = load_head(k, other, DH)
    k_turned = k_rec * cos_d + k_other * sin_d
    k_cache += bh * rows * DH
    v_cache += bh * rows * DH
    n = count_keys(t, RULE)
    tiles = tl.cdiv(n, BN)
    block_tiles = 0
    if RULE.topk > 0:                                  # the chosen blocks come first
        chosen += bh * RULE.topk
        in_blocks = tl.minimum(t // RULE.block + 1, RULE.topk) * RULE.block
        block_tiles = tl.cdiv(in_blocks, BN)
    acc = tl.zeros((BN, BD), float32)
    l = tl.zeros((BN,), float32)
    m = tl.full((BN,), LOWEST, float32)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    tiles += block_tiles
    begin = tiles * split // splits                    # shares differ by one tile at most
    end = tiles * (split + 1) // splits
    for tile in tl.range(begin, end, num_stages=STAGES):
        j = (tile - block_tiles) * BN + tl.arange(0, BN)
        row = key_at(j, t, RULE, RULE.topk > 0)
        here = (j < n) & (row >= 0)
        if RULE.topk > 0:
            i = tile * BN + tl.arange(0, BN)
            block = tl.load(chosen + i // RULE.block, mask=i < in_blocks, other=0)
            p = block * RULE.block + i % RULE.block
            new = (i < in_blocks) & (p < near_from(t, RULE)) & (is_lasting(p, RULE) == 0)
            row = tl.where(tile < block_tiles, p, row)
            here = tl.where(tile < block_tiles, new, here)
        mask = here[:, None] if DH == BD else here[:, None] & (d < DH)[None, :]
        place = row.to(int64)[:, None] * DH + d[None, :]
        k_tile = tl.load(k_cache + place, mask=mask, other=0)                           # (BN, BD)
        v_tile = tl.load(v_cache + place, mask=mask, other=0)
        s = tl.sum(q_row[None, :] * k_tile, 1)
        s = tl.where(here, s, -INF)
        m_new = tl.maximum(m, s)
        shrink = tl.exp2(m - m_new)
        weight = tl.exp2(s - m_new)
        acc = acc * shrink[:, None] + weight[:, None] * v_tile
        l = l * shrink + weight
        m = m_new
    acc, l, m = join(acc, l, m)
    finishes = True
    if BS > 1:
        partial += bh * splits * (DH + 2)
        mine = partial + split * (DH + 2)
        store_head(mine, d, acc, DH)
        tl.store(mine + DH, m)
        tl.store(mine + DH + 1, l)
        tl.debug_barrier()                             # all threads of this program have stored
        finishes = tl.atomic_add(arrived + bh, 1, sem="acq_rel") == splits - 1
    if finishes:
        if BS > 1:                                     # it sees what the others have stored
            tl.store(arrived + bh, 0)
            share = tl.arange(0, BS)
            theirs = partial + share * (DH + 2)
            there = share < splits
            rows_there = there[:, None] & (d < DH)[None, :]
            shares_m = tl.load(theirs + DH, mask=there, other=LOWEST, cache_modifier=".cg")
            shares_l = tl.load(theirs + DH + 1, mask=there, other=0.0, cache_modifier=".cg")
            shares = tl.load(theirs[:, None] + d[None, :], mask=rows_there, other=0.0,
                             cache_modifier=".cg")                                      # (BS, BD)
            acc, l, m = join(shares, shares_l, shares_m)
        own_score = tl.sum(q_row * k_turned, 0)
        top = tl.maximum(m, own_score)
        fade = tl.exp2(m - top)
        own = tl.exp2(own_score - top)
        attended = (fade * acc + own * v_rec) / (fade * l + own)                        # (3)
        store_head(y + row_y, d, gate * attended, DH)                                   # (5)
        # State and token are stored last, when all programs of the head have read the state, and
        # the token's row in the ring, which held position t - W until now.
        tl.debug_barrier()
        if RECURRENCE:
            store_head(state + row_k, d, k_rec, DH)
            store_head(state + row_v, d, v_rec, DH)
        if t < KEPT.sinks:
            store_token(k_cache, v_cache, k_turned, v_rec, t, d, DH)
        if ring(KEPT) > 0:
            row = KEPT.sinks + t % ring(KEPT)
            store_token(k_cache, v_cache, k_turned, v_rec, row, d, DH)
        if KEPT.dilation > 0:
            if (t + 1) % KEPT.dilation == 0:
                row = KEPT.sinks + ring(KEPT) + t // KEPT.dilation
                store_token(k_cache, v_cache, k_turned, v_rec, row, d, DH)


@jit
def write_summary(summaries, k_cache, block, d, RULE, BR, DH, BD):
    """The summary of a full block, from its keys in tiles of BR; see model.block_summaries."""
    r = tl.arange(0, BR)
    least = tl.full((BD,), INF, float32)
    most = -least
    total = tl.zeros((BD,), float32)
    for r0 in range(0, RULE.block, BR):
        here = (r0 + r < RULE.block)[:, None] & (d < DH)[None, :]
        place = (block * RULE.block + r0 + r).to(int64)[:, None] * DH + d[None, :]
        keys = load_float(k_cache + place, here)                                        # (BR, BD)
        if RULE.score == "last":
            keys = tl.where((r0 + r == RULE.block - 1)[:, None], keys, 0)
        total += tl.sum(keys, 0)
        least = tl.minimum(least, tl.min(tl.where(here, keys, INF), 0))
        most = tl.maximum(most, tl.max(tl.where(here, keys, -INF), 0))
    if RULE.score == "minmax":
        summaries += block.to(int64) * 2 * DH
        store_head(summaries, d, most, DH)
        store_head(summaries + DH, d, least, DH)
    else:
        if RULE.score == "mean":
            total /= RULE.block
        store_head(summaries + block.to(int64) * DH, d, total, DH)


@jit
def in_order(x):
    """The bits of a float32 as an int32 of the same order, and back."""
    return x ^ ((x >> 31) & 0x7fffffff)


@jit
def decode_choose_kernel(
        q, cos, sin, k_cache, summaries, seen, scores, chosen, H, first, stride_b, rows,
        RULE: constexpr, EARLY: constexpr, DH: constexpr, BD: constexpr,
        BN: constexpr, BS: constexpr, BK: constexpr, BR: constexpr, STAGES: constexpr):
    """Program (bh): chosen (B * H, K) int32, the own block, then the best of the earlier ones, as
    many as there are. summaries (B, H, n, Dh or 2 Dh); scores (B * H, n) float32: scratch, as the
    kernel is compiled for the longest sequence but scores only the blocks so far.
    """
    bh, _, _, _, t, d, _, _, _, q_row = this_token(
        q, cos, sin, seen, H, first, stride_b, 1.0, EARLY, DH, BD)
    n = rows // RULE.block
    width = 2 * DH if RULE.score == "minmax" else DH
    k_cache += bh * rows * DH
    summaries += bh * n * width
    scores += bh * n
    chosen += bh * RULE.topk
    own = t // RULE.block
    if (t % RULE.block == 0) & (own > 0):
        write_summary(summaries, k_cache, own - 1, d, RULE, BR, DH, BD)
        tl.debug_barrier()                             # other threads read it
    q_row = q_row.to(q.dtype.element_ty).to(float32)   # as in a whole sequence
    for b0 in tl.range(0, own, BN, num_stages=STAGES):
        block = b0 + tl.arange(0, BN)
        mask = (block < own)[:, None] & (d < DH)[None, :]
        place = block[:, None] * width + d[None, :]
        summary = tl.load(summaries + place, mask=mask, other=0)                        # (BN, BD)
        if RULE.score == "minmax":
            least = tl.load(summaries + DH + place, mask=mask, other=0)
            summary = tl.where(q_row[None, :] > 0, summary, least)
        s = tl.sum(q_row[None, :] * summary, 1)
        tl.store(scores + block, s, mask=block < own)
    tl.debug_barrier()                                 # other threads read them
    block = tl.arange(0, BS)
    s = load_float(scores + block, block < own, -INF)                                   # (BS,)
    s = tl.where(block < own, tl.maximum(s, LOWEST), s)                # NaN: the least score
    s = tl.where(s == 0, 0.0, s)                       # -0 is no less than +0
    order = in_order(s.to(int32, bitcast=True))
    order = order.to(int64) << 31
    best = tl.topk(order + (0x7fffffff - block), BK)   # of equal scores the lower index
    j = tl.arange(0, BK)
    tl.store(chosen, own)
    best = 0x7fffffff - (best & 0x7fffffff).to(int32)                                   # (BK,)
    others = tl.minimum(own, RULE.topk - 1)
    tl.store(chosen + 1 + j, best, mask=j < others)


def split_count(programs, keys, BN, device):
    """How many programs share a head's keys: about four a processor, two tiles each or more."""
    if device.type != "cuda":
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(32, keys // (2 * BN), 4 * units // max(1, programs)))


def choose(q, rope, group, seen, first, rule, early):
    """chosen (B * H, K) int32: the blocks of one token, for decode_kernel."""
    B, H, rows, Dh = group.k.shape
    chosen = q.new_empty(B * H, rule.topk, dtype=torch.int32)
    blocks = rows // rule.block
    scores = q.new_empty(B * H, blocks, dtype=torch.float32)
    BD = triton.next_power_of_2(Dh)
    BS = max(16, triton.next_power_of_2(blocks))
    BK = max(2, triton.next_power_of_2(rule.topk))
    BR = min(64, triton.next_power_of_2(rule.block))
    launch(decode_choose_kernel, B * H, q, q, *rope, group.k, group.summaries, seen, scores, chosen,
           H, first, q.stride(0), rows, RULE=rule, DH=Dh, BD=BD, BN=max(16, 8192 // max(128, BD)),
           BS=BS, BK=BK, BR=BR, STAGES=2, **early)
    return chosen


@torch.compiler.disable
def decode(o, q, k, v, g, rope, cache, splits=None):
    """Equations (2) to (5), but for out_proj, for one token of each sequence: (B, 1, C).

    o, q, k, v: (B, 1, C), and g, a list that holds one more, or none without recurrence. rope: cos
    and sin (1, Dh/2) float32 of the token's position. cache: a Cache's layer, to which the token
    is appended. splits: how many programs share a head's keys; None: enough to fill the GPU.
    """
    o, q, k, v, *g = same_strides(o, q, k, v, *g)
    rope = [x.contiguous() for x in rope]
    B, _, C = q.shape
    y = q.new_empty(B, 1, C)
    # On Hopper and later, a kernel may start while the one before it ends.
    early = dict(EARLY=True, launch_pdl=True) if q.is_cuda and has_tma(q) else dict(EARLY=False)
    first = 0                                          # head of the group
    for group in cache.groups:
        _, H, rows, Dh = group.k.shape
        if not hasattr(group, "arrived"):              # made by the first step, which is no replay
            group.arrived = q.new_zeros(B * H, dtype=torch.int32)
        BD = triton.next_power_of_2(Dh)
        BN = max(2048 // BD, 16)                       # 16 keys of 128 channels
        tiles = dict(BN=BN, STAGES=3, num_warps=BN * BD // 1024, maxnreg=128)
        rule = group.kept
        keys = rows
        chosen = group.arrived                         # a placeholder
        if group.rule.topk:
            block = min(group.rule.block, rows)
            topk = min(group.rule.topk, triton.cdiv(rows, block))
            rule = group.rule._replace(block=block, topk=topk)
            tiles = dict(BN=max(16, 32 * 128 // max(128, BD)), STAGES=3)
            keys = topk * block + ring(rule) + rule.sinks
            keys += rows // rule.dilation if rule.dilation else 0
            chosen = choose(q, rope, group, cache.seen, first, rule, early)
        n = splits or split_count(B * H, keys, tiles["BN"], q.device)
        partial = q.new_empty(B * H, n, Dh + 2, dtype=torch.float32)
        gate, state = (*g, cache.state) if g else (k, k)               # without g placeholders
        launch(decode_kernel, (B * H, n), q, y, o, q, k, v, gate, state, *rope, group.k, group.v,
               cache.seen, partial, group.arrived, chosen, B, C, H, first, q.stride(0), rows,
               log2_scale(Dh), RECURRENCE=bool(g), RULE=rule, KEPT=group.kept, DH=Dh, BD=BD,
               BS=triton.next_power_of_2(n), **early, **tiles)
        first += H
    return y


# ---- Top-k blocks: the choice --------------------------------------------------------------------
#
# What is slow: each query and head chooses for itself, so 64 queries want nearly all of the blocks:
# the arithmetic of dense attention. One by one they would read K N keys each, 512 KB from the L2
# cache at N 64, K 16, Dh 128, bf16. The idea: the (query, block) pairs are sorted by block, and a
# block's keys meet the queries that chose it in a matrix product. A query's K partial results, 8 KB
# written and read, are joined by their log-sum-exp.
#
# Scores (blocks, heads, T) are never stored. A program takes 64 queries of one head past the
# summaries twice, in tiles of BN blocks:
#
#   1. It keeps the 4 best scores of each lane; lane c sees blocks c, c + BN, ... The K-th best of
#      these is the bar, unless one lane holds 5 of the best K, which is rare.
#   2. Blocks over the bar are chosen. If these are not K - 1, the bar is sought by bisection of
#      (score, -index). That order is strict: of equal scores the block of lower index wins.
#
# The choice leaves as words: bit i of word w of block b says that query 64 w + i chose b. A running
# sum of the words' populations is each pair's place in the list of its block. So there is no sort
# and no atomic addition, and lists are in the order of queries. Grid of both kernels: B H T / 64.
# choose reads q, and the summaries from the L2 cache: 2 Dh n FLOPs a query, and a search of about
# 60 instructions a score. Limits: B H T K < 2^31; K up to 64 or so, as more overflow the lanes.

WORD = constexpr(64)                                   # queries that share a word
BOTTOM = constexpr(-0x7f800001 * 2**31)                # -inf as the search has it


@jit
def score_blocks(q, summaries, b, h, block, own, stop, MINMAX):
    """Scores (BM, BN) of blocks before `stop`; -inf from the query's own on. NaN is the least."""
    high = load_rows(summaries, b, h, block, block < stop)                              # (BN, BD)
    if MINMAX:  # maxima, then minima
        at, mask = rows_at(summaries, b, h, block, block < stop)
        low = tl.load(at + summaries.DH, mask=mask, other=0)
        positive = tl.where(q > 0, q, 0).to(q.dtype)
        negative = tl.where(q > 0, 0, q).to(q.dtype)
        s = dot_rows(positive, high)
        s += dot_rows(negative, low)                   # one product, begun from the other's sums
    else:
        s = dot_rows(q, high)
    is_past = block[None, :] < own[:, None]
    return tl.where(is_past, tl.maximum(s, LOWEST), -INF)


@jit
def population(x):
    """How many bits of x (int64) are set. The compiler knows this idiom."""
    x = x.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f
    return ((x * 0x0101010101010101) >> 56).to(int32)


@jit
def choose_kernel(
        q, summaries, chosen, words, counts, H, T, start, n, K,
        N: constexpr, MINMAX: constexpr, BN: constexpr, STAGES: constexpr):
    """q: Rows of (B, H, T, Dh), the first at position `start`; summaries: Rows of (B, H, >= n - 1,
    Dh or 2 Dh). chosen (B, H, T, K) int32: the blocks of a query, by index. words (B, H, n, cdiv(T,
    64)) int64. counts: their populations, int32; zeros before.
    """
    bh, b, h, i0 = query_tile(H, T, WORD)
    tiles = tl.cdiv(T, WORD)
    row = tl.arange(0, WORD)
    live = i0 + row < T
    own = (start + i0 + row) // N
    own = tl.where(live, own, -1)                      # beyond T: choose nothing
    end = tl.max(own) + 1
    want = tl.minimum(own + 1, K)
    q_tile = load_rows(q, b, h, i0 + row, live)
    column = tl.arange(0, BN)
    first = tl.full((WORD, BN), -INF, float32)         # of each lane, best first
    second = first
    third = first
    fourth = first
    for b0 in tl.range(0, end, BN, num_stages=STAGES):
        block = b0 + column
        s = score_blocks(q_tile, summaries, b, h, block, own, end - 1, MINMAX)
        less = tl.minimum(first, s)
        first = tl.maximum(first, s)
        s = tl.minimum(second, less)
        second = tl.maximum(second, less)
        less = tl.minimum(third, s)
        third = tl.maximum(third, s)
        fourth = tl.maximum(fourth, less)
    bar = tl.full((WORD,), INF, float32)               # K 1: no other
    for _ in range(1, K):
        bar = tl.max(first, 1)
        best = first == bar[:, None]
        first = tl.where(best, second, first)
        second = tl.where(best, third, second)
        third = tl.where(best, fourth, third)
        fourth = tl.where(best, -INF, fourth)
    bar = tl.where(own < K, -INF, bar)                 # fewer than K: all of them
    bar = tl.maximum(bar, 1.1 * LOWEST)                # over -inf, under the scores of past blocks
    order = in_order(bar.to(int32, bitcast=True))
    order = order.to(int64) << 31                      # (score, -index) in one
    low = tl.full((WORD,), BOTTOM, int64)
    high = tl.full((WORD,), 2**62, int64)
    behind = column[None, :] - column[:, None]
    before = tl.where(behind > 0, 1.0, 0.0)
    before = tl.where(behind == 0, 256.0, before).to(tl.float16)
    shift = (tl.arange(0, 4) * 16).to(int64)
    words += bh * n * tiles + i0 // WORD
    counts += bh * n * tiles + i0 // WORD
    chosen += (bh * T + i0) * K
    searching = 1
    while searching > 0:
        bar = in_order((order >> 31).to(int32)).to(float32, bitcast=True)
        until = 0x7fffffff - (order & 0x7fffffff).to(int32)            # of blocks just at the bar
        count = tl.zeros((WORD,), int32)
        for b0 in tl.range(0, end, BN, num_stages=STAGES):
            block = b0 + column
            s = score_blocks(q_tile, summaries, b, h, block, own, end - 1, MINMAX)
            tied = (s == bar[:, None]) & (block[None, :] <= until[:, None])
            is_own = block[None, :] == own[:, None]
            take = (s > bar[:, None]) | is_own | tied
            ones = tl.where(take, 1.0, 0.0)
            sums = tl.dot(ones.to(tl.float16), before)
            # Bits 0 to 7: how many are taken before it. Bit 8: is it taken? `+` would make 2^23 the
            # product's first sum, and ptxas 12.8 drops products that begin from a constant.
            sums = tl.fma(sums, 1.0, 2.0**23)
            sums = sums.to(int32, bitcast=True)
            j = count[:, None] + (sums & 0xff)
            new = ((sums & 0x100) > 0) & (j < K)
            at = chosen + row[:, None] * K + j
            tl.store(at, tl.zeros_like(j) + block[None, :], mask=new)
            count += tl.sum(ones, 1).to(int32)
            bits = tl.where(take, (1 << row % 16)[:, None], 0)
            bits = tl.sum(tl.reshape(bits, (4, 16, BN)), 1)
            word = tl.sum(bits.to(int64) << shift[:, None], 0)                          # (BN,)
            at = block.to(int64) * tiles
            tl.store(words + at, word, mask=block < end)
            tl.store(counts + at, population(word), mask=block < end)
        low = tl.where(count > want, order, low)
        high = tl.where(count < want, order, high)
        middle = (low & high) + ((low ^ high) >> 1)    # rounded down, without overflow
        open_ = (count != want) & (middle > low)
        order = tl.where(open_, middle, order)
        searching = tl.max(open_.to(int32))
        tl.debug_barrier()                             # other threads overwrite what is stored


@jit
def list_kernel(
        chosen, words, ends, pairs, H, T, start, n, capacity,
        K: constexpr, N: constexpr, BK: constexpr):
    """pairs (capacity = B * H * T * K,) int32: query * K + j for each query's j-th choice, by head,
    block, query. ends (B, H, n, cdiv(T, 64)) int32: where in pairs the queries of a word end.
    """
    bh, b, h, i0 = query_tile(H, T, WORD)
    tiles = tl.cdiv(T, WORD)
    row = tl.arange(0, WORD)[:, None]
    j = tl.arange(0, BK)[None, :]
    i = i0 + row
    taken = tl.minimum((start + i) // N + 1, K)
    live = (i < T) & (j < taken)                                                        # (64, BK)
    chosen += (bh * T + i) * K
    block = tl.load(chosen + j, mask=live, other=0)
    live = live & (block >= 0) & (block < n)           # no wrong choice leads out of the lists
    at = (bh * n + block) * tiles + i0 // WORD
    word = tl.load(words + at, mask=live, other=0).to(tl.uint64, bitcast=True)
    later = population(word >> row.to(tl.uint64))      # queries of the word from this one on
    end = tl.load(ends + at, mask=live, other=0)
    at = end - later
    live = live & (at >= 0) & (at < capacity)
    tl.store(pairs + at, i * K + j, mask=live)


# ---- Top-k blocks: attention ---------------------------------------------------------------------
#
#   blocks   part_j = softmax_p(q . k~_p / sqrt(Dh)) v~_p over the j-th chosen block of a query, and
#            lse_j, its log2-sum-exp2
#   rest     where equation (4) allows more than the query itself: all that it allows is one more
#            part, by the kernels of sparse attention. The blocks leave these keys out.
#   join     y = sum_j 2^(lse_j - M) part_j / sum_j 2^(lse_j - M)
#
# blocks: a program holds the keys of one block and goes through its list in tiles of BM pairs. Grid
# B H n, heads slowest: the queries of a head stay in the L2 cache. join: a program takes BM
# queries, and adds in one order, in float32. Bytes: the parts, 2 K Dh a query and head in bf16,
# written and read; the FLOPs, 4 K N Dh, are under the writing. Limits: as attention's.

@jit
def block_of(ends, H, n, T):
    """(bh, b, h, block) of this program, and where in pairs its list begins and ends."""
    at = tl.program_id(0).to(int64)                    # of all B H n blocks and lists
    bh = at // n
    block = (at % n).to(int32)
    tiles = tl.cdiv(T, WORD)
    ends += at * tiles
    begin = tl.load(ends - 1, mask=at > 0, other=0)
    return bh, bh // H, bh % H, block, begin, tl.load(ends + tiles - 1)


@jit
def load_pairs(pairs, e0, list_end, T, K, BM):
    """BM pairs of a list, from e0 on, and which of them there are."""
    e = e0 + tl.arange(0, BM)
    pair = tl.load(pairs + e, mask=e < list_end, other=-1)
    return pair, (pair >= 0) & (pair < T * K)          # no wrong list leads out of the parts


@jit
def sees_in_block(t, p, stop, RULE, REST):
    """Does t attend to p of a chosen block, which ends before `stop`? REST: not if (4) allows."""
    sees = p <= tl.minimum(near_from(t, RULE) - 1 if REST else t, stop - 1)
    if REST:
        sees = sees & (is_lasting(p, RULE) == 0)
    return sees


@jit
def blocks_kernel(
        q, k, v, part, part_lse, pairs, ends, H, T, start, n, end, scale,
        K: constexpr, N: constexpr, RULE: constexpr, REST: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """Program (bh, block). q: Rows of (B, H, T, Dh), the first at position `start`; k, v: Rows of
    (B, H, end, Dh); part: Rows of (B, H, T * (K + REST), Dh); part_lse (B, H, T * (K + REST))
    float32.
    """
    bh, b, h, block, list_begin, list_end = block_of(ends, H, n, T)
    p0 = block * N
    p = p0 + tl.arange(0, BN)
    stop = tl.minimum(p0 + N, end)
    k_tile = load_rows(k, b, h, p, p < stop)                                            # (BN, BD)
    v_tile = load_rows(v, b, h, p, p < stop)
    part_lse += bh * T * (K + REST)
    for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
        pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                          # (BM,)
        i = pair // K
        q_tile = load_rows(q, b, h, i, live)                                            # (BM, BD)
        t = start + i
        sees = sees_in_block(t[:, None], p[None, :], stop, RULE, REST)
        s = tl.where(sees, dot_rows(q_tile, k_tile), -INF)                              # (BM, BN)
        m = tl.maximum(tl.max(s, 1) * scale, LOWEST)
        weight = tl.exp2(s * scale - m[:, None])
        l = tl.sum(weight, 1)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")           # (BM, BD)
        for more in range(BN, N, BN):                  # the rest of a large block
            here = p + more < stop
            k_more = load_rows(k, b, h, p + more, here)
            v_more = load_rows(v, b, h, p + more, here)
            sees = sees_in_block(t[:, None], (p + more)[None, :], stop, RULE, REST)
            s = tl.where(sees, dot_rows(q_tile, k_more), -INF)
            acc, l, m = add_scores(s, v_more, scale, acc, l, m)
        acc *= tl.where(l > 0, 1 / l, 0)[:, None]
        place = pair + i * REST
        store_rows(part, b, h, place, acc, live)
        tl.store(part_lse + place, m + tl.log2(l), mask=live)


@jit
def join_kernel(
        y, part, part_lse, lse, H, T, start,
        K: constexpr, N: constexpr, REST: constexpr, BM: constexpr, STAGES: constexpr):
    """y: Rows of (B, H, T, Dh); lse (B, H, T) float32. The rest as above."""
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    count = tl.where(live, tl.minimum((start + i) // N + 1, K), 0)     # of a query's blocks
    part_lse += (bh * T + i) * (K + REST)
    m = tl.full((BM,), LOWEST, float32)
    for j in range(K + REST):
        here = (j < count) | (live & (j == K))
        m = tl.maximum(m, load_float(part_lse + j, here, LOWEST))
    l = tl.zeros((BM,), float32)
    acc = tl.zeros((BM, y.BD), float32)
    for j in tl.range(K + REST, num_stages=STAGES):
        here = (j < count) | (live & (j == K))
        lse_j = load_float(part_lse + j, here, -INF)
        weight = tl.exp2(lse_j - m)
        l += weight
        part_j = load_rows(part, b, h, i * (K + REST) + j, here)                        # (BM, BD)
        acc += weight[:, None] * part_j
    store_rows(y, b, h, i, acc / l[:, None], live)
    tl.store(lse + bh * T + i, m + tl.log2(l), mask=live)


# The backward pass, with P, dO and delta as in attention's: the rest by the kernels of sparse
# attention, which compute delta too; else delta has a kernel of its own. Then by blocks: the pairs'
# parts of dQ, and dK and dV of the block, added to the rest's. At last the parts of dQ are summed;
# their bytes are the limit. A row has one writer, a sum one order: gradients repeat to the bit.

@jit
def delta_kernel(y, dy, delta, H, T, BM: constexpr):
    """delta (B, H, T) float32: dO . y of each query. y, dy: Rows of (B, H, T, Dh)."""
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    y_tile = load_rows(y, b, h, i, i < T)                                               # (BM, BD)
    dy_tile = load_rows(dy, b, h, i, i < T)
    tl.store(delta + bh * T + i, dot_pairs(dy_tile, y_tile), mask=i < T)


@jit
def blocks_backward_kernel(
        q, k, v, dy, dk, dv, part, pairs, ends, lse, delta, H, T, start, n, end, scale, factor,
        K: constexpr, N: constexpr, RULE: constexpr, REST: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """Program (bh, block): all its rows of dk, dv, and its pairs' rows of part, Rows of (B, H, T *
    (K + REST), Dh). REST: dk and dv hold what the rest gave.
    """
    bh, b, h, block, list_begin, list_end = block_of(ends, H, n, T)
    p0 = block * N
    stop = tl.minimum(p0 + N, end)
    lse += bh * T
    delta += bh * T
    for more in range(0, N, BN):
        p = p0 + more + tl.arange(0, BN)
        k_tile = load_rows(k, b, h, p, p < stop)                                        # (BN, BD)
        v_tile = load_rows(v, b, h, p, p < stop)
        acc_k = tl.zeros((BN, q.BD), float32)
        acc_v = tl.zeros((BN, q.BD), float32)
        for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
            pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                      # (BM,)
            i = pair // K
            t = start + i
            q_tile = load_rows(q, b, h, i, live)                                        # (BM, BD)
            dy_tile = load_rows(dy, b, h, i, live)
            lse_t = load_float(lse + i, live, INF)
            delta_t = load_float(delta + i, live)
            sees = sees_in_block(t[None, :], p[:, None], stop, RULE, REST)
            ds, acc_k, acc_v = add_dkv(k_tile, v_tile, q_tile, dy_tile, sees, lse_t, delta_t,
                                       scale, acc_k, acc_v)
            row = pair + i * REST
            dq = tl.dot(tl.trans(ds), k_tile, input_precision="ieee")
            dq *= factor
            if more > 0:  # add to what the block's keys before these gave
                dq += load_rows(part, b, h, row, live)
            store_rows(part, b, h, row, dq, live)
        acc_k *= factor
        if REST:
            acc_k += load_rows(dk, b, h, p, p < stop)
            acc_v += load_rows(dv, b, h, p, p < stop)
        store_rows(dk, b, h, p, acc_k, p < stop)
        store_rows(dv, b, h, p, acc_v, p < stop)
        tl.debug_barrier()                             # other threads read these rows of part


PARTS_BYTES = 2**31                                    # the most that the parts of one call take
LEAST_QUERIES = 1024                                   # but no call is cut shorter


def choose_blocks(q, summaries, end, block, topk):
    """The choice of q (B, H, T, Dh), the last of `end` positions: pairs, ends, as above."""
    B, H, T, Dh = q.shape
    n = triton.cdiv(end, block)
    tiles = triton.cdiv(T, 64)
    words = q.new_empty(B, H, n, tiles, dtype=torch.int64)
    counts = q.new_zeros(B, H, n, tiles, dtype=torch.int32)
    chosen = q.new_empty(B, H, T, topk, dtype=torch.int32)
    pairs = q.new_zeros(chosen.numel(), dtype=torch.int32)
    sizes = H, T, end - T, n
    constants = tiles_for("choose", q)
    minmax = summaries.shape[-1] == 2 * Dh
    if minmax:
        constants["STAGES"] = 1                        # two tiles take twice the shared memory
    launch(choose_kernel, B * H * tiles, q, *rows_of(q, summaries[..., :Dh]), chosen, words, counts,
           *sizes, topk, N=block, MINMAX=minmax, **constants)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    launch(list_kernel, B * H * tiles, q, chosen, words, ends, pairs, *sizes, pairs.numel(),
           K=topk, N=block, BK=triton.next_power_of_2(topk))
    return pairs, ends


def topk_forward(
        q: Tensor, k_rec: Tensor, v_rec: Tensor, summaries: Tensor, rule: list[int]
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and lse of the last T of k's positions, and their choice: pairs, ends. rule: Rule[:5]."""
    *sizes, block, topk = rule
    rest = any(sizes)
    B, H, T, Dh = q.shape
    end = k_rec.shape[2]
    n = -(-end // block)
    y = new_heads(q)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if idle(q):
        pairs = q.new_empty(B * H * T * topk, dtype=torch.int32)
        ends = q.new_empty(B * H * n * -(-T // 64), dtype=torch.int32)
        return y, lse, pairs, ends
    q, k, v, summaries = packed(q, k_rec, v_rec, summaries)
    pairs, ends = choose_blocks(q, summaries, end, block, topk)
    part = q.new_empty(B, H, T, topk + rest, Dh)
    part_lse = q.new_empty(B, H, T, topk + rest, dtype=torch.float32)
    if rest:
        attend_forward(q, k, v, part[:, :, :, topk], part_lse[..., topk], Sizes(*sizes), end - T)
    constants = dict(K=topk, N=block, REST=int(rest))
    parts = part.flatten(2, 3)
    launch(blocks_kernel, B * H * n, q, *rows_of(q, k, v, parts), part_lse, pairs, ends, H, T,
           end - T, n, end, log2_scale(Dh), RULE=Sizes(*sizes), **constants,
           **tiles_for("blocks", q, block))
    tiles = tiles_for("join", q)
    launch(join_kernel, triton.cdiv(T, tiles["BM"]) * B * H, q, *rows_of(y, parts), part_lse, lse,
           H, T, end - T, **constants, **tiles)
    return y, lse, pairs, ends


@operator
def topk_backward(
        dy: Tensor, q: Tensor, k_rec: Tensor, v_rec: Tensor, y: Tensor, lse: Tensor, pairs: Tensor,
        ends: Tensor, rule: list[int]) -> list[Tensor]:
    """dq (B, H, T, Dh); dk_rec, dv_rec (B, H, end, Dh)."""
    *sizes, block, topk = rule
    rest = any(sizes)
    sizes = Sizes(*sizes)
    B, H, T, Dh = q.shape
    end = k_rec.shape[2]
    dq, dk, dv = (new_heads(x) for x in (q, k_rec, v_rec))
    if idle(q):
        return [dq, dk, dv]
    q, k, v, y, dy = packed(q, k_rec, v_rec, y, dy)
    delta = torch.empty_like(lse)
    part = q.new_empty(B, H, T, topk + rest, Dh)
    part[:, :, :max(0, (topk - 1) * block - end + T), :topk] = 0       # these have fewer blocks
    if rest:
        attend_backward(q, k, v, y, dy, lse, delta, part[:, :, :, topk], dk, dv, sizes)
    else:
        launch(delta_kernel, triton.cdiv(T, 16) * B * H, q, *rows_of(y, dy), delta, H, T, BM=16)
    n = triton.cdiv(end, block)
    launch(blocks_backward_kernel, B * H * n, q,
           *rows_of(q, k, v, dy, dk, dv, part.flatten(2, 3)), pairs, ends, lse, delta,
           H, T, end - T, n, end, log2_scale(Dh), 1 / math.sqrt(Dh),
           K=topk, N=block, RULE=sizes, REST=int(rest), **tiles_for("blocks", q, block))
    return [torch.sum(part, 3, out=dq), dk, dv]


run_topk = differentiable(topk_forward, topk_backward, lambda x, y: (*x[:3], *y))


def attention_topk(q, k_rec, v_rec, rule, summaries):
    """Equation (3) with top-k blocks, model.attend. q: (B, h, T, Dh), the last T of n positions."""
    B, H, T, Dh = q.shape
    n = k_rec.shape[2]
    block = min(rule.block, n)
    topk = min(rule.topk, triton.cdiv(n, block))
    sizes = [*rule.sizes, block, topk]
    query_bytes = max(1, B * H * topk * Dh * q.element_size())         # 1: a batch of no sequences
    queries = max(LEAST_QUERIES, PARTS_BYTES // query_bytes // 64 * 64)
    y = []
    for begin in range(0, T, queries):
        stop = min(begin + queries, T)
        end = n - T + stop
        keys = k_rec[:, :, :end], v_rec[:, :, :end]
        y.append(run_topk(q[:, :, begin:stop], *keys, summaries, sizes)[0])
    return torch.cat(y, dim=2) if len(y) > 1 else y[0]


# ---- The output head and its loss ----------------------------------------------------------------
#
# What is slow: PyTorch holds the logits of all N = B T tokens, N V numbers, several times over.
# Here tokens go by in chunks. A chunk's logits z become their own gradient in place, and the
# gradients of x and of the weight W follow from it at once, so backward only scales them:
#
#   z_n = W x_n      loss_n = logsumexp(z_n) - z_n[y_n]      dz_n = softmax(z_n) - onehot(y_n)
#                    dx_n = W^T dz_n                         dW = sum_n dz_n x_n^T
#
# The kernel. A program takes a row z (V,): once for the sum, each of its BV lanes with a running
# maximum of its own, and once for dz. Grid: rows. Bytes per logit in bf16: reads 2, writes 2; the
# second reading finds the row in the L2 cache, if few rows are under way at once. So a program
# takes 32 warps, two programs a processor, and hints of eviction keep what is read again.

@jit
def cross_entropy_kernel(z, y, loss, V, BV: constexpr, GRAD: constexpr):
    """z (N, V), replaced by dz if GRAD; y (N,) int64; loss (N,) float32. A row whose target is -100
    counts nothing. Any other target outside [0, V) makes the loss and dz NaN.
    """
    row = tl.program_id(0).to(int64)
    v = tl.arange(0, BV)
    z += row * V
    label = tl.load(y + row)
    counted = label != -100
    right = (label >= 0) & (label < V)
    factor = tl.where(right, 1.0, float("nan"))
    z_y = load_float(z + label, right)
    m = tl.full((BV,), LOWEST, float32)
    l = tl.zeros((BV,), float32)
    for v0 in range(0, V, BV):
        live = v0 + v < V
        s = tl.load(z + v0 + v, mask=live, other=-INF, eviction_policy="evict_last")
        s = s.to(float32)
        e = tl.exp2(-tl.abs(s - m) * LOG2E)            # the factor of the smaller of the two
        l = tl.where(s > m, l * e + 1, l + e)
        m = tl.maximum(m, s)
    top = tl.max(m, 0)                                 # waits for all threads: z_y has been read
    total = tl.log2(tl.sum(l * tl.exp2((m - top) * LOG2E), 0))
    tl.store(loss + row, tl.where(counted, (top - z_y + total / LOG2E) * factor, 0))
    if GRAD:
        for v0 in range(0, V, BV):
            live = v0 + v < V
            s = tl.load(z + v0 + v, mask=live, other=0, eviction_policy="evict_first")
            dz = tl.exp2((s - top) * LOG2E - total)
            dz = tl.where(counted, (dz - tl.where(v0 + v == label, 1.0, 0.0)) * factor, 0)
            tl.store(z + v0 + v, dz, mask=live, eviction_policy="evict_first")


def cross_entropy_(z, y, grad):
    """Losses (N,) of logits z (N, V) under targets y (N,). With `grad`, z becomes its gradient."""
    loss = z.new_empty(len(z), dtype=torch.float32)
    BV = min(4096, max(128, triton.next_power_of_2(z.shape[1])))
    launch(cross_entropy_kernel, len(z), z, z, y.contiguous(), loss, z.shape[1],
           BV=BV, GRAD=grad, num_warps=BV // 128)
    return loss


class HeadLoss(torch.autograd.Function):
    """The summed loss of x (N, C), weight (V, C), targets y (N,), in chunks; dtype: of products."""
    @staticmethod
    def forward(ctx, x, weight, y, dtype, grad, chunk=8192):
        w = weight.to(dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if grad else None
        dx = []
        total = x.new_zeros((), dtype=torch.float32)
        for x_chunk, y_chunk in zip(x.to(dtype).split(chunk), y.split(chunk)):
            z = x_chunk @ w.T                                                           # (chunk, V)
            total = total + cross_entropy_(z, y_chunk, grad).sum()
            if grad:                                   # z is dz now
                dx.append(z @ w)
                dw += z.T @ x_chunk
        if grad:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():                    # create_graph=True
            raise RuntimeError("the loss kernel has no second derivative; plain PyTorch has")
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype), None, None, None, None


def head_loss(x, weight, y, dtype):
    """Output head and cross-entropy, summed over the targets that are not -100: float32."""
    return HeadLoss.apply(x, weight, y, dtype, torch.is_grad_enabled())
