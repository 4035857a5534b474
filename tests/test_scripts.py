"""The scripts through main(argv), as a user calls them: the story, eval.py, sample.py, bad input."""
import contextlib
import io
import json
import lzma
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapt
import eval as evaluation
import sample
import train
from model import Pattern, RATConfig, RATPlus, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = GOLDEN / "official_tiny.pth"                 # the authors' format, 37 tokens
TINY = ("--n-layer 2 --n-head 2 --n-embd 32 --context 32 --batch-size 4 --eval-windows 6 "
        "--eval-batch 4 --device cpu").split()
SCRIPTS = {"train": train, "adapt": adapt, "eval": evaluation, "sample": sample}
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"),
                  "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
needs_gpt2 = pytest.mark.skipif(not VOCABULARY.exists(),
                                reason="needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")


def call(name, *args):
    """Run a script's main in this process."""
    SCRIPTS[name].main([str(arg) for arg in args])


def as_script(name, monkeypatch, *args):
    """Run a script's file as `python name.py` does, but in this process."""
    path = str(ROOT / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, *args])
    runpy.run_path(path, run_name="__main__")


def on_cpu(name, *args):
    call(name, "--device", "cpu", *args)


def refused(name, *args, why):
    """The call ends in an error that `run` prints as one line, and says why."""
    with pytest.raises((ValueError, OSError)) as error:
        on_cpu(name, *args)
    assert why in " ".join(str(error.value).split()), error.value


def write_texts(folder="text", n=30):
    """Files of sums."""
    os.makedirs(folder)
    for i in range(n):
        Path(folder, f"{i}.txt").write_text("".join(f"{i} + {j} = {i + j}\n" for j in range(40)))


def write_bins(tokens, folder):
    os.makedirs(folder)
    for name in ("train.bin", "val.bin"):
        np.asarray(tokens, "<u2").tofile(f"{folder}/{name}")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A folder of its own with a little text in it."""
    monkeypatch.chdir(tmp_path)
    write_texts()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of tensors this small, more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PATTERNS = ["D4", "W2S1", "D8/D1", "N4K2:minmax"]


@pytest.fixture(scope="module")
def story(tmp_path_factory, one_thread):
    """A folder with what `train.py && adapt.py` leave: (folder, what they printed)."""
    folder = tmp_path_factory.mktemp("story")
    before = os.getcwd()
    os.chdir(folder)
    out = io.StringIO()
    try:
        write_texts()
        with contextlib.redirect_stdout(out):
            call("train", *TINY, "--data", "text", "--steps", 60, "--eval-interval", 30,
                 "--log-interval", 10, "--arl", "D8", "--lr", "1e-2")
            on_cpu("adapt", "--pattern", *PATTERNS, "--steps", 4, "--lr", "3e-3")
        for path in Path("out").glob("*.pt"):                   # they find a copy of the texts too
            edit(path, lambda meta: meta["train"].update(data=["text"], sources={}))
    finally:
        os.chdir(before)
    return folder, out.getvalue()


@pytest.fixture
def trained(story):
    """A copy of the story's folder `out`, in the folder of this test, whose texts are the same."""
    folder, _ = story
    shutil.copytree(folder / "out", "out")
    return Path("out/dense.pt")


@pytest.fixture
def in_story(story, monkeypatch):
    """The story's own folder, for calls that are refused and so change nothing there."""
    folder, _ = story
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    yield Path("out/dense.pt")
    after = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert after == before, "a refused call changed a file of the run"


def edit(path, change, model=None):
    """Rewrite a checkpoint with `change(meta)` done."""
    saved, meta = load_checkpoint(path)
    change(meta)
    save_checkpoint(path, model or saved, **meta)


def table(out, of=0):
    """A Markdown table of the output: [{column: cell}]."""
    found = []
    head = None
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = cells
            found.append([])
        elif not line.startswith("|---"):
            found[-1].append(dict(zip(head, cells)))
    return found[of]


def rows_of(out):
    """The rows of the first table by pattern and weights."""
    return {(row["pattern"], row["weights"]): row for row in table(out)}


def val_tokens():
    """The validation tokens of `text`, as train.py splits it."""
    return np.fromfile(next(Path(".cache").glob("*/val.bin")), "<u2").astype(np.int64)


def naive_loss(model, pattern, n, T):
    """The mean loss over n windows of T spread evenly over the validation tokens."""
    tokens = val_tokens()
    losses = []
    for start in np.linspace(0, len(tokens) - T - 1, n).astype(int):
        window = torch.from_numpy(tokens[start:start + T + 1])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(window[None, :-1], pattern)[0], window[1:]).item())
    return np.mean(losses)


# --------------------------------------------------------------------------------------------------
# The story

def test_train_and_adapt_leave_their_files(story):
    folder, out = story
    assert "RAT+ | " in out and "on cpu" in out and torch.__version__ in out
    names = {"dense", "D4", "W2S1", "D8_D1", "N4K2-minmax"}
    assert {path.stem for path in (folder / "out").glob("*.pt")} == names
    assert {path.stem for path in (folder / "out").glob("*.jsonl")} == names
    records = [json.loads(line) for line in (folder / "out/dense.jsonl").read_text().splitlines()]
    dense = [record["losses"]["D1"] for record in records if "losses" in record]
    assert len(dense) == 6 and dense[-1] < dense[0] - 0.5, "the loss falls"


def test_a_table_of_all_that_was_adapted_and_no_attention(trained, capsys):
    on_cpu("eval")
    rows = rows_of(capsys.readouterr().out)
    switched = {(pattern, "switched") for pattern in (*PATTERNS, "W0")}
    adapted = {(pattern, "adapted") for pattern in PATTERNS}
    assert set(rows) == {("D1", "dense")} | switched | adapted
    dense, _ = load_checkpoint(trained)
    for (pattern, weights), row in rows.items():
        model = dense
        if weights == "adapted":
            model, _ = load_checkpoint(train.file_of(pattern, "out"))
        wanted = naive_loss(model, pattern, n=6, T=32)
        assert abs(float(row["loss"]) - wanted) < 6e-4, (pattern, weights, wanted)
        assert abs(float(row["perplexity"]) - math.exp(wanted)) < 6e-3
    losses = {key: float(row["loss"]) for key, row in rows.items()}
    assert losses["D4", "switched"] != losses["D4", "adapted"] != losses["D1", "dense"]


def test_gap_and_what_is_kept_of_attention(trained, capsys, monkeypatch):
    """Losses that are made up: dense 2, no attention 4."""
    made_up = {"D1": 2.0, "W0": 4.0, "D4": 2.5, "W2S1": 3.5, "D8/D1": 2.0, "N4K2:minmax": 5.0}
    monkeypatch.setattr(evaluation, "evaluate", lambda model, tokens, p, config: made_up[str(p)])
    on_cpu("eval")
    rows = rows_of(capsys.readouterr().out)
    kept = {pattern: row["kept"] for (pattern, _), row in rows.items()}
    assert kept == {"D1": "100.0%", "D4": "75.0%", "W2S1": "25.0%", "D8/D1": "100.0%",
                    "N4K2:minmax": "-50.0%", "W0": "0.0%"}
    assert rows["D4", "adapted"]["gap"] == "+0.500" and rows["W0", "switched"]["gap"] == "+2.000"
    on_cpu("eval", "--pattern", "D4")
    rows = rows_of(capsys.readouterr().out)
    assert set(rows) == {("D1", "dense"), ("D4", "switched"), ("D4", "adapted")}
    assert rows["D4", "adapted"]["kept"] == "–", "unknown where W0 was not asked for"


def test_adapted_no_attention_is_what_adapted_patterns_are_measured_from(trained, capsys, monkeypatch):
    on_cpu("adapt", "--pattern", "W0", "--steps", 1)
    dense = load_checkpoint(trained)[0].embed.weight
    capsys.readouterr()

    def made_up(model, tokens, pattern, config):
        adapted = not model.embed.weight.equal(dense)
        return {"D1": 1.0, "W0": 3.0, "D4": 2.0}.get(str(pattern), 1.0) - 0.5 * adapted

    monkeypatch.setattr(evaluation, "evaluate", made_up)
    on_cpu("eval", "--pattern", "D4", "W0")
    rows = rows_of(capsys.readouterr().out)
    assert rows["D4", "switched"]["kept"] == "50.0%"            # (3 - 2) / (3 - 1)
    assert rows["D4", "adapted"]["kept"] == "66.7%"             # (2.5 - 1.5) / (2.5 - 1)


def test_keys_and_bytes_are_counted(trained, capsys):
    """A position is 2 layers x 32 channels x key and value x 4 bytes: 512. So is the state."""
    on_cpu("eval")
    rows = rows_of(capsys.readouterr().out)
    assert rows["D1", "dense"]["keys per token"] == "16.5"
    assert rows["D1", "dense"]["cache bytes per token"] == "528 (100.0%)"           # 33 / 32
    assert rows["D1", "dense"]["bytes read per token"] == "8448 (100.0%)"           # 15.5 + 1
    keys = Pattern.parse("D4").mask(32).sum() / 32
    assert rows["D4", "adapted"]["keys per token"] == f"{keys:.1f}"
    assert rows["D4", "adapted"]["cache bytes per token"] == "144 (27.3%)"          # (8 + 1) / 32
    assert rows["D4", "adapted"]["bytes read per token"] == "2304 (27.3%)"          # 3.5 + 1
    assert rows["W0", "switched"]["cache bytes per token"] == "16 (3.0%)"
    keys = np.mean([t % 4 + 1 + 4 * (t >= 4) for t in range(32)])       # its own block, one more
    topk = rows["N4K2:minmax", "adapted"]
    assert topk["keys per token"] == f"{keys:.1f}"
    assert topk["cache bytes per token"] == "656 (124.2%)"              # (32 + 1 + 8) / 32
    assert topk["bytes read per token"].startswith(f"{(keys - 1 + 1 + 3.5) * 512:.0f} ")


def test_the_cache_is_counted_in_the_dtype_of_the_call(trained, capsys):
    on_cpu("eval", "--dtype", "bfloat16", "--pattern", "D1")
    row = rows_of(capsys.readouterr().out)["D1", "dense"]
    assert row["cache bytes per token"] == "272 (100.0%)"               # 256 + 512 / 32


def test_the_windows_are_those_of_the_flags(trained, capsys):
    model, _ = load_checkpoint(trained)
    found = []
    for flags, n, T in (([], 6, 32), (["--eval-windows", 3], 3, 32), (["--context", 20], 6, 20),
                        (["--eval-batch", 1], 6, 32)):
        on_cpu("eval", "--pattern", "D8", *flags)
        row = rows_of(capsys.readouterr().out)["D8", "switched"]
        assert abs(float(row["loss"]) - naive_loss(model, "D8", n, T)) < 6e-4, flags
        assert row["keys per token"] == f"{Pattern.parse('D8').mask(T).sum() / T:.1f}"
        found.append(row["loss"])
    assert found[0] == found[3] and len(set(found)) == 3
    shutil.move("text", "moved")
    on_cpu("eval", "--pattern", "D8", "--data", "moved")
    assert rows_of(capsys.readouterr().out)["D8", "switched"]["loss"] == found[0]


def test_chart_holds_the_best_weights_of_each_pattern(trained, capsys):
    on_cpu("eval")
    out = capsys.readouterr().out
    rows = rows_of(out)
    line = re.search(r"line \[(.*)\]", out)[1].split(", ")
    assert line == [rows["D1", "dense"]["loss"], *(rows[p, "adapted"]["loss"] for p in
                    sorted(PATTERNS, key=lambda p: train.file_of(p, ""))), rows["W0", "switched"]["loss"]]
    axis = re.search(r"x-axis \[(.*)\]", out)[1]
    assert axis.startswith('"D1", "D4", "D8/D1"') and axis.endswith('"W0"')


# --------------------------------------------------------------------------------------------------
# Which weights are evaluated

def test_one_file_is_evaluated_in_its_own_pattern(trained, capsys):
    on_cpu("eval", "--checkpoint", "out/D4.pt")
    rows = rows_of(capsys.readouterr().out)
    assert set(rows) == {("D1", "switched"), ("D4", "adapted"), ("W0", "switched")}
    model, _ = load_checkpoint("out/D4.pt")
    for (pattern, _), row in rows.items():
        assert abs(float(row["loss"]) - naive_loss(model, pattern, 6, 32)) < 6e-4
        assert row["model"] == "RAT+ (out/D4.pt)"
    on_cpu("eval", "--checkpoint", "out/D4.pt", "--pattern", "D8")
    assert set(rows_of(capsys.readouterr().out)) == {("D1", "switched"), ("D4", "adapted"),
                                                     ("D8", "switched")}
    refused("eval", "--checkpoint", "out/D4.pt", "--compare", "out", why="give one of the two")


def test_files_that_are_not_of_this_run_are_left_out_with_a_line(trained, capsys):
    edit("out/D4.pt", lambda meta: meta.update(parent="00000000"))
    Path("out/foreign.pt").write_bytes(b"not a checkpoint")
    Path("out/torn.pt").write_bytes(trained.read_bytes()[:3000])
    shutil.copy("out/W2S1.pt", "out/another.pt")     # sorted after W2S1.pt
    on_cpu("eval")
    out = capsys.readouterr().out
    for path, why in (("D4", "was not adapted from"), ("foreign", "not a whole checkpoint"),
                      ("torn", "not a whole checkpoint"), ("another", "a second one for W2S1")):
        assert re.search(f"left out: out/{path}.pt.*{why}", out), path
    assert out.count("left out") == 4
    assert ("D4", "adapted") not in rows_of(out) and ("D8/D1", "adapted") in rows_of(out)


@pytest.mark.parametrize("recurrence, arl, name", [
    (True, ["D64"], "RAT+"), (True, ["none"], "RAT+ without ARL"),
    (True, "none", "RAT+ without ARL"), (True, ["D1"], "RAT+ without ARL"),
    (False, ["none"], "attention-only"), (False, ["D64"], "attention-only with ARL"),
    (True, None, "RAT+"), (False, None, "attention-only")])
def test_a_model_is_named_by_its_training(recurrence, arl, name):
    model = RATPlus(RATConfig(64, 1, 2, 16, recurrence))
    assert evaluation.kind_of(model, {} if arl is None else {"train": {"arl": arl}}) == name


def attention_only(folder, **changes):
    """A run beside `out`, of an attention-only model, with its training flags changed."""
    os.makedirs(folder)
    shutil.copy("out/dense.pt", folder)
    edit(f"{folder}/dense.pt", lambda meta: meta["train"].update(arl=["none"], **changes),
         RATPlus(RATConfig(320, 2, 2, 32, recurrence=False)))


def test_runs_side_by_side_have_their_own_gap_keys_and_bytes(trained, capsys):
    attention_only("plain")
    on_cpu("eval", "--compare", "out", "plain", "--pattern", "D4", "D8", "W0")
    out = capsys.readouterr().out
    rows = {(row["model"], row["pattern"], row["weights"]): row for row in table(out)}
    for name in ("RAT+ (out)", "attention-only (plain)"):
        losses = {key[1:]: float(row["loss"]) for key, row in rows.items() if key[0] == name}
        for (pattern, weights), loss in losses.items():
            row = rows[name, pattern, weights]
            assert abs(float(row["gap"]) - (loss - losses["D1", "dense"])) < 2e-3
            gain = losses["W0", "switched"] - losses["D1", "dense"]
            kept = (losses["W0", "switched"] - loss) / gain
            assert abs(float(row["kept"].strip("%")) / 100 - kept) < 2e-3 / abs(gain)
    cells = [rows[name, "D1", "dense"]["cache bytes per token"]
             for name in ("RAT+ (out)", "attention-only (plain)")]
    assert cells == ["528 (100.0%)", "512 (100.0%)"], "one has a state, the other none"
    models = [row["model"] for row in table(out)]
    assert models[:2] == ["RAT+ (out)", "attention-only (plain)"], "beside one another"
    assert out.count("    line [") == 2


@pytest.mark.parametrize("changes, flags, why", [
    ({"context": 16}, ["--context", 24], "--context, 32 for RAT+ (out), 16"),
    ({"eval_windows": 3}, ["--eval-windows", 5], "--eval-windows, 6 for"),
    ({"tokenizer": "gpt2"}, None, "--tokenizer, bytes for"),
    ({"data": "other"}, ["--data", "text"], "--data, "),
])
def test_runs_that_cant_be_compared_are_refused(trained, capsys, monkeypatch, changes, flags, why):
    write_texts("other", 20)
    if "data" in changes:
        changes = {"data": [os.path.abspath(changes["data"])]}
    attention_only("plain", **changes)
    if "tokenizer" in changes:
        write_bins([5, 6, 7] * 200, "bins")
        edit("plain/dense.pt", lambda meta: meta.update(tokenizer="gpt2"))
        edit("plain/dense.pt", lambda meta: meta["train"].update(data=[os.path.abspath("bins")]),
             RATPlus(RATConfig(50304, 2, 2, 8)))
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", None)           # nothing is evaluated before
        refused("eval", "--compare", "out", "plain", why=why)
    if flags:
        capsys.readouterr()
        on_cpu("eval", "--compare", "out", "plain", *flags)
        assert len({row["model"] for row in table(capsys.readouterr().out)}) == 2


def test_a_missing_second_folder_is_noticed_first(trained, monkeypatch):
    monkeypatch.setattr(evaluation, "load_checkpoint", None)
    refused("eval", "--compare", "out", "nowhere", why="nowhere/dense.pt")


@pytest.mark.parametrize("loss, cells", [
    (0.0, ("0.000", "+0.000", "–", "1.00")), (800.0, ("800.000", "+0.000", "–", "inf")),
    (math.inf, ("inf", "+nan", "–", "inf")), (math.nan, ("nan", "+nan", "nan%", "inf"))])
def test_any_loss_can_be_printed(trained, capsys, monkeypatch, loss, cells):
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: loss)
    on_cpu("eval", "--pattern", "D4", "W0")
    row = rows_of(capsys.readouterr().out)["D4", "adapted"]
    assert tuple(row[name] for name in ("loss", "gap", "kept", "perplexity")) == cells


def test_data_that_are_not_those_of_the_training_are_named(trained, capsys):
    call("train", *TINY, "--data", "text", "--steps", 1, "--out", "new")
    capsys.readouterr()
    on_cpu("eval", "--out", "new", "--pattern", "D4")
    assert "changed" not in capsys.readouterr().err
    Path("text/7.txt").write_text("7 + 7 = 14\n" * 50)
    on_cpu("eval", "--out", "new")
    err = capsys.readouterr().err
    assert len([line for line in err.splitlines() if "changed" in line and "text" in line]) == 1


def test_reach_is_the_half_life_of_the_decays(trained, capsys):
    """The quantiles of the decays of a window; a decay of a half has a half-life of one token."""
    model, _ = load_checkpoint(trained)
    C = model.config.n_embd
    with torch.no_grad():
        for block in model.blocks:
            block.mix.in_proj.weight[-C:] *= 2
    edit(trained, lambda meta: None, model)
    on_cpu("eval", "--reach", "--eval-windows", 1, "--pattern", "D1")
    lines = table(capsys.readouterr().out, of=1)
    assert [line["layer"] for line in lines] == ["0", "1", "all"]
    x = model.embed(torch.from_numpy(val_tokens()[:32])[None])
    with torch.no_grad():
        rows = model.blocks[0].mix.in_proj.weight[-C:]
        decay = torch.sigmoid((model.blocks[0].mix.norm(x) @ rows.T).double())
    half_life = math.log(2) / -decay.log()
    quantiles = torch.tensor([0.5, 0.1, 0.9]).double()
    for cell, part in ((lines[0]["all"], half_life), (lines[0]["head 1"], half_life[..., C // 2:])):
        for found, wanted in zip(map(float, re.findall("[0-9.]+", cell)), part.quantile(quantiles)):
            assert abs(found - wanted) < 0.06 + 0.05 * wanted, (cell, wanted)
    with torch.no_grad():
        for block in model.blocks:
            block.mix.in_proj.weight[-C:] = 0
    edit(trained, lambda meta: None, model)
    on_cpu("eval", "--reach", "--eval-windows", 1, "--pattern", "D1")
    assert capsys.readouterr().out.count("| 1.0 (1.0 to 1.0)") == 9
    attention_only("plain")
    on_cpu("eval", "--reach", "--out", "plain", "--pattern", "D1")
    assert "half-life" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Benchmarks

QUERY = "1 + 1 = 2, 2 + 2 = 4, 3 + 3 ="
ITEMS = [
    {"query": "1 + 1", "choices": ["= 2", "= 7", "is"], "gold": 0},
    {"query": "2 + 2 ", "choices": ["= 4", "= 40000"], "gold": 1},
    {"query": "", "choices": ["5 + 5 = 10", "5 5 + ="], "gold": 0, "group": "order"},
    {"query": ["3 + 3", "4 + 4"], "choices": ["= 8", "= 8"], "gold": 1, "group": "query"},
    {"query": "x\n", "choices": ["y", "zz"], "gold": 1, "group": "query"},
    {"query": QUERY * 3, "choices": ["6", "seven"], "gold": 0, "group": "long"},
    {"query": "a", "choices": ["the same", "the same"], "gold": 0, "group": "tie"},
    {"query": "a", "choices": ["the same", "the same"], "gold": 1, "group": "tie"},
    {"query": "10 + 10 = 20", "choices": ["é", "10 + 11 = 21\n10 + 12 = 22\n10 + 13 ="], "gold": 1},
    {"query": QUERY, "choices": ["+" * 50, "-"], "gold": 1, "group": "long"},
]
SINGLE = [{"query": QUERY[:n], "choices": [choice], "gold": 0}
          for n, choice in ((5, "="), (3, "1"), (20, "= 4"), (3, "1 = 2"), (6, "= 2\n1 + 2"),
                            (1, "+ 1"), (0, "0 + 0"), (15, "+"), (17, "4"), (28, "= 6"))]


def write_items(name, items):
    Path(name).write_text("".join(json.dumps(item) + "\n" for item in items))


def naive(model, items, pattern, T, encode, eot):
    """The scores of items, one sequence after the other: {group: {name: value}}, and how many are cut.

    Written from the definition, with nothing of eval.py.
    """
    groups = {}
    cut = 0
    for item in items:
        queries = item["query"]
        if isinstance(queries, str):
            queries = [queries] * len(item["choices"])
        sums, right, counts = [], [], []
        lost = False
        for query, choice in zip(queries, item["choices"]):
            kept = query.rstrip()
            start = encode(kept)
            ids = encode(kept + query[len(kept):] + " " + choice)
            end = ids[len(start):]
            start = start or [eot]
            lost = lost or len(end) > T
            end = end[:T]
            while len(start) + len(end) > T + 1:            # from the middle, one by one
                del start[(len(start) - 1) // 2]
                lost = True
            ids = torch.tensor(start + end)
            with torch.no_grad():
                logp = model(ids[None, :-1], pattern)[0].log_softmax(-1)[-len(end):]
            sums.append(sum(logp[i, token].item() for i, token in enumerate(end)))
            right.append(logp.argmax(-1).tolist() == end)
            counts.append(len(end))
        cut += lost
        gold = item["gold"]
        by_size = [s / len(choice) for s, choice in zip(sums, item["choices"])]
        group = groups.setdefault(item.get("group", ""), [])
        group.append({"acc": sums.index(max(sums)) == gold if len(sums) > 1 else right[0],
                      "acc_norm": by_size.index(max(by_size)) == gold,
                      "ll": sums[gold], "tokens": counts[gold]})
    scores = {}
    for name, group in groups.items():
        acc = sum(item["acc"] for item in group) / len(group)
        ll = [item["ll"] for item in group]
        scores[name] = {
            "acc": acc,
            "acc_norm": sum(item["acc_norm"] for item in group) / len(group),
            "ppl": math.exp(-sum(ll) / len(ll)),
            "nats": -sum(ll) / sum(item["tokens"] for item in group),
            "stderr": (acc * (1 - acc) / max(1, len(group) - 1)) ** 0.5,
            "hits": [item["acc"] for item in group],
        }
    return scores, cut


def mean_of(groups):
    whole = {name: np.mean([group[name] for group in groups.values()]) for name in
             ("acc", "acc_norm", "ppl", "nats")}
    whole["stderr"] = sum(group["stderr"] ** 2 for group in groups.values()) ** 0.5 / len(groups)
    return whole


def naive_delta(groups, dense):
    """(mean over groups of the mean difference of hits, its standard error), item by item."""
    means = []
    variances = []
    for name, group in groups.items():
        differences = [int(a) - int(b) for a, b in zip(group["hits"], dense[name]["hits"])]
        n = len(differences)
        mean = sum(differences) / n
        squares = sum((difference - mean) ** 2 for difference in differences)
        means.append(mean)
        variances.append(squares / (n - 1) / n if n > 1 else 0)
    return sum(means) / len(means), sum(variances) ** 0.5 / len(means)


def points(delta, stderr):
    return f"{100 * delta:+.1f} ± {100 * stderr:.1f}"


def records(path="out/choices.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def of_bytes(text):
    return list(text.encode())


def check(record, wanted, names):
    for name in names:
        assert abs(record[name] - wanted[name]) < 1e-5 * (1 + wanted[name]), (name, record, wanted)


def test_choices_are_scored_as_defined(trained, capsys):
    """Against a second, naive scorer, for every record and cell."""
    write_items("mixed.jsonl", ITEMS)
    write_items("single.jsonl", SINGLE)
    on_cpu("eval", "--choices", "mixed.jsonl", "single.jsonl", "--pattern", "D4", "W0", "--verbose")
    out, err = capsys.readouterr()
    found = {(r["pattern"], r["weights"], r["task"]): r for r in records()}
    rows = rows_of(out)
    versions = [("D1", "dense"), ("D4", "switched"), ("D4", "adapted"), ("W0", "switched")]
    assert list(rows) == versions and len(found) == 8
    accs = set()
    for pattern, weights in versions:
        path = "out/D4.pt" if weights == "adapted" else trained
        model, _ = load_checkpoint(path)
        groups, cut = naive(model, ITEMS, pattern, 32, of_bytes, 256)
        record = found[pattern, weights, "mixed"]
        check(record, mean_of(groups), ["acc", "acc_norm", "nats", "stderr"])
        assert record["ppl"] is None and record["items"] == 10 and record["cut"] == cut == 3
        acc, stderr, norm = (100 * record[name] for name in ("acc", "stderr", "acc_norm"))
        assert rows[pattern, weights]["mixed"] == f"{acc:.1f} ± {stderr:.1f} / {norm:.1f}, 3 cut"
        details = [row for row in table(out, of=2) if row["task"] == "mixed"
                   and (row["pattern"], row["weights"]) == (pattern, weights)]
        assert [row["group"] for row in details] == list(groups)
        assert [float(row["scores"].split()[0]) for row in details] == [
            round(100 * group["acc"], 1) for group in groups.values()]
        groups, _ = naive(model, SINGLE, pattern, 32, of_bytes, 256)
        record = found[pattern, weights, "single"]
        check(record, groups[""], ["acc", "ppl", "nats", "stderr"])
        assert record["acc_norm"] is None and record["model"] == "RAT+ (out)"
        assert rows[pattern, weights]["single"].endswith(f"ppl {groups['']['ppl']:.4g}")
        accs.add(record["acc"])
    assert max(accs) > 0, "the likeliest token is right somewhere"
    assert "\rD4 adapted mixed: 100%, ETA 0 s" in err


def test_delta_pairs_the_items_with_those_of_the_dense_row_of_the_same_model(trained, capsys):
    attention_only("plain", context=8)
    random = np.random.default_rng(0)
    grouped = []
    for i in range(36):
        query, *choices = ["".join(map(str, random.integers(0, 10, n))) for n in (5, 3, 3)]
        grouped.append({"query": query, "choices": choices, "gold": i % 2,
                        "group": "aaaaabbbc"[i % 9]})
    files = {"grouped": grouped, "single": SINGLE}
    for name, items in files.items():
        write_items(f"{name}.jsonl", items)
    on_cpu("eval", "--choices", "grouped.jsonl", "single.jsonl", "--compare", "out", "plain",
           "--pattern", "D4", "W0")
    out = capsys.readouterr().out
    names = "model", "pattern", "weights"
    rows = {tuple(row[name] for name in names): row for row in table(out, of=1)}
    assert list(rows) == [
        ("RAT+ (out)", "D4", "switched"), ("RAT+ (out)", "D4", "adapted"),
        ("RAT+ (out)", "W0", "switched"), ("attention-only (plain)", "D4", "switched"),
        ("attention-only (plain)", "W0", "switched")]
    dense = {}
    unequal = set()
    for record in records():
        label = tuple(record[name] for name in names)
        model, pattern, weights = label
        folder, T = ("plain", 8) if "plain" in model else ("out", 32)
        weights_of, _ = load_checkpoint(f"{folder}/{'D4' if weights == 'adapted' else 'dense'}.pt")
        task = record["task"]
        groups, _ = naive(weights_of, files[task], pattern, T, of_bytes, 256)
        if weights == "dense":
            dense[model, task] = groups
            assert record["delta"] is record["delta_stderr"] is None and label not in rows
            continue
        delta, stderr = naive_delta(groups, dense[model, task])
        assert abs(record["delta"] - delta) < 1e-9, (record, delta)
        assert abs(record["delta_stderr"] - stderr) < 1e-9, (record, stderr)
        assert rows[label][task] == points(record["delta"], record["delta_stderr"])
        if delta and stderr:
            unequal.add((model, task))
    assert len(records()) == 14
    for model in ("RAT+ (out)", "attention-only (plain)"):
        assert (model, "grouped") in unequal, "a pattern changes hits of several groups"


def test_delta_needs_a_dense_row(trained, capsys):
    write_items("mixed.jsonl", ITEMS)
    on_cpu("eval", "--choices", "mixed.jsonl", "--checkpoint", "out/D4.pt",
           "--pattern", "D1")
    on_cpu("eval", "--choices", "mixed.jsonl", "--pattern", "D1")
    assert capsys.readouterr().out.count("\n|---") == 2, "no second table"
    assert [(r["pattern"], r["weights"], r["delta"], r["delta_stderr"]) for r in records()] == [
        ("D1", "switched", None, None), ("D4", "adapted", None, None), ("D1", "dense", None, None)]


@needs_gpt2
def test_choices_in_gpt2_tokens(capsys):
    torch.manual_seed(0)
    os.mkdir("out")
    model = RATPlus(RATConfig(50304, 1, 2, 16))
    save_checkpoint("out/dense.pt", model, tokenizer="gpt2", pattern="D1")
    write_items("mixed.jsonl", ITEMS)
    on_cpu("eval", "--choices", "mixed.jsonl", "--context", 16, "--pattern", "D4")
    import tiktoken
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    for record in records():
        groups, cut = naive(model, ITEMS, record["pattern"], 16, encode, 50256)
        check(record, mean_of(groups), ["acc", "acc_norm", "nats", "stderr"])
        assert record["cut"] == cut > 0 and record["context"] == 16


def test_choices_of_token_ids_for_the_authors_checkpoint():
    """As lists, or written out; the two are the same but for the size that acc_norm divides by."""
    items = [{"query": [1, 2, 3], "choices": [[4, 5], [6]], "gold": 0},
             {"query": [[7], [8, 9]], "choices": [[10, 11, 12], [10]], "gold": 1},
             {"query": [], "choices": [[4], [5]], "gold": 1}]
    write_items("ids.jsonl", items)
    write_items("texts.jsonl", [
        {"query": "1 2 3", "choices": ["4 5", "6"], "gold": 0},
        {"query": ["7", "8 9"], "choices": ["10 11 12", "10"], "gold": 1},
        {"query": "", "choices": ["4", "5"], "gold": 1}])
    flags = ["--checkpoint", OFFICIAL, "--pattern", "D4", "--eot", 2]
    on_cpu("eval", "--choices", "ids.jsonl", "texts.jsonl", *flags)
    model, _ = load_checkpoint(OFFICIAL)
    sums = []
    with torch.no_grad():
        for start, end in (([1, 2, 3], [4, 5]), ([8, 9], [10]), ([2], [5])):
            ids = torch.tensor(start + end)
            logp = model(ids[None, :-1], "D4")[0].log_softmax(-1)[-len(end):]
            sums.append(logp.gather(1, torch.tensor(end)[:, None]).sum().item())
    for record in records()[2:]:
        assert record["pattern"] == "D4" and abs(record["nats"] + sum(sums) / 4) < 1e-5
    assert len(records()) == 4
    refused("eval", "--choices", "ids.jsonl", "--checkpoint", OFFICIAL, why="ids.jsonl, line 3: ")


def test_a_limit_takes_the_first_items_and_xz_is_unpacked(trained, capsys):
    text = "".join(json.dumps(item) + "\n" for item in ITEMS)
    with lzma.open("mixed.jsonl.xz", "wt", encoding="utf-8") as f:
        f.write("\ufeff" + text)
    write_items("first.jsonl", ITEMS[:3])
    flags = ["--pattern", "D1", "--eval-batch"]
    on_cpu("eval", "--choices", "mixed.jsonl.xz", "first.jsonl", "--limit", 3, *flags, 1)
    on_cpu("eval", "--choices", "first.jsonl", *flags, 30)
    limited, first, again = records()
    assert limited["task"] == "mixed" and limited["items"] == 3
    for name in ("acc", "acc_norm", "nats", "stderr"):
        assert limited[name] == first[name] and abs(again[name] - first[name]) < 1e-6, name
    assert "mixed" in capsys.readouterr().out


def test_the_average_is_over_the_six_of_the_paper(trained, capsys):
    for i, name in enumerate(evaluation.SIX):
        write_items(f"{name}.jsonl", SINGLE if name == "lambada" else ITEMS[i:i + 4])
    write_items("sciq.jsonl", ITEMS)
    files = [f"{name}.jsonl" for name in (*evaluation.SIX, "sciq")]
    on_cpu("eval", "--choices", *files, "--pattern", "D4")
    out = capsys.readouterr().out
    rows = rows_of(out)
    for (pattern, weights), row in rows.items():
        accs = [r["acc"] for r in records() if r["task"] != "sciq"
                and (r["pattern"], r["weights"]) == (pattern, weights)]
        assert len(accs) == 6 and row["average of six"] == f"{100 * np.mean(accs):.1f}"
    assert len(rows) == 3
    deltas = table(out, of=1)
    assert [row["weights"] for row in deltas] == ["switched", "adapted"]
    for row in deltas:
        six = [r for r in records() if r["task"] != "sciq" and r["weights"] == row["weights"]]
        delta = sum(r["delta"] for r in six) / 6
        stderr = sum(r["delta_stderr"] ** 2 for r in six) ** 0.5 / 6
        assert len(six) == 6 and row["average of six"] == points(delta, stderr)
    assert delta and stderr, "the adapted weights score otherwise"
    on_cpu("eval", "--choices", *files[1:], "--pattern", "D4")
    assert "average" not in capsys.readouterr().out


def test_choices_of_several_runs(trained, capsys):
    attention_only("plain", context=8)
    write_items("single.jsonl", SINGLE)
    on_cpu("eval", "--choices", "single.jsonl", "--compare", "out", "plain", "--pattern", "D1",
           "--out", "new")
    models = {row["model"]: row for row in table(capsys.readouterr().out)}
    assert list(models) == ["RAT+ (out)", "attention-only (plain)"]
    contexts = [(record["model"], record["context"]) for record in records("new/choices.jsonl")]
    assert contexts == [("RAT+ (out)", 32), ("attention-only (plain)", 8)]
    model, _ = load_checkpoint("plain/dense.pt")
    groups, _ = naive(model, SINGLE, "D1", 8, of_bytes, 256)
    check(records("new/choices.jsonl")[1], groups[""], ["acc", "ppl", "nats"])


def test_the_processes_share_the_batches(trained, monkeypatch):
    model, meta = load_checkpoint(trained)
    config = train.merge(evaluation.eval_flags().defaults, dict(
        context=32, eot=256, eval_batch=2, device="cpu", dtype="float32"))
    write_items("mixed.jsonl", ITEMS)
    items = evaluation.read_items("mixed.jsonl", train.Tokenizer("bytes"), config, 320)
    choices = [choice for item in items for choice in item.choices]
    arguments = model, choices, Pattern.parse("D4"), config, "title"
    whole = evaluation.score_all(*arguments)
    monkeypatch.setattr(evaluation, "WORLD", 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(evaluation, "RANK", rank)
        parts.append(evaluation.score_all(*arguments).copy())
    assert (parts[0] != 0).any() and (parts[1] != 0).any()
    assert np.allclose(parts[0] + parts[1], whole)


@pytest.mark.parametrize("line, why", [
    ("{", "line 2: Expecting"),
    ("[1]", "line 2: it is not"),
    ('{"query": "a", "choices": ["b"]}', "line 2: it is not"),
    ('{"query": "a", "choices": [], "gold": 0}', "line 2: choices is not"),
    ('{"query": "a", "choices": "bc", "gold": 0}', "line 2: choices is not"),
    ('{"query": "a", "choices": ["b", ""], "gold": 0}', "line 2: choices is not"),
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold 2 is not"),
    ('{"query": "a", "choices": ["b", "c"], "gold": -1}', "line 2: gold -1 is not"),
    ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "line 2: gold '0' is not"),
    ('{"query": "a", "choices": ["b", "c"], "gold": true}', "line 2: gold True is not"),
    ('{"query": ["a"], "choices": ["b", "c"], "gold": 0}', "line 2: 1 queries for 2 choices"),
    ('{"query": 5, "choices": ["b", "c"], "gold": 0}', "line 2: query and choices"),
    ('{"query": "a", "choices": ["b", [5]], "gold": 0}', "line 2: query and choices"),
    ('{"query": [1, 2.5], "choices": [[3]], "gold": 0}', "line 2: query and choices"),
    ('{"query": [1], "choices": [[320]], "gold": 0}', "line 2: a token is not"),
    ('{"query": [1], "choices": [[-1]], "gold": 0}', "line 2: a token is not"),
    ('{"query": "\\ud800", "choices": ["b"], "gold": 0}', "line 2: "),
    ("", "line 2: "),
    (b"\xff", "line 2: "),
])
def test_bad_lines_are_refused_by_file_and_number(in_story, monkeypatch, line, why):
    good = json.dumps(ITEMS[0]).encode()
    line = line if isinstance(line, bytes) else line.encode()
    Path("bad.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    monkeypatch.setattr(evaluation, "score_batch", None)            # noticed before anything is scored
    refused("eval", "--choices", "bad.jsonl", why=f"bad.jsonl, {why}")
    on_limit = ["--choices", "bad.jsonl", "--limit", 1]
    with pytest.raises(TypeError):                                  # not read any further, scored
        on_cpu("eval", *on_limit)


def test_bad_files_are_refused(trained):
    write_items("a.jsonl", ITEMS)
    os.mkdir("other")
    write_items("other/a.jsonl", ITEMS)
    Path("empty.jsonl").touch()
    Path("torn.jsonl.xz").write_bytes(lzma.compress(json.dumps(ITEMS[0]).encode() * 9)[:40])
    Path("text.jsonl.xz").write_text("not packed")
    for files, why in ((["nowhere.jsonl"], "nowhere.jsonl"), (["empty.jsonl"], "empty.jsonl: no item"),
                       (["a.jsonl", "other/a.jsonl"], "two files are called a"),
                       (["torn.jsonl.xz"], "torn.jsonl.xz"), (["text.jsonl.xz"], "text.jsonl.xz")):
        refused("eval", "--choices", *files, why=why)


def test_scores_that_are_not_finite_are_no_scores(trained):
    model, _ = load_checkpoint(trained)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    edit(trained, lambda meta: None, model)
    write_items("mixed.jsonl", ITEMS)
    refused("eval", "--choices", "mixed.jsonl", why="not finite")
    assert not os.path.exists("out/choices.jsonl")


# --------------------------------------------------------------------------------------------------
# Retrieval

NEEDLE = r" Safe ([\w-]+): ([\w-]+)\."
QUESTION = r"\nOpen ([\w, -]+): ([\w, -]+)\."
BARE = r" ([a-z]+-[a-z]+) ([0-9]+)\."
MANY = {"multikey-1": 4, "multikey-2": 10, "multikey-3": 3, "multivalue": 4, "multiquery": 4,
        "recall": 10}                   # values that the longest samples ask for; the others: one


def text_of(tokens, tokenizer="bytes"):
    return "".join(map(train.Tokenizer(tokenizer).decode, tokens.tolist()))


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("task", evaluation.TASKS)
def test_the_answers_of_a_task_are_in_its_text(task, tokenizer):
    """One question at the end in evaluation, many in training. All that is asked is answered."""
    niah = evaluation.Niah(tokenizer, 0, 0)
    twin = evaluation.Niah(tokenizer, 0, 0)
    shape = evaluation.TASKS[task]
    for rounds in (1, 16):
        counts = set()
        for number in range(24):
            T = (256, 400, 1400)[number % 3]
            sample = niah.sample(number, T, [task], rounds)
            again = twin.sample(number, T, [task], rounds)
            assert np.array_equal(sample.tokens, again.tokens) and sample.values == again.values
            assert len(sample.tokens) == len(sample.answer) == T, "the context is filled"
            text = text_of(sample.tokens, tokenizer)
            n = len(sample.values)
            pairs = re.findall(NEEDLE, text)
            asked = re.findall(QUESTION, text)
            if task == "recall":
                pairs = re.findall(BARE, text)
                pairs, asked = pairs[:-n], pairs[-n:]
            assert n == len(asked) * shape.asked and len(asked) <= rounds
            for keys, told in asked:
                held = [value for key, value in pairs if key in keys.split(", ")]
                assert sorted(told.split(", ")) == sorted(held), "the text holds them, and no others"
            answers = text_of(sample.tokens[sample.answer], tokenizer)
            assert answers == "".join(f" {told}." for _, told in asked)
            assert ", ".join(told for _, told in asked) == ", ".join(sample.values)
            assert text.endswith(sample.values[-1] + ".")
            hidden = shape.needles
            assert len(pairs) > n if shape.of_needles else len(pairs) == hidden
            counts.add(n)
        assert max(counts) >= (MANY.get(task, 1) if rounds > 1 else shape.asked)
        assert min(counts) == shape.asked


def test_samples_are_those_of_the_published_figures():
    """CRC32 of evaluation samples, made when the README's retrieval was measured."""
    niah = evaluation.Niah("bytes", 0, 1)
    found = 0
    for task in evaluation.TASKS:
        for number in range(5):
            tokens, answer, values = niah.sample(number, 400, [task])
            data = tokens.astype("<u2").tobytes() + answer.tobytes() + "|".join(values).encode()
            found = zlib.crc32(data, found)
    assert found == 4152532715


def test_evaluation_shares_no_key_and_no_value_with_training():
    seen = []
    for split in (0, 1):
        niah = evaluation.Niah("bytes", 0, split)
        pairs = []
        for number in range(150):
            pairs += re.findall(NEEDLE, text_of(niah.sample(number, 2000, evaluation.RULER).tokens))
        keys, values = map(set, zip(*pairs))
        assert min(len(keys), len(values)) > 1000
        seen.append((keys, values))
    assert not seen[0][0] & seen[1][0] and not seen[0][1] & seen[1][1]
    numbers = [value for value in seen[1][1] if len(value) == 7]
    for i in range(1, 7):
        shares = [sum(value[i] == digit for value in numbers) / len(numbers) for digit in "0123456789"]
        assert max(shares) - min(shares) < 0.06, "no digit gives away the half of its number"


def test_needles_lie_at_all_depths():
    niah = evaluation.Niah("bytes", 0, 1)
    for task in ("single-1", "multikey-1", "multikey-2"):
        depths = []
        for number in range(64):
            sample = niah.sample(number, 2000, [task])
            depths.append(text_of(sample.tokens).index(sample.values[0]) / 2000)
        counts, _ = np.histogram(depths, 8, (0, 1))
        assert counts.min() >= 5 and counts.max() <= 11, (task, counts)


@pytest.fixture
def tuning(capsys):
    """The folder niah of 40 samples of 300 tokens."""
    call("eval", "--niah", "--write", "niah", "--samples", 40, "--context", 300)
    assert "40 samples" in capsys.readouterr().out
    return Path("niah")


def test_data_for_fine_tuning_are_samples_one_after_another(tuning):
    for split, name, n in ((0, "train", 40), (1, "val", 2)):
        tokens = np.fromfile(tuning / f"{name}.bin", "<u2").reshape(-1, 300)
        mask = np.fromfile(tuning / f"{name}.mask.bin", np.uint8).reshape(-1, 300)
        niah = evaluation.Niah("bytes", 0, split)
        assert len(tokens) == len(mask) == n
        for number in range(n):
            sample = niah.sample(number, 300, evaluation.RULER, rounds=16)
            assert np.array_equal(tokens[number], sample.tokens)
            assert np.array_equal(mask[number], sample.answer.astype(np.uint8))
    lengths = set(mask.sum(1)) | set(np.fromfile(tuning / "train.mask.bin", np.uint8)
                                     .reshape(-1, 300).sum(1))
    assert len(lengths) > 4, "a number, four, a uuid and so on"


def test_the_flags_of_write(tuning):
    def written(*flags):
        shutil.rmtree("other", ignore_errors=True)
        call("eval", "--niah", "--write", "other", "--samples", 40, *flags)
        return Path("other/train.bin").read_bytes()

    first = (tuning / "train.bin").read_bytes()
    assert written("--context", 300) == first != written("--context", 300, "--seed", 1)
    assert len(written()) == 2 * 40 * 1024
    text = bytes(np.frombuffer(written("--tasks", "recall"), "<u2").astype(np.uint8)).decode()
    assert len(re.findall(BARE, text)) > 1000 and "Safe" not in text, "recall only"
    refused_to_write = ["eval", "--niah", "--write", "other"]
    with pytest.raises(ValueError, match="name a new folder"):
        call(*refused_to_write)
    with pytest.raises(ValueError, match="--context 242 is too short for multikey-3"):
        call("eval", "--niah", "--write", "short", "--context", 242, "--tasks", "multikey-3")
    with pytest.raises(ValueError, match="--tokenizer bytes or gpt2"):
        call("eval", "--niah", "--write", "short", "--tokenizer", "ids")
    assert not os.path.exists("short")


def test_fine_tuning_has_a_loss_on_the_answers_only(trained, tuning):
    """train.py reads what --write wrote: whole samples, the next token of an answer as target."""
    config = train.merge(evaluation.eval_flags().defaults, dict(
        data=["niah"], context=300, batch_size=8, device="cpu", dtype="float32", tokenizer="bytes"))
    data = train.load_data(config, 320)
    niah = evaluation.Niah("bytes", 0, 0)
    windows = train.in_order(0, config, data.train)
    idx, targets = train.cut(data.train, windows, config.eot)
    for (_, place), x, y in zip(windows, idx, targets):
        assert place % 300 == 0
        sample = niah.sample(place // 300, 300, evaluation.RULER, rounds=16)
        assert x.tolist() == sample.tokens.tolist()
        wanted = np.where(sample.answer, sample.tokens, -100)
        assert y[:-1].tolist() == wanted[1:].tolist() and y[-1] == -100


def test_the_share_of_the_values_that_is_found():
    assert evaluation.share_found(" 1234567, AB-C.", ["1234567", "ab-c"]) == 1
    assert evaluation.share_found(" 12345678", ["1234567", "7654321", "ab-c", "45"]) == 0.5
    assert evaluation.share_found("", ["1234567"]) == 0


def test_retrieval_scores_what_the_model_goes_on_with():
    niah = evaluation.Niah("bytes", 0, 1)
    sizes = []
    right = []

    class Every3rd:
        """A model that finds half of the values if the first one is a multiple of 3, else nothing."""

        def generate(self, idx, n_new, pattern, temperature):
            assert pattern == "D4" and temperature == 0 and idx.shape[1] + n_new == 400
            new = torch.zeros(len(idx), n_new, dtype=torch.long)
            for i, prompt in enumerate(idx):
                sample = niah.sample(i + sum(sizes), 400, ["multivalue"])
                assert prompt.tolist() == sample.tokens[~sample.answer].tolist()
                right.append(int(sample.values[0]) % 3 == 0)
                if right[-1]:
                    text = f" {sample.values[2]}, {sample.values[0]}.".encode()
                    new[i, :len(text)] = torch.tensor(list(text))
            sizes.append(len(idx))
            return torch.cat((idx, new), dim=1)

    config = train.merge(dict(context=400, samples=30, eval_batch=8, tokenizer="bytes", device="cpu"))
    score = evaluation.retrieve(Every3rd(), niah, "multivalue", "D4", config)
    assert sizes == [8, 8, 8, 6] and 0 < sum(right) < 30
    assert abs(score - 100 * sum(right) / 60) < 1e-9


def test_a_run_is_fine_tuned_in_each_pattern_and_scored(trained, tuning, capsys):
    """The dense weights with ARL, the adapted ones in D4 alone, then all side by side."""
    flags = ["--data", "niah", "--context", 300, "--steps", 2, "--out", "tuned", "--batch-size", 2]
    parent = load_checkpoint("out/D4.pt")[1]["parent"]
    for name in ("dense", "D4"):
        on_cpu("train", "--checkpoint", f"out/{name}.pt", *flags)
        meta = load_checkpoint(f"tuned/{name}.pt")[1]
        assert meta["parent"] == parent and meta["tokenizer"] == "bytes"
    capsys.readouterr()
    for _ in range(2):
        on_cpu("eval", "--niah", "--out", "tuned", "--samples", 3, "--tasks", "single-1", "recall")
    out = capsys.readouterr().out
    assert "left out" not in out
    rows = [list(row.values())[:3] for row in table(out)]
    assert rows == [["RAT+ (tuned)", *row] for row in (
        ("D1", "dense"), ("D4", "switched"), ("D4", "adapted"), ("W0", "switched"))]
    assert list(table(out)[0])[3:] == ["single-1", "recall", "average"]
    cells = records("tuned/niah.jsonl")
    assert len(cells) == 16, "a second call is appended"
    names = [(cell["pattern"], cell["weights"], cell["task"]) for cell in cells]
    assert names[3:5] == [("D4", "switched", "recall"), ("D4", "adapted", "single-1")]
    for cell in cells:
        assert cell["context"] == 300 and cell["samples"] == 3 and cell["tokenizer"] == "bytes"
        assert 0 <= cell["score"] <= 100 and cell["model"] == "RAT+ (tuned)" and cell["seed"] == 0


def test_retrieval_runs_each_version_on_samples_of_its_seed(trained, capsys, monkeypatch):
    """Which weights, pattern, split and seed a row is of."""
    seen = []

    def retrieve(model, niah, task, pattern, config):
        seen.append((niah.split, niah.seed, str(pattern), config.samples))
        return float(model.embed.weight.equal(adapted)) * 100

    adapted = load_checkpoint("out/D4.pt")[0].embed.weight
    monkeypatch.setattr(evaluation, "retrieve", retrieve)
    on_cpu("eval", "--niah", "--pattern", "D4", "--context", 300, "--seed", 5, "--tasks", "recall")
    assert seen == [(1, 5, "D1", 64), (1, 5, "D4", 64), (1, 5, "D4", 64)]
    rows = rows_of(capsys.readouterr().out)
    assert [row["average"] for row in rows.values()] == ["0.0", "0.0", "100.0"]


# --------------------------------------------------------------------------------------------------
# Sampling

def sampled(capsys, *flags):
    """(the text that sample.py prints, prompt included; its last line; what it says on stderr)."""
    on_cpu("sample", *flags)
    out, err = capsys.readouterr()
    body = out.split(" ms\n\n", 1)[1]
    text, last = body.rsplit("\n\n", 1)
    return text, last, err


def greedy(path, prompt, n, pattern):
    """What the model at `path` goes on with, as text."""
    model, _ = load_checkpoint(path)
    ids = model.generate(torch.tensor([of_bytes(prompt)]), n, pattern, temperature=0)[0].tolist()
    return "".join(map(train.Tokenizer("bytes").decode, ids))


def test_a_text_is_what_the_model_generates_under_the_pattern(trained, capsys):
    for flags, path, pattern in (([], trained, "D1"), (["--pattern", "D4"], "out/D4.pt", "D4"),
                                 (["--pattern", "D8/D1"], "out/D8_D1.pt", "D8/D1"),
                                 (["--pattern", "N4K2:minmax"], "out/N4K2-minmax.pt", "N4K2:minmax")):
        text, last, err = sampled(capsys, *flags, "--prompt", "1 + 2 =", "--tokens", 60,
                                  "--temperature", 0)
        assert text == greedy(path, "1 + 2 =", 60, pattern), pattern
        assert err == "" and "prefill 7 tokens" in last
    model, _ = load_checkpoint(trained)
    for pattern in ("D1", "D4"):
        _, last, _ = sampled(capsys, "--pattern", pattern, "--prompt", "1 +", "--tokens", 30)
        sizes = [model.new_cache(1, 32, p).nbytes for p in (pattern, "D1")]
        wanted = "cache {:.3f} MB, dense {:.3f} MB".format(*(size / 1e6 for size in sizes))
        assert wanted in last and f"({sizes[0] / sizes[1]:.1%})" in last
        assert re.search(r"prefill 3 tokens [0-9.]+ ms \| decode [0-9.]+ tok/s", last)


def test_other_weights_are_used_with_a_warning(trained, capsys):
    for flags, path, pattern in ((["--pattern", "D16"], trained, "D16"),
                                 (["--pattern", "N4K2"], trained, "N4K2"),
                                 (["--pattern", "D8", "--checkpoint", "out/D4.pt"], "out/D4.pt", "D8")):
        text, _, err = sampled(capsys, *flags, "--prompt", "1", "--tokens", 20, "--temperature", 0)
        assert text == greedy(path, "1", 20, pattern)
        own = "D1" if path == trained else "D4"
        assert f"warning: {path} was trained for {own}, not for {pattern}" in err
        assert err.count("\n") == 1
    text, _, err = sampled(capsys, "--tokens", 1)
    assert text.startswith("def ") and err == ""


def test_the_flags_of_sampling(trained, capsys):
    """Seeds repeat a text; temperature 0, the 1 likeliest and the fewest tokens are all greedy."""
    flags = ["--tokens", 40, "--prompt", "1 +"]
    first, _, _ = sampled(capsys, *flags)
    assert sampled(capsys, *flags, "--seed", 0)[0] == first != sampled(capsys, *flags, "--seed", 1)[0]
    likeliest = greedy(trained, "1 +", 40, "D1")
    for extra in (["--temperature", 0], ["--top-k", 1], ["--top-p", 1e-6], ["--temperature", 1e-5]):
        assert sampled(capsys, *flags, *extra, "--seed", 3)[0] == likeliest, extra
    assert first != likeliest
    hot = sampled(capsys, *flags, "--temperature", 100)[0]
    cold = sampled(capsys, *flags, "--temperature", 0.3)[0]
    assert len(set(cold)) < len(set(hot))
    assert sampled(capsys, "--prompt", "1 +", "--tokens", 9, "--seed", 0)[0] == first[:12]
    torch.manual_seed(7)                                        # of the caller, without effect
    assert sampled(capsys, *flags)[0] == first


def test_a_text_ends_with_its_document(trained, capsys):
    model, _ = load_checkpoint(trained)
    with torch.no_grad():
        model.norm.weight.zero_()                               # all logits are alike: 0
    edit(trained, lambda meta: meta.update(tokenizer="bytes"), model)
    text, last, _ = sampled(capsys, "--tokens", 3, "--prompt", "a", "--temperature", 0)
    assert text == "a\0\0\0"
    with torch.no_grad():
        model.norm.weight.fill_(1)
        model.embed.weight[256] *= 1e4
    edit(trained, lambda meta: None, model)
    text, last, _ = sampled(capsys, "--tokens", 300, "--prompt", "a", "--max-len", 400, "--seed", 1)
    if "<|endoftext|>" in text:
        assert text.endswith("<|endoftext|>")
    assert text.count("<|endoftext|>") <= 1


def test_the_cache_has_the_room_that_is_asked_for(trained, capsys):
    model, _ = load_checkpoint(trained)
    _, last, _ = sampled(capsys, "--prompt", "1234", "--tokens", 5, "--max-len", 100)
    assert f"dense {model.new_cache(1, 100).nbytes / 1e6:.3f} MB" in last
    text, last, _ = sampled(capsys, "--prompt", "1234", "--tokens", 5, "--max-len", 8)
    assert f"dense {model.new_cache(1, 8).nbytes / 1e6:.3f} MB" in last and len(text) > 4
    refused("sample", "--prompt", "1234", "--tokens", 5, "--max-len", 7,
            why="--max-len 7: a prompt of 4 tokens and --tokens 5 need 8")
    assert "warmed up" not in capsys.readouterr().out
    _, last, _ = sampled(capsys, "--tokens", 3, "--dtype", "bfloat16", "--max-len", 100)
    assert f"dense {model.bfloat16().new_cache(1, 100).nbytes / 1e6:.3f} MB" in last


def test_files_of_a_previous_dense_run_are_not_used(trained, capsys):
    old = greedy("out/D4.pt", "1", 20, "D4")
    shutil.copy(trained, "old.pt")
    edit(trained, lambda meta: None, RATPlus(RATConfig(320, 2, 2, 32)))
    refused("sample", "--pattern", "D4", why="out/D4.pt was adapted from other weights than out/dense.pt")
    flags = ["--pattern", "D4", "--prompt", "1", "--tokens", 20, "--temperature", 0]
    assert sampled(capsys, *flags, "--checkpoint", "out/D4.pt")[0] == old
    os.remove(trained)
    assert sampled(capsys, *flags)[0] == old, "with nothing to compare it with"
    shutil.copy("old.pt", trained)
    parent = load_checkpoint("out/D4.pt")[1]["parent"]
    edit(trained, lambda meta: meta.update(parent=parent), RATPlus(RATConfig(320, 2, 2, 32)))
    assert sampled(capsys, *flags)[0] == old, "both were fine-tuned from one run"


def test_the_authors_checkpoint_takes_and_gives_ids(capsys):
    text, _, _ = sampled(capsys, "--checkpoint", OFFICIAL, "--prompt", "1 2 3", "--pattern", "D4",
                         "--tokens", 6, "--temperature", 0)
    model, _ = load_checkpoint(OFFICIAL)
    ids = model.generate(torch.tensor([[1, 2, 3]]), 6, "D4", temperature=0)[0].tolist()
    assert list(map(int, text.split())) == ids


def test_weights_that_are_nan_give_no_text(trained, capsys):
    model, _ = load_checkpoint(trained)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    edit(trained, lambda meta: None, model)
    refused("sample", why="NaN")
    assert "warmed up" not in capsys.readouterr().out


def test_a_prompt_that_is_no_utf8_on_an_ascii_terminal(trained, monkeypatch, capsys):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    flags = "--device cpu --tokens 60 --temperature 3 --prompt".split()
    as_script("sample", monkeypatch, *flags, "caf\udce9")
    out = screen.getvalue()
    assert b"caf" in out and b"tok/s" in out and b"prefill 4 tokens" in out
    assert out.isascii() and capsys.readouterr().err == ""


def test_a_reader_that_leaves_ends_sample_without_a_word(trained):
    """Through the shell, while tokens are printed."""
    flags = "--device cpu --tokens 1000 --tokenizer ids --prompt 1".split()
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert any(b"warmed up" in line for line in process.stdout)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


# --------------------------------------------------------------------------------------------------
# What decoding costs

def test_bench_measures_each_pattern_against_dense(capsys, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda: None)             # slow in a process of many modules
    patterns = ["D1", "D4W3/D1", "D4N4K2"]
    flags = ["--contexts", 8, 20, "--tokens", 2, "--max-batch", 3]
    on_cpu("sample", "--bench", "--pattern", *patterns[1:], *flags)
    out = capsys.readouterr().out
    rows = table(out)
    names = [(row["context"], row["pattern"], row["batch"]) for row in rows]
    assert names == [(T, pattern, batch) for T in ("8", "20") for pattern in patterns for batch in "13"]
    shape = RATPlus(RATConfig(32000, 4, 4, 128))                # the laptop's
    assert f"{sum(p.numel() for p in shape.parameters()) / 1e6:.2f}M parameters" in out
    for row in rows:
        batch = int(row["batch"])
        assert (row["prefill ms"] == "random") == (batch == 3)
        cache = shape.new_cache(batch, int(row["context"]) + 4, row["pattern"])
        assert row["cache MB"] == f"{cache.nbytes / 1e6:.1f}"
        steps = torch.arange(int(row["context"]) + 2, int(row["context"]) + 4)
        assert row["read MB"] == f"{cache.bytes_read(steps) / 1e6:.1f}"
        assert abs(float(row["tok/s"]) - 1e3 * batch / float(row["ms per step"])) < 0.6
        dense = next(r for r in rows if r["pattern"] == "D1"
                     and (r["context"], r["batch"]) == (row["context"], row["batch"]))
        ratio = float(dense["ms per step"]) / float(row["ms per step"])
        assert abs(float(row["of dense"].strip("x")) - ratio) < 0.006 + 0.01 * ratio


def test_bench_of_a_checkpoint_tries_a_smaller_batch_if_memory_runs_out(trained, capsys, monkeypatch):
    tried = []
    measure = sample.measure

    def scarce(model, context, pattern, batch, random, flags):
        tried.append((str(pattern), batch, model.config.vocab_size))
        if batch > 6 or str(pattern) == "D4":
            raise MemoryError
        found = measure(model, context, pattern, batch, random, flags)
        states = 2 * 2 * batch * 32 * 4                             # of 2 layers, k~ and v~
        weights = sum(p.nbytes for p in model.parameters())
        assert found.moved == found.read + weights + states
        return found

    monkeypatch.setattr(sample, "measure", scarce)
    monkeypatch.setattr("gc.collect", lambda: None)
    on_cpu("sample", "--bench", "--checkpoint", trained, "--pattern", "D4", "--contexts", 8,
           "--tokens", 1)
    rows = table(capsys.readouterr().out)
    assert [row["batch"] for row in rows] == ["1", "6", "1", "1"], "8 and 7 did not fit"
    assert rows[2]["prefill ms"] == rows[3]["prefill ms"] == "out of memory"
    assert tried[:4] == [("D1", 1, 320), ("D1", 8, 320), ("D1", 7, 320), ("D1", 6, 320)]


# --------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("name, flags, why", [
    ("eval", ["--out", "nowhere"], "nowhere/dense.pt"),
    ("eval", ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ("eval", ["--checkpoint", OFFICIAL], "--data is needed"),
    ("eval", ["--checkpoint", OFFICIAL, "--niah"], "--tokenizer bytes or gpt2"),
    ("eval", ["--checkpoint", OFFICIAL, "--niah", "--tokenizer", "bytes"], "the vocabulary is too small"),
    ("eval", ["--checkpoint", OFFICIAL, "--data", "text", "--context", "8"], "needs a tokenizer"),
    ("eval", ["--pattern", "K16"], "'K16'"),
    ("eval", ["--pattern", "D1/D2/D4"], "3 head groups do not divide 2 heads"),
    ("eval", ["--score", "minmax"], "unrecognized arguments: --score"),
    ("eval", ["--niah", "--context", "40"], "--context 40 is too short for single-1"),
    ("eval", ["--niah", "--samples", "0"], "--samples"),
    ("eval", ["--niah", "--tasks", "multikey-4"], "--tasks"),
    ("eval", ["--samples", "3"], "--samples means nothing without --niah or --choices"),
    ("eval", ["--tasks", "recall"], "--tasks means nothing"),
    ("eval", ["--verbose"], "--verbose means nothing"),
    ("eval", ["--write", "new"], "--write means nothing without --niah"),
    ("eval", ["--niah", "--reach"], "--reach means nothing with --niah"),
    ("eval", ["--niah", "--data", "text"], "--data means nothing with --niah"),
    ("eval", ["--niah", "--choices", "a.jsonl"], "--choices means nothing with --niah"),
    ("eval", ["--niah", "--limit", "3"], "--limit means nothing with --niah"),
    ("eval", ["--choices", "a.jsonl", "--eval-windows", "3"], "--eval-windows means nothing with"),
    ("eval", ["--choices", "a.jsonl", "--limit", "0"], "--limit"),
    ("eval", ["--niah", "--write", "new", "--pattern", "D4"], "--pattern means nothing with --write"),
    ("sample", ["--out", "nowhere"], "nowhere/dense.pt"),
    ("sample", ["--checkpoint", "torn.pt"], "torn.pt: not a whole checkpoint"),
    ("sample", ["--pattern", "D1/D2/D4"], "do not divide"),
    ("sample", ["--pattern", "D4", "D8"], "several patterns are for --bench"),
    ("sample", ["--prompt", ""], "at least one token is needed"),
    ("sample", ["--tokenizer", "ids", "--prompt", "5 99999999999999999999"], "each below 320"),
    ("sample", ["--tokenizer", "ids", "--prompt", "5 " + "9" * 5000], "--prompt '5 999"),
    ("sample", ["--tokenizer", "ids", "--prompt", "320"], "each below 320"),
    ("sample", ["--tokenizer", "ids", "--prompt", "x"], "write token ids"),
    ("sample", ["--temperature", "-1"], "--temperature"),
    ("sample", ["--temperature", "nan"], "--temperature"),
    ("sample", ["--top-p", "2"], "--top-p"),
    ("sample", ["--top-k", "0"], "--top-k"),
    ("sample", ["--tokens", "0"], "--tokens"),
    ("sample", ["--contexts", "8"], "--contexts means nothing without --bench"),
    ("sample", ["--max-batch", "8"], "--max-batch means nothing without --bench"),
    ("sample", ["--preset", "small"], "--preset means nothing without --bench"),
    ("sample", ["--bench", "--prompt", "x"], "--prompt means nothing with --bench"),
    ("sample", ["--bench", "--temperature", "0"], "--temperature means nothing with --bench"),
    ("sample", ["--bench", "--top-k", "1"], "--top-k means nothing with --bench"),
    ("sample", ["--bench", "--out", "out"], "--out means nothing with --bench"),
    ("sample", ["--bench", "--checkpoint", "out/D4.pt", "--preset", "small"], "--preset means nothing"),
    ("sample", ["--bench", "--contexts", "0"], "--contexts"),
    ("sample", ["--bench", "--pattern", "D1/D2/D3"], "do not divide 4 heads"),
])
def test_bad_input_is_an_error_in_words(in_story, name, flags, why):
    Path("torn.pt").write_bytes(in_story.read_bytes()[:5000])
    refused(name, *flags, why=why)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_error_of_a_script_is_one_line_and_status_1(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        as_script(name, monkeypatch, "--pattern", "D")
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and out == ""
    assert err.startswith(f"{name}.py: ") and err.count("\n") == 1, err
