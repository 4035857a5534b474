"""
RAT+'s operations at the speed of a GPU, as Triton kernels. model.py defines what each of them
computes.

  recurrence   h_t = a_t * h_{t-1} + (1 - a_t) * x_t     a_t = sigmoid(g_t), x in {k, v}     (2)
  attention    y_t = sum over allowed p of softmax_p(q_t . k_p / sqrt(Dh)) v_p              (3)
  allowed      p <= t, and p is on the dilated grid, in the window, or a sink               (4)
  decode       (2) to (4), and sigmoid(o) * y of (5), for one token of each sequence and a cache
  top-k        attention over the K best blocks of each query, and its decoding
  rotate       RoPE                      head_loss    output head and cross-entropy

A kernel runs as many programs at once. A program is a group of GPU threads that owns one part of
the output. Programs start in the order of their number: GPUs do so, CUDA does not promise it.

  in kernels       meaning
  B H T C DH       batch, heads, time, channels, head width; BD is DH rounded up to a power of 2
  b, h, bh         a sequence, a head, and both as one number bh = b * H + h
  t, p             position of a query, position of a key
  t0, p0, i0 ...   the first t, p, i of a tile
  SPAN             dilation, window, sinks of a rule, and its reach
  BT BC BM BN BV   sides of a program's tile: time, channels, queries, keys (or slots, or blocks),
                   vocabulary
  BS               number of splits (or blocks), rounded up to a power of 2
  RUN, COPIES      see the recurrence

A comment after a line often gives the shape of a tile. `python kernels.py` times the main
operations beside PyTorch's own. With TRITON_INTERPRET=1 Triton's interpreter runs the kernels on a
CPU, for tests.
"""
import argparse
import functools
import math
import os
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    if __name__ == "__main__":
        sys.exit("kernels.py: triton is not installed")
    raise                                              # model.py goes on without kernels

jit = triton.jit
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = False                                         # whether model.py sends CPU tensors here too
DTYPES = torch.float32, torch.float16, torch.bfloat16


def interpret():
    """From now on model.py sends CPU tensors to the kernels too. They run in Triton's interpreter
    (TRITON_INTERPRET=1).
    """
    global ON_CPU
    ON_CPU = True


def take(x):
    """Do the kernels take this tensor from model.py?"""
    return (x.is_cuda or ON_CPU) and x.dtype in DTYPES


def path(device):
    """What computes here, for the header line of the scripts."""
    where = "Triton's interpreter" if ON_CPU else torch.cuda.get_device_name(device)
    return f"Triton {triton.__version__} kernels on {where}"


def require(condition, message, *told):
    """ValueError, with the values `told` in the message, unless the condition holds."""
    if not condition:
        raise ValueError(message.format(*told) if told else message)


def require_alike(name, **tensors):
    """ValueError unless the tensors share shape and device, and kernels take their dtypes."""
    first = next(iter(tensors.values()))
    for x in tensors.values():
        if x.shape != first.shape or x.device != first.device or x.dtype not in DTYPES:
            told = ", ".join(f"{key} {described(x)}" for key, x in tensors.items())
            raise ValueError(f"{name}: wants one shape and device, and float32, float16 or "
                             f"bfloat16, got {told}")


def described(x):
    return f"{tuple(x.shape)} {x.dtype} {x.device}"


def launch(kernel, programs, x, *arguments, **constants):
    """Start a kernel on the device of the tensor x."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants)


def recorded(*tensors):
    """Must PyTorch see this call as an operator, for gradients or for torch.compile? If not,
    launching directly is faster.
    """
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wants_gradients or torch.compiler.is_compiling()


class Rows(NamedTuple):
    """A tensor (B, H, T, Dh) as kernels take it: pointer, and strides along B, H and T. Channels
    are neighbours.
    """
    ptr: Tensor
    b: int
    h: int
    t: int


def rows(x):
    return Rows(x, *x.stride()[:3])


def rows_of(*tensors):
    """Rows of each tensor."""
    return [rows(x) for x in tensors]


def packed_channels(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def packed_rows(x):
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


class CountedRows(NamedTuple):
    """Rows, and their number n in a head: for GPUs without TMA."""
    ptr: Tensor
    b: int
    h: int
    t: int
    n: int


def since_hopper(x):
    """Does x lie on a Hopper GPU or a later one, and do kernels run there?"""
    if INTERPRETER or not x.is_cuda:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


def has_tma(x):
    """Can tiles of x come by TMA, the Tensor Memory Accelerator of Hopper GPUs and later ones? In
    Triton's interpreter they can too.
    """
    return since_hopper(x) or not x.is_cuda


def tiles_of(x, BN, BD):
    """Packed rows x (B, H, T, Dh), to load BN rows of a head at a time: a descriptor, by which TMA
    fetches a tile in one instruction, without an address for each element; or CountedRows.

    Either way rows beyond T and channels beyond Dh are read as zeros.
    """
    if not has_tma(x):
        return CountedRows(*rows(x), x.shape[2])
    unit = 16 // x.element_size()
    strides = [stride if size > 1 else unit for stride, size in zip(x.stride(), x.shape)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, BN, BD])


@jit
def head(x, b, h):
    """Where head h of sequence b begins in Rows x."""
    return x.ptr + b * x.b + h * x.h


@jit
def load_rows(x, b, h, row, live, DH: tl.constexpr, BD: tl.constexpr):
    """Rows of x in head h of sequence b: (len(row), BD); 0 where not live, and beyond DH."""
    d = tl.arange(0, BD)
    mask = live[:, None] if DH == BD else live[:, None] & (d < DH)[None, :]
    at = row.to(tl.int64)[:, None] * x.t + d[None, :]
    return tl.load(head(x, b, h) + at, mask=mask, other=0)


@jit
def load_tile(x, b, h, row, TMA: tl.constexpr, BN: tl.constexpr, DH: tl.constexpr,
              BD: tl.constexpr):
    """Rows row .. row + BN - 1 of head h of sequence b: (BN, BD). x: what tiles_of gives."""
    if TMA:
        tile = x.load([b.to(tl.int32), h.to(tl.int32), row, 0]).reshape(BN, BD)
    else:
        i = row + tl.arange(0, BN)
        tile = load_rows(x, b, h, i, i < x.n, DH, BD)
    return tile


@jit
def store_rows(x, b, h, row, values, live, DH: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    mask = live[:, None] if DH == BD else live[:, None] & (d < DH)[None, :]
    at = row.to(tl.int64)[:, None] * x.t + d[None, :]
    tl.store(head(x, b, h) + at, values.to(x.ptr.dtype.element_ty), mask=mask)


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
# chain, but one that carries 2 BC numbers at a time: the rest is done before they arrive. A
# number travels as one 64-bit word, its float32 bits above a flag. The reader spins until all flags
# are set. No fence is needed, since a word arrives whole. The chain can't lock up: a program waits
# only for one of a smaller number, and that one has started before it.
#
# A program owns BT steps x BC channels of one sequence, as a tile (N, RUN, BC) with t = n * RUN +
# r. The RUN steps of a run lie in the registers of one thread or of a few neighbours, and are
# scanned there. Only the runs' ends, a RUN-th of the data, go through shared memory.
#
# Grid: chunks x B x C / BC, chunks slowest. Bytes per element in bf16: reads k, v, g, writes k_rec,
# v_rec: 10. The chain adds two words of 8 bytes for each BT steps of a channel, which are zeroed,
# written and read. Without a chain it would be 16: one pass for the tiles' ends, one for the
# outputs. Limits: registers (a tile holds P, H and the inputs in float32); for one long sequence
# the chain's latency.

LOG2E = tl.constexpr(math.log2(math.e))


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
def chain(a, u_k, u_v, h0_k, h0_v, words, chunk, chunks, b, c, C, COPIES: tl.constexpr):
    """h_t = a_t * h_{t-1} + u_t over the tile (N, RUN, BC) of a chunk, for k and for v, in float32.

    h0 (B, C): what enters chunk 0; words (B, chunks, 2, C) int64: what leaves each chunk.
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
        in_k = tl.load(h0_k + b * C + c, mask=mask, other=0)
        in_v = tl.load(h0_v + b * C + c, mask=mask, other=0)
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
def place(B, C, RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """(chunk, sequence, channels (BC,), steps within the chunk (N, RUN, 1)) of this program."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(C, BC)
    c = (program % tiles * BC).to(tl.int32) + tl.arange(0, BC)
    i = tl.arange(0, BT // RUN)[:, None, None] * RUN + tl.arange(0, RUN)[None, :, None]
    return program // (tiles * B), program // tiles % B, c, i


@jit
def load_float(x, mask, other):
    return tl.load(x, mask=mask, other=other).to(tl.float32)


@jit
def recurrence_forward_kernel(
        k, v, g, stride_b, stride_t,
        k0, v0, k_rec, v_rec, k_end, v_end, words,
        B, T, C,
        RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, COPIES: tl.constexpr):
    """k, v, g (B, T, C) with these strides; k_rec, v_rec (B, T, C) contiguous.

    k0, v0, k_end, v_end (B, C) float32; words: zeros.
    """
    chunks = tl.cdiv(T, BT)
    chunk, b, c, i = place(B, C, RUN, BT, BC)
    live = (i < T - chunk * BT) & (c < C)[None, None, :]  # (N, RUN, BC)
    at = b * stride_b + chunk * BT * stride_t + i * stride_t + c[None, None, :]
    a, rest = decay(load_float(g + at, live, float("inf")))  # past the end a = 1: h stays as it is
    u_k = rest * load_float(k + at, live, 0)
    u_v = rest * load_float(v + at, live, 0)
    h_k, h_v, end_k, end_v = chain(a, u_k, u_v, k0, v0, words, chunk, chunks, b, c, C, COPIES)
    if chunk == chunks - 1:
        tl.store(k_end + b * C + c, end_k, mask=c < C)
        tl.store(v_end + b * C + c, end_v, mask=c < C)
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
        k, v, g, stride_b, stride_t,
        k0, v0, k_rec, v_rec, dk_rec, dv_rec, dk_end, dv_end,
        dk, dv, dg, dk0, dv0, words,
        B, T, C,
        RUN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, COPIES: tl.constexpr):
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
        a_next, d_k, d_v, dk_end, dv_end, words, chunk, chunks, b, c, C, COPIES)
    if chunk == chunks - 1:                            # step 0: before it lies the state
        row = b * stride_b + c
        mask = c < C
        a_0, rest_0 = decay(load_float(g + row, mask, 0))
        far_k = load_float(k0 + b * C + c, mask, 0) - load_float(k + row, mask, 0)
        far_v = load_float(v0 + b * C + c, mask, 0) - load_float(v + row, mask, 0)
        d_g0 = a_0 * rest_0 * (first_k * far_k + first_v * far_v)
        tl.store(dk0 + b * C + c, a_0 * first_k, mask=mask)
        tl.store(dv0 + b * C + c, a_0 * first_v, mask=mask)
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


def launch_recurrence(kernel, many, few, shape, *arguments):
    """Run a kernel of the recurrence, with the words of its chain, on tiles that suit the number of
    chains.
    """
    B, T, C = shape
    tiles = SMALL_TILES if INTERPRETER else few if B * C < 4096 else many
    chunks = triton.cdiv(T, tiles["BT"])
    copies = max(1, 32 * tiles["num_warps"] // tiles["BC"])
    k = arguments[0]
    words = torch.zeros(B, chunks, 2, C, dtype=torch.int64, device=k.device)
    programs = chunks * B * triton.cdiv(C, tiles["BC"])
    launch(kernel, programs, k, *arguments, words, B, T, C, COPIES=copies, **tiles)


def same_strides(*tensors):
    """The tensors, with channels next to each other in memory and all of the same strides: copied
    only if they are not.
    """
    first = tensors[0].stride()
    same = first[-1] == 1 and all(x.stride() == first for x in tensors)
    return tensors if same else tuple(x.contiguous() for x in tensors)


def run_recurrence(k, v, g, k0, v0):
    """k_rec, v_rec (B, T, C); k_end, v_end (B, C) float32."""
    k, v, g = same_strides(k, v, g)
    outputs = new_recurrence(k, v, g, k0, v0)
    launch_recurrence(recurrence_forward_kernel, MANY_CHAINS, FEW_CHAINS, k.shape,
                      k, v, g, *k.stride()[:2], k0.contiguous(), v0.contiguous(), *outputs)
    return outputs


def new_recurrence(k, v, g, k0, v0):
    """Empty outputs of run_recurrence."""
    return tuple(x.new_empty(x.shape) for x in (k, v, k0, v0))


@torch.library.custom_op("rat::recurrence", mutates_args=())
def recurrence_operator(
        k: Tensor, v: Tensor, g: Tensor, k0: Tensor, v0: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_recurrence(k, v, g, k0, v0)


@torch.library.custom_op("rat::recurrence_backward", mutates_args=())
def recurrence_backward(
        inputs: list[Tensor], outputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients of k, v, g (B, T, C) and k0, v0 (B, C).

    inputs: k, v, g, k0, v0; outputs: k_rec, v_rec; grads: of k_rec, v_rec, k_end, v_end.
    """
    k, v, g = same_strides(*inputs[:3])
    packed = [x.contiguous() for x in (*inputs[3:], *outputs, *grads)]
    new = new_gradients(inputs, outputs, grads)
    launch_recurrence(recurrence_backward_kernel, MANY_CHAINS_BACK, FEW_CHAINS_BACK, k.shape,
                      k, v, g, *k.stride()[:2], *packed, *new)
    return new


def new_gradients(inputs, outputs, grads):
    return [x.new_empty(x.shape) for x in inputs]


def keep_recurrence(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[:2])


def recurrence_gradient(ctx, *grads):
    saved = ctx.saved_tensors
    return tuple(recurrence_backward(list(saved[:5]), list(saved[5:]), list(grads)))


recurrence_operator.register_fake(new_recurrence)
recurrence_backward.register_fake(new_gradients)
recurrence_operator.register_autograd(recurrence_gradient, setup_context=keep_recurrence)


def recurrence(k, v, g, state=None):
    """Equation (2) by the kernel: model.recurrence, with the same arguments and results.

    k, v, g: (B, T, C), T >= 1, any strides; state: 2 x (B, C) or None. ValueError for shapes or
    devices that do not match.
    """
    require_alike("recurrence", k=k, v=v, g=g)
    if k.dim() != 3 or k.shape[1] < 1:
        raise ValueError(f"recurrence: k, v, g are (B, T >= 1, C), got {tuple(k.shape)}")
    B, T, C = k.shape
    if state is None:
        state = k.new_zeros(2, B, C, dtype=torch.float32)
    k0, v0 = state
    if not (k0.shape == v0.shape == (B, C) and k0.device == v0.device == k.device):
        raise ValueError(f"recurrence: the state must be 2 x ({B}, {C}) on {k.device}, "
                         f"got {described(k0)} and {described(v0)}")
    arguments = k, v, g, k0.float(), v0.float()
    run = recurrence_operator if recorded(*arguments) else run_recurrence
    k_rec, v_rec, k_end, v_end = run(*arguments)
    return k_rec, v_rec, (k_end, v_end)


# ---------------------------------------------------------------------------------------------
# RoPE, on queries and on recurrent keys
#
#   y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x1, x2: the halves of a head's channels
#
# What is slow: PyTorch moves about 30 bytes an element through float32 intermediates. Here it is 4
# in bf16: read 2, write 2. A program owns BT positions of one head, both halves. Grid: B x H x T /
# BT, heads fastest, as they are neighbours in memory. The backward pass turns the other way, by
# -sin.

@jit
def rotate_kernel(x, y, cos, sin, H, T, HALF: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """x, y: Rows of (B, H, T, Dh); cos, sin (T, HALF) float32, contiguous. BD: HALF up to a power
    of 2.
    """
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    d = tl.arange(0, BD)
    live = (t < T)[:, None] & (d < HALF)[None, :]                                       # (BT, BD)
    turn = t[:, None] * HALF + d[None, :]
    c = tl.load(cos + turn, mask=live, other=0)
    s = tl.load(sin + turn, mask=live, other=0)
    t = t.to(tl.int64)[:, None]
    source = head(x, b, h) + t * x.t + d[None, :]
    target = head(y, b, h) + t * y.t + d[None, :]
    x1 = load_float(source, live, 0)
    x2 = load_float(source + HALF, live, 0)
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    tl.store(target, y1.to(y.ptr.dtype.element_ty), mask=live)
    tl.store(target + HALF, y2.to(y.ptr.dtype.element_ty), mask=live)


def new_heads(x):
    """An empty tensor of x's shape (B, H, T, Dh), laid out so that .transpose(1, 2) is contiguous.
    """
    B, H, T, Dh = x.shape
    return x.new_empty(B, T, H, Dh).transpose(1, 2)


def run_rotate(x, cos, sin):
    x = packed_channels(x)
    y = new_heads(x)
    B, H, T, Dh = x.shape
    BD = triton.next_power_of_2(Dh // 2)
    BT = max(1, 4096 // BD)
    launch(rotate_kernel, (B * H, triton.cdiv(T, BT)), x,
           rows(x), rows(y), cos.contiguous(), sin.contiguous(), H, T, Dh // 2, BD, BT)
    return y


@torch.library.custom_op("rat::rotate", mutates_args=())
def rotate_operator(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return run_rotate(x, cos, sin)


def keep_turn(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def rotate_gradient(ctx, dy):
    cos, sin = ctx.saved_tensors                       # read once: checkpointing allows no more
    return rotate_operator(dy, cos, -sin), None, None


rotate_operator.register_fake(lambda x, cos, sin: new_heads(x))
rotate_operator.register_autograd(rotate_gradient, setup_context=keep_turn)


def rotate(x, cos, sin):
    """RoPE of x (B, H, T, Dh) by the kernel: model.rotate. cos, sin: (T, Dh/2) float32, any
    strides.
    """
    require_alike("rotate", x=x)
    require_alike("rotate", cos=cos, sin=sin)
    if x.dim() != 4 or x.shape[3] % 2:
        raise ValueError(f"rotate: x is (B, H, T, even Dh), got {tuple(x.shape)}")
    shape = x.shape[2], x.shape[3] // 2
    same = cos.shape == shape and cos.device == x.device
    if not (same and cos.dtype == sin.dtype == torch.float32):
        raise ValueError(f"rotate: cos and sin must be {shape} float32 on {x.device}, "
                         f"got {described(cos)} and {described(sin)}")
    return rotate_operator(x, cos, sin) if recorded(x) else run_rotate(x, cos, sin)


# ---------------------------------------------------------------------------------------------
# Who sees whom, equation (4), and where a cache keeps a position
#
# These are the twins of model.allowed and of model.Layout. Tests compare each twin with its
# original over all positions and slots. Positions are int32 here.

FAR = tl.constexpr(2**30)  # a position that no query reaches; so T < 2^30
LOWEST = tl.constexpr(-3e38)                           # below all scores, but finite


class Span(NamedTuple):
    """A rule's sizes as a constant of a kernel.

    reach: the largest t - p of a key that a query sees and that is neither on the grid nor a sink.
    Loops over the window and the ring of a cache are this long. Today it equals the window; a new
    field of a pattern may make it longer.
    """
    dilation: int
    window: int
    sinks: int
    reach: int


def span_of(dilation, window, sinks):
    if min(dilation, window, sinks) < 0:
        raise ValueError(f"dilation, window, sinks must be >= 0: {dilation}, {window}, {sinks}")
    return Span(dilation, window, sinks, reach=window)


def span_within(T, dilation, window, sinks):
    """The sizes for sequences of T positions: a longer window and more sinks are cut to that."""
    return [dilation, min(window, T), min(sinks, T)]


@jit
def is_lasting(p, SPAN: tl.constexpr):
    """Is p a sink or on the grid? Once such a key is in the past, every later query sees it."""
    yes = p < SPAN.sinks
    if SPAN.dilation > 0:
        yes = yes | ((p + 1) % SPAN.dilation == 0)
    return yes


@jit
def allowed(t, p, SPAN: tl.constexpr):
    """Twin of model.allowed."""
    return (p <= t) & (is_lasting(p, SPAN) | (t - p <= SPAN.window))


@jit
def within(x, n: tl.constexpr):
    """0 <= x < n, in one comparison: as an unsigned number, a negative x is huge."""
    return x.to(tl.uint32, bitcast=True) < n


@jit
def sees_near(t, p, ITSELF: tl.constexpr, SPAN: tl.constexpr):
    """Is 1 <= t - p <= window? With ITSELF 1: is 0 <= t - p <= window?

    A field of patterns that makes `reach` longer than the window must make this true of all that a
    query sees within reach, lasting keys too.
    """
    return within(t - p - 1 + ITSELF, SPAN.window + ITSELF)


@jit
def count_lasting(t, SPAN: tl.constexpr):
    """How many lasting keys lie before position t."""
    n = tl.minimum(t, SPAN.sinks)
    if SPAN.dilation > 0:
        n += tl.maximum(t // SPAN.dilation - SPAN.sinks // SPAN.dilation, 0)
    return n


def count_lasting_host(t, span):
    """The same on the host: (how many sinks, how many positions of the grid behind them)."""
    sinks = min(span.sinks, t)
    grid = max(0, t // span.dilation - span.sinks // span.dilation) if span.dilation else 0
    return sinks, grid


@jit
def lasting(j, n, SPAN: tl.constexpr):
    """The position of the j-th of n lasting keys: first the sinks, then the grid behind them. FAR
    from the n-th on.
    """
    p = j
    if SPAN.dilation > 0:
        behind = j - SPAN.sinks + SPAN.sinks // SPAN.dilation
        p = tl.where(j < SPAN.sinks, j, (behind + 1) * SPAN.dilation - 1)
    return tl.where(j < n, p, FAR)


@jit
def slot_of(p, SPAN: tl.constexpr):
    """Twin of Layout.slot_of: the slot of position p, if it is kept."""
    slot = p
    if SPAN.reach > 0:
        slot = tl.where(p < SPAN.sinks, p, SPAN.sinks + p % SPAN.reach)
    if SPAN.dilation > 0:
        in_grid = SPAN.sinks + SPAN.reach + p // SPAN.dilation
        slot = tl.where((p + 1) % SPAN.dilation == 0, in_grid, slot)
    return slot


@jit
def position_in(slot, t, SPAN: tl.constexpr):
    """Twin of Layout.positions: the position in a slot after t tokens; FAR if the slot is empty."""
    p = slot
    if SPAN.reach > 0:
        in_ring = slot - SPAN.sinks
        latest = t - 1 - (t - 1 - in_ring) % SPAN.reach
        p = tl.where(in_ring < 0, p, latest)
    if SPAN.dilation > 0:
        in_grid = slot - SPAN.sinks - SPAN.reach
        p = tl.where(in_grid < 0, p, (in_grid + 1) * SPAN.dilation - 1)
    empty = (p < 0) | (p >= t) | (slot_of(p, SPAN) != slot)
    return tl.where(empty, FAR, p)


@jit
def slots_in_use(t, SPAN: tl.constexpr):
    """How many slots may hold a position after t tokens: all sinks, the ring as far as it was
    filled, the grid so far.
    """
    n = SPAN.sinks + tl.minimum(t, SPAN.reach)
    if SPAN.dilation > 0:
        n += t // SPAN.dilation
    return n


@jit
def slot_in_use(n, t, SPAN: tl.constexpr):
    """The n-th of them."""
    slot = n
    if SPAN.reach > 0:
        ring = tl.minimum(t, SPAN.reach)
        slot = tl.where(n < SPAN.sinks + ring, n, n + SPAN.reach - ring)
    return slot


# ---------------------------------------------------------------------------------------------
# Sparse attention, equations (3) and (4)
#
# What is slow: the definition scores all T x T pairs and then masks nearly all of them.
# The idea: the keys that a query at t sees are of three kinds, and for it each is of one only:
#
#   near       at most `reach` positions back, t itself too
#   grid       farther back, on the grid
#   sinks      farther back, a sink that is not on the grid
#
# In memory the keys of a kind lie at equal distances, so TMA can fetch tiles of BN of them. A
# program owns BM queries of one head. It goes through the tiles of each kind with an online softmax
# (m: largest score, l: sum, acc: weighted values). Most tiles are seen by all BM queries, so they
# need no mask. Without a window only the query itself is near. It then opens the softmax, by a
# product of rows instead of tiles. So cost grows with T / D + S + W.
#
# The backward pass and top-k attention take the grid and the sinks as one list of *lasting* keys,
# j -> p.
#
# Scores are in units of log2: scale = log2(e) / sqrt(Dh), so that exp2, which the hardware has,
# replaces exp. lse = m + log2(l) is kept for the backward pass. Grid: query tiles x B x H, the
# tiles of a head together (they share its keys in the L2 cache), those with most keys first.
# Bytes: q, y, and the own k and v, 4 x Dh per query and head, 8 Dh in bf16; the other keys are
# found in the L2 cache. FLOPs: 4 Dh x (t / D + S + W) per query. Limits: T < 2^30, and 1024 bytes a
# head. Offsets are 64-bit. flex_attention needs either all T keys under a mask, or two calls merged
# through memory.

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
def query_tile(H, T, BM: tl.constexpr):
    """(bh, b, h, i0) of this program, whose tile of queries begins at row i0. The last tiles of a
    head come first.
    """
    tiles = tl.cdiv(T, BM)
    bh = tl.program_id(0).to(tl.int64) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    return bh, bh // H, bh % H, tile * BM


NEAR = tl.constexpr(0)                                  # the kinds of keys
GRID = tl.constexpr(1)
SINKS = tl.constexpr(2)


@jit
def rows_seen(begin, end, origin, KIND: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr):
    """Which rows of a kind the queries at begin .. end - 1 see: (first, inner, whole, stop).

    They lie in [first, stop). `whole` of them, from `inner` on, are seen by all queries: they need
    no mask. That is a multiple of BN.
    """
    far_from_all = tl.maximum(begin - SPAN.reach, 0)                   # keys before this position
    far_from_last = tl.maximum(end - 1 - SPAN.reach, 0)
    if KIND == NEAR:
        first = far_from_all
        unseen = tl.maximum(end - 1 - SPAN.window - first, 0)          # by the last query
        inner = tl.minimum(first + tl.cdiv(unseen, BN) * BN, begin)
        whole = (begin - inner) // BN * BN
        found = first - origin, inner - origin, whole, end - origin
    elif KIND == GRID:
        whole = far_from_all // SPAN.dilation // BN * BN
        found = 0, 0, whole, far_from_last // SPAN.dilation
    else:
        found = 0, 0, 0, tl.minimum(far_from_last, SPAN.sinks)
    return found


@jit
def sees_rows(t, row, origin, KIND: tl.constexpr, SPAN: tl.constexpr):
    """Which of these rows of a kind the queries at t see: (len(t), len(row))."""
    if KIND == NEAR:
        sees = sees_near(t[:, None], (origin + row)[None, :], 1, SPAN)
    elif KIND == GRID:
        sees = ((row + 1) * SPAN.dilation - 1)[None, :] < t[:, None] - SPAN.reach
    else:
        sees = (row < SPAN.sinks)[None, :] & (row[None, :] < t[:, None] - SPAN.reach)
        if SPAN.dilation > 0:
            sees = sees & ((row + 1) % SPAN.dilation != 0)[None, :]    # those are on the grid
    return sees


@jit
def attend(q, k, v, b, h, t, begin, end, origin, scale, acc, l, m, KIND: tl.constexpr,
           SPAN: tl.constexpr, TMA: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
           BN: tl.constexpr, STAGES: tl.constexpr):
    """acc, l, m of the softmax after all keys of a kind. k, v: its rows, as tiles_of gives them."""
    first, inner, whole, stop = rows_seen(begin, end, origin, KIND, SPAN, BN)
    for row in tl.range(inner, inner + whole, BN, num_stages=STAGES):
        k_tile = load_tile(k, b, h, row, TMA, BN, DH, BD)
        v_tile = load_tile(v, b, h, row, TMA, BN, DH, BD)
        acc, l, m = add_scores(dot_rows(q, k_tile), v_tile, scale, acc, l, m)
    for i in tl.range(first, stop - whole, BN, num_stages=STAGES):     # the others, with a mask
        row = tl.where(i < inner, i, i + whole)
        k_tile = load_tile(k, b, h, row, TMA, BN, DH, BD)
        v_tile = load_tile(v, b, h, row, TMA, BN, DH, BD)
        sees = sees_rows(t, row + tl.arange(0, BN), origin, KIND, SPAN)
        acc, l, m = add_keys(q, k_tile, v_tile, sees, scale, acc, l, m)
    return acc, l, m


@jit
def attention_forward_kernel(
        q, k, v, y, near_k, near_v, grid_k, grid_v, sinks_k, sinks_v, lse,
        H, T, start, origin, scale,
        TMA: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """q, y: Rows of (B, H, T, Dh); k, v: Rows of (B, H, >= T, Dh); lse (B, H, T) float32. The first
    query is at position `start`, row r of k and v at position origin + r.

    near, grid, sinks: the rows of each kind, as tiles_of gives them. Row r of near is row r of k,
    row j of grid is the j-th position of the grid, row p of sinks is position p.
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    t = start + i
    begin = start + i0
    end = start + tl.minimum(i0 + BM, T)
    q_tile = load_rows(q, b, h, i, live, DH, BD)                                        # (BM, BD)
    if SPAN.reach > 0:
        m = tl.full((BM,), LOWEST, tl.float32)         # with -inf, a masked tile would give NaN
        l = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, BD), tl.float32)
    else:
        own_k = load_rows(k, b, h, t - origin, live, DH, BD)
        m = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        l = tl.full((BM,), 1, tl.float32)
        acc = load_rows(v, b, h, t - origin, live, DH, BD).to(tl.float32)
    if SPAN.sinks > 0:
        acc, l, m = attend(q_tile, sinks_k, sinks_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           SINKS, SPAN, TMA, DH, BD, BN, STAGES)
    if SPAN.dilation > 0:
        acc, l, m = attend(q_tile, grid_k, grid_v, b, h, t, begin, end, 0, scale, acc, l, m,
                           GRID, SPAN, TMA, DH, BD, BN, STAGES)
    if SPAN.reach > 0:
        acc, l, m = attend(q_tile, near_k, near_v, b, h, t, begin, end, origin, scale, acc, l, m,
                           NEAR, SPAN, TMA, DH, BD, BN, STAGES)
    store_rows(y, b, h, i, acc / l[:, None], live, DH, BD)
    tl.store(lse + bh * T + i, m + tl.log2(l), mask=live)


# The backward pass. With P the softmax (from lse), dO the gradient of y, and delta_t = dO_t . y_t:
#
#   dS = P * (dO V^T - delta)     dQ = dS K / sqrt(Dh)     dK = dS^T Q / sqrt(Dh)     dV = P^T dO
#
# dQ goes by queries, like the forward pass, and computes delta on the way. dK and dV go by keys, in
# a kernel that runs over the lasting keys and, if there is a window, over all others. Without a
# window only its own query sees such a key; then the dQ kernel writes its dK and dV (ALONE).
# `attention_backward` decides this, so each row is written exactly once.
#
# Lasting keys are few, and all later queries see them: with D 64 and T 4096 there is one tile of
# keys a head, far too few programs. So the queries of a tile are split over several programs. Their
# float32 sums go through memory and are added in a fixed order: the same input gives the same
# gradient, to the bit. Atomic additions would not.
#
# Bytes, bf16, per query and head: dQ reads q, k, v, y, dO and writes dq, ALONE dk, dv too: 12 or 16
# Dh. dK, dV read q, dO once per key tile, mostly from the L2 cache: the tiles of a head run side by
# side. FLOPs: 6 and 8 Dh per pair, where the forward pass has 4.

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
        H, T, scale, factor,
        ALONE: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """As the forward kernel at start 0, without a cache, but the own key is apart, window or not.
    delta (B, H, T) float32; factor: 1 / sqrt(Dh).
    """
    bh, b, h, t0 = query_tile(H, T, BM)
    t = t0 + tl.arange(0, BM)
    live = t < T
    end = tl.minimum(t0 + BM, T)
    lse_t = tl.load(lse + bh * T + t, mask=live, other=float("inf"))
    dy_tile = load_rows(dy, b, h, t, live, DH, BD)                                      # (BM, BD)
    y_tile = load_rows(y, b, h, t, live, DH, BD)
    delta_t = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(delta + bh * T + t, delta_t, mask=live)
    q_tile = load_rows(q, b, h, t, live, DH, BD)
    own_k = load_rows(k, b, h, t, live, DH, BD).to(tl.float32)
    own_v = load_rows(v, b, h, t, live, DH, BD).to(tl.float32)
    own_prob = tl.exp2(tl.sum(q_tile.to(tl.float32) * own_k, 1) * scale - lse_t)
    own_ds = own_prob * (tl.sum(dy_tile.to(tl.float32) * own_v, 1) - delta_t)
    if ALONE:
        mine = live & (is_lasting(t, SPAN) == 0)
        store_rows(dk, b, h, t, (own_ds * factor)[:, None] * q_tile.to(tl.float32), mine, DH, BD)
        store_rows(dv, b, h, t, own_prob[:, None] * dy_tile.to(tl.float32), mine, DH, BD)
    acc = own_ds[:, None] * own_k
    n = count_lasting(tl.maximum(end - 1 - SPAN.reach, 0), SPAN)
    for j0 in tl.range(0, n, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        p = lasting(j, n, SPAN)
        k_tile = load_rows(k, b, h, p, j < n, DH, BD)
        v_tile = load_rows(v, b, h, p, j < n, DH, BD)
        sees = p[None, :] < t[:, None] - SPAN.reach
        acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    if SPAN.reach > 0:
        near = tl.maximum(t0 - SPAN.reach, 0)
        for p0 in tl.range(near, end, BN, num_stages=STAGES):
            p = p0 + tl.arange(0, BN)
            k_tile = load_rows(k, b, h, p, p < T, DH, BD)
            v_tile = load_rows(v, b, h, p, p < T, DH, BD)
            sees = sees_near(t[:, None], p[None, :], 0, SPAN)
            acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
    store_rows(dq, b, h, t, acc * factor, live, DH, BD)


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
        q, k, v, dy, dk, dv, part, lse, delta,
        H, T, scale, factor, n, tiles, splits,
        LASTING: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr,
        BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """dk and dv of a tile of the n lasting keys (LASTING), or of the others among n = T, from one
    of `splits` shares of the queries that see it. SPLIT: to part, Rows of (2, splits * B * H, n,
    Dh) float32, instead of dk, dv.
    """
    program = tl.program_id(0).to(tl.int64)
    tile = (program % tiles).to(tl.int32)
    split = program // tiles % splits
    bh = program // tiles // splits
    b = bh // H
    h = bh % H
    j = tile * BN + tl.arange(0, BN)
    if LASTING:
        p = lasting(j, n, SPAN)
        live = j < n
        end = T
    else:
        p = j
        live = (j < n) & (is_lasting(j, SPAN) == 0)    # lasting rows are computed in vain
        end = tl.minimum(tile * BN + BN + SPAN.reach, T)
    first = tl.min(p)
    k_tile = load_rows(k, b, h, p, live, DH, BD)                                        # (BN, BD)
    v_tile = load_rows(v, b, h, p, live, DH, BD)
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BD), tl.float32)
    query_tiles = tl.cdiv(end - first, BM)
    from_tile = (query_tiles * split // splits).to(tl.int32)
    to_tile = (query_tiles * (split + 1) // splits).to(tl.int32)
    for number in tl.range(from_tile, to_tile, num_stages=STAGES):
        t = first + number * BM + tl.arange(0, BM)                                      # (BM,)
        q_tile = load_rows(q, b, h, t, t < end, DH, BD)
        dy_tile = load_rows(dy, b, h, t, t < end, DH, BD)
        lse_t, delta_t = load_sums(lse + bh * T, delta + bh * T, t, t < end)
        if LASTING:
            sees = p[:, None] <= t[None, :]
        else:
            sees = sees_near(t[None, :], p[:, None], 1, SPAN)
        _, acc_k, acc_v = add_dkv(k_tile, v_tile, q_tile, dy_tile, sees, lse_t, delta_t, scale,
                                  acc_k, acc_v)
    if SPLIT:
        place = split * (tl.num_programs(0) // tiles // splits) + bh
        store_rows(part, 0, place, j, acc_k * factor, live, DH, BD)
        store_rows(part, 1, place, j, acc_v, live, DH, BD)
    else:
        store_rows(dk, b, h, p, acc_k * factor, live, DH, BD)
        store_rows(dv, b, h, p, acc_v, live, DH, BD)


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


def head_constants(tiles, q, span):
    """The constants that the attention kernels share for q (B, H, T, Dh). ValueError for heads that
    are too wide.
    """
    Dh = q.shape[-1]
    BD = max(16, triton.next_power_of_2(Dh))
    row_bytes = max(128, BD * q.element_size())
    if row_bytes > 1024:
        raise ValueError(f"attention: a head of {Dh} channels in {q.dtype} is too wide, "
                         "the limit is 1024 bytes")
    return dict(SPAN=span, DH=Dh, BD=BD, **tiles[row_bytes])


def log2_scale(q):
    return math.log2(math.e) / math.sqrt(q.shape[-1])


def keys_of(k, v, end, span, constants, cache=None):
    """near_k, near_v, grid_k, grid_v, sinks_k, sinks_v for the forward kernel; None for a kind that
    the span has not. k and v end before position `end`. cache: a model.GroupCache that holds the
    grid up to there and the sinks; else they are rows of k and v.
    """
    near = k, v
    dilation = max(1, span.dilation)
    if cache:
        source = [packed_rows(x) for x in (cache.k, cache.v)]
        first = cache.layout.before_grid
        grid = [x[:, :, first:first + end // dilation] for x in source]
    else:
        source = near
        grid = [x[:, :, dilation - 1::dilation] for x in near]
    sinks = [x[:, :, :span.sinks] for x in source]
    found = []
    for kind, used in (near, span.reach), (grid, span.dilation), (sinks, span.sinks):
        for x, stand_in in zip(kind, near):
            rows_there = x if x.numel() else stand_in
            tiles = tiles_of(rows_there, constants["BN"], constants["BD"]) if used else None
            found.append(tiles)
    return found


def run_attention(q, k, v, span, start=0, cache=None):
    """y (B, H, T, Dh) and lse (B, H, T) of queries from position `start` on; k and v end where q
    does. cache: as in keys_of, for k and v that do not begin at position 0.
    """
    span = span_of(*span)
    y, lse = new_attention(q, k, v, span)
    if y.numel() == 0:
        return y, lse
    q = packed_channels(q)
    k, v = packed_rows(k), packed_rows(v)
    B, H, T, _ = q.shape
    constants = head_constants(FORWARD_TILES, q, span)
    end = start + T
    origin = end - k.shape[2]
    launch(attention_forward_kernel, triton.cdiv(T, constants["BM"]) * B * H, q,
           *rows_of(q, k, v, y), *keys_of(k, v, end, span, constants, cache), lse,
           H, T, start, origin, log2_scale(q), TMA=has_tma(q), **constants)
    return y, lse


def new_attention(q, k, v, span):
    return new_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("rat::attention", mutates_args=())
def attention_operator(
        q: Tensor, k_rec: Tensor, v_rec: Tensor, span: list[int]) -> tuple[Tensor, Tensor]:
    return run_attention(q, k_rec, v_rec, span)


@torch.library.custom_op("rat::attention_backward", mutates_args=())
def attention_backward(
        dy: Tensor, q: Tensor, k_rec: Tensor, v_rec: Tensor, y: Tensor, lse: Tensor, span: list[int]
        ) -> list[Tensor]:
    """dq, dk_rec, dv_rec (B, H, T, Dh)."""
    span = span_of(*span)
    dq, dk, dv = new_attention_gradients(dy, q, k_rec, v_rec)
    q, k, v, dy = (packed_channels(x) for x in (q, k_rec, v_rec, dy))
    delta = torch.empty_like(lse)
    B, H, T, Dh = q.shape
    scales = log2_scale(q), 1 / math.sqrt(Dh)
    alone = span.reach == 0
    constants = head_constants(Q_TILES, q, span)
    launch(attention_backward_q_kernel, triton.cdiv(T, constants["BM"]) * B * H, q,
           *rows_of(q, k, v, y, dy, dq, dk, dv), lse, delta, H, T, *scales,
           ALONE=alone, **constants)

    def by_keys(constants, n, lasting, splits=1, part=None):
        """dk and dv of n keys: the lasting ones, or all others."""
        tiles = triton.cdiv(n, constants["BN"])
        launch(attention_backward_kv_kernel, tiles * splits * B * H, q,
               *rows_of(q, k, v, dy, dk, dv), rows(dk if part is None else part), lse, delta,
               H, T, *scales, n, tiles, splits,
               LASTING=lasting, SPLIT=part is not None, **constants)

    if not alone:
        by_keys(head_constants(KV_TILES, q, span), T, lasting=False)
    backward_lasting(by_keys, q, dk, dv, span)
    return [dq, dk, dv]


def new_attention_gradients(dy, q, k_rec, v_rec, *rest):
    """Empty outputs of attention_backward."""
    return [new_heads(x) for x in (q, k_rec, v_rec)]


def backward_lasting(by_keys, q, dk, dv, span):
    """dk and dv of the lasting keys, their queries split over as many programs as fill the GPU."""
    B, H, T, Dh = q.shape
    sinks, grid = count_lasting_host(T, span)
    n = sinks + grid
    if n == 0:
        return
    constants = head_constants(KV_TILES, q, span)
    constants["BN"] = min(constants["BN"], max(16, triton.next_power_of_2(n)))
    programs = max(1, triton.cdiv(n, constants["BN"]) * B * H)
    splits = max(1, min(8 * PROCESSORS // programs, T // 512))
    if splits == 1:
        by_keys(constants, n, lasting=True)
        return
    part = q.new_empty(2, splits * B * H, n, Dh, dtype=torch.float32)
    by_keys(constants, n, lasting=True, splits=splits, part=part)
    total = part.view(2, splits, B, H, n, Dh).sum(1)
    for gradient, found in zip((dk, dv), total):
        gradient[:, :, :sinks] = found[:, :, :sinks]
        if grid:
            first = (span.sinks // span.dilation + 1) * span.dilation - 1
            gradient[:, :, first::span.dilation] = found[:, :, sinks:]


def keep_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.span = inputs[3]


def attention_gradient(ctx, dy, dlse):
    return *attention_backward(dy, *ctx.saved_tensors, ctx.span), None


attention_operator.register_fake(new_attention)
attention_operator.register_autograd(attention_gradient, setup_context=keep_attention)
attention_backward.register_fake(new_attention_gradients)


def in_autocast_dtype(*tensors):
    """The tensors in autocast's dtype, where it is on: as PyTorch's own attention does."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    return tensors


def attention(q, k_rec, v_rec, dilation, window, sinks):
    """Equation (3) by the kernel: model.attention, with the same arguments and result.

    q, k_rec, v_rec: (B, H, T, Dh), one dtype, any strides. ValueError for what does not match, and
    for too wide heads.
    """
    q, k_rec, v_rec = in_autocast_dtype(q, k_rec, v_rec)
    require_alike("attention", q=q, k_rec=k_rec, v_rec=v_rec)
    require(q.dim() == 4 and q.dtype == k_rec.dtype == v_rec.dtype,
            "attention: q, k_rec, v_rec are (B, H, T, Dh) of one dtype, got {}, {}, {}",
            q.dtype, k_rec.dtype, v_rec.dtype)
    span = span_within(q.shape[2], dilation, window, sinks)
    run = attention_operator if recorded(q, k_rec, v_rec) else run_attention
    return run(q, k_rec, v_rec, span)[0]


def attention_chunk(q, k_local, v_local, cache, start):
    """Equation (3) for a chunk of T tokens that continues a sequence at position `start`: (B, h, T,
    Dh).

    q: (B, h, T, Dh). k_local, v_local: (B, h, L, Dh), the last L = min(reach, start) + T
    positions. cache: model.GroupCache, in whose sinks and grid the chunk is stored already. A
    lasting key beyond reach is read from there, every other from k_local.
    """
    y, _ = run_attention(q, k_local, v_local, cache.layout.span, start, cache)
    return y


# ---------------------------------------------------------------------------------------------
# Decoding: one token of each sequence, all that lies between in_proj and out_proj
#
# What is slow: a dozen small operations, each a launch, and a mask over slots. Here it is one
# launch per head group. A head has `splits` programs. Each loads the token, which is one head wide,
# and attends over its share of the slots, which is nearly all the bytes. The last of them to get
# there does the rest: it joins the shares, adds the token as one more key, and stores. If a head
# has one program, there are no shares to join. For B sequences of h heads and n slots in use, in
# bf16:
#
#   all         read 4 B h n Dh bytes, and 18 B h splits Dh of in_proj's output and the state;
#               write their shares, 4 B h splits (Dh + 2), if a head has several programs
#   the last    read the shares; write 8 B h Dh of state, 4 of a key and a value, 2 of y
#
# H100, 3.0 TB/s, width 2048 in bf16, one layer: 128 sequences at T 4096 hold n = 4096 (D1), 256
# (D16), 64 (D64) or 516 (D16W256S4) slots = 4.29, 0.27, 0.07, 0.54 GB, hence 1.43, 0.09, 0.02, 0.18
# ms; in_proj and out_proj add 50 MB, 0.02 ms.
#
# The number of tokens seen, `seen`, is read on the device. So a CUDA graph recorded once serves
# every position.
#
# A key is used once, by one query: two multiply-adds per channel read. That is far too little for
# tensor cores to matter, so the arithmetic is float32 on the ordinary cores. What matters is that
# loads are always under way. So each of the BN rows of a tile has its own running softmax (m, l,
# acc), and the loop's sums need no barrier, as a row of up to 256 channels lies in one warp. Rows,
# then shares, meet once at the end. (The usual order, one maximum per tile, would meet in every
# iteration.)
#
#   row r, slots r, r + BN, ...:      s = q . k~_p log2(e) / sqrt(Dh)     m' = max(m, s)
#                                     l' = l 2^(m - m') + 2^(s - m')
#                                     acc' = acc 2^(m - m') + 2^(s - m') v~_p
#   meeting:                          M = max m,  y = sum 2^(m - M) acc / sum 2^(m - M) l
#
# q and k~ are those after RoPE.
#
# Limits: B h < 2^31, positions < 2^30; any even Dh, padded to a power of 2 in registers only.


@jit
def load_channels(x, b, h, d, DH: tl.constexpr):
    """Channels d of head h of sequence b, float32. x: Rows of (B, H, 1, Dh)."""
    return load_float(head(x, b, h) + d, d < DH, 0.0)


@jit
def store_channels(x, b, h, d, values, DH: tl.constexpr):
    tl.store(head(x, b, h) + d, values.to(x.ptr.dtype.element_ty), mask=d < DH)


@jit
def partner(d, DH: tl.constexpr):
    """The channel that RoPE turns together with channel d."""
    return tl.where(d < DH // 2, d + DH // 2, d - DH // 2)


@jit
def load_turn(cos, sin, d, DH: tl.constexpr):
    """What RoPE multiplies channel d and its partner by. cos, sin: (Dh / 2,) float32."""
    first_half = d < DH // 2
    i = tl.where(first_half, d, d - DH // 2)
    c = tl.load(cos + i, mask=d < DH, other=0.0)
    s = tl.load(sin + i, mask=d < DH, other=0.0)
    return c, tl.where(first_half, -s, s)


@jit
def load_query(q, b, h, cos_d, sin_d, d, scale, DH: tl.constexpr):
    """The query after RoPE, times scale: (BD,). cos_d, sin_d: of load_turn."""
    x = load_channels(q, b, h, d, DH)
    x_partner = load_channels(q, b, h, partner(d, DH), DH)
    return (x * cos_d + x_partner * sin_d) * scale


@jit
def recur(x, g, state, b, h, d, DH: tl.constexpr):
    """Equation (2) for channels d of one token."""
    a, rest = decay(load_channels(g, b, h, d, DH))
    return a * load_channels(state, b, h, d, DH) + rest * load_channels(x, b, h, d, DH)


@jit
def this_token(q, cos, sin, seen, H, scale, EARLY: tl.constexpr, DH: tl.constexpr,
               BD: tl.constexpr):
    """What every program begins with: bh, b, h, the token's position t, d (BD,), cos_d and sin_d,
    and the query. EARLY: the kernel before this one may still run, so it is waited for.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()          # the next kernel may start, and wait
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    t = tl.load(seen).to(tl.int32)
    d = tl.arange(0, BD)
    cos_d, sin_d = load_turn(cos, sin, d, DH)
    return bh, b, h, t, d, cos_d, sin_d, load_query(q, b, h, cos_d, sin_d, d, scale, DH)


@jit
def new_token(
        o, k, v, g, k_state, v_state, cos_d, sin_d, b, h, d,
        RECURRENCE: tl.constexpr, DH: tl.constexpr):
    """What the last program of a head needs besides q: the gate, k~, v~, and k~ after RoPE, each
    (BD,). All programs load it first, so that it is there when the last one needs it.
    """
    gate = tl.sigmoid(load_channels(o, b, h, d, DH))
    other = partner(d, DH)
    if RECURRENCE:                                                                      # (2)
        k_rec = recur(k, g, k_state, b, h, d, DH)
        v_rec = recur(v, g, v_state, b, h, d, DH)
        k_other = recur(k, g, k_state, b, h, other, DH)
    else:
        k_rec = load_channels(k, b, h, d, DH)
        v_rec = load_channels(v, b, h, d, DH)
        k_other = load_channels(k, b, h, other, DH)
    return gate, k_rec, v_rec, k_rec * cos_d + k_other * sin_d


@jit
def share_of(tiles):
    """The first of this program's tiles, and the end. Shares differ by one tile at most."""
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    return tiles * split // splits, tiles * (split + 1) // splits


@jit
def no_rows(BN: tl.constexpr, BD: tl.constexpr):
    """acc, l, m before the first tile."""
    acc = tl.zeros((BN, BD), tl.float32)
    return acc, tl.zeros((BN,), tl.float32), tl.full((BN,), LOWEST, tl.float32)


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
    """Is this the last of n programs to get here? It then sees what the others have stored."""
    tl.debug_barrier()                                 # all threads of this program have stored
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    if before == n - 1:
        tl.store(arrived, 0)                           # for the next launch
    return before == n - 1


@jit
def finish_share(
        y, k_state, v_state, k_cache, v_cache, partial, arrived,
        acc, l, m, q_row, new, d, bh, b, h, t,
        RECURRENCE: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr, BS: tl.constexpr):
    """Store this program's share. The last program of a head, or its only one, finishes the token.
    """
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
        finish_token(y, k_state, v_state, k_cache, v_cache, acc, l, m, q_row, new, d, b, h, t,
                     RECURRENCE, SPAN, DH)


@jit
def load_shares(partial, splits, d, DH: tl.constexpr, BS: tl.constexpr):
    """acc (BS, BD), l and m (BS,): what the programs of a head have found."""
    split = tl.arange(0, BS)
    partial += split * (DH + 2)                                                         # (BS,)
    m = tl.load(partial + DH, mask=split < splits, other=LOWEST, cache_modifier=".cg")
    l = tl.load(partial + DH + 1, mask=split < splits, other=0.0, cache_modifier=".cg")
    some = (split < splits)[:, None] & (d < DH)[None, :]
    at = partial[:, None] + d[None, :]
    return tl.load(at, mask=some, other=0.0, cache_modifier=".cg"), l, m


@jit
def finish_token(
        y, k_state, v_state, k_cache, v_cache, acc, l, m, q_row, new, d, b, h, t,
        RECURRENCE: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr):
    """The token itself in the softmax, the gate, the store.

    The token is stored last: its ring slot held position t - reach, which the query had to see.
    """
    gate, k_rec, v_rec, k_turned = new
    tl.debug_barrier()                                 # all threads have read state and slots
    if RECURRENCE:
        store_channels(k_state, b, h, d, k_rec, DH)
        store_channels(v_state, b, h, d, v_rec, DH)
    own_score = tl.sum(q_row * k_turned, axis=0)
    top = tl.maximum(m, own_score)
    fade = tl.exp2(m - top)
    own = tl.exp2(own_score - top)
    attended = (fade * acc + own * v_rec) / (fade * l + own)                            # (3)
    store_channels(y, b, h, d, gate * attended, DH)                                     # (5)
    if allowed(t + 1, t, SPAN):  # the next query may need it
        slot = slot_of(t, SPAN).to(tl.int64)
        k_slot = head(k_cache, b, h) + slot * k_cache.t + d
        v_slot = head(v_cache, b, h) + slot * v_cache.t + d
        tl.store(k_slot, k_turned.to(k_cache.ptr.dtype.element_ty), mask=d < DH)
        tl.store(v_slot, v_rec.to(v_cache.ptr.dtype.element_ty), mask=d < DH)


@jit
def decode_kernel(
        y, o, q, k, v, g, k_state, v_state,
        cos, sin, k_cache, v_cache, seen, partial, arrived,
        H, scale,
        RECURRENCE: tl.constexpr, SPAN: tl.constexpr, EARLY: tl.constexpr, DH: tl.constexpr,
        BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Program (bh, split): attention of the token over its share of the slots in use. The last
    program of a head finishes the token.

    partial (B * H, splits, Dh + 2) float32: acc, m, l. arrived (B * H,) int32: zeros, before and
    after. Slots that hold no allowed position are not loaded.
    """
    bh, b, h, t, d, cos_d, sin_d, q_row = this_token(q, cos, sin, seen, H, scale, EARLY, DH, BD)
    new = new_token(o, k, v, g, k_state, v_state, cos_d, sin_d, b, h, d, RECURRENCE, DH)
    in_use = slots_in_use(t, SPAN)
    acc, l, m = no_rows(BN, BD)
    first, end = share_of(tl.cdiv(in_use, BN))
    for tile in tl.range(first, end, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN)
        slot = slot_in_use(n, t, SPAN)
        here = n < in_use
        if SPAN.sinks + SPAN.reach > 0:                # else all of them are on the grid
            here = here & allowed(t, position_in(slot, t, SPAN), SPAN)
        k_tile = load_rows(k_cache, b, h, slot, here, DH, BD)                           # (BN, BD)
        v_tile = load_rows(v_cache, b, h, slot, here, DH, BD)
        acc, l, m = add_rows(q_row, k_tile, v_tile, here, acc, l, m)
    finish_share(y, k_state, v_state, k_cache, v_cache, partial, arrived, acc, l, m, q_row, new,
                 d, bh, b, h, t, RECURRENCE, SPAN, DH, BS)


def token_rows(x):
    """x (B, h, Dh) as Rows of (B, h, 1, Dh)."""
    return rows(x[:, :, None])


def split_count(programs, slots, BN, device):
    """How many programs share the slots of a head, at most 32. They are to be about four on each
    processor of the GPU, with at least two tiles for each once the cache is full.
    """
    if device.type != "cuda":
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(32, slots // (2 * BN), 4 * units // max(1, programs)))


def require_token(token, cache):
    """ValueError unless the parts of a token fit each other and the cache."""
    require_alike("decode", **{name: x for name, x in zip("oqkvg", token) if x is not None})
    q = token[1]
    B, h, _, Dh = cache.k.shape
    same = q.dtype == cache.k.dtype and q.device == cache.k.device
    require(same and q.shape == (B, h, Dh),
            "decode: the token is {} {} on {}, the cache wants {} {} on {}",
            tuple(q.shape), q.dtype, q.device, (B, h, Dh), cache.k.dtype, cache.k.device)
    require(all(x.stride(-1) == 1 for x in token if x is not None),
            "decode: the channels of a head must be neighbours in memory")


def early_start(x):
    """Arguments by which a decoding kernel may start while the one before it ends (programmatic
    dependent launch), on GPUs that can.
    """
    return dict(EARLY=True, launch_pdl=True) if since_hopper(x) else dict(EARLY=False)


def launch_decode(kernel, token, cache, rope, seen, splits, *arguments, **constants):
    """Run a kernel of one program per head and split on a token and a cache. Returns y (B, h, Dh).

    arguments, constants: what this kernel takes besides those of decode_kernel.
    """
    o, q, k, v, g = token
    B, h, Dh = q.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial = q.new_empty(B * h, splits, Dh + 2, dtype=torch.float32)
    gate, state = (k, (k, v)) if g is None else (g, cache.state)       # without g placeholders
    parts = [token_rows(x) for x in (y, o, q, k, v, gate, *state)]
    launch(kernel, (B * h, splits), q, *parts, *rope, *rows_of(cache.k, cache.v), seen, partial,
           cache.arrived, h, log2_scale(q), *arguments,
           RECURRENCE=g is not None, DH=Dh, BD=triton.next_power_of_2(Dh),
           BS=triton.next_power_of_2(splits), **early_start(q), **constants)
    return y


def decode(token, cache, rope, seen, splits=None):
    """Equations (2) to (5), but for out_proj, for one token and one head group:
    model.GroupCache.step. Returns (B, h, Dh).

    token: o, q, k, v, g, each (B, h, Dh), channels packed, any other strides; g None without
    recurrence. cache: model.GroupCache with k, v (B, h, slots, Dh), state (2, B, h, Dh) float32,
    layout and arrived. Its state is replaced by the token's, and the token is stored if the next
    query may use it. rope: cos and sin (1, Dh/2) float32 of the token's position. seen: (1,) int64
    on the device, that position. splits: how many programs share a head's slots; None: enough to
    fill the GPU. ValueError for what does not match.
    """
    require_token(token, cache)
    B, h, Dh = token[1].shape                          # of q
    slots = cache.k.shape[2]
    BD = triton.next_power_of_2(Dh)
    BN = max(2048 // BD, 16)                           # 16 keys of 128 channels
    warps = BN * BD // 1024                            # 32 channels of a tile for each thread
    splits = splits or split_count(B * h, slots, BN, cache.k.device)
    return launch_decode(decode_kernel, token, cache, rope, seen, splits,
                         SPAN=span_of(*cache.layout.span), BN=BN, STAGES=3, num_warps=warps,
                         maxnreg=128)


# ---------------------------------------------------------------------------------------------
# Top-k blocks: the choice
#
# model.attention_topk defines it: a query scores each block before its own by a summary of the
# block's keys, and attends to K blocks of N keys in full: its own, up to itself, and the K - 1
# others of the best scores. In the same softmax it sees what equation (4) allows elsewhere.
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
# and no atomic addition, and lists are in the order of queries. The words take n / 8 bytes a query
# and head, 1 / 8 of q at T 16384. `attention_topk` cuts long calls, so memory grows with T.
#
# choose   grid B H T / 64; reads q, and the summaries from the L2 cache; 2 Dh n FLOPs a query, 2 %
#          of dense attention's at N 64; what it takes is the search, about 60 instructions a score.
# list     the same grid; reads and writes K ints a query.
# Limits: B H T K < 2^31; K up to 64 or so, as more overflow the lanes and are sought by bisection.

WORD = tl.constexpr(64)                                # queries that share a word
BOTTOM = tl.constexpr(-0x7f800001 * 2**31)             # -inf as the search has it


@jit
def minima(summaries, DH: tl.constexpr):
    """Of summaries for minmax, the second half."""
    return Rows(summaries.ptr + DH, summaries.b, summaries.h, summaries.t)


@jit
def score_blocks(q, summaries, b, h, block, own, stop, MINMAX: tl.constexpr, DH: tl.constexpr,
                 BD: tl.constexpr):
    """Scores (BM, BN) of blocks (BN,) for q (BM, BD); -inf from the query's own block on. Blocks
    before `stop` are read. NaN counts as the least score.
    """
    high = load_rows(summaries, b, h, block, block < stop, DH, BD)                      # (BN, BD)
    if MINMAX:  # maxima, then minima
        low = load_rows(minima(summaries, DH), b, h, block, block < stop, DH, BD)
        positive = tl.where(q > 0, q, 0).to(q.dtype)
        negative = tl.where(q > 0, 0, q).to(q.dtype)
        s = dot_rows(positive, high)
        s += dot_rows(negative, low)                   # one product, begun from the other's sums
    else:
        s = dot_rows(q, high)
    is_past = block[None, :] < own[:, None]
    return tl.where(is_past, tl.maximum(s, LOWEST), -float("inf"))


@jit
def in_order(x):
    """The bits of a float32 as an int32 of the same order, and back."""
    return x ^ ((x >> 31) & 0x7fffffff)


@jit
def number_at(order):
    """The float32 of a place in that order."""
    return in_order(order).to(tl.float32, bitcast=True)


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
        N: tl.constexpr, MINMAX: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
        BN: tl.constexpr, STAGES: tl.constexpr):
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
    q_tile = load_rows(q, b, h, i0 + row, live, DH, BD)
    column = tl.arange(0, BN)

    first = tl.full((WORD, BN), -float("inf"), tl.float32)             # of each lane, best first
    second = first
    third = first
    fourth = first
    for b0 in tl.range(0, end, BN, num_stages=STAGES):
        block = b0 + column
        s = score_blocks(q_tile, summaries, b, h, block, own, end - 1, MINMAX, DH, BD)
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
        bar = number_at((order >> 31).to(tl.int32))
        until = 0x7fffffff - (order & 0x7fffffff).to(tl.int32)         # of blocks just at the bar
        count = tl.zeros((WORD,), tl.int32)
        for b0 in tl.range(0, end, BN, num_stages=STAGES):
            block = b0 + column
            s = score_blocks(q_tile, summaries, b, h, block, own, end - 1, MINMAX, DH, BD)
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
        K: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
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
#   join     y = sum_j 2^(lse_j - M) part_j / sum_j 2^(lse_j - M), and the granted keys: those that
#            equation (4) allows outside the chosen blocks
#
# blocks: a program holds the keys of one block and goes through its list in tiles of BM pairs. Grid
# B H n, heads slowest: the queries of a head, 4 MB at T 16384, stay in the L2 cache. 4 Dh N K FLOPs
# a query. join: a program takes BM queries, and adds in one order, in float32. Granted keys are
# the lasting ones and all others in the window, unless the word of their block has the query's bit;
# the own block's word has it too.
#
# T 16384, H 16, Dh 128, N 64, K 16, bf16: the parts are 1.07 GB, written and read: 0.72 ms at 3.0
# TB/s; 137 GFLOP are 0.18 ms at 745 TFLOP/s, under the writing. T 65536: four times that.
# Limits: as attention's; N of any size, padded to a power of 2 that is at least 16.

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
def load_pairs(pairs, e0, list_end, T, K: tl.constexpr, BM: tl.constexpr):
    """BM pairs of a list, from e0 on, and which of them there are."""
    e = e0 + tl.arange(0, BM)
    pair = tl.load(pairs + e, mask=e < list_end, other=-1)
    return pair, (pair >= 0) & (pair < T * K)          # no wrong list leads out of the parts


@jit
def blocks_kernel(
        q, k, v, part, part_lse, pairs, ends,
        H, T, start, n, end, scale,
        K: tl.constexpr, N: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Program (bh, block). q: Rows of (B, H, T, Dh), the first at position `start`; k, v: Rows of
    (B, H, end, Dh); part: Rows of (B, H, T * K, Dh); part_lse (B, H, T * K) float32.
    """
    at, bh, b, h, block = key_block(H, n)
    p0 = block * N
    p = p0 + tl.arange(0, BN)
    stop = tl.minimum(p0 + N, end)
    k_tile = load_rows(k, b, h, p, p < stop, DH, BD)                                    # (BN, BD)
    v_tile = load_rows(v, b, h, p, p < stop, DH, BD)
    part_lse += bh * T * K
    list_begin, list_end = block_list(ends, at, T)
    for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
        pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                          # (BM,)
        i = pair // K
        q_tile = load_rows(q, b, h, i, live, DH, BD)                                    # (BM, BD)
        t = tl.minimum(start + i, stop - 1)
        sees = p[None, :] <= t[:, None]
        s = tl.where(sees, dot_rows(q_tile, k_tile), -float("inf"))                     # (BM, BN)
        m = tl.max(s, 1) * scale                       # a number: the first key is seen by all
        weight = tl.exp2(s * scale - m[:, None])
        l = tl.sum(weight, 1)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision="ieee")           # (BM, BD)
        for more in range(BN, N, BN):  # the rest of a large block
            here = p + more < stop
            k_more = load_rows(k, b, h, p + more, here, DH, BD)
            v_more = load_rows(v, b, h, p + more, here, DH, BD)
            sees = (p + more)[None, :] <= t[:, None]
            acc, l, m = add_keys(q_tile, k_more, v_more, sees, scale, acc, l, m)
        acc *= (1 / l)[:, None]
        store_rows(part, b, h, pair, acc, live, DH, BD)
        tl.store(part_lse + pair, m + tl.log2(l), mask=live)


@jit
def granted_tiles(lasts, near, end, SPAN: tl.constexpr, BN: tl.constexpr):
    """How many tiles of BN granted keys there are: `lasts` lasting ones, and all from position
    `near` to `end`, if there is a window.
    """
    tiles = tl.cdiv(lasts, BN)
    if SPAN.reach > 0:
        tiles += tl.cdiv(end - near, BN)
    return tiles


@jit
def granted_keys(tile, lasts, near, SPAN: tl.constexpr, BN: tl.constexpr):
    """Positions (BN,) in such a tile, and how far behind its query each may lie."""
    j = tile * BN + tl.arange(0, BN)
    p = lasting(j, lasts, SPAN)
    reach = p * 0 + FAR
    if SPAN.reach > 0:
        behind = j - tl.cdiv(lasts, BN) * BN
        is_near = behind >= 0
        p = tl.where(is_near, near + behind, p)
        p = tl.where(is_near & is_lasting(p, SPAN), FAR, p)
        reach = tl.where(is_near, SPAN.window, reach)
    return p, reach


@jit
def load_words(words, T, p, i, last, N: tl.constexpr):
    """The words (BN,) in which queries, of one word, have or have not chosen the blocks of keys p
    (BN,) of a head: from row i on, up to the query at position `last`.
    """
    block = (p // N).to(tl.int64)
    at = block * tl.cdiv(T, WORD) + i // WORD
    return tl.load(words + at, mask=p <= last, other=0)


@jit
def sees_granted(word, i, t, p, reach):
    """Do queries i, at positions t, see granted keys p, whose blocks' words are these? All four
    broadcast.
    """
    chosen = (word >> (i % WORD).to(tl.int64)) & 1
    is_near = t - p <= reach
    return (chosen == 0) & (p < t) & is_near


@jit
def join_kernel(
        q, k, v, y, part, part_lse, words, lse,
        H, T, start, n, scale,
        K: tl.constexpr, N: tl.constexpr, GRANTED: tl.constexpr, SPAN: tl.constexpr,
        DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        STAGES: tl.constexpr):
    """y: Rows of (B, H, T, Dh); lse (B, H, T) float32. The rest as above."""
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    t = start + i
    count = tl.minimum(t // N + 1, K)                  # of a query's parts
    count = tl.where(live, count, 0)
    part_lse += (bh * T + i) * K
    words += bh * n * tl.cdiv(T, WORD)
    m = tl.full((BM,), LOWEST, tl.float32)
    for j in range(K):
        lse_j = tl.load(part_lse + j, mask=j < count, other=LOWEST)
        m = tl.maximum(m, lse_j)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for j in tl.range(K, num_stages=STAGES):
        lse_j = tl.load(part_lse + j, mask=j < count, other=-float("inf"))
        weight = tl.exp2(lse_j - m)
        l += weight
        place = i * K + j
        part_j = load_rows(part, b, h, place, j < count, DH, BD)                        # (BM, BD)
        acc += weight[:, None] * part_j.to(tl.float32)
    if GRANTED:
        q_tile = load_rows(q, b, h, i, live, DH, BD)
        end = start + tl.minimum(i0 + BM, T)
        lasts = count_lasting(end, SPAN)
        near = tl.maximum(start + i0 - SPAN.reach, 0)
        tiles = granted_tiles(lasts, near, end, SPAN, BN)
        for tile in tl.range(tiles, num_stages=STAGES):
            p, reach = granted_keys(tile, lasts, near, SPAN, BN)
            k_tile = load_rows(k, b, h, p, p < end, DH, BD)                             # (BN, BD)
            v_tile = load_rows(v, b, h, p, p < end, DH, BD)
            word = load_words(words, T, p, i0, end - 1, N)
            sees = sees_granted(word[None, :], i[:, None], t[:, None], p[None, :], reach[None, :])
            acc, l, m = add_keys(q_tile, k_tile, v_tile, sees, scale, acc, l, m)
    store_rows(y, b, h, i, acc / l[:, None], live, DH, BD)
    lse += bh * T
    tl.store(lse + i, m + tl.log2(l), mask=live)


# The backward pass, with P, dO and delta as in attention's. Three kernels:
#
#   queries   by BM queries: delta, and the granted keys' part of dQ
#   blocks    by blocks, as in the forward pass: the pairs' parts of dQ, and dK and dV of the block
#   granted   by granted keys, past all later queries: it adds to dK and dV
#
# Then the parts of dQ, K or K + 1 a query, are summed. In each kernel a row has one writer and each
# sum one order: the same input gives the same gradient, to the bit.
#
# Bytes per query and head in bf16: 4 K Dh of q and dO from the L2 cache, 2 K Dh of dQ written and
# read; FLOPs: 10 Dh N K. B 4, T 8192, H 16, Dh 128, N 64, K 16: 2.1 GB written and read, 1.4 ms at
# 3.0 TB/s; 690 GFLOP, 0.9 ms at 745 TFLOP/s.

@jit
def topk_backward_q_kernel(
        q, k, v, y, dy, part, words, lse, delta,
        H, T, start, n, scale, factor,
        K: tl.constexpr, N: tl.constexpr, GRANTED: tl.constexpr, SPAN: tl.constexpr,
        DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        STAGES: tl.constexpr):
    """delta (B, H, T) float32; GRANTED: also row K of each query in part, Rows of (B, H, T * (K +
    1), Dh).
    """
    bh, b, h, i0 = query_tile(H, T, BM)
    i = i0 + tl.arange(0, BM)
    live = i < T
    t = start + i
    dy_tile = load_rows(dy, b, h, i, live, DH, BD)                                      # (BM, BD)
    y_tile = load_rows(y, b, h, i, live, DH, BD)
    delta_t = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    lse += bh * T
    delta += bh * T
    tl.store(delta + i, delta_t, mask=live)
    words += bh * n * tl.cdiv(T, WORD)
    if GRANTED:
        lse_t = tl.load(lse + i, mask=live, other=float("inf"))
        q_tile = load_rows(q, b, h, i, live, DH, BD)
        end = start + tl.minimum(i0 + BM, T)
        lasts = count_lasting(end, SPAN)
        near = tl.maximum(start + i0 - SPAN.reach, 0)
        acc = tl.zeros((BM, BD), tl.float32)
        tiles = granted_tiles(lasts, near, end, SPAN, BN)
        for tile in tl.range(tiles, num_stages=STAGES):
            p, reach = granted_keys(tile, lasts, near, SPAN, BN)
            k_tile = load_rows(k, b, h, p, p < end, DH, BD)
            v_tile = load_rows(v, b, h, p, p < end, DH, BD)
            word = load_words(words, T, p, i0, end - 1, N)
            sees = sees_granted(word[None, :], i[:, None], t[:, None], p[None, :], reach[None, :])
            acc = add_dq(q_tile, k_tile, v_tile, dy_tile, sees, lse_t, delta_t, scale, acc)
        place = i * (K + 1) + K
        store_rows(part, b, h, place, acc * factor, live, DH, BD)


@jit
def topk_backward_blocks_kernel(
        q, k, v, dy, dk, dv, part, pairs, ends, lse, delta,
        H, T, start, n, end, scale, factor,
        K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Program (bh, block): all its rows of dk, dv, and its pairs' rows of part, Rows of (B, H, T *
    PARTS, Dh).
    """
    at, bh, b, h, block = key_block(H, n)
    p0 = block * N
    stop = tl.minimum(p0 + N, end)
    list_begin, list_end = block_list(ends, at, T)
    lse += bh * T
    delta += bh * T
    for more in range(0, N, BN):
        p = p0 + more + tl.arange(0, BN)
        k_tile = load_rows(k, b, h, p, p < stop, DH, BD)                                # (BN, BD)
        v_tile = load_rows(v, b, h, p, p < stop, DH, BD)
        acc_k = tl.zeros((BN, BD), tl.float32)
        acc_v = tl.zeros((BN, BD), tl.float32)
        for e0 in tl.range(list_begin, list_end, BM, num_stages=STAGES):
            pair, live = load_pairs(pairs, e0, list_end, T, K, BM)                      # (BM,)
            i = pair // K
            t = tl.minimum(start + i, stop - 1)
            q_tile = load_rows(q, b, h, i, live, DH, BD)                                # (BM, BD)
            dy_tile = load_rows(dy, b, h, i, live, DH, BD)
            lse_t, delta_t = load_sums(lse, delta, i, live)
            sees = p[:, None] <= t[None, :]
            ds, acc_k, acc_v = add_dkv(k_tile, v_tile, q_tile, dy_tile, sees, lse_t, delta_t,
                                       scale, acc_k, acc_v)
            row = i * PARTS + pair % K
            dq = tl.dot(tl.trans(ds), k_tile, input_precision="ieee")
            dq *= factor
            if more > 0:  # add to what the block's keys before these gave
                dq += load_rows(part, b, h, row, live, DH, BD)
            store_rows(part, b, h, row, dq, live, DH, BD)
        acc_k *= factor
        store_rows(dk, b, h, p, acc_k, p < stop, DH, BD)
        store_rows(dv, b, h, p, acc_v, p < stop, DH, BD)
        tl.debug_barrier()                             # other threads read these rows of part


@jit
def topk_backward_granted_kernel(
        q, k, v, dy, dk, dv, words, lse, delta,
        H, T, start, n, end, keys, scale, factor,
        LASTING: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, DH: tl.constexpr,
        BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """Program (bh, tile of the lasting keys (LASTING) or of all others): it adds to dk and dv what
    these get from queries that did not choose their block.
    """
    at, bh, b, h, tile = key_block(H, tl.cdiv(keys, BN))
    j = tile * BN + tl.arange(0, BN)
    lse += bh * T
    delta += bh * T
    words += bh * n * tl.cdiv(T, WORD)
    if LASTING:
        p = lasting(j, keys, SPAN)
        reach = p * 0 + FAR
        stop = end
    else:
        p = tl.where(is_lasting(j, SPAN), FAR, j)
        reach = p * 0 + SPAN.window
        stop = tl.minimum((tile + 1) * BN + SPAN.reach, end)
    k_tile = load_rows(k, b, h, p, p < end, DH, BD)                                     # (BN, BD)
    v_tile = load_rows(v, b, h, p, p < end, DH, BD)
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BD), tl.float32)
    first = tl.maximum(tl.min(p) - start, 0)
    first = first // WORD * WORD                       # where a word begins
    for i0 in tl.range(first, stop - start, BM, num_stages=STAGES):
        i = i0 + tl.arange(0, BM)                                                       # (BM,)
        q_tile = load_rows(q, b, h, i, i < T, DH, BD)
        dy_tile = load_rows(dy, b, h, i, i < T, DH, BD)
        lse_t, delta_t = load_sums(lse, delta, i, i < T)
        t = start + i
        last = start + tl.minimum(i0 + BM, T) - 1
        word = load_words(words, T, p, i0, last, N)
        sees = sees_granted(word[:, None], i[None, :], t[None, :], p[:, None], reach[:, None])
        _, acc_k, acc_v = add_dkv(k_tile, v_tile, q_tile, dy_tile, sees, lse_t, delta_t, scale,
                                  acc_k, acc_v)
    acc_k *= factor
    acc_k += load_rows(dk, b, h, p, p < end, DH, BD)   # what the blocks kernel has found
    acc_v += load_rows(dv, b, h, p, p < end, DH, BD)
    store_rows(dk, b, h, p, acc_k, p < end, DH, BD)
    store_rows(dv, b, h, p, acc_v, p < end, DH, BD)


# Tiles for rows of up to 256 bytes, the fastest on an H100; wider ones take smaller tiles.
TOPK_TILES = {
    "choose": dict(BN=64, STAGES=3, num_warps=4),
    "blocks": dict(BM=64, BN=64, STAGES=1, num_warps=4),
    "join": dict(BM=16, BN=64, STAGES=3, num_warps=4),
    "join granted": dict(BM=64, BN=32, STAGES=3, num_warps=4),
    "backward q": dict(BM=64, BN=64, STAGES=2, num_warps=4),
    "backward blocks": dict(BM=64, BN=64, STAGES=1, num_warps=4),
    "backward granted": dict(BM=64, BN=32, STAGES=2, num_warps=4),
}
PARTS_BYTES = 2**31                                    # the most that the parts of one call take
LEAST_QUERIES = 1024                                   # but no call is cut shorter


def topk_constants(kind, q, block):
    """Tiles of a kernel, and the constants that all share, for q (B, H, T, Dh)."""
    tiles = dict(TOPK_TILES[kind])
    Dh = q.shape[-1]
    BD = max(16, triton.next_power_of_2(Dh))
    row_bytes = BD * q.element_size()
    if row_bytes > 1024:
        raise ValueError(f"attention: a head of {Dh} channels in {q.dtype} is too wide, "
                         "the limit is 1024 bytes")
    if row_bytes > 256:
        tiles = dict(WIDE[1024])
        if kind == "choose":                           # it has no BM, as a word has 64 queries
            del tiles["BM"]
    if kind.endswith("blocks"):
        tiles["BN"] = min(tiles["BN"], max(16, triton.next_power_of_2(block)))
    return dict(N=block, DH=Dh, BD=BD, **tiles)


def choose_blocks(q, summaries, end, block, topk):
    """The choice of q (B, H, T, Dh), the last of `end` positions: words, pairs, ends, as above."""
    B, H, T, Dh = q.shape
    n = triton.cdiv(end, block)
    tiles = triton.cdiv(T, 64)
    ints = dict(dtype=torch.int32, device=q.device)
    words = q.new_empty(B, H, n, tiles, dtype=torch.int64)
    counts = torch.zeros(B, H, n, tiles, **ints)
    chosen = torch.empty(B, H, T, topk, **ints)
    pairs = torch.empty(chosen.numel(), **ints)
    places = H, T, end - T, n
    constants = topk_constants("choose", q, block)
    minmax = summaries.shape[-1] == 2 * Dh
    if minmax:
        constants["STAGES"] = 1                        # two tiles take twice the shared memory
    programs = B * H * tiles
    launch(choose_kernel, programs, q, *rows_of(q, summaries), chosen, words, counts,
           *places, topk, MINMAX=minmax, **constants)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    launch(list_kernel, programs, q, chosen, words, ends, pairs, *places, pairs.numel(),
           K=topk, N=block, BK=triton.next_power_of_2(topk))
    return words, pairs, ends


def attend_to_blocks(q, k, v, pairs, ends, block, topk):
    """part (B, H, T * K, Dh) and part_lse (B, H, T * K) of the chosen pairs."""
    B, H, T, Dh = q.shape
    end = k.shape[2]
    n = triton.cdiv(end, block)
    part = q.new_empty(B, H, T * topk, Dh)
    part_lse = q.new_empty(B, H, T * topk, dtype=torch.float32)
    places = H, T, end - T, n, end
    constants = topk_constants("blocks", q, block)
    launch(blocks_kernel, B * H * n, q,
           *rows_of(q, k, v, part), part_lse, pairs, ends,
           *places, log2_scale(q), K=topk, **constants)
    return part, part_lse


def join_parts(q, k, v, part, part_lse, words, span, block, topk):
    """y (B, H, T, Dh) and lse (B, H, T)."""
    B, H, T, _ = q.shape
    y = new_heads(q)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    granted = any(span)
    constants = topk_constants("join granted" if granted else "join", q, block)
    programs = triton.cdiv(T, constants["BM"]) * B * H
    launch(join_kernel, programs, q,
           *rows_of(q, k, v, y, part), part_lse, words, lse,
           H, T, k.shape[2] - T, words.shape[2], log2_scale(q),
           K=topk, GRANTED=granted, SPAN=span, **constants)
    return y, lse


def run_topk(q, k, v, summaries, sizes):
    """y and lse of the last T of k's positions, and their choice: words, pairs, ends. sizes:
    dilation, window, sinks, block, topk.
    """
    *span, block, topk = sizes
    q, k, v, summaries = (packed_channels(x) for x in (q, k, v, summaries))
    words, pairs, ends = choose_blocks(q, summaries, k.shape[2], block, topk)
    parts = attend_to_blocks(q, k, v, pairs, ends, block, topk)
    span = span_of(*span)
    y, lse = join_parts(q, k, v, *parts, words, span, block, topk)
    return y, lse, words, pairs, ends


@torch.library.custom_op("rat::topk", mutates_args=())
def topk_operator(
        q: Tensor, k_rec: Tensor, v_rec: Tensor, summaries: Tensor, sizes: list[int]
        ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return run_topk(q, k_rec, v_rec, summaries, sizes)


def new_topk(q, k_rec, v_rec, summaries, sizes):
    """Empty outputs of run_topk."""
    B, H, T, _ = q.shape
    block, topk = sizes[-2:]
    n = -(-k_rec.shape[2] // block)
    tiles = -(-T // 64)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    words = q.new_empty(B, H, n, tiles, dtype=torch.int64)
    pairs = q.new_empty(lse.numel() * topk, dtype=torch.int32)
    ends = q.new_empty(words.numel(), dtype=torch.int32)
    return new_heads(q), lse, words, pairs, ends


@torch.library.custom_op("rat::topk_backward", mutates_args=())
def topk_backward(
        dy: Tensor, q: Tensor, k_rec: Tensor, v_rec: Tensor, y: Tensor, lse: Tensor, words: Tensor,
        pairs: Tensor, ends: Tensor, sizes: list[int]) -> list[Tensor]:
    """dq (B, H, T, Dh); dk_rec, dv_rec (B, H, end, Dh)."""
    *span, block, topk = sizes
    span = span_of(*span)
    granted = any(span)
    q, k, v, dy = (packed_channels(x) for x in (q, k_rec, v_rec, dy))
    B, H, T, Dh = q.shape
    end = k.shape[2]
    n = words.shape[2]
    delta = torch.empty_like(lse)
    dk = new_heads(k)
    dv = new_heads(v)
    part = q.new_empty(B, H, T, topk + granted, Dh)
    start = end - T
    part[:, :, :max(0, (topk - 1) * block - start)] = 0                # these have fewer blocks
    part_rows = rows(part.flatten(2, 3))
    places = H, T, start, n
    scales = log2_scale(q), 1 / math.sqrt(Dh)
    constants = topk_constants("backward q", q, block)
    programs = triton.cdiv(T, constants["BM"]) * B * H
    launch(topk_backward_q_kernel, programs, q,
           *rows_of(q, k, v, y, dy), part_rows, words, lse, delta, *places, *scales,
           K=topk, GRANTED=granted, SPAN=span, **constants)
    inputs = rows_of(q, k, v, dy, dk, dv)
    constants = topk_constants("backward blocks", q, block)
    launch(topk_backward_blocks_kernel, B * H * n, q,
           *inputs, part_rows, pairs, ends, lse, delta, *places, end, *scales,
           K=topk, PARTS=topk + granted, **constants)
    constants = topk_constants("backward granted", q, block)
    lasts = sum(count_lasting_host(end, span))
    nears = end if span.reach else 0
    for keys, are_lasting in ((lasts, True), (nears, False)):
        programs = triton.cdiv(keys, constants["BN"]) * B * H
        if keys > 0:
            launch(topk_backward_granted_kernel, programs, q,
                   *inputs, words, lse, delta, *places, end, keys, *scales,
                   LASTING=are_lasting, SPAN=span, **constants)
    return [part.sum(3), dk, dv]


def keep_topk(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.sizes = inputs[4]


def topk_gradient(ctx, dy, *_):
    return *topk_backward(dy, *ctx.saved_tensors, ctx.sizes), None, None


topk_operator.register_fake(new_topk)
topk_operator.register_autograd(topk_gradient, setup_context=keep_topk)
topk_backward.register_fake(
    lambda dy, q, k, v, *rest: [q.new_empty(q.shape), new_heads(k), new_heads(v)])


def attention_topk(q, k_rec, v_rec, rule, summaries):
    """model.attention_topk by the kernels: of the last T of n positions, a whole sequence's or a
    chunk's.

    q: (B, h, T, Dh); k_rec, v_rec: (B, h, n, Dh); summaries: (B, h, m, Dh), or (B, h, m, 2 Dh) for
    minmax, at least of all whole blocks before the last position. One dtype, any strides. rule:
    model.Rule. Returns (B, h, T, Dh), differentiable in q, k_rec, v_rec. ValueError for what does
    not match.
    """
    q, k_rec, v_rec, summaries = in_autocast_dtype(q, k_rec, v_rec, summaries)
    require_alike("attention_topk", k_rec=k_rec, v_rec=v_rec)
    B, h, T, Dh = q.shape
    n = k_rec.shape[2]
    fits = k_rec.shape == (B, h, n, Dh) and n >= T
    if not fits or not q.dtype == k_rec.dtype == summaries.dtype:
        raise ValueError(f"attention_topk: q {described(q)} and summaries {described(summaries)} "
                         f"do not fit keys {described(k_rec)}")
    block = min(rule.block, n)
    topk = min(rule.topk, triton.cdiv(n, block))
    sizes = [*span_within(n, *rule.span), block, topk]
    run = topk_operator if recorded(q, k_rec, v_rec) else run_topk
    query_bytes = max(1, B * h * topk * Dh * q.element_size())      # 1: a batch of no sequences
    queries = max(LEAST_QUERIES, PARTS_BYTES // query_bytes // 64 * 64)
    y = []
    for begin in range(0, T, queries):
        stop = min(begin + queries, T)
        end = n - T + stop
        keys = k_rec[:, :, :end], v_rec[:, :, :end]
        y.append(run(q[:, :, begin:stop], *keys, summaries, sizes)[0])
    if len(y) == 1:
        return y[0]
    return torch.cat(y, dim=2)


# ---------------------------------------------------------------------------------------------
# Top-k blocks: decoding, two launches per head group
#
#   choose    grid (B h,)           reads the summaries, writes K ints, a score for each block, and
#                                   now and then a summary
#   attend    grid (B h, splits)    reads the chosen blocks, and the granted keys besides; the last
#                                   program of a head finishes the token, as in `decode`
#
# The cache holds every position in its place. A summary is written at the first step after its
# block is full, which is the first that scores it. Bytes per head and sequence in bf16 at T 16384,
# N 64, K 16: 64 KB of summaries, 512 KB of keys and values, where all keys and values are 8 MB. 44
# sequences of 16 heads: 0.41 GB, 0.14 ms a layer at 3.0 TB/s.
#
# choose keeps the scores in memory between its two halves, as it is compiled for the longest
# sequence but scores only the blocks so far. Limit: 2^16 blocks or so.

@jit
def write_summary(summaries, k_cache, b, h, block, SCORE: tl.constexpr, N: tl.constexpr,
                  BR: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """The summary of a full block; see model.block_summaries. `last` has none."""
    r = tl.arange(0, BR)
    d = tl.arange(0, BD)
    keys = load_rows(k_cache, b, h, block * N + r, r < N, DH, BD)                       # (BR, BD)
    keys = keys.to(tl.float32)
    at = head(summaries, b, h) + block.to(tl.int64) * summaries.t + d
    kind = summaries.ptr.dtype.element_ty
    if SCORE == "mean":
        mean = tl.sum(keys, 0) / N
        tl.store(at, mean.to(kind), mask=d < DH)
    if SCORE == "minmax":
        is_key = r[:, None] < N
        most = tl.max(tl.where(is_key, keys, -float("inf")), 0)
        least = tl.min(tl.where(is_key, keys, float("inf")), 0)
        tl.store(at, most.to(kind), mask=d < DH)
        tl.store(at + DH, least.to(kind), mask=d < DH)


@jit
def decode_choose_kernel(
        q, cos, sin, k_cache, summaries, seen, scores, chosen,
        H, n,
        K: tl.constexpr, N: tl.constexpr, SCORE: tl.constexpr, EARLY: tl.constexpr,
        DH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
        BR: tl.constexpr, STAGES: tl.constexpr):
    """Program (bh): chosen (B * H, K) int32, the own block, then the best of the earlier ones, as
    many as there are. scores (B * H, n) float32: scratch. The query is rounded, as in a whole
    sequence.
    """
    bh, b, h, t, _, _, _, q_row = this_token(q, cos, sin, seen, H, 1.0, EARLY, DH, BD)
    own = t // N
    if (t % N == 0) & (own > 0):
        write_summary(summaries, k_cache, b, h, own - 1, SCORE, N, BR, DH, BD)
        tl.debug_barrier()                             # other threads read it
    q_row = q_row.to(q.ptr.dtype.element_ty).to(tl.float32)
    scores += bh * n
    low = minima(summaries, DH)
    for b0 in tl.range(0, own, BN, num_stages=STAGES):
        block = b0 + tl.arange(0, BN)
        summary = load_rows(summaries, b, h, block, block < own, DH, BD)                # (BN, BD)
        if SCORE == "minmax":
            least = load_rows(low, b, h, block, block < own, DH, BD)
            summary = tl.where(q_row[None, :] > 0, summary, least)
        s = tl.sum(q_row[None, :] * summary.to(tl.float32), 1)
        tl.store(scores + block, s, mask=block < own)
    tl.debug_barrier()                                 # other threads read them
    block = tl.arange(0, BS)
    s = tl.load(scores + block, mask=block < own, other=-float("inf"))                  # (BS,)
    s = tl.where(block < own, tl.maximum(s, LOWEST), s)                # NaN: the least score
    order = in_order(s.to(tl.int32, bitcast=True))
    order = order.to(tl.int64) << 31
    best = tl.topk(order + (0x7fffffff - block), BK)   # of equal scores the lower index
    j = tl.arange(0, BK)
    chosen += bh * K
    tl.store(chosen, own)
    best = 0x7fffffff - (best & 0x7fffffff).to(tl.int32)                                # (BK,)
    others = tl.minimum(own, K - 1)
    tl.store(chosen + 1 + j, best, mask=j < others)


@jit
def decode_blocks_kernel(
        y, o, q, k, v, g, k_state, v_state,
        cos, sin, k_cache, v_cache, seen, partial, arrived,
        H, scale, chosen,
        K: tl.constexpr, N: tl.constexpr, GRANTED: tl.constexpr, SPAN: tl.constexpr,
        HELD: tl.constexpr, RECURRENCE: tl.constexpr, EARLY: tl.constexpr, DH: tl.constexpr,
        BD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
        STAGES: tl.constexpr):
    """Program (bh, split): as decode_kernel, over tiles of the chosen blocks, then over tiles of
    granted keys. Granted keys in a chosen block are not loaded again. SPAN: of the granted keys;
    HELD: of the cache, which holds every position.
    """
    bh, b, h, t, d, cos_d, sin_d, q_row = this_token(q, cos, sin, seen, H, scale, EARLY, DH, BD)
    new = new_token(o, k, v, g, k_state, v_state, cos_d, sin_d, b, h, d, RECURRENCE, DH)
    j = tl.arange(0, BK)
    chosen += bh * K
    taken = tl.minimum(t // N + 1, K)
    blocks = tl.load(chosen + j, mask=j < taken, other=-1)                              # (BK,)
    lasts = count_lasting(t, SPAN)
    near = tl.maximum(t - SPAN.reach, 0)
    chosen_tiles = tl.cdiv(taken * N, BN)
    acc, l, m = no_rows(BN, BD)
    first, end = share_of(chosen_tiles + granted_tiles(lasts, near, t, SPAN, BN))
    for tile in tl.range(first, end, num_stages=STAGES):
        n = tile * BN + tl.arange(0, BN)
        in_blocks = n < taken * N
        block = tl.load(chosen + n // N, mask=in_blocks, other=0)
        p = block * N + n % N                                                           # (BN,)
        here = in_blocks & (p < t)
        if GRANTED:
            granted, _ = granted_keys(tile - chosen_tiles, lasts, near, SPAN, BN)
            same = (granted // N)[:, None] == blocks[None, :]
            times = tl.sum(same.to(tl.int32), 1)       # how often its block is chosen: 0 or 1
            is_granted = tile >= chosen_tiles
            p = tl.where(is_granted, granted, p)
            here = tl.where(is_granted, (granted < t) & (times == 0), here)
        k_tile = load_rows(k_cache, b, h, p, here, DH, BD)                              # (BN, BD)
        v_tile = load_rows(v_cache, b, h, p, here, DH, BD)
        acc, l, m = add_rows(q_row, k_tile, v_tile, here, acc, l, m)
    finish_share(y, k_state, v_state, k_cache, v_cache, partial, arrived, acc, l, m, q_row, new,
                 d, bh, b, h, t, RECURRENCE, HELD, DH, BS)


DECODE_TILES = {                                       # for 128 channels: the fastest on an H100
    "choose": dict(BN=64, STAGES=2, num_warps=4),
    "attend": dict(BN=32, STAGES=3, num_warps=4),
}


def decode_tiles(kind, BD):
    tiles = dict(DECODE_TILES[kind])
    if BD > 128:
        tiles["BN"] = max(16, tiles["BN"] * 128 // BD)
    return tiles


def decode_topk(token, cache, rope, seen, splits=None):
    """`decode` for a model.TopkCache: as there, and cache.summaries are renewed."""
    require_token(token, cache)
    q = token[1]
    rule = cache.rule
    B, h, Dh = q.shape
    slots = cache.k.shape[2]
    n = slots // rule.block
    K = min(rule.topk, n)
    BD = triton.next_power_of_2(Dh)
    chosen = q.new_empty(B * h, K, dtype=torch.int32)
    scores = q.new_empty(B * h, n, dtype=torch.float32)
    BK = triton.next_power_of_2(K)
    constants = dict(K=K, N=rule.block, BK=BK)
    launch(decode_choose_kernel, B * h, q, token_rows(q), *rope, rows(cache.k),
           rows(cache.summaries), seen, scores, chosen, h, n, SCORE=rule.score,
           BS=max(16, triton.next_power_of_2(n)), BR=triton.next_power_of_2(rule.block),
           DH=Dh, BD=BD, **early_start(q), **constants, **decode_tiles("choose", BD))
    tiles = decode_tiles("attend", BD)
    keys = K * rule.block + rule.window + rule.sinks
    if rule.dilation:
        keys += slots // rule.dilation
    splits = splits or split_count(B * h, keys, tiles["BN"], q.device)
    return launch_decode(decode_blocks_kernel, token, cache, rope, seen, splits, chosen,
                         GRANTED=any(rule.span), SPAN=span_of(*rule.span),
                         HELD=span_of(*cache.layout.span), **constants, **tiles)


# ---------------------------------------------------------------------------------------------
# The output head and its loss
#
# What is slow: PyTorch holds the logits of all N = B T tokens, N V numbers, 6.6 GB for 65,536
# tokens of GPT-2's vocabulary in bf16, and as much again in float32. Here tokens go by in chunks. A
# chunk's logits become their own gradient in place, and the gradients of x and of the weight follow
# from it at once, so backward only scales them. With z_n = W x_n and target y_n:
#
#   loss = sum_n logsumexp(z_n) - z_n[y_n]
#   dz_n = softmax(z_n) - onehot(y_n)        dx_n = W^T dz_n        dW = sum_n dz_n x_n^T
#
# The kernel. A program takes a row z (V,): once for the sum, each of its BV lanes with a running
# maximum of its own, and once for dz, which takes the place of z. Scores are in units of log2.
# Grid: rows. Bytes per logit in bf16: reads 2, writes 2; the second reading finds the row, 100 KB
# at a vocabulary of 50304, in the L2 cache, if few rows are under way at once. So a program takes
# 32 warps, which leaves room for two a processor, and the hints of eviction keep in the cache what
# is read again. H100, 8192 rows: 0.82 ms with 8 warps and without hints, 0.66 so (2.5 TB/s). A row
# held in registers would be read once, but it does not fit (46 spilled, 1.2 ms).

@jit
def cross_entropy_kernel(z, y, loss, V, BV: tl.constexpr, GRAD: tl.constexpr):
    """z (rows, V) contiguous, replaced by dz if GRAD; y (rows,) int64; loss (rows,) float32.

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
    z_y = load_float(z + label, right, 0) * LOG2E
    m = tl.full((BV,), LOWEST, tl.float32)
    l = tl.zeros((BV,), tl.float32)
    for v0 in range(0, V, BV):
        live = v0 + v < V
        s = tl.load(z + v0 + v, mask=live, other=-float("inf"), eviction_policy="evict_last")
        s = s.to(tl.float32) * LOG2E
        e = tl.exp2(-tl.abs(s - m))                    # the factor of the smaller of the two
        l = tl.where(s > m, l * e + 1, l + e)
        m = tl.maximum(m, s)
    top = tl.max(m, 0)                                 # waits for all threads: z_y has been read
    lse = top + tl.log2(tl.sum(l * tl.exp2(m - top), 0))
    tl.store(loss + row, tl.where(counted, (lse - z_y) / LOG2E * factor, 0))
    if GRAD:
        for v0 in range(0, V, BV):
            live = v0 + v < V
            s = tl.load(z + v0 + v, mask=live, other=0, eviction_policy="evict_first")
            s = s.to(tl.float32) * LOG2E
            dz = (tl.exp2(s - lse) - tl.where(v0 + v == label, 1.0, 0.0)) * factor
            dz = tl.where(counted, dz, 0).to(z.dtype.element_ty)
            tl.store(z + v0 + v, dz, mask=live, eviction_policy="evict_first")


def cross_entropy_(z, y, grad):
    """Cross-entropy of each row of logits z (rows, V), contiguous, under its target y (rows,)
    int64: (rows,) float32.

    With `grad`, z is replaced by its gradient.
    """
    require_alike("cross_entropy_", z=z)
    right = y.shape == z.shape[:1] and y.dtype == torch.int64 and y.device == z.device
    require(right and z.is_contiguous(), f"cross_entropy_: contiguous logits {tuple(z.shape)} want "
            f"int64 targets (rows,) beside them, got {tuple(y.shape)} {y.dtype}")
    loss = z.new_empty(len(z), dtype=torch.float32)
    BV = min(4096, max(128, triton.next_power_of_2(z.shape[1])))
    launch(cross_entropy_kernel, len(z), z, z, y.contiguous(), loss, z.shape[1],
           BV=BV, GRAD=grad, num_warps=BV // 128)
    return loss


class HeadLoss(torch.autograd.Function):
    """The summed loss of x (N, C), weight (V, C) and targets (N,), in chunks of `chunk` tokens,
    enough to keep products busy.

    Bytes held in bf16: 2 chunk V of logits, 4 N C of dx, 4 V C of dW.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, grad, chunk=8192):
        w = weight.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        dx = []
        dw = torch.zeros_like(weight, dtype=torch.float32) if grad else None
        for x_chunk, y in zip(x.to(dtype).split(chunk), targets.split(chunk)):
            z = x_chunk @ w.T                                                           # (chunk, V)
            loss = loss + cross_entropy_(z, y, grad).sum()
            if grad:  # z is dz now
                dx.append(z @ w)
                dw += z.T @ x_chunk
        if grad:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():                    # create_graph=True
            raise RuntimeError("the loss kernel has no second derivative; plain PyTorch has")
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype), None, None, None, None


def head_loss(x, weight, targets, dtype):
    """model.head_loss by the kernel: x (N, C), weight (V, C), targets (N,) int64; dtype: of the
    matrix products.
    """
    require(targets.shape == x.shape[:1] and x.shape[1:] == weight.shape[1:],
            f"head_loss: x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets "
            f"{tuple(targets.shape)} do not match")
    return HeadLoss.apply(x, weight, targets, dtype, torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------
# The timings: `python kernels.py`

class Timing(NamedTuple):
    """A row of the table. ours and peers: functions without arguments, timed as they are.

    n_bytes, flops: the fewest that the work takes. peers: {name: function}, PyTorch's own ways.
    check: the name of the peer whose result ours must equal.
    """
    work: str
    ours: object
    n_bytes: float
    flops: float
    peers: dict
    check: str | None


def milliseconds(run, repeats=20, calls=5):
    """Median time of run() on the GPU: replays of a CUDA graph, so that the host's launching is
    left out. Replays for a tenth of a second come first: an idle GPU takes a while to speed up, and
    a busy one slows down to its limit of power.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            run()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.1:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times)[repeats // 2]


def attempt(run):
    """milliseconds of a peer, or why there are none: it may not support this, or run out of memory.
    """
    try:
        return milliseconds(run)
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    except Exception as error:                         # peers under torch.compile raise all kinds
        return f"unsupported ({type(error).__name__})"
    finally:
        torch.cuda.empty_cache()


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def with_gradients(run, inputs):
    """run(*inputs) and its backward pass as a function; it returns the gradients of the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = as_tuple(run(*inputs))
    grads = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(as_tuple(run(*inputs)), inputs, grads)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def scan_torch(k, v, g):
    """Equation (2) by PyTorch's associative_scan in float32: k_rec and v_rec."""
    from torch._higher_order_ops.associative_scan import associative_scan
    a = torch.sigmoid(g.float())
    rest = torch.sigmoid(-g.float())

    def step(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1], y[0] * x[2] + y[2]

    _, k_rec, v_rec = associative_scan(step, (a, rest * k, rest * v), 1, combine_mode="pointwise")
    return k_rec.to(k.dtype), v_rec.to(v.dtype)


def scan_ours(k, v, g):
    return recurrence(k, v, g)[:2]


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(span, T):
    """PyTorch's flex_attention, compiled, under the mask of equation (4)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    D, W, S = span

    def mask(b, h, t, p):
        grid = (p + 1) % D == 0 if D else p < 0
        return (p <= t) & (grid | (t - p <= W) | (p < S))

    block_mask = create_block_mask(mask, None, None, T, T, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def keys_per_query(span, T):
    D, W, S = span
    t = torch.arange(T).double()
    grid = ((t - W).clamp(min=0) / D).floor() if D else 0
    return (grid + t.clamp(max=W) + 1 + (t - W).clamp(0, S)).mean().item()


def time_recurrence(B, T, C):
    kvg = randn(B, T, 5 * C).split(C, dim=-1)[2:]
    n = B * T * C
    work = f"recurrence, B{B} T{T} C{C}"
    grads = f"{work}, forward + backward"
    compiled = torch.compile(scan_torch)
    peers = {"associative_scan": lambda: compiled(*kvg)}
    yield Timing(work, lambda: scan_ours(*kvg), 10 * n, 0, peers, "associative_scan")
    yield Timing(grads, with_gradients(scan_ours, kvg), 30 * n, 0, {}, None)


def time_attention(B, H, T, Dh, name, span):
    qkv = [randn(B, T, H, Dh).transpose(1, 2) for _ in range(3)]
    n = B * H * T * Dh
    flops = n * keys_per_query(span, T)
    work = f"attention {name}, B{B} H{H} T{T} Dh{Dh}"
    masked = flex(span, T)
    ways = {"dense SDPA": dense, "flex_attention": masked}
    ours = lambda q, k, v: attention(q, k, v, *span)
    peers = {"dense SDPA": lambda: dense(*qkv), "flex_attention": lambda: masked(*qkv)}
    yield Timing(work, lambda: ours(*qkv), 8 * n, 4 * flops, peers, "flex_attention")
    both = with_gradients(ours, qkv)
    peers = {name: with_gradients(run, qkv) for name, run in ways.items()}
    yield Timing(f"{work}, forward + backward", both, 24 * n, 14 * flops, peers, None)


class TimedRule(NamedTuple):
    """What top-k attention asks of a model.Rule."""
    block: int
    topk: int
    dilation: int = 0
    window: int = 0
    sinks: int = 0
    score: str = "mean"

    @property
    def span(self):
        return self.dilation, self.window, self.sinks


def flex_topk(q, summaries, rule, T):
    """PyTorch's flex_attention, compiled, under a mask made from the same choice of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    n = summaries.shape[2]
    b = torch.arange(n, device="cuda")
    own = torch.arange(T, device="cuda")[:, None] // rule.block
    scores = q.float() @ summaries.float().mT
    scores = scores.masked_fill(b == own, math.inf).masked_fill(b > own, -math.inf)
    best = scores.topk(rule.topk).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

    def mask(b, h, t, p):
        granted = (p + 1) % rule.dilation == 0 if rule.dilation else p < 0
        return (p <= t) & (chosen[b, h, t, p // rule.block] | granted)

    B, H = q.shape[:2]
    whole = torch.compile(create_block_mask)           # uncompiled it would hold B H T T numbers
    block_mask = whole(mask, B, H, T, T, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def time_topk(B, H, T, Dh, name, rule):
    """Attention over top-k blocks; the choice is part of ours, and no part of flex_attention."""
    qkv = [randn(B, T, H, Dh).transpose(1, 2) for _ in range(3)]
    summaries = qkv[1].unflatten(2, (-1, rule.block)).mean(3)
    work = f"attention {name}, B{B} H{H} T{T} Dh{Dh}"
    n = B * H * T * Dh
    keys = rule.topk * rule.block + (T / 2 / rule.dilation if rule.dilation else 0)
    ours = lambda q, k, v: attention_topk(q, k, v, rule, summaries)
    masked = functools.cache(lambda: flex_topk(qkv[0], summaries, rule, T))    # made in `attempt`
    peers = {"dense SDPA": lambda: dense(*qkv), "flex_attention": lambda: masked()(*qkv)}
    yield Timing(work, lambda: ours(*qkv), 8 * n, 4 * n * keys, peers, "flex_attention")
    both = with_gradients(ours, qkv)
    peers = {"dense SDPA": with_gradients(dense, qkv)}
    yield Timing(f"{work}, forward + backward", both, 24 * n, 14 * n * keys, peers, None)


class TimedCache(NamedTuple):
    """What `decode` and `decode_topk` ask of a model.GroupCache and its layout."""
    k: Tensor
    v: Tensor
    state: Tensor
    span: tuple
    arrived: Tensor
    rule: TimedRule | None = None
    summaries: Tensor | None = None

    @property
    def layout(self):
        return self


def time_decode(B, T, name, span, H=16, Dh=128):
    """One step at position T - 1 of a full cache, beside PyTorch's attention of one query over its
    slots.
    """
    D, W, S = span
    slots = S + W + (T // D if D else 0)
    state = randn(2, B, H, Dh, dtype=torch.float32)
    arrived = torch.zeros(B * H, dtype=torch.int32, device="cuda")
    cache = TimedCache(randn(B, H, slots, Dh), randn(B, H, slots, Dh), state, span, arrived)
    token = randn(B, 5, H, Dh).unbind(1)
    rope = randn(2, 1, Dh // 2, dtype=torch.float32)
    seen = torch.tensor([T - 1], device="cuda")
    one = lambda: F.scaled_dot_product_attention(token[1][:, :, None], cache.k, cache.v)
    yield Timing(f"decode {name}, B{B} H{H} T{T} Dh{Dh}", lambda: decode(token, cache, rope, seen),
                 2 * cache.k.nbytes, 0, {"SDPA of one query": one}, None)


def time_decode_topk(B, T, name, rule, H=16, Dh=128):
    """One step with top-k blocks at position T - 1, beside attention over all positions."""
    k = randn(B, H, T, Dh)
    v = randn(B, H, T, Dh)
    state = randn(2, B, H, Dh, dtype=torch.float32)
    summaries = randn(B, H, T // rule.block, Dh)
    arrived = torch.zeros(B * H, dtype=torch.int32, device="cuda")
    cache = TimedCache(k, v, state, (1, 0, 0), arrived, rule, summaries)
    token = randn(B, 5, H, Dh).unbind(1)
    rope = randn(2, 1, Dh // 2, dtype=torch.float32)
    seen = torch.tensor([T - 1], device="cuda")
    dense = lambda: F.scaled_dot_product_attention(token[1][:, :, None], k, v)
    keys = rule.topk * rule.block + (T // rule.dilation if rule.dilation else 0)
    n_bytes = 4 * B * H * Dh * keys + summaries.nbytes
    yield Timing(f"decode {name}, B{B} H{H} T{T} Dh{Dh}",
                 lambda: decode_topk(token, cache, rope, seen), n_bytes, 0,
                 {"SDPA of one query": dense}, None)


RULES = {"N64K16": TimedRule(64, 16), "D64N64K8": TimedRule(64, 8, 64)}
SPANS = {
    "D1": (1, 0, 0),
    "D16": (16, 0, 0),
    "D64": (64, 0, 0),
    "D16W256S4": (16, 256, 4),
    "W1024S4": (0, 1024, 4),
}


WORKS = "recurrence", "attention", "top-k", "decode"


def timings(works, quick):
    """The rows of these works; quick: every second shape and pattern."""
    every = 2 if quick else 1
    if "recurrence" in works:
        for shape in ((4, 8192, 2048), (1, 65536, 2048), (32, 2048, 512))[::every]:
            yield from time_recurrence(*shape)
    if "attention" in works:
        for shape in ((4, 16, 8192, 128), (8, 12, 4096, 64))[::every]:
            for name in ("D16", "D64", "D16W256S4", "W1024S4")[::every]:
                yield from time_attention(*shape, name, SPANS[name])
    if "top-k" in works:
        for shape in ((4, 16, 8192, 128), (1, 16, 16384, 128))[::every]:
            for name, rule in RULES.items():
                yield from time_topk(*shape, name, rule)
        for name, rule in RULES.items():
            yield from time_decode_topk(44, 16384, name, rule)
    if "decode" in works:
        for B, T in ((128, 4096), (64, 16384))[::every]:
            for name in ("D1", "D16", "D64", "D16W256S4")[::every]:
                yield from time_decode(B, T, name, SPANS[name])


def limits():
    """(bytes per ms of an elementwise pass, read and written; FLOP per ms of a matrix product),
    measured here.
    """
    a = randn(1 << 29)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / milliseconds(lambda: torch.mul(a, 2, out=b))
    left = a[:8192**2].view(8192, 8192)
    right = a[-8192**2:].view(8192, 8192)
    product = torch.empty_like(left)
    rate = 2 * 8192**3 / milliseconds(lambda: torch.mm(left, right, out=product))
    return bandwidth, rate


def relative_error(ours, theirs):
    """Of the first output, as text."""
    found = as_tuple(ours)[0].float()
    want = as_tuple(theirs)[0].float()
    return f"{((found - want).norm() / want.norm()).item():.0e}"


def table_row(timing, bandwidth, rate):
    """A line of the table."""
    ms = milliseconds(timing.ours)
    limit = max(timing.n_bytes / bandwidth, timing.flops / rate)
    error = ""
    told = []
    for name, run in timing.peers.items():
        found = attempt(run)
        if isinstance(found, str):
            told.append(f"{name} {found}")
            continue
        told.append(f"{name} {found:.3f} ({found / ms:.2f})")
        if name == timing.check:
            error = relative_error(timing.ours(), run())
    cells = timing.work, f"{ms:.3f}", f"{limit:.3f}", f"{limit / ms:.0%}", error, ", ".join(told)
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description="Time the kernels on a GPU beside PyTorch's own.")
    parser.add_argument("--quick", action="store_true", help="every second shape and pattern")
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORKS)}; default: all")
    flags = parser.parse_args()
    unknown = sorted({*flags.work} - {*WORKS})
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(WORKS)}")
    if not torch.cuda.is_available():
        sys.exit("kernels.py times kernels on a GPU, and there is none; tests/ check them on a CPU")
    print(f"torch {torch.__version__} | {path('cuda')}")
    bandwidth, rate = limits()
    print(f"measured here, bfloat16: {bandwidth / 1e9:.2f} TB/s in an elementwise pass (read + "
          f"written), {rate / 1e9:.0f} TFLOP/s in a matrix product of 8192^3.\n"
          "limit: the fewest bytes or FLOPs of the work at these rates, the slower of the two. "
          "error: relative, of the first output, to a peer's.\n\n"
          "| work | ms | limit ms | of limit | error | peers, ms (times ours) |\n"
          "|---|---|---|---|---|---|")
    for timing in timings(flags.work or WORKS, flags.quick):
        print(table_row(timing, bandwidth, rate), flush=True)


if __name__ == "__main__":
    main()
