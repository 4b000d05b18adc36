"""What an evaluation shows: tables in the terminal, pictures, and one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..runs.pages.page import facts, picture, table, write_page


def label(document: dict[str, Any], number: int) -> str:
    """A column's label, the least that is unique: the checkpoint's name, the pattern, or both."""
    model = document["models"][number]
    several = len({(other["name"], other["sha256"]) for other in document["models"]}) > 1
    patterns = len({other["pattern"] for other in document["models"]}) > 1
    if not patterns:
        return str(model["name"])
    return f"{model['name']} {model['pattern']}" if several else str(model["pattern"])


def perplexity_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of losses."""
    scores = document["perplexity"]
    has_recall = any("recall" in entry for entry in scores)
    head = ["model", "pattern", "full layers", "loss", "perplexity", "rise", *(["recall"] if has_recall else [])]
    rows = []
    for entry in scores:
        rise = ""
        if "rise" in entry:
            error = entry.get("rise_standard_error")
            rise = f"{entry['rise']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
        row = [*_column(document, entry), f"{entry['loss']:.4f}", f"{entry['perplexity']:.3f}", rise]
        if has_recall:
            row.append(f"{entry['recall']:.3f}" if "recall" in entry else "")
        rows.append(row)
    return head, rows


def retrieval_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of answers given, a column a length."""
    lengths = sorted({at["length"] for entry in document["retrieval"] for at in entry["lengths"]})
    head = ["model", "pattern", "full layers", *(f"{length:,}" for length in lengths)]
    rows = []
    for entry in document["retrieval"]:
        found = {at["length"]: f"{at['accuracy']:.1%}" for at in entry["lengths"]}
        rows.append([*_column(document, entry), *(found.get(length, "") for length in lengths)])
    return head, rows


def overlap_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of overlaps."""
    rows = []
    for entry in document["overlap"]:
        neighbours, served = entry["neighbours"], entry["shared_layers"]
        mean = f"{sum(neighbours) / len(neighbours):.3f}" if neighbours else ""
        rows.append([*_column(document, entry)[:2], mean, "" if served is None else f"{served:.3f}"])
    return ["model", "pattern", "neighbouring full layers", "shared layers with their source"], rows


def _column(document: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Name, pattern and full layers of the model that an entry is about."""
    model = document["models"][entry["model"]]
    return [model["name"], model["pattern"], f"{model['full_layers']}/{model['num_layers']}"]


SECTIONS = {
    "perplexity": ("Loss and perplexity", perplexity_rows),
    "retrieval": ("Answers given, by context length", retrieval_rows),
    "overlap": ("Overlap of selections, |A ∩ B| / k", overlap_rows),
}


def table_of(document: dict[str, Any], task: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a task's table, without the column of names where there is one name only."""
    head, rows = SECTIONS[task][1](document)
    if len({row[0] for row in rows}) > 1:
        return head, rows
    return head[1:], [row[1:] for row in rows]


def draw_tables(document: dict[str, Any]) -> RenderableType:
    """The tables for a terminal."""
    parts: list[RenderableType] = []
    for task, (title, _) in SECTIONS.items():
        if task not in document:
            continue
        head, rows = table_of(document, task)
        columns = [
            Column(name, overflow="fold", min_width=12 if name == "pattern" else None, justify=_side(name))
            for name in head
        ]
        drawn = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            drawn.add_row(*row)
        parts += [drawn, Text("")]
    return Group(*parts)


def _side(name: str) -> Any:
    return "left" if name in {"model", "pattern"} else "right"


def write_report(document: dict[str, Any], folder: Path) -> Path:
    """Draw the pictures beside `evaluation.json` and write the page; needs matplotlib."""
    from ..runs.pages.figures import draw_loss_by_position, draw_overlaps, draw_retrieval
    from .run import EVALUATION_FILE, REPORT_FILE

    pictures = {"perplexity": draw_loss_by_position, "retrieval": draw_retrieval, "overlap": draw_overlaps}
    captions = {
        "perplexity": "Loss by place in the window",
        "retrieval": "Retrieval by context length and depth",
        "overlap": "Overlap of the full layers' selections",
    }
    labels = [label(document, number) for number in range(len(document["models"]))]
    parts = []
    for task, (title, _) in SECTIONS.items():
        if task not in document:
            continue
        path = folder / f"{task}.png"
        pictures[task](document, labels, path)
        parts += [f"<h2>{title}</h2>", table(*table_of(document, task)), picture(captions[task], path)]
    recipe = {name: value for name, value in document["recipe"].items() if name != "sampling"}
    recipe |= {**document["recipe"]["sampling"], **document["versions"]}
    recipe["seconds"] = document["seconds"]
    for given in document["data"]:
        if "windows" in given:
            recipe[given["source"]] = (
                f"{given['windows']} windows of {given['seqlen']:,} tokens, {given['origin']}, sha256 "
                f"{given['sha256'][:16]}"
            )
    recipe |= {f"{model['name']} sha256": model["sha256"][:16] for model in document["models"]}
    parts += ["<h2>Recipe</h2>", facts(recipe), f"<p>All figures: <code>{EVALUATION_FILE}</code></p>"]
    names = list(dict.fromkeys(model["name"] for model in document["models"]))
    return write_page("Evaluation of " + ", ".join(names), parts, folder / REPORT_FILE)
