"""
RAT+ (arXiv 2602.18196), the whole method in plain PyTorch: train dense, infer sparse.

RAT+ is a transformer whose keys and values pass through a gated recurrence before attention. The
key at position p then summarises a stretch of text that ends at p. So attention may skip most
positions: with dilation D it keeps every D-th position, and the cache shrinks D times.

  o, q, k, v, g = in_proj(RMSNorm(x))                                                         (1)
  k~_t = a_t * k~_{t-1} + (1 - a_t) * k_t      a_t = sigmoid(g_t); v~ has the same decay      (2)
  y_t  = sum over allowed p of softmax_p(RoPE(q)_t . RoPE(k~)_p / sqrt(Dh)) v~_p              (3)
  allowed: p <= t and ((p + 1) mod D == 0 or t - p <= W or p < S)                             (4)
           with top-k blocks also: p <= t in the own block of t, or in one of K - 1 earlier blocks
  x    = x + out_proj(sigmoid(o) * y)          then  x = x + fc2(gelu(fc1(RMSNorm(x))))       (5)

  code              shape            paper
  x                 (B, T, C)        the residual stream: B batch, T time, C = n_embd channels
  o, g              (B, T, C)        logits of the output gate and of the decay a
  q, k, v           (B, T, C)        queries, and keys and values before the recurrence
  k_rec, v_rec      (B, T, C)        k~, v~: after the recurrence
                    (B, H, T, Dh)    the same in attention: H heads of width Dh
  state             2 x (B, C)       k~ (before RoPE) and v~ of the last position, float32
  t, p              int64            position of a query, position of a key
  dilation          D                the authors' "-1" (no dilated positions) is 0 here
  window, sinks     W, S             local_size, initial_size; a query sees itself and W before it
  block, topk       N, K             size and number of the blocks of top-k attention

The functions and classes below define each operation, and they are what runs on a CPU. kernels.py
holds a Triton kernel for each slow one. Wherever `if on_kernels(x):` stands, a kernel takes over on
a GPU. Without kernels.py everything still works.

`python model.py D4W4S2` draws a pattern.
"""
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import threading
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

try:
    import kernels
except ImportError:                                    # no Triton, or no kernels.py
    kernels = None


def on_kernels(x):
    """Does a Triton kernel take over for this tensor? On a GPU, in float32, float16 or bfloat16."""
    return kernels is not None and kernels.take(x)


def path(device):
    """What computes on `device`, in words, for the first lines that each script prints."""
    if on_kernels(torch.empty(0, device=device)):
        return kernels.path(device)
    return f"plain PyTorch on {device}"


def require(condition, message, *told):
    """ValueError, with the values `told` in the message, unless the condition holds."""
    if not condition:
        raise ValueError(message.format(*told) if told else message)


# ---------------------------------------------------------------------------------------------
# Config

@dataclass
class RATConfig:
    """The shape of a model. With recurrence=False it is the attention-only baseline: there is no g,
    k~ = k and v~ = v.

    What the recurrence decides is said here. Other code looks at whether g and the state exist.
    """
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    recurrence: bool = True

    def __post_init__(self):
        least = min(self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        if least < 1 or self.n_embd % (2 * self.n_head):
            raise ValueError(f"{self}: sizes must be at least 1, and n_embd must split into n_head "
                             "heads of even width")

    @property
    def head_width(self):
        return self.n_embd // self.n_head

    @property
    def widths(self):
        """How many rows of in_proj each part of equation (1) has, in the order of the rows."""
        names = "oqkvg" if self.recurrence else "oqkv"
        return {name: self.n_embd for name in names}

    @property
    def state_width(self):
        """Channels of the recurrent state."""
        return self.widths["k"] if self.recurrence else 0

    @property
    def name(self):
        return "RAT+" if self.recurrence else "attention-only"


PRESETS = {
    "laptop": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=8, n_head=8, n_embd=512),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "paper-1.5b": dict(n_layer=24, n_head=16, n_embd=2048),
    "paper-2.6b": dict(n_layer=28, n_head=20, n_embd=2560),
    "paper-7.6b": dict(n_layer=32, n_head=32, n_embd=4096),
}


# ---------------------------------------------------------------------------------------------
# The definitions: who may attend to whom (4), the recurrence (2), RoPE, attention (3)

FUTURE = 2**62                                         # a position after every real one


def on_grid(p, dilation):
    """Is p the last of its `dilation` positions? Dilation 0 means that there is no grid."""
    return (p + 1) % dilation == 0 if dilation else p < 0      # p < 0: False, in the shape of p


def allowed(t, p, dilation, window, sinks):
    """May a query at position t attend to the key at position p? Equation (4), the definition of
    every pattern. Top-k blocks add to it: see `choose_blocks`.

    t, p: integers or integer tensors that broadcast. Returns bool. ValueError for negative sizes.
    The grid is absolute: all queries share it. A key that is off the grid and no sink is never
    needed again once it has left the window, and that is why the cache shrinks.
    """
    sizes = dilation, window, sinks
    require(min(sizes) >= 0, f"allowed: dilation, window, sinks are at least 0, not {sizes}")
    in_window = t - p <= window
    is_sink = p < sinks
    return (p <= t) & (on_grid(p, dilation) | in_window | is_sink)


def decay(g):
    """a = sigmoid(g) and 1 - a.

    Near a = 1 the difference 1 - a would cancel, and the gradient of torch.sigmoid, a (1 - a),
    would vanish. Through the logarithm both values and both gradients stay precise.
    """
    return F.logsigmoid(g).exp(), F.logsigmoid(-g).exp()


@torch.compiler.disable                                # torch.compile would unroll the loop
def scan(a, u, h):
    """All h_t = a_t * h_{t-1} + u_t (2, B, T, C). a: (B, T, C); u: (2, B, T, C); h: (2, B, C)."""
    states = []
    for a_t, u_t in zip(a.unbind(1), u.unbind(2)):
        h = a_t * h + u_t
        states.append(h)
    return torch.stack(states, dim=2)


def recurrence(k, v, g, state=None):
    """The gated recurrence over keys and values, equation (2). Differentiable in every input.

    k, v, g: (B, T, C), T >= 1, any floating dtype; g is the gate's logit.
    state:   (k_rec, v_rec) of the position before, each (B, C); None means zeros.
    Returns k_rec, v_rec (B, T, C) in the dtypes of k and v, and the state after the last position,
    2 x (B, C). The arithmetic and the state are float32 (float64 for float64 inputs).
    ValueError for shapes that do not match.
    """
    if on_kernels(k):
        return kernels.recurrence(k, v, g, state)
    B, T, C = k.shape
    shapes = [tuple(z.shape) for z in (k, v, g)]
    require(shapes[0] == shapes[1] == shapes[2] and T >= 1,
            f"recurrence: k, v, g share a shape (B, T >= 1, C), not {shapes}")
    exact = torch.promote_types(k.dtype, torch.float32)
    if state is None:
        state = k.new_zeros(2, B, C, dtype=exact)
    require(all(z.shape == (B, C) for z in state), f"recurrence: the state is 2 x ({B}, {C})")
    a, rest = decay(g.to(exact))                       # rest: 1 - a
    u = rest * torch.stack((k, v))                     # (2, B, T, C)
    h = torch.stack(tuple(state))                      # (2, B, C)
    k_rec, v_rec = scan(a, u, h)
    new_state = k_rec[:, -1].clone(), v_rec[:, -1].clone()
    return k_rec.to(k.dtype), v_rec.to(v.dtype), new_state


def rope_angles(t, Dh):
    """cos and sin, each (T, Dh/2) float32, of the absolute positions t (T,). The base is 10000."""
    channel = torch.arange(0, Dh, 2, device=t.device, dtype=torch.float32)
    frequency = 10000.0 ** (-channel / Dh)
    angle = t[:, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE of x (B, H, T, Dh): channel i of the first half turns with channel i of the second. cos,
    sin: (T, Dh/2).
    """
    if on_kernels(x):
        return kernels.rotate(x, cos, sin)
    shape = x.shape[2], x.shape[3] // 2
    require(cos.shape == sin.shape == shape and cos.dtype == sin.dtype == torch.float32,
            f"rotate: cos and sin are {shape} float32, not {tuple(cos.shape)} {cos.dtype} "
            f"and {tuple(sin.shape)} {sin.dtype}")
    x1, x2 = x.chunk(2, dim=-1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1).to(x.dtype)


def masked_attention(q, k, v, mask):
    """Equation (3) for a given mask: softmax(q k^T / sqrt(Dh)) v, where the softmax runs over keys
    whose mask is True.

    q: (B, H, T, Dh); k, v: (B, H, n, Dh); mask: bool, broadcasts to (B, H, T, n), or one of
    PyTorch's own masks. Returns (B, H, T, Dh).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention(q, k_rec, v_rec, dilation, window, sinks):
    """Causal attention of a whole sequence, equation (3), over the positions that equation (4)
    allows.

    q, k_rec, v_rec: (B, H, T, Dh), after RoPE, one dtype unless autocast chooses it. Returns (B, H,
    T, Dh), differentiable. With dilation 1, or a window over all, it is dense attention, PyTorch's
    own. ValueError for shapes or dtypes that do not match.
    """
    require(q.shape == k_rec.shape == v_rec.shape,
            "attention: q, k_rec, v_rec share a shape (B, H, T, Dh), not {}, {}, {}",
            q.shape, k_rec.shape, v_rec.shape)
    one_dtype = q.dtype == k_rec.dtype == v_rec.dtype
    require(one_dtype or torch.is_autocast_enabled(q.device.type),
            "attention: q, k_rec, v_rec share a dtype, not {}, {}, {}",
            q.dtype, k_rec.dtype, v_rec.dtype)
    T = q.shape[2]
    if dilation == 1 or window >= T - 1:
        return F.scaled_dot_product_attention(q, k_rec, v_rec, is_causal=True)
    if on_kernels(q):
        return kernels.attention(q, k_rec, v_rec, dilation, window, sinks)
    t = torch.arange(T, device=q.device)
    mask = allowed(t[:, None], t, dilation, window, sinks)                  # (T, T): query, key
    return masked_attention(q, k_rec, v_rec, mask)


# ---------------------------------------------------------------------------------------------
# Top-k blocks: the positions that a query attends to follow from the data
#
# The past is cut into blocks of N positions. A query scores each earlier block by a summary of the
# block's keys. It attends to K blocks in full: its own block up to itself, and the K - 1 earlier
# blocks with the best scores. In the same softmax it attends to what equation (4) allows elsewhere.
# With D = N that is the last position of each block not chosen, which stands for its block by the
# recurrence. The score of block b for q_t, keys after RoPE:
#
#   mean     q_t . mean of its keys                                     as in MoBA
#   minmax   sum over channels c of max(q_tc max k_pc, q_tc min k_pc)   as in Quest
#   last     q_t . k~ at its last position                              the dilated key of D = N

SCORES = "mean", "minmax", "last"


def block_summaries(k_rec, block, score):
    """What the scores read of keys (B, H, n * block, Dh): (B, H, n, Dh), or (B, H, n, 2 Dh) for
    minmax, in their dtype.
    """
    k = k_rec.unflatten(2, (k_rec.shape[2] // block, block))
    if score == "mean":
        return k.mean(3)
    if score == "minmax":
        return torch.cat((k.amax(3), k.amin(3)), dim=-1)
    return k[:, :, :, -1]                              # last: a view of the keys


def block_scores(q, summaries, score):
    """(B, H, T, n) float32: the scores of n blocks for the queries q (B, H, T, Dh)."""
    q = q.float()
    if score == "minmax":                              # positive q: largest at max k, else at min k
        positive = q.clamp(min=0)
        q = torch.cat((positive, q - positive), dim=-1)
    with torch.autocast(q.device.type, enabled=False):
        return q @ summaries.float().mT


@torch.no_grad()
def choose_blocks(q, summaries, t, rule):
    """The blocks that queries at positions t (T,) attend to in full: (B, H, T, n) bool over n
    blocks.

    The choice has no gradient. A query's own block is always chosen, and later blocks never are.
    Both are settled whatever their scores, so unfinished summaries do not matter.
    """
    own = (t // rule.block)[:, None]
    b = torch.arange(summaries.shape[2], device=q.device)
    scores = block_scores(q, summaries, rule.score)
    scores = scores.masked_fill(b == own, math.inf)
    scores = scores.masked_fill(b > own, -math.inf)
    best = scores.topk(min(rule.topk, len(b))).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & (b <= own)


def attention_topk(q, k_rec, v_rec, summaries, t, rule):
    """Equation (3) for queries at positions t (T,) over their top-k blocks and what `rule` allows
    elsewhere.

    q: (B, H, T, Dh); k_rec, v_rec: (B, H, n, Dh), the keys at positions 0 to n - 1; summaries: of
    their blocks. Returns (B, H, T, Dh), differentiable in q, k_rec, v_rec.
    """
    p = torch.arange(k_rec.shape[2], device=q.device)
    chosen = choose_blocks(q, summaries, t, rule)
    in_chosen = chosen[..., p // rule.block]                                # (B, H, T, n)
    mask = in_chosen & (p <= t[:, None]) | rule.allowed(t[:, None], p)
    return masked_attention(q, k_rec, v_rec, mask)


# ---------------------------------------------------------------------------------------------
# A rule and a head group. Patterns, further down, are made of these.

@dataclass(frozen=True)
class Rule:
    """Which positions a head may attend to: the sizes of equation (4). Dilation 0: no grid; topk 0:
    no top-k blocks.
    """
    dilation: int = 0
    window: int = 0
    sinks: int = 0
    block: int = 0
    topk: int = 0
    score: str = "mean"                                # of blocks, one of SCORES

    @property
    def span(self):
        """The sizes that `allowed` and `attention` take, in their order."""
        return self.dilation, self.window, self.sinks

    @property
    def reach(self):
        """The largest t - p of a key that a query sees and that is no sink and not on the grid."""
        return self.window

    def allowed(self, t, p):
        return allowed(t, p, *self.span)

    def within(self, max_len):
        """The same rule for sequences of up to max_len positions: a longer window, more sinks and
        larger blocks are cut to that.
        """
        window = min(self.window, max_len)
        sinks = min(self.sinks, max_len)
        block = min(self.block, max(1, max_len))
        return replace(self, window=window, sinks=sinks, block=block)

    def attend(self, q, k_rec, v_rec):
        """Attention of a whole sequence under this rule; shapes as for `attention`."""
        if not self.topk:
            return attention(q, k_rec, v_rec, *self.span)
        T = q.shape[2]
        rule = self.within(T)
        padded = F.pad(k_rec.detach(), (0, 0, 0, -T % rule.block))
        summaries = block_summaries(padded, rule.block, rule.score)
        if on_kernels(q):
            return kernels.attention_topk(q, k_rec, v_rec, rule, summaries)
        return attention_topk(q, k_rec, v_rec, summaries, torch.arange(T, device=q.device), rule)

    def count_keys(self, t):
        """How many keys the queries at t (n,) attend to, in float64. t: int64 on the CPU.

        Which blocks top-k takes follows from the data. The count is then the mean over all choices
        of blocks.
        """
        p = torch.arange(int(t.max()) + 1)
        granted = self.allowed(t[:, None], p)
        if not self.topk:
            return granted.sum(1).double()
        own = t // self.block                          # so many blocks lie before the own one
        taken = own.clamp(max=self.topk - 1)
        elsewhere = (granted & (p // self.block < own[:, None])).sum(1)
        not_taken = 1 - taken.double() / own.clamp(min=1)      # share of the earlier blocks
        in_own = t % self.block + 1
        return in_own + taken * self.block + elsewhere * not_taken


@dataclass(frozen=True)
class Group:
    """Neighbouring heads of a layer that follow one rule: share `index` of `of` equal shares."""
    rule: Rule
    index: int = 0
    of: int = 1

    def pick(self, x, dim=1):
        """This group's heads of x, which has all heads of the layer in dimension `dim`."""
        size = x.shape[dim] // self.of
        return x.narrow(dim, self.index * size, size)

    def attend(self, q, k_rec, v_rec, start=0):
        """Attention of a whole sequence in the heads of this group: (B, heads, T, Dh).

        start is 0. A GroupCache has the same method for chunks that start later.
        """
        return self.rule.attend(self.pick(q), self.pick(k_rec), self.pick(v_rec))


# ---------------------------------------------------------------------------------------------
# The layer

class Projected(NamedTuple):
    """The parts of equation (1). g is None without recurrence."""
    o: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None = None

    def map(self, change):
        return Projected(*(z if z is None else change(z) for z in self))


class Projection(nn.Linear):
    """in_proj of equation (1): x (..., C) -> Projected, each part (..., C). The rows of the weight
    are o, q, k, v, g.
    """

    def __init__(self, config):
        self.widths = tuple(config.widths.values())
        super().__init__(config.n_embd, sum(self.widths), bias=False)

    def forward(self, x):
        return Projected(*super().forward(x).split(self.widths, dim=-1))


class Mixing(nn.Module):
    """Temporal mixing, the part of a transformer that RAT+ changes: (1) to (4), and the gate and
    out_proj of (5).
    """

    def __init__(self, config):
        super().__init__()
        self.head_width = config.head_width
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        self.in_proj = Projection(config)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def split_heads(self, x):
        """(B, T, H * Dh) -> (B, H, T, Dh)"""
        B, T, channels = x.shape
        return x.view(B, T, channels // self.head_width, self.head_width).transpose(1, 2)

    def forward(self, x, rope, groups, state=None, start=0):
        """A sequence, all positions at once: x (B, T, C) -> (B, T, C).

        rope: cos and sin of x's positions. groups: the head groups of this layer. A chunk that
        continues a sequence gives more: groups are then the caches of the head groups, state (2, B,
        C) is the recurrent state, which is replaced by the state after x, and start is the first
        position.
        """
        o, q, k, v, g = self.in_proj(self.norm(x))                          # (1)
        k_rec, v_rec = k, v
        if g is not None:
            k_rec, v_rec, new_state = recurrence(k, v, g, state)            # (2)
            if state is not None:
                torch.stack(new_state, out=state)
        q = rotate(self.split_heads(q), *rope)
        k_rec = rotate(self.split_heads(k_rec), *rope)                      # after the recurrence
        v_rec = self.split_heads(v_rec)
        y = join_heads([group.attend(q, k_rec, v_rec, start) for group in groups])   # (3), (4)
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, C)
        return self.out_proj(torch.sigmoid(o) * y)                          # (5)

    def project_one(self, x):
        """Equation (1) for one token of each sequence: x (B, C) -> Projected, parts (B, H, Dh)."""
        heads = lambda z: z.unflatten(-1, (z.shape[-1] // self.head_width, self.head_width))
        return self.in_proj(self.norm(x)).map(heads)


def join_heads(parts):
    """The heads of all groups side by side, in dimension 1."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Block(nn.Module):
    """Temporal mixing, then the MLP (exact GELU, width 4C). Each is added to the residual stream:
    equation (5).
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.mix = Mixing(config)
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.fc1 = nn.Linear(C, 4 * C, bias=False)
        self.fc2 = nn.Linear(4 * C, C, bias=False)

    def widen(self, x):
        """The first half of the MLP: (..., C) -> (..., 4C)."""
        return F.gelu(self.fc1(self.norm(x)))

    def forward(self, x, rope, groups, state=None, start=0):
        x = x + self.mix(x, rope, groups, state, start)
        return x + self.fc2(self.widen(x))

    def step(self, x, rope, groups, seen):
        """One token of each sequence: x (B, C) -> (B, C). The same equations, against the caches of
        the head groups.

        rope: cos and sin of the token's position. seen: (1,) int64 on the device, that position.
        """
        token = self.mix.project_one(x)                                     # (1)
        y = join_heads([group.step(token, rope, seen) for group in groups])     # (2) to (5)
        x, wide = self.widen_one(x, y)
        return self.narrow_one(x, wide)

    def widen_one(self, x, y):
        """out_proj and the first half of the MLP for one token: x (B, C) and y (B, H, Dh), gated ->
        the new x, and (B, 4C).
        """
        x = x + self.mix.out_proj(y.flatten(1))
        return x, self.widen(x)

    def narrow_one(self, x, wide):
        """The second half of the MLP for one token: x (B, C), wide (B, 4C) -> (B, C)."""
        return x + self.fc2(wide)


# ---------------------------------------------------------------------------------------------
# The cache: what decoding keeps, and where
#
# After a prompt and some steps, `seen` tokens have gone by: positions 0 to seen - 1. The next query
# is at position t = seen. A position p is kept if that query may attend to it: allowed(t, p). This
# is enough for all later queries too: what leaves the window comes back for none of them, and the
# grid and the sinks never leave.
#
# The positions that are kept lie in slots, [ sinks | ring | grid ]:
#
#   on the grid         slot S + W + p // D
#   else, a sink        slot p
#   else                ring slot S + p mod W, until it is overwritten
#
# For example D4W3S2 after 14 tokens, positions 0 to 13:
#
#   slot         0    1  |  2    3    4  |  5    6    7
#   position     0    1  | 12   13    -  |  3    7   11        the window of query 14 is 11, 12, 13
#
# Slot 4 is a hole: it is the ring slot of 11, but 11 is on the grid and has its slot there.
# `positions` calls it empty, so whatever it holds is not attended to. A sink on the grid leaves a
# hole too. Every position within reach is stored. So which position lies in a slot follows from
# `seen` alone, and there is no table of positions. Keys are stored after RoPE.

class Layout:
    """The slots of a head group: which position lies in which slot."""

    def __init__(self, rule, max_len):
        self.rule = rule.within(max_len)               # of what is kept, not of who attends
        if rule.dilation == 1 or rule.topk:            # every position is on the grid, in order
            self.rule = Rule(dilation=1)
        self.span = self.rule.span
        self.ring = self.rule.reach
        self.before_grid = self.rule.sinks + self.ring
        grid = max_len // self.rule.dilation if self.rule.dilation else 0
        self.slots = self.before_grid + grid

    def slot_of(self, p):
        """The slot of each position p, an int64 tensor, as far as it is kept."""
        dilation = self.rule.dilation
        sinks = self.rule.sinks
        slot = torch.where(p < sinks, p, sinks + p % max(self.ring, 1))
        in_grid = self.before_grid + p // max(dilation, 1)
        return torch.where(on_grid(p, dilation), in_grid, slot)

    def positions(self, seen):
        """The position in each slot after `seen` tokens, int64 (slots,); FUTURE in an empty slot.
        seen: int64 (1,).
        """
        slot = torch.arange(self.slots, device=seen.device)
        in_ring = slot - self.rule.sinks
        in_grid = slot - self.before_grid
        last = seen - 1
        latest = last - (last - in_ring) % max(self.ring, 1)    # last p = in_ring modulo ring
        p = torch.where(in_grid < 0, latest, (in_grid + 1) * self.rule.dilation - 1)
        p = torch.where(in_ring < 0, slot, p)
        empty = (p < 0) | (p > last) | (self.slot_of(p) != slot)
        return p.masked_fill(empty, FUTURE)

    def keeps(self, p, end):
        """Is position p of a sequence of `end` tokens kept? It is if the query at `end` may attend
        to it.
        """
        return self.rule.allowed(end, p)

    @functools.lru_cache(maxsize=16)                   # computed once for all layers of a cache
    def kept(self, start, end, device):
        """Which of the positions start to end - 1 are kept, and their slots: int64, on `device`."""
        p = torch.arange(start, end)                   # on the CPU: choosing must not wait
        p = p[self.keeps(p, end)]
        return p.to(device), self.slot_of(p).to(device)

    @functools.lru_cache(maxsize=16)
    def window_slots(self, start, device):
        """The slots of the positions before `start` that are within reach, in order of position,
        those on the grid too.
        """
        p = torch.arange(max(start - self.ring, 0), start)
        return self.slot_of(p).to(device)


class GroupCache:
    """The keys (after RoPE), the values and the recurrent state of one head group of one layer.

    k, v: (B, heads, slots, Dh); like: the same without slots. state: (2, B, heads, Dh), a view of
    the layer's; without recurrence it has no elements. arrived: zeros, in which kernels count.
    """

    def __init__(self, group, layout, like, state):
        self.group = group
        self.rule = group.rule
        self.layout = layout
        self.state = state
        B, heads, _, Dh = like.shape
        self.k = like.new_zeros(B, heads, layout.slots, Dh)
        self.v = like.new_zeros(B, heads, layout.slots, Dh)
        self.tensors = [self.k, self.v]                # all that it allocated for positions
        self.arrived = like.new_zeros(B * heads, dtype=torch.int32)

    def held(self, seen):
        """How many positions are held after `seen` tokens."""
        p = self.layout.positions(seen)
        return int(self.layout.keeps(p, seen).sum())

    def bytes_read(self, t):
        """Mean of the bytes that a step must read of it, over the positions in t (n,), int64, CPU.
        The plain step reads all slots.
        """
        earlier = self.rule.count_keys(t) - 1          # its own key is not read from the cache
        return earlier.mean().item() * 2 * self.k[:, :, :1].nbytes

    def store(self, k_rec, v_rec, start):
        """Keep what later queries may need of k_rec, v_rec (B, heads, T, Dh), the positions from
        `start` on.
        """
        end = start + k_rec.shape[2]
        dilation = self.layout.rule.dilation
        if dilation and not self.layout.before_grid:   # nothing but the grid: every D-th position
            slots = slice(start // dilation, end // dilation)
            kept = slice(-(start + 1) % dilation, None, dilation)
            self.k[:, :, slots] = k_rec[:, :, kept]
            self.v[:, :, slots] = v_rec[:, :, kept]
            return
        p, slots = self.layout.kept(start, end, self.k.device)
        self.k.index_copy_(2, slots, k_rec.index_select(2, p - start))
        self.v.index_copy_(2, slots, v_rec.index_select(2, p - start))

    def with_window(self, k_rec, v_rec, start):
        """k_rec and v_rec with the keys and values before `start` that are within reach in front,
        in order of position.
        """
        if not self.layout.ring:
            return k_rec, v_rec
        slots = self.layout.window_slots(start, self.k.device)
        k = torch.cat((self.k.index_select(2, slots), k_rec), dim=2)
        v = torch.cat((self.v.index_select(2, slots), v_rec), dim=2)
        return k, v

    def attend(self, q, k_rec, v_rec, start):
        """Attention of a chunk from position `start` on, over itself and what is held. The chunk is
        stored too. Where the ring would lose what the chunk still needs, that is read first.

        q, k_rec, v_rec: (B, H, T, Dh), after RoPE, of all heads. Returns (B, heads, T, Dh).
        """
        q, k_rec, v_rec = map(self.group.pick, (q, k_rec, v_rec))
        T = q.shape[2]
        if start == 0:
            self.store(k_rec, v_rec, start)
            return attention(q, k_rec, v_rec, *self.layout.span)
        if self.layout.rule.dilation == 1:             # the slots are the positions
            self.store(k_rec, v_rec, start)
            end = start + T
            k = self.k[:, :, :end]
            v = self.v[:, :, :end]
            return masked_attention(q, k, v, causal_lower_right(T, end))
        if on_kernels(q):
            local = self.with_window(k_rec, v_rec, start)    # before the ring is overwritten
            self.store(k_rec, v_rec, start)
            return kernels.attention_chunk(q, *local, self, start)
        t = torch.arange(start, start + T, device=q.device)
        stored = self.layout.positions(t[:1])
        p = torch.cat((stored, t))
        k = torch.cat((self.k, k_rec), dim=2)
        v = torch.cat((self.v, v_rec), dim=2)
        y = masked_attention(q, k, v, self.layout.rule.allowed(t[:, None], p))
        self.store(k_rec, v_rec, start)
        return y

    def recur(self, token):
        """Equation (2) for one token: k~ and v~ (B, heads, Dh), which are also the new state."""
        if token.g is None:
            return token.k, token.v
        a, rest = decay(token.g.to(self.state.dtype))
        kv = torch.stack((token.k, token.v))
        self.state.copy_(a * self.state + rest * kv)
        return self.state.to(token.k.dtype)

    def step(self, token, rope, seen):
        """Equations (2) to (4) and the gate of (5) for one new token at position `seen`: (B, heads,
        Dh).

        token: o, q, k, v, g of all heads, (B, H, Dh) each. seen: (1,) int64 on the device.
        """
        token = token.map(self.group.pick)
        if on_kernels(token.q):
            run = kernels.decode_topk if self.rule.topk else kernels.decode
            return run(token, self, rope, seen)
        k, v = self.recur(token)                                            # (2)
        q = rotate(token.q[:, :, None], *rope)                              # (B, heads, 1, Dh)
        k = rotate(k[:, :, None], *rope)
        y = self.attend_one(q, k, v[:, :, None], seen)                      # (3), (4)
        return torch.sigmoid(token.o) * y[:, :, 0]                          # (5)

    def attend_one(self, q, k, v, seen):
        """Attention of one query over what is held and itself. The token is stored only afterwards.

        The order matters: the slot that the token takes in the ring holds position t - W until
        then, and the query at t still attends to t - W.
        """
        p = torch.cat((self.layout.positions(seen), seen))
        mask = self.rule.allowed(seen[:, None], p)                          # (1, slots + 1)
        all_k = torch.cat((self.k, k), dim=2)
        all_v = torch.cat((self.v, v), dim=2)
        y = masked_attention(q, all_k, all_v, mask)
        if self.layout.keeps(seen, seen + 1):
            slot = self.layout.slot_of(seen)
            self.k.index_copy_(2, slot, k)
            self.v.index_copy_(2, slot, v)
        return y


class TopkCache(GroupCache):
    """The same with top-k blocks. A later query may choose any block, so every position is held, in
    order.

    summaries: of all blocks, as `block_summaries` makes them, in the dtype of the keys.
    """

    def __init__(self, group, layout, like, state):
        super().__init__(group, layout, like, state)
        self.rule = group.rule.within(layout.slots)
        self.summaries = block_summaries(self.k, self.rule.block, self.rule.score)
        if self.rule.score != "last":                  # that one is a view of the keys
            self.tensors.append(self.summaries)

    def bytes_read(self, t):
        blocks = (t // self.rule.block).double().mean().item()
        return super().bytes_read(t) + blocks * self.summaries[:, :, :1].nbytes

    def summarise(self, start, end):
        """Renew the summaries of the blocks that hold positions start - 1 to end - 1.

        The kernels write a block's summary only at the step after it is full: hence start - 1.
        """
        if self.rule.score == "last":
            return
        size = self.rule.block
        first_block = max(start - 1, 0) // size
        end_block = -(-end // size)
        keys = self.k[:, :, first_block * size:end_block * size]
        self.summaries[:, :, first_block:end_block] = block_summaries(keys, size, self.rule.score)

    def attend(self, q, k_rec, v_rec, start):
        q, k_rec, v_rec = map(self.group.pick, (q, k_rec, v_rec))
        end = start + q.shape[2]
        self.store(k_rec, v_rec, start)
        self.summarise(start, end)
        k = self.k[:, :, :end]
        v = self.v[:, :, :end]
        if on_kernels(q):
            return kernels.attention_topk(q, k, v, self.rule, self.summaries)
        t = torch.arange(start, end, device=q.device)
        summaries = self.summaries[:, :, :-(-end // self.rule.block)]
        return attention_topk(q, k, v, summaries, t, self.rule)

    def attend_one(self, q, k, v, seen):
        """The token is stored first here: every position has a slot of its own."""
        self.k.index_copy_(2, seen, k)
        self.v.index_copy_(2, seen, v)
        if self.rule.score != "last":
            size = self.rule.block
            block = seen // size
            p = block * size + torch.arange(size, device=seen.device)
            keys = self.k.index_select(2, p)
            self.summaries.index_copy_(2, block, block_summaries(keys, size, self.rule.score))
        return attention_topk(q, self.k, self.v, self.summaries, seen, self.rule)


class Cache:
    """What decoding keeps of `batch` sequences of up to max_len tokens. RATPlus.new_cache makes it.

    length: how many tokens it has seen. seen: the same number on the device, (1,) int64.
    groups[layer][group]: a GroupCache. state[layer]: (2, B, C) float32 (float64 in a float64
    model), k~ before RoPE and v~. The dtype of keys and values is fixed here; so is the dtype that
    prefill and steps compute in.
    """

    def __init__(self, config, batch, max_len, pattern, dtype, weight):
        self.pattern = pattern
        self.batch = batch
        self.max_len = max_len
        self.dtype = dtype
        self.weight_dtype = weight.dtype
        self.whole = True
        self.length = 0
        self.seen = torch.zeros(1, dtype=torch.long, device=weight.device)
        self.groups = []
        self.state = []
        self.layouts = {}                              # of each rule
        exact = torch.promote_types(dtype, torch.float32)
        for i in range(config.n_layer):
            state = weight.new_zeros(2, batch, config.state_width, dtype=exact)
            self.state.append(state)
            H = config.state_width // config.head_width
            state = state.unflatten(-1, (H, config.head_width))             # (2, B, H, Dh)
            like = weight.new_empty(batch, config.n_head, 0, config.head_width, dtype=dtype)
            groups = pattern.groups(i)
            self.groups.append([self.new_group(group, like, state) for group in groups])

    def new_group(self, group, like, state):
        block = group.rule.within(self.max_len).block or 1
        max_len = -(-self.max_len // block) * block    # top-k: whole blocks
        if group.rule not in self.layouts:
            self.layouts[group.rule] = Layout(group.rule, max_len)
        layout = self.layouts[group.rule]
        kind = TopkCache if group.rule.topk else GroupCache
        return kind(group, layout, group.pick(like), group.pick(state, dim=2))

    def check(self, T, weight):
        """ValueError if a model of this weight can't append T more tokens."""
        require(self.whole, "the cache is incomplete: appending to it failed halfway")
        require(self.length + T <= self.max_len, "the cache is too short: "
                f"{self.length} tokens seen + {T} new > max_len {self.max_len}")
        require(weight.dtype == self.weight_dtype and weight.device == self.seen.device,
                f"the cache was made for {self.weight_dtype} weights on {self.seen.device}, "
                f"the model has {weight.dtype} on {weight.device}")

    @contextlib.contextmanager
    def appending(self, T):
        """Around what appends T tokens. The cache counts as broken until that has succeeded; then
        its length advances, here and on the device. No other place changes it.
        """
        self.whole = False
        yield
        self.seen += T
        self.length += T
        self.whole = True

    def computing(self):
        """A context in which models compute in the dtype of this cache, whatever autocast says."""
        on = self.dtype != self.weight_dtype
        return torch.autocast(self.seen.device.type, self.dtype, enabled=on, cache_enabled=False)

    def all_groups(self):
        return itertools.chain(*self.groups)

    @property
    def nbytes(self):
        """Bytes of all keys, values, summaries and states, as allocated."""
        tensors = itertools.chain(self.state, *(group.tensors for group in self.all_groups()))
        return sum(z.nbytes for z in tensors)

    @property
    def slots(self):
        """slots[layer][group]: how many slots hold a position now (not how many were allocated)."""
        counts = []
        for groups in self.groups:
            counts.append([group.held(self.seen) for group in groups])
        return counts

    def bytes_read(self, t):
        """Mean of the bytes that a step reads, over the positions in t (n,), int64, CPU."""
        states = sum(z.nbytes for z in self.state)
        return states + sum(group.bytes_read(t) for group in self.all_groups())


# ---------------------------------------------------------------------------------------------
# The model

def head_loss(x, weight, targets, dtype):
    """Output head and cross-entropy, summed over the targets that are not -100: a float32 scalar.

    x: (N, C); weight: (V, C); targets: (N,) int64; dtype: of the kernel's matrix product. Another
    target outside [0, V) is a ValueError on a CPU. On a GPU the sum is NaN then, since an error
    would have to wait for the device.
    """
    wrong = (targets != -100) & ((targets < 0) | (targets >= len(weight)))
    if not targets.is_cuda:
        found = targets[wrong][:1].tolist()
        require(not found, f"loss: targets are -100 or lie in [0, {len(weight)}), not {found}")
    if on_kernels(x):
        return kernels.head_loss(x, weight, targets, dtype)
    logits = F.linear(x, weight)
    total = F.cross_entropy(logits, targets.masked_fill(wrong, -100), reduction="sum")
    return total.masked_fill(wrong.any(), math.nan)


class RATPlus(nn.Module):
    """The language model. Its weights know no pattern: every call names one, as text or Pattern.
    The default is D1, dense.

    checkpointing: set it to True to hold only the inputs of blocks in training and compute the rest
    again in backward.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)         # also the output head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    @property
    def compute_dtype(self):
        """The dtype of matrix products: autocast's, or that of the weights."""
        kind = self.embed.weight.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.embed.weight.dtype

    def hidden(self, idx, pattern):
        """(B, T) int -> (B, T, C): all but the last norm and the head. pattern: a Pattern."""
        shape = tuple(idx.shape)
        require(len(shape) == 2 and shape[1] >= 1, f"tokens are (B, T >= 1), not {shape}")
        rope = rope_angles(torch.arange(idx.shape[1], device=idx.device), self.config.head_width)
        x = self.embed(idx)
        for i, block in enumerate(self.blocks):
            groups = pattern.groups(i)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, groups, use_reentrant=False)
            else:
                x = block(x, rope, groups)
        return x

    def head(self, x):
        """(..., C) -> logits (..., V)"""
        return F.linear(self.norm(x), self.embed.weight)

    def forward(self, idx, pattern="D1"):
        """Logits (B, T, V) of idx (B, T), all positions in parallel. ValueError for a pattern that
        does not fit.
        """
        pattern = Pattern.parse(pattern).fit(self.config)
        return self.head(self.hidden(idx, pattern))

    def loss(self, idx, targets, pattern="D1"):
        """Mean cross-entropy in nats over the targets (B, T) that are not -100, a float32 scalar; 0
        if every target is -100. A target of -1 means the same, as in nanoGPT.

        ValueError for targets of another shape, and on a CPU for other targets outside the
        vocabulary (see head_loss).
        """
        same = targets.shape == idx.shape and targets.device == idx.device
        require(same, f"loss: targets {tuple(targets.shape)} on {targets.device} for tokens "
                f"{tuple(idx.shape)} on {idx.device}")
        pattern = Pattern.parse(pattern).fit(self.config)
        x = self.norm(self.hidden(idx, pattern)).flatten(0, 1)
        targets = targets.long().masked_fill(targets == -1, -100)
        total = head_loss(x, self.embed.weight, targets.flatten(), self.compute_dtype)
        return total / (targets != -100).sum().clamp(min=1)

    def compile(self, **options):
        """torch.compile each block by itself. They are alike: one graph a rule serves them all."""
        for block in self.blocks:
            block.compile(**options)

    def compile_step(self, **options):
        """torch.compile what a decoding step computes before and after the caches' part of it.

        The two halves of the MLP are compiled apart. In one graph the compiler would compute the
        residual sum anew for each output of fc1, and GELU for each of fc2.
        """
        self.embed_one = torch.compile(self.embed_one, **options)
        for block in self.blocks:
            block.mix.project_one = torch.compile(block.mix.project_one, **options)
            block.widen_one = torch.compile(block.widen_one, **options)
            block.narrow_one = torch.compile(block.narrow_one, **options)

    # Decoding. A prompt is appended in chunks, all positions of a chunk at once; then one token at
    # a time is appended.

    def new_cache(self, batch, max_len, pattern="D1", device=None):
        """An empty Cache for `batch` sequences of up to max_len tokens, in the compute dtype.

        device: where, by default with the weights; "meta" allocates nothing and still knows its
        nbytes.
        """
        pattern = Pattern.parse(pattern).fit(self.config)
        weight = self.embed.weight.detach()
        if device is not None:
            weight = weight.to(device)
        return Cache(self.config, batch, max_len, pattern, self.compute_dtype, weight)

    def append(self, idx, cache):
        """Run idx (B, T) as the continuation of what the cache has seen; x (B, C) of the last
        position, before the head.
        """
        t = torch.arange(idx.shape[1], device=idx.device) + cache.seen
        rope = rope_angles(t, self.config.head_width)
        x = self.embed(idx)
        for block, groups, state in zip(self.blocks, cache.groups, cache.state):
            state = state if state.numel() else None
            x = block.forward(x, rope, groups, state, cache.length)    # never the compiled block
        return x[:, -1]

    def append_one(self, token, cache):
        """The same for one token (B,) of each sequence. It reads the position on the device, so a
        CUDA graph can hold it.
        """
        x, rope = self.embed_one(token, cache.seen)
        for block, groups in zip(self.blocks, cache.groups):
            x = block.step(x, rope, groups, cache.seen)
        return x

    def embed_one(self, token, seen):
        """x (B, C) of one token (B,) of each sequence, and cos and sin of its position."""
        rope = rope_angles(seen, self.config.head_width)
        return self.embed(token.clamp(min=0)), rope                         # -1: see `choose`

    @torch.no_grad()
    def prefill(self, idx, cache, chunk=8192):
        """Append idx (B, T) to the cache; returns logits (B, V) of the last position. Call it again
        to append more.

        Long prompts go in chunks, so that only one chunk's activations exist at a time. ValueError,
        with the cache unchanged, if idx does not fit the cache.
        """
        shape = tuple(idx.shape)
        require(len(shape) == 2 and shape[0] == cache.batch and shape[1] >= 1,
                f"prefill: tokens {shape}, the cache wants ({cache.batch}, T >= 1)")
        if not idx.is_cuda and idx.numel():
            V = self.config.vocab_size
            require(0 <= idx.min() and idx.max() < V, f"prefill: a token is outside [0, {V})")
        cache.check(idx.shape[1], self.embed.weight)
        with cache.computing():
            for piece in idx.split(chunk, dim=1):
                T = piece.shape[1]
                with cache.appending(T):
                    if T == 1:
                        x = self.append_one(piece[:, 0], cache)
                    else:
                        x = self.append(piece, cache)
            return self.head(x)

    def step(self, token, cache):
        """Append one token (B,) to each sequence; returns logits (B, V) for the next."""
        return self.prefill(token[:, None], cache)

    @torch.no_grad()
    def decode(self, logits, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Yield tokens (B,) until the cache is full, which is a ValueError: the first drawn from
        logits (B, V), each next one after appending the one before. A sequence that yielded `stop`
        yields it ever after.

        With kernels on a GPU this has three phases. The first step runs as it is, which compiles
        the kernels. Then a step is captured as a CUDA graph, which runs nothing: a graph is a list
        of kernels with fixed arguments, sampling included. The second step and all later ones
        replay it. `cache.appending` advances `cache.seen` outside the graph; kernels read it there.
        """
        generator = new_generator(logits.device)
        token = choose(logits, temperature, top_k, top_p, generator)

        def step():
            """Replace `token` by the next one."""
            following = self.head(self.append_one(token, cache))
            new = choose(following, temperature, top_k, top_p, generator)
            token.copy_(new if stop is None else new.masked_fill(token == stop, stop))

        advance = step
        for i in itertools.count():
            yield token.clone()
            cache.check(1, self.embed.weight)
            with cache.appending(1), cache.computing():
                if i == 1 and logits.is_cuda and on_kernels(logits):
                    advance = capture(step, generator)
                advance()

    def stream(self, idx, n_new, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Prefill idx, then yield up to n_new tokens (B,) as `decode` does; fewer if all sequences
        stop. ValueError if the logits become NaN.

        NaN and stop are checked every 16 tokens, NaN also at the end: a check makes the host wait.
        """
        tokens = self.decode(self.prefill(idx, cache), cache, temperature, top_k, top_p, stop)
        recent = []
        for i, token in enumerate(itertools.islice(tokens, n_new), 1):
            recent.append(token)
            if i % 16 == 0 or i == n_new:
                require((torch.stack(recent) >= 0).all(), NO_TOKEN)
                recent.clear()
            yield token
            if i % 16 == 0 and stop is not None and (token == stop).all():
                return

    def generate(self, idx, n_new, pattern="D1", temperature=1.0, top_k=None, top_p=None,
                 stop=None):
        """idx (B, T) and n_new tokens after it: (B, T + n_new). Sequences that reach `stop` are
        filled up with it.
        """
        cache = self.new_cache(len(idx), idx.shape[1] + n_new, pattern)
        new = list(self.stream(idx, n_new, cache, temperature, top_k, top_p, stop))
        new += new[-1:] * (n_new - len(new))
        return torch.cat((idx, *(token[:, None] for token in new)), dim=1)


CAPTURING = threading.Lock()                           # PyTorch captures one graph at a time
STREAMS = threading.local()


def capture_stream(device):
    """This thread's stream for capturing. Each stream gets a workspace for matrix products. A
    stream for each graph would waste memory, and graphs of two threads must not share one.
    """
    if str(device) not in STREAMS.__dict__:
        STREAMS.__dict__[str(device)] = torch.cuda.Stream(device)
    return STREAMS.__dict__[str(device)]


def capture(step, generator):
    """The CUDA graph of step() as a function that replays it; step itself if it can't be captured.

    Capturing runs nothing. It happens on a stream of its own, and other threads may use the GPU
    meanwhile.
    """
    device = generator.device
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    stream = capture_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with CAPTURING, torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        warnings.warn(f"decoding goes on without a CUDA graph: {str(error).splitlines()[0]}")
        return step
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


# ---------------------------------------------------------------------------------------------
# Sampling

NO_TOKEN = "the model's logits are NaN: there is no next token"


def new_generator(device):
    """A random generator on `device`, seeded by torch's own: torch.manual_seed fixes it, and other
    threads leave it alone.
    """
    generator = torch.Generator(device)
    return generator.manual_seed(torch.randint(2**62, ()).item())


def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token (B,) from logits (B, V), in float32. Nothing here makes the host wait for a GPU.

    temperature: 0 takes the likeliest token. top_k: draw among the k likeliest. top_p: draw among
    the fewest tokens whose probabilities reach p. A logit of +inf is the likeliest. Where a row
    holds NaN there is no token: -1 on a GPU, a ValueError on a CPU. ValueError for impossible
    arguments.
    """
    k_right = top_k is None or top_k >= 1
    p_right = top_p is None or 0 < top_p <= 1
    require(temperature >= 0 and k_right and p_right,
            "sampling wants temperature >= 0, top_k >= 1, 0 < top_p <= 1; got "
            f" {temperature}, {top_k}, {top_p}")
    best, likeliest = logits.max(-1, keepdim=True)
    lost = best[:, 0].isnan()
    require(logits.is_cuda or not lost.any(), NO_TOKEN)
    if temperature == 0:
        return likeliest[:, 0].masked_fill(lost, -1)
    below = (logits.float() - best).masked_fill(logits == best, 0)    # +inf - inf is NaN
    probs = (below / max(temperature, 1e-30)).softmax(-1)
    tokens = None
    if top_k is not None or top_p is not None:
        V = probs.shape[-1]
        probs, tokens = probs.topk(min(top_k or V, V))                 # the likeliest first
    if top_p is not None:
        mass = (probs.double() * 2**52).long()         # integers: the sum repeats on a GPU
        likelier = mass.cumsum(-1) - mass              # the mass of all likelier tokens
        probs = probs.masked_fill(likelier >= top_p * mass.sum(-1, keepdim=True), 0)
    # With e_i drawn from an exponential, the largest p_i / e_i lies at i with probability p_i.
    # Unlike multinomial this never makes the host wait.
    e = torch.empty_like(probs).exponential_(generator=generator).clamp_(min=1e-10)
    drawn = (probs / e).argmax(-1)
    if tokens is not None:
        drawn = tokens.gather(1, drawn[:, None])[:, 0]
    return drawn.masked_fill(lost, -1)


# ---------------------------------------------------------------------------------------------
# Patterns: a rule for each layer and head group, as a short text

LETTERS = dict(                                        # of a rule's text, in order
    D="dilation",
    W="window",
    S="sinks",
    N="block",
    K="topk",
)
RIGHT = "A right one is D16W256S4, W1024S4, D1,D64, D1/D64 or N64K16:minmax"


def rule_text(rule):
    """The canonical text of a Rule."""
    values = {letter: getattr(rule, field) for letter, field in LETTERS.items()}
    text = "".join(f"{letter}{value}" for letter, value in values.items() if value) or "W0"
    return text if rule.score == "mean" else f"{text}:{rule.score}"


def parse_rule(text, score):
    """The Rule that `text` spells; ValueError says what is wrong with it."""
    fields, _, named = text.partition(":")
    match = re.fullmatch("".join(f"(?:{letter}([0-9]{{1,9}}))?" for letter in LETTERS), fields)
    digits = match.groups() if match else ()
    values = {letter: int(found) for letter, found in zip(LETTERS, digits) if found}
    require(values, f"{text!r} is not made of fields {' '.join(LETTERS)}, in this order, "
            "a number of up to 9 digits after each")
    require(0 not in (values.get("D"), values.get("N"), values.get("K")),
            "D, N and K start at 1 (no dilated positions: leave D out)")
    require(("N" in values) == ("K" in values), "N (block size) and K (how many) go together")
    require(":" not in text or (named in SCORES and "K" in values), f"{text!r}: top-k blocks are "
            f"scored by one of {', '.join(SCORES)}, other patterns have no score")
    score = named or score if "K" in values else "mean"
    return Rule(**{LETTERS[letter]: value for letter, value in values.items()}, score=score)


@dataclass(frozen=True)
class Pattern:
    """layers[i][j]: the rule of head group j in layer i. Layers cycle through the outer tuple,
    heads split evenly.

    As text: D16, D16W256S4, W1024S4 (no grid), D1,D64 (layers alternate), D1/D64 (half of the heads
    each), D64N64K8, N64K16:minmax (top-k blocks scored by minmax; without a score: mean), W0 (a
    query sees only itself: no attention).
    """
    layers: tuple

    @staticmethod
    def parse(text, score="mean"):
        """The Pattern that `text` spells; a Pattern is passed through. ValueError in one line for
        anything else.

        score: of top-k blocks whose text names none.
        """
        if isinstance(text, Pattern):
            return text
        require(isinstance(text, str), f"pattern {text!r}: a pattern is a text. {RIGHT}")
        require(score in SCORES, f"score {score!r} is not one of {', '.join(SCORES)}")
        layers = []
        try:
            for layer in text.split(","):
                layers.append(tuple(parse_rule(part, score) for part in layer.split("/")))
        except ValueError as error:
            raise ValueError(f"pattern {text!r}: {error}. {RIGHT}") from None
        return Pattern(tuple(layers))

    def __str__(self):
        return ",".join("/".join(map(rule_text, rules)) for rules in self.layers)

    def fit(self, config):
        """The pattern itself, if a model of this shape can run it; ValueError in one line if not.
        """
        named = len(self.layers)
        require(named <= config.n_layer, f"pattern '{self}': {named} layers are named, "
                f"the model has {config.n_layer}. A right one is D1,D64")
        for rules in self.layers:
            require(config.n_head % len(rules) == 0, "pattern '{}': {} head groups do not divide "
                    "{} heads. A right one is D1/D64", self, len(rules), config.n_head)
        return self

    def groups(self, layer):
        """[Group] of a layer."""
        rules = self.layers[layer % len(self.layers)]
        return [Group(rule, i, len(rules)) for i, rule in enumerate(rules)]

    def mask(self, T, layer=0, group=0):
        """(T, T) bool: True where the query (row) may attend to the key (column). ValueError for
        top-k blocks.
        """
        rule = self.layers[layer % len(self.layers)][group]
        require(not rule.topk, f"pattern '{self}': top-k blocks follow the data, "
                "so they have no fixed mask. A right one is D16W256S4")
        t = torch.arange(T)
        return rule.allowed(t[:, None], t)

    def keys_per_token(self, config, T):
        """Mean number of keys per query in a sequence of T tokens, over positions, layers, heads.
        """
        total = 0.0
        for i in range(config.n_layer):
            for group in self.groups(i):
                total += mean_keys(group.rule, T) / group.of
        return total / config.n_layer

    def draw(self, T):
        """The masks as text: D on the grid, else S a sink, else W in the window, . not attended.
        ValueError for top-k blocks.
        """
        lines = []
        for i, rules in enumerate(self.layers):
            for j, rule in enumerate(rules):
                mask = self.mask(T, i, j)
                lines.append(f"{rule_text(rule)}: layer {i} of every {len(self.layers)}, "
                             f"head group {j} of {len(rules)}")
                lines += [f"{t:4} {draw_row(rule, mask[t, :t + 1])}" for t in range(T)]
                lines.append(f"     {mask.sum() / T:.1f} keys per query, dense {(T + 1) / 2:.1f}\n")
        return "\n".join(lines)


def mean_keys(rule, T):
    """Mean number of keys of the queries of T positions under a rule."""
    counts = [rule.count_keys(t) for t in torch.arange(T).split(1024)]
    return torch.cat(counts).mean().item()


def draw_row(rule, mask):
    """One query's row of a mask as letters."""
    letters = []
    for p, attended in enumerate(mask.tolist()):
        letter = "W"
        if p < rule.sinks:
            letter = "S"
        if on_grid(p, rule.dilation):
            letter = "D"
        letters.append(letter if attended else ".")
    return " ".join(letters)


# ---------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, model, **meta):
    """Write the weights, the config and `meta` (plain values and tensors) so that `path` is always
    whole.

    The file is written beside `path`, flushed to disk and renamed. OSError if that fails; an older
    file then stays.
    """
    model = getattr(model, "_orig_mod", model)         # what torch.compile(model) wraps
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            torch.save({**meta, "config": asdict(model.config), "model": model.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:           # RuntimeError: torch's writer on a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} is not saved, an older one is as it was ({reason})") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_checkpoint(path, device="cpu", training=False):
    """(model, meta) from our file or the authors' .pth. Nothing in the file is executed. The
    weights are float32.

    meta: what save_checkpoint was given; tokenizer "ids" and pattern "D1" where it says nothing
    else. The optimizer's state, twice as large as the weights, is in it only with training=True.
    OSError if there is no file, ValueError if it is not a whole checkpoint.
    """
    easydict = torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")])
    try:
        with open(path, "rb") as f, easydict, warnings.catch_warnings(action="ignore"):
            data = torch.load(f, map_location="cpu", weights_only=True)
        data = data if "model" in data else from_authors(data)
        if not training:
            data.pop("optimizer", None)
        with torch.device("meta"):                     # spends no memory and no random numbers
            model = RATPlus(RATConfig(**data.pop("config")))
        model.load_state_dict(data.pop("model"), assign=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:                         # torn or foreign: torch raises all kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        told = f"{path}: not a whole checkpoint, ours or the authors' ({reason})"
        raise ValueError(told) from error
    return model.float().to(device).eval(), {"tokenizer": "ids", "pattern": "D1", **data}


AUTHORS_NAMES = {
    "_orig_mod.": "",
    "embedding.wte": "embed",
    "backbone.ln": "norm",
    "backbone.layers": "blocks",
    "seq_layer.input_norm": "mix.norm",
    "seq_layer": "mix",
    "hidden_layer.ln": "norm",
    "hidden_layer.": "",
}


def from_authors(data):
    """The authors' checkpoint, or its weights alone, as ours. Older files hold the rows of g apart,
    as fgate_proj.
    """
    weights = {}
    for name, tensor in data.get("task", data).items():
        for theirs, ours in AUTHORS_NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor.float()
    embed = weights["embed.weight"]
    head = weights.pop("head.lm_head.weight", embed)
    require(torch.equal(head, embed), "the output head is not tied to the embedding")
    layers = [name for name in weights if name.endswith("in_proj.weight")]
    for name in layers:                                # g comes last among the rows of in_proj
        gate = weights.pop(name.replace("in_proj", "fgate_proj"), weights[name][:0])
        weights[name] = torch.cat((weights[name], gate))
    V, C = embed.shape
    head_width = 128                                   # of all released models
    if "config" in data:
        head_width = data["config"]["model"]["backbone"]["seq_cell"]["d_head"]
    n_head = C // head_width
    shape = dict(vocab_size=V, n_layer=len(layers), n_head=n_head, n_embd=C)
    full = sum(RATConfig(**shape).widths.values())
    shape["recurrence"] = len(weights[layers[0]]) == full
    return {"config": shape, "model": weights, "step": data.get("step")}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("usage: python model.py PATTERN [T]")
    try:
        T = int(sys.argv[2]) if sys.argv[2:] else 20
        require(1 <= T <= 1000, f"T is from 1 to 1000, not {T}")
        print(Pattern.parse(sys.argv[1]).draw(T), flush=True)
    except BrokenPipeError:                            # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        sys.exit(f"model.py: {error}")
