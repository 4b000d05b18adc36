"""What of a checkpoint's folder goes to the Hub, and that nothing else does."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from testing.checkpoints import build
from testing.tiny_models import tiny_model

from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.open_checkpoint import open_source
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.publish.hub import check_contents, push_folder
from indexcache.conversion.publish.hub_contents import hub_contents

TOKEN = "hf_" + "aB3dE5gH" * 4


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint of several shards with tokenizer, chat encoding, card and recipe."""
    base = tmp_path_factory.mktemp("base")
    output = base / "output"
    convert(open_source(build(base / "source", shards=3)), output, ConvertOptions())
    return output


@pytest.fixture
def folder(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "checkpoint"))


def contents_of(folder):
    return hub_contents(read_checkpoint(FolderSource(folder)), folder)


def test_a_finished_conversion_goes_whole(folder):
    contents = contents_of(folder)
    every = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert contents.files == every
    assert contents.left == {}
    assert "encoding/encoding_dsv32.py" in every


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".env", "hidden"),
        (".git/config", "hidden or a cache"),
        (".cache/huggingface/token", "hidden or a cache"),
        ("training/joint/checkpoint-3/optimizer.pt", "training state"),
        ("training/joint/checkpoint-3/model.safetensors", "training state"),
        ("training/joint/checkpoint-3/tokenizer.json", "training state"),
        ("checkpoint-3/config.json", "not part of a checkpoint"),
        ("training_args.bin", "may hold pickled objects"),
        ("rng_state.pth", "may hold pickled objects"),
        ("encoding/state.pkl", "may hold pickled objects"),
        ("encoding/.env", "hidden"),
        ("runs/joint/events.out.tfevents.1.host", "not part of a checkpoint"),
        ("model-00009-of-00009.safetensors", "weights that the index does not name"),
        ("adapters.safetensors", "weights that the index does not name"),
        ("scratch.py", "code that the model does not import"),
        ("notes.txt", "not part of a checkpoint"),
        ("credentials.json", "not part of a checkpoint"),
        ("journal.jsonl", "not part of a checkpoint"),
        (os.fsdecode(b"encoding/\xff.py"), "its name is no UTF-8"),
        ("__pycache__/share_pattern.cpython-311.pyc", "hidden or a cache"),
    ],
)
def test_what_is_none_of_the_hub_s_business_stays_and_is_named(folder, hub_here, name, reason):
    before = contents_of(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({"password": "x"}))
    contents = contents_of(folder)
    assert contents.files == before.files
    ((entry, why),) = contents.left.items()
    assert name.startswith(entry)
    assert why == reason

    push_folder(folder, "tester/small")
    repo = hub_here.repos["model", "tester/small"]
    assert set(repo.commits[repo.refs["main"]]) - {".gitattributes"} == set(before.files)


def test_links_that_lead_outside_stay(folder, tmp_path, hub_here):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    before = contents_of(folder).files
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    (folder / "encoding/more.py").symlink_to(tmp_path / "secret")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.png").symlink_to(tmp_path / "absent")
    (folder / "LICENSE-copy").symlink_to("LICENSE")
    contents = contents_of(folder)
    assert contents.files == before | {"LICENSE-copy": 4}
    assert contents.left == {
        "NOTICE": f"a link to {tmp_path / 'secret'}, outside the folder",
        "encoding/more.py": f"a link to {tmp_path / 'secret'}, outside the folder",
        "additional_chat_templates/": "a link to a folder",
        "broken.png": "a broken link",
    }
    push_folder(folder, "tester/small")
    repo = hub_here.repos["model", "tester/small"]
    sent = repo.commits[repo.refs["main"]]
    assert set(sent) - {".gitattributes"} == set(contents.files)
    assert sent["LICENSE-copy"].data == b"MIT\n"


def test_a_pipe_is_not_read(folder):
    import os

    os.mkfifo(folder / "LICENSE.pipe")
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    pipes = dict.fromkeys(("LICENSE.pipe", "tokenizer_config.json"), "no regular file")
    assert contents_of(folder).left == pipes


def test_names_that_look_like_patterns_are_taken_literally(folder, hub_here):
    """`[S]*` as a pattern would take `SECRET.txt` along and leave the file itself."""
    (folder / "LICENSE[S]*").write_text("a licence")
    (folder / "LICENSES").mkdir()
    (folder / "LICENSES/key").write_text("x")
    push_folder(folder, "tester/small")
    repo = hub_here.repos["model", "tester/small"]
    sent = repo.commits[repo.refs["main"]]
    assert sent["LICENSE[S]*"].data == b"a licence"
    assert "LICENSES/key" not in sent


def test_records_and_the_card_s_pictures_go_along(folder):
    (folder / "images").mkdir()
    for name in ("training_log.json", "report.html", "curve.png", "images/loss.svg", "images/other.svg"):
        (folder / name).write_text("x")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n![loss](images/loss.svg) ![up](../notes.png) ![key](.env)\n")
    contents = contents_of(folder)
    assert {"training_log.json", "report.html", "curve.png", "images/loss.svg"} <= contents.files.keys()
    assert contents.left == {"images/other.svg": "not part of a checkpoint"}


def test_the_tokenizer_s_own_code_goes_along(folder):
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": [null, "tokenization_own.OwnTokenizer"]}}'
    )
    with pytest.raises(ConversionError, match=r"lacks code(.|\n)*tokenization_own\.py"):
        contents_of(folder)
    (folder / "tokenization_own.py").write_text("from .own_words import words\n")
    (folder / "own_words.py").write_text("words = []\n")
    assert {"tokenization_own.py", "own_words.py"} <= contents_of(folder).files.keys()


def test_code_that_is_named_and_lacks_is_said_with_who_names_it(folder):
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": ["a.b"]}))
    with pytest.raises(ConversionError, match=r"a\.py, for 'a\.b' in the auto_map of tokenizer_config\.json"):
        check_contents(folder)


@pytest.mark.parametrize("model_type", [2**31, "\x1b[2J", None, ["deepseek_v32"], "llama"])
def test_what_is_no_checkpoint_of_ours_is_not_sent(folder, hub_here, model_type):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ConversionError, match=r"config\.json has model_type=.*accepted: deepseek_v32"):
        push_folder(folder, "tester/pushed")
    assert not hub_here.requests


@pytest.mark.parametrize("name", ["README.md", "indexcache_recipe.json", "tokenizer_config.json", "share_pattern.py"])
def test_a_token_in_a_file_stops_the_push_and_is_not_repeated(folder, hub_here, name):
    path = folder / name
    path.write_text(f'{{"a": "{TOKEN}"}}' if name.endswith(".json") else f"{path.read_text()}# {TOKEN}\n")
    with pytest.raises(ConversionError, match=f"{name} holds a Hub token: nothing was sent") as refusal:
        push_folder(folder, "tester/small")
    assert TOKEN not in str(refusal.value)
    assert hub_here.requests == []


def test_the_token_in_use_is_looked_for_whatever_its_form(folder):
    (folder / "README.md").write_text("api_org_0123456789abcdef0123\n")
    check_contents(folder)
    with pytest.raises(ConversionError, match="holds a Hub token"):
        check_contents(folder, token="api_org_0123456789abcdef0123")


def test_what_transformers_saves_goes_whole(tmp_path):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path)
    contents = contents_of(tmp_path)
    assert set(contents.files) == {path.name for path in tmp_path.iterdir()}


def test_a_snapshot_in_the_cache_is_sent_through_its_links(folder, tmp_path):
    cached = tmp_path / "models--tester--small"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / ("0" * 40)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = cached / "blobs" / str(number)
        blob.write_bytes(path.read_bytes())
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(blob)
    assert contents_of(snapshot).files == contents_of(folder).files
