"""Whole runs: what they write, killed and resumed, spread over processes, diverging, on an output that is taken."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from testing import small_run
from testing.small_run import run, run_processes, write_source

from indexcache import IndexCacheForCausalLM
from indexcache.configuration.share_pattern import SharePattern
from indexcache.conversion.check.verify import verify
from indexcache.conversion.convert.convert import ConvertOptions, convert
from indexcache.conversion.io.checkpoint import read_checkpoint
from indexcache.conversion.io.sources import ConversionError, FolderSource
from indexcache.conversion.publish.hub import check_complete
from indexcache.distillation.errors import DistillationDiverged
from indexcache.runs.errors import RunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    # With dropout the random state, too, must be resumed.
    write_source(folder, attention_dropout=0.1)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    document = run(folder, folder / "finished")
    return document, folder / "finished"


def weights(output):
    return load_file(output / "model.safetensors")


def entries(output):
    logs = json.loads((output / "training_log.json").read_text())
    return {stage: [entry for entry in log if "kl" in entry] for stage, log in logs.items()}


def test_a_run_writes_a_whole_checkpoint_and_what_it_measured(finished, folder):
    document, output = finished
    check_complete(output)
    assert not (output / "training").exists()
    checkpoint = read_checkpoint(FolderSource(output))
    assert checkpoint.config["index_share_pattern"] == "FSFS"
    indexers = {name.split(".")[2] for name in checkpoint.tensors if ".indexer." in name}
    assert indexers == {"0", "2"}
    assert set(document["scores"]) == {"source", "before", "after"}
    assert document["scores"]["after"]["loss"] != document["scores"]["before"]["loss"]
    card = (output / "README.md").read_text()
    assert "All weights were trained for this pattern by multi-layer distillation: 4 warm-up steps" in card
    assert f"| this checkpoint | {document['scores']['after']['loss']:.4f} |" in card
    results = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results["loss"] == pytest.approx(document["scores"]["after"]["loss"], abs=1e-4)
    log = entries(output)
    assert [len(log[stage]) for stage in ("dense", "sparse")] == [4, 6]
    assert {"kl/full_00", "kl/layer_03", "recall/layer_01", "lm_loss"} <= set(log["sparse"][0])
    assert log["dense"][-1]["kl"] < log["dense"][0]["kl"]
    changed = weights(output)
    before = load_file(folder / "source" / "model.safetensors")
    assert all(changed[name].shape == before[name].shape for name in changed)
    assert not torch.equal(changed["lm_head.weight"], before["lm_head.weight"].to(changed["lm_head.weight"].dtype))


def test_the_result_converts_verifies_loads_and_generates(finished, tmp_path):
    _, output = finished
    convert(FolderSource(output), tmp_path / "again", ConvertOptions(SharePattern("FSSS")))
    result = verify(FolderSource(output), FolderSource(tmp_path / "again"))
    assert result.ok
    model = IndexCacheForCausalLM.from_pretrained(output)
    assert model.generate(torch.arange(20)[None], max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_config_keeps_the_sources_wish_for_a_cache(tmp_path, use_cache):
    """transformers' Trainer sets it to TrainingArguments' own, False, in every config that it writes."""
    write_source(tmp_path, use_cache=use_cache)
    run(tmp_path, tmp_path / "out", dense_steps=1, sparse_steps=1, accumulation=1, keep_checkpoints=True)
    for folder in (tmp_path / "out", *(tmp_path / "out" / "training").glob("*/checkpoint-1")):
        model = IndexCacheForCausalLM.from_pretrained(folder)
        assert model.config.use_cache is use_cache
        assert (model(torch.arange(9)[None]).past_key_values is not None) is use_cache


def test_killed_while_checkpoints_are_removed_a_run_is_finished_by_the_next(folder, tmp_path, monkeypatch):
    from indexcache.distillation import run as module

    class Killed(BaseException):
        pass

    def kill(*where, **how):
        raise Killed

    write_source(tmp_path)
    output, settings = tmp_path / "out", dict(dense_steps=1, sparse_steps=1, save_every=1)
    with monkeypatch.context() as killed:
        killed.setattr(module, "_remove_checkpoints", kill)
        with pytest.raises(Killed):
            run(tmp_path, output, **settings)
    assert (output / "training/dense").exists() and (output / "config.json").exists()
    with monkeypatch.context() as killed:
        killed.setattr(module.Path, "rmdir", kill)
        with pytest.raises(Killed):
            run(tmp_path, output, resume=True, **settings)
    run(tmp_path, output, resume=True, **settings)
    assert not (output / "training").exists()
    kept = tmp_path / "kept"
    run(tmp_path, kept, keep_checkpoints=True, **settings)
    run(tmp_path, kept, resume=True, **settings)
    assert list((kept / "training").glob("*/checkpoint-1"))


def test_killed_twice_and_resumed_equals_undisturbed(finished, folder):
    _, undisturbed = finished
    output = folder / "killed"
    assert run_processes(folder, output, kill_at=3, check=False).returncode == -signal.SIGKILL
    assert (output / "training/dense/checkpoint-2").exists() and not (output / "config.json").exists()
    with pytest.raises(ConversionError, match="interrupted distillation: finish it with --resume"):
        run(folder, output)
    with pytest.raises(ConversionError, match="another conversion that was interrupted"):
        run(folder, output, resume=True, learning_rate=2e-3)
    # 2 steps of the warm-up are left, and 3 of the sparse stage are made: one of them behind its checkpoint.
    assert run_processes(folder, output, kill_at=5, check=False).returncode == -signal.SIGKILL
    # A checkpoint that was being written is none.
    (output / "training/sparse/checkpoint-4").mkdir()
    run(folder, output, resume=True)
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    for stage, log in entries(undisturbed).items():
        for found, expected in zip(entries(output)[stage], log, strict=True):
            assert found == expected
    # Resumed once more there is nothing to do.
    assert run(folder, output, resume=True)["index_share_pattern"] == "FSFS"


def test_a_log_entry_that_a_kill_fell_into_is_what_it_would_have_been(folder, tmp_path):
    write_source(tmp_path)
    settings = dict(dense_steps=1, sparse_steps=6, log_every=3, save_every=2)
    run(tmp_path, tmp_path / "undisturbed", **settings)
    assert (
        run_processes(tmp_path, tmp_path / "killed", kill_at=4, check=False, **settings).returncode == -signal.SIGKILL
    )
    assert (tmp_path / "killed/training/sparse/checkpoint-2").exists()
    run(tmp_path, tmp_path / "killed", resume=True, **settings)
    assert entries(tmp_path / "killed") == entries(tmp_path / "undisturbed")


def test_two_processes_equal_one_to_rounding(folder, tmp_path):
    write_source(tmp_path)
    one = run(tmp_path, tmp_path / "one", dtype="float32", batch_size=2, accumulation=1)
    two = tmp_path / "two"
    run_processes(tmp_path, two, count=2, dtype="float32", accumulation=1)
    assert one["distillation"]["processes"] == 1
    assert json.loads((two / "indexcache_recipe.json").read_text())["distillation"]["processes"] == 2
    here, there = weights(tmp_path / "one"), weights(two)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=2e-5, msg=name)
    for stage, log in entries(two).items():
        for found, expected in zip(log, entries(tmp_path / "one")[stage], strict=True):
            assert found["kl"] == pytest.approx(expected["kl"], rel=1e-4)
            assert found["recall"] == pytest.approx(expected["recall"], rel=1e-4)


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    write_source(tmp_path)
    few = {"dense_steps": 2, "sparse_steps": 3, "dtype": "float32"}
    run(tmp_path, tmp_path / "one", batch_size=2, accumulation=1, **few)
    run(tmp_path, tmp_path / "parts", batch_size=1, accumulation=2, **few)
    here, there = weights(tmp_path / "one"), weights(tmp_path / "parts")
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=2e-5, msg=name)


def test_a_diverging_loss_stops_with_a_checkpoint(tmp_path):
    write_source(tmp_path)
    with pytest.raises(DistillationDiverged, match=r"--learning-rate .*stopped-at-\d+, a checkpoint") as caught:
        run(tmp_path, tmp_path / "out", learning_rate=30.0, sparse_steps=40, max_grad_norm=1e6)
    stopped = next((tmp_path / "out/training/sparse").glob("stopped-at-*"))
    assert str(stopped) in str(caught.value)
    IndexCacheForCausalLM.from_pretrained(stopped)


def test_outputs_that_are_taken_and_stages_that_lack_are_refused(finished, folder, tmp_path):
    _, output = finished
    with pytest.raises(ConversionError, match="not empty"):
        run(folder, output)
    with pytest.raises(ConversionError, match="another finished"):
        run(folder, output, resume=True, learning_rate=2e-3)
    with pytest.raises(ConversionError, match="lies inside the source"):
        run(folder, folder / "source" / "inside")
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        run(folder, tmp_path)
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_a_missing_package_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RunError, match=r"indexcache\[train\]"):
        run(folder, tmp_path / "out")


def test_no_memory_names_the_knobs(folder, tmp_path, monkeypatch):
    from indexcache.distillation.training.trainer import DistillationTrainer

    def out_of_memory(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DistillationTrainer, "train", out_of_memory)
    with pytest.raises(
        RunError, match=r"--batch-size 2 with --gradient-accumulation-steps 4.*--seqlen below 40.*FSDP"
    ):
        run(folder, tmp_path / "out", batch_size=4)


@pytest.mark.parametrize("bytes_", [2_000, 250_000])
def test_a_limit_of_a_file_s_size_is_a_message_and_what_is_there_goes_on(finished, folder, tmp_path, bytes_):
    """As a full disk or a quota: the weights' writers report it in words of their own."""
    _, undisturbed = finished
    output = tmp_path / "out"
    script = tmp_path / "limited.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(small_run.__file__).parent)!r})\n"
        "import small_run, typer\n"
        "from indexcache.cli import _errors_as_messages\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_}, {bytes_}))\n"
        "try:\n"
        "    with _errors_as_messages():\n"
        "        small_run.run(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "except typer.Exit as left:\n"
        "    sys.exit(left.exit_code)\n"
    )
    stopped = run_processes(folder, output, script=script, check=False)
    assert stopped.returncode == 1 and "Traceback" not in stopped.stdout + stopped.stderr, stopped.stderr
    told = " ".join(stopped.stderr.split())
    assert f"error: {output}" in told and ("File too large" in told or "cannot be written" in told), told
    assert not (output / "config.json").exists()
    run(folder, output, resume=(output / ".indexcache_convert.json").exists())
    assert {name: value.tolist() for name, value in weights(output).items()} == {
        name: value.tolist() for name, value in weights(undisturbed).items()
    }


def test_adapters_train_all_but_the_base_weights_and_are_merged(finished, folder, tmp_path):
    pytest.importorskip("peft")
    write_source(tmp_path)
    output = tmp_path / "adapted"
    document = run(tmp_path, output, lora_rank=4, dtype="float32", keep_checkpoints=True)
    assert "adapters of rank 4, merged" in (output / "README.md").read_text()
    assert document["scores"]["after"]["loss"] < 10
    before, after = load_file(tmp_path / "source/model.safetensors"), weights(output)
    assert {name for name in before if ".layers.1.self_attn.indexer" not in name} >= set(after)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name].to(value.dtype))}
    assert "model.layers.1.self_attn.kv_b_proj.weight" in changed
    assert any(".indexer." in name for name in changed)
    kept = {name for name in after if any(mark in name for mark in ("embed", "lm_head", "layernorm", "mlp.experts"))}
    assert not changed & kept and len(kept) > 20
    # Checkpoints hold what is trained alone.
    small = output / "training/sparse/checkpoint-6/adapters.safetensors"
    assert all("lora_" in name or ".indexer." in name for name in load_file(small))
    # Killed and resumed it is the same.
    assert run_processes(
        tmp_path, tmp_path / "killed", kill_at=7, check=False, lora_rank=4, dtype="float32"
    ).returncode
    run(tmp_path, tmp_path / "killed", resume=True, lora_rank=4, dtype="float32")
    for name, value in weights(tmp_path / "killed").items():
        assert torch.equal(value, after[name]), name


def test_adapters_train_in_bf16_on_the_losses_of_the_model_that_they_adapt(tmp_path):
    pytest.importorskip("peft")
    write_source(tmp_path)
    steps = dict(precision="bf16", dense_steps=0, sparse_steps=2, accumulation=1)
    run(tmp_path, tmp_path / "plain", **steps)
    run(tmp_path, tmp_path / "adapted", lora_rank=4, **steps)
    plain, adapted = (entries(tmp_path / name)["sparse"] for name in ("plain", "adapted"))
    # At the first step adapters add nothing; behind it they have learned.
    assert (adapted[0]["kl"], adapted[0]["lm_loss"]) == (plain[0]["kl"], plain[0]["lm_loss"])
    before, after = load_file(tmp_path / "source/model.safetensors"), weights(tmp_path / "adapted")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert not torch.equal(after[name], before[name].to(after[name].dtype))
