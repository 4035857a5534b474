"""
Sparse inference: a prompt in, text out, dense or under any pattern. Or, with --bench, its cost.

Prefill runs the prompt in parallel and fills the cache. Each step then appends one token. With
dilation D the cache holds every D-th position only, so its bytes and the keys that a step reads
fall D times. A step has to move, at the least, this many bytes:

  weights, once for the whole batch  +  batch * (keys, values and states of the cache)

One sequence is bound by the weights and gains little. A large batch is bound by the cache, and a
small cache makes room for a large batch: that is where the speed comes from.

`python sample.py --pattern D16 --prompt "def "` takes out/D16.pt if there is one, else out/dense.pt
with a warning. `python sample.py --bench --preset paper-1.5b --contexts 4096 16384` prints a
Markdown table, dense first.
"""
import gc
import itertools
import os
import time
from typing import NamedTuple

import torch

from model import PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint
from train import (Parser, Tokenizer, add_common_flags, file_of, filled, fingerprint, header, merge,
                   note, on_gpu, out_of_memory, pattern_flag, real, resolve_compile, resolve_device,
                   run, say, whole)

OF_TEXT = {"prompt", "temperature", "top_k", "top_p", "max_len", "tokenizer", "out"}
OF_BENCH = {"preset", "contexts", "max_batch"}


def sample_flags():
    parser = Parser(__doc__)
    add_common_flags(parser)
    parser.flag("--checkpoint", None, "default: the pattern's in --out, else dense.pt there; with "
                "--bench: random weights", type=filled)
    parser.flag("--pattern", None, "the pattern to decode with, default: D1; with --bench several "
                "beside D1, default: D16 D64 D16W256S4", nargs="+", type=pattern_flag)
    parser.flag("--prompt", None, "text, or token ids if the checkpoint has no tokenizer of ours")
    parser.flag("--tokens", 200, "how many to generate", type=whole())
    parser.flag("--temperature", 0.8, "0: always the likeliest token", type=real(0, 1e6))
    parser.flag("--top-k", None, "draw among the k likeliest tokens", type=whole())
    parser.flag("--top-p", None, "draw among the fewest tokens that reach this probability",
                type=real(1e-9, 1))
    parser.flag("--max-len", None, "tokens that the cache has room for; default: as needed",
                type=whole())
    parser.flag("--tokenizer", None, "default: the checkpoint's", choices=("bytes", "gpt2", "ids"))
    parser.switch("--compile", False, "torch.compile what a step computes before and after its "
                  "attention: faster steps, after half a minute")
    parser.switch("--bench", False, "time prefill and greedy decoding instead of writing text")
    parser.flag("--preset", "laptop", "of --bench without --checkpoint: the model's shape",
                choices=[*PRESETS])
    parser.flag("--contexts", [4096], "of --bench: tokens in the cache before decoding starts",
                nargs="+", type=whole())
    parser.flag("--max-batch", None, "of --bench: the largest batch tried; default: 8 on a CPU, "
                "8192 on a GPU", type=whole())
    return parser


def refuse_idle(given):
    """ValueError for a flag that means nothing in this call."""
    bench = given.get("bench")
    for name in given:
        if name in (OF_TEXT if bench else OF_BENCH):
            where = "with" if bench else "without"
            raise ValueError(f"--{name.replace('_', '-')} means nothing {where} --bench")
    if "preset" in given and "checkpoint" in given:
        raise ValueError("--preset means nothing with --checkpoint, whose shape is its own")


def prepare(model, flags):
    """Cast the model to --dtype, compile what --compile asks for, print the header."""
    model.to(getattr(torch, flags.dtype))
    if flags.compile:
        torch._dynamo.config.recompile_limit = 64       # one graph for each size of batch
        options = {"coordinate_descent_tuning": True}   # at batch 1, Triton multiplies by weights
        if on_gpu(flags) and torch.cuda.get_device_capability()[0] >= 9:
            options["triton.enable_pdl"] = True         # a kernel starts while the last one ends
        model.compile_step(dynamic=False, options=options)
    header(model, flags)


# ---------------------------------------------------------------------------------------------
# Text

def load_weights(pattern, flags):
    """(path, model, meta): of --checkpoint, else of the pattern's own file, else of dense.pt."""
    dense = os.path.join(flags.out, "dense.pt")
    path = flags.checkpoint or file_of(pattern, flags.out)
    if not flags.checkpoint and not os.path.exists(path):
        path = dense
    model, meta = load_checkpoint(path, flags.device)
    if path not in (dense, flags.checkpoint) and os.path.exists(dense):
        check_parent(path, meta, dense)
    if meta["pattern"] != str(pattern):
        note(f"warning: {path} was trained for {meta['pattern']}, not for {pattern}; see adapt.py")
    return path, model, meta


def check_parent(path, meta, dense):
    """ValueError if the checkpoint at `path` was adapted from other weights than `dense` holds."""
    model, dense_meta = load_checkpoint(dense)
    parents = fingerprint(model), dense_meta.get("parent")
    if "parent" in meta and meta["parent"] not in parents:
        raise ValueError(f"{path} was adapted from other weights than {dense} holds now: run "
                         f"adapt.py again, or take it as it is with --checkpoint {path}")


def encode_prompt(prompt, coder, vocab_size):
    """The prompt's token ids, a list. ValueError that names --prompt if it can't be had."""
    try:
        ids = list(map(int, coder.encode(prompt)))      # bytes: as the shell gave them
    except ValueError as error:                         # a byte of another encoding, or no number
        raise ValueError(f"--prompt {prompt[:40]!a}: {error}") from error
    if not ids or max(ids) >= vocab_size:
        raise ValueError(f"--prompt {prompt[:40]!a}: at least one token is needed, each below "
                         f"{vocab_size}")
    return ids


def room_for(n_prompt, flags):
    """Tokens that the cache must take: all but the last one, which is never appended."""
    needed = n_prompt + flags.tokens - 1
    if flags.max_len and flags.max_len < needed:
        raise ValueError(f"--max-len {flags.max_len}: a prompt of {n_prompt} tokens and "
                         f"--tokens {flags.tokens} need {needed}")
    return flags.max_len or needed


def prefill(model, idx, max_len, pattern):
    """(a new cache with the prompt in it, the logits after it (1, V), seconds)."""
    cache = model.new_cache(1, max_len, pattern)
    took, logits = seconds(lambda: model.prefill(idx, cache), idx.device.type)
    return cache, logits, took


def decode(model, cache, logits, flags):
    """Yield --tokens token ids. ValueError if the logits become NaN."""
    tokens = model.decode(logits, cache, flags.temperature, flags.top_k, flags.top_p)
    for token in itertools.islice(tokens, flags.tokens):
        token = token.item()
        if token < 0:
            raise ValueError("the model's logits are not finite: its weights are of no use")
        yield token


def write(flags):
    """Print a text as it is generated, then what it cost."""
    texts = flags.pattern or ["D1"]
    if len(texts) > 1:
        raise ValueError("--pattern: several patterns are for --bench, a text takes one")
    pattern = Pattern.parse(texts[0])
    path, model, meta = load_weights(pattern, flags)
    pattern.fit(model.config)
    coder = Tokenizer(flags.tokenizer or meta["tokenizer"])
    prompt = flags.prompt
    if prompt is None:
        prompt = "1" if coder.name == "ids" else "def "
    ids = encode_prompt(prompt, coder, model.config.vocab_size)
    max_len = room_for(len(ids), flags)
    idx = torch.tensor([ids], device=flags.device)
    prepare(model, flags)

    start = time.perf_counter()
    cache, logits, _ = prefill(model, idx, max_len, pattern)
    for _ in itertools.islice(decode(model, cache, logits, flags), 3):
        pass                                                # compiles, and captures a graph
    say(f"{path} with {pattern}, warmed up in {1e3 * (time.perf_counter() - start):.0f} ms\n")

    print(prompt, end=" " if coder.name == "ids" else "", flush=True)
    torch.manual_seed(flags.seed)
    cache, logits, took = prefill(model, idx, max_len, pattern)
    stamps = []
    for token in decode(model, cache, logits, flags):
        stamps.append(time.perf_counter())
        print(coder.decode(token), end="", flush=True)
        if token == coder.eot:
            break
    dense = model.new_cache(1, max_len, "D1", device="meta").nbytes
    first = 2 if len(stamps) > 3 else 0                     # a GPU captures its graph for the third
    speed = (len(stamps) - 1 - first) / max(stamps[-1] - stamps[first], 1e-9)
    say(f"\n\nprefill {len(ids)} tokens {1e3 * took:.1f} ms | decode {speed:.1f} tok/s | cache "
        f"{cache.nbytes / 1e6:.3f} MB, dense {dense / 1e6:.3f} MB ({cache.nbytes / dense:.1%})")


# ---------------------------------------------------------------------------------------------
# What it costs

class Measured(NamedTuple):
    """A row of the table, in seconds and bytes; None where it was not measured."""
    batch: int
    prefill: float      # the fastest of up to three after a first one
    step: float         # of decoding, for the whole batch
    cache: int          # its bytes, as allocated
    read: float         # bytes of it that a step reads
    moved: float        # by a step: read, the weights, and the states, which are written too
    peak: int           # of the GPU's memory
    warm_up: float
    capture: float      # of the CUDA graph, its first replay included; on a CPU just a step


def seconds(call, device):
    """(seconds that `call` takes, the device's work included, and what it returns)."""
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    start = time.perf_counter()
    result = call()
    sync()
    return time.perf_counter() - start, result


def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy: what a step can hope for."""
    x = torch.zeros(2**30 if device.startswith("cuda") else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / min(seconds(lambda: y.copy_(x), device)[0] for _ in range(10))


def free_memory(device):
    """Bytes that can be allocated now."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_batch(model, max_len, pattern, flags):
    """The largest batch whose caches and activations fit into the free memory, or --max-batch."""
    shape = model.config
    activations = 2 * (4 * shape.vocab_size + 64 * shape.n_embd)    # eager, and in the graph
    each = model.new_cache(1, max_len, pattern, device="meta").nbytes + activations
    most = flags.max_batch or (8192 if on_gpu(flags) else 8)
    return int(max(1, min(most, (free_memory(flags.device) - 2**30) // each)))


def fill_at_random(cache, length):
    """As if `length` tokens had been seen, without the time of a prefill."""
    for layer in cache.groups:
        for group in layer:
            for z in group.tensors:
                z.normal_()
    cache.length = length
    cache.seen.fill_(length)


@torch.no_grad()
def measure(model, context, pattern, batch, random, flags):
    """Measured for one context, pattern and batch; random: the cache is filled at random."""
    device = flags.device
    max_len = context + flags.tokens + 2
    V = model.config.vocab_size
    if on_gpu(flags):
        torch.cuda.reset_peak_memory_stats(device)
    cache = model.new_cache(batch, max_len, pattern)
    warm_up = 0.0
    prefill = None
    if random:
        fill_at_random(cache, context)
        logits = torch.randn(batch, V, device=device)
    else:
        idx = torch.randint(V, (batch, context), device=device)
        warm_up, _ = seconds(lambda: model.prefill(idx, cache), device)
        times = []
        while sum(times) < 1 and len(times) < 3:    # a busy host may disturb a short one
            del cache                               # before its successor is made
            cache = model.new_cache(batch, max_len, pattern)
            took, logits = seconds(lambda: model.prefill(idx, cache), device)
            times.append(took)
        prefill = min(times)
    tokens = model.decode(logits, cache, temperature=0)
    warm_up += seconds(lambda: (next(tokens), next(tokens)), device)[0]
    capture, _ = seconds(lambda: next(tokens), device)
    first = cache.length
    decoding, _ = seconds(lambda: list(itertools.islice(tokens, flags.tokens)), device)
    read = cache.bytes_read(torch.arange(first, cache.length))
    moved = read + sum(z.nbytes for z in (*model.parameters(), *cache.state))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu(flags) else None
    return Measured(batch, prefill, decoding / flags.tokens, cache.nbytes, read, moved, peak,
                    warm_up, capture)


def measure_fitting(model, context, pattern, random, flags):
    """`measure` of one sequence, or if `random` of the largest batch. None if memory runs out."""
    batch = 1
    if random:
        batch = fit_batch(model, context + flags.tokens + 2, pattern, flags)
    while batch:
        try:
            return measure(model, context, pattern, batch, random, flags)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            batch = batch * 15 // 16                # the estimate does not count every scrap
        finally:
            gc.collect()
            if on_gpu(flags):
                torch.cuda.empty_cache()


HEAD = """
{tokens} tokens are decoded greedily. prefill 'random': the cache is filled at random instead.
read: of the cache, per step. GB/s: that, the weights and the states written.
No other figure holds the warm-up or the capture of the CUDA graph.

| context | pattern | batch | prefill ms | ms per step | tok/s | of dense | cache MB | read MB \
| peak MB | GB/s | of copy | warm-up s | capture ms |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def cells(found, dense, copy):
    """The row's cells from `batch` on. dense: tok/s of D1, or None. copy: bytes/s of a copy."""
    speed = found.batch / found.step
    rate = found.moved / found.step
    return [found.batch, f"{1e3 * found.prefill:.1f}" if found.prefill else "random",
            f"{1e3 * found.step:.3f}", f"{speed:.0f}", f"{speed / dense:.2f}x" if dense else "-",
            f"{found.cache / 1e6:.1f}", f"{found.read / 1e6:.1f}",
            f"{found.peak / 1e6:.0f}" if found.peak else "-", f"{rate / 1e9:.1f}",
            f"{rate / copy:.0%}", f"{found.warm_up:.2f}", f"{1e3 * found.capture:.0f}"]


def bench(flags):
    """Print a Markdown table: D1 and the patterns, at batch 1 and at the largest that fits."""
    device = flags.device
    torch.manual_seed(flags.seed)
    if flags.checkpoint:
        model, _ = load_checkpoint(flags.checkpoint, device)
    else:
        with torch.device(device):
            model = RATPlus(RATConfig(vocab_size=32000, **PRESETS[flags.preset])).eval()
    texts = "D1", *(flags.pattern or ("D16", "D64", "D16W256S4"))
    patterns = dict.fromkeys(Pattern.parse(text).fit(model.config) for text in texts)
    prepare(model, flags)
    copy = copy_bandwidth(device)
    weights = sum(p.nbytes for p in model.parameters())
    print(f"{flags.checkpoint or flags.preset + ', random weights'}"
          f"{', compiled steps' * flags.compile} | a copy moves "
          f"{copy / 1e9:.0f} GB/s, reading the weights at that takes {1e3 * weights / copy:.2f} ms",
          HEAD.format(tokens=flags.tokens), sep="", flush=True)
    for context in flags.contexts:
        dense = {}                                  # tok/s of D1, which comes first
        for pattern in patterns:
            for random in (False, True):
                found = measure_fitting(model, context, pattern, random, flags)
                if found is None:
                    print(f"| {context} | {pattern} | 1 | out of memory |" + " |" * 10, flush=True)
                    continue
                if str(pattern) == "D1":
                    dense[random] = found.batch / found.step
                row = [context, pattern, *cells(found, dense.get(random), copy)]
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main(argv=None):
    parser = sample_flags()
    given = vars(parser.parse_args(argv))
    refuse_idle(given)
    flags = merge(parser.defaults, given)
    resolve_device(flags)
    resolve_compile(flags, False)
    if flags.bench:
        bench(flags)
    else:
        write(flags)


if __name__ == "__main__":
    run(main)
