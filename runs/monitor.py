"""What long work says while it runs: phase, progress, speed, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Monitor:
    """Silent; the base of those that draw."""

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def begin(self, phase: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, text: str = "") -> None:
        """A step is done; `text` says what it gave, where each is worth a line."""

    def entry(self, text: str) -> None:
        """What the steps so far gave, where they are too many for a line each."""

    def advance(self, layer_forwards: int) -> None:
        """Layers were run."""

    def note(self, text: str) -> None:
        """Something worth reading happened."""

    def warn(self, text: str) -> None:
        """Something is likely wrong."""
        self.note(f"warning: {text}")


class TerminalMonitor(Monitor):
    """Draws a bar with the time left on stderr; one line per step where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from .pages.terminal import terminal

        self._console = terminal(stderr=True, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("loading", total=None, speed="")
        self._live = sys.stderr.isatty()
        self._phase, self._steps, self._done = "", 0, 0
        self._forwards, self._phase_start = 0, time.monotonic()

    def __enter__(self) -> Monitor:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def begin(self, phase: str, steps: int) -> None:
        """See `Monitor`."""
        self._phase, self._steps, self._done = phase, steps, 0
        self._forwards, self._phase_start = 0, time.monotonic()
        if self._live:
            self._bar.reset(self._task, total=steps, description=phase, speed="")

    def step(self, text: str = "") -> None:
        """See `Monitor`."""
        self._done += 1
        if self._live:
            # By one, not to a number: shards are finished by several threads.
            self._bar.advance(self._task)
            if text:
                self._bar.update(self._task, description=f"{self._phase}: {text}")
        elif text:
            seconds = time.monotonic() - self._phase_start
            left = seconds / self._done * max(0, self._steps - self._done)
            self.note(f"{self._phase} {self._done}/{self._steps}: {text} ({_clock(left)} left)")

    def entry(self, text: str) -> None:
        """See `Monitor`."""
        if self._live:
            self._bar.update(self._task, description=f"{self._phase}: {text}")
        else:
            seconds = (time.monotonic() - self._phase_start) / max(1, self._done)
            self.note(f"{self._phase} {self._done}/{self._steps}: {text} ({seconds:.2f} s a step)")

    def advance(self, layer_forwards: int) -> None:
        """See `Monitor`."""
        self._forwards += layer_forwards
        if self._live:
            speed = self._forwards / max(1e-3, time.monotonic() - self._phase_start)
            self._bar.update(self._task, speed=f"{speed:.0f} layers/s")

    def note(self, text: str) -> None:
        """See `Monitor`."""
        self._console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """See `Monitor`."""
        from rich.panel import Panel

        self._console.print(Panel(text, title="warning", border_style="bold red"), soft_wrap=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
