"""What comes from a Hub is compared with what its commit says, before it is used; busy servers are asked again."""

import json
import os
import re
import tracemalloc

import pytest
from faulty_hub import FaultyHub, WrongAnswer
from huggingface_hub import constants
from testing.checkpoints import build, hashes
from testing.hub_contents import File
from testing.tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from indexcache import SharePattern
from indexcache.cli import app
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io import hub_requests
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.hub_integrity import git_blob_id, is_commit_id
from indexcache.conversion.io.hub_source import HubSource
from indexcache.conversion.io.open_checkpoint import open_source
from indexcache.conversion.io.sources import ConversionError, FolderSource

PAGE = b"<!doctype html><html><body>Please sign in to the guest network.</body></html>"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture
def base(hub_here, tmp_path):
    """A checkpoint of three shards on the Hub; FFSF cuts the second and passes the others whole."""
    folder = build(tmp_path / "source", shards=3)
    hub_here.put(folder)
    return folder


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(hub_requests.time, "sleep", waited.append)
    return waited


def flip_last_bit(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def run_convert(output, **options):
    convert(open_source("tester/base"), output, ConvertOptions(SharePattern("FFSF"), **options))


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


DAMAGE = {
    "page": lambda data: PAGE,
    "page of the right length": lambda data: PAGE[: len(data)].ljust(len(data)),
    "shifted": lambda data: b"\n" + data[:-1],
    "cut": lambda data: data[:-1],
    "one bit": flip_last_bit,
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_arrives_otherwise_is_refused(base, hub_here, damage):
    hub_here.served["tokenizer_config.json"] = DAMAGE[damage]
    source = HubSource("tester/base")
    with pytest.raises(ConversionError, match=r"tokenizer_config\.json did not arrive as commit [0-9a-f]{8} holds it"):
        source.read_range("tokenizer_config.json", 0, source.size("tokenizer_config.json"))


@pytest.mark.parametrize("file", ["tokenizer.json", "README.md", "encoding/encoding_dsv32.py"])
def test_a_conversion_leaves_out_and_names_a_companion_that_arrives_otherwise(base, hub_here, tmp_path, file):
    hub_here.served[file] = lambda data: PAGE[: len(data)].ljust(len(data))
    with pytest.raises(ConversionError, match=rf"{re.escape(file)} did not arrive"):
        run_convert(tmp_path / "o")
    assert not {file, "config.json", f"{file}.partial"} & files_in(tmp_path / "o")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_config_and_index_that_arrive_otherwise_are_refused_before_anything_is_written(base, hub_here, tmp_path, file):
    hub_here.served[file] = lambda data: data.replace(b"model", b"Model", 1)
    with pytest.raises(ConversionError, match=rf"{re.escape(file)} did not arrive"):
        run_convert(tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("file", "options"),
    [(SHARDS[0], {}), (SHARDS[1], {}), (SHARDS[2], {"dtype": "float32"}), (SHARDS[2], {"max_shard_size": 30_000})],
)
def test_one_flipped_bit_in_a_shard_is_found_before_the_shard_is_used(base, hub_here, tmp_path, file, options):
    hub_here.served[file] = flip_last_bit
    with pytest.raises(ConversionError, match=rf"{file} did not arrive .*sha256 is [0-9a-f]{{64}} where"):
        run_convert(tmp_path / "o", **options)
    found = files_in(tmp_path / "o")
    assert "config.json" not in found
    assert not {file, f".indexcache_download/{file}"} & found, "what was fetched is not taken up again"

    # With the network mended the same command ends as an undisturbed one.
    hub_here.served.clear()
    run_convert(tmp_path / "o", resume=True, **options)
    convert(open_source("tester/base"), tmp_path / "whole", ConvertOptions(SharePattern("FFSF"), **options))
    assert hashes(tmp_path / "o") == hashes(tmp_path / "whole")


def test_a_header_read_ahead_must_be_the_shard_s_own(base, hub_here, tmp_path):
    """Two tensors of one size change places in the header that a range brings; the whole file is right."""
    whole = (base / SHARDS[0]).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    spans = {}
    for match in re.finditer(rb'"shape":\[\d+,\d+\],"data_offsets":\[\d+,\d+\]', whole[:length]):
        first, last = map(int, match[0].partition(b"offsets")[2].strip(b'":[]').split(b","))
        spans.setdefault((match[0].partition(b',"')[0], last - first, len(match[0])), []).append(match.span())
    (x, y), (u, v) = next(found for found in spans.values() if len(found) > 1)[:2]
    swapped = bytearray(whole)
    swapped[x:y], swapped[u:v] = whole[u:v], whole[x:y]
    answers = iter([bytes(swapped), bytes(swapped)])
    hub_here.served[SHARDS[0]] = lambda data: next(answers, data)
    with pytest.raises(ConversionError, match="read ahead, came otherwise than in the whole file"):
        run_convert(tmp_path / "o")
    assert not (tmp_path / "o" / SHARDS[0]).exists()


def test_shards_pass_without_being_read_twice_from_the_network_or_hashed_again(base, hub_here, tmp_path, monkeypatch):
    from indexcache.conversion.io import shard_writer

    hashed = []
    monkeypatch.setattr(shard_writer, "hash_file", lambda path, how="": hashed.append(path))
    run_convert(tmp_path / "o")
    assert hashed == []
    whole = [request for request in hub_here.requests if request.startswith("HEAD") and ".safetensors" in request]
    assert len(whole) == len(set(whole)) == 3
    recipe = json.loads((tmp_path / "o/indexcache_recipe.json").read_text())
    assert {name: entry["sha256"] for name, entry in recipe["shards"].items()} == {
        name: digest for name, digest in hashes(tmp_path / "o").items() if name in SHARDS
    }


def test_a_large_companion_is_checked_over_its_blocks(base, hub_here, tmp_path):
    (base / "tokenizer.json").write_bytes(b" " * (9 << 20))
    hub_here.put(base)
    hub_here.served["tokenizer.json"] = flip_last_bit
    with pytest.raises(ConversionError, match=r"tokenizer\.json did not arrive"):
        run_convert(tmp_path / "o")
    assert not (tmp_path / "o/tokenizer.json").exists()
    hub_here.served.clear()
    run_convert(tmp_path / "o", resume=True)
    assert (tmp_path / "o/tokenizer.json").stat().st_size == 9 << 20


@pytest.mark.parametrize("status", [200, 203, 204, 205, 206])
def test_an_answer_that_is_not_the_range_asked_for_is_refused(base, hub_here, waits, status):
    source = HubSource("tester/base")
    hub_here.answer("GET", "/resolve/.*safetensors", status=status, body=b"" if status in (204, 205) else bytes(8))
    with pytest.raises(ConversionError, match=rf"{SHARDS[0]} did not arrive.*status {status}"):
        source.read_range(SHARDS[0], 0, 8)
    assert waits == []


@pytest.mark.parametrize("told", ["bytes 8-15/100", "bytes 0-7/9", "bytes 0-6/{size}", "items 0-7/{size}", ""])
def test_a_range_of_another_place_is_refused(base, hub_here, told):
    source = HubSource("tester/base")
    size = source.size(SHARDS[0])
    hub_here.answer("GET", "/resolve/", status=206, body=bytes(8), Content_Range=told.format(size=size))
    with pytest.raises(ConversionError, match=r"did not arrive.*for bytes 0-7 of"):
        source.read_range(SHARDS[0], 0, 8)


@pytest.mark.parametrize("body", [bytes(7), bytes(9)])
def test_a_range_of_another_length_is_refused(base, hub_here, body):
    source = HubSource("tester/base")
    told = f"bytes 0-7/{source.size(SHARDS[0])}"
    hub_here.answer("GET", "/resolve/", status=206, body=body, Content_Range=told)
    with pytest.raises(ConversionError, match=r"did not arrive.*(7 bytes came where 8|more bytes came)"):
        source.read_range(SHARDS[0], 0, 8)


def test_a_server_without_ranges_is_refused_and_never_read_whole(base, hub_here):
    repo = hub_here.repos["model", "tester/base"]
    big = bytes(64 << 20)
    repo.commit("main", {"big.safetensors": File(big, lfs=True)}, "big")
    hub_here.ignores_ranges = True
    source = HubSource("tester/base")
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError, match="does not serve parts of a file"):
            source.read_range("big.safetensors", 0, 8)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "path",
    ["/api/models/tester/base$", "/api/models/tester/base/tree/", "/resolve/.*/config", "HEAD /resolve/.*00002"],
)
def test_a_busy_server_is_asked_again_when_it_says(base, hub_here, tmp_path, waits, path):
    method, _, path = path.rpartition(" ")
    hub_here.answer(method or "GET", path, status=503, body=b"", times=2, Retry_After="7")
    run_convert(tmp_path / "o")
    assert (tmp_path / "o/config.json").exists()
    # huggingface_hub adds a second where it is the one that waits.
    assert [wait for wait in waits if 7 <= wait <= 8] == waits[-2:] or method == "HEAD"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_every_busy_status_is_waited_out(base, hub_here, waits, status):
    source = HubSource("tester/base")
    hub_here.answer("GET", "/resolve/", status=status, body=b"", Retry_After="3")
    hub_here.answer("GET", "/resolve/", status=status, body=b"", RateLimit='"api";r=0;t=11')
    assert source.read_range("tokenizer.json", 0, 2) == b"{}"
    assert waits == [3, 11]


def test_waits_grow_where_the_server_says_nothing_and_end(base, hub_here, waits):
    source = HubSource("tester/base")
    hub_here.fail("GET", "/resolve/", status=503, times=99)
    with pytest.raises(ConversionError, match=r"config\.json cannot be read.*503"):
        source.read_range("config.json", 0, 9)
    assert waits == [1, 2, 4, 8, 8]


def test_what_is_not_there_is_not_asked_for_again(base, hub_here, waits):
    hub_here.fail("GET", "/resolve/", status=404, times=99)
    with pytest.raises(ConversionError, match=r"config\.json cannot be read"):
        HubSource("tester/base").read_range("config.json", 0, 9)
    assert waits == []


@pytest.mark.parametrize("commit", [None, "main", "None", "", "abc123", "G" * 40, 7, "0" * 39, "0" * 40 + "\n"])
def test_a_commit_that_is_no_commit_is_refused(base, hub_here, commit):
    hub_here.answer("GET", "/api/models/tester/base$", body={"id": "tester/base", "sha": commit, "siblings": []})
    with pytest.raises(ConversionError, match=r"answers as no Hub does .*as the commit of the main branch"):
        HubSource("tester/base")
    assert not is_commit_id(commit)


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {},
        [{"type": "file", "path": "config.json", "size": None, "oid": "0" * 40}],
        [{"type": "file", "path": "config.json", "size": 3, "oid": None}],
        [{"type": "file", "path": "config.json", "size": 3}],
        [{"type": "file", "path": "a", "size": 3, "oid": "0" * 40, "lfs": {"oid": "x", "size": 3, "pointerSize": 1}}],
        PAGE,
        b"",
    ],
)
def test_a_tree_that_cannot_be_checked_against_is_refused(base, hub_here, tree):
    hub_here.answer("GET", "/tree/", body=tree)
    with pytest.raises(ConversionError, match="answers as no Hub does"):
        HubSource("tester/base")


@pytest.mark.parametrize("status", [200, 204])
def test_a_proxy_s_page_in_place_of_the_hub_is_a_message(base, hub_here, tmp_path, status):
    hub_here.answer("GET", "/api/", status=status, body=b"" if status == 204 else PAGE, content_type="text/html")
    result = CliRunner().invoke(app, ["convert", "tester/base", str(tmp_path / "o"), "--keep", "1/2"])
    assert result.exit_code == 1
    assert "answers as no Hub does" in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("name", ["main", "None", "v1", "0" * 39])
def test_a_snapshot_folder_of_another_name_is_no_commit(tmp_path, name):
    snapshot = tmp_path / "models--lab--base/snapshots" / name
    snapshot.mkdir(parents=True)
    assert FolderSource(snapshot).revision is None
    right = snapshot.parent / ("a1" * 20)
    right.mkdir()
    assert FolderSource(right).revision == right.name


def test_git_blob_ids_are_git_s():
    assert git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize("status, passes", [(503, True), (401, False)])
def test_an_error_whose_body_is_no_text(tmp_path, monkeypatch, waits, status, passes):
    with FaultyHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.put("maker/base", build(tmp_path / "source", shards=3))
        # The answer says that it is an error, and carries the shard's bytes.
        hub.wrong.append(WrongAnswer("GET", "/resolve/.*safetensors$", status=status, times=1))
        source = open_source("maker/base")
        if passes:
            assert len(read_checkpoint(source).shards) == 3 and len(waits) == 1
        else:
            with pytest.raises(ConversionError, match=r"maker/base.*401"):
                read_checkpoint(source)


# ---- eval, search, distill and generate -----------------------------------------------------------------------------


TEXT = " ".join(f"w{(n * n // 7 + 3 * n) % 60}" for n in range(2000))


@pytest.fixture
def model_on_hub(hub_here, tmp_path, monkeypatch):
    """A model with tokenizer on the Hub, the folder that it came from, and an empty Hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("indexcache.conversion.io.hub_source.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    tiny_model(index_share_pattern="FFFF", vocab_size=64, eos_token_id=None).save_pretrained(
        folder, max_shard_size="200KB"
    )
    words = {f"w{n}": n for n in range(60)} | {"<unk>": 60}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    hub_here.put(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    return folder


def verbs_on_hub(folder):
    small = ["--data", folder / "text.txt", "--seqlen", 24, "--nsamples", 2, "--device", "cpu", "--no-pictures"]
    return {
        "eval": [*small, "--task", "perplexity", "--output", folder / "eval"],
        "search": [*small, "--keep", 2, "--no-curve", "--output", folder / "search"],
        "generate": ["w1 w2", "--max-new-tokens", 2, "--device", "cpu"],
        "distill": [
            *[folder / "distilled", "--data", folder / "text.txt", "--seqlen", 24, "--keep", 2, "--dense-steps", 1],
            *["--sparse-steps", 1, "--precision", "fp32", "--device", "cpu", "--no-tensorboard"],
        ],
    }


def run_on_hub(verb, folder):
    return CliRunner().invoke(app, [verb, "tester/base", *map(str, verbs_on_hub(folder)[verb])])


def test_every_verb_runs_on_a_hub_id_and_names_no_place_of_this_machine(model_on_hub, tmp_path):
    for verb in verbs_on_hub(tmp_path):
        finished = run_on_hub(verb, tmp_path)
        assert finished.exit_code == 0, (verb, finished.output, finished.exception)
    for path in (tmp_path / "distilled").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    assert json.loads((tmp_path / "eval/evaluation.json").read_text())["models"][0]["name"] == "tester/base"


@pytest.mark.parametrize("file", ["model-00002-of-", "tokenizer.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("verb", ["eval", "search", "generate", "distill"])
def test_no_verb_uses_a_file_that_arrives_otherwise(model_on_hub, hub_here, tmp_path, verb, file):
    name = next(path.name for path in sorted(model_on_hub.iterdir()) if path.name.startswith(file))
    # Of the right length, and valid: only its hash tells.
    hub_here.served[name] = flip_last_bit if "model-" in name else lambda data: data.replace(b"\n", b" ", 1)
    finished = run_on_hub(verb, tmp_path)
    assert finished.exit_code == 1, (finished.output, finished.exception)
    assert f"Hub repository tester/base: {name} did not arrive as commit" in finished.stderr
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}")), "what did not hold up is kept"
    for output in ("eval", "search", "distilled"):
        assert not (tmp_path / output).exists() or not list((tmp_path / output).rglob("*config.json"))

    hub_here.served.clear()
    source = HubSource("tester/base")
    assert (source.fetch([name]) / name).read_bytes() == (model_on_hub / name).read_bytes()


def test_what_was_spoilt_in_the_cache_is_fetched_again(model_on_hub, hub_here):
    name = next(path.name for path in model_on_hub.glob("model-00001-of-*"))
    whole = (model_on_hub / name).read_bytes()
    there = HubSource("tester/base").fetch([name, "config.json"]) / name
    there.resolve().write_bytes(flip_last_bit(whole))
    requests = len(hub_here.requests)
    again = HubSource("tester/base").fetch(["config.json", name])
    assert again == there.parent and there.read_bytes() == whole
    assert any(name in request for request in hub_here.requests[requests:])
    there.resolve().write_bytes(flip_last_bit(whole))
    hub_here.served[name] = flip_last_bit
    with pytest.raises(ConversionError, match=rf"{name} did not arrive"):
        HubSource("tester/base").fetch([name])
    assert not there.exists() and not os.path.lexists(there)


def test_a_file_of_another_commit_is_refused(model_on_hub, monkeypatch):
    source = HubSource("tester/base")
    there = source.fetch(["config.json"]) / "config.json"
    other = there.parent.with_name("0" * 40) / "config.json"
    other.parent.mkdir()
    other.write_bytes(there.read_bytes())
    monkeypatch.setattr(source, "_ask_for", lambda file: other)
    with pytest.raises(ConversionError, match=r"config\.json did not arrive .*as of another commit \(0{40}\)"):
        source.fetch(["config.json"])


def test_further_processes_of_a_machine_leave_the_contents_to_its_first(model_on_hub, monkeypatch):
    name = next(path.name for path in model_on_hub.glob("model-00001-of-*"))
    there = HubSource("tester/base").fetch([name]) / name
    spoilt = flip_last_bit(there.read_bytes())
    there.resolve().write_bytes(spoilt)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (HubSource("tester/base").fetch([name]) / name).read_bytes() == spoilt
    there.resolve().write_bytes(spoilt[:-1])
    assert (HubSource("tester/base").fetch([name]) / name).stat().st_size == len(spoilt)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (HubSource("tester/base").fetch([name]) / name).read_bytes() != spoilt


@pytest.mark.parametrize("status", [401, 404])
def test_a_tokenizer_that_does_not_come_is_named_with_its_request(model_on_hub, hub_here, tmp_path, waits, status):
    hub_here.fail("HEAD", "/resolve/.*tokenizer.json", status=status, times=99)
    finished = run_on_hub("eval", tmp_path)
    assert finished.exit_code == 1 and str(status) in finished.stderr, finished.output
    assert "Hub repository tester/base: tokenizer.json cannot be downloaded" in finished.stderr


def test_a_server_that_asks_for_a_day_is_not_waited_for(base, hub_here, waits):
    hub_here.answer("GET", "/resolve/", status=429, body=b"", times=99, Retry_After="86400")
    with pytest.raises(ConversionError, match=r"config\.json cannot be read.*429"):
        HubSource("tester/base").read_range("config.json", 0, 9)
    assert waits == []
