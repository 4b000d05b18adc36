"""A model on another GPU, over two, or partly on the CPU: the losses, tokens and memory of one GPU.

On the trained demo checkpoint and on a slice of DeepSeek-V3.2's width with random weights.
"""

import copy
import time

import pytest
import torch
from testing.placed_models import PATTERNS, demo_windows, means, measured, save_demo
from transformers import DynamicCache

from indexcache import IndexCacheConfig, IndexCacheForCausalLM
from indexcache.modeling_indexcache.cache.decode_graph import DecodeGraph

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.gpus,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def by_hand(places, head=0, angles=0):
    ends = {"model.embed_tokens": 0, "model.rotary_emb": angles, "model.norm": head, "lm_head": head}
    return ends | {f"model.layers.{layer}": place for layer, place in enumerate(places)}


# Over two GPUs in one piece each, cut before a shared layer and turn by turn; with layers on the CPU and on disk.
PLACES = {
    "cuda:1": "cuda:1",
    "auto": "auto",
    "halves": by_hand([0] * 6 + [1] * 6, head=1),
    "before a shared layer": by_hand([0] * 3 + [1] * 9, head=1, angles=1),
    "back and forth": by_hand([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1]),
    "head elsewhere": by_hand([0] * 12, head=1, angles=1),
    "on the CPU": by_hand([0] * 4 + ["cpu"] * 3 + [1] * 5, head=1),
    "on disk": by_hand([0] * 8 + ["disk"] * 2 + [0] * 2),
}
RECORDED = {"cuda:1": 1, "halves": 2, "before a shared layer": 2, "back and forth": 6, "head elsewhere": 1}


@pytest.fixture(scope="module")
def windows():
    return demo_windows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_demo(tmp_path_factory.mktemp("indexcache"))


@pytest.fixture(scope="module")
def one_gpu(folder, windows):
    model = IndexCacheForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda:0").eval()
    found = {}
    for pattern in PATTERNS:
        model.set_index_share_pattern(pattern)
        found[pattern] = measured(model, windows)[:2]
    return found


@pytest.mark.parametrize("place", PLACES)
def test_losses_and_tokens_are_those_of_one_gpu(folder, windows, one_gpu, tmp_path, place):
    options = {"device_map": PLACES[place], "offload_folder": tmp_path}
    if place == "auto":
        options["max_memory"] = {0: "8MiB", 1: "8GiB"}
    model = IndexCacheForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    torch.cuda.set_device(0)  # wherever the model is, the current device is another one's
    for pattern, (losses, tokens) in one_gpu.items():
        model.set_index_share_pattern(pattern)
        found, made, caches = measured(model, windows)
        assert means(found) == pytest.approx(means(losses), abs=1e-3)
        assert torch.equal(made, tokens)
        graphs = [vars(cache).get("_indexcache_decode_graph") for cache in caches]
        if place in RECORDED:
            assert [len(graph.segments) for graph in graphs] == [RECORDED[place]] * 2
        elif place != "auto":
            assert not any(isinstance(graph, DecodeGraph) for graph in graphs)
    runs = model.explain_paths()
    assert runs.prefill.runs == "streamed, in place"
    assert (runs.recorded.runs == "not recorded") == (place in ("on the CPU", "on disk"))


@pytest.fixture(scope="module")
def slice_of_v32():
    """Four layers of DeepSeek-V3.2's width, with few experts, so that memory is attention's; bf16, on cuda:0."""
    config = IndexCacheConfig(
        num_hidden_layers=4,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=16,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=1,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        index_topk=2048,
        index_n_heads=64,
        index_head_dim=128,
        vocab_size=1024,
        index_share_pattern="FSFS",
        max_position_embeddings=163840,
    )
    torch.manual_seed(0)
    with torch.device("cuda:0"):
        model = IndexCacheForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


@torch.inference_mode()
def peaks(model, tokens):
    """Bytes above the weights at the peak of a prefill, by device, and the milliseconds of a decoding step."""
    ids = torch.randint(0, 1024, (1, tokens + 40), device="cuda:0")
    torch.cuda.empty_cache()
    rest = [torch.cuda.memory_allocated(device) for device in range(2)]
    for device in range(2):
        torch.cuda.reset_peak_memory_stats(device)
    cache = DynamicCache(config=model.config)
    model(ids[:, :tokens], past_key_values=cache, logits_to_keep=1)
    above = [torch.cuda.max_memory_allocated(device) - rest[device] for device in range(2)]
    times = []
    for at in range(tokens, tokens + 40):
        for device in range(2):
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        model(ids[:, at : at + 1], past_key_values=cache)
        for device in range(2):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    graph = vars(cache)["_indexcache_decode_graph"]
    assert isinstance(graph, DecodeGraph)
    return above, sorted(times[8:])[16] * 1e3, len(graph.segments)


def test_memory_over_two_gpus_is_that_of_one(slice_of_v32, capsys):
    tokens = 131072
    (one, _), alone, _ = peaks(slice_of_v32, tokens)
    halves = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    # The second cut is before a shared layer: its selection, 1 GiB, crosses over.
    for places in ([0, 0, 1, 1], [0, 1, 1, 1]):
        over = {**halves, **{f"model.layers.{layer}": place for layer, place in enumerate(places)}}
        skip = slice_of_v32._skip_keys_device_placement
        placed = accelerate.dispatch_model(copy.deepcopy(slice_of_v32), over, skip_keys=skip)
        above, step, segments = peaks(placed, tokens)
        with capsys.disabled():
            print(
                f"\n{tokens} tokens, layers on {places}: {[f'{size / 2**30:.1f}' for size in above]} GiB above the "
                f"weights against {one / 2**30:.1f}, a step {step:.2f} ms against {alone:.2f}, {segments} graphs"
            )
        assert max(above) <= 1.25 * one
        assert segments == 2
        del placed
        torch.cuda.empty_cache()
