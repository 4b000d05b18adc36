"""What can be distilled: DSA checkpoints, and dense ones that get indexers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.tiny_models import SIZES, tiny_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from indexcache.conversion.io.sources import ConversionError
from indexcache.distillation.source import IndexerShape, open_distillation_source
from indexcache.runs.errors import RunError

DENSE = {
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, "glm_moe_dsa", True),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, "deepseek_v32", False),
}
SHAPE = IndexerShape(12, 8, 16)


def dense(folder, family, **changes):
    config_class, model_class, _, _ = DENSE[family]
    fields = {name: value for name, value in SIZES.items() if not name.startswith("index")}
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**{**fields, **changes}), attn_implementation="eager").eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", list(DENSE))
def test_dense_models_get_indexers_on_full_layers_and_keep_their_numbers(family, tmp_path):
    native = dense(tmp_path, family)
    source = open_distillation_source(str(tmp_path), pattern="FSFS", indexer=SHAPE)
    assert source.is_dense and source.config.source_model_type == DENSE[family][2]
    assert source.config.indexer_rope_interleave is DENSE[family][3]
    ids = torch.randint(0, 97, (2, 40))
    expected = native(ids).logits
    torch.testing.assert_close(source.load_untrained(torch.float32)(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model, new = source.load(torch.float32, attn_implementation="sdpa")
    assert new == [0, 2]
    indexers = {name.split(".")[2] for name, _ in model.named_parameters() if ".indexer." in name}
    assert indexers == {"0", "2"}
    # While everything is selected, attention is the dense one.
    torch.testing.assert_close(model.eval()(ids[:, :12]).logits, native(ids[:, :12]).logits, rtol=1e-4, atol=1e-4)


def test_new_indexers_follow_the_seed(tmp_path):
    dense(tmp_path, "glm4_moe_lite")
    source = open_distillation_source(str(tmp_path), pattern="FSFS", indexer=SHAPE)
    name = "model.layers.2.self_attn.indexer.wk.weight"
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(source.load(torch.float32)[0].state_dict()[name])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_lost_indexers_are_made_anew_and_other_lost_weights_refused(tmp_path):
    tiny_model(index_share_pattern="FFFF").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers.2.self_attn.indexer." not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_distillation_source(str(tmp_path), pattern="FSFS")
    model, new = source.load(torch.float32)
    assert new == [2]
    assert torch.equal(
        model.state_dict()["model.layers.0.self_attn.indexer.wk.weight"],
        weights["model.layers.0.self_attn.indexer.wk.weight"],
    )
    del kept["model.norm.weight"]
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks weights .*\s.*model\.norm\.weight"):
        source.load(torch.float32)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight is missing"):
        open_distillation_source(str(tmp_path), pattern="FSFS")


def test_unfit_sources_are_refused(tmp_path):
    dense(tmp_path, "glm4_moe_lite")
    with pytest.raises(RunError, match="give --pattern"):
        open_distillation_source(str(tmp_path))
    with pytest.raises(RunError, match="must start with 'F'"):
        open_distillation_source(str(tmp_path), pattern="SFFF")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"q_lora_rank": None}, "q_lora_rank=null"),
        ({"model_type": "llama"}, "'llama' cannot be converted"),
        ({"model_type": {"of": "any type"}}, "cannot be converted"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConversionError, match=message):
            open_distillation_source(str(tmp_path), pattern="FSFS")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(RunError, match="--dtype bfloat16"):
        open_distillation_source(str(tmp_path), pattern="FSFS")
    tiny_model(index_share_pattern="FFFF").save_pretrained(tmp_path / "dsa")
    with pytest.raises(RunError, match="for dense sources"):
        open_distillation_source(str(tmp_path / "dsa"), pattern="FSFS", indexer=SHAPE)
