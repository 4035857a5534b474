"""sample.py through main(argv), as a user calls it, and its arithmetic with known input."""
import io
import itertools
import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from model import RATConfig, RATPlus, load_checkpoint, save_checkpoint
from train import Tokenizer, bytes_read, fingerprint


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """out/dense.pt, and out/D4.pt as if adapted from it: random weights, so texts are random."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gc.collect", lambda: None)     # slow in a process of many modules
    os.mkdir("out")
    dense = write_weights("out/dense.pt", "D1")
    write_weights("out/D4.pt", "D4", parent=fingerprint(dense))


def write_weights(path, pattern, **meta):
    model = RATPlus(RATConfig(320, 2, 2, 32))
    save_checkpoint(path, model, pattern=pattern, tokenizer="bytes", **meta)
    return model


def call(*args):
    sample.main(["--device", "cpu", *map(str, args)])


def sampled(capsys, *args):
    """(the text that sample.py prints, prompt included; its last line; what it says on stderr)."""
    call(*args)
    out, err = capsys.readouterr()
    text, last = out.split("\n\n", 1)[1].rsplit("\n\n", 1)
    return text, last, err


def generated(path, prompt, n, pattern, seed=0, **sampling):
    """What the model at `path` goes on with, as text."""
    model, _ = load_checkpoint(path)
    idx = torch.tensor([list(prompt.encode())])
    torch.manual_seed(seed)
    ids = model.generate(idx, n, pattern, **sampling)[0].tolist()
    text = "".join(map(Tokenizer("bytes").decode, ids))
    before, eot, _ = text.partition("<|endoftext|>")
    return before + eot


@pytest.mark.parametrize("pattern, path", [("D1", "out/dense.pt"), ("D4", "out/D4.pt")])
def test_a_text_is_what_the_model_generates_under_the_pattern(pattern, path, capsys):
    flags = ["--pattern", pattern, "--prompt", "1 + 2 =", "--tokens", 40]
    for seed in (0, 5):
        text, last, err = sampled(capsys, *flags, "--seed", seed)
        assert text == generated(path, "1 + 2 =", 40, pattern, seed, temperature=0.8)
        assert err == "" and "prefill 7 tokens" in last
    text, _, _ = sampled(capsys, *flags, "--top-k", 9)
    assert text == generated(path, "1 + 2 =", 40, pattern, temperature=0.8, top_k=9)


def test_other_weights_are_used_with_a_warning(capsys):
    flags = ["--pattern", "D8W2", "--prompt", "1", "--tokens", 20]
    text, _, err = sampled(capsys, *flags)
    assert text == generated("out/dense.pt", "1", 20, "D8W2", temperature=0.8)
    assert err == "warning: out/dense.pt was trained for D1, not for D8W2; see adapt.py\n"
    text, _, err = sampled(capsys, *flags, "--checkpoint", "out/D4.pt")
    assert text == generated("out/D4.pt", "1", 20, "D8W2", temperature=0.8)
    assert err == "warning: out/D4.pt was trained for D4, not for D8W2; see adapt.py\n"


def test_a_text_ends_with_its_document(capsys):
    """Weights whose likeliest token is end-of-text, whatever came before."""
    model, meta = load_checkpoint("out/dense.pt")
    with torch.no_grad():
        model.embed.weight.fill_(1)
        model.embed.weight[256] = 10
    save_checkpoint("out/dense.pt", model, **meta)
    flags = ["--temperature", 0, "--tokens", 9]
    text, last, _ = sampled(capsys, *flags, "--prompt", "a")
    assert text == "a<|endoftext|>" and "decode 0.0 tok/s" in last
    flags += ["--tokenizer", "ids", "--prompt", "7 8"]
    assert sampled(capsys, *flags)[0] == "7 8 " + 9 * "256 "


def test_adapted_weights_of_another_dense_run_are_refused(capsys):
    old = generated("out/D4.pt", "1", 9, "D4", temperature=0)
    parent = load_checkpoint("out/D4.pt")[1]["parent"]
    flags = ["--pattern", "D4", "--prompt", "1", "--tokens", 9, "--temperature", 0]
    write_weights("out/dense.pt", "D1")
    with pytest.raises(ValueError, match="not adapted from what out/dense.pt holds now"):
        call(*flags)
    assert sampled(capsys, *flags, "--checkpoint", "out/D4.pt")[0] == old
    write_weights("out/dense.pt", "D1", parent=parent)
    assert sampled(capsys, *flags)[0] == old, "both were fine-tuned from one run"
    os.remove("out/dense.pt")
    assert sampled(capsys, *flags)[0] == old, "with nothing to compare it with"
    write_weights("out/dense.pt", "D1", parent=parent)
    write_weights("out/D4.pt", "D4", parent=parent, adapt={})
    with pytest.raises(ValueError, match="run adapt.py again"):
        call(*flags)


@pytest.mark.parametrize("flags, why", [
    (["--prompt", ""], "--prompt: at least one token is needed, each below 320"),
    (["--prompt", "5 320", "--tokenizer", "ids"], "each below 320"),
    (["--prompt", "five", "--tokenizer", "ids"], "write token ids"),
    (["--compile"], "--compile is for the steps of a GPU"),
    (["--pattern", "D1/D2/D4"], "does not fit"),
    (["--pattern", "D1", "D4"], "several are for --bench"),
    (["--bench", "--contexts", "8", "-1"], "--contexts: at least 1"),
    (["--out", "nowhere"], "nowhere/dense.pt")])
def test_what_can_not_be_is_refused_before_the_first_token(flags, why, capsys):
    with pytest.raises((ValueError, OSError), match=why):
        call(*flags)
    assert " with D" not in capsys.readouterr().out


def test_a_prompt_that_is_no_utf8_on_an_ascii_terminal(monkeypatch, capsys):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", "--prompt", "caf\udce9"])
    runpy.run_path(sample.__file__, run_name="__main__")
    out = screen.getvalue()
    assert out.isascii() and b"prefill 4 tokens" in out and capsys.readouterr().err == ""


@pytest.mark.parametrize("pattern", ["D1", "D4W2", "N4K2"])
def test_the_last_line(pattern, capsys, monkeypatch):
    """Speed is that of the tokens after the third, for which a GPU captures its graph."""
    model, _ = load_checkpoint("out/dense.pt")
    stamps = iter([1.0, 1.25, 2.0, 5.0, 5.5, 6.0, 1.0, 2.0, 2.25])
    monkeypatch.setattr(sample, "timer", lambda: next(stamps))
    costs = {5: "prefill 7 tokens 250.0 ms | decode 2.0 tok/s",
             2: "prefill 7 tokens 1000.0 ms | decode 4.0 tok/s"}
    for n_new, cost in costs.items():
        flags = ["--pattern", pattern, "--prompt", "1 + 2 =", "--tokens", n_new]
        size = model.new_cache(1, 7 + n_new, pattern).nbytes
        dense = model.new_cache(1, 7 + n_new, "D1").nbytes
        _, last, _ = sampled(capsys, *flags)
        assert last == f"{cost} | cache {size / 1e6:.3f} MB, {size / dense:.1%} of dense\n"


@pytest.mark.parametrize("pattern, keys", [
    ("D1", 22), ("D4", 5), ("D4W3S2", 3 + 4 + 2), ("W0", 0), ("W100", 22), ("D1/D4", 13.5),
    ("D1,W3", 12.5), ("N4K2", 2 + 4 + 5 / 2), ("N4K2:minmax", 2 + 4 + 5), ("N4K99", 22 + 5 / 2),
    ("D4N4K3", 2 + 8 + 3 + 5 / 2)])
def test_a_step_reads_the_keys_of_its_pattern(pattern, keys):
    """At position 22. Of 2 layers, a key and its value are 256 bytes each, a summary of a block's
    keys 128 (minmax: 256), a layer's states 256.
    """
    model, _ = load_checkpoint("out/dense.pt")
    cache = model.new_cache(3, 40, pattern)
    assert bytes_read(cache, torch.tensor([22])) == 3 * 2 * (256 * keys + 256)
    model.prefill(torch.zeros(3, 22, dtype=torch.long), cache)
    slots = sum(map(sum, cache.slots)) / sum(map(len, cache.slots))
    assert "N" in pattern or slots == keys, "the cache counts the same"


@pytest.mark.parametrize("pattern", ["D1", "D4W3S2", "N4K2:minmax"])
def test_decoding_goes_on_from_a_cache_that_is_filled_at_random(pattern, monkeypatch):
    model = RATPlus(RATConfig(320, 2, 2, 32))
    cache = model.new_cache(2, 40, pattern)
    monkeypatch.setattr(model, "new_cache", lambda *args: cache)
    prefill, _, nbytes, read, moved = sample.measure(model, 30, pattern, 2, 7)
    assert cache.length == cache.seen.item() == 40
    assert all(z.std() > 0.5 for z in cache.layers[1].groups[0].tensors)
    assert nbytes == cache.nbytes and prefill != prefill, "no prefill of two"
    assert read == bytes_read(cache, torch.tensor([36]))
    states = 2 * 2 * 2 * 32 * 4                                 # 2 layers, k~ and v~, 2 sequences
    assert moved == read + states + sum(p.nbytes for p in model.parameters())


def test_the_largest_batch_leaves_a_tenth_of_the_memory(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (4e9, 8e9))
    for device, cache, most, batch in [
            ("cuda", 1e6, 8192, 3600), ("cuda", 1e6, 20, 20), ("cuda", 1e9, 9, 3),
            ("cuda", 1e12, 9, 1), ("cpu", 1e6, 8192, 8), ("cpu", 1e6, 5, 5)]:
        flags = SimpleNamespace(device=device, max_batch=most)
        assert sample.largest_batch(cache, flags) == batch


def test_bench_measures_each_pattern_against_dense(capsys):
    patterns = ["D1", "D4W3/D1", "D4N4K2"]
    flags = ["--contexts", 8, 20, "--tokens", 2, "--max-batch", 3]
    call("--bench", "--pattern", *patterns[1:], *flags)
    out = capsys.readouterr().out
    head, *lines = re.findall(r"^\| (.*) \|$", out, re.MULTILINE)
    rows = [dict(zip(head.split(" | "), line.split(" | "))) for line in lines]
    names = [(row["context"], row["pattern"], row["batch"]) for row in rows]
    assert names == [*itertools.product(("8", "20"), patterns, "13")]
    shape = RATPlus(RATConfig(32000, 4, 4, 128))                # the laptop's
    dense = {}
    for row in rows:
        batch = int(row["batch"])
        ms = float(row["ms per step"])
        cache = shape.new_cache(batch, int(row["context"]) + 5, row["pattern"])
        assert (row["prefill ms"] == "nan") == (batch == 3)
        assert row["cache MB"] == f"{cache.nbytes / 1e6:.1f}"
        ratio = dense.setdefault((row["context"], batch), ms) / ms
        assert abs(float(row["of dense"].strip("x")) - ratio) < 0.006 + 0.01 * ratio


def test_bench_tries_a_smaller_batch_if_memory_runs_out(capsys, monkeypatch):
    tried = []

    def scarce(model, context, pattern, batch, tokens):
        tried.append((pattern, batch))
        if batch > 6 or pattern == "D4":
            raise MemoryError
        return 0.5, 0.01, 3_000_000, 1_500_000, 20_000_000

    ticks = iter([0.0, 1.0, 1.0, 1.0 + 2**27 / 1e10, *range(2, 18)])
    monkeypatch.setattr(sample, "timer", lambda: next(ticks))   # the fastest copy: 10 GB/s
    monkeypatch.setattr(sample, "measure", scarce)
    flags = ["--checkpoint", "out/dense.pt", "--contexts", 8, "--tokens", 1]
    call("--bench", "--pattern", "D4", *flags)
    rows = capsys.readouterr().out.splitlines()[-4:-1]
    assert rows == ["| 8 | D1 | 1 | 500.0 | 10.000 | 100 | 1.00x | 3.0 | 1.5 | 20% |",
                    "| 8 | D1 | 6 | 500.0 | 10.000 | 600 | 1.00x | 3.0 | 1.5 | 20% |",
                    "| 8 | D4 | 0 | nan | nan | nan | nanx | nan | nan | nan% |"]
    assert tried == [("D1", 1), ("D1", 8), ("D1", 7), ("D1", 6), ("D4", 1)], "8 and 7 did not fit"
