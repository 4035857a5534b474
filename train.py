"""
Dense pretraining of RAT+ with active recurrence learning (ARL).

With dense attention at hand the recurrence stays lazy: it learns a reach of a few tokens, too short to stand in for the
positions that a dilation skips. So every batch is used twice, each time for a full optimizer update:

  theta <- AdamW(theta, gradient of loss(batch; theta, D64))      sparse: a lazy recurrence hurts here      (6)
  theta <- AdamW(theta, gradient of loss(batch; theta, D1))       dense: and attention stays able

  code            paper
  arl             joint training; its pattern is the training dilation, D64
  recurrence      False, --no-recurrence: the attention-only baseline; --arl is none then, unless given
  context         sequence length T

`python train.py` trains the laptop preset on the source of Python's own standard library, as bytes, without a network;
`python train.py --checkpoint out/D16.pt --data niah --out out/niah` teaches out/D16.pt, under D16, the prompts of eval.py --niah;
`torchrun --nproc-per-node=2 train.py` trains on two GPUs, with the same batches and, but for rounding, the same losses.
A flag that is given wins over the preset's recipe, and that over the default named in --help.
Data, tokenizers and the command-line helper live here too; adapt.py, eval.py and sample.py import them.
"""
import argparse
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import time
import typing
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kernels
from model import PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint, save_checkpoint

# ---------------------------------------------------------------------------------------------
# Training

def schedule(step, config):
    """Learning rate of a step: linear warm-up over the first `warmup` share of the steps, then cosine to min_lr."""
    ramp = int(config.warmup * config.steps)
    if step < ramp:
        return config.lr * (step + 1) / ramp
    fall = math.pi * (step - ramp) / max(1, config.steps - ramp)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(fall)) / 2


def new_optimizer(model, config):
    """AdamW, fused, with decay on all parameters as in the authors' code."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)


def move(z, config):
    """z on the device of the flags; on its way to a GPU in pinned memory, so that the host need not wait for the copy."""
    return z.contiguous().pin_memory().to(config.device, non_blocking=True) if config.gpu else z.to(config.device)


def autocast(config):
    """A context in which models compute in the dtype of the flags; their weights stay float32."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16")


class Loss(torch.nn.Module):
    """model.loss in the compute dtype of the flags, as a module: what DDP wraps."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, idx, targets, pattern):
        with autocast(self.config):
            return self.model.loss(idx, targets, pattern)


def trainable(model, config):
    """The Loss to train with, by the flags: its blocks compiled, checkpointed, its gradients averaged over the processes."""
    model.checkpointing, loss_fn = config.checkpointing, Loss(model, config)
    if config.compile:
        torch._dynamo.config.optimize_ddp = False               # DDP need not cut through the graph of a block
        torch._dynamo.config.recompile_limit = 64               # graphs: one for each rule of the patterns and each shape
        model.compile(dynamic=False)
    return DistributedDataParallel(loss_fn, gradient_as_bucket_view=True) if WORLD > 1 else loss_fn


def share(idx, targets, config):
    """This process's parts of a batch, on its device: [(idx, targets, weight)], weight being the part's share of the
    targets that count. The weighted losses of all parts add up to the batch's, whatever the parts and processes."""
    n, count = WORLD * config.grad_accum, (targets != -100).sum().clamp(min=1)
    mine = list(zip(idx.chunk(n), targets.chunk(n)))[RANK::WORLD]
    return [(move(x, config), move(y, config), ((y != -100).sum() / count).item()) for x, y in mine]


def update(loss_fn, optimizer, parts, pattern, clip):
    """One optimizer update on the `share` of a batch under one pattern. Returns this process's part of the loss (nats
    per token) and the gradient norm, still on the device."""
    total = 0.0
    for i, (idx, targets, weight) in enumerate(parts, 1):
        with loss_fn.no_sync() if WORLD > 1 and i < len(parts) else contextlib.nullcontext():
            loss = loss_fn(idx, targets, pattern) * weight
            (loss * WORLD).backward()                           # DDP takes the mean over processes, the batch wants the sum
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(loss_fn.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def fit(model, config, passes, batch, optimizer, first=0, due=lambda step: False):
    """Train for steps first..config.steps - 1. Yield a record after the first step, at log points, the last step, and
    where due(steps done): steps done, loss per pass, lr, norm, then ms, tokens/s and MFU since the last record, ETA.

    passes: the patterns of (6) in order, each a full update on the same batch. batch(step) -> idx, targets.
    The host runs ahead of the device and waits for it only to make a record. ValueError then if a loss or a norm is not
    finite (weights that are once lost stay so: a look at each record misses nothing), or if the gradient is zero; no caller
    saves the weights without a record.
    """
    loss_fn, losses, peak = trainable(model, config), {}, peak_flops(config)
    tokens, flops = config.batch_size * config.context, flops_per_token(model.config, passes, config.context)
    start, steps, parts = time.perf_counter(), 0, share(*batch(first), config)
    for step in range(first, config.steps):
        lr, steps = schedule(step, config), steps + 1
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in passes:
            losses[str(p)], norm = update(loss_fn, optimizer, parts, p, config.clip)
        done = step + 1
        if done < config.steps:
            parts = share(*batch(done), config)                 # while the device is at work
        if not (due(done) or step == first or done % config.log_interval == 0 or done == config.steps):
            continue
        *values, norm = summed(torch.stack((*losses.values(), norm / WORLD)).double().cpu()).tolist()
        seconds = (time.perf_counter() - start) / steps
        if not all(map(math.isfinite, (*values, norm))) or norm == 0:
            raise ValueError(f"training stopped: loss {values[-1]}, gradient norm {norm} at step {done}; "
                             "the last checkpoint is untouched")
        if step == first:
            print(f"first step in {seconds:.1f} s{', compilation included' * config.compile}", flush=True)
        yield dict(step=done, losses=dict(zip(losses, values)), lr=lr, norm=norm, ms=1e3 * seconds, rate=tokens / seconds,
                   mfu=flops * tokens / seconds / peak, eta=seconds * (config.steps - done) / 60)
        start, steps = time.perf_counter(), 0


@torch.no_grad()
@torch.compiler.set_stance("force_eager")                       # compiling would take longer than it saves
def evaluate(model, tokens, pattern, config):
    """Mean loss over the targets of config.eval_windows windows spread evenly over `tokens` (nats per token)."""
    T, loss_fn = config.context, Loss(model, config)
    starts = np.linspace(0, len(tokens) - T - 1, min(config.eval_windows, (len(tokens) - 1) // T)).astype(int)
    batches = [starts[i:i + config.eval_batch] for i in range(0, len(starts), config.eval_batch)][RANK::WORLD]
    cuts = (cut(tokens, batch, T) for batch in batches)
    losses = [((y != -100).sum().item(), loss_fn(move(x, config), move(y, config), pattern)) for x, y in cuts]
    sums = torch.tensor([(count * loss.item(), count) for count, loss in losses], dtype=torch.float64)
    total, count = summed(sums.reshape(-1, 2).sum(0)).tolist()
    return total / count


PEAKS = {"B200": 2250, "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756, "A100": 312, "L40S": 362, "L4$": 121,
         "RTX 4090$": 165, "RTX 3090$": 71}                     # name -> dense bfloat16 TFLOP/s, of the vendor's data sheets


def peak_flops(config):
    """FLOP/s that the devices can reach together; infinite, so that no MFU is shown, for cards not in PEAKS."""
    name = torch.cuda.get_device_name() if config.gpu and config.dtype == "bfloat16" else ""
    return WORLD * next((1e12 * peak for card, peak in PEAKS.items() if re.search(card, name)), math.inf)


def flops_per_token(shape, passes, T):
    """Floating-point operations that all passes together spend on a token, forward (a third) and backward: 6 for each
    weight of a matrix product, the head's among them, and 12 C in each layer for each key that the pattern allows.
    Left out: the recurrence, elementwise work, and what --checkpointing computes again."""
    C, L = shape.n_embd, shape.n_layer
    weights = shape.vocab_size * C + L * (14 if shape.recurrence else 13) * C * C
    return sum(6 * weights + 12 * C * L * pattern.keys_per_token(shape, T) for pattern in passes)


# ---------------------------------------------------------------------------------------------
# Several processes: torchrun starts the script once per GPU and says in the environment which one this is.
# Gradients meet in DDP, a few numbers on the CPU in `summed`; process 0 alone prints and writes.

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def summed(values):
    """The sum of a CPU tensor over the processes, which wait for one another here. ConnectionError if one has ended."""
    try:
        if WORLD > 1:
            dist.all_reduce(values)
    except RuntimeError as error:
        raise ConnectionError("stopped, as another process has ended") from error
    return values


# ---------------------------------------------------------------------------------------------
# Data: token streams on disk, uint16, each document followed by end-of-text

def cut(tokens, starts, T, eot=-1):
    """Windows of T tokens from `starts`: idx, targets (B, T) int64. No loss (-100) where the input is end-of-text:
    the first token of the next document can't be known. `tokens` may be a Niah, whose samples are numbered by `starts`."""
    if isinstance(tokens, Niah):
        return tokens.cut(starts, T)
    window = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))
    idx, targets = window[:, :-1], window[:, 1:]
    return idx, targets.masked_fill(idx == eot, -100)


def in_order(step, config, length):
    """Starts of a pretraining batch. The first steps * batch * T tokens are read once, in order, in batch_size streams:
    row r reads the r-th stretch from end to end, so that a batch holds many documents. Shorter data starts again."""
    return (np.arange(config.batch_size) * config.steps + step) * config.context % (length - config.context)


def at_random(step, config, length):
    """Starts of an adaptation batch, or with --random a pretraining one: random offsets, the same for the same seed and step."""
    return np.random.default_rng((config.seed, step)).integers(0, length - config.context, config.batch_size)


class Tokenizer:
    """Text <-> token ids. bytes: UTF-8, 257 tokens; gpt2: tiktoken's BPE, 50257; ids, for any other: numbers written out."""

    def __init__(self, name):
        self.name = name
        self.size, self.eot = {"bytes": (257, 256), "gpt2": (50257, 50256), "ids": (None, None)}[name]
        self.partial = codecs.getincrementaldecoder("utf-8")("replace")

    @functools.cached_property
    def bpe(self):
        import tiktoken
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:                              # without a network: whatever requests raises
            raise ValueError(f"tiktoken can't fetch GPT-2's vocabulary ({type(error).__name__}); without a network, "
                             "set TIKTOKEN_CACHE_DIR to a folder that holds it") from error

    def encode(self, text):
        if self.name == "bytes":
            return np.frombuffer(text.encode(), np.uint8)
        if self.name == "gpt2":
            return self.bpe.encode_ordinary(text)
        if not all(word.isascii() and word.isdigit() for word in text.split()):
            raise ValueError(f"no tokenizer for this vocabulary: write token ids, like '1 15043', not {text[:40]!r}")
        return [int(word) for word in text.split()]

    def decode(self, token):
        """The text that `token` completes; '' in the middle of a character and for a token that stands for nothing."""
        if self.name == "ids":
            return f"{token} "
        if token >= self.eot:
            return "<|endoftext|>" if token == self.eot else ""
        raw = bytes([token]) if self.name == "bytes" else self.bpe.decode_single_token_bytes(token)
        return self.partial.decode(raw)


def documents(source):
    """[(name, path)] of a text source, sorted by the md5 of the name: a shuffle that is the same everywhere."""
    stdlib = source == "stdlib"
    root = sysconfig.get_path("stdlib") if stdlib else source
    skip = ("site-packages", "dist-packages", "test", "tests", "idle_test") if stdlib else ()
    found = [(os.path.basename(root), root)] if os.path.isfile(root) else []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith((".", "__pycache__"))]
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            if os.path.isfile(path) and (path.endswith(".py") or not stdlib):                   # no broken link, no pipe
                found.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    if not found:
        raise ValueError(f"--data {source}: no such file or folder, or nothing in it")
    return sorted(found, key=lambda document: hashlib.md5(document[0].encode()).digest())


def read_text(path):
    """A file's text; '' if it is not UTF-8 text."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return "" if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return ""


def tokenize(source, tokenizer):
    """Tokenize a text source, once, into the folder under .cache that is returned.

    A twentieth of the documents, at least one, is for validation; of a single document, its last tenth.
    """
    docs, coder = documents(source), Tokenizer(tokenizer)
    stamps = [(name, os.path.getsize(path), os.path.getmtime(path)) for name, path in docs]
    key = hashlib.md5(json.dumps([source, tokenizer, stamps]).encode()).hexdigest()[:8]
    folder = os.path.join(".cache", f"{os.path.basename(source)}-{tokenizer}-{key}")
    if os.path.exists(folder):
        return folder
    texts = [path for _, path in docs if read_text(path)]      # read again below, rather than held in memory
    if not texts:
        raise ValueError(f"--data {source}: no UTF-8 text in it")
    partial, n_val, size = f"{folder}.{os.getpid()}.tmp", max(1, len(texts) // 20), 0
    os.makedirs(partial)
    try:
        with open(f"{partial}/train.bin", "wb") as train, open(f"{partial}/val.bin", "wb") as val:
            for i, path in enumerate(texts, 1):
                tokens = np.append(coder.encode(read_text(path)), coder.eot).astype("<u2")
                border = len(tokens) * 9 // 10 if len(texts) == 1 else 0 if i <= n_val else len(tokens)
                train.write(tokens[:border].tobytes())
                val.write(tokens[border:].tobytes())
                size += len(tokens)
                if i % 100 == 0 or i == len(texts):
                    print(f"\rtokenizing {source}: {i}/{len(texts)} texts, {size / 1e6:.1f}M tokens ({tokenizer})",
                          end="\n" * (i == len(texts)), file=sys.stderr, flush=True)
        if not os.path.exists(folder):                          # or another process was faster
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_data(config, vocab_size=None):
    """(train, val, vocabulary): two uint16 arrays, mapped from disk, or two of Niah; a multiple of 64.

    config.data: 'stdlib', a text file, a folder of text files, one with train.bin and val.bin, headerless uint16, or 'niah'.
    Fills in config.tokenizer and config.eot. vocab_size: default the tokenizer's, else the largest token + 1.
    OSError or ValueError in one line if the data can't be had, is shorter than a window, or goes beyond the vocabulary.
    """
    if config.data not in ("stdlib", "niah"):
        config.data = os.path.abspath(config.data)              # for the scripts that find it in the checkpoint
    folder, names = config.data, ("train.bin", "val.bin")
    if folder == "niah" or not any(os.path.exists(os.path.join(folder, name)) for name in names):
        config.tokenizer = config.tokenizer or "bytes"
        if config.tokenizer == "ids":
            raise ValueError(f"--data {folder}: text needs a tokenizer, bytes or gpt2; ids are read from train.bin and val.bin")
        if folder == "niah":
            train, val, size = Niah(config, 0), Niah(config, 1), Tokenizer(config.tokenizer).size
            if (vocab_size or size) < size:
                raise ValueError(f"--data niah: tokens of {config.tokenizer} go beyond the vocabulary of {vocab_size}")
            return train, val, -(-(vocab_size or size) // 64) * 64
        if RANK == 0:
            tokenize(folder, config.tokenizer)
        summed(torch.zeros(1))                                  # the others find it done
        folder = tokenize(folder, config.tokenizer)
    coder = Tokenizer(config.tokenizer or "ids")
    limit, arrays, largest = vocab_size or coder.size or 65536, [], 0
    for path in (os.path.join(folder, name) for name in names):
        if (size := os.path.getsize(path)) % 2 or size // 2 <= config.context:
            raise ValueError(f"{path}: {size} bytes; it must hold more uint16 tokens than the context of {config.context}")
        arrays.append(np.memmap(path, "<u2", "r"))
        largest = max(largest, int(arrays[-1].max()))
        if largest >= limit:
            raise ValueError(f"{path}: token {largest} is beyond the vocabulary of {limit}")
    if config.eot is None:
        config.eot = coder.eot or (50256 if any((tokens == 50256).any() for tokens in arrays) else -1)
    config.tokenizer = coder.name
    size = vocab_size or coder.size or largest + 1
    return *arrays, -(-size // 64) * 64


# ---------------------------------------------------------------------------------------------
# Retrieval: needles in a haystack, in the eight forms of RULER, in text of our own

ADJECTIVES, NOUNS, VERBS = (words.split() for words in (            # five letters, and one GPT-2 token, each
    """basic black blank blind brown chief civil clean clear crazy daily dirty early empty equal final fixed fresh fried grand
    great green happy heavy human inner large legal light local lower magic major metal moral outer plain prime quick quiet
    ready rival rough round sharp short small smart solid steel still sweet tight total upper urban usual white worst young""",
    """angel apple arrow beard blade boats bones books boxes brain bread brush cakes cards chain chair clock cloth cloud coins
    court cream dream dress field flame fleet floor fruit ghost glass grain grass guard heart horse house image knife ledge
    money mouse night organ paper patch phone plane plant plate queue radio ridge river sheet shell shirt stone storm story""",
    "built faced fixed found heard owned rated threw wired wrote"))
HAYSTACKS = {                                                   # sentences: a word drawn from each list, then a full stop
    "noise": [["The rain falls. The wind turns. The lamp is lit"]],
    "prose": ["The Our Her His".split(), ADJECTIVES, NOUNS, VERBS, "the our her his".split(), ADJECTIVES, NOUNS],
}
DIGITS = "0123456789abcdef-"
TASKS = {                                                       # haystack, keys, values; number of needles, keys and answers
    "single-1": ("noise", "words", "number", 1, 1, 1),
    "single-2": ("prose", "words", "number", 1, 1, 1),
    "single-3": ("prose", "words", "uuid", 1, 1, 1),
    "multikey-1": ("prose", "words", "number", 4, 4, 1),
    "multikey-2": ("needles", "words", "number", 1, 1, 1),
    "multikey-3": ("needles", "uuid", "uuid", 1, 1, 1),
    "multivalue": ("prose", "words", "number", 4, 1, 4),
    "multiquery": ("prose", "words", "number", 4, 4, 4),
    "recall": ("pairs", "words", "number", 1, 1, 1),            # needles without words around: the simplest task
}


class Niah:
    """Samples of the tasks, numbered; the same for the same tokenizer, split, seed and number. No key and no value is both in
    split 0, for training, and in split 1, for evaluation. Words, digits and what is between them are encoded one by one, and
    put together as arrays, at evaluation too: encoding the whole of each text would keep a GPU waiting."""

    def __init__(self, config, split):
        coder, self.seed, self.split, self.tasks = Tokenizer(config.tokenizer), config.seed, split, config.tasks
        self.encode, config.eot = functools.cache(lambda text: np.array(coder.encode(text), np.int64)), coder.eot
        self.digits = np.hstack([self.encode(digit) for digit in DIGITS])
        rows = lambda words: np.stack([self.encode(" " + word) for word in words])       # words of a list are equally long
        self.haystacks = {name: [*map(rows, lists)] for name, lists in HAYSTACKS.items()}
        pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        self.keys = rows(pair for i, pair in enumerate(pairs) if i % 97 % 2 == split)
        for task in self.tasks:                                 # all samples of a task need the same room
            self.sample(0, config.context, task)

    def __len__(self):
        return 2**40                                            # numbers without end, for those who draw from them

    def fill(self, form, **rows):
        """A row of tokens per row of the named arrays: the form, with each {name} replaced."""
        n, parts = len(next(iter(rows.values()))), re.split("{(.*?)}", form)
        return np.hstack([rows[part] if i % 2 else np.tile(self.encode(part), (n, 1)) for i, part in enumerate(parts)])

    def values(self, kind, n, rng):
        """n numbers of 7 digits or uuids of this split, as places in DIGITS."""
        base, length = (16, 32) if kind == "uuid" else (10, 7)
        places = rng.integers(base, size=(3 * n + 40, length), dtype=np.int32)
        places[:, 0] = rng.integers(1, base, len(places))
        mine = places[places[:, :7] @ 10 ** np.arange(7) % 97 % 2 == self.split][:n]                # no digit gives away which
        return np.insert(mine, (8, 12, 16, 20), DIGITS.index("-"), axis=1) if kind == "uuid" else mine

    def sample(self, number, T, task=None, rounds=1):
        """T tokens, a bool array that is True on the answers, and the texts in these; ValueError if T is too short. Up to
        `rounds` questions, each with its answer, as far as there are needles and there is room."""
        rng = np.random.default_rng((self.seed, self.split, number))
        task = task or self.tasks[rng.integers(len(self.tasks))]
        haystack, key, value, n, distinct, asked = TASKS[task]
        form, ask, colon = ("{key} {value}.", "", "") if haystack == "pairs" else (" Safe{key}: {value}.", "\nOpen", ":")
        order, of_needles = rng.permutation(len(self.keys)), haystack in ("pairs", "needles")

        def needles(first, count, distinct):                    # with other keys than the first ones; if too few, they repeat
            keys = self.keys[np.resize(order[first:], distinct)] if key == "words" else self.fill(
                " {uuid}", uuid=self.digits[self.values("uuid", distinct, rng)])
            keys, values = np.resize(keys, (count, keys.shape[1])), self.values(value, count, rng)
            return keys, values, self.fill(form, key=keys, value=self.digits[values])

        keys, values, found = needles(0, *((rounds, rounds) if of_needles else (n, distinct)))
        if of_needles:
            n = distinct = max(1, min(rounds, T // (3 * found.shape[1])))        # a third of the text, and one for the questions
        depths = np.append(number * 0.618034 % 1, rng.random(n - 1))       # of the first: by the golden ratio, evenly
        if distinct < n:
            depths.sort()                                       # the values of one key are told in the order of the text
        found, told = found[:n], np.arange(min(rounds * asked, n))

        def join(rows):                                         # those of a question in one row, with commas between
            return self.fill("{row},", row=rows).reshape(len(told) // asked, -1)[:, :-1]

        questions = self.fill(ask + "{keys}" + colon, keys=join(keys[told[:distinct]]))
        answers = self.fill("{values}.", values=join(self.fill(" {value}", value=self.digits[values[told]])))
        end, words = np.hstack((questions, answers)), self.haystacks.get(haystack)
        length = found.shape[1] if of_needles else 1 + sum(choice.shape[1] for choice in words)
        rounds = min(len(end), (T - found.size - length) // end.shape[1])
        if rounds < 1:
            raise ValueError(f"--context {T} is too short for {task}, which takes {found.size + length + end.shape[1]} tokens")
        end = end[:1 + rng.integers(rounds)]                    # an evaluation has one, which must not be new to the model
        h = -(-(T - found.size - end.size) // length)           # rows of the haystack; the first loses what is too much
        hay = needles(n, h, h)[2] if of_needles else self.fill(
            "{words}.", words=np.hstack([choice[rng.integers(len(choice), size=h)] for choice in words]))
        at = 1 + (h * depths).astype(int)
        text = np.insert(hay.ravel(), np.repeat(at * length, found.shape[1]), found.ravel())
        known = np.tile(np.arange(end.shape[1]) >= questions.shape[1], len(end))
        texts = ["".join(DIGITS[place] for place in places) for places in values[:len(end) * asked]]
        return np.hstack((text, end.ravel()))[-T:], np.append(np.zeros(T - end.size, bool), known), texts

    def cut(self, numbers, T):
        """idx, targets (B, T) of samples of T + 1 tokens, with a loss on the answers only; many, as one has few tokens."""
        tokens, known, _ = zip(*(self.sample(int(number), T + 1, rounds=16) for number in numbers))
        tokens, known = torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(known))
        return tokens[:, :-1], tokens.masked_fill(~known, -100)[:, 1:]


# ---------------------------------------------------------------------------------------------
# The command line, shared by the scripts

def flag(default, help, **argument):
    """A dataclass field that parse_flags turns into a flag."""
    return dataclasses.field(default=default, metadata=dict(help=help, **argument))


@dataclass
class Common:
    """The flags of every script."""
    out: str = flag("out", "folder of the run's checkpoints and logs")
    device: str | None = flag(None, "cpu, cuda, cuda:1 ...; default: cuda if there is one")
    dtype: str | None = flag(None, "default: bfloat16 on cuda, else float32", choices=("float32", "bfloat16"))
    seed: int = flag(0, "of the weights, of random offsets and of sampling")
    score: str = flag("mean", "how the queries of top-k patterns (N64K16) score a block, see kernels.py", choices=kernels.SCORES)

    def __post_init__(self):
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = f"cuda:{LOCAL_RANK}" if self.gpu and WORLD > 1 else self.device
        try:
            found = torch.zeros(1, device=self.device)
            found.item()                                        # "meta" has nothing to read
            if self.gpu:
                torch.cuda.set_device(found.device)             # where Triton and NCCL work
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"--device {self.device}: {str(error).splitlines()[0]}") from error
        self.dtype = self.dtype or ("bfloat16" if self.gpu else "float32")

    @property
    def gpu(self):
        return self.device.startswith("cuda")


@dataclass
class DataFlags(Common):
    """The flags of every script that reads data."""
    data: str = flag("stdlib", "stdlib, a text file, a folder of text files or with train.bin and val.bin, or niah")
    tasks: list = flag((*TASKS,)[:8], "of --data niah", nargs="+", choices=(*TASKS,))
    tokenizer: str | None = flag(None, "of text: bytes (default) or gpt2; of .bin: what made it, ids (default) if unknown",
                                 choices=("bytes", "gpt2", "ids"))
    eot: int | None = flag(None, "end-of-text token of .bin data, -1 for none; default: 50256 if it occurs")
    context: int = flag(1024, "tokens per sequence")
    eval_windows: int = flag(64, "windows of validation data, spread evenly over it")
    eval_batch: int = flag(8, "windows validated at once")


@dataclass
class FitFlags(DataFlags):
    """The flags of pretraining and adaptation."""
    batch_size: int = flag(16, "sequences per update")
    grad_accum: int = flag(1, "parts that a batch is run in, to save memory")
    steps: int = flag(1000, "batches")
    lr: float = flag(1e-3, "peak learning rate")
    min_lr: float = flag(1e-6, "last learning rate")
    warmup: float = flag(0.05, "share of the steps that warms up")
    weight_decay: float = flag(0.1, "of AdamW, on all parameters")
    clip: float = flag(1.0, "largest gradient norm")
    compile: bool | None = flag(None, "torch.compile the blocks; default: on a GPU, where triton is installed")
    checkpointing: bool = flag(False, "hold the inputs of blocks only and compute the rest again, for long contexts")
    log_interval: int = flag(10, "steps between log lines")
    resume: bool = flag(False, "go on with what --out holds; adapt.py: keep its finished patterns")
    overwrite: bool = flag(False, "start anew where --out holds it already")

    def __post_init__(self):
        super().__post_init__()
        if self.gpu:
            torch.set_float32_matmul_precision("high")          # TF32, in what --dtype float32 leaves in float32
        needs = "triton" if self.gpu else os.environ.get("CXX", "g++")
        able = importlib.util.find_spec(needs) if self.gpu else shutil.which(needs)
        if self.compile and not able:
            print(f"--compile: {needs} is not installed here, going on without", flush=True)
        self.compile = bool(able and (self.gpu if self.compile is None else self.compile))

    def check(self):
        """Self, if these flags go together; ValueError in one line if not."""
        if self.batch_size % (WORLD * self.grad_accum):
            raise ValueError(f"--batch-size {self.batch_size} does not split into --grad-accum {self.grad_accum} x {WORLD} "
                             "processes")
        return self


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def parse_flags(cls, description):
    """The flags that were given, as a dict; every field of the dataclass `cls` is one, with its help."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        argument, kinds, default = dict(field.metadata), {field.type, *typing.get_args(field.type)}, field.default
        if type(default) in (str, int, float, tuple) and default != ():
            argument["help"] += f"; default: {' '.join(default) if type(default) is tuple else default}"
        if bool in kinds:
            argument["action"] = argparse.BooleanOptionalAction
        else:
            argument["type"] = next((kind for kind in (int, float) if kind in kinds), str)
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **argument)
    given = vars(parser.parse_args())
    for name, value in given.items():
        least = {"eot": -1, "seed": 0}.get(name, 1 if type(value) is int else 0)
        if type(value) in (int, float) and not least <= value <= 2**40:
            parser.error(f"--{name.replace('_', '-')} {value}: must be a number from {least} to 2^40")
    return given


def out_of_memory(error):
    """Whether the error says that memory ran out; a CPU's is a plain RuntimeError of torch."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def run(main):
    """Call main, as one of several processes if torchrun says so. Bad input, a missing file, a lack of memory or Ctrl-C
    is one line on stderr and a non-zero exit, on which torchrun ends the other processes."""
    name, leave = os.path.basename(sys.argv[0]), sys.exit
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        leave = os._exit                                        # no waiting for what others won't send, no race in taking down
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except Exception as error:
        if not (isinstance(error, (ValueError, OSError)) or out_of_memory(error)):
            raise
        why = f"{name}: {' '.join(str(error).split())}"
        if WORLD == 1:
            sys.exit(why)
        if RANK:                                                # process 0 speaks first; if it has, torchrun ends this one here
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        print(why, file=sys.stderr, flush=True)
        leave(1)
    except KeyboardInterrupt as error:
        if RANK == 0:
            print(f"{name}: interrupted{error}", file=sys.stderr, flush=True)
        leave(130)
    if WORLD > 1:
        summed(torch.zeros(1))
        sys.stdout.flush()
        leave(0)


def header(model, config):
    """What runs, on what; the first lines of every script."""
    shape, size = model.config, sum(p.numel() for p in model.parameters())
    print(f"{'RAT+' if shape.recurrence else 'attention-only'} | {size / 1e6:.2f}M parameters | {shape.n_layer} layers x "
          f"{shape.n_embd}, {shape.n_head} heads, vocabulary {shape.vocab_size}\npython {platform.python_version()}, torch "
          f"{torch.__version__}, {torch.get_num_threads()} CPU threads, {config.dtype} | {kernels.path(config.device)}"
          f"{f' | {WORLD} processes' * (WORLD > 1)}", flush=True)


# ---------------------------------------------------------------------------------------------
# Pretraining

RECIPES = {                                                     # how each of model.PRESETS is pretrained
    "laptop": dict(context=256, batch_size=16, steps=300, lr=2e-3, eval_interval=100, eval_windows=64),
    "small": dict(context=2048, batch_size=32, steps=1000, lr=1e-3),
    "base": dict(context=4096, batch_size=128, grad_accum=16, steps=5000, lr=8e-4),
    "paper-1.5b": dict(context=4096, batch_size=512, grad_accum=128, steps=47684, lr=8e-4),
    "paper-2.6b": dict(context=4096, batch_size=512, grad_accum=256, steps=47684, lr=8e-4),
    "paper-7.6b": dict(context=4096, batch_size=512, grad_accum=512, steps=47684, lr=2e-4),
}


@dataclass
class TrainConfig(FitFlags):
    preset: str | None = flag(None, "shape and recipe; default: laptop on a CPU, small on a GPU", choices=(*PRESETS,))
    n_layer: int | None = flag(None, "layers; default: the preset's")
    n_head: int | None = flag(None, "heads; default: the preset's")
    n_embd: int | None = flag(None, "width; default: the preset's")
    checkpoint: str | None = flag(None, "weights to go on from, a new run in another --out; adapted ones: in their pattern alone")
    recurrence: bool = flag(True, "--no-recurrence: the attention-only baseline")
    arl: str | None = flag(None, "pattern of the sparse updates, or none; default: D64, none without recurrence")
    vocab_size: int | None = flag(None, "rounded up to a multiple of 64; default: the tokenizer's, else the largest token + 1")
    random: bool = flag(False, "windows at random offsets, as in adaptation, instead of the first tokens in order")
    eval_interval: int = flag(250, "steps between validations; each saves a checkpoint")


def of_run(cls, path, meta, given):
    """The flags of `cls`: those given, else what train.py used for the checkpoint at `path`, else the defaults."""
    if not meta.get("train") and "data" not in given:
        raise ValueError(f"{path} does not say what it was trained on: --data is needed")
    here = {field.name for field in dataclasses.fields(Common)} | {"checkpoint", "resume", "overwrite", "compile"}
    names = {field.name for field in dataclasses.fields(cls)} - here
    used = {"tokenizer": meta["tokenizer"], **meta.get("train", {})}
    return cls(**{**{name: value for name, value in used.items() if name in names}, **given})


def file_of(pattern, out):
    """The checkpoint adapted to a pattern: out/D16.pt and so on, with + and _ for the , and / of hybrids."""
    return os.path.join(out, str(pattern).replace(",", "+").replace("/", "_") + ".pt")


def fingerprint(model):
    """Eight hex digits that tell one set of weights from another: adapted checkpoints name their dense parent by it."""
    return hashlib.md5(model.embed.weight.detach().float().cpu().numpy().tobytes()).hexdigest()[:8]


def log_line(record, config):
    *sparse, dense = record["losses"].values()
    sparse = "".join(f" sparse {loss:.4f}" for loss in sparse)
    speed = f"{record['rate'] / 1e3:.1f}k tok/s" + f" | MFU {record['mfu']:.0%}" * (record["mfu"] > 0)
    return (f"step {record['step']:04}/{config.steps:04} | loss {dense:.4f}{sparse} | lr {record['lr']:.1e} | "
            f"norm {record['norm']:.2f} | {record['ms']:.0f} ms | {speed} | ETA {record['eta']:.1f} min")


def memory(config):
    """What a validation line says of the GPU's memory."""
    return f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if config.gpu else ""


def open_log(path, step=0):
    """A JSONL log, cut back to whole records up to `step`, so that a resumed run has every step once."""
    kept = []
    if RANK:
        return open(os.devnull, "w")
    if step and os.path.exists(path):
        with open(path) as f:
            kept = [record for record in f if record.endswith("\n") and json.loads(record).get("step", 0) <= step]
    log = open(path, "w")
    log.writelines(kept)
    return log


def report(log, text, **record):
    """A line on the screen and a record in the log."""
    print(text, flush=True)
    log.write(json.dumps(record) + "\n")
    log.flush()


def main():
    given = parse_flags(TrainConfig, __doc__)
    config = TrainConfig(**given)
    model, meta = load_checkpoint(config.checkpoint, config.device) if config.checkpoint else (None, {"pattern": "D1"})
    pattern = meta["pattern"]
    path = os.path.join(config.out, "dense.pt") if pattern == "D1" else file_of(pattern, config.out)
    if config.checkpoint and os.path.realpath(path) == os.path.realpath(config.checkpoint):
        raise ValueError(f"--checkpoint {path}: the run would write there; --out names another folder")
    if config.resume:
        model, meta = load_checkpoint(path, config.device)
        if "optimizer" not in meta:
            raise ValueError(f"{path}: not a checkpoint of train.py, it can't be resumed")
    elif os.path.exists(path) and not config.overwrite:
        raise ValueError(f"{path} exists: --resume goes on with it, --overwrite starts anew, --out names another folder")
    saved = {**asdict(model.config), "tokenizer": meta["tokenizer"], **meta.get("train", {})} if model else {}
    preset = config.preset or saved.get("preset") or ("small" if config.gpu else "laptop")
    here = {"preset": preset, "out": config.out, "device": config.device, "compile": config.compile}    # a run may have moved
    config = TrainConfig(**{**PRESETS[preset], **RECIPES[preset], **saved, **given, **here}).check()
    config.arl = config.arl or ("D64" if config.recurrence else "none")

    train, val, config.vocab_size = load_data(config, config.vocab_size)
    shape = RATConfig(config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.recurrence)
    if model and shape != model.config:
        raise ValueError(f"{path if config.resume else config.checkpoint} holds {model.config}, the flags ask for {shape}")
    passes = [config.arl, "D1"] if pattern == "D1" else [pattern]
    passes = [Pattern.parse(text, config.score).fit(shape) for text in passes if text != "none"]
    kin = {"parent": meta.get("parent") or fingerprint(model)} if config.checkpoint else {}
    os.makedirs(config.out, exist_ok=True)
    torch.manual_seed(config.seed)
    model = model or RATPlus(shape).to(config.device)
    optimizer = new_optimizer(model, config)
    if config.resume:
        optimizer.load_state_dict(meta["optimizer"])
        torch.set_rng_state(meta["rng"])
    first = meta["step"] if config.resume else 0

    header(model, config)
    stopped, leaving = [], False

    def stop(number, frame):                                    # after this step; a second Ctrl-C leaves at once
        stopped.append(number)
        if WORLD == 1:                                          # torchrun passes on what the terminal sent already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def due(step):
        nonlocal leaving
        leaving = summed(torch.tensor(len(stopped))).item() > 0            # all processes leave after the same step
        return leaving or step % config.eval_interval == 0

    def batch(step):
        starts = at_random if config.random else in_order
        return cut(train, starts(step, config, len(train)), config.context, config.eot)

    with open_log(path[:-len("pt")] + "jsonl", first) as log:
        tokens, updates = config.steps * config.batch_size * config.context, " then ".join(map(str, passes))
        report(log, f"{config}\n{tokens / 1e6:.2f}M of {len(train) / 1e6:.3g}M tokens, each batch updates with {updates}; "
               f"{len(val) / 1e6:.3g}M for validation", step=first, config=asdict(config), torch=torch.__version__)
        for record in fit(model, config, passes, batch, optimizer, first, due):
            if record["step"] == first + 1:                     # before, a signal just ends the process: it may be compiling
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, stop)
            step, last = record["step"], leaving or record["step"] == config.steps
            if last or step % config.log_interval == 0:
                report(log, log_line(record, config), **record)
            if last or step % config.eval_interval == 0:
                losses = {} if leaving else {str(p): evaluate(model, val, p, config) for p in passes[::-1]}
                if RANK == 0:
                    save_checkpoint(path, model, step=step, pattern=pattern, tokenizer=config.tokenizer, val=losses, **kin,
                                    train=asdict(config), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
                values = " ".join(f"{p} {loss:.4f}" for p, loss in losses.items()) or "not measured"
                report(log, f"step {step:04} | val {values}{memory(config)} | saved {path}", step=step, val=losses)
            if leaving:
                raise KeyboardInterrupt(f"; step {step} is saved in {path}, --resume goes on")
    if first >= config.steps:
        print(f"{path} is complete: {first} steps")


if __name__ == "__main__":
    run(main)
