"""
What sparsity costs and saves, a row a pattern. Or benchmarks (--choices), or retrieval (--niah).

  loss  = mean cross-entropy on validation windows; gap = loss - loss of the model's D1 row
  keys  = keys that a query may attend to, mean over positions, layers and heads
  cache = bytes of the decoding cache after a window, per token of it
  read  = bytes of it that a decoding step reads, mean over the positions of a window
  reach = half-life of the recurrence in tokens, ln 2 / -ln a of a decay a, on validation text

`python eval.py` runs out/dense.pt under D1, W0 and each pattern that adapt.py left a file of beside
it, and these files. `--compare out out/attention` puts runs side by side, `--checkpoint out/D16.pt`
runs a file alone. Flags that are not typed are those of the training.

`--choices FILE.jsonl ...` scores items {"query": text, "choices": [texts], "gold": index}, one a
line, as lm-evaluation-harness does. `query` may be a list, one a choice.

  ll    = sum of the log-probabilities of the tokens of " " + choice, after the query
  acc   = share of items whose gold choice has the largest ll; of equal ones the first counts
  norm  = the same with ll / characters
  delta = acc - acc of the model's D1 row; its standard error is of the differences by item
  With one choice: acc = share where each token is the likeliest, ppl = exp(-mean ll) of a choice

`--niah` counts the values hidden in a text that the greedy continuation holds. To teach a model:
`--niah --write niah`, then `python train.py --checkpoint out/dense.pt --data niah --out out/niah`.
"""
import functools
import gzip
import json
import lzma
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import Cache, Pattern, load_checkpoint, require
from train import (NOT_INHERITED, Tokenizer, add_data_flags, autocast, bits_per_byte,
                   bytes_per_token, bytes_read, check, evaluate, file_of, fingerprint, header,
                   inherit, keys_per_token, load_data, made_from, move, new_parser, note,
                   pattern_flag, positions, run)

LABEL = ["pattern", "weights", "model"]                     # the first columns of a table
NOT_DEFAULTS = {*NOT_INHERITED, "pattern"}                  # of the flags that checkpoints hold


def print_row(*cells, head=False):
    """A row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    if head:
        print("|---" * len(cells) + "|", flush=True)


# ---- What is evaluated: a list of rows -----------------------------------------------------------

def rows_of(path, model, meta, config):
    """[(pattern, weights, name, model)]: D1, the checkpoint's pattern, then --pattern, or else what
    adapt.py made and W0. weights: dense or adapted if trained for the pattern, else switched.
    """
    own = meta["pattern"]
    folder = os.path.dirname(path)
    name = f"{model.config.name} ({path if config.checkpoint else folder})"
    beside = [] if config.checkpoint else Path(folder).glob("[!.]*.pt")
    dense = fingerprint(model)
    adapted = {}
    for file in sorted({*beside} - {Path(path)}):
        try:
            found, about = load_checkpoint(file)
            pattern = about["pattern"]
            right = made_from(about, dense, meta) and file.name == file_of(pattern, "")
            require(right, f"{file} is no file that adapt.py made from {path}")
            adapted[pattern] = found
        except (ValueError, OSError) as error:
            note(f"left out: {error}")
    rows = []
    for text in dict.fromkeys(["D1", own, *(config.pattern or [*adapted, "W0"])]):
        pattern = Pattern.parse(text).check(model.config)
        weights = "switched" if text != own else "dense" if text == "D1" else "adapted"
        rows.append((pattern, weights, name, model))
        if text in adapted:
            rows.append((pattern, "adapted", name, adapted[text].to(config.device)))
    return rows


# ---- Loss, cost, and reach of the recurrence -----------------------------------------------------

def losses(rows, config):
    """Print each loss at once, then the table and, with --reach, the half-lives."""
    _, val = load_data(config)
    per_byte = bytes_per_token(val) or math.nan
    T = config.context
    nowhere = torch.empty(0, device="meta")                     # caches that take no memory
    dense = {}
    table = []
    for pattern, weights, name, model in rows:
        loss = evaluate(model, val, pattern, config)
        print(f"{pattern} {weights}: loss {loss:.4f}", flush=True)
        cache = Cache(model.config, 1, T, pattern, getattr(torch, config.dtype), nowhere)
        size = cache.nbytes / T
        read = bytes_read(cache, positions(T))
        of_dense = dense.setdefault(name, (loss, size, read))           # D1 comes first
        cells = {"keys per token": f"{keys_per_token(pattern, model.config, T):.1f}",
                 "cache bytes per token": f"{size:.0f} ({size / of_dense[1]:.1%})",
                 "bytes read per token": f"{read:.0f} ({read / of_dense[2]:.1%})",
                 "loss": f"{loss:.3f}",
                 "gap": f"{loss - of_dense[0]:+.3f}",
                 "perplexity": f"{torch.tensor(loss).exp():.2f}",
                 "bits per byte": f"{bits_per_byte(loss, per_byte):.3f}"}
        table.append([pattern, weights, name, *cells.values()])
    print()
    print_row(*LABEL, *cells, head=True)
    for row in table:
        print_row(*row)
    for _, _, name, model in rows[:len(dense)]:                         # D1 of each model
        if config.reach and model.config.recurrence:
            reach(name, model, val, config)


def reach(name, model, val, config):
    """Print the half-lives of each layer, at every 16th position of the validation windows."""
    lives = {block.mix.in_proj: [] for block in model.blocks}

    def keep(module, inputs, projected):
        *_, g = projected[:, ::16].split(model.blocks[0].mix.widths, dim=-1)
        lives[module].append(math.log(2) / F.softplus(-g.float().cpu()))    # softplus(-g) = -ln a

    for module in lives:
        module.register_forward_hook(keep)
    evaluate(model, val, "D1", config)
    cells = []
    for found in lives.values():
        tenth, median, ninetieth = np.quantile(torch.cat(found), [0.1, 0.5, 0.9])
        cells.append(f"{median:.1f} ({tenth:.1f} to {ninetieth:.1f})")
    print(f"\n{name}: half-life in tokens, median (10th to 90th percentile)\n")
    print_row("layer", *range(len(cells)), head=True)
    print_row("half-life", *cells)


# ---- Benchmarks: which choice is the likeliest after a query -------------------------------------

def read_item(line, coder, config):
    """(choices, gold) of a line, or any exception. choices: [(tokens of query and choice, where the
    choice's begin, its characters)]. Blanks between them count as the choice's. An empty query
    becomes end-of-text, and one that is too long for the context loses its front.
    """
    item = json.loads(line)
    queries, texts, gold = item["query"], item["choices"], item["gold"]
    require(type(texts) is list and all(texts), "choices is no list, or one of them is empty")
    require(type(gold) is int and 0 <= gold < len(texts), "gold is no index of the choices")
    if type(queries) is str:
        queries = [queries] * len(texts)
    choices = []
    for query, text in zip(queries, texts, strict=True):
        before = [*map(int, coder.encode(query.rstrip()))]
        after = [*map(int, coder.encode(query + " " + text))][len(before):]
        tokens = (before or [coder.eot]) + after
        require(after and min(tokens) >= 0 and max(tokens) < config.vocab_size, "a choice has no "
                "token, a token is none of the model's, or the query is empty and --eot not given")
        tokens = tuple(tokens[-config.context - 1:])
        choices.append((tokens, len(tokens) - len(after), len(text)))
    return choices, gold


def read_items(path, coder, config):
    """The items of a file whose choices fit the context. ValueError names a bad line."""
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path[-3:], open)
    items = []
    number = full = 0
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                choices, gold = read_item(line, coder, config)
                if min(start for _, start, _ in choices) > 0:       # each has a token before it
                    items.append((choices, gold))
                    full += max(len(tokens) for tokens, *_ in choices) > config.context
    except Exception as error:                  # whatever json, gzip, lzma and read_item raise
        raise ValueError(f"{path}, line {number}: {error!r}") from error
    if full or len(items) < number:
        note(f"{path}: {full} items fill --context {config.context}, so their queries may lack "
             f"their front; {number - len(items)} whose choice alone is too long are left out")
    require(items, f"{path}: no items for --context {config.context}")
    return items


@torch.no_grad()
def score(model, pattern, items, config):
    """acc (0 or 1), norm and ll of each item, (n, 3)."""
    choices = {choice for item in items for choice in item[0]}      # equal ones get equal scores
    left = sorted(choices, key=lambda choice: -len(choice[0]))
    scores = {}                     # ll, ll / characters, and is each of the tokens the likeliest
    while left:
        size = max(1, config.eval_batch * config.context // len(left[0][0]))
        batch, left = left[:size], left[size:]
        idx = pad_sequence([torch.tensor(tokens) for tokens, *_ in batch], True)
        counted = [torch.arange(len(tokens)) >= start for tokens, start, _ in batch]
        counted = pad_sequence(counted, True)[:, 1:]
        y = move(idx[:, 1:][counted], config)
        with autocast(config):                                  # logits where they count only
            x = model.hidden(move(idx[:, :-1], config), pattern)
            logits = model.head(x[move(counted, config)]).float()
        counts = counted.sum(1).tolist()
        lls = -F.cross_entropy(logits, y, reduction="none").double().cpu()
        likeliest = (logits.argmax(-1) == y).cpu()
        require(lls.isfinite().all(), f"{pattern}: a log-probability is not finite")
        for choice, each, right in zip(batch, lls.split(counts), likeliest.split(counts)):
            ll = each.sum().item()
            scores[choice] = ll, ll / choice[2], right.all().item()
    found = []
    for choices, gold in items:
        table = np.array([scores[choice] for choice in choices])    # (choices, 3)
        acc, norm, _ = table.argmax(0) == gold
        if len(choices) == 1:                                   # it must be greedy text
            acc = norm = table[0, 2]
        found.append((acc, norm, table[gold, 0]))
    return np.array(found, dtype=float)


def choices_cell(items, found, dense):
    """A cell. found, dense: what `score` gave for this row, and for the model's D1 row."""
    acc, norm, ll = found.T
    delta = acc - dense[:, 0]
    scale = 100 / max(1, len(acc) - 1) ** 0.5           # makes a deviation a standard error in %
    ppl = torch.tensor(-ll.mean()).exp()                # inf where it is too large for a float
    single = all(len(choices) == 1 for choices, _ in items)
    text = f"{100 * acc.mean():.1f} ± {scale * acc.std():.1f}"
    text += f", ppl {ppl:.4g}" if single else f" / {100 * norm.mean():.1f}"
    more = f" ({100 * delta.mean():+.1f} ± {scale * delta.std():.1f})"
    return text if found is dense else text + more


def benchmarks(rows, config):
    """Print a table, a row as soon as it is known."""
    coder = Tokenizer(config.tokenizer, config.eot)
    tasks = {path: read_items(path, coder, config) for path in config.choices}
    print("\nacc in % ± its standard error / norm, or ppl (delta)\n")
    print_row(*LABEL, *map(os.path.basename, tasks), head=True)
    dense = {}                                          # by model and file; D1 comes first
    for *label, model in rows:
        cells = []
        for path, items in tasks.items():
            found = score(model, label[0], items, config)
            of_dense = dense.setdefault((label[2], path), found)
            cells.append(choices_cell(items, found, of_dense))
        print_row(*label, *cells)


# ---- Retrieval: values hidden in a long text -----------------------------------------------------
#
# In the eight forms of RULER, in words of our own. A needle is a key and its value, a question the
# key alone. The text around them is the haystack:
#   The river and the stone wait for the rain. Safe magic-cloud: 7154321. The ... Safe magic-cloud:

# A name has five letters and is one GPT-2 token. So all needles of a kind are equally long.
NAMES = """angel apple beard blade books boxes brain bread brush cards chain chair clock cloth cloud
    cream dream dress field flame floor fruit ghost glass grass heart horse house image knife magic
    metal money mouse night paper phone plane plant radio river shell shirt stone storm""".split()
NOISE = " The rain falls. The wind turns. The lamp is lit."
PROSE = " The {a} and the {b} wait for the rain."
KEY = " Safe {a}-{b}:"
TASKS = {       # haystack (None: other needles), key and value; how many keys, values of each
    "single-1": (NOISE, KEY, " {number}", 1, 1),
    "single-2": (PROSE, KEY, " {number}", 1, 1),
    "single-3": (PROSE, KEY, " {uuid}", 1, 1),
    "multikey-1": (PROSE, KEY, " {number}", 4, 1),
    "multikey-2": (None, KEY, " {number}", 4, 1),
    "multikey-3": (None, " Safe {uuid}:", " {uuid}", 1, 1),
    "multivalue": (PROSE, KEY, " {number}", 1, 4),
    "multiquery": (PROSE, KEY, " {number}", 4, 1),              # one question asks for all keys
    "recall": (None, " {a}-{b}", " {number}", 4, 1),            # bare pairs: the simplest
}
PIECE = re.compile(" ?[A-Z]?[a-z]+|.")      # a word, or a character: digits are encoded one by one


def draw(form, rng):
    """A sentence, a key or a value of a form."""
    a, b = rng.choices(NAMES, k=2)
    number = rng.randrange(10**6, 10**7)
    return form.format(a=a, b=b, number=number, uuid=f"{rng.getrandbits(128):032X}")


def new_sample(number, config, encode):
    """(2, --context): tokens, and 1 on those of answers, else 0. Needles in a haystack, then a
    question and its answer. A training sample, number >= 0, asks for every key.
    """
    task = config.tasks[number % len(config.tasks)]
    hay, key, value, n_keys, n_values = TASKS[task]
    rng = random.Random(f"{config.seed} {number}")
    needle = key + value + "."
    size = len(encode(draw(needle, rng)))
    values = {}                                             # of each key
    while len(values) < n_keys:
        values[draw(key, rng)] = [draw(value, rng) for _ in range(n_values)]
    needles = [name + each + "." for name in values for each in values[name]]
    order = rng.sample([*values], n_keys)
    asked = [[*values]] if task == "multiquery" else [[name] for name in order]     # by question
    ends = []
    for names in asked if number >= 0 else asked[:1]:
        told = [each for name in names for each in values[name]]
        ends += [(token, 0) for token in encode("".join(names))]
        ends += [(token, 1) for token in encode(",".join(told) + ".")]
    rows = []
    room = config.context - len(ends) - len(needles) * size
    while room > 0:
        text = draw(hay or needle, rng)
        if not any(name in text for name in values):
            rows.append(encode(text))
            room -= len(rows[-1])
    require(rows, f"--context {config.context} is too short for {task}")
    places = sorted(rng.sample(range(1, len(rows) + len(needles)), len(needles)))
    for place, text in zip(places, needles):
        rows.insert(place, encode(text))
    marked = [(token, 0) for row in rows for token in row] + ends
    return np.array(marked[-config.context:], np.uint16).T  # the first row loses its front


def new_samples(numbers, config):
    """(n, 2, --context) uint16: samples, the same for the same seed, of the tasks in turn."""
    coder = Tokenizer(config.tokenizer)
    V = config.vocab_size or math.inf
    require(coder.size and coder.size <= V, "--niah writes text, which needs --tokenizer bytes or "
            "gpt2 and a model with that vocabulary")
    of_piece = functools.cache(lambda piece: [*map(int, coder.encode(piece))])

    def encode(text):
        return [token for piece in PIECE.findall(text) for token in of_piece(piece)]

    return np.stack([new_sample(number, config, encode) for number in numbers])


def write_niah(config):
    """Write samples one after another, and their masks, as train.py reads them."""
    require(not os.path.exists(config.write), f"--write {config.write} exists: name a new folder")
    n = config.samples or 16384
    train = new_samples(range(n), config)
    val = new_samples(range(-max(2, n // 20), 0), config)
    os.makedirs(config.write)
    for name, samples in ("train", train), ("val", val):
        samples[:, 0].astype("<u2").tofile(f"{config.write}/{name}.bin")
        samples[:, 1].astype("u1").tofile(f"{config.write}/{name}.mask.bin")
    print(f"{config.write} is for --tokenizer {config.tokenizer} --context {config.context}")


def retrieve(model, pattern, samples, config):
    """Mean share, in %, of the values in the answers (n, 2, T) that greedy continuations hold."""
    coder = Tokenizer(config.tokenizer)
    n_new = int(samples[0, 1].sum())                        # equally many in all of a task
    found = []
    for idx in torch.from_numpy(samples[:, 0].astype(int)).split(config.eval_batch):
        out = model.generate(move(idx[:, :-n_new], config), n_new, pattern, temperature=0)
        for tokens in zip(idx[:, -n_new:].tolist(), out[:, -n_new:].tolist()):
            answer, new = ("".join(map(coder.decode, each)) for each in tokens)
            found.append(np.mean([value in new for value in re.findall(r"\w+", answer)]))
    return 100 * np.mean(found)


def retrieval(rows, config):
    """Print a table, a row as soon as it is known."""
    n = len(config.tasks)
    samples = new_samples(range(-n * (config.samples or 64), 0), config)
    tasks = [samples[i::n] for i in range(n)]
    print()
    print_row(*LABEL, *config.tasks, "average", head=True)
    for *label, model in rows:
        model.to(getattr(torch, config.dtype))                  # a step then casts no weights
        found = [retrieve(model, label[0], part, config) for part in tasks]
        print_row(*label, *map("{:.1f}".format, [*found, np.mean(found)]))


def eval_flags():
    parser = new_parser(__doc__)
    add_data_flags(parser)
    parser.set_defaults(tokenizer="bytes")              # of --write without a checkpoint
    flag = parser.add_argument
    which = parser.add_mutually_exclusive_group().add_argument
    which("--checkpoint", nargs="+", help="files to evaluate, without those beside them")
    which("--compare", nargs="+", help="the --out folders of several runs, side by side")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--reach", action="store_true", help="also the half-life of the decays, by layer")
    mode("--choices", nargs="+", help="files of items to score: .jsonl, .jsonl.xz or .jsonl.gz")
    mode("--niah", action="store_true", help="retrieval instead of the loss")
    flag("--pattern", nargs="+", type=pattern_flag, help="default: all that were adapted, and W0")
    flag("--tasks", nargs="+", choices=TASKS, default=[*TASKS][:8], help="default: RULER's eight")
    flag("--samples", type=int, help="of --niah: of each task, 64; with --write in all, 16384")
    flag("--write", help="with --niah: a new folder for fine-tuning data")
    return parser


def main(argv=None):
    flags = eval_flags().parse_args(argv)
    paths = flags.checkpoint or [file_of("D1", out) for out in flags.compare or [flags.out]]
    require(flags.niah or not flags.write, "--write goes with --niah")
    if flags.write:
        known = flags.checkpoint or os.path.exists(paths[0])
        config, *_ = inherit(eval_flags(), argv, paths[0] if known else None, NOT_DEFAULTS)
        return write_niah(config)
    same = ["tokenizer", "vocab_size", "context"]               # else nothing can be compared
    if not (flags.choices or flags.niah):
        same += ["eval_windows", "data" if flags.data else "data_key"]
    first = None
    rows = []
    for path in paths:
        config, model, meta = inherit(eval_flags(), argv, path, NOT_DEFAULTS)
        check(config)
        first = first or config
        mine = {name: getattr(config, name) for name in same}
        wanted = {name: getattr(first, name) for name in same}
        require(mine == wanted, f"{path} can't be compared with {paths[0]}: {mine}, not {wanted}")
        header(model.to(config.device), config)
        rows += rows_of(path, model, meta, config)
    order = [pattern for pattern, *_ in rows]                   # D1 first, runs side by side
    rows.sort(key=lambda row: order.index(row[0]))
    (retrieval if flags.niah else benchmarks if flags.choices else losses)(rows, first)


if __name__ == "__main__":
    run(main)
