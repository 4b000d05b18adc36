"""Training windows: packing, documents kept apart, bad data."""

import json

import pytest
import torch
from safetensors.torch import save_file

from indexcache.distillation.data import IGNORED, load_training_data, pack_documents
from indexcache.distillation.recipe import Recipe
from indexcache.runs.errors import RunError
from indexcache.runs.windows.text_sources import TextInMemory
from indexcache.runs.windows.window_sources import Sampling


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def encode(self, text, add_special_tokens, verbose):
        return [ord(letter) - 96 for letter in text]


class Config:
    index_topk, max_position_embeddings, vocab_size = 2, 64, 27


def documents(*texts):
    return map(TextInMemory, texts)


def test_documents_follow_each_other_with_the_end_token_between():
    windows = pack_documents(documents("abc", "de", "fghij"), Letters(), seqlen=4, wanted=9)
    assert windows.ids.tolist() == [[1, 2, 3, 0, 4], [5, 0, 6, 7, 8]]
    item = windows[0]
    assert item["input_ids"].tolist() == [1, 2, 3, 0] and item["shift_labels"].tolist() == [2, 3, 0, 4]
    assert "position_ids" not in item and windows.seqlen == 4


def test_isolated_documents_start_anew_and_do_not_predict_the_next_one():
    windows = pack_documents(documents("abc", "de", "fghij"), Letters(), seqlen=4, wanted=9, isolate=True)
    first, second = windows[0], windows[1]
    assert first["position_ids"].tolist() == [0, 1, 2, 3] and first["shift_labels"].tolist() == [2, 3, 0, IGNORED]
    # A document that a window's edge cuts goes on as a new one.
    assert second["position_ids"].tolist() == [0, 1, 0, 1] and second["shift_labels"].tolist() == [0, IGNORED, 7, 8]


def test_reading_stops_when_there_is_enough():
    def endless():
        while True:
            yield TextInMemory("abc")

    assert len(pack_documents(endless(), Letters(), seqlen=7, wanted=3)) == 3


def recipe(**changes):
    return Recipe(**{"dense_steps": 2, "sparse_steps": 2, "seqlen": 4, **changes})


def load(data, held_out=None, tokenizer=None, **changes):
    return load_training_data(
        str(data), held_out and str(held_out), Config, tokenizer or Letters(), recipe(**changes), Sampling()
    )


def test_jsonl_and_windows_are_read(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": "abcdefgh"}) + "\n" for _ in range(8)))
    assert load(lines)[0].ids.shape == (4, 5)
    save_file({"train_ids": torch.randint(0, 27, (6, 9))}, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors", seqlen=None)[0].ids.shape == (6, 9)
    assert load(tmp_path / "w.safetensors")[0].ids.shape == (6, 5)


def test_bad_data_is_refused_with_what_and_why(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc")
    with pytest.raises(RunError, match="4 tokens, less than one window of 5"):
        load(text)
    text.write_text("abcdefghijklmnopqrstuvwxyz" * 4)
    with pytest.raises(RunError, match="fewer than the 40 of one micro-batch"):
        load(text, batch_size=40)
    with pytest.raises(RunError, match="no tokenizer"):
        load_training_data(str(text), None, Config, None, recipe(), Sampling())
    with pytest.raises(RunError, match="held-out windows are trained on too"):
        load(text, held_out=text)
    save_file({"train_ids": torch.full((6, 9), 99)}, tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"tokens 99 \.\. 99, the model knows 0 \.\. 26"):
        load(tmp_path / "w.safetensors")
    # A cast to 32 bits would make token 3 of the last one.
    save_file({"train_ids": torch.tensor([[1, 2, 3, 4, 2**32 + 3]]).repeat(6, 1)}, tmp_path / "w.safetensors")
    with pytest.raises(RunError, match=r"tokens 1 \.\. 4294967299, the model knows 0 \.\. 26"):
        load(tmp_path / "w.safetensors")
    with pytest.raises(RunError, match="does not say where documents begin"):
        load(tmp_path / "w.safetensors", isolate_documents=True)
    with pytest.raises(RunError, match="no file here"):
        load(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_steps": 0, "sparse_steps": 0}, "nothing to train"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"learning_rate": float("inf")}, "--learning-rate must be positive and finite"),
        ({"dense_learning_rate": float("nan")}, "--dense-learning-rate must be positive and finite"),
        ({"max_grad_norm": float("nan")}, "--max-grad-norm must be positive and finite"),
        ({"kl_weight": float("nan")}, "--kl-weight must be finite"),
        ({"kl_weight": -1.0}, "--kl-weight must be finite and at least 0"),
        ({"weight_decay": float("inf")}, "--weight-decay must be finite"),
        ({"adam_beta2": 1.0}, "adam_beta2 must lie in 0 .. 1"),
        ({"seed": -1}, "--seed must lie in 0 .."),
        ({"rise": float("nan")}, "--warmup-ratio must lie in 0 .. 1"),
        ({"rise": 1.5}, "--warmup-ratio must lie in 0 .. 1"),
        ({"schedule": "wsd"}, "--lr-scheduler-type must be one of"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(RunError, match=message):
        recipe(**changes)
