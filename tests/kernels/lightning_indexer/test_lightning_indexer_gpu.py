"""The Triton lightning indexer on a GPU: judged in fp64, bit-identical runs, poison, CUDA graphs, torch.compile."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def bench():
    pytest.importorskip("triton")
    from indexcache.benchmarks.kernels import lightning_indexer as bench

    torch.manual_seed(0)
    return bench


def select(*arguments, **options):
    from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer

    return lightning_indexer(*arguments, **options)


@pytest.mark.parametrize(
    "S, T, H, D, topk, start",
    [
        (1, 1, 32, 128, 2048, 0),
        (2047, 2047, 32, 128, 2048, 0),
        (2048, 2048, 32, 128, 2048, 0),
        (2049, 2049, 32, 128, 2048, 0),
        (8192, 8192, 64, 128, 2048, 0),
        (20000, 20000, 64, 128, 2048, 0),
        (9000, 9000, 16, 64, 2048, 0),
        (6000, 16000, 16, 128, 600, 10000),
        (8192, 8192, 32, 128, 2048, 0),
        (3000, 8192, 32, 128, 100, 5000),
        (4096, 70000, 32, 128, 2048, 60000),
        (8, 70000, 32, 128, 2048, 60000),
        (1, 200000, 32, 128, 2048, 199990),
        (300, 20000, 20, 64, 4096, 19700),
        (4096, 6000, 3, 128, 1000, 1000),
        (65536, 65536, 32, 128, 2048, 0),
        (200000, 200000, 32, 128, 2048, 0),
    ],
)
def test_equals_fp64_but_for_rounding_and_repeats(bench, S, T, H, D, topk, start):
    q, k, weights = bench.make_inputs(1, S, T, H, D)
    k[:, start + S :] = float("nan")
    got = select(q, k, weights, topk, query_start=start)
    assert bench.wrong_rows(got, q, k, weights, sorted({0, S // 3, S // 2, S - 1}), start) is None
    assert all(torch.equal(got, select(q, k, weights, topk, query_start=start)) for _ in range(10))


def test_rows_whose_guess_is_too_high_are_selected_again(bench, monkeypatch):
    from indexcache.kernels.lightning_indexer import lightning_indexer_hopper_gluon as hopper

    monkeypatch.setattr(hopper, "guess_rank", lambda topk: topk // hopper.SAMPLE_STRIDE // 2)
    q, k, weights = bench.make_inputs(1, 4096, 30000, 32)
    got = select(q, k, weights, 2048, query_start=25904)
    assert bench.wrong_rows(got, q, k, weights, [0, 7, 8, 2000, 4095], 25904) is None


def test_packed_documents(bench):
    q, k, weights = bench.make_inputs(1, 16384, 16384, 32)
    first = (torch.arange(16384, device="cuda") // 7000 * 7000).int().unsqueeze(0)
    got = select(q, k, weights, 1024, query_start=0, key_start=first)
    for start, end in ((0, 7000), (7000, 14000), (14000, 16384)):
        part = slice(start, end)
        alone = select(q[:, part], k[:, part], weights[:, part], 1024, query_start=0)
        assert torch.equal(got[:, part], torch.where(alone < 0, alone, alone + start))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "B, S, T, H, D, topk",
    [
        (1, 8192, 20000, 32, 128, 2048),
        (1, 8192, 20000, 64, 128, 2048),
        (1, 9000, 20000, 16, 64, 2048),
        (1, 8192, 20000, 32, 128, 300),
        (1, 4096, 6000, 3, 128, 1000),
        (2, 1, 20000, 32, 128, 2048),
        (1, 8, 20000, 32, 128, 2048),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.995])
def test_a_nan_key_is_as_one_that_is_masked(bench, B, S, T, H, D, topk, share, fp8):
    """Of either sign, beside ties; where few are left, all of them and then -1. The Hopper kernels included."""
    q, k, weights = bench.make_inputs(B, S, T, H, D)
    k[:, : T // 2] = k[:, T // 2 : T // 2 * 2]
    mask = torch.rand(B, T, device="cuda") > share
    want = select(q, k, weights, topk, key_mask=mask, fp8=fp8)
    poison = torch.where(torch.rand(B, T, device="cuda") > 0.5, float("nan"), -float("nan")).to(k.dtype)
    k[..., 0] = torch.where(mask, k[..., 0], poison)
    got = select(q, k, weights, topk, fp8=fp8)
    assert torch.equal(got, want)
    assert share < 0.9 or (got == -1).any()
    everything = weights.clone()
    everything[:, ::2, 0] = float("nan")
    got = select(q, k, everything, topk, fp8=fp8)
    assert (got[:, ::2] == -1).all() and torch.equal(got[:, 1::2], want[:, 1::2])


@pytest.mark.parametrize("fp8", [False, True])
def test_queries_that_see_nothing(bench, fp8):
    """Whole blocks of them, said by the largest number there is."""
    q, k, weights = bench.make_inputs(1, 8192, 8192, 32)
    first = torch.zeros(1, 8192, dtype=torch.int32, device="cuda")
    first[:, 1000:1100] = 2**31 - 1
    got = select(q, k, weights, 1024, query_start=0, key_start=first, fp8=fp8)
    others = select(q, k, weights, 1024, query_start=0, fp8=fp8)
    others[:, 1000:1100] = -1
    assert torch.equal(got, others)


def test_chunks_select_what_the_whole_selects(bench):
    q, k, weights = bench.make_inputs(1, 20000, 20000, 32)
    whole = select(q, k, weights, 2048, query_start=0)
    for start in range(0, 20000, 5000):
        part = slice(start, start + 5000)
        # The cache's slots behind the chunk are not filled yet.
        cache = k.clone()
        cache[:, start + 5000 :] = float("nan")
        assert torch.equal(select(q[:, part], cache, weights[:, part], 2048, query_start=start), whole[:, part])


@pytest.mark.parametrize(
    "B, S, T, H, fp8",
    [(1, 8192, 8192, 32, False), (1, 8192, 8192, 32, True), (4, 1, 70000, 32, False), (1, 4096, 4096, 3, False)],
)
def test_a_thousand_runs_are_bit_identical(bench, B, S, T, H, fp8):
    q, k, weights = bench.make_inputs(B, S, T, H)
    first = select(q, k, weights, 2048, fp8=fp8)
    changed = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        changed += (select(q, k, weights, 2048, fp8=fp8) != first).sum()
    assert changed == 0


@pytest.mark.parametrize("D", [128, 32])
def test_quantises_as_pytorch(bench, D):
    from indexcache.kernels.lightning_indexer.indexer_quantization import quantize_for_scoring

    x, _, _ = bench.make_inputs(2, 333, 1, 5, D)
    x[0] *= torch.randn(333, 5, 1, device="cuda").exp()
    x[1, 0] = 0.0
    (values, scale), (want, want_scale) = quantize_for_scoring(x), quantize_for_scoring(x, allow_triton=False)
    assert torch.equal(scale, want_scale)
    # The order of fp32 sums may decide where a value lies between two of bf16, and then of e4m3.
    assert (values.float() != want.float()).float().mean() < 1e-3


@pytest.mark.parametrize("multiply_e4m3", [False, True])
@pytest.mark.parametrize("S, T", [(1, 20000), (8192, 8192), (20000, 20000)])
def test_fp8_selects_by_the_quantised_scores(bench, monkeypatch, S, T, multiply_e4m3):
    from indexcache.kernels.lightning_indexer import lightning_indexer_hopper_gluon as hopper
    from indexcache.kernels.lightning_indexer.indexer_quantization import quantize_for_scoring
    from indexcache.kernels.lightning_indexer.lightning_indexer_triton import why_not_hopper

    monkeypatch.setattr(hopper, "MULTIPLY_E4M3", multiply_e4m3)
    q, k, weights = bench.make_inputs(1, S, T, 32)
    got = select(q, k, weights, 2048, query_start=T - S, fp8=True)
    products = None
    if multiply_e4m3 and why_not_hopper(quantize_for_scoring(q)[0], k, 2048) is None:
        products = bench.tensor_core_products(q, k)
    q, k = ((x8.float() * scale.unsqueeze(-1)).bfloat16() for x8, scale in map(quantize_for_scoring, (q, k)))
    rows = sorted({0, S // 4, S // 3, S // 2, S - 1})
    assert bench.wrong_rows(got, q, k, weights, rows, T - S, products=products) is None


@pytest.mark.parametrize("S", [1, 4096])
def test_batch_with_padding_holes_and_starts(bench, S):
    q, k, weights = bench.make_inputs(3, S, 9000, 32)
    starts = torch.tensor([0, 2000, 4904], device="cuda")
    mask = torch.rand(3, 9000, device="cuda") > 0.2
    mask[:, :100] = False
    k[~mask] = float("nan")
    got = select(q, k, weights, 2048, query_start=starts, key_mask=mask)
    assert bench.wrong_rows(got, q, k, weights, sorted({0, S // 2, S - 1}), starts, mask) is None


@pytest.mark.parametrize("order", ["equal", "ascending", "descending", "outliers"])
@pytest.mark.parametrize("S", [1, 8192])
def test_adversarial_orders(bench, order, S):
    T = 65536
    q, k, weights = bench.make_inputs(1, S, T, 32)
    ramp = torch.linspace(0.01, 1, T, device="cuda")[None, :, None]
    if order == "equal":
        k = k[:, :1].expand(1, T, 128).contiguous()
    elif order == "outliers":
        k[:, 30000:30500] *= 1000
    else:
        q, weights = q.abs(), weights.abs()
        k = (k[:, :1].abs() * (ramp if order == "ascending" else ramp.flip(1))).bfloat16()
    got = select(q, k, weights, 2048, query_start=T - S)
    assert bench.wrong_rows(got, q, k, weights, sorted({0, S // 2, S - 1}), T - S) is None
    if order == "equal":
        assert torch.equal(got[0, -1], torch.arange(2048, dtype=torch.int32, device="cuda"))


def test_a_captured_graph_follows_the_length_on_the_device(bench):
    from indexcache.benchmarks.kernels.harness import captured

    q, k, weights = bench.make_inputs(2, 1, 20000, 32)
    start, out = torch.tensor([9000, 100], device="cuda"), torch.empty(2, 1, 2048, dtype=torch.int32, device="cuda")
    replay = captured(lambda: out.copy_(select(q, k, weights, 2048, query_start=start)))
    for lengths in ([9000, 100], [19999, 5000]):
        start.copy_(torch.tensor(lengths))
        replay()
        assert torch.equal(out, select(q, k, weights, 2048, query_start=start))


@pytest.mark.parametrize("S, fp8", [(4, False), (2048, False), (2048, True)])
def test_compiles_without_graph_breaks(bench, S, fp8):
    q, k, weights = bench.make_inputs(1, S, 8000, 32)
    start = torch.tensor(5000, device="cuda")
    call = lambda start: select(q, k, weights, 2048, query_start=start, fp8=fp8)
    got = torch.compile(call, fullgraph=True, backend="aot_eager" if fp8 else "inductor")(start)
    assert torch.equal(got, call(start))
