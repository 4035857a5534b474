"""The decoding kernels, interpreted on a CPU or compiled on a GPU, against decode_ref in float64 and the parallel pass."""
import pytest
import torch

import kernels
import model as model_module
from kernels import FUTURE, allowed, attention_at, attention_chunk, decode_errors, positions, relative_error, slot_of
from test_decode import decode
from test_model import tiny

pytestmark = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPANS = [(1, 0, 0), (4, 0, 0), (16, 10, 4), (8, 5, 0), (64, 0, 0), (0, 12, 4), (0, 0, 0), (0, 0, 5), (4, 3, 9), (5, 96, 96)]


def kernel(splits=None):
    return lambda *args: kernels.decode_triton(*args, splits=splits)


def check(op, span, t, dtype=torch.float32, limit=None, **shape):
    limit = limit or {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name, error in decode_errors(op, span, t, 96, dtype, DEVICE, **shape):
        assert error < limit, f"{span} at {t}, {dtype}, {shape}: {name} has relative error {error:.1e}"


@pytest.mark.parametrize("span", SPANS)
def test_kernels_equal_the_reference(span):
    """Dilations beyond t, windows and sinks beyond t, at t = 0, the last position and in between; empty slots are not read."""
    for t in (0, 3, 41, 95):
        check(kernel(), span, t)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_splits_gives_the_same(splits):
    for span, t in (((1, 0, 0), 95), ((2, 30, 3), 90), ((1, 0, 0), 2)):
        check(kernel(splits), span, t, Dh=64)


@pytest.mark.parametrize("span", [(64, 0, 0), (4, 0, 0), (0, 5, 2)])
def test_scores_far_from_zero_neither_overflow_nor_vanish(span):
    """Scores of hundreds, of either sign: 2^score is beyond float32, and rounding of the scores shows 1000 times larger."""
    for t in (0, 3, 20):
        check(kernel(splits=2), span, t, limit=1e-3, loud=300)


@pytest.mark.parametrize("Dh", [2, 16, 24, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("recurrent", [True, False])
def test_head_widths_and_dtypes(Dh, dtype, recurrent):
    check(kernel(), (4, 9, 2), 77, dtype, H=3, Dh=Dh, recurrent=recurrent)


@pytest.mark.parametrize("pattern", ["D1", "D4W3S2,W5S1", "D1/D8"])
def test_decoding_by_kernels_matches_forward(monkeypatch, pattern):
    monkeypatch.setattr(model_module, "decode", kernels.decode_triton)
    model, idx = tiny(n_head=2, n_embd=16).to(DEVICE), torch.randint(50, (1, 16), device=DEVICE)
    with torch.no_grad():
        parallel = model(idx, pattern=pattern)
    logits, _ = decode(model, idx, pattern, (7, *(1,) * 9), max_len=40)
    for t, step in logits.items():
        error = relative_error(step, parallel[:, t])
        assert error < 1e-5, f"{pattern} position {t}: relative error {error:.1e}"


@pytest.mark.parametrize("span", SPANS)
def test_slots_hold_what_positions_says(span):
    """Storing every position in turn where slot_of says gives, at any length, exactly what the next query may use."""
    slots = span[1] + span[2] + (96 // span[0] if span[0] else 0)
    held = torch.full((slots,), FUTURE)
    for t in range(96):
        found = positions(torch.tensor([t]), slots, *span)
        assert held[found < FUTURE].equal(found[found < FUTURE]), t
        p = torch.arange(t)
        assert found[found < FUTURE].sort().values.equal(p[allowed(t, p, *span)]), t
        if allowed(t + 1, torch.tensor(t), *span):
            held[slot_of(torch.tensor([t]), *span)] = t


@pytest.mark.parametrize("span", [span for span in SPANS if span[0] != 1])
@pytest.mark.parametrize("start, end", [(1, 2), (5, 40), (37, 96), (90, 93)])
def test_a_chunk_attends_as_the_whole_sequence_does(span, start, end):
    q, k, v = torch.randn(3, 2, 3, end, 8)
    p, window = torch.arange(end), min(span[1], start)
    kept = p[allowed(FUTURE, p, *span)]                         # on the grid or sinks: they are in the cache, the ring is garbage
    cache = torch.full((2, 2, 3, span[1] + span[2] + (96 // span[0] if span[0] else 0), 8), torch.nan)
    cache[:, :, :, slot_of(kept, *span)] = torch.stack((k, v))[:, :, :, kept]
    y = attention_chunk(q[:, :, start:], *cache, k[:, :, start - window:], v[:, :, start - window:], start, *span)
    expected = attention_at(q[:, :, start:], k, v, p[start:], p, *span)
    assert relative_error(y, expected) < 1e-6


def test_decode_refuses_what_does_not_fit():
    good = dict(y=torch.zeros(2, 3, 8), x=torch.zeros(2, 5, 3, 8), state=torch.zeros(2, 2, 3, 8), rope=(torch.ones(1, 4),) * 2,
                k_cache=torch.zeros(2, 3, 9, 8), v_cache=torch.zeros(2, 3, 9, 8), length=torch.tensor([0]))
    for wrong, why in ((dict(x=torch.zeros(2, 3, 3, 8)), "got"), (dict(state=torch.zeros(2, 2, 3, 8).half()), "float32"),
                       (dict(k_cache=torch.zeros(2, 3, 9, 8).half()), "one dtype"),
                       (dict(x=torch.zeros(2, 5, 8, 3).mT), "packed"), (dict(v_cache=torch.zeros(2, 3, 8, 8)), "k_cache")):
        with pytest.raises(AssertionError, match=why):
            kernels.decode(**{**good, **wrong}, dilation=4, window=3, sinks=1)
    kernels.decode(**good, dilation=4, window=3, sinks=1)
