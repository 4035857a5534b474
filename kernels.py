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

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


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
# Decoding: one new token of each sequence, all that lies between in_proj and out_proj
#
# A cache keeps the positions that the next query may use (4), in slots laid out as [ sinks | ring | grid ]. A position has
# one slot: on the grid, that of its block; else, if it is a sink, its own; else ring slot p mod W, until position p + W
# takes that over. Which position a slot holds follows from how many tokens were seen, so only keys and values are stored.
# That number, `length`, is a tensor on the device and is read there: a CUDA graph recorded once then serves every position.

FUTURE = 2**62        # the position of an empty slot: no query reaches it


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


def rotate(x, cos, sin):
    """RoPE on x (..., T, Dh): channel i of the first half turns with channel i of the second. cos, sin (T, Dh/2) float32."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def decode_ref(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks):
    """`decode` in plain PyTorch: what it means, and what runs without a GPU. float64 inputs stay float64."""
    span, (o, q, k, v, *g) = (dilation, window, sinks), x.unbind(1)                 # (B, h, Dh)
    if g:                                                                           # (2)
        a = torch.sigmoid(g[0].to(state.dtype))
        state.copy_(a * state + (1 - a) * torch.stack((k, v)))
        k, v = state.to(x.dtype)
    q, k, v = rotate(q, *rope)[:, :, None], rotate(k, *rope)[:, :, None], v[:, :, None]        # (B, h, 1, Dh)
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

if triton:
    EMPTY = tl.constexpr(-1e30)       # m of a row without keys: below all scores, but 2^(EMPTY - EMPTY) is a number

    @triton.jit
    def turning(cos, sin, d, Dh: tl.constexpr):
        """RoPE of channel d: x'[d] = x[d] cos + x[other] sin. Returns other, cos and the signed sin."""
        half: tl.constexpr = Dh // 2
        first = d < half
        other = tl.where(first, d + half, d - half)
        i = tl.where(first, d, other)
        sin = tl.load(sin + i, mask=d < Dh, other=0.0)
        return other, tl.load(cos + i, mask=d < Dh, other=0.0), tl.where(first, -sin, sin)

    @triton.jit
    def channels(pointer, d, Dh: tl.constexpr):
        return tl.load(pointer + d, mask=d < Dh, other=0.0).to(tl.float32)

    @triton.jit
    def recur(x, g, state, d, Dh: tl.constexpr):
        """Equation (2) for one step of one head."""
        a = tl.sigmoid(channels(g, d, Dh))
        return a * channels(state, d, Dh) + (1 - a) * channels(x, d, Dh)

    @triton.jit
    def attend_kernel(x, cos, sin, k_cache, v_cache, length, partial, x_row, x_part, h, slots, scale,
                      D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, Dh: tl.constexpr, BD: tl.constexpr,
                      BN: tl.constexpr):
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
        for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
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

    @triton.jit
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
    BN = max(4096 // BD, 16)                                       # 32 keys of 128 channels: 64 bytes a thread in flight, twice
    if splits is None:
        units = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = max(1, min(64, slots // (2 * BN), 32 * units // (B * h)))
    partial = torch.empty(B * h, splits, Dh + 2, dtype=torch.float32, device=x.device)
    span, sizes, scale = dict(D=dilation, W=window, S=sinks), dict(Dh=Dh, BD=BD), math.log2(math.e) / math.sqrt(Dh)
    attend_kernel[B * h, splits](x, *rope, k_cache, v_cache, length, partial, x.stride(0), x.stride(1), h, slots, scale,
                                 **span, **sizes, BN=BN, num_warps=4)
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
    op = decode_triton if triton and x.is_cuda else decode_ref
    op(y, x, state, rope, k_cache, v_cache, length, dilation, window, sinks)


def attention_chunk(q, k_cache, v_cache, k_local, v_local, start, dilation, window, sinks):
    """Attention (3) of a chunk of T tokens that continues a sequence: positions start .. start + T - 1.

    q: (B, h, T, Dh). k_cache, v_cache: (B, h, slots, Dh), the cache, in whose sinks and grid the chunk is stored already.
    k_local, v_local: (B, h, L, Dh), the last L = min(window, start) + T positions. A lasting position, on the grid or a sink,
    is read from the cache, every other from there. Returns (B, h, T, Dh).
    """
    end, span = start + q.shape[2], (dilation, window, sinks)
    p = positions(torch.full((1,), end, device=q.device), k_cache.shape[2], *span)
    p[sinks:sinks + window] = FUTURE                                # the ring may be overwritten already
    local = torch.arange(end - k_local.shape[2], end, device=q.device)
    held, passing = p < FUTURE, ~on_grid(local, dilation) & (local >= sinks)
    k = torch.cat((k_cache[:, :, held], k_local[:, :, passing]), dim=2)
    v = torch.cat((v_cache[:, :, held], v_local[:, :, passing]), dim=2)
    return attention_at(q, k, v, torch.arange(start, end, device=q.device), torch.cat((p[held], local[passing])), *span)


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
        for t in (0, 1, 37, 299):
            for span in ((1, 0, 0), (16, 0, 0), (5, 7, 3), (0, 40, 4), (64, 300, 300)):
                for name, error in decode_errors(decode, span, t, 300, dtype, device):
                    yield "decode", dtype, f"position {t}, dilation, window, sinks {span}", name, error, limit


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
