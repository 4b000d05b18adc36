"""Sparse MLA in Triton's interpreter, against the reference in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from indexcache.kernels.sparse_mla import merged_selection
from indexcache.kernels.sparse_mla import sparse_mla_triton as kernels
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla
from indexcache.kernels.sparse_mla.sparse_mla_reference import sparse_mla_reference
from indexcache.kernels.sparse_mla.sparse_mla_union_triton import merge_key_lists, owner_shift

pytestmark = pytest.mark.interpreted
# bf16 products are wrong in Triton's interpreter (3.9); fp16 has the same code path.
DTYPE = torch.float16


def problem(B, S, T, H, D, K, order="ascending", seed=0):
    """Random inputs; every latent that no query selects is NaN. `order`: ascending (-1 at the end) or scattered."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=g).to(DTYPE)
    kv = torch.randn(B, T, D, generator=g).to(DTYPE)
    indices = torch.rand(B, S, T, generator=g).argsort(-1)[..., :K].int()
    if order == "ascending":
        used = torch.randint(0, K + 1, (B, S, 1), generator=g)
        indices = torch.where(torch.arange(K) < used, indices.sort(-1).values, -1)
    else:
        indices[torch.rand(indices.shape, generator=g) < 0.3] = -1
    selected = torch.zeros(B, T + 1, dtype=torch.bool)
    selected.scatter_(1, torch.where(indices < 0, T, indices).flatten(1).long(), True)
    kv[~selected[:, :T]] = float("nan")
    return q, kv, indices


def assert_close(result, q, kv, indices, value_dim, scale):
    out, lse = result
    expected, expected_lse = sparse_mla_reference(q.double(), kv.double(), indices, scale, value_dim)
    plain, _ = sparse_mla_reference(q, kv, indices, scale, value_dim)
    error, plain_error = (out - expected).abs().max(), (plain - expected).abs().max()
    assert error <= 1.5 * plain_error + 1e-3 * expected.abs().max()
    empty = (indices < 0).all(-1)
    assert (out[empty] == 0).all() and (lse[empty] == float("-inf")).all()
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("B", "S", "T", "H", "D", "V", "K"),
    [(2, 5, 50, 20, 40, 32, 24), (1, 1, 70, 8, 80, 64, 33), (1, 3, 40, 40, 48, 48, 17), (1, 2, 9, 3, 24, 20, 1)],
)
@pytest.mark.parametrize("order", ["ascending", "scattered"])
def test_matches_the_reference(B, S, T, H, D, V, K, order):
    q, kv, indices = problem(B, S, T, H, D, K, order)
    assert_close(kernels.sparse_mla_triton(q, kv, indices, D**-0.5, V), q, kv, indices, V, D**-0.5)


@pytest.mark.parametrize("group", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["ascending", "scattered"])
def test_grouped_queries_match_the_reference(group, order):
    q, kv, indices = problem(2, 2 * group + 1, 50, 4, 40, 20, order)
    out, lse = torch.full((*q.shape[:3], 32), float("nan"), dtype=DTYPE), torch.full(q.shape[:3], float("nan"))
    keys, counts = merge_key_lists(indices, group, kv.shape[1])
    tile = kernels.Tile(max(16, 4 * group), 16, 4, 2)
    kernels._launch(q, kv, keys, counts, 0.2, out, lse, tile, group, 1)
    assert_close((out, lse), q, kv, indices, 32, 0.2)


@pytest.mark.parametrize("group", [0, 1, 3])
@pytest.mark.parametrize("order", ["ascending", "scattered"])
def test_slots_that_there_are_not_count_as_none(group, order):
    """In place of -1: the first slot behind the last, ..., the greatest int32; group 0 splits the keys."""
    q, kv, indices = problem(2, 7, 50, 4, 40, 20, order)
    far = torch.where(torch.arange(20) % 3 == 0, 50 + torch.arange(20), 2**31 - 1 - 20 + torch.arange(20))
    far = 50 + torch.arange(20) if order == "ascending" else far
    outside = torch.where(indices < 0, far, indices).int()
    assert (outside >= 50).any()
    out, lse = torch.full((*q.shape[:3], 32), float("nan"), dtype=DTYPE), torch.full(q.shape[:3], float("nan"))
    tile = kernels.Tile(16, 16, 4, 2)
    if group == 0:
        kernels._decode(q, kv, outside, 0.2, out, lse, 2, tile)
    else:
        keys, counts = (outside, None) if group == 1 else merge_key_lists(outside, group, 50)
        kernels._launch(q, kv, keys, counts, 0.2, out, lse, tile, group, 1)
    assert_close((out, lse), q, kv, indices, 32, 0.2)


def test_merged_lists_are_the_ascending_union_with_its_owners():
    _, _, indices = problem(2, 7, 60, 1, 16, 20)
    keys, counts = merge_key_lists(indices, 3, 60)
    shift = owner_shift(3)
    for b in range(2):
        for group in range(3):
            rows = [set(row[row >= 0].tolist()) for row in indices[b, 3 * group : 3 * group + 3]]
            merged = sorted(set().union(*rows))
            listed = keys[b, group, : counts[b, group]]
            assert (listed & ((1 << shift) - 1)).tolist() == merged
            owners = [sum((key in row) << m for m, row in enumerate(rows)) for key in merged]
            assert (listed >> shift).tolist() == owners


def test_repeated_keys_count_as_often_as_they_are_listed():
    q, kv, _ = problem(1, 3, 20, 4, 40, 20)
    kv = kv.nan_to_num()
    indices = torch.tensor([[[3, 3, 5, 9], [1, 2, 2, -1], [0, 4, 6, 7]]], dtype=torch.int32)
    keys, counts = merge_key_lists(indices, 3, 20)
    out, lse = torch.empty(1, 3, 4, 32, dtype=DTYPE), torch.empty(1, 3, 4)
    kernels._launch(q, kv, keys, counts, 0.2, out, lse, kernels.Tile(16, 16, 4, 2), 3, 1)
    assert_close((out, lse), q, kv, indices, 32, 0.2)


@pytest.mark.parametrize("order", ["ascending", "scattered"])
@pytest.mark.parametrize(("queries", "launch"), [(23, 7), (52, 30)])
def test_lists_merged_ahead_block_by_block_serve_any_chunk_of_queries(monkeypatch, order, queries, launch):
    monkeypatch.setattr(merged_selection, "QUERIES_PER_LAUNCH", launch)
    monkeypatch.setattr(kernels, "QUERIES_PER_LAUNCH", 4)
    q, kv, indices = problem(2, queries, 50, 20, 40, 17, order)
    group = kernels.selection_group(q.device, 20, queries, 17, 50)
    assert group == 3
    selection = MergedSelection.empty(2, queries, 17, group, q.device)
    selection.keys.fill_(-(2**31))
    for first in range(0, queries, 39):
        selection.fill(first, indices[:, first : first + 39], 50)
    for first, last in ((0, 9), (9, queries), (0, queries)):
        result = sparse_mla(q[:, first:last], kv, selection.of_queries(first, last), scale=0.2, value_dim=32)
        assert_close(result, q[:, first:last], kv, indices[:, first:last], 32, 0.2)
    with pytest.raises(ValueError, match="multiples of 3"):
        selection.of_queries(4, 9)
    with pytest.raises(ValueError, match="is of 2 x 6 queries"):
        sparse_mla(q, kv, selection.of_queries(0, 6), scale=0.2, value_dim=32)


@pytest.mark.parametrize("splits", [2, 5])
def test_split_decode_matches_the_reference(splits):
    q, kv, indices = problem(3, 1, 90, 20, 40, 70)
    indices[1] = -1
    out, lse = torch.full((3, 1, 20, 32), float("nan"), dtype=DTYPE), torch.full((3, 1, 20), float("nan"))
    result = kernels._decode(q, kv, indices, 0.2, out, lse, splits, kernels.Tile(16, 16, 4, 2))
    assert_close(result, q, kv, indices, 32, 0.2)


def test_a_strided_cache_view_and_strided_queries_are_read_in_place():
    q, kv, indices = problem(2, 4, 30, 4, 40, 16)
    cache = torch.full((2, 1, 64, 48), float("nan"), dtype=DTYPE)
    cache[:, 0, :30, :40] = kv
    view = cache.squeeze(1)[:, :30, :40]
    wide = torch.full((2, 4, 8, 40), float("nan"), dtype=DTYPE)
    wide[:, :, ::2] = q
    result = kernels.sparse_mla_triton(wide[:, :, ::2], view, indices, 0.2, 32)
    assert_close(result, q, kv, indices, 32, 0.2)


def test_nothing_selected_and_nothing_asked():
    q, kv, indices = problem(1, 3, 20, 4, 40, 8)
    out, lse = kernels.sparse_mla_triton(q, kv, indices[..., :0], 0.2, 32)
    assert (out == 0).all() and (lse == float("-inf")).all()
    out, lse = kernels.sparse_mla_triton(q[:, :0], kv, indices[:, :0], 0.2, 32)
    assert out.shape == (1, 0, 4, 32) and lse.shape == (1, 0, 4)
