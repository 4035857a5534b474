"""The cache and its layout, prefill and step against the parallel pass, generation, sampling."""
import copy
import itertools
import math
import random
import threading

import pytest
import torch

import model as model_py
from model import FUTURE, Layout, Pattern, Rule, allowed, choose
from test_model import SCORES, TOPK, assert_same, one_line, random_pattern, tiny

GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: CUDA graphs, or compiled kernels")
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter's bfloat16 products are wrong


def run_in_pieces(model, idx, pattern, pieces, max_len=None):
    """({position: logits} at the end of each piece, cache). A piece of one token goes by `step`."""
    cache = model.new_cache(len(idx), max_len or idx.shape[1], pattern)
    logits = {}
    start = 0
    for n in pieces:
        piece = idx[:, start:start + n]
        start += n
        found = model.step(piece[:, 0], cache) if n == 1 else model.prefill(piece, cache)
        logits[start - 1] = found
    return logits, cache


def random_pieces(T, rng):
    pieces = []
    while sum(pieces) < T:
        n = rng.choice((1, 1, 1, 2, 5, 17, 40))
        pieces.append(min(n, T - sum(pieces)))
    return pieces


def assert_decodes(model, idx, pattern, pieces, max_len=None):
    """Through the cache, in these pieces, the logits are those of the parallel pass."""
    with torch.no_grad():
        parallel = model(idx, pattern)
    logits, cache = run_in_pieces(model, idx, pattern, pieces, max_len)
    for t, found in logits.items():
        assert_same(f"{pattern}, pieces {pieces}, logits at {t}", found, parallel[:, t])
    assert cache.length == cache.seen.item() == idx.shape[1]


@pytest.mark.parametrize("pattern", ["D4W3", "D1/D8", "N4K2"])
def test_a_compiled_step_is_the_step(pattern):
    """Dynamo traces it once for all layers; the backend runs what it traced as it is."""
    torch.compiler.reset()
    model = tiny(n_layer=3)
    idx = torch.randint(50, (2, 9))
    want = model.generate(idx, 12, pattern, temperature=0)
    traced = []
    model.compile_step(backend=lambda graph, inputs: traced.append(graph) or graph, dynamic=False)
    assert model.generate(idx, 12, pattern, temperature=0).equal(want)
    assert len(traced) == 4, "the embedding; a block before the caches' part, and twice after it"


# ---------------------------------------------------------------------------------------------
# The layout of the cache

LAYOUTS = [(1, 0, 0), (4, 0, 0), (16, 10, 4), (8, 5, 0), (64, 0, 0), (0, 12, 4), (0, 0, 0),
           (0, 0, 5), (4, 3, 9), (5, 96, 96), (1, 3, 2)]


@pytest.mark.parametrize("span", LAYOUTS, ids=str)
def test_slots_hold_what_the_next_query_may_use(span):
    """Storing each position where slot_of says leaves, at any length, what `positions` says."""
    layout = Layout(Rule(*span), 96)
    slots = torch.full((layout.slots,), FUTURE)
    for t in range(97):
        said = layout.positions(torch.tensor([t]))
        here = said != FUTURE
        p = torch.arange(t)
        needed = p[allowed(t, p, *span)]
        assert slots[here].equal(said[here]), f"after {t} tokens"
        held = said[here].sort().values
        assert held.unique().equal(held), f"after {t} tokens a position is held twice"
        assert torch.isin(needed, held).all(), f"after {t} tokens the next query lacks a position"
        assert needed.equal(held[layout.keeps(held, t)])
        if t < 96 and layout.keeps(torch.tensor(t), t + 1):
            slots[layout.slot_of(torch.tensor([t]))] = t


def test_the_drawn_example_of_the_layout():
    """D4W3S2 after 14 tokens, as model.py draws it: the ring slot of 11, on the grid, is a hole."""
    held = Layout(Rule(4, 3, 2), 14).positions(torch.tensor([14]))
    assert held.tolist() == [0, 1, 12, 13, FUTURE, 3, 7, 11]


REFERENCE_COUNTS = [("D4", 24), ("D16W10S4", 19), ("D8W5", 16), ("D64", 1), ("W12S4", 16),
                    ("D4W3S9", 33), ("D1", 96), ("W0", 0), ("S4", 4), ("N8K3", 96)]


@pytest.mark.parametrize("pattern, slots", REFERENCE_COUNTS)
def test_slots_after_96_tokens(pattern, slots):
    model = tiny(n_layer=1, n_embd=8)
    idx = torch.randint(50, (1, 96))
    for pieces in ((96,), (40, 1, 1, 54)):
        _, cache = run_in_pieces(model, idx, pattern, pieces)
        assert cache.slots == [[slots]]


def test_slots_count_each_layer_and_group():
    rng = random.Random(1)
    model = tiny(n_embd=8)
    for _ in range(6):
        T = rng.randint(1, 90)
        pattern = Pattern.parse(random_pattern(rng))
        idx = torch.randint(50, (1, T))
        _, cache = run_in_pieces(model, idx, pattern, random_pieces(T, rng), max_len=120)
        p = torch.arange(T)
        for layer, counts in enumerate(cache.slots):
            needed = [group.rule.allowed(T, p).sum() for group in pattern.groups(layer)]
            assert counts == needed, f"{pattern} layer {layer}"


@pytest.mark.parametrize("pattern, slots", [
    ("D1", 96), ("D4", 24), ("D16W10S4", 6 + 10 + 4), ("D64", 1), ("W12S4", 16), ("D8W5", 12 + 5),
    ("D1,D16", (96 + 6) / 2)])
def test_bytes_are_slots_and_the_float32_state(pattern, slots):
    """Batch 3, 2 layers, 32 channels of keys and of values; 2 x 32 float32 of state a layer."""
    for recurrence, state in ((True, 3 * 2 * 2 * 32 * 4), (False, 0)):
        model = tiny(recurrence=recurrence)
        for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
            cache = model.to(dtype).new_cache(3, 96, pattern)
            expected = 3 * 2 * slots * 2 * 32 * width + state
            assert cache.nbytes == expected
            assert model.new_cache(3, 96, pattern, device="meta").nbytes == expected
            model.prefill(torch.randint(50, (3, 96)), cache)
            assert cache.nbytes == expected, "filling the cache allocates nothing that stays"


def test_bytes_held_and_read_with_topk_blocks():
    """N8K3: all keys are held; a query at 95 reads 3 blocks, less its own key, and 11 summaries."""
    row = 3 * 2 * 32 * 2                                        # sequences, layers, C, bytes
    state = 3 * 2 * 2 * 32 * 4
    model = tiny().bfloat16()
    for score, n in (("mean", 1), ("minmax", 2), ("last", 0)):
        for pattern, keys in (("N8K3", 24), ("D8N8K3", 24 + 9), ("D8W3S2N8K12", 96)):
            cache = model.new_cache(3, 96, f"{pattern}:{score}")
            assert cache.nbytes == 2 * 96 * row + 12 * n * row + state, "`last` holds keys alone"
            read = cache.bytes_read(torch.tensor([95]))
            assert read == 2 * (keys - 1) * row + 11 * max(n, 1) * row + state
            assert model.new_cache(3, 96, cache.pattern, device="meta").nbytes == cache.nbytes
    for pattern, held in (("D1", 95), ("D4W3S2", 23 + 3 + 2), ("W5S1", 6)):
        cache = model.new_cache(3, 96, pattern)
        assert cache.bytes_read(torch.tensor([95])) == 2 * held * row + state, "all that is held"


def test_streaming_memory_is_bounded():
    """A window and sinks: the cache of a long text is that of a short one."""
    model = tiny()
    assert model.new_cache(1, 10**6, "W12S4").nbytes == model.new_cache(1, 16, "W12S4").nbytes


# ---------------------------------------------------------------------------------------------
# Prefill and step

@pytest.mark.parametrize("seed", range(24))
def test_decode_matches_forward(seed):
    """Random patterns, hybrids too, prompts, pieces, batch sizes; with and without recurrence."""
    rng = random.Random(seed)
    T = rng.randint(1, 90)
    model = tiny(recurrence=seed % 4 > 0, seed=seed)
    idx = torch.randint(50, (rng.randint(1, 3), T))
    assert_decodes(model, idx, random_pattern(rng), random_pieces(T, rng), T + rng.randint(0, 50))


@pytest.mark.parametrize("pattern", TOPK)
def test_decode_with_topk_blocks_matches_forward(pattern):
    """Summaries in the cache choose as those of the parallel pass, also when cut within a block."""
    rng = random.Random(pattern)
    T = rng.randint(40, 60)
    model = tiny(seed=T)
    idx = torch.randint(50, (2, T))
    for pieces in (random_pieces(T, rng), (1,) * T):
        assert_decodes(model, idx, pattern, pieces, T + rng.randint(0, 20))


@pytest.mark.parametrize("pattern", ["D1,D4W3S2", "W5S1/D8", "D16W7/S3,W0"])
def test_decode_by_kernels_matches_forward(kernels_on, pattern):
    """Prefill, a chunk that continues it, and steps, where the ring goes round."""
    model = tiny(n_head=2, n_embd=16).to(kernels_on)
    idx = torch.randint(50, (1, 12), device=kernels_on)
    assert_decodes(model, idx, pattern, (5, 3, 1, 1, 2), max_len=40)


def test_decode_by_kernels_without_recurrence(kernels_on):
    model = tiny(n_layer=1, n_head=2, n_embd=16, recurrence=False).to(kernels_on)
    idx = torch.randint(50, (2, 12), device=kernels_on)
    assert_decodes(model, idx, "D4W3/S2", (6, 1, 1, 3, 1))


@pytest.mark.parametrize("seed", range(6))
def test_prefill_in_chunks_is_prefill_at_once(seed):
    """Whatever the chunk, and if the last has a single token: the same logits, the same cache."""
    rng = random.Random(seed)
    T = rng.randint(2, 90)
    chunk = rng.choice((1, 2, 7, 32, T - 1))
    pattern = random_pattern(rng)
    model = tiny(seed=seed)
    idx = torch.randint(50, (2, T))
    whole = model.new_cache(2, T + 1, pattern)
    pieces = model.new_cache(2, T + 1, pattern)
    logits = model.prefill(idx, whole)
    assert_same(f"{pattern}, chunks of {chunk}", model.prefill(idx, pieces, chunk), logits)
    token = torch.randint(50, (2,))
    assert_same("the step after", model.step(token, pieces), model.step(token, whole))
    assert pieces.slots == whole.slots
    for a, b in zip(pieces.state, whole.state):
        assert_same("state", a, b)


@pytest.mark.parametrize("score", SCORES)
def test_topk_in_bfloat16_chooses_the_same_blocks_in_decoding(score):
    """Steps keep the summaries, to the bit, that one pass over the keys would make of them."""
    model = tiny().bfloat16()
    idx = torch.randint(50, (2, 60))
    pattern = f"D8N8K3:{score}"
    _, whole = run_in_pieces(model, idx, pattern, (60,))
    logits, cache = run_in_pieces(model, idx, pattern, (20, *(1,) * 40))
    a = whole.groups[0][0].summaries                            # the first layer: unrounded inputs
    b = cache.groups[0][0].summaries
    assert b.dtype == torch.bfloat16 and a[:, :, :7].equal(b[:, :, :7])
    with torch.no_grad():
        assert_same("logits", logits[59], model(idx, pattern)[:, -1], 0.05)


def test_a_step_reads_the_chosen_blocks_and_no_other_key(monkeypatch):
    """With other keys and values where its attention should not look, a step is the same."""
    model = tiny(n_layer=1)
    pattern = "D8N8K3"
    idx = torch.randint(50, (2, 60))
    _, cache = run_in_pieces(model, idx, pattern, (59,), max_len=70)
    _, other = run_in_pieces(model, idx, pattern, (59,), max_len=70)
    chosen = []
    choose_blocks = model_py.choose_blocks

    def look(*arguments):
        chosen.append(choose_blocks(*arguments))
        return chosen[-1]

    monkeypatch.setattr(model_py, "choose_blocks", look)
    expected = model.step(idx[:, 59], cache)
    p = torch.arange(72)
    taken = chosen[0][:, :, 0, p // 8] | ((p + 1) % 8 == 0)    # (B, H, positions)
    unread = ~taken | (p > 59)
    own, others, ends = 4, 2 * 8, 5
    assert (~unread).sum() == 2 * 4 * (own + others + ends)
    other.groups[0][0].k[unread] = 9.0
    other.groups[0][0].v[unread] = 9.0
    assert_same("logits", model.step(idx[:, 59], other), expected, 1e-6)


@pytest.mark.parametrize("pieces", [(40,), (20, *(1,) * 20), (20, 20)],
                         ids=["prefill", "steps", "chunks"])
def test_the_state_is_never_rounded(pieces):
    """In a bfloat16 model the state is float32 all the way: what the same keys give in float64."""
    model = tiny(n_layer=1).bfloat16()
    seen = []
    model.blocks[0].mix.in_proj.register_forward_hook(lambda _, __, y: seen.append(y))
    _, cache = run_in_pieces(model, torch.randint(50, (2, 40)), "D8W4S2", pieces)

    def whole(name):
        return torch.cat([getattr(y, name).view(2, -1, 32) for y in seen], dim=1).double()

    _, _, exact = model_py.recurrence(whole("k"), whole("v"), whole("g"))
    assert cache.state[0].dtype == torch.float32 and cache.groups[0][0].k.dtype == torch.bfloat16
    for name, found, expected in zip(("k~", "v~"), cache.state[0], exact):
        assert_same(f"state {name}", found, expected)


def test_the_position_is_read_on_the_device():
    """A step looks at cache.seen alone, so that a recorded step may be replayed."""
    model = tiny()
    idx = torch.randint(50, (2, 30))
    for pattern in ("D1", "D4W3S2", "D8N8K3"):
        _, cache = run_in_pieces(model, idx, pattern, (29,), max_len=40)
        cache.length = 7  # the host's count is only for max_len
        with torch.no_grad():
            assert_same(pattern, model.step(idx[:, 29], cache), model(idx, pattern)[:, -1])


def test_many_steps_stay_finite_and_within_the_cache():
    model = tiny(n_layer=1)
    cache = model.new_cache(1, 301, "D64W3S2")
    size = cache.nbytes
    for _ in itertools.islice(model.decode(torch.zeros(1, 50), cache), 300):
        pass
    assert cache.nbytes == size and cache.slots == [[299 // 64 + 3 + 2]]
    group = cache.groups[0][0]
    assert all(z.isfinite().all() for z in (*cache.state, group.k, group.v))


def test_a_copied_cache_is_a_fork():
    """Both continue by themselves: no view of the state or of the keys is shared or lost."""
    model = tiny()
    idx = torch.randint(50, (2, 20))
    for pattern in ("D4W3S2", "D1/N4K2:last"):
        cache = model.new_cache(2, 20, pattern)
        model.prefill(idx[:, :12], cache)
        fork = copy.deepcopy(cache)
        model.prefill(idx.flip(0)[:, 12:], fork)
        with torch.no_grad():
            expected = model(idx, pattern)
        for t in range(12, 20):
            assert_same(f"{pattern} at {t}", model.step(idx[:, t], cache), expected[:, t])


def test_a_cache_goes_in_and_out_of_inference_mode():
    model = tiny()
    idx = torch.randint(50, (2, 12))
    cache = model.new_cache(2, 12, "D4W3S1")
    with torch.inference_mode():
        model.prefill(idx[:, :6], cache)
    with torch.no_grad():
        expected = model(idx, "D4W3S1")
    for t in range(6, 12):
        assert_same(f"logits at {t}", model.step(idx[:, t], cache), expected[:, t])


# ---------------------------------------------------------------------------------------------
# What a cache refuses, and what it is worth afterwards

@pytest.fixture
def filled():
    """(model, tokens (1, 30), a cache of D4W3S1 for 24 that has seen 20)."""
    model = tiny()
    idx = torch.randint(50, (1, 30))
    _, cache = run_in_pieces(model, idx, "D4W3S1", (20,), max_len=24)
    return model, idx, cache


def refusals_of_a_cache(model, idx, cache):
    return {
        "too short": (r"20 tokens seen \+ 5 new > max_len 24",
                      lambda: model.prefill(idx[:, 20:25], cache)),
        "another batch": ("tokens", lambda: model.prefill(idx[:, 20:22].expand(2, 2), cache)),
        "no tokens": ("tokens", lambda: model.prefill(idx[:, :0], cache)),
        "flat tokens": ("tokens", lambda: model.prefill(idx[0], cache)),
        "a token of another shape": ("tokens", lambda: model.step(idx[:, 20:21], cache)),
        "a model cast later": ("float32", lambda: cast(model, idx, cache)),
    }


def cast(model, idx, cache):
    """A step by the model in float64; float32 again, as it was, afterwards."""
    try:
        model.double().step(idx[:, 20], cache)
    finally:
        model.float()


@pytest.mark.parametrize("name", refusals_of_a_cache(None, None, None))
def test_a_refused_call_leaves_the_cache_usable(filled, name):
    model, idx, cache = filled
    why, call = refusals_of_a_cache(*filled)[name]
    with pytest.raises(ValueError, match=why) as error:
        call()
    one_line(error)
    assert cache.length == cache.seen.item() == 20
    with torch.no_grad():
        expected = model(idx[:, :24], "D4W3S1")
    for t in range(20, 24):
        assert_same(f"logits at {t}", model.step(idx[:, t], cache), expected[:, t])
    with pytest.raises(ValueError, match="max_len"):
        next(itertools.islice(model.decode(expected[:, 23], cache), 1, None))


@pytest.mark.parametrize("how", ["prefill", "step", "decode"])
def test_a_cache_says_that_a_failure_left_it_incomplete(filled, monkeypatch, how):
    """The second layer fails when the first has stored its keys already."""
    model, idx, cache = filled
    logits = model.step(idx[:, 20], cache)

    def fail(x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.blocks[1], "widen", fail)
    calls = {
        "prefill": lambda: model.prefill(idx[:, 21:23], cache),
        "step": lambda: model.step(idx[:, 21], cache),
        "decode": lambda: list(itertools.islice(model.decode(logits, cache), 3)),
    }
    with pytest.raises(RuntimeError, match="out of memory"):
        calls[how]()
    monkeypatch.undo()
    for call in calls.values():
        with pytest.raises(ValueError, match="incomplete") as error:
            call()
        one_line(error)
    assert cache.length == 21


@gpu
def test_a_cache_of_another_device_is_refused(filled):
    model, idx, cache = filled
    with pytest.raises(ValueError, match="cpu") as error:
        model.cuda().step(idx[:, 20].cuda(), cache)
    one_line(error)


def test_the_dtype_of_a_cache_is_fixed_when_it_is_made(device):
    """Made under autocast and used outside of it, or the reverse: the same tokens, to the bit."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (1, 9), device=device)

    def autocast(on):
        return torch.autocast(device, HALF, enabled=on)

    for inside in (True, False):
        with autocast(inside):
            cache = model.new_cache(1, 30, "D4W3S1")
            expected = list(model.stream(idx, 5, cache, temperature=0))
            logits = model.step(expected[-1], cache)
            mixed = model.new_cache(1, 30, "D4W3S1")
            stream = model.stream(idx, 5, mixed, temperature=0)
            tokens = [next(stream)]
        with autocast(not inside):
            tokens += stream
            other = model.step(tokens[-1], mixed)
        assert cache.groups[0][0].k.dtype == (HALF if inside else torch.float32)
        assert cache.state[0].dtype == torch.float32
        assert torch.stack(tokens).equal(torch.stack(expected)), f"made with autocast {inside}"
        assert other.equal(logits) and other.dtype == logits.dtype


# ---------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize("pattern", ["D1", "D4W3S2", "W5S1", "D1/D8,D4", "D1/D4N4K2,N8K2:last"])
def test_greedy_generation_is_the_argmax_of_the_parallel_pass(pattern):
    model = tiny()
    idx = torch.randint(50, (3, 7))
    out = model.generate(idx, 25, pattern, temperature=0)
    assert out.shape == (3, 32) and out[:, :7].equal(idx)
    with torch.no_grad():
        assert model(out, pattern)[:, 6:-1].argmax(-1).equal(out[:, 7:])


def test_greedy_generation_by_kernels_is_that_of_plain_pytorch(kernels_on):
    idx = torch.randint(50, (2, 7))
    exact = tiny(n_layer=1, n_head=2, n_embd=16).double()
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(kernels_on)
    expected = exact.generate(idx, 6, "D4W3S1", temperature=0)
    found = model.generate(idx.to(kernels_on), 6, "D4W3S1", temperature=0)
    assert found.cpu().equal(expected)


@pytest.mark.parametrize("pattern", ["D4W2", "N4K2", "N4K2:minmax", "N4K2:last", "D4N4K2:last"])
def test_one_head_of_one_sequence_within_a_block(pattern):
    """Sizes of 1 make views overlap where others don't: the summaries of `last` are keys."""
    model = tiny(n_layer=1, n_head=1, n_embd=8).double()
    idx = torch.randint(50, (1, 3))
    tokens = model.generate(idx, 9, pattern, temperature=0)
    assert tokens[:, 3:].equal(model(tokens, pattern).argmax(-1)[:, 2:-1])


def test_generation_of_nothing():
    idx = torch.randint(50, (2, 5))
    assert tiny().generate(idx, 0).equal(idx)
    for pattern in ("D4W3S1", "N4K2"):
        assert tiny().new_cache(1, 0, pattern).slots == [[0]] * 2, pattern


def test_a_sequence_stops_by_itself():
    model = tiny()
    idx = torch.randint(50, (4, 6))
    free = model.generate(idx, 30, temperature=0)
    stop = free[0, 9].item()                                    # the first sequence's 4th new token
    out = model.generate(idx, 30, temperature=0, stop=stop)
    assert out.shape == free.shape
    for row, expected in zip(out[:, 6:], free[:, 6:]):
        hits = (expected == stop).nonzero()
        end = hits[0].item() if len(hits) else 30
        assert row[:end].equal(expected[:end]) and (row[end:] == stop).all()


def test_a_stream_ends_when_all_sequences_have_stopped():
    model = tiny()
    idx = torch.randint(50, (1, 6))
    stop = model.generate(idx, 10, temperature=0)[0, 9].item()
    tokens = list(model.stream(idx, 500, model.new_cache(1, 506), temperature=0, stop=stop))
    assert 4 <= len(tokens) <= 16 and all(token == stop for token in tokens[3:])


def test_a_prompt_that_ends_with_stop_goes_on():
    model = tiny()
    idx = torch.randint(50, (1, 6))
    free = model.generate(idx, 8, temperature=0)
    stop = next(token for token in range(50) if token not in free[0, 6:].tolist())
    idx[0, -1] = stop
    found = model.generate(idx, 1, temperature=0, stop=stop)
    assert found.equal(model.generate(idx, 1, temperature=0))


@pytest.mark.parametrize("pattern", ["D1", "D4W3S1", "N4K2"])
def test_a_stream_left_midway_leaves_a_cache_to_go_on_with(pattern):
    model = tiny()
    idx = torch.randint(50, (2, 7))
    whole = model.generate(idx, 12, pattern, temperature=0)
    cache = model.new_cache(2, 19, pattern)
    stream = model.stream(idx, 12, cache, temperature=0)
    tokens = [next(stream) for _ in range(5)]
    stream.close()
    assert cache.length == cache.seen.item() == 7 + 4, "the last token is drawn, not yet appended"
    for _ in range(7):
        tokens.append(model.step(tokens[-1], cache).argmax(-1))
    assert torch.stack(tokens, dim=1).equal(whole[:, 7:])


def test_generation_repeats_with_its_seed():
    model = tiny()
    idx = torch.randint(50, (2, 5))
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(model.generate(idx, 20, "D4", temperature=1.0, top_k=20, top_p=0.9))
    assert out[0].equal(out[1]) and not out[0].equal(out[2])


def test_generation_of_a_compiled_model_is_that_of_the_model():
    """Prompts of any length, and nothing is compiled anew for them."""
    where = "cuda" if GPU else "cpu"
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(where)
    idx = torch.randint(50, (2, 9), device=where)
    expected = {T: model.generate(idx[:, :T], 6, "D4W3S1", temperature=0) for T in (9, 6, 1)}
    loss = model.loss(idx, idx, "D4W3S1")
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile(**({} if GPU else {"backend": backend}))
    assert_same("compiled loss", model.loss(idx, idx, "D4W3S1"), loss)
    graphs = len(compiled)
    assert GPU or graphs > 0
    for T, tokens in expected.items():
        found = model.generate(idx[:, :T], 6, "D4W3S1", temperature=0)
        assert found.equal(tokens), f"prompt of {T}"
    assert len(compiled) == graphs


@pytest.mark.parametrize("place", ["a weight", "the first logits"])
def test_logits_of_nan_are_an_error_in_words(place):
    model = tiny()
    idx = torch.randint(50, (2, 5))
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        if place == "a weight":
            model.blocks[1].fc2.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN") as error:
        if place == "a weight":
            model.generate(idx, 5)
        else:
            next(model.decode(torch.full((2, 50), math.nan), cache))
    one_line(error)


def test_threads_generate_as_if_alone():
    """On a GPU each captures a graph, beside a thread that allocates and copies."""
    where = "cuda" if GPU else "cpu"
    model = tiny(n_layer=1).to(where)
    patterns = ["D1", "D4W3S1", "W4"]
    prompts = [torch.randint(50, (1, 5 + i), device=where) for i in range(3)]
    expected = [model.generate(prompts[i], 20, patterns[i], temperature=0) for i in range(3)]
    found = {}
    stop = threading.Event()
    broken = []

    def generate(i):
        for _ in range(3):
            found[i] = model.generate(prompts[i], 20, patterns[i], temperature=0)
        if GPU:
            torch.cuda.synchronize()

    def noise():
        try:
            while not stop.is_set():
                torch.empty(1_000_000, device=where).zero_().sum().item()
                if GPU:
                    torch.cuda.empty_cache()
        except RuntimeError as error:
            broken.append(str(error))

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(3)]
    beside = threading.Thread(target=noise)
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    beside.join(60)
    assert not broken, f"the thread beside: {broken}"
    for i, tokens in enumerate(expected):
        assert i in found and found[i].equal(tokens), f"thread {i}, {patterns[i]}"


# ---------------------------------------------------------------------------------------------
# Sampling

def test_sampling_draws_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    probs = logits[0].softmax(-1)
    best_two = torch.tensor([probs[0], probs[1], 0, 0]) / probs[:2].sum()
    cases = [
        (dict(), probs),
        (dict(temperature=0.5), (2 * logits[0]).softmax(-1)),
        (dict(top_k=2), best_two),
        (dict(top_p=0.7), best_two),
        (dict(top_k=3, top_p=0.8), best_two),                   # 0.8 of what top_k left, not of all
        (dict(top_k=9, top_p=1.0), probs),                      # top_k beyond the vocabulary
        (dict(top_p=0.01), torch.tensor([1.0, 0, 0, 0])),
        (dict(top_k=1), torch.tensor([1.0, 0, 0, 0])),
        (dict(temperature=0), torch.tensor([1.0, 0, 0, 0])),
    ]
    for options, expected in cases:
        found = torch.bincount(choose(logits, **options), minlength=4) / 20000
        assert (found - expected).abs().max() < 0.02, f"{options}: {found.tolist()}"
    for cold in (1e-6, 1e-38, 1e-300):
        assert choose(logits.flip(1), temperature=cold).eq(3).all(), f"temperature {cold}"


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_k=5), dict(top_p=0.9)],
                         ids=str)
def test_infinite_and_missing_logits(options):
    logits = torch.randn(3, 50)
    logits[:, 7] = math.inf
    logits[1, 9] = -math.inf
    assert choose(logits, **options).eq(7).all(), "+inf is the likeliest"
    logits[1, 9] = math.nan
    with pytest.raises(ValueError, match="NaN") as error:
        choose(logits, **options)
    one_line(error)


@pytest.mark.parametrize("wrong", [dict(temperature=-1.0), dict(temperature=math.nan),
                                   dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        choose(torch.zeros(1, 4), **wrong)
    one_line(error)


# ---------------------------------------------------------------------------------------------
# On a GPU

def on_gpu(dtype=torch.float32):
    """A model of head width 32, scaled so that its choices matter."""
    return tiny(n_layer=3, n_head=4, n_embd=128, vocab_size=300).to("cuda", dtype)


@gpu
@pytest.mark.parametrize("pattern", ["D1", "D16", "D4W10S3", "D1/D8,W20S4", "D1/D16N16K3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_the_graph_is_stepping(pattern, dtype):
    model = on_gpu(dtype)
    idx = torch.randint(300, (3, 37), device="cuda")
    stepped = model.new_cache(3, 200, pattern)
    replayed = model.new_cache(3, 200, pattern)
    logits = model.prefill(idx, stepped)
    tokens = list(model.stream(idx, 150, replayed, temperature=0))
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    for i, token in enumerate(tokens):
        chosen = logits.gather(1, token[:, None])[:, 0]
        best = logits.amax(-1)
        assert (chosen >= best - rounding * best.abs()).all(), f"{pattern} token {i}"
        logits = model.step(token, stepped)
    assert replayed.length == replayed.seen.item() == 37 + 149
    assert_same("logits", model.step(tokens[-1], replayed), logits, rounding)
    for found, expected in zip(replayed.state, stepped.state):
        assert_same("state", found, expected, rounding)


@gpu
def test_sampling_in_the_graph_draws_anew_and_repeats_with_its_seed():
    model = on_gpu()
    idx = torch.randint(300, (64, 5), device="cuda")
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(model.generate(idx, 60, "D4", top_k=50, top_p=0.9))
    assert out[0].equal(out[1]) and not out[0].equal(out[2])
    assert (out[0][:, 10:-1] != out[0][:, 11:]).any(0).all(), "every replay draws its own numbers"


@gpu
@pytest.mark.parametrize("pattern", ["D1", "D16", "D16W32S4"])
def test_greedy_in_bfloat16_is_the_parallel_choice_beyond_rounding(pattern):
    """Where its top two logits differ by more than bfloat16 was measured to move them."""
    model = on_gpu(torch.bfloat16)
    out = model.generate(torch.randint(300, (4, 40), device="cuda"), 512, pattern, temperature=0)
    with torch.no_grad():
        logits = model(out, pattern).float()
        exact = model.float()(out, pattern)
    best, second = logits[:, 39:-1].topk(2).values.unbind(-1)
    sure = best - second > 2 * (logits - exact).abs().max()
    agree = logits[:, 39:-1].argmax(-1) == out[:, 40:]
    assert agree[sure].all(), f"{(~agree & sure).sum()} tokens differ"
    assert sure.float().mean() > 0.2 and agree.float().mean() > 0.9


@gpu
@pytest.mark.parametrize("pattern", ["D1", "D4W3S1", "N4K2"])
def test_generation_in_float64_is_the_parallel_choice(pattern):
    """No kernel takes float64, so no graph is captured."""
    model = tiny().cuda().double()
    out = model.generate(torch.randint(50, (2, 7), device="cuda"), 8, pattern, temperature=0)
    with torch.no_grad():
        assert model(out, pattern)[:, 6:-1].argmax(-1).equal(out[:, 7:])


@gpu
def test_graphs_leave_no_memory_behind():
    model = on_gpu(torch.bfloat16)
    idx = torch.randint(300, (2, 9), device="cuda")

    def generate_and_leave():
        model.generate(idx, 12, "D4W3S1")
        stream = model.stream(idx, 12, model.new_cache(2, 30, "D4W3S1"))
        for _ in range(5):
            next(stream)

    def memory():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _ in range(3):
        generate_and_leave()
    before = memory()
    for _ in range(20):
        generate_and_leave()
    after = memory()
    assert after[0] < before[0] + 1_000_000, f"allocated {before[0]} -> {after[0]}"
    assert after[1] < before[1] + 30_000_000, f"reserved {before[1]} -> {after[1]}"


@gpu
def test_100000_tokens_at_d64():
    model = on_gpu(torch.bfloat16)
    n = 100_000
    cache = model.new_cache(2, n, "D64")
    size = cache.nbytes
    tokens = itertools.islice(model.decode(torch.zeros(2, 300, device="cuda"), cache), n)
    for i, _ in enumerate(tokens):
        if i == 10:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= before + 4096 and cache.nbytes == size
    assert all(state.isfinite().all() for state in cache.state)
    assert cache.slots == [[(n - 1) // 64]] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_is_the_same_model():
    """While the first is current: loss and text."""
    model = on_gpu()
    idx = torch.randint(300, (2, 40), device="cuda")
    loss = model.loss(idx, idx, "D4W3S1")
    text = model.generate(idx[:, :9], 20, "D4W3S1", temperature=0)
    model.to("cuda:1")
    there = idx.to("cuda:1")
    assert_same("loss", model.loss(there, there, "D4W3S1").to("cuda:0"), loss)
    assert model.generate(there[:, :9], 20, "D4W3S1", temperature=0).to("cuda:0").equal(text)
