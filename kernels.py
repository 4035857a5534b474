"""
RAT+'s operations at the speed of a GPU, as Triton kernels. model.py defines what each of them
computes, checks the arguments, and calls them.

  recurrence   h_t = a_t * h_{t-1} + (1 - a_t) * x_t     a_t = sigmoid(g_t), x in {k, v}     (2)
  rotate       RoPE
  attention    y_t = sum over allowed p of softmax_p(q_t . k_p / sqrt(Dh)) v_p              (3)
               allowed: p <= t, and p is on the dilated grid, in the window, or a sink       (4)
  decode       (2) to (4), and sigmoid(o) * y of (5), for one token of each sequence and a cache
  top-k        attention over the K best blocks of each query, and its decoding

A kernel runs as many programs at once. A program is a group of GPU threads that owns one part of
the output. Programs start in the order of their number: GPUs do so, CUDA does not promise it.

  in kernels       meaning
  B H T C          batch, heads, time, channels
  DH, BD           head width, and that rounded up to a power of 2
  b, h, bh         a sequence, a head, and both as one number bh = b * H + h
  t, p             position of a query, position of a key
  t0, p0, i0 ...   the first t, p, i of a tile
  RULE             a pattern's sizes: Sizes, or model.Rule, which has those of top-k blocks too
  BT BC BM BN      sides of a program's tile: time, channels, queries, keys (or rows, or blocks)
  BS BK BR BV      the same of scores or shares, choices, rows of a block, vocabulary
  RUN, COPIES      see the recurrence

A comment after a line often gives the shape of a tile. With TRITON_INTERPRET=1 Triton's interpreter
runs the kernels on a CPU, for tests. `python tests/bench_kernels.py` times them.
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
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

jit = triton.jit
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = False                                         # whether model.py sends CPU tensors here too
DTYPES = torch.float32, torch.float16, torch.bfloat16


def interpret():
    """From now on model.py sends CPU tensors to the kernels too, for Triton's interpreter."""
    global ON_CPU
    ON_CPU = True


def take(x):
    """Do the kernels take this tensor from model.py?"""
    return (x.is_cuda or ON_CPU) and x.dtype in DTYPES


def launch(kernel, programs, x, *arguments, **constants):
    """Start a kernel on the device of the tensor x."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants)


# The differentiable operations are operators of PyTorch, so that torch.compile takes them as they
# are. An operator makes its outputs and launches kernels to fill them, unless the tensors are fake:
# then PyTorch asks for shapes only.

def operator(f):
    """f, which takes and returns tensors, as the operator rat::<its name without _forward>."""
    name = f"rat::{f.__name__.removesuffix('_forward')}"
    registered = torch.library.custom_op(name, f, mutates_args=())
    registered.register_fake(f)
    return registered


def idle(x):
    """Is there nothing to launch: no data, or no elements?"""
    return isinstance(x, FakeTensor) or x.numel() == 0


def unrecorded(*tensors):
    """Does nobody record this call, for gradients or as a trace? Then a function may be called
    without its operator, which is faster.
    """
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    return not wants_gradients and not traced


class Rows(NamedTuple):
    """A tensor (B, H, T, Dh) as kernels take it: pointer, strides along B, H and T, T, and as
    constants Dh and Dh rounded up to a power of 2. Channels are neighbours.
    """
    ptr: Tensor
    b: int
    h: int
    t: int
    n: int
    DH: constexpr
    BD: constexpr


def padded(Dh):
    """A head's width as a side of tiles: a power of 2. Triton's own takes 10 us a call."""
    return max(16, 1 << (Dh - 1).bit_length())


def rows_of(*tensors):
    """Rows of each tensor."""
    found = []
    for x in tensors:
        DH = constexpr(x.shape[3])
        BD = constexpr(padded(x.shape[3]))
        found.append(Rows(x, *x.stride()[:3], x.shape[2], DH, BD))
    return found


def packed(*tensors):
    """The tensors, each with channels side by side: copied if need be."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def aligned(x):
    """x as descriptors want it: channels side by side, and rows at multiples of 16 bytes, none of
    them shared. Copied if need be.
    """
    unit = 16 // x.element_size()
    strides = [stride for stride, n in zip(x.stride()[:3], x.shape) if n > 1]
    ready = all(stride and stride % unit == 0 for stride in strides)
    if ready and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    Dh = x.shape[-1]
    copy = x.new_empty(*x.shape[:3], triton.cdiv(Dh, unit) * unit)[..., :Dh]
    return copy.copy_(x)


def since_hopper(x):
    """Does x lie on a Hopper GPU or a later one?"""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def has_tma(x):
    """Can tiles of x come by TMA, the Tensor Memory Accelerator of Hopper GPUs and later ones? In
    Triton's interpreter they can too.
    """
    return since_hopper(x) or not x.is_cuda


def tiles_of(x, BN):
    """Aligned x (B, H, T, Dh), to load BN rows of a head at a time: a descriptor, by which TMA
    fetches a tile in one instruction, without an address for each element; or Rows. Either way rows
    beyond T and channels beyond Dh are read as zeros.
    """
    if not has_tma(x):
        return rows_of(x)[0]
    unit = 16 // x.element_size()
    strides = [stride if size > 1 else unit for stride, size in zip(x.stride(), x.shape)]
    tile = [1, 1, BN, padded(x.shape[3])]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], tile)


def new_heads(x):
    """An empty tensor of x's shape (B, H, T, Dh), laid out so that .transpose(1, 2) is contiguous.
    """
    B, H, T, Dh = x.shape
    return x.new_empty(B, T, H, Dh).transpose(1, 2)


@jit
def load_float(x, mask, other):
    return tl.load(x, mask=mask, other=other).to(tl.float32)


@jit
def head(x, b, h):
    """Where head h of sequence b begins in Rows x."""
    return x.ptr + b * x.b + h * x.h


@jit
def rows_at(x, b, h, row, live):
    """Pointers (len(row), BD) to rows of head h of sequence b, and which of them there are."""
    d = tl.arange(0, x.BD)
    mask = live[:, None] if x.DH == x.BD else live[:, None] & (d < x.DH)[None, :]
    return head(x, b, h) + row.to(tl.int64)[:, None] * x.t + d[None, :], mask


@jit
def load_rows(x, b, h, row, live):
    """Rows of x in head h of sequence b: (len(row), BD); 0 where not live, and beyond DH."""
    at, mask = rows_at(x, b, h, row, live)
    return tl.load(at, mask=mask, other=0)


@jit
def load_tile(x, b, h, row, TMA: constexpr, BN: constexpr):
    """Rows row .. row + BN - 1 of head h of sequence b: (BN, BD). x: what tiles_of gives."""
    if TMA:
        tile = x.load([b.to(tl.int32), h.to(tl.int32), row, 0])
        tile = tile.reshape(BN, tile.shape[3])
    else:
        i = row + tl.arange(0, BN)
        tile = load_rows(x, b, h, i, i < x.n)
    return tile


@jit
def store_rows(x, b, h, row, values, live):
    at, mask = rows_at(x, b, h, row, live)
    tl.store(at, values.to(x.ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------
# Recurrence, equation (2)
#
# What is slow: the definition takes T steps one after another, and each waits for the step before.
# The idea: two steps h -> a h + u give one step of the same form. So a sequence is cut into tiles
# that are scanned side by side from zero, and only then does each tile learn what enters it:
#
#   h_t = P_t * h_in + H_t     P_t: product of the tile's decays up to t, H_t: its scan from zero
#
# h_in, the h just before the tile, comes from the program before. So the tiles of a sequence form a
# chain that carries 2 BC numbers at a time; the rest is done before they arrive. A number travels
# as one 64-bit word, its float32 bits above a flag. The reader spins until all flags are set. No
# fence is needed, since a word arrives whole. The chain can't lock up: a program waits only for one
# of a smaller number, which has started before it.
#
# A program owns BT steps x BC channels of one sequence, as a tile (N, RUN, BC) with t = n * RUN +
# r. The RUN steps of a run lie in the registers of one thread or of a few neighbours, and are
# scanned there. Only the runs' ends, a RUN-th of the data, go through shared memory.
#
# Grid: chunks x B x C / BC, chunks slowest. Bytes per element in bf16: reads k, v, g, writes k_rec,
# v_rec: 10. Two passes without a chain would be 16. Limits: registers (a tile holds P, H and the
# inputs in float32); for one long sequence the chain's latency.

LOG2E = constexpr(math.log2(math.e))


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
def read_words(word, mask, COPIES: constexpr):
    """The words (BC,), 0 if not yet sent.

    Several threads hold the same element of a (BC,) tile. They load it separately, so they may see
    different values. A (COPIES, BC) tile has one element a thread, and OR makes all of them agree.
    """
    word = word[None, :] + tl.zeros((COPIES, 1), tl.int32)
    return tl.reduce(tl.load(word, mask=mask[None, :], other=1, volatile=True), 0, either)


@jit
def number_of(word):
    return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def word_of(number):
    return (number.to(tl.int32, bitcast=True).to(tl.int64) << 32) | 1


@jit
def chain(a, u_k, u_v, first, words, chunk, chunks, b, c, B, C, COPIES: constexpr):
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
        in_k = tl.load(first + b * C + c, mask=mask, other=0)
        in_v = tl.load(first + (B + b) * C + c, mask=mask, other=0)
    else:
        k = read_words(word - 2 * C, mask, COPIES)
        v = read_words(word - C, mask, COPIES)
        while tl.min(k & v & 1) == 0:
            k = read_words(word - 2 * C, mask, COPIES)
            v = read_words(word - C, mask, COPIES)
        in_k = number_of(k)
        in_v = number_of(v)
    end_k += p_end * in_k
    end_v += p_end * in_v
    tl.store(word, word_of(end_k), mask=mask)
    tl.store(word + C, word_of(end_v), mask=mask)
    k_in += p_in * in_k[None, :]  # enters each run
    v_in += p_in * in_v[None, :]
    return h_k + p * k_in[:, None, :], h_v + p * v_in[:, None, :], end_k, end_v


@jit
def place(B, C, RUN: constexpr, BT: constexpr, BC: constexpr):
    """(chunk, sequence, channels (BC,), steps within the chunk (N, RUN, 1)) of this program."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(C, BC)
    c = (program % tiles * BC).to(tl.int32) + tl.arange(0, BC)
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
    a, rest = decay(load_float(g + at, live, float("inf")))  # past the end a = 1: h stays as it is
    u_k = rest * load_float(k + at, live, 0)
    u_v = rest * load_float(v + at, live, 0)
    h_k, h_v, end_k, end_v = chain(a, u_k, u_v, state, words, chunk, chunks, b, c, B, C, COPIES)
    if chunk == chunks - 1:
        tl.store(end + b * C + c, end_k, mask=c < C)
        tl.store(end + (B + b) * C + c, end_v, mask=c < C)
    out = (b * T + chunk * BT) * C + i * C + c[None, None, :]
    tl.store(k_rec + out, h_k.to(k_rec.dtype.element_ty), mask=live)
    tl.store(v_rec + out, h_v.to(v_rec.dtype.element_ty), mask=live)


# The backward pass. d_t = dL/dh_t counts every later step's use of h_t. It is the same chain, run
# from the end:
#
#   d_t  = dy_t + a_{t+1} * d_{t+1}
#   dx_t = (1 - a_t) * d_t
#   dg_t = a_t * (1 - a_t) * sum over k, v of d_t * (h_{t-1} - x_t)
#   dh_{-1} = a_0 * d_0
#
# a_{t+1} is loaded beside a_t; its line is in the L1 cache already. Step i of a chunk is the i-th
# from the end.
#
# Bytes per element in bf16: reads k, v, g, k_rec, v_rec, dk_rec, dv_rec, writes dk, dv, dg: 20.
# Computing h again in each tile would take 16, but a second scan, in the other direction, doubles
# the registers: three times slower when tried.

@jit
def recurrence_backward_kernel(
        k, v, g, stride_b, stride_t, state, k_rec, v_rec, dk_rec, dv_rec, dend,
        dk, dv, dg, dstate, words, B, T, C,
        RUN: constexpr, BT: constexpr, BC: constexpr, COPIES: constexpr):
    """Shapes as in the forward kernel; dk, dv, dg, dk_rec, dv_rec (B, T, C) contiguous."""
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, RUN, BT, BC)
    channel = c[None, None, :]
    live = (i < T - chunk * BT) & (channel < C)  # (N, RUN, BC)
    t_last = T - 1 - chunk * BT  # the step where i = 0
    at = b * stride_b + t_last * stride_t - i * stride_t + channel
    out = (b * T + t_last) * C - i * C + channel
    later = live & (i > t_last + 1 - T)                # the last step has none after it
    a_next = decay(load_float(g + at + stride_t, later, float("inf")))[0]
    d_k = load_float(dk_rec + out, live, 0)
    d_v = load_float(dv_rec + out, live, 0)
    d_k, d_v, first_k, first_v = chain(
        a_next, d_k, d_v, dend, words, chunk, chunks, b, c, B, C, COPIES)
    if chunk == chunks - 1:                            # step 0: before it lies the state
        row = b * stride_b + c
        row_k = b * C + c
        row_v = (B + b) * C + c
        mask = c < C
        a_0, rest_0 = decay(load_float(g + row, mask, 0))
        far_k = load_float(state + row_k, mask, 0) - load_float(k + row, mask, 0)
        far_v = load_float(state + row_v, mask, 0) - load_float(v + row, mask, 0)
        d_g0 = a_0 * rest_0 * (first_k * far_k + first_v * far_v)
        tl.store(dstate + row_k, a_0 * first_k, mask=mask)
        tl.store(dstate + row_v, a_0 * first_v, mask=mask)
        tl.store(dg + b * T * C + c, d_g0.to(dg.dtype.element_ty), mask=mask)
    a, rest = decay(load_float(g + at, live, 0))
    d_k *= rest
    d_v *= rest
    tl.store(dk + out, d_k.to(dk.dtype.element_ty), mask=live)
    tl.store(dv + out, d_v.to(dv.dtype.element_ty), mask=live)
    before = live & (i < t_last)                       # all other steps
    d_g = d_k * (load_float(k_rec + out - C, before, 0) - load_float(k + at, before, 0))
    d_g += d_v * (load_float(v_rec + out - C, before, 0) - load_float(v + at, before, 0))
    tl.store(dg + out, (a * d_g).to(dg.dtype.element_ty), mask=before)


MANY_CHAINS = dict(RUN=4, BT=64, BC=64, num_warps=4)             # tiles: the fastest on an H100
FEW_CHAINS = dict(RUN=8, BT=128, BC=32, num_warps=2)
MANY_CHAINS_BACK = dict(RUN=4, BT=64, BC=64, num_warps=4, maxnreg=168)
FEW_CHAINS_BACK = dict(RUN=4, BT=128, BC=32, num_warps=4, maxnreg=168)
SMALL_TILES = dict(RUN=4, BT=16, BC=16, num_warps=1)             # for the interpreter


def launch_recurrence(kernel, many, few, k, *arguments):
    """Run a kernel of the recurrence, with the words of its chain, on tiles that suit the number of
    chains.
    """
    B, T, C = k.shape
    tiles = SMALL_TILES if INTERPRETER else few if B * C < 4096 else many
    chunks = triton.cdiv(T, tiles["BT"])
    copies = max(1, 32 * tiles["num_warps"] // tiles["BC"])
    words = torch.zeros(B, chunks, 2, C, dtype=torch.int64, device=k.device)
    programs = chunks * B * triton.cdiv(C, tiles["BC"])
    launch(kernel, programs, k, k, *arguments, words, B, T, C, COPIES=copies, **tiles)


def same_strides(*tensors):
    """The tensors, with channels next to each other in memory and all of the same strides: copied
    only if they are not.
    """
    first = tensors[0].stride()
    same = first[-1] == 1 and all(x.stride() == first for x in tensors)
    return tensors if same else tuple(x.contiguous() for x in tensors)


def recurrence_forward(
        k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k_rec, v_rec (B, T, C) and the state at the end (2, B, C) float32."""
    outputs = tuple(x.new_empty(x.shape) for x in (k, v, state))
    if not idle(k):
        k, v, g = same_strides(k, v, g)
        launch_recurrence(recurrence_forward_kernel, MANY_CHAINS, FEW_CHAINS, k, v, g,
                          *k.stride()[:2], state.contiguous(), *outputs)
    return outputs


@operator
def recurrence_backward(inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients of k, v, g (B, T, C) and of the state (2, B, C). inputs: these four and k_rec,
    v_rec; grads: of k_rec, v_rec and the state at the end.
    """
    outputs = [x.new_empty(x.shape) for x in inputs[:4]]
    if not idle(inputs[0]):
        k, v, g = same_strides(*inputs[:3])
        others = [x.contiguous() for x in (*inputs[3:], *grads)]
        launch_recurrence(recurrence_backward_kernel, MANY_CHAINS_BACK, FEW_CHAINS_BACK, k, v, g,
                          *k.stride()[:2], *others, *outputs)
    return outputs


def keep_recurrence(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[:2])


def recurrence_gradient(ctx, *grads):
    return tuple(recurrence_backward(list(ctx.saved_tensors), list(grads)))


recurrence_operator = operator(recurrence_forward)
recurrence_operator.register_autograd(recurrence_gradient, setup_context=keep_recurrence)


def recurrence(k, v, g, state=None):
    """Equation (2) by the kernel: model.recurrence. k, v, g: (B, T, C), any strides; state: (2, B,
    C) float32.
    """
    if state is None:
        state = k.new_zeros(2, len(k), k.shape[2], dtype=torch.float32)
    run = recurrence_forward if unrecorded(k, v, g, state) else recurrence_operator
    return run(k, v, g, state)


# ---------------------------------------------------------------------------------------------
# RoPE, on queries and on recurrent keys
#
#   y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2: the halves of a head's channels
#
# What is slow: PyTorch moves about 30 bytes an element through float32 intermediates. Here it is 4
# in bf16: read 2, write 2. (Under torch.compile the plain formula cost 5 % of a training step.) A
# program owns BT positions of one head, both halves. Grid: B x H x T / BT, heads fastest, as they
# are neighbours in memory. The backward pass turns the other way, by -sin.

@jit
def rotate_kernel(x, y, cos, sin, H, T, HALF: constexpr, BD: constexpr, BT: constexpr):
    """x, y: Rows of (B, H, T, Dh); cos, sin (T, HALF) float32, contiguous. BD: HALF up to a power
    of 2.
    """
    bh = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = (t < T)[:, None] & (d < HALF)[None, :]                                       # (BT, BD)
    turn = t[:, None] * HALF + d[None, :]
    c = tl.load(cos + turn, mask=live, other=0)
    s = tl.load(sin + turn, mask=live, other=0)
    t = t.to(tl.int64)[:, None]
    source = head(x, bh // H, bh % H) + t * x.t + d[None, :]
    target = head(y, bh // H, bh % H) + t * y.t + d[None, :]
    x1 = load_float(source, live, 0)
    x2 = load_float(source + HALF, live, 0)
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    tl.store(target, y1.to(y.ptr.dtype.element_ty), mask=live)
    tl.store(target + HALF, y2.to(y.ptr.dtype.element_ty), mask=live)


def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, Dh) after RoPE."""
    y = new_heads(x)
    if not idle(x):
        B, H, T, Dh = x.shape
        BD = triton.next_power_of_2(Dh // 2)
        BT = max(1, 4096 // BD)
        launch(rotate_kernel, (B * H, triton.cdiv(T, BT)), x, *rows_of(*packed(x), y),
               cos.contiguous(), sin.contiguous(), H, T, Dh // 2, BD, BT)
    return y


def keep_rotation(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def rotate_gradient(ctx, dy):
    cos, sin = ctx.saved_tensors                       # read once: checkpointing allows no more
    return rotate_operator(dy, cos, -sin), None, None


rotate_operator = operator(rotate_forward)
rotate_operator.register_autograd(rotate_gradient, setup_context=keep_rotation)


def rotate(x, cos, sin):
    """RoPE of x (B, H, T, Dh) by the kernel: model.rotate."""
    return (rotate_forward if unrecorded(x) else rotate_operator)(x, cos, sin)


# ---------------------------------------------------------------------------------------------
# Who sees whom, equation (4). Positions are int32 here.

FAR = constexpr(2**30)  # a position that no query reaches; so T < 2^30
LOWEST = constexpr(-3e38)                           # below all scores, but finite


class Sizes(NamedTuple):
    """Rule.sizes as the constant RULE of a kernel. An operator of PyTorch takes lists of ints only.
    """
    dilation: int
    window: int
    sinks: int

    @property
    def ring(self):
        """How many positions before its own can be near to a query, as in model.Rule."""
        return self.window


@jit
def near_from(t, RULE: constexpr):
    """The first position that is near to a query at t, as in model.Rule; the last one is t."""
    return t - RULE.window


@jit
def near_until(p, RULE: constexpr):
    """The last query that the key at p is near to."""
    return p + RULE.window


@jit
def is_lasting(p, RULE: constexpr):
    """Is p a sink or on the grid? Once such a key is in the past, every later query sees it."""
    yes = p < RULE.sinks
    if RULE.dilation > 0:
        yes = yes | ((p + 1) % RULE.dilation == 0)
    return yes


@jit
def sees_near(t, p, ITSELF: constexpr, RULE: constexpr):
    """Is near_from(t) <= p < t? With ITSELF 1: <= t? In one comparison of int32: as an unsigned
    number, a negative one is huge.
    """
    count = (t - near_from(t, RULE) + ITSELF).to(tl.uint32, bitcast=True)
    return (t - p - 1 + ITSELF).to(tl.uint32, bitcast=True) < count


@jit
def count_lasting(t, RULE: constexpr):
    """How many lasting keys lie before position t."""
    n = tl.minimum(t, RULE.sinks)
    if RULE.dilation > 0:
        n += tl.maximum(t // RULE.dilation - RULE.sinks // RULE.dilation, 0)
    return n


@jit
def lasting(j, n, RULE: constexpr):
    """The position of the j-th of n lasting keys: first the sinks, then the grid behind them. FAR
    from the n-th on.
    """
    p = j
    if RULE.dilation > 0:
        behind = j - RULE.sinks + RULE.sinks // RULE.dilation
        p = tl.where(j < RULE.sinks, j, (behind + 1) * RULE.dilation - 1)
    return tl.where(j < n, p, FAR)


# ---------------------------------------------------------------------------------------------
# Sparse attention, equations (3) and (4)
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
# of rows. The backward pass takes the grid and the sinks as one list of *lasting* keys, j -> p.
#
# Scores are in units of log2: scale = log2(e) / sqrt(Dh), so that exp2, which the hardware has,
# replaces exp. lse = m + log2(l) is kept for the backward pass. Grid: query tiles x B x H, the
# tiles of a head together (they share its keys in the L2 cache), those with most keys first.
# Bytes: q, y, and the own k and v, 8 Dh per query and head in bf16; the other keys are found in the
# L2 cache. FLOPs: 4 Dh x (t / D + S + W) per query. Limits: T < 2^30, and 1024 bytes a head.

@jit
def dot_rows(x, y):
    """The products (M, N) of rows x (M, BD) and rows y (N, BD)."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@jit
def add_keys(q, k, v, sees, scale, acc, l, m):
    """One step of the online softmax: BN more keys. q (BM, BD); k, v (BN, BD); sees (BM, BN); acc
    (BM, BD); l, m (BM,).
    """
    s = tl.where(sees, dot_rows(q, k), -float("inf"))
    return add_scores(s, v, scale, acc, l, m)


@jit
def add_scores(s, v, scale, acc, l, m):
    """The same from their scores s (BM, BN)."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    prob = tl.exp2(s * scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, l * shrink + tl.sum(prob, 1), m_new


@jit
def query_tile(H, T, BM: constexpr):
    """(bh, b, h, i0) of this program, whose tile of queries begins at row i0. The last tiles of a
    head come first.
    """
    tiles = tl.cdiv(T, BM)
    bh = tl.program_id(0).to(tl.int64) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    return bh, bh // H, bh % H, tile * BM


NEAR = constexpr(0)                                  # the kinds of keys
GRID = constexpr(1)
SINKS = constexpr(2)


@jit
def rows_seen(begin, end, origin, KIND: constexpr, RULE: constexpr, BN: constexpr):
    """Which rows of a kind the queries at begin .. end - 1 see: (first, inner, whole, stop).

    They lie in [first, stop). `whole` of them, from `inner` on, are seen by all queries: they need
    no mask. That is a multiple of BN.
    """
    far_from_all = tl.maximum(near_from(begin, RULE), 0)               # keys before this position
    far_from_last = tl.maximum(near_from(end - 1, RULE), 0)
    if KIND == NEAR:
        first = far_from_all
        unseen = far_from_last - first                                 # by the last query
        inner = tl.minimum(first + tl.cdiv(unseen, BN) * BN, begin)
        whole = (begin - inner) // BN * BN
        found = first - origin, inner - origin, whole, end - origin
    elif KIND == GRID:
        whole = far_from_all // RULE.dilation // BN * BN
        found = 0, 0, whole, far_from_last // RULE.dilation
    else:
        found = 0, 0, 0, tl.minimum(far_from_last, RULE.sinks)
    return found


@jit
def sees_rows(t, row, origin, KIND: constexpr, RULE: constexpr):
    """Which of these rows of a kind the queries at t see: (len(t), len(row))."""
    if KIND == NEAR:
        sees = sees_near(t[:, None], (origin + row)[None, :], 1, RULE)
    elif KIND == GRID:
        sees = ((row + 1) * RULE.dilation - 1)[None, :] < near_from(t, RULE)[:, None]
    else:
        sees = (row < RULE.sinks)[None, :] & (row[None, :] < near_from(t, RULE)[:, None])
        if RULE.dilation > 0:
            sees = sees & ((row + 1) % RULE.dilation != 0)[None, :]    # those are on the grid
    return sees


@jit
def attend(q, k, v, b, h, t, begin, end, origin, scale, acc, l, m, KIND: constexpr,
           RULE: constexpr, TMA: constexpr, BN: constexpr, STAGES: constexpr):
    """acc, l, m of the softmax after all keys of a kind. k, v: its rows, as tiles_of gives them."""
    first, inner, whole, stop = rows_seen(begin, end, origin, KIND, RULE, BN)
    for row in tl.range(inner, inner + whole, BN, num_stages=STAGES):
        k_tile = load_tile(k, b, h, row, TMA, BN)
        v_tile = load_tile(v, b, h, row, TMA, BN)
        acc, l, m = add_scores(dot_rows(q, k_tile), v_tile, scale, acc, l, m)
    for i in tl.range(first, stop - whole, BN, num_stages=STAGES):     # the others, with a mask
        row = tl.where(i < inner, i, i + whole)
        k_tile = load_tile(k, b, h, row, TMA, BN)
        v_tile = load_tile(v, b, h, row, TMA, BN)
        sees = sees_rows(t, row + tl.arange(0, BN), origin, KIND, RULE)
        acc, l, m = add_keys(q, k_tile, v_tile, sees, scale, acc, l, m)
    return acc, l, m


@jit
def attention_forward_kernel(
        q, k, v, y, near_k, near_v, grid_k, grid_v, sinks_k, sinks_v, lse, lse_stride,
        H, T, start, origin, scale,
        TMA: constexpr, RULE: constexpr, RING: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """q, y: Rows of (B, H, T, Dh); k, v: Rows of (B, H, >= T, Dh); lse (B, H, T) float32, with this
    stride from query to query. The first query is at position `start`, row r of k and v at position
    origin + r.

    near, grid, sinks: the rows of each kind, as tiles_of gives them. Row r of near is row r of k,
    row j of grid is the j-th position of the grid, row p of sinks is position p.
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    t = start + i
    begin = start + i0
    end = start + tl.minimum(i0 + BM, T)
    q_tile = load_rows(q, b, h, i, live)                                        # (BM, BD)
    if RING > 0:
        m = tl.full((BM,), LOWEST, tl.float32)         # with -inf, a masked tile would give NaN
        l = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, q.BD), tl.float32)
    else:
        own_k = load_rows(k, b, h, t - origin, live)
        m = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        l = tl.full((BM,), 1, tl.float32)
        acc = load_rows(v, b, h, t - origin, live).to(tl.float32)
    if RULE.sinks > 0:
        acc, l, m = attend(q_tile, sinks_k, sinks_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           SINKS, RULE, TMA, BN, STAGES)
    if RULE.dilation > 0:
        acc, l, m = attend(q_tile, grid_k, grid_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           GRID, RULE, TMA, BN, STAGES)
    if RING > 0:
        acc, l, m = attend(q_tile, near_k, near_v, b, h, t, begin, end, origin, scale, acc, l, m,
                           NEAR, RULE, TMA, BN, STAGES)
    store_rows(y, b, h, i, acc / l[:, None], live)
    tl.store(lse + (bh * T + i) * lse_stride, m + tl.log2(l), mask=live)


# The backward pass. With P the softmax (from lse), dO the gradient of y, and delta_t = dO_t . y_t:
#
#   dS = P * (dO V^T - delta)     dQ = dS K / sqrt(Dh)     dK = dS^T Q / sqrt(Dh)     dV = P^T dO
#
# dQ goes by queries, like the forward pass, and computes delta on the way. dK and dV go by keys:
# the lasting ones and, if there is a window, all others. Without a window only its own query sees
# such a key; then the dQ kernel writes its dK and dV. So each row is written exactly once.
#
# Lasting keys are few, and all later queries see them: with D 64 and T 4096 there is one tile of
# keys a head, far too few programs. So the queries of a tile are split over several programs. Their
# float32 sums go through memory and are added in a fixed order: gradients repeat to the bit.
#
# Bytes, bf16, per query and head: dQ reads q, k, v, y, dO and writes dq, without a window dk, dv
# too: 12 or 16 Dh. dK, dV read q, dO once per key tile, mostly from the L2 cache. FLOPs: 6 and 8 Dh
# per pair, where the forward pass has 4.

@jit
def add_dq(q, k, v, dy, sees, lse, delta, scale, dq):
    """dq (BM, BD) of BN more keys, without the factor 1 / sqrt(Dh)."""
    s = tl.where(sees, dot_rows(q, k), -float("inf"))
    prob = tl.exp2(s * scale - lse[:, None])                                            # (BM, BN)
    ds = prob * (dot_rows(dy, v) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@jit
def attention_backward_q_kernel(
        q, k, v, y, dy, dq, dk, dv, lse, delta,
        H, T, start, scale, factor,
        RULE: constexpr, RING: constexpr, BM: constexpr, BN: constexpr, STAGES: constexpr):
    """As the forward kernel with origin 0, but the own key is apart, window or not. dk, dv: Rows of
    (B, H, start + T, Dh); delta (B, H, T) float32; factor: 1 / sqrt(Dh).
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    t = start + i
    live = i < T
    end = start + tl.minimum(i0 + BM, T)
    lse_t = tl.load(lse + bh * T + i, mask=live, other=float("inf"))
    dy_tile = load_rows(dy, b, h, i, live)                                      # (BM, BD)
    y_tile = load_rows(y, b, h, i, live)
    delta_t = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + i, delta_t, mask=live)
    q_tile = load_rows(q, b, h, i, live)
    own_k = load_rows(k, b, h, t, live).to(tl.float32)
    own_v = load_rows(v, b, h, t, live).to(tl.float32)
    own_prob = tl.exp2(tl.sum(q_tile.to(tl.float32) * own_k, 1) * scale - lse_t)
    own_ds = own_prob * (tl.sum(dy_tile.to(tl.float32) * own_v, 1) - delta_t)
    if RING == 0:
        mine = live & (is_lasting(t, RULE) == 0)
        store_rows(dk, b, h, t, (own_ds * factor)[:, None] * q_tile.to(tl.float32), mine)
        store_rows(dv, b, h, t, own_prob[:, None] * dy_tile.to(tl.float32), mine)
    acc = own_ds[:, None] * own_k
    n = count_lasting(tl.maximum(near_from(end - 1, RULE), 0), RULE)
    for j0 in tl.range(0, n, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        p = lasting(j, n, RULE)
        k_tile = load_rows(k, b, h, p, j < n)
        v_tile = load_rows(v, b, h, p, j < n)
        sees = p[None, :] < near_from(t, RULE)[:, None]
        acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    if RING > 0:
        near = tl.maximum(near_from(start + i0, RULE), 0)
        for p0 in tl.range(near, end, BN, num_stages=STAGES):
            p = p0 + tl.arange(0, BN)
            k_tile = load_rows(k, b, h, p, p < end)
            v_tile = load_rows(v, b, h, p, p < end)
            sees = sees_near(t[:, None], p[None, :], 0, RULE)
            acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    store_rows(dq, b, h, i, acc * factor, live)


@jit
def load_sums(lse, delta, i, live):
    """lse and delta of queries i; an lse of inf makes the weights of the others 0."""
    lse = tl.load(lse + i, mask=live, other=float("inf"))
    return lse, tl.load(delta + i, mask=live, other=0)


@jit
def add_dkv(k, v, q, dy, sees, lse, delta, scale, dk, dv):
    """ds (BN, BM), and dk, dv (BN, BD) of BM more queries, without the factor 1 / sqrt(Dh)."""
    s = tl.where(sees, dot_rows(k, q), -float("inf"))
    prob = tl.exp2(s * scale - lse[None, :])                                            # (BN, BM)
    dv = tl.dot(prob.to(dy.dtype), dy, dv, input_precision="ieee")
    ds = prob * (dot_rows(v, dy) - delta[None, :])
    ds = ds.to(q.dtype)
    return ds, tl.dot(ds, q, dk, input_precision="ieee"), dv


@jit
def attention_backward_kv_kernel(
        q, k, v, dy, dk, dv, lse, delta,
        H, T, start, scale, factor, n, tiles, splits,
        LASTING: constexpr, SPLIT: constexpr, RULE: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """dk and dv of a tile of the n lasting keys (LASTING), or of the others among n positions, from
    one of `splits` shares of the queries that see it. SPLIT: dk, dv are Rows of (1, splits * B * H,
    n, Dh) float32, for these shares.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
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
        end = tl.minimum(near_until(tile * BN + BN - 1, RULE) + 1, end)
    first = tl.maximum(tl.min(p), start)
    k_tile = load_rows(k, b, h, p, live)                                        # (BN, BD)
    v_tile = load_rows(v, b, h, p, live)
    acc_k = tl.zeros((BN, q.BD), tl.float32)
    acc_v = tl.zeros((BN, q.BD), tl.float32)
    query_tiles = tl.maximum(tl.cdiv(end - first, BM), 0)
    lse += bh * T
    delta += bh * T
    from_tile = (query_tiles * split // splits).to(tl.int32)
    to_tile = (query_tiles * (split + 1) // splits).to(tl.int32)
    for number in tl.range(from_tile, to_tile, num_stages=STAGES):
        t = first + number * BM + tl.arange(0, BM)                                      # (BM,)
        i = t - start
        q_tile = load_rows(q, b, h, i, t < end)
        dy_tile = load_rows(dy, b, h, i, t < end)
        lse_t, delta_t = load_sums(lse, delta, i, t < end)
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


# Tiles by the bytes of a key's row: the fastest on an H100, and within 99 KiB of shared memory.
WIDE = {
    512: dict(BM=32, BN=32, STAGES=1, num_warps=4),
    1024: dict(BM=16, BN=16, STAGES=1, num_warps=4),
}
FORWARD_TILES = {
    128: dict(BM=64, BN=64, STAGES=2, num_warps=4, maxnreg=128),
    256: dict(BM=64, BN=32, STAGES=2, num_warps=4, maxnreg=128),
    **WIDE,
}
Q_TILES = {
    128: dict(BM=64, BN=32, STAGES=2, num_warps=4, maxnreg=128),
    256: dict(BM=64, BN=32, STAGES=3, num_warps=4),
    **WIDE,
}
KV_TILES = {
    128: dict(BM=32, BN=64, STAGES=3, num_warps=4, maxnreg=168),
    256: dict(BM=32, BN=64, STAGES=3, num_warps=4),
    **WIDE,
}
PROCESSORS = 132                                       # of an H100; for how finely to split queries


def head_constants(tiles, q):
    """The constants that kernels of attention share for q (B, H, T, Dh). ValueError for heads that
    are too wide.
    """
    Dh = q.shape[-1]
    row_bytes = max(128, padded(Dh) * q.element_size())
    if row_bytes > 1024:
        raise ValueError(f"attention: a head of {Dh} channels in {q.dtype} is too wide, "
                         "the limit is 1024 bytes")
    return dict(tiles[row_bytes])


def log2_scale(Dh):
    return math.log2(math.e) / math.sqrt(Dh)


def keys_of(k, v, end, rule, BN, cache):
    """near_k, near_v, grid_k, grid_v, sinks_k, sinks_v for the forward kernel; None for a kind that
    the rule has not. k and v end before position `end`. cache: a model.GroupCache that holds the
    grid up to there and the sinks, or None; then they are rows of k and v.
    """
    dilation = max(1, rule.dilation)
    near = k, v
    held = near
    grid = slice(dilation - 1, None, dilation)
    if cache:
        held = aligned(cache.k), aligned(cache.v)
        first = rule.sinks + rule.ring
        grid = slice(first, first + end // dilation)
    kinds = [(near, slice(None), rule.ring), (held, grid, rule.dilation),
             (held, slice(min(rule.sinks, end)), rule.sinks)]
    found = []
    for tensors, rows, size in kinds:
        for x in tensors:
            if not size:
                found.append(None)
                continue
            part = x[:, :, rows]                       # if it is empty it is not read, but a
            found.append(tiles_of(part if part.numel() else k, BN))    # descriptor wants rows
    return found


def attend_forward(q, k, v, y, lse, rule, start=0, cache=None):
    """Fill y (B, H, T, Dh) and lse (B, H, T) for queries from position `start` on; k and v end
    where q does. cache: as in keys_of, for k and v that do not begin at position 0.
    """
    (q,) = packed(q)
    k, v = aligned(k), aligned(v)
    B, H, T, Dh = q.shape
    constants = head_constants(FORWARD_TILES, q)
    end = start + T
    origin = end - k.shape[2]
    keys = keys_of(k, v, end, rule, constants["BN"], cache)
    launch(attention_forward_kernel, triton.cdiv(T, constants["BM"]) * B * H, q,
           *rows_of(q, k, v, y), *keys, lse, lse.stride(2), H, T, start, origin, log2_scale(Dh),
           TMA=has_tma(q), RULE=rule, RING=rule.ring, **constants)


def attend_backward(q, k, v, y, dy, lse, delta, dq, dk, dv, rule):
    """Fill dq, dk, dv, and delta (B, H, T), for the pairs that equation (4) allows. q, y, dy: (B,
    H, T, Dh), the last T of k's positions.
    """
    q, k, v, y, dy = packed(q, k, v, y, dy)
    B, H, T, Dh = q.shape
    end = k.shape[2]
    if T < end:                                        # there may be keys that no query sees
        dk.zero_()
        dv.zero_()
    sizes = H, T, end - T, log2_scale(Dh), 1 / math.sqrt(Dh)
    constants = head_constants(Q_TILES, q)
    launch(attention_backward_q_kernel, triton.cdiv(T, constants["BM"]) * B * H, q,
           *rows_of(q, k, v, y, dy, dq, dk, dv), lse, delta, *sizes, RULE=rule, RING=rule.ring,
           **constants)
    constants = head_constants(KV_TILES, q)

    def by_keys(n, dk, dv, splits=1, **flags):
        """dk and dv of n keys: the lasting ones, or all others."""
        tiles = triton.cdiv(n, constants["BN"])
        launch(attention_backward_kv_kernel, tiles * splits * B * H, q,
               *rows_of(q, k, v, dy, dk, dv), lse, delta, *sizes, n, tiles, splits,
               RULE=rule, **flags, **constants)

    if rule.ring:
        by_keys(end, dk, dv, LASTING=False, SPLIT=False)
    sinks = min(rule.sinks, end)
    skipped = rule.sinks // rule.dilation if rule.dilation else 0      # of the grid, among sinks
    n = sinks + (max(0, end // rule.dilation - skipped) if rule.dilation else 0)
    if n == 0:
        return
    constants["BN"] = min(constants["BN"], max(16, triton.next_power_of_2(n)))
    programs = max(1, triton.cdiv(n, constants["BN"]) * B * H)
    splits = max(1, min(8 * PROCESSORS // programs, T // 512))         # enough to fill the GPU
    if splits == 1:
        by_keys(n, dk, dv, LASTING=True, SPLIT=False)
        return
    part = q.new_empty(2, splits * B * H, n, Dh, dtype=torch.float32)
    by_keys(n, part[:1], part[1:], splits, LASTING=True, SPLIT=True)
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


def keep_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rule = inputs[3]


def attention_gradient(ctx, dy, dlse):
    return *attention_backward(dy, *ctx.saved_tensors, ctx.rule), None


attention_operator = operator(attention_forward)
attention_operator.register_autograd(attention_gradient, setup_context=keep_attention)


def attention(q, k_rec, v_rec, dilation, window, sinks):
    """Equation (3) by the kernel: model.attend. q: (B, H, T, Dh), k_rec, v_rec: (B, H, n, Dh), any
    strides. ValueError for too wide heads.
    """
    run = attention_forward if unrecorded(q, k_rec, v_rec) else attention_operator
    return run(q, k_rec, v_rec, [dilation, window, sinks])[0]


def attention_chunk(q, k_near, v_near, cache, start):
    """Equation (3) for a chunk of T tokens that continues a sequence at position `start`: (B, h, T,
    Dh).

    q: (B, h, T, Dh). k_near, v_near: (B, h, L, Dh), the positions that are near to the first query,
    then the chunk's. cache: model.GroupCache, in which the chunk is stored already. A lasting key
    before the window is read from there, every other from k_near.
    """
    y = new_heads(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not idle(q):
        attend_forward(q, k_near, v_near, y, lse, Sizes(*cache.kept.sizes), start, cache)
    return y


# ---------------------------------------------------------------------------------------------
# Decoding: one token of each sequence, all that lies between in_proj and out_proj
#
# What is slow: a dozen small operations, each a launch, and a mask over rows. Here it is one
# launch per head group. A head has `splits` programs. Each loads the token, which is one head wide,
# and attends over its share of the keys, which is nearly all the bytes. The last of them to get
# there does the rest: it joins the shares, adds the token as one more key, and stores. For B
# sequences of h heads and n keys, in bf16:
#
#   all         read 4 B h n Dh bytes, and 18 B h splits Dh of in_proj's output and the state;
#               write their shares, 4 B h splits (Dh + 2), if a head has several programs
#   the last    read the shares; write 8 B h Dh of state, 2 of y, and 4 of a key and a value in each
#               buffer that the position goes to
#
# H100, 3.0 TB/s, width 2048, one layer: 128 sequences at T 4096 have n = 4096 (D1), 256 (D16), 64
# (D64) or 500 (D16W256S4) keys, hence 1.43, 0.09, 0.02, 0.17 ms; in_proj and out_proj add 0.02 ms.
#
# The number of tokens seen, `seen`, is read on the device. So a CUDA graph recorded once serves
# every position.
#
# A key is used once, by one query: far too little for tensor cores to matter, so the arithmetic is
# float32 on the ordinary cores. What matters is that loads are always under way. So each of the BN
# rows of a tile has its own running softmax (m, l, acc), and the loop's sums need no barrier, as a
# row of up to 256 channels lies in one warp. Rows, then shares, meet once at the end.
#
#   row r, keys r, r + BN, ...:       s = q . k~_p log2(e) / sqrt(Dh)     m' = max(m, s)
#                                     l' = l 2^(m - m') + 2^(s - m')
#                                     acc' = acc 2^(m - m') + 2^(s - m') v~_p
#   meeting:                          M = max m,  y = sum 2^(m - M) acc / sum 2^(m - M) l
#
# Top-k blocks take two launches a head group. The first chooses blocks:
#
#   choose    grid (B h,)           reads the summaries, writes K ints, a score for each block, and
#                                   now and then a summary
#   attend    grid (B h, splits)    as above, over the keys of the chosen blocks, then over those
#                                   that equation (4) allows
#
# With top-k blocks the cache holds every position in its place. A summary is written at the first
# step after its block is full, which is the first that scores it. T 16384, N 64, K 16, bf16: 64 KB
# of summaries and 512 KB of keys and values a head, of 8 MB. choose keeps the scores in memory
# between its two halves, as it is compiled for the longest sequence but scores only the blocks so
# far.
#
# Limits: B h < 2^31, positions < 2^30, 2^16 blocks or so; any even Dh, padded in registers only.

@jit
def partner(d, DH: constexpr):
    """The channel that RoPE turns together with channel d."""
    return tl.where(d < DH // 2, d + DH // 2, d - DH // 2)


@jit
def load_turn(cos, sin, d, DH: constexpr):
    """What RoPE multiplies channel d and its partner by. cos, sin: (Dh / 2,) float32."""
    first_half = d < DH // 2
    i = tl.where(first_half, d, d - DH // 2)
    c = tl.load(cos + i, mask=d < DH, other=0.0)
    s = tl.load(sin + i, mask=d < DH, other=0.0)
    return c, tl.where(first_half, -s, s)


@jit
def recur(x, g, state, d, DH: constexpr):
    """Equation (2) for channels d of one token."""
    a, rest = decay(load_float(g + d, d < DH, 0.0))
    before = load_float(state + d, d < DH, 0.0)
    return a * before + rest * load_float(x + d, d < DH, 0.0)


@jit
def this_token(q, cos, sin, seen, H, first, stride_b, scale, EARLY: constexpr, DH: constexpr,
               BD: constexpr):
    """What every program begins with: bh, b; `channel`, the first one of the head within C; `at`,
    the same in memory, with the sequence's offset; the token's position t; d (BD,); cos_d, sin_d;
    and the query after RoPE, times scale. EARLY: the kernel before this one may still run, so it is
    waited for.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()          # the next kernel may start, and wait
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    channel = (first + bh % H) * DH
    at = b * stride_b + channel
    t = tl.load(seen).to(tl.int32)
    d = tl.arange(0, BD)
    cos_d, sin_d = load_turn(cos, sin, d, DH)
    x = load_float(q + at + d, d < DH, 0.0)
    x_partner = load_float(q + at + partner(d, DH), d < DH, 0.0)
    return bh, b, channel, at, t, d, cos_d, sin_d, (x * cos_d + x_partner * sin_d) * scale


@jit
def new_token(o, k, v, g, state_k, state_v, cos_d, sin_d, d, RECURRENCE: constexpr,
              DH: constexpr):
    """What the last program of a head needs besides q: the gate, k~, v~, and k~ after RoPE, each
    (BD,). All programs load it first, so that it is there when the last one needs it.
    """
    gate = tl.sigmoid(load_float(o + d, d < DH, 0.0))
    other = partner(d, DH)
    if RECURRENCE:                                                                      # (2)
        k_rec = recur(k, g, state_k, d, DH)
        v_rec = recur(v, g, state_v, d, DH)
        k_other = recur(k, g, state_k, other, DH)
    else:
        k_rec = load_float(k + d, d < DH, 0.0)
        v_rec = load_float(v + d, d < DH, 0.0)
        k_other = load_float(k + other, d < DH, 0.0)
    return gate, k_rec, v_rec, k_rec * cos_d + k_other * sin_d


@jit
def count_keys(t, RULE: constexpr):
    """How many keys `key_at` numbers for a query at t."""
    far = tl.maximum(near_from(t, RULE), 0)
    n = tl.minimum(RULE.sinks, far) + t - far
    if RULE.dilation > 0:
        n += far // RULE.dilation
    return n


@jit
def key_at(j, t, RULE: constexpr, RING: constexpr, IN_PLACE: constexpr):
    """The row in the cache of the j-th key that equation (4) allows a query at t, besides its own:
    first sinks, then the window, then the grid, so three prefixes of the cache's three buffers. Or
    with IN_PLACE, in a cache of every position, its position. -1: a sink on the grid, which comes
    later.
    """
    far = tl.maximum(near_from(t, RULE), 0)
    sinks = tl.minimum(RULE.sinks, far)
    near = sinks + t - far                             # the end of the window's
    at = j
    if RING > 0 or IN_PLACE:
        at = tl.where(j < sinks, j, j - sinks + (far if IN_PLACE else RULE.sinks))
    if RULE.dilation > 0:
        if IN_PLACE:
            on_grid = (j - near + 1) * RULE.dilation - 1
        else:
            on_grid = RULE.sinks + RING + j - near
        at = tl.where(j < near, at, on_grid)
        if RULE.sinks > 0:
            at = tl.where((j < sinks) & ((j + 1) % RULE.dilation == 0), -1, at)
    return at


@jit
def share_of(tiles):
    """The first of this program's tiles, and the end. Shares differ by one tile at most."""
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    return tiles * split // splits, tiles * (split + 1) // splits


@jit
def add_rows(q_row, k, v, here, acc, l, m):
    """A tile of the row-wise online softmax. q_row (BD,); k, v, acc (BN, BD); here, l, m (BN,)."""
    s = tl.where(here, tl.sum(q_row[None, :] * k.to(tl.float32), axis=1), float("-inf"))
    top = tl.maximum(m, s)
    fade = tl.exp2(m - top)
    weight = tl.exp2(s - top)
    acc = acc * fade[:, None] + weight[:, None] * v.to(tl.float32)
    return acc, l * fade + weight, top


@jit
def join(acc, l, m):
    """Running softmaxes of different keys as one. acc (n, BD), l and m (n,) -> acc (BD,), l, m."""
    top = tl.max(m, axis=0)
    weight = tl.exp2(m - top)
    return tl.sum(weight[:, None] * acc, axis=0), tl.sum(weight * l, axis=0), top


@jit
def is_last(arrived, n):
    """Is this the last of n programs to get here? It then sees what the others have stored, and
    sets the counter back to 0.
    """
    tl.debug_barrier()                                 # all threads of this program have stored
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    if before == n - 1:
        tl.store(arrived, 0)
    return before == n - 1


@jit
def load_shares(partial, splits, d, DH: constexpr, BS: constexpr):
    """acc (BS, BD), l and m (BS,): what the programs of a head have found."""
    split = tl.arange(0, BS)
    partial += split * (DH + 2)                                                         # (BS,)
    there = split < splits
    m = tl.load(partial + DH, mask=there, other=LOWEST, cache_modifier=".cg")
    l = tl.load(partial + DH + 1, mask=there, other=0.0, cache_modifier=".cg")
    at = partial[:, None] + d[None, :]
    there = there[:, None] & (d < DH)[None, :]
    acc = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    return acc, l, m


@jit
def store_token(k_cache, v_cache, k, v, row, d, DH: constexpr):
    at = row.to(tl.int64) * DH + d
    tl.store(k_cache + at, k.to(k_cache.dtype.element_ty), mask=d < DH)
    tl.store(v_cache + at, v.to(v_cache.dtype.element_ty), mask=d < DH)


@jit
def decode_kernel(
        y, o, q, k, v, g, state, cos, sin, k_cache, v_cache, seen, partial, arrived, chosen,
        B, C, H, first, stride_b, rows, scale,
        RECURRENCE: constexpr, RULE: constexpr, KEPT: constexpr, RING: constexpr, EARLY: constexpr,
        DH: constexpr, BD: constexpr, BS: constexpr, BN: constexpr,
        STAGES: constexpr):
    """Program (bh, split): attention of the token over its share of the keys. The last program of a
    head finishes the token.

    o, q, k, v, g: (B, C), stride_b from sequence to sequence; y (B, C); state (2, B, C); the heads
    of this group are H from `first` on. k_cache, v_cache (B, H, rows, Dh). partial (B * H, splits,
    Dh + 2) float32: acc, m, l. arrived (B * H,) int32: zeros, before and after. chosen (B * H, K)
    int32: top-k blocks. RULE: of the keys to read; KEPT: of those to store; RING: rows of the ring.
    A row that is not to be read is not loaded.
    """
    bh, b, channel, at, t, d, cos_d, sin_d, q_row = this_token(
        q, cos, sin, seen, H, first, stride_b, scale, EARLY, DH, BD)
    row_y = b * C + channel
    row_k = row_y                                      # in the state
    row_v = B * C + row_k
    gate, k_rec, v_rec, k_turned = new_token(
        o + at, k + at, v + at, g + at, state + row_k, state + row_v, cos_d, sin_d, d,
        RECURRENCE, DH)
    k_cache += bh * rows * DH
    v_cache += bh * rows * DH
    n = count_keys(t, RULE)
    tiles = tl.cdiv(n, BN)
    block_tiles = 0
    if RULE.topk > 0:                                  # the chosen blocks come first
        chosen += bh * RULE.topk
        in_blocks = tl.minimum(t // RULE.block + 1, RULE.topk) * RULE.block
        block_tiles = tl.cdiv(in_blocks, BN)
    acc = tl.zeros((BN, BD), tl.float32)
    l = tl.zeros((BN,), tl.float32)
    m = tl.full((BN,), LOWEST, tl.float32)
    begin, end = share_of(block_tiles + tiles)
    for tile in tl.range(begin, end, num_stages=STAGES):
        j = (tile - block_tiles) * BN + tl.arange(0, BN)
        row = key_at(j, t, RULE, RING, RULE.topk > 0)
        here = (j < n) & (row >= 0)
        if RULE.topk > 0:
            i = tile * BN + tl.arange(0, BN)
            block = tl.load(chosen + i // RULE.block, mask=i < in_blocks, other=0)
            p = block * RULE.block + i % RULE.block
            new = (i < in_blocks) & (p < near_from(t, RULE)) & (is_lasting(p, RULE) == 0)
            row = tl.where(tile < block_tiles, p, row)
            here = tl.where(tile < block_tiles, new, here)
        mask = here[:, None] if DH == BD else here[:, None] & (d < DH)[None, :]
        place = row.to(tl.int64)[:, None] * DH + d[None, :]
        k_tile = tl.load(k_cache + place, mask=mask, other=0)                           # (BN, BD)
        v_tile = tl.load(v_cache + place, mask=mask, other=0)
        acc, l, m = add_rows(q_row, k_tile, v_tile, here, acc, l, m)
    acc, l, m = join(acc, l, m)
    finishes = True
    if BS > 1:
        splits = tl.num_programs(1)
        partial += bh * splits * (DH + 2)
        mine = partial + tl.program_id(1) * (DH + 2)
        tl.store(mine + d, acc, mask=d < DH)
        tl.store(mine + DH, m)
        tl.store(mine + DH + 1, l)
        finishes = is_last(arrived + bh, splits)
    if finishes:
        if BS > 1:
            acc, l, m = join(*load_shares(partial, splits, d, DH, BS))
        own_score = tl.sum(q_row * k_turned, axis=0)
        top = tl.maximum(m, own_score)
        fade = tl.exp2(m - top)
        own = tl.exp2(own_score - top)
        attended = (fade * acc + own * v_rec) / (fade * l + own)                        # (3)
        tl.store(y + row_y + d, (gate * attended).to(y.dtype.element_ty), mask=d < DH)  # (5)
        # State and token are stored last, when all programs of the head have read the state, and
        # the token's row in the ring, which held position t - window until now.
        tl.debug_barrier()
        if RECURRENCE:
            tl.store(state + row_k + d, k_rec, mask=d < DH)
            tl.store(state + row_v + d, v_rec, mask=d < DH)
        if t < KEPT.sinks:
            store_token(k_cache, v_cache, k_turned, v_rec, t, d, DH)
        if RING > 0:
            row = KEPT.sinks + t % RING
            store_token(k_cache, v_cache, k_turned, v_rec, row, d, DH)
        if KEPT.dilation > 0:
            if (t + 1) % KEPT.dilation == 0:
                row = KEPT.sinks + RING + t // KEPT.dilation
                store_token(k_cache, v_cache, k_turned, v_rec, row, d, DH)


@jit
def write_summary(summaries, k_cache, block, d, RULE: constexpr, BR: constexpr,
                  DH: constexpr, BD: constexpr):
    """The summary of a full block, from its keys in tiles of BR; see model.block_summaries."""
    r = tl.arange(0, BR)
    least = tl.full((BD,), float("inf"), tl.float32)
    most = -least
    total = tl.zeros((BD,), tl.float32)
    for r0 in range(0, RULE.block, BR):
        here = (r0 + r < RULE.block)[:, None] & (d < DH)[None, :]
        place = (block * RULE.block + r0 + r).to(tl.int64)[:, None] * DH + d[None, :]
        keys = load_float(k_cache + place, here, 0)                                     # (BR, BD)
        if RULE.score == "last":
            keys = tl.where((r0 + r == RULE.block - 1)[:, None], keys, 0)
        total += tl.sum(keys, 0)
        least = tl.minimum(least, tl.min(tl.where(here, keys, float("inf")), 0))
        most = tl.maximum(most, tl.max(tl.where(here, keys, -float("inf")), 0))
    kind = summaries.dtype.element_ty
    if RULE.score == "minmax":
        summaries += block.to(tl.int64) * 2 * DH
        tl.store(summaries + d, most.to(kind), mask=d < DH)
        tl.store(summaries + DH + d, least.to(kind), mask=d < DH)
    else:
        if RULE.score == "mean":
            total /= RULE.block
        tl.store(summaries + block.to(tl.int64) * DH + d, total.to(kind), mask=d < DH)


@jit
def in_order(x):
    """The bits of a float32 as an int32 of the same order, and back."""
    return x ^ ((x >> 31) & 0x7fffffff)


@jit
def decode_choose_kernel(
        q, cos, sin, k_cache, summaries, seen, scores, chosen,
        H, first, stride_b, rows,
        RULE: constexpr, EARLY: constexpr, DH: constexpr, BD: constexpr,
        BN: constexpr, BS: constexpr, BK: constexpr, BR: constexpr,
        STAGES: constexpr):
    """Program (bh): chosen (B * H, K) int32, the own block, then the best of the earlier ones, as
    many as there are. summaries (B, H, n, Dh or 2 Dh); scores (B * H, n) float32: scratch. The
    query is rounded, as in a whole sequence.
    """
    bh, _, _, _, t, d, _, _, q_row = this_token(
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
    q_row = q_row.to(q.dtype.element_ty).to(tl.float32)
    for b0 in tl.range(0, own, BN, num_stages=STAGES):
        block = b0 + tl.arange(0, BN)
        mask = (block < own)[:, None] & (d < DH)[None, :]
        place = block[:, None] * width + d[None, :]
        summary = tl.load(summaries + place, mask=mask, other=0)                        # (BN, BD)
        if RULE.score == "minmax":
            least = tl.load(summaries + DH + place, mask=mask, other=0)
            summary = tl.where(q_row[None, :] > 0, summary, least)
        s = tl.sum(q_row[None, :] * summary.to(tl.float32), 1)
        tl.store(scores + block, s, mask=block < own)
    tl.debug_barrier()                                 # other threads read them
    block = tl.arange(0, BS)
    s = tl.load(scores + block, mask=block < own, other=-float("inf"))                  # (BS,)
    s = tl.where(block < own, tl.maximum(s, LOWEST), s)                # NaN: the least score
    s = tl.where(s == 0, 0.0, s)                       # -0 is no less than +0
    order = in_order(s.to(tl.int32, bitcast=True))
    order = order.to(tl.int64) << 31
    best = tl.topk(order + (0x7fffffff - block), BK)   # of equal scores the lower index
    j = tl.arange(0, BK)
    tl.store(chosen, own)
    best = 0x7fffffff - (best & 0x7fffffff).to(tl.int32)                                # (BK,)
    others = tl.minimum(own, RULE.topk - 1)
    tl.store(chosen + 1 + j, best, mask=j < others)


def split_count(programs, keys, BN, device):
    """How many programs share the keys of a head, at most 32. They are to be about four on each
    processor of the GPU, with at least two tiles for each once the cache is full.
    """
    if device.type != "cuda":
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(32, keys // (2 * BN), 4 * units // max(1, programs)))


def early_start(x):
    """Arguments by which a decoding kernel may start while the one before it ends (programmatic
    dependent launch), on GPUs that can: Hopper and later.
    """
    return dict(EARLY=True, launch_pdl=True) if since_hopper(x) else dict(EARLY=False)


def choose(q, rope, group, seen, first, rule):
    """chosen (B * H, K) int32: the blocks of one token, for decode_kernel."""
    B, H, rows, Dh = group.k.shape
    chosen = torch.empty(B * H, rule.topk, dtype=torch.int32, device=q.device)
    blocks = rows // rule.block
    scores = torch.empty(B * H, blocks, dtype=torch.float32, device=q.device)
    BD = triton.next_power_of_2(Dh)
    tiles = dict(
        BN=max(16, 8192 // max(128, BD)),
        BS=max(16, triton.next_power_of_2(blocks)),
        BK=max(2, triton.next_power_of_2(rule.topk)),
        BR=min(64, triton.next_power_of_2(rule.block)),
        STAGES=2, num_warps=4)
    launch(decode_choose_kernel, B * H, q, q, *rope, group.k, group.summaries, seen, scores, chosen,
           H, first, q.stride(0), rows, RULE=rule, DH=Dh, BD=BD, **early_start(q), **tiles)
    return chosen


@torch.compiler.disable
def decode(o, q, k, v, g, rope, cache, splits=None):
    """Equations (2) to (5), but for out_proj, for one token of each sequence: (B, 1, C).

    o, q, k, v: (B, 1, C), and g, a list that holds one more, or none without recurrence. rope: cos
    and sin (1, Dh/2) float32 of the token's position. cache: model.LayerCache, to which the token
    is appended; cache.seen is its position. splits: how many programs share a head's keys; None:
    enough to fill the GPU.
    """
    o, q, k, v, *g = same_strides(o, q, k, v, *g)
    rope = [x.contiguous() for x in rope]
    B, _, C = q.shape
    y = torch.empty(B, 1, C, dtype=q.dtype, device=q.device)
    first = 0                                          # head of the group
    for group in cache.groups:
        _, H, rows, Dh = group.k.shape
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
            tiles = dict(BN=max(16, 32 * 128 // max(128, BD)), STAGES=3, num_warps=4)
            keys = topk * block + rule.ring + rule.sinks
            keys += rows // rule.dilation if rule.dilation else 0
            chosen = choose(q, rope, group, cache.seen, first, rule)
        n = splits or split_count(B * H, keys, tiles["BN"], q.device)
        partial = torch.empty(B * H, n, Dh + 2, dtype=torch.float32, device=q.device)
        gate, state = (*g, cache.state) if g else (k, k)               # without g placeholders
        launch(decode_kernel, (B * H, n), q, y, o, q, k, v, gate, state, *rope, group.k, group.v,
               cache.seen, partial, group.arrived, chosen, B, C, H, first, q.stride(0), rows,
               log2_scale(Dh), RECURRENCE=bool(g), RULE=rule, KEPT=group.kept, RING=group.kept.ring,
               DH=Dh, BD=BD, BS=triton.next_power_of_2(n), **early_start(q), **tiles)
        first += H
    return y


# ---------------------------------------------------------------------------------------------
# Top-k blocks: the choice
#
# What is slow: each query and head chooses for itself, so a tile of queries shares few blocks.
# The idea: the (query, block) pairs are sorted by block, and a block's keys meet the queries that
# chose it in a matrix product. A query's K partial results are joined by their log-sum-exp. Bytes
# per query and head at Dh 128 and K 16 in bf16, where q, k, v, y are 1 KB:
#
#   pairs by block   K partial rows written and read: 8 KB; K rows of q from the L2 cache: 4 KB
#   tiles of BM      64 queries that choose 15 of 256 blocks at random want nearly all of them, so
#                    the arithmetic is that of dense attention, 8 x more at T 16384
#   one by one       K N keys and values from the L2 cache: 512 KB
#
# Scores (blocks, heads, T) are never stored. A program takes 64 queries of one head past the
# summaries twice, in tiles of BN blocks:
#
#   1. It keeps the 4 best scores of each lane; lane c sees blocks c, c + BN, ... The K-th best of
#      these is the bar, unless one lane holds 5 of the best K: 1 query in 5000 at K 16, BN 64.
#   2. Blocks over the bar are chosen. If these are not K - 1, the bar is sought by bisection of
#      (score, -index). That order is strict: of equal scores the block of lower index wins.
#
# The choice leaves as words: bit i of word w of block b says that query 64 w + i chose b. A running
# sum of the words' populations is each pair's place in the list of its block. So there is no sort
# and no atomic addition, and lists are in the order of queries.
#
# Both kernels: grid B H T / 64. choose reads q, and the summaries from the L2 cache: 2 Dh n FLOPs a
# query, 2 % of dense attention's at N 64, and a search of about 60 instructions a score. Limits:
# B H T K < 2^31; K up to 64 or so, as more overflow the lanes and are sought by bisection.

WORD = constexpr(64)                                # queries that share a word
BOTTOM = constexpr(-0x7f800001 * 2**31)             # -inf as the search has it


@jit
def score_blocks(q, summaries, b, h, block, own, stop, MINMAX: constexpr):
    """Scores (BM, BN) of blocks (BN,) for q (BM, BD); -inf from the query's own block on. Blocks
    before `stop` are read. NaN counts as the least score.
    """
    high = load_rows(summaries, b, h, block, block < stop)                      # (BN, BD)
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
    return tl.where(is_past, tl.maximum(s, LOWEST), -float("inf"))


@jit
def population(x):
    """How many bits of x (int64) are set. The compiler knows this idiom."""
    x = x.to(tl.uint64, bitcast=True)
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@jit
def choose_kernel(
        q, summaries, chosen, words, counts,
        H, T, start, n, K,
        N: constexpr, MINMAX: constexpr, BN: constexpr, STAGES: constexpr):
    """q: Rows of (B, H, T, Dh), the first at position `start`; summaries: Rows of (B, H, >= n - 1,
    Dh or 2 Dh).

    chosen (B, H, T, K) int32: the blocks of a query, by index. words (B, H, n, cdiv(T, 64)) int64.
    counts: their populations, int32; zeros before.
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

    first = tl.full((WORD, BN), -float("inf"), tl.float32)             # of each lane, best first
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
    bar = tl.full((WORD,), float("inf"), tl.float32)   # K 1: no other
    for _ in range(1, K):
        bar = tl.max(first, 1)
        best = first == bar[:, None]
        first = tl.where(best, second, first)
        second = tl.where(best, third, second)
        third = tl.where(best, fourth, third)
        fourth = tl.where(best, -float("inf"), fourth)
    bar = tl.where(own < K, -float("inf"), bar)        # fewer than K: all of them
    bar = tl.maximum(bar, 1.1 * LOWEST)                # over -inf, under the scores of past blocks

    order = in_order(bar.to(tl.int32, bitcast=True))
    order = order.to(tl.int64) << 31                   # (score, -index) in one
    low = tl.full((WORD,), BOTTOM, tl.int64)
    high = tl.full((WORD,), 2**62, tl.int64)
    behind = column[None, :] - column[:, None]
    before = tl.where(behind > 0, 1.0, 0.0)
    before = tl.where(behind == 0, 256.0, before).to(tl.float16)
    shift = (tl.arange(0, 4) * 16).to(tl.int64)
    words += bh * n * tiles + i0 // WORD
    counts += bh * n * tiles + i0 // WORD
    chosen += (bh * T + i0) * K
    searching = 1
    while searching > 0:
        bar = in_order((order >> 31).to(tl.int32)).to(tl.float32, bitcast=True)
        until = 0x7fffffff - (order & 0x7fffffff).to(tl.int32)         # of blocks just at the bar
        count = tl.zeros((WORD,), tl.int32)
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
            sums = sums.to(tl.int32, bitcast=True)
            j = count[:, None] + (sums & 0xff)
            new = ((sums & 0x100) > 0) & (j < K)
            at = chosen + row[:, None] * K + j
            tl.store(at, tl.zeros_like(j) + block[None, :], mask=new)
            count += tl.sum(ones, 1).to(tl.int32)
            bits = tl.where(take, (1 << row % 16)[:, None], 0)
            bits = tl.sum(tl.reshape(bits, (4, 16, BN)), 1)
            word = tl.sum(bits.to(tl.int64) << shift[:, None], 0)                       # (BN,)
            at = block.to(tl.int64) * tiles
            tl.store(words + at, word, mask=block < end)
            tl.store(counts + at, population(word), mask=block < end)
        low = tl.where(count > want, order, low)
        high = tl.where(count < want, order, high)
        middle = (low & high) + ((low ^ high) >> 1)    # rounded down, without overflow
        open_ = (count != want) & (middle > low)
        order = tl.where(open_, middle, order)
        searching = tl.max(open_.to(tl.int32))
        tl.debug_barrier()                             # other threads overwrite what is stored


@jit
def list_kernel(
        chosen, words, ends, pairs,
        H, T, start, n, capacity,
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
    word = tl.load(words + at, mask=live, other=0)
    word = word.to(tl.uint64, bitcast=True)
    later = population(word >> row.to(tl.uint64))      # queries of the word from this one on
    end = tl.load(ends + at, mask=live, other=0)
    at = end - later
    live = live & (at >= 0) & (at < capacity)
    tl.store(pairs + at, i * K + j, mask=live)


# ---------------------------------------------------------------------------------------------
# Top-k blocks: attention
#
#   blocks   part_j = softmax_p(q . k~_p / sqrt(Dh)) v~_p over the j-th chosen block of a query, and
#            lse_j, its log2-sum-exp2
#   rest     where equation (4) allows more than the query itself: all that it allows is one more
#            part, by the kernels of sparse attention. The blocks leave these keys out.
#   join     y = sum_j 2^(lse_j - M) part_j / sum_j 2^(lse_j - M)
#
# blocks: a program holds the keys of one block and goes through its list in tiles of BM pairs. Grid
# B H n, heads slowest: the queries of a head, 4 MB at T 16384, stay in the L2 cache. join: a
# program takes BM queries, and adds in one order, in float32. T 16384, H 16, Dh 128, N 64, K 16,
# bf16: the parts are 1.07 GB, written and read: 0.72 ms at 3.0 TB/s; 137 GFLOP are 0.18 ms at 745
# TFLOP/s, under the writing. Limits: as attention's; N of any size.

@jit
def key_block(H, n):
    """(at, bh, b, h, block) of this program: the at-th of all B H n blocks and lists."""
    at = tl.program_id(0).to(tl.int64)
    bh = at // n
    block = (at % n).to(tl.int32)
    return at, bh, bh // H, bh % H, block


@jit
def block_list(ends, at, T):
    """Where in pairs the at-th list begins and ends."""
    tiles = tl.cdiv(T, WORD)
    ends += at * tiles
    begin = tl.load(ends - 1, mask=at > 0, other=0)
    return begin, tl.load(ends + tiles - 1)


@jit
def load_pairs(pairs, e0, list_end, T, K: constexpr, BM: constexpr):
    """BM pairs of a list, from e0 on, and which of them there are."""
    e = e0 + tl.arange(0, BM)
    pair = tl.load(pairs + e, mask=e < list_end, other=-1)
    return pair, (pair >= 0) & (pair < T * K)          # no wrong list leads out of the parts


@jit
def sees_in_block(t, p, stop, RULE: constexpr, REST: constexpr):
    """Does a query at t attend to key p as one of a chosen block's, which end before `stop`? REST:
    not if equation (4) allows it.
    """
    if REST:
        sees = (p <= tl.minimum(near_from(t, RULE) - 1, stop - 1)) & (is_lasting(p, RULE) == 0)
    else:
        sees = p <= tl.minimum(t, stop - 1)
    return sees


@jit
def blocks_kernel(
        q, k, v, part, part_lse, pairs, ends,
        H, T, start, n, end, scale,
        K: constexpr, N: constexpr, RULE: constexpr, REST: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """Program (bh, block). q: Rows of (B, H, T, Dh), the first at position `start`; k, v: Rows of
    (B, H, end, Dh); part: Rows of (B, H, T * (K + REST), Dh); part_lse (B, H, T * (K + REST))
    float32.
    """
    at, bh, b, h, block = key_block(H, n)
    p0 = block * N
    p = p0 + tl.arange(0, BN)
    stop = tl.minimum(p0 + N, end)
    k_tile = load_rows(k, b, h, p, p < stop)                                    # (BN, BD)
    v_tile = load_rows(v, b, h, p, p < stop)
    part_lse += bh * T * (K + REST)
    list_begin, list_end = block_list(ends, at, T)
    for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
        pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                          # (BM,)
        i = pair // K
        q_tile = load_rows(q, b, h, i, live)                                    # (BM, BD)
        t = start + i
        sees = sees_in_block(t[:, None], p[None, :], stop, RULE, REST)
        s = tl.where(sees, dot_rows(q_tile, k_tile), -float("inf"))                     # (BM, BN)
        m = tl.maximum(tl.max(s, 1) * scale, LOWEST)
        weight = tl.exp2(s * scale - m[:, None])
        l = tl.sum(weight, 1)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")           # (BM, BD)
        for more in range(BN, N, BN):  # the rest of a large block
            here = p + more < stop
            k_more = load_rows(k, b, h, p + more, here)
            v_more = load_rows(v, b, h, p + more, here)
            sees = sees_in_block(t[:, None], (p + more)[None, :], stop, RULE, REST)
            acc, l, m = add_keys(q_tile, k_more, v_more, sees, scale, acc, l, m)
        acc *= tl.where(l > 0, 1 / l, 0)[:, None]
        place = pair + i * REST
        store_rows(part, b, h, place, acc, live)
        tl.store(part_lse + place, m + tl.log2(l), mask=live)


@jit
def join_kernel(
        y, part, part_lse, lse,
        H, T, start,
        K: constexpr, N: constexpr, REST: constexpr, BM: constexpr, STAGES: constexpr):
    """y: Rows of (B, H, T, Dh); lse (B, H, T) float32. The rest as above."""
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    count = tl.minimum((start + i) // N + 1, K)        # of a query's blocks
    count = tl.where(live, count, 0)
    part_lse += (bh * T + i) * (K + REST)
    m = tl.full((BM,), LOWEST, tl.float32)
    for j in range(K + REST):
        here = (j < count) | (live & (j == K))
        lse_j = tl.load(part_lse + j, mask=here, other=LOWEST)
        m = tl.maximum(m, lse_j)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, y.BD), tl.float32)
    for j in tl.range(K + REST, num_stages=STAGES):
        here = (j < count) | (live & (j == K))
        lse_j = tl.load(part_lse + j, mask=here, other=-float("inf"))
        weight = tl.exp2(lse_j - m)
        l += weight
        place = i * (K + REST) + j
        part_j = load_rows(part, b, h, place, here)                             # (BM, BD)
        acc += weight[:, None] * part_j.to(tl.float32)
    store_rows(y, b, h, i, acc / l[:, None], live)
    tl.store(lse + bh * T + i, m + tl.log2(l), mask=live)


# The backward pass, with P, dO and delta as in attention's: the rest by the kernels of sparse
# attention, which compute delta too; else delta has a kernel of its own. Then by blocks, as in the
# forward pass: the pairs' parts of dQ, and dK and dV of the block, added to the rest's. At last the
# parts of dQ, K or K + 1 a query, are summed. In each kernel a row has one writer and each sum one
# order: gradients repeat to the bit.
#
# B 4, T 8192, H 16, Dh 128, N 64, K 16, bf16: the parts of dQ are 2.1 GB, written and read: 1.4 ms
# at 3.0 TB/s; 690 GFLOP are 0.9 ms at 745 TFLOP/s.

@jit
def delta_kernel(y, dy, delta, H, T, BM: constexpr):
    """delta (B, H, T) float32: dO . y of each query. y, dy: Rows of (B, H, T, Dh)."""
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    y_tile = load_rows(y, b, h, i, i < T).to(tl.float32)                        # (BM, BD)
    dy_tile = load_rows(dy, b, h, i, i < T).to(tl.float32)
    tl.store(delta + bh * T + i, tl.sum(dy_tile * y_tile, 1), mask=i < T)


@jit
def blocks_backward_kernel(
        q, k, v, dy, dk, dv, part, pairs, ends, lse, delta,
        H, T, start, n, end, scale, factor,
        K: constexpr, N: constexpr, RULE: constexpr, REST: constexpr,
        BM: constexpr, BN: constexpr, STAGES: constexpr):
    """Program (bh, block): all its rows of dk, dv, and its pairs' rows of part, Rows of (B, H, T *
    (K + REST), Dh). REST: dk and dv hold what the rest gave.
    """
    at, bh, b, h, block = key_block(H, n)
    p0 = block * N
    stop = tl.minimum(p0 + N, end)
    list_begin, list_end = block_list(ends, at, T)
    lse += bh * T
    delta += bh * T
    for more in range(0, N, BN):
        p = p0 + more + tl.arange(0, BN)
        k_tile = load_rows(k, b, h, p, p < stop)                                # (BN, BD)
        v_tile = load_rows(v, b, h, p, p < stop)
        acc_k = tl.zeros((BN, q.BD), tl.float32)
        acc_v = tl.zeros((BN, q.BD), tl.float32)
        for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
            pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                      # (BM,)
            i = pair // K
            t = start + i
            q_tile = load_rows(q, b, h, i, live)                                # (BM, BD)
            dy_tile = load_rows(dy, b, h, i, live)
            lse_t, delta_t = load_sums(lse, delta, i, live)
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


# Tiles for rows of up to 256 bytes, the fastest on an H100; wider ones take smaller tiles.
TOPK_TILES = {
    "choose": dict(BN=64, STAGES=3, num_warps=4),
    "blocks": dict(BM=64, BN=64, STAGES=1, num_warps=4),
    "join": dict(BM=16, STAGES=3, num_warps=4),
}
PARTS_BYTES = 2**31                                    # the most that the parts of one call take
LEAST_QUERIES = 1024                                   # but no call is cut shorter


def topk_constants(kind, q, block):
    """Tiles of a kernel, and the constants that all share, for q (B, H, T, Dh)."""
    narrow, wide = TOPK_TILES[kind], WIDE[1024]
    least = {name: min(size, wide[name]) for name, size in narrow.items()}
    constants = head_constants({128: narrow, 256: narrow, 512: least, 1024: least}, q)
    if kind == "blocks":
        constants["BN"] = min(constants["BN"], max(16, triton.next_power_of_2(block)))
    return dict(N=block, **constants)


def choose_blocks(q, summaries, end, block, topk):
    """The choice of q (B, H, T, Dh), the last of `end` positions: pairs, ends, as above."""
    B, H, T, Dh = q.shape
    n = triton.cdiv(end, block)
    tiles = triton.cdiv(T, 64)
    ints = dict(dtype=torch.int32, device=q.device)
    words = q.new_empty(B, H, n, tiles, dtype=torch.int64)
    counts = torch.zeros(B, H, n, tiles, **ints)
    chosen = torch.empty(B, H, T, topk, **ints)
    pairs = torch.zeros(chosen.numel(), **ints)
    sizes = H, T, end - T, n
    constants = topk_constants("choose", q, block)
    minmax = summaries.shape[-1] == 2 * Dh
    if minmax:
        constants["STAGES"] = 1                        # two tiles take twice the shared memory
    programs = B * H * tiles
    launch(choose_kernel, programs, q, *rows_of(q, summaries[..., :Dh]), chosen, words, counts,
           *sizes, topk, MINMAX=minmax, **constants)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    launch(list_kernel, programs, q, chosen, words, ends, pairs, *sizes, pairs.numel(),
           K=topk, N=block, BK=triton.next_power_of_2(topk))
    return pairs, ends


def topk_forward(
        q: Tensor, k_rec: Tensor, v_rec: Tensor, summaries: Tensor, rule: list[int]
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and lse of the last T of k's positions, and their choice: pairs, ends. rule: dilation,
    window, sinks, block, topk.
    """
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
    constants = dict(K=topk, REST=int(rest))
    launch(blocks_kernel, B * H * n, q, *rows_of(q, k, v, part.flatten(2, 3)), part_lse, pairs,
           ends, H, T, end - T, n, end, log2_scale(Dh), RULE=Sizes(*sizes), **constants,
           **topk_constants("blocks", q, block))
    joining = topk_constants("join", q, block)
    launch(join_kernel, triton.cdiv(T, joining["BM"]) * B * H, q,
           *rows_of(y, part.flatten(2, 3)), part_lse, lse, H, T, end - T, **constants, **joining)
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
        joining = topk_constants("join", q, block)
        launch(delta_kernel, triton.cdiv(T, joining["BM"]) * B * H, q, *rows_of(y, dy), delta, H, T,
               BM=joining["BM"])
    n = triton.cdiv(end, block)
    launch(blocks_backward_kernel, B * H * n, q,
           *rows_of(q, k, v, dy, dk, dv, part.flatten(2, 3)), pairs, ends, lse, delta,
           H, T, end - T, n, end, log2_scale(Dh), 1 / math.sqrt(Dh),
           K=topk, RULE=sizes, REST=int(rest), **topk_constants("blocks", q, block))
    return [torch.sum(part, 3, out=dq), dk, dv]


def keep_topk(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rule = inputs[4]


def topk_gradient(ctx, dy, *_):
    return *topk_backward(dy, *ctx.saved_tensors, ctx.rule), None, None


topk_operator = operator(topk_forward)
topk_operator.register_autograd(topk_gradient, setup_context=keep_topk)


def attention_topk(q, k_rec, v_rec, rule, summaries):
    """Equation (3) with top-k blocks by the kernels: model.attend, for the last T of n positions, a
    whole sequence's or a chunk's.

    q: (B, h, T, Dh); k_rec, v_rec: (B, h, n, Dh); summaries: of their whole blocks. One dtype, any
    strides. Returns (B, h, T, Dh), differentiable in q, k_rec, v_rec.
    """
    B, H, T, Dh = q.shape
    n = k_rec.shape[2]
    block = min(rule.block, n)
    topk = min(rule.topk, triton.cdiv(n, block))
    sizes = [*rule.sizes, block, topk]
    run = topk_forward if unrecorded(q, k_rec, v_rec) else topk_operator
    query_bytes = max(1, B * H * topk * Dh * q.element_size())         # 1: a batch of no sequences
    queries = max(LEAST_QUERIES, PARTS_BYTES // query_bytes // 64 * 64)
    y = []
    for begin in range(0, T, queries):
        stop = min(begin + queries, T)
        end = n - T + stop
        keys = k_rec[:, :, :end], v_rec[:, :, :end]
        y.append(run(q[:, :, begin:stop], *keys, summaries, sizes)[0])
    return torch.cat(y, dim=2) if len(y) > 1 else y[0]


# ---------------------------------------------------------------------------------------------
# The output head and its loss
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
# second reading finds the row, 100 KB at a vocabulary of 50304, in the L2 cache, if few rows are
# under way at once. So a program takes 32 warps, two programs a processor, and hints of eviction
# keep what is read again. 8192 rows: H100 0.66 ms (2.5 TB/s); H200 by torch.compile 1.06.

@jit
def cross_entropy_kernel(z, y, loss, V, BV: constexpr, GRAD: constexpr):
    """z (N, V), replaced by dz if GRAD; y (N,) int64; loss (N,) float32.

    A row whose target is -100 counts nothing. Any other target outside [0, V) makes the loss and dz
    NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BV)
    z += row * V
    label = tl.load(y + row)
    counted = label != -100
    right = (label >= 0) & (label < V)
    factor = tl.where(right, 1.0, float("nan"))
    z_y = load_float(z + label, right, 0)
    m = tl.full((BV,), LOWEST, tl.float32)
    l = tl.zeros((BV,), tl.float32)
    for v0 in range(0, V, BV):
        live = v0 + v < V
        s = tl.load(z + v0 + v, mask=live, other=-float("inf"), eviction_policy="evict_last")
        s = s.to(tl.float32)
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
            dz = tl.exp2((s.to(tl.float32) - top) * LOG2E - total)
            dz = tl.where(counted, (dz - tl.where(v0 + v == label, 1.0, 0.0)) * factor, 0)
            tl.store(z + v0 + v, dz.to(s.dtype), mask=live, eviction_policy="evict_first")


def cross_entropy_(z, y, grad):
    """Cross-entropy of each row of logits z (N, V), contiguous, under its target y (N,) int64: (N,)
    float32. With `grad`, z is replaced by its gradient.
    """
    loss = z.new_empty(len(z), dtype=torch.float32)
    BV = min(4096, max(128, triton.next_power_of_2(z.shape[1])))
    launch(cross_entropy_kernel, len(z), z, z, y.contiguous(), loss, z.shape[1],
           BV=BV, GRAD=grad, num_warps=BV // 128)
    return loss


class HeadLoss(torch.autograd.Function):
    """The summed loss of x (N, C), weight (V, C) and targets y (N,), in chunks of `chunk` tokens,
    enough to keep products busy. dtype: of these products.
    """
    @staticmethod
    def forward(ctx, x, weight, y, dtype, grad, chunk=8192):
        w = weight.to(dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if grad else None
        dx = []
        total = x.new_zeros((), dtype=torch.float32)
        for x_chunk, y_chunk in zip(x.to(dtype).split(chunk), y.split(chunk)):
            z = x_chunk @ w.T                                                           # (chunk, V)
            total = total + cross_entropy_(z, y_chunk, grad).sum()
            if grad:  # z is dz now
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
