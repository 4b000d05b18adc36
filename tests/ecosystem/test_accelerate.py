"""accelerate: weights on the CPU and on disk, models without memory."""

import pytest


def _logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.row("accelerate", '`device_map="auto"`', package="accelerate")
def test_device_map_auto(load, ids):
    import torch

    torch.testing.assert_close(_logits(load(device_map="auto"), ids), _logits(load(), ids))


@pytest.mark.row("accelerate", "layers on disk, beyond top-k", package="accelerate")
def test_disk_offload(load, ids, tmp_path):
    import torch

    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(12)}
    model = load(device_map=placed, offload_folder=str(tmp_path))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(_logits(model, ids), _logits(load(), ids))
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert model.generate(ids, **options).tolist() == load().generate(ids, **options).tolist()


@pytest.mark.row("accelerate", "`cpu_offload`, `disk_offload` of a loaded model", package="accelerate")
def test_offload_of_a_loaded_model(load, ids, tmp_path):
    import torch
    from accelerate import cpu_offload, disk_offload

    expected = _logits(load(), ids)
    offloaded = cpu_offload(load(), execution_device=torch.device("cpu"))
    torch.testing.assert_close(_logits(offloaded, ids), expected)
    on_disk = disk_offload(load(), str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    torch.testing.assert_close(_logits(on_disk, ids), expected)


@pytest.mark.row("accelerate", "`init_empty_weights`, then weights put in", package="accelerate")
def test_empty_weights(load, checkpoint, ids):
    import torch
    from accelerate import init_empty_weights
    from ecosystem.ways import REMOTE
    from transformers import AutoConfig, AutoModelForCausalLM

    whole = load()
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=REMOTE)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=REMOTE)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(_logits(model.eval().float(), ids), _logits(whole, ids))


@pytest.mark.row("accelerate", "`Accelerator.prepare`; sizes by module", package="accelerate")
def test_accelerator(load, ids):
    import torch
    from accelerate import Accelerator
    from accelerate.utils import compute_module_sizes

    accelerator = Accelerator(cpu=True)
    model = load()
    sizes = compute_module_sizes(model)
    assert sizes[""] == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
