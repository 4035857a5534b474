"""
What sparsity costs and saves, a row a pattern. Or benchmarks (--choices), or retrieval (--niah).

  loss(P)  = mean cross-entropy on validation windows under P, of the dense weights ("switched") or
             of those adapted to P
  kept(P)  = (loss(W0) - loss(P)) / (loss(W0) - loss(D1)), the share of what attention earns that P
             keeps. Under W0 a query sees only itself: the recurrence is all there is. Of adapted
             weights, W0 is that of weights adapted to it, where there are any
  keys(P)  = keys that equation (4) allows, mean over positions, layers and heads
  cache(P) = bytes of the decoding cache after one window, per token of the window
  read(P)  = bytes of it that a decoding step reads, mean over the positions of a window
  reach    = half-life of the recurrence in tokens, ln 2 / -ln a, on validation text

`python eval.py` reads out/dense.pt and what was adapted from it. `--compare out out/attention` puts
runs side by side. `--checkpoint out/D16.pt` takes one file, in its own pattern and dense. Flags
that are not given take what the run was trained with.

`--choices FILE.jsonl ...` scores items {"query": text, "choices": [texts], "gold": index}, one a
line, as lm-evaluation-harness does. `query` may be a list, one a choice; "group" is optional. Files
may be .xz, and may hold lists of token ids in place of texts. The likeliest choice is the answer:

  ll    = sum of the log-probabilities of the tokens of " " + choice, after the query
  acc   = share of items whose gold choice has the largest ll; acc_norm: ll / characters
  nats  = -(sum of ll) / (sum of tokens), of the gold choices
  delta = acc - acc of the model's dense row; its standard error comes from the differences by item
  With a single choice: acc = share where each of its tokens is the likeliest, ppl = exp(-mean ll)

`--niah` asks for values hidden in a text, and counts those in the greedy continuation. Models must
know the form: `python eval.py --niah --write niah` makes data for `python train.py --checkpoint
out/dense.pt --data niah --out out/niah`; then `python eval.py --niah --out out/niah`.
"""
import glob
import itertools
import json
import lzma
import math
import os
import re
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import Pattern, load_checkpoint
from train import (RANK, WORLD, Parser, Tokenizer, add_common_flags, add_data_flags, autocast,
                   evaluate, filled, fingerprint, header, load_data, merge, move, of_run,
                   pattern_flag, resolve_device, run, say, summed, whole)


def table_row(cells):
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table_head(cells):
    """Its first two rows."""
    return table_row(cells) + "\n" + "|---" * len(cells) + "|"


def append_json(path, record):
    """Add a record to a file as a line of JSON. Infinity, which JSON has not, becomes null."""
    if RANK == 0:
        finite = {key: None if value == math.inf else value for key, value in record.items()}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "a") as f:
            f.write(json.dumps(finite) + "\n")


# ---------------------------------------------------------------------------------------------
# Runs: a dense checkpoint with what was adapted from it, or one file by itself

class Version(NamedTuple):
    pattern: Pattern
    weights: str        # dense; adapted: to this pattern; switched: trained for another one
    model: torch.nn.Module


class Run(NamedTuple):
    name: str
    config: object      # the flags, completed by those of its training
    versions: list      # D1 first

    @property
    def vocab_size(self):
        return self.versions[0].model.config.vocab_size

    def label(self, version):
        """What names a version in tables and records."""
        pattern = str(version.pattern)
        return {"model": self.name, "pattern": pattern, "weights": version.weights}


def adapted_beside(dense, parents, device):
    """{pattern: model} of the files beside `dense` adapted from it. Says what it leaves out."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(dense)), "*.pt"))):
        if os.path.basename(path) == "dense.pt":
            continue
        try:
            model, meta = load_checkpoint(path, device)
        except (ValueError, OSError) as error:
            say(f"left out: {' '.join(str(error).split())}")
            continue
        if meta.get("parent") not in parents:
            say(f"left out: {path} was not adapted from the weights that {dense} holds")
        elif meta["pattern"] in found:
            say(f"left out: {path} is a second one for {meta['pattern']}")
        else:
            found[meta["pattern"]] = model
    return found


def versions_of(model, own, adapted, patterns):
    """The Versions to run: D1, the model's own pattern, and `patterns`; by default all, and W0."""
    texts = "D1", own, *(patterns or [*adapted, "W0"])
    versions = []
    for pattern in dict.fromkeys(Pattern.parse(text).fit(model.config) for text in texts):
        text = str(pattern)
        weights = "switched" if text != own else "dense" if text == "D1" else "adapted"
        versions.append(Version(pattern, weights, model))
        if text in adapted:
            versions.append(Version(pattern, "adapted", adapted[text]))
    return versions


def kind_of(model, meta):
    """RAT+ or attention-only, and whether it was trained with ARL if that is unusual for it."""
    usual = "D64" if model.config.recurrence else "none"
    arl = meta.get("train", {}).get("arl", usual)
    arl = arl not in ("none", ["none"], "D1", ["D1"])           # two dense updates are no ARL
    if arl == model.config.recurrence:
        return model.config.name
    return model.config.name + (" with ARL" if arl else " without ARL")


def open_run(path, parser, given, mode):
    """The Run of a checkpoint, with the files beside it unless --checkpoint named it."""
    model, meta = load_checkpoint(path)
    saved = {"tokenizer": meta["tokenizer"]}
    if "train" in meta or mode == "loss":
        saved = of_run(path, meta, given, INHERITED)
    config = merge(parser.defaults, saved, given)
    resolve_device(config)
    model.to(config.device)
    header(model, config)
    adapted = {}
    if not config.checkpoint:
        parents = fingerprint(model), meta.get("parent", "")    # fine-tuning keeps the parent
        adapted = adapted_beside(path, parents, config.device)
    versions = versions_of(model, meta["pattern"], adapted, config.pattern)
    place = path if config.checkpoint else os.path.dirname(path) or "."
    return Run(f"{kind_of(model, meta)} ({place})", config, versions)


def check_alike(runs, keys):
    """ValueError if the losses of these runs can't be compared. keys: of their validation data."""
    for run, key in zip(runs, keys):
        for name in ("tokenizer", "context", "eval_windows", "data"):
            first = getattr(runs[0].config, name)
            own = getattr(run.config, name)
            alike = key == keys[0] if name == "data" else own == first
            if not alike:
                raise ValueError(f"--compare: the runs differ in --{name.replace('_', '-')}, "
                                 f"{first} for {runs[0].name}, {own} for {run.name}: evaluate them "
                                 "one by one, or give the flag for all")


# ---------------------------------------------------------------------------------------------
# Loss and cost

def perplexity(nats):
    """exp(nats), or infinity where that is too large for a float."""
    return math.exp(nats) if nats < 700 else math.inf


class Loss(NamedTuple):
    """A row of the table."""
    pattern: str
    weights: str
    run: str
    loss: float         # nats per token
    keys: float         # per token
    cache: float        # bytes per token
    read: float         # bytes of it that a step reads


def measure(run, tokens):
    """The Losses of a Run's versions, each printed as soon as it is known."""
    config = run.config
    T = config.context
    losses = []
    for pattern, weights, model in run.versions:
        loss = evaluate(model, tokens, pattern, config)
        say(f"{pattern} {weights}: loss {loss:.4f}")
        with autocast(config):                                  # the cache has the compute dtype
            cache = model.new_cache(1, T, pattern, device="meta")
        keys = pattern.keys_per_token(model.config, T)
        read = cache.bytes_read(torch.arange(T))
        losses.append(Loss(str(pattern), weights, run.name, loss, keys, cache.nbytes / T, read))
    return losses


def pick(losses, pattern, *weights):
    """The loss under a pattern, of the first of these weights that was run; None if none was."""
    found = {row.weights: row.loss for row in losses if row.pattern == pattern}
    return next((found[kind] for kind in weights if kind in found), None)


def loss_row(row, losses):
    """A row of the table. losses: all of the same run, D1 first, that it is compared with."""
    dense = losses[0]
    floor = pick(losses, "W0", row.weights, "switched", "adapted")
    kept = "–"
    if floor is not None and floor != dense.loss:
        kept = f"{(floor - row.loss) / (floor - dense.loss):.1%}"
    return table_row([
        *row[:3], f"{row.keys:.1f}",
        f"{row.cache:.0f} ({row.cache / dense.cache:.1%})",
        f"{row.read:.0f} ({row.read / dense.read:.1%})",
        f"{row.loss:.3f}", f"{row.loss - dense.loss:+.3f}", kept, f"{perplexity(row.loss):.2f}"])


def loss_table(runs):
    """The Markdown table of several `measure`s, with the runs of a pattern beside one another."""
    lines = [table_head(["pattern", "weights", "model", "keys per token", "cache bytes per token",
                         "bytes read per token", "loss", "gap", "kept", "perplexity"])]
    for version in dict.fromkeys(row[:2] for losses in runs for row in losses):
        for losses in runs:
            lines += [loss_row(row, losses) for row in losses if row[:2] == version]
    return "\n".join(lines)


def chart(runs):
    """A Mermaid chart, a line a run, over the patterns that all have, adapted if they can be."""
    best = []
    for losses in runs:
        patterns = dict.fromkeys(row.pattern for row in losses)
        best.append({p: pick(losses, p, "adapted", "dense", "switched") for p in patterns})
    shared = [p for p in best[0] if p in set(best[0]).intersection(*best)]
    points = np.array([list(map(own.get, shared)) for own in best])
    if not np.isfinite(points).all():
        return ""
    lines = ["```mermaid", "xychart-beta",
             f"    title \"validation loss: {', '.join(losses[0].run for losses in runs)}\"",
             f"    x-axis {json.dumps(shared)}",
             f'    y-axis "nats per token" {points.min() - 0.1:.1f} --> {points.max() + 0.1:.1f}']
    for own in points:
        lines.append(f"    line [{', '.join(map('{:.3f}'.format, own))}]")
    return "\n".join([*lines, "```"])


# ---------------------------------------------------------------------------------------------
# Reach of the recurrence

BINS = 1024                                     # of log2 of the half-lives, fine to 3 %
LOWEST, HIGHEST = -16, 32


def half_lives(model, tokens, config):
    """(L, H, BINS) float32: a histogram of each head's half-lives on validation windows."""
    shape = model.config
    heads = shape.widths["g"] // shape.head_width
    counts = torch.zeros(shape.n_layer, heads, BINS)

    def counter(layer):
        def count(module, inputs, projected):
            half_life = math.log(2) / F.softplus(-projected.g.float())              # (B, T, C)
            octaves = half_life.log2().clamp(LOWEST, HIGHEST).unflatten(-1, (heads, -1))
            for i, head in enumerate(octaves.unbind(2)):
                counts[layer, i] += torch.histc(head, BINS, LOWEST, HIGHEST).cpu()
        return count

    hooks = [block.mix.in_proj.register_forward_hook(counter(layer))
             for layer, block in enumerate(model.blocks)]
    evaluate(model, tokens, "D1", config)
    for hook in hooks:
        hook.remove()
    return summed(counts)


def quantiles(histogram):
    """The median, and the 10th and 90th percentile, as text."""
    share = histogram.cumsum(0) / histogram.sum()
    places = torch.searchsorted(share, torch.tensor([0.1, 0.5, 0.9])) + 0.5
    tenth, median, ninetieth = (2 ** (LOWEST + (HIGHEST - LOWEST) * places / BINS)).tolist()
    return f"{median:.1f} ({tenth:.1f} to {ninetieth:.1f})"


def reach_table(counts):
    """The Markdown table of `half_lives`, by layer and head."""
    lines = [table_head(["layer", *(f"head {i}" for i in range(counts.shape[1])), "all"])]
    for i, layer in enumerate(counts):
        lines.append(table_row([i, *map(quantiles, layer), quantiles(layer.sum(0))]))
    whole = quantiles(counts.sum((0, 1)))
    lines.append(table_row(["all", *map(quantiles, counts.sum(0)), whole]))
    return "\n".join(lines)


def loss_and_cost(runs):
    """Print the table, the chart and, with --reach, the half-lives."""
    data = [load_data(run.config, run.vocab_size) for run in runs]
    check_alike(runs, [tokens.key for tokens in data])
    measured = [measure(run, tokens.val) for run, tokens in zip(runs, data)]
    say(f"\n{loss_table(measured)}\n\n{chart(measured)}")
    for run, tokens in zip(runs, data):
        model = run.versions[0].model
        if run.config.reach and model.config.recurrence:
            say(f"\n{run.name}: half-life of the decay in tokens, median (10th to 90th percentile)")
            say(reach_table(half_lives(model, tokens.val, run.config)))


# ---------------------------------------------------------------------------------------------
# Benchmarks: which choice is the likeliest after a query

SIX = "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada"     # the paper's
SCORES = "acc", "acc_norm", "ppl", "nats", "stderr", "delta", "delta_stderr"


class Choice(NamedTuple):
    tokens: list        # of the query, then of the choice
    n: int              # the last n are the choice's
    size: int           # of the choice in characters; in tokens, if the file holds those
    is_cut: bool        # the query has lost its middle


class Item(NamedTuple):
    choices: list       # of Choice
    gold: int
    group: str

    @property
    def is_cut(self):
        return any(choice.is_cut for choice in self.choices)


def parse_item(line):
    """(queries, choices, gold, group) of a line: a query a choice. ValueError if it is bad."""
    item = json.loads(line)
    if not isinstance(item, dict) or not {"query", "choices", "gold"} <= set(item):
        raise ValueError('it is not {"query": ..., "choices": [...], "gold": ...}')
    query = item["query"]
    choices = item["choices"]
    gold = item["gold"]
    if not isinstance(choices, list) or not choices or not all(choices):
        raise ValueError("choices is not a list of texts with something in each")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold!r} is not the index of one of {len(choices)} choices")
    one_each = isinstance(query, list) and query and not isinstance(query[0], int)
    queries = query if one_each else [query] * len(choices)
    if len(queries) != len(choices):
        raise ValueError(f"{len(queries)} queries for {len(choices)} choices")
    return queries, choices, gold, str(item.get("group", ""))


def encode(query, choice, coder):
    """(tokens of the query, tokens of the choice that goes on where it ends), two lists.

    Both texts are encoded together, as a tokenizer may join the end of one and the start of the
    other. Blanks at the end of the query count as the choice's.
    """
    if isinstance(query, str) and isinstance(choice, str):
        query_ids = list(coder.encode(query.rstrip()))
        return query_ids, list(coder.encode(query + " " + choice))[len(query_ids):]
    if isinstance(query, list) and isinstance(choice, list):
        if all(type(token) is int for token in query + choice):
            return query, choice
    raise ValueError("query and choices are neither texts nor lists of token ids")


def make_choice(query, choice, coder, config, vocab_size):
    """The Choice of a query and a choice. An empty query becomes end-of-text."""
    query_ids, choice_ids = encode(query, choice, coder)
    eot = config.eot if coder.eot is None else coder.eot
    if not query_ids and eot in (None, -1):
        raise ValueError("the query is empty, and no end-of-text token is known: --eot gives one")
    query_ids = query_ids or [eot]
    if not choice_ids:
        raise ValueError(f"the choice {choice!r} becomes no token")
    if not 0 <= min(query_ids + choice_ids) <= max(query_ids + choice_ids) < vocab_size:
        raise ValueError(f"a token is not one of the model's {vocab_size}")
    T = config.context
    is_cut = len(query_ids) + len(choice_ids) > T + 1  # the last token is predicted, not read
    choice_ids = choice_ids[:T]
    room = T + 1 - len(choice_ids)
    if len(query_ids) > room:
        query_ids = query_ids[:room // 2] + query_ids[len(query_ids) - (room - room // 2):]
    return Choice(query_ids + choice_ids, len(choice_ids), len(choice), is_cut)


def lines_of(path):
    """(number, line) of a file of text, or of a packed one; lines are bytes."""
    with (lzma.open if path.endswith(".xz") else open)(path, "rb") as file:
        try:
            yield from enumerate(file, 1)
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path}: not a whole .xz file ({error})") from error


def read_items(path, coder, config, vocab_size):
    """The Items of a file, --limit at most. ValueError names the file and the line that is bad."""
    items = []
    for number, line in itertools.islice(lines_of(path), config.limit):
        try:
            queries, choices, gold, group = parse_item(line)
            made = [make_choice(query, choice, coder, config, vocab_size)
                    for query, choice in zip(queries, choices)]
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        items.append(Item(made, gold, group))
    if not items:
        raise ValueError(f"{path}: no items")
    return items


def batches_by_length(choices, room):
    """Lists of indices of choices, the longest first, each with at most `room` tokens, padded."""
    batches = []
    most = 0
    for i in sorted(range(len(choices)), key=lambda i: -len(choices[i].tokens)):
        if not batches or len(batches[-1]) == most:
            batches.append([])
            most = max(1, room // len(choices[i].tokens))
        batches[-1].append(i)
    return batches


@torch.no_grad()
def score_batch(model, choices, pattern, config):
    """(2, B) float64: ll of each choice; 1 where each of its tokens is the likeliest, else 0."""
    T = max(len(choice.tokens) for choice in choices) - 1
    idx = torch.zeros(len(choices), T, dtype=torch.long)            # padded on the right
    targets = torch.full_like(idx, -100)
    for i, choice in enumerate(choices):
        end = len(choice.tokens) - 1
        idx[i, :end] = torch.tensor(choice.tokens[:-1])
        targets[i, end - choice.n:end] = torch.tensor(choice.tokens[-choice.n:])
    targets = move(targets, config)
    counts = targets != -100
    with autocast(config):                                          # logits where they count only
        logits = model.head(model.hidden(move(idx, config), pattern)[counts]).float()
    y = targets[counts]
    ll = logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(-1)
    wrong = (logits.argmax(-1) != y).float()
    rows = counts.nonzero()[:, 0].cpu()
    sums = torch.zeros(2, len(choices), dtype=torch.float64)
    sums.index_add_(1, rows, torch.stack((ll, wrong)).double().cpu())
    return torch.stack((sums[0], (sums[1] == 0).double()))


def with_progress(batches, sizes, title):
    """Yield the batches. A line on stderr tells, once a second and at the end, how far it is."""
    start = time.perf_counter()
    due = start + 1
    for i, batch in enumerate(batches, 1):
        yield batch
        share = sum(sizes[:i]) / sum(sizes)
        now = time.perf_counter()
        if RANK == 0 and (now > due or i == len(batches)):
            due = now + 1
            print(f"\r{title}: {share:.0%}, ETA {(now - start) * (1 / share - 1):.0f} s  ",
                  end="\n" if i == len(batches) else "", file=sys.stderr, flush=True)


def score_all(model, choices, pattern, config, title):
    """`score_batch` of all choices: (2, n)."""
    batches = batches_by_length(choices, config.eval_batch * config.context)[RANK::WORLD]
    sizes = [len(batch) * len(choices[batch[0]].tokens) for batch in batches]
    scores = torch.zeros(2, len(choices), dtype=torch.float64)
    for batch in with_progress(batches, sizes, title):
        scores[:, batch] = score_batch(model, [choices[i] for i in batch], pattern, config)
    scores = summed(scores).numpy()
    if not np.isfinite(scores).all():
        raise ValueError(f"{title}: a log-probability is not finite, the weights are of no use")
    return scores


def score_group(items, scores):
    """The scores of some items. scores[i]: (2, choices) of items[i], as score_all gives them."""
    alone = all(len(item.choices) == 1 for item in items)
    hits = []
    hits_norm = []
    gold_ll = []
    for item, (ll, likeliest) in zip(items, scores):
        sizes = [choice.size for choice in item.choices]
        many = len(ll) > 1
        hits.append(ll.argmax() == item.gold if many else likeliest[0])
        hits_norm.append((ll / sizes).argmax() == item.gold if many else likeliest[0])
        gold_ll.append(ll[item.gold])
    acc = np.mean(hits)
    tokens = sum(item.choices[item.gold].n for item in items)
    return {
        "acc": acc,
        "acc_norm": None if alone else np.mean(hits_norm),
        "ppl": perplexity(-np.mean(gold_ll)) if alone else None,
        "nats": -np.sum(gold_ll) / tokens,
        "stderr": math.sqrt(acc * (1 - acc) / max(1, len(items) - 1)),
        "hits": np.array(hits, dtype=float),                    # 1 where the answer is right, or 0
    }


def paired(group, dense):
    """delta and its standard error. dense: the dense row's scores of the group, None without it."""
    if dense is None:
        return {"delta": None, "delta_stderr": None}
    differences = group["hits"] - dense["hits"]
    stderr = differences.std() / math.sqrt(max(1, len(differences) - 1))
    return {"delta": differences.mean(), "delta_stderr": stderr}


def mean_stderr(errors):
    """The standard error of the mean of independent values, from theirs."""
    return math.sqrt(sum(error ** 2 for error in errors)) / len(errors)


def average(groups):
    """The unweighted mean over groups; of their standard errors, the mean's."""
    whole = {}
    for name in SCORES:
        values = [group[name] for group in groups]
        mean = mean_stderr if name.endswith("stderr") else np.mean
        whole[name] = None if None in values else mean(values)
    return whole


def score_task(version, items, config, title):
    """{group: its scores} of a file's items."""
    choices = [choice for item in items for choice in item.choices]
    scores = score_all(version.model, choices, version.pattern, config, title)
    borders = np.cumsum([len(item.choices) for item in items])[:-1]
    scores = np.split(scores, borders, axis=1)
    groups = {}
    for name in dict.fromkeys(item.group for item in items):
        mine = [i for i, item in enumerate(items) if item.group == name]
        groups[name] = score_group([items[i] for i in mine], [scores[i] for i in mine])
    return groups


def cell(scores):
    """acc in %, its standard error, then acc_norm or ppl, and how many items lost their middle."""
    text = f"{100 * scores['acc']:.1f} ± {100 * scores['stderr']:.1f}"
    if scores["acc_norm"] is not None:
        text += f" / {100 * scores['acc_norm']:.1f}"
    if scores["ppl"] is not None:
        text += f", ppl {scores['ppl']:.4g}"
    if scores.get("cut"):
        text += f", {scores['cut']} cut"
    return text


def delta_cell(scores):
    """delta in percentage points, and its standard error."""
    return f"{100 * scores['delta']:+.1f} ± {100 * scores['delta_stderr']:.1f}"


def read_tasks(run):
    """{name: Items} of the files of --choices, in the tokens of a run."""
    tasks = {}
    coder = Tokenizer(run.config.tokenizer)
    for path in run.config.choices:
        name = os.path.basename(path).removesuffix(".xz").removesuffix(".jsonl")
        if name in tasks:
            raise ValueError(f"--choices: two files are called {name}")
        tasks[name] = read_items(path, coder, run.config, run.vocab_size)
    return tasks


def score_version(run, version, tasks, dense):
    """({task: its scores}, {(task, group): its scores}), appended to choices.jsonl in --out.

    dense: the second of these, of the run's dense row; {} before or without it.
    """
    config = run.config
    whole = {}
    parts = {}
    for task, items in tasks.items():
        groups = score_task(version, items, config, f"{version.pattern} {version.weights} {task}")
        for group, scores in groups.items():
            scores.update(paired(scores, dense.get((task, group))))
            parts[task, group] = scores
        whole[task] = {
            **run.label(version), "task": task, "items": len(items),
            **average([*groups.values()]),
            "cut": sum(item.is_cut for item in items),
            "context": config.context, "tokenizer": config.tokenizer}
        append_json(os.path.join(config.out, "choices.jsonl"), whole[task])
    return whole, parts


def benchmarks(runs):
    """Print a table, a row as soon as it is known; below it delta; with --verbose the groups."""
    all_tasks = [read_tasks(run) for run in runs]
    names = ["model", "pattern", "weights"]
    six = ["average of six"] if set(SIX) <= set(all_tasks[0]) else []
    say("\nacc in % ± its standard error / acc_norm; with a single choice: acc, ppl\n\n"
        + table_head([*names, *all_tasks[0], *six]))
    deltas = []
    details = [table_head([*names, "task", "group", "scores"])]
    for run, tasks in zip(runs, all_tasks):
        dense = {}
        for version in run.versions:                            # dense weights come first
            label = run.label(version).values()
            whole, parts = score_version(run, version, tasks, dense)
            cells = [cell(scores) for scores in whole.values()]
            columns = [*whole.values()]
            if six:
                columns.append(average([whole[task] for task in SIX]))
                cells.append(f"{100 * columns[-1]['acc']:.1f}")
            say(table_row([*label, *cells]))
            if version.weights == "dense":
                dense = parts
            elif dense:
                deltas.append(table_row([*label, *map(delta_cell, columns)]))
            for (task, group), scores in parts.items():
                details.append(table_row([*label, task, group, cell(scores)]))
    if deltas:
        say("\nacc minus that of the dense row, in percentage points ± its standard error\n\n"
            + "\n".join([table_head([*names, *all_tasks[0], *six]), *deltas]))
    if runs[0].config.verbose:
        say("\n" + "\n".join(details))


# ---------------------------------------------------------------------------------------------
# Retrieval: values hidden in a long text, in the eight forms of RULER, in words of our own:
#
#   The quiet river found her black stone. Safe magic-cloud: 7154321. Our brave horse ...
#   Open magic-cloud: 7154321.
#
# The sentence with the value is the needle, the text around it is the haystack.

# Each word has five letters and is one GPT-2 token, so that all rows of a kind are equally long.
ADJECTIVES = """
basic black blank blind brown chief civil clean clear crazy daily dirty early empty equal final
fixed fresh fried grand great green happy heavy human inner large legal light local lower magic
major metal moral outer plain prime quick quiet ready rival rough round sharp short small smart
solid steel still sweet tight total upper urban usual white worst young""".split()
NOUNS = """
angel apple arrow beard blade boats bones books boxes brain bread brush cakes cards chain chair
clock cloth cloud coins court cream dream dress field flame fleet floor fruit ghost glass grain
grass guard heart horse house image knife ledge money mouse night organ paper patch phone plane
plant plate queue radio ridge river sheet shell shirt stone storm story""".split()
VERBS = "built faced fixed found heard owned rated threw wired wrote".split()
ARTICLES = "The Our Her His".split()
DIGITS = "0123456789abcdef-"

SENTENCES = {                                   # a word from each list, then a full stop
    "noise": [["The rain falls. The wind turns. The lamp is lit"]],
    "prose": [ARTICLES, ADJECTIVES, NOUNS, VERBS, [a.lower() for a in ARTICLES], ADJECTIVES, NOUNS],
}


class Task(NamedTuple):
    haystack: str       # noise, prose, or needles and pairs: the haystack is made of other needles
    key: str            # words or uuid
    value: str          # number or uuid
    needles: int        # hidden in the haystack
    keys: int           # different keys among them
    asked: int          # values that one question asks for

    @property
    def of_needles(self):
        return self.haystack in ("needles", "pairs")


TASKS = {
    "single-1": Task("noise", "words", "number", 1, 1, 1),
    "single-2": Task("prose", "words", "number", 1, 1, 1),
    "single-3": Task("prose", "words", "uuid", 1, 1, 1),
    "multikey-1": Task("prose", "words", "number", 4, 4, 1),
    "multikey-2": Task("needles", "words", "number", 1, 1, 1),
    "multikey-3": Task("needles", "uuid", "uuid", 1, 1, 1),
    "multivalue": Task("prose", "words", "number", 4, 1, 4),
    "multiquery": Task("prose", "words", "number", 4, 4, 4),
    "recall": Task("pairs", "words", "number", 1, 1, 1),    # no words around: the simplest task
}
RULER = [*TASKS][:8]


class Needles(NamedTuple):
    keys: np.ndarray    # (n, tokens of a key)
    values: np.ndarray  # (n, digits of a value), places in DIGITS
    rows: np.ndarray    # (n, tokens): the sentences that tell them


class Sample(NamedTuple):
    tokens: np.ndarray  # (T,) int64
    answer: np.ndarray  # (T,) bool, True on the tokens of the answers
    values: list        # the texts that the answers hold


class Niah:
    """Numbered samples of TASKS, the same for the same tokenizer, seed, split and number.

    No key and no value is in both split 0, for training, and split 1, for evaluation. Words and
    digits are encoded one by one and put together as arrays, which is faster than encoding texts.
    """

    def __init__(self, tokenizer, seed, split):
        self.coder = Tokenizer(tokenizer)
        if self.coder.size is None:
            raise ValueError("--niah writes text, which needs --tokenizer bytes or gpt2")
        self.seed = seed
        self.split = split
        self.encoded = {}
        self.digits = np.hstack([self.encode(digit) for digit in DIGITS])
        self.sentences = {}
        self.lengths = {}                       # tokens of a sentence
        for name, lists in SENTENCES.items():
            self.sentences[name] = [self.encode_words(words) for words in lists]
            self.lengths[name] = 1 + sum(words.shape[1] for words in self.sentences[name])
        pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        self.keys = self.encode_words([p for i, p in enumerate(pairs) if i % 97 % 2 == split])

    def encode(self, text):
        """The tokens of a text, (n,) int64, encoded once."""
        if text not in self.encoded:
            self.encoded[text] = np.array(self.coder.encode(text), np.int64)
        return self.encoded[text]

    def encode_words(self, words):
        """(words, tokens of a word), each with a blank in front."""
        return np.stack([self.encode(" " + word) for word in words])

    def fill(self, form, **columns):
        """`form` once for each row of the named arrays, with {name} replaced by that row."""
        n = len(next(iter(columns.values())))
        parts = []
        for i, part in enumerate(re.split("{(.*?)}", form)):
            parts.append(columns[part] if i % 2 else np.tile(self.encode(part), (n, 1)))
        return np.hstack(parts)

    def draw_values(self, kind, n, rng):
        """n values that belong to this split, as places in DIGITS: (n, 7), or (n, 36) for uuids."""
        base, length = {"number": (10, 7), "uuid": (16, 32)}[kind]
        drawn = rng.integers(base, size=(3 * n + 40, length), dtype=np.int32)
        drawn[:, 0] = rng.integers(1, base, len(drawn))
        side = drawn[:, :7] @ 10 ** np.arange(7) % 97 % 2       # no digit gives the side away
        mine = drawn[side == self.split][:n]
        if kind == "uuid":
            mine = np.insert(mine, (8, 12, 16, 20), DIGITS.index("-"), axis=1)
        return mine

    def draw_needles(self, task, order, count, distinct, rng):
        """`count` needles with `distinct` keys: words are taken as `order` numbers them."""
        if task.key == "words":
            keys = self.keys[np.resize(order, distinct)]
        else:
            keys = self.digits[self.draw_values("uuid", distinct, rng)]
            keys = self.fill(" {uuid}", uuid=keys)
        keys = np.resize(keys, (count, keys.shape[1]))
        values = self.draw_values(task.value, count, rng)
        form = "{key} {value}." if task.haystack == "pairs" else " Safe{key}: {value}."
        return Needles(keys, values, self.fill(form, key=keys, value=self.digits[values]))

    def draw_haystack(self, task, order, count, rng):
        """(count, tokens): other needles than the hidden ones, or sentences."""
        if task.of_needles:
            return self.draw_needles(task, order, count, count, rng).rows
        lists = self.sentences[task.haystack]
        words = [words[rng.integers(len(words), size=count)] for words in lists]
        return self.fill("{words}.", words=np.hstack(words))

    def draw_hidden(self, task, order, T, rounds, rng):
        """(the Needles that up to `rounds` questions ask for, the number of different keys)."""
        if not task.of_needles:
            return self.draw_needles(task, order, task.needles, task.keys, rng), task.keys
        found = self.draw_needles(task, order, rounds, rounds, rng)
        n = max(1, min(rounds, T // (3 * found.rows.shape[1])))     # in a third of the text
        return Needles(*(part[:n] for part in found)), n

    def ask(self, task, hidden, distinct, rounds):
        """(questions, answers), a row of tokens each; a question asks for `task.asked` values."""
        told = min(rounds * task.asked, len(hidden.values))
        n = told // task.asked
        keys = self.fill("{row},", row=hidden.keys[:min(told, distinct)])
        values = self.fill(" {row},", row=self.digits[hidden.values[:told]])
        form = "{keys}" if task.haystack == "pairs" else "\nOpen{keys}:"
        return (self.fill(form, keys=keys.reshape(n, -1)[:, :-1]),      # no comma at the end
                self.fill("{values}.", values=values.reshape(n, -1)[:, :-1]))

    def sample(self, number, T, names, rounds=1):
        """A Sample of T tokens of one of the tasks `names`: haystack, needles in it, questions.

        rounds: how many questions there may be, each with its answer after it, as far as there are
        needles and room. Evaluation has one. ValueError if T is too short.
        """
        rng = np.random.default_rng((self.seed, self.split, number))
        name = names[rng.integers(len(names))]
        task = TASKS[name]
        order = rng.permutation(len(self.keys))
        hidden, distinct = self.draw_hidden(task, order, T, rounds, rng)
        n, width = hidden.rows.shape
        depths = np.append(number * 0.618034 % 1, rng.random(n - 1))    # golden ratio: evenly
        if distinct < n:
            depths.sort()                       # the answer tells the values in the text's order

        questions, answers = self.ask(task, hidden, distinct, rounds)   # at the end
        ends = np.hstack((questions, answers))
        length = width if task.of_needles else self.lengths[task.haystack]
        most = min(len(ends), (T - n * width - length) // ends.shape[1])
        if most < 1:
            needed = n * width + length + ends.shape[1]
            raise ValueError(f"--context {T} is too short for {name}, which takes {needed} tokens")
        ends = ends[:1 + rng.integers(most)]

        count = -(-(T - n * width - ends.size) // length)   # the haystack fills the rest
        hay = self.draw_haystack(task, order[n:], count, rng)
        at = 1 + (count * depths).astype(int)               # the row that follows each needle
        text = np.insert(hay.ravel(), np.repeat(at * length, width), hidden.rows.ravel())
        tokens = np.hstack((text, ends.ravel()))[-T:]       # its front loses what is too much
        answer = np.zeros(T, bool)
        answer[T - ends.size:] = np.tile(np.arange(ends.shape[1]) >= questions.shape[1], len(ends))
        values = np.array([*DIGITS])[hidden.values[:len(ends) * task.asked]]
        return Sample(tokens, answer, ["".join(row) for row in values])


def write_niah(config):
    """Write train.bin and val.bin with their masks: samples of --context tokens one after another.

    Tokens are uint16. A mask has a byte a token, 1 for the tokens of answers. val.bin holds samples
    of the split that is evaluated, a twentieth as many.
    """
    if os.path.exists(config.write):
        raise ValueError(f"--write {config.write} exists: name a new folder")
    partial = config.write.rstrip(os.sep) + ".tmp"
    os.makedirs(partial, exist_ok=True)
    numbers = {"train": config.samples, "val": max(2, config.samples // 20)}
    for split, (name, n) in enumerate(numbers.items()):
        niah = Niah(config.tokenizer, config.seed, split)
        tokens = open(f"{partial}/{name}.bin", "wb")
        mask = open(f"{partial}/{name}.mask.bin", "wb")
        with tokens, mask:
            for number in range(n):
                sample = niah.sample(number, config.context, config.tasks, rounds=16)
                tokens.write(sample.tokens.astype("<u2").tobytes())
                mask.write(sample.answer.astype(np.uint8).tobytes())
    os.rename(partial, config.write)
    say(f"{config.write}: {numbers['train']} samples for training and {numbers['val']} for "
        f"validation, of {config.context} tokens ({config.tokenizer}) each")


def share_found(text, values):
    """Of the values, the share that the text holds, in upper or lower case."""
    return sum(value.lower() in text.lower() for value in values) / len(values)


def retrieve(model, niah, task, pattern, config):
    """Mean share, in %, of the values of a task's samples that the greedy continuation holds.

    Prompt and continuation together fill the context.
    """
    total = torch.zeros(1, dtype=torch.float64)
    for first in range(0, config.samples, config.eval_batch)[RANK::WORLD]:
        numbers = range(first, min(first + config.eval_batch, config.samples))
        samples = [niah.sample(number, config.context, [task]) for number in numbers]
        n_new = int(samples[0].answer.sum())                    # the same for all of a task
        idx = torch.from_numpy(np.stack([sample.tokens[:-n_new] for sample in samples]))
        out = model.generate(move(idx, config), n_new, pattern, temperature=0)
        for sample, new in zip(samples, out[:, -n_new:].tolist()):
            coder = Tokenizer(config.tokenizer)                 # it may end within a character
            total += share_found("".join(map(coder.decode, new)), sample.values)
    return 100 * summed(total).item() / config.samples


def retrieval(runs):
    """Print a table, a row as soon as it is known, and append its cells to niah.jsonl in --out."""
    tasks = runs[0].config.tasks
    all_niah = [Niah(run.config.tokenizer, run.config.seed, split=1) for run in runs]
    for run, niah in zip(runs, all_niah):
        if niah.coder.size > run.vocab_size:
            raise ValueError(f"{run.name}: the vocabulary is too small for {niah.coder.name}")
        for task in tasks:
            niah.sample(0, run.config.context, [task])          # raises if there is no room
    say("\n" + table_head(["model", "pattern", "weights", *tasks, "average"]))
    for run, niah in zip(runs, all_niah):
        for version in run.versions:
            scores = retrieve_all(run, version, niah, tasks)
            shown = [f"{score:.1f}" for score in (*scores, np.mean(scores))]
            say(table_row([*run.label(version).values(), *shown]))


def retrieve_all(run, version, niah, tasks):
    """`retrieve` of each task, appended to niah.jsonl."""
    config = run.config
    model = version.model.to(getattr(torch, config.dtype))
    scores = []
    for task in tasks:
        scores.append(retrieve(model, niah, task, version.pattern, config))
        append_json(os.path.join(config.out, "niah.jsonl"), {
            **run.label(version), "task": task, "score": scores[-1], "samples": config.samples,
            "context": config.context, "tokenizer": config.tokenizer, "seed": config.seed})
    return scores


# ---------------------------------------------------------------------------------------------
# Flags

SHARED = {"out", "device", "dtype", "seed", "tokenizer", "context", "eval_batch", "checkpoint",
          "compare", "pattern"}
MODES = {                                       # the flags that each has a use for
    "write": {"write", "niah", "tasks", "samples", "tokenizer", "context", "seed", "device"},
    "niah": SHARED | {"niah", "tasks", "samples"},
    "choices": SHARED | {"choices", "limit", "verbose", "eot"},
    "loss": SHARED | {"reach", "data", "split_on", "eot", "eval_windows"},
}
INHERITED = {"data", "tokenizer", "split_on", "eot", "context", "eval_windows", "eval_batch",
             "sources"}                         # from the run's training


def eval_flags():
    parser = Parser(__doc__)
    add_common_flags(parser)
    add_data_flags(parser)
    parser.flag("--checkpoint", None, "one file to evaluate, without those beside it", type=filled)
    parser.flag("--pattern", None, "patterns beside D1 and, with --checkpoint, the file's own; "
                "default: all that were adapted, and W0", nargs="+", type=pattern_flag)
    parser.flag("--compare", None, "the --out folders of several runs", nargs="+", type=filled)
    parser.switch("--reach", False, "also the half-life of the decays, by layer and head")
    parser.flag("--choices", None, "files of items to score, .jsonl or .jsonl.xz", nargs="+")
    parser.flag("--limit", None, "of --choices: at most so many items of each file", type=whole())
    parser.switch("--verbose", False, "of --choices: list the groups too")
    parser.switch("--niah", False, "retrieval instead of the loss")
    parser.flag("--tasks", RULER, "of --niah", nargs="+", choices=[*TASKS])
    parser.flag("--samples", 64, "of --niah, for each task; with --write for all, then 16384",
                type=whole())
    parser.flag("--write", None, "with --niah: a new folder for fine-tuning data", type=filled)
    return parser


def mode_of(given):
    """The mode that the flags ask for. ValueError for a flag that means nothing in it."""
    mode = next((name for name in MODES if given.get(name)), "loss")
    for name in given:
        if name not in MODES[mode]:
            where = "without --niah or --choices" if mode == "loss" else f"with --{mode}"
            raise ValueError(f"--{name.replace('_', '-')} means nothing {where}")
    if "checkpoint" in given and "compare" in given:
        raise ValueError("--checkpoint is one file, --compare folders: give one of the two")
    if mode == "write" and not given.get("niah"):
        raise ValueError("--write means nothing without --niah")
    return mode


def paths_of(config):
    """The checkpoints to open. FileNotFoundError, before any is, if one is missing."""
    if config.checkpoint:
        return [config.checkpoint]
    paths = [os.path.join(folder, "dense.pt") for folder in config.compare or [config.out]]
    for path in paths:
        os.stat(path)
    return paths


def main(argv=None):
    parser = eval_flags()
    given = vars(parser.parse_args(argv))
    mode = mode_of(given)
    if mode == "write":
        if RANK == 0:
            write_niah(merge(parser.defaults, {"tokenizer": "bytes", "samples": 16384}, given))
        return
    config = merge(parser.defaults, given)
    runs = [open_run(path, parser, given, mode) for path in paths_of(config)]
    {"niah": retrieval, "choices": benchmarks, "loss": loss_and_cost}[mode](runs)


if __name__ == "__main__":
    run(main)
