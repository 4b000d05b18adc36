"""generation_config.json is checked field by field before text is generated, and what it may say works."""

import json
import shutil
from pathlib import Path

import pytest
from testing.checkpoints import build, edit_json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.conversion.io.load_source import load_source
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.conversion.io.sources import ConversionError
from indexcache.runs.generation_settings import check_generation_settings

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base") / "source")


def check(source, sample=False, **settings):
    (source / "generation_config.json").write_text(json.dumps(settings))
    check_generation_settings(open_checkpoint(source), sample)


@pytest.mark.parametrize("name, value, due", [
    ("eos_token_id", [], "a whole number from -1 to 2147483647 or a list of such numbers"),
    ("eos_token_id", 1e308, "a whole number"),
    ("eos_token_id", True, "a whole number"),
    ("eos_token_id", [1, 2**63], "a list of such numbers"),
    ("pad_token_id", 2**63, "a whole number"),
    ("bos_token_id", "1", "a whole number"),
    ("suppress_tokens", [[1]], "a list of such numbers"),
    ("forced_eos_token_id", 10**6, "a whole number from 0 to"),
    ("bad_words_ids", [[]], "a list of lists"),
    ("bad_words_ids", [[10**6]], "a list of lists"),
    ("sequence_bias", [[[1], "x"]], "a list of pairs"),
    ("sequence_bias", [[[1], 2]], "a number with a decimal point"),
    ("top_k", "all", "a whole number"),
    ("min_length", -1, "a whole number from 0"),
    ("max_length", 0.5, "a whole number from 1"),
    ("max_time", "x", "seconds"),
    ("repetition_penalty", 0, "a decimal point from 0.01 to 100"),
    ("repetition_penalty", 2, "a decimal point from 0.01 to 100"),
    ("encoder_repetition_penalty", [1], "a number"),
    ("no_repeat_ngram_size", {}, "a whole number"),
    ("stop_strings", [""], "a list of texts"),
    ("exponential_decay_length_penalty", [1], "a factor"),
    ("exponential_decay_length_penalty", [1, 1.5], "give both or neither"),
    ("use_cache", "no", "true or false"),
    ("num_beams", 4, "1: one sequence is decoded"),
    ("num_beams", True, "1: one sequence is decoded"),
    ("cache_implementation", "static", "'dynamic'"),
    ("watermarking_config", {"a": 1}, "left out"),
    ("to_dict", 1, "left out: it is no setting"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(source, name, value, due):
    with pytest.raises(ConversionError) as caught:
        check(source, **{name: value})
    message = str(caught.value)
    assert message.startswith(f"{source}: generation_config.json has {name}") and due in message, message
    assert len(message) < 500


@pytest.mark.parametrize("name, value", [("top_k", -1), ("min_p", 2), ("typical_p", 0), ("eta_cutoff", 1)])
def test_settings_of_sampling_count_where_tokens_are_drawn(source, name, value):
    check(source, **{name: value})
    with pytest.raises(ConversionError, match=rf"generation_config\.json has {name}={value}: it must be"):
        check(source, sample=True, **{name: value})


def test_without_the_file_the_config_s_tokens_count(tmp_path):
    source = build(tmp_path / "s")
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", eos_token_id=[])
    with pytest.raises(ConversionError, match=r"config\.json has eos_token_id=\[\]: it must be"):
        check_generation_settings(open_checkpoint(source), False)


EVERYTHING = {
    "bos_token_id": 0, "eos_token_id": [0, 1], "pad_token_id": -1, "do_sample": True, "temperature": 0.0,
    "suppress_tokens": [3, 4], "begin_suppress_tokens": [5], "forced_eos_token_id": 7, "bad_words_ids": [[8], [9, 10]],
    "sequence_bias": [[[11], 2.0], [[12, 13], -1.0]], "min_length": 1, "min_new_tokens": 1, "max_length": 500,
    "max_time": 1e300, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "stop_strings": ["zzz", "yy"],
    "exponential_decay_length_penalty": [1, 1.5], "use_cache": False, "renormalize_logits": True, "num_beams": 1,
    "remove_invalid_values": True, "output_scores": True, "return_dict_in_generate": True, "guidance_scale": 1.0,
    "cache_implementation": "dynamic", "top_k": 20, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4, "top_h": 0.5, "transformers_version": "4.0", "_from_model_config": True,
}  # fmt: skip


@pytest.mark.parametrize("sample", [[], ["--sample", "--temperature", "0.7", "--top-p", "0.9"]])
def test_what_is_let_through_works(tmp_path, sample):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    (source / "generation_config.json").write_text(json.dumps(EVERYTHING))
    words = ["generate", str(source), "import", "--max-new-tokens", "3", "--device", "cpu", *sample]
    finished = CliRunner().invoke(app, words)
    assert finished.exit_code == 0, finished.output


def test_stop_strings_that_the_tokenizer_cannot_look_for(source):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (source / "generation_config.json").write_text('{"stop_strings": "a"}')
    with pytest.raises(ConversionError, match=r"generation_config\.json has stop_strings='a', which cannot be looked"):
        check_generation_settings(open_checkpoint(source), False, PreTrainedTokenizerFast(tokenizer_object=words))


def test_the_verb_says_so(tmp_path):
    source = Path(shutil.copytree(DEMO, tmp_path / "source"))
    (source / "generation_config.json").write_text('{"eos_token_id": []}')
    finished = CliRunner().invoke(app, ["generate", str(source), "import", "--device", "cpu"])
    assert finished.exit_code == 1 and "generation_config.json has eos_token_id=[]" in finished.stderr


@pytest.mark.parametrize("settings", ['{"early_stopping": "x"}', '{"max_new_tokens": "x"}', '{"streamer": 1}'])
def test_what_transformers_says_of_it_names_the_file(source, settings):
    (source / "generation_config.json").write_text(settings)
    with pytest.raises(
        ConversionError, match=r"generation_config\.json cannot be used \((Value|Type)Error: .*fix it$"
    ):
        load_source(source)
