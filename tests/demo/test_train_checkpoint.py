"""`make demo-checkpoint`: a run stopped in any stage goes on with `--resume` and repeats nothing that was done."""

import json
import lzma
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "demo" / "train_checkpoint.py"


@pytest.fixture
def script(monkeypatch):
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
    cut = {name: value[:2, :513].contiguous() for name, value in windows.items()}
    save_file(cut, tmp_path / "windows.safetensors")
    small = "--dense-lm-steps 2 --dense-lm-batch 1 --warm-up-steps 1 --sparse-steps 2 --batch 1 --train-windows 8"
    settings = [*small.split(), "--seqlen", "512", "--save-every", "1"]
    return [text, tmp_path / "windows.safetensors", tmp_path / "out", *settings]


def test_a_stopped_run_is_resumed_where_it_was(script, arguments, monkeypatch, capsys):
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
    assert json.loads((out / "config.json").read_text())["model_type"] == "deepseek_v32"
    assert not work.exists()
