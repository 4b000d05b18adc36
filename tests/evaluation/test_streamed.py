"""`indexcache eval --stream`: scores bit for bit those of the model in memory, and how many sweeps they take."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from testing.checkpoints import build
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.conversion.io.open_checkpoint import open_checkpoint
from indexcache.runs.errors import RunError
from indexcache.runs.fingerprint import model_sha256
from indexcache.runs.loading import Placement, load_model
from indexcache.runs.streaming.streamed_forwards import StreamedForwards, stream_model, streamed_sha256

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"


def evaluate(*arguments):
    finished = CliRunner().invoke(app, ["eval", *map(str, arguments), "--no-pictures", "--json"])
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout)


def without_cost(document):
    return {key: value for key, value in document.items() if key not in ("date", "versions", "seconds", "streaming")}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fp8") / "c", fp8=True, qk_rope_head_dim=16, moe_intermediate_size=32)


@pytest.fixture(scope="module")
def random_windows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "windows.safetensors"
    ids = torch.randint(2, 64, (3, 41), generator=torch.Generator().manual_seed(5))
    save_file({"own_ids": ids}, path)
    return path


def test_the_demo_is_scored_the_same(tmp_path):
    data = Path(json.__file__)
    text = tmp_path / "text.txt"
    text.write_text(data.read_text())
    given = (DEMO, "--data", text, "--seqlen", 80, "--nsamples", 3, "--pattern", "FFSSSSFFSSSS")
    tasks = ("--task", "perplexity", "--task", "overlap")
    whole = evaluate(*given, *tasks, "--output", tmp_path / "whole")
    streamed = evaluate(*given, *tasks, "--output", tmp_path / "streamed", "--stream")
    assert without_cost(streamed) == without_cost(whole)
    # The hash, the windows of both patterns together, and overlap's two windows one by one.
    assert streamed["streaming"][0]["sweeps"] == 1 + 1 + 2
    assert streamed["streaming"][0]["bytes_read"] > sum(file.stat().st_size for file in DEMO.glob("*.safetensors"))
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in ("whole", "streamed")]
    assert journals[0] == journals[1]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_block_fp8_is_scored_the_same(fp8, random_windows, tmp_path, batch_size):
    given = (fp8, "--data", f"{random_windows}:own", "--pattern", "FSFS", "--batch-size", batch_size)
    given += ("--task", "perplexity", "--dtype", "bfloat16")
    whole = evaluate(*given, "--output", tmp_path / "whole")
    streamed = evaluate(*given, "--output", tmp_path / "streamed", "--stream")
    assert without_cost(streamed) == without_cost(whole)
    assert streamed["streaming"][0]["sweeps"] == 2
    again = evaluate(*given, "--output", tmp_path / "streamed", "--stream", "--resume")
    assert again["perplexity"] == whole["perplexity"]
    assert again["streaming"][0]["sweeps"] == 1, "nothing was left to run"


def test_retrieval_is_streamed_too(tmp_path):
    given = (DEMO, "--task", "retrieval", "--length", 96, "--samples", 1, "--depths", 2)
    whole = evaluate(*given, "--output", tmp_path / "whole")
    streamed = evaluate(*given, "--output", tmp_path / "streamed", "--stream")
    assert without_cost(streamed) == without_cost(whole)


def test_forwards_share_sweeps_as_far_as_there_is_room(fp8):
    opened = open_checkpoint(fp8)
    model = load_model(opened)
    ids = torch.randint(2, 64, (5, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = [model.model(input_ids=row[None], use_cache=False).last_hidden_state for row in ids]
        for room, sweeps in ((0, 5), (2**30, 1)):
            source = stream_model(opened, Placement())
            forwards = StreamedForwards(source, room)
            forwards.expect(("FFFF", row[None]) for row in ids)
            for row, hidden in zip(ids, expected):
                found = source.model.model(input_ids=row[None], use_cache=False).last_hidden_state
                assert torch.equal(found, hidden)
            assert source.sweeps == sweeps and source.most_alive == 2
            source.close()


@pytest.mark.parametrize("kind", ["demo", "fp8"])
def test_the_hash_is_that_of_the_model_in_memory(kind, fp8):
    opened = open_checkpoint(DEMO if kind == "demo" else fp8)
    source = stream_model(opened, Placement())
    assert streamed_sha256(source) == model_sha256(load_model(opened))
    assert source.sweeps == 1
    source.close()


def test_several_devices_are_refused(fp8):
    with pytest.raises(RunError, match="--stream runs on one device"):
        stream_model(open_checkpoint(fp8), Placement(tensor_parallel=True))
