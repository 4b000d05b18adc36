"""Files and modules that the documents name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
# The changelog tells of what was.
DOCUMENTS = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_and_modules_exist(document):
    text = document.read_text()
    files = set(re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|json|md|cfg))", text))
    assert sorted(name for name in files if not is_there(name)) == []
    modules = re.findall(r"-m indexcache\.([\w.]+)", text)
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def is_there(name):
    """In the repository, or a name that a user's folder has: no folder of ours begins it."""
    first = name.split("/")[0]
    return (ROOT / name).exists() or not (ROOT / first).is_dir()


def test_the_newcomer_s_table_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for what, file in (
        ("ENGINES", "conversion/publish/export.py"),
        ("FAMILIES", "conversion/convert/families.py"),
        ("KINDS", "evaluation/retrieval.py"),
        ("PromptMaker", "evaluation/retrieval.py"),
        ("_VERBS", "cli.py"),
        ("Backend", "kernels/norm_rope_linear/rms_norm.py"),
    ):
        assert f"`{file}`" in text and what in text
        assert re.search(rf"\b{what}\b", (ROOT / file).read_text()), (what, file)
