"""`inspect --check`: do a checkpoint's config, its indexer weights and what each engine reads agree?

Only config.json, headers and the first numbers of the indexers' tensors are read. `doctor_probe` runs the model for
what they cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..convert.families import INDEXCACHE, Family, family_of
from ..convert.journal import RECIPE_FILE
from ..io.checkpoint import Checkpoint, read_checkpoint, read_json
from ..io.open_checkpoint import open_checkpoint
from ..io.sources import ConversionError, Source
from .doctor_config import config_findings
from .doctor_findings import ERROR, Diagnosis, Finding, errors_first
from .doctor_indexers import Layers, count_layers, layer_findings, value_findings
from .doctor_probe import probe as run_probe
from .doctor_schedule import READERS, read_schedule, schedule_findings, spelled_schedules


def diagnose(source: Source, engines: Sequence[str] | None = None, *, probe: bool = False) -> Diagnosis:
    """Compare a checkpoint's config, its weights and what each engine reads.

    Args:
        source: a checkpoint of `deepseek_v32` or `glm_moe_dsa`, an IndexCache checkpoint, or an export.
        engines: those that must run it: what one of them cannot run is then an error. None looks at all engines (an
            IndexCache checkpoint is read by IndexCache alone), and what an engine lacks in a config that is right for
            another is a note.
        probe: also run the model on a prompt longer than top-k, where the checkpoint is whole.

    Raises:
        ConversionError: an unknown engine, files that cannot be read, a family without lightning indexers that we
            know, or a probe that cannot run here.
    """
    for engine in engines or ():
        if engine not in READERS:
            raise ConversionError(f"{engine!r} is no engine that is known: choose of {', '.join(READERS)}")
    checkpoint = read_checkpoint(source)
    config = checkpoint.config
    family = family_of(config, source.location)
    depth = config.get("num_hidden_layers")
    if type(depth) is not int or depth < 1:
        raise ConversionError(f"{source.location}: config.json has num_hidden_layers={depth!r}: it must be a number")
    layers = count_layers(checkpoint)
    if depth > 2 * layers.count + 1000:
        raise ConversionError(
            f"{source.location}: config.json has num_hidden_layers={depth}, and the weights hold {layers.count} "
            "layers: fix the config, or fetch the weights again"
        )
    diagnosis = _compare(checkpoint, family, layers, engines)
    measured: dict[str, Any] | None = None
    found = _not_whole(source) if diagnosis.ok or probe else []
    if probe and found:
        measured = {"not_run": found[0].what}
    elif probe:
        measured, found = run_probe(source)
    if found and found[0].code == "not_whole" and not diagnosis.ok:
        # What was found before says why, and better.
        found = []
    return replace(diagnosis, probe=measured, findings=errors_first([*diagnosis.findings, *found]))


def _compare(checkpoint: Checkpoint, family: Family, layers: Layers, engines: Sequence[str] | None) -> Diagnosis:
    config = checkpoint.config
    depth = config["num_hidden_layers"]
    looked_at = list(engines or ([INDEXCACHE] if config["model_type"] == INDEXCACHE else READERS))
    spelled, findings = spelled_schedules(config, depth)
    # What is wrong with a spelling is said once, not again by each engine that stumbles over it.
    sound = not findings
    findings += _recipe(checkpoint, spelled)
    counted = layer_findings(config, layers)
    findings += counted
    readings = [read_schedule(engine, config, depth) for engine in looked_at]
    if not any(finding.severity == ERROR and finding.code.startswith("layer_count") for finding in counted):
        shares = any("S" in letters for letters in spelled.values()) or len(layers.whole) < depth
        held = layers.whole | set(layers.partial)
        compared = [reading for reading in readings if sound or reading.letters is not None]
        findings += schedule_findings(compared, held, shares, engines is not None)
    findings += config_findings(config, family, looked_at, engines is not None, bool(layers.whole))
    findings += value_findings(checkpoint, layers)
    held_letters = "".join("F" if layer in layers.whole else "S" for layer in range(layers.count))
    return Diagnosis(
        checkpoint.source.location, str(config["model_type"]), held_letters, readings, errors_first(findings)
    )


def _recipe(checkpoint: Checkpoint, spelled: dict[str, str]) -> list[Finding]:
    """The schedule that a conversion was asked for, which weights that hold every indexer do not show."""
    if checkpoint.config["model_type"] != INDEXCACHE or RECIPE_FILE not in checkpoint.files:
        return []
    asked: Any = read_json(checkpoint.source, RECIPE_FILE).get("index_share_pattern")
    differing = [name for name, letters in spelled.items() if letters != asked]
    if not isinstance(asked, str) or not differing:
        return []
    return [
        Finding(
            "schedule_not_the_recipes", ERROR, ", ".join(differing),
            f"the conversion was asked for {asked}, and config.json spells {spelled[differing[0]]}",
            "other layers run their indexers than was searched or trained",
            f"set index_share_pattern to {asked} and indexer_types with it, or convert again", (INDEXCACHE,),
        )
    ]  # fmt: skip


def _not_whole(source: Source) -> list[Finding]:
    """Whatever else keeps a model from being made of the checkpoint: tensors missing, unknown or of a wrong shape."""
    try:
        open_checkpoint(source)
    except ConversionError as error:
        return [
            Finding(
                "not_whole", ERROR, "config.json and weights", str(error),
                "IndexCache refuses it; transformers fills what is missing with random numbers",
                "fetch it again, or fix the config",
            )
        ]  # fmt: skip
    return []
