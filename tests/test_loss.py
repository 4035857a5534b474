"""model.loss has the value and the gradients of plain cross-entropy over all logits."""
import copy

import pytest
import torch
import torch.nn.functional as F

from model import RATConfig, RATPlus


def tiny():
    torch.manual_seed(0)
    return RATPlus(RATConfig(50, 2, 2, 16))


def error_of(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


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
        error = error_of(p.grad, q.grad)
        assert error < (2e-2 if bfloat16 else 1e-5), f"{name}: relative error {error:.1e}"


def test_checkpointing_changes_no_gradient():
    model, twin, idx = tiny(), tiny(), torch.randint(50, (2, 40))
    twin.checkpointing = True
    for m in (model, twin):
        m.loss(idx, idx, "D8,D1").backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert error_of(q.grad, p.grad) < 1e-6, f"{name} differs"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
