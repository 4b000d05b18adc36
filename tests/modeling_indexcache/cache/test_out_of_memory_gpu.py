"""Out of memory for real in recorded steps: raised as such, and the next call records or replays, with equal bits."""

import pytest
import torch
from testing.full_memory import equal_bits, full_memory
from testing.recorded_steps import PATTERN, is_recorded, steps
from testing.tiny_models import tiny_model
from transformers import DynamicCache, StaticCache

from indexcache.modeling_indexcache.cache import decode_graph

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPT = 24


@pytest.fixture(scope="module")
def model():
    model = tiny_model(index_share_pattern=PATTERN, n_group=1, index_n_heads=16).to("cuda", torch.bfloat16)
    model.set_attn_implementation("triton")
    return model


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(3)
    return torch.randint(2, 96, (1, 40), device="cuda")


@pytest.fixture
def records(monkeypatch):
    """For every recording that was begun, one entry."""
    begun, record = [], decode_graph.record

    def counted(*arguments):
        begun.append(arguments)
        return record(*arguments)

    monkeypatch.setattr(decode_graph, "record", counted)
    return begun


@torch.no_grad()
def prefilled(model, ids, kind):
    cache = StaticCache(model.config, max_cache_len=48) if kind == "static" else DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=cache)
    return cache


def undisturbed(model, ids, kind):
    """Logits of every step, and at which of them one is recorded."""
    cache, logits, recorded_at = prefilled(model, ids, kind), [], None
    for at in range(PROMPT, ids.shape[1]):
        logits += steps(model, cache, ids[:, at : at + 1])
        if recorded_at is None and is_recorded(cache):
            recorded_at = at
    assert recorded_at is not None
    return logits, recorded_at


def pieces():
    """Small tensors with gaps between them, where a step's own find room though the device gives no more memory."""
    small = [torch.empty(2**16, dtype=torch.uint8, device="cuda") for _ in range(256)]
    return small[::2]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_memory_in_a_recording_is_raised_and_the_next_call_records(model, ids, kind, records):
    expected, recorded_at = undisturbed(model, ids, kind)
    cache = prefilled(model, ids, kind)
    got = steps(model, cache, ids[:, PROMPT:recorded_at])
    records.clear()
    held = pieces()
    with full_memory(spare=True), pytest.raises(torch.OutOfMemoryError):
        steps(model, cache, ids[:, recorded_at : recorded_at + 1])
    del held
    assert len(records) == 1 and not is_recorded(cache) and int(cache.get_seq_length()) == recorded_at
    got += steps(model, cache, ids[:, recorded_at : recorded_at + 1])
    assert len(records) == 2 and is_recorded(cache)
    got += steps(model, cache, ids[:, recorded_at + 1 :])
    assert len(records) == 2
    assert all(equal_bits(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_memory_in_a_replay_is_raised_and_the_next_call_replays(model, ids, kind, records):
    expected, recorded_at = undisturbed(model, ids, kind)
    cache, broken = prefilled(model, ids, kind), recorded_at + 3
    got = steps(model, cache, ids[:, PROMPT:broken])
    graph, records_before = vars(cache)["_indexcache_decode_graph"], len(records)
    hidden_states = model.model.embed_tokens(ids[:, broken : broken + 1])
    position_ids = torch.tensor([[broken]], device="cuda")
    inputs = decode_graph.StepInputs(hidden_states, position_ids, None)
    with full_memory(), torch.no_grad():
        # The replay itself, which has no memory for its result, and the whole forward.
        if graph.segments[0].position_ids is None:
            inputs = inputs._replace(position_ids=None)
        with pytest.raises(torch.OutOfMemoryError):
            graph.step(model.model, inputs)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, broken : broken + 1], past_key_values=cache)
    assert vars(cache)["_indexcache_decode_graph"] is graph and int(cache.get_seq_length()) == broken
    got += steps(model, cache, ids[:, broken:])
    assert vars(cache)["_indexcache_decode_graph"] is graph and len(records) == records_before
    assert all(equal_bits(*pair) for pair in zip(got, expected, strict=True))
