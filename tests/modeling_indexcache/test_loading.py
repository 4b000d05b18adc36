"""Saved models load as they were, with other patterns where the weights allow, and refuse what cannot be."""

import copy
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.tiny_models import glm_oracle, ours_like, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, GlmMoeDsaForCausalLM

from indexcache import IndexCacheForCausalLM
from indexcache.modeling_indexcache.modeling_indexcache import IndexCacheModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(index_share_pattern="FFSF").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids():
    return torch.arange(2, 42).unsqueeze(0)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def test_round_trip_keeps_every_weight_and_one_tensor_an_expert_on_disk(saved, ids):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    original = tiny_model(index_share_pattern="FFSF")
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(logits(loaded, ids), logits(original, ids))
    on_disk = load_file(saved / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in on_disk
    assert not any(name.startswith("model.layers.2.self_attn.indexer") for name in on_disk)


def test_a_state_dict_read_from_the_file_brings_the_experts_too(saved):
    """`Trainer` resumes so: without this the experts stayed as they were, and a warning was all."""
    model = tiny_model(seed=1, index_share_pattern="FFSF")
    found = model.load_state_dict(load_file(saved / "model.safetensors"), strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    for name, tensor in tiny_model(index_share_pattern="FFSF").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_state_dict_that_lacks_one_expert_is_not_taken_for_a_whole_one(saved):
    state = load_file(saved / "model.safetensors")
    del state["model.layers.1.mlp.experts.7.down_proj.weight"]
    model = tiny_model(index_share_pattern="FFSF")
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        model.load_state_dict(state)


def test_auto_model_has_no_head(saved, ids):
    with torch.no_grad():
        assert AutoModel.from_pretrained(saved)(ids).last_hidden_state.shape == (1, 40, 48)


def test_more_sharing_than_the_checkpoint_is_allowed(saved, ids):
    loaded = AutoModelForCausalLM.from_pretrained(saved, index_share_pattern="FSSF")
    assert loaded.model.layers[1].self_attn.indexer is None
    original = tiny_model(index_share_pattern="FFSF")
    original.set_index_share_pattern("FSSF")
    torch.testing.assert_close(logits(loaded, ids), logits(original, ids))


def test_a_full_layer_without_weights_is_refused_by_name(saved):
    with pytest.raises(ValueError, match=r"'FFFF' makes layers \[2\] full, but .* has no indexer weights"):
        AutoModelForCausalLM.from_pretrained(saved, index_share_pattern="FFFF")


def test_loading_info_is_still_to_be_had(saved):
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]


def test_multi_token_prediction_layers_are_ignored(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    weights["model.layers.4.eh_proj.weight"] = torch.zeros(3, 3)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "cannot follow a selection of keys"),
        ("flex_attention", "cannot follow a selection of keys"),
        ("nonsense", "is not supported"),
    ],
)
def test_impossible_backends_say_what_to_use(saved, name, message):
    with pytest.raises((ValueError, ImportError), match=message):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_triton_without_cuda_says_why_and_what_to_use(saved):
    with pytest.raises(ValueError, match=r'no CUDA device\. Use "sdpa"'):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation="triton")
    assert AutoModelForCausalLM.from_pretrained(saved).config._attn_implementation == "sdpa"


def test_parallel_plans_name_modules_that_exist(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    # transformers looks a module or parameter up by its name with `*` for the layer's number.
    known = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in [*modules, *parameters]}
    for plan in (model.config.base_model_tp_plan, model.config.base_model_ep_plan):
        assert plan and {f"model.{pattern}" for pattern in plan} - known == set()


@pytest.mark.parametrize(("backend", "allowed"), [("sdpa", False), ("eager", False), ("triton", True)])
def test_only_the_triton_backend_lets_the_kernels_use_triton(ids, monkeypatch, backend, allowed):
    from indexcache.kernels.lightning_indexer.lightning_indexer import lightning_indexer
    from indexcache.kernels.sparse_mla.sparse_mla import sparse_mla

    model, seen = tiny_model(), []

    def spy(op):
        return lambda *args, **kwargs: seen.append(kwargs["allow_triton"]) or op(*args, **kwargs)

    monkeypatch.setattr(
        sys.modules["indexcache.modeling_indexcache.layers.indexer"], "lightning_indexer", spy(lightning_indexer)
    )
    for name in ("absorbed_attention", "inference_attention"):
        monkeypatch.setattr(
            sys.modules[f"indexcache.modeling_indexcache.attention.{name}"], "sparse_mla", spy(sparse_mla)
        )
    model.config._attn_implementation_internal = backend
    logits(model, ids)
    assert set(seen) == {allowed}


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_parameters": YARN}], ids=str)
@pytest.mark.parametrize("model_class", [IndexCacheModel, IndexCacheForCausalLM])
def test_every_weight_and_buffer_that_no_file_has_is_made_as_in_a_new_model(model_class, changes):
    config = tiny_config(index_share_pattern="FSFS", **changes)
    new = model_class(config)
    # New memory holds NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loaded = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={})
    finally:
        torch.use_deterministic_algorithms(False)
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for name, expected in {**dict(new.named_parameters()), **dict(new.named_buffers())}.items():
        assert not found[name].is_meta, name
        assert found[name].dtype == expected.dtype, name
        if expected.numel() < 2 or expected.float().std() < 1e-6 or "freq" in name:
            assert torch.equal(found[name], expected), name
        else:
            assert 0.5 < found[name].std() / expected.std() < 2, name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_router_keeps_as_many_digits_of_its_weight_as_in_glm(tmp_path, stored):
    theirs = glm_oracle("FSFS")
    ours = ours_like(theirs, "FSFS", "sdpa")
    folders = tmp_path / "theirs", tmp_path / "ours"
    for model, folder in zip((theirs, ours), folders):
        model.to(stored).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        assert weights["model.layers.1.mlp.gate.weight"].dtype == stored
    native, loaded = (
        kind.from_pretrained(folder, dtype=torch.bfloat16)
        for kind, folder in zip((GlmMoeDsaForCausalLM, IndexCacheForCausalLM), folders)
    )
    gates = [model.model.layers[1].mlp.gate for model in (native, loaded)]
    assert torch.equal(gates[0].weight.float(), gates[1].weight.float())
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(gates[0](rows)[0], gates[1](rows)[0])
    if stored == torch.bfloat16:
        assert gates[1].weight.dtype == torch.bfloat16  # which the kernels take


def test_a_router_stores_fewer_digits_only_where_none_is_lost():
    gate = tiny_model().model.layers[1].mlp.gate
    gate.store_exactly(torch.bfloat16)
    assert gate.weight.dtype == torch.float32
    exact = gate.weight.data.bfloat16()
    gate.weight.data = exact.float()
    gate.store_exactly(torch.bfloat16)
    assert torch.equal(gate.weight, exact)
    assert gate.weight.dtype == torch.bfloat16 and gate.weight.requires_grad


def test_a_pipeline_is_neither_declared_nor_taken(saved):
    model = tiny_model()
    assert not model.supports_pp_plan
    split = SimpleNamespace(pp_size=2)
    with pytest.raises(ValueError, match="pp_size=2: a stage of a pipeline would not get the selection"):
        AutoModelForCausalLM.from_pretrained(saved, distributed_config=split)
