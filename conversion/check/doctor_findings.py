"""What `inspect --check` reports: findings, what each engine reads, and how both are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..io.terminal_text import printable

ERROR, NOTE = "error", "note"
_COLOURS = {ERROR: "bold red", NOTE: "yellow"}


@dataclass(frozen=True)
class Finding:
    """One disagreement.

    Attributes:
        code: its kind, for scripts.
        severity: `error` where a model that somebody asked for computes something else or does not load; `note`
            where it is slower, or where an engine that nobody asked for would go wrong.
        where: the fields, tensors or layers.
        what: what disagrees with what.
        effect: what happens at run time.
        fix: what to change.
        engines: the engines that it concerns.
    """

    code: str
    severity: str
    where: str
    what: str
    effect: str
    fix: str
    engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The schedule that an engine takes from a config.

    Attributes:
        engine: its name, as `export --to` spells it, or `indexcache`.
        letters: `F` (runs an indexer) or `S` a layer; None when the engine refuses the config.
        field: which field it came from; None when the config has none that the engine reads.
        problem: why the engine refuses the config.
        knows_family: whether the engine knows the `model_type` at all.
    """

    engine: str
    letters: str | None
    field: str | None
    problem: str | None = None
    knows_family: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        location: of the checkpoint.
        model_type: of its config.
        held: one letter a layer: `F` where the weights hold an indexer, `S` where they do not.
        readings: one for each engine that was looked at.
        findings: errors first.
        probe: what `doctor_probe.probe` measured; or `not_run`, why it did not; None when it was not asked for.
    """

    location: str
    model_type: str
    held: str
    readings: list[Reading]
    findings: list[Finding]
    probe: dict[str, Any] | None = field(default=None)

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return all(finding.severity != ERROR for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values, with the verdict."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, errors before notes, else in their order."""
    return sorted(findings, key=lambda finding: finding.severity != ERROR)


def layers_text(layers: Iterable[int]) -> str:
    """`3, 5-8`: ascending layer numbers, runs of three or more shortened."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def draw_diagnosis(diagnosis: Diagnosis) -> RenderableType:
    """What `inspect --check` prints."""
    parts: list[RenderableType] = [_engines(diagnosis)]
    if diagnosis.findings:
        parts.append(_findings(diagnosis.findings))
    if diagnosis.probe is not None and "not_run" in diagnosis.probe:
        parts.append(Text(printable(f"probe not run: {diagnosis.probe['not_run']}"), style="yellow"))
    elif diagnosis.probe is not None:
        parts.append(_probe(diagnosis.probe))
    errors = sum(finding.severity == ERROR for finding in diagnosis.findings)
    notes = len(diagnosis.findings) - errors
    counted = f"{errors} error{'s' * (errors != 1)}, {notes} note{'s' * (notes != 1)}"
    if errors:
        parts.append(Text(counted, style="bold red"))
    else:
        parts.append(Text(counted if notes else "config and weights agree", style="bold green"))
    return Group(*parts)


def _engines(diagnosis: Diagnosis) -> Table:
    table = Table("engine", "reads", "schedule", title=printable(f"{diagnosis.location} ({diagnosis.model_type})"))
    for reading in diagnosis.readings:
        if reading.letters is None:
            table.add_row(reading.engine, "", Text(printable(reading.problem or ""), style="red"))
        else:
            source = reading.field or "(no sharing field: every layer full)"
            table.add_row(reading.engine, printable(source), reading.letters)
    table.add_section()
    table.add_row("weights", "layers with an indexer", diagnosis.held)
    return table


def _findings(findings: list[Finding]) -> Table:
    table = Table("finding", "where", "what it does at run time", "fix", show_lines=True)
    for finding in findings:
        kind = Text(f"{finding.severity}: {finding.code}", style=_COLOURS[finding.severity])
        if finding.engines:
            kind.append("\n" + ", ".join(finding.engines), style="dim")
        place = Text(printable(finding.where), style="bold")
        place.append(printable(f"\n{finding.what}"), style="not bold")
        table.add_row(kind, place, printable(finding.effect), printable(finding.fix))
    return table


def _probe(probe: dict[str, Any]) -> Table:
    topk = f"{probe['index_topk']}"
    if "index_topk_lowered_from" in probe:
        topk += f" (lowered from {probe['index_topk_lowered_from']} for this probe)"
    title = f"loss of {probe['tokens']:,} tokens beyond top-k {topk}, nats a token"
    table = Table("run", "loss", "against the config's dense run", title=title)
    dense = probe["losses"]["dense"]
    for name, loss in probe["losses"].items():
        table.add_row(name.replace("_", " "), f"{loss:.4f}", f"{loss - dense:+.4f}")
    return table
