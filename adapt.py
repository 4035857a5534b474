"""
Resolution adaptation: a dense checkpoint becomes a sparse one for each pattern.

  theta_P = theta_dense; then for a few steps
  theta_P <- AdamW(theta_P, gradient of loss(batch; theta_P, P))                               (7)

Only the pattern P is trained: no ARL. The learning rate starts at a tenth of pretraining's and
falls along a cosine. Windows are drawn at random offsets. The paper spends 1 % of the pretraining
tokens on it.

`python adapt.py --pattern D16 D64` reads out/dense.pt and writes out/D16.pt and out/D64.pt. A flag
that is not given has the value of the pretraining, but for --steps (a hundredth of its steps, at
least 40), --lr (a tenth of its rate), --warmup (none), --seed and --dtype.
"""
import contextlib
import copy
import os

from model import Pattern, load_checkpoint, save_checkpoint
from train import (RANK, Parser, add_common_flags, add_data_flags, add_fit_flags, at_random, cut,
                   evaluate, file_of, filled, fingerprint, fit, header, load_data, log_line, memory,
                   merge, new_optimizer, note, of_run, open_log, pattern_flag, recorded,
                   refuse_changes, report, resolve_fit, run, say)


def adapt_flags():
    parser = Parser(__doc__)
    add_common_flags(parser)
    add_data_flags(parser)
    add_fit_flags(parser)
    parser.flag("--checkpoint", None, "the dense checkpoint; default: dense.pt in --out",
                filled)
    parser.flag("--pattern", ["D16", "D64"], "the patterns, each adapted from the dense checkpoint",
                pattern_flag, nargs="+")
    return parser


def settle(parser, given, path, meta):
    """The config: the defaults, what pretraining used, adaptation's own recipe, the given flags."""
    inherited = of_run(path, meta, given, parser.defaults)
    pretraining = merge(parser.defaults, inherited)
    lr = pretraining.lr / 10
    steps = max(40, inherited.get("steps", 0) // 100)
    recipe = {"steps": steps, "lr": lr, "min_lr": min(lr, pretraining.min_lr), "warmup": 0.0}
    config = merge(parser.defaults, inherited, recipe, given)
    resolve_fit(config)
    config.eval_interval = config.steps                 # validation is at the end only
    return config


def finished(paths, parent, given):
    """The files that --resume keeps. ValueError if a file is in the way, or was made otherwise."""
    kept = []
    for path in filter(os.path.exists, paths):
        if not given.get("resume") and not given.get("overwrite"):
            raise ValueError(f"{path} exists: --resume keeps it, --overwrite adapts anew")
        if given.get("resume"):
            meta = load_checkpoint(path)[1]
            if meta.get("parent") != parent:
                raise ValueError(f"{path} exists, and was adapted from other weights: --overwrite "
                                 "adapts anew")
            refuse_changes(path, meta["adapt"], given, {"pattern"})
            kept.append(path)
    return kept


def main(argv=None):
    parser = adapt_flags()
    given = vars(parser.parse_args(argv))
    dense = given.get("checkpoint") or os.path.join(given.get("out", "out"), "dense.pt")
    dense_model, meta = load_checkpoint(dense)
    config = settle(parser, given, dense, meta)
    dense_model.to(config.device)
    patterns = {name: Pattern.parse(name).fit(dense_model.config) for name in config.pattern}
    if len(patterns) < len(config.pattern):
        note(f"--pattern {' '.join(config.pattern)}: those that are the same are adapted once")
    paths = {name: file_of(name, config.out) for name in patterns}
    parent = fingerprint(dense_model)
    kept = finished(paths.values(), parent, given)
    data = load_data(config, dense_model.config.vocab_size)
    header(dense_model, config)

    def batch(step):
        windows = at_random(step, config, data.train)
        return cut(data.train, windows, config.eot)

    dense_loss = evaluate(dense_model, data.val, "D1", config)
    rows = ["| pattern | dense loss | sparse before | sparse after |", "|---|---|---|---|"]
    with contextlib.ExitStack() as stack:
        todo = [name for name in patterns if paths[name] not in kept]
        logs = {name: stack.enter_context(open_log(paths[name])) for name in todo}
        for name in todo:                               # all old files are set aside by now
            model = copy.deepcopy(dense_model)
            pattern = patterns[name]
            flags = recorded(vars(config))
            report(logs[name], f"{name} | {flags}", pattern=name, config=flags)
            before = evaluate(model, data.val, pattern, config)
            optimizer = new_optimizer(model, config)
            for record in fit(model, config, batch, optimizer, pattern):
                report(logs[name], f"{name} | {log_line(record, config)}", **record)
            after = evaluate(model, data.val, pattern, config)
            if RANK == 0:
                save_checkpoint(paths[name], model, step=config.steps, pattern=name, parent=parent,
                                val={name: after}, tokenizer=meta["tokenizer"],
                                train=meta.get("train", {}), adapt=flags)
            report(logs[name], f"{name} | val dense {dense_loss:.4f}, sparse before {before:.4f}, "
                   f"after {after:.4f}{memory(config)} | saved {paths[name]}", dense=dense_loss,
                   before=before, after=after)
            rows.append(f"| {name} | {dense_loss:.4f} | {before:.4f} | {after:.4f} |")
    say("\n" + "\n".join(rows))


if __name__ == "__main__":
    run(main)
