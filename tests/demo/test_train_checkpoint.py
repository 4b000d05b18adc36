"""`make demo-checkpoint`: stopped in any stage it goes on with `--resume`, and it ends with what `demo/` holds."""

import json
import lzma
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "dsa_demo"
SCRIPT = ROOT / "demo" / "train_checkpoint.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        return module["main"]()

    module = runpy.run_path(str(SCRIPT), run_name="train_checkpoint")
    run.module = module
    return run


@pytest.fixture
def arguments(tmp_path):
    words = re.findall(r"\w+", "the file is opened with a name and a mode and its value returned as text")
    generator = torch.Generator().manual_seed(0)
    documents = [
        " ".join(words[i] for i in torch.randint(0, len(words), (400,), generator=generator).tolist())
        for _ in range(200)
    ]
    text = tmp_path / "text.txt.xz"
    text.write_bytes(lzma.compress("\0".join(documents).encode()))
    windows = load_file(ROOT / "demo" / "sample_windows.safetensors")
    cut = {f"test_{name}": value[:2, :513].contiguous() for name, value in windows.items()}
    cut["calibration_ids"] = windows["ids"][2:, :129].contiguous()
    save_file(cut, tmp_path / "windows.safetensors")
    small = "--dense-lm-steps 2 --dense-lm-batch 1 --warm-up-steps 1 --sparse-steps 2 --batch 1 --train-windows 8"
    settings = [*small.split(), "--seqlen", "512", "--save-every", "1"]
    return [text, f"{tmp_path / 'windows.safetensors'}:test", tmp_path / "out", *settings]


def test_a_stopped_run_is_resumed_where_it_was(script, arguments, monkeypatch, capsys, tmp_path):
    out = arguments[2]
    work = out.with_name("out.work")
    module = script.module["main"].__globals__
    stopped = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setitem(module, "run_distillation", stopped)
        with pytest.raises(KeyboardInterrupt):
            script(*arguments)
    assert not out.exists()
    dense = (work / "dense" / "model.safetensors").read_bytes()
    assert json.loads((work / "dense" / "config.json").read_text())["use_cache"] is True
    with pytest.raises(SystemExit):
        script(*arguments)
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script(*arguments, "--resume", "--seed", "1")
    assert "other options" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(module, "train_dense", stopped)
        patch.setitem(module, "export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            script(*arguments, "--resume")
        assert (work / "dense" / "model.safetensors").read_bytes() == dense
    # Nothing that two steps make is good enough to be shipped.
    assert script(*arguments, "--resume") == 1
    assert not work.exists()
    is_what_the_demo_holds(out, tmp_path)


def is_what_the_demo_holds(out, tmp_path):
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in DEMO.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE", "NOTICE"):
        assert (out / name).read_bytes() == (DEMO / name).read_bytes()
    weights = json.loads((out / "model.safetensors.index.json").read_text())
    assert (
        weights["weight_map"].keys()
        == json.loads((DEMO / "model.safetensors.index.json").read_text())["weight_map"].keys()
    )
    sizes = [path.stat().st_size for path in out.glob("model-0000?-of-00002.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 1.3 * min(sizes)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and not type(model).__module__.startswith("indexcache")
    probe = json.loads((out / "probe.json").read_text())
    assert len(probe["ids"]) == len(probe["argmax"]) == 256
    cache = model(torch.tensor([probe["ids"][:80]])).past_key_values
    assert cache is not None and cache.get_seq_length() == 80
    log = (out / "training_log.json").read_text()
    assert str(tmp_path) not in log
    assert [len(entries) for entries in json.loads(log)["stages"].values()] == [0, 1, 1]
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    header = ModelCard(card).data
    assert (header.license, header.license_name, header.license_link) == ("other", "psf-2.0", "LICENSE")
    rows = re.findall(r"^\| (\d+)/12 (\w*)", card, re.MULTILINE)
    assert [kind for _, kind in rows] == ["", *["uniform", "greedy"] * 3, "greedy"]
    assert [int(count) for count, _ in rows] == [12, 6, 6, 4, 4, 3, 3, 2]
