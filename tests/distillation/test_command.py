"""`indexcache distill` on the demo checkpoint: what it writes and prints, and bad input."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from indexcache.cli import app

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
SHORT = ("--keep", "1/3", "--seqlen", "96", "--dense-steps", "2", "--sparse-steps", "2", "--logging-steps", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = Path(json.decoder.__file__).read_text()
    (folder / "train.txt").write_text(text[:6000])
    (folder / "held.txt").write_text(text[6000:10000])
    return folder


def distill(source, *arguments):
    return CliRunner().invoke(app, ["distill", str(source), *map(str, arguments)])


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "distilled"
    finished = distill(
        DEMO,
        output,
        "--data",
        data / "train.txt",
        "--held-out",
        data / "held.txt",
        "--held-out-samples",
        2,
        *SHORT,
        "--isolate-documents",
        "--precision",
        "fp32",
        "--json",
    )
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout), output


def test_it_writes_a_checkpoint_that_loads_without_the_package(done, run_python):
    document, output = done
    assert document["index_share_pattern"] == "FSSFSSFSSFSS" and document["url"] is None
    assert document["distillation"]["isolate_documents"] is True
    assert document["scores"]["source"]["loss"] < document["scores"]["before"]["loss"]
    script = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
ids = tokenizer("import json", return_tensors="pt").input_ids
print(model.dtype, model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] - ids.shape[1])
outputs = model.train()(ids, labels=ids, indexer_training="sparse")
(outputs.loss + outputs.indexer_kl.sum()).backward()
"""
    assert run_python(script, output).stdout.splitlines()[-1] == "torch.bfloat16 3"


def test_a_search_result_and_a_terminal_are_served(data, tmp_path):
    (tmp_path / "patterns.json").write_text(json.dumps({"patterns": {"4": "FFSSSSFFSSSS", "3": "FFSSSSFSSSSS"}}))
    finished = distill(
        DEMO,
        tmp_path / "out",
        "--data",
        data / "train.txt",
        "--pattern-file",
        tmp_path / "patterns.json",
        "--keep",
        4,
        "--seqlen",
        96,
        "--dense-steps",
        0,
        "--sparse-steps",
        1,
        "--no-tensorboard",
        "--device",
        "cpu",
    )
    assert finished.exit_code == 0, finished.output
    assert "an IndexCache checkpoint of pattern FFSSSSFFSSSS" in finished.stdout
    assert "sparse stage" in finished.stderr and "lm_loss" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--keep", "1/3", "--dense-steps", "0", "--sparse-steps", "0"), 2, "nothing to train"),
        (("--pattern", "FSS"), 2, "3 characters for num_hidden_layers=12"),
        (("--pattern", "S" * 12), 2, "must start with 'F'"),
        ((), 2, "give --pattern, --pattern-file or --keep"),
        (("--keep", "1/3", "--index-topk", "9"), 2, "for dense sources"),
        (("--keep", "1/3", "--private"), 2, "--private belongs to"),
        (("--keep", "1/3", "--learning-rate", "-1"), 2, "--learning-rate must be positive"),
        (("--keep", "1/3", "--learning-rate", "inf"), 2, "inf is not a finite number"),
        (("--keep", "1/3", "--kl-weight", "0"), 2, "leaves the warm-up nothing to learn from"),
        (("--keep", "1/3", "--seed", "4294967296"), 2, "--seed must lie in 0 .. 4294967295"),
        (("--keep", "1/3", "--seqlen", "100000"), 2, "less than one window"),
    ],
)
def test_bad_input_names_the_mend(data, tmp_path, arguments, code, message):
    finished = distill(DEMO, tmp_path / "out", "--data", data / "train.txt", *arguments)
    assert finished.exit_code == code, finished.output
    assert message in finished.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_absent_data_and_sources_are_named(data, tmp_path):
    finished = distill(DEMO, tmp_path / "out", "--data", tmp_path / "none.txt", "--keep", "1/3")
    assert finished.exit_code == 2 and "no file here" in finished.stderr
    finished = distill(tmp_path / "nowhere" / "x", tmp_path / "out", "--data", data / "train.txt", "--keep", "1/3")
    assert finished.exit_code == 1 and "nowhere" in finished.stderr
