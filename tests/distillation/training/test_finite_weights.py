"""No NaN becomes a checkpoint: loss, gradient and update of every step, the last one's too, and what is written."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.small_run import run, write_source

from indexcache import IndexCacheForCausalLM
from indexcache.cli import app
from indexcache.distillation.errors import DistillationDiverged
from indexcache.distillation.training.finite import are_finite, first_not_finite
from indexcache.distillation.training.trainer import DistillationTrainer

ONE_STEP = dict(dense_steps=0, sparse_steps=1, accumulation=1)


@pytest.fixture
def folder(tmp_path):
    write_source(tmp_path)
    return tmp_path


def hurt_update_of(step, monkeypatch, value=math.nan):
    """The optimiser's step `step` (from 1) leaves `value` in one weight that no loss looks at any more."""
    create = DistillationTrainer.create_optimizer

    def create_optimizer(self, *arguments):
        optimizer = create(self, *arguments)
        made, advance = 0, optimizer.step

        def step_and_hurt(*arguments, **options):
            nonlocal made
            done, made = advance(*arguments, **options), made + 1
            if made == step:
                with torch.no_grad():
                    self.model.lm_head.weight[3, 5] = value
            return done

        optimizer.step = step_and_hurt
        return optimizer

    monkeypatch.setattr(DistillationTrainer, "create_optimizer", create_optimizer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_update_of_the_last_step_is_looked_at(folder, monkeypatch, value):
    hurt_update_of(1, monkeypatch, value)
    with pytest.raises(DistillationDiverged, match=r"update of step 1 .*lm_head\.weight.* There is no checkpoint"):
        run(folder, folder / "out", **ONE_STEP)
    assert not (folder / "out" / "config.json").exists()
    assert not list((folder / "out/training").rglob("*.safetensors")), "a spoilt model was kept"


def test_a_spoilt_update_later_points_to_the_checkpoint_before_it(folder, monkeypatch):
    hurt_update_of(4, monkeypatch)
    with pytest.raises(
        DistillationDiverged, match=r"update of step 4 .*last checkpoint before it is \S*checkpoint-2$"
    ):
        run(folder, folder / "out", dense_steps=0, sparse_steps=4, accumulation=1, save_every=2)
    assert not (folder / "out/training/sparse/checkpoint-4").exists()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(folder, monkeypatch):
    step = DistillationTrainer.training_step

    def training_step(self, model, *arguments):
        loss = step(self, model, *arguments)
        model.lm_head.weight.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(DistillationTrainer, "training_step", training_step)
    about = r"source on .*train\.safetensors: .*norm inf at step 1: .*its largest weight, in .*stopped-at-0, a check"
    with pytest.raises(DistillationDiverged, match=about):
        run(folder, folder / "out", **ONE_STEP)
    stopped = load_file(folder / "out/training/sparse/stopped-at-0/model.safetensors")
    source = load_file(folder / "source/model.safetensors")
    assert torch.equal(stopped["lm_head.weight"], source["lm_head.weight"].float())


def test_weights_that_outgrow_the_written_dtype_are_no_checkpoint(folder):
    path = folder / "source/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][7] = 1e6
    tensors["lm_head.weight"][:, 7] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(DistillationDiverged, match=r"model\.norm\.weight is not finite as float16"):
        run(folder, folder / "out", dtype="float16", **ONE_STEP)
    assert not (folder / "out/config.json").exists()
    # They are sound in the dtype of the training.
    run(folder, folder / "whole", dtype="float32", **ONE_STEP)
    assert first_not_finite(IndexCacheForCausalLM.from_pretrained(folder / "whole").named_parameters()) is None


def test_the_verb_ends_with_exit_code_1_and_names_the_step(folder, monkeypatch):
    from typer.testing import CliRunner

    hurt_update_of(1, monkeypatch)
    arguments = ["--data", folder / "train.safetensors", "--pattern", "FSFS", "--dense-steps", 0, "--sparse-steps", 1]
    arguments += ["--device", "cpu", "--no-tensorboard", "--json"]
    finished = CliRunner().invoke(app, ["distill", *map(str, [folder / "source", folder / "out", *arguments])])
    assert finished.exit_code == 1 and "update of step 1" in " ".join(finished.stderr.split()), finished.output
    assert not finished.stdout and json.loads((folder / "out/.indexcache_convert.json").read_text())


def test_one_entry_among_many_is_found():
    good = [torch.randn(3, 5), torch.zeros(0), torch.tensor([7])]
    assert are_finite(good) and first_not_finite(zip("abc", good)) is None
    for value in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bad = torch.zeros(4, 1000, dtype=dtype)
            bad[2, 999] = value
            assert not are_finite([*good, bad]) and first_not_finite(zip("abcd", [*good, bad])) == "d"
    assert are_finite([torch.full((9,), torch.finfo(torch.float32).max)]), "large is not infinite"
