"""
RAT+ (arXiv 2602.18196), the whole architecture in one file: train dense, infer sparse.

A transformer whose keys and values pass through a gated recurrence before attention. Position p then summarises a
stretch that ends at p, so attention may skip most positions: keep every D-th and the cache shrinks D times.

  o, q, k, v, g = in_proj(RMSNorm(x))                                                              (1)
  k~_t = a_t * k~_{t-1} + (1 - a_t) * k_t        a_t = sigmoid(g_t); the same decay for v~         (2)
  y_t  = sum over allowed p of softmax_p(RoPE(q)_t . RoPE(k~)_p / sqrt(Dh)) v~_p     per head      (3)
  allowed: p <= t and ((p + 1) mod D == 0 or t - p <= W or p < S)                                  (4)
           or, with top-k blocks, p in one of the K blocks of N positions that suit q_t best
  x    = x + out_proj(sigmoid(o) * y)            then  x = x + fc2(gelu(fc1(RMSNorm(x))))          (5)

  code              shape            paper
  x                 (B, T, C)        the residual stream: B batch, T time, C = n_embd channels
  o, g              (B, T, C)        logits of the output gate and of the decay a
  q, k, v           (B, T, C)        queries, and keys and values before the recurrence
  k_rec, v_rec      (B, T, C)        k~, v~: after it; (B, H, T, Dh) in attention, H heads of width Dh
  dilation          D                dilation; the authors' "-1" (none) is 0 here
  window, sinks     W, S             local_size, initial_size
  block, topk       N, K             block size, k of top-k
  pattern           Pattern          "attention pattern"; a model has none, each call names one

Read on: Pattern (which positions), Mixing (equations 1-5), Cache (what decoding keeps), RATPlus, checkpoints.
`python model.py D4W4S2` draws a pattern.
"""
import itertools
import os
import re
import sys
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import (SCORES, allowed, attention, attention_chunk, attention_topk, block_summaries, count_keys, cross_entropy_,
                     decode, decode_topk, keys_per_query, on_grid, positions, recurrence, rotate, slot_of, triton)

# ---------------------------------------------------------------------------------------------
# Patterns: who may attend to whom


@dataclass(frozen=True)
class Rule:
    """The pattern of one group of heads, equation (4). Dilation 0: no dilated positions; topk 0: no top-k blocks."""
    dilation: int = 0
    window: int = 0
    sinks: int = 0
    block: int = 0
    topk: int = 0
    score: str = "mean"                                            # of blocks, one of kernels.SCORES

    def __str__(self):
        fields = zip("DWSNK", (self.dilation, self.window, self.sinks, self.block, self.topk))
        return "".join(f"{letter}{value}" for letter, value in fields if value) or "W0"

    @property
    def span(self):
        """(dilation, window, sinks), the arguments of `allowed` and `attention`: all of a pattern but its top-k blocks."""
        return self.dilation, self.window, self.sinks

    @property
    def sizes(self):
        """`span`, block, topk, as `attention_topk` and `count_keys` take them; 1, 1 where there are no top-k blocks."""
        return *self.span, self.block or 1, self.topk or 1

    def attend(self, q, k_rec, v_rec):
        """Equation (3) under this rule. q, k_rec, v_rec: (B, h, T, Dh), after RoPE."""
        if self.topk:
            return attention_topk(q, k_rec, v_rec, *self.sizes, self.score)
        return attention(q, k_rec, v_rec, *self.span)


@dataclass(frozen=True)
class Pattern:
    """A rule per layer and head group, layers[i][j]: layers cycle through the outer tuple, heads split evenly.

    Written as text: D16, D16W256S4, W1024S4, D1,D64 (layers alternate), D1/D64 (half the heads each), D64N64K8.
    """
    layers: tuple

    @staticmethod
    def parse(text, score="mean"):
        """The Pattern that `text` spells; a Pattern is passed through. ValueError in one line for anything else.

        score: how top-k blocks are scored, one of SCORES. It is no part of the text, and other patterns forget it.
        """
        def rule(part):
            match = re.fullmatch("".join(f"(?:{letter}([0-9]{{1,9}}))?" for letter in "DWSNK"), part)
            value = {letter: int(digits) for letter, digits in zip("DWSNK", match.groups()) if digits} if match else {}
            if not value:
                refuse(f"{part!r} is not made of fields D W S N K, in this order, a number of up to 9 digits after each")
            if 0 in (value.get("D"), value.get("N"), value.get("K")):
                refuse("D, N and K start at 1 (no dilated positions: leave D out)")
            if ("N" in value) != ("K" in value):
                refuse("N (block size) and K (how many blocks) go together")
            return Rule(*(value.get(letter, 0) for letter in "DWSNK"), **{"score": score} if "K" in value else {})

        def refuse(why):
            raise ValueError(f"pattern {text!r}: {why}. A right one is D16W256S4, W1024S4, D1,D64 or D1/D64")

        if score not in SCORES:
            raise ValueError(f"score {score!r}: top-k blocks are scored by one of {', '.join(SCORES)}")
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            refuse("a pattern is a text")
        return Pattern(tuple(tuple(map(rule, layer.split("/"))) for layer in text.split(",")))

    def __str__(self):
        return ",".join("/".join(map(str, layer)) for layer in self.layers)

    def fit(self, config):
        """Self, if a model of this shape can run it; ValueError in one line if not."""
        if len(self.layers) > config.n_layer:
            raise ValueError(f"pattern '{self}': {len(self.layers)} layers are named, the model has {config.n_layer}. "
                             "A right one is D1,D64")
        for rules in self.layers:
            if config.n_head % len(rules):
                raise ValueError(f"pattern '{self}': {len(rules)} head groups do not divide {config.n_head} heads. "
                                 "A right one is D1/D64")
        return self

    def groups(self, layer, n_head):
        """[(rule, slice of heads)] of a layer."""
        rules = self.layers[layer % len(self.layers)]
        size = n_head // len(rules)
        return [(rule, slice(i * size, (i + 1) * size)) for i, rule in enumerate(rules)]

    def mask(self, T, layer=0, group=0):
        """(T, T) bool, True where the query (row) may attend to the key (column): `allowed`. ValueError for top-k."""
        t, rule = torch.arange(T), self.layers[layer % len(self.layers)][group]
        if rule.topk:
            raise ValueError(f"pattern '{self}': top-k blocks follow the data, so they have no fixed mask. "
                             "A right one is D16W256S4")
        return allowed(t[:, None], t, *rule.span)

    def keys_per_token(self, config, T):
        """Mean number of keys per query in a window of T tokens, over positions, layers and heads. Top-k: see `count_keys`."""
        total = sum(keys_per_query(T, *rule.sizes) * (heads.stop - heads.start)
                    for i in range(config.n_layer) for rule, heads in self.groups(i, config.n_head))
        return total / (config.n_layer * config.n_head)

    def draw(self, T):
        """The masks as text: D on the grid, S sink, W in the window (or the query itself), . not attended."""
        lines = []
        for i, rules in enumerate(self.layers):
            for j, rule in enumerate(rules):
                mask, (dilation, _, sinks) = self.mask(T, i, j), rule.span
                letters = ["D" if on_grid(p, dilation) else "S" if p < sinks else "W" for p in range(T)]
                lines.append(f"{rule}: layer {i} of every {len(self.layers)}, head group {j} of {len(rules)}")
                for t in range(T):
                    lines.append(f"{t:4} " + " ".join(letters[p] if mask[t, p] else "." for p in range(t + 1)))
                lines.append(f"     {mask.sum() / T:.1f} keys per query, dense {(T + 1) / 2:.1f}\n")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The layer

@dataclass
class RATConfig:
    """The shape of a model. recurrence=False is the attention-only baseline: no g, k~ = k, v~ = v."""
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    recurrence: bool = True

    def __post_init__(self):
        if min(self.vocab_size, self.n_layer, self.n_head, self.n_embd) < 1 or self.n_embd % (2 * self.n_head):
            raise ValueError(f"{self}: sizes must be at least 1, and n_embd must split into n_head heads of even width")


PRESETS = {
    "laptop": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=8, n_head=8, n_embd=512),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "paper-1.5b": dict(n_layer=24, n_head=16, n_embd=2048),
    "paper-2.6b": dict(n_layer=28, n_head=20, n_embd=2560),
    "paper-7.6b": dict(n_layer=32, n_head=32, n_embd=4096),
}


def rope_angles(t, Dh):
    """cos and sin (T, Dh/2), float32, of the absolute positions t (T,), base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, Dh, 2, device=t.device, dtype=torch.float32) / Dh)
    angle = t[:, None].float() * frequency
    return angle.cos(), angle.sin()


class Mixing(nn.Module):
    """Temporal mixing, the part that RAT+ changes: equations (1) to (5)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.config = config
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.in_proj = nn.Linear(C, (5 if config.recurrence else 4) * C, bias=False)     # rows: o, q, k, v, g
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, rope, groups, cache=None, i=None):
        """x (B, T, C) -> (B, T, C). rope: cos and sin of x's positions; groups: [(rule, slice of heads)]. With a Cache, in
        which this is layer i, x continues what that has seen."""
        (B, T, C), H = x.shape, self.config.n_head
        x = self.in_proj(self.norm(x))                                                   # (1)
        if cache and T == 1:                                                             # (2) to (5) in one
            x, state, y = x.view(B, -1, H, C // H), cache.state[i].view(2, B, H, -1), x.new_empty(B, H, C // H)
            for held, (_, heads) in zip(cache.groups[i], groups):
                held.step(y[:, heads], x[:, :, heads], state[:, :, heads], rope, cache.seen)
            return self.out_proj(y.view(B, 1, C))
        o, q, k_rec, v_rec, *g = x.split(C, dim=-1)
        if self.config.recurrence:                                                       # (2)
            k_rec, v_rec, state = recurrence(k_rec, v_rec, *g, cache.state[i] if cache else None)
            if cache:
                torch.stack(state, out=cache.state[i])
        q, k_rec, v_rec = (z.view(B, T, H, C // H).transpose(1, 2) for z in (q, k_rec, v_rec))
        q, k_rec = rotate(q, *rope), rotate(k_rec, *rope)                                # after the recurrence
        y = []
        for j, (rule, heads) in enumerate(groups):                                       # (3), (4)
            qkv = q[:, heads], k_rec[:, heads], v_rec[:, heads]                          # (B, heads, T, Dh)
            y.append(cache.groups[i][j].attend(*qkv, cache.length) if cache else rule.attend(*qkv))
        y = (y[0] if len(y) == 1 else torch.cat(y, dim=1)).transpose(1, 2).reshape(B, T, C)
        return self.out_proj(torch.sigmoid(o) * y)                                       # (5)


class Block(nn.Module):
    """Temporal mixing, then the MLP (exact GELU, width 4C), each added to the residual stream: equation (5)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.mix = Mixing(config)
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.fc1 = nn.Linear(C, 4 * C, bias=False)
        self.fc2 = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, rope, groups, *cached):
        x = x + self.mix(x, rope, groups, *cached)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


# ---------------------------------------------------------------------------------------------
# The cache: what decoding keeps

class GroupCache:
    """Keys (after RoPE) and values of one head group of one layer: k, v (B, heads, slots, Dh), the slots as `positions` says."""

    def __init__(self, rule, batch, heads, Dh, max_len, dtype, device):
        dilation, window, sinks = rule.span if rule.dilation != 1 else (1, 0, 0)         # D1: all are on the grid
        self.rule, self.span = rule, (dilation, min(window, max_len), min(sinks, max_len))
        slots = sum(self.span[1:]) + (max_len // dilation if dilation else 0)
        self.tensors = [torch.zeros(batch, heads, slots, Dh, dtype=dtype, device=device) for _ in "kv"]      # all there are
        self.k, self.v = self.tensors

    def held(self, seen):
        """How many positions are held after `seen` tokens."""
        return int(allowed(seen, positions(seen, self.k.shape[2], *self.span), *self.span).sum())

    def read(self, t):
        """Bytes that a step at position t reads of this, as a mean over an int64 CPU tensor of positions."""
        return (count_keys(t, *self.rule.sizes) - 1).mean().item() * 2 * self.k[:, :, :1].nbytes       # not its own key

    def step(self, y, x, state, rope, seen):
        """`kernels.decode` of one token."""
        decode(y, x, state, rope, self.k, self.v, seen, *self.span)

    def attend(self, q, k_rec, v_rec, start):
        """Attention of T tokens from position `start` on over themselves and what is held; they are kept as far as needed.

        q, k_rec, v_rec: (B, heads, T, Dh), after RoPE. Returns (B, heads, T, Dh).
        """
        (dilation, window, _), T, end, device = self.span, q.shape[2], start + q.shape[2], q.device
        if dilation == 1:
            self.k[:, :, start:end], self.v[:, :, start:end] = k_rec, v_rec
            if start == 0:
                return attention(q, k_rec, v_rec, *self.span)
            from torch.nn.attention.bias import causal_lower_right           # takes as long to import as all else here
            bias = causal_lower_right(T, end)
            return F.scaled_dot_product_attention(q, self.k[:, :, :end], self.v[:, :, :end], attn_mask=bias)
        before = slot_of(torch.arange(max(start - window, 0), start), *self.span).to(device)             # the window so far
        local = [torch.cat((held[:, :, before], new), dim=2) if window else new
                 for held, new in ((self.k, k_rec), (self.v, v_rec)) if start]
        p = torch.arange(start, end)
        p = p[allowed(end, p, *self.span)].to(device)              # those that the next query may use; no wait for the GPU
        for held, new in ((self.k, k_rec), (self.v, v_rec)):
            held.index_copy_(2, slot_of(p, *self.span), new.index_select(2, p - start))
        if start:
            return attention_chunk(q, self.k, self.v, *local, start, *self.span)
        return attention(q, k_rec, v_rec, *self.span)


class TopkCache(GroupCache):
    """The same with top-k blocks. Any block may be chosen later, so all positions are held, in order, as for D1; few are read.

    summaries: of all blocks, (B, heads, blocks, Dh), or 2 Dh for minmax, in the keys' dtype; for `last` a view of the keys.
    """

    def __init__(self, rule, batch, heads, Dh, max_len, dtype, device):
        block = max(1, min(rule.block, max_len))
        super().__init__(Rule(dilation=1), batch, heads, Dh, -(-max_len // block) * block, dtype, device)
        self.rule = replace(rule, block=block, window=min(rule.window, max_len), sinks=min(rule.sinks, max_len))
        self.summaries = block_summaries(self.k, block, rule.score)
        self.tensors += [self.summaries] * (rule.score != "last")

    def read(self, t):
        return super().read(t) + (t // self.rule.block).double().mean().item() * self.summaries[:, :, :1].nbytes

    def step(self, y, x, state, rope, seen):
        decode_topk(y, x, state, rope, self.k, self.v, self.summaries, seen, *self.rule.sizes, self.rule.score)

    def attend(self, q, k_rec, v_rec, start):
        end, block = start + q.shape[2], self.rule.block
        self.k[:, :, start:end], self.v[:, :, start:end] = k_rec, v_rec
        first, last = start // block, -(-end // block)
        if self.rule.score != "last":                              # those are in the keys already
            self.summaries[:, :, first:last] = block_summaries(self.k[:, :, first * block:last * block], block, self.rule.score)
        return self.rule.attend(q, self.k[:, :, :end], self.v[:, :, :end])


class Cache:
    """What decoding keeps: RATPlus.new_cache makes it, prefill and step fill it, up to max_len tokens.

    length: tokens seen so far, as the host counts; seen: the same on the device (1,). groups[layer][group]: a GroupCache.
    state[layer]: k~ (before RoPE) and v~ of the last token, (2, B, C) float32 (float64 with a cache of that); (2, B, 0) without
    recurrence.
    """

    def __init__(self, config, batch, max_len, pattern, dtype, device):
        self.pattern, self.batch, self.max_len, self.length = pattern, batch, max_len, 0
        self.seen = torch.zeros(1, dtype=torch.long, device=device)
        Dh, layers = config.n_embd // config.n_head, range(config.n_layer)
        self.groups = [[(TopkCache if rule.topk else GroupCache)(rule, batch, heads.stop - heads.start, Dh, max_len, dtype,
                                                                 device)
                        for rule, heads in pattern.groups(i, config.n_head)] for i in layers]
        C, exact = config.n_embd * config.recurrence, torch.promote_types(dtype, torch.float32)
        self.state = [torch.zeros(2, batch, C, dtype=exact, device=device) for _ in layers]

    def check(self, T):
        """ValueError, before anything is overwritten, if T more tokens would run past max_len."""
        if self.length + T > self.max_len:
            raise ValueError(f"the cache is too short: {self.length} tokens seen + {T} new > max_len {self.max_len}")

    @property
    def nbytes(self):
        """Bytes of all keys, values, summaries and states, as allocated."""
        return sum(z.nbytes for z in [*self.state, *(z for layer in self.groups for group in layer for z in group.tensors)])

    @property
    def slots(self):
        """slots[layer][group]: how many positions are held now."""
        return [[group.held(self.seen) for group in layer] for layer in self.groups]

    def read(self, t):
        """Bytes of it that a step at position t reads, states included, as a mean over an int64 CPU tensor of positions."""
        return sum(z.nbytes for z in self.state) + sum(group.read(t) for layer in self.groups for group in layer)


# ---------------------------------------------------------------------------------------------
# The model

class LinearCrossEntropy(torch.autograd.Function):
    """The output head and its loss, summed over tokens, without ever holding all logits.

    With N = B T tokens, z_n = W x_n (V,) the logits of token n and y_n its target (tokens with target -100 are left out):
        loss = sum_n logsumexp(z_n) - z_n[y_n]
        dz_n = softmax(z_n) - onehot(y_n)        dx_n = W^T dz_n        dW = sum_n dz_n x_n^T

    x (N, C), weight (V, C), targets (N,) int; returns a scalar, float32 (float64 for float64 inputs). `dtype`, the
    compute dtype, is that of the matrix products; softmax and the sums are float32. Tokens go by in chunks of `rows`,
    enough to keep the products busy; with `grad`, a chunk's logits become their own gradient, of which dx and dW follow
    at once, so that backward only scales them. Bytes held in bfloat16: 2 rows V of logits, 4 N C of dx, 4 V C of dW. The
    logits of all tokens would be 2 N V, and 4 N V in float32.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, grad, rows=8192):
        acc = torch.promote_types(dtype, torch.float32)
        w, loss, dx, dw = weight.to(dtype), 0, [], torch.zeros_like(weight, dtype=acc) if grad else None
        for x_rows, y in zip(x.to(dtype).split(rows), targets.split(rows)):
            z = x_rows @ w.T                                                             # (rows, V)
            loss = loss + cross_entropy_(z, y, grad).sum()
            if grad:                                                                     # z is dz now
                dx.append(z @ w)
                dw += z.T @ x_rows
        if grad:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype), None, None, None, None


class RATPlus(nn.Module):
    """The language model. Its weights know no pattern: every call names one, as text or Pattern; left out: D1, dense."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False                # checkpointing: blocks run again in backward
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)    # also the output head
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    @property
    def compute_dtype(self):
        """The dtype of matrix products: autocast's, or the weights'."""
        weight, kind = self.embed.weight, self.embed.weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def hidden(self, idx, pattern, cache=None):
        """(B, T) int -> (B, T, C): all but the last norm and the output head. With a cache, idx continues what it has seen."""
        t = torch.arange(idx.shape[1], device=idx.device) + (cache.seen if cache else 0)
        rope = rope_angles(t, self.config.n_embd // self.config.n_head)
        x = self.embed(idx)
        for i, block in enumerate(self.blocks):
            arguments = x, rope, pattern.groups(i, self.config.n_head), *((cache, i) if cache else ())
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        if cache:
            cache.seen += idx.shape[1]
        return x

    def head(self, x):
        return F.linear(self.norm(x), self.embed.weight)

    def forward(self, idx, pattern="D1"):
        """Logits (B, T, V) of idx (B, T), every position in parallel. ValueError for a pattern that does not fit."""
        return self.head(self.hidden(idx, Pattern.parse(pattern).fit(self.config)))

    def loss(self, idx, targets, pattern="D1"):
        """Mean cross-entropy in nats over targets (B, T) that are not -100, a float32 scalar; 0 if all are."""
        x, weight = self.norm(self.hidden(idx, Pattern.parse(pattern).fit(self.config))), self.embed.weight
        grad = torch.is_grad_enabled()
        total = LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), self.compute_dtype, grad)
        return total / (targets != -100).sum().clamp(min=1)

    def compile(self, **options):
        """torch.compile the blocks, each by itself: they are alike, so that one graph a rule serves all."""
        for block in self.blocks:
            block.compile(**options)

    def new_cache(self, batch, max_len, pattern="D1", device=None):
        """An empty Cache for `batch` sequences of up to max_len tokens, in the compute dtype (autocast's or the weights').

        device: the weights' own; "meta" allocates nothing and still knows its nbytes.
        """
        pattern = Pattern.parse(pattern).fit(self.config)
        return Cache(self.config, batch, max_len, pattern, self.compute_dtype, device or self.embed.weight.device)

    @torch.no_grad()
    def prefill(self, idx, cache, chunk=8192):
        """Append idx (B, T) to the cache; logits (B, V) of the last position. Call again to append more.

        Long prompts go in chunks, so that keys and values of a chunk in one layer are all that exists beside the cache.
        ValueError, with the cache untouched, if idx has another batch size or would run past max_len.
        """
        if idx.dim() != 2 or idx.shape[1] < 1 or len(idx) != cache.batch:
            raise ValueError(f"prefill: tokens of shape {tuple(idx.shape)}, the cache wants ({cache.batch}, T >= 1)")
        cache.check(idx.shape[1])
        for piece in idx.split(chunk, dim=1):
            x = self.hidden(piece, cache.pattern, cache)
            cache.length += piece.shape[1]
        return self.head(x[:, -1])

    def step(self, token, cache):
        """Append one token (B,) per sequence; logits (B, V) for the next."""
        return self.prefill(token[:, None], cache)

    @torch.no_grad()
    def decode(self, logits, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Yield tokens (B,) without end, the first drawn from logits (B, V), each next one after appending that before it.

        A sequence that yielded `stop` yields it ever after. ValueError at the token for which the cache has no room.
        On a GPU the first step compiles the kernels, and the second is captured as a CUDA graph, sampling included, that is
        replayed for all later ones: a graph is a list of kernels with fixed arguments, and the position is read on the device.
        """
        token = choose(logits, temperature, top_k, top_p)

        def step():
            new = choose(self.head(self.hidden(token[:, None], cache.pattern, cache)[:, -1]), temperature, top_k, top_p)
            token.copy_(new if stop is None else new.masked_fill(token == stop, stop))

        for i in itertools.count():
            yield token.clone()
            cache.check(1)
            if i == 1 and token.is_cuda and triton:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                step = graph.replay
            step()
            cache.length += 1

    def stream(self, idx, n_new, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Prefill idx, then yield up to n_new tokens (B,), as `decode` does, fewer if all sequences stop. That is looked up
        every 16 tokens, as each look makes the host wait for the device."""
        tokens = self.decode(self.prefill(idx, cache), cache, temperature, top_k, top_p, stop)
        for i, token in enumerate(itertools.islice(tokens, n_new), 1):
            yield token
            if stop is not None and i % 16 == 0 and (token == stop).all():
                return

    def generate(self, idx, n_new, pattern="D1", temperature=1.0, top_k=None, top_p=None, stop=None):
        """idx (B, T) and n_new tokens after it: (B, T + n_new). Sequences that reach `stop` are filled up with it."""
        cache = self.new_cache(len(idx), idx.shape[1] + n_new, pattern)
        new = list(self.stream(idx, n_new, cache, temperature, top_k, top_p, stop))
        new += new[-1:] * (n_new - len(new))
        return torch.cat((idx, *(token[:, None] for token in new)), dim=1)


def choose(logits, temperature=1.0, top_k=None, top_p=None):
    """Draw a token (B,) from logits (B, V), in float32. Temperature 0: the likeliest. top_k: among the k likeliest.
    top_p: among the fewest whose probabilities reach p."""
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("sampling wants temperature >= 0, top_k >= 1, 0 < top_p <= 1; "
                         f"got {temperature}, {top_k}, {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    below = logits.float() - logits.amax(-1, keepdim=True)             # the likeliest: 0, at the lowest temperature too
    probs, tokens = (below / max(temperature, 1e-30)).softmax(-1), None
    if top_k is not None or top_p is not None:
        probs, tokens = probs.topk(min(top_k or probs.shape[-1], probs.shape[-1]))       # likeliest first
    if top_p is not None:
        likelier = (probs.cumsum(-1) - probs) / probs.sum(-1, keepdim=True)              # the probability of those before
        probs = probs.masked_fill(likelier >= top_p, 0)
    race = torch.empty_like(probs).exponential_().clamp_(min=1e-10)    # i wins argmax p_i / Exp(1) with probability p_i;
    drawn = (probs / race).argmax(-1)                                  # unlike multinomial, this never waits for the host
    return drawn if tokens is None else tokens.gather(1, drawn[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, model, **meta):
    """Write the weights, the config and `meta` (plain values and tensors) so that `path` is always whole.

    The file is written beside `path`, flushed to disk and renamed. OSError if that fails; an older file then stays.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            torch.save({**meta, "config": asdict(model.config), "model": model.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                       # RuntimeError: torch's writer on a full disk
        raise OSError(f"{path} is not saved, an older one is as it was ({str(error).splitlines()[0]})") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_checkpoint(path, device="cpu"):
    """(model, meta) from our file or the authors' .pth. Nothing in the file is executed.

    meta: what save_checkpoint was given; tokenizer "ids" and pattern "D1" where it says nothing else.
    OSError if there is no file, ValueError if it is not a whole checkpoint.
    """
    try:
        easydict = torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")])    # reads as a plain dict
        with open(path, "rb") as f, easydict, warnings.catch_warnings(action="ignore"):
            data = torch.load(f, map_location="cpu", weights_only=True)
        data = data if "model" in data else from_authors(data)
        with torch.device("meta"):                                 # spends no memory and no random numbers
            model = RATPlus(RATConfig(**data.pop("config")))
        model.load_state_dict(data.pop("model"), assign=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:                                     # torn or foreign: torch raises all kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise ValueError(f"{path}: not a whole checkpoint, ours or the authors' ({reason})") from error
    return model.to(device).eval(), {"tokenizer": "ids", "pattern": "D1", **data}


AUTHORS_NAMES = {"_orig_mod.": "", "embedding.wte": "embed", "backbone.ln": "norm", "backbone.layers": "blocks",
                 "seq_layer.input_norm": "mix.norm", "seq_layer": "mix", "hidden_layer.ln": "norm", "hidden_layer.": ""}


def from_authors(data):
    """The authors' checkpoint, or its weights alone, as ours. Older files hold the rows of g apart, as fgate_proj."""
    weights = {}
    for name, tensor in data.get("task", data).items():
        for theirs, ours in AUTHORS_NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor.float()
    embed, n_layer = weights["embed.weight"], sum(name.endswith("in_proj.weight") for name in weights)
    if not torch.equal(weights.pop("head.lm_head.weight", embed), embed):
        raise ValueError("the output head is not tied to the embedding")
    for i in range(n_layer):
        in_proj, gate = f"blocks.{i}.mix.in_proj.weight", weights.pop(f"blocks.{i}.mix.fgate_proj.weight", None)
        weights[in_proj] = weights[in_proj] if gate is None else torch.cat((weights[in_proj], gate))
    V, C = embed.shape
    Dh = data["config"]["model"]["backbone"]["seq_cell"]["d_head"] if "config" in data else 128
    recurrence = len(weights["blocks.0.mix.in_proj.weight"]) == 5 * C
    config = dict(vocab_size=V, n_layer=n_layer, n_head=C // Dh, n_embd=C, recurrence=recurrence)
    return {"config": config, "model": weights, "step": data.get("step")}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("usage: python model.py PATTERN [T]")
    try:
        T = int(sys.argv[2]) if sys.argv[2:] else 20
        if not 1 <= T <= 1000:
            raise ValueError(f"T is from 1 to 1000, not {T}")
        print(Pattern.parse(sys.argv[1]).draw(T))
    except ValueError as error:
        sys.exit(f"model.py: {error}")
