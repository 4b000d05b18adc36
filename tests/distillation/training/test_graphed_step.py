"""Steps from graphs equal steps as they are: what is copied, kept and left to the optimiser; where graphs are refused.

A recorder that runs again into the memory of the first run stands in for CUDA here; `test_graphed_step_gpu.py` has the
real one.
"""

import json

import pytest
import torch
from testing.small_run import run, write_source

from indexcache.distillation.recipe import Recipe
from indexcache.distillation.training.graphed_step import STEPS_BEFORE_CAPTURE, GraphedSteps
from indexcache.runs.errors import RunError

PLAIN = dict(dense_steps=6, sparse_steps=6, accumulation=1, gradient_checkpointing=False, log_every=2)


class PretendRecorder:
    """As a CUDA graph: the first run computes nothing that counts, and all later ones write to its memory."""

    recorded = 0

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def __call__(self, run):
        type(self).recorded += 1
        found = run()
        fixed = [(p, p.grad) for p in self.parameters if p.grad is not None]
        for value in [*found.values(), *(gradient for _, gradient in fixed)]:
            value.fill_(float("nan"))

        def replay():
            for parameter, _ in fixed:
                parameter.grad = None
            for name, value in run().items():
                found[name].copy_(value)
            for parameter, gradient in fixed:
                gradient.copy_(parameter.grad)
                parameter.grad = None

        return found, replay


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(PretendRecorder, "recorded", 0)
    monkeypatch.setattr(
        "indexcache.distillation.training.trainer.GraphedSteps",
        lambda run, parameters: GraphedSteps(run, parameters, PretendRecorder(parameters())),
    )
    for module in ("run", "training.trainer"):
        monkeypatch.setattr(f"indexcache.distillation.{module}.refuse_where_no_graphs_run", lambda *_: None)
    return PretendRecorder


def log(output):
    entries = json.loads((output / "training_log.json").read_text())
    measured = ("kl", "lm_loss", "loss", "recall", "grad_norm")
    return {
        stage: [{key: entry[key] for key in entry if key.startswith(measured)} for entry in entries[stage]]
        for stage in entries
    }


def test_a_run_from_graphs_equals_a_run_as_it_is(pretend, tmp_path, monkeypatch):
    write_source(tmp_path)
    # They add up in another order.
    monkeypatch.setattr("indexcache.distillation.run.use_all_experts", lambda model: None)
    run(tmp_path, tmp_path / "eager", **PLAIN)
    assert not pretend.recorded
    run(tmp_path, tmp_path / "graphs", cuda_graph=True, **PLAIN)
    # A graph for steps that measure recall, and one for those that do not, in each stage.
    assert pretend.recorded == 4
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("eager", "graphs")]
    assert files[0] == files[1]
    assert log(tmp_path / "eager") == log(tmp_path / "graphs")


def test_inputs_are_copied_and_gradients_come_back_after_zero_grad():
    weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def compute(inputs, kind):
        loss = (weight * inputs["x"]).sum() * (2 if kind else 1)
        loss.backward()
        return {"loss": loss.detach()}

    steps = GraphedSteps(compute, lambda: [weight], PretendRecorder([weight]))
    for number in range(STEPS_BEFORE_CAPTURE + 3):
        x = torch.tensor([1.0, number])
        found = steps.step({"x": x})
        assert weight.grad.tolist() == [1.0, number] and float(found["loss"]) == 2 + 3 * number
        x.zero_()
        weight.grad = None
    assert list(steps.graphs) == [None]
    # Another kind of step is run as it is once, then has a graph of its own.
    for _ in range(2):
        assert float(steps.step({"x": torch.ones(2)}, kind=1)["loss"]) == 10
        assert weight.grad.tolist() == [2.0, 2.0]
        weight.grad = None
    assert list(steps.graphs) == [None, 1]
    # Another shape (the last batch of an epoch, say) does not fit the graph.
    assert float(steps.step({"x": torch.full((1,), 4.0)})["loss"]) == 20


def test_where_capturing_fails_steps_go_on_as_they_are():
    weight = torch.nn.Parameter(torch.ones(1))

    def compute(inputs, kind):
        (weight * inputs["x"]).sum().backward()
        return {"loss": inputs["x"].sum()}

    def record(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    steps = GraphedSteps(compute, lambda: [weight], record)
    for _ in range(STEPS_BEFORE_CAPTURE):
        steps.step({"x": torch.ones(1)})
        weight.grad = None
    with pytest.warns(UserWarning, match="step by step, a CUDA graph could not be made: operation not permitted"):
        steps.step({"x": torch.ones(1)})
    assert weight.grad.tolist() == [1.0]
    weight.grad = None
    assert float(steps.step({"x": torch.ones(1)})["loss"]) == 1


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ({"gradient_checkpointing": True}, "--no-gradient-checkpointing"),
        ({"accumulation": 2}, "--gradient-accumulation-steps 1"),
        ({"isolate_documents": True}, "leave it out"),
    ],
)
def test_recipes_that_no_graph_can_hold_are_refused(given, mend):
    with pytest.raises(RunError, match=mend):
        Recipe(**{"gradient_checkpointing": False, "cuda_graph": True, **given})


def test_a_machine_without_gpu_refuses_before_it_reads_anything(tmp_path):
    write_source(tmp_path)
    with pytest.raises(RunError, match="--cuda-graph needs a CUDA GPU"):
        run(tmp_path, tmp_path / "out", cuda_graph=True, **PLAIN)
    assert not (tmp_path / "out").exists()
