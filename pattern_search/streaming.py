"""What a search needs to run on layers that are streamed, and what of a search cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..runs.errors import RunError
from ..runs.journal import ScoreJournal
from ..runs.monitor import Monitor
from ..runs.streaming.layer_source import LayerSource
from .measure.evaluator import Evaluator
from .measure.streamed_evaluator import StreamedEvaluator


@dataclass(frozen=True)
class Streaming:
    """Where a search's layers come from.

    Attributes:
        source: the layers.
        ahead: scores made before they are asked for.
        on_sweep: called after every sweep with the passes that it took.
    """

    source: LayerSource
    ahead: ScoreJournal | None = None
    on_sweep: Callable[[int], None] = lambda passes: None

    def cost(self, evaluators: Iterable[Evaluator]) -> dict[str, Any]:
        """What this run read, and what it ran, as JSON values."""
        reading = self.source.reading
        ran = sum(one.streamed_layer_forwards for one in evaluators if isinstance(one, StreamedEvaluator))
        return {
            "sweeps": reading.sweeps,
            "layers_read": reading.layers,
            "bytes_read": reading.nbytes,
            "seconds_reading": round(reading.seconds_reading, 2),
            "seconds_waited": round(reading.seconds_waited, 2),
            "streamed_layer_forwards": ran,
        }


class SweepNotes:
    """Says after every sweep what it took and read, and how long its layers kept the search waiting."""

    def __init__(self, source: LayerSource, monitor: Monitor) -> None:
        self._source, self._monitor = source, monitor
        self._sweep, self._begun, self._before = 0, time.monotonic(), replace(source.reading)

    def __call__(self, passes: int) -> None:
        """A sweep is done that took so many passes."""
        reading, before, now = self._source.reading, self._before, time.monotonic()
        self._sweep += 1
        self._monitor.note(
            f"sweep {self._sweep}: {passes} passes, {(reading.nbytes - before.nbytes) / 1e9:.2f} GB read, "
            f"{now - self._begun:.1f} s, {reading.seconds_waited - before.seconds_waited:.1f} s waited for layers"
        )
        self._begun, self._before = now, replace(reading)


def check_streamed(objective: str, baselines: Iterable[str]) -> None:
    """Refuse what cannot be streamed.

    Raises:
        RunError: naming the option.
    """
    if objective == "far-kl":
        raise RunError("--objective far-kl runs windows in parts and is not streamed: use kl or lm, or no --stream")
    if "similarity" in baselines:
        raise RunError(
            "--baseline similarity runs every layer with every earlier selection and is not streamed: use --baseline "
            "uniform or none, or no --stream"
        )
