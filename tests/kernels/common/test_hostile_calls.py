"""Every public operation refuses arguments that do not fit, in its own words, and takes what it says it takes.

Each operation is described by the letters of its tensors' shapes. A letter that two of them share must be equal in
both, so that changing one axis is hostile; what only one tensor has is free.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from indexcache.kernels.experts.expert_topk import expert_topk, normed_expert_topk
from indexcache.kernels.experts.routed_experts import routed_experts
from indexcache.kernels.indexer_distillation.indexer_distillation import (
    attention_lse,
    dense_indexer_kl,
    indexer_kl,
    selected_attention,
    selected_index_scores,
)
from indexcache.kernels.lightning_indexer.indexer_quantization import quantize_for_scoring, quantized_rows
from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer
from indexcache.kernels.norm_rope_linear.absorbed_vector import absorb_queries, expand_values
from indexcache.kernels.norm_rope_linear.cache_slot import CacheSlot
from indexcache.kernels.norm_rope_linear.index_keys import index_key_rows
from indexcache.kernels.norm_rope_linear.rms_norm import latent_rows, rms_norm
from indexcache.kernels.norm_rope_linear.rotary import rotate, rotate_into, rotate_leading
from indexcache.kernels.norm_rope_linear.vector_linear import vector_linear, wide_vector_linear
from indexcache.kernels.sparse_mla.merged_selection import MergedSelection
from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla

# Y is 2 I; N, C and R are the parts of W, C and R those of Z.
SIZES = {"B": 2, "S": 3, "T": 7, "H": 4, "D": 16, "K": 5, "M": 24, "A": 3, "E": 6, "I": 4, "Y": 8, "J": 5}
SIZES |= {"N": 8, "C": 12, "R": 4, "W": 12, "Z": 16, "V": 10, "O": 9}
INDICES = (torch.int32, 0, SIZES["T"])
EXPERTS = (torch.int64, 0, SIZES["E"])
# Tensors of any number of dimensions.
LEADING_ARE_FREE = [("rms_norm", "x"), ("quantize_for_scoring", "x"), ("quantized_rows", "x")]
LEADING_ARE_FREE += [("rotate", "x"), ("rotate_leading", "x")]
BAD_SCALES = (math.nan, math.inf, "1", None)


class Operation(NamedTuple):
    """A public function with the letters of its tensors, what else it takes, and bad values for that."""

    run: Any
    tensors: dict[str, Any]
    numbers: dict[str, Any] = {}
    bad: dict[str, tuple] = {}
    # Letters that are bound though no second tensor has them: parts of another, or twice the size.
    bound: str = ""
    words: str = ""


def as_pairs(function, *names):
    """`function` with `shared` from three tensors, so that each can be changed alone."""

    def run(**arguments):
        shared = tuple(arguments.pop(name) for name in names)
        return function(**arguments, shared=shared)

    return run


def with_slot(function, name):
    """`function` that writes to a slot of the tensors `rows` and `position`."""

    def run(**arguments):
        slot = CacheSlot(arguments.pop("rows"), arguments.pop("position"))
        return function(**arguments, slot=slot)

    return run


INDEXER = {"q": "BSHD", "k": "BTD", "weights": "BSH"}
SELECTED = {"indices": ("BSK", *INDICES)}
VISIBLE = {"key_start": ("BS", torch.int32, 0, 1), "key_mask": ("BT", torch.bool, 0, 2)}
ANGLES = {"cos": "BSR", "sin": "BSR"}
ROUTED = {"x": "OD", "experts": ("OK", *EXPERTS), "weights": "OK", "gate_up": "EYD", "down": "EDI"}
OPERATIONS = {
    "lightning_indexer": Operation(
        lightning_indexer,
        INDEXER | VISIBLE,
        {"topk": 3, "scale": 0.3, "query_start": 4},
        {
            "topk": (0, -1, 2.5, "3", None, True),
            "scale": (math.nan, math.inf, "1", 0.0, -0.3),
            "query_start": (
                2**31,
                1.5,
                "4",
                torch.zeros(3, dtype=torch.int64),
                torch.zeros(2),
                torch.zeros(2, 1).int(),
            ),
        },
    ),
    "sparse_mla": Operation(
        sparse_mla,
        {"q": "BSHM", "kv": "BTM"} | SELECTED,
        {"scale": 0.3, "value_dim": 16},
        {"scale": BAD_SCALES, "value_dim": (0, -1, 25, 8.0, None)},
    ),
    "selected_index_scores": Operation(
        selected_index_scores, INDEXER | SELECTED, {"scale": 0.3}, {"scale": (math.nan, math.inf, "1", 0.0, -0.3)}
    ),
    "selected_attention": Operation(
        selected_attention,
        {"q": "BSHM", "kv": "BTM", "lse": "BSH"} | SELECTED,
        {"scale": 0.3},
        {"scale": BAD_SCALES},
    ),
    "indexer_kl": Operation(
        indexer_kl,
        INDEXER | SELECTED | {"target": "BSK"},
        {"scale": 0.3},
        {"scale": (math.nan, math.inf, "1", 0.0, -0.3)},
    ),
    "attention_lse": Operation(
        attention_lse,
        {"q": "BSHM", "kv": "BTM"} | VISIBLE,
        {"scale": 0.3, "query_start": 4},
        {"scale": BAD_SCALES, "query_start": (2**31, 1.5, torch.zeros(3, dtype=torch.int64), torch.zeros(2))},
    ),
    "dense_indexer_kl": Operation(
        dense_indexer_kl,
        INDEXER | {"q_attn": "BSAM", "kv": "BTM", "attn_lse": "BSA"} | VISIBLE,
        {"scale": 0.3, "attn_scale": 0.2},
        {"scale": (math.nan, math.inf, "1", 0.0, -0.3), "attn_scale": BAD_SCALES, "attn_lse": ([],)},
    ),
    "routed_experts": Operation(
        as_pairs(routed_experts, "gate", "up", "shared_down"),
        ROUTED | {"gate": "JD", "up": "JD", "shared_down": "DJ", "accumulate": "OD"},
        bound="YI",
    ),
    "expert_topk": Operation(
        expert_topk,
        {"x": "OD", "weight": "ED", "bias": "E"},
        {"k": 2, "groups": 3, "topk_groups": 2},
        {"k": (0, 7, 1.5, None), "groups": (4, 7), "topk_groups": (0, 4)},
    ),
    "normed_expert_topk": Operation(
        normed_expert_topk,
        {"x": "OD", "norm": "D", "weight": "ED", "bias": "E"},
        {"k": 2, "eps": 1e-6},
        {"k": (0, 7, 1.5, None)},
    ),
    "rms_norm": Operation(rms_norm, {"x": "BSD", "weight": "D"}, {"eps": 1e-6}),
    "latent_rows": Operation(
        with_slot(latent_rows, "kv"),
        {"kv": "BSZ", "weight": "C", "rows": "BTZ", "position": ("1", torch.int64, 0, 1)} | ANGLES,
        {"eps": 1e-6, "interleaved": True},
        bound="CRZ1",
    ),
    "index_key_rows": Operation(
        with_slot(index_key_rows, "k"),
        {"k": "BSD", "weight": "D", "bias": "D", "rows": "BTD", "position": ("1", torch.int64, 0, 1)} | ANGLES,
        {"eps": 1e-6, "interleaved": False},
        bound="1",
    ),
    "rotate": Operation(rotate, {"x": "BSHR"} | ANGLES, {"interleaved": True}),
    "rotate_leading": Operation(rotate_leading, {"x": "BSHD"} | ANGLES, {"interleaved": False}),
    "rotate_into": Operation(rotate_into, {"out": "BSHR", "x": "BSHR"} | ANGLES, {"interleaved": True}),
    "vector_linear": Operation(
        lambda first, second, **more: vector_linear(weights=[first, second], **more),
        {"x": "OD", "first": "ED", "second": "ID", "norm": "D", "base": "OV"},
        {"eps": 1e-6},
        bound="EIV",
    ),
    "wide_vector_linear": Operation(wide_vector_linear, {"x": "OD", "weight": "ED"}, {"scale": 0.5}),
    "absorb_queries": Operation(
        absorb_queries, {"q": "BSHW", "to_latent": "HNC"} | ANGLES, {"interleaved": True}, bound="WNR"
    ),
    "expand_values": Operation(expand_values, {"latent_out": "BSHC", "to_value": "HVC"}),
    "quantize_for_scoring": Operation(quantize_for_scoring, {"x": "D"}),
    "quantized_rows": Operation(quantized_rows, {"x": "D"}, words="quantize_for_scoring"),
}


def drawn(entry, sizes=SIZES):
    letters, dtype, low, high = (entry, torch.float32, None, None) if isinstance(entry, str) else entry
    shape = [1 if letter == "1" else sizes[letter] for letter in letters]
    draw = torch.Generator().manual_seed(len(letters))
    if low is None:
        return torch.randn(shape, generator=draw, dtype=dtype)
    return torch.randint(low, max(low + 1, high), shape, generator=draw).to(dtype)


def good_arguments(operation, sizes=SIZES):
    tensors = {name: drawn(entry, sizes) for name, entry in operation.tensors.items()}
    if "target" in tensors:
        tensors["target"].abs_()
    return tensors | operation.numbers


def letters_of(entry):
    return entry if isinstance(entry, str) else entry[0]


def hostile():
    """(operation, argument, what is wrong, change), for every tensor and number of every operation."""
    for name, operation in OPERATIONS.items():
        shared = Counter(letter for entry in operation.tensors.values() for letter in letters_of(entry))
        for argument, entry in operation.tensors.items():
            letters = letters_of(entry)
            for axis, letter in enumerate(letters):
                if shared[letter] < 2 and letter not in operation.bound:
                    continue
                wider = lambda x, axis=axis: torch.cat((x, x.narrow(axis, 0, 1)), axis)
                yield name, argument, f"{letter} one more", wider
                if letter != "1":
                    yield name, argument, f"{letter} of 1", lambda x, axis=axis: x.narrow(axis, 0, 1)
            if (name, argument) not in LEADING_ARE_FREE:
                yield name, argument, "a dimension more", lambda x: x.unsqueeze(0)
            yield name, argument, "a number", lambda x: x.flatten()[0]
            yield name, argument, "complex", lambda x: x.to(torch.complex64)
            other = torch.int64 if isinstance(entry, str) else torch.float32
            yield name, argument, str(other), lambda x, other=other: x.to(other)
            if len(operation.tensors) > 1:
                yield name, argument, "on another device", lambda x: x.to("meta")
            yield name, argument, "a list", lambda x: x.tolist()
        for argument, values in operation.bad.items():
            for value in values:
                yield name, argument, repr(value), lambda _, value=value: value
        for argument, least in (("indices", -1), ("experts", 0)):
            if argument in operation.tensors:
                limit = operation.tensors[argument][3]
                for value in (least - 1, limit, limit + 1, 2**31 - 1):
                    yield name, argument, f"an entry of {value}", lambda x, value=value: with_entry(x, value)


def with_entry(x, value):
    x = x.clone()
    x[0, 1] = value
    return x


CASES = list(hostile())


def test_there_are_enough_hostile_calls():
    assert len(CASES) > 400 and {case[0] for case in CASES} == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_fits_is_taken(name):
    OPERATIONS[name].run(**good_arguments(OPERATIONS[name]))


@pytest.mark.parametrize(
    ("name", "argument", "change"), [pytest.param(n, a, c, id=f"{n}-{a}-{wrong}") for n, a, wrong, c in CASES]
)
def test_what_does_not_fit_is_refused_in_the_operations_own_words(name, argument, change):
    operation = OPERATIONS[name]
    arguments = good_arguments(operation)
    arguments[argument] = change(arguments.get(argument))
    with pytest.raises((ValueError, TypeError, IndexError)) as refusal:
        operation.run(**arguments)
    assert str(refusal.value).startswith((operation.words or name) + ":")


@pytest.mark.parametrize(("value", "row"), [(7, 0), (7, 1), (-2, 0), (100, 1)])
@pytest.mark.parametrize("name", ["sparse_mla", "selected_index_scores", "selected_attention", "indexer_kl"])
def test_a_slot_that_there_is_not_is_named_with_its_place(name, value, row):
    operation = OPERATIONS[name]
    arguments = good_arguments(operation)
    arguments["indices"][row, 2, 3] = value
    with pytest.raises(IndexError, match=rf"indices\[{row}, 2, 3\] is {value}, but there are 7 slots"):
        operation.run(**arguments)


@pytest.mark.parametrize("name", ["sparse_mla", "selected_index_scores", "selected_attention", "indexer_kl"])
def test_where_nobody_looks_a_slot_that_there_is_not_counts_as_none(name, monkeypatch):
    """As in the kernels, and inside `torch.compile`: it never reads another row's keys."""
    operation = OPERATIONS[name]
    arguments = good_arguments(operation)
    none, outside = arguments["indices"].clone(), arguments["indices"].clone()
    none[0, 1, 2:4], outside[0, 1, 2], outside[0, 1, 3] = -1, 7, 2**31 - 1
    want = operation.run(**arguments | {"indices": none})
    monkeypatch.setattr("indexcache.kernels.common.argument_checks._check_values", lambda *_: None)
    got = operation.run(**arguments | {"indices": outside})
    for one, other in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, want))):
        assert torch.equal(one, other)


def empty(name, **sizes):
    operation = OPERATIONS[name]
    arguments = good_arguments(operation, SIZES | sizes)
    if "indices" in arguments and sizes.get("T") == 0:
        arguments["indices"].fill_(-1)
    result = operation.run(**arguments)
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("letter", ["B", "S", "T", "K"])
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("sparse_mla", ["BSH*", "BSH"]),
        ("selected_index_scores", ["BSK"]),
        ("selected_attention", ["BSK"]),
        ("indexer_kl", ["BS"]),
        ("attention_lse", ["BSH"]),
        ("dense_indexer_kl", ["BS"]),
        ("lightning_indexer", ["BS."]),
    ],
)
def test_nothing_in_nothing_out(name, shapes, letter):
    sizes = SIZES | {letter: 0}
    results = empty(name, **{letter: 0})
    width = {"*": 16, ".": min(3, sizes["T"])}
    for result, letters in zip(results, shapes, strict=True):
        assert result.shape == tuple(width.get(x, sizes.get(x)) for x in letters)
        assert not result.isnan().any()
    if name == "sparse_mla" and letter in "TK":
        assert (results[0] == 0).all() and (results[1] == -math.inf).all()
    if name == "selected_attention" and letter == "T":
        assert (results[0] == 0).all()
    if name == "indexer_kl" or (name == "dense_indexer_kl" and letter != "K"):
        assert (results[0] == 0).all()


@pytest.mark.parametrize("letter", ["B", "S", "T", "K"])
@pytest.mark.parametrize("name", ["sparse_mla", "selected_index_scores", "indexer_kl"])
def test_nothing_has_a_gradient_of_nothing(name, letter):
    operation = OPERATIONS[name]
    arguments = good_arguments(operation, SIZES | {letter: 0})
    if "indices" in arguments and letter == "T":
        arguments["indices"].fill_(-1)
    wanted = [arguments[n].requires_grad_() for n in ("q", "k" if "k" in arguments else "kv")]
    if name == "sparse_mla":
        result = operation.run(**arguments)[0]
    else:
        result = operation.run(**arguments)
    finite = torch.where(result.isfinite(), result, 0.0)
    for gradient, x in zip(torch.autograd.grad(finite.sum(), wanted, allow_unused=True), wanted):
        assert gradient is None or (gradient.shape == x.shape and (gradient == 0).all())


@pytest.mark.parametrize("name", ["lightning_indexer", "sparse_mla", "selected_index_scores", "dense_indexer_kl"])
@pytest.mark.parametrize("letter", ["H", "D", "M", "A"])
def test_no_heads_and_no_columns_are_refused(name, letter):
    operation = OPERATIONS[name]
    if not any(letter in letters_of(entry) for entry in operation.tensors.values()):
        pytest.skip("has no such dimension")
    with pytest.raises(ValueError, match=rf"^{name}: .* must (have a head and a column|be)"):
        operation.run(**good_arguments(operation, SIZES | {letter: 0}))


@pytest.mark.parametrize("name", ["routed_experts", "expert_topk", "rms_norm", "vector_linear", "rotate_into"])
def test_no_tokens_are_taken(name):
    for letter in "OBS":
        OPERATIONS[name].run(**good_arguments(OPERATIONS[name], SIZES | {letter: 0}))


def test_merged_selections_are_refused_where_no_kernel_runs():
    q, kv = torch.randn(1, 4, 2, 24), torch.randn(1, 9, 24)
    merged = MergedSelection.empty(1, 4, 3, 2, q.device)
    with pytest.raises(ValueError, match="merged selections are for the Triton kernels, and q is on cpu"):
        sparse_mla(q, kv, merged, scale=1.0, value_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_operations_of_a_step_run_on_a_cpu(dtype):
    """They have one meaning everywhere."""
    x, weight, norm, bias = torch.randn(2, 16), torch.randn(6, 16), torch.randn(16), torch.randn(6)
    x, norm = x.to(dtype), norm.to(dtype)
    wide = wide_vector_linear(x, weight, 0.5)
    assert wide.dtype == torch.float32 and torch.equal(wide, x.float() @ weight.T * 0.5)
    normed, weights, experts = normed_expert_topk(x, norm, 1e-6, weight.to(dtype), bias, 2)
    assert torch.equal(normed, rms_norm(x, norm, 1e-6))
    for got, want in zip((weights, experts), expert_topk(normed, weight.to(dtype), bias, 2)[1:]):
        assert torch.equal(got, want)
