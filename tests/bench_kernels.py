"""Time the kernels on a GPU beside PyTorch's own ways: python tests/bench_kernels.py [WORK ...], of
recurrence, attention, top-k, decode; without any, all of them.

A row: the median of triton.testing.do_bench in milliseconds, after a quarter of a second of the
same work, as a cold card is faster. limit: the fewest bytes or FLOPs of the work at the rates that
are measured first, the slower of the two. Peers are compiled; their times are also given as
multiples of ours. error: relative, of the first output, to the first peer's.
"""
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels
from model import Cache, Pattern, RATConfig, Rule, best_blocks, block_summaries, rope_angles

WORKS = "recurrence", "attention", "top-k", "decode"


class Row(NamedTuple):
    """A row of the table. run and peers: functions without arguments, timed as they are."""
    work: str
    run: object
    n_bytes: float
    flops: float = 0
    peers: dict = {}


def milliseconds(run):
    from triton.testing import do_bench
    do_bench(run, warmup=0, rep=250)                            # warms the card
    return do_bench(run, rep=100, return_mode="median")


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def first_of(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def with_gradients(run, inputs):
    """run(*inputs) and its backward pass as a function."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    torch.manual_seed(0)                               # the same gradient for a peer
    gradient = torch.randn_like(first_of(run(*inputs)))
    return lambda: torch.autograd.grad(first_of(run(*inputs)), inputs, gradient)


# ---- Peers ---------------------------------------------------------------------------------------

def scan(k, v, g):
    """Equation (2) by PyTorch's associative_scan in float32: k_rec and v_rec."""
    from torch._higher_order_ops.associative_scan import associative_scan
    a = torch.sigmoid(g.float())
    rest = torch.sigmoid(-g.float())

    def step(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1], y[0] * x[2] + y[2]

    _, k_rec, v_rec = associative_scan(step, (a, rest * k, rest * v), 1, combine_mode="pointwise")
    return k_rec.to(k.dtype), v_rec.to(v.dtype)


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(qkv, rule):
    """PyTorch's flex_attention, compiled, under the mask of a rule."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    q, k, _ = qkv
    B, H, T, _ = q.shape
    D, W, S, N, _, _ = rule
    chosen = None
    if N:
        t = torch.arange(T, device="cuda")
        chosen = best_blocks(q, block_summaries(k, N, rule.score), t, rule)

    def mask(b, h, t, p):
        seen = (t - p <= W) | (p < S)
        if D:
            seen = seen | ((p + 1) % D == 0)
        if N:
            seen = seen | chosen[b, h, t, p // N]
        return seen & (p <= t)

    shape = (B, H) if N else (None, None)
    block_mask = torch.compile(create_block_mask)(mask, *shape, T, T, "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


# ---- Work ----------------------------------------------------------------------------------------

def recurrence_rows():
    for B, T, C in (4, 8192, 2048), (1, 65536, 2048), (32, 2048, 512):
        kvg = randn(B, T, 5 * C).split(C, dim=-1)[2:]
        inputs = *kvg, torch.zeros(2, B, C, device="cuda")
        work = f"recurrence, B{B} T{T} C{C}"
        n = B * T * C
        peer = torch.compile(scan, dynamic=False)      # its gradient takes minutes to compile
        yield Row(work, lambda: kernels.recurrence(*inputs), 10 * n, 0,
                  {"associative_scan": lambda: peer(*kvg)})
        yield Row(f"{work}, forward + backward", with_gradients(kernels.recurrence, inputs), 30 * n)


def forward_and_backward(work, run, inputs, forward_bytes, all_bytes, flops, peers):
    """Two rows. flops: of the forward pass; with the backward pass they are 3.5 times as many."""
    both = {name: with_gradients(peer, inputs) for name, peer in peers.items()}
    alone = {name: lambda peer=peer: peer(*inputs) for name, peer in peers.items()}
    yield Row(work, lambda: run(*inputs), forward_bytes, flops, alone)
    work = f"{work}, forward + backward"
    yield Row(work, with_gradients(run, inputs), all_bytes, 3.5 * flops, both)


def keys_per_query(rule, T):
    t = torch.arange(T).double()
    near = (t - rule.window).clamp(min=0)
    grid = (near / rule.dilation).floor() if rule.dilation else 0
    keys = grid + t.clamp(max=rule.window) + 1 + near.clamp(max=rule.sinks)
    return keys.mean().item() + rule.topk * rule.block


def attention_rows():
    for B, H, T, Dh in (4, 16, 8192, 128), (8, 12, 4096, 64):
        for text in "D16", "D64", "D16W256S4", "W1024S4":
            yield from masked_rows(B, H, T, Dh, text)


def topk_rows():
    for B, T in (1, 4096), (4, 8192), (1, 16384), (1, 65536):
        for text in ("N64K16", "D64N64K8")[:1 if T > 16384 else 2]:
            yield from masked_rows(B, 16, T, 128, text)


def masked_rows(B, H, T, Dh, text):
    """Sparse attention beside dense attention and flex_attention under the same mask."""
    rule = Rule.parse(text)
    qkv = [randn(B, T, H, Dh).transpose(1, 2) for _ in range(3)]
    summaries = block_summaries(qkv[1], rule.block, rule.score) if rule.topk else None

    def run(q, k, v):
        if rule.topk:
            return kernels.attention_topk(q, k, v, rule, summaries)
        return kernels.attention(q, k, v, *rule.sizes)

    peers = {"dense SDPA": dense}
    if T < 16384:                                      # a mask of B H T T would be too large
        peers = {"flex_attention": flex(qkv, rule), **peers}
    n = B * H * T * Dh
    flops = 4 * n * keys_per_query(rule, T)
    work = f"attention {text}, B{B} H{H} T{T} Dh{Dh}"
    yield from forward_and_backward(work, run, qkv, 8 * n, 24 * n, flops, peers)


def decode_rows():
    """A step at the last position of a full cache, beside attention of one query over its keys."""
    cases = [(128, 4096, ("D1", "D16", "D64", "D16W256S4")), (64, 16384, ("D1", "D16", "D64")),
             (44, 16384, ("N64K16", "D64N64K8"))]
    H, Dh = 16, 128
    for B, T, texts in cases:
        for text in texts:
            config = RATConfig(1, 1, H, H * Dh)
            weight = torch.zeros(1, device="cuda")
            cache = Cache(config, B, T, Pattern.parse(text), torch.bfloat16, weight)
            layer = cache.layers[0]
            group = layer.groups[0]
            for z in group.tensors:
                z.normal_()
            cache.seen.fill_(T - 1)
            o, q, k, v, g = randn(B, 1, 5 * H * Dh).chunk(5, dim=-1)
            rope = rope_angles(cache.seen, Dh)
            n = keys_per_query(group.rule, T) if group.rule.topk else group.k.shape[2]
            query = q.view(B, 1, H, Dh).transpose(1, 2)

            def run():
                return kernels.decode(o, q, k, v, [g], rope, layer)

            def one():
                return F.scaled_dot_product_attention(query, group.k, group.v).flatten(1)[:, None]

            work = f"decode {text}, B{B} H{H} T{T} Dh{Dh}"
            yield Row(work, run, 4 * B * H * Dh * n, 0, {"SDPA of one query": one})


# ---- The table -----------------------------------------------------------------------------------

def limits():
    """Bytes per ms of a copy, read and written, and FLOP per ms of a matrix product, both here."""
    a = randn(1 << 29)
    b = torch.empty_like(a)
    bandwidth = 2 * a.nbytes / milliseconds(lambda: b.copy_(a))
    left = a[:8192**2].view(8192, 8192)
    right = a[-8192**2:].view(8192, 8192)
    return bandwidth, 2 * 8192**3 / milliseconds(lambda: left @ right)


def error_of(found, want):
    found = first_of(found).float()
    want = first_of(want).float()
    return ((found - want).norm() / want.norm()).item()


def line_of(row, bandwidth, rate):
    ms = milliseconds(row.run)
    limit = max(row.n_bytes / bandwidth, row.flops / rate)
    told = []
    error = math.nan
    for name, peer in row.peers.items():
        try:
            took = milliseconds(peer)
        except Exception as problem:                            # compiled peers raise all kinds
            told.append(f"{name}: {type(problem).__name__}")
            continue
        told.append(f"{name} {took:.3f} ({took / ms:.2f})")
        if name in ("flex_attention", "associative_scan"):
            error = error_of(row.run(), peer())
    cells = [row.work, f"{ms:.3f}", f"{limit:.3f}", f"{limit / ms:.0%}", f"{error:.0e}"]
    return f"| {' | '.join([*cells, ', '.join(told)])} |"


def main(works):
    unknown = {*works} - {*WORKS}
    if unknown:
        sys.exit(f"bench_kernels.py: {unknown.pop()!r} is not one of {', '.join(WORKS)}")
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py: there is no GPU")
    bandwidth, rate = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16; a copy moves "
          f"{bandwidth / 1e9:.2f} TB/s, a product of 8192^3 runs at {rate / 1e9:.0f} TFLOP/s\n\n"
          "| work | ms | limit ms | of limit | error | peers, ms (times ours) |\n"
          "|---|---|---|---|---|---|")
    rows = {"recurrence": recurrence_rows, "attention": attention_rows, "top-k": topk_rows,
            "decode": decode_rows}
    for work in works or WORKS:
        for row in rows[work]():
            print(line_of(row, bandwidth, rate), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
