"""
Sparse inference: a prompt in, text out, dense or under any pattern. Or, with --bench, its cost.

The prompt fills the cache, then each step appends one token. A step moves at least these bytes:

  weights, once for the whole batch  +  batch * (keys, values and states of the cache)

One sequence is bound by the weights and gains little. A large batch is bound by the cache, and a
small cache makes room for a large batch: that is where the speed comes from.

`python sample.py --pattern D16 --prompt "def "` takes out/D16.pt if there is one, else out/dense.pt
with a warning. `python sample.py --bench --preset small --pattern D16 D64` prints a table.
"""
import gc
import math
import os
from itertools import islice, product

import torch
from torch.utils.benchmark import timer

from model import PRESETS, Cache, Pattern, RATConfig, RATPlus, load_checkpoint, require
from train import (SWITCH, Tokenizer, bytes_read, check, file_of, fingerprint, header, made_from,
                   new_parser, note, on_gpu, out_of_memory, pattern_flag, run)


def find_weights(flags):
    """(name, model) of --checkpoint, else of the pattern's own file, else of dense.pt."""
    if flags.bench and not flags.checkpoint:
        with torch.device(flags.device):
            model = RATPlus(RATConfig(vocab_size=32000, **PRESETS[flags.preset]))
        return f"{flags.preset}, random weights", model
    pattern = flags.pattern[0]
    dense = file_of("D1", flags.out)
    own = file_of(pattern, flags.out)
    path = flags.checkpoint or (own if os.path.exists(own) else dense)
    model, meta = load_checkpoint(path, flags.device)
    if path not in (flags.checkpoint, dense) and os.path.exists(dense):
        parent, about = load_checkpoint(dense)
        require(made_from(meta, fingerprint(parent), about), f"{path} was not adapted from what "
                f"{dense} holds now: run adapt.py again, or take it by --checkpoint")
    if meta["pattern"] != pattern and not flags.bench:
        note(f"warning: {path} was trained for {meta['pattern']}, not for {pattern}; see adapt.py")
    flags.tokenizer = flags.tokenizer or meta["tokenizer"]
    return path, model


def write(path, model, flags):
    """Print a text as it is generated, then what it cost."""
    coder = Tokenizer(flags.tokenizer)
    ids = list(map(int, coder.encode(flags.prompt)))
    V = model.config.vocab_size
    require(ids and max(ids) < V, f"--prompt: at least one token is needed, each below {V}")
    idx = torch.tensor([ids], device=flags.device)
    pattern = flags.pattern[0]
    size = len(ids) + flags.tokens
    sampling = flags.temperature, flags.top_k
    cache = model.new_cache(1, size, pattern)
    list(model.stream(idx, min(3, flags.tokens), cache, *sampling))     # compiles kernels
    cache = model.new_cache(1, size, pattern)
    print(f"{path} with {pattern}\n\n{flags.prompt}", end=" " * (coder.name == "ids"))
    torch.manual_seed(flags.seed)
    stamps = [timer()]                                  # the start, and when each token was there
    for token in map(int, model.stream(idx, flags.tokens, cache, *sampling)):
        stamps.append(timer())
        print(coder.decode(token), end="", flush=True)
        if token == coder.eot:
            break
    prefill = stamps[1] - stamps[0]
    decoded = stamps[3 if len(stamps) > 4 else 1:]      # a GPU captures its graph for token 3
    spent = max(decoded[-1] - decoded[0], 1e-9)
    speed = (len(decoded) - 1) / spent
    nowhere = torch.empty(0, device="meta")             # a dense cache may not fit the memory
    dense = Cache(model.config, 1, size, Pattern.parse("D1"), cache.dtype, nowhere).nbytes
    print(f"\n\nprefill {len(ids)} tokens {1e3 * prefill:.1f} ms | decode {speed:.1f} tok/s | "
          f"cache {cache.nbytes / 1e6:.3f} MB, {cache.nbytes / dense:.1%} of dense")


def bench(name, model, flags):
    """Print a Markdown table: D1, the patterns, each with one sequence and the largest batch."""
    size = 2**28 if on_gpu(flags) else 2**24
    x = torch.zeros(2, size, device=flags.device)
    copy = x.nbytes / min(seconds(lambda: x[0].copy_(x[1])) for _ in range(10))
    del x                                               # caches need the room
    print(f"{name}: {flags.tokens} tokens decoded greedily; a copy moves {copy / 1e9:.0f} GB/s\n\n"
          "| context | pattern | batch | prefill ms | ms per step | tok/s | of dense | cache MB "
          "| read MB | of copy |\n" + "|---" * 10 + "|")
    dense = {}                                          # tok/s of D1, which comes first
    patterns = dict.fromkeys(["D1", *flags.pattern])
    for context, pattern, kind in product(flags.contexts, patterns, ("one", "largest")):
        batch = 1 if kind == "one" else batch and largest_batch(cache, flags)     # 0: none fits
        found = measure_fitting(model, context, pattern, batch, flags.tokens)
        batch, prefill, step, cache, read, moved = found
        speed = batch / step
        ratio = speed / dense.setdefault((context, kind), speed)
        print(f"| {context} | {pattern} | {batch} | {1e3 * prefill:.1f} | {1e3 * step:.3f} | "
              f"{speed:.0f} | {ratio:.2f}x | {cache / 1e6:.1f} | {read / 1e6:.1f} | "
              f"{moved / step / copy:.0%} |", flush=True)


def seconds(call):
    """How long call() takes. `timer` waits for the device."""
    start = timer()
    call()
    return timer() - start


def largest_batch(cache, flags):
    """How many caches of so many bytes fill 9/10 of a GPU's free memory. A CPU gets 8."""
    fitting = 0.9 * torch.cuda.mem_get_info()[0] // cache if on_gpu(flags) else 8
    return int(max(1, min(flags.max_batch, fitting)))


def measure_fitting(model, context, pattern, batch, tokens):
    """`measure` of `batch`, cut by a sixteenth until memory lasts; of 0 sequences, nan."""
    while batch:
        try:
            return batch, *measure(model, context, pattern, batch, tokens)
        except Exception as error:
            if not out_of_memory(error):
                raise
            batch = batch * 15 // 16
        finally:
            gc.collect()
            torch.cuda.empty_cache()                    # does nothing on a CPU
    return 0, *[math.nan] * 5


def measure(model, context, pattern, batch, tokens):
    """Seconds of a prefill (nan of several sequences) and of a step; bytes of the cache, of it read
    by a step, and moved by a step: read, weights, and states, which it writes too.
    """
    cache = model.new_cache(batch, context + tokens + 3, pattern)
    idx = torch.randint(model.config.vocab_size, (1, context), device=cache.seen.device)
    prefills = []
    for _ in range(3 if batch == 1 else 0):             # the first compiles
        cache.length = 0
        cache.seen.zero_()
        prefills.append(seconds(lambda: model.prefill(idx, cache)))
    for layer in cache.layers:                          # as if all sequences had been read
        for group in layer.groups:
            for z in group.tensors:
                z.normal_()
    cache.length = context
    cache.seen.fill_(context)
    steps = model.stream(idx.new_zeros(batch, 1), tokens + 3, cache, temperature=0)
    list(islice(steps, 3))                              # a GPU captures its graph for the third
    step = seconds(lambda: list(steps)) / tokens
    read = bytes_read(cache, torch.tensor([context + 3 + tokens // 2]))
    written = sum(layer.state.nbytes for layer in cache.layers)
    moved = read + written + sum(p.nbytes for p in model.parameters())
    return min(prefills, default=math.nan), step, cache.nbytes, read, moved


def main(argv=None):
    parser = new_parser(__doc__)
    flag = parser.add_argument
    flag("--checkpoint", help="default: PATTERN.pt in --out, else dense.pt; --bench: none")
    flag("--pattern", nargs="+", type=pattern_flag, default=["D1"], help="--bench takes several")
    flag("--prompt", default="def ", help="text, or ids if the checkpoint has no tokenizer of ours")
    flag("--tokens", type=int, default=200, help="how many to generate; default: 200")
    flag("--temperature", type=float, default=0.8, help="0: the likeliest token; default: 0.8")
    flag("--top-k", type=int, help="draw among the k likeliest tokens")
    flag("--tokenizer", choices=("bytes", "gpt2", "ids"), help="default: the checkpoint's")
    flag("--compile", action=SWITCH, default=False, help="faster on a GPU, after half a minute")
    flag("--bench", action="store_true", help="time greedy decoding instead of writing text")
    flag("--preset", choices=PRESETS, default="laptop", help="of --bench without --checkpoint")
    flag("--contexts", nargs="+", type=int, default=[4096], help="of --bench: tokens in the cache")
    flag("--max-batch", type=int, default=8192, help="of --bench; a CPU gets at most 8")
    flags = parser.parse_args(argv)
    check(flags)
    require(min(flags.contexts) > 0, "--contexts: at least 1 is needed")
    require(flags.bench or len(flags.pattern) == 1, "--pattern: several are for --bench")
    require(on_gpu(flags) or not flags.compile, "--compile is for the steps of a GPU")
    torch.manual_seed(flags.seed)
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
