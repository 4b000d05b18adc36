"""Block fp8 checkpoints: loaded as they are, run on any device, saved as they were; what is wrong with one is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.checkpoints import as_bytes, build, edit_json, edit_shard, read_all
from testing.tiny_models import tiny_config
from transformers import FineGrainedFP8Config

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.sources import FolderSource
from indexcache.kernels.block_fp8.block_fp8_format import E4M3
from indexcache.kernels.common.device_target import DeviceTarget
from indexcache.modeling_indexcache import block_fp8_loading, compile_ahead
from indexcache.modeling_indexcache.attention import absorbed_weights
from indexcache.modeling_indexcache.layers.block_fp8_modules import BlockFp8Experts, BlockFp8Linear
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheForCausalLM, IndexCacheModel

HOPPER, AMPERE = DeviceTarget("cuda", 90, 132), DeviceTarget("cuda", 80, 108)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    source = build(folder / "source", fp8=True, mtp=1)
    convert(FolderSource(source), folder / "out", ConvertOptions(SharePattern.parse("FSFS")))
    return folder / "out"


def copy_of(folder, to):
    """One shard, so that tests can change it."""
    to.mkdir()
    save_file(read_all(folder), to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text((folder / "config.json").read_text())
    return to


def dequantised(folder, **options):
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    return IndexCacheForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def ids_of(length=20):
    return torch.randint(0, 64, (2, length))


def test_weights_stay_fp8_and_give_what_the_dequantised_ones_give(converted):
    model, plain = IndexCacheForCausalLM.from_pretrained(converted), dequantised(converted)
    layer = model.model.layers[2]
    assert isinstance(layer.self_attn.kv_a_proj_with_mqa, BlockFp8Linear)  # 40 rows in blocks of 16
    assert isinstance(layer.self_attn.indexer.wq_b, BlockFp8Linear) and isinstance(layer.mlp.experts, BlockFp8Experts)
    assert type(layer.self_attn.indexer.weights_proj) is torch.nn.Linear and type(model.lm_head) is torch.nn.Linear
    narrow = [p for p in model.parameters() if p.dtype == E4M3]
    assert narrow and not any(p.requires_grad for p in narrow)
    assert not any(p.dtype == E4M3 for p in plain.parameters()) and not hasattr(plain.config, "quantization_config")
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    expected = plain.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_the_checkpoint_comes_back_as_it_was(converted, tmp_path):
    IndexCacheForCausalLM.from_pretrained(converted).save_pretrained(tmp_path / "again")
    old, new = read_all(converted), read_all(tmp_path / "again")
    assert set(new) == {name for name in old if "layers.4." not in name}  # but for the layer that is not loaded
    for name, tensor in new.items():
        if "k_norm" not in name:  # stored in fp32, loaded in the model's dtype, as without fp8
            assert tensor.dtype == old[name].dtype and as_bytes(tensor) == as_bytes(old[name]), name
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    was = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert {name: saved[name] for name in was} == was
    ids = ids_of()
    again = IndexCacheForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, IndexCacheForCausalLM.from_pretrained(converted)(ids).logits)


ALONE = """
sys.modules["accelerate"] = sys.modules["kernels"] = None
import torch
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
experts = model.model.layers[1].mlp.experts
assert type(experts).__name__ == "BlockFp8Experts" and type(experts).__module__.startswith("transformers_modules.")
tokens = model.generate(torch.arange(20)[None], max_new_tokens=5, do_sample=False)
model.save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
assert torch.equal(again.generate(torch.arange(20)[None], max_new_tokens=5, do_sample=False), tokens)
print(tokens[0].tolist())
"""


def test_it_runs_offline_where_neither_this_package_nor_accelerate_is(converted, tmp_path, run_python):
    process = run_python(ALONE, converted, tmp_path / "again")
    model = IndexCacheForCausalLM.from_pretrained(converted)
    tokens = model.generate(torch.arange(20)[None], max_new_tokens=5, do_sample=False)
    assert process.stdout.splitlines()[-1] == str(tokens[0].tolist())
    old, new = read_all(converted), read_all(tmp_path / "again")
    assert all(as_bytes(new[name]) == as_bytes(old[name]) for name in new if "k_norm" not in name)


def test_power_of_two_scales_stay_bytes(converted, tmp_path):
    folder = copy_of(converted, tmp_path / "ue8m0")

    def change(tensors):
        for name in tensors:
            if name.endswith("_scale_inv"):
                tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    edit_shard(folder / "model.safetensors", change)
    model = IndexCacheForCausalLM.from_pretrained(folder)
    assert model.model.layers[1].mlp.experts.gate_up_proj_scale_inv.dtype == torch.float8_e8m0fnu
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dequantised(folder)(ids).logits)
    model.save_pretrained(tmp_path / "again")
    old, new = load_file(folder / "model.safetensors"), read_all(tmp_path / "again")
    scales = [name for name in new if name.endswith("_scale_inv")]
    assert scales and all(as_bytes(new[name]) == as_bytes(old[name]) for name in scales)


def test_what_the_files_hold_decides_and_not_a_list_of_names(converted, tmp_path):
    """A layer that a release left in bf16, or whose name its list of exceptions has wrong."""
    folder = copy_of(converted, tmp_path / "mixed")
    name = "model.layers.1.self_attn.o_proj.weight"

    def change(tensors):
        scales = tensors.pop(name + "_scale_inv").repeat_interleave(16, 0).repeat_interleave(16, 1)
        tensors[name] = (tensors[name].float() * scales[:48, :32]).bfloat16()

    edit_shard(folder / "model.safetensors", change)
    model = IndexCacheForCausalLM.from_pretrained(folder)
    assert type(model.model.layers[1].self_attn.o_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].self_attn.o_proj, BlockFp8Linear)
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, IndexCacheForCausalLM.from_pretrained(converted)(ids).logits)


def test_the_decoder_alone_loads_too(converted):
    decoder = IndexCacheModel.from_pretrained(converted)
    assert isinstance(decoder.layers[0].self_attn.o_proj, BlockFp8Linear)
    ids = ids_of()
    with torch.no_grad():
        whole = IndexCacheForCausalLM.from_pretrained(converted)
        assert torch.equal(decoder(ids).last_hidden_state, whole.model(ids).last_hidden_state)


EXPERT = "model.layers.2.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize("dequantise", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT + "_scale_inv"), r"not whole: .*experts\.1\.up_proj\.weight_scale_inv missing"),
        (lambda t: t.update({EXPERT + "_scale_inv": torch.ones(2, 4)}), r"up_proj\.weight_scale_inv is F32 \[2, 4\]"),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(2, 3).bfloat16()}),
            r"weight_scale_inv is BF16 \[2, 3\]",
        ),
        (lambda t: t.update({EXPERT: torch.ones(24, 48).bfloat16()}), "scales of weights that are not fp8"),
    ],
)
def test_scales_that_are_missing_or_do_not_fit_are_named(converted, tmp_path, change, message, dequantise):
    folder = copy_of(converted, tmp_path / "broken")
    edit_shard(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        dequantised(folder) if dequantise else IndexCacheForCausalLM.from_pretrained(folder)


def test_experts_stored_in_several_ways_are_named(converted, tmp_path):
    folder = copy_of(converted, tmp_path / "several")
    edit_shard(
        folder / "model.safetensors",
        lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}) or t.pop(EXPERT + "_scale_inv"),
    )
    with pytest.raises(
        ValueError, match=r"several ways.*gate_proj\.weight fp8 with F32 scales.*1\.up_proj\.weight not fp8"
    ):
        IndexCacheForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight_block_size", None, "one scale a tensor"),
        ("activation_scheme", "static", "activation_scheme is 'static'"),
        ("expert_dtype", "fp4", "expert_dtype is 'fp4'"),
    ],
)
def test_other_kinds_of_fp8_are_refused(converted, tmp_path, field, value, message):
    folder = copy_of(converted, tmp_path / "other")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config={**quantization, field: value})
    with pytest.raises(ValueError, match=message):
        IndexCacheForCausalLM.from_pretrained(folder)


def test_other_models_get_transformers_own_quantiser():
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert type(AutoHfQuantizer.from_config(config, pre_quantized=True)) is FineGrainedFP8HfQuantizer
    with block_fp8_loading.loading_block_fp8():
        made = AutoHfQuantizer.from_config(config, pre_quantized=True)
        assert type(made) is block_fp8_loading.BlockFp8Quantizer
        assert type(AutoHfQuantizer.from_config(config, pre_quantized=False)) is FineGrainedFP8HfQuantizer
    assert type(AutoHfQuantizer.from_config(config, pre_quantized=True)) is FineGrainedFP8HfQuantizer


def test_gradients_reach_what_lies_before_frozen_weights(converted):
    model, plain = IndexCacheForCausalLM.from_pretrained(converted), dequantised(converted)
    given = [torch.randn(1, 6, 48).bfloat16()]
    given.append(given[0].clone())
    losses = []
    for one, x in zip((model, plain), given):
        out = one(inputs_embeds=x.requires_grad_()).logits.float().square().mean()
        out.backward()
        losses.append(out.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=0.1, atol=2e-2 * float(given[1].grad.abs().max()))
    assert all(p.grad is None for p in model.parameters() if p.dtype == E4M3)


@torch.no_grad()
def test_a_change_of_dtype_leaves_weights_and_scales_alone(converted):
    """They mean something together alone."""
    model, plain = IndexCacheForCausalLM.from_pretrained(converted), dequantised(converted, dtype=torch.float32)
    before = {name: as_bytes(p) for name, p in model.named_parameters() if p.dtype == E4M3 or "scale_inv" in name}
    model.to(torch.float32)
    after = dict(model.named_parameters())
    assert before and all(as_bytes(after[name]) == held for name, held in before.items())
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    ids = ids_of()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_absorbed_weights_are_made_once(converted, monkeypatch):
    model = IndexCacheForCausalLM.from_pretrained(converted)
    made = []
    ours = BlockFp8Linear.dequantised
    monkeypatch.setattr(BlockFp8Linear, "dequantised", lambda self, dtype: made.append(self) or ours(self, dtype))
    model.generate(ids_of(), max_new_tokens=5, do_sample=False)
    assert len(made) == len(set(made)) == 4
    attention = model.model.layers[0].self_attn
    weight = absorbed_weights.multiplier(attention.kv_b_proj, 32, torch.empty(0, dtype=torch.bfloat16))
    assert weight.shape == (64, 32) and len(made) == 4
    attention.kv_b_proj.weight_scale_inv.mul_(2)
    twice = absorbed_weights.multiplier(attention.kv_b_proj, 32, torch.empty(0, dtype=torch.bfloat16))
    assert torch.equal(twice, weight * 2)


def pretended(pattern, lengths, target, **fields):
    """Kernels that a block fp8 decoder with blocks of 128 launches on a GPU, by name."""
    config = tiny_config(
        index_share_pattern=pattern, num_hidden_layers=len(pattern), n_group=1, index_topk=32, first_k_dense_replace=1
    )
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with torch.device("meta"):
        decoder = IndexCacheModel(config)
    dtypes = {}
    for name, parameter in decoder.named_parameters():
        narrow = name.startswith("layers.") and parameter.dim() > 1 and "gate.weight" not in name
        narrow = narrow and "weights_proj" not in name
        dtypes[name] = E4M3 if narrow else torch.bfloat16
        if narrow:
            dtypes[name + "_scale_inv"] = torch.float32
    small = compile_ahead.small_model(IndexCacheModel, config, pattern, dtypes)
    assert any(isinstance(module, BlockFp8Experts) for module in small.modules())
    begun_with = compile_ahead.prefills(lengths)
    found = [variant for fresh in compile_ahead.variants_of(small, target, begun_with) for variant in fresh]
    return {variant.name: variant for variant in found}


def test_prefill_and_steps_run_the_block_fp8_kernels():
    pytest.importorskip("triton")
    launched = pretended("FS", (100,), HOPPER)
    assert {
        "quantise_activations_kernel",
        "block_fp8_matmul_kernel",
        "expert_tiles_kernel",
        "block_fp8_experts_up_kernel",
        "block_fp8_experts_down_kernel",
        "block_fp8_pieces_kernel",
        "block_fp8_experts_up_pieces_kernel",
        "block_fp8_experts_down_pieces_kernel",
    } <= set(launched)
    assert "experts_up_vector_kernel" not in launched
    assert launched["block_fp8_pieces_kernel"].options.get("EARLY")


def test_without_fp8_units_weights_are_widened():
    pytest.importorskip("triton")
    launched = pretended("FS", (100,), AMPERE)
    assert "block_fp8_matmul_kernel" in launched and "quantise_activations_kernel" not in launched
    assert {"block_fp8_vector_kernel", "block_fp8_experts_up_vector_kernel"} <= set(launched)
