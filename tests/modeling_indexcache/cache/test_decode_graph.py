"""Decoding steps from a graph: the same tokens as step by step, and only where nothing is out of the ordinary.

Recording is replaced by running the recorded function at each replay, so that all but CUDA itself runs on a CPU.
"""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from testing.recorded_steps import PATTERN, greedy, is_recorded, steps, without_graphs
from testing.tiny_models import tiny_model
from transformers import DynamicCache, StaticCache

from indexcache.modeling_indexcache import eligibility
from indexcache.modeling_indexcache.cache import decode_graph, growing_cache


@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_same_tokens_and_replays(model, replays, ids, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :8] = 0
    expected = without_graphs(model, ids, attention_mask=mask)
    assert replays == []
    assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    # 23 decoding steps: one makes the buffers, two watch that they stand still, the rest come from one recording.
    assert replays == [[20]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_steps_below_top_k_are_recorded_as_those_above(as_on_a_gpu, replays, ids, monkeypatch, options, padded):
    model = tiny_model(index_share_pattern=PATTERN, index_topk=40)
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :8] = 0
    expected = without_graphs(model, ids, attention_mask=mask, **options)
    # New memory holds NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = greedy(model, ids, attention_mask=mask, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, expected)
    assert sum(count[0] for count in replays) >= 14


def test_a_full_buffer_is_replaced_and_recorded_again(model, replays, ids, monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 8)
    assert torch.equal(greedy(model, ids), without_graphs(model, ids))
    assert len(replays) == 3
    assert all(count[0] for count in replays)


def test_the_cache_shows_every_row_and_may_be_cropped_or_copied(model, replays, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :15], past_key_values=cache)
    steps(model, cache, ids[:, 15:22])
    assert len(replays) == 1
    assert cache.get_seq_length() == 22
    assert [layer.keys.shape[-2] for layer in cache.layers] == [22] * 4
    assert [None if layer.indexer_keys is None else layer.indexer_keys.shape[1] for layer in cache.layers] == [
        22,
        None,
        22,
        None,
    ]
    kept = [layer.keys.clone() for layer in cache.layers]
    views = [layer.keys for layer in cache.layers]
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    deep, loaded = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for other in (twin, deep, loaded):
        got = steps(model, other, ids[:, 22:])
        torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 22:], atol=1e-5, rtol=1e-5)
    cache.crop(-4)
    got = steps(model, cache, ids[:, 18:])
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 18:], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(view, rows) for view, rows in zip(views, kept))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_steps_with_an_e4m3_indexer_are_recorded_too(model, replays, ids, options):
    model.config.indexer_fp8 = True
    expected = without_graphs(model, ids, **options)
    assert torch.equal(greedy(model, ids, **options), expected)
    assert len(replays) == 1


def test_a_graph_of_the_other_indexer_arithmetic_is_never_replayed(model, replays, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        steps(model, cache, ids[:, 20:25])
        assert replays == [[2]]
        model.config.indexer_fp8 = True
        steps(model, cache, ids[:, 25:27])
    assert replays == [[2]]


def test_another_pattern_or_backend_is_never_replayed(model, replays, ids):
    full = tiny_model(index_share_pattern="FFFF")
    cache = DynamicCache(config=full.config)
    with torch.no_grad():
        full(ids[:, :20], past_key_values=cache)
        steps(full, cache, ids[:, 20:25])
        assert replays == [[2]]
        full.set_attn_implementation("eager")
        steps(full, cache, ids[:, 25:27])
        assert replays == [[2]]
        full.set_attn_implementation("sdpa")
        full.set_index_share_pattern("FSFS")
        steps(full, cache, ids[:, 27:30])
    assert replays == [[2], [3]]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_out_of_the_ordinary_runs_step_by_step(model, replays, ids, options):
    greedy(model, ids[:1], **options)
    assert replays == []


def test_hooks_are_never_skipped_but_for_idle_ones_of_transformers(model, replays, ids):
    with torch.no_grad():
        model(ids, output_topk_indices=True)
    greedy(model, ids)
    assert len(replays) == 1
    seen = []
    handle = model.model.layers[1].self_attn.register_forward_hook(lambda *a: seen.append(1))
    greedy(model, ids)
    handle.remove()
    assert len(replays) == 1
    assert len(seen) == 24


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_static_caches_are_recorded_as_they_are(model, replays, ids, options, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :8] = 0
    expected = without_graphs(model, ids, attention_mask=mask)
    got = greedy(model, ids, attention_mask=mask, cache_implementation="static", **options)
    assert torch.equal(got, expected)
    assert replays == [[21]]


def test_a_static_cache_may_be_reset_and_filled_again(model, replays, ids):
    cache = StaticCache(config=model.config, max_cache_len=31)
    with torch.no_grad():
        expected = model(ids).logits
        for first in (20, 24):
            cache.reset()
            model(ids[:, :first], past_key_values=cache)
            got = steps(model, cache, ids[:, first:])
            torch.testing.assert_close(torch.cat(got, dim=1), expected[:, first:], atol=1e-5, rtol=1e-5)
    assert replays == [[8 + 6]]
    assert cache.get_seq_length() == 30


def test_contexts_shorter_than_the_selection(model, replays, ids):
    with torch.no_grad():
        expected = model(ids[:, :11]).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
        got = steps(model, cache, ids[:, :11])
        torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert len(replays) == 2
    assert all(count[0] for count in replays)


def test_generate_compiles_static_decoding_only_when_asked_to(model):
    from transformers.generation import CompileConfig

    def is_plain(call):
        return getattr(call, "__func__", None) is type(model).__call__

    assert is_plain(model.get_compiled_call(None))
    assert not is_plain(model.get_compiled_call(CompileConfig(backend="eager")))
    model.model.decode_graphs = False
    assert not is_plain(model.get_compiled_call(None))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_failed_recording_is_said_once_and_decoding_goes_on(model, ids, monkeypatch, cache):
    def record(run, rewind, device):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "record", record)
    with pytest.warns(UserWarning, match="a CUDA graph could not be made: operation not permitted") as caught:
        tokens = greedy(model, ids, cache_implementation=cache)
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 1
    assert torch.equal(tokens, without_graphs(model, ids))


def ends_without_memory(error):
    """As a broken recording: the lack of memory, and after it what ending the recording fails with."""
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    finally:
        if error != "alone":
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("error", ["alone", "ending the recording fails after it"])
def test_no_memory_in_a_recording_is_raised_and_the_next_call_records(model, replays, ids, monkeypatch, kind, error):
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    record = decode_graph.record

    def fails(run, rewind, device):
        run()
        ends_without_memory(error)

    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :15], past_key_values=cache)
        monkeypatch.setattr(decode_graph, "record", fails)
        made = 15
        with pytest.raises(torch.OutOfMemoryError):
            while made < 30:
                steps(model, cache, ids[:, made : made + 1])
                made += 1
        assert made in (17, 18) and int(cache.get_seq_length()) == made
        monkeypatch.setattr(decode_graph, "record", record)
        got = steps(model, cache, ids[:, made:])
    assert len(replays) == 1 and replays[0][0] == 30 - made
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, made:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_memory_in_a_replay_is_raised_and_the_next_call_replays(model, replays, ids, monkeypatch, kind):
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :15], past_key_values=cache)
        steps(model, cache, ids[:, 15:22])
        before, clone = replays[0][0], torch.Tensor.clone

        def no_memory(tensor, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.Tensor, "clone", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            steps(model, cache, ids[:, 22:23])
        monkeypatch.setattr(torch.Tensor, "clone", clone)
        assert int(cache.get_seq_length()) == 22 and is_recorded(cache)
        got = steps(model, cache, ids[:, 22:])
    assert len(replays) == 1 and replays[0][0] == before + 1 + 8
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 22:], atol=1e-5, rtol=1e-5)


def test_static_layers_of_unequal_length_are_not_recorded(model, replays, ids):
    cache = StaticCache(model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        for i in range(20, 22):
            model(ids[:, i : i + 1], past_key_values=cache)
        cache.layers[2].indexer_cumulative_length -= 1
        with pytest.warns(UserWarning, match="hold different numbers of rows"):
            model(ids[:, 22:23], past_key_values=cache)
    assert not replays
    lengths = [int(layer.cumulative_length) for layer in cache.layers]
    assert lengths == [23] * 4 and int(cache.layers[2].indexer_cumulative_length) == 22


def placed(model, places="cpu"):
    hooks = pytest.importorskip("accelerate.hooks")
    twin = copy.deepcopy(model)
    for module in [*twin.model.modules()]:
        if module.state_dict() and module is not twin.model:
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(places))
    return twin


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_hooks_that_only_move_tensors_are_recorded_with_the_rest(model, replays, ids, options):
    expected = without_graphs(model, ids, **options)
    assert torch.equal(greedy(placed(model), ids, **options), expected)
    assert len(replays) == 1 and replays[0][0] >= 20


def test_offloaded_layers_are_not_recorded_and_it_is_said_why(model, replays, ids, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    said = []
    monkeypatch.setattr(eligibility, "say_slower", lambda *args: said.append(args[2:]))
    away = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert torch.equal(greedy(away, ids), without_graphs(model, ids))
    assert replays == []
    (reason,) = {reason for what, reason in said if what == "decoding steps are not recorded"}
    assert reason.startswith("layers.0.self_attn.q_a_proj: accelerate keeps its weights elsewhere")


CPU = torch.device("cpu")


@pytest.fixture(params=[[2], [1, 3], [1, 2, 3]], ids=lambda cuts: "cut at " + ", ".join(map(str, cuts)))
def several_devices(request, monkeypatch):
    """As if consecutive layers were on devices of their own; cuts before a shared layer hand the selection over."""
    bounds = [0, *request.param, 4]
    ranges = [decode_graph.DeviceRange(first, last, CPU) for first, last in pairwise(bounds)]
    monkeypatch.setattr(decode_graph, "device_ranges", lambda layers, device: ranges)
    monkeypatch.setattr(decode_graph, "runs_on_one_device", lambda model, device: False)
    return len(ranges)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", ["FSFS", "FSSS"])
def test_layers_on_several_devices_are_recorded_device_by_device(
    model, replays, ids, several_devices, options, padded, pattern
):
    model.set_index_share_pattern(pattern)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :8] = 0
    expected = without_graphs(model, ids, attention_mask=mask, **options)
    assert torch.equal(greedy(model, ids, attention_mask=mask, **options), expected)
    assert len(replays) == several_devices
    # One more than the steps: each range is replayed once for the next one to be recorded on real numbers.
    assert [count[0] for count in replays] == [(22 if options else 21)] * several_devices


def test_several_devices_without_position_ids(model, replays, ids, several_devices):
    with torch.no_grad():
        expected = model(ids).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
        got = steps(model, cache, ids[:, 20:])
        torch.testing.assert_close(torch.cat(got, dim=1), expected[:, 20:], atol=1e-5, rtol=1e-5)
    assert len(replays) == 2 * several_devices
