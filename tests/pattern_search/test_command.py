"""`indexcache search` on the demo checkpoint: results, pictures, what other verbs make of them, and bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from indexcache import IndexCacheForCausalLM
from indexcache.cli import app
from indexcache.conversion.convert.pattern_file import choose_pattern
from indexcache.pattern_search import result
from indexcache.pattern_search.command import _share
from indexcache.runs.errors import RunError

DEMO = Path(__file__).parents[2] / "demo" / "dsa_demo"
SMALL = ("--seqlen", "80", "--nsamples", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(Path(json.__file__).read_text() + Path(json.decoder.__file__).read_text())
    return path


def search(*arguments):
    return CliRunner().invoke(app, ["search", str(DEMO), *map(str, arguments)])


@pytest.fixture(scope="module")
def found(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("search")
    finished = search(
        "--data",
        text,
        *SMALL,
        "--output",
        output,
        "--keep",
        "1/3",
        "--tolerance",
        "50%",
        "--baseline",
        "uniform",
        "--baseline",
        "similarity",
        "--json",
    )
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout), output


def test_one_document_says_everything(found):
    document, output = found
    assert (
        document == json.loads((output / "patterns.json").read_text()) == result.read_result(output / "patterns.json")
    )
    assert sorted(map(int, document["patterns"])) == list(range(1, 13))
    for count, pattern in document["patterns"].items():
        assert pattern.count("F") == int(count) and pattern[0] == "F"
    assert document["index_share_pattern"] == document["patterns"][str(document["keep"])]
    assert sorted(document["order"]) == list(range(1, 12))
    assert {entry["method"] for entry in document["curve"]} == {"search", "uniform", "similarity"}
    assert all(entry["held_out"]["loss"] > 0 for entry in document["curve"])
    assert document["data"]["calibration"]["windows"] == 2 and len(document["source"]["sha256"]) == 64
    assert document["recipe"]["objective"] == "kl" and document["versions"]["torch"]
    assert document["cost"]["search_layer_forwards"] > 0 and "SHORT" in document["warnings"][0]
    assert len(document["overlap"]["matrix"]) == 12


def test_tolerance_is_kept_on_held_out_windows_by_the_smallest_number(found):
    document, _ = found
    loss = {e["full_layers"]: e["held_out"]["loss"] for e in document["curve"] if e["method"] == "search"}
    retrieval = document["retrieval"]
    assert retrieval["windows"] == 8 and retrieval["source"] > 0.9 and retrieval["needed"] == 0.9
    refused = {entry["pattern"] for entry in retrieval["refused"]}
    patterns = {int(count): pattern for count, pattern in document["patterns"].items()}
    within = [n for n, value in loss.items() if value <= loss[12] * 1.5 and patterns[n] not in refused]
    assert document["keep"] == min(within) and retrieval["patterns"][patterns[min(within)]] >= 0.9
    assert all(entry["recall"] < 0.9 and entry["loss"] <= loss[12] * 1.5 for entry in retrieval["refused"]) and refused
    assert document["cost"]["retrieval_layer_forwards"] > 0


def test_loss_alone_decides_where_that_is_asked_for(found, text):
    document, output = found
    again = search("--data", text, *SMALL, "--output", output.parent / "alone", "--keep", "1/3", "--tolerance", "50%",
                   "--least-recall", "0", "--json", "--no-pictures")  # fmt: skip
    assert again.exit_code == 0, again.output
    alone = json.loads(again.stdout)
    assert "retrieval" not in alone and alone["keep"] < document["keep"]


def test_the_page_says_why_a_pattern_was_not_chosen(found):
    document, output = found
    page = (output / "report.html").read_text()
    entry = document["retrieval"]["refused"][0]
    assert (
        "<h2>Retrieval</h2>" in page and f"it recalls {entry['recall']:.1%} where 90.0% is needed: not chosen" in page
    )
    assert (
        f"not chosen: {entry['pattern']}" in CliRunner().invoke(app, ["inspect", str(output / "patterns.json")]).stdout
    )


def test_convert_takes_the_file(found):
    document, output = found
    config = json.loads((DEMO / "config.json").read_text())
    path = output / "patterns.json"
    assert choose_pattern(config, pattern_file=path, keep="1/3").letters == document["patterns"]["4"]
    assert choose_pattern(config, pattern_file=path).letters == document["index_share_pattern"]


def test_inspect_draws_the_file(found):
    document, output = found
    path = str(output / "patterns.json")
    drawn = CliRunner().invoke(app, ["inspect", path])
    assert drawn.exit_code == 0, drawn.output
    for pattern in document["patterns"].values():
        assert pattern in drawn.stdout
    assert f"{document['keep']} *" in drawn.stdout
    assert json.loads(CliRunner().invoke(app, ["inspect", path, "--json"]).stdout) == document
    refused = CliRunner().invoke(app, ["inspect", path, "--overlap", "text.txt"])
    assert refused.exit_code == 2 and "needs a checkpoint" in refused.stderr


def test_export_spells_the_file_for_engines(found, tmp_path):
    document, output = found
    path, pattern = str(output / "patterns.json"), document["patterns"]["4"]
    types = ["full" if letter == "F" else "shared" for letter in pattern]
    for engine in ("vllm", "sglang", "trtllm"):
        finished = CliRunner().invoke(app, ["export", path, str(tmp_path / engine), "--to", engine, "--keep", "1/3"])
        assert finished.exit_code == 0, finished.output
        fields = json.loads((tmp_path / engine).read_text())
        assert fields["index_topk_pattern"] == pattern and fields["indexer_types"] == types
    chosen = CliRunner().invoke(app, ["export", path, str(tmp_path / "chosen"), "--to", "vllm", "--json"])
    assert json.loads(chosen.stdout)["fields"]["index_topk_pattern"] == document["index_share_pattern"]
    for arguments, message in (
        (["chosen", "--to", "vllm"], "exists: give another file"),
        (["new", "--to", "vllm", "--keep", "13"], "must lie in 1 .. 12"),
        (["new", "--to", "transformers", "--keep", "4"], "cannot share"),
    ):
        refused = CliRunner().invoke(app, ["export", path, str(tmp_path / arguments[0]), *arguments[1:]])
        assert refused.exit_code == 1 and message in " ".join(refused.stderr.split()), refused.output
    assert not (tmp_path / "new").exists()
    refused = CliRunner().invoke(app, ["export", str(DEMO), str(tmp_path / "new"), "--to", "vllm", "--keep", "4"])
    assert refused.exit_code == 2 and "--keep chooses in a patterns.json" in refused.stderr


def test_pictures_and_report(found):
    _, output = found
    for name in ("curve.png", "order.png", "overlap.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "src='http" not in page and "SHORT" in page


def test_resume_answers_from_the_journal(found, text):
    document, output = found
    again = search("--data", text, *SMALL, "--output", output, "--keep", "1/3", "--no-pictures", "--resume")
    assert again.exit_code == 0, again.output
    assert document["patterns"]["4"] in again.stdout


def test_it_needs_no_matplotlib(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("report", "figures"):
        monkeypatch.delitem(sys.modules, f"indexcache.pattern_search.{name}", raising=False)
    finished = search("--data", text, *SMALL, "--output", tmp_path, "--keep", "11", "--no-curve")
    assert finished.exit_code == 0, finished.output
    assert "pip install matplotlib" in finished.stderr and (tmp_path / "patterns.json").exists()


def test_an_indexcache_checkpoint_is_searched_further(text, tmp_path):
    from indexcache.conversion.io.load_source import load_source

    model: IndexCacheForCausalLM = load_source(DEMO, pattern="FFFSFFSSSSSS")
    model.save_pretrained(tmp_path / "model")
    finished = CliRunner().invoke(
        app, ["search", str(tmp_path / "model"), "--data", str(text), *SMALL, "--output", str(tmp_path), "--keep", "3"]
    )
    assert finished.exit_code == 2 and "has no tokenizer" in finished.stderr
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((DEMO / name).read_bytes())
    arguments = ["search", str(tmp_path / "model"), "--data", str(text), *SMALL, "--output", str(tmp_path)]
    finished = CliRunner().invoke(app, [*arguments, "--keep", "3", "--json", "--no-pictures"])
    assert finished.exit_code == 0, finished.output
    patterns = json.loads(finished.stdout)["patterns"]
    assert sorted(patterns) == ["3", "4", "5"]
    assert all(pattern[3] == "S" and pattern[6:] == "SSSSSS" for pattern in patterns.values())
    finished = CliRunner().invoke(app, [*arguments, "--keep", "1/2", "--overwrite"])
    assert finished.exit_code == 2 and "has indexers in 5 only" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "13"), "--keep 13: keep as a count must lie in 1 .. 12"),
        (("--keep", "0"), "--keep 0: keep as a count must lie in 1 .. 12"),
        (("--keep", "some"), "keep must be a count such as 4 or a share"),
        (("--tolerance", "much"), "--tolerance 'much' is no share: write 0.5% or 0.005"),
        (("--tolerance", "150%"), "--tolerance must lie in 0% .. 100%"),
        (("--least-recall", "most"), "--least-recall 'most' is no share: write 0.5% or 0.005"),
        (("--baseline", "best"), "--baseline must be uniform, similarity or none (got best)"),
        (("--blocks", "2"), "--blocks belongs to --algorithm greedy"),
        (("--blocks", "20", "--algorithm", "greedy"), "--blocks must lie in 1 .. 12"),
        (("--cache-memory", "lots"), "--cache-memory 'lots' is no size"),
        (("--seqlen", "900000"), "less than one window of 900,001"),
        (("--data", "absent.txt"), "absent.txt is no file here"),
    ],
)
def test_bad_usage_exits_2_with_the_mend(text, tmp_path, arguments, message):
    finished = search("--data", text, *SMALL, "--output", tmp_path, *arguments)
    assert finished.exit_code == 2, finished.output
    assert message in " ".join(finished.stderr.split())


def test_a_source_that_is_no_dsa_model(text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    save_file({"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    finished = CliRunner().invoke(app, ["search", str(tmp_path), "--data", str(text)])
    assert finished.exit_code == 1 and "model_type 'llama' cannot be converted" in finished.stderr
    finished = CliRunner().invoke(app, ["search", str(tmp_path / "absent"), "--data", str(text)])
    assert finished.exit_code == 1 and "absent" in finished.stderr and "Traceback" not in finished.stderr


def test_shares():
    assert _share("0.5%", "--x") == pytest.approx(0.005) == _share("0.005", "--x") and _share(None, "--x") is None
    with pytest.raises(RunError):
        _share("-1%", "--x")


def test_inspect_draws_the_overlap(text, tmp_path):
    picture = tmp_path / "overlap.png"
    arguments = ["inspect", str(DEMO), "--overlap", str(text), *SMALL, "--overlap-picture", str(picture)]
    finished = CliRunner().invoke(app, [*arguments, "--json"])
    assert finished.exit_code == 0, finished.output
    overlap = json.loads(finished.stdout)["overlap"]
    assert overlap["layers"] == list(range(12)) and overlap["matrix"][3][3] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = CliRunner().invoke(app, arguments)
    assert "|A ∩ B| / k" in drawn.stdout
    short = CliRunner().invoke(app, ["inspect", str(DEMO), "--overlap", str(text), "--seqlen", "60"])
    assert short.exit_code == 2 and "cannot tell selections apart" in short.stderr
