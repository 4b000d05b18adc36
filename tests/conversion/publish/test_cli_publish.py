"""The verbs that hand a checkpoint on: generate, push, export."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import indexcache
from indexcache import SharePattern
from indexcache.cli import app
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.open_checkpoint import open_source

DEMO = Path(indexcache.__file__).parent / "demo" / "dsa_demo"
PROMPT = "The :class:`dict` type"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "demo"
    convert(open_source(DEMO), folder, ConvertOptions(pattern=SharePattern("FFSSSSFFSSSS")))
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_generate_prints_the_model_s_continuation(checkpoint):
    result = run("generate", checkpoint, PROMPT, "--max-new-tokens", 6, "--device", "cpu")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    tokens = model.generate(
        **tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=6, do_sample=False
    )
    assert result.stdout.strip() == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def test_generate_samples_the_same_from_the_same_seed_and_reads_stdin(checkpoint):
    arguments = ["generate", str(checkpoint), "-", "--max-new-tokens", "8", "--sample", "--device", "cpu", "--seed"]
    outputs = [CliRunner().invoke(app, [*arguments, seed], input=PROMPT).stdout for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].startswith(PROMPT)


@pytest.mark.parametrize(
    ("pattern", "complaint"), [("FFF", "3 characters for num_hidden_layers=12"), ("F" * 12, "indexer")]
)
def test_generate_refuses_a_pattern_that_the_checkpoint_cannot_run(checkpoint, pattern, complaint):
    result = run("generate", checkpoint, PROMPT, "--pattern", pattern, "--device", "cpu")
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


def test_push_gives_the_commit_s_address(checkpoint, hub_here):
    result = run("push", checkpoint, "tester/demo", "--private", "--revision", "quarter", "--json")
    assert result.exit_code == 0, result.output
    repo = hub_here.repos["model", "tester/demo"]
    assert repo.private
    document = json.loads(result.stdout)
    assert document["url"] == f"{hub_here.url}/tester/demo/commit/{repo.refs['quarter']}"
    assert document["files"] == {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    assert document["left"] == {}
    assert "license_name: psf-2.0" in repo.commits[repo.refs["quarter"]]["README.md"].data.decode()


def test_push_shows_first_what_it_sends_and_what_stays(checkpoint, tmp_path, hub_here):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / ".env").write_text("HF_TOKEN=x")
    trial = run("push", folder, "tester/demo", "--dry-run")
    assert trial.exit_code == 0, trial.output
    assert "model.safetensors" in trial.stdout.splitlines()[0]
    assert "stays here: .env (hidden)" in trial.stdout
    assert hub_here.requests == []
    hub_here.fail("POST", "/api/repos/create", status=403)
    refused = run("push", folder, "tester/demo")
    assert refused.stdout.splitlines() == trial.stdout.splitlines()[:-1], "shown before the Hub is asked"


def test_push_of_what_is_no_checkpoint_ends_with_one(tmp_path):
    result = run("push", tmp_path, "tester/demo")
    assert result.exit_code == 1
    assert "config.json is missing" in result.stderr


def test_export_writes_the_engine_s_config(checkpoint, tmp_path):
    result = run("export", checkpoint, tmp_path / "out", "--to", "vllm", "--json")
    assert json.loads(result.stdout) == {"output": str(tmp_path / "out"), "engine": "vllm"}
    assert json.loads((tmp_path / "out/config.json").read_text())["index_topk_pattern"] == "FFSSSSFFSSSS"


def test_export_refusals(checkpoint, tmp_path):
    assert run("export", checkpoint, tmp_path / "out", "--to", "ollama").exit_code == 2
    result = run("export", checkpoint, tmp_path / "out", "--to", "megatron")
    assert result.exit_code == 1
    assert "has no bridge for deepseek_v32 in its release" in result.stderr
