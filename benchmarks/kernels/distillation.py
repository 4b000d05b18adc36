"""Benchmark of training kernels: sparse MLA backward, the KL kernels, and their share of a layer's training step.

python -m indexcache.benchmarks.kernels.distillation --output benchmarks/results/distillation.json

Useful operations of the sparse MLA backward are five products a query, head and selected key:
`2 * heads * 2048 * (3 * 576 + 2 * 512)` a query. Index sets as in `benchmarks/kernels/sparse_mla.py`. The layer is one
MoE layer of the 30B shape (`benchmarks/bench/speed_models.py`) with 16 experts, forward and backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import IndexCacheConfig, IndexCacheForCausalLM
from ...kernels.indexer_distillation.indexer_distillation import dense_indexer_kl, indexer_kl, selected_attention
from ...kernels.sparse_mla.sparse_mla import sparse_mla
from ..bench.speed_models import SHAPE_30B, let_neighbours_agree
from ..kernels.harness import Case, measure_ceilings, median_ms, run_cases, write_json
from ..kernels.sparse_mla import SCALE, TOPK, VALUE_DIM, WIDTH, make_inputs, near_indices, random_indices

INDEX_HEADS, INDEX_DIM, HEADS = 32, 128, 20
Indices = Callable[[int, int], torch.Tensor]
INDEX_SETS: dict[str, Indices] = {"near": near_indices, "rand": random_indices}


def backward_inputs(S: int, T: int, H: int, indices: Indices) -> tuple:
    """Leaf q and kv, the indices, the results of the forward pass and an upstream gradient."""
    q, kv, index = make_inputs(1, S, T, H, indices)
    q.requires_grad_()
    kv.requires_grad_()
    out, lse = sparse_mla(q, kv, index, scale=SCALE, value_dim=VALUE_DIM)
    return q, kv, index, out, lse, torch.randn_like(out)


def backward(q, kv, index, out, lse, grad_out) -> tuple[torch.Tensor, ...]:
    """The function timed: gradients of q and kv."""
    return torch.autograd.grad(out, (q, kv), grad_out, retain_graph=True)


def deterministic_backward(*inputs) -> tuple[torch.Tensor, ...]:
    """As `backward`, with the latents' gradients added in a fixed order."""
    torch.use_deterministic_algorithms(True)
    try:
        return backward(*inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def wrong_gradients(inputs: tuple, run: Callable[..., tuple], rows: int = 16, slots: int = 8) -> str | None:
    """What is wrong with some queries' and some latents' gradients, judged in fp64 against P and dS in bf16."""
    q, kv, index, out, lse, grad_out = (x.detach()[0] for x in inputs)
    grad_q, grad_kv = (x[0] for x in run(*inputs))
    delta = (grad_out.double() * out.double()).sum(-1)

    def score_gradients(queries: torch.Tensor, keys: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """P and dS `[n, H, K]` of queries and their keys `[n, K, 576]`: exact, and rounded to bf16."""
        keys = keys.double().transpose(1, 2)
        p = (q[queries].double() @ keys * SCALE - lse[queries].double().unsqueeze(-1)).exp()
        dp = grad_out[queries].double() @ keys[:, :VALUE_DIM]
        ds = p * (dp - delta[queries].unsqueeze(-1)) * SCALE
        return [(p, ds), (p.bfloat16().double(), ds.bfloat16().double())]

    def of_queries(p: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        return ds @ keys.double()

    def of_slot(p: torch.Tensor, ds: torch.Tensor) -> torch.Tensor:
        found = (ds.transpose(1, 2) @ q[queries].double()).sum((0, 1))
        found[:VALUE_DIM] += (p.transpose(1, 2) @ grad_out[queries].double()).sum((0, 1))
        return found

    queries = torch.randperm(q.shape[0], device="cuda")[:rows]
    keys = kv[index[queries].long()]
    checks = [("queries", grad_q[queries], [of_queries(*one) for one in score_gradients(queries, keys)])]
    for slot in index[queries[0]][:: TOPK // slots].long():
        queries = (index == slot).any(-1).nonzero().squeeze(-1)
        both = score_gradients(queries, kv[slot].expand(len(queries), 1, -1))
        checks.append((f"latent {slot}", grad_kv[slot], [of_slot(*one) for one in both]))
    for name, ours, (exact, plain) in checks:
        # Ours is rounded to bf16 at the end as well.
        error, allowed = (ours - exact).norm() / exact.norm(), 1.5 * (plain.bfloat16() - exact).norm() / exact.norm()
        if not error <= allowed:
            return f"gradient of {name}: error {error:.2e} above 1.5x that of bf16 P and dS, {allowed:.2e}"
    return None


def indexer_inputs(S: int, T: int, indices: Indices) -> tuple:
    """Leaf index queries, keys and head weights, the indices and a target."""
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q, k, weights = draw(1, S, INDEX_HEADS, INDEX_DIM), draw(1, T, INDEX_DIM), draw(1, S, INDEX_HEADS) * 0.2
    target = torch.rand(1, S, TOPK, device="cuda") ** 4
    inputs = [x.requires_grad_() for x in (q, k, weights)]
    return *inputs, indices(S, T).view(1, S, TOPK), target


def kl(q, k, weights, index, target) -> torch.Tensor:
    """KL alone, without what its gradient needs."""
    with torch.no_grad():
        return indexer_kl(q, k, weights, index, target)


def kl_step(q, k, weights, index, target) -> tuple[torch.Tensor, ...]:
    """KL and its gradients."""
    return torch.autograd.grad(indexer_kl(q, k, weights, index, target).sum(), (q, k, weights))


def wrong_kl(inputs: tuple, rows: int = 16) -> str | None:
    """What is wrong with the KL and gradients of some queries, judged in fp64."""
    q, k, weights, index, target = inputs
    some = torch.randperm(q.shape[1], device="cuda")[:rows]
    loss = indexer_kl(q, k, weights, index, target)[:, some]
    exact = [x.detach().double().requires_grad_() for x in (q[:, some], k, weights[:, some])]
    right = indexer_kl(*exact, index[:, some], target[:, some].double(), allow_triton=False)
    ours = torch.autograd.grad(loss.sum(), (q, k, weights))
    return _difference(loss, (ours[0][:, some], ours[1], ours[2][:, some]), right, exact)


def wrong_dense_kl(inputs: tuple, rows: int = 16) -> str | None:
    """What is wrong with the dense KL and gradients of the last queries, judged in fp64."""
    q, k, weights, q_attn, kv = inputs
    loss = dense_indexer_kl(*inputs, attn_scale=SCALE)[:, -rows:]
    exact = [x.detach().double().requires_grad_() for x in (q[:, -rows:], k, weights[:, -rows:])]
    layers = [x[:, -rows:].double() for x in q_attn], [x.double() for x in kv]
    right = dense_indexer_kl(*exact, *layers, attn_scale=SCALE, allow_triton=False)
    ours = torch.autograd.grad(loss.sum(), (q, k, weights))
    return _difference(loss, (ours[0][:, -rows:], ours[1], ours[2][:, -rows:]), right, exact)


def _difference(loss: torch.Tensor, gradients: tuple, right: torch.Tensor, inputs: list[torch.Tensor]) -> str | None:
    if not (error := (loss - right).abs().max()) <= 1e-2 * right.mean():
        return f"KL is off by {error:.1e} of {right.mean():.3f}"
    for name, one, other in zip(("q", "k", "weights"), gradients, torch.autograd.grad(right.sum(), inputs)):
        if not (error := (one - other).norm() / other.norm()) <= 1e-2:
            return f"gradient of {name} is off by {error:.1e}"
    return None


def teacher_inputs(S: int, T: int, H: int, indices: Indices) -> tuple:
    """Absorbed queries, latents, lse and indices."""
    q, kv, index = make_inputs(1, S, T, H, indices)
    return q, kv, sparse_mla(q, kv, index, scale=SCALE, value_dim=VALUE_DIM)[1], index


def teacher(q, kv, lse, index) -> torch.Tensor:
    """Head-mean attention of the selected keys."""
    return selected_attention(q, kv, lse, index, scale=SCALE)


def wrong_teacher(inputs: tuple) -> str | None:
    """None if every row of probabilities sums to 1."""
    error = (teacher(*inputs).sum(-1) - 1).abs().max()
    return None if error < 1e-3 else f"rows sum to 1 with an error of {error:.1e}"


def dense_inputs(S: int, layers: int) -> tuple:
    """Leaf index inputs, and absorbed queries and latents of the served layers."""
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    shapes = (1, S, INDEX_HEADS, INDEX_DIM), (1, S, INDEX_DIM), (1, S, INDEX_HEADS)
    inputs = [(0.3 * draw(*shape)).requires_grad_() for shape in shapes]
    return *inputs, [draw(1, S, HEADS, WIDTH) for _ in range(layers)], [draw(1, S, WIDTH) for _ in range(layers)]


def dense_step(q, k, weights, q_attn, kv) -> tuple[torch.Tensor, ...]:
    """Dense KL and its gradients, lse of the attention included."""
    loss = dense_indexer_kl(q, k, weights, q_attn, kv, attn_scale=SCALE).sum()
    return torch.autograd.grad(loss, (q, k, weights))


def backward_case(T: int, name: str, H: int, deterministic: bool = False, S: int = 4096) -> Case:
    """Sparse MLA backward of `S` queries over `T` latents."""
    run = deterministic_backward if deterministic else backward
    return Case(
        f"backward{' deterministic' if deterministic else ''} S={S} L={T} {name} H={H}",
        partial(backward_inputs, S, T, H, INDEX_SETS[name]),
        run,
        partial(wrong_gradients, run=run),
        flops=2.0 * H * TOPK * (3 * WIDTH + 2 * VALUE_DIM) * S,
        copies=1,
        info={"H": H, "L": T, "indices": name},
    )


def kl_cases(S: int, name: str) -> list[Case]:
    """The sparse KL and its teacher over `S` queries and keys."""
    inputs = partial(indexer_inputs, S, S, INDEX_SETS[name])
    attention = partial(teacher_inputs, S, S, HEADS, INDEX_SETS[name])
    flops = 2.0 * TOPK * S
    return [
        Case(f"indexer KL S=L={S} {name}", inputs, kl, flops=flops * INDEX_HEADS * INDEX_DIM, copies=1),
        # Scores forward and again backward, two products for the gradients.
        Case(
            f"indexer KL and gradients S=L={S} {name}", inputs, kl_step, wrong_kl, 4 * flops * INDEX_HEADS * INDEX_DIM
        ),
        Case(f"selected attention S=L={S} {name}", attention, teacher, wrong_teacher, flops=flops * HEADS * WIDTH),
    ]


def dense_case(S: int, layers: int) -> Case:
    """The dense KL of a causal sequence: per pair three attention products a served layer and five index products."""
    attention, index = 3 * layers * 2.0 * HEADS * WIDTH, 5 * 2.0 * INDEX_HEADS * INDEX_DIM
    flops = S * (S + 1) / 2 * (attention + index)
    name = f"dense KL and gradients S={S} served layers={layers}"
    return Case(name, partial(dense_inputs, S, layers), dense_step, wrong_dense_kl, flops=flops, copies=1)


def cases() -> list[Case]:
    """Backward by heads, cache length and index set; KL kernels by index set; the dense loss by length."""
    found = [backward_case(8192, "rand", H) for H in (64, 128, 20)]
    found += [backward_case(8192, "near", H) for H in (20, 64, 128)]
    found += kl_cases(32768, "near")
    found += [dense_case(8192, 1)]
    found += [backward_case(T, name, H) for T, name in ((65536, "rand"), (200_000, "near")) for H in (20, 64, 128)]
    found += [backward_case(8192, name, H, deterministic=True) for name in INDEX_SETS for H in (64, 20)]
    found += kl_cases(32768, "rand")
    found += [dense_case(32768, 1), dense_case(8192, 4)]
    return found


def layer_share(length: int) -> dict[str, Any]:
    """A layer's forward and backward beside the KL kernels on that layer's own selection."""
    torch.manual_seed(0)
    config = IndexCacheConfig(
        **{
            **SHAPE_30B,
            "n_routed_experts": 16,
            "num_hidden_layers": 1,
            "first_k_dense_replace": 0,
            "vocab_size": length,
        }
    )
    with torch.device("cuda"):
        model = IndexCacheForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    let_neighbours_agree(model)
    embeddings = model.get_input_embeddings().weight.detach().unsqueeze(0).clone().requires_grad_()
    upstream = torch.randn_like(embeddings)
    kept: dict[str, torch.Tensor] = {}
    indexer = model.model.layers[0].self_attn.indexer
    hook = indexer.register_forward_hook(lambda module, inputs, output: kept.update(indices=output))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state.backward(upstream)

    step()
    hook.remove()
    found: dict[str, Any] = {"name": f"layer step S={length}", "layer_ms": median_ms([step], budget_ms=1000)["ms"]}
    print(found, flush=True)
    model.zero_grad(set_to_none=True)
    chosen = lambda S, T: kept["indices"][0]
    q, kv, lse, index = teacher_inputs(length, length, HEADS, chosen)
    student = indexer_inputs(length, length, chosen)[:3]
    found["teacher_ms"] = median_ms([lambda: teacher(q, kv, lse, index)], budget_ms=300)["ms"]
    target = teacher(q, kv, lse, index)
    found["kl_ms"] = median_ms([lambda: kl_step(*student, index, target)], budget_ms=300)["ms"]
    extra = found["teacher_ms"] + found["kl_ms"]
    found["kl_share_of_step"] = extra / (found["layer_ms"] + extra)
    print(found, flush=True)
    return found


def loss_memory(length: int) -> dict[str, Any]:
    """Peak memory of the losses with their gradients above their inputs, GiB."""
    q, kv, lse, index = teacher_inputs(length, length, HEADS, near_indices)
    student = indexer_inputs(length, length, lambda S, T: index[0])[:3]
    calls = {
        "sparse": lambda: kl_step(*student, index, teacher(q, kv, lse, index)),
        "dense": lambda: dense_step(*student, [q], [kv]),
    }
    found: dict[str, Any] = {"name": f"memory of the losses S={length}"}
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found[f"{name}_peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(found, flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write a JSON here")
    parser.add_argument("--only", nargs="*", default=[""], help="run the cases whose name contains one of these")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 65536], help="tokens of the layer steps")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    ceilings = measure_ceilings()
    print(ceilings, flush=True)
    records: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        """What is measured is written at once: a run that is cut off loses nothing."""
        records.extend(found)
        torch.cuda.empty_cache()
        if options.output:
            write_json(options.output, "python -m indexcache.benchmarks.kernels.distillation", ceilings, records)

    for case in cases():
        if any(part in case.name for part in options.only):
            keep(run_cases([case], ceilings))
    for length in options.lengths:
        keep([layer_share(length)])
        keep([loss_memory(length)])
    return int(any("wrong" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
