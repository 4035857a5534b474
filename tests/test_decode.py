"""The cache, prefill and step against the parallel pass, generation, sampling."""
import copy
import math
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import model as model_py
from model import Cache, Pattern, RATConfig, allowed, choose
from test_model import GPU, HALF, TOPK, assert_refused, assert_same, gpu, random_pattern, tiny

WHERE = ["cpu", pytest.param("cuda", marks=gpu)]


def run_in_pieces(model, idx, pattern, pieces, max_len=None, chunk=8192):
    """({position: logits} at the end of each piece, cache). A piece of one token goes by `step`."""
    cache = model.new_cache(len(idx), max_len or idx.shape[1], pattern)
    logits = {}
    start = 0
    for n in pieces:
        piece = idx[:, start:start + n]
        start += n
        found = model.step(piece[:, 0], cache) if n == 1 else model.prefill(piece, cache, chunk)
        logits[start - 1] = found
    return logits, cache


def random_pieces(T, rng):
    pieces = []
    while sum(pieces) < T:
        n = rng.choice((1, 1, 1, 2, 5, 17, 40))
        pieces.append(min(n, T - sum(pieces)))
    return pieces


def assert_decodes(model, idx, pattern, pieces, max_len=None, chunk=8192):
    """Through the cache, in these pieces, the logits are those of the parallel pass."""
    with torch.no_grad():
        parallel = model(idx, pattern)
    logits, cache = run_in_pieces(model, idx, pattern, pieces, max_len, chunk)
    for t, found in logits.items():
        assert_same(f"{pattern}, pieces {pieces}, logits at {t}", found, parallel[:, t])
    assert cache.length == cache.seen.item() == idx.shape[1]


def assert_steps(model, idx, pattern, cache, first):
    """Steps from position `first` on give the logits of the parallel pass."""
    with torch.no_grad():
        parallel = model(idx, pattern)
    for t in range(first, idx.shape[1]):
        assert_same(f"{pattern} at {t}", model.step(idx[:, t], cache), parallel[:, t])
    assert cache.length == cache.seen.item() == idx.shape[1]


# ---- What the cache holds, and where -------------------------------------------------------------

RULES = ["D1", "D4", "D16W10S4", "D8W5", "D64", "W12S4", "W0", "S5", "D4W3S9", "D5W96S96", "D1W3S2",
         "D3W7S40"]


def one_group(rule, max_len):
    config = RATConfig(1, 1, 1, 2)
    cache = Cache(config, 1, max_len, Pattern.parse(rule), torch.float32, torch.zeros(1))
    return cache.layers[0].groups[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("piece", [1, 7])
def test_the_rows_hold_what_the_next_query_may_attend_to(rule, piece):
    """Whatever the pieces in which positions are stored. Each position's number is its key."""
    group = one_group(rule, 98)
    group.k.fill_(-1)
    sizes = Pattern.parse(rule).layers[0][0].sizes
    for t in range(0, 98, piece):
        p = torch.arange(t)
        needed = p[allowed(t, p, *sizes)]
        rows = group.rows(needed, t)
        assert group.k[0, 0, rows, 0].equal(needed.float()), f"after {t} tokens"
        assert rows.unique().equal(rows.sort().values), "no row is read twice"
        new = torch.arange(t, t + piece).float()
        new = new.view(1, 1, piece, 1).expand(1, 1, piece, 2)
        group.store(new, new, t)


def test_the_drawn_example_of_the_cache():
    """D4W3S2 after 14 tokens, as model.py draws it."""
    group = one_group("D4W3S2", 14)
    p = torch.arange(14)
    positions = p.float().view(1, 1, 14, 1).expand(1, 1, 14, 2)
    group.store(positions, positions, 0)
    assert group.k[0, 0, :, 0].tolist() == [0, 1, 12, 13, 11, 3, 7, 11]
    assert group.rows(p[p >= 11], 14).tolist() == [4, 2, 3], "11 is read from row 4 alone"


@pytest.mark.parametrize("pattern, slots", [
    ("D4", [[24]]), ("D16W10S4", [[19]]), ("D8W5", [[16]]), ("D64", [[1]]), ("W12S4", [[16]]),
    ("D4W3S9", [[33]]), ("D1", [[96]]), ("W0", [[0]]), ("S4", [[4]]), ("N8K3", [[96]]),
    ("D4/W7S2,D1", [[24, 9], [96]])])
def test_slots_after_96_tokens(pattern, slots):
    """By layer and group."""
    model = tiny(n_layer=len(slots), n_embd=8)
    idx = torch.randint(50, (1, 96))
    for pieces in ((96,), (40, 1, 1, 54)):
        _, cache = run_in_pieces(model, idx, pattern, pieces)
        assert cache.slots == slots


@pytest.mark.parametrize("pattern, rows", [
    ("D1", 2 * 96), ("D4", 2 * 24), ("D16W10S4", 2 * (6 + 10 + 4)), ("D64", 2), ("W12S4", 2 * 16),
    ("D8W5", 2 * (12 + 5)), ("D1,D16", 96 + 6), ("N8K3", 2 * 96 + 12),
    ("N8K3:minmax", 2 * (96 + 12)), ("D8W3S2N8K12:last", 2 * 96 + 12)])
def test_bytes_are_rows_and_the_float32_state(pattern, rows):
    """Rows of 32 channels: keys, values, a summary of each of 12 blocks (minmax: two). Batch 3, 2
    layers; 2 x 32 float32 of state a layer.
    """
    for recurrence, state in ((True, 3 * 2 * 2 * 32 * 4), (False, 0)):
        model = tiny(recurrence=recurrence)
        for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
            cache = model.to(dtype).new_cache(3, 96, pattern)
            expected = 3 * 2 * rows * 32 * width + state
            assert cache.nbytes == expected
            model.prefill(torch.randint(50, (3, 96)), cache)
            assert cache.nbytes == expected, "filling the cache allocates nothing that stays"


# ---- Prefill and step ----------------------------------------------------------------------------

@pytest.mark.parametrize("case", [*range(24), *TOPK])
def test_decode_matches_forward(case):
    """Random patterns, hybrids, top-k blocks, of which the cache has summaries; random pieces."""
    rng = random.Random(case)
    T = rng.randint(40, 60) if case in TOPK else rng.randint(1, 90)
    model = tiny(recurrence=case in TOPK or case % 4 > 0, seed=T)
    idx = torch.randint(50, (rng.randint(1, 3), T))
    pattern = case if case in TOPK else random_pattern(rng)
    max_len = T + rng.randint(0, 50)
    assert_decodes(model, idx, pattern, random_pieces(T, rng), max_len)
    assert_decodes(model, idx, pattern, (1,) * T, max_len)
    for chunk in 1, 7, 32:
        assert_decodes(model, idx, pattern, (T,), max_len, chunk)


def test_equal_scores_do_not_depend_on_what_comes_later(device):
    """Keys that are zero, as ablation makes them: a text's start, alone and within the text."""
    model = tiny(n_layer=1, n_head=1, n_embd=8).to(device)
    with torch.no_grad():
        model.blocks[0].mix.in_proj.weight[16:24] = 0           # rows of k
    idx = torch.randint(50, (1, 24), device=device)
    assert_same("the start", model(idx[:, :17], "N4K3"), model(idx, "N4K3")[:, :17])
    _, cache = run_in_pieces(model, idx[:, :19], "N4K3", (19,), max_len=24)
    assert_steps(model, idx, "N4K3", cache, 19)


@pytest.mark.parametrize("pieces", [(40,), (20, *(1,) * 20), (20, 20)],
                         ids=["prefill", "steps", "chunks"])
def test_the_state_is_never_rounded(pieces):
    """In a bfloat16 model the state is float32 all the way: what the same keys give in float64."""
    model = tiny(n_layer=1).bfloat16()
    seen = []
    model.blocks[0].mix.in_proj.register_forward_hook(lambda _, __, y: seen.append(y))
    _, cache = run_in_pieces(model, torch.randint(50, (2, 40)), "D8W4S2", pieces)

    whole = torch.cat(seen, dim=1).double()                     # (B, T, 5 C)
    _, _, exact = model_py.recurrence(*whole.chunk(5, dim=-1)[2:])
    layer = cache.layers[0]
    assert layer.state.dtype == torch.float32 and layer.groups[0].k.dtype == torch.bfloat16
    assert_same("state", layer.state, exact)


def test_kernels_read_the_position_on_the_device(kernels_on):
    """A step by kernels looks at cache.seen alone, so that a recorded step may be replayed."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(kernels_on)
    idx = torch.randint(50, (1, 12), device=kernels_on)
    for pattern in "D1", "D4W3S2", "D4N4K2":
        _, cache = run_in_pieces(model, idx, pattern, (11,), max_len=40)
        cache.length = 7                                        # the host's count is for max_len
        with torch.no_grad():
            assert_same(pattern, model.step(idx[:, 11], cache), model(idx, pattern)[:, -1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
                         ids=["copied", "pickled"])
def test_a_copied_cache_is_a_fork(device, copied):
    """Both continue by themselves: nothing of them is shared or lost, nor by inference mode."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (2, 16), device=device)
    for pattern in "D4W3S2", "N3K2:minmax/D4N4K2:last":
        cache = model.new_cache(2, 16, pattern)
        with torch.inference_mode():
            model.prefill(idx[:, :12], cache)
        fork = copied(cache)
        model.prefill(idx.flip(0)[:, 12:14], fork)
        assert_steps(model, idx, pattern, cache, 12)
        flipped = torch.cat((idx[:, :12], idx.flip(0)[:, 12:]), dim=1)
        assert_steps(model, flipped, pattern, fork, 14)


def test_forward_hooks_fire_in_prefill_and_steps():
    """A hook on a block or on a part of it sees what generation computes."""
    model = tiny()
    calls = []
    block = model.blocks[0]
    for module in block, block.mix, block.fc1, block.mix.out_proj:
        module.register_forward_hook(lambda module, *_: calls.append(module))
    cache = model.new_cache(1, 9)
    model.prefill(torch.randint(50, (1, 5)), cache)
    model.step(torch.tensor([3]), cache)
    assert len(calls) == 8


# ---- What a cache refuses, and what it is worth afterwards ---------------------------------------

@pytest.fixture
def filled():
    """(model, tokens (1, 30), a cache of D4W3S1 for 24 that has seen 20)."""
    model = tiny()
    idx = torch.randint(50, (1, 30))
    _, cache = run_in_pieces(model, idx, "D4W3S1", (20,), max_len=24)
    return model, idx, cache


def refusals_of_a_cache(model, idx, cache):
    return {
        "too short": (r"\(1, 5\).* 20 of max_len 24",
                      lambda: model.prefill(idx[:, 20:25], cache)),
        "another batch": ("tokens", lambda: model.prefill(idx[:, 20:22].expand(2, 2), cache)),
        "no tokens": ("tokens", lambda: model.prefill(idx[:, :0], cache)),
        "flat tokens": ("tokens", lambda: model.prefill(idx[0], cache)),
        "a token of another shape": ("tokens", lambda: model.step(idx[:, 20:21], cache)),
        "a stream too long": ("max_len", lambda: list(model.stream(idx[:, 20:25], 1, cache))),
    }


@pytest.mark.parametrize("name", refusals_of_a_cache(None, None, None))
def test_a_refused_call_leaves_the_cache_usable(filled, name):
    model, idx, cache = filled
    why, call = refusals_of_a_cache(*filled)[name]
    assert_refused(call, why)
    assert_steps(model, idx[:, :24], "D4W3S1", cache, 20)
    assert_refused(lambda: model.step(idx[:, 24], cache), "24 of max_len 24")


@pytest.mark.parametrize("how", ["prefill", "step", "stream"])
def test_a_cache_says_that_a_failure_left_it_incomplete(filled, how):
    """The second layer fails when the first has stored its keys already."""
    model, idx, cache = filled
    model.step(idx[:, 20], cache)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model.blocks[1].fc1.register_forward_hook(fail)
    calls = {
        "prefill": lambda: model.prefill(idx[:, 21:23], cache),
        "step": lambda: model.step(idx[:, 21], cache),
        "stream": lambda: list(model.stream(idx[:, 21:22], 2, cache)),
    }
    assert_refused(calls[how], "out of memory", kind=RuntimeError)
    hook.remove()
    for call in calls.values():
        assert_refused(call, "incomplete")
    assert cache.length == 21


def test_the_dtype_of_a_cache_is_fixed_when_it_is_made(device):
    """Made under autocast and used outside of it, or the reverse: the same logits, to the bit."""
    model = tiny(n_layer=1, n_head=2, n_embd=16).to(device)
    idx = torch.randint(50, (1, 9), device=device)
    for inside in (True, False):
        with torch.autocast(device, HALF, enabled=inside):
            cache = model.new_cache(1, 9, "D4W3S1")
            model.prefill(idx[:, :7], cache)
            other = copy.deepcopy(cache)
            logits = model.step(idx[:, 7], cache)
        with torch.autocast(device, HALF, enabled=not inside):
            assert model.step(idx[:, 7], other).equal(logits)
        layer = cache.layers[0]
        assert layer.groups[0].k.dtype == (HALF if inside else torch.float32)
        assert layer.state.dtype == torch.float32


# ---- Generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("pattern", ["D1", "D4W3S2", "W5S1", "D1/D8,D4", "D1/D4N4K2,N8K2:last"])
def test_greedy_generation_is_the_argmax_of_the_parallel_pass(pattern, where):
    """On a GPU in float64, which no kernel takes, so no graph is captured."""
    model = tiny().to(where, torch.float64 if where == "cuda" else torch.float32)
    idx = torch.randint(50, (3, 7), device=where)
    out = model.generate(idx, 25, pattern, temperature=0)
    assert out.shape == (3, 32) and out[:, :7].equal(idx)
    with torch.no_grad():
        assert model(out, pattern)[:, 6:-1].argmax(-1).equal(out[:, 7:])


def test_a_sequence_stops_by_itself_and_a_stream_with_the_last():
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
    cache = model.new_cache(1, 506)
    assert len(list(model.stream(idx[:1], 500, cache, temperature=0, stop=stop))) == 16


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


@pytest.mark.parametrize("where", WHERE)
def test_sampling_draws_anew_and_repeats_with_its_seed(where):
    """On a GPU in the graph."""
    model = tiny(n_embd=128, vocab_size=300).to(where)
    idx = torch.randint(300, (64, 5), device=where)
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(model.generate(idx, 30, "D4", top_k=50, top_p=0.9))
    assert out[0].equal(out[1]) and not out[0].equal(out[2])
    assert (out[0][:, 10:-1] != out[0][:, 11:]).any(0).all(), "every step draws its own numbers"


@pytest.mark.parametrize("pattern", ["D4W3S1", "D1/N4K2"])
def test_generation_is_that_of_float64_compiled_too(device, pattern):
    """Prompts of any length run as they are; a step is compiled once for all layers."""
    torch.compiler.reset()
    model = tiny(n_layer=2, n_head=2, n_embd=16).to(device)
    exact = tiny(n_layer=2, n_head=2, n_embd=16).to(device, torch.float64)
    idx = torch.randint(50, (2, 9), device=device)
    expected = {T: exact.generate(idx[:, :T], 4, pattern, temperature=0) for T in (9, 1)}
    assert model.generate(idx, 4, pattern, temperature=0).equal(expected[9])
    loss = model.loss(idx, idx, pattern)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile(**({} if GPU else {"backend": backend}), dynamic=False)
    assert_same("compiled loss", model.loss(idx, idx, pattern), loss)
    model.generate(idx, 2, pattern)
    graphs = len(compiled)
    assert GPU or 0 < graphs < 7
    for T, tokens in expected.items():
        found = model.generate(idx[:, :T], 4, pattern, temperature=0)
        assert found.equal(tokens), f"prompt of {T}"
    assert len(compiled) == graphs


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = tiny(n_head=2, n_embd=16)
    model.compile(backend="eager")
    idx = torch.randint(50, (1, 9))
    model.generate(idx, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    plain = tiny(n_head=2, n_embd=16)
    plain.load_state_dict(twin.state_dict())
    assert_same("logits", twin.prefill(idx, twin.new_cache(1, 9)), plain(idx)[:, -1])


def test_logits_of_nan_are_an_error_in_words():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].fc2.weight[0, 0] = math.nan
    assert_refused(lambda: model.generate(torch.randint(50, (2, 5)), 5), "NaN")


def test_threads_generate_as_if_alone():
    """On a GPU each captures a graph, beside a thread that allocates and copies."""
    where = "cuda" if GPU else "cpu"
    model = tiny(n_layer=1).to(where)
    patterns = "D1", "D4W3S1", "W4"
    jobs = [(torch.randint(50, (1, 5), device=where), pattern) for pattern in patterns]
    expected = [model.generate(idx, 20, pattern, temperature=0) for idx, pattern in jobs]
    stop = threading.Event()

    def noise():
        while not stop.is_set():
            torch.empty(1_000_000, device=where).zero_().sum().item()
            if GPU:
                torch.cuda.empty_cache()

    def generate(job):
        idx, pattern = job
        for _ in range(3):
            found = model.generate(idx, 20, pattern, temperature=0)
        return found.cpu()

    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(noise)
        found = [pool.submit(generate, job) for job in jobs]
        results = [future.result(60) for future in found]
        stop.set()
        beside.result(60)
    for x, want in zip(results, expected):
        assert x.equal(want.cpu())


# ---- Sampling ------------------------------------------------------------------------------------

def test_sampling_draws_the_right_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, 4)
    probs = logits[0].softmax(-1)
    best_two = torch.tensor([probs[0], probs[1], 0, 0]) / probs[:2].sum()
    certain = torch.tensor([1.0, 0, 0, 0])
    cases = [
        (dict(), probs),
        (dict(temperature=0.5), (2 * logits[0]).softmax(-1)),
        (dict(top_k=2), best_two),
        (dict(top_p=0.7), best_two),
        (dict(top_k=2, top_p=0.7), certain),                    # 0.7 of what top_k left, not of all
        (dict(top_k=9, top_p=1.0), probs),                      # top_k beyond the vocabulary
        (dict(top_p=0.01), certain),
        (dict(top_k=1), certain),
        (dict(temperature=0), certain),
    ]
    for options, expected in cases:
        found = torch.bincount(choose(logits, **options), minlength=4) / 20000
        assert (found - expected).abs().max() < 0.02, f"{options}: {found.tolist()}"
    for cold in (1e-6, 1e-38, 1e-300):
        assert choose(logits.flip(1), temperature=cold).eq(3).all(), f"temperature {cold}"
    infinite = logits.index_fill(1, torch.tensor([3]), math.inf)
    for options in dict(temperature=0), dict(), dict(top_k=2), dict(top_p=0.9):
        assert choose(infinite, **options).eq(3).all(), f"+inf is the likeliest under {options}"


def test_the_default_dtype_does_not_matter_to_sampling():
    """Users set float16 to build models in half precision."""
    logits = torch.zeros(3000, 1000)                            # top_p 0.5 keeps 500 of 1000
    torch.set_default_dtype(torch.float16)
    try:
        drawn = len(choose(logits, top_p=0.5).unique())
    finally:
        torch.set_default_dtype(torch.float32)
    assert 480 <= drawn <= 501


# ---- On a GPU ------------------------------------------------------------------------------------

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
    for found, expected in zip(replayed.layers, stepped.layers):
        assert_same("state", found.state, expected.state, rounding)


@gpu
def test_graphs_leave_no_memory_behind():
    model = on_gpu(torch.bfloat16)
    idx = torch.randint(300, (2, 9), device="cuda")
    held = []
    for _ in range(20):
        model.generate(idx, 12, "D4W3S1")
        stream = model.stream(idx, 12, model.new_cache(2, 30, "D4W3S1"))
        for _ in range(5):
            next(stream)
        del stream
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert held[-1][0] < held[3][0] + 1_000_000
    assert held[-1][1] < held[3][1] + 30_000_000


@gpu
def test_100000_tokens_at_d64():
    model = on_gpu(torch.bfloat16)
    n = 100_000
    cache = model.new_cache(2, n, "D64")
    size = cache.nbytes
    prompt = torch.zeros(2, 1, dtype=torch.long, device="cuda")
    for i, _ in enumerate(model.stream(prompt, n, cache)):
        if i == 10:
            before = torch.cuda.memory_allocated()
    assert torch.cuda.memory_allocated() <= before + 4096 and cache.nbytes == size
    assert all(layer.state.isfinite().all() for layer in cache.layers)
    assert cache.slots == [[n // 64]] * 3
