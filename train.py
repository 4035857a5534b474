"""
Dense pretraining of RAT+ with active recurrence learning (ARL), and fine-tuning.

A model that may attend everywhere has no need of its recurrence, which then learns to reach back a
few tokens only. Under the pattern D64 a query sees every 64th key, and only the recurrence can
carry what lies between. So by default each batch is used for two full updates, equation (6):

  theta <- AdamW(theta, gradient of loss(batch; theta, D64))    sparse: the recurrence must reach 64
  theta <- AdamW(theta, gradient of loss(batch; theta, D1))     dense: attention to all keys

  code          type       meaning
  arl           patterns   the sparse update's pattern, D64; of several, each batch draws one
  recurrence    bool       False (--no-recurrence): the attention-only baseline; by default no ARL
  idx, targets  (B, T)     a batch: B = batch_size windows of T = context tokens
  parts         list       a process's share of a batch, in grad_accum pieces
  lr, min_lr    float      learning rate: peak, and last

`python train.py` trains a small model on the source of Python's standard library, offline.
`python train.py --checkpoint out/dense.pt --data mine --out out/mine` fine-tunes a checkpoint.
`torchrun --nproc-per-node=2 train.py` trains on two GPUs: the same batches, the same losses.

A flag has the first of these values: the command line's, the checkpoint's, the preset's, the
default. The model's shape is always the checkpoint's: another one is refused. --resume goes on with
a run: of the flags that change the result, only --steps may differ. --overwrite starts anew: before
the first step it renames the old run's files to NAME.old.
"""
import argparse
import codecs
import contextlib
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
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import (PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint, path as path_taken,
                   save_checkpoint)
try:
    import fcntl
except ImportError:                         # Windows: runs there do not lock their files
    fcntl = None

# --------------------------------------------------------------------------------------------------
# Training

def fit(model, config, batch, optimizer, pattern, arl=(), first=0, stop=lambda: False):
    """Train for the steps first..config.steps - 1, and yield records of how it goes.

    batch(step) -> idx, targets: (B, T) int64 on the CPU. pattern: of the main update, dense (D1) in
    pretraining. arl: choices for the sparse update before it, of which each step draws one. None is
    the choice of no sparse update. stop(): asked after each step; True ends the training there.

    A record is due after the first step, at the log and eval intervals, and at the end: step (how
    many are done), losses {pattern: nats per token}, lr, norm (of the main update's gradient,
    before clipping), ms per step, rate (tokens per second), mfu, eta (minutes), stopped. Only
    records make the host wait for the device. ValueError if a loss or the norm is not finite, or if
    a loss has no gradient. NaN weights make all later losses NaN, so checking the losses of records
    is enough, as each save follows one.
    """
    loss_fn = trainable(model, config)
    tokens = config.batch_size * config.context
    flops = sum(flops_per_token(model, p, config.context) for p in arl if p) / max(1, len(arl))
    flops += flops_per_token(model, pattern, config.context)
    start = time.perf_counter()
    reported = first                            # steps that were done at the last record
    for step in range(first, config.steps):
        lr = schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parts = share(*batch(step), config)
        losses = {}
        sparse = draw(arl, step, config)
        if sparse:                                                          # (6), sparse
            losses[str(sparse)], _ = update(loss_fn, optimizer, parts, sparse, config.clip)
        losses[str(pattern)], norm = update(loss_fn, optimizer, parts, pattern, config.clip)
        done = step + 1
        stopped = stop() and done < config.steps
        due = done % config.log_interval == 0 or done % config.eval_interval == 0
        if not (due or stopped or step == first or done == config.steps):
            continue
        values, norm = measured(losses, norm, done)
        seconds = (time.perf_counter() - start) / (done - reported)
        if step == first:
            say(f"first step in {seconds:.1f} s{', compilation included' * config.compile}")
        yield dict(step=done, losses=values, lr=lr, norm=norm, ms=1e3 * seconds,
                   rate=tokens / seconds, mfu=flops * tokens / seconds / peak_flops(config),
                   eta=seconds * (config.steps - done) / 60, stopped=stopped)
        if stopped:
            return
        start = time.perf_counter()
        reported = done


def update(loss_fn, optimizer, parts, pattern, clip):
    """One optimizer update on a batch, of which `parts` is this process's share, under a pattern.

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
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def draw(patterns, step, config):
    """One of the patterns for a step's sparse update: the same for the same seed and step."""
    if not patterns:
        return None
    return patterns[np.random.default_rng((config.seed, step, 1)).integers(len(patterns))]


def schedule(step, config):
    """The learning rate: it rises over the `warmup` share of the steps, then falls along a cosine.

    The first step after the warm-up has config.lr and the last step has config.min_lr.
    """
    ramp = int(config.warmup * config.steps)
    if step < ramp:
        return config.lr * (step + 1) / ramp
    turn = math.pi * (step - ramp) / max(1, config.steps - ramp - 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(turn)) / 2


def new_optimizer(model, config):
    """AdamW with weight decay on all parameters, as the authors do."""
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95),
                             weight_decay=config.weight_decay, fused=True)


def measured(losses, norm, done):
    """The losses and the norm as numbers of the whole batch. ValueError if training went wrong."""
    mine = torch.stack((*losses.values(), norm / WORLD)).double().cpu()
    *values, norm = summed(mine).tolist()
    if not all(map(math.isfinite, (*values, norm))) or norm == 0 < max(values):
        found = ", ".join(f"loss {loss} under {name}" for name, loss in zip(losses, values))
        raise ValueError(f"training stopped at step {done}: {found}, gradient norm {norm}; "
                         "the last checkpoint is untouched")
    return dict(zip(losses, values)), norm


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
def evaluate(model, stream, pattern, config):
    """Mean loss (nats per token) over the targets in windows spread evenly over a Stream.

    Every target counts, after end-of-text too, but for those that a mask excludes.
    """
    loss_fn = Loss(model, config)
    windows = evenly(stream, config)
    size = config.eval_batch
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(RANK * size, len(windows), WORLD * size):
        idx, targets = cut(stream, windows[i:i + size])
        count = (targets != -100).sum().item()
        loss = loss_fn(move(idx, config), move(targets, config), pattern).item()
        sums += torch.tensor([count * loss, count])
    total, count = summed(sums).tolist()
    return total / count                                    # load_data has seen that some count


PEAKS = {                                   # dense bfloat16 TFLOP/s, from the vendors' data sheets
    "B200": 2250, "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756, "A100": 312, "L40S": 362,
    "L4$": 121, "RTX 4090$": 165, "RTX 3090$": 71,
}


def peak_flops(config):
    """FLOP/s of all devices together. Infinite for unknown cards: their MFU is then not shown."""
    if on_gpu(config) and config.dtype == "bfloat16":
        for card, peak in PEAKS.items():
            if re.search(card, torch.cuda.get_device_name()):
                return WORLD * 1e12 * peak
    return math.inf


def flops_per_token(model, pattern, T):
    """Floating-point operations per token of an update, backward included.

    6 for each weight of a matrix (the tied embedding counts once, as the head), and 12 C for each
    layer and key that the pattern allows. The recurrence and elementwise work are left out.
    """
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    per_key = 12 * model.config.n_embd * model.config.n_layer
    return 6 * weights + per_key * pattern.keys_per_token(model.config, T)


# --------------------------------------------------------------------------------------------------
# Several processes. torchrun starts the script once a GPU and numbers the processes by environment
# variables. Gradients meet in DDP, and a few numbers in `summed`. Process 0 prints and saves.

def from_torchrun():
    """RANK, LOCAL_RANK, WORLD; 0, 0, 1 if only some variables are set, as a cluster's shell may."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if all(values) and all(value.isdecimal() for value in values[2:]):
        return tuple(map(int, values[2:]))
    return 0, 0, 1


RANK, LOCAL_RANK, WORLD = from_torchrun()


def summed(values):
    """The sum of a CPU tensor over all processes. ConnectionError if one of them has ended."""
    if WORLD == 1:
        return values
    try:
        dist.all_reduce(values)
    except RuntimeError as error:
        raise ConnectionError("stopped, as another process has ended") from error
    return values


def say(text):
    """Print a line. A reader or a terminal that has gone away is no error: go on silently."""
    try:
        print(text, flush=True)
    except OSError:
        hang_up()


def note(text):
    """Say something beside the result, on stderr, once for all processes."""
    if RANK == 0:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def hang_up():
    """Send what is still to be printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


@contextlib.contextmanager
def stop_signals():
    """Yield a function that says whether the run was asked to stop: Ctrl-C, SIGTERM, or SIGHUP.

    All processes must call that function, and it answers the same in all. Without torchrun a
    Ctrl-C after the first signal ends the process at once. An ignored SIGHUP (nohup) stays so.
    """
    asked = []

    def ask(number, frame):
        asked.append(number)
        if WORLD == 1:                      # torchrun passes on Ctrl-C as a second signal
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: summed(torch.tensor(len(asked))).item() > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(path, wait=False):
    """Lock a file until the returned object is closed or this process ends, however it ends.

    If another process holds it: ValueError, or with `wait` no return before it lets go.
    """
    file = open(path, "a")
    if fcntl is None:
        return file
    try:                                    # unlike a collective, waiting here has no time limit
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{path}: another run is writing there; --out names another folder for "
                         "this one") from error
    return file


def out_of_memory(error):
    """Whether the error says that memory ran out. A CPU's is a plain RuntimeError in torch."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)


def complain(why, code):
    """One line on stderr, from process 0 if it has one to give. Returns the exit code."""
    if RANK:                                # torchrun ends this process once process 0 has ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    with contextlib.suppress(OSError):
        line = " ".join(str(why).split())
        print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr, flush=True)
    return code


def run(main):
    """Call main() as a script, in one or several processes.

    Bad input, a missing file, a lack of memory and Ctrl-C become one line on stderr and a non-zero
    exit. A reader that has seen enough (`| head`) is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")   # an ASCII terminal shows what it can
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    elif os.environ.get("WORLD_SIZE", "1") not in ("1", ""):
        note("WORLD_SIZE is set, but not all of torchrun's variables: running as one process")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    code = 0
    try:
        main()
        summed(torch.zeros(1))
        sys.stdout.flush()
    except BrokenPipeError:
        hang_up()
    except KeyboardInterrupt as error:
        code = complain(f"interrupted{error}", 130) if RANK == 0 else 130
    except Exception as error:
        if not (isinstance(error, (ValueError, OSError)) or out_of_memory(error)):
            raise
        code = complain(error, 1)
    if WORLD > 1:
        os._exit(code)                      # does not wait for what others will not send
    if code:
        sys.exit(code)


# --------------------------------------------------------------------------------------------------
# Batches. A Stream is one or several files of tokens, and a window is a pair (file, offset).

class Bin(NamedTuple):
    """A file of tokens, mapped from disk, and what was seen in it."""
    path: str
    tokens: np.ndarray                  # (n,) uint16
    mask: np.ndarray = None             # (n,) uint8, 1 where a token counts as a target; None: all
    largest: int = 0
    has_gpt2_eot: bool = False
    key: str = ""                       # tells these tokens from others


class Stream:
    """Bins of tokens, numbered one after the other. No window reaches into the next file.

    T: tokens per window; limit: the vocabulary's size. With a mask, all windows lie side by side,
    so that samples of T tokens stay whole.
    """

    def __init__(self, files, T, limit=65536):
        self.files = files
        self.T = T
        self.limit = limit
        self.masked = any(file.mask is not None for file in files)
        self.stride = T if self.masked else 1       # between the windows that may be drawn

    def __len__(self):
        return sum(len(file.tokens) for file in self.files)

    def counts(self, stride):
        """How many windows each file has, if one begins every `stride` tokens."""
        return [(len(file.tokens) - self.T - 1) // stride + 1 for file in self.files]

    def windows(self, numbers, stride):
        """The windows of some numbers, each below sum(self.counts(stride))."""
        ends = np.cumsum(self.counts(stride))
        files = np.searchsorted(ends, numbers, side="right")
        places = numbers - np.append(0, ends)[files]
        return list(zip(files.tolist(), (places * stride).tolist()))


def in_order(step, config, stream):
    """Windows of a batch that reads the data in order, once if it is long enough.

    The stream is cut into batch_size stretches. Row r of each batch goes on where row r of the last
    one ended, within the r-th stretch, and begins again at its end. What a step reads does not
    depend on how many steps there will be. Offsets are multiples of T, so samples of T tokens stay
    whole. A stream of fewer windows than rows is read at random instead.
    """
    count = sum(stream.counts(stream.T))
    if count < config.batch_size:                           # rows would read the same
        return at_random(step, config, stream)
    edges = np.arange(config.batch_size + 1) * count // config.batch_size
    return stream.windows(edges[:-1] + step % np.diff(edges), stream.T)


def at_random(step, config, stream):
    """Windows at random offsets of all files, the same again for the same seed and step."""
    rng = np.random.default_rng((config.seed, step))
    numbers = rng.integers(0, sum(stream.counts(stream.stride)), config.batch_size)
    return stream.windows(numbers, stream.stride)


def evenly(stream, config):
    """The windows of a validation, spread evenly."""
    most = min(config.eval_windows, sum(stream.counts(stream.T)))
    numbers = np.linspace(0, sum(stream.counts(stream.stride)) - 1, most).astype(int)
    return stream.windows(numbers, stream.stride)


def cut(stream, windows, eot=-1):
    """The tokens of windows: idx, targets (B, T) int64; a target of -100 does not count.

    That is a target whose mask is not 1, and the one after end-of-text, since the first token of
    another document can't be known. ValueError for a token beyond the vocabulary.
    """
    T = stream.T
    tokens = [stream.files[file].tokens[at:at + T + 1] for file, at in windows]
    tokens = torch.from_numpy(np.stack(tokens).astype(np.int64))
    if tokens.max() >= stream.limit:
        paths = " ".join(file.path for file in stream.files)
        raise ValueError(f"{paths}: token {tokens.max()} is beyond the vocabulary of "
                         f"{stream.limit}")
    idx = tokens[:, :-1]
    targets = tokens[:, 1:].masked_fill(idx == eot, -100)
    for row, (file, at) in enumerate(windows):
        mask = stream.files[file].mask
        if mask is not None:
            counts = torch.from_numpy(mask[at + 1:at + T + 1] == 1)
            targets[row].masked_fill_(~counts, -100)
    return idx, targets


# --------------------------------------------------------------------------------------------------
# Data on disk: uint16 tokens in train.bin and val.bin, made here from texts or found in a folder

class Data(NamedTuple):
    """What load_data returns. The key tells this data from other data, whatever its name."""
    train: Stream
    val: Stream
    vocab_size: int
    key: str


def load_data(config, vocab_size=None):
    """The Data of config.data: 'stdlib', text files, folders of texts, or of train.bin and val.bin.

    Fills in config.tokenizer, config.eot and config.sources {source: key}. If config.sources holds
    another key, that source has changed since its run, which a line on stderr says. vocab_size: the
    model's; without one the tokenizer's or the largest token + 1, rounded up to a multiple of 64.
    OSError or ValueError in one line if the data are missing, too short, or not what they seem.
    """
    binary = all(map(has_bins, config.data))
    config.tokenizer = config.tokenizer or ("ids" if binary else "bytes")
    if binary and config.split_on:
        raise ValueError("--split-on is for texts, and --data holds tokens")
    coder = Tokenizer(config.tokenizer)
    folders = [folder_of(source, config, coder) for source in config.data]
    train = [open_bin(os.path.join(folder, "train.bin"), config.context) for folder in folders]
    val = [open_bin(os.path.join(folder, "val.bin"), config.context) for folder in folders]
    if config.eot is None:
        gpt2 = any(file.has_gpt2_eot for file in train + val)
        config.eot = coder.eot or (GPT2_EOT if gpt2 else -1)
    size = vocab_size or in_64s(coder.size or max(file.largest for file in train + val) + 1)
    if config.eot >= size:
        raise ValueError(f"--eot {config.eot} is beyond the vocabulary of {size}")
    for file in train + val:
        if file.largest >= size:
            raise ValueError(f"{file.path}: token {file.largest} is beyond the vocabulary of "
                             f"{size}")
    sources = {}
    for source, *files in zip(config.data, train, val):
        sources[source] = " ".join(file.key for file in files)
        was = config.sources.get(source, sources[source])
        if was != sources[source]:
            note(f"warning: {source} has changed since the run (then {was}, now {sources[source]}"
                 "): validation may hold what was trained on")
    config.sources = sources
    data = Data(Stream(train, config.context, size), Stream(val, config.context, size), size,
                key=" ".join(sources.values()))
    if data.val.masked:
        _, targets = cut(data.val, evenly(data.val, config))
        if (targets == -100).all():
            raise ValueError(f"{val[0].path}: the mask lets no target count in the validation")
    return data


GPT2_EOT = 50256


def in_64s(size):
    """A vocabulary's size, rounded up to a multiple of 64, which suits the matrix products."""
    return -(-size // 64) * 64


def has_bins(source):
    return any(os.path.exists(os.path.join(source, name)) for name in ("train.bin", "val.bin"))


def folder_of(source, config, coder):
    """The folder of a source's train.bin and val.bin; of texts, after tokenizing them."""
    if has_bins(source):
        return source
    if coder.size is None:
        raise ValueError(f"--data {source}: text needs a tokenizer, bytes or gpt2; ids are read "
                         "from train.bin and val.bin")
    if config.eot not in (None, coder.eot):
        raise ValueError(f"--eot {config.eot}: texts in {coder.name} end with {coder.eot}")
    return tokenize(source, coder.name, config.split_on)


def open_bin(path, T):
    """The Bin of a file of more than T tokens, with the mask beside it (train.mask.bin)."""
    offset, n = read_head(path)
    if n <= T:
        raise ValueError(f"{path}: {n} tokens; it must hold more uint16 tokens than the context of "
                         f"{T}: give more data or a smaller --context")
    tokens = np.memmap(path, "<u2", "r", offset, (n,))
    beside = path.removesuffix(".bin") + ".mask.bin"
    mask = np.memmap(beside, np.uint8, "r") if os.path.exists(beside) else None
    if mask is not None and len(mask) != n:
        raise ValueError(f"{beside}: {len(mask)} bytes for {n} tokens; one byte each is wanted")
    return Bin(path, tokens, mask, *scan(tokens, path))


FOREIGN = {b"\x93NUMPY": "a NumPy .npy file", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet",
           b"\x1f\x8b\x08": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def read_head(path):
    """(offset in bytes, number of tokens) of a .bin: nanoGPT's plain uint16, or llm.c's format.

    llm.c and modded-nanogpt write 256 int32 before the tokens: a magic number, the version, and the
    number of tokens. ValueError, saying what was seen, for other formats that are known.
    """
    with open(path, "rb") as f:
        head = f.read(4096)
    size = os.path.getsize(path)
    header = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    words = np.frombuffer(head[:len(head) // 2 * 2], "<u2")
    high = words[1::2]                      # of numbers of 32 bits: nothing large, and many zeros
    seen = [kind for magic, kind in FOREIGN.items() if head.startswith(magic)]
    if size % 2:
        seen.append(f"{size} bytes, an odd number: is it cut off")
    elif header[0] in (20240520, 20240801):
        tokens = (size - 1024) // 2
        if header == [20240520, 1, tokens]:
            return 1024, tokens
        seen.append(f"{tokens} uint16 after a header of magic, version and tokens {header}")
    elif len(words) >= 32 and re.fullmatch(rb"[\t\n\r -~]+", head):
        seen.append(f"text, like {head[:20]!r}")
    elif len(words) >= 32 and high.max() <= 3 < words.max() and (high == 0).mean() > 1 / 4:
        seen.append("numbers of 32 or 64 bits")
    if seen:
        raise ValueError(f"{path} holds {seen[0]}; uint16 tokens are wanted, as nanoGPT or llm.c "
                         "write them")
    return 0, size // 2


def scan(tokens, path, chunk=2**20, chunks=64):
    """The largest token, whether GPT-2's end-of-text occurs, and a key that tells them from others.

    Up to 64 chunks of 2^20 tokens, all are read; of more tokens 64 chunks, evenly spread.
    """
    n = len(tokens)
    starts = np.linspace(0, max(0, n - chunk), min(chunks, -(-n // chunk))).astype(int)
    largest = 0
    has_gpt2_eot = False
    content = hashlib.sha1()
    for start in starts:
        part = tokens[start:start + chunk]
        largest = max(largest, int(part.max()))
        has_gpt2_eot = has_gpt2_eot or bool((part == GPT2_EOT).any())
        content.update(part)
    if n > chunk * chunks:
        note(f"{path}: {chunk * chunks / 1e6:.0f}M of {n / 1e6:.0f}M tokens were searched for the "
             "largest token and end-of-text, the others are checked as batches are read")
    return largest, has_gpt2_eot, f"{n} tokens {content.hexdigest()[:8]}"


# --------------------------------------------------------------------------------------------------
# Texts: found, split, and tokenized in pieces, so that a file of any size fits in memory

SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test")      # of the stdlib


class Document(NamedTuple):
    """A text. The number is the md5 of its name, which shuffles texts and chooses their side."""
    number: int
    name: str
    path: str
    size: int


def documents(source):
    """The Documents of a source of texts, sorted by their number.

    Links are followed. Hidden files, empty files and what is no file are left out.
    """
    stdlib = source == "stdlib"
    root = sysconfig.get_path("stdlib") if stdlib else source
    found = []
    visited = set()
    walk = os.walk(root, followlinks=True)
    if os.path.isfile(root):
        walk = [(os.path.dirname(root), [], [os.path.basename(root)])]
    for folder, folders, names in walk:
        real = os.path.realpath(folder)
        if real in visited:                                             # by a link: already seen
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in sorted(folders) if not name.startswith((".", "__pycache__"))
                      and not (stdlib and name in SKIPPED)]
        for name in names:
            path = os.path.join(folder, name)
            wanted = name.endswith(".py") if stdlib else not name.startswith(".")
            if wanted and os.path.isfile(path) and os.path.getsize(path):
                name = name if path == root else os.path.relpath(path, root).replace(os.sep, "/")
                number = int(hashlib.md5(os.fsencode(name)).hexdigest(), 16)
                found.append(Document(number, name, path, os.path.getsize(path)))
    if not found:
        raise ValueError(f"--data {source}: no such file or folder, or nothing in it")
    return sorted(found)


def borders(docs):
    """For each Document the number of its bytes that are for training, from its beginning.

    A text is for validation if its number is divisible by 20. Where such texts hold less than 4
    KiB, all others give their last 20th as well. Where they hold more than half of all, every text
    gives its last 20th and no more.
    """
    val = [doc.size for doc in docs if doc.number % 20 == 0]
    if sum(val) > sum(doc.size for doc in docs) / 2:
        return [doc.size * 19 // 20 for doc in docs]
    twentieths = 19 if sum(val) < 2**12 else 20
    return [0 if doc.number % 20 == 0 else doc.size * twentieths // 20 for doc in docs]


def is_text(path):
    """Whether a file is UTF-8 without a NUL byte."""
    try:
        return not any("\0" in piece for piece in pieces(path))
    except UnicodeDecodeError:
        return False


def pieces(path, split_on=None, size=2**20):
    """A text file in pieces of about `size` characters, without a byte order mark."""
    with open(path, encoding="utf-8-sig", newline="") as f:
        rest = ""
        while new := f.read(size):
            text = rest + new
            border = last_border(text, split_on)
            yield text[:border]
            rest = text[border:]
        yield rest


def last_border(text, split_on=None):
    """Where to cut a text: after its last split_on, else where its last white space begins.

    GPT-2's tokens end there too. A text with neither is cut at its end.
    """
    if split_on and split_on in text:
        return text.rfind(split_on) + len(split_on)
    text = text[:max(1, len(text) - len(split_on or ""))]               # may hold half a split_on
    space = max(text.rfind(" "), text.rfind("\n"))
    return len(text[:space + 1].rstrip()) or len(text)


def encode(text, coder, split_on):
    """The tokens of a text, uint16, with end-of-text in place of each split_on."""
    tokens = []
    for part in text.split(split_on) if split_on else [text]:
        tokens += np.asarray(coder.encode(part), "<u2"), [coder.eot]
    return np.concatenate(tokens[:-1]).astype("<u2")


def tokenize(source, tokenizer, split_on=None):
    """Tokenize a source of texts, once; the folder under .cache with its train.bin and val.bin."""
    docs = documents(source)
    stamps = [(doc.name, doc.size, os.path.getmtime(doc.path)) for doc in docs]
    name = os.path.basename(source.rstrip(os.sep))[:80]
    told_apart = json.dumps(["split by name", source, tokenizer, split_on, stamps])
    key = hashlib.md5(told_apart.encode()).hexdigest()[:8]
    folder = os.path.join(".cache", f"{name}-{tokenizer}-{key}")
    if os.path.exists(folder):
        return folder
    os.makedirs(".cache", exist_ok=True)
    with lock(".cache/lock", wait=True):
        if not os.path.exists(folder):                      # else another process has done it
            partial = ".cache/unfinished"
            shutil.rmtree(partial, ignore_errors=True)      # of a process that was stopped
            os.mkdir(partial)
            write_tokens(source, docs, Tokenizer(tokenizer), split_on, partial)
            os.rename(partial, folder)
    return folder


def write_tokens(source, docs, coder, split_on, folder):
    """Write train.bin and val.bin: the documents' tokens, each document followed by end-of-text."""
    texts = [doc for doc in docs if is_text(doc.path)]
    if not texts:
        raise ValueError(f"--data {source}: no UTF-8 text in it (a .bin of tokens must be named "
                         "train.bin or val.bin, and --data its folder)")
    if len(texts) < len(docs):
        other = next(doc.path for doc in docs if doc not in texts)
        note(f"{len(docs) - len(texts)} of {len(docs)} files are left out, as they are not UTF-8 "
             f"text: {other} for example")
    ends = borders(texts)
    if any(0 < end < doc.size for doc, end in zip(texts, ends)):
        note(f"{source}: few or uneven texts, so that each gives its last 20th to validation")
    total = 0
    with (open(os.path.join(folder, "train.bin"), "wb") as train,
          open(os.path.join(folder, "val.bin"), "wb") as val):
        for i, (doc, end) in enumerate(zip(texts, ends), 1):
            for side, tokens in document_tokens(doc.path, end, coder, split_on):
                tokens.tofile((train, val)[side])
                total += len(tokens)
                if len(tokens) > 1e5 or i % 100 == 0 or i == len(texts):
                    with contextlib.suppress(OSError):          # stderr may have been closed
                        print(f"\rtokenizing {source}: {i}/{len(texts)} texts, "
                              f"{total / 1e6:.1f}M {coder.name} tokens", end="", file=sys.stderr,
                              flush=True)
    note("")


def document_tokens(path, border, coder, split_on):
    """Yield a text's tokens in pieces: (0, tokens) before the border (bytes), (1, tokens) after."""
    place = 0
    sides = set()
    for piece in pieces(path, split_on):
        length = max(1, len(piece.encode()))
        share = min(1, max(0, border - place) / length)     # of the piece, before the border
        middle = int(share * len(piece))
        if 0 < middle < len(piece):
            middle = last_border(piece[:middle], split_on)
        place += length
        for side, part in enumerate((piece[:middle], piece[middle:])):
            if part:
                sides.add(side)
                yield side, encode(part, coder, split_on)
    for side in sides:
        yield side, np.array([coder.eot], "<u2")


LONG_RUN = re.compile(r"(\s{1000}|\S{10000})")              # a million blanks are too much for BPE


class Tokenizer:
    """Text <-> token ids. bytes: UTF-8, 257 tokens; gpt2: tiktoken's BPE, 50257; ids: numbers."""

    def __init__(self, name):
        self.name = name
        sizes = {"bytes": (257, 256), "gpt2": (50257, GPT2_EOT), "ids": (None, None)}
        self.size, self.eot = sizes[name]
        self.partial = codecs.getincrementaldecoder("utf-8")("replace")

    @functools.cached_property
    def bpe(self):
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from error
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:                          # offline: whatever requests raises
            raise ValueError(f"tiktoken can't fetch GPT-2's vocabulary ({type(error).__name__}); "
                             "without a network, set TIKTOKEN_CACHE_DIR to a folder that holds it"
                             ) from error

    def encode(self, text):
        """Token ids as a list or an array. ValueError for a text that is not ids, of ids."""
        if self.name == "bytes":
            return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)
        if self.name == "gpt2":
            parts = LONG_RUN.split(text)
            return [token for part in parts for token in self.bpe.encode_ordinary(part)]
        for word in text.split():
            if not (word.isascii() and word.isdigit()):
                raise ValueError("no tokenizer for this vocabulary: write token ids, like "
                                 f"'1 15043', not {text[:40]!r}")
        return [int(word) for word in text.split()]

    def decode(self, token):
        """The text that a token completes; '' within a character, and for unused tokens."""
        if self.name == "ids":
            return f"{token} "
        if token >= self.eot:
            return "<|endoftext|>" if token == self.eot else ""
        raw = bytes([token]) if self.name == "bytes" else self.bpe.decode_single_token_bytes(token)
        return self.partial.decode(raw)


# --------------------------------------------------------------------------------------------------
# The command line, shared by the scripts

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that returns only what was typed. Its `defaults` are for `merge`."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.defaults = {}

    def flag(self, name, default, help, type=str, **options):
        """Add a flag. Its help ends with the default, if that is a value."""
        self.defaults[name[2:].replace("-", "_")] = default
        if default not in (None, ()) and not isinstance(default, bool):
            several = isinstance(default, (list, tuple))
            shown = " ".join(map(str, default)) if several else default
            help = f"{help}; default: {shown}"
        if "action" not in options:
            options["type"] = type
        self.add_argument(name, help=help.replace("%", "%%"), **options)

    def switch(self, name, default, help):
        """Add --name and --no-name."""
        self.flag(name, default, help, action=argparse.BooleanOptionalAction)

    def error(self, message):           # run makes one line of it
        raise ValueError(f"{message} (see --help)")


def merge(*layers):
    """One Namespace of several dicts. Later ones win: defaults, preset, checkpoint, given."""
    config = {}
    for layer in layers:
        config.update(layer)
    return argparse.Namespace(**config)


def bounded(kind, name, low, high):
    """The type of a flag that is a number: a function that argparse calls with the text."""
    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low:g} to {high:g}")
    return convert


def whole(low=1, high=2**40):
    """The type of a flag that is a whole number."""
    return bounded(int, "a whole number", low, high)


def real(low, high):
    """The type of a flag that is any number."""
    return bounded(float, "a number", low, high)


def filled(text):
    """The type of a flag that must not be empty, as "$DATA" is if DATA is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable of your shell not set?")
    return text


def source_flag(text):
    """The type of --data: an absolute path, so that it is found from other folders, or stdlib."""
    return "stdlib" if text == "stdlib" else os.path.abspath(filled(text))


def pattern_flag(text):
    """The type of flags that name a pattern: the text as `str(Pattern)` writes it."""
    try:
        return str(Pattern.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_common_flags(parser):
    """The flags of every script."""
    parser.flag("--out", "out", "folder of the run's checkpoints and logs", filled)
    parser.flag("--device", None, "cpu, cuda, cuda:1 ...; default: cuda if there is one")
    parser.flag("--dtype", None, "float32 or bfloat16; default: bfloat16 on cuda, else float32",
                choices=("float32", "bfloat16"))
    parser.flag("--seed", 0, "of the weights, of random offsets and patterns, of sampling",
                whole(0))


def add_data_flags(parser):
    """The flags of every script that reads data."""
    parser.flag("--data", ["stdlib"], "stdlib (Python's own source), text files, folders of texts, "
                "or folders with train.bin and val.bin; each row of a batch reads a stretch of all "
                "of them", source_flag, nargs="+")
    parser.flag("--tokenizer", None, "of texts: bytes (default) or gpt2; of .bin files: what they "
                "were made with; default: ids", choices=("bytes", "gpt2", "ids"))
    parser.flag("--split-on", None, "in text files, the text between two documents, such as "
                "<|endoftext|>", filled)
    parser.flag("--eot", None, "end-of-text token of .bin files, -1 for none; default: the "
                "tokenizer's, or 50256 if it occurs", whole(-1, 65535))
    parser.flag("--context", 1024, "tokens per sequence", whole(1, 2**24))
    parser.flag("--eval-windows", 64, "windows of validation data, spread evenly", whole())
    parser.flag("--eval-batch", 8, "windows that are validated at once", whole())
    parser.defaults["sources"] = {}                         # filled in by load_data


def add_fit_flags(parser):
    """The flags of pretraining and adaptation."""
    flag = parser.flag
    flag("--batch-size", 16, "sequences per update", whole(1, 2**20))
    flag("--grad-accum", 1, "parts that a batch is run in, to save memory", whole())
    flag("--steps", 1000, "batches to train on", whole())
    flag("--lr", 1e-3, "peak learning rate", real(1e-12, 1e3))
    flag("--min-lr", 1e-6, "learning rate of the last step", real(0, 1e3))
    flag("--warmup", 0.05, "share of the steps, 0 to 1, in which the rate rises",
         bounded(float, "a share of the steps, a number", 0, 1))
    flag("--weight-decay", 0.1, "of AdamW, on all parameters", real(0, 100))
    flag("--clip", 1.0, "largest gradient norm, 0 for no limit", real(0, 1e12))
    flag("--log-interval", 10, "steps between log lines", whole())
    parser.switch("--compile", None, "torch.compile the blocks; default: on a GPU with triton")
    parser.switch("--checkpointing", False, "save memory: compute activations again in backward")
    parser.switch("--resume", False, "go on with the run in --out; adapt.py: keep what is done")
    parser.switch("--overwrite", False, "start anew; old files are renamed to NAME.old")


def on_gpu(config):
    return config.device.startswith("cuda")


def resolve_device(config):
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
    if on_gpu(config) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(4)                            # more would only wait for one another


def resolve_compile(config, default):
    """Fill in config.compile: False where torch.compile lacks what it needs, with a note if it was
    asked for.
    """
    needs = "triton" if on_gpu(config) else os.environ.get("CXX", "g++")
    able = importlib.util.find_spec(needs) if on_gpu(config) else shutil.which(needs)
    if config.compile and not able:
        note(f"--compile: {needs} is not installed here, going on without")
    wanted = default if config.compile is None else config.compile
    config.compile = bool(wanted and able)


def resolve_fit(config):
    """Fill in device, dtype, compile. ValueError if flags of training do not go together."""
    resolve_device(config)
    resolve_compile(config, on_gpu(config))
    if config.batch_size % (WORLD * config.grad_accum):
        raise ValueError(f"--batch-size {config.batch_size} does not split into --grad-accum "
                         f"{config.grad_accum} x {WORLD} processes")
    if config.min_lr > config.lr:
        raise ValueError(f"--min-lr {config.min_lr:g} is above --lr {config.lr:g}: the learning "
                         "rate would rise")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite starts anew: give one")


def header(model, config):
    """Print what runs on what: the first lines of every script."""
    shape = model.config
    size = sum(p.numel() for p in model.parameters())
    say(f"{shape.name} | {size / 1e6:.2f}M parameters | {shape.n_layer} layers x {shape.n_embd}, "
        f"{shape.n_head} heads, vocabulary {shape.vocab_size}")
    say(f"python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, {config.dtype} | {path_taken(config.device)}"
        f"{f' | {WORLD} processes' * (WORLD > 1)}")


# --------------------------------------------------------------------------------------------------
# Checkpoints and logs

OF_A_CALL = {"out", "device", "compile", "resume", "overwrite"}         # not saved
OF_A_RUN = {"checkpoint", "pattern", "seed", "dtype"}       # saved; a new run takes none
FREE = {"steps", "log_interval", "eval_interval", "eval_batch", "grad_accum", "checkpointing"}
# A resumed run may have other FREE flags. More steps prolong it, and stretch the schedule of the
# learning rate; the others change no result.


def recorded(flags):
    """Of the flags in a dict, those that a checkpoint keeps, as this version writes them."""
    kept = {name: value for name, value in flags.items() if name not in OF_A_CALL}
    for name in ("data", "arl"):
        if isinstance(kept.get(name), str):                             # an older checkpoint's
            kept[name] = [kept[name]]
    return kept


def of_run(path, meta, given, known):
    """What a script inherits from the checkpoint of a run at `path`, for the flags in `known`.

    That is what describes the model, its data and its recipe, never a flag of that call. If --data
    is given, the end-of-text token is found anew. ValueError if the run's data are not known.
    """
    if not meta.get("train") and "data" not in given:
        raise ValueError(f"{path} does not say what it was trained on: --data is needed")
    left_out = {*OF_A_RUN, *(("eot", "split_on") if "data" in given else ())}
    saved = recorded({**meta.get("train", {}), "tokenizer": meta["tokenizer"]})
    return {name: value for name, value in saved.items() if name in known and name not in left_out}


def refuse_changes(path, saved, given, free=()):
    """ValueError if a flag in `given` is not what the checkpoint at `path` has for it."""
    for name, value in recorded(given).items():
        if name not in free and saved.get(name, value) != value:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {path} has {saved[name]}, and "
                             "what changes the result can't differ; --out starts another run")


def file_of(pattern, out):
    """The checkpoint of a pattern in `out`: D16.pt, D1+D4_D8.pt of D1,D4/D8, N4K2-last.pt."""
    name = str(pattern).replace(",", "+").replace("/", "_").replace(":", "-")
    return os.path.join(out, f"{name}.pt")


def fingerprint(model):
    """Eight hex digits that tell weights from others: checkpoints name their parent so."""
    weights = model.embed.weight.detach().float().cpu().numpy()
    return hashlib.md5(weights.tobytes()).hexdigest()[:8]


@contextlib.contextmanager
def open_log(path, step=0):
    """The JSONL log beside the checkpoint `path`, which is locked meanwhile.

    At step 0 the files of an earlier run are renamed, so that they can't pass for those of the new
    one. Otherwise the log keeps its records up to `step`: a resumed run has each step once.
    """
    if RANK:
        yield open(os.devnull, "w")
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    name = path.removesuffix(".pt")
    log_path = f"{name}.jsonl"
    with lock(f"{name}.lock"):
        if step == 0:
            for old in filter(os.path.exists, (path, log_path)):
                os.replace(old, f"{old}.old")
        elif os.path.exists(log_path):
            keep_records(log_path, step)
        with open(log_path, "a") as log:
            yield log


def keep_records(path, step):
    """Rewrite a log with its records of up to `step` steps. Torn lines are left out."""
    kept = []
    torn = 0
    with open(path, errors="replace") as f:
        for line in f.read().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                torn += 1
    if torn:
        note(f"{path}: {torn} torn lines are left out")
    with open(f"{path}.tmp", "w") as f:
        f.writelines(kept)
    os.replace(f.name, path)


def report(log, text, **record):
    """A record in the log, and a line on the screen."""
    log.write(json.dumps(record) + "\n")
    log.flush()
    say(text)


def log_line(record, config):
    *sparse, main = record["losses"].values()
    sparse = "".join(f" sparse {loss:.4f}" for loss in sparse)
    mfu = f" | MFU {record['mfu']:.0%}" * (record["mfu"] > 0)
    return (f"step {record['step']:04}/{config.steps:04} | loss {main:.4f}{sparse} | "
            f"lr {record['lr']:.1e} | norm {record['norm']:.2f} | {record['ms']:.0f} ms | "
            f"{record['rate'] / 1e3:.1f}k tok/s{mfu} | ETA {record['eta']:.1f} min")


def memory(config):
    """What a validation line says of the GPU's memory."""
    if not on_gpu(config):
        return ""
    return f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


# --------------------------------------------------------------------------------------------------
# Pretraining and fine-tuning

RECIPES = {                                             # how each of model.PRESETS is pretrained
    "laptop": dict(context=256, batch_size=16, steps=300, lr=2e-3, eval_interval=100),
    "small": dict(context=2048, batch_size=32, steps=1000, lr=1e-3),
    "base": dict(context=4096, batch_size=128, grad_accum=16, steps=5000, lr=8e-4),
    "paper-1.5b": dict(context=4096, batch_size=512, grad_accum=128, steps=47684, lr=8e-4),
    "paper-2.6b": dict(context=4096, batch_size=512, grad_accum=256, steps=47684, lr=8e-4),
    "paper-7.6b": dict(context=4096, batch_size=512, grad_accum=512, steps=47684, lr=2e-4),
}


def train_flags():
    parser = Parser(__doc__)
    flag = parser.flag
    add_common_flags(parser)
    add_data_flags(parser)
    add_fit_flags(parser)
    flag("--preset", None, "shape and recipe; default: small for your data on a GPU, else laptop",
         choices=[*PRESETS])
    flag("--n-layer", None, "layers; default: the preset's", whole(1, 1000))
    flag("--n-head", None, "heads; default: the preset's", whole(1, 1024))
    flag("--n-embd", None, "width; default: the preset's", whole(1, 2**17))
    flag("--vocab-size", None, "rounded up to a multiple of 64; default: the tokenizer's, else the "
         "largest token + 1", lambda text: in_64s(whole(1, 65536)(text)))
    parser.switch("--recurrence", True, "--no-recurrence: the attention-only baseline")
    flag("--arl", None, "patterns of the sparse updates, of which each batch draws one; none: no "
         "such update; default: D64, none without recurrence", arl_flag, nargs="+")
    flag("--pattern", None, "the pattern of all updates, without ARL; it names the checkpoint",
         pattern_flag)
    flag("--checkpoint", None, "weights to start a new run from; adapted ones go on in their "
         "pattern alone", filled)
    parser.switch("--random", False, "read windows at random offsets, not in order")
    flag("--eval-interval", 250, "steps between validations; each saves a checkpoint", whole())
    return parser


def arl_flag(text):
    return text if text == "none" else pattern_flag(text)


def only_pattern(given, meta):
    """The one pattern of all updates, of --pattern or an adapted --checkpoint; None: dense, ARL."""
    own = meta.get("pattern")
    if own == "D1" and "adapt" not in meta and not meta.get("train", {}).get("pattern"):
        own = None                          # trained dense, with ARL or without
    pattern = given.get("pattern", own)
    if own not in (None, pattern):
        raise ValueError(f"--pattern {pattern}: {given['checkpoint']} was trained in {own} alone")
    if pattern and "arl" in given:
        raise ValueError(f"--arl belongs to dense training, and all updates are in {pattern} here")
    return pattern


def of_checkpoint(path, model, meta, given, known):
    """What a checkpoint says of the flags in `known`: all of them for --resume, else `of_run`."""
    shape = asdict(model.config)
    unknown = {*meta.get("train", {})} - {*known}
    if unknown:
        note(f"{path} has flags that mean nothing here: {', '.join(sorted(unknown))}")
    if not given.get("resume"):
        saved = of_run(path, meta, given, known)
    elif "optimizer" in meta:
        saved = {name: value for name, value in recorded(meta["train"]).items() if name in known}
        refuse_changes(path, saved, given, FREE)
    else:
        raise ValueError(f"{path} is not a checkpoint of train.py, it can't be resumed")
    refuse_changes(path, shape, {**PRESETS.get(given.get("preset"), {}), **given})
    return {**saved, **shape}


def default_preset(given):
    """small on a GPU, but for Python's own source, which is too little text for it; else laptop."""
    gpu = given.get("device", "cuda" if torch.cuda.is_available() else "cpu").startswith("cuda")
    return "small" if gpu and given.get("data", ["stdlib"]) != ["stdlib"] else "laptop"


def settle(parser, given, saved):
    """The config of a run. Names of patterns become Patterns in main."""
    preset = given.get("preset") or saved.get("preset") or default_preset(given)
    recipe = {**PRESETS[preset], **RECIPES[preset], "preset": preset}
    config = merge(parser.defaults, recipe, saved, given)
    resolve_fit(config)
    if config.arl is None:
        config.arl = ["D64"] if config.recurrence else ["none"]
    return config


def main(argv=None):
    parser = train_flags()
    given = vars(parser.parse_args(argv))
    parent = given.get("checkpoint")
    model, meta = load_checkpoint(parent) if parent else (None, {})
    pattern = only_pattern(given, meta)
    path = file_of(pattern or "dense", given.get("out", "out"))
    if parent and os.path.realpath(path) == os.path.realpath(parent):
        raise ValueError(f"--checkpoint {parent} is where the run would write; --out names another "
                         "folder")
    if given.get("resume"):
        model, meta = load_checkpoint(path, training=True)
    elif os.path.exists(path) and not given.get("overwrite"):
        raise ValueError(f"{path} exists: --resume goes on with it, --overwrite starts anew, --out "
                         "names another folder")
    saved = of_checkpoint(path if given.get("resume") else parent, model, meta, given,
                          parser.defaults) if model else {}
    config = settle(parser, given, saved)
    config.pattern = pattern
    data = load_data(config, config.vocab_size)
    config.vocab_size = data.vocab_size

    torch.manual_seed(config.seed)
    if model is None:
        model = RATPlus(RATConfig(config.vocab_size, config.n_layer, config.n_head, config.n_embd,
                                  config.recurrence))
    model.to(config.device)
    main_pattern = Pattern.parse(pattern or "D1").fit(model.config)
    names = [] if pattern or config.arl == ["none"] else config.arl
    arl = [None if name == "none" else Pattern.parse(name).fit(model.config) for name in names]
    kin = {"parent": meta.get("parent") or fingerprint(model)} if config.checkpoint else {}
    optimizer = new_optimizer(model, config)
    first = meta["step"] if config.resume else 0
    if config.resume:
        optimizer.load_state_dict(meta["optimizer"])
    header(model, config)

    def batch(step):
        windows = at_random if config.random else in_order
        return cut(data.train, windows(step, config, data.train), config.eot)

    def save(step, val):
        if RANK == 0:
            save_checkpoint(path, model, step=step, pattern=str(main_pattern), val=val, **kin,
                            tokenizer=config.tokenizer, train=recorded(vars(config)),
                            optimizer=optimizer.state_dict())
        shown = " ".join(f"{name} {loss:.4f}" for name, loss in val.items()) or "not measured"
        report(log, f"step {step:04} | val {shown}{memory(config)} | saved {path}", step=step,
               val=val)

    with open_log(path, first) as log, stop_signals() as stop:
        report(log, describe(config, data, main_pattern, names), step=first,
               config=recorded(vars(config)), torch=torch.__version__)
        for record in fit(model, config, batch, optimizer, main_pattern, arl, first, stop):
            step = record["step"]
            ends = step == config.steps
            stopped = record.pop("stopped")
            if ends or stopped or step % config.log_interval == 0:
                report(log, log_line(record, config), **record)
            if stopped:
                save(step, {})
                raise KeyboardInterrupt(f"; step {step} is saved in {path}, --resume goes on")
            if ends or step % config.eval_interval == 0:
                patterns = (main_pattern, *filter(None, dict.fromkeys(arl)))
                save(step, {str(p): evaluate(model, data.val, p, config) for p in patterns})
    if first >= config.steps:
        say(f"{path} is complete: {first} steps")


def describe(config, data, pattern, arl):
    """The flags, the data and the updates of a run, in two lines."""
    flags = " ".join(f"{name}={value}" for name, value in vars(config).items())
    tokens = config.steps * config.batch_size * config.context / 1e6
    sparse = f"{' or '.join(arl)}, then " if arl else ""
    return (f"{flags}\n{tokens:.2f}M tokens to train on, of {len(data.train) / 1e6:.3g}M; each "
            f"batch updates with {sparse}{pattern}; {len(data.val) / 1e6:.3g}M for validation")


if __name__ == "__main__":
    run(main)
