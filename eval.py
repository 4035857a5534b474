"""
What sparsity costs and saves, a row a pattern. Or benchmarks (--choices), or retrieval (--niah).

  loss  = mean cross-entropy on validation windows; gap = loss - loss of the same model under D1
  keys  = keys that equation (4) allows a query, mean over positions, layers and heads
  cache = bytes of the decoding cache after a window, per token of it
  read  = bytes of it that a decoding step reads, mean over the positions of a window
  reach = half-life of the recurrence in tokens, ln 2 / -ln a, on validation text

`python eval.py` runs out/dense.pt dense, switched to other patterns, and what adapt.py left beside
it. Under W0 there is no attention. `--compare out out/attention` puts runs side by side, and
`--checkpoint out/D16.pt` runs a file alone. Flags that are not typed are those of the training.

`--choices FILE.jsonl ...` scores items {"query": text, "choices": [texts], "gold": index}, one a
line, as lm-evaluation-harness does. `query` may be a list, one a choice. Lists of token ids may
stand in place of texts. Items may name a "group": then acc, norm and delta are means over groups.

  ll    = sum of the log-probabilities of the tokens of " " + choice, after the query
  acc   = share of items whose gold choice has the largest ll; of equal ones the first counts
  norm  = the same with ll / characters
  delta = acc - acc of the model's D1 row; its standard error is of the differences by item
  With a single choice: acc = share where each of its tokens is the likeliest, ppl = exp(-mean ll)

`--niah` counts values hidden in a text that the greedy continuation holds. Models must know the
form: `python eval.py --niah --write niah` makes data for `python train.py --checkpoint
out/dense.pt --data niah --out out/niah`, then `python eval.py --niah --out out/niah`.
"""
import functools
import glob
import gzip
import itertools
import json
import lzma
import math
import os
import random
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import Cache, Pattern, RATPlus, load_checkpoint, require
from train import (NOT_INHERITED, Tokenizer, add_data_flags, autocast, bits_per_byte,
                   bytes_per_token, evaluate, file_of, fingerprint, header, inherited,
                   keys_per_token, load_data, move, new_parser, note, pattern_flag, run, use_device)


def table_row(*cells):
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table_head(*cells):
    """Its first two rows."""
    return table_row(*cells) + "\n" + "|---" * len(cells) + "|"


# --------------------------------------------------------------------------------------------------
# What is evaluated: a list of rows

class Row(NamedTuple):
    pattern: Pattern
    weights: str        # dense; adapted: to this pattern; switched: trained for another one
    name: str           # of the model, such as RAT+ (out)
    model: RATPlus


LABEL = ["pattern", "weights", "model"]         # the columns of row[:3]


def adapted_beside(dense, model, meta):
    """{pattern: model} of the files beside `dense`, which holds `model`, that were adapted from it.
    What is left out is said.
    """
    folder = os.path.dirname(dense)
    parents = fingerprint(model), meta.get("parent", "")        # fine-tuning keeps the parent
    found = {}
    paths = glob.glob(os.path.join(glob.escape(folder), "*.pt"))
    for path in sorted({*paths} - {file_of("D1", folder)}):
        try:
            other, about = load_checkpoint(path)
            require(about.get("parent") in parents, f"{path} was not adapted from {dense}")
            own = file_of(about["pattern"], folder)
            require(path == own, f"{path} is not {own}, the file of {about['pattern']}")
            found[about["pattern"]] = other
        except (ValueError, OSError) as error:
            note(f"left out: {error}")
    return found


def rows_of(path, model, meta, config):
    """The Rows of a checkpoint: D1, its own pattern, and --pattern; by default all that were
    adapted, and W0.
    """
    own = meta["pattern"]
    adapted = {} if config.checkpoint else adapted_beside(path, model, meta)
    name = f"{model.config.name} ({path if config.checkpoint else os.path.dirname(path)})"
    rows = []
    for text in dict.fromkeys(["D1", own, *(config.pattern or [*adapted, "W0"])]):
        pattern = Pattern.parse(text).check(model.config)
        weights = "switched" if text != own else "dense" if text == "D1" else "adapted"
        rows.append(Row(pattern, weights, name, model))
        if text in adapted:
            rows.append(Row(pattern, "adapted", name, adapted[text].to(config.device)))
    return rows


def settle(path, argv):
    """(config, model, meta) of a checkpoint, whose flags are defaults; of none if path is None."""
    parser = eval_flags()
    model, meta = load_checkpoint(path) if path else (None, {"tokenizer": "bytes"})
    saved = inherited(meta, parser.parse_args(argv), {*NOT_INHERITED, "pattern"})
    parser.set_defaults(**{**saved, "vocab_size": model and model.config.vocab_size})
    config = parser.parse_args(argv)
    config.samples = config.samples or (16384 if config.write else 64)
    require(min(config.context, config.eval_windows, config.eval_batch, config.samples) >= 1,
            "--context, --eval-windows, --eval-batch and --samples are at least 1")
    use_device(config)
    return config, model, meta


def open_rows(argv):
    """(config, rows). ValueError if the runs can't be compared."""
    flags = eval_flags().parse_args(argv)
    validates = not (flags.choices or flags.niah)
    same = ["tokenizer", "vocab_size", "context"]
    same += ["eval_windows", "data" if flags.data else "data_key"] * validates
    found = []
    rows = []
    for path in flags.checkpoint or [file_of("D1", out) for out in flags.compare or [flags.out]]:
        config, model, meta = settle(path, argv)
        require(config.data or not validates, f"{path} does not say what it was trained on: --data "
                "is needed")
        found.append(config)
        for name in same:
            mine = getattr(config, name)
            other = getattr(found[0], name)
            require(mine == other, f"{path} can't be compared with the runs before it: its {name} "
                    f"is {mine}, not {other}")
        header(model.to(config.device), config)
        rows += rows_of(path, model, meta, config)
    order = [row.pattern for row in rows]                       # D1 first, runs side by side
    return found[0], sorted(rows, key=lambda row: order.index(row.pattern))


# --------------------------------------------------------------------------------------------------
# Loss, cost, and reach of the recurrence

def perplexity(nats):
    """exp(nats), or infinity where that is too large for a float."""
    return math.inf if nats > 700 else math.exp(nats)


def costs(pattern, shape, T, dtype):
    """Keys per token, bytes of the cache per token, and bytes that a decoding step reads of it:
    keys and values, states, and summaries of whole blocks, mean over positions 0 to T - 1.
    """
    cache = Cache(shape, 1, T, pattern, dtype, torch.empty(0, device="meta"))   # takes no memory
    keys = keys_per_token(pattern, shape, T)
    each = dtype.itemsize * (keys - 1) + 4 * shape.recurrence   # its own key is in no cache yet
    read = 2 * shape.n_layer * shape.n_embd * each
    for i in range(shape.n_layer):
        rules = pattern.rules(i)
        for rule in rules:
            if rule.topk and rule.dilation != 1:
                blocks = (np.arange(T) // rule.block).mean()
                width = shape.n_embd / len(rules) * (2 if rule.score == "minmax" else 1)
                read += blocks * width * dtype.itemsize
    return keys, cache.nbytes / T, read


def loss_row(row, mine, dense, per_byte):
    """A row of the table. mine, dense: (loss, *costs) of the row and of its model's D1."""
    loss, keys, cache, read = mine
    cells = [f"{keys:.1f}",
             f"{cache:.0f} ({cache / dense[2]:.1%})",
             f"{read:.0f} ({read / dense[3]:.1%})",
             f"{loss:.3f}",
             f"{loss - dense[0]:+.3f}",
             f"{perplexity(loss):.2f}"]
    if per_byte:
        cells.append(f"{bits_per_byte(loss, per_byte):.3f}")
    return table_row(*row[:3], *cells)


def losses(rows, config):
    """Print each loss at once, then the table and, with --reach, the half-lives."""
    _, val = load_data(config)
    per_byte = bytes_per_token(val)
    dtype = getattr(torch, config.dtype)
    found = []
    for row in rows:
        loss = evaluate(row.model, val, row.pattern, config)
        print(f"{row.pattern} {row.weights}: loss {loss:.4f}", flush=True)
        found.append((loss, *costs(row.pattern, row.model.config, config.context, dtype)))
    print("\n" + table_head(*LABEL, "keys per token", "cache bytes per token",
                            "bytes read per token", "loss", "gap", "perplexity",
                            *["bits per byte"] * bool(per_byte)))
    dense = {}
    for row, mine in zip(rows, found):
        dense.setdefault(row.name, mine)                        # D1 comes first
        print(loss_row(row, mine, dense[row.name], per_byte))
    for row in rows[:len(dense)]:                               # D1 of each model
        if config.reach and row.model.config.recurrence:
            print(f"\n{row.name}: half-life in tokens, median (10th to 90th percentile)\n")
            print(reach_table(half_lives(row.model, val, config)))


@torch.no_grad()
def half_lives(model, val, config):
    """Of each layer, the half-lives at every 16th position of --eval-batch validation windows."""
    found = []

    def keep(module, inputs, projected):
        g = projected[:, ::16, -model.config.n_embd:].float().cpu()
        found.append(math.log(2) / F.softplus(-g))                      # softplus(-g) = -ln a

    hooks = [block.mix.in_proj.register_forward_hook(keep) for block in model.blocks]
    numbers, stride = val.evenly()
    idx, _ = val.cut(numbers[::-(-len(numbers) // config.eval_batch)], stride)
    with autocast(config):
        model(move(idx, config))
    for hook in hooks:
        hook.remove()
    return found


def reach_table(found):
    """The Markdown table of `half_lives`."""
    cells = []
    for lives in (*found, torch.stack(found)):
        tenth, median, ninetieth = np.quantile(lives, [0.1, 0.5, 0.9])
        cells.append(f"{median:.1f} ({tenth:.1f} to {ninetieth:.1f})")
    return table_head("layer", *range(len(found)), "all") + "\n" + table_row("half-life", *cells)


# --------------------------------------------------------------------------------------------------
# Benchmarks: which choice is the likeliest after a query

def read_item(line, coder, config):
    """(choices, sizes, gold, group) of a line. ValueError, KeyError or TypeError if it is bad.

    choices: [(tokens of query and choice, how many of them are the choice's)]. sizes: of the
    choices in characters, or in tokens. Query and choice are encoded together, as a tokenizer may
    join the end of one and the start of the other. Blanks between them count as the choice's. An
    empty query becomes end-of-text.
    """
    item = json.loads(line)
    queries, texts, gold = item["query"], item["choices"], item["gold"]
    if not queries or isinstance(queries, str) or isinstance(queries[0], int):
        queries = [queries] * len(texts)
    require(gold in range(len(texts)) and len(queries) == len(texts), "gold is not the index of a "
            "choice, or there is not one query for each")
    choices = []
    for query, choice in zip(queries, texts):
        require(type(query) is type(choice) and choice, "query and choice are two texts, or two "
                "lists of token ids, and the choice is not empty")
        tokens = query + choice
        start = len(query)
        if isinstance(query, str):
            tokens = [*coder.encode(f"{query} {choice}")]
            start = len(coder.encode(query.rstrip()))
        ids = np.array(tokens if start else [coder.eot, *tokens])
        V = config.vocab_size
        require(ids.dtype.kind in "iu" and 0 <= ids.min() and ids.max() < V, "a token is none of "
                f"the model's {V}, or the query is empty and --eot not given")
        choices.append((tuple(ids.tolist()), len(tokens) - start))
    return choices, [*map(len, texts)], gold, str(item.get("group"))


def read_items(path, coder, config):
    """The items of a file. ValueError names a bad line. Too long for the context, a query loses its
    front, as in lm-evaluation-harness, and an item with such a choice is left out. Both is said.
    """
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(os.path.splitext(path)[1], open)
    T = config.context
    items = []
    number = cut = 0
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                choices, *rest = read_item(line, coder, config)
                if max(n for _, n in choices) <= T:
                    cut += max(len(tokens) for tokens, _ in choices) > T + 1
                    items.append(([(tokens[-T - 1:], n) for tokens, n in choices], *rest))
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile,
            lzma.LZMAError) as error:
        raise ValueError(f"{path}, line {number}: {error!r}") from error
    if cut or len(items) < number:
        note(f"{path}: --context {T} is too short for the queries of {cut} items, which lose their "
             f"front, and for choices of {number - len(items)} items, which are left out")
    require(items, f"{path}: no items for --context {T}")
    return items


@torch.no_grad()
def score(row, items, config):
    """{choice: (ll, is each of its tokens the likeliest)} of all choices. Equal ones are scored
    once, so that rounding can't tell them apart.
    """
    choices = {choice for item in items for choice in item[0]}
    left = sorted(choices, key=lambda choice: -len(choice[0]))
    scores = {}
    while left:
        size = max(1, config.eval_batch * config.context // len(left[0][0]))
        batch, left = left[:size], left[size:]
        idx = pad_sequence([torch.tensor(tokens) for tokens, _ in batch], True)
        counted = [torch.arange(len(tokens)) >= len(tokens) - n for tokens, n in batch]
        counted = pad_sequence(counted, True)[:, 1:]
        y = move(idx[:, 1:][counted], config)
        with autocast(config):                                  # logits where they count only
            x = row.model.hidden(move(idx[:, :-1], config), row.pattern)
            logits = row.model.head(x[move(counted, config)]).float()
        sizes = [n for _, n in batch]
        lls = -F.cross_entropy(logits, y, reduction="none").double().cpu()
        likeliest = (logits.argmax(-1) == y).cpu()
        for choice, ll, each in zip(batch, lls.split(sizes), likeliest.split(sizes)):
            scores[choice] = ll.sum().item(), each.all().item()
    require(all(math.isfinite(ll) for ll, _ in scores.values()), f"{row.pattern} {row.weights}: a "
            "log-probability is not finite, the weights are of no use")
    return scores


def mean_of_groups(values, groups):
    """The mean over groups of the groups' means, and its standard error."""
    values = np.array(values, dtype=float)
    parts = [values[np.array(groups) == name] for name in dict.fromkeys(groups)]
    errors = [part.std() / math.sqrt(max(1, len(part) - 1)) for part in parts]
    return np.mean([part.mean() for part in parts]), np.linalg.norm(errors) / len(errors)


def summary(items, scores, dense_hits=None):
    """(record, hits): the scores of a file, and of each item whether its answer is right.
    dense_hits: those of the D1 row.
    """
    hits = []
    norm_hits = []
    lls_of_gold = []
    n_tokens = 0
    for choices, sizes, gold, _ in items:
        lls, likeliest = np.array([scores[choice] for choice in choices]).T
        right = len(lls) > 1 or likeliest[0]
        hits.append(right and lls.argmax() == gold)                     # of equal ones, the first
        norm_hits.append(right and (lls / sizes).argmax() == gold)
        lls_of_gold.append(lls[gold])
        n_tokens += choices[gold][1]
    groups = [item[-1] for item in items]
    record = {"items": len(items)}
    record["ll"] = np.mean(lls_of_gold)
    record["nats"] = -np.sum(lls_of_gold) / n_tokens
    record["acc"], record["stderr"] = mean_of_groups(hits, groups)
    record["norm"], _ = mean_of_groups(norm_hits, groups)
    if dense_hits:
        differences = np.subtract(hits, dense_hits, dtype=float)
        record["delta"], record["delta_stderr"] = mean_of_groups(differences, groups)
    return record, hits


def choices_cell(record, single):
    """acc in % ± its standard error / norm, or the perplexity of single choices; then delta."""
    text = f"{100 * record['acc']:.1f} ± {100 * record['stderr']:.1f}"
    text += f", ppl {perplexity(-record['ll']):.4g}" if single else f" / {100 * record['norm']:.1f}"
    if "delta" in record:
        text += f" ({100 * record['delta']:+.1f} ± {100 * record['delta_stderr']:.1f})"
    return text


def benchmarks(rows, config):
    """Print a table, a row as soon as it is known. Then add its records to choices.jsonl."""
    coder = Tokenizer(config.tokenizer, config.eot)
    tasks = {path: read_items(path, coder, config) for path in config.choices}
    names = [os.path.basename(path).split(".jsonl")[0] for path in tasks]
    print("\nacc in % ± its standard error / norm, or ppl (delta)\n")
    print(table_head(*LABEL, *names), flush=True)
    dense = {}                                                  # hits by model and file
    records = []
    for row in rows:
        cells = []
        for path, items in tasks.items():
            record, hits = summary(items, score(row, items, config), dense.get((row.name, path)))
            dense.setdefault((row.name, path), hits)            # D1 comes first
            cells.append(choices_cell(record, all(len(item[0]) == 1 for item in items)))
            records.append({**dict(zip(LABEL, map(str, row))), "file": path, **record})
        print(table_row(*row[:3], *cells), flush=True)
    os.makedirs(config.out, exist_ok=True)
    with open(os.path.join(config.out, "choices.jsonl"), "a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


# --------------------------------------------------------------------------------------------------
# Retrieval: values hidden in a long text, in the eight forms of RULER, in words of our own:
#
#   The quiet river is near a black stone. Safe magic-cloud: 7154321. The brave horse is near ...
#   Open magic-cloud: 7154321.
#
# The sentence with the value is the needle, the text around it is the haystack. Each word of the
# lists has five letters and is one GPT-2 token. So all sentences of a kind are equally long.

ADJECTIVES = """black blind brown clean clear daily dirty early empty fresh grand great green happy
    heavy human inner large light local magic metal outer plain quick quiet rough round sharp short
    small smart solid sweet total upper urban white young""".split()
NOUNS = """angel apple beard blade books boxes brain bread brush cards chain chair clock cloth cloud
    cream dream dress field flame floor fruit ghost glass grass heart horse house image knife money
    mouse night paper phone plane plant radio river shell shirt stone storm story""".split()
TASKS = {       # haystack; kind of keys, of values; needles, their keys; does one question ask all?
    "single-1": ("noise", "words", "number", 1, 1, True),
    "single-2": ("prose", "words", "number", 1, 1, True),
    "single-3": ("prose", "words", "uuid", 1, 1, True),
    "multikey-1": ("prose", "words", "number", 4, 4, False),
    "multikey-2": ("needles", "words", "number", 1, 1, False),
    "multikey-3": ("needles", "uuid", "uuid", 1, 1, False),
    "multivalue": ("prose", "words", "number", 4, 1, True),
    "multiquery": ("prose", "words", "number", 4, 4, True),
    "recall": ("pairs", "words", "number", 1, 1, False),        # no words around: the simplest
}
PIECE = re.compile(" ?[A-Z]?[a-z]+|.", re.DOTALL)       # a word, or another character by itself


def encoder(tokenizer):
    """The function text -> list of tokens, for the texts of samples. A digit is a token, as in
    Llama's tokenizer. So is each letter of a uuid, as those are capitals.
    """
    coder = Tokenizer(tokenizer)
    require(coder.size, "--niah writes text, which needs --tokenizer bytes or gpt2")
    of_piece = functools.cache(lambda piece: [*map(int, coder.encode(piece))])
    return lambda text: sum(map(of_piece, PIECE.findall(text)), [])


def draw(kind, rng):
    """A sentence, a key or a value of a kind."""
    a, b = rng.choices(ADJECTIVES, k=2)
    c, d = rng.choices(NOUNS, k=2)
    number = rng.getrandbits(128)
    return {"noise": " The rain falls. The wind turns. The lamp is lit.",
            "prose": f" The {a} {c} is near a {b} {d}.",
            "words": f"{a}-{c}",
            "number": str(10**6 + number % (9 * 10**6)),
            "uuid": f"{number:032X}"}[kind]             # without dashes


def new_sample(number, task, config, encode, most=1):
    """(tokens, answer, values) of a numbered sample, the same for the same seed: a haystack,
    needles in it, up to `most` questions, each with its answer after it.

    tokens: (--context,) uint16. answer: the same, 1 on the tokens of answers, else 0. values: the
    texts that the answers hold. ValueError if there is no room.
    """
    hay, key, value, count, n_keys, together = TASKS[task]
    of_needles = hay in ("needles", "pairs")
    rng = random.Random(f"{config.seed} {number}")
    form, question = (" {} {}.", " {}") if hay == "pairs" else (" Safe {}: {}.", "\nOpen {}:")
    size = len(encode(form.format(draw(key, rng), draw(value, rng))))
    rounds = rng.randint(1, max(1, min(most, config.context // (3 * size))))
    if of_needles:
        count = n_keys = rounds
    keys = []
    while len(keys) < n_keys:
        keys = list(dict.fromkeys([*keys, draw(key, rng)]))
    pairs = [(keys[i % n_keys], draw(value, rng)) for i in range(count)]

    ends = []
    answer = []
    values = []
    asked = rng.sample([[pair] for pair in pairs], min(rounds, count))
    for group in [pairs] if together else asked:
        names, told = zip(*group)
        asks = encode(question.format(", ".join(dict.fromkeys(names))))
        tells = encode(f" {', '.join(told)}.")
        ends += asks + tells
        answer += [0] * len(asks) + [1] * len(tells)
        values += told

    rows = []
    room = config.context - len(ends) - count * size
    while room > 0:
        text = form.format(draw(key, rng), draw(value, rng)) if of_needles else draw(hay, rng)
        if not any(name in text for name in keys):
            rows.append(encode(text))
            room -= len(rows[-1])
    require(len(rows) > 1, f"--context {config.context} is too short for {task}")
    places = sorted(rng.sample(range(1, len(rows) + count), count))
    for place, pair in zip(places, pairs):
        rows.insert(place, encode(form.format(*pair)))
    tokens = [*itertools.chain(*rows), *ends][-config.context:]     # the first row loses its front
    answer = [0] * (len(tokens) - len(ends)) + answer
    return np.array(tokens, np.uint16), np.array(answer, np.uint8), values


def write_niah(config):
    """Write train.bin and val.bin with their masks: samples one after another, as train.py reads
    them. Those for validation have negative numbers, as those of the evaluation have.
    """
    require(not os.path.exists(config.write), f"--write {config.write} exists: name a new folder")
    encode = encoder(config.tokenizer)
    n_val = max(2, config.samples // 20)
    for name, numbers in {"train": range(config.samples), "val": range(-n_val, 0)}.items():
        samples = [new_sample(number, config.tasks[number % len(config.tasks)], config, encode, 16)
                   for number in numbers]
        tokens, answers, _ = zip(*samples)
        os.makedirs(config.write, exist_ok=True)
        np.stack(tokens).astype("<u2").tofile(f"{config.write}/{name}.bin")
        np.stack(answers).tofile(f"{config.write}/{name}.mask.bin")
    print(f"{config.write}: {config.samples} samples for training and {n_val} for validation, for "
          f"train.py --tokenizer {config.tokenizer} --context {config.context}")


def retrieve(row, samples, config):
    """Mean share, in %, of the samples' values that the greedy continuation holds. Prompt and
    continuation together fill the context.
    """
    coder = Tokenizer(config.tokenizer)
    found = []
    for first in range(0, len(samples), config.eval_batch):
        tokens, answers, values = zip(*samples[first:first + config.eval_batch])
        n_new = int(answers[0].sum())                           # the same for all of a task
        idx = torch.tensor(np.stack(tokens)[:, :-n_new].astype(int))
        out = row.model.generate(move(idx, config), n_new, row.pattern, temperature=0)
        for told, new in zip(values, out[:, -n_new:].tolist()):
            text = b"".join(map(coder.bytes_of, new)).decode(errors="replace")
            found.append(np.mean([value in text for value in told]))
    return 100 * np.mean(found)


def retrieval(rows, config):
    """Print a table, a row as soon as it is known."""
    encode = encoder(config.tokenizer)
    require(Tokenizer(config.tokenizer).size <= config.vocab_size, "--tokenizer: the model's "
            "vocabulary is too small")
    tasks = []
    for task in config.tasks:
        tasks.append([new_sample(-1 - i, task, config, encode) for i in range(config.samples)])
    print("\n" + table_head(*LABEL, *config.tasks, "average"), flush=True)
    for row in rows:
        row.model.to(getattr(torch, config.dtype))              # a step then casts no weights
        found = [retrieve(row, samples, config) for samples in tasks]
        print(table_row(*row[:3], *map("{:.1f}".format, [*found, np.mean(found)])), flush=True)


# --------------------------------------------------------------------------------------------------
# Flags

def eval_flags():
    parser = new_parser(__doc__)
    add_data_flags(parser)
    flag = parser.add_argument
    which = parser.add_mutually_exclusive_group().add_argument
    which("--checkpoint", nargs="+", help="files to evaluate, without those beside them")
    which("--compare", nargs="+", help="the --out folders of several runs, side by side")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--reach", action="store_true", help="also the half-life of the decays, by layer")
    mode("--choices", nargs="+", help="files of items to score: .jsonl, .jsonl.xz or .jsonl.gz")
    mode("--niah", action="store_true", help="retrieval instead of the loss")
    flag("--pattern", nargs="+", type=pattern_flag, help="patterns beside D1 and a --checkpoint's "
         "own; default: all that were adapted, and W0")
    flag("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS][:8], help="of --niah; default: "
         "RULER's eight")
    flag("--samples", type=int, help="of --niah: of each task, 64; with --write in all, 16384")
    flag("--write", help="with --niah: a new folder for fine-tuning data")
    return parser


def main(argv=None):
    flags = eval_flags().parse_args(argv)
    require(flags.niah or not flags.write, "--write goes with --niah")
    if flags.write:
        dense = file_of("D1", flags.out)
        [path] = flags.checkpoint or [dense if os.path.exists(dense) else None]
        return write_niah(settle(path, argv)[0])
    config, rows = open_rows(argv)
    (retrieval if flags.niah else benchmarks if flags.choices else losses)(rows, config)


if __name__ == "__main__":
    run(main)
