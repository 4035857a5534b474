"""
Sparse inference: a prompt in, text out as it is generated, dense or under any pattern; or, with --bench, what it costs.

Prefill runs the prompt in parallel and fills the cache; each step then adds one token to it. With dilation D the cache
holds every D-th position only, so its bytes and the keys read per token fall D times. A step has to read, at the least,

  bytes = weights, once for the whole batch  +  batch * L * (keys * 2 * C * 2 in bf16, and the recurrent state)

so one sequence is bound by the weights and gains little, while a large batch is bound by the cache, and a small cache makes
room for a large batch: that is where the speed is. The keys are all that is held; with top-k blocks, which hold every position,
they are those of the chosen blocks, and the blocks' summaries come on top.

`python sample.py --pattern D16 --prompt "def "` takes out/D16.pt if there is one, else out/dense.pt with a warning.
`python sample.py --bench --preset paper-1.5b --contexts 4096 16384` prints a Markdown table, dense first.
"""
import gc
import os
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from model import PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint
from train import Common, Tokenizer, file_of, flag, header, out_of_memory, parse_flags, run


@dataclass
class SampleConfig(Common):
    checkpoint: str | None = flag(None, "default: the pattern's in --out, else dense.pt there; with --bench: random weights")
    pattern: list[str] = flag((), "the pattern to decode with, default: D1; with --bench any number, beside D1", nargs="+")
    prompt: str | None = flag(None, "text, or token ids where the checkpoint has no tokenizer of ours")
    tokens: int = flag(200, "how many to generate")
    temperature: float = flag(0.8, "0: always the likeliest token")
    top_k: int | None = flag(None, "draw among the k likeliest")
    top_p: float | None = flag(None, "draw among the fewest that reach this probability")
    max_len: int | None = flag(None, "tokens that the cache can take; default: prompt + tokens")
    tokenizer: str | None = flag(None, "default: the checkpoint's", choices=("bytes", "gpt2", "ids"))
    bench: bool = flag(False, "time prefill and greedy decoding instead of writing text")
    preset: str = flag("laptop", "of --bench without --checkpoint: the shape", choices=(*PRESETS,))
    contexts: list[int] = flag((), "of --bench: tokens in the cache before decoding starts, default: 4096", nargs="+")
    max_batch: int | None = flag(None, "of --bench: the largest batch tried; default: 8 on a CPU, 8192 on a GPU")


def sample(config):
    if len(config.pattern) > 1:
        raise ValueError(f"--pattern {' '.join(config.pattern)}: several patterns are for --bench, text takes one")
    pattern = Pattern.parse(config.pattern[0] if config.pattern else "D1", config.score)
    path = config.checkpoint or file_of(pattern, config.out)
    if not config.checkpoint and not os.path.exists(path):
        path = os.path.join(config.out, "dense.pt")
    model, meta = load_checkpoint(path, config.device)
    pattern.fit(model.config)
    model.to(getattr(torch, config.dtype))
    header(model, config)
    if meta["pattern"] != str(pattern):
        print(f"warning: {path} was trained for {meta['pattern']}, not for {pattern}; see adapt.py", file=sys.stderr)
    coder = Tokenizer(config.tokenizer or meta["tokenizer"])
    prompt = ("1" if coder.name == "ids" else "def ") if config.prompt is None else config.prompt
    idx = torch.tensor([list(coder.encode(prompt))], dtype=torch.long, device=config.device)
    if idx.numel() == 0 or idx.max() >= model.config.vocab_size:
        raise ValueError(f"--prompt {prompt[:40]!r}: at least one token is needed, each below {model.config.vocab_size}")
    max_len, sampling = config.max_len or idx.shape[1] + config.tokens, (config.temperature, config.top_k, config.top_p)
    start = time.perf_counter()
    list(model.stream(idx, min(3, config.tokens), model.new_cache(1, max_len, pattern), *sampling))
    print(f"{path} with {pattern}, warmed up in {1e3 * (time.perf_counter() - start):.0f} ms\n")
    print(prompt, end=" " * (coder.name == "ids"), flush=True)

    cache, start, stamps = model.new_cache(1, max_len, pattern), time.perf_counter(), []
    torch.manual_seed(config.seed)
    for token in model.stream(idx, config.tokens, cache, *sampling):
        token = token.item()
        stamps.append(time.perf_counter())
        print(coder.decode(token), end="", flush=True)
        if token == coder.eot:
            break
    first = 2 if len(stamps) > 3 else 0                           # the graph is recorded for the third token
    speed = (len(stamps) - 1 - first) / max(stamps[-1] - stamps[first], 1e-9)
    dense = model.new_cache(1, max_len, "D1", device="meta").nbytes
    print(f"\n\nprefill {idx.shape[1]} tokens {1e3 * (stamps[0] - start):.1f} ms | decode {speed:.1f} tok/s | "
          f"cache {cache.nbytes / 1e6:.3f} MB, dense {dense / 1e6:.3f} MB ({cache.nbytes / dense:.1%})")


# ---------------------------------------------------------------------------------------------
# What it costs

def seconds(call, device):
    """(seconds that `call` takes, device work included, and what it returns)."""
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    sync()
    start = time.perf_counter()
    result = call()
    sync()
    return time.perf_counter() - start, result


def copy_bandwidth(device):
    """Bytes per second, read and written, of a large copy on this device: what a step can hope for. The best of 10."""
    x = torch.zeros(2**30 if device.startswith("cuda") else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * len(x) / min(seconds(lambda: y.copy_(x), device)[0] for _ in range(10))


def free_memory(device):
    """Bytes that can be allocated now."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fit_batch(model, max_len, pattern, config):
    """The largest batch whose caches, as computed, and a step's activations fit into the free memory, up to max_batch."""
    V, C = model.config.vocab_size, model.config.n_embd
    step = 2 * (4 * V + 64 * C)                                   # bytes of a sequence's activations, eager and in the graph
    each = model.new_cache(1, max_len, pattern, device="meta").nbytes + step
    most = config.max_batch or (8192 if config.device.startswith("cuda") else 8)
    return int(max(1, min(most, (free_memory(config.device) - 2**30) // each)))


@torch.no_grad()
def measure(model, context, pattern, batch, random, config):
    """A row of the table, in seconds and bytes: the second of two prefills, or a cache filled at random; then greedy decoding."""
    device, max_len, cuda = config.device, context + config.tokens + 2, config.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    cache, warm_up, prefill = model.new_cache(batch, max_len, pattern), 0.0, None
    if random:
        for group in (group for groups in cache.groups for group in groups):
            for z in group.tensors:
                z.normal_()
        cache.length, logits = context, torch.randn(batch, model.config.vocab_size, device=device)
        cache.seen.fill_(context)
    else:
        idx = torch.randint(model.config.vocab_size, (batch, context), device=device)
        warm_up, _ = seconds(lambda: model.prefill(idx, cache), device)
        del cache                                                  # before its successor is made
        cache = model.new_cache(batch, max_len, pattern)
        prefill, logits = seconds(lambda: model.prefill(idx, cache), device)
    tokens = model.decode(logits, cache, temperature=0)
    warm_up += seconds(lambda: (next(tokens), next(tokens)), device)[0]
    capture, _ = seconds(lambda: next(tokens), device)             # with the first replay; without a GPU just a step
    first = cache.length
    step = seconds(lambda: [next(tokens) for _ in range(config.tokens)], device)[0] / config.tokens
    read, peak = cache.read(torch.arange(first, cache.length)), torch.cuda.max_memory_allocated(device) if cuda else None
    moved = read + sum(z.nbytes for z in (*model.parameters(), *cache.state))                      # the states are written too
    return SimpleNamespace(batch=batch, prefill=prefill, step=step, cache=cache.nbytes, read=read, rate=moved / step, peak=peak,
                           warm_up=warm_up, capture=capture)


def measure_fitting(model, context, pattern, batch, random, config):
    """`measure` at `batch`, a little less while memory runs out (no computed size counts scraps). None if 1 is too many."""
    while batch:
        try:
            return measure(model, context, pattern, batch, random, config)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            batch = batch * 15 // 16
        finally:
            gc.collect()
            if config.device.startswith("cuda"):
                torch.cuda.empty_cache()


def bench(config):
    device, contexts = config.device, config.contexts or [4096]
    if min(contexts) < 1:
        raise ValueError(f"--contexts {min(contexts)}: at least one token is needed")
    if config.checkpoint:
        model = load_checkpoint(config.checkpoint, device)[0]
    else:
        with torch.device(device):
            model = RATPlus(RATConfig(vocab_size=32000, **PRESETS[config.preset])).eval()
    model.to(getattr(torch, config.dtype))
    texts = "D1", *(config.pattern or ("D16", "D64", "D16W256S4"))
    patterns = dict.fromkeys(Pattern.parse(text, config.score).fit(model.config) for text in texts)
    header(model, config)
    copy, weights = copy_bandwidth(device), sum(p.nbytes for p in model.parameters())
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    print(f"{config.checkpoint or config.preset + ', random weights'} | {gpu} | a copy moves {copy / 1e9:.0f} GB/s, reading the "
          f"weights at that takes {1e3 * weights / copy:.2f} ms\n{config.tokens} tokens are decoded greedily; prefill 'random': "
          "the cache is filled with random values instead\nread: of the cache, per step; GB/s: that, the weights and the states "
          "written; warm-up and capture of the CUDA graph are in no other figure\n\n"
          "| context | pattern | batch | prefill ms | ms per step | tok/s | of dense | cache MB | read MB | peak MB | GB/s "
          "| of copy | warm-up s | capture ms |\n" + "|---" * 14 + "|", flush=True)
    for context in contexts:
        dense = {}                                                 # tok/s of D1, the first pattern: at batch 1 and at the largest
        for pattern in patterns:
            for random in (False, True):
                batch = fit_batch(model, context + config.tokens + 2, pattern, config) if random else 1
                found = measure_fitting(model, context, pattern, batch, random, config)
                if not found:
                    print(f"| {context} | {pattern} | 1 | out of memory |" + " |" * 10, flush=True)
                    continue
                speed = found.batch / found.step
                if str(pattern) == "D1":
                    dense[random] = speed
                cells = (context, pattern, found.batch, "random" if random else f"{1e3 * found.prefill:.1f}",
                         f"{1e3 * found.step:.3f}", f"{speed:.0f}", f"{speed / dense[random]:.2f}x" if random in dense else "-",
                         f"{found.cache / 1e6:.1f}", f"{found.read / 1e6:.1f}", f"{found.peak / 1e6:.0f}" if found.peak else "-",
                         f"{found.rate / 1e9:.1f}", f"{found.rate / copy:.0%}", f"{found.warm_up:.2f}",
                         f"{1e3 * found.capture:.0f}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    config = SampleConfig(**parse_flags(SampleConfig, __doc__))
    bench(config) if config.bench else sample(config)


if __name__ == "__main__":
    run(main)
