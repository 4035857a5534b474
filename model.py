"""
RAT+ (arXiv 2602.18196), the whole architecture in one file: train dense, infer sparse.

A transformer whose keys and values pass through a gated recurrence before attention. Position p then summarises a
stretch that ends at p, so attention may skip most positions: keep every D-th and the cache shrinks D times.

  o, q, k, v, g = in_proj(RMSNorm(x))                                                              (1)
  k~_t = a_t * k~_{t-1} + (1 - a_t) * k_t        a_t = sigmoid(g_t); the same decay for v~         (2)
  y_t  = sum over allowed p of softmax_p(RoPE(q)_t . RoPE(k~)_p / sqrt(Dh)) v~_p     per head      (3)
  allowed: p <= t and ((p + 1) mod D == 0 or t - p <= W or p < S)                                  (4)
  x    = x + out_proj(sigmoid(o) * y)            then  x = x + fc2(gelu(fc1(RMSNorm(x))))          (5)

  code              shape            paper
  x                 (B, T, C)        the residual stream: B batch, T time, C = n_embd channels
  o, g              (B, T, C)        logits of the output gate and of the decay a
  q, k, v           (B, T, C)        queries, and keys and values before the recurrence
  k_rec, v_rec      (B, T, C)        k~, v~: after it; (B, H, T, Dh) in attention, H heads of width Dh
  dilation          D                dilation; the authors' "-1" (none) is 0 here
  window, sinks     W, S             local_size, initial_size
  pattern           Pattern          "attention pattern"; a model has none, each call names one

Read on: Pattern (which positions), Mixing (equations 1-5), Cache (what decoding keeps), RATPlus, checkpoints.
`python model.py D4W4S2` draws a pattern.
"""
import os
import re
import sys
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import allowed, attention, attention_at, on_grid, recurrence

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

    def __str__(self):
        fields = zip("DWSNK", (self.dilation, self.window, self.sinks, self.block, self.topk))
        return "".join(f"{letter}{value}" for letter, value in fields if value) or "W0"

    @property
    def span(self):
        """(dilation, window, sinks), the arguments of `allowed` and `attention`. ValueError for top-k."""
        if self.topk:
            raise ValueError(f"pattern '{self}': top-k blocks follow the data, so they have no fixed mask, "
                             "and the model does not compute them yet. A right one is D16W256S4")
        return self.dilation, self.window, self.sinks


@dataclass(frozen=True)
class Pattern:
    """A rule per layer and head group, layers[i][j]: layers cycle through the outer tuple, heads split evenly.

    Written as text: D16, D16W256S4, W1024S4, D1,D64 (layers alternate), D1/D64 (half the heads each).
    """
    layers: tuple

    @staticmethod
    def parse(text):
        """The Pattern that `text` spells; a Pattern is passed through. ValueError in one line for anything else."""
        def rule(part):
            match = re.fullmatch("".join(f"(?:{letter}([0-9]{{1,9}}))?" for letter in "DWSNK"), part)
            value = {letter: int(digits) for letter, digits in zip("DWSNK", match.groups()) if digits} if match else {}
            if not value:
                refuse(f"{part!r} is not made of fields D W S N K, in this order, a number of up to 9 digits after each")
            if 0 in (value.get("D"), value.get("N"), value.get("K")):
                refuse("D, N and K start at 1 (no dilated positions: leave D out)")
            if ("N" in value) != ("K" in value):
                refuse("N (block size) and K (how many blocks) go together")
            return Rule(*(value.get(letter, 0) for letter in "DWSNK"))

        def refuse(why):
            raise ValueError(f"pattern {text!r}: {why}. A right one is D16W256S4, W1024S4, D1,D64 or D1/D64")

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
            for rule in rules:
                rule.span                                          # refuses top-k
        return self

    def groups(self, layer, n_head):
        """[(rule, slice of heads)] of a layer."""
        rules = self.layers[layer % len(self.layers)]
        size = n_head // len(rules)
        return [(rule, slice(i * size, (i + 1) * size)) for i, rule in enumerate(rules)]

    def mask(self, T, layer=0, group=0):
        """(T, T) bool, True where the query (row) may attend to the key (column): `allowed`. ValueError for top-k."""
        t = torch.arange(T)
        return allowed(t[:, None], t, *self.layers[layer % len(self.layers)][group].span)

    def keys_per_token(self, config, T):
        """Mean number of keys per query in a window of T tokens, over positions, layers and heads.

        Counted from the side of the keys: p is seen by all T - p queries from p on, or by its window's W + 1 at most.
        """
        p, total = torch.arange(T), 0
        for i in range(config.n_layer):
            for rule, heads in self.groups(i, config.n_head):
                lasting = allowed(FUTURE, p, *rule.span)           # on the grid or a sink
                queries = torch.where(lasting, T - p, (T - p).clamp(max=rule.window + 1))
                total += queries.sum().item() * (heads.stop - heads.start)
        return total / (T * config.n_layer * config.n_head)

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


def rotate(x, cos, sin):
    """RoPE on x (B, H, T, Dh): channel i of the first half turns with channel i of the second, in float32."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class Mixing(nn.Module):
    """Temporal mixing, the part that RAT+ changes: equations (1) to (5)."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.config, self.layer = config, layer
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.in_proj = nn.Linear(C, (5 if config.recurrence else 4) * C, bias=False)     # rows: o, q, k, v, g
        self.out_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, rope, pattern, cache=None):
        """x (B, T, C) -> (B, T, C). rope: cos and sin of x's positions. With a Cache, x continues what it has seen."""
        B, T, C = x.shape
        H = self.config.n_head
        o, q, k, v, *g = self.in_proj(self.norm(x)).split(C, dim=-1)                     # (1)
        k_rec, v_rec = k, v
        if self.config.recurrence:                                                       # (2)
            k_rec, v_rec, state = recurrence(k, v, *g, cache.state[self.layer] if cache else None)
            if cache:
                cache.state[self.layer] = state
        q, k_rec, v_rec = (z.view(B, T, H, C // H).transpose(1, 2) for z in (q, k_rec, v_rec))
        q, k_rec = rotate(q, *rope), rotate(k_rec, *rope)                                # after the recurrence
        y = []
        for i, (rule, heads) in enumerate(pattern.groups(self.layer, H)):                # (3), (4)
            qkv = q[:, heads], k_rec[:, heads], v_rec[:, heads]                          # (B, heads, T, Dh)
            y.append(cache.groups[self.layer][i].attend(*qkv, cache.length) if cache else attention(*qkv, *rule.span))
        y = torch.cat([z.transpose(1, 2) for z in y], dim=2).reshape(B, T, C)
        return self.out_proj(torch.sigmoid(o) * y)                                       # (5)


class Block(nn.Module):
    """Temporal mixing, then the MLP (exact GELU, width 4C), each added to the residual stream: equation (5)."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.mix = Mixing(config, layer)
        self.norm = nn.RMSNorm(C, eps=1e-6)
        self.fc1 = nn.Linear(C, 4 * C, bias=False)
        self.fc2 = nn.Linear(4 * C, C, bias=False)

    def forward(self, x, rope, pattern, cache=None):
        x = x + self.mix(x, rope, pattern, cache)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


# ---------------------------------------------------------------------------------------------
# The cache: what decoding keeps

FUTURE = 2**62        # the position of an empty slot: no query reaches it


class GroupCache:
    """Keys (after RoPE) and values of one head group of one layer, in slots laid out as [ sinks | ring | grid ].

    A position has one slot: on the grid, that of its block; else, if it is a sink, its own; else ring slot p mod W,
    until position p + W takes that over. Which position a slot holds follows from the number of tokens seen, so that
    nothing but keys and values is stored.
    """

    def __init__(self, span, batch, heads, Dh, max_len, dtype, device):
        dilation, window, sinks = self.span = span
        self.D = dilation or FUTURE                                # without a grid: its first position never comes
        self.sinks, self.ring = (0, 0) if dilation == 1 else (min(sinks, max_len), min(window, max_len))
        shape = batch, heads, self.sinks + self.ring + max_len // self.D, Dh
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def positions(self, length):
        """The position in each slot that is in use after `length` tokens, (slots,) int64; FUTURE in an empty one."""
        last, device = length - 1, self.k.device
        sink, slot = torch.arange(self.sinks, device=device), torch.arange(self.ring, device=device)
        ring = last - (last - slot) % max(self.ring, 1)            # the latest p with p mod W = slot
        ring = ring.masked_fill(ring < self.sinks, FUTURE)         # before the start, or a sink
        p = torch.cat((sink, ring))
        p = p.masked_fill((p > last) | on_grid(p, self.D), FUTURE)
        grid = torch.arange(length // self.D, device=device) * self.D + self.D - 1
        return torch.cat((p, grid))

    def attend(self, q, k_rec, v_rec, length):
        """Attention of T tokens over themselves and what is held of the `length` before them; then keep them.

        q, k_rec, v_rec: (B, heads, T, Dh), after RoPE. Returns (B, heads, T, Dh).
        """
        if length == 0:
            y = attention(q, k_rec, v_rec, *self.span)
        else:
            p, t = self.positions(length), torch.arange(length, length + q.shape[2], device=q.device)
            k, v = torch.cat((self.k[:, :, :len(p)], k_rec), dim=2), torch.cat((self.v[:, :, :len(p)], v_rec), dim=2)
            y = attention_at(q, k, v, t, torch.cat((p, t)), *self.span)
        self.keep(k_rec, v_rec, length)
        return y

    def keep(self, k_rec, v_rec, length):
        """Store those of T tokens, the first at position `length`, that the query after them may attend to."""
        p = torch.arange(length, length + k_rec.shape[2], device=self.k.device)
        kept = allowed(length + len(p), p, *self.span)
        p = p[kept]
        slot = torch.where(p < self.sinks, p, self.sinks + p % max(self.ring, 1))
        slot = torch.where(on_grid(p, self.D), self.sinks + self.ring + (p + 1) // self.D - 1, slot)
        self.k[:, :, slot], self.v[:, :, slot] = k_rec[:, :, kept], v_rec[:, :, kept]


class Cache:
    """What decoding keeps: RATPlus.new_cache makes it, prefill and step fill it, up to max_len tokens.

    length: tokens seen so far. groups[layer][group]: a GroupCache. state[layer]: k~ (before RoPE) and v~ of the last
    token, 2 x (B, C) float32.
    """

    def __init__(self, config, batch, max_len, pattern, dtype, device):
        self.pattern, self.batch, self.max_len, self.length = pattern, batch, max_len, 0
        C, Dh, layers = config.n_embd, config.n_embd // config.n_head, range(config.n_layer)
        self.groups = [[GroupCache(rule.span, batch, heads.stop - heads.start, Dh, max_len, dtype, device)
                        for rule, heads in pattern.groups(i, config.n_head)] for i in layers]
        self.state = [torch.zeros(2, batch, C, device=device).unbind() if config.recurrence else () for _ in layers]

    @property
    def nbytes(self):
        """Bytes of all tensors, as allocated."""
        groups = [group for layer in self.groups for group in layer]
        states = [z for state in self.state for z in state]
        return sum(z.nbytes for z in [*(group.k for group in groups), *(group.v for group in groups), *states])

    @property
    def slots(self):
        """slots[layer][group]: how many positions are held now."""
        def held(group):
            return int(allowed(self.length, group.positions(self.length), *group.span).sum())
        return [[held(group) for group in layer] for layer in self.groups]


# ---------------------------------------------------------------------------------------------
# The model

class LinearCrossEntropy(torch.autograd.Function):
    """The output head and its loss, summed over tokens, without ever holding all logits.

    With N = B T tokens, z_n = W x_n (V,) the logits of token n and y_n its target (tokens with target -100 are left out):
        loss = sum_n logsumexp(z_n) - z_n[y_n]
        dz_n = softmax(z_n) - onehot(y_n)        dx_n = W^T dz_n        dW = sum_n dz_n x_n^T

    x (N, C), weight (V, C), targets (N,) int; returns a scalar, float32 (float64 for float64 inputs). `dtype`, the
    compute dtype, is that of the matrix products; softmax and the sums are float32. Tokens go by in chunks of `rows`,
    enough to keep the products busy; with `grad`, a chunk's gradient is taken while its logits are there, so that
    backward only scales dx and dW. Bytes held in bfloat16: 2 rows V of logits and as many of dz, 2 N C of dx, 4 V C of
    dW. The logits of all tokens would be 2 N V, and 4 N V in float32.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, grad, rows=4096):
        acc = torch.promote_types(dtype, torch.float32)
        w, vocabulary = weight.to(dtype), torch.arange(len(weight), device=x.device)
        loss, dx, dw = x.new_zeros((), dtype=acc), [], torch.zeros_like(weight, dtype=acc) if grad else None
        for x_rows, y in zip(x.to(dtype).split(rows), targets[:, None].split(rows)):
            counted, y = y != -100, y.clamp(min=0)                                       # (rows, 1)
            logp = (x_rows @ w.T).log_softmax(-1, dtype=acc)                             # (rows, V)
            loss -= (logp.gather(1, y) * counted).sum()
            if grad:
                dz = ((logp.exp() - (vocabulary == y).to(acc)) * counted).to(dtype)
                dx.append(dz @ w)
                dw += dz.T @ x_rows
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
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=1e-6)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def hidden(self, idx, pattern, cache=None):
        """(B, T) int -> (B, T, C): everything but the output head. With a cache, idx continues what it has seen."""
        start = cache.length if cache else 0
        t = torch.arange(start, start + idx.shape[1], device=idx.device)
        rope = rope_angles(t, self.config.n_embd // self.config.n_head)
        x = self.embed(idx)
        for block in self.blocks:
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, rope, pattern, use_reentrant=False) if again else block(x, rope, pattern, cache)
        if cache:
            cache.length += idx.shape[1]
        return self.norm(x)

    def head(self, x):
        return F.linear(x, self.embed.weight)

    def forward(self, idx, pattern="D1"):
        """Logits (B, T, V) of idx (B, T), every position in parallel. ValueError for a pattern that does not fit."""
        return self.head(self.hidden(idx, Pattern.parse(pattern).fit(self.config)))

    def loss(self, idx, targets, pattern="D1"):
        """Mean cross-entropy in nats over targets (B, T) that are not -100, a float32 scalar; 0 if all are."""
        x, weight = self.hidden(idx, Pattern.parse(pattern).fit(self.config)).flatten(0, 1), self.embed.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        total = LinearCrossEntropy.apply(x, weight, targets.flatten(), dtype, torch.is_grad_enabled())
        return total / (targets != -100).sum().clamp(min=1)

    def new_cache(self, batch, max_len, pattern="D1", device=None):
        """An empty Cache for `batch` sequences of up to max_len tokens, in the compute dtype (autocast's or the weights').

        device: the weights' own; "meta" allocates nothing and still knows its nbytes.
        """
        weight, kind = self.embed.weight, self.embed.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        pattern = Pattern.parse(pattern).fit(self.config)
        return Cache(self.config, batch, max_len, pattern, dtype, device or weight.device)

    @torch.no_grad()
    def prefill(self, idx, cache):
        """Append idx (B, T) to the cache; logits (B, V) of the last position. Call again to append more.

        ValueError, with the cache untouched, if idx has another batch size or would run past max_len.
        """
        if idx.dim() != 2 or idx.shape[1] < 1 or len(idx) != cache.batch:
            raise ValueError(f"prefill: tokens of shape {tuple(idx.shape)}, the cache wants ({cache.batch}, T >= 1)")
        if cache.length + idx.shape[1] > cache.max_len:
            raise ValueError(f"the cache is too short: {cache.length} tokens seen + {idx.shape[1]} new > "
                             f"max_len {cache.max_len}")
        return self.head(self.hidden(idx, cache.pattern, cache)[:, -1])

    def step(self, token, cache):
        """Append one token (B,) per sequence; logits (B, V) for the next."""
        return self.prefill(token[:, None], cache)

    @torch.no_grad()
    def stream(self, idx, n_new, cache, temperature=1.0, top_k=None, top_p=None, stop=None):
        """Prefill idx, then yield n_new tokens (B,) one by one. A sequence that yielded `stop` yields it ever after;
        when all have, the stream ends."""
        logits, done = self.prefill(idx, cache), torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for i in range(n_new):
            token = choose(logits, temperature, top_k, top_p)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if i + 1 == n_new or done.all():
                return
            logits = self.step(token, cache)

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
    probs, tokens = (logits.float() / temperature).softmax(-1).sort(descending=True)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    return tokens.gather(1, torch.multinomial(probs, 1))[:, 0]


# ---------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, model, **meta):
    """Write the weights, the config and `meta` (plain values and tensors) so that `path` is always whole.

    The file is written beside `path`, flushed to disk and renamed. OSError if that fails; an older file then stays.
    """
    partial = f"{path}.tmp"
    try:
        with open(partial, "wb") as f:
            torch.save({"config": asdict(model.config), "model": model.state_dict(), **meta}, f)
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
    try:
        text, T = sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else 20
        print(Pattern.parse(text).draw(T))
    except (ValueError, IndexError) as error:
        sys.exit(f"model.py: {error}; usage: python model.py PATTERN [T]")
