"""The architecture against the authors' code, patterns, and checkpoints."""
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import SCORES, relative_error
from model import AUTHORS_NAMES, PRESETS, Pattern, RATConfig, RATPlus, load_checkpoint, rope_angles, save_checkpoint

ROOT, GOLDEN = Path(__file__).parent.parent, Path(__file__).parent / "golden"
REFERENCE = np.load(GOLDEN / "reference_tiny.npz")              # made with the authors' code, see README


def authors(prefix):
    """The golden weights as the authors' bare state dict."""
    return {name[len(prefix):]: torch.from_numpy(REFERENCE[name]) for name in REFERENCE.files if name.startswith(prefix)}


def ours(name):
    for theirs, mine in AUTHORS_NAMES.items():
        name = name.replace(theirs, mine)
    return name


@pytest.fixture
def golden(tmp_path):
    """{'rat': model, 'attn': model} with the authors' weights."""
    config = {"model": {"backbone": {"seq_cell": {"d_head": 16}}}}
    torch.save({"task": authors("attn_state/"), "config": config}, tmp_path / "attn.pth")
    return {"rat": load_checkpoint(GOLDEN / "official_tiny.pth")[0], "attn": load_checkpoint(tmp_path / "attn.pth")[0]}


def tiny(n_layer=2, n_head=4, n_embd=32, vocab_size=50, recurrence=True, seed=0):
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    model = RATPlus(RATConfig(vocab_size, n_layer, n_head, n_embd, recurrence))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.dim() > 1 else p.copy_(torch.rand_like(p) + 0.5)
    return model


# ---------------------------------------------------------------------------------------------
# The authors' outputs

NAMES = sorted(name for name in REFERENCE.files if name.startswith("logits/"))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_authors(golden, name):
    kind, spelled = ("attn", name[len("logits/attn_"):]) if "attn_" in name else ("rat", name[len("logits/"):])
    if spelled.startswith("hybrid"):
        pattern = "D16S2,D4W6S2"
    else:
        dilation, window, sinks = (int(field[1:]) for field in spelled.split("_"))
        pattern = f"D{dilation}W{window}S{sinks}" if dilation > 0 else f"W{window}S{sinks}"
    with torch.no_grad():
        logits = golden[kind](torch.from_numpy(REFERENCE["tokens"]), pattern=pattern)
    error = relative_error(logits, torch.from_numpy(REFERENCE[name]))
    assert error < 1e-5, f"{name} as {pattern}: relative error {error:.1e}"


def test_dense_loss_and_every_gradient_equal_the_authors(golden):
    model, tokens = golden["rat"], torch.from_numpy(REFERENCE["tokens"])
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert abs(loss.item() - REFERENCE["dense_loss"]) < 1e-5 * REFERENCE["dense_loss"]
    loss.backward()
    grads = {ours(name[len("grad/"):]): REFERENCE[name] for name in REFERENCE.files if name.startswith("grad/")}
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        error = relative_error(p.grad, torch.from_numpy(grads[name]))
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"


# ---------------------------------------------------------------------------------------------
# The layer

def test_dilation_1_equals_dense():
    """Against softmax(q k^T) written out with a plain lower triangle, in the whole model."""
    model, idx = tiny(), torch.randint(50, (2, 70))
    dense = model(idx)
    for pattern in ("D1", "D1W3S2", "W70", "D1,D1", "D1/D1", "D1W5/D1S3,W69"):
        error = relative_error(model(idx, pattern=pattern), dense)
        assert error < 1e-5, f"{pattern}: relative error {error:.1e}"


def test_decay_0_gives_plain_attention():
    """Gate logits of minus infinity (here -1000 times a positive activation) switch the recurrence off."""
    model, plain = tiny(), tiny(recurrence=False)
    weights = model.state_dict()
    for i in range(2):
        name = f"blocks.{i}.mix.in_proj.weight"
        weights[name] = weights[name][:128]
    plain.load_state_dict(weights)
    idx = torch.randint(50, (2, 40))
    for block in model.blocks:                                  # g = in_proj(h)[4C:]; make it -1e4 whatever h is
        block.mix.in_proj.register_forward_hook(lambda _, __, y: torch.cat((y[..., :128], torch.full_like(y[..., 128:], -1e4)), -1))
    for pattern in ("D1", "D8W3"):
        error = relative_error(model(idx, pattern=pattern), plain(idx, pattern=pattern))
        assert error < 1e-5, f"{pattern}: relative error {error:.1e}"
    assert relative_error(tiny()(idx), plain(idx)) > 1e-2, "with its own decay the recurrence must matter"


def random_pattern(rng, n_layer=2, n_head=4, longest=40):
    def rule():
        fields = [f"{letter}{rng.choice((1, 2, 3, 5, 8, 16, longest + 9) if letter == 'D' else (0, 1, 4, 7, longest + 9))}"
                  for letter in "DWS" if rng.random() < 0.6]
        return "".join(fields) or "W0"
    return ",".join("/".join(rule() for _ in range(rng.choice([n for n in (1, 2, 4) if n_head % n == 0])))
                    for _ in range(rng.randint(1, n_layer)))


@pytest.mark.parametrize("seed", range(12))
def test_no_future_leak(seed):
    """Changing token j moves no logit before j, and does move one from j on."""
    rng = random.Random(seed)
    model, pattern, idx = tiny(recurrence=seed % 3 > 0), random_pattern(rng), torch.randint(50, (1, 40))
    j = rng.randrange(1, 40)
    other = idx.clone()
    other[0, j] = (other[0, j] + 1) % 50
    with torch.no_grad():
        before, after = model(idx, pattern=pattern), model(other, pattern=pattern)
    assert torch.equal(before[:, :j], after[:, :j]), f"{pattern}: token {j} changed an earlier logit"
    assert not torch.equal(before[:, j:], after[:, j:])


TOPK = ["N8K3", "D8N8K3", "D4W3S2N8K2", "W5N16K2", "D1,N16K4", "D1/N16K4", "D8/D16N8K2,N7K5/W3"]


@pytest.mark.parametrize("pattern", TOPK)
@pytest.mark.parametrize("score", SCORES)
def test_topk_patterns_leak_no_future_and_train_every_weight(pattern, score):
    model, pattern, idx = tiny(), Pattern.parse(pattern, score), torch.randint(50, (2, 70))
    other = idx.clone()
    other[:, 33] = (other[:, 33] + 1) % 50
    with torch.no_grad():
        before, after = model(idx, pattern=pattern), model(other, pattern=pattern)
    assert before[:, :33].equal(after[:, :33]) and not before[:, 33:].equal(after[:, 33:])
    model.loss(idx[:, :-1], idx[:, 1:], pattern=pattern).backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.norm() > 0, name


def test_topk_blocks_beyond_the_text_are_dense():
    model, idx = tiny(), torch.randint(50, (2, 60))
    dense = model(idx)
    for score in SCORES:
        for pattern in ("N8K8", "N1K60", "N60K1", "N999999999K999999999", "D1N4K2", "N8K8,D1/N20K3"):
            assert relative_error(model(idx, pattern=Pattern.parse(pattern, score)), dense) < 1e-5, pattern
        assert relative_error(model(idx, pattern=Pattern.parse("D4W2N1K1", score)), model(idx, pattern="D4W2")) < 1e-5


def test_scores_choose_differently():
    model, idx = tiny(), torch.randint(50, (1, 60))
    logits = [model(idx, pattern=Pattern.parse("N4K3", score)) for score in SCORES]
    assert all(relative_error(a, b) > 1e-3 for a, b in zip(logits, logits[1:] + logits[:1]))
    assert model(idx, pattern="N4K3").equal(logits[0]), "the mean unless asked"


def test_sparse_patterns_differ_from_dense():
    model, idx = tiny(recurrence=False), torch.randint(50, (1, 60))
    logits = [model(idx, pattern=pattern) for pattern in ("D1", "D8", "W8S2", "D8W8S2", "D1,D8", "D1/D8", "N8K3", "D8N8K3")]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert relative_error(a, b) > 1e-3


def test_hybrid_layers_and_heads_are_each_layer_and_head_by_itself():
    """One layer's mixing under D1/D4/N4K3/D8S2 equals, head by head, the mixing under each rule alone."""
    model, x = tiny(), torch.randn(2, 30, 32)
    mix, rope, seen = model.blocks[1].mix, rope_angles(torch.arange(30), 8), []
    hook = mix.out_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].view(2, 30, 4, 8)))
    for pattern in ("D1/D4/N4K3/D8S2", "D1", "D4", "N4K3", "D8S2"):
        mix(x, rope, Pattern.parse(pattern).groups(1, 4))
    hook.remove()
    for head in range(4):
        error = relative_error(seen[0][:, :, head], seen[head + 1][:, :, head])
        assert error < 1e-6, f"head {head}: relative error {error:.1e}"
    idx = torch.randint(50, (1, 30))
    hidden = model.embed(idx)
    for block, pattern in zip(model.blocks, ("D4W2", "D1/D8")):
        hidden = block(hidden, rope, Pattern.parse(pattern).groups(0, 4))
    assert relative_error(model.head(hidden), model(idx, pattern="D4W2,D1/D8")) < 1e-6


def test_loss_is_the_mean_over_targets_that_count():
    model, idx = tiny(), torch.randint(50, (2, 20))
    targets = torch.randint(50, (2, 20))
    targets[0, :7] = -100
    logp = model(idx, pattern="D4").log_softmax(-1)
    picked = [logp[b, t, targets[b, t]] for b in range(2) for t in range(20) if targets[b, t] >= 0]
    assert abs(model.loss(idx, targets, pattern="D4") + torch.stack(picked).mean()) < 1e-5
    assert model.loss(idx, torch.full_like(targets, -100)) == 0
    assert model.loss(idx, targets).dtype == torch.float32


def test_loss_under_autocast_is_close_and_float32():
    model, idx = tiny(), torch.randint(50, (2, 64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(idx[:, :-1], idx[:, 1:], pattern="D8W4")
    loss.backward()
    assert loss.dtype == torch.float32 and model.embed.weight.grad.dtype == torch.float32
    assert abs(loss - model.loss(idx[:, :-1], idx[:, 1:], pattern="D8W4")) < 0.05 * loss


def test_overfits_one_batch():
    torch.manual_seed(0)
    model, idx = RATPlus(RATConfig(50, 2, 2, 32)), torch.randint(50, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        for pattern in ("D8", "D1"):                            # ARL: both in turn
            loss = model.loss(idx[:, :-1], idx[:, 1:], pattern=pattern)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.05, f"one batch of random tokens should be learnt by heart, loss {loss:.3f}"


@pytest.mark.parametrize("sizes", [(50, 0, 1, 8), (50, 1, 3, 8), (50, 1, 8, 8), (0, 1, 1, 8), (50, 1, -2, 8)])
def test_impossible_shapes_are_refused(sizes):
    with pytest.raises(ValueError, match="n_embd must split into n_head heads"):
        RATConfig(*sizes)


def test_presets_are_the_papers_shapes():
    assert {name: (p["n_layer"], p["n_embd"], p["n_embd"] // p["n_head"]) for name, p in PRESETS.items() if "paper" in name} == {
        "paper-1.5b": (24, 2048, 128), "paper-2.6b": (28, 2560, 128), "paper-7.6b": (32, 4096, 128)}
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in RATPlus(RATConfig(32000, **PRESETS[name])).parameters()) for name in PRESETS}
    assert 1.4e9 < sizes["paper-1.5b"] < 1.6e9 and 2.5e9 < sizes["paper-2.6b"] < 2.8e9 and 7.4e9 < sizes["paper-7.6b"] < 7.8e9


# ---------------------------------------------------------------------------------------------
# Patterns

@pytest.mark.parametrize("text", ["D16", "D1", "D16W256S4", "W1024S4", "D1,D64", "D1/D64", "N64K16", "D64N64K8", "W0", "S4",
                                  "D4W2/D8S1,W3/N4K2", "D999999999"])
def test_patterns_print_as_they_were_written(text):
    assert str(Pattern.parse(text)) == text and Pattern.parse(str(Pattern.parse(text))) == Pattern.parse(text)
    assert Pattern.parse(Pattern.parse(text)) == Pattern.parse(text)


@pytest.mark.parametrize("text, canonical", [("D16W0S0", "D16"), ("D016", "D16"), ("W0S0", "W0"), ("S0", "W0"),
                                             ("D1W0,W5S0", "D1,W5")])
def test_patterns_have_one_canonical_text(text, canonical):
    assert str(Pattern.parse(text)) == canonical


def test_the_score_is_no_part_of_the_text_and_of_topk_alone():
    pattern = Pattern.parse("D16,N64K16", "last")
    assert str(pattern) == "D16,N64K16" and [rules[0].score for rules in pattern.layers] == ["mean", "last"]
    assert Pattern.parse("D16", "last") == Pattern.parse("D16") and pattern != Pattern.parse("D16,N64K16")
    with pytest.raises(ValueError, match="score 'max': top-k blocks are scored by one of mean, minmax, last"):
        Pattern.parse("N64K16", "max")


def test_random_patterns_round_trip():
    rng = random.Random(0)
    for _ in range(200):
        pattern = Pattern.parse(random_pattern(rng))
        assert Pattern.parse(str(pattern)) == pattern


MALFORMED = ["", " ", "D", "W", "S", "D-1", "D0", "D16D16", "S4W2", "W2D4", "16", "d16", "D16 ", " D16", "D1, D4", "D1,",
             ",D1", "D1//D4", "/", "D1/", "K16", "N64", "N0K4", "N4K0", "K4N4", "D1.5", "D1e9", "1e9", "D+4", "D16x",
             "D16;D4", "D16\n", "D٣", "D9999999999", "W" + "9" * 5000, "X4", "D16W", "D16WS4", "none", "-1", "D1|D4", None, 16, 1e9, ["D1"]]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text)[:20])
def test_malformed_patterns_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as error:
        Pattern.parse(text)
    message = str(error.value)
    assert repr(text)[:99] in message and "A right one is" in message and "\n" not in message, message


@pytest.mark.parametrize("pattern, reason", [("D1,D2,D4", "3 layers are named, the model has 2"),
                                             ("D1/D2/D4", "3 head groups do not divide 4 heads")])
def test_patterns_that_do_not_fit_the_model_are_refused(pattern, reason):
    model, idx = tiny(), torch.zeros(1, 4, dtype=torch.long)
    for call in (lambda: model(idx, pattern=pattern), lambda: model.new_cache(1, 8, pattern), lambda: model.generate(idx, 2, pattern)):
        with pytest.raises(ValueError, match=reason):
            call()


def test_mask_is_the_equation():
    mask = Pattern.parse("D4W2S1").mask(12)
    for t in range(12):
        for p in range(12):
            assert mask[t, p] == (p <= t and ((p + 1) % 4 == 0 or t - p <= 2 or p < 1))
    hybrid = Pattern.parse("D1/D4,W3")
    assert hybrid.mask(9, layer=0, group=1).equal(Pattern.parse("D4").mask(9))
    assert hybrid.mask(9, layer=1).equal(Pattern.parse("W3").mask(9)) and hybrid.mask(9, layer=2).equal(Pattern.parse("D1").mask(9))
    with pytest.raises(ValueError, match="top-k blocks follow the data"):
        Pattern.parse("D64N64K16").mask(9)


def test_model_py_draws_a_pattern():
    def draw(*args):
        return subprocess.run([sys.executable, ROOT / "model.py", *args], capture_output=True, text=True)
    drawn = draw("D4W1S2", "9")
    assert drawn.returncode == 0 and "   8 S S . D . . . D W" in drawn.stdout.splitlines()
    for args, why in ((["D-1"], "D-1"), (["N4K2"], "N4K2"), (["D4", "-5"], "-5"), (["D4", "9" * 20], "1 to 1000"), ([], "usage")):
        wrong = draw(*args)
        assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and why in wrong.stderr


# ---------------------------------------------------------------------------------------------
# Checkpoints

def same(a, b):
    return a.config == b.config and all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_checkpoint_round_trip(tmp_path):
    for recurrence in (True, False):
        model = tiny(recurrence=recurrence)
        meta = dict(step=7, pattern="D16", nested={"lr": [0.1, None, "x"]}, state=torch.arange(3))
        save_checkpoint(tmp_path / "a.pt", model, **meta, config="is the model's own")
        loaded, meta = load_checkpoint(tmp_path / "a.pt")
        assert same(model, loaded) and meta["step"] == 7 and meta["nested"] == {"lr": [0.1, None, "x"]}
        assert meta["state"].equal(torch.arange(3)) and meta["pattern"] == "D16" and meta["tokenizer"] == "ids"
        assert sorted(os.listdir(tmp_path)) == ["a.pt"], "no temporary file stays"
        loaded.loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
        assert all(p.grad is not None for p in loaded.parameters()), "a loaded model can be trained"


def test_loading_spends_no_random_numbers(tmp_path):
    save_checkpoint(tmp_path / "a.pt", tiny())
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_checkpoint(tmp_path / "a.pt")
    assert torch.rand(3).equal(expected)


def test_the_authors_checkpoint_loads_in_every_form(tmp_path, golden):
    assert "easydict" not in sys.modules
    state = authors("state/")
    split = {name: tensor[:128] if "in_proj" in name else tensor for name, tensor in state.items()}
    split |= {name.replace("in_proj", "fgate_proj"): tensor[128:] for name, tensor in state.items() if "in_proj" in name}
    config = {"model": {"backbone": {"seq_cell": {"d_head": 16}}}}
    forms = {"task": {"task": state, "config": config}, "split": {"task": split, "config": config, "step": 3},
             "compiled": {"task": {"_orig_mod." + name: tensor for name, tensor in split.items()}, "config": config},
             "half": {"task": {name: tensor.bfloat16() for name, tensor in state.items()}, "config": config}}
    for form, data in forms.items():
        torch.save(data, tmp_path / f"{form}.pth")
        model, meta = load_checkpoint(tmp_path / f"{form}.pth")
        assert model.config == golden["rat"].config and meta["tokenizer"] == "ids"
        assert form == "half" or same(model, golden["rat"]), form
        assert model.embed.weight.dtype == torch.float32


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"task": state}], ids=["bare", "task"])
def test_weights_only_files_have_heads_of_128(tmp_path, wrap):
    torch.manual_seed(0)
    C, state = 256, {"embedding.wte.weight": torch.randn(64, 256), "backbone.ln.weight": torch.ones(256)}
    state |= {f"backbone.layers.0.seq_layer.{name}.weight": torch.randn(shape) for name, shape in (
        ("input_norm", (C,)), ("in_proj", (5 * C, C)), ("out_proj", (C, C)))}
    state |= {f"backbone.layers.0.hidden_layer.{name}.weight": torch.randn(shape) for name, shape in (
        ("ln", (C,)), ("fc1", (4 * C, C)), ("fc2", (C, 4 * C)))}
    torch.save(wrap(state), tmp_path / "w.pth")
    model, _ = load_checkpoint(tmp_path / "w.pth")
    assert model.config == RATConfig(64, 1, 2, 256, True) and torch.equal(model.embed.weight, state["embedding.wte.weight"])


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + Bomb.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    Bomb.path = str(tmp_path / "exploded")
    torch.save({"task": authors("state/"), "config": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(tmp_path / "bomb.pth")
    assert not os.path.exists(Bomb.path)


def test_broken_and_foreign_checkpoints_are_refused_in_one_line(tmp_path):
    save_checkpoint(tmp_path / "good.pt", tiny())
    good, official = (tmp_path / "good.pt").read_bytes(), (GOLDEN / "official_tiny.pth").read_bytes()
    state = authors("state/")
    whole = torch.load(tmp_path / "good.pt", weights_only=True)
    files = {"empty": b"", "half": good[:len(good) // 2], "tail": good[:-1], "authors_half": official[:1000],
             "text": b"not a checkpoint\n", "pickle": pickle.dumps({"a": 1}), "list": [1, 2], "number": 3,
             "dict": {"a": torch.ones(2)}, "missing": {**whole, "model": {}},
             "shape": {**whole, "config": {**whole["config"], "n_embd": 64}},
             "odd_config": {**whole, "config": {"n_embd": 64, "x": 1}},
             "bad_config": {**whole, "config": {**whole["config"], "n_head": 5}},
             "untied": {"task": {**state, "head.lm_head.weight": state["embedding.wte.weight"] + 1}, "config": {}},
             "no_layers": {"task": {"embedding.wte.weight": torch.ones(4, 256)}}}
    for name, data in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), f"{name}: {error.value}"
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "a.pt", tiny(), step=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "a.pt", tiny(), step=2, bad=lambda: None)        # can't be pickled
    resource = pytest.importorskip("resource", reason="no file size limits on this platform")
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))                # as a full disk: writing fails half-way
        with pytest.raises(OSError, match="is not saved") as error:
            save_checkpoint(tmp_path / "a.pt", tiny(), step=3)
        assert "\n" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(tmp_path / "a.pt")[1]["step"] == 1 and os.listdir(tmp_path) == ["a.pt"]


def test_kill_9_during_a_save_leaves_a_good_checkpoint(tmp_path):
    """A process that does nothing but save is killed at random moments; each time the file is whole and not older."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from model import *\n"
            "model, i = RATPlus(RATConfig(5000, 1, 1, 64)), int(sys.argv[3])\n"
            "while True: i += 1; save_checkpoint(sys.argv[2], model, step=i); print(i, flush=True)")
    path, step, rng = tmp_path / "a.pt", 0, random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code, ROOT, path, str(step)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(0.3 * rng.random())
        process.send_signal(signal.SIGKILL)
        printed = [step, *map(int, process.communicate()[0].split())]
        loaded, meta = load_checkpoint(path)
        assert meta["step"] >= max(printed) and loaded.config.vocab_size == 5000
        step = meta["step"]
