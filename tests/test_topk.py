"""Top-k blocks on both paths against a loop in float64: the choice, attention, decoding."""
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")
import kernels
from model import Rule, attend
from test_kernels import DEVICE, LIMITS, check_decode, compare, outputs_and_gradients, randn, under
from test_model import GPU, SCORES, assert_same, gpu


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """All memory that the kernels are given holds NaN, or an integer that is no index."""
    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else 10**8)
        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def block_score(q, keys, score):
    """The score of one block, keys (N, Dh), for one query (Dh,); NaN is the least."""
    if score == "mean":
        value = (keys @ q).mean()
    elif score == "last":
        value = keys[-1] @ q
    else:
        value = torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()
    return value.nan_to_num(nan=-math.inf).item()


def topk_mask(q, k, rule):
    """(T, n) bool of one head: what the last T of n queries attend to, block by block."""
    n = len(k)
    p = torch.arange(n)
    mask = rule.allowed(p[:, None], p)
    for t in range(n - len(q), n):
        own = t // rule.block
        blocks = k[:own * rule.block].split(rule.block) if own else []
        values = [block_score(q[t - n], block, rule.score) for block in blocks]
        best = sorted(range(own), key=lambda b: -values[b])[:rule.topk - 1]
        mask[t] |= torch.isin(p // rule.block, torch.tensor([own, *best])) & (p <= t)
    return mask[n - len(q):]


def check_attention(q, k, v, pattern, limit=1e-5):
    """y and every gradient: none flows through the choice. q: the last T of n positions."""
    heads = [z.flatten(0, 1).double().cpu() for z in (q, k)]
    masks = [topk_mask(*head, Rule.parse(pattern)) for head in zip(*heads)]
    mask = torch.stack(masks).unflatten(0, q.shape[:2]).to(DEVICE)

    def definition(q, k, v):
        return dict(y=F.scaled_dot_product_attention(q, k, v, mask))

    compare(under(pattern), definition, limit, floor=1, q=q, k=k, v=v)


CASES = [
    (2, 70, 70, "N8K3"),                                   # N divides no T
    (1, 64, 64, "N16K1"),                                  # its own block alone
    (1, 70, 70, "N16K99:last"),                            # more than all blocks: dense
    (1, 40, 110, "D8N8K4:minmax"),                         # a chunk of a longer sequence
    (2, 70, 70, "D4W20S9N7K3"),                            # the grid crosses the blocks
    (1, 30, 75, "D4W5S9N7K3"),
    (1, 80, 80, "W30S4N16K2:minmax"),                      # a window and sinks, no grid
    (1, 150, 150, "N70K2:last"),                           # a block of more than one tile
    (1, 20, 20, "D5N1K6"),                                 # blocks of one position
    (1, 20, 20, "W3N50K2"),                                # a block larger than the text
]


@pytest.mark.parametrize("B, T, n, rule", CASES, ids=str)
def test_attention_and_every_gradient(device, B, T, n, rule):
    q = randn(B, T, 2, 16).transpose(1, 2)                 # no tensor is contiguous
    k, v = (randn(B, n, 2, 16).transpose(1, 2) for _ in "kv")
    check_attention(q, k, v, rule)


@pytest.mark.parametrize("B, T, n, rule", [CASES[4], CASES[0]], ids=str)
def test_attention_in_float16_cut_into_short_calls(kernels_on, monkeypatch, B, T, n, rule):
    monkeypatch.setattr(kernels, "PARTS_BYTES", 0)
    monkeypatch.setattr(kernels, "LEAST_QUERIES", 64)
    qkv = randn(3, B, 2, T, 16, dtype=torch.float16)
    check_attention(*qkv, rule, LIMITS[torch.float16])


@pytest.mark.parametrize("Dh", [24, 128])
def test_attention_of_other_widths(kernels_on, Dh):
    """No power of 2; 512 bytes, which take other tiles."""
    check_attention(*randn(3, 1, 1, 50, Dh), "D8W4N20K3:minmax")


@gpu
@pytest.mark.parametrize("Dh", [64, 128])
@pytest.mark.parametrize("rule", ["N64K16", "D64N64K8", "W100S4N64K4"])
def test_attention_in_bfloat16_on_a_gpu(rule, Dh):
    """With keys of few values, so that the scores of float64 are those of bfloat16."""
    qkv = randn(3, 1, 2, 1500, Dh, dtype=torch.bfloat16)
    check_attention(*qkv, f"{rule}:last", LIMITS[torch.bfloat16])


@pytest.mark.parametrize("T, n, rule, levels", [
    (60, 60, "N4K5", 2), (8, 140, "N1K12:last", 3), (20, 50, "D4N4K3:minmax", 1)])
def test_of_equal_scores_the_earliest_block_is_chosen(device, T, n, rule, levels):
    """Keys of few values give exact sums, and many that are equal."""
    q, k, v = (randn(1, 1, size, 16) for size in (T, n, n))
    for z in q, k:
        z.mul_(levels / 2).round_()
        z[..., 2:] = 0
    check_attention(q, k, v, rule)


def test_where_the_best_blocks_share_a_lane(kernels_on):
    """The kernel's first pass keeps four scores a lane; here one lane holds all to be chosen."""
    k = randn(1, 1, 600, 16)
    k[:, :, 5::64] *= 10                                   # with N 1, lane 5 of each tile of 64
    k[:, :, 5::64, 0] = 50
    q = randn(1, 1, 3, 16)
    q[..., 0] = 1
    check_attention(q, k, randn(1, 1, 600, 16), "N1K8:last")


def test_nan_is_the_least_score_and_zeros_are_equal(kernels_on):
    """Blocks 1 and 2 of zeros are the first of equal scores."""
    q = torch.ones(1, 1, 20, 16, device=DEVICE)
    k = torch.zeros(1, 1, 80, 16, device=DEVICE)
    k[:, :, 8:16] = -0.0
    k[:, :, 3] = math.nan
    v = randn(1, 1, 80, 16)
    y = attend(q, k, v, Rule.parse("N8K3"))
    for i, t in enumerate(range(60, 80)):
        own = v[0, 0, t // 8 * 8:t + 1]
        expected = torch.cat((v[0, 0, 8:24], own)).mean(0)
        assert_same(f"query {t}", y[0, 0, i], expected)


def test_the_limits_of_topk_are_the_other_patterns(device):
    q, k, v = randn(3, 1, 2, 50, 8)

    def attended(text):
        return attend(q, k, v, Rule.parse(text))

    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for text in ("N8K7", "N8K999999999", "N1K50", "N50K1", "N999999999K1", "D1N8K2", "W49N8K2",
                 "S50N8K2"):
        assert_same(f"{text} is dense", attended(text), dense)
    assert_same("N1K1: only itself", attended("N1K1"), v)
    for text in ("D16", "W5S3", "D7W2S1"):
        assert_same(f"{text}N1K1 is {text}", attended(f"{text}N1K1"), attended(text))


def test_the_same_input_gives_the_same_gradients_to_the_bit(kernels_on):
    T = 80 if GPU else 20                                  # the interpreter runs one by one anyway
    qkv = dict(zip("qkv", randn(3, 1, 2, T, 16)))
    run = under("D8W5N8K3")
    again = outputs_and_gradients(run, qkv)
    for name, x in outputs_and_gradients(run, qkv).items():
        assert x.equal(again[name]), f"{name} differs"


def test_keys_that_no_query_chose_are_not_read(kernels_on):
    """All queries here want block 2, and see the end of each block."""
    q = torch.ones(1, 1, 16, 16, device=DEVICE)
    k = randn(1, 1, 160, 16)
    k[:, :, 16:24] = 9
    v = randn(1, 1, 160, 16)
    rule = Rule.parse("D8N8K2:last")
    before = attend(q, k, v, rule)
    p = torch.arange(160, device=DEVICE)
    unread = (p < 144) & (p // 8 != 2) & ((p + 1) % 8 != 0)
    k[:, :, unread] = math.nan
    v[:, :, unread] = math.nan
    assert before.equal(attend(q, k, v, rule))


# ---- Decoding ------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern, splits", [
    ("N3K2", None),
    ("D5N3K2:minmax", 3),
    ("D4W4S2N3K2:last", 2),
    ("N8K3:last", 1),
    ("W2N7K4", 5)])
def test_a_step_by_kernels_is_the_plain_step(pattern, splits):
    """Within a block and at its border, where its summary is written. Nothing later is read."""
    size = Rule.parse(pattern).block
    for t in 0, 1, size, 3 * size - 1, 3 * size, 10 * size + 1:
        check_decode(pattern, t, splits=splits, Dh=16)


@pytest.mark.parametrize("score", SCORES)
def test_summaries_of_large_blocks_are_made_in_tiles(score):
    check_decode(f"N90K2:{score}", 90, H=1)
