"""Draw a plan in the terminal, with rich."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..conversion.check.drawing import human_bytes
from .known_gpus import GIB
from .placement import MEMORY_KINDS


def draw_plan(document: dict[str, Any]) -> RenderableType:
    """What `plan` prints."""
    gpu, length = document["gpu"], document["length"]
    weights = "block fp8" if document["fp8"] else document["dtype"]
    mtp = document["mtp_bytes"]
    behind = f", of it {human_bytes(mtp)} for multi-token prediction, which is not loaded" if mtp else ""
    drawn: list[RenderableType] = [
        Text(document["location"], style="bold"),
        Text(f"{human_bytes(document['bytes'])} on disk, {weights}{behind}"),
        Text(
            f"{document['gpus']} x {gpu['name']}, {gpu['bytes'] / GIB:.1f} GiB each ({gpu['source']}); "
            f"{document['batch']} x {length:,} tokens, {document['cache']} cache"
        ),
    ]
    for part in document["patterns"]:
        drawn += [Text(), _memory(part, document)]
    drawn += [Text(), _times(document)]
    drawn += [Text(f"{name}: left out, {reason}") for name, reason in document["skipped"].items()]
    drawn += [Text(f"note: {note}", style="dim") for note in document["notes"]]
    drawn += [Text(f"rates: {source}", style="dim") for source in document["sources"]]
    commands = _commands(document)
    return Group(*drawn, *([Text(), commands] if commands is not None else []))


def _memory(part: dict[str, Any], document: dict[str, Any]) -> Table:
    entries = part["placements"]
    columns = [
        Column("GiB, on the fullest GPU", no_wrap=True),
        *(Column(entry["name"], justify="right") for entry in entries),
    ]
    title = f"Memory with {part['name']}: {part['full']} of {len(part['pattern'])} layers have indexers"
    table = Table(*columns, title=title, title_justify="left")
    for kind in MEMORY_KINDS:
        sizes = [entry["memory"][kind] if "memory" in entry else None for entry in entries]
        if any(sizes):
            table.add_row(kind, *("" if size is None else _gib(size) for size in sizes))
    table.add_section()
    table.add_row("sum", *(_gib(entry["total"]) if "total" in entry else "" for entry in entries))
    table.add_row("fits", *(_verdict(entry) for entry in entries))
    longest, batch = document["longest"], document["batch"]
    # A plus says that the model takes no longer ones.
    table.add_row(f"longest, batch {batch}", *(_limit(entry.get("largest_length"), longest) for entry in entries))
    most = f"most of {document['length']:,} tokens"
    table.add_row(most, *(_limit(entry.get("largest_batch"), None) for entry in entries))
    return table


def _times(document: dict[str, Any]) -> Table:
    table = Table(
        Column("placement", no_wrap=True),
        "pattern",
        Column("prefill, s", justify="right"),
        "",
        Column("decode, tokens/s", justify="right"),
        "",
        title="Time: measured, reckoned from measured rates, or a bound that no run beats",
        title_justify="left",
    )
    for number, first in enumerate(document["patterns"][0]["placements"]):
        for part in document["patterns"]:
            entry = part["placements"][number]
            if "prefill" not in entry:
                continue
            prefill, decode = entry["prefill"], entry["decode"]
            table.add_row(
                first["name"] + ("" if entry["fits"] else " (does not fit)"),
                part["name"],
                f"{'> ' * (prefill['label'] == 'bound')}{prefill['seconds']:.3g}",
                prefill["label"],
                f"{'< ' * (decode['label'] == 'bound')}{decode['tokens_per_second']:.3g}",
                decode["label"],
            )
        table.add_section()
    return table


def _commands(document: dict[str, Any]) -> RenderableType | None:
    """How to run what fits, with the last pattern for which something does."""
    for part in reversed(document["patterns"]):
        fitting = [entry for entry in part["placements"] if entry["fits"]]
        if not fitting:
            continue
        lines = [Text(f"To run it with {part['name']}", style="bold")]
        if fitting[0]["commands"]["convert"]:
            lines.append(Text(fitting[0]["commands"]["convert"]))
        for entry in fitting:
            commands = entry["commands"]
            lines.append(Text(f"{entry['name']}: {commands['start']}, a script that begins with", style="bold"))
            lines += [Text(f"    {line}") for line in commands["load"].splitlines()]
        return Group(*lines)
    return None


def _gib(size: int) -> str:
    """Three digits, or two places."""
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.005 or not size else "< 0.01"


def _verdict(entry: dict[str, Any]) -> Text:
    if "why_not" in entry:
        return Text(f"cannot: {entry['why_not']}", style="yellow")
    return Text("yes", style="green") if entry["fits"] else Text("no", style="red")


def _limit(largest: int | None, most: int | None) -> str:
    if largest is None:
        return ""
    if largest == 0:
        return "none"
    return f"{largest:,}" + ("+" if largest == most else "")
