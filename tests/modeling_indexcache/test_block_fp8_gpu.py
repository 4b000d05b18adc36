"""A block fp8 checkpoint on a GPU: its kernels alone run, steps are recorded, results are the dequantised model's."""

import pytest
import torch
from testing.checkpoints import tiny_config, tiny_tensors, write_checkpoint
from transformers import FineGrainedFP8Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_group": 1,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("triton")
    from indexcache.configuration.share_pattern import SharePattern
    from indexcache.conversion.convert.convert import ConvertOptions, convert
    from indexcache.conversion.io.sources import FolderSource

    place = tmp_path_factory.mktemp("fp8")
    config = tiny_config(fp8=True, **WIDTHS)
    config["quantization_config"]["weight_block_size"] = [128, 128]
    source = write_checkpoint(place / "source", config, tiny_tensors(config, fp8=True))
    convert(FolderSource(source), place / "out", ConvertOptions(SharePattern.parse("FSFS")))
    return place / "out"


@pytest.fixture(scope="module")
def models(folder):
    from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

    model = IndexCacheForCausalLM.from_pretrained(folder).cuda()
    dequantise = FineGrainedFP8Config(dequantize=True)
    return model, IndexCacheForCausalLM.from_pretrained(folder, quantization_config=dequantise).cuda()


def relative_rms(got, expected):
    return ((got.float() - expected.float()).square().mean() / expected.float().square().mean()).sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 20, 300])
def test_each_part_errs_as_rounding_or_quantised_activations_do(models, tokens):
    """Whole random models multiply such errors: a key or an expert is chosen or not."""
    from indexcache.kernels.common.dispatch import no_fallback

    ours, plain = (model.model.layers for model in models)
    torch.manual_seed(0)
    x = torch.randn(1, tokens, WIDTHS["hidden_size"], device="cuda", dtype=torch.bfloat16)
    limit = 0.01 if tokens <= 32 else 0.08
    parts = {"0.mlp": x, "1.mlp": x, "0.self_attn.q_a_proj": x, "0.self_attn.q_b_proj": x, "0.self_attn.indexer.wk": x}
    with no_fallback():
        for name, given in parts.items():
            got, expected = ours.get_submodule(name)(given), plain.get_submodule(name)(given)
            assert relative_rms(got, expected) < limit, name


@torch.no_grad()
def test_short_prompts_are_as_exact_as_the_dequantised_model_in_bf16(models, folder):
    """Up to 32 tokens weights are widened, and nothing is quantised. What is exact is said in fp32 on the CPU."""
    from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

    dequantise = FineGrainedFP8Config(dequantize=True)
    exact = IndexCacheForCausalLM.from_pretrained(folder, quantization_config=dequantise, dtype=torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (16, 2))
    expected = exact(ids).logits
    errors = []
    for model in models:
        logits = model(ids.cuda()).logits.cpu()
        # By prompt: where another expert is chosen, errors are of another kind.
        errors.append(sorted(map(relative_rms, logits, expected))[8])
    assert errors[0] <= 1.1 * errors[1], errors


@torch.no_grad()
def test_a_longer_prompt_is_finite(models):
    ids = torch.randint(0, 64, (1, 500), device="cuda")
    assert torch.isfinite(models[0](ids).logits).all()


@torch.no_grad()
def test_steps_are_recorded_and_say_what_steps_do(models):
    model, _ = models
    paths = model.explain_paths()
    assert paths.prefill.runs == "streamed, in place", paths
    assert paths.decode.runs == "kernels for few tokens" and paths.recorded.runs == "one graph", paths
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (1, 200), device="cuda")
    recorded = model.generate(ids, max_new_tokens=24, do_sample=False)
    model.model.decode_graphs = False
    try:
        assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), recorded)
    finally:
        model.model.decode_graphs = True


def test_saved_from_the_gpu_it_is_what_it_was(models, folder, tmp_path):
    from testing.checkpoints import as_bytes, read_all

    models[0].save_pretrained(tmp_path)
    old, new = read_all(folder), read_all(tmp_path)
    assert set(new) == set(old)
    for name, tensor in new.items():
        if "k_norm" not in name:
            assert tensor.dtype == old[name].dtype and as_bytes(tensor) == as_bytes(old[name]), name


def test_no_wide_copy_but_the_absorbed_weights(folder):
    from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = IndexCacheForCausalLM.from_pretrained(folder).cuda()
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < 1.1 * stored + 2**20
    ids = torch.randint(0, 64, (1, 100), device="cuda")
    model.generate(ids, max_new_tokens=3, do_sample=False)
    absorbed = 2 * sum(layer.self_attn.kv_b_proj.weight.numel() for layer in model.model.layers)
    assert torch.cuda.memory_allocated() - before < 1.1 * stored + absorbed + 64 * 2**20
