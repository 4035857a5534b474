"""
Resolution adaptation: from one dense checkpoint to a sparse one per pattern.

  theta_P = theta_dense; then, for a few steps, theta_P <- AdamW(theta_P, gradient of loss(batch; theta_P, P))     (7)

The pattern P is fixed and ARL is off. The learning rate starts at a tenth of pretraining's and falls along a cosine;
batches are drawn at random offsets. The paper spends 1 % of the pretraining tokens on it.

`python adapt.py --pattern D16 D64` reads out/dense.pt and writes out/D16.pt and out/D64.pt. Flags that are not given
take what the pretraining used, but for --steps (1 % of its steps, at least 40), --lr (a tenth of its), --warmup (none) and what
is no part of the recipe: --seed, --dtype, --score, --device and --compile.
"""
import copy
import os
from dataclasses import asdict, dataclass

from model import Pattern, load_checkpoint, save_checkpoint
from train import (RANK, FitFlags, at_random, cut, evaluate, file_of, fingerprint, fit, flag, header, load_data, log_line,
                   memory, new_optimizer, of_run, open_log, parse_flags, report, run)


@dataclass
class AdaptConfig(FitFlags):
    checkpoint: str | None = flag(None, "the dense checkpoint; default: dense.pt in --out")
    pattern: list = flag(("D16", "D64"), "the patterns, each adapted on its own from the dense checkpoint", nargs="+")


def main():
    given = parse_flags(AdaptConfig, __doc__)
    config = AdaptConfig(**given)
    dense = config.checkpoint or os.path.join(config.out, "dense.pt")
    dense_model, meta = load_checkpoint(dense, config.device)
    pretraining = {"steps": 0, "lr": 1e-3, **meta.get("train", {})}
    recipe = {"steps": max(40, pretraining["steps"] // 100), "lr": pretraining["lr"] / 10, "warmup": 0.0}
    config = of_run(AdaptConfig, dense, meta, {**recipe, **given, "compile": config.compile}).check()
    patterns = [Pattern.parse(pattern, config.score).fit(dense_model.config) for pattern in config.pattern]
    parent, done = fingerprint(dense_model), []
    for path in (file_of(pattern, config.out) for pattern in patterns):
        if os.path.exists(path) and not config.overwrite:
            if not config.resume or load_checkpoint(path)[1].get("parent") != parent:
                raise ValueError(f"{path} exists: --resume keeps it if {dense} is its parent, --overwrite adapts anew")
            done.append(path)
    train, val, _ = load_data(config, dense_model.config.vocab_size)
    os.makedirs(config.out, exist_ok=True)
    header(dense_model, config)

    def batch(step):
        return cut(train, at_random(step, config, len(train)), config.context, config.eot)

    dense_loss, rows = evaluate(dense_model, val, "D1", config), []
    for pattern in patterns:
        path = file_of(pattern, config.out)
        if path in done:
            continue
        model = copy.deepcopy(dense_model)
        before = evaluate(model, val, pattern, config)
        with open_log(path[:-len("pt")] + "jsonl") as log:
            report(log, f"{pattern} | {config}", pattern=str(pattern), config=asdict(config))
            for record in fit(model, config, [pattern], batch, new_optimizer(model, config)):
                if record["step"] % config.log_interval == 0 or record["step"] == config.steps:
                    report(log, f"{pattern} | {log_line(record, config)}", **record)
            after = evaluate(model, val, pattern, config)
            if RANK == 0:
                save_checkpoint(path, model, step=config.steps, pattern=str(pattern), parent=parent, val={str(pattern): after},
                                tokenizer=meta["tokenizer"], train=meta.get("train", {}), adapt=asdict(config))
            losses = f"dense {dense_loss:.4f}, sparse before {before:.4f}, after {after:.4f}"
            report(log, f"{pattern} | val {losses}{memory(config)} | saved {path}", dense=dense_loss, before=before, after=after)
        rows.append(f"| {pattern} | {dense_loss:.4f} | {before:.4f} | {after:.4f} |")
    print("\n| pattern | dense loss | sparse before | sparse after |\n|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    run(main)
