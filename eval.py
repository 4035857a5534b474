"""
What sparsity costs and saves, a row a pattern, as a Markdown table and a Mermaid chart.

  loss(P)  = mean cross-entropy over validation windows under P, of the dense weights ("switched") or those adapted to P
  keys(P)  = mean over positions, layers and heads of the number of keys that equation (4) allows
  cache(P) = bytes of the decoding cache after one window, counted on its tensors, per token of the window

`python eval.py` reads out/dense.pt and the adapted checkpoints beside it; `python eval.py --compare out out/attention`
puts several runs side by side. Flags that are not given take what each run's pretraining used.
"""
import glob
import math
import os
from dataclasses import dataclass

from model import Pattern, load_checkpoint
from train import DataFlags, evaluate, fingerprint, flag, header, load_data, of_run, parse_flags, run


@dataclass
class EvalConfig(DataFlags):
    checkpoint: str | None = flag(None, "a checkpoint to evaluate by itself")
    pattern: list = flag((), "the patterns; default: dense and all that were adapted", nargs="+")
    compare: list = flag((), "the --out folders of several runs", nargs="+")


def adapted_checkpoints(dense, parent, device):
    """{pattern: model} of the checkpoints beside `dense` that were adapted from it (of `parent`'s fingerprint)."""
    found, beside = {}, set(glob.glob(os.path.join(glob.escape(os.path.dirname(dense)), "*.pt")))
    for path in sorted(beside - {dense}):
        model, meta = load_checkpoint(path, device)
        if meta.get("parent") == parent:
            found[meta["pattern"]] = model
        elif "parent" in meta:
            print(f"{path} was adapted from other weights than {dense}: left out")
    return found


def measure(dense, given):
    """One run: (its name, {(pattern, weights): loss}, {pattern: (keys, cache bytes, share of the dense cache's)})."""
    config = EvalConfig(**given)
    model, meta = load_checkpoint(dense, config.device)
    config = of_run(EvalConfig, dense, meta, given)
    _, val, _ = load_data(config, model.config.vocab_size)
    header(model, config)
    adapted = {} if config.checkpoint else adapted_checkpoints(dense, fingerprint(model), config.device)
    losses, costs, T = {}, {}, config.context
    dense_cache = model.new_cache(1, T, "D1", device="meta").nbytes
    for parsed in dict.fromkeys(map(Pattern.parse, ["D1", *(config.pattern or adapted)])):
        pattern, cache = str(parsed), model.new_cache(1, T, parsed, device="meta").nbytes
        costs[pattern] = parsed.keys_per_token(model.config, T), cache / T, cache / dense_cache
        own = "dense" if pattern == "D1" else "adapted" if pattern == meta["pattern"] else "switched"
        weights = {own: model, **({"adapted": adapted[pattern]} if pattern in adapted else {})}
        for label, version in weights.items():
            losses[pattern, label] = evaluate(version, val, parsed, config)
            print(f"{pattern} {label}: loss {losses[pattern, label]:.4f}", flush=True)
    arl = meta.get("train", {}).get("arl") not in ("none", "D1")   # two dense updates are no ARL
    kind = "attention-only" if not model.config.recurrence else "RAT+" if arl else "RAT+ without ARL"
    return f"{kind} ({dense if config.checkpoint else os.path.dirname(dense)})", losses, costs


def table(runs):
    """The Markdown table of several `measure`s.

    gap: to the run's own dense loss. Keys and cache: of the first run that has the pattern; those of a run without
    recurrence are smaller by the recurrent state.
    """
    lines = [["pattern", "weights", "keys per token", "cache bytes per token"]]
    for name, _, _ in runs:
        lines[0] += [f"{name}: loss", "gap", "perplexity"]
    lines.append(["---"] * len(lines[0]))
    costs = {pattern: cost for _, _, costs in runs[::-1] for pattern, cost in costs.items()}
    for pattern, label in dict.fromkeys(key for _, losses, _ in runs for key in losses):
        keys, cache, share = costs[pattern]
        lines.append([pattern, label, f"{keys:.1f}", f"{cache:.0f} ({share:.1%})"])
        for _, losses, _ in runs:
            if loss := losses.get((pattern, label)):
                lines[-1] += [f"{loss:.3f}", f"{loss - losses['D1', 'dense']:+.3f}", f"{math.exp(loss):.2f}"]
            else:
                lines[-1] += ["–"] * 3
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def chart(runs):
    """A Mermaid chart: a line per run, over the patterns that all have; adapted weights where there are any."""
    def best(losses, pattern):
        return next(losses[pattern, label] for label in ("adapted", "dense", "switched") if (pattern, label) in losses)

    patterns = [pattern for pattern in runs[0][2] if all(pattern in costs for _, _, costs in runs)]
    lines = [[best(losses, pattern) for pattern in patterns] for _, losses, _ in runs]
    low, high = min(map(min, lines)) - 0.1, max(map(max, lines)) + 0.1
    return "\n".join(["```mermaid", "xychart-beta", f'    title "validation loss: {", ".join(name for name, _, _ in runs)}"',
                      "    x-axis [" + ", ".join(f'"{pattern}"' for pattern in patterns) + "]",
                      f'    y-axis "nats per token" {low:.1f} --> {high:.1f}',
                      *("    line [" + ", ".join(f"{loss:.3f}" for loss in line) + "]" for line in lines), "```"])


def main():
    given = parse_flags(EvalConfig, __doc__)
    config = EvalConfig(**given)
    folders = config.compare or [config.out]
    checkpoints = [config.checkpoint] if config.checkpoint else [os.path.join(folder, "dense.pt") for folder in folders]
    runs = [measure(dense, given) for dense in checkpoints]
    print("", table(runs), "", chart(runs), sep="\n")


if __name__ == "__main__":
    run(main)
