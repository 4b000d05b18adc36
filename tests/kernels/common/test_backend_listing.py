"""What `indexcache env --kernels` shows: for a device that need not be here, and without running a kernel."""

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from indexcache.cli import app
from indexcache.kernels.common.backend_listing import choices
from indexcache.kernels.common.device_target import TARGETS, DeviceTarget
from indexcache.kernels.common.dispatch import _set_aside, forget_failures

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def on(target):
    return {(choice.operation, choice.example): choice for choice in choices(GPU, target)}


def test_a_hopper_gpu_runs_the_fastest_of_every_operation():
    found = on(TARGETS["sm_90"])
    assert all(choice.runs != "PyTorch" for choice in found.values())
    hopper = {name for name, choice in found.items() if choice.runs == "Gluon for Hopper"}
    attention = {"sparse_mla: prefill kernels", "sparse_mla's gradient: kernels", "lightning_indexer: kernels"}
    assert attention | {"block_fp8_experts"} == {operation for operation, _ in hopper}
    assert found["lightning_indexer: kernels", "token"].why_not == {"Gluon for Hopper": "there are too few queries"}


@pytest.mark.parametrize("name", ["sm_80", "sm_100"])
def test_other_gpus_run_triton_and_the_reason_is_told(name):
    found = on(TARGETS[name])
    assert {choice.runs for choice in found.values() if choice.folder == "sparse_mla"} == {"Triton"}
    reason = found["sparse_mla: prefill kernels", "prefill"].why_not["Gluon for Hopper"]
    assert reason == "it is for compute capability 9.0"


def test_a_gpu_that_is_too_old_runs_pytorch():
    found = on(DeviceTarget("cuda", 75, 40))
    assert found["sparse_mla", "prefill"].runs == "PyTorch"
    assert found["sparse_mla", "prefill"].why_not == {"Triton": "the kernels need compute capability 8.0 or newer"}


def test_what_was_set_aside_in_this_process_is_told():
    forget_failures()
    _set_aside["rms_norm", "Triton", GPU] = "it does not compile here (OutOfResources: shared memory)"
    choice = on(TARGETS["sm_90"])["rms_norm", "token"]
    forget_failures()
    assert choice.runs == "PyTorch" and "does not compile here" in choice.why_not["Triton"]


def test_a_cpu_runs_pytorch():
    found = choices(CPU)
    assert {choice.runs for choice in found} == {"PyTorch"} and len(found) > 20
    assert {reason for choice in found for reason in choice.why_not.values()} == {"kernels need a GPU, not cpu"}


def test_the_verb_shows_a_table_and_json():
    runner = CliRunner(env={"COLUMNS": "200"})
    shown = runner.invoke(app, ["env", "--kernels", "--target", "sm_80"])
    assert shown.exit_code == 0 and "Kernels on sm_80" in shown.stdout
    assert "Gluon for Hopper: it is for compute capability 9.0" in shown.stdout
    listed = json.loads(runner.invoke(app, ["env", "--kernels", "--target", "sm_90", "--json"]).stdout)["kernels"]
    assert listed == [choice._asdict() for choice in choices(GPU, TARGETS["sm_90"])]


@pytest.mark.parametrize("arguments", [["--kernels", "--target", "sm_1"], ["--target", "sm_90"]])
def test_the_verb_refuses_what_it_does_not_know(arguments):
    refused = CliRunner().invoke(app, ["env", *arguments])
    assert refused.exit_code == 2 and not refused.stdout
