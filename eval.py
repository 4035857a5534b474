"""
What sparsity costs and saves, a row a pattern, as a Markdown table and a Mermaid chart; or, with --niah, what it still finds.

  loss(P)  = mean cross-entropy over validation windows under P, of the dense weights ("switched") or those adapted to P
  keys(P)  = mean over positions, layers and heads of the number of keys that equation (4) allows
  cache(P) = bytes of the decoding cache after one window, counted on its tensors, per token of the window
  read(P)  = bytes of it that a step of decoding reads, mean over the positions of a window; top-k blocks hold all, read few
  reach    = half-life of the recurrence in tokens, ln 2 / -ln a = ln 2 / softplus(-g), on validation text
  niah(P)  = of the values that a task of retrieval asks for, the share found in the greedy continuation under P, in %

`python eval.py` reads out/dense.pt and the adapted checkpoints beside it; `python eval.py --compare out out/attention`
puts several runs side by side. `--reach` asks what the recurrence of the dense weights is doing, by layer and head: at a
constant decay a, half of what k~ and v~ hold has been replaced after that many tokens (the paper wants about 64). `--niah`
wants models that know the form of its prompts: `python train.py --checkpoint out/dense.pt --data niah --out out/niah`, the same
from out/D16.pt, then `python eval.py --niah --out out/niah`. Flags that are not given take what each run's training used.
"""
import glob
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import Pattern, load_checkpoint
from train import (RANK, WORLD, DataFlags, Tokenizer, autocast, evaluate, fingerprint, flag, header, load_data, move, of_run,
                   parse_flags, run, summed)


@dataclass
class EvalConfig(DataFlags):
    checkpoint: str | None = flag(None, "a checkpoint to evaluate by itself")
    pattern: list = flag((), "the patterns; default: dense and all that were adapted", nargs="+")
    compare: list = flag((), "the --out folders of several runs", nargs="+")
    reach: bool = flag(False, "also the half-life of the decays, by layer and head")
    niah: bool = flag(False, "retrieval instead of the loss: a table, and each cell appended to niah.jsonl in --out")
    samples: int = flag(64, "of --niah, for each task")


def adapted_checkpoints(dense, parents, device):
    """{pattern: model} of the checkpoints beside `dense` that were adapted from it (of a fingerprint in `parents`)."""
    found, beside = {}, set(glob.glob(os.path.join(glob.escape(os.path.dirname(dense)), "*.pt")))
    for path in sorted(beside - {dense}):
        model, meta = load_checkpoint(path, device)
        if meta.get("parent") in parents:
            found[meta["pattern"]] = model
        elif "parent" in meta:
            print(f"{path} was adapted from other weights than {dense}: left out")
    return found


def reach(model, tokens, config):
    """A Markdown table of half-lives on validation windows: median (10th to 90th percentile) over channels and positions.

    Each head's are counted in a histogram of log2, fine to 3 %, so that any number of windows fits.
    """
    H, low, high, bins = model.config.n_head, -16, 32, 1024
    counts = torch.zeros(model.config.n_layer, H, bins)

    def count(layer, in_proj_output):
        g = in_proj_output[..., -model.config.n_embd:].float().unflatten(-1, (H, -1))           # (B, T, H, Dh)
        octaves = (math.log(2) / F.softplus(-g)).log2().clamp(low, high)
        counts[layer] += torch.stack([torch.histc(head, bins, low, high) for head in octaves.unbind(2)]).cpu()

    hooks = [block.mix.in_proj.register_forward_hook(lambda module, inputs, output, i=i: count(i, output))
             for i, block in enumerate(model.blocks)]
    evaluate(model, tokens, "D1", config)
    for hook in hooks:
        hook.remove()
    counts = summed(counts)

    def cell(histogram):
        share, edges = histogram.cumsum(0) / histogram.sum(), torch.tensor([0.1, 0.5, 0.9])
        tenth, median, ninetieth = (2 ** (low + (high - low) * (torch.searchsorted(share, edges) + 0.5) / bins)).tolist()
        return f"{median:.1f} ({tenth:.1f} to {ninetieth:.1f})"

    lines = [["layer", *(f"head {i}" for i in range(H)), "all"], ["---"] * (H + 2)]
    for i, layer in enumerate(counts):
        lines.append([str(i), *map(cell, layer), cell(layer.sum(0))])
    lines.append(["all", *map(cell, counts.sum(0)), cell(counts.sum((0, 1)))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def open_run(dense, given):
    """One run: (its name, config, validation data, dense model, [(pattern, weights, model to run under it)], dense first)."""
    model, meta = load_checkpoint(dense, EvalConfig(**given).device)
    config = of_run(EvalConfig, dense, meta, given)
    _, val, _ = load_data(config, model.config.vocab_size)
    header(model, config)
    parents = fingerprint(model), meta.get("parent", "")           # after fine-tuning all share the parent that they had before
    adapted, versions = {} if config.checkpoint else adapted_checkpoints(dense, parents, config.device), []
    for parsed in dict.fromkeys(Pattern.parse(text, config.score) for text in ("D1", *(config.pattern or adapted))):
        pattern = str(parsed.fit(model.config))
        own = "dense" if pattern == "D1" else "adapted" if pattern == meta["pattern"] else "switched"
        weights = {own: model, **({"adapted": adapted[pattern]} if pattern in adapted else {})}
        versions += [(parsed, label, version) for label, version in weights.items()]
    arl = meta.get("train", {}).get("arl") not in ("none", "D1")   # two dense updates are no ARL
    kind = "attention-only" if not model.config.recurrence else "RAT+" if arl else "RAT+ without ARL"
    return f"{kind} ({dense if config.checkpoint else os.path.dirname(dense)})", config, val, model, versions


def measure(dense, given):
    """One run: (its name, {(pattern, weights): loss}, {pattern: (keys, cache bytes, bytes read)}, reach)."""
    name, config, val, model, versions = open_run(dense, given)
    losses, costs, T = {}, {}, config.context
    for parsed, label, version in versions:
        if (pattern := str(parsed)) not in costs:
            with autocast(config):                                 # the cache has the compute dtype
                cache = model.new_cache(1, T, parsed, device="meta")
            costs[pattern] = parsed.keys_per_token(model.config, T), cache.nbytes / T, cache.read(torch.arange(T))
        losses[pattern, label] = evaluate(version, val, parsed, config)
        print(f"{pattern} {label}: loss {losses[pattern, label]:.4f}", flush=True)
    return name, losses, costs, reach(model, val, config) if config.reach and model.config.recurrence else ""


def share_found(text, values):
    """Of the values, the share that the text holds, in upper or lower case."""
    return sum(value.lower() in text.lower() for value in values) / len(values)


def retrieve(model, needles, task, pattern, config):
    """Mean share of the values of a task's samples, in %, that the greedy continuation holds. Both together fill the context."""
    total = torch.zeros(1, dtype=torch.float64)
    for first in range(0, config.samples, config.eval_batch)[RANK::WORLD]:
        numbers = range(first, min(first + config.eval_batch, config.samples))
        tokens, known, values = zip(*(needles.sample(number, config.context, task) for number in numbers))
        n_new = int(known[0].sum())                                # the same for all samples of a task
        idx = move(torch.from_numpy(np.stack(tokens)[:, :-n_new]), config)
        new = model.generate(idx, n_new, pattern, temperature=0)[:, -n_new:].tolist()
        texts = ("".join(map(Tokenizer(config.tokenizer).decode, tokens)) for tokens in new)
        total += sum(map(share_found, texts, values))
    return 100 * summed(total).item() / config.samples


def retrieval(checkpoints, given):
    """Print a Markdown table, a row as soon as it is known, and append its cells to niah.jsonl in --out."""
    runs = [open_run(dense, {**given, "data": "niah"}) for dense in checkpoints]
    tasks = list(dict.fromkeys(task for _, config, *_ in runs for task in config.tasks))
    print("\n| model | pattern | weights | " + " | ".join(tasks) + " | average |\n" + "|---" * (len(tasks) + 4) + "|", flush=True)
    for name, config, needles, _, versions in runs:
        os.makedirs(config.out, exist_ok=True)
        for pattern, label, model in versions:
            model.to(getattr(torch, config.dtype))
            scores = {task: retrieve(model, needles, task, pattern, config) for task in config.tasks}
            with open(os.path.join(config.out, "niah.jsonl") if RANK == 0 else os.devnull, "a") as log:
                for task, score in scores.items():
                    cell = dict(model=name, pattern=str(pattern), weights=label, task=task, score=score, samples=config.samples,
                                context=config.context, tokenizer=config.tokenizer, block_score=config.score, seed=config.seed)
                    log.write(json.dumps(cell) + "\n")
            cells = [f"{scores[task]:.1f}" if task in scores else "–" for task in tasks]
            cells = name, str(pattern), label, *cells, f"{sum(scores.values()) / len(scores):.1f}"
            print("| " + " | ".join(cells) + " |", flush=True)


def table(runs):
    """The Markdown table of several `measure`s.

    gap: to the run's own dense loss. Keys and bytes: of the first run that has the pattern; those of a run without
    recurrence are smaller by the recurrent state.
    """
    lines = [["pattern", "weights", "keys per token", "cache bytes per token", "bytes read per token"]]
    for name, *_ in runs:
        lines[0] += [f"{name}: loss", "gap", "perplexity"]
    lines.append(["---"] * len(lines[0]))
    costs = {pattern: cost for _, _, costs, _ in runs[::-1] for pattern, cost in costs.items()}
    for pattern, label in dict.fromkeys(key for _, losses, *_ in runs for key in losses):
        keys, *sizes = costs[pattern]
        lines.append([pattern, label, f"{keys:.1f}"])
        lines[-1] += [f"{size:.0f} ({size / dense:.1%})" for size, dense in zip(sizes, costs["D1"][1:])]
        for _, losses, *_ in runs:
            if loss := losses.get((pattern, label)):
                lines[-1] += [f"{loss:.3f}", f"{loss - losses['D1', 'dense']:+.3f}", f"{math.exp(loss):.2f}"]
            else:
                lines[-1] += ["–"] * 3
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def chart(runs):
    """A Mermaid chart: a line per run, over the patterns that all have; adapted weights where there are any."""
    def best(losses, pattern):
        return next(losses[pattern, label] for label in ("adapted", "dense", "switched") if (pattern, label) in losses)

    patterns = [pattern for pattern in runs[0][2] if all(pattern in costs for _, _, costs, _ in runs)]
    lines = [[best(losses, pattern) for pattern in patterns] for _, losses, *_ in runs]
    low, high = min(map(min, lines)) - 0.1, max(map(max, lines)) + 0.1
    return "\n".join(["```mermaid", "xychart-beta", f'    title "validation loss: {", ".join(name for name, *_ in runs)}"',
                      "    x-axis [" + ", ".join(f'"{pattern}"' for pattern in patterns) + "]",
                      f'    y-axis "nats per token" {low:.1f} --> {high:.1f}',
                      *("    line [" + ", ".join(f"{loss:.3f}" for loss in line) + "]" for line in lines), "```"])


def main():
    given = parse_flags(EvalConfig, __doc__)
    config = EvalConfig(**given)
    folders = config.compare or [config.out]
    checkpoints = [config.checkpoint] if config.checkpoint else [os.path.join(folder, "dense.pt") for folder in folders]
    if config.niah:
        return retrieval(checkpoints, given)
    runs = [measure(dense, given) for dense in checkpoints]
    print("", table(runs), "", chart(runs), sep="\n")
    for name, _, _, half_lives in runs:
        if half_lives:
            print(f"\n{name}: half-life of the decay in tokens, median (10th to 90th percentile)\n", half_lives, sep="\n")


if __name__ == "__main__":
    run(main)
