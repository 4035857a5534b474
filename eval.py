"""
What sparsity costs and saves, a row a pattern. Or benchmarks (--choices), or retrieval (--niah).

  loss  = mean cross-entropy on validation windows; gap = loss - loss of the same model under D1
  keys  = keys that a query may attend to, mean over positions, layers and heads
  cache = bytes of the decoding cache after a window, per token of it
  read  = bytes of it that a decoding step reads, mean over the positions of a window
  reach = half-life of the recurrence in tokens, ln 2 / -ln a of a decay a, on validation text

`python eval.py` runs out/dense.pt under D1, W0 and each pattern that adapt.py left a file of beside
it, and these files. `--compare out out/attention` puts runs side by side, `--checkpoint out/D16.pt`
runs a file alone. Flags that are not typed are those of the training.

`--choices FILE.jsonl ...` scores items {"query": text, "choices": [texts], "gold": index}, one a
line, as lm-evaluation-harness does. `query` may be a list, one a choice. Texts may be lists of ids.

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
from train import (NOT_INHERITED, Tokenizer, add_data_flags, autocast, bits_per_byte, bytes_read,
                   bytes_per_token, evaluate, file_of, fingerprint, header, inherit, keys_per_token,
                   load_data, move, new_parser, note, pattern_flag, positions, run, use_device)


def print_row(*cells, head=False):
    """A row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    if head:
        print("|---" * len(cells) + "|", flush=True)


# ---- What is evaluated: a list of rows -----------------------------------------------------------

class Row(NamedTuple):
    pattern: Pattern
    weights: str        # dense; adapted: to this pattern; switched: trained for another one
    name: str           # of the model, such as RAT+ (out)
    model: RATPlus


LABEL = ["pattern", "weights", "model"]         # the columns of row[:3]


def rows_of(path, model, meta, config):
    """The Rows of a checkpoint: D1, its own pattern, and --pattern; by default W0 and all that
    adapt.py made from it. Other files beside it are left out, and that is said.
    """
    own = meta["pattern"]
    folder = os.path.dirname(path)
    name = f"{model.config.name} ({path if config.checkpoint else folder})"
    parents = fingerprint(model), meta.get("parent", "")        # fine-tuning keeps the parent
    beside = [] if config.checkpoint else glob.glob("*.pt", root_dir=folder)
    adapted = {}
    for other in sorted({*beside} - {"dense.pt"}):
        file = os.path.join(folder, other)
        try:
            found, about = load_checkpoint(file)
            pattern = about["pattern"]
            require(about.get("parent") in parents and file == file_of(pattern, folder),
                    f"{file} is no file that adapt.py made from {path}")
            adapted[pattern] = found
        except (ValueError, OSError) as error:
            note(f"left out: {error}")
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
    parser.set_defaults(tokenizer="bytes")              # of --write without a checkpoint
    config, model, meta = inherit(parser, argv, path, {*NOT_INHERITED, "pattern"})
    require(min(config.context, config.eval_windows, config.eval_batch) >= 1, "--context, "
            "--eval-windows and --eval-batch are at least 1")
    use_device(config)
    return config, model, meta


def open_rows(flags, argv):
    """(config, rows). ValueError if the runs can't be compared."""
    same = ["tokenizer", "vocab_size", "context"]
    if not (flags.choices or flags.niah):
        same += ["eval_windows", "data" if flags.data else "data_key"]
    first = None
    rows = []
    dense = [file_of("D1", out) for out in flags.compare or [flags.out]]
    for path in flags.checkpoint or dense:
        config, model, meta = settle(path, argv)
        first = first or config
        for name in same:
            mine = getattr(config, name)
            other = getattr(first, name)
            require(mine == other, f"{path} can't be compared with the runs before it: its {name} "
                    f"is {mine}, not {other}")
        header(model.to(config.device), config)
        rows += rows_of(path, model, meta, config)
    order = [row.pattern for row in rows]                       # D1 first, runs side by side
    return first, sorted(rows, key=lambda row: order.index(row.pattern))


# ---- Loss, cost, and reach of the recurrence -----------------------------------------------------

def costs(pattern, shape, T, dtype):
    """Keys per token, bytes of the cache per token, and bytes that a decoding step reads of it."""
    cache = Cache(shape, 1, T, pattern, dtype, torch.empty(0, device="meta"))   # takes no memory
    return keys_per_token(pattern, shape, T), cache.nbytes / T, bytes_read(cache, positions(T))


def losses(rows, config):
    """Print each loss at once, then the table and, with --reach, the half-lives."""
    _, val = load_data(config)
    per_byte = bytes_per_token(val)
    dtype = getattr(torch, config.dtype)
    dense = {}
    table = []
    for row in rows:
        loss = evaluate(row.model, val, row.pattern, config)
        print(f"{row.pattern} {row.weights}: loss {loss:.4f}", flush=True)
        keys, cache, read = costs(row.pattern, row.model.config, config.context, dtype)
        of_dense = dense.setdefault(row.name, (loss, cache, read))      # D1 comes first
        cells = {"keys per token": f"{keys:.1f}",
                 "cache bytes per token": f"{cache:.0f} ({cache / of_dense[1]:.1%})",
                 "bytes read per token": f"{read:.0f} ({read / of_dense[2]:.1%})",
                 "loss": f"{loss:.3f}",
                 "gap": f"{loss - of_dense[0]:+.3f}",
                 "perplexity": f"{torch.tensor(loss).exp():.2f}"}
        if per_byte:
            cells["bits per byte"] = f"{bits_per_byte(loss, per_byte):.3f}"
        table.append([*row[:3], *cells.values()])
    print()
    print_row(*LABEL, *cells, head=True)
    for cells in table:
        print_row(*cells)
    for row in rows[:len(dense)] if config.reach else []:       # D1 of each model
        if row.model.config.recurrence:
            reach(row, val, config)


@torch.no_grad()
def reach(row, val, config):
    """Print the half-lives of each layer, at every 16th position of --eval-batch windows."""
    found = []
    widths = row.model.blocks[0].mix.widths

    def keep(module, inputs, projected):
        *_, g = projected[:, ::16].float().cpu().split(widths, dim=-1)
        found.append(math.log(2) / F.softplus(-g))              # softplus(-g) = -ln a

    for block in row.model.blocks:
        block.mix.in_proj.register_forward_hook(keep)
    idx, _ = val.spread
    idx = idx[np.linspace(0, len(idx) - 1, min(len(idx), config.eval_batch)).astype(int)]
    with autocast(config):
        row.model(move(idx, config))
    cells = []
    for lives in (*found, torch.stack(found)):
        tenth, median, ninetieth = np.quantile(lives, [0.1, 0.5, 0.9])
        cells.append(f"{median:.1f} ({tenth:.1f} to {ninetieth:.1f})")
    print(f"\n{row.name}: half-life in tokens, median (10th to 90th percentile)\n")
    print_row("layer", *range(len(found)), "all", head=True)
    print_row("half-life", *cells)


# ---- Benchmarks: which choice is the likeliest after a query -------------------------------------

def read_item(line, coder, config):
    """(choices, sizes, gold) of a line. Exceptions of any kind if it is bad.

    choices: [(tokens of query and choice, how many of them are the choice's)]. Both are encoded at
    once, as a tokenizer may join them. Blanks between them count as the choice's. An empty query
    becomes end-of-text. sizes: of the choices, in characters or tokens.
    """
    item = json.loads(line)
    queries, texts, gold = item["query"], item["choices"], item["gold"]
    if not queries or isinstance(queries, str) or isinstance(queries[0], int):
        queries = [queries] * len(texts)
    right = type(texts) is list and type(gold) is int and gold in range(len(texts))
    require(right and len(queries) == len(texts) and all(texts), "gold is not the index of one of "
            "the choices, a choice is empty, or there is not one query for each")
    V = config.vocab_size
    choices = []
    for query, choice in zip(queries, texts):
        if isinstance(query, str):
            start = len(coder.encode(query.rstrip()))
            tokens = [*map(int, coder.encode(query + " " + choice))]
        else:
            start = len(query)
            tokens = query + choice
        n = len(tokens) - start
        tokens = tuple(tokens if start else [coder.eot, *tokens])
        require(all(type(token) is int and 0 <= token < V for token in tokens), "a token is none "
                f"of the model's {V}, or the query is empty and --eot not given")
        choices.append((tokens, n))
    return choices, [*map(len, texts)], gold


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
    except Exception as error:                  # whatever json, gzip, lzma and read_item raise
        raise ValueError(f"{path}, line {number}: {error!r}") from error
    if cut or len(items) < number:
        note(f"{path}: --context {T} is too short for the queries of {cut} items, which lose their "
             f"front, and for choices of {number - len(items)} items, which are left out")
    require(items, f"{path}: no items for --context {T}")
    return items


@torch.no_grad()
def score(row, items, config):
    """acc (0 or 1), norm and ll of each item, (n, 3). Equal choices are scored once, so that
    rounding can't tell them apart.
    """
    choices = {choice for item in items for choice in item[0]}
    left = sorted(choices, key=lambda choice: -len(choice[0]))
    scores = {}                                 # ll, and is each of the tokens the likeliest
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
        counts = [n for _, n in batch]
        lls = -F.cross_entropy(logits, y, reduction="none").double().cpu()
        likeliest = (logits.argmax(-1) == y).cpu()
        for choice, ll, each in zip(batch, lls.split(counts), likeliest.split(counts)):
            scores[choice] = ll.sum().item(), each.all().item()
    found = []
    for choices, sizes, gold in items:
        lls, likeliest = np.array([scores[choice] for choice in choices]).T
        may_win = len(lls) > 1 or likeliest[0]
        acc = may_win and lls.argmax() == gold                  # of equal ones, the first
        norm = may_win and (lls / sizes).argmax() == gold
        found.append((acc, norm, lls[gold]))
        require(np.isfinite(lls).all(), f"{row.pattern} {row.weights}: a log-probability is not "
                "finite, the weights are of no use")
    return np.array(found, dtype=float)


def choices_cell(items, found, dense):
    """The text for what `score` found, and under D1 `dense`, from which a delta is counted."""
    acc, norm, ll = found.T
    values = 100 * np.stack((acc, norm, acc - dense[:, 0]))
    means = values.mean(1)
    errors = values.std(1) / math.sqrt(max(1, len(items) - 1))
    text = f"{means[0]:.1f} ± {errors[0]:.1f}"
    single = all(len(choices) == 1 for choices, *_ in items)
    ppl = torch.tensor(-ll.mean()).exp()                # inf where it is too large for a float
    text += f", ppl {ppl:.4g}" if single else f" / {means[1]:.1f}"
    return text if found is dense else f"{text} ({means[2]:+.1f} ± {errors[2]:.1f})"


def benchmarks(rows, config):
    """Print a table, a row as soon as it is known."""
    coder = Tokenizer(config.tokenizer, config.eot)
    tasks = {path: read_items(path, coder, config) for path in config.choices}
    print("\nacc in % ± its standard error / norm, or ppl (delta)\n")
    names = [os.path.basename(path).split(".jsonl")[0] for path in tasks]
    print_row(*LABEL, *names, head=True)
    dense = {}                                          # by model and file; D1 comes first
    for row in rows:
        cells = []
        for path, items in tasks.items():
            found = score(row, items, config)
            of_dense = dense.setdefault((row.name, path), found)
            cells.append(choices_cell(items, found, of_dense))
        print_row(*row[:3], *cells)


# ---- Retrieval: values hidden in a long text -----------------------------------------------------
#
# In the eight forms of RULER, in words of our own:
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
NOISE = " The rain falls. The wind turns. The lamp is lit."
PROSE = " The {a} {c} is near a {b} {d}."
WORDS = "{a}-{c}"
TASKS = {       # haystack (None: other needles); key and value; how many keys, values of each
    "single-1": (NOISE, WORDS, "{number}", 1, 1),
    "single-2": (PROSE, WORDS, "{number}", 1, 1),
    "single-3": (PROSE, WORDS, "{uuid}", 1, 1),
    "multikey-1": (PROSE, WORDS, "{number}", 4, 1),
    "multikey-2": (None, WORDS, "{number}", None, 1),
    "multikey-3": (None, "{uuid}", "{uuid}", None, 1),
    "multivalue": (PROSE, WORDS, "{number}", 1, 4),
    "multiquery": (PROSE, WORDS, "{number}", 4, 1),             # one question asks for all keys
    "recall": (None, WORDS, "{number}", None, 1),               # bare pairs: the simplest
}
PIECE = re.compile(" ?[A-Z]?[a-z]+|.", re.DOTALL)       # a word, or another character by itself


def encoder(config):
    """The function text -> list of tokens, for the texts of samples. A digit is a token, as in
    Llama's tokenizer. So is each letter of a uuid, as those are capitals.
    """
    coder = Tokenizer(config.tokenizer)
    V = config.vocab_size or math.inf
    require(coder.size and coder.size <= V, "--niah writes text, which needs --tokenizer bytes or "
            "gpt2 and a model with that vocabulary")
    of_piece = functools.cache(lambda piece: [*map(int, coder.encode(piece))])
    return lambda text: sum(map(of_piece, PIECE.findall(text)), [])


def draw(form, rng):
    """A sentence, a key or a value of a form."""
    words = dict(zip("abcd", rng.choices(ADJECTIVES, k=2) + rng.choices(NOUNS, k=2)))
    uuid = f"{rng.getrandbits(128):032X}"
    return form.format(**words, number=rng.randrange(10**6, 10**7), uuid=uuid)


def new_sample(number, task, config, encode):
    """A numbered sample, the same for the same seed: a haystack, needles in it, a question (up to
    16 for training, where number >= 0), each with its answer after it. (2, --context) uint16: the
    tokens, and 1 on those of answers, else 0. ValueError if there is no room.
    """
    hay, key, value, n_keys, n_values = TASKS[task]
    rng = random.Random(f"{config.seed} {number}")
    form, question = (" {} {}.", " {}") if task == "recall" else (" Safe {}: {}.", "\nOpen {}:")
    needle = form.format(key, value)
    size = len(encode(draw(needle, rng)))
    most = min(16, config.context // (3 * size)) if number >= 0 else 1
    n_asked = rng.randint(1, max(1, most))
    n_keys = n_keys or n_asked
    keys = []
    while len(keys) < n_keys:
        keys = list(dict.fromkeys([*keys, draw(key, rng)]))
    pairs = [(name, draw(value, rng)) for name in keys for _ in range(n_values)]

    ends = []
    asked = [[name] for name in rng.sample(keys, min(n_asked, n_keys))]
    for names in [keys] if task == "multiquery" else asked:
        told = ", ".join(text for name, text in pairs if name in names)
        ends += [(token, 0) for token in encode(question.format(", ".join(names)))]
        ends += [(token, 1) for token in encode(f" {told}.")]

    rows = []
    room = config.context - len(ends) - len(pairs) * size
    while room > 0:
        text = draw(hay or needle, rng)
        if not any(name in text for name in keys):
            rows.append(encode(text))
            room -= len(rows[-1])
    require(len(rows) > 1, f"--context {config.context} is too short for {task}")
    places = sorted(rng.sample(range(1, len(rows) + len(pairs)), len(pairs)))
    for place, pair in zip(places, pairs):
        rows.insert(place, encode(form.format(*pair)))
    marked = [(token, 0) for row in rows for token in row] + ends
    return np.array(marked[-config.context:], np.uint16).T          # the first row loses its front


def write_niah(config):
    """Write train.bin and val.bin with their masks, as train.py reads them: samples one after
    another, for validation of negative numbers, as in `retrieval`.
    """
    require(not os.path.exists(config.write), f"--write {config.write} exists: name a new folder")
    encode = encoder(config)
    n_train = config.samples or 16384
    n_val = max(2, n_train // 20)
    for name, numbers in {"train": range(n_train), "val": range(-n_val, 0)}.items():
        samples = [new_sample(number, config.tasks[number % len(config.tasks)], config, encode)
                   for number in numbers]
        os.makedirs(config.write, exist_ok=True)
        tokens, answers = np.stack(samples, axis=1)
        tokens.astype("<u2").tofile(f"{config.write}/{name}.bin")
        answers.astype("u1").tofile(f"{config.write}/{name}.mask.bin")
    print(f"{config.write}: {n_train} samples for training and {n_val} for validation, for "
          f"train.py --tokenizer {config.tokenizer} --context {config.context}")


def retrieve(row, samples, config):
    """Mean share, in %, of the values in a sample's answer that the greedy continuation holds.
    samples: (n, 2, --context) of one task, whose answers are equally long.
    """
    coder = Tokenizer(config.tokenizer)
    n_new = int(samples[0, 1].sum())
    found = []
    for idx in torch.from_numpy(samples[:, 0].astype(int)).split(config.eval_batch):
        out = row.model.generate(move(idx[:, :-n_new], config), n_new, row.pattern, temperature=0)
        for answer, new in zip(idx[:, -n_new:].tolist(), out[:, -n_new:].tolist()):
            answer, new = ("".join(map(coder.decode, tokens)) for tokens in (answer, new))
            found.append(np.mean([value in new for value in re.findall(r"\w+", answer)]))
    return 100 * np.mean(found)


def retrieval(rows, config):
    """Print a table, a row as soon as it is known."""
    encode = encoder(config)
    tasks = []
    for task in config.tasks:
        samples = [new_sample(-1 - i, task, config, encode) for i in range(config.samples or 64)]
        tasks.append(np.stack(samples))
    print()
    print_row(*LABEL, *config.tasks, "average", head=True)
    for row in rows:
        row.model.to(getattr(torch, config.dtype))              # a step then casts no weights
        found = [retrieve(row, samples, config) for samples in tasks]
        print_row(*row[:3], *map("{:.1f}".format, [*found, np.mean(found)]))


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
    flag("--pattern", nargs="+", type=pattern_flag, help="default: all that were adapted, and W0")
    flag("--tasks", nargs="+", choices=[*TASKS], default=[*TASKS][:8], help="of --niah; default: "
         "RULER's eight")
    flag("--samples", type=int, help="of --niah: of each task, 64; with --write in all, 16384")
    flag("--write", help="with --niah: a new folder for fine-tuning data")
    return parser


def main(argv=None):
    flags = eval_flags().parse_args(argv)
    require(flags.niah or not flags.write, "--write goes with --niah")
    require(flags.samples is None or flags.samples >= 1, "--samples is at least 1")
    if flags.write:
        dense = file_of("D1", flags.out)
        [path] = flags.checkpoint or [dense if os.path.exists(dense) else None]
        return write_niah(settle(path, argv)[0])
    config, rows = open_rows(flags, argv)
    (retrieval if flags.niah else benchmarks if flags.choices else losses)(rows, config)


if __name__ == "__main__":
    run(main)
