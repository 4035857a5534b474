"""The four scripts through their command lines, and their bad inputs: one line on stderr, a non-zero exit, nothing lost."""
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import adapt
import eval as evaluation
import sample
import train
from kernels import relative_error
from model import Pattern, RATConfig, RATPlus, load_checkpoint, save_checkpoint
from test_model import GOLDEN, ROOT, Bomb, random_pattern

TINY = "--n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --eval-windows 4 --device cpu".split()
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"), "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")     # GPT-2's
needs_gpt2 = pytest.mark.skipif(not VOCABULARY.exists(), reason="needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")
MODULES = {"train": train, "adapt": adapt, "eval": evaluation, "sample": sample}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A folder of its own with a little text in it: 30 files of sums."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("text")
    for i in range(30):
        Path(f"text/{i}.txt").write_text("".join(f"{i} + {j} = {i + j}\n" for j in range(40)))


def script(name, *args):
    """Run a script as a user does."""
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, args)], capture_output=True, text=True)


def call(name, *args):
    """Run a script's main in this process: faster, and only for calls that end before training."""
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, args)]
    try:
        train.run(MODULES[name].main)
    finally:
        sys.argv = before


def ok(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out):
    """{step: losses} of a run's log."""
    with open(os.path.join(out, "dense.jsonl")) as f:
        return {record["step"]: record["losses"] for record in map(json.loads, f) if "losses" in record}


@pytest.fixture
def trained(tmp_path):
    """out/dense.pt of a model that has learnt nothing, with the meta of a real run."""
    os.mkdir("out")
    torch.manual_seed(0)
    config = {"data": str(tmp_path / "text"), "tokenizer": "bytes", "eot": 256, "context": 16, "batch_size": 4,
              "eval_windows": 4, "steps": 10, "lr": 1e-3, "arl": "D64"}
    save_checkpoint("out/dense.pt", RATPlus(RATConfig(320, 1, 2, 16)), step=10, pattern="D1", tokenizer="bytes", train=config)
    return Path("out/dense.pt")


# ---------------------------------------------------------------------------------------------
# The story, end to end

def test_train_adapt_eval_and_sample(tmp_path):
    out = ok(script("train", *TINY, "--data", "text", "--steps", 40, "--eval-interval", 20, "--arl", "D8", "--lr", "1e-2"))
    assert "RAT+ |" in out and "reference (plain PyTorch) on cpu" in out and torch.__version__ in out and "ETA" in out
    first, last = losses("out")[10], losses("out")[40]
    assert set(first) == {"D8", "D1"} and last["D1"] < first["D1"] - 0.3, "the loss falls"
    model, meta = load_checkpoint("out/dense.pt")
    assert meta["train"]["data"] == str(tmp_path / "text"), "absolute, so that it is found from anywhere"
    assert meta["step"] == 40 and meta["tokenizer"] == "bytes" and meta["train"]["arl"] == "D8" and meta["train"]["seed"] == 0

    out = ok(script("adapt", "--pattern", "D4", "W2S1", "D8/D1", "N4K2", "--score", "minmax", "--steps", 5, "--device", "cpu"))
    assert "| pattern | dense loss | sparse before | sparse after |" in out
    assert sorted(path for path in os.listdir("out") if path.endswith(".pt")) == ["D4.pt", "D8_D1.pt", "N4K2.pt", "W2S1.pt",
                                                                                     "dense.pt"]
    assert load_checkpoint("out/D8_D1.pt")[1]["pattern"] == "D8/D1"

    out = ok(script("eval", "--score", "minmax", "--device", "cpu"))
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in out.splitlines() if line.startswith("| ")]
    rows = {tuple(cells[:2]): cells[2:] for cells in table}
    assert set(rows) >= {("D1", "dense"), ("D4", "switched"), ("D4", "adapted"), ("D8/D1", "adapted"), ("N4K2", "adapted")}
    mask = Pattern.parse("D4").mask(16)
    assert rows["D1", "dense"][0] == "8.5" and rows["D4", "adapted"][0] == f"{mask.sum() / 16:.1f}"
    # 128 bytes are a key and a value, the state, or the two summaries of a block by minmax
    assert rows["D1", "dense"][1] == "136 (100.0%)" and rows["D4", "adapted"][1] == "40 (29.4%)"    # (16 or 4 + 1) * 128 / 16
    assert rows["D1", "dense"][2] == "1088 (100.0%)" and rows["D4", "adapted"][2] == "320 (29.4%)"  # (7.5 or 1.5 + 1) * 128
    keys = np.mean([t % 4 + 1 + 4 * (t >= 4) for t in range(16)])                                   # its own block and one more
    assert rows["N4K2", "adapted"][:2] == [f"{keys:.1f}", "168 (123.5%)"]                           # (16 + 4 + 1) * 128 / 16
    assert rows["N4K2", "adapted"][2].startswith(f"{(keys - 1 + 1.5 + 1) * 128:.0f} ")              # 1.5 blocks are complete
    assert "```mermaid" in out and float(rows["D4", "adapted"][3]) < float(rows["D4", "switched"][3])

    out = script("sample", "--pattern", "D4", "--prompt", "1 + 1", "--tokens", 8, "--device", "cpu")
    assert "1 + 1" in ok(out) and "tok/s" in out.stdout and "prefill 5 tokens" in out.stdout and out.stderr == ""
    out = script("sample", "--pattern", "N4K2", "--score", "minmax", "--tokens", 8, "--device", "cpu")
    assert "out/N4K2.pt with N4K2" in ok(out) and out.stderr == ""
    out = script("sample", "--pattern", "D16", "--tokens", 4, "--device", "cpu")
    assert ok(out) and out.stderr.count("was trained for D1, not for D16") == 1 and out.stderr.count("\n") == 1


def test_compare_puts_runs_side_by_side(trained, capsys):
    os.mkdir("plain")
    _, meta = load_checkpoint(trained)
    save_checkpoint("plain/dense.pt", RATPlus(RATConfig(320, 1, 2, 16, recurrence=False)), **meta)
    call("eval", "--compare", "out", "plain", "--pattern", "D4", "--device", "cpu")
    out = capsys.readouterr().out
    assert "| RAT+ (out): loss |" in out and "| attention-only (plain): loss |" in out and out.count("    line [") == 2


@pytest.mark.parametrize("arl, name", [("D64", "RAT+ (out)"), ("none", "RAT+ without ARL (out)"), ("D1", "RAT+ without ARL (out)")])
def test_eval_names_the_model(trained, capsys, arl, name):
    model, meta = load_checkpoint(trained)
    save_checkpoint(trained, model, **{**meta, "train": {**meta["train"], "arl": arl}})
    call("eval", "--device", "cpu")
    assert f"| {name}: loss |" in capsys.readouterr().out


def test_the_cache_is_counted_in_the_dtype_of_the_run(trained, capsys):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        call("eval", "--device", "cpu", "--dtype", dtype)
        assert f"| D1 | dense | 8.5 | {2 * 16 * width + 2 * 16 * 4 / 16:.0f} (100.0%) |" in capsys.readouterr().out


def test_keys_per_token_counts_the_mask():
    rng, config = random.Random(0), RATConfig(64, 2, 4, 32)
    for _ in range(50):
        T, pattern = rng.randint(1, 60), Pattern.parse(random_pattern(rng))
        masks = [pattern.mask(T, i, j).sum() * (heads.stop - heads.start)
                 for i in range(2) for j, (_, heads) in enumerate(pattern.groups(i, 4))]
        assert abs(pattern.keys_per_token(config, T) - sum(masks) / (T * 8)) < 1e-6, (str(pattern), T)


def test_reach_is_the_half_life_of_the_decays(trained, capsys):
    """That of the quantiles of the decays of a window; a decay of a half has a half-life of one token."""
    model, meta = load_checkpoint(trained)
    in_proj, C, seen = model.blocks[0].mix.in_proj, model.config.n_embd, []

    def found():
        save_checkpoint(trained, model, **meta)
        call("eval", "--device", "cpu", "--reach", "--eval-windows", 1)
        table = capsys.readouterr().out.split("half-life of the decay in tokens")[1]
        return next(line for line in table.splitlines() if line.startswith("| 0 |"))

    with torch.no_grad():
        in_proj.weight[-C:] *= 20
    hook = in_proj.register_forward_hook(lambda module, inputs, output: seen.append(torch.sigmoid(output[..., -C:].double())))
    val = np.fromfile(Path(train.tokenize(meta["train"]["data"], "bytes")) / "val.bin", "<u2")[:16]
    model(torch.from_numpy(val.astype(np.int64))[None])
    hook.remove()
    tenth, median, ninetieth = (math.log(2) / -seen[0].quantile(torch.tensor([0.1, 0.5, 0.9]).double()).log()).tolist()
    values = map(float, re.findall(r"[0-9.]+", found().split(" | ")[-1]))
    for x, y in zip(values, (median, tenth, ninetieth)):
        assert abs(x - y) < 0.05 + 0.05 * y, (x, y)
    with torch.no_grad():
        in_proj.weight[-C:] = 0
    assert found().count("1.0 (1.0 to 1.0)") == model.config.n_head + 1


def test_eval_leaves_out_checkpoints_of_another_parent(trained, capsys):
    _, meta = load_checkpoint(trained)
    save_checkpoint("out/D4.pt", RATPlus(RATConfig(320, 1, 2, 16)), **{**meta, "pattern": "D4", "parent": "00000000"})
    call("eval", "--device", "cpu")
    out = capsys.readouterr().out
    assert "out/D4.pt was adapted from other weights than out/dense.pt: left out" in out and "| D4 | adapted |" not in out


def test_adapt_resumes_by_leaving_what_is_done(trained, capsys):
    call("adapt", "--pattern", "D4", "--steps", 2, "--device", "cpu")
    before = Path("out/D4.pt").read_bytes()
    call("adapt", "--pattern", "D4", "D8", "--steps", 2, "--device", "cpu", "--resume")
    assert Path("out/D4.pt").read_bytes() == before and os.path.exists("out/D8.pt")
    call("adapt", "--pattern", "D4", "--steps", 3, "--device", "cpu", "--overwrite")
    assert load_checkpoint("out/D4.pt")[1]["step"] == 3
    torch.manual_seed(1)
    save_checkpoint(trained, RATPlus(RATConfig(320, 1, 2, 16)), **load_checkpoint(trained)[1])
    capsys.readouterr()
    for again in ([], ["--resume"]):
        refused(capsys, "adapt", "--pattern", "D4", "--steps", 2, "--device", "cpu", *again, why="out/D4.pt exists")


def test_sample_reads_the_authors_checkpoint_as_ids(capsys):
    call("sample", "--checkpoint", GOLDEN / "official_tiny.pth", "--prompt", "1 2 3", "--pattern", "D4", "--tokens", 6,
         "--temperature", 0, "--device", "cpu")
    text = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("1 2 3 "))
    model, _ = load_checkpoint(GOLDEN / "official_tiny.pth")
    assert list(map(int, text.split())) == model.generate(torch.tensor([[1, 2, 3]]), 6, "D4", temperature=0)[0].tolist()


def test_bench_measures_every_pattern_against_dense(capsys):
    patterns, cost = ("D1", "D4", "D4W3/D1", "D4N4K2"), ("--contexts", 8, 20, "--tokens", 2, "--max-batch", 3)
    call("sample", "--bench", "--pattern", *patterns[1:], "--score", "last", *cost, "--device", "cpu")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:3] for row in rows] == [[T, pattern, batch] for T in ("8", "20") for pattern in patterns for batch in "13"]
    assert all(len(row) == 14 and float(row[5]) > 0 and (row[3] == "random") == (row[2] == "3") for row in rows)
    held, read = ([float(row[i]) for row in rows if row[1:3] == ["D4N4K2", "3"]] for i in (7, 8))
    assert all(0 < b < a for a, b in zip(held, read))
    assert [row[6] for row in rows if row[1] == "D1"] == ["1.00x"] * 4


def test_the_authors_checkpoint_is_adapted_and_evaluated(capsys):
    bins(np.random.default_rng(0).integers(0, 37, 500))
    data = ["--data", "bins", "--context", 16, "--device", "cpu"]
    call("adapt", "--checkpoint", GOLDEN / "official_tiny.pth", "--pattern", "D4", "--steps", 3, *data)
    model, meta = load_checkpoint("out/D4.pt")
    assert model.config.vocab_size == 37 and meta["pattern"] == "D4" and meta["tokenizer"] == "ids"
    with pytest.raises(SystemExit, match="--data is needed"):
        call("eval", "--checkpoint", "out/D4.pt", "--device", "cpu")
    call("eval", "--checkpoint", "out/D4.pt", "--pattern", "D4", *data)
    assert "| D4 | adapted |" in capsys.readouterr().out


def test_defaults_train_the_laptop_preset_on_the_standard_library():
    """No arguments: killed by Ctrl-C after the first log line, and the checkpoint is there."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--device", "cpu"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 0010"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "--resume goes on" in err
    model, meta = load_checkpoint("out/dense.pt")
    assert model.config == RATConfig(320, 4, 4, 128) and meta["train"]["data"] == "stdlib" and meta["train"]["arl"] == "D64"
    assert 10 < meta["step"] < 300 and max(losses("out")) == meta["step"]


# ---------------------------------------------------------------------------------------------
# Training

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
report = train.report
def report_and_die(log, text, **record):
    report(log, text, **record)
    if record["step"] == 11:
        os.kill(os.getpid(), signal.SIGKILL)
train.report = report_and_die
train.run(train.main)
"""


def test_resume_is_exact_bit_for_bit():
    flags = [*TINY, "--data", "text", "--steps", "24", "--eval-interval", "8", "--log-interval", "1", "--arl", "D4"]
    ok(script("train", *flags, "--out", "whole"))
    killed = subprocess.run([sys.executable, "-c", KILLED, ROOT, *flags, "--out", "cut"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and load_checkpoint("cut/dense.pt")[1]["step"] == 8
    assert max(losses("cut")) == 11
    with open("cut/dense.jsonl", "a") as f:
        f.write('{"step": 11, "los')                            # a line torn by the kill
    ok(script("train", "--resume", "--out", "cut", "--device", "cpu"))
    assert losses("cut") == losses("whole") and list(losses("whole")) == list(range(1, 25))
    (a, meta_a), (b, meta_b) = load_checkpoint("whole/dense.pt"), load_checkpoint("cut/dense.pt")
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert meta_a["val"] == meta_b["val"] and meta_a["rng"].equal(meta_b["rng"])
    moments = [[z for state in meta["optimizer"]["state"].values() for z in state.values()] for meta in (meta_a, meta_b)]
    assert all(x.equal(y) for x, y in zip(*moments))
    os.rename("cut", "moved")
    again = script("train", "--resume", "--out", "moved", "--device", "cpu", "--steps", 25)
    assert ok(again) and max(losses("moved")) == 25 and not os.path.exists("cut"), "a run may be moved and prolonged"
    again = script("train", "--resume", "--out", "moved", "--device", "cpu")
    assert "is complete: 25 steps" in ok(again)


def test_a_run_is_not_overwritten_by_accident(trained, capsys):
    before = trained.read_bytes()
    with pytest.raises(SystemExit) as stop:
        call("train", *TINY, "--data", "text")
    assert "--resume goes on with it, --overwrite starts anew" in str(stop.value) and trained.read_bytes() == before
    ok(script("train", *TINY, "--data", "text", "--steps", 2, "--overwrite"))
    assert load_checkpoint(trained)[1]["step"] == 2


def test_arl_is_a_sparse_and_a_dense_update_on_the_same_batch():
    """One step of `fit` equals two AdamW steps written out."""
    torch.manual_seed(0)
    config = train.TrainConfig(steps=3, warmup=0.0, clip=0.01, device="cpu", compile=False)
    model, twin = RATPlus(RATConfig(64, 1, 2, 16)), RATPlus(RATConfig(64, 1, 2, 16))
    twin.load_state_dict(model.state_dict())

    def batch(step):
        return torch.randint(64, (2, 4, 20), generator=torch.Generator().manual_seed(step)).unbind()

    passes = [train.Pattern.parse(pattern) for pattern in ("D8", "D1")]
    list(train.fit(model, config, passes, batch, train.new_optimizer(model, config)))
    optimizer = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = train.schedule(step, config)
        for pattern in ("D8", "D1"):
            optimizer.zero_grad()
            twin.loss(*batch(step), pattern).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert relative_error(p, q) < 1e-6, f"{name}: {relative_error(p, q):.1e}"


def test_gradient_accumulation_changes_nothing():
    torch.manual_seed(0)
    model, idx, targets = RATPlus(RATConfig(64, 1, 2, 16)), torch.randint(64, (4, 20)), torch.randint(64, (4, 20))
    targets[0, :15] = -100                                      # parts with unequal numbers of targets
    grads, results = [], []
    for parts in (1, 2, 4):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad = lambda set_to_none: None          # keep the gradients to look at
        for p in model.parameters():
            p.grad = None
        config = train.TrainConfig(batch_size=4, grad_accum=parts, device="cpu")
        results.append(train.update(train.Loss(model, config), optimizer, train.share(idx, targets, config), "D4", 1e9))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(relative_error(g, grads[0]) < 1e-5 for g in grads) and all(abs(loss - results[0][0]) < 1e-5 for loss, _ in results)


def test_schedule_warms_up_and_falls_to_min_lr():
    config = train.TrainConfig(steps=100, warmup=0.05, lr=1e-3, min_lr=1e-6, device="cpu")
    lrs = [train.schedule(step, config) for step in range(100)]
    assert np.allclose(lrs[:5], [2e-4, 4e-4, 6e-4, 8e-4, 1e-3]) and lrs[5] == 1e-3
    assert all(a >= b for a, b in zip(lrs[5:], lrs[6:])) and lrs[-1] < 3e-6
    config.warmup = 0.0
    assert train.schedule(0, config) == 1e-3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(poison):
    """The last good checkpoint is poisoned in one weight, so that the next step's loss is not finite."""
    flags = [*TINY, "--data", "text", "--steps", 30, "--eval-interval", 10, "--log-interval", 1]
    ok(script("train", *flags, "--out", "run", "--steps", 10))
    model, meta = load_checkpoint("run/dense.pt")
    with torch.no_grad():
        model.norm.weight[0] = poison
    save_checkpoint("run/dense.pt", model, **meta)
    before = Path("run/dense.pt").read_bytes()
    done = script("train", "--resume", "--out", "run", "--steps", 30, "--device", "cpu")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "training stopped: loss" in done.stderr
    assert Path("run/dense.pt").read_bytes() == before


def test_no_loss_where_the_input_is_end_of_text():
    tokens = np.array([5, 6, 256, 7, 8, 256, 9, 1, 2], np.uint16)
    idx, targets = train.cut(tokens, [0, 1], 7, eot=256)
    assert idx.tolist() == [[5, 6, 256, 7, 8, 256, 9], [6, 256, 7, 8, 256, 9, 1]]
    assert targets.tolist() == [[6, 256, -100, 8, 256, -100, 1], [256, -100, 8, 256, -100, 1, 2]]
    assert (train.cut(tokens, [0], 7)[1] == -100).sum() == 0


def test_pretraining_reads_the_first_tokens_once_in_order():
    config = train.TrainConfig(steps=5, batch_size=3, context=4, device="cpu")
    starts = np.stack([train.in_order(step, config, 1000) for step in range(5)])
    assert sorted(starts.flatten()) == list(range(0, 60, 4)), "each window of the first 5 * 3 * 4 tokens once"
    assert (np.diff(starts, axis=0) == 4).all(), "each row goes on where it was"
    wrapped = np.stack([train.in_order(step, config, 33) for step in range(5)])
    assert wrapped.max() + 4 + 1 <= 33, "shorter data starts again, within its bounds"


def test_pretraining_reads_at_random_offsets_if_asked(monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "at_random", lambda step, *rest, draw=train.at_random: drawn.append(step) or draw(step, *rest))
    call("train", *TINY, "--data", "text", "--steps", 3, "--random")
    assert drawn == [0, 1, 2]


def test_adaptation_reads_at_random_offsets_that_repeat():
    config = train.TrainConfig(batch_size=200, context=4, device="cpu")
    a, b, again = train.at_random(0, config, 20), train.at_random(1, config, 20), train.at_random(0, config, 20)
    assert (a == again).all() and (a != b).any() and a.min() == 0 and a.max() == 15


# ---------------------------------------------------------------------------------------------
# Data

def flags(**kwargs):
    return train.DataFlags(**{"context": 8, "device": "cpu", **kwargs})


def test_text_is_split_by_document_and_cached(capsys):
    Path("text/picture.png").write_bytes(b"\x89PNG\0\0")
    Path("text/.hidden").write_text("no")
    Path("text/broken.txt").symlink_to("nowhere")
    os.mkfifo("text/pipe.txt")                                  # reading it would wait for ever
    config = flags(data="text")
    tokens, val, vocab = train.load_data(config)
    assert vocab == 320 and config.tokenizer == "bytes" and config.eot == 256
    pieces = [np.split(part, np.flatnonzero(part == 256) + 1) for part in (tokens, val)]
    documents = [bytes(doc[:-1].astype(np.uint8)).decode() for docs in pieces for doc in docs[:-1]]
    assert sorted(documents) == sorted(Path(f"text/{i}.txt").read_text() for i in range(30)), "each document once, whole, in one part"
    assert (val == 256).sum() == 1 and "30/30" in capsys.readouterr().err
    again, _, _ = train.load_data(flags(data="text"))
    assert capsys.readouterr().err == "" and again.tolist() == tokens.tolist(), "tokenized once"
    Path("text/0.txt").write_text("changed " * 20)
    train.load_data(flags(data="text"))
    assert "30/30" in capsys.readouterr().err, "and again when a file has changed"


def test_a_single_text_file_gives_its_last_tenth_to_validation():
    Path("book.txt").write_text("é" * 500)
    tokens, val, _ = train.load_data(flags(data="book.txt"))
    assert len(tokens) == 900 and len(val) == 101 and val[-1] == 256


def bins(tokens, val=None, folder="bins"):
    os.makedirs(folder, exist_ok=True)
    np.asarray(tokens, "<u2").tofile(f"{folder}/train.bin")
    np.asarray(tokens if val is None else val, "<u2").tofile(f"{folder}/val.bin")


def test_bins_give_the_vocabulary_and_end_of_text():
    bins([3, 70, 1] * 10)
    for given, (eot, vocab) in (({}, (-1, 128)), ({"eot": 3}, (3, 128)), ({"tokenizer": "gpt2"}, (50256, 50304)),
                                ({"tokenizer": "bytes"}, (256, 320))):
        config = flags(data="bins", **given)
        assert train.load_data(config)[2] == vocab and config.eot == eot and config.tokenizer == given.get("tokenizer", "ids")
    assert train.load_data(flags(data="bins"), vocab_size=71)[2] == 128
    bins([3, 50256, 1] * 10)
    config = flags(data="bins")
    assert train.load_data(config)[2] == 50304 and config.eot == 50256
    config = flags(data="bins", eot=-1)
    train.load_data(config)
    assert config.eot == -1


def test_meta_pkl_is_never_unpickled():
    Bomb.path = "exploded"
    bins([3, 70, 1] * 10)
    with open("bins/meta.pkl", "wb") as f:
        pickle.dump(Bomb(), f)
    train.load_data(flags(data="bins"))
    assert not os.path.exists("exploded")


def test_gpt2_without_its_vocabulary_is_one_line(monkeypatch):
    def offline(name):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    assert train.Tokenizer("gpt2").eot == 50256, "its size and end-of-text need no vocabulary"
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as error:
        train.Tokenizer("gpt2").encode("text")
    assert "\n" not in str(error.value)


@needs_gpt2
def test_gpt2_tokenizes_and_streams_text():
    text = "def f(x): return 'naïve 漢字 🙂'\n"
    coder = train.Tokenizer("gpt2")
    assert "".join(map(coder.decode, coder.encode(text))) == text
    Path("text/0.txt").write_text(text * 20)
    tokens, val, vocab = train.load_data(flags(data="text", tokenizer="gpt2"))
    assert vocab == 50304 and max(tokens.max(), val.max()) == 50256


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂", ""])
def test_bytes_decode_as_they_stream(text):
    coder = train.Tokenizer("bytes")
    assert "".join(map(coder.decode, coder.encode(text).tolist())) == text
    assert train.Tokenizer("bytes").decode(256) == "<|endoftext|>" and train.Tokenizer("bytes").decode(300) == ""


# ---------------------------------------------------------------------------------------------
# Retrieval

def needles(split=0, T=400, tokenizer="bytes", tasks=(*train.TASKS,), seed=0):
    return train.Niah(train.DataFlags(context=T, tokenizer=tokenizer, tasks=tasks, seed=seed, device="cpu"), split)


def text_of(tokens, tokenizer="bytes"):
    return "".join(map(train.Tokenizer(tokenizer).decode, tokens.tolist()))


NEEDLE, QUESTION, BARE = r" Safe ([\w-]+): ([\w-]+)\.", r"\nOpen ([\w, -]+): ([\w, -]+)\.", r" ([a-z]+-[a-z]+) ([0-9]+)\."
ASKED = {"multikey-1": (1, 4), "multikey-2": (1, 10), "multikey-3": (1, 3), "multivalue": (4, 4), "multiquery": (4, 4),
         "recall": (1, 10)}                                     # values of the longest samples: one question, up to 16; else one


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("task", train.TASKS)
def test_the_answers_of_a_task_are_in_its_text(task, tokenizer):
    """Alone at the end in evaluation, many in training; whatever is asked has the values in the answer and no others."""
    for rounds, asked in zip((1, 16), ASKED.get(task, (1, 1))):
        found = set()
        for T in (256, 400, 1400):
            data, twin = (needles(T=T, tokenizer=tokenizer) for _ in range(2))
            for number in range(20):
                sample = tokens, known, values = data.sample(number, T, task, rounds)
                assert len(tokens) == len(known) == T, "the context is filled"
                text = text_of(tokens, tokenizer)
                if task == "recall":
                    pairs = re.findall(BARE, text)
                    pairs, questions = pairs[:-len(values)], pairs[-len(values):]
                else:
                    pairs, questions = re.findall(NEEDLE, text), re.findall(QUESTION, text)
                held = [[value for key, value in pairs if key in keys.split(", ")] for keys, _ in questions]
                assert [sorted(told.split(", ")) for _, told in questions] == list(map(sorted, held)) and len(questions) <= rounds
                assert text_of(tokens[known], tokenizer) == "".join(f" {told}." for _, told in questions)
                assert ", ".join(told for _, told in questions) == ", ".join(values) and text.endswith(values[-1] + ".")
                count = 1 if "single" in task else 4 if task in ("multikey-1", "multivalue", "multiquery") else len(pairs)
                assert len(pairs) == count and (count < 5 or len(pairs) > len(values)), "the haystack has needles of its own"
                assert all(np.array_equal(a, b) for a, b in zip(sample, twin.sample(number, T, task, rounds))), "the same again"
                found.add(len(values))
        assert max(found) >= asked and (min(found) == 1 or ", " in text_of(tokens[known], tokenizer)), found


def test_evaluation_shares_no_key_no_value_and_no_sample_with_training():
    seen = []
    for split in (0, 1):
        data = needles(split, 2000)
        pairs = [re.findall(NEEDLE, text_of(data.sample(number, 2000)[0])) for number in range(150)]
        seen.append(list(map(set, zip(*sum(pairs, [])))))
        assert min(map(len, seen[-1])) > 1000
    assert not seen[0][0] & seen[1][0] and not seen[0][1] & seen[1][1]
    numbers = [value for value in seen[1][1] if len(value) == 7]
    shares = [sum(value[i] == digit for value in numbers) / len(numbers) for i in range(1, 7) for digit in "0123456789"]
    assert max(abs(share - 0.1) for share in shares) < 0.03, "no digit gives away the half that its number is in"
    assert needles(seed=1).sample(0, 400, "single-1")[2] != needles().sample(0, 400, "single-1")[2]


def test_needles_lie_at_all_depths():
    data = needles(1)
    for task in ("single-1", "multikey-1", "multikey-2"):
        samples = (data.sample(number, 2000, task) for number in range(64))
        depths = [text_of(tokens).index(values[0]) / len(tokens) for tokens, _, values in samples]
        counts, _ = np.histogram(depths, 8, (0, 1))
        assert counts.min() >= 5 and counts.max() <= 11, (task, counts)


def test_fine_tuning_batches_mix_the_tasks_and_have_a_loss_on_the_answers_only():
    config, data = train.TrainConfig(steps=16, batch_size=64, context=399, device="cpu"), needles()
    starts = train.in_order(3, config, len(data))
    idx, targets = train.cut(data, starts, 399, eot=256)
    for start, x, y in zip(starts, idx, targets):
        tokens, known, _ = data.sample(int(start), 400, rounds=16)
        assert x.tolist() == tokens[:-1].tolist() and y.tolist() == np.where(known, tokens, -100)[1:].tolist()
    answers = {text_of(row[row != -100]) for row in targets}
    assert len(answers) == 64 and {len(answer) for answer in answers} > {9, 36, 38}, "one number, four, a uuid and so on"


def test_the_share_of_the_values_that_is_found():
    assert evaluation.share_found(" 1234567, AB-C.", ["1234567", "ab-c"]) == 1
    assert evaluation.share_found(" 12345678", ["1234567", "7654321", "ab-c", "45"]) == 0.5
    assert evaluation.share_found("", ["1234567"]) == 0


def test_retrieval_scores_what_the_model_goes_on_with():
    data, sizes, right = needles(1), [], []

    class Every3rd:
        """A model that finds half of the values if the first one is a multiple of 3, else nothing."""
        def generate(self, idx, n_new, pattern, temperature):
            assert pattern == "D4" and temperature == 0 and idx.shape[1] + n_new == 400
            new = []
            for i, prompt in enumerate(idx, sum(sizes)):
                tokens, known, values = data.sample(i, 400, "multivalue")
                assert prompt.tolist() == tokens[~known].tolist()
                right.append(int(values[0]) % 3 == 0)
                new.append(list(f" {values[2]}, {values[0]}.".encode().ljust(n_new)) if right[-1] else [0] * n_new)
            sizes.append(len(idx))
            return torch.cat((idx, torch.tensor(new)), dim=1)

    config = evaluation.EvalConfig(context=400, samples=30, eval_batch=8, tokenizer="bytes", device="cpu")
    score = evaluation.retrieve(Every3rd(), data, "multivalue", "D4", config)
    assert sizes == [8, 8, 8, 6] and 0 < sum(right) < 30 and abs(score - 100 * sum(right) / 60) < 1e-9


def test_a_run_is_fine_tuned_in_each_pattern_of_its_own(trained, capsys):
    """From out/ to tuned/: the dense weights with ARL, the adapted ones in D4 alone; evaluated there side by side."""
    call("adapt", "--pattern", "D4", "--steps", 1, "--device", "cpu")
    parent = load_checkpoint("out/D4.pt")[1]["parent"]
    tune = ["--data", "niah", "--context", 256, "--steps", 3, "--out", "tuned", "--device", "cpu"]
    for name, passes in (("dense", "D64 then D1"), ("D4", "D4")):
        out = ok(script("train", "--checkpoint", f"out/{name}.pt", *tune))
        assert f"each batch updates with {passes};" in out and f"saved tuned/{name}.pt" in out
        model, meta = load_checkpoint(f"tuned/{name}.pt")
        assert meta["parent"] == parent and meta["pattern"] == {"dense": "D1"}.get(name, name) and meta["step"] == 3
        assert meta["train"]["arl"] == "D64" and meta["tokenizer"] == "bytes" and meta["train"]["context"] == 256
        assert not model.embed.weight.equal(load_checkpoint(f"out/{name}.pt")[0].embed.weight)
    ok(script("train", "--checkpoint", "out/D4.pt", "--resume", "--out", "tuned", "--steps", 4, "--device", "cpu"))
    assert load_checkpoint("tuned/D4.pt")[1]["step"] == 4 and load_checkpoint("tuned/D4.pt")[1]["parent"] == parent
    refused(capsys, "train", "--checkpoint", "out/D4.pt", *tune, why="tuned/D4.pt exists")
    capsys.readouterr()
    for _ in range(2):
        call("eval", "--niah", "--out", "tuned", "--samples", 3, "--tasks", "single-1", "recall", "--device", "cpu")
    out = capsys.readouterr().out
    assert out.count("| model | pattern | weights | single-1 | recall | average |") == 2 and "left out" not in out
    rows = [line.strip("| ").split(" | ")[:3] for line in out.splitlines() if line.startswith("| RAT+ (tuned)")]
    assert rows[:3] == [["RAT+ (tuned)", *row] for row in (("D1", "dense"), ("D4", "switched"), ("D4", "adapted"))]
    cells = [json.loads(line) for line in Path("tuned/niah.jsonl").read_text().splitlines()]
    assert len(cells) == 12, "a second run is appended"
    names = [(cell["pattern"], cell["weights"], cell["task"]) for cell in cells]
    assert names[3:5] == [("D4", "switched", "recall"), ("D4", "adapted", "single-1")]
    assert all(cell["context"] == 256 and cell["samples"] == 3 and 0 <= cell["score"] <= 100 for cell in cells)
    assert {cell["block_score"] for cell in cells} == {"mean"}


# ---------------------------------------------------------------------------------------------
# Bad input

def refused(capsys, name, *args, why):
    """The call exits non-zero with one line on stderr that says why, and changes no checkpoint."""
    def files():
        return {path: path.read_bytes() for path in Path(".").rglob("*.pt")}
    before = files()
    with pytest.raises(SystemExit) as stop:
        call(name, *args)
    err = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code + "\n"
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("\rtokenizing"))
    assert stop.value.code not in (0, None) and why in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert files() == before, "a checkpoint changed"


@pytest.mark.parametrize("name, args, why", [
    ("train", ["--data", "nowhere"], "nowhere"),
    ("train", ["--data", "empty"], "nothing in it"),
    ("train", ["--data", "zeros.txt"], "no UTF-8 text"),
    ("train", ["--data", "text", "--tokenizer", "ids"], "text needs a tokenizer"),
    ("train", ["--data", "short.txt"], "more uint16 tokens than the context"),
    ("train", ["--data", "odd"], "odd/train.bin: 41 bytes"),
    ("train", ["--data", "nothing"], "nothing/train.bin: 0 bytes"),
    ("train", ["--data", "half"], "val.bin"),
    ("train", ["--data", "large", "--vocab-size", "60"], "token 70 is beyond the vocabulary of 60"),
    ("train", ["--data", "large", "--tokenizer", "bytes", "--arl", "D-1"], "'D-1'"),
    ("train", ["--data", "text", "--arl", "D1/D2/D4"], "do not divide"),
    ("train", ["--data", "text", "--n-head", "3"], "n_embd must split"),
    ("train", ["--data", "text", "--resume"], "out/dense.pt"),
    ("train", ["--data", "niah"], "--context 16 is too short for single-1"),
    ("train", ["--data", "niah", "--context", "242", "--tasks", "single-1", "multikey-3"], "multikey-3, which takes 243 tokens"),
    ("train", ["--data", "niah", "--tokenizer", "ids"], "text needs a tokenizer"),
    ("train", ["--data", "niah", "--tasks", "multikey-4"], "--tasks"),
    ("train", ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ("train", ["--data", "text", "--out", "file"], "file"),
    ("train", ["--data", "text", "--device", "nonsense"], "--device nonsense"),
    ("train", ["--preset", "huge"], "--preset"),
    ("train", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ("train", ["--steps", "many"], "--steps"),
    ("train", ["--steps", "0"], "--steps 0: must be a number from 1 to 2^40"),
    ("train", ["--lr", "nan"], "--lr"),
    ("train", ["--seed", "9" * 30], "--seed"),
    ("train", ["--data", "text", "--device", "meta"], "--device meta"),
    ("train", ["--dtype", "float64"], "--dtype"),
    ("adapt", [], "out/dense.pt"),
    ("adapt", ["--checkpoint", "torn.pt"], "torn.pt: not a whole checkpoint"),
    ("adapt", ["--checkpoint", "foreign.pt"], "foreign.pt: not a whole checkpoint"),
    ("adapt", ["--checkpoint", GOLDEN / "official_tiny.pth"], "--data is needed"),
    ("adapt", ["--checkpoint", GOLDEN / "official_tiny.pth", "--data", "large", "--context", "8"], "beyond the vocabulary of 37"),
    ("adapt", ["--checkpoint", GOLDEN / "official_tiny.pth", "--data", "text", "--context", "8"], "text needs a tokenizer"),
    ("adapt", ["--checkpoint", GOLDEN / "official_tiny.pth", "--data", "niah", "--tokenizer", "bytes"], "the vocabulary of 37"),
    ("eval", ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ("eval", ["--niah", "--checkpoint", GOLDEN / "official_tiny.pth"], "text needs a tokenizer"),
    ("eval", ["--compare", "nowhere"], "nowhere/dense.pt"),
    ("sample", ["--out", "nowhere"], "nowhere/dense.pt"),
    ("sample", ["--nonsense"], "unrecognized arguments"),
    ("sample", ["--checkpoint", "torn.pt"], "torn.pt: not a whole checkpoint"),
    ("sample", ["--checkpoint", GOLDEN / "official_tiny.pth", "--tokens", 2**40], "can't allocate memory"),
])
def test_bad_input_is_one_line(capsys, name, args, why):
    for folder in ("empty", "odd", "nothing", "half"):
        os.mkdir(folder)
    Path("zeros.txt").write_bytes(b"\0" * 100)
    Path("short.txt").write_text("short")
    Path("file").write_text("a file, not a folder")
    Path("torn.pt").write_bytes((GOLDEN / "official_tiny.pth").read_bytes()[:5000])
    torch.save({"a": 1}, "foreign.pt")
    Path("odd/train.bin").write_bytes(b"x" * 41)
    Path("odd/val.bin").write_bytes(b"x" * 40)
    for part in ("nothing/train.bin", "nothing/val.bin"):
        Path(part).touch()
    Path("half/train.bin").write_bytes(b"\0\0" * 100)
    bins([3, 70, 1] * 10, folder="large")
    refused(capsys, name, *(TINY if name == "train" else ["--device", "cpu"]), *args, why=why)


@pytest.mark.parametrize("name, args, why", [
    ("train", ["--resume", "--n-embd", "32", "--data", "text"], "it can't be resumed"),
    ("train", ["--checkpoint", "out/dense.pt", "--overwrite"], "--out names another folder"),
    ("train", ["--checkpoint", "out/dense.pt", "--out", "new", "--n-embd", "32"], "the flags ask for RATConfig"),
    ("adapt", ["--pattern", "D1/D2/D4"], "3 head groups do not divide 2 heads"),
    ("adapt", ["--pattern", "D4", "D"], "'D'"),
    ("adapt", ["--pattern", "D1,D4"], "2 layers are named, the model has 1"),
    ("adapt", ["--data", "wide"], "token 400 is beyond the vocabulary of 320"),
    ("eval", ["--pattern", "K16"], "'K16'"),
    ("eval", ["--pattern", "N4K2", "--score", "max"], "--score"),
    ("eval", ["--niah"], "--context 16 is too short for single-1"),
    ("eval", ["--niah", "--samples", "0"], "--samples 0: must be a number from 1 to 2^40"),
    ("sample", ["--pattern", "D1/D2/D4"], "do not divide"),
    ("sample", ["--max-len", "3", "--prompt", "1 + 1"], "the cache is too short"),
    ("sample", ["--prompt", ""], "at least one token is needed"),
    ("sample", ["--temperature", "-1"], "--temperature"),
    ("sample", ["--top-p", "2"], "top_p"),
    ("sample", ["--pattern", "D4", "D8"], "several patterns are for --bench"),
    ("sample", ["--bench", "--contexts", "0"], "at least one token is needed"),
    ("sample", ["--bench", "--pattern", "D1/D2/D3"], "do not divide 4 heads"),
])
def test_bad_input_beside_a_good_checkpoint_is_one_line(capsys, trained, name, args, why):
    bins([3, 400, 1] * 20, folder="wide")
    refused(capsys, name, "--device", "cpu", *args, why=why)


def test_resume_refuses_another_shape(capsys):
    ok(script("train", *TINY, "--data", "text", "--steps", 2))
    refused(capsys, "train", "--resume", "--n-embd", "32", "--device", "cpu", why="the flags ask for RATConfig")
    refused(capsys, "train", "--resume", "--no-recurrence", "--device", "cpu", why="the flags ask for RATConfig")


def test_a_read_only_output_folder_is_refused(capsys):
    os.mkdir("locked", 0o500)
    if os.access("locked", os.W_OK):
        out = "/proc/nothing"                                   # root may write anywhere but there
        if not os.path.isdir("/proc"):
            pytest.skip("root can write to any folder here")
    else:
        out = "locked"
    refused(capsys, "train", *TINY, "--data", "text", "--out", out, why=out)


def test_a_pipe_of_errors_is_one_line_through_the_real_command_line():
    for name, args in (("train", ["--data", "nowhere"]), ("adapt", []), ("eval", ["--pattern", "D"]), ("sample", ["--top-k", "x"])):
        done = script(name, *args)
        assert done.returncode != 0 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"{name}.py: "), done.stderr
