"""Draw patterns, plans and verdicts in the terminal, with rich."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ...configuration.share_pattern import SharePattern
from ..convert.plan import Plan
from ..io.checkpoint import CONFIG_FILE
from ..io.terminal_text import printable
from ..publish.hub_contents import HubContents
from ..publish.refresh import RefreshPlan
from .verify import Verification

# One colour a group, so that a shared layer shows whose selection it reads.
_COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_CELLS_A_LINE = 32


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KB`, in powers of 1000 as shard sizes are."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def contents_text(contents: HubContents) -> str:
    """What a push sends, and what stays with its reason."""
    lines = [f"{len(contents.files)} files, {human_bytes(contents.nbytes)}: {', '.join(contents.files)}"]
    lines += [f"stays here: {name} ({why})" for name, why in contents.left.items()]
    return "\n".join(lines)


def refresh_text(plan: RefreshPlan, dry_run: bool) -> str:
    """What a refresh changed, or would change."""
    if plan.is_current:
        return f"{plan.location}: has the code of IndexCache {plan.new_version} already"
    told = f"code of IndexCache {plan.old_version or '(unknown)'} -> {plan.new_version}"
    lines = [f"{plan.location}: {told}{' (--dry-run: nothing written)' if dry_run else ''}"]
    for what, names in (("changed", plan.changed), ("added", plan.added), ("removed", plan.removed)):
        if names:
            lines.append(f"{what}: {', '.join(names)}")
    if CONFIG_FILE in plan.content:
        lines.append(f"config.json: indexcache_version {plan.new_version}, nothing else")
    return "\n".join(lines)


def draw_cells(pattern: SharePattern) -> Text:
    """The pattern as coloured cells, under the number of each line's first layer."""
    colour = {full: _COLOURS[i % len(_COLOURS)] for i, full in enumerate(pattern.groups)}
    text = Text()
    for start in range(0, len(pattern), _CELLS_A_LINE):
        text.append(f"{start:>4} ", style="dim")
        for layer in range(start, min(start + _CELLS_A_LINE, len(pattern))):
            shade = colour[pattern.source_of(layer)]
            text.append(
                f" {pattern.letters[layer]}", style=f"bold reverse {shade}" if pattern.is_full(layer) else shade
            )
        text.append("\n")
    return text


def draw_description(description: dict[str, Any]) -> RenderableType:
    """What `inspect` prints."""
    pattern = SharePattern.parse(description["pattern"])
    facts = Table.grid(padding=(0, 2))
    cache = description["cache"]
    origin = description["source_model_type"]
    dtypes = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in description["bytes_by_dtype"].items())
    for name, value in (
        ("model type", description["model_type"] + (f" (from {origin})" if description["is_indexcache"] else "")),
        ("weights", f"{human_bytes(description['bytes'])} in {description['shards']} shards: {dtypes}"),
        ("parameters", f"{description['parameters']:,}"),
        ("indexers", f"{pattern.num_full} full, {len(pattern.shared_layers)} shared of {len(pattern)} layers"),
        (
            "top-k",
            f"{description['index_topk']:,} keys, {description['index_n_heads']} heads of "
            f"{description['index_head_dim']}",
        ),
        ("MTP layers", ", ".join(map(str, description["mtp_layers"])) or "none"),
        (
            "cache a token",
            f"{cache['latents']:,} B latents + {cache['index_keys']:,} B index keys "
            f"({cache['index_keys_all_full']:,} with every layer full: {cache['saved_share']:.1%} of the cache saved)",
        ),
    ):
        facts.add_row(Text(name, style="bold"), Text(value))
    table = Table("layer", "indexer", "reads the selection of", "indexer weights", title="Indexers")
    for entry in description["indexers"]:
        own = entry["reads"] == entry["layer"]
        table.add_row(
            str(entry["layer"]),
            entry["type"],
            "itself" if own else f"layer {entry['reads']}",
            human_bytes(entry["bytes"]) if entry["bytes"] else Text("absent", style="dim"),
        )
    return Group(Text(description["location"], style="bold"), facts, Text(), draw_cells(pattern), table)


def draw_plan(plan: Plan) -> RenderableType:
    """What `convert --dry-run` prints."""
    table = Table(Column("shard", no_wrap=True), "what happens", "tensors", "bytes")
    dropped: dict[str, int] = {}
    for info in plan.dropped:
        dropped[info.file] = dropped.get(info.file, 0) + 1
    for shard in plan.shards:
        cast = sum(not tensor.is_copied for tensor in shard.tensors)
        notes = [f"{dropped[shard.file]} tensors dropped"] if shard.file in dropped else []
        notes += [f"{cast} tensors cast"] if cast else []
        what = "passed through whole" if shard.is_whole else f"rewritten{': ' if notes else ''}{', '.join(notes)}"
        table.add_row(Text(shard.file), what, f"{len(shard.tensors):,}", human_bytes(shard.nbytes))
    for file in plan.vanished_files:
        table.add_row(Text(file, style="dim"), Text("not kept under this name", style="dim"), "", "")
    summary = plan_summary(plan)
    line = (
        f"{summary['kept']:,} tensors kept ({human_bytes(plan.nbytes)}), {summary['dropped']:,} dropped "
        f"({human_bytes(summary['dropped_bytes'])}), {summary['folded']:,} scales folded into their weights"
    )
    if plan.rewritten_to_drop:
        line += (
            f"\n{human_bytes(plan.rewritten_to_drop)} are written anew only to drop indexers: with "
            "--keep-shared-indexers those shards pass whole"
        )
    heading = Text(plan.checkpoint.source.location, style="bold")
    said = (Text(printable(f"note: {note}")) for note in plan.warnings)
    return Group(heading, draw_cells(plan.pattern), table, Text(line), *said)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready values."""
    return {
        "pattern": plan.pattern.letters,
        "kept": len(plan.weight_map),
        "kept_bytes": plan.nbytes,
        "dropped": len(plan.dropped),
        "dropped_bytes": sum(info.nbytes for info in plan.dropped),
        "dropped_layers": plan.pattern.shared_layers if plan.dropped else [],
        "folded": len(plan.folded),
        "rewritten_to_drop_bytes": plan.rewritten_to_drop,
        "shards": [
            {
                "file": shard.file,
                "action": "pass" if shard.is_whole else "rewrite",
                "tensors": len(shard.tensors),
                "bytes": shard.nbytes,
            }
            for shard in plan.shards
        ],
        "vanished_shards": plan.vanished_files,
        "warnings": list(plan.warnings),
    }


def draw_verification(result: Verification) -> RenderableType:
    """What `verify` prints."""
    lines = [Text(f"{result.tensors_equal:,} tensors equal, byte for byte ({human_bytes(result.bytes_equal)})")]
    if result.tensors_cast:
        lines.append(Text(f"{result.tensors_cast:,} of them after the cast that the recipe names"))
    if result.indexers_dropped:
        lines.append(Text(f"indexers dropped in layers {', '.join(map(str, result.indexers_dropped))}, all shared"))
    logits = result.logits
    if logits.get("compared"):
        lines.append(
            Text(
                f"logits of {logits['tokens']} tokens against {logits['reference']} on the source's weights, both "
                f"with this pattern: max |difference| {logits['max_abs_difference']:.3g}, at the median token "
                f"{logits['median_abs_difference']:.3g}, KL {logits['mean_kl']:.3g}"
            )
        )
    lines += [Text(printable(f"warning: {warning}"), style="yellow") for warning in result.warnings]
    lines += [Text(printable(f"differs: {difference}"), style="red") for difference in result.differences]
    colour = {"verified": "green", "not verified": "red"}.get(result.verdict, "yellow")
    lines.append(Text(result.verdict, style=f"bold {colour}"))
    return Group(*lines)


def draw_choices(choices: Iterable[dict[str, Any]], where: str) -> RenderableType:
    """Which backend runs each operation of the kernels, and why not a faster one, from `backend_listing.choices`."""
    table = Table("operation", "for", "runs", "why not", title=f"Kernels on {where}")
    folder = None
    for choice in choices:
        if folder not in (None, choice["folder"]):
            table.add_section()
        folder = choice["folder"]
        reasons = "\n".join(f"{backend}: {reason}" for backend, reason in choice["why_not"].items())
        table.add_row(choice["operation"], choice["example"], choice["runs"], reasons)
    return table
