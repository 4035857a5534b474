"""
Sparse inference: a prompt in, text out as it is generated, dense or under any pattern.

Prefill runs the prompt in parallel and fills the cache; each step then adds one token to it. With dilation D the cache
holds every D-th position only, so its bytes and the keys read per token fall D times.

`python sample.py --pattern D16 --prompt "def "` takes out/D16.pt if there is one, else out/dense.pt with a warning.
"""
import os
import sys
import time
from dataclasses import dataclass

import torch

from model import Pattern, load_checkpoint
from train import Common, Tokenizer, file_of, flag, header, parse_flags, run


@dataclass
class SampleConfig(Common):
    checkpoint: str | None = flag(None, "default: the pattern's in --out, else dense.pt there")
    pattern: str = flag("D1", "the pattern to decode with")
    prompt: str | None = flag(None, "text, or token ids where the checkpoint has no tokenizer of ours")
    tokens: int = flag(200, "how many to generate")
    temperature: float = flag(0.8, "0: always the likeliest token")
    top_k: int | None = flag(None, "draw among the k likeliest")
    top_p: float | None = flag(None, "draw among the fewest that reach this probability")
    max_len: int | None = flag(None, "tokens that the cache can take; default: prompt + tokens")
    tokenizer: str | None = flag(None, "default: the checkpoint's", choices=("bytes", "gpt2", "ids"))


def main():
    config = SampleConfig(**parse_flags(SampleConfig, __doc__))
    pattern = Pattern.parse(config.pattern)
    path = config.checkpoint or file_of(pattern, config.out)
    if not config.checkpoint and not os.path.exists(path):
        path = os.path.join(config.out, "dense.pt")
    model, meta = load_checkpoint(path, config.device)
    pattern.fit(model.config)
    model.to(getattr(torch, config.dtype))
    header(model, config)
    if meta["pattern"] != str(pattern):
        print(f"warning: {path} was not adapted to {pattern}, but to {meta['pattern']}; see adapt.py", file=sys.stderr)
    coder = Tokenizer(config.tokenizer or meta["tokenizer"])
    prompt = ("1" if coder.name == "ids" else "def ") if config.prompt is None else config.prompt
    idx = torch.tensor([list(coder.encode(prompt))], dtype=torch.long, device=config.device)
    if idx.numel() == 0 or idx.max() >= model.config.vocab_size:
        raise ValueError(f"--prompt {prompt[:40]!r}: at least one token is needed, each below {model.config.vocab_size}")
    cache = model.new_cache(1, config.max_len or idx.shape[1] + config.tokens, pattern)
    start = time.perf_counter()
    model.generate(idx[:, :1], 2, pattern)
    print(f"{path} with {pattern}, warmed up in {1e3 * (time.perf_counter() - start):.0f} ms\n")
    print(prompt, end=" " * (coder.name == "ids"), flush=True)

    start, prefilled, n = time.perf_counter(), None, 0
    torch.manual_seed(config.seed)
    for token in model.stream(idx, config.tokens, cache, config.temperature, config.top_k, config.top_p, coder.eot):
        token = token.item()
        prefilled, n = prefilled or time.perf_counter(), n + 1
        print(coder.decode(token), end="", flush=True)
    decoding = time.perf_counter() - prefilled
    dense = model.new_cache(1, cache.max_len, "D1", device="meta").nbytes
    print(f"\n\nprefill {idx.shape[1]} tokens {1e3 * (prefilled - start):.1f} ms | decode {(n - 1) / max(decoding, 1e-9):.1f} "
          f"tok/s | cache {cache.nbytes / 1e6:.3f} MB, dense {dense / 1e6:.3f} MB ({cache.nbytes / dense:.1%})")


if __name__ == "__main__":
    run(main)
