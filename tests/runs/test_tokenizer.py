"""A checkpoint's tokenizer is loaded, or whoever asks it for tokens learns why not."""

import json
import shutil
from pathlib import Path

import pytest

from indexcache.conversion.io.sources import ConversionError
from indexcache.runs.errors import RunError
from indexcache.runs.windows.text_sources import documents_of
from indexcache.runs.windows.tokenizer import load_tokenizer
from indexcache.runs.windows.window_sources import Sampling, read_windows

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "dsa_demo"


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def test_none_is_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None
    with pytest.raises(RunError, match=r"text\.txt is text, and the source has no tokenizer"):
        documents_of("text.txt", None)


def test_a_whole_one_encodes(folder):
    assert load_tokenizer(str(folder)).encode("class", add_special_tokens=False, verbose=False)


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("tokenizer.json", lambda text: text[: len(text) // 2], "cannot be loaded"),
        ("tokenizer_config.json", lambda text: "[" * 100_000, "cannot be loaded"),
        ("tokenizer_config.json", lambda text: with_field(text, model_max_length=[]), r"model_max_length=\[\]"),
        ("tokenizer_config.json", lambda text: with_field(text, model_max_length="many"), "model_max_length='many'"),
        ("tokenizer_config.json", lambda text: with_field(text, model_max_length=True), "model_max_length=True"),
    ],
)
def test_of_a_damaged_one_text_says_why_and_windows_are_read(folder, file, change, said):
    (folder / file).write_text(change((folder / file).read_text()))
    tokenizer = load_tokenizer(str(folder))
    (folder / "text.txt").write_text("some words " * 100)
    with pytest.raises(ConversionError, match=f"the tokenizer of {folder} .*{said}.*tokenizer_config.json"):
        read_windows(str(folder / "text.txt"), tokenizer, Sampling(16, 2), 16, 2)
    with pytest.raises(ConversionError, match="cannot be loaded"):
        tokenizer("some words")
    assert len(read_windows(str(ROOT / "demo" / "sample_windows.safetensors"), tokenizer, Sampling(nsamples=2), 0, 2))


def with_field(text, **fields):
    return json.dumps({**json.loads(text), **fields})
