"""A checkpoint's tokenizer is loaded, or it is said why not."""

import shutil
import warnings
from pathlib import Path

import pytest

from indexcache.runs.windows.tokenizer import load_tokenizer

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"


def test_none_is_none_and_a_damaged_one_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(str(tmp_path)) is None
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1')
    with pytest.warns(UserWarning, match="the tokenizer of .* cannot be loaded"):
        assert load_tokenizer(str(tmp_path)) is None
