"""Training, adaptation, data and flags: each promise of --help that changes a number has a test."""
import argparse
import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import adapt
import train
from model import Pattern, RATConfig, RATPlus, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "official_tiny.pth"
TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --eval-windows 4 --device cpu "
        "--log-interval 1 --steps 6").split()
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"), "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
needs_gpt2 = pytest.mark.skipif(not VOCABULARY.exists(), reason="needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A folder of its own, with a folder of 40 short texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")                  # tiny tensors: more threads only wait for one another
    torch.set_num_threads(1)
    texts({f"{i}.txt": "".join(f"{i} + {j} = {i + j}\n" for j in range(150)) for i in range(40)})


def texts(contents, folder="text"):
    for name, text in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def bins(tokens, val=None, folder="bins", mask=None):
    os.makedirs(folder, exist_ok=True)
    np.asarray(tokens, "<u2").tofile(f"{folder}/train.bin")
    np.asarray(tokens if val is None else val, "<u2").tofile(f"{folder}/val.bin")
    if mask is not None:
        np.asarray(mask, np.uint8).tofile(f"{folder}/train.mask.bin")


def call(main, *args):
    main([*TINY, *map(str, args)] if main is train.main else ["--device", "cpu", *map(str, args)])


def pretrain(*args):
    call(train.main, "--data", "text", *args)


def refused(main, *args, why):
    """The call raises what `run` prints as one line, and changes no file in --out."""
    def files():
        return {path: path.read_bytes() for path in Path(".").rglob("*.pt")}
    before = files()
    with pytest.raises((ValueError, OSError)) as error:
        call(main, *args)
    assert why in str(error.value), error.value
    assert files() == before, "a checkpoint changed"


def records(path="out/dense.jsonl"):
    with open(path) as f:
        return {record["step"]: record for record in map(json.loads, f) if "losses" in record}


def losses(path="out/dense.jsonl"):
    return {step: record["losses"] for step, record in records(path).items()}


def weights(path):
    return torch.cat([p.flatten() for p in load_checkpoint(path)[0].parameters()])


def error_of(a, b):
    return ((a - b).norm() / b.norm()).item()


def settings(**given):
    """The config of a small run, as main makes it."""
    flags = dict(data=[os.path.abspath("text")], context=8, batch_size=4, device="cpu", dtype="float32", compile=False)
    return train.merge(train.train_flags().defaults, flags, given)


def stream(*files, T=8):
    """A Stream of arrays."""
    return train.Stream([train.Bin("a.bin", np.asarray(tokens, np.uint16)) for tokens in files], T)


# --------------------------------------------------------------------------------------------------
# Whole runs against the same runs written out

def by_hand(start, tokens, windows, updates, lrs, clip, eot=256, T=16):
    """The weights after AdamW steps written out: windows(step) -> offsets, updates: patterns of each step."""
    model = load_checkpoint(start)[0] if isinstance(start, str) else start
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        batch = torch.tensor(np.stack([tokens[at:at + T + 1] for at in windows(step)]).astype(np.int64))
        idx, targets = batch[:, :-1], batch[:, 1:].clone()
        targets[idx == eot] = -100
        for pattern in updates:
            optimizer.zero_grad()
            F.cross_entropy(model(idx, pattern).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def cached(name):
    found, = Path(".cache").glob(f"*/{name}")
    return np.fromfile(found, "<u2")


def test_pretraining_is_the_loop_written_out():
    """Read in order, no loss after end-of-text, a sparse and then a dense update, warm-up and cosine, clipped."""
    texts({f"{i}.txt": f"line {i} of many\n" * 2 for i in range(500)}, "short")
    call(train.main, "--data", "short", "--arl", "D8", "--warmup", 0.34, "--lr", 0.01, "--min-lr", 0.001, "--clip", 0.3)
    tokens = cached("train.bin")
    assert (tokens == 256).mean() > 1 / 50
    count = (len(tokens) - 1) // 16
    windows = lambda step: [(r * count // 4 + step) * 16 for r in range(4)]                             # noqa: E731
    lrs = [0.005, 0.01, *(0.001 + 0.009 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(4))]
    torch.manual_seed(0)
    model = RATPlus(RATConfig(320, 1, 2, 16))
    expected = by_hand(model, tokens, windows, ["D8", "D1"], lrs, clip=0.3)
    assert error_of(weights("out/dense.pt"), expected) < 1e-5
    assert np.allclose([record["lr"] for record in records().values()], lrs)


def test_adaptation_is_the_loop_written_out():
    """Each pattern alone from the dense weights, at a tenth of the rate, at random offsets of the seed."""
    texts({f"{i}.txt": f"line {i} of many\n" * 2 for i in range(500)}, "short")
    call(train.main, "--data", "short", "--lr", 0.05, "--arl", "D4")
    call(adapt.main, "--pattern", "D4", "D8", "--steps", 4, "--seed", 3)
    tokens = cached("train.bin")
    windows = lambda step: np.random.default_rng((3, step)).integers(0, len(tokens) - 16, 4)            # noqa: E731
    lrs = [1e-6 + (0.005 - 1e-6) * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(4)]
    for pattern in ("D4", "D8"):
        expected = by_hand("out/dense.pt", tokens, windows, [pattern], lrs, clip=1.0)
        assert error_of(weights(f"out/{pattern}.pt"), expected) < 1e-6, pattern
        assert error_of(weights(f"out/{pattern}.pt"), weights("out/dense.pt")) > 1e-4
    meta = load_checkpoint("out/D8.pt")[1]
    assert meta["parent"] == train.fingerprint(load_checkpoint("out/dense.pt")[0]) and meta["pattern"] == "D8"
    assert (meta["adapt"]["lr"], meta["adapt"]["warmup"], meta["step"]) == (0.005, 0.0, 4)


def test_validation_is_the_loss_on_the_validation_data_under_each_pattern():
    """Of all targets, whatever the batches; the last batch is a single window."""
    pretrain("--arl", "D4", "--eval-windows", 7, "--eval-batch", 3, "--lr", 0.05)
    model, meta = load_checkpoint("out/dense.pt")
    tokens = cached("val.bin").astype(np.int64)
    starts = np.linspace(0, len(tokens) - 17, 7).astype(int)
    x, y = (torch.tensor(np.stack([tokens[s + d:s + d + 16] for s in starts])) for d in (0, 1))
    assert set(meta["val"]) == {"D1", "D4"} and meta["val"]["D1"] != meta["val"]["D4"]
    for pattern, loss in meta["val"].items():
        expected = F.cross_entropy(model(x, pattern).flatten(0, 1), y.flatten()).item()
        assert abs(loss - expected) < 1e-5, (pattern, loss, expected)


def test_a_run_repeats_with_its_seed_and_differs_with_another():
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain("--steps", 2, "--seed", seed, "--out", name)
    assert losses("a/dense.jsonl") == losses("b/dense.jsonl") != losses("c/dense.jsonl")


def test_random_reads_at_the_offsets_of_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "cut", lambda data, windows, *rest, cut=train.cut: seen.append(windows) or cut(data, windows, *rest))
    pretrain("--steps", 2, "--random", "--seed", 5)
    tokens = cached("train.bin")
    expected = [np.random.default_rng((5, step)).integers(0, len(tokens) - 16, 4) for step in range(2)]
    assert seen[:2] == [[(0, at) for at in row] for row in expected]


def test_the_pattern_of_all_updates_names_the_checkpoint():
    pretrain("--pattern", "D8", "--steps", 3)
    meta = load_checkpoint("out/D8.pt")[1]
    assert meta["pattern"] == "D8" and set(meta["val"]) == {"D8"} and not os.path.exists("out/dense.pt")
    assert {key for step in losses("out/D8.jsonl").values() for key in step} == {"D8"}
    call(train.main, "--resume", "--pattern", "D8", "--steps", 5)
    assert max(losses("out/D8.jsonl")) == 5
    refused(train.main, "--data", "text", "--pattern", "D8", "--arl", "D4", "--out", "b", why="--arl belongs to dense training")
    refused(train.main, "--checkpoint", "out/D8.pt", "--pattern", "D4", "--out", "b", why="was trained in D8 alone")


@pytest.mark.parametrize("given, preset", [
    (dict(device="cpu"), "laptop"),
    (dict(device="cuda"), "laptop"),
    (dict(device="cuda", data=["stdlib"]), "laptop"),
    (dict(device="cuda:1", data=["mine"]), "small"),
    (dict(device="cpu", data=["mine"]), "laptop"),
])
def test_python_s_source_is_for_the_laptop_preset_on_a_gpu_too(given, preset):
    assert train.default_preset(given) == preset


def test_arl_of_several_patterns_draws_one_for_each_batch():
    pretrain("--arl", "D2", "D4", "W2", "--steps", 12)
    drawn = [next(iter(step)) for step in losses().values()]
    assert set(drawn) == {"D2", "D4", "W2"} and all(len(step) == 2 for step in losses().values())
    assert set(load_checkpoint("out/dense.pt")[1]["val"]) == {"D1", "D2", "D4", "W2"}
    pretrain("--arl", "D2", "D4", "W2", "--steps", 12, "--out", "b")
    assert drawn == [next(iter(step)) for step in losses("b/dense.jsonl").values()], "by the seed and the step"


def test_none_among_several_leaves_out_the_sparse_update_of_some_batches():
    pretrain("--arl", "D2", "none", "--steps", 12)
    seen = [set(step) for step in losses().values()]
    assert {"D1"} in seen and {"D1", "D2"} in seen, seen
    assert set(load_checkpoint("out/dense.pt")[1]["val"]) == {"D1", "D2"}


@pytest.mark.parametrize("flags, sparse", [([], {"D64"}), (["--no-recurrence"], set()), (["--arl", "none"], set()),
                                           (["--no-recurrence", "--arl", "D4"], {"D4"}), (["--arl", "D4W0"], {"D4"})])
def test_arl_by_default_is_d64_with_recurrence_and_none_without(flags, sparse):
    pretrain("--steps", 1, *flags)
    assert set(losses()[1]) == {"D1", *sparse}
    assert load_checkpoint("out/dense.pt")[1]["train"]["arl"] == (sorted(sparse) or ["none"])


# --------------------------------------------------------------------------------------------------
# The loop and the update

def small_fit(arl=("D4",), recurrence=True, poison=None, **flags):
    """The records of a short run of `fit`, with D4 and D1, or D1 alone."""
    torch.manual_seed(0)
    model = RATPlus(RATConfig(64, 1, 2, 16, recurrence))
    config = settings(**{**dict(steps=3, context=12, log_interval=1, lr=0.02), **flags})
    arl = [Pattern.parse(name) for name in arl]

    def batch(step):
        if step == poison:
            model.norm.weight.data[0] = math.nan
        return torch.randint(64, (2, 4, 12), generator=torch.Generator().manual_seed(step)).unbind()

    return train.fit(model, config, batch, train.new_optimizer(model, config), Pattern.parse("D1"), arl)


def test_what_is_not_finite_is_found_before_a_save():
    """A weight is lost in step 3, where nobody looks. The next record must not come."""
    steps = []
    with pytest.raises(ValueError, match="at step 5: loss nan under D4, loss nan under D1, gradient norm nan"):
        for record in small_fit(steps=9, log_interval=100, eval_interval=5, poison=2):
            steps.append(record["step"])
    assert steps == [1]


def test_a_run_without_a_gradient_is_stopped(monkeypatch):
    monkeypatch.setattr(train.Loss, "forward", lambda self, *args: sum(0 * p.sum() for p in self.parameters()) + 5)
    with pytest.raises(ValueError, match="gradient norm 0.0"):
        next(small_fit())


def test_a_batch_whose_targets_all_do_not_count_goes_on(monkeypatch):
    monkeypatch.setattr(train, "share", lambda idx, targets, *rest, share=train.share: share(idx, targets * 0 - 100, *rest))
    assert next(small_fit())["losses"] == {"D4": 0, "D1": 0}


def test_a_record_says_what_the_step_did():
    first, second, third = small_fit(log_interval=2)
    assert [record["step"] for record in (first, second, third)] == [1, 2, 3]
    assert list(second["losses"]) == ["D4", "D1"], "sparse, then dense"
    assert abs(second["rate"] * second["ms"] / 1e3 - 4 * 12) < 1e-6, "tokens of a step"
    assert abs(second["eta"] - second["ms"] / 6e4) < 1e-9, "minutes that a last step takes"
    line = train.log_line({**second, "mfu": 0.38}, settings(steps=3))
    assert line.startswith("step 0002/0003 | loss ") and " sparse " in line and " | MFU 38% | ETA " in line


@pytest.mark.parametrize("arl", [["D4"], []])
def test_compiled_and_eager_agree(monkeypatch, arl):
    """Through the tracer only: making machine code takes too long here."""
    monkeypatch.setattr(RATPlus, "compile", functools.partialmethod(RATPlus.compile, backend="eager"))
    compiled, eager = ([record["losses"] for record in small_fit(arl, compile=on)] for on in (True, False))
    for a, b in zip(compiled, eager):
        assert all(abs(a[name] - b[name]) < 1e-4 for name in a), f"{a} compiled, {b} eagerly"


def test_compile_is_off_on_a_cpu_and_needs_a_compiler(monkeypatch, capsys):
    config = settings()
    config.compile = None
    train.resolve_fit(config)
    assert config.compile is False
    monkeypatch.setattr("shutil.which", lambda name: None)
    config.compile = True
    train.resolve_fit(config)
    assert config.compile is False and capsys.readouterr().err.count("going on without") == 1


def gradients(parts, clip=0.0, **flags):
    """(loss, norm, gradient) of an update in so many parts; the weights stay."""
    torch.manual_seed(0)
    model, idx, targets = RATPlus(RATConfig(64, 1, 2, 16)), torch.randint(64, (4, 20)), torch.randint(64, (4, 20))
    targets[0, :15] = -100                                      # parts with unequal numbers of targets
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad = lambda set_to_none: None              # keep the gradients to look at
    config = settings(grad_accum=parts, **flags)
    loss, norm = train.update(train.Loss(model, config), optimizer, train.share(idx, targets, config), Pattern.parse("D4"), clip)
    return loss.item(), norm.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradient_accumulation_changes_nothing():
    whole = gradients(1)
    for parts in (2, 4):
        loss, norm, gradient = gradients(parts)
        assert abs(loss - whole[0]) < 1e-5 and error_of(gradient, whole[2]) < 1e-5 and abs(norm / whole[1] - 1) < 1e-5


def test_clip_limits_the_gradient_and_0_does_not():
    free, clipped = gradients(1, clip=0.0), gradients(1, clip=0.01)
    assert free[1] > 0.1 and abs(free[2].norm() - free[1]) < 1e-4 and clipped[1] == free[1], "the norm is that before clipping"
    assert abs(clipped[2].norm() - 0.01) < 1e-4


def test_checkpointing_changes_no_loss():
    a, b = ([record["losses"] for record in small_fit(checkpointing=on)] for on in (True, False))
    assert a == b
    model = RATPlus(RATConfig(64, 1, 2, 16))
    train.trainable(model, settings(checkpointing=True))
    assert model.checkpointing is True


@pytest.mark.parametrize("steps, warmup", [(100, 0.05), (4, 0.0), (300, 0.05), (2, 0.0)])
def test_the_schedule_rises_to_lr_and_ends_at_min_lr(steps, warmup):
    config = SimpleNamespace(steps=steps, warmup=warmup, lr=1e-3, min_lr=1e-5)
    lrs, ramp = [train.schedule(step, config) for step in range(steps)], int(warmup * steps)
    assert np.allclose(lrs[:ramp + 1], [1e-3 * (i + 1) / ramp for i in range(ramp)] + [1e-3])
    assert abs(lrs[-1] - 1e-5) < 1e-12 and all(a > b for a, b in zip(lrs[ramp:], lrs[ramp + 1:]))


def test_weights_are_trained_in_float32_whatever_the_file_holds():
    pretrain("--steps", 1)
    model, meta = load_checkpoint("out/dense.pt", training=True)
    save_checkpoint("half.pt", model.to(torch.bfloat16), **meta)
    call(train.main, "--checkpoint", "half.pt", "--out", "new", "--steps", 2)
    call(adapt.main, "--checkpoint", "half.pt", "--pattern", "D4", "--steps", 2)
    for path in ("new/dense.pt", "out/D4.pt"):
        stored = torch.load(path, weights_only=True)["model"]
        assert {z.dtype for z in stored.values()} == {torch.float32}
        moved = weights(path) != weights("half.pt")
        assert moved.float().mean() > 0.7, "small steps are not rounded away"


def test_flops_are_those_of_the_matrix_products_and_the_keys():
    for recurrence in (True, False):
        shape, T = RATConfig(64, 2, 4, 32, recurrence), 24
        model, idx = RATPlus(shape), torch.randint(64, (2, T))
        with FlopCounterMode(display=False) as counter:
            model.loss(idx, idx, "D1").backward()
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        keys = sum(Pattern.parse("D8W2,D1").mask(T, layer).sum().item() / T for layer in (0, 1))
        expected = products / idx.numel() + 12 * 32 * keys      # 2 products of 2 C FLOPs a key; backward is twice forward
        assert abs(train.flops_per_token(model, Pattern.parse("D8W2,D1"), T) / expected - 1) < 1e-9


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L4", 121),
                                        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165),
                                        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.inf), ("NVIDIA L40", math.inf)])
def test_the_peak_is_known_by_the_cards_name(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    config = SimpleNamespace(device="cuda", dtype="bfloat16")
    assert train.peak_flops(config) == (peak if peak == math.inf else peak * 1e12)
    assert train.peak_flops(SimpleNamespace(device="cpu", dtype="bfloat16")) == math.inf


# --------------------------------------------------------------------------------------------------
# Batches

def places(data, windows):
    """Offsets of windows in the concatenated files."""
    before = np.cumsum([0, *(len(file.tokens) for file in data.files)])
    return [int(before[file]) + at for file, at in windows]


def test_no_loss_where_the_input_is_end_of_text():
    data = stream([5, 6, 256, 7, 8, 256, 9, 1, 2], T=7)
    idx, targets = train.cut(data, [(0, 0), (0, 1)], eot=256)
    assert idx.tolist() == [[5, 6, 256, 7, 8, 256, 9], [6, 256, 7, 8, 256, 9, 1]]
    assert targets.tolist() == [[6, 256, -100, 8, 256, -100, 1], [256, -100, 8, 256, -100, 1, 2]]
    assert (train.cut(data, [(0, 0)])[1] == -100).sum() == 0


def test_reading_in_order_reads_all_once_and_does_not_depend_on_steps():
    for lengths in ([1000], [331, 90, 5 * 8 + 1], [33 * 4]):
        data = stream(*([0] * n for n in lengths))
        windows = sum((n - 1) // 8 for n in lengths)
        per_row = windows // 4
        seen = [train.in_order(step, settings(steps=steps), data) for steps in (1, 10**6) for step in range(per_row)]
        assert seen[:per_row] == seen[per_row:], "--steps changes nothing"
        flat = [window for batch in seen[:per_row] for window in batch]
        assert len(set(flat)) == len(flat) == 4 * per_row >= windows - 3, "each window once"
        assert all(at % 8 == 0 and at + 9 <= lengths[file] for file, at in flat), "whole samples, within their file"
        rows = [places(data, column) for column in zip(*seen[:per_row])]
        assert all(row == sorted(row) for row in rows) and sorted(rows) == rows, "each row goes on where it was"
        again = train.in_order(per_row + 1, settings(), data)
        assert all(at % 8 == 0 for _, at in again), "and starts again"


def test_short_data_gives_no_batch_of_equal_rows():
    data = stream(range(8 * 6 + 1))
    for step in range(3):
        assert len(set(train.in_order(step, settings(batch_size=6), data))) == 6
        assert len(set(train.in_order(step, settings(batch_size=16), data))) > 8


def test_random_windows_are_drawn_from_files_by_their_size():
    data = stream([0] * 1008, [0] * 3008)
    config = settings(batch_size=4000)
    windows = train.at_random(0, config, data)
    assert windows == train.at_random(0, config, data) != train.at_random(1, config, data)
    assert windows != train.at_random(0, settings(batch_size=4000, seed=1), data)
    second = [at for file, at in windows if file == 1]
    assert abs(len(second) / 4000 - 0.75) < 0.03 and min(second) < 20 and 2980 < max(second) <= 3008 - 9


def test_several_sources_are_read_one_after_the_other_and_all_are_validated(monkeypatch):
    bins([3, 1] * 100, [4, 1] * 30, "a")
    bins([5, 2] * 80, [6, 2] * 30, "b")
    config = settings(data=[os.path.abspath("a"), os.path.abspath("b")], eval_windows=6)
    data = train.load_data(config)
    assert len(data.train) == 360 and len(data.val) == 120
    read = [train.cut(data.train, train.in_order(step, config, data.train))[0] for step in range(10)]
    rows = torch.stack(read).transpose(0, 1).flatten(1)
    assert set(rows[0].tolist()) == {3, 1} and set(rows[3].tolist()) == {5, 2}
    assert {file for file, _ in train.evenly(data.val, config)} == {0, 1}
    drawn = [file for step in range(100) for file, _ in train.at_random(step, config, data.train)]
    assert 0.35 < np.mean(drawn) < 0.55
    call(train.main, "--data", "a", "b", "--steps", 2)
    assert load_checkpoint("out/dense.pt")[1]["train"]["data"] == config.data


def test_only_targets_that_a_mask_names_count_in_training_and_in_validation():
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 50, 16 * 12 + 1), rng.integers(0, 2, 16 * 12 + 1)
    tokens[40:48] = 49
    bins(tokens, mask=mask)
    np.asarray(mask, np.uint8).tofile("bins/val.mask.bin")
    call(train.main, "--data", "bins", "--eot", 49, "--steps", 1, "--lr", 1e-12, "--min-lr", 0, "--eval-windows", 12, "--arl", "none")
    model, meta = load_checkpoint("out/dense.pt")
    x = torch.tensor(tokens[:-1]).view(12, 16)
    y = torch.tensor(np.where(mask == 1, tokens, -100)[1:]).view(12, 16)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    assert abs(meta["val"]["D1"] - expected) < 1e-5, "validation: the masked targets, in samples of the context"
    rows = [r * 12 // 4 for r in range(4)]
    expected = F.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].masked_fill(x[rows] == 49, -100).flatten()).item()
    assert abs(losses()[1]["D1"] - expected) < 1e-5, "training: and no target after end-of-text"


def test_masks_that_do_not_fit_are_refused():
    bins([1, 2, 3] * 30, mask=[1] * 89)
    refused(train.main, "--data", "bins", why="train.mask.bin: 89 bytes for 90 tokens")
    bins([1, 2, 3] * 30, mask=[0] * 90)
    os.rename("bins/train.mask.bin", "bins/val.mask.bin")
    refused(train.main, "--data", "bins", "--steps", 1, why="lets no target count")


# --------------------------------------------------------------------------------------------------
# .bin files

def load(**given):
    config = settings(**given)
    return train.load_data(config), config


def load_bins(**given):
    return load(data=[os.path.abspath("bins")], **given)


def test_bins_give_the_vocabulary_and_end_of_text():
    bins([3, 70, 1] * 10)
    for given, (eot, vocab) in (({}, (-1, 128)), ({"eot": 3}, (3, 128)), ({"tokenizer": "gpt2"}, (50256, 50304)),
                                ({"tokenizer": "bytes"}, (256, 320))):
        data, config = load_bins(**given)
        assert data.vocab_size == vocab and config.eot == eot and config.tokenizer == given.get("tokenizer", "ids")
    with pytest.raises(ValueError, match="token 70 is beyond the vocabulary of 64"):
        train.load_data(settings(data=[os.path.abspath("bins")]), 64)
    with pytest.raises(ValueError, match="--eot 200 is beyond"):
        load_bins(eot=200)
    bins([3, 1] * 10 + [50256, 3])
    data, config = load_bins()
    assert data.vocab_size == 50304 and config.eot == 50256 and load_bins(eot=-1)[1].eot == -1


def llmc(n, magic=20240520, version=1, count=None):
    head = np.zeros(256, "<i4")
    head[:3] = magic, version, n if count is None else count
    return head.tobytes() + (np.arange(n) % 60).astype("<u2").tobytes()


def test_the_header_of_llm_c_is_read_past():
    bins([0])
    Path("bins/train.bin").write_bytes(llmc(500))
    Path("bins/val.bin").write_bytes(llmc(300))
    data, _ = load_bins()
    assert len(data.train) == 500 and len(data.val) == 300 and data.vocab_size == 64
    assert train.cut(data.train, [(0, 0)])[0].tolist() == [list(range(8))]


@pytest.mark.parametrize("raw, why", [
    (llmc(500, count=499), "500 uint16 after a header of magic, version and tokens [20240520, 1, 499]"),
    (llmc(500, version=2), "[20240520, 2, 500]"),
    (llmc(500, magic=20240801, version=7), "[20240801, 7, 500]"),
    ((np.arange(500) % 99).astype("<u4").tobytes(), "numbers of 32 or 64 bits"),
    ((np.arange(500) * 200).astype("<u4").tobytes(), "numbers of 32 or 64 bits"),
    ((np.arange(500) % 99).astype("<i8").tobytes(), "numbers of 32 or 64 bits"),
    (b"\x93NUMPY" + bytes(1000), "a NumPy .npy file"),
    (b"\x1f\x8b\x08" + bytes(1001), "gzip"),
    (b"\xfd7zXZ" + bytes(1001), "xz"),
    (b"PK\x03\x04" + bytes(1000), "a zip archive"),
    (b"Once upon a time " * 20, "text, like b'Once upon"),
    (b"\1\0" * 500 + b"\1", "1001 bytes, an odd number"),
    (b"", "0 tokens; it must hold more"),
    (b"\1\0" * 8, "8 tokens; it must hold more uint16 tokens than the context of 8"),
])
def test_other_files_are_refused_by_what_is_seen(raw, why):
    bins([3, 70, 1] * 30)
    Path("bins/train.bin").write_bytes(raw)
    with pytest.raises(ValueError) as error:
        load_bins()
    assert why in str(error.value) and "bins/train.bin" in str(error.value)


def test_small_vocabularies_are_no_numbers_of_32_bits():
    for tokens in ([1] * 200, [5] * 200, [0, 1, 2, 3] * 50, [9, 5, 8] * 60):
        bins(tokens)
        assert load_bins()[0].vocab_size == 64


def test_a_huge_file_is_looked_at_in_part_and_its_batches_are_checked(capsys):
    bins([3, 70, 1] * 30)
    try:
        os.truncate("bins/train.bin", 200 * 10**9)
    except OSError:
        pytest.skip("no sparse files here")
    start = time.process_time()
    tracemalloc.start()
    data, _ = load_bins()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 30, "to read all of it would take minutes"
    assert peak < 1e9
    assert len(data.train) == 10**11 and capsys.readouterr().err.count("of 100000M tokens were searched") == 1
    with open("bins/train.bin", "r+b") as f:                    # not where it was looked at
        f.seek(2 * 3 * 10**9)
        f.write(np.array([999], "<u2"))
    data, _ = load_bins()
    with pytest.raises(ValueError, match="token 999 is beyond the vocabulary of 128"):
        train.cut(data.train, [(0, 3 * 10**9 - 4)])


def test_changed_data_are_noticed_by_adaptation_and_by_a_resumed_run(capsys):
    bins([3, 70, 1] * 60)
    call(train.main, "--data", "bins", "--steps", 2)
    call(adapt.main, "--pattern", "D4", "--steps", 1)
    assert "has changed" not in capsys.readouterr().err
    bins([3, 1, 70] * 60)                                       # of the same size
    call(adapt.main, "--pattern", "D8", "--steps", 1)
    call(train.main, "--resume", "--steps", 3)
    err = capsys.readouterr().err
    assert err.count("bins has changed since the run") == 2 and err.count("\n") == 2
    bins([5, 6] * 60, folder="other")
    call(adapt.main, "--pattern", "D2", "--steps", 1, "--data", "other")
    assert "changed" not in capsys.readouterr().err, "other data are no change"


def test_end_of_text_is_found_anew_in_other_data():
    pretrain("--steps", 1)
    bins([3, 70, 1] * 60)
    call(train.main, "--checkpoint", "out/dense.pt", "--data", "bins", "--tokenizer", "ids", "--steps", 1, "--out", "b")
    assert load_checkpoint("b/dense.pt")[1]["train"]["eot"] == -1


class Bomb:
    def __reduce__(self):
        return (Path("exploded").write_text, ("boom",))


def test_meta_pkl_is_never_unpickled():
    bins([3, 70, 1] * 10)
    Path("bins/meta.pkl").write_bytes(pickle.dumps(Bomb()))
    load_bins()
    assert not os.path.exists("exploded")


# --------------------------------------------------------------------------------------------------
# Texts

def split(data):
    """The texts of the training and the validation data, as sets."""
    sides = []
    for part in (data.train, data.val):
        tokens = np.concatenate([np.asarray(file.tokens) for file in part.files])
        pieces = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
        sides.append({bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces if len(piece)})
    return sides


def test_texts_are_read_once_whole_and_on_one_side(capsys):
    Path("text/.hidden").write_text("no")
    Path("text/empty.txt").touch()
    Path("text/broken.txt").symlink_to("nowhere")
    os.mkfifo("text/pipe.txt")                                  # reading it would wait for ever
    data, config = load()
    assert data.vocab_size == 320 and config.tokenizer == "bytes" and config.eot == 256
    sides = split(data)
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {Path(f"text/{i}.txt").read_text() for i in range(40)}
    assert "40/40 texts" in capsys.readouterr().err
    again, _ = load()
    assert capsys.readouterr().err == "" and again.key == data.key, "tokenized once"
    Path("text/0.txt").write_text("changed " * 20)
    changed, _ = load()
    assert "40/40 texts" in capsys.readouterr().err and changed.key != data.key, "and again when a file has changed"


def test_the_side_of_a_text_follows_from_its_name_alone():
    """Whatever is added or taken away, no text that was trained on is ever validated on."""
    rng = np.random.default_rng(0)
    names = [f"{i}.txt" for i in range(400)]
    for trial in range(20):
        some = rng.choice(names, rng.integers(5, 60), replace=False)
        more = {*some, *rng.choice(names, rng.integers(5, 200), replace=False)}
        sides = []
        for group in (some, more):
            folder = f"{trial} {len(sides)}"
            texts(dict.fromkeys(group, ""), folder)
            for name in group:
                os.truncate(f"{folder}/{name}", 20_000)
            docs = train.documents(folder)
            sides.append({doc.name: border / doc.size for doc, border in zip(docs, train.borders(docs))})
        assert all(sides[1][name] >= share for name, share in sides[0].items()), "what was trained on is still"
    one_in_20 = {name for name in more if int(hashlib.md5(name.encode()).hexdigest(), 16) % 20 == 0}
    assert {name for name, share in sides[1].items() if share == 0} == one_in_20 != set()
    assert set(sides[1].values()) == {0, 1}, "many texts are whole, on one side"


@pytest.mark.parametrize("sizes", [(100_000, 500), (500, 100_000), (5000,), (3000,) * 3, (6,) + (5000,) * 15])
def test_few_or_uneven_texts_give_a_sensible_share_to_validation(sizes, capsys):
    """Whichever of them the names choose: 20 sets of names."""
    for trial in range(20):
        texts({f"{trial}-{i}.txt": "a word " * (size // 7) for i, size in enumerate(sizes)}, f"t{trial}")
        data, _ = load(data=[os.path.abspath(f"t{trial}")])
        share = len(data.val) / (len(data.train) + len(data.val))
        most = 0.1 if max(sizes) > sum(sizes) / 2 else 0.51
        assert 0.01 < share <= most, (trial, share)
    assert "each gives its last 20th to validation" in capsys.readouterr().err


def test_a_single_text_is_cut_where_white_space_begins():
    text = "".join(f"word{i} " for i in range(1000))
    texts({"book.txt": text})
    data, _ = load(data=[os.path.abspath("text/book.txt")])
    (first,), (second,) = split(data)
    assert first + second == text and second.startswith(" word") and 0.03 < len(second) / len(text) < 0.07


def test_a_byte_order_mark_is_no_text_and_line_ends_stay():
    texts({f"{i}.txt": b"\xef\xbb\xbfone\r\ntwo \xe2\x82\xac\n" * 20 for i in range(30)}, "marks")
    data, _ = load(data=[os.path.abspath("marks")])
    assert all(text.startswith("one\r\ntwo €\n") for text in split(data)[0])


def test_files_that_are_not_utf8_are_counted_and_named(capsys):
    texts({"a.txt": b"caf\xe9 " * 50, "b.png": b"\x89PNG\0\0", "c.txt": "wide".encode("utf-16")}, "text/more")
    data, _ = load()
    err = capsys.readouterr().err
    assert "3 of 43 files are left out, as they are not UTF-8 text" in err and "text/more/" in err
    texts({"a.txt": b"\0" * 100}, "zeros")
    refused(train.main, "--data", "zeros", why="no UTF-8 text in it")


def test_a_file_name_need_not_be_utf8(capsys):
    try:
        Path(os.fsdecode(b"text/caf\xe9.txt")).write_text("coffee " * 30)
        Path(os.fsdecode(b"text/na\xefve.txt")).write_bytes(b"\xff" * 30)
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    train.run(load)
    sides = split(load()[0])
    assert "coffee " * 30 in sides[0] | sides[1] and "1 of 42 files" in capsys.readouterr().err


def test_linked_folders_are_read_and_loops_are_not(capsys):
    texts({f"{i}.txt": f"linked {i} " * 20 for i in range(5)}, "elsewhere")
    os.symlink("../elsewhere", "text/books")
    os.symlink("..", "elsewhere/back")
    os.symlink(".", "text/self")
    data, _ = load()
    assert sum("linked" in text for side in split(data) for text in side) == 5


def test_split_on_makes_documents_of_one_file():
    stories = [f"Story {i} went on and on. " * 9 for i in range(60)]
    texts({"tales.txt": "<|endoftext|>".join(stories)}, "tales")
    data, _ = load(data=[os.path.abspath("tales/tales.txt")], split_on="<|endoftext|>")
    sides = split(data)
    assert sides[0] | sides[1] >= set(stories[:55]) and "<|endoftext|>" not in "".join(sides[0] | sides[1])
    bins([1, 2, 3] * 30)
    refused(train.main, "--data", "bins", "--split-on", "x", why="--split-on is for texts")


def test_a_separator_is_found_wherever_pieces_end():
    text = "".join(f"some words {i}\n\n--\n\n" for i in range(200))
    Path("t.txt").write_text(text)
    coder = train.Tokenizer("bytes")
    for size in (7, 20, 33, 100, 10**6):
        pieces = list(train.pieces("t.txt", "\n\n--\n\n", size))
        assert "".join(pieces) == text
        tokens = np.concatenate([train.encode(piece, coder, "\n\n--\n\n") for piece in pieces])
        assert (tokens == 256).sum() == 200 and len(tokens) == len(text) - 200 * 6 + 200


def test_tokenizing_a_large_text_takes_little_memory():
    size = 2 * 10**7
    Path("big.txt").write_text("the quick brown fox jumps over it, then sleeps. " * (size // 48))
    tracemalloc.start()
    train.tokenize("big.txt", "bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size, f"{peak / 1e6:.0f} MB"


def test_a_tokenization_that_was_killed_does_not_block_the_next():
    texts({"train.bin": "half", "other": "left"}, ".cache/unfinished")
    data, _ = load()
    assert len(data.train) > 70_000 and not os.path.exists(".cache/unfinished")
    assert sorted(path.name for path in Path(".cache").glob("*/*")) == ["train.bin", "val.bin"]


def test_a_process_waits_while_another_tokenizes():
    os.makedirs(".cache")
    held = train.lock(".cache/lock")
    waiting = threading.Thread(target=train.tokenize, args=("text", "bytes"))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and not list(Path(".cache").glob("*/train.bin"))
    held.close()
    waiting.join(10)
    assert len(list(Path(".cache").glob("*/train.bin"))) == 1


def test_gpt2_without_tiktoken_or_its_vocabulary_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    assert train.Tokenizer("gpt2").eot == 50256, "its size and end-of-text need no vocabulary"
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        train.Tokenizer("gpt2").encode("text")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="pip install tiktoken"):
        train.Tokenizer("gpt2").encode("text")


@needs_gpt2
def test_gpt2_tokens_of_pieces_are_those_of_the_whole():
    text = ("def f(x): return 'naïve 漢字 🙂'\n\n    it's  two   spaces,\tand tabs \n" * 40)
    coder = train.Tokenizer("gpt2")
    assert "".join(map(coder.decode, coder.encode(text))) == text
    Path("t.txt").write_text(text)
    for size in (50, 97, 1000):
        pieces = [token for piece in train.pieces("t.txt", None, size) for token in coder.encode(piece)]
        assert pieces == list(coder.encode(text))
    assert train.Tokenizer("gpt2").encode("<|endoftext|>") != [50256], "the text of a special token is text"


@needs_gpt2
@pytest.mark.parametrize("text", [" " * 10**6 + "x", "\n" * 10**6 + "y", "z" * 10**6], ids=["blanks", "lines", "letters"])
def test_long_runs_are_no_trouble_for_gpt2(text):
    coder = train.Tokenizer("gpt2")
    assert "".join(map(coder.decode, coder.encode(text))) == text


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂", ""])
def test_bytes_decode_as_they_stream(text):
    coder = train.Tokenizer("bytes")
    assert "".join(map(coder.decode, coder.encode(text).tolist())) == text
    assert train.Tokenizer("bytes").decode(256) == "<|endoftext|>" and train.Tokenizer("bytes").decode(300) == ""
    assert train.Tokenizer("bytes").encode(os.fsdecode(b"caf\xe9")).tolist() == [99, 97, 102, 233]


# --------------------------------------------------------------------------------------------------
# Resuming, overwriting, stopping

def half_saved(folder, save=torch.save):
    """`torch.save` whose second call leaves in `folder` what a kill -9 within it leaves in out."""
    saves = []

    def patched(data, file):
        saves.append(file)
        if len(saves) == 2:
            file.write(b"half a checkpoint")
            file.flush()
            shutil.copytree("out", folder)
            file.seek(0)
            file.truncate()
        save(data, file)

    return patched


def test_a_run_killed_within_a_save_goes_on_bit_for_bit():
    """Killed at step 8, in the second save; then a line of the log is torn, and another one NUL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", half_saved("killed"))
        pretrain("--steps", 14, "--eval-interval", 4, "--arl", "D4")
    log = "killed/dense.jsonl"
    assert load_checkpoint("killed/dense.pt")[1]["step"] == 4 and max(losses(log)) == 8
    assert b"half a checkpoint" in [path.read_bytes() for path in Path("killed").iterdir()]
    with open(log, "a") as f:
        f.write('\0\0\0\0\n{"step": 9, "los')
    call(train.main, "--resume", "--out", "killed", "--steps", 14)
    assert list(losses(log)) == list(range(1, 15)) and losses(log) == losses()
    assert weights("killed/dense.pt").equal(weights("out/dense.pt"))
    os.rename("killed", "moved")
    call(train.main, "--resume", "--out", "moved", "--steps", 15)
    assert max(losses("moved/dense.jsonl")) == 15
    assert not os.path.exists("killed"), "a run may be moved and prolonged"


def test_a_full_disk_keeps_the_last_checkpoint(untrained):
    resource = pytest.importorskip("resource", reason="no file size limits on this platform")
    load()                                                      # so that the texts are tokenized
    before = untrained.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="out/dense.pt is not saved, an older one is as it was"):
            call(train.main, "--resume", "--steps", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untrained.read_bytes() == before and not os.path.exists("out/dense.pt.tmp")


def test_torn_lines_of_a_log_are_named_and_left_out(capsys):
    pretrain("--steps", 4)
    raw = Path("out/dense.jsonl").read_bytes().splitlines(keepends=True)
    Path("out/dense.jsonl").write_bytes(b"".join([*raw[:3], b"\0" * 57 + b"\n", b"[1]\n", *raw[3:], b'{"step']))
    call(train.main, "--resume", "--steps", 5)
    assert "out/dense.jsonl: 3 torn lines are left out" in capsys.readouterr().err
    assert list(losses()) == [1, 2, 3, 4, 5]


def test_a_prolonged_run_reads_what_it_has_not_read():
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "in_order", lambda *args, f=train.in_order: seen.append(f(*args)) or seen[-1])
        pretrain("--steps", 3)
        call(train.main, "--resume", "--steps", 6)
    windows = [window for batch in seen for window in batch]
    assert len(seen) == 6 and len(set(windows)) == len(windows) == 24


@pytest.mark.parametrize("flag, value, was", [("--lr", 0.5, 0.001), ("--seed", 7, 0), ("--data", "other", "text"), ("--batch-size", 8, 4),
                                              ("--random", None, False), ("--preset", "small", "laptop"), ("--arl", "D8", "D64"),
                                              ("--n-embd", 32, 16), ("--context", 8, 16), ("--eval-windows", 3, 4),
                                              ("--dtype", "bfloat16", "float32"), ("--no-recurrence", None, True),
                                              ("--tokenizer", "gpt2", "bytes"), ("--warmup", 0.5, 0.05), ("--clip", 9, 1.0),
                                              ("--checkpoint", "a.pt", None), ("--vocab-size", 1000, 320)])
def test_a_resumed_run_refuses_what_changes_the_result(untrained, flag, value, was):
    texts({"a.txt": "other " * 50}, "other")
    save_checkpoint("a.pt", RATPlus(RATConfig(320, 1, 2, 16)), train={"data": ["stdlib"]}, tokenizer="bytes")
    refuse = ["--resume", "--device", "cpu", flag, *([] if value is None else [value])]
    with pytest.raises(ValueError) as error:
        train.main([*map(str, refuse)])
    assert flag.replace("no-", "") in str(error.value) and f"{was}" in str(error.value), error.value


def test_a_resumed_run_takes_what_changes_nothing_and_what_is_the_same(untrained):
    again = [*TINY, "--data", "text", "--resume", "--steps", "4", "--log-interval", "2", "--eval-interval", "1", "--eval-batch", "2",
             "--no-compile", "--arl", "D64W0", "--lr", "1e-3", "--preset", "laptop"]
    train.main(again)
    assert load_checkpoint("out/dense.pt")[1]["step"] == 4


@pytest.fixture
def untrained():
    """out/dense.pt with the meta of a real run of two steps, made without training."""
    config = settings(data=[os.path.abspath("text")], tokenizer="bytes", eot=256, context=16, eval_windows=4, steps=2,
                      arl=["D64"], preset="laptop", vocab_size=320, n_layer=1, n_head=2, n_embd=16)
    model = RATPlus(RATConfig(320, 1, 2, 16))
    optimizer = train.new_optimizer(model, config).state_dict()
    save_checkpoint("out.pt", model, step=2, pattern="D1", tokenizer="bytes", train=train.recorded(vars(config)), optimizer=optimizer)
    os.mkdir("out")
    os.rename("out.pt", "out/dense.pt")
    return Path("out/dense.pt")


def test_a_new_run_sets_the_files_of_the_old_one_aside(untrained):
    """Killed before its first save, it leaves nothing that --resume could take for its own."""
    Path("out/dense.jsonl").write_text("the old log\n")
    before = untrained.read_bytes()
    refused(train.main, "--data", "text", why="--resume goes on with it, --overwrite starts anew")
    refused(train.main, "--data", "nowhere", "--overwrite", why="nowhere")
    assert untrained.read_bytes() == before, "bad input loses nothing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", lambda *args: (_ for _ in ()).throw(SystemExit("killed")))
        with pytest.raises(SystemExit):
            call(train.main, "--data", "text", "--overwrite")
    assert not untrained.exists() and Path("out/dense.pt.old").read_bytes() == before
    assert Path("out/dense.jsonl.old").read_text() == "the old log\n"
    with pytest.raises(FileNotFoundError):
        call(train.main, "--resume")


def test_adaptation_sets_all_old_files_aside_before_it_starts(untrained):
    call(adapt.main, "--pattern", "D4", "D8", "--steps", 1)
    refused(adapt.main, "--pattern", "D4", "--steps", 1, why="out/D4.pt exists")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt, "fit", lambda *args: (_ for _ in ()).throw(SystemExit("killed")))
        with pytest.raises(SystemExit):
            call(adapt.main, "--pattern", "D4", "D8", "--steps", 1, "--overwrite")
    assert not any(os.path.exists(f"out/{name}.pt") for name in ("D4", "D8")) and os.path.exists("out/D8.pt.old")


def test_adaptation_resumes_by_keeping_what_is_done(untrained, capsys):
    call(adapt.main, "--pattern", "D4", "--steps", 2)
    before = Path("out/D4.pt").read_bytes()
    call(adapt.main, "--pattern", "D4", "D8", "--steps", 2, "--resume")
    assert Path("out/D4.pt").read_bytes() == before and os.path.exists("out/D8.pt")
    for flag, value in (("--steps", 3), ("--lr", 0.5), ("--seed", 4)):
        refused(adapt.main, "--pattern", "D4", "--resume", flag, value, why=f"{flag} {value}: out/D4.pt has")
    torch.manual_seed(1)
    save_checkpoint(untrained, RATPlus(RATConfig(320, 1, 2, 16)), **load_checkpoint(untrained)[1])
    refused(adapt.main, "--pattern", "D4", "--resume", why="adapted from other weights")
    call(adapt.main, "--pattern", "D4", "D4W0", "D4", "--steps", 3, "--overwrite")
    assert load_checkpoint("out/D4.pt")[1]["step"] == 3
    out = capsys.readouterr()
    assert "adapted once" in out.err and out.out.count("\n| D4 | ") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_step_and_the_run_goes_on(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                # under nohup it is ignored
    call(train.main, "--data", "text", "--out", "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", signalling(number, at=5))
        with pytest.raises(KeyboardInterrupt, match="step 3 is saved in out/dense.pt, --resume goes on"):
            pretrain()
    assert load_checkpoint("out/dense.pt")[1]["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are as before"
    call(train.main, "--resume")
    assert losses() == losses("whole/dense.jsonl")


def signalling(number, at, update=train.update):
    """`update`, which sends this process a signal at its at-th call."""
    calls = []

    def patched(*args):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return update(*args)

    return patched


def test_a_signal_in_the_last_step_lets_the_run_end(monkeypatch, capsys):
    monkeypatch.setattr(train, "update", signalling(signal.SIGINT, at=12))
    pretrain()
    meta = load_checkpoint("out/dense.pt")[1]
    assert meta["step"] == 6 and set(meta["val"]) == {"D1", "D64"} and "not measured" not in capsys.readouterr().out


def test_a_hang_up_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(train, "update", signalling(signal.SIGHUP, at=3))
        pretrain()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert max(losses()) == 6


def test_two_runs_do_not_write_the_same_files():
    os.mkdir("out")
    held = train.lock("out/dense.lock")
    refused(train.main, "--data", "text", why="another run is writing there")
    held.close()
    pretrain("--steps", 1)                                      # the file of a process that has ended blocks nothing
    assert os.path.exists("out/dense.lock")


def test_a_reader_that_goes_away_ends_no_run(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as out:
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, out)
        train.run(pretrain)
        out.flush()                                             # as at the end of the process
    err = capsys.readouterr().err
    assert "Error" not in err and max(losses()) == 6, err


def test_a_poisoned_checkpoint_stops_and_is_not_overwritten(untrained):
    model, meta = load_checkpoint(untrained, training=True)
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    save_checkpoint(untrained, model, **meta)
    before = untrained.read_bytes()
    with pytest.raises(ValueError, match="training stopped at step 3"):
        call(train.main, "--resume")
    assert untrained.read_bytes() == before


# --------------------------------------------------------------------------------------------------
# What is inherited

def test_a_resumed_run_can_be_a_parent(untrained):
    """Only what describes the model and its data is inherited; flags of that call are not."""
    call(train.main, "--resume", "--steps", 3)
    call(train.main, "--checkpoint", "out/dense.pt", "--out", "new", "--steps", 2, "--seed", 5)
    meta = load_checkpoint("new/dense.pt")[1]
    assert meta["step"] == 2 and list(losses("new/dense.jsonl")) == [1, 2] and meta["train"]["context"] == 16
    assert not {"resume", "overwrite", "out", "device", "compile"} & {*meta["train"]}
    assert meta["parent"] == train.fingerprint(load_checkpoint("out/dense.pt")[0])
    inherited = train.of_run("x", {"train": {"resume": True, "out": "r", "lr": 3, "seed": 9, "eot": 5, "split_on": "s"},
                                   "tokenizer": "ids"}, {"data": ["d"]}, train.train_flags().defaults)
    assert inherited == {"lr": 3, "tokenizer": "ids"}


def test_the_order_of_precedence(untrained):
    """default < preset < checkpoint < given."""
    model, meta = load_checkpoint(untrained)
    parser = train.train_flags()
    given = {"checkpoint": str(untrained), "batch_size": 2, "device": "cpu"}
    config = train.settle(parser, given, train.of_checkpoint("x", model, meta, given, parser.defaults))
    assert (config.weight_decay, config.eval_interval, config.context, config.batch_size) == (0.1, 250, 16, 2)
    fresh = train.settle(parser, {"preset": "base", "device": "cpu"}, {})
    assert (fresh.n_layer, fresh.context, fresh.lr, fresh.weight_decay) == (12, 4096, 8e-4, 0.1)
    assert train.settle(parser, {"device": "cpu"}, {}).preset == "laptop"


def test_adapted_weights_go_on_in_their_pattern_alone(untrained):
    call(adapt.main, "--pattern", "D4", "D1", "--steps", 1)
    parent = load_checkpoint("out/D4.pt")[1]["parent"]
    for name in ("D4", "D1"):
        call(train.main, "--checkpoint", f"out/{name}.pt", "--out", "tuned", "--steps", 2)
        assert all(set(step) == {name} for step in losses(f"tuned/{name}.jsonl").values())
        assert load_checkpoint(f"tuned/{name}.pt")[1]["parent"] == parent
    refused(train.main, "--checkpoint", "out/D4.pt", "--arl", "D4", "--out", "b", why="all updates are in D4")
    refused(train.main, "--checkpoint", "out/D4.pt", "--out", "tuned", why="tuned/D4.pt exists")
    refused(train.main, "--checkpoint", "out/D4.pt", "--overwrite", why="--out names another folder")


def test_flags_that_this_version_has_not_are_named_and_left_out(untrained, capsys):
    model, meta = load_checkpoint(untrained, training=True)
    meta["train"]["dropout"] = 0.1
    save_checkpoint(untrained, model, **meta)
    call(train.main, "--resume", "--steps", 3)
    call(train.main, "--checkpoint", "out/dense.pt", "--out", "new", "--steps", 1)
    assert capsys.readouterr().err.count("flags that mean nothing here: dropout") == 1, "and they are not passed on"


def test_the_authors_checkpoint_is_adapted_and_fine_tuned():
    bins(np.random.default_rng(0).integers(0, 37, 500))
    data = ["--data", "bins", "--context", 16]
    call(adapt.main, "--checkpoint", GOLDEN, "--pattern", "D4", "--steps", 2, *data)
    model, meta = load_checkpoint("out/D4.pt")
    assert model.config.vocab_size == 37 and meta["pattern"] == "D4" and meta["tokenizer"] == "ids"
    train.main(["--checkpoint", str(GOLDEN), *map(str, data), "--steps", "1", "--device", "cpu", "--out", "new"])
    assert load_checkpoint("new/dense.pt")[0].config == model.config
    refused(adapt.main, "--checkpoint", GOLDEN, "--pattern", "D8", why="--data is needed")


# --------------------------------------------------------------------------------------------------
# Flags and bad input

@pytest.mark.parametrize("args, why", [
    (["--data", ""], "--data: it is empty"),
    (["--out", ""], "--out: it is empty"),
    (["--data", "nowhere"], "nowhere: no such file"),
    (["--data", "text", "--tokenizer", "ids"], "text needs a tokenizer"),
    (["--data", "text", "--eot", "32"], "--eot 32: texts in bytes end with 256"),
    (["--data", "text", "--context", "100000"], "than the context of 100000"),
    (["--data", "text", "--arl", ""], "--arl: pattern ''"),
    (["--data", "text", "--arl", "D-1"], "'D-1'"),
    (["--data", "text", "--arl", "D1/D2/D4"], "do not divide"),
    (["--data", "text", "--n-head", "3"], "heads of even width"),
    (["--data", "text", "--resume"], "out/dense.pt"),
    (["--data", "text", "--resume", "--overwrite"], "out/dense.pt"),
    (["--data", "text", "--out", "file"], "file"),
    (["--data", "text", "--device", "nonsense"], "--device nonsense"),
    (["--data", "text", "--device", "meta"], "--device meta"),
    (["--data", "text", "--grad-accum", "3"], "--batch-size 4 does not split into --grad-accum 3 x 1 processes"),
    (["--data", "text", "--lr", "1e-8"], "--min-lr 1e-06 is above --lr 1e-08"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--checkpoint", "foreign.pt"], "foreign.pt"),
    (["--preset", "huge"], "--preset"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--step", "3"], "unrecognized arguments: --step"),
    (["--steps", "many"], "--steps: 'many' is not a whole number from 1"),
    (["--steps", "0"], "--steps: '0' is not a whole number from 1"),
    (["--steps", "2.5"], "--steps"),
    (["--warmup", "5"], "--warmup: '5' is not a share of the steps, a number from 0 to 1"),
    (["--warmup", "100"], "share of the steps"),
    (["--clip", "-1"], "--clip"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "0"], "--lr"),
    (["--min-lr", "-1"], "--min-lr"),
    (["--weight-decay", "-0.1"], "--weight-decay"),
    (["--eot", "-2"], "--eot"),
    (["--eot", "70000"], "--eot"),
    (["--vocab-size", "65537"], "--vocab-size"),
    (["--batch-size", "0"], "--batch-size"),
    (["--context", "0"], "--context"),
    (["--seed", "9" * 30], "--seed"),
    (["--seed", "-1"], "--seed"),
    (["--dtype", "float64"], "--dtype"),
    (["--log-interval", "0"], "--log-interval"),
    (["--eval-interval", "0"], "--eval-interval"),
    (["--eval-windows", "0"], "--eval-windows"),
    (["--eval-batch", "0"], "--eval-batch"),
])
def test_bad_flags_of_train_are_refused(args, why):
    Path("file").write_text("a file, not a folder")
    torch.save({"a": 1}, "foreign.pt")
    refused(train.main, *args, why=why)


@pytest.mark.parametrize("args, why", [
    (["--pattern", "D1/D2/D4"], "3 head groups do not divide 2 heads"),
    (["--pattern", "D4", "D"], "'D'"),
    (["--pattern", "D1,D4"], "2 layers are named, the model has 1"),
    (["--pattern"], "--pattern"),
    (["--data", "wide"], "token 400 is beyond the vocabulary of 320"),
    (["--data", "wide", "--tokenizer", "gpt2", "--split-on", "x"], "--split-on"),
    (["--lr", "1e-5", "--min-lr", "1e-4"], "--min-lr 0.0001 is above --lr 1e-05"),
    (["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    (["--arl", "D4"], "unrecognized arguments"),
    (["--random"], "unrecognized arguments"),
    (["--out", "empty"], "empty/dense.pt"),
])
def test_bad_flags_of_adapt_are_refused(untrained, args, why):
    bins([3, 400, 1] * 20, folder="wide")
    refused(adapt.main, *args, why=why)


@pytest.mark.parametrize("args, why", [
    (["--n-embd", "32"], "--n-embd 32: out/dense.pt has 16"),
    (["--preset", "small"], "out/dense.pt has"),
    (["--no-recurrence"], "--recurrence False: out/dense.pt has True"),
    (["--vocab-size", "512"], "--vocab-size 512: out/dense.pt has 320"),
])
def test_a_shape_that_does_not_fit_the_checkpoint_is_refused(untrained, args, why):
    with pytest.raises(ValueError) as error:
        train.main(["--checkpoint", "out/dense.pt", "--out", "new", "--device", "cpu", *args])
    assert why in str(error.value)


def test_a_small_rate_of_pretraining_gives_adaptation_no_rising_rate(untrained):
    model, meta = load_checkpoint(untrained, training=True)
    meta["train"]["lr"] = 5e-6
    save_checkpoint(untrained, model, **meta)
    call(adapt.main, "--pattern", "D4", "--steps", 3)
    assert max(record["lr"] for record in records("out/D4.jsonl").values()) < 5.1e-7


def test_adaptation_takes_a_hundredth_of_the_steps_but_at_least_40(untrained):
    model, meta = load_checkpoint(untrained)
    for steps, expected in ((300, 40), (9000, 90)):
        meta["train"]["steps"] = steps
        assert adapt.settle(adapt.adapt_flags(), {"device": "cpu"}, "x", meta).steps == expected


def test_help_names_every_default(capsys):
    for flags in (train.train_flags(), adapt.adapt_flags()):
        text = " ".join(flags.format_help().split())
        for name, default in flags.defaults.items():
            if isinstance(default, (int, float, str)) and not isinstance(default, bool):
                assert f"default: {default}" in text, name
        assert flags.parse_args([]) == argparse.Namespace(), "only what was typed"


# --------------------------------------------------------------------------------------------------
# Processes

@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 0, 1)),
    ({"WORLD_SIZE": "2", "RANK": "0"}, (0, 0, 1)),
    ({"WORLD_SIZE": "", "RANK": ""}, (0, 0, 1)),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}, (0, 0, 1)),
    ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 1, 4)),
])
def test_only_torchruns_variables_make_several_processes(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train.from_torchrun() == expected


@pytest.mark.parametrize("error, code, line", [
    (ValueError("two\nlines"), 1, "two lines"),
    (FileNotFoundError("no file"), 1, "no file"),
    (torch.OutOfMemoryError("no memory"), 1, "no memory"),
    (KeyboardInterrupt("; step 3 is saved"), 130, "interrupted; step 3 is saved"),
    (BrokenPipeError(), 0, None),
    (None, 0, None),
])
def test_run_makes_one_line_of_an_error(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    monkeypatch.setattr(train, "hang_up", lambda: None)

    def main():
        if error:
            raise error

    try:
        train.run(main)
        found = 0
    except SystemExit as stop:
        found = stop.code
    assert found == code and capsys.readouterr().err == (f"train.py: {line}\n" if line else "")
    with pytest.raises(ZeroDivisionError):
        train.run(lambda: 1 / 0)


def test_text_that_the_terminal_has_no_letters_for_is_printed_anyway(monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    train.run(lambda: train.say("naïve \udce9 漢"))
    assert screen.getvalue() == b"na\\xefve \\udce9 \\u6f22\n"


def test_two_processes_train_as_one():
    """The same losses and the same norm, so that gradients are neither summed nor averaged wrongly; parts have targets of their own."""
    run = [*TINY, "--data", "text", "--arl", "D4", "--clip", "0.1"]
    pretrain("--arl", "D4", "--clip", 0.1, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "train.py", *run]
    done = subprocess.run([*map(str, command), "--out", "two", "--grad-accum", "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RAT+ |") == 1 and "| 2 processes" in done.stdout, "one process prints"
    one, two = records("one/dense.jsonl"), records("two/dense.jsonl")
    assert one.keys() == two.keys()
    for step in one:
        assert abs(one[step]["norm"] / two[step]["norm"] - 1) < 1e-4, "the norm of the gradient of the whole batch"
        assert all(abs(one[step]["losses"][name] - two[step]["losses"][name]) < 1e-4 for name in one[step]["losses"])
    assert error_of(weights("two/dense.pt"), weights("one/dense.pt")) < 1e-4
    val, alone = (load_checkpoint(f"{name}/dense.pt")[1]["val"] for name in ("two", "one"))
    assert all(abs(val[name] - alone[name]) < 1e-4 for name in alone), "validation is split and summed"
    broken = subprocess.run([*map(str, command), "--data", "nowhere", "--out", "b"], capture_output=True, text=True, timeout=120)
    assert broken.returncode != 0 and broken.stderr.count("train.py: --data") == 1, broken.stderr


# --------------------------------------------------------------------------------------------------
# On a GPU

ON_GPU = ["--n-layer", 2, "--n-head", 2, "--n-embd", 128, "--context", 128, "--batch-size", 4, "--data", "text", "--steps", 12,
          "--eval-interval", 6, "--log-interval", 1, "--device", "cuda", "--arl", "D64"]


@needs_gpu
def test_compiled_and_eager_agree_on_a_gpu(capsys):
    for flag in ("--compile", "--no-compile"):
        train.main([*map(str, ON_GPU), "--out", flag[2:], flag])
        out = capsys.readouterr().out
        assert ("compilation included" in out) == (flag == "--compile") and "| peak " in out
    compiled, eager = losses("compile/dense.jsonl"), losses("no-compile/dense.jsonl")
    for step in eager:
        assert all(abs(compiled[step][name] - eager[step][name]) < 2e-2 for name in eager[step]), step
    assert compiled[12]["D1"] < compiled[1]["D1"] - 0.3, "it learns"


@needs_gpu
def test_a_run_that_was_stopped_on_a_gpu_goes_on(monkeypatch):
    train.main([*map(str, ON_GPU), "--out", "whole", "--no-compile"])
    monkeypatch.setattr(train, "update", signalling(signal.SIGTERM, at=13))
    with pytest.raises(KeyboardInterrupt):
        train.main([*map(str, ON_GPU), "--out", "cut", "--no-compile"])
    train.main(["--resume", "--out", "cut", "--device", "cuda", "--no-compile"])
    a, b = losses("cut/dense.jsonl"), losses("whole/dense.jsonl")
    assert a.keys() == b.keys()
    for step in b:
        assert all(abs(a[step][name] - b[step][name]) < 1e-2 for name in b[step]), step


@needs_gpu
def test_few_cpu_threads_beside_a_gpu(monkeypatch):
    before = torch.get_num_threads()
    for given, expected in ((None, 4), ("7", before)):
        torch.set_num_threads(before)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        train.resolve_device(SimpleNamespace(device="cuda", dtype=None))
        assert torch.get_num_threads() == expected
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one():
    train.main([*map(str, ON_GPU), "--out", "one"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "train.py", *ON_GPU]
    done = subprocess.run([*map(str, command), "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a, b = losses("one/dense.jsonl"), losses("two/dense.jsonl")
    for step in a:
        assert all(abs(a[step][name] - b[step][name]) < 2e-2 for name in a[step]), step
