"""Write the table of docs/ecosystem.md from what the rows left: `write_table.py RESULTS.json docs/ecosystem.md`.

What is between the page's two marks is replaced, and nothing else. Fails, after writing, when a row failed.
"""

import json
import sys
from datetime import date
from pathlib import Path

BEGIN, END = "<!-- table: written by make test-ecosystem -->", "<!-- end of the table -->"
# Not installed here for a reason that is the tool's; the row runs where it is.
ABSENT = {
    "llmcompressor": "not installed: 0.14 wants transformers 5.17 or older",
    "gptqmodel": "not installed: its build looks for torch, which pip's isolated build has not",
}


def said(outcome):
    """A row's cell for one way."""
    if outcome is None:
        return "not run"
    if "failed" in outcome:
        return "**failed**"
    if "skipped" in outcome:
        return "-"
    return "works" if outcome["works"] else "no"


def reason(outcomes):
    """Why a row does not work, where it does not; one sentence."""
    for outcome in outcomes:
        if outcome is None:
            continue
        absent = [ABSENT[name] for name, version in outcome["versions"].items() if version is None and name in ABSENT]
        found = outcome.get("reason") or outcome.get("failed") or (absent[0] if absent else outcome.get("skipped"))
        if found:
            return found
    return ""


def table(results):
    """The table's lines, and how many rows work, and how many there are."""
    ways = [results.get("installed", {}), results.get("remote", {})]
    lines, working = ["| tool | version | what | installed | remote code | |", "|---|---|---|---|---|---|"], 0
    names = list(dict.fromkeys(name for way in ways for name in way))
    rows = sorted(names, key=lambda name: next(way[name]["file"] for way in ways if name in way))
    for name in rows:
        outcomes = [way.get(name) for way in ways]
        any_outcome = next(outcome for outcome in outcomes if outcome)
        version = next(iter(any_outcome["versions"].values())) or "-"
        cells = [said(outcome) for outcome in outcomes]
        # One way may not apply to a row, and none fails.
        working += "works" in cells and not {"no", "**failed**"} & set(cells)
        text = [any_outcome["tool"], version, any_outcome["what"], *cells, reason(outcomes)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in text) + " |")
    return lines, working, len(rows)


def main(results_path, page_path):
    """Write the page's table; returns the exit code."""
    results, page = json.loads(Path(results_path).read_text()), Path(page_path)
    lines, working, count = table(results)
    head, _, rest = page.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    summary = f"{working} of {count} rows work ({date.today().isoformat()}, on a CPU)."
    page.write_text("\n".join([f"{head}{BEGIN}", summary, "", *lines, END]) + tail)
    failed = [f"{way}: {name}" for way in results for name, row in results[way].items() if "failed" in row]
    print("\n".join([summary, *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
