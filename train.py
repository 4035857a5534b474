"""
Dense pretraining of RAT+ with active recurrence learning (ARL), and fine-tuning.

A model that may attend everywhere has no need of its recurrence, which then learns to reach back a
few tokens only. Under the pattern D64 a query sees every 64th key, and only the recurrence can
carry what lies between. So by default each batch makes two full updates, equation (6):

  theta <- optimizer(theta, gradient of loss(batch; theta, D64))    sparse: recurrence must reach 64
  theta <- optimizer(theta, gradient of loss(batch; theta, D1))     dense: attention to all keys

`python train.py` trains a small model on the source of Python's standard library, offline.
`python train.py --checkpoint out/dense.pt --data mine --out out/mine` fine-tunes a checkpoint.
`torchrun --nproc-per-node=2 train.py` trains on two GPUs: the same batches, the same losses.

A flag has the first of these values: what was typed, the checkpoint's, the preset's, the default.
--resume goes on with a run: a typed flag that would change its result is refused, but for --steps.
Ctrl-C finishes the step, saves, and says how to go on.
"""
import argparse
import codecs
import contextlib
import functools
import hashlib
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
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import (PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint, on_kernels, require,
                   save_checkpoint)

# --------------------------------------------------------------------------------------------------
# Training

def fit(model, config, batch, optimizers, pattern, arl=(), first=0, signals=()):
    """Train for the steps first..config.steps - 1, and yield records of how it goes.

    batch(step) -> idx, targets (B, T) int64 on the CPU. optimizers: {name: optimizer}. pattern: of
    the main update. arl: patterns of the sparse update, of which each step draws one. signals: a
    list; once it holds something, the training ends after the step.

    A record comes after the first step, at the log and eval intervals, and at the end: step (how
    many are done), losses {pattern: nats per token}, lr, norm of the gradient before clipping, ms
    per step, rate (tokens per second), mfu, eta (minutes), stopped. Only records make the host wait
    for the device. ValueError if a loss or the norm is not finite.
    """
    loss_fn = trainable(model, config)
    tokens = config.batch_size * config.context
    flops = flops_per_token(model, pattern, arl, config)
    start = time.perf_counter()
    reported = first                            # steps that were done at the last record
    for step in range(first, config.steps):
        lr = schedule(step, config)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        parts = share(*batch(step), config)
        losses = {}
        for each in updates(step, config, pattern, arl):                    # (6): sparse, dense
            loss, norm = update(loss_fn, optimizers, parts, each, config.clip)
            losses[str(each)] = loss
        done = step + 1
        stopped = summed(torch.tensor(len(signals))).item() > 0
        ends = stopped or done == config.steps
        if not ends and step > first and done % config.log_interval and done % config.eval_interval:
            continue
        losses, norm = measured(losses, norm, done)
        seconds = (time.perf_counter() - start) / (done - reported)
        yield dict(step=done, losses=losses, lr=lr, norm=norm, ms=1e3 * seconds,
                   rate=tokens / seconds, mfu=flops * tokens / seconds / peak_flops(config),
                   eta=seconds * (config.steps - done) / 60, stopped=stopped)
        if stopped:
            return
        start = time.perf_counter()
        reported = done


def updates(step, config, pattern, arl):
    """The patterns of the updates that a step makes, in order: a sparse one, then the main one.
    With --one-update it is one of the two. The same for the same seed and step.
    """
    rng = np.random.default_rng((config.seed, step, 1))         # apart from that of the windows
    both = [arl[rng.integers(len(arl))], pattern] if arl else [pattern]
    return [both[rng.integers(len(both))]] if config.one_update else both


def update(loss_fn, optimizers, parts, pattern, clip):
    """One update on a batch, of which `parts` is this process's share, under a pattern.

    Returns this process's part of the loss (nats per token) and the norm of the whole batch's
    gradient, both still on the device. A clip of 0 does not clip.
    """
    total = 0.0
    for i, (idx, targets, weight) in enumerate(parts, 1):
        wait = WORLD > 1 and i < len(parts)         # DDP exchanges gradients with the last part
        with loss_fn.no_sync() if wait else contextlib.nullcontext():
            loss = loss_fn(idx, targets, pattern) * weight
            (loss * WORLD).backward()               # DDP averages over processes; this makes a sum
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(loss_fn.parameters(), clip or math.inf)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, norm


def schedule(step, config):
    """The learning rate: it rises over the `warmup` share of the steps, then falls along a cosine.

    The first step after the warm-up has config.lr and the last step has config.min_lr.
    """
    ramp = int(config.warmup * config.steps)
    if step < ramp:
        return config.lr * (step + 1) / ramp
    turn = math.pi * (step - ramp) / max(1, config.steps - ramp - 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(turn)) / 2


def new_optimizers(model, config):
    """{name: optimizer}, named as in checkpoints. `optimizer` is AdamW with weight decay on all its
    parameters, as the authors have it. With --optimizer muon it has the embedding and the norms
    only; Muon takes the matrices of the blocks, scaled so that one learning rate serves both.
    """
    mine = [p for p in model.blocks.parameters() if p.dim() == 2 and config.optimizer == "muon"]
    matrices = {*mine}
    rest = [p for p in model.parameters() if p not in matrices]
    optimizers = {"optimizer": torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), fused=True,
                                                 weight_decay=config.weight_decay)}
    if mine:
        optimizers["muon"] = torch.optim.Muon(mine, lr=config.lr, weight_decay=config.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
    return optimizers


def measured(losses, norm, done):
    """The losses and the norm as numbers of the whole batch. ValueError if training went wrong: NaN
    weights make all later losses NaN, so records are looked at alone, as each save follows one.
    """
    mine = torch.stack((*losses.values(), norm / WORLD)).double().cpu()
    *values, norm = summed(mine).tolist()
    losses = dict(zip(losses, values))
    require(all(map(math.isfinite, (*values, norm))) and (norm > 0 or max(values) == 0),
            f"training stopped at step {done}: losses {losses}, gradient norm {norm}; the last "
            "checkpoint is untouched")
    return losses, norm


class Loss(torch.nn.Module):
    """model.loss in the dtype of the flags, as the module that DDP wants to wrap."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, idx, targets, pattern):
        with autocast(self.config):
            return self.model.loss(idx, targets, pattern)


def trainable(model, config):
    """A Loss whose blocks are compiled and checkpointed as the flags say, under DDP if need be."""
    model.checkpointing = config.checkpointing
    if on_gpu(config):
        torch.set_float32_matmul_precision("high")      # TF32 for what --dtype float32 multiplies
    if config.compile:
        torch._dynamo.config.optimize_ddp = False       # DDP need not cut through a block's graph
        torch._dynamo.config.recompile_limit = 64       # one graph for each rule and shape
        model.compile(dynamic=False)
    loss_fn = Loss(model, config)
    return DistributedDataParallel(loss_fn, gradient_as_bucket_view=True) if WORLD > 1 else loss_fn


def autocast(config):
    """A context in which models compute in the dtype of the flags. Their weights stay float32."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.dtype == "bfloat16")


def move(z, config):
    """z on the device of the flags. Pinned memory lets the host go on before a copy has ended."""
    if on_gpu(config):
        return z.contiguous().pin_memory().to(config.device, non_blocking=True)
    return z.to(config.device)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")               # compiling would take longer than it saves
def evaluate(model, windows, pattern, config):
    """Mean loss (nats per token) over the targets of the validation windows of a Windows.

    Every target counts, after end-of-text too, but for those that a mask excludes.
    """
    loss_fn = Loss(model, config)
    numbers, stride = windows.evenly()
    total = 0.0
    count = 0
    for i in range(0, len(numbers), config.eval_batch):
        idx, targets = windows.cut(numbers[i:i + config.eval_batch], stride)
        n = (targets != -100).sum().item()
        total += n * loss_fn(move(idx, config), move(targets, config), pattern).item()
        count += n
    return total / count


def bits_per_byte(loss, bytes_per_token):
    """A loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


PEAKS = {"H200": 989, "H100 80GB": 989, "A100": 312, "RTX 4090": 165, "RTX 3090": 71}
# dense bfloat16 TFLOP/s, from the vendor's data sheets


def peak_flops(config):
    """FLOP/s of all devices together. Infinite for unknown cards: their MFU is then not shown."""
    name = torch.cuda.get_device_name() if config.dtype == "bfloat16" and on_gpu(config) else ""
    return next((WORLD * 1e12 * peak for card, peak in PEAKS.items() if card in name), math.inf)


def flops_per_token(model, pattern, arl, config):
    """Floating-point operations per token of a step, of one or two updates (see `updates`).

    An update takes 6 for each weight of a matrix (the tied embedding counts once, as the head), and
    12 C for each layer and key that its pattern allows. The rest is small and left out.
    """
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    each = {}
    for p in (pattern, *arl):
        keys = keys_per_token(p, model.config, config.context)
        each[p] = 6 * weights + 12 * model.config.n_embd * model.config.n_layer * keys
    if not arl:
        return each[pattern]
    both = each[pattern] + sum(each[p] for p in arl) / len(arl)
    return both / 2 if config.one_update else both


def keys_per_token(pattern, config, T):
    """Mean number of keys per query in a sequence of T tokens, over positions, layers and heads."""
    total = 0.0
    for i in range(config.n_layer):
        rules = pattern.rules(i)
        total += sum(mean_keys(rule, T) for rule in rules) / len(rules)
    return total / config.n_layer


@functools.cache                                        # most layers have the same rules
def mean_keys(rule, T):
    """Mean number of keys per query under a rule. Of more than 1024 positions, 1024 are looked at,
    spread evenly.
    """
    t = torch.linspace(0, T - 1, min(T, 1024)).round().long()[:, None]
    keys = rule.allowed(t, torch.arange(T))
    count = keys.sum(1, keepdim=True).double()
    if rule.topk:                                   # the own block, K - 1 earlier ones, and of what
        own = t // rule.block * rule.block          # is left of the past the same share as of all
        best = (rule.topk - 1) * rule.block
        rest = (1 - best / own.clamp(min=1)).clamp(min=0)
        past = (keys & (torch.arange(T) < own)).sum(1, keepdim=True)
        count = t - own + 1 + own.clamp(max=best) + (rest * past).double()
    return count.mean().item()


# --------------------------------------------------------------------------------------------------
# Several processes. torchrun starts the script once a GPU. Each process takes its share of a batch.
# Gradients meet in DDP, and a few numbers in `summed`. Process 0 prints and saves.

RANK, LOCAL_RANK, WORLD = 0, 0, 1
if dist.is_torchelastic_launched():
    RANK, LOCAL_RANK, WORLD = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def summed(values):
    """The sum of a CPU tensor over all processes."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def share(idx, targets, config):
    """This process's parts of a batch, on its device: [(idx, targets, weight)].

    The weight is the part's share of the batch's targets that count. So the weighted losses of all
    parts and processes add up to the mean over the batch's targets.
    """
    n = WORLD * config.grad_accum
    count = (targets != -100).sum().clamp(min=1)
    parts = []
    for x, y in list(zip(idx.chunk(n), targets.chunk(n)))[RANK::WORLD]:
        weight = ((y != -100).sum() / count).item()
        parts.append((move(x, config), move(y, config), weight))
    return parts


# --------------------------------------------------------------------------------------------------
# Batches

class Windows:
    """The windows of T tokens in some files of tokens, as batches.

    Training windows lie side by side, so that masked samples of T tokens stay whole. No window
    reaches into the next file. files: [(tokens, mask)], see `open_bin`.
    """

    def __init__(self, files, config, coder):
        self.files = files
        self.config = config
        self.coder = coder
        self.shuffled = None, None          # an epoch, and the numbers of all windows in its order

    def __len__(self):
        return sum(len(tokens) for tokens, _ in self.files)

    def counts(self, stride):
        """How many windows each file has, if one begins every `stride` tokens. Side by side, the
        last one may lack the target of its last token.
        """
        last = [len(tokens) - self.config.context - (stride == 1) for tokens, _ in self.files]
        return np.maximum(np.array(last) // stride + 1, 0)

    def batch(self, step):
        """idx, targets (B, T) of a training step, which follow from the seed and the step: windows
        side by side, shuffled anew each epoch, each once. The target after end-of-text does not
        count, since the first token of another document can't be known.
        """
        T = self.config.context
        count = self.counts(T).sum()
        numbers = []
        for i in range(step * self.config.batch_size, (step + 1) * self.config.batch_size):
            if self.shuffled[0] != i // count:
                rng = np.random.default_rng((self.config.seed, i // count))
                self.shuffled = i // count, rng.permutation(count)
            numbers.append(self.shuffled[1][i % count])
        idx, targets = self.cut(numbers, T)
        if self.coder.eot is not None:
            targets = targets.masked_fill(idx == self.coder.eot, -100)
        return idx, targets

    def evenly(self):
        """Up to --eval-windows windows, spread evenly: their numbers and their stride. They begin
        anywhere, but with masks side by side.
        """
        T = self.config.context
        stride = 1 if all(mask is None for _, mask in self.files) else T
        most = min(self.config.eval_windows, self.counts(T).sum())
        return np.linspace(0, self.counts(stride).sum() - 1, most).astype(int), stride

    def cut(self, numbers, stride):
        """idx, targets (B, T) int64 of windows, numbered through all files. A target of -100 does
        not count: its mask is not 1, or the file ends before it. ValueError for a token beyond the
        vocabulary.
        """
        counts = self.counts(stride)
        ends = counts.cumsum()
        rows = torch.full((len(numbers), self.config.context + 1), -100)
        targets = rows.clone()
        for i, number in enumerate(numbers):
            file = ends.searchsorted(number, side="right")
            tokens, mask = self.files[file]
            start = (number - ends[file] + counts[file]) * stride
            row = torch.from_numpy(tokens[start:start + rows.shape[1]].astype(np.int64))
            limit = self.config.vocab_size
            require(row.max() < limit, f"{tokens.filename}: token {row.max()} is beyond the "
                    f"vocabulary of {limit}")
            rows[i, :len(row)] = row
            counted = np.ones(len(row)) if mask is None else mask[start:start + len(row)]
            targets[i, :len(row)] = row.masked_fill(torch.from_numpy(counted != 1), -100)
        return rows[:, :-1], targets[:, 1:]


# --------------------------------------------------------------------------------------------------
# Data on disk: uint16 tokens in train.bin and val.bin, found in a folder or made from texts

def load_data(config):
    """(train, val): the Windows of config.data, which names 'stdlib', texts, folders of texts, and
    folders of train.bin and val.bin.

    Fills in config.tokenizer, config.vocab_size where it is open (the tokenizer's, or the largest
    token + 1, in 64s) and config.data_key, which tells these tokens from others, wherever
    they lie. If it held another key, stderr says so. OSError or ValueError in one line if the data
    are missing, too short, or not what they seem.
    """
    folders = [source for source in config.data if has_bins(source)]
    texts = [source for source in config.data if source not in folders]
    config.tokenizer = config.tokenizer or ("bytes" if texts else "gpt2")
    coder = Tokenizer(config.tokenizer, config.eot)
    if texts:
        require(coder.size, f"--data {texts[0]}: there is no train.bin in it, and a text needs "
                "--tokenizer bytes or gpt2")
        folders.append(tokenize(texts, coder.name, config.split_on))
    train = [open_bin(os.path.join(folder, "train.bin")) for folder in folders]
    val = [open_bin(os.path.join(folder, "val.bin")) for folder in folders]
    if not config.vocab_size:
        largest = max(int(tokens.max()) for tokens, _ in train + val) if coder.name == "ids" else 0
        config.vocab_size = in_64s(coder.size or largest + 1)
    sides = Windows(train, config, coder), Windows(val, config, coder)
    for windows in sides:
        path = windows.files[0][0].filename
        require(windows.counts(1).sum() > 0, f"{path}: {len(windows)} tokens; it must hold more "
                f"uint16 tokens than the context of {config.context}: give more data or a smaller "
                "--context")
    _, targets = sides[1].cut(*sides[1].evenly())
    require((targets != -100).any(), f"{path}: the mask lets no target count in the validation")
    key = data_key(train + val)
    if config.data_key not in (None, key):
        note(f"warning: {' '.join(config.data)} has changed since the training, or is other data "
             f"(then {config.data_key}, now {key}): validation may hold what was trained on")
    config.data_key = key
    return sides


def in_64s(size):
    """A vocabulary's size, rounded up to a multiple of 64, which suits the matrix products."""
    return -(-int(size) // 64) * 64


def has_bins(source):
    return any(os.path.exists(os.path.join(source, name)) for name in ("train.bin", "val.bin"))


def open_bin(path):
    """(tokens, mask) of a file as nanoGPT (uint16) or llm.c (1024 bytes before them) writes it,
    mapped from disk. mask: of train.mask.bin beside it, uint8, 1 where a token counts as a target;
    else None. ValueError, saying what was seen, for other files.
    """
    size = os.path.getsize(path)
    require(size and size % 2 == 0, f"{path}: {size} bytes, empty or an odd number: is it cut off")
    head = np.fromfile(path, "<i4", 3).tolist()
    offset = 1024 if head[:1] in ([20240520], [20240801]) else 0        # llm.c's magic numbers
    require(not offset or head == [20240520, 1, (size - offset) // 2], f"{path}: a header of magic "
            f"number, version and tokens {head}, which does not fit {size} bytes of uint16 tokens")
    tokens = np.memmap(path, "<u2", "r", offset)
    seen = looks_like(tokens[:1000])
    require(not seen, f"{path} looks like {seen}; uint16 tokens are wanted, as nanoGPT or llm.c "
            "write them")
    beside = path.removesuffix(".bin") + ".mask.bin"
    mask = np.memmap(beside, np.uint8, "r") if os.path.exists(beside) else None
    require(mask is None or len(mask) == len(tokens), f"{beside}: a byte for each of the "
            f"{len(tokens)} tokens is wanted")
    return tokens, mask


def looks_like(words):
    """What a file's first values are, if they do not look like uint16 tokens; else None."""
    if len(words) < 32:
        return None
    low, high = sorted((words[::2].max(), words[1::2].max()))
    if low == 0 or low <= 3 and high > 4095:            # every second one is half of a number
        return "numbers of 32 bits"
    raw = words.tobytes()
    with contextlib.suppress(UnicodeDecodeError):
        if codecs.getincrementaldecoder("utf-8")().decode(raw) and raw.count(0) == 0:
            return f"text: {raw[:20]!r}"
    return "one byte a token" if high > 511 and (words & 255).max() < 128 else None


def data_key(files, chunks=64, chunk=4096):
    """The number of tokens, and a hash of 64 chunks of each file, spread evenly."""
    content = hashlib.sha1()
    total = 0
    for tokens, mask in files:
        total += len(tokens)
        for start in np.linspace(0, max(0, len(tokens) - chunk), chunks).astype(int):
            content.update(tokens[start:start + chunk])
            if mask is not None:
                content.update(mask[start:start + chunk])
    return f"{total} tokens {content.hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------
# Texts: found, split for validation, tokenized

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}      # of the stdlib


def find_texts(source):
    """{name: path} of the files of a source, in the order of their names' hashes. Links are
    followed. Hidden files, and folders that hold checkpoints, are left out.
    """
    stdlib = source == "stdlib"
    root = sysconfig.get_path("stdlib") if stdlib else source
    if os.path.isfile(root):
        return {os.path.basename(root): root}
    found = {}                                          # a file that links lead to counts once
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited or any(name.endswith(".pt") for name in names):
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted({*folders} - (SKIPPED if stdlib else set()))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and (name.endswith(".py") or not stdlib):
                name = os.path.relpath(path, root)
                if not re.search(r"(^|[/\\])\.", name):    # hidden, or in a hidden folder
                    found.setdefault(os.path.realpath(path), name)
    require(found, f"--data {source}: no such file or folder, or nothing in it")
    names = {name: path for path, name in found.items()}
    return {name: names[name] for name in sorted(names, key=name_hash)}


def name_hash(name):
    """The md5 of a text's name, which shuffles texts and chooses those for validation."""
    return int(hashlib.md5(os.fsencode(name.replace(os.sep, "/"))).hexdigest(), 16)


def tokenize(sources, tokenizer, split_on=None):
    """The folder under .cache with train.bin and val.bin of all texts of the sources. Texts are
    tokenized once: the folder's name holds a hash of their names and contents.
    """
    sources = [sources] if isinstance(sources, str) else sources
    texts = [item for source in sources for item in find_texts(source).items()]
    key = hashlib.md5(json.dumps([tokenizer, split_on, [name for name, _ in texts]]).encode())
    for _, path in texts:
        with open(path, "rb") as f:
            key.update(hashlib.file_digest(f, "md5").digest())
    name = os.path.basename(sources[0].rstrip(os.sep))[:80]
    folder = os.path.join(".cache", f"{name}-{tokenizer}-{key.hexdigest()[:8]}")
    if not os.path.exists(folder):
        partial = f"{folder}.{os.getpid()}"
        os.makedirs(partial)
        try:
            write_tokens(texts, Tokenizer(tokenizer), split_on, partial)
            with contextlib.suppress(OSError):          # another process has done it meanwhile
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_tokens(texts, coder, split_on, folder):
    """Write train.bin and val.bin: the tokens of each document, then end-of-text.

    One text in 20, by its number, is for validation. Of fewer than 100 texts each one's last 20th
    is. What is not text is left out, and said.
    """
    left_out = []
    documents = 0
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val:
        for i, (name, path) in enumerate(texts, 1):
            text = read_text(path)
            if not text:
                left_out.append(path)
            border = cut_before(text, len(text) * 19 // 20)
            if len(texts) >= 100:
                border = 0 if name_hash(name) % 20 == 0 else len(text)
            for file, part in ((train, text[:border]), (val, text[border:])):
                parts = part.split(split_on) if split_on else [part]
                documents += len(parts)
                for document in filter(None, parts):
                    write_document(document, coder, file)
            if i % 100 == 0 or i == len(texts):
                tokens = (train.tell() + val.tell()) / 2e6
                note(f"\rtokenizing: {i}/{len(texts)} texts, {tokens:.1f}M {coder.name} tokens",
                     end="\n" if i == len(texts) else "")
    if left_out:
        note(f"{len(left_out)} of {len(texts)} files are left out, as they are empty or not UTF-8 "
             f"text: {left_out[0]} for example")
    require(len(left_out) < len(texts), "--data: no UTF-8 text in it (a .bin of tokens must be "
            "named train.bin or val.bin, and --data its folder)")
    if split_on and documents == 2 * len(texts):        # one on either side, some of them empty
        note(f"warning: --split-on {split_on!r} is nowhere in the texts: each file is one document")


def read_text(path):
    """The text of a file, without a byte order mark; '' if it is not UTF-8 or holds a NUL byte."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        try:
            text = f.read()
        except UnicodeDecodeError:
            return ""
    return "" if "\0" in text else text


def cut_before(text, k):
    """Where to cut a text so that about k characters come before: at white space, if any."""
    space = max(text.rfind(" ", 0, k), text.rfind("\n", 0, k))
    return space if space > 0 else k


def write_document(text, coder, file, size=2**20):
    """Append the tokens of a document to a file, a million characters at a time, so that they are
    never all in memory.
    """
    for start in range(0, len(text), size):
        np.asarray(coder.encode(text[start:start + size]), "<u2").tofile(file)
    np.array([coder.eot], "<u2").tofile(file)


LONG_RUN = re.compile(r"(\s{1000}|\S{10000})")              # on longer ones tiktoken is too slow


class Tokenizer:
    """Text <-> token ids. bytes: UTF-8, 257 tokens; gpt2: tiktoken's BPE, 50257; ids: numbers, of
    which `eot` ends a text, if any does.
    """

    def __init__(self, name, eot=None):
        sizes = {"bytes": (257, 256), "gpt2": (50257, 50256), "ids": (None, eot)}
        self.name = name
        self.size, self.eot = sizes[name]
        require(eot in (None, self.eot), f"--eot {eot}: end-of-text of {name} is {self.eot}")
        self.partial = codecs.getincrementaldecoder("utf-8")("replace")

    @functools.cached_property
    def bpe(self):
        try:
            import tiktoken
            return tiktoken.get_encoding("gpt2")
        except Exception as error:                          # offline: whatever requests raises
            raise ValueError(f"GPT-2's vocabulary can't be had from tiktoken ({error!r:.150}); "
                             "without a network, set TIKTOKEN_CACHE_DIR to a folder that holds it"
                             ) from error

    def encode(self, text):
        """Token ids as a list or an array. ValueError for a text that is not ids, of ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        if self.name == "gpt2":
            parts = LONG_RUN.split(text)
            return [token for part in parts for token in self.bpe.encode_ordinary(part)]
        words = text.split()
        require(all(word.isascii() and word.isdigit() for word in words), "no tokenizer for this "
                f"vocabulary: write token ids, like '1 15043', not {text[:40]!r}")
        return [int(word) for word in words]

    def bytes_of(self, token):
        """The bytes of text that a token stands for: none for end-of-text and unused tokens."""
        if token >= self.eot:
            return b""
        return bytes([token]) if self.name == "bytes" else self.bpe.decode_single_token_bytes(token)

    def decode(self, token):
        """The text that a token completes; '' within a character, and for unused tokens."""
        if self.name == "ids":
            return f"{token} "
        return "<|endoftext|>" if token == self.eot else self.partial.decode(self.bytes_of(token))


def bytes_per_token(windows):
    """Mean bytes of text of a validation target. None where they can't be known: of ids, and where
    tiktoken has no vocabulary.
    """
    _, targets = windows.cut(*windows.evenly())
    tokens, counts = targets[targets >= 0].unique(return_counts=True)
    if windows.coder.name == "ids":
        return None
    try:
        sizes = [len(windows.coder.bytes_of(token)) for token in tokens.tolist()]
    except ValueError:
        return None
    return (torch.tensor(sizes) * counts).sum().item() / counts.sum().item()


# --------------------------------------------------------------------------------------------------
# The command line, shared by the scripts

class Parser(argparse.ArgumentParser):
    """argparse's own, but a complaint is one line, which `run` prints."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def new_parser(doc):
    """A parser with the flags of every script."""
    parser = Parser(description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--out", default="out", help="folder of checkpoints and logs; default: out")
    flag("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, else float32")
    flag("--seed", type=int, default=0, help="of weights, batches and sampling; default: 0")
    return parser


def add_data_flags(parser):
    """The flags of every script that reads data."""
    flag = parser.add_argument
    flag("--data", nargs="+", type=source_flag, help="stdlib (Python's own source, the default), "
         "text files, folders of texts, or folders with train.bin and val.bin")
    flag("--tokenizer", choices=("bytes", "gpt2", "ids"), help="of texts: bytes (default) or gpt2; "
         "of .bin files, what they were made with: gpt2 (default) or ids")
    flag("--eot", type=int, help="end-of-text token of ids; default: none")
    flag("--split-on", help="in texts, what stands between documents, such as <|endoftext|>")
    flag("--context", type=int, default=1024, help="tokens per sequence")
    flag("--eval-windows", type=int, default=64, help="windows of validation data, spread evenly")
    flag("--eval-batch", type=int, default=8, help="windows that are validated at once")
    parser.set_defaults(data_key=None, vocab_size=None)             # filled in by load_data


def add_training_flags(parser):
    """The flags of pretraining and adaptation."""
    flag = parser.add_argument
    flag("--batch-size", type=int, default=16, help="sequences per update")
    flag("--grad-accum", type=int, default=1, help="parts of a batch that run one by one")
    flag("--steps", type=int, default=1000, help="batches to train on")
    flag("--optimizer", choices=("adamw", "muon"), default="adamw",
         help="muon: for the blocks' matrices, with AdamW for the rest; give it ten times the --lr")
    flag("--lr", type=float, default=1e-3, help="peak learning rate")
    flag("--min-lr", type=float, default=1e-6, help="learning rate of the last step")
    flag("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises")
    flag("--weight-decay", type=float, default=0.1, help="on all parameters")
    flag("--clip", type=float, default=1.0, help="largest gradient norm, 0 for no limit")
    flag("--log-interval", type=int, default=10, help="steps between log lines")
    flag("--eval-interval", type=int, default=250, help="steps between saves and validations")
    switch = {"action": argparse.BooleanOptionalAction}
    flag("--compile", **switch, help="torch.compile the blocks; default: on a GPU")
    flag("--checkpointing", **switch, default=False, help="save memory: compute activations again")
    flag("--resume", **switch, default=False, help="go on with what is in --out")
    flag("--overwrite", **switch, default=False, help="start anew; old files become NAME.old")
    parser.set_defaults(one_update=False)


def source_flag(text):
    """The type of --data: an absolute path, so that it is found from other folders, or stdlib."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable of your shell not set?")
    return "stdlib" if text == "stdlib" else os.path.abspath(text)


def pattern_flag(text):
    """The type of flags that name a pattern: the text as `str(Pattern)` writes it, or none."""
    try:
        return text if text == "none" else str(Pattern.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check(config):
    """Fill in what flags leave open: the data, the device, its dtype, --compile. ValueError if
    flags do not go together.
    """
    for name, value in vars(config).items():
        if type(value) in (int, float) and name != "eot":
            least = 1 if type(value) is int and name != "seed" else 0
            require(least <= value < math.inf, f"--{name.replace('_', '-')} is at least {least}, "
                    f"not {value}")
    require(config.batch_size % (WORLD * config.grad_accum) == 0, f"--batch-size "
            f"{config.batch_size} does not split into --grad-accum {config.grad_accum} x {WORLD} "
            "processes")
    require(config.warmup <= 1, f"--warmup {config.warmup:g}: it is a share of the steps, 0 to 1")
    require(config.min_lr <= config.lr, f"--min-lr {config.min_lr:g} is above --lr {config.lr:g}: "
            "the learning rate would rise")
    require(not (config.resume and config.overwrite), "--resume goes on with a run and --overwrite "
            "starts anew: give one")
    config.data = config.data or ["stdlib"]
    use_device(config)
    if config.compile is None:
        config.compile = on_gpu(config)


NOT_INHERITED = {"checkpoint", "seed", "dtype"}             # by what starts from a checkpoint
OF_A_CALL = {"out", "device", "compile", "resume", "overwrite"}     # what checkpoints do not keep
MAY_DIFFER = {"data", "steps", "log_interval", "eval_interval", "eval_batch", "grad_accum",
              "checkpointing", *OF_A_CALL}
# What may differ in a resumed run. The data's key must be the same, wherever they lie. Other steps
# stretch the schedule of the learning rate. The others change the result by rounding at most.


def recorded(config):
    """The flags that a checkpoint keeps."""
    return {name: value for name, value in vars(config).items() if name not in OF_A_CALL}


def inherited(meta, config, left_out):
    """The flags of a checkpoint's run that the script of `config` has too, as its defaults, and the
    tokenizer.
    """
    saved = {**meta.get("train", {}), "tokenizer": meta["tokenizer"]}
    return {name: saved[name] for name in saved if hasattr(config, name) and name not in left_out}


def refuse_changes(path, saved, config, free=()):
    """ValueError if a flag is not what the checkpoint at `path` has for it. The flags that are not
    typed have its values, as they were set as defaults.
    """
    for name, value in saved.items():
        mine = getattr(config, name)
        require(name in free or mine == value, f"--{name.replace('_', '-')} {mine}: {path} has "
                f"{value}, and what changes the result can't differ")


def on_gpu(config):
    return config.device.startswith("cuda")


def use_device(config):
    """Fill in config.device and config.dtype. ValueError if the device can't be used."""
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if on_gpu(config) and WORLD > 1:
        config.device = f"cuda:{LOCAL_RANK}"
    try:
        found = torch.zeros(1, device=config.device)
        found.item()                                        # the device "meta" has nothing to read
        if on_gpu(config):
            torch.cuda.set_device(found.device)             # where Triton and NCCL work
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"--device {config.device}: {str(error).splitlines()[0]}") from error
    config.dtype = config.dtype or ("bfloat16" if on_gpu(config) else "float32")


def header(model, config):
    """Print what runs on what: the first lines of every script."""
    shape = model.config
    kind = "RAT+" if shape.recurrence else "attention only"
    size = sum(p.numel() for p in model.parameters())
    runs = "Triton kernels" if on_kernels(model.embed.weight) else "plain PyTorch"
    if on_gpu(config):
        runs += f" on {torch.cuda.get_device_name()}"
    print(f"{kind} | {size / 1e6:.2f}M parameters | {shape.n_layer} layers x {shape.n_embd}, "
          f"{shape.n_head} heads, vocabulary {shape.vocab_size}\n"
          f"python {platform.python_version()}, torch {torch.__version__}, {config.dtype} | {runs}"
          f"{f' | {WORLD} processes' * (WORLD > 1)}", flush=True)


def note(text, end="\n"):
    """Say something beside the result, on stderr, once for all processes."""
    if RANK == 0:
        print(text, end=end, file=sys.stderr, flush=True)


def catch_signals():
    """A list to which Ctrl-C, SIGTERM or SIGHUP (unless ignored, as by nohup) adds from now on. The
    second one ends the process at once, but not under torchrun, which passes on the first twice.
    """
    signals = []

    def catch(number, frame):
        signals.append(number)
        if WORLD == 1:
            signal.signal(number, signal.default_int_handler)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)                # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return signals


def out_of_memory(error):
    """Whether the error says that memory ran out. A CPU's is a plain RuntimeError in torch."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def run(main):
    """Call main() as a script. Bad input, a missing file, a lack of memory and Ctrl-C become one
    line on stderr and a non-zero exit. A reader that has seen enough (`| head`) ends it silently.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # an ASCII terminal shows what it can
            stream.reconfigure(errors="backslashreplace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    code = 0
    try:
        main()
        summed(torch.zeros(1))                              # all processes have come here
        print(end="", flush=True)                           # a full disk shows here at the latest
    except (Exception, KeyboardInterrupt) as error:
        told = isinstance(error, (ValueError, OSError, KeyboardInterrupt)) or out_of_memory(error)
        if not told:
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        note(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split()) or 'interrupted'}")
    if WORLD > 1:
        os._exit(code)                      # does not wait for what others will not send
    if code:
        sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Checkpoints and logs

def file_of(pattern, out):
    """The checkpoint of a pattern in `out`: dense.pt of D1, D16.pt, D1+D4_D8.pt of D1,D4/D8."""
    name = "dense" if str(pattern) == "D1" else str(pattern).translate(str.maketrans(",/:", "+_-"))
    return os.path.join(out, f"{name}.pt")


def fingerprint(model):
    """Eight hex digits that tell weights from others. Checkpoints name the first of their parents
    so: a fine-tuned one keeps what was written in the file that it started from.
    """
    weights = model.embed.weight.detach().float().cpu().numpy()
    return hashlib.md5(weights.tobytes()).hexdigest()[:8]


def save(path, model, optimizers=None, **meta):
    """save_checkpoint of process 0, with the optimizers' states."""
    if RANK == 0:
        states = {name: each.state_dict() for name, each in (optimizers or {}).items()}
        save_checkpoint(path, model, **meta, **states)


def open_log(path, config, first=0):
    """The JSONL log beside the checkpoint `path`, open for adding.

    A new run creates it: another run's files there are refused, or with --overwrite renamed, so
    that they can't pass for those of the new one. A resumed run keeps the records of its first
    steps, so that it repeats none, and leaves torn lines out.
    """
    if RANK:
        return open(os.devnull, "w")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    log_path = path.removesuffix(".pt") + ".jsonl"
    for old in filter(os.path.exists, () if first else (path, log_path)):
        require(config.overwrite or config.resume, f"{old} exists: --resume goes on with it, "
                "--overwrite starts anew, --out names another folder")
        os.replace(old, f"{old}.old")
    if first and os.path.exists(log_path):
        kept = []
        with open(log_path, errors="replace") as log:
            for line in log:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    if json.loads(line)["step"] <= first:
                        kept.append(line)
        with open(f"{log_path}.tmp", "w") as log:
            log.writelines(kept)
        os.replace(log.name, log_path)
    return open(log_path, "a" if first else "x")


def report(log, text, **record):
    """A record in the log, and a line on the screen."""
    log.write(json.dumps(record) + "\n")
    log.flush()
    print(text, flush=True)


def log_line(record, config, pattern):
    losses = dict(record["losses"])
    main = f" | loss {losses.pop(pattern):.4f}" if pattern in losses else " |"
    sparse = "".join(f" sparse {loss:.4f}" for loss in losses.values())
    mfu = f" | MFU {record['mfu']:.0%}" * (record["mfu"] > 0)
    return (f"step {record['step']:04}/{config.steps:04}{main}{sparse} | lr {record['lr']:.1e} | "
            f"norm {record['norm']:.2f} | {record['ms']:.0f} ms | {record['rate'] / 1e3:.1f}k tok/s"
            f"{mfu} | ETA {record['eta']:.1f} min")


def validation_line(losses, per_byte, config):
    """What a validation found: nats per token, bits per byte of the first, the GPU's peak memory.
    """
    text = "val " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    if per_byte:
        text += f" | {bits_per_byte(next(iter(losses.values())), per_byte):.4f} bits per byte"
    if on_gpu(config):
        text += f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


# --------------------------------------------------------------------------------------------------
# Pretraining and fine-tuning

RECIPES = {                                             # how each of model.PRESETS is pretrained
    "laptop": dict(context=256, batch_size=16, steps=120, lr=4e-3, eval_interval=120),
    "small": dict(context=2048, batch_size=32, steps=1000, lr=12e-3, optimizer="muon"),
    "base": dict(context=4096, batch_size=128, grad_accum=16, steps=5000, lr=8e-4),
    "paper-1.5b": dict(context=4096, batch_size=512, grad_accum=128, steps=47684, lr=8e-4),
    "paper-2.6b": dict(context=4096, batch_size=512, grad_accum=256, steps=47684, lr=8e-4),
    "paper-7.6b": dict(context=4096, batch_size=512, grad_accum=512, steps=47684, lr=2e-4),
}


def train_flags():
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_training_flags(parser)
    flag = parser.add_argument
    switch = {"action": argparse.BooleanOptionalAction}
    flag("--preset", choices=[*PRESETS], help="shape and recipe; default: laptop")
    flag("--n-layer", type=int, help="layers")
    flag("--n-head", type=int, help="heads")
    flag("--n-embd", type=int, help="width")
    flag("--vocab-size", type=in_64s, help="in 64s; default: the tokenizer's")
    flag("--recurrence", **switch, default=True, help="--no-recurrence: attention only")
    flag("--arl", nargs="+", type=pattern_flag, help="patterns of the sparse updates, of which "
         "each batch draws one; none: no such update; default: D64 for a dense RAT+, else none")
    flag("--one-update", **switch, default=False, help="each batch makes the sparse update or the "
         "main one, by lot: an ordinary model's FLOPs")
    flag("--pattern", type=pattern_flag, default="D1", help="of the main updates; it names the "
         "checkpoint")
    flag("--checkpoint", help="weights to start a new run from")
    return parser


def settle(parser, argv):
    """(config, path, model, meta) of a run; model and meta of the checkpoint that it starts from,
    if any. A checkpoint's flags are defaults, the shape of its model too.
    """
    config = parser.parse_args(argv)
    path = file_of(config.pattern, config.out)
    start = path if config.resume else config.checkpoint
    model, meta = load_checkpoint(start) if start else (None, {})
    saved = {}
    if config.resume:
        saved = inherited(meta, config, set()) | asdict(model.config)
        require("optimizer" in meta, f"{path} is not of train.py, it can't be resumed")
    elif start:
        saved = inherited(meta, config, {*NOT_INHERITED, "data_key"}) | asdict(model.config)
        require(saved.get("data") or config.data, f"{start} does not say what it was trained on: "
                "--data is needed")
        own = meta["pattern"]
        if config.pattern != "D1" or own != "D1":           # ARL belongs to dense training
            saved.pop("arl", None)
        saved["pattern"] = own
    preset = config.preset or saved.get("preset") or "laptop"
    parser.set_defaults(**{**PRESETS[preset], **RECIPES[preset], "preset": preset, **saved})
    config = parser.parse_args(argv)
    if config.arl is None:
        config.arl = ["D64"] if config.recurrence and config.pattern == "D1" else ["none"]
    if start:
        refuse_changes(start, saved if config.resume else asdict(model.config), config, MAY_DIFFER)
    check(config)
    return config, file_of(config.pattern, config.out), model, meta


def main(argv=None):
    config, path, model, meta = settle(train_flags(), argv)
    train, val = load_data(config)
    require(not config.resume or config.data_key == meta["train"].get("data_key"), f"--resume: "
            f"{' '.join(config.data)} holds other tokens than {path} was trained on")
    torch.manual_seed(config.seed)
    if model is None:
        model = RATPlus(RATConfig(config.vocab_size, config.n_layer, config.n_head, config.n_embd,
                                  config.recurrence))
    model.to(config.device)
    pattern = Pattern.parse(config.pattern).check(model.config)
    arl = [Pattern.parse(name).check(model.config) for name in config.arl if name != "none"]
    parent = {"parent": meta.get("parent") or fingerprint(model)} if config.checkpoint else {}
    optimizers = new_optimizers(model, config)
    first = meta["step"] if config.resume else 0
    if config.resume:
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(meta[name])
    header(model, config)
    per_byte = bytes_per_token(val)

    def save_at(step, losses):
        save(path, model, optimizers, step=step, pattern=str(pattern), val=losses, **parent,
             tokenizer=config.tokenizer, train=recorded(config))

    def validate(step, log):
        losses = {str(p): evaluate(model, val, p, config) for p in (pattern, *arl)}
        save_at(step, losses)
        text = validation_line(losses, per_byte, config)
        report(log, f"step {step:04} | {text} | saved {path}", step=step, val=losses)

    signals = catch_signals()
    with open_log(path, config, first) as log:
        report(log, describe(config, model, train, val), step=first, config=recorded(config),
               torch=torch.__version__)
        for record in fit(model, config, train.batch, optimizers, pattern, arl, first, signals):
            step = record["step"]
            ends = step == config.steps
            stopped = record.pop("stopped")
            due = ends or step % config.eval_interval == 0
            if due or stopped:
                save_at(step, {})                       # before the validation, which takes time
            if ends or stopped or step % config.log_interval == 0:
                report(log, log_line(record, config, config.pattern), **record)
            if stopped:
                own = "" if config.pattern == "D1" else f"--pattern {config.pattern} "
                raise KeyboardInterrupt(f"interrupted; step {step} is saved in {path}, {own}"
                                        "--resume goes on")
            if due:
                validate(step, log)
        if first >= config.steps and not meta["val"]:   # stopped in its last validation
            validate(first, log)
    if first >= config.steps:
        print(f"{path} is complete: {first} steps")


def describe(config, model, train, val):
    """The flags, the data and the updates of a run, in two lines."""
    flags = " ".join(f"{name}={value}" for name, value in vars(config).items())
    tokens = config.steps * config.batch_size * config.context
    size = sum(p.numel() for p in model.parameters())
    sparse = [name for name in config.arl if name != "none"]
    both = f"{' or '.join(sparse)}{', or ' if config.one_update else ', then '}" if sparse else ""
    return (f"{flags}\n{tokens / 1e6:.2f}M tokens to train on, {tokens / size:.2g} a parameter, of "
            f"{len(train) / 1e6:.3g}M; each batch updates with {both}{config.pattern}; "
            f"{len(val) / 1e6:.3g}M for validation")


if __name__ == "__main__":
    run(main)
