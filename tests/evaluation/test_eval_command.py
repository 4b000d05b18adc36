"""`indexcache eval` on the demo checkpoint: scores, resumption, pictures, bad usage."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from indexcache.cli import app
from indexcache.conversion.io.load_source import load_source
from indexcache.evaluation import run
from indexcache.evaluation.perplexity import evaluate_windows

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "dsa_demo"
SEARCHED, UNIFORM = "FFSSSSFFSSSS", "FSSFSSFSSFSS"
RETRIEVAL = ("--length", "200", "--length", "300", "--samples", "2", "--depths", "3")


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Three windows of 160 tokens with marks."""
    tensors = load_file(ROOT / "demo" / "sample_windows.safetensors")
    path = tmp_path_factory.mktemp("data") / "windows.safetensors"
    save_file(
        {
            "a_ids": tensors["ids"][:3, -161:].contiguous(),
            "a_recall": tensors["recall"][:3, -161:].to(torch.uint8).contiguous(),
        },
        path,
    )
    return path


PASSKEY = ("--prompt", "passkey", "--length", "150", "--samples", "1", "--depths", "2")


def evaluate(*arguments, source=DEMO):
    return CliRunner().invoke(app, ["eval", str(source), *map(str, arguments)])


@pytest.fixture(scope="module")
def found(windows, tmp_path_factory):
    output = tmp_path_factory.mktemp("eval")
    finished = evaluate("--data", windows, "--pattern", SEARCHED, *RETRIEVAL, "--output", output, "--json")
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout), output


def test_losses_are_those_of_evaluate_windows(found, windows):
    document, output = found
    assert document == json.loads((output / "evaluation.json").read_text())
    assert [model["pattern"] for model in document["models"]] == ["F" * 12, SEARCHED]
    tensors, model = load_file(windows), load_source(DEMO, dtype=torch.float32)
    for entry, pattern in zip(document["perplexity"], ("F" * 12, SEARCHED)):
        model.set_index_share_pattern(pattern)
        expected = evaluate_windows(model, tensors["a_ids"], tensors["a_recall"])
        assert entry["loss"] == pytest.approx(expected.loss, rel=1e-5)
        assert entry["text_loss"] == pytest.approx(expected.text_loss, rel=1e-5)
        assert entry["recall_loss"] == pytest.approx(expected.recall_loss, rel=1e-5)
        assert entry["recall"] == pytest.approx(expected.recall_accuracy)
        assert sum(part["loss"] for part in entry["by_position"]) / 8 == pytest.approx(entry["loss"], rel=1e-6)


def test_the_rise_is_paired_with_the_first_column(found):
    first, second = found[0]["perplexity"]
    assert "rise" not in first
    differences = torch.tensor(second["window_losses"]) - torch.tensor(first["window_losses"])
    assert second["rise"] == pytest.approx(float(differences.mean()), abs=1e-6)
    assert second["rise_standard_error"] == pytest.approx(float(differences.std() / 3**0.5), rel=1e-3)


def test_retrieval_and_overlap_are_there(found):
    document, _ = found
    for entry in document["retrieval"]:
        assert [at["length"] for at in entry["lengths"]] == [200, 300]
        for at in entry["lengths"]:
            assert at["answers"] == 6 and [depth["depth"] for depth in at["by_depth"]] == [0, 0.5, 1]
            mean = sum(depth["accuracy"] for depth in at["by_depth"]) / 3
            assert at["accuracy"] == pytest.approx(mean)
    own, searched = document["overlap"]
    matrix = own["matrix"]
    assert own["shared_layers"] is None and own["neighbours"][0] == pytest.approx(matrix[0][1])
    served = [matrix[layer][1] for layer in (2, 3, 4, 5)] + [matrix[layer][7] for layer in (8, 9, 10, 11)]
    assert searched["shared_layers"] == pytest.approx(sum(served) / 8)


def test_pictures_and_page(found):
    _, output = found
    for name in ("perplexity.png", "retrieval.png", "overlap.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and SEARCHED in page and "src='http" not in page


def test_what_was_run_is_never_run_again(found, windows, monkeypatch):
    document, output = found
    done = (output / "journal.jsonl").read_text().splitlines()
    with monkeypatch.context() as patch:
        for name in ("recalled", "_window_table", "selection_overlap"):
            patch.setattr(run, name, lambda *_: pytest.fail("something was run again"))
        arguments = ("--data", windows, "--pattern", SEARCHED, *RETRIEVAL, "--output", output)
        again = evaluate(*arguments, "--resume", "--json", "--no-pictures")
        assert again.exit_code == 0, again.output
        refused = evaluate(*arguments)
        assert refused.exit_code == 2 and "holds an earlier evaluation: go on with --resume" in refused.stderr
    for task in run.TASKS:
        assert json.loads(again.stdout)[task] == document[task]
    more = evaluate(
        "--data",
        windows,
        "--pattern",
        UNIFORM,
        "--task",
        "perplexity",
        "--output",
        output,
        "--resume",
        "--no-pictures",
    )
    assert more.exit_code == 0 and UNIFORM in more.stdout, more.output
    lines = (output / "journal.jsonl").read_text().splitlines()
    assert lines[: len(done)] == done
    assert [json.loads(line)["pattern"] for line in lines[len(done) :]] == [UNIFORM] * 3, "one pattern was added"


@pytest.mark.parametrize("kill_after", [0, 2, 6, 13])
def test_killed_anywhere_and_resumed(found, windows, tmp_path, monkeypatch, kill_after):
    document, _ = found
    arguments = ("--data", windows, "--pattern", SEARCHED, *RETRIEVAL, "--output", tmp_path, "--json", "--no-pictures")
    plain, calls = run._Runner._once, 0

    def dying(*call):
        nonlocal calls
        calls += 1
        if calls > kill_after:
            raise KeyboardInterrupt
        return plain(*call)

    with monkeypatch.context() as patch:
        patch.setattr(run._Runner, "_once", dying)
        finished = evaluate(*arguments)
    assert finished.exit_code == 130 and "goes on with --resume" in finished.stderr
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1 + kill_after
    again = evaluate(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    for task in run.TASKS:
        assert json.loads(again.stdout)[task] == document[task]


def test_checkpoints_side_by_side(windows, tmp_path):
    model = load_source(DEMO, pattern=SEARCHED)
    model.save_pretrained(tmp_path / "shared")
    arguments = ("--data", windows, "--task", "perplexity", "--output", tmp_path / "out", "--json", "--no-pictures")
    finished = evaluate(tmp_path / "shared", *arguments)
    assert finished.exit_code == 0, finished.output
    document = json.loads(finished.stdout)
    assert [model["name"] for model in document["models"]] == ["dsa_demo", "shared"]
    assert [model["full_layers"] for model in document["models"]] == [12, 4]
    assert document["models"][0]["sha256"] != document["models"][1]["sha256"]
    assert document["perplexity"][1]["rise"] != 0
    refused = evaluate("--data", windows, "--task", "retrieval", source=tmp_path / "shared")
    assert refused.exit_code == 2 and "needs a tokenizer" in refused.stderr


def test_retrieval_alone_needs_no_data(tmp_path):
    finished = evaluate(
        "--prompt", "passkey", "--length", "150", "--samples", "1", "--depths", "2", "--output", tmp_path
    )
    assert finished.exit_code == 0, finished.output
    assert "Answers given, by context length" in finished.stdout and (tmp_path / "retrieval.png").exists()


def test_it_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "indexcache.runs.pages.figures", raising=False)
    finished = evaluate(
        "--prompt", "passkey", "--length", "150", "--samples", "1", "--depths", "1", "--output", tmp_path
    )
    assert finished.exit_code == 0, finished.output
    assert "pip install matplotlib" in finished.stderr and (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "speed"), "--task must be perplexity, retrieval, overlap (got speed)"),
        (("--task", "overlap"), "--task overlap needs --data"),
        (("--pattern", "FS"), "index_share_pattern has 2 characters for num_hidden_layers=12"),
        (("--length", "9000"), "beyond"),
        (("--length", "60"), "give a --length at least"),
        (("--data", "absent.txt"), "absent.txt is no file here"),
    ],
)
def test_bad_usage_exits_2_with_the_mend(tmp_path, arguments, message):
    finished = evaluate(*arguments, "--output", tmp_path)
    assert finished.exit_code == 2, finished.output
    assert message in " ".join(finished.stderr.split())
    assert not (tmp_path / "journal.jsonl").exists(), "nothing was begun"


def test_windows_that_do_not_fit_are_refused(windows, tmp_path):
    short = evaluate("--data", windows, "--seqlen", "60", "--task", "overlap", "--output", tmp_path)
    assert short.exit_code == 2 and "cannot tell selections apart" in short.stderr
    save_file({"a_ids": torch.full((1, 100), 5000)}, tmp_path / "other.safetensors")
    other = evaluate("--data", tmp_path / "other.safetensors", "--task", "perplexity", "--output", tmp_path)
    assert other.exit_code == 2 and "made with another tokenizer" in other.stderr
    fewer = load_source(DEMO, pattern=SEARCHED)
    fewer.save_pretrained(tmp_path / "shared")
    arguments = ("--data", str(windows), "--task", "perplexity", "--pattern", UNIFORM, "--output", str(tmp_path))
    refused = evaluate(*arguments, source=tmp_path / "shared")
    assert refused.exit_code == 2 and "makes layers [3, 9] full" in refused.stderr
