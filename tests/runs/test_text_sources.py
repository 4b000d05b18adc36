"""Texts as they are written: JSON lines, chats, nulls, Parquet, folders; long ones in parts, tokenised as needed."""

import json
import random
import resource
import tracemalloc

import pytest

from indexcache.runs.errors import RunError
from indexcache.runs.windows.text_sources import TextFile, TextInMemory, documents_of
from indexcache.runs.windows.window_sources import PART_SIZE, Sampling, part_size, read_windows


class Letters:
    """One token a character; counts what it reads."""

    eos_token_id = 0
    chat_template = None

    def __init__(self):
        self.read = 0

    def encode(self, text, **_):
        self.read += len(text)
        return list(map(ord, text))


class Chats(Letters):
    chat_template = "some"

    def apply_chat_template(self, messages, tokenize):
        if any(message["role"] not in ("user", "assistant") for message in messages):
            raise ValueError("unknown role")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def texts(data, tokenizer=None, **options):
    return [part for one in documents_of(str(data), tokenizer or Letters(), **options) for part in one.parts(2**20)]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# ---- JSON lines ---------------------------------------------------------------------------------------------------


def test_a_newline_ends_a_line_and_nothing_else_does(tmp_path):
    """U+2028, U+2029 and NEL may stand in a JSON string as they are, form feeds escaped."""
    strange = ["a\u2028b", "c\u2029d", "e\x85f", "g\x7fh", "i\u000bj\u000ck"]
    assert texts(write_lines(tmp_path / "data.jsonl", *({"text": text} for text in strange))) == strange
    (tmp_path / "dos.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert texts(tmp_path / "dos.jsonl") == ["one", "two"]


def test_a_null_is_no_text_and_other_values_are_not_made_one(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", {"text": None}, {"text": "some"}, {"text": ""})
    assert texts(data) == ["some", ""]
    for value, kind in (
        (5, "a int, 5"),
        ({"a": 1}, "a dict"),
        (["x", "y"], "a list"),
        (True, "a bool"),
        ([], "a list"),
    ):
        data = write_lines(tmp_path / "data.jsonl", {"text": "good"}, {"text": value})
        with pytest.raises(RunError, match=rf"data.jsonl, line 2: field 'text' holds {kind}.*--text-field"):
            texts(data)


def test_chats_become_text_by_the_tokenizers_template(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data = write_lines(tmp_path / "chat.jsonl", {"messages": chat, "id": 1})
    assert texts(data, Chats()) == ["<user>hi<assistant>yes"]
    assert texts(write_lines(tmp_path / "other.jsonl", {"talk": chat}), Chats(), field="talk") == texts(data, Chats())
    with pytest.raises(RunError, match=r"line 1 holds chat messages, and .* no chat template"):
        texts(data)
    with pytest.raises(RunError, match=r"line 1: the tokenizer's chat template refuses .* unknown role"):
        texts(write_lines(data, {"messages": [{"role": "robot", "content": "?"}]}), Chats())


def test_chats_where_a_text_is_meant_are_no_text(tmp_path):
    data = write_lines(tmp_path / "chat.jsonl", {"text": [{"role": "user", "content": "hi"}]})
    with pytest.raises(RunError, match=r"chat.jsonl, line 1: field 'text' holds chat messages where a text"):
        texts(data, Chats())


@pytest.mark.parametrize("data", ["", " "])
def test_no_name_names_no_data(data):
    with pytest.raises(RunError, match=rf"'{data}' names no data"):
        documents_of(data, Letters())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half', "no JSON"),
        (b'{"text": "\xff"}', "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'["text"]', "a JSON object belongs there"),
        (b'{"body": "x"}', r"no field 'text' \(it has body\)"),
        (b'{"text": "x\\ud800y"}', "half of a surrogate pair"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line, message):
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(RunError, match=rf"data.jsonl, line 2: .*{message}"):
        texts(data)


def test_a_gigantic_line_is_held_once_more_than_its_text(tmp_path):
    data = tmp_path / "data.jsonl"
    size = 2**25
    data.write_bytes(b'{"text": "' + b"word " * (size // 5) + b'"}\n')
    tracemalloc.start()
    windows = read_windows(str(data), Letters(), Sampling(100, 2), 100, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # While a line is parsed there are its bytes, its text and the string in it.
    assert len(windows) == 2 and peak < 4 * size


# ---- other files --------------------------------------------------------------------------------------------------


def test_what_datasets_reads(tmp_path):
    pytest.importorskip("datasets")
    pandas = pytest.importorskip("pandas")
    rows = {"text": ["one", None, "three"], "n": [1, 2, 3]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["one", "three"]
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "first"}, {"text": "second"}]))
    assert texts(tmp_path / "rows.json") == ["first", "second"], "not the brackets and quotes of the file"
    (tmp_path / "rows.csv").write_text("text,n\nhere,1\n")
    assert texts(tmp_path / "rows.csv") == ["here"]
    with pytest.raises(RunError, match=r"rows.parquet, record 1: field 'n' holds a int"):
        texts(tmp_path / "rows.parquet", field="n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(RunError, match=r"broken.parquet cannot be read"):
        texts(tmp_path / "broken.parquet")


def test_folders_of_data_and_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "org" / "data"
    folder.mkdir(parents=True)
    write_lines(folder / "train.jsonl", {"text": "train"})
    write_lines(folder / "test.jsonl", {"text": "test"})
    assert texts(folder) == ["train"] and texts(folder, split="test") == ["test"]
    table = datasets.Dataset.from_dict({"text": ["saved"]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": table}).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "one") == ["saved"]
    assert texts(tmp_path / "several", split="validation") == ["saved"]
    with pytest.raises(RunError, match=r"no split 'train' .it has validation"):
        texts(tmp_path / "several")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty cannot be read"):
        texts(tmp_path / "empty")


def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for data in (tmp_path / "rows.parquet", tmp_path, "org/name"):
        with pytest.raises(RunError, match="pip install datasets"):
            documents_of(str(data), Letters())


# ---- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit", ["line of some words\n", "wörter ünd\r\n\r\n  mehr\n", "nobreak", "日本語", "a b ", "x\n\n\n \n"]
)
def test_parts_of_a_long_text_are_the_text(tmp_path, unit):
    text = (unit * 2**20)[: 2**20 + 12345]
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    read = text.replace("\r\n", "\n").replace("\r", "\n")
    for document, whole in ((TextFile(path), read), (TextInMemory(text), text)):
        parts = list(document.parts(200_000))
        assert "".join(parts) == whole and len(parts) > 4
        shuffled = list(document.parts(200_000, random.Random(1)))
        assert sorted(shuffled) == sorted(parts)
        if "line" in unit:
            assert all(part.endswith("\n") for part in parts[:-1])
        assert list(document.parts(2**30)) == [whole]


def test_of_a_long_text_only_what_is_needed_is_tokenised(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%d is a number\n" % number for number in range(3_000_000)))
    assert path.stat().st_size > 50 * PART_SIZE
    tokenizer = Letters()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    windows = read_windows(str(path), tokenizer, Sampling(100, 2), 100, 2)
    # ru_maxrss is in kilobytes; a part's tokens as Python numbers are some 40 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000
    assert windows.ids.shape == (2, 101) and tokenizer.read < 3 * PART_SIZE
    again = read_windows(str(path), Letters(), Sampling(100, 2), 100, 2)
    other = read_windows(str(path), Letters(), Sampling(100, 2, seed=5), 100, 2)
    assert windows.sha256() == again.sha256() != other.sha256()
    assert part_size(2**20) == 2**25, "a part holds several windows, however long they are"


def test_an_ordinary_text_gives_the_windows_that_it_always_gave(tmp_path):
    """Every window of the whole text may be chosen, as `random.sample` chooses."""
    text = "".join(chr(33 + (i * i + i // 7) % 90) for i in range(300_000))
    (tmp_path / "text.txt").write_text(text)
    found = read_windows(str(tmp_path / "text.txt"), Letters(), Sampling(50, 8, seed=3), 50, 8)
    size = 51
    whole = [list(map(ord, text[at : at + size])) for at in range(0, len(text) - size + 1, size)]
    assert found.ids.tolist() == random.Random(3).sample(whole, 8)
