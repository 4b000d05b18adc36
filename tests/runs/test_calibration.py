"""Windows from every kind of data, and what bad data are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from indexcache.runs.errors import RunError
from indexcache.runs.windows.calibration import load_windows, short_window_warning
from indexcache.runs.windows.window_sources import Sampling
from indexcache.runs.windows.windows import Windows

CONFIG = SimpleNamespace(index_topk=4, max_position_embeddings=64, vocab_size=128)


class Bytes:
    """A tokenizer: one token a character."""

    eos_token_id = 0

    def encode(self, text, **_):
        return [min(127, ord(character)) for character in text]


TOKENIZER = Bytes()


def load(data, held_out=None, tokenizer=TOKENIZER, config=CONFIG, **sampling):
    return load_windows(
        str(data), config, tokenizer, Sampling(**sampling), None if held_out is None else str(held_out)
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + (i * i + i // 7) % 90) for i in range(4000)))
    return path


@pytest.fixture
def tensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "windows.safetensors"
    save_file(
        {
            f"{name}_{kind}": torch.randint(0, high, (count, 33), generator=generator, dtype=torch.int32)
            for name, count in (("test", 6), ("calibration", 10))
            for kind, high in (("ids", 128), ("recall", 2))
        },
        path,
    )
    return path


def test_text_gives_disjoint_windows_and_a_fourth_more_held_out(text):
    calibration, held_out = load(text, seqlen=32, nsamples=8)
    assert calibration.ids.shape == (8, 33) and held_out.ids.shape == (2, 33)
    rows = {tuple(row) for row in torch.cat((calibration.ids, held_out.ids)).tolist()}
    assert len(rows) == 10


def test_windows_are_long_unless_told(text):
    calibration, _ = load(text, nsamples=4)
    assert calibration.seqlen == 64, "32 x top-k, at most the model's longest context"


def test_the_seed_chooses(text):
    first, again, other = (load(text, seqlen=32, nsamples=8, seed=seed)[0] for seed in (1, 1, 2))
    assert first.sha256() == again.sha256() != other.sha256()


def test_few_windows_are_shared_out(text):
    calibration, held_out = load(text, seqlen=700)
    assert (len(calibration), len(held_out)) == (4, 1)


def test_jsonl_takes_long_documents_first(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"body": "short"}] * 40 + [{"body": chr(65 + i) * 33} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, records)))
    calibration, held_out = load(path, seqlen=32, nsamples=4, text_field="body")
    for row in torch.cat((calibration.ids, held_out.ids)):
        assert len(row.unique()) == 1, "every window lies in one document"
    packed, _ = load(path, seqlen=40, nsamples=2, text_field="body")
    assert 0 in packed.ids, "shorter documents are packed with the end-of-text token between them"


def test_tensors_are_taken_as_they_are(tensors):
    calibration, held_out = load(f"{tensors}:test", held_out=f"{tensors}:calibration")
    assert len(calibration) == 6 and len(held_out) == 10
    assert calibration.recall.dtype == torch.bool and calibration.recall_tokens > 0
    assert load(tensors)[0].seqlen == 32 and len(load(tensors)[0]) == 8, "calibration where nothing is chosen"
    cut, rest = load(tensors, seqlen=16, nsamples=4)
    assert cut.seqlen == rest.seqlen == 16 and len(cut) == 4


def test_tensors_without_a_name_are_taken_too(tmp_path):
    path = tmp_path / "windows.safetensors"
    ids = torch.arange(99).view(3, 33)
    save_file({"ids": ids, "recall": ids % 7 == 0, "test_ids": ids + 1}, path)
    unnamed, named = load(path, held_out=f"{path}:test")
    assert torch.equal(unnamed.ids, ids) and unnamed.recall_tokens > 0 and unnamed.origin == path.name
    assert torch.equal(named.ids, ids + 1) and named.recall is None


def test_a_dataset_by_name(monkeypatch, text):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(path, **arguments):
        asked.update(path=path, **arguments)
        return ({"text": text.read_text()[start : start + 200]} for start in range(0, 3000, 200))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    calibration, _ = load("org/name:small", seqlen=32, nsamples=4, split="validation")
    assert len(calibration) == 4
    assert asked == {"path": "org/name", "name": "small", "split": "validation", "streaming": True}
    with pytest.raises(RunError, match=r"no field 'body' .it has text."):
        load("org/name", text_field="body")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", {}, "is empty"),
        ("  \n", {}, "is empty"),
        ("too short", {"seqlen": 32}, "gives 9 tokens, less than one window of 33"),
        ("x" * 50, {"seqlen": 32}, "one window of 33 tokens, and a second is needed"),
        ("x" * 50, {"seqlen": 0}, "--seqlen must be at least 1"),
        ("x" * 50, {"nsamples": 0}, "--nsamples must be at least 1"),
    ],
)
def test_bad_text(tmp_path, content, arguments, message):
    path = tmp_path / "text.txt"
    path.write_text(content)
    with pytest.raises(RunError, match=message):
        load(path, **arguments)


def test_bad_files(tmp_path, tensors, text):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"other": "bad"}\n')
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"a_ids": torch.zeros(2, 9)}, tmp_path / "floats.safetensors")
    for data, message in (
        (tmp_path / "absent.txt", "is no file here and no dataset's name"),
        (tmp_path, "cannot be read"),
        (tmp_path / "binary.txt", "no readable UTF-8"),
        (tmp_path / "broken.safetensors", "no readable safetensors"),
        (tmp_path / "absent.safetensors", "does not exist"),
        (tmp_path / "other.safetensors", "holds no NAME_ids"),
        (tmp_path / "floats.safetensors", "ids must be integers"),
        (tmp_path / "broken.jsonl", "line 2: the record has no field 'text'"),
        (f"{tensors}:train", "holds no train_ids"),
    ):
        with pytest.raises(RunError, match=message):
            load(data, seqlen=8)
    with pytest.raises(RunError, match="shorter than --seqlen 64"):
        load(tensors, seqlen=64)
    with pytest.raises(RunError, match="made with another tokenizer"):
        load(tensors, config=SimpleNamespace(**{**vars(CONFIG), "vocab_size": 16}))
    with pytest.raises(RunError, match=r"10 held-out windows are calibration windows too: .*--held-out .*--nsamples"):
        load(tensors, held_out=tensors)
    with pytest.raises(RunError, match="has no tokenizer"):
        load(text, tokenizer=None)


def test_marks_must_fit():
    with pytest.raises(RunError, match="recall mask must have the shape of ids"):
        Windows(torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bool))


def test_short_windows_are_warned_of_loudly():
    assert short_window_warning(2048, 64) is None
    assert "SHORT" in short_window_warning(200, 64) and "--seqlen 256" in short_window_warning(200, 64)
    assert "EVERY PATTERN SCORES THE SAME" in short_window_warning(64, 64)
