"""Quantisers: how far the logits move, and that what is saved loads again. The indexer and the router stay exact."""

import pytest


def _logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def _stays_near(model, load, ids, most):
    """KL of the exact model's next tokens to the quantised one's, in nats."""
    import torch.nn.functional as F

    exact = F.log_softmax(_logits(load(), ids), -1)
    moved = F.log_softmax(_logits(model, ids), -1)
    kl = (exact.exp() * (exact - moved)).sum(-1).mean().item()
    assert 0 < kl < most, kl


def _quantised_linears(model, kind):
    return [name for name, module in model.named_modules() if kind in type(module).__name__]


@pytest.mark.row("torchao", "int8 weights by `quantization_config`, saved, reloaded", package="torchao")
def test_torchao(load, ids, tmp_path):
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.bfloat16)
    weight = model.model.layers[1].self_attn.o_proj.weight
    assert "Int8" in type(weight).__name__ or "Quantized" in type(weight).__name__, type(weight)
    _stays_near(model, load, ids, 0.02)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(load(tmp_path, dtype=torch.bfloat16), ids), _logits(model, ids))


@pytest.mark.row("torchao", "`quantize_` in place", package="torchao")
def test_torchao_in_place(load, ids):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load()
    quantize_(model, Int8WeightOnlyConfig())
    _stays_near(model, load, ids, 0.02)


@pytest.mark.row("quanto", "int8 weights in place, generating", package="optimum-quanto")
def test_quanto(load, ids):
    from optimum.quanto import freeze, qint8, quantize

    model = load()
    quantize(model, weights=qint8)
    freeze(model)
    assert _quantised_linears(model, "QLinear")
    _stays_near(model, load, ids, 0.02)
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids.shape[1] + 4


@pytest.mark.row("quanto", "int8 by `quantization_config`", package="optimum-quanto")
def test_quanto_config(load, ids):
    from transformers import QuantoConfig

    model = load(quantization_config=QuantoConfig(weights="int8"))
    assert _quantised_linears(model, "QLinear")
    _stays_near(model, load, ids, 0.02)


@pytest.mark.row("hqq", "4-bit in place", package="hqq")
def test_hqq_in_place(load, ids):
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = load()
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    for layer in model.model.layers:
        layer.self_attn.o_proj = HQQLinear(layer.self_attn.o_proj, config, compute_dtype=torch.float32, device="cpu")
    assert len(_quantised_linears(model, "HQQLinear")) == 12
    _stays_near(model, load, ids, 1.0)


@pytest.mark.row("hqq", "4-bit by `quantization_config`", package="hqq")
def test_hqq(load, limit):
    from transformers import HqqConfig

    with pytest.raises(NotImplementedError, match="HQQ is not available yet"):
        load(quantization_config=HqqConfig(nbits=4, group_size=16), device_map="cpu")
    limit("transformers 5.23 refuses it for every model: `HQQ is not available yet`; in place it works")


@pytest.mark.row("bitsandbytes", "8-bit by `quantization_config`", package="bitsandbytes")
def test_bitsandbytes_8bit(load, ids):
    from transformers import BitsAndBytesConfig

    model = load(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")
    assert _quantised_linears(model, "Linear8bitLt")
    _stays_near(model, load, ids, 0.1)


@pytest.mark.row("bitsandbytes", "4-bit NF4, QLoRA step", package=["bitsandbytes", "peft"])
def test_bitsandbytes_4bit(load, checkpoint, ids, tmp_path):
    import torch
    from ecosystem.ways import REMOTE
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    # On a CPU bitsandbytes packs whole blocks alone, of 64 columns and 32 rows; some of the demo's have others.
    sizes = dict(hidden_size=128, q_lora_rank=64, moe_intermediate_size=64)
    shape = AutoConfig.from_pretrained(checkpoint, trust_remote_code=REMOTE, **sizes)
    AutoModelForCausalLM.from_config(shape, trust_remote_code=REMOTE).float().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["indexer", "kv_a_proj_with_mqa", "lm_head"],
    )
    model = load(tmp_path, quantization_config=config, device_map="cpu")
    assert _quantised_linears(model, "Linear4bit")
    _stays_near(model, lambda: load(tmp_path), ids, 0.1)
    model = get_peft_model(
        prepare_model_for_kbit_training(model), LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
    )
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.row("compressed-tensors", "int8 scheme on every linear layer", package="compressed-tensors")
def test_compressed_tensors(load, ids):
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = load()
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    }
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="initialized")
    apply_quantization_config(model, config)
    assert model.model.layers[1].self_attn.o_proj.quantization_scheme is not None


@pytest.mark.row("llm-compressor", "round to nearest, saved, reloaded", package="llmcompressor")
def test_llm_compressor(load, ids, tmp_path):
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load()
    ignored = ["lm_head", "re:.*indexer.*", "re:.*mlp.gate$"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A16", ignore=ignored))
    _stays_near(model, load, ids, 0.05)
    model.save_pretrained(tmp_path, save_compressed=True)
    torch.testing.assert_close(_logits(load(tmp_path), ids), _logits(model, ids), rtol=1e-2, atol=1e-2)


@pytest.mark.row("gptqmodel", "4-bit calibration, saved, reloaded", package="gptqmodel")
def test_gptqmodel(checkpoint, texts, tmp_path):
    from ecosystem.ways import REMOTE
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(checkpoint), QuantizeConfig(bits=4, group_size=32), trust_remote_code=REMOTE)
    model.quantize(texts, batch_size=1)
    model.save(str(tmp_path))
    assert GPTQModel.load(str(tmp_path), trust_remote_code=REMOTE) is not None


@pytest.mark.row("PyTorch", "dynamic int8 (`torch.ao`)", package="torch")
def test_dynamic_quantisation(load, ids):
    import torch

    model = torch.ao.quantization.quantize_dynamic(load(), {torch.nn.Linear}, dtype=torch.qint8)
    _stays_near(model, load, ids, 0.3)
