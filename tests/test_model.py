"""The method against its equations and the authors' outputs; patterns; training; checkpoints."""
import copy
import importlib.util
import itertools
import math
import os
import pickle
import random
import re
import runpy
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_py
from model import (AUTHORS_NAMES, PRESETS, Pattern, RATConfig, RATPlus, Rule, allowed,
                   attention, best_blocks, block_summaries, choose, load_checkpoint, recurrence,
                   rope_angles, save_checkpoint)

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
REFERENCE = np.load(GOLDEN / "reference_tiny.npz")  # made with the authors' code
SCORES = "mean", "minmax", "last"
TOPK = ["N8K3", "D8N8K3:minmax", "D4W3S2N8K2:last", "W5N16K2", "D1,N16K4:minmax", "D1/N16K4:last",
        "D8/D16N8K2,N7K5:minmax/W3"]
GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs, compiled kernels, or full size")
HALF = torch.bfloat16 if GPU else torch.float16     # the interpreter's bfloat16 products are wrong


def relative_error(x, ref, floor=1e-30):
    """The norm of the difference over that of the reference, which counts as `floor` at least."""
    x = x.detach().double()
    ref = ref.detach().double()
    return ((x - ref).norm() / ref.norm().clamp(min=floor)).item()


def assert_same(name, x, ref, limit=1e-5, floor=1e-30):
    assert x.shape == ref.shape, f"{name}: shape {tuple(x.shape)}, not {tuple(ref.shape)}"
    error = relative_error(x, ref, floor)
    assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.0e}"


def assert_differ(name, x, y):
    error = relative_error(x, y)
    assert error > 1e-3, f"{name}: they should differ, but by {error:.1e} only"


def assert_refused(call, *words, kind=ValueError):
    """It raises an error whose message is one line and holds all words."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert message and "\n" not in message, message
    for word in words:
        assert re.search(word, message), message


def tiny(n_layer=2, n_head=4, n_embd=32, vocab_size=50, recurrence=True, seed=0):
    """A random model whose weights are large enough for every path to matter."""
    torch.manual_seed(seed)
    model = RATPlus(RATConfig(vocab_size, n_layer, n_head, n_embd, recurrence))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.dim() > 1 else p.copy_(torch.rand_like(p) + 0.5)
    return model


def gradients(model, idx, pattern):
    """{name: gradient} of the loss of predicting idx[:, 1:]."""
    loss = model.loss(idx[:, :-1], idx[:, 1:], pattern)
    names, weights = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, weights)))


# ---- The authors' outputs ------------------------------------------------------------------------

def authors(prefix):
    """The golden weights as the authors' bare state dict."""
    names = [name for name in REFERENCE.files if name.startswith(prefix)]
    return {name[len(prefix):]: torch.from_numpy(REFERENCE[name]) for name in names}


AUTHORS_CONFIG = {"model": {"backbone": {"seq_cell": {"d_head": 16}}}}


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """{'rat': model, 'attn': model} with the authors' weights."""
    path = tmp_path_factory.mktemp("golden") / "attn.pth"
    torch.save({"task": authors("attn_state/"), "config": AUTHORS_CONFIG}, path)
    rat, _ = load_checkpoint(GOLDEN / "official_tiny.pth")
    attn, _ = load_checkpoint(path)
    return {"rat": rat, "attn": attn}


@pytest.mark.parametrize("name", sorted(n for n in REFERENCE.files if n.startswith("logits/")))
def test_logits_equal_the_authors(golden, name):
    """They spell D16_W4_I2, and D-1 is no grid."""
    kind = "attn" if "attn_" in name else "rat"
    pattern = name.removeprefix("logits/").removeprefix("attn_")
    for theirs, ours in ("D-1", ""), ("_", ""), ("I", "S"):
        pattern = pattern.replace(theirs, ours)
    if pattern.startswith("hybrid"):
        pattern = "D16S2,D4W6S2"
    with torch.no_grad():
        logits = golden[kind](torch.from_numpy(REFERENCE["tokens"]), pattern)
    assert_same(f"{name} as {pattern}", logits, torch.from_numpy(REFERENCE[name]))


def test_dense_loss_and_every_gradient_equal_the_authors(golden):
    model = golden["rat"]
    tokens = torch.from_numpy(REFERENCE["tokens"])
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert_same("loss", loss, torch.tensor(REFERENCE["dense_loss"]))
    found = gradients(model, tokens, "D1")
    expected = authors("grad/")
    for theirs, gradient in expected.items():
        name = theirs
        for old, new in AUTHORS_NAMES.items():
            name = name.replace(old, new)
        assert_same(f"gradient of {name}", found.pop(name), gradient)
    assert not found, f"the authors have no gradient of {list(found)}"


# ---- Who may attend to whom: equation (4), top-k blocks. The other equations: test_kernels.py 

SPANS = [(1, 0, 0), (1, 9, 3), (4, 0, 0), (16, 0, 0), (7, 5, 3), (0, 12, 4), (0, 0, 0), (0, 0, 5),
         (500, 0, 0), (3, 400, 0), (5, 2, 400)]                 # D > T, W >= T and S > T among them


@pytest.mark.parametrize("span", SPANS, ids=str)
def test_allowed_is_equation_4(span):
    dilation, window, sinks = span
    t = torch.arange(40)
    found = allowed(t[:, None], t, *span)
    for i, p in itertools.product(range(40), range(40)):
        on_grid = dilation >= 1 and (p + 1) % dilation == 0
        expected = p <= i and (on_grid or i - p <= window or p < sinks)
        assert found[i, p] == expected, f"query {i}, key {p} of {span}"
        assert bool(allowed(i, torch.tensor(p), *span)) == expected
    assert found.equal(Rule(*span).allowed(t[:, None], t))


def best_of(q, k, text):
    """The blocks that each query of one head attends to in full."""
    rule = Rule.parse(text)
    summaries = block_summaries(k, rule.block, rule.score)
    chosen = best_blocks(q, summaries, torch.arange(q.shape[2]), rule)[0, 0]
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def test_of_equal_scores_the_earliest_block_is_chosen_and_nan_is_the_least():
    q = torch.ones(1, 1, 40, 4)
    k = torch.zeros(1, 1, 40, 4)
    k[:, :, 8:16] = -0.0
    assert best_of(q, k, "N8K3")[-1] == [0, 1, 4], "+0 and -0 are equal"
    k[:, :, 3] = math.nan
    k[:, :, 24:32] = -math.inf
    assert best_of(q, k, "N8K3")[-1] == [1, 2, 4]
    assert best_of(q, k, "N8K5")[-1] == [0, 1, 2, 3, 4]
    assert best_of(q, k.fill_(math.nan), "N8K2")[-1] == [0, 4], "the own block always"


# ---- The layer and the model ---------------------------------------------------------------------

def random_rule(rng, longest=40):
    fields = []
    for letter, sizes in (("D", (1, 2, 3, 5, 8, 16)), ("W", (0, 1, 4, 7)), ("S", (0, 1, 4, 7))):
        if rng.random() < 0.6:
            fields.append(f"{letter}{rng.choice((*sizes, longest + 9))}")
    return "".join(fields) or "W0"


def random_pattern(rng, n_layer=2, n_head=4, longest=40):
    groups = [n for n in (1, 2, 4) if n_head % n == 0]
    layers = []
    for _ in range(rng.randint(1, n_layer)):
        rules = [random_rule(rng, longest) for _ in range(rng.choice(groups))]
        layers.append("/".join(rules))
    return ",".join(layers)


def test_dilation_1_equals_dense():
    """Whatever allows every earlier position is plain causal attention."""
    model = tiny(n_layer=3)
    idx = torch.randint(50, (2, 70))
    dense = model(idx)
    for pattern in ("D1W3S2", "W69", "S70", "D1,D1", "D1/D1", "D1W5/D1S3,W69", "N8K9",
                    "N60K2,D1/N70K1"):
        assert_same(pattern, model(idx, pattern), dense)
    assert model(idx, "D4,D1/D8").equal(model(idx, "D4,D1/D8,D4")), "the layers are cycled"


def test_decay_0_gives_plain_attention():
    """A gate that always says 0 switches the recurrence off; the layer's own gate matters."""
    model = tiny()
    plain = tiny(recurrence=False)
    weights = model.state_dict()
    for i in range(2):
        name = f"blocks.{i}.mix.in_proj.weight"
        weights[name] = weights[name][:4 * 32]                  # o, q, k, v
    plain.load_state_dict(weights)
    idx = torch.randint(50, (2, 40))
    assert_differ("with and without recurrence", model(idx), plain(idx))

    def forget(module, inputs, parts):
        parts[..., 4 * 32:] = -1e4

    for block in model.blocks:
        block.mix.in_proj.register_forward_hook(forget)
    for pattern in ("D1", "D8W3"):
        assert_same(pattern, model(idx, pattern), plain(idx, pattern))
    assert (plain.config.name, model.config.name) == ("attention-only", "RAT+")


@pytest.mark.parametrize("case", [*range(8), *TOPK])
def test_no_future_leak(case):
    """Token j moves no logit before j, but one from j on. With top-k blocks every weight learns."""
    rng = random.Random(case)
    pattern = case if case in TOPK else random_pattern(rng)
    model = tiny(recurrence=case in TOPK or case % 3 > 0)
    idx = torch.randint(50, (1, 40))
    j = rng.randrange(1, 40)
    other = idx.index_add(1, torch.tensor([j]), torch.ones(1, 1, dtype=torch.long)) % 50
    before = model(idx, pattern)
    after = model(other, pattern)
    assert before[:, :j].equal(after[:, :j]), f"{pattern}: token {j} changed an earlier logit"
    assert not before[:, j:].equal(after[:, j:]), f"{pattern}: token {j} changed nothing"
    for name, gradient in gradients(model, idx, pattern).items():
        assert gradient.isfinite().all() and (gradient.norm() > 0 or case not in TOPK), name


def test_hybrid_heads_are_each_head_by_itself():
    """One layer's mixing under D1/D4/N4K3/D8S2 is, head by head, that under each rule alone."""
    mix = tiny().blocks[1].mix
    x = torch.randn(2, 30, 32)
    rope = rope_angles(torch.arange(30), 8)
    seen = []

    def look(module, inputs, output):
        seen.append(inputs[0].view(2, 30, 4, 8))

    mix.out_proj.register_forward_hook(look)
    for pattern in ("D1/D4/N4K3/D8S2", "D1", "D4", "N4K3", "D8S2"):
        mix(x, rope, Pattern.parse(pattern).rules(1))
    for head in range(4):
        assert_same(f"head {head}", seen[0][:, :, head], seen[head + 1][:, :, head], 1e-6)


def test_loss_is_the_mean_over_targets_that_count(device):
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx, targets = torch.randint(50, (2, 2, 9), device=device)
    targets[0, :4] = -100
    logp = model(idx, "D4").log_softmax(-1)
    counted = targets >= 0
    picked = logp[counted].gather(1, targets[counted][:, None])
    loss = model.loss(idx, targets, "D4")
    assert_same("loss", loss, -picked.mean())
    assert_same("loss of int32 targets", model.loss(idx, targets.int(), "D4"), loss, 0)
    assert loss.dtype == torch.float32
    marked = targets.masked_fill(targets == -100, -1)
    assert_same("loss of targets that -1 marks", model.loss(idx, marked, "D4"), loss, 0)
    wrong = idx.index_fill(1, torch.tensor([3], device=device), 77)
    if model_py.on_kernels(model.embed.weight):                 # an error would have to wait
        assert model.loss(idx, wrong).isnan()
    else:
        assert_refused(lambda: model.loss(idx, wrong), "77", kind=IndexError)
    nothing = model.loss(idx, torch.full_like(targets, -100))
    nothing.backward()
    assert nothing == 0 and model.embed.weight.grad.norm() == 0


@pytest.mark.parametrize("chunk", [4, 8192])
def test_head_loss_is_cross_entropy_in_chunks(kernels_on, chunk):
    """Value and gradients, with chunks of rows that do not divide the tokens; loud logits."""
    x = torch.randn(10, 8, device=kernels_on)
    weight = 9 * torch.randn(300, 8, device=kernels_on)
    y = torch.randint(300, (10,), device=kernels_on)
    y[3] = -100
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss = model_py.kernels.HeadLoss.apply(*leaves, y, torch.float32, True, chunk)
    expected = F.cross_entropy(x.double() @ weight.double().T, y, reduction="sum")
    assert_same("loss", loss, expected)
    grads = zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves))
    for name, (found, want) in zip(("dx", "dweight"), grads):
        assert_same(name, found, want)


def test_loss_under_autocast_is_that_of_plain_cross_entropy(device):
    """With every gradient; the loss is float32."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (1, 17), device=device)
    weights = list(model.parameters())
    with torch.autocast(device, HALF):
        loss = model.loss(idx[:, :-1], idx[:, 1:], "D8W4")
        logits = model(idx[:, :-1], "D8W4").float()
    expected = F.cross_entropy(logits.flatten(0, 1), idx[0, 1:])
    assert loss.dtype == torch.float32
    assert_same("loss", loss, expected, 0.01)
    grads = zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))
    for (name, _), (found, want) in zip(model.named_parameters(), grads):
        assert found.dtype == torch.float32
        assert_same(f"gradient of {name}", found, want, 0.05)


@gpu
def test_loss_and_gradients_at_full_size_on_a_gpu():
    """A vocabulary of 50304 and several chunks of tokens, through compiled blocks in bfloat16."""
    model = RATPlus(RATConfig(50304, 2, 2, 128)).cuda()
    twin = copy.deepcopy(model)
    idx = torch.randint(50304, (8, 2049), device="cuda")
    model.compile(dynamic=False)
    with torch.autocast("cuda", torch.bfloat16):
        model.loss(idx[:, :-1], idx[:, 1:], "D64").backward()
        logits = twin(idx[:, :-1], "D64").float()
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for (name, p), other in zip(model.named_parameters(), twin.parameters()):
        assert_same(f"gradient of {name}", p.grad, other.grad, 0.03)


def test_dense_attention_compiles_for_any_length():
    model = tiny(n_head=2, n_embd=16, recurrence=False)
    model.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for T in 5, 9:
        idx = torch.randint(50, (1, T))
        found = model(idx)
        with torch.compiler.set_stance("force_eager"):
            assert_same("logits", found, model(idx))


@pytest.mark.parametrize("pattern", ["D4W3S1/W2,D1", "N4K2,D4N4K2:minmax"])
def test_gradients_are_those_of_float64_checkpointing_or_not(device, pattern):
    """Of every weight, on both paths."""
    idx = torch.randint(50, (2, 17))
    expected = gradients(tiny(n_head=2, n_embd=16).double(), idx, pattern)
    model = tiny(n_head=2, n_embd=16).to(device)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.checkpointing in False, True:
        for name, gradient in gradients(model, idx.to(device), pattern).items():
            assert_same(f"gradient of {name}", gradient.cpu(), expected[name])
    assert len(calls) == 3, "checkpointing runs a block in forward and in backward"


@pytest.mark.parametrize("op", ["loss", "recurrence", "attention"])
def test_double_backward_by_kernels_is_an_error(kernels_on, op):
    """Never a wrong number in silence, whichever other way leads back to the leaf."""
    model = tiny(n_layer=1, n_head=2, n_embd=16, recurrence=False).to(kernels_on)
    idx = torch.randint(50, (1, 9), device=kernels_on)
    x = torch.randn(3, 1, 2, 9, 8, device=kernels_on, requires_grad=True)
    leaf = model.embed.weight if op == "loss" else x
    with sdpa_kernel(SDPBackend.MATH):  # dense attention differentiates twice so
        y = {"loss": lambda: model.loss(idx, idx),
             "recurrence": lambda: recurrence(*x[:, 0])[0],
             "attention": lambda: attention(*x, 4, 2, 1)}[op]()
        with pytest.raises(RuntimeError, match="second derivative|no autograd formula"):
            first, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            torch.autograd.grad(first.square().sum(), leaf)


def test_presets_are_the_papers_shapes():
    for name, layers, width in ("1.5b", 24, 2048), ("2.6b", 28, 2560), ("7.6b", 32, 4096):
        config = RATConfig(32000, **PRESETS[f"paper-{name}"])
        assert (config.n_layer, config.n_embd, config.head_width) == (layers, width, 128)
        with torch.device("meta"):
            count = sum(p.numel() for p in RATPlus(config).parameters())
        assert count == pytest.approx(1e9 * float(name[:-1]), rel=0.05)


def test_empty_batches_give_empty_results(device):
    model = tiny(n_head=2, n_embd=16).to(device)
    idx = torch.zeros(0, 6, dtype=torch.long, device=device)
    assert model(idx, "D4W2").shape == (0, 6, 50)
    loss = model.loss(idx, idx, "D4W2")
    loss.backward()
    assert loss == 0 and all(p.grad.norm() == 0 for p in model.parameters())
    assert model.generate(idx, 3, "D4W2").shape == (0, 9)
    assert model.new_cache(0, 9, "D4W2").nbytes == 0
    assert model.generate(idx, 0).equal(idx)
    for pattern in ("D4W3S1", "N4K2"):
        assert model.new_cache(1, 0, pattern).slots == [[0]] * 2, pattern


def test_without_kernels_py_the_model_trains_generates_and_saves(tmp_path, monkeypatch):
    """Nor any other file of the project."""
    for name in ("kernels", "train", "adapt", "eval", "sample"):
        monkeypatch.setitem(sys.modules, name, None)            # importing it is an ImportError
    spec = importlib.util.spec_from_file_location("alone", ROOT / "model.py")
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alone", alone)            # dataclasses look there
    spec.loader.exec_module(alone)
    assert alone.kernels is None
    model = alone.RATPlus(alone.RATConfig(50, 2, 2, 16))
    idx = torch.randint(50, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for pattern in ("D4", "D1"):
        loss = model.loss(idx[:, :-1], idx[:, 1:], pattern)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = model.generate(idx, 8, "D4W2S1", temperature=0)
    alone.save_checkpoint(tmp_path / "a.pt", model)
    loaded, _ = load_checkpoint(tmp_path / "a.pt")
    assert tokens.equal(loaded.generate(idx, 8, "D4W2S1", temperature=0))


# ---- Refusals: one line that names the argument, the same on both paths --------------------------

def refusals(device):
    k = torch.randn(3, 9, 8, device=device)
    x = torch.randn(2, 2, 9, 8, device=device)
    idx = torch.randint(50, (2, 9), device=device)
    model = tiny(n_layer=1).to(device)
    one = torch.zeros(1, 8, device=device)
    three = torch.zeros(3, 8, device=device)
    found = {
        "state of batch 1": ("state", lambda: recurrence(k, k, k, (one, one))),
        "state v of batch 1": ("state", lambda: recurrence(k, k, k, (three, one))),
        "state of 4 channels": ("state", lambda: recurrence(k, k, k, (three[:, :4], three[:, :4]))),
        "g of another length": ("recurrence", lambda: recurrence(k, k, k[:, :8])),
        "k of another width": ("recurrence", lambda: recurrence(k[..., :1], k, k)),
        "no steps": ("recurrence", lambda: recurrence(k[:, :0], k[:, :0], k[:, :0])),
        "k_rec of another length": ("k_rec", lambda: attention(x, x[:, :, :8], x, 4, 0, 0)),
        "v_rec of other heads": ("v_rec", lambda: attention(x, x, x[:, :1], 4, 0, 0)),
        "v_rec of another dtype": ("v_rec", lambda: attention(x, x, x.half(), 4, 0, 0)),
        "targets of T - 1": ("targets", lambda: model.loss(idx, idx[:, 1:])),
        "targets of one row": ("targets", lambda: model.loss(idx, idx[:1])),
        "no tokens": ("tokens", lambda: model(idx[:, :0])),
        "flat tokens": ("tokens", lambda: model(idx[0])),
        "g on another device": ("meta", lambda: recurrence(k, k, k.to("meta"))),
        "state on another device": ("meta", lambda: recurrence(k, k, k, k[:2].to("meta"))),
        "targets on another device": ("meta", lambda: model.loss(idx, idx.to("meta"))),
    }
    if GPU:
        there = x.to("cpu" if device == "cuda" else "cuda")
        found["v_rec on another device"] = "v_rec", partial(attention, x, x, there, 4, 0, 0)
    for wrong in dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=0), dict(top_p=1.5):
        found[f"sampling {wrong}"] = "top_k", partial(choose, k[0], **wrong)
    found["sampling top_p 0"] = "top_p", partial(choose, k[0], top_p=0.0)
    for span in (-1, 0, 0), (4, -1, 0), (4, 0, -1):
        found[f"attention {span}"] = "window", partial(attention, x, x, x, *span)
        found[f"allowed {span}"] = "window", partial(allowed, 3, torch.arange(3), *span)
    for sizes in (50, 0, 1, 8), (50, 1, 3, 8), (50, 1, 8, 8), (0, 1, 1, 8), (50, 1, -2, 8):
        found[f"config {sizes}"] = "n_embd .* n_head", partial(RATConfig, *sizes)
    return found


@pytest.mark.parametrize("name", refusals("cpu"))
def test_wrong_arguments_are_refused_in_one_line(device, name):
    argument, call = refusals(device)[name]
    assert_refused(call, argument)


# ---- Patterns ------------------------------------------------------------------------------------

CANONICAL = {
    "D16": "D16", "D1": "D1", "D16W256S4": "D16W256S4", "D1,D64": "D1,D64", "D1/D64": "D1/D64",
    "N64K16": "N64K16", "N64K16:minmax": "N64K16:minmax", "D64N64K8:last": "D64N64K8:last",
    "W0": "W0", "S4": "S4", "D4W2/D8S1,W3/N4K2:minmax": "D4W2/D8S1,W3/N4K2:minmax",
    "D999999999": "D999999999", "D16W0S0": "D16", "D016": "D16", "W0S0": "W0", "S0": "W0",
    "D1W0,W5S0": "D1,W5", "N64K16:mean": "N64K16",
}


@pytest.mark.parametrize("text", CANONICAL)
def test_patterns_print_as_their_canonical_text(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == CANONICAL[text]
    assert Pattern.parse(pattern) is pattern
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse("N64K16") != Pattern.parse("N64K16:last")


MALFORMED = ["", " ", "D", "W", "S", "D-1", "D0", "D16D16", "S4W2", "W2D4", "16", "d16", "D16 ",
             " D16", "D1, D4", "D1,", ",D1", "D1//D4", "/", "D1/", "K16", "N64", "N0K4", "N4K0",
             "K4N4", "D1.5", "D1e9", "1e9", "D+4", "D16x", "D16;D4", "D16\n", "D٣", "D9999999999",
             "W" + "9" * 5000, "X4", "D16W", "none", "D1|D4", "N4K2:", ":mean", "N4K2:max",
             "N4K2:Mean", "N4K2: mean", "D16:mean", "W0:last", "N4K2:mean:last",
             "N4K2:last,D4:last", None, 16, 1e9, ["D1"]]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text)[:20])
def test_malformed_patterns_are_refused_in_one_line(text):
    assert_refused(lambda: Pattern.parse(text), re.escape(repr(text)[:99]), "A right one is")


@pytest.mark.parametrize("pattern, reason", [
    ("D1,D2,D4", "2 layers"), ("D1/D2/D4", "4 heads"), ("D1,D1/D2/D4", "4 heads")])
def test_patterns_that_do_not_fit_the_model_are_refused(pattern, reason):
    model = tiny()
    idx = torch.zeros(1, 4, dtype=torch.long)
    for call in (lambda: Pattern.parse(pattern).check(model.config), lambda: model(idx, pattern),
                 lambda: model.loss(idx, idx, pattern), lambda: model.new_cache(1, 8, pattern),
                 lambda: model.generate(idx, 2, pattern)):
        assert_refused(call, reason)


def test_a_mask_is_the_rule_of_its_layer_and_group():
    t = torch.arange(9)
    hybrid = Pattern.parse("D1/D4S1,W3")
    spans = {(0, 0): (1, 0, 0), (0, 1): (4, 0, 1), (1, 0): (0, 3, 0), (2, 1): (4, 0, 1)}
    for place, span in spans.items():
        assert hybrid.mask(9, *place).equal(allowed(t[:, None], t, *span)), place
    assert_refused(lambda: Pattern.parse("D64N64K16").mask(9), "top-k blocks follow the data")


def test_model_py_draws_a_pattern(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["model.py", *arguments])
        runpy.run_path(str(ROOT / "model.py"), run_name="__main__")

    run("D4W1S2", "9")
    drawn = capsys.readouterr().out.splitlines()
    assert drawn[0] == "D4W1S2: layer 0 of every 1, group 0 of 1"
    assert "   8 S S . D . . . D W" in drawn
    for arguments, why in ((["D-1"], "D-1"), (["N4K2"], "N4K2"), (["D4", "-5"], "-5"),
                           (["D4", "x"], "x"), (["D4", "9" * 20], "1 to 1000"), ([], "usage")):
        assert_refused(lambda: run(*arguments), why, kind=SystemExit)   # a text: exit status 1


# ---- Checkpoints ---------------------------------------------------------------------------------

def assert_same_model(a, b):
    assert a.config == b.config
    expected = b.state_dict()
    for name, x in a.state_dict().items():
        assert x.equal(expected[name]), name


@pytest.mark.parametrize("recurrence", [True, False])
def test_checkpoint_round_trip(tmp_path, recurrence):
    """A compiled model is saved as itself, any is loaded as float32."""
    model = tiny(recurrence=recurrence).bfloat16()
    path = tmp_path / "a.pt"
    meta = dict(step=7, pattern="D16", nested={"lr": [0.1, None, "x"]}, state=torch.arange(3))
    compiled = torch.compile(model, backend="eager")
    save_checkpoint(path, compiled, **meta, config="is the model's own")
    loaded, found = load_checkpoint(path)
    assert_same_model(loaded, model.float())
    assert found.pop("state").equal(meta.pop("state"))
    assert found == {**meta, "tokenizer": "ids"}
    assert os.listdir(tmp_path) == ["a.pt"], "no temporary file stays"
    for name, gradient in gradients(loaded, torch.zeros(1, 4, dtype=torch.long), "D1").items():
        assert gradient.isfinite().all() and gradient.dtype == torch.float32, name


def test_the_authors_checkpoint_loads_in_every_form(tmp_path, golden):
    """Rows of the gate apart, torch.compile's prefix, half precision; easydict is not needed."""
    assert "easydict" not in sys.modules
    state = authors("state/")
    split = {}
    for name, tensor in state.items():
        split[name] = tensor
        if "in_proj" in name:
            split[name] = tensor[:128]
            split[name.replace("in_proj", "fgate_proj")] = tensor[128:]
    forms = {
        "task": state,
        "compiled": {f"_orig_mod.{name}": tensor for name, tensor in split.items()},
        "half": {name: tensor.bfloat16() for name, tensor in state.items()},
    }
    for form, weights in forms.items():
        path = tmp_path / f"{form}.pth"
        torch.save({"task": weights, "config": AUTHORS_CONFIG, "step": 3}, path)
        model, meta = load_checkpoint(path)
        assert meta == {"tokenizer": "ids", "pattern": "D1", "step": 3}
        assert model.embed.weight.dtype == torch.float32
        if form == "half":
            assert_same("embed", model.embed.weight, golden["rat"].embed.weight, 1e-2)
        else:
            assert_same_model(model, golden["rat"])


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def broken_files(tmp_path):
    """{name: bytes or an object for torch.save} of files that are no checkpoint."""
    save_checkpoint(tmp_path / "good.pt", tiny())
    good = (tmp_path / "good.pt").read_bytes()
    whole = torch.load(tmp_path / "good.pt", weights_only=True)
    state = authors("state/")
    untied = {**state, "head.lm_head.weight": state["embedding.wte.weight"] + 1}
    return {
        "empty": b"",
        "half": good[:len(good) // 2],
        "tail": good[:-1],
        "text": b"not a checkpoint\n",
        "pickle": pickle.dumps({"a": 1}),
        "list": [1, 2],
        "dict": {"a": torch.ones(2)},
        "missing": {**whole, "model": {}},
        "shape": {**whole, "config": {**whole["config"], "n_embd": 64}},
        "unknown_field": {**whole, "config": {**whole["config"], "dropout": 0.1}},
        "untied": {"task": untied, "config": AUTHORS_CONFIG},
        "bomb": {"task": state, "config": Bomb()},
    }


def test_broken_and_foreign_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch):
    """And nothing in them is executed."""
    monkeypatch.chdir(tmp_path)
    for name, data in broken_files(tmp_path).items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        assert_refused(lambda: load_checkpoint(path), f"{path}: not a whole checkpoint")
        assert not os.path.exists("exploded")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, tiny(), step=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, tiny(), step=2, bad=lambda: None)         # can't be pickled
    resource = pytest.importorskip("resource", reason="no file size limits on this platform")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))   # as a full disk
        assert_refused(lambda: save_checkpoint(path, tiny(), step=3), "is not saved", kind=OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert load_checkpoint(path)[1]["step"] == 1 and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_kill_9_during_a_save_leaves_a_good_checkpoint(tmp_path):
    """A child that only saves is killed at random moments. The file is whole and not older."""
    path = tmp_path / "a.pt"
    model = RATPlus(RATConfig(5000, 1, 1, 64))
    save_checkpoint(path, model, step=0)
    rng = random.Random(0)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            for i in itertools.count(load_checkpoint(path)[1]["step"] + 1):
                save_checkpoint(path, model, step=i)
        before = load_checkpoint(path)[1]["step"]
        time.sleep(0.1 + 0.05 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded, meta = load_checkpoint(path)
        assert meta["step"] >= before
        assert_same_model(loaded, model)
    assert meta["step"] > 0
