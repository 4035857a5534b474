"""
RAT+ (arXiv 2602.18196), the whole method in plain PyTorch: train dense, infer sparse.

RAT+ is a transformer whose keys and values pass through a gated recurrence before attention. The
key at position p then summarises a stretch of text that ends at p. So attention may skip most
positions: with dilation D it keeps every D-th position, and the cache shrinks D times. A model
learns this in pretraining: each batch makes a sparse update and a dense one (see train.py).

  o, q, k, v, g = in_proj(RMSNorm(x))                                                         (1)
  k~_t = a_t * k~_{t-1} + (1 - a_t) * k_t      a_t = sigmoid(g_t); v~ has the same decay      (2)
  y_t  = sum over allowed p of softmax_p(RoPE(q)_t . RoPE(k~)_p / sqrt(Dh)) v~_p              (3)
  allowed: p <= t and ((p + 1) mod D == 0 or t - p <= W or p < S)                             (4)
           with top-k blocks also: p <= t in t's own block, or in its K - 1 best earlier blocks
  x    = x + out_proj(sigmoid(o) * y)          then  x = x + fc2(gelu(fc1(RMSNorm(x))))       (5)

  code              shape            what
  x                 (B, T, C)        the residual stream: B batch, T time, C = n_embd channels
  o, g              (B, T, C)        logits of the output gate and of the decay a
  q, k, v           (B, T, C)        queries, and keys and values before the recurrence
  k_rec, v_rec      (B, T, C)        k~, v~: after it; in attention (B, H, T, Dh): H heads
  state             (2, B, C)        k~ (before RoPE) and v~ of the last position, float32
  t, p              integers         position of a query, position of a key
  dilation          D                0 is no grid, the authors' "-1"
  window, sinks     W, S             local_size, initial_size; a query sees itself and W before it
  block, topk       N, K             size and number of the blocks of top-k attention

This file defines each operation, and runs as it is on a CPU. Wherever `on_kernels(x)` stands, a
Triton kernel of kernels.py takes over on a GPU. `python model.py D4W4S2` draws a pattern.
"""
import contextlib
import math
import os
import re
import sys
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from types import SimpleNamespace
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


def require(condition, message):
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


# ---- Patterns: who may attend to whom (4) --------------------------------------------------------

def on_grid(p, dilation):
    """Is p the last of its `dilation` positions? Dilation 0 means that there is no grid."""
    return (p + 1) % dilation == 0 if dilation else p < 0      # p < 0: False, in the shape of p


def allowed(t, p, dilation, window, sinks):
    """May a query at position t attend to the key at position p? Equation (4); `best_blocks` adds
    to it. t, p: integers or integer tensors that broadcast. Bool. ValueError for negative sizes.
    """
    sizes = dilation, window, sinks
    require(min(sizes) >= 0, f"dilation, window, sinks are {sizes}; none may be negative")
    in_window = t - p <= window
    is_sink = p < sinks
    return (p <= t) & (on_grid(p, dilation) | in_window | is_sink)


SIZE = "([0-9]{1,9})"
POSITIVE = "(0*[1-9][0-9]{0,8})"
RULE = re.compile(f"(?:D{POSITIVE})?(?:W{SIZE})?(?:S{SIZE})?"
                  f"(?:N{POSITIVE}K{POSITIVE}(?::(mean|minmax|last))?)?")


class Rule(NamedTuple):
    """Which positions some heads attend to: (4) and top-k blocks. A size of 0: none of its kind."""
    dilation: int = 0
    window: int = 0
    sinks: int = 0
    block: int = 0
    topk: int = 0
    score: str = "mean"                                # of blocks: mean, minmax or last

    @staticmethod
    def parse(text):
        found = RULE.fullmatch(text)
        require(text and found, f"{text!r} is not of D W S N K in this order, each with up to 9 "
                "digits; D, N, K >= 1, N and K together, and then perhaps :mean, :minmax or :last")
        *sizes, score = found.groups()
        return Rule(*(int(size or 0) for size in sizes), score or "mean")

    def __str__(self):
        text = "".join(f"{letter}{size}" for letter, size in zip("DWSNK", self) if size) or "W0"
        return text if self.score == "mean" else f"{text}:{self.score}"

    @property
    def sizes(self):
        """The sizes of equation (4): dilation, window, sinks."""
        return self[:3]

    @property
    def ring(self):
        """How many positions before a query can be near: the rows of a cache's ring."""
        return self.window

    def allowed(self, t, p):
        return allowed(t, p, *self.sizes)

    def dense(self, n):
        """Does each of n positions attend to all before it, whatever the data?"""
        return self.dilation == 1 or max(self.ring, self.sinks) >= n - 1


class Pattern(NamedTuple):
    """layers[i][j]: the Rule of head group j in layer i. Layers cycle, heads split evenly. As text:
    D16, D16W256S4, W1024S4 (no grid), D1,D64 (layers alternate), D1/D64 (half of the heads each),
    D64N64K8 (top-k blocks), N64K16:minmax (their score), W0 (only itself: no attention).
    """
    layers: tuple

    @staticmethod
    def parse(text):
        """The Pattern that `text` spells; a Pattern is passed through. ValueError, in one line."""
        if isinstance(text, Pattern):
            return text
        layers = [layer.split("/") for layer in str(text).split(",")]
        try:
            return Pattern(tuple(tuple(map(Rule.parse, rules)) for rules in layers))
        except ValueError as error:
            raise ValueError(f"pattern {text!r}: {error}. A right one is D16W256S4, W1024S4, "
                             "D1,D64, D1/D64 or N64K16:minmax") from None

    def __str__(self):
        return ",".join("/".join(map(str, rules)) for rules in self.layers)

    def check(self, config):
        """The pattern itself; ValueError if a model of this shape can't run it."""
        even = all(config.n_head % len(rules) == 0 for rules in self.layers)
        require(even and len(self.layers) <= config.n_layer, f"pattern '{self}' does not fit "
                f"{config.n_layer} layers of {config.n_head} heads. A right one is D1,D64, D1/D64")
        return self

    def rules(self, layer):
        return self.layers[layer % len(self.layers)]

    def mask(self, T, layer=0, group=0):
        """(T, T) bool: may query (row) attend to key (column)? ValueError for top-k blocks."""
        rule = self.rules(layer)[group]
        require(not rule.topk, f"pattern '{self}': top-k blocks follow the data and have no mask")
        t = torch.arange(T)
        return rule.allowed(t[:, None], t)


# ---- The definitions: the recurrence (2), RoPE, attention (3) ------------------------------------

def exact(dtype):
    """The dtype of states and of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(x):
    """The dtype of matrix products with x: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.compiler.disable                                # torch.compile would unroll the loop
def scan(a, u, h):
    """All h_t = a_t * h_{t-1} + u_t (2, B, T, C). a: (B, T, C); u: (2, B, T, C); h: (2, B, C)."""
    states = []
    for a_t, u_t in zip(a.unbind(1), u.unbind(2)):
        h = a_t * h + u_t
        states.append(h)
    return torch.stack(states, dim=2)


def recurrence(k, v, g, state=None):
    """The gated recurrence (2), differentiable in every input. k, v, g: (B, T, C), T >= 1, any
    floating dtype. state: k_rec and v_rec of the position before, (2, B, C) or a pair; None means
    zeros. Returns k_rec, v_rec in the dtypes of k and v, and the last state (2, B, C), in float32
    (float64 of float64) like the arithmetic. ValueError for shapes or devices that do not match.
    Keys and values share the decay: v~_p mixes values as k~_p mixes the keys of the same tokens.
    """
    B, T, C = k.shape
    if state is None:
        state = k.new_zeros(2, B, C, dtype=exact(k.dtype))
    found = [(z.shape, z.device) for z in (k, v, g, *state)]
    wanted = [(k.shape, k.device)] * 3 + [((B, C), k.device)] * 2
    require(found == wanted and T >= 1, "recurrence: k, v, g are (B, T >= 1, C), the state is "
            f"2 x (B, C), all on one device; not {found}")
    if not torch.is_tensor(state):
        state = torch.stack(state)
    state = state.to(exact(k.dtype))
    if on_kernels(k):
        return kernels.recurrence(k, v, g, state)
    # Near a = 1 the difference 1 - a would cancel, and the gradient of torch.sigmoid, a (1 - a),
    # would vanish. Through the logarithm both values and both gradients stay precise.
    g = g.to(state.dtype)
    a = F.logsigmoid(g).exp()
    rest = F.logsigmoid(-g).exp()                      # 1 - a
    states = scan(a, rest * torch.stack((k, v)), state)
    k_rec, v_rec = states
    return k_rec.to(k.dtype), v_rec.to(v.dtype), states[:, :, -1].clone()


def rope_angles(t, Dh):
    """cos and sin, each (T, Dh/2) float32, of the absolute positions t (T,). The base is 10000."""
    channel = torch.arange(0, Dh, 2, device=t.device, dtype=torch.float32)
    angle = t[:, None].float() * 10000.0 ** (-channel / Dh)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE of x (B, H, T, Dh): channel i of the first half turns with channel i of the second."""
    if on_kernels(x):
        return kernels.rotate(x, cos, sin)
    x1, x2 = x.chunk(2, dim=-1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1).to(x.dtype)


def attention(q, k_rec, v_rec, dilation, window, sinks):
    """Causal attention of a whole sequence: equation (3) over what equation (4) allows. q, k_rec,
    v_rec: (B, H, T, Dh), after RoPE, one dtype unless autocast chooses it. Returns the same,
    differentiable. ValueError for negative sizes, and for shapes, dtypes or devices that differ.
    """
    q, k_rec, v_rec = (z.to(compute_dtype(z)) for z in (q, k_rec, v_rec))
    kinds = [(z.shape, z.dtype, z.device) for z in (q, k_rec, v_rec)]
    require(kinds == kinds[:1] * 3, f"attention: q, k_rec, v_rec differ: {kinds}")
    allowed(0, 0, dilation, window, sinks)             # refuses negative sizes
    return attend(q, k_rec, v_rec, Rule(dilation, window, sinks))


def attend(q, k_rec, v_rec, rule, summaries=None):
    """Equation (3) under a rule, for the last T of n positions. q: (B, H, T, Dh); k_rec, v_rec:
    (B, H, n, Dh); summaries: of their whole blocks, by default made here. Returns (B, H, T, Dh).
    """
    T = q.shape[2]
    n = k_rec.shape[2]
    if rule.dense(n):
        if T == n:                                     # PyTorch's own
            return F.scaled_dot_product_attention(q, k_rec, v_rec, is_causal=True)
        return F.scaled_dot_product_attention(q, k_rec, v_rec, causal_lower_right(T, n))
    if rule.topk and summaries is None:
        summaries = block_summaries(k_rec.detach(), rule.block, rule.score)
    if on_kernels(q):
        if rule.topk:
            return kernels.attention_topk(q, k_rec, v_rec, rule, summaries)
        return kernels.attention(q, k_rec, v_rec, *rule.sizes)
    t = torch.arange(n - T, n, device=q.device)
    p = torch.arange(n, device=q.device)
    mask = rule.allowed(t[:, None], p)                 # (T, n): query, key
    if rule.topk:
        in_best = best_blocks(q, summaries, t, rule)[..., p // rule.block]
        mask = mask | in_best & (p <= t[:, None])      # (B, H, T, n)
    return F.scaled_dot_product_attention(q, k_rec, v_rec, mask)


# Top-k blocks. The past is cut into blocks of N positions. A query scores each earlier block by a
# summary of its keys after RoPE. It attends in full to its own block, and to the K - 1 earlier ones
# with the best scores. In the same softmax it attends to what equation (4) allows elsewhere: with
# D = N, to the last position of each other block, which stands for its block by the recurrence.
# The score of a block for the query q_t:
#
#   mean     q_t . mean of its keys                                     as in MoBA
#   minmax   sum over channels c of max(q_tc max k_pc, q_tc min k_pc)   as in Quest
#   last     q_t . k~ at its last position                              the dilated key of D = N
#
# On every path NaN is the least score, and of equal scores the earliest block is taken.

def block_summaries(k_rec, block, score):
    """What the scores read of the n whole blocks of keys: (B, H, n, Dh), or 2 Dh for minmax."""
    n = k_rec.shape[2] // block
    k = k_rec[:, :, :n * block].unflatten(2, (n, block))
    if score == "mean":
        return k.mean(3)
    if score == "minmax":
        return torch.cat((k.amax(3), k.amin(3)), dim=-1)
    return k[:, :, :, -1]


@torch.no_grad()
def best_blocks(q, summaries, t, rule):
    """The blocks that queries q (B, H, T, Dh) at positions t (T,) attend to in full: (B, H, T, n +
    1) bool over the n summaries and the block after them. The choice has no gradient.
    """
    q = q.double()                                     # autocast leaves float64 alone
    if rule.score == "minmax":                         # positive q: largest at max k, else at min k
        positive = q.clamp(min=0)
        q = torch.cat((positive, q - positive), dim=-1)
    scores = F.pad(q @ summaries.double().mT, (0, 1))
    own = (t // rule.block)[:, None]
    b = torch.arange(scores.shape[-1], device=q.device)
    scores = scores.masked_fill(scores.isnan() | (b >= own), -math.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(-1, order[..., :rule.topk - 1], True)
    return best & (b < own) | (b == own)


# ---- The layer -----------------------------------------------------------------------------------

@dataclass
class RATConfig:
    """The shape of a model. recurrence=False is attention alone: without g, k~ = k and v~ = v."""
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    recurrence: bool = True

    def __post_init__(self):
        least = min(self.vocab_size, self.n_layer, self.n_head, self.n_embd)
        require(least >= 1 and self.n_embd % (2 * self.n_head) == 0, f"{self}: sizes must be at "
                "least 1, and n_embd must split into n_head heads of even width")

    @property
    def head_width(self):
        return self.n_embd // self.n_head

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


class Mixing(nn.Module):
    """Temporal mixing, the part that RAT+ changes: (1) to (4), and the gate and out_proj of (5)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.head_width = config.head_width
        self.widths = [C] * (5 if config.recurrence else 4)            # of o, q, k, v, g
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.in_proj = nn.Linear(C, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, rope, rules, cache=None):
        """x (B, T, C) -> (B, T, C): a whole sequence, or T more tokens, which are appended to the
        cache, one of Cache.layers. rope: cos and sin of their positions. rules: of head groups.
        """
        projected = self.in_proj(self.norm(x))                              # (1)
        o, q, k, v, *g = projected.split(self.widths, dim=-1)
        if cache and x.shape[1] == 1 and on_kernels(x):
            return self.out_proj(kernels.decode(o, q, k, v, g, rope, cache))    # (2) to (4), gate
        k_rec, v_rec = k, v
        if g:
            k_rec, v_rec, state = recurrence(k, v, *g, cache and cache.state)      # (2)
            if cache:
                cache.state.copy_(state)
        heads = [z.unflatten(2, (-1, self.head_width)) for z in (q, k_rec, v_rec)]
        q, k_rec, v_rec = (z.transpose(1, 2) for z in heads)                # (B, H, T, Dh)
        # RoPE comes after the recurrence: k~ mixes keys of many positions and is then turned as one
        # key of its own position. A mix of keys that were turned before would blur.
        q = rotate(q, *rope)
        k_rec = rotate(k_rec, *rope)
        groups = zip(*(z.chunk(len(rules), dim=1) for z in (q, k_rec, v_rec)))
        if cache:                                                           # (3), (4)
            y = [held.attend(*qkv) for held, qkv in zip(cache.groups, groups)]
        else:
            y = [attend(*qkv, rule) for rule, qkv in zip(rules, groups)]
        y = torch.cat(y, dim=1) if len(y) > 1 else y[0]
        y = y.transpose(1, 2).flatten(2)                                    # (B, T, C)
        return self.out_proj(torch.sigmoid(o) * y)                          # (5)


class Block(nn.Module):
    """A layer: temporal mixing, then the MLP (exact GELU, width 4C), both of equation (5)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.mix = Mixing(config)
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.fc1 = nn.Linear(C, 4 * C, bias=False)
        self.fc2 = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, rope, rules, cache=None):
        x = x + self.mix(x, rope, rules, cache)
        wide = F.gelu(self.fc1(self.norm(x)))
        if cache:                                      # keeps torch.compile from fusing x and
            torch._dynamo.graph_break()                # wide into fc2: each output would redo them
        return x + self.fc2(wide)


# ---- The cache: what decoding keeps, and where ---------------------------------------------------
#
# After `length` tokens the next query is at position t = length. It may attend to the W positions
# before it, to the grid and to the sinks. Later queries need no others: a position that has left
# the window never comes back. So each head group has three buffers, side by side in one tensor:
#
#   sinks   row p                   the positions before S
#   ring    row S + p mod W         every position, until it is overwritten: the last W
#   grid    row S + W + p // D      the positions on the grid
#
# A position may be in several, but is read once: from the ring while it is in the window, else
# from the grid if it is on the grid, else from the sinks. For example D4W3S2 after 14 tokens,
# positions 0 to 13:
#
#   row          0    1  |  2    3    4  |  5    6    7
#   position     0    1  | 12   13   11  |  3    7   11        11 is read from row 4 alone
#
# With dense attention or top-k blocks a later query may want any position. So there is only a grid
# of D = 1: row p holds position p. Keys are stored after RoPE.

class GroupCache:
    """Keys and values of one head group of one layer: k, v (B, heads, rows, Dh). rule: what queries
    attend to. kept: what is held for them. summaries: of top-k blocks.
    """

    def __init__(self, cache, rule, like):
        self.cache = cache
        n = cache.max_len
        every = Rule(dilation=1)
        self.rule = every if rule.dense(n) else rule
        self.kept = every if rule.topk else self.rule  # top-k blocks may want any position
        rows = self.kept.sinks + self.kept.ring
        rows += n // self.kept.dilation if self.kept.dilation else 0
        B, heads, _, Dh = like.shape
        self.k = like.new_zeros(B, heads, rows, Dh)
        self.v = like.new_zeros(B, heads, rows, Dh)
        self.tensors = [self.k, self.v]                # all that it allocated
        if self.rule.topk:
            summaries = block_summaries(self.k, rule.block, rule.score)
            self.summaries = summaries.clone()         # no view of k
            self.tensors.append(self.summaries)

    def rows(self, p, t):
        """The rows from which a query at t reads positions p (int64), as in kernels.key_at."""
        kept = self.kept
        grid = kept.sinks + kept.ring + p // max(kept.dilation, 1)
        lasting = torch.where(on_grid(p, kept.dilation), grid, p)
        return torch.where(p >= t - kept.ring, kept.sinks + p % max(kept.ring, 1), lasting)

    def store(self, k, v, start):
        """Keep what later queries may need of k, v (B, heads, T, Dh), positions from `start` on."""
        sinks = self.kept.sinks
        ring = self.kept.ring
        dilation = self.kept.dilation
        end = start + k.shape[2]
        last = torch.arange(max(start, end - ring), end, device=k.device)
        for mine, new in (self.k, k), (self.v, v):
            if start < sinks:
                mine[:, :, start:min(end, sinks)] = new[:, :, :sinks - start]
            if ring:
                mine.index_copy_(2, sinks + last % ring, new[:, :, -len(last):])
            if dilation:
                grid = mine[:, :, sinks + ring:]
                on_it = new[:, :, -(start + 1) % dilation::dilation]
                grid[:, :, start // dilation:end // dilation] = on_it

    def attend(self, q, k, v):
        """Attention (B, heads, T, Dh) of the next T positions over themselves and what is held. The
        ring is read before new keys are stored: key t overwrites key t - W, which query t sees.
        """
        start = self.cache.length
        end = start + q.shape[2]
        if self.kept.dilation == 1:                    # the rows are the positions
            self.store(k, v, start)
            k = self.k[:, :, :end]
            v = self.v[:, :, :end]
            summaries = None
            if self.rule.topk:
                summaries = block_summaries(k, self.rule.block, self.rule.score)
                self.summaries[:, :, :summaries.shape[2]] = summaries
            return attend(q, k, v, self.rule, summaries)
        p = torch.arange(start, device=q.device)
        if on_kernels(q):
            p = p[max(start - self.kept.ring, 0):]     # sinks and grid are read in place
        else:
            p = p[self.kept.allowed(start, p)]         # no later query needs more
        keys = k
        values = v
        if len(p):
            rows = self.rows(p, start)
            keys = torch.cat((self.k[:, :, rows], k), dim=2)
            values = torch.cat((self.v[:, :, rows], v), dim=2)
        self.store(k, v, start)
        if on_kernels(q):
            return kernels.attention_chunk(q, keys, values, self, start)
        t = torch.arange(start, end, device=q.device)
        mask = self.kept.allowed(t[:, None], torch.cat((p, t)))
        return F.scaled_dot_product_attention(q, keys, values, mask)


class Cache:
    """What decoding keeps of `batch` sequences of up to max_len tokens. RATPlus.new_cache makes it.
    length: how many tokens it has seen. seen: the same on the device, (1,) int64, where kernels
    read it. layers: of each its state (2, B, C), empty without recurrence, and its head groups.
    nbytes: of all their tensors, as allocated. dtype: of keys, values and matrix products.
    """

    def __init__(self, config, batch, max_len, pattern, dtype, weight):
        self.pattern = pattern
        self.batch = batch
        self.max_len = max_len
        self.dtype = dtype
        self.whole = True                              # False after an append that failed halfway
        self.length = 0
        self.seen = weight.new_zeros(1, dtype=torch.long)
        self.nbytes = 0
        self.layers = []
        C = config.n_embd if config.recurrence else 0
        for i in range(config.n_layer):
            rules = pattern.rules(i)
            heads = config.n_head // len(rules)
            like = weight.new_empty(batch, heads, 0, config.head_width, dtype=dtype)
            groups = [GroupCache(self, rule, like) for rule in rules]
            state = weight.new_zeros(2, batch, C, dtype=exact(dtype))
            self.layers.append(SimpleNamespace(state=state, groups=groups, seen=self.seen))
            self.nbytes += state.nbytes
            for group in groups:
                self.nbytes += sum(z.nbytes for z in group.tensors)

    def check(self, shape):
        """ValueError if tokens of this shape (B, T) can't be appended."""
        require(self.whole, "the cache is incomplete: appending to it failed halfway")
        fits = len(shape) == 2 and shape[0] == self.batch
        fits = fits and 1 <= shape[1] <= self.max_len - self.length
        require(fits, f"the cache is too short, or of another batch: tokens are {tuple(shape)}, it "
                f"is for batch {self.batch} and has seen {self.length} of max_len {self.max_len}")

    @contextlib.contextmanager
    def appending(self, shape, weight):
        """The body appends tokens of this shape. It runs in the cache's dtype whatever autocast
        says. If it succeeds, the length advances, here and on the device.
        """
        self.check(shape)
        self.whole = False
        cast = self.dtype != weight.dtype
        with torch.autocast(weight.device.type, self.dtype, enabled=cast, cache_enabled=False):
            yield
        self.seen += shape[1]
        self.length += shape[1]
        self.whole = True

    @property
    def slots(self):
        """slots[layer][group]: how many different positions are held for the next query."""
        t = self.length
        p = torch.arange(t)
        counts = []
        for layer in self.layers:
            counts.append([group.kept.allowed(t, p).sum().item() for group in layer.groups])
        return counts


# ---- The model -----------------------------------------------------------------------------------

class RATPlus(nn.Module):
    """The language model. Its weights know no pattern: every call names one, as text or Pattern."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False                     # True: backward computes each block again
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)         # also the output head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def compile(self, **options):
        """torch.compile each block by itself: they are alike, so one graph serves all."""
        for block in self.blocks:
            block.compile(**options)

    def hidden(self, idx, pattern, cache=None):
        """idx (B, T) -> (B, T, C): all before the last norm. With a cache, inside `appending`."""
        require(idx.dim() == 2 and idx.shape[1] >= 1, f"tokens are (B, T >= 1), not {idx.shape}")
        pattern = Pattern.parse(pattern).check(self.config)
        t = torch.arange(idx.shape[1], device=idx.device)
        if cache:
            t = t + cache.seen
        rope = rope_angles(t, self.config.head_width)
        x = self.embed(idx)
        for i, block in enumerate(self.blocks):
            inputs = x, rope, pattern.rules(i), cache and cache.layers[i]
            if cache and not (len(t) == 1 and on_kernels(x)):
                x = block._call_impl(*inputs)          # not compiled: T varies, or no kernels
            elif self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return x

    def head(self, x):
        """(..., C) -> logits (..., V)"""
        return F.linear(self.norm(x), self.embed.weight)

    def forward(self, idx, pattern="D1"):
        """Logits (B, T, V) of idx (B, T). ValueError for a pattern that does not fit."""
        return self.head(self.hidden(idx, pattern))

    def loss(self, idx, targets, pattern="D1"):
        """Mean cross-entropy in nats over the targets (B, T) that are not -100 (or -1, as in
        nanoGPT), a float32 scalar; 0 if none counts. ValueError for targets of another shape.
        """
        found, wanted = [(z.shape, z.device) for z in (targets, idx)]
        require(found == wanted, f"loss: targets are {found}, tokens {wanted}")
        x = self.norm(self.hidden(idx, pattern)).flatten(0, 1)
        y = targets.flatten().long()
        y = y.masked_fill(y == -1, -100)
        weight = self.embed.weight
        if on_kernels(x):
            total = kernels.head_loss(x, weight, y, compute_dtype(weight))
        else:
            logits = F.linear(x, weight)
            total = F.cross_entropy(logits.to(exact(logits.dtype)), y, reduction="sum")
        return total / (y != -100).sum().clamp(min=1)

    def new_cache(self, batch, max_len, pattern="D1"):
        """An empty Cache for `batch` sequences of up to max_len tokens, in the compute dtype."""
        pattern = Pattern.parse(pattern).check(self.config)
        weight = self.embed.weight
        return Cache(self.config, batch, max_len, pattern, compute_dtype(weight), weight)

    @torch.no_grad()
    def prefill(self, idx, cache, chunk=8192):
        """Append idx (B, T) to the cache, chunk by chunk, which bounds the memory; returns logits
        (B, V) of the last position. ValueError, with the cache unchanged, if idx does not fit it.
        """
        cache.check(idx.shape)
        for piece in idx.split(chunk, dim=1):
            with cache.appending(piece.shape, self.embed.weight):
                logits = self.head(self.hidden(piece, cache.pattern, cache)[:, -1])
        return logits

    def step(self, token, cache):
        """Append one token (B,) to each sequence; returns logits (B, V) for the next."""
        return self.prefill(token[:, None], cache)

    @torch.no_grad()
    def stream(self, idx, n_new, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Prefill idx (B, T), then yield up to n_new tokens (B,), each appended when the next is
        asked for. A sequence that yielded `stop` yields it ever after; the stream ends soon after
        all did. ValueError if the logits become NaN (within 16 tokens) or the cache is full. With
        kernels on a GPU, prefill and the first step run eagerly, which compiles them. Step 2 is
        captured with its sampling as a CUDA graph. From then on steps replay it.
        """
        weight = self.embed.weight
        seed = torch.randint(2**62, ()).item()         # torch.manual_seed fixes it
        generator = torch.Generator(idx.device).manual_seed(seed)

        def advance():
            """Append `token` and replace it by the next one. Where it is -1 (NaN) it stays so."""
            x = self.hidden(token[:, None].clamp(min=0), cache.pattern, cache)
            new = choose(self.head(x[:, -1]), temperature, top_k, top_p, generator)
            new = new.masked_fill(token < 0, -1)
            token.copy_(new if stop is None else new.masked_fill(token == stop, stop))

        token = choose(self.prefill(idx, cache), temperature, top_k, top_p, generator)
        for i in range(n_new):
            if i > 0:
                with cache.appending((len(idx), 1), weight):
                    if i == 2 and weight.is_cuda and on_kernels(weight):       # 1 was eager
                        advance = capture(advance, generator)
                    advance()
            look = i == n_new - 1 or i % 16 == 15      # rarely: the host waits for the GPU
            require(not look or (token >= 0).all(), "the model's logits are NaN: no next token")
            yield token.clone()
            if look and stop is not None and (token == stop).all():
                return

    def generate(self, idx, n_new, pattern="D1", temperature=1.0, top_k=None, top_p=None,
                 stop=None):
        """idx (B, T) and n_new tokens after it. After its first `stop` a sequence is all `stop`."""
        cache = self.new_cache(len(idx), idx.shape[1] + n_new, pattern)
        out = [idx]
        for token in self.stream(idx, n_new, cache, temperature, top_k, top_p, stop):
            out.append(token[:, None])
        out += out[-1:] * (n_new + 1 - len(out))       # all sequences had stopped
        return torch.cat(out, dim=1)


CAPTURING = threading.Lock()                           # PyTorch captures one graph at a time
STREAMS = threading.local()


def capture(step, generator):
    """The CUDA graph of step(), a list of kernels with fixed arguments, as a function that replays
    it. Capturing runs nothing. Each thread captures on a stream of its own: graphs of one stream
    share memory for matrix products, which two threads that replay at once would spoil.
    """
    device = generator.device
    streams = vars(STREAMS)
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    capturing = torch.cuda.graph(graph, stream=streams[device], capture_error_mode="thread_local")
    with CAPTURING, torch.cuda.device(device), capturing:
        step()
    return graph.replay


# ---- Sampling ------------------------------------------------------------------------------------

def choose(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token (B,) from logits (B, V), without waiting for a GPU; -1 where a row holds NaN.
    temperature 0 takes the likeliest, top_k draws among the k likeliest, top_p among the fewest of
    these whose probabilities reach p. ValueError for other arguments.
    """
    right = top_k is None or top_k >= 1
    right = right and (top_p is None or 0 < top_p <= 1)
    require(right and temperature >= 0, "sampling wants temperature >= 0, top_k >= 1, "
            f"0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
    best, token = logits.max(-1, keepdim=True)
    if temperature > 0:
        below = (logits - best).masked_fill(logits == best, 0).float()     # inf - inf would be NaN
        probs = (below / max(temperature, 1e-30)).softmax(-1)
        if top_k or top_p:
            V = probs.shape[-1]
            probs, tokens = probs.topk(min(top_k or V, V))             # the likeliest first
        if top_p:
            mass = (probs.double() * 2**52).long()     # integers add up alike in any order
            likelier = mass.cumsum(-1) - mass          # the mass of all likelier tokens
            enough = mass.sum(-1, keepdim=True).double() * top_p
            probs = probs.masked_fill(likelier >= enough, 0)
        # With e_i drawn from an exponential, the largest p_i / e_i is at i with probability p_i.
        e = torch.empty_like(probs).exponential_(generator=generator).clamp_(min=1e-10)
        token = (probs / e).argmax(-1, keepdim=True)
        if top_k or top_p:
            token = tokens.gather(-1, token)
    return token[:, 0].masked_fill(best[:, 0].isnan(), -1)


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, model, **meta):
    """Write the weights, the config and `meta` (plain values and tensors) so that `path` is always
    whole: beside it, flushed to disk, then renamed. OSError if that fails; an older file stays.
    """
    model = getattr(model, "_orig_mod", model)         # what torch.compile(model) wraps
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            torch.save({**meta, "config": asdict(model.config), "model": model.state_dict()}, f)
            f.flush()
            with contextlib.suppress(OSError):         # some file systems can't
                os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:           # RuntimeError: torch's writer on a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path} is not saved, an older one is as it was ({reason})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def load_checkpoint(path, device="cpu"):
    """(model, meta) from our file or the authors' .pth, of which nothing is executed. Weights are
    float32; meta is what save_checkpoint got. OSError without a file, ValueError if it isn't whole.
    """
    easydict = torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")])
    with open(path, "rb") as f, easydict:
        try:
            data = torch.load(f, map_location="cpu", weights_only=True)
            if "model" not in data:
                data = from_authors(data)
            with torch.device("meta"):                 # spends no memory and no random numbers
                model = RATPlus(RATConfig(**data.pop("config")))
            model.load_state_dict(data.pop("model"), assign=True)
        except Exception as error:                     # torn or foreign: torch raises all kinds
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{path}: not a whole checkpoint, ours or the authors' "
                             f"({type(error).__name__}: {reason})") from error
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
    """The authors' checkpoint, or its weights alone, as ours. Old ones keep g in fgate_proj."""
    weights = {}
    for name, tensor in data.get("task", data).items():
        for theirs, ours in AUTHORS_NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor
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
    recurrence = len(weights[layers[0]]) == 5 * C
    config = RATConfig(V, len(layers), C // head_width, C, recurrence)
    return {"config": asdict(config), "model": weights, "step": data.get("step")}


# ---- A pattern as a drawing ----------------------------------------------------------------------

def draw(pattern, T):
    """Print a Pattern's masks: D on the grid, else S a sink, else W in the window, else a dot."""
    for i, rules in enumerate(pattern.layers):
        for j, rule in enumerate(rules):
            print(f"{rule}: layer {i} of every {len(pattern.layers)}, group {j} of {len(rules)}")
            for t, sees in enumerate(pattern.mask(T, i, j)):
                row = []
                for p in range(t + 1):
                    kind = "S" if p < rule.sinks else "W"
                    kind = "D" if on_grid(p, rule.dilation) else kind
                    row.append(kind if sees[p] else ".")
                print(f"{t:4}", *row)


if __name__ == "__main__":
    try:
        require(len(sys.argv) > 1, "usage: python model.py PATTERN [T]")
        T = int(sys.argv[2]) if sys.argv[2:] else 20
        require(1 <= T <= 1000, f"T is from 1 to 1000, not {T}")
        draw(Pattern.parse(sys.argv[1]), T)
    except ValueError as error:
        sys.exit(f"model.py: {error}")
