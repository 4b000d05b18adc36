"""PEFT: each kind of adapter trains, saves, loads again, merges; the merged model is saved and loaded alone."""

import pytest

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]


def _trained(model, ids):
    import torch

    torch.manual_seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return model.eval()


def _goes_round(load, ids, folder, config):
    """Train, save the adapter, load it on a fresh model, merge, save the whole, load that."""
    import torch
    from peft import PeftModel, get_peft_model

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids).logits

    base = logits(load())
    model = _trained(get_peft_model(load(), config), ids)
    expected = logits(model)
    assert not torch.allclose(expected, base, atol=1e-3)
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(load(), folder / "adapter").eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(folder / "merged")
    alone = load(folder / "merged")
    torch.testing.assert_close(logits(alone), logits(merged), rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.row("PEFT", "LoRA on attention", package="peft")
def test_lora(load, ids, tmp_path):
    from peft import LoraConfig

    _goes_round(load, ids, tmp_path, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))


@pytest.mark.row("PEFT", "DoRA on attention", package="peft")
def test_dora(load, ids, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=ATTENTION, use_dora=True, task_type="CAUSAL_LM")
    _goes_round(load, ids, tmp_path, config)


@pytest.mark.row("PEFT", "IA3 on attention and dense layers", package="peft")
def test_ia3(load, ids, tmp_path):
    from peft import IA3Config

    config = IA3Config(
        target_modules=["kv_b_proj", "o_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    _goes_round(load, ids, tmp_path, config)


@pytest.mark.row("PEFT", "LoRA on the experts (`target_parameters`)", package="peft")
def test_lora_on_experts(load, ids, tmp_path):
    from peft import LoraConfig

    config = LoraConfig(
        r=4,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = _goes_round(load, ids, tmp_path, config)
    assert any("experts" in name and "lora" in name for name, _ in model.named_parameters())


@pytest.mark.row("PEFT", "LoRA on all linear layers", package="peft")
def test_lora_on_all_linear(load, ids, tmp_path):
    from peft import LoraConfig

    model = _goes_round(load, ids, tmp_path, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {"kv_b_proj", "gate_proj", "wq_b"} <= adapted


@pytest.mark.row("PEFT", "LoRA, generating with a cache", package="peft")
def test_lora_generates(load, ids, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = _trained(get_peft_model(load(), LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM")), ids)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    cached, whole = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert cached.tolist() == whole.tolist()
