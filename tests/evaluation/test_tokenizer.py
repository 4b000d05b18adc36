"""A checkpoint's tokenizer is loaded, or it is said why not."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.checkpoint import FolderSource
from indexcache.conversion.convert import ConvertOptions, convert
from indexcache.evaluation.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"


def test_a_tokenizer_whose_config_names_no_class(tmp_path, run_python):
    """Then the model's config decides, whose type transformers does not know of itself."""
    convert(FolderSource(DEMO), tmp_path / "out", ConvertOptions(SharePattern.uniform(12, "1/3"), copy=True))
    path = tmp_path / "out" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for name in ("tokenizer_class", "auto_map"):
        config.pop(name, None)
    path.write_text(json.dumps(config))
    script = """
sys.argv = ["indexcache", *sys.argv[1:]]
from indexcache.evaluation.tokenizer import load_tokenizer
print(len(load_tokenizer(sys.argv[1]).encode("import json", add_special_tokens=False)))
"""
    expected = len(load_tokenizer(str(DEMO)).encode("import json", add_special_tokens=False))
    assert run_python(script, tmp_path / "out", installed=True).stdout.split()[-1] == str(expected)


def test_none_is_none_and_a_damaged_one_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(str(tmp_path)) is None
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.warns(UserWarning, match="the tokenizer of .* cannot be loaded"):
        assert load_tokenizer(str(tmp_path)) is None
