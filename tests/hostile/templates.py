"""What tries start from: tiny checkpoints with a tokenizer, patterns, data. Made once, copied into every sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from testing.checkpoints import build
from workshop import SECRET

FAMILIES = {
    "deepseek": {"family": "deepseek_v32", "shards": 3, "mtp": 1},
    "glm": {"family": "glm_moe_dsa", "shards": 1, "index_topk_freq": 1},
    "fp8": {"family": "deepseek_v32", "shards": 2, "fp8": True},
}
LAYERS, WORDS = 4, 60


def build_all(folder: str) -> list[str]:
    """Every template, as folders below `folder`: the names of the checkpoints."""
    root = Path(folder)
    for name, options in FAMILIES.items():
        fields = {key: value for key, value in options.items() if key != "index_topk_freq"}
        source = build(root / name / "source", layers=LAYERS, **fields)
        write_tokenizer(source)
        write_work(root / name)
    return list(FAMILIES)


def write_work(box: Path) -> None:
    """Data, patterns and what must not be touched, beside a checkpoint."""
    work, outside = box / "work", box / "outside"
    work.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text(SECRET)
    (outside / "kept.json").write_text('{"kept": true}')
    (work / "text.txt").write_text(text(2000))
    lines = [json.dumps({"text": text(120, start)}) for start in range(12)]
    (work / "text.jsonl").write_text("\n".join(lines) + "\n")
    ids = torch.randint(0, WORDS, (12, 25), generator=torch.Generator().manual_seed(1))
    save_file({"calibration_ids": ids}, work / "windows.safetensors")
    pattern = "FSFS"
    (work / "pattern.json").write_text(json.dumps({"index_share_pattern": pattern}))
    (work / "patterns.json").write_text(json.dumps({"patterns": {"3": "FFFS", "2": pattern, "1": "FSSS"}}))


def text(words: int, start: int = 0) -> str:
    """Words that the tokenizer knows, in an order that repeats late."""
    return " ".join(f"w{(number * number + 7 * start) % WORDS}" for number in range(words))


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer in place of the empty one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{number}": number + 2 for number in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ messages[0]['content'] }}",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))


def copy(template: str, box: str) -> None:
    """A sandbox from a template, times of change included."""
    shutil.copytree(template, box, symlinks=True)
