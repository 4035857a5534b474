"""
Dense pretraining of RAT+ (arXiv 2602.18196) by active recurrence learning (ARL), and fine-tuning.

A model that may attend everywhere has no need of its recurrence, which then learns to reach back a
few tokens only. Under the pattern D64 a query sees every 64th key, and only the recurrence can
carry what lies between. So by default each batch makes two full updates, equation (6):

  theta <- optimizer(theta, gradient of loss(batch; theta, D64))    sparse: recurrence must reach 64
  theta <- optimizer(theta, gradient of loss(batch; theta, D1))     dense: attention to all keys

`python train.py` trains a small model on the source of Python's standard library, offline.
`python train.py --checkpoint out/dense.pt --data mine --out out/mine` fine-tunes a checkpoint.
`torchrun --nproc-per-node=2 train.py` trains on two GPUs: the same batches, the same losses.

The value of a flag is what was typed, else the checkpoint's, the preset's, or the default.
--resume goes on with a run. Ctrl-C finishes the step, saves, and says how to go on.
"""
import argparse
import codecs
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from model import (PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint, on_kernels, require,
                   save_checkpoint)

RECIPES = {                                             # how each of model.PRESETS is pretrained
    "laptop": dict(context=256, batch_size=8, steps=200, lr=24e-3, optimizer="muon"),
    "small": dict(context=2048, batch_size=32, steps=1000, lr=12e-3, optimizer="muon"),
    "base": dict(context=4096, batch_size=128, grad_accum=16, steps=5000, lr=12e-3,
                 optimizer="muon"),
    "paper-1.5b": dict(context=4096, batch_size=512, grad_accum=128, steps=47684, lr=8e-4),
    "paper-2.6b": dict(context=4096, batch_size=512, grad_accum=256, steps=47684, lr=8e-4),
    "paper-7.6b": dict(context=4096, batch_size=512, grad_accum=512, steps=47684, lr=2e-4),
}

# ---- Training ------------------------------------------------------------------------------------

def fit(model, config, batch, optimizers, pattern, arl=(), first=0, signals=()):
    """Train for the steps first..config.steps - 1, and yield records: after the first step, at the
    log and eval intervals, and at the end. Once `signals` is not empty, the step is the last.

    batch(step) -> idx, targets (B, T) int64 on the CPU. arl: patterns of the sparse update. A
    record: steps done, losses {pattern: nats per token}, lr, norm of the gradient before clipping,
    ms per step, rate (tokens per second), mfu, eta (minutes), stopped. Only a record makes the host
    wait for the device. ValueError if a loss or the norm is not finite: NaN is never saved.
    """
    model.checkpointing = config.checkpointing
    if on_gpu(config):
        torch.set_float32_matmul_precision("high")      # TF32 for products in float32
    if config.compile:
        torch._dynamo.config.recompile_limit = 64       # one graph for each rule and shape
        model.compile(dynamic=False)
    flops = {each: flops_per_token(model, each, config.context) for each in (pattern, *arl)}
    start = time.perf_counter()
    reported = first                            # steps that were done at the last record
    spent = 0                                   # FLOPs per token of the steps since then
    for step in range(first, config.steps):
        lr = schedule(step, config)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        parts = share(*batch(step), config)
        losses = {}
        for each in updates(step, config, pattern, arl):                    # (6): sparse, dense
            losses[str(each)], norm = update(model, optimizers, parts, each, config)
            spent += flops[each]
        done = step + 1
        due = 0 in (done % config.log_interval, done % config.eval_interval)
        due = due or done in (first + 1, config.steps)
        if due:
            norm.item()                         # waits, to see what signals came by then
        stopped = summed(torch.tensor(len(signals))).item() > 0
        if not (due or stopped):
            continue
        values = summed(torch.stack([*losses.values()]).double().cpu()).tolist()
        losses = dict(zip(losses, values))
        norm = norm.item()
        require(math.isfinite(sum(values) + norm), f"training stopped at step {done}: losses "
                f"{losses}, gradient norm {norm}")
        seconds = (time.perf_counter() - start) / (done - reported)
        rate = config.batch_size * config.context / seconds
        mfu = spent / (done - reported) * rate / peak_flops(config)
        eta = seconds * (config.steps - done) / 60
        yield dict(step=done, losses=losses, lr=lr, norm=norm, ms=1e3 * seconds, rate=rate,
                   mfu=mfu, eta=eta, stopped=stopped)
        if stopped:
            return
        start = time.perf_counter()
        reported = done
        spent = 0


def updates(step, config, pattern, arl):
    """The patterns of the updates of a step, in order. They follow from the seed and the step."""
    rng = np.random.default_rng((config.seed, step, 1))     # 1: other numbers than Windows.order
    sparse = [arl[rng.integers(len(arl))]] if arl else []
    todo = [*sparse, pattern]
    return [todo[rng.integers(len(todo))]] if arl and config.one_update else todo


def update(model, optimizers, parts, pattern, config):
    """One update. Returns this process's part of the loss and the norm of the whole gradient."""
    total = 0.0
    for idx, targets, weight in parts:
        with autocast(config):
            loss = model.loss(idx, targets, pattern) * weight
        loss.backward()
        total += loss.detach()
    for p in model.parameters():
        summed(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf)
    for optimizer in optimizers.values():
        with autocast(config):                  # for Muon's products
            optimizer.step()
        optimizer.zero_grad()
    return total, norm


def schedule(step, config):
    """The learning rate: a line up to config.lr, then a cosine to config.min_lr at the last."""
    ramp = int(config.warmup * config.steps)
    if step < ramp:
        return config.lr * (step + 1) / ramp
    turn = math.pi * (step - ramp) / max(1, config.steps - ramp - 1)
    low = min(config.lr, config.min_lr)
    return low + (config.lr - low) * (1 + math.cos(turn)) / 2


def new_optimizers(model, config):
    """{name in checkpoints: optimizer}. AdamW trains all parameters, as in the paper. With
    --optimizer muon, Muon takes the matrices of the blocks.
    """
    decay = {"lr": config.lr, "weight_decay": config.weight_decay}
    groups = []
    if config.optimizer == "muon":
        for name in ("mix.in_proj", "mix.out_proj", "fc1", "fc2"):
            matrices = [block.get_submodule(name).weight for block in model.blocks]
            groups.append({"params": matrices, "rows": len(matrices[0])})
        groups[0]["rows"] = model.config.n_embd         # in_proj stacks those of o, q, k, v, g
    taken = {p for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if p not in taken]
    optimizers = {"optimizer": torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **decay)}
    if groups:
        optimizers["muon"] = Muon(groups, decay)
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal matrix by matrix (Jordan et al. 2024) and scaled by 0.2 sqrt(longer
    side), so that AdamW can have the same rate (Liu et al. 2025). The parameters of a group have
    one shape: they stack matrices of `rows` rows.

    torch.optim.Muon does the same to one matrix after another, which takes longer (a step of
    `small` on an H200: 183 ms; here 134), and in bfloat16 on a CPU too. This rounding would make
    the losses of several processes there unlike those of one.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            gradients = []
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                average.lerp_(p.grad, 0.05)
                gradients.append(p.grad.lerp(average, 0.95))        # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"])
            shape = len(gradients), *p.shape
            matrices = torch.stack(gradients).view(-1, group["rows"], shape[-1])
            updates = orthogonal(matrices).reshape(shape)
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            for p, each in zip(group["params"], updates):
                p.add_(each, alpha=-group["lr"] * scale)


def orthogonal(x):
    """x (n, R, C): n matrices, with singular values near 1 by five Newton-Schulz iterations."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT                      # so the Gram matrix is smaller
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x


def autocast(config):
    """A context in which models compute in the dtype of the flags. Their weights stay float32."""
    return torch.autocast(config.device.split(":")[0], torch.bfloat16, config.dtype == "bfloat16")


def move(z, config):
    """z on the device of the flags. Pinned memory lets the host go on before a copy has ended."""
    if on_gpu(config):
        z = z.contiguous().pin_memory()
    return z.to(config.device, non_blocking=True)


# Several processes. torchrun starts one for each GPU. Each takes its share of a batch. `summed`
# adds up their gradients and losses. Process 0 prints and saves.

RANK, LOCAL_RANK, WORLD = 0, 0, 1
if dist.is_torchelastic_launched():
    RANK, LOCAL_RANK, WORLD = (int(os.environ[n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def summed(values):
    """Sum a tensor over all processes, in place, and return it. They wait for each other."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def share(idx, targets, config):
    """[(idx, targets, weight)] of this process. Weighted, all losses add up to the batch's mean."""
    n = WORLD * config.grad_accum
    n_targets = (targets != -100).sum().item()
    parts = []
    for x, y in [*zip(idx.chunk(n), targets.chunk(n))][RANK::WORLD]:
        weight = (y != -100).sum().item() / max(1, n_targets)
        parts.append((move(x, config), move(y, config), weight))
    return parts


# ---- Evaluation, and what is counted -------------------------------------------------------------

@torch.no_grad()
@torch.compiler.set_stance("force_eager")               # compiling would take longer than it saves
def evaluate(model, windows, pattern, config):
    """Mean loss (nats per token) over `windows.spread`. Targets after end-of-text count too."""
    idx, targets = windows.spread
    total = 0.0
    for x, y in zip(idx.split(config.eval_batch), targets.split(config.eval_batch)):
        with autocast(config):
            loss = model.loss(move(x, config), move(y, config), pattern)
        total += loss.item() * (y != -100).sum().item()
    return total / (targets != -100).sum().item()


def bits_per_byte(loss, bytes_per_token):
    """A loss in nats per token as bits per byte of text."""
    return loss / math.log(2) / bytes_per_token


PEAKS = {"H200": 989, "H100 80GB": 989, "A100": 312, "RTX 4090": 165, "RTX 3090": 71}   # TFLOP/s


def peak_flops(config):
    """FLOP/s of all devices in dense bfloat16; infinite for unknown cards, to show no MFU."""
    name = torch.cuda.get_device_name() if on_gpu(config) and config.dtype == "bfloat16" else ""
    known = [PEAKS[card] for card in PEAKS if card in name]
    return WORLD * 1e12 * known[0] if known else math.inf


def flops_per_token(model, pattern, T):
    """Floating-point operations per token of an update: 6 for each weight of a matrix (the tied
    embedding counts once, as the head), and 12 C for each layer and key that the pattern allows.
    The rest is small and left out.
    """
    shape = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    keys = keys_per_token(pattern, shape, T)
    return 6 * weights + 12 * shape.n_embd * shape.n_layer * keys


def positions(T):
    """Up to 1024 positions of T tokens, spread evenly."""
    return torch.linspace(0, T - 1, min(T, 1024)).round().long()


def keys_per_token(pattern, config, T):
    """Mean number of keys per query in a sequence of T tokens, over layers, heads and positions."""
    t = positions(T)
    layers = []
    for i in range(config.n_layer):
        layers.append(np.mean([mean_keys(rule, t) for rule in pattern.rules(i)]))
    return np.mean(layers)


@functools.lru_cache                                    # many layers share a rule
def mean_keys(rule, t):
    """Mean number of keys of queries at t (n,). Top-k blocks count as the first ones: as many."""
    t = t[:, None]
    p = torch.arange(t.max() + 1)
    keys = rule.allowed(t, p)
    if rule.topk:
        keys |= p < (rule.topk - 1) * rule.block
        keys |= p // rule.block == t // rule.block
    return (keys & (p <= t)).sum().item() / len(t)


def bytes_read(cache, t):
    """Bytes of the cache that a decoding step reads, mean over its positions t (n,)."""
    total = 0
    for layer in cache.layers:
        total += layer.state.nbytes
        for group in layer.groups:
            keys = mean_keys(group.rule, t) - 1                 # its own is not in the cache yet
            total += keys * 2 * group.k[:, :, :1].nbytes
            if group.rule.topk:
                n_blocks = (t // group.rule.block).double().mean().item()
                total += n_blocks * group.summaries[:, :, :1].nbytes
    return total


# ---- Data: uint16 tokens in train.bin and val.bin, found in a folder or made from texts ----------

class Windows:
    """The windows of T tokens in files, [(tokens, mask)] of `open_bin`, numbered through all. One
    begins every `stride` tokens. With a stride of T the last window may lack its last target.
    """

    def __init__(self, files, stride, config, coder):
        self.files = files
        self.config = config
        self.coder = coder
        self.T = config.context
        sizes = [len(tokens) for tokens, _ in files]
        self.starts = [range(0, size - self.T + (stride > 1), stride) for size in sizes]
        self.total = sum(map(len, self.starts))
        self.n_tokens = sum(sizes)
        require((self.spread[1] != -100).any(), f"{files[0][0].filename}: no target counts in its "
                f"{self.n_tokens} tokens: more than the --context of {self.T} are needed, or "
                "another mask")

    @functools.lru_cache(2)
    def order(self, epoch):
        return np.random.default_rng((self.config.seed, epoch)).permutation(self.total)

    def batch(self, step):
        """idx, targets (B, T), by seed and step alone: each window comes once an epoch. The target
        after end-of-text does not count: another document's first token can't be known.
        """
        B = self.config.batch_size
        places = divmod(step * B + np.arange(B), self.total)
        idx, targets = self.cut([self.order(epoch)[i] for epoch, i in zip(*places)])
        return idx, targets.masked_fill(idx == self.coder.eot, -100)

    @functools.cached_property
    def spread(self):
        """idx, targets (n, T) of up to --eval-windows windows, spread evenly."""
        most = min(self.config.eval_windows, self.n_tokens // self.T, self.total)
        return self.cut(np.linspace(0, self.total - 1, most).astype(int))

    def cut(self, numbers):
        """idx, targets (B, T) of numbered windows; -100 where a mask is not 1 or the file ends."""
        idx, targets = np.full((2, len(numbers), self.T + 1), -100, np.int64)
        for i, number in enumerate(numbers):
            for (tokens, mask), starts in zip(self.files, self.starts):
                if number < len(starts):
                    break
                number -= len(starts)
            place = slice(starts[number], starts[number] + self.T + 1)
            row = tokens[place].astype(np.int64)
            require(row.max() < self.config.vocab_size, f"{tokens.filename}: token {row.max()} is "
                    f"beyond the vocabulary of {self.config.vocab_size}")
            idx[i, :len(row)] = row
            if mask is not None:
                row[mask[place] != 1] = -100
            targets[i, :len(row)] = row
        return torch.from_numpy(idx[:, :-1]), torch.from_numpy(targets[:, 1:])


def load_data(config):
    """(train, val): the Windows of config.data. Fills in tokenizer and vocab_size if they are open,
    and data_key, which tells these tokens from others wherever they lie.
    """
    require(config.data, "the checkpoint does not say what it was trained on: --data is needed")
    folders = [each for each in config.data if os.path.exists(f"{each}/train.bin")]
    texts = [each for each in config.data if each not in folders]
    config.tokenizer = config.tokenizer or ("bytes" if texts else "gpt2")
    coder = Tokenizer(config.tokenizer, config.eot)
    if texts:
        require(coder.size, f"--data {' '.join(texts)}: there is no train.bin in it, and a text "
                "needs --tokenizer bytes or gpt2")
        folders.append(tokenize(texts, coder.name, config.split_on))
    train = [open_bin(f"{folder}/train.bin") for folder in folders]
    val = [open_bin(f"{folder}/val.bin") for folder in folders]
    files = train + val
    if not config.vocab_size:
        size = coder.size or 1 + max(int(tokens.max()) for tokens, _ in files)
        config.vocab_size = -(-size // 64) * 64         # a multiple of 64, for fast products
    masked = any(mask is not None for _, mask in val)
    train = Windows(train, config.context, config, coder)   # stride T: a masked sample stays whole
    val = Windows(val, config.context if masked else 1, config, coder)
    key = data_key(files)
    if config.data_key not in (None, key):
        note(f"warning: {' '.join(config.data)} has changed since the training, or is other data: "
             "validation may hold what was trained on")
    config.data_key = key
    return train, val


def open_bin(path):
    """(tokens, mask) of a file as nanoGPT (uint16) or llm.c (1024 bytes before them) writes it,
    mapped from disk. mask: None, or uint8 of NAME.mask.bin beside it; 1 marks a target.
    """
    size = os.path.getsize(path)
    head = np.fromfile(path, "<i4", 3).tolist()
    offset = 1024 if head and head[0] // 10000 == 2024 else 0       # llm.c's magic number: a date
    fits = head == [20240520, 1, (size - offset) // 2] if offset else size
    require(fits and size % 2 == 0, f"{path}: {size} bytes, empty, an odd number, or not as many "
            f"as a header of llm.c's magic number, version and tokens says: {head}")
    tokens = np.memmap(path, "<u2", "r", offset)
    words = tokens[:1000]
    low, high = sorted((words[::2].max(), words[1::2].max(initial=0)))
    is_32_bit = len(words) > 1 and low <= (3 if high > 4095 else 0)   # high halves: 0
    halves = [np.bincount(half, minlength=256) for half in (words & 255, words >> 8)]
    is_8_bit = high > 511 and np.minimum(*halves).sum() > 0.75 * len(words)
    require(not is_32_bit and not is_8_bit, f"{path} looks like numbers of 32 bits, one byte a "
            f"token, or text: {words[:8].tobytes()}; uint16 tokens are wanted")
    beside = path.removesuffix(".bin") + ".mask.bin"
    mask = np.memmap(beside, np.uint8, "r") if os.path.exists(beside) else None
    require(mask is None or len(mask) == len(tokens), f"{beside}: a byte for each of the "
            f"{len(tokens)} tokens is wanted")
    return tokens, mask


def data_key(files):
    """The number of tokens, and a hash of 64 chunks of each file, spread evenly."""
    content = hashlib.sha1()
    for tokens, mask in files:
        for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(int):
            content.update(tokens[start:start + 4096])
            content.update(b"" if mask is None else mask[start:start + 4096])
    return f"{sum(len(tokens) for tokens, _ in files)} tokens {content.hexdigest()[:8]}"


def find_texts(source):
    """[(hash of the name, path)] of the files of a source, in this order. Links are followed, but a
    file counts once. Hidden ones, and those beside checkpoints, are left out.
    """
    stdlib = source == "stdlib"
    root = sysconfig.get_path("stdlib") if stdlib else source
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"} if stdlib else set()
    found = {root: os.path.basename(root)} if os.path.isfile(root) else {}
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in visited else sorted({*folders} - left_out)
        visited.add(real)
        is_run = any(name.endswith(".pt") for name in names)
        for path in sorted(os.path.join(folder, name) for name in names):
            name = os.path.relpath(path, root)
            skipped = is_run or "/." in f"/{name}"
            if os.path.isfile(path) and not skipped and name.endswith(".py" if stdlib else ""):
                found.setdefault(os.path.realpath(path), name)
    require(found, f"--data {source}: no such file or folder, or nothing in it")
    return sorted((hashlib.md5(os.fsencode(found[path])).hexdigest(), path) for path in found)


def tokenize(sources, tokenizer, split_on=None):
    """The folder of the tokens of one or several sources, made once. Its name is a hash of them."""
    sources = np.atleast_1d(sources).tolist()
    texts = [text for source in sources for text in find_texts(source)]
    key = hashlib.md5(ascii([tokenizer, split_on, texts]).encode())
    for _, path in texts:
        with open(path, "rb") as f:
            key.update(hashlib.file_digest(f, "md5").digest())
    folder = f".cache/{os.path.basename(sources[0])[:80]}-{tokenizer}-{key.hexdigest()[:8]}"
    if not os.path.exists(folder):
        os.makedirs(".cache", exist_ok=True)
        with tempfile.TemporaryDirectory(dir=".cache") as scratch:
            os.mkdir(f"{scratch}/new")
            write_tokens(texts, Tokenizer(tokenizer), split_on, f"{scratch}/new")
            with contextlib.suppress(OSError):          # another process has done it meanwhile
                os.rename(f"{scratch}/new", folder)
    return folder


def write_tokens(texts, coder, split_on, folder):
    """Write train.bin and val.bin. A hash of its name puts one text in 20 into val.bin; of fewer
    than 100 texts, the last 20th of each goes there. What is not UTF-8 text is left out.
    """
    note(f"tokenizing {len(texts)} texts")
    n_texts = 0
    n_documents = 0
    with open(f"{folder}/train.bin", "wb") as train, open(f"{folder}/val.bin", "wb") as val:
        for name_hash, path in texts:
            text = "\0"                                 # as binary files have
            with open(path, "rb") as f, contextlib.suppress(UnicodeDecodeError):
                text = f.read().decode("utf-8-sig")     # a byte order mark is no text
            if "\0" in text:
                continue
            n_texts += 1
            border = len(text) * 19 // 20
            if len(texts) >= 100:
                border = 0 if int(name_hash, 16) % 20 == 0 else len(text)
            for file, part in ((train, text[:border]), (val, text[border:])):
                for document in filter(None, part.split(split_on or "\0")):     # or whole
                    coder.write(document, file)
                    n_documents += 1
        require(train.tell() and val.tell(), f"--data: of {len(texts)} files {n_texts} are UTF-8 "
                "text, too few for training and validation")
    note(f"tokenized: {n_texts}/{len(texts)} texts are UTF-8, split into {n_documents} documents")


class Tokenizer:
    """Text <-> token ids: UTF-8 bytes, GPT-2's BPE, or numbers, of which `eot` may end a text."""

    def __init__(self, name, eot=None):
        ids = (None, -1 if eot is None else eot)            # -1: nothing ends a text
        sizes = {"bytes": (257, 256), "gpt2": (50257, 50256), "ids": ids}
        self.name = name
        self.size, self.eot = sizes[name]
        require(eot in (None, self.eot), f"--eot {eot}: end-of-text of {name} is {self.eot}")
        self.partial = codecs.getincrementaldecoder("utf-8")("replace")

    @functools.cached_property
    def bpe(self):
        import tiktoken                                     # OSError if it can't have GPT-2's
        return tiktoken.get_encoding("gpt2")

    def encode(self, text):
        """Token ids as a list or an array. `ids` refuses all but numbers (ValueError)."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        if self.name == "gpt2":
            parts = re.split(r"(\s{1000}|\S{10000})", text)         # tiktoken fails on long runs
            return [token for part in parts for token in self.bpe.encode_ordinary(part)]
        require(re.fullmatch(r"[0-9\s]*", text), "no tokenizer for this vocabulary: write token "
                f"ids, like '1 15043', not {text[:40]!r}")
        return [int(word) for word in text.split()]

    def write(self, document, file, size=2**20):
        """Append a document and end-of-text to a file, in pieces, to save memory."""
        for start in range(0, len(document), size):
            np.asarray(self.encode(document[start:start + size]), "<u2").tofile(file)
        np.array([self.eot], "<u2").tofile(file)

    def bytes_of(self, token):
        """The bytes of text that a token stands for, if any."""
        if self.name == "ids" or token >= self.eot:
            return b""
        return bytes([token]) if self.name == "bytes" else self.bpe.decode_single_token_bytes(token)

    def decode(self, token):
        """The text that a token completes; '' within a character, and for unused tokens."""
        if self.name == "ids":
            return f"{token} "
        return "<|endoftext|>" if token == self.eot else self.partial.decode(self.bytes_of(token))


def bytes_per_token(windows):
    """Mean bytes of text of a validation target; 0 of ids, None if tiktoken has no vocabulary."""
    _, targets = windows.spread
    tokens, counts = targets[targets >= 0].unique(return_counts=True)
    with contextlib.suppress(OSError, ValueError, ImportError):         # offline, or no tiktoken
        sizes = [len(windows.coder.bytes_of(token)) for token in tokens.tolist()]
        return np.average(sizes, weights=counts)


# ---- Flags ---------------------------------------------------------------------------------------

SWITCH = argparse.BooleanOptionalAction                     # --flag and --no-flag
OF_A_CALL = {"out", "device", "compile", "resume", "overwrite"}     # no defaults of other calls
NOT_INHERITED = {"checkpoint", "seed", "dtype"}             # what a new run does not take over
# What --resume may change: the data's place, the steps, and what affects rounding at most.
MAY_DIFFER = {"data", "steps", "log_interval", "eval_interval", "eval_batch", "grad_accum",
              "checkpointing", *OF_A_CALL}


def new_parser(doc):
    """A parser with the flags of every script."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, f"{message} (see --help)")    # one line, by `run`
    flag = parser.add_argument
    flag("--out", default="out", help="folder of checkpoints and logs; default: out")
    flag("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    flag("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, else float32")
    flag("--seed", type=int, default=0, help="of weights, batches and sampling; default: 0")
    return parser


def add_data_flags(parser):
    """The flags of every script that reads data."""
    flag = parser.add_argument
    flag("--data", nargs="+", help="stdlib (the default), texts, or folders of texts or .bin files")
    flag("--tokenizer", choices=("bytes", "gpt2", "ids"), help="of texts: bytes (default) or gpt2 "
         "(offline with TIKTOKEN_CACHE_DIR); of .bin files: gpt2 (default), or what they hold")
    flag("--eot", type=int, help="end-of-text token of ids; default: none")
    flag("--split-on", help="in texts, what stands between documents, such as <|endoftext|>")
    flag("--context", type=int, default=1024, help="tokens per sequence")
    flag("--eval-windows", type=int, default=64, help="windows of validation data, spread evenly")
    flag("--eval-batch", type=int, default=8, help="windows that are validated at once")
    parser.set_defaults(data_key=None, vocab_size=None)             # filled in by load_data


def add_training_flags(parser):
    """The flags of pretraining and adaptation."""
    flag = parser.add_argument
    for name, default, text in (
            ("--batch-size", 16, "sequences per update"),
            ("--grad-accum", 1, "parts of a process's share that run one by one"),
            ("--steps", 1000, "batches to train on"),
            ("--lr", 1e-3, "peak learning rate"),
            ("--min-lr", 1e-6, "learning rate of the last step, if --lr is above"),
            ("--warmup", 0.05, "share of the steps in which the rate rises"),
            ("--weight-decay", 0.1, "on all parameters"),
            ("--clip", 1.0, "largest gradient norm, 0 for no limit"),
            ("--log-interval", 10, "steps between log lines"),
            ("--eval-interval", 250, "steps between saves and validations")):
        flag(name, type=type(default), default=default, help=text)
    flag("--optimizer", choices=("adamw", "muon"), default="adamw",
         help="muon wants ten times the --lr of adamw")
    flag("--compile", action=SWITCH, help="torch.compile the blocks; default: on a GPU")
    flag("--checkpointing", action=SWITCH, default=False, help="recompute, to save memory")
    flag = parser.add_mutually_exclusive_group().add_argument
    flag("--resume", action="store_true", help="go on with what is in --out")
    flag("--overwrite", action="store_true", help="start anew; old files become NAME.old")


def train_flags():
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_training_flags(parser)
    flag = parser.add_argument
    flag("--preset", choices=[*PRESETS], default="laptop", help="shape and recipe; default: laptop")
    flag("--n-layer", type=int, help="layers")
    flag("--n-head", type=int, help="heads")
    flag("--n-embd", type=int, help="width")
    flag("--vocab-size", type=int, help="default: the tokenizer's, rounded up to a multiple of 64")
    flag("--recurrence", action=SWITCH, default=True, help="--no-recurrence: attention only")
    flag("--arl", nargs="+", type=pattern_flag, help="sparse patterns, of which each batch "
         "draws one; 'none' turns them off; default: D64 for a dense RAT+")
    flag("--one-update", action=SWITCH, default=False, help="draw one of a batch's two updates")
    flag("--pattern", type=pattern_flag, default="D1", help="of the main updates; names the file")
    flag("--checkpoint", help="weights to start a new run from")
    return parser


def pattern_flag(text):
    """The type of flags that name a pattern: the text as `str(Pattern)` writes it, or none."""
    try:
        return text if text == "none" else str(Pattern.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def inherit(parser, argv, path, left_out):
    """(config, model, meta). The checkpoint sets the flags that are neither typed nor left_out."""
    config = parser.parse_args(argv)
    if not path:
        return config, None, {}
    model, meta = load_checkpoint(path)
    saved = {"data": None, **meta.get("train", {}), **asdict(model.config)}
    saved.update(tokenizer=meta["tokenizer"], pattern=meta["pattern"])
    names = (saved.keys() & vars(config)) - OF_A_CALL - left_out
    parser.set_defaults(**{name: saved[name] for name in names})
    return parser.parse_args(argv), model, meta


def refuse_changes(path, saved, config, free=MAY_DIFFER):
    """ValueError if a flag differs from the checkpoint at `path`."""
    for name, mine in vars(config).items():
        value = saved.get(name, mine)
        flag = name.removesuffix("_key").replace("_", "-")      # data_key stands for --data
        require(name in free or mine == value, f"--{flag} {mine}: {path} has {value}, and what "
                "changes the result can't differ")


def on_gpu(config):
    return config.device.startswith("cuda")


def check(config):
    """Fill in --device, --dtype and --compile. ValueError for bad flags."""
    for name, value in vars(config).items():
        if type(value) in (int, float) and name != "eot":
            least = 1 if type(value) is int and name != "seed" else 0
            flag = name.replace("_", "-")
            require(least <= value < 2**31, f"--{flag} {value}: from {least} on, below 2^31")
    config.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda":
        config.device = f"cuda:{LOCAL_RANK}"
    try:
        torch.zeros(1, device=config.device).item()         # the device "meta" has nothing to read
    except Exception as error:                              # torch raises all kinds
        raise ValueError(f"--device {config.device}: {error}") from error
    if on_gpu(config):
        torch.cuda.set_device(config.device)                # where Triton and NCCL work
    config.dtype = config.dtype or ("bfloat16" if on_gpu(config) else "float32")
    if "batch_size" in config:                                  # the flags of training
        require(config.batch_size % (WORLD * config.grad_accum) == 0, "--batch-size "
                f"{config.batch_size} does not split into --grad-accum {config.grad_accum} x "
                f"{WORLD} processes")
        require(config.warmup <= 1, f"--warmup {config.warmup:g} is no share of the steps, 0 to 1")
        if config.compile is None:
            config.compile = on_gpu(config)


# ---- A script as a whole: what it prints and saves, how it ends ----------------------------------

def header(model, config):
    """Print what runs on what: the first line of every script."""
    size = sum(p.numel() for p in model.parameters())
    runs = "Triton kernels" if on_kernels(model.embed.weight) else "plain PyTorch"
    where = torch.cuda.get_device_name() if on_gpu(config) else "CPU"
    several = f" | {WORLD} processes" * (WORLD > 1)
    print(f"{model.config.name} | {size / 1e6:.2f}M parameters | {model.config} | torch "
          f"{torch.__version__}, {config.dtype}, {runs} on {where}{several}", flush=True)


def note(text):
    """Say something beside the result, on stderr, once for all processes."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def catch_signals():
    """A list to which Ctrl-C, SIGTERM and SIGHUP (unless ignored, as by nohup) add from now on. A
    repeated one ends the process at once, but not under torchrun, which sends the first twice.
    """
    signals = []

    def catch(number, frame):
        signals.append(number)
        if not dist.is_torchelastic_launched():
            signal.signal(number, signal.default_int_handler)

    hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)             # Windows has none
    for number in (signal.SIGINT, signal.SIGTERM, hang_up):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return signals


def out_of_memory(error):
    """Whether the error says that memory ran out. A CPU's is a plain RuntimeError in torch."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def run(main):
    """Call main() as a script. Bad input, a lack of memory and Ctrl-C end it with one line."""
    with contextlib.suppress(AttributeError):               # closed, a notebook's, on Windows
        sys.stdout.reconfigure(errors="backslashreplace")   # an ASCII terminal shows what it can
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # a reader as `head` ends it silently
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    code = 0
    try:
        main()
        print(end="", flush=True)                           # a full disk shows here at the latest
    except (ValueError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        note(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split()) or 'interrupted'}")
    if WORLD > 1:
        os._exit(code)                      # does not wait for processes that have ended
    if code:
        sys.exit(code)


def file_of(pattern, out):
    """The checkpoint of a pattern in `out`: dense.pt of D1, D16.pt, D1+D4_D8.pt of D1,D4/D8."""
    name = pattern.translate(str.maketrans(",/:", "+_-"))
    return os.path.join(out, "dense.pt" if name == "D1" else f"{name}.pt")


def fingerprint(model):
    """Eight hex digits of the embedding. A checkpoint names its first parent by them."""
    return hashlib.md5(model.embed.weight.detach().float().cpu().numpy()).hexdigest()[:8]


def made_from(meta, weights, about):
    """True if a checkpoint with this meta was adapted from dense weights, which are given by their
    fingerprint and by `about`, their meta. Also if both were fine-tuned from one pretrained model.
    """
    parent = meta.get("parent")
    fine_tuned = parent is not None and "adapt" not in meta
    return parent == weights or fine_tuned and parent == about.get("parent")


def save(path, model, optimizers={}, **meta):
    """Save in process 0. The others wait: if one ended, torchrun would kill process 0 too."""
    if RANK == 0:
        states = {name: each.state_dict() for name, each in optimizers.items()}
        save_checkpoint(path, model, **meta, **states)
    summed(torch.zeros(1))


def open_log(path, config, first=0):
    """The JSONL log beside the checkpoint `path`. A new run refuses files of another one, or with
    --overwrite renames them. A resumed one adds to the log: the last record of a step counts.
    """
    if RANK:
        return open(os.devnull, "w")
    os.makedirs(config.out, exist_ok=True)
    log_path = path.removesuffix(".pt") + ".jsonl"
    for old in filter(os.path.exists, () if first else (path, log_path)):
        require(config.overwrite or config.resume, f"{old} exists: --resume goes on with it, "
                "--overwrite starts anew, --out names another folder")
        os.replace(old, f"{old}.old")
    return open(log_path, "a" if first else "x")


def report(log, text, **record):
    """A record in the log, and a line on the screen."""
    print(json.dumps(record), file=log, flush=True)
    print(text, flush=True)


def log_line(record, config, pattern):
    losses = ""
    for name, loss in reversed(record["losses"].items()):           # the main update came last
        losses += f" {'loss' if name == pattern else 'sparse'} {loss:.4f}"
    mfu = f" | MFU {record['mfu']:.0%}" if record["mfu"] else ""
    return (f"step {record['step']:04}/{config.steps:04} |{losses} | lr {record['lr']:.1e} | "
            f"norm {record['norm']:.2f} | {record['ms']:.0f} ms | {record['rate'] / 1e3:.1f}k tok/s"
            f"{mfu} | ETA {record['eta']:.1f} min")


# ---- Pretraining and fine-tuning -----------------------------------------------------------------

def settle(argv):
    """(config, model, meta) of a run; the last two of the checkpoint that it starts from."""
    parser = train_flags()
    typed = parser.parse_args(argv)
    parser.set_defaults(data=["stdlib"], **PRESETS[typed.preset], **RECIPES[typed.preset])
    start = file_of(typed.pattern, typed.out) if typed.resume else typed.checkpoint
    left_out = set() if typed.resume else NOT_INHERITED | {"data_key"}
    config, model, meta = inherit(parser, argv, start, left_out)
    require("optimizer" in meta or not config.resume, f"train.py has not made {start}")
    if not (config.resume or config.pattern == meta.get("pattern") == "D1"):
        config.arl = typed.arl                          # a checkpoint's is for dense training
    if config.arl is None:
        config.arl = ["D64"] if config.recurrence and config.pattern == "D1" else ["none"]
    check(config)
    return config, model, meta


def main(argv=None):
    config, model, meta = settle(argv)
    path = file_of(config.pattern, config.out)
    train, val = load_data(config)
    if config.resume:
        refuse_changes(path, meta["train"], config)
    torch.manual_seed(config.seed)
    shape = {name: getattr(config, name) for name in RATConfig.__dataclass_fields__}
    model = model or RATPlus(RATConfig(**shape))
    model.to(config.device)
    pattern = Pattern.parse(config.pattern).check(model.config)
    arl = [Pattern.parse(name).check(model.config) for name in config.arl if name != "none"]
    kept = {"pattern": config.pattern, "tokenizer": config.tokenizer, "train": vars(config)}
    if config.checkpoint:
        preset = meta.get("train", {}).get("preset", config.preset)
        refuse_changes(config.checkpoint, {"preset": preset, **asdict(model.config)}, config)
        kept["parent"] = meta.get("parent") or fingerprint(model)
    optimizers = new_optimizers(model, config)
    step = 0
    if config.resume:
        step = meta["step"]
        if step >= config.steps:
            note(f"{path} has {step} steps already")
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(meta[name])
    per_byte = bytes_per_token(val)
    size = config.steps * config.batch_size * config.context
    ratio = size / sum(p.numel() for p in model.parameters())
    header(model, config)
    signals = catch_signals()
    with open_log(path, config, step) as log:
        report(log, f"{config}\n{size / 1e6:.3g}M tokens to train on, {ratio:.2g} a parameter, of "
               f"{train.n_tokens / 1e6:.3g}M; {val.n_tokens / 1e6:.3g}M for validation", step=step,
               config=vars(config), torch=torch.__version__)
        for record in fit(model, config, train.batch, optimizers, pattern, arl, step, signals):
            step = record["step"]
            stopped = record.pop("stopped") and step < config.steps
            due = step == config.steps or step % config.eval_interval == 0
            if stopped or due:                  # before what takes time, or may fail
                save(path, model, optimizers, step=step, val={}, **kept)
            report(log, log_line(record, config, config.pattern), **record)
            if stopped:
                raise KeyboardInterrupt(f"interrupted; step {step} is saved in {path}, --out "
                                        f"{config.out} --pattern {config.pattern} --resume goes on")
            if due:
                losses = {str(p): evaluate(model, val, p, config) for p in (pattern, *arl)}
                save(path, model, optimizers, step=step, val=losses, **kept)
                text = " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                if per_byte:
                    bits = bits_per_byte(losses[config.pattern], per_byte)
                    text += f" | {bits:.4f} bits per byte"
                if on_gpu(config):
                    text += f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                report(log, f"step {step:04} | val {text} | saved {path}", step=step, val=losses)


if __name__ == "__main__":
    run(main)
