"""
Sparse inference: a prompt in, text out, dense or under any pattern. Or, with --bench, its cost.

The prompt fills the cache, then each step appends one token. A step moves at least these bytes:

  weights, once for the whole batch  +  batch * (keys, values and states of the cache)

One sequence is bound by the weights and gains little. A large batch is bound by the cache, and a
small cache makes room for a large batch: that is where the speed comes from.

`python sample.py --pattern D16 --prompt "def "` takes out/D16.pt if there is one, else out/dense.pt
with a warning. `python sample.py --bench --preset paper-1.5b --contexts 4096 16384` prints a table.
"""
import argparse
import gc
import math
import os
import time
from itertools import islice, product

import torch

from model import PRESETS, Cache, Pattern, RATConfig, RATPlus, load_checkpoint, require
from train import (Tokenizer, bytes_read, check, file_of, fingerprint, header, made_from,
                   new_parser, note, on_gpu, out_of_memory, pattern_flag, run)


def find_weights(flags):
    """(path, model) of --checkpoint, else of the pattern's own file, else of dense.pt."""
    pattern = flags.pattern[0]
    dense = file_of("D1", flags.out)
    own = file_of(pattern, flags.out)
    path = flags.checkpoint or (own if os.path.exists(own) else dense)
    model, meta = load_checkpoint(path, flags.device)
    if path not in (flags.checkpoint, dense) and os.path.exists(dense):
        parent, about = load_checkpoint(dense)
        right = meta.get("parent") is None or made_from(meta, fingerprint(parent), about)
        require(right, f"{path} was adapted from other weights than {dense} holds now: run "
                "adapt.py again")
    if meta["pattern"] != pattern and not flags.bench:
        note(f"warning: {path} was trained for {meta['pattern']}, not for {pattern}; see adapt.py")
    flags.tokenizer = flags.tokenizer or meta["tokenizer"]
    return path, model


# ---- Text ----------------------------------------------------------------------------------------

def write(path, model, flags):
    """Print a text as it is generated, then what it cost."""
    coder = Tokenizer(flags.tokenizer, flags.eot)
    ids = list(map(int, coder.encode(flags.prompt)))
    V = model.config.vocab_size
    require(ids and max(ids) < V, f"--prompt: at least one token is needed, each below {V}")
    idx = torch.tensor([ids], device=flags.device)
    max_len = max(flags.max_len or 0, len(ids) + flags.tokens - 1)     # the last is not appended
    pattern = flags.pattern[0]
    sampling = flags.temperature, flags.top_k, flags.top_p
    cache = model.new_cache(1, max_len, pattern)
    list(model.stream(idx, min(3, flags.tokens), cache, *sampling))     # compiles kernels
    cache = model.new_cache(1, max_len, pattern)
    print(f"{path} with {pattern}\n\n{flags.prompt}", end=" " * (coder.name == "ids"))
    torch.manual_seed(flags.seed)
    stamps = [time.perf_counter()]                      # the start, and when each token was there
    for token in map(int, model.stream(idx, flags.tokens, cache, *sampling)):
        stamps.append(time.perf_counter())
        print(coder.decode(token), end="", flush=True)
        if token == coder.eot:
            break
    prefill = stamps[1] - stamps[0]
    decoded = stamps[3 if len(stamps) > 4 else 1:]      # a GPU captures its graph for token 3
    spent = max(decoded[-1] - decoded[0], 1e-9)
    speed = (len(decoded) - 1) / spent
    nowhere = torch.empty(0, device="meta")             # a dense cache may not fit the memory
    dense = Cache(model.config, 1, max_len, Pattern.parse("D1"), cache.dtype, nowhere).nbytes
    print(f"\n\nprefill {len(ids)} tokens {1e3 * prefill:.1f} ms | decode {speed:.1f} tok/s | "
          f"cache {cache.nbytes / 1e6:.3f} MB, dense {dense / 1e6:.3f} MB "
          f"({cache.nbytes / dense:.1%})")


# ---- Bench ---------------------------------------------------------------------------------------

def bench(name, model, flags):
    """Print a Markdown table: D1, the patterns, each with one sequence and the largest batch."""
    copy = copy_bandwidth(flags)
    print(f"{name}: {flags.tokens} tokens decoded greedily; a copy moves {copy / 1e9:.0f} GB/s\n\n"
          "| context | pattern | batch | prefill ms | ms per step | tok/s | of dense | cache MB "
          "| read MB | of copy |\n" + "|---" * 10 + "|")
    dense = {}                                          # tok/s of D1, which comes first
    patterns = dict.fromkeys(["D1", *flags.pattern])
    for context, pattern, kind in product(flags.contexts, patterns, ("one", "largest")):
        batch = 1 if kind == "one" else batch and largest_batch(cache, flags)     # 0: none fits
        found = measure_fitting(model, context, pattern, batch, flags)
        batch, prefill, step, cache, read, moved = found
        speed = batch / step
        ratio = speed / dense.setdefault((context, kind), speed)
        print(f"| {context} | {pattern} | {batch} | {1e3 * prefill:.1f} | {1e3 * step:.3f} | "
              f"{speed:.0f} | {ratio:.2f}x | {cache / 1e6:.1f} | {read / 1e6:.1f} | "
              f"{moved / step / copy:.0%} |", flush=True)


def seconds(call, flags):
    """How long call() takes, the device's work included."""
    sync = torch.cuda.synchronize if on_gpu(flags) else lambda: None
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def copy_bandwidth(flags):
    """Bytes per second, read and written, of a large copy: the most that a step can hope for."""
    x = torch.zeros(2**28 if on_gpu(flags) else 2**24, device=flags.device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(seconds(lambda: y.copy_(x), flags) for _ in range(10))


def largest_batch(cache, flags):
    """How many caches of so many bytes fill 9/10 of the free memory. A CPU counts as 4 GB."""
    free = torch.cuda.mem_get_info()[0] if on_gpu(flags) else 4e9
    most = flags.max_batch or (8192 if on_gpu(flags) else 8)
    return int(max(1, min(most, 0.9 * free // cache)))


def measure_fitting(model, context, pattern, batch, flags):
    """`measure` of `batch`, cut by a sixteenth until memory lasts; of 0 sequences, nan."""
    while batch:
        try:
            return measure(model, context, pattern, batch, flags)
        except Exception as error:
            if not out_of_memory(error):
                raise
            batch = batch * 15 // 16
        finally:
            gc.collect()
            torch.cuda.empty_cache()                    # does nothing on a CPU
    return 0, *[math.nan] * 5


def measure(model, context, pattern, batch, flags):
    """batch; seconds of a prefill (nan of several sequences) and of a step; bytes of the cache, of
    it read by a step, and moved by a step: read, weights, and states, which it writes too.
    """
    cache = model.new_cache(batch, context + flags.tokens + 3, pattern)
    idx = torch.randint(model.config.vocab_size, (1, context), device=flags.device)
    prefills = []
    for _ in range(3 if batch == 1 else 0):             # the first compiles
        cache.length = 0
        cache.seen.zero_()
        prefills.append(seconds(lambda: model.prefill(idx, cache), flags))
    for layer in cache.layers:                          # as if all sequences had been read
        for group in layer.groups:
            for z in group.tensors:
                z.normal_()
    cache.length = context
    cache.seen.fill_(context)
    steps = model.stream(idx.new_zeros(batch, 1), flags.tokens + 3, cache, temperature=0)
    list(islice(steps, 3))                              # a GPU captures its graph for the third
    step = seconds(lambda: list(steps), flags) / flags.tokens
    read = bytes_read(cache, torch.tensor([context + 3 + flags.tokens // 2]))
    written = sum(layer.state.nbytes for layer in cache.layers)
    moved = read + written + sum(p.nbytes for p in model.parameters())
    return batch, min(prefills, default=math.nan), step, cache.nbytes, read, moved


def main(argv=None):
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--checkpoint", help="default: PATTERN.pt in --out, else dense.pt; --bench: none")
    flag("--pattern", nargs="+", type=pattern_flag, help="default: D1; of --bench, several")
    flag("--prompt", default="def ", help="text, or ids if the checkpoint has no tokenizer of ours")
    flag("--tokens", type=int, default=200, help="how many to generate; default: 200")
    flag("--temperature", type=float, default=0.8, help="0: the likeliest token; default: 0.8")
    flag("--top-k", type=int, help="draw among the k likeliest tokens")
    flag("--top-p", type=float, help="draw among the fewest tokens that reach this probability")
    flag("--max-len", type=int, help="room of the cache, if it is more than needed")
    flag("--tokenizer", choices=("bytes", "gpt2", "ids"), help="default: the checkpoint's")
    flag("--eot", type=int, help="end-of-text token of ids; default: none")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False,
         help="torch.compile a GPU's steps: faster, after half a minute")
    flag("--bench", action="store_true", help="time greedy decoding instead of writing text")
    flag("--preset", choices=[*PRESETS], default="laptop", help="of --bench without --checkpoint")
    flag("--contexts", nargs="+", type=int, default=[4096], help="of --bench: tokens in the cache")
    flag("--max-batch", type=int, help="of --bench; default: 8 on a CPU, 8192 on a GPU")
    flags = parser.parse_args(argv)
    flags.pattern = flags.pattern or (["D16", "D64", "D16W256S4"] if flags.bench else ["D1"])
    check(flags)
    require(min(flags.contexts) >= 1, "--contexts: at least 1 is needed")
    require(flags.bench or len(flags.pattern) == 1, "--pattern: several are for --bench")
    require(on_gpu(flags) or not flags.compile, "--compile is for the steps of a GPU")
    torch.manual_seed(flags.seed)
    if flags.bench and not flags.checkpoint:
        name = f"{flags.preset}, random weights"
        with torch.device(flags.device):
            model = RATPlus(RATConfig(vocab_size=32000, **PRESETS[flags.preset]))
    else:
        name, model = find_weights(flags)
    model.to(getattr(torch, flags.dtype))
    if flags.compile:
        torch._dynamo.config.recompile_limit = 64       # one graph for each size of batch
        model.compile(dynamic=False, options={
            "coordinate_descent_tuning": True,          # at batch 1, Triton multiplies by weights
            "triton.enable_pdl": torch.cuda.get_device_capability() >= (9, 0)})
    header(model, flags)
    (bench if flags.bench else write)(name, model, flags)


if __name__ == "__main__":
    run(main)
