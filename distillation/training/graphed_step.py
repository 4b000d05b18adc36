"""Forward, loss and backward of a training step as one CUDA graph.

A step of a small model is thousands of kernels of a few microseconds, and starting each from Python takes longer than
it runs. Captured once and replayed, they follow each other without Python. What a graph demands holds for a whole
stage of a recipe on one GPU: the same shapes at the same addresses, and no value that Python must look at. Inputs are
copied into fixed tensors, gradients appear in fixed ones; clipping, optimiser and schedule stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn

from ...runs.errors import RunError
from ..recipe import Recipe

# Steps run as they are before any is captured: kernels are compiled and handles made outside graphs.
STEPS_BEFORE_CAPTURE = 3

#: Names of tensors to tensors, of a step's inputs or of what it found.
Tensors = dict[str, torch.Tensor]
#: Runs a function once; gives what it returned, and what runs it again into the same memory.
Record = Callable[[Callable[[], Tensors]], tuple[Tensors, Callable[[], None]]]


def refuse_where_no_graphs_run(recipe: Recipe, use_cpu: bool, processes: int) -> None:
    """Check that this machine runs the graphs which a recipe wants.

    Raises:
        RunError: no GPU, or several processes.
    """
    if not recipe.cuda_graph:
        return
    if use_cpu or not torch.cuda.is_available():
        raise RunError("--cuda-graph needs a CUDA GPU, and this run is on the CPU: leave it out")
    if processes > 1:
        raise RunError(
            f"--cuda-graph serves one process, and this run has {processes}: leave it out, or run it without "
            "`accelerate launch`"
        )


class StepGraph:
    """One captured step.

    Args:
        run: computes a step from its inputs, leaves gradients at the parameters and returns what it found.
        inputs: of the shapes to come; copied.
        parameters: those that may get gradients.
        record: captures.
    """

    def __init__(
        self, run: Callable[[Tensors], Tensors], inputs: Tensors, parameters: Iterable[nn.Parameter], record: Record
    ) -> None:
        parameters = list(parameters)
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        for parameter in parameters:
            # A gradient that is there would be added to at every replay.
            parameter.grad = None
        self.found, self._replay = record(lambda: run(self.inputs))
        self.gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]

    def takes(self, inputs: Tensors) -> bool:
        """Whether inputs have the names, shapes and dtypes that were captured."""
        return _layout(inputs) == _layout(self.inputs)

    def step(self, inputs: Tensors) -> Tensors:
        """Replay: gradients at the parameters, and what the step found, in tensors that the next replay overwrites."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self._replay()
        for parameter, gradient in self.gradients:
            # The optimiser's zero_grad has taken it away.
            parameter.grad = gradient
        return self.found


class GraphedSteps:
    """Runs training steps: the first ones as they are, then from graphs, one for every kind of step.

    Where capturing fails (a module that looks at values, say), it warns and goes on without.

    Args:
        run: `(inputs, kind) -> found`, see `StepGraph`; what it does may depend on the kind, and on nothing else that
            changes from step to step.
        parameters: gives those that may get gradients.
        record: captures; by default a CUDA graph.
    """

    def __init__(
        self,
        run: Callable[[Tensors, Hashable], Tensors],
        parameters: Callable[[], Iterable[nn.Parameter]],
        record: Record | None = None,
    ) -> None:
        self.run, self.parameters = run, parameters
        self.record: Record | None = CudaRecorder() if record is None else record
        self.graphs: dict[Hashable, StepGraph] = {}
        self._steps, self._seen = 0, set[Hashable]()

    def step(self, inputs: dict[str, Any], kind: Hashable = None) -> Tensors:
        """One step; what it found, in tensors that the next step may overwrite."""
        graph = self.graphs.get(kind)
        if graph is None and self._captures(inputs, kind):
            graph = self._capture(inputs, kind)
        if graph is not None and graph.takes(inputs):
            return graph.step(inputs)
        self._steps += 1
        self._seen.add(kind)
        return self.run(inputs, kind)

    def _captures(self, inputs: dict[str, Any], kind: Hashable) -> bool:
        return (
            self.record is not None
            and self._steps >= STEPS_BEFORE_CAPTURE
            and kind in self._seen
            and all(isinstance(value, torch.Tensor) for value in inputs.values())
        )

    def _capture(self, inputs: Tensors, kind: Hashable) -> StepGraph | None:
        assert self.record is not None
        try:
            graph = StepGraph(lambda fixed: self.run(fixed, kind), inputs, self.parameters(), self.record)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.record = None
            for parameter in self.parameters():
                parameter.grad = None
            reason = str(error).splitlines()[0]
            warnings.warn(f"training runs step by step, a CUDA graph could not be made: {reason}", stacklevel=2)
            return None
        self.graphs[kind] = graph
        return graph


class CudaRecorder:
    """Captures CUDA graphs that share memory: what one leaves behind is kept, what it works in is used by the next."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """See `Record`; nothing is computed until the first replay."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            found = run()
        return found, graph.replay


def _layout(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)
        for name, value in inputs.items()
    }
