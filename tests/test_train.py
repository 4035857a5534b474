"""Training at speed: the loss without logits, compilation, several processes, and what survives a kill or a full disk."""
import copy
import functools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from kernels import relative_error
from model import LinearCrossEntropy, Pattern, RATConfig, RATPlus, load_checkpoint
from test_model import ROOT, tiny
from test_scripts import TINY, call, losses, ok, scratch, script  # noqa: F401  (scratch: a folder of its own with some text)

RUN = [*TINY, "--data", "text", "--steps", 24, "--eval-interval", 8, "--log-interval", 1, "--arl", "D4"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def torchrun(name, *args):
    """Start a script in two processes; unless the test is about GPUs, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / f"{name}.py"]
    return subprocess.Popen([*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    """(stdout, stderr, exit code) of a process that is given two minutes to end."""
    try:
        return *process.communicate(timeout=120), process.returncode
    finally:
        process.kill()


def close(a, b, tolerance=1e-4):
    """Do two runs' logs hold the same losses, step by step?"""
    assert a.keys() == b.keys(), f"steps {sorted(a.keys() ^ b.keys())} are in one log only"
    for step in a:
        for pattern in a[step]:
            assert abs(a[step][pattern] - b[step][pattern]) < tolerance, f"step {step} {pattern}: {a[step]} and {b[step]}"


# ---------------------------------------------------------------------------------------------
# The loss

def plain(x, weight, targets):
    return F.cross_entropy((x @ weight.T).float() if x.dtype != torch.float64 else x @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 7, 30, 64])
def test_the_loss_and_its_gradients_are_those_of_all_logits_at_once(dtype, limit, rows):
    """30 tokens in chunks of 1, of 7 (the last is ragged), in one, in one that is not full; weights float32 under bfloat16."""
    master = torch.promote_types(dtype, torch.float32)
    inputs = [torch.randn(30, 8, dtype=master, requires_grad=True), torch.randn(50, 8, dtype=master, requires_grad=True)]
    targets = torch.randint(50, (30,))
    targets[::4] = -100
    ours = LinearCrossEntropy.apply(*inputs, targets, dtype, True, rows)
    exact = plain(*(z.double() for z in inputs), targets)
    assert ours.dtype == master and relative_error(ours, exact) < limit
    for name, a, b in zip(("dx", "dW"), torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * exact, inputs)):
        assert a.dtype == master and relative_error(a, b) < limit, f"{name}: relative error {relative_error(a, b):.1e}"
    with torch.no_grad():
        assert LinearCrossEntropy.apply(*inputs, targets, dtype, False, rows) == ours


def test_the_loss_by_finite_differences():
    x, weight = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([0, 5, -100, 2, 2, 1, -100, 3, 4])
    assert torch.autograd.gradcheck(lambda *z: LinearCrossEntropy.apply(*z, targets, torch.float64, True, 4),
                                    (x.requires_grad_(), weight.requires_grad_()))


def test_a_batch_without_targets_has_no_loss_and_no_gradient():
    model = tiny()
    loss = model.loss(torch.randint(50, (2, 9)), torch.full((2, 9), -100))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_gradient_of_the_model_is_that_of_plain_cross_entropy(bfloat16):
    model, twin, idx = tiny(), tiny(), torch.randint(50, (2, 40))
    targets = idx.roll(-1, 1).masked_fill(idx == 3, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model.loss(idx, targets, "D8W2").backward()
        F.cross_entropy(twin(idx, "D8W2").float().flatten(0, 1), targets.flatten()).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        error = relative_error(p.grad, q.grad)
        assert error < (2e-2 if bfloat16 else 1e-5), f"{name}: relative error {error:.1e}"


def test_no_tensor_is_as_large_as_the_logits():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(z.numel() for z in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(z))])
            return out

    x, weight = torch.randn(512, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with Watch():
        LinearCrossEntropy.apply(x, weight, torch.randint(300, (512,)), torch.float32, True, 64).backward()
    assert largest == 64 * 300, "a chunk's logits, not 512 * 300"


def test_checkpointing_changes_no_gradient():
    model, twin, idx = tiny(), tiny(), torch.randint(50, (2, 40))
    twin.checkpointing = True
    for m in (model, twin):
        m.loss(idx, idx, "D8,D1").backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert relative_error(q.grad, p.grad) < 1e-6, f"{name} differs"


# ---------------------------------------------------------------------------------------------
# The loop

def small_fit(due=lambda step: False, recurrence=True, dense=False, **flags):
    """The records of a short run of `fit` in this process, with D4 and D1 or D1 alone."""
    torch.manual_seed(0)
    model, passes = RATPlus(RATConfig(64, 1, 2, 16, recurrence)), [Pattern.parse(pattern) for pattern in ("D4", "D1")[dense:]]
    defaults = dict(steps=3, batch_size=4, context=12, device="cpu", log_interval=1, lr=0.02)
    config = train.TrainConfig(**{**defaults, **flags})

    def batch(step):
        return torch.randint(64, (2, 4, 12), generator=torch.Generator().manual_seed(step)).unbind()

    return train.fit(model, config, passes, batch, train.new_optimizer(model, config), due=due)


@pytest.mark.parametrize("backend, shape", [("eager", dict(recurrence=True)), ("inductor", dict(recurrence=False, dense=True))])
def test_compile_on_and_off_agree(monkeypatch, backend, shape):
    """Both passes of ARL through the tracer; machine code, whose making takes long, for dense attention only."""
    if not train.TrainConfig(compile=True, device="cpu").compile:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(RATPlus, "compile", functools.partialmethod(RATPlus.compile, backend=backend))
    compiled, eager = ([record["losses"] for record in small_fit(compile=compile, **shape)] for compile in (True, False))
    for a, b in zip(compiled, eager):
        assert all(abs(a[pattern] - b[pattern]) < 1e-4 for pattern in a), f"{a} compiled, {b} eagerly"


def test_compile_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert train.TrainConfig(compile=True, device="cpu").compile is False
    out = capsys.readouterr().out
    assert "going on without" in out and out.count("\n") == 1
    assert train.TrainConfig(device="cpu").compile is False and capsys.readouterr().out == "", "off on a CPU unless asked for"


def test_what_is_not_finite_is_found_before_the_caller_can_save(monkeypatch):
    """A weight is poisoned in step 3, at which nothing looks; the record that is due after step 5 must not come."""
    update, calls, steps = train.update, [], []

    def poisonous(loss_fn, *args):
        calls.append(args)
        if len(calls) == 5:
            loss_fn.model.norm.weight.data[0] = math.nan
        return update(loss_fn, *args)

    monkeypatch.setattr(train, "update", poisonous)
    with pytest.raises(ValueError, match="loss nan, gradient norm nan at step 5"):
        for record in small_fit(steps=9, log_interval=100, due=lambda step: step == 5):
            steps.append(record["step"])
    assert steps == [1]


def test_a_run_that_gets_no_gradient_is_stopped(monkeypatch):
    monkeypatch.setattr(train.Loss, "forward", lambda self, *args: sum(0 * p.sum() for p in self.parameters()) + 5)
    with pytest.raises(ValueError, match="gradient norm 0.0 at step 1"):
        next(small_fit())


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="--batch-size 16 does not split into --grad-accum 3 x 1 processes"):
        train.TrainConfig(batch_size=16, grad_accum=3, device="cpu").check()


def test_mfu_counts_the_matrix_products_and_the_keys():
    for recurrence in (True, False):
        shape, T = RATConfig(64, 2, 4, 32, recurrence), 24
        model, idx = RATPlus(shape), torch.randint(64, (2, T))
        with FlopCounterMode(display=False) as counter:
            model.loss(idx, idx, "D1").backward()
        products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
        keys = [[Pattern.parse(pattern).mask(T, layer).sum().item() / T for layer in (0, 1)] for pattern in ("D8W2,D1", "D1")]
        attention = 12 * 32 * sum(map(sum, keys))               # 2 products of 2 C FLOPs a key; backward is twice forward
        passes = [Pattern.parse("D8W2,D1"), Pattern.parse("D1")]
        assert abs(train.flops_per_token(shape, passes, T) - (2 * products / idx.numel() + attention)) < 1e-3


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
                                        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165),
                                        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.inf), ("NVIDIA L40", math.inf)])
def test_the_peak_is_known_by_the_cards_name(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    config = train.TrainConfig(device="cpu", dtype="bfloat16")
    assert train.peak_flops(config) == math.inf, "no GPU, no MFU"
    config.device = "cuda"
    assert train.peak_flops(config) == (peak if peak == math.inf else peak * 1e12)


# ---------------------------------------------------------------------------------------------
# Several processes

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of RUN in a single process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        os.mkdir("text")
        for i in range(30):
            Path(f"text/{i}.txt").write_text("".join(f"{i} + {j} = {i + j}\n" for j in range(40)))
        ok(script("train", *RUN))
        return losses("out"), load_checkpoint("out/dense.pt")


def test_two_processes_train_adapt_and_evaluate_as_one(whole, capsys):
    """With gradient accumulation on top: 2 processes x 2 parts of one sequence, each with a number of targets of its own."""
    out, err, code = finished(torchrun("train", *RUN, "--grad-accum", 2))
    assert code == 0, err
    assert out.count("RAT+ |") == 1 and "| 2 processes" in out and out.count("step 0024/0024") == 1, "one process prints"
    close(losses("out"), whole[0])
    for (name, p), q in zip(load_checkpoint("out/dense.pt")[0].named_parameters(), whole[1][0].parameters()):
        assert relative_error(p, q) < 1e-4, f"{name}: relative error {relative_error(p, q):.1e}"
    val = load_checkpoint("out/dense.pt")[1]["val"]
    assert all(abs(val[pattern] - loss) < 1e-4 for pattern, loss in whole[1][1]["val"].items()), "validation is split and summed"
    tables = []
    for name, args in (("adapt", ["--pattern", "D8", "--steps", 3]), ("eval", [])):
        args = [*args, "--device", "cpu", "--eval-batch", 1]
        out, err, code = finished(torchrun(name, *args))
        assert code == 0, err
        call(name, *args, *["--overwrite"] * (name == "adapt"))
        tables.append([[line for line in text.splitlines() if line.startswith("| ")] for text in (out, capsys.readouterr().out)])
    for together, alone in tables:
        assert together == alone, "\n".join((*together, *alone))


def test_a_run_stops_with_all_its_processes_and_goes_on_in_one(whole):
    process = torchrun("train", *RUN)
    for line in process.stdout:
        if line.startswith("step 0009"):
            break
    process.send_signal(signal.SIGTERM)
    _, err, code = finished(process)
    assert code != 0 and err.count("train.py: interrupted; step") == 1, err
    step = load_checkpoint("out/dense.pt")[1]["step"]
    assert 9 <= step < 24 and max(losses("out")) == step
    ok(script("train", "--resume", "--device", "cpu"))
    close(losses("out"), whole[0])


BROKEN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train
cut, steps = train.cut, []
def cut_some(*args):
    steps.append(args)
    if len(steps) == 6 and train.RANK == 1:
        raise ValueError("a batch that\\ncan't be read")
    return cut(*args)
train.cut = cut_some
train.run(train.main)
"""


def test_an_error_in_one_process_ends_all_with_one_line_about_it():
    Path("broken.py").write_text(BROKEN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "broken.py", ROOT, *RUN]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err, code = finished(process)
    assert code != 0 and err.count("broken.py: a batch that can't be read") == 1 and "File \"train.py" not in err, err
    assert not os.path.exists("out/dense.pt")


def test_bad_input_is_said_once():
    _, err, code = finished(torchrun("train", *TINY, "--data", "nowhere"))
    assert code != 0 and err.count("--data") == 1 and "nowhere" in err, err


# ---------------------------------------------------------------------------------------------
# What survives

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train
moment, save, replace, update, count = sys.argv.pop(1), torch.save, os.replace, train.update, 0
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
def rename(*args):
    if moment == "renamed" or not args[1].endswith(".pt"): replace(*args)
    if args[1].endswith(".pt"): die()
def half(data, file):
    file.write(b"PK half a checkpoint")
    file.flush()
    die()
def later(*args):
    global count
    count += 1
    return update(*args) if count < 26 else die()               # between the sparse and the dense update of a step
if moment == "written half": torch.save = half
if "renamed" in moment: os.replace = rename
if moment == "in a step": train.update = later
train.run(train.main)
"""


def test_kill_9_at_any_moment_loses_nothing(whole):
    """One run, killed in saves, before and after the renaming, and in a step: always the same curve."""
    steps, resume = [], []
    for moment in ("renamed", "written half", "not renamed", "in a step"):
        args = [sys.executable, "-c", KILLED, ROOT, moment, *map(str, RUN), *resume]
        assert subprocess.run(args, capture_output=True).returncode == -signal.SIGKILL
        steps.append(load_checkpoint("out/dense.pt")[1]["step"])
        resume = ["--resume"]
    assert steps == [8, 8, 8, 16]
    ok(script("train", "--resume", "--device", "cpu"))
    assert losses("out") == whole[0], "bit for bit"
    assert all(p.equal(q) for p, q in zip(load_checkpoint("out/dense.pt")[0].parameters(), whole[1][0].parameters()))


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint():
    resource = pytest.importorskip("resource", reason="no file size limits on this platform")
    ok(script("train", *RUN, "--steps", 2))
    before = Path("out/dense.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))      # noqa: E731
    done = subprocess.run([sys.executable, ROOT / "train.py", "--resume", "--steps", "4", "--device", "cpu"],
                          capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "out/dense.pt is not saved, an older one is as it was" in done.stderr
    assert Path("out/dense.pt").read_bytes() == before and not os.path.exists("out/dense.pt.tmp")
    assert load_checkpoint("out/dense.pt")[1]["step"] == 2


# ---------------------------------------------------------------------------------------------
# On a GPU

ON_GPU = ["--n-layer", 2, "--n-head", 2, "--n-embd", 128, "--context", 128, "--batch-size", 4, "--data", "text", "--steps", 12,
          "--eval-interval", 6, "--log-interval", 1, "--device", "cuda"]


@needs_gpu
def test_a_resumed_run_on_a_gpu_is_the_same_within_tolerance():
    """Compiled, in bfloat16; atomic additions and the like may differ in the last bits."""
    ok(script("train", *ON_GPU, "--out", "whole"))
    killed = [sys.executable, "-c", KILLED, ROOT, "renamed", *map(str, ON_GPU), "--out", "cut"]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert load_checkpoint("cut/dense.pt")[1]["step"] == 6
    ok(script("train", "--resume", "--out", "cut"))
    close(losses("cut"), losses("whole"), 1e-2)


@needs_gpu
def test_compiled_and_eager_agree_on_a_gpu():
    for compile in ("--compile", "--no-compile"):
        out = ok(script("train", *ON_GPU, "--out", compile[2:], compile))
        assert ("compilation included" in out) == (compile == "--compile") and "| peak " in out
    close(losses("compile"), losses("no-compile"), 2e-2)
    found = losses("compile")
    assert found[12]["D1"] < found[1]["D1"] - 0.3, f"it does not learn: {found}"


@needs_gpu
def test_the_loss_and_its_gradients_at_full_size_on_a_gpu():
    """A vocabulary of 50304 and several chunks of tokens, through compiled blocks in bfloat16."""
    torch.manual_seed(0)
    model, idx = RATPlus(RATConfig(50304, 2, 2, 128)).cuda(), torch.randint(50304, (8, 2049), device="cuda")
    twin = copy.deepcopy(model)
    model.compile(dynamic=False)
    with torch.autocast("cuda", torch.bfloat16):
        model.loss(idx[:, :-1], idx[:, 1:], "D64").backward()
        F.cross_entropy(twin(idx[:, :-1], "D64").float().flatten(0, 1), idx[:, 1:].flatten()).backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters()):
        error = ((p.grad - q[1].grad).norm() / q[1].grad.norm()).item()
        assert error < 3e-2, f"{name}: relative error {error:.1e}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one():
    ok(script("train", *ON_GPU, "--out", "one"))
    _, err, code = finished(torchrun("train", *ON_GPU, "--out", "two"))
    assert code == 0, err
    close(losses("one"), losses("two"), 2e-2)
