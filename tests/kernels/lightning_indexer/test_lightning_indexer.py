"""The public op and its reference: meaning, edges, errors, and torch.compile."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing.time_limits import PROCESS_SECONDS

from indexcache.kernels.lightning_indexer import lightning_indexer_reference as reference
from indexcache.kernels.lightning_indexer.indexer_quantization import (
    e4m3_of_rows,
    quantize_for_scoring,
    quantized_rows,
)
from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer
from indexcache.kernels.lightning_indexer.lightning_indexer_triton import unsupported_reason


def inputs(B, S, T, H=3, D=16, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (B, S, H, D), (B, T, D), (B, S, H)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def by_hand(q, k, weights, topk, starts, key_mask=None, key_start=None):
    """One query at a time, sorted by (score, index) in Python."""
    B, S, H, D = q.shape
    rows = []
    for b in range(B):
        for s in range(S):
            terms = (k[b] @ q[b, s].T * D**-0.5).relu() @ weights[b, s]
            first = 0 if key_start is None else int(key_start[b, s])
            last = min(k.shape[1], starts[b] + s + 1)
            seen = [t for t in range(first, last) if key_mask is None or key_mask[b, t]]
            best = sorted(sorted(seen, key=lambda t: (-terms[t].item(), t))[:topk])
            rows.append(best + [-1] * (min(topk, k.shape[1]) - len(best)))
    return torch.tensor(rows, dtype=torch.int32).view(B, S, -1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 12),
    st.integers(1, 25),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_selects_the_best_visible_keys(B, S, before, topk, masked, packed, seed):
    T = before + S + 2
    q, k, weights = (x.double() for x in inputs(B, S, T, seed=seed))
    starts = [before - b if before >= b else before for b in range(B)]
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=draw) > 0.3 if masked else None
    first = torch.randint(0, T, (B, S), generator=draw, dtype=torch.int32) if packed else None
    options = {"query_start": torch.tensor(starts), "key_mask": mask, "key_start": first}
    got = lightning_indexer(q, k, weights, topk, **options)
    assert torch.equal(got, by_hand(q, k, weights, topk, starts, mask, first))


SCORES = st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 2.0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(SCORES, min_size=9, max_size=9), min_size=1, max_size=5), st.integers(1, 12))
def test_nan_is_never_selected_and_ties_beside_it_go_to_the_smaller_index(rows, topk):
    for scores in (torch.tensor(rows), torch.tensor(rows).double()):
        got = reference.select_topk(scores, topk)
        for row, selected in zip(rows, got.tolist()):
            good = [i for i, score in enumerate(row) if score > float("-inf")]
            best = sorted(sorted(good, key=lambda i: (-row[i], i))[:topk])
            assert selected == best + [-1] * (min(topk, 9) - len(best))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 25), st.integers(0, 99))
def test_a_nan_key_is_as_one_that_is_masked(B, poisoned, topk, seed):
    q, k, weights = inputs(B, 6, 40, seed=seed)
    # Small integers: many ties.
    q, k, weights = q.round(), k.round(), weights.round()
    rows = torch.rand(B, 40, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :poisoned]
    mask = torch.ones(B, 40, dtype=torch.bool).scatter(1, rows, False)
    want = lightning_indexer(q, k, weights, topk, key_mask=mask)
    k[~mask] = float("nan")
    assert torch.equal(lightning_indexer(q, k, weights, topk), want)


def test_a_query_whose_scores_are_all_nan_selects_nothing_and_changes_no_other():
    q, k, weights = inputs(2, 5, 30)
    want = lightning_indexer(q, k, weights, 7)
    weights[1, 2, 0] = float("nan")
    want[1, 2] = -1
    assert torch.equal(lightning_indexer(q, k, weights, 7), want)


def test_ties_go_to_the_smaller_index():
    q, k, weights = inputs(1, 4, 12)
    got = lightning_indexer(q, k[:, :1].expand(1, 12, 16), weights, 5)
    assert torch.equal(got, torch.arange(5, dtype=torch.int32).expand(1, 4, 5))


def test_selecting_by_sorting_is_the_same_with_ties_and_missing_keys():
    scores = torch.randint(0, 6, (40, 30), generator=torch.Generator().manual_seed(3)).float()
    scores[:5, 7:] = float("-inf")
    scores[5] = float("-inf")
    for topk in (1, 9, 30, 50):
        assert torch.equal(reference.select_topk_by_sorting(scores, topk), reference.select_topk(scores, topk))


def test_chunks_of_queries_give_what_the_whole_gives(monkeypatch):
    q, k, weights = inputs(2, 17, 30)
    whole = lightning_indexer(q, k, weights, 6)
    monkeypatch.setattr(reference, "SCORE_BLOCK_BYTES", 2 * 3 * 30 * 4 * 2)
    assert torch.equal(whole, lightning_indexer(q, k, weights, 6))
    parts = [
        lightning_indexer(q[:, i : i + 5], k, weights[:, i : i + 5], 6, query_start=13 + i) for i in (0, 5, 10, 15)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_nan_in_slots_no_query_sees_changes_nothing():
    q, k, weights = inputs(1, 3, 20)
    want = lightning_indexer(q, k, weights, 4, query_start=7)
    k[:, 10:] = float("nan")
    assert torch.equal(want, lightning_indexer(q, k, weights, 4, query_start=7))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 8, 15)}, "do not fit"),
        ({"weights": torch.zeros(1, 4, 2)}, "weights must be"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"key_mask": torch.ones(1, 7, dtype=torch.bool)}, "key_mask must be bool"),
        ({"key_mask": torch.ones(1, 8)}, "key_mask must be bool"),
        ({"key_start": torch.ones(1, 4)}, "key_start must be int32"),
        ({"key_start": torch.ones(1, 3, dtype=torch.int32)}, "key_start must be int32"),
    ],
)
def test_errors_name_the_argument(change, message):
    q, k, weights = inputs(1, 4, 8)
    arguments = {"q": q, "k": k, "weights": weights, "topk": 2} | change
    with pytest.raises(ValueError, match=message):
        lightning_indexer(**arguments)


def test_quantised_rows_keep_their_dot_products_and_are_exact_in_bf16():
    q, k, _ = inputs(2, 5, 40, H=4, D=64)
    (q8, q_scale), (k8, k_scale) = quantize_for_scoring(q), quantize_for_scoring(k)
    assert q8.dtype == k8.dtype == torch.float8_e4m3fn and q_scale.shape == (2, 5, 4) and k_scale.shape == (2, 40)
    assert torch.equal(k_scale.log2(), k_scale.log2().round())
    back = k8.bfloat16() * k_scale.bfloat16().unsqueeze(-1)
    assert torch.equal(back.float(), k8.float() * k_scale.unsqueeze(-1))
    exact, rounded = (
        torch.einsum("bshd,btd->bsht", a, b) for a, b in ((q, k), (q8.float() * q_scale[..., None], back.float()))
    )
    # e4m3 keeps 4 bits: a relative error of 1/32 at most in either factor, less by averaging over the width.
    assert (exact - rounded).norm() < 0.04 * exact.norm()


def test_fp8_selects_by_the_scores_of_the_quantised_rows():
    q, k, weights = inputs(2, 6, 50, H=4, D=32)
    (q8, q_scale), (k8, k_scale) = quantize_for_scoring(q), quantize_for_scoring(k)
    wide = q8.double() * q_scale[..., None], k8.double() * k_scale[..., None]
    got = lightning_indexer(q, k, weights, 9, fp8=True)
    assert torch.equal(got, by_hand(*wide, weights.double(), 9, [44, 44]))
    assert not torch.equal(got, lightning_indexer(q, k, weights, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_quantised_when_cached_are_not_changed_by_the_next_step(dtype):
    q, k, weights = inputs(2, 6, 50, H=4, D=32)
    k[0, :7] *= torch.tensor([1e-30, 1e-6, 1e-3, 7.0, 448.0, 1e5, 1e20]).unsqueeze(-1)
    q, k = q.to(dtype), k.to(dtype)
    cached = quantized_rows(k)
    (values, scale), (first, first_scale) = e4m3_of_rows(cached), quantize_for_scoring(k)
    back = first.double() * first_scale.double().unsqueeze(-1)
    assert cached.dtype == dtype and torch.equal(cached.double(), back)
    assert torch.equal(values.double() * scale.double().unsqueeze(-1), back)
    chunks = torch.cat([quantized_rows(part) for part in k.split(9, dim=1)], 1)
    got = lightning_indexer(q, chunks, weights, 9, fp8=True, quantized_keys=True)
    assert torch.equal(got, lightning_indexer(q, k, weights, 9, fp8=True))


def test_compiles_without_graph_breaks():
    q, k, weights = inputs(2, 3, 20)
    start = torch.tensor([5, 17])
    for fp8 in (False, True):
        select = lambda start, fp8=fp8: lightning_indexer(q, k, weights, 4, query_start=start, fp8=fp8)
        compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(start), select(start))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"q": torch.zeros(1, 4, 2, 32)}, "bfloat16 or float16"),
        ({"q": torch.zeros(1, 4, 65, 32, dtype=torch.half)}, "1 to 64 heads"),
        ({"q": torch.zeros(1, 4, 2, 512, dtype=torch.half)}, "1 to 64 heads"),
        ({"topk": 5000}, "topk is at most 4096"),
        ({"key_mask": torch.ones(1, 4, 8, dtype=torch.bool)}, "key_mask for each query"),
        ({}, None),
    ],
)
def test_what_triton_cannot_take_has_a_reason(change, reason):
    pytest.importorskip("triton")
    half = {"q": torch.zeros(1, 4, 2, 32, dtype=torch.half), "k": torch.zeros(1, 8, 32, dtype=torch.half)}
    got = unsupported_reason(**(half | {"topk": 2, "key_mask": None} | change))
    assert got is None if reason is None else reason in got


def test_loads_and_runs_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer\n"
        "from indexcache.kernels.lightning_indexer.lightning_indexer_triton import unsupported_reason\n"
        "x = torch.ones(1, 2, 3, 16)\n"
        "assert lightning_indexer(x, x[:, :, 0], x[..., 0], 1).tolist() == [[[0], [0]]]\n"
        "assert unsupported_reason(x, x[:, :, 0], 1, None) == 'triton is not installed'\n"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert child.returncode == 0, child.stderr[-2000:]
