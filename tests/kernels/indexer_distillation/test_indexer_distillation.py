import pytest
import torch

from indexcache.kernels.indexer_distillation import indexer_distillation_ops as ops
from indexcache.kernels.indexer_distillation import indexer_distillation_reference as reference
from indexcache.kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
    selected_index_scores,
)
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla


def indexer(B=2, S=6, T=20, H=8, D=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(B, S, H, D), draw(B, T, D), draw(B, S, H)


def selection(B=2, S=6, T=20, K=7, seed=1):
    """Indices in any order with -1 anywhere; the second query of the first row has no keys."""
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(B, S, T, generator=g).argsort(-1)[..., :K].int()
    indices[torch.rand(indices.shape, generator=g) < 0.3] = -1
    indices[0, 1] = -1
    return indices


def attention(B=2, S=6, T=20, H=3, D=10, seed=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, H, D, generator=g).double(), torch.randn(B, T, D, generator=g).double()


def full_scores(q, k, weights, scale):
    """The definition, with every intermediate in full."""
    return (weights.unsqueeze(-1) * torch.relu(scale * torch.einsum("bshd,btd->bsht", q, k))).sum(2)


def rows(indices):
    """Every query that selects something, with its keys."""
    for b, s in (indices >= 0).any(-1).nonzero().tolist():
        yield b, s, indices[b, s][indices[b, s] >= 0].long()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # Two queries a chunk or fewer, so that joining chunks is part of every test.
    monkeypatch.setattr(reference, "BLOCK_BYTES", 3000)


def test_scores_of_selected_keys_are_those_of_the_full_matrix():
    (q, k, weights), indices = indexer(), selection()
    scores = selected_index_scores(q, k, weights, indices)
    full = full_scores(q, k, weights, 6**-0.5)
    assert (scores[indices < 0] == float("-inf")).all()
    for b, s, keys in rows(indices):
        torch.testing.assert_close(scores[b, s][indices[b, s] >= 0], full[b, s, keys])


def test_attention_of_selected_keys_is_the_head_mean_and_sums_to_one():
    (q, kv), indices = attention(), selection()
    _, lse = sparse_mla(q, kv, indices, scale=0.4, value_dim=4)
    p = selected_attention(q.requires_grad_(), kv, lse, indices, scale=0.4)
    assert not p.requires_grad and (p[indices < 0] == 0).all()
    has_keys = (indices >= 0).any(-1)
    torch.testing.assert_close(p.sum(-1), has_keys.double())
    for b, s, keys in rows(indices):
        expected = (q[b, s] @ kv[b, keys].T * 0.4).softmax(-1).mean(0)
        torch.testing.assert_close(p[b, s][indices[b, s] >= 0], expected.detach())


def test_with_the_lse_of_all_keys_it_sums_to_the_attention_that_is_kept():
    (q, kv), indices = attention(S=20), selection(S=20)
    indices = torch.where(indices <= torch.arange(20)[:, None], indices, -1)
    lse = attention_lse(q, kv, scale=0.4)
    kept = selected_attention(q, kv, lse, indices, scale=0.4).sum(-1)
    for b, s, keys in rows(indices):
        full = (q[b, s] @ kv[b, : s + 1].T * 0.4).softmax(-1).mean(0)
        torch.testing.assert_close(kept[b, s], full[keys].sum())


def test_indexer_kl_is_torchs_kl_over_the_selected_keys():
    (q, k, weights), indices = indexer(), selection()
    target = torch.rand(indices.shape, generator=torch.Generator().manual_seed(3)).double()
    kl = indexer_kl(q, k, weights, indices, target)
    full = full_scores(q, k, weights, 6**-0.5)
    assert kl[0, 1] == 0
    for b, s, keys in rows(indices):
        p = target[b, s][indices[b, s] >= 0]
        log_q = full[b, s, keys].log_softmax(-1)
        expected = torch.nn.functional.kl_div(log_q, p / p.sum(), reduction="sum")
        torch.testing.assert_close(kl[b, s], expected)


@pytest.mark.parametrize("operation", ["scores", "kl"])
def test_gradients_over_selected_keys_are_exact(operation):
    (q, k, weights), indices = indexer(B=1, S=3, T=8, D=3), selection(B=1, S=3, T=8, K=4)
    target = torch.rand(indices.shape, generator=torch.Generator().manual_seed(3)).double()
    target[0, 2] = 0.0  # a row without a target

    def run(q, k, weights):
        if operation == "kl":
            return indexer_kl(q, k, weights, indices, target)
        return selected_index_scores(q, k, weights, indices)[indices >= 0]

    inputs = [x.requires_grad_() for x in (q, k, weights)]
    assert torch.autograd.gradcheck(run, inputs)
    if operation == "kl":
        grads = torch.autograd.grad(run(*inputs).sum(), inputs)
        assert all((grad[0, [1, 2]] == 0).all() for grad in (grads[0], grads[2]))


@pytest.mark.parametrize("way", ["scores", "kl", "dense"])
def test_kernels_whose_gradient_s_kernel_was_set_aside_get_the_references_gradients(way):
    """Such a gradient runs in PyTorch inside the custom operation, where autograd is off unless it is asked back."""
    q, k, weights = (x.requires_grad_() for x in indexer())
    indices = selection().int()
    if way == "scores":
        result = reference.selected_index_scores_reference(q, k, weights, indices, 0.3)
        rest = (indices, None, None, 0.3)
    elif way == "kl":
        target = torch.rand(indices.shape)
        result = reference.indexer_kl_reference(q, k, weights, indices, target, 0.3)
        rest = (indices, target, None, 0.3)
    else:
        layers, query_start = attention(), torch.full((2,), 14, dtype=torch.int64)
        lse = reference.attention_lse_reference(*layers, 0.2, query_start, None, None)
        result = reference.dense_indexer_kl_reference(
            q, k, weights, [layers[0]], [layers[1]], [lse], 0.3, 0.2, query_start, None, None
        )
        rest = ([layers[0]], [layers[1]], [lse], lse.new_empty(2, 6), 0.3, 0.2, query_start, None, None)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(result, (q, k, weights), grad.masked_fill(result.detach() == float("-inf"), 0.0))
    run = ops._dense_indexer_kl_backward if way == "dense" else ops._index_backward
    with torch.no_grad():
        found = run(grad, q.detach(), k.detach(), weights.detach(), *rest)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def naive_dense(q, k, weights, layers, scale, attn_scale, seen):
    """Mean over layers and heads of the attention, and its KL, with full matrices."""
    p = 0
    for q_attn, kv in layers:
        scores = torch.einsum("bshd,btd->bsht", q_attn, kv) * attn_scale
        p = p + scores.masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1).nan_to_num().mean(2) / len(layers)
    log_q = full_scores(q, k, weights, scale).masked_fill(~seen, float("-inf")).log_softmax(-1)
    terms = torch.special.xlogy(p, p) - p * log_q.masked_fill(~seen, 0.0)
    return torch.where(seen.any(-1), terms.sum(-1), 0.0)


@pytest.mark.parametrize("layers", [1, 3])
def test_dense_kl_and_its_gradients_are_those_of_full_matrices(layers):
    q, k, weights = indexer(S=14)
    attentions = [attention(S=14, seed=seed) for seed in range(layers)]
    starts = torch.tensor([6, 3])
    key_start = torch.where(torch.arange(14) < 6, 0, 9).int().expand(2, 14).contiguous()
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[1, :4] = False  # with start 3: the first query of the second row sees nothing
    slots, keys = starts.view(2, 1, 1) + torch.arange(14)[:, None], torch.arange(20)
    seen = (keys <= slots) & (keys >= key_start.unsqueeze(-1)) & key_mask.unsqueeze(1)
    assert not seen[1, 0].any()
    inputs = [x.requires_grad_() for x in (q, k, weights)]
    loss = dense_indexer_kl(
        *inputs,
        [x for x, _ in attentions] if layers > 1 else attentions[0][0],
        [x for _, x in attentions] if layers > 1 else attentions[0][1],
        attn_scale=0.4,
        query_start=starts,
        key_start=key_start,
        key_mask=key_mask,
    )
    expected = naive_dense(*inputs, attentions, 6**-0.5, 0.4, seen)
    torch.testing.assert_close(loss, expected)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(5)).double()
    used = seen.any(-1)
    ours = torch.autograd.grad((loss * upstream).sum(), inputs)
    naive = torch.autograd.grad((expected[used] * upstream[used]).sum(), inputs)
    for one, other in zip(ours, naive):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other.nan_to_num(), atol=1e-12, rtol=1e-10)


def test_the_averaged_target_has_the_gradient_of_one_kl_a_layer():
    inputs = [x.requires_grad_() for x in indexer()]
    attentions = [attention(seed=seed) for seed in range(3)]
    each = [dense_indexer_kl(*inputs, *one, attn_scale=0.4, query_start=14).sum() / 3 for one in attentions]
    lists = [list(x) for x in zip(*attentions)]
    averaged = dense_indexer_kl(*inputs, *lists, attn_scale=0.4, query_start=14).sum()
    for one, other in zip(torch.autograd.grad(sum(each), inputs), torch.autograd.grad(averaged, inputs)):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_nan_in_keys_that_nobody_selects_changes_nothing():
    (q, k, weights), (q_attn, kv), indices = indexer(), attention(), selection()
    target = torch.rand(indices.shape).double()
    _, lse = sparse_mla(q_attn, kv, indices, scale=0.4, value_dim=4)

    def run():
        return (
            selected_index_scores(q, k, weights, indices),
            indexer_kl(q, k, weights, indices, target),
            selected_attention(q_attn, kv, lse, indices, scale=0.4),
        )

    before = run()
    for b in range(2):
        unused = torch.ones(20, dtype=torch.bool)
        unused[indices[b][indices[b] >= 0].long()] = False
        k[b, unused] = kv[b, unused] = float("nan")
    target[indices < 0] = float("nan")
    for one, other in zip(before, run()):
        assert torch.equal(one, other)


def test_nothing_asked_and_nothing_selected():
    (q, k, weights), (q_attn, kv), indices = indexer(), attention(), selection()
    empty = indices[..., :0]
    assert selected_index_scores(q, k, weights, empty).shape == (2, 6, 0)
    assert (indexer_kl(q, k, weights, empty, torch.zeros(2, 6, 0)) == 0).all()
    assert indexer_kl(q[:, :0], k, weights[:, :0], indices[:, :0], torch.zeros(2, 0, 7)).shape == (2, 0)
    assert dense_indexer_kl(q[:, :0], k, weights[:, :0], q_attn[:, :0], kv, attn_scale=1.0).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, w, i, a, kv: selected_index_scores(q, k[..., :3], w, i), "do not fit"),
        (lambda q, k, w, i, a, kv: selected_index_scores(q, k, w[..., :3], i), "weights must be"),
        (lambda q, k, w, i, a, kv: selected_index_scores(q, k, w, i.long()), "indices must be int32"),
        (lambda q, k, w, i, a, kv: selected_attention(a, kv, w, i, scale=1.0), "lse must be"),
        (lambda q, k, w, i, a, kv: indexer_kl(q, k, w, i, i), "target must be bf16"),
        (lambda q, k, w, i, a, kv: dense_indexer_kl(q, k, w, [a, a], [kv], attn_scale=1.0), "got 2, 1 and none"),
        (lambda q, k, w, i, a, kv: dense_indexer_kl(q, k, w, a, kv[:, :5], attn_scale=1.0), "served layer 0"),
        (
            lambda q, k, w, i, a, kv: dense_indexer_kl(q, k, w, a, kv, attn_scale=1.0, key_start=torch.zeros(2, 6)),
            "key_start must be int32",
        ),
        (
            lambda q, k, w, i, a, kv: attention_lse(a, kv, scale=1.0, key_mask=torch.ones(2, 6, dtype=torch.bool)),
            "key_mask must be bool",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*indexer(), selection(), *attention())


def test_what_the_kernels_do_not_take_is_said_in_words():
    pytest.importorskip("triton")
    q, k, _ = indexer()
    half = q.half(), k.half()
    assert "bfloat16 or float16" in ops._why_not(q, k, 256, 5)
    assert "width 6 is above" in ops._why_not(*half, 5, 5)
    assert "9000 selected keys" in ops._why_not(*half, 256, 9000)
    assert ops._why_not(*half, 256, 5) is None
