"""README and docs: links lead somewhere, and files, tables and options that they name exist."""

import re
from pathlib import Path

import pytest
import typer

import indexcache
from indexcache.cli import app

ROOT = Path(indexcache.__file__).parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="documents are not installed")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_there_are_documents():
    assert {"README.md", "architecture.md", "results.md"} <= {path.name for path in DOCUMENTS}


@each_document
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w/]+\.\w+)(?:::\w+)?`", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"(?<![\w/.-])docs/[\w/]+\.\w+", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(?:benchmarks/)?(?:results/)?(\w+_(?:h100|h200|cpu)\w*\.json)`", text):
        assert (ROOT / "benchmarks/results" / name).is_file(), name
    for module in re.findall(r"python -m indexcache\.([\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@each_document
def test_options_of_commands_exist(document):
    """Every `--option` of an `indexcache` command in a block of code, lines that are continued included."""
    options = {verb: accepted(verb) for verb in typer.main.get_command(app).commands}
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["indexcache"]:
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= options[words[1]], line


def accepted(verb):
    command = typer.main.get_command(app).commands[verb]
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_the_newcomer_s_table_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for what, file in (
        ("ENGINES", "conversion/publish/export_engines.py"),
        ("FAMILIES", "conversion/convert/families.py"),
        ("KINDS", "evaluation/retrieval.py"),
        ("PromptMaker", "evaluation/retrieval.py"),
        ("_VERBS", "cli.py"),
        ("RENAMED", "distillation/command.py"),
        ("Backend", "kernels/norm_rope_linear/rms_norm.py"),
    ):
        assert f"`{file}`" in text or Path(file).name == "command.py", file
        assert f"`{what}`" in text or what == "Backend", what
        assert re.search(rf"\b{what}\b", (ROOT / file).read_text(encoding="utf-8")), (what, file)
