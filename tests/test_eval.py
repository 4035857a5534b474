"""eval.py: loss and cost, benchmarks, retrieval, reach, against naive second versions."""
import argparse
import gzip
import itertools
import json
import lzma
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from model import Pattern, RATConfig, RATPlus, load_checkpoint, save_checkpoint

OFFICIAL = Path(__file__).parent / "golden" / "official_tiny.pth"      # the authors', 37 tokens
VOCABULARY = Path(os.environ.get("TIKTOKEN_CACHE_DIR", "nowhere"),
                  "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
NEEDS_GPT2 = pytest.mark.skipif(not VOCABULARY.exists(),
                                reason="needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")
SHAPE = RATConfig(320, 2, 2, 32)


def new_model(seed, shape=SHAPE):
    """Random weights, larger than usual, so that patterns and seeds differ."""
    torch.manual_seed(seed)
    model = RATPlus(shape)
    with torch.no_grad():
        for p in model.parameters():
            p *= 4 if p.dim() > 1 else 1
    return model


def new_run(folder, seed=0, shape=SHAPE, tokenizer="bytes", adapted=(), **flags):
    """dense.pt as train.py leaves it, and a file of other weights for each adapted pattern."""
    os.makedirs(folder)
    kept = dict(data=[os.path.abspath("text")], context=32, eval_windows=6, eval_batch=4)
    meta = {"tokenizer": tokenizer, "train": {**kept, **flags}}
    model = new_model(seed, shape)
    save_checkpoint(f"{folder}/dense.pt", model, pattern="D1", **meta)
    for i, pattern in enumerate(adapted):
        save_checkpoint(train.file_of(pattern, folder), new_model(seed + 10 + i, shape), **meta,
                        pattern=pattern, parent=train.fingerprint(model))


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A folder of its own, with a run in out and texts in text."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("text")
    for i in range(12):
        Path(f"text/{i}.txt").write_text("".join(f"{i} + {j} = {i + j}\n" for j in range(40)))
    new_run("out", adapted=["D4", "N4K2:minmax"])


def on_cpu(*args):
    evaluation.main(["--device", "cpu", *map(str, args)])


def settings(**changed):
    flags = dict(seed=0, context=400, tokenizer="bytes", eot=None, vocab_size=None, device="cpu")
    return argparse.Namespace(**flags | changed)


def refused(*args, why):
    with pytest.raises((ValueError, OSError)) as error:
        on_cpu(*args)
    assert why in " ".join(str(error.value).split()), error.value


def table(out):
    """{(pattern, weights, model): {column: cell}} of the Markdown table in the output."""
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return {tuple(row[:3]): dict(zip(rows[0], row)) for row in rows[1:]}


def val_windows(n=6, T=32):
    """n windows of T + 1 spread evenly over the validation tokens."""
    tokens = np.fromfile(next(Path(".cache").glob("*/val.bin")), "<u2").astype(np.int64)
    starts = np.linspace(0, len(tokens) - T - 1, n).astype(int)
    return torch.from_numpy(np.stack([tokens[start:start + T + 1] for start in starts]))


@torch.no_grad()
def naive_loss(model, pattern, n=6):
    idx = val_windows(n)
    logits = model(idx[:, :-1], pattern)
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).item()


# ---- Which rows, which losses --------------------------------------------------------------------

def test_a_folder_is_its_dense_weights_and_what_was_adapted_from_them(capsys):
    on_cpu("--eval-batch", 5)
    out = capsys.readouterr().out
    rows = table(out)
    assert [key[:2] for key in rows] == [
        ("D1", "dense"), ("D4", "switched"), ("D4", "adapted"), ("N4K2:minmax", "switched"),
        ("N4K2:minmax", "adapted"), ("W0", "switched")]
    dense, _ = load_checkpoint("out/dense.pt")
    for (pattern, weights, _), row in rows.items():
        path = train.file_of(pattern, "out") if weights == "adapted" else "out/dense.pt"
        wanted = naive_loss(load_checkpoint(path)[0], pattern)
        line = re.search(f"^{pattern} {weights}: loss ([0-9.]+)$", out, re.MULTILINE)
        assert abs(float(line[1]) - wanted) < 6e-5, (pattern, weights)
        assert abs(float(row["loss"]) - wanted) < 6e-4
        assert abs(float(row["gap"]) - wanted + naive_loss(dense, "D1")) < 1.2e-3
        assert abs(float(row["perplexity"]) / math.exp(wanted) - 1) < 1e-3
        per_byte = (val_windows()[:, 1:] < 256).float().mean().item()       # but end-of-text
        assert abs(float(row["bits per byte"]) - wanted / math.log(2) / per_byte) < 1e-3
    assert len({row["gap"] for row in rows.values()}) == 6


def test_files_are_evaluated_alone_in_their_own_pattern(capsys):
    on_cpu("--checkpoint", "out/D4.pt", "out/dense.pt", "--pattern", "D8", "--eval-windows", 3)
    rows = table(capsys.readouterr().out)
    assert list(rows) == [
        ("D1", "switched", "RAT+ (out/D4.pt)"), ("D1", "dense", "RAT+ (out/dense.pt)"),
        ("D4", "adapted", "RAT+ (out/D4.pt)"), ("D8", "switched", "RAT+ (out/D4.pt)"),
        ("D8", "switched", "RAT+ (out/dense.pt)")]
    wanted = naive_loss(load_checkpoint("out/D4.pt")[0], "D8", n=3)
    assert abs(float(rows["D8", "switched", "RAT+ (out/D4.pt)"]["loss"]) - wanted) < 6e-4


def test_what_was_adapted_from_other_weights_is_left_out_with_a_line(capsys):
    """Fine-tuned weights have the parent of the adapted ones."""
    model, meta = load_checkpoint("out/dense.pt")
    save_checkpoint("out/dense.pt", new_model(9), **meta, parent=train.fingerprint(model))
    os.rename("out/N4K2-minmax.pt", "out/other.pt")
    new_run("new", seed=5, adapted=["D8"])
    os.replace("new/D8.pt", "out/D8.pt")
    Path("out/torn.pt").write_bytes(Path("out/dense.pt").read_bytes()[:3000])
    on_cpu("--out", "out//")
    out, err = capsys.readouterr()
    left_out = dict(re.findall(r"left out: out/(.*?)\.pt(.*)", err))
    assert left_out["D8"] == left_out["other"]
    assert left_out["D8"] == " is no file that adapt.py made from out//dense.pt"
    assert "not a whole" in left_out["torn"] and len(left_out) == 3
    assert [key[0] for key in table(out)] == ["D1", "D4", "D4", "W0"]
    assert ("D4", "adapted", "RAT+ (out)") in table(out)


def test_runs_side_by_side_have_their_own_gap_and_cost(capsys):
    new_run("plain", 3, RATConfig(320, 2, 2, 32, recurrence=False))
    on_cpu("--compare", "out", "plain", "--pattern", "D4", "--reach")
    out = capsys.readouterr().out
    rows = table(out.split("half-life")[0])
    assert [key[2] for key in rows][:2] == ["RAT+ (out)", "attention-only (plain)"]
    assert [row["cache bytes per token"] for row in rows.values()][:2] == [
        "528 (100.0%)", "512 (100.0%)"], "one has a state, the other none"
    for (_, _, name), row in rows.items():
        dense = float(rows["D1", "dense", name]["loss"])
        assert abs(float(row["gap"]) + dense - float(row["loss"])) < 2e-3
    assert out.count("half-life in") == 1, "of the model with a recurrence"


@pytest.mark.parametrize("other, flags, why", [
    (dict(context=16), ["--context", 24], "'context': 16"),
    (dict(eval_windows=3), ["--eval-windows", 5], "'eval_windows': 3"),
    (dict(data_key="b"), ["--data", "text"], "'data_key': 'b'"),
    (dict(tokenizer="gpt2"), [], "'tokenizer': 'gpt2'"),
    (dict(shape=RATConfig(384, 2, 2, 32)), [], "'vocab_size': 384")])
def test_runs_that_cant_be_compared_are_refused(capsys, monkeypatch, other, flags, why):
    new_run("other", 1, **other)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "evaluate", None)           # nothing is evaluated before
        refused("--compare", "out", "other", why=why)
    if flags:
        on_cpu("--compare", "out", "other", "--pattern", "D1", *flags)
        assert len(table(capsys.readouterr().out)) == 2


def test_any_loss_can_be_printed(capsys, monkeypatch):
    losses = {"D1": 2.0, "D2": 0.0, "D3": 800.0, "D5": math.inf, "W0": math.nan}
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: losses[str(args[2])])
    on_cpu("--pattern", *losses)
    rows = [[*row.values()] for row in table(capsys.readouterr().out).values()]
    assert rows[1][3:6] == ["8.5", "272 (51.5%)", "4352 (51.5%)"]
    assert [" ".join(row[6:9]) for row in rows] == [
        "2.000 +0.000 7.39", "0.000 -2.000 1.00", "800.000 +798.000 inf", "inf +inf inf",
        "nan +nan nan"]


@pytest.mark.parametrize("flags, why", [
    (["--out", "nowhere"], "nowhere/dense.pt"),
    (["--checkpoint", OFFICIAL], "does not say what it was trained on: --data is needed"),
    (["--pattern", "K16"], "'K16'"),
    (["--pattern", "D1/D2/D4"], "does not fit"),
    (["--niah", "--reach"], "not allowed with"),
    (["--checkpoint", "out/D4.pt", "--compare", "out"], "not allowed with"),
    (["--niah", "--context", 40], "--context 40 is too short for single-1"),
    (["--niah", "--checkpoint", OFFICIAL], "--tokenizer bytes or gpt2"),
    (["--niah", "--checkpoint", OFFICIAL, "--tokenizer", "bytes"], "a model with that vocabulary"),
    (["--niah", "--write", "text"], "text"),
    (["--niah", "--write", "new", "--tokenizer", "ids"], "--tokenizer bytes or gpt2")])
def test_bad_flags_are_an_error_in_words(flags, why):
    refused(*flags, why=why)
    assert not os.path.exists("new")


# ---- Costs and reach -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_are_those_of_a_real_cache(dtype, capsys):
    patterns = "D1 D4 W0 D4W3S2 D1/D4 D1,W3 N4K2:minmax D4N4K3".split()
    on_cpu("--dtype", str(dtype)[6:], "--checkpoint", "out/dense.pt", "--pattern", *patterns)
    for (text, *_), row in table(capsys.readouterr().out).items():
        pattern = Pattern.parse(text)
        real = RATPlus(SHAPE).to(dtype).new_cache(1, 32, pattern)
        read = np.mean([train.bytes_read(real, t) for t in torch.arange(32)[:, None]])
        per_token = row["cache bytes per token"].split()[0]
        assert float(per_token) == pytest.approx(real.nbytes / 32, abs=0.5)
        found = row["bytes read per token"].split()[0]
        assert float(found) == pytest.approx(read, abs=0.5)
        if "N" not in text:
            groups = range(len(pattern.rules(0)))
            masks = [pattern.mask(32, i, j) for i in range(2) for j in groups]
            keys = torch.stack(masks).sum(-1).double().mean().item()
            assert float(row["keys per token"]) == pytest.approx(keys, abs=0.05)
            a_key = 2 * 2 * 32 * dtype.itemsize
            states = 2 * 2 * 32 * 4
            assert read == pytest.approx((keys - 1) * a_key + states)


def test_reach_is_the_half_life_of_the_decays(capsys):
    model, meta = load_checkpoint("out/dense.pt")
    model.blocks[1].mix.in_proj.weight.data[-32:] = 0                   # a = 1/2
    save_checkpoint("known.pt", model, **meta)
    on_cpu("--checkpoint", "known.pt", "--reach", "--eval-windows", 1, "--pattern", "D1")
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    mix = model.blocks[0].mix
    x = mix.norm(model.embed(val_windows(1)[:, :-1:16]))
    decay = torch.sigmoid((x @ mix.in_proj.weight[-32:].T).double()).detach()
    found = np.quantile(math.log(2) / -decay.log(), [0.5, 0.1, 0.9])
    first = "{:.1f} ({:.1f} to {:.1f})".format(*found)
    assert cells == ["half-life", first, "1.0 (1.0 to 1.0)"]


# ---- Benchmarks ----------------------------------------------------------------------------------

ITEMS = [                                               # query, choices, gold
    ("1 + 1", ["= 2", "= 7", "is"], 0),
    ("2 + 2 ", ["= 4", "= 40000"], 1),
    ("", ["5 + 5 = 10", "5 5 + ="], 0),
    (["3 + 3", "4 + 4"], ["= 8", "= 8"], 1),
    ("x\n", ["y", "zz"], 1),
    ("3 + 3 = 6, " * 9, ["6", "seven"], 0),
    ("a", ["the same", "the same"], 0),
    ("b", ["the same", "the same"], 1),
    ("10 + 10 = 20", ["é", "10 + 11 = 21\n"], 1),
    ("7", ["+" * 50, "-"], 1),                          # left out
    *[(f"{i} +", [f"= {i + 10}", f"= {3 * i + 10}"], i % 2) for i in range(24)]]
SINGLE = [("1 + 2", ["="], 0), ("1 +", ["1"], 0), ("1 + 2 = 3", ["= 4"], 0), ("", ["0 + 0"], 0)]


def lines_of(items):
    """Items as lines of JSON."""
    names = "query", "choices", "gold"
    return "".join(json.dumps(dict(zip(names, item))) + "\n" for item in items)


@torch.no_grad()
def naive(model, items, pattern, T):
    """[(acc, norm, ll)] of items, one sequence after the other."""
    found = []
    for queries, choices, gold in items:
        if isinstance(queries, str):
            queries = [queries] * len(choices)
        scores = []
        for query, choice in zip(queries, choices):
            start = list(query.rstrip().encode())
            end = list(f"{query} {choice}".encode())[len(start):]
            ids = ((start or [256]) + end)[-T - 1:]
            logp = model(torch.tensor([ids[:-1]]), pattern)[0].log_softmax(-1)[-len(end):]
            ll = sum(row[token].item() for row, token in zip(logp, end))
            scores.append((ll, ll / len(choice), logp.argmax(-1).tolist() == end, len(end)))
        lls, norms, right, counts = zip(*scores)
        acc = lls.index(max(lls)) == gold
        norm = norms.index(max(norms)) == gold
        if len(lls) == 1:
            acc = norm = right[0]
        if max(counts) <= T:
            found.append((acc, norm, lls[gold]))
    return np.array(found, dtype=float)


@pytest.mark.parametrize("eval_batch", [1, 64])
def test_choices_are_scored_as_defined(capsys, monkeypatch, eval_batch):
    """Against a naive scorer: each item, and the cells of the table."""
    files = {"mixed": ITEMS, "single": SINGLE}
    for name, items in files.items():
        Path(f"{name}.jsonl").write_text(lines_of(items))
    seen = []
    score = evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda *args: seen.append(score(*args)) or seen[-1])
    on_cpu("--choices", "mixed.jsonl", "single.jsonl", "--pattern", "D4", "W0", "--eval-batch",
           eval_batch)
    out, err = capsys.readouterr()
    assert re.search("mixed.jsonl: 1 items fill.*; 1 whose choice alone.* left out", err)
    assert err.count("fill") == 1
    dense = {}
    found = iter(seen)
    for (pattern, weights, _), row in table(out).items():
        path = "out/D4.pt" if weights == "adapted" else "out/dense.pt"
        for name, items in files.items():
            wanted = naive(load_checkpoint(path)[0], items, pattern, 32)
            assert next(found) == pytest.approx(wanted, 1e-5)
            acc, norm, ll = wanted.T
            delta = acc - dense.setdefault(name, acc)
            error = acc.std(ddof=1) / len(acc) ** 0.5
            delta_error = delta.std(ddof=1) / len(acc) ** 0.5
            text = f"{100 * acc.mean():.1f} ± {100 * error:.1f}"
            ppl = f", ppl {math.exp(-ll.mean()):.4g}"
            text += ppl if name == "single" else f" / {100 * norm.mean():.1f}"
            if weights != "dense":
                text += f" ({100 * delta.mean():+.1f} ± {100 * delta_error:.1f})"
            assert row[f"{name}.jsonl"] == text
    assert len(seen) == 8 and out.count("(+0.0 ± 0.0)") < 6, "some items differ"


def test_token_ids_and_packed_files():
    texts = [
        ("1 2 3", ["4 5", "6"], 0),
        (["7", "8 9"], ["10 11 12", "10"], 1),
        ("", ["4", "5"], 1)]
    lines = "\ufeff" + lines_of(texts).replace("\n", "\r\n")
    Path("texts.jsonl").write_text(lines)
    Path("texts.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    Path("texts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    config = settings(context=32, vocab_size=37)
    for name in ("texts.jsonl", "texts.jsonl.xz", "texts.jsonl.gz"):
        assert evaluation.read_items(name, train.Tokenizer("ids", 36), config) == [
            ([((1, 2, 3, 4, 5), 3, 3), ((1, 2, 3, 6), 3, 1)], 0),
            ([((7, 10, 11, 12), 1, 8), ((8, 9, 10), 2, 2)], 1),
            ([((36, 4), 1, 1), ((36, 5), 1, 1)], 1)]
    with pytest.raises(ValueError, match="texts.jsonl, line 3: .*--eot"):
        evaluation.read_items("texts.jsonl", train.Tokenizer("ids"), config)
    with pytest.raises(ValueError, match="texts.jsonl, line 2: .*a token is none of the model's"):
        evaluation.read_items("texts.jsonl", train.Tokenizer("ids", 0), settings(vocab_size=12))


ONE = lines_of(ITEMS[:1])
BAD = ["\n", "\xff\n", '{"query": "a", "choices": ["b"]}\n']
BAD += map(lines_of, [
    [("a", ["b", ""], 0)],
    [("a", ["b", "c"], -1)],
    [("a", ["b", "c"], "0")],
    [("a", ["b", "c"], True)],
    [("a", "bc", 0)],
    [("a", ["b", [5]], 0)],
    [(["a"], ["b", "c"], 0)],
    [([1], [[3]], 0)],
    [("\ud800", ["b"], 0)]])


@pytest.mark.parametrize("content, why", [
    *[((ONE + line).encode("latin1"), "bad.jsonl, line 2: ") for line in BAD],
    (lzma.compress(99 * ONE.encode())[:40], "bad.jsonl.xz"),
    (b"not packed", "bad.jsonl.gz"),
    (b"", "bad.jsonl: no items"),
    (lines_of([("a", ["+" * 32], 0)]).encode(), "bad.jsonl: no items for --context 32")])
def test_bad_files_are_refused_by_name_and_line(content, why):
    name = re.match("[a-z.]*", why)[0]
    Path(name).write_bytes(content)
    refused("--choices", name, why=why)


def test_weights_of_nan_have_no_scores():
    Path("one.jsonl").write_text(ONE)
    model, meta = load_checkpoint("out/dense.pt")
    model.norm.weight.data[0] = math.nan
    save_checkpoint("nan.pt", model, **meta)
    refused("--choices", "one.jsonl", "--checkpoint", "nan.pt", why="not finite")


# ---- Retrieval -----------------------------------------------------------------------------------

def text_of(tokens, tokenizer="bytes"):
    return "".join(map(train.Tokenizer(tokenizer).decode, tokens.tolist()))


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=NEEDS_GPT2)])
@pytest.mark.parametrize("task", evaluation.TASKS)
def test_the_answers_of_a_task_are_in_its_text(task, tokenizer):
    """One question at the end in evaluation, one a key in training. All that is asked is answered,
    in the order of the text.
    """
    hay, *forms, n_keys, n_values = evaluation.TASKS[task]
    kinds = dict(a="[a-z]{5}", b="[a-z]{5}", number="[0-9]{7}", uuid="[0-9A-F]{32}")
    key, value = (form.format(**kinds) for form in forms)
    n_told = n_values * n_keys if task == "multiquery" else n_values
    lengths = set()
    for number in range(-12, 12):
        T = (256, 400, 1400)[number % 3]
        config = settings(context=T, tokenizer=tokenizer, tasks=[task])
        [(tokens, answer)] = sample = evaluation.new_samples([number], config)
        assert np.array_equal(sample, evaluation.new_samples([number], config))
        assert len(tokens) == T, "it is filled"
        borders = 1 + np.flatnonzero(np.diff(answer))
        parts = [text_of(part, tokenizer) for part in np.split(tokens, borders)]
        pairs = re.findall(f"({key})({value})[.]", parts[0])
        for question, told in zip(parts[::2], parts[1::2]):
            names = re.search(f"({key})+$", question)[0]
            held = [each for name, each in pairs if name in names]
            assert told == ",".join(held) + "." and len(held) == n_told
        if hay:
            assert len(pairs) == n_keys * n_values
        if number < 0:
            lengths.add(answer.sum())
            assert len(parts) == 2
        else:
            assert len(parts) == 2 * n_keys * n_values / n_told
    assert len(lengths) == 1, "so that samples make a batch"


def test_data_for_fine_tuning_are_samples_one_after_another():
    """train.py reads them: whole samples, and only the tokens of answers as targets."""
    new_run("wide", context=300)
    save_checkpoint("bare.pt", new_model(0))
    on_cpu("--niah", "--write", "niah", "--samples", 40, "--context", 300, "--out", "none")
    on_cpu("--niah", "--write", "its", "--samples", 40, "--out", "wide")
    assert Path("its/train.bin").read_bytes() == Path("niah/train.bin").read_bytes()
    on_cpu("--niah", "--write", "default", "--samples", 4, "--checkpoint", "bare.pt",
           "--tokenizer", "bytes")
    assert os.path.getsize("default/train.bin") == 2 * 4 * 1024
    config = settings(data=["niah"], context=300, data_key=None, eval_windows=9)
    config.tasks = [*evaluation.TASKS][:8]
    seen = set()
    for windows, numbers in zip(train.load_data(config), (range(40), range(-2, 0))):
        assert windows.n_tokens == 300 * len(numbers)
        for number, idx, targets in zip(numbers, *windows.cut(range(len(numbers)))):
            [sample] = evaluation.new_samples([number], config).astype(int)
            tokens, answer = torch.from_numpy(sample)
            assert torch.equal(idx, tokens)
            assert torch.equal(targets[:-1], tokens.masked_fill(answer == 0, -100)[1:])
            seen.add(bytes(sample))
    assert len(seen) == 42


def test_retrieval_scores_what_the_model_goes_on_with(capsys, monkeypatch):
    """A model that finds the first and third of four values, if the first is a multiple of 3."""
    samples = evaluation.new_samples(range(-14, 0), settings(tasks=["multivalue"]))
    truth = [re.findall("[0-9]+", text_of(tokens[answer == 1])) for tokens, answer in samples]
    left = itertools.cycle(zip(samples, truth))
    real = RATPlus.generate

    def generate(model, idx, n_new, pattern, temperature):
        assert temperature == 0
        out = real(model, idx, n_new, pattern, temperature=temperature)
        for row, prompt, ((tokens, answer), values) in zip(out, idx, left):
            assert np.array_equal(prompt, tokens[answer == 0]) and n_new == answer.sum()
            text = f" {values[2]}, {values[0]}.".encode() * (int(values[0]) % 3 == 0)
            row[-n_new:len(row) - n_new + len(text)] = torch.tensor([*text])
        return out

    right = sum(int(values[0]) % 3 == 0 for values in truth)
    assert 0 < right < 14
    monkeypatch.setattr(RATPlus, "generate", generate)
    on_cpu("--niah", "--pattern", "D4", "--context", 400, "--samples", 14, "--tasks", "multivalue")
    rows = table(capsys.readouterr().out)
    assert [key[:2] for key in rows] == [("D1", "dense"), ("D4", "switched"), ("D4", "adapted")]
    for row in rows.values():
        assert row["multivalue"] == row["average"] == f"{100 * right / 28:.1f}"
