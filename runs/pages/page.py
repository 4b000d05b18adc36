"""One self-contained HTML page: text, tables and pictures in one file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: left;
border-bottom: 1px solid #e3e6ea } td.n { text-align: right; font-variant-numeric: tabular-nums }
code { font: 13px ui-monospace, monospace } img { max-width: 100% } .asked { background: #eef4fb }
.warning { border: 2px solid #c0392b; padding: .5rem 1rem } h2 { margin-top: 2.2rem }
"""


def write_page(title: str, parts: Iterable[str], path: Path) -> Path:
    """Write `parts` (HTML) under a title; nothing outside the file is needed to show it."""
    head = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
    ]
    path.write_text("\n".join([*head, *parts]) + "\n", encoding="utf-8")
    return path


def picture(title: str, file: Path) -> str:
    """A PNG under a heading, its bytes in the page."""
    image = base64.b64encode(file.read_bytes()).decode()
    return f"<h2>{escape(title)}</h2><img alt='{escape(title)}' src='data:image/png;base64,{image}'>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], marked: Iterable[int] = ()) -> str:
    """A table; numbers and what looks like them stand right, patterns in typewriter face, `marked` rows shaded."""
    marked = set(marked)
    lines = ["<tr>" + "".join(f"<th>{escape(text)}" for text in head)]
    for number, row in enumerate(rows):
        cells = "".join(_cell(str(value)) for value in row)
        lines.append(f"<tr{' class=asked' if number in marked else ''}>{cells}")
    return f"<table>{''.join(lines)}</table>"


def facts(values: dict[str, object]) -> str:
    """Names and values, one a row."""
    rows = "".join(f"<tr><th>{escape(str(name))}<td>{escape(_fact(value))}" for name, value in values.items())
    return f"<table>{rows}</table>"


def _fact(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _cell(text: str) -> str:
    if text and set(text) <= {"F", "S"}:
        return f"<td><code>{text}</code>"
    number = text[:1].isdigit() or text[:1] in "+-"
    return f"<td{' class=n' if number else ''}>{escape(text)}"
