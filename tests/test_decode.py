"""Prefill and step against the parallel pass, what the cache holds, and generation."""
import itertools
import random

import pytest
import torch

import kernels
from kernels import SCORES, allowed, positions, relative_error
from model import Pattern, choose
from test_model import TOPK, random_pattern, tiny


def decode(model, idx, pattern, pieces, max_len=None):
    """Logits at the end of each piece, through the cache: a piece of one token by `step`, others by `prefill`."""
    cache, logits, start = model.new_cache(len(idx), max_len or idx.shape[1], pattern), {}, 0
    for n in pieces:
        piece, start = idx[:, start:start + n], start + n
        logits[start - 1] = model.step(piece[:, 0], cache) if n == 1 else model.prefill(piece, cache)
    return logits, cache


def pieces_of(T, rng):
    pieces = []
    while sum(pieces) < T:
        pieces.append(min(rng.choice((1, 1, 1, 2, 5, 17, 40)), T - sum(pieces)))
    return pieces


@pytest.mark.parametrize("seed", range(40))
def test_decode_matches_forward(seed):
    """Random patterns, hybrid ones too, random prompts, chunkings and batch sizes, with and without recurrence."""
    rng = random.Random(seed)
    T, batch = rng.randint(1, 150), rng.randint(1, 3)
    model, pattern, idx = tiny(recurrence=seed % 4 > 0, seed=seed), random_pattern(rng), torch.randint(50, (batch, T))
    with torch.no_grad():
        parallel = model(idx, pattern=pattern)
    logits, cache = decode(model, idx, pattern, pieces_of(T, rng), max_len=T + rng.randint(0, 50))
    for t, step in logits.items():
        error = relative_error(step, parallel[:, t])
        assert error < 1e-5, f"{pattern}, T {T}, position {t}: relative error {error:.1e}"
    assert cache.length == T


@pytest.mark.parametrize("pattern", TOPK)
@pytest.mark.parametrize("score", SCORES)
def test_decode_with_topk_blocks_matches_forward(pattern, score):
    """The cached summaries choose as those of the parallel pass do, however the text was cut, in the middle of a block too."""
    rng, pattern = random.Random(pattern + score), Pattern.parse(pattern, score)
    T = rng.randint(60, 110)
    model, idx = tiny(recurrence=rng.random() < 0.7, seed=T), torch.randint(50, (2, T))
    with torch.no_grad():
        parallel = model(idx, pattern=pattern)
    for pieces in (pieces_of(T, rng), (1,) * T):
        logits, cache = decode(model, idx, pattern, pieces, max_len=T + rng.randint(0, 20))
        for t, step in logits.items():
            error = relative_error(step, parallel[:, t])
            assert error < 1e-5, f"{pattern} {score}, T {T}, position {t}: relative error {error:.1e}"
    rules = [rule for i in range(2) for rule, _ in pattern.groups(i, 4)]
    assert all(slots == T for slots, rule in zip(itertools.chain(*cache.slots), rules) if rule.topk), "all are held"


@pytest.mark.parametrize("score", SCORES)
def test_topk_in_bfloat16_chooses_the_same_blocks_in_decoding(score):
    model, idx, pattern = tiny().bfloat16(), torch.randint(50, (2, 90)), Pattern.parse("D8N8K3", score)
    with torch.no_grad():
        parallel = model(idx, pattern=pattern)
    _, whole = decode(model, idx, pattern, (90,))
    logits, cache = decode(model, idx, pattern, (20, *(1,) * 70))
    for a, b in zip(whole.groups[0], cache.groups[0]):          # the first layer, where nothing else has been rounded
        assert b.summaries.dtype == torch.bfloat16 and a.summaries[:, :, :11].equal(b.summaries[:, :, :11])
    assert relative_error(logits[89], parallel[:, 89]) < 0.05


def test_a_step_reads_the_chosen_blocks_and_no_other_key(monkeypatch):
    """With NaN in all keys and values that its attention should not take, a step is the same: the summaries stand for them."""
    chosen, choose_blocks, pattern = [], kernels.choose_blocks, Pattern.parse("D8N8K3")
    model, idx = tiny(n_layer=1), torch.randint(50, (2, 60))
    (_, cache), (_, other) = (decode(model, idx, pattern, (59,), max_len=70) for _ in range(2))
    monkeypatch.setattr(kernels, "choose_blocks", lambda *args: chosen.append(choose_blocks(*args)) or chosen[0])
    expected = model.step(idx[:, 59], cache)
    group, p = other.groups[0][0], torch.arange(72)
    taken = (p // 8 == chosen[0].transpose(2, 3)).any(2) | ((p + 1) % 8 == 0)                       # (B, h, positions)
    unread = ~taken | (p > 59)
    group.k[unread], group.v[unread] = torch.nan, torch.nan
    assert (~unread).sum() == 2 * 4 * (4 + 2 * 8 + 5) and model.step(idx[:, 59], other).equal(expected)


def test_bytes_held_and_read_with_topk_blocks():
    """N8K3 after 96 tokens: all keys are held; a query at 95 reads 3 blocks, less its own key, and 11 summaries."""
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        model, row, state = tiny().to(dtype), 3 * 2 * 32 * width, 3 * 2 * 2 * 32 * 4    # of all sequences, layers, heads
        for score, n in (("mean", 1), ("minmax", 2), ("last", 0)):
            for pattern, keys in (("N8K3", 24), ("D8N8K3", 24 + 9), ("D8W3S2N8K12", 96)):
                cache = model.new_cache(3, 96, Pattern.parse(pattern, score))
                assert cache.nbytes == 2 * 96 * row + 12 * n * row + state, "of `last` nothing is held but the keys"
                assert cache.read(torch.tensor([95])) == 2 * (keys - 1) * row + 11 * max(n, 1) * row + state
                assert model.new_cache(3, 96, cache.pattern, device="meta").nbytes == cache.nbytes
    for pattern, held in (("D1", 95), ("D4W3S2", 23 + 3 + 2), ("W5S1", 6)):
        cache = model.new_cache(3, 96, pattern)
        model.prefill(torch.randint(50, (3, 95)), cache)
        assert cache.slots == [[held]] * 2 and cache.read(torch.tensor([95])) == 2 * held * row + state, "all that is held"


@pytest.mark.parametrize("pattern, slots", [("D4", 24), ("D16W10S4", 19), ("D8W5", 16), ("D64", 1), ("W12S4", 16),
                                            ("D4W3S9", 33), ("D1", 96), ("D16", 6)])
@pytest.mark.parametrize("pieces", [(96,), (1,) * 96, (40, 1, 1, 54)])
def test_slots_after_96_tokens(pattern, slots, pieces):
    _, cache = decode(tiny(), torch.randint(50, (2, 96)), pattern, pieces)
    assert cache.slots == [[slots]] * 2


def test_slots_are_the_positions_that_the_next_query_may_use():
    rng = random.Random(1)
    for _ in range(15):
        T, pattern = rng.randint(1, 90), Pattern.parse(random_pattern(rng))
        _, cache = decode(tiny(), torch.randint(50, (1, T)), pattern, pieces_of(T, rng), max_len=120)
        for layer, groups in enumerate(cache.slots):
            for i, (rule, _) in enumerate(pattern.groups(layer, 4)):
                needed = allowed(torch.tensor(T), torch.arange(T), *rule.span)
                assert groups[i] == needed.sum(), f"{pattern} layer {layer} group {i}"
                group = cache.groups[layer][i]
                held = positions(cache.seen, group.k.shape[2], *group.span)
                held = held[held < T]
                assert len(set(held.tolist())) == len(held), "a position is held once"
                assert set(torch.arange(T)[needed].tolist()) <= set(held.tolist())


@pytest.mark.parametrize("pattern, slots", [("D1", 96), ("D4", 24), ("D16W10S4", 6 + 10 + 4), ("D64", 1), ("W12S4", 16),
                                            ("D8W5", 12 + 5), ("D1,D16", (96 + 6) / 2)])
def test_bytes_are_slots_and_the_float32_state(pattern, slots):
    """C = 32 channels of keys and values in 2 layers for a batch of 3; 2 x 32 float32 of state per layer."""
    for recurrence, state in ((True, 3 * 2 * 2 * 32 * 4), (False, 0)):
        model = tiny(recurrence=recurrence)
        for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
            cache = model.to(dtype).new_cache(3, 96, pattern)
            assert cache.nbytes == 3 * 2 * slots * 2 * 32 * width + state
            assert model.new_cache(3, 96, pattern, device="meta").nbytes == cache.nbytes
            before = cache.nbytes
            model.prefill(torch.randint(50, (3, 96)), cache)
            assert cache.nbytes == before, "filling the cache allocates nothing that stays"


def test_streaming_memory_is_bounded():
    """A window and sinks: the cache of a long text is that of a short one."""
    model = tiny()
    assert model.new_cache(1, 10**6, "W12S4").nbytes == model.new_cache(1, 16, "W12S4").nbytes


def test_the_state_is_float32_when_the_cache_is_bfloat16():
    model, idx = tiny().bfloat16(), torch.randint(50, (2, 60))
    logits, cache = decode(model, idx, "D8W4S2", (20, *(1,) * 40))
    assert all(s.dtype == torch.float32 for state in cache.state for s in state) and cache.groups[0][0].k.dtype == torch.bfloat16
    with torch.no_grad():
        parallel = model(idx, pattern="D8W4S2")
    assert relative_error(logits[59], parallel[:, 59]) < 0.05, "no drift beyond bfloat16's rounding"


def test_the_cache_takes_autocasts_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny()
        cache = model.new_cache(1, 8)
        model.step(torch.zeros(1, dtype=torch.long), cache)
    assert cache.groups[0][0].k.dtype == torch.bfloat16 and cache.state[0][0].dtype == torch.float32


@pytest.mark.parametrize("seed", range(12))
def test_prefill_in_chunks_is_prefill_at_once(seed):
    """Whatever the chunk, one of a single token at the end included: the same logits, the same cache, as the parallel pass."""
    rng = random.Random(seed)
    T, chunk, pattern = rng.randint(2, 120), rng.choice((1, 2, 7, 32, 64)), random_pattern(rng)
    model, idx = tiny(seed=seed), torch.randint(50, (2, T))
    whole, pieces = model.new_cache(2, T + 1, pattern), model.new_cache(2, T + 1, pattern)
    with torch.no_grad():
        parallel = model(idx, pattern=pattern)[:, -1]
    assert relative_error(model.prefill(idx, whole), parallel) < 1e-5, f"{pattern}, T {T}"
    assert relative_error(model.prefill(idx, pieces, chunk), parallel) < 1e-5, f"{pattern}, T {T}, chunk {chunk}"
    token = torch.randint(50, (2,))
    assert relative_error(model.step(token, pieces), model.step(token, whole)) < 1e-5
    assert pieces.slots == whole.slots and pieces.length == whole.length == pieces.seen.item() == T + 1


def test_many_steps_leave_the_state_finite_and_the_cache_within_its_size():
    model, n = tiny(n_layer=1), 500
    cache = model.new_cache(1, n + 1, "D64W3S2")
    size = cache.nbytes
    for token in itertools.islice(model.decode(torch.zeros(1, 50), cache), n):
        pass
    assert all(z.isfinite().all() for z in (cache.state[0], cache.groups[0][0].k, cache.groups[0][0].v))
    assert cache.nbytes == size and cache.slots == [[n // 64 + 3 + 2]]


def test_the_position_is_read_on_the_device():
    """A step looks at cache.seen alone, so that a recorded step may be replayed: the host's count is only for max_len."""
    model, idx = tiny(), torch.randint(50, (2, 40))
    for pattern in ("D1", "D4W3S2", "D8N8K3"):
        _, cache = decode(model, idx, pattern, (39,), max_len=50)
        cache.length = 7
        with torch.no_grad():
            assert relative_error(model.step(idx[:, 39], cache), model(idx, pattern=pattern)[:, -1]) < 1e-5


def test_running_past_max_len_is_refused_and_changes_nothing():
    model, idx = tiny(), torch.randint(50, (1, 30))
    _, cache = decode(model, idx[:, :20], "D4W3S1", (20,), max_len=24)
    groups = [group for layer in cache.groups for group in layer]
    kept = [group.k.clone() for group in groups]
    with pytest.raises(ValueError, match=r"20 tokens seen \+ 5 new > max_len 24"):
        model.prefill(idx[:, 20:25], cache)
    assert cache.length == 20 and all(a.equal(group.k) for a, group in zip(kept, groups))
    for t in range(20, 24):
        logits = model.step(idx[:, t], cache)
    assert relative_error(logits, model(idx[:, :24], pattern="D4W3S1")[:, -1]) < 1e-5
    for step in (lambda: model.step(idx[:, 24], cache), lambda: list(model.decode(logits, cache))):
        with pytest.raises(ValueError, match="max_len"):
            step()
    assert cache.length == cache.seen.item() == 24


@pytest.mark.parametrize("shape", [(2, 4), (1, 0), (3,)])
def test_prefill_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="the cache wants"):
        tiny().prefill(torch.zeros(shape, dtype=torch.long), tiny().new_cache(1, 8))


@pytest.mark.parametrize("pattern", ["D1", "D4W3S2", "W5S1", "D1/D8,D4", "D1/D4N4K3,N8K2"])
def test_greedy_generation_is_the_argmax_of_the_parallel_pass(pattern):
    model, idx = tiny(), torch.randint(50, (3, 7))
    out = model.generate(idx, 25, pattern=pattern, temperature=0)
    assert out.shape == (3, 32) and out[:, :7].equal(idx)
    with torch.no_grad():
        assert model(out, pattern=pattern)[:, 6:-1].argmax(-1).equal(out[:, 7:])


@pytest.mark.parametrize("pattern", ["D4W2", "N4K2", "D4N4K2"])
def test_one_head_of_one_sequence_within_a_block(pattern):
    """Sizes of 1 make views overlap where others don't: `last` has its summaries in the keys themselves. In float64."""
    model, idx = tiny(n_layer=1, n_head=1, n_embd=8).double(), torch.randint(50, (1, 3))
    for score in SCORES:
        tokens = model.generate(idx, 9, Pattern.parse(pattern, score), temperature=0)
        expected = model(tokens, Pattern.parse(pattern, score)).argmax(-1)
        assert tokens[:, 3:].equal(expected[:, 2:-1]), f"{pattern} {score}"
    assert model.new_cache(1, 0, pattern).length == 0


def test_generation_of_nothing():
    idx = torch.randint(50, (2, 5))
    assert tiny().generate(idx, 0).equal(idx)


def test_a_sequence_stops_by_itself():
    model, idx = tiny(), torch.randint(50, (4, 6))
    free = model.generate(idx, 30, temperature=0)
    stop = free[0, 9].item()                                    # the first sequence's 4th new token
    out = model.generate(idx, 30, temperature=0, stop=stop)
    assert out.shape == free.shape
    for row, expected in zip(out[:, 6:], free[:, 6:]):
        hits = (expected == stop).nonzero()
        end = hits[0].item() if len(hits) else 30
        assert row[:end].equal(expected[:end]) and (row[end:] == stop).all()


def test_a_stream_ends_when_all_sequences_have_stopped():
    model, idx = tiny(), torch.randint(50, (1, 6))
    stop = model.generate(idx, 10, temperature=0)[0, 9].item()
    tokens = list(model.stream(idx, 500, model.new_cache(1, 506), temperature=0, stop=stop))
    assert 4 <= len(tokens) <= 16 and all(token == stop for token in tokens[3:])


def test_a_prompt_that_ends_with_stop_goes_on():
    model, idx = tiny(), torch.randint(50, (1, 6))
    free = model.generate(idx, 8, temperature=0)
    stop = next(token for token in range(50) if token not in free[0, 6:].tolist())
    idx[0, -1] = stop
    assert model.generate(idx, 1, temperature=0, stop=stop).equal(model.generate(idx, 1, temperature=0))


def test_sampling_draws_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)

    def frequencies(**kwargs):
        return torch.bincount(choose(logits, **kwargs), minlength=4) / 20000

    probs = logits[0].softmax(-1)
    assert (frequencies() - probs).abs().max() < 0.02
    assert (frequencies(temperature=0.5) - (2 * logits[0]).softmax(-1)).abs().max() < 0.02
    assert (frequencies(top_k=2) - torch.tensor([probs[0], probs[1], 0, 0]) / probs[:2].sum()).abs().max() < 0.02
    assert (frequencies(top_p=0.7) - torch.tensor([probs[0], probs[1], 0, 0]) / probs[:2].sum()).abs().max() < 0.02
    top_2_of_3 = torch.tensor([probs[0], probs[1], 0, 0]) / probs[:2].sum()             # 0.8 of what top_k left, not of all
    assert (frequencies(top_k=3, top_p=0.8) - top_2_of_3).abs().max() < 0.02
    assert (frequencies(top_k=9, top_p=1.0) - probs).abs().max() < 0.02             # top_k beyond the vocabulary
    assert frequencies(top_p=0.01)[0] == 1 and frequencies(top_k=1)[0] == 1 and frequencies(temperature=0)[0] == 1
    assert all(choose(logits.flip(1), temperature=t).eq(3).all() for t in (1e-6, 1e-38, 1e-300)), "as cold as it gets"


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match="sampling wants"):
        choose(torch.zeros(1, 4), **wrong)


def test_generation_repeats_with_its_seed():
    model, idx = tiny(), torch.randint(50, (2, 5))
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(model.generate(idx, 20, "D4", temperature=1.0, top_k=20, top_p=0.9))
    assert out[0].equal(out[1]) and not out[0].equal(out[2])


# ---------------------------------------------------------------------------------------------
# On a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a GPU")


def on_gpu(dtype=torch.float32):
    """A model of head width 32, scaled so that its choices matter."""
    return tiny(n_layer=3, n_head=4, n_embd=128, vocab_size=300).to("cuda", dtype)


@gpu
@pytest.mark.parametrize("pattern", ["D1", "D16", "D4W10S3", "D1/D8,W20S4", "D1/D16N16K3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_the_graph_is_stepping(pattern, dtype):
    model, idx = on_gpu(dtype), torch.randint(300, (3, 37), device="cuda")
    stepped, replayed = model.new_cache(3, 200, pattern), model.new_cache(3, 200, pattern)
    logits, tokens = model.prefill(idx, stepped), list(model.stream(idx, 150, replayed, temperature=0))
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    for i, token in enumerate(tokens):
        chosen, best = logits.gather(1, token[:, None])[:, 0], logits.amax(-1)
        assert (chosen >= best - rounding * best.abs()).all(), f"{pattern} token {i}"
        logits = model.step(token, stepped)
    assert replayed.length == replayed.seen.item() == 37 + 149
    assert relative_error(model.step(tokens[-1], replayed), logits) < rounding
    assert all(relative_error(*states) < rounding for states in zip(replayed.state, stepped.state))


@gpu
def test_sampling_in_the_graph_draws_anew_and_repeats_with_its_seed():
    model, idx, out = on_gpu(), torch.randint(300, (64, 5), device="cuda"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(model.generate(idx, 60, "D4", top_k=50, top_p=0.9))
    assert out[0].equal(out[1]) and not out[0].equal(out[2])
    assert (out[0][:, 10:-1] != out[0][:, 11:]).any(0).all(), "every replay draws its own numbers"


@gpu
@pytest.mark.parametrize("pattern", ["D1", "D16", "D16W32S4"])
def test_greedy_in_bfloat16_is_the_parallel_choice_beyond_rounding(pattern):
    """Over 512 tokens, wherever the parallel pass's top two logits differ by more than bfloat16 was measured to move them."""
    model, idx = on_gpu(torch.bfloat16), torch.randint(300, (4, 40), device="cuda")
    out = model.generate(idx, 512, pattern, temperature=0)
    with torch.no_grad():
        logits, exact = model(out, pattern=pattern).float(), model.float()(out, pattern=pattern)
    best, second = logits[:, 39:-1].topk(2).values.unbind(-1)
    sure = best - second > 2 * (logits - exact).abs().max()
    agree = logits[:, 39:-1].argmax(-1) == out[:, 40:]
    assert agree[sure].all() and sure.float().mean() > 0.2 and agree.float().mean() > 0.9, (sure, agree)


@gpu
def test_100000_tokens_at_d64():
    model, n = on_gpu(torch.bfloat16), 100_000
    cache = model.new_cache(2, n, "D64")
    size, before = cache.nbytes, torch.cuda.memory_allocated()
    for i, _ in enumerate(itertools.islice(model.decode(torch.zeros(2, 300, device="cuda"), cache), n)):
        if i == 10:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= before + 4096 and cache.nbytes == size
    assert all(state.isfinite().all() for state in cache.state) and cache.slots == [[(n - 1) // 64]] * 3
