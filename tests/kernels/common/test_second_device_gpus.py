"""Every public operation on `cuda:1` while `cuda:0` is current: the bits of `cuda:0`, the values of the reference."""

import pytest
import torch

from indexcache.kernels.common.early_launch import early_launches
from indexcache.kernels.experts import expert_topk, routed_experts
from indexcache.kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
    selected_index_scores,
)
from indexcache.kernels.lightning_indexer.indexer_quantization import quantized_rows
from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer
from indexcache.kernels.norm_rope_linear import absorbed_vector, rms_norm, rotary, vector_linear
from indexcache.kernels.norm_rope_linear.index_keys import index_key_rows
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla

pytestmark = [
    pytest.mark.gpus,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# Latents of 512 + 64 entries and 32 index heads of 128: what the Hopper kernels take.
WIDTH, VALUE = 576, 512


class Inputs:
    """Random tensors, the same ones wherever they are asked for: drawn on the CPU, in bf16 unless told otherwise."""

    def __init__(self, device, dtype=torch.bfloat16):
        self.device, self.dtype, self.draw = device, dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape, dtype=None):
        drawn = torch.randn(shape, generator=self.draw).bfloat16()
        return drawn.to(device=self.device, dtype=dtype or self.dtype)

    def integers(self, low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=self.draw).to(self.device, dtype)

    def selection(self, batch, queries, keys, topk):
        """Distinct ascending slots, int32, the last few of every other row missing."""
        drawn = torch.rand(batch, queries, keys, generator=self.draw).argsort(-1)[..., :topk].sort(-1).values
        drawn[:, ::2, -3:] = -1
        return drawn.int().to(self.device)


def indexer(queries):
    def run(new, reference):
        q, k, weights = new(1, queries, 32, 128), new(1, 9000, 128), new(1, queries, 32, dtype=torch.float32)
        return lightning_indexer(q, k, weights, 2048, allow_triton=not reference)

    return run


def indexer_e4m3(new, reference):
    q, k, weights = new(1, 3, 32, 128), new(1, 9000, 128), new(1, 3, 32, dtype=torch.float32)
    return lightning_indexer(q, k, weights, 2048, fp8=True, allow_triton=not reference)


def attention(queries, heads):
    def run(new, reference):
        q, kv, indices = new(1, queries, heads, WIDTH), new(1, 900, WIDTH), new.selection(1, queries, 900, 300)
        return sparse_mla(q, kv, indices, scale=0.06, value_dim=VALUE, allow_triton=not reference)

    return run


def attention_by_merged_lists(new, reference):
    q, kv, indices = new(1, 300, 20, WIDTH), new(1, 900, WIDTH), new.selection(1, 300, 900, 300)
    if reference:
        return sparse_mla(q, kv, indices, scale=0.06, value_dim=VALUE)
    merged = MergedSelection.empty(1, 300, 300, 3, q.device)
    merged.fill(0, indices, 900)
    return sparse_mla(q, kv, merged, scale=0.06, value_dim=VALUE)


def attention_gradients(heads):
    def run(new, reference):
        q, kv = new(1, 40, heads, WIDTH).requires_grad_(), new(1, 900, WIDTH).requires_grad_()
        indices, upstream = new.selection(1, 40, 900, 300), new(1, 40, heads, VALUE)
        out, _ = sparse_mla(q, kv, indices, scale=0.06, value_dim=VALUE, allow_triton=not reference)
        return torch.autograd.grad(out, (q, kv), upstream)

    return run


def index_inputs(new):
    return new(1, 40, 32, 128), new(1, 900, 128), new(1, 40, 32, dtype=torch.float32)


def scores(new, reference):
    return selected_index_scores(*index_inputs(new), new.selection(1, 40, 900, 64), allow_triton=not reference)


def probabilities(new, reference):
    q, kv, indices = new(1, 40, 20, WIDTH), new(1, 900, WIDTH), new.selection(1, 40, 900, 64)
    lse = attention_lse(q, kv, scale=0.06, allow_triton=not reference)
    return lse, selected_attention(q, kv, lse, indices, scale=0.06, allow_triton=not reference)


def sparse_kl(new, reference):
    inputs = [x.requires_grad_() for x in index_inputs(new)]
    indices, target = new.selection(1, 40, 900, 64), new(1, 40, 64, dtype=torch.float32).abs()
    kl = indexer_kl(*inputs, indices, target, scale=0.01, allow_triton=not reference)
    return kl, *torch.autograd.grad(kl.sum(), inputs)


def dense_kl(new, reference):
    inputs = [x.requires_grad_() for x in index_inputs(new)]
    q, kv = new(1, 40, 20, WIDTH), new(1, 900, WIDTH)
    kl = dense_indexer_kl(*inputs, q, kv, scale=0.01, attn_scale=0.06, allow_triton=not reference)
    return kl, *torch.autograd.grad(kl.sum(), inputs)


def norms(new, reference):
    x, weight, angles = new(1, 5, 576), new(512), (new(1, 5, 64), new(1, 5, 64))
    rows = rms_norm.latent_rows(x, weight, 1e-6, *angles, True, allow_triton=not reference)
    return rms_norm.rms_norm(x[..., :512], weight, 1e-6, allow_triton=not reference), rows


def turned(new, reference):
    x, out, angles = new(1, 5, 4, 64), new(1, 5, 4, 64), (new(1, 5, 64), new(1, 5, 64))
    rotary.rotate_into(out, x, *angles, True, allow_triton=not reference)
    return out


def keys(new, reference):
    k, weight, bias, angles = new(1, 5, 128), new(128), new(128), (new(1, 5, 64), new(1, 5, 64))
    return index_key_rows(k, weight, bias, 1e-6, *angles, True, allow_triton=not reference)


def keys_in_e4m3(new, reference):
    return quantized_rows(new(300, 128), allow_triton=not reference)


def routing(tokens):
    def run(new, reference):
        x, weight, bias = new(tokens, 256), new(64, 256), new(64, dtype=torch.float32)
        logits, weights, experts = expert_topk.expert_topk(x, weight, bias, 4, allow_triton=not reference)
        return logits, torch.zeros_like(logits).scatter(1, experts, weights)

    return run


def mixture(tokens):
    def run(new, reference):
        x, weights = new(tokens, 256), new(tokens, 4, dtype=torch.float32)
        experts = new.integers(0, 8, tokens, 4)
        matrices = new(8, 128, 256) / 16, new(8, 256, 64) / 8
        shared = new(64, 256) / 16, new(64, 256) / 16, new(256, 64) / 8
        run = routed_experts.routed_experts_reference if reference else routed_experts.routed_experts
        return run(x, experts, weights, *matrices, shared=shared)

    return run


def linears(new, reference):
    x, weights, norm = new(1, 512), [new(100, 512) / 16, new(36, 512) / 16], new(512)
    run = vector_linear.vector_linear_reference if reference else vector_linear.vector_linear
    wide = x.to(new.dtype) @ weights[0].T if reference else vector_linear.wide_vector_linear(x, weights[0], 1.0)
    return run(x, weights, norm, 1e-6), wide


def absorbed(new, reference):
    q, to_latent, to_value = new(1, 1, 20, 256), new(20, 192, 512) / 16, new(20, 256, 512) / 16
    angles = new(1, 1, 64), new(1, 1, 64)
    absorb = absorbed_vector.absorb_queries_reference if reference else absorbed_vector.absorb_queries
    return absorb(q, to_latent, *angles, True), absorbed_vector.expand_values(new(1, 1, 20, 512), to_value)


OPERATIONS = {
    "lightning_indexer, a prefill": indexer(1200),
    "lightning_indexer, a step": indexer(1),
    "lightning_indexer, e4m3": indexer_e4m3,
    "sparse_mla, groups": attention(300, 20),
    "sparse_mla, many heads": attention(300, 64),
    "sparse_mla, a step": attention(1, 20),
    "sparse_mla, merged lists": attention_by_merged_lists,
    "sparse_mla, gradients": attention_gradients(20),
    "sparse_mla, gradients, many heads": attention_gradients(64),
    "selected_index_scores": scores,
    "attention_lse and selected_attention": probabilities,
    "indexer_kl": sparse_kl,
    "dense_indexer_kl": dense_kl,
    "rms_norm and latent_rows": norms,
    "rotate_into": turned,
    "index_key_rows": keys,
    "quantized_rows": keys_in_e4m3,
    "expert_topk, a step": routing(1),
    "expert_topk, many tokens": routing(700),
    "routed_experts, a step": mixture(1),
    "routed_experts, many tokens": mixture(700),
    "vector_linear": linears,
    "absorb_queries and expand_values": absorbed,
}
# Summed by atomics, in an order that changes from run to run.
IN_ANY_ORDER = ("sparse_mla, gradients", "sparse_mla, gradients, many heads", "indexer_kl")


def marked(selection):
    """Which of 9,000 keys a row of int32 slots lists."""
    marks = torch.zeros(*selection.shape[:-1], 9001, dtype=torch.bool)
    return marks.scatter_(-1, torch.where(selection < 0, 9000, selection).long(), True)[..., :9000]


def as_list(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_device_gives_what_the_first_and_the_reference_give(name):
    run = OPERATIONS[name]
    with torch.cuda.device(0):
        got = as_list(run(Inputs("cuda:1"), False))
        torch.cuda.synchronize(1)
        assert torch.cuda.current_device() == 0
        first = as_list(run(Inputs("cuda:0"), False))
    want = as_list(run(Inputs("cpu", torch.float64), True))
    if name == "expert_topk, many tokens":
        # Scores that nearly tie are chosen otherwise in fp64: those rows are compared between the devices alone.
        assert torch.equal(got[1].cpu(), first[1].cpu())
        same = ((got[1].cpu() > 0) == (want[1] > 0)).all(-1)
        assert same.float().mean() >= 0.98
        got, first, want = ([values[0], values[1][same.to(values[1].device)]] for values in (got, first, want))
    for one, other, reference in zip(got, first, want, strict=True):
        assert one.device == torch.device("cuda:1")
        if not one.is_floating_point():
            assert torch.equal(one.cpu(), other.cpu())
            # Index scores that nearly tie are chosen otherwise in fp64.
            found, wanted = marked(one.cpu()), marked(reference)
            assert (found & wanted).sum() >= 0.95 * wanted.sum()
            continue
        if name not in IN_ANY_ORDER:
            assert torch.equal(one.cpu(), other.cpu())
        finite = reference.isfinite()
        assert torch.equal(finite, one.cpu().isfinite())
        error = (one.cpu().double() - reference.double())[finite].norm()
        assert error <= 0.03 * reference.double()[finite].norm()


def test_a_step_is_recorded_and_replayed_on_the_second_device():
    new = Inputs("cuda:1")
    with torch.cuda.device(0):
        q, kv, indices = new(1, 1, 20, WIDTH), new(1, 900, WIDTH), new.selection(1, 1, 900, 300)
        weight = new(WIDTH)

        def step():
            with early_launches(q.device):
                normed = rms_norm.rms_norm(q, weight, 1e-6)
                return sparse_mla(normed, kv, indices, scale=0.06, value_dim=VALUE)[0]

        with torch.cuda.device(1):
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                step()
            torch.cuda.synchronize(1)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded = step()
        q.copy_(new(1, 1, 20, WIDTH))
        with torch.cuda.device(1):
            graph.replay()
        torch.cuda.synchronize(1)
        assert torch.equal(recorded, step())


def test_layers_on_both_devices_in_one_backward_pass():
    """As `device_map` places them; the engine runs each device's part in a thread of its own."""
    with torch.cuda.device(0):
        gradients = []
        for devices in (("cuda:0", "cuda:1"), ("cuda:0", "cuda:0")):
            new = Inputs(devices[0])
            q, kv, indices = new(1, 40, 20, WIDTH), new(1, 900, WIDTH), new.selection(1, 40, 900, 300)
            q.requires_grad_()
            hidden = q
            for device in devices:
                out, _ = sparse_mla(hidden.to(device), kv.to(device), indices.to(device), scale=0.06, value_dim=VALUE)
                hidden = torch.cat((out, hidden.to(device)[..., VALUE:]), dim=-1)
            (gradient,) = torch.autograd.grad(hidden.float().pow(2).sum(), q)
            gradients.append(gradient)
    assert torch.equal(*gradients)
