"""
Resolution adaptation: a dense checkpoint becomes a sparse one for each pattern.

  theta_P = theta_dense; then for a few steps
  theta_P <- AdamW(theta_P, gradient of loss(batch; theta_P, P))                               (7)

The weights train under P only: no ARL. The paper spends 1 % of the pretraining tokens on it.

`python adapt.py` is `python adapt.py --pattern D16 D64` and writes out/D16.pt and out/D64.pt. Flags
not typed are the pretraining's, but for --steps (a hundredth, at least 40), --lr (a tenth, at most
5e-4), --warmup (none), --optimizer (adamw), --seed, --dtype. --resume keeps finished files.
"""
import copy
import os

from model import Pattern, load_checkpoint
from train import (MAY_DIFFER, NOT_INHERITED, add_data_flags, add_training_flags, check, evaluate,
                   file_of, fingerprint, fit, header, inherit, load_data, log_line, new_optimizers,
                   new_parser, open_log, pattern_flag, refuse_changes, report, require, run, save)


def main(argv=None):
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_training_flags(parser)
    parser.add_argument("--checkpoint", help="the dense checkpoint; default: dense.pt in --out")
    parser.add_argument("--pattern", nargs="+", default=["D16", "D64"], type=pattern_flag)
    config = parser.parse_args(argv)
    start = config.checkpoint or file_of("D1", config.out)
    config, dense, meta = inherit(parser, argv, start, {*NOT_INHERITED, "pattern", "optimizer"})
    lr = min(config.lr / 10, 5e-4)                      # Muon's rates are too high for AdamW
    parser.set_defaults(steps=max(40, config.steps // 100), lr=lr, warmup=0.0)
    config = parser.parse_args(argv)
    check(config)
    require(meta["pattern"] == "D1", f"{start} was trained for {meta['pattern']}, not densely")
    train, val = load_data(config)
    parent = fingerprint(dense)
    todo = []
    for name in dict.fromkeys(config.pattern):
        pattern = Pattern.parse(name).check(dense.config)
        path = file_of(name, config.out)
        require(path != start, f"--pattern {name} would take the place of {start}")
        if config.overwrite or not os.path.exists(path):
            todo.append((name, pattern, path))
            continue
        require(config.resume, f"{path} exists: --resume keeps it, --overwrite adapts anew")
        _, done = load_checkpoint(path)
        require("adapt" in done and done["parent"] == parent, f"{path} was not adapted from these "
                "weights: --overwrite adapts anew")
        refuse_changes(path, done["adapt"], config, {*MAY_DIFFER, "pattern"} - {"steps"})
    header(dense.to(config.device), config)
    dense_loss = evaluate(dense, val, "D1", config)
    rows = ["| pattern | dense loss | sparse before | sparse after |", "|---|---|---|---|"]
    for name, pattern, path in todo:
        with open_log(path, config) as log:
            report(log, f"{name} | {config}", step=0, config=vars(config))
            model = copy.deepcopy(dense)
            before = evaluate(model, val, pattern, config)
            for record in fit(model, config, train.batch, new_optimizers(model, config), pattern):
                report(log, f"{name} | {log_line(record, config, name)}", **record)
            after = evaluate(model, val, pattern, config)
            save(path, model, step=config.steps, pattern=name, parent=parent, val={name: after},
                 tokenizer=meta["tokenizer"], train=meta.get("train", {}), adapt=vars(config))
            rows.append(f"| {name} | {dense_loss:.4f} | {before:.4f} | {after:.4f} |")
            report(log, f"{rows[-1]} saved {path}", dense=dense_loss, before=before, after=after)
    print("\n" + "\n".join(rows), flush=True)


if __name__ == "__main__":
    run(main)
