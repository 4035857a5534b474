"""Training, adaptation, data and flags: each promise that changes a number or a file has a test."""
import argparse
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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
TINY = ("--n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --eval-windows 4 "
        "--log-interval 1 --steps 6 --optimizer adamw --device cpu").split()
EOT = 49                                                        # of the ids that tests train on
IDS = ["--data", "bins", "--tokenizer", "ids", "--eot", EOT]
SHAPE = RATConfig(64, 1, 2, 16)
GPT2 = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"),
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="no GPT-2 in TIKTOKEN_CACHE_DIR")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """An empty folder to work in. Afterwards signals do again what they did."""
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    before = [(number, signal.getsignal(number)) for number in numbers]
    yield
    for each in before:
        signal.signal(*each)


def texts(contents, folder="text"):
    """Write files: {name: text or bytes}."""
    for name, text in contents.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def forty(folder="text", start=0):
    for i in range(start, start + 40):
        texts({f"{i}.txt": "".join(f"{i} + {j} = {i + j}\n" for j in range(20))}, folder)


def bins(tokens=None, val=None, folder="bins", mask=None):
    """Write train.bin and val.bin, and return the tokens. By default 15 windows of 16 ids, of which
    every fifth ends a text, so that parts of a batch have unequal numbers of targets.
    """
    if tokens is None:
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, EOT, 15 * 16)
        tokens[rng.random(len(tokens)) < 0.2] = EOT
    os.makedirs(folder, exist_ok=True)
    for name, each in (("train", tokens), ("val", tokens if val is None else val)):
        np.asarray(each, "<u2").tofile(f"{folder}/{name}.bin")
        if mask is not None:
            np.asarray(mask, np.uint8).tofile(f"{folder}/{name}.mask.bin")
    return np.asarray(tokens)


def call(main, *args):
    first = TINY if main is train.main else ["--device", "cpu"]
    main([*first, *map(str, args)])


def pretrain(*args):
    """train.main on `bins`, which it writes if need be."""
    if not os.path.exists("bins"):
        bins()
    call(train.main, *IDS, *args)


@pytest.fixture
def dense():
    """out/dense.pt, of two steps."""
    pretrain("--steps", 2)
    return Path("out/dense.pt")


def settings(*args, **given):
    """A config as main makes it, of typed flags and of values that no flag has."""
    config = train.train_flags().parse_args([*TINY, "--dtype", "float32", *map(str, args)])
    train.check(config)
    vars(config).update({"vocab_size": 64, **given})
    return config


def windows_of(*flags):
    return train.load_data(settings(*flags, vocab_size=None))[0]


def settle(*args):
    return train.settle(["--device", "cpu", *map(str, args)])[0]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return RATPlus(SHAPE)


def refused(main, *args, why):
    """The call raises what `run` prints as one line, and changes no checkpoint."""
    before = {path: path.read_bytes() for path in Path(".").rglob("*.pt")}
    with pytest.raises((ValueError, OSError)) as error:
        call(main, *args)
    assert why in str(error.value), error.value
    assert before == {path: path.read_bytes() for path in Path(".").rglob("*.pt")}


def lines(path="out/dense.jsonl", having="losses"):
    """The records of a log that hold a value of this name."""
    found = map(json.loads, Path(path).read_text().splitlines())
    return [line for line in found if having in line]


def losses(path="out/dense.jsonl"):
    return {line["step"]: line["losses"] for line in lines(path)}


def weights(source="out/dense.pt"):
    model = source if isinstance(source, RATPlus) else load_checkpoint(source)[0]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def meta_of(path="out/dense.pt"):
    return load_checkpoint(path)[1]


def error_of(a, b):
    return ((a - b).norm() / b.norm()).item()


def stopped(step, act, main, *args, updates=train.updates):
    """Call a main, and `act` before a step (from 0), which ends it. Returns what the main says."""
    def patched(now, *rest):
        if now == step:
            act()
        return updates(now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "updates", patched)
        with pytest.raises((SystemExit, KeyboardInterrupt)) as error:
            main(*args)
    return str(error.value)


# ---- Whole runs against the same runs written out ------------------------------------------------

def batches_by_hand(tokens, config, T=16, B=4):
    """idx, targets of each step. The last token has no target."""
    padded = np.append(tokens, -100).astype(np.int64)
    starts = range(0, len(tokens) - T + 1, T)
    rows = np.stack([padded[start:start + T + 1] for start in starts])
    order = []
    for epoch in range(9):
        order.extend(np.random.default_rng((config.seed, epoch)).permutation(len(rows)))
    for step in range(config.steps):
        batch = torch.tensor(rows[order[step * B:(step + 1) * B]])
        idx = batch[:, :-1]
        yield idx, batch[:, 1:].masked_fill(idx == EOT, -100)


def by_hand(model, tokens, config, updates, lrs):
    """(weights, losses, norms) of a run. updates: the patterns of each step, in order."""
    decay = {"weight_decay": config.weight_decay}
    adamw = {"betas": (0.9, 0.95), "fused": True, **decay}
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    stacked = [block.mix.in_proj.weight for block in model.blocks]      # of o, q, k, v, g
    parts = [part for p in stacked for part in p.detach().split(model.config.n_embd)]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.AdamW([model.embed.weight, *rest], **adamw)]
    if config.optimizer == "muon":
        decay["adjust_lr_fn"] = "match_rms_adamw"
        single = [p for p in matrices if len(p) != len(stacked[0])]
        optimizers.append(torch.optim.Muon([*single, *parts], **decay))
    else:
        optimizers.append(torch.optim.AdamW(matrices, **adamw))
    found = []
    for (idx, targets), patterns, lr in zip(batches_by_hand(tokens, config), updates, lrs):
        for pattern in patterns:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = model.loss(idx, targets, pattern)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or 1e9)
            gradients = torch.cat([p.grad for p in stacked])
            for part, gradient in zip(parts, gradients.split(model.config.n_embd)):
                part.grad = gradient
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                with mock.patch("torch.Tensor.bfloat16", torch.Tensor.clone):     # float32
                    optimizer.step()
            found.append((loss.item(), norm.item()))
    return weights(model), *zip(*found)


def cosine(high, low, steps):
    turns = [math.pi * i / (steps - 1) for i in range(steps)]
    return [low + (high - low) * (1 + math.cos(turn)) / 2 for turn in turns]


def validation_by_hand(model, pattern, tokens):
    """Mean loss over all targets, those after end-of-text too, of 4 windows spread evenly."""
    places = np.lib.stride_tricks.sliding_window_view(tokens, 17)
    rows = torch.tensor(places[np.linspace(0, len(places) - 1, 4).astype(int)])
    with torch.no_grad():
        logits = model(rows[:, :-1], pattern)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@pytest.mark.parametrize("flags", [
    "--clip 0.3", "--clip 0", "--weight-decay 0.9", "--dtype bfloat16", "--optimizer muon",
    "--optimizer muon --weight-decay 0.9", "--seed 3", "--grad-accum 4", "--checkpointing",
    "--one-update --seed 1", "--arl none", "--eval-batch 3"])
def test_pretraining_is_the_loop_written_out(flags):
    """A sparse update, then a dense one, on windows that are shuffled anew each epoch; no loss
    after end-of-text; a rate that rises and falls; the norm is that before clipping.
    """
    tokens = bins()
    shared = ["--arl", "D8", "--lr", 0.01, "--min-lr", 0.001, "--warmup", 0.34, *flags.split()]
    pretrain(*shared)
    config = settings(*shared)
    lrs = [0.005, 0.01, *cosine(0.01, 0.001, 4)]
    patterns = ["D1"] if "none" in flags else ["D8", "D1"]
    made = [list(step) for step in losses().values()]
    halves = [["D1"]] * 3 + [["D8"]] * 3
    assert sorted(made) == (halves if config.one_update else [patterns] * 6)
    model = tiny_model(config.seed)
    expected, found, norms = by_hand(model, tokens, config, made, lrs)
    said = [loss for step in losses().values() for loss in step.values()]
    assert said == pytest.approx(found, abs=1e-6)
    assert lines()[-1]["norm"] == pytest.approx(norms[-1], rel=1e-3)
    assert [line["lr"] for line in lines()] == pytest.approx(lrs)
    assert error_of(weights(), expected) < 1e-5
    vals = {name: validation_by_hand(model, name, tokens) for name in patterns}
    assert meta_of()["val"] == pytest.approx(vals, abs=1e-4 if config.dtype == "float32" else 0.1)


def test_adaptation_is_the_loop_written_out_and_prints_its_table(capsys):
    """Each pattern alone from the dense weights, with AdamW."""
    tokens = bins()
    pretrain("--lr", 0.05, "--arl", "D4", "--optimizer", "muon", "--one-update")
    call(adapt.main, "--pattern", "D4", "D8", "--steps", 5, "--seed", 3, "--lr", 0.005)
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0] == "| pattern | dense loss | sparse before | sparse after |" and len(table) == 4
    config = settings("--steps", 5, "--seed", 3)
    for pattern, row in zip(("D4", "D8"), table[2:]):
        start = load_checkpoint("out/dense.pt")[0]
        vals = [validation_by_hand(start, name, tokens) for name in ("D1", pattern)]
        lrs = cosine(0.005, 1e-6, 5)
        expected, found, _ = by_hand(start, tokens, config, [[pattern]] * 5, lrs)
        assert error_of(weights(f"out/{pattern}.pt"), expected) < 1e-5
        log = f"out/{pattern}.jsonl"
        assert [step[pattern] for step in losses(log).values()] == pytest.approx(found, abs=1e-5)
        vals.append(validation_by_hand(start, pattern, tokens))
        last = lines(log, "after")[0]
        assert [last["dense"], last["before"], last["after"]] == pytest.approx(vals, abs=1e-5)
        assert row == f"| {pattern} | {vals[0]:.4f} | {vals[1]:.4f} | {vals[2]:.4f} |"
    meta = meta_of("out/D8.pt")
    assert (meta["pattern"], meta["step"], meta["val"]) == ("D8", 5, {"D8": last["after"]})
    assert meta["parent"] == train.fingerprint(load_checkpoint("out/dense.pt")[0])
    assert meta["train"] == meta_of()["train"], "how the parent was pretrained"
    refused(adapt.main, "--checkpoint", "out/D8.pt", why="was trained for D8, not densely")


# ---- The loop, and what is printed or recorded of it ---------------------------------------------

@pytest.mark.parametrize("flag, expected", [
    ("--no-one-update", {"D2 D1": 200, "D4 D1": 200}),
    ("--one-update", {"D1": 200, "D2": 100, "D4": 100})])
def test_the_updates_of_a_step_follow_from_the_seed_and_the_step(flag, expected):
    arl = [Pattern.parse(name) for name in ("D2", "D4")]
    made = []
    for config in (settings(flag), settings(flag), settings(flag, "--seed", 1)):
        each = [train.updates(step, config, Pattern.parse("D1"), arl) for step in range(400)]
        made.append([" ".join(map(str, patterns)) for patterns in each])
    assert made[0] == made[1] != made[2]
    assert set(made[0]) == set(expected)
    for name, n in expected.items():
        assert abs(made[0].count(name) - n) < 50


def random_batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(64, (2, 4, 16), generator=generator).unbind()


DENSE_AND_D4 = Pattern.parse("D1"), [Pattern.parse("D4")]


def small_fit(*flags, batch, first=0):
    """(model, records of a short run of `fit`)."""
    config = settings(*flags)
    model = tiny_model()
    optimizers = train.new_optimizers(model, config)
    return model, train.fit(model, config, batch, optimizers, *DENSE_AND_D4, first)


def test_a_record_measures_the_steps_since_the_last_one(monkeypatch):
    """Step s takes s + 1 seconds. What is done between two steps, as validation, does not count."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(train, "peak_flops", lambda config: 1e9)

    def batch(step):
        clock.now += step + 1
        return random_batch(step)

    flags = ("--steps", 11, "--log-interval", 4, "--eval-interval", 10)
    model, training = small_fit(*flags, batch=batch, first=2)
    flops = sum(train.flops_per_token(model, Pattern.parse(name), 16) for name in ("D4", "D1"))
    expected = {3: 3, 4: 4, 8: 26 / 4, 10: 19 / 2, 11: 11}
    for step, seconds in expected.items():
        record = next(training)
        assert (record["step"], record["ms"]) == (step, 1000 * seconds)
        assert record["rate"] == pytest.approx(4 * 16 / seconds), "tokens per second"
        assert record["eta"] == pytest.approx(seconds * (11 - step) / 60), "minutes"
        assert record["mfu"] == pytest.approx(flops * 4 * 16 / seconds / 1e9)
        clock.now += 1000
    assert list(training) == []


def test_what_is_not_finite_is_found_before_a_save():
    """The weights are lost in step 3, where nobody looks. The next record must not come."""
    def batch(step):
        if step == 2:
            model.norm.weight.data[0] = math.nan
        return random_batch(step)

    flags = ("--steps", 9, "--log-interval", 100, "--eval-interval", 5)
    model, training = small_fit(*flags, batch=batch)
    assert next(training)["step"] == 1
    with pytest.raises(ValueError, match="training stopped at step 5: .*gradient norm nan"):
        next(training)


def test_a_signal_during_the_wait_for_the_device_stops_this_step(monkeypatch):
    """Else its record is printed unsaved; a reader that died of the same Ctrl-C ends the run."""
    signals = []

    class Norm:
        def item(self):
            signals.append(signal.SIGINT)
            return 1.0

    monkeypatch.setattr(train, "update", lambda *args: (torch.tensor(1.0), Norm()))
    config = settings("--steps", 9)
    training = train.fit(tiny_model(), config, random_batch, {}, *DENSE_AND_D4, signals=signals)
    assert [(record["step"], record["stopped"]) for record in training] == [(1, True)]


@pytest.mark.parametrize("device, flags, compiles", [
    ("cpu", [], 0), ("cuda", [], 1), ("cuda", ["--no-compile"], 0), ("cpu", ["--compile"], 1)])
def test_compile_is_on_by_default_on_a_gpu_alone(monkeypatch, device, flags, compiles):
    monkeypatch.setattr(train, "on_gpu", lambda config: device == "cuda")
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    compiled = []
    monkeypatch.setattr(RATPlus, "compile", lambda model, **options: compiled.append(model))
    model = tiny_model()
    config = settings(*flags, "--checkpointing")
    assert not [*train.fit(model, config, None, {}, *DENSE_AND_D4, first=config.steps)]
    assert len(compiled) == compiles and model.checkpointing


@pytest.mark.parametrize("recurrence, text", [(1, "D1"), (0, "D4"), (1, "W2,D8")])
def test_flops_are_those_of_the_products_and_the_keys(recurrence, text):
    model = RATPlus(RATConfig(64, 2, 4, 32, recurrence))
    idx = torch.randint(64, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model.loss(idx, idx, "D1").backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    pattern = Pattern.parse(text)
    masks = torch.stack([pattern.mask(24, layer) for layer in (0, 1)])
    expected = products / idx.numel() + 12 * 32 * masks.sum().item() / 24
    assert train.flops_per_token(model, pattern, 24) == pytest.approx(expected)


@pytest.mark.parametrize("name, dtype, peak", [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 4 * 989e12), ("NVIDIA L40", "bfloat16", math.inf),
    ("NVIDIA H200", "float32", math.inf)])
def test_the_peak_is_known_by_the_card_s_name(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(train, "WORLD", 4)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert train.peak_flops(SimpleNamespace(device="cuda:1", dtype=dtype)) == peak


def keys_by_hand(rule, T):
    """Mean number of keys. Of top-k blocks, the first ones are taken for the best."""
    t = torch.arange(T)[:, None]
    p = torch.arange(T)
    mask = rule.allowed(t, p)
    if rule.topk:
        block = p // rule.block
        best = (block < rule.topk - 1) | (block == t // rule.block)
        mask |= best & (p <= t)
    return mask.sum().item() / T


@pytest.mark.parametrize("text", [
    "D1", "D8", "D4W3S2", "W5", "W0", "D1,D8", "D2/W3", "D8/D1,W2S1", "N4K2", "D4N4K3", "N8K9",
    "D2N4K3", "N4K1"])
def test_keys_per_token_are_counted_in_the_masks(text):
    pattern = Pattern.parse(text)
    layers = []
    for layer in range(4):
        layers.append(np.mean([keys_by_hand(rule, 40) for rule in pattern.rules(layer)]))
    found = train.keys_per_token(pattern, RATConfig(64, 4, 4, 32), 40)
    assert found == pytest.approx(np.mean(layers))
    long = Pattern.parse("D16W256S4")
    sampled = train.keys_per_token(long, SHAPE, 3000)
    assert sampled == pytest.approx(keys_by_hand(long.rules(0)[0], 3000), rel=0.01)


def test_lines_say_what_the_records_hold():
    record = dict(step=7, losses={"D64": 3.30214, "D1": 3.21449}, lr=6e-4, norm=0.844, ms=41.4,
                  rate=398_321.0, mfu=0.3849, eta=12.04)
    config = settings("--steps", 5000, "--arl", "D64")
    assert train.log_line(record, config, "D1") == (
        "step 0007/5000 | loss 3.2145 sparse 3.3021 | lr 6.0e-04 | norm 0.84 | 41 ms | "
        "398.3k tok/s | MFU 38% | ETA 12.0 min")
    record.update(losses={"D16": 1.5}, mfu=0.0)
    assert "5000 | loss 1.5000 | lr" in train.log_line(record, config, "D16")
    assert "5000 | sparse 1.5000 | lr" in train.log_line(record, config, "D1")


def test_a_run_says_what_it_trains_on_and_what_a_validation_finds(capsys):
    bins(np.full(123_400, 97), [97] * 45_600)
    call(train.main, "--data", "bins", "--tokenizer", "bytes", "--arl", "D64", "--eval-batch", 4)
    out = capsys.readouterr().out
    assert "\n0.000384M tokens to train on, 0.044 a parameter, of 0.123M; 0.0456M for " \
           "validation\n" in out
    val = meta_of()["val"]
    assert out.endswith(f"\nstep 0006 | val D1 {val['D1']:.4f} D64 {val['D64']:.4f} | "
                        f"{val['D1'] / math.log(2):.4f} bits per byte | saved out/dense.pt\n")


# ---- Data: batches, .bin files, texts, tokenizers ------------------------------------------------

def test_windows_lie_side_by_side_and_each_is_read_once_an_epoch():
    """8 + 5 windows of 8, in two files. Batches of 4 cross the ends of epochs."""
    bins(range(70), folder="a")
    bins(range(70, 110), folder="b")
    flags = ("--data", "a", "b", "--tokenizer", "ids", "--context", 8)
    windows = windows_of(*flags)
    batches = [windows.batch(step) for step in range(13)]
    rows = torch.cat([idx for idx, _ in batches])
    starts = rows[:, 0].tolist()
    epochs = [starts[i:i + 13] for i in range(0, 52, 13)]
    places = [*range(0, 64, 8), *range(70, 110, 8)]
    assert all(sorted(epoch) == places for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4, "in an order of its own"
    targets = torch.cat([targets for _, targets in batches])
    assert rows.equal(rows[:, :1] + torch.arange(8))
    assert targets.equal((rows + 1).masked_fill(rows == 109, -100)), "of the same file"
    again = windows_of(*flags, "--steps", 999)
    for step in (9, 2):
        assert all(map(torch.equal, again.batch(step), batches[step])), "by seed and step alone"
    assert windows_of(*flags, "--batch-size", 30).batch(0)[0].equal(rows[:30]), "several epochs"


def test_only_targets_that_a_mask_names_count():
    """In training and in validation, those of the last sample too, which ends with the file."""
    tokens = bins()
    mask = np.random.default_rng(0).integers(0, 3, len(tokens))
    bins(mask=mask)
    pretrain("--steps", 1, "--lr", 1e-12, "--min-lr", 0, "--eval-windows", 15, "--arl", "none",
             "--batch-size", 15, "--eval-batch", 4)
    model, meta = load_checkpoint("out/dense.pt")
    x = torch.tensor(tokens).view(15, 16)
    y = torch.tensor(np.append(np.where(mask == 1, tokens, -100)[1:], -100)).view(15, 16)
    assert (y[-1] >= 0).any()
    logits = model(x).flatten(0, 1)
    assert meta["val"]["D1"] == pytest.approx(F.cross_entropy(logits, y.flatten()).item(), abs=1e-5)
    y = y.masked_fill(x == EOT, -100).flatten()
    assert losses()[1]["D1"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-5)
    bins(mask=mask[1:])
    refused(train.main, *IDS, why="train.mask.bin: a byte for each of the 240 tokens is wanted")
    bins(mask=0 * mask)
    refused(train.main, *IDS, why="no target counts in its 240 tokens")


@pytest.mark.parametrize("flags, expected, n_bytes", [
    ("", ("gpt2", 50256, 50304), 2), ("--tokenizer ids", ("ids", -1, 320), 0),
    ("--tokenizer ids --eot 99", ("ids", 99, 320), 0),
    ("--tokenizer bytes", ("bytes", 256, 320), 2 / 3)])
def test_bins_are_gpt2_s_unless_a_flag_says_what_they_are(monkeypatch, flags, expected, n_bytes):
    """And that text's bytes are those of a token of the targets."""
    vocabulary = SimpleNamespace(decode_single_token_bytes=lambda token: b"ab")
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: vocabulary)
    bins([97, 97, 256] * 30)
    config = settings("--data", "bins", "--context", 30, *flags.split(), vocab_size=None)
    train_windows, val_windows = train.load_data(config)
    assert (config.tokenizer, train_windows.coder.eot, config.vocab_size) == expected
    assert train.bytes_per_token(val_windows) == pytest.approx(n_bytes)
    assert train.bits_per_byte(3 * math.log(2), 1.5) == pytest.approx(2)


def llmc(n, *header):
    words = np.zeros(256, "<i4")
    words[:3] = header
    return words.tobytes() + (np.arange(n) % 60).astype("<u2").tobytes()


@pytest.mark.parametrize("raw, why", [
    (llmc(500, 20240520, 1, 500), ""),
    (np.array([0, 1, 2, 3] * 50, "<u2").tobytes(), ""),
    (llmc(499, 20240520, 1, 500), "magic number, version and tokens says: [20240520, 1, 500]"),
    (llmc(500, 20240520, 2, 500), "[20240520, 2, 500]"),
    (llmc(500, 20240801, 7, 500), "[20240801, 7, 500]"),
    ((np.arange(500) % 99).astype("<u4").tobytes(), "looks like numbers of 32 bits"),
    ((np.arange(500) * 200).astype("<u4").tobytes(), "looks like numbers of 32 bits"),
    (np.random.default_rng(0).integers(0, 90, 2000, np.uint8).tobytes(), "looks like"),
    ("Il était une fois ".encode() * 20, "or text: b'Il"),
    (b"\1\0" * 500 + b"\1", "1001 bytes, empty, an odd number"),
    (b"", "0 bytes, empty"),
    (b"\5\0\0\xff\7\1\x90\0" * 40, "token 65280 is beyond the vocabulary of 64"),
    (b"\1\0" * 15, "15 tokens: more than the --context of 16 are needed")])
def test_files_that_are_not_nanogpt_s_or_llm_c_s_are_refused_by_what_is_seen(raw, why):
    bins([3, 7, 1] * 30)
    flags = [*IDS, "--vocab-size", 64, "--overwrite"]
    Path("bins/train.bin").write_bytes(raw)
    if why:
        refused(train.main, *flags, why=why)
        refused(train.main, *flags, why="bins/train.bin")
    else:
        tokens = np.frombuffer(raw, "<u2")[512 if len(raw) > 1024 else 0:]
        windows = windows_of(*IDS)
        assert windows.n_tokens == len(tokens)
        assert windows.cut([0])[0].tolist() == [tokens[:16].tolist()]


def test_the_key_of_data_tells_them_from_others():
    tokens = np.arange(20_000, dtype="<u2")
    keys = {train.data_key([(tokens, None)]), train.data_key([(tokens, None), (tokens, None)])}
    for place in (0, 10_000, 19_999):
        tokens[place] += 1
        keys.add(train.data_key([(tokens, None)]))
    assert len(keys) == 5


def split(source="text", **given):
    """The documents on both sides of a tokenized source."""
    folder = train.tokenize([source], "bytes", **given)
    sides = []
    for name in ("train", "val"):
        *documents, rest = Path(folder, f"{name}.bin").read_bytes().split(b"\0\1")      # 256
        assert rest == b""
        sides.append([document[::2].decode() for document in documents])
    return sides


def test_of_many_texts_one_in_20_is_for_validation_by_its_name_alone():
    names = [f"{i % 7}/{i}.txt" for i in range(300)]
    chosen = {n for n in names if int(hashlib.md5(n.encode()).hexdigest(), 16) % 20 == 0}
    texts({name: name for name in names})
    sides = split()
    assert set(sides[1]) == chosen and set(sides[0]) == {*names} - chosen
    assert len(sides[0] + sides[1]) == 300, "each once"
    assert sides[0] != sorted(sides[0]), "in the order of the hashes"


def test_what_is_no_text_is_left_out(capsys):
    """And the files of runs. Links are followed, and each file counts once."""
    forty()
    forty("elsewhere", start=40)
    texts({".hidden": "no", ".git/x": "no", "out/dense.pt": "weights", "out/dense.jsonl": "a log",
           "b.png": b"\x89PNG\r\n\0\0", "latin.txt": b"caf\xe9 " * 50, "empty.txt": "",
           "wide.txt": "wide".encode("utf-16"), os.fsdecode(b"caf\xe9.txt"): "coffee " * 30})
    for link, to in (("books", "../elsewhere"), ("a.txt", "1.txt"), ("b", "."),
                     ("c", "nowhere")):
        os.symlink(to, f"text/{link}")
    os.mkfifo("text/pipe.txt")                                  # reading it would wait for ever
    assert [len(side) for side in split()] == [81, 81]
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and "tokenizing 85 texts" in err
    assert "tokenized: 82/85 texts are UTF-8, split into 162 documents" in err
    texts({"a.txt": b"\0" * 100}, "zeros")
    refused(train.main, "--data", "zeros", why="of 1 files 0 are UTF-8 text, too few")


def test_of_few_texts_each_one_s_last_20th_is_for_validation():
    """One has a byte order mark, \\r\\n, and is larger than the piece size."""
    forty()
    long = "".join(f"line {i} €\r\n" for i in range(150_000))
    whole = {path.read_text() for path in Path("text").iterdir()} | {long}
    texts({"long.txt": b"\xef\xbb\xbf" + long.encode()})
    sides = split()
    for a, b in zip(*sides, strict=True):
        whole.remove(a + b)
        assert 0.04 < len(b) / len(a + b) < 0.08
    assert not whole
    assert len(long) > 2**21


def test_split_on_makes_documents_of_one_file(capsys):
    stories = [f"Story {i} went on and on. " * 9 for i in range(50)]
    texts({"tales.txt": "<|endoftext|>".join(stories)})
    first, second = split("text/tales.txt", split_on="<|endoftext|>")
    assert first[:-1] + [first[-1] + second[0]] + second[1:] == stories
    assert "1/1 texts are UTF-8, split into 51 documents" in capsys.readouterr().err


def test_texts_are_tokenized_again_when_their_content_changes(capsys):
    """Of the same size and time, as `cp -p` leaves it."""
    forty()
    before = split()
    capsys.readouterr()
    assert split() == before and capsys.readouterr().err == ""
    path = Path("text/7.txt")
    times = os.stat(path)
    path.write_text(path.read_text().replace("7 + 0", "8 + 9"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert split() != before and "40/40 texts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_a_tokenizer_gives_back_its_text(name):
    """Cut into pieces; the text of a special token is text; long runs are no trouble."""
    text = "def f(x): return 'naïve 漢字 🙂'\n\n  it's  two   spaces,\tand <|endoftext|> \n" * 9
    coder = train.Tokenizer(name)
    for text, size in ((text, 7), (" " * 1_000_000 + "x", 2**20)):
        with open("tokens", "wb") as file:
            coder.write(text, file, size)
        *tokens, eot = np.fromfile("tokens", "<u2").tolist()
        assert "".join(map(coder.decode, tokens)) == text
        assert eot == coder.eot not in tokens
    assert coder.decode(eot) == "<|endoftext|>" and coder.decode(eot + 9) == ""
    assert list(coder.encode("Hi")) == {"bytes": [72, 105], "gpt2": [17250]}[name]


# ---- Saving, resuming, stopping ------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--optimizer muon", "--one-update --arl D2 D4"])
def test_a_killed_run_goes_on_to_the_bit(capsys, flags):
    """Saved at step 8, killed after step 10, moved with its data."""
    run = [*flags.split(), "--steps", 12, "--eval-interval", 4, "--lr", 0.01]
    pretrain(*run, "--out", "whole")
    stopped(10, sys.exit, pretrain, *run)
    assert meta_of()["step"] == 8 and max(losses()) == 10
    os.rename("out", "moved")
    os.rename("bins", "elsewhere")
    resumed = [*flags.split(), "--resume", "--out", "moved", "--steps", 12]
    call(train.main, *resumed, "--data", "elsewhere")
    assert weights("moved/dense.pt").equal(weights("whole/dense.pt"))
    said = [line["step"] for line in lines("moved/dense.jsonl")]
    assert said == [*range(1, 11), *range(9, 13)], "the log keeps all; the last of a step counts"
    assert losses("moved/dense.jsonl") == losses("whole/dense.jsonl")
    vals = [line["val"] for line in lines("whole/dense.jsonl", "val")]
    assert [line["val"] for line in lines("moved/dense.jsonl", "val")] == vals
    assert meta_of("moved/dense.pt")["val"] == vals[-1]
    call(train.main, *resumed)
    assert "has changed" not in capsys.readouterr().err


def test_weights_are_saved_before_their_validation(monkeypatch):
    """A validation that is killed, or runs out of memory, loses no step."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "evaluate", lambda *args: 1 / 0)
        pretrain("--eval-interval", 4)
    assert meta_of()["step"] == 4 and meta_of()["val"] == {}
    call(train.main, "--resume")
    assert meta_of()["step"] == 6 and set(meta_of()["val"]) == {"D1", "D64"}


def test_a_full_disk_keeps_the_last_checkpoint(dense, monkeypatch):
    """And one that knows no fsync a new one."""
    monkeypatch.setattr(os, "fsync", no_space)
    call(train.main, "--resume", "--steps", 3)
    assert meta_of()["step"] == 3
    monkeypatch.setattr(torch, "save", lambda data, file: no_space(file.write(b"half of it")))
    refused(train.main, "--resume", "--steps", 4, why="is not saved, an older one is as it was")
    assert sorted(os.listdir("out")) == ["dense.jsonl", "dense.pt"]


CALL = {"help", "out", "resume", "overwrite"}
FREE = {"steps", "log_interval", "eval_interval", "eval_batch", "grad_accum", "checkpointing",
        "device", "compile"}
OTHERS = {"data": "other", "checkpoint": "whole/dense.pt", "split_on": "x", "device": "cpu"}


def another(flag, value):
    """What to type to give a flag another value than this one."""
    name = flag.option_strings[0]
    if isinstance(flag, argparse.BooleanOptionalAction):
        return [flag.option_strings[value is not False]]        # --flag, --no-flag
    if flag.choices:
        return [name, next(choice for choice in flag.choices if choice != value)]
    if flag.type in (int, float):
        return [name, str(2 * (value or 1))]
    return [name, OTHERS.get(flag.dest, "D8")]                  # --arl, --pattern


@pytest.mark.parametrize("flag", [flag for flag in train.train_flags()._actions
                                  if flag.dest not in CALL], ids=lambda flag: flag.dest)
def test_resume_refuses_another_value_of_any_flag_that_changes_the_result(flag):
    """And heeds the others, and the same data elsewhere."""
    stopped(4, sys.exit, pretrain, "--eval-interval", 3)
    kept = meta_of()["train"]
    typed = ["--resume", "--device", "cpu", *another(flag, kept.get(flag.dest))]
    bins(bins() if flag.dest in FREE else bins()[::-1], folder="other")
    if flag.dest in FREE - {"data"}:
        train.main(typed)
        pretrain("--out", "whole")
        assert max(losses()) == (12 if flag.dest == "steps" else 6)
        assert flag.dest == "steps" or error_of(weights(), weights("whole/dense.pt")) < 1e-4
        assert flag.type is not int or meta_of()["train"][flag.dest] == int(typed[-1])
        return
    with pytest.raises((ValueError, OSError)) as error:
        train.main(typed)
    named = {"data": "--data 480 tokens", "pattern": "out/D8.pt", "tokenizer": "--eot 49"}
    assert named.get(flag.dest, f"{flag.option_strings[0]} ") in str(error.value), error.value
    assert meta_of()["train"] == kept


def test_a_new_run_renames_the_files_of_the_old_one(dense):
    """A second run in the same folder is refused before the first one has saved anything."""
    before = dense.read_bytes()
    log = Path("out/dense.jsonl").read_text()
    refused(train.main, *IDS, why="--resume goes on with it, --overwrite starts anew")
    refused(train.main, *IDS, "--overwrite", "--data", "nowhere", why="nowhere")
    stopped(0, sys.exit, pretrain, "--overwrite")
    assert not dense.exists() and Path("out/dense.pt.old").read_bytes() == before
    assert Path("out/dense.jsonl.old").read_text() == log and not losses()
    refused(train.main, "--resume", why="out/dense.pt")
    refused(train.main, *IDS, why="out/dense.jsonl exists")


@pytest.mark.parametrize("read", [True, False])
def test_a_signal_to_the_script_saves_and_says_how_to_go_on(read):
    bins()
    never = 1_000_000
    flags = [*IDS, "--steps", never, "--eval-interval", never, "--log-interval", never]
    command = [sys.executable, ROOT / "train.py", *TINY, *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while not process.stdout.readline().startswith("step 0001"):
            assert process.poll() is None
        if not read:                                            # Ctrl-C has ended `| tee` too
            process.stdout.close()
        process.send_signal(signal.SIGTERM)
        err = process.stderr.read()
    step = meta_of()["step"]
    assert process.returncode == (130 if read else -signal.SIGPIPE)
    told = (f"train.py: interrupted; step {step} is saved in out/dense.pt, --out out "
            "--pattern D1 --resume goes on\n")
    assert err == told * read
    call(train.main, "--resume", "--steps", step + 1)
    assert meta_of()["step"] == step + 1 == max(losses())


# ---- What is inherited: presets, fine-tuning, adaptation -----------------------------------------

@pytest.mark.parametrize("preset, expected", [
    ("laptop", "4 4 128 | 256 8 1 200 250 muon 0.024"),
    ("small", "8 8 512 | 2048 32 1 1000 250 muon 0.012"),
    ("base", "12 12 768 | 4096 128 16 5000 250 muon 0.012"),
    ("paper-1.5b", "24 16 2048 | 4096 512 128 47684 250 adamw 0.0008"),
    ("paper-2.6b", "28 20 2560 | 4096 512 256 47684 250 adamw 0.0008"),
    ("paper-7.6b", "32 32 4096 | 4096 512 512 47684 250 adamw 0.0002")])
def test_presets_are_shapes_and_recipes(preset, expected):
    c = settle("--preset", preset)
    assert expected == (
        f"{c.n_layer} {c.n_head} {c.n_embd} | {c.context} {c.batch_size} {c.grad_accum} {c.steps} "
        f"{c.eval_interval} {c.optimizer} {c.lr}")
    assert (c.min_lr, c.warmup, c.weight_decay, c.clip, c.arl) == (1e-6, 0.05, 0.1, 1.0, ["D64"])
    assert settle().preset == "laptop" and settle("--preset", preset, "--lr", 0.5).lr == 0.5
    for flag in ("--no-recurrence", "--pattern=D8", "--arl=none"):
        assert settle("--preset", preset, flag).arl == ["none"]


def test_the_pattern_of_the_main_update_names_the_checkpoint(capsys):
    pretrain("--pattern", "D8,D2/W1", "--arl", "D4", "--steps", 3, "--n-layer", 2)
    meta = meta_of("out/D8+D2_W1.pt")
    assert meta["pattern"] == "D8,D2/W1" and list(meta["val"]) == ["D8,D2/W1", "D4"]
    sparse, main = losses("out/D8+D2_W1.jsonl")[1].items()
    assert (sparse[0], main[0]) == ("D4", "D8,D2/W1") and not os.path.exists("out/dense.pt")
    assert settle("--checkpoint", "out/D8+D2_W1.pt", "--pattern", "D1").arl == ["D64"]
    assert f"| loss {main[1]:.4f} sparse {sparse[1]:.4f} |" in capsys.readouterr().out


def rewrite(path, **changes):
    """Change the flags that a checkpoint keeps."""
    model, meta = load_checkpoint(path)
    meta["train"].update(changes)
    save_checkpoint(path, model, **meta)


def test_a_checkpoint_keeps_all_flags_as_defaults_of_a_new_run(dense):
    """But for the seed, the dtype and those of a call. Default < preset < checkpoint < typed."""
    kept = meta_of()["train"]
    names = {flag.dest for flag in train.train_flags()._actions} - {"help"}
    assert {*kept} == {*names, "data_key"}
    assert lines(having="config")[0]["config"] == kept
    rewrite(dense, clip=0.7, seed=5, dtype="bfloat16", checkpoint="x", data_key="y", dropout=1,
            out="z", device="cuda", compile=True, resume=True, overwrite=True)
    config = settle("--checkpoint", dense, "--batch-size", 2, "--out", "new")
    changed = dict(clip=0.7, batch_size=2, checkpoint=str(dense), data_key=None, out="new")
    for name, value in kept.items():
        assert getattr(config, name) == changed.get(name, value), name


@pytest.mark.parametrize("source, flags, name, patterns", [
    ("dense", "", "dense", {"D1", "D64"}),
    ("dense", "--pattern D8", "D8", {"D8"}),
    ("D4", "", "D4", {"D4"}),
    ("D4", "--pattern D4", "D4", {"D4"})])
def test_fine_tuning_keeps_the_parent_and_the_pattern(dense, source, flags, name, patterns):
    parent = train.fingerprint(load_checkpoint(dense)[0])
    call(adapt.main, "--pattern", "D4", "--steps", 1)
    start = f"out/{source}.pt"
    call(train.main, "--checkpoint", start, "--out", "one", "--lr", 2e-6, *flags.split())
    assert error_of(weights(f"one/{name}.pt"), weights(start)) < 1e-3
    call(train.main, "--checkpoint", f"one/{name}.pt", "--out", "two", "--steps", 2)
    call(train.main, "--resume", "--pattern", meta_of(f"one/{name}.pt")["pattern"], "--out", "two")
    for folder in ("one", "two"):
        meta = meta_of(f"{folder}/{name}.pt")
        assert meta["parent"] == parent and set(meta["val"]) == patterns and meta["step"] == 6
    assert "parent" not in meta_of(dense)


def test_the_authors_checkpoint_is_adapted_and_fine_tuned():
    bins(np.random.default_rng(0).integers(0, 37, 500))
    data = ["--data", "bins", "--context", 16, "--batch-size", 4, "--checkpoint", GOLDEN]
    call(adapt.main, "--pattern", "D4", "--steps", 2, *data)
    train.main([*map(str, data), "--steps", "1", "--device", "cpu", "--out", "new"])
    model, _ = load_checkpoint(GOLDEN)
    for path, pattern in (("out/D4.pt", "D4"), ("new/dense.pt", "D1")):
        found, meta = load_checkpoint(path)
        assert found.config == model.config and meta["parent"] == train.fingerprint(model)
        assert (meta["pattern"], meta["tokenizer"]) == (pattern, "ids")
    refused(adapt.main, "--checkpoint", GOLDEN, "--pattern", "D8", why="--data is needed")


def test_adaptation_resumes_by_keeping_what_is_done(dense, capsys):
    """In the same way, on the same data, from the same weights. Other data are warned of."""
    bins(bins()[::-1], folder="other")
    call(adapt.main, "--pattern", "D4", "--steps", 2, "--data", "other")
    assert capsys.readouterr().err.count("has changed since the training") == 1
    before = Path("out/D4.pt").read_bytes()
    both = ("--pattern", "D4", "D8", "W0", "--steps", 2, "--data", "other", "--resume")
    refused(adapt.main, *both[:-1], why="out/D4.pt exists: --resume keeps it")
    refused(adapt.main, *both, "--data", "bins", why="--data 480 tokens")
    for flag, value in (("--steps", 3), ("--seed", 1), ("--clip", 9.0), ("--optimizer", "muon")):
        refused(adapt.main, *both, flag, value, why=f"{flag} {value}: out/D4.pt")
    stopped(1, mock.Mock(side_effect=KeyboardInterrupt), call, adapt.main, *both)
    assert os.path.exists("out/D8.jsonl") and not os.path.exists("out/D8.pt")
    call(adapt.main, *both)
    assert Path("out/D4.pt").read_bytes() == before and list(losses("out/D8.jsonl")) == [1, 2]
    call(adapt.main, "--pattern", "D4", "--steps", 3, "--overwrite")
    assert meta_of("out/D4.pt")["step"] == 3 and Path("out/D4.pt.old").read_bytes() == before
    call(train.main, "--pattern", "D2", "--checkpoint", dense)
    refused(adapt.main, "--pattern", "D2", "--resume", why="D2.pt was not adapted from these")
    save_checkpoint(dense, tiny_model(1), **meta_of())
    refused(adapt.main, "--pattern", "D4", "--resume", why="D4.pt was not adapted from these")


@pytest.mark.parametrize("steps, lr, expected", [
    (300, 0.02, (40, 5e-4, 1e-6)), (9000, 1e-3, (90, 1e-4, 1e-6)), (300, 5e-6, (40, 5e-7, 5e-7))])
def test_adaptation_takes_a_hundredth_of_the_steps(dense, steps, lr, expected):
    """And a tenth of the rate. The seed and the dtype are its own."""
    rewrite(dense, steps=steps, lr=lr, seed=3, dtype="bfloat16")
    call(adapt.main, "--pattern", "D4")
    config = SimpleNamespace(**meta_of("out/D4.pt")["adapt"])
    last = train.schedule(config.steps - 1, config)
    assert (config.steps, config.lr, last) == pytest.approx(expected)
    assert (config.seed, config.dtype, config.eot) == (0, "float32", EOT)


def test_a_rate_below_min_lr_does_not_rise():
    config = settings(
        "--lr", 1e-8,
        "--warmup", 0,
    )
    assert train.schedule(0, config) == 1e-8
    assert train.schedule(5, config) == 1e-8


# ---- Bad input, other people's machines, several processes ---------------------------------------

NAMED = ("--steps many; --steps 0; --clip -1; --lr nan; --lr inf; --vocab-size 0; --batch-size 0; "
         "--context -5; --seed -1; --data=; --eval-windows 0; --preset huge; --arl D-1; "
         "--device nonsense; --device meta; --step 3; --nonsense 1; --warmup 5")


@pytest.mark.parametrize("script, args, why", [
    ("train", "--data text --tokenizer ids", "a text needs --tokenizer bytes or gpt2"),
    ("train", "--data text --eot 32", "--eot 32: end-of-text of bytes is 256"),
    ("train", "--data text --context 99999", "more than the --context of 99999 are needed"),
    ("train", "--data text --out file", "file"),
    ("adapt", "--overwrite --resume", "not allowed with"),
    ("train", "--grad-accum 3", "--batch-size 4 does not split into --grad-accum 3 x 1"),
    ("tuned", "--n-embd 32", "--n-embd 32: out/dense.pt has 16"),
    ("tuned", "--no-recurrence", "--recurrence False: out/dense.pt has True"),
    ("tuned", "--preset small", "--preset small: out/dense.pt has laptop"),
    ("tuned", "--checkpoint bare.pt", "does not say what it was trained on: --data is needed"),
    ("adapt", "--pattern D1/D2/D4", "does not fit"),
    ("adapt", "--pattern D4 D1", "would take the place of out/dense.pt"),
    ("adapt", "--pattern D4 --data wide", "token 400 is beyond the vocabulary of 64"),
    ("adapt", "--out empty", "empty/dense.pt"),
    *[("train", args, args.split()[0].strip("=")) for args in NAMED.split("; ")]])
def test_bad_input_is_refused(script, args, why):
    if script != "train":
        pretrain("--steps", 1)
    texts({"a.txt": "a text " * 50})
    Path("file").touch()
    bins([5, 400, 1, 9] * 20, folder="wide")
    save_checkpoint("bare.pt", tiny_model())
    start = ["--checkpoint", "out/dense.pt", "--out", "new"] if script == "tuned" else []
    refused(adapt.main if script == "adapt" else train.main, *start, *args.split(), why=why)


@pytest.mark.parametrize("error, code, why", [
    (ValueError("bad\ninput"), 1, "bad input"),
    (FileNotFoundError(2, "No such file", "x.pt"), 1, "x.pt"),
    (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "can't allocate"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("shapes do not match"), 0, ""),
    (ZeroDivisionError("division by zero"), 0, "")])
def test_what_goes_wrong_is_one_line_and_a_code(error, code, why, capsys):
    """A fault of ours keeps its traceback."""
    def main():
        raise error

    with pytest.raises(SystemExit if code else type(error)) as end:
        train.run(main)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(code) and why in said
    assert end.value is error or end.value.code == code


def no_space(*args):
    raise OSError(28, "No space left on device")


def test_streams_of_other_kinds(monkeypatch):
    """A notebook's, which has no reconfigure; a closed one; one to a full disk."""
    for stream in (SimpleNamespace(write=len, flush=list), None):
        monkeypatch.setattr(sys, "stdout", stream)
        train.run(lambda: print("a table"))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=len, flush=no_space))
    with pytest.raises(SystemExit, match="1"):
        train.run(lambda: print("a table"))


def test_two_processes_train_as_one():
    """Although the parts have unequal numbers of targets and some have none."""
    mask = np.random.default_rng(1).integers(0, 2, 240)
    mask[:100] = 0
    bins(mask=mask)
    flags = ["--arl", "D4", "--clip", 0.1, "--lr", 0.01]
    pretrain(*flags, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               ROOT / "train.py", *TINY, *IDS, *flags, "--out", "two", "--grad-accum", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RAT+ |") == done.stdout.count("| 2 processes") == 1, "one prints"
    for a, b in zip(lines("two/dense.jsonl"), lines("one/dense.jsonl"), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-4)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
    assert error_of(weights("two/dense.pt"), weights("one/dense.pt")) < 1e-3
    val = meta_of("one/dense.pt")["val"]
    assert meta_of("two/dense.pt")["val"] == pytest.approx(val, abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_and_eager_agree_on_a_gpu():
    bins(np.arange(5000) % 40)
    flags = ["--n-layer", 2, "--n-embd", 128, "--context", 128, "--steps", 12, "--lr", 4e-3,
             "--device", "cuda"]
    for out in ("compile", "no-compile"):
        pretrain(*flags, "--arl", "D16", "--out", out, f"--{out}")
    compiled = losses("compile/dense.jsonl")
    for step, found in losses("no-compile/dense.jsonl").items():
        assert compiled[step] == pytest.approx(found, abs=3e-2)
